using System.Buffers.Binary;
using System.Net;
using System.Net.Sockets;
using System.Text;
using KvmSharp.Networking;
using KvmSharp.Networking.Nat;

namespace KvmSharp.Tests.Networking;

/// <summary>Addresses, ICMP, UDP, DHCP and forwarded ports of the user-mode network.</summary>
public sealed class UserNetworkTests
{
    [Fact]
    public async Task ArpIsAnsweredForOwnAddressesOnly()
    {
        using var peer = new GuestPeer();
        foreach (var own in new[] { GuestPeer.Gateway4, GuestPeer.Dns4 })
        {
            peer.Send(GuestPeer.Arp(1, GuestPeer.Own4, own));
            var answer = await peer.ReceiveAsync();
            Assert.Equal(GuestPeer.Mac, new MacAddress(answer.AsSpan(0, 6)));
            Assert.Equal(2, answer[21]);
            Assert.Equal(own, NetAddress.Read(answer.AsSpan(28, 4)));
            Assert.Equal(GuestPeer.RouterMac, new MacAddress(answer.AsSpan(22, 6)));
        }
        peer.Send(GuestPeer.Arp(1, GuestPeer.Own4, NetAddress.From(IPAddress.Parse("10.0.2.77"))));
        peer.ExpectNothing();
    }

    [Theory]
    [InlineData(false, 10)]
    [InlineData(true, 10)]
    [InlineData(false, 9000)]
    [InlineData(true, 9000)]
    public async Task GatewayAnswersEchoRequests(bool ip6, int length)
    {
        using var peer = new GuestPeer();
        var data = Enumerable.Range(0, length).Select(i => (byte)i).ToArray();
        var frame = ip6 ? GuestPeer.Echo(GuestPeer.Own6, GuestPeer.Gateway6, 77, data) : GuestPeer.Echo(GuestPeer.Own4, GuestPeer.Gateway4, 77, data);
        if (length < 1000)
        {
            peer.Send(frame);
            var (type, _, message) = await peer.ReceiveIcmpAsync();
            Assert.Equal(ip6 ? 129 : 0, type);
            Assert.Equal(data, message[8..]);
            return;
        }
        // In fragments, in any order, one of them twice; and back in fragments.
        var fragments = GuestPeer.Fragment(frame, 1400);
        fragments.Add(fragments[2]);
        foreach (var fragment in fragments.AsEnumerable().Reverse())
        {
            peer.Send(fragment);
        }
        var whole = new byte[8 + length];
        var received = 0;
        while (received < whole.Length)
        {
            var part = await peer.ReceiveAsync();
            Assert.InRange(part.Length, 0, 1514);
            var at = ip6 ? BinaryPrimitives.ReadUInt16BigEndian(part.AsSpan(56)) & ~7 : (BinaryPrimitives.ReadUInt16BigEndian(part.AsSpan(20)) & 0x1fff) * 8;
            var payload = part.AsSpan(ip6 ? 62 : 34);
            payload.CopyTo(whole.AsSpan(at));
            received += payload.Length;
        }
        Assert.Equal(data, whole[8..]);
        Assert.Equal(0, peer.Network.Stack.FragmentCount);
    }

    [Fact]
    public void FragmentsThatOverlapOrNeverEndAreForgotten()
    {
        using var peer = new GuestPeer();
        var fragments = GuestPeer.Fragment(GuestPeer.Echo(GuestPeer.Own4, GuestPeer.Gateway4, 1, new byte[4000]), 1400);
        var shifted = GuestPeer.Fragment(GuestPeer.Echo(GuestPeer.Own4, GuestPeer.Gateway4, 1, new byte[4000]), 1000);
        peer.Send(fragments[0]);
        Assert.Equal(1, peer.Network.Stack.FragmentCount);
        peer.Send(shifted[1]);
        Assert.Equal(0, peer.Network.Stack.FragmentCount);
        for (ushort id = 0; id < 500; id++)
        {
            peer.Send(GuestPeer.Fragment(GuestPeer.Echo(GuestPeer.Own4, GuestPeer.Gateway4, 1, new byte[4000]), 1400, id)[0]);
        }
        Assert.Equal(32, peer.Network.Stack.FragmentCount);
        peer.Clock.Advance(TimeSpan.FromSeconds(31));
        Assert.Equal(0, peer.Network.Stack.FragmentCount);
        peer.ExpectNothing();
    }

