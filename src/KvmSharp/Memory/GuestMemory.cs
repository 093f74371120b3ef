using System.Runtime.CompilerServices;
using System.Runtime.InteropServices;
using KvmSharp.Interop;

namespace KvmSharp;

/// <summary>
/// The guest-physical memory of a machine: slots of RAM and ROM, and checked access to them. The host never gets a bare
/// writable view, because writes must reach the dirty log and drop decoded code. All members are callable from any thread;
/// an access while the guest runs sees memory as another processor would.
/// </summary>
public sealed unsafe class GuestMemory
{
    /// <summary>The size of a page in bytes.</summary>
    public const int PageSize = 4096;

    /// <summary>One more than the highest guest-physical address that a slot may hold.</summary>
    public const ulong MaxSize = 1UL << 46;

    private const int SpaceShift = 16; // the address space in a slot id of the core

    private readonly VmHandle _vm;
    private readonly uint _space;
    private readonly Lock _lock = new();
    private MemorySlot[] _slots = []; // sorted by address; replaced as a whole, never changed

    internal GuestMemory(VmHandle vm, uint space = 0)
    {
        _vm = vm;
        _space = space;
    }

    /// <summary>The slots by ascending address.</summary>
    public IReadOnlyList<MemorySlot> Slots => Volatile.Read(ref _slots);

    /// <summary>Maps new RAM.</summary>
    /// <param name="address">The first address, a multiple of 4096.</param>
    /// <param name="size">The size in bytes, a positive multiple of 4096.</param>
    /// <param name="flags">How the slot behaves.</param>
    /// <exception cref="KvmSharpException">The range is invalid or overlaps a slot, or the host has no memory left.</exception>
    public MemorySlot AddRam(GuestAddress address, ulong size, MemorySlotFlags flags = MemorySlotFlags.None)
    {
        using var ram = new GuestRam(size);
        return Map(ram, 0, address, size, flags);
    }

    /// <summary>Maps new read-only memory with the given content.</summary>
    /// <param name="address">The first address, a multiple of 4096.</param>
    /// <param name="content">The content; the slot is as long, rounded up to a whole page.</param>
    /// <exception cref="KvmSharpException">The range is invalid or overlaps a slot, or the host has no memory left.</exception>
    public MemorySlot AddRom(GuestAddress address, ReadOnlySpan<byte> content)
    {
        var size = ((ulong)content.Length + PageSize - 1) & ~(ulong)(PageSize - 1);
        using var ram = new GuestRam(size);
        ram.Write(0, content);
        return Map(ram, 0, address, size, MemorySlotFlags.ReadOnly);
    }

    /// <summary>Maps a part of existing memory; the same memory may be mapped several times.</summary>
    /// <param name="ram">The memory; the slot keeps it alive.</param>
    /// <param name="ramOffset">The start of the part in bytes, a multiple of 4096.</param>
    /// <param name="address">The first guest-physical address, a multiple of 4096.</param>
    /// <param name="size">The size in bytes, a positive multiple of 4096.</param>
    /// <param name="flags">How the slot behaves.</param>
    /// <exception cref="KvmSharpException">The range is invalid or overlaps a slot.</exception>
    public MemorySlot Map(GuestRam ram, ulong ramOffset, GuestAddress address, ulong size, MemorySlotFlags flags = MemorySlotFlags.None) =>
        Map(ram, ramOffset, address, size, flags, false);

    /// <summary>Maps memory of a device, which the guest places and which the device saves; null when the range is taken or out of reach.</summary>
    internal MemorySlot? TryMapOfDevice(GuestRam ram, ulong ramOffset, GuestAddress address, ulong size, MemorySlotFlags flags = MemorySlotFlags.None)
    {
        lock (_lock)
        {
            var reachable = address.Value < MaxSize && size <= MaxSize - address.Value;
            return reachable && !Array.Exists(_slots, s => s.Address.Value < address.Value + size && address.Value < s.Address.Value + s.Size)
                ? Map(ram, ramOffset, address, size, flags, true)
                : null;
        }
    }

