using KvmSharp.Storage;

namespace KvmSharp.Tests.Storage;

/// <summary>
/// A store that knows what a crash can leave of it: what was durable at the last flush, and any of the changes since, in any
/// order, each in whole or only some of its sectors.
/// </summary>
internal sealed class RecordingStore(byte[] content) : IImageStore
{
    private const int SectorSize = 512;

    private readonly MemoryImageStore _live = new(content);
    private readonly List<Change> _pending = [];
    private byte[] _durable = content.ToArray();

    private enum ChangeKind
    {
        Write,
        Zero,
        Length,
    }

    /// <summary>Called before every change and flush, with the number of those before it.</summary>
    public Action<int>? BeforeOperation { get; set; }

    /// <summary>Says which flushes, by their number, do nothing: the mutation that the tests must notice.</summary>
    public Func<int, bool> IsFlushLost { get; set; } = static _ => false;

    public int Operations { get; private set; }

    public int Flushes { get; private set; }

    public int PendingChanges => _pending.Count;

    public long Length => _live.Length;

    public bool IsReadOnly => false;

    public bool CanReleaseSpace => true;

    public void Read(long offset, Span<byte> buffer) => _live.Read(offset, buffer);

    public void Write(long offset, ReadOnlySpan<byte> data)
    {
        Announce();
        _live.Write(offset, data);
        _pending.Add(new Change(ChangeKind.Write, offset, data.Length, data.ToArray()));
    }

    public void SetLength(long length)
    {
        Announce();
        _live.SetLength(length);
        _pending.Add(new Change(ChangeKind.Length, length, 0, []));
    }

    public bool TryZero(long offset, long length, bool releaseSpace)
    {
        Announce();
        _live.TryZero(offset, length, releaseSpace);
        _pending.Add(new Change(ChangeKind.Zero, offset, (int)length, []));
        return true;
    }

    public void Flush()
    {
        Announce();
        if (!IsFlushLost(Flushes++))
        {
            _pending.Clear();
            _durable = _live.ToArray();
        }
    }

    public void Dispose()
    {
    }

    /// <summary>One of the states that a crash now can leave.</summary>
    public byte[] Crash(Random random)
    {
        var survivors = _pending.ToArray();
        var keep = random.Next(5) switch
        {
            0 => 0.0,
            1 => 1.0,
            2 => 0.9,
            3 => 0.1,
            _ => 0.5,
        };
        survivors = [.. survivors.Where(_ => random.NextDouble() < keep)];
        if (random.Next(2) == 0)
        {
            random.Shuffle(survivors);
        }
        var image = new MemoryImageStore(_durable);
        foreach (var change in survivors)
        {
            Apply(image, change, random.Next(4) == 0 ? random : null);
        }
        return image.ToArray();
    }

    private void Announce()
    {
        BeforeOperation?.Invoke(Operations);
        Operations++;
    }

    private static void Apply(MemoryImageStore image, Change change, Random? tear)
    {
        switch (change.Kind)
        {
            case ChangeKind.Length:
                // Growing only; nothing here makes a file shorter.
                image.SetLength(Math.Max(image.Length, change.Offset));
                break;
            case ChangeKind.Zero:
                image.TryZero(change.Offset, change.Length, releaseSpace: true);
                break;
            default:
                for (var from = 0; from < change.Length;)
                {
                    var count = (int)Math.Min(change.Length - from, SectorSize - (change.Offset + from) % SectorSize);
                    if (tear is null || tear.Next(2) == 0)
                    {
                        image.Write(change.Offset + from, change.Data.AsSpan(from, count));
                    }
                    from += count;
                }
                break;
        }
    }

    private sealed record Change(ChangeKind Kind, long Offset, int Length, byte[] Data);
}
