using KvmSharp.Devices;

namespace KvmSharp.Tests.Devices;

/// <summary>The controller at ports 0x60 and 0x64 with its keyboard and mouse.</summary>
public sealed class KeyboardControllerTests
{
    private const ulong Data = 0;
    private const ulong Command = 4;
    private const byte Full = 1;
    private const byte FromMouse = 0x20;

    private readonly ManualClock _clock = new();
    private readonly RecordingMachine _machine = new();
    private readonly InterruptLine _keyboardLine = InterruptLine.NotConnected();
    private readonly InterruptLine _mouseLine = InterruptLine.NotConnected();
    private readonly List<bool> _a20 = [];
    private readonly KeyboardController _controller;

    public KeyboardControllerTests()
    {
        _controller = new KeyboardController(_clock.Clock, _keyboardLine, _mouseLine, _machine, new A20Gate(_a20.Add));
    }

    [Fact]
    public void ControllerAnswersItsTests()
    {
        Assert.Equal([0x55], Ask(0xaa));
        Assert.Equal([0x00], Ask(0xab));
        Assert.Equal([0x00], Ask(0xa9));
        Assert.Equal(4, _controller.ReadByte(Command) & 4); // the system flag, after the self test
    }

    [Fact]
    public void CommandByteIsKept()
    {
        SendCommand(0x60, 0x47);
        Assert.Equal([0x47], Ask(0x20));
        SendCommand(0xad);
        Assert.Equal([0x57], Ask(0x20));
        SendCommand(0xa7);
        Assert.Equal([0x77], Ask(0x20));
        SendCommand(0xae);
        SendCommand(0xa8);
        Assert.Equal([0x47], Ask(0x20));
    }

    [Fact]
    public void KeysComeAsTheGuestWantsThem()
    {
        SendCommand(0x60, 0x00);
        Press(Key.A, Key.Right);
        Assert.Equal([0x1c, 0xe0, 0x74, 0xe0, 0xf0, 0x74, 0xf0, 0x1c], Drain()); // set 2
        SendCommand(0x60, 0x40);
        Press(Key.A, Key.Right);
        Assert.Equal([0x1e, 0xe0, 0x4d, 0xe0, 0xcd, 0x9e], Drain()); // translated
        SendCommand(0x60, 0x00);
        Assert.Equal([0xfa], AskKeyboard(0xf0));
        Assert.Equal([0xfa], AskKeyboard(0x01));
        Press(Key.A, Key.Right);
        Assert.Equal([0x1e, 0xe0, 0x4d, 0xe0, 0xcd, 0x9e], Drain()); // set 1
        Assert.Equal([0xfa], AskKeyboard(0xf0));
        Assert.Equal([0xfa, 0x01], AskKeyboard(0x00));
    }

    [Fact]
    public void TypingShiftsAndKeepsItsPace()
    {
        SendCommand(0x60, 0x40);
        _controller.Keyboard.Type("a!\n");
        Assert.Equal(8, _controller.Keyboard.PendingEvents);
        _clock.Advance(TimeSpan.FromMilliseconds(1));
        Assert.Equal([0x1e], Drain());
        _clock.Advance(TimeSpan.FromMilliseconds(10));
        Assert.Empty(Drain());
        Assert.Equal([0x9e, 0x2a, 0x02, 0x82, 0xaa, 0x1c, 0x9c], DrainInTime());
        Assert.Equal(0, _controller.Keyboard.PendingEvents);
        Assert.Throws<ArgumentException>(() => _controller.Keyboard.Type("ab€"));
        Assert.Throws<ArgumentOutOfRangeException>(() => _controller.Keyboard.Press((Key)999));
        Assert.Equal(0, _controller.Keyboard.PendingEvents);
    }

    [Fact]
    public void EveryKeyHasItsOwnCodes()
    {
        SendCommand(0x60, 0x40);
        var seen = new HashSet<string>();
        foreach (var key in Enum.GetValues<Key>())
        {
            _controller.Keyboard.Press(key);
            var bytes = DrainInTime();
            Assert.True(bytes.Length is 2 or 4 or 6 or 8, $"{key}: {Convert.ToHexString(bytes)}");
            Assert.True(seen.Add(Convert.ToHexString(bytes)), $"{key}: {Convert.ToHexString(bytes)}");
        }
    }

    [Fact]
    public void KeyboardCommands()
    {
        SendCommand(0x60, 0x00);
        Assert.Equal([0xfa, 0xaa], AskKeyboard(0xff));
        Assert.Equal([0xfa, 0xab, 0x83], AskKeyboard(0xf2));
        Assert.Equal([0xee], AskKeyboard(0xee));
        Assert.Equal([0xee], AskKeyboard(0xfe)); // again
        Assert.Equal([0xfa], AskKeyboard(0xed));
        Assert.Equal([0xfa], AskKeyboard(0x04));
        Assert.True(_controller.Keyboard.CapsLockLight);
        Assert.False(_controller.Keyboard.NumLockLight);
        Assert.Equal([0xfa], AskKeyboard(0xed));
        Assert.Equal([0xfa, 0xab, 0x83], AskKeyboard(0xf2)); // instead of the argument
        Assert.Equal([0xfa], AskKeyboard(0xf5));
        Press(Key.A);
        Assert.Empty(Drain());
        Assert.Equal([0xfa], AskKeyboard(0xf4));
        Press(Key.A);
        Assert.NotEmpty(Drain());
        Assert.Equal([0xfe], AskKeyboard(0x00));
    }