    private MemorySlot Map(GuestRam ram, ulong ramOffset, GuestAddress address, ulong size, MemorySlotFlags flags, bool ofDevice)
    {
        ArgumentNullException.ThrowIfNull(ram);
        if (size == 0 || (size | address.Value | ramOffset) % PageSize != 0)
        {
            throw new KvmSharpException(KvmSharpErrorCode.InvalidArgument, $"The slot {address} + 0x{size:x} does not consist of whole pages.");
        }
        if (ramOffset > ram.Size || size > ram.Size - ramOffset || address.Value >= MaxSize || size > MaxSize - address.Value)
        {
            throw new KvmSharpException(KvmSharpErrorCode.InvalidArgument, $"The slot {address} + 0x{size:x} is out of range.");
        }
        if ((flags & ~(MemorySlotFlags.LogDirtyPages | MemorySlotFlags.ReadOnly)) != 0)
        {
            throw new KvmSharpException(KvmSharpErrorCode.InvalidArgument, $"The slot flags {flags} do not exist.");
        }
        lock (_lock)
        {
            if (Array.Exists(_slots, s => s.Address.Value < address.Value + size && address.Value < s.Address.Value + s.Size))
            {
                throw new KvmSharpException(KvmSharpErrorCode.Overlap, $"The slot {address} + 0x{size:x} overlaps another one.");
            }
            var slot = new MemorySlot(FreeId(), address, size, ram, ramOffset, flags, ofDevice);
            ram.MarkMapped();
            var result = SetSlot(slot, size);
            if (result < 0)
            {
                slot.Ram.Dispose();
                throw NativeResult.ToException(result, $"map guest memory at {address}");
            }
            MemorySlot[] next = [.. _slots, slot];
            Array.Sort(next, (a, b) => a.Address.CompareTo(b.Address));
            Volatile.Write(ref _slots, next);
            return slot;
        }
    }

    /// <summary>Removes a slot. Returns when no vCPU can reach the memory through it any more.</summary>
    /// <param name="slot">A slot of this memory.</param>
    /// <exception cref="KvmSharpException">The slot is not there (any more).</exception>
    public void Remove(MemorySlot slot)
    {
        ArgumentNullException.ThrowIfNull(slot);
        lock (_lock)
        {
            if (!_slots.Contains(slot))
            {
                throw new KvmSharpException(KvmSharpErrorCode.NotFound, $"The slot at {slot.Address} is not mapped.");
            }
            SetSlot(slot, 0).ThrowIfFailed($"unmap guest memory at {slot.Address}");
            Volatile.Write(ref _slots, [.. _slots.Where(s => s != slot)]);
            slot.Ram.Dispose();
        }
    }

    /// <summary>Reads guest memory. The range may span adjacent slots.</summary>
    /// <param name="address">The first address.</param>
    /// <param name="data">Where the bytes go.</param>
    /// <exception cref="GuestMemoryException">Memory does not back the whole range.</exception>
    public void Read(GuestAddress address, Span<byte> data)
    {
        fixed (byte* p = data)
        {
            var result = NativeMethods.SpaceRead(_vm, _space, address.Value, p, (ulong)data.Length);
            ThrowIfFailed(result, address, (ulong)data.Length, "read");
        }
    }

    /// <summary>Writes guest memory, keeping dirty log and decoded code right. The range may span adjacent slots.</summary>
    /// <param name="address">The first address.</param>
    /// <param name="data">The bytes.</param>
    /// <exception cref="GuestMemoryException">Memory does not back the whole range, or it is read-only; nothing is written then.</exception>
    public void Write(GuestAddress address, ReadOnlySpan<byte> data)
    {
        fixed (byte* p = data)
        {
            var result = NativeMethods.SpaceWrite(_vm, _space, address.Value, p, (ulong)data.Length);
            ThrowIfFailed(result, address, (ulong)data.Length, "write");
        }
    }

    /// <summary>Reads guest memory if memory backs the whole range.</summary>
    /// <param name="address">The first address.</param>
    /// <param name="data">Where the bytes go.</param>
    /// <returns>Whether memory backs the range; otherwise nothing is read.</returns>
    public bool TryRead(GuestAddress address, Span<byte> data)
    {
        fixed (byte* p = data)
        {
            return NativeMethods.SpaceRead(_vm, _space, address.Value, p, (ulong)data.Length) >= 0;
        }
    }

