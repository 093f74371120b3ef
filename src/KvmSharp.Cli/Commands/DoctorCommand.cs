using System.Buffers;
using System.Diagnostics;
using System.Globalization;
using System.Runtime.InteropServices;
using System.Text;
using System.Text.Json;
using KvmSharp.Cli.CommandLine;
using KvmSharp.Cli.Debian;
using KvmSharp.Cli.Demo;
using KvmSharp.Cli.Terminal;
using KvmSharp.Devices;

namespace KvmSharp.Cli.Commands;

internal enum CheckOutcome
{
    Ok,
    Warning,
    Failed,
}

internal sealed record CheckResult(string Name, CheckOutcome Outcome, string Detail);

/// <summary><c>kvmsharp doctor</c>: says whether this host can run guests, and what is missing.</summary>
internal static class DoctorCommand
{
    // What programs for x86-64-v2 may use: x86-64 psABI, "Machine Interface".
    private static readonly string[] _level2 =
    [
        "cmov", "cx8", "fpu", "fxsr", "mmx", "syscall", "sse", "sse2", "cx16", "lahf-lm", "popcnt", "sse3", "ssse3", "sse4.1", "sse4.2",
    ];

    private static readonly TimeSpan SelfTestLimit = TimeSpan.FromSeconds(30);

    public static int Run(IReadOnlyList<string> arguments)
    {
        bool asJson = false;
        var reader = new ArgumentReader(arguments);
        while (reader.MoveNext())
        {
            asJson = reader.Current == "--json" ? true : throw reader.Unknown();
        }

        CheckResult[] results = [Host(), Core(), Processor(), Memory(), SelfTest(), Tools("terminal", "stty"), Tools("run debian", "apt-get", "apt-cache", "dpkg-deb")];
        Messages.Output.WriteLine(asJson ? ToJson(results) : ToText(results));
        CheckResult? failed = Array.Find(results, result => result.Outcome == CheckOutcome.Failed);
        return failed is null ? ExitStatus.Success : throw new CliException($"{failed.Name}: {failed.Detail}");
    }

    private static CheckResult Host()
    {
        bool supported = OperatingSystem.IsLinux() && RuntimeInformation.ProcessArchitecture == Architecture.X64;
        string detail = $"{RuntimeInformation.OSDescription}, {RuntimeInformation.ProcessArchitecture}, {RuntimeInformation.FrameworkDescription}";
        return new CheckResult(
            "host", supported ? CheckOutcome.Ok : CheckOutcome.Failed, supported ? detail : $"{detail}: only Linux on x86-64 is supported");
    }

    private static CheckResult Core()
    {
        try
        {
            return new CheckResult("execution core", CheckOutcome.Ok, $"loaded; {CpuModel.SupportedFeatureNames.Count} CPU features");
        }
        catch (NativeLibraryException exception)
        {
            return new CheckResult("execution core", CheckOutcome.Failed, exception.Message);
        }
    }

    private static CheckResult Processor()
    {
        try
        {
            string[] missing = [.. _level2.Except(CpuModel.SupportedFeatureNames)];
            return missing.Length == 0
                ? new CheckResult("default CPU model", CheckOutcome.Ok, CpuModel.Default.Name)
                : new CheckResult("default CPU model", CheckOutcome.Warning, $"{CpuModel.Default.Name} without {string.Join(", ", missing)}");
        }
        catch (NativeLibraryException exception)
        {
            return new CheckResult("default CPU model", CheckOutcome.Failed, exception.Message);
        }
    }

    private static CheckResult Memory()
    {
        long available = GC.GetGCMemoryInfo().TotalAvailableMemoryBytes;
        string detail = string.Create(CultureInfo.InvariantCulture, $"{available >> 20} MiB");
        return available >= RunOptions.DefaultMemory
            ? new CheckResult("memory", CheckOutcome.Ok, detail)
            : new CheckResult("memory", CheckOutcome.Warning, $"{detail}: less than the default guest's {RunOptions.DefaultMemory >> 20} MiB");
    }

    private static CheckResult SelfTest()
    {
        try
        {
            var stopwatch = Stopwatch.StartNew();
            using var machine = new PcMachine(new PcMachineOptions
            {
                MemorySize = 64UL << 20,
                Kernel = DemoGuest.Load(),
                SerialPorts = [new MemoryCharacterBackend()],
            });
            machine.Start();
            Task<VmExit> end = machine.WaitForExitAsync();
            bool poweredOff = end.Wait(SelfTestLimit) && end.Result.Kind == VmExitKind.PowerOff;
            string detail = string.Create(CultureInfo.InvariantCulture, $"demo guest powered off after {stopwatch.Elapsed.TotalSeconds:F1} s");
            return poweredOff
                ? new CheckResult("self-test", CheckOutcome.Ok, detail)
                : new CheckResult("self-test", CheckOutcome.Failed, end.IsCompleted ? $"demo guest ended with {end.Result.Kind}" : "demo guest did not end");
        }
        catch (KvmSharpException exception)
        {
            return new CheckResult("self-test", CheckOutcome.Failed, exception.Message);
        }
    }

    private static CheckResult Tools(string name, params string[] tools)
    {
        string[] missing = [.. tools.Where(tool => HostTool.Find(tool) is null)];
        return missing.Length == 0
            ? new CheckResult(name, CheckOutcome.Ok, $"found {string.Join(", ", tools)}")
            : new CheckResult(name, CheckOutcome.Warning, $"not on the PATH: {string.Join(", ", missing)}");
    }

    private static string ToText(IEnumerable<CheckResult> results) => string.Join(
        Environment.NewLine,
        results.Select(result => string.Create(CultureInfo.InvariantCulture, $"{Label(result.Outcome),-8} {result.Name,-18} {result.Detail}")));

    private static string Label(CheckOutcome outcome) => outcome switch
    {
        CheckOutcome.Ok => "ok",
        CheckOutcome.Warning => "warning",
        _ => "failed",
    };

    private static string ToJson(IEnumerable<CheckResult> results)
    {
        var buffer = new ArrayBufferWriter<byte>();
        using (var json = new Utf8JsonWriter(buffer))
        {
            json.WriteStartArray();
            foreach (CheckResult result in results)
            {
                json.WriteStartObject();
                json.WriteString("name", result.Name);
                json.WriteString("outcome", Label(result.Outcome));
                json.WriteString("detail", result.Detail);
                json.WriteEndObject();
            }

            json.WriteEndArray();
        }

        return Encoding.UTF8.GetString(buffer.WrittenSpan);
    }
}
