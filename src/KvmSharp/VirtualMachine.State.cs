namespace KvmSharp;

/// <content>Saving and loading.</content>
public sealed partial class VirtualMachine
{
    private const string MachineSection = "machine";
    private const string DevicePrefix = "device/";

    /// <summary>
    /// Takes the complete state: processors, interrupt controllers, clock, memory, and the devices that implement
    /// <see cref="IDeviceState"/>. The machine must not be running.
    /// </summary>
    /// <exception cref="InvalidOperationException">The machine runs; pause it first.</exception>
    public MachineState SaveState()
    {
        var sections = new List<MachineState.Section>();
        CollectStateQuietly((name, data) => sections.Add(new MachineState.Section(name, data.ToArray())));
        return new MachineState(sections);
    }

    /// <summary>Takes the complete state and writes it.</summary>
    /// <param name="stream">Where it goes.</param>
    /// <exception cref="InvalidOperationException">The machine runs; pause it first.</exception>
    public void SaveState(Stream stream) => SaveState().Save(stream);

    /// <summary>SHA-256 over the complete state, as <see cref="MachineState.ComputeHash"/> gives it. The machine must not be running.</summary>
    /// <exception cref="InvalidOperationException">The machine runs; pause it first.</exception>
    public byte[] ComputeStateHash()
    {
        using var hasher = new MachineState.Hasher();
        CollectStateQuietly((name, data) => hasher.Add(name, data.Span));
        return hasher.Finish();
    }

    /// <summary>
    /// Makes this machine continue where another was saved. It must be made in the same way - memory, CPU model, devices - and
    /// be new or paused. After a failure it holds parts of both states and is good for nothing but being disposed of.
    /// </summary>
    /// <param name="state">The state.</param>
    /// <exception cref="MachineStateException">The state is damaged or of another kind of machine.</exception>
    /// <exception cref="InvalidOperationException">The machine runs or has ended.</exception>
    public void LoadState(MachineState state)
    {
        ArgumentNullException.ThrowIfNull(state);
        if (Status is not (VirtualMachineStatus.Created or VirtualMachineStatus.Paused))
        {
            throw new InvalidOperationException("A state is loaded into a new or a paused machine.");
        }
        CheckSame(state, MachineSection, DescribeMachine(), "processors or interrupt controllers");
        CheckSame(state, MemoryImage.LayoutName, MemoryImage.DescribeLayout(this), "memory");
        MemoryImage.Check(state);
        var devices = FindDevices();
        foreach (var section in state.Sections)
        {
            if (section.Name.StartsWith(DevicePrefix, StringComparison.Ordinal) && !devices.ContainsKey(section.Name))
            {
                throw new MachineStateException($"The saved state is of another machine: this one has no '{section.Name}'.");
            }
        }

        lock (_gate)
        {
            SetClockPaused(true);
        }
        SuspendDeviceWork();
        InterruptLine.Gsi[] lines;
        lock (_setup)
        {
            lines = [.. _gsis.Values];
        }
        foreach (var line in lines)
        {
            line.Suspend();
        }
        try
        {
            MemoryImage.Load(this, state);
            foreach (var vcpu in Vcpus)
            {
                CoreState.LoadVcpuCount(vcpu, state);
            }
            CoreState.LoadClock(_handle, state);
            Clock.StartTime = new DateTimeOffset(CoreState.Get<long>(state, "start-time"), TimeSpan.Zero);
            foreach (var vcpu in Vcpus)
            {
                CoreState.LoadVcpu(vcpu, Options.InterruptController, state);
            }
            LoadDevices(devices, state);
            if (Options.InterruptController)
            {
                CoreState.LoadChips(_handle, state);
            }
            // Setting the clock's MSRs has written to the pages that the guest reads the time from.
            MemoryImage.Load(this, state, again: true);
        }
        catch (ArgumentOutOfRangeException e)
        {
            throw new MachineStateException("The saved state is damaged: a time is out of range.", e);
        }
        finally
        {
            foreach (var line in lines)
            {
                line.Resume();
            }
            ResumeDeviceWork();
        }
    }

