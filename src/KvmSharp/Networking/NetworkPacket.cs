using System.Buffers;

namespace KvmSharp.Networking;

/// <summary>How a packet that is larger than the wire takes is to be cut.</summary>
public enum PacketSegmentation
{
    /// <summary>Not at all.</summary>
    None = 0,
    /// <summary>Into TCP segments over IPv4.</summary>
    Tcp4 = 1,
    /// <summary>Into TCP segments over IPv6.</summary>
    Tcp6 = 4,
}

/// <summary>
/// What is left to do before a packet could go over a wire. Machines in one process save that work: a packet may reach its
/// destination unfinished. <see cref="PacketFinisher"/> does it where it has to be done.
/// </summary>
public readonly record struct PacketOffload
{
    /// <summary>
    /// Whether a checksum is missing: the one's complement sum from <see cref="ChecksumStart"/> to the end is to be put, inverted,
    /// at <see cref="ChecksumOffset"/> behind the start. The sum of the pseudo header is there already.
    /// </summary>
    public bool NeedsChecksum { get; init; }

    /// <summary>Where the sum starts, in bytes from the start of the frame.</summary>
    public ushort ChecksumStart { get; init; }

    /// <summary>Where the checksum goes, in bytes from <see cref="ChecksumStart"/>.</summary>
    public ushort ChecksumOffset { get; init; }

    /// <summary>Whether the checksums are known to be right, so that the receiver need not check.</summary>
    public bool ChecksumValid { get; init; }

    /// <summary>How the packet is to be cut; other than none goes with <see cref="NeedsChecksum"/>.</summary>
    public PacketSegmentation Segmentation { get; init; }

    /// <summary>The payload of each segment in bytes.</summary>
    public ushort SegmentSize { get; init; }
}

/// <summary>
/// An Ethernet frame without its check sequence, in a buffer from a pool. Who takes a packet out of a channel owns it and
/// disposes it, once.
/// </summary>
public sealed class NetworkPacket : IDisposable
{
    /// <summary>The length of an Ethernet header in bytes.</summary>
    public const int HeaderLength = 14;

    /// <summary>The longest packet in bytes, one that is still to be cut.</summary>
    public const int MaxLength = HeaderLength + 4 + 65535;

    private byte[]? _buffer;

    private NetworkPacket(byte[] buffer, int length)
    {
        _buffer = buffer;
        Length = length;
    }

    /// <summary>The length in bytes.</summary>
    public int Length { get; }

    /// <summary>What is left to do.</summary>
    public PacketOffload Offload { get; init; }

    /// <summary>The frame.</summary>
    /// <exception cref="ObjectDisposedException">The packet has been disposed.</exception>
    public Span<byte> Data => Buffer.AsSpan(0, Length);

    /// <summary>The frame, for asynchronous use.</summary>
    /// <exception cref="ObjectDisposedException">The packet has been disposed.</exception>
    public Memory<byte> Memory => Buffer.AsMemory(0, Length);

    private byte[] Buffer => _buffer ?? throw new ObjectDisposedException(nameof(NetworkPacket));

    /// <summary>Makes a packet with undefined content.</summary>
    /// <param name="length">The length in bytes, up to <see cref="MaxLength"/>.</param>
    /// <param name="offload">What is left to do.</param>
    public static NetworkPacket Create(int length, PacketOffload offload = default)
    {
        ArgumentOutOfRangeException.ThrowIfNegative(length);
        ArgumentOutOfRangeException.ThrowIfGreaterThan(length, MaxLength);
        return new NetworkPacket(ArrayPool<byte>.Shared.Rent(Math.Max(length, 1)), length) { Offload = offload };
    }

    /// <summary>Makes a packet of a frame.</summary>
    /// <param name="frame">The content; copied.</param>
    /// <param name="offload">What is left to do.</param>
    public static NetworkPacket Create(ReadOnlySpan<byte> frame, PacketOffload offload = default)
    {
        var packet = Create(frame.Length, offload);
        frame.CopyTo(packet.Data);
        return packet;
    }

    /// <summary>Gives the buffer back.</summary>
    public void Dispose()
    {
        if (Interlocked.Exchange(ref _buffer, null) is { } buffer)
        {
            ArrayPool<byte>.Shared.Return(buffer);
        }
    }
}
