using System.Globalization;
using System.IO.Compression;
using KvmSharp.Boot;
using KvmSharp.Cli.Debian;
using KvmSharp.Cli.Terminal;

namespace KvmSharp.Benchmarks;

/// <summary>
/// A guest reads and writes its virtio disk past its page cache (tests/guests/disk-load.c), in kvmsharp and in QEMU's translator in
/// turns: the same kernel, the same program, the same file in the host's page cache, both writing back. The guest takes the time.
/// </summary>
internal static class DiskBenchmark
{
    private const string Peer = "qemu-system-x86_64";
    private const int DiskSize = 256 << 20;
    private const int Milliseconds = 1500; // for each kind of request
    private static readonly TimeSpan Limit = TimeSpan.FromMinutes(5);

    public static async Task RunAsync(int pairs, ExecutionEngine engine)
    {
        if (HostTool.Find(Peer) is null)
        {
            throw new BenchmarkException($"{Peer} is not installed: there is nothing to compare with");
        }

        var progress = new ProgressLine(Console.Error, !Console.IsErrorRedirected);
        var images = new DebianImages(DebianImages.DefaultCacheDirectory(), progress);
        DebianImage image = await images.ObtainAsync(DebianFlavor.Cloud, refresh: false, CancellationToken.None);
        BootImage modules = await images.WithModulesAsync(image, CancellationToken.None);
        string directory = Directory.CreateTempSubdirectory("kvmsharp-bench-").FullName;
        try
        {
            string initrd = Path.Combine(directory, "initrd");
            File.WriteAllBytes(initrd, [.. modules.Bytes.Span, .. BuildProgram()]);
            string disk = Path.Combine(directory, "disk");
            File.WriteAllBytes(disk, new byte[DiskSize]);
            await MeasureAsync(image, initrd, disk, directory, pairs, engine);
        }
        finally
        {
            Directory.Delete(directory, recursive: true);
        }
    }

    private static async Task MeasureAsync(DebianImage image, string initrd, string disk, string directory, int pairs, ExecutionEngine engine)
    {
        string append = $"console=ttyS0 quiet kvmsharp.modules=virtio_pci,virtio_blk kvmsharp.run=disk-load,/dev/vda,{Milliseconds}";
        string ourSerial = Path.Combine(directory, "ours");
        string peerSerial = Path.Combine(directory, "peer");
        string[] ours =
        [
            "run", "--kernel", image.Kernel, "--initrd", initrd, "--append", append, "--disk", disk + ",format=raw",
            "--engine", engine.ToString().ToLowerInvariant(), "--serial", "file=" + ourSerial, "--no-reboot",
        ];
        string[] peer =
        [
            "-accel", "tcg", "-nodefaults", "-display", "none", "-no-reboot", "-cpu", "qemu64,+cx16,+lahf_lm,+popcnt,+sse3,+ssse3,+sse4.1,+sse4.2", "-m", "512",
            "-kernel", image.Kernel, "-initrd", initrd, "-append", append, "-serial", "file:" + peerSerial,
            "-drive", $"file={disk},format=raw,if=none,id=disk,cache=writeback", "-device", "virtio-blk-pci,drive=disk",
        ];
        var rates = new SortedDictionary<string, (List<double> Ours, List<double> Peer)>();
        for (int pair = 0; pair < pairs; pair++)
        {
            await RunOneAsync(Path.Combine(AppContext.BaseDirectory, "KvmSharp.Cli"), ours, ourSerial, (name, rate) => Of(name).Ours.Add(rate));
            await RunOneAsync(Peer, peer, peerSerial, (name, rate) => Of(name).Peer.Add(rate));
        }

        Console.WriteLine($"Disk: virtio, raw file of {DiskSize >> 20} MiB in the page cache, written back; 1 MiB sequential, 4 KiB random at depth 1 and 16; medians of {pairs}, MB/s");
        Console.WriteLine($"{"requests",-18} {"kvmsharp",10} {"QEMU TCG",10} {"ratio",6}");
        foreach ((string name, (List<double> own, List<double> other)) in rates)
        {
            Console.WriteLine(string.Create(CultureInfo.InvariantCulture,
                $"{name,-18} {Statistics.Median(own),10:F1} {Statistics.Median(other),10:F1} {Statistics.Median(own.Zip(other, (a, b) => a / b)),6:F2}"));
        }

        (List<double> Ours, List<double> Peer) Of(string name)
        {
            if (!rates.TryGetValue(name, out var value))
            {
                rates[name] = value = ([], []);
            }

            return value;
        }
    }

    private static async Task RunOneAsync(string program, string[] arguments, string serial, Action<string, double> add)
    {
        await Programs.RunAsync(program, arguments, Limit);
        string output = File.ReadAllText(serial);
        string[][] lines = [.. output.Split('\n').Select(line => line.Trim().Split(' ')).Where(words => words.Length == 3 && (words[0].StartsWith("random-", StringComparison.Ordinal) || words[0].StartsWith("sequential-", StringComparison.Ordinal)))];
        if (lines.Length != 6)
        {
            throw new BenchmarkException($"{program}: {output}");
        }

        foreach (string[] words in lines)
        {
            add(words[0], double.Parse(words[1], CultureInfo.InvariantCulture) / double.Parse(words[2], CultureInfo.InvariantCulture) * 1000);
        }
    }

    private static byte[] BuildProgram()
    {
        using var content = new MemoryStream();
        using (var gzip = new GZipStream(content, CompressionLevel.Fastest, leaveOpen: true))
        {
            var archive = new CpioWriter(gzip);
            archive.AddExecutable("bin/disk-load", File.ReadAllBytes(Programs.Guest("disk-load")));
            archive.Finish();
        }

        return content.ToArray();
    }
}
