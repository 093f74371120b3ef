using System.Net;
using System.Net.Sockets;
using System.Security.Cryptography;
using System.Text;
using KvmSharp.Boot;
using KvmSharp.Cli.Debian;
using KvmSharp.Devices;
using KvmSharp.Devices.Ide;
using KvmSharp.Devices.Virtio;
using KvmSharp.GuestTests.Support;
using KvmSharp.Networking;
using KvmSharp.Storage;

namespace KvmSharp.GuestTests;

/// <summary>An installed Debian starts from its disk through SeaBIOS and GRUB.</summary>
public sealed class InstalledDebianTests
{
    private static readonly TimeSpan BootLimit = TimeSpan.FromMinutes(5);
    private static readonly TimeSpan TransferLimit = TimeSpan.FromMinutes(3);

    [Fact]
    public async Task StartsAndIsReachedThroughSsh()
    {
        HostTool.Require("ssh", "ssh-keygen");
        using OverlayBlockBackend disk = await OpenDiskAsync();
        using var network = new UserNetwork();
        IPEndPoint ssh = network.AddForward(new PortForward(0, 22));
        IPEndPoint datagrams = network.AddForward(new PortForward(0, 5000) { Protocol = ForwardProtocol.Udp });
        await using LinuxGuest guest = await StartAsync(ExecutionEngine.Auto, options => options with
        {
            VirtioDevices = [new VirtioBlockOptions(disk), new VirtioNetworkOptions(network)],
        });
        await guest.LogInAsync(InstalledDebian.Password, BootLimit);
        await ExpectRunningAsync(guest, "/dev/vda1");
        Assert.Contains("inet 10.0.2.15/24", await guest.RunAsync("ip -4 address show dev eth0"), StringComparison.Ordinal);
        Assert.Contains("default via 10.0.2.2 dev eth0", await guest.RunAsync("ip route"), StringComparison.Ordinal);
        Assert.Contains("nameserver 10.0.2.3", await guest.RunAsync("cat /etc/resolv.conf"), StringComparison.Ordinal);
        await guest.CleanLogAsync();

        await guest.RunAsync("perl -MIO::Socket::INET -e '$s = IO::Socket::INET->new(LocalPort => 5000, Proto => \"udp\") or die; $s->send(\"guest: $b\") while defined $s->recv($b, 2000)' >/dev/null 2>&1 </dev/null &");
        Assert.Equal("guest: datagram", await ExchangeAsync(datagrams, "datagram"));

        using var directory = new TemporaryDirectory();
        string key = directory.File("key");
        CommandResult made = await CommandRunner.RunAsync("ssh-keygen", ["-q", "-t", "ed25519", "-N", "", "-f", key]);
        Assert.True(made.Status == 0, made.ToString());
        await guest.RunAsync($"mkdir -p -m 700 /root/.ssh; echo '{File.ReadAllText(key + ".pub").Trim()}' >/root/.ssh/authorized_keys");
        string hostKey = (await guest.RunAsync("cat /etc/ssh/ssh_host_ed25519_key.pub")).Trim();
        string known = directory.File("known_hosts");
        File.WriteAllText(known, $"[127.0.0.1]:{ssh.Port} {hostKey}\n");
        CommandResult there = await CommandRunner.RunAsync(
            "ssh",
            [
                "-F", "none", "-i", key, "-p", $"{ssh.Port}", "-o", $"UserKnownHostsFile={known}", "-o", "StrictHostKeyChecking=yes",
                "-o", "BatchMode=yes", "-o", "ConnectTimeout=60", "root@127.0.0.1", "hostname; wc -c; exit 7",
            ],
            TransferLimit, new string('x', 100_000));
        Assert.True(there.Status == 7, there.ToString());
        Assert.Equal($"{InstalledDebian.HostName}\n100000\n", there.Output);
    }

