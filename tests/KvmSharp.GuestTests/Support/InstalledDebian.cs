using System.Buffers.Binary;
using System.Text;
using KvmSharp.Cli.Debian;
using KvmSharp.Cli.Terminal;

namespace KvmSharp.GuestTests.Support;

/// <summary>
/// A disk with Debian as a user would install it: partition table, GRUB, ext4, systemd, ifupdown with DHCP and an SSH server.
/// Made with mmdebstrap from the host's own package sources, as root or in a user namespace, and kept in the cache.
/// </summary>
internal static class InstalledDebian
{
    public const string HostName = "installed";
    public const string Password = "correct-horse";

    /// <summary>Part of the name in the cache: a change of what is below needs another number.</summary>
    private const int Recipe = 1;

    private const int PartitionStart = 2048;
    private const int DiskSectors = 700 << 11;
    private const int SectorSize = 512;
    private const string GrubDirectory = "/usr/lib/grub/i386-pc";

    private const string Packages =
        "systemd-sysv,udev,dbus,libpam-systemd,ifupdown,isc-dhcp-client,iproute2,openssh-server,wget,linux-image-cloud-amd64,initramfs-tools,zstd";

    /// <summary>Runs before the packages other than the essential ones are set up, with the root directory as $1.</summary>
    private const string BeforeSetUp = """
        set -e
        cat >"$1/etc/fstab" <<end
        LABEL=root / ext4 errors=remount-ro 0 1
        end
        # Only the drivers of this machine's disks, so that the firmware has less to read.
        mkdir -p "$1/etc/initramfs-tools/conf.d"
        echo MODULES=list >"$1/etc/initramfs-tools/conf.d/drivers"
        for module in virtio_pci virtio_blk ata_piix sd_mod ext4; do echo $module; done >"$1/etc/initramfs-tools/modules"
        """;

    /// <summary>Runs when all packages are set up.</summary>
    private const string AfterSetUp = """
        set -e
        echo installed >"$1/etc/hostname"
        printf '127.0.0.1 localhost\n127.0.1.1 installed\n::1 localhost\n' >"$1/etc/hosts"
        printf 'auto lo\niface lo inet loopback\nauto eth0\niface eth0 inet dhcp\n' >"$1/etc/network/interfaces"
        echo root:correct-horse | chroot "$1" chpasswd
        # A machine that has been set up; without it the first boot sets all services up again.
        echo 0123456789abcdef0123456789abcdef >"$1/etc/machine-id"
        mkdir -p "$1/boot/grub"
        cat >"$1/boot/grub/grub.cfg" <<end
        set timeout=1
        serial --unit=0 --speed=115200
        terminal_input console serial
        terminal_output console serial
        menuentry "Debian" {
            linux /vmlinuz root=LABEL=root ro console=ttyS0 net.ifnames=0
            initrd /initrd.img
        }
        end
        """;

    /// <summary>Makes the file system, with the owners of the archive. $1: archive, $2: disk, $3: offset, $4: size in KiB.</summary>
    private const string MakeFileSystem = """
        set -e
        mkdir "$1.root"
        tar -C "$1.root" --numeric-owner --exclude=./var/lib/apt/lists/* --exclude=./dev/* -xf "$1"
        truncate -s $(($3 + $4 * 1024)) "$2"
        mke2fs -q -F -t ext4 -L root -E offset=$3,lazy_itable_init=0,lazy_journal_init=0 -d "$1.root" "$2" $4
        rm -rf "$1.root"
        """;

    private static readonly Lazy<Task<string>> _disk = new(GetOnceAsync);

    /// <summary>The disk, which must not be changed.</summary>
    public static Task<string> GetAsync() => _disk.Value;

    private static async Task<string> GetOnceAsync()
    {
        string cache = Path.Combine(DebianImages.DefaultCacheDirectory(), "installed");
        string disk = Path.Combine(cache, $"debian-{Recipe}.img");
        if (!File.Exists(disk))
        {
            HostTool.Require("mmdebstrap", "mke2fs", "grub-mkimage", "tar");
            Directory.CreateDirectory(cache);
            string made = Path.Combine(cache, $"{Path.GetRandomFileName()}.img");
            try
            {
                await MakeAsync(made, cache);
                File.Move(made, disk, overwrite: true);
            }
            finally
            {
                File.Delete(made);
            }
        }

        return disk;
    }

