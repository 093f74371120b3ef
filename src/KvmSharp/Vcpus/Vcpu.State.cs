using KvmSharp.Interop;

namespace KvmSharp;

/// <content>Access to the state.</content>
public sealed unsafe partial class Vcpu
{
    /// <summary>
    /// Instructions retired since the reset; a REP instruction counts once. Callable from any thread; exact while the vCPU is
    /// outside the guest, otherwise the count at its last exit.
    /// </summary>
    public ulong InstructionCount
    {
        get
        {
            if (!_owner.TryEnter())
            {
                return GetStatistics().Instructions;
            }
            try
            {
                return ReadInstructionCount();
            }
            finally
            {
                _owner.Exit();
            }
        }
    }

    /// <summary>The general registers.</summary>
    /// <exception cref="InvalidOperationException">The vCPU is running.</exception>
    public Registers GetRegisters()
    {
        using var owned = new Owned(this);
        Registers registers;
        NativeMethods.VcpuGetRegs(_handle, &registers).ThrowIfFailed("read the registers");
        return registers;
    }

    /// <summary>Sets the general registers.</summary>
    /// <param name="registers">The new values.</param>
    /// <exception cref="InvalidOperationException">The vCPU is running.</exception>
    public void SetRegisters(in Registers registers)
    {
        using var owned = new Owned(this);
        var copy = registers;
        NativeMethods.VcpuSetRegs(_handle, &copy).ThrowIfFailed("set the registers");
    }

    /// <summary>Segment and control registers.</summary>
    /// <exception cref="InvalidOperationException">The vCPU is running.</exception>
    public SpecialRegisters GetSpecialRegisters()
    {
        using var owned = new Owned(this);
        SpecialRegisters registers;
        NativeMethods.VcpuGetSregs(_handle, &registers).ThrowIfFailed("read the special registers");
        return registers;
    }

    /// <summary>Sets segment and control registers.</summary>
    /// <param name="registers">The new values.</param>
    /// <exception cref="KvmSharpException">A processor cannot be in that state; nothing has changed.</exception>
    /// <exception cref="InvalidOperationException">The vCPU is running.</exception>
    public void SetSpecialRegisters(in SpecialRegisters registers)
    {
        using var owned = new Owned(this);
        var copy = registers;
        NativeMethods.VcpuSetSregs(_handle, &copy).ThrowIfFailed("set the special registers");
    }

    /// <summary>x87 and SSE state.</summary>
    /// <exception cref="InvalidOperationException">The vCPU is running.</exception>
    public FpuRegisters GetFpuRegisters()
    {
        using var owned = new Owned(this);
        FpuRegisters registers;
        NativeMethods.VcpuGetFpu(_handle, &registers).ThrowIfFailed("read the FPU registers");
        return registers;
    }

    /// <summary>Sets x87 and SSE state.</summary>
    /// <param name="registers">The new values.</param>
    /// <exception cref="InvalidOperationException">The vCPU is running.</exception>
    public void SetFpuRegisters(in FpuRegisters registers)
    {
        using var owned = new Owned(this);
        var copy = registers;
        NativeMethods.VcpuSetFpu(_handle, &copy).ThrowIfFailed("set the FPU registers");
    }

    /// <summary>A model-specific register.</summary>
    /// <param name="index">The number, as RDMSR takes it in ECX.</param>
    /// <exception cref="KvmSharpException">The vCPU has no such register.</exception>
    /// <exception cref="InvalidOperationException">The vCPU is running.</exception>
    public ulong GetMsr(uint index)
    {
        using var owned = new Owned(this);
        var entry = new KvsMsrEntry { Index = index };
        if (NativeMethods.VcpuGetMsrs(_handle, &entry, 1).ThrowIfFailed("read the MSR") != 1)
        {
            throw new KvmSharpException(KvmSharpErrorCode.NotFound, $"The vCPU has no MSR 0x{index:x}.");
        }
        return entry.Data;
    }

    /// <summary>Sets a model-specific register.</summary>
    /// <param name="index">The number, as WRMSR takes it in ECX.</param>
    /// <param name="value">The new value.</param>
    /// <exception cref="KvmSharpException">The vCPU has no such register, or the register does not take the value.</exception>
    /// <exception cref="InvalidOperationException">The vCPU is running.</exception>
    public void SetMsr(uint index, ulong value)
    {
        using var owned = new Owned(this);
        var entry = new KvsMsrEntry { Index = index, Data = value };
        if (NativeMethods.VcpuSetMsrs(_handle, &entry, 1).ThrowIfFailed("set the MSR") != 1)
        {
            throw new KvmSharpException(KvmSharpErrorCode.InvalidArgument, $"MSR 0x{index:x} does not exist or does not take 0x{value:x}.");
        }
    }

