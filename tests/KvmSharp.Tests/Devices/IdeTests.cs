using System.Buffers.Binary;
using System.Text;
using KvmSharp.Devices.Ide;
using KvmSharp.Tests.Devices.Pci;
using KvmSharp.Tests.Storage;

namespace KvmSharp.Tests.Devices;

/// <summary>The IDE controller with a disk and a CD-ROM drive, driven through its ports.</summary>
public sealed class IdeTests : IDisposable
{
    private const int SectorCount = 4096;
    private const ulong First = 0x1f0;
    private const ulong Second = 0x170;
    private const ulong Master = 0xc000;
    private const byte Ready = 0x50;
    private const byte ReadyWithData = 0x58;
    private const byte Failed = 0x51;

    private readonly ArrayDisk _disk = new(SectorCount * 512);
    private readonly ArrayDisk _disc = new(100 * 2048);
    private readonly PciBench _bench;
    private readonly IdeController _ide;

    public IdeTests()
    {
        new Random(1).NextBytes(_disk.Content);
        new Random(2).NextBytes(_disc.Content);
        (_bench, _ide) = CreateBench();
    }

    public void Dispose() => _bench.Dispose();

    private (PciBench, IdeController) CreateBench()
    {
        var bench = new PciBench();
        var ide = new IdeController(bench.Machine, [new IdeDiskOptions(_disk) { SerialNumber = "S1" }, null, new IdeCdRomOptions(_disc)]);
        bench.Host.Add(ide);
        bench.WritePorts(1, 0x20, 4, (uint)Master);
        bench.WritePorts(1, 0x04, 2, 5);
        return (bench, ide);
    }

    [Fact]
    public void DiskIntroducesItself()
    {
        Assert.Equal(0x0101_8000u, _bench.ReadPorts(1, 0x08) & 0xffff_ff00);
        Assert.Equal((1, 1, 0, 0), (In(First + 2), In(First + 3), In(First + 4), In(First + 5)));
        Command(First, 0xec);
        Assert.Equal(ReadyWithData, In(First + 7));
        var words = ReadWords(First, 256);
        Assert.Equal("S1", Text(words, 10, 10));
        Assert.Equal(SectorCount, words[60] | words[61] << 16);
        Assert.Equal(SectorCount, words[100]);
        Assert.Equal(Ready, In(First + 7));
    }

    [Fact]
    public void MissingDriveIsNotThere()
    {
        Out(First + 6, 0x10);
        Assert.Equal(0, In(First + 7));
        Out(First + 2, 0x55);
        Assert.Equal(0, In(First + 2));
    }

    [Theory]
    [InlineData(0x20, 0, 5, 3)]
    [InlineData(0x24, 0, 5, 300)]
    [InlineData(0xc4, 8, 100, 20)]
    [InlineData(0x29, 16, 100, 33)]
    public void SectorsAreReadThroughTheDataPort(byte command, byte multiple, int sector, int count)
    {
        if (multiple != 0)
        {
            Out(First + 2, multiple);
            Command(First, 0xc6);
            Assert.Equal(Ready, In(First + 7));
        }
        SetAddress(sector, count);
        Command(First, command);
        Assert.Equal(Part(_disk.Content, sector * 512, count * 512), Bytes(ReadWords(First, count * 256)));
        Assert.Equal(Ready, In(First + 7));
    }

    [Theory]
    [InlineData(0x30, 0)]
    [InlineData(0x34, 0)]
    [InlineData(0xc5, 4)]
    public void SectorsAreWrittenThroughTheDataPort(byte command, byte multiple)
    {
        Out(First + 2, multiple);
        Command(First, 0xc6);
        var data = new byte[6 * 512];
        new Random(3).NextBytes(data);
        SetAddress(77, 6);
        Command(First, command);
        foreach (var word in data.Chunk(2))
        {
            Assert.Equal(ReadyWithData, In(First + 7));
            _bench.Machine.Ports.Write(First, word);
        }
        Assert.Equal(Ready, In(First + 7));
        Assert.Equal(data, Part(_disk.Content, 77 * 512, data.Length));
    }

