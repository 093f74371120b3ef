using System.Diagnostics;
using KvmSharp.Boot;
using KvmSharp.Devices;

namespace KvmSharp.Tests;

/// <summary>For tests that count threads, handles or memory of the process, which tests beside them would add to.</summary>
[CollectionDefinition("alone", DisableParallelization = true)]
public sealed class AloneCollection;

[Collection("alone")]
public sealed class VirtualMachineTests
{
    private static readonly TimeSpan Limit = TimeSpan.FromSeconds(60);

    [Fact]
    public async Task RunsUntilADeviceEndsIt()
    {
        using var machine = Guest.Create([0xb0, 0x15, 0xe6, 0xf4, 0xeb, 0xfe]); // mov al, 0x15; out 0xf4, al; jmp $
        machine.Ports.Map(new IsaDebugExit(machine), IsaDebugExit.DefaultPort, 1);
        Assert.Equal(VirtualMachineStatus.Created, machine.Status);
        machine.Start();
        Assert.Equal(new VmExit(VmExitKind.DebugExit, 0x2b), await machine.WaitForExitAsync().WaitAsync(Limit));
        Assert.Equal(VirtualMachineStatus.Stopped, machine.Status);
        // The exit is at that instruction: the state is complete and no further one ran.
        Assert.Equal(Guest.CodeAddress + 4, machine.Vcpus[0].GetRegisters().Rip);
        Assert.Equal(2u, machine.Vcpus[0].InstructionCount);
    }

    [Fact]
    public async Task TripleFaultEndsIt()
    {
        using var machine = Guest.Create([0x0f, 0x0b]);
        machine.Start();
        var exit = await machine.WaitForExitAsync().WaitAsync(Limit);
        Assert.Equal(VmExitKind.TripleFault, exit.Kind);
        Assert.Contains("0x10000", exit.Detail);
    }

    [Fact]
    public async Task HaltWithoutInterruptControllerEndsIt()
    {
        using var machine = Guest.Create(Guest.Idle, interruptController: false);
        machine.Start();
        Assert.Equal(VmExitKind.Halted, (await machine.WaitForExitAsync().WaitAsync(Limit)).Kind);
    }

    [Fact]
    public async Task GuestDisablesAddressLine20()
    {
        // xor eax, eax; out 0x92, al; mov bl, [0x120000]; mov al, 2; out 0x92, al; mov bh, [0x120000]; hlt
        using var machine = new VirtualMachine(new VirtualMachineOptions { MemorySize = 2 << 20, InterruptController = false });
        byte[] code = [0x31, 0xc0, 0xe6, 0x92, 0x8a, 0x1c, 0x25, 0, 0, 0x12, 0, 0xb0, 2, 0xe6, 0x92, 0x8a, 0x3c, 0x25, 0, 0, 0x12, 0, 0xf4];
        FlatLoader.Load(machine.Memory, machine.Vcpus[0], BootImage.FromBytes(code), Guest.CodeAddress);
        machine.Memory.Write(0x2_0000, (byte)1);
        machine.Memory.Write(0x12_0000, (byte)2);
        machine.Ports.Map(new SystemControlPortA(machine, machine.A20), SystemControlPortA.DefaultPort, 1);
        machine.Start();
        Assert.Equal(VmExitKind.Halted, (await machine.WaitForExitAsync().WaitAsync(Limit)).Kind);
        Assert.Equal(0x201ul, machine.Vcpus[0].GetRegisters().Rbx & 0xffff);
        Assert.True(machine.A20.IsEnabled);
    }

    // The handler at SMBASE + 0x8000: mov al, cs:[0]; out 0x81, al; rsm
    private static readonly byte[] SmiHandler = [0x2e, 0xa0, 0, 0, 0xe6, 0x81, 0x0f, 0xaa];

    private static VirtualMachine CreateWithSmm(byte[] code, out GuestRam ram)
    {
        var machine = new VirtualMachine(new VirtualMachineOptions { SystemManagementMode = true, InterruptController = false });
        ram = new GuestRam(2 << 20);
        machine.SystemManagementMemory!.Map(ram, 0, 0, 2 << 20);
        machine.Memory.Map(ram, 0, 0, 0x3_0000);
        machine.Memory.Map(ram, 0x4_0000, 0x4_0000, (2 << 20) - 0x4_0000); // 0x30000 to 0x3ffff is SMRAM
        machine.SystemManagementMemory.Write(0x3_8000, SmiHandler);
        machine.SystemManagementMemory.Write(0x3_0000, (byte)0x5a);
        FlatLoader.Load(machine.Memory, machine.Vcpus[0], BootImage.FromBytes(code), Guest.CodeAddress);
        return machine;
    }

