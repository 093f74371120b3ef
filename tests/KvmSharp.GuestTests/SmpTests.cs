using KvmSharp.Devices;
using KvmSharp.GuestTests.Support;

namespace KvmSharp.GuestTests;

/// <summary>Several vCPUs: one host thread each in real time, in turns on the virtual clock.</summary>
public sealed class SmpTests
{
    [Fact]
    public async Task FourProcessorsWorkTogether()
    {
        await using LinuxGuest guest = new(await DebianCache.CloudAsync(), vcpus: 4);
        await guest.BootAsync();
        Assert.Equal("4", (await guest.RunAsync("nproc")).Trim());
        await guest.RunAsync(
            "for i in 1 2 3 4 5 6 7 8; do (for j in 1 2 3; do dd if=/dev/zero bs=64k count=16 2>/dev/null | gzip -1 | gunzip | sha256sum; done) > /tmp/o$i & done; wait");
        string sums = await guest.RunAsync("cat /tmp/o* | sort | uniq -c");
        Assert.Equal(["24", Convert.ToHexStringLower(System.Security.Cryptography.SHA256.HashData(new byte[1 << 20])), "-"],
            sums.Split(' ', StringSplitOptions.RemoveEmptyEntries | StringSplitOptions.TrimEntries));
        Assert.Equal("0", (await guest.RunAsync("dmesg | grep -ciE 'WARNING|BUG:|oops|lockup|stall|unstable' || true")).Trim());
    }

    [Fact]
    public async Task TurnsOnTheVirtualClockRepeat()
    {
        string first = await HashAsync();
        Assert.Equal(first, await HashAsync());
    }

    private static async Task<string> HashAsync()
    {
        PcMachineOptions options = LinuxGuest.CreateOptions(await DebianCache.CloudAsync(), new MemoryCharacterBackend(), ClockMode.Virtual);
        await using PcMachine machine = new(options with { VcpuCount = 2 });
        Assert.True(machine.VirtualMachine.RunUntil(500_000_000));
        Assert.True(machine.VirtualMachine.Vcpus[1].InstructionCount > 1_000_000);
        return Convert.ToHexString(machine.VirtualMachine.ComputeStateHash());
    }
}