    [Fact]
    public void CylindersHeadsAndSectorsAreTranslated()
    {
        Out(First + 2, 1);
        Out(First + 3, 5);
        Out(First + 4, 1);
        Out(First + 5, 0);
        Out(First + 6, 0xa2);
        Command(First, 0x20);
        var sector = (1 * 16 + 2) * 63 + 4;
        Assert.Equal(Part(_disk.Content, sector * 512, 512), Bytes(ReadWords(First, 256)));
        Out(First + 3, 0); // sectors count from 1
        Command(First, 0x20);
        Assert.Equal((Failed, 0x10), (In(First + 7), In(First + 1)));
    }

    [Fact]
    public void DmaFollowsTheTable()
    {
        Table((0x8000L, 0x1000), (0xa000L, 0x400), (0x9004L, 0x0c00));
        SetAddress(8, 16);
        Command(First, 0xc8);
        Out(Master, 0x09);
        Assert.Equal(0x04, In(Master + 2)); // an interrupt, no longer active
        Assert.Equal(Ready, In(First + 7));
        var memory = _bench.Machine.Memory;
        var read = new byte[0x2000];
        memory.Read(0x8000, read.AsSpan(0, 0x1000));
        memory.Read(0xa000, read.AsSpan(0x1000, 0x400));
        memory.Read(0x9004, read.AsSpan(0x1400, 0xc00));
        Assert.Equal(Part(_disk.Content, 8 * 512, 0x2000), read);
        Out(Master, 0);
        Out(Master + 2, 0x04);
        Assert.Equal(0, In(Master + 2));

        Out(Master, 0x01); // the other way, the bus master first
        SetAddress(1000, 16);
        Command(First, 0xca);
        Assert.Equal(0x04, In(Master + 2));
        Assert.Equal(read, Part(_disk.Content, 1000 * 512, 0x2000));
    }

    [Fact]
    public void BadTablesStopTheBusMaster()
    {
        foreach (var regions in ((long, int)[][])[[(0x8000, 0x200)], [(0x4000_0000, 0x2000)], [(0xf_ff00, 0x2000)]])
        {
            Table(regions);
            SetAddress(0, 16);
            Command(First, 0x25);
            Out(Master, 0x09);
            Assert.Equal(0, In(Master + 2) & 5); // neither active nor an interrupt
            Out(Master, 0);
            Out(Master + 2, 0x06);
            Out(0x3f6, 4);
            Out(0x3f6, 0);
            Assert.Equal(Ready, In(First + 7));
        }
        _bench.Machine.Ports.Write(Master + 4, BitConverter.GetBytes(0xffff_fff0)); // a table without memory
        SetAddress(0, 16);
        Command(First, 0x25);
        Out(Master, 0x09);
        Assert.Equal(0, In(Master + 2) & 5);
    }

    [Fact]
    public void WhatIsBeyondTheDiskIsNotFound()
    {
        foreach (var (command, sector, count) in ((byte, int, int)[])[(0x20, SectorCount, 1), (0x24, SectorCount - 1, 2), (0x35, 1 << 27, 1), (0x40, SectorCount, 1)])
        {
            SetAddress(sector, count);
            Command(First, command);
            Assert.Equal((Failed, 0x10), (In(First + 7), In(First + 1)));
        }
        Command(First, 0xc4); // without a count for it
        Assert.Equal((Failed, 0x04), (In(First + 7), In(First + 1)));
        Command(First, 0xb0);
        Assert.Equal((Failed, 0x04), (In(First + 7), In(First + 1)));
    }

    [Fact]
    public void CdRomIsReadByPackets()
    {
        Assert.Equal((0x14, 0xeb), (In(Second + 4), In(Second + 5)));
        Command(Second, 0xa1);
        Assert.Equal(0x85c0, ReadWords(Second, 256)[0]);
        var capacity = Packet(8, 0x25);
        Assert.Equal((99u, 2048u), (BinaryPrimitives.ReadUInt32BigEndian(capacity), BinaryPrimitives.ReadUInt32BigEndian(capacity.AsSpan(4))));
        foreach (var limit in (int[])[2048, 0xfffe, 510])
        {
            Assert.Equal(Part(_disc.Content, 10 * 2048, 3 * 2048), Packet(limit, 0x28, 0, 0, 0, 0, 10, 0, 0, 3));
        }
        Assert.Equal(5, Packet(36, 0x12, 0, 0, 0, 36)[0]);
        Assert.Equal(Ready, In(Second + 7));
        Assert.Equal(3, In(Second + 2));
    }

