using static KvmSharp.Devices.ShadowMemoryRegisters;

namespace KvmSharp.Devices;

/// <summary>
/// The memory below 1 MiB that firmware shadows: for each segment from 0xC0000 to 0xFFFFF the chipset decides whether reads
/// and writes go to RAM or to what lies behind, which from 0xE0000 on is the end of the firmware's image. Specification: Intel
/// 3 Series Express Chipset Family, "PAM0 - Programmable Attribute Map 0" and its followers.
/// </summary>
internal sealed class ShadowMemory : IIoDevice, IDeviceState, IDisposable
{
    // Wiring
    private readonly Lock _lock = new();
    private readonly GuestMemory[] _memories; // of the normal and of system management mode
    private readonly GuestRam _ram; // the segments' own, offset 0 is 0xC0000
    private readonly GuestRam _rom;
    private readonly Dictionary<(uint Start, uint Length, Kind Kind), (GuestMemory Memory, MemorySlot Slot)[]> _slots = [];

    // State: the content of the RAM, and which segments lead there.
    private readonly Access[] _segments = new Access[SegmentCount];

    /// <summary>Creates the memory with all reads going to the firmware, as after a reset.</summary>
    /// <param name="memory">The guest's memory, nothing mapped from 0xC0000 to 0xFFFFF.</param>
    /// <param name="systemManagementMemory">The same for system management mode, where there is one.</param>
    /// <param name="firmware">The firmware's image.</param>
    public ShadowMemory(GuestMemory memory, GuestMemory? systemManagementMemory, ReadOnlySpan<byte> firmware)
    {
        _memories = systemManagementMemory is null ? [memory] : [memory, systemManagementMemory];
        _ram = new GuestRam(Length);
        _rom = new GuestRam(RomLength);
        var tail = firmware[^Math.Min(firmware.Length, (int)RomLength)..];
        _rom.Write(RomLength - (ulong)tail.Length, tail);
        Remap();
    }

    private enum Kind
    {
        Open,
        Rom,
        ReadOnlyRam,
        Ram,
    }

    /// <inheritdoc/>
    public string StateName => "shadow-memory";

    /// <summary>Takes over the attribute registers of the host bridge.</summary>
    /// <param name="registers">PAM0 to PAM6.</param>
    public void SetAttributes(ReadOnlySpan<byte> registers)
    {
        lock (_lock)
        {
            for (var i = 0; i < SegmentCount; i++)
            {
                // The last segment has the high half of PAM0; the others two to a register from PAM1 on.
                var field = i == SegmentCount - 1 ? registers[0] >> 4 : registers[1 + i / 2] >> (i % 2 * 4);
                _segments[i] = (Access)field & Access.All;
            }
            Remap();
        }
    }

    /// <inheritdoc/>
    public void Read(ulong offset, Span<byte> data)
    {
        // Only what no slot backs comes here: nothing answers.
    }

    /// <inheritdoc/>
    public void Write(ulong offset, ReadOnlySpan<byte> data)
    {
        lock (_lock)
        {
            for (var i = 0; i < data.Length; i++)
            {
                if (_segments[SegmentOf((uint)offset + (uint)i)] == Access.Write)
                {
                    _ram.WriteUnseen(offset + (ulong)i, data.Slice(i, 1));
                }
            }
        }
    }

    /// <inheritdoc/>
    public void SaveState(StateWriter writer)
    {
        ArgumentNullException.ThrowIfNull(writer);
        lock (_lock)
        {
            var content = new byte[Length];
            _ram.ReadRaw(0, content);
            writer.WriteBytes(content);
            foreach (var access in _segments)
            {
                writer.WriteByte((byte)access);
            }
        }
    }

    /// <inheritdoc/>
    public void LoadState(StateReader reader)
    {
        ArgumentNullException.ThrowIfNull(reader);
        lock (_lock)
        {
            // Out of sight of the guest first, so that nothing decoded from the old content stays.
            _segments.AsSpan().Clear();
            Remap();
            _ram.WriteUnseen(0, reader.ReadBytes((int)Length));
            for (var i = 0; i < SegmentCount; i++)
            {
                _segments[i] = (Access)reader.ReadByte() & Access.All;
            }
            Remap();
        }
    }

    /// <inheritdoc/>
    public void Dispose()
    {
        lock (_lock)
        {
            _ram.Dispose();
            _rom.Dispose();
        }
    }

    // Adjacent segments of one kind share a slot. What stays as it is keeps its slot: other processors may run there.
    private void Remap()
    {
        var wanted = new List<(uint Start, uint Length, Kind Kind)>();
        for (var i = 0; i < SegmentCount; i++)
        {
            var start = StartOf(i);
            var kind = KindOf(i);
            var length = StartOf(i + 1) - start;
            if (wanted.Count != 0 && wanted[^1].Kind == kind)
            {
                wanted[^1] = wanted[^1] with { Length = wanted[^1].Length + length };
            }
            else
            {
                wanted.Add((start, length, kind));
            }
        }
        foreach (var (key, slots) in _slots.Where(s => !wanted.Contains(s.Key)).ToArray())
        {
            foreach (var (memory, slot) in slots)
            {
                memory.Remove(slot);
            }
            _slots.Remove(key);
        }
        foreach (var key in wanted.Where(k => k.Kind != Kind.Open && !_slots.ContainsKey(k)))
        {
            var (ram, offset) = key.Kind == Kind.Rom ? (_rom, key.Start - RomStart) : (_ram, key.Start);
            var flags = key.Kind == Kind.Ram ? MemorySlotFlags.None : MemorySlotFlags.ReadOnly;
            _slots.Add(key, [.. _memories
                .Select(m => (Memory: m, Slot: m.TryMapOfDevice(ram, offset, Address + key.Start, key.Length, flags)))
                .Where(s => s.Slot is not null).Select(s => (s.Memory, s.Slot!))]);
        }
    }

    private Kind KindOf(int segment) => _segments[segment] switch
    {
        Access.All => Kind.Ram,
        Access.Read => Kind.ReadOnlyRam,
        _ => StartOf(segment) >= RomStart ? Kind.Rom : Kind.Open,
    };
}
