using KvmSharp.Devices.Pci;

namespace KvmSharp.Devices;

/// <summary>
/// A VGA with the extension of Bochs for high resolutions: a PCI function with 16 MiB of memory. The host reads the screen as
/// text or as pixels. Specification: IBM Video Subsystem Technical Reference (VGA); Bochs, "VBE DISPI interface".
/// </summary>
public sealed unsafe partial class VgaAdapter : PciDevice, IDisposable
{
    /// <summary>The memory of the adapter in bytes.</summary>
    public const int MemorySize = 16 << 20;

    private const int FrameBufferBar = 0;
    private const int RegisterBar = 2;
    private const ulong FrameNanoseconds = 14_285_714; // 70 Hz
    private const ulong LineNanoseconds = 31_778;

    // Wiring
    private readonly Lock _lock = new();
    private readonly GuestRam _memory = new(MemorySize);
    private VirtualMachine? _machine;
    private MemorySlot? _slot; // of the linear frame buffer, where the guest has placed it
    private bool _isDisposed;

    // State
    private readonly byte[] _sequencer = new byte[SequencerCount];
    private readonly byte[] _graphics = new byte[GraphicsCount];
    private readonly byte[] _crtc = new byte[CrtcCount];
    private readonly byte[] _attribute = new byte[AttributeCount];
    private readonly byte[] _dac = new byte[768];
    private readonly ushort[] _vbe = new ushort[VbeCount];
    private readonly byte[] _latches = new byte[4];
    private byte _miscellaneous = MiscellaneousColor;
    private byte _sequencerIndex;
    private byte _graphicsIndex;
    private byte _crtcIndex;
    private byte _attributeIndex;
    private bool _attributeExpectsData;
    private byte _dacMask = 0xff;
    private ushort _dacRead; // index of a colour times 3 plus component
    private ushort _dacWrite;
    private bool _dacReading;
    private ushort _vbeIndex;

    /// <summary>Creates the adapter.</summary>
    /// <param name="optionRom">The video BIOS, at most 256 KiB; <see langword="null"/> without.</param>
    /// <exception cref="KvmSharpException">The video BIOS is too large.</exception>
    public VgaAdapter(ReadOnlyMemory<byte>? optionRom = null)
        : base(new PciIdentity(0x1234, 0x1111, 0x03_00_00, 2, 0x1af4, 0x1100))
    {
        AddMemoryBar(FrameBufferBar, MemorySize, new FrameBuffer(this), prefetchable: true);
        AddMemoryBar(RegisterBar, RegisterRange, new RegisterWindow(this));
        if (optionRom is { } rom)
        {
            AddExpansionRom(rom);
        }
        _vbe[VbeId] = VbeNewestId;
        CheckVbe();
        _graphics[BitMask] = 0xff;
        _graphics[ColorDontCare] = 0x0f;
        _changed = true;
    }

    /// <inheritdoc/>
    public override string StateName => "vga";

    /// <summary>Frees the memory of the adapter, when the machine is gone. Callable from any thread.</summary>
    public void Dispose()
    {
        lock (_lock)
        {
            _isDisposed = true;
            _memory.Dispose();
        }
    }

    /// <inheritdoc/>
    protected override void OnAttached(VirtualMachine machine)
    {
        ArgumentNullException.ThrowIfNull(machine);
        _machine = machine;
        machine.Ports.Map(new Ports(this), PortBase, PortCount);
        machine.Ports.Map(new VbePorts(this), VbePort, VbePortCount);
        machine.Mmio.Map(new Window(this), WindowBase, WindowLength);
    }

    // The linear frame buffer is memory, so that drawing does not leave the guest.
    /// <inheritdoc/>
    protected override void OnBarMoved(int bar, ulong? address)
    {
        if (bar == FrameBufferBar)
        {
            lock (_lock)
            {
                PlaceFrameBuffer(address);
            }
        }
    }

    /// <inheritdoc/>
    protected override void SaveDeviceState(StateWriter writer)
    {
        ArgumentNullException.ThrowIfNull(writer);
        lock (_lock)
        {
            foreach (var registers in (byte[][])[_sequencer, _graphics, _crtc, _attribute, _dac, _latches])
            {
                writer.WriteBytes(registers);
            }
            foreach (var register in _vbe)
            {
                writer.WriteUInt16(register);
            }
            writer.WriteBytes([_miscellaneous, _sequencerIndex, _graphicsIndex, _crtcIndex, _attributeIndex, _dacMask]);
            writer.WriteBoolean(_attributeExpectsData);
            writer.WriteUInt16(_dacRead);
            writer.WriteUInt16(_dacWrite);
            writer.WriteBoolean(_dacReading);
            writer.WriteUInt16(_vbeIndex);
            SaveMemory(writer);
        }
    }