    /// <summary>Writes guest memory if writable memory backs the whole range.</summary>
    /// <param name="address">The first address.</param>
    /// <param name="data">The bytes.</param>
    /// <returns>Whether writable memory backs the range; otherwise nothing is written.</returns>
    public bool TryWrite(GuestAddress address, ReadOnlySpan<byte> data)
    {
        fixed (byte* p = data)
        {
            return NativeMethods.SpaceWrite(_vm, _space, address.Value, p, (ulong)data.Length) >= 0;
        }
    }

    /// <summary>Reads a value in the guest's (little-endian) byte order.</summary>
    /// <typeparam name="T">An integer or a structure of such without references.</typeparam>
    /// <param name="address">The address; it need not be aligned.</param>
    /// <exception cref="GuestMemoryException">Memory does not back the whole range.</exception>
    public T Read<T>(GuestAddress address)
        where T : unmanaged
    {
        Unsafe.SkipInit(out T value);
        Read(address, MemoryMarshal.AsBytes(new Span<T>(ref value)));
        return value;
    }

    /// <summary>Writes a value in the guest's (little-endian) byte order.</summary>
    /// <typeparam name="T">An integer or a structure of such without references.</typeparam>
    /// <param name="address">The address; it need not be aligned.</param>
    /// <param name="value">The value.</param>
    /// <exception cref="GuestMemoryException">Memory does not back the whole range, or it is read-only; nothing is written then.</exception>
    public void Write<T>(GuestAddress address, T value)
        where T : unmanaged
    {
        Write(address, MemoryMarshal.AsBytes(new ReadOnlySpan<T>(in value)));
    }

    /// <summary>Fills guest memory with one byte.</summary>
    /// <param name="address">The first address.</param>
    /// <param name="length">The length in bytes.</param>
    /// <param name="value">The byte.</param>
    /// <exception cref="GuestMemoryException">Memory does not back the whole range, or it is read-only; nothing is written then.</exception>
    public void Fill(GuestAddress address, ulong length, byte value)
    {
        if (!IsBacked(address, length))
        {
            throw Fault(KvmSharpErrorCode.BadAddress, address, length, "write");
        }
        if (Array.Exists(Volatile.Read(ref _slots), s => (s.Flags & MemorySlotFlags.ReadOnly) != 0
            && s.Address.Value < address.Value + length && address.Value < s.Address.Value + s.Size))
        {
            throw Fault(KvmSharpErrorCode.ReadOnly, address, length, "write");
        }
        Span<byte> chunk = stackalloc byte[PageSize];
        chunk.Fill(value);
        for (ulong done = 0; done < length;)
        {
            var piece = (int)Math.Min(PageSize, length - done);
            Write(address + done, chunk[..piece]);
            done += (ulong)piece;
        }
    }

    /// <summary>Opens a range for writing in place, without a copy; the end of the scope makes the writes known.</summary>
    /// <param name="address">The first address.</param>
    /// <param name="length">The length in bytes; the range must lie within one slot.</param>
    /// <example><code>using (var scope = memory.BeginWrite(address, 512)) { stream.ReadExactly(scope.Data); }</code></example>
    /// <exception cref="GuestMemoryException">One writable slot does not back the whole range.</exception>
    public GuestMemoryWriteScope BeginWrite(GuestAddress address, int length)
    {
        ArgumentOutOfRangeException.ThrowIfNegative(length);
        var slot = FindSlot(address, (ulong)length) ?? throw Fault(KvmSharpErrorCode.BadAddress, address, (ulong)length, "write");
        if ((slot.Flags & MemorySlotFlags.ReadOnly) != 0)
        {
            throw Fault(KvmSharpErrorCode.ReadOnly, address, (ulong)length, "write");
        }
        return new GuestMemoryWriteScope(_vm, _space, slot, address, length);
    }

    /// <summary>As <see cref="BeginWrite"/>; a range that one writable slot does not back gives an empty scope.</summary>
    internal GuestMemoryWriteScope TryBeginWrite(GuestAddress address, int length, out bool found)
    {
        var slot = FindSlot(address, (ulong)length);
        found = slot is not null && (slot.Flags & MemorySlotFlags.ReadOnly) == 0;
        return found ? new GuestMemoryWriteScope(_vm, _space, slot!, address, length) : default;
    }

