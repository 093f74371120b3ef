using KvmSharp.Boot;
using KvmSharp.Devices;

namespace KvmSharp.Tests.Machines;

public sealed class PcMachineTests
{
    private static readonly TimeSpan Limit = TimeSpan.FromSeconds(60);

    [Fact]
    public void MemoryHasThePcsHoles()
    {
        using var machine = new PcMachine(new PcMachineOptions { MemorySize = 5UL << 30 });
        var memory = machine.VirtualMachine.Memory;
        Assert.Equal([(0UL, 0xa0000UL), (0xc0000, (3UL << 30) - 0xc0000), (4UL << 30, 2UL << 30)],
            memory.Slots.Select(s => (s.Address.Value, s.Size)));
        Assert.Equal([(0UL, 0x9fc00UL, MemoryRangeKind.Usable), (0x9fc00, 0x400, MemoryRangeKind.Reserved), (0xe0000, 0x20000, MemoryRangeKind.Reserved),
                (0x100000, (3UL << 30) - 0x100000, MemoryRangeKind.Usable), (4UL << 30, 2UL << 30, MemoryRangeKind.Usable)],
            MemoryMap.ForPc(memory).Select(r => (r.Address.Value, r.Length, r.Kind)));
        memory.Write((6UL << 30) - 1, (byte)1);
        Assert.False(memory.IsBacked(6UL << 30, 1));
    }

    [Fact]
    public async Task MultibootKernelFindsTheTimerRunning()
    {
        // mov al, 0ah; out 20h, al; 1: in al, 20h; test al, 1; jz 1b; in al, 21h; out 0f4h, al
        byte[] multiboot = [.. new byte[16], 0x02, 0xb0, 0xad, 0x1b, 0, 0, 1, 0, 0xfe, 0x4f, 0x51, 0xe4,
            .. new uint[] { 0x10_0010, 0x10_0000, 0, 0, 0x10_0030 }.SelectMany(BitConverter.GetBytes),
            0xb0, 0x0a, 0xe6, 0x20, 0xe4, 0x20, 0xa8, 0x01, 0x74, 0xfa, 0xe4, 0x21, 0xe6, 0xf4];
        using var machine = new PcMachine(new PcMachineOptions { Kernel = BootImage.FromBytes(multiboot), IsaDebugExit = true });
        var memory = machine.VirtualMachine.Memory;
        Assert.Equal(0xf000_fea5u, memory.Read<uint>(8 * 4));
        Assert.Equal(0xf000_ff53u, memory.Read<uint>(0x10 * 4));
        Assert.Equal(0xcf, memory.Read<byte>(0xf_ff53));
        machine.Start();
        var exit = await machine.WaitForExitAsync().WaitAsync(TimeSpan.FromSeconds(60));
        Assert.Equal(VmExitKind.DebugExit, exit.Kind);
        Assert.Equal((0xfa << 1 | 1) & 0xff, exit.ExitCode & 0xff);
    }

    [Fact]
    public void ChipsetTakesAccessesOfEveryWidthAndOffset()
    {
        using var machine = new PcMachine(new PcMachineOptions { Firmware = BootImage.FromBytes(new byte[0x1_0000]) });
        var (ports, mmio) = (machine.VirtualMachine.Ports, machine.VirtualMachine.Mmio);
        WriteConfig(0x40, 0x601);
        WriteConfig(0x44, 0x80); // the power management registers are at 0x600 now
        var data = new byte[8];
        foreach (var length in (int[])[1, 2, 4, 8])
        {
            for (ulong port = 0x5f8; port < 0x688; port++)
            {
                ports.Read(port, data.AsSpan(0, length));
                ports.Write(port, new byte[length]);
            }
            ports.Write(0xcf8, BitConverter.GetBytes(0x8000_0060u)); // ECAM to 0xE0000000
            ports.Write(0xcfc, BitConverter.GetBytes(0xe000_0001u));
            for (ulong at = 0; at < 0x1010; at++)
            {
                mmio.Read(0xe000_0000 + at, data.AsSpan(0, length));
            }
        }
        ports.Read(0x608, data.AsSpan(0, 4));
        Assert.True(ports.Read(0x60a, data.AsSpan(4, 4)));
        Assert.Equal(0, BitConverter.ToUInt16(data, 6)); // nothing is behind the timer

        void WriteConfig(int register, uint value)
        {
            ports.Write(0xcf8, BitConverter.GetBytes(0x8000_f800u | (uint)register));
            ports.Write(0xcfc, BitConverter.GetBytes(value));
        }
    }

