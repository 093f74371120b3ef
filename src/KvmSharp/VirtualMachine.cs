using KvmSharp.Devices;
using KvmSharp.Interop;

namespace KvmSharp;

/// <summary>
/// A virtual machine: memory, buses, interrupts, clock and vCPUs, with one dedicated thread for each vCPU while it runs.
/// A process may have any number of them. All members are callable from any thread unless they say otherwise.
/// </summary>
public sealed unsafe partial class VirtualMachine : IMachineControl, IDisposable, IAsyncDisposable
{
    private readonly VmHandle _handle;
    private readonly Lock _setup = new();
    private readonly Dictionary<int, InterruptLine.Gsi> _gsis = [];
    private Vcpu[] _vcpus = [];
    private Doorbell[] _doorbells = [];

    /// <summary>Creates a machine: its memory and vCPUs as the options say, no devices.</summary>
    /// <param name="options">How the machine is made.</param>
    /// <exception cref="KvmSharpException">An option is invalid or the host lacks what it needs.</exception>
    /// <exception cref="UnsupportedFeatureException">The CPU model asks for a feature that the core does not have.</exception>
    public VirtualMachine(VirtualMachineOptions options)
    {
        ArgumentNullException.ThrowIfNull(options);
        options.Validate();
        NativeLibraryLoader.EnsureLoaded();
        Options = options;
        _handle = CreateHandle(options);
        try
        {
            Memory = new GuestMemory(_handle);
            SystemManagementMemory = options.SystemManagementMode ? new GuestMemory(_handle, space: 1) : null;
            A20 = new A20Gate(enabled => NativeMethods.VmSetA20(_handle, enabled ? 1u : 0u).ThrowIfFailed("drive address line A20"));
            Clock = new VmClock(() => NativeMethods.ClockNow(_handle), ArmHostTimer, DecideStartTime(options));
            if (options.InterruptController)
            {
                NativeMethods.IrqchipCreate(_handle).ThrowIfFailed("create the interrupt controllers");
                NativeMethods.PitCreate(_handle).ThrowIfFailed("create the interval timer");
            }
            if (options.MemorySize != 0)
            {
                Memory.AddRam(0, options.MemorySize);
            }
            for (var i = 0; i < options.VcpuCount; i++)
            {
                CreateVcpu();
            }
        }
        catch
        {
            Dispose();
            throw;
        }
    }

    /// <summary>How the machine was made.</summary>
    public VirtualMachineOptions Options { get; }

    /// <summary>Guest-physical memory.</summary>
    public GuestMemory Memory { get; }

    /// <summary>
    /// Guest-physical memory as processors see it in system management mode: an address space of its own with its own slots,
    /// which may map the same <see cref="GuestRam"/> as <see cref="Memory"/> does. While it has no slot, they see
    /// <see cref="Memory"/>. <see langword="null"/> without <see cref="VirtualMachineOptions.SystemManagementMode"/>.
    /// </summary>
    /// <remarks>
    /// What it maps, all of RAM and SMRAM, stays for the life of the machine; a device that opens and closes SMRAM for all
    /// adds and removes a slot with the same memory in <see cref="Memory"/>. A saved state takes such a slot for what it is,
    /// a second way to the same memory.
    /// </remarks>
    public GuestMemory? SystemManagementMemory { get; }

    /// <summary>
    /// The I/O ports, 0 to 0xFFFF. Those of interrupt controllers and timer (0x20-0x21, 0x40-0x43, 0x61, 0xA0-0xA1,
    /// 0x4D0-0x4D1) are answered by the core, where the machine has them, and never come here.
    /// </summary>
    public IoBus Ports { get; } = new("port", 0xffff);

    /// <summary>
    /// Memory-mapped registers: guest-physical addresses that no slot backs, and writes to read-only slots. Those of IOAPIC
    /// and local APICs are answered by the core, where the machine has them, and never come here.
    /// </summary>
    public IoBus Mmio { get; } = new("MMIO", ulong.MaxValue);

    /// <summary>The processors by index.</summary>
    public IReadOnlyList<Vcpu> Vcpus => Volatile.Read(ref _vcpus);

    /// <summary>The one clock of the machine.</summary>
    public VmClock Clock { get; }

    /// <summary>Address line A20 of the processors; enabled unless a device disables it.</summary>
    public A20Gate A20 { get; }

