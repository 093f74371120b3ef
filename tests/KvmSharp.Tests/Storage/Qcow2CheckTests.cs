using System.Buffers.Binary;
using KvmSharp.Storage;

namespace KvmSharp.Tests.Storage;

/// <summary>Checking and repairing qcow2 images.</summary>
public sealed class Qcow2CheckTests
{
    private const ulong OffsetMask = 0x00ff_ffff_ffff_fe00;

    public static TheoryData<string> CleanNames => [.. GoldenImages.Names.Where(name => name != "dirty")];

    [Theory]
    [MemberData(nameof(CleanNames))]
    public void ImageOfQemuIsClean(string name)
    {
        var result = Check(GoldenImages.Load(name), ImageRepair.None, out _);
        Assert.True(result.IsClean && result.Errors == 0 && result.Leaks == 0, string.Join('\n', result.Messages));
    }

    [Fact]
    public void ClustersAreCounted()
    {
        // As "qemu-img check" counts them.
        var result = Check(GoldenImages.Load("v3"), ImageRepair.None, out _);
        Assert.Equal((64, 8, 0), (result.TotalClusters, result.AllocatedClusters, result.CompressedClusters));
        result = Check(GoldenImages.Load("compressed"), ImageRepair.None, out _);
        Assert.Equal(result.AllocatedClusters, result.CompressedClusters);
        Assert.NotEqual(0, result.CompressedClusters);
    }

    [Theory]
    [InlineData("v3")]
    [InlineData("small")]
    [InlineData("large")]
    public void LeakIsFoundAndRepaired(string name)
    {
        var image = GoldenImages.Load(name);
        using (var store = new MemoryImageStore(image))
        {
            // Forgetting all data leaves its clusters behind.
            var l1 = BinaryPrimitives.ReadInt64BigEndian(image.AsSpan(40));
            store.Write(l1, new byte[BinaryPrimitives.ReadInt32BigEndian(image.AsSpan(36)) * 8]);
            image = store.ToArray();
        }
        var result = Check(image, ImageRepair.None, out var unchanged);
        Assert.True(result.Errors == 0 && result.Leaks > 0 && !result.IsClean && result.RepairedLeaks == 0);
        Assert.Equal(image, unchanged);
        result = Check(image, ImageRepair.Leaks, out var repaired);
        Assert.True(result.IsClean && result.RepairedLeaks == result.Leaks);
        result = Check(repaired, ImageRepair.None, out _);
        Assert.True(result.Leaks == 0 && result.Errors == 0, string.Join('\n', result.Messages));
    }

    [Fact]
    public void DirtyImageIsRepaired()
    {
        var result = Check(GoldenImages.Load("dirty"), ImageRepair.None, out _);
        Assert.True(result.Errors > 0 && !result.IsClean);
        result = Check(GoldenImages.Load("dirty"), ImageRepair.Leaks, out var unchanged);
        Assert.False(result.IsClean);
        Assert.Equal(GoldenImages.Load("dirty"), unchanged);
        result = Check(GoldenImages.Load("dirty"), ImageRepair.All, out var repaired);
        Assert.True(result.IsClean && result.RepairedErrors > 0, string.Join('\n', result.Messages));
        AssertUsable(repaired, GoldenImages.ContentHash("dirty"));
    }

    [Theory]
    [InlineData("v3")]
    [InlineData("v2")]
    [InlineData("small")]
    [InlineData("compressed4k")]
    [InlineData("snapshots")]
    public void LostReferenceCountsAreRebuilt(string name)
    {
        var image = GoldenImages.Load(name);
        var table = (int)BinaryPrimitives.ReadInt64BigEndian(image.AsSpan(48));
        image.AsSpan(table, 8).Clear();
        BinaryPrimitives.WriteUInt64BigEndian(image.AsSpan(table + 8), 0x123456);
        var result = Check(image, ImageRepair.All, out var repaired);
        Assert.True(result.IsClean && result.RepairedErrors > 0, string.Join('\n', result.Messages));
        AssertUsable(repaired, GoldenImages.ContentHash(name));
    }

    [Fact]
    public void WrongFlagsAreRepaired()
    {
        var image = GoldenImages.Load("v3");
        var l1 = (int)BinaryPrimitives.ReadInt64BigEndian(image.AsSpan(40));
        var l2 = (int)(BinaryPrimitives.ReadUInt64BigEndian(image.AsSpan(l1)) & OffsetMask);
        image[l1] ^= 0x80;
        image[l2] ^= 0x80;
        var result = Check(image, ImageRepair.All, out var repaired);
        Assert.Equal((2, 2), (result.Errors, result.RepairedErrors));
        AssertUsable(repaired, GoldenImages.ContentHash("v3"));
    }

