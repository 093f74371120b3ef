namespace KvmSharp.Devices;

/// <summary>
/// The real-time clock and battery-backed memory of a PC. Time comes from the machine's clock. Specification: Motorola
/// MC146818A, and the IBM PC/AT Technical Reference for what the PC keeps in the memory.
/// </summary>
public sealed partial class CmosRtc : IIoDevice, IDeviceState
{
    /// <summary>The usual first port.</summary>
    public const ulong BasePort = 0x70;

    /// <summary>How many ports the device takes: index and data.</summary>
    public const int PortCount = 2;

    private const ulong Second = 1_000_000_000;
    private const long SecondsPerDay = 86_400;

    // Configuration: the memory sizes, which are written into the registers.

    // Wiring
    private readonly Lock _lock = new();
    private readonly VmClock _clock;
    private readonly InterruptLine _interrupt;
    private readonly VmTimer _timer;

    // State
    private readonly byte[] _registers = new byte[RegisterCount]; // those of the time count only while it stands still
    private byte _index;
    private long _offset; // seconds since 1970 when the divider chain read 0
    private ulong _phase; // nanoseconds that the divider chain is ahead of the machine's clock
    private int _weekdayShift; // what the guest set, against the calendar
    private Flag _flags;
    private long _seenSecond; // up to where flags are evaluated
    private ulong _seenPeriod;
    private bool _dividerWasReset;
    private bool _alarm; // the alarm asks for an interrupt; follows from the registers

    /// <summary>Creates the clock; it tells the UTC time of the machine's clock.</summary>
    /// <param name="clock">The machine's clock.</param>
    /// <param name="interrupt">The interrupt line, IRQ 8 on a PC.</param>
    /// <param name="memoryBelow4G">RAM below 4 GiB in bytes, for the firmware's size bytes.</param>
    /// <param name="memoryAbove4G">RAM above 4 GiB in bytes.</param>
    public CmosRtc(VmClock clock, InterruptLine interrupt, ulong memoryBelow4G = 0, ulong memoryAbove4G = 0)
    {
        ArgumentNullException.ThrowIfNull(clock);
        ArgumentNullException.ThrowIfNull(interrupt);
        _clock = clock;
        _interrupt = interrupt;
        _timer = clock.CreateTimer(OnTimer);
        _registers[RegisterA] = DividerRunning | 6; // 1,024 Hz, as firmware leaves it
        _registers[RegisterB] = (byte)Control.Hours24;
        _registers[Equipment] = 0x02; // a numeric coprocessor
        SetMemorySize(memoryBelow4G, memoryAbove4G);
        var start = clock.StartTime.UtcTicks - DateTimeOffset.UnixEpoch.UtcTicks;
        _offset = Math.DivRem(start, TimeSpan.TicksPerSecond, out var fraction);
        _phase = (ulong)fraction * 100;
        _seenSecond = CurrentSecond(clock.Nanoseconds);
        _seenPeriod = CurrentPeriod(clock.Nanoseconds);
    }

    /// <inheritdoc/>
    public int MaxAccessSize => 1;

    /// <inheritdoc/>
    public string StateName => "cmos-rtc";

    /// <summary>The alarm asks for an interrupt. Raised without locks, on any thread.</summary>
    internal event Action? AlarmRaised;

    private Control ControlBits => (Control)_registers[RegisterB];

    // Time runs unless the guest is setting it or holds the divider chain.
    private bool Running => (ControlBits & Control.Set) == 0 && (_registers[RegisterA] & DividerMask) == DividerRunning;

    /// <inheritdoc/>
    public void Read(ulong offset, Span<byte> data)
    {
        if (offset == 0)
        {
            return; // the index port is write-only
        }
        bool alarm;
        lock (_lock)
        {
            var now = _clock.Nanoseconds;
            Advance(now);
            alarm = TakeAlarm();
            data[0] = ReadRegister(_index, now);
            _alarm = AlarmRequested; // reading register C takes it away
            Update(now);
        }
        RaiseAlarm(alarm);
    }

