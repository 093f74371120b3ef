using System.IO.Compression;
using System.Security.Cryptography;
using KvmSharp.Storage;

namespace KvmSharp.Tests.Storage;

/// <summary>Images that QEMU's tools made, with the hash of the disk that QEMU reads from them.</summary>
internal static class GoldenImages
{
    public static IReadOnlyDictionary<string, string> Hashes { get; } = new Dictionary<string, string>
    {
        ["base"] = "cbde13021f91fb0f",
        ["bitmaps"] = "9bb9b101289cbf25",
        ["compressed"] = "d768b3085bb10849",
        ["compressed4k"] = "cfe732964866a555",
        ["dirty"] = "41a2c8314ac1319b",
        ["large"] = "70ff452f80f61f4b",
        ["lazy"] = "38c9b761d1fb6dec",
        ["overlay"] = "8b47f235f247a6cf",
        ["small"] = "d768b3085bb10849",
        ["snapshots"] = "c682909e908c75f5",
        ["v2"] = "d768b3085bb10849",
        ["v3"] = "d768b3085bb10849",
    };

    public static byte[] Load(string name)
    {
        using var resource = typeof(GoldenImages).Assembly.GetManifestResourceStream($"{name}.qcow2.gz")
            ?? throw new ArgumentException($"There is no image {name}.");
        using var content = new MemoryStream();
        using var gzip = new GZipStream(resource, CompressionMode.Decompress);
        gzip.CopyTo(content);
        return content.ToArray();
    }

    /// <summary>Opens an image from memory, with its backing image where it has one.</summary>
    public static Qcow2Image Open(string name, byte[]? content = null, bool readOnly = false) =>
        Open(name, new MemoryImageStore(content ?? Load(name)), readOnly);

    public static Qcow2Image Open(string name, IImageStore store, bool readOnly = false) => Qcow2Image.Open(store, new Qcow2OpenOptions
    {
        ReadOnly = readOnly,
        CacheBytes = 16 << 12,
        Backing = name == "overlay" ? Qcow2Image.Open(new MemoryImageStore(Load("base"), isReadOnly: true)) : null,
    });

    public static string Hash(ReadOnlySpan<byte> content) => Convert.ToHexStringLower(SHA256.HashData(content))[..16];
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
