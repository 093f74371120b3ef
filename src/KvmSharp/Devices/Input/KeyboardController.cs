namespace KvmSharp.Devices;

/// <summary>
/// The controller of keyboard and mouse, an 8042 at ports 0x60 and 0x64, with interrupts 1 and 12. It also drives address line
/// A20 and the reset line. Specification: IBM Personal System/2 Hardware Interface Technical Reference, "Keyboard and Auxiliary
/// Device Controller".
/// </summary>
public sealed partial class KeyboardController : IIoDevice, IDeviceState
{
    /// <summary>The first port of the mapping; those between 0x60 and 0x64 are not the controller's.</summary>
    public const ulong BasePort = 0x60;

    /// <summary>How many ports the mapping takes.</summary>
    public const int PortCount = 5;

    // Wiring
    private readonly Lock _lock = new();
    private readonly InterruptLine _keyboardInterrupt;
    private readonly InterruptLine _mouseInterrupt;
    private readonly IMachineControl _machine;
    private readonly A20Gate.Source? _a20;

    // State
    private readonly byte[] _memory = new byte[MemorySize];
    private readonly Queue<(byte Value, bool IsAuxiliary)> _replies = new(); // of the controller itself; they come first
    private Status _status = Status.NotInhibited;
    private byte _output;
    private byte _pending; // the command that waits for its byte
    private bool _a20Enabled = true;
    private bool _breakPrefix; // the translator has seen 0xF0

    /// <summary>Creates the controller with a keyboard and a mouse.</summary>
    /// <param name="clock">The machine's clock, for the pace of typing.</param>
    /// <param name="keyboardInterrupt">The keyboard's interrupt line, IRQ 1 on a PC.</param>
    /// <param name="mouseInterrupt">The mouse's interrupt line, IRQ 12 on a PC.</param>
    /// <param name="machine">What the reset line resets.</param>
    /// <param name="a20">The gate that the output port drives.</param>
    public KeyboardController(
        VmClock clock, InterruptLine keyboardInterrupt, InterruptLine mouseInterrupt, IMachineControl machine, A20Gate? a20 = null)
    {
        ArgumentNullException.ThrowIfNull(clock);
        ArgumentNullException.ThrowIfNull(keyboardInterrupt);
        ArgumentNullException.ThrowIfNull(mouseInterrupt);
        ArgumentNullException.ThrowIfNull(machine);
        _keyboardInterrupt = keyboardInterrupt;
        _mouseInterrupt = mouseInterrupt;
        _machine = machine;
        _a20 = a20?.AddSource(enabled: true);
        Keyboard = new Ps2Keyboard(clock, _lock, Advance);
        Mouse = new Ps2Mouse(_lock, Advance);
    }

    /// <summary>The keyboard.</summary>
    public Ps2Keyboard Keyboard { get; }

    /// <summary>The mouse.</summary>
    public Ps2Mouse Mouse { get; }

    /// <inheritdoc/>
    public int MaxAccessSize => 1;

    /// <inheritdoc/>
    public string StateName => "keyboard-controller";

    private CommandByte Command
    {
        get => (CommandByte)_memory[0];
        set => _memory[0] = (byte)(value & CommandByte.All);
    }

    /// <inheritdoc/>
    public void Read(ulong offset, Span<byte> data)
    {
        lock (_lock)
        {
            switch (offset)
            {
                case DataOffset:
                    data[0] = _output;
                    _status &= ~(Status.OutputFull | Status.AuxiliaryData);
                    UpdateInterrupts(); // each byte is an edge of its own
                    Advance();
                    break;
                case CommandOffset:
                    data[0] = (byte)(_status | ((Command & CommandByte.SystemFlag) != 0 ? Status.SystemFlag : 0));
                    break;
                default:
                    break;
            }
        }
    }

    /// <inheritdoc/>
    public void Write(ulong offset, ReadOnlySpan<byte> data)
    {
        lock (_lock)
        {
            switch (offset)
            {
                case DataOffset:
                    _status &= ~Status.WasCommand;
                    TakeData(data[0]);
                    break;
                case CommandOffset:
                    _status |= Status.WasCommand;
                    _pending = 0;
                    TakeCommand(data[0]);
                    break;
                default:
                    return;
            }
            Advance();
        }
    }

    /// <inheritdoc/>
    public void SaveState(StateWriter writer)
    {
        ArgumentNullException.ThrowIfNull(writer);
        lock (_lock)
        {
            writer.WriteBytes(_memory);
            writer.WriteByte((byte)_status);
            writer.WriteByte(_output);
            writer.WriteByte(_pending);
            writer.WriteBoolean(_a20Enabled);
            writer.WriteBoolean(_breakPrefix);
            writer.WriteByte((byte)_replies.Count);
            foreach (var (value, isAuxiliary) in _replies)
            {
                writer.WriteByte(value);
                writer.WriteBoolean(isAuxiliary);
            }
            Keyboard.Save(writer);
            Mouse.Save(writer);
        }
    }

    /// <inheritdoc/>
    public void LoadState(StateReader reader)
    {
        ArgumentNullException.ThrowIfNull(reader);
        lock (_lock)
        {
            reader.ReadBytes(MemorySize).CopyTo(_memory);
            Command = (CommandByte)_memory[0];
            _status = (Status)reader.ReadByte() & (Status.OutputFull | Status.WasCommand | Status.AuxiliaryData) | Status.NotInhibited;
            _output = reader.ReadByte();
            _pending = reader.ReadByte();
            SetA20(reader.ReadBoolean());
            _breakPrefix = reader.ReadBoolean();
            _replies.Clear();
            for (var count = reader.ReadByte(); count > 0; count--)
            {
                _replies.Enqueue((reader.ReadByte(), reader.ReadBoolean()));
            }
            Keyboard.Load(reader);
            Mouse.Load(reader);
            UpdateInterrupts();
        }
    }

