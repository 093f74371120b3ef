using System.Text;
using KvmSharp.Devices.Virtio;
using KvmSharp.Storage;

namespace KvmSharp.Tests.Devices.Virtio;

public sealed class VirtioBlockTests
{
    private const ulong FlushFeature = 1UL << 9;
    private const ulong DiscardFeature = 1UL << 13;

    [Fact]
    public void ReadsAndWritesWhatIsOnTheDisk()
    {
        var disk = new TestDisk(1 << 20);
        using var driver = Start(disk);
        var content = Enumerable.Range(0, 4096).Select(i => (byte)(i * 7)).ToArray();
        Assert.Equal((0, 1u), Transfer(driver, 1, 16, driver.Readable(content)));
        Assert.Equal(content, disk.Data[(16 * 512)..(16 * 512 + 4096)]);
        var target = driver.Writable(4096);
        Assert.Equal((0, 4097u), Transfer(driver, 0, 16, target));
        Assert.Equal(content, driver.Content(target));
        Assert.Equal(0, disk.Flushes);
    }

    [Fact]
    public void DataMayBeInManyPieces()
    {
        var disk = new TestDisk(1 << 20);
        Random.Shared.NextBytes(disk.Data);
        using var driver = Start(disk, queueSize: 64);
        var pieces = new uint[] { 1, 511, 3, 20_000, 600, 37, 1000, 32768 + 512 - 8 }.Select(driver.Writable).ToList();
        var total = (int)pieces.Sum(p => p.Length);
        total -= total % 512;
        pieces[^1] = pieces[^1] with { Length = pieces[^1].Length - (uint)((int)pieces.Sum(p => p.Length) - total) };
        Assert.Equal((0, (uint)total + 1), Transfer(driver, 0, 3, [.. pieces]));
        Assert.Equal(disk.Data[(3 * 512)..(3 * 512 + total)], pieces.SelectMany(driver.Content));
    }

    [Fact]
    public void LongRequestsTakeSeveralPassesAndSurviveASave()
    {
        var disk = new TestDisk(20 << 20);
        new Random(5).NextBytes(disk.Data);
        using var driver = Start(disk);
        var target = new Buffer(0x80_0000, 16 << 20, true);
        var status = new Buffer(0x40_0000, 1, true);
        driver.Rings[0].Add(Header(driver, 0, 8), target, status);
        driver.Rings[0].Notify();
        Assert.Equal(0, driver.Rings[0].UsedIndex);
        var writer = new StateWriter();
        driver.Device.Save(writer);
        driver.Device.Load(new StateReader(writer.ToArray()));
        for (var pass = 0; pass < 10; pass++)
        {
            driver.RunTimers();
        }
        Assert.Equal((0, (16u << 20) + 1), driver.Rings[0].Take());
        Assert.True(disk.Data.AsSpan(4096, 16 << 20).SequenceEqual(driver.Content(target)));
        Assert.Equal(1, driver.QueueSignals[0]);

        driver.Device.Load(new StateReader(writer.ToArray())); // under way; and then reset
        driver.Device.SetStatus(VirtioStatus.None);
        driver.RunTimers();
        Assert.Equal(VirtioStatus.None, driver.Device.Status);
    }

    [Theory]
    [InlineData(0u, 2048UL, 512u)] // beyond the end
    [InlineData(0u, 2047UL, 1024u)]
    [InlineData(0u, ulong.MaxValue, 512u)]
    [InlineData(0u, 1UL << 55, 512u)]
    [InlineData(0u, 0UL, 100u)] // no whole sector
    [InlineData(1u, 2048UL, 512u)]
    [InlineData(1u, 0UL, 700u)]
    public void BadRequestsFail(uint type, ulong sector, uint length)
    {
        using var driver = Start(new TestDisk(1 << 20));
        var data = type == 0 ? driver.Writable(length) : driver.Readable(new byte[length]);
        Assert.Equal(1, Transfer(driver, type, sector, data).Status);
        Assert.False(driver.NeedsReset);
    }

    [Fact]
    public void RequestsWithoutFrameNeedAReset()
    {
        using var driver = Start(new TestDisk(1 << 20));
        driver.Rings[0].Add(driver.Readable(new byte[15]), driver.Writable(1));
        driver.Rings[0].Notify();
        Assert.True(driver.NeedsReset);
        Restart(driver);
        driver.Rings[0].Add(driver.Readable(new byte[16]));
        driver.Rings[0].Notify();
        Assert.True(driver.NeedsReset);
    }

