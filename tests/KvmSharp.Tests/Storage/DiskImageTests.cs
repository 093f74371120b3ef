using KvmSharp.Storage;

namespace KvmSharp.Tests.Storage;

/// <summary>Images in files: creating, opening, copying, backing chains, holes and locks.</summary>
public sealed class DiskImageTests : IDisposable
{
    private readonly TemporaryDirectory _directory = new();

    [Theory]
    [InlineData(ImageFormat.Raw)]
    [InlineData(ImageFormat.Qcow2)]
    public void CreatedImageIsOpened(ImageFormat format)
    {
        var path = _directory.File("disk");
        DiskImage.Create(path, format, 1L << 30);
        Assert.Equal(format, DiskImage.DetectFormat(path));
        using (var disk = DiskImage.Open(path))
        {
            Assert.Equal(1L << 30, disk.Length);
            disk.Write(512 << 20, Filled(4096));
            disk.Flush();
        }
        var info = ImageInfo.Read(path);
        Assert.Equal((format, 1L << 30), (info.Format, info.Length));
        Assert.InRange(info.AllocatedBytes, 4096, 2 << 20);
        using (var disk = DiskImage.Open(path, new DiskImageOptions { ReadOnly = true, Format = format }))
        {
            Assert.True(disk.IsReadOnly);
            var data = new byte[4096];
            disk.Read(512 << 20, data);
            Assert.Equal(Filled(4096), data);
        }
        Assert.Equal(StorageProblem.AlreadyExists, Problem(() => DiskImage.Create(path, format, 512)));
    }

    [Fact]
    public void FailedCreationLeavesNoFile()
    {
        var path = _directory.File("disk");
        Assert.ThrowsAny<ArgumentException>(() => DiskImage.Create(path, ImageFormat.Qcow2, 100));
        Assert.ThrowsAny<ArgumentException>(() => DiskImage.Create(path, ImageFormat.Raw, 512, new Qcow2CreateOptions()));
        Assert.Equal(
            StorageProblem.Unsupported,
            Problem(() => DiskImage.Create(path, ImageFormat.Qcow2, 1L << 50, new Qcow2CreateOptions { ClusterSize = 512 })));
        Assert.False(File.Exists(path));
    }

    [Fact]
    public void WhatCannotBeOpenedIsToldApart()
    {
        Assert.Equal(StorageProblem.Unreadable, Problem(() => DiskImage.Open(_directory.File("missing"))));
        Assert.Equal(StorageProblem.Unreadable, Problem(() => DiskImage.Open(_directory.File("missing/too"))));
        Assert.Equal(StorageProblem.Unreadable, Problem(() => DiskImage.Open(_directory.File("."))));
        var text = _directory.File("text");
        File.WriteAllText(text, new string('x', 1000));
        Assert.Equal(StorageProblem.UnknownFormat, Problem(() => DiskImage.Open(text, new DiskImageOptions { Format = ImageFormat.Qcow2 })));
        Assert.Equal(StorageProblem.Unreadable, Problem(() => DiskImage.Create(_directory.File("no/directory"), ImageFormat.Raw, 512)));
    }

    [Theory]
    [InlineData(ImageFormat.Raw)]
    [InlineData(ImageFormat.Qcow2)]
    public void WriterHasTheFileForItself(ImageFormat format)
    {
        var path = _directory.File("disk");
        DiskImage.Create(path, format, 1 << 20);
        using (DiskImage.Open(path))
        {
            Assert.Equal(StorageProblem.InUse, Problem(() => DiskImage.Open(path)));
            Assert.Equal(StorageProblem.InUse, Problem(() => DiskImage.Open(path, new DiskImageOptions { ReadOnly = true })));
        }
        using (DiskImage.Open(path, new DiskImageOptions { ReadOnly = true }))
        using (DiskImage.Open(path, new DiskImageOptions { ReadOnly = true }))
        {
            Assert.Equal(StorageProblem.InUse, Problem(() => DiskImage.Open(path)));
        }
        DiskImage.Open(path).Dispose();
    }

