namespace KvmSharp;

/// <summary>What time a machine's clock tells.</summary>
public enum ClockMode
{
    /// <summary>The host's monotonic time.</summary>
    Real = 0,
    /// <summary>
    /// Time that advances with the instructions that the guest retires and jumps over idle phases, so that two
    /// runs of one guest are identical.
    /// </summary>
    Virtual = 1,
}

/// <summary>How guest code is executed. What a guest sees is the same with every engine.</summary>
public enum ExecutionEngine
{
    /// <summary>The translator (<see cref="Jit"/>) where the host lets a process map executable memory, else the interpreter.</summary>
    Auto = 0,
    /// <summary>Decoded instructions, one after another. Works on every host.</summary>
    Interpreter = 1,
    /// <summary>
    /// Code that runs often is translated to host code; everything else is interpreted. Needs a host that
    /// lets a process map executable memory.
    /// </summary>
    Jit = 2,
}

/// <summary>How a <see cref="VirtualMachine"/> is made. The machine copies the options when it is created.</summary>
public sealed record VirtualMachineOptions
{
    /// <summary>The most vCPUs that one machine can have.</summary>
    public const int MaxVcpuCount = 64;

    /// <summary>
    /// RAM in bytes that the machine maps at guest-physical address 0 when it is created: a multiple of 4096.
    /// 0, the default, maps none; use <see cref="GuestMemory.AddRam(GuestAddress, ulong, MemorySlotFlags)"/> then.
    /// </summary>
    public ulong MemorySize { get; init; }

    /// <summary>The processor that the guest sees.</summary>
    public CpuModel Cpu { get; init; } = CpuModel.Default;

    /// <summary>What time the machine's clock tells.</summary>
    public ClockMode Clock { get; init; } = ClockMode.Real;

    /// <summary>How guest code is executed.</summary>
    public ExecutionEngine Engine { get; init; } = ExecutionEngine.Auto;

    /// <summary>
    /// The rate of the guest's time-stamp counter in kHz, by default 1,000,000, so that a saved machine goes on anywhere;
    /// 0 takes the host's on a real clock.
    /// </summary>
    public uint TscKilohertz { get; init; } = 1_000_000;

    /// <summary>
    /// The wall-clock time at which the machine's clock reads 0. <see langword="null"/> takes the host's time at
    /// creation (real clock) or 2020-01-01 00:00 UTC (virtual clock).
    /// </summary>
    public DateTimeOffset? StartTime { get; init; }

    /// <summary>The number of vCPUs that the machine creates at once: 0 to <see cref="MaxVcpuCount"/>.</summary>
    public int VcpuCount { get; init; } = 1;

    /// <summary>
    /// Whether the machine has the interrupt controllers (PIC pair, IOAPIC, local APICs) and the timer (PIT, port 0x61)
    /// of a PC. Without them, a HLT instruction ends the machine.
    /// </summary>
    public bool InterruptController { get; init; } = true;

    /// <summary>
    /// Whether the processors have system management mode. Without it, which is the default, system management interrupts of
    /// the guest go nowhere and RSM is no instruction.
    /// </summary>
    public bool SystemManagementMode { get; init; }

    internal void Validate()
    {
        ArgumentNullException.ThrowIfNull(Cpu);
        if (MemorySize % GuestMemory.PageSize != 0)
        {
            throw new KvmSharpException(KvmSharpErrorCode.InvalidArgument, $"The memory size {MemorySize} is not a multiple of 4096 bytes.");
        }
        if (MemorySize > GuestMemory.MaxSize)
        {
            throw new KvmSharpException(KvmSharpErrorCode.InvalidArgument, $"The memory size {MemorySize} is larger than a guest can address.");
        }
        if (Clock is not (ClockMode.Real or ClockMode.Virtual))
        {
            throw new KvmSharpException(KvmSharpErrorCode.InvalidArgument, $"The clock mode {Clock} does not exist.");
        }
        if (Engine is < ExecutionEngine.Auto or > ExecutionEngine.Jit)
        {
            throw new KvmSharpException(KvmSharpErrorCode.InvalidArgument, $"The execution engine {Engine} does not exist.");
        }
        if (VcpuCount is < 0 or > MaxVcpuCount)
        {
            throw new KvmSharpException(KvmSharpErrorCode.NotSupported, $"A machine has at most {MaxVcpuCount} vCPU, not {VcpuCount}.");
        }
    }
}
