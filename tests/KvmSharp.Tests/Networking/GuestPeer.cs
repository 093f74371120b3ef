using System.Buffers.Binary;
using System.Net;
using System.Net.Sockets;
using KvmSharp.Networking;
using KvmSharp.Networking.Nat;
using KvmSharp.Tests.Devices;

namespace KvmSharp.Tests.Networking;

/// <summary>A guest in the test: it makes frames, gives them to a user-mode network, and looks at what comes back.</summary>
internal sealed class GuestPeer : IDisposable
{
    public static readonly NetAddress Own4 = NetAddress.From(IPAddress.Parse("10.0.2.15"));
    public static readonly NetAddress Gateway4 = NetAddress.From(IPAddress.Parse("10.0.2.2"));
    public static readonly NetAddress Dns4 = NetAddress.From(IPAddress.Parse("10.0.2.3"));
    public static readonly NetAddress Own6 = NetAddress.From(IPAddress.Parse("fd00:6b76:6d73::15"));
    public static readonly NetAddress Gateway6 = NetAddress.From(IPAddress.Parse("fd00:6b76:6d73::2"));
    public static readonly MacAddress Mac = new([0x52, 0x54, 0, 0x12, 0x34, 0x56]);
    private static readonly TimeSpan Limit = TimeSpan.FromSeconds(60);

    public GuestPeer(UserNetworkOptions? options = null)
    {
        Network = new UserNetwork(options);
        ((INetworkBackend)Network).Attach(Clock.Clock);
    }

    public UserNetwork Network { get; }

    public ManualClock Clock { get; } = new();

    public static MacAddress RouterMac { get; } = new([0x52, 0x55, 10, 0, 2, 2]);

    /// <summary>Says who it is, so that forwarded packets find it.</summary>
    public void Announce() => Send(Arp(1, Own4, Own4));

    public void Send(byte[] frame, PacketOffload offload = default) => Assert.True(Network.FromGuest.TryWrite(NetworkPacket.Create(frame, offload)));

    public static byte[] Frame(ushort type, ReadOnlySpan<byte> content, MacAddress? to = null)
    {
        var frame = new byte[14 + content.Length];
        (to ?? RouterMac).CopyTo(frame);
        Mac.CopyTo(frame.AsSpan(6));
        BinaryPrimitives.WriteUInt16BigEndian(frame.AsSpan(12), type);
        content.CopyTo(frame.AsSpan(14));
        return frame;
    }

    public static byte[] Ip(NetAddress source, NetAddress destination, byte protocol, ReadOnlySpan<byte> payload, MacAddress? to = null, byte hops = 64)
    {
        var header = source.IsIp4 ? 20 : 40;
        var packet = new byte[header + payload.Length];
        PacketBuilder.WriteHeader(packet, source, destination, protocol, payload.Length);
        packet[source.IsIp4 ? 8 : 7] = hops;
        if (source.IsIp4)
        {
            BinaryPrimitives.WriteUInt16BigEndian(packet.AsSpan(10), 0);
            BinaryPrimitives.WriteUInt16BigEndian(packet.AsSpan(10), (ushort)~PacketFinisher.Fold(PacketFinisher.Sum(packet.AsSpan(0, 20))));
        }
        payload.CopyTo(packet.AsSpan(header));
        return Frame(source.IsIp4 ? IpNumbers.EtherTypeIp4 : IpNumbers.EtherTypeIp6, packet, to);
    }

    public static byte[] Udp(NetAddress source, ushort sourcePort, NetAddress destination, ushort port, ReadOnlySpan<byte> data, MacAddress? to = null)
    {
        var udp = new byte[8 + data.Length];
        BinaryPrimitives.WriteUInt16BigEndian(udp, sourcePort);
        BinaryPrimitives.WriteUInt16BigEndian(udp.AsSpan(2), port);
        BinaryPrimitives.WriteUInt16BigEndian(udp.AsSpan(4), (ushort)udp.Length);
        data.CopyTo(udp.AsSpan(8));
        PacketBuilder.FillChecksum(source, destination, IpNumbers.Udp, udp, 6);
        return Ip(source, destination, IpNumbers.Udp, udp, to);
    }

