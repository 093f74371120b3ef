using KvmSharp.Storage;

namespace KvmSharp.Tests.Storage;

/// <summary>Every backend against an array in memory, under random requests.</summary>
public sealed class BackendModelTests : IDisposable
{
    private const int DiskSize = 3 * 1024 * 1024 + 512 * 5;

    private readonly TemporaryDirectory _directory = new();

    [Theory]
    [InlineData(512)]
    [InlineData(4096)]
    public void RawFile(int sectorSize)
    {
        var path = _directory.File("raw");
        RawBlockBackend.Create(path, DiskSize).Dispose();
        IBlockBackend Open() => new RawBlockBackend(FileImageStore.Open(path, readOnly: false), sectorSize);
        RunAndReopen(Open, 600);
    }

    [Fact]
    public void RawInMemory()
    {
        var store = new MemoryImageStore();
        store.SetLength(DiskSize);
        RunAndReopen(() => new RawBlockBackend(store), 600);
    }

    [Fact]
    public void UserDiskWithDefaults() => RunAndReopen(() => new ArrayDisk(DiskSize / 512 * 512), 300, reopen: false);

    [Fact]
    public void OverlayInMemory()
    {
        var bottom = new ArrayDisk(DiskSize / 512 * 512);
        new Random(5).NextBytes(bottom.Content);
        var before = bottom.Content.ToArray();
        RunAndReopen(() => new OverlayBlockBackend(bottom), 600, reopen: false);
        Assert.Equal(before, bottom.Content);
    }

    [Fact]
    public void OverlayInAFile()
    {
        var path = _directory.File("overlay");
        var bottom = new ArrayDisk(DiskSize / 512 * 512);
        new Random(6).NextBytes(bottom.Content);
        var before = bottom.Content.ToArray();
        Qcow2Image.CreateOverlay(path, bottom).Dispose();
        RunAndReopen(() => Qcow2Image.Open(FileImageStore.Open(path, readOnly: false), new Qcow2OpenOptions { Backing = bottom }), 600);
        Assert.Equal(before, bottom.Content);
        AssertClean(Qcow2Image.Check(path));
    }

    [Theory]
    [InlineData(65536, 3, 16)]
    [InlineData(65536, 2, 16)]
    [InlineData(4096, 3, 8)]
    [InlineData(512, 3, 1)]
    [InlineData(512, 3, 64)]
    [InlineData(1024, 3, 2)]
    [InlineData(2048, 3, 4)]
    [InlineData(1 << 20, 3, 32)]
    public void Qcow2(int clusterSize, int version, int refcountBits)
    {
        var store = new MemoryImageStore();
        Qcow2Image.Create(
            store, DiskSize, new Qcow2CreateOptions { ClusterSize = clusterSize, Version = version, RefcountBits = refcountBits });
        RunAndReopen(() => Qcow2Image.Open(store, new Qcow2OpenOptions { CacheBytes = 64 << 10 }), 400);
        AssertClean(Qcow2Image.Check(store));
    }

    [Theory]
    [InlineData("v3")]
    [InlineData("v2")]
    [InlineData("small")]
    [InlineData("large")]
    [InlineData("compressed")]
    [InlineData("compressed4k")]
    [InlineData("snapshots")]
    [InlineData("lazy")]
    [InlineData("overlay")]
    [InlineData("bitmaps")]
    public void Qcow2FromQemu(string name)
    {
        var store = new MemoryImageStore(GoldenImages.Load(name));
        RunAndReopen(() => GoldenImages.Open(name, store), 400);
        AssertClean(Qcow2Image.Check(store), leaksAllowed: name == "bitmaps");
    }

