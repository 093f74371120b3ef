namespace KvmSharp;

/// <summary>
/// One source on an interrupt line. Several sources may share a line, which is high while any of them is.
/// All members are callable from any thread.
/// </summary>
public sealed class InterruptLine
{
    private readonly Gsi? _gsi;

    internal InterruptLine(Gsi? gsi)
    {
        _gsi = gsi;
    }

    /// <summary>A line that leads nowhere, for a device without interrupt.</summary>
    public static InterruptLine NotConnected() => new(null);

    /// <summary>Whether this source holds the line high.</summary>
    public bool IsHigh { get; private set; }

    /// <summary>Drives the line high.</summary>
    public void Raise() => Set(true);

    /// <summary>Lets go of the line.</summary>
    public void Lower() => Set(false);

    /// <summary>Drives the line high and lets go of it: one edge.</summary>
    public void Pulse()
    {
        Set(true);
        Set(false);
    }

    /// <summary>Drives the line.</summary>
    /// <param name="high">The level.</param>
    public void Set(bool high)
    {
        if (_gsi is null)
        {
            IsHigh = high;
            return;
        }
        lock (_gsi.Lock)
        {
            if (IsHigh != high)
            {
                IsHigh = high;
                _gsi.Change(high);
            }
        }
    }

    /// <summary>The sources of one line and how it reaches the core.</summary>
    internal sealed class Gsi(Action<bool> drive)
    {
        private int _high;
        private bool _suspended;

        public Lock Lock { get; } = new();

        public void Change(bool high)
        {
            _high += high ? 1 : -1;
            if (!_suspended && _high == (high ? 1 : 0))
            {
                drive(high);
            }
        }

        // While a saved state is loaded, devices set their levels but the interrupt controllers, which hold what they
        // had seen, must not see edges.
        public void Suspend()
        {
            lock (Lock)
            {
                if (_high > 0)
                {
                    drive(false);
                }
                _suspended = true;
            }
        }

        public void Resume()
        {
            lock (Lock)
            {
                _suspended = false;
                if (_high > 0)
                {
                    drive(true);
                }
            }
        }
    }
}
