using System.Buffers.Binary;

namespace KvmSharp.Storage;

/// <summary>
/// A disk in the qcow2 format, version 2 or 3. Source: the qcow2 specification in QEMU's documentation. Images are taken as
/// hostile: whatever they contain, the result is data from the image or a <see cref="StorageException"/>.
/// </summary>
/// <remarks>
/// <para>
/// All members are callable from any thread. Reads, and writes to what is allocated already, run side by side; allocation,
/// discarding and flushing of tables take turns.
/// </para>
/// <para>
/// The file is consistent at every moment, whichever of the writes since the last flush reach it: data and reference counts
/// are durable before a table refers to them, and a count is lowered only when the reference is durably gone. A crash leaves at
/// most clusters that nothing uses; <see cref="Check(IImageStore, ImageRepair, CancellationToken)"/> finds and frees them.
/// </para>
/// </remarks>
public sealed partial class Qcow2Image : IBlockBackend
{
    private const ulong Copied = 1UL << 63;
    private const ulong CompressedFlag = 1UL << 62;
    private const ulong ZeroFlag = 1;
    private const ulong EntryOffset = Qcow2Header.OffsetMask;

    private readonly Lock _lock = new();
    private readonly IImageStore _store;
    private readonly Qcow2Header _header;
    private readonly IBlockBackend? _backing;
    private readonly MetadataCache _l2;
    private readonly ulong[] _l1;
    private readonly SortedSet<int> _dirtyL1 = [];
    private readonly HashSet<uint> _metadata = [];
    private readonly Qcow2Refcounts? _refcounts;
    private readonly int _clusterBits;
    private readonly int _clusterSize;
    private readonly int _coverageBits;
    private readonly int _entriesPerPage;

    // Requests for data that run without the lock. Clusters are not given away while there are any.
    private int _inFlight;
    private StorageException? _failure;
    private bool _disposed;

    private Qcow2Image(IImageStore store, Qcow2Header header, Qcow2OpenOptions options)
    {
        _store = store;
        _header = header;
        _backing = options.Backing;
        _clusterBits = header.ClusterBits;
        _clusterSize = header.ClusterSize;
        _coverageBits = header.L2CoverageBits;
        IsReadOnly = options.ReadOnly || store.IsReadOnly;
        SectorSize = Math.Max(BlockRange.DefaultSectorSize, _backing?.SectorSize ?? 0);
        Length = (header.Size + SectorSize - 1) & -(long)SectorSize;
        _l2 = new MetadataCache(store, _clusterSize, options.CacheBytes);
        _entriesPerPage = _l2.PageSize / 8;
        if (header.L1Entries > 0 && header.L1TableOffset == 0)
        {
            throw Qcow2Header.Corrupt("its L1 table is in the header");
        }
        _l1 = Qcow2Refcounts.ReadTable(store, header.L1TableOffset, header.L1Entries, "L1 table");
        Snapshots = [.. Qcow2SnapshotTable.Read(store, header).Entries.Select(entry => entry.Snapshot)];
        if (!IsReadOnly)
        {
            CheckBeforeWriting();
            ProtectTables();
            _refcounts = new Qcow2Refcounts(store, header, _metadata, options.CacheBytes);
            ProtectL2Tables();
        }
    }

    /// <inheritdoc/>
    public long Length { get; }

    /// <inheritdoc/>
    public int SectorSize { get; }

    /// <inheritdoc/>
    public bool IsReadOnly { get; }

    /// <inheritdoc/>
    public BlockCapabilities Capabilities =>
        IsReadOnly ? BlockCapabilities.None : BlockCapabilities.Discard | BlockCapabilities.WriteZeroes;

    /// <inheritdoc/>
    public int DiscardGranularity => _clusterSize;

    /// <summary>The unit of allocation in bytes.</summary>
    public int ClusterSize => _clusterSize;

    /// <summary>The version of the format, 2 or 3.</summary>
    public int Version => _header.Version;

    /// <summary>The name of the backing file that the image contains, or null. It is text from the image: do not trust it.</summary>
    public string? BackingFile => _header.BackingFile;

