using System.Diagnostics;

namespace KvmSharp.Cli.Terminal;

/// <summary>
/// Puts the terminal on standard input into raw mode, so that every key, Ctrl-C too, reaches the
/// guest. Disposing restores what was set before; so does the end of the process by a signal that
/// it can see. The work is done by <c>stty</c>, since the base library has no call for it.
/// </summary>
internal sealed class RawTerminal : IDisposable
{
    private readonly string _savedSettings;
    private int _restored;

    private RawTerminal(string savedSettings)
    {
        _savedSettings = savedSettings;
        AppDomain.CurrentDomain.ProcessExit += OnProcessExit;
    }

    /// <summary>Switches to raw mode; <see langword="null"/> if this terminal cannot be switched.</summary>
    public static RawTerminal? Enter()
    {
        if (Stty("-g") is not { Length: > 0 } saved)
        {
            return null;
        }

        var terminal = new RawTerminal(saved.Trim());
        if (Stty("raw", "-echo") is null)
        {
            terminal.Dispose();
            return null;
        }

        return terminal;
    }

    public void Dispose()
    {
        if (Interlocked.Exchange(ref _restored, 1) == 0)
        {
            AppDomain.CurrentDomain.ProcessExit -= OnProcessExit;
            _ = Stty(_savedSettings);
        }
    }

    private void OnProcessExit(object? sender, EventArgs arguments) => Dispose();

    // Standard input is inherited: it is the terminal that stty works on.
    private static string? Stty(params string[] arguments)
    {
        try
        {
            using Process? stty = Process.Start(new ProcessStartInfo("stty", arguments)
            {
                RedirectStandardOutput = true,
                RedirectStandardError = true,
            });
            string output = stty?.StandardOutput.ReadToEnd() ?? "";
            stty?.WaitForExit();
            return stty?.ExitCode == 0 ? output : null;
        }
        catch (System.ComponentModel.Win32Exception)
        {
            return null;
        }
    }
}