    public static byte[] Echo(NetAddress source, NetAddress destination, ushort id, ReadOnlySpan<byte> data)
    {
        var icmp = new byte[8 + data.Length];
        icmp[0] = source.IsIp4 ? (byte)8 : (byte)128;
        BinaryPrimitives.WriteUInt16BigEndian(icmp.AsSpan(4), id);
        icmp[7] = 1;
        data.CopyTo(icmp.AsSpan(8));
        return Icmp(source, destination, icmp);
    }

    public static byte[] Icmp(NetAddress source, NetAddress destination, byte[] icmp, MacAddress? to = null, byte hops = 64)
    {
        if (source.IsIp4)
        {
            BinaryPrimitives.WriteUInt16BigEndian(icmp.AsSpan(2), (ushort)~PacketFinisher.Fold(PacketFinisher.Sum(icmp)));
        }
        else
        {
            PacketBuilder.FillChecksum(source, destination, IpNumbers.Icmp6, icmp, 2);
        }
        return Ip(source, destination, source.IsIp4 ? IpNumbers.Icmp4 : IpNumbers.Icmp6, icmp, to, hops);
    }

    public static byte[] Arp(ushort operation, NetAddress sender, NetAddress target)
    {
        var arp = new byte[28];
        BinaryPrimitives.WriteUInt64BigEndian(arp, 0x0001_0800_0604_0000UL | operation);
        Mac.CopyTo(arp.AsSpan(8));
        sender.CopyTo(arp.AsSpan(14));
        target.CopyTo(arp.AsSpan(24));
        return Frame(IpNumbers.EtherTypeArp, arp, MacAddress.Broadcast);
    }

    /// <summary>Cuts an IPv4 or IPv6 frame into fragments.</summary>
    public static List<byte[]> Fragment(byte[] frame, int step, ushort id = 7)
    {
        var isIp4 = frame[14] >> 4 == 4;
        var header = isIp4 ? 20 : 40;
        ReadOnlySpan<byte> payload = frame.AsSpan(14 + header);
        var fragments = new List<byte[]>();
        for (var at = 0; at < payload.Length; at += step)
        {
            var count = Math.Min(step, payload.Length - at);
            var more = at + count < payload.Length;
            if (isIp4)
            {
                byte[] packet = [.. frame.AsSpan(14, 20), .. payload.Slice(at, count)];
                BinaryPrimitives.WriteUInt16BigEndian(packet.AsSpan(2), (ushort)packet.Length);
                BinaryPrimitives.WriteUInt16BigEndian(packet.AsSpan(4), id);
                BinaryPrimitives.WriteUInt16BigEndian(packet.AsSpan(6), (ushort)((more ? 0x2000 : 0) | at / 8));
                BinaryPrimitives.WriteUInt16BigEndian(packet.AsSpan(10), 0);
                BinaryPrimitives.WriteUInt16BigEndian(packet.AsSpan(10), (ushort)~PacketFinisher.Fold(PacketFinisher.Sum(packet.AsSpan(0, 20))));
                fragments.Add(Frame(IpNumbers.EtherTypeIp4, packet));
            }
            else
            {
                byte[] packet = [.. frame.AsSpan(14, 40), frame[20], 0, 0, 0, 0, 0, 0, 0, .. payload.Slice(at, count)];
                packet[6] = IpNumbers.Fragment;
                BinaryPrimitives.WriteUInt16BigEndian(packet.AsSpan(4), (ushort)(8 + count));
                BinaryPrimitives.WriteUInt16BigEndian(packet.AsSpan(42), (ushort)(at | (more ? 1 : 0)));
                BinaryPrimitives.WriteUInt32BigEndian(packet.AsSpan(44), id);
                fragments.Add(Frame(IpNumbers.EtherTypeIp6, packet));
            }
        }
        return fragments;
    }

    /// <summary>The next frame that fits; frames before it are passed over. Checks that each is well-formed.</summary>
    public async Task<byte[]> ReceiveAsync(Func<byte[], bool>? fits = null)
    {
        using var limit = new CancellationTokenSource(Limit);
        while (true)
        {
            if (TryReceive() is { } frame)
            {
                if (fits is null || fits(frame))
                {
                    return frame;
                }
                continue;
            }
            Assert.True(await Network.ToGuest.WaitToReadAsync(limit.Token));
        }
    }

