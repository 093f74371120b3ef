namespace KvmSharp.Devices;

/// <summary>
/// A PS/2 mouse with three buttons, and a wheel for guests that ask for it. All members are callable from any thread.
/// Specification: IBM Personal System/2 Hardware Interface Technical Reference, "Mouse"; the wheel as in Microsoft's IntelliMouse.
/// </summary>
public sealed class Ps2Mouse : Ps2Device
{
    private const byte SetScaling1To1 = 0xe6;
    private const byte SetScaling2To1 = 0xe7;
    private const byte SetResolution = 0xe8;
    private const byte StatusRequest = 0xe9;
    private const byte SetStreamMode = 0xea;
    private const byte ReadData = 0xeb;
    private const byte ResetWrapMode = 0xec;
    private const byte SetWrapMode = 0xee;
    private const byte SetRemoteMode = 0xf0;
    private const byte ReadId = 0xf2;
    private const byte SetSampleRate = 0xf3;
    private const byte Enable = 0xf4;
    private const byte Disable = 0xf5;
    private const byte SetDefault = 0xf6;
    private const byte Reset = 0xff;

    private const byte StandardId = 0;
    private const byte WheelId = 3;
    private const byte DefaultRate = 100;
    private const byte DefaultResolution = 2;
    private const int MaxStep = 255;

    private const byte AlwaysOne = 1 << 3;
    private const byte NegativeX = 1 << 4;
    private const byte NegativeY = 1 << 5;

    private const byte StatusScaled = 1 << 4;
    private const byte StatusEnabled = 1 << 5;
    private const byte StatusRemote = 1 << 6;

    // State
    private MouseButtons _buttons;
    private MouseButtons _reportedButtons;
    private int _x;
    private int _y;
    private int _wheel;
    private bool _isEnabled;
    private bool _isRemote;
    private bool _isWrapping;
    private bool _isScaled;
    private byte _resolution = DefaultResolution;
    private byte _rate = DefaultRate;
    private byte _id = StandardId;
    private uint _lastRates; // the last three rates, which ask for the wheel: 200, 100, 80

    internal Ps2Mouse(Lock gate, Action dataReady)
        : base(gate, dataReady)
    {
    }

    /// <summary>The buttons that are down.</summary>
    public MouseButtons Buttons
    {
        get
        {
            lock (Gate)
            {
                return _buttons;
            }
        }
    }

    /// <summary>Moves the mouse.</summary>
    /// <param name="x">Counts to the right.</param>
    /// <param name="y">Counts downwards.</param>
    public void Move(int x, int y)
    {
        lock (Gate)
        {
            const int Limit = 1 << 20;
            _x = Math.Clamp(_x + Math.Clamp(x, -Limit, Limit), -Limit, Limit);
            _y = Math.Clamp(_y - Math.Clamp(y, -Limit, Limit), -Limit, Limit);
            Report();
        }
    }

    /// <summary>Turns the wheel.</summary>
    /// <param name="steps">Notches towards the user.</param>
    public void Scroll(int steps)
    {
        lock (Gate)
        {
            _wheel = Math.Clamp(_wheel + Math.Clamp(steps, -1000, 1000), -1000, 1000);
            Report();
        }
    }

    /// <summary>Presses buttons.</summary>
    /// <param name="buttons">Which; the others stay as they are.</param>
    public void Down(MouseButtons buttons) => SetButtons(Buttons | buttons);

    /// <summary>Lets go of buttons.</summary>
    /// <param name="buttons">Which; the others stay as they are.</param>
    public void Up(MouseButtons buttons) => SetButtons(Buttons & ~buttons);

    internal override void Save(StateWriter writer)
    {
        base.Save(writer);
        writer.WriteByte((byte)_buttons);
        writer.WriteByte((byte)_reportedButtons);
        writer.WriteUInt32((uint)_x);
        writer.WriteUInt32((uint)_y);
        writer.WriteUInt32((uint)_wheel);
        writer.WriteBoolean(_isEnabled);
        writer.WriteBoolean(_isRemote);
        writer.WriteBoolean(_isWrapping);
        writer.WriteBoolean(_isScaled);
        writer.WriteByte(_resolution);
        writer.WriteByte(_rate);
        writer.WriteByte(_id);
        writer.WriteUInt32(_lastRates);
    }

