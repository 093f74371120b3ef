using System.Buffers.Binary;

namespace KvmSharp.Devices;

/// <summary>
/// The test device that self-checking boot images use: a latch at ports 0xE0 to 0xE3, a page flush at 0xE4, interrupt lines
/// at 0x2000 to 0x2017 and a buffer of 64 KiB in MMIO space at 0xFF000000. It behaves as QEMU's <c>pc-testdev</c>.
/// </summary>
public sealed partial class PcTestDevice
{
    // Wiring
    private readonly GuestMemory _memory;
    private readonly Buffer _latch;
    private readonly Buffer _buffer;
    private readonly InterruptDriver _interrupts;

    /// <summary>Creates the device.</summary>
    /// <param name="memory">The guest's memory.</param>
    /// <param name="interrupts">The interrupt lines, 1 to <see cref="InterruptCount"/>: global system interrupts from 0 on.</param>
    public PcTestDevice(GuestMemory memory, IReadOnlyList<InterruptLine> interrupts)
    {
        ArgumentNullException.ThrowIfNull(memory);
        ArgumentNullException.ThrowIfNull(interrupts);
        ArgumentOutOfRangeException.ThrowIfGreaterThan(interrupts.Count, InterruptCount, nameof(interrupts));
        _memory = memory;
        _latch = new Buffer("pc-testdev-latch", LatchLength, 4);
        _buffer = new Buffer("pc-testdev-buffer", BufferLength, 8);
        _interrupts = new InterruptDriver(interrupts);
    }

    /// <summary>Creates the device in a machine and maps all its parts.</summary>
    /// <param name="machine">The machine.</param>
    public static PcTestDevice Map(VirtualMachine machine)
    {
        ArgumentNullException.ThrowIfNull(machine);
        var device = new PcTestDevice(machine.Memory, [.. Enumerable.Range(0, InterruptCount).Select(machine.GetInterruptLine)]);
        machine.Ports.Map(device.Latch, LatchPort, LatchLength);
        machine.Ports.Map(device.Flush, FlushPort, FlushLength);
        machine.Ports.Map(device.Interrupts, InterruptPort, InterruptCount);
        machine.Mmio.Map(device.MemoryBuffer, BufferAddress, BufferLength);
        return device;
    }

    /// <summary>The latch.</summary>
    public IIoDevice Latch => _latch;

    /// <summary>The page flush.</summary>
    public IIoDevice Flush => new PageFlush(_memory);

    /// <summary>The interrupt lines.</summary>
    public IIoDevice Interrupts => _interrupts;

    /// <summary>The buffer.</summary>
    public IIoDevice MemoryBuffer => _buffer;

    private sealed class Buffer(string name, int length, int maxAccessSize) : IIoDevice, IDeviceState
    {
        private readonly Lock _lock = new();
        private readonly byte[] _bytes = new byte[length];

        public int MaxAccessSize => maxAccessSize;

        public string StateName => name;

        public void Read(ulong offset, Span<byte> data)
        {
            lock (_lock)
            {
                _bytes.AsSpan((int)offset, data.Length).CopyTo(data);
            }
        }

        public void Write(ulong offset, ReadOnlySpan<byte> data)
        {
            lock (_lock)
            {
                data.CopyTo(_bytes.AsSpan((int)offset));
            }
        }

        public void SaveState(StateWriter writer)
        {
            lock (_lock)
            {
                writer.WriteBytes(_bytes);
            }
        }

        public void LoadState(StateReader reader)
        {
            lock (_lock)
            {
                reader.ReadBytes(_bytes.Length).CopyTo(_bytes);
            }
        }
    }

    // QEMU takes the page's mapping away for a moment, so that whatever is derived from it has to be made anew. Here the
    // same follows from a write by the host: translations to write to the page and code read from it are dropped.
    private sealed class PageFlush(GuestMemory memory) : IIoDevice
    {
        private const uint PageMask = ~(uint)(GuestMemory.PageSize - 1);

        public int MaxAccessSize => 4;

        public void Read(ulong offset, Span<byte> data) => data.Clear();

        public void Write(ulong offset, ReadOnlySpan<byte> data)
        {
            if (offset != 0 || data.Length != FlushLength)
            {
                return;
            }
            var address = BinaryPrimitives.ReadUInt32LittleEndian(data) & PageMask;
            memory.MarkWritten(address, GuestMemory.PageSize); // no effect where there is no memory
        }
    }

    private sealed class InterruptDriver(IReadOnlyList<InterruptLine> lines) : IIoDevice, IDeviceState
    {
        private readonly Lock _lock = new();

        public int MaxAccessSize => 1;

        public string StateName => "pc-testdev-interrupts";

        public void Read(ulong offset, Span<byte> data) => data.Clear();

        public void Write(ulong offset, ReadOnlySpan<byte> data)
        {
            lock (_lock)
            {
                if (offset < (ulong)lines.Count)
                {
                    lines[(int)offset].Set(data[0] != 0);
                }
            }
        }

        public void SaveState(StateWriter writer)
        {
            lock (_lock)
            {
                writer.WriteUInt32(lines.Select((line, i) => line.IsHigh ? 1u << i : 0).Aggregate(0u, (all, bit) => all | bit));
            }
        }

        public void LoadState(StateReader reader)
        {
            lock (_lock)
            {
                var levels = reader.ReadUInt32();
                for (var i = 0; i < lines.Count; i++)
                {
                    lines[i].Set(((levels >> i) & 1) != 0);
                }
            }
        }
    }
}
