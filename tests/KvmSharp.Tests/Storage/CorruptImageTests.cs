using System.Buffers.Binary;
using KvmSharp.Storage;

namespace KvmSharp.Tests.Storage;

/// <summary>
/// Damaged and malicious qcow2 images. Whatever is done with one, the outcome is data or a <see cref="StorageException"/>, in
/// little time and memory.
/// </summary>
public sealed class CorruptImageTests
{
    private const int ImagesPerKind = 130;
    private const long MaxAllocation = 64 << 20;

    public static TheoryData<string> Names => ["v3", "small", "v2", "snapshots", "compressed4k", "overlay", "lazy", "bitmaps"];

    // 8 * 130 = 1040 images.
    [Theory]
    [MemberData(nameof(Names))]
    public void DamagedImageGivesDataOrAnError(string name)
    {
        var original = GoldenImages.Load(name);
        var tables = FindTables(original);
        var opened = 0;
        for (var seed = 0; seed < ImagesPerKind; seed++)
        {
            var random = new Random(seed);
            var image = Damage(original, tables, random);
            var start = ThreadTime.Now;
            var allocated = GC.GetAllocatedBytesForCurrentThread();
            try
            {
                opened += Use(name, image, random) ? 1 : 0;
            }
            catch (Exception exception) when (exception is not Xunit.Sdk.XunitException)
            {
                Assert.Fail($"{name}, seed {seed}: {exception}");
            }
            Assert.InRange(GC.GetAllocatedBytesForCurrentThread() - allocated, 0, MaxAllocation);
            Assert.InRange(ThreadTime.Now - start, TimeSpan.Zero, TimeSpan.FromSeconds(5));
        }
        Assert.InRange(opened, ImagesPerKind / 10, ImagesPerKind);
    }

    [Theory]
    [InlineData(0)]
    [InlineData(1)]
    [InlineData(511)]
    [InlineData(512)]
    [InlineData(100_000)]
    public void RawFileOfAnyLengthIsADisk(int length)
    {
        var content = new byte[length];
        Array.Fill(content, (byte)1);
        var store = new MemoryImageStore(content);
        using var disk = new RawBlockBackend(store);
        Assert.Equal((length + 511) / 512 * 512, disk.Length);
        Assert.Equal(length, disk.ReadAll().AsSpan().Count((byte)1));
        if (length > 0)
        {
            disk.Write(disk.Length - 512, new byte[512]);
            Assert.Equal(disk.Length, store.Length);
        }
    }

    [Fact]
    public void HugeSparseImageTakesLittleMemory()
    {
        // A file of 2^55 bytes without anything but the tables that are needed to open it.
        var store = new MemoryImageStore();
        Qcow2Image.Create(store, 1L << 50, new Qcow2CreateOptions { ClusterSize = 2 << 20 });
        store.SetLength(1L << 55);
        var allocated = GC.GetAllocatedBytesForCurrentThread();
        using (var disk = Qcow2Image.Open(store))
        {
            disk.Read(1L << 49, new byte[4096]);
            disk.Write(1L << 49, new byte[4096]);
            disk.Discard(0, 1L << 50);
            disk.Flush();
        }
        Assert.Equal(StorageProblem.Unsupported, Assert.Throws<StorageException>(() => Qcow2Image.Check(store)).Problem);
        Assert.InRange(GC.GetAllocatedBytesForCurrentThread() - allocated, 0, MaxAllocation);
    }

    [Fact]
    public void ManySnapshotsOfTheSameTablesAreCountedOnce()
    {
        // 15 million references to one L2 table.
        const int Count = 30_000;
        const int L1Entries = 500;
        const int Cluster = 4096;
        var source = new MemoryImageStore();
        Qcow2Image.Create(source, 4L << 20, new Qcow2CreateOptions { ClusterSize = Cluster });
        var image = source.ToArray();
        var start = (image.Length + Cluster - 1) / Cluster * Cluster;
        Array.Resize(ref image, start + 2 * Cluster + Count * 40);
        BinaryPrimitives.WriteInt32BigEndian(image.AsSpan(60), Count);
        BinaryPrimitives.WriteInt64BigEndian(image.AsSpan(64), start + 2 * Cluster);
        for (var i = 0; i < L1Entries; i++)
        {
            BinaryPrimitives.WriteInt64BigEndian(image.AsSpan(start + i * 8), start + Cluster);
        }
        for (var i = 0; i < Count; i++)
        {
            var entry = image.AsSpan(start + 2 * Cluster + i * 40);
            BinaryPrimitives.WriteInt64BigEndian(entry, start);
            BinaryPrimitives.WriteInt32BigEndian(entry[8..], L1Entries);
        }
        var store = new MemoryImageStore(image);
        var begin = ThreadTime.Now;
        var exception = Record.Exception(() => Qcow2Image.Check(store));
        Assert.True(exception is null or StorageException);
        Assert.InRange(ThreadTime.Now - begin, TimeSpan.Zero, TimeSpan.FromSeconds(10));
    }

