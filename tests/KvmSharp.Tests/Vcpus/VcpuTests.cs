using KvmSharp.Boot;

namespace KvmSharp.Tests.Vcpus;

public sealed class VcpuTests
{
    private const ulong CodeAddress = 0x10000;

    [Fact]
    public void RunReturnsAtPortAccess()
    {
        // mov dx, 0x1234; mov al, 0x5a; out dx, al; hlt
        using var machine = Start([0x66, 0xba, 0x34, 0x12, 0xb0, 0x5a, 0xee, 0xf4]);
        var exit = machine.Vcpus[0].Run();
        Assert.Equal(VcpuExitReason.Io, exit.Reason);
        Assert.True(exit.IsWrite);
        Assert.Equal(0x1234u, exit.Address);
        Assert.Equal((1, 1), (exit.Size, exit.Count));
        Assert.Equal(0x5a, exit.Data[0]);
        Assert.Equal(VcpuExitReason.Halt, machine.Vcpus[0].Run().Reason);
    }

    [Fact]
    public void PortReadIsCompletedAtTheNextRun()
    {
        // in eax, 0x40 -> mov ebx, eax; hlt
        using var machine = Start([0xe5, 0x70, 0x89, 0xc3, 0xf4]);
        var exit = machine.Vcpus[0].Run();
        Assert.False(exit.IsWrite);
        Assert.Equal(4, exit.Data.Length);
        BitConverter.TryWriteBytes(exit.Data, 0x1234_5678);
        Assert.Equal(VcpuExitReason.Halt, machine.Vcpus[0].Run().Reason);
        Assert.Equal(0x1234_5678u, machine.Vcpus[0].GetRegisters().Rbx);
    }

    [Fact]
    public void MemoryMappedReadIsCompletedAtTheNextRun()
    {
        // mov eax, 0xd0000000; mov rbx, [rax]; hlt
        using var machine = Start([0xb8, 0, 0, 0, 0xd0, 0x48, 0x8b, 0x18, 0xf4]);
        var exit = machine.Vcpus[0].Run();
        Assert.Equal(VcpuExitReason.Mmio, exit.Reason);
        Assert.Equal(0xd000_0000u, exit.Address);
        Assert.Equal(8, exit.Size);
        BitConverter.TryWriteBytes(exit.Data, 0x1122_3344_5566_7788);
        Assert.Equal(VcpuExitReason.Halt, machine.Vcpus[0].Run().Reason);
        Assert.Equal(0x1122_3344_5566_7788u, machine.Vcpus[0].GetRegisters().Rbx);
    }

    [Fact]
    public void KickBeforeRunIsNotLost()
    {
        using var machine = Start([0xeb, 0xfe]); // jmp $
        machine.Vcpus[0].Kick();
        Assert.Equal(VcpuExitReason.Interrupted, machine.Vcpus[0].Run().Reason);
    }

    [Fact]
    public async Task KickComesThroughAtAnyMoment()
    {
        using var machine = Start([0xeb, 0xfe]);
        var vcpu = machine.Vcpus[0];
        var random = new Random(1);
        for (var i = 0; i < 500; i++)
        {
            var run = Task.Run(() => vcpu.Run().Reason);
            Thread.SpinWait(random.Next(2000));
            vcpu.Kick();
            Assert.Equal(VcpuExitReason.Interrupted, await run.WaitAsync(TimeSpan.FromSeconds(60)));
        }
    }

    [Fact]
    public async Task StateIsOutOfReachWhileTheGuestRuns()
    {
        using var machine = Start([0xeb, 0xfe]);
        var vcpu = machine.Vcpus[0];
        var run = Task.Run(() => vcpu.Run().Reason);
        await WaitUntil(() => vcpu.GetStatistics().Instructions > 0 || Throws(vcpu));
        Assert.Throws<InvalidOperationException>(() => vcpu.GetRegisters());
        Assert.Throws<InvalidOperationException>(() => vcpu.Run());
        vcpu.Kick();
        await run;
        Assert.Equal(CodeAddress, vcpu.GetRegisters().Rip);

        static bool Throws(Vcpu vcpu)
        {
            try
            {
                vcpu.GetRegisters();
                return false;
            }
            catch (InvalidOperationException)
            {
                return true;
            }
        }
    }

    [Fact]
    public void InstructionLimitIsExact()
    {
        // 1: inc rax; jmp 1b
        using var machine = Start([0x48, 0xff, 0xc0, 0xeb, 0xfb]);
        var vcpu = machine.Vcpus[0];
        vcpu.SetInstructionLimit(1001);
        Assert.Equal(VcpuExitReason.InstructionLimit, vcpu.Run().Reason);
        Assert.Equal(1001u, vcpu.InstructionCount);
        Assert.Equal(501u, vcpu.GetRegisters().Rax);
    }

