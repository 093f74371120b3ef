using System.Diagnostics.CodeAnalysis;
using System.Net;
using System.Threading.Channels;
using KvmSharp.Networking.Nat;

namespace KvmSharp.Networking;

/// <summary>What a <see cref="UserNetwork"/> looks like and how much it may do.</summary>
public sealed record UserNetworkOptions
{
    /// <summary>The guests' IPv4 network, 8 to 27 bits: .2 is the gateway, .3 the DNS server, guests get addresses from .15 on.</summary>
    public IPNetwork Network4 { get; init; } = new(new IPAddress([10, 0, 2, 0]), 24);

    /// <summary>The guests' IPv6 network of 64 bits with gateway ::2 and DNS server ::3, or <see langword="null"/> for none.</summary>
    public IPNetwork? Network6 { get; init; } = IPNetwork.Parse("fd00:6b76:6d73::/64");

    /// <summary>The longest packet behind the Ethernet header in bytes: 1280 to 65535. Guests get to know it.</summary>
    public int Mtu { get; init; } = 1500;

    /// <summary>Whether the gateway's addresses lead to the host's own loopback addresses.</summary>
    public bool AllowHostLoopback { get; init; } = true;

    /// <summary>
    /// What guests may reach; <see langword="null"/> is everything, an empty list nothing. With a list, the DNS server answers
    /// only for names that it names. Forwarded ports work in any case.
    /// </summary>
    public IReadOnlyList<EgressRule>? Egress { get; init; }

    /// <summary>Ports of the host that lead to guests.</summary>
    public IReadOnlyList<PortForward> Forwards { get; init; } = [];

    /// <summary>Who answers DNS queries: the servers of the host's configuration, unless it is said otherwise.</summary>
    public IDnsResolver DnsResolver { get; init; } = new DnsServers();

    /// <summary>The domain that guests get to know by DHCP: ASCII, up to 200 characters, or <see langword="null"/>.</summary>
    public string? DomainName { get; init; }

    /// <summary>The most TCP connections at once, 1 to 65536. More are refused.</summary>
    public int MaxConnections { get; init; } = 1024;

    /// <summary>The most pairs of ends of UDP and of series of echo requests, 1 to 65536. The one unused longest makes room.</summary>
    public int MaxDatagramFlows { get; init; } = 512;

    /// <summary>How much memory the buffers of all connections may take together, in bytes; each has 32 KiB in any case.</summary>
    public long MaxBufferMemory { get; init; } = 64L << 20;

    internal void Validate()
    {
        ArgumentNullException.ThrowIfNull(Forwards);
        ArgumentNullException.ThrowIfNull(DnsResolver);
        static void Check(long value, long low, long high, string what)
        {
            if (value < low || value > high)
            {
                throw new KvmSharpException(KvmSharpErrorCode.InvalidArgument, $"{what} of a user-mode network is {low} to {high}, not {value}.");
            }
        }
        Check(Mtu, 1280, 65535, "The MTU");
        Check(MaxConnections, 1, 65536, "The number of connections");
        Check(MaxDatagramFlows, 1, 65536, "The number of datagram flows");
        Check(MaxBufferMemory, 0, long.MaxValue, "The buffer memory");
        if (DomainName is { } domain && (domain.Length > 200 || !System.Text.Ascii.IsValid(domain)))
        {
            throw new KvmSharpException(KvmSharpErrorCode.InvalidArgument, $"The domain '{domain}' is not up to 200 ASCII characters.");
        }
        foreach (var rule in Egress ?? [])
        {
            ArgumentNullException.ThrowIfNull(rule, nameof(Egress));
            rule.Validate();
        }
    }
}

/// <summary>
/// A network that needs no privileges: guests reach what the host reaches, through ordinary sockets of the host. It has a
/// gateway, a DHCP server, a DNS server and IPv6 with router advertisements. A card or a <see cref="VirtualSwitch"/> is plugged
/// into it. All members are callable from any thread.
/// </summary>
public sealed class UserNetwork : INetworkBackend, IDisposable
{
    private readonly NatStack _stack;

    /// <summary>Creates the network and opens the forwarded ports.</summary>
    /// <param name="options">What it looks like.</param>
    /// <exception cref="KvmSharpException">An option is invalid, or a port of the host cannot be had.</exception>
    public UserNetwork(UserNetworkOptions? options = null)
    {
        options ??= new UserNetworkOptions();
        options.Validate();
        _stack = new NatStack(options);
        FromGuest = new Input(_stack);
        ToGuest = new Output(_stack);
        try
        {
            foreach (var forward in options.Forwards)
            {
                AddForward(forward);
            }
        }
        catch
        {
            Dispose();
            throw;
        }
    }

    /// <inheritdoc/>
    public ChannelWriter<NetworkPacket> FromGuest { get; }

    /// <inheritdoc/>
    public ChannelReader<NetworkPacket> ToGuest { get; }

    /// <inheritdoc/>
    public NetworkOffloads Accepts => NetworkOffloads.All;

    /// <summary>How many TCP connections there are.</summary>
    public int ConnectionCount
    {
        get
        {
            lock (_stack.Gate)
            {
                return _stack.Tcp.Count;
            }
        }
    }

    /// <summary>How many packets were thrown away because they contradicted themselves or there was no room.</summary>
    public long DroppedPackets
    {
        get
        {
            lock (_stack.Gate)
            {
                return _stack.Dropped;
            }
        }
    }

    internal NatStack Stack => _stack;

    /// <summary>Opens a port of the host that leads to a guest.</summary>
    /// <param name="forward">The port.</param>
    /// <returns>Where the host listens; tells which port a forward of port 0 got.</returns>
    /// <exception cref="KvmSharpException">The port cannot be had, or no guest can have that address.</exception>
    public IPEndPoint AddForward(PortForward forward)
    {
        ArgumentNullException.ThrowIfNull(forward);
        ObjectDisposedException.ThrowIf(_stack.IsDisposed, this);
        return _stack.Forwarder.Add(forward);
    }

    void INetworkBackend.Attach(TimeProvider clock) => _stack.Attach(clock);

    void INetworkBackend.Detach(TimeProvider clock) => _stack.Detach(clock);

    /// <summary>Closes all connections and ports. The guest finds the cable unplugged.</summary>
    public void Dispose() => _stack.Dispose();

    private sealed class Input(NatStack stack) : ChannelWriter<NetworkPacket>
    {
        public override bool TryWrite(NetworkPacket item)
        {
            if (stack.IsDisposed)
            {
                return false;
            }
            stack.Input(item);
            return true;
        }

        public override ValueTask<bool> WaitToWriteAsync(CancellationToken cancellationToken = default) => new(!stack.IsDisposed);
    }

    private sealed class Output(NatStack stack) : ChannelReader<NetworkPacket>
    {
        public override bool TryRead([MaybeNullWhen(false)] out NetworkPacket item) => stack.TryOutput(out item);

        public override ValueTask<bool> WaitToReadAsync(CancellationToken cancellationToken = default) => stack.WaitForOutputAsync(cancellationToken);
    }
}
