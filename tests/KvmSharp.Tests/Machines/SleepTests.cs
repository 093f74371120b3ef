using System.Text;
using KvmSharp.Boot;

namespace KvmSharp.Tests.Machines;

/// <summary>Suspend to RAM as a guest without an operating system does it.</summary>
public sealed class SleepTests
{
    private const ulong Start = 0x1_0000;
    private const uint WakingVector = 0x1_1008;
    private const ulong FacsWakingVector = 0xe_004c;
    private const ushort WakeStatus = 0x8000;
    private const ushort AlarmStatus = 0x0400;
    private const ushort PowerButtonStatus = 0x0100;

    private static readonly TimeSpan Limit = TimeSpan.FromSeconds(20);

    // In 64-bit mode: mov dword [0xe004c], 0x11008
    private static readonly byte[] SetVector = [0xc7, 0x04, 0x25, 0x4c, 0x00, 0x0e, 0x00, 0x08, 0x10, 0x01, 0x00];

    // mov dx, 0x604; mov ax, 0x2400; out dx, ax; jmp $
    private static readonly byte[] FallAsleep = [0x66, 0xba, 0x04, 0x06, 0x66, 0xb8, 0x00, 0x24, 0x66, 0xef, 0xeb, 0xfe];

    // An alarm each second, PM1 enable 0x400.
    private static readonly byte[] SetAlarm =
    [
        .. WriteClock(1, 0xc0), .. WriteClock(3, 0xc0), .. WriteClock(5, 0xc0), .. WriteClock(0x0b, 0x22),
        0x66, 0xba, 0x02, 0x06, 0x66, 0xb8, 0x00, 0x04, 0x66, 0xef,
    ];

    // In real mode: mov ax, cs; mov [0x500], ax; mov dx, 0x600; in ax, dx; mov [0x502], ax; mov al, 0; out 0xf4, al; jmp $
    private static readonly byte[] AfterWaking =
        [0x8c, 0xc8, 0xa3, 0x00, 0x05, 0xba, 0x00, 0x06, 0xed, 0xa3, 0x02, 0x05, 0xb0, 0x00, 0xe6, 0xf4, 0xeb, 0xfe];

    [Theory]
    [InlineData(ClockMode.Real, 1)]
    [InlineData(ClockMode.Virtual, 1)]
    [InlineData(ClockMode.Virtual, 3)]
    public async Task AlarmWakesAtTheVector(ClockMode clock, int vcpus)
    {
        await using var machine = Create([.. SetVector, .. SetAlarm, .. FallAsleep], clock, vcpus);
        machine.Start();
        Assert.Equal(new VmExit(VmExitKind.DebugExit, 1), await machine.WaitForExitAsync().WaitAsync(Limit));
        CheckWoken(machine, AlarmStatus);
    }

    [Fact]
    public async Task PowerButtonWakesAMachineThatSleepsInAnotherOne()
    {
        MachineState state;
        await using (var first = Create([.. SetVector, .. FallAsleep], ClockMode.Real, 2))
        {
            await SleepAsync(first);
            first.VirtualMachine.Pause();
            Assert.Equal(0xfff0u, first.VirtualMachine.Vcpus[0].GetRegisters().Rip); // it has lost its state
            state = first.VirtualMachine.SaveState();
            first.VirtualMachine.Resume();
            Assert.True(first.PowerManagement!.IsAsleep);
        }
        await using var second = Create([], ClockMode.Real, 2);
        second.VirtualMachine.LoadState(state);
        Assert.True(second.PowerManagement!.IsAsleep);
        Assert.Equal(state.ComputeHash(), second.VirtualMachine.ComputeStateHash());
        second.Start();
        second.PowerManagement.PressPowerButton();
        Assert.Equal(VmExitKind.DebugExit, (await second.WaitForExitAsync().WaitAsync(Limit)).Kind);
        CheckWoken(second, PowerButtonStatus);
    }

    [Fact]
    public async Task ButtonPressedWhilePausedWakesAfterwards()
    {
        await using var machine = Create([.. SetVector, .. FallAsleep], ClockMode.Real, 1);
        await SleepAsync(machine);
        machine.VirtualMachine.Pause();
        machine.PowerManagement!.PressPowerButton();
        Assert.False(machine.PowerManagement.IsAsleep);
        Assert.Equal(WakingVector & 0xf, machine.VirtualMachine.Vcpus[0].GetRegisters().Rip);
        machine.VirtualMachine.Resume();
        Assert.Equal(VmExitKind.DebugExit, (await machine.WaitForExitAsync().WaitAsync(Limit)).Kind);
        CheckWoken(machine, PowerButtonStatus);
    }

