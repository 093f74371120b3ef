using System.Globalization;
using KvmSharp.Devices.Virtio;
using KvmSharp.Storage;

namespace KvmSharp.Cli.CommandLine;

/// <summary>One <c>--disk path=F,key=value...</c>.</summary>
internal sealed record DiskArgument(string Path)
{
    public ImageFormat? Format { get; init; }

    public bool ReadOnly { get; init; }

    public string SerialNumber { get; init; } = "";

    public int Queues { get; init; } = 1;

    public VirtioTransport Transport { get; init; }

    /// <summary>Whether the disk is an IDE one instead of a virtio one.</summary>
    public bool IsIde { get; init; }
}

/// <summary>Reads the arguments of <c>--disk</c> and <c>--device</c>: a list of key=value joined by commas.</summary>
internal static class DeviceParser
{
    public const string DebugExit = "isa-debug-exit";
    public const string TestDevice = "pc-testdev";
    public const string Panic = "pvpanic";
    public const string FwCfg = "fw_cfg";
    public const string Random = "virtio-rng";
    public const string Console = "virtio-console";
    public const string Balloon = "virtio-balloon";

    private const ushort DefaultDebugExitPort = 0xf4;

    private static readonly Dictionary<string, string[]> _devices = new()
    {
        [DebugExit] = ["iobase"],
        [TestDevice] = [],
        [Panic] = [],
        [FwCfg] = ["name", "file"],
        [Random] = ["transport", "seed"],
        [Console] = ["transport", "file"],
        [Balloon] = ["transport", "target"],
    };

    public static RunOptions ParseDevice(RunOptions options, string text)
    {
        string[] parts = text.Split(',');
        string name = parts[0];
        if (!_devices.TryGetValue(name, out string[]? keys))
        {
            throw Usage($"--device: unknown device '{name}' (there are {string.Join(", ", _devices.Keys)})");
        }

        Dictionary<string, string> properties = Split($"--device {name}", parts.Skip(1), []);
        if (properties.Keys.FirstOrDefault(key => !keys.Contains(key)) is { } unknown)
        {
            throw Usage($"--device {name}: unknown property '{unknown}' ({(keys.Length == 0 ? "it has none" : "there is " + string.Join(", ", keys))})");
        }

        if (properties.TryGetValue("transport", out string? transport))
        {
            ParseTransport(transport);
        }

        if (properties.TryGetValue("seed", out string? seed))
        {
            ParseSeed(seed);
        }

        if (properties.TryGetValue("target", out string? target))
        {
            MemorySize.Parse($"--device {name}", target);
        }

        return name switch
        {
            DebugExit when options.DebugExitPort is not null => throw Usage($"--device {name} is given twice"),
            DebugExit => options with { DebugExitPort = properties.TryGetValue("iobase", out string? port) ? ParsePort(port) : DefaultDebugExitPort },
            TestDevice when options.TestDevice => throw Usage($"--device {name} is given twice"),
            TestDevice => options with { TestDevice = true },
            Panic => options with { PanicDevice = true },
            FwCfg => ParseFwCfg(options, properties),
            _ => options with { Devices = [.. options.Devices, new DeviceArgument(name, properties)] },
        };
    }

    // Each may bring a file.
    private static RunOptions ParseFwCfg(RunOptions options, Dictionary<string, string> properties)
    {
        if (properties.Count == 0)
        {
            return options with { FwCfg = true };
        }

        return properties.TryGetValue("name", out string? name) && properties.TryGetValue("file", out string? path)
            ? options with { FwCfg = true, FwCfgFiles = [.. options.FwCfgFiles, (name, path)] }
            : throw Usage($"--device {FwCfg}: a file needs both name= and file=");
    }

    public static DiskArgument ParseDisk(string text)
    {
        // A file's name alone in front stands for path=.
        string[] parts = text.Split(',');
        parts[0] = parts[0].Contains('=', StringComparison.Ordinal) ? parts[0] : $"path={parts[0]}";
        Dictionary<string, string> properties = Split("--disk", parts, ["readonly"]);
        if (!properties.Remove("path", out string? path))
        {
            throw Usage("--disk needs path=FILE");
        }

        var disk = new DiskArgument(path);
        foreach ((string key, string value) in properties)
        {
            disk = key switch
            {
                "format" => disk with { Format = ParseFormat(value) },
                "readonly" => disk with { ReadOnly = true },
                "serial" => disk with { SerialNumber = value },
                "queues" => disk with { Queues = ParseQueues(value) },
                "transport" => disk with { Transport = ParseTransport(value) },
                "interface" => disk with { IsIde = ParseInterface(value) },
                _ => throw Usage($"--disk: unknown property '{key}' (there is path, format, readonly, serial, queues, transport, interface)"),
            };
        }

        if (disk.IsIde && (properties.ContainsKey("queues") || properties.ContainsKey("transport")))
        {
            throw Usage("--disk: queues and transport are of virtio disks, not of IDE ones");
        }

        return disk;
    }

    private static bool ParseInterface(string text) => text switch
    {
        "virtio" => false,
        "ide" => true,
        _ => throw Usage($"--disk: interface '{text}' is neither virtio nor ide"),
    };

    public static VirtioTransport ParseTransport(string text) => text switch
    {
        "pci" => VirtioTransport.Pci,
        "mmio" => VirtioTransport.Mmio,
        _ => throw Usage($"transport '{text}' is neither pci nor mmio"),
    };

    public static ulong ParseSeed(string text) =>
        ulong.TryParse(text, NumberStyles.None, CultureInfo.InvariantCulture, out ulong seed) ? seed : throw Usage($"'{text}' is not a number");

    private static Dictionary<string, string> Split(string option, IEnumerable<string> parts, string[] flags)
    {
        var properties = new Dictionary<string, string>();
        foreach (string part in parts)
        {
            int equals = part.IndexOf('=');
            bool isFlag = equals < 0 && flags.Contains(part);
            if (!isFlag && (equals <= 0 || equals == part.Length - 1))
            {
                throw Usage($"{option}: '{part}' is not of the form key=value");
            }

            string key = isFlag ? part : part[..equals];
            if (!properties.TryAdd(key, isFlag ? "" : part[(equals + 1)..]))
            {
                throw Usage($"{option}: {key} is given twice");
            }
        }

        return properties;
    }

    private static ImageFormat ParseFormat(string text) => text switch
    {
        "raw" => ImageFormat.Raw,
        "qcow2" => ImageFormat.Qcow2,
        _ => throw Usage($"--disk: format '{text}' is neither raw nor qcow2"),
    };

    private static int ParseQueues(string text) =>
        int.TryParse(text, NumberStyles.None, CultureInfo.InvariantCulture, out int count) && count is >= 1 and <= VirtioBlockOptions.MaxQueueCount
            ? count
            : throw Usage($"--disk: queues is 1 to {VirtioBlockOptions.MaxQueueCount}, not '{text}'");

    private static ushort ParsePort(string text)
    {
        bool valid = text.StartsWith("0x", StringComparison.OrdinalIgnoreCase)
            ? ushort.TryParse(text.AsSpan(2), NumberStyles.AllowHexSpecifier, CultureInfo.InvariantCulture, out ushort port)
            : ushort.TryParse(text, NumberStyles.None, CultureInfo.InvariantCulture, out port);
        return valid && port <= 0xfffc ? port : throw Usage($"'{text}' is not an I/O port (examples: 0xf4, 1281)");
    }

    private static CliException Usage(string message) => new(message, ExitStatus.Usage);
}
