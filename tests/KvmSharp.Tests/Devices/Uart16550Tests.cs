using KvmSharp.Devices;

namespace KvmSharp.Tests.Devices;

public sealed class Uart16550Tests
{
    private const int Data = 0, Ier = 1, Iir = 2, Fcr = 2, Lcr = 3, Mcr = 4, Lsr = 5, Msr = 6, Scr = 7;
    private const byte ReceivedData = 1, TransmitterEmpty = 2, LineStatus = 4, ModemStatus = 8;
    private const byte Out2 = 8, Loopback = 0x10;
    private const byte NoInterrupt = 1;

    private readonly ManualClock _clock = new();
    private readonly InterruptLine _line = InterruptLine.NotConnected();
    private readonly MemoryCharacterBackend _backend = new();
    private readonly Uart16550 _uart;

    public Uart16550Tests()
    {
        _uart = new Uart16550(_clock.Clock, _line, _backend);
        SetDivisor(1); // 115,200 baud
        _uart.WriteByte(Lcr, 3);
        _uart.WriteByte(Mcr, Out2);
    }

    [Fact]
    public void OutputLeavesAtOnce()
    {
        foreach (var b in "hello"u8)
        {
            Assert.Equal(0x60, _uart.ReadByte(Lsr) & 0x60);
            _uart.WriteByte(Data, b);
        }
        Assert.Equal("hello", _backend.GetOutputText());
    }

    [Fact]
    public void DivisorLatchHidesDataAndInterruptEnable()
    {
        _uart.WriteByte(Ier, 0x0f);
        SetDivisor(0x1234);
        _uart.WriteByte(Lcr, 0x83);
        Assert.Equal(0x34, _uart.ReadByte(Data));
        Assert.Equal(0x12, _uart.ReadByte(Ier));
        _uart.WriteByte(Lcr, 0x03);
        Assert.Equal(0x0f, _uart.ReadByte(Ier));
        Assert.Equal("", _backend.GetOutputText());
    }

    [Fact]
    public void ReservedBitsReadAsZero()
    {
        _uart.WriteByte(Ier, 0xff);
        Assert.Equal(0x0f, _uart.ReadByte(Ier));
        _uart.WriteByte(Mcr, 0xff);
        Assert.Equal(0x1f, _uart.ReadByte(Mcr));
        _uart.WriteByte(Scr, 0xa5);
        Assert.Equal(0xa5, _uart.ReadByte(Scr));
    }

    [Fact]
    public void FifoBitsTellA16550A()
    {
        Assert.Equal(NoInterrupt, _uart.ReadByte(Iir));
        _uart.WriteByte(Fcr, 1);
        Assert.Equal(0xc1, _uart.ReadByte(Iir));
        _uart.WriteByte(Fcr, 0x21); // bit 5 is the 64-byte FIFO of a 16750
        Assert.Equal(0xc1, _uart.ReadByte(Iir));
        _uart.WriteByte(Fcr, 0);
        Assert.Equal(NoInterrupt, _uart.ReadByte(Iir));
    }

    [Fact]
    public void EnablingTransmitterInterruptRaisesIt()
    {
        _uart.WriteByte(Ier, TransmitterEmpty);
        Assert.True(_line.IsHigh);
        Assert.Equal(0x02, _uart.ReadByte(Iir));
        Assert.False(_line.IsHigh);
        Assert.Equal(NoInterrupt, _uart.ReadByte(Iir));
        // Off and on again, as the Linux driver tests it.
        _uart.WriteByte(Ier, 0);
        _uart.WriteByte(Ier, TransmitterEmpty);
        Assert.Equal(0x02, _uart.ReadByte(Iir));
        _uart.WriteByte(Data, (byte)'x');
        Assert.True(_line.IsHigh);
    }

    [Fact]
    public void ReadingAnotherCauseKeepsTheTransmitterInterrupt()
    {
        _uart.WriteByte(Ier, ReceivedData | TransmitterEmpty);
        _backend.SendInput("a");
        Assert.Equal(0x04, _uart.ReadByte(Iir));
        Assert.Equal((byte)'a', _uart.ReadByte(Data));
        Assert.Equal(0x02, _uart.ReadByte(Iir));
    }

