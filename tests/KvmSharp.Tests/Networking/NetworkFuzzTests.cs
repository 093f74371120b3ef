using System.Buffers.Binary;
using System.Net;
using KvmSharp.Networking;
using KvmSharp.Networking.Nat;

namespace KvmSharp.Tests.Networking;

/// <summary>Whatever a guest sends: no exception, no growth (of the whole process, hence alone), and the network works afterwards.</summary>
[Collection("alone")]
public sealed class NetworkFuzzTests
{
    private const int Packets = 150_000;

    [Theory]
    [InlineData(1)]
    [InlineData(2)]
    public async Task MutatedPacketsDoNoHarm(int seed)
    {
        using var listener = Loopback.Listen(backlog: 200);
        using var listener6 = Loopback.Listen(IPAddress.IPv6Loopback, 200);
        using var udp = Loopback.Udp();
        // Nothing leaves the host, and only these ports are reached.
        EgressRule[] egress =
        [
            EgressRule.Parse($"tcp:10.0.2.2:{listener.Port()}"), EgressRule.Parse($"tcp:[fd00:6b76:6d73::2]:{listener6.Port()}"),
            EgressRule.Parse($"udp:10.0.2.2:{udp.Port()}"), new EgressRule { Name = "*.test" },
        ];
        using var peer = new GuestPeer(new UserNetworkOptions
        {
            Egress = egress,
            MaxConnections = 50,
            MaxDatagramFlows = 20,
            DnsResolver = new Fixed(),
        });
        peer.Network.AddForward(new PortForward(0, 22));
        peer.Network.AddForward(new PortForward(0, 53) { Protocol = ForwardProtocol.Udp });
        var established = await PeerTcp.ConnectAsync(peer, listener.Port());
        using var host = await listener.AcceptSoonAsync();
        var templates = Templates(listener.Port(), listener6.Port(), udp.Port(), established);
        var random = new Random(seed);
        long before = 0;
        for (var i = 0; i < Packets; i++)
        {
            var frame = (byte[])templates[random.Next(templates.Length)].Clone();
            Mutate(frame, random, out var length);
            var offload = random.Next(4) != 0 ? default : new PacketOffload
            {
                NeedsChecksum = true,
                ChecksumStart = (ushort)random.Next(200),
                ChecksumOffset = (ushort)random.Next(40),
                Segmentation = random.Next(2) == 0 ? PacketSegmentation.None : PacketSegmentation.Tcp4,
                SegmentSize = (ushort)random.Next(2000),
            };
            peer.Send(frame[..length], offload);
            if (random.Next(8) == 0)
            {
                while (peer.TryReceive() is not null)
                {
                }
            }
            if (i % 1000 == 0)
            {
                peer.Clock.Advance(TimeSpan.FromSeconds(random.Next(20)));
                while (listener.Poll(0, System.Net.Sockets.SelectMode.SelectRead))
                {
                    listener.Accept().Dispose();
                }
                while (listener6.Poll(0, System.Net.Sockets.SelectMode.SelectRead))
                {
                    listener6.Accept().Dispose();
                }
            }
            if (i == Packets / 5)
            {
                before = GC.GetTotalMemory(true);
            }
        }
        var stack = peer.Network.Stack;
        Assert.InRange(stack.Tcp.Count, 0, 50);
        Assert.InRange(stack.Datagrams.Count, 0, 20);
        Assert.InRange(stack.FragmentCount, 0, 32);
        Assert.InRange(stack.Neighbors.Count, 0, 256);
        Assert.InRange(stack.WaitingCount, 0, 1024);
        Assert.InRange(stack.Budget.Used, 0, 64L << 20);
        Assert.InRange(GC.GetTotalMemory(true) - before, long.MinValue, 16 << 20);
        while (peer.TryReceive() is not null)
        {
        }
        for (var i = 0; stack.Tcp.Count >= 50 && i < 60; i++)
        {
            peer.Clock.Advance(TimeSpan.FromMinutes(1)); // unfinished ones are given up
            while (peer.TryReceive() is not null)
            {
            }
        }
        peer.Send(GuestPeer.Echo(GuestPeer.Own4, GuestPeer.Gateway4, 9, [1, 2, 3]));
        Assert.Equal(0, (await peer.ReceiveIcmpAsync()).Type);
        stack.Tcp.Clear();
        var last = await PeerTcp.ConnectAsync(peer, listener.Port(), port: 3);
        last.SendData("alive"u8);
        await last.ReceiveAsync(s => s.Acknowledgment == last.Next);
    }