    [Fact]
    public void DiscardPunchesHoles()
    {
        var path = _directory.File("raw");
        using var disk = RawBlockBackend.Create(path, 64 << 20);
        Assert.True(disk.GetExtent(0, disk.Length).IsZero);
        disk.Write(0, Filled(8 << 20));
        disk.Flush();
        Assert.Equal(8 << 20, DataBytes(disk));
        disk.Discard(1 << 20, 4 << 20);
        disk.WriteZeroes(6 << 20, 1 << 20, mayDiscard: true);
        disk.WriteZeroes(7 << 20, 1 << 20, mayDiscard: false);
        disk.Flush();
        var data = new byte[8 << 20];
        disk.Read(0, data);
        Assert.Equal(2 << 20, data.AsSpan().Count((byte)1));
        if ((disk.Capabilities & BlockCapabilities.Discard) != 0)
        {
            Assert.InRange(DataBytes(disk), 2 << 20, 3 << 20);
        }
    }

    [Theory]
    [InlineData("v3", ImageFormat.Raw)]
    [InlineData("v3", ImageFormat.Qcow2)]
    [InlineData("compressed4k", ImageFormat.Qcow2)]
    [InlineData("snapshots", ImageFormat.Raw)]
    public void CopyIsTheSameDisk(string name, ImageFormat format)
    {
        var path = _directory.File("copy");
        var reports = new List<long>();
        using (var source = GoldenImages.Open(name, readOnly: true))
        {
            DiskImage.Create(path, format, source.Length);
            using var target = DiskImage.Open(path);
            var written = DiskImage.Copy(source, target, new Reporter(reports));
            Assert.InRange(written, 1, source.Length);
            Assert.Equal(source.Length, reports[^1]);
            Assert.Equal(reports.Order(), reports);
        }
        using var copy = DiskImage.Open(path);
        Assert.Equal(GoldenImages.ContentHash(name), GoldenImages.Hash(copy.ReadAll()));
        Assert.Contains(Extents(copy), extent => extent.IsZero);
    }

    [Fact]
    public void CopyCanBeCancelled()
    {
        using var source = new ArrayDisk(1 << 20);
        using var target = new ArrayDisk(1 << 20);
        using var cancellation = new CancellationTokenSource();
        cancellation.Cancel();
        Assert.Throws<OperationCanceledException>(() => DiskImage.Copy(source, target, cancellation: cancellation.Token));
        Assert.Equal(StorageProblem.OutOfRange, Problem(() => DiskImage.Copy(source, new ArrayDisk(512))));
    }

    [Fact]
    public void BackingChainIsFollowedWhenAskedFor()
    {
        CreateChain(4);
        var top = _directory.File("disk3");
        Assert.Equal(StorageProblem.BackingFile, Problem(() => DiskImage.Open(top)));
        Assert.Equal(StorageProblem.BackingFile, Problem(() => DiskImage.Open(top, new DiskImageOptions { MaxBackingDepth = 2 })));
        using (var disk = DiskImage.Open(top, new DiskImageOptions { MaxBackingDepth = 3 }))
        {
            var data = new byte[4 * 512];
            disk.Read(0, data);
            Assert.Equal<byte>([1, 2, 3, 4], [data[0], data[512], data[1024], data[1536]]);
            disk.Write(0, Enumerable.Repeat((byte)9, 512).ToArray());
            // The files below are open for reading only.
            Assert.Equal(StorageProblem.InUse, Problem(() => DiskImage.Open(_directory.File("disk2"), new DiskImageOptions { MaxBackingDepth = 3 })));
        }
        using var below = DiskImage.Open(_directory.File("disk0"));
        var sector = new byte[512];
        below.Read(0, sector);
        Assert.Equal(1, sector[0]);
        var info = ImageInfo.Read(top);
        Assert.Equal(("disk2", "qcow2"), (info.BackingFile, info.BackingFormat));
    }

    [Fact]
    public void LoopsAreRefused()
    {
        CreateChain(2);
        File.Delete(_directory.File("disk0"));
        File.CreateSymbolicLink(_directory.File("disk0"), _directory.File("disk1"));
        var exception = Assert.Throws<StorageException>(() => DiskImage.Open(
            _directory.File("disk1"), new DiskImageOptions { MaxBackingDepth = 10, Format = ImageFormat.Qcow2 }));
        Assert.Contains("its own backing file", exception.Message);
        Assert.Equal(StorageProblem.BackingFile, exception.Problem);
    }

