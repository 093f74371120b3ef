using System.Buffers.Binary;
using System.Runtime.InteropServices;

namespace KvmSharp.Storage;

/// <summary>Clusters that the allocator hands out, next to each other in the file.</summary>
/// <param name="First">The number of the first cluster.</param>
/// <param name="Count">How many, at least one.</param>
/// <param name="IsFresh">Whether nothing was ever written there: they lie beyond the end that the file had when it was opened.</param>
internal readonly record struct ClusterRun(long First, int Count, bool IsFresh);

/// <summary>
/// The reference counts of an image's clusters, and the allocator. Source: the qcow2 specification, "Host cluster
/// management". Changes stay in memory until <see cref="WriteDirty"/>; a count goes down in the file only after the
/// reference is gone there, which is why frees wait in a list. Not thread-safe.
/// </summary>
internal sealed class Qcow2Refcounts
{
    private const int MaxPendingRuns = 1 << 16;
    private const int MaxFreeRuns = 1 << 16;

    // Cluster numbers fit into 32 bits, so that sets of them stay small.
    private const long MaxClusters = 1L << 32;

    private readonly IImageStore _store;
    private readonly Qcow2Header _header;
    private readonly MetadataCache _cache;
    private readonly HashSet<uint> _metadata;
    private readonly List<(long First, int Count, bool Punch)> _pending = [];
    private readonly Stack<(long First, int Count)> _free = new();
    private readonly SortedSet<int> _unpublished = [];
    private readonly int _order;
    private readonly int _blockBits;
    private ulong[] _table;
    private long _next;
    private long _freshFrom;
    private bool _forgotFree;

    /// <summary>Loads the refcount table.</summary>
    /// <param name="store">The image.</param>
    /// <param name="header">Its header; kept up to date when the table moves.</param>
    /// <param name="metadata">The clusters that hold tables, which are never handed out or freed; kept up to date.</param>
    /// <param name="cacheBytes">How much of the counts to keep in memory.</param>
    /// <param name="invalid">Told of entries that cannot be; by default they are an error.</param>
    internal Qcow2Refcounts(
        IImageStore store, Qcow2Header header, HashSet<uint> metadata, long cacheBytes, Action<int, ulong>? invalid = null)
    {
        _store = store;
        _header = header;
        _metadata = metadata;
        _order = header.RefcountOrder;
        _blockBits = header.ClusterBits + 3 - _order;
        _cache = new MetadataCache(store, header.ClusterSize, cacheBytes);
        var length = store.Length;
        _freshFrom = Clusters(length);
        if (header.RefcountTableTableOffset == 0 || header.RefcountTableClusters == 0)
        {
            throw Qcow2Header.Corrupt("it has no refcount table");
        }
        _table = ReadTable(store, header.RefcountTableTableOffset, header.RefcountTableClusters * (header.ClusterSize / 8), "refcount table");
        for (var index = 0; index < _table.Length; index++)
        {
            var entry = _table[index];
            if (entry != 0 && (!IsClusterInFile(entry, length) || !metadata.Add((uint)(entry >> header.ClusterBits))))
            {
                (invalid ?? throw Qcow2Header.Corrupt($"refcount table entry {index} is 0x{entry:x}"))(index, entry);
                _table[index] = 0;
            }
        }
    }

    internal ReadOnlySpan<ulong> Table => _table;

    internal int ClustersPerBlockBits => _blockBits;

    internal ulong MaxCount => _order == 6 ? ulong.MaxValue : (1UL << (1 << _order)) - 1;

    internal bool HasPendingFrees => _pending.Count > 0;

    internal bool IsDirty => _cache.DirtyCount > 0 || _unpublished.Count > 0;

    internal bool IsCrowded => _cache.IsCrowded || _pending.Count > MaxPendingRuns;

    internal static ulong[] ReadTable(IImageStore store, long offset, int entries, string what)
    {
        if (offset > store.Length - entries * 8L)
        {
            throw new StorageException(StorageProblem.Truncated, $"The qcow2 image ends before its {what}.");
        }
        var table = new ulong[entries];
        store.Read(offset, MemoryMarshal.AsBytes(table.AsSpan()));
        BinaryPrimitives.ReverseEndianness(table, table);
        return table;
    }

