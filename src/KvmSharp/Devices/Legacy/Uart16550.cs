namespace KvmSharp.Devices;

/// <summary>
/// A 16550A serial port. Output leaves at once; input arrives no faster than the line's rate, so that guests that empty
/// the receiver in an interrupt handler come to an end. Specification: National Semiconductor PC16550D.
/// </summary>
public sealed partial class Uart16550 : IIoDevice, IDeviceState
{
    /// <summary>How many ports the device takes.</summary>
    public const int PortCount = 8;

    // Configuration: none; a 16550A has no variants here.

    // Wiring
    private readonly Lock _lock = new();
    private readonly VmClock _clock;
    private readonly InterruptLine _interrupt;
    private readonly ICharacterBackend? _backend;
    private readonly VmTimer _arrivalTimer;
    private readonly VmTimer _timeoutTimer;
    private bool _inputWaiting = true; // the backend may have something

    // State
    private readonly ushort[] _fifo = new ushort[FifoSize]; // character, and its errors in the high byte
    private int _fifoStart;
    private int _fifoCount;
    private InterruptEnable _interruptEnable;
    private FifoControl _fifoControl;
    private LineControl _lineControl;
    private ModemControl _modemControl;
    private LineStatus _lineErrors;
    private ModemStatus _modemStatus = ModemStatus.ClearToSend | ModemStatus.DataSetReady | ModemStatus.CarrierDetect;
    private byte _scratch;
    private ushort _divisor = 12; // 9600 baud
    private bool _transmitterEmptyPending;
    private bool _timeoutPending;
    private ulong _lineFreeAt; // when the next character can have arrived

    /// <summary>Creates a serial port.</summary>
    /// <param name="clock">The machine's clock.</param>
    /// <param name="interrupt">The interrupt line.</param>
    /// <param name="backend">The host's side; <see langword="null"/> for an open connector.</param>
    public Uart16550(VmClock clock, InterruptLine interrupt, ICharacterBackend? backend)
    {
        ArgumentNullException.ThrowIfNull(clock);
        ArgumentNullException.ThrowIfNull(interrupt);
        _clock = clock;
        _interrupt = interrupt;
        _backend = backend;
        _arrivalTimer = clock.CreateTimer(OnArrival);
        _timeoutTimer = clock.CreateTimer(OnCharacterTimeout);
        if (backend is not null)
        {
            backend.InputAvailable += OnInputAvailable;
        }
    }

    /// <inheritdoc/>
    public int MaxAccessSize => 1;

    /// <inheritdoc/>
    public string StateName => "uart16550";

    private bool FifoEnabled => (_fifoControl & FifoControl.Enable) != 0;

    private bool DivisorAccess => (_lineControl & LineControl.DivisorLatchAccess) != 0;

    private bool Loopback => (_modemControl & ModemControl.Loopback) != 0;

    // "FIFO Control Register", bits 6 and 7.
    private int TriggerLevel => ((int)(_fifoControl & FifoControl.TriggerMask) >> 6) switch
    {
        0 => 1,
        1 => 4,
        2 => 8,
        _ => 14,
    };

    private ulong CharacterNanoseconds
    {
        get
        {
            var bits = 1 + 5 + (ulong)(_lineControl & LineControl.WordLengthMask) + 1;
            bits += (_lineControl & LineControl.ParityEnable) != 0 ? 1UL : 0;
            bits += (_lineControl & LineControl.TwoStopBits) != 0 ? 1UL : 0;
            return bits * Math.Max((ulong)_divisor, 1) * 16 * 1_000_000_000 / CrystalFrequency;
        }
    }

    /// <summary>Lets go of the backend: input goes to the guest no more.</summary>
    public void Disconnect()
    {
        if (_backend is not null)
        {
            _backend.InputAvailable -= OnInputAvailable;
        }
        _arrivalTimer.Disarm();
        _timeoutTimer.Disarm();
    }

    /// <summary>Sends a break to the guest. Callable from any thread.</summary>
    public void SendBreak()
    {
        lock (_lock)
        {
            if (!Loopback)
            {
                Receive(0, LineStatus.BreakInterrupt);
                UpdateInterrupt();
            }
        }
    }

    /// <inheritdoc/>
    public void Read(ulong offset, Span<byte> data)
    {
        lock (_lock)
        {
            data[0] = ReadRegister((Register)offset);
            UpdateInterrupt();
        }
    }