    [Fact]
    public void ReceivedCharacterInterruptsWithoutFifo()
    {
        _uart.WriteByte(Ier, ReceivedData);
        _backend.SendInput("ab");
        Assert.True(_line.IsHigh);
        Assert.Equal(0x61, _uart.ReadByte(Lsr));
        Assert.Equal((byte)'a', _uart.ReadByte(Data));
        Assert.False(_line.IsHigh);
        Assert.Equal(0x60, _uart.ReadByte(Lsr)); // the next is still on the line
        _clock.Advance(TimeSpan.FromMilliseconds(1));
        Assert.Equal((byte)'b', _uart.ReadByte(Data));
    }

    [Theory]
    [InlineData(0x01, 1)]
    [InlineData(0x41, 4)]
    [InlineData(0x81, 8)]
    [InlineData(0xc1, 14)]
    public void FifoInterruptsAtItsTrigger(byte control, int level)
    {
        _uart.WriteByte(Fcr, control);
        _uart.WriteByte(Ier, ReceivedData);
        for (var i = 1; i <= level; i++)
        {
            Assert.False(_line.IsHigh);
            _backend.SendInput("x");
            _clock.Advance(TimeSpan.FromMicroseconds(90)); // a little more than a character
        }
        Assert.True(_line.IsHigh);
        Assert.Equal(0xc4, _uart.ReadByte(Iir));
        _uart.ReadByte(Data);
        Assert.False(_line.IsHigh);
    }

    [Fact]
    public void FewerCharactersTimeOut()
    {
        _uart.WriteByte(Fcr, 0x81);
        _uart.WriteByte(Ier, ReceivedData);
        _backend.SendInput("ab");
        Assert.Equal(0xc1, _uart.ReadByte(Iir));
        _clock.Advance(TimeSpan.FromMicroseconds(4 * 86));
        Assert.False(_line.IsHigh);
        _clock.Advance(TimeSpan.FromMicroseconds(10));
        Assert.True(_line.IsHigh);
        Assert.Equal(0xcc, _uart.ReadByte(Iir));
        _uart.ReadByte(Data); // "... reset when the CPU reads one character"
        Assert.Equal(0xc1, _uart.ReadByte(Iir));
        _clock.Advance(TimeSpan.FromMicroseconds(400));
        Assert.Equal(0xcc, _uart.ReadByte(Iir));
        _uart.ReadByte(Data);
        _clock.Advance(TimeSpan.FromMilliseconds(2));
        Assert.False(_line.IsHigh);
    }

    [Fact]
    public void LongInputArrivesWholeAndNoFasterThanTheLine()
    {
        _uart.WriteByte(Fcr, 0x81);
        var text = string.Concat(Enumerable.Range(0, 300).Select(i => (char)('!' + i % 90)));
        _backend.SendInput(text);
        var received = "";
        while (received.Length < text.Length)
        {
            while ((_uart.ReadByte(Lsr) & 1) != 0)
            {
                received += (char)_uart.ReadByte(Data);
            }
            _clock.Advance(TimeSpan.FromMicroseconds(100));
        }
        Assert.Equal(text, received);
        Assert.InRange(_clock.Now, 280UL * 86_000, 400UL * 86_000);
    }

    [Fact]
    public void LoopbackReturnsCharactersAndModemLines()
    {
        _uart.WriteByte(Mcr, Loopback | 0x0a);
        Assert.Equal(0x90, _uart.ReadByte(Msr) & 0xf0); // RTS is CTS, OUT2 is DCD
        _uart.WriteByte(Data, 0x42);
        Assert.Equal(0x42, _uart.ReadByte(Data));
        Assert.Equal("", _backend.GetOutputText());
    }

