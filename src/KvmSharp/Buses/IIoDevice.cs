namespace KvmSharp;

/// <summary>
/// A device that answers accesses to ports or memory-mapped registers. It knows offsets from where it is mapped,
/// not addresses. Calls come from vCPU threads, possibly several at once; a device does its own locking.
/// </summary>
public interface IIoDevice
{
    /// <summary>
    /// The widest access that the device takes, in bytes: 1, 2, 4 or 8. The bus breaks wider ones into aligned pieces
    /// of this size, lowest address first, as a PC's bridges do.
    /// </summary>
    int MaxAccessSize => 8;

    /// <summary>The guest reads.</summary>
    /// <param name="offset">Distance from the start of the mapping in bytes; offset + data.Length lies within it.</param>
    /// <param name="data">Where the value goes, little-endian; all ones on entry, which is what an open bus reads as.</param>
    void Read(ulong offset, Span<byte> data);

    /// <summary>The guest writes.</summary>
    /// <param name="offset">Distance from the start of the mapping in bytes; offset + data.Length lies within it.</param>
    /// <param name="data">The value, little-endian.</param>
    void Write(ulong offset, ReadOnlySpan<byte> data);
}