    /// <summary>Reads a state and loads it, as <see cref="LoadState(MachineState)"/> does.</summary>
    /// <param name="stream">Where it comes from.</param>
    /// <exception cref="MachineStateException">The state is damaged or of another kind of machine.</exception>
    /// <exception cref="InvalidOperationException">The machine runs or has ended.</exception>
    public void LoadState(Stream stream) => LoadState(MachineState.Load(stream));

    private void CollectStateQuietly(Action<string, ReadOnlyMemory<byte>> add)
    {
        SuspendDeviceWork();
        try
        {
            CollectState(add);
        }
        finally
        {
            ResumeDeviceWork();
        }
    }

    // Always in the same order, since the hash goes over it.
    private void CollectState(Action<string, ReadOnlyMemory<byte>> add)
    {
        if (Status is VirtualMachineStatus.Running or VirtualMachineStatus.Disposed)
        {
            throw new InvalidOperationException("The state can be taken only while the machine does not run; pause it first.");
        }
        add(MachineSection, DescribeMachine());
        add(MemoryImage.LayoutName, MemoryImage.DescribeLayout(this));
        CoreState.SaveClock(_handle, add);
        add("start-time", BitConverter.GetBytes(Clock.StartTime.UtcTicks));
        foreach (var vcpu in Vcpus)
        {
            CoreState.SaveVcpu(vcpu, Options.InterruptController, add);
        }
        if (Options.InterruptController)
        {
            CoreState.SaveChips(_handle, add);
        }
        foreach (var (name, device) in FindDevices())
        {
            var writer = new StateWriter();
            device.SaveState(writer);
            add(name, writer.ToArray());
        }
        MemoryImage.Save(this, add);
    }

    // What must be equal in the machine that is saved and the one that goes on.
    private byte[] DescribeMachine()
    {
        var writer = new StateWriter();
        writer.WriteUInt32((uint)Vcpus.Count);
        writer.WriteByte((byte)Options.Clock);
        writer.WriteBoolean(Options.InterruptController);
        writer.WriteBoolean(Options.SystemManagementMode);
        foreach (var vcpu in Vcpus)
        {
            foreach (var leaf in vcpu.GetCpuid())
            {
                foreach (var value in (ReadOnlySpan<uint>)[leaf.Function, leaf.Index, leaf.Flags, leaf.Eax, leaf.Ebx, leaf.Ecx, leaf.Edx])
                {
                    writer.WriteUInt32(value);
                }
            }
        }
        return writer.ToArray();
    }

    // Devices with state by name; one that is mapped several times counts once, at its lowest address.
    private SortedDictionary<string, IDeviceState> FindDevices()
    {
        var devices = new SortedDictionary<string, IDeviceState>(StringComparer.Ordinal);
        var seen = new HashSet<IIoDevice>(ReferenceEqualityComparer.Instance);
        foreach (var (bus, name) in (ReadOnlySpan<(IoBus, string)>)[(Ports, "ports"), (Mmio, "mmio")])
        {
            foreach (var (address, _, device) in bus.Mappings)
            {
                if (device is IDeviceState stateful && seen.Add(device))
                {
                    devices.Add($"{DevicePrefix}{name}/{address:x}/{stateful.StateName}", stateful);
                }
            }
        }
        return devices;
    }

    private static void LoadDevices(SortedDictionary<string, IDeviceState> devices, MachineState state)
    {
        foreach (var (name, device) in devices)
        {
            var data = state.Find(name) ?? throw new MachineStateException($"The saved state is of another machine: it has no '{name}'.");
            var reader = new StateReader(data);
            device.LoadState(reader);
            reader.End();
        }
    }

    private static void CheckSame(MachineState state, string name, byte[] expected, string what)
    {
        if (state.Find(name) is not { } found || !found.Span.SequenceEqual(expected))
        {
            throw new MachineStateException($"The saved state is of a machine with other {what}.");
        }
    }
}
