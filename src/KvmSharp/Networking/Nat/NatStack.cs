using System.Buffers.Binary;
using System.Net;

namespace KvmSharp.Networking.Nat;

/// <summary>Something that makes packets for guests when one can be taken.</summary>
internal interface IPacketSource
{
    /// <summary>Whether it is in the queue of those that may have something; the stack's own.</summary>
    bool IsQueued { get; set; }

    /// <summary>Makes a packet.</summary>
    /// <param name="packet">The packet; null if it has been given to the stack already.</param>
    /// <returns>False if there is nothing at the moment.</returns>
    bool TryProduce(out NetworkPacket? packet);
}

/// <summary>
/// The other end of a guest's cable: takes its packets and makes those for it. Packets are made at the moment at which the
/// guest has room for them, so nothing piles up here. One lock guards everything; nothing that blocks happens under it.
/// </summary>
internal sealed class NatStack : IDisposable
{
    private const int MaxWaiting = 1024;
    private const int TimerStep = 10; // milliseconds: deadlines closer together are served at once

    private readonly Queue<NetworkPacket> _waiting = new();
    private readonly Queue<IPacketSource> _ready = new();
    private readonly FragmentTable _fragments = new();
    private TaskCompletionSource<bool>? _reader;
    private TimeProvider _clock = TimeProvider.System;
    private ITimer? _timer;
    private long _armed = long.MaxValue;

    public NatStack(UserNetworkOptions options)
    {
        Options = options;
        Plan = new AddressPlan(options.Network4, options.Network6);
        Builder = new PacketBuilder(Plan, options.Mtu);
        Budget = new BufferBudget(options.MaxBufferMemory);
        Policy = new EgressPolicy(options.Egress);
        Neighbors = new NeighborTable(this);
        Icmp = new Icmp(this);
        Tcp = new TcpLayer(this);
        Datagrams = new DatagramLayer(this);
        Dhcp = new DhcpServer(this);
        Dns = new DnsRelay(this);
        Forwarder = new PortForwarder(this);
    }

    public Lock Gate { get; } = new();

    public UserNetworkOptions Options { get; }

    public AddressPlan Plan { get; }

    public PacketBuilder Builder { get; }

    public BufferBudget Budget { get; }

    public EgressPolicy Policy { get; }

    public NeighborTable Neighbors { get; }

    public Icmp Icmp { get; }

    public TcpLayer Tcp { get; }

    public DatagramLayer Datagrams { get; }

    public DhcpServer Dhcp { get; }

    public DnsRelay Dns { get; }

    public PortForwarder Forwarder { get; }

    /// <summary>For one datagram on its way to the guest.</summary>
    public byte[] Scratch { get; } = new byte[65536 + 64];

    public bool IsDisposed { get; private set; }

    public long Dropped { get; private set; }

    public int FragmentCount => _fragments.Count;

    public int WaitingCount => _waiting.Count;

    /// <summary>The time in milliseconds of the guest's clock.</summary>
    public long Now => _clock.GetTimestamp() / (_clock.TimestampFrequency / 1000);

    /// <summary>A machine has been plugged in. What was said to one before means nothing to it.</summary>
    public void Attach(TimeProvider clock)
    {
        lock (Gate)
        {
            Forget();
            _timer?.Dispose();
            _timer = null;
            _armed = long.MaxValue;
            _clock = clock;
        }
    }

    /// <summary>The machine is gone.</summary>
    public void Detach(TimeProvider clock)
    {
        if (ReferenceEquals(clock, _clock))
        {
            Attach(TimeProvider.System);
        }
    }

    /// <summary>Takes a packet of a guest.</summary>
    public void Input(NetworkPacket packet)
    {
        TaskCompletionSource<bool>? reader;
        using (packet)
        {
            lock (Gate)
            {
                if (!IsDisposed)
                {
                    InputFrame(packet);
                }
                reader = TakeReader();
            }
        }
        reader?.TrySetResult(true);
    }

    /// <summary>Makes the next packet for a guest.</summary>
    public bool TryOutput(out NetworkPacket? packet)
    {
        lock (Gate)
        {
            while (true)
            {
                if (_waiting.TryDequeue(out packet))
                {
                    return true;
                }
                if (!_ready.TryDequeue(out var source))
                {
                    return false;
                }
                source.IsQueued = false;
                if (source.TryProduce(out packet))
                {
                    MakeReady(source);
                    if (packet is not null)
                    {
                        return true;
                    }
                }
            }
        }
    }