    /// <summary>The CPUID leaves that the guest sees.</summary>
    /// <exception cref="InvalidOperationException">The vCPU is running.</exception>
    public IReadOnlyList<CpuidEntry> GetCpuid()
    {
        using var owned = new Owned(this);
        var entries = new CpuidEntry[256];
        var count = (uint)entries.Length;
        fixed (CpuidEntry* p = entries)
        {
            NativeMethods.VcpuGetCpuid2(_handle, p, &count).ThrowIfFailed("read the CPUID leaves");
        }
        return entries[..(int)count];
    }

    /// <summary>Sets the CPUID leaves that the guest sees. Before the first run.</summary>
    /// <param name="entries">The leaves; normally those of <see cref="CpuModel.BuildCpuid"/>.</param>
    /// <exception cref="KvmSharpException">A leaf announces what the core does not have.</exception>
    /// <exception cref="InvalidOperationException">The vCPU is running.</exception>
    public void SetCpuid(IReadOnlyList<CpuidEntry> entries)
    {
        ArgumentNullException.ThrowIfNull(entries);
        using var owned = new Owned(this);
        fixed (CpuidEntry* p = entries.ToArray())
        {
            NativeMethods.VcpuSetCpuid2(_handle, p, (uint)entries.Count).ThrowIfFailed("set the CPUID leaves");
        }
    }

    /// <summary>Translates a linear address with the page tables of the moment, without side effects.</summary>
    /// <param name="linearAddress">The linear address.</param>
    /// <returns>Where it leads, or <see langword="null"/> if it is not mapped.</returns>
    /// <exception cref="InvalidOperationException">The vCPU is running.</exception>
    public Translation? Translate(ulong linearAddress)
    {
        using var owned = new Owned(this);
        var translation = new KvsTranslation { LinearAddress = linearAddress };
        NativeMethods.VcpuTranslate(_handle, &translation).ThrowIfFailed("translate an address");
        return translation.Valid != 0
            ? new Translation(translation.PhysicalAddress, translation.Writeable != 0, translation.Usermode != 0)
            : null;
    }

    /// <summary>Puts the vCPU into its power-on state.</summary>
    /// <exception cref="InvalidOperationException">The vCPU is running.</exception>
    public void Reset()
    {
        using var owned = new Owned(this);
        NativeMethods.VcpuReset(_handle).ThrowIfFailed("reset the vCPU");
    }

    /// <summary>
    /// Makes <see cref="Run"/> return with <see cref="VcpuExitReason.InstructionLimit"/> when so many instructions have
    /// retired since the reset. In a machine that runs its vCPUs itself the limit pauses the machine.
    /// </summary>
    /// <param name="instructionCount">The count; <see cref="ulong.MaxValue"/> takes the limit away.</param>
    /// <exception cref="InvalidOperationException">The vCPU is running.</exception>
    public void SetInstructionLimit(ulong instructionCount)
    {
        using var owned = new Owned(this);
        NativeMethods.VcpuSetInsnLimit(_handle, instructionCount).ThrowIfFailed("set the instruction limit");
        _instructionLimit = instructionCount;
    }

    /// <summary>Makes the vCPU exit with <see cref="VcpuExitReason.Debug"/> after each instruction, or not any more.</summary>
    /// <param name="enabled">Whether to step.</param>
    /// <exception cref="InvalidOperationException">The vCPU is running.</exception>
    public void SetSingleStep(bool enabled)
    {
        using var owned = new Owned(this);
        var debug = new KvsGuestDebug { Control = enabled ? 3u : 0u };
        NativeMethods.VcpuSetGuestDebug(_handle, &debug).ThrowIfFailed("set single-step");
    }

    /// <summary>Injects an external interrupt in a machine without interrupt controller.</summary>
    /// <param name="vector">The vector.</param>
    /// <exception cref="KvmSharpException">The machine has an interrupt controller, or an interrupt is pending already.</exception>
    /// <exception cref="InvalidOperationException">The vCPU is running.</exception>
    public void InjectInterrupt(byte vector)
    {
        using var owned = new Owned(this);
        NativeMethods.VcpuInterrupt(_handle, vector).ThrowIfFailed("inject an interrupt");
    }

    /// <summary>
    /// Reports a hardware error to the guest. An uncorrected one raises a machine-check exception, or shuts the vCPU down when
    /// the guest has not enabled that exception or is still handling one.
    /// </summary>
    /// <param name="error">The error.</param>
    /// <exception cref="KvmSharpException">There is no such bank, or the status has no VAL bit.</exception>
    /// <exception cref="InvalidOperationException">The vCPU is running.</exception>
    public void InjectMachineCheck(MachineCheck error)
    {
        using var owned = new Owned(this);
        var mce = new KvsX86Mce
        {
            Bank = error.Bank,
            Status = error.Status,
            Addr = error.Address,
            Misc = error.Miscellaneous,
            McgStatus = error.GlobalStatus,
        };
        NativeMethods.VcpuSetMce(_handle, &mce).ThrowIfFailed("report a machine check");
    }

