using System.Buffers.Binary;
using static KvmSharp.Devices.Virtio.SplitRing;

namespace KvmSharp.Devices.Virtio;

/// <summary>A driver that broke a rule of virtio; the device asks it for a reset.</summary>
internal sealed class VirtioProtocolException(string message) : Exception(message);

/// <summary>
/// A split virtqueue, the device's side. Everything that the guest wrote is read once, checked, and only then used; a queue
/// that breaks the rules throws <see cref="VirtioProtocolException"/>. Its device calls under its lock. Specification:
/// VIRTIO 1.2, "Split Virtqueues".
/// </summary>
internal sealed class Virtqueue
{
    // "The Virtqueue Descriptor Table": an indirect table may be longer than the queue; drivers stay far below this.
    private const int MaxIndirectDescriptors = 1024;

    // Configuration and wiring
    private readonly byte[] _indirectTable = new byte[MaxIndirectDescriptors * DescriptorSize];
    private GuestMemory _memory = null!;

    // State, programmed by the driver
    private ulong _descriptors;
    private ulong _available;
    private ulong _used;

    // State, the device's
    private ushort _nextAvailable;
    private ushort _knownAvailable; // the driver's index when it was last read; not saved
    private ushort _nextUsed;
    private ushort _signalledUsed;

    public Virtqueue(int index, int maxSize)
    {
        Index = index;
        MaxSize = maxSize;
        Size = maxSize;
    }

    public int Index { get; }

    public int MaxSize { get; }

    public int Size { get; private set; }

    public bool IsReady { get; private set; }

    public ulong Descriptors => _descriptors;

    public ulong Available => _available;

    public ulong Used => _used;

    /// <summary>Negotiated: "Used Buffer Notification Suppression" by index.</summary>
    public bool UsesEventIndex { get; set; }

    /// <summary>Negotiated: "Indirect Descriptors".</summary>
    public bool AllowsIndirect { get; set; }

    public void Attach(GuestMemory memory) => _memory = memory;

    public void Reset()
    {
        Size = MaxSize;
        IsReady = false;
        _descriptors = _available = _used = 0;
        _nextAvailable = _knownAvailable = _nextUsed = _signalledUsed = 0;
    }

    // The driver sets these before it enables the queue; afterwards they are fixed.

    public void SetSize(int size)
    {
        if (!IsReady)
        {
            Size = size;
        }
    }

    public void SetDescriptors(ulong address) => _descriptors = IsReady ? _descriptors : address;

    public void SetAvailable(ulong address) => _available = IsReady ? _available : address;

    public void SetUsed(ulong address) => _used = IsReady ? _used : address;

    public void Enable()
    {
        if (!IsReady)
        {
            CheckLayout();
            IsReady = true;
        }
    }

    public void Disable() => IsReady = false;

    /// <summary>Whether the driver has made buffers available that are not taken yet.</summary>
    public bool HasAvailable()
    {
        if (!IsReady)
        {
            return false;
        }
        if (_knownAvailable == _nextAvailable)
        {
            _knownAvailable = _memory.Read<ushort>(_available + AvailableIndex);
            if ((ushort)(_knownAvailable - _nextAvailable) > Size)
            {
                throw new VirtioProtocolException($"Queue {Index}: the available index {_knownAvailable} is more than the queue's size ahead.");
            }
        }
        return _knownAvailable != _nextAvailable;
    }

    /// <summary>Takes the next chain of buffers.</summary>
    /// <param name="chain">What is filled with it.</param>
    /// <returns>False when there is none.</returns>
    public bool TryTake(VirtqueueChain chain)
    {
        if (!HasAvailable())
        {
            return false;
        }
        var head = _memory.Read<ushort>(_available + AvailableRing + 2UL * (uint)(_nextAvailable & (Size - 1)));
        if (head >= Size)
        {
            throw new VirtioProtocolException($"Queue {Index}: descriptor {head} does not exist.");
        }
        _nextAvailable++;
        chain.Begin(_memory, head);
        Collect(chain, head);
        return true;
    }

    /// <summary>Gives the chains taken last back to the ring, as if they had not been taken.</summary>
    public void Untake(int count = 1) => _nextAvailable -= (ushort)count;

