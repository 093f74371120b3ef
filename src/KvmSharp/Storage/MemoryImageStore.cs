namespace KvmSharp.Storage;

/// <summary>An image in the memory of this process, without cost for what was never written. Gone when the process ends.</summary>
/// <remarks>All members are callable from any thread.</remarks>
public sealed class MemoryImageStore : IImageStore
{
    private const int ChunkSize = 1 << 16;

    private readonly Lock _lock = new();
    private readonly Dictionary<long, byte[]> _chunks = [];
    private readonly long _maxBytes;
    private long _length;

    /// <summary>Creates an empty store.</summary>
    /// <param name="maxBytes">How much memory the content may take, in bytes; writes that need more fail.</param>
    /// <param name="isReadOnly">Whether writes are refused.</param>
    public MemoryImageStore(long maxBytes = long.MaxValue, bool isReadOnly = false)
    {
        ArgumentOutOfRangeException.ThrowIfNegative(maxBytes);
        _maxBytes = maxBytes;
        IsReadOnly = isReadOnly;
    }

    /// <summary>Creates a store with content.</summary>
    /// <param name="content">The content; it is copied.</param>
    /// <param name="isReadOnly">Whether writes are refused.</param>
    public MemoryImageStore(ReadOnlySpan<byte> content, bool isReadOnly = false)
        : this()
    {
        Write(0, content);
        IsReadOnly = isReadOnly;
    }

    /// <inheritdoc/>
    public long Length
    {
        get
        {
            lock (_lock)
            {
                return _length;
            }
        }
    }

    /// <inheritdoc/>
    public bool IsReadOnly { get; }

    /// <inheritdoc/>
    public bool CanReleaseSpace => !IsReadOnly;

    /// <summary>How much memory the content takes, in bytes.</summary>
    public long AllocatedBytes
    {
        get
        {
            lock (_lock)
            {
                return (long)_chunks.Count * ChunkSize;
            }
        }
    }

    /// <inheritdoc/>
    public void Read(long offset, Span<byte> buffer)
    {
        ArgumentOutOfRangeException.ThrowIfNegative(offset);
        lock (_lock)
        {
            while (buffer.Length > 0)
            {
                var within = (int)(offset % ChunkSize);
                var count = Math.Min(buffer.Length, ChunkSize - within);
                if (_chunks.TryGetValue(offset / ChunkSize, out var chunk))
                {
                    chunk.AsSpan(within, count).CopyTo(buffer);
                }
                else
                {
                    buffer[..count].Clear();
                }
                offset += count;
                buffer = buffer[count..];
            }
        }
    }

    /// <inheritdoc/>
    public void Write(long offset, ReadOnlySpan<byte> data)
    {
        CheckWritable();
        ArgumentOutOfRangeException.ThrowIfNegative(offset);
        lock (_lock)
        {
            while (data.Length > 0)
            {
                var within = (int)(offset % ChunkSize);
                var count = Math.Min(data.Length, ChunkSize - within);
                if (!_chunks.TryGetValue(offset / ChunkSize, out var chunk))
                {
                    if (((long)_chunks.Count + 1) * ChunkSize > _maxBytes)
                    {
                        throw new StorageException(StorageProblem.NoSpace, $"The image in memory has reached its limit of {_maxBytes} bytes.");
                    }
                    chunk = new byte[ChunkSize];
                    _chunks.Add(offset / ChunkSize, chunk);
                }
                data[..count].CopyTo(chunk.AsSpan(within));
                offset += count;
                data = data[count..];
                _length = Math.Max(_length, offset);
            }
        }
    }

    /// <inheritdoc/>
    public void SetLength(long length)
    {
        CheckWritable();
        ArgumentOutOfRangeException.ThrowIfNegative(length);
        lock (_lock)
        {
            if (length < _length)
            {
                Clear(length, _length - length);
            }
            _length = length;
        }
    }

    /// <inheritdoc/>
    public void Flush()
    {
    }

    /// <inheritdoc/>
    public bool TryZero(long offset, long length, bool releaseSpace)
    {
        CheckWritable();
        ArgumentOutOfRangeException.ThrowIfNegative(offset);
        ArgumentOutOfRangeException.ThrowIfNegative(length);
        lock (_lock)
        {
            Clear(offset, Math.Min(length, Math.Max(0, _length - offset)));
        }
        return true;
    }

    /// <inheritdoc/>
    public BlockExtent GetExtent(long offset, long length)
    {
        ArgumentOutOfRangeException.ThrowIfNegative(offset);
        ArgumentOutOfRangeException.ThrowIfLessThan(length, 1);
        lock (_lock)
        {
            if (offset >= _length)
            {
                return new BlockExtent(length, true);
            }
            var zero = !_chunks.ContainsKey(offset / ChunkSize);
            var end = (offset / ChunkSize + 1) * ChunkSize;
            while (end < _length && end - offset < length && _chunks.ContainsKey(end / ChunkSize) != zero)
            {
                end += ChunkSize;
            }
            return new BlockExtent(Math.Min(length, end - offset), zero);
        }
    }

    /// <summary>Returns the whole content.</summary>
    public byte[] ToArray()
    {
        lock (_lock)
        {
            var content = new byte[_length];
            Read(0, content);
            return content;
        }
    }

    /// <summary>Does nothing: the content lives as long as the object, so that an image in it can be opened again.</summary>
    public void Dispose()
    {
    }

    private void Clear(long offset, long length)
    {
        var end = offset + length;
        // Whichever is less work: the chunks that exist or those of the range.
        if (length / ChunkSize > _chunks.Count)
        {
            foreach (var index in _chunks.Keys.Where(index => (index + 1) * ChunkSize > offset && index * ChunkSize < end).ToArray())
            {
                ClearChunk(index, offset, end);
            }
            return;
        }
        for (var index = offset / ChunkSize; index * ChunkSize < end; index++)
        {
            ClearChunk(index, offset, end);
        }
    }

    private void ClearChunk(long index, long offset, long end)
    {
        var first = (int)Math.Max(0, offset - index * ChunkSize);
        var last = (int)Math.Min(ChunkSize, end - index * ChunkSize);
        if (first == 0 && last == ChunkSize)
        {
            _chunks.Remove(index);
        }
        else if (_chunks.TryGetValue(index, out var chunk))
        {
            chunk.AsSpan(first, last - first).Clear();
        }
    }

    private void CheckWritable()
    {
        if (IsReadOnly)
        {
            throw new StorageException(StorageProblem.ReadOnly, "The image in memory cannot be written.");
        }
    }
}
