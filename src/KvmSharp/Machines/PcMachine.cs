using KvmSharp.Boot;
using KvmSharp.Devices;
using KvmSharp.Devices.Ide;
using KvmSharp.Devices.Pci;
using KvmSharp.Devices.Virtio;
using KvmSharp.Firmware;

namespace KvmSharp;

/// <summary>
/// A PC-compatible machine: one power cycle of it. <see cref="RunAsync"/> runs one from power-on to power-off with the
/// resets in between.
/// </summary>
public sealed partial class PcMachine : IDisposable, IAsyncDisposable
{
    /// <summary>Where RAM below 4 GiB ends at most; the rest lies from 4 GiB on.</summary>
    public const ulong HoleStart = 3UL << 30;

    private const ulong HoleEnd = 4UL << 30;
    private const ulong OptionRomStart = 0xc_0000;
    private const ulong FirmwareEnd = 0x10_0000;
    private const int KeyboardInterrupt = 1;
    private const int MouseInterrupt = 12;
    private const int RtcInterrupt = 8;
    private const uint VirtioMmioStart = 0xfeb0_0000;
    private const uint VirtioMmioStep = 0x1000; // a page each, so that a guest can map them one by one
    private const int VirtioMmioFirstGsi = 20;
    private const int VirtioMmioGsis = 4;

    // BIOS data area (IBM PC/AT Technical Reference, "BIOS Data Area").
    private const ulong BdaExtendedSegment = 0x40e;
    private const ulong BdaBaseMemory = 0x413;

    private static readonly (ushort Port, int Irq)[] SerialResources = [(0x3f8, 4), (0x2f8, 3), (0x3e8, 4), (0x2e8, 3)];

    private readonly Uart16550?[] _serialPorts = new Uart16550?[4];
    private readonly PostCode _postCode = new();
    private readonly List<VirtioDevice> _virtioDevices = [];
    private readonly Kept? _before;
    private Kept? _kept;
    private GuestRam? _ram;
    private readonly List<(uint Address, int Gsi)> _virtioMmio = [];

    /// <summary>Builds the machine and loads the kernel.</summary>
    /// <param name="options">What is in it.</param>
    /// <exception cref="KvmSharpException">An option is invalid or the host lacks what it needs.</exception>
    /// <exception cref="BootImageException">The kernel or the initial RAM disk cannot be loaded.</exception>
    /// <exception cref="UnsupportedFeatureException">The CPU model asks for a feature that the core does not have.</exception>
    public PcMachine(PcMachineOptions options)
        : this(options, null)
    {
    }

    /// <summary>Builds the machine again after a reset: the memory of the real-time clock keeps its content, and time goes on.</summary>
    /// <param name="options">What is in it, normally what was in the machine before.</param>
    /// <param name="before">
    /// The machine that the guest has reset; it has ended and may be disposed of already. Null is power-on.
    /// </param>
    /// <exception cref="KvmSharpException">An option is invalid or the host lacks what it needs.</exception>
    /// <exception cref="BootImageException">The kernel or the initial RAM disk cannot be loaded.</exception>
    /// <exception cref="UnsupportedFeatureException">The CPU model asks for a feature that the core does not have.</exception>
    public PcMachine(PcMachineOptions options, PcMachine? before)
    {
        ArgumentNullException.ThrowIfNull(options);
        options.Validate();
        CheckHostMemory(options.MemorySize);
        Options = options;
        _before = before?._kept;
        VirtualMachine = new VirtualMachine(new VirtualMachineOptions
        {
            Cpu = options.Cpu,
            Clock = options.Clock,
            Engine = options.Engine,
            // The host's time needs nobody to remember it.
            StartTime = options.StartTime is null && options.Clock == ClockMode.Real ? null : _before?.Time ?? options.StartTime,
            SystemManagementMode = options.SystemManagementMode,
            VcpuCount = options.VcpuCount,
        })
        {
            Ended = () => _kept = new Kept(VirtualMachine!.Clock.GetUtcNow(), _realTimeClock?.SaveBattery()),
        };
        try
        {
            var below4G = LowMemoryEnd(options);
            MapMemory(below4G, options.MemorySize - below4G);
            if (options.Firmware is { } firmware)
            {
                MapFirmware(firmware);
            }
            MapSerialPorts();
            MapDevices(below4G, options.MemorySize - below4G);
            MapTestDevices();
            AddDisplay();
            AddIdeDrives();
            AddVirtioDevices();
            AddPciDevices();
            if (options.Firmware is not null)
            {
                AddFirmwareFiles(below4G);
            }
            var rsdp = options.Firmware is null ? InstallFirmwareData() : null;
            if (options.Kernel is { } kernel)
            {
                if (MultibootLoader.IsMultiboot(kernel.Bytes.Span))
                {
                    // Linux brings all of this up by itself; a Multiboot kernel may lean on what a PC has at that point.
                    LegacyBios.InstallHandlers(VirtualMachine.Memory);
                    VirtualMachine.StartLegacyTimer();
                }
                KernelLoader.Load(VirtualMachine.Memory, VirtualMachine.Vcpus[0], kernel, new LinuxBootOptions
                {
                    CommandLine = options.CommandLine,
                    Initrd = options.Initrd,
                    RsdpAddress = rsdp,
                });
            }
        }
        catch
        {
            Dispose();
            throw;
        }
    }

