using KvmSharp.Tests.Devices;

namespace KvmSharp.Tests.Time;

public sealed class VmClockTests
{
    private readonly ManualClock _manual = new();

    [Fact]
    public void TimersFireInTheOrderOfTheirDeadlines()
    {
        var fired = new List<string>();
        var clock = _manual.Clock;
        clock.CreateTimer(() => fired.Add("b")).Arm(200);
        clock.CreateTimer(() => fired.Add("a")).Arm(100);
        clock.CreateTimer(() => fired.Add("b2")).Arm(200);
        var disarmed = clock.CreateTimer(() => fired.Add("never"));
        disarmed.Arm(150);
        disarmed.Disarm();
        Assert.Equal(100u, _manual.Deadline);
        _manual.AdvanceTo(100);
        Assert.Equal(["a"], fired);
        Assert.Equal(200u, _manual.Deadline);
        _manual.AdvanceTo(1000);
        Assert.Equal(["a", "b", "b2"], fired);
        Assert.Equal(VmClock.Never, _manual.Deadline);
    }

    [Fact]
    public void TimerMayArmItselfAgain()
    {
        var count = 0;
        VmTimer? timer = null;
        timer = _manual.Clock.CreateTimer(() =>
        {
            count++;
            timer!.Arm(_manual.Now + 10);
        });
        timer.Arm(10);
        _manual.AdvanceTo(105);
        Assert.Equal(10, count);
    }

    [Fact]
    public void TimerThatIsDueAgainAtOnceComesAtTheNextCall()
    {
        var count = 0;
        VmTimer? timer = null;
        timer = _manual.Clock.CreateTimer(() =>
        {
            count++;
            timer!.Arm(_manual.Now);
        });
        timer.Arm(_manual.Now);
        _manual.Clock.RunDueTimers();
        Assert.Equal(1, count);
        Assert.Equal(_manual.Now, _manual.Deadline);
        _manual.Clock.RunDueTimers();
        Assert.Equal(2, count);
    }

    [Fact]
    public void WorksAsTimeProvider()
    {
        TimeProvider provider = _manual.Clock;
        var start = provider.GetUtcNow();
        var count = 0;
        using var timer = provider.CreateTimer(_ => count++, null, TimeSpan.FromSeconds(1), TimeSpan.FromSeconds(2));
        _manual.Advance(TimeSpan.FromSeconds(0.9));
        Assert.Equal(0, count);
        _manual.Advance(TimeSpan.FromSeconds(4.2));
        Assert.Equal(3, count);
        Assert.Equal(TimeSpan.FromSeconds(5.1), provider.GetUtcNow() - start);
        Assert.Equal(TimeSpan.FromSeconds(5.1), provider.GetElapsedTime(0));
        Assert.True(timer.Change(Timeout.InfiniteTimeSpan, Timeout.InfiniteTimeSpan));
        _manual.Advance(TimeSpan.FromSeconds(10));
        Assert.Equal(3, count);
        timer.Dispose();
        Assert.False(timer.Change(TimeSpan.Zero, TimeSpan.Zero));
    }

    [Fact]
    public async Task DelaysOfTheFrameworkWorkOnIt()
    {
        var delay = Task.Delay(TimeSpan.FromSeconds(5), _manual.Clock);
        _manual.Advance(TimeSpan.FromSeconds(4));
        Assert.False(delay.IsCompleted);
        _manual.Advance(TimeSpan.FromSeconds(1));
        await delay.WaitAsync(TimeSpan.FromSeconds(60));
    }
}
