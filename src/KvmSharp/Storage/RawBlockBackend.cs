using System.Numerics;

namespace KvmSharp.Storage;

/// <summary>
/// A disk whose content is that of its store, byte for byte. A file stays sparse: what the guest discards becomes a hole.
/// All members are callable from any thread, several at once.
/// </summary>
public sealed class RawBlockBackend : IBlockBackend
{
    private readonly IImageStore _store;

    /// <summary>Makes a disk of a store. The disk is as large as the store, rounded up to whole sectors.</summary>
    /// <param name="store">The store; it belongs to this object from now on.</param>
    /// <param name="sectorSize">The unit of requests in bytes: a power of two from 512 to 4096.</param>
    public RawBlockBackend(IImageStore store, int sectorSize = BlockRange.DefaultSectorSize)
    {
        ArgumentNullException.ThrowIfNull(store);
        if (sectorSize is < 512 or > 4096 || !BitOperations.IsPow2(sectorSize))
        {
            throw new ArgumentOutOfRangeException(nameof(sectorSize));
        }
        _store = store;
        SectorSize = sectorSize;
        Length = (Math.Min(store.Length, long.MaxValue - sectorSize) + sectorSize - 1) & -(long)sectorSize;
    }

    /// <inheritdoc/>
    public long Length { get; }

    /// <inheritdoc/>
    public int SectorSize { get; }

    /// <inheritdoc/>
    public bool IsReadOnly => _store.IsReadOnly;

    /// <inheritdoc/>
    public BlockCapabilities Capabilities =>
        _store.CanReleaseSpace ? BlockCapabilities.Discard | BlockCapabilities.WriteZeroes : BlockCapabilities.None;

    /// <inheritdoc/>
    public int DiscardGranularity => 4096;

    /// <summary>Opens a raw image.</summary>
    /// <param name="path">The file or block device.</param>
    /// <param name="readOnly">Whether to open it for reading only.</param>
    /// <exception cref="StorageException">The file cannot be opened, or somebody else uses it.</exception>
    public static RawBlockBackend Open(string path, bool readOnly = false) => new(FileImageStore.Open(path, readOnly));

    /// <summary>Creates a raw image without any data: a sparse file.</summary>
    /// <param name="path">The file; it must not exist.</param>
    /// <param name="length">The size of the disk in bytes, a multiple of 512.</param>
    /// <exception cref="StorageException">The file cannot be created.</exception>
    public static RawBlockBackend Create(string path, long length)
    {
        ArgumentOutOfRangeException.ThrowIfNegative(length);
        if (length % BlockRange.DefaultSectorSize != 0)
        {
            throw new ArgumentOutOfRangeException(nameof(length));
        }
        var store = FileImageStore.Create(path);
        try
        {
            store.SetLength(length);
            return new RawBlockBackend(store);
        }
        catch
        {
            store.Dispose();
            throw;
        }
    }

    /// <inheritdoc/>
    public void Read(long offset, Span<byte> buffer)
    {
        BlockRange.Check(this, offset, buffer.Length);
        _store.Read(offset, buffer);
    }

    /// <inheritdoc/>
    public void Write(long offset, ReadOnlySpan<byte> data)
    {
        BlockRange.CheckWrite(this, offset, data.Length);
        _store.Write(offset, data);
    }

    /// <inheritdoc/>
    public void Flush() => _store.Flush();

    /// <inheritdoc/>
    public void Discard(long offset, long length)
    {
        BlockRange.CheckWrite(this, offset, length);
        _store.TryZero(offset, length, releaseSpace: true);
    }

    /// <inheritdoc/>
    public void WriteZeroes(long offset, long length, bool mayDiscard)
    {
        BlockRange.CheckWrite(this, offset, length);
        if (!(mayDiscard && _store.TryZero(offset, length, releaseSpace: true)) && !_store.TryZero(offset, length, releaseSpace: false))
        {
            BlockRange.FillWithZeroes(offset, length, _store.Write);
        }
    }

    /// <inheritdoc/>
    public BlockExtent GetExtent(long offset, long length)
    {
        BlockRange.Check(this, offset, length);
        var extent = _store.GetExtent(offset, length);
        // Holes and data begin where the host's file system wants; only whole sectors of zeros count as such.
        var whole = extent.Length & -(long)SectorSize;
        return whole == 0 ? new BlockExtent(Math.Min(SectorSize, length), false)
            : extent.IsZero ? extent with { Length = whole }
            : extent with { Length = Math.Min(length, (extent.Length + SectorSize - 1) & -(long)SectorSize) };
    }

    /// <summary>Closes the store. What was not flushed is not durable.</summary>
    public void Dispose() => _store.Dispose();
}
