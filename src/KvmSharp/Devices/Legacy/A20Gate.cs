namespace KvmSharp.Devices;

/// <summary>
/// Address line A20 of the processors and what drives it. While the line is disabled, bit 20 of every physical address of a
/// processor is zero, so that the second mebibyte is the first one, as on the 8086. The line is enabled while one of its
/// sources enables it, and while there is none. Callable from any thread.
/// </summary>
/// <remarks>Specification: Intel 82801 (ICH) datasheet, "A20M# (Mask A20)".</remarks>
public sealed class A20Gate
{
    private readonly Action<bool> _drive;
    private readonly Lock _lock = new();
    private readonly List<Source> _sources = [];

    /// <summary>Creates a gate; the line starts enabled.</summary>
    /// <param name="drive">Drives the line; called with its new state when that changes.</param>
    public A20Gate(Action<bool> drive)
    {
        ArgumentNullException.ThrowIfNull(drive);
        _drive = drive;
    }

    /// <summary>Whether the line is enabled.</summary>
    public bool IsEnabled { get; private set; } = true;

    /// <summary>Adds something that drives the line: port 0x92, the output port of a keyboard controller.</summary>
    /// <param name="enabled">Whether it enables the line at first.</param>
    public Source AddSource(bool enabled)
    {
        lock (_lock)
        {
            var source = new Source(this, enabled);
            _sources.Add(source);
            Update();
            return source;
        }
    }

    private void Update()
    {
        var enabled = _sources.Count == 0 || _sources.Exists(s => s.IsEnabled);
        if (enabled != IsEnabled)
        {
            IsEnabled = enabled;
            _drive(enabled);
        }
    }

    /// <summary>One of the things that drive the line.</summary>
    public sealed class Source
    {
        private readonly A20Gate _gate;

        internal Source(A20Gate gate, bool enabled)
        {
            _gate = gate;
            IsEnabled = enabled;
        }

        /// <summary>Whether this source enables the line.</summary>
        public bool IsEnabled { get; private set; }

        /// <summary>Enables the line, or leaves it to the other sources. Callable from any thread.</summary>
        /// <param name="enabled">Whether this source enables the line.</param>
        public void Set(bool enabled)
        {
            lock (_gate._lock)
            {
                IsEnabled = enabled;
                _gate.Update();
            }
        }
    }
}
