using System.Buffers.Binary;
using System.Runtime.InteropServices;

namespace KvmSharp.Storage;

/// <summary>
/// Counts the references to every cluster of a qcow2 image, compares them with the stored counts, and repairs those. The
/// clusters are counted in windows, so that the memory does not grow with the image; every table is read once per window.
/// </summary>
internal sealed class Qcow2Checker
{
    private const int WindowClusters = 4 << 20;
    private const int MaxWindows = 128;
    private const int MaxL2Tables = 1 << 19;
    private const int MaxL1Entries = 16 << 20;
    private const ulong Copied = 1UL << 63;
    private const ulong CompressedFlag = 1UL << 62;
    private const ulong ZeroFlag = 1;

    private readonly IImageStore _store;
    private readonly CancellationToken _cancellation;
    private readonly ImageCheckResult _result = new();
    private readonly Qcow2Header _header;
    private readonly int _clusterBits;
    private readonly int _clusterSize;
    private readonly long _fileClusters;

    // Ranges of tables in the file, with what they hold.
    private readonly List<(long Offset, long Length)> _tables = [];

    // How often each L2 table is referred to; negative for those that the disk itself uses.
    private readonly Dictionary<long, int> _l2Tables = [];
    private readonly List<(long Offset, int Entries)> _bitmapTables = [];
    private readonly ulong[] _l1;
    private readonly ulong[] _l2;
    private Qcow2Refcounts _refcounts;
    private uint[] _counts = [];
    private long _windowStart;

    // Whether tables could not be followed, so that what they use seems to be unused.
    private bool _incomplete;
    private bool _mismatch;
    private bool _firstPass = true;

    internal Qcow2Checker(IImageStore store, CancellationToken cancellation)
    {
        _store = store;
        _cancellation = cancellation;
        _header = Qcow2Header.Read(store);
        _clusterBits = _header.ClusterBits;
        _clusterSize = _header.ClusterSize;
        _fileClusters = (long)(((ulong)store.Length + (ulong)_clusterSize - 1) >> _clusterBits);
        if (_fileClusters > (long)WindowClusters * MaxWindows)
        {
            throw Qcow2Header.Unsupported($"a check of {_fileClusters} clusters");
        }
        _l2 = new ulong[_clusterSize / 8];
        _refcounts = LoadRefcounts(report: true);
        _l1 = Qcow2Refcounts.ReadTable(store, _header.L1TableOffset, _header.L1Entries, "L1 table");
        _result.TotalClusters = (long)(((ulong)_header.Size + (ulong)_clusterSize - 1) >> _clusterBits);
    }

    internal ImageCheckResult Run(ImageRepair repair)
    {
        CollectTables();
        foreach (var start in Windows())
        {
            Count(start);
            Compare(repair: false);
        }
        CheckBeyondEnd(repair: false);
        CheckFlags(repair: false);
        if (_header.Incompatible.HasFlag(Qcow2Incompatible.Dirty) || _header.Incompatible.HasFlag(Qcow2Incompatible.Corrupt))
        {
            _result.Error($"The image is marked as {_header.IncompatibleNames.ToLowerInvariant()}.");
        }
        if (repair != ImageRepair.None && !_result.IsClean)
        {
            Repair(repair);
        }
        return _result;
    }

    private IEnumerable<long> Windows()
    {
        for (var start = 0L; start < _fileClusters; start += WindowClusters)
        {
            yield return start;
        }
    }

    private Qcow2Refcounts LoadRefcounts(bool report) => new(_store, _header, [], 16 << 20, (index, entry) =>
    {
        if (report)
        {
            _mismatch = true;
            _result.Error($"Refcount table entry {index} is 0x{entry:x}.");
        }
    });

    // Finding the tables