    [Fact]
    public async Task NeighborsAndRoutersAreFound()
    {
        using var peer = new GuestPeer();
        var local = NetAddress.From(IPAddress.Parse("fe80::15"));
        var all = NetAddress.From(IPAddress.Parse("ff02::2"));
        peer.Send(GuestPeer.Icmp(local, all, [133, 0, 0, 0, 0, 0, 0, 0], new MacAddress([0x33, 0x33, 0, 0, 0, 2]), 255));
        var (type, _, router) = await peer.ReceiveIcmpAsync();
        Assert.Equal(134, type);
        Assert.True(BinaryPrimitives.ReadUInt16BigEndian(router.AsSpan(6)) > 0);
        var options = new Dictionary<byte, byte[]>();
        for (var at = 16; at < router.Length; at += router[at + 1] * 8)
        {
            options[router[at]] = router[at..(at + router[at + 1] * 8)];
        }
        Assert.Equal(GuestPeer.RouterMac, new MacAddress(options[1].AsSpan(2)));
        Assert.Equal(64, options[3][2]);
        Assert.Equal("fd00:6b76:6d73::", new IPAddress(options[3].AsSpan(16)).ToString());
        Assert.Equal("fd00:6b76:6d73::3", new IPAddress(options[25].AsSpan(8)).ToString());

        byte[] solicitation = [135, 0, 0, 0, 0, 0, 0, 0, .. GuestPeer.Gateway6.ToIPAddress().GetAddressBytes()];
        peer.Send(GuestPeer.Icmp(GuestPeer.Own6, NetAddress.From(IPAddress.Parse("ff02::1:ff00:2")), solicitation, new MacAddress([0x33, 0x33, 0xff, 0, 0, 2]), 255));
        var (answer, _, advertisement) = await peer.ReceiveIcmpAsync();
        Assert.Equal(136, answer);
        Assert.Equal(GuestPeer.RouterMac, new MacAddress(advertisement.AsSpan(26)));
        // From beyond a router such a message cannot come.
        peer.Send(GuestPeer.Icmp(GuestPeer.Own6, GuestPeer.Gateway6, solicitation, null, 254));
        peer.ExpectNothing();
        // Advertisements go on by themselves.
        peer.Clock.Advance(TimeSpan.FromMinutes(11));
        Assert.Equal(134, (await peer.ReceiveIcmpAsync()).Type);
    }

    [Fact]
    public async Task NetworkWithoutIp6IsSilentThere()
    {
        using var peer = new GuestPeer(new UserNetworkOptions { Network6 = null });
        peer.Send(GuestPeer.Echo(GuestPeer.Own6, GuestPeer.Gateway6, 1, [1]));
        peer.ExpectNothing();
        peer.Send(GuestPeer.Echo(GuestPeer.Own4, GuestPeer.Gateway4, 1, [1]));
        await peer.ReceiveIcmpAsync();
    }

