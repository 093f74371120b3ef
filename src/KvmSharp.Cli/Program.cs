using System.Reflection;
using KvmSharp.Cli.CommandLine;
using KvmSharp.Cli.Commands;
using KvmSharp.Cli.Terminal;

namespace KvmSharp.Cli;

internal static class Program
{
    private static async Task<int> Main(string[] arguments)
    {
        try
        {
            return await DispatchAsync(arguments).ConfigureAwait(false);
        }
        catch (CliException exception)
        {
            return Fail(exception.Message, exception.Status);
        }
        catch (KvmSharpException exception)
        {
            return Fail(exception.Message, ExitStatus.Failure);
        }
        catch (OperationCanceledException)
        {
            return Fail("interrupted", ExitStatus.Failure);
        }
        catch (OutOfMemoryException)
        {
            return Fail("the host has not enough memory", ExitStatus.Failure);
        }
        catch (Exception exception)
        {
            return Fail($"internal error ({exception.GetType().Name}): {exception.Message}", ExitStatus.Failure);
        }
    }

    private static async Task<int> DispatchAsync(string[] arguments)
    {
        string[] rest = arguments.Length > 1 ? arguments[1..] : [];
        switch (arguments.FirstOrDefault())
        {
            case "run" when !rest.Contains("--help"):
                return await RunCommand.RunAsync(rest).ConfigureAwait(false);
            case "disasm" when !rest.Contains("--help"):
                return DisasmCommand.Run(rest);
            case "doctor" when !rest.Contains("--help"):
                return DoctorCommand.Run(rest);
            case "img" when !rest.Contains("--help"):
                return ImgCommand.Run(rest);
            case "--help" or "-h" or "help" or "run" or "disasm" or "doctor" or "img":
                Messages.Output.WriteLine(HelpText.Text);
                return ExitStatus.Success;
            case "--version":
                Messages.Output.WriteLine($"kvmsharp {Version()}");
                return ExitStatus.Success;
            case null or "":
                throw new CliException("no command given (see kvmsharp --help)", ExitStatus.Usage);
            case ['-', ..] option:
                throw new CliException($"unknown option '{option}' (see kvmsharp --help)", ExitStatus.Usage);
            case string command:
                throw new CliException($"unknown command '{command}' (see kvmsharp --help)", ExitStatus.Usage);
        }
    }

    private static string Version() =>
        typeof(Program).Assembly.GetCustomAttribute<AssemblyInformationalVersionAttribute>()?.InformationalVersion.Split('+')[0] ?? "unknown";

    private static int Fail(string message, int status)
    {
        Messages.Error.WriteLine("kvmsharp: " + message.ReplaceLineEndings(" "));
        return status;
    }
}