    [Fact]
    public void FirmwareConfigurationIsThereWhenItIsOfUse()
    {
        byte[] multiboot = [.. new byte[16], 0x02, 0xb0, 0xad, 0x1b, 0, 0, 1, 0, 0xfe, 0x4f, 0x51, 0xe4,
            .. new uint[] { 0x10_0010, 0x10_0000, 0, 0, 0x10_0000 }.SelectMany(BitConverter.GetBytes)];
        var options = new PcMachineOptions { Kernel = BootImage.FromBytes(multiboot), VcpuCount = 2 };
        using (var machine = new PcMachine(options))
        {
            machine.VirtualMachine.Ports.Write(0x510, [5, 0]);
            var count = new byte[1];
            Assert.True(machine.VirtualMachine.Ports.Read(0x511, count));
            Assert.Equal(2, count[0]);
        }
        using (var machine = new PcMachine(options with { FwCfg = false }))
        {
            Assert.Null(machine.FwCfg);
            Assert.False(machine.VirtualMachine.Ports.Read(0x511, new byte[1]));
        }
        using (var machine = new PcMachine(new PcMachineOptions { FwCfgFiles = [new FwCfgFile("opt/a", new byte[] { 1 })] }))
        {
            Assert.Equal(["opt/a"], machine.FwCfg!.FileNames);
        }
        using (var machine = new PcMachine(new PcMachineOptions()))
        {
            Assert.Null(machine.FwCfg);
            Assert.False(machine.VirtualMachine.Ports.Read(0xe0, new byte[1]));
        }
        using (var machine = new PcMachine(new PcMachineOptions { TestDevice = true }))
        {
            Assert.True(machine.VirtualMachine.Ports.Read(0xe0, new byte[1]));
        }
        Assert.Throws<KvmSharpException>(() => new PcMachine(new PcMachineOptions { FwCfg = false, FwCfgFiles = [new FwCfgFile("opt/a", new byte[] { 1 })] }));
    }

    [Fact]
    public void DevicesAreThereAsAskedFor()
    {
        using var bare = new PcMachine(new PcMachineOptions { Acpi = false, RealTimeClock = false });
        Assert.False(bare.VirtualMachine.Ports.Read(0x70, new byte[1]));
        Assert.False(bare.VirtualMachine.Ports.Read(0x3f8, new byte[1]));
        Assert.False(bare.VirtualMachine.Ports.Read(0x600, new byte[2]));
        Assert.False(bare.VirtualMachine.Ports.Read(0xe9, new byte[1]));
        Assert.False(bare.VirtualMachine.Ports.Write(0xf4, [0]));
        using var full = new PcMachine(new PcMachineOptions
        {
            SerialPorts = [null, new MemoryCharacterBackend()],
            DebugConsole = new MemoryCharacterBackend(),
            IsaDebugExit = true,
        });
        Assert.True(full.VirtualMachine.Ports.Read(0x70, new byte[1]));
        Assert.False(full.VirtualMachine.Ports.Read(0x3f8, new byte[1]));
        Assert.True(full.VirtualMachine.Ports.Read(0x2f8, new byte[1]));
        Assert.True(full.VirtualMachine.Ports.Read(0x600, new byte[2]));
        Assert.True(full.VirtualMachine.Ports.Read(0xe9, new byte[1]));
        Assert.Null(full.SerialPorts[0]);
        Assert.NotNull(full.SerialPorts[1]);
    }

    [Fact]
    public async Task SoftOffIsACleanEnd()
    {
        // mov dx, 0x604; mov ax, 0x3400; out dx, ax
        using var machine = Create([0x66, 0xba, 0x04, 0x06, 0x66, 0xb8, 0x00, 0x34, 0x66, 0xef, 0xeb, 0xfe]);
        machine.Start();
        Assert.Equal(new VmExit(VmExitKind.PowerOff), await machine.WaitForExitAsync().WaitAsync(Limit));
    }

