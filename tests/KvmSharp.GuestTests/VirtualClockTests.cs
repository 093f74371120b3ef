using KvmSharp.Devices;
using KvmSharp.GuestTests.Support;

namespace KvmSharp.GuestTests;

/// <summary>On the virtual clock a run can be repeated, stopped, saved, and continued elsewhere, to the last bit.</summary>
public sealed class VirtualClockTests
{
    private const ulong First = 100_000_000;
    private const ulong Middle = 400_000_000;
    private const ulong Last = 1_000_000_000;

    /// <summary>The translator must do what the interpreter does, at every instruction; each continues the other's state.</summary>
    [Fact]
    public async Task BootIsTheSameOnBothEnginesAndFromASavedState()
    {
        using MemoryStream saved = new();
        string first;
        MachineState last;
        await using (PcMachine machine = await CreateAsync(ExecutionEngine.Interpreter))
        {
            RunUntil(machine, First);
            first = Hash(machine);
            RunUntil(machine, Last);
            last = machine.VirtualMachine.SaveState();
        }

        await using (PcMachine machine = await CreateAsync(ExecutionEngine.Jit))
        {
            RunUntil(machine, First);
            Assert.Equal(first, Hash(machine));
            RunUntil(machine, Middle);
            machine.VirtualMachine.SaveState(saved);
            RunUntil(machine, Last);
            StateComparison.AssertEqual(last, machine.VirtualMachine.SaveState());
            Assert.Equal(Convert.ToHexString(last.ComputeHash()), Hash(machine));
        }

        saved.Position = 0;
        await using (PcMachine machine = await CreateAsync(ExecutionEngine.Interpreter))
        {
            machine.VirtualMachine.LoadState(saved);
            Assert.Equal(Middle, machine.VirtualMachine.Vcpus[0].InstructionCount);
            RunUntil(machine, Last);
            StateComparison.AssertEqual(last, machine.VirtualMachine.SaveState());
        }
    }

    [Theory]
    [InlineData(ExecutionEngine.Interpreter)]
    [InlineData(ExecutionEngine.Jit)]
    public async Task StopsOnTheWayChangeNothing(ExecutionEngine engine)
    {
        await using PcMachine straight = new(Options());
        await using PcMachine halting = new(Options() with { Engine = engine });
        const ulong End = 15_000;
        for (ulong count = 1; count < End; count += 97)
        {
            RunUntil(halting, count);
        }

        RunUntil(straight, End);
        RunUntil(halting, End);
        StateComparison.AssertEqual(straight.VirtualMachine.SaveState(), halting.VirtualMachine.SaveState());
    }

    [Theory]
    [InlineData(ExecutionEngine.Interpreter)]
    [InlineData(ExecutionEngine.Jit)]
    public async Task StateSavedAnywhereContinuesInAFreshMachine(ExecutionEngine engine)
    {
        await using PcMachine original = new(Options() with { Engine = engine });
        await using PcMachine reference = new(Options());
        const ulong End = 18_000;
        RunUntil(reference, End);
        MachineState expected = reference.VirtualMachine.SaveState();
        for (ulong count = 1; count < End; count += 1031)
        {
            RunUntil(original, count);
            MachineState state = original.VirtualMachine.SaveState();
            await using PcMachine copy = new(Options() with { Engine = engine });
            copy.VirtualMachine.LoadState(state);
            StateComparison.AssertEqual(state, copy.VirtualMachine.SaveState());
            RunUntil(copy, End);
            StateComparison.AssertEqual(expected, copy.VirtualMachine.SaveState());
        }
    }

    private static PcMachineOptions Options() =>
        DemoGuestTests.Options(new MemoryCharacterBackend()) with { Clock = ClockMode.Virtual, MemorySize = 32UL << 20 };

    private static async Task<PcMachine> CreateAsync(ExecutionEngine engine) =>
        new(LinuxGuest.CreateOptions(await DebianCache.CloudAsync(), new MemoryCharacterBackend(), ClockMode.Virtual) with { Engine = engine });

    private static void RunUntil(PcMachine machine, ulong instructions) =>
        Assert.True(machine.VirtualMachine.RunUntil(instructions), $"the machine ended before {instructions} instructions");

    private static string Hash(PcMachine machine) => Convert.ToHexString(machine.VirtualMachine.ComputeStateHash());
}
