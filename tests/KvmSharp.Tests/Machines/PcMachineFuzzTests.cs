using System.Globalization;
using KvmSharp.Boot;
using KvmSharp.Devices;
using KvmSharp.Devices.Ide;
using KvmSharp.Devices.Virtio;
using KvmSharp.Networking;
using KvmSharp.Tests.Storage;

namespace KvmSharp.Tests.Machines;

/// <summary>Accesses of a hostile guest to everything that a PC has, of every width and at every offset: nothing may throw.</summary>
public sealed class PcMachineFuzzTests
{
    private static readonly int _accesses = int.Parse(Environment.GetEnvironmentVariable("KVMSHARP_ACCESSES") ?? "40000", CultureInfo.InvariantCulture);

    [Theory]
    [InlineData(1, true)]
    [InlineData(2, true)]
    [InlineData(3, false)]
    [InlineData(4, false)]
    public void MachineSurvivesAnything(int seed, bool firmware)
    {
        using var disk = new ArrayDisk(1 << 20);
        using var disc = new ArrayDisk(1 << 20);
        using var machine = Create(disk, disc, firmware);
        var random = new Random(seed);
        var (ports, mmio, memory) = (machine.VirtualMachine.Ports, machine.VirtualMachine.Mmio, machine.VirtualMachine.Memory);
        var data = new byte[8];
        for (var i = 0; i < _accesses; i++)
        {
            if (i % 1000 == 0)
            {
                machine.Display!.Capture();
                // What devices find in memory: mostly small numbers, and addresses that are there.
                for (ulong at = 0x1000; at < 0x9000; at += 8)
                {
                    memory.Write(at, Value(random));
                }
            }
            BitConverter.TryWriteBytes(data, Value(random));
            var length = 1 << random.Next(4);
            if (random.Next(4) == 0)
            {
                // A configuration register of one of the functions.
                ports.Write(0xcf8, BitConverter.GetBytes(0x8000_0000u | (uint)random.Next(32) << 11 | (uint)random.Next(8) / 7 << 8 | (uint)random.Next(64) << 2));
                Access(ports, 0xcfc + (ulong)random.Next(4), random.Next(3) != 0, data.AsSpan(0, Math.Min(length, 4)));
                continue;
            }
            var isPort = random.Next(2) == 0;
            var mappings = (isPort ? ports : mmio).Mappings.ToArray();
            var (address, size, _) = mappings[random.Next(mappings.Length)];
            var offset = random.NextInt64(-3, (long)Math.Min(size, random.Next(3) == 0 ? 0x2_0000u : 0x80u) + 3);
            Access(isPort ? ports : mmio, address + (ulong)offset, random.Next(2) == 0, data.AsSpan(0, length));
            if (i % 50 == 0)
            {
                machine.VirtualMachine.Clock.RunDueTimers();
            }
        }

        var state = machine.VirtualMachine.SaveState();
        using var other = Create(disk, disc, firmware);
        if (Record.Exception(() => other.VirtualMachine.LoadState(state)) is { } exception)
        {
            Assert.IsType<MachineStateException>(exception); // a request under way may have been taken from under its device
        }
    }

    private static void Access(IoBus bus, ulong address, bool isWrite, Span<byte> data)
    {
        if (isWrite)
        {
            bus.Write(address, data);
        }
        else
        {
            bus.Read(address, data);
        }
    }

    private static ulong Value(Random random) => random.Next(7) switch
    {
        0 => 0,
        1 => ulong.MaxValue,
        2 => (ulong)random.Next(0x1000, 0x9000) & ~15UL,
        3 => (ulong)random.NextInt64(),
        4 => 1UL << random.Next(64),
        _ => (ulong)random.Next(256),
    };

    private static PcMachine Create(ArrayDisk disk, ArrayDisk disc, bool firmware)
    {
        VirtioDeviceOptions[] Devices(VirtioTransport transport) =>
        [
            new VirtioBlockOptions(disk) { QueueCount = 2, Transport = transport },
            new VirtioNetworkOptions(new ChannelNetworkBackend(4)) { Transport = transport },
            new VirtioConsoleOptions([new(new MemoryCharacterBackend(1000)), new(new MemoryCharacterBackend(1000), "port")]) { Transport = transport },
            new VirtioBalloonOptions { Transport = transport },
            new VirtioVsockOptions { Transport = transport },
        ];
        return new PcMachine(new PcMachineOptions
        {
            MemorySize = 4 << 20,
            Clock = ClockMode.Virtual,
            Firmware = firmware ? BootImage.FromBytes(new byte[0x1_0000]) : null,
            Display = true,
            Keyboard = true,
            FwCfg = true,
            PanicDevice = true,
            TestDevice = true,
            IsaDebugExit = true,
            SerialPorts = [new MemoryCharacterBackend(1000), new MemoryCharacterBackend(1000)],
            DebugConsole = new MemoryCharacterBackend(1000),
            IdeDrives = [new IdeDiskOptions(disk), null, new IdeCdRomOptions(disc)],
            VirtioDevices = [.. Devices(VirtioTransport.Pci), .. Devices(VirtioTransport.Mmio)],
        });
    }
}
