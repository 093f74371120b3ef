using KvmSharp.Boot;
using KvmSharp.Devices.Pci;
using KvmSharp.Tests.Devices.Pci;

namespace KvmSharp.Tests.Devices;

/// <summary>What firmware programs: interrupt routing, memory and interrupts of system management mode.</summary>
public sealed class ChipsetTests
{
    private const int Bridge = 31;
    private const ulong SmiEnable = 0x630;
    private const ulong SmiStatus = 0x634;
    private const uint ApmEnable = 1 << 5;
    private const byte Open = 0x4a;
    private const byte Enabled = 0x0a;
    private const byte Locked = 0x1a;

    [Theory]
    [InlineData(10)]
    [InlineData(5)]
    public void WireLeadsToTheInterruptThatIsRouted(byte irq)
    {
        using var machine = Create();
        var function = new TestFunction();
        machine.Pci!.Add(function, new PciAddress(6)); // pin A leads to wire C
        function.SetLevel(true);
        Assert.Equal((false, true), (IsRequested(machine, irq), IsRequested(machine, 18)));
        WriteConfig(machine, Bridge, 0x62, irq);
        Assert.True(IsRequested(machine, irq));
        WriteConfig(machine, Bridge, 0x61, 11); // another wire
        Assert.False(IsRequested(machine, 11));
        WriteConfig(machine, Bridge, 0x62, (byte)(0x80 | irq));
        Assert.False(IsRequested(machine, irq));
        WriteConfig(machine, Bridge, 0x62, 11);
        Assert.True(IsRequested(machine, 11));
        function.SetLevel(false);
        Assert.False(IsRequested(machine, 11));
        function.SetLevel(true);
        Assert.True(IsRequested(machine, 11));
        WriteConfig(machine, Bridge, 0x62, 8); // nothing can be routed to the clock
        Assert.False(IsRequested(machine, 11));
        Assert.True(IsRequested(machine, 18));
    }

    [Fact]
    public void SharedWireStaysHighUntilTheLastLetsGo()
    {
        using var machine = Create();
        TestFunction[] functions = [new(), new()];
        machine.Pci!.Add(functions[0], new PciAddress(6));
        machine.Pci.Add(functions[1], new PciAddress(10));
        WriteConfig(machine, Bridge, 0x62, 10);
        functions[0].SetLevel(true);
        functions[1].SetLevel(true);
        functions[0].SetLevel(false);
        Assert.True(IsRequested(machine, 10));
        functions[1].SetLevel(false);
        Assert.False(IsRequested(machine, 10));
        Assert.False(IsRequested(machine, 18));
    }

    [Fact]
    public void ChipsetsOwnDevicesHaveTheirOwnWires()
    {
        using var machine = Create();
        var function = new TestFunction();
        machine.Pci!.Add(function, new PciAddress(26));
        function.SetLevel(true);
        Assert.True(IsRequested(machine, 16));
    }

    [Fact]
    public void RoutingAndLevelsAreSaved()
    {
        using var first = Create();
        var function = new TestFunction();
        first.Pci!.Add(function, new PciAddress(6));
        WriteConfig(first, Bridge, 0x62, 10);
        function.SetLevel(true);
        var state = first.VirtualMachine.SaveState();
        using var second = Create();
        var other = new TestFunction();
        second.Pci!.Add(other, new PciAddress(6));
        second.VirtualMachine.LoadState(state);
        Assert.True(IsRequested(second, 10));
        Assert.Equal(state.ComputeHash(), second.VirtualMachine.ComputeStateHash());
        other.SetLevel(false);
        Assert.False(IsRequested(second, 10));
    }

    [Fact]
    public void HiddenMemoryOpensAndIsLocked()
    {
        using var machine = Create(systemManagementMode: true);
        var memory = machine.VirtualMachine.Memory;
        var hidden = machine.VirtualMachine.SystemManagementMemory!;
        Assert.False(memory.IsBacked(0xa_0000, 1));
        hidden.Write<uint>(0xa_0000, 0x1234_5678);
        WriteConfig(machine, 0, 0x9d, Open);
        Assert.Equal(0x1234_5678u, memory.Read<uint>(0xa_0000));
        memory.Write<uint>(0xb_fffc, 0x9abc_def0);
        WriteConfig(machine, 0, 0x9d, Enabled);
        Assert.False(memory.IsBacked(0xa_0000, 1));
        Assert.Equal(0x9abc_def0u, hidden.Read<uint>(0xb_fffc));
        Assert.Equal(Enabled, ReadConfig(machine, 0, 0x9d));
        WriteConfig(machine, 0, 0x9d, Open | Locked); // the lock closes it
        Assert.Equal(Locked, ReadConfig(machine, 0, 0x9d));
        WriteConfig(machine, 0, 0x9d, Open);
        Assert.Equal(Locked, ReadConfig(machine, 0, 0x9d));
        Assert.False(memory.IsBacked(0xa_0000, 1));
        // The rest is the same memory, shadowed segments and firmware too.
        memory.Write<byte>(0x5000, 0x55);
        Assert.Equal(0x55, hidden.Read<byte>(0x5000));
        WriteConfig(machine, 0, 0x91, 0x33);
        memory.Write<byte>(0xc_0000, 0x66);
        Assert.Equal(0x66, hidden.Read<byte>(0xc_0000));
        Assert.Equal(0xf4, hidden.Read<byte>(0xffff_fff0));
    }

