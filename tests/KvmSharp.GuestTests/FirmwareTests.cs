using KvmSharp.Boot;
using KvmSharp.Devices;
using KvmSharp.Devices.Ide;
using KvmSharp.Devices.Virtio;
using KvmSharp.GuestTests.Support;
using KvmSharp.Storage;

namespace KvmSharp.GuestTests;

/// <summary>Real firmware on the machine.</summary>
public sealed class FirmwareTests
{
    private static readonly TimeSpan _limit = TimeSpan.FromSeconds(60);

    [Theory]
    [InlineData(128, false)]
    [InlineData(4096, false)]
    [InlineData(256, true)]
    public async Task SeaBiosSetsTheMachineUp(int megabytes, bool systemManagementMode)
    {
        var console = new MemoryCharacterBackend();
        await using var machine = new PcMachine(new PcMachineOptions
        {
            Firmware = BootImage.FromFile(await DebianFiles.SeaBiosAsync()),
            MemorySize = (ulong)megabytes << 20,
            DebugConsole = console,
            VideoBios = BootImage.FromFile(await DebianFiles.VideoBiosAsync()),
            VcpuCount = 2,
            SystemManagementMode = systemManagementMode,
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
        if (machine.VirtualMachine.SystemManagementMemory is { } hidden)
        {
            Assert.NotEqual(0u, hidden.Read<uint>(0xa_8000)); // its handler, behind the video memory
            Assert.False(machine.VirtualMachine.Memory.IsBacked(0xa_8000, 4));
            Assert.Equal(0, ReadPort(machine, 0xb3)); // the handler has run
        }
    }

    [Theory]
    [InlineData(false)]
    [InlineData(true)]
    public async Task FirmwareLetsASleepingGuestGoOn(bool systemManagementMode)
    {
        const uint WakingVector = 0x1000;
        using var disk = new RawBlockBackend(new MemoryImageStore(BootSector.Disk()));
        await using ScreenGuest guest = await ScreenGuest.StartAsync(options => options with
        {
            SystemManagementMode = systemManagementMode,
            VirtioDevices = [new VirtioBlockOptions(disk)],
        });
        await guest.WaitForTextAsync(BootSector.Message);
        VirtualMachine machine = guest.Machine.VirtualMachine;
        machine.Pause();
        machine.Memory.Write(FindFacs(machine.Memory, guest.Machine.Options.MemorySize) + 12, WakingVector);
        machine.Memory.Write(WakingVector, [0xb0, 0x2a, 0xe6, 0xf4, 0xeb, 0xfe]); // mov al, 42; out 0xf4, al; jmp $
        machine.Ports.Write(0x604, [0x00, 0x24]); // as the guest would
        Assert.True(guest.Machine.PowerManagement!.IsAsleep);
        machine.Resume();
        guest.Machine.PowerManagement.PressPowerButton();
        Assert.Equal((42 << 1) | 1, (await guest.WaitForExitAsync()).ExitCode);
    }

    [Theory]
    [InlineData("ide")]
    [InlineData("virtio")]
    [InlineData("cd")]
    public async Task BootSectorStarts(string from)
    {
        using var disk = new RawBlockBackend(new MemoryImageStore(from == "cd" ? BootSector.Cd() : BootSector.Disk()));
        await using ScreenGuest guest = await ScreenGuest.StartAsync(options => from switch
        {
            "ide" => options with { IdeDrives = [new IdeDiskOptions(disk)] },
            "cd" => options with { IdeDrives = [null, null, null, new IdeCdRomOptions(disk)] },
            _ => options with { VirtioDevices = [new VirtioBlockOptions(disk)] },
        });
        await guest.WaitForTextAsync(BootSector.Message);
        Assert.Contains(BootSector.Message, guest.DebugConsole.GetOutputText(), StringComparison.Ordinal);
        guest.Machine.Keyboard!.Type("A");
        Assert.Equal(('A' << 1) | 1, (await guest.WaitForExitAsync()).ExitCode);
    }

    [Fact]
    public async Task BootOrderDecides()
    {
        using var disk = new RawBlockBackend(new MemoryImageStore(BootSector.Disk()));
        using var disc = new RawBlockBackend(new MemoryImageStore(BootSector.Cd()));
        await using ScreenGuest guest = await ScreenGuest.StartAsync(options => options with
        {
            IdeDrives = [new IdeDiskOptions(disk), new IdeCdRomOptions(disc)],
            BootOrder = [BootDevice.CdRom, BootDevice.Disk],
        });
        await guest.WaitForTextAsync(BootSector.Message);
        Assert.Contains("Booting from DVD/CD", guest.Machine.Display!.GetText(), StringComparison.Ordinal);
    }

    [Fact]
    public async Task SavedMachineGoesOnElsewhere()
    {
        using var disc = new RawBlockBackend(new MemoryImageStore(await GrubDisc.GetAsync()));
        PcMachineOptions WithDisc(PcMachineOptions options) => options with { IdeDrives = [new IdeCdRomOptions(disc)] };
        MachineState state;
        await using (ScreenGuest first = await ScreenGuest.StartAsync(WithDisc))
        {
            await first.WaitForTextAsync("memory test");
            first.Machine.VirtualMachine.Pause();
            state = first.Machine.VirtualMachine.SaveState();
        }

        await using ScreenGuest second = await ScreenGuest.StartAsync(WithDisc, machine => machine.LoadState(state));
        Assert.Contains("*first entry", second.Machine.Display!.GetText(), StringComparison.Ordinal);
        second.Machine.Keyboard!.Press(Key.Down);
        await second.WaitForTextAsync("*second entry");
        second.Machine.Keyboard.Press(Key.Enter);
        Assert.Equal(43, (await second.WaitForExitAsync()).ExitCode);
    }

    [Fact]
    public async Task ResetStartsTheFirmwareAgain()
    {
        byte[] image = BootSector.Disk();
        image[0] = 0xea; // jmp 0xffff:0, the processor's way into a BIOS's reset
        image[1] = image[2] = 0;
        image[3] = image[4] = 0xff;
        using var disk = new RawBlockBackend(new MemoryImageStore(image));
        await using ScreenGuest guest = await ScreenGuest.StartAsync(options => options with { IdeDrives = [new IdeDiskOptions(disk)] });
        Assert.Equal(VmExitKind.Reset, (await guest.WaitForExitAsync()).Kind);
    }

    [Fact]
    public async Task GrubMenuIsOperatedByKeyboard()
    {
        using var disc = new RawBlockBackend(new MemoryImageStore(await GrubDisc.GetAsync()));
        await using ScreenGuest guest = await ScreenGuest.StartAsync(options => options with { IdeDrives = [new IdeCdRomOptions(disc)] });
        string screen = await guest.WaitForTextAsync("memory test");
        Assert.Contains("GNU GRUB", screen, StringComparison.Ordinal);
        Assert.Contains("│*first entry", screen, StringComparison.Ordinal);
        guest.Keep("grub");
        guest.Machine.Keyboard!.Press(Key.Down);
        await guest.WaitForTextAsync("*second entry");
        guest.Machine.Keyboard.Press(Key.Enter);
        Assert.Equal(43, (await guest.WaitForExitAsync()).ExitCode);
    }

    [Fact]
    public async Task GrubTakesCommandsAndShowsGraphics()
    {
        using var disc = new RawBlockBackend(new MemoryImageStore(await GrubDisc.GetAsync()));
        await using ScreenGuest guest = await ScreenGuest.StartAsync(options => options with { IdeDrives = [new IdeCdRomOptions(disc)] });
        await guest.WaitForTextAsync("memory test");
        guest.Machine.Keyboard!.Type("c");
        await guest.WaitForTextAsync("grub>");
        guest.Machine.Keyboard.Type("echo \"It's (A+B)*2\"\n");
        await guest.WaitForTextAsync("\nIt's (A+B)*2\n");
        guest.Machine.Keyboard.Press(Key.Escape);
        await guest.WaitForTextAsync("first entry");
        guest.Machine.Keyboard.Press(Key.End);
        guest.Machine.Keyboard.Press(Key.Enter);
        DisplayFrame frame = await guest.WaitForFrameAsync(f => (f.Width, f.Height) == (800, 600) && f.Pixels.ContainsAnyExcept(0xff00_0000));
        Assert.Equal(800 * 600, frame.Pixels.Length);
        Assert.False(guest.Machine.Display!.IsTextMode);
        await Task.Delay(500);
        guest.Keep("grub-graphics");
    }

    [Fact]
    public async Task MemtestShowsItsScreen()
    {
        using var disc = new RawBlockBackend(new MemoryImageStore(await GrubDisc.GetAsync()));
        await using ScreenGuest guest = await ScreenGuest.StartAsync(options => options with { IdeDrives = [new IdeCdRomOptions(disc)] });
        await guest.WaitForTextAsync("memory test");
        guest.Machine.Keyboard!.Press(Key.Down);
        guest.Machine.Keyboard.Press(Key.Down);
        guest.Machine.Keyboard.Press(Key.Enter);
        string screen = await guest.WaitForTextAsync("Memtest86+ v");
        await guest.WaitForTextAsync("Testing:");
        guest.Keep("memtest");
        Assert.Contains("<ESC> Exit", guest.Machine.Display!.GetText(), StringComparison.Ordinal);
        Assert.NotEmpty(screen);
    }

    [Fact]
    public async Task IpxeShowsItsBanner()
    {
        using RawBlockBackend disc = RawBlockBackend.Open(await DebianFiles.GetAsync("ipxe", "usr/lib/ipxe/ipxe.iso"), readOnly: true);
        await using ScreenGuest guest = await ScreenGuest.StartAsync(options => options with { IdeDrives = [new IdeCdRomOptions(disc)] });
        string screen = await guest.WaitForTextAsync("Open Source Network Boot Firmware");
        Assert.Contains("iPXE 1.", screen, StringComparison.Ordinal);
        guest.Keep("ipxe");
    }

    private static byte ReadPort(PcMachine machine, ulong port)
    {
        var data = new byte[1];
        Assert.True(machine.VirtualMachine.Ports.Read(port, data));
        return data[0];
    }

    // Firmware has put the tables below the end of memory.
    private static ulong FindFacs(GuestMemory memory, ulong end)
    {
        for (ulong address = end - (1 << 20); address < end; address += 64)
        {
            if (memory.Read<uint>(address) == 0x5343_4146)
            {
                return address;
            }
        }

        throw new InvalidOperationException("There is no FACS.");
    }
}