    /// <inheritdoc/>
    public void Write(ulong offset, ReadOnlySpan<byte> data)
    {
        bool alarm;
        lock (_lock)
        {
            if (offset == 0)
            {
                _index = (byte)(data[0] & ~NmiMask);
                return;
            }
            var now = _clock.Nanoseconds;
            Advance(now);
            WriteRegister(_index, data[0], now);
            alarm = TakeAlarm();
            Update(now);
        }
        RaiseAlarm(alarm);
    }

    /// <inheritdoc/>
    public void SaveState(StateWriter writer)
    {
        ArgumentNullException.ThrowIfNull(writer);
        lock (_lock)
        {
            writer.WriteBytes(_registers);
            writer.WriteByte(_index);
            writer.WriteInt64(_offset);
            writer.WriteUInt64(_phase);
            writer.WriteByte((byte)_weekdayShift);
            writer.WriteByte((byte)_flags);
            writer.WriteInt64(_seenSecond);
            writer.WriteUInt64(_seenPeriod);
            writer.WriteBoolean(_dividerWasReset);
            writer.WriteUInt64(_timer.Deadline);
        }
    }

    /// <inheritdoc/>
    public void LoadState(StateReader reader)
    {
        ArgumentNullException.ThrowIfNull(reader);
        lock (_lock)
        {
            reader.ReadBytes(RegisterCount).CopyTo(_registers);
            _index = (byte)(reader.ReadByte() & ~NmiMask);
            _offset = reader.ReadInt64();
            _phase = reader.ReadUInt64();
            _weekdayShift = reader.ReadByte() % 7;
            _flags = (Flag)reader.ReadByte() & (Flag.Update | Flag.Alarm | Flag.Periodic);
            _seenSecond = reader.ReadInt64();
            _seenPeriod = reader.ReadUInt64();
            _dividerWasReset = reader.ReadBoolean();
            if (_phase >= Second || Math.Abs(_offset / SecondsPerDay) > 20_000_000 || Math.Abs(_seenSecond / SecondsPerDay) > 40_000_000)
            {
                throw new MachineStateException("The saved state is damaged: the real-time clock tells an impossible time.");
            }
            _timer.Arm(reader.ReadUInt64());
            _alarm = AlarmRequested;
            _interrupt.Set(InterruptRequested);
        }
    }

    /// <summary>Leaves a boot order as a PC's setup program does: up to three kinds of devices, 1 to 4 each. Before the start.</summary>
    internal void SetBootOrder(ReadOnlySpan<byte> kinds)
    {
        byte At(int index, ReadOnlySpan<byte> list) => index < list.Length ? list[index] : (byte)0;
        _registers[BootOrder] = (byte)(At(0, kinds) | At(1, kinds) << 4);
        _registers[BootFlags] = (byte)(At(2, kinds) << 4 | NoFloppyCheck);
    }

    /// <summary>Leaves a reason for the next reset to firmware.</summary>
    /// <param name="status">The code in the shutdown status byte.</param>
    internal void SetShutdownStatus(byte status)
    {
        lock (_lock)
        {
            _registers[ShutdownStatus] = status;
        }
    }

    /// <summary>What the battery keeps through a reset: the memory, and how far the guest has set the clock.</summary>
    internal Battery SaveBattery()
    {
        lock (_lock)
        {
            var now = _clock.Nanoseconds;
            Advance(now);
            return new Battery([.. _registers], CurrentSecond(now) - NominalSecond(now), _weekdayShift);
        }
    }

    /// <summary>Goes on from what the battery has kept, as firmware leaves it: time runs, no interrupt is asked for. Before the start.</summary>
    /// <param name="battery">What <see cref="SaveBattery"/> gave.</param>
    internal void LoadBattery(Battery battery)
    {
        const Control Kept = Control.DaylightSavings | Control.Hours24 | Control.Binary;
        lock (_lock)
        {
            for (var i = 0; i < RegisterCount; i++)
            {
                _registers[i] = i switch
                {
                    RegisterA or (>= BaseMemory and < BaseMemory + 4) or (>= ExtendedMemoryFound and < ExtendedMemoryFound + 2)
                        or (>= MemoryAbove16M and < MemoryAbove16M + 2) or (>= MemoryAbove4G and < MemoryAbove4G + 3)
                        or BootFlags or BootOrder => _registers[i],
                    RegisterB => (byte)((Control)battery.Memory[i] & Kept),
                    _ => battery.Memory[i],
                };
            }
            _offset += battery.SecondsAhead;
            _weekdayShift = battery.WeekdayShift;
            _seenSecond = CurrentSecond(_clock.Nanoseconds);
        }
    }

