namespace KvmSharp.Devices;

/// <summary>The host's side of a serial port or console: where output goes and where input comes from.</summary>
public interface ICharacterBackend
{
    /// <summary>Raised, on any thread, when input has become available.</summary>
    event Action? InputAvailable;

    /// <summary>Takes output of the guest. Called on a vCPU thread, one call at a time; it should not block for long.</summary>
    /// <param name="data">The bytes.</param>
    void Write(ReadOnlySpan<byte> data);

    /// <summary>Hands over input for the guest, as much as there is and fits, without waiting.</summary>
    /// <param name="buffer">Where the bytes go.</param>
    /// <returns>How many bytes there were; 0 for none at the moment.</returns>
    int Read(Span<byte> buffer);
}
