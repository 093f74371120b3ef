using KvmSharp.Storage;

namespace KvmSharp.Tests.Storage;

/// <summary>
/// Crashes at random moments of random work, with any of the writes since the last flush lost, torn or reordered. The image
/// must then be consistent and hold what was flushed.
/// </summary>
public sealed class CrashConsistencyTests
{
    private const int Crashes = 5;
    private const int MutantCrashes = 25;
    private const int StatesPerCrash = 2;

    public static TheoryData<string, int> Images => new()
    {
        { "raw", 14 },
        { "4k", 14 },
        { "512", 14 },
        { "v2", 14 },
        { "snapshots", 14 },
        { "overlay", 14 },
        { "compressed4k", 14 },
        { "grow", 4 },
    };

    // 102 workloads * 5 crashes * 2 states = 1020 schedules.
    [Theory]
    [MemberData(nameof(Images))]
    public void NothingFlushedIsLost(string image, int workloads)
    {
        for (var seed = 0; seed < workloads; seed++)
        {
            var failure = new Workload(image, seed).Run(Crashes, static (_, _) => false);
            Assert.True(failure is null, $"seed {seed}: {failure}");
        }
    }

    [Theory]
    [MemberData(nameof(Images))]
    public void WithoutFlushesTheTestFails(string image, int workloads) =>
        Assert.Contains(Enumerable.Range(0, workloads), seed => new Workload(image, seed).Run(MutantCrashes, static (_, _) => true) is not null);

    // The last flush of a request stays, so that only the order within it is lost.
    [Theory]
    [InlineData("4k", 14)]
    [InlineData("512", 14)]
    [InlineData("v2", 14)]
    [InlineData("snapshots", 14)]
    [InlineData("compressed4k", 14)]
    public void WithoutFlushesBetweenTablesTheTestFails(string image, int workloads) => Assert.Contains(
        Enumerable.Range(0, workloads),
        seed => new Workload(image, seed).Run(MutantCrashes, static (number, lastOfRequest) => !lastOfRequest.Contains(number)) is not null);

    [Fact]
    public void RefcountTableMovesInTheTest()
    {
        var image = MakeImage("grow");
        var store = new RecordingStore(image);
        new Workload("grow", 0).Execute(store, new SectorHistory("grow", image), static () => { });
        var now = new byte[8];
        store.Read(48, now);
        Assert.NotEqual(image.AsSpan(48, 8).ToArray(), now);
    }

    private static byte[] MakeImage(string name)
    {
        var store = new MemoryImageStore();
        switch (name)
        {
            case "raw":
                store.SetLength(256 << 10);
                break;
            case "4k":
                Qcow2Image.Create(store, 1 << 20, new Qcow2CreateOptions { ClusterSize = 4096 });
                break;
            case "512":
                Qcow2Image.Create(store, 256 << 10, new Qcow2CreateOptions { ClusterSize = 512 });
                break;
            case "v2":
                Qcow2Image.Create(store, 256 << 10, new Qcow2CreateOptions { ClusterSize = 1024, Version = 2 });
                break;
            case "grow":
                // As if made for a smaller disk: the refcount table must move when the disk fills.
                Qcow2Image.Create(store, 4 << 20, new Qcow2CreateOptions { ClusterSize = 512, RefcountBits = 64 });
                store.Write(56, [0, 0, 0, 1]);
                using (var disk = Qcow2Image.Open(store))
                {
                    disk.Write(2 << 20, Enumerable.Repeat((byte)7, 3800 * 512).ToArray());
                }
                break;
            default:
                return GoldenImages.Load(name);
        }
        return store.ToArray();
    }

    private static IBlockBackend Open(string name, IImageStore store) => name == "raw" ? new RawBlockBackend(store) : GoldenImages.Open(name, store);

    /// <summary>Random requests that are the same for the same seed, with crashes at random operations of the store.</summary>
    private sealed class Workload(string name, int seed)
    {
        private const int Requests = 60;

        private readonly byte[] _start = MakeImage(name);

        /// <summary>Runs the requests; returns what is wrong after a crash, or null.</summary>
        /// <param name="isFlushLost">Whether a flush does nothing: its number, and the numbers of those that end a request.</param>
        public string? Run(int crashCount, Func<int, HashSet<int>, bool> isFlushLost)
        {
            // Once to know how many operations there are and which flush is the last of its request.
            var lastOfRequest = new HashSet<int>();
            var store = new RecordingStore(_start);
            Execute(store, new SectorHistory(name, _start), () => lastOfRequest.Add(store.Flushes - 1));
            var total = store.Operations;

            Assert.True(total > crashCount);
            var crashes = new Random(seed + 1000);
            var points = new HashSet<int>();
            while (points.Count < crashCount)
            {
                points.Add(crashes.Next(total));
            }
            string? failure = null;
            var history = new SectorHistory(name, _start);
            var recorded = new RecordingStore(_start) { IsFlushLost = number => isFlushLost(number, lastOfRequest) };
            recorded.BeforeOperation = number =>
            {
                for (var state = 0; failure is null && points.Contains(number) && state < StatesPerCrash; state++)
                {
                    failure = Examine(recorded.Crash(crashes), history) is { } problem ? $"crash before operation {number}: {problem}" : null;
                }
            };
            Execute(recorded, history, static () => { });
            return failure;
        }

