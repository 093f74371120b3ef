using static KvmSharp.Devices.Pci.PciRegisters;

namespace KvmSharp.Devices.Pci;

/// <summary>
/// The base of PCI functions. A derived class says in its constructor which registers it has (BARs), which interrupts and
/// which capabilities; a <see cref="PciHost"/> gives it its place. The registers themselves are <see cref="IIoDevice"/>s.
/// </summary>
public abstract class PciDevice
{
    private readonly Lock _interruptLock = new();
    private readonly List<PciBar> _bars = [];
    private PciHost? _host;
    private InterruptLine _interruptLine = InterruptLine.NotConnected();
    private PciMsi? _msi;
    private PciMsix? _msix;
    private bool _hasInterruptPin;
    private bool _interruptLevel;

    /// <summary>Creates a function without registers and interrupts.</summary>
    /// <param name="identity">How it introduces itself.</param>
    protected PciDevice(PciIdentity identity)
    {
        Config.DefineUInt16(VendorId, identity.VendorId);
        Config.DefineUInt16(DeviceId, identity.DeviceId);
        Config.DefineUInt16(Command, 0, (ushort)CommandBits.Writable);
        Config.DefineClearable(Status, (ushort)StatusBits.WriteOneToClear);
        Config.DefineUInt32(RevisionId, identity.ClassCode << 8 | identity.RevisionId);
        Config.DefineByte(CacheLineSize, 0, 0xff);
        Config.DefineUInt16(SubsystemVendorId, identity.SubsystemVendorId);
        Config.DefineUInt16(SubsystemId, identity.SubsystemId);
        Config.DefineByte(InterruptLineRegister, 0, 0xff);
    }

    /// <summary>The configuration registers.</summary>
    public PciConfigSpace Config { get; } = new();

    /// <summary>Where the function is; <see langword="null"/> while it is in no machine.</summary>
    public PciAddress? Address { get; private set; }

    /// <summary>The kind of device in a saved machine.</summary>
    public abstract string StateName { get; }

    /// <summary>Whether the guest lets the function access memory.</summary>
    protected bool IsBusMaster => ((CommandBits)Config.GetUInt16(Command) & CommandBits.BusMaster) != 0;

    /// <summary>Whether interrupts are messages at the moment, so that <see cref="SetInterruptLevel"/> has no effect.</summary>
    protected bool UsesMessages
    {
        get
        {
            lock (_interruptLock)
            {
                return MessagesEnabled;
            }
        }
    }

    internal IReadOnlyList<PciBar> Bars => _bars;

    internal bool HasInterruptPin => _hasInterruptPin;

    internal bool IsPinAsserted => _interruptLine.IsHigh;

    private protected PciHost? Host => _host;

    // A function that uses messages must not use its pin: PCI 3.0, "MSI and MSI-X Operation".
    private bool MessagesEnabled => (_msix?.IsEnabled ?? false) || (_msi?.IsEnabled ?? false);

    /// <summary>Adds registers at memory addresses.</summary>
    /// <param name="index">The number of the base address register, 0 to 5; a 64-bit one takes the next too.</param>
    /// <param name="size">The size in bytes: a power of two, at least 16.</param>
    /// <param name="registers">What answers there.</param>
    /// <param name="is64Bit">Whether the range may lie above 4 GiB.</param>
    /// <param name="prefetchable">Whether reads have no side effects and writes may be merged.</param>
    /// <exception cref="KvmSharpException">The number or the size is invalid or the number is taken.</exception>
    protected void AddMemoryBar(int index, ulong size, IIoDevice registers, bool is64Bit = false, bool prefetchable = false)
    {
        var limit = is64Bit ? 1UL << 40 : 1UL << 31;
        CheckBar(index, is64Bit ? 2 : 1, size, 16, limit, registers);
        var offset = FirstBar + 4 * index;
        var writable = ~(size - 1);
        Config.DefineUInt32(offset, (is64Bit ? BarMemory64 : 0) | (prefetchable ? BarPrefetchable : 0), (uint)writable);
        if (is64Bit)
        {
            Config.DefineUInt32(offset + 4, 0, (uint)(writable >> 32));
        }
        _bars.Add(new PciBar(this, index, size, false, is64Bit, registers));
    }

    /// <summary>Adds registers at ports.</summary>
    /// <param name="index">The number of the base address register, 0 to 5.</param>
    /// <param name="size">The number of ports: a power of two, 4 to 256.</param>
    /// <param name="registers">What answers there.</param>
    /// <exception cref="KvmSharpException">The number or the size is invalid or the number is taken.</exception>
    protected void AddPortBar(int index, int size, IIoDevice registers)
    {
        CheckBar(index, 1, (ulong)size, 4, 256, registers);
        Config.DefineUInt32(FirstBar + 4 * index, BarIo, ~(uint)(size - 1));
        _bars.Add(new PciBar(this, index, (ulong)size, true, false, registers));
    }