    /// <summary>What is in the machine.</summary>
    public PcMachineOptions Options { get; }

    /// <summary>The machine itself: memory, buses, interrupts, clock and vCPUs.</summary>
    public VirtualMachine VirtualMachine { get; }

    /// <summary>The serial ports COM1 to COM4; those that are not there are <see langword="null"/>.</summary>
    public IReadOnlyList<Uart16550?> SerialPorts => _serialPorts;

    /// <summary>The power management hardware, or <see langword="null"/> without ACPI.</summary>
    public AcpiPm? PowerManagement { get; private set; }

    /// <summary>The firmware configuration device, or <see langword="null"/> without one. Items are added before the start.</summary>
    public FwCfg? FwCfg { get; private set; }

    /// <summary>The keyboard, or <see langword="null"/> without one.</summary>
    public Ps2Keyboard? Keyboard { get; private set; }

    /// <summary>The mouse, or <see langword="null"/> without one.</summary>
    public Ps2Mouse? Mouse { get; private set; }

    /// <summary>The screen, or <see langword="null"/> without one.</summary>
    public VgaAdapter? Display { get; private set; }

    /// <summary>The IDE controller, or <see langword="null"/> without drives.</summary>
    public IdeController? Ide { get; private set; }

    /// <summary>The PCI bus, or <see langword="null"/> without one.</summary>
    public PciHost? Pci { get; private set; }

    /// <summary>The virtio devices in the order of <see cref="PcMachineOptions.VirtioDevices"/>.</summary>
    public IReadOnlyList<VirtioDevice> VirtioDevices => _virtioDevices;

    /// <summary>The last code that the guest wrote to port 0x80.</summary>
    public byte LastPostCode => _postCode.Value;

    /// <summary>
    /// Runs a machine until it ends: builds it, starts it, and builds it anew after each reset unless
    /// <see cref="PcMachineOptions.NoReboot"/> is set.
    /// </summary>
    /// <param name="options">What is in it.</param>
    /// <param name="cancellationToken">Stops the machine; the result's kind is <see cref="VmExitKind.Stopped"/> then.</param>
    /// <returns>How the machine ended.</returns>
    public static async Task<VmExit> RunAsync(PcMachineOptions options, CancellationToken cancellationToken = default)
    {
        PcMachine? before = null;
        while (true)
        {
            await using var machine = new PcMachine(options, before);
            machine.Start();
            using var registration = cancellationToken.Register(() => machine.VirtualMachine.Stop());
            var exit = await machine.WaitForExitAsync().ConfigureAwait(false);
            if (exit.Kind != VmExitKind.Reset || options.NoReboot)
            {
                return exit;
            }
            before = machine;
        }
    }

    /// <summary>Starts the machine.</summary>
    public void Start() => VirtualMachine.Start();

    /// <summary>Completes when the machine has come to its end.</summary>
    /// <param name="cancellationToken">Ends the waiting, not the machine.</param>
    /// <returns>How it ended.</returns>
    public Task<VmExit> WaitForExitAsync(CancellationToken cancellationToken = default) => VirtualMachine.WaitForExitAsync(cancellationToken);

    /// <summary>Stops the machine and frees what it holds.</summary>
    public void Dispose()
    {
        VirtualMachine.Dispose();
        Disconnect();
    }

    /// <summary>Stops the machine and frees what it holds, without blocking the caller meanwhile.</summary>
    public async ValueTask DisposeAsync()
    {
        await VirtualMachine.DisposeAsync().ConfigureAwait(false);
        Disconnect();
    }

    // Backends may outlive the machine, and must not keep it.
    private void Disconnect()
    {
        _shadowMemory?.Dispose();
        _ram?.Dispose();
        foreach (var port in _serialPorts)
        {
            port?.Disconnect();
        }
        foreach (var device in _virtioDevices)
        {
            device.Dispose();
        }
        Ide?.Dispose();
        Display?.Dispose();
    }

