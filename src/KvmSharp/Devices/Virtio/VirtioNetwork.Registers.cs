namespace KvmSharp.Devices.Virtio;

// VIRTIO 1.2, "Network Device".

/// <content>Features, configuration layout, packet header, control commands.</content>
public sealed partial class VirtioNetwork
{
    private const int DeviceKind = 1;

    // "Feature bits"
    private const ulong FeatureChecksum = 1UL << 0;
    private const ulong FeatureGuestChecksum = 1UL << 1;
    private const ulong FeatureControlOffloads = 1UL << 2;
    private const ulong FeatureMtu = 1UL << 3;
    private const ulong FeatureMac = 1UL << 5;
    private const ulong FeatureGuestTcp4 = 1UL << 7;
    private const ulong FeatureGuestTcp6 = 1UL << 8;
    private const ulong FeatureHostTcp4 = 1UL << 11;
    private const ulong FeatureHostTcp6 = 1UL << 12;
    private const ulong FeatureMergeableBuffers = 1UL << 15;
    private const ulong FeatureStatus = 1UL << 16;
    private const ulong FeatureControlQueue = 1UL << 17;
    private const ulong FeatureControlReceive = 1UL << 18;
    private const ulong FeatureControlMac = 1UL << 23;
    private const ulong GuestOffloads = FeatureGuestChecksum | FeatureGuestTcp4 | FeatureGuestTcp6;

    // "Device configuration layout"
    private const int ConfigMac = 0;
    private const int ConfigStatus = 6;
    private const int ConfigMtu = 10;
    private const int ConfigSize = 12;
    private const ushort StatusLinkUp = 1 << 0;

    // "Device Operation": struct virtio_net_hdr
    private const int HeaderSize = 12;
    private const int HeaderSegmentation = 1;
    private const int HeaderLength = 2;
    private const int HeaderSegmentSize = 4;
    private const int HeaderChecksumStart = 6;
    private const int HeaderChecksumOffset = 8;
    private const int HeaderBuffers = 10;
    private const byte HeaderNeedsChecksum = 1 << 0;
    private const byte HeaderDataValid = 1 << 1;
    private const byte SegmentationCongestion = 0x80; // the packet carries ECN; nothing depends on it here

    // "Control Virtqueue"
    private const int ControlHeaderSize = 2;
    private const byte ControlOk = 0;
    private const byte ControlError = 1;

    private enum ControlCommand : ushort // class in the high byte
    {
        Promiscuous = 0x0000,
        AllMulticast = 0x0001,
        AllUnicast = 0x0002,
        NoMulticast = 0x0003,
        NoUnicast = 0x0004,
        NoBroadcast = 0x0005,
        SetMacTable = 0x0100,
        SetMac = 0x0101,
        SetOffloads = 0x0500,
    }
}
