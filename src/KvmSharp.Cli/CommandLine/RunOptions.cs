namespace KvmSharp.Cli.CommandLine;

internal enum SerialTarget
{
    Stdio,
    File,
    Off,
}

internal enum TraceTarget
{
    Off,
    StandardError,
    File,
}

/// <summary>One <c>--device NAME,key=value...</c>.</summary>
internal sealed record DeviceArgument(string Name, IReadOnlyDictionary<string, string> Properties);

/// <summary>What <c>kvmsharp run</c> was asked for; checked for form, not against the host.</summary>
internal sealed record RunOptions
{
    public const long DefaultMemory = 512L << 20;

    /// <summary>The name after <c>run</c> (<c>debian</c>), if any.</summary>
    public string? Guest { get; init; }

    public string? Kernel { get; init; }

    /// <summary>The image of firmware that the machine starts in, instead of a kernel.</summary>
    public string? Firmware { get; init; }

    /// <summary>The image of the video BIOS; null looks next to the firmware.</summary>
    public string? VideoBios { get; init; }

    /// <summary>Whether the processors have system management mode.</summary>
    public bool SystemManagementMode { get; init; }

    /// <summary>Where the screen goes as an image when the run ends.</summary>
    public string? ScreenshotFile { get; init; }

    public IReadOnlyList<BootDevice> BootOrder { get; init; } = [BootDevice.Disk, BootDevice.CdRom, BootDevice.Network];

    public string? Initrd { get; init; }

    public string? Append { get; init; }

    public long Memory { get; init; } = DefaultMemory;

    public int Cpus { get; init; } = 1;

    /// <summary>A CPU model and its +feature and -feature changes, or the default model.</summary>
    public string? Cpu { get; init; }

    public SerialTarget Serial { get; init; } = SerialTarget.Stdio;

    public string? SerialFile { get; init; }

    public string? DebugconFile { get; init; }

    public ushort? DebugExitPort { get; init; }

    /// <summary>Whether there is a PCI bus even if nothing is on it.</summary>
    public bool Pci { get; init; } = true;

    public bool TestDevice { get; init; }

    public bool PanicDevice { get; init; }

    /// <summary>Whether the firmware configuration device is asked for; otherwise the machine decides.</summary>
    public bool FwCfg { get; init; }

    /// <summary>The files in it: their names there, and here.</summary>
    public IReadOnlyList<(string Name, string Path)> FwCfgFiles { get; init; } = [];

    public IReadOnlyList<DiskArgument> Disks { get; init; } = [];

    /// <summary>The images in CD-ROM drives.</summary>
    public IReadOnlyList<string> CdRoms { get; init; } = [];

    /// <summary>The virtio devices but disks, in the order of the command line.</summary>
    public IReadOnlyList<DeviceArgument> Devices { get; init; } = [];

    public IReadOnlyList<NetworkArgument> Networks { get; init; } = [];

    public bool VirtualClock { get; init; }

    public ExecutionEngine Engine { get; init; }

    public bool NoReboot { get; init; }

    public bool Json { get; init; }

    public TraceTarget Trace { get; init; }

    public string? TraceFile { get; init; }

    public bool TraceRegisters { get; init; }

    /// <summary>Instructions to trace before tracing stops and the guest goes on untraced.</summary>
    public ulong TraceCount { get; init; } = ulong.MaxValue;

    public Debian.DebianFlavor Flavor { get; init; }

    public bool Refresh { get; init; }
}