    private static byte[][] Templates(ushort port, ushort port6, ushort udpPort, PeerTcp established)
    {
        static byte[] Tcp(NetAddress own, NetAddress remote, ushort from, ushort to, uint sequence, uint acknowledgment, TcpFlags flags, int length, byte[] options)
        {
            var tcp = new byte[20 + options.Length + length];
            BinaryPrimitives.WriteUInt16BigEndian(tcp, from);
            BinaryPrimitives.WriteUInt16BigEndian(tcp.AsSpan(2), to);
            BinaryPrimitives.WriteUInt32BigEndian(tcp.AsSpan(4), sequence);
            BinaryPrimitives.WriteUInt32BigEndian(tcp.AsSpan(8), acknowledgment);
            tcp[12] = (byte)((20 + options.Length) / 4 << 4);
            tcp[13] = (byte)flags;
            tcp[14] = 0x40;
            options.CopyTo(tcp.AsSpan(20));
            PacketBuilder.FillChecksum(own, remote, IpNumbers.Tcp, tcp, 16);
            return GuestPeer.Ip(own, remote, IpNumbers.Tcp, tcp);
        }
        byte[] synOptions = [2, 4, 5, 0xb4, 1, 3, 3, 7];
        var dhcp = new byte[300];
        dhcp[0] = dhcp[1] = 1;
        dhcp[2] = 6;
        ((byte[])[0x63, 0x82, 0x53, 0x63, 53, 1, 3, 50, 4, 10, 0, 2, 15, 255]).CopyTo(dhcp, 236);
        GuestPeer.Mac.CopyTo(dhcp.AsSpan(28));
        var large = GuestPeer.Fragment(GuestPeer.Udp(GuestPeer.Own4, 900, GuestPeer.Gateway4, udpPort, new byte[3000]), 1400);
        var large6 = GuestPeer.Fragment(GuestPeer.Echo(GuestPeer.Own6, GuestPeer.Gateway6, 3, new byte[3000]), 1400);
        byte[] solicitation = [135, 0, 0, 0, 0, 0, 0, 0, .. GuestPeer.Gateway6.ToIPAddress().GetAddressBytes()];
        return
        [
            GuestPeer.Arp(1, GuestPeer.Own4, GuestPeer.Gateway4),
            GuestPeer.Arp(2, GuestPeer.Own4, GuestPeer.Gateway4),
            GuestPeer.Echo(GuestPeer.Own4, GuestPeer.Gateway4, 1, new byte[40]),
            GuestPeer.Echo(GuestPeer.Own6, GuestPeer.Gateway6, 1, new byte[40]),
            GuestPeer.Udp(GuestPeer.Own4, 900, GuestPeer.Gateway4, udpPort, new byte[60]),
            GuestPeer.Udp(GuestPeer.Own4, 901, GuestPeer.Dns4, 53, EgressAndDnsTests.Query("www.test", 1)),
            GuestPeer.Udp(NetAddress.FromIp4(0), 68, NetAddress.FromIp4(uint.MaxValue), 67, dhcp, MacAddress.Broadcast),
            GuestPeer.Icmp(GuestPeer.Own6, GuestPeer.Gateway6, solicitation, null, 255),
            GuestPeer.Icmp(GuestPeer.Own6, GuestPeer.Gateway6, [133, 0, 0, 0, 0, 0, 0, 0], null, 255),
            .. large, .. large6,
            Tcp(GuestPeer.Own4, GuestPeer.Gateway4, 1000, port, 5, 0, TcpFlags.Syn, 0, synOptions),
            Tcp(GuestPeer.Own6, GuestPeer.Gateway6, 1000, port6, 5, 0, TcpFlags.Syn, 0, synOptions),
            Tcp(GuestPeer.Own4, GuestPeer.Dns4, 1001, 53, 5, 0, TcpFlags.Syn, 0, synOptions),
            Tcp(GuestPeer.Own4, GuestPeer.Gateway4, 1000, port, 6, 7, TcpFlags.Ack, 100, []),
            Tcp(GuestPeer.Own4, GuestPeer.Gateway4, 40000, port, established.Next, established.Expected, TcpFlags.Ack, 500, []),
            Tcp(GuestPeer.Own4, GuestPeer.Gateway4, 40000, port, established.Next + 2000, established.Expected, TcpFlags.Ack, 500, []),
            Tcp(GuestPeer.Own4, GuestPeer.Gateway4, 40000, port, established.Next + 9000, established.Expected, TcpFlags.Ack | TcpFlags.Fin, 100, []),
        ];
    }

    // Changes some bytes; half of the time the checksums of IPv4 and of what is in it are made right again.
    private static void Mutate(byte[] frame, Random random, out int length)
    {
        length = random.Next(4) == 0 ? random.Next(frame.Length + 1) : frame.Length;
        for (var n = random.Next(6); n > 0; n--)
        {
            var at = random.Next(3) == 0 ? random.Next(frame.Length) : random.Next(Math.Min(frame.Length, 14 + 60));
            frame[at] = random.Next(3) switch { 0 => (byte)random.Next(256), 1 => (byte)(frame[at] ^ (1 << random.Next(8))), _ => (byte)(random.Next(2) * 255) };
        }
        if (random.Next(2) == 0 || length < 14 + 40 || frame.Length < 14 + 40)
        {
            return;
        }
        var ip = frame.AsSpan(14, length - 14);
        if (ip[0] == 0x45)
        {
            BinaryPrimitives.WriteUInt16BigEndian(ip[10..], 0);
            BinaryPrimitives.WriteUInt16BigEndian(ip[10..], (ushort)~PacketFinisher.Fold(PacketFinisher.Sum(ip[..20])));
        }
        if (IpPacket.TryParse4(ip, out var packet) || IpPacket.TryParse6(ip, out packet))
        {
            var payload = ip.Slice(packet.Raw.Length - packet.Payload.Length, packet.Payload.Length);
            var sumAt = packet.Protocol switch { IpNumbers.Tcp => 16, IpNumbers.Udp => 6, IpNumbers.Icmp6 => 2, _ => -1 };
            if (sumAt >= 0 && payload.Length >= sumAt + 2)
            {
                PacketBuilder.FillChecksum(packet.Source, packet.Destination, packet.Protocol, payload, sumAt);
            }
        }
    }

    private sealed class Fixed : IDnsResolver
    {
        public ValueTask<byte[]?> ResolveAsync(ReadOnlyMemory<byte> query, bool overStream, CancellationToken cancellationToken) =>
            new(DnsMessage.CreateAnswer(query.Span, [IPAddress.Parse("127.0.0.1")]));
    }
}
