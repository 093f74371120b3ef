namespace KvmSharp.Devices.Virtio;

// VIRTIO 1.2, "Block Device".

/// <content>Features, configuration layout, request format.</content>
public sealed partial class VirtioBlock
{
    private const int DeviceKind = 2;

    // "Feature bits"
    private const ulong FeatureSegmentMax = 1UL << 2;
    private const ulong FeatureReadOnly = 1UL << 5;
    private const ulong FeatureBlockSize = 1UL << 6;
    private const ulong FeatureFlush = 1UL << 9;
    private const ulong FeatureTopology = 1UL << 10;
    private const ulong FeatureConfigWriteback = 1UL << 11;
    private const ulong FeatureMultiQueue = 1UL << 12;
    private const ulong FeatureDiscard = 1UL << 13;
    private const ulong FeatureWriteZeroes = 1UL << 14;

    // "Device configuration layout"
    private const int ConfigCapacity = 0;
    private const int ConfigSegmentMax = 12;
    private const int ConfigBlockSize = 20;
    private const int ConfigPhysicalBlockExponent = 24;
    private const int ConfigWriteback = 32;
    private const int ConfigQueueCount = 34;
    private const int ConfigDiscardSectors = 36;
    private const int ConfigDiscardSegments = 40;
    private const int ConfigDiscardAlignment = 44;
    private const int ConfigZeroSectors = 48;
    private const int ConfigZeroSegments = 52;
    private const int ConfigZeroMayUnmap = 56;
    private const int ConfigSize = 60;

    // "Device Operation": struct virtio_blk_req
    private const int HeaderSize = 16;
    private const int HeaderSector = 8;
    private const int SectorShift = 9; // of request offsets, whatever the block size
    private const int SerialNumberSize = 20;

    // struct virtio_blk_discard_write_zeroes
    private const int RangeSize = 16;
    private const int RangeCount = 8;
    private const int RangeFlags = 12;
    private const uint RangeUnmap = 1 << 0;

    private enum RequestType : uint
    {
        In = 0,
        Out = 1,
        Flush = 4,
        GetId = 8,
        Discard = 11,
        WriteZeroes = 13,
    }

    private enum RequestStatus : byte
    {
        Ok = 0,
        IoError = 1,
        Unsupported = 2,
    }
}
