using System.Buffers.Binary;
using System.Net;
using System.Net.Sockets;
using System.Text;
using KvmSharp.Networking;
using KvmSharp.Networking.Nat;

namespace KvmSharp.Tests.Networking;

/// <summary>Names, and what guests may reach.</summary>
public sealed class EgressAndDnsTests
{
    [Fact]
    public async Task QueriesGoToTheServerAndBack()
    {
        using var silent = Loopback.Udp();
        using var server = new TestDnsServer(query => DnsMessage.CreateAnswer(query, [IPAddress.Parse("192.0.2.7"), IPAddress.IPv6Loopback]));
        using var peer = new GuestPeer(new UserNetworkOptions { DnsResolver = new DnsServers((IPEndPoint)silent.LocalEndPoint!, server.EndPoint) });
        var answer = await AskAsync(peer, Query("Example.COM", DnsMessage.TypeA, 0x1234));
        Assert.Equal(0x1234, BinaryPrimitives.ReadUInt16BigEndian(answer));
        Assert.Equal("192.0.2.7", Assert.Single(DnsMessage.ReadAddresses(answer)).Address.ToString());
        Assert.Equal(IPAddress.IPv6Loopback, Assert.Single(DnsMessage.ReadAddresses(await AskAsync(peer, Query("example.com", DnsMessage.TypeAaaa)))).Address);
        Assert.Empty(DnsMessage.ReadAddresses(await AskAsync(peer, Query("example.com", 16))));
        // Over TCP, two queries on one connection, the second in pieces.
        var guest = await PeerTcp.ConnectAsync(peer, 53, remote: GuestPeer.Dns4);
        guest.SendData(Framed(Query("a.test", DnsMessage.TypeA, 1)));
        Assert.Equal(1, BinaryPrimitives.ReadUInt16BigEndian((await guest.ReadAsync(2 + 24 + 16)).AsSpan(2)));
        var second = Framed(Query("a.test", DnsMessage.TypeA, 2));
        guest.SendData(second.AsSpan(0, 1));
        guest.SendData(second.AsSpan(1, 10));
        guest.SendData(second.AsSpan(11));
        Assert.Equal(2, BinaryPrimitives.ReadUInt16BigEndian((await guest.ReadAsync(2 + 24 + 16)).AsSpan(2)));
        guest.SendData([], TcpFlags.Fin);
        await guest.ReceiveAsync(s => s.Flags.HasFlag(TcpFlags.Fin));
    }

    [Fact]
    public async Task LongAnswersAreTruncatedOverUdpOnly()
    {
        var many = Enumerable.Range(0, 80).Select(i => new IPAddress([192, 0, 2, (byte)i])).ToArray();
        using var peer = new GuestPeer(new UserNetworkOptions { DnsResolver = new Resolver(q => DnsMessage.CreateAnswer(q, many)) });
        var answer = await AskAsync(peer, Query("many.test", DnsMessage.TypeA));
        Assert.True(answer.Length <= 512 && (answer[2] & 2) != 0);
        byte[] extended = [.. Query("many.test", DnsMessage.TypeA), 0, 0, 41, 0x10, 0, 0, 0, 0, 0, 0, 0];
        extended[11] = 1;
        Assert.Equal(80, DnsMessage.ReadAddresses(await AskAsync(peer, extended)).Count);
        var guest = await PeerTcp.ConnectAsync(peer, 53, remote: GuestPeer.Dns4);
        guest.SendData(Framed(Query("many.test", DnsMessage.TypeA)));
        var whole = await guest.ReadAsync(2 + 27 + 1280);
        Assert.Equal(DnsMessage.CreateAnswer(Query("many.test", DnsMessage.TypeA), many), whole[2..]);
    }

    [Fact]
    public async Task FailuresAreTold()
    {
        using var peer = new GuestPeer(new UserNetworkOptions
        {
            DnsResolver = new Resolver(q => DnsMessage.TryReadQuestion(q, out var question) ? question.Name switch
            {
                "none.test" => DnsMessage.CreateFailure(q, DnsMessage.NameError),
                "throws.test" => throw new InvalidOperationException("no"),
                "short.test" => [1, 2, 3],
                _ => null,
            } : null),
        });
        Assert.Equal(DnsMessage.NameError, (await AskAsync(peer, Query("none.test", 1)))[3] & 15);
        foreach (var name in new[] { "throws.test", "short.test", "null.test" })
        {
            Assert.Equal(DnsMessage.ServerFailure, (await AskAsync(peer, Query(name, 1)))[3] & 15);
        }
        var broken = Query("broken.test", 1);
        broken[12] = 200;
        Assert.Equal(1, (await AskAsync(peer, broken))[3] & 15);
        Assert.Equal(0, peer.Network.Stack.Dns.Running);
    }

