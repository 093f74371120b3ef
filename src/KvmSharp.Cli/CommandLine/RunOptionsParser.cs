using System.Globalization;
using KvmSharp.Cli.Debian;

namespace KvmSharp.Cli.CommandLine;

/// <summary>Turns the arguments of <c>kvmsharp run</c> into <see cref="RunOptions"/>, or says what is wrong.</summary>
internal static class RunOptionsParser
{
    private const string DebianGuest = "debian";

    private static readonly string[] _onlyForDebian = ["--flavor", "--refresh"];
    private static readonly string[] _notForDebian = ["--kernel", "--initrd", "--firmware", "--video-bios", "--screenshot", "--boot", "--smm"];

    public static RunOptions Parse(IReadOnlyList<string> arguments)
    {
        var options = new RunOptions();
        var seen = new HashSet<string>();
        var reader = new ArgumentReader(arguments);
        while (reader.MoveNext())
        {
            if (reader.IsOption && reader.Current is not ("--device" or "--disk" or "--cdrom" or "--net") && !seen.Add(reader.Current))
            {
                throw Usage($"{reader.Current} is given twice");
            }

            options = ParseOne(options, reader);
        }

        Check(options, seen);
        return options;
    }

    private static RunOptions ParseOne(RunOptions options, ArgumentReader reader) => reader.Current switch
    {
        "--kernel" => options with { Kernel = reader.NonEmptyValue("a file") },
        "--initrd" => options with { Initrd = reader.NonEmptyValue("a file") },
        "--append" => options with { Append = reader.Value("a kernel command line") },
        "--cpus" => CheckCpus(options, reader.NonEmptyValue("a number")),
        "--memory" => options with { Memory = MemorySize.Parse("--memory", reader.NonEmptyValue("a size such as 512M")) },
        "--cpu" => options with { Cpu = reader.NonEmptyValue("a model such as x86-64-v2") },
        "--serial" => ParseSerial(options, reader.NonEmptyValue("stdio, file=F or off")),
        "--debugcon" => options with { DebugconFile = reader.NonEmptyValue("a file") },
        "--device" => DeviceParser.ParseDevice(options, reader.NonEmptyValue("a device name")),
        "--clock" => ParseClock(options, reader.NonEmptyValue("real or virtual")),
        "--engine" => ParseEngine(options, reader.NonEmptyValue("auto, interpreter or jit")),
        "--smm" => options with { SystemManagementMode = true },
        "--no-pci" => options with { Pci = false },
        "--no-reboot" => options with { NoReboot = true },
        "--trace" => ParseTrace(options, reader.NonEmptyValue("stderr or a file")),
        "--json" => options with { Json = true },
        "--flavor" => ParseFlavor(options, reader.NonEmptyValue("cloud, generic, 686 or 686-pae")),
        "--refresh" => options with { Refresh = true },
        "--disk" => options with { Disks = [.. options.Disks, DeviceParser.ParseDisk(reader.NonEmptyValue("path=FILE"))] },
        "--cdrom" => options with { CdRoms = [.. options.CdRoms, reader.NonEmptyValue("a file")] },
        "--firmware" => options with { Firmware = reader.NonEmptyValue("a file") },
        "--net" => NetworkParser.Parse(options, reader.NonEmptyValue("user or none")),
        "--video-bios" => options with { VideoBios = reader.NonEmptyValue("a file") },
        "--screenshot" => options with { ScreenshotFile = reader.NonEmptyValue("a file") },
        "--boot" => options with { BootOrder = ParseBootOrder(reader.NonEmptyValue("an order such as cdrom,disk")) },
        _ when reader.IsOption => throw reader.Unknown(),
        _ => ParseGuest(options, reader.Current),
    };

    private static RunOptions ParseGuest(RunOptions options, string name) => name switch
    {
        _ when options.Guest is not null => throw Usage($"unexpected argument '{name}' after '{options.Guest}'"),
        DebianGuest => options with { Guest = name },
        _ => throw Usage($"unknown guest '{name}' (there is 'debian'; for a kernel file use --kernel)"),
    };

    private static RunOptions CheckCpus(RunOptions options, string text)
    {
        if (!int.TryParse(text, NumberStyles.None, CultureInfo.InvariantCulture, out int count) || count < 1)
        {
            throw Usage($"--cpus: '{text}' is not a number of processors");
        }

        return count <= VirtualMachineOptions.MaxVcpuCount
            ? options with { Cpus = count }
            : throw Usage($"--cpus {count}: a machine has at most {VirtualMachineOptions.MaxVcpuCount} processors");
    }

    private static RunOptions ParseSerial(RunOptions options, string text) => text switch
    {
        "stdio" => options with { Serial = SerialTarget.Stdio },
        "off" => options with { Serial = SerialTarget.Off },
        _ when text.StartsWith("file=", StringComparison.Ordinal) && text.Length > 5 =>
            options with { Serial = SerialTarget.File, SerialFile = text[5..] },
        _ => throw Usage($"--serial: '{text}' is none of stdio, file=F, off"),
    };

