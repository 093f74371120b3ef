using System.Buffers.Binary;
using KvmSharp.Networking;
using KvmSharp.Tests.Devices;

namespace KvmSharp.Tests.Networking;

public sealed class SwitchAndCaptureTests
{
    private static readonly MacAddress A = new([2, 0, 0, 0, 0, 1]);
    private static readonly MacAddress B = new([2, 0, 0, 0, 0, 2]);

    [Fact]
    public void AddressesAreLearned()
    {
        using var network = new VirtualSwitch();
        var (a, b, c) = (network.Connect(), network.Connect(), network.Connect());
        Send(a, A, B, 1);
        Assert.Equal([1], Drain(b)); // not known yet: to all
        Assert.Equal([1], Drain(c));
        Send(b, B, A, 2);
        Assert.Equal([2], Drain(a));
        Assert.Empty(Drain(c));
        Send(a, A, B, 3);
        Assert.Equal([3], Drain(b));
        Send(a, A, MacAddress.Broadcast, 4);
        Assert.Equal([4], Drain(b));
        Assert.Equal([4], Drain(c));
        Assert.Empty(Drain(a));
        Send(c, B, A, 5); // moved
        Send(a, A, B, 6);
        Assert.Equal([6], Drain(c));
        Assert.Empty(Drain(b));
        c.Dispose();
        Drain(a);
        Send(a, A, B, 7);
        Assert.Equal([7], Drain(b));
        Assert.False(((INetworkBackend)c).FromGuest.TryWrite(NetworkPacket.Create(new byte[60])));
        Assert.Equal(2, network.Ports.Count);
    }

    [Fact]
    public void PortsAreBounded()
    {
        using var network = new VirtualSwitch();
        var (a, b) = (network.Connect(), network.Connect());
        for (var i = 0; i < 1000; i++)
        {
            Send(a, A, B, (byte)i);
        }
        Assert.Equal(488, b.DroppedPackets);
        Assert.Equal(512, Drain(b).Count);
        for (var i = 0; i < 200; i++)
        {
            a.FromGuest.TryWrite(Packet(A, B, 1, 60_000));
        }
        Assert.Equal((4 << 20) / 60_000, Drain(b).Count);
        for (var i = 0; i < 10_000; i++)
        {
            Send(a, new MacAddress([2, 1, 0, 0, (byte)(i >> 8), (byte)i]), B, 0);
            Drain(b);
        }
        Assert.Equal(64, a.Addresses.Count);
        a.FromGuest.TryWrite(NetworkPacket.Create(new byte[5]));
        Assert.Empty(Drain(b));
    }

    [Fact]
    public async Task UserNetworkCanBePluggedIn()
    {
        using var peer = new GuestPeer();
        using var network = new VirtualSwitch();
        using var uplink = network.Connect(peer.Network);
        var guest = network.Connect();
        Assert.True(guest.FromGuest.TryWrite(NetworkPacket.Create(GuestPeer.Arp(1, GuestPeer.Own4, GuestPeer.Gateway4))));
        using var limit = new CancellationTokenSource(TimeSpan.FromSeconds(60));
        using var answer = await guest.ToGuest.ReadAsync(limit.Token);
        Assert.Equal(2, answer.Data[21]);
        network.Dispose();
        Assert.False(await guest.ToGuest.WaitToReadAsync(limit.Token));
        Assert.Throws<ObjectDisposedException>(network.Connect);
    }

    [Fact]
    public void PortsAreUsedFromManyThreads()
    {
        using var network = new VirtualSwitch();
        var ports = Enumerable.Range(0, 4).Select(_ => network.Connect()).ToArray();
        var received = new long[4];
        Parallel.For(0, 8, i =>
        {
            var port = ports[i % 4];
            if (i < 4)
            {
                for (var n = 0; n < 20_000; n++)
                {
                    Send(port, new MacAddress([2, 0, 0, 0, 0, (byte)i]), new MacAddress([2, 0, 0, 0, 0, (byte)((i + n) % 4)]), (byte)n);
                }
                return;
            }
            for (var idle = 0; idle < 200;)
            {
                var count = Drain(port).Count;
                received[i - 4] += count;
                idle = count == 0 ? idle + 1 : 0;
                if (count == 0)
                {
                    Thread.Sleep(1);
                }
            }
        });
        Assert.All(received, n => Assert.True(n > 0));
    }

