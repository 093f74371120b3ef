namespace KvmSharp.Devices;

// Intel 8237A, "Register Description" and "Software Commands"; where they are and the page registers as in the Intel I/O
// Controller Hub 9 (ICH9) Family, "DMA I/O Registers". Offsets count registers; the second controller's are two ports apart.

/// <content>The register map.</content>
internal sealed partial class DmaController
{
    /// <summary>The first port of the first controller; its ports are adjacent.</summary>
    public const ulong FirstBase = 0x00;

    /// <summary>The first port of the second controller, of which each register has two.</summary>
    public const ulong SecondBase = 0xc0;

    /// <summary>How many registers a controller has.</summary>
    public const int RegisterCount = 16;

    private const int ChannelCount = 4;

    // Address and count of channel n: 2n and 2n + 1.
    private const int FirstControl = 2 * ChannelCount;
    private const int StatusCommand = 8;
    private const int Request = 9;
    private const int SingleMask = 10;
    private const int Mode = 11;
    private const int ClearBytePointer = 12;
    private const int MasterClear = 13; // read: the temporary register
    private const int ClearMask = 14;
    private const int AllMasks = 15;

    private const byte ChannelBits = 3; // in requests, single masks and modes
    private const byte SetBit = 1 << 2;
    private const byte AllChannels = 0x0f;
    private const int RequestShift = 4; // in the status
}

/// <content>The register map.</content>
internal sealed partial class DmaPages
{
    /// <summary>The first port: the one before it is the POST code's.</summary>
    public const ulong BasePort = 0x81;

    /// <summary>How many ports there are.</summary>
    public const int PortCount = 15;
}
