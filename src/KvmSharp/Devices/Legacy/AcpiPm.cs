using System.Buffers.Binary;

namespace KvmSharp.Devices;

/// <summary>
/// The fixed ACPI hardware: power button, soft-off, suspend to RAM, power management timer. The machine is always in ACPI mode.
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
    private Action? _sleep;
    private Action? _wake;

    // State
    private Event _status;
    private Event _enable;
    private Control _control = Control.SciEnable;
    private ulong _seenHalf; // how often the timer's highest bit had changed at the last look
    private bool _asleep;

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

    /// <summary>Whether the guest has suspended the machine to RAM; the power button and an alarm of the real-time clock wake it.</summary>
    public bool IsAsleep
    {
        get
        {
            lock (_lock)
            {
                return _asleep;
            }
        }
    }

    private ulong Ticks => (ulong)((UInt128)_clock.Nanoseconds * TimerFrequency / 1_000_000_000);

    /// <summary>
    /// Presses the power button: a guest that listens to it shuts down, one that sleeps wakes. Callable from any thread.
    /// </summary>
    public void PressPowerButton()
    {
        lock (_lock)
        {
            _status |= Event.PowerButton;
            Update();
            WakeOn(Event.PowerButton); // enabled or not, as "Power Button" wants it
        }
    }

    /// <summary>Offers suspend to RAM. Both are called in the order of the events and must not call back.</summary>
    /// <param name="sleep">Stops the processors.</param>
    /// <param name="wake">Lets the first one go on at the waking vector.</param>
    internal void OfferSleep(Action sleep, Action wake)
    {
        _sleep = sleep;
        _wake = wake;
    }

    /// <summary>The real-time clock's alarm has gone off. Callable from any thread.</summary>
    internal void SignalAlarm()
    {
        lock (_lock)
        {
            _status |= Event.RealTimeClock;
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
            writer.WriteBoolean(_asleep);
        }
    }

    /// <inheritdoc/>
    public void LoadState(StateReader reader)
    {
        ArgumentNullException.ThrowIfNull(reader);
        lock (_lock)
        {
            _status = (Event)reader.ReadUInt16() & Event.Statuses;
            _enable = (Event)reader.ReadUInt16() & Event.Enables;
            _control = ((Control)reader.ReadUInt16() & Control.Writable) | Control.SciEnable;
            _seenHalf = reader.ReadUInt64();
            _timer.Arm(reader.ReadUInt64());
            _asleep = reader.ReadBoolean();
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
                if ((written & Control.SleepEnable) != 0)
                {
                    Sleep((int)(written & Control.SleepTypeMask) >> SleepTypeShift);
                }
                break;
            default:
                break; // the timer is read-only
        }
    }

    // A request for a state that is not announced does nothing.
    private void Sleep(int type)
    {
        if (type == SleepTypeS5)
        {
            _machine.RequestPowerOff();
        }
        else if (type == SleepTypeS3 && _sleep is not null && !_asleep)
        {
            _asleep = true;
            _sleep();
        }
    }

    // "Waking/Wake Status": an event that came before the sleep ends it at once.
    private void WakeOn(Event events)
    {
        if (_asleep && events != Event.None)
        {
            _asleep = false;
            _status |= Event.Wake;
            _wake?.Invoke();
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
        WakeOn(_status & _enable & Event.WakeSources);
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
