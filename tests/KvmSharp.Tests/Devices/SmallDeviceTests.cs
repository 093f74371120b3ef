using KvmSharp.Devices;

namespace KvmSharp.Tests.Devices;

public sealed class SmallDeviceTests
{
    private readonly ManualClock _clock = new();
    private readonly InterruptLine _line = InterruptLine.NotConnected();
    private readonly RecordingMachine _machine = new();

    [Fact]
    public void PowerManagementTimerHasItsRate()
    {
        var pm = new AcpiPm(_clock.Clock, _line, _machine);
        Assert.Equal(0u, pm.ReadValue(AcpiPm.TimerOffset, 4));
        _clock.Advance(TimeSpan.FromSeconds(1));
        Assert.Equal(3_579_545u, pm.ReadValue(AcpiPm.TimerOffset, 4));
        _clock.Advance(TimeSpan.FromSeconds(1199));
        Assert.Equal(unchecked((uint)(3_579_545UL * 1200)), pm.ReadValue(AcpiPm.TimerOffset, 4));
    }

    [Fact]
    public void PowerManagementTimerInterruptsWhenItsHighestBitChanges()
    {
        var pm = new AcpiPm(_clock.Clock, _line, _machine);
        pm.WriteValue(AcpiPm.EventOffset + 2, 2, 1);
        _clock.Advance(TimeSpan.FromSeconds(599));
        Assert.False(_line.IsHigh);
        _clock.Advance(TimeSpan.FromSeconds(2)); // 2^31 ticks are 599.9 s
        Assert.True(_line.IsHigh);
        pm.WriteValue(AcpiPm.EventOffset, 2, 1);
        Assert.False(_line.IsHigh);
    }

    [Fact]
    public void SoftOffSwitchesOff()
    {
        var pm = new AcpiPm(_clock.Clock, _line, _machine);
        Assert.Equal(1u, pm.ReadValue(AcpiPm.ControlOffset, 2)); // SCI_EN
        pm.WriteValue(AcpiPm.ControlOffset, 2, 1 | (3 << 10) | (1 << 13)); // another sleep state
        Assert.Empty(_machine.Requests);
        pm.WriteValue(AcpiPm.ControlOffset, 2, 1 | (5 << 10));
        Assert.Empty(_machine.Requests);
        pm.WriteValue(AcpiPm.ControlOffset, 2, 1 | (5 << 10) | (1 << 13));
        Assert.Equal(["power off"], _machine.Requests);
    }

    [Fact]
    public void PowerButtonInterruptsWhenEnabled()
    {
        var pm = new AcpiPm(_clock.Clock, _line, _machine);
        pm.PressPowerButton();
        Assert.False(_line.IsHigh);
        pm.WriteValue(AcpiPm.EventOffset + 2, 2, 1 << 8);
        Assert.True(_line.IsHigh);
        Assert.Equal(1u << 8, pm.ReadValue(AcpiPm.EventOffset, 2));
        var other = new AcpiPm(_clock.Clock, InterruptLine.NotConnected(), _machine);
        other.Load(pm.Save());
        Assert.Equal(pm.Save(), other.Save());
        pm.WriteValue(AcpiPm.EventOffset, 2, 1 << 8);
        Assert.False(_line.IsHigh);
    }

    [Fact]
    public void SleepEndsWithAnEnabledEvent()
    {
        const uint Alarm = 1 << 10, Wake = 1 << 15, Sleep = 1 | (1 << 10) | (1 << 13);
        var pm = new AcpiPm(_clock.Clock, _line, _machine);
        var events = new List<string>();
        pm.WriteValue(AcpiPm.ControlOffset, 2, Sleep); // not offered
        Assert.False(pm.IsAsleep);
        pm.OfferSleep(() => events.Add("sleep"), () => events.Add("wake"));
        pm.SignalAlarm(); // awake: an event like the others
        Assert.Equal(Alarm, pm.ReadValue(AcpiPm.EventOffset, 2));
        pm.WriteValue(AcpiPm.EventOffset, 2, Alarm);
        pm.WriteValue(AcpiPm.ControlOffset, 2, Sleep);
        Assert.True(pm.IsAsleep);
        pm.SignalAlarm(); // not enabled
        Assert.True(pm.IsAsleep);
        var other = new AcpiPm(_clock.Clock, InterruptLine.NotConnected(), _machine);
        other.Load(pm.Save());
        Assert.True(other.IsAsleep);
        Assert.Equal(pm.Save(), other.Save());
        pm.WriteValue(AcpiPm.EventOffset, 2, Alarm);
        pm.WriteValue(AcpiPm.EventOffset + 2, 2, Alarm);
        pm.SignalAlarm();
        Assert.False(pm.IsAsleep);
        Assert.Equal(Alarm | Wake, pm.ReadValue(AcpiPm.EventOffset, 2));
        Assert.Equal(["sleep", "wake"], events);
        pm.WriteValue(AcpiPm.ControlOffset, 2, Sleep); // the event is still there
        Assert.False(pm.IsAsleep);
        Assert.Equal(["sleep", "wake", "sleep", "wake"], events);
        pm.WriteValue(AcpiPm.EventOffset, 2, Alarm | Wake);
        Assert.Equal(0u, pm.ReadValue(AcpiPm.EventOffset, 2));
        Assert.Empty(_machine.Requests);
    }

