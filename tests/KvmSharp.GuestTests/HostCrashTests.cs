using System.Globalization;
using System.Text;
using System.Text.Json;
using KvmSharp.Cli.Debian;
using KvmSharp.GuestTests.Support;
using KvmSharp.Storage;
using Xunit.Abstractions;

namespace KvmSharp.GuestTests;

/// <summary>
/// The host's process is killed under a guest that writes files and makes them durable: the image and the file system in it must
/// be in order afterwards, and hold everything that the guest was told is durable. KVMSHARP_CRASHES says how often.
/// </summary>
public sealed class HostCrashTests(ITestOutputHelper output)
{
    private const int KeptFiles = 60;
    private const int KillsPerImage = 20;
    private long _leaks;

    private static readonly TimeSpan BootLimit = TimeSpan.FromMinutes(3);

    /// <summary>Process 1 of the guest after the mount; $1 is the last number that was used.</summary>
    private const string Script = """
        n=$1
        while :; do
            n=$((n + 1))
            rm -f /tmp/disk/data/f$((n - 60))
            yes $n | head -c $((n * 7919 % 100000 + 1)) >/tmp/disk/data/new
            mv /tmp/disk/data/new /tmp/disk/data/f$n
            sync /tmp/disk/data/f$n && sync /tmp/disk/data && echo "file $n durable"
            printf %010d $n | dd of=/tmp/disk/counter conv=notrunc,fsync 2>/dev/null && echo "counter $n durable"
        done
        """;

    [Fact]
    public async Task WhatWasDurableSurvivesTheHost()
    {
        HostTool.Require("mke2fs", "e2fsck", "debugfs");
        int kills = int.Parse(Environment.GetEnvironmentVariable("KVMSHARP_CRASHES") ?? "4", CultureInfo.InvariantCulture);
        int seed = Environment.TickCount;
        output.WriteLine($"seed {seed}");
        var random = new Random(seed);
        using var directory = new TemporaryDirectory();
        DebianImage debian = await DebianCache.CloudAsync();
        string initrd = directory.File("initrd", (await DebianCache.WithModulesAsync(debian)).Bytes.ToArray());
        string image = directory.File("disk.qcow2");
        int last = 0;
        int checkedFiles = 0;
        for (int kill = 0; kill < kills; kill++)
        {
            // Small clusters mean many tables to be kept in order.
            if (kill % KillsPerImage == 0 || kills < KillsPerImage && kill == kills / 2)
            {
                int clusterSize = new[] { 65536, 4096, 512 }[(kills < KillsPerImage ? kill * 2 / kills : kill / KillsPerImage) % 3];
                await CreateAsync(directory, image, clusterSize);
                last = 0;
            }

            last = await WriteUntilKilledAsync(debian, initrd, image, last, random.Next(2500), kill);
            checkedFiles += await CheckAsync(directory, image, last);
        }

        output.WriteLine($"{kills} kills, {checkedFiles} files compared, {_leaks} leaked clusters seen");
    }

    private static async Task CreateAsync(TemporaryDirectory directory, string image, int clusterSize)
    {
        string root = Path.Combine(directory.Path, "root");
        Directory.CreateDirectory(Path.Combine(root, "data"));
        File.WriteAllText(Path.Combine(root, "write.sh"), Script);
        File.WriteAllText(Path.Combine(root, "counter"), "0000000000");
        string raw = directory.File("new.img");
        File.Delete(raw);
        File.Delete(image);
        await ExpectAsync("mke2fs", "-q", "-t", "ext4", "-d", root, raw, "64M");
        using IBlockBackend source = RawBlockBackend.Open(raw, readOnly: true);
        DiskImage.Create(image, ImageFormat.Qcow2, source.Length, new Qcow2CreateOptions { ClusterSize = clusterSize });
        using IBlockBackend target = DiskImage.Open(image);
        DiskImage.Copy(source, target);
        target.Flush();
    }

