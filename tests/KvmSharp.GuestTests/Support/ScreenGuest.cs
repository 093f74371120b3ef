using KvmSharp.Boot;
using KvmSharp.Devices;

namespace KvmSharp.GuestTests.Support;

/// <summary>A machine in SeaBIOS that a test looks at and types into.</summary>
internal sealed class ScreenGuest : IAsyncDisposable
{
    private static readonly TimeSpan _limit = TimeSpan.FromSeconds(120);

    private ScreenGuest(PcMachine machine, MemoryCharacterBackend debugConsole)
    {
        Machine = machine;
        DebugConsole = debugConsole;
    }

    public PcMachine Machine { get; }

    public MemoryCharacterBackend DebugConsole { get; }

    public static async Task<ScreenGuest> StartAsync(
        Func<PcMachineOptions, PcMachineOptions> change, Action<VirtualMachine>? beforeStart = null)
    {
        var console = new MemoryCharacterBackend();
        var machine = new PcMachine(change(new PcMachineOptions
        {
            Firmware = BootImage.FromFile(await DebianFiles.SeaBiosAsync()),
            VideoBios = BootImage.FromFile(await DebianFiles.VideoBiosAsync()),
            MemorySize = 256UL << 20,
            DebugConsole = console,
            IsaDebugExit = true,
        }));
        beforeStart?.Invoke(machine.VirtualMachine);
        machine.Start();
        return new ScreenGuest(machine, console);
    }

    /// <summary>Waits until the screen says something.</summary>
    public async Task<string> WaitForTextAsync(string text)
    {
        DateTime end = DateTime.UtcNow + _limit;
        while (true)
        {
            string screen = Machine.Display!.GetText();
            if (screen.Contains(text, StringComparison.Ordinal))
            {
                return screen;
            }

            if (DateTime.UtcNow > end || Machine.VirtualMachine.Status == VirtualMachineStatus.Stopped)
            {
                Assert.Fail($"'{text}' did not appear ({Machine.VirtualMachine.Status}):\n{screen}\n{DebugConsole.GetOutputText()}");
            }

            await Task.Delay(50);
        }
    }

    /// <summary>Waits until a picture is as wanted.</summary>
    public async Task<DisplayFrame> WaitForFrameAsync(Func<DisplayFrame, bool> wanted)
    {
        DateTime end = DateTime.UtcNow + _limit;
        DisplayFrame frame = Machine.Display!.Capture();
        while (!wanted(frame))
        {
            Assert.True(DateTime.UtcNow < end, $"the screen is {frame.Width} x {frame.Height}\n{Machine.Display.GetText()}");
            await Task.Delay(100);
            Machine.Display.Refresh(frame);
        }

        return frame;
    }

    public async Task<VmExit> WaitForExitAsync()
    {
        Task<VmExit> end = Machine.WaitForExitAsync();
        Assert.True(await Task.WhenAny(end, Task.Delay(_limit)) == end, Machine.Display!.GetText());
        return await end;
    }

    /// <summary>Keeps a picture for a person to look at, if KVMSHARP_SCREENSHOTS names a directory.</summary>
    public void Keep(string name)
    {
        if (Environment.GetEnvironmentVariable("KVMSHARP_SCREENSHOTS") is { Length: > 0 } directory)
        {
            Machine.Display!.Capture().SavePng(Path.Combine(directory, name + ".png"));
        }
    }

    public ValueTask DisposeAsync() => Machine.DisposeAsync();
}