    /// <summary>After loading a state: takes the chain again that the device was at.</summary>
    /// <exception cref="MachineStateException">It is not there.</exception>
    public void TakeAgain(VirtqueueChain chain)
    {
        Untake();
        try
        {
            if (!TryTake(chain))
            {
                throw new MachineStateException("The saved state is damaged: a request under way is not there.");
            }
        }
        catch (Exception e) when (e is VirtioProtocolException or GuestMemoryException)
        {
            throw new MachineStateException($"The saved state is damaged: {e.Message}", e);
        }
    }

    /// <summary>Hands a chain back to the driver.</summary>
    /// <param name="chain">The chain.</param>
    /// <param name="written">How many bytes of its writable part hold something new.</param>
    public void Return(VirtqueueChain chain, uint written)
    {
        Put(chain, written);
        Publish();
    }

    /// <summary>Hands a chain back, which the driver sees after <see cref="Publish"/>.</summary>
    public void Put(VirtqueueChain chain, uint written)
    {
        Span<byte> element = stackalloc byte[UsedElementSize];
        BinaryPrimitives.WriteUInt32LittleEndian(element, chain.Head);
        BinaryPrimitives.WriteUInt32LittleEndian(element[4..], written);
        _memory.Write(_used + UsedRing + UsedElementSize * (ulong)(uint)(_nextUsed & (Size - 1)), element);
        _nextUsed++;
    }

    public void Publish()
    {
        Thread.MemoryBarrier(); // the elements before the index
        _memory.Write(_used + UsedIndex, _nextUsed);
    }

    /// <summary>Whether the driver wants an interrupt for what has been handed back since it last got one.</summary>
    public bool TakeInterrupt()
    {
        if (!IsReady || _signalledUsed == _nextUsed)
        {
            return false;
        }
        Thread.MemoryBarrier(); // the used index before the driver's wish: the driver does the reverse
        var old = _signalledUsed;
        _signalledUsed = _nextUsed;
        if (!UsesEventIndex)
        {
            return (_memory.Read<ushort>(_available + AvailableFlags) & NoInterrupt) == 0;
        }
        var wanted = _memory.Read<ushort>(_available + AvailableRing + 2UL * (uint)Size);
        return (ushort)(_nextUsed - wanted - 1) < (ushort)(_nextUsed - old);
    }

    /// <summary>Tells the driver that notifications are not needed for the moment.</summary>
    public void SuppressNotifications()
    {
        if (IsReady && !UsesEventIndex) // by index the driver stays quiet until the index moves
        {
            _memory.Write(_used + UsedFlags, NoNotify);
        }
    }

    /// <summary>Asks the driver for a notification of the next buffer.</summary>
    /// <returns>Whether a buffer has come meanwhile; the driver may not have notified of it.</returns>
    public bool RequestNotifications()
    {
        if (!IsReady)
        {
            return false;
        }
        if (UsesEventIndex)
        {
            _memory.Write(_used + UsedRing + UsedElementSize * (ulong)(uint)Size, _nextAvailable);
        }
        else
        {
            _memory.Write(_used + UsedFlags, (ushort)0);
        }
        Thread.MemoryBarrier(); // the wish before the look
        return HasAvailable();
    }

    public void Save(StateWriter writer)
    {
        writer.WriteUInt16((ushort)Size);
        writer.WriteBoolean(IsReady);
        writer.WriteUInt64(_descriptors);
        writer.WriteUInt64(_available);
        writer.WriteUInt64(_used);
        writer.WriteUInt16(_nextAvailable);
        writer.WriteUInt16(_nextUsed);
        writer.WriteUInt16(_signalledUsed);
    }

    public void Load(StateReader reader)
    {
        Size = reader.ReadUInt16();
        IsReady = reader.ReadBoolean();
        _descriptors = reader.ReadUInt64();
        _available = reader.ReadUInt64();
        _used = reader.ReadUInt64();
        _nextAvailable = _knownAvailable = reader.ReadUInt16();
        _nextUsed = reader.ReadUInt16();
        _signalledUsed = reader.ReadUInt16();
        try
        {
            if (IsReady)
            {
                CheckLayout();
            }
        }
        catch (VirtioProtocolException e)
        {
            throw new MachineStateException($"The saved state is damaged: {e.Message}", e);
        }
    }

