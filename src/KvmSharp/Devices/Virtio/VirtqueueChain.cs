using System.Runtime.InteropServices;

namespace KvmSharp.Devices.Virtio;

/// <summary>
/// A chain of buffers that the driver made available: bytes for the device to read, then room for it to write. Addresses
/// were checked to be memory; offsets count through the buffers of one direction.
/// </summary>
internal sealed class VirtqueueChain
{
    private readonly List<Segment> _readable = [];
    private readonly List<Segment> _writable = [];
    private GuestMemory _memory = null!;

    public ushort Head { get; private set; }

    /// <summary>How many bytes there are to read.</summary>
    public uint ReadableLength { get; private set; }

    /// <summary>How many bytes there is room for.</summary>
    public uint WritableLength { get; private set; }

    public void Begin(GuestMemory memory, ushort head)
    {
        _memory = memory;
        Head = head;
        _readable.Clear();
        _writable.Clear();
        ReadableLength = WritableLength = 0;
    }

    public bool TryAppend(ulong address, uint length, bool writable)
    {
        // "Message Framing": all readable buffers come before all writable ones.
        if (length == 0 || (!writable && _writable.Count != 0) || !_memory.IsBacked(address, length))
        {
            return false;
        }
        var total = (ulong)length + (writable ? WritableLength : ReadableLength);
        if (total > uint.MaxValue)
        {
            return false;
        }
        var list = writable ? _writable : _readable;
        list.Add(new Segment(address, length, (uint)total - length));
        if (writable)
        {
            WritableLength = (uint)total;
        }
        else
        {
            ReadableLength = (uint)total;
        }
        return true;
    }

    /// <summary>Reads from the readable part.</summary>
    /// <param name="offset">Where to start.</param>
    /// <param name="data">Where the bytes go; the range must lie within the part.</param>
    public void Read(uint offset, Span<byte> data)
    {
        for (var index = Find(_readable, offset); !data.IsEmpty; index++)
        {
            var segment = _readable[index];
            var skip = offset - segment.Offset;
            var count = (int)Math.Min(segment.Length - skip, (uint)data.Length);
            _memory.Read(segment.Address + skip, data[..count]);
            offset += (uint)count;
            data = data[count..];
        }
    }

    /// <summary>Writes to the writable part.</summary>
    /// <param name="offset">Where to start.</param>
    /// <param name="data">The bytes; the range must lie within the part.</param>
    public void Write(uint offset, ReadOnlySpan<byte> data)
    {
        for (var index = Find(_writable, offset); !data.IsEmpty; index++)
        {
            var segment = _writable[index];
            var skip = offset - segment.Offset;
            var count = (int)Math.Min(segment.Length - skip, (uint)data.Length);
            _memory.Write(segment.Address + skip, data[..count]);
            offset += (uint)count;
            data = data[count..];
        }
    }

    /// <summary>Reads a structure from the readable part.</summary>
    public T Read<T>(uint offset)
        where T : unmanaged
    {
        T value = default;
        Read(offset, MemoryMarshal.AsBytes(new Span<T>(ref value)));
        return value;
    }

    /// <summary>
    /// How many bytes from an offset on lie in one piece, and where; for access without a copy.
    /// </summary>
    public uint WritablePiece(uint offset, out GuestAddress address) => Piece(_writable, offset, out address);

    /// <summary>As <see cref="WritablePiece"/>, of the readable part.</summary>
    public uint ReadablePiece(uint offset, out GuestAddress address) => Piece(_readable, offset, out address);

    private static uint Piece(List<Segment> segments, uint offset, out GuestAddress address)
    {
        var segment = segments[Find(segments, offset)];
        var skip = offset - segment.Offset;
        address = segment.Address + skip;
        return segment.Length - skip;
    }

    private static int Find(List<Segment> segments, uint offset)
    {
        int low = 0, high = segments.Count - 1;
        while (low < high)
        {
            var middle = (low + high + 1) >> 1;
            if (segments[middle].Offset <= offset)
            {
                low = middle;
            }
            else
            {
                high = middle - 1;
            }
        }
        return low;
    }

    private readonly record struct Segment(ulong Address, uint Length, uint Offset);
}
