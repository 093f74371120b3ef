namespace KvmSharp.Storage;

/// <summary>What an image file is.</summary>
public sealed class ImageInfo
{
    private ImageInfo(string path, ImageFormat format)
    {
        Path = path;
        Format = format;
    }

    /// <summary>The file, as an absolute path.</summary>
    public string Path { get; }

    /// <summary>The format.</summary>
    public ImageFormat Format { get; }

    /// <summary>The size of the disk in bytes.</summary>
    public long Length { get; private init; }

    /// <summary>The length of the file in bytes.</summary>
    public long FileLength { get; private init; }

    /// <summary>How much of the file is not a hole, in bytes.</summary>
    public long AllocatedBytes { get; private init; }

    /// <summary>The version of the format; 0 for raw images.</summary>
    public int Version { get; private init; }

    /// <summary>The unit of allocation in bytes; 0 for raw images.</summary>
    public int ClusterSize { get; private init; }

    /// <summary>The width of a reference count in bits; 0 for raw images.</summary>
    public int RefcountBits { get; private init; }

    /// <summary>The name of the backing file in the image, or null. It is not followed.</summary>
    public string? BackingFile { get; private init; }

    /// <summary>The name of the backing file's format in the image, or null.</summary>
    public string? BackingFormat { get; private init; }

    /// <summary>Whether the reference counts may be outdated, so that the image must be repaired before it is written.</summary>
    public bool IsDirty { get; private init; }

    /// <summary>Whether the image is marked as damaged.</summary>
    public bool IsCorrupt { get; private init; }

    /// <summary>Whether tools may leave reference counts outdated while they write.</summary>
    public bool LazyRefcounts { get; private init; }

    /// <summary>The snapshots in the image.</summary>
    public IReadOnlyList<Qcow2Snapshot> Snapshots { get; private init; } = [];

    /// <summary>Reads what an image file is, without following its backing file.</summary>
    /// <param name="path">The file.</param>
    /// <param name="format">The format, or null to find out from the content.</param>
    /// <exception cref="StorageException">The file cannot be read, or is damaged.</exception>
    public static ImageInfo Read(string path, ImageFormat? format = null)
    {
        using var store = FileImageStore.Open(path, readOnly: true);
        var allocated = 0L;
        for (var offset = 0L; offset < store.Length;)
        {
            var extent = store.GetExtent(offset, store.Length - offset);
            allocated += extent.IsZero ? 0 : extent.Length;
            offset += extent.Length;
        }
        if ((format ?? DiskImage.DetectFormat(store)) == ImageFormat.Raw)
        {
            return new ImageInfo(store.Path, ImageFormat.Raw)
            {
                Length = (store.Length + BlockRange.DefaultSectorSize - 1) & -(long)BlockRange.DefaultSectorSize,
                FileLength = store.Length,
                AllocatedBytes = allocated,
            };
        }
        var header = Qcow2Header.Read(store);
        return new ImageInfo(store.Path, ImageFormat.Qcow2)
        {
            Length = (header.Size + BlockRange.DefaultSectorSize - 1) & -(long)BlockRange.DefaultSectorSize,
            FileLength = store.Length,
            AllocatedBytes = allocated,
            Version = header.Version,
            ClusterSize = header.ClusterSize,
            RefcountBits = 1 << header.RefcountOrder,
            BackingFile = header.BackingFile,
            BackingFormat = header.BackingFormat,
            IsDirty = header.Incompatible.HasFlag(Qcow2Incompatible.Dirty),
            IsCorrupt = header.Incompatible.HasFlag(Qcow2Incompatible.Corrupt),
            LazyRefcounts = (header.Compatible & Qcow2Header.CompatibleLazyRefcounts) != 0,
            Snapshots = [.. Qcow2SnapshotTable.Read(store, header).Entries.Select(entry => entry.Snapshot)],
        };
    }
}
