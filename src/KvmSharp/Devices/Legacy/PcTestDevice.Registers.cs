namespace KvmSharp.Devices;

// The device has no specification of its own: QEMU's documentation of "pc-testdev" and what self-checking boot images
// expect of it define it.

/// <content>The register map.</content>
public sealed partial class PcTestDevice
{
    /// <summary>The first port of the latch: 4 bytes that read back as they were written.</summary>
    public const ulong LatchPort = 0xe0;

    /// <summary>The port that takes the 32-bit address of a page whose translations the host is to drop.</summary>
    public const ulong FlushPort = 0xe4;

    /// <summary>The first of the ports that drive interrupt lines: a byte that is not 0 raises the line, 0 lowers it.</summary>
    public const ulong InterruptPort = 0x2000;

    /// <summary>How many interrupt lines there are.</summary>
    public const int InterruptCount = 24;

    /// <summary>Where the memory-mapped buffer lies.</summary>
    public const ulong BufferAddress = 0xff00_0000;

    /// <summary>How long the buffer is.</summary>
    public const int BufferLength = 0x1_0000;

    private const int LatchLength = 4;
    private const int FlushLength = 4;
}