    /// <summary>Adds a vCPU. Before the start.</summary>
    /// <exception cref="KvmSharpException">The machine has as many as it can have.</exception>
    public Vcpu CreateVcpu()
    {
        lock (_setup)
        {
            if (Status != VirtualMachineStatus.Created)
            {
                throw new InvalidOperationException("vCPUs are created before the machine starts.");
            }
            var index = _vcpus.Length;
            if (index >= VirtualMachineOptions.MaxVcpuCount)
            {
                throw new KvmSharpException(KvmSharpErrorCode.NotSupported, $"A machine has at most {VirtualMachineOptions.MaxVcpuCount} vCPU.");
            }
            var cpuid = Options.Cpu.BuildCpuid(index, Math.Max(Options.VcpuCount, index + 1));
            var result = NativeMethods.VcpuCreate(_handle, (uint)index, out var handle);
            if (result < 0)
            {
                handle.SetHandleAsInvalid();
                throw NativeResult.ToException(result, $"create vCPU {index}");
            }
            handle.KeepAlive(_handle);
            var vcpu = new Vcpu(this, index, handle);
            try
            {
                vcpu.SetCpuid(cpuid);
            }
            catch
            {
                vcpu.Dispose();
                throw;
            }
            Volatile.Write(ref _vcpus, [.. _vcpus, vcpu]);
            return vcpu;
        }
    }

    /// <summary>A new source on an interrupt line. Lines 0 to 15 are the ISA interrupts; sources on one line are wired OR.</summary>
    /// <param name="gsi">The global system interrupt, 0 to 1023; what it leads to is the routing's affair.</param>
    public InterruptLine GetInterruptLine(int gsi)
    {
        ArgumentOutOfRangeException.ThrowIfNegative(gsi);
        ArgumentOutOfRangeException.ThrowIfGreaterThan(gsi, 1023);
        lock (_setup)
        {
            if (!_gsis.TryGetValue(gsi, out var line))
            {
                line = new InterruptLine.Gsi(high => NativeMethods.IrqLine(_handle, (uint)gsi, high ? 1u : 0u).ThrowIfFailed("drive an interrupt line"));
                _gsis.Add(gsi, line);
            }
            return new InterruptLine(line);
        }
    }

    /// <summary>Sends a message-signalled interrupt.</summary>
    /// <param name="message">The message.</param>
    /// <exception cref="KvmSharpException">The machine has no interrupt controller.</exception>
    public void SignalMsi(MsiMessage message)
    {
        var msi = new KvsMsi
        {
            AddressLo = (uint)message.Address,
            AddressHi = (uint)(message.Address >> 32),
            Data = message.Data,
        };
        NativeMethods.SignalMsi(_handle, &msi).ThrowIfFailed("send a message-signalled interrupt");
    }

    /// <summary>Replaces the whole routing of interrupt lines. A new machine has a PC's routing.</summary>
    /// <param name="routes">All routes; one line may have several.</param>
    /// <exception cref="KvmSharpException">A route leads nowhere, or the machine has no interrupt controller.</exception>
    public void SetGsiRouting(IReadOnlyList<GsiRoute> routes)
    {
        ArgumentNullException.ThrowIfNull(routes);
        var entries = new KvsIrqRoutingEntry[routes.Count];
        for (var i = 0; i < entries.Length; i++)
        {
            var route = routes[i];
            ArgumentOutOfRangeException.ThrowIfNegative(route.Gsi, nameof(routes));
            ArgumentOutOfRangeException.ThrowIfNegative(route.Pin, nameof(routes));
            entries[i] = route.IsMsi
                ? new KvsIrqRoutingEntry
                {
                    Gsi = (uint)route.Gsi,
                    Type = KvsIrqRoutingEntry.TypeMsi,
                    MsiAddressLo = (uint)route.Message.Address,
                    MsiAddressHi = (uint)(route.Message.Address >> 32),
                    MsiData = route.Message.Data,
                }
                : new KvsIrqRoutingEntry
                {
                    Gsi = (uint)route.Gsi,
                    Type = KvsIrqRoutingEntry.TypeIrqchip,
                    IrqchipChip = (uint)route.Chip,
                    IrqchipPin = (uint)route.Pin,
                };
        }
        fixed (KvsIrqRoutingEntry* p = entries)
        {
            NativeMethods.SetGsiRouting(_handle, p, (uint)entries.Length).ThrowIfFailed("set the interrupt routing");
        }
    }

