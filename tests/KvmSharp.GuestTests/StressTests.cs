using System.Globalization;
using System.IO.Compression;
using KvmSharp.Boot;
using KvmSharp.Cli.Debian;
using KvmSharp.GuestTests.Support;
using Xunit.Abstractions;

namespace KvmSharp.GuestTests;

/// <summary>
/// A self-checking program in a guest with four vCPUs: threads, signals, mappings, code, processes, pipes, futexes.
/// KVMSHARP_STRESS_SECONDS makes it longer, KVMSHARP_STRESS_VCPUS changes the number of vCPUs.
/// </summary>
public sealed class StressTests(ITestOutputHelper output)
{
    [Fact]
    public async Task ResultsAreRightAndTheKernelDoesNotComplain()
    {
        int seconds = Setting("KVMSHARP_STRESS_SECONDS", 20);
        int vcpus = Setting("KVMSHARP_STRESS_VCPUS", 4);
        DebianImage image = await DebianCache.CloudAsync();
        BootImage initrd = BootImage.FromBytes((byte[])[.. File.ReadAllBytes(image.Initrd), .. StressArchive()], "initramfs");
        await using LinuxGuest guest = new(image, vcpus: vcpus, change: options => options with { Initrd = initrd });
        await guest.BootAsync(TimeSpan.FromMinutes(8));
        string results = await guest.RunAsync($"stress {seconds} 2>&1", TimeSpan.FromSeconds(3 * seconds + 300));
        output.WriteLine(results);
        Assert.EndsWith("stress ok\n", results);
        await guest.CleanLogAsync();
        output.WriteLine($"{seconds} s on {vcpus} vCPUs, clean log");
    }

    private static int Setting(string name, int usual) =>
        Environment.GetEnvironmentVariable(name) is { Length: > 0 } text ? int.Parse(text, CultureInfo.InvariantCulture) : usual;

    private static byte[] StressArchive()
    {
        using var content = new MemoryStream();
        using (var gzip = new GZipStream(content, CompressionLevel.Fastest, leaveOpen: true))
        {
            var archive = new CpioWriter(gzip);
            archive.AddExecutable("bin/stress", File.ReadAllBytes(TestPaths.Guest("stress")));
            archive.Finish();
        }

        return content.ToArray();
    }
}
