using System.Diagnostics;

namespace KvmSharp.GuestTests.Support;

/// <summary>What a program printed and how it ended.</summary>
internal sealed record CommandResult(int Status, string Output, string Error, TimeSpan Elapsed)
{
    public override string ToString() => $"status {Status} after {Elapsed.TotalSeconds:F1} s\n-- stdout --\n{Output}\n-- stderr --\n{Error}";
}

/// <summary>Runs programs to their end, never longer than a limit.</summary>
internal static class CommandRunner
{
    public static Task<CommandResult> KvmSharpAsync(IEnumerable<string> arguments, TimeSpan? limit = null, string? input = null) =>
        RunAsync(TestPaths.CommandLineProgram, arguments, limit, input);

    public static async Task<CommandResult> RunAsync(
        string program, IEnumerable<string> arguments, TimeSpan? limit = null, string? input = null,
        string? directory = null, IReadOnlyDictionary<string, string>? environment = null)
    {
        var start = new ProcessStartInfo(program, arguments)
        {
            RedirectStandardInput = true,
            RedirectStandardOutput = true,
            RedirectStandardError = true,
            WorkingDirectory = directory ?? "",
        };
        foreach ((string name, string value) in environment ?? new Dictionary<string, string>())
        {
            start.Environment[name] = value;
        }

        var stopwatch = Stopwatch.StartNew();
        using Process process = Process.Start(start)!;
        Task<string> output = process.StandardOutput.ReadToEndAsync();
        Task<string> error = process.StandardError.ReadToEndAsync();
        await process.StandardInput.WriteAsync(input);
        process.StandardInput.Close();
        TimeSpan allowed = limit ?? TimeSpan.FromSeconds(60);
        using var expiry = new CancellationTokenSource(allowed);
        try
        {
            await process.WaitForExitAsync(expiry.Token);
        }
        catch (OperationCanceledException)
        {
            process.Kill(entireProcessTree: true);
            Assert.Fail($"{program} {string.Join(' ', arguments)} did not end within {allowed.TotalSeconds} s\n{await output}\n{await error}");
        }

        return new CommandResult(process.ExitCode, await output, await error, stopwatch.Elapsed);
    }
}
