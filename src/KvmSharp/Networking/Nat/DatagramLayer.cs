using System.Buffers.Binary;
using System.Net;
using System.Net.Sockets;

namespace KvmSharp.Networking.Nat;

/// <summary>
/// UDP and echo requests of guests: a connected socket of the host for each pair of ends, so that only the right host can
/// answer. Used under the network's lock.
/// </summary>
internal sealed class DatagramLayer(NatStack stack)
{
    public const int LongestUdp = 65507;
    private const ushort DnsPort = 53;
    private const ushort DhcpServerPort = 67;
    private const ushort DhcpClientPort = 68;

    private readonly Dictionary<(byte Protocol, FlowKey Key), DatagramFlow> _flows = [];

    public int Count => _flows.Count;

    public void InputUdp(in IpPacket packet, MacAddress mac)
    {
        var datagram = packet.Payload;
        if (datagram.Length < IpNumbers.UdpHeaderLength)
        {
            stack.CountDrop();
            return;
        }
        var sourcePort = BinaryPrimitives.ReadUInt16BigEndian(datagram);
        var port = BinaryPrimitives.ReadUInt16BigEndian(datagram[2..]);
        int length = BinaryPrimitives.ReadUInt16BigEndian(datagram[4..]);
        if (length < IpNumbers.UdpHeaderLength || length > datagram.Length || port == 0)
        {
            stack.CountDrop();
            return;
        }
        var payload = datagram[IpNumbers.UdpHeaderLength..length];
        if (packet.Source.IsIp4 && port == DhcpServerPort && sourcePort == DhcpClientPort)
        {
            stack.Dhcp.Input(payload, mac);
            return;
        }
        if (!stack.Plan.IsGuest(packet.Source) || packet.Destination.IsMulticast || packet.Destination == stack.Plan.Broadcast4)
        {
            return;
        }
        var key = new FlowKey(packet.Source, sourcePort, packet.Destination, port);
        if (stack.Plan.IsDns(packet.Destination))
        {
            if (port == DnsPort)
            {
                stack.Dns.AskByUdp(key, mac, payload);
            }
            else
            {
                Unreachable(packet, mac, UnreachableReason.Port);
            }
            return;
        }
        if (stack.Forwarder.TryAnswer(key, payload))
        {
            return;
        }
        if (stack.MapTarget(EgressProtocol.Udp, packet.Destination, port) is not { } address)
        {
            Unreachable(packet, mac, UnreachableReason.Prohibited);
            return;
        }
        if (Find(IpNumbers.Udp, key, mac, new IPEndPoint(address, port)) is not { } flow)
        {
            Unreachable(packet, mac, UnreachableReason.Host);
            return;
        }
        flow.Send(payload);
    }

    /// <summary>An echo request to another host, through an ICMP socket without privileges if the host allows those.</summary>
    public void Echo(in IpPacket packet, MacAddress mac)
    {
        if (!stack.Plan.IsGuest(packet.Source) || stack.MapTarget(EgressProtocol.Icmp, packet.Destination, 0) is not { } address)
        {
            return;
        }
        var key = new FlowKey(packet.Source, BinaryPrimitives.ReadUInt16BigEndian(packet.Payload[4..]), packet.Destination, 0);
        if (Find(packet.Protocol, key, mac, new IPEndPoint(address, 0)) is { } flow)
        {
            flow.Send(packet.Payload);
        }
        else
        {
            stack.Icmp.SendUnreachable(mac, packet.Source, packet.Destination, packet.Protocol, packet.Payload, UnreachableReason.Prohibited);
        }
    }

    /// <summary>Sends a datagram to a guest. The payload lies in the scratch buffer behind room for the header.</summary>
    public void SendUdp(MacAddress mac, FlowKey key, int length)
    {
        var datagram = stack.Scratch.AsSpan(0, IpNumbers.UdpHeaderLength + length);
        BinaryPrimitives.WriteUInt16BigEndian(datagram, key.RemotePort);
        BinaryPrimitives.WriteUInt16BigEndian(datagram[2..], key.GuestPort);
        BinaryPrimitives.WriteUInt16BigEndian(datagram[4..], (ushort)datagram.Length);
        PacketBuilder.FillChecksum(key.Remote, key.Guest, IpNumbers.Udp, datagram, 6);
        stack.Builder.SendDatagram(mac, key.Remote, key.Guest, IpNumbers.Udp, datagram, stack.Send);
    }

    public void Remove(DatagramFlow flow) => _flows.Remove((flow.Protocol, flow.Key));

    public long RunTimers(long now)
    {
        var next = long.MaxValue;
        foreach (var flow in _flows.Values)
        {
            if (flow.Deadline <= now)
            {
                flow.Close();
            }
            else
            {
                next = Math.Min(next, flow.Deadline);
            }
        }
        return next;
    }

    public void Clear()
    {
        foreach (var flow in _flows.Values)
        {
            flow.Close();
        }
    }

    private void Unreachable(in IpPacket packet, MacAddress mac, UnreachableReason reason) =>
        stack.Icmp.SendUnreachable(mac, packet.Source, packet.Destination, packet.Protocol, packet.Payload, reason);