    [Theory]
    [InlineData(0u)]
    [InlineData(0x10_0000u)]
    public async Task WithoutAUsableVectorTheMachineIsReset(uint vector)
    {
        await using var machine = Create(FallAsleep, ClockMode.Real, 1);
        machine.VirtualMachine.Memory.Write(FacsWakingVector, vector);
        await SleepAsync(machine);
        machine.PowerManagement!.PressPowerButton();
        Assert.Equal(VmExitKind.Reset, (await machine.WaitForExitAsync().WaitAsync(Limit)).Kind);
    }

    [Fact]
    public void InstructionsAreCountedOnAndTheSameEachTime()
    {
        // Sleeps again and again: the waking code jumps to where the machine falls asleep.
        byte[] again = [0xba, 0x00, 0x06, 0xb8, 0x00, 0x84, 0xef, .. WriteClock(0x0c), 0xba, 0x04, 0x06, 0xb8, 0x00, 0x24, 0xef, 0xeb, 0xfe];
        var hashes = new List<string>();
        for (var i = 0; i < 2; i++)
        {
            using var machine = Create([.. SetVector, .. SetAlarm, .. FallAsleep], ClockMode.Virtual, 2, again);
            foreach (var count in (ulong[])(i == 0 ? [5000] : [17, 40, 333, 5000]))
            {
                Assert.True(machine.VirtualMachine.RunUntil(count));
                Assert.Equal(count, machine.VirtualMachine.Vcpus[0].InstructionCount);
            }
            Assert.True(machine.VirtualMachine.Clock.Nanoseconds > 100_000_000_000); // of which most was sleep
            hashes.Add(Convert.ToHexString(machine.VirtualMachine.ComputeStateHash()));
        }
        Assert.Equal(hashes[0], hashes[1]);
    }

    [Fact]
    public void TablesOfferIt()
    {
        using var machine = new PcMachine(new PcMachineOptions());
        var tables = new byte[0x2000];
        machine.VirtualMachine.Memory.Read(0xe0000, tables);
        Assert.True(tables.AsSpan().IndexOf("_S3_"u8) > 0);
        Assert.Equal("FACS", Encoding.ASCII.GetString(tables, 64, 4));
        var fadt = tables.AsSpan().IndexOf("FACP"u8);
        Assert.Equal(0, tables[fadt + 112] & 1 << 6); // the alarm is among the fixed events
        using var timeless = new PcMachine(new PcMachineOptions { RealTimeClock = false });
        timeless.VirtualMachine.Memory.Read(0xe0000, tables);
        Assert.NotEqual(0, tables[tables.AsSpan().IndexOf("FACP"u8) + 112] & 1 << 6);
    }

    private static byte[] WriteClock(byte index, byte value) => [0xb0, index, 0xe6, 0x70, 0xb0, value, 0xe6, 0x71];

    private static byte[] WriteClock(byte index) => [0xb0, index, 0xe6, 0x70, 0xe4, 0x71]; // a read

    private static PcMachine Create(byte[] code, ClockMode clock, int vcpus, byte[]? afterWaking = null)
    {
        var machine = new PcMachine(new PcMachineOptions { MemorySize = 2 << 20, Clock = clock, VcpuCount = vcpus, IsaDebugExit = true });
        FlatLoader.Load(machine.VirtualMachine.Memory, machine.VirtualMachine.Vcpus[0], BootImage.FromBytes((byte[])[.. code, 0xf4]), Start);
        machine.VirtualMachine.Memory.Write(WakingVector, afterWaking ?? AfterWaking);
        return machine;
    }

    private static async Task SleepAsync(PcMachine machine)
    {
        machine.Start();
        using var limit = new CancellationTokenSource(Limit);
        while (!machine.PowerManagement!.IsAsleep)
        {
            await Task.Delay(1, limit.Token);
        }
    }

    private static void CheckWoken(PcMachine machine, ushort cause)
    {
        var memory = machine.VirtualMachine.Memory;
        Assert.Equal((ushort)(WakingVector >> 4), memory.Read<ushort>(0x500));
        Assert.Equal((ushort)(WakeStatus | cause), memory.Read<ushort>(0x502) & ~1); // but for the timer
        Assert.False(machine.PowerManagement!.IsAsleep);
    }
}