    private bool AlarmRequested => ((byte)_flags & (byte)ControlBits & (byte)Flag.Alarm) != 0;

    private bool InterruptRequested => ((byte)_flags & (byte)ControlBits & (byte)(Flag.Update | Flag.Alarm | Flag.Periodic)) != 0;

    private byte ReadRegister(byte index, ulong now)
    {
        switch (index)
        {
            case Seconds or Minutes or Hours or DayOfWeek or DayOfMonth or Month or Year or Century:
                if (Running)
                {
                    StoreTime(CurrentSecond(now));
                }
                return _registers[index];
            case RegisterA:
                var updating = Running && Fraction(now) >= Second - UpdateWarning;
                return (byte)(_registers[RegisterA] | (updating ? UpdateInProgress : 0));
            case RegisterC:
                var value = (byte)((byte)_flags | (InterruptRequested ? (byte)Flag.InterruptRequest : 0));
                _flags = Flag.None;
                return value;
            case RegisterD:
                return ValidRam;
            default:
                return _registers[index];
        }
    }

    private void WriteRegister(byte index, byte value, ulong now)
    {
        switch (index)
        {
            case Seconds or Minutes or Hours or DayOfWeek or DayOfMonth or Month or Year or Century:
                var running = Running;
                if (running)
                {
                    StoreTime(CurrentSecond(now));
                }
                _registers[index] = value;
                if (running)
                {
                    LoadTime(now, Fraction(now));
                }
                break;
            case RegisterA:
                ChangeControl(now, () => _registers[RegisterA] = (byte)(value & ~UpdateInProgress));
                _seenPeriod = CurrentPeriod(now);
                break;
            case RegisterB:
                // "The SET bit ... UIE is cleared when SET goes high."
                var next = (value & (byte)Control.Set) != 0 ? (byte)(value & ~(byte)Control.UpdateInterrupt) : value;
                ChangeControl(now, () => _registers[RegisterB] = next);
                break;
            case RegisterC or RegisterD:
                break;
            default:
                _registers[index] = value;
                break;
        }
    }

    // Starting and stopping of time. A divider chain that comes out of reset makes its first update after half a second
    // ("Register A", "Divider Control").
    private void ChangeControl(ulong now, Action change)
    {
        var wasRunning = Running;
        var fraction = Fraction(now);
        if (wasRunning)
        {
            StoreTime(CurrentSecond(now));
            _dividerWasReset = false;
        }
        change();
        _dividerWasReset |= (_registers[RegisterA] & DividerReset) == DividerReset;
        if (!wasRunning && Running)
        {
            LoadTime(now, _dividerWasReset ? Second / 2 : fraction);
            _dividerWasReset = false;
        }
    }

    // The time since the divider chain read 0.
    private ulong Elapsed(ulong now) => now + _phase;

    private ulong Fraction(ulong now) => Elapsed(now) % Second;

    // What the clock would tell if nobody had set it.
    private long NominalSecond(ulong now) =>
        (_clock.StartTime.UtcTicks - DateTimeOffset.UnixEpoch.UtcTicks + (long)(now / 100)) / TimeSpan.TicksPerSecond;

    private long CurrentSecond(ulong now) => _offset + (long)(Elapsed(now) / Second);

    // "Periodic Interrupt Selection": rates 1 and 2 repeat 8 and 9.
    private ulong PeriodicFrequency
    {
        get
        {
            var rate = _registers[RegisterA] & RateMask;
            return rate switch
            {
                0 => 0,
                1 => 256,
                2 => 128,
                _ => CrystalFrequency >> (rate - 1),
            };
        }
    }

