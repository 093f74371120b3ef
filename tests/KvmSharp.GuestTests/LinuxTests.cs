using System.Diagnostics;
using System.Globalization;
using System.Security.Cryptography;
using System.Text;
using KvmSharp.Cli.Debian;
using KvmSharp.GuestTests.Support;

namespace KvmSharp.GuestTests;

/// <summary>Boots a kernel once for all tests of a class.</summary>
public abstract class LinuxFixture : IAsyncLifetime
{
    internal LinuxGuest Guest { get; private set; } = null!;

    public async Task InitializeAsync()
    {
        Guest = new LinuxGuest(await ObtainAsync());
        await Guest.BootAsync();
    }

    public async Task DisposeAsync() => await Guest.DisposeAsync();

    private protected abstract Task<DebianImage> ObtainAsync();
}

public sealed class CloudKernelFixture : LinuxFixture
{
    private protected override Task<DebianImage> ObtainAsync() => DebianCache.CloudAsync();
}

public sealed class GenericKernelFixture : LinuxFixture
{
    private protected override Task<DebianImage> ObtainAsync() => DebianCache.GenericAsync();
}

/// <summary>What must hold in a running Debian system, whichever kernel it is.</summary>
public abstract class LinuxTests(LinuxFixture fixture)
{
    private LinuxGuest Guest => fixture.Guest;

    [Fact]
    public async Task KernelDoesNotComplain()
    {
        string log = await Guest.CleanLogAsync();
        Assert.Contains("Linux version 6.1", log);
        Assert.Contains("Run /init as init process", log);
    }

    [Fact]
    public async Task ProcessorIsListed()
    {
        string text = await Guest.RunAsync("cat /proc/cpuinfo");
        Assert.Single(text.Split('\n'), line => line.StartsWith("processor", StringComparison.Ordinal));
        string flags = text.Split('\n').Single(line => line.StartsWith("flags", StringComparison.Ordinal));
        Assert.All((string[])["lm", "sse2", "sse4_2", "popcnt", "nx", "syscall", "hypervisor"], flag => Assert.Contains($" {flag}", flags));
        Assert.DoesNotContain(" avx512", flags);
    }

    [Fact]
    public async Task PipesWork() =>
        Assert.Equal("5050\n", await Guest.RunAsync("seq 1 100 | sort -r | awk '{ sum += $1 } END { print sum }'"));

    [Fact]
    public async Task CompressedDataComesBackUnchanged()
    {
        await Guest.RunAsync("cat /bin/busybox | gzip -c > /tmp/packed && gunzip -c /tmp/packed > /tmp/unpacked");
        string sizes = await Guest.RunAsync("cmp /bin/busybox /tmp/unpacked && wc -c < /tmp/packed && wc -c < /tmp/unpacked && rm /tmp/packed /tmp/unpacked");
        int[] values = [.. sizes.Split('\n', StringSplitOptions.RemoveEmptyEntries).Select(int.Parse)];
        Assert.InRange(values[0], 100_000, values[1] - 100_000);
    }

    [Fact]
    public async Task ChecksumsAreRight()
    {
        string expected = Convert.ToHexStringLower(SHA256.HashData(Encoding.ASCII.GetBytes("The quick brown fox jumps over the lazy dog")));
        Assert.Equal($"{expected}  -\n", await Guest.RunAsync("printf 'The quick brown fox jumps over the lazy dog' | sha256sum"));
        byte[] zeros = new byte[3 << 20];
        Assert.Equal(
            $"{Convert.ToHexStringLower(SHA256.HashData(zeros))}  -\n{Convert.ToHexStringLower(MD5.HashData(zeros))}  -\n",
            await Guest.RunAsync("head -c 3145728 /dev/zero | sha256sum; head -c 3145728 /dev/zero | md5sum"));
    }

    [Fact]
    public async Task ArithmeticIsRight()
    {
        Assert.Equal("3.1415926535897932384626433832\n", await Guest.RunAsync("echo 'scale=30; 4*a(1)' | bc -l | cut -c1-30"));
        Assert.Equal("0.333333 3.625 -7.5\n", await Guest.RunAsync("awk 'BEGIN { print 1 / 3, 1.45 * 2.5, -15 / 2 }'"));
    }

    [Fact]
    public async Task SecondIsASecond()
    {
        (double guest, double least, double most) = await SleepAsync(1);
        Assert.InRange(guest, 0.99, double.MaxValue);
        Assert.InRange(guest, least - 0.02, most + 0.02); // /proc/uptime has hundredths
    }

    [Fact]
    public async Task ClockDoesNotDrift()
    {
        (double guest, double least, double most) = await SleepAsync(4);
        Assert.InRange(guest, least * 0.99 - 0.02, most * 1.01 + 0.02);
    }

    [Fact]
    public async Task IdleSystemCostsNextToNothing()
    {
        await Guest.RunAsync("sleep 1");
        double share = await ResourceTests.ProcessorShareAsync(TimeSpan.FromSeconds(2));
        Assert.True(share < 0.05, $"an idle system took {share:P1} of a processor");
    }

    [Fact]
    public async Task WallClockIsRight()
    {
        long before = DateTimeOffset.UtcNow.ToUnixTimeSeconds();
        string text = await Guest.RunAsync("date -u +%s");
        long guest = long.Parse(text, CultureInfo.InvariantCulture);
        Assert.InRange(guest, before - 3, DateTimeOffset.UtcNow.ToUnixTimeSeconds() + 3);
    }

    [Fact]
    public async Task ProcessesAndSignalsWork()
    {
        Assert.Equal("100\n", await Guest.RunAsync("i=0; while [ $i -lt 100 ]; do /bin/true && i=$((i + 1)); done; echo $i"));
        Assert.EndsWith("143\n", await Guest.RunAsync("sleep 100 & p=$!; kill $p; wait $p; echo $?"));
    }

    // The guest's time lies between two spans of the host's: of the sleep alone, and with both looks at the guest's clock.
    // However long the host makes them, that holds.
    private async Task<(double Guest, double Least, double Most)> SleepAsync(int seconds)
    {
        var outer = Stopwatch.StartNew();
        double start = await UptimeAsync();
        var inner = Stopwatch.StartNew();
        await Guest.RunAsync($"sleep {seconds}");
        double least = inner.Elapsed.TotalSeconds;
        double guest = await UptimeAsync() - start;
        return (guest, least, outer.Elapsed.TotalSeconds);
    }

    private async Task<double> UptimeAsync() =>
        double.Parse((await Guest.RunAsync("cut -d' ' -f1 /proc/uptime")).Trim(), CultureInfo.InvariantCulture);
}

public sealed class CloudKernelTests(CloudKernelFixture fixture) : LinuxTests(fixture), IClassFixture<CloudKernelFixture>;

public sealed class GenericKernelTests(GenericKernelFixture fixture) : LinuxTests(fixture), IClassFixture<GenericKernelFixture>;
