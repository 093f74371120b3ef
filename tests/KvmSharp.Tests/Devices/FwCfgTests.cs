using System.Buffers.Binary;
using System.Text;
using KvmSharp.Devices;

namespace KvmSharp.Tests.Devices;

/// <summary>QEMU's "QEMU Firmware Configuration (fw_cfg) Device", register by register.</summary>
public sealed class FwCfgTests : IDisposable
{
    private const ulong Access = 0x1000;
    private const ulong Target = 0x2000;

    private readonly VirtualMachine _machine = new(new VirtualMachineOptions { MemorySize = 1 << 20 });
    private readonly FwCfg _device;

    public FwCfgTests() => _device = new FwCfg(_machine.Memory, 0x1_2345_6000, 3);

    public void Dispose() => _machine.Dispose();

    [Fact]
    public void ItemsOfEveryMachine()
    {
        Assert.Equal("QEMU"u8, ReadItem(0, 4));
        Assert.Equal([3, 0, 0, 0], ReadItem(1, 4));
        Assert.Equal(0x1_2345_6000u, BitConverter.ToUInt64(ReadItem(3, 8)));
        Assert.Equal([3, 0], ReadItem(5, 2));
        Assert.Equal([3, 0], ReadItem(0xf, 2));
        Assert.Equal([0, 0, 0, 0], ReadItem(0x19, 4));
    }

    [Fact]
    public void ReadingBeyondTheEndGivesZeros()
    {
        Assert.Equal([3, 0, 0, 0, 0], ReadItem(5, 5));
        Assert.Equal([0, 0], ReadItem(0x1f, 2)); // not there
    }

    [Fact]
    public void SelectingStartsAnew()
    {
        Assert.Equal((byte)'Q', ReadItem(0, 1)[0]);
        Assert.Equal((byte)'E', _device.ReadByte(1));
        Assert.Equal((byte)'Q', ReadItem(0, 1)[0]);
        _device.WriteByte(1, 0x55); // writes are ignored and do not move on
        Assert.Equal((byte)'E', _device.ReadByte(1));
        _device.WriteByte(0, 5); // half a selector selects nothing
        Assert.Equal((byte)'M', _device.ReadByte(1));
        Assert.Equal("QEMU"u8, ReadItem(0x4000, 4)); // the write bit has no meaning any more
    }

    [Fact]
    public void FilesAreInTheDirectory()
    {
        _device.AddFile("opt/zeta", new byte[] { 1, 2, 3 });
        _device.AddFile("opt/alpha", new byte[] { 4 });
        _device.AddFile("etc/empty", ReadOnlyMemory<byte>.Empty);
        Assert.Equal(["etc/empty", "opt/alpha", "opt/zeta"], _device.FileNames);
        var directory = ReadItem(0x19, 4 + 3 * 64);
        Assert.Equal(3u, BinaryPrimitives.ReadUInt32BigEndian(directory));
        for (var i = 0; i < 3; i++)
        {
            var entry = directory.AsSpan(4 + 64 * i, 64);
            var size = BinaryPrimitives.ReadUInt32BigEndian(entry);
            Assert.Equal(((uint[])[0, 1, 3])[i], size);
            Assert.Equal(0x20 + i, BinaryPrimitives.ReadUInt16BigEndian(entry[4..]));
            Assert.Equal(0, BinaryPrimitives.ReadUInt16BigEndian(entry[6..]));
            Assert.Equal(_device.FileNames[i], Encoding.ASCII.GetString(entry[8..]).TrimEnd('\0'));
        }
        Assert.Equal([1, 2, 3, 0], ReadItem(0x22, 4));
    }

    [Fact]
    public void OwnItems()
    {
        _device.AddItem(0x8000, new byte[] { 9 });
        _device.AddItem(0x07, new byte[] { 8 });
        Assert.Equal([9, 0], ReadItem(0x8000, 2));
        Assert.Equal([8], ReadItem(0x07, 1));
        foreach (var key in (ushort[])[0, 0x07, 0x19, 0x20, 0x3fff, 0x4000, 0x7fff, 0xc000, 0xffff])
        {
            Assert.Throws<ArgumentException>(() => _device.AddItem(key, new byte[] { 1 }));
        }
    }

    [Fact]
    public void BadFileNamesAreRefused()
    {
        _device.AddFile(new string('a', 55), new byte[] { 1 });
        foreach (var name in (string[])["", new string('a', 56), new string('a', 55), "a b", "a\0", "ä"])
        {
            Assert.Throws<ArgumentException>(() => _device.AddFile(name, new byte[] { 1 }));
        }
    }

