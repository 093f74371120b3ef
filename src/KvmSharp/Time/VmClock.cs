namespace KvmSharp;

/// <summary>
/// A machine's clock: the one source of time of every timer in it, real or virtual. Timers of this provider call back on
/// a vCPU thread, between two guest instructions; while the machine is paused no time passes and no timer fires.
/// All members are callable from any thread.
/// </summary>
public sealed class VmClock : TimeProvider
{
    /// <summary>A deadline that never comes.</summary>
    public const ulong Never = ulong.MaxValue;

    private readonly Func<ulong> _now;
    private readonly Action<ulong> _arm;
    private readonly Lock _lock = new();
    private readonly SortedSet<VmTimer> _armed = new(Comparer<VmTimer>.Create(VmTimer.CompareDeadlines));
    private long _nextId;
    private ulong _hostDeadline = Never;
    private bool _dispatching;

    internal VmClock(Func<ulong> now, Action<ulong> arm, DateTimeOffset startTime)
    {
        _now = now;
        _arm = arm;
        StartTime = startTime.ToUniversalTime();
    }

    /// <summary>The wall-clock time at which the clock read 0.</summary>
    public DateTimeOffset StartTime { get; internal set; }

    /// <summary>The time since the machine's creation in nanoseconds, pauses not counted.</summary>
    public ulong Nanoseconds => _now();

    /// <inheritdoc/>
    public override long TimestampFrequency => 1_000_000_000;

    /// <summary>UTC: a machine has no time zone of its own.</summary>
    public override TimeZoneInfo LocalTimeZone => TimeZoneInfo.Utc;

    /// <inheritdoc/>
    public override long GetTimestamp() => (long)Nanoseconds;

    /// <inheritdoc/>
    public override DateTimeOffset GetUtcNow() => StartTime + TimeSpan.FromTicks((long)(Nanoseconds / 100));

    /// <summary>Creates a timer that works with absolute times of this clock.</summary>
    /// <param name="callback">What to do at the deadline; runs on a vCPU thread.</param>
    public VmTimer CreateTimer(Action callback)
    {
        ArgumentNullException.ThrowIfNull(callback);
        return new VmTimer(this, Interlocked.Increment(ref _nextId), callback);
    }

    /// <inheritdoc/>
    public override ITimer CreateTimer(TimerCallback callback, object? state, TimeSpan dueTime, TimeSpan period)
    {
        ArgumentNullException.ThrowIfNull(callback);
        var timer = new PeriodicTimer(this, callback, state);
        timer.Change(dueTime, period);
        return timer;
    }

    /// <summary>
    /// Calls back every timer whose deadline has passed, in the order of deadlines, and arms the next. What the callbacks
    /// arm for now comes at the next call, so that each call ends and the vCPU can be paused in between.
    /// </summary>
    internal void RunDueTimers()
    {
        int due;
        lock (_lock)
        {
            if (_dispatching)
            {
                return;
            }
            _dispatching = true;
            var now = Nanoseconds;
            due = _armed.TakeWhile(timer => timer.Deadline <= now).Count();
        }
        try
        {
            while (due-- > 0 && TakeDue() is { } timer)
            {
                timer.Callback();
            }
        }
        finally
        {
            lock (_lock)
            {
                _dispatching = false;
                _hostDeadline = _armed.Min?.Deadline ?? Never;
                _arm(_hostDeadline); // in any case: the core's timer has fired
            }
        }
    }

    internal void Arm(VmTimer timer, ulong deadline)
    {
        lock (_lock)
        {
            _armed.Remove(timer);
            timer.Deadline = deadline;
            if (deadline != Never)
            {
                _armed.Add(timer);
            }
            if (!_dispatching)
            {
                ArmNext();
            }
        }
    }

    private VmTimer? TakeDue()
    {
        lock (_lock)
        {
            var first = _armed.Min;
            if (first is null || first.Deadline > Nanoseconds)
            {
                return null;
            }
            _armed.Remove(first);
            first.Deadline = Never;
            return first;
        }
    }

    // Under the lock, so that the core gets deadlines in the order in which they were decided.
    private void ArmNext()
    {
        var deadline = _armed.Min?.Deadline ?? Never;
        if (deadline != _hostDeadline)
        {
            _hostDeadline = deadline;
            _arm(deadline);
        }
    }

    private sealed class PeriodicTimer : ITimer
    {
        private readonly VmClock _clock;
        private readonly VmTimer _timer;
        private readonly Lock _lock = new();
        private ulong _deadline;
        private ulong _period;
        private bool _disposed;

        public PeriodicTimer(VmClock clock, TimerCallback callback, object? state)
        {
            _clock = clock;
            _timer = clock.CreateTimer(() =>
            {
                Repeat();
                callback(state);
            });
        }

        public bool Change(TimeSpan dueTime, TimeSpan period)
        {
            CheckRange(dueTime, nameof(dueTime));
            CheckRange(period, nameof(period));
            lock (_lock)
            {
                if (_disposed)
                {
                    return false;
                }
                _period = period <= TimeSpan.Zero ? 0 : (ulong)period.Ticks * 100;
                _deadline = dueTime == Timeout.InfiniteTimeSpan ? Never : _clock.Nanoseconds + (ulong)dueTime.Ticks * 100;
                _timer.Arm(_deadline);
                return true;
            }
        }

        public void Dispose()
        {
            lock (_lock)
            {
                _disposed = true;
                _timer.Disarm();
            }
        }

        public ValueTask DisposeAsync()
        {
            Dispose();
            return ValueTask.CompletedTask;
        }

        private void Repeat()
        {
            lock (_lock)
            {
                if (!_disposed && _period != 0)
                {
                    _deadline = Math.Max(_deadline + _period, _clock.Nanoseconds);
                    _timer.Arm(_deadline);
                }
            }
        }

        private static void CheckRange(TimeSpan value, string name)
        {
            if (value < TimeSpan.Zero && value != Timeout.InfiniteTimeSpan)
            {
                throw new ArgumentOutOfRangeException(name);
            }
            if (value > TimeSpan.FromDays(36_500))
            {
                throw new ArgumentOutOfRangeException(name);
            }
        }
    }
}

/// <summary>A one-shot timer on a machine's clock. All members are callable from any thread.</summary>
public sealed class VmTimer
{
    private readonly VmClock _clock;
    private readonly long _id;

    internal VmTimer(VmClock clock, long id, Action callback)
    {
        _clock = clock;
        _id = id;
        Callback = callback;
    }

    /// <summary>When the timer fires, in nanoseconds of the machine's clock; <see cref="VmClock.Never"/> if it is not armed.</summary>
    public ulong Deadline { get; internal set; } = VmClock.Never;

    internal Action Callback { get; }

    /// <summary>Sets the deadline; one in the past fires as soon as possible.</summary>
    /// <param name="deadline">Nanoseconds of the machine's clock, or <see cref="VmClock.Never"/>.</param>
    public void Arm(ulong deadline) => _clock.Arm(this, deadline);

    /// <summary>Takes the deadline away. A callback under way goes on.</summary>
    public void Disarm() => _clock.Arm(this, VmClock.Never);

    // Equal deadlines fire in the order of creation, so that runs on a virtual clock are identical.
    internal static int CompareDeadlines(VmTimer? x, VmTimer? y)
    {
        var order = x!.Deadline.CompareTo(y!.Deadline);
        return order != 0 ? order : x._id.CompareTo(y._id);
    }
}
