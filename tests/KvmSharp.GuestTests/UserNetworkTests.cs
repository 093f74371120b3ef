using System.Net;
using System.Net.Sockets;
using System.Security.Cryptography;
using System.Text;
using KvmSharp.Boot;
using KvmSharp.Cli.Debian;
using KvmSharp.Devices.Virtio;
using KvmSharp.GuestTests.Samples;
using KvmSharp.GuestTests.Support;
using KvmSharp.Networking;

namespace KvmSharp.GuestTests;

/// <summary>Debian's kernel at a user-mode network that allows some things and refuses the rest.</summary>
public sealed class UserNetworkFixture : IAsyncLifetime
{
    private UserNetwork? _network;

    internal LinuxGuest Guest { get; private set; } = null!;

    internal LoopbackHttpServer Large { get; } = new(RandomNumberGenerator.GetBytes(100_000_000));

    internal LoopbackHttpServer Small { get; } = new(Encoding.ASCII.GetBytes("small\n"));

    internal LoopbackHttpServer Small6 { get; } = new(Encoding.ASCII.GetBytes("six\n"), IPAddress.IPv6Loopback);

    internal LoopbackHttpServer Named { get; } = new(Encoding.ASCII.GetBytes("named\n"));

    internal LoopbackHttpServer Forbidden { get; } = new(Encoding.ASCII.GetBytes("forbidden\n"));

    internal Socket Sink { get; } = new(AddressFamily.InterNetwork, SocketType.Stream, ProtocolType.Tcp);

    internal IPEndPoint TcpPort { get; private set; } = null!;

    internal UdpClient Log { get; } = new(new IPEndPoint(IPAddress.Loopback, 0));

    internal int LogPort => ((IPEndPoint)Log.Client.LocalEndPoint!).Port;

    internal int SinkPort => ((IPEndPoint)Sink.LocalEndPoint!).Port;

    public async Task InitializeAsync()
    {
        Sink.Bind(new IPEndPoint(IPAddress.Loopback, 0));
        Sink.Listen(4);
        _network = new UserNetwork(new UserNetworkOptions
        {
            Egress =
            [
                .. new[] { Large.Port, Small.Port, SinkPort }.Select(port => EgressRule.Parse($"tcp:10.0.2.2:{port}")),
                EgressRule.Parse($"tcp:[fd00:6b76:6d73::2]:{Small6.Port}"), EgressRule.Parse($"tcp:*.allowed.test:{Named.Port}"), EgressRule.Parse($"udp:10.0.2.2:{LogPort}"),
            ],
            DnsResolver = new Resolver(),
        });
        TcpPort = _network.AddForward(new PortForward(0, 8080));
        DebianImage image = await DebianCache.CloudAsync();
        BootImage initrd = await DebianCache.WithModulesAsync(image);
        Guest = new LinuxGuest(image, change: options => options with
        {
            Initrd = initrd,
            CommandLine = options.CommandLine + " kvmsharp.modules=virtio_pci,virtio_net,af_packet kvmsharp.net=dhcp",
            VirtioDevices = [new VirtioNetworkOptions(_network)],
        });
        await Guest.BootAsync();
    }

    public async Task DisposeAsync()
    {
        await Guest.DisposeAsync();
        _network!.Dispose();
        Sink.Dispose();
        Log.Dispose();
        foreach (LoopbackHttpServer server in new[] { Large, Small, Small6, Named, Forbidden })
        {
            server.Dispose();
        }
    }

    private sealed class Resolver : IDnsResolver
    {
        public ValueTask<byte[]?> ResolveAsync(ReadOnlyMemory<byte> query, bool overStream, CancellationToken cancellationToken) =>
            new(DnsMessage.CreateAnswer(query.Span, [IPAddress.Parse("10.0.2.2")]));
    }
}

public sealed class UserNetworkTests(UserNetworkFixture fixture) : IClassFixture<UserNetworkFixture>
{
    private static readonly TimeSpan Limit = TimeSpan.FromSeconds(60);