    // Guest memory costs host memory only when it is touched, but a guest touches a part of all it has.
    private static void CheckHostMemory(ulong size)
    {
        const string Information = "/proc/meminfo";
        if (!File.Exists(Information))
        {
            return;
        }
        ulong total = 0;
        foreach (var line in File.ReadLines(Information))
        {
            var parts = line.Split(' ', StringSplitOptions.RemoveEmptyEntries);
            if (parts is ["MemTotal:" or "SwapTotal:", var number, "kB"] && ulong.TryParse(number, out var kilobytes))
            {
                total += kilobytes << 10;
            }
        }
        if (total != 0 && size > total)
        {
            throw new KvmSharpException(KvmSharpErrorCode.OutOfMemory,
                $"The host has {total >> 20} MiB of memory, too little for a guest with {size >> 20} MiB.");
        }
    }

    // RAM as a PC has it: a hole for video memory below 1 MiB, one for devices below 4 GiB.
    private void MapMemory(ulong below4G, ulong above4G)
    {
        var memory = VirtualMachine.Memory;
        var ram = _ram = new GuestRam(below4G + above4G);
        memory.Map(ram, 0, 0, MemoryMap.VideoStart);
        // Firmware's chipset has its own memory between option ROMs and 1 MiB.
        var next = Options.Firmware is null ? OptionRomStart : FirmwareEnd;
        memory.Map(ram, next, next, below4G - next);
        if (above4G != 0)
        {
            memory.Map(ram, below4G, HoleEnd, above4G);
        }
        if (VirtualMachine.SystemManagementMemory is { } hidden)
        {
            // The same, with RAM where everybody else sees video memory.
            hidden.Map(ram, 0, 0, OptionRomStart);
            hidden.Map(ram, next, next, below4G - next);
            if (above4G != 0)
            {
                hidden.Map(ram, below4G, HoleEnd, above4G);
            }
        }
    }

    private void MapSerialPorts()
    {
        for (var i = 0; i < Options.SerialPorts.Count; i++)
        {
            if (Options.SerialPorts[i] is { } backend)
            {
                var (port, irq) = SerialResources[i];
                var uart = new Uart16550(VirtualMachine.Clock, VirtualMachine.GetInterruptLine(irq), backend);
                VirtualMachine.Ports.Map(uart, port, Uart16550.PortCount);
                _serialPorts[i] = uart;
            }
        }
    }

    private void MapDevices(ulong below4G, ulong above4G)
    {
        var machine = VirtualMachine;
        var ports = machine.Ports;
        ports.Map(_postCode, PostCode.DefaultPort, 1);
        ports.Map(new DmaController(1), DmaController.FirstBase, DmaController.RegisterCount);
        ports.Map(new DmaController(2), DmaController.SecondBase, 2 * DmaController.RegisterCount);
        ports.Map(new DmaPages(), DmaPages.BasePort, DmaPages.PortCount);
        var resetControl = new ResetControl(machine);
        if (Options.HasPci)
        {
            Pci = new PciHost(machine, resetControl);
        }
        else
        {
            ports.Map(resetControl, ResetControl.BasePort, ResetControl.PortCount);
        }
        MapKeyboardController(machine);
        ports.Map(new SystemControlPortA(machine, machine.A20), SystemControlPortA.DefaultPort, 1);
        if (Options.RealTimeClock)
        {
            var rtc = new CmosRtc(machine.Clock, machine.GetInterruptLine(RtcInterrupt), below4G, above4G);
            rtc.SetBootOrder([.. Options.BootOrder.Select(d => (byte)d)]);
            if (_before?.Battery is { } battery)
            {
                rtc.LoadBattery(battery);
            }
            ports.Map(rtc, CmosRtc.BasePort, CmosRtc.PortCount);
            _realTimeClock = rtc;
        }
        if (Options.Acpi)
        {
            PowerManagement = new AcpiPm(machine.Clock, machine.GetInterruptLine(AcpiTables.SciInterrupt), machine);
            OfferSleep(PowerManagement);
            if (Options.Firmware is null)
            {
                ports.Map(PowerManagement, AcpiTables.DefaultPmBase, AcpiPm.PortCount);
            }
        }
        if (Options.Firmware is not null)
        {
            AddChipset();
        }
        if (Options.DebugConsole is { } console)
        {
            var device = new DebugConsole(console);
            ports.Map(device, DebugConsole.BochsPort, 1);
            ports.Map(device, DebugConsole.FirmwarePort, 1);
        }
        if (Options.IsaDebugExit)
        {
            ports.Map(new IsaDebugExit(machine), IsaDebugExit.DefaultPort, IsaDebugExit.PortCount);
        }
    }