    [Fact]
    public async Task QueriesAreBounded()
    {
        var gate = new TaskCompletionSource();
        using var peer = new GuestPeer(new UserNetworkOptions { DnsResolver = new Resolver(_ => null, gate.Task) });
        for (ushort i = 0; i < 300; i++)
        {
            peer.Send(GuestPeer.Udp(GuestPeer.Own4, 5000, GuestPeer.Dns4, 53, Query("x.test", 1, i)));
        }
        Assert.Equal(128, peer.Network.Stack.Dns.Running);
        gate.SetResult();
        for (var i = 0; i < 128; i++)
        {
            await peer.ReceiveUdpAsync(5000);
        }
        Assert.Equal(0, peer.Network.Stack.Dns.Running);
    }

    [Fact]
    public void HostConfigurationIsRead()
    {
        string[] text = ["# comment", "search example.com", "nameserver 192.0.2.1", "nameserver\tfe80::1", "nameserver junk", "options edns0", "nameserver 192.0.2.2", "nameserver 192.0.2.3"];
        Assert.Equal(["192.0.2.1", "fe80::1", "192.0.2.2"], DnsServers.ParseConfiguration(text).Select(s => s.Address.ToString()));
        Assert.Equal(IPAddress.Loopback, Assert.Single(DnsServers.ParseConfiguration([])).Address);
    }

    [Fact]
    public async Task EmptyListAllowsNothingButTheNetworkItself()
    {
        using var listener = Loopback.Listen();
        using var udp = Loopback.Udp();
        using var peer = new GuestPeer(new UserNetworkOptions { Egress = [] });
        Assert.False(await ReachesAsync(peer, GuestPeer.Gateway4, listener.Port()));
        peer.Send(GuestPeer.Udp(GuestPeer.Own4, 5000, GuestPeer.Gateway4, udp.Port(), "x"u8));
        Assert.Equal((3, 13), (await peer.ReceiveIcmpAsync()) is var (t, c, _) ? (t, c) : default);
        Assert.Equal(DnsMessage.Refused, (await AskAsync(peer, Query("example.com", 1)))[3] & 15);
        peer.Send(GuestPeer.Echo(GuestPeer.Own4, GuestPeer.Gateway4, 1, [1]));
        Assert.Equal(0, (await peer.ReceiveIcmpAsync()).Type);
        Assert.Equal(0, udp.Available);
    }

    [Fact]
    public async Task AddressPortAndProtocolHaveToFit()
    {
        using var first = Loopback.Listen();
        using var second = Loopback.Listen();
        using var udp = Loopback.Udp();
        using var peer = new GuestPeer(new UserNetworkOptions
        {
            Egress = [EgressRule.Parse($"tcp:10.0.2.2:{first.Port()}"), EgressRule.Parse($"udp:192.0.2.0/24:{udp.Port()}")],
        });
        Assert.True(await ReachesAsync(peer, GuestPeer.Gateway4, first.Port()));
        Assert.False(await ReachesAsync(peer, GuestPeer.Gateway4, second.Port()));
        peer.Send(GuestPeer.Udp(GuestPeer.Own4, 5000, GuestPeer.Gateway4, udp.Port(), "x"u8));
        Assert.Equal(3, (await peer.ReceiveIcmpAsync()).Type);
    }

    [Fact]
    public async Task LoopbackCanBeForbiddenAndIsReachedByNoOtherName()
    {
        using var listener = Loopback.Listen();
        using var peer = new GuestPeer(new UserNetworkOptions { AllowHostLoopback = false });
        Assert.False(await ReachesAsync(peer, GuestPeer.Gateway4, listener.Port()));
        using var open = new GuestPeer();
        foreach (var address in new[] { "127.0.0.1", "127.1.2.3", "0.0.0.0", "0.0.0.1", "255.255.255.255", "224.0.0.1", "240.0.0.1", "169.254.169.254", "10.0.2.77" })
        {
            Assert.False(await ReachesAsync(open, NetAddress.From(IPAddress.Parse(address)), listener.Port(), mayBeSilent: true));
        }
        using var listener6 = Loopback.Listen(IPAddress.IPv6Loopback);
        foreach (var address in new[] { "::1", "::", "::7f00:1", "fe80::1", "ff02::1" })
        {
            Assert.False(await ReachesAsync(open, NetAddress.From(IPAddress.Parse(address)), listener6.Port(), mayBeSilent: true));
        }
        Assert.Equal(0, open.Network.ConnectionCount);
    }

