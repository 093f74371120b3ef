using System.Security.Cryptography;
using KvmSharp.Boot;
using KvmSharp.Cli.Debian;
using KvmSharp.Devices;
using KvmSharp.Devices.Virtio;
using KvmSharp.GuestTests.Samples;
using KvmSharp.GuestTests.Support;
using KvmSharp.Storage;

namespace KvmSharp.GuestTests;

/// <summary>Debian's kernel with its own drivers on PCI and virtio devices; one machine for all tests.</summary>
public sealed class VirtioFixture : IAsyncLifetime
{
    public const int DiskSize = 48 << 20;

    private readonly TemporaryDirectory _directory = new();

    internal LinuxGuest Guest { get; private set; } = null!;

    internal RawBlockBackend Disk { get; private set; } = null!;

    internal MemoryCharacterBackend Console { get; } = new();

    internal MemoryCharacterBackend Port { get; } = new();

    internal byte[] ReadOnlyContent { get; } = RandomNumberGenerator.GetBytes(1 << 20);

    public async Task InitializeAsync()
    {
        DebianImage image = await DebianCache.CloudAsync();
        BootImage initrd = await DebianCache.WithModulesAsync(image);
        Disk = RawBlockBackend.Create(_directory.File("disk"), DiskSize);
        VirtioDeviceOptions[] devices =
        [
            new VirtioBlockOptions(Disk) { SerialNumber = "first", QueueCount = 2 },
            new VirtioBlockOptions(RawBlockBackend.Open(_directory.File("second", ReadOnlyContent), readOnly: true)) { Transport = VirtioTransport.Mmio },
            new VirtioRandomOptions { Transport = VirtioTransport.Mmio },
            new VirtioConsoleOptions([new VirtioConsolePort(Console), new VirtioConsolePort(Port, "org.kvmsharp.test")]),
        ];
        Guest = new LinuxGuest(image, change: options => OwnPciDevice.AddTo(options with
        {
            Initrd = initrd,
            CommandLine = options.CommandLine + " kvmsharp.modules=virtio_pci,virtio_mmio,virtio_blk,virtio_rng,virtio_console,ext4,vfat",
            VirtioDevices = devices,
        }));
        await Guest.BootAsync();
    }

    public async Task DisposeAsync()
    {
        await Guest.DisposeAsync();
        Disk.Dispose();
        _directory.Dispose();
    }
}

public sealed class VirtioTests(VirtioFixture fixture) : IClassFixture<VirtioFixture>
{
    private LinuxGuest Guest => fixture.Guest;

    [Fact]
    public async Task KernelFindsEverythingAndDoesNotComplain()
    {
        string log = await Guest.RunAsync("dmesg");
        Assert.Contains("reserved in ACPI motherboard resources", log); // ECAM
        Assert.DoesNotContain(log.Split('\n'), line => line.Contains("virtio") && (line.Contains("fail") || line.Contains("error")));
        Assert.DoesNotContain("can't claim", log);
        Assert.DoesNotContain("no compatible bridge window", log);
        string functions = await Guest.RunAsync("cat /sys/bus/pci/devices/*/device");
        Assert.Equal("0x29c0\n0x1042\n0x1043\n0x5153\n", functions);
        Assert.Equal("2\n", await Guest.RunAsync("ls -d /sys/bus/platform/drivers/virtio-mmio/LNRO* | wc -l"));
        Assert.Equal("first", await Guest.RunAsync("cat /sys/block/vda/serial"));
        Assert.Equal($"{VirtioFixture.DiskSize / 512}\n", await Guest.RunAsync("cat /sys/block/vda/size"));
    }

    [Fact]
    public async Task DataIsTheSameOnBothSides()
    {
        await Guest.RunAsync("dd if=/dev/urandom of=/tmp/data bs=1M count=8 2>/dev/null && dd if=/tmp/data of=/dev/vda bs=128k seek=300 conv=fsync && echo 3 > /proc/sys/vm/drop_caches");
        string sums = await Guest.RunAsync("sha256sum < /tmp/data; dd if=/dev/vda bs=128k skip=300 count=64 2>/dev/null | sha256sum; rm /tmp/data");
        var content = new byte[8 << 20];
        fixture.Disk.Read(300 * 131072, content);
        string expected = $"{Convert.ToHexStringLower(SHA256.HashData(content))}  -\n";
        Assert.Equal($"{expected}{expected}", sums[sums.IndexOf(expected, StringComparison.Ordinal)..]);

        RandomNumberGenerator.Fill(content);
        fixture.Disk.Write(300 * 131072, content);
        Assert.Equal($"{Convert.ToHexStringLower(SHA256.HashData(content))}  -\n",
            await Guest.RunAsync("echo 3 > /proc/sys/vm/drop_caches; dd if=/dev/vda bs=128k skip=300 count=64 2>/dev/null | sha256sum"));
    }

