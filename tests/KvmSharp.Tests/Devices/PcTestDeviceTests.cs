using KvmSharp.Devices;

namespace KvmSharp.Tests.Devices;

public sealed class PcTestDeviceTests : IDisposable
{
    private readonly VirtualMachine _machine = new(new VirtualMachineOptions { MemorySize = 1 << 20 });
    private readonly InterruptLine[] _lines = [.. Enumerable.Range(0, PcTestDevice.InterruptCount).Select(_ => InterruptLine.NotConnected())];
    private readonly PcTestDevice _device;

    public PcTestDeviceTests() => _device = new PcTestDevice(_machine.Memory, _lines);

    public void Dispose() => _machine.Dispose();

    [Fact]
    public void LatchKeepsBytesInEveryWidth()
    {
        PcTestDevice.Map(_machine);
        var ports = _machine.Ports;
        ports.Write(0xe0, [0x11, 0x22, 0x33, 0x44]);
        ports.Write(0xe1, [0xaa]);
        ports.Write(0xe2, [0xbb, 0xcc]);
        var data = new byte[4];
        ports.Read(0xe0, data);
        Assert.Equal([0x11, 0xaa, 0xbb, 0xcc], data);
        ports.Read(0xe1, data.AsSpan(0, 2));
        Assert.Equal([0xaa, 0xbb], data[..2]);
    }

    [Fact]
    public void BufferIsMemoryThatIsNotRam()
    {
        PcTestDevice.Map(_machine);
        Assert.False(_machine.Memory.IsBacked(PcTestDevice.BufferAddress, 1));
        _machine.Mmio.Write(0xff00_fff8, [1, 2, 3, 4, 5, 6, 7, 8]);
        var data = new byte[8];
        _machine.Mmio.Read(0xff00_fff8, data);
        Assert.Equal([1, 2, 3, 4, 5, 6, 7, 8], data);
        _machine.Mmio.Read(0xff00_fffc, data.AsSpan(0, 2));
        Assert.Equal([5, 6], data[..2]);
        Assert.False(_machine.Mmio.Read(0xff01_0000, data));
    }

    [Fact]
    public void PortsDriveInterruptLines()
    {
        _device.Interrupts.WriteByte(5, 1);
        _device.Interrupts.WriteByte(23, 0x80);
        Assert.Equal([5, 23], _lines.Index().Where(l => l.Item.IsHigh).Select(l => l.Index));
        _device.Interrupts.WriteByte(5, 0);
        Assert.False(_lines[5].IsHigh);
        Assert.True(_lines[23].IsHigh);
    }

    [Fact]
    public void FlushLeavesThePageAsItIs()
    {
        _machine.Memory.Write(0x5123, 0x1234_5678u);
        _device.Flush.WriteValue(0, 4, 0x5123);
        _device.Flush.WriteValue(0, 4, 0xffff_ffff); // no memory there
        _device.Flush.WriteByte(0, 0x12);
        Assert.Equal(0x1234_5678u, _machine.Memory.Read<uint>(0x5123));
    }

    [Fact]
    public void StateIsSavedAndLoaded()
    {
        _device.Latch.WriteValue(0, 4, 0x1234_5678);
        _device.MemoryBuffer.WriteByte(0x1234, 9);
        _device.Interrupts.WriteByte(7, 1);
        InterruptLine[] lines = [.. Enumerable.Range(0, PcTestDevice.InterruptCount).Select(_ => InterruptLine.NotConnected())];
        var other = new PcTestDevice(_machine.Memory, lines);
        foreach (var (to, from) in ((IIoDevice, IIoDevice)[])
            [(other.Latch, _device.Latch), (other.MemoryBuffer, _device.MemoryBuffer), (other.Interrupts, _device.Interrupts)])
        {
            ((IDeviceState)to).Load(((IDeviceState)from).Save());
        }
        Assert.Equal(0x1234_5678u, other.Latch.ReadValue(0, 4));
        Assert.Equal(9, other.MemoryBuffer.ReadByte(0x1234));
        Assert.Equal([7], lines.Index().Where(l => l.Item.IsHigh).Select(l => l.Index));
    }
}
