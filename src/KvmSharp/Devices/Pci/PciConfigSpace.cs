using System.Buffers.Binary;
using static KvmSharp.Devices.Pci.PciRegisters;

namespace KvmSharp.Devices.Pci;

/// <summary>
/// The configuration registers of a PCI function: for each byte a value, the bits that a guest may change, and those that
/// it clears by writing ones. Accesses of guests come one at a time.
/// </summary>
public sealed class PciConfigSpace
{
    private readonly byte[] _values = new byte[ConfigSize];
    private readonly byte[] _writable = new byte[ConfigSize];
    private readonly byte[] _clearable = new byte[ConfigSize];
    private int _nextCapability = FirstCapability;
    private int _lastCapability;

    internal PciConfigSpace()
    {
    }

    /// <summary>The value of two bytes as a guest reads them.</summary>
    /// <param name="offset">The offset, 0 to 4094.</param>
    public ushort GetUInt16(int offset) => BinaryPrimitives.ReadUInt16LittleEndian(_values.AsSpan(offset));

    /// <summary>The value of four bytes as a guest reads them.</summary>
    /// <param name="offset">The offset, 0 to 4092.</param>
    public uint GetUInt32(int offset) => BinaryPrimitives.ReadUInt32LittleEndian(_values.AsSpan(offset));

    /// <summary>The value of a byte as a guest reads it.</summary>
    /// <param name="offset">The offset, 0 to 4095.</param>
    public byte GetByte(int offset) => _values[offset];

    /// <summary>Sets a byte, and which of its bits a guest may change.</summary>
    /// <param name="offset">The offset, 0 to 4095.</param>
    /// <param name="value">The value.</param>
    /// <param name="writable">The bits that a guest may change.</param>
    public void DefineByte(int offset, byte value, byte writable = 0)
    {
        _values[offset] = value;
        _writable[offset] = writable;
    }

    /// <summary>Sets two bytes, and which of their bits a guest may change.</summary>
    /// <param name="offset">The offset, 0 to 4094.</param>
    /// <param name="value">The value.</param>
    /// <param name="writable">The bits that a guest may change.</param>
    public void DefineUInt16(int offset, ushort value, ushort writable = 0)
    {
        BinaryPrimitives.WriteUInt16LittleEndian(_values.AsSpan(offset), value);
        BinaryPrimitives.WriteUInt16LittleEndian(_writable.AsSpan(offset), writable);
    }

    /// <summary>Sets four bytes, and which of their bits a guest may change.</summary>
    /// <param name="offset">The offset, 0 to 4092.</param>
    /// <param name="value">The value.</param>
    /// <param name="writable">The bits that a guest may change.</param>
    public void DefineUInt32(int offset, uint value, uint writable = 0)
    {
        BinaryPrimitives.WriteUInt32LittleEndian(_values.AsSpan(offset), value);
        BinaryPrimitives.WriteUInt32LittleEndian(_writable.AsSpan(offset), writable);
    }

    /// <summary>Sets four bytes to a value and leaves alone what a guest may change of them.</summary>
    /// <param name="offset">The offset, 0 to 4092.</param>
    /// <param name="value">The value.</param>
    public void SetUInt32(int offset, uint value) => BinaryPrimitives.WriteUInt32LittleEndian(_values.AsSpan(offset), value);

    /// <summary>Sets two bytes to a value and leaves alone what a guest may change of them.</summary>
    /// <param name="offset">The offset, 0 to 4094.</param>
    /// <param name="value">The value.</param>
    public void SetUInt16(int offset, ushort value) => BinaryPrimitives.WriteUInt16LittleEndian(_values.AsSpan(offset), value);

    /// <summary>Adds a capability to the end of the list; its bytes behind the first two are 0 and read-only until defined.</summary>
    /// <param name="id">The capability's identifier.</param>
    /// <param name="length">Its length in bytes with the two bytes of its header.</param>
    /// <returns>Its offset.</returns>
    /// <exception cref="KvmSharpException">There is no room left in the 256 bytes.</exception>
    public int AddCapability(byte id, int length)
    {
        ArgumentOutOfRangeException.ThrowIfLessThan(length, 2);
        var offset = _nextCapability;
        if (offset + length > LegacyConfigSize)
        {
            throw new KvmSharpException(KvmSharpErrorCode.InvalidArgument, "The capabilities of a PCI function do not fit into its configuration space.");
        }
        _nextCapability = (offset + length + 3) & ~3; // "Capabilities List": at multiples of four
        _values[offset] = id;
        _values[_lastCapability == 0 ? CapabilitiesPointer : _lastCapability + 1] = (byte)offset;
        _lastCapability = offset;
        SetUInt16(Status, (ushort)(GetUInt16(Status) | (ushort)StatusBits.CapabilitiesList));
        return offset;
    }

    internal void DefineClearable(int offset, ushort bits) => BinaryPrimitives.WriteUInt16LittleEndian(_clearable.AsSpan(offset), bits);

    internal void Read(int offset, Span<byte> data) => _values.AsSpan(offset, data.Length).CopyTo(data);

    internal void Write(int offset, ReadOnlySpan<byte> data)
    {
        for (var i = 0; i < data.Length; i++)
        {
            var at = offset + i;
            _values[at] = (byte)((_values[at] & ~_writable[at] & ~(_clearable[at] & data[i])) | (data[i] & _writable[at]));
        }
    }

    internal void Save(StateWriter writer) => writer.WriteBytes(_values.AsSpan(0, LegacyConfigSize));

    // Only what a guest can have changed is taken over.
    internal void Load(StateReader reader)
    {
        var saved = reader.ReadBytes(LegacyConfigSize);
        if (!saved[..Command].SequenceEqual(_values.AsSpan(0, Command)))
        {
            throw new MachineStateException("The saved state is of a machine with another PCI device.");
        }
        for (var i = 0; i < saved.Length; i++)
        {
            var mutable = _writable[i] | _clearable[i];
            _values[i] = (byte)((_values[i] & ~mutable) | (saved[i] & mutable));
        }
    }
}
