using System.Security.Cryptography;
using KvmSharp.Cli.Debian;
using KvmSharp.GuestTests.Support;

namespace KvmSharp.GuestTests;

/// <summary>Debian's i386 kernels with an i386 userland, through the 32-bit entry of the boot protocol.</summary>
public sealed class I386KernelTests
{
    private static readonly TimeSpan BootLimit = TimeSpan.FromMinutes(5);

    [Theory]
    [InlineData("686", 2)]
    [InlineData("686-pae", 2)]
    public async Task BootsToAShellWithACleanLog(string flavor, int vcpus)
    {
        DebianImage image = await DebianCache.GetAsync(flavor == "686" ? DebianFlavor.I686 : DebianFlavor.I686Pae);
        await using LinuxGuest guest = new(image, vcpus: vcpus);
        await guest.BootAsync(BootLimit);
        string log = await guest.CleanLogAsync();
        Assert.Contains("Run /init as init process", log);
        Assert.Equal(flavor == "686-pae", log.Contains("NX (Execute Disable) protection: active", StringComparison.Ordinal));
        Assert.Matches($"^6\\.1\\.[^ ]*-{flavor} i686\n$", await guest.RunAsync("uname -rm"));
        Assert.Equal($"{vcpus}\n", await guest.RunAsync("nproc"));
        Assert.Equal("0.333333 3.625 -7.5\n", await guest.RunAsync("awk 'BEGIN { print 1 / 3, 1.45 * 2.5, -15 / 2 }'"));
        await guest.RunAsync("cat /bin/busybox | gzip -1 | gunzip | cmp - /bin/busybox");
        Assert.Equal(
            $"{Convert.ToHexStringLower(SHA256.HashData(new byte[1 << 20]))}  -\n",
            await guest.RunAsync("for i in 1 2 3 4; do head -c 1048576 /dev/zero | sha256sum > /tmp/$i & done; wait; sort -u /tmp/1 /tmp/2 /tmp/3 /tmp/4"));
        Assert.Equal("50\n", await guest.RunAsync("i=0; while [ $i -lt 50 ]; do /bin/true && i=$((i + 1)); done; echo $i"));
        await guest.CleanLogAsync();
    }
}