    private void CollectTables()
    {
        _tables.Add((0, 1));
        AddL1(_header.L1TableOffset, _l1, isActive: true, "The L1 table");
        if (_header.SnapshotCount > 0)
        {
            CollectSnapshots();
        }
        if (_header.Bitmaps is { } bitmaps)
        {
            CollectBitmaps(bitmaps.Count, bitmaps.Offset, bitmaps.Size);
        }
    }

    private void CollectSnapshots()
    {
        var snapshots = Qcow2SnapshotTable.Read(_store, _header);
        _tables.Add((_header.SnapshotsOffset, snapshots.Length));
        if (snapshots.Entries.Sum(entry => (long)entry.L1Entries) > MaxL1Entries)
        {
            throw Qcow2Header.Unsupported($"a check of snapshots with more than {MaxL1Entries} L1 table entries");
        }
        for (var i = 0; i < snapshots.Entries.Count; i++)
        {
            var entry = snapshots.Entries[i];
            var l1 = Qcow2Refcounts.ReadTable(_store, entry.L1Offset, entry.L1Entries, $"L1 table of snapshot {i}");
            AddL1(entry.L1Offset, l1, isActive: false, $"The L1 table of snapshot {i}");
        }
    }

    private void AddL1(long offset, ulong[] l1, bool isActive, string what)
    {
        _cancellation.ThrowIfCancellationRequested();
        _tables.Add((offset, l1.Length * 8L));
        for (var i = 0; i < l1.Length; i++)
        {
            var entry = l1[i];
            if (entry == 0)
            {
                continue;
            }
            var table = (long)(entry & Qcow2Header.OffsetMask);
            if ((entry & ~(Qcow2Header.OffsetMask | Copied)) != 0 || !IsClusterInFile(table))
            {
                _incomplete = true;
                _result.Error($"{what} has the impossible entry 0x{entry:x} at {i}.");
                continue;
            }
            ref var uses = ref CollectionsMarshal.GetValueRefOrAddDefault(_l2Tables, table, out var known);
            uses = isActive ? uses - 1 : uses < 0 ? uses - 1 : uses + 1;
            if (!known && _l2Tables.Count > MaxL2Tables)
            {
                throw Qcow2Header.Unsupported($"a check of more than {MaxL2Tables} L2 tables");
            }
        }
    }

    // "Bitmaps extension": directory entries, each with a table of clusters.
    private void CollectBitmaps(int count, long offset, int size)
    {
        _tables.Add((offset, size));
        Span<byte> entry = stackalloc byte[24];
        var (position, total) = (offset, 0L);
        for (var i = 0; i < count; i++)
        {
            _store.Read(position, entry);
            var table = (long)(BinaryPrimitives.ReadUInt64BigEndian(entry) & Qcow2Header.OffsetMask);
            var entries = BinaryPrimitives.ReadUInt32BigEndian(entry[8..]);
            var length = 24L + BinaryPrimitives.ReadUInt16BigEndian(entry[18..]) + BinaryPrimitives.ReadUInt32BigEndian(entry[20..]);
            position += (length + 7) & ~7L;
            if (position > offset + size || entries > Qcow2Header.MaxL1Entries || table > _store.Length - entries * 8L)
            {
                _incomplete = true;
                _result.Error($"Bitmap {i} has an impossible directory entry.");
                return;
            }
            if ((total += entries) > MaxL1Entries)
            {
                throw Qcow2Header.Unsupported($"a check of bitmaps with more than {MaxL1Entries} table entries");
            }
            _tables.Add((table, entries * 8L));
            _bitmapTables.Add((table, (int)entries));
        }
    }

    // Counting

