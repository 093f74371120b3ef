using System.IO.Compression;
using System.Security.Cryptography;
using System.Threading.Channels;
using KvmSharp.Boot;
using KvmSharp.Cli.Debian;
using KvmSharp.Devices.Virtio;
using KvmSharp.GuestTests.Support;
using KvmSharp.Networking;

namespace KvmSharp.GuestTests;

/// <summary>Two guests on one cable; the first one also has a balloon and sockets.</summary>
public sealed class VirtioPeerFixture : IAsyncLifetime
{
    internal LinuxGuest First { get; private set; } = null!;

    internal LinuxGuest Second { get; private set; } = null!;

    public async Task InitializeAsync()
    {
        DebianImage image = await DebianCache.CloudAsync();
        BootImage modules = await DebianCache.WithModulesAsync(image);
        BootImage initrd = BootImage.FromBytes((byte[])[.. modules.Bytes.Span, .. EchoProgram()]);
        Channel<NetworkPacket> forth = Channel.CreateBounded<NetworkPacket>(64);
        Channel<NetworkPacket> back = Channel.CreateBounded<NetworkPacket>(64);
        LinuxGuest Create(INetworkBackend backend, byte number, params VirtioDeviceOptions[] others) => new(image, change: options => options with
        {
            Initrd = initrd,
            MemorySize = 256UL << 20,
            CommandLine = options.CommandLine
                + " kvmsharp.modules=virtio_pci,virtio_mmio,virtio_net,virtio_balloon,vmw_vsock_virtio_transport,virtio_blk",
            VirtioDevices = [new VirtioNetworkOptions(backend) { MacAddress = new([0x52, 0x54, 0, 0, 0, number]) }, .. others],
        });
        First = Create(new Plug(forth, back, NetworkOffloads.All), 1, new VirtioBalloonOptions(), new VirtioVsockOptions(5) { Transport = VirtioTransport.Mmio });
        Second = Create(new Plug(back, forth, NetworkOffloads.None), 2);
        await Task.WhenAll(First.BootAsync(), Second.BootAsync());
        await First.RunAsync("ifconfig eth0 10.1.1.1 up");
        await Second.RunAsync("ifconfig eth0 10.1.1.2 up");
    }

    public async Task DisposeAsync()
    {
        await First.DisposeAsync();
        await Second.DisposeAsync();
    }

    private static byte[] EchoProgram()
    {
        using var content = new MemoryStream();
        using (var gzip = new GZipStream(content, CompressionLevel.Optimal, leaveOpen: true))
        {
            var archive = new CpioWriter(gzip);
            archive.AddExecutable("bin/vsock-echo", File.ReadAllBytes(TestPaths.Guest("vsock-echo")));
            archive.Finish();
        }

        return content.ToArray();
    }

    private sealed class Plug(Channel<NetworkPacket> from, Channel<NetworkPacket> to, NetworkOffloads accepts) : INetworkBackend
    {
        public ChannelWriter<NetworkPacket> FromGuest => from.Writer;

        public ChannelReader<NetworkPacket> ToGuest => to.Reader;

        public NetworkOffloads Accepts => accepts;
    }
}

public sealed class VirtioPeerTests(VirtioPeerFixture fixture) : IClassFixture<VirtioPeerFixture>
{
    private static readonly TimeSpan Limit = TimeSpan.FromSeconds(60);

    [Fact]
    public async Task GuestsPingEachOther()
    {
        string text = await fixture.First.RunAsync("ping -c 3 -i 0.2 -s 1400 10.1.1.2");
        Assert.Contains("3 packets transmitted, 3 packets received", text);
        Assert.Contains("10.1.1.1", await fixture.Second.RunAsync("ping -c 1 10.1.1.1"));
    }

