using KvmSharp.Boot;
using KvmSharp.Devices;

namespace KvmSharp.GuestTests.Samples;

internal static class BootLinux
{
    public static async Task<VmExit> RunAsync(string kernelPath, string initrdPath, Stream console)
    {
        #region boot-linux
        var options = new PcMachineOptions
        {
            MemorySize = 512UL << 20,
            Kernel = BootImage.FromFile(kernelPath),
            Initrd = BootImage.FromFile(initrdPath),
            CommandLine = "console=ttyS0",
            SerialPorts = [new StreamCharacterBackend(console)],
        };
        VmExit exit = await PcMachine.RunAsync(options);
        Console.WriteLine($"The guest ended: {exit.Kind}");
        #endregion
        return exit;
    }
}
