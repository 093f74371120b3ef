using System.Globalization;
using System.Security.Cryptography;
using KvmSharp.Cli.Debian;
using KvmSharp.Devices;
using KvmSharp.GuestTests.Support;
using Xunit.Abstractions;

namespace KvmSharp.GuestTests;

/// <summary>
/// Several vCPUs: one host thread each in real time, in turns on the virtual clock. KVMSHARP_BOOTS=all boots every kernel
/// with every number of vCPUs; KVMSHARP_SAVE_POINTS is the number of points of one boot at which state is saved.
/// </summary>
public sealed class SmpTests(ITestOutputHelper output)
{
    private const ulong Last = 1_000_000_000;

    public static TheoryData<string, int> Boots()
    {
        var data = new TheoryData<string, int>();
        bool all = Environment.GetEnvironmentVariable("KVMSHARP_BOOTS") == "all";
        foreach (DebianFlavor flavor in Enum.GetValues<DebianFlavor>())
        {
            foreach (int vcpus in (int[])[1, 2, 4, 16])
            {
                // One vCPU is what the other tests of both kernels have; here 2 to 16 in few boots.
                if (all || (flavor, vcpus) is (DebianFlavor.Generic, 2) or (DebianFlavor.Cloud, 16))
                {
                    data.Add(DebianImages.FlavorName(flavor), vcpus);
                }
            }
        }

        return data;
    }

    [Theory]
    [MemberData(nameof(Boots))]
    public async Task AllProcessorsComeUpWithoutAComplaint(string kernel, int vcpus)
    {
        DebianFlavor flavor = Enum.GetValues<DebianFlavor>().Single(value => DebianImages.FlavorName(value) == kernel);
        await using LinuxGuest guest = new(await DebianCache.GetAsync(flavor), vcpus: vcpus);
        await guest.BootAsync(TimeSpan.FromMinutes(6));
        Assert.Equal(vcpus.ToString(CultureInfo.InvariantCulture), (await guest.RunAsync("nproc")).Trim());
        Assert.Equal(vcpus == 1 ? "0" : $"0-{vcpus - 1}", (await guest.RunAsync("cat /sys/devices/system/cpu/online")).Trim());
        // Each of them runs something.
        string ran = await guest.RunAsync($"for i in $(seq 0 {vcpus - 1}); do taskset -c $i sh -c 'cut -d\" \" -f39 /proc/self/stat'; done");
        Assert.Equal(Enumerable.Range(0, vcpus).Select(n => n.ToString(CultureInfo.InvariantCulture)), ran.Split('\n', StringSplitOptions.RemoveEmptyEntries));
        await guest.CleanLogAsync();
        output.WriteLine($"{kernel} with {vcpus} vCPUs: {guest.BootTime.TotalSeconds:f1} s");
    }

    [Fact]
    public async Task FourProcessorsWorkTogether()
    {
        await using LinuxGuest guest = new(await DebianCache.CloudAsync(), vcpus: 4);
        await guest.BootAsync();
        Assert.Equal("4", (await guest.RunAsync("nproc")).Trim());
        await guest.RunAsync(
            "for i in 1 2 3 4 5 6 7 8; do (for j in 1 2 3; do dd if=/dev/zero bs=64k count=16 2>/dev/null | gzip -1 | gunzip | sha256sum; done) > /tmp/o$i & done; wait");
        string sums = await guest.RunAsync("cat /tmp/o* | sort | uniq -c");
        Assert.Equal(["24", Convert.ToHexStringLower(SHA256.HashData(new byte[1 << 20])), "-"],
            sums.Split(' ', StringSplitOptions.RemoveEmptyEntries | StringSplitOptions.TrimEntries));
        await guest.CleanLogAsync();
    }

    [Theory]
    [InlineData(2)]
    [InlineData(4)]
    public async Task TurnsOnTheVirtualClockRepeatOnBothEngines(int vcpus)
    {
        string first = await HashAsync(vcpus, ExecutionEngine.Interpreter);
        Assert.Equal(first, await HashAsync(vcpus, ExecutionEngine.Interpreter));
        Assert.Equal(first, await HashAsync(vcpus, ExecutionEngine.Jit));
        output.WriteLine($"{vcpus} vCPUs: {first}");
    }

    /// <summary>A boot that moves from machine to machine ends where one that stays does.</summary>
    [Fact]
    public async Task StateOfTwoProcessorsIsWholeAtAnyPoint()
    {
        int points = Environment.GetEnvironmentVariable("KVMSHARP_SAVE_POINTS") is { Length: > 0 } text ? int.Parse(text, CultureInfo.InvariantCulture) : 6;
        PcMachine machine = await CreateAsync(2);
        try
        {
            foreach (ulong point in RandomPoints(points))
            {
                Assert.True(machine.VirtualMachine.RunUntil(point));
                MachineState saved = machine.VirtualMachine.SaveState();
                PcMachine next = await CreateAsync(2);
                await machine.DisposeAsync();
                machine = next;
                machine.VirtualMachine.LoadState(saved);
                StateComparison.AssertEqual(saved, machine.VirtualMachine.SaveState());
            }

            Assert.True(machine.VirtualMachine.RunUntil(Last));
            Assert.True(machine.VirtualMachine.Vcpus[1].InstructionCount > 1_000_000);
            Assert.Equal(await HashAsync(2, TestEngine.Value), Convert.ToHexString(machine.VirtualMachine.ComputeStateHash()));
            output.WriteLine($"{points} points");
        }
        finally
        {
            await machine.DisposeAsync();
        }
    }

    // Up to the end of the boot; the same ones each time.
    private static IEnumerable<ulong> RandomPoints(int count)
    {
        var random = new Random(count);
        return Enumerable.Range(0, count).Select(_ => (ulong)random.NextInt64(1, (long)Last)).Order().ToArray();
    }

    private static Task<PcMachine> CreateAsync(int vcpus) => CreateAsync(vcpus, TestEngine.Value);

    private static async Task<PcMachine> CreateAsync(int vcpus, ExecutionEngine engine)
    {
        PcMachineOptions options = LinuxGuest.CreateOptions(await DebianCache.CloudAsync(), new MemoryCharacterBackend(), ClockMode.Virtual);
        return new PcMachine(options with { VcpuCount = vcpus, MemorySize = 256UL << 20, Engine = engine });
    }

    private static async Task<string> HashAsync(int vcpus, ExecutionEngine engine)
    {
        await using PcMachine machine = await CreateAsync(vcpus, engine);
        Assert.True(machine.VirtualMachine.RunUntil(Last));
        Assert.True(machine.VirtualMachine.Vcpus[1].InstructionCount > 1_000_000);
        return Convert.ToHexString(machine.VirtualMachine.ComputeStateHash());
    }
}
