namespace KvmSharp.Storage;

/// <summary>How to open a qcow2 image.</summary>
public sealed class Qcow2OpenOptions
{
    /// <summary>Whether to refuse writes although the store can be written.</summary>
    public bool ReadOnly { get; init; }

    /// <summary>
    /// What the image shows where it has no data of its own; it belongs to the image from then on. An image that names a
    /// backing file is refused without it: the name comes from the image, which may come from a guest.
    /// <see cref="DiskImage.Open"/> follows names when asked to.
    /// </summary>
    public IBlockBackend? Backing { get; init; }

    /// <summary>How much memory each of the two caches of tables may take, in bytes.</summary>
    public long CacheBytes { get; init; } = 8 << 20;
}

/// <summary>What a new qcow2 image is to be like.</summary>
public sealed class Qcow2CreateOptions
{
    /// <summary>The unit of allocation in bytes: a power of two from 512 to 2097152.</summary>
    public int ClusterSize { get; init; } = 65536;

    /// <summary>The version of the format: 2 or 3. Version 2 cannot mark ranges as zero over a backing file.</summary>
    public int Version { get; init; } = 3;

    /// <summary>The width of a reference count in bits: a power of two from 1 to 64; 16 for version 2.</summary>
    public int RefcountBits { get; init; } = 16;

    /// <summary>The name of the backing file to store in the image, relative to the image's directory or absolute.</summary>
    public string? BackingFile { get; init; }

    /// <summary>The format of the backing file; needed with <see cref="BackingFile"/>.</summary>
    public ImageFormat? BackingFormat { get; init; }
}

/// <summary>A snapshot inside a qcow2 image. Snapshots are kept as they are; they cannot be made or loaded.</summary>
/// <param name="Id">The number by which tools know it.</param>
/// <param name="Name">Its name.</param>
/// <param name="Created">When it was taken.</param>
/// <param name="StateBytes">The size of the saved machine state, 0 if only the disk was saved.</param>
public sealed record Qcow2Snapshot(string Id, string Name, DateTimeOffset Created, long StateBytes);
