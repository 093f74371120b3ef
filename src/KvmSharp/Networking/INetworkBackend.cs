using System.Threading.Channels;

namespace KvmSharp.Networking;

/// <summary>What unfinished work a receiver of packets accepts.</summary>
[Flags]
public enum NetworkOffloads
{
    /// <summary>None: packets come finished.</summary>
    None = 0,
    /// <summary>Packets without their checksum.</summary>
    Checksum = 1,
    /// <summary>Packets still to be cut into TCP segments over IPv4.</summary>
    Tcp4 = 2,
    /// <summary>Packets still to be cut into TCP segments over IPv6.</summary>
    Tcp6 = 4,
    /// <summary>All of these.</summary>
    All = Checksum | Tcp4 | Tcp6,
}

/// <summary>
/// What a guest's network card is plugged into: two channels of packets. Bounded channels hold the other side back; a
/// completed one is an unplugged cable. The card finishes what its receiver does not accept unfinished.
/// </summary>
public interface INetworkBackend
{
    /// <summary>Where packets of the guest go. The reader disposes them. The card waits while it is full.</summary>
    ChannelWriter<NetworkPacket> FromGuest { get; }

    /// <summary>Where packets for the guest come from. The card disposes them, and reads only what the guest has room for.</summary>
    ChannelReader<NetworkPacket> ToGuest { get; }

    /// <summary>What <see cref="FromGuest"/> accepts unfinished.</summary>
    NetworkOffloads Accepts => NetworkOffloads.None;

    /// <summary>A machine's card has been plugged in.</summary>
    /// <param name="clock">The machine's clock: time that the guest can see is to be taken from it. It stands still in a pause.</param>
    void Attach(TimeProvider clock)
    {
    }

    /// <summary>The card has been disposed with its machine.</summary>
    /// <param name="clock">The clock that <see cref="Attach"/> was given.</param>
    void Detach(TimeProvider clock)
    {
    }
}

/// <summary>A network card's counterpart for programs: both ends of both channels.</summary>
public sealed class ChannelNetworkBackend : INetworkBackend
{
    private readonly Channel<NetworkPacket> _fromGuest;
    private readonly Channel<NetworkPacket> _toGuest;

    /// <summary>Creates the channels.</summary>
    /// <param name="capacity">How many packets each holds.</param>
    /// <param name="accepts">What <see cref="Received"/> accepts unfinished.</param>
    public ChannelNetworkBackend(int capacity = 256, NetworkOffloads accepts = NetworkOffloads.None)
    {
        _fromGuest = Channel.CreateBounded<NetworkPacket>(capacity);
        _toGuest = Channel.CreateBounded<NetworkPacket>(capacity);
        Accepts = accepts;
    }

    /// <inheritdoc/>
    public NetworkOffloads Accepts { get; }

    /// <summary>What the guest has sent.</summary>
    public ChannelReader<NetworkPacket> Received => _fromGuest.Reader;

    /// <summary>Where to send to the guest.</summary>
    public ChannelWriter<NetworkPacket> Send => _toGuest.Writer;

    ChannelWriter<NetworkPacket> INetworkBackend.FromGuest => _fromGuest.Writer;

    ChannelReader<NetworkPacket> INetworkBackend.ToGuest => _toGuest.Reader;
}