    /// <inheritdoc/>
    public void Write(ulong offset, ReadOnlySpan<byte> data)
    {
        lock (_lock)
        {
            WriteRegister((Register)offset, data[0]);
            UpdateInterrupt();
        }
    }

    /// <inheritdoc/>
    public void SaveState(StateWriter writer)
    {
        ArgumentNullException.ThrowIfNull(writer);
        lock (_lock)
        {
            writer.WriteByte((byte)_fifoCount);
            for (var i = 0; i < _fifoCount; i++)
            {
                writer.WriteUInt16(_fifo[(_fifoStart + i) % FifoSize]);
            }
            writer.WriteByte((byte)_interruptEnable);
            writer.WriteByte((byte)_fifoControl);
            writer.WriteByte((byte)_lineControl);
            writer.WriteByte((byte)_modemControl);
            writer.WriteByte((byte)_lineErrors);
            writer.WriteByte((byte)_modemStatus);
            writer.WriteByte(_scratch);
            writer.WriteUInt16(_divisor);
            writer.WriteBoolean(_transmitterEmptyPending);
            writer.WriteBoolean(_timeoutPending);
            writer.WriteUInt64(_lineFreeAt);
            writer.WriteUInt64(_arrivalTimer.Deadline);
            writer.WriteUInt64(_timeoutTimer.Deadline);
        }
    }

    /// <inheritdoc/>
    public void LoadState(StateReader reader)
    {
        ArgumentNullException.ThrowIfNull(reader);
        lock (_lock)
        {
            _fifoStart = 0;
            _fifoCount = reader.ReadByte();
            if (_fifoCount > FifoSize)
            {
                throw new MachineStateException("The saved state is damaged: a serial port holds more characters than it can.");
            }
            for (var i = 0; i < _fifoCount; i++)
            {
                _fifo[i] = (ushort)(reader.ReadUInt16() & (0xff | ((int)LineStatus.CharacterErrors << 8)));
            }
            _interruptEnable = (InterruptEnable)reader.ReadByte() & InterruptEnable.All;
            _fifoControl = (FifoControl)reader.ReadByte() & (FifoControl.Enable | FifoControl.TriggerMask);
            _lineControl = (LineControl)reader.ReadByte();
            _modemControl = (ModemControl)reader.ReadByte() & ModemControl.All;
            _lineErrors = (LineStatus)reader.ReadByte() & LineStatus.Errors;
            _modemStatus = (ModemStatus)reader.ReadByte();
            _scratch = reader.ReadByte();
            _divisor = reader.ReadUInt16();
            _transmitterEmptyPending = reader.ReadBoolean();
            _timeoutPending = reader.ReadBoolean();
            _lineFreeAt = reader.ReadUInt64();
            _arrivalTimer.Arm(reader.ReadUInt64());
            _timeoutTimer.Arm(reader.ReadUInt64());
            _inputWaiting = true;
            UpdateInterrupt();
        }
    }

    private byte ReadRegister(Register register)
    {
        switch (register)
        {
            case Register.ReceiverBufferOrTransmitterHolding:
                return DivisorAccess ? (byte)_divisor : TakeCharacter();
            case Register.InterruptEnable:
                return DivisorAccess ? (byte)(_divisor >> 8) : (byte)_interruptEnable;
            case Register.InterruptIdentOrFifoControl:
                var cause = FindCause();
                if (cause == InterruptCause.TransmitterEmpty)
                {
                    _transmitterEmptyPending = false; // "... cleared by reading the IIR (if source of interrupt)"
                }
                return (byte)((byte)cause | (FifoEnabled ? 0xc0 : 0));
            case Register.LineControl:
                return (byte)_lineControl;
            case Register.ModemControl:
                return (byte)_modemControl;
            case Register.LineStatus:
                var status = GetLineStatus();
                _lineErrors = LineStatus.None;
                return (byte)status;
            case Register.ModemStatus:
                var modem = _modemStatus;
                _modemStatus &= ~ModemStatus.Deltas;
                return (byte)modem;
            default:
                return _scratch;
        }
    }

