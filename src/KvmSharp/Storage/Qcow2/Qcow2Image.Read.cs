using System.Buffers;
using System.IO.Compression;

namespace KvmSharp.Storage;

public sealed partial class Qcow2Image
{
    // The file never becomes shorter, so that asking again is needed only for what seems to be beyond its end.
    private long _knownLength;
    private byte[]? _decompressed;
    private ulong _decompressedEntry;

    private enum ClusterKind
    {
        /// <summary>Shows the backing disk, or zeros.</summary>
        Unallocated,
        Zero,
        Data,
        Compressed,
    }

    /// <summary>A part of the disk that is in one piece in the file.</summary>
    private readonly record struct Mapping(ClusterKind Kind, long Length, long HostOffset, ulong Entry);

    /// <inheritdoc/>
    public void Read(long offset, Span<byte> buffer)
    {
        BlockRange.Check(this, offset, buffer.Length);
        while (buffer.Length > 0)
        {
            Mapping mapping;
            lock (_lock)
            {
                mapping = Map(offset, buffer.Length);
                if (mapping.Kind == ClusterKind.Compressed)
                {
                    Decompress(mapping.Entry).AsSpan((int)(offset & (_clusterSize - 1)), (int)mapping.Length).CopyTo(buffer);
                }
                Interlocked.Increment(ref _inFlight);
            }
            try
            {
                var part = buffer[..(int)mapping.Length];
                switch (mapping.Kind)
                {
                    case ClusterKind.Data:
                        _store.Read(mapping.HostOffset, part);
                        break;
                    case ClusterKind.Unallocated when _backing is not null:
                        BlockRange.ReadOrZero(_backing, offset, part);
                        break;
                    case ClusterKind.Unallocated or ClusterKind.Zero:
                        part.Clear();
                        break;
                }
            }
            finally
            {
                Interlocked.Decrement(ref _inFlight);
            }
            offset += mapping.Length;
            buffer = buffer[(int)mapping.Length..];
        }
    }

    /// <inheritdoc/>
    public BlockExtent GetExtent(long offset, long length)
    {
        BlockRange.Check(this, offset, length);
        Mapping mapping;
        lock (_lock)
        {
            mapping = Map(offset, length);
        }
        var inBacking = mapping.Kind == ClusterKind.Unallocated && _backing is not null ? Math.Max(0, _backing.Length - offset) : 0;
        return inBacking > 0
            ? _backing!.GetExtent(offset, Math.Min(mapping.Length, inBacking))
            : new BlockExtent(mapping.Length, mapping.Kind is ClusterKind.Unallocated or ClusterKind.Zero);
    }

    private Mapping Map(long offset, long length)
    {
        var index = (int)(offset >> _coverageBits);
        if (index >= _l1.Length)
        {
            // The rest of a disk whose size was rounded up to whole sectors.
            return new Mapping(ClusterKind.Unallocated, length, 0, 0);
        }
        if (_l1[index] == 0)
        {
            var end = (index + 1L) << _coverageBits;
            while (end - offset < length && ++index < _l1.Length && _l1[index] == 0)
            {
                end += 1L << _coverageBits;
            }
            return new Mapping(ClusterKind.Unallocated, Math.Min(length, end - offset), 0, 0);
        }
        var (page, slot) = L2Page(offset);
        var entry = page[slot];
        var kind = Kind(entry);
        var within = offset & (_clusterSize - 1);
        var available = _clusterSize - within;
        long host = 0;
        if (kind == ClusterKind.Data)
        {
            host = DataOffset(entry);
        }
        if (kind != ClusterKind.Compressed)
        {
            var next = host;
            while (available < length && ++slot < _entriesPerPage && Kind(page[slot]) == kind)
            {
                if (kind == ClusterKind.Data && DataOffset(page[slot]) != (next += _clusterSize))
                {
                    break;
                }
                available += _clusterSize;
            }
        }
        return new Mapping(kind, Math.Min(length, available), host + within, entry);
    }

    /// <summary>The page of the L2 table that maps an offset, and the index of the entry in it. The table must exist.</summary>
    private (MetadataCache.Page Page, int Slot) L2Page(long offset)
    {
        var table = L2Offset((int)(offset >> _coverageBits));
        var entry = (int)((offset & ((1L << _coverageBits) - 1)) >> _clusterBits);
        return (_l2.Get(table + (long)(entry / _entriesPerPage) * _l2.PageSize), entry % _entriesPerPage);
    }

    private long L2Offset(int index)
    {
        var entry = _l1[index];
        var offset = entry & EntryOffset;
        return (entry & ~(EntryOffset | Copied)) == 0 && IsClusterInFile(offset)
            ? (long)offset
            : throw Qcow2Header.Corrupt($"L1 table entry {index} is 0x{entry:x}");
    }

    private ClusterKind Kind(ulong entry)
    {
        if ((entry & CompressedFlag) != 0)
        {
            return ClusterKind.Compressed;
        }
        const ulong Reserved = ~(EntryOffset | Copied | ZeroFlag);
        if ((entry & Reserved) != 0 || ((entry & ZeroFlag) != 0 && _header.Version < 3))
        {
            throw Qcow2Header.Corrupt($"an L2 table entry is 0x{entry:x}");
        }
        return (entry & ZeroFlag) != 0 ? ClusterKind.Zero : (entry & EntryOffset) != 0 ? ClusterKind.Data : ClusterKind.Unallocated;
    }

    private long DataOffset(ulong entry)
    {
        var offset = entry & EntryOffset;
        return IsClusterInFile(offset) ? (long)offset : throw Qcow2Header.Corrupt($"an L2 table entry is 0x{entry:x}");
    }

    private bool IsClusterInFile(ulong offset) =>
        offset != 0 && (offset & (ulong)(_clusterSize - 1)) == 0 && offset >> _clusterBits <= uint.MaxValue
            && (offset < (ulong)_knownLength || offset < (ulong)(_knownLength = _store.Length));

    /// <summary>"Compressed Clusters Descriptor": where the compressed data begins and how long it can be.</summary>
    internal static (long Offset, int Length) CompressedRange(ulong entry, int clusterBits)
    {
        var offsetBits = 62 - (clusterBits - 8);
        var offset = (long)(entry & ((1UL << offsetBits) - 1));
        var sectors = (int)((entry & ~(Copied | CompressedFlag)) >> offsetBits) + 1;
        return (offset, sectors * 512 - (int)(offset & 511));
    }

    private byte[] Decompress(ulong entry)
    {
        if (_decompressed is { } present && _decompressedEntry == entry)
        {
            return present;
        }
        var (offset, length) = CompressedRange(entry, _clusterBits);
        if (offset >= _store.Length || offset < _clusterSize)
        {
            throw Qcow2Header.Corrupt($"an L2 table entry is 0x{entry:x}");
        }
        var compressed = ArrayPool<byte>.Shared.Rent(length);
        try
        {
            _store.Read(offset, compressed.AsSpan(0, length));
            _decompressed ??= new byte[_clusterSize];
            _decompressedEntry = 0;
            using var inflater = new DeflateStream(new MemoryStream(compressed, 0, length), CompressionMode.Decompress);
            inflater.ReadExactly(_decompressed);
        }
        catch (Exception exception) when (exception is InvalidDataException or EndOfStreamException)
        {
            throw new StorageException(StorageProblem.Corrupt, $"The compressed cluster at 0x{offset:x} of the qcow2 image is damaged.", exception);
        }
        finally
        {
            ArrayPool<byte>.Shared.Return(compressed);
        }
        _decompressedEntry = entry;
        return _decompressed;
    }
}