    [Theory]
    [InlineData(false)]
    [InlineData(true)]
    public async Task DatagramsGoBothWays(bool ip6)
    {
        using var server = Loopback.Udp(ip6 ? IPAddress.IPv6Loopback : IPAddress.Loopback);
        using var peer = new GuestPeer();
        var (own, gateway) = ip6 ? (GuestPeer.Own6, GuestPeer.Gateway6) : (GuestPeer.Own4, GuestPeer.Gateway4);
        peer.Send(GuestPeer.Udp(own, 5000, gateway, server.Port(), "hello"u8));
        var buffer = new byte[65536];
        EndPoint sender = new IPEndPoint(ip6 ? IPAddress.IPv6Any : IPAddress.Any, 0);
        var count = server.ReceiveFrom(buffer, ref sender);
        Assert.Equal("hello", Encoding.ASCII.GetString(buffer, 0, count));
        server.SendTo("back"u8.ToArray(), sender);
        Assert.Equal("back", Encoding.ASCII.GetString(await peer.ReceiveUdpAsync(5000)));
        server.SendTo([], sender);
        Assert.Empty(await peer.ReceiveUdpAsync(5000));

        // Longer than the wire takes, both ways.
        var large = Enumerable.Range(0, 30000).Select(i => (byte)(i * 7)).ToArray();
        foreach (var fragment in GuestPeer.Fragment(GuestPeer.Udp(own, 5000, gateway, server.Port(), large), 1400))
        {
            peer.Send(fragment);
        }
        Assert.Equal(large, buffer[..server.ReceiveFrom(buffer, ref sender)]);
        server.SendTo(large, sender);
        var got = 0;
        while (got < large.Length + 8)
        {
            got += (await peer.ReceiveAsync()).Length - (ip6 ? 62 : 34);
        }
        Assert.Equal(large.Length + 8, got);
        Assert.Equal(1, peer.Network.Stack.Datagrams.Count);
        peer.Clock.Advance(TimeSpan.FromMinutes(3));
        Assert.Equal(0, peer.Network.Stack.Datagrams.Count);
    }

    [Fact]
    public async Task ClosedDatagramPortsAreTold()
    {
        ushort port;
        using (var closed = Loopback.Udp())
        {
            port = closed.Port();
        }
        using var peer = new GuestPeer();
        peer.Send(GuestPeer.Udp(GuestPeer.Own4, 5000, GuestPeer.Gateway4, port, "hello"u8));
        var (type, code, message) = await peer.ReceiveIcmpAsync();
        Assert.Equal((3, 3), (type, code));
        Assert.Equal(port, BinaryPrimitives.ReadUInt16BigEndian(message.AsSpan(8 + 20 + 2)));
        peer.Send(GuestPeer.Udp(GuestPeer.Own4, 5000, GuestPeer.Dns4, 54, "hello"u8));
        peer.Clock.Advance(TimeSpan.FromSeconds(1));
        peer.Send(GuestPeer.Udp(GuestPeer.Own4, 5000, GuestPeer.Dns4, 54, "hello"u8));
        Assert.Equal((3, 3), ((await peer.ReceiveIcmpAsync()) is var (t, c, _)) ? (t, c) : default);
    }

    [Fact]
    public void FlowsAreBounded()
    {
        using var server = Loopback.Udp();
        using var peer = new GuestPeer(new UserNetworkOptions { MaxDatagramFlows = 20 });
        for (ushort i = 0; i < 100; i++)
        {
            peer.Send(GuestPeer.Udp(GuestPeer.Own4, (ushort)(1000 + i), GuestPeer.Gateway4, server.Port(), [1]));
            Assert.InRange(peer.Network.Stack.Datagrams.Count, 1, 20);
        }
    }

