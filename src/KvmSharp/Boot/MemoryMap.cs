namespace KvmSharp.Boot;

/// <summary>What an operating system may do with a range of memory; the numbers are those of BIOS call INT 15h, E820h.</summary>
public enum MemoryRangeKind
{
    /// <summary>RAM for any use.</summary>
    Usable = 1,
    /// <summary>Not for use.</summary>
    Reserved = 2,
}

/// <summary>A range of guest-physical memory as firmware reports it.</summary>
/// <param name="Address">The first address.</param>
/// <param name="Length">The length in bytes.</param>
/// <param name="Kind">What it may be used for.</param>
public readonly record struct MemoryRange(GuestAddress Address, ulong Length, MemoryRangeKind Kind)
{
    internal ulong End => Address.Value + Length;
}

/// <summary>The memory map of a PC.</summary>
public static class MemoryMap
{
    internal const ulong ExtendedBiosData = 0x9_fc00;
    internal const ulong VideoStart = 0xa_0000;
    internal const ulong BiosStart = 0xe_0000;
    internal const ulong HighStart = 0x10_0000;

    /// <summary>Describes memory as a PC's firmware does: the legacy areas below 1 MiB are reserved, the rest of RAM is usable.</summary>
    /// <param name="memory">The guest's memory.</param>
    public static IReadOnlyList<MemoryRange> ForPc(GuestMemory memory)
    {
        ArgumentNullException.ThrowIfNull(memory);
        var map = new List<MemoryRange>();
        foreach (var slot in memory.Slots)
        {
            var start = slot.Address.Value;
            var end = start + slot.Size;
            if ((slot.Flags & MemorySlotFlags.ReadOnly) != 0)
            {
                Add(map, start, end, MemoryRangeKind.Reserved);
                continue;
            }
            Add(map, start, Math.Min(end, ExtendedBiosData), MemoryRangeKind.Usable);
            Add(map, Math.Max(start, ExtendedBiosData), Math.Min(end, VideoStart), MemoryRangeKind.Reserved);
            Add(map, Math.Max(start, BiosStart), Math.Min(end, HighStart), MemoryRangeKind.Reserved);
            Add(map, Math.Max(start, HighStart), end, MemoryRangeKind.Usable);
        }
        return map;
    }

    private static void Add(List<MemoryRange> map, ulong start, ulong end, MemoryRangeKind kind)
    {
        if (start >= end)
        {
            return;
        }
        if (map.Count > 0 && map[^1].End == start && map[^1].Kind == kind)
        {
            map[^1] = map[^1] with { Length = end - map[^1].Address.Value };
        }
        else
        {
            map.Add(new MemoryRange(start, end - start, kind));
        }
    }
}
