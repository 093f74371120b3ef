using System.Net;
using KvmSharp.Devices.Virtio;
using KvmSharp.Networking;

namespace KvmSharp.GuestTests.Samples;

internal static class NetworkedMachine
{
    public static async Task<(VmExit Exit, IPEndPoint Forwarded)> RunAsync(PcMachineOptions options)
    {
        #region user-network
        using var network = new UserNetwork();
        IPEndPoint ssh = network.AddForward(new PortForward(HostPort: 0, GuestPort: 22));
        options = options with { VirtioDevices = [new VirtioNetworkOptions(network)] };
        VmExit exit = await PcMachine.RunAsync(options);
        #endregion
        return (exit, ssh);
    }
}
