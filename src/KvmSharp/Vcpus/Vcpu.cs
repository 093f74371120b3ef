using KvmSharp.Interop;

namespace KvmSharp;

/// <summary>
/// A virtual processor. Either the machine runs it on its own thread (<see cref="VirtualMachine.Start"/>), or the host
/// calls <see cref="Run"/> and answers the exits itself. State is accessible while the vCPU is outside the guest: before
/// the start, while the machine is paused, after its end, and on the vCPU's own thread.
/// </summary>
public sealed unsafe partial class Vcpu : IDisposable
{
    private readonly VirtualMachine _machine;
    private readonly VcpuHandle _handle;
    private readonly KvsRun* _run;

    // Held by whoever is inside the guest or looks at the state.
    private readonly Lock _owner = new();
    private volatile bool _running;
    private Thread? _thread;
    private ulong _instructionLimit = ulong.MaxValue;

    internal Vcpu(VirtualMachine machine, int index, VcpuHandle handle)
    {
        _machine = machine;
        _handle = handle;
        _run = NativeMethods.VcpuRunBlock(handle);
        Index = index;
    }

    /// <summary>The number of the vCPU, which is its APIC id too.</summary>
    public int Index { get; }

    internal bool IsCurrentThread => _thread == Thread.CurrentThread;

    /// <summary>
    /// Runs the guest until the next exit. A port or memory read is completed by filling the exit's data before the next
    /// call. Not while the machine runs its vCPUs itself.
    /// </summary>
    /// <exception cref="InvalidOperationException">The vCPU is running already.</exception>
    public VcpuExit Run()
    {
        Own();
        var added = false;
        try
        {
            if (_running)
            {
                throw AlreadyRunning();
            }
            _handle.DangerousAddRef(ref added);
            _running = true;
            NativeMethods.VcpuRun(_handle.DangerousGetHandle()).ThrowIfFailed("run the vCPU");
            return ReadExit();
        }
        finally
        {
            _running = false;
            if (added)
            {
                _handle.DangerousRelease();
            }
            _owner.Exit();
        }
    }

    /// <summary>
    /// Makes the current <see cref="Run"/>, or the next one, return soon with <see cref="VcpuExitReason.Interrupted"/>.
    /// Never lost. Callable from any thread.
    /// </summary>
    public void Kick() => NativeMethods.VcpuKick(_handle);

    /// <summary>Frees the vCPU. A machine disposes its vCPUs itself.</summary>
    /// <exception cref="InvalidOperationException">The vCPU is running.</exception>
    public void Dispose()
    {
        if (_running && !IsCurrentThread)
        {
            throw AlreadyRunning();
        }
        _handle.Dispose();
    }

    /// <summary>The machine is gone: a run under way on a thread of the host comes back, another one finds the vCPU disposed.</summary>
    internal void Close()
    {
        if (!_handle.IsClosed)
        {
            Kick();
            _handle.Dispose();
        }
    }

    internal void StartThread()
    {
        _thread = new Thread(ThreadMain) { IsBackground = true, Name = $"vcpu {Index}" };
        _thread.Start();
    }

    internal void Join()
    {
        if (_thread is { } thread && thread != Thread.CurrentThread)
        {
            thread.Join();
        }
    }

    // The life of a vCPU thread. It holds one reference to the vCPU throughout and calls with the raw pointer.
    private void ThreadMain()
    {
        var added = false;
        try
        {
            _handle.DangerousAddRef(ref added);
            _owner.Enter();
            try
            {
                _running = true;
                RunLoop(_handle.DangerousGetHandle());
            }
            finally
            {
                _running = false;
                _owner.Exit();
            }
        }
        catch (Exception e)
        {
            _machine.ReportFault(e);
        }
        finally
        {
            if (added)
            {
                _handle.DangerousRelease();
            }
            _machine.ThreadEnded();
        }
    }

