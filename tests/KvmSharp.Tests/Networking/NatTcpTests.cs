using System.Net;
using System.Net.Sockets;
using System.Text;
using KvmSharp.Networking;
using KvmSharp.Networking.Nat;

namespace KvmSharp.Tests.Networking;

/// <summary>The TCP of the user-mode network, segment by segment.</summary>
public sealed class NatTcpTests
{
    [Theory]
    [InlineData(false)]
    [InlineData(true)]
    public async Task BytesGoBothWaysAndBothSidesClose(bool ip6)
    {
        var (peer, guest, host) = await ConnectAsync(ip6);
        using (peer)
        using (host)
        {
            guest.SendData("hello"u8);
            Assert.Equal("hello", await ReadAsync(host, 5));
            Assert.Equal(guest.Next, (await guest.ReceiveAsync()).Acknowledgment);
            host.Send("world"u8);
            Assert.Equal("world", Encoding.ASCII.GetString(await guest.ReadAsync(5)));
            // The guest is through; the host is not.
            guest.SendData([], TcpFlags.Fin);
            Assert.Equal(0, await host.ReceiveAsync(new byte[1]));
            Assert.Equal(guest.Next, (await guest.ReceiveAsync()).Acknowledgment);
            host.Send("more"u8);
            Assert.Equal("more", Encoding.ASCII.GetString(await guest.ReadAsync(4)));
            Assert.Equal(TcpState.CloseWait, State(peer));
            host.Shutdown(SocketShutdown.Send);
            var fin = await guest.ReceiveAsync(s => s.Flags.HasFlag(TcpFlags.Fin));
            Assert.Equal(guest.Expected, fin.Sequence);
            Assert.Equal(TcpState.LastAck, State(peer));
            guest.Expected++;
            guest.Acknowledge();
            Assert.Equal(0, peer.Network.ConnectionCount);
        }
    }

    [Fact]
    public async Task HostClosesFirst()
    {
        var (peer, guest, host) = await ConnectAsync();
        using (peer)
        using (host)
        {
            host.Send("bye"u8);
            host.Shutdown(SocketShutdown.Send);
            var text = "";
            PeerSegment segment;
            do
            {
                segment = await guest.ReceiveAsync();
                text += Encoding.ASCII.GetString(segment.Payload);
            }
            while (!segment.Flags.HasFlag(TcpFlags.Fin));
            Assert.Equal("bye", text);
            guest.Expected += 4;
            guest.Acknowledge();
            Assert.Equal(TcpState.FinWait2, State(peer));
            guest.SendData("still here"u8);
            Assert.Equal("still here", await ReadAsync(host, 10));
            guest.SendData([], TcpFlags.Fin);
            Assert.Equal(TcpState.TimeWait, State(peer));
            Assert.Equal(0, await host.ReceiveAsync(new byte[1]));
            // The last acknowledgment was lost.
            guest.Next--;
            guest.SendData([], TcpFlags.Fin);
            Assert.Equal(guest.Next, (await guest.ReceiveAsync(s => s.Acknowledgment == guest.Next)).Acknowledgment);
            peer.Clock.Advance(TimeSpan.FromSeconds(30));
            Assert.Equal(0, peer.Network.ConnectionCount);
        }
    }

    [Fact]
    public async Task BothCloseAtOnce()
    {
        var (peer, guest, host) = await ConnectAsync();
        using (peer)
        using (host)
        {
            host.Shutdown(SocketShutdown.Send);
            await guest.ReceiveAsync(s => s.Flags.HasFlag(TcpFlags.Fin));
            guest.SendData([], TcpFlags.Fin); // without having seen the other one
            Assert.Equal(TcpState.Closing, State(peer));
            guest.Expected++;
            guest.Acknowledge();
            Assert.Equal(TcpState.TimeWait, State(peer));
        }
    }

    [Fact]
    public async Task SameEndsBeginAnewAfterTimeWait()
    {
        using var listener = Loopback.Listen();
        using var peer = new GuestPeer();
        for (var round = 0; round < 3; round++)
        {
            var guest = await PeerTcp.ConnectAsync(peer, listener.Port());
            using var host = await listener.AcceptSoonAsync();
            host.Shutdown(SocketShutdown.Send);
            await guest.ReceiveAsync(s => s.Flags.HasFlag(TcpFlags.Fin));
            guest.Expected++;
            guest.SendData([], TcpFlags.Fin);
            Assert.Equal(TcpState.TimeWait, State(peer));
        }
    }

