namespace KvmSharp.Storage;

/// <summary>
/// A disk that shows a base and keeps every change in memory; the base is never written. The changes are gone when the
/// object is disposed. For an overlay in a file, see <see cref="Qcow2Image.CreateOverlay"/>.
/// </summary>
/// <remarks>All members are callable from any thread; the base is read by one thread at a time.</remarks>
public sealed class OverlayBlockBackend : IBlockBackend
{
    private const int BlockSize = 4096;
    private const int BlocksPerPage = 1024;
    private const int BlocksPerSlab = 256;

    // What a block's map entry says; other values are 1 + the number of the block in the slabs.
    private const int InBase = 0;
    private const int Zero = -1;

    private readonly Lock _lock = new();
    private readonly IBlockBackend _base;
    private readonly int[]?[] _map;
    private readonly List<byte[]> _slabs = [];
    private readonly Stack<int> _free = new();
    private readonly long _maxBlocks;
    private int _used;

    /// <summary>Puts an overlay over a disk.</summary>
    /// <param name="baseDisk">What is shown where nothing was written; it belongs to this object from now on.</param>
    /// <param name="maxBytes">How much memory the changes may take, in bytes; writes that need more fail.</param>
    public OverlayBlockBackend(IBlockBackend baseDisk, long maxBytes = long.MaxValue)
    {
        ArgumentNullException.ThrowIfNull(baseDisk);
        ArgumentOutOfRangeException.ThrowIfNegative(maxBytes);
        _base = baseDisk;
        _maxBlocks = Math.Min(maxBytes / BlockSize, int.MaxValue - 1);
        Length = baseDisk.Length;
        SectorSize = baseDisk.SectorSize;
        const long BytesPerPage = (long)BlockSize * BlocksPerPage;
        var pages = (Length + BytesPerPage - 1) / BytesPerPage;
        _map = pages <= Array.MaxLength
            ? new int[]?[pages]
            : throw new StorageException(StorageProblem.Unsupported, $"A disk of {Length} bytes is too large for an overlay in memory.");
    }

    /// <inheritdoc/>
    public long Length { get; }

    /// <inheritdoc/>
    public int SectorSize { get; }

    /// <inheritdoc/>
    public BlockCapabilities Capabilities => BlockCapabilities.Discard | BlockCapabilities.WriteZeroes;

    /// <inheritdoc/>
    public int DiscardGranularity => BlockSize;

    /// <summary>How much memory the changed content takes, in bytes.</summary>
    public long ChangedBytes
    {
        get
        {
            lock (_lock)
            {
                return (long)(_used - _free.Count) * BlockSize;
            }
        }
    }

    /// <inheritdoc/>
    public void Read(long offset, Span<byte> buffer)
    {
        BlockRange.Check(this, offset, buffer.Length);
        lock (_lock)
        {
            ReadLocked(offset, buffer);
        }
    }

    /// <inheritdoc/>
    public void Write(long offset, ReadOnlySpan<byte> data)
    {
        BlockRange.CheckWrite(this, offset, data.Length);
        lock (_lock)
        {
            while (data.Length > 0)
            {
                var within = (int)(offset % BlockSize);
                var count = Math.Min(data.Length, BlockSize - within);
                data[..count].CopyTo(Own(offset / BlockSize, count < BlockSize)[within..]);
                offset += count;
                data = data[count..];
            }
        }
    }

    /// <summary>Does nothing: the changes are as durable as the process.</summary>
    public void Flush()
    {
    }

    /// <inheritdoc/>
    public void Discard(long offset, long length) => WriteZeroes(offset, length, mayDiscard: true);

    /// <inheritdoc/>
    public void WriteZeroes(long offset, long length, bool mayDiscard)
    {
        BlockRange.CheckWrite(this, offset, length);
        lock (_lock)
        {
            while (length > 0)
            {
                var within = (int)(offset % BlockSize);
                var count = (int)Math.Min(length, BlockSize - within);
                var block = offset / BlockSize;
                if (Entry(block) != Zero)
                {
                    if (count == BlockSize)
                    {
                        SetEntry(block, Zero);
                    }
                    else
                    {
                        Own(block, needsContent: true).Slice(within, count).Clear();
                    }
                }
                offset += count;
                length -= count;
            }
        }
    }

    /// <inheritdoc/>
    public BlockExtent GetExtent(long offset, long length)
    {
        BlockRange.Check(this, offset, length);
        lock (_lock)
        {
            var first = Entry(offset / BlockSize);
            var end = (offset / BlockSize + 1) * BlockSize;
            while (end - offset < length && Math.Sign(Entry(end / BlockSize)) == Math.Sign(first))
            {
                end += BlockSize;
            }
            length = Math.Min(length, end - offset);
            return first == InBase ? _base.GetExtent(offset, length) : new BlockExtent(length, first == Zero);
        }
    }

    /// <summary>Drops the changes and closes the base.</summary>
    public void Dispose() => _base.Dispose();

    private void ReadLocked(long offset, Span<byte> buffer)
    {
        while (buffer.Length > 0)
        {
            var within = (int)(offset % BlockSize);
            var count = Math.Min(buffer.Length, BlockSize - within);
            switch (Entry(offset / BlockSize))
            {
                case InBase:
                    // One request for all that follows from the base.
                    while (count < buffer.Length && Entry((offset + count) / BlockSize) == InBase)
                    {
                        count = Math.Min(buffer.Length, count + BlockSize);
                    }
                    _base.Read(offset, buffer[..count]);
                    break;
                case Zero:
                    buffer[..count].Clear();
                    break;
                case var entry:
                    Block(entry).Slice(within, count).CopyTo(buffer);
                    break;
            }
            offset += count;
            buffer = buffer[count..];
        }
    }

    private int Entry(long block) => _map[block / BlocksPerPage] is { } page ? page[block % BlocksPerPage] : InBase;

    private void SetEntry(long block, int value)
    {
        ref var page = ref _map[block / BlocksPerPage];
        page ??= new int[BlocksPerPage];
        ref var entry = ref page[block % BlocksPerPage];
        if (entry > 0)
        {
            _free.Push(entry - 1);
        }
        entry = value;
    }

    private Span<byte> Block(int entry) =>
        _slabs[(entry - 1) / BlocksPerSlab].AsSpan((entry - 1) % BlocksPerSlab * BlockSize, BlockSize);

    /// <summary>The memory of a block that can be written, filled with the present content if that is needed.</summary>
    private Span<byte> Own(long block, bool needsContent)
    {
        var entry = Entry(block);
        if (entry > 0)
        {
            return Block(entry);
        }
        if (!_free.TryPop(out var number))
        {
            if (_used >= _maxBlocks)
            {
                throw new StorageException(StorageProblem.NoSpace, $"The overlay in memory has reached its limit of {_maxBlocks * BlockSize} bytes.");
            }
            if (_used == _slabs.Count * BlocksPerSlab)
            {
                _slabs.Add(GC.AllocateUninitializedArray<byte>(BlocksPerSlab * BlockSize));
            }
            number = _used++;
        }
        var memory = Block(number + 1);
        if (needsContent)
        {
            try
            {
                Fill(block, entry, memory);
            }
            catch
            {
                _free.Push(number);
                throw;
            }
        }
        SetEntry(block, number + 1);
        return memory;
    }

    private void Fill(long block, int entry, Span<byte> memory)
    {
        var present = entry == Zero ? 0 : (int)Math.Min(BlockSize, Length - block * BlockSize);
        if (present > 0)
        {
            _base.Read(block * BlockSize, memory[..present]);
        }
        memory[present..].Clear();
    }
}