    [Fact]
    public async Task SmiRunsTheHandlerInItsOwnMemory()
    {
        // out 0x80, al; hlt
        using var machine = CreateWithSmm([0xe6, 0x80, 0xf4], out var ram);
        using (ram)
        {
            var seen = new List<byte>();
            machine.Ports.Map(new ActionDevice(() => machine.Vcpus[0].InjectSmi()), 0x80, 1);
            machine.Ports.Map(new ActionDevice(() => { }, seen.Add), 0x81, 1);
            machine.Start();
            Assert.Equal(VmExitKind.Halted, (await machine.WaitForExitAsync().WaitAsync(Limit)).Kind);
            Assert.Equal([0x5a], seen);
            Assert.False(machine.Memory.IsBacked(0x3_8000, 1));
        }
    }

    [Fact]
    public void SmiWithoutTheModeIsRefused()
    {
        using var machine = Guest.Create(Guest.Idle);
        Assert.Null(machine.SystemManagementMemory);
        Assert.Equal(KvmSharpErrorCode.NotSupported, Assert.Throws<KvmSharpException>(machine.Vcpus[0].InjectSmi).ErrorCode);
    }

    [Fact]
    public void StateHoldsSystemManagementMemoryAndItsOpenWindow()
    {
        using var machine = CreateWithSmm(Guest.Idle, out var ram);
        using (ram)
        {
            machine.SystemManagementMemory!.Write(0x3_9000, 0x12345678u);
            var window = machine.Memory.Map(ram, 0x3_0000, 0x3_0000, 0x1_0000);
            machine.Memory.Write(0x3_9004, 0x9abcdef0u);
            machine.Vcpus[0].InjectSmi();
            var state = machine.SaveState();
            machine.Memory.Remove(window);

            using var other = CreateWithSmm(Guest.Idle, out var otherRam);
            using (otherRam)
            {
                other.LoadState(state);
                Assert.Equal(0x9abcdef0_12345678ul, other.SystemManagementMemory!.Read<ulong>(0x3_9000));
                Assert.Equal(state.ComputeHash(), other.SaveState().ComputeHash());
            }
        }
    }

    [Fact]
    public async Task ThrowingDeviceEndsIt()
    {
        using var machine = Guest.Create(Guest.PortLoop);
        machine.Ports.Map(new ActionDevice(() => throw new InvalidDataException("broken")), 0x80, 1);
        machine.Start();
        var exit = await machine.WaitForExitAsync().WaitAsync(Limit);
        Assert.Equal(VmExitKind.Fault, exit.Kind);
        Assert.IsType<InvalidDataException>(exit.Exception);
        Assert.Contains("broken", exit.Detail);
    }

    [Fact]
    public async Task PauseStopsTheGuestAndItsClock()
    {
        using var machine = Guest.Create(Guest.CountLoop);
        machine.Start();
        for (var i = 0; i < 50; i++)
        {
            machine.Pause();
            Assert.Equal(VirtualMachineStatus.Paused, machine.Status);
            var (count, time) = (machine.Vcpus[0].InstructionCount, machine.Clock.Nanoseconds);
            var registers = machine.Vcpus[0].GetRegisters();
            Thread.Sleep(1);
            Assert.Equal((count, time), (machine.Vcpus[0].InstructionCount, machine.Clock.Nanoseconds));
            Assert.Equal(registers, machine.Vcpus[0].GetRegisters());
            machine.Resume();
        }
        await WaitFor(() => machine.Memory.Read<ulong>(0x20000) > 0);
    }

    [Fact]
    public void PausedStateMayBeChanged()
    {
        using var machine = Guest.Create(Guest.Spin);
        machine.Start();
        Assert.Throws<InvalidOperationException>(() => machine.Vcpus[0].GetRegisters());
        machine.Pause();
        var registers = machine.Vcpus[0].GetRegisters();
        machine.Vcpus[0].SetRegisters(registers with { Rbx = 0x1234 });
        machine.Resume();
        machine.Pause();
        Assert.Equal(0x1234u, machine.Vcpus[0].GetRegisters().Rbx);
    }