    [Fact]
    public void WhatCannotBeFollowedIsNotFreed()
    {
        var image = GoldenImages.Load("v3");
        var l1 = (int)BinaryPrimitives.ReadInt64BigEndian(image.AsSpan(40));
        BinaryPrimitives.WriteUInt64BigEndian(image.AsSpan(l1), 0x8000_0000_0000_0200);
        foreach (var repair in (ReadOnlySpan<ImageRepair>)[ImageRepair.Leaks, ImageRepair.All])
        {
            var result = Check(image, repair, out var unchanged);
            Assert.True(!result.IsClean && result.Errors == 1 && result.Leaks > 0 && result.RepairedLeaks == 0);
            Assert.Contains(result.Messages, message => message.StartsWith("Nothing was repaired", StringComparison.Ordinal));
            Assert.Equal(image, unchanged);
        }
    }

    [Fact]
    public void SharedClusterIsAnErrorAndIsCopiedAfterRepair()
    {
        var image = GoldenImages.Load("v3");
        var l1 = (int)BinaryPrimitives.ReadInt64BigEndian(image.AsSpan(40));
        var l2 = (int)(BinaryPrimitives.ReadUInt64BigEndian(image.AsSpan(l1)) & OffsetMask);
        // The last cluster of the disk shows the first one's data.
        image.AsSpan(l2, 8).CopyTo(image.AsSpan(l2 + 8 * 5));
        var result = Check(image, ImageRepair.All, out var repaired);
        Assert.True(result.IsClean && result.Errors > 0, string.Join('\n', result.Messages));
        var store = new MemoryImageStore(repaired);
        using (var disk = Qcow2Image.Open(store))
        {
            disk.Write(5 << 16, new byte[512]);
            var first = new byte[512];
            disk.Read(0, first);
            Assert.Equal(0x11, first[0]);
        }
        // The remaining reference is the only one now; that its flag does not say so costs a copy, no data.
        result = Qcow2Image.Check(store);
        Assert.True(result.Errors == 1 && result.Leaks == 0 && result.Messages[0].Contains("flag", StringComparison.Ordinal));
    }

    [Fact]
    public void DamageFoundWhileWritingStopsWriting()
    {
        var image = GoldenImages.Load("v3");
        var l1 = (int)BinaryPrimitives.ReadInt64BigEndian(image.AsSpan(40));
        var l2 = (int)(BinaryPrimitives.ReadUInt64BigEndian(image.AsSpan(l1)) & OffsetMask);
        // The first cluster of the disk is the L1 table itself.
        BinaryPrimitives.WriteUInt64BigEndian(image.AsSpan(l2), 1UL << 63 | (uint)l1);
        var store = new MemoryImageStore(image);
        using (var disk = Qcow2Image.Open(store))
        {
            Assert.Equal(StorageProblem.Corrupt, Assert.Throws<StorageException>(() => disk.Write(0, new byte[512])).Problem);
            Assert.Throws<StorageException>(() => disk.Write(1 << 20, new byte[512]));
            Assert.Throws<StorageException>(disk.Flush);
            disk.Read(1 << 20, new byte[512]);
        }
        Assert.Equal(image.AsSpan(l1, 65536), store.ToArray().AsSpan(l1, 65536));
        Assert.Equal(StorageProblem.NeedsRepair, Assert.Throws<StorageException>(() => Qcow2Image.Open(store)).Problem);
        Qcow2Image.Open(store, new Qcow2OpenOptions { ReadOnly = true }).Dispose();
    }

    private static ImageCheckResult Check(byte[] image, ImageRepair repair, out byte[] after)
    {
        var store = new MemoryImageStore(image);
        var result = Qcow2Image.Check(store, repair);
        after = store.ToArray();
        return result;
    }

    private static void AssertUsable(byte[] image, string hash)
    {
        var result = Check(image, ImageRepair.None, out _);
        Assert.True(result.Errors == 0 && result.Leaks == 0, string.Join('\n', result.Messages));
        var store = new MemoryImageStore(image);
        using (var disk = Qcow2Image.Open(store))
        {
            Assert.Equal(hash, GoldenImages.Hash(disk.ReadAll()));
            var model = new DiskModel(3, disk);
            model.Run(disk, 100);
            model.Verify(disk);
        }
        Assert.True(Qcow2Image.Check(store).IsClean);
    }
}