    private void MapTestDevices()
    {
        if (Options.PanicDevice)
        {
            var machine = VirtualMachine;
            machine.Ports.Map(new PvPanic(events =>
            {
                if ((events & PanicEvents.Panicked) != 0)
                {
                    machine.ReportExit(new VmExit(VmExitKind.Panicked, 1, "The guest's kernel has panicked."));
                }
            }), PvPanic.DefaultPort, 1);
        }
        if (Options.TestDevice)
        {
            PcTestDevice.Map(VirtualMachine);
        }
        if (Options.HasFwCfg)
        {
            FwCfg = new FwCfg(VirtualMachine.Memory, Options.MemorySize, Options.VcpuCount);
            foreach (var file in Options.FwCfgFiles)
            {
                FwCfg.AddFile(file.Name, file.Content);
            }
            VirtualMachine.Ports.Map(FwCfg, FwCfg.BasePort, FwCfg.PortCount);
        }
    }

    private void MapKeyboardController(VirtualMachine machine)
    {
        if (!Options.HasKeyboard)
        {
            machine.Ports.Map(new KeyboardReset(machine), KeyboardReset.BasePort, KeyboardReset.PortCount);
            return;
        }
        var controller = new KeyboardController(
            machine.Clock, machine.GetInterruptLine(KeyboardInterrupt), machine.GetInterruptLine(MouseInterrupt), machine, machine.A20);
        machine.Ports.Map(controller, KeyboardController.BasePort, KeyboardController.PortCount);
        Keyboard = controller.Keyboard;
        Mouse = controller.Mouse;
    }

    private void AddDisplay()
    {
        if (Options.HasDisplay)
        {
            Display = new VgaAdapter(Options.VideoBios?.Bytes);
            Pci!.Add(Display);
        }
    }

    private void AddIdeDrives()
    {
        if (Options.IdeDrives.Count != 0)
        {
            Ide = new IdeController(VirtualMachine, Options.IdeDrives);
            Pci!.Add(Ide, _lpcBridge is null ? null : new PciAddress(LpcAddress.Device, 1));
        }
    }

    private void AddVirtioDevices()
    {
        foreach (var options in Options.VirtioDevices)
        {
            var device = options.Create(Options.Clock);
            _virtioDevices.Add(device);
            if (options.Transport == VirtioTransport.Pci)
            {
                Pci!.Add(new VirtioPciTransport(device));
                continue;
            }
            var address = VirtioMmioStart + VirtioMmioStep * (uint)_virtioMmio.Count;
            var gsi = VirtioMmioFirstGsi + _virtioMmio.Count % VirtioMmioGsis;
            _ = new VirtioMmioTransport(VirtualMachine, device, address, VirtualMachine.GetInterruptLine(gsi));
            _virtioMmio.Add((address, gsi));
        }
    }

    private void AddPciDevices()
    {
        foreach (var create in Options.PciDevices)
        {
            Pci!.Add(create());
        }
        if (Options.Firmware is null)
        {
            Pci?.AssignResources();
        }
    }

    // What firmware leaves in memory. Returns where the RSDP is.
    private GuestAddress? InstallFirmwareData()
    {
        var memory = VirtualMachine.Memory;
        memory.Write(BdaExtendedSegment, (ushort)(MemoryMap.ExtendedBiosData >> 4));
        memory.Write(BdaBaseMemory, (ushort)(MemoryMap.ExtendedBiosData >> 10));
        InstallSmbios(memory);
        if (!Options.Acpi)
        {
            return null;
        }
        memory.Write(AcpiTables.DefaultAddress, AcpiTables.Build(AcpiTables.DefaultAddress, AcpiOptions));
        return AcpiTables.DefaultAddress;
    }

    private void InstallSmbios(GuestMemory memory)
    {
        const uint TableOffset = 32; // behind the entry point
        var tables = SmbiosTables.Build(SmbiosOptions);
        memory.Write(SmbiosTables.DefaultAddress, SmbiosTables.BuildEntryPoint(tables, (uint)SmbiosTables.DefaultAddress + TableOffset));
        memory.Write(SmbiosTables.DefaultAddress + TableOffset, tables.Table);
    }

    private SmbiosOptions SmbiosOptions => new()
    {
        VcpuCount = Options.VcpuCount,
        MemorySize = Options.MemorySize,
        Uuid = Options.SystemUuid,
        DescribeFirmware = Options.Firmware is null,
    };

    private AcpiTableOptions AcpiOptions => new()
    {
        VcpuCount = Options.VcpuCount,
        SerialPorts = [.. SerialResources.Where((_, i) => _serialPorts[i] is not null)],
        RealTimeClock = Options.RealTimeClock,
        Keyboard = Options.HasKeyboard,
        PanicDevice = Options.PanicDevice,
        Pci = Pci is not null,
        Vga = Display is not null,
        VirtioMmio = _virtioMmio,
    };

    /// <summary>What outlives a reset.</summary>
    private sealed record Kept(DateTimeOffset Time, CmosRtc.Battery? Battery);
}