    [Fact]
    public void HaltedGuestCanBePausedAndEnded()
    {
        using var machine = Guest.Create(Guest.Idle);
        machine.Start();
        Thread.Sleep(10);
        machine.Pause();
        Assert.Equal(VirtualMachineStatus.Paused, machine.Status);
        machine.Resume();
        machine.Stop();
        Assert.Equal(VirtualMachineStatus.Stopped, machine.Status);
    }

    [Fact]
    public async Task DeviceMayPauseAndDisposeItsMachine()
    {
        var machine = Guest.Create(Guest.PortLoop);
        var count = 0;
        machine.Ports.Map(new ActionDevice(() =>
        {
            if (++count == 10)
            {
                machine.Pause();
            }
            else if (count == 20)
            {
                machine.Dispose();
            }
        }), 0x80, 1);
        machine.Start();
        await WaitFor(() => machine.Status == VirtualMachineStatus.Paused);
        Assert.Equal(10, count);
        Assert.Equal(20u, machine.Vcpus[0].InstructionCount % 3 == 2 ? 20u : 0); // inc and out, ten times, less the jumps
        machine.Resume();
        await machine.WaitForExitAsync().WaitAsync(Limit);
        Assert.Equal(20, count);
        Assert.Equal(VirtualMachineStatus.Disposed, machine.Status);
    }

    [Fact]
    public async Task InstructionsAreCountedExactly()
    {
        using var machine = Guest.Create(Guest.CountLoop, ClockMode.Virtual);
        Assert.True(machine.RunUntil(3001));
        Assert.Equal(VirtualMachineStatus.Paused, machine.Status);
        Assert.Equal(3001u, machine.Vcpus[0].InstructionCount);
        Assert.Equal(1001u, machine.Vcpus[0].GetRegisters().Rax);
        Assert.Equal(3001u, machine.Clock.Nanoseconds);
        Assert.True(machine.RunUntil(1_000_000));
        Assert.Equal(1_000_000u, machine.Vcpus[0].InstructionCount);
        var before = machine.Memory.Read<ulong>(0x20000);
        machine.Resume();
        await WaitFor(() => machine.Memory.Read<ulong>(0x20000) > before);
        machine.Pause();
        Assert.True(machine.Vcpus[0].InstructionCount > 1_000_000);
    }

    [Fact]
    public void RunUntilCanBeCancelled()
    {
        using var machine = Guest.Create(Guest.Spin);
        using var source = new CancellationTokenSource(TimeSpan.FromMilliseconds(20));
        Assert.Throws<OperationCanceledException>(() => machine.RunUntil(ulong.MaxValue - 1, source.Token));
        Assert.Equal(VirtualMachineStatus.Paused, machine.Status);
    }

    [Fact]
    public void RunUntilEndsWithTheMachine()
    {
        using var machine = Guest.Create([0x0f, 0x0b]);
        Assert.False(machine.RunUntil(1000));
    }

    [Fact]
    public async Task KickStormHarmsNobody()
    {
        using var machine = Guest.Create(Guest.CountLoop);
        machine.Start();
        using var stop = new CancellationTokenSource(TimeSpan.FromMilliseconds(300));
        await Task.WhenAll(
            Task.Run(() =>
            {
                while (!stop.IsCancellationRequested)
                {
                    machine.Vcpus[0].Kick();
                }
            }),
            Task.Run(() =>
            {
                while (!stop.IsCancellationRequested)
                {
                    machine.Pause();
                    machine.Resume();
                }
            }),
            Task.Run(() =>
            {
                while (!stop.IsCancellationRequested)
                {
                    _ = machine.Memory.Read<ulong>(0x20000);
                    _ = machine.Vcpus[0].InstructionCount;
                }
            })).WaitAsync(Limit);
        await WaitFor(() => machine.Memory.Read<ulong>(0x20000) > 1000); // no kick and no pause stays behind
        machine.Stop();
    }

    [Fact]
    public async Task SixteenRunAtOnce()
    {
        var machines = Enumerable.Range(0, 16).Select(_ => Guest.Create(Guest.CountLoop)).ToList();
        foreach (var machine in machines)
        {
            machine.Start();
        }
        await WaitFor(() => machines.TrueForAll(m => m.Memory.Read<ulong>(0x20000) > 0));
        foreach (var machine in machines)
        {
            await machine.DisposeAsync();
        }
    }

