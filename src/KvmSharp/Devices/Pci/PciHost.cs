using System.Buffers.Binary;
using static KvmSharp.Devices.Pci.PciRegisters;

namespace KvmSharp.Devices.Pci;

/// <summary>
/// The PCI Express host bridge: one root bus with up to 32 devices, reached through ports 0xCF8 and 0xCFC and through
/// memory (ECAM). It places the registers of its functions where the guest programs them and wires their interrupt pins to
/// GSI 16 to 19. Specification: PCI Local Bus 3.0, "Configuration Space"; PCI Express Base 5.0, "Enhanced Configuration
/// Access Mechanism (ECAM)".
/// </summary>
public sealed class PciHost : IIoDevice, IDeviceState
{
    /// <summary>The first port of the configuration mechanism.</summary>
    public const ulong BasePort = 0xcf8;

    /// <summary>How many ports the configuration mechanism takes.</summary>
    public const int PortCount = 8;

    /// <summary>Where ECAM is unless the guest moves it.</summary>
    public const ulong DefaultEcamAddress = 0xe000_0000;

    /// <summary>The GSI of the first of the four interrupt wires.</summary>
    public const int FirstInterrupt = 16;

    // The ranges that are offered to functions. RAM ends below the first; ECAM follows it.
    internal const ulong MemoryWindowStart = 3UL << 30;
    internal const ulong MemoryWindowEnd = DefaultEcamAddress;
    internal const ulong HighWindowStart = 1UL << 39;
    internal const ulong HighWindowEnd = 1UL << 40;
    internal const ulong PortWindowStart = 0xc000;
    internal const ulong PortWindowEnd = 0x1_0000;

    internal const int InterruptWires = 4;
    private const int FirstChipsetDevice = 25;

    // Configuration
    private readonly PciDevice?[] _functions = new PciDevice?[256];

    // Wiring
    private readonly Lock _lock = new();
    private readonly IIoDevice? _otherPorts;
    private readonly Ecam _ecam;
    private readonly InterruptLine.Gsi[] _wires = new InterruptLine.Gsi[InterruptWires];
    private IDisposable? _ecamRegistration;

    // State
    private uint _address;

    /// <summary>Creates the bridge and maps it.</summary>
    /// <param name="machine">The machine.</param>
    /// <param name="otherPorts">
    /// What answers accesses to ports 0xCF8 to 0xCFB other than of four bytes, for example the reset control register at
    /// 0xCF9. If it has a state, that is saved with the bridge's.
    /// </param>
    /// <exception cref="KvmSharpException">The ports or addresses are taken.</exception>
    public PciHost(VirtualMachine machine, IIoDevice? otherPorts = null)
    {
        ArgumentNullException.ThrowIfNull(machine);
        Machine = machine;
        _otherPorts = otherPorts;
        _ecam = new Ecam(this);
        for (var i = 0; i < InterruptWires; i++)
        {
            var wire = i;
            var line = machine.GetInterruptLine(FirstInterrupt + i);
            _wires[i] = new InterruptLine.Gsi(high =>
            {
                line.Set(high);
                WireChanged?.Invoke(wire, high);
            });
        }
        machine.Ports.Map(this, BasePort, PortCount);
        Bridge = new PciHostBridge();
        Add(Bridge, new PciAddress(0));
    }

    /// <summary>The functions by address.</summary>
    public IReadOnlyList<PciDevice> Devices
    {
        get
        {
            lock (_lock)
            {
                return [.. _functions.OfType<PciDevice>()];
            }
        }
    }

    /// <inheritdoc/>
    public int MaxAccessSize => 4;

    /// <inheritdoc/>
    public string StateName => "pci-host";

    /// <summary>One of the four interrupt wires has changed its level. Raised in the order of the changes, on any thread.</summary>
    internal event Action<int, bool>? WireChanged;

    internal VirtualMachine Machine { get; }

    internal PciHostBridge Bridge { get; }

    internal GuestMemory Memory => Machine.Memory;

