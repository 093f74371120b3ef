namespace KvmSharp.Devices;

/// <content>
/// The window at 0xA0000. Byte o of plane p is byte 4 * o + p of the memory, so that what is written through a chained mode
/// lies there as in the linear frame buffer.
/// </content>
public sealed unsafe partial class VgaAdapter
{
    private const int PlaneSize = 0x1_0000;

    private bool _changed; // something that is shown may have

    private void ReadWindow(uint offset, Span<byte> data)
    {
        lock (_lock)
        {
            for (var i = 0; i < data.Length && !_isDisposed; i++)
            {
                if (InWindow(offset + (uint)i) is { } address)
                {
                    data[i] = ReadByte(address);
                }
            }
        }
    }

    private void WriteWindow(uint offset, ReadOnlySpan<byte> data)
    {
        lock (_lock)
        {
            for (var i = 0; i < data.Length && !_isDisposed; i++)
            {
                if (InWindow(offset + (uint)i) is { } address)
                {
                    WriteByte(address, data[i]);
                    NoteWrite(address);
                }
            }
            _changed = true;
        }
    }

    // A guest may execute from the linear frame buffer what it writes through the window.
    private void NoteWrite(uint address)
    {
        if (_slot is { } slot)
        {
            var chained = (_sequencer[MemoryMode] & Chain4) != 0;
            var offset = (chained ? address : address * 4) % MemorySize & ~3u;
            var start = (_graphics[GraphicsMode] & OddEven) != 0 && !chained ? ((address & ~1u) << 1) % MemorySize : offset;
            _machine!.Memory.MarkWritten(slot.Address + start, 4);
        }
    }

    // "Miscellaneous Register", "Memory Map"
    private uint? InWindow(uint offset) => ((_graphics[Miscellaneous] >> 2) & 3) switch
    {
        0 => offset,
        1 => offset < 0x1_0000 ? offset + ((uint)_vbe[VbeBank] << 16) : null,
        2 => offset is >= 0x1_0000 and < 0x1_8000 ? offset - 0x1_0000 : null,
        _ => offset is >= 0x1_8000 and < 0x2_0000 ? offset - 0x1_8000 : null,
    };

    private byte ReadByte(uint address)
    {
        var memory = _memory.Address;
        if ((_sequencer[MemoryMode] & Chain4) != 0)
        {
            return memory[address % MemorySize];
        }
        if ((_graphics[GraphicsMode] & OddEven) != 0)
        {
            var plane = (uint)(_graphics[ReadMapSelect] & 2) | (address & 1);
            return memory[(((address & ~1u) << 1) | plane) % MemorySize];
        }
        var planes = memory + address * 4 % MemorySize;
        new ReadOnlySpan<byte>(planes, 4).CopyTo(_latches);
        if ((_graphics[GraphicsMode] & ReadCompare) == 0)
        {
            return _latches[_graphics[ReadMapSelect] & 3];
        }
        // "Read Mode 1": a bit is set where all planes that count equal the colour.
        byte different = 0;
        for (var plane = 0; plane < 4; plane++)
        {
            if ((_graphics[ColorDontCare] >> plane & 1) != 0)
            {
                different |= (byte)(_latches[plane] ^ ((_graphics[ColorCompare] >> plane & 1) != 0 ? 0xff : 0));
            }
        }
        return (byte)~different;
    }

    private void WriteByte(uint address, byte value)
    {
        var memory = _memory.Address;
        if ((_sequencer[MemoryMode] & Chain4) != 0)
        {
            if ((_sequencer[MapMask] >> (int)(address & 3) & 1) != 0)
            {
                memory[address % MemorySize] = value;
            }
            return;
        }
        if ((_graphics[GraphicsMode] & OddEven) != 0)
        {
            if ((_sequencer[MapMask] & (5 << (int)(address & 1))) != 0)
            {
                var plane = address & 1;
                plane |= (_sequencer[MapMask] >> (int)plane & 1) != 0 ? 0u : 2u;
                memory[(((address & ~1u) << 1) | plane) % MemorySize] = value;
            }
            return;
        }
        WritePlanes(memory + address * 4 % MemorySize, value);
    }

    // "Graphics Mode Register", "Write Mode"
    private void WritePlanes(byte* planes, byte value)
    {
        var mode = _graphics[GraphicsMode] & 3;
        var rotated = byte.RotateRight(value, _graphics[DataRotate] & 7);
        var mask = mode == 3 ? (byte)(_graphics[BitMask] & rotated) : _graphics[BitMask];
        for (var plane = 0; plane < 4; plane++)
        {
            if ((_sequencer[MapMask] >> plane & 1) == 0)
            {
                continue;
            }
            var set = (_graphics[SetReset] >> plane & 1) != 0 ? (byte)0xff : (byte)0;
            var latch = _latches[plane];
            if (mode == 1)
            {
                planes[plane] = latch;
                continue;
            }
            var source = mode switch
            {
                0 => (_graphics[EnableSetReset] >> plane & 1) != 0 ? set : rotated,
                2 => (value >> plane & 1) != 0 ? (byte)0xff : (byte)0,
                _ => set,
            };
            var result = ((_graphics[DataRotate] >> 3) & 3) switch
            {
                1 => (byte)(source & latch),
                2 => (byte)(source | latch),
                3 => (byte)(source ^ latch),
                _ => source,
            };
            planes[plane] = (byte)((result & mask) | (latch & ~mask));
        }
    }

    private void FillMemory(int offset, int length)
    {
        ObjectDisposedException.ThrowIf(_isDisposed, this);
        new Span<byte>(_memory.Address + offset, length).Clear();
        if (_slot is { } slot)
        {
            _machine!.Memory.MarkWritten(slot.Address + (ulong)offset, (ulong)length);
        }
        _changed = true;
    }

    // Writes through the linear frame buffer are found in the slot's log.
    private void CollectDirtyPages()
    {
        if (_slot is { } slot && _machine!.Memory.TakeDirtyLog(slot).AsSpan().ContainsAnyExcept(0UL))
        {
            _changed = true;
        }
    }
}
