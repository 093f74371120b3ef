using KvmSharp.Boot;
using KvmSharp.Devices;
using KvmSharp.Devices.Ide;
using KvmSharp.Devices.Pci;
using KvmSharp.Devices.Virtio;

namespace KvmSharp;

/// <summary>What firmware can start an operating system from.</summary>
public enum BootDevice
{
    /// <summary>A disk.</summary>
    Disk = 2,
    /// <summary>A CD or DVD.</summary>
    CdRom = 3,
    /// <summary>The network, or what else an option ROM offers.</summary>
    Network = 4,
}

/// <summary>What is in a <see cref="PcMachine"/>. The machine does not dispose the backends.</summary>
public sealed record PcMachineOptions
{
    /// <summary>The smallest memory that a PC has here, in bytes: 2 MiB.</summary>
    public const ulong MinMemorySize = 2UL << 20;

    /// <summary>The most virtio devices with <see cref="VirtioTransport.Mmio"/> that a PC has.</summary>
    public const int MaxVirtioMmioDevices = 8;

    /// <summary>RAM in bytes: a multiple of 4096, at least <see cref="MinMemorySize"/>. What exceeds 3 GiB lies above 4 GiB.</summary>
    public ulong MemorySize { get; init; } = 512UL << 20;

    /// <summary>The processor that the guest sees.</summary>
    public CpuModel Cpu { get; init; } = CpuModel.Default;

    /// <summary>The number of processors.</summary>
    public int VcpuCount { get; init; } = 1;

    /// <summary>What time the machine's clock tells.</summary>
    public ClockMode Clock { get; init; } = ClockMode.Real;

    /// <summary>How guest code is executed.</summary>
    public ExecutionEngine Engine { get; init; } = ExecutionEngine.Auto;

    /// <summary>The wall-clock time at the start; see <see cref="VirtualMachineOptions.StartTime"/>.</summary>
    public DateTimeOffset? StartTime { get; init; }

    /// <summary>
    /// The kernel: a bzImage with a 64-bit entry point, an ELF64 vmlinux, or a Multiboot 1 kernel. Without one the machine has no program yet;
    /// load one into <see cref="PcMachine.VirtualMachine"/> before the start.
    /// </summary>
    public BootImage? Kernel { get; init; }

    /// <summary>
    /// Firmware for the processor to start in, for example SeaBIOS: a multiple of 4 KiB up to 16 MiB that ends at 4 GiB, its
    /// last 128 KiB also at 1 MiB. It brings a PCI bus along and sets the machine up itself.
    /// </summary>
    public BootImage? Firmware { get; init; }

    /// <summary>
    /// Whether the processors have system management mode, and the chipset the memory and the interrupt for it. Only with
    /// <see cref="Firmware"/>, which sets it up.
    /// </summary>
    public bool SystemManagementMode { get; init; }

    /// <summary>Where firmware looks for an operating system: up to three kinds, the first one first.</summary>
    public IReadOnlyList<BootDevice> BootOrder { get; init; } = [BootDevice.Disk, BootDevice.CdRom, BootDevice.Network];

    /// <summary>The initial RAM disk of the kernel; a Multiboot kernel gets it as its module.</summary>
    public BootImage? Initrd { get; init; }

    /// <summary>The kernel's command line; a Multiboot kernel gets its file name before it.</summary>
    public string CommandLine { get; init; } = "";

    /// <summary>Serial ports COM1 to COM4, in this order; a <see langword="null"/> leaves one out.</summary>
    public IReadOnlyList<ICharacterBackend?> SerialPorts { get; init; } = [];

    /// <summary>Where characters written to ports 0xE9 and 0x402 go; without it the ports are not there.</summary>
    public ICharacterBackend? DebugConsole { get; init; }

    /// <summary>Whether port 0xF4 ends the machine with the status (value &lt;&lt; 1) | 1.</summary>
    public bool IsaDebugExit { get; init; }

    /// <summary>Whether the machine has the test device of self-checking boot images; see <see cref="PcTestDevice"/>.</summary>
    public bool TestDevice { get; init; }

    /// <summary>
    /// Whether the machine has the firmware configuration device; see <see cref="Devices.FwCfg"/>. Unset, it is there when
    /// there are <see cref="FwCfgFiles"/>, or firmware, or the kernel is a Multiboot one, which has no other way to learn the number of processors.
    /// </summary>
    public bool? FwCfg { get; init; }

    /// <summary>Files in the firmware configuration device.</summary>
    public IReadOnlyList<FwCfgFile> FwCfgFiles { get; init; } = [];

    internal bool HasFwCfg => FwCfg ?? (FwCfgFiles.Count != 0 || Firmware is not null || (Kernel is { } kernel && MultibootLoader.IsMultiboot(kernel.Bytes.Span)));

    /// <summary>
    /// Whether the machine has the device at which a kernel tells that it has panicked: see <see cref="PvPanic"/>. The machine ends
    /// then, with <see cref="VmExitKind.Panicked"/>, unless a crash kernel takes over.
    /// </summary>
    public bool PanicDevice { get; init; }