    /// <summary>Makes a guest write signal the host without leaving the guest.</summary>
    /// <param name="options">Which writes.</param>
    /// <param name="handler">
    /// What to do: on a thread of the doorbell's own, several rings possibly in one call; on a virtual clock at once on the
    /// vCPU thread. An exception of the handler ends the machine.
    /// </param>
    /// <exception cref="KvmSharpException">The doorbell exists already or its width is invalid.</exception>
    public Doorbell CreateDoorbell(DoorbellOptions options, Action handler)
    {
        ArgumentNullException.ThrowIfNull(options);
        ArgumentNullException.ThrowIfNull(handler);
        if (options.Length is not (0 or 1 or 2 or 4 or 8))
        {
            throw new KvmSharpException(KvmSharpErrorCode.InvalidArgument, "A doorbell is 1, 2, 4 or 8 bytes wide, or 0 for any width.");
        }
        return CreateDoorbell(options, handler, (options.Value is null ? 0u : 1u) | (options.IsPort ? 2u : 0u));
    }

    /// <summary>A thread for a device; doorbells ring it, of the guest once <see cref="Doorbell.TryMove"/> has attached it.</summary>
    internal Doorbell CreateDetachedDoorbell(Action handler) => CreateDoorbell(new DoorbellOptions { Address = 0 }, handler, 4);

    private Doorbell CreateDoorbell(DoorbellOptions options, Action handler, uint flags)
    {
        var result = NativeMethods.DoorbellCreate(_handle, options.Address, (uint)options.Length, options.Value ?? 0, flags, out var handle);
        if (result < 0)
        {
            handle.SetHandleAsInvalid();
            throw NativeResult.ToException(result, "create a doorbell");
        }
        handle.KeepAlive(_handle);
        var doorbell = new Doorbell(handle, options, handler, Options.Clock == ClockMode.Virtual, this);
        lock (_setup)
        {
            Volatile.Write(ref _doorbells, [.. _doorbells, doorbell]);
        }
        return doorbell;
    }

    /// <summary>
    /// Answers an exit of <see cref="Vcpu.Run"/> as the machine itself would: port and memory accesses go to the buses,
    /// due timers are called back. On the thread that runs the vCPU.
    /// </summary>
    /// <param name="exit">The exit.</param>
    /// <returns>Whether the exit was one of these; all others are the caller's affair.</returns>
    public bool Dispatch(in VcpuExit exit)
    {
        if (exit.Reason == VcpuExitReason.HostTimer)
        {
            Clock.RunDueTimers();
            return true;
        }
        if (exit.IsWrite && Options.Clock == ClockMode.Virtual && RingDoorbells(exit))
        {
            return true;
        }
        return ExitDispatcher.Dispatch(Ports, Mmio, exit);
    }

    // On a virtual clock a doorbell's write comes out as an exit, so that its handler runs at the same instruction each time.
    private bool RingDoorbells(in VcpuExit exit)
    {
        var rung = false;
        foreach (var doorbell in Volatile.Read(ref _doorbells))
        {
            for (var i = 0; i < exit.Count; i++)
            {
                if (doorbell.Matches(exit.Reason == VcpuExitReason.Io, exit.Address, exit.Data.Slice(i * exit.Size, exit.Size)))
                {
                    doorbell.Ring();
                    rung = true;
                }
            }
        }
        return rung;
    }

    internal void RemoveDoorbell(Doorbell doorbell)
    {
        lock (_setup)
        {
            Volatile.Write(ref _doorbells, [.. _doorbells.Where(d => d != doorbell)]);
        }
    }

    internal void StartLegacyTimer() => Firmware.LegacyBios.StartTimer(_handle);

    private void ArmHostTimer(ulong deadline)
    {
        if (!_handle.IsClosed)
        {
            NativeMethods.HostTimerArm(_handle, deadline).ThrowIfFailed("arm the timer");
        }
    }

    private static VmHandle CreateHandle(VirtualMachineOptions options)
    {
        var config = new KvsVmConfig
        {
            Size = (uint)sizeof(KvsVmConfig),
            ClockMode = (uint)options.Clock,
            TscKhz = options.TscKilohertz,
            Flags = options.SystemManagementMode ? KvsVmConfig.SystemManagementMode : 0,
            Engine = (uint)options.Engine,
        };
        var result = NativeMethods.VmCreate(&config, out var handle);
        if (result < 0)
        {
            handle.SetHandleAsInvalid();
            throw NativeResult.ToException(result, "create a virtual machine");
        }
        return handle;
    }

    // The one place where a machine learns the host's wall-clock time.
    private static DateTimeOffset DecideStartTime(VirtualMachineOptions options) =>
        options.StartTime ?? (options.Clock == ClockMode.Virtual
            ? new DateTimeOffset(2020, 1, 1, 0, 0, 0, TimeSpan.Zero)
            : TimeProvider.System.GetUtcNow());
}