    [Fact]
    public void CdRomTellsErrorsBySense()
    {
        Assert.Empty(Packet(2048, 0x28, 0, 0, 0, 0, 99, 0, 0, 2));
        Assert.Equal(Failed, In(Second + 7));
        var sense = Packet(18, 3, 0, 0, 0, 18);
        Assert.Equal((5, 0x21), (sense[2], sense[12]));
        Assert.Empty(Packet(2048, 0xff));
        Assert.Equal(0x20, Packet(18, 3, 0, 0, 0, 18)[12]);
        Assert.Equal(0, Packet(18, 3, 0, 0, 0, 18)[2]);
        _ide.InsertDisc(2, null);
        Assert.Empty(Packet(8, 0x25));
        Assert.Equal(0x3a, Packet(18, 3, 0, 0, 0, 18)[12]);
        _ide.InsertDisc(2, _disc);
        Assert.Empty(Packet(8, 0x25));
        Assert.Equal((6, 0x28), (Packet(18, 3, 0, 0, 0, 18) is var s ? s[2] : 0, s[12]));
        Assert.Equal(8, Packet(8, 0x25).Length);
        Assert.Throws<KvmSharpException>(() => _ide.InsertDisc(0, null));
    }

    [Fact]
    public void CdRomIsReadByDma()
    {
        Table((0x8000L, 0x1800));
        _bench.Machine.Ports.Write(Master + 12, BitConverter.GetBytes(0x1000u));
        Out(Second + 1, 1);
        SendPacket(0x28, 0, 0, 0, 0, 20, 0, 0, 3);
        Out(Master + 8, 0x09);
        Assert.Equal(0x04, In(Master + 10));
        var read = new byte[0x1800];
        _bench.Machine.Memory.Read(0x8000, read);
        Assert.Equal(Part(_disc.Content, 20 * 2048, 0x1800), read);
    }

    [Fact]
    public void StateIsKept()
    {
        SetAddress(5, 3);
        Command(First, 0x20);
        ReadWords(First, 300);
        Packet(2048, 0x28, 0, 0, 0, 0, 99, 0, 0, 2);
        var state = _bench.Machine.SaveState();
        var (bench, _) = CreateBench();
        using (bench)
        {
            bench.Machine.LoadState(state);
            Assert.Equal(state.ComputeHash(), bench.Machine.ComputeStateHash());
        }
        _bench.Machine.LoadState(state);
        Assert.Equal(Part(_disk.Content, 5 * 512 + 600, 3 * 512 - 600), Bytes(ReadWords(First, 768 - 300)));
    }

    [Fact]
    public void AnythingCanBeWritten()
    {
        var random = new Random(4);
        Table((0x8000L, 0x1000), (0xffff_0000L, 0x1000));
        for (var i = 0; i < 200_000; i++)
        {
            var port = random.Next(5) switch
            {
                0 => First + (ulong)random.Next(8),
                1 => Second + (ulong)random.Next(8),
                2 => Master + (ulong)random.Next(16),
                3 => random.Next(2) == 0 ? 0x3f6ul : 0x376,
                _ => random.Next(2) == 0 ? First + 7 : Second,
            };
            var data = BitConverter.GetBytes(random.Next(4) == 0 ? 0xa0 : random.Next());
            if (random.Next(3) == 0)
            {
                _bench.Machine.Ports.Read(port, data.AsSpan(0, 1 << random.Next(3)));
            }
            else
            {
                _bench.Machine.Ports.Write(port, data.AsSpan(0, 1 << random.Next(3)));
            }
        }
        var state = _bench.Machine.SaveState();
        _bench.Machine.LoadState(state);
        Assert.Equal(state.ComputeHash(), _bench.Machine.ComputeStateHash());
    }

