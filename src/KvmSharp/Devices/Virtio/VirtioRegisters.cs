namespace KvmSharp.Devices.Virtio;

// Virtual I/O Device (VIRTIO) Version 1.2.

/// <summary>"Device Status Field".</summary>
[Flags]
internal enum VirtioStatus : byte
{
    None = 0,
    Acknowledge = 1 << 0,
    Driver = 1 << 1,
    DriverOk = 1 << 2,
    FeaturesOk = 1 << 3,
    NeedsReset = 1 << 6,
    Failed = 1 << 7,
}

/// <summary>"Reserved Feature Bits": those that do not depend on the kind of device.</summary>
internal static class VirtioFeatures
{
    public const ulong IndirectDescriptors = 1UL << 28;
    public const ulong EventIndex = 1UL << 29;
    public const ulong Version1 = 1UL << 32;
}

/// <summary>"Split Virtqueues": layout of the descriptor table, the available ring and the used ring.</summary>
internal static class SplitRing
{
    public const int MaxSize = 32768;

    public const int DescriptorSize = 16;
    public const int DescriptorLength = 8;
    public const int DescriptorFlags = 12;
    public const int DescriptorNext = 14;

    [Flags]
    public enum Flags : ushort
    {
        None = 0,
        Next = 1 << 0,
        Write = 1 << 1,
        Indirect = 1 << 2,
    }

    public const int AvailableFlags = 0;
    public const int AvailableIndex = 2;
    public const int AvailableRing = 4;
    public const ushort NoInterrupt = 1;

    public const int UsedFlags = 0;
    public const int UsedIndex = 2;
    public const int UsedRing = 4;
    public const int UsedElementSize = 8;
    public const ushort NoNotify = 1;

    // Behind each ring two bytes: used_event behind the available ring, avail_event behind the used ring.
    public static ulong AvailableSize(int size) => (ulong)(AvailableRing + 2 * size + 2);

    public static ulong UsedSize(int size) => (ulong)(UsedRing + UsedElementSize * size + 2);
}

/// <summary>"Virtio Over PCI Bus": identities, capabilities, "Common configuration structure layout".</summary>
internal static class VirtioPciRegisters
{
    public const ushort VendorId = 0x1af4;
    public const ushort FirstDeviceId = 0x1040; // and the kind of device
    public const ushort SubsystemId = 0x1100;
    public const byte Revision = 1;

    // struct virtio_pci_cap
    public const int CapabilityLength = 16;
    public const int CapabilityType = 3;
    public const int CapabilityBar = 4;
    public const int CapabilityOffset = 8;
    public const int CapabilityRangeLength = 12;
    public const int NotifyMultiplier = 16; // struct virtio_pci_notify_cap
    public const int AccessData = 16; // struct virtio_pci_cfg_cap

    public const byte CommonConfig = 1;
    public const byte NotifyConfig = 2;
    public const byte IsrConfig = 3;
    public const byte DeviceConfig = 4;
    public const byte PciConfigAccess = 5;

    public const int DeviceFeatureSelect = 0x00;
    public const int DeviceFeature = 0x04;
    public const int DriverFeatureSelect = 0x08;
    public const int DriverFeature = 0x0c;
    public const int ConfigVector = 0x10;
    public const int QueueCount = 0x12;
    public const int DeviceStatus = 0x14;
    public const int ConfigGeneration = 0x15;
    public const int QueueSelect = 0x16;
    public const int QueueSize = 0x18;
    public const int QueueVector = 0x1a;
    public const int QueueEnable = 0x1c;
    public const int QueueNotifyOffset = 0x1e;
    public const int QueueDescriptors = 0x20;
    public const int QueueDriver = 0x28;
    public const int QueueDevice = 0x30;
    public const int CommonLength = 0x38;

    public const ushort NoVector = 0xffff;

    public const byte IsrQueue = 1 << 0;
    public const byte IsrConfigChange = 1 << 1;
}

/// <summary>"Virtio Over MMIO": "MMIO Device Register Layout".</summary>
internal static class VirtioMmioRegisters
{
    public const int Magic = 0x000;
    public const int Version = 0x004;
    public const int DeviceId = 0x008;
    public const int VendorId = 0x00c;
    public const int DeviceFeatures = 0x010;
    public const int DeviceFeaturesSelect = 0x014;
    public const int DriverFeatures = 0x020;
    public const int DriverFeaturesSelect = 0x024;
    public const int QueueSelect = 0x030;
    public const int QueueSizeMax = 0x034;
    public const int QueueSize = 0x038;
    public const int QueueReady = 0x044;
    public const int QueueNotify = 0x050;
    public const int InterruptStatus = 0x060;
    public const int InterruptAcknowledge = 0x064;
    public const int Status = 0x070;
    public const int QueueDescriptorsLow = 0x080;
    public const int QueueDescriptorsHigh = 0x084;
    public const int QueueDriverLow = 0x090;
    public const int QueueDriverHigh = 0x094;
    public const int QueueDeviceLow = 0x0a0;
    public const int QueueDeviceHigh = 0x0a4;
    public const int SharedMemoryLengthLow = 0x0b0;
    public const int SharedMemoryBaseHigh = 0x0bc;
    public const int ConfigGeneration = 0x0fc;
    public const int Config = 0x100;

    public const uint MagicValue = 0x7472_6976;
    public const uint VersionValue = 2;
    public const uint VendorValue = 0x5348_564b; // "KVHS"
}