    [Fact]
    public void Qcow2GrowsItsRefcountTable()
    {
        var store = new MemoryImageStore();
        Qcow2Image.Create(store, 24 << 20, new Qcow2CreateOptions { ClusterSize = 512, RefcountBits = 64 });
        // As if it had been made for a small disk: a table of one cluster, for 64 blocks of 64 clusters of 512 bytes.
        store.Write(56, [0, 0, 0, 1]);
        Assert.Equal(0, Qcow2Image.Check(store).Errors);
        using (var disk = Qcow2Image.Open(store))
        {
            var data = new byte[64 << 10];
            for (var offset = 0L; offset < disk.Length; offset += data.Length)
            {
                Array.Fill(data, (byte)(offset >> 16));
                disk.Write(offset, data);
            }
        }
        Assert.InRange(store.ToArray()[59], 12, 40);
        using (var disk = Qcow2Image.Open(store))
        {
            var all = disk.ReadAll();
            Assert.DoesNotContain(Enumerable.Range(0, all.Length / 512), sector => (byte)(sector >> 7) != all[sector * 512]);
        }
        // The rest of the table that was made too short on purpose is nobody's.
        var result = Qcow2Image.Check(store);
        Assert.True(result.Errors == 0 && result.Leaks < 30, string.Join('\n', result.Messages));
    }

    [Fact]
    public void RequestsSideBySide()
    {
        const int Threads = 4;
        const int Share = 1 << 20;
        var path = _directory.File("parallel");
        using (var disk = Qcow2Image.Create(path, Threads * Share, new Qcow2CreateOptions { ClusterSize = 4096 }))
        {
            // Each thread has a share of its own, in pieces that lie between those of the others.
            Parallel.For(0, Threads, new ParallelOptions { MaxDegreeOfParallelism = Threads }, thread =>
            {
                var model = new DiskModel(thread, new InterleavedShare(disk, thread, Threads, Share), 20_000);
                var mine = new InterleavedShare(disk, thread, Threads, Share);
                model.Run(mine, 300);
                model.Verify(mine);
            });
        }
        AssertClean(Qcow2Image.Check(path));
    }

    public void Dispose() => _directory.Dispose();

    private static void AssertClean(ImageCheckResult result, bool leaksAllowed = false) =>
        Assert.True(result.IsClean || (leaksAllowed && result.Errors == 0), string.Join('\n', result.Messages));

    private static void RunAndReopen(Func<IBlockBackend> open, int operations, bool reopen = true)
    {
        var disk = open();
        var model = new DiskModel(operations, disk);
        for (var round = 0; round < 4; round++)
        {
            model.Run(disk, operations / 4);
            model.Verify(disk);
            if (reopen)
            {
                disk.Dispose();
                disk = open();
                model.Verify(disk);
            }
        }
        disk.Dispose();
    }

    /// <summary>Every n-th 4 KiB of a disk.</summary>
    private sealed class InterleavedShare(IBlockBackend disk, int number, int count, int length) : IBlockBackend
    {
        public long Length => length;

        public void Read(long offset, Span<byte> buffer)
        {
            for (var done = 0; done < buffer.Length;)
            {
                var (at, size) = Locate(offset + done, buffer.Length - done);
                disk.Read(at, buffer.Slice(done, size));
                done += size;
            }
        }

        public void Write(long offset, ReadOnlySpan<byte> data)
        {
            for (var done = 0; done < data.Length;)
            {
                var (at, size) = Locate(offset + done, data.Length - done);
                disk.Write(at, data.Slice(done, size));
                done += size;
            }
        }

        public void Flush() => disk.Flush();

        public void Discard(long offset, long length) => ForEach(offset, length, disk.Discard);

        public void WriteZeroes(long offset, long length, bool mayDiscard) =>
            ForEach(offset, length, (at, size) => disk.WriteZeroes(at, size, mayDiscard));

        public void Dispose()
        {
        }

        private void ForEach(long offset, long length, Action<long, long> action)
        {
            while (length > 0)
            {
                var (at, size) = Locate(offset, (int)length);
                action(at, size);
                offset += size;
                length -= size;
            }
        }

        private (long Offset, int Size) Locate(long offset, int length)
        {
            var within = (int)(offset % 4096);
            return (offset / 4096 * 4096 * count + number * 4096 + within, Math.Min(length, 4096 - within));
        }
    }
}