    internal ulong Get(long cluster)
    {
        var block = cluster >> _blockBits;
        if (block >= _table.Length || _table[block] == 0)
        {
            return 0;
        }
        var (page, index) = Locate(cluster);
        return GetCount(page.Data, index);
    }

    /// <summary>Sets a count whose block exists.</summary>
    internal void Set(long cluster, ulong value)
    {
        var (page, index) = Locate(cluster);
        SetCount(page.Data, index, value);
        _cache.MarkDirty(page);
    }

    /// <summary>Hands out up to a number of clusters with a count of one each.</summary>
    internal ClusterRun Allocate(int wanted)
    {
        var run = TakeFreed(wanted) ?? TakeNext(wanted);
        for (var i = 0; i < run.Count; i++)
        {
            if (_metadata.Contains((uint)(run.First + i)))
            {
                throw Qcow2Header.Corrupt($"cluster {run.First + i} holds a table and is marked as free");
            }
        }
        for (var i = 0; i < run.Count; i++)
        {
            Set(run.First + i, 1);
        }
        _freshFrom = Math.Max(_freshFrom, run.First + run.Count);
        return run;
    }

    /// <summary>Takes back clusters that nothing in the file refers to.</summary>
    internal void Release(ClusterRun run)
    {
        for (var i = 0; i < run.Count; i++)
        {
            Set(run.First + i, 0);
        }
        AddFree(run.First, run.Count);
    }

    /// <summary>Notes that one reference to a cluster is gone, once what is dirty now is in the file.</summary>
    /// <param name="cluster">The cluster.</param>
    /// <param name="punch">Whether its space is to be given back to the store.</param>
    internal void FreeLater(long cluster, bool punch)
    {
        if (_metadata.Contains((uint)cluster))
        {
            throw Qcow2Header.Corrupt($"cluster {cluster} holds a table and is used for data, too");
        }
        if (_pending.Count > 0 && _pending[^1] is var last && last.First + last.Count == cluster && last.Punch == punch && last.Count < int.MaxValue)
        {
            _pending[^1] = last with { Count = last.Count + 1 };
        }
        else
        {
            _pending.Add((cluster, 1, punch));
        }
    }

    /// <summary>Lowers the counts that wait. Only right when no file content refers to the clusters any more.</summary>
    internal void ApplyFrees()
    {
        foreach (var (first, count, punch) in _pending)
        {
            var zeroes = 0;
            for (var i = 0; i <= count; i++)
            {
                var value = i < count ? Get(first + i) : 0;
                if (value == 1)
                {
                    Set(first + i, 0);
                    zeroes++;
                    continue;
                }
                if (zeroes > 0)
                {
                    AddFree(first + i - zeroes, zeroes);
                    if (punch)
                    {
                        _store.TryZero((first + i - zeroes) << _header.ClusterBits, (long)zeroes << _header.ClusterBits, releaseSpace: true);
                    }
                    zeroes = 0;
                }
                // A count that is 0 already belongs to a damaged image; the check reports it.
                if (value > 1)
                {
                    Set(first + i, value - 1);
                }
            }
        }
        _pending.Clear();
    }

    /// <summary>Makes new refcount blocks known to the file. Their content must be durable before.</summary>
    internal void Publish()
    {
        if (_unpublished.Count == 0)
        {
            return;
        }
        _store.Flush();
        Span<byte> entry = stackalloc byte[8];
        foreach (var index in _unpublished)
        {
            BinaryPrimitives.WriteUInt64BigEndian(entry, _table[index]);
            _store.Write(_header.RefcountTableTableOffset + index * 8L, entry);
        }
        _unpublished.Clear();
    }

    internal void WriteDirty() => _cache.WriteDirty();

    internal static ulong GetCount(ReadOnlySpan<byte> block, int index, int order) => order switch
    {
        0 => (uint)(block[index >> 3] >> (index & 7)) & 1,
        1 => (uint)(block[index >> 2] >> ((index & 3) * 2)) & 3,
        2 => (uint)(block[index >> 1] >> ((index & 1) * 4)) & 15,
        3 => block[index],
        4 => BinaryPrimitives.ReadUInt16BigEndian(block[(index * 2)..]),
        5 => BinaryPrimitives.ReadUInt32BigEndian(block[(index * 4)..]),
        _ => BinaryPrimitives.ReadUInt64BigEndian(block[(index * 8)..]),
    };

