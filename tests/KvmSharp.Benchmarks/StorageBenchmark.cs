using System.Diagnostics;
using System.Globalization;
using System.Text.RegularExpressions;
using KvmSharp.Storage;

namespace KvmSharp.Benchmarks;

/// <summary>
/// Requests to disk images of each format, one at a time, from and to the host's page cache. Where qemu-img is installed, its
/// own benchmark makes the same requests to the same kind of image in turns.
/// </summary>
internal static partial class StorageBenchmark
{
    private const long DiskSize = 256L << 20;
    private const int SequentialSize = 1 << 20;
    private const int RandomSize = 4096;
    private const int RandomCount = 60_000;

    // Visits every 4 KiB of the disk once, far apart: odd, so without a common factor with the number of blocks.
    private const int RandomStep = 30_011 * RandomSize;

    private enum Kind
    {
        Raw,
        Qcow2,
        Qcow2OverRaw,
        MemoryOverRaw,
    }

    public static async Task RunAsync(int rounds)
    {
        string? peer = FindPeer();
        Console.WriteLine($"Storage: {DiskSize >> 20} MiB disk, page cache, one request at a time; median of {rounds}{(peer is null ? "; qemu-img is not installed" : "")}");
        Console.WriteLine($"{"disk",-16} {"requests",-34} {"KvmSharp",14} {"qemu-img bench",16} {"ratio",8}");
        DirectoryInfo directory = Directory.CreateTempSubdirectory("kvmsharp-bench-");
        try
        {
            foreach (Kind kind in Enum.GetValues<Kind>())
            {
                foreach ((string name, bool write, bool random, bool isNew) in ((string, bool, bool, bool)[])
                [
                    ("sequential write, 1 MiB, new", true, false, true),
                    ("sequential write, 1 MiB", true, false, false),
                    ("sequential read, 1 MiB", false, false, false),
                    ("random write, 4 KiB, new", true, true, true),
                    ("random write, 4 KiB", true, true, false),
                    ("random read, 4 KiB", false, true, false),
                ])
                {
                    await CompareAsync(directory.FullName, peer, kind, name, write, random, isNew, rounds);
                }
            }
        }
        finally
        {
            directory.Delete(recursive: true);
        }
    }

    private static async Task CompareAsync(string directory, string? peer, Kind kind, string name, bool write, bool random, bool isNew, int rounds)
    {
        List<double> ours = [], theirs = [];
        for (var round = 0; round < rounds; round++)
        {
            using (IBlockBackend disk = Prepare(directory, kind, isNew))
            {
                ours.Add(Measure(disk, write, random));
            }

            if (peer is not null && kind is Kind.Raw or Kind.Qcow2)
            {
                Prepare(directory, kind, isNew).Dispose();
                theirs.Add(await MeasurePeerAsync(peer!, directory, kind, write, random));
            }
        }

        double size = random ? RandomSize : SequentialSize;
        double count = random ? RandomCount : DiskSize / SequentialSize;
        string Rate(double seconds) => random
            ? string.Create(CultureInfo.InvariantCulture, $"{count / seconds / 1000:F0} k/s")
            : string.Create(CultureInfo.InvariantCulture, $"{count * size / seconds / 1e6:F0} MB/s");
        double mine = Statistics.Median(ours);
        Console.WriteLine(theirs.Count == 0
            ? $"{kind,-16} {name,-34} {Rate(mine),14}"
            : string.Create(CultureInfo.InvariantCulture, $"{kind,-16} {name,-34} {Rate(mine),14} {Rate(Statistics.Median(theirs)),16} {Statistics.Median(theirs) / mine,7:F2}x"));
    }

    /// <summary>Makes an image that is empty, or full and in the page cache.</summary>
    private static IBlockBackend Prepare(string directory, Kind kind, bool isNew)
    {
        string path = Path.Combine(directory, "disk");
        string bottom = Path.Combine(directory, "bottom");
        File.Delete(path);
        File.Delete(bottom);
        IBlockBackend disk = kind switch
        {
            Kind.Raw => RawBlockBackend.Create(path, DiskSize),
            Kind.Qcow2 => Qcow2Image.Create(path, DiskSize),
            Kind.Qcow2OverRaw => Qcow2Image.CreateOverlay(path, Full(RawBlockBackend.Create(bottom, DiskSize))),
            _ => new OverlayBlockBackend(Full(RawBlockBackend.Create(bottom, DiskSize))),
        };
        return isNew ? disk : Full(disk);
    }

    private static IBlockBackend Full(IBlockBackend disk)
    {
        var data = new byte[SequentialSize];
        Array.Fill(data, (byte)0x5a);
        for (var offset = 0L; offset < DiskSize; offset += data.Length)
        {
            disk.Write(offset, data);
        }

        disk.Flush();
        return disk;
    }

    private static double Measure(IBlockBackend disk, bool write, bool random)
    {
        var buffer = new byte[random ? RandomSize : SequentialSize];
        Array.Fill(buffer, (byte)0xa5);
        long step = random ? RandomStep : SequentialSize;
        long count = random ? RandomCount : DiskSize / SequentialSize;
        var offset = 0L;
        long start = Stopwatch.GetTimestamp();
        for (var i = 0L; i < count; i++)
        {
            if (write)
            {
                disk.Write(offset, buffer);
            }
            else
            {
                disk.Read(offset, buffer);
            }

            offset = (offset + step) % DiskSize;
        }

        return Stopwatch.GetElapsedTime(start).TotalSeconds;
    }

    private static async Task<double> MeasurePeerAsync(string peer, string directory, Kind kind, bool write, bool random)
    {
        List<string> arguments =
        [
            "bench", "-f", kind == Kind.Raw ? "raw" : "qcow2", "-d", "1", "-t", "writeback",
            "-c", (random ? RandomCount : DiskSize / SequentialSize).ToString(CultureInfo.InvariantCulture),
            "-s", (random ? RandomSize : SequentialSize).ToString(CultureInfo.InvariantCulture),
            "-S", (random ? RandomStep : SequentialSize).ToString(CultureInfo.InvariantCulture),
        ];
        if (write)
        {
            arguments.AddRange(["-w", "--pattern=165"]);
        }

        (_, string output) = await Programs.RunAsync(peer, [.. arguments, Path.Combine(directory, "disk")], TimeSpan.FromMinutes(5));
        Match time = TimeTaken().Match(output);
        return time.Success
            ? double.Parse(time.Groups[1].Value, CultureInfo.InvariantCulture)
            : throw new BenchmarkException($"qemu-img bench does not tell how long it took: {output}");
    }

    private static string? FindPeer() => (Environment.GetEnvironmentVariable("PATH") ?? "").Split(':')
        .Select(directory => Path.Combine(directory, "qemu-img")).FirstOrDefault(File.Exists);

    [GeneratedRegex(@"completed in ([0-9.]+) seconds")]
    private static partial Regex TimeTaken();
}