    [Fact]
    public async Task RefusalsAndResetsArrive()
    {
        using var peer = new GuestPeer();
        ushort closed;
        using (var listener = Loopback.Listen())
        {
            closed = listener.Port();
        }
        var guest = new PeerTcp(peer, GuestPeer.Own4, GuestPeer.Gateway4, 40000, closed);
        guest.SendSyn();
        var reset = await guest.ReceiveAsync();
        Assert.Equal((TcpFlags.Reset | TcpFlags.Ack, guest.Next), (reset.Flags, reset.Acknowledgment));
        Assert.Equal(0, peer.Network.ConnectionCount);
        // A segment of no connection.
        guest.Expected = 5555;
        guest.SendData("x"u8);
        Assert.Equal((TcpFlags.Reset, 5555u), (await guest.ReceiveAsync()) is var s ? (s.Flags, s.Sequence) : default);

        using var server = Loopback.Listen();
        var cut = await PeerTcp.ConnectAsync(peer, server.Port(), port: 40001);
        using (var host = await server.AcceptSoonAsync())
        {
            host.LingerState = new LingerOption(true, 0);
        }
        Assert.True((await cut.ReceiveAsync(x => x.Flags.HasFlag(TcpFlags.Reset))).Sequence == cut.Expected);
        var cutting = await PeerTcp.ConnectAsync(peer, server.Port(), port: 40002);
        using var second = await server.AcceptSoonAsync();
        cutting.Send(TcpFlags.Reset, [], cutting.Next + 100); // not exactly the next number
        Assert.Equal(TcpFlags.Ack, (await cutting.ReceiveAsync()).Flags);
        Assert.Equal(1, peer.Network.ConnectionCount);
        cutting.Send(TcpFlags.Reset, []);
        Assert.Equal(0, peer.Network.ConnectionCount);
        Assert.Equal(SocketError.ConnectionReset, Assert.Throws<SocketException>(() => second.Receive(new byte[1])).SocketErrorCode);
    }

    [Fact]
    public async Task WhatComesOutOfOrderIsPutInOrder()
    {
        var (peer, guest, host) = await ConnectAsync();
        using (peer)
        using (host)
        {
            var start = guest.Next;
            var data = Enumerable.Range(0, 20_000).Select(i => (byte)(i * 13)).ToArray();
            var pieces = Enumerable.Range(0, 20).OrderBy(i => (i * 7 + 3) % 20).ToArray();
            foreach (var i in pieces)
            {
                // Pieces overlap their neighbors.
                var from = Math.Max(i * 1000 - 100, 0);
                guest.Send(TcpFlags.Ack, data.AsSpan(from, i * 1000 + 1000 - from), start + (uint)from);
            }
            guest.Send(TcpFlags.Ack | TcpFlags.Fin, [], start + 20_000);
            guest.Next = start + 20_001;
            var received = new byte[20_001];
            var count = 0;
            for (int n; (n = await host.ReceiveAsync(received.AsMemory(count))) > 0; count += n)
            {
            }
            Assert.Equal(data, received[..count]);
            await guest.ReceiveAsync(s => s.Acknowledgment == guest.Next);
        }
    }

    [Fact]
    public async Task FinBeforeItsDataWaits()
    {
        var (peer, guest, host) = await ConnectAsync();
        using (peer)
        using (host)
        {
            guest.Send(TcpFlags.Ack | TcpFlags.Fin, "world"u8, guest.Next + 5);
            Assert.Equal(guest.Next, (await guest.ReceiveAsync()).Acknowledgment);
            guest.Send(TcpFlags.Ack, "hello"u8);
            Assert.Equal("helloworld", await ReadAsync(host, 10));
            Assert.Equal(0, await host.ReceiveAsync(new byte[1]));
            Assert.Equal(guest.Next + 11, (await guest.ReceiveAsync(s => s.Acknowledgment != guest.Next)).Acknowledgment);
        }
    }