    [Fact]
    public void SingleStepStopsAfterEachInstruction()
    {
        using var machine = Start([0x48, 0xff, 0xc0, 0x48, 0xff, 0xc0, 0xf4]);
        var vcpu = machine.Vcpus[0];
        vcpu.SetSingleStep(true);
        var exit = vcpu.Run();
        Assert.Equal((VcpuExitReason.Debug, CodeAddress + 3), (exit.Reason, exit.Address));
        Assert.Equal(VcpuExitReason.Debug, vcpu.Run().Reason);
        vcpu.SetSingleStep(false);
        Assert.Equal(VcpuExitReason.Halt, vcpu.Run().Reason);
        Assert.Equal(2u, vcpu.GetRegisters().Rax);
    }

    [Fact]
    public void TraceShowsWhatRan()
    {
        using var machine = Start([0x48, 0xff, 0xc0, 0x48, 0xff, 0xc0, 0xf4]);
        var vcpu = machine.Vcpus[0];
        vcpu.SetTrace(16);
        Assert.Equal(VcpuExitReason.Halt, vcpu.Run().Reason);
        var entries = new TraceEntry[16];
        var count = vcpu.ReadTrace(entries);
        Assert.Equal(3, count);
        Assert.Equal([CodeAddress, CodeAddress + 3, CodeAddress + 6], entries[..count].Select(e => e.Rip));
        Assert.Equal(1u, entries[1].Registers[0]);
        Assert.Equal(64u, entries[0].Mode);
    }

    [Fact]
    public void RegistersAreKept()
    {
        using var machine = Start([0xf4]);
        var vcpu = machine.Vcpus[0];
        var registers = new Registers
        {
            Rax = 1, Rbx = 2, Rcx = 3, Rdx = 4, Rsi = 5, Rdi = 6, Rsp = 7, Rbp = 8, R8 = 9, R9 = 10, R10 = 11, R11 = 12, R12 = 13,
            R13 = 14, R14 = 15, R15 = 16, Rip = CodeAddress, Rflags = 2,
        };
        vcpu.SetRegisters(registers);
        Assert.Equal(registers, vcpu.GetRegisters());
        var fpu = vcpu.GetFpuRegisters();
        fpu.Xmm[15] = new Register128(1, 2);
        fpu.Mxcsr = 0x1fa0;
        vcpu.SetFpuRegisters(fpu);
        Assert.Equal(new Register128(1, 2), vcpu.GetFpuRegisters().Xmm[15]);
        Assert.Equal(0x1fa0u, vcpu.GetFpuRegisters().Mxcsr);
    }

    [Fact]
    public void MsrsAreCheckedByNumber()
    {
        using var machine = Start([0xf4]);
        var vcpu = machine.Vcpus[0];
        const uint LongStar = 0xc000_0082;
        vcpu.SetMsr(LongStar, 0xffff_8000_0000_1000);
        Assert.Equal(0xffff_8000_0000_1000u, vcpu.GetMsr(LongStar));
        Assert.Equal(KvmSharpErrorCode.NotFound, Assert.Throws<KvmSharpException>(() => vcpu.GetMsr(0x1234_5678)).ErrorCode);
    }

    [Fact]
    public void ImpossibleStateIsRefused()
    {
        using var machine = Start([0xf4]);
        var vcpu = machine.Vcpus[0];
        var before = vcpu.GetSpecialRegisters();
        Assert.Throws<KvmSharpException>(() => vcpu.SetSpecialRegisters(before with { Cr0 = 0x8000_0000 })); // paging without protection
        Assert.Equal(before, vcpu.GetSpecialRegisters());
    }

    [Fact]
    public void TranslateFollowsThePageTables()
    {
        using var machine = Start([0xf4]);
        Assert.Equal(CodeAddress, machine.Vcpus[0].Translate(CodeAddress)?.Address.Value);
        Assert.Null(machine.Vcpus[0].Translate(0xffff_8000_0000_0000));
    }

    [Fact]
    public async Task MachineMayBeDisposedWhileTheHostRunsAVcpu()
    {
        var machine = Start([0xeb, 0xfe]);
        var vcpu = machine.Vcpus[0];
        void RunForEver()
        {
            while (true)
            {
                Assert.Equal(VcpuExitReason.Interrupted, vcpu.Run().Reason);
            }
        }
        var run = Task.Run((Action)RunForEver);
        await WaitUntil(() => run.Status == TaskStatus.Running);
        machine.Dispose();
        await Assert.ThrowsAsync<ObjectDisposedException>(() => run.WaitAsync(TimeSpan.FromSeconds(60)));
        Assert.Equal(VirtualMachineStatus.Disposed, machine.Status);
    }

    [Fact]
    public void TripleFaultIsAnExit()
    {
        using var machine = Start([0x0f, 0x0b]); // ud2 without an IDT
        Assert.Equal(VcpuExitReason.Shutdown, machine.Vcpus[0].Run().Reason);
    }

    private static VirtualMachine Start(byte[] code)
    {
        var machine = new VirtualMachine(new VirtualMachineOptions { MemorySize = 1 << 20, InterruptController = false });
        FlatLoader.Load(machine.Memory, machine.Vcpus[0], BootImage.FromBytes(code), CodeAddress);
        return machine;
    }

    private static async Task WaitUntil(Func<bool> condition)
    {
        for (var i = 0; !condition(); i++)
        {
            Assert.InRange(i, 0, 12_000);
            await Task.Delay(5);
        }
    }
}