    private void RunLoop(nint vcpu)
    {
        while (true)
        {
            // With a request pending, one more entry completes an I/O instruction under way and leaves at once, so that
            // the state is at an instruction boundary.
            _run->ImmediateExit = _machine.Attention ? (byte)1 : (byte)0;
            NativeMethods.VcpuRun(vcpu).ThrowIfFailed("run the vCPU");
            var exit = ReadExit();
            switch (exit.Reason)
            {
                case VcpuExitReason.Io:
                case VcpuExitReason.Mmio:
                case VcpuExitReason.HostTimer:
                    _machine.Dispatch(exit);
                    break;
                case VcpuExitReason.Interrupted:
                    if (_machine.Attention && !Park())
                    {
                        return;
                    }
                    break;
                case VcpuExitReason.InstructionLimit:
                    NativeMethods.VcpuSetInsnLimit(_handle, ulong.MaxValue).ThrowIfFailed("clear the instruction limit");
                    _instructionLimit = ulong.MaxValue;
                    _machine.RequestPause();
                    break;
                case VcpuExitReason.Debug:
                    _machine.RequestPause();
                    break;
                case VcpuExitReason.InterruptWindow:
                    break;
                default:
                    _machine.ReportExit(DescribeEnd(exit));
                    return;
            }
        }
    }

    // Gives the state free while the machine is paused. False when the machine has come to its end.
    private bool Park()
    {
        _running = false;
        _owner.Exit();
        try
        {
            return _machine.Park();
        }
        finally
        {
            _owner.Enter();
            _running = true;
        }
    }

    private VmExit DescribeEnd(in VcpuExit exit)
    {
        Registers registers;
        NativeMethods.VcpuGetRegs(_handle, &registers).ThrowIfFailed("read registers");
        return exit.Reason switch
        {
            VcpuExitReason.Shutdown => new VmExit(VmExitKind.TripleFault, 1, $"Triple fault at RIP 0x{registers.Rip:x}."),
            VcpuExitReason.Halt => new VmExit(VmExitKind.Halted, 0, $"HLT without interrupt controller at RIP 0x{registers.Rip:x}."),
            _ => new VmExit(VmExitKind.InternalError, 1, $"The core stopped at RIP 0x{registers.Rip:x}: {exit.ToString()}."),
        };
    }

    private VcpuExit ReadExit()
    {
        var run = _run;
        switch (run->ExitReason)
        {
            case ExitReason.Io:
                var size = run->Io.Size;
                var count = (int)run->Io.Count;
                return new VcpuExit
                {
                    Reason = VcpuExitReason.Io,
                    Address = run->Io.Port,
                    IsWrite = run->Io.Direction != 0,
                    Size = size,
                    Count = count,
                    Data = new Span<byte>((byte*)run + run->Io.DataOffset, size * count),
                };
            case ExitReason.Mmio:
                return new VcpuExit
                {
                    Reason = VcpuExitReason.Mmio,
                    Address = run->Mmio.PhysAddr,
                    IsWrite = run->Mmio.IsWrite != 0,
                    Size = (int)run->Mmio.Len,
                    Count = 1,
                    Data = new Span<byte>(run->Mmio.Data, (int)run->Mmio.Len),
                };
            case ExitReason.InternalError:
                var known = run->Internal.Suberror == 1 && run->Internal.Ndata >= 4;
                return new VcpuExit
                {
                    Reason = VcpuExitReason.InternalError,
                    Suberror = run->Internal.Suberror,
                    Address = known ? run->Internal.Data[0] : 0,
                    Data = known ? new Span<byte>((byte*)&run->Internal.Data[2], (int)Math.Min(run->Internal.Data[1], 15)) : default,
                };
            case ExitReason.Debug:
                return new VcpuExit { Reason = VcpuExitReason.Debug, Address = run->Debug.Pc };
            default:
                return new VcpuExit
                {
                    Reason = run->ExitReason switch
                    {
                        ExitReason.Hlt => VcpuExitReason.Halt,
                        ExitReason.Intr => VcpuExitReason.Interrupted,
                        ExitReason.Shutdown => VcpuExitReason.Shutdown,
                        ExitReason.IrqWindowOpen => VcpuExitReason.InterruptWindow,
                        ExitReason.HostTimer => VcpuExitReason.HostTimer,
                        ExitReason.InsnLimit => VcpuExitReason.InstructionLimit,
                        _ => VcpuExitReason.Unknown,
                    },
                };
        }
    }

    // Waits for another reader of the state, but not for the guest.
    private void Own()
    {
        while (!_owner.TryEnter(TimeSpan.FromMilliseconds(1)))
        {
            if (_running)
            {
                throw AlreadyRunning();
            }
        }
    }

    private static InvalidOperationException AlreadyRunning() => new("The vCPU is running; pause the machine first.");
}
