namespace KvmSharp;

/// <summary>Guest memory as sections of a saved state: pieces of 16 MiB, of which only pages that are not all zero are kept.</summary>
internal static class MemoryImage
{
    internal const string Prefix = "memory/";
    internal const string SystemManagementPrefix = "smm-memory/";
    internal const string LayoutName = "memory-layout";

    private const ulong PieceSize = 16 << 20;
    private const int PageSize = GuestMemory.PageSize;
    private const int PagesPerPiece = (int)(PieceSize / PageSize);
    private const int BitmapSize = PagesPerPiece / 8;

    /// <summary>Address, size and kind of every slot: what a machine must have for the state to fit.</summary>
    internal static byte[] DescribeLayout(VirtualMachine machine)
    {
        var writer = new StateWriter();
        foreach (var (_, slot, prefix) in Slots(machine))
        {
            writer.WriteBoolean(prefix == Prefix);
            writer.WriteUInt64(slot.Address.Value);
            writer.WriteUInt64(slot.Size);
            writer.WriteBoolean(IsRom(slot));
        }
        return writer.ToArray();
    }

    /// <summary>Hands out every piece of RAM that is not all zero. ROM is part of a machine's making, not of its state.</summary>
    internal static unsafe void Save(VirtualMachine machine, Action<string, ReadOnlyMemory<byte>> add)
    {
        var buffer = new byte[BitmapSize + (int)PieceSize];
        foreach (var (_, slot, prefix) in Slots(machine).Where(s => !IsRom(s.Slot)))
        {
            using var held = slot.Hold();
            for (ulong start = 0; start < slot.Size; start += PieceSize)
            {
                var pages = (int)(Math.Min(PieceSize, slot.Size - start) / PageSize);
                var length = BitmapSize;
                buffer.AsSpan(0, BitmapSize).Clear();
                for (var i = 0; i < pages; i++)
                {
                    var page = new ReadOnlySpan<byte>(slot.HostAddress + start + (ulong)i * PageSize, PageSize);
                    if (page.ContainsAnyExcept((byte)0))
                    {
                        buffer[i / 8] |= (byte)(1 << (i % 8));
                        page.CopyTo(buffer.AsSpan(length));
                        length += PageSize;
                    }
                }
                if (length != BitmapSize)
                {
                    add($"{prefix}{slot.Address.Value + start:x}", buffer.AsMemory(0, length));
                }
            }
        }
    }

    /// <summary>Checks all pieces before anything is changed.</summary>
    internal static void Check(MachineState state)
    {
        foreach (var section in state.Sections.Where(s => IsPiece(s.Name)))
        {
            var data = section.Data.Span;
            var pages = 0;
            for (var i = 0; i < Math.Min(BitmapSize, data.Length); i++)
            {
                pages += byte.PopCount(data[i]);
            }
            if (data.Length != BitmapSize + pages * PageSize)
            {
                throw new MachineStateException("The saved state is damaged: a piece of memory has a wrong length.");
            }
        }
    }

    /// <summary>Makes memory what it was; pages that are right already are not touched.</summary>
    /// <param name="machine">The machine.</param>
    /// <param name="state">The state.</param>
    /// <param name="again">Whether it was loaded before, so that only kept pages need a look.</param>
    internal static unsafe void Load(VirtualMachine machine, MachineState state, bool again = false)
    {
        var zero = new byte[PageSize];
        var emptyBitmap = new byte[BitmapSize];
        var pieces = state.Sections.Where(s => IsPiece(s.Name)).ToDictionary(s => s.Name, s => s.Data);
        foreach (var (memory, slot, prefix) in Slots(machine).Where(s => !IsRom(s.Slot)))
        {
            using var held = slot.Hold();
            for (ulong start = 0; start < slot.Size; start += PieceSize)
            {
                var address = slot.Address + start;
                if (again && !pieces.ContainsKey($"{prefix}{address.Value:x}"))
                {
                    continue;
                }
                var data = pieces.TryGetValue($"{prefix}{address.Value:x}", out var found) ? found.Span : emptyBitmap;
                var pages = (int)(Math.Min(PieceSize, slot.Size - start) / PageSize);
                var next = BitmapSize;
                for (var i = 0; i < pages; i++)
                {
                    var wanted = (ReadOnlySpan<byte>)zero;
                    if ((data[i / 8] & (1 << (i % 8))) != 0)
                    {
                        wanted = data.Slice(next, PageSize);
                        next += PageSize;
                    }
                    else if (again)
                    {
                        continue;
                    }
                    var current = new ReadOnlySpan<byte>(slot.HostAddress + start + (ulong)i * PageSize, PageSize);
                    if (!current.SequenceEqual(wanted))
                    {
                        memory.Write(address + (ulong)i * PageSize, wanted);
                    }
                }
            }
        }
    }

    private static bool IsPiece(string name) =>
        name.StartsWith(Prefix, StringComparison.Ordinal) || name.StartsWith(SystemManagementPrefix, StringComparison.Ordinal);

    // Those of system management mode first: they stay, while a slot of the other address space may be a window on them that
    // is open at times.
    private static List<(GuestMemory Memory, MemorySlot Slot, string Prefix)> Slots(VirtualMachine machine)
    {
        List<(GuestMemory, MemorySlot, string)> slots = [];
        var hidden = machine.SystemManagementMemory?.Slots.Where(s => !s.OfDevice).ToList() ?? [];
        slots.AddRange(hidden.Select(s => (machine.SystemManagementMemory!, s, SystemManagementPrefix)));
        slots.AddRange(machine.Memory.Slots.Where(s => !s.OfDevice && !hidden.Any(h => Contains(h, s))).Select(s => (machine.Memory, s, Prefix)));
        return slots;
    }

    private static unsafe bool Contains(MemorySlot outer, MemorySlot inner) =>
        inner.HostAddress >= outer.HostAddress && inner.HostAddress + inner.Size <= outer.HostAddress + outer.Size;

    private static bool IsRom(MemorySlot slot) => (slot.Flags & MemorySlotFlags.ReadOnly) != 0;
}