    /// <summary>Completes when a packet may be there; with false when none will ever be.</summary>
    public ValueTask<bool> WaitForOutputAsync(CancellationToken cancellationToken)
    {
        lock (Gate)
        {
            if (IsDisposed)
            {
                return new ValueTask<bool>(false);
            }
            if (_waiting.Count != 0 || _ready.Count != 0)
            {
                return new ValueTask<bool>(true);
            }
            _reader ??= new TaskCompletionSource<bool>(TaskCreationOptions.RunContinuationsAsynchronously);
            return new ValueTask<bool>(cancellationToken.CanBeCanceled ? _reader.Task.WaitAsync(cancellationToken) : _reader.Task);
        }
    }

    /// <summary>Does something under the lock, on behalf of the host. Callable from any thread.</summary>
    public void Enter(Action action)
    {
        TaskCompletionSource<bool>? reader;
        lock (Gate)
        {
            action();
            reader = TakeReader();
        }
        reader?.TrySetResult(true);
    }

    public void MakeReady(IPacketSource source)
    {
        if (!source.IsQueued)
        {
            source.IsQueued = true;
            _ready.Enqueue(source);
        }
    }

    /// <summary>Sends a packet that does not wait for its turn. A guest that takes none loses them.</summary>
    public void Send(NetworkPacket packet)
    {
        if (_waiting.Count >= MaxWaiting)
        {
            CountDrop();
            packet.Dispose();
            return;
        }
        _waiting.Enqueue(packet);
    }

    public void CountDrop() => Dropped++;

    public int MaxSegment(NetAddress guest) =>
        Options.Mtu - (guest.IsIp4 ? IpNumbers.Ip4HeaderLength : IpNumbers.Ip6HeaderLength) - IpNumbers.TcpHeaderLength;

    /// <summary>Timers are to be looked at by then.</summary>
    public void SetDeadline(long deadline)
    {
        deadline = (deadline + TimerStep - 1) / TimerStep * TimerStep;
        if (deadline >= _armed)
        {
            return;
        }
        _armed = deadline;
        try
        {
            _timer ??= _clock.CreateTimer(_ => Enter(RunTimers), null, Timeout.InfiniteTimeSpan, Timeout.InfiniteTimeSpan);
            _timer.Change(TimeSpan.FromMilliseconds(Math.Max(deadline - Now, 1)), Timeout.InfiniteTimeSpan);
        }
        catch (ObjectDisposedException)
        {
            _armed = long.MaxValue; // the machine has just gone; so does everything that had a deadline
        }
    }

    /// <summary>Where on the host a guest's packet goes, or null if it may not.</summary>
    public IPAddress? MapTarget(EgressProtocol protocol, NetAddress target, int port)
    {
        if (!Policy.Permits(protocol, target, port, Now))
        {
            return null;
        }
        if (Plan.IsGateway(target))
        {
            return !Options.AllowHostLoopback ? null : target.IsIp4 ? IPAddress.Loopback : IPAddress.IPv6Loopback;
        }
        return target.IsOrdinary && !Plan.IsInside(target) ? target.ToIPAddress() : null;
    }

    public void Dispose()
    {
        TaskCompletionSource<bool>? reader;
        lock (Gate)
        {
            if (IsDisposed)
            {
                return;
            }
            IsDisposed = true;
            Forget();
            Forwarder.Dispose();
            Dns.Dispose();
            _timer?.Dispose();
            reader = _reader;
            _reader = null;
        }
        reader?.TrySetResult(false);
    }

    private void Forget()
    {
        Tcp.Clear();
        Datagrams.Clear();
        Forwarder.Clear();
        Neighbors.Clear();
        Dhcp.Clear();
        Icmp.Clear();
        Policy.Clear();
        _fragments.Clear();
        _ready.Clear();
        while (_waiting.TryDequeue(out var packet))
        {
            packet.Dispose();
        }
    }

