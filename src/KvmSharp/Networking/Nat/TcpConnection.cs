using System.Net.Sockets;
using System.Security.Cryptography;

namespace KvmSharp.Networking.Nat;

/// <summary>RFC 9293, "State Machine Overview"; the first one waits for the host before it answers the guest.</summary>
internal enum TcpState
{
    Connecting,
    SynSent,
    SynReceived,
    Established,
    FinWait1,
    FinWait2,
    CloseWait,
    Closing,
    LastAck,
    TimeWait,
    Closed,
}

/// <summary>
/// One TCP connection: towards the guest the whole protocol, towards the host a stream. Bytes are taken from one side only as
/// the other has room for them. Specification: RFC 9293; RFC 7323, "Window Scale Option"; RFC 6298 (retransmission timer);
/// RFC 5681 (congestion control); RFC 5961 (segments that are not the guest's). Used under the network's lock.
/// </summary>
internal sealed partial class TcpConnection : IPacketSource, IHostStreamEvents
{
    private const int SendMaximum = 1 << 20;
    private const int ReceiveMaximum = 256 << 10;
    private const int ReceiveScale = 3; // the least with which the whole window can be told
    private const int MinMss = 64;
    private const int LongestPacket = 65535;

    private const long ConnectLimit = 75_000;
    private const long TimeWaitLength = 10_000; // twice the lifetime of a segment on a cable that has no length
    private const long InitialTimeout = 1000;
    private const long MinTimeout = 200;
    private const long MaxTimeout = 60_000;
    private const int MaxRetries = 12;
    private const int MaxSynRetries = 6;

    private readonly NatStack _stack;
    private readonly TcpLayer _layer;
    private readonly ByteRing _send; // from the first byte not yet acknowledged
    private readonly ByteRing _receive; // for the host, from the first byte it has not taken
    private readonly ReceiveGaps _early = new();
    private IHostStream? _host;
    private TcpState _state;

    // Towards the guest (RFC 9293, "Key Connection State Variables").
    private uint _sendUnacknowledged;
    private uint _sendNext;
    private uint _sendMax; // the furthest ever sent; the next one goes back for a retransmission
    private uint _sendWindow;
    private uint _windowSequence;
    private uint _windowAcknowledgment;
    private int _sendScale;
    private int _mss;
    private bool _hostReadable;
    private bool _hostEnded;
    private bool _synWanted;
    private bool _resend;

    // From the guest.
    private uint _receiveNext;
    private uint _receiveEdge; // the right edge of the window as told
    private int _receiveScale;
    private bool _ackWanted;
    private bool _hostWritable = true;
    private bool _guestEnded;
    private uint? _earlyFin;
    private bool _shutdownDone;

    // Timers and congestion.
    private long _timer = long.MaxValue;
    private bool _probing;
    private int _retries;
    private long _timeout = InitialTimeout;
    private double _roundTrip = -1;
    private double _variation;
    private long _measureStart = -1;
    private uint _measureEnd;
    private long _congestionWindow;
    private long _threshold = long.MaxValue;
    private int _duplicates;

    private TcpConnection(NatStack stack, TcpLayer layer, FlowKey key, MacAddress mac, TcpState state)
    {
        _stack = stack;
        _layer = layer;
        Key = key;
        GuestMac = mac;
        _state = state;
        _send = new ByteRing(stack.Budget, SendMaximum);
        _receive = new ByteRing(stack.Budget, ReceiveMaximum);
        _sendUnacknowledged = _sendNext = _sendMax = (uint)RandomNumberGenerator.GetInt32(int.MaxValue) * 2;
        _mss = _stack.MaxSegment(key.Guest);
        _congestionWindow = 10L * _mss; // RFC 6928
    }

    public FlowKey Key { get; }

    public MacAddress GuestMac { get; private set; }

    public TcpState State => _state;

    public bool IsQueued { get; set; }

    public long Deadline => _timer;

    private uint InFlight => _sendNext - _sendUnacknowledged;

    private bool FinSent => InFlight > (uint)_send.Length;

    /// <summary>The guest has asked for a connection; the host side is still to be reached.</summary>
    public static TcpConnection Accept(NatStack stack, TcpLayer layer, FlowKey key, MacAddress mac, in TcpSegment syn)
    {
        var connection = new TcpConnection(stack, layer, key, mac, TcpState.Connecting);
        connection.TakeSyn(syn);
        connection.SetTimer(ConnectLimit);
        return connection;
    }