    private void WriteRegister(Register register, byte value)
    {
        switch (register)
        {
            case Register.ReceiverBufferOrTransmitterHolding:
                if (DivisorAccess)
                {
                    _divisor = (ushort)((_divisor & 0xff00) | value);
                }
                else
                {
                    Transmit(value);
                }
                break;
            case Register.InterruptEnable:
                if (DivisorAccess)
                {
                    _divisor = (ushort)((_divisor & 0x00ff) | (value << 8));
                }
                else
                {
                    SetInterruptEnable((InterruptEnable)value & InterruptEnable.All);
                }
                break;
            case Register.InterruptIdentOrFifoControl:
                SetFifoControl((FifoControl)value);
                break;
            case Register.LineControl:
                _lineControl = (LineControl)value;
                break;
            case Register.ModemControl:
                _modemControl = (ModemControl)value & ModemControl.All;
                UpdateModemStatus();
                PullInput();
                break;
            case Register.LineStatus:
            case Register.ModemStatus:
                break; // "intended for read operations only"; writing is for factory tests
            default:
                _scratch = value;
                break;
        }
    }

    private void Transmit(byte value)
    {
        // The character is under way: THRE falls, and with it the interrupt, before it rises again.
        _transmitterEmptyPending = false;
        UpdateInterrupt();
        if (Loopback)
        {
            Receive(value, LineStatus.None);
        }
        else
        {
            _backend?.Write([value]);
        }
        _transmitterEmptyPending = true;
    }

    // Enabling the interrupt while the transmitter is empty causes one at once; drivers test for it.
    private void SetInterruptEnable(InterruptEnable value)
    {
        if ((value & ~_interruptEnable & InterruptEnable.TransmitterEmpty) != 0)
        {
            _transmitterEmptyPending = true;
        }
        _interruptEnable = value;
    }

    private void SetFifoControl(FifoControl value)
    {
        var toggled = ((value ^ _fifoControl) & FifoControl.Enable) != 0;
        if (toggled || (value & FifoControl.ResetReceiver) != 0)
        {
            _fifoCount = 0;
            _timeoutPending = false;
            _timeoutTimer.Disarm();
        }
        if (toggled || (value & FifoControl.ResetTransmitter) != 0)
        {
            _transmitterEmptyPending = true;
        }
        _fifoControl = (value & FifoControl.Enable) != 0 ? value & (FifoControl.Enable | FifoControl.TriggerMask) : FifoControl.None;
        PullInput();
    }

    // "Modem Control Register", bit 4: the four outputs are internally connected to the four inputs.
    private void UpdateModemStatus()
    {
        var inputs = ModemStatus.ClearToSend | ModemStatus.DataSetReady | ModemStatus.CarrierDetect;
        if (Loopback)
        {
            inputs = ((_modemControl & ModemControl.RequestToSend) != 0 ? ModemStatus.ClearToSend : 0)
                | ((_modemControl & ModemControl.DataTerminalReady) != 0 ? ModemStatus.DataSetReady : 0)
                | ((_modemControl & ModemControl.Out1) != 0 ? ModemStatus.Ring : 0)
                | ((_modemControl & ModemControl.Out2) != 0 ? ModemStatus.CarrierDetect : 0);
        }
        var before = _modemStatus & ~ModemStatus.Deltas;
        var changed = before ^ inputs;
        var deltas = (ModemStatus)((byte)(changed & ~ModemStatus.Ring) >> 4);
        if ((before & changed & ModemStatus.Ring) != 0)
        {
            deltas |= ModemStatus.TrailingEdgeRing;
        }
        _modemStatus = inputs | (_modemStatus & ModemStatus.Deltas) | deltas;
    }

    private byte TakeCharacter()
    {
        if (_fifoCount == 0)
        {
            return 0;
        }
        var character = (byte)_fifo[_fifoStart];
        _fifoStart = (_fifoStart + 1) % FifoSize;
        _fifoCount--;
        if (_fifoCount > 0)
        {
            ShowErrorsOfFirst();
        }
        PullInput();
        RestartTimeout();
        return character;
    }

    private void Receive(byte character, LineStatus errors)
    {
        var capacity = FifoEnabled ? FifoSize : 1;
        var entry = (ushort)(character | ((int)errors << 8));
        if (_fifoCount == capacity)
        {
            // "Overrun Error": the FIFO keeps what it holds, the single buffer is overwritten.
            _lineErrors |= LineStatus.OverrunError;
            if (!FifoEnabled)
            {
                _fifo[_fifoStart] = entry;
                ShowErrorsOfFirst();
            }
            return;
        }
        _fifo[(_fifoStart + _fifoCount) % FifoSize] = entry;
        _fifoCount++;
        if (_fifoCount == 1)
        {
            ShowErrorsOfFirst();
        }
        RestartTimeout();
    }