    [Fact]
    public void PowerButtonWakesEvenIfItIsNotEnabled()
    {
        var pm = new AcpiPm(_clock.Clock, _line, _machine);
        pm.OfferSleep(() => { }, () => _machine.RequestExit(1));
        pm.PressPowerButton();
        Assert.Empty(_machine.Requests);
        pm.WriteValue(AcpiPm.EventOffset, 2, 1 << 8);
        pm.WriteValue(AcpiPm.ControlOffset, 2, 1 | (1 << 10) | (1 << 13));
        pm.PressPowerButton();
        Assert.Equal(["exit 1"], _machine.Requests);
        Assert.False(pm.IsAsleep);
    }

    [Fact]
    public void DebugConsoleSaysThatItIsThere()
    {
        var backend = new MemoryCharacterBackend();
        var console = new DebugConsole(backend);
        Assert.Equal(0xe9, console.ReadByte(0));
        console.WriteByte(0, (byte)'k');
        Assert.Equal("k", backend.GetOutputText());
    }

    [Theory]
    [InlineData(0u, 1)]
    [InlineData(0x10u, 0x21)]
    [InlineData(0xffff_ffffu, -1)]
    public void DebugExitImpliesItsStatus(uint value, int status)
    {
        new IsaDebugExit(_machine).WriteValue(0, 4, value);
        Assert.Equal([$"exit {status}"], _machine.Requests);
    }

    [Fact]
    public void ResetRegisterResetsOnARisingBit()
    {
        var control = new ResetControl(_machine);
        control.WriteByte(1, 0x02);
        Assert.Empty(_machine.Requests);
        Assert.Equal(0x02, control.ReadByte(1));
        control.WriteByte(1, 0x06);
        Assert.Equal(["reset"], _machine.Requests);
        control.WriteByte(1, 0x06);
        Assert.Single(_machine.Requests);
    }

    [Fact]
    public void PciConfigurationAddressesDoNotReset()
    {
        var bus = new IoBus("port", 0xffff);
        bus.Map(new ResetControl(_machine), ResetControl.BasePort, ResetControl.PortCount);
        bus.Write(0xcf8, BitConverter.GetBytes(0x8000_0600u)); // would write 6 to port 0xcf9
        bus.Write(0xcf9, [0x06, 0x00]);
        Assert.Empty(_machine.Requests);
        Span<byte> data = [0, 0, 0, 0];
        bus.Read(0xcf8, data);
        Assert.Equal([0xff, 0xff, 0xff, 0xff], data.ToArray());
        bus.Write(0xcf9, [0x06]);
        Assert.Equal(["reset"], _machine.Requests);
    }

    [Fact]
    public void KeyboardControllerAndPort92Reset()
    {
        var keyboard = new KeyboardReset(_machine);
        Assert.Equal(0, keyboard.ReadByte(0));
        keyboard.WriteByte(0, 0xd1);
        Assert.Empty(_machine.Requests);
        keyboard.WriteByte(0, 0xfe);
        var portA = new SystemControlPortA(_machine);
        Assert.Equal(2, portA.ReadByte(0));
        portA.WriteByte(0, 2);
        portA.WriteByte(0, 3);
        Assert.Equal(["reset", "reset"], _machine.Requests);
    }

    [Fact]
    public void A20IsEnabledWhileOneSourceEnablesIt()
    {
        var line = new List<bool>();
        var gate = new A20Gate(line.Add);
        Assert.True(gate.IsEnabled);
        var portA = new SystemControlPortA(_machine, gate);
        var keyboard = gate.AddSource(enabled: true);
        Assert.Empty(line);
        portA.WriteByte(0, 0);
        Assert.Equal(0, portA.ReadByte(0));
        Assert.True(gate.IsEnabled);
        keyboard.Set(false);
        Assert.False(gate.IsEnabled);
        keyboard.Set(false);
        Assert.Equal([false], line);
        var writer = new StateWriter();
        portA.SaveState(writer);
        portA.WriteByte(0, 0xfe);
        Assert.Equal(2, portA.ReadByte(0));
        Assert.True(gate.IsEnabled);
        portA.LoadState(new StateReader(writer.ToArray()));
        Assert.False(gate.IsEnabled);
        Assert.Equal(0, portA.ReadByte(0));
        Assert.Empty(_machine.Requests);
    }

    [Fact]
    public void PostCodeIsRemembered()
    {
        var post = new PostCode();
        post.WriteByte(0, 0x5a);
        Assert.Equal(0x5a, post.Value);
        Assert.Equal(0x5a, post.ReadByte(0));
    }
}
