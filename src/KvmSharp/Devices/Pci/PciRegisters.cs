namespace KvmSharp.Devices.Pci;

// PCI Local Bus Specification 3.0, "Configuration Space" and "Message Signaled Interrupts"; PCI Express Base
// Specification 5.0, "Enhanced Configuration Access Mechanism (ECAM)". Offsets from the start of a function's
// configuration space unless stated otherwise.

internal static class PciRegisters
{
    public const int ConfigSize = 4096; // what ECAM reaches
    public const int LegacyConfigSize = 256; // what ports 0xCF8 and 0xCFC reach

    public const int VendorId = 0x00;
    public const int DeviceId = 0x02;
    public const int Command = 0x04;
    public const int Status = 0x06;
    public const int RevisionId = 0x08; // class code in the three bytes behind it
    public const int CacheLineSize = 0x0c;
    public const int LatencyTimer = 0x0d;
    public const int HeaderType = 0x0e;
    public const int FirstBar = 0x10;
    public const int BarCount = 6;
    public const int SubsystemVendorId = 0x2c;
    public const int SubsystemId = 0x2e;
    public const int ExpansionRom = 0x30;
    public const int CapabilitiesPointer = 0x34;
    public const int InterruptLineRegister = 0x3c;
    public const int InterruptPinRegister = 0x3d;
    public const int FirstCapability = 0x40;

    public const byte MultiFunction = 0x80; // in HeaderType

    [Flags]
    public enum CommandBits : ushort
    {
        None = 0,
        IoSpace = 1 << 0,
        MemorySpace = 1 << 1,
        BusMaster = 1 << 2,
        ParityErrorResponse = 1 << 6,
        SystemErrorEnable = 1 << 8,
        InterruptDisable = 1 << 10,
        Writable = IoSpace | MemorySpace | BusMaster | ParityErrorResponse | SystemErrorEnable | InterruptDisable,
    }

    [Flags]
    public enum StatusBits : ushort
    {
        None = 0,
        Interrupt = 1 << 3,
        CapabilitiesList = 1 << 4,
        ReceivedMasterAbort = 1 << 13,
        WriteOneToClear = 0xf900,
    }

    // "Base Address Registers"
    public const uint BarIo = 1 << 0;
    public const uint BarMemory64 = 2 << 1;
    public const uint BarPrefetchable = 1 << 3;

    // "Expansion ROM Base Address Register"
    public const uint ExpansionRomEnable = 1 << 0;
    public const int ExpansionRomIndex = 6; // as if it were one more base address register

    // "Capability IDs"
    public const byte CapabilityMsi = 0x05;
    public const byte CapabilityVendor = 0x09;
    public const byte CapabilityMsix = 0x11;

    // "MSI Capability Structure", 64-bit with per-vector masking; offsets within the capability.
    public const int MsiControl = 0x02;
    public const int MsiAddress = 0x04;
    public const int MsiData = 0x0c;
    public const int MsiMask = 0x10;
    public const int MsiPending = 0x14;
    public const int MsiLength = 0x18;
    public const ushort MsiEnable = 1 << 0;
    public const int MsiCapableShift = 1;
    public const int MsiEnabledShift = 4;
    public const ushort Msi64Bit = 1 << 7;
    public const ushort MsiPerVectorMask = 1 << 8;
    public const int MsiMaxVectors = 32;

    // "MSI-X Capability and Table Structures"; offsets within the capability and within a table entry.
    public const int MsixControl = 0x02;
    public const int MsixTable = 0x04;
    public const int MsixPba = 0x08;
    public const int MsixLength = 0x0c;
    public const ushort MsixFunctionMask = 1 << 14;
    public const ushort MsixEnable = 1 << 15;
    public const int MsixMaxVectors = 2048;
    public const int MsixEntrySize = 16;
    public const int MsixEntryData = 8;
    public const int MsixEntryControl = 12;
    public const uint MsixEntryMasked = 1 << 0;

    // "PCI Local Bus Configuration Mechanism": the address register.
    public const uint ConfigEnable = 1u << 31;
}