    /// <summary>Adds an expansion ROM: code for firmware to run.</summary>
    /// <param name="content">The content, at most 16 MiB; the range is as large, rounded up to a power of two.</param>
    /// <exception cref="KvmSharpException">The content is empty or too large, or there is one already.</exception>
    protected void AddExpansionRom(ReadOnlyMemory<byte> content)
    {
        CheckNotPlaced();
        if (content.IsEmpty || content.Length > 16 << 20 || _bars.Exists(b => b.IsRom))
        {
            throw new KvmSharpException(KvmSharpErrorCode.InvalidArgument, $"A PCI function cannot have an expansion ROM of {content.Length} bytes here.");
        }
        var size = Math.Max(System.Numerics.BitOperations.RoundUpToPowerOf2((uint)content.Length), 2048);
        Config.DefineUInt32(ExpansionRom, 0, ~(size - 1) | ExpansionRomEnable);
        _bars.Add(new PciBar(this, ExpansionRomIndex, size, false, false, new Rom(content), true));
    }

    /// <summary>Adds the interrupt pin A, for <see cref="SetInterruptLevel"/>.</summary>
    protected void AddInterruptPin()
    {
        CheckNotPlaced();
        _hasInterruptPin = true;
        Config.DefineByte(InterruptPinRegister, 1);
    }

    /// <summary>Adds message-signalled interrupts, for <see cref="SignalInterrupt"/>.</summary>
    /// <param name="vectors">1, 2, 4, 8, 16 or 32.</param>
    protected void AddMsi(int vectors)
    {
        CheckNotPlaced();
        _msi = new PciMsi(Config, vectors, SendMessage);
    }

    /// <summary>Adds MSI-X, for <see cref="SignalInterrupt"/>.</summary>
    /// <param name="bar">The number of the base address register that its table gets to itself.</param>
    /// <param name="vectors">1 to 2048.</param>
    protected void AddMsix(int bar, int vectors)
    {
        CheckNotPlaced();
        _msix = new PciMsix(Config, bar, vectors, _interruptLock, SendMessage);
        AddMemoryBar(bar, _msix.BarSize, _msix);
    }

    /// <summary>Drives the interrupt pin; without effect while the guest has enabled messages. Callable from any thread.</summary>
    /// <param name="asserted">Whether an interrupt is wanted.</param>
    protected void SetInterruptLevel(bool asserted)
    {
        lock (_interruptLock)
        {
            _interruptLevel = asserted;
            UpdateInterruptLine();
        }
    }

    /// <summary>Sends an interrupt message if the guest has enabled messages. Callable from any thread.</summary>
    /// <param name="vector">The number of the vector; one that the guest has not enabled is folded (MSI) or lost (MSI-X).</param>
    protected void SignalInterrupt(int vector)
    {
        lock (_interruptLock)
        {
            if (_msix is { IsEnabled: true } msix)
            {
                msix.Signal(vector);
            }
            else if (_msi is { IsEnabled: true } msi)
            {
                msi.Signal(vector);
            }
        }
    }

    /// <summary>
    /// Reads guest memory as a bus master. Only memory answers: registers of devices, this one's included, are out of reach.
    /// Callable from any thread.
    /// </summary>
    /// <param name="address">The first address.</param>
    /// <param name="data">Where the bytes go; all ones when nothing answers.</param>
    /// <returns>Whether memory answered; false too while the guest has bus mastering off.</returns>
    protected bool ReadMemory(GuestAddress address, Span<byte> data)
    {
        if (IsBusMaster && _host is { } host && host.Memory.TryRead(address, data))
        {
            return true;
        }
        data.Fill(0xff);
        return false;
    }

    /// <summary>Writes guest memory as a bus master, as <see cref="ReadMemory"/> reads it.</summary>
    /// <param name="address">The first address.</param>
    /// <param name="data">The bytes.</param>
    /// <returns>Whether memory took them.</returns>
    protected bool WriteMemory(GuestAddress address, ReadOnlySpan<byte> data) =>
        IsBusMaster && _host is { } host && host.Memory.TryWrite(address, data);

    /// <summary>The function has got its place in a machine.</summary>
    /// <param name="machine">The machine.</param>
    protected virtual void OnAttached(VirtualMachine machine)
    {
    }

    /// <summary>The guest is about to read configuration registers. One access at a time.</summary>
    /// <param name="offset">The first register.</param>
    /// <param name="length">The number of bytes, 1 to 4.</param>
    protected virtual void OnConfigRead(int offset, int length)
    {
    }

