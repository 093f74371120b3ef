using System.Runtime.InteropServices;
using System.Text;
using KvmSharp.Boot;
using KvmSharp.Cli.CommandLine;
using KvmSharp.Cli.Debian;
using KvmSharp.Cli.Demo;
using KvmSharp.Cli.Terminal;
using KvmSharp.Devices;

namespace KvmSharp.Cli.Commands;

/// <summary><c>kvmsharp run</c>: builds a PC, connects it to this process's streams, and waits for its end.</summary>
internal sealed class RunCommand : IDisposable
{
    private const string DebianAppend = "console=ttyS0";

    private readonly RunOptions _options;
    private readonly CancellationTokenSource _stop = new();
    private readonly List<IDisposable> _resources = [];
    private string? _stopReason;
    private int _stopStatus = ExitStatus.Failure;

    private RunCommand(RunOptions options) => _options = options;

    public static async Task<int> RunAsync(IReadOnlyList<string> arguments)
    {
        using var command = new RunCommand(RunOptionsParser.Parse(arguments));
        return await command.RunAsync().ConfigureAwait(false);
    }

    public void Dispose()
    {
        for (int i = _resources.Count - 1; i >= 0; i--)
        {
            _resources[i].Dispose();
        }

        _stop.Dispose();
    }

    private async Task<int> RunAsync()
    {
        using PosixSignalRegistration interrupt = StopOn(PosixSignal.SIGINT, 2);
        using PosixSignalRegistration terminate = StopOn(PosixSignal.SIGTERM, 15);
        using PosixSignalRegistration hangUp = StopOn(PosixSignal.SIGHUP, 1);

        PcMachineOptions machineOptions = await BuildOptionsAsync().ConfigureAwait(false);
        TextWriter? trace = OpenTrace();
        var report = new RunReport();
        VmExit exit;
        PcMachine? before = null;
        while (true)
        {
            await using var machine = new PcMachine(machineOptions, before);
            if (_options.DebugExitPort is { } port)
            {
                machine.VirtualMachine.Ports.Map(new IsaDebugExit(machine.VirtualMachine), port, 4);
            }

            EnterRawTerminal();
            report.Start();
            exit = await RunOnceAsync(machine, trace).ConfigureAwait(false);
            report.Add(machine.VirtualMachine);
            SaveScreenshot(machine);
            if (exit.Kind != VmExitKind.Reset || _options.NoReboot)
            {
                break;
            }

            before = machine;
        }

        RestoreTerminal();
        return Report(exit, report);
    }

    private async Task<VmExit> RunOnceAsync(PcMachine machine, TextWriter? trace)
    {
        await using CancellationTokenRegistration registration = _stop.Token.Register(machine.VirtualMachine.Stop);
        if (trace is null)
        {
            machine.Start();
        }
        else
        {
            var writer = new TraceWriter(trace, _options.TraceRegisters, _options.TraceCount);
            try
            {
                await Task.Run(() => writer.Run(machine.VirtualMachine, _stop.Token)).ConfigureAwait(false);
            }
            catch (OperationCanceledException)
            {
                machine.VirtualMachine.Stop();
            }
        }

        return await machine.WaitForExitAsync().ConfigureAwait(false);
    }

    private void SaveScreenshot(PcMachine machine)
    {
        if (_options.ScreenshotFile is not { } file || machine.Display is not { } display)
        {
            return;
        }

        try
        {
            display.Capture().SavePng(file);
        }
        catch (Exception exception) when (exception is IOException or UnauthorizedAccessException or NotSupportedException)
        {
            throw new CliException($"--screenshot: cannot write '{file}': {exception.Message}", exception);
        }
    }

