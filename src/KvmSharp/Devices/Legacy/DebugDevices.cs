namespace KvmSharp.Devices;

/// <summary>Ports 0xE9 and 0x402: each byte written is output; a read gives 0xE9, which tells guests that the console is there.</summary>
/// <param name="backend">Where output goes.</param>
public sealed class DebugConsole(ICharacterBackend backend) : IIoDevice
{
    /// <summary>The port of Bochs and its followers.</summary>
    public const ulong BochsPort = 0xe9;

    /// <summary>The port of firmware builds for virtual machines.</summary>
    public const ulong FirmwarePort = 0x402;

    private const byte Presence = 0xe9;

    private readonly ICharacterBackend _backend = backend ?? throw new ArgumentNullException(nameof(backend));

    /// <inheritdoc/>
    public int MaxAccessSize => 1;

    /// <inheritdoc/>
    public void Read(ulong offset, Span<byte> data) => data[0] = Presence;

    /// <inheritdoc/>
    public void Write(ulong offset, ReadOnlySpan<byte> data) => _backend.Write(data);
}

/// <summary>Port 0xF4: a write ends the machine at that instruction with the status (value &lt;&lt; 1) | 1, so that 0 and success differ.</summary>
/// <param name="machine">The machine.</param>
public sealed class IsaDebugExit(IMachineControl machine) : IIoDevice
{
    /// <summary>The usual port.</summary>
    public const ulong DefaultPort = 0xf4;

    /// <summary>How many ports the device takes.</summary>
    public const int PortCount = 4;

    private readonly IMachineControl _machine = machine ?? throw new ArgumentNullException(nameof(machine));

    /// <inheritdoc/>
    public int MaxAccessSize => 4;

    /// <inheritdoc/>
    public void Read(ulong offset, Span<byte> data) => data.Clear();

    /// <inheritdoc/>
    public void Write(ulong offset, ReadOnlySpan<byte> data)
    {
        uint value = 0;
        for (var i = 0; i < data.Length; i++)
        {
            value |= (uint)data[i] << (8 * i);
        }
        _machine.RequestExit(unchecked((int)((value << 1) | 1)));
    }
}

/// <summary>Port 0x80: remembers the code that firmware and kernels write to show their progress or to pass time.</summary>
public sealed class PostCode : IIoDevice, IDeviceState
{
    /// <summary>The usual port.</summary>
    public const ulong DefaultPort = 0x80;

    private volatile byte _value;

    /// <summary>The last code.</summary>
    public byte Value => _value;

    /// <inheritdoc/>
    public int MaxAccessSize => 1;

    /// <inheritdoc/>
    public string StateName => "post-code";

    /// <inheritdoc/>
    public void Read(ulong offset, Span<byte> data) => data[0] = _value;

    /// <inheritdoc/>
    public void Write(ulong offset, ReadOnlySpan<byte> data) => _value = data[0];

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
        _value = reader.ReadByte();
    }
}