    /// <summary>Runs the guest, kills it some time after it has begun to write, and returns the last number that was durable.</summary>
    private async Task<int> WriteUntilKilledAsync(DebianImage debian, string initrd, string image, int last, int milliseconds, int kill)
    {
        using var program = new InteractiveProgram(TestPaths.CommandLineProgram,
        [
            "run", "--kernel", debian.Kernel, "--initrd", initrd, "--disk", image, "--memory", "192M", "--engine", kill % 4 == 3 ? "interpreter" : "jit",
            "--append", "console=ttyS0 quiet kvmsharp.modules=virtio_pci,virtio_blk,ext4 kvmsharp.run="
                + $"mkdir,/tmp/disk;,mount,-t,ext4,-o,discard,/dev/vda,/tmp/disk,&&,sh,/tmp/disk/write.sh,{last}",
        ]);
        await program.ExpectAsync(" durable", BootLimit);
        await Task.Delay(milliseconds);
        CommandResult result = await program.KillAsync();
        int[] numbers = [.. result.Output.Split('\n').Select(line => line.Trim().Split(' ')).Where(words => words is ["file", _, "durable"]).Select(words => int.Parse(words[1], CultureInfo.InvariantCulture))];
        Assert.Equal(Enumerable.Range(last + 1, numbers.Length), numbers);
        output.WriteLine($"kill {kill}: {milliseconds} ms after the first of {numbers.Length} files");
        return numbers[^1];
    }

    private async Task<int> CheckAsync(TemporaryDirectory directory, string image, int last)
    {
        CommandResult check = await CommandRunner.KvmSharpAsync(["img", "check", image, "--json"]);
        using JsonDocument report = JsonDocument.Parse(check.Output);
        Assert.True(report.RootElement.GetProperty("errors").GetInt64() == 0, check.ToString());
        _leaks += report.RootElement.GetProperty("leaks").GetInt64(); // allowed, see docs/storage.md
        string raw = directory.File("copy.img");
        string files = directory.File("files");
        if (Directory.Exists(files))
        {
            Directory.Delete(files, recursive: true);
        }

        Directory.CreateDirectory(files);
        using (IBlockBackend source = DiskImage.Open(image, new DiskImageOptions { ReadOnly = true }))
        {
            File.Delete(raw);
            using RawBlockBackend target = RawBlockBackend.Create(raw, source.Length);
            DiskImage.Copy(source, target);
        }

        await ExpectAsync("e2fsck", "-y", "-E", "journal_only", raw);
        await ExpectAsync("e2fsck", "-f", "-n", raw);
        await ExpectAsync("debugfs", "-R", $"rdump / {files}", raw);
        int counter = int.Parse(File.ReadAllText(Path.Combine(files, "counter")), CultureInfo.InvariantCulture);
        Assert.True(counter >= last - 1, $"the counter is {counter}, file {last} was durable");

        // Some of what the guest said last may not have left the process that was killed; it may already delete newer files.
        int compared = 0;
        for (int n = Math.Max(last - KeptFiles / 2, 1); n <= last; n++)
        {
            string path = Path.Combine(files, "data", $"f{n}");
            Assert.True(File.Exists(path), $"file {n} of {last} is missing");
            Assert.True(Content(n).AsSpan().SequenceEqual(File.ReadAllBytes(path)), $"file {n} of {last} is not what was written");
            compared++;
        }

        return compared;
    }

    private static byte[] Content(int n)
    {
        var content = new byte[n * 7919 % 100000 + 1];
        byte[] line = Encoding.ASCII.GetBytes($"{n}\n");
        for (int i = 0; i < content.Length; i++)
        {
            content[i] = line[i % line.Length];
        }

        return content;
    }

    private static async Task ExpectAsync(string tool, params string[] arguments)
    {
        CommandResult result = await CommandRunner.RunAsync(tool, arguments);
        Assert.True(result.Status == 0 || tool == "e2fsck" && arguments.Contains("journal_only") && result.Status == 1, $"{tool}: {result}");
    }
}