    [Fact]
    public void EachByteIsAnInterrupt()
    {
        SendCommand(0x60, 0x41);
        _controller.Keyboard.Down(Key.Up);
        _clock.Advance(TimeSpan.FromMilliseconds(1));
        Assert.True(_keyboardLine.IsHigh);
        Assert.Equal(0xe0, _controller.ReadByte(Data));
        Assert.True(_keyboardLine.IsHigh);
        Assert.Equal(0x48, _controller.ReadByte(Data));
        Assert.False(_keyboardLine.IsHigh);
        Assert.False(_mouseLine.IsHigh);
    }

    [Fact]
    public void MouseMovesAndItsWheelTurns()
    {
        SendCommand(0x60, 0x42);
        Assert.Equal([0xfa, 0xaa, 0x00], AskMouse(0xff));
        Assert.Equal([0xfa, 0x00], AskMouse(0xf2));
        _controller.Mouse.Move(5, 5);
        Assert.Empty(Drain()); // not enabled yet
        foreach (var rate in (byte[])[200, 100, 80])
        {
            Assert.Equal([0xfa], AskMouse(0xf3));
            Assert.Equal([0xfa], AskMouse(rate));
        }
        Assert.Equal([0xfa, 0x03], AskMouse(0xf2));
        Assert.Equal([0xfa], AskMouse(0xf6));
        Assert.Equal([0xfa], AskMouse(0xf4));
        _controller.Mouse.Move(3, 4);
        Assert.True(_mouseLine.IsHigh);
        Assert.Equal(Full | FromMouse, _controller.ReadByte(Command) & (Full | FromMouse));
        Assert.Equal([0x28, 0x03, 0xfc, 0x00], Drain());
        Assert.False(_mouseLine.IsHigh);
        _controller.Mouse.Down(MouseButtons.Left);
        _controller.Mouse.Scroll(1);
        Assert.Equal([0x09, 0x00, 0x00, 0x00, 0x09, 0x00, 0x00, 0x01], Drain());
        _controller.Mouse.Move(-1000, 0); // in steps
        var bytes = Drain();
        Assert.Equal(16, bytes.Length);
        Assert.Equal(-1000, bytes.Chunk(4).Sum(packet => (packet[0] & 0x10) != 0 ? packet[1] - 256 : packet[1]));
    }

    [Fact]
    public void OutputPortDrivesA20AndReset()
    {
        SendCommand(0xd1, 0xdd);
        SendCommand(0xd1, 0xdf);
        Assert.Equal([false, true], _a20);
        Assert.Equal(3, Ask(0xd0).Single() & 3);
        SendCommand(0xdd);
        Assert.Equal(1, Ask(0xd0).Single() & 3);
        SendCommand(0xdf);
        Assert.Empty(_machine.Requests);
        SendCommand(0xfe);
        Assert.Equal(["reset"], _machine.Requests);
    }

    [Fact]
    public void StateIsKept()
    {
        SendCommand(0x60, 0x43);
        SendCommand(0xdd);
        Assert.Equal([0xfa], AskMouse(0xf4));
        Press(Key.F1, Key.Pause);
        _controller.Mouse.Move(1, 2);
        var state = _controller.Save();
        var line = InterruptLine.NotConnected();
        var other = new KeyboardController(_clock.Clock, line, InterruptLine.NotConnected(), _machine, new A20Gate(_a20.Add));
        other.Load(state);
        Assert.Equal(state, other.Save());
        Assert.True(line.IsHigh);
        Assert.False(_a20[^1]);
        Assert.Equal(Drain(), Drain(other));
    }

    [Fact]
    public void DamagedStateIsRefused()
    {
        var state = _controller.Save();
        Assert.Throws<MachineStateException>(() => _controller.Load(state[..^1]));
        state[^1] ^= 0xff;
        _controller.Load(state);
    }

    private void Press(params ReadOnlySpan<Key> keys)
    {
        _controller.Keyboard.Press(keys);
        _clock.Advance(TimeSpan.FromSeconds(1));
    }

    private byte[] DrainInTime()
    {
        var bytes = new List<byte>();
        for (var i = 0; i < 50; i++)
        {
            _clock.Advance(TimeSpan.FromMilliseconds(15));
            bytes.AddRange(Drain());
        }
        return [.. bytes];
    }

    private byte[] Drain(KeyboardController? controller = null)
    {
        controller ??= _controller;
        var bytes = new List<byte>();
        while ((controller.ReadByte(Command) & Full) != 0 && bytes.Count < 100)
        {
            bytes.Add(controller.ReadByte(Data));
        }
        return [.. bytes];
    }

    private void SendCommand(byte command, params ReadOnlySpan<byte> arguments)
    {
        _controller.WriteByte(Command, command);
        foreach (var argument in arguments)
        {
            _controller.WriteByte(Data, argument);
        }
    }

    private byte[] Ask(byte command)
    {
        SendCommand(command);
        return Drain();
    }

    private byte[] AskKeyboard(byte value)
    {
        _controller.WriteByte(Data, value);
        return Drain();
    }

    private byte[] AskMouse(byte value)
    {
        SendCommand(0xd4, value);
        return Drain();
    }
}
