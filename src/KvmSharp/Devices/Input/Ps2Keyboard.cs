namespace KvmSharp.Devices;

/// <summary>
/// A PS/2 keyboard with 105 keys: scan code sets 1 and 2. What a program presses and types goes to the guest one event after
/// the other, at a pace that software written for people keeps up with. All members are callable from any thread.
/// Specification: IBM Personal System/2 Hardware Interface Technical Reference, "Keyboards (101- and 102-Key)".
/// </summary>
/// <remarks>
/// The keyboard does not repeat a key that is held; press it again for that. Events that the guest has not got yet are not part
/// of a saved state.
/// </remarks>
public sealed class Ps2Keyboard : Ps2Device
{
    private const int MaxPendingEvents = 1 << 16;
    private const byte SetLights = 0xed;
    private const byte Echo = 0xee;
    private const byte SelectScanCodes = 0xf0;
    private const byte ReadId = 0xf2;
    private const byte SetRate = 0xf3;
    private const byte Enable = 0xf4;
    private const byte DisableAndDefault = 0xf5;
    private const byte SetDefault = 0xf6;
    private const byte Reset = 0xff;
    private const byte DefaultScanCodes = 2;
    private const byte LightsMask = 7;

    // Wiring
    private readonly VmClock _clock;
    private readonly VmTimer _timer;
    private readonly Queue<(Key Key, bool IsDown)> _events = new();

    // State
    private bool _isScanning = true;
    private byte _scanCodes = DefaultScanCodes;
    private byte _lights;

    internal Ps2Keyboard(VmClock clock, Lock gate, Action dataReady)
        : base(gate, dataReady)
    {
        _clock = clock;
        _timer = clock.CreateTimer(OnTimer);
    }

    /// <summary>The time between two events, in the machine's time.</summary>
    public TimeSpan EventInterval { get; set; } = TimeSpan.FromMilliseconds(15);

    /// <summary>Whether the guest has switched the Caps Lock light on.</summary>
    public bool CapsLockLight => (_lights & 4) != 0;

    /// <summary>Whether the guest has switched the Num Lock light on.</summary>
    public bool NumLockLight => (_lights & 2) != 0;

    /// <summary>Whether the guest has switched the Scroll Lock light on.</summary>
    public bool ScrollLockLight => (_lights & 1) != 0;

    /// <summary>How many events the guest has not got yet.</summary>
    public int PendingEvents
    {
        get
        {
            lock (Gate)
            {
                return _events.Count;
            }
        }
    }

    /// <summary>Presses a key and keeps it down.</summary>
    /// <param name="key">The key.</param>
    /// <exception cref="InvalidOperationException">Too many events wait for the guest.</exception>
    public void Down(Key key) => Add((key, true));

    /// <summary>Lets go of a key.</summary>
    /// <param name="key">The key.</param>
    /// <exception cref="InvalidOperationException">Too many events wait for the guest.</exception>
    public void Up(Key key) => Add((key, false));

    /// <summary>Presses keys in this order and lets go of them in the opposite one: a key, or one with modifiers before it.</summary>
    /// <param name="keys">The keys.</param>
    /// <exception cref="InvalidOperationException">Too many events wait for the guest.</exception>
    public void Press(params ReadOnlySpan<Key> keys)
    {
        var events = new (Key, bool)[keys.Length * 2];
        for (var i = 0; i < keys.Length; i++)
        {
            events[i] = (keys[i], true);
            events[^(i + 1)] = (keys[i], false);
        }
        Add(events);
    }

    /// <summary>Types text as on a keyboard of the United States; a line feed is Enter.</summary>
    /// <param name="text">Printable ASCII, line feeds, tabs and backspaces.</param>
    /// <exception cref="ArgumentException">A character is not on that keyboard; nothing is typed then.</exception>
    /// <exception cref="InvalidOperationException">Too many events wait for the guest.</exception>
    public void Type(string text)
    {
        ArgumentNullException.ThrowIfNull(text);
        var events = new List<(Key, bool)>();
        foreach (var character in text)
        {
            var (key, isShifted) = UsLayout.Find(character)
                ?? throw new ArgumentException($"The character U+{(int)character:X4} is not on the keyboard.", nameof(text));
            if (isShifted)
            {
                events.Add((Key.LeftShift, true));
            }
            events.Add((key, true));
            events.Add((key, false));
            if (isShifted)
            {
                events.Add((Key.LeftShift, false));
            }
        }
        Add([.. events]);
    }

