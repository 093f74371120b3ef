using KvmSharp.Devices;

namespace KvmSharp.Tests.Devices;

public sealed class CmosRtcTests
{
    private const byte A = 0x0a, B = 0x0b, C = 0x0c;
    private const byte Hours24 = 2, Binary = 4, UpdateInterrupt = 0x10, AlarmInterrupt = 0x20, PeriodicInterrupt = 0x40, Set = 0x80;

    private readonly ManualClock _clock = new(); // 2024-02-29 23:59:50, a Thursday
    private readonly InterruptLine _line = InterruptLine.NotConnected();
    private readonly CmosRtc _rtc;

    public CmosRtcTests()
    {
        _rtc = new CmosRtc(_clock.Clock, _line, 512UL << 20, 1UL << 30);
    }

    [Fact]
    public void TellsTheTimeInBcd()
    {
        Assert.Equal([0x50, 0x59, 0x23, 0x05, 0x29, 0x02, 0x24, 0x20], ReadTime());
        _clock.Advance(TimeSpan.FromSeconds(10));
        Assert.Equal([0x00, 0x00, 0x00, 0x06, 0x01, 0x03, 0x24, 0x20], ReadTime());
    }

    [Fact]
    public void BatteryKeepsMemoryAndTime()
    {
        Write(0x40, 0x5a);
        Write(B, Hours24 | Binary | AlarmInterrupt | UpdateInterrupt);
        Write(9, 30); // 2030
        Write(6, 1); // a Sunday, whatever the calendar says
        _clock.Advance(TimeSpan.FromSeconds(4));
        var battery = _rtc.SaveBattery();
        var clock = new ManualClock(new DateTimeOffset(2024, 3, 1, 12, 0, 0, TimeSpan.Zero));
        var line = InterruptLine.NotConnected();
        var other = new CmosRtc(clock.Clock, line, 64UL << 20);
        byte ReadOther(byte index)
        {
            other.WriteByte(0, index);
            return other.ReadByte(1);
        }

        other.LoadBattery(battery);
        Assert.Equal(0x5a, ReadOther(0x40));
        Assert.Equal(Hours24 | Binary, ReadOther(B));
        Assert.Equal((30, 3, 2, 12), (ReadOther(9), ReadOther(8), ReadOther(7), ReadOther(4)));
        Assert.Equal((0, 3), (ReadOther(0x34), ReadOther(0x35))); // 64 KiB units above 16 MiB: of this machine, not of the other
        clock.Advance(TimeSpan.FromSeconds(5));
        Assert.False(line.IsHigh);
    }

    [Fact]
    public void AlarmIsToldOnceUntilItIsTaken()
    {
        var alarms = 0;
        _rtc.AlarmRaised += () => alarms++;
        foreach (var index in (byte[])[1, 3, 5])
        {
            Write(index, 0xc0); // each second
        }
        _clock.Advance(TimeSpan.FromSeconds(3));
        Assert.Equal(0, alarms); // it asks for no interrupt
        Read(C);
        Write(B, AlarmInterrupt | Hours24);
        _clock.Advance(TimeSpan.FromSeconds(3));
        Assert.Equal(1, alarms);
        Read(C);
        _clock.Advance(TimeSpan.FromSeconds(1));
        Assert.Equal(2, alarms);
        var other = new CmosRtc(_clock.Clock, InterruptLine.NotConnected());
        other.AlarmRaised += () => alarms++;
        other.Load(_rtc.Save());
        other.ReadByte(1);
        Assert.Equal(2, alarms);
        Write(B, Hours24);
        Write(B, AlarmInterrupt | Hours24); // the flag was still set
        Assert.Equal(3, alarms);
    }

    [Fact]
    public void TellsTheTimeInBinaryAndInTwelveHours()
    {
        Write(B, Binary);
        Assert.Equal([50, 59, 11 | 0x80, 5, 29, 2, 24, 20], ReadTime());
        Write(B, 0);
        Assert.Equal(0x91, Read(4)); // 11 PM in BCD
        _clock.Advance(TimeSpan.FromSeconds(10));
        Assert.Equal(0x12, Read(4)); // 12 AM
    }

    [Theory]
    [InlineData(1970, 1, 1)]
    [InlineData(1999, 12, 31)]
    [InlineData(2000, 2, 29)]
    [InlineData(2038, 1, 19)]
    [InlineData(2100, 3, 1)]
    [InlineData(9999, 12, 31)]
    public void TakesTheTimeThatIsSet(int year, int month, int day)
    {
        var date = new DateTime(year, month, day, 12, 34, 56);
        Write(B, Set | Hours24 | Binary);
        SetTime(date);
        _clock.Advance(TimeSpan.FromSeconds(100)); // stands still meanwhile
        Assert.Equal(56, Read(0));
        Write(B, Hours24 | Binary);
        Assert.Equal(Expect(date), ReadTime());
        _clock.Advance(TimeSpan.FromHours(5));
        Assert.Equal(Expect(date + TimeSpan.FromHours(5)), ReadTime());
    }

    [Fact]
    public void EveryDayOfManyYearsIsRight()
    {
        Write(B, Hours24 | Binary);
        var date = new DateTime(2024, 2, 29, 23, 59, 50);
        for (var i = 0; i < 40_000; i += 7)
        {
            _clock.AdvanceTo((ulong)i * 86_400_000_000_000);
            Assert.Equal(Expect(date.AddDays(i)), ReadTime());
        }
    }