    private TaskCompletionSource<bool>? TakeReader()
    {
        if (_reader is null || (_waiting.Count == 0 && _ready.Count == 0))
        {
            return null;
        }
        var reader = _reader;
        _reader = null;
        return reader;
    }

    private void RunTimers()
    {
        _armed = long.MaxValue;
        if (IsDisposed)
        {
            return;
        }
        var now = Now;
        var next = Math.Min(Math.Min(Tcp.RunTimers(now), Datagrams.RunTimers(now)), Math.Min(_fragments.RunTimers(now), Icmp.RunTimers(now)));
        if (next != long.MaxValue)
        {
            SetDeadline(next);
        }
    }

    private void InputFrame(NetworkPacket packet)
    {
        ReadOnlySpan<byte> frame = packet.Data;
        if (frame.Length < NetworkPacket.HeaderLength)
        {
            CountDrop();
            return;
        }
        var target = new MacAddress(frame[..MacAddress.Length]);
        var mac = new MacAddress(frame.Slice(MacAddress.Length, MacAddress.Length));
        if ((target != Plan.Mac && !target.IsMulticast) || mac.IsMulticast || mac == Plan.Mac)
        {
            return; // for somebody else on the same switch
        }
        var content = frame[NetworkPacket.HeaderLength..];
        switch (BinaryPrimitives.ReadUInt16BigEndian(frame[12..]))
        {
            case IpNumbers.EtherTypeArp:
                Neighbors.InputArp(content);
                break;
            case IpNumbers.EtherTypeIp4 when IpPacket.TryParse4(content, out var packet4):
                InputIp(packet4, mac, packet.Offload);
                break;
            case IpNumbers.EtherTypeIp6 when Plan.HasIp6 && IpPacket.TryParse6(content, out var packet6):
                InputIp(packet6, mac, packet.Offload);
                break;
            default:
                CountDrop();
                break;
        }
    }

    private void InputIp(in IpPacket packet, MacAddress mac, PacketOffload offload)
    {
        // Nobody but the guests sends here; the unspecified address is that of one that has none yet.
        if (!Plan.IsGuest(packet.Source) && !packet.Source.IsUnspecified)
        {
            CountDrop();
            return;
        }
        if (packet.IsFragment)
        {
            if (_fragments.Add(packet, Now) is { } whole)
            {
                InputTransport(new IpPacket
                {
                    Source = packet.Source,
                    Destination = packet.Destination,
                    Protocol = packet.Protocol,
                    HopLimit = packet.HopLimit,
                    Payload = whole,
                    Raw = packet.Raw,
                }, mac, default);
            }
            else if (_fragments.Count != 0)
            {
                SetDeadline(Now + FragmentTable.Lifetime);
            }
            return;
        }
        InputTransport(packet, mac, offload);
    }

    private void InputTransport(in IpPacket packet, MacAddress mac, PacketOffload offload)
    {
        var isSummed = offload.NeedsChecksum || offload.ChecksumValid;
        switch (packet.Protocol)
        {
            case IpNumbers.Tcp when isSummed || packet.HasValidChecksum():
                if (Plan.IsGuest(packet.Source) && !packet.Source.IsLinkLocal && !packet.Destination.IsMulticast)
                {
                    Neighbors.Learn(packet.Source, mac);
                    Tcp.Input(packet, mac);
                }
                break;
            case IpNumbers.Udp when isSummed || HasNoUdpSum(packet) || packet.HasValidChecksum():
                Neighbors.Learn(packet.Source, mac);
                Datagrams.InputUdp(packet, mac);
                break;
            case IpNumbers.Icmp4 when packet.Source.IsIp4 && PacketFinisher.Fold(PacketFinisher.Sum(packet.Payload)) == 0xffff:
            case IpNumbers.Icmp6 when !packet.Source.IsIp4 && packet.HasValidChecksum():
                Icmp.Input(packet, mac);
                break;
            default:
                CountDrop();
                break;
        }
    }

    // RFC 768: over IPv4 a checksum of zero is none.
    private static bool HasNoUdpSum(in IpPacket packet) =>
        packet.Source.IsIp4 && packet.Payload.Length >= IpNumbers.UdpHeaderLength && BinaryPrimitives.ReadUInt16BigEndian(packet.Payload[6..]) == 0;
}