    [Fact]
    public void UnknownAndUnnegotiatedRequestsAreUnsupported()
    {
        using var driver = Start(new TestDisk(1 << 20), features: ~(FlushFeature | DiscardFeature));
        foreach (var type in new uint[] { 2, 4, 10, 11, 99 })
        {
            Assert.Equal(2, Transfer(driver, type, 0, driver.Readable(new byte[16])).Status);
        }
    }

    [Fact]
    public void ErrorsOfTheBackendReachTheGuest()
    {
        var disk = new TestDisk(1 << 20) { Broken = true };
        using var driver = Start(disk);
        Assert.Equal(1, Transfer(driver, 0, 0, driver.Writable(512)).Status);
        Assert.Equal(1, Transfer(driver, 1, 0, driver.Readable(new byte[512])).Status);
        Assert.Equal(1, Transfer(driver, 4, 0).Status);
    }

    [Fact]
    public void FlushesWhenAskedOrWhenTheDriverCannot()
    {
        var disk = new TestDisk(1 << 20);
        using (var driver = Start(disk))
        {
            Assert.Equal((0, 1u), Transfer(driver, 4, 0));
            Assert.Equal(1, disk.Flushes);
            driver.Device.WriteConfig(32, [0]); // write-through
            Transfer(driver, 1, 0, driver.Readable(new byte[512]));
            Assert.Equal(2, disk.Flushes);
            driver.Device.WriteConfig(32, [1]);
            Transfer(driver, 1, 0, driver.Readable(new byte[512]));
            Assert.Equal(2, disk.Flushes);
        }
        using var plain = Start(disk, features: ~FlushFeature);
        Transfer(plain, 1, 0, plain.Readable(new byte[512]));
        Assert.Equal(3, disk.Flushes);
    }

    [Fact]
    public void DiscardsAndZeroes()
    {
        var disk = new TestDisk(1 << 20);
        disk.Data.AsSpan().Fill(0x55);
        using var driver = Start(disk);
        Assert.Equal(0, Transfer(driver, 11, 0, driver.Readable([.. Range(8, 8, 0), .. Range(32, 8, 0)])).Status);
        Assert.Equal([(4096L, 4096L), (16384L, 4096L)], disk.Discards);
        Assert.Equal(0, Transfer(driver, 13, 0, driver.Readable(Range(1, 2, 1))).Status);
        Assert.Equal(0x55, disk.Data[511]);
        Assert.All(disk.Data[512..1536], b => Assert.Equal(0, b));
        Assert.Equal(0x55, disk.Data[1536]);
        Assert.Equal(2, Transfer(driver, 11, 0, driver.Readable(Range(1, 2, 1))).Status); // unmap is for zeroes
        Assert.Equal(2, Transfer(driver, 13, 0, driver.Readable(Range(1, 2, 2))).Status);
        Assert.Equal(1, Transfer(driver, 13, 0, driver.Readable(Range(2047, 2, 0))).Status);
        Assert.Equal(1, Transfer(driver, 13, 0, driver.Readable(Range(0, uint.MaxValue, 0))).Status);
        Assert.Equal(1, Transfer(driver, 13, 0, driver.Readable(new byte[17])).Status);
        Assert.Equal(1, Transfer(driver, 13, 0, driver.Readable(new byte[16 * 17])).Status);

        static byte[] Range(ulong sector, uint count, uint flags) =>
            [.. BitConverter.GetBytes(sector), .. BitConverter.GetBytes(count), .. BitConverter.GetBytes(flags)];
    }

    [Fact]
    public void SerialNumberFillsTwentyBytes()
    {
        using var driver = Start(new TestDisk(1 << 20), o => o with { SerialNumber = "disk-7" });
        var target = driver.Writable(20);
        Assert.Equal((0, 21u), Transfer(driver, 8, 0, target));
        Assert.Equal("disk-7".PadRight(20, '\0'), Encoding.ASCII.GetString(driver.Content(target)));
    }

    [Fact]
    public void ReadOnlyDisksSaySo()
    {
        var disk = new TestDisk(1 << 20);
        using var driver = Start(disk, o => o with { ReadOnly = true });
        Assert.NotEqual(0UL, driver.Device.OfferedFeatures & 1UL << 5);
        Assert.Equal(0UL, driver.Device.OfferedFeatures & DiscardFeature);
        Assert.Equal(1, Transfer(driver, 1, 0, driver.Readable([.. Enumerable.Repeat((byte)1, 512)])).Status);
        Assert.Equal(0, disk.Data[0]);
    }

