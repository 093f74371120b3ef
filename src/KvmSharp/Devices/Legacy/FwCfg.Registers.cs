namespace KvmSharp.Devices;

// QEMU's specification "QEMU Firmware Configuration (fw_cfg) Device".

/// <content>The register map.</content>
public sealed partial class FwCfg
{
    private const ulong SelectorRegister = 0; // 16 bits, little-endian, write-only
    private const ulong DataRegister = 1; // 8 bits
    private const ulong DmaAddressHigh = 4; // 32 bits, big-endian
    private const ulong DmaAddressLow = 8; // writing it starts the transfer

    // Items
    private const ushort SignatureKey = 0x00;
    private const ushort IdKey = 0x01;
    private const ushort RamSizeKey = 0x03;
    private const ushort ProcessorCountKey = 0x05;
    private const ushort MaxProcessorsKey = 0x0f;
    private const ushort FileDirectoryKey = 0x19;
    private const ushort FirstFileKey = 0x20;
    private const ushort EndOfKeys = 0x4000; // bit 14 once asked to write, bit 15 marks items of the architecture
    private const ushort ArchitectureLocal = 0x8000;

    // The feature bits of the item "revision"
    private const uint TraditionalInterface = 1 << 0;
    private const uint DmaInterface = 1 << 1;

    // "struct FWCfgFiles" and "struct FWCfgFile", big-endian
    private const int DirectoryHeaderLength = 4;
    private const int DirectoryEntryLength = 64;
    private const int DirectoryNameOffset = 8;

    // "struct FWCfgDmaAccess", big-endian: control, length, address
    private const int DmaAccessLength = 16;

    [Flags]
    private enum DmaControl : uint
    {
        None = 0,
        Error = 1 << 0,
        Read = 1 << 1,
        Skip = 1 << 2,
        Select = 1 << 3,
        Write = 1 << 4,
    }
}
