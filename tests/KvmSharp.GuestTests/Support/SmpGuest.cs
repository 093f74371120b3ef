using System.Globalization;
using System.Runtime.InteropServices;
using System.Text;
using KvmSharp.Boot;
using KvmSharp.Devices;

namespace KvmSharp.GuestTests.Support;

/// <summary>Runs one test of the guest of several processors (tests/guests/smp), its vCPUs spread over the host's processors.</summary>
internal static class SmpGuest
{
    /// <summary>Runs a test that must find no violation; returns what it counted.</summary>
    public static async Task<IReadOnlyDictionary<string, ulong>> RunAsync(string test, ulong iterations, int vcpus, ulong seed, TimeSpan limit)
    {
        var console = new MemoryCharacterBackend();
        await using var machine = new PcMachine(new PcMachineOptions
        {
            MemorySize = 64UL << 20,
            VcpuCount = vcpus,
            Kernel = BootImage.FromFile(TestPaths.Guest("smp.elf")),
            CommandLine = $"test={test} n={iterations} seed={seed} cpus={vcpus}",
            DebugConsole = console,
            IsaDebugExit = true,
            Engine = TestEngine.Value,
        });
        machine.Start();
        SpreadOverProcessors(vcpus);
        Task<VmExit> end = machine.WaitForExitAsync();
        if (await Task.WhenAny(end, Task.Delay(limit)) != end)
        {
            machine.VirtualMachine.Pause();
            IEnumerable<string> places = machine.VirtualMachine.Vcpus.Select(vcpu =>
                string.Create(CultureInfo.InvariantCulture, $"vCPU {vcpu.Index}: {vcpu.InstructionCount} instructions, RIP 0x{vcpu.GetRegisters().Rip:x}, flags 0x{vcpu.GetRegisters().Rflags:x}"));
            Assert.Fail($"{test} with {vcpus} vCPUs did not end\n{string.Join('\n', places)}\n{console.GetOutputText()}");
        }

        string output = console.GetOutputText();
        VmExit exit = await end;
        Assert.True(exit is { Kind: VmExitKind.DebugExit, ExitCode: 1 }, $"{exit}\n{output}");
        var counts = new Dictionary<string, ulong>();
        foreach (string line in output.Split('\n', StringSplitOptions.RemoveEmptyEntries))
        {
            string[] parts = line[(line.IndexOf(": ", StringComparison.Ordinal) + 2)..].Split('=');
            counts[parts[0]] = ulong.Parse(parts[1], CultureInfo.InvariantCulture);
        }

        Assert.Equal(0UL, counts["violations"]);
        return counts;
    }

    // Two vCPUs on one processor take turns, and nothing of what is looked for can happen.
    private static void SpreadOverProcessors(int vcpus)
    {
        var allowed = new byte[128];
        int length = sched_getaffinity(0, allowed.Length, allowed);
        Assert.Equal(0, length);
        int[] processors = [.. Enumerable.Range(0, allowed.Length * 8).Where(n => (allowed[n / 8] >> (n % 8) & 1) != 0)];
        foreach (string task in Directory.GetDirectories("/proc/self/task"))
        {
            string name = File.ReadAllText(Path.Combine(task, "comm"), Encoding.ASCII).Trim();
            if (name.StartsWith("vcpu ", StringComparison.Ordinal) && int.Parse(name.AsSpan(5), CultureInfo.InvariantCulture) is int vcpu && vcpu < vcpus)
            {
                var mask = new byte[128];
                int processor = processors[vcpu % processors.Length];
                mask[processor / 8] = (byte)(1 << (processor % 8));
                Assert.Equal(0, sched_setaffinity(int.Parse(Path.GetFileName(task), CultureInfo.InvariantCulture), mask.Length, mask));
            }
        }
    }

    [DllImport("libc", SetLastError = true)]
    private static extern int sched_setaffinity(int thread, nint length, byte[] mask);

    [DllImport("libc", SetLastError = true)]
    private static extern int sched_getaffinity(int thread, nint length, byte[] mask);
}
