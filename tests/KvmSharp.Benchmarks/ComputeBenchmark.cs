using System.Buffers.Binary;
using System.Diagnostics;
using KvmSharp.Boot;

namespace KvmSharp.Benchmarks;

/// <summary>
/// Ten compute kernels in a guest with 4 KiB pages: millions of instructions per second of the vCPU,
/// by the core's count of retired instructions, and the same code on the host for comparison. Results are compared too.
/// </summary>
internal static class ComputeBenchmark
{
    private const ulong Memory = 256UL << 20;
    private const ushort StartPort = 0x700; // see tests/guests/kernels/guest.c
    private static readonly TimeSpan Limit = TimeSpan.FromMinutes(5);

    public static async Task RunAsync(ExecutionEngine engine)
    {
        IReadOnlyList<NativeResult> native = await RunNativeAsync();
        IReadOnlyList<Sample> guest = await RunGuestAsync(native.Count, engine);
        Console.WriteLine("Compute, gcc -O2, long mode, 4 KiB pages; best of several runs");
        Console.WriteLine($"{"kernel",-8}{"instructions",14}{"guest ms",11}{"native ms",11}{"slowdown",10}{"MIPS",8}");
        for (int i = 0; i < native.Count; i++)
        {
            if (guest[i].Result != native[i].Result)
            {
                throw new BenchmarkException($"kernel {native[i].Name}: the guest computed {guest[i].Result}, the host {native[i].Result}");
            }

            double nativeMilliseconds = native[i].Nanoseconds / 1e6;
            Console.WriteLine(
                $"{native[i].Name,-8}{guest[i].Instructions,14}{guest[i].Milliseconds,11:F2}{nativeMilliseconds,11:F2}" +
                $"{guest[i].Milliseconds / nativeMilliseconds,10:F1}{guest[i].Mips,8:F0}");
        }

        double slowdown = Statistics.GeometricMean(native.Zip(guest, (n, g) => g.Milliseconds * 1e6 / n.Nanoseconds));
        Console.WriteLine($"geometric mean: {Statistics.GeometricMean(guest.Select(sample => sample.Mips)):F0} MIPS, {slowdown:F1} times native");
    }

    private static async Task<IReadOnlyList<NativeResult>> RunNativeAsync()
    {
        (_, string output) = await Programs.RunAsync(Programs.Guest("kernels-native"), ["8"], Limit);
        return [.. output.Split('\n', StringSplitOptions.RemoveEmptyEntries).Select(line =>
        {
            string[] words = line.Split(' ');
            return new NativeResult(words[0], ulong.Parse(words[1]), double.Parse(words[2]));
        })];
    }

    private static async Task<IReadOnlyList<Sample>> RunGuestAsync(int count, ExecutionEngine engine)
    {
        await using var machine = new PcMachine(new PcMachineOptions
        {
            MemorySize = Memory,
            Engine = engine,
            Kernel = BootImage.FromFile(Programs.Guest("kernels.elf")),
            IsaDebugExit = true,
        });
        var meter = new Meter(machine.VirtualMachine, count);
        using IDisposable mapping = machine.VirtualMachine.Ports.Map(meter, StartPort, 8);
        machine.Start();
        VmExit exit = await machine.WaitForExitAsync().WaitAsync(Limit);
        return exit.Kind == VmExitKind.DebugExit
            ? meter.Best
            : throw new BenchmarkException($"the compute guest ended with {exit.Kind}: {exit.Detail}");
    }

    private sealed record NativeResult(string Name, ulong Result, double Nanoseconds);

    private sealed record Sample(double Milliseconds, ulong Instructions, ulong Result)
    {
        public double Mips => Instructions / Milliseconds / 1000;
    }

    /// <summary>Takes time and retired instructions where the guest says that a kernel starts and ends.</summary>
    private sealed class Meter(VirtualMachine machine, int count) : IIoDevice
    {
        private readonly Sample[] _best = new Sample[count];
        private int _kernel;
        private long _startTime;
        private ulong _startCount;
        private Sample? _running;

        public IReadOnlyList<Sample> Best => _best;

        public void Read(ulong offset, Span<byte> data) => data.Clear();

        public void Write(ulong offset, ReadOnlySpan<byte> data)
        {
            long now = Stopwatch.GetTimestamp();
            uint value = BinaryPrimitives.ReadUInt32LittleEndian(data);
            if (offset == 0)
            {
                _kernel = (int)value;
                _startCount = machine.Vcpus[0].GetStatistics().Instructions;
                _startTime = Stopwatch.GetTimestamp();
            }
            else if (_running is null)
            {
                ulong instructions = machine.Vcpus[0].GetStatistics().Instructions - _startCount;
                _running = new Sample(Stopwatch.GetElapsedTime(_startTime, now).TotalMilliseconds, instructions, value);
            }
            else
            {
                Sample sample = _running with { Result = _running.Result | ((ulong)value << 32) };
                _running = null;
                if (_best[_kernel] is null || sample.Milliseconds < _best[_kernel].Milliseconds)
                {
                    _best[_kernel] = sample;
                }
            }
        }
    }
}