    /// <summary>What is there now, or null.</summary>
    public byte[]? TryReceive()
    {
        if (!Network.ToGuest.TryRead(out var packet))
        {
            return null;
        }
        byte[]? frame = null;
        using (packet)
        {
            frame = packet.Data.ToArray();
            if (packet.Offload.NeedsChecksum)
            {
                Assert.True(PacketFinisher.TryFillChecksum(frame, packet.Offload.ChecksumStart, packet.Offload.ChecksumOffset));
            }
        }
        Check(frame);
        return frame;
    }

    public void ExpectNothing()
    {
        var frame = TryReceive();
        Assert.True(frame is null, frame is null ? "" : Convert.ToHexString(frame));
    }

    public async Task<(byte Type, byte Code, byte[] Message)> ReceiveIcmpAsync()
    {
        var frame = await ReceiveAsync(f => IsIp(f, out var p) && p is IpNumbers.Icmp4 or IpNumbers.Icmp6);
        var message = frame[(frame[14] >> 4 == 4 ? 34 : 54)..];
        return (message[0], message[1], message);
    }

    public async Task<byte[]> ReceiveUdpAsync(ushort port)
    {
        var frame = await ReceiveAsync(f => IsIp(f, out var p) && p == IpNumbers.Udp && BinaryPrimitives.ReadUInt16BigEndian(f.AsSpan(f[14] >> 4 == 4 ? 36 : 56)) == port);
        return frame[(frame[14] >> 4 == 4 ? 42 : 62)..];
    }

    public static bool IsIp(byte[] frame, out byte protocol)
    {
        var type = BinaryPrimitives.ReadUInt16BigEndian(frame.AsSpan(12));
        protocol = type == IpNumbers.EtherTypeIp4 ? frame[23] : type == IpNumbers.EtherTypeIp6 ? frame[20] : (byte)0;
        return type is IpNumbers.EtherTypeIp4 or IpNumbers.EtherTypeIp6;
    }

    public void Dispose() => Network.Dispose();

    private static void Check(byte[] frame)
    {
        if (!IsIp(frame, out _))
        {
            return;
        }
        Assert.True(frame[14] >> 4 == 4 ? IpPacket.TryParse4(frame.AsSpan(14), out var packet) : IpPacket.TryParse6(frame.AsSpan(14), out packet));
        Assert.True(packet.IsFragment || (packet.Protocol == IpNumbers.Icmp4
            ? PacketFinisher.Fold(PacketFinisher.Sum(packet.Payload)) == 0xffff : packet.HasValidChecksum()));
    }
}

/// <summary>A socket of the host on its loopback, for guests to reach.</summary>
internal static class Loopback
{
    public static Socket Listen(IPAddress? address = null, int backlog = 10)
    {
        var socket = new Socket((address ?? IPAddress.Loopback).AddressFamily, SocketType.Stream, ProtocolType.Tcp);
        socket.Bind(new IPEndPoint(address ?? IPAddress.Loopback, 0));
        socket.Listen(backlog);
        return socket;
    }

    public static Socket Udp(IPAddress? address = null)
    {
        var socket = new Socket((address ?? IPAddress.Loopback).AddressFamily, SocketType.Dgram, ProtocolType.Udp) { ReceiveTimeout = 60_000 };
        socket.Bind(new IPEndPoint(address ?? IPAddress.Loopback, 0));
        return socket;
    }

    public static ushort Port(this Socket socket) => (ushort)((IPEndPoint)socket.LocalEndPoint!).Port;

    public static async Task<Socket> AcceptSoonAsync(this Socket socket)
    {
        var accepted = await socket.AcceptAsync().WaitAsync(TimeSpan.FromSeconds(60));
        accepted.ReceiveTimeout = accepted.SendTimeout = 60_000;
        return accepted;
    }
}

internal sealed record PeerSegment(uint Sequence, uint Acknowledgment, TcpFlags Flags, int Window, byte[] Payload, byte[] Options);

/// <summary>A guest's end of a TCP connection; the test says what it sends and when.</summary>
internal sealed class PeerTcp(GuestPeer peer, NetAddress own, NetAddress remote, ushort port, ushort remotePort)
{
    private uint _start;

    public uint Next { get; set; } = 1000;

    public uint Expected { get; set; }

    public int Window { get; set; } = 65535;

    public int RemoteScale { get; private set; }