    [Fact]
    public async Task LostSegmentsComeAgain()
    {
        var (peer, guest, host) = await ConnectAsync();
        using (peer)
        using (host)
        {
            host.Send("lost"u8);
            var first = await guest.ReceiveAsync(s => s.Payload.Length > 0);
            peer.ExpectNothing();
            foreach (var _ in Enumerable.Range(0, 3))
            {
                peer.Clock.Advance(TimeSpan.FromSeconds(10));
                var again = await guest.ReceiveAsync(s => s.Payload.Length > 0);
                Assert.Equal((first.Sequence, "lost"), (again.Sequence, Encoding.ASCII.GetString(again.Payload)));
            }
            guest.Expected += 4;
            guest.Acknowledge();
            peer.Clock.Advance(TimeSpan.FromMinutes(10));
            Assert.Null(guest.TryReceive());
            Assert.Equal(TcpState.Established, State(peer));
            // One that never answers is given up.
            host.Send("gone"u8);
            await guest.ReceiveAsync(s => s.Payload.Length > 0);
            for (var i = 0; i < 100 && peer.Network.ConnectionCount != 0; i++)
            {
                peer.Clock.Advance(TimeSpan.FromMinutes(1));
                guest.TryReceive();
            }
            Assert.Equal(0, peer.Network.ConnectionCount);
            Assert.Equal(SocketError.ConnectionReset, Assert.Throws<SocketException>(() => host.Receive(new byte[1])).SocketErrorCode);
        }
    }

    [Fact]
    public async Task HandshakeIsRepeated()
    {
        using var listener = Loopback.Listen();
        using var peer = new GuestPeer();
        var guest = new PeerTcp(peer, GuestPeer.Own4, GuestPeer.Gateway4, 40000, listener.Port());
        guest.SendSyn();
        var answer = await guest.ReceiveAsync();
        guest.Next--;
        guest.SendSyn(); // as if the answer had been lost
        Assert.Equal(answer.Sequence, (await guest.ReceiveAsync()).Sequence);
        peer.Clock.Advance(TimeSpan.FromSeconds(2));
        Assert.Equal(answer.Sequence, (await guest.ReceiveAsync()).Sequence);
        Assert.Equal(TcpState.SynReceived, State(peer));
        peer.Clock.Advance(TimeSpan.FromMinutes(5));
        Assert.Equal(0, peer.Network.ConnectionCount);
    }

    [Fact]
    public async Task DuplicateAcknowledgmentsBringTheGapAtOnce()
    {
        var (peer, guest, host) = await ConnectAsync(window: 60000);
        using (peer)
        using (host)
        {
            host.Send(new byte[1000]);
            var first = await guest.ReceiveAsync(s => s.Payload.Length > 0);
            host.Send(new byte[1000]);
            await guest.ReceiveAsync(s => s.Payload.Length > 0);
            for (var i = 0; i < 3; i++)
            {
                guest.Acknowledge();
            }
            var again = await guest.ReceiveAsync(s => s.Payload.Length > 0);
            Assert.Equal(first.Sequence, again.Sequence);
        }
    }

    [Fact]
    public async Task ClosedWindowIsProbed()
    {
        var (peer, guest, host) = await ConnectAsync(window: 1000);
        using (peer)
        using (host)
        {
            var data = Enumerable.Range(0, 3000).Select(i => (byte)i).ToArray();
            host.Send(data);
            var received = new List<byte>();
            while (received.Count < 1000)
            {
                received.AddRange((await guest.ReceiveAsync(s => s.Payload.Length > 0)).Payload);
            }
            Assert.Equal(1000, received.Count);
            guest.Expected += 1000;
            guest.Window = 0;
            guest.Acknowledge();
            Assert.Null(guest.TryReceive());
            for (var i = 0; i < 40; i++)
            {
                peer.Clock.Advance(TimeSpan.FromSeconds(70));
                var probe = await guest.ReceiveAsync();
                Assert.Equal((1, guest.Expected), (probe.Payload.Length, probe.Sequence));
                guest.Acknowledge(); // still no room, but alive
            }
            while (guest.TryReceive() is not null)
            {
                // Further probes.
            }
            guest.Window = 60000;
            guest.Acknowledge();
            received.AddRange(await guest.ReadAsync(2000));
            Assert.Equal(data, received);
            // A guest that takes the byte of a probe is asked again.
            guest.Window = 0;
            guest.Acknowledge();
            host.Send("abc"u8);
            await WaitAsync(() => guest.TryReceive() is null && Stack(peer).WaitingCount == 0);
            for (var i = 0; i < 3; i++)
            {
                PeerSegment? probe = null;
                await WaitAsync(() =>
                {
                    peer.Clock.Advance(TimeSpan.FromSeconds(5));
                    probe = guest.TryReceive();
                    return probe is { Payload.Length: 1 } && probe.Sequence == guest.Expected;
                });
                Assert.Equal((byte)("abc"[i]), probe!.Payload[0]);
                guest.Expected++;
                guest.Acknowledge();
            }
        }
    }