    /// <summary>
    /// Gives pages back to the host; they read as zero afterwards and cost memory again when they are touched. What is not
    /// writable memory of this process's own is left alone.
    /// </summary>
    /// <param name="address">The first address, a multiple of 4096.</param>
    /// <param name="length">The length in bytes, a multiple of 4096.</param>
    internal void Release(GuestAddress address, ulong length)
    {
        foreach (var slot in Volatile.Read(ref _slots))
        {
            var start = Math.Max(slot.Address.Value, address.Value);
            var end = Math.Min(slot.Address.Value + slot.Size, unchecked(address.Value + length));
            if (start >= end || (slot.Flags & MemorySlotFlags.ReadOnly) != 0)
            {
                continue;
            }
            using var held = slot.Hold();
            MemoryMethods.Release(slot.HostAddress + (start - slot.Address.Value), end - start);
            _ = NativeMethods.SpaceWritten(_vm, _space, start, end - start);
        }
    }

    /// <summary>Makes known what a device has written into memory of its own that is mapped there.</summary>
    internal void MarkWritten(GuestAddress address, ulong length) => _ = NativeMethods.SpaceWritten(_vm, _space, address.Value, length);

    /// <summary>Whether memory backs every byte of a range. The range may span adjacent slots.</summary>
    /// <param name="address">The first address.</param>
    /// <param name="length">The length in bytes.</param>
    public bool IsBacked(GuestAddress address, ulong length)
    {
        if (length > ulong.MaxValue - address.Value)
        {
            return false;
        }
        var next = address.Value;
        var end = address.Value + length;
        foreach (var slot in Volatile.Read(ref _slots))
        {
            if (next >= end)
            {
                break;
            }
            if (slot.Address.Value > next)
            {
                return false;
            }
            next = Math.Max(next, slot.Address.Value + slot.Size);
        }
        return next >= end;
    }

    /// <summary>Takes the record of written pages and starts a new one.</summary>
    /// <param name="slot">A slot with <see cref="MemorySlotFlags.LogDirtyPages"/>.</param>
    /// <returns>One bit for each page, lowest address in bit 0 of element 0; set if the page was written since the last call.</returns>
    /// <exception cref="KvmSharpException">The slot does not log.</exception>
    public ulong[] TakeDirtyLog(MemorySlot slot)
    {
        ArgumentNullException.ThrowIfNull(slot);
        var bitmap = new ulong[(slot.Size / PageSize + 63) / 64];
        fixed (ulong* p = bitmap)
        {
            NativeMethods.GetDirtyLog(_vm, slot.Id | _space << SpaceShift, p, (ulong)bitmap.Length).ThrowIfFailed("read the dirty log");
        }
        return bitmap;
    }

    private MemorySlot? FindSlot(GuestAddress address, ulong length) =>
        Array.Find(Volatile.Read(ref _slots), s => s.Holds(address.Value, length));

    private uint FreeId()
    {
        uint id = 0;
        while (Array.Exists(_slots, s => s.Id == id))
        {
            id++;
        }
        return id;
    }

    // A size of 0 deletes the slot.
    private int SetSlot(MemorySlot slot, ulong size)
    {
        var region = new KvsUserspaceMemoryRegion
        {
            Slot = slot.Id | _space << SpaceShift,
            Flags = (uint)slot.Flags,
            GuestPhysAddr = slot.Address.Value,
            MemorySize = size,
        };
        return NativeMethods.MemslotSet(_vm, &region, slot.Ram, slot.RamOffset);
    }

    // Slots stay readable as a list; their memory goes when the core lets go of it too.
    internal void ReleaseSlots()
    {
        lock (_lock)
        {
            foreach (var slot in _slots)
            {
                slot.Ram.Dispose();
            }
        }
    }

    private static void ThrowIfFailed(int result, GuestAddress address, ulong length, string verb)
    {
        if (result < 0)
        {
            var code = -result == (int)KvmSharpErrorCode.ReadOnly ? KvmSharpErrorCode.ReadOnly : KvmSharpErrorCode.BadAddress;
            throw Fault(code, address, length, verb);
        }
    }

    private static GuestMemoryException Fault(KvmSharpErrorCode code, GuestAddress address, ulong length, string verb) =>
        new(code, address, length, code == KvmSharpErrorCode.ReadOnly
            ? $"Cannot {verb} {length} bytes at guest address {address}: the memory is read-only."
            : $"Cannot {verb} {length} bytes at guest address {address}: no memory backs them.");
}
