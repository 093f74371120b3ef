namespace KvmSharp.Networking.Nat;

/// <summary>
/// Puts fragments of guests together. Specification: RFC 791, "Fragmentation and Reassembly"; RFC 8200, "Fragment Header";
/// RFC 5722: fragments that overlap take their packet along.
/// </summary>
internal sealed class FragmentTable
{
    private const int MaxPackets = 32;
    private const int MaxPieces = 64;
    private const int MaxBytes = 65535;
    public const long Lifetime = 30_000;

    private readonly Dictionary<Key, Entry> _entries = [];

    public int Count => _entries.Count;

    /// <summary>Takes a fragment.</summary>
    /// <param name="fragment">The fragment.</param>
    /// <param name="now">The time in milliseconds.</param>
    /// <returns>The whole payload, when this was the last one that was missing.</returns>
    public byte[]? Add(in IpPacket fragment, long now)
    {
        var end = fragment.FragmentOffset + fragment.Payload.Length;
        var key = new Key(fragment.Source, fragment.Destination, fragment.Protocol, fragment.FragmentId);
        if (end > MaxBytes || fragment.Payload.IsEmpty || (fragment.HasMoreFragments && fragment.Payload.Length % 8 != 0))
        {
            _entries.Remove(key);
            return null;
        }
        if (!_entries.TryGetValue(key, out var entry))
        {
            if (_entries.Count == MaxPackets)
            {
                _entries.Remove(_entries.MinBy(e => e.Value.Deadline).Key);
            }
            _entries[key] = entry = new Entry(now + Lifetime);
        }
        if (!entry.Add(fragment.FragmentOffset, fragment.Payload, fragment.HasMoreFragments))
        {
            _entries.Remove(key);
            return null;
        }
        if (entry.Complete() is { } whole)
        {
            _entries.Remove(key);
            return whole;
        }
        return null;
    }

    public long RunTimers(long now)
    {
        var next = long.MaxValue;
        foreach (var (key, entry) in _entries)
        {
            if (entry.Deadline <= now)
            {
                _entries.Remove(key);
            }
            else
            {
                next = Math.Min(next, entry.Deadline);
            }
        }
        return next;
    }

    public void Clear() => _entries.Clear();

    private readonly record struct Key(NetAddress Source, NetAddress Destination, byte Protocol, uint Id);

    private sealed class Entry(long deadline)
    {
        private readonly SortedList<int, byte[]> _pieces = [];
        private int _total = -1;
        private int _received;

        public long Deadline => deadline;

        public bool Add(int offset, ReadOnlySpan<byte> data, bool more)
        {
            var end = offset + data.Length;
            if (_pieces.TryGetValue(offset, out var same) && data.SequenceEqual(same))
            {
                return true; // RFC 8200: an exact duplicate does no harm
            }
            if (_pieces.Count == MaxPieces || (_total >= 0 && (end > _total || !more)) || _pieces.Any(p => p.Key < end && offset < p.Key + p.Value.Length))
            {
                return false;
            }
            if (!more)
            {
                _total = end;
            }
            _pieces[offset] = data.ToArray();
            _received += data.Length;
            return _total < 0 || _pieces.Keys[^1] + _pieces.Values[^1].Length <= _total;
        }

        public byte[]? Complete()
        {
            if (_total != _received)
            {
                return null;
            }
            var whole = new byte[_total];
            foreach (var (offset, piece) in _pieces)
            {
                piece.CopyTo(whole, offset);
            }
            return whole;
        }
    }
}
