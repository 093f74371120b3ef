using KvmSharp.Interop;

namespace KvmSharp;

/// <content>Start, pause, end.</content>
public sealed partial class VirtualMachine
{
    private readonly object _gate = new();
    private readonly TaskCompletionSource<VmExit> _exited = new(TaskCreationOptions.RunContinuationsAsynchronously);
    private VirtualMachineStatus _status;
    private VmExit? _exit;
    private bool _pauseRequested;
    private bool _clockPaused;
    private int _threads;
    private int _parked;
    private readonly List<Thread> _deviceThreads = []; // those that are at work
    private int _deviceWorkSuspended;
    private readonly Queue<Action> _transitions = []; // what waits until every vCPU is out of the guest
    private volatile bool _attention;

    /// <summary>Where the machine is in its life.</summary>
    public VirtualMachineStatus Status
    {
        get
        {
            lock (_gate)
            {
                return _status;
            }
        }
    }

    /// <summary>Called once, when the last vCPU thread is out and the machine is still there; it must not wait.</summary>
    internal Action? Ended { get; init; }

    /// <summary>Whether vCPU threads should come out of the guest.</summary>
    internal bool Attention => _attention;

    /// <summary>Starts a thread for each vCPU.</summary>
    /// <exception cref="InvalidOperationException">The machine has no vCPU or was started already.</exception>
    public void Start()
    {
        lock (_gate)
        {
            ObjectDisposedException.ThrowIf(_status == VirtualMachineStatus.Disposed, this);
            if (_status != VirtualMachineStatus.Created || _vcpus.Length == 0)
            {
                throw new InvalidOperationException("Only a new machine with at least one vCPU can be started.");
            }
            _status = VirtualMachineStatus.Running;
            _threads = _vcpus.Length;
            SetClockPaused(false);
            foreach (var vcpu in _vcpus)
            {
                vcpu.StartThread();
            }
        }
    }

    /// <summary>
    /// Takes every vCPU out of the guest, at an instruction boundary, lets the threads of devices finish what they are at, and
    /// stops the clock. Returns when that is done. On a vCPU thread and on one of a device it only asks: the machine pauses after
    /// the instruction. Nothing happens unless the machine runs.
    /// </summary>
    public void Pause()
    {
        lock (_gate)
        {
            ObjectDisposedException.ThrowIf(_status == VirtualMachineStatus.Disposed, this);
            if (_status is not (VirtualMachineStatus.Running or VirtualMachineStatus.Paused))
            {
                return;
            }
            RequestPauseLocked();
            if (IsMachineThread)
            {
                return;
            }
            while (_pauseRequested && _status == VirtualMachineStatus.Running)
            {
                Monitor.Wait(_gate);
            }
        }
    }

    /// <summary>Lets a paused machine go on. Nothing happens unless it is paused.</summary>
    public void Resume()
    {
        lock (_gate)
        {
            ObjectDisposedException.ThrowIf(_status == VirtualMachineStatus.Disposed, this);
            _pauseRequested = false;
            UpdateAttention();
            if (_status == VirtualMachineStatus.Paused)
            {
                _status = VirtualMachineStatus.Running;
                SetClockPaused(false);
                Monitor.PulseAll(_gate);
            }
        }
    }

    /// <summary>
    /// Ends the machine from outside and returns when every vCPU thread has ended; on a vCPU thread and on one of a device it
    /// only asks. A machine that was never started ends too.
    /// </summary>
    public void Stop()
    {
        ReportExit(new VmExit(VmExitKind.Stopped));
        lock (_gate)
        {
            if (_deviceThreads.Contains(Thread.CurrentThread))
            {
                return; // a vCPU may be waiting for what this thread holds
            }
        }
        foreach (var vcpu in Vcpus)
        {
            vcpu.Join();
        }
    }

    /// <summary>Completes when the machine has come to its end and its vCPU threads are out.</summary>
    /// <param name="cancellationToken">Ends the waiting, not the machine.</param>
    /// <returns>How it ended.</returns>
    public Task<VmExit> WaitForExitAsync(CancellationToken cancellationToken = default) => _exited.Task.WaitAsync(cancellationToken);

