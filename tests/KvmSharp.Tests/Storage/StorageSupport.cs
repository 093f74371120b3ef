using System.Security.Cryptography;
using KvmSharp.GuestTests.Support;
using KvmSharp.Storage;

namespace KvmSharp.Tests.Storage;

/// <summary>Images made by QEMU's tools, once in a run of the tests, and the disks that these tools read from them.</summary>
internal static class GoldenImages
{
    private static readonly Lazy<IReadOnlyDictionary<string, byte[]>> _files = new(() => Task.Run(MakeAsync).GetAwaiter().GetResult());

    /// <summary>The images that can be read.</summary>
    public static IReadOnlyList<string> Names { get; } =
        ["base", "bitmaps", "compressed", "compressed4k", "dirty", "large", "lazy", "overlay", "small", "snapshots", "v2", "v3"];

    public static byte[] Load(string name) => (byte[])_files.Value[name + ".qcow2"].Clone();

    /// <summary>The hash of the disk in an image, or of the snapshot with this number in it, as QEMU reads it.</summary>
    public static string ContentHash(string name, string? snapshot = null) => Hash(_files.Value[name + snapshot + ".raw"]);

    /// <summary>Opens an image from memory, with its backing image where it has one.</summary>
    public static Qcow2Image Open(string name, byte[]? content = null, bool readOnly = false) =>
        Open(name, new MemoryImageStore(content ?? Load(name)), readOnly);

    public static Qcow2Image Open(string name, IImageStore store, bool readOnly = false) => Qcow2Image.Open(store, new Qcow2OpenOptions
    {
        ReadOnly = readOnly,
        CacheBytes = 16 << 12,
        Backing = name == "overlay" ? Qcow2Image.Open(new MemoryImageStore(Load("base"), isReadOnly: true)) : null,
    });

    public static string Hash(ReadOnlySpan<byte> content) => Convert.ToHexStringLower(SHA256.HashData(content));

    private static async Task<IReadOnlyDictionary<string, byte[]>> MakeAsync()
    {
        QemuTools qemu = await QemuTools.GetAsync();
        using var directory = new TemporaryDirectory();

        Task<string> ImgAsync(params string[] arguments) => qemu.ExpectAsync("qemu-img", arguments);
        Task<string> CreateAsync(string name, string size, string options) =>
            ImgAsync("create", "-q", "-f", "qcow2", "-o", options, directory.File(name + ".qcow2"), size);
        Task<string> WorkAsync(string name, params string[] commands) =>
            qemu.ExpectAsync("qemu-io", ["-f", "qcow2", .. commands.SelectMany(command => new[] { "-c", command }), directory.File(name + ".qcow2")]);

        string[] mixed =
        [
            "write -P 0x11 0 100k", "write -P 0x22 1000k 200k", "discard 64k 64k", "write -z 1040k 128k", "write -P 0x33 2M 4k",
            "write -P 0x44 4193280 1k", "write -P 0x55 3000k 512",
        ];
        foreach ((string name, string options) in new[] { ("v2", "compat=0.10"), ("v3", "compat=1.1"), ("small", "cluster_size=512,refcount_bits=1") })
        {
            await CreateAsync(name, "4M", options);
            await WorkAsync(name, mixed);
        }

        await ImgAsync("convert", "-c", "-f", "qcow2", "-O", "qcow2", directory.File("v3.qcow2"), directory.File("compressed.qcow2"));

        string text = directory.File("text");
        File.WriteAllText(text, string.Join('\n', Enumerable.Range(1, 50_000)));
        using (FileStream stream = File.OpenWrite(text))
        {
            stream.SetLength(1 << 20);
        }

        await ImgAsync("convert", "-c", "-f", "raw", "-O", "qcow2", "-o", "cluster_size=4k", text, directory.File("compressed4k.qcow2"));
        await WorkAsync("compressed4k", "write -P 0x77 20k 3k", "write -P 0x78 100k 40k");

        foreach (string name in new[] { "lazy", "dirty" })
        {
            await CreateAsync(name, "1M", "cluster_size=4k,lazy_refcounts=on");
            await WorkAsync(name, "write -P 0x41 0 256k");
        }

        // Killed before it is closed.
        CommandResult killed = await qemu.RunAsync(
            "qemu-io", "-f", "qcow2", "-c", "write -P 0x42 300k 200k", "-c", "flush", "-c", "sigraise 9", directory.File("dirty.qcow2"));
        Assert.NotEqual(0, killed.Status);

        string snapshots = directory.File("snapshots.qcow2");
        await CreateAsync("snapshots", "1M", "cluster_size=4k");
        await WorkAsync("snapshots", "write -P 0x11 0 300k");
        await ImgAsync("snapshot", "-c", "first", snapshots);
        await WorkAsync("snapshots", "write -P 0x22 100k 100k");
        await ImgAsync("snapshot", "-c", "second one", snapshots);
        await WorkAsync("snapshots", "write -P 0x33 200k 400k");

        await CreateAsync("bitmaps", "1M", "cluster_size=4k");
        await WorkAsync("bitmaps", "write -P 0x61 0 64k");
        await ImgAsync("bitmap", "--add", "-g", "4096", directory.File("bitmaps.qcow2"), "b0");

        await CreateAsync("base", "512k", "cluster_size=4k");
        await WorkAsync("base", "write -P 0x51 0 512k");
        await CreateAsync("overlay", "1M", "cluster_size=4k,backing_file=base.qcow2,backing_fmt=qcow2");
        await WorkAsync("overlay", "write -P 0x52 10k 100k", "write -z 200k 64k", "write -P 0x53 500k 100k");

        await CreateAsync("large", "8M", "cluster_size=2M,refcount_bits=64");
        await WorkAsync("large", "write -P 0x66 3M 1M", "write -P 0x67 7M 4k");

        await CreateAsync("extended", "1M", "extended_l2=on");
        await CreateAsync("zstd", "1M", "compression_type=zstd");
        await CreateAsync("external", "1M", $"data_file={directory.File("data")}");

        foreach (string name in Names)
        {
            await ImgAsync("convert", "-f", "qcow2", "-O", "raw", directory.File(name + ".qcow2"), directory.File(name + ".raw"));
        }

        foreach (string id in new[] { "1", "2" })
        {
            await ImgAsync("convert", "-f", "qcow2", "-l", "snapshot.id=" + id, "-O", "raw", snapshots, directory.File("snapshots" + id + ".raw"));
        }

        return Directory.EnumerateFiles(Path.GetDirectoryName(text)!).ToDictionary(path => Path.GetFileName(path), File.ReadAllBytes);
    }
}

