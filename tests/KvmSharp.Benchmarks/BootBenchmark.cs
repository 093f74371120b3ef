using System.IO.Compression;
using KvmSharp.Cli.Debian;
using KvmSharp.Cli.Terminal;

namespace KvmSharp.Benchmarks;

/// <summary>
/// From the start of the process to its end: Debian's cloud kernel with an /init that powers off at
/// once, in kvmsharp and in QEMU's translator, in turns.
/// </summary>
internal static class BootBenchmark
{
    private const string Peer = "qemu-system-x86_64";
    private const string Append = "console=ttyS0";
    private const string MemoryMegabytes = "512";

    // The x86-64-v2 of kvmsharp in the peer's terms.
    private const string PeerProcessor = "qemu64,+cx16,+lahf_lm,+popcnt,+sse3,+ssse3,+sse4.1,+sse4.2";
    private static readonly TimeSpan Limit = TimeSpan.FromMinutes(3);

    public static async Task RunAsync(int pairs, ExecutionEngine engine)
    {
        if (HostTool.Find(Peer) is null)
        {
            throw new BenchmarkException($"{Peer} is not installed: there is nothing to compare with");
        }

        var progress = new ProgressLine(Console.Error, !Console.IsErrorRedirected);
        DebianImage image = await new DebianImages(DebianImages.DefaultCacheDirectory(), progress)
            .ObtainAsync(DebianFlavor.Cloud, refresh: false, CancellationToken.None);
        string directory = Directory.CreateTempSubdirectory("kvmsharp-bench-").FullName;
        try
        {
            string initrd = Path.Combine(directory, "initrd");
            File.WriteAllBytes(initrd, BuildInitrd(File.ReadAllBytes(Programs.Guest("init-poweroff"))));
            await MeasureAsync(image, initrd, directory, pairs, engine);
        }
        finally
        {
            Directory.Delete(directory, recursive: true);
        }
    }

    private static async Task MeasureAsync(DebianImage image, string initrd, string directory, int pairs, ExecutionEngine engine)
    {
        string ourSerial = Path.Combine(directory, "ours");
        string peerSerial = Path.Combine(directory, "peer");
        string[] ours =
        [
            "run", "--kernel", image.Kernel, "--initrd", initrd, "--append", Append, "--memory", MemoryMegabytes + "M",
            "--serial", "file=" + ourSerial, "--no-reboot", "--cpu", "x86-64-v2", "--engine", engine.ToString().ToLowerInvariant(),
        ];
        string[] peer =
        [
            "-accel", "tcg", "-nodefaults", "-display", "none", "-no-reboot", "-cpu", PeerProcessor, "-m", MemoryMegabytes,
            "-kernel", image.Kernel, "-initrd", initrd, "-append", Append, "-serial", "file:" + peerSerial,
        ];
        Console.WriteLine($"Boot to power-off, {image.KernelPackage} {image.KernelVersion}, {MemoryMegabytes} MiB, 1 CPU");
        Console.WriteLine($"{"pair",4}  {"kvmsharp",10}  {"QEMU TCG",10}  {"ratio",6}");
        var ratios = new List<double>();
        var times = new List<double>();
        var peerTimes = new List<double>();
        for (int pair = 1; pair <= pairs; pair++)
        {
            double mine = (await Programs.RunAsync(Path.Combine(AppContext.BaseDirectory, "KvmSharp.Cli"), ours, Limit)).Time.TotalSeconds;
            double theirs = (await Programs.RunAsync(Peer, peer, Limit)).Time.TotalSeconds;
            CheckLog(ourSerial);
            CheckLog(peerSerial);
            times.Add(mine);
            peerTimes.Add(theirs);
            ratios.Add(mine / theirs);
            Console.WriteLine($"{pair,4}  {mine,8:F2} s  {theirs,8:F2} s  {mine / theirs,6:F2}");
        }

        Console.WriteLine(
            $"median {Statistics.Median(times):F2} s against {Statistics.Median(peerTimes):F2} s: ratio {Statistics.Median(ratios):F2} " +
            $"({ratios.Min():F2} to {ratios.Max():F2})");
    }

    private static void CheckLog(string path)
    {
        if (!File.ReadAllText(path).Contains("Power down", StringComparison.Ordinal))
        {
            throw new BenchmarkException($"the guest did not power off:\n{File.ReadAllText(path)}");
        }
    }

    private static byte[] BuildInitrd(byte[] init)
    {
        using var content = new MemoryStream();
        using (var gzip = new GZipStream(content, CompressionLevel.Optimal, leaveOpen: true))
        {
            var archive = new CpioWriter(gzip);
            archive.AddDirectory("dev");
            archive.AddCharacterDevice("dev/console", 5, 1, 0x180);
            archive.AddExecutable("init", init);
            archive.Finish();
        }

        return content.ToArray();
    }
}