    private void Count(long start, bool withRefcounts = true)
    {
        _windowStart = start;
        var length = (int)Math.Min(WindowClusters, _fileClusters - start);
        _counts = _counts.Length == length ? _counts : new uint[length];
        Array.Clear(_counts);
        foreach (var (offset, bytes) in _tables)
        {
            AddRange(offset, bytes, 1, "a table");
        }
        if (withRefcounts)
        {
            AddRefcountStructures();
        }
        foreach (var (table, uses) in _l2Tables)
        {
            _cancellation.ThrowIfCancellationRequested();
            AddRange(table, _clusterSize, (uint)Math.Abs(uses), "an L2 table");
            CountL2(table, uses);
        }
        foreach (var (table, entries) in _bitmapTables)
        {
            foreach (var entry in Qcow2Refcounts.ReadTable(_store, table, entries, "bitmap table"))
            {
                if ((entry & Qcow2Header.OffsetMask) is var data and not 0)
                {
                    AddRange((long)data, _clusterSize, 1, "a bitmap");
                }
            }
        }
        _firstPass = false;
    }

    private void AddRefcountStructures()
    {
        AddRange(_header.RefcountTableTableOffset, (long)_header.RefcountTableClusters * _clusterSize, 1, "the refcount table");
        foreach (var block in _refcounts.Table)
        {
            if (block != 0)
            {
                AddRange((long)block, _clusterSize, 1, "a refcount block");
            }
        }
    }

    private void CountL2(long table, int uses)
    {
        var weight = (uint)Math.Abs(uses);
        foreach (var entry in ReadL2(table))
        {
            if (entry == 0)
            {
                continue;
            }
            var offset = (long)(entry & Qcow2Header.OffsetMask);
            if ((entry & CompressedFlag) != 0)
            {
                CountCompressed(entry, weight, isActive: uses < 0);
                continue;
            }
            const ulong Reserved = ~(Qcow2Header.OffsetMask | Copied | ZeroFlag);
            if ((entry & Reserved) != 0 || (entry & ZeroFlag) != 0 && _header.Version < 3 || offset != 0 && !IsClusterInFile(offset))
            {
                if (_firstPass)
                {
                    _incomplete = true;
                    _result.Error($"The L2 table at 0x{table:x} has the impossible entry 0x{entry:x}.");
                }
                continue;
            }
            if (offset != 0)
            {
                AddRange(offset, _clusterSize, weight, "data");
                _result.AllocatedClusters += _firstPass && uses < 0 ? 1 : 0;
            }
        }
    }

    private void CountCompressed(ulong entry, uint weight, bool isActive)
    {
        var (start, length) = Qcow2Image.CompressedRange(entry, _clusterBits);
        if (start >= _store.Length || start < _clusterSize)
        {
            if (_firstPass)
            {
                _incomplete = true;
                _result.Error($"A compressed cluster has the impossible entry 0x{entry:x}.");
            }
            return;
        }
        AddRange(start, Math.Min(length, _store.Length - start), weight, "compressed data");
        if (_firstPass && isActive)
        {
            _result.AllocatedClusters++;
            _result.CompressedClusters++;
        }
    }

    private void AddRange(long offset, long length, uint weight, string what)
    {
        var last = (offset + length - 1) >> _clusterBits;
        if (_firstPass && length > 0 && last >= _fileClusters)
        {
            _incomplete = true;
            _result.Error($"The image ends before {what} at 0x{offset:x}.");
        }
        for (var cluster = Math.Max(offset >> _clusterBits, _windowStart); cluster <= last && cluster < _windowStart + _counts.Length; cluster++)
        {
            ref var count = ref _counts[cluster - _windowStart];
            count = weight > uint.MaxValue - count ? uint.MaxValue : count + weight;
        }
    }

    // Comparing

    private void Compare(bool repair)
    {
        for (var i = 0; i < _counts.Length; i++)
        {
            var cluster = _windowStart + i;
            var (used, stored) = (_counts[i], _refcounts.Get(cluster));
            if (used == stored)
            {
                continue;
            }
            if (repair)
            {
                Lower(cluster, used);
            }
            else if (stored > used)
            {
                _result.Leaks++;
                _result.Say($"Cluster {cluster} has the reference count {stored} and is used {used} times (a leak).");
            }
            else
            {
                _mismatch = true;
                _result.Error($"Cluster {cluster} has the reference count {stored} and is used {used} times.");
            }
        }
    }