    /// <summary>Whether the machine has a CMOS real-time clock.</summary>
    public bool RealTimeClock { get; init; } = true;

    /// <summary>Whether the machine has ACPI: tables, power management registers, power-off. A guest without it cannot switch itself off.</summary>
    public bool Acpi { get; init; } = true;

    /// <summary>Whether the machine has a keyboard and a mouse. Firmware brings them along.</summary>
    public bool Keyboard { get; init; }

    /// <summary>
    /// The IDE drives: first and second drive of the first channel, then those of the second; a <see langword="null"/> leaves one
    /// out. They bring a PCI bus along.
    /// </summary>
    public IReadOnlyList<IdeDriveOptions?> IdeDrives { get; init; } = [];

    /// <summary>The identity of the machine that the SMBIOS tables tell; all zero is none.</summary>
    public Guid SystemUuid { get; init; }

    /// <summary>Whether the machine has a screen: a VGA on the PCI bus. Firmware brings it along.</summary>
    public bool Display { get; init; }

    /// <summary>The video BIOS of the screen, which firmware needs to show anything.</summary>
    public BootImage? VideoBios { get; init; }

    /// <summary>Whether the machine has a PCI bus even if nothing is on it. Devices on it bring it along in any case.</summary>
    public bool Pci { get; init; } = true;

    /// <summary>
    /// What makes the PCI functions of the machine, each time that it is built; they get the first free places in this order,
    /// behind the virtio devices.
    /// </summary>
    public IReadOnlyList<Func<PciDevice>> PciDevices { get; init; } = [];

    /// <summary>The virtio devices, in the order of their places.</summary>
    public IReadOnlyList<VirtioDeviceOptions> VirtioDevices { get; init; } = [];

    internal bool HasKeyboard => Keyboard || Firmware is not null;

    internal bool HasDisplay => Display || VideoBios is not null || Firmware is not null;

    internal bool HasPci => Pci || HasDisplay || IdeDrives.Count != 0 || PciDevices.Count != 0 || VirtioDevices.Any(d => d.Transport == VirtioTransport.Pci);

    /// <summary>Whether <see cref="PcMachine.RunAsync"/> ends at a reset instead of starting the machine anew.</summary>
    public bool NoReboot { get; init; }

    internal void Validate()
    {
        ArgumentNullException.ThrowIfNull(CommandLine);
        ArgumentNullException.ThrowIfNull(SerialPorts);
        if (MemorySize < MinMemorySize)
        {
            throw new KvmSharpException(KvmSharpErrorCode.InvalidArgument, $"A PC needs at least 2 MiB of memory, not {MemorySize} bytes.");
        }
        if (VcpuCount is < 1 or > VirtualMachineOptions.MaxVcpuCount)
        {
            throw new KvmSharpException(KvmSharpErrorCode.NotSupported,
                $"A PC has 1 to {VirtualMachineOptions.MaxVcpuCount} processors here, not {VcpuCount}.");
        }
        if (SerialPorts.Count > 4)
        {
            throw new KvmSharpException(KvmSharpErrorCode.InvalidArgument, "A PC has at most 4 serial ports.");
        }
        ArgumentNullException.ThrowIfNull(PciDevices);
        ArgumentNullException.ThrowIfNull(VirtioDevices);
        foreach (var device in VirtioDevices)
        {
            ArgumentNullException.ThrowIfNull(device, nameof(VirtioDevices));
            device.Validate();
        }
        if (VirtioDevices.Count(d => d.Transport == VirtioTransport.Mmio) > MaxVirtioMmioDevices)
        {
            throw new KvmSharpException(KvmSharpErrorCode.InvalidArgument, $"A PC has at most {MaxVirtioMmioDevices} virtio devices without a bus.");
        }
        if (Firmware is not null && Kernel is not null)
        {
            throw new KvmSharpException(KvmSharpErrorCode.InvalidArgument, "A machine starts either in firmware or in a kernel.");
        }
        if (SystemManagementMode && Firmware is null)
        {
            throw new KvmSharpException(KvmSharpErrorCode.InvalidArgument, "System management mode needs firmware, which sets it up.");
        }
        ArgumentNullException.ThrowIfNull(FwCfgFiles);
        if (FwCfg == false && FwCfgFiles.Count != 0)
        {
            throw new KvmSharpException(KvmSharpErrorCode.InvalidArgument, "There are files for the firmware configuration device, but it is not there.");
        }
        ArgumentNullException.ThrowIfNull(IdeDrives);
        ArgumentNullException.ThrowIfNull(BootOrder);
        if (BootOrder.Count is 0 or > 3 || BootOrder.Distinct().Count() != BootOrder.Count || !BootOrder.All(Enum.IsDefined))
        {
            throw new KvmSharpException(KvmSharpErrorCode.InvalidArgument, "A boot order has one to three kinds of devices, none of them twice.");
        }
        if (Initrd is not null && Kernel is null)
        {
            throw new KvmSharpException(KvmSharpErrorCode.InvalidArgument, "An initial RAM disk needs a kernel.");
        }
    }
}
