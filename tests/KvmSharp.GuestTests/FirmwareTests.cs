using KvmSharp.Boot;
using KvmSharp.Devices;
using KvmSharp.GuestTests.Support;

namespace KvmSharp.GuestTests;

/// <summary>Real firmware on the machine.</summary>
public sealed class FirmwareTests
{
    private static readonly TimeSpan _limit = TimeSpan.FromSeconds(60);

    [Theory]
    [InlineData(128)]
    [InlineData(4096)]
    public async Task SeaBiosSetsTheMachineUp(int megabytes)
    {
        var console = new MemoryCharacterBackend();
        await using var machine = new PcMachine(new PcMachineOptions
        {
            Firmware = BootImage.FromFile(await DebianFiles.SeaBiosAsync()),
            MemorySize = (ulong)megabytes << 20,
            DebugConsole = console,
            VideoBios = BootImage.FromFile(await DebianFiles.VideoBiosAsync()),
            VcpuCount = 2,
        });
        machine.Start();
        Assert.True(console.WaitForOutput("Retrying in 60 seconds", _limit) >= 0, console.GetOutputText());
        string text = console.GetOutputText();
        Assert.Contains("SeaBIOS (version", text, StringComparison.Ordinal);
        Assert.Contains("q35", text, StringComparison.Ordinal);
        Assert.Contains("PCIe: using q35 mmconfig at 0xb0000000", text, StringComparison.Ordinal);
        Assert.Contains("Found 2 cpu(s) max supported 2 cpu(s)", text, StringComparison.Ordinal);
        Assert.Contains("PS2 keyboard initialized", text, StringComparison.Ordinal);
        string screen = machine.Display!.GetText();
        Assert.StartsWith("SeaBIOS (version", screen, StringComparison.Ordinal);
        Assert.Contains("No bootable device.", screen, StringComparison.Ordinal);
    }
}
