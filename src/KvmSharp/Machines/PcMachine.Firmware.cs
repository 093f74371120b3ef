using KvmSharp.Boot;
using KvmSharp.Devices;
using KvmSharp.Devices.Pci;
using KvmSharp.Firmware;

namespace KvmSharp;

/// <content>A machine that starts in firmware.</content>
public sealed partial class PcMachine
{
    private const ulong MaxFirmwareSize = 16UL << 20;
    private static readonly PciAddress LpcAddress = new(31);

    // Where firmware for this chipset puts ECAM and the ranges of PCI functions behind it: RAM must end below.
    private const ulong FirmwareHoleStart = 0xb000_0000;
    private const ulong FirmwareHoleStartOfLargeMemory = 2UL << 30;

    private static readonly (uint First, uint Last) FirmwarePciWindow = (0xc000_0000, 0xfebf_ffff);

    private ShadowMemory? _shadowMemory;
    private LpcBridge? _lpcBridge;

    private static ulong LowMemoryEnd(PcMachineOptions options)
    {
        if (options.Firmware is null)
        {
            return Math.Min(options.MemorySize, HoleStart);
        }
        return options.MemorySize <= FirmwareHoleStart ? options.MemorySize : FirmwareHoleStartOfLargeMemory;
    }

    // The processor starts 16 bytes below 4 GiB: SDM 3A "First Instruction Executed".
    private void MapFirmware(BootImage firmware)
    {
        var image = firmware.Bytes.Span;
        if (image.Length % GuestMemory.PageSize != 0 || (ulong)image.Length > MaxFirmwareSize)
        {
            throw new BootImageException(BootImageProblem.Malformed,
                $"'{firmware.Name}' is no firmware image: its length, {image.Length} bytes, is not a multiple of 4 KiB up to 16 MiB.");
        }
        using var rom = new GuestRam((ulong)image.Length);
        rom.Write(0, image);
        var address = HoleEnd - rom.Size;
        var hidden = VirtualMachine.SystemManagementMemory;
        VirtualMachine.Memory.Map(rom, 0, address, rom.Size, MemorySlotFlags.ReadOnly);
        hidden?.Map(rom, 0, address, rom.Size, MemorySlotFlags.ReadOnly);
        _shadowMemory = new ShadowMemory(VirtualMachine.Memory, hidden, image);
        VirtualMachine.Mmio.Map(_shadowMemory, ShadowMemoryRegisters.Address, ShadowMemoryRegisters.Length);
    }

    // Firmware moves ECAM before it reads the tables, which tell where it is.
    private void AddFirmwareFiles(ulong below4G)
    {
        if (FwCfg is not { } fwCfg)
        {
            return;
        }
        AddFile(fwCfg, "etc/e820", FirmwareFiles.MemoryMap(below4G, Options.MemorySize - below4G));
        FirmwareFiles.AddSmbios(fwCfg, SmbiosOptions);
        if (Options.Acpi)
        {
            var options = AcpiOptions with { EcamAddress = (uint)FirmwareHoleStart, PciWindow = FirmwarePciWindow };
            var tables = FirmwareFiles.AddAcpi(fwCfg, options);
            Pci!.Bridge.EcamMoved += address => FirmwareFiles.BuildAcpi(options with { EcamAddress = (uint)address }).CopyTo(tables, 0);
        }
    }

    // What the user gives comes first.
    private static void AddFile(FwCfg fwCfg, string name, byte[] content)
    {
        if (!fwCfg.FileNames.Contains(name))
        {
            fwCfg.AddFile(name, content);
        }
    }

    private void AddChipset()
    {
        Pci!.Bridge.AddShadowMemory(_shadowMemory!);
        if (Options.SystemManagementMode)
        {
            Pci.Bridge.AddSystemManagementRam(new SystemManagementRam(VirtualMachine.Memory, _ram!));
        }
        _lpcBridge = new LpcBridge(PowerManagement);
        Pci.Add(_lpcBridge, LpcAddress);
    }
}