    [Theory]
    [InlineData(new byte[] { 0x66, 0xba, 0xf9, 0x0c, 0xb0, 0x06, 0xee, 0xeb, 0xfe })] // 6 to port 0xcf9
    [InlineData(new byte[] { 0xb0, 0xfe, 0xe6, 0x64, 0xeb, 0xfe })] // 0xfe to port 0x64
    [InlineData(new byte[] { 0xb0, 0x01, 0xe6, 0x92, 0xeb, 0xfe })] // 1 to port 0x92
    public async Task EveryWayToResetIsAReset(byte[] code)
    {
        using var machine = Create(code);
        machine.Start();
        Assert.Equal(VmExitKind.Reset, (await machine.WaitForExitAsync().WaitAsync(Limit)).Kind);
    }

    [Fact]
    public void InvalidOptionsAreRefused()
    {
        Assert.Throws<KvmSharpException>(() => new PcMachine(new PcMachineOptions { MemorySize = 1 << 20 }));
        Assert.Throws<KvmSharpException>(() => new PcMachine(new PcMachineOptions { MemorySize = (64 << 20) + 1 }));
        Assert.Throws<KvmSharpException>(() => new PcMachine(new PcMachineOptions { MemorySize = ulong.MaxValue - 4095 }));
        Assert.Throws<KvmSharpException>(() => new PcMachine(new PcMachineOptions { VcpuCount = VirtualMachineOptions.MaxVcpuCount + 1 }));
        Assert.Throws<KvmSharpException>(() => new PcMachine(new PcMachineOptions { VcpuCount = 0 }));
        Assert.Throws<KvmSharpException>(() => new PcMachine(new PcMachineOptions { Initrd = BootImage.FromBytes(new byte[1]) }));
        Assert.Throws<KvmSharpException>(() => new PcMachine(new PcMachineOptions { SerialPorts = [null, null, null, null, null] }));
        Assert.Throws<BootImageException>(() => new PcMachine(new PcMachineOptions { Kernel = BootImage.FromBytes(new byte[1000]) }));
    }

    [Fact]
    public async Task ResetsBootAgain()
    {
        // An ELF kernel that resets the machine; the debug console counts the boots.
        byte[] code = [0xb0, 0x61, 0xe6, 0xe9, 0x66, 0xba, 0xf9, 0x0c, 0xb0, 0x06, 0xee, 0xeb, 0xfe];
        var console = new MemoryCharacterBackend();
        var options = new PcMachineOptions
        {
            MemorySize = 32 << 20,
            DebugConsole = console,
            Kernel = BootImage.FromBytes(Boot.Images.Elf(image => code.CopyTo(image, 0x1010))),
        };
        Assert.Equal(VmExitKind.Reset, (await PcMachine.RunAsync(options with { NoReboot = true }).WaitAsync(Limit)).Kind);
        Assert.Equal("a", console.GetOutputText());
        using var source = new CancellationTokenSource();
        var run = PcMachine.RunAsync(options, source.Token);
        Assert.True(console.WaitForOutput("aaaa", Limit) > 0);
        await source.CancelAsync();
        Assert.Equal(VmExitKind.Stopped, (await run.WaitAsync(Limit)).Kind);
    }

    [Theory]
    [InlineData(ClockMode.Real)]
    [InlineData(ClockMode.Virtual)]
    public async Task ClockGoesOnThroughAReset(ClockMode clock)
    {
        var start = new DateTimeOffset(2031, 5, 6, 7, 8, 9, TimeSpan.Zero);
        var options = new PcMachineOptions { MemorySize = 2 << 20, Clock = clock, StartTime = start };
        PcMachine first;
        await using (first = new PcMachine(options))
        {
            // mov al, 0x40; out 0x70, al; mov al, 0x77; out 0x71, al; mov ecx, 1000000; loop $; mov al, 1; out 0x92, al
            byte[] code = [0xb0, 0x40, 0xe6, 0x70, 0xb0, 0x77, 0xe6, 0x71, 0xb9, 0x40, 0x42, 0x0f, 0x00, 0xe2, 0xfe, 0xb0, 0x01, 0xe6, 0x92, 0xeb, 0xfe];
            FlatLoader.Load(first.VirtualMachine.Memory, first.VirtualMachine.Vcpus[0], BootImage.FromBytes(code), 0x10000);
            first.Start();
            Assert.Equal(VmExitKind.Reset, (await first.WaitForExitAsync().WaitAsync(Limit)).Kind);
        }
        await using var second = new PcMachine(options, first);
        var after = second.VirtualMachine.Clock.StartTime - start;
        Assert.InRange(after.TotalMilliseconds, clock == ClockMode.Virtual ? 1 : 0.01, 20_000);
        var data = new byte[1];
        second.VirtualMachine.Ports.Write(0x70, [0x40]);
        second.VirtualMachine.Ports.Read(0x71, data);
        Assert.Equal(0x77, data[0]);
        await using var powerOn = new PcMachine(options);
        Assert.Equal(start, powerOn.VirtualMachine.Clock.StartTime);
        powerOn.VirtualMachine.Ports.Write(0x70, [0x40]);
        powerOn.VirtualMachine.Ports.Read(0x71, data);
        Assert.Equal(0, data[0]);
    }

