using System.Buffers.Binary;

namespace KvmSharp.Storage;

/// <summary>
/// Pieces of an image's tables in memory, found by their offset in the file. Changed pieces stay until they are written;
/// of the others the least recently used make room. Not thread-safe.
/// </summary>
internal sealed class MetadataCache
{
    // A piece of a table, not a whole one: a random access to a large disk then costs one small read.
    internal const int MaxPageSize = 4096;

    private readonly IImageStore _store;
    private readonly Dictionary<long, Page> _pages = [];
    private readonly int _capacity;
    private readonly Page _ring = new(-1, []);
    private Page? _last;

    internal MetadataCache(IImageStore store, int clusterSize, long capacityBytes)
    {
        _store = store;
        PageSize = Math.Min(clusterSize, MaxPageSize);
        _capacity = (int)Math.Clamp(capacityBytes / PageSize, 16, 1 << 20);
        _ring.Next = _ring.Previous = _ring;
    }

    internal int PageSize { get; }

    internal int DirtyCount { get; private set; }

    /// <summary>Whether so much is dirty that it should be written before more changes.</summary>
    internal bool IsCrowded => DirtyCount > _capacity / 2;

    /// <summary>Returns the page that begins at an offset of the file.</summary>
    internal Page Get(long offset)
    {
        if (_last is { } last && last.Offset == offset)
        {
            return last;
        }
        if (_pages.TryGetValue(offset, out var page))
        {
            Unlink(page);
        }
        else
        {
            page = new Page(offset, TakeBuffer());
            _store.Read(offset, page.Data);
            _pages.Add(offset, page);
        }
        Link(page);
        _last = page;
        return page;
    }

    internal void MarkDirty(Page page)
    {
        if (!page.IsDirty)
        {
            page.IsDirty = true;
            DirtyCount++;
        }
    }

    /// <summary>Forgets what is known of a range whose content was written past the cache.</summary>
    internal void Drop(long offset, long length)
    {
        for (var position = offset; position < offset + length; position += PageSize)
        {
            if (_pages.Remove(position, out var page))
            {
                Unlink(page);
                DirtyCount -= page.IsDirty ? 1 : 0;
                _last = _last == page ? null : _last;
            }
        }
    }

    /// <summary>Writes every changed page. A failure leaves those that were not written changed.</summary>
    internal void WriteDirty()
    {
        if (DirtyCount == 0)
        {
            return;
        }
        foreach (var page in _pages.Values.Where(page => page.IsDirty).OrderBy(page => page.Offset).ToArray())
        {
            _store.Write(page.Offset, page.Data);
            page.IsDirty = false;
            DirtyCount--;
        }
    }

    private byte[] TakeBuffer()
    {
        if (_pages.Count >= _capacity)
        {
            // Dirty pages are at most half, give or take those of one request.
            for (var page = _ring.Previous!; page != _ring; page = page.Previous!)
            {
                if (!page.IsDirty)
                {
                    Unlink(page);
                    _pages.Remove(page.Offset);
                    _last = _last == page ? null : _last;
                    // Not reused: a caller may still hold it.
                    break;
                }
            }
        }
        return GC.AllocateUninitializedArray<byte>(PageSize);
    }

    private void Link(Page page)
    {
        page.Next = _ring.Next;
        page.Previous = _ring;
        _ring.Next!.Previous = page;
        _ring.Next = page;
    }

    private static void Unlink(Page page)
    {
        page.Previous!.Next = page.Next;
        page.Next!.Previous = page.Previous;
    }

    internal sealed class Page(long offset, byte[] data)
    {
        internal long Offset { get; } = offset;

        internal byte[] Data { get; } = data;

        internal bool IsDirty { get; set; }

        internal Page? Previous { get; set; }

        internal Page? Next { get; set; }

        internal ulong this[int index]
        {
            get => BinaryPrimitives.ReadUInt64BigEndian(Data.AsSpan(index * 8));
            set => BinaryPrimitives.WriteUInt64BigEndian(Data.AsSpan(index * 8), value);
        }
    }
}
