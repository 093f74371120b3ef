namespace KvmSharp.Tests.Buses;

public sealed class IoBusTests
{
    private readonly IoBus _bus = new("port", 0xffff);

    [Fact]
    public void AccessGoesToTheDeviceWithItsOffset()
    {
        var device = new RecordingDevice(8);
        _bus.Map(device, 0x100, 8);
        Assert.True(_bus.Write(0x104, [1, 2]));
        Assert.Equal(["w4:0102"], device.Log);
        Span<byte> data = [0, 0];
        Assert.True(_bus.Read(0x106, data));
        Assert.Equal([0x06, 0x07], data.ToArray());
    }

    [Fact]
    public void NothingAnswersAllOnes()
    {
        Span<byte> data = [0, 0, 0, 0];
        Assert.False(_bus.Read(0x500, data));
        Assert.Equal([0xff, 0xff, 0xff, 0xff], data.ToArray());
        Assert.False(_bus.Write(0x500, data));
    }

    [Fact]
    public void WideAccessIsBrokenIntoAlignedPieces()
    {
        var device = new RecordingDevice(2);
        _bus.Map(device, 0x101, 16);
        _bus.Write(0x102, [1, 2, 3, 4]);
        Assert.Equal(["w1:01", "w2:0203", "w4:04"], device.Log);
    }

    [Fact]
    public void AccessAcrossABorderReachesBothSides()
    {
        var low = new RecordingDevice(8);
        var high = new RecordingDevice(8);
        _bus.Map(low, 0x100, 2);
        _bus.Map(high, 0x103, 1);
        _bus.Write(0x100, [1, 2, 3, 4]);
        Assert.Equal(["w0:0102"], low.Log);
        Assert.Equal(["w0:04"], high.Log);
        Span<byte> data = [0, 0, 0, 0];
        Assert.True(_bus.Read(0x100, data));
        Assert.Equal([0x00, 0x01, 0xff, 0x00], data.ToArray());
    }

    [Fact]
    public void AccessBeyondTheLastAddressReadsOnes()
    {
        var device = new RecordingDevice(8);
        _bus.Map(device, 0xfffe, 2);
        Span<byte> data = [0, 0, 0, 0];
        Assert.True(_bus.Read(0xfffe, data));
        Assert.Equal([0x00, 0x01, 0xff, 0xff], data.ToArray());

        var mmio = new IoBus("MMIO", ulong.MaxValue);
        mmio.Map(device, ulong.MaxValue - 3, 4);
        Assert.True(mmio.Read(ulong.MaxValue - 1, data));
        Assert.Equal([0x02, 0x03, 0xff, 0xff], data.ToArray());
        mmio.Map(device, 0, ulong.MaxValue - 3);
        Assert.True(mmio.Write(ulong.MaxValue - 5, [1, 2, 3, 4]));
    }

    [Theory]
    [InlineData(0x100, 8)]
    [InlineData(0x0ff, 2)]
    [InlineData(0x107, 1)]
    [InlineData(0x107, 100)]
    [InlineData(0x000, 0x10000)]
    public void OverlapsAreRefused(ulong address, ulong length)
    {
        _bus.Map(new RecordingDevice(8), 0x100, 8);
        var e = Assert.Throws<KvmSharpException>(() => _bus.Map(new RecordingDevice(8), address, length));
        Assert.Equal(KvmSharpErrorCode.Overlap, e.ErrorCode);
        _bus.Map(new RecordingDevice(8), 0x108, 8);
        _bus.Map(new RecordingDevice(8), 0x0f8, 8);
    }

