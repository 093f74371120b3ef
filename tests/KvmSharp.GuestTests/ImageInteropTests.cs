using KvmSharp.GuestTests.Support;
using KvmSharp.Storage;
using KvmSharp.Tests.Storage;

namespace KvmSharp.GuestTests;

/// <summary>qcow2 images go back and forth between this library and QEMU's tools, which check and compare them.</summary>
public sealed class ImageInteropTests : IDisposable
{
    private const int DiskSize = 4 << 20;

    private readonly TemporaryDirectory _directory = new();

    [Theory]
    [InlineData(65536, 3, 16)]
    [InlineData(65536, 2, 16)]
    [InlineData(512, 3, 1)]
    [InlineData(4096, 3, 64)]
    [InlineData(2 << 20, 3, 8)]
    public async Task QemuReadsAndContinuesOurImage(int clusterSize, int version, int refcountBits)
    {
        QemuTools qemu = await QemuTools.GetAsync();
        string image = _directory.File("image.qcow2"), raw = _directory.File("raw");
        byte[] content;
        using (Qcow2Image disk = Qcow2Image.Create(
            image, DiskSize, new Qcow2CreateOptions { ClusterSize = clusterSize, Version = version, RefcountBits = refcountBits }))
        {
            content = Work(disk, new byte[DiskSize], seed: 1);
        }

        File.WriteAllBytes(raw, content);
        await qemu.ExpectAsync("qemu-img", "check", "-f", "qcow2", image);
        await qemu.ExpectAsync("qemu-img", "compare", "-f", "qcow2", "-F", "raw", image, raw);
        await qemu.ExpectAsync("qemu-io", "-f", "qcow2", "-c", "write -P 0x77 100k 300k", "-c", "discard 1M 1M", "-c", "write -z 2M 512k", image);
        await qemu.ExpectAsync("qemu-img", "convert", "-f", "qcow2", "-O", "raw", image, raw);
        using (Qcow2Image disk = Qcow2Image.Open(image))
        {
            content = new byte[DiskSize];
            disk.Read(0, content);
            Assert.True(content.AsSpan().SequenceEqual(File.ReadAllBytes(raw)));
            content = Work(disk, content, seed: 2);
        }

        File.WriteAllBytes(raw, content);
        await qemu.ExpectAsync("qemu-img", "check", "-f", "qcow2", image);
        await qemu.ExpectAsync("qemu-img", "compare", "-f", "qcow2", "-F", "raw", image, raw);
        ImageCheckResult result = Qcow2Image.Check(image);
        Assert.True(result.IsClean, string.Join('\n', result.Messages));
    }

    [Fact]
    public async Task SnapshotsOfQemuSurviveOurWrites()
    {
        QemuTools qemu = await QemuTools.GetAsync();
        string image = _directory.File("image.qcow2"), before = _directory.File("before"), after = _directory.File("after");
        await qemu.ExpectAsync("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", image, "4M");
        await qemu.ExpectAsync("qemu-io", "-f", "qcow2", "-c", "write -P 0x11 0 2M", image);
        await qemu.ExpectAsync("qemu-img", "snapshot", "-c", "one", image);
        await qemu.ExpectAsync("qemu-img", "convert", "-f", "qcow2", "-l", "snapshot.name=one", "-O", "raw", image, before);
        using (Qcow2Image disk = Qcow2Image.Open(image))
        {
            Assert.Equal("one", Assert.Single(disk.Snapshots).Name);
            var content = new byte[DiskSize];
            disk.Read(0, content);
            Work(disk, content, seed: 3);
        }

        await qemu.ExpectAsync("qemu-img", "check", "-f", "qcow2", image);
        await qemu.ExpectAsync("qemu-img", "convert", "-f", "qcow2", "-l", "snapshot.name=one", "-O", "raw", image, after);
        Assert.True(File.ReadAllBytes(before).AsSpan().SequenceEqual(File.ReadAllBytes(after)));
        await qemu.ExpectAsync("qemu-img", "snapshot", "-d", "one", image);
        await qemu.ExpectAsync("qemu-img", "check", "-f", "qcow2", image);
    }

    [Fact]
    public async Task BackingFilesAndCompressionAreUnderstoodAlike()
    {
        QemuTools qemu = await QemuTools.GetAsync();
        string bottom = _directory.File("bottom.qcow2"), top = _directory.File("top.qcow2"), raw = _directory.File("raw");
        File.WriteAllText(raw, string.Join('\n', Enumerable.Range(0, 400_000)));
        await qemu.ExpectAsync("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", raw, bottom);
        DiskImage.Create(
            top, ImageFormat.Qcow2, ImageInfo.Read(bottom).Length,
            new Qcow2CreateOptions { BackingFile = "bottom.qcow2", BackingFormat = ImageFormat.Qcow2 });
        using (IBlockBackend disk = DiskImage.Open(top, new DiskImageOptions { MaxBackingDepth = 1 }))
        {
            var content = new byte[disk.Length];
            disk.Read(0, content);
            Assert.True(content.AsSpan().StartsWith(File.ReadAllBytes(raw)));
            File.WriteAllBytes(raw, Work(disk, content, seed: 4));
        }

        await qemu.ExpectAsync("qemu-img", "check", "-f", "qcow2", top);
        await qemu.ExpectAsync("qemu-img", "compare", "-f", "qcow2", "-F", "raw", top, raw);
        await qemu.ExpectAsync("qemu-img", "check", "-f", "qcow2", bottom);
    }