    [Fact]
    public async Task DhcpGivesAndKeepsAddresses()
    {
        using var peer = new GuestPeer(new UserNetworkOptions { DomainName = "example.test" });
        var offer = await DhcpAsync(peer, 1, 1);
        Assert.Equal((2, "10.0.2.15"), (offer.Type, offer.Address));
        Assert.Equal("10.0.2.2", new IPAddress(offer.Options[3]).ToString());
        Assert.Equal("10.0.2.3", new IPAddress(offer.Options[6]).ToString());
        Assert.Equal("255.255.255.0", new IPAddress(offer.Options[1]).ToString());
        Assert.Equal([5, 220], offer.Options[26]);
        Assert.Equal("example.test", Encoding.ASCII.GetString(offer.Options[15]));
        Assert.Equal(86400u, BinaryPrimitives.ReadUInt32BigEndian(offer.Options[51]));
        var ack = await DhcpAsync(peer, 1, 3, "10.0.2.15");
        Assert.Equal((5, "10.0.2.15"), (ack.Type, ack.Address));
        Assert.Equal("10.0.2.16", (await DhcpAsync(peer, 2, 1)).Address);
        Assert.Equal("10.0.2.15", (await DhcpAsync(peer, 1, 1)).Address);
        Assert.Equal(6, (await DhcpAsync(peer, 2, 3, "10.0.2.15")).Type); // somebody else's
        Assert.Equal(6, (await DhcpAsync(peer, 2, 3, "192.168.1.1")).Type);
        Assert.Equal("10.0.2.40", (await DhcpAsync(peer, 3, 3, "10.0.2.40")).Address); // known from before
        Assert.True(peer.Network.Stack.Neighbors.TryGet(NetAddress.From(IPAddress.Parse("10.0.2.40")), out _));
        // More cards than addresses.
        for (var card = 10; card < 700; card++)
        {
            Assert.Equal(2, (await DhcpAsync(peer, card, 1)).Type);
        }
        Assert.Equal(240, peer.Network.Stack.Dhcp.LeaseCount);
    }

    [Fact]
    public async Task ForwardedPortsLeadToTheGuest()
    {
        using var peer = new GuestPeer();
        var end = peer.Network.AddForward(new PortForward(0, 22));
        Assert.True(IPAddress.IsLoopback(end.Address));
        using var client = new Socket(AddressFamily.InterNetwork, SocketType.Stream, ProtocolType.Tcp) { ReceiveTimeout = 60_000 };
        await client.ConnectAsync(end);
        // The guest is not known yet: it is asked for.
        var question = await peer.ReceiveAsync();
        Assert.Equal(IpNumbers.EtherTypeArp, BinaryPrimitives.ReadUInt16BigEndian(question.AsSpan(12)));
        peer.Send(GuestPeer.Arp(2, GuestPeer.Own4, GuestPeer.Gateway4));
        var syn = await peer.ReceiveAsync(f => GuestPeer.IsIp(f, out var p) && p == IpNumbers.Tcp);
        var from = BinaryPrimitives.ReadUInt16BigEndian(syn.AsSpan(34));
        Assert.Equal(22, BinaryPrimitives.ReadUInt16BigEndian(syn.AsSpan(36)));
        var guest = new PeerTcp(peer, GuestPeer.Own4, GuestPeer.Gateway4, 22, from) { Expected = BinaryPrimitives.ReadUInt32BigEndian(syn.AsSpan(38)) + 1 };
        guest.Send(TcpFlags.Syn | TcpFlags.Ack, [], guest.Next, [2, 4, 5, 0xb4]);
        guest.Next++;
        Assert.Equal(TcpFlags.Ack, (await guest.ReceiveAsync()).Flags);
        guest.SendData("SSH-2.0"u8);
        var buffer = new byte[100];
        Assert.Equal(7, client.Receive(buffer));
        client.Send("hello"u8);
        Assert.Equal("hello", Encoding.ASCII.GetString(await guest.ReadAsync(5)));
        client.Close();
        Assert.True((await guest.ReceiveAsync(s => s.Flags.HasFlag(TcpFlags.Fin))).Flags.HasFlag(TcpFlags.Fin));

        // Nobody listens there: the caller is cut off.
        using var second = new Socket(AddressFamily.InterNetwork, SocketType.Stream, ProtocolType.Tcp) { ReceiveTimeout = 60_000 };
        await second.ConnectAsync(end);
        var again = await peer.ReceiveAsync(f => GuestPeer.IsIp(f, out var p) && p == IpNumbers.Tcp && f[47] == (byte)TcpFlags.Syn);
        var refusing = new PeerTcp(peer, GuestPeer.Own4, GuestPeer.Gateway4, 22, BinaryPrimitives.ReadUInt16BigEndian(again.AsSpan(34)))
        {
            Expected = BinaryPrimitives.ReadUInt32BigEndian(again.AsSpan(38)) + 1,
        };
        refusing.Send(TcpFlags.Reset | TcpFlags.Ack, [], 0);
        Assert.Equal(SocketError.ConnectionReset, Assert.Throws<SocketException>(() => second.Receive(buffer)).SocketErrorCode);
    }