    [Fact]
    public void DividerReleasedUpdatesAfterHalfASecond()
    {
        Write(B, Set | Hours24 | Binary);
        Write(A, 0x70 | 6);
        SetTime(new DateTime(2030, 1, 2, 3, 4, 5));
        Write(B, Hours24 | Binary);
        _clock.Advance(TimeSpan.FromMilliseconds(333));
        Write(A, 0x26);
        Assert.Equal(5, Read(0));
        _clock.Advance(TimeSpan.FromMilliseconds(499));
        Assert.Equal(5, Read(0));
        _clock.Advance(TimeSpan.FromMilliseconds(2));
        Assert.Equal(6, Read(0));
    }

    [Fact]
    public void UpdateInProgressShowsBeforeTheSecond()
    {
        Assert.Equal(0, Read(A) & 0x80);
        _clock.Advance(TimeSpan.FromMicroseconds(999_800));
        Assert.Equal(0x80, Read(A) & 0x80);
        _clock.Advance(TimeSpan.FromMicroseconds(201));
        Assert.Equal(0, Read(A) & 0x80);
    }

    [Fact]
    public void UpdateEndedInterrupts()
    {
        Write(B, Hours24 | UpdateInterrupt);
        _clock.Advance(TimeSpan.FromMilliseconds(999));
        Assert.False(_line.IsHigh);
        _clock.Advance(TimeSpan.FromMilliseconds(1));
        Assert.True(_line.IsHigh);
        Assert.Equal(0x90, Read(C) & 0x90);
        Assert.False(_line.IsHigh);
        _clock.Advance(TimeSpan.FromSeconds(1));
        Assert.True(_line.IsHigh);
    }

    [Fact]
    public void PeriodicInterruptHasItsRate()
    {
        Write(A, 0x26); // 1,024 Hz
        Write(B, Hours24 | PeriodicInterrupt);
        var count = 0;
        for (var i = 0; i < 10_000; i++)
        {
            _clock.Advance(TimeSpan.FromMicroseconds(100));
            if (_line.IsHigh)
            {
                count++;
                Assert.Equal(0xc0, Read(C) & 0xc0);
            }
        }
        Assert.InRange(count, 1023, 1024);
    }

    [Fact]
    public void AlarmInterruptsAtItsTime()
    {
        Write(1, 0x05);
        Write(3, 0x00);
        Write(5, 0xff); // any hour
        Write(B, Hours24 | AlarmInterrupt);
        _clock.Advance(TimeSpan.FromSeconds(14.9));
        Assert.False(_line.IsHigh);
        _clock.Advance(TimeSpan.FromSeconds(0.2));
        Assert.True(_line.IsHigh);
        Assert.Equal(0xa0, Read(C) & 0xa0);
        _clock.Advance(TimeSpan.FromMinutes(59));
        Assert.False(_line.IsHigh);
        _clock.Advance(TimeSpan.FromMinutes(1));
        Assert.True(_line.IsHigh);
    }

    [Fact]
    public void FlagsAreSetWithoutInterrupts()
    {
        Read(C);
        _clock.Advance(TimeSpan.FromSeconds(3));
        Assert.Equal(0x50, Read(C));
        Assert.Equal(0, Read(C));
    }

    [Fact]
    public void MemorySizesAreInTheRegisters()
    {
        Assert.Equal(640, Read(0x15) | (Read(0x16) << 8));
        Assert.Equal(0xffff, Read(0x17) | (Read(0x18) << 8));
        Assert.Equal((512 - 16) * 16, Read(0x34) | (Read(0x35) << 8));
        Assert.Equal(1 << 14, Read(0x5b) | (Read(0x5c) << 8) | (Read(0x5d) << 16));
    }

    [Fact]
    public void RamIsKeptAndRegisterDIsFixed()
    {
        Write(0x7f, 0xa5);
        Assert.Equal(0xa5, Read(0x7f));
        Write(0x0d, 0);
        Assert.Equal(0x80, Read(0x0d));
        Assert.Equal(0xff, _rtc.ReadByte(0)); // the index port cannot be read
    }

    [Fact]
    public void AnyValuesInTheTimeRegistersAreHarmless()
    {
        var random = new Random(7);
        for (var i = 0; i < 20_000; i++)
        {
            Write((byte)random.Next(0, 0x33), (byte)random.Next(256));
            _clock.Advance(TimeSpan.FromMilliseconds(random.Next(1500)));
            Read((byte)random.Next(0, 0x33));
        }
    }

    [Fact]
    public void StateGoesOnElsewhere()
    {
        Write(B, Hours24 | UpdateInterrupt);
        _clock.Advance(TimeSpan.FromMilliseconds(1500));
        var state = _rtc.Save();
        var line = InterruptLine.NotConnected();
        var other = new CmosRtc(_clock.Clock, line);
        other.Load(state);
        Assert.True(line.IsHigh);
        Assert.Equal(state, other.Save());
        Assert.Throws<MachineStateException>(() => other.Load(state[..^1]));
    }

    private static int[] Expect(DateTime d) =>
        [d.Second, d.Minute, d.Hour, (int)d.DayOfWeek + 1, d.Day, d.Month, d.Year % 100, d.Year / 100];

    private int[] ReadTime() => [.. new byte[] { 0, 2, 4, 6, 7, 8, 9, 0x32 }.Select(r => (int)Read(r))];

    private void SetTime(DateTime date)
    {
        var values = Expect(date);
        foreach (var (register, i) in new byte[] { 0, 2, 4, 6, 7, 8, 9, 0x32 }.Select((r, i) => (r, i)))
        {
            Write(register, (byte)values[i]);
        }
    }

    private byte Read(byte register)
    {
        _rtc.WriteByte(0, register);
        return _rtc.ReadByte(1);
    }

    private void Write(byte register, byte value)
    {
        _rtc.WriteByte(0, register);
        _rtc.WriteByte(1, value);
    }
}