    [Fact]
    public void EveryQueueWorks()
    {
        var disk = new TestDisk(1 << 20);
        using var driver = Start(disk, o => o with { QueueCount = 4 });
        Assert.Equal(4, driver.Rings.Length);
        for (var queue = 0; queue < 4; queue++)
        {
            disk.Data[queue * 512] = (byte)(queue + 1);
            var target = driver.Writable(512);
            driver.Rings[queue].Exchange(Header(driver, 0, (ulong)queue), target, driver.Writable(1));
            Assert.Equal(queue + 1, driver.Content(target)[0]);
            Assert.Equal(1, driver.QueueSignals[queue]);
        }
    }

    [Fact]
    public void ConfigurationDescribesTheDisk()
    {
        var disk = new TestDisk(1 << 20) { Sector = 4096 };
        using var driver = Start(disk);
        var config = new byte[60];
        driver.Device.ReadConfig(0, config);
        Assert.Equal(2048UL, BitConverter.ToUInt64(config));
        Assert.Equal(4096u, BitConverter.ToUInt32(config, 20));
        Assert.Equal(1, config[32]);
        Assert.Equal(0, Transfer(driver, 0, 8, driver.Writable(4096)).Status);
        Assert.Equal(1, Transfer(driver, 0, 1, driver.Writable(4096)).Status);
        Assert.Equal(1, Transfer(driver, 0, 0, driver.Writable(512)).Status);
        driver.Device.ReadConfig(58, config.AsSpan(0, 8));
        Assert.All(config[..8], b => Assert.Equal(0, b));
        driver.Device.ReadConfig(ulong.MaxValue, config.AsSpan(0, 8));
    }

    [Fact]
    public void OptionsAreChecked()
    {
        var disk = new TestDisk(512);
        Assert.Throws<KvmSharpException>(() => new VirtioBlock(new VirtioBlockOptions(disk) { QueueCount = 0 }));
        Assert.Throws<KvmSharpException>(() => new VirtioBlock(new VirtioBlockOptions(disk) { QueueCount = 17 }));
        Assert.Throws<KvmSharpException>(() => new VirtioBlock(new VirtioBlockOptions(disk) { SerialNumber = new string('x', 21) }));
        Assert.Throws<KvmSharpException>(() => new VirtioBlock(new VirtioBlockOptions(disk) { SerialNumber = "ä" }));
    }

    private static VirtioDriver Start(
        TestDisk disk, Func<VirtioBlockOptions, VirtioBlockOptions>? change = null, ulong features = VirtioDriver.AllFeatures, int queueSize = 16)
    {
        var options = new VirtioBlockOptions(disk);
        return new VirtioDriver(new VirtioBlock(change?.Invoke(options) ?? options), features, queueSize);
    }

    private static void Restart(VirtioDriver driver)
    {
        driver.Negotiate();
        driver.Rings[0].Enable();
        driver.Ready();
    }

    private static Buffer Header(VirtioDriver driver, uint type, ulong sector) =>
        driver.Readable([.. BitConverter.GetBytes(type), 0, 0, 0, 0, .. BitConverter.GetBytes(sector)]);

    private static (int Status, uint Written) Transfer(VirtioDriver driver, uint type, ulong sector, params Buffer[] data)
    {
        var status = driver.Writable(1);
        var written = driver.Rings[0].Exchange([Header(driver, type, sector), .. data, status]);
        return (driver.Content(status)[0], written);
    }

    private sealed class TestDisk(int size) : IBlockBackend
    {
        public byte[] Data { get; } = new byte[size];

        public int Flushes { get; private set; }

        public List<(long Offset, long Length)> Discards { get; } = [];

        public bool Broken { get; init; }

        public int Sector { get; init; } = 512;

        public long Length => Data.Length;

        public int SectorSize => Sector;

        public BlockCapabilities Capabilities => BlockCapabilities.Discard | BlockCapabilities.WriteZeroes;

        public void Read(long offset, Span<byte> buffer)
        {
            Check();
            Data.AsSpan((int)offset, buffer.Length).CopyTo(buffer);
        }

        public void Write(long offset, ReadOnlySpan<byte> data)
        {
            Check();
            data.CopyTo(Data.AsSpan((int)offset));
        }

        public void Flush()
        {
            Check();
            Flushes++;
        }

        public void Discard(long offset, long length) => Discards.Add((offset, length));

        public void Dispose()
        {
        }

        private void Check()
        {
            if (Broken)
            {
                throw new StorageException(StorageProblem.InputOutput, "The test disk is broken.");
            }
        }
    }
}