    /// <summary>Puts a function on the bus. Before the machine starts; there is no hot-plug.</summary>
    /// <param name="device">The function.</param>
    /// <param name="address">Where; by default the first free device number.</param>
    /// <exception cref="KvmSharpException">The place is taken, or the bus is full.</exception>
    public void Add(PciDevice device, PciAddress? address = null)
    {
        ArgumentNullException.ThrowIfNull(device);
        if (Machine.Status != VirtualMachineStatus.Created)
        {
            throw new InvalidOperationException("PCI devices are added before the machine starts.");
        }
        lock (_lock)
        {
            var place = address ?? FreeAddress();
            if (!place.IsValid || _functions[place.Index] is not null)
            {
                throw new KvmSharpException(KvmSharpErrorCode.AlreadyExists, $"The PCI address {place} does not exist or is taken.");
            }
            device.Attach(this, place, new InterruptLine(_wires[WireOf(place.Device)]));
            _functions[place.Index] = device;
            MarkMultiFunction(place.Device);
        }
    }

    /// <summary>
    /// Does what a PC's firmware does: gives every range an address and switches decoding on. Without firmware an operating
    /// system that trusts it would find no registers. Before the machine starts.
    /// </summary>
    /// <exception cref="KvmSharpException">The windows are too small.</exception>
    public void AssignResources()
    {
        lock (_lock)
        {
            var memory = MemoryWindowStart;
            var high = HighWindowStart;
            var ports = PortWindowStart;
            // From large to small, so that alignment leaves no gaps.
            foreach (var bar in _functions.OfType<PciDevice>().SelectMany(d => d.Bars).Where(b => !b.IsRom).OrderByDescending(b => b.Size))
            {
                if (bar.IsIo)
                {
                    bar.Address = Take(ref ports, PortWindowEnd, bar.Size);
                }
                else if (bar.Is64Bit && bar.Size >= 1UL << 28)
                {
                    bar.Address = Take(ref high, HighWindowEnd, bar.Size);
                }
                else
                {
                    bar.Address = Take(ref memory, MemoryWindowEnd, bar.Size);
                }
            }
            foreach (var device in _functions.OfType<PciDevice>())
            {
                var command = (CommandBits)device.Config.GetUInt16(Command);
                command |= device.Bars.Any(b => b.IsIo) ? CommandBits.IoSpace : 0;
                command |= device.Bars.Any(b => !b.IsIo) ? CommandBits.MemorySpace : 0;
                device.Config.SetUInt16(Command, (ushort)command);
                if (device.HasInterruptPin)
                {
                    device.Config.DefineByte(InterruptLineRegister, (byte)(FirstInterrupt + WireOf(device.Address!.Value.Device)), 0xff);
                }
            }
            UpdateMappings();
        }
    }

    /// <inheritdoc/>
    public void Read(ulong offset, Span<byte> data)
    {
        lock (_lock)
        {
            if (offset >= 4)
            {
                if ((_address & ConfigEnable) != 0)
                {
                    ReadConfig((_address >> 8) & 0xffff, (int)(_address & 0xfc) + (int)(offset - 4), data);
                }
            }
            else if (data.Length == 4)
            {
                BinaryPrimitives.WriteUInt32LittleEndian(data, _address);
            }
            else
            {
                _otherPorts?.Read(offset, data);
            }
        }
    }

    /// <inheritdoc/>
    public void Write(ulong offset, ReadOnlySpan<byte> data)
    {
        lock (_lock)
        {
            if (offset >= 4)
            {
                if ((_address & ConfigEnable) != 0)
                {
                    WriteConfig((_address >> 8) & 0xffff, (int)(_address & 0xfc) + (int)(offset - 4), data);
                }
            }
            else if (data.Length == 4)
            {
                _address = BinaryPrimitives.ReadUInt32LittleEndian(data) & ~0x7f00_0003u;
            }
            else
            {
                _otherPorts?.Write(offset, data);
            }
        }
    }

    /// <inheritdoc/>
    public void SaveState(StateWriter writer)
    {
        ArgumentNullException.ThrowIfNull(writer);
        lock (_lock)
        {
            writer.WriteUInt32(_address);
            (_otherPorts as IDeviceState)?.SaveState(writer);
            foreach (var device in _functions.OfType<PciDevice>())
            {
                writer.WriteByte((byte)device.Address!.Value.Index);
                writer.WriteName(device.StateName);
                device.Save(writer);
            }
        }
    }

    /// <inheritdoc/>
    public void LoadState(StateReader reader)
    {
        ArgumentNullException.ThrowIfNull(reader);
        lock (_lock)
        {
            _address = reader.ReadUInt32() & ~0x7f00_0003u;
            (_otherPorts as IDeviceState)?.LoadState(reader);
            foreach (var device in _functions.OfType<PciDevice>())
            {
                if (reader.ReadByte() != device.Address!.Value.Index || reader.ReadName() != device.StateName)
                {
                    throw new MachineStateException("The saved state is of a machine with other PCI devices.");
                }
                device.Load(reader);
            }
            UpdateMappings();
        }
    }