    // "... revealed to the CPU when its associated character is at the top of the FIFO."
    private void ShowErrorsOfFirst() => _lineErrors |= (LineStatus)(_fifo[_fifoStart] >> 8) & LineStatus.CharacterErrors;

    // "FIFO Interrupt Mode Operation": four character times without a character received or read.
    private void RestartTimeout()
    {
        _timeoutPending = false;
        _timeoutTimer.Arm(FifoEnabled && _fifoCount > 0 ? _clock.Nanoseconds + 4 * CharacterNanoseconds : VmClock.Never);
    }

    // Takes what the backend has and what fits, as a burst for which the line is busy afterwards.
    private void PullInput()
    {
        if (_backend is null || !_inputWaiting || Loopback)
        {
            return;
        }
        var room = FifoEnabled ? FifoSize - _fifoCount : 1 - _fifoCount;
        if (room <= 0)
        {
            return; // when the guest reads there will be room
        }
        var now = _clock.Nanoseconds;
        if (now < _lineFreeAt)
        {
            if (_arrivalTimer.Deadline != _lineFreeAt)
            {
                _arrivalTimer.Arm(_lineFreeAt);
            }
            return;
        }
        Span<byte> buffer = stackalloc byte[FifoSize];
        _inputWaiting = false; // before the read, so that no notice is lost
        var count = _backend.Read(buffer[..room]);
        if (count <= 0)
        {
            return;
        }
        _inputWaiting = true;
        foreach (var character in buffer[..count])
        {
            Receive(character, LineStatus.None);
        }
        _lineFreeAt = now + (ulong)count * CharacterNanoseconds;
        if (count < room)
        {
            _arrivalTimer.Arm(_lineFreeAt);
        }
    }

    private void OnInputAvailable()
    {
        lock (_lock)
        {
            _inputWaiting = true;
            PullInput();
            UpdateInterrupt();
        }
    }

    private void OnArrival()
    {
        lock (_lock)
        {
            PullInput();
            UpdateInterrupt();
        }
    }

    private void OnCharacterTimeout()
    {
        lock (_lock)
        {
            _timeoutPending = FifoEnabled && _fifoCount > 0;
            UpdateInterrupt();
        }
    }

    private LineStatus GetLineStatus()
    {
        // The transmitter is always empty: characters leave at once.
        var status = _lineErrors | LineStatus.TransmitterHoldingEmpty | LineStatus.TransmitterEmpty;
        if (_fifoCount > 0)
        {
            status |= LineStatus.DataReady;
        }
        for (var i = 0; FifoEnabled && i < _fifoCount; i++)
        {
            if ((_fifo[(_fifoStart + i) % FifoSize] >> 8) != 0)
            {
                status |= LineStatus.ErrorInFifo;
            }
        }
        return status;
    }

    private InterruptCause FindCause()
    {
        if ((_interruptEnable & InterruptEnable.LineStatus) != 0 && (_lineErrors & LineStatus.Errors) != 0)
        {
            return InterruptCause.LineStatus;
        }
        if ((_interruptEnable & InterruptEnable.ReceivedData) != 0)
        {
            if (_fifoCount >= (FifoEnabled ? TriggerLevel : 1))
            {
                return InterruptCause.ReceivedData;
            }
            if (_timeoutPending)
            {
                return InterruptCause.CharacterTimeout;
            }
        }
        if ((_interruptEnable & InterruptEnable.TransmitterEmpty) != 0 && _transmitterEmptyPending)
        {
            return InterruptCause.TransmitterEmpty;
        }
        return (_interruptEnable & InterruptEnable.ModemStatus) != 0 && (_modemStatus & ModemStatus.Deltas) != 0
            ? InterruptCause.ModemStatus
            : InterruptCause.None;
    }

    // On a PC, OUT2 enables the interrupt; in loopback mode the pin is inactive ("the modem control outputs are forced to
    // their inactive state").
    private void UpdateInterrupt()
    {
        var enabled = (_modemControl & (ModemControl.Out2 | ModemControl.Loopback)) == ModemControl.Out2;
        _interrupt.Set(enabled && FindCause() != InterruptCause.None);
    }
}
