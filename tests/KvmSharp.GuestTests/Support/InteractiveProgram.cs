using System.Diagnostics;
using System.Text;

namespace KvmSharp.GuestTests.Support;

/// <summary>A program that is talked to through its standard streams.</summary>
internal sealed class InteractiveProgram : IDisposable
{
    private readonly Process _process;
    private readonly StringBuilder _output = new();
    private readonly Task _reader;
    private readonly Task<string> _error;
    private readonly Stopwatch _stopwatch = Stopwatch.StartNew();
    private int _position;

    public InteractiveProgram(string program, IEnumerable<string> arguments)
    {
        _process = Process.Start(new ProcessStartInfo(program, arguments)
        {
            RedirectStandardInput = true,
            RedirectStandardOutput = true,
            RedirectStandardError = true,
        })!;
        _error = _process.StandardError.ReadToEndAsync();
        _reader = Task.Run(ReadAsync);
    }

    public int Id => _process.Id;

    public void Send(string text)
    {
        _process.StandardInput.Write(text);
        _process.StandardInput.Flush();
    }

    public async Task ExpectAsync(string text, TimeSpan limit)
    {
        var waited = Stopwatch.StartNew();
        while (true)
        {
            lock (_output)
            {
                int found = _output.ToString(_position, _output.Length - _position).IndexOf(text, StringComparison.Ordinal);
                if (found >= 0)
                {
                    _position += found + text.Length;
                    return;
                }

                Assert.True(waited.Elapsed < limit && !_process.HasExited, $"'{text}' did not come:\n{_output}");
            }

            await Task.Delay(50);
        }
    }

    public async Task<CommandResult> WaitAsync(TimeSpan limit)
    {
        using var expiry = new CancellationTokenSource(limit);
        await _process.WaitForExitAsync(expiry.Token);
        await _reader;
        return new CommandResult(_process.ExitCode, _output.ToString(), await _error, _stopwatch.Elapsed);
    }

    /// <summary>Kills the program (SIGKILL) and returns what it had printed.</summary>
    public Task<CommandResult> KillAsync()
    {
        _process.Kill();
        return WaitAsync(TimeSpan.FromMinutes(1));
    }

    public void Dispose()
    {
        if (!_process.HasExited)
        {
            _process.Kill(entireProcessTree: true);
        }

        _process.Dispose();
    }

    private async Task ReadAsync()
    {
        var buffer = new char[4096];
        int count;
        while ((count = await _process.StandardOutput.ReadAsync(buffer)) > 0)
        {
            lock (_output)
            {
                _output.Append(buffer, 0, count);
            }
        }
    }
}
