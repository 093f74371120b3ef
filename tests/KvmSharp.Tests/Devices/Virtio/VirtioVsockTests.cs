using KvmSharp.Devices.Virtio;

namespace KvmSharp.Tests.Devices.Virtio;

public sealed class VirtioVsockTests
{
    private const ushort Request = 1;
    private const ushort Response = 2;
    private const ushort Reset = 3;
    private const ushort Shutdown = 4;
    private const ushort ReadWrite = 5;
    private const ushort CreditUpdate = 6;
    private const ushort CreditRequest = 7;
    private static readonly TimeSpan Limit = TimeSpan.FromSeconds(60);

    [Fact]
    public async Task GuestConnectsAndBytesFlowBothWays()
    {
        using var bench = new Bench();
        using var listener = bench.Device.Listen(1234);
        bench.Send(Request, 5000, 1234);
        Assert.Equal((Response, 1234u, 5000u), bench.Expect());
        await using var stream = await listener.AcceptAsync().WaitAsync(Limit);
        Assert.Equal((1234u, 5000u), (stream.HostPort, stream.GuestPort));
        bench.Send(ReadWrite, 5000, 1234, "hello "u8);
        bench.Send(ReadWrite, 5000, 1234, "host"u8);
        var data = new byte[10];
        await stream.ReadExactlyAsync(data).AsTask().WaitAsync(Limit);
        Assert.Equal("hello host"u8.ToArray(), data);
        await stream.WriteAsync("hello guest"u8.ToArray());
        Assert.Equal((ReadWrite, 1234u, 5000u), bench.Expect());
        Assert.Equal("hello guest"u8.ToArray(), bench.LastPayload);

        bench.Send(Shutdown, 5000, 1234, flags: 2); // sends no more
        Assert.Equal(0, await stream.ReadAsync(data).AsTask().WaitAsync(Limit));
        await stream.WriteAsync("more"u8.ToArray());
        Assert.Equal(ReadWrite, bench.Expect().Operation);
        bench.Send(Shutdown, 5000, 1234, flags: 3);
        Assert.Equal((Reset, 1234u, 5000u), bench.Expect());
        await Assert.ThrowsAsync<IOException>(() => stream.WriteAsync(data).AsTask().WaitAsync(Limit));
        Assert.Equal(0, await stream.ReadAsync(data).AsTask().WaitAsync(Limit));
    }

    [Fact]
    public async Task HostConnectsAndCloses()
    {
        using var bench = new Bench();
        var connecting = bench.Device.ConnectAsync(80);
        var (operation, host, guest) = bench.Expect();
        Assert.Equal((Request, 80u), (operation, guest));
        bench.Send(Response, 80, host);
        var stream = await connecting.WaitAsync(Limit);
        await stream.WriteAsync("bye"u8.ToArray());
        await stream.DisposeAsync();
        Assert.Equal(ReadWrite, bench.Expect().Operation);
        Assert.Equal((Shutdown, host, 80u), bench.Expect());
        Assert.Equal(3u, bench.LastFlags);
        bench.Send(Reset, 80, host);
        bench.Send(ReadWrite, 80, host, "late"u8);
        Assert.Equal((Reset, host, 80u), bench.Expect()); // no such connection any more
    }

    [Fact]
    public async Task NothingIsWaitedForAfterTheEnd()
    {
        using var bench = new Bench();
        bench.Device.Dispose();
        await Assert.ThrowsAsync<ObjectDisposedException>(() => bench.Device.ConnectAsync(80).WaitAsync(Limit));
        Assert.Throws<ObjectDisposedException>(() => bench.Device.Listen(80));
    }

    [Fact]
    public async Task RefusalsReachBothSides()
    {
        using var bench = new Bench();
        bench.Send(Request, 5000, 99);
        Assert.Equal((Reset, 99u, 5000u), bench.Expect());
        bench.Send(Reset, 5000, 99); // is never answered
        bench.Send(0, 5000, 99);
        Assert.Equal((Reset, 99u, 5000u), bench.Expect());
        var connecting = bench.Device.ConnectAsync(80);
        var (_, host, _) = bench.Expect();
        bench.Send(Reset, 80, host);
        await Assert.ThrowsAsync<IOException>(() => connecting.WaitAsync(Limit));
        using var given = new CancellationTokenSource();
        var other = bench.Device.ConnectAsync(80, given.Token);
        bench.Expect();
        given.Cancel();
        await Assert.ThrowsAnyAsync<OperationCanceledException>(() => other.WaitAsync(Limit));
        Assert.Equal(Reset, bench.Expect().Operation);
        Assert.Throws<KvmSharpException>(() =>
        {
            bench.Device.Listen(5);
            bench.Device.Listen(5);
        });
    }

