using System.Globalization;
using KvmSharp.GuestTests.Support;

namespace KvmSharp.GuestTests;

/// <summary>A kernel suspends to RAM and goes on.</summary>
public sealed class SuspendTests
{
    /// <summary>On the virtual clock the time of the sleep passes at once, however busy the host is.</summary>
    [Fact]
    public async Task KernelWakesAtTheAlarm()
    {
        await using LinuxGuest guest = new(await DebianCache.CloudAsync(), ClockMode.Virtual, vcpus: 2);
        await guest.BootAsync();
        Assert.Contains("[deep]", await guest.RunAsync("cat /sys/power/mem_sleep"));
        await guest.RunAsync("echo before > /tmp/file");
        // In one line: what is typed during the sleep is lost.
        guest.Send("date +%s; echo +600 > /sys/class/rtc/rtc0/wakealarm; echo mem > /sys/power/state; date +%s; echo a'wake'\n");
        string[] times = (await guest.ExpectAsync("awake\n", TimeSpan.FromSeconds(60))).Split('\n');
        Assert.InRange(long.Parse(times[1], CultureInfo.InvariantCulture) - long.Parse(times[0], CultureInfo.InvariantCulture), 599, 605);
        Assert.False(guest.Machine.PowerManagement!.IsAsleep);
        Assert.Equal("before\n", await guest.RunAsync("cat /tmp/file"));
        Assert.Equal("0-1\n", await guest.RunAsync("cat /sys/devices/system/cpu/online"));
        Assert.Equal("1\n", await guest.RunAsync("taskset -c 1 sh -c 'cut -d\" \" -f39 /proc/self/stat'"));
        string log = await guest.CleanLogAsync();
        Assert.Contains("PM: suspend entry (deep)", log);
        Assert.Contains("PM: suspend exit", log);
    }
}