    [Fact]
    public void ModemStatusChangesInterrupt()
    {
        _uart.WriteByte(Ier, ModemStatus);
        Assert.Equal(0xb0, _uart.ReadByte(Msr));
        _uart.WriteByte(Mcr, Loopback | 0x04); // RI rises, the others fall
        _uart.WriteByte(Mcr, Out2);
        Assert.True(_line.IsHigh);
        Assert.Equal(0x00, _uart.ReadByte(Iir));
        Assert.Equal(0xbf, _uart.ReadByte(Msr));
        Assert.False(_line.IsHigh);
        Assert.Equal(0xb0, _uart.ReadByte(Msr));
    }

    [Fact]
    public void OverrunAndBreakAreLineErrors()
    {
        _uart.WriteByte(Ier, LineStatus);
        _uart.SendBreak();
        Assert.Equal(0x06, _uart.ReadByte(Iir));
        Assert.Equal(0x71, _uart.ReadByte(Lsr));
        Assert.Equal(0x61, _uart.ReadByte(Lsr));
        _uart.SendBreak(); // the buffer is still full
        Assert.Equal(0x73, _uart.ReadByte(Lsr));
    }

    [Fact]
    public void FifoKeepsItsContentInAnOverrun()
    {
        _uart.WriteByte(Fcr, 1);
        _uart.WriteByte(Mcr, Loopback);
        for (byte i = 0; i < 17; i++)
        {
            _uart.WriteByte(Data, i);
        }
        Assert.Equal(0x63, _uart.ReadByte(Lsr));
        Assert.Equal(Enumerable.Range(0, 16).Select(i => (byte)i), Enumerable.Range(0, 16).Select(_ => _uart.ReadByte(Data)));
        Assert.Equal(0x60, _uart.ReadByte(Lsr));
    }

    [Fact]
    public void ErrorInFifoShowsWhenItsCharacterIsFirst()
    {
        _uart.WriteByte(Fcr, 1);
        _backend.SendInput("a");
        _uart.SendBreak();
        Assert.Equal(0xe1, _uart.ReadByte(Lsr)); // one somewhere in the FIFO
        _uart.ReadByte(Data);
        Assert.Equal(0xf1, _uart.ReadByte(Lsr));
        _uart.ReadByte(Data);
        Assert.Equal(0x60, _uart.ReadByte(Lsr));
    }

    [Fact]
    public void InterruptNeedsOut2()
    {
        _uart.WriteByte(Mcr, 0);
        _uart.WriteByte(Ier, TransmitterEmpty);
        Assert.False(_line.IsHigh);
        _uart.WriteByte(Mcr, Out2);
        Assert.True(_line.IsHigh);
    }

    [Fact]
    public void FifoResetEmptiesIt()
    {
        _uart.WriteByte(Fcr, 1);
        _backend.SendInput("abc");
        Assert.Equal(0x61, _uart.ReadByte(Lsr));
        _uart.WriteByte(Fcr, 3);
        Assert.Equal(0x60, _uart.ReadByte(Lsr));
    }

    [Fact]
    public void StateGoesOnElsewhere()
    {
        _uart.WriteByte(Fcr, 0x41);
        _uart.WriteByte(Ier, ReceivedData);
        _backend.SendInput("abc");
        var state = _uart.Save();

        var line = InterruptLine.NotConnected();
        var other = new Uart16550(_clock.Clock, line, null);
        other.Load(state);
        Assert.Equal(state, other.Save());
        _clock.Advance(TimeSpan.FromMilliseconds(1));
        Assert.True(line.IsHigh);
        Assert.Equal(0xcc, other.ReadByte(Iir));
        Assert.Equal((byte)'a', other.ReadByte(Data));
    }

    [Fact]
    public void DamagedStateIsRefused()
    {
        var state = _uart.Save();
        for (var length = 0; length < state.Length; length++)
        {
            Assert.Throws<MachineStateException>(() => _uart.Load(state[..length]));
        }
        state[0] = 17;
        Assert.Throws<MachineStateException>(() => _uart.Load(state));
    }

    private void SetDivisor(ushort divisor)
    {
        _uart.WriteByte(Lcr, 0x83);
        _uart.WriteByte(Data, (byte)divisor);
        _uart.WriteByte(Ier, (byte)(divisor >> 8));
        _uart.WriteByte(Lcr, 0x03);
    }
}