    internal override void Save(StateWriter writer)
    {
        base.Save(writer);
        writer.WriteBoolean(_isScanning);
        writer.WriteByte(_scanCodes);
        writer.WriteByte(_lights);
    }

    internal override void Load(StateReader reader)
    {
        base.Load(reader);
        _isScanning = reader.ReadBoolean();
        _scanCodes = reader.ReadByte() == 1 ? (byte)1 : DefaultScanCodes;
        _lights = (byte)(reader.ReadByte() & LightsMask);
    }

    private protected override void TakeCommand(byte command)
    {
        switch (command)
        {
            case Echo:
                Send(Echo);
                break;
            case SetLights or SelectScanCodes or SetRate:
                PendingCommand = command;
                Send(Acknowledge);
                break;
            case ReadId:
                Send(Acknowledge, 0xab, 0x83);
                break;
            case Enable:
                ClearQueue();
                _isScanning = true;
                Send(Acknowledge);
                break;
            case DisableAndDefault or SetDefault:
                SetDefaults();
                _isScanning = command == SetDefault;
                Send(Acknowledge);
                break;
            case Reset:
                SetDefaults();
                _isScanning = true;
                Send(Acknowledge, SelfTestPassed);
                break;
            default:
                Send(Resend);
                break;
        }
    }

    private protected override void TakeArgument(byte command, byte value)
    {
        // "If a command is received instead of the option byte, the keyboard ... processes the new command."
        if (value >= SetLights)
        {
            TakeCommand(value);
            return;
        }
        switch (command)
        {
            case SetLights:
                _lights = (byte)(value & LightsMask);
                Send(Acknowledge);
                break;
            case SelectScanCodes when value == 0:
                Send(Acknowledge, _scanCodes);
                break;
            case SelectScanCodes when value is 1 or 2:
                _scanCodes = value;
                ClearQueue();
                Send(Acknowledge);
                break;
            case SelectScanCodes:
                Send(Resend); // set 3 is for terminals
                break;
            default:
                Send(Acknowledge); // a rate: nothing repeats here
                break;
        }
    }

    private void SetDefaults()
    {
        ClearQueue();
        _scanCodes = DefaultScanCodes;
        _lights = 0;
    }

    private void Add(params ReadOnlySpan<(Key Key, bool IsDown)> events)
    {
        foreach (var (key, isDown) in events)
        {
            ScanCodes.Sequence(key, isDown); // refuses what is not a key before anything is pressed
        }
        lock (Gate)
        {
            if (_events.Count + events.Length > MaxPendingEvents)
            {
                throw new InvalidOperationException("Too many key events wait for the guest.");
            }
            foreach (var item in events)
            {
                _events.Enqueue(item);
            }
            if (_timer.Deadline == VmClock.Never && _events.Count != 0)
            {
                _timer.Arm(_clock.Nanoseconds);
            }
        }
    }

    private void OnTimer()
    {
        lock (Gate)
        {
            if (_events.TryPeek(out var next))
            {
                var bytes = ScanCodes.Sequence(next.Key, next.IsDown);
                if (!_isScanning)
                {
                    _events.Dequeue(); // "Default Disable": keys are lost
                }
                else if (bytes.Length <= QueueRoom)
                {
                    _events.Dequeue();
                    Send(_scanCodes == 1 ? ToSet1(bytes) : bytes);
                    NotifyController();
                }
            }
            if (_events.Count != 0)
            {
                _timer.Arm(_clock.Nanoseconds + (ulong)Math.Max(EventInterval.Ticks, 1) * 100);
            }
        }
    }

    private static byte[] ToSet1(byte[] bytes)
    {
        var result = new List<byte>();
        byte release = 0;
        foreach (var value in bytes)
        {
            if (value == ScanCodes.Break)
            {
                release = ScanCodes.Set1Break;
                continue;
            }
            result.Add((byte)(ScanCodes.Translate(value) | release));
            release = 0;
        }
        return [.. result];
    }
}
