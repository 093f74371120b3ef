using KvmSharp.Devices;
using KvmSharp.GuestTests.Support;

namespace KvmSharp.GuestTests;

/// <summary>On the virtual clock a run can be repeated, stopped, saved, and continued elsewhere, to the last bit.</summary>
public sealed class VirtualClockTests
{
    private const ulong First = 100_000_000;
    private const ulong Middle = 400_000_000;
    private const ulong Last = 1_000_000_000;

    [Fact]
    public async Task BootIsTheSameEachTimeAndFromASavedState()
    {
        using MemoryStream state = new();
        string[] expected;
        await using (PcMachine machine = await CreateAsync())
        {
            expected = [Hash(machine, First), Hash(machine, Last)];
        }

        await using (PcMachine machine = await CreateAsync())
        {
            Assert.Equal(expected[0], Hash(machine, First));
            Assert.True(machine.VirtualMachine.RunUntil(Middle));
            machine.VirtualMachine.SaveState(state);
            Assert.Equal(expected[1], Hash(machine, Last));
        }

        state.Position = 0;
        await using (PcMachine machine = await CreateAsync())
        {
            machine.VirtualMachine.LoadState(state);
            Assert.Equal(Middle, machine.VirtualMachine.Vcpus[0].InstructionCount);
            Assert.Equal(expected[1], Hash(machine, Last));
        }
    }

    [Fact]
    public async Task StopsOnTheWayChangeNothing()
    {
        await using PcMachine straight = new(DemoGuestTests.Options(new MemoryCharacterBackend()) with { Clock = ClockMode.Virtual });
        await using PcMachine halting = new(DemoGuestTests.Options(new MemoryCharacterBackend()) with { Clock = ClockMode.Virtual });
        for (ulong count = 1; count < 15_000; count += 97)
        {
            Assert.True(halting.VirtualMachine.RunUntil(count));
        }

        Assert.Equal(Hash(straight, 15_000), Hash(halting, 15_000));
    }

    [Fact]
    public async Task StateSavedAnywhereContinuesInAFreshMachine()
    {
        PcMachineOptions options = DemoGuestTests.Options(new MemoryCharacterBackend()) with { Clock = ClockMode.Virtual, MemorySize = 32UL << 20 };
        await using PcMachine original = new(options);
        const ulong End = 18_000;
        string expected;
        await using (PcMachine reference = new(options))
        {
            expected = Hash(reference, End);
        }

        for (ulong count = 1; count < End; count += 1031)
        {
            Assert.True(original.VirtualMachine.RunUntil(count));
            using var state = new MemoryStream();
            original.VirtualMachine.SaveState(state);
            state.Position = 0;
            await using PcMachine copy = new(options);
            copy.VirtualMachine.LoadState(state);
            Assert.Equal(Convert.ToHexString(original.VirtualMachine.ComputeStateHash()), Convert.ToHexString(copy.VirtualMachine.ComputeStateHash()));
            Assert.Equal(expected, Hash(copy, End));
        }
    }

    private static async Task<PcMachine> CreateAsync() =>
        new(LinuxGuest.CreateOptions(await DebianCache.CloudAsync(), new MemoryCharacterBackend(), ClockMode.Virtual));

    private static string Hash(PcMachine machine, ulong instructions)
    {
        Assert.True(machine.VirtualMachine.RunUntil(instructions), $"the machine ended before {instructions} instructions");
        return Convert.ToHexString(machine.VirtualMachine.ComputeStateHash());
    }
}
