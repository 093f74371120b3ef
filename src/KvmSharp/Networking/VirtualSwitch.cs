using System.Diagnostics.CodeAnalysis;
using System.Threading.Channels;

namespace KvmSharp.Networking;

/// <summary>
/// An Ethernet switch that joins machines of this process, and networks such as <see cref="UserNetwork"/>, into one segment. It
/// learns which address is behind which port; packets for unknown addresses and groups go to all ports. A port whose reader
/// does not keep up loses packets, as on a wire. All members are callable from any thread.
/// Specification: IEEE 802.1D, "Principles of operation" of the filtering database.
/// </summary>
public sealed class VirtualSwitch : IDisposable
{
    private readonly Lock _lock = new();
    private readonly Dictionary<MacAddress, SwitchPort> _addresses = [];
    private SwitchPort[] _ports = []; // never changed in place

    /// <summary>The ports that are there.</summary>
    public IReadOnlyList<SwitchPort> Ports => Volatile.Read(ref _ports);

    /// <summary>Makes a port for a machine's card.</summary>
    /// <exception cref="ObjectDisposedException">The switch has been disposed.</exception>
    public SwitchPort Connect()
    {
        var port = new SwitchPort(this);
        lock (_lock)
        {
            ObjectDisposedException.ThrowIf(IsDisposed, this);
            _ports = [.. _ports, port];
        }
        return port;
    }

    /// <summary>Plugs a network in.</summary>
    /// <param name="network">The network; it stays the caller's, and has no other reader while it is plugged in.</param>
    /// <returns>The port; its disposal unplugs the network.</returns>
    /// <exception cref="ObjectDisposedException">The switch has been disposed.</exception>
    public SwitchPort Connect(INetworkBackend network)
    {
        ArgumentNullException.ThrowIfNull(network);
        var port = Connect();
        port.Carry(network);
        return port;
    }

    /// <summary>Unplugs everything.</summary>
    public void Dispose()
    {
        lock (_lock)
        {
            IsDisposed = true;
        }
        foreach (var port in Ports)
        {
            port.Dispose();
        }
    }

    internal bool IsDisposed { get; private set; }

    /// <summary>Passes a packet on. It belongs to the switch now.</summary>
    internal void Forward(SwitchPort from, NetworkPacket packet)
    {
        using (packet)
        {
            var frame = packet.Data;
            if (frame.Length < NetworkPacket.HeaderLength)
            {
                return;
            }
            var destination = new MacAddress(frame[..MacAddress.Length]);
            var source = new MacAddress(frame.Slice(MacAddress.Length, MacAddress.Length));
            SwitchPort? target = null;
            lock (_lock)
            {
                if (!source.IsMulticast && !from.IsClosed)
                {
                    Learn(from, source);
                }
                if (!destination.IsMulticast)
                {
                    _addresses.TryGetValue(destination, out target);
                }
            }
            if (target is not null)
            {
                if (target != from)
                {
                    target.Deliver(packet);
                }
                return;
            }
            foreach (var port in Ports)
            {
                if (port != from)
                {
                    port.Deliver(packet);
                }
            }
        }
    }

    internal void Remove(SwitchPort port)
    {
        lock (_lock)
        {
            foreach (var address in port.Addresses)
            {
                _addresses.Remove(address);
            }
            port.Addresses.Clear();
            _ports = [.. _ports.Where(p => p != port)];
        }
    }

    private void Learn(SwitchPort port, MacAddress source)
    {
        if (_addresses.TryGetValue(source, out var known))
        {
            if (known == port)
            {
                return;
            }
            known.Addresses.Remove(source);
        }
        if (port.Addresses.Count == SwitchPort.MaxAddresses)
        {
            _addresses.Remove(port.Addresses.First!.Value); // the one known longest
            port.Addresses.RemoveFirst();
        }
        _addresses[source] = port;
        port.Addresses.AddLast(source);
    }
}

