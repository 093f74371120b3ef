using System.Text.RegularExpressions;
using KvmSharp.Cli.Demo;
using KvmSharp.Devices;
using KvmSharp.GuestTests.Support;

namespace KvmSharp.GuestTests;

/// <summary>The built-in demo guest, through the library.</summary>
public sealed class DemoGuestTests
{
    internal static PcMachineOptions Options(ICharacterBackend serial) => new()
    {
        MemorySize = 64UL << 20,
        Kernel = DemoGuest.Load(),
        SerialPorts = [serial],
    };

    [Theory]
    [InlineData(ClockMode.Real)]
    [InlineData(ClockMode.Virtual)]
    public async Task DemoGuestRunsToItsPowerOff(ClockMode clock)
    {
        var serial = new MemoryCharacterBackend();
        VmExit exit = await PcMachine.RunAsync(Options(serial) with { Clock = clock }).WaitAsync(TimeSpan.FromSeconds(60));
        string output = serial.GetOutputText();
        Assert.True(exit.Kind == VmExitKind.PowerOff, $"{exit}\n{output}");
        Assert.Contains("one page at two addresses, fault at 0xffff800000005000 handled", output);
        Assert.Matches(" 61 PIT ticks", output);
        int apicTicks = int.Parse(Regex.Match(output, @"(\d+) local APIC ticks").Groups[1].Value);
        Assert.InRange(apicTicks, clock == ClockMode.Virtual ? 99 : 70, clock == ClockMode.Virtual ? 100 : 110);
        Assert.Contains("power-off  ACPI", output);
    }

    [Fact]
    public async Task VirtualClockGivesTheSameRunEachTime()
    {
        var hashes = new List<string>();
        for (int i = 0; i < 2; i++)
        {
            var serial = new MemoryCharacterBackend();
            await using var machine = new PcMachine(Options(serial) with { Clock = ClockMode.Virtual });
            machine.Start();
            VmExit exit = await machine.WaitForExitAsync().WaitAsync(TimeSpan.FromSeconds(60));
            Assert.Equal(VmExitKind.PowerOff, exit.Kind);
            hashes.Add($"{machine.VirtualMachine.Vcpus[0].InstructionCount} {serial.GetOutputText()}");
        }

        Assert.Equal(hashes[0], hashes[1]);
    }
}
