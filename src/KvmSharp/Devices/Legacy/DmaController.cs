namespace KvmSharp.Devices;

/// <summary>
/// One of the two DMA controllers of a PC as software sees it: all registers, but no transfers, since no device of the machine
/// asks for one. Specification: Intel 8237A.
/// </summary>
internal sealed partial class DmaController : IIoDevice, IDeviceState
{
    // Configuration
    private readonly int _shift;

    // State
    private readonly Lock _lock = new();
    private readonly ushort[] _values = new ushort[2 * ChannelCount]; // base and current ones are always the same
    private readonly byte[] _modes = new byte[ChannelCount];
    private byte _command;
    private byte _requests;
    private byte _masks = AllChannels;
    private bool _highByte;

    /// <summary>Creates a controller.</summary>
    /// <param name="portsPerRegister">1, or 2 for the second controller of a PC.</param>
    public DmaController(int portsPerRegister)
    {
        _shift = portsPerRegister - 1;
    }

    /// <inheritdoc/>
    public int MaxAccessSize => 1;

    /// <inheritdoc/>
    public string StateName => "dma-controller";

    /// <inheritdoc/>
    public void Read(ulong offset, Span<byte> data)
    {
        lock (_lock)
        {
            var register = (int)(offset >> _shift);
            data[0] = register switch
            {
                < FirstControl => ReadHalf(register),
                StatusCommand => (byte)(_requests << RequestShift), // no channel ever reaches its end
                AllMasks => _masks,
                _ => 0,
            };
        }
    }

    /// <inheritdoc/>
    public void Write(ulong offset, ReadOnlySpan<byte> data)
    {
        lock (_lock)
        {
            WriteRegister((int)(offset >> _shift), data[0]);
        }
    }

    /// <inheritdoc/>
    public void SaveState(StateWriter writer)
    {
        ArgumentNullException.ThrowIfNull(writer);
        lock (_lock)
        {
            foreach (var value in _values)
            {
                writer.WriteUInt16(value);
            }
            writer.WriteBytes(_modes);
            writer.WriteByte(_command);
            writer.WriteByte(_requests);
            writer.WriteByte(_masks);
            writer.WriteBoolean(_highByte);
        }
    }

    /// <inheritdoc/>
    public void LoadState(StateReader reader)
    {
        ArgumentNullException.ThrowIfNull(reader);
        lock (_lock)
        {
            for (var i = 0; i < _values.Length; i++)
            {
                _values[i] = reader.ReadUInt16();
            }
            reader.ReadBytes(_modes.Length).CopyTo(_modes);
            _command = reader.ReadByte();
            _requests = (byte)(reader.ReadByte() & AllChannels);
            _masks = (byte)(reader.ReadByte() & AllChannels);
            _highByte = reader.ReadBoolean();
        }
    }

    private void WriteRegister(int register, byte value)
    {
        switch (register)
        {
            case < FirstControl:
                var shift = NextShift();
                _values[register] = (ushort)(_values[register] & ~(0xff << shift) | value << shift);
                break;
            case StatusCommand:
                _command = value;
                break;
            case Request:
                _requests = SetChannel(_requests, value);
                break;
            case SingleMask:
                _masks = SetChannel(_masks, value);
                break;
            case Mode:
                _modes[value & ChannelBits] = value;
                break;
            case ClearBytePointer:
                _highByte = false;
                break;
            case MasterClear:
                _command = _requests = 0;
                _masks = AllChannels;
                _highByte = false;
                break;
            case ClearMask:
                _masks = 0;
                break;
            case AllMasks:
                _masks = (byte)(value & AllChannels);
                break;
        }
    }

    private byte ReadHalf(int register) => (byte)(_values[register] >> NextShift());

    // The low byte comes first, then the high one.
    private int NextShift()
    {
        var shift = _highByte ? 8 : 0;
        _highByte = !_highByte;
        return shift;
    }

    private static byte SetChannel(byte channels, byte value)
    {
        var bit = 1 << (value & ChannelBits);
        return (byte)((value & SetBit) != 0 ? channels | bit : channels & ~bit);
    }
}

/// <summary>The page registers, which hold the upper bits of the addresses: plain memory here.</summary>
internal sealed partial class DmaPages : IIoDevice, IDeviceState
{
    private readonly Lock _lock = new();
    private readonly byte[] _pages = new byte[PortCount];

    /// <inheritdoc/>
    public int MaxAccessSize => 1;

    /// <inheritdoc/>
    public string StateName => "dma-pages";

    /// <inheritdoc/>
    public void Read(ulong offset, Span<byte> data)
    {
        lock (_lock)
        {
            data[0] = _pages[offset];
        }
    }

    /// <inheritdoc/>
    public void Write(ulong offset, ReadOnlySpan<byte> data)
    {
        lock (_lock)
        {
            _pages[offset] = data[0];
        }
    }

    /// <inheritdoc/>
    public void SaveState(StateWriter writer)
    {
        ArgumentNullException.ThrowIfNull(writer);
        lock (_lock)
        {
            writer.WriteBytes(_pages);
        }
    }

    /// <inheritdoc/>
    public void LoadState(StateReader reader)
    {
        ArgumentNullException.ThrowIfNull(reader);
        lock (_lock)
        {
            reader.ReadBytes(_pages.Length).CopyTo(_pages);
        }
    }
}
