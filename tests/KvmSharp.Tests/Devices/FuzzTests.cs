using KvmSharp.Devices;

namespace KvmSharp.Tests.Devices;

/// <summary>Random accesses of a hostile guest: nothing throws, and the state still saves and loads.</summary>
public sealed class FuzzTests
{
    [Fact]
    public void DevicesSurviveAnything()
    {
        var clock = new ManualClock();
        var machine = new RecordingMachine();
        var backend = new MemoryCharacterBackend();
        using var vm = new VirtualMachine(new VirtualMachineOptions { MemorySize = 1 << 20 });
        var tests = new PcTestDevice(vm.Memory, [.. Enumerable.Range(0, 24).Select(_ => InterruptLine.NotConnected())]);
        var bus = new IoBus("port", 0xffff);
        IIoDevice[] devices =
        [
            new Uart16550(clock.Clock, InterruptLine.NotConnected(), backend), new CmosRtc(clock.Clock, InterruptLine.NotConnected()),
            new AcpiPm(clock.Clock, InterruptLine.NotConnected(), machine), new ResetControl(machine), new KeyboardReset(machine),
            new SystemControlPortA(machine), new DebugConsole(backend), new IsaDebugExit(machine), new PostCode(),
            new FwCfg(vm.Memory, 1 << 20, 1), tests.Latch, tests.Flush, tests.Interrupts, tests.MemoryBuffer,
        ];
        foreach (var (device, i) in devices.Select((d, i) => (d, i)))
        {
            bus.Map(device, (ulong)i * 16, device is AcpiPm or FwCfg ? 12u : device is Uart16550 ? 8u : 4u);
        }
        var random = new Random(11);
        var data = new byte[8];
        for (var i = 0; i < 100_000; i++)
        {
            var length = 1 << random.Next(4);
            var address = (ulong)random.Next(devices.Length * 16);
            random.NextBytes(data);
            if (random.Next(2) == 0)
            {
                bus.Read(address, data.AsSpan(0, length));
            }
            else
            {
                bus.Write(address, data.AsSpan(0, length));
            }
            if (i % 100 == 0)
            {
                clock.Advance(TimeSpan.FromMicroseconds(random.Next(2_000)));
                backend.SendInput(data);
            }
        }
        foreach (var device in devices.OfType<IDeviceState>())
        {
            device.Load(device.Save());
        }
    }
}