    [Theory]
    [InlineData(null)]
    [InlineData(7)]
    public async Task WindowsAreScaledAndSegmentsFit(int? scale)
    {
        using var listener = Loopback.Listen();
        using var peer = new GuestPeer();
        var guest = await PeerTcp.ConnectAsync(peer, listener.Port(), scale: scale, mss: 1000);
        using var host = await listener.AcceptSoonAsync();
        guest.Window = 512; // with scale 7: 64 KiB
        guest.Acknowledge();
        host.Send(new byte[30_000]);
        NetworkPacket? packet = null;
        await WaitAsync(() => peer.Network.ToGuest.TryRead(out packet));
        using (packet)
        {
            if (scale is null)
            {
                Assert.Equal(14 + 40 + 512, packet!.Length);
            }
            else
            {
                Assert.Equal(PacketSegmentation.Tcp4, packet!.Offload.Segmentation);
                Assert.Equal(1000, packet.Offload.SegmentSize);
                Assert.True(packet.Length > 5000);
            }
        }
        Assert.Equal(scale is null ? 0 : 3, guest.RemoteScale);
    }

    [Fact]
    public async Task SlowHostHoldsTheGuestBack()
    {
        var (peer, guest, host) = await ConnectAsync(scale: 7, receiveBuffer: 8192);
        using (peer)
        using (host)
        {
            var sent = 0;
            var window = 65535;
            var acknowledged = guest.Next;
            var start = guest.Next;
            var block = new byte[8000];
            for (var i = 0; i < 5000 && window - (int)(guest.Next - acknowledged) >= block.Length; i++)
            {
                Array.Fill(block, (byte)i);
                guest.SendData(block);
                sent += block.Length;
                while (guest.TryReceive() is { } answer)
                {
                    (acknowledged, window) = (answer.Acknowledgment, answer.Window << guest.RemoteScale);
                }
            }
            Assert.InRange(sent, 200_000, 20_000_000); // it came to an end
            Assert.InRange(Stack(peer).Budget.Used, 1, 2 << 20);
            // All of it arrives when the host reads; the window opens by itself.
            var received = 0;
            var buffer = new byte[65536];
            while (received < sent)
            {
                var count = await host.ReceiveAsync(buffer);
                for (var i = 0; i < count; i++, received++)
                {
                    Assert.Equal((byte)(received / 8000), buffer[i]);
                }
            }
            await guest.ReceiveAsync(s => s.Acknowledgment == start + (uint)sent && s.Window << guest.RemoteScale > 200_000);
        }
    }

    [Fact]
    public async Task SlowGuestHoldsTheHostBack()
    {
        var (peer, guest, host) = await ConnectAsync(scale: 7);
        using (peer)
        using (host)
        {
            guest.Window = 65535;
            guest.Acknowledge();
            host.SendTimeout = 300;
            var block = new byte[100_000];
            var sent = 0L;
            var blocked = false;
            while (!blocked && sent < 200_000_000)
            {
                try
                {
                    sent += host.Send(block);
                }
                catch (SocketException e) when (e.SocketErrorCode is SocketError.TimedOut or SocketError.WouldBlock)
                {
                    blocked = true;
                }
                while (guest.TryReceive() is not null)
                {
                    // Taken from the wire, never acknowledged.
                }
            }
            Assert.True(blocked);
            Assert.InRange(Stack(peer).Budget.Used, 1, 2 << 20);
        }
    }