    /// <inheritdoc/>
    protected override void LoadDeviceState(StateReader reader)
    {
        ArgumentNullException.ThrowIfNull(reader);
        lock (_lock)
        {
            foreach (var registers in (byte[][])[_sequencer, _graphics, _crtc, _attribute, _dac, _latches])
            {
                reader.ReadBytes(registers.Length).CopyTo(registers);
            }
            for (var i = 0; i < VbeCount; i++)
            {
                _vbe[i] = reader.ReadUInt16();
            }
            CheckVbe();
            _miscellaneous = reader.ReadByte();
            _sequencerIndex = reader.ReadByte();
            _graphicsIndex = reader.ReadByte();
            _crtcIndex = reader.ReadByte();
            _attributeIndex = reader.ReadByte();
            _dacMask = reader.ReadByte();
            _attributeExpectsData = reader.ReadBoolean();
            _dacRead = (ushort)(reader.ReadUInt16() % _dac.Length);
            _dacWrite = (ushort)(reader.ReadUInt16() % _dac.Length);
            _dacReading = reader.ReadBoolean();
            _vbeIndex = reader.ReadUInt16();
            var address = _slot?.Address.Value;
            PlaceFrameBuffer(null); // nothing decoded from the old content may stay
            LoadMemory(reader);
            PlaceFrameBuffer(address);
            _changed = true;
        }
    }

    private void PlaceFrameBuffer(ulong? address)
    {
        if (_slot is { } slot)
        {
            CollectDirtyPages();
            _machine!.Memory.Remove(slot);
            _slot = null;
        }
        if (address is { } at)
        {
            _slot = _machine!.Memory.TryMapOfDevice(_memory, 0, at, MemorySize, MemorySlotFlags.LogDirtyPages);
        }
    }

    // Only pages that are not all zero are kept.
    private void SaveMemory(StateWriter writer)
    {
        var page = new byte[GuestMemory.PageSize];
        for (uint i = 0; i < MemorySize / GuestMemory.PageSize; i++)
        {
            _memory.ReadRaw(i * GuestMemory.PageSize, page);
            if (page.AsSpan().ContainsAnyExcept((byte)0))
            {
                writer.WriteUInt32(i);
                writer.WriteBytes(page);
            }
        }
        writer.WriteUInt32(uint.MaxValue);
    }

    private void LoadMemory(StateReader reader)
    {
        FillMemory(0, MemorySize);
        for (uint i; (i = reader.ReadUInt32()) != uint.MaxValue;)
        {
            if (i >= MemorySize / GuestMemory.PageSize)
            {
                throw new MachineStateException("The saved state is damaged: a page of video memory is out of range.");
            }
            _memory.WriteUnseen(i * GuestMemory.PageSize, reader.ReadBytes(GuestMemory.PageSize));
        }
    }

    private sealed class Ports(VgaAdapter adapter) : IIoDevice
    {
        public int MaxAccessSize => 1;

        public void Read(ulong offset, Span<byte> data) => adapter.ReadPort((int)offset, data);

        public void Write(ulong offset, ReadOnlySpan<byte> data) => adapter.WritePort((int)offset, data[0]);
    }

    private sealed class VbePorts(VgaAdapter adapter) : IIoDevice
    {
        public int MaxAccessSize => 2;

        public void Read(ulong offset, Span<byte> data) => adapter.ReadVbePort(offset, data);

        public void Write(ulong offset, ReadOnlySpan<byte> data) => adapter.WriteVbePort(offset, data);
    }

    private sealed class Window(VgaAdapter adapter) : IIoDevice
    {
        public void Read(ulong offset, Span<byte> data) => adapter.ReadWindow((uint)offset, data);

        public void Write(ulong offset, ReadOnlySpan<byte> data) => adapter.WriteWindow((uint)offset, data);
    }

    // What the guest reaches where no slot could be placed.
    private sealed class FrameBuffer(VgaAdapter adapter) : IIoDevice
    {
        public void Read(ulong offset, Span<byte> data)
        {
            lock (adapter._lock)
            {
                adapter._memory.ReadRaw(offset, data);
            }
        }

        public void Write(ulong offset, ReadOnlySpan<byte> data)
        {
            lock (adapter._lock)
            {
                adapter._memory.WriteUnseen(offset, data);
                adapter._changed = true;
            }
        }
    }

    private sealed class RegisterWindow(VgaAdapter adapter) : IIoDevice
    {
        public int MaxAccessSize => 2;

        public void Read(ulong offset, Span<byte> data)
        {
            data.Clear();
            for (var i = 0; i < data.Length && offset is >= RangePorts and < RangePorts + 0x20; i++)
            {
                adapter.ReadPort((int)offset - RangePorts + AttributeIndex + i, data.Slice(i, 1));
            }
            if (offset is >= RangeVbe and < RangeVbe + 2 * VbeCount && offset % 2 == 0 && data.Length == 2)
            {
                BitConverter.TryWriteBytes(data, adapter.ReadVbe((int)(offset - RangeVbe) / 2));
            }
        }

        public void Write(ulong offset, ReadOnlySpan<byte> data)
        {
            for (var i = 0; i < data.Length && offset + (ulong)i is >= RangePorts and < RangePorts + 0x20; i++)
            {
                adapter.WritePort((int)offset - RangePorts + AttributeIndex + i, data[i]);
            }
            if (offset is >= RangeVbe and < RangeVbe + 2 * VbeCount && offset % 2 == 0 && data.Length == 2)
            {
                adapter.WriteVbe((int)(offset - RangeVbe) / 2, BitConverter.ToUInt16(data));
            }
        }
    }
}
