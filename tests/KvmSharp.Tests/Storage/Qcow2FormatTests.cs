using System.Buffers.Binary;
using System.Text;
using KvmSharp.Storage;

namespace KvmSharp.Tests.Storage;

/// <summary>What is read from and written to qcow2 images: QEMU's own images, refused features, snapshots, backing disks.</summary>
public sealed class Qcow2FormatTests
{
    public static TheoryData<string> Names => [.. GoldenImages.Names];

    [Theory]
    [MemberData(nameof(Names))]
    public void DiskOfQemusImageIsRead(string name)
    {
        using var disk = GoldenImages.Open(name, readOnly: true);
        Assert.Equal(GoldenImages.ContentHash(name), GoldenImages.Hash(disk.ReadAll()));
    }

    [Theory]
    [InlineData("zstd", "zstd compression")]
    [InlineData("extended", "extended L2 entries")]
    [InlineData("external", "external data file")]
    public void UnsupportedFeatureIsNamed(string name, string feature)
    {
        var exception = Assert.Throws<StorageException>(() => GoldenImages.Open(name, readOnly: true));
        Assert.Equal(StorageProblem.Unsupported, exception.Problem);
        Assert.Contains(feature, exception.Message);
    }

    [Fact]
    public void UnknownFeatureIsNamedAsInTheImage()
    {
        var image = GoldenImages.Load("v3");
        image[72] = 0x80;
        AssertRefused(image, StorageProblem.Unsupported, "bit 63");

        // QEMU's table of names says what bit 0 of the incompatible features is; here it is made to speak of bit 63.
        var name = image.AsSpan().IndexOf("dirty bit"u8);
        image[name - 1] = 63;
        AssertRefused(image, StorageProblem.Unsupported, "'dirty bit'");
    }

    [Theory]
    [InlineData(4, 4, StorageProblem.Unsupported, "version 4")]
    [InlineData(20, 8, StorageProblem.Corrupt, "2^8")]
    [InlineData(20, 22, StorageProblem.Corrupt, "2^22")]
    [InlineData(32, 1, StorageProblem.Unsupported, "encryption")]
    [InlineData(36, 0, StorageProblem.Corrupt, "L1 table")]
    [InlineData(36, 0x7fffffff, StorageProblem.Unsupported, "L1 table")]
    [InlineData(44, 0x30001, StorageProblem.Corrupt, "L1 table")]
    [InlineData(56, 0x10000000, StorageProblem.Unsupported, "refcount table")]
    [InlineData(60, 0x10000000, StorageProblem.Unsupported, "snapshots")]
    [InlineData(96, 7, StorageProblem.Corrupt, "2^7")]
    [InlineData(100, 0x7fffffff, StorageProblem.Corrupt, "header")]
    [InlineData(24, 0x7fffffff, StorageProblem.Unsupported, "disk of")]
    [InlineData(0, 0, StorageProblem.UnknownFormat, "qcow2")]
    public void ImpossibleHeaderIsRefused(int offset, int value, StorageProblem problem, string text)
    {
        var image = GoldenImages.Load("v3");
        BinaryPrimitives.WriteInt32BigEndian(image.AsSpan(offset), value);
        AssertRefused(image, problem, text);
    }

    [Theory]
    [InlineData("")]
    [InlineData("QFI")]
    public void ShortFileIsNoImage(string content) => AssertRefused(Encoding.ASCII.GetBytes(content), StorageProblem.UnknownFormat, "not a qcow2 image");

    [Theory]
    [InlineData(80)]
    [InlineData(0x30000)]
    public void TruncatedImageIsRefused(int length)
    {
        using var store = new MemoryImageStore(GoldenImages.Load("v3").AsSpan(0, length));
        var exception = Assert.Throws<StorageException>(() => Qcow2Image.Open(store));
        Assert.True(exception.Problem is StorageProblem.Truncated or StorageProblem.Corrupt, exception.Message);
    }

    [Fact]
    public void DirtyImageIsReadButNotWritten()
    {
        var exception = Assert.Throws<StorageException>(() => GoldenImages.Open("dirty"));
        Assert.Equal(StorageProblem.NeedsRepair, exception.Problem);
        Assert.Contains("not closed", exception.Message);
    }

