using KvmSharp.Boot;
using KvmSharp.Devices;

namespace KvmSharp.GuestTests.Support;

/// <summary>What an assembled guest said on the debug console, and how it ended.</summary>
internal sealed record GuestResult(VmExit Exit, string Output)
{
    public override string ToString() => $"{Exit}\n{Output}";
}

/// <summary>Runs the assembled guests of tests/guests.</summary>
internal static class GuestRunner
{
    private static readonly TimeSpan Limit = TimeSpan.FromSeconds(60);

    public static PcMachineOptions Options(string guest, ICharacterBackend? debugConsole = null) => new()
    {
        MemorySize = 64UL << 20,
        Kernel = BootImage.FromFile(TestPaths.Guest(guest + ".elf")),
        DebugConsole = debugConsole,
        IsaDebugExit = true,
    };

    public static async Task<GuestResult> RunAsync(string guest, Func<PcMachineOptions, PcMachineOptions>? change = null)
    {
        var console = new MemoryCharacterBackend();
        PcMachineOptions options = Options(guest, console);
        await using var machine = new PcMachine(change is null ? options : change(options));
        machine.Start();
        Task<VmExit> end = machine.WaitForExitAsync();
        if (await Task.WhenAny(end, Task.Delay(Limit)) != end)
        {
            machine.VirtualMachine.Pause();
            Registers registers = machine.VirtualMachine.Vcpus[0].GetRegisters();
            Assert.Fail($"guest {guest} did not end; RIP 0x{registers.Rip:x}\n{console.GetOutputText()}");
        }

        return new GuestResult(await end, console.GetOutputText());
    }
}