    private async Task<PcMachineOptions> BuildOptionsAsync()
    {
        var options = new PcMachineOptions
        {
            VcpuCount = _options.Cpus,
            MemorySize = (ulong)_options.Memory,
            Cpu = ParseCpu(_options.Cpu),
            Clock = _options.VirtualClock ? ClockMode.Virtual : ClockMode.Real,
            Engine = _options.Engine,
            CommandLine = _options.Append ?? "",
            NoReboot = _options.NoReboot,
            Pci = _options.Pci,
            TestDevice = _options.TestDevice,
            PanicDevice = _options.PanicDevice,
            FwCfg = _options.FwCfg ? true : null,
            FwCfgFiles = [.. _options.FwCfgFiles.Select(file => new FwCfgFile(file.Name, ReadFwCfgFile(file.Path)))],
        };

        ICharacterBackend? serial = OpenSerial();
        options = options with
        {
            SerialPorts = serial is null ? [] : [serial],
            DebugConsole = _options.DebugconFile is { } file ? OpenOutput("--debugcon", file) : null,
        };
        var devices = new DeviceSetup(_options, resource => Keep(resource), OpenOutput);
        options = options with { VirtioDevices = devices.Build(), IdeDrives = devices.BuildIde() };
        if (_options.Guest is not null)
        {
            var progress = new ProgressLine(Messages.Error, !Console.IsErrorRedirected);
            var images = new DebianImages(DebianImages.DefaultCacheDirectory(), progress);
            DebianImage image = await images.ObtainAsync(_options.Flavor, _options.Refresh, _stop.Token).ConfigureAwait(false);
            options = options with
            {
                Kernel = BootImage.FromFile(image.Kernel),
                Initrd = BootImage.FromFile(image.Initrd),
                CommandLine = _options.Append is { } append ? $"{DebianAppend} {append}" : DebianAppend,
            };
            return devices.KernelModules.Count == 0 ? options : options with
            {
                Initrd = await images.WithModulesAsync(image, _stop.Token).ConfigureAwait(false),
                CommandLine = $"{options.CommandLine} kvmsharp.modules={string.Join(',', devices.KernelModules)}"
                    + (_options.Networks.Count == 0 ? "" : " kvmsharp.net=dhcp"),
            };
        }

        if (_options.Firmware is { } firmware)
        {
            return options with
            {
                Firmware = BootImage.FromFile(firmware),
                VideoBios = FindVideoBios(firmware),
                BootOrder = _options.BootOrder,
                SystemManagementMode = _options.SystemManagementMode,
                FwCfgFiles = WithSerialConsole(options.FwCfgFiles),
            };
        }

        return options with
        {
            Kernel = _options.Kernel is { } kernel ? BootImage.FromFile(kernel) : DemoGuest.Load(),
            Initrd = _options.Initrd is { } initrd ? BootImage.FromFile(initrd) : null,
        };
    }

    private static byte[] ReadFwCfgFile(string path)
    {
        try
        {
            return File.ReadAllBytes(path);
        }
        catch (Exception exception) when (exception is IOException or UnauthorizedAccessException or NotSupportedException)
        {
            throw new CliException($"--device {DeviceParser.FwCfg}: cannot read '{path}': {exception.Message}", exception);
        }
    }

    // SeaBIOS shows the screen on the first serial port too and takes keys from it, when it finds the port's number here.
    private IReadOnlyList<FwCfgFile> WithSerialConsole(IReadOnlyList<FwCfgFile> files)
    {
        const string Name = "etc/sercon-port";
        const ushort Com1 = 0x3f8;
        return _options.Serial != SerialTarget.Stdio || files.Any(file => file.Name == Name)
            ? files
            : [.. files, new FwCfgFile(Name, BitConverter.GetBytes(Com1))];
    }

    // SeaBIOS comes with a video BIOS for this adapter, in the same directory.
    private BootImage? FindVideoBios(string firmware)
    {
        if (_options.VideoBios is { } file)
        {
            return BootImage.FromFile(file);
        }

        string neighbor = Path.Combine(Path.GetDirectoryName(Path.GetFullPath(firmware)) ?? "", "vgabios-stdvga.bin");
        return File.Exists(neighbor) ? BootImage.FromFile(neighbor) : null;
    }

    private static CpuModel ParseCpu(string? text)
    {
        try
        {
            return text is null ? CpuModel.Default : CpuModel.Parse(text);
        }
        catch (UnsupportedFeatureException exception)
        {
            throw new CliException($"--cpu: {exception.Message}", exception, ExitStatus.Usage);
        }
    }

