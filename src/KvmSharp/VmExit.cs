namespace KvmSharp;

/// <summary>Why a machine came to its end.</summary>
public enum VmExitKind
{
    /// <summary>The guest switched itself off.</summary>
    PowerOff,
    /// <summary>The guest asked for a reset.</summary>
    Reset,
    /// <summary>The guest wrote to the ISA debug exit device; <see cref="VmExit.ExitCode"/> is what it implies.</summary>
    DebugExit,
    /// <summary>The guest's processor shut down after a triple fault.</summary>
    TripleFault,
    /// <summary>A HLT instruction in a machine without interrupt controller.</summary>
    Halted,
    /// <summary>The execution core cannot go on; <see cref="VmExit.Detail"/> says where and why.</summary>
    InternalError,
    /// <summary>A device of the host threw; <see cref="VmExit.Exception"/> is what it threw.</summary>
    Fault,
    /// <summary>The host stopped the machine.</summary>
    Stopped,
    /// <summary>The guest's kernel told through <see cref="Devices.PvPanic"/> that it has panicked.</summary>
    Panicked,
}

/// <summary>How a machine came to its end.</summary>
/// <param name="Kind">The reason.</param>
/// <param name="ExitCode">The process exit status that the guest asked for; 0 for a clean power-off or reset, 1 for failures.</param>
/// <param name="Detail">One line for the user, or <see langword="null"/>.</param>
/// <param name="Exception">What a device threw, for <see cref="VmExitKind.Fault"/>.</param>
public sealed record VmExit(VmExitKind Kind, int ExitCode = 0, string? Detail = null, Exception? Exception = null);

/// <summary>The life of a <see cref="VirtualMachine"/>.</summary>
public enum VirtualMachineStatus
{
    /// <summary>Not started yet.</summary>
    Created,
    /// <summary>The vCPU threads run the guest.</summary>
    Running,
    /// <summary>The vCPU threads wait outside the guest and the clock stands still.</summary>
    Paused,
    /// <summary>The machine has come to its end; its state can still be read.</summary>
    Stopped,
    /// <summary>Disposed.</summary>
    Disposed,
}

/// <summary>What devices ask of the machine that they are in. Callable from any thread; the first request decides.</summary>
public interface IMachineControl
{
    /// <summary>Ends the machine: the guest has switched it off.</summary>
    void RequestPowerOff();

    /// <summary>Ends the machine: the guest wants a reset.</summary>
    /// <param name="detail">What caused it, for the log.</param>
    void RequestReset(string? detail = null);

    /// <summary>Ends the machine with an exit status that the guest chose.</summary>
    /// <param name="exitCode">The process exit status.</param>
    void RequestExit(int exitCode);
}
