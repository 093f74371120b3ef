namespace KvmSharp.Devices;

/// <summary>
/// The reset control register of PC chipsets at port 0xCF9. It is mapped over ports 0xCF8 to 0xCFB and answers only byte
/// accesses to its own port: wider ones at 0xCF8 are configuration addresses of a PCI bus. Specification: Intel 82371SB
/// (PIIX3), "Reset Control Register".
/// </summary>
/// <param name="machine">The machine.</param>
public sealed class ResetControl(IMachineControl machine) : IIoDevice, IDeviceState
{
    /// <summary>The first port of the mapping.</summary>
    public const ulong BasePort = 0xcf8;

    /// <summary>How many ports the device takes.</summary>
    public const int PortCount = 4;

    /// <summary>The port of the register itself.</summary>
    public const ulong ResetPort = BasePort + RegisterOffset;

    /// <summary>What to write to the register for a full reset.</summary>
    public const byte FullReset = ResetCpu | SystemReset;

    private const ulong RegisterOffset = 1;
    private const byte SystemReset = 1 << 1;
    private const byte ResetCpu = 1 << 2;

    private readonly IMachineControl _machine = machine ?? throw new ArgumentNullException(nameof(machine));
    private volatile byte _value;

    /// <inheritdoc/>
    public int MaxAccessSize => 4;

    /// <inheritdoc/>
    public string StateName => "reset-control";

    /// <inheritdoc/>
    public void Read(ulong offset, Span<byte> data)
    {
        if (offset == RegisterOffset && data.Length == 1)
        {
            data[0] = _value;
        }
    }

    /// <inheritdoc/>
    public void Write(ulong offset, ReadOnlySpan<byte> data)
    {
        if (offset != RegisterOffset || data.Length != 1)
        {
            return;
        }
        var rising = (data[0] & ~_value & ResetCpu) != 0;
        _value = (byte)(data[0] & (SystemReset | ResetCpu));
        if (rising)
        {
            _machine.RequestReset("The guest wrote to port 0xcf9.");
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
        _value = (byte)(reader.ReadByte() & (SystemReset | ResetCpu));
    }
}

/// <summary>
/// What is left of the keyboard controller in a PC without keyboard: port 0x64 with an empty status, and the command that
/// pulses the reset line. The ACPI tables say that there is no controller, so drivers leave it alone.
/// Specification: IBM PC/AT Technical Reference, "Keyboard Controller", "Commands (I/O Address Hex 64)".
/// </summary>
/// <param name="machine">The machine.</param>
public sealed class KeyboardReset(IMachineControl machine) : IIoDevice
{
    /// <summary>The first port of the mapping.</summary>
    public const ulong BasePort = 0x64;

    /// <summary>How many ports the device takes.</summary>
    public const int PortCount = 1;

    // "Pulse Output Port": bits 0 to 3 say which lines stay; bit 0 is the reset line.
    private const byte PulseOutputMask = 0xf1;
    private const byte PulseReset = 0xf0;

    private readonly IMachineControl _machine = machine ?? throw new ArgumentNullException(nameof(machine));

    /// <inheritdoc/>
    public int MaxAccessSize => 1;

    /// <inheritdoc/>
    public void Read(ulong offset, Span<byte> data) => data[0] = 0;

    /// <inheritdoc/>
    public void Write(ulong offset, ReadOnlySpan<byte> data)
    {
        if ((data[0] & PulseOutputMask) == PulseReset)
        {
            _machine.RequestReset("The guest pulsed the keyboard controller's reset line.");
        }
    }
}