    [Theory]
    [InlineData("mke2fs", "ext4")]
    [InlineData("mkdosfs", "vfat")]
    public async Task FileSystemsHold(string make, string type)
    {
        await Guest.RunAsync($"dd if=/dev/zero of=/dev/vda bs=1M count=1 2>/dev/null; {make} /dev/vda 20000 && mkdir -p /mnt && mount -t {type} /dev/vda /mnt");
        await Guest.RunAsync("for i in 1 2 3 4 5; do head -c 1000000 /dev/urandom > /mnt/f$i; done; cd /mnt && sha256sum f* > sums; cd; umount /mnt; echo 3 > /proc/sys/vm/drop_caches");
        string check = await Guest.RunAsync($"mount -t {type} /dev/vda /mnt && cd /mnt && sha256sum -c sums; cd; umount /mnt");
        Assert.Equal(5, check.Split('\n').Count(line => line.EndsWith(": OK", StringComparison.Ordinal)));
    }

    [Fact]
    public async Task DiscardedSpaceIsGivenBack()
    {
        await Guest.RunAsync("dd if=/dev/urandom of=/dev/vda bs=1M seek=24 count=4 conv=fsync");
        await Guest.RunAsync("blkdiscard -o 25165824 -l 4194304 /dev/vda");
        var content = new byte[4 << 20];
        fixture.Disk.Read(24 << 20, content);
        Assert.False(content.AsSpan().ContainsAnyExcept((byte)0));
    }

    [Fact]
    public async Task ReadOnlyDiskBehindMmioReadsAndRefusesWrites()
    {
        Assert.Equal($"{Convert.ToHexStringLower(SHA256.HashData(fixture.ReadOnlyContent))}  /dev/vdb\n", await Guest.RunAsync("sha256sum /dev/vdb"));
        Assert.Equal("1\n", await Guest.RunAsync("cat /sys/block/vdb/ro"));
        Assert.Equal("refused\n", await Guest.RunAsync("echo x 2>/dev/null > /dev/vdb || echo refused"));
    }

    [Fact]
    public async Task RandomBytesComeFromTheHost()
    {
        Assert.StartsWith("virtio_rng", await Guest.RunAsync("cat /sys/class/misc/hw_random/rng_current"));
        string bytes = await Guest.RunAsync("head -c 4096 /dev/hwrng | gzip -c | wc -c");
        Assert.InRange(int.Parse(bytes), 4000, 4300);
    }

    [Fact]
    public async Task ConsoleAndPortPassText()
    {
        await Guest.RunAsync("echo to the console > /dev/hvc0");
        Assert.True(fixture.Console.WaitForOutput("to the console\r\n", TimeSpan.FromSeconds(60)) >= 0);
        Assert.Equal("org.kvmsharp.test\n", await Guest.RunAsync("cat /sys/class/virtio-ports/vport*p1/name"));
        Guest.Send("exec 3<>$(ls /dev/vport*p1); echo listening >&3; head -n 1 <&3 >/tmp/line; exec 3>&-\n");
        Assert.True(fixture.Port.WaitForOutput("listening\n", TimeSpan.FromSeconds(60)) >= 0);
        fixture.Port.SendInput("from the host\n");
        Assert.Contains("from the host\n", await Guest.RunAsync("cat /tmp/line"));
    }

    [Fact]
    public async Task DeviceOfOneOwnAnswers()
    {
        string region = await Guest.RunAsync("for d in /sys/bus/pci/devices/*; do grep -q 0x5153 $d/device && head -n 1 $d/resource; done");
        ulong address = Convert.ToUInt64(region.Split(' ')[0], 16);
        Assert.Equal("0x00001081\n", await Guest.RunAsync($"devmem 0x{address:x} 32 65; devmem 0x{address + 4:x} 32")); // 65 squared is 4225
    }

    [Fact]
    public async Task SaveUnderLoadGoesOnElsewhere()
    {
        Guest.Send("dd if=/dev/vda of=/dev/null bs=64k count=300 2>/dev/null &\n");
        for (int i = 0; i < 2; i++)
        {
            Guest.Machine.VirtualMachine.Pause();
            byte[] hash = Guest.Machine.VirtualMachine.ComputeStateHash();
            await Task.Delay(20);
            Assert.Equal(hash, Guest.Machine.VirtualMachine.ComputeStateHash()); // nothing moves
            MachineState state = Guest.Machine.VirtualMachine.SaveState();
            Guest.Machine.VirtualMachine.LoadState(state);
            Guest.Machine.VirtualMachine.Resume();
        }

        Assert.Equal("done\n", await Guest.RunAsync("wait; echo done"));
        Assert.DoesNotContain("virtio_blk virtio0: request timed", await Guest.RunAsync("dmesg"));
    }
}

