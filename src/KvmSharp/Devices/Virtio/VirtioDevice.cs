namespace KvmSharp.Devices.Virtio;

/// <summary>How a virtio device reaches its driver.</summary>
internal interface IVirtioTransport
{
    /// <summary>Buffers of a queue have been handed back. Callable from any thread.</summary>
    void SignalQueue(int queue);

    /// <summary>The device's configuration or its status has changed. Callable from any thread.</summary>
    void SignalConfigChange();
}

/// <summary>
/// A virtio device without its transport: status, features, queues. Its work runs on a thread of its own in real time, and
/// on the vCPU thread on a virtual clock. A driver that breaks the rules finds the device in need of a reset.
/// Specification: VIRTIO 1.2, "Basic Facilities of a Virtio Device".
/// </summary>
public abstract class VirtioDevice : IDisposable
{
    // How much a device does before it lets others have their turn.
    private protected const int RequestBudget = 128;
    private protected const int ByteBudget = 4 << 20;

    // Wiring
    private IVirtioTransport? _transport;
    private DeviceWorker? _worker;

    // State
    private volatile VirtioStatus _status;
    private ulong _driverFeatures;
    private volatile byte _configGeneration;

    private protected VirtioDevice(int kind, string stateName, params ReadOnlySpan<int> queueSizes)
    {
        Kind = kind;
        StateName = "virtio-" + stateName;
        var queues = new Virtqueue[queueSizes.Length];
        for (var i = 0; i < queues.Length; i++)
        {
            queues[i] = new Virtqueue(i, queueSizes[i]);
        }
        Queues = queues;
    }

    /// <summary>Why the device asks its driver for a reset, or <see langword="null"/>. For diagnosis; gone after the reset.</summary>
    public string? FailureReason { get; private set; }

    /// <summary>Whether a driver uses the device at the moment.</summary>
    public bool IsDriverReady => (_status & (VirtioStatus.DriverOk | VirtioStatus.NeedsReset)) == VirtioStatus.DriverOk;

    internal int Kind { get; }

    internal string StateName { get; }

    internal IReadOnlyList<Virtqueue> Queues { get; }

    internal VirtioStatus Status => _status;

    internal byte ConfigGeneration => _configGeneration;

    internal ulong DriverFeatures => _driverFeatures;

    /// <summary>What the device offers.</summary>
    internal ulong OfferedFeatures =>
        DeviceFeatures | VirtioFeatures.Version1 | VirtioFeatures.IndirectDescriptors | VirtioFeatures.EventIndex;

    // The PCI class that the device shows: base class, subclass, interface.
    internal virtual uint PciClass => 0xff_00_00;

    internal abstract int ConfigLength { get; }

    private protected abstract ulong DeviceFeatures { get; }

    // Guards status, queues and the device's own state. Held while the device works.
    private protected Lock DeviceLock { get; } = new();

    private protected VirtualMachine? Machine { get; private set; }

    /// <summary>Stops the device's thread. The machine's disposal does it too.</summary>
    public void Dispose()
    {
        Dispose(true);
        GC.SuppressFinalize(this);
    }

    /// <summary>Stops the device's thread and lets go of its backend.</summary>
    /// <param name="disposing">Always true.</param>
    protected virtual void Dispose(bool disposing) => _worker?.Dispose();

    internal void Attach(VirtualMachine machine, IVirtioTransport transport)
    {
        if (_worker is not null)
        {
            throw new InvalidOperationException("The virtio device has its place in a machine already.");
        }
        Machine = machine;
        _transport = transport;
        foreach (var queue in Queues)
        {
            queue.Attach(machine.Memory);
        }
        _worker = new DeviceWorker(machine, Work);
        OnAttached();
    }

    /// <summary>Where a guest's write means "look at the queues".</summary>
    internal void AttachDoorbell(ulong? address) => _worker?.Attach(address);

    /// <summary>The same by an exit. On a vCPU thread.</summary>
    internal void Notify() => _worker?.Run();