    [Fact]
    public async Task CreditIsKeptOnBothSides()
    {
        using var bench = new Bench();
        using var listener = bench.Device.Listen(1);
        bench.Send(Request, 2, 1, bufferSize: 10);
        bench.Expect();
        await using var stream = await listener.AcceptAsync().WaitAsync(Limit);
        await stream.WriteAsync(new byte[25]);
        Assert.Equal(ReadWrite, bench.Expect().Operation);
        Assert.Equal(10, bench.LastPayload.Length);
        Assert.Null(bench.TryReceive());
        bench.Send(CreditUpdate, 2, 1, bufferSize: 10, forwarded: 10);
        bench.Expect();
        Assert.Equal(10, bench.LastPayload.Length);
        bench.Send(CreditUpdate, 2, 1, bufferSize: 10, forwarded: 99); // more than it got
        Assert.Null(bench.TryReceive());
        bench.Send(CreditUpdate, 2, 1, bufferSize: 10, forwarded: 20);
        bench.Expect();
        Assert.Equal(5, bench.LastPayload.Length);

        bench.Send(CreditRequest, 2, 1, bufferSize: 10, forwarded: 25);
        Assert.Equal(CreditUpdate, bench.Expect().Operation);
        for (var i = 0; i < 16; i++)
        {
            bench.Send(ReadWrite, 2, 1, new byte[4096]);
        }
        Assert.Null(bench.TryReceive());
        await stream.ReadExactlyAsync(new byte[40_000]).AsTask().WaitAsync(Limit);
        Assert.Equal(CreditUpdate, bench.Expect().Operation);
        Assert.Equal(40_000u, bench.LastForwarded);
        for (var i = 0; i < 16; i++)
        {
            bench.Send(ReadWrite, 2, 1, new byte[4096]); // far more than there is room for
        }
        Assert.Equal(Reset, bench.Expect().Operation);
        await Assert.ThrowsAsync<IOException>(async () =>
        {
            while (await stream.ReadAsync(new byte[4096]).AsTask().WaitAsync(Limit) != 0)
            {
            }
        });
    }

    [Fact]
    public async Task DriverResetBreaksConnections()
    {
        using var bench = new Bench();
        using var listener = bench.Device.Listen(1);
        bench.Send(Request, 2, 1);
        bench.Expect();
        await using var stream = await listener.AcceptAsync().WaitAsync(Limit);
        var reading = stream.ReadAsync(new byte[1]).AsTask();
        bench.Device.SetStatus(VirtioStatus.None);
        await Assert.ThrowsAsync<IOException>(() => reading.WaitAsync(Limit));
        await Assert.ThrowsAsync<IOException>(() => bench.Device.ConnectAsync(1));
    }

    [Fact]
    public void LoadedMachineLearnsThatConnectionsAreGone()
    {
        using var bench = new Bench();
        var room = bench.Driver.Writable(8);
        bench.Driver.Rings[2].Add(room);
        var writer = new StateWriter();
        bench.Device.Save(writer);
        bench.Device.Load(new StateReader(writer.ToArray()));
        bench.Device.Notify();
        Assert.Equal(4u, bench.Driver.Rings[2].Take()!.Value.Written);
        Assert.Equal(0u, BitConverter.ToUInt32(bench.Driver.Content(room)));
    }

    [Fact]
    public void StrangersAndBrokenPacketsDoNoHarm()
    {
        using var bench = new Bench();
        bench.Send(Request, 2, 1, source: 9);
        Assert.Null(bench.TryReceive());
        bench.Send(Request, 2, 1, type: 2);
        Assert.Equal(Reset, bench.Expect().Operation);
        bench.Driver.Rings[1].Add(bench.Driver.Readable(new byte[43]));
        bench.Driver.Rings[1].Notify();
        Assert.True(bench.Driver.NeedsReset);
        Assert.Throws<KvmSharpException>(() => new VirtioVsock(new VirtioVsockOptions(2)));
    }