    [Theory]
    [InlineData(Open)]
    [InlineData(Locked)]
    public void HiddenMemoryIsSaved(byte control)
    {
        using var first = Create(systemManagementMode: true);
        first.VirtualMachine.SystemManagementMemory!.Write<uint>(0xa_0000, 0x1234_5678);
        WriteConfig(first, 0, 0x9d, control);
        var state = first.VirtualMachine.SaveState();
        using var second = Create(systemManagementMode: true);
        second.VirtualMachine.LoadState(state);
        Assert.Equal(state.ComputeHash(), second.VirtualMachine.ComputeStateHash());
        Assert.Equal(control == Open, second.VirtualMachine.Memory.IsBacked(0xa_0000, 1));
        WriteConfig(second, 0, 0x9d, Open);
        Assert.Equal(control == Open, second.VirtualMachine.Memory.IsBacked(0xa_0000, 1));
        Assert.Equal(0x1234_5678u, second.VirtualMachine.SystemManagementMemory!.Read<uint>(0xa_0000));
    }

    [Fact]
    public async Task CommandInterruptsTheProcessor()
    {
        // SMI handler: out 0xf4, 0x33. The program, at the reset vector, writes port 0xb2.
        using var machine = Create(systemManagementMode: true, program: [0xb0, 0x07, 0xe6, 0xb2, 0xeb, 0xfe]);
        machine.VirtualMachine.SystemManagementMemory!.Write<uint>(0x3_8000, 0xf4e6_33b0);
        PlacePowerManagement(machine);
        Assert.Equal(0u, ReadPort(machine, SmiEnable));
        machine.VirtualMachine.Ports.Write(0xb2, [1]); // not enabled
        Assert.Equal(0u, ReadPort(machine, SmiStatus));
        machine.VirtualMachine.Ports.Write(SmiEnable, BitConverter.GetBytes(ApmEnable));
        machine.Start();
        var exit = await machine.WaitForExitAsync().WaitAsync(TimeSpan.FromSeconds(20));
        Assert.Equal(new VmExit(VmExitKind.DebugExit, 0x33 << 1 | 1), exit);
        Assert.Equal(ApmEnable, ReadPort(machine, SmiStatus));
        machine.VirtualMachine.Ports.Write(SmiStatus, BitConverter.GetBytes(ApmEnable));
        Assert.Equal(0u, ReadPort(machine, SmiStatus));
        var command = new byte[1];
        machine.VirtualMachine.Ports.Read(0xb2, command);
        Assert.Equal(7, command[0]);
    }

    [Fact]
    public void WithoutSystemManagementModeThereIsNothingToSetUp()
    {
        using var machine = Create();
        PlacePowerManagement(machine);
        Assert.Equal(ApmEnable, ReadPort(machine, SmiEnable));
        machine.VirtualMachine.Ports.Write(SmiEnable, new byte[4]);
        Assert.Equal(ApmEnable, ReadPort(machine, SmiEnable));
        machine.VirtualMachine.Ports.Write(0xb2, [1]);
        Assert.Equal(0u, ReadPort(machine, SmiStatus));
        Assert.Throws<KvmSharpException>(() => new PcMachine(new PcMachineOptions { SystemManagementMode = true }));
    }

    [Fact]
    public void LockOfInterruptsStays()
    {
        using var machine = Create(systemManagementMode: true);
        WriteConfig(machine, Bridge, 0xa0, 0x10);
        WriteConfig(machine, Bridge, 0xa0, 0);
        Assert.Equal(0x10, ReadConfig(machine, Bridge, 0xa0));
    }

    private static PcMachine Create(bool systemManagementMode = false, byte[]? program = null)
    {
        var image = new byte[0x1_0000];
        image[0xfff0] = 0xf4; // hlt
        program?.CopyTo(image, 0xfff0);
        return new PcMachine(new PcMachineOptions
        {
            MemorySize = 4 << 20,
            Firmware = BootImage.FromBytes(image),
            SystemManagementMode = systemManagementMode,
            IsaDebugExit = true,
        });
    }

    private static void PlacePowerManagement(PcMachine machine)
    {
        WriteConfig(machine, Bridge, 0x41, 0x06); // 0x600
        WriteConfig(machine, Bridge, 0x44, 0x80);
    }

    private static void WriteConfig(PcMachine machine, int device, int register, byte value)
    {
        Select(machine, device, register);
        machine.VirtualMachine.Ports.Write(0xcfcu + ((uint)register & 3), [value]);
    }

    private static byte ReadConfig(PcMachine machine, int device, int register)
    {
        var data = new byte[1];
        Select(machine, device, register);
        machine.VirtualMachine.Ports.Read(0xcfcu + ((uint)register & 3), data);
        return data[0];
    }

    private static void Select(PcMachine machine, int device, int register) =>
        machine.VirtualMachine.Ports.Write(0xcf8, BitConverter.GetBytes(0x8000_0000u | (uint)device << 11 | (uint)register & 0xfc));

    private static uint ReadPort(PcMachine machine, ulong port)
    {
        var data = new byte[4];
        Assert.True(machine.VirtualMachine.Ports.Read(port, data));
        return BitConverter.ToUInt32(data);
    }

    // The level of a line as the interrupt controllers see it: struct kvm_irqchip, last_irr of a PIC, irr of the IOAPIC.
    private static bool IsRequested(PcMachine machine, int gsi)
    {
        const int Data = 8, IoApicLines = Data + 16;
        var state = machine.VirtualMachine.SaveState();
        var levels = gsi < 16
            ? state.Find("irqchip0")!.Value.Span[Data] | state.Find("irqchip1")!.Value.Span[Data] << 8
            : BitConverter.ToInt32(state.Find("irqchip2")!.Value.Span[IoApicLines..]);
        return (levels >> gsi & 1) != 0;
    }
}