    [Fact]
    public async Task WritesIntoACompressedImageKeepItClean()
    {
        QemuTools qemu = await QemuTools.GetAsync();
        string image = _directory.File("image.qcow2"), raw = _directory.File("raw");
        File.WriteAllText(raw, string.Join('\n', Enumerable.Range(0, 400_000)));
        await qemu.ExpectAsync("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", "cluster_size=4k", raw, image);
        using (IBlockBackend disk = DiskImage.Open(image))
        {
            var content = new byte[disk.Length];
            disk.Read(0, content);
            File.WriteAllBytes(raw, Work(disk, content, seed: 5));
        }

        await qemu.ExpectAsync("qemu-img", "check", "-f", "qcow2", image);
        await qemu.ExpectAsync("qemu-img", "compare", "-f", "qcow2", "-F", "raw", image, raw);
    }

    [Fact]
    public async Task AfterACrashQemuFindsLeaksAtMost()
    {
        const int LeaksOnly = 3;
        QemuTools qemu = await QemuTools.GetAsync();
        string image = _directory.File("image.qcow2");
        var random = new Random(6);
        for (var round = 0; round < 20; round++)
        {
            var store = new MemoryImageStore();
            Qcow2Image.Create(store, DiskSize, new Qcow2CreateOptions { ClusterSize = 512 << random.Next(4) });
            var recording = new RecordingStore(store.ToArray());
            using (Qcow2Image disk = Qcow2Image.Open(recording))
            {
                var crash = random.Next(20, 120);
                recording.BeforeOperation = number =>
                {
                    if (number == crash)
                    {
                        File.WriteAllBytes(image, recording.Crash(random));
                    }
                };
                Work(disk, new byte[DiskSize], seed: round);
                Assert.True(recording.Operations > crash);
            }

            CommandResult result = await qemu.RunAsync("qemu-img", "check", "-f", "qcow2", image);
            Assert.True(result.Status is 0 or LeaksOnly, result.ToString());
            Assert.True(Qcow2Image.Check(image, ImageRepair.Leaks).IsClean);
            await qemu.ExpectAsync("qemu-img", "check", "-f", "qcow2", image);
        }
    }

    [Fact]
    public async Task QemuAcceptsOurRepair()
    {
        QemuTools qemu = await QemuTools.GetAsync();
        string image = _directory.File("image.qcow2"), before = _directory.File("before"), after = _directory.File("after");
        await qemu.ExpectAsync("qemu-img", "create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on", image, "64M");
        // Ends without closing: the image stays marked as dirty, with outdated reference counts.
        await qemu.RunAsync("qemu-io", "-f", "qcow2", "-c", "write -P 0x21 5M 9M", "-c", "flush", "-c", "abort", image);
        Assert.True(ImageInfo.Read(image).IsDirty);
        await qemu.RunAsync("qemu-img", "convert", "-f", "qcow2", "-O", "raw", image, before);
        ImageCheckResult result = Qcow2Image.Check(image, ImageRepair.All);
        Assert.True(result.IsClean && result.RepairedErrors > 0, string.Join('\n', result.Messages));
        await qemu.ExpectAsync("qemu-img", "check", "-f", "qcow2", image);
        await qemu.ExpectAsync("qemu-img", "convert", "-f", "qcow2", "-O", "raw", image, after);
        Assert.True(File.ReadAllBytes(before).AsSpan().SequenceEqual(File.ReadAllBytes(after)));
    }

    [Fact]
    public async Task ToolsAreFetchedWhereThereAreNone()
    {
        QemuTools qemu = await QemuTools.FindAsync("KVMSHARP_NO_SUCH_VARIABLE");
        Assert.StartsWith("qemu-img version", await qemu.ExpectAsync("qemu-img", "--version"));
    }

    public void Dispose() => _directory.Dispose();

    /// <summary>Random requests; returns what the disk must contain then.</summary>
    private static byte[] Work(IBlockBackend disk, byte[] content, int seed)
    {
        var random = new Random(seed);
        for (var i = 0; i < 150; i++)
        {
            var length = random.Next(1, random.Next(4) == 0 ? 400 : 16) * 512;
            var offset = random.Next((content.Length - length) / 512) * 512;
            Span<byte> part = content.AsSpan(offset, length);
            switch (random.Next(8))
            {
                case 0:
                    disk.WriteZeroes(offset, length, random.Next(2) == 0);
                    part.Clear();
                    break;
                case 1:
                    disk.Discard(offset, length);
                    disk.Read(offset, part);
                    break;
                case 2:
                    disk.Flush();
                    break;
                default:
                    random.NextBytes(part);
                    disk.Write(offset, part);
                    break;
            }
        }

        return content;
    }
}
