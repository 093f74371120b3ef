using System.Buffers.Binary;

namespace KvmSharp.Devices;

/// <summary>
/// The fixed ACPI hardware: power button, soft-off, power management timer. The machine is always in ACPI mode.
/// Specification: ACPI 6.5, "ACPI Hardware Specification".
/// </summary>
public sealed partial class AcpiPm : IIoDevice, IDeviceState
{
    /// <summary>How many ports the device takes.</summary>
    public const int PortCount = 12;

    // Configuration: none.

    // Wiring
    private readonly Lock _lock = new();
    private readonly VmClock _clock;
    private readonly InterruptLine _interrupt;
    private readonly IMachineControl _machine;
    private readonly VmTimer _timer;

    // State
    private Event _status;
    private Event _enable;
    private Control _control = Control.SciEnable;
    private ulong _seenHalf; // how often the timer's highest bit had changed at the last look

    /// <summary>Creates the device.</summary>
    /// <param name="clock">The machine's clock.</param>
    /// <param name="interrupt">The system control interrupt: level-triggered.</param>
    /// <param name="machine">What a soft-off switches off.</param>
    public AcpiPm(VmClock clock, InterruptLine interrupt, IMachineControl machine)
    {
        ArgumentNullException.ThrowIfNull(clock);
        ArgumentNullException.ThrowIfNull(interrupt);
        ArgumentNullException.ThrowIfNull(machine);
        _clock = clock;
        _interrupt = interrupt;
        _machine = machine;
        _timer = clock.CreateTimer(OnTimer);
        _seenHalf = Ticks >> 31;
    }

    /// <inheritdoc/>
    public int MaxAccessSize => 4;

    /// <inheritdoc/>
    public string StateName => "acpi-pm";

    private ulong Ticks => (ulong)((UInt128)_clock.Nanoseconds * TimerFrequency / 1_000_000_000);

    /// <summary>Presses the power button: a guest that listens to it shuts down. Callable from any thread.</summary>
    public void PressPowerButton()
    {
        lock (_lock)
        {
            _status |= Event.PowerButton;
            Update();
        }
    }

    /// <inheritdoc/>
    public void Read(ulong offset, Span<byte> data)
    {
        lock (_lock)
        {
            Advance();
            // Registers may be read in bytes, words or doublewords; the whole block is put together first.
            Span<byte> block = stackalloc byte[PortCount];
            block.Clear();
            BinaryPrimitives.WriteUInt16LittleEndian(block[EventOffset..], (ushort)_status);
            BinaryPrimitives.WriteUInt16LittleEndian(block[EnableOffset..], (ushort)_enable);
            BinaryPrimitives.WriteUInt16LittleEndian(block[ControlOffset..], (ushort)_control);
            BinaryPrimitives.WriteUInt32LittleEndian(block[TimerOffset..], (uint)Ticks);
            block.Slice((int)offset, data.Length).CopyTo(data);
        }
    }

    /// <inheritdoc/>
    public void Write(ulong offset, ReadOnlySpan<byte> data)
    {
        lock (_lock)
        {
            Advance();
            for (var i = 0; i < data.Length; i++)
            {
                WriteByte((int)offset + i, data[i]);
            }
            Update();
        }
    }

    /// <inheritdoc/>
    public void SaveState(StateWriter writer)
    {
        ArgumentNullException.ThrowIfNull(writer);
        lock (_lock)
        {
            writer.WriteUInt16((ushort)_status);
            writer.WriteUInt16((ushort)_enable);
            writer.WriteUInt16((ushort)_control);
            writer.WriteUInt64(_seenHalf);
            writer.WriteUInt64(_timer.Deadline);
        }
    }

    /// <inheritdoc/>
    public void LoadState(StateReader reader)
    {
        ArgumentNullException.ThrowIfNull(reader);
        lock (_lock)
        {
            _status = (Event)reader.ReadUInt16() & Event.Enables;
            _enable = (Event)reader.ReadUInt16() & Event.Enables;
            _control = ((Control)reader.ReadUInt16() & Control.Writable) | Control.SciEnable;
            _seenHalf = reader.ReadUInt64();
            _timer.Arm(reader.ReadUInt64());
            _interrupt.Set((_status & _enable) != 0);
        }
    }

    private void WriteByte(int offset, byte value)
    {
        switch (offset)
        {
            case EventOffset or EventOffset + 1:
                _status &= (Event)(ushort)~(value << (8 * (offset - EventOffset))); // write one to clear
                break;
            case EnableOffset or EnableOffset + 1:
                _enable = (Event)Replace((ushort)_enable, offset - EnableOffset, value) & Event.Enables;
                break;
            case ControlOffset or ControlOffset + 1:
                var written = (Control)Replace((ushort)_control, offset - ControlOffset, value);
                _control = (written & Control.Writable) | Control.SciEnable;
                // Only S5 is announced; a request for another state does nothing.
                if ((written & Control.SleepEnable) != 0 && (int)(written & Control.SleepTypeMask) >> SleepTypeShift == SleepTypeS5)
                {
                    _machine.RequestPowerOff();
                }
                break;
            default:
                break; // the timer is read-only
        }
    }

    private static ushort Replace(ushort old, int index, byte value) =>
        (ushort)((old & ~(0xff << (8 * index))) | (value << (8 * index)));

    private void Advance()
    {
        var half = Ticks >> 31;
        if (half != _seenHalf)
        {
            _seenHalf = half;
            _status |= Event.Timer;
        }
    }

    private void Update()
    {
        _interrupt.Set((_status & _enable) != 0);
        var deadline = VmClock.Never;
        if ((_enable & ~_status & Event.Timer) != 0)
        {
            deadline = (ulong)((((UInt128)(_seenHalf + 1) << 31) * 1_000_000_000 + TimerFrequency - 1) / TimerFrequency);
        }
        if (_timer.Deadline != deadline)
        {
            _timer.Arm(deadline);
        }
    }

    private void OnTimer()
    {
        lock (_lock)
        {
            Advance();
            Update();
        }
    }
}