    private static RunOptions ParseClock(RunOptions options, string text) => text switch
    {
        "real" => options with { VirtualClock = false },
        "virtual" => options with { VirtualClock = true },
        _ => throw Usage($"--clock: '{text}' is neither real nor virtual"),
    };

    private static RunOptions ParseEngine(RunOptions options, string text) => text switch
    {
        "auto" => options with { Engine = ExecutionEngine.Auto },
        "interpreter" => options with { Engine = ExecutionEngine.Interpreter },
        "jit" => options with { Engine = ExecutionEngine.Jit },
        _ => throw Usage($"--engine: '{text}' is none of auto, interpreter, jit"),
    };

    private static RunOptions ParseFlavor(RunOptions options, string text)
    {
        foreach (DebianFlavor flavor in Enum.GetValues<DebianFlavor>())
        {
            if (DebianImages.FlavorName(flavor) == text)
            {
                return options with { Flavor = flavor };
            }
        }

        throw Usage($"--flavor: '{text}' is none of cloud, generic, 686, 686-pae");
    }

    private static RunOptions ParseTrace(RunOptions options, string text)
    {
        string[] parts = text.Split(',');
        foreach (string part in parts.Skip(1))
        {
            if (part == "regs")
            {
                options = options with { TraceRegisters = true };
            }
            else if (part.StartsWith("count=", StringComparison.Ordinal)
                && ulong.TryParse(part.AsSpan(6), NumberStyles.None, CultureInfo.InvariantCulture, out ulong count) && count > 0)
            {
                options = options with { TraceCount = count };
            }
            else
            {
                throw Usage($"--trace: '{part}' is neither regs nor count=N");
            }
        }

        return parts[0] switch
        {
            "" => throw Usage("--trace needs stderr or a file"),
            "stderr" => options with { Trace = TraceTarget.StandardError },
            _ => options with { Trace = TraceTarget.File, TraceFile = parts[0] },
        };
    }

    private static IReadOnlyList<BootDevice> ParseBootOrder(string text)
    {
        BootDevice[] order = [.. text.Split(',').Select(part => part switch
        {
            "disk" => BootDevice.Disk,
            "cdrom" => BootDevice.CdRom,
            "network" => BootDevice.Network,
            _ => throw Usage($"--boot: '{part}' is none of disk, cdrom, network"),
        })];
        return order.Distinct().Count() == order.Length ? order : throw Usage($"--boot: '{text}' names a kind twice");
    }

    private static void Check(RunOptions options, HashSet<string> seen)
    {
        if (options.CdRoms.Count + options.Disks.Count(disk => disk.IsIde) > KvmSharp.Devices.Ide.IdeController.MaxDrives)
        {
            throw Usage($"--cdrom: a machine has at most {KvmSharp.Devices.Ide.IdeController.MaxDrives} IDE disks and CD-ROM drives together");
        }

        if (options.CdRoms.Count != 0 && options.Kernel is null && options.Firmware is null && options.Guest is null)
        {
            throw Usage("--cdrom needs --firmware, --kernel or 'debian'");
        }

        if (options.VirtualClock && options.Networks.Count != 0)
        {
            throw Usage("--net user does not go with --clock virtual: the host's network keeps no virtual time");
        }

        if (options.Guest == DebianGuest)
        {
            if (_notForDebian.FirstOrDefault(seen.Contains) is { } excluded)
            {
                throw Usage($"{excluded} does not go with 'run debian', which brings its own");
            }

            return;
        }

        if (_onlyForDebian.FirstOrDefault(seen.Contains) is { } debianOnly)
        {
            throw Usage($"{debianOnly} goes with 'run debian' only");
        }

        if (options.Firmware is not null && options.Kernel is not null)
        {
            throw Usage("--firmware and --kernel exclude each other");
        }

        if (options.ScreenshotFile is not null && options.Firmware is null)
        {
            throw Usage("--screenshot needs --firmware: without it the machine has no screen");
        }

        if (options.Firmware is null && ((string[])["--video-bios", "--boot", "--smm"]).FirstOrDefault(seen.Contains) is { } firmwareOnly)
        {
            throw Usage($"{firmwareOnly} needs --firmware");
        }

        if (options.Kernel is null && options.Firmware is null && options.Disks.Count != 0)
        {
            throw Usage("--disk needs --firmware, --kernel or 'debian'");
        }

        if (options.Kernel is null && (options.Initrd is not null || options.Append is not null))
        {
            throw Usage($"{(options.Initrd is not null ? "--initrd" : "--append")} needs --kernel");
        }
    }

    private static CliException Usage(string message) => new(message, ExitStatus.Usage);
}