    /// <summary>The guest has written configuration registers. One access at a time.</summary>
    /// <param name="offset">The first register.</param>
    /// <param name="length">The number of bytes, 1 to 4.</param>
    protected virtual void OnConfigWritten(int offset, int length)
    {
    }

    /// <summary>A range has got another address, or none any more. One call at a time.</summary>
    /// <param name="bar">The number of its base address register.</param>
    /// <param name="address">Where it answers now.</param>
    protected virtual void OnBarMoved(int bar, ulong? address)
    {
    }

    /// <summary>Writes the state that is not in the configuration space.</summary>
    /// <param name="writer">Where it goes.</param>
    protected virtual void SaveDeviceState(StateWriter writer)
    {
    }

    /// <summary>Replaces that state.</summary>
    /// <param name="reader">What <see cref="SaveDeviceState"/> wrote, perhaps damaged.</param>
    /// <exception cref="MachineStateException">The state is not one that the device can be in.</exception>
    protected virtual void LoadDeviceState(StateReader reader)
    {
    }

    internal void Attach(PciHost host, PciAddress address, InterruptLine line)
    {
        CheckNotPlaced();
        _host = host;
        Address = address;
        _interruptLine = line;
        OnAttached(host.Machine);
    }

    internal void BarMoved(PciBar bar) => OnBarMoved(bar.Index, bar.MappedAt);

    internal void ReadConfig(int offset, Span<byte> data)
    {
        OnConfigRead(offset, data.Length);
        Config.Read(offset, data);
        if (offset <= Status && Status < offset + data.Length)
        {
            lock (_interruptLock)
            {
                if (_interruptLevel)
                {
                    data[Status - offset] |= (byte)StatusBits.Interrupt;
                }
            }
        }
    }

    internal void WriteConfig(int offset, ReadOnlySpan<byte> data)
    {
        lock (_interruptLock)
        {
            Config.Write(offset, data);
            UpdateInterruptLine();
            _msi?.ConfigWritten();
            if (_msix is { IsEnabled: true } msix)
            {
                msix.ConfigWritten();
            }
        }
        OnConfigWritten(offset, data.Length);
    }

    internal void Save(StateWriter writer)
    {
        lock (_interruptLock)
        {
            Config.Save(writer);
            writer.WriteBoolean(_interruptLevel);
            _msi?.Save(writer);
            _msix?.Save(writer);
        }
        SaveDeviceState(writer);
    }

    internal void Load(StateReader reader)
    {
        lock (_interruptLock)
        {
            Config.Load(reader);
            _interruptLevel = reader.ReadBoolean();
            _msi?.Load(reader);
            _msix?.Load(reader);
            UpdateInterruptLine();
        }
        LoadDeviceState(reader);
    }

    // Under the interrupt lock.
    private void UpdateInterruptLine()
    {
        var disabled = ((CommandBits)Config.GetUInt16(Command) & CommandBits.InterruptDisable) != 0;
        _interruptLine.Set(_interruptLevel && _hasInterruptPin && !disabled && !MessagesEnabled);
    }

    // A message is a memory write of the function: without bus mastering it does not leave.
    private void SendMessage(MsiMessage message)
    {
        if (!IsBusMaster || _host is not { } host)
        {
            return;
        }
        if (message.Address >> 20 == 0xfee)
        {
            host.Machine.SignalMsi(message);
        }
        else
        {
            host.Memory.TryWrite(message.Address, BitConverter.GetBytes(message.Data));
        }
    }

    private void CheckBar(int index, int registers, ulong size, ulong smallest, ulong largest, IIoDevice device)
    {
        ArgumentNullException.ThrowIfNull(device);
        CheckNotPlaced();
        if (index < 0 || index + registers > BarCount || size < smallest || size > largest || !ulong.IsPow2(size))
        {
            throw new KvmSharpException(KvmSharpErrorCode.InvalidArgument, $"BAR {index} with {size} bytes is not one that a PCI function can have.");
        }
        if (_bars.Exists(b => b.Index < index + registers && index < b.Index + (b.Is64Bit ? 2 : 1)))
        {
            throw new KvmSharpException(KvmSharpErrorCode.AlreadyExists, $"BAR {index} is taken.");
        }
    }

    // What is behind the content reads as an empty socket.
    private sealed class Rom(ReadOnlyMemory<byte> content) : IIoDevice
    {
        public void Read(ulong offset, Span<byte> data)
        {
            if (offset < (ulong)content.Length)
            {
                var rest = content.Span[(int)offset..];
                rest[..Math.Min(rest.Length, data.Length)].CopyTo(data);
            }
        }

        public void Write(ulong offset, ReadOnlySpan<byte> data)
        {
        }
    }

    private void CheckNotPlaced()
    {
        if (_host is not null)
        {
            throw new InvalidOperationException("The PCI function has its place in a machine already.");
        }
    }
}