    [Fact]
    public void InvalidRangesAreRefused()
    {
        var device = new RecordingDevice(8);
        Assert.Throws<ArgumentOutOfRangeException>(() => _bus.Map(device, 0, 0));
        Assert.Throws<KvmSharpException>(() => _bus.Map(device, 0x10000, 1));
        Assert.Throws<KvmSharpException>(() => _bus.Map(device, 0xffff, 2));
        Assert.Throws<KvmSharpException>(() => _bus.Map(device, 1, ulong.MaxValue));
        Assert.Throws<KvmSharpException>(() => _bus.Map(new RecordingDevice(3), 0, 1));
        Assert.Empty(_bus.Mappings);
    }

    [Fact]
    public void DisposedRegistrationIsGone()
    {
        var device = new RecordingDevice(8);
        var registration = _bus.Map(device, 0x100, 8);
        _bus.Map(device, 0x200, 8);
        registration.Dispose();
        registration.Dispose();
        Assert.False(_bus.Write(0x100, [1]));
        Assert.True(_bus.Write(0x200, [1]));
    }

    [Fact]
    public async Task LookupsAndChangesMayRunAtOnce()
    {
        var fixedDevice = new RecordingDevice(8, log: false);
        _bus.Map(fixedDevice, 0x800, 8);
        using var stop = new CancellationTokenSource();
        var readers = Enumerable.Range(0, 2).Select(_ => Task.Run(() =>
        {
            var data = new byte[1];
            while (!stop.IsCancellationRequested)
            {
                Assert.True(_bus.Read(0x800, data));
            }
        })).ToArray();
        for (var i = 0; i < 2000; i++)
        {
            using var a = _bus.Map(fixedDevice, 0x100, 8);
            using var b = _bus.Map(fixedDevice, 0x900, 8);
        }
        await stop.CancelAsync();
        await Task.WhenAll(readers);
    }

    [Fact]
    public void DispatcherCompletesStringReads()
    {
        _bus.Map(new CountingDevice(), 0x10, 2);
        var data = new byte[6];
        Assert.True(ExitDispatcher.Dispatch(_bus, new IoBus("MMIO", ulong.MaxValue), VcpuExit.ForIo(0x10, false, 2, data)));
        Assert.Equal([1, 0, 2, 0, 3, 0], data);
    }

    [Fact]
    public void DispatcherKnowsPortsFromMemory()
    {
        var port = new RecordingDevice(8);
        var memory = new RecordingDevice(8);
        var mmio = new IoBus("MMIO", ulong.MaxValue);
        _bus.Map(port, 0x1000, 0x10);
        mmio.Map(memory, 0x1000, 0x10);
        Assert.True(ExitDispatcher.Dispatch(_bus, mmio, VcpuExit.ForIo(0x1000, true, 1, [1])));
        Assert.True(ExitDispatcher.Dispatch(_bus, mmio, VcpuExit.ForMmio(0x1001, true, [1, 2, 3])));
        Assert.True(ExitDispatcher.Dispatch(_bus, mmio, VcpuExit.ForMmio(0xdead_0000, true, [1])));
        Assert.False(ExitDispatcher.Dispatch(_bus, mmio, new VcpuExit { Reason = VcpuExitReason.Halt }));
        Assert.Equal(["w0:01"], port.Log);
        Assert.Equal(["w1:010203"], memory.Log);
    }

    private sealed class RecordingDevice(int maxAccessSize, bool log = true) : IIoDevice
    {
        public List<string> Log { get; } = [];

        public int MaxAccessSize => maxAccessSize;

        public void Read(ulong offset, Span<byte> data)
        {
            for (var i = 0; i < data.Length; i++)
            {
                data[i] = (byte)(offset + (ulong)i);
            }
        }

        public void Write(ulong offset, ReadOnlySpan<byte> data)
        {
            if (log)
            {
                Log.Add($"w{offset}:{Convert.ToHexString(data)}");
            }
        }
    }

    private sealed class CountingDevice : IIoDevice
    {
        private byte _count;

        public void Read(ulong offset, Span<byte> data)
        {
            data.Clear();
            data[0] = ++_count;
        }

        public void Write(ulong offset, ReadOnlySpan<byte> data)
        {
        }
    }
}