    [Fact]
    public void CaptureHoldsWhatPassed()
    {
        var stream = new MemoryStream();
        var inner = new ChannelNetworkBackend(accepts: NetworkOffloads.All);
        var clock = new ManualClock();
        using var capture = new PacketCapture(inner, stream, leaveOpen: true);
        INetworkBackend backend = capture;
        backend.Attach(clock.Clock);
        Assert.Equal(NetworkOffloads.All, capture.Accepts);
        var first = Packets.Udp4("first"u8);
        Assert.True(capture.FromGuest.TryWrite(NetworkPacket.Create(first)));
        clock.Advance(TimeSpan.FromMilliseconds(1500));
        using var tcp = Packets.Tcp(new byte[3000], false, false, 0x10);
        Assert.True(inner.Send.TryWrite(NetworkPacket.Create(tcp.Data, tcp.Offload)));
        Assert.True(capture.ToGuest.TryRead(out var packet));
        packet.Dispose();
        Assert.True(inner.Received.TryRead(out packet));
        Assert.Equal(first, packet.Data.ToArray());

        ReadOnlySpan<byte> file = stream.ToArray();
        Assert.Equal(0xa1b23c4d, BinaryPrimitives.ReadUInt32LittleEndian(file));
        Assert.Equal(1u, BinaryPrimitives.ReadUInt32LittleEndian(file[20..]));
        file = file[24..];
        var seconds = BinaryPrimitives.ReadUInt32LittleEndian(file);
        Assert.Equal(clock.Clock.StartTime.ToUnixTimeSeconds(), seconds);
        Assert.Equal((uint)first.Length, BinaryPrimitives.ReadUInt32LittleEndian(file[8..]));
        Assert.True(file.Slice(16, first.Length).SequenceEqual(first));
        file = file[(16 + first.Length)..];
        Assert.Equal((seconds + 1, 500_000_000u), (BinaryPrimitives.ReadUInt32LittleEndian(file), BinaryPrimitives.ReadUInt32LittleEndian(file[4..])));
        Assert.Equal(16 + tcp.Length, file.Length);
        Assert.True(Packets.HasValidChecksums(file[16..]));
    }

    [Fact]
    public void FailingStreamDoesNotStopTheNetwork()
    {
        var inner = new ChannelNetworkBackend();
        using var capture = new PacketCapture(inner, new FullStream());
        Assert.True(capture.FromGuest.TryWrite(NetworkPacket.Create(new byte[60])));
        Assert.IsType<IOException>(capture.Failure);
        Assert.True(capture.FromGuest.TryWrite(NetworkPacket.Create(new byte[60])));
        Assert.True(inner.Received.TryRead(out _));
    }

    private static NetworkPacket Packet(MacAddress from, MacAddress to, byte value, int length = 60)
    {
        var packet = NetworkPacket.Create(length);
        packet.Data.Clear();
        to.CopyTo(packet.Data);
        from.CopyTo(packet.Data[6..]);
        packet.Data[14] = value;
        return packet;
    }

    private static void Send(SwitchPort port, MacAddress from, MacAddress to, byte value) => Assert.True(port.FromGuest.TryWrite(Packet(from, to, value)));

    private static List<int> Drain(SwitchPort port)
    {
        var values = new List<int>();
        while (port.ToGuest.TryRead(out var packet))
        {
            using (packet)
            {
                values.Add(packet.Data[14]);
            }
        }
        return values;
    }

    private sealed class FullStream : MemoryStream
    {
        private bool _started;

        public override void Write(ReadOnlySpan<byte> buffer)
        {
            if (_started)
            {
                throw new IOException("No space left.");
            }
            _started = true;
        }
    }
}