    // One direction passes long packets whole, in the other they are cut.
    [Theory]
    [InlineData(true)]
    [InlineData(false)]
    public async Task LongTransfersArriveUnchanged(bool forth)
    {
        (LinuxGuest sender, LinuxGuest receiver, string address) = forth
            ? (fixture.First, fixture.Second, "10.1.1.2") : (fixture.Second, fixture.First, "10.1.1.1");
        await sender.RunAsync("dd if=/dev/urandom of=/tmp/data bs=1M count=8 2>/dev/null");
        Task<string> receiving = receiver.RunAsync("nc -l -p 5000 -e sha256sum </dev/null");
        // Refused until the other guest listens.
        string[] sums = (await sender.RunAsync(
            $"for i in $(seq 300); do nc {address} 5000 < /tmp/data 2>/dev/null && break; sleep 0.1; done; sha256sum < /tmp/data; rm /tmp/data")).Split('\n');
        await receiving;
        Assert.Equal(sums[1], sums[0]);
        string statistics = await receiver.RunAsync("cat /proc/net/snmp | grep Tcp: | tail -n 1");
        Assert.EndsWith(" 0\n", statistics); // checksum errors
        Assert.DoesNotContain("error", await receiver.RunAsync("dmesg | grep -i eth0 || true"));
    }

    [Fact]
    public async Task UnpluggedCableIsNoticed()
    {
        var card = fixture.Second.Machine.VirtioDevices.OfType<VirtioNetwork>().Single();
        card.IsLinkUp = false;
        await fixture.Second.RunAsync("while [ $(cat /sys/class/net/eth0/carrier) != 0 ]; do sleep 0.05; done");
        card.IsLinkUp = true;
        await fixture.Second.RunAsync("while [ $(cat /sys/class/net/eth0/carrier) != 1 ]; do sleep 0.05; done");
    }

    [Fact]
    public async Task BalloonTakesMemoryAndGivesItBack()
    {
        var balloon = fixture.First.Machine.VirtioDevices.OfType<VirtioBalloon>().Single();
        long before = await FreeMemoryAsync();
        balloon.Target = 64 << 20;
        await WaitAsync(() => balloon.Actual == 64 << 20);
        Assert.InRange(before - await FreeMemoryAsync(), 50_000, 80_000);
        IReadOnlyDictionary<BalloonStatistic, ulong> statistics = await balloon.GetStatisticsAsync().WaitAsync(Limit);
        Assert.InRange(statistics[BalloonStatistic.TotalMemory], 100UL << 20, 256UL << 20);
        Assert.True(statistics[BalloonStatistic.FreeMemory] < statistics[BalloonStatistic.TotalMemory]);
        balloon.Target = 0;
        await WaitAsync(() => balloon.Actual == 0);
        Assert.InRange(before - await FreeMemoryAsync(), -20_000, 20_000);
    }

    [Fact]
    public async Task SocketsCarryBytesBothWays()
    {
        var sockets = fixture.First.Machine.VirtioDevices.OfType<VirtioVsock>().Single();
        using VsockListener listener = sockets.Listen(7000);
        fixture.First.Send("vsock-echo connect 7000; echo echo-ended=$?\n");
        await using (VsockStream stream = await listener.AcceptAsync().WaitAsync(Limit))
        {
            await ExchangeAsync(stream);
        }

        await fixture.First.ExpectAsync("echo-ended=0\n", Limit);

        fixture.First.Send("vsock-echo listen 7001; echo echo-ended=$?\n");
        await fixture.First.ExpectAsync("listening\n", Limit);
        await using (VsockStream stream = await sockets.ConnectAsync(7001).WaitAsync(Limit))
        {
            await ExchangeAsync(stream);
        }

        await fixture.First.ExpectAsync("echo-ended=0\n", Limit);
        await Assert.ThrowsAsync<IOException>(() => sockets.ConnectAsync(7002).WaitAsync(Limit));
    }

    private static async Task ExchangeAsync(VsockStream stream)
    {
        byte[] data = RandomNumberGenerator.GetBytes(3 << 20);
        byte[] back = new byte[data.Length];
        Task writing = stream.WriteAsync(data).AsTask();
        await stream.ReadExactlyAsync(back).AsTask().WaitAsync(Limit);
        await writing.WaitAsync(Limit);
        Assert.Equal(SHA256.HashData(data), SHA256.HashData(back));
    }

    private static async Task WaitAsync(Func<bool> condition)
    {
        for (var end = DateTime.UtcNow + Limit; !condition();)
        {
            Assert.True(DateTime.UtcNow < end);
            await Task.Delay(20);
        }
    }

    private async Task<long> FreeMemoryAsync() =>
        long.Parse(await fixture.First.RunAsync("echo 3 > /proc/sys/vm/drop_caches; awk '/MemFree/ { print $2 }' /proc/meminfo"));
}