    [Fact]
    public void PciBusIsThereUnlessLeftOut()
    {
        using (var machine = new PcMachine(new PcMachineOptions()))
        {
            Assert.Equal(0x29c0_8086u, ReadHostBridge(machine));
            Assert.Single(machine.Pci!.Devices);
        }
        using (var machine = new PcMachine(new PcMachineOptions { Pci = false }))
        {
            Assert.Null(machine.Pci);
            Assert.Equal(uint.MaxValue, ReadHostBridge(machine));
        }
        using (var machine = new PcMachine(new PcMachineOptions { Pci = false, Display = true }))
        {
            Assert.Equal(0x29c0_8086u, ReadHostBridge(machine));
        }

        static uint ReadHostBridge(PcMachine machine)
        {
            var data = BitConverter.GetBytes(uint.MaxValue);
            machine.VirtualMachine.Ports.Write(0xcf8, BitConverter.GetBytes(0x8000_0000));
            machine.VirtualMachine.Ports.Read(0xcfc, data);
            return BitConverter.ToUInt32(data);
        }
    }

    [Theory]
    [InlineData(true)]
    [InlineData(false)]
    public void AcpiTablesAddUp(bool pci)
    {
        using var machine = new PcMachine(new PcMachineOptions { SerialPorts = [new MemoryCharacterBackend()], Pci = pci });
        var memory = machine.VirtualMachine.Memory;
        Assert.Equal(0x2052_5450_2044_5352u, memory.Read<ulong>(0xe0000)); // "RSD PTR "
        Assert.Equal(0, Sum(0xe0000, 20));
        Assert.Equal(0, Sum(0xe0000, 36));
        var xsdt = memory.Read<ulong>(0xe0000 + 24);
        var rsdt = memory.Read<uint>(0xe0000 + 16);
        Assert.Equal("XSDT", Signature(xsdt));
        Assert.Equal("RSDT", Signature(rsdt));
        var tables = Enumerable.Range(0, (int)(memory.Read<uint>(xsdt + 4) - 36) / 8).Select(i => memory.Read<ulong>(xsdt + 36 + (ulong)i * 8)).ToList();
        Assert.Equal(pci ? ["FACP", "APIC", "MCFG"] : ["FACP", "APIC"], tables.Select(Signature));
        Assert.Equal(tables[0], memory.Read<uint>(rsdt + 36));
        var dsdt = memory.Read<uint>(tables[0] + 40);
        Assert.Equal(dsdt, memory.Read<ulong>(tables[0] + 140));
        Assert.Equal("DSDT", Signature(dsdt));
        Assert.Equal("FACS", Signature(memory.Read<uint>(tables[0] + 36)));
        Assert.Equal(0u, memory.Read<uint>(tables[0] + 36) % 64);
        foreach (var table in (ulong[])[xsdt, rsdt, dsdt, .. tables])
        {
            Assert.Equal(0, Sum(table, memory.Read<uint>(table + 4)));
        }

        byte Sum(ulong address, uint length)
        {
            var bytes = new byte[length];
            memory.Read(address, bytes);
            return (byte)bytes.Sum(b => b);
        }

        string Signature(ulong address) => System.Text.Encoding.ASCII.GetString(BitConverter.GetBytes(memory.Read<uint>(address)));
    }

    private static PcMachine Create(byte[] code)
    {
        var machine = new PcMachine(new PcMachineOptions { MemorySize = 2 << 20 });
        FlatLoader.Load(machine.VirtualMachine.Memory, machine.VirtualMachine.Vcpus[0], BootImage.FromBytes(code), 0x10000);
        return machine;
    }
}
