namespace KvmSharp.Devices;

// Intel 3 Series Express Chipset Family, "SMRAM - System Management RAM Control" and "ESMRAMC - Extended System Management RAM
// Control": offsets in the host bridge's configuration space.

internal static class SystemManagementRamRegisters
{
    public const ulong Address = 0xa_0000;
    public const ulong Length = 0x2_0000;

    public const int Control = 0x9d;
    public const int ExtendedControl = 0x9e;

    public const byte ExtendedReset = 0x38; // caching is on, which cannot be changed; no TSEG

    [Flags]
    public enum ControlBits : byte
    {
        Location = 2, // the compatible place, the only one
        Enable = 1 << 3,
        Lock = 1 << 4,
        Close = 1 << 5,
        Open = 1 << 6,
        Writable = Enable | Lock | Close | Open,
    }
}
