using System.Buffers;

namespace KvmSharp.Networking.Nat;

/// <summary>How much memory the buffers of all connections may take together. Used under the network's lock.</summary>
internal sealed class BufferBudget(long limit)
{
    public long Used { get; private set; }

    public bool TryTake(int count, bool always)
    {
        if (!always && Used + count > limit)
        {
            return false;
        }
        Used += count;
        return true;
    }

    public void Return(int count) => Used -= count;
}

/// <summary>
/// A queue of bytes that grows up to a maximum as far as the budget allows; the smallest size is always there, so that no
/// connection starves. Bytes may also be put behind the end, for what arrives out of order. An empty queue has no memory.
/// </summary>
internal sealed class ByteRing(BufferBudget budget, int maximum) : IDisposable
{
    public const int Minimum = 16 << 10;

    private byte[]? _data;
    private int _capacity;
    private int _lastCapacity = Minimum;
    private int _head;

    public int Length { get; private set; }

    public int Maximum => maximum;

    /// <summary>The first of the bytes that lie in one piece.</summary>
    public ReadOnlySpan<byte> First => _data.AsSpan(_head, Math.Min(Length, _capacity - _head));

    /// <summary>The first free bytes that lie in one piece, after making room if there can be any.</summary>
    public Span<byte> GetFree(int wanted)
    {
        TryReserve(Math.Min(wanted, maximum - Length));
        if (_capacity == Length)
        {
            return default;
        }
        var tail = (_head + Length) & (_capacity - 1);
        return _data.AsSpan(tail, Math.Min(_capacity - Length, _capacity - tail));
    }

    public void Commit(int count) => Length += count;

    /// <summary>Puts bytes at a distance behind the end without making them part of the queue.</summary>
    /// <returns>Whether there was room.</returns>
    public bool TryPlace(int distance, ReadOnlySpan<byte> bytes)
    {
        if (!TryReserve(distance + bytes.Length))
        {
            return false;
        }
        var at = (_head + Length + distance) & (_capacity - 1);
        var count = Math.Min(bytes.Length, _capacity - at);
        bytes[..count].CopyTo(_data.AsSpan(at));
        bytes[count..].CopyTo(_data);
        return true;
    }

    public void CopyTo(int offset, Span<byte> target)
    {
        var at = (_head + offset) & (_capacity - 1);
        var count = Math.Min(target.Length, _capacity - at);
        _data.AsSpan(at, count).CopyTo(target);
        _data.AsSpan(0, target.Length - count).CopyTo(target[count..]);
    }

    /// <param name="count">How many bytes go.</param>
    /// <param name="keepMemory">Whether bytes behind the end are still wanted.</param>
    public void Discard(int count, bool keepMemory = false)
    {
        Length -= count;
        _head = _capacity == 0 ? 0 : (_head + count) & (_capacity - 1);
        if (Length == 0 && !keepMemory)
        {
            Release();
        }
    }

    public void Dispose()
    {
        Length = 0;
        Release();
    }

    private bool TryReserve(int room)
    {
        var needed = Length + room;
        if (needed <= _capacity)
        {
            return true;
        }
        if (needed > maximum)
        {
            return false;
        }
        var capacity = Math.Max(_capacity, _lastCapacity);
        while (capacity < needed)
        {
            capacity *= 2;
        }
        while (!budget.TryTake(capacity - _capacity, capacity == Minimum))
        {
            capacity /= 2;
            if (capacity <= _capacity || capacity < Minimum)
            {
                return false;
            }
        }
        var data = ArrayPool<byte>.Shared.Rent(capacity);
        if (_data is not null)
        {
            // All of it: bytes behind the end keep their distance.
            _data.AsSpan(_head, _capacity - _head).CopyTo(data);
            _data.AsSpan(0, _head).CopyTo(data.AsSpan(_capacity - _head));
            ArrayPool<byte>.Shared.Return(_data);
        }
        (_data, _capacity, _lastCapacity, _head) = (data, capacity, capacity, 0);
        return needed <= capacity;
    }

    private void Release()
    {
        if (_data is not null)
        {
            ArrayPool<byte>.Shared.Return(_data);
            budget.Return(_capacity);
        }
        (_data, _capacity, _head) = (null, 0, 0);
    }
}
