using System.Text;
using KvmSharp.Boot;
using KvmSharp.Cli.Debian;
using KvmSharp.Devices.Virtio;
using KvmSharp.GuestTests.Support;
using KvmSharp.Networking;

namespace KvmSharp.GuestTests;

/// <summary>Two guests at one switch, with a user-mode network plugged in.</summary>
public sealed class VirtualSwitchTests
{
    [Fact]
    public async Task GuestsReachEachOtherAndTheHost()
    {
        using var server = new LoopbackHttpServer(Encoding.ASCII.GetBytes("from the host\n"));
        using var network = new UserNetwork();
        using var hub = new VirtualSwitch();
        hub.Connect(network);
        DebianImage image = await DebianCache.CloudAsync();
        BootImage initrd = await DebianCache.WithModulesAsync(image);
        LinuxGuest Create(byte number) => new(image, change: options => options with
        {
            Initrd = initrd,
            Engine = ExecutionEngine.Jit,
            CommandLine = options.CommandLine + " kvmsharp.modules=virtio_pci,virtio_net,af_packet kvmsharp.net=dhcp",
            VirtioDevices = [new VirtioNetworkOptions(hub.Connect()) { MacAddress = new MacAddress([0x52, 0x54, 0, 0, 0, number]) }],
        });
        await using LinuxGuest first = Create(1);
        await using LinuxGuest second = Create(2);
        await Task.WhenAll(first.BootAsync(), second.BootAsync());

        string firstAddress = await AddressAsync(first);
        string secondAddress = await AddressAsync(second);
        Assert.NotEqual(firstAddress, secondAddress);
        Assert.Contains("3 packets received", await first.RunAsync($"ping -c 3 -i 0.2 -s 4000 {secondAddress}"), StringComparison.Ordinal);
        await second.RunAsync("mkdir /tmp/www && head -c 20000000 /dev/urandom >/tmp/www/data && httpd -p 8080 -h /tmp/www");
        Assert.Equal(
            await second.RunAsync("sha256sum </tmp/www/data"),
            await first.RunAsync($"wget -q -O - http://{secondAddress}:8080/data | sha256sum"));
        foreach (LinuxGuest guest in (LinuxGuest[])[first, second])
        {
            Assert.Equal("from the host\n", await guest.RunAsync($"wget -q -O - http://10.0.2.2:{server.Port}/"));
            await guest.CleanLogAsync();
        }
    }

    private static async Task<string> AddressAsync(LinuxGuest guest)
    {
        string address = (await guest.RunAsync("ip -4 addr show dev eth0 | sed -n 's|.*inet \\([0-9.]*\\)/24.*|\\1|p'")).Trim();
        Assert.StartsWith("10.0.2.", address, StringComparison.Ordinal);
        return address;
    }
}