    internal override void Load(StateReader reader)
    {
        const MouseButtons All = MouseButtons.Left | MouseButtons.Right | MouseButtons.Middle;
        base.Load(reader);
        _buttons = (MouseButtons)reader.ReadByte() & All;
        _reportedButtons = (MouseButtons)reader.ReadByte() & All;
        _x = (int)reader.ReadUInt32();
        _y = (int)reader.ReadUInt32();
        _wheel = (int)reader.ReadUInt32();
        _isEnabled = reader.ReadBoolean();
        _isRemote = reader.ReadBoolean();
        _isWrapping = reader.ReadBoolean();
        _isScaled = reader.ReadBoolean();
        _resolution = reader.ReadByte();
        _rate = reader.ReadByte();
        _id = reader.ReadByte() == WheelId ? WheelId : StandardId;
        _lastRates = reader.ReadUInt32();
    }

    private protected override void TakeCommand(byte command)
    {
        if (_isWrapping && command is not (ResetWrapMode or Reset))
        {
            Send(command);
            return;
        }
        switch (command)
        {
            case SetResolution or SetSampleRate:
                PendingCommand = command;
                Send(Acknowledge);
                return;
            case StatusRequest:
                Send(Acknowledge, Status, _resolution, _rate);
                return;
            case ReadData:
                Send(Acknowledge);
                SendPacket();
                return;
            case ReadId:
                Send(Acknowledge, _id);
                return;
            case Reset:
                SetDefaults();
                _id = StandardId;
                Send(Acknowledge, SelfTestPassed, StandardId);
                return;
            case SetScaling1To1 or SetScaling2To1:
                _isScaled = command == SetScaling2To1;
                break;
            case SetStreamMode or SetRemoteMode:
                _isRemote = command == SetRemoteMode;
                break;
            case ResetWrapMode or SetWrapMode:
                _isWrapping = command == SetWrapMode;
                break;
            case Enable or Disable:
                _isEnabled = command == Enable;
                break;
            case SetDefault:
                SetDefaults();
                break;
            default:
                Send(Resend);
                return;
        }
        Send(Acknowledge);
    }

    private protected override void TakeArgument(byte command, byte value)
    {
        if (command == SetResolution)
        {
            _resolution = (byte)(value & 3);
        }
        else
        {
            _rate = value;
            _lastRates = (_lastRates << 8 | value) & 0xff_ffff;
            if (_lastRates == (200 << 16 | 100 << 8 | 80))
            {
                _id = WheelId;
            }
        }
        Send(Acknowledge);
    }

    private byte Status => (byte)((_isRemote ? StatusRemote : 0) | (_isEnabled ? StatusEnabled : 0) | (_isScaled ? StatusScaled : 0)
        | ((_buttons & MouseButtons.Left) != 0 ? 4 : 0) | ((_buttons & MouseButtons.Middle) != 0 ? 2 : 0)
        | ((_buttons & MouseButtons.Right) != 0 ? 1 : 0));

    private void SetDefaults()
    {
        ClearQueue();
        _isEnabled = _isRemote = _isWrapping = _isScaled = false;
        _resolution = DefaultResolution;
        _rate = DefaultRate;
        _x = _y = _wheel = 0;
    }

    private void SetButtons(MouseButtons buttons)
    {
        lock (Gate)
        {
            _buttons = buttons & (MouseButtons.Left | MouseButtons.Right | MouseButtons.Middle);
            Report();
        }
    }

    // What does not fit into the queue waits and is added up, as a mouse does between two samples.
    private void Report()
    {
        Refill();
        NotifyController();
    }

    private protected override void Refill()
    {
        if (!_isEnabled || _isRemote)
        {
            return;
        }
        while (QueueRoom >= 4 && (_x != 0 || _y != 0 || _wheel != 0 || _buttons != _reportedButtons))
        {
            SendPacket();
        }
    }

    private void SendPacket()
    {
        var x = Math.Clamp(_x, -MaxStep, MaxStep);
        var y = Math.Clamp(_y, -MaxStep, MaxStep);
        _x -= x;
        _y -= y;
        Send((byte)((byte)_buttons | AlwaysOne | (x < 0 ? NegativeX : 0) | (y < 0 ? NegativeY : 0)), (byte)x, (byte)y);
        var wheel = Math.Clamp(_wheel, -8, 7);
        _wheel = _id == WheelId ? _wheel - wheel : 0;
        if (_id == WheelId)
        {
            Send((byte)wheel);
        }
        _reportedButtons = _buttons;
    }
}