    private void CheckLayout()
    {
        if (Size == 0 || Size > MaxSize || !int.IsPow2(Size))
        {
            throw new VirtioProtocolException($"Queue {Index}: {Size} is not a size that it can have.");
        }
        (ulong Start, ulong Length)[] parts =
            [(_descriptors, (ulong)(DescriptorSize * Size)), (_available, AvailableSize(Size)), (_used, UsedSize(Size))];
        if (_descriptors % 16 != 0 || _available % 2 != 0 || _used % 4 != 0)
        {
            throw new VirtioProtocolException($"Queue {Index}: a part of the ring is not aligned.");
        }
        for (var i = 0; i < parts.Length; i++)
        {
            if (!_memory.IsBacked(parts[i].Start, parts[i].Length))
            {
                throw new VirtioProtocolException($"Queue {Index}: a part of the ring is not in memory.");
            }
            for (var j = 0; j < i; j++)
            {
                if (parts[i].Start < parts[j].Start + parts[j].Length && parts[j].Start < parts[i].Start + parts[i].Length)
                {
                    throw new VirtioProtocolException($"Queue {Index}: parts of the ring overlap.");
                }
            }
        }
    }

    private void Collect(VirtqueueChain chain, int index)
    {
        Span<byte> descriptor = stackalloc byte[DescriptorSize];
        for (var count = 1; ; count++)
        {
            if (index >= Size || count > Size)
            {
                throw new VirtioProtocolException($"Queue {Index}: a chain of descriptors leaves the table or runs in a circle.");
            }
            _memory.Read(_descriptors + (ulong)(DescriptorSize * index), descriptor);
            var flags = FlagsOf(descriptor);
            if ((flags & Flags.Indirect) != 0)
            {
                CollectIndirect(chain, descriptor, flags);
                return;
            }
            Append(chain, descriptor, flags);
            if ((flags & Flags.Next) == 0)
            {
                return;
            }
            index = BinaryPrimitives.ReadUInt16LittleEndian(descriptor[DescriptorNext..]);
        }
    }

    // "Indirect Descriptors": a table in guest memory in place of the rest of the chain; not nested, with no successor.
    private void CollectIndirect(VirtqueueChain chain, ReadOnlySpan<byte> descriptor, Flags flags)
    {
        var length = BinaryPrimitives.ReadUInt32LittleEndian(descriptor[DescriptorLength..]);
        if (!AllowsIndirect || (flags & Flags.Next) != 0 || length == 0 || length % DescriptorSize != 0 || length > _indirectTable.Length)
        {
            throw new VirtioProtocolException($"Queue {Index}: an indirect descriptor is invalid.");
        }
        var table = _indirectTable.AsSpan(0, (int)length);
        if (!_memory.TryRead(BinaryPrimitives.ReadUInt64LittleEndian(descriptor), table))
        {
            throw new VirtioProtocolException($"Queue {Index}: an indirect table is not in memory.");
        }
        var entries = (int)length / DescriptorSize;
        var index = 0;
        for (var count = 1; ; count++)
        {
            if (index >= entries || count > entries)
            {
                throw new VirtioProtocolException($"Queue {Index}: an indirect chain leaves its table or runs in a circle.");
            }
            var entry = table.Slice(index * DescriptorSize, DescriptorSize);
            var entryFlags = FlagsOf(entry);
            if ((entryFlags & Flags.Indirect) != 0)
            {
                throw new VirtioProtocolException($"Queue {Index}: an indirect table leads to another.");
            }
            Append(chain, entry, entryFlags);
            if ((entryFlags & Flags.Next) == 0)
            {
                return;
            }
            index = BinaryPrimitives.ReadUInt16LittleEndian(entry[DescriptorNext..]);
        }
    }

    private void Append(VirtqueueChain chain, ReadOnlySpan<byte> descriptor, Flags flags)
    {
        var address = BinaryPrimitives.ReadUInt64LittleEndian(descriptor);
        var length = BinaryPrimitives.ReadUInt32LittleEndian(descriptor[DescriptorLength..]);
        if (!chain.TryAppend(address, length, (flags & Flags.Write) != 0))
        {
            throw new VirtioProtocolException($"Queue {Index}: a buffer at 0x{address:x} of {length} bytes is empty, not in memory, or out of order.");
        }
    }

    private static Flags FlagsOf(ReadOnlySpan<byte> descriptor) =>
        (Flags)BinaryPrimitives.ReadUInt16LittleEndian(descriptor[DescriptorFlags..]);
}