    /// <summary>A program of the host has connected to a forwarded port.</summary>
    public static TcpConnection Open(NatStack stack, TcpLayer layer, FlowKey key)
    {
        var connection = new TcpConnection(stack, layer, key, default, TcpState.SynSent) { _receiveScale = ReceiveScale };
        connection.SetTimer(InitialTimeout);
        connection.OnNeighbor();
        return connection;
    }

    public void SetHost(IHostStream host) => _host = host;

    /// <summary>The guest's Ethernet address may have become known.</summary>
    public void OnNeighbor()
    {
        if (_state == TcpState.SynSent && _stack.Neighbors.TryGet(Key.Guest, out var mac))
        {
            GuestMac = mac;
            _synWanted = true;
            _stack.MakeReady(this);
        }
    }

    public void OnConnected(SocketError error) => _stack.Enter(() => Connected(error));

    public void OnReadable() => _stack.Enter(() =>
    {
        _hostReadable = true;
        _stack.MakeReady(this);
    });

    public void OnWritable() => _stack.Enter(() =>
    {
        _hostWritable = true;
        PassOn();
        _stack.MakeReady(this);
    });

    /// <summary>Ends at once. The guest is told unless it said so itself or is gone.</summary>
    public void Abort(bool tellGuest)
    {
        if (_state == TcpState.Closed)
        {
            return;
        }
        if (tellGuest && _state is not (TcpState.TimeWait or TcpState.SynSent))
        {
            _layer.SendReset(Key, GuestMac, _state == TcpState.Connecting ? 0 : _sendNext, _receiveNext, true);
        }
        _host?.Abort();
        Remove();
    }

    public void RunTimer(long now)
    {
        if (_timer > now)
        {
            return;
        }
        _timer = long.MaxValue;
        switch (_state)
        {
            case TcpState.Connecting:
                Abort(true);
                break;
            case TcpState.TimeWait when _receive.Length != 0:
                SetTimer(TimeWaitLength); // the host has not taken everything yet
                break;
            case TcpState.TimeWait:
                Remove();
                break;
            case TcpState.SynSent or TcpState.SynReceived:
                if (++_retries > MaxSynRetries)
                {
                    Abort(true);
                    break;
                }
                _timeout = Math.Min(_timeout * 2, MaxTimeout);
                _synWanted = _state == TcpState.SynReceived;
                OnNeighbor();
                if (_state == TcpState.SynSent && !_synWanted)
                {
                    _stack.Neighbors.Ask(Key.Guest);
                }
                SetTimer(_timeout);
                _stack.MakeReady(this);
                break;
            default:
                Retry();
                break;
        }
    }

    private void Connected(SocketError error)
    {
        if (_state != TcpState.Connecting)
        {
            return;
        }
        if (error == SocketError.Success)
        {
            _state = TcpState.SynReceived;
            _synWanted = true;
            _timeout = InitialTimeout;
            SetTimer(_timeout);
            _stack.MakeReady(this);
        }
        else if (error is SocketError.NetworkUnreachable or SocketError.HostUnreachable or SocketError.NetworkDown or SocketError.HostDown)
        {
            _layer.SendUnreachable(Key, GuestMac);
            Remove();
        }
        else
        {
            Abort(true);
        }
    }

    private void TakeSyn(in TcpSegment syn)
    {
        var (mss, scale) = syn.ReadSynOptions(Key.Guest.IsIp4 ? 536 : 1220);
        _mss = Math.Clamp(mss, MinMss, _mss);
        _sendScale = scale ?? 0;
        _receiveScale = scale is null ? 0 : ReceiveScale;
        _receiveNext = _receiveEdge = syn.Sequence + 1;
        _sendWindow = syn.Window; // in a SYN without its scale
        _windowSequence = syn.Sequence;
        _congestionWindow = 10L * _mss;
    }

    private void Remove()
    {
        _state = TcpState.Closed;
        _timer = long.MaxValue;
        _send.Dispose();
        _receive.Dispose();
        _early.Clear();
        _host?.Dispose();
        _layer.Remove(this);
    }

    private void SetTimer(long milliseconds)
    {
        _timer = _stack.Now + milliseconds;
        _stack.SetDeadline(_timer);
    }

    private static bool Before(uint a, uint b) => (int)(a - b) < 0;

    private static bool After(uint a, uint b) => (int)(a - b) > 0;
}
