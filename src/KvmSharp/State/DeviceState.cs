using System.Buffers.Binary;

namespace KvmSharp;

/// <summary>
/// A device whose state belongs to a saved machine. Devices that are mapped on a bus and implement this are saved and
/// loaded with the machine; the machine is paused meanwhile.
/// </summary>
public interface IDeviceState
{
    /// <summary>The kind of device, for example <c>uart16550</c>; a state is only loaded into the same kind at the same place.</summary>
    string StateName { get; }

    /// <summary>Writes the state: what the guest can see or cause to differ, not configuration or wiring.</summary>
    /// <param name="writer">Where it goes.</param>
    void SaveState(StateWriter writer);

    /// <summary>Replaces the state, sets the levels of interrupt lines and arms timers.</summary>
    /// <param name="reader">What <see cref="SaveState"/> wrote, perhaps damaged.</param>
    /// <exception cref="MachineStateException">The state is not one that the device can be in.</exception>
    void LoadState(StateReader reader);
}

/// <summary>Writes values of a device state, little-endian, without gaps.</summary>
public sealed class StateWriter
{
    private readonly MemoryStream _stream = new();

    /// <summary>Writes one byte.</summary>
    /// <param name="value">The value.</param>
    public void WriteByte(byte value) => _stream.WriteByte(value);

    /// <summary>Writes one byte, 0 or 1.</summary>
    /// <param name="value">The value.</param>
    public void WriteBoolean(bool value) => _stream.WriteByte(value ? (byte)1 : (byte)0);

    /// <summary>Writes two bytes.</summary>
    /// <param name="value">The value.</param>
    public void WriteUInt16(ushort value)
    {
        Span<byte> bytes = stackalloc byte[2];
        BinaryPrimitives.WriteUInt16LittleEndian(bytes, value);
        _stream.Write(bytes);
    }

    /// <summary>Writes four bytes.</summary>
    /// <param name="value">The value.</param>
    public void WriteUInt32(uint value)
    {
        Span<byte> bytes = stackalloc byte[4];
        BinaryPrimitives.WriteUInt32LittleEndian(bytes, value);
        _stream.Write(bytes);
    }

    /// <summary>Writes eight bytes.</summary>
    /// <param name="value">The value.</param>
    public void WriteUInt64(ulong value)
    {
        Span<byte> bytes = stackalloc byte[8];
        BinaryPrimitives.WriteUInt64LittleEndian(bytes, value);
        _stream.Write(bytes);
    }

    /// <summary>Writes eight bytes.</summary>
    /// <param name="value">The value.</param>
    public void WriteInt64(long value) => WriteUInt64(unchecked((ulong)value));

    /// <summary>Writes bytes as they are, without their number.</summary>
    /// <param name="value">The bytes.</param>
    public void WriteBytes(ReadOnlySpan<byte> value) => _stream.Write(value);

    /// <summary>Writes a short ASCII name with its length.</summary>
    internal void WriteName(string name)
    {
        WriteByte((byte)name.Length);
        WriteBytes(System.Text.Encoding.ASCII.GetBytes(name));
    }

    /// <summary>All that was written.</summary>
    public byte[] ToArray() => _stream.ToArray();
}

/// <summary>Reads what a <see cref="StateWriter"/> wrote, and trusts none of it.</summary>
/// <param name="data">The bytes.</param>
public sealed class StateReader(ReadOnlyMemory<byte> data)
{
    private ReadOnlyMemory<byte> _rest = data;

    /// <summary>How many bytes are left.</summary>
    public int Remaining => _rest.Length;

    /// <summary>Reads one byte.</summary>
    /// <exception cref="MachineStateException">The state is too short.</exception>
    public byte ReadByte() => ReadBytes(1)[0];

    /// <summary>Reads one byte, which must be 0 or 1.</summary>
    /// <exception cref="MachineStateException">The state is too short or the byte is another.</exception>
    public bool ReadBoolean() => ReadByte() switch
    {
        0 => false,
        1 => true,
        _ => throw new MachineStateException("The saved state is damaged: a truth value is neither 0 nor 1."),
    };

    /// <summary>Reads two bytes.</summary>
    /// <exception cref="MachineStateException">The state is too short.</exception>
    public ushort ReadUInt16() => BinaryPrimitives.ReadUInt16LittleEndian(ReadBytes(2));

    /// <summary>Reads four bytes.</summary>
    /// <exception cref="MachineStateException">The state is too short.</exception>
    public uint ReadUInt32() => BinaryPrimitives.ReadUInt32LittleEndian(ReadBytes(4));

    /// <summary>Reads eight bytes.</summary>
    /// <exception cref="MachineStateException">The state is too short.</exception>
    public ulong ReadUInt64() => BinaryPrimitives.ReadUInt64LittleEndian(ReadBytes(8));

    /// <summary>Reads eight bytes.</summary>
    /// <exception cref="MachineStateException">The state is too short.</exception>
    public long ReadInt64() => unchecked((long)ReadUInt64());

    /// <summary>Reads bytes as they are.</summary>
    /// <param name="count">How many.</param>
    /// <exception cref="MachineStateException">The state is too short.</exception>
    public ReadOnlySpan<byte> ReadBytes(int count)
    {
        if (count < 0 || count > _rest.Length)
        {
            throw new MachineStateException("The saved state is damaged: it ends too early.");
        }
        var bytes = _rest.Span[..count];
        _rest = _rest[count..];
        return bytes;
    }

    /// <summary>Reads what <see cref="StateWriter.WriteName"/> wrote.</summary>
    internal string ReadName() => System.Text.Encoding.ASCII.GetString(ReadBytes(ReadByte()));

    /// <summary>Checks that nothing is left.</summary>
    /// <exception cref="MachineStateException">Something is.</exception>
    public void End()
    {
        if (!_rest.IsEmpty)
        {
            throw new MachineStateException("The saved state is damaged: it is longer than expected.");
        }
    }
}