    private void Lower(long cluster, ulong count)
    {
        _refcounts.Set(cluster, count);
        _result.RepairedLeaks++;
        if (_refcounts.IsCrowded)
        {
            _refcounts.WriteDirty();
        }
    }

    /// <summary>Clusters beyond the end of the file cannot be used by anything.</summary>
    private void CheckBeyondEnd(bool repair)
    {
        for (var block = 0L; block < _refcounts.Table.Length; block++)
        {
            if (_refcounts.Table[(int)block] == 0)
            {
                continue;
            }
            _cancellation.ThrowIfCancellationRequested();
            var end = (block + 1) << _refcounts.ClustersPerBlockBits;
            for (var cluster = Math.Max(_fileClusters, block << _refcounts.ClustersPerBlockBits); cluster < end; cluster++)
            {
                if (_refcounts.Get(cluster) == 0)
                {
                    continue;
                }
                if (repair)
                {
                    Lower(cluster, 0);
                }
                else
                {
                    _result.Leaks++;
                    _result.Say($"Cluster {cluster} is beyond the end of the file and marked as used (a leak).");
                }
            }
        }
    }

    /// <summary>The flag in L1 and L2 entries of the disk that says that a cluster has exactly one reference.</summary>
    private void CheckFlags(bool repair)
    {
        for (var i = 0; i < _l1.Length; i++)
        {
            var table = (long)(_l1[i] & Qcow2Header.OffsetMask);
            if (_l1[i] == 0 || !IsClusterInFile(table))
            {
                continue;
            }
            _cancellation.ThrowIfCancellationRequested();
            CheckFlag(_header.L1TableOffset + i * 8L, _l1[i], "L1", repair);
            var entries = ReadL2(table);
            for (var j = 0; j < entries.Length; j++)
            {
                if ((entries[j] & CompressedFlag) != 0)
                {
                    if ((entries[j] & Copied) != 0)
                    {
                        FixFlag(table + j * 8L, entries[j], "L2", repair);
                    }
                }
                else if ((long)(entries[j] & Qcow2Header.OffsetMask) is var offset and not 0 && IsClusterInFile(offset))
                {
                    CheckFlag(table + j * 8L, entries[j], "L2", repair);
                }
            }
        }
    }

    private void CheckFlag(long position, ulong entry, string what, bool repair)
    {
        var single = _refcounts.Get((long)(entry & Qcow2Header.OffsetMask) >> _clusterBits) == 1;
        if (single != ((entry & Copied) != 0))
        {
            FixFlag(position, entry, what, repair);
        }
    }

    private void FixFlag(long position, ulong entry, string what, bool repair)
    {
        if (!repair)
        {
            _result.Error($"The flag for a single reference is wrong in the {what} table entry 0x{entry:x} at 0x{position:x}.");
            return;
        }
        Span<byte> bytes = stackalloc byte[8];
        BinaryPrimitives.WriteUInt64BigEndian(bytes, entry ^ Copied);
        _store.Write(position, bytes);
    }

    // Repairing

    private void Repair(ImageRepair repair)
    {
        if (_incomplete)
        {
            _result.Say("Nothing was repaired: parts of the tables cannot be followed, and what they use would be taken for unused.");
            return;
        }
        if (repair == ImageRepair.All && _mismatch)
        {
            RebuildRefcounts();
            _result.RepairedLeaks = _result.Leaks;
        }
        else if (_mismatch)
        {
            _result.Say("Nothing was repaired: the reference counts have errors beside leaks.");
            return;
        }
        else
        {
            foreach (var start in Windows())
            {
                Count(start);
                Compare(repair: true);
            }
            CheckBeyondEnd(repair: true);
            _refcounts.WriteDirty();
        }
        _store.Flush();
        if (repair == ImageRepair.All)
        {
            CheckFlags(repair: true);
            _store.Flush();
            ClearMarks();
            _result.RepairedErrors = _result.Errors;
        }
    }

