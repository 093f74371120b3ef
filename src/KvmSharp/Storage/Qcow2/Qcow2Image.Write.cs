using System.Buffers;

namespace KvmSharp.Storage;

public sealed partial class Qcow2Image
{
    // How much is copied at once when clusters must be completed with old content.
    private const int MaxCopyBytes = 1 << 18;

    /// <inheritdoc/>
    public void Write(long offset, ReadOnlySpan<byte> data)
    {
        BlockRange.CheckWrite(this, offset, data.Length);
        try
        {
            while (data.Length > 0)
            {
                var count = WritePart(offset, data);
                offset += count;
                data = data[count..];
            }
        }
        catch (StorageException exception) when (exception.Problem == StorageProblem.Corrupt)
        {
            MarkCorrupt(exception);
            throw;
        }
    }

    /// <inheritdoc/>
    public void Discard(long offset, long length)
    {
        BlockRange.CheckWrite(this, offset, length);
        ZeroRange(offset, length, mayDiscard: true, isHint: true);
    }

    /// <inheritdoc/>
    public void WriteZeroes(long offset, long length, bool mayDiscard)
    {
        BlockRange.CheckWrite(this, offset, length);
        ZeroRange(offset, length, mayDiscard, isHint: false);
    }

    /// <summary>Writes as much as can go in one piece; returns how much that was.</summary>
    private int WritePart(long offset, ReadOnlySpan<byte> data)
    {
        long host;
        int count;
        lock (_lock)
        {
            ThrowIfFailed();
            CommitIfCrowded();
            EnsureL2Table(offset);
            var (page, slot) = L2Page(offset);
            if (!IsWritableInPlace(page[slot]))
            {
                return WriteNew(offset, data);
            }
            var within = (int)(offset & (_clusterSize - 1));
            host = UnprotectedOffset(page[slot]);
            count = _clusterSize - within;
            for (var next = host; count < data.Length && ++slot < _entriesPerPage && IsWritableInPlace(page[slot]); count += _clusterSize)
            {
                if (UnprotectedOffset(page[slot]) != (next += _clusterSize))
                {
                    break;
                }
            }
            count = Math.Min(count, data.Length);
            host += within;
            Interlocked.Increment(ref _inFlight);
        }
        try
        {
            _store.Write(host, data[..count]);
            return count;
        }
        finally
        {
            Interlocked.Decrement(ref _inFlight);
        }
    }

    /// <summary>Writes to clusters that are not allocated, or shared, or not stored as they are.</summary>
    private int WriteNew(long offset, ReadOnlySpan<byte> data)
    {
        var (page, slot) = L2Page(offset);
        if (Kind(page[slot]) == ClusterKind.Zero && (page[slot] & (EntryOffset | Copied)) > Copied)
        {
            return WriteReserved(offset, data, page[slot] & EntryOffset);
        }
        var within = (int)(offset & (_clusterSize - 1));
        var wanted = 1;
        while (slot + wanted < _entriesPerPage && ((long)wanted << _clusterBits) - within < data.Length && IsNew(page[slot + wanted]))
        {
            wanted++;
        }
        if (NeedsOldContent(offset, Math.Min(data.Length, ((long)wanted << _clusterBits) - within)))
        {
            wanted = Math.Min(wanted, Math.Max(1, MaxCopyBytes >> _clusterBits));
        }
        var run = _refcounts!.Allocate(wanted);
        var count = (int)Math.Min(data.Length, ((long)run.Count << _clusterBits) - within);
        try
        {
            WriteClusters(offset, data[..count], run.First << _clusterBits, run.Count, run.IsFresh);
        }
        catch
        {
            _refcounts.Release(run);
            throw;
        }
        for (var i = 0; i < run.Count; i++)
        {
            SetEntry(offset + ((long)i << _clusterBits), (ulong)((run.First + i) << _clusterBits) | Copied, punch: false);
        }
        return count;
    }

    /// <summary>Writes to a cluster that reads as zero and has its place in the file already.</summary>
    private int WriteReserved(long offset, ReadOnlySpan<byte> data, ulong host)
    {
        var count = Math.Min(data.Length, _clusterSize - (int)(offset & (_clusterSize - 1)));
        WriteClusters(offset, data[..count], UnprotectedOffset(host), 1, isFresh: false);
        var (page, slot) = L2Page(offset);
        page[slot] = host | Copied;
        _l2.MarkDirty(page);
        return count;
    }