    private DatagramFlow? Find(byte protocol, FlowKey key, MacAddress mac, IPEndPoint target)
    {
        if (_flows.TryGetValue((protocol, key), out var flow))
        {
            flow.GuestMac = mac;
            return flow;
        }
        if (_flows.Count >= stack.Options.MaxDatagramFlows)
        {
            _flows.Values.MinBy(f => f.Deadline)!.Close();
        }
        try
        {
            flow = new DatagramFlow(stack, protocol, key, mac, target);
        }
        catch (SocketException)
        {
            return null; // not reachable, no socket left, or echo not allowed
        }
        _flows[(protocol, key)] = flow;
        return flow;
    }
}

/// <summary>One pair of ends of UDP, or one series of echo requests.</summary>
internal sealed class DatagramFlow : IPacketSource
{
    private const long Lifetime = 120_000; // RFC 4787, REQ-5: two minutes at least

    private readonly NatStack _stack;
    private readonly Socket _socket;
    private readonly SocketAsyncEventArgs _waiting = new();
    private bool _waits;
    private bool _closed;

    public DatagramFlow(NatStack stack, byte protocol, FlowKey key, MacAddress mac, IPEndPoint target)
    {
        _stack = stack;
        Protocol = protocol;
        Key = key;
        GuestMac = mac;
        _socket = protocol == IpNumbers.Udp
            ? new Socket(target.AddressFamily, SocketType.Dgram, ProtocolType.Udp)
            : new Socket(target.AddressFamily, SocketType.Dgram, key.Guest.IsIp4 ? ProtocolType.Icmp : ProtocolType.IcmpV6);
        try
        {
            _socket.Blocking = false;
            _socket.Connect(target); // of a datagram socket: takes note of the address only
        }
        catch
        {
            _socket.Dispose();
            throw;
        }
        _waiting.SetBuffer(Memory<byte>.Empty);
        _waiting.Completed += (_, e) => OnReady(e.SocketError);
        stack.MakeReady(this);
    }

    public byte Protocol { get; }

    public FlowKey Key { get; }

    public MacAddress GuestMac { get; set; }

    public bool IsQueued { get; set; }

    public long Deadline { get; private set; }

    public void Send(ReadOnlySpan<byte> payload)
    {
        Deadline = _stack.Now + Lifetime;
        _stack.SetDeadline(Deadline);
        _socket.Send(payload, SocketFlags.None, out var error);
        if (error == SocketError.ConnectionRefused)
        {
            // That was the answer to an earlier one.
            Refused();
            _socket.Send(payload, SocketFlags.None, out error);
        }
        if (error != SocketError.Success)
        {
            _stack.CountDrop();
        }
    }

    public bool TryProduce(out NetworkPacket? packet)
    {
        packet = null;
        if (_closed || _waits)
        {
            return false;
        }
        var isUdp = Protocol == IpNumbers.Udp;
        var start = isUdp ? IpNumbers.UdpHeaderLength : 0;
        var count = _socket.Receive(_stack.Scratch.AsSpan(start, DatagramLayer.LongestUdp), SocketFlags.None, out var error);
        switch (error)
        {
            case SocketError.Success when isUdp:
                _stack.Datagrams.SendUdp(GuestMac, Key, count);
                return true;
            case SocketError.Success:
                var message = _stack.Scratch.AsSpan(0, count);
                if (Icmp.IsEchoReply(message, Key.Guest.IsIp4))
                {
                    // The host's socket has its own identifier.
                    BinaryPrimitives.WriteUInt16BigEndian(message[4..], Key.GuestPort);
                    _stack.Icmp.SendEchoReply(GuestMac, Key.Remote, Key.Guest, message);
                }
                return true;
            case SocketError.WouldBlock:
                Wait();
                return false;
            case SocketError.ConnectionRefused:
                Refused();
                return true;
            default:
                Close();
                return false;
        }
    }

    public void Close()
    {
        if (!_closed)
        {
            _closed = true;
            _stack.Datagrams.Remove(this);
            _socket.Dispose();
        }
    }

    private void Wait()
    {
        _waits = true;
        if (!_socket.ReceiveAsync(_waiting))
        {
            var error = _waiting.SocketError;
            ThreadPool.UnsafeQueueUserWorkItem(_ => OnReady(error), null);
        }
    }

    private void OnReady(SocketError error) => _stack.Enter(() =>
    {
        _waits = false;
        if (_closed)
        {
            _waiting.Dispose();
            return;
        }
        if (error == SocketError.ConnectionRefused)
        {
            Refused(); // waiting has taken the error away
        }
        _stack.MakeReady(this);
    });

    private void Refused()
    {
        Span<byte> udp = stackalloc byte[IpNumbers.UdpHeaderLength];
        BinaryPrimitives.WriteUInt16BigEndian(udp, Key.GuestPort);
        BinaryPrimitives.WriteUInt16BigEndian(udp[2..], Key.RemotePort);
        BinaryPrimitives.WriteUInt16BigEndian(udp[4..], IpNumbers.UdpHeaderLength);
        udp[6..].Clear();
        _stack.Icmp.SendUnreachable(GuestMac, Key.Guest, Key.Remote, Protocol, udp, UnreachableReason.Port);
    }
}