    private void TakeCommand(byte command)
    {
        switch (command)
        {
            case >= ReadMemory and < ReadMemory + MemorySize:
                Reply(_memory[command - ReadMemory]);
                break;
            case >= WriteMemory and < WriteMemory + MemorySize or WriteOutputPort or WriteKeyboardOutput or WriteAuxiliaryOutput or WriteAuxiliary:
                _pending = command;
                break;
            case DisableAuxiliary:
                Command |= CommandByte.AuxiliaryDisabled;
                break;
            case EnableAuxiliary:
                Command &= ~CommandByte.AuxiliaryDisabled;
                break;
            case TestAuxiliary or TestKeyboard:
                Reply(TestPassed);
                break;
            case SelfTest:
                Command |= CommandByte.SystemFlag;
                Reply(SelfTestPassed);
                break;
            case DisableKeyboard:
                Command |= CommandByte.KeyboardDisabled;
                break;
            case EnableKeyboard:
                Command &= ~CommandByte.KeyboardDisabled;
                break;
            case ReadInputPort:
                Reply(InputPort);
                break;
            case ReadOutputPort:
                Reply((byte)Output);
                break;
            case DisableA20 or EnableA20:
                SetA20(command == EnableA20);
                break;
            case >= PulseOutput:
                if ((command & (byte)OutputPort.NotReset) == 0)
                {
                    _machine.RequestReset("The guest pulsed the keyboard controller's reset line.");
                }
                break;
            default:
                break; // a controller ignores what it does not know
        }
    }

    private OutputPort Output
    {
        get
        {
            var port = OutputPort.NotReset | OutputPort.Rest | (_a20Enabled ? OutputPort.A20 : 0);
            return (_status & (Status.OutputFull | Status.AuxiliaryData)) switch
            {
                Status.OutputFull => port | OutputPort.KeyboardFull,
                Status.OutputFull | Status.AuxiliaryData => port | OutputPort.AuxiliaryFull,
                _ => port,
            };
        }
    }

    private void TakeData(byte value)
    {
        var command = _pending;
        _pending = 0;
        switch (command)
        {
            case 0:
                Command &= ~CommandByte.KeyboardDisabled; // "Writing to the data port enables the keyboard"
                Keyboard.Receive(value);
                break;
            case WriteMemory:
                Command = (CommandByte)value;
                UpdateInterrupts();
                break;
            case > WriteMemory and < WriteMemory + MemorySize:
                _memory[command - WriteMemory] = value;
                break;
            case WriteOutputPort:
                SetA20((value & (byte)OutputPort.A20) != 0);
                if ((value & (byte)OutputPort.NotReset) == 0)
                {
                    _machine.RequestReset("The guest pulled the keyboard controller's reset line.");
                }
                break;
            case WriteKeyboardOutput:
                Reply(value);
                break;
            case WriteAuxiliaryOutput:
                Reply(value, isAuxiliary: true);
                break;
            case WriteAuxiliary:
                Command &= ~CommandByte.AuxiliaryDisabled;
                Mouse.Receive(value);
                break;
            default:
                break; // a damaged saved state
        }
    }

    private void Reply(byte value, bool isAuxiliary = false)
    {
        // A guest that asks and never reads gets the last answers only.
        if (_replies.Count == Ps2Device.QueueLength)
        {
            _replies.Dequeue();
        }
        _replies.Enqueue((value, isAuxiliary));
    }

    private void SetA20(bool enabled)
    {
        _a20Enabled = enabled;
        _a20?.Set(enabled);
    }

    // Fills the output buffer when it is empty. Under the lock.
    private void Advance()
    {
        if ((_status & Status.OutputFull) != 0)
        {
            return;
        }
        if (_replies.TryDequeue(out var reply))
        {
            Put(reply.Value, reply.IsAuxiliary);
        }
        else if ((Command & CommandByte.KeyboardDisabled) == 0 && TryTakeKeyboard(out var code))
        {
            Put(code, isAuxiliary: false);
        }
        else if ((Command & CommandByte.AuxiliaryDisabled) == 0 && Mouse.TrySend(out var movement))
        {
            Put(movement, isAuxiliary: true);
        }
    }

    private bool TryTakeKeyboard(out byte value)
    {
        while (Keyboard.TrySend(out value))
        {
            if ((Command & CommandByte.Translate) == 0)
            {
                return true;
            }
            if (value == ScanCodes.Break)
            {
                _breakPrefix = true;
                continue;
            }
            var translated = ScanCodes.Translate(value);
            value = _breakPrefix ? (byte)(translated | ScanCodes.Set1Break) : translated;
            _breakPrefix = false;
            return true;
        }
        return false;
    }

    private void Put(byte value, bool isAuxiliary)
    {
        _output = value;
        _status |= Status.OutputFull | (isAuxiliary ? Status.AuxiliaryData : 0);
        UpdateInterrupts();
    }

    private void UpdateInterrupts()
    {
        var full = (_status & Status.OutputFull) != 0;
        var auxiliary = (_status & Status.AuxiliaryData) != 0;
        _keyboardInterrupt.Set(full && !auxiliary && (Command & CommandByte.KeyboardInterrupt) != 0);
        _mouseInterrupt.Set(full && auxiliary && (Command & CommandByte.AuxiliaryInterrupt) != 0);
    }
}