    /// <summary>Fills clusters in the file with data, and with the present content around it.</summary>
    private void WriteClusters(long offset, ReadOnlySpan<byte> data, long host, int clusters, bool isFresh)
    {
        var total = clusters << _clusterBits;
        var before = (int)(offset & (_clusterSize - 1));
        var after = total - before - data.Length;
        if (before == 0 && after == 0)
        {
            _store.Write(host, data);
            return;
        }
        if (isFresh && !NeedsOldContent(offset, data.Length))
        {
            if (_store.Length < host + total)
            {
                _store.SetLength(host + total);
            }
            _store.Write(host + before, data);
            return;
        }
        var copy = ArrayPool<byte>.Shared.Rent(total);
        try
        {
            var content = copy.AsSpan(0, total);
            ReadPresent(offset - before, content[..before]);
            data.CopyTo(content[before..]);
            ReadPresent(offset + data.Length, content[(before + data.Length)..]);
            _store.Write(host, content);
        }
        finally
        {
            ArrayPool<byte>.Shared.Return(copy);
        }
    }

    private void ReadPresent(long offset, Span<byte> buffer)
    {
        // The last cluster can reach beyond the end of the disk.
        var present = (int)Math.Min(buffer.Length, Math.Max(0, Length - offset));
        Read(offset, buffer[..present]);
        buffer[present..].Clear();
    }

    /// <summary>Whether the parts of the first and last cluster that a request leaves alone hold anything but zeros.</summary>
    private bool NeedsOldContent(long offset, long length)
    {
        var end = offset + length;
        var clusterEnd = Math.Min((end + _clusterSize - 1) & -(long)_clusterSize, Length);
        return !IsZero(offset & -(long)_clusterSize, offset) || !IsZero(end, clusterEnd);

        bool IsZero(long from, long to)
        {
            if (from >= to)
            {
                return true;
            }
            var mapping = Map(from, to - from);
            return mapping.Kind == ClusterKind.Zero || (mapping.Kind == ClusterKind.Unallocated && (_backing is null || from >= _backing.Length));
        }
    }

    private void ZeroRange(long offset, long length, bool mayDiscard, bool isHint)
    {
        var end = offset + length;
        // The last cluster is whole if all of it that belongs to the disk is meant.
        var firstWhole = Math.Min(end, (offset + _clusterSize - 1) & -(long)_clusterSize);
        var wholeEnd = end == Length ? end : Math.Max(firstWhole, end & -(long)_clusterSize);
        try
        {
            if (!isHint)
            {
                ZeroPart(offset, firstWhole - offset);
            }
            while (firstWhole < wholeEnd)
            {
                firstWhole += ZeroClusters(firstWhole, wholeEnd - firstWhole, mayDiscard, isHint);
            }
            if (!isHint)
            {
                ZeroPart(wholeEnd, end - wholeEnd);
            }
        }
        catch (StorageException exception) when (exception.Problem == StorageProblem.Corrupt)
        {
            MarkCorrupt(exception);
            throw;
        }
    }

    private void ZeroPart(long offset, long length)
    {
        while (length > 0)
        {
            var extent = GetExtent(offset, length);
            if (!extent.IsZero)
            {
                BlockRange.FillWithZeroes(offset, extent.Length, Write);
            }
            offset += extent.Length;
            length -= extent.Length;
        }
    }

    /// <summary>Zeroes whole clusters that one page of a table maps; returns how many bytes that was.</summary>
    private long ZeroClusters(long offset, long length, bool mayDiscard, bool isHint)
    {
        lock (_lock)
        {
            ThrowIfFailed();
            CommitIfCrowded();
            var index = (int)(offset >> _coverageBits);
            var shows = _backing is not null && offset < _backing.Length;
            if (index >= _l1.Length)
            {
                return length;
            }
            if (_l1[index] == 0 && !shows)
            {
                return Math.Min(length, ((index + 1L) << _coverageBits) - offset);
            }
            if (shows && _header.Version < 3)
            {
                // Version 2 has no way to say that the backing disk does not show.
                var part = Math.Min(length, _clusterSize);
                if (!isHint)
                {
                    ZeroPart(offset, part);
                }
                return part;
            }
            EnsureL2Table(offset);
            var done = 0L;
            var (page, slot) = L2Page(offset);
            for (; done < length && slot < _entriesPerPage; slot++, done += _clusterSize)
            {
                page = ZeroCluster(offset + done, page, slot, mayDiscard);
            }
            return Math.Min(done, length);
        }
    }