    [Fact]
    public void AutoclearBitsAreClearedBeforeWriting()
    {
        var store = new MemoryImageStore(GoldenImages.Load("bitmaps"));
        Assert.NotEqual(0, store.ToArray()[95]);
        Qcow2Image.Open(store, new Qcow2OpenOptions { ReadOnly = true }).Dispose();
        Assert.NotEqual(0, store.ToArray()[95]);
        Qcow2Image.Open(store).Dispose();
        Assert.Equal(0, store.ToArray()[95]);
    }

    [Fact]
    public void SnapshotsKeepTheirContent()
    {
        var store = new MemoryImageStore(GoldenImages.Load("snapshots"));
        using (var disk = Qcow2Image.Open(store))
        {
            Assert.Equal(["first", "second one"], disk.Snapshots.Select(snapshot => snapshot.Name));
            Assert.Equal(["1", "2"], disk.Snapshots.Select(snapshot => snapshot.Id));
            var data = new byte[disk.Length];
            Array.Fill(data, (byte)0xaa);
            disk.Write(0, data);
            disk.Discard(0, 300 << 10);
            disk.WriteZeroes(300 << 10, 100 << 10, mayDiscard: false);
        }
        var result = Qcow2Image.Check(store);
        Assert.True(result.IsClean, string.Join('\n', result.Messages));
        Assert.Equal(GoldenImages.ContentHash("snapshots", "1"), GoldenImages.Hash(ReadSnapshot(store.ToArray(), 0)));
        Assert.Equal(GoldenImages.ContentHash("snapshots", "2"), GoldenImages.Hash(ReadSnapshot(store.ToArray(), 1)));
    }

    [Fact]
    public void BackingDiskMustBeGiven()
    {
        var exception = Assert.Throws<StorageException>(() => Qcow2Image.Open(new MemoryImageStore(GoldenImages.Load("overlay"))));
        Assert.Equal(StorageProblem.BackingFile, exception.Problem);
        Assert.Contains("base.qcow2", exception.Message);
    }

    [Fact]
    public void BackingDiskMayBeShorterOrLonger()
    {
        foreach (var length in (ReadOnlySpan<int>)[100 * 512, 3 << 20])
        {
            var bottom = new ArrayDisk(length);
            Array.Fill(bottom.Content, (byte)0x5a);
            var store = new MemoryImageStore();
            Qcow2Image.Create(store, 1 << 20);
            using var disk = Qcow2Image.Open(store, new Qcow2OpenOptions { Backing = bottom });
            var present = Math.Min(length, 1 << 20);
            var content = disk.ReadAll();
            Assert.Equal(present, content.AsSpan().Count((byte)0x5a));
            Assert.False(content.AsSpan(present).ContainsAnyExcept((byte)0));
            disk.Write(0, new byte[512]);
            disk.Write(64 << 10, new byte[512]);
            Assert.Equal(present - (length > 65536 ? 1024 : 512), disk.ReadAll().AsSpan().Count((byte)0x5a));
        }
    }

    [Fact]
    public void DiscardOverABackingDiskDoesNotShowIt()
    {
        var bottom = new ArrayDisk(1 << 20);
        Array.Fill(bottom.Content, (byte)0x5a);
        var store = new MemoryImageStore();
        Qcow2Image.Create(store, 1 << 20);
        using var disk = Qcow2Image.Open(store, new Qcow2OpenOptions { Backing = bottom });
        disk.Write(0, new byte[] { 1 }.Concat(new byte[511]).ToArray());
        disk.Discard(0, 1 << 20);
        Assert.False(disk.ReadAll().AsSpan().ContainsAnyExcept((byte)0));
    }

    [Fact]
    public void DiscardGivesSpaceBack()
    {
        var store = new MemoryImageStore();
        Qcow2Image.Create(store, 64 << 20);
        using var disk = Qcow2Image.Open(store);
        var empty = store.AllocatedBytes;
        var data = new byte[16 << 20];
        new Random(1).NextBytes(data);
        disk.Write(1 << 20, data);
        disk.Flush();
        Assert.True(store.AllocatedBytes >= empty + data.Length);
        var length = store.Length;
        disk.Discard(1 << 20, data.Length);
        disk.Flush();
        Assert.InRange(store.AllocatedBytes, empty, empty + (1 << 20));
        for (var i = 0; i < 4; i++)
        {
            disk.Write(32 << 20, data);
            disk.Discard(32 << 20, data.Length);
            disk.Flush();
        }
        Assert.InRange(store.Length, length, length + (1 << 20));
    }