/// <summary>Two processors, two queues, and the interrupt pin instead of messages.</summary>
public sealed class VirtioPinTests
{
    [Theory]
    [InlineData("pci=nomsi", "IO-APIC")]
    [InlineData("pci=nocrs", "PCI-MSI")]
    public async Task TwoProcessorsShareADisk(string parameter, string controller)
    {
        DebianImage image = await DebianCache.CloudAsync();
        BootImage initrd = await DebianCache.WithModulesAsync(image);
        var store = new MemoryImageStore();
        store.SetLength(16 << 20);
        byte[] content = RandomNumberGenerator.GetBytes(16 << 20);
        store.Write(0, content);
        await using var guest = new LinuxGuest(image, vcpus: 2, change: options => options with
        {
            Initrd = initrd,
            CommandLine = $"{options.CommandLine} {parameter} kvmsharp.modules=virtio_pci,virtio_blk",
            VirtioDevices = [new VirtioBlockOptions(new RawBlockBackend(store)) { QueueCount = 2 }],
        });
        await guest.BootAsync();
        string expected = $"{Convert.ToHexStringLower(SHA256.HashData(content))}  -\n";
        Assert.Equal(expected + expected, await guest.RunAsync(
            "for i in 0 1; do taskset $((i + 1)) dd if=/dev/vda bs=64k iflag=direct 2>/dev/null | sha256sum > /tmp/s$i & done; wait; cat /tmp/s0 /tmp/s1"));
        Assert.Contains(controller, await guest.RunAsync("grep virtio0 /proc/interrupts"));
        Assert.Equal("2\n", await guest.RunAsync("ls /sys/block/vda/mq | wc -l"));
    }
}

/// <summary>On a virtual clock two machines with virtio devices are the same to the last bit.</summary>
public sealed class VirtioVirtualClockTests
{
    [Fact]
    public async Task RunsWithDevicesAreIdenticalAndGoOnFromAState()
    {
        DebianImage image = await DebianCache.CloudAsync();
        BootImage initrd = await DebianCache.WithModulesAsync(image);
        byte[] content = new byte[8 << 20];
        new Random(1).NextBytes(content);

        PcMachine Create() => new LinuxGuest(image, ClockMode.Virtual, change: options => options with
        {
            Initrd = initrd,
            StartTime = new DateTimeOffset(2024, 1, 1, 0, 0, 0, TimeSpan.Zero),
            CommandLine = options.CommandLine
                + " kvmsharp.modules=virtio_pci,virtio_blk,virtio_rng kvmsharp.run=for,i,in,1,2,3,4,5;,do,head,-c,65536,/dev/hwrng,>/tmp/r;,cat,/dev/vda,|,md5sum;,echo,3,>/proc/sys/vm/drop_caches;,done",
            VirtioDevices = [new VirtioBlockOptions(new RawBlockBackend(Store())), new VirtioRandomOptions()],
        }).Machine;
        MemoryImageStore Store()
        {
            var store = new MemoryImageStore();
            store.SetLength(content.Length);
            store.Write(0, content);
            return store;
        }

        await using PcMachine one = Create();
        // On until the drivers are at work.
        ulong first = 500_000_000;
        while (!one.VirtioDevices[0].IsDriverReady)
        {
            first += 100_000_000;
            Assert.True(one.VirtualMachine.RunUntil(first));
        }

        ulong second = first + 400_000_000;
        byte[] hash = one.VirtualMachine.ComputeStateHash();
        MachineState state = one.VirtualMachine.SaveState();
        Assert.True(one.VirtualMachine.RunUntil(second));
        byte[] last = one.VirtualMachine.ComputeStateHash();

        await using PcMachine two = Create();
        Assert.True(two.VirtualMachine.RunUntil(first));
        Assert.Equal(hash, two.VirtualMachine.ComputeStateHash());
        Assert.True(two.VirtualMachine.RunUntil(second));
        Assert.Equal(last, two.VirtualMachine.ComputeStateHash());

        await using PcMachine three = Create();
        three.VirtualMachine.LoadState(state);
        Assert.Equal(hash, three.VirtualMachine.ComputeStateHash());
        Assert.True(three.VirtualMachine.RunUntil(second));
        Assert.Equal(last, three.VirtualMachine.ComputeStateHash());
    }
}