    [Theory]
    [InlineData(1)]
    [InlineData(2)]
    public async Task RandomPacketsDoNoHarm(int seed)
    {
        using var bench = new Bench();
        var random = new Random(seed);
        using var listener = bench.Device.Listen(1);
        for (var i = 0; i < 3000; i++)
        {
            bench.Send((ushort)random.Next(9), (uint)random.Next(300), (uint)random.Next(3), new byte[random.Next(3) * 2000],
                flags: (uint)random.Next(4), bufferSize: (uint)random.Next(100_000), forwarded: (uint)random.Next(100_000));
            while (bench.TryReceive() is not null)
            {
            }
            using var now = new CancellationTokenSource();
            var accepting = listener.AcceptAsync(now.Token);
            if (!accepting.IsCompleted)
            {
                now.Cancel();
                await Assert.ThrowsAnyAsync<OperationCanceledException>(() => accepting);
                continue;
            }
            var stream = await accepting;
            try
            {
                await stream.WriteAsync(new byte[100]).AsTask().WaitAsync(Limit);
            }
            catch (IOException)
            {
            }
            if (random.Next(2) == 0)
            {
                await stream.DisposeAsync();
            }
        }
        Assert.False(bench.Driver.NeedsReset);
    }

    private sealed class Bench : IDisposable
    {
        private readonly List<Buffer> _room = [];

        public Bench()
        {
            Device = new VirtioVsock(new VirtioVsockOptions(7));
            Driver = new VirtioDriver(Device, queueSize: 32);
            for (var i = 0; i < 16; i++)
            {
                _room.Add(Driver.Writable(44 + 4096));
                Driver.Rings[0].Add(_room[i]);
            }
        }

        public VirtioVsock Device { get; }

        public VirtioDriver Driver { get; }

        public byte[] LastPayload { get; private set; } = [];

        public uint LastFlags { get; private set; }

        public uint LastForwarded { get; private set; }

        public void Send(ushort operation, uint guest, uint host, ReadOnlySpan<byte> payload = default, uint flags = 0,
            uint bufferSize = 65536, uint forwarded = 0, ulong source = 7, ushort type = 1)
        {
            byte[] packet =
            [
                .. BitConverter.GetBytes(source), .. BitConverter.GetBytes(2UL), .. BitConverter.GetBytes(guest), .. BitConverter.GetBytes(host),
                .. BitConverter.GetBytes((uint)payload.Length), .. BitConverter.GetBytes(type), .. BitConverter.GetBytes(operation),
                .. BitConverter.GetBytes(flags), .. BitConverter.GetBytes(bufferSize), .. BitConverter.GetBytes(forwarded), .. payload,
            ];
            Driver.Memory.Write(0x1c0_0000, packet);
            Driver.Rings[1].Exchange(new Buffer(0x1c0_0000, (uint)packet.Length, false));
        }

        public (ushort Operation, uint Host, uint Guest) Expect()
        {
            (ushort, uint, uint)? packet = null;
            SpinWait.SpinUntil(() => (packet = TryReceive()) is not null, Limit);
            Assert.NotNull(packet);
            return packet.Value;
        }

        public (ushort Operation, uint Host, uint Guest)? TryReceive()
        {
            Driver.RunTimers();
            if (Driver.Rings[0].Take() is not var (head, written))
            {
                return null;
            }
            var buffer = _room.First(b => b.Address == Driver.Memory.Read<ulong>(Driver.Rings[0].Descriptors + 16UL * (uint)head));
            var data = Driver.Content(buffer)[..(int)written];
            Driver.Rings[0].Offer(head);
            Driver.Rings[0].Notify();
            Assert.Equal((2UL, 7UL), (BitConverter.ToUInt64(data), BitConverter.ToUInt64(data, 8)));
            Assert.Equal((uint)data.Length - 44, BitConverter.ToUInt32(data, 24));
            LastPayload = data[44..];
            LastFlags = BitConverter.ToUInt32(data, 32);
            LastForwarded = BitConverter.ToUInt32(data, 40);
            return (BitConverter.ToUInt16(data, 30), BitConverter.ToUInt32(data, 16), BitConverter.ToUInt32(data, 20));
        }

        public void Dispose() => Driver.Dispose();
    }
}