    [Fact]
    public async Task NameStandsForTheAddressesThatWereAnswered()
    {
        var address = IPAddress.Parse("192.0.2.9"); // only asked about: nothing is sent there
        using var peer = new GuestPeer(new UserNetworkOptions
        {
            Egress = [EgressRule.Parse("tcp:*.allowed.test:80")],
            DnsResolver = new Resolver(q => DnsMessage.CreateAnswer(q, [address], 120)),
        });
        Assert.False(MayReach(peer, address, 80));
        Assert.Equal(DnsMessage.Refused, (await AskAsync(peer, Query("other.test", 1)))[3] & 15);
        Assert.Equal(DnsMessage.Refused, (await AskAsync(peer, Query("allowed.test", 1)))[3] & 15);
        Assert.Equal(DnsMessage.Refused, (await AskAsync(peer, Query("notallowed.test", 1)))[3] & 15);
        Assert.False(MayReach(peer, address, 80));
        Assert.Single(DnsMessage.ReadAddresses(await AskAsync(peer, Query("WWW.Allowed.test", 1))));
        Assert.True(MayReach(peer, address, 80));
        Assert.False(MayReach(peer, address, 81));
        peer.Clock.Advance(TimeSpan.FromSeconds(100));
        Assert.True(MayReach(peer, address, 80));
        peer.Clock.Advance(TimeSpan.FromSeconds(30));
        Assert.False(MayReach(peer, address, 80));
    }

    // Who owns a name decides what it is answered with; that must not open the host's loopback.
    [Fact]
    public async Task NameDoesNotStandForTheHostItself()
    {
        using var listener = Loopback.Listen();
        using var peer = new GuestPeer(new UserNetworkOptions
        {
            Egress = [EgressRule.Parse("*.allowed.test")],
            DnsResolver = new Resolver(q => DnsMessage.CreateAnswer(q, [GuestPeer.Gateway4.ToIPAddress(), IPAddress.Loopback, IPAddress.Any], 120)),
        });
        Assert.Equal(3, DnsMessage.ReadAddresses(await AskAsync(peer, Query("www.allowed.test", 1))).Count);
        Assert.False(await ReachesAsync(peer, GuestPeer.Gateway4, listener.Port()));
        Assert.False(await ReachesAsync(peer, NetAddress.From(IPAddress.Loopback), listener.Port(), mayBeSilent: true));
        Assert.False(await ReachesAsync(peer, NetAddress.From(IPAddress.Any), listener.Port(), mayBeSilent: true));
    }

    private static bool MayReach(GuestPeer peer, IPAddress address, int port)
    {
        var stack = peer.Network.Stack;
        lock (stack.Gate)
        {
            return stack.MapTarget(EgressProtocol.Tcp, NetAddress.From(address), port) is not null;
        }
    }

    [Fact]
    public void LearnedAddressesAreBounded()
    {
        var policy = new EgressPolicy([EgressRule.Parse("*.test")]);
        for (var i = 0; i < 10_000; i++)
        {
            policy.Learn("a.test", [(new IPAddress([10, 1, (byte)(i >> 8), (byte)i]), 60)], i);
        }
        Assert.Equal(4096, policy.LearnedCount);
        Assert.True(policy.Permits(EgressProtocol.Tcp, NetAddress.From(new IPAddress([10, 1, 9999 >> 8, 9999 & 255])), 80, 10_000));
        Assert.False(policy.Permits(EgressProtocol.Tcp, NetAddress.From(new IPAddress([10, 1, 0, 0])), 80, 10_000));
    }

