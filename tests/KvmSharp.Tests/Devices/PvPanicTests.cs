using KvmSharp.Devices;

namespace KvmSharp.Tests.Devices;

/// <summary>The device at which kernels tell that they have panicked.</summary>
public sealed class PvPanicTests
{
    [Fact]
    public void EventsAreReported()
    {
        var events = new List<PanicEvents>();
        var device = new PvPanic(events.Add);
        Assert.Equal(3, device.ReadByte(0));
        device.WriteByte(0, 0);
        device.WriteByte(0, 0xfc);
        Assert.Empty(events);
        device.WriteByte(0, 1);
        device.WriteByte(0, 0xfe);
        Assert.Equal([PanicEvents.Panicked, PanicEvents.CrashLoaded], events);
    }

    [Fact]
    public async Task PanicEndsTheMachine()
    {
        await using var machine = new PcMachine(new PcMachineOptions { MemorySize = 2 << 20, PanicDevice = true });
        machine.VirtualMachine.Ports.Write(PvPanic.DefaultPort, [2]);
        Assert.Equal(VirtualMachineStatus.Created, machine.VirtualMachine.Status);
        machine.VirtualMachine.Ports.Write(PvPanic.DefaultPort, [1]);
        Assert.Equal(VmExitKind.Panicked, (await machine.WaitForExitAsync()).Kind);
    }
}