    private void Table(params ReadOnlySpan<(long, int)> regions)
    {
        for (var i = 0; i < regions.Length; i++)
        {
            _bench.Machine.Memory.Write(0x1000u + 8 * (ulong)i, (uint)regions[i].Item1);
            _bench.Machine.Memory.Write(0x1004u + 8 * (ulong)i, (uint)(regions[i].Item2 & 0xffff) | (i == regions.Length - 1 ? 0x8000_0000 : 0));
        }
        _bench.Machine.Ports.Write(Master + 4, BitConverter.GetBytes(0x1000u));
    }

    // For 28-bit and 48-bit commands alike.
    [Theory]
    [InlineData(false)]
    [InlineData(true)]
    public void DiscThatGoesInTheMiddleOfAReadEndsItWithAnError(bool another)
    {
        Out(Second + 1, 0);
        Out(Second + 4, 0x00);
        Out(Second + 5, 0x08);
        SendPacket(0x28, 0, 0, 0, 0, 10, 0, 0, 4); // READ(10): sectors 10 to 13, one a block
        ReadWords(Second, 1024);
        using var small = new ArrayDisk(2048);
        _ide.InsertDisc(2, another ? small : null);
        ReadWords(Second, 1024); // was on its way; the third sector is of a disc that is gone
        Assert.Equal(Failed, In(Second + 7));
        Assert.Equal(2, In(Second + 1) >> 4); // NOT READY
        Assert.Empty(Packet(2048, 0x28, 0, 0, 0, 0, 0, 0, 0, 1));
        Assert.Equal(another ? 6 : 2, In(Second + 1) >> 4); // the other disc is told as UNIT ATTENTION
        Assert.Equal(another ? 2048 : 0, Packet(2048, 0x28, 0, 0, 0, 0, 0, 0, 0, 1).Length);
    }

    private void SetAddress(int sector, int count)
    {
        Out(First + 2, (byte)(count >> 8));
        Out(First + 3, (byte)(sector >> 24));
        Out(First + 4, 0);
        Out(First + 5, 0);
        Out(First + 2, (byte)count);
        Out(First + 3, (byte)sector);
        Out(First + 4, (byte)(sector >> 8));
        Out(First + 5, (byte)(sector >> 16));
        Out(First + 6, 0xe0);
    }

    private void Command(ulong block, byte command) => Out(block + 7, command);

    private void SendPacket(params byte[] packet)
    {
        Command(Second, 0xa0);
        Assert.Equal(ReadyWithData, In(Second + 7));
        Assert.Equal(1, In(Second + 2));
        foreach (var word in packet.Concat(new byte[12 - packet.Length]).Chunk(2))
        {
            _bench.Machine.Ports.Write(Second, word);
        }
    }

    private byte[] Packet(int limit, params byte[] packet)
    {
        Out(Second + 1, 0);
        Out(Second + 4, (byte)limit);
        Out(Second + 5, (byte)(limit >> 8));
        SendPacket(packet);
        var data = new List<byte>();
        while ((In(Second + 7) & 8) != 0 && data.Count < 1 << 20)
        {
            Assert.Equal(2, In(Second + 2));
            var length = In(Second + 4) | In(Second + 5) << 8;
            Assert.InRange(length, 1, limit);
            data.AddRange(Bytes(ReadWords(Second, (length + 1) / 2))[..length]);
        }
        return [.. data];
    }

    private ushort[] ReadWords(ulong block, int count)
    {
        var words = new ushort[count];
        Span<byte> data = stackalloc byte[2];
        for (var i = 0; i < count; i++)
        {
            _bench.Machine.Ports.Read(block, data);
            words[i] = BitConverter.ToUInt16(data);
        }
        return words;
    }

    private static byte[] Part(byte[] content, int start, int length) => content.AsSpan(start, length).ToArray();

    private static byte[] Bytes(ushort[] words) => [.. words.SelectMany(BitConverter.GetBytes)];

    private static string Text(ushort[] words, int start, int count) =>
        Encoding.ASCII.GetString([.. words.Skip(start).Take(count).SelectMany(w => (byte[])[(byte)(w >> 8), (byte)w])]).TrimEnd();

    private byte In(ulong port)
    {
        Span<byte> data = stackalloc byte[1];
        _bench.Machine.Ports.Read(port, data);
        return data[0];
    }

    private void Out(ulong port, byte value) => _bench.Machine.Ports.Write(port, [value]);
}