    [Fact]
    public async Task ForwardedDatagramsAreAnsweredToTheirSender()
    {
        using var peer = new GuestPeer();
        peer.Announce();
        var end = peer.Network.AddForward(new PortForward(0, 53) { Protocol = ForwardProtocol.Udp });
        using var first = Loopback.Udp();
        using var second = Loopback.Udp();
        var ports = new List<ushort>();
        foreach (var socket in new[] { first, second })
        {
            socket.SendTo("question"u8.ToArray(), end);
            var frame = await peer.ReceiveAsync(f => GuestPeer.IsIp(f, out var p) && p == IpNumbers.Udp);
            Assert.Equal("question", Encoding.ASCII.GetString(frame.AsSpan(42)));
            ports.Add(BinaryPrimitives.ReadUInt16BigEndian(frame.AsSpan(34)));
        }
        Assert.NotEqual(ports[0], ports[1]);
        peer.Send(GuestPeer.Udp(GuestPeer.Own4, 53, GuestPeer.Gateway4, ports[1], "two"u8));
        peer.Send(GuestPeer.Udp(GuestPeer.Own4, 53, GuestPeer.Gateway4, ports[0], "one"u8));
        var buffer = new byte[100];
        Assert.Equal("one", Encoding.ASCII.GetString(buffer, 0, first.Receive(buffer)));
        Assert.Equal("two", Encoding.ASCII.GetString(buffer, 0, second.Receive(buffer)));
    }

    [Fact]
    public void PortsThatCannotBeHadAreRefused()
    {
        using var taken = Loopback.Listen();
        var exception = Assert.Throws<KvmSharpException>(() => new UserNetwork(new UserNetworkOptions { Forwards = [new PortForward(taken.Port(), 22)] }));
        Assert.Equal(KvmSharpErrorCode.AlreadyExists, exception.ErrorCode);
        using var network = new UserNetwork();
        Assert.Throws<KvmSharpException>(() => network.AddForward(new PortForward(0, 22) { GuestAddress = IPAddress.Parse("192.168.1.1") }));
        Assert.Throws<KvmSharpException>(() => network.AddForward(new PortForward(0, 0)));
        Assert.Throws<KvmSharpException>(() => new UserNetwork(new UserNetworkOptions { Mtu = 500 }));
        Assert.Throws<KvmSharpException>(() => new UserNetwork(new UserNetworkOptions { Network4 = IPNetwork.Parse("10.0.0.0/30") }));
        Assert.Throws<KvmSharpException>(() => new UserNetwork(new UserNetworkOptions { Network4 = IPNetwork.Parse("127.0.0.0/24") }));
        Assert.Throws<KvmSharpException>(() => new UserNetwork(new UserNetworkOptions { Network6 = IPNetwork.Parse("fd00::/48") }));
    }

    [Fact]
    public async Task AnotherMachineStartsAfresh()
    {
        using var listener = Loopback.Listen();
        using var peer = new GuestPeer();
        await PeerTcp.ConnectAsync(peer, listener.Port());
        using var accepted = await listener.AcceptSoonAsync();
        await DhcpAsync(peer, 1, 1);
        var backend = (INetworkBackend)peer.Network;
        backend.Attach(new KvmSharp.Tests.Devices.ManualClock().Clock);
        Assert.Equal(0, peer.Network.ConnectionCount);
        Assert.Equal(0, peer.Network.Stack.Dhcp.LeaseCount);
        Assert.Equal(SocketError.ConnectionReset, Assert.Throws<SocketException>(() => accepted.Receive(new byte[1])).SocketErrorCode);
        backend.Detach(peer.Clock.Clock); // of the one before
        peer.Network.Dispose();
        Assert.False(await peer.Network.ToGuest.WaitToReadAsync());
        Assert.False(peer.Network.FromGuest.TryWrite(NetworkPacket.Create(new byte[60])));
    }