/// <summary>One socket of a <see cref="VirtualSwitch"/>.</summary>
public sealed class SwitchPort : INetworkBackend, IDisposable
{
    internal const int MaxAddresses = 64;
    private const int MaxPackets = 512;
    private const int MaxBytes = 4 << 20;

    private readonly VirtualSwitch _switch;
    private readonly Channel<NetworkPacket> _outgoing = Channel.CreateBounded<NetworkPacket>(MaxPackets);
    private readonly Output _output;
    private long _waiting; // bytes
    private long _dropped;
    private volatile bool _closed;

    internal SwitchPort(VirtualSwitch parent)
    {
        _switch = parent;
        _output = new Output(this);
        FromGuest = new Input(this);
    }

    /// <inheritdoc/>
    public ChannelWriter<NetworkPacket> FromGuest { get; }

    /// <inheritdoc/>
    public ChannelReader<NetworkPacket> ToGuest => _output;

    /// <inheritdoc/>
    public NetworkOffloads Accepts => NetworkOffloads.All; // each receiver's own card finishes what it has to

    /// <summary>How many packets were lost here because the reader did not keep up.</summary>
    public long DroppedPackets => Interlocked.Read(ref _dropped);

    internal bool IsClosed => _closed;

    /// <summary>The addresses behind the port, the one known longest first. Under the switch's lock.</summary>
    internal LinkedList<MacAddress> Addresses { get; } = [];

    /// <summary>Takes the port away; the card there finds its cable unplugged.</summary>
    public void Dispose()
    {
        _closed = true;
        _switch.Remove(this);
        _outgoing.Writer.TryComplete();
    }

    internal void Deliver(NetworkPacket packet)
    {
        if (Interlocked.Add(ref _waiting, packet.Length) <= MaxBytes)
        {
            var copy = NetworkPacket.Create(packet.Data, packet.Offload);
            if (_outgoing.Writer.TryWrite(copy))
            {
                return;
            }
            copy.Dispose();
        }
        Interlocked.Add(ref _waiting, -packet.Length);
        Interlocked.Increment(ref _dropped);
    }

    internal void Carry(INetworkBackend network)
    {
        _ = CarryInAsync(network);
        _ = CarryOutAsync(network);
    }

    private async Task CarryInAsync(INetworkBackend network)
    {
        while (await network.ToGuest.WaitToReadAsync().ConfigureAwait(false) && !_closed)
        {
            while (!_closed && network.ToGuest.TryRead(out var packet))
            {
                _switch.Forward(this, packet);
            }
        }
    }

    private async Task CarryOutAsync(INetworkBackend network)
    {
        await foreach (var packet in _output.ReadAllAsync().ConfigureAwait(false))
        {
            PacketFinisher.Finish(packet, network.Accepts, finished =>
            {
                if (!network.FromGuest.TryWrite(finished))
                {
                    finished.Dispose();
                    Interlocked.Increment(ref _dropped);
                }
            });
        }
    }

    private sealed class Input(SwitchPort port) : ChannelWriter<NetworkPacket>
    {
        public override bool TryWrite(NetworkPacket item)
        {
            if (port._closed)
            {
                return false;
            }
            port._switch.Forward(port, item);
            return true;
        }

        public override ValueTask<bool> WaitToWriteAsync(CancellationToken cancellationToken = default) => new(!port._closed);
    }

    private sealed class Output(SwitchPort port) : ChannelReader<NetworkPacket>
    {
        public override bool TryRead([MaybeNullWhen(false)] out NetworkPacket item)
        {
            if (!port._outgoing.Reader.TryRead(out item))
            {
                return false;
            }
            Interlocked.Add(ref port._waiting, -item.Length);
            return true;
        }

        public override ValueTask<bool> WaitToReadAsync(CancellationToken cancellationToken = default) =>
            port._outgoing.Reader.WaitToReadAsync(cancellationToken);
    }
}
