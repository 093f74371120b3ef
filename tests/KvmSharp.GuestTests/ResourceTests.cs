using System.Diagnostics;
using KvmSharp.Devices;
using KvmSharp.GuestTests.Support;

namespace KvmSharp.GuestTests;

/// <summary>Machines leave nothing behind, and cost nothing while they are idle.</summary>
public sealed class ResourceTests
{
    [Fact]
    public async Task ThousandMachinesLeaveNothingBehind()
    {
        PcMachineOptions options = GuestRunner.Options("hello", new MemoryCharacterBackend());
        await CycleAsync(options, 100);
        Usage before = Usage.Take();
        await CycleAsync(options, 1000);
        Usage after = Usage.Take();
        Assert.True(after.Handles <= before.Handles + 8, $"handles: {before.Handles} before, {after.Handles} after");
        Assert.True(after.Threads <= before.Threads + 8, $"threads: {before.Threads} before, {after.Threads} after");
        Assert.True(after.Mappings <= before.Mappings + 64, $"mappings: {before.Mappings} before, {after.Mappings} after");
        Assert.True(after.Resident <= before.Resident + (48 << 20), $"resident: {before.Resident} before, {after.Resident} after");
    }

    [Fact]
    public async Task SixteenMachinesRunAtOnce()
    {
        Usage before = Usage.Take();
        await Task.WhenAll(Enumerable.Range(0, 16).Select(async _ =>
        {
            var serial = new MemoryCharacterBackend();
            VmExit exit = await PcMachine.RunAsync(DemoGuestTests.Options(serial)).WaitAsync(TimeSpan.FromSeconds(120));
            Assert.True(exit.Kind == VmExitKind.PowerOff, $"{exit}\n{serial.GetOutputText()}");
            Assert.Contains("local APIC ticks", serial.GetOutputText());
        }));
        Usage after = Usage.Take();
        Assert.True(after.Handles <= before.Handles + 16, $"handles: {before.Handles} before, {after.Handles} after");
        Assert.True(after.Threads <= before.Threads + 16, $"threads: {before.Threads} before, {after.Threads} after");
    }

    [Fact]
    public async Task MachinesCanBeDisposedInAnyState()
    {
        foreach (int delay in (int[])[-1, 0, 1, 5])
        {
            for (int i = 0; i < 20; i++)
            {
                var machine = new PcMachine(GuestRunner.Options(i % 2 == 0 ? "spin" : "idle"));
                if (delay >= 0)
                {
                    machine.Start();
                    await Task.Delay(delay);
                }

                await machine.DisposeAsync();
            }
        }
    }

    [Fact]
    public async Task HaltedGuestCostsNoProcessorTime()
    {
        var console = new MemoryCharacterBackend();
        await using var machine = new PcMachine(GuestRunner.Options("idle", console));
        machine.Start();
        Assert.True(console.WaitForOutput("idle", TimeSpan.FromSeconds(60)) > 0);
        double share = await ProcessorShareAsync(TimeSpan.FromSeconds(1.5));
        Assert.True(share < 0.03, $"an idle guest took {share:P1} of a processor");
    }

    /// <summary>
    /// How much of one processor this process takes while it waits. The least of several measurements
    /// counts, since the test host and the runtime have work of their own now and then.
    /// </summary>
    internal static async Task<double> ProcessorShareAsync(TimeSpan time)
    {
        double least = double.MaxValue;
        for (int i = 0; i < 4 && least > 0.01; i++)
        {
            await Task.Delay(300);
            using Process process = Process.GetCurrentProcess();
            TimeSpan before = process.TotalProcessorTime;
            var stopwatch = Stopwatch.StartNew();
            await Task.Delay(time);
            process.Refresh();
            least = Math.Min(least, (process.TotalProcessorTime - before) / stopwatch.Elapsed);
        }

        return least;
    }

    private static async Task CycleAsync(PcMachineOptions options, int count)
    {
        for (int i = 0; i < count; i++)
        {
            await using var machine = new PcMachine(options);
            machine.Start();
            VmExit exit = await machine.WaitForExitAsync().WaitAsync(TimeSpan.FromSeconds(60));
            Assert.Equal(43, exit.ExitCode);
        }
    }

    private sealed record Usage(int Handles, int Threads, int Mappings, long Resident)
    {
        public static Usage Take()
        {
            for (int i = 0; i < 3; i++)
            {
                GC.Collect();
                GC.WaitForPendingFinalizers();
            }

            using Process process = Process.GetCurrentProcess();
            return new Usage(
                Directory.GetFiles("/proc/self/fd").Length,
                Directory.GetDirectories("/proc/self/task").Length,
                File.ReadLines("/proc/self/maps").Count(),
                process.WorkingSet64);
        }
    }
}