    public static async Task<PeerTcp> ConnectAsync(
        GuestPeer peer, ushort remotePort, bool ip6 = false, ushort port = 40000, int? scale = 0, ushort mss = 1460, NetAddress? remote = null)
    {
        var tcp = new PeerTcp(
            peer, ip6 ? GuestPeer.Own6 : GuestPeer.Own4, remote ?? (ip6 ? GuestPeer.Gateway6 : GuestPeer.Gateway4), port, remotePort);
        tcp.SendSyn(scale, mss);
        await tcp.FinishHandshakeAsync();
        return tcp;
    }

    public void SendSyn(int? scale = 0, ushort mss = 1460)
    {
        _start = Next;
        var options = new byte[8];
        var length = TcpSegment.WriteSynOptions(options, mss, scale);
        Send(TcpFlags.Syn, [], Next, options[..length]);
        Next++;
    }

    public async Task FinishHandshakeAsync()
    {
        var answer = await ReceiveAsync();
        Assert.Equal(TcpFlags.Syn | TcpFlags.Ack, answer.Flags);
        Assert.Equal(_start + 1, answer.Acknowledgment);
        RemoteScale = answer.Options.Length >= 8 ? answer.Options[7] : 0;
        Expected = answer.Sequence + 1;
        Acknowledge();
    }

    public void Acknowledge() => Send(TcpFlags.Ack, []);

    public void SendData(ReadOnlySpan<byte> data, TcpFlags more = 0)
    {
        Send(TcpFlags.Ack | TcpFlags.Push | more, data);
        Next += (uint)data.Length + ((more & TcpFlags.Fin) != 0 ? 1u : 0);
    }

    public void Send(TcpFlags flags, ReadOnlySpan<byte> data, uint? sequence = null, ReadOnlySpan<byte> options = default)
    {
        var tcp = new byte[20 + options.Length + data.Length];
        BinaryPrimitives.WriteUInt16BigEndian(tcp, port);
        BinaryPrimitives.WriteUInt16BigEndian(tcp.AsSpan(2), remotePort);
        BinaryPrimitives.WriteUInt32BigEndian(tcp.AsSpan(4), sequence ?? Next);
        BinaryPrimitives.WriteUInt32BigEndian(tcp.AsSpan(8), (flags & TcpFlags.Ack) != 0 ? Expected : 0);
        tcp[12] = (byte)((20 + options.Length) / 4 << 4);
        tcp[13] = (byte)flags;
        BinaryPrimitives.WriteUInt16BigEndian(tcp.AsSpan(14), (ushort)Window);
        options.CopyTo(tcp.AsSpan(20));
        data.CopyTo(tcp.AsSpan(20 + options.Length));
        PacketBuilder.FillChecksum(own, remote, IpNumbers.Tcp, tcp, 16);
        peer.Send(GuestPeer.Ip(own, remote, IpNumbers.Tcp, tcp));
    }

    public async Task<PeerSegment> ReceiveAsync(Func<PeerSegment, bool>? fits = null)
    {
        while (true)
        {
            var segment = Parse(await peer.ReceiveAsync(f => Parse(f) is not null))!;
            if (fits is null || fits(segment))
            {
                return segment;
            }
        }
    }

    public PeerSegment? TryReceive()
    {
        while (peer.TryReceive() is { } frame)
        {
            if (Parse(frame) is { } segment)
            {
                return segment;
            }
        }
        return null;
    }

    /// <summary>Receives bytes in order and acknowledges them.</summary>
    public async Task<byte[]> ReadAsync(int count)
    {
        var data = new List<byte>();
        while (data.Count < count)
        {
            var segment = await ReceiveAsync(s => s.Payload.Length > 0);
            Assert.Equal(Expected, segment.Sequence);
            data.AddRange(segment.Payload);
            Expected += (uint)segment.Payload.Length;
            Acknowledge();
        }
        return [.. data];
    }

    private PeerSegment? Parse(byte[] frame)
    {
        if (!GuestPeer.IsIp(frame, out var protocol) || protocol != IpNumbers.Tcp)
        {
            return null;
        }
        var data = frame.AsSpan(frame[14] >> 4 == 4 ? 34 : 54);
        return TcpSegment.TryParse(data, out var s) && s.DestinationPort == port && s.SourcePort == remotePort
            ? new PeerSegment(s.Sequence, s.Acknowledgment, s.Flags, s.Window, s.Payload.ToArray(), s.Options.ToArray()) : null;
    }
}