    /// <summary>
    /// The wire that a pin of a device leads to; PCI-to-PCI Bridge Architecture, "Interrupt Support". From device 25 on they are
    /// a chipset's own: Intel ICH9, "Device 31 Interrupt Route Register" and those before it.
    /// </summary>
    internal static int WireOf(int device, int pin = 0) => (device < FirstChipsetDevice ? device + pin : pin) % InterruptWires;

    // Under the lock: the host bridge's register has changed.
    internal void MoveEcam(ulong? address, ulong size)
    {
        _ecamRegistration?.Dispose();
        _ecamRegistration = address is { } at ? Machine.Mmio.TryMap(_ecam, at, size) : null;
    }

    private void ReadConfig(uint routing, int offset, Span<byte> data)
    {
        if (routing <= 0xff && _functions[routing] is { } device)
        {
            device.ReadConfig(offset, data);
        }
    }

    private void WriteConfig(uint routing, int offset, ReadOnlySpan<byte> data)
    {
        if (routing <= 0xff && _functions[routing] is { } device)
        {
            device.WriteConfig(offset, data);
            if (offset < ExpansionRom + 4)
            {
                UpdateMappings();
            }
        }
    }

    // First everything that has moved goes, then everything that finds room comes: order does not matter to guests then.
    private void UpdateMappings()
    {
        foreach (var device in _functions)
        {
            foreach (var bar in device?.Bars ?? [])
            {
                if (bar.MappedAt is { } at && bar.WantedAddress != at)
                {
                    bar.Unmap();
                }
            }
        }
        foreach (var device in _functions)
        {
            foreach (var bar in device?.Bars ?? [])
            {
                if (bar.MappedAt is null && bar.WantedAddress is { } wanted)
                {
                    bar.TryMap(bar.IsIo ? Machine.Ports : Machine.Mmio, wanted);
                }
            }
        }
    }

    private static ulong Take(ref ulong next, ulong end, ulong size)
    {
        var start = (next + size - 1) & ~(size - 1);
        if (start + size > end)
        {
            throw new KvmSharpException(KvmSharpErrorCode.InvalidArgument, "The registers of the PCI devices do not fit into their windows.");
        }
        next = start + size;
        return start;
    }

    private PciAddress FreeAddress()
    {
        for (var device = 0; device < 32; device++)
        {
            if (!_functions.AsSpan(device * 8, 8).ContainsAnyExcept((PciDevice?)null))
            {
                return new PciAddress(device);
            }
        }
        throw new KvmSharpException(KvmSharpErrorCode.AlreadyExists, "The PCI bus is full.");
    }

    private void MarkMultiFunction(int device)
    {
        var functions = _functions.AsSpan(device * 8, 8).ToArray().OfType<PciDevice>().ToArray();
        foreach (var function in functions)
        {
            var type = (byte)(function.Config.GetByte(HeaderType) & ~MultiFunction);
            function.Config.DefineByte(HeaderType, (byte)(type | (functions.Length > 1 ? MultiFunction : 0)));
        }
    }

    // Bits 12 to 27 number bus, device and function.
    private sealed class Ecam(PciHost host) : IIoDevice
    {
        public int MaxAccessSize => 4;

        public void Read(ulong offset, Span<byte> data)
        {
            lock (host._lock)
            {
                var count = Math.Min(data.Length, ConfigSize - (int)(offset & 0xfff));
                host.ReadConfig((uint)(offset >> 12), (int)(offset & 0xfff), data[..count]);
                if (count < data.Length)
                {
                    host.ReadConfig((uint)(offset >> 12) + 1, 0, data[count..]);
                }
            }
        }

        public void Write(ulong offset, ReadOnlySpan<byte> data)
        {
            lock (host._lock)
            {
                var count = Math.Min(data.Length, ConfigSize - (int)(offset & 0xfff));
                host.WriteConfig((uint)(offset >> 12), (int)(offset & 0xfff), data[..count]);
                if (count < data.Length)
                {
                    host.WriteConfig((uint)(offset >> 12) + 1, 0, data[count..]);
                }
            }
        }
    }
}