    private LinuxGuest Guest => fixture.Guest;

    [Fact]
    public async Task AddressesComeByDhcpAndAdvertisement()
    {
        Assert.Contains("inet addr:10.0.2.15", await Guest.RunAsync("ifconfig eth0"));
        Assert.Contains("default via 10.0.2.2", await Guest.RunAsync("ip route"));
        Assert.Equal("nameserver 10.0.2.3\n", await Guest.RunAsync("cat /etc/resolv.conf"));
        string addresses = await Guest.RunAsync("for i in $(seq 50); do ip -6 addr show dev eth0 | grep -q 'global dynamic' && break; sleep 0.2; done; ip -6 addr show dev eth0");
        Assert.Contains("fd00:6b76:6d73:", addresses);
        Assert.Contains("3 packets received", await Guest.RunAsync("ping -c 3 -i 0.2 -s 4000 10.0.2.2"));
        Assert.Contains("1 packets received", await Guest.RunAsync("ping6 -c 1 -s 4000 fd00:6b76:6d73::2"));
    }

    [Fact]
    public async Task LargeFileArrivesUnchanged()
    {
        Assert.Equal(fixture.Large.Checksum, await Guest.RunAsync($"wget -q -O - http://10.0.2.2:{fixture.Large.Port}/file | sha256sum"));
        Assert.EndsWith(" 0\n", await Guest.RunAsync("cat /proc/net/snmp | grep Tcp: | tail -n 1")); // checksum errors
    }

    [Fact]
    public async Task Ip6ReachesTheHostToo()
    {
        await Guest.RunAsync("for i in $(seq 50); do ip -6 addr show dev eth0 | grep -q 'global dynamic' && break; sleep 0.2; done");
        Assert.Equal("six\n", await Guest.RunAsync($"wget -q -O - http://[fd00:6b76:6d73::2]:{fixture.Small6.Port}/"));
    }

    [Fact]
    public async Task GuestSendsUnchanged()
    {
        await Guest.RunAsync("dd if=/dev/urandom of=/tmp/data bs=1M count=16 2>/dev/null");
        Task<byte[]> receiving = Task.Run(async () =>
        {
            using Socket socket = await fixture.Sink.AcceptAsync().WaitAsync(Limit);
            using var content = new MemoryStream();
            await new NetworkStream(socket).CopyToAsync(content).WaitAsync(Limit);
            socket.Send("done"u8);
            return content.ToArray();
        });
        string[] lines = (await Guest.RunAsync($"nc 10.0.2.2 {fixture.SinkPort} < /tmp/data; echo; sha256sum < /tmp/data; rm /tmp/data")).Split('\n');
        Assert.Equal("done", lines[0]); // the guest's half was closed before
        Assert.Equal($"{Convert.ToHexStringLower(SHA256.HashData(await receiving))}  -", lines[1]);
    }

    [Fact]
    public async Task ForwardedPortsLeadIntoTheGuest()
    {
        await Guest.RunAsync("mkdir -p /tmp/www && echo served by the guest > /tmp/www/index.html && httpd -p 8080 -h /tmp/www");
        using var client = new HttpClient { Timeout = Limit };
        for (int i = 0; i < 3; i++)
        {
            Assert.Equal("served by the guest\n", await client.GetStringAsync($"http://{fixture.TcpPort}/index.html"));
        }

        await Guest.RunAsync("killall httpd");
    }

    [Fact]
    public async Task DatagramsReachTheHost()
    {
        await Guest.RunAsync($"syslogd -R 10.0.2.2:{fixture.LogPort} && for i in 1 2 3 4 5; do logger from the guest; sleep 0.3; done"); // the first may come before syslogd listens
        Assert.Contains("from the guest", Encoding.ASCII.GetString((await fixture.Log.ReceiveAsync().WaitAsync(Limit)).Buffer));
        await Guest.RunAsync("killall syslogd");
    }