    [Fact]
    public void DnsMessagesMayBeAnything()
    {
        var random = new Random(5);
        var good = DnsMessage.CreateAnswer(Query("www.example.com", 1), [IPAddress.Loopback, IPAddress.Parse("192.0.2.1")]);
        for (var i = 0; i < 100_000; i++)
        {
            var message = good[..random.Next(good.Length + 1)];
            for (var n = random.Next(5); n > 0 && message.Length > 0; n--)
            {
                message[random.Next(message.Length)] = (byte)random.Next(256);
            }
            DnsMessage.TryReadQuestion(message, out _);
            Assert.InRange(DnsMessage.ReadAddresses(message).Count, 0, 2);
            Assert.InRange(DnsMessage.MaxAnswerLength(message), 512, 4096);
            if (message.Length >= 12)
            {
                DnsMessage.CreateFailure(message, 2);
                DnsMessage.Truncate(message);
            }
            DnsMessage.IsAnswerTo(message, good, 0);
        }
    }

    internal static byte[] Query(string name, ushort type, ushort id = 7)
    {
        var query = new List<byte> { (byte)(id >> 8), (byte)id, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0 };
        foreach (var label in name.Split('.'))
        {
            query.Add((byte)label.Length);
            query.AddRange(Encoding.ASCII.GetBytes(label));
        }
        query.AddRange([0, (byte)(type >> 8), (byte)type, 0, 1]);
        return [.. query];
    }

    private static byte[] Framed(byte[] query) => [(byte)(query.Length >> 8), (byte)query.Length, .. query];

    private static async Task<byte[]> AskAsync(GuestPeer peer, byte[] query)
    {
        peer.Send(GuestPeer.Udp(GuestPeer.Own4, 5353, GuestPeer.Dns4, 53, query));
        return await peer.ReceiveUdpAsync(5353);
    }

    private static ushort _port = 45000;

    private static async Task<bool> ReachesAsync(GuestPeer peer, NetAddress target, ushort port, bool mayBeSilent = false)
    {
        var own = target.IsIp4 ? GuestPeer.Own4 : GuestPeer.Own6;
        var guest = new PeerTcp(peer, own, target, _port++, port);
        guest.SendSyn();
        if (mayBeSilent)
        {
            return guest.TryReceive() is { } first && (first.Flags & TcpFlags.Reset) == 0;
        }
        var answer = await guest.ReceiveAsync();
        return (answer.Flags & TcpFlags.Syn) != 0;
    }

    private sealed class Resolver(Func<byte[], byte[]?> answer, Task? gate = null) : IDnsResolver
    {
        public async ValueTask<byte[]?> ResolveAsync(ReadOnlyMemory<byte> query, bool overStream, CancellationToken cancellationToken)
        {
            await (gate ?? Task.CompletedTask);
            return answer(query.ToArray());
        }
    }
}

/// <summary>A DNS server on the loopback, UDP and TCP at the same port.</summary>
internal sealed class TestDnsServer : IDisposable
{
    private readonly Socket _udp;
    private readonly Socket _tcp;
    private readonly Func<byte[], byte[]> _answer;

    public TestDnsServer(Func<byte[], byte[]> answer)
    {
        _answer = answer;
        _tcp = Loopback.Listen();
        EndPoint = (IPEndPoint)_tcp.LocalEndPoint!;
        _udp = new Socket(AddressFamily.InterNetwork, SocketType.Dgram, ProtocolType.Udp);
        _udp.Bind(EndPoint);
        _ = ServeUdpAsync();
        _ = ServeTcpAsync();
    }

    public IPEndPoint EndPoint { get; }

    public void Dispose()
    {
        _udp.Dispose();
        _tcp.Dispose();
    }

    private async Task ServeUdpAsync()
    {
        var buffer = new byte[2048];
        try
        {
            while (true)
            {
                var received = await _udp.ReceiveFromAsync(buffer, new IPEndPoint(IPAddress.Any, 0));
                await _udp.SendToAsync(_answer(buffer[..received.ReceivedBytes]), received.RemoteEndPoint);
            }
        }
        catch (Exception e) when (e is SocketException or ObjectDisposedException)
        {
            return; // the test is over
        }
    }

    private async Task ServeTcpAsync()
    {
        try
        {
            while (true)
            {
                using var socket = await _tcp.AcceptAsync();
                using var stream = new NetworkStream(socket);
                var length = new byte[2];
                await stream.ReadExactlyAsync(length);
                var query = new byte[BinaryPrimitives.ReadUInt16BigEndian(length)];
                await stream.ReadExactlyAsync(query);
                var answer = _answer(query);
                await stream.WriteAsync((byte[])[(byte)(answer.Length >> 8), (byte)answer.Length, .. answer]);
            }
        }
        catch (Exception e) when (e is SocketException or ObjectDisposedException or IOException)
        {
            return; // the test is over
        }
    }
}