    private MetadataCache.Page ZeroCluster(long offset, MetadataCache.Page page, int slot, bool mayDiscard)
    {
        var shows = _backing is not null && offset < _backing.Length;
        var entry = page[slot];
        switch (Kind(entry))
        {
            case ClusterKind.Unallocated when shows:
                page[slot] = ZeroFlag;
                _l2.MarkDirty(page);
                break;
            case ClusterKind.Zero when mayDiscard && (entry & EntryOffset) != 0:
            case ClusterKind.Data when mayDiscard || (entry & Copied) == 0 || _header.Version < 3:
            case ClusterKind.Compressed:
                SetEntry(offset, shows ? ZeroFlag : 0, punch: mayDiscard);
                break;
            case ClusterKind.Data:
                page[slot] = entry | ZeroFlag;
                _l2.MarkDirty(page);
                break;
        }
        return page;
    }

    /// <summary>Changes the entry of a cluster and notes that what it referred to has one reference less.</summary>
    private void SetEntry(long offset, ulong value, bool punch)
    {
        var (page, slot) = L2Page(offset);
        var old = page[slot];
        switch (Kind(old))
        {
            case ClusterKind.Compressed:
                var (start, length) = CompressedRange(old, _clusterBits);
                var end = Math.Min(start + length, Math.Max(_store.Length, start + 1));
                for (var cluster = start >> _clusterBits; cluster << _clusterBits < end; cluster++)
                {
                    _refcounts!.FreeLater(cluster, punch: false);
                }
                break;
            case ClusterKind.Data:
            case ClusterKind.Zero when (old & EntryOffset) != 0:
                _refcounts!.FreeLater(DataOffset(old) >> _clusterBits, punch);
                break;
        }
        page[slot] = value;
        _l2.MarkDirty(page);
    }

    private static bool IsInPlace(ulong entry) =>
        (entry & (CompressedFlag | ZeroFlag)) == 0 && (entry & (EntryOffset | Copied)) > Copied;

    private bool IsWritableInPlace(ulong entry) => IsInPlace(entry) && Kind(entry) == ClusterKind.Data;

    /// <summary>Whether a write to a cluster needs a new place in the file.</summary>
    private bool IsNew(ulong entry) => Kind(entry) switch
    {
        ClusterKind.Data => (entry & Copied) == 0,
        ClusterKind.Zero => (entry & (EntryOffset | Copied)) <= Copied,
        _ => true,
    };

    /// <summary>The place of data that may be overwritten: one that holds no table.</summary>
    private long UnprotectedOffset(ulong entry)
    {
        var offset = DataOffset(entry);
        return _metadata.Contains((uint)(offset >> _clusterBits))
            ? throw Qcow2Header.Corrupt($"cluster {offset >> _clusterBits} holds a table and is used for data, too")
            : offset;
    }

    private void CommitIfCrowded()
    {
        if (_l2.IsCrowded || _refcounts!.IsCrowded)
        {
            Commit();
        }
    }

    /// <summary>Makes sure that there is an L2 table for an offset, and that no snapshot shares it.</summary>
    private void EnsureL2Table(long offset)
    {
        var index = (int)(offset >> _coverageBits);
        var old = _l1[index];
        if ((old & Copied) != 0)
        {
            return;
        }
        var content = new byte[_clusterSize];
        if (old != 0)
        {
            _store.Read(L2Offset(index), content);
        }
        var run = _refcounts!.Allocate(1);
        var host = run.First << _clusterBits;
        try
        {
            _store.Write(host, content);
        }
        catch
        {
            _refcounts.Release(run);
            throw;
        }
        _l2.Drop(host, _clusterSize);
        _metadata.Add((uint)run.First);
        if (old != 0)
        {
            var oldCluster = L2Offset(index) >> _clusterBits;
            _metadata.Remove((uint)oldCluster);
            _refcounts.FreeLater(oldCluster, punch: false);
        }
        SetL1(index, (ulong)host | Copied);
    }
}
