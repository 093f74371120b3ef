using System.Buffers.Binary;
using System.Net;
using System.Net.Sockets;

namespace KvmSharp.Networking.Nat;

/// <summary>All TCP connections of a user-mode network. Used under the network's lock.</summary>
internal sealed class TcpLayer(NatStack stack)
{
    private const ushort DnsPort = 53;
    private const int FirstPort = 49152; // RFC 6335, "dynamic ports"

    private readonly Dictionary<FlowKey, TcpConnection> _connections = [];
    private int _nextPort = FirstPort;

    public int Count => _connections.Count;

    /// <summary>The only connection there is; for tests.</summary>
    internal TcpConnection Single() => _connections.Values.Single();

    public void Input(in IpPacket packet, MacAddress mac)
    {
        if (!TcpSegment.TryParse(packet.Payload, out var segment))
        {
            stack.CountDrop();
            return;
        }
        var key = new FlowKey(packet.Source, segment.SourcePort, packet.Destination, segment.DestinationPort);
        if (_connections.TryGetValue(key, out var connection))
        {
            if (connection.State != TcpState.TimeWait || !segment.Has(TcpFlags.Syn) || segment.Has(TcpFlags.Ack | TcpFlags.Reset))
            {
                connection.OnSegment(segment, mac);
                return;
            }
            connection.Abort(false); // RFC 9293, "TIME-WAIT STATE": a new connection may begin
        }
        if (segment.Has(TcpFlags.Reset))
        {
            return;
        }
        if (!segment.Has(TcpFlags.Syn) || segment.Has(TcpFlags.Ack))
        {
            Refuse(key, mac, segment);
            return;
        }
        if (!MakeRoom() || Connect(key, mac, segment) is not { } created)
        {
            Refuse(key, mac, segment);
            return;
        }
        _connections[key] = created;
    }

    /// <summary>A program of the host wants to talk to a guest.</summary>
    /// <returns>False when there are too many connections; the socket is closed then.</returns>
    public bool Open(Socket socket, NetAddress guest, ushort port)
    {
        var remote = stack.Plan.Gateway(guest);
        if (!MakeRoom())
        {
            socket.Dispose();
            return false;
        }
        for (var tries = 0; tries <= 65536 - FirstPort; tries++)
        {
            var own = (ushort)_nextPort;
            _nextPort = _nextPort == ushort.MaxValue ? FirstPort : _nextPort + 1;
            var key = new FlowKey(guest, port, remote, own);
            if (!_connections.ContainsKey(key))
            {
                var connection = TcpConnection.Open(stack, this, key);
                connection.SetHost(new HostSocketStream(socket, connection));
                _connections[key] = connection;
                if (!stack.Neighbors.TryGet(guest, out _))
                {
                    stack.Neighbors.Ask(guest);
                }
                return true;
            }
        }
        socket.Dispose();
        return false;
    }

    public void OnNeighbor(NetAddress address)
    {
        foreach (var connection in _connections.Values)
        {
            if (connection.Key.Guest == address)
            {
                connection.OnNeighbor();
            }
        }
    }

    public void Remove(TcpConnection connection)
    {
        if (_connections.TryGetValue(connection.Key, out var known) && known == connection)
        {
            _connections.Remove(connection.Key);
        }
    }

    public long RunTimers(long now)
    {
        var next = long.MaxValue;
        List<TcpConnection>? due = null;
        foreach (var connection in _connections.Values)
        {
            if (connection.Deadline <= now)
            {
                (due ??= []).Add(connection);
            }
            else
            {
                next = Math.Min(next, connection.Deadline);
            }
        }
        foreach (var connection in due ?? [])
        {
            connection.RunTimer(now);
            next = Math.Min(next, connection.Deadline);
        }
        return next;
    }

    public void Clear()
    {
        foreach (var connection in _connections.Values.ToArray())
        {
            connection.Abort(false);
        }
    }

    /// <summary>RFC 9293, "Reset Generation".</summary>
    public void SendReset(FlowKey key, MacAddress mac, uint sequence, uint acknowledgment, bool acknowledges)
    {
        var packet = stack.Builder.CreateIp(
            mac, key.Remote, key.Guest, IpNumbers.Tcp, IpNumbers.TcpHeaderLength, new PacketOffload { ChecksumValid = true }, out var tcp);
        tcp.Clear();
        BinaryPrimitives.WriteUInt16BigEndian(tcp, key.RemotePort);
        BinaryPrimitives.WriteUInt16BigEndian(tcp[2..], key.GuestPort);
        BinaryPrimitives.WriteUInt32BigEndian(tcp[4..], sequence);
        BinaryPrimitives.WriteUInt32BigEndian(tcp[8..], acknowledgment);
        tcp[12] = IpNumbers.TcpHeaderLength / 4 << 4;
        tcp[13] = (byte)(TcpFlags.Reset | (acknowledges ? TcpFlags.Ack : 0));
        PacketBuilder.FillChecksum(key.Remote, key.Guest, IpNumbers.Tcp, tcp, 16);
        stack.Send(packet);
    }

    /// <summary>The host cannot reach it.</summary>
    public void SendUnreachable(FlowKey key, MacAddress mac)
    {
        Span<byte> tcp = stackalloc byte[8];
        BinaryPrimitives.WriteUInt16BigEndian(tcp, key.GuestPort);
        BinaryPrimitives.WriteUInt16BigEndian(tcp[2..], key.RemotePort);
        stack.Icmp.SendUnreachable(mac, key.Guest, key.Remote, IpNumbers.Tcp, tcp, UnreachableReason.Host);
    }

    private TcpConnection? Connect(FlowKey key, MacAddress mac, in TcpSegment syn)
    {
        if (stack.Plan.IsDns(key.Remote))
        {
            if (key.RemotePort != DnsPort)
            {
                return null;
            }
            var asking = TcpConnection.Accept(stack, this, key, mac, syn);
            var server = new DnsStream(stack.Dns, asking);
            asking.SetHost(server);
            server.Start();
            return asking;
        }
        if (stack.MapTarget(EgressProtocol.Tcp, key.Remote, key.RemotePort) is not { } address)
        {
            return null;
        }
        var connection = TcpConnection.Accept(stack, this, key, mac, syn);
        try
        {
            connection.SetHost(HostSocketStream.Connect(new IPEndPoint(address, key.RemotePort), connection));
            return connection;
        }
        catch (SocketException)
        {
            return null; // the host has no sockets left, or not of this family
        }
    }

    // A full table gives up connections that are over on one side first.
    private bool MakeRoom()
    {
        if (_connections.Count < stack.Options.MaxConnections)
        {
            return true;
        }
        var ended = _connections.Values.FirstOrDefault(c => c.State == TcpState.TimeWait)
            ?? _connections.Values.FirstOrDefault(c => c.State == TcpState.FinWait2);
        ended?.Abort(true);
        return ended is not null;
    }

    private void Refuse(FlowKey key, MacAddress mac, in TcpSegment segment)
    {
        if (segment.Has(TcpFlags.Ack))
        {
            SendReset(key, mac, segment.Acknowledgment, 0, false);
        }
        else
        {
            SendReset(key, mac, 0, segment.Sequence + segment.SequenceLength, true);
        }
    }
}
