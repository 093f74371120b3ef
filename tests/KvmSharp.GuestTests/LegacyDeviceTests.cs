using System.Security.Cryptography;
using KvmSharp.Boot;
using KvmSharp.Cli.Debian;
using KvmSharp.Devices.Ide;
using KvmSharp.GuestTests.Support;
using KvmSharp.Storage;

namespace KvmSharp.GuestTests;

/// <summary>Debian's kernel with its own drivers on the old devices of a PC.</summary>
public sealed class LegacyDeviceTests
{
    [Fact]
    public async Task DiskAndDiscAreReadAndWritten()
    {
        DebianImage image = await DebianCache.CloudAsync();
        byte[] content = RandomNumberGenerator.GetBytes(1 << 20);
        using var store = new MemoryImageStore(content);
        using var disk = new RawBlockBackend(new MemoryImageStore(new byte[4 << 20]));
        using var disc = new RawBlockBackend(store);
        BootImage initrd = await DebianCache.WithModulesAsync(image);
        await using var guest = new LinuxGuest(image, change: options => options with
        {
            Initrd = initrd,
            CommandLine = options.CommandLine + " kvmsharp.modules=ata_piix,sd_mod,sr_mod",
            IdeDrives = [new IdeDiskOptions(disk) { SerialNumber = "disk1" }, new IdeCdRomOptions(disc)],
            SystemUuid = new Guid("00112233-4455-6677-8899-aabbccddeeff"),
        });
        await guest.BootAsync();
        string hash = Convert.ToHexStringLower(SHA256.HashData(content));
        Assert.StartsWith(hash, await guest.RunAsync("sha256sum /dev/sr0"), StringComparison.Ordinal);
        await guest.RunAsync("dd if=/dev/sr0 of=/dev/sda bs=64k seek=16 conv=fsync 2>/dev/null");
        var copy = new byte[content.Length];
        disk.Read(1 << 20, copy);
        Assert.Equal(content, copy);
        Assert.StartsWith(hash, await guest.RunAsync("dd if=/dev/sda bs=1M skip=1 count=1 iflag=direct 2>/dev/null | sha256sum"), StringComparison.Ordinal);
        Assert.Equal("KvmSharp\n", await guest.RunAsync("cat /sys/class/dmi/id/sys_vendor"));
        Assert.Equal("00112233-4455-6677-8899-aabbccddeeff\n", await guest.RunAsync("cat /sys/class/dmi/id/product_uuid"));
        string log = await guest.CleanLogAsync();
        Assert.Contains("MWDMA2", log, StringComparison.Ordinal);
        Assert.DoesNotContain(log.Split('\n'), line => line.Contains("ata", StringComparison.Ordinal)
            && (line.Contains("error", StringComparison.OrdinalIgnoreCase) || line.Contains("failed", StringComparison.Ordinal)));
    }
}