    [Fact]
    public void SmallWriteToNewClusterCostsLittle()
    {
        var store = new MemoryImageStore();
        Qcow2Image.Create(store, 64 << 20);
        var disk = new CountingStore(store);
        using var image = Qcow2Image.Open(disk);
        var data = new byte[4096];
        Array.Fill(data, (byte)1);
        image.Write(0, data);
        disk.Written = 0;
        for (var i = 1; i < 100; i++)
        {
            image.Write(i << 16, data);
        }
        Assert.Equal(99 * 4096, disk.Written);
        image.Flush();
        Assert.InRange(disk.Written, 99 * 4096, 99 * 4096 + 4 * 4096);
    }

    [Theory]
    [InlineData(100, 512)]
    [InlineData(0, 100)]
    [InlineData(-512, 512)]
    [InlineData(1 << 20, 512)]
    [InlineData((1 << 20) - 512, 1024)]
    [InlineData(long.MaxValue - 511, 512)]
    public void RequestOutOfRangeIsRefused(long offset, int length)
    {
        var store = new MemoryImageStore();
        Qcow2Image.Create(store, 1 << 20);
        var raw = new MemoryImageStore();
        raw.SetLength(1 << 20);
        foreach (IBlockBackend disk in new IBlockBackend[] { Qcow2Image.Open(store), new RawBlockBackend(raw), new OverlayBlockBackend(new ArrayDisk(1 << 20)) })
        {
            AssertOutOfRange(() => disk.Read(offset, new byte[length]));
            AssertOutOfRange(() => disk.Write(offset, new byte[length]));
            AssertOutOfRange(() => disk.Discard(offset, length));
            AssertOutOfRange(() => disk.WriteZeroes(offset, length, true));
            AssertOutOfRange(() => disk.GetExtent(offset, length));
        }
    }

    [Fact]
    public void ReadOnlyImageRefusesWrites()
    {
        using var disk = GoldenImages.Open("v3", readOnly: true);
        Assert.True(disk.IsReadOnly);
        Assert.Equal(BlockCapabilities.None, disk.Capabilities);
        disk.Flush();
        Assert.Equal(StorageProblem.ReadOnly, Assert.Throws<StorageException>(() => disk.Write(0, new byte[512])).Problem);
        Assert.Equal(StorageProblem.ReadOnly, Assert.Throws<StorageException>(() => disk.Discard(0, 512)).Problem);
        Assert.Equal(StorageProblem.ReadOnly, Assert.Throws<StorageException>(() => disk.WriteZeroes(0, 512, true)).Problem);
    }

    [Theory]
    [InlineData(1, 3, 16)]
    [InlineData(3000, 3, 16)]
    [InlineData(4 << 20, 3, 16)]
    [InlineData(65536, 4, 16)]
    [InlineData(65536, 3, 3)]
    [InlineData(65536, 3, 128)]
    [InlineData(65536, 2, 8)]
    public void ImpossibleOptionsAreRefused(int clusterSize, int version, int refcountBits) => Assert.ThrowsAny<ArgumentException>(
        () => Qcow2Image.Create(
            new MemoryImageStore(), 1 << 20, new Qcow2CreateOptions { ClusterSize = clusterSize, Version = version, RefcountBits = refcountBits }));

    [Fact]
    public void SizesOfNewImages()
    {
        foreach (var length in (ReadOnlySpan<long>)[0, 512, 65536, 65536 + 512, 10L << 40, 400L << 40])
        {
            var store = new MemoryImageStore();
            Qcow2Image.Create(store, length);
            using var disk = Qcow2Image.Open(store);
            Assert.Equal(length, disk.Length);
            Assert.InRange(store.AllocatedBytes, 0, 9 << 20);
            if (length > 0)
            {
                disk.Write(length - 512, Enumerable.Repeat((byte)9, 512).ToArray());
                disk.Flush();
                Assert.True(Qcow2Image.Check(store).IsClean);
            }
        }
        var exception = Assert.Throws<StorageException>(
            () => Qcow2Image.Create(new MemoryImageStore(), 1L << 40, new Qcow2CreateOptions { ClusterSize = 512 }));
        Assert.Equal(StorageProblem.Unsupported, exception.Problem);
    }

