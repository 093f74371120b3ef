using System.Diagnostics;
using System.Text;
using KvmSharp.Boot;
using KvmSharp.Cli.Debian;
using KvmSharp.Devices;

namespace KvmSharp.GuestTests.Support;

/// <summary>A Debian kernel with a shell on its serial port, driven by text as a user would.</summary>
internal sealed class LinuxGuest : IAsyncDisposable
{
    private static readonly TimeSpan BootLimit = TimeSpan.FromSeconds(120);

    /// <summary>Words that a kernel log has only when something is wrong.</summary>
    private static readonly string[] _complaints =
        ["WARNING", "BUG", "Oops", "oops:", "unstable", "lockup", "Call Trace", "detected stall", "unchecked MSR", "segfault", "general protection", "Fatal:"];

    private static readonly TimeSpan CommandLimit = TimeSpan.FromSeconds(60);

    private readonly MemoryCharacterBackend _serial = new();
    private readonly PcMachineOptions _options;
    private int _position;
    private int _commands;

    public LinuxGuest(
        DebianImage image, ClockMode clock = ClockMode.Real, int vcpus = 1, Func<PcMachineOptions, PcMachineOptions>? change = null)
    {
        PcMachineOptions options = CreateOptions(image, _serial, clock) with { VcpuCount = vcpus };
        _options = change is null ? options : change(options);
        Machine = new PcMachine(_options);
    }

    /// <summary>A guest of any other kind, whose first serial port is given.</summary>
    public LinuxGuest(Func<ICharacterBackend, PcMachineOptions> create)
    {
        _options = create(_serial);
        Machine = new PcMachine(_options);
    }

    public PcMachine Machine { get; private set; }

    /// <summary>From the start of the machine to the prompt of the shell.</summary>
    public TimeSpan BootTime { get; private set; }

    public string Output => _serial.GetOutputText();

    public static PcMachineOptions CreateOptions(DebianImage image, ICharacterBackend serial, ClockMode clock = ClockMode.Real) => new()
    {
        MemorySize = 512UL << 20,
        Kernel = BootImage.FromFile(image.Kernel),
        Initrd = BootImage.FromFile(image.Initrd),
        CommandLine = "console=ttyS0",
        Clock = clock,
        SerialPorts = [serial],
        NoReboot = true,
        Engine = TestEngine.Value,
    };

    /// <summary>Boots to the prompt, then to a shell without echo, prompt and line editing.</summary>
    public async Task BootAsync(TimeSpan? limit = null)
    {
        var stopwatch = Stopwatch.StartNew();
        Machine.Start();
        await ExpectAsync("~ # ", limit ?? BootLimit);
        BootTime = stopwatch.Elapsed;
        await OpenShellAsync();
    }

    /// <summary>Logs in as root, then as after <see cref="BootAsync"/>.</summary>
    public async Task LogInAsync(string password, TimeSpan limit)
    {
        await ExpectAsync("login: ", limit);
        Send("root\n");
        await ExpectAsync("Password: ", CommandLimit);
        Send($"{password}\n");
        await ExpectAsync("# ", CommandLimit);
        await OpenShellAsync();
    }

    /// <summary>Runs one command line and returns what it printed; it must succeed.</summary>
    public async Task<string> RunAsync(string command, TimeSpan? limit = null)
    {
        string marker = $"end-of-command-{++_commands}";
        Send($"{command}\necho end-of-'command'-{_commands}=$?\n");
        string output = await ExpectAsync(marker + "=", limit ?? CommandLimit);
        string status = await ExpectAsync("\n", CommandLimit);
        Assert.True(status.Trim() == "0", $"'{command}' ended with {status}: {output}");
        return output[..^(marker.Length + 1)];
    }

    /// <summary>The kernel log, in which nothing may complain.</summary>
    public async Task<string> CleanLogAsync()
    {
        string log = await RunAsync("dmesg");
        string[] bad = [.. log.Split('\n').Where(line => _complaints.Any(word => line.Contains(word, StringComparison.Ordinal)))];
        Assert.True(bad.Length == 0, string.Join('\n', bad));
        return log;
    }

    /// <summary>Waits until the guest resets the machine and starts it anew, as <see cref="PcMachine.RunAsync"/> does.</summary>
    public async Task RestartAsync(TimeSpan limit)
    {
        VmExit exit = await Machine.WaitForExitAsync().WaitAsync(limit);
        Assert.True(exit.Kind == VmExitKind.Reset, $"{exit}\n{Output}");
        await Machine.DisposeAsync();
        Machine = new PcMachine(_options);
        Machine.Start();
    }

    public void Send(string text) => _serial.SendInput(text);

    /// <summary>Waits for a text and returns everything up to and with it, line ends as \n.</summary>
    public async Task<string> ExpectAsync(string text, TimeSpan limit)
    {
        int found = await Task.Run(() => _serial.WaitForOutput(text.Replace("\n", "\r\n"), limit, _position));
        Assert.True(found >= 0, $"'{text}' did not come within {limit.TotalSeconds} s ({Machine.VirtualMachine.Status}):\n{Output}");
        string part = Encoding.UTF8.GetString(_serial.GetOutput().AsSpan(_position..found)); // positions are those of bytes
        _position = found;
        return part.Replace("\r\n", "\n");
    }

    public ValueTask DisposeAsync() => Machine.DisposeAsync();

    private async Task OpenShellAsync()
    {
        Send("dmesg -n 1; stty -echo; sh 2>&1 | cat; exit\n");
        Send("echo shell-is-'ready'\n");
        await ExpectAsync("shell-is-ready\n", CommandLimit);
    }
}