    private ICharacterBackend? OpenSerial()
    {
        switch (_options.Serial)
        {
            case SerialTarget.Off:
                return null;
            case SerialTarget.File:
                return OpenOutput("--serial", _options.SerialFile!);
            default:
                Stream input = StandardStreams.OpenInput();
                Stream output = StandardStreams.OpenOutput();
                bool watchEscapes = !Console.IsInputRedirected;
                bool waits = _options.Guest is not null && !watchEscapes;
                var ready = Keep(new ManualResetEvent(initialState: !waits));
                return Keep(new StreamCharacterBackend(
                    new GuestOutput(
                        output, message => Stop($"standard output cannot be written: {message}"),
                        Encoding.ASCII.GetBytes(InitramfsBuilder.ReadyText), ready),
                    new GuestInput(input, watchEscapes, OnHostRequest, ready)));
        }
    }

    private StreamCharacterBackend OpenOutput(string option, string path)
    {
        try
        {
            return Keep(new StreamCharacterBackend(Keep(new FileStream(
                path, FileMode.Create, FileAccess.Write, FileShare.Read, bufferSize: 0))));
        }
        catch (Exception exception) when (exception is IOException or UnauthorizedAccessException or NotSupportedException)
        {
            throw new CliException($"{option}: cannot write '{path}': {exception.Message}", exception);
        }
    }

    private TextWriter? OpenTrace()
    {
        switch (_options.Trace)
        {
            case TraceTarget.Off:
                return null;
            case TraceTarget.StandardError:
                return Messages.Error;
            default:
                try
                {
                    return Keep(new StreamWriter(_options.TraceFile!));
                }
                catch (Exception exception) when (exception is IOException or UnauthorizedAccessException)
                {
                    throw new CliException($"--trace: cannot write '{_options.TraceFile}': {exception.Message}", exception);
                }
        }
    }

    private T Keep<T>(T resource)
        where T : IDisposable
    {
        _resources.Add(resource);
        return resource;
    }

    private RawTerminal? Terminal { get; set; }

    private void EnterRawTerminal()
    {
        if (Terminal is null && _options.Serial == SerialTarget.Stdio && !Console.IsInputRedirected)
        {
            Terminal = RawTerminal.Enter();
        }
    }

    private void RestoreTerminal()
    {
        Terminal?.Dispose();
        Terminal = null;
    }

    private void OnHostRequest(HostRequest request)
    {
        if (request == HostRequest.Quit)
        {
            Stop("ended by Ctrl-A x");
        }
        else
        {
            Messages.Error.Write("\r\nCtrl-A x ends the machine; Ctrl-A Ctrl-A sends Ctrl-A to the guest\r\n");
        }
    }

    private PosixSignalRegistration StopOn(PosixSignal signal, int number) =>
        PosixSignalRegistration.Create(signal, context =>
        {
            context.Cancel = true;
            Stop($"ended by {signal}", 128 + number);
        });

    // Stopping waits for the vCPU thread, which may be the one that asks (a write of the guest).
    private void Stop(string reason, int status = ExitStatus.Failure)
    {
        if (Interlocked.CompareExchange(ref _stopReason, reason, null) is null)
        {
            _stopStatus = status;
            _ = Task.Run(_stop.Cancel);
        }
    }

    private int Report(VmExit exit, RunReport report)
    {
        (int status, string? line) = exit.Kind switch
        {
            VmExitKind.PowerOff or VmExitKind.Reset => (ExitStatus.Success, null),
            VmExitKind.DebugExit => (exit.ExitCode & 0xff, null),
            VmExitKind.Stopped => (_stopStatus, _stopReason ?? "stopped"),
            VmExitKind.TripleFault => (ExitStatus.Failure, $"the guest crashed: {exit.Detail}"),
            _ => (ExitStatus.Failure, exit.Detail ?? exit.Kind.ToString()),
        };
        if (_options.Json)
        {
            TextWriter writer = _options.Serial == SerialTarget.Stdio ? Messages.Error : Messages.Output;
            writer.WriteLine(report.ToJson(exit, status));
        }

        return line is null ? status : throw new CliException(line, status);
    }
}
