using KvmSharp.Cli.CommandLine;
using KvmSharp.Devices;
using KvmSharp.Devices.Ide;
using KvmSharp.Devices.Virtio;
using KvmSharp.Networking;
using KvmSharp.Storage;

namespace KvmSharp.Cli.Commands;

/// <summary>Turns <c>--disk</c>, <c>--device</c> and <c>--net</c> into virtio devices, in this order.</summary>
/// <param name="options">What was asked for.</param>
/// <param name="keep">Takes what has to be disposed after the run.</param>
/// <param name="openOutput">Opens a file for output, given the option's name.</param>
internal sealed class DeviceSetup(RunOptions options, Action<IDisposable> keep, Func<string, string, ICharacterBackend> openOutput)
{
    /// <summary>The modules that Debian's kernel needs for the devices.</summary>
    public IReadOnlyList<string> KernelModules
    {
        get
        {
            var modules = new List<string>();
            if (options.Disks.Count(disk => !disk.IsIde) + options.Devices.Count + options.Networks.Count > 0)
            {
                modules.AddRange(["virtio_pci", "virtio_mmio"]);
            }

            if (options.Disks.Count > 0)
            {
                modules.AddRange(["virtio_blk", "ext4", "vfat"]);
            }

            if (options.CdRoms.Count > 0 || options.Disks.Any(disk => disk.IsIde))
            {
                modules.AddRange(["ata_piix", "sd_mod", "sr_mod", "isofs"]);
            }

            if (options.Networks.Count > 0)
            {
                modules.AddRange(["virtio_net", "af_packet"]); // the latter for DHCP
            }

            modules.AddRange(options.Devices.Select(device => device.Name switch
            {
                DeviceParser.Random => "virtio_rng",
                _ => device.Name.Replace('-', '_'),
            }).Distinct());
            return modules;
        }
    }

    public IReadOnlyList<VirtioDeviceOptions> Build() =>
        [.. options.Disks.Where(disk => !disk.IsIde).Select(Disk), .. options.Devices.Select(Device), .. options.Networks.Select(Network)];

    /// <summary>The IDE disks, then the CD-ROM drives, at the first free places.</summary>
    public IReadOnlyList<IdeDriveOptions> BuildIde() =>
    [
        .. options.Disks.Where(disk => disk.IsIde)
            .Select(disk => new IdeDiskOptions(Open(disk)) { ReadOnly = disk.ReadOnly, SerialNumber = disk.SerialNumber }),
        .. options.CdRoms.Select(path => new IdeCdRomOptions(Open(new DiskArgument(path) { Format = ImageFormat.Raw, ReadOnly = true }))),
    ];

    private IBlockBackend Open(DiskArgument disk)
    {
        IBlockBackend backend = DiskImage.Open(disk.Path, new DiskImageOptions { Format = disk.Format, ReadOnly = disk.ReadOnly });
        keep(backend);
        return backend;
    }

    private VirtioBlockOptions Disk(DiskArgument disk)
    {
        IBlockBackend backend = Open(disk);
        return new VirtioBlockOptions(backend)
        {
            ReadOnly = disk.ReadOnly,
            SerialNumber = disk.SerialNumber,
            QueueCount = disk.Queues,
            Transport = disk.Transport,
        };
    }

    private VirtioDeviceOptions Device(DeviceArgument device)
    {
        string? Property(string key) => device.Properties.GetValueOrDefault(key);
        VirtioTransport transport = Property("transport") is { } text ? DeviceParser.ParseTransport(text) : VirtioTransport.Pci;
        return device.Name switch
        {
            DeviceParser.Random => new VirtioRandomOptions
            {
                Transport = transport,
                Seed = Property("seed") is { } seed ? DeviceParser.ParseSeed(seed) : null,
            },
            DeviceParser.Console => new VirtioConsoleOptions([new VirtioConsolePort(ConsoleBackend(Property("file")))]) { Transport = transport },
            DeviceParser.Balloon => new VirtioBalloonOptions
            {
                Transport = transport,
                InitialTarget = Property("target") is { } target ? (ulong)MemorySize.Parse("--device", target) : 0,
            },
            _ => throw new InvalidOperationException(device.Name),
        };
    }

    private VirtioNetworkOptions Network(NetworkArgument argument, int index)
    {
        try
        {
            var network = new UserNetwork(argument.Options);
            keep(network);
            INetworkBackend backend = network;
            if (argument.CaptureFile is { } file)
            {
                var capture = new PacketCapture(network, new BufferedStream(new FileStream(
                    file, FileMode.Create, FileAccess.Write, FileShare.Read, bufferSize: 0), 1 << 16));
                keep(capture);
                backend = capture;
            }

            return new VirtioNetworkOptions(backend)
            {
                MacAddress = argument.MacAddress ?? new MacAddress([0x52, 0x54, 0x00, 0x12, 0x34, (byte)(0x56 + index)]),
                Mtu = argument.Options.Mtu,
                Transport = argument.Transport,
            };
        }
        catch (Exception exception) when (exception is KvmSharpException or IOException or UnauthorizedAccessException)
        {
            throw new CliException($"--net: {exception.Message}", exception);
        }
    }

    private ICharacterBackend ConsoleBackend(string? file) =>
        file is null ? new MemoryCharacterBackend() : openOutput($"--device {DeviceParser.Console}", file);
}