    [Fact]
    public void TextFormsAreRead()
    {
        Assert.Equal(new PortForward(2222, 22), PortForward.Parse("tcp::2222-:22"));
        var forward = PortForward.Parse("udp:[::1]:5353-10.0.2.15:53");
        Assert.Equal((ForwardProtocol.Udp, IPAddress.IPv6Loopback, IPAddress.Parse("10.0.2.15")), (forward.Protocol, forward.HostAddress, forward.GuestAddress));
        Assert.Equal(forward, PortForward.Parse(forward.ToString()));
        Assert.All(["", "tcp", "tcp:22-22", "icmp::1-:2", "tcp::1-:0", "tcp::70000-:1", "tcp:x:1-:1", "tcp::1"], t => Assert.Throws<FormatException>(() => PortForward.Parse(t)));
        Assert.Equal(new EgressRule { Protocols = EgressProtocol.Tcp, Name = "example.com", FirstPort = 443, LastPort = 443 }, EgressRule.Parse("tcp:example.com:443"));
        Assert.Equal(new EgressRule { Network = IPNetwork.Parse("192.0.2.0/24"), FirstPort = 5, LastPort = 10 }, EgressRule.Parse("192.0.2.0/24:5-10"));
        Assert.Equal(new EgressRule { Network = IPNetwork.Parse("2001:db8::1/128"), FirstPort = 80, LastPort = 80 }, EgressRule.Parse("[2001:db8::1]:80"));
        Assert.Equal(new EgressRule { Network = IPNetwork.Parse("2001:db8::/32") }, EgressRule.Parse("2001:db8::/32"));
        Assert.Equal(new EgressRule { Name = "*.example.com" }, EgressRule.Parse("*.example.com"));
        Assert.Equal(new EgressRule(), EgressRule.Parse("*"));
        Assert.All(["", "a:b:c", "tcp:", "example.com:", "1.2.3.4:99999", "1.2.3.4:9-1", "1.2.3.0/99", "[::1", "a..b", "a b"], t => Assert.Throws<FormatException>(() => EgressRule.Parse(t)));
    }

    private static async Task<(int Type, string Address, Dictionary<byte, byte[]> Options)> DhcpAsync(GuestPeer peer, int card, byte type, string? requested = null)
    {
        var message = new byte[300];
        message[0] = message[1] = 1;
        message[2] = 6;
        BinaryPrimitives.WriteUInt32BigEndian(message.AsSpan(4), (uint)card);
        message[28] = 2;
        BinaryPrimitives.WriteInt32BigEndian(message.AsSpan(30), card);
        byte[] options = [0x63, 0x82, 0x53, 0x63, 53, 1, type, .. requested is null ? [] : (byte[])[50, 4, .. IPAddress.Parse(requested).GetAddressBytes()], 0, 255];
        options.CopyTo(message.AsSpan(236));
        peer.Send(GuestPeer.Udp(NetAddress.FromIp4(0), 68, NetAddress.FromIp4(uint.MaxValue), 67, message, MacAddress.Broadcast));
        var reply = await peer.ReceiveUdpAsync(68);
        Assert.Equal((uint)card, BinaryPrimitives.ReadUInt32BigEndian(reply.AsSpan(4)));
        var read = new Dictionary<byte, byte[]>();
        for (var at = 240; reply[at] != 255; at += 2 + reply[at + 1])
        {
            read[reply[at]] = reply[(at + 2)..(at + 2 + reply[at + 1])];
        }
        return (read[53][0], new IPAddress(reply.AsSpan(16, 4)).ToString(), read);
    }
}