/// <summary>A directory that is deleted with its content.</summary>
internal sealed class TemporaryDirectory : IDisposable
{
    private readonly string _path = Directory.CreateTempSubdirectory("kvmsharp-storage-").FullName;

    public string File(string name) => Path.Combine(_path, name);

    public void Dispose() => Directory.Delete(_path, recursive: true);
}

internal static class BlockBackendExtensions
{
    public static byte[] ReadAll(this IBlockBackend disk)
    {
        var content = new byte[disk.Length];
        disk.Read(0, content);
        return content;
    }
}

/// <summary>A disk as a user writes it: the four members that have no default.</summary>
internal sealed class ArrayDisk(int length) : IBlockBackend
{
    public byte[] Content { get; } = new byte[length];

    public long Length => Content.Length;

    public void Read(long offset, Span<byte> buffer) => Content.AsSpan((int)offset, buffer.Length).CopyTo(buffer);

    public void Write(long offset, ReadOnlySpan<byte> data) => data.CopyTo(Content.AsSpan((int)offset));

    public void Flush()
    {
    }

    public void Dispose()
    {
    }
}

/// <summary>Does random things to a disk and to an array in memory, and compares.</summary>
internal sealed class DiskModel
{
    private readonly Random _random;
    private readonly byte[] _content;
    private readonly int _maxRequest;

    public DiskModel(int seed, IBlockBackend disk, int maxRequest = 100_000)
    {
        _random = new Random(seed);
        _content = disk.ReadAll();
        _maxRequest = maxRequest;
    }

    /// <summary>What the disk must contain.</summary>
    public ReadOnlySpan<byte> Content => _content;

    public void Run(IBlockBackend disk, int operations)
    {
        Assert.Equal(_content.Length, disk.Length);
        for (var i = 0; i < operations; i++)
        {
            Step(disk);
        }
    }

    public void Verify(IBlockBackend disk) => Assert.True(_content.AsSpan().SequenceEqual(disk.ReadAll()));

    private void Step(IBlockBackend disk)
    {
        var (offset, length) = Range(disk.SectorSize);
        var part = _content.AsSpan(offset, length);
        switch (_random.Next(12))
        {
            case < 5:
                _random.NextBytes(part);
                if (_random.Next(8) == 0)
                {
                    part.Clear();
                }
                disk.Write(offset, part);
                break;
            case < 8:
                var buffer = new byte[length];
                disk.Read(offset, buffer);
                Assert.True(part.SequenceEqual(buffer));
                break;
            case 8:
                disk.WriteZeroes(offset, length, _random.Next(2) == 0);
                part.Clear();
                break;
            case 9:
                Discard(disk, offset, part);
                break;
            case 10:
                disk.Flush();
                break;
            default:
                var extent = disk.GetExtent(offset, length);
                Assert.InRange(extent.Length, Math.Min(length, disk.SectorSize), length);
                Assert.Equal(0, extent.Length % disk.SectorSize);
                Assert.False(extent.IsZero && part[..(int)extent.Length].ContainsAnyExcept((byte)0));
                break;
        }
    }

    private static void Discard(IBlockBackend disk, int offset, Span<byte> part)
    {
        disk.Discard(offset, part.Length);
        var after = new byte[part.Length];
        disk.Read(offset, after);
        for (var sector = 0; sector < part.Length; sector += 512)
        {
            var now = after.AsSpan(sector, 512);
            Assert.True(!now.ContainsAnyExcept((byte)0) || now.SequenceEqual(part.Slice(sector, 512)));
        }
        after.CopyTo(part);
    }

    private (int Offset, int Length) Range(int sectorSize)
    {
        var sectors = _content.Length / sectorSize;
        var most = Math.Min(sectors, _maxRequest / sectorSize);
        var length = _random.Next(4) switch
        {
            0 => 1,
            1 => Math.Min(most, 4096 / sectorSize),
            _ => _random.Next(1, most + 1),
        };
        return (_random.Next(sectors - length + 1) * sectorSize, length * sectorSize);
    }
}