    /// <summary>The name of the backing file's format that the image contains, or null.</summary>
    public string? BackingFormat => _header.BackingFormat;

    /// <summary>The snapshots in the image.</summary>
    public IReadOnlyList<Qcow2Snapshot> Snapshots { get; }

    /// <summary>Opens an image.</summary>
    /// <param name="store">Where the image is kept; it belongs to the returned object, and is closed if opening fails.</param>
    /// <param name="options">How to open it.</param>
    /// <exception cref="StorageException">The image is damaged, needs something unsupported, or names a backing file that was not given.</exception>
    public static Qcow2Image Open(IImageStore store, Qcow2OpenOptions? options = null)
    {
        ArgumentNullException.ThrowIfNull(store);
        options ??= new Qcow2OpenOptions();
        try
        {
            var header = Qcow2Header.Read(store);
            if (header.BackingFile is { } name && options.Backing is null)
            {
                throw new StorageException(
                    StorageProblem.BackingFile, $"The image needs the backing file '{name}', and following backing files was not asked for.");
            }
            return new Qcow2Image(store, header, options);
        }
        catch
        {
            store.Dispose();
            options.Backing?.Dispose();
            throw;
        }
    }

    /// <summary>Opens an image in a file, without a backing file.</summary>
    /// <param name="path">The file.</param>
    /// <param name="readOnly">Whether to open it for reading only.</param>
    /// <exception cref="StorageException">The image cannot be opened.</exception>
    public static Qcow2Image Open(string path, bool readOnly = false) => Open(FileImageStore.Open(path, readOnly));

    /// <summary>Creates an image in a file that shows a base where nothing was written to it. The base is never written.</summary>
    /// <param name="path">The file; it must not exist. It is of use only together with the same base.</param>
    /// <param name="baseDisk">The base; it belongs to the returned object.</param>
    /// <exception cref="StorageException">The file cannot be created.</exception>
    public static Qcow2Image CreateOverlay(string path, IBlockBackend baseDisk)
    {
        ArgumentNullException.ThrowIfNull(baseDisk);
        var store = FileImageStore.Create(path);
        try
        {
            Create(store, baseDisk.Length);
        }
        catch
        {
            store.Dispose();
            File.Delete(path);
            throw;
        }
        return Open(store, new Qcow2OpenOptions { Backing = baseDisk });
    }

    /// <summary>Makes everything durable that was written before the call, tables included.</summary>
    /// <exception cref="StorageException">The host could not store it. After that, the image takes no more writes.</exception>
    public void Flush()
    {
        if (IsReadOnly)
        {
            return;
        }
        lock (_lock)
        {
            ThrowIfFailed();
            if (HasDirtyTables)
            {
                Commit();
                return;
            }
        }
        try
        {
            _store.Flush();
        }
        catch (StorageException exception)
        {
            // What the host has dropped after a failed flush cannot be known.
            _failure = exception;
            throw;
        }
    }

    /// <summary>
    /// Writes what the caches hold, and closes the store and the backing disk. An error in doing so is not reported; call
    /// <see cref="Flush"/> before to know that everything is stored.
    /// </summary>
    public void Dispose()
    {
        lock (_lock)
        {
            if (_disposed)
            {
                return;
            }
            _disposed = true;
            try
            {
                if (!IsReadOnly && _failure is null)
                {
                    Commit();
                }
            }
            catch (StorageException)
            {
                // The file is as consistent as after a crash.
            }
            _store.Dispose();
            _backing?.Dispose();
        }
    }

    private bool HasDirtyTables => _l2.DirtyCount > 0 || _dirtyL1.Count > 0 || _refcounts!.IsDirty || _refcounts.HasPendingFrees;

    /// <summary>
    /// Brings the tables into the file, in the order that keeps it consistent: data, new tables and raised counts; then the
    /// references to them; then lowered counts.
    /// </summary>
    private void Commit()
    {
        ThrowIfFailed();
        try
        {
            _refcounts!.Publish();
            _refcounts.WriteDirty();
            if (_l2.DirtyCount > 0 || _dirtyL1.Count > 0)
            {
                _store.Flush();
                _l2.WriteDirty();
                WriteDirtyL1();
            }
            _store.Flush();
        }
        catch (StorageException exception)
        {
            _failure = exception;
            throw;
        }
        if (_refcounts.HasPendingFrees)
        {
            // No request can start while the lock is held, and none needs it to end.
            SpinWait.SpinUntil(() => Volatile.Read(ref _inFlight) == 0);
            _refcounts.ApplyFrees();
            _refcounts.WriteDirty();
        }
    }