    [Theory]
    [InlineData("nbd://127.0.0.1/x", StorageProblem.Unsupported)]
    [InlineData("json:{}", StorageProblem.Unsupported)]
    [InlineData("missing", StorageProblem.BackingFile)]
    [InlineData("file:missing", StorageProblem.BackingFile)]
    public void BackingNameMustBeAFile(string name, StorageProblem problem)
    {
        var path = _directory.File("top");
        DiskImage.Create(path, ImageFormat.Qcow2, 1 << 20, new Qcow2CreateOptions { BackingFile = name, BackingFormat = ImageFormat.Raw });
        Assert.Equal(problem, Problem(() => DiskImage.Open(path, new DiskImageOptions { MaxBackingDepth = 1 })));
        // Opening failed without leaving the file locked.
        Assert.Equal(name, ImageInfo.Read(path).BackingFile);
        using var store = FileImageStore.Open(path, readOnly: false);
    }

    [Fact]
    public void BackingFormatMustBeKnown()
    {
        var path = _directory.File("top");
        var image = GoldenImages.Load("overlay");
        var format = image.AsSpan().IndexOf("qcow2"u8);
        "vmdk5"u8.CopyTo(image.AsSpan(format));
        File.WriteAllBytes(path, image);
        Assert.Equal(StorageProblem.Unsupported, Problem(() => DiskImage.Open(path, new DiskImageOptions { MaxBackingDepth = 1 })));
        // The extension of the backing format becomes one that nobody knows.
        image[format - 8] = 0x01;
        File.WriteAllBytes(path, image);
        Assert.Equal(StorageProblem.BackingFile, Problem(() => DiskImage.Open(path, new DiskImageOptions { MaxBackingDepth = 1 })));
    }

    [Fact]
    public void InfoOfQemusImage()
    {
        var path = _directory.File("image");
        File.WriteAllBytes(path, GoldenImages.Load("snapshots"));
        var info = ImageInfo.Read(path);
        Assert.Equal((ImageFormat.Qcow2, 3, 4096, 16, 1L << 20), (info.Format, info.Version, info.ClusterSize, info.RefcountBits, info.Length));
        Assert.Equal(["first", "second one"], info.Snapshots.Select(snapshot => snapshot.Name));
        Assert.InRange(info.Snapshots[0].Created, DateTimeOffset.UtcNow.AddDays(-1), DateTimeOffset.UtcNow.AddDays(1));
        File.WriteAllBytes(path, GoldenImages.Load("dirty"));
        info = ImageInfo.Read(path);
        Assert.True(info.IsDirty && info.LazyRefcounts && !info.IsCorrupt);
    }

    [Fact]
    public void OverlayHasALimit()
    {
        using var disk = new OverlayBlockBackend(new ArrayDisk(1 << 20), maxBytes: 64 << 10);
        disk.Write(0, Filled(64 << 10));
        Assert.Equal(StorageProblem.NoSpace, Problem(() => disk.Write(64 << 10, Filled(512))));
        disk.Discard(0, 32 << 10);
        Assert.Equal(32 << 10, disk.ChangedBytes);
        disk.Write(64 << 10, Filled(512));
    }

    public void Dispose() => _directory.Dispose();

    private static byte[] Filled(int length)
    {
        var data = new byte[length];
        Array.Fill(data, (byte)1);
        return data;
    }

    private static StorageProblem Problem(Action action) => Assert.Throws<StorageException>(action).Problem;

    private static IEnumerable<BlockExtent> Extents(IBlockBackend disk)
    {
        for (var offset = 0L; offset < disk.Length;)
        {
            var extent = disk.GetExtent(offset, disk.Length - offset);
            yield return extent;
            offset += extent.Length;
        }
    }

    private static long DataBytes(IBlockBackend disk) => Extents(disk).Sum(extent => extent.IsZero ? 0 : extent.Length);

    /// <summary>Images disk0 to disk(n-1), each the backing file of the next; each writes its number plus one to its sector.</summary>
    private void CreateChain(int count)
    {
        for (var i = 0; i < count; i++)
        {
            var path = _directory.File($"disk{i}");
            DiskImage.Create(
                path, ImageFormat.Qcow2, 1 << 20,
                i == 0 ? null : new Qcow2CreateOptions { BackingFile = $"disk{i - 1}", BackingFormat = ImageFormat.Qcow2 });
            using var disk = DiskImage.Open(path, new DiskImageOptions { MaxBackingDepth = 10 });
            disk.Write(i * 512, Enumerable.Repeat((byte)(i + 1), 512).ToArray());
        }
    }

    private sealed class Reporter(List<long> reports) : IProgress<long>
    {
        public void Report(long value) => reports.Add(value);
    }
}
