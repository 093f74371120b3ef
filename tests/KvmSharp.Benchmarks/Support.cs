using System.Diagnostics;

namespace KvmSharp.Benchmarks;

/// <summary>A measurement that cannot be made, or whose result is wrong.</summary>
internal sealed class BenchmarkException(string message) : Exception(message);

internal static class Statistics
{
    public static double Median(IEnumerable<double> values)
    {
        double[] sorted = [.. values.Order()];
        int middle = sorted.Length / 2;
        return sorted.Length % 2 == 1 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
    }

    public static double GeometricMean(IEnumerable<double> values) => Math.Exp(values.Average(Math.Log));
}

internal static class Programs
{
    public static string Guest(string name) => Path.Combine(AppContext.BaseDirectory, "guests", name);

    /// <summary>Runs a program to its end and returns its wall time and standard output.</summary>
    public static async Task<(TimeSpan Time, string Output)> RunAsync(string program, IEnumerable<string> arguments, TimeSpan limit)
    {
        var start = new ProcessStartInfo(program, arguments)
        {
            RedirectStandardInput = true,
            RedirectStandardOutput = true,
            RedirectStandardError = true,
        };
        long begin = Stopwatch.GetTimestamp();
        using Process process = Process.Start(start) ?? throw new BenchmarkException($"cannot start {program}");
        process.StandardInput.Close();
        Task<string> output = process.StandardOutput.ReadToEndAsync();
        Task<string> error = process.StandardError.ReadToEndAsync();
        using var expiry = new CancellationTokenSource(limit);
        try
        {
            await process.WaitForExitAsync(expiry.Token);
        }
        catch (OperationCanceledException)
        {
            process.Kill(entireProcessTree: true);
            throw new BenchmarkException($"{program} did not end within {limit.TotalSeconds} s\n{await output}{await error}");
        }

        TimeSpan time = Stopwatch.GetElapsedTime(begin);
        return process.ExitCode == 0
            ? (time, await output)
            : throw new BenchmarkException($"{program} ended with status {process.ExitCode}: {await error}{await output}");
    }
}