    [Fact]
    public async Task FetchesAFileAndStartsAgain()
    {
        using var server = new LoopbackHttpServer(RandomNumberGenerator.GetBytes(100_000_000));
        using OverlayBlockBackend disk = await OpenDiskAsync();
        using var network = new UserNetwork();
        await using LinuxGuest guest = await StartAsync(ExecutionEngine.Jit, options => options with
        {
            VcpuCount = 2,
            VirtioDevices = [new VirtioBlockOptions(disk), new VirtioNetworkOptions(network)],
        });
        await guest.LogInAsync(InstalledDebian.Password, BootLimit);
        await ExpectRunningAsync(guest, "/dev/vda1");
        Assert.Equal(server.Checksum, await guest.RunAsync(
            $"wget -q -O /root/file http://10.0.2.2:{server.Port}/file && sync && echo 3 >/proc/sys/vm/drop_caches && sha256sum </root/file", TransferLimit));
        string first = await guest.RunAsync("cat /proc/sys/kernel/random/boot_id");

        guest.Send("reboot\n");
        await guest.RestartAsync(BootLimit);
        await guest.LogInAsync(InstalledDebian.Password, BootLimit);
        await ExpectRunningAsync(guest, "/dev/vda1");
        Assert.NotEqual(first, await guest.RunAsync("cat /proc/sys/kernel/random/boot_id"));
        Assert.Equal(server.Checksum, await guest.RunAsync("sha256sum </root/file", TransferLimit));
        await guest.CleanLogAsync();
    }

    [Fact]
    public async Task StartsFromAnIdeDisk()
    {
        using OverlayBlockBackend disk = await OpenDiskAsync();
        using var network = new UserNetwork();
        await using LinuxGuest guest = await StartAsync(ExecutionEngine.Jit, options => options with
        {
            IdeDrives = [new IdeDiskOptions(disk)],
            VirtioDevices = [new VirtioNetworkOptions(network)],
        });
        await guest.LogInAsync(InstalledDebian.Password, BootLimit);
        await ExpectRunningAsync(guest, "/dev/sda1");
        await guest.RunAsync("dd if=/dev/urandom of=/root/data bs=1M count=8 conv=fsync && sha256sum /root/data >/root/sum && echo 3 >/proc/sys/vm/drop_caches && sha256sum -c /root/sum");
        Assert.DoesNotContain(
            (await guest.CleanLogAsync()).Split('\n'),
            line => line.Contains("ata", StringComparison.Ordinal) && line.Contains("error", StringComparison.OrdinalIgnoreCase));
    }

    /// <summary>Sends a datagram until it is answered: the receiver may not be there yet, and datagrams may get lost.</summary>
    private static async Task<string> ExchangeAsync(IPEndPoint target, string text)
    {
        using var client = new UdpClient();
        client.Connect(target);
        Task<UdpReceiveResult> answer = client.ReceiveAsync();
        for (int attempt = 0; attempt < 60 && !answer.IsCompleted; attempt++)
        {
            await client.SendAsync(Encoding.ASCII.GetBytes(text));
            await Task.WhenAny(answer, Task.Delay(1000));
        }

        Assert.True(answer.IsCompletedSuccessfully, "no answer");
        return Encoding.ASCII.GetString((await answer).Buffer);
    }

    private static async Task<OverlayBlockBackend> OpenDiskAsync() => new(RawBlockBackend.Open(await InstalledDebian.GetAsync(), readOnly: true));

    private static async Task<LinuxGuest> StartAsync(ExecutionEngine engine, Func<PcMachineOptions, PcMachineOptions> change)
    {
        BootImage firmware = BootImage.FromFile(await DebianFiles.SeaBiosAsync());
        BootImage video = BootImage.FromFile(await DebianFiles.VideoBiosAsync());
        var guest = new LinuxGuest(serial => change(new PcMachineOptions
        {
            Firmware = firmware,
            VideoBios = video,
            SerialPorts = [serial],
            Engine = engine,
        }));
        guest.Machine.Start();
        return guest;
    }

    /// <summary>Every service has started, from the disk that was expected.</summary>
    private static async Task ExpectRunningAsync(LinuxGuest guest, string root)
    {
        string state = await guest.RunAsync("systemctl is-system-running --wait; systemctl --failed --no-pager --plain --no-legend", BootLimit);
        Assert.Equal("running\n", state);
        Assert.Equal($"{root}\n", await guest.RunAsync("findmnt -n -o SOURCE /"));
    }
}