    internal bool HasFeature(ulong feature) => (_driverFeatures & feature) != 0;

    internal void SetDriverFeatures(ulong mask, ulong value)
    {
        lock (DeviceLock)
        {
            // "Driver Requirements: Feature Bits": not after FEATURES_OK.
            if ((_status & VirtioStatus.FeaturesOk) == 0)
            {
                _driverFeatures = (_driverFeatures & ~mask) | (value & mask);
            }
        }
    }

    internal void SetStatus(VirtioStatus value)
    {
        var started = false;
        lock (DeviceLock)
        {
            if (value == VirtioStatus.None)
            {
                Reset();
                return;
            }
            var added = value & ~_status & ~VirtioStatus.NeedsReset;
            if ((added & VirtioStatus.FeaturesOk) != 0 && !AcceptFeatures())
            {
                added &= ~(VirtioStatus.FeaturesOk | VirtioStatus.DriverOk);
            }
            if ((added & VirtioStatus.DriverOk) != 0 && ((_status | added) & VirtioStatus.FeaturesOk) == 0)
            {
                added &= ~VirtioStatus.DriverOk;
            }
            _status |= added;
            if ((added & VirtioStatus.DriverOk) != 0 && (_status & VirtioStatus.NeedsReset) == 0)
            {
                OnDriverReady();
                started = true;
            }
        }
        if (started)
        {
            Notify(); // buffers may have been made available before
        }
    }

    /// <summary>Runs a change of a queue's registers; a change against the rules makes the device ask for a reset.</summary>
    internal void ChangeQueue(int index, Action<Virtqueue> change)
    {
        lock (DeviceLock)
        {
            if (index >= Queues.Count)
            {
                return;
            }
            try
            {
                change(Queues[index]);
            }
            catch (VirtioProtocolException e)
            {
                Fail(e.Message);
            }
        }
    }

    internal T ReadQueue<T>(int index, Func<Virtqueue, T> read, T absent)
    {
        // Registers of queues change only by accesses of the driver itself.
        return index < Queues.Count ? read(Queues[index]) : absent;
    }

    internal void ReadConfig(ulong offset, Span<byte> data)
    {
        data.Clear();
        var length = ConfigLength;
        if (offset >= (ulong)length)
        {
            return;
        }
        Span<byte> image = stackalloc byte[length];
        image.Clear();
        BuildConfig(image);
        var count = Math.Min(data.Length, length - (int)offset);
        image.Slice((int)offset, count).CopyTo(data);
    }

    internal void WriteConfig(ulong offset, ReadOnlySpan<byte> data)
    {
        if (offset + (ulong)data.Length <= (ulong)ConfigLength)
        {
            lock (DeviceLock)
            {
                OnConfigWritten((int)offset, data);
            }
        }
    }

    internal void Save(StateWriter writer)
    {
        lock (DeviceLock)
        {
            writer.WriteByte((byte)_status);
            writer.WriteUInt64(_driverFeatures);
            writer.WriteByte(_configGeneration);
            writer.WriteUInt64(_worker?.Deadline ?? VmClock.Never);
            foreach (var queue in Queues)
            {
                queue.Save(writer);
            }
            SaveDevice(writer);
        }
    }

    internal void Load(StateReader reader)
    {
        lock (DeviceLock)
        {
            Reset();
            _status = (VirtioStatus)reader.ReadByte();
            _driverFeatures = reader.ReadUInt64();
            _configGeneration = reader.ReadByte();
            var deadline = reader.ReadUInt64();
            if ((_driverFeatures & ~OfferedFeatures) != 0)
            {
                throw new MachineStateException($"The saved state is of a machine with another {StateName}.");
            }
            ApplyFeatures();
            foreach (var queue in Queues)
            {
                queue.Load(reader);
            }
            LoadDevice(reader);
            _worker?.Restore(deadline);
        }
    }

    /// <summary>The host has something for the guest. Callable from any thread, with and without the device's lock.</summary>
    private protected void Wake() => _worker?.Wake();

