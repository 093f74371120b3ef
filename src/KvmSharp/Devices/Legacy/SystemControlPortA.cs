namespace KvmSharp.Devices;

/// <summary>
/// System control port A, port 0x92: bit 0 resets the machine, bit 1 enables address line A20. The other bits are not there
/// and read as zero. Specification: IBM PS/2 Hardware Interface Technical Reference, "System Control Port A".
/// </summary>
/// <remarks>Bit 1 is set at power-on, as firmware leaves it: a kernel is loaded without firmware.</remarks>
public sealed class SystemControlPortA : IIoDevice, IDeviceState
{
    /// <summary>The port.</summary>
    public const ulong DefaultPort = 0x92;

    private const byte FastReset = 1 << 0;
    private const byte A20Enabled = 1 << 1;

    private readonly IMachineControl _machine;
    private readonly A20Gate.Source? _a20;

    private volatile byte _value = A20Enabled;

    /// <summary>Creates the device.</summary>
    /// <param name="machine">The machine.</param>
    /// <param name="a20">The gate that bit 1 drives, or <see langword="null"/>: it is storage then.</param>
    public SystemControlPortA(IMachineControl machine, A20Gate? a20 = null)
    {
        ArgumentNullException.ThrowIfNull(machine);
        _machine = machine;
        _a20 = a20?.AddSource(enabled: true);
    }

    /// <inheritdoc/>
    public int MaxAccessSize => 1;

    /// <inheritdoc/>
    public string StateName => "system-control-a";

    /// <inheritdoc/>
    public void Read(ulong offset, Span<byte> data) => data[0] = _value;

    /// <inheritdoc/>
    public void Write(ulong offset, ReadOnlySpan<byte> data)
    {
        Set((byte)(data[0] & A20Enabled));
        if ((data[0] & FastReset) != 0)
        {
            _machine.RequestReset("The guest wrote the reset bit of port 0x92.");
        }
    }

    /// <inheritdoc/>
    public void SaveState(StateWriter writer)
    {
        ArgumentNullException.ThrowIfNull(writer);
        writer.WriteByte(_value);
    }

    /// <inheritdoc/>
    public void LoadState(StateReader reader)
    {
        ArgumentNullException.ThrowIfNull(reader);
        Set((byte)(reader.ReadByte() & A20Enabled));
    }

    private void Set(byte value)
    {
        _value = value;
        _a20?.Set(value != 0);
    }
}
