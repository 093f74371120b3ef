namespace KvmSharp.Devices.Virtio;

// VIRTIO 1.2, "Socket Device".

/// <content>Configuration layout, packet header.</content>
public sealed partial class VirtioVsock
{
    /// <summary>The address of the host.</summary>
    public const uint HostCid = 2;

    private const int DeviceKind = 19;

    // "Virtqueues"
    private const int ReceiveQueue = 0;
    private const int TransmitQueue = 1;
    private const int EventQueue = 2;

    private const int ConfigSize = 8; // the guest's address

    // "Device Operation": struct virtio_vsock_hdr
    internal const int HeaderSize = 44;
    private const int HeaderSourceCid = 0;
    private const int HeaderTargetCid = 8;
    private const int HeaderSourcePort = 16;
    private const int HeaderTargetPort = 20;
    private const int HeaderLength = 24;
    private const int HeaderType = 28;
    private const int HeaderOperation = 30;
    private const int HeaderFlags = 32;
    private const int HeaderBufferSize = 36;
    private const int HeaderForwarded = 40;

    private const ushort TypeStream = 1;

    // Of a shutdown
    internal const uint NoMoreReceive = 1 << 0;
    internal const uint NoMoreSend = 1 << 1;

    // "Device Events"
    private const uint EventTransportReset = 0;

    internal enum Operation : ushort
    {
        Invalid = 0,
        Request = 1,
        Response = 2,
        Reset = 3,
        Shutdown = 4,
        ReadWrite = 5,
        CreditUpdate = 6,
        CreditRequest = 7,
    }
}