    internal static void SetCount(Span<byte> block, int index, ulong value, int order)
    {
        switch (order)
        {
            case 0 or 1 or 2:
                var width = 1 << order;
                var shift = index * width & 7;
                ref var target = ref block[index * width >> 3];
                target = (byte)(target & ~(((1 << width) - 1) << shift) | (int)value << shift);
                break;
            case 3:
                block[index] = (byte)value;
                break;
            case 4:
                BinaryPrimitives.WriteUInt16BigEndian(block[(index * 2)..], (ushort)value);
                break;
            case 5:
                BinaryPrimitives.WriteUInt32BigEndian(block[(index * 4)..], (uint)value);
                break;
            default:
                BinaryPrimitives.WriteUInt64BigEndian(block[(index * 8)..], value);
                break;
        }
    }

    private ulong GetCount(ReadOnlySpan<byte> block, int index) => GetCount(block, index, _order);

    private void SetCount(Span<byte> block, int index, ulong value) => SetCount(block, index, value, _order);

    private long Clusters(long bytes) => (long)(((ulong)bytes + (ulong)_header.ClusterSize - 1) >> _header.ClusterBits);

    private bool IsClusterInFile(ulong offset, long length) =>
        (offset & (ulong)(_header.ClusterSize - 1)) == 0 && offset < (ulong)length && offset >> _header.ClusterBits < MaxClusters;

    private int CountsPerPage => _cache.PageSize * 8 >> _order;

    private (MetadataCache.Page Page, int Index) Locate(long cluster)
    {
        var within = cluster & ((1L << _blockBits) - 1);
        var block = (long)_table[cluster >> _blockBits];
        return (_cache.Get(block + within / CountsPerPage * _cache.PageSize), (int)(within % CountsPerPage));
    }

    private ClusterRun? TakeFreed(int wanted)
    {
        while (_free.TryPop(out var run))
        {
            // A run can have been taken by the search since.
            var count = 0;
            while (count < Math.Min(wanted, run.Count) && Get(run.First + count) == 0)
            {
                count++;
            }
            var skip = Math.Max(count, 1);
            if (run.Count > skip)
            {
                _free.Push((run.First + skip, run.Count - skip));
            }
            if (count > 0)
            {
                return new ClusterRun(run.First, count, IsFresh: false);
            }
        }
        return null;
    }

    private ClusterRun TakeNext(int wanted)
    {
        while (true)
        {
            if (_forgotFree && _next >= _freshFrom)
            {
                _forgotFree = false;
                _next = 0;
            }
            var block = _next >> _blockBits;
            if (_next >= MaxClusters || _next << _header.ClusterBits > (long)Qcow2Header.OffsetMask)
            {
                throw new StorageException(StorageProblem.NoSpace, "The qcow2 image has reached the largest size of its format.");
            }
            if (block >= _table.Length)
            {
                GrowTable();
            }
            if (_table[block] == 0)
            {
                AddBlock((int)block);
            }
            var (page, index) = Locate(_next);
            var found = FindZero(page.Data, index);
            _next += found;
            if (index + found == CountsPerPage)
            {
                continue;
            }
            var count = 1;
            while (count < wanted && index + found + count < CountsPerPage && GetCount(page.Data, index + found + count) == 0)
            {
                count++;
            }
            var run = new ClusterRun(_next, count, _next >= _freshFrom);
            _next += count;
            return run;
        }
    }

    /// <summary>The distance from an index to the first count of zero in a page, or to its end.</summary>
    private int FindZero(byte[] page, int index)
    {
        var found = _order switch
        {
            3 => page.AsSpan(index).IndexOf((byte)0),
            4 => MemoryMarshal.Cast<byte, ushort>(page)[index..].IndexOf((ushort)0),
            5 => MemoryMarshal.Cast<byte, uint>(page)[index..].IndexOf(0u),
            6 => MemoryMarshal.Cast<byte, ulong>(page)[index..].IndexOf(0UL),
            _ => -2,
        };
        if (found == -2)
        {
            found = 0;
            while (index + found < CountsPerPage && GetCount(page, index + found) != 0)
            {
                found++;
            }
        }
        return found >= 0 ? found : CountsPerPage - index;
    }