    /// <summary>
    /// Starts or resumes the machine and lets it run until its first vCPU has retired so many instructions since the reset;
    /// the machine is paused then. On a virtual clock the state at that point is always the same.
    /// </summary>
    /// <param name="instructionCount">The count.</param>
    /// <param name="cancellationToken">Pauses the machine earlier.</param>
    /// <returns>True when the count is reached, false when the machine came to its end or was paused before.</returns>
    /// <exception cref="OperationCanceledException">The token was cancelled; the machine is paused.</exception>
    public bool RunUntil(ulong instructionCount, CancellationToken cancellationToken = default)
    {
        Vcpu vcpu;
        lock (_gate)
        {
            if (_status is not (VirtualMachineStatus.Created or VirtualMachineStatus.Paused) || _vcpus.Length == 0)
            {
                throw new InvalidOperationException("Only a new or a paused machine can run to an instruction count.");
            }
            vcpu = _vcpus[0];
        }
        if (vcpu.ReadInstructionCount() >= instructionCount)
        {
            return true;
        }
        vcpu.SetInstructionLimit(instructionCount);
        using var registration = cancellationToken.Register(RequestPause);
        if (Status == VirtualMachineStatus.Created)
        {
            Start();
        }
        else
        {
            Resume();
        }
        if (cancellationToken.IsCancellationRequested)
        {
            RequestPause();
        }
        lock (_gate)
        {
            while (_status == VirtualMachineStatus.Running)
            {
                Monitor.Wait(_gate);
            }
            if (_status != VirtualMachineStatus.Paused)
            {
                return false;
            }
        }
        if (vcpu.ReadInstructionCount() < instructionCount)
        {
            vcpu.SetInstructionLimit(ulong.MaxValue);
            cancellationToken.ThrowIfCancellationRequested();
            return false;
        }
        return true;
    }

    /// <inheritdoc/>
    public void RequestPowerOff() => ReportExit(new VmExit(VmExitKind.PowerOff));

    /// <inheritdoc/>
    public void RequestReset(string? detail = null) => ReportExit(new VmExit(VmExitKind.Reset, 0, detail));

    /// <inheritdoc/>
    public void RequestExit(int exitCode) => ReportExit(new VmExit(VmExitKind.DebugExit, exitCode));

    /// <summary>
    /// Stops the machine and frees what it holds. Safe in any state, and again. A <see cref="Vcpu.Run"/> of the host's own comes
    /// back.
    /// </summary>
    public void Dispose()
    {
        lock (_gate)
        {
            if (_status == VirtualMachineStatus.Disposed)
            {
                return;
            }
        }
        Stop();
        foreach (var doorbell in Volatile.Read(ref _doorbells))
        {
            doorbell.Dispose();
        }
        lock (_gate)
        {
            _status = VirtualMachineStatus.Disposed;
            Monitor.PulseAll(_gate);
        }
        foreach (var vcpu in Vcpus)
        {
            vcpu.Close();
        }
        Memory?.ReleaseSlots();
        SystemManagementMemory?.ReleaseSlots();
        _handle.Dispose();
    }

    /// <summary>Stops the machine and frees what it holds, without blocking the caller meanwhile.</summary>
    public async ValueTask DisposeAsync()
    {
        ReportExit(new VmExit(VmExitKind.Stopped));
        await _exited.Task.ConfigureAwait(false);
        Dispose();
    }

    /// <summary>Ends the machine; the first report decides.</summary>
    internal void ReportExit(VmExit exit)
    {
        lock (_gate)
        {
            if (_exit is not null || _status == VirtualMachineStatus.Disposed)
            {
                return;
            }
            _exit = exit;
            UpdateAttention();
            KickAll();
            Monitor.PulseAll(_gate);
            if (_threads == 0)
            {
                EndLocked();
            }
        }
    }

    internal void ReportFault(Exception exception) =>
        ReportExit(new VmExit(VmExitKind.Fault, 1, $"A device failed: {exception.Message}", exception));

    /// <summary>Asks for a pause without waiting for it. Callable from any thread.</summary>
    internal void RequestPause()
    {
        lock (_gate)
        {
            if (_status == VirtualMachineStatus.Running)
            {
                RequestPauseLocked();
            }
        }
    }

