using KvmSharp.Devices;

namespace KvmSharp.Tests.Devices;

public sealed class DmaControllerTests
{
    [Theory]
    [InlineData(1)]
    [InlineData(2)]
    public void RegistersAreWrittenAndReadInHalves(int portsPerRegister)
    {
        var dma = new DmaController(portsPerRegister);
        ulong At(int register) => (ulong)(register * portsPerRegister);
        for (var register = 0; register < 8; register++)
        {
            dma.WriteByte(At(register), (byte)(0x10 + register));
            dma.WriteByte(At(register), (byte)(0xa0 + register));
        }
        for (var register = 0; register < 8; register++)
        {
            Assert.Equal((0x10 + register, 0xa0 + register), (dma.ReadByte(At(register)), dma.ReadByte(At(register))));
        }
        dma.ReadByte(At(0));
        dma.WriteByte(At(12), 0); // clears the byte pointer
        Assert.Equal(0x10, dma.ReadByte(At(0)));
    }

    [Fact]
    public void MasksAndRequestsAreKept()
    {
        var dma = new DmaController(1);
        Assert.Equal(0x0f, dma.ReadByte(15)); // nothing is let through after a reset
        dma.WriteByte(10, 2);
        Assert.Equal(0x0b, dma.ReadByte(15));
        dma.WriteByte(10, 4 | 2);
        Assert.Equal(0x0f, dma.ReadByte(15));
        dma.WriteByte(14, 0);
        Assert.Equal(0, dma.ReadByte(15));
        dma.WriteByte(15, 0xf5);
        Assert.Equal(5, dma.ReadByte(15));
        dma.WriteByte(9, 4 | 3);
        Assert.Equal(0x80, dma.ReadByte(8));
        dma.WriteByte(9, 3);
        Assert.Equal(0, dma.ReadByte(8));
        dma.WriteByte(9, 4);
        dma.WriteByte(13, 0); // master clear
        Assert.Equal((0, 0x0f, 0), (dma.ReadByte(8), dma.ReadByte(15), dma.ReadByte(13)));
    }

    [Fact]
    public void StateIsSaved()
    {
        var first = new DmaController(2);
        first.WriteByte(2, 0x34);
        first.WriteByte(2, 0x12);
        first.WriteByte(4, 0x78);
        first.WriteByte(22, 0x45); // mode of channel 1
        first.WriteByte(16, 0x04);
        first.WriteByte(28, 0);
        var second = new DmaController(2);
        second.Load(first.Save());
        Assert.Equal(first.Save(), second.Save());
        second.WriteByte(4, 0x56); // the second half
        Assert.Equal((0x78, 0x56), (second.ReadByte(4), second.ReadByte(4)));
        Assert.NotEqual(new DmaController(2).Save(), first.Save());
    }

    [Fact]
    public void MachineHasBothAndTheirPages()
    {
        using var machine = new PcMachine(new PcMachineOptions());
        var ports = machine.VirtualMachine.Ports;
        var data = new byte[1];
        foreach (var port in (ulong[])[0x0f, 0xde])
        {
            Assert.True(ports.Read(port, data));
            Assert.Equal(0x0f, data[0]);
        }
        foreach (var port in (ulong[])[0x81, 0x82, 0x83, 0x87, 0x89, 0x8a, 0x8b, 0x8f])
        {
            ports.Write(port, [(byte)port]);
        }
        Assert.True(ports.Read(0x8f, data));
        Assert.Equal(0x8f, data[0]);
        ports.Write(0x80, [0x33]);
        Assert.Equal(0x33, machine.LastPostCode);
    }
}