    [Fact]
    public async Task NamesAreResolvedAndDoNotOpenTheHost()
    {
        // The answer is the gateway, which a rule for this port's address opens, but no rule for a name.
        Assert.Equal("small\n", await Guest.RunAsync($"wget -q -O - http://www.allowed.test:{fixture.Small.Port}/"));
        Assert.Contains("(10.0.2.2): Connection refused", await Guest.RunAsync($"wget -O - http://www.allowed.test:{fixture.Named.Port}/ 2>&1 || true"));
        Assert.Equal("refused\n", await Guest.RunAsync("nslookup other.test 2>&1 | grep -q -i refused && echo refused"));
    }

    [Fact]
    public async Task WhatIsNotAllowedIsRefused()
    {
        Assert.Contains("Connection refused", await Guest.RunAsync($"wget -O - http://10.0.2.2:{fixture.Forbidden.Port}/ 2>&1 || true"));
        Assert.Contains("Connection refused", await Guest.RunAsync("wget -O - http://192.0.2.1/ 2>&1 || true"));
        Assert.Equal("small\n", await Guest.RunAsync($"wget -q -O - http://10.0.2.2:{fixture.Small.Port}/"));
    }

    [Fact]
    public async Task PauseLosesNoConnection()
    {
        Guest.Send($"wget -q -O - http://10.0.2.2:{fixture.Large.Port}/file | sha256sum > /tmp/sum &\n");
        await Guest.RunAsync("sleep 0.3");
        Guest.Machine.VirtualMachine.Pause();
        await Task.Delay(3000);
        Guest.Machine.VirtualMachine.Resume();
        Assert.Equal(fixture.Large.Checksum, await Guest.RunAsync("wait; cat /tmp/sum"));
    }
}

/// <summary><c>kvmsharp run debian --net user</c>.</summary>
public sealed class UserNetworkCommandTests
{
    [Fact]
    public async Task NetworkIsUpWithoutFurtherAdo()
    {
        using var server = new LoopbackHttpServer(Encoding.ASCII.GetBytes("over the network\n"));
        using var directory = new TemporaryDirectory();
        string capture = Path.Combine(directory.Path, "net.pcap");
        CommandResult result = await CommandRunner.KvmSharpAsync(
            [
                "run", "debian", "--net", $"user,hostfwd=tcp::0-:22,allow=tcp:10.0.2.2:{server.Port},capture={capture}",
                "--append", $"quiet kvmsharp.run=wget,-q,-O,-,http://10.0.2.2:{server.Port}/captured",
            ],
            TimeSpan.FromSeconds(120));
        Assert.True(result.Status == 0, result.ToString());
        Assert.Contains("over the network", result.Output);
        byte[] file = File.ReadAllBytes(capture);
        Assert.Equal([0x4d, 0x3c, 0xb2, 0xa1], file[..4]);
        Assert.True(file.AsSpan().IndexOf("GET /captured"u8) > 0);
        Assert.True(file.AsSpan().IndexOf("over the network"u8) > 0);
    }

    [Fact]
    public async Task SampleConnectsTheGuest()
    {
        using var server = new LoopbackHttpServer(Encoding.ASCII.GetBytes("over the network\n"));
        DebianImage image = await DebianCache.CloudAsync();
        var serial = new KvmSharp.Devices.MemoryCharacterBackend();
        PcMachineOptions options = LinuxGuest.CreateOptions(image, serial);
        (VmExit exit, IPEndPoint ssh) = await NetworkedMachine.RunAsync(options with
        {
            Initrd = await DebianCache.WithModulesAsync(image),
            CommandLine = options.CommandLine + " quiet kvmsharp.modules=virtio_pci,virtio_net,af_packet kvmsharp.net=dhcp"
                + $" kvmsharp.run=wget,-q,-O,-,http://10.0.2.2:{server.Port}/",
        }).WaitAsync(TimeSpan.FromMinutes(3));
        Assert.Equal(VmExitKind.PowerOff, exit.Kind);
        Assert.Contains("over the network", serial.GetOutputText());
        Assert.NotEqual(0, ssh.Port);
    }
}
