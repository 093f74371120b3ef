using System.Buffers.Binary;
using System.Diagnostics.CodeAnalysis;
using System.Threading.Channels;

namespace KvmSharp.Networking;

/// <summary>
/// Writes down what passes between a card and its network, in the pcap format with nanoseconds that Wireshark and tcpdump read.
/// It stands between the two. Packets appear as they pass: longer than the wire would take them, but with their checksums.
/// Times are those of the machine's clock. Specification: draft-ietf-opsawg-pcap, "PCAP Capture File Format".
/// </summary>
public sealed class PacketCapture : INetworkBackend, IDisposable
{
    private const uint MagicNanoseconds = 0xa1b2_3c4d;
    private const uint LinkTypeEthernet = 1;
    private const uint LongestPacket = 262_144;
    private const int FileHeaderLength = 24;
    private const int RecordHeaderLength = 16;

    private readonly INetworkBackend _network;
    private readonly Stream _target;
    private readonly bool _leaveOpen;
    private readonly Lock _lock = new();
    private TimeProvider _clock = TimeProvider.System;
    private bool _disposed;

    /// <summary>Begins to write.</summary>
    /// <param name="network">What the card is really plugged into.</param>
    /// <param name="target">Where to write; a stream that can be written.</param>
    /// <param name="leaveOpen">Whether the stream stays open when this object is disposed.</param>
    public PacketCapture(INetworkBackend network, Stream target, bool leaveOpen = false)
    {
        ArgumentNullException.ThrowIfNull(network);
        ArgumentNullException.ThrowIfNull(target);
        _network = network;
        _target = target;
        _leaveOpen = leaveOpen;
        FromGuest = new Input(this, network.FromGuest);
        ToGuest = new Output(this, network.ToGuest);
        Span<byte> header = stackalloc byte[FileHeaderLength];
        header.Clear();
        BinaryPrimitives.WriteUInt32LittleEndian(header, MagicNanoseconds);
        BinaryPrimitives.WriteUInt16LittleEndian(header[4..], 2); // version 2.4
        BinaryPrimitives.WriteUInt16LittleEndian(header[6..], 4);
        BinaryPrimitives.WriteUInt32LittleEndian(header[16..], LongestPacket);
        BinaryPrimitives.WriteUInt32LittleEndian(header[20..], LinkTypeEthernet);
        target.Write(header);
    }

    /// <inheritdoc/>
    public ChannelWriter<NetworkPacket> FromGuest { get; }

    /// <inheritdoc/>
    public ChannelReader<NetworkPacket> ToGuest { get; }

    /// <inheritdoc/>
    public NetworkOffloads Accepts => _network.Accepts;

    /// <summary>What the stream threw; nothing is written after it, and the network goes on.</summary>
    public Exception? Failure { get; private set; }

    void INetworkBackend.Attach(TimeProvider clock)
    {
        _clock = clock;
        _network.Attach(clock);
    }

    void INetworkBackend.Detach(TimeProvider clock)
    {
        if (ReferenceEquals(_clock, clock))
        {
            _clock = TimeProvider.System;
        }
        _network.Detach(clock);
    }

    /// <summary>Ends the writing. The network stays as it is.</summary>
    public void Dispose()
    {
        lock (_lock)
        {
            if (_disposed)
            {
                return;
            }
            _disposed = true;
            if (!_leaveOpen)
            {
                _target.Dispose();
            }
        }
    }

    private void Write(NetworkPacket packet)
    {
        lock (_lock)
        {
            if (_disposed || Failure is not null)
            {
                return;
            }
            try
            {
                var time = _clock.GetUtcNow() - DateTimeOffset.UnixEpoch;
                Span<byte> header = stackalloc byte[RecordHeaderLength];
                BinaryPrimitives.WriteUInt32LittleEndian(header, (uint)(time.Ticks / TimeSpan.TicksPerSecond));
                BinaryPrimitives.WriteUInt32LittleEndian(header[4..], (uint)(time.Ticks % TimeSpan.TicksPerSecond * TimeSpan.NanosecondsPerTick));
                BinaryPrimitives.WriteUInt32LittleEndian(header[8..], (uint)packet.Length);
                BinaryPrimitives.WriteUInt32LittleEndian(header[12..], (uint)packet.Length);
                _target.Write(header);
                if (!packet.Offload.NeedsChecksum)
                {
                    _target.Write(packet.Data);
                    return;
                }
                using var copy = NetworkPacket.Create(packet.Data);
                PacketFinisher.TryFillChecksum(copy.Data, packet.Offload.ChecksumStart, packet.Offload.ChecksumOffset);
                _target.Write(copy.Data);
            }
            catch (Exception e) when (e is IOException or ObjectDisposedException or NotSupportedException or UnauthorizedAccessException)
            {
                Failure = e;
            }
        }
    }

    private sealed class Input(PacketCapture capture, ChannelWriter<NetworkPacket> network) : ChannelWriter<NetworkPacket>
    {
        public override bool TryWrite(NetworkPacket item)
        {
            // The packet is the network's as soon as it has it; its answer is not to be written before it.
            using var copy = NetworkPacket.Create(item.Data, item.Offload);
            lock (capture._lock)
            {
                if (!network.TryWrite(item))
                {
                    return false;
                }
                capture.Write(copy);
                return true;
            }
        }

        public override ValueTask<bool> WaitToWriteAsync(CancellationToken cancellationToken = default) => network.WaitToWriteAsync(cancellationToken);
    }

    private sealed class Output(PacketCapture capture, ChannelReader<NetworkPacket> network) : ChannelReader<NetworkPacket>
    {
        public override bool TryRead([MaybeNullWhen(false)] out NetworkPacket item)
        {
            if (!network.TryRead(out item))
            {
                return false;
            }
            capture.Write(item);
            return true;
        }

        public override ValueTask<bool> WaitToReadAsync(CancellationToken cancellationToken = default) => network.WaitToReadAsync(cancellationToken);
    }
}