    /// <summary>Sends a non-maskable interrupt. Callable from any thread.</summary>
    public void InjectNmi() => NativeMethods.VcpuNmi(_handle).ThrowIfFailed("send an NMI");

    /// <summary>Sends a system management interrupt. Callable from any thread.</summary>
    /// <exception cref="KvmSharpException">The machine has no <see cref="VirtualMachineOptions.SystemManagementMode"/>.</exception>
    public void InjectSmi() => NativeMethods.VcpuSmi(_handle).ThrowIfFailed("send a system management interrupt");

    /// <summary>Counters since creation. Callable from any thread; values may be a moment old.</summary>
    public VcpuStatistics GetStatistics()
    {
        KvsVcpuStats stats;
        NativeMethods.VcpuGetStats(_handle, &stats).ThrowIfFailed("read the statistics");
        return new VcpuStatistics
        {
            Instructions = stats.Retired,
            Exits = stats.Exits,
            IoExits = stats.ExitsIo,
            MmioExits = stats.ExitsMmio,
            Halts = stats.Halts,
            Interrupts = stats.Interrupts,
            Exceptions = stats.Exceptions,
            BlocksDecoded = stats.BlocksDecoded,
            BlocksInvalidated = stats.BlocksInvalidated,
            CacheFlushes = stats.CacheFlushes,
            TlbFills = stats.TlbFills,
            TlbFlushes = stats.TlbFlushes,
        };
    }

    /// <summary>Records every executed instruction in a ring. The guest runs much slower with it.</summary>
    /// <param name="entries">The size of the ring; 0 turns the trace off.</param>
    /// <exception cref="InvalidOperationException">The vCPU is running.</exception>
    public void SetTrace(int entries)
    {
        ArgumentOutOfRangeException.ThrowIfNegative(entries);
        using var owned = new Owned(this);
        NativeMethods.VcpuSetTrace(_handle, (uint)entries).ThrowIfFailed("set the trace");
    }

    /// <summary>Takes the oldest entries out of the trace.</summary>
    /// <param name="entries">Where they go.</param>
    /// <returns>How many there were.</returns>
    /// <exception cref="InvalidOperationException">The vCPU is running.</exception>
    public int ReadTrace(Span<TraceEntry> entries)
    {
        using var owned = new Owned(this);
        fixed (TraceEntry* p = entries)
        {
            return NativeMethods.VcpuReadTrace(_handle, p, (uint)entries.Length).ThrowIfFailed("read the trace");
        }
    }

    internal VcpuHandle Handle => _handle;

    /// <summary>
    /// The power-on state, but without execution: nothing but <see cref="Wake"/> and, on all but the first vCPU, a start by
    /// another vCPU ends it. Counting of instructions goes on.
    /// </summary>
    internal void Sleep()
    {
        using var owned = new Owned(this);
        KvsCoreState core;
        NativeMethods.VcpuGetCoreState(_handle, &core).ThrowIfFailed("read the instruction count");
        NativeMethods.VcpuReset(_handle).ThrowIfFailed("reset the vCPU");
        var kept = new KvsCoreState { Retired = core.Retired, Turn = core.Turn };
        NativeMethods.VcpuSetCoreState(_handle, &kept).ThrowIfFailed("keep the instruction count");
        NativeMethods.VcpuSetInsnLimit(_handle, _instructionLimit).ThrowIfFailed("keep the instruction limit");
        SetActivity(KvsMpState.Uninitialized);
    }

    /// <summary>Lets the vCPU execute from where it stands.</summary>
    internal void Wake()
    {
        using var owned = new Owned(this);
        SetActivity(KvsMpState.Runnable);
    }

    private void SetActivity(uint state)
    {
        var activity = new KvsMpState { MpState = state };
        NativeMethods.VcpuSetMpState(_handle, &activity).ThrowIfFailed("set the activity state");
    }

    /// <summary>The exact count, of a vCPU that is outside the guest.</summary>
    internal ulong ReadInstructionCount()
    {
        using var owned = new Owned(this);
        KvsCoreState state;
        NativeMethods.VcpuGetCoreState(_handle, &state).ThrowIfFailed("read the instruction count");
        return state.Retired;
    }

    internal Owned TakeOwnership() => new(this);

    /// <summary>Keeps the vCPU out of the guest for the length of a scope.</summary>
    internal readonly ref struct Owned
    {
        private readonly Vcpu _vcpu;

        public Owned(Vcpu vcpu)
        {
            vcpu.Own();
            _vcpu = vcpu;
        }

        public void Dispose() => _vcpu._owner.Exit();
    }
}
