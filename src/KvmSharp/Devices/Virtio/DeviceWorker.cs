namespace KvmSharp.Devices.Virtio;

/// <summary>
/// Runs the work of a device: in real time on a thread of its own, which a guest's write wakes without leaving the guest; on
/// a virtual clock at once on the vCPU thread, so that runs stay identical. One run at a time; a wake during a run brings
/// another one. A failure of the work ends the machine.
/// </summary>
internal sealed class DeviceWorker : IDisposable
{
    private readonly VmClock _clock;
    private readonly Action _work;
    private readonly Doorbell? _doorbell;
    private readonly VmTimer? _timer;

    public DeviceWorker(VirtualMachine machine, Action work)
    {
        _clock = machine.Clock;
        _work = work;
        if (machine.Options.Clock == ClockMode.Virtual)
        {
            _timer = machine.Clock.CreateTimer(work);
        }
        else
        {
            _doorbell = machine.CreateDetachedDoorbell(work);
        }
    }

    /// <summary>When work that was put off will go on, on a virtual clock.</summary>
    public ulong Deadline => _timer?.Deadline ?? VmClock.Never;

    /// <summary>The guest asks for work, by an exit. On a vCPU thread and without locks that the work takes.</summary>
    public void Run()
    {
        if (_doorbell is not null)
        {
            _doorbell.RingFromHost();
        }
        else
        {
            _work();
        }
    }

    /// <summary>The host has something, or work is left over. Callable from any thread.</summary>
    public void Wake()
    {
        _doorbell?.RingFromHost();
        try
        {
            _timer?.Arm(_clock.Nanoseconds);
        }
        catch (ObjectDisposedException)
        {
            // The machine is gone; an event of the host came too late.
        }
    }

    /// <summary>A saved state had work put off until then.</summary>
    public void Restore(ulong deadline)
    {
        if (_timer is not null)
        {
            _timer.Arm(deadline);
        }
        else
        {
            Wake(); // a notification may have been under way
        }
    }

    /// <summary>Where a write of the guest asks for work without an exit.</summary>
    public void Attach(ulong? address) => _doorbell?.TryMove(address);

    public void Dispose()
    {
        _doorbell?.Dispose();
        _timer?.Disarm();
    }
}