    private void WriteDirtyL1()
    {
        const int EntriesPerSector = BlockRange.DefaultSectorSize / 8;
        Span<byte> bytes = stackalloc byte[BlockRange.DefaultSectorSize];
        foreach (var sector in _dirtyL1)
        {
            var first = sector * EntriesPerSector;
            var count = Math.Min(EntriesPerSector, _l1.Length - first);
            for (var i = 0; i < count; i++)
            {
                BinaryPrimitives.WriteUInt64BigEndian(bytes[(i * 8)..], _l1[first + i]);
            }
            _store.Write(_header.L1TableOffset + first * 8L, bytes[..(count * 8)]);
        }
        _dirtyL1.Clear();
    }

    private void SetL1(int index, ulong value)
    {
        _l1[index] = value;
        _dirtyL1.Add(index / (BlockRange.DefaultSectorSize / 8));
    }

    private void ThrowIfFailed()
    {
        if (_failure is { } failure)
        {
            throw new StorageException(failure.Problem, $"The image takes no more writes since an earlier error: {failure.Message}", failure);
        }
    }

    private void CheckBeforeWriting()
    {
        if (_header.Incompatible.HasFlag(Qcow2Incompatible.Corrupt))
        {
            throw new StorageException(StorageProblem.NeedsRepair, "The qcow2 image is marked as damaged; it can be read, and repaired by a check.");
        }
        if (_header.Incompatible.HasFlag(Qcow2Incompatible.Dirty))
        {
            throw new StorageException(
                StorageProblem.NeedsRepair, "The qcow2 image was not closed by its last writer and has outdated reference counts; repair it by a check.");
        }
        if (_header.Autoclear != 0)
        {
            // "Autoclear features": who does not keep them up to date clears them before writing.
            _header.Autoclear = 0;
            _store.Write(Qcow2Header.FeatureOffset + 16, stackalloc byte[8]);
            _store.Flush();
        }
    }

    private void ProtectTables()
    {
        Protect(0, 1, "header");
        Protect(_header.L1TableOffset, _l1.Length * 8L, "L1 table");
        Protect(_header.RefcountTableTableOffset, (long)_header.RefcountTableClusters * _clusterSize, "refcount table");
        if (_header.SnapshotCount > 0)
        {
            Protect(_header.SnapshotsOffset, Qcow2SnapshotTable.Read(_store, _header).Length, "snapshot table");
        }
    }

    private void ProtectL2Tables()
    {
        _metadata.EnsureCapacity(_metadata.Count + _l1.Count(entry => entry != 0));
        for (var i = 0; i < _l1.Length; i++)
        {
            if (_l1[i] != 0)
            {
                Protect(L2Offset(i), _clusterSize, "L2 table");
            }
        }
    }

    private void Protect(long offset, long length, string what)
    {
        for (var cluster = offset >> _clusterBits; cluster << _clusterBits < offset + length; cluster++)
        {
            if (cluster > uint.MaxValue || !_metadata.Add((uint)cluster))
            {
                throw Qcow2Header.Corrupt($"its {what} at 0x{offset:x} overlaps another table");
            }
        }
    }

    /// <summary>Keeps everybody from writing to an image whose tables turned out to be damaged.</summary>
    private void MarkCorrupt(StorageException exception)
    {
        lock (_lock)
        {
            if (_failure is not null)
            {
                return;
            }
            _failure = exception;
            if (_header.Version >= 3)
            {
                _header.Incompatible |= Qcow2Incompatible.Corrupt;
                Span<byte> bits = stackalloc byte[8];
                BinaryPrimitives.WriteUInt64BigEndian(bits, (ulong)_header.Incompatible);
                _store.Write(Qcow2Header.FeatureOffset, bits);
            }
        }
    }
}