    private void AddFree(long first, int count)
    {
        if (_free.Count < MaxFreeRuns)
        {
            _free.Push((first, count));
        }
        else
        {
            _forgotFree = true;
        }
    }

    /// <summary>Makes the block of a range without counts. Its first cluster, free like all of the range, becomes the block.</summary>
    private void AddBlock(int index)
    {
        var cluster = (long)index << _blockBits;
        if (!_metadata.Add((uint)cluster))
        {
            throw Qcow2Header.Corrupt($"cluster {cluster} holds a table and is marked as free");
        }
        var content = new byte[_header.ClusterSize];
        SetCount(content, 0, 1);
        var offset = cluster << _header.ClusterBits;
        try
        {
            _store.Write(offset, content);
        }
        catch
        {
            _metadata.Remove((uint)cluster);
            throw;
        }
        _cache.Drop(offset, content.Length);
        _table[index] = (ulong)offset;
        _unpublished.Add(index);
        _freshFrom = Math.Max(_freshFrom, cluster + 1);
    }

    /// <summary>Moves the table behind everything that it covers, with room for more.</summary>
    private void GrowTable()
    {
        var first = (long)_table.Length << _blockBits;
        var perCluster = _header.ClusterSize / 8;
        var entries = _table.Length;
        int blocks, clusters;
        do
        {
            entries = (entries + entries / 2 + perCluster) / perCluster * perCluster;
            clusters = entries / perCluster;
            blocks = 1;
            while (blocks + (long)clusters > (long)blocks << _blockBits)
            {
                blocks++;
            }
        }
        while (_table.Length + blocks > entries);
        if (entries > Qcow2Header.MaxRefcountTableEntries || first + blocks + clusters >= MaxClusters)
        {
            throw new StorageException(StorageProblem.NoSpace, "The qcow2 image has reached the largest size that is supported.");
        }
        var table = new ulong[entries];
        _table.CopyTo(table, 0);
        for (var block = 0; block < blocks; block++)
        {
            var content = new byte[_header.ClusterSize];
            var used = Math.Min(blocks + clusters - ((long)block << _blockBits), 1L << _blockBits);
            for (var i = 0; i < used; i++)
            {
                SetCount(content, i, 1);
            }
            var offset = (first + block) << _header.ClusterBits;
            _store.Write(offset, content);
            _cache.Drop(offset, content.Length);
            table[_table.Length + block] = (ulong)offset;
        }
        var tableOffset = (first + blocks) << _header.ClusterBits;
        var bytes = new ulong[entries];
        BinaryPrimitives.ReverseEndianness(table, bytes);
        _store.Write(tableOffset, MemoryMarshal.AsBytes(bytes.AsSpan()));
        _store.Flush();
        Span<byte> field = stackalloc byte[12];
        BinaryPrimitives.WriteUInt64BigEndian(field, (ulong)tableOffset);
        BinaryPrimitives.WriteUInt32BigEndian(field[8..], (uint)clusters);
        _store.Write(Qcow2Header.RefcountTableOffset, field);
        _store.Flush();

        var oldFirst = _header.RefcountTableTableOffset >> _header.ClusterBits;
        var oldCount = _header.RefcountTableClusters;
        for (var i = 0; i < oldCount; i++)
        {
            _metadata.Remove((uint)(oldFirst + i));
        }
        for (var i = 0; i < blocks + clusters; i++)
        {
            _metadata.Add((uint)(first + i));
        }
        _table = table;
        _unpublished.Clear();
        _header.RefcountTableTableOffset = tableOffset;
        _header.RefcountTableClusters = clusters;
        _freshFrom = Math.Max(_freshFrom, first + blocks + clusters);
        for (var i = 0; i < oldCount; i++)
        {
            FreeLater(oldFirst + i, punch: false);
        }
    }
}