        public void Execute(RecordingStore store, SectorHistory history, Action afterRequest)
        {
            var random = new Random(seed);
            using var disk = Open(name, store);
            var sectors = (int)(disk.Length / 512);
            for (var request = 0; request < Requests; request++)
            {
                var count = random.Next(3) == 0 ? random.Next(1, 65) : random.Next(1, 9);
                var first = random.Next(sectors - count + 1);
                switch (random.Next(10))
                {
                    case < 6:
                        var data = new byte[count * 512];
                        random.NextBytes(data);
                        history.Writing(first, data);
                        disk.Write(first * 512L, data);
                        break;
                    case 6:
                        history.Writing(first, new byte[count * 512]);
                        disk.WriteZeroes(first * 512L, count * 512L, random.Next(2) == 0);
                        break;
                    case 7:
                        history.Writing(first, new byte[count * 512]);
                        disk.Discard(first * 512L, count * 512L);
                        history.Settle(first, count, disk);
                        break;
                    default:
                        disk.Flush();
                        history.Flushed();
                        break;
                }
                afterRequest();
            }
        }

        private string? Examine(byte[] image, SectorHistory history)
        {
            var store = new MemoryImageStore(image);
            try
            {
                if (name != "raw" && Qcow2Image.Check(store) is { Errors: > 0 } result)
                {
                    return result.Messages[0];
                }
                using (var disk = Open(name, store))
                {
                    if (history.Compare(disk.ReadAll()) is { } difference)
                    {
                        return difference;
                    }
                    var model = new DiskModel(seed, disk, 20_000);
                    model.Run(disk, 10);
                    model.Verify(disk);
                }
                return name != "raw" && Qcow2Image.Check(store) is { Errors: > 0 } later ? $"after more writes: {later.Messages[0]}" : null;
            }
            catch (StorageException exception)
            {
                return exception.Message;
            }
            catch (Xunit.Sdk.TrueException exception)
            {
                return exception.Message;
            }
        }
    }

    /// <summary>What each sector may contain: what it held at the last flush, or anything that was written since.</summary>
    private sealed class SectorHistory
    {
        private readonly byte[] _now;
        private readonly List<(int Sector, ulong Hash)> _since = [];
        private ulong[] _flushed;

        public SectorHistory(string name, byte[] image)
        {
            using var disk = Open(name, new MemoryImageStore(image, isReadOnly: true));
            _now = disk.ReadAll();
            _flushed = Hashes(_now);
        }

        public void Writing(int first, byte[] data)
        {
            for (var i = 0; i < data.Length / 512; i++)
            {
                _since.Add((first + i, Hash(data.AsSpan(i * 512, 512))));
            }
            data.CopyTo(_now.AsSpan(first * 512));
        }

        /// <summary>Takes over what a discard left.</summary>
        public void Settle(int first, int count, IBlockBackend disk) => disk.Read(first * 512L, _now.AsSpan(first * 512, count * 512));

        public void Flushed()
        {
            _since.Clear();
            _flushed = Hashes(_now);
        }

        public string? Compare(byte[] content)
        {
            var allowed = _since.ToHashSet();
            var found = Hashes(content);
            for (var sector = 0; sector < found.Length; sector++)
            {
                if (found[sector] != _flushed[sector] && !allowed.Contains((sector, found[sector])))
                {
                    return $"sector {sector} has other content";
                }
            }
            return null;
        }

        private static ulong[] Hashes(byte[] content) => [.. Enumerable.Range(0, content.Length / 512).Select(i => Hash(content.AsSpan(i * 512, 512)))];

        // FNV-1a over words is enough to tell random sectors apart.
        private static ulong Hash(ReadOnlySpan<byte> sector)
        {
            var hash = 0xcbf29ce484222325UL;
            foreach (var word in System.Runtime.InteropServices.MemoryMarshal.Cast<byte, ulong>(sector))
            {
                hash = (hash ^ word) * 0x100000001b3UL;
                hash ^= hash >> 29;
            }
            return hash;
        }
    }
}