    /// <summary>The device's configuration has changed; the driver gets to know. Callable from any thread.</summary>
    private protected void ChangeConfig(Action change)
    {
        lock (DeviceLock)
        {
            change();
            _configGeneration++;
        }
        if (IsDriverReady)
        {
            _transport?.SignalConfigChange();
        }
    }

    private protected virtual void OnAttached()
    {
    }

    private protected virtual bool SupportsFeatures(ulong features) => true;

    private protected virtual void OnDriverReady()
    {
    }

    private protected virtual void OnReset()
    {
    }

    private protected abstract void BuildConfig(Span<byte> image);

    private protected virtual void OnConfigWritten(int offset, ReadOnlySpan<byte> data)
    {
    }

    /// <summary>Serves the queues, within the budgets.</summary>
    /// <returns>Whether work is left that no notification will announce.</returns>
    private protected abstract bool Serve();

    private protected virtual void SaveDevice(StateWriter writer)
    {
    }

    private protected virtual void LoadDevice(StateReader reader)
    {
    }

    /// <summary>Serves one queue chain by chain until it is empty or the budget is used up.</summary>
    /// <param name="queue">The queue.</param>
    /// <param name="chain">Where chains go.</param>
    /// <param name="serve">Does a chain's work; returns how many bytes it wrote.</param>
    /// <param name="byteBudget">After how many bytes no further chain is begun.</param>
    /// <returns>Whether chains are left.</returns>
    private protected static bool ServeQueue(
        Virtqueue queue, VirtqueueChain chain, Func<VirtqueueChain, uint> serve, ulong byteBudget = ByteBudget)
    {
        var requests = 0;
        ulong bytes = 0;
        queue.SuppressNotifications();
        do
        {
            while (queue.HasAvailable())
            {
                if (requests++ >= RequestBudget || bytes >= byteBudget)
                {
                    return true;
                }
                queue.TryTake(chain);
                bytes += (ulong)chain.ReadableLength + chain.WritableLength;
                queue.Return(chain, serve(chain));
            }
        }
        while (queue.RequestNotifications());
        return false;
    }

    private void Work()
    {
        var more = false;
        lock (DeviceLock)
        {
            if (!IsDriverReady)
            {
                return;
            }
            try
            {
                more = Serve();
                foreach (var queue in Queues)
                {
                    if (queue.TakeInterrupt())
                    {
                        _transport?.SignalQueue(queue.Index);
                    }
                }
            }
            catch (VirtioProtocolException e)
            {
                Fail(e.Message);
            }
            catch (GuestMemoryException e)
            {
                Fail(e.Message); // memory that was there when the chain was checked has been taken away
            }
        }
        if (more)
        {
            Wake();
        }
    }

    private bool AcceptFeatures()
    {
        // "Device Requirements: Feature Bits" and "Legacy Interface": drivers of before 1.0 are not served.
        if ((_driverFeatures & ~OfferedFeatures) != 0 || !HasFeature(VirtioFeatures.Version1) || !SupportsFeatures(_driverFeatures))
        {
            return false;
        }
        ApplyFeatures();
        return true;
    }

    private void ApplyFeatures()
    {
        foreach (var queue in Queues)
        {
            queue.AllowsIndirect = HasFeature(VirtioFeatures.IndirectDescriptors);
            queue.UsesEventIndex = HasFeature(VirtioFeatures.EventIndex);
        }
    }

    // "Device Requirements: Device Status Field": the driver is told only if it is at work.
    private void Fail(string reason)
    {
        FailureReason = reason;
        var told = IsDriverReady;
        _status |= VirtioStatus.NeedsReset;
        if (told)
        {
            _transport?.SignalConfigChange();
        }
    }

    private void Reset()
    {
        _status = VirtioStatus.None;
        _driverFeatures = 0;
        FailureReason = null;
        foreach (var queue in Queues)
        {
            queue.Reset();
        }
        OnReset();
    }
}