    [Fact]
    public async Task LongTransfersInBothDirectionsAreExact()
    {
        var (peer, guest, host) = await ConnectAsync(scale: 7);
        using (peer)
        using (host)
        {
            guest.Window = 8000; // a million bytes
            var data = new byte[3_000_000];
            new Random(1).NextBytes(data);
            var sending = Task.Run(() =>
            {
                for (var at = 0; at < data.Length;)
                {
                    at += host.Send(data.AsSpan(at));
                }
            });
            var random = new Random(2);
            var received = new List<byte>();
            while (received.Count < data.Length)
            {
                if (guest.TryReceive() is { Payload.Length: > 0 } segment)
                {
                    // One in ten gets lost.
                    if (segment.Sequence == guest.Expected && random.Next(10) != 0)
                    {
                        received.AddRange(segment.Payload);
                        guest.Expected += (uint)segment.Payload.Length;
                    }
                    guest.Acknowledge();
                }
                else
                {
                    peer.Clock.Advance(TimeSpan.FromMilliseconds(20));
                    await Task.Yield();
                }
            }
            await sending;
            Assert.True(data.AsSpan().SequenceEqual(received.ToArray()));
        }
    }

    [Fact]
    public async Task ConnectionsAreBounded()
    {
        using var listener = Loopback.Listen(backlog: 100);
        using var peer = new GuestPeer(new UserNetworkOptions { MaxConnections = 10 });
        var guests = new List<PeerTcp>();
        for (ushort i = 0; i < 10; i++)
        {
            guests.Add(await PeerTcp.ConnectAsync(peer, listener.Port(), port: (ushort)(41000 + i)));
        }
        var refused = new PeerTcp(peer, GuestPeer.Own4, GuestPeer.Gateway4, 42000, listener.Port());
        refused.SendSyn();
        Assert.Equal(TcpFlags.Reset | TcpFlags.Ack, (await refused.ReceiveAsync()).Flags);
        Assert.Equal(10, peer.Network.ConnectionCount);
        guests[3].Send(TcpFlags.Reset, []);
        await PeerTcp.ConnectAsync(peer, listener.Port(), port: 42001);
    }

    [Fact]
    public async Task BuffersKeepToTheirBudget()
    {
        using var listener = Loopback.Listen(backlog: 100);
        using var peer = new GuestPeer(new UserNetworkOptions { MaxBufferMemory = 0 });
        var guest = await PeerTcp.ConnectAsync(peer, listener.Port(), scale: 7);
        using var host = await listener.AcceptSoonAsync();
        var data = new byte[300_000];
        new Random(3).NextBytes(data);
        var sending = host.SendAsync(data);
        Assert.Equal(data, await guest.ReadAsync(data.Length));
        await sending;
        Assert.InRange(Stack(peer).Budget.Used, 0, 2 * ByteRing.Minimum);
    }

    private static NatStack Stack(GuestPeer peer) => peer.Network.Stack;

    private static TcpState State(GuestPeer peer) => peer.Network.Stack.Tcp.Single().State;

    private static async Task<(GuestPeer Peer, PeerTcp Guest, Socket Host)> ConnectAsync(
        bool ip6 = false, int? scale = null, int? window = null, int? receiveBuffer = null)
    {
        using var listener = Loopback.Listen(ip6 ? IPAddress.IPv6Loopback : IPAddress.Loopback);
        if (receiveBuffer is { } size)
        {
            listener.ReceiveBufferSize = size;
        }
        var peer = new GuestPeer();
        var guest = await PeerTcp.ConnectAsync(peer, listener.Port(), ip6, scale: scale);
        if (window is { } w)
        {
            guest.Window = w;
            guest.Acknowledge();
        }
        return (peer, guest, await listener.AcceptSoonAsync());
    }

    private static async Task<string> ReadAsync(Socket socket, int count)
    {
        var buffer = new byte[count];
        for (var at = 0; at < count;)
        {
            var n = await socket.ReceiveAsync(buffer.AsMemory(at)).AsTask().WaitAsync(TimeSpan.FromSeconds(60));
            Assert.True(n > 0);
            at += n;
        }
        return Encoding.ASCII.GetString(buffer);
    }

    private static async Task WaitAsync(Func<bool> condition)
    {
        for (var end = DateTime.UtcNow.AddSeconds(60); !condition();)
        {
            Assert.True(DateTime.UtcNow < end);
            await Task.Delay(5);
        }
    }
}