    private static async Task MakeAsync(string disk, string cache)
    {
        string directory = Directory.CreateTempSubdirectory("kvmsharp-debian-").FullName;
        try
        {
            string sources = Path.Combine(directory, "sources.list");
            (string suite, string[] lines) = await FindSourcesAsync();
            await File.WriteAllLinesAsync(sources, lines);
            string archive = Path.Combine(directory, "root.tar");
            await RunAsync("mmdebstrap",
                "--variant=minbase", "--architectures=amd64", $"--include={Packages}",
                "--dpkgopt=path-exclude=/usr/share/man/*", "--dpkgopt=path-exclude=/usr/share/doc/*",
                "--dpkgopt=path-exclude=/usr/share/locale/*", "--dpkgopt=force-unsafe-io", "--aptopt=Acquire::Languages \"none\"",
                $"--essential-hook={BeforeSetUp}", $"--customize-hook={AfterSetUp}",
                suite, archive, sources);
            string[] make =
                ["sh", "-c", MakeFileSystem, "sh", archive, disk, $"{PartitionStart * SectorSize}", $"{(DiskSectors - PartitionStart) / 2}"];
            if (Environment.IsPrivilegedProcess)
            {
                await RunAsync(make[0], make[1..]);
            }
            else
            {
                await RunAsync("mmdebstrap", ["--unshare-helper", .. make]);
            }

            await AddBootLoaderAsync(disk, directory);
        }
        finally
        {
            Directory.Delete(directory, recursive: true);
        }
    }

    /// <summary>What the host itself gets Debian's packages from.</summary>
    private static async Task<(string Suite, string[] Lines)> FindSourcesAsync()
    {
        const string Format = "deb $(REPO_URI) $(RELEASE) $(COMPONENT)|$(ORIGIN)|$(COMPONENT)|$(ARCHITECTURE)|$(CODENAME)";
        string state = Path.Combine(DebianImages.DefaultCacheDirectory(), "apt");
        string[][] places = [[], ["-o", $"Dir::State={state}", "-o", $"Dir::State::lists={state}/lists"]];
        foreach (string[] place in places)
        {
            HostTool.Result result = await HostTool.RunAsync(
                "apt-get", [.. place, "indextargets", "--format", Format, "Created-By: Packages"], null, CancellationToken.None);
            string[][] sources = [.. result.Output.Split('\n').Select(line => line.Split('|')).Where(parts => parts is [_, "Debian", "main", "amd64", _])];
            if (sources.Length > 0)
            {
                // The others are this suite's updates: bookworm, bookworm-updates.
                return (sources.Select(parts => parts[4]).MinBy(name => name.Length)!, [.. sources.Select(parts => parts[0])]);
            }

            await new AptClient(state, new ProgressLine(TextWriter.Null, isTerminal: false)).UsePrivateListsAsync(CancellationToken.None);
        }

        throw new InvalidOperationException("apt knows no sources of Debian's packages");
    }

    /// <summary>Writes GRUB into the sectors before the partition, where its installer would have put it.</summary>
    private static async Task AddBootLoaderAsync(string disk, string directory)
    {
        string core = Path.Combine(directory, "core.img");
        await RunAsync("grub-mkimage",
            "-d", GrubDirectory, "-O", "i386-pc", "-p", "(hd0,msdos1)/boot/grub", "-o", core,
            "biosdisk", "part_msdos", "ext2", "normal", "linux", "serial", "terminal", "echo", "search", "reboot");
        byte[] image = await File.ReadAllBytesAsync(core);
        Assert.True(image.Length <= (PartitionStart - 1) * SectorSize, $"GRUB has {image.Length} bytes");
        byte[] first = await File.ReadAllBytesAsync(Path.Combine(GrubDirectory, "boot.img")); // it goes on in sector 1
        Span<byte> partition = first.AsSpan(446, 64);
        partition.Clear();
        partition[0] = 0x80;
        partition[4] = 0x83;
        BinaryPrimitives.WriteInt32LittleEndian(partition[8..], PartitionStart);
        BinaryPrimitives.WriteInt32LittleEndian(partition[12..], DiskSectors - PartitionStart);
        BinaryPrimitives.WriteUInt16LittleEndian(first.AsSpan(510), 0xaa55);
        using FileStream file = File.OpenWrite(disk);
        file.Write(first.AsSpan(0, SectorSize));
        file.Write(image);
    }

    private static async Task RunAsync(string tool, params string[] arguments)
    {
        HostTool.Result result = await HostTool.RunAsync(tool, arguments, null, CancellationToken.None);
        Assert.True(result.Succeeded, $"{tool}: {result.Error}\n{result.Output}");
    }
}