    /// <summary>The places of an image where damage means something: header, L1, L2 and refcount tables, snapshots.</summary>
    private static List<(int Offset, int Length)> FindTables(byte[] image)
    {
        const ulong OffsetMask = 0x00ff_ffff_ffff_fe00;
        var tables = new List<(int, int)> { (0, 120) };
        var cluster = 1 << image[23];
        var l1 = (int)BinaryPrimitives.ReadInt64BigEndian(image.AsSpan(40));
        var entries = BinaryPrimitives.ReadInt32BigEndian(image.AsSpan(36));
        tables.Add((l1, entries * 8));
        for (var i = 0; i < entries; i++)
        {
            if ((BinaryPrimitives.ReadUInt64BigEndian(image.AsSpan(l1 + i * 8)) & OffsetMask) is var l2 and not 0)
            {
                tables.Add(((int)l2, Math.Min(cluster, 1024)));
            }
        }
        var refcounts = (int)BinaryPrimitives.ReadInt64BigEndian(image.AsSpan(48));
        tables.Add((refcounts, 64));
        tables.Add(((int)BinaryPrimitives.ReadInt64BigEndian(image.AsSpan(refcounts)), 512));
        if (BinaryPrimitives.ReadInt32BigEndian(image.AsSpan(60)) > 0)
        {
            tables.Add(((int)BinaryPrimitives.ReadInt64BigEndian(image.AsSpan(64)), 160));
        }
        return tables;
    }

    private static byte[] Damage(byte[] original, List<(int Offset, int Length)> tables, Random random)
    {
        var image = original.ToArray();
        for (var count = random.Next(1, 4); count > 0; count--)
        {
            var (offset, length) = tables[random.Next(tables.Count)];
            var at = offset + random.Next(length);
            var entry = image.AsSpan(offset + random.Next(length / 8) * 8, 8);
            switch (random.Next(7))
            {
                case 0:
                    image[at] ^= (byte)(1 << random.Next(8));
                    break;
                case 1:
                    image[at] = (byte)random.Next(256);
                    break;
                case 2:
                    random.NextBytes(entry);
                    break;
                case 3:
                    // Somewhere in the file, where something else may be.
                    BinaryPrimitives.WriteUInt64BigEndian(entry, (ulong)random.Next(original.Length) & ~511UL | 1UL << 63);
                    break;
                case 4:
                    var (other, size) = tables[random.Next(tables.Count)];
                    image.AsSpan(other + random.Next(size / 8) * 8, 8).CopyTo(entry);
                    break;
                case 5:
                    BinaryPrimitives.WriteUInt64BigEndian(entry, random.Next(3) switch { 0 => ulong.MaxValue, 1 => long.MaxValue, _ => 0 });
                    break;
                default:
                    image.AsSpan(offset, random.Next(length)).Clear();
                    break;
            }
        }
        return random.Next(10) == 0 ? image[..random.Next(original.Length)] : image;
    }

    /// <summary>Reads, checks, writes and repairs; returns whether the image could be opened.</summary>
    private static bool Use(string name, byte[] image, Random random)
    {
        var store = new MemoryImageStore(image);
        var opened = Tolerate(() => ReadTwice(name, store, random));
        Tolerate(() => Qcow2Image.Check(new MemoryImageStore(image, isReadOnly: true)));
        Tolerate(() => WriteAndRead(name, store, random));
        Tolerate(() => Qcow2Image.Check(store, random.Next(2) == 0 ? ImageRepair.Leaks : ImageRepair.All));
        Tolerate(() => ReadTwice(name, store, random));
        return opened;
    }

    private static bool Tolerate(Action action)
    {
        try
        {
            action();
            return true;
        }
        catch (StorageException exception)
        {
            Assert.NotEqual("", exception.Message);
            Assert.DoesNotContain('\n', exception.Message);
            return false;
        }
    }

    private static void ReadTwice(string name, MemoryImageStore store, Random random)
    {
        using var disk = GoldenImages.Open(name, store, readOnly: true);
        for (var i = 0; i < 20; i++)
        {
            var (offset, length) = Range(disk, random, 50_000);
            Tolerate(() =>
            {
                byte[] first = new byte[length], second = new byte[length];
                disk.Read(offset, first);
                disk.Read(offset, second);
                Assert.True(first.AsSpan().SequenceEqual(second));
                disk.GetExtent(offset, length);
            });
        }
    }

    private static void WriteAndRead(string name, MemoryImageStore store, Random random)
    {
        using var disk = GoldenImages.Open(name, store);
        for (var i = 0; i < 20; i++)
        {
            var (offset, length) = Range(disk, random, i % 2 == 0 ? 512 : 50_000);
            Tolerate(() =>
            {
                var data = new byte[length];
                random.NextBytes(data);
                disk.Write(offset, data);
                var back = new byte[length];
                disk.Read(offset, back);
                // Two places of a damaged image can be the same; one sector cannot differ from itself.
                Assert.True(length > 512 || data.AsSpan().SequenceEqual(back));
            });
            Tolerate(() => disk.Discard(offset, length));
            Tolerate(() => disk.WriteZeroes(offset, length, random.Next(2) == 0));
            Tolerate(() => disk.Flush());
        }
    }

    private static (long Offset, int Length) Range(IBlockBackend disk, Random random, int most)
    {
        if (disk.Length == 0)
        {
            return (0, 0);
        }
        // Damage can make the disk immense; most of the interesting part is at its beginning.
        var sectors = Math.Min(disk.Length, random.Next(2) == 0 ? 8 << 20 : long.MaxValue) / 512;
        var length = (int)Math.Min(sectors, random.Next(1, most / 512 + 1));
        return (random.NextInt64(sectors - length + 1) * 512, length * 512);
    }
}
