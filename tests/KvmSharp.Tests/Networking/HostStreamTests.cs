using System.Net;
using System.Net.Sockets;
using KvmSharp.Networking.Nat;

namespace KvmSharp.Tests.Networking;

/// <summary>The host side of connections: sockets of the loopback.</summary>
public sealed class HostStreamTests
{
    // Bytes that come at the moment at which the stream begins to wait for them must wake it.
    [Fact]
    public async Task NoByteIsWaitedForInVain()
    {
        const int Count = 2_000;
        using var listener = Loopback.Listen();
        using var sender = new Socket(AddressFamily.InterNetwork, SocketType.Stream, ProtocolType.Tcp) { NoDelay = true };
        await sender.ConnectAsync(new IPEndPoint(IPAddress.Loopback, listener.Port()));
        var events = new Events();
        using var stream = new HostSocketStream(await listener.AcceptSoonAsync(), events);
        var taken = new SemaphoreSlim(0);
        var sending = Task.Run(async () =>
        {
            var one = new byte[1];
            for (var i = 0; i < Count; i++)
            {
                sender.Send(one);
                await taken.WaitAsync();
            }
        });
        var buffer = new byte[16];
        for (var i = 0; i < Count;)
        {
            int count;
            lock (events.Gate)
            {
                count = stream.Receive(buffer);
            }
            if (count == IHostStream.WouldBlock)
            {
                Assert.True(await events.Readable.WaitAsync(TimeSpan.FromSeconds(60)), $"no event for byte {i}");
                continue;
            }
            Assert.Equal(1, count);
            i++;
            taken.Release();
        }
        await sending;
    }

    private sealed class Events : IHostStreamEvents
    {
        public Lock Gate { get; } = new();

        public SemaphoreSlim Readable { get; } = new(0);

        public void OnConnected(SocketError error)
        {
        }

        public void OnReadable()
        {
            lock (Gate)
            {
                Readable.Release();
            }
        }

        public void OnWritable()
        {
        }
    }
}