    [Fact]
    public void FullStoreIsAnErrorOfTheRequestOnly()
    {
        var store = new MemoryImageStore(1 << 20);
        Qcow2Image.Create(store, 64 << 20);
        using var disk = Qcow2Image.Open(store);
        var data = new byte[65536];
        Array.Fill(data, (byte)1);
        var written = 0;
        var exception = Assert.Throws<StorageException>(() =>
        {
            for (; written < 1000; written++)
            {
                disk.Write(written << 16, data);
            }
        });
        Assert.Equal(StorageProblem.NoSpace, exception.Problem);
        Assert.InRange(written, 5, 15);
        disk.Flush();
        disk.Discard(0, 65536);
        disk.Flush();
        disk.Write(written << 16, data);
        disk.Flush();
        Assert.True(Qcow2Image.Check(store).IsClean);
    }

    [Fact]
    public void FailedFlushIsNotForgotten()
    {
        var inner = new MemoryImageStore();
        Qcow2Image.Create(inner, 1 << 20);
        var store = new CountingStore(inner);
        using var disk = Qcow2Image.Open(store);
        disk.Write(0, new byte[512]);
        store.FailFlush = true;
        Assert.Equal(StorageProblem.InputOutput, Assert.Throws<StorageException>(disk.Flush).Problem);
        store.FailFlush = false;
        Assert.Contains("earlier error", Assert.Throws<StorageException>(disk.Flush).Message);
        Assert.Throws<StorageException>(() => disk.Write(0, new byte[512]));
        disk.Read(0, new byte[512]);
    }

    private static void AssertRefused(byte[] image, StorageProblem problem, string text)
    {
        var exception = Assert.Throws<StorageException>(() => Qcow2Image.Open(new MemoryImageStore(image)));
        Assert.Equal(problem, exception.Problem);
        Assert.Contains(text, exception.Message);
        Assert.Equal(KvmSharpErrorCode.Storage, exception.ErrorCode);
    }

    private static void AssertOutOfRange(Action action) =>
        Assert.Equal(StorageProblem.OutOfRange, Assert.Throws<StorageException>(action).Problem);

    /// <summary>Reads the disk of a snapshot by letting the header refer to its L1 table.</summary>
    private static byte[] ReadSnapshot(byte[] image, int number)
    {
        var table = (int)BinaryPrimitives.ReadInt64BigEndian(image.AsSpan(64));
        for (; number > 0; number--)
        {
            var entry = image.AsSpan(table);
            var length = 40 + BinaryPrimitives.ReadInt16BigEndian(entry[12..]) + BinaryPrimitives.ReadInt16BigEndian(entry[14..])
                + BinaryPrimitives.ReadInt32BigEndian(entry[36..]);
            table += (length + 7) & ~7;
        }
        image.AsSpan(table, 8).CopyTo(image.AsSpan(40));
        using var disk = Qcow2Image.Open(new MemoryImageStore(image, isReadOnly: true));
        return disk.ReadAll();
    }

    private sealed class CountingStore(MemoryImageStore inner) : IImageStore
    {
        public long Written { get; set; }

        public bool FailFlush { get; set; }

        public long Length => inner.Length;

        public bool IsReadOnly => inner.IsReadOnly;

        public void Read(long offset, Span<byte> buffer) => inner.Read(offset, buffer);

        public void Write(long offset, ReadOnlySpan<byte> data)
        {
            Written += data.Length;
            inner.Write(offset, data);
        }

        public void SetLength(long length) => inner.SetLength(length);

        public void Flush()
        {
            if (FailFlush)
            {
                throw new StorageException(StorageProblem.InputOutput, "made to fail");
            }
        }

        public void Dispose()
        {
        }
    }
}