    [Fact]
    public void CyclesLeaveNothingBehind()
    {
        for (var i = 0; i < 20; i++)
        {
            Cycle(i);
        }
        var (threads, handles) = Usage();
        for (var i = 0; i < 200; i++)
        {
            Cycle(i);
        }
        var (threadsAfter, handlesAfter) = Usage();
        // The runtime's own come and go; what each fifth machine leaves behind would be forty.
        Assert.True(threadsAfter <= threads + 20, $"{threads} threads before, {threadsAfter} after");
        Assert.True(handlesAfter <= handles + 20, $"{handles} handles before, {handlesAfter} after");

        static void Cycle(int i)
        {
            using var machine = Guest.Create(i % 2 == 0 ? Guest.CountLoop : Guest.Idle, i % 3 == 0 ? ClockMode.Virtual : ClockMode.Real);
            if (i % 4 != 0)
            {
                machine.Start();
            }
            if (i % 5 == 0)
            {
                machine.Pause();
            }
        }

        static (int Threads, int Handles) Usage()
        {
            GC.Collect();
            GC.WaitForPendingFinalizers();
            return (Process.GetCurrentProcess().Threads.Count, Directory.GetFileSystemEntries("/proc/self/fd").Length);
        }
    }

    [Fact]
    public async Task MisuseIsRefusedInEveryState()
    {
        var machine = Guest.Create(Guest.Spin);
        machine.Pause(); // nothing to pause
        machine.Resume();
        machine.Start();
        Assert.Throws<InvalidOperationException>(machine.Start);
        Assert.Throws<InvalidOperationException>(() => machine.CreateVcpu());
        Assert.Throws<InvalidOperationException>(() => machine.RunUntil(1));
        Assert.Throws<InvalidOperationException>(() => machine.SaveState());
        Assert.Throws<InvalidOperationException>(() => machine.Vcpus[0].Run());
        Assert.Throws<InvalidOperationException>(() => machine.Vcpus[0].Dispose());
        machine.Stop();
        machine.Stop();
        machine.Resume();
        Assert.Equal(VmExitKind.Stopped, (await machine.WaitForExitAsync()).Kind);
        Assert.Throws<InvalidOperationException>(machine.Start);
        machine.Dispose();
        machine.Dispose();
        await machine.DisposeAsync();
        Assert.Throws<ObjectDisposedException>(machine.Start);
        Assert.Throws<ObjectDisposedException>(machine.Pause);
        Assert.Throws<ObjectDisposedException>(() => machine.Memory.Read<byte>(0));
        Assert.Throws<ObjectDisposedException>(() => machine.Vcpus[0].GetRegisters());
        Assert.Throws<ObjectDisposedException>(machine.Vcpus[0].Kick);
        machine.RequestPowerOff();
    }

    [Fact]
    public void InvalidOptionsAreRefused()
    {
        Assert.Throws<KvmSharpException>(() => new VirtualMachine(new VirtualMachineOptions { MemorySize = 4095 }));
        Assert.Throws<KvmSharpException>(() => new VirtualMachine(new VirtualMachineOptions { MemorySize = 1UL << 60 }));
        Assert.Throws<KvmSharpException>(() => new VirtualMachine(new VirtualMachineOptions { Clock = (ClockMode)7 }));
        Assert.Equal(KvmSharpErrorCode.NotSupported,
            Assert.Throws<KvmSharpException>(() => new VirtualMachine(new VirtualMachineOptions { VcpuCount = VirtualMachineOptions.MaxVcpuCount + 1 })).ErrorCode);
        using var machine = new VirtualMachine(new VirtualMachineOptions { VcpuCount = 0 });
        Assert.Throws<InvalidOperationException>(machine.Start);
        for (var i = 0; i < VirtualMachineOptions.MaxVcpuCount; i++)
        {
            machine.CreateVcpu();
        }

        Assert.Throws<KvmSharpException>(() => machine.CreateVcpu());
    }