    /// <summary>Where a vCPU thread waits while the machine is paused. False when the thread has to end.</summary>
    internal bool Park()
    {
        lock (_gate)
        {
            _parked++;
            while ((_pauseRequested || _transitions.Count != 0) && _exit is null)
            {
                // A pause comes behind them, so that a paused machine has none left.
                if (_parked == _threads && _transitions.TryDequeue(out var transition))
                {
                    transition();
                    UpdateAttention();
                    Monitor.PulseAll(_gate);
                    continue;
                }
                if (_parked == _threads && _deviceThreads.Count == 0 && _status == VirtualMachineStatus.Running)
                {
                    _status = VirtualMachineStatus.Paused;
                    SetClockPaused(true);
                    Monitor.PulseAll(_gate);
                }
                Monitor.Wait(_gate);
            }
            _parked--;
            return _exit is null;
        }
    }

    /// <summary>
    /// Changes the processors while all of them are between two instructions of the guest; in the order of the requests, soon
    /// and not necessarily at once. Callable from any thread.
    /// </summary>
    /// <param name="transition">What to do; it must not wait for devices.</param>
    internal void RequestTransition(Action transition)
    {
        lock (_gate)
        {
            if (_exit is not null)
            {
                return;
            }
            if (_status is VirtualMachineStatus.Created or VirtualMachineStatus.Paused)
            {
                transition();
                return;
            }
            _transitions.Enqueue(transition);
            UpdateAttention();
            KickAll();
            Monitor.PulseAll(_gate);
        }
    }

    internal void ThreadEnded()
    {
        lock (_gate)
        {
            if (--_threads == 0)
            {
                EndLocked();
            }
        }
    }

    /// <summary>
    /// A thread of a device is about to change memory or devices. It waits here while the machine is paused, so that a paused
    /// machine stands still. False when the machine is gone.
    /// </summary>
    internal bool EnterDeviceWork()
    {
        lock (_gate)
        {
            while (_deviceWorkSuspended != 0
                || (_pauseRequested && _exit is null && _status is VirtualMachineStatus.Running or VirtualMachineStatus.Paused))
            {
                Monitor.Wait(_gate);
            }
            if (_status == VirtualMachineStatus.Disposed)
            {
                return false;
            }
            _deviceThreads.Add(Thread.CurrentThread);
            return true;
        }
    }

    /// <summary>The thread of a device has done its work for now.</summary>
    internal void ExitDeviceWork()
    {
        lock (_gate)
        {
            _deviceThreads.Remove(Thread.CurrentThread);
            if (_deviceThreads.Count == 0)
            {
                Monitor.PulseAll(_gate);
            }
        }
    }

    /// <summary>Holds the threads of devices while the state of the machine is saved or loaded.</summary>
    private void SuspendDeviceWork()
    {
        lock (_gate)
        {
            _deviceWorkSuspended++;
            while (_deviceThreads.Count != 0)
            {
                Monitor.Wait(_gate);
            }
        }
    }

    private void ResumeDeviceWork()
    {
        lock (_gate)
        {
            _deviceWorkSuspended--;
            Monitor.PulseAll(_gate);
        }
    }

    private bool IsMachineThread => Array.Exists(_vcpus, v => v.IsCurrentThread) || _deviceThreads.Contains(Thread.CurrentThread);

    private void RequestPauseLocked()
    {
        _pauseRequested = true;
        UpdateAttention();
        KickAll();
    }

    private void UpdateAttention() => _attention = _pauseRequested || _exit is not null || _transitions.Count != 0;

    private void KickAll()
    {
        foreach (var vcpu in _vcpus)
        {
            vcpu.Kick();
        }
    }

    private void EndLocked()
    {
        // A machine that a device disposed of ends without its handles.
        if (_status != VirtualMachineStatus.Disposed)
        {
            SetClockPaused(true);
            _status = VirtualMachineStatus.Stopped;
            Ended?.Invoke();
        }
        Monitor.PulseAll(_gate);
        _exited.TrySetResult(_exit!);
    }

    private void SetClockPaused(bool paused)
    {
        if (_clockPaused != paused)
        {
            NativeMethods.ClockPause(_handle, paused ? 1u : 0u).ThrowIfFailed("pause the clock");
            _clockPaused = paused;
        }
    }
}