    [Fact]
    public void DmaRegisterGivesTheSignature()
    {
        Assert.Equal("QEMU"u8, BitConverter.GetBytes(_device.ReadValue(4, 4)));
        Assert.Equal(" CFG"u8, BitConverter.GetBytes(_device.ReadValue(8, 4)));
        var data = new byte[8];
        _device.Read(4, data);
        Assert.Equal("QEMU CFG"u8, data);
    }

    [Theory]
    [InlineData(false)]
    [InlineData(true)]
    public void DmaReads(bool inOneAccess)
    {
        var content = new byte[200_000];
        new Random(4).NextBytes(content);
        _device.AddFile("opt/data", content);
        Assert.Equal(0u, Transfer(0x20 << 16 | 8 | 2, (uint)content.Length, Target, inOneAccess));
        var read = new byte[content.Length];
        _machine.Memory.Read(Target, read);
        Assert.Equal(content, read);
        Assert.Equal(0, _device.ReadByte(1)); // it stands at the end
    }

    [Fact]
    public void DmaGoesOnWhereTheItemStands()
    {
        _device.AddFile("opt/data", new byte[] { 1, 2, 3, 4, 5, 6 });
        Assert.Equal(0u, Transfer(0x20 << 16 | 8, 0, 0)); // select
        Assert.Equal(1, _device.ReadByte(1));
        Assert.Equal(0u, Transfer(4, 2, 0)); // skip
        Assert.Equal(0u, Transfer(2, 5, Target));
        var read = new byte[5];
        _machine.Memory.Read(Target, read);
        Assert.Equal([4, 5, 6, 0, 0], read);
    }

    [Fact]
    public void DmaErrorsAreTold()
    {
        Assert.Equal(1u, Transfer(0x10, 4, Target)); // nothing can be written
        Assert.Equal(1u, Transfer(2, 16, (1 << 20) - 8)); // beyond memory
        Assert.Equal(1u, Transfer(2, uint.MaxValue, ulong.MaxValue - 4));
        Assert.Equal(0u, Transfer(0, 4, Target)); // nothing to do
        _device.Write(4, [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xf8]); // no memory for the request: no effect
    }

    [Fact]
    public void HighHalfOfTheAddressIsUsedOnce()
    {
        _device.WriteValue(4, 4, BinaryPrimitives.ReverseEndianness(1u));
        WriteAccess(8 | 5 << 16, 0, 0);
        _device.WriteValue(8, 4, BinaryPrimitives.ReverseEndianness((uint)Access)); // at 4 GiB + Access: no memory
        Assert.NotEqual(0u, _machine.Memory.Read<uint>(Access));
        _device.WriteValue(8, 4, BinaryPrimitives.ReverseEndianness((uint)Access));
        Assert.Equal(0u, _machine.Memory.Read<uint>(Access));
    }

    [Fact]
    public void StateIsSelectionAndPlace()
    {
        _device.AddFile("opt/data", new byte[] { 1, 2, 3 });
        ReadItem(0x20, 1);
        var other = new FwCfg(_machine.Memory, 0x1_2345_6000, 3);
        other.AddFile("opt/data", new byte[] { 1, 2, 3 });
        other.Load(_device.Save());
        Assert.Equal(2, other.ReadByte(1));
    }

    private byte[] ReadItem(ushort key, int count)
    {
        _device.WriteValue(0, 2, key);
        return [.. Enumerable.Range(0, count).Select(_ => _device.ReadByte(1))];
    }

    private void WriteAccess(uint control, uint length, ulong address)
    {
        var access = new byte[16];
        BinaryPrimitives.WriteUInt32BigEndian(access, control);
        BinaryPrimitives.WriteUInt32BigEndian(access.AsSpan(4), length);
        BinaryPrimitives.WriteUInt64BigEndian(access.AsSpan(8), address);
        _machine.Memory.Write(Access, access);
    }

    private uint Transfer(uint control, uint length, ulong address, bool inOneAccess = false)
    {
        WriteAccess(control, length, address);
        if (inOneAccess)
        {
            var at = new byte[8];
            BinaryPrimitives.WriteUInt64BigEndian(at, Access);
            _device.Write(4, at);
        }
        else
        {
            _device.WriteValue(8, 4, BinaryPrimitives.ReverseEndianness((uint)Access));
        }
        var result = new byte[4];
        _machine.Memory.Read(Access, result);
        return BinaryPrimitives.ReadUInt32BigEndian(result);
    }
}