    [Fact]
    public async Task TimerOfTheClockFiresInTheMachine()
    {
        using var machine = Guest.Create(Guest.Idle);
        var fired = new TaskCompletionSource<bool>();
        var thread = "";
        using var timer = machine.Clock.CreateTimer(_ =>
        {
            thread = Thread.CurrentThread.Name;
            fired.TrySetResult(true);
        }, null, TimeSpan.FromMilliseconds(20), Timeout.InfiniteTimeSpan);
        machine.Start();
        await fired.Task.WaitAsync(Limit);
        Assert.Equal("vcpu 0", thread);
        Assert.True(machine.Clock.Nanoseconds >= 20_000_000);
    }

    [Fact]
    public async Task VirtualClockJumpsOverIdleTime()
    {
        using var machine = Guest.Create(Guest.Idle, ClockMode.Virtual);
        var fired = new TaskCompletionSource<ulong>();
        using var timer = machine.Clock.CreateTimer(_ => fired.TrySetResult(machine.Clock.Nanoseconds), null, TimeSpan.FromHours(10), Timeout.InfiniteTimeSpan);
        machine.Start();
        Assert.Equal(36_000_000_000_000u, await fired.Task.WaitAsync(Limit));
    }

    [Theory]
    [InlineData(ClockMode.Real)]
    [InlineData(ClockMode.Virtual)]
    public async Task DoorbellRingsWithoutTheBus(ClockMode clock)
    {
        using var machine = Guest.Create(Guest.PortLoop, clock);
        var rung = new TaskCompletionSource();
        using var doorbell = machine.CreateDoorbell(new DoorbellOptions { Address = 0x80, IsPort = true, Length = 1, Value = 7 }, () => rung.TrySetResult());
        var seen = new List<byte>();
        var enough = new TaskCompletionSource();
        machine.Ports.Map(
            new ActionDevice(() => { }, value =>
            {
                seen.Add(value);
                if (seen.Count == 8)
                {
                    enough.SetResult();
                }
            }),
            0x80,
            1);
        machine.Start();
        await Task.WhenAll(rung.Task, enough.Task).WaitAsync(Limit);
        machine.Stop();
        Assert.Equal([1, 2, 3, 4, 5, 6, 8, 9], seen.Take(8));
    }

    [Fact]
    public void DoorbellsMayBeDisposedInAnyOrder()
    {
        var machine = Guest.Create(Guest.Spin);
        var doorbell = machine.CreateDoorbell(new DoorbellOptions { Address = 0xd000_0000, Length = 4 }, () => { });
        Assert.Throws<KvmSharpException>(() => machine.CreateDoorbell(new DoorbellOptions { Address = 0xd000_0000, Length = 4 }, () => { }));
        Assert.Throws<KvmSharpException>(() => machine.CreateDoorbell(new DoorbellOptions { Address = 0, Length = 3 }, () => { }));
        machine.Dispose();
        doorbell.Dispose();
        doorbell.Dispose();
    }

    [Fact]
    public void InterruptLinesAreWiredOr()
    {
        using var machine = Guest.Create(Guest.Spin);
        var a = machine.GetInterruptLine(5);
        var b = machine.GetInterruptLine(5);
        a.Raise();
        b.Raise();
        a.Raise();
        a.Lower();
        Assert.True(b.IsHigh);
        Assert.False(a.IsHigh);
        b.Lower();
        b.Pulse();
        Assert.Throws<ArgumentOutOfRangeException>(() => machine.GetInterruptLine(-1));
        Assert.Throws<ArgumentOutOfRangeException>(() => machine.GetInterruptLine(1024));
        machine.SignalMsi(new MsiMessage(0xfee0_0000, 0x41));
        machine.SetGsiRouting([GsiRoute.ToPin(5, InterruptChip.Ioapic, 5), GsiRoute.ToMessage(30, new MsiMessage(0xfee0_0000, 0x42))]);
        Assert.Throws<KvmSharpException>(() => machine.SetGsiRouting([GsiRoute.ToPin(5, InterruptChip.Ioapic, 24)]));
    }

    private static async Task WaitFor(Func<bool> condition)
    {
        var watch = Stopwatch.StartNew();
        while (!condition())
        {
            Assert.True(watch.Elapsed < Limit);
            await Task.Delay(2);
        }
    }

    private sealed class ActionDevice(Action action, Action<byte>? write = null) : IIoDevice
    {
        public void Read(ulong offset, Span<byte> data) => action();

        public void Write(ulong offset, ReadOnlySpan<byte> data)
        {
            write?.Invoke(data[0]);
            action();
        }
    }
}