    private ulong CurrentPeriod(ulong now) => (ulong)((UInt128)Elapsed(now) * PeriodicFrequency / Second);

    // Sets the flags for all that has happened since the last look.
    private void Advance(ulong now)
    {
        var period = CurrentPeriod(now);
        if (period != _seenPeriod)
        {
            _flags |= Flag.Periodic;
            _seenPeriod = period;
        }
        var second = CurrentSecond(now);
        if (!Running)
        {
            _seenSecond = second;
            return;
        }
        if (second > _seenSecond)
        {
            _flags |= Flag.Update;
            if (MatchesAlarm(_seenSecond, second))
            {
                _flags |= Flag.Alarm;
            }
            _seenSecond = second;
        }
    }

    // Drives the line and asks to be called when it will next have to change.
    private void Update(ulong now)
    {
        _interrupt.Set(InterruptRequested);
        var deadline = VmClock.Never;
        var waiting = (Flag)ControlBits & ~_flags;
        if ((waiting & Flag.Periodic) != 0 && PeriodicFrequency != 0)
        {
            // Rounded up: at the deadline the period is over.
            var tick = ((UInt128)(_seenPeriod + 1) * Second + PeriodicFrequency - 1) / PeriodicFrequency;
            deadline = (ulong)tick - _phase;
        }
        if ((waiting & (Flag.Update | Flag.Alarm)) != 0 && Running)
        {
            deadline = Math.Min(deadline, now + Second - Fraction(now));
        }
        if (_timer.Deadline != deadline)
        {
            _timer.Arm(deadline);
        }
    }

    private void OnTimer()
    {
        bool alarm;
        lock (_lock)
        {
            var now = _clock.Nanoseconds;
            Advance(now);
            alarm = TakeAlarm();
            Update(now);
        }
        RaiseAlarm(alarm);
    }

    // Whether the alarm has gone off since the last call.
    private bool TakeAlarm()
    {
        var before = _alarm;
        _alarm = AlarmRequested;
        return _alarm && !before;
    }

    private void RaiseAlarm(bool alarm)
    {
        if (alarm)
        {
            AlarmRaised?.Invoke();
        }
    }

    private bool MatchesAlarm(long after, long until)
    {
        // A whole day has every time that there is; a shorter span is looked through.
        for (var second = Math.Max(after + 1, until - SecondsPerDay + 1); second <= until; second++)
        {
            var time = (int)(second - FloorDiv(second, SecondsPerDay) * SecondsPerDay);
            if (!Matches(_registers[HoursAlarm], EncodeHour(time / 3600)))
            {
                second += 3599 - time % 3600;
            }
            else if (!Matches(_registers[MinutesAlarm], Encode(time / 60 % 60)))
            {
                second += 59 - time % 60;
            }
            else if (Matches(_registers[SecondsAlarm], Encode(time % 60)))
            {
                return true;
            }
        }
        return false;
    }

    private static bool Matches(byte alarm, byte value) => (alarm & AlarmDontCare) == AlarmDontCare || alarm == value;

    private void StoreTime(long second)
    {
        var day = FloorDiv(second, SecondsPerDay);
        var time = (int)(second - day * SecondsPerDay);
        var (year, month, dayOfMonth) = ToCalendar(day);
        _registers[Seconds] = Encode(time % 60);
        _registers[Minutes] = Encode(time / 60 % 60);
        _registers[Hours] = EncodeHour(time / 3600);
        _registers[DayOfWeek] = Encode(Weekday(day) + 1);
        _registers[DayOfMonth] = Encode(dayOfMonth);
        _registers[Month] = Encode(month);
        _registers[Year] = Encode((int)(year % 100));
        _registers[Century] = Encode((int)(year / 100 % 100));
    }

