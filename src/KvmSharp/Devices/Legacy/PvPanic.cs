namespace KvmSharp.Devices;

/// <summary>What a guest tells through <see cref="PvPanic"/>.</summary>
[Flags]
public enum PanicEvents
{
    /// <summary>Nothing.</summary>
    None = 0,
    /// <summary>The kernel has panicked.</summary>
    Panicked = 1 << 0,
    /// <summary>The kernel has panicked and starts a crash kernel.</summary>
    CrashLoaded = 1 << 1,
}

/// <summary>
/// A port at which a guest's kernel tells that it has panicked. Reading tells which events the device takes. Specification: QEMU's
/// "PVPANIC DEVICE".
/// </summary>
/// <param name="report">What to do about it; called on a vCPU thread.</param>
public sealed class PvPanic(Action<PanicEvents> report) : IIoDevice
{
    /// <summary>The usual port.</summary>
    public const ulong DefaultPort = 0x505;

    private const PanicEvents Supported = PanicEvents.Panicked | PanicEvents.CrashLoaded;

    private readonly Action<PanicEvents> _report = report ?? throw new ArgumentNullException(nameof(report));

    /// <inheritdoc/>
    public int MaxAccessSize => 1;

    /// <inheritdoc/>
    public void Read(ulong offset, Span<byte> data) => data[0] = (byte)Supported;

    /// <inheritdoc/>
    public void Write(ulong offset, ReadOnlySpan<byte> data)
    {
        if (((PanicEvents)data[0] & Supported) is not PanicEvents.None and var events)
        {
            _report(events);
        }
    }
}
