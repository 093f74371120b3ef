using System.Diagnostics;
using KvmSharp.Cli.CommandLine;

namespace KvmSharp.Cli.Debian;

/// <summary>Runs the host's own package tools and hands back what they print.</summary>
internal static class HostTool
{
    internal readonly record struct Result(int ExitCode, string Output, string Error)
    {
        public bool Succeeded => ExitCode == 0;

        /// <summary>The last line that says something, for a one-line error message.</summary>
        public string LastMessage
        {
            get
            {
                string[] lines = (Error + "\n" + Output).Split('\n', StringSplitOptions.RemoveEmptyEntries | StringSplitOptions.TrimEntries);
                return lines.FirstOrDefault(line => line.StartsWith("E:", StringComparison.Ordinal))
                    ?? (lines.Length > 0 ? lines[^1] : $"exit status {ExitCode}");
            }
        }
    }

    public static void Require(params ReadOnlySpan<string> tools)
    {
        foreach (string tool in tools)
        {
            if (Find(tool) is null)
            {
                throw new CliException($"'{tool}' is not on the PATH; 'kvmsharp run debian' needs the host's apt tools (elsewhere use --kernel and --initrd)");
            }
        }
    }

    public static string? Find(string tool)
    {
        foreach (string directory in (Environment.GetEnvironmentVariable("PATH") ?? "").Split(':'))
        {
            string path = Path.Combine(directory.Length == 0 ? "." : directory, tool);
            if (File.Exists(path))
            {
                return path;
            }
        }

        return null;
    }

    public static ProcessStartInfo StartInfo(string tool, IEnumerable<string> arguments, string? directory = null)
    {
        var start = new ProcessStartInfo(tool, arguments)
        {
            RedirectStandardInput = true,
            RedirectStandardOutput = true,
            RedirectStandardError = true,
            WorkingDirectory = directory ?? "",
        };
        start.Environment["LC_ALL"] = "C";
        start.Environment["DEBIAN_FRONTEND"] = "noninteractive";
        return start;
    }

    public static async Task<Result> RunAsync(
        string tool, IEnumerable<string> arguments, string? directory, CancellationToken cancellation)
    {
        using Process process = Process.Start(StartInfo(tool, arguments, directory))
            ?? throw new CliException($"cannot start '{tool}'");
        process.StandardInput.Close();
        try
        {
            Task<string> output = process.StandardOutput.ReadToEndAsync(cancellation);
            Task<string> error = process.StandardError.ReadToEndAsync(cancellation);
            await process.WaitForExitAsync(cancellation).ConfigureAwait(false);
            return new Result(process.ExitCode, await output.ConfigureAwait(false), await error.ConfigureAwait(false));
        }
        catch (OperationCanceledException)
        {
            process.Kill(entireProcessTree: true);
            throw;
        }
    }
}