    // Takes the time from the registers. What no calendar has (a 31st of February) counts on into the next month.
    private void LoadTime(ulong now, ulong fraction)
    {
        var year = Decode(_registers[Century]) * 100L + Decode(_registers[Year]);
        var month = Math.Clamp(Decode(_registers[Month]), 1, 12);
        var day = FromCalendar(year, month, 1) + Decode(_registers[DayOfMonth]) - 1;
        var second = day * SecondsPerDay + DecodeHour(_registers[Hours]) * 3600L + Decode(_registers[Minutes]) * 60L + Decode(_registers[Seconds]);
        _weekdayShift = 0;
        _weekdayShift = (((Decode(_registers[DayOfWeek]) - 1 - Weekday(FloorDiv(second, SecondsPerDay))) % 7) + 7) % 7;
        _phase = (fraction + Second - now % Second) % Second;
        _offset = 0;
        _offset = second - CurrentSecond(now);
        _seenSecond = second;
        _seenPeriod = CurrentPeriod(now);
    }

    private int Weekday(long day) => (int)(((day + 4 + _weekdayShift) % 7 + 7) % 7); // 1970-01-01 was a Thursday

    private byte Encode(int value) => (ControlBits & Control.Binary) != 0 ? (byte)value : (byte)((value / 10 << 4) | (value % 10));

    private int Decode(byte value) => (ControlBits & Control.Binary) != 0 ? value : (value >> 4) * 10 + (value & 0x0f);

    private byte EncodeHour(int hour)
    {
        if ((ControlBits & Control.Hours24) != 0)
        {
            return Encode(hour);
        }
        var value = Encode(hour % 12 == 0 ? 12 : hour % 12);
        return hour >= 12 ? (byte)(value | HourPm) : value;
    }

    private int DecodeHour(byte value) => (ControlBits & Control.Hours24) != 0
        ? Decode(value)
        : Decode((byte)(value & ~HourPm)) % 12 + ((value & HourPm) != 0 ? 12 : 0);

    private void SetMemorySize(ulong below4G, ulong above4G)
    {
        SetBytes(BaseMemory, 2, Math.Min(below4G >> 10, 640));
        var extended = below4G > 1UL << 20 ? Math.Min((below4G - (1UL << 20)) >> 10, 0xffff) : 0;
        SetBytes(ExtendedMemory, 2, extended);
        SetBytes(ExtendedMemoryFound, 2, extended);
        SetBytes(MemoryAbove16M, 2, below4G > 16UL << 20 ? Math.Min((below4G - (16UL << 20)) >> 16, 0xffff) : 0);
        SetBytes(MemoryAbove4G, 3, Math.Min(above4G >> 16, 0xff_ffff));
    }

    private void SetBytes(byte index, int count, ulong value)
    {
        for (var i = 0; i < count; i++)
        {
            _registers[index + i] = (byte)(value >> (8 * i));
        }
    }

    private static long FloorDiv(long value, long divisor) => (value - (((value % divisor) + divisor) % divisor)) / divisor;

    // Days since 1970-01-01 in the Gregorian calendar, counted in years that begin in March so that leap days come last.
    private static long FromCalendar(long year, int month, int day)
    {
        var y = month <= 2 ? year - 1 : year;
        var m = (month + 9) % 12;
        var leapDays = FloorDiv(y, 4) - FloorDiv(y, 100) + FloorDiv(y, 400);
        return 365 * y + leapDays + (153 * m + 2) / 5 + (day - 1) - 719_468;
    }

    private static (long Year, int Month, int Day) ToCalendar(long day)
    {
        var year = FloorDiv((day + 719_468) * 400, 146_097);
        // The estimate is at most a year off.
        if (day < FromCalendar(year, 3, 1))
        {
            year--;
        }
        else if (day >= FromCalendar(year + 1, 3, 1))
        {
            year++;
        }
        var dayOfYear = (int)(day - FromCalendar(year, 3, 1));
        var m = (5 * dayOfYear + 2) / 153;
        var month = m < 10 ? m + 3 : m - 9;
        return (month <= 2 ? year + 1 : year, month, dayOfYear - (153 * m + 2) / 5 + 1);
    }

    /// <summary>What outlives a reset.</summary>
    /// <param name="Memory">All registers.</param>
    /// <param name="SecondsAhead">How far the clock is ahead of the machine's.</param>
    /// <param name="WeekdayShift">How far the day of the week is ahead of the calendar's.</param>
    internal sealed record Battery(byte[] Memory, long SecondsAhead, int WeekdayShift);
}