    private void ClearMarks()
    {
        if (_header.Version < 3)
        {
            return;
        }
        _header.Incompatible &= ~(Qcow2Incompatible.Dirty | Qcow2Incompatible.Corrupt);
        Span<byte> bits = stackalloc byte[8];
        BinaryPrimitives.WriteUInt64BigEndian(bits, (ulong)_header.Incompatible);
        _store.Write(Qcow2Header.FeatureOffset, bits);
        _store.Flush();
    }

    /// <summary>
    /// Writes all reference counts anew behind the present end, and then lets the header refer to them: until that one write,
    /// the image is as it was. The space of the old ones is free afterwards.
    /// </summary>
    private void RebuildRefcounts()
    {
        var perBlock = 1L << _refcounts.ClustersPerBlockBits;
        var first = _fileClusters;
        long blocks = 1, tables = 1;
        while (first + blocks + tables > blocks * perBlock || blocks * 8 > tables * _clusterSize)
        {
            blocks = (first + blocks + tables + perBlock - 1) / perBlock;
            tables = (blocks * 8 + _clusterSize - 1) / _clusterSize;
        }
        if (tables * (_clusterSize / 8) > Qcow2Header.MaxRefcountTableEntries)
        {
            throw Qcow2Header.Unsupported($"reference counts for {first} clusters");
        }
        var block = new byte[_clusterSize];
        var countsOf = -1L;
        for (var i = 0L; i < blocks; i++)
        {
            _cancellation.ThrowIfCancellationRequested();
            Array.Clear(block);
            for (var j = 0; j < perBlock; j++)
            {
                var cluster = i * perBlock + j;
                ulong count = cluster >= first && cluster < first + blocks + tables ? 1u : 0;
                if (cluster < first)
                {
                    var window = cluster / WindowClusters * WindowClusters;
                    if (window != countsOf)
                    {
                        Count(countsOf = window, withRefcounts: false);
                    }
                    count = _counts[cluster - window];
                }
                Qcow2Refcounts.SetCount(block, j, count <= _refcounts.MaxCount ? count : throw Qcow2Header.Corrupt($"cluster {cluster} has {count} references"), _header.RefcountOrder);
            }
            _store.Write((first + i) << _clusterBits, block);
        }
        var table = new ulong[tables * (_clusterSize / 8)];
        for (var i = 0; i < blocks; i++)
        {
            table[i] = BinaryPrimitives.ReverseEndianness((ulong)((first + i) << _clusterBits));
        }
        _store.Write((first + blocks) << _clusterBits, MemoryMarshal.AsBytes(table.AsSpan()));
        _store.Flush();

        _header.RefcountTableTableOffset = (first + blocks) << _clusterBits;
        _header.RefcountTableClusters = (int)tables;
        Span<byte> field = stackalloc byte[12];
        BinaryPrimitives.WriteInt64BigEndian(field, _header.RefcountTableTableOffset);
        BinaryPrimitives.WriteInt32BigEndian(field[8..], _header.RefcountTableClusters);
        _store.Write(Qcow2Header.RefcountTableOffset, field);
        _store.Flush();
        _refcounts = LoadRefcounts(report: false);
    }

    private bool IsClusterInFile(long offset) => offset > 0 && (offset & (_clusterSize - 1)) == 0 && offset >> _clusterBits < _fileClusters;

    /// <summary>Reads an L2 table into the one buffer that there is.</summary>
    private ReadOnlySpan<ulong> ReadL2(long table)
    {
        _store.Read(table, MemoryMarshal.AsBytes(_l2.AsSpan()));
        BinaryPrimitives.ReverseEndianness(_l2, _l2);
        return _l2;
    }
}
