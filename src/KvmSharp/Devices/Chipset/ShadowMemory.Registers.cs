namespace KvmSharp.Devices;

// Intel 3 Series Express Chipset Family, "PAM0 - Programmable Attribute Map 0" to "PAM6": twelve segments of 16 KiB, then
// one of 64 KiB. Each has two bits.

internal static class ShadowMemoryRegisters
{
    public const ulong Address = 0xc_0000;
    public const ulong Length = 0x4_0000;
    public const uint RomStart = 0x2_0000; // from Address: 0xE0000
    public const ulong RomLength = 0x2_0000;
    public const int SegmentCount = 13;
    public const int RegisterCount = 7;

    // Offset of PAM0 in the host bridge's configuration space, and what of PAM0 and of the others exists.
    public const int FirstRegister = 0x90;
    public const byte FirstRegisterWritable = 0x30;
    public const byte RegisterWritable = 0x33;

    private const uint SmallSegment = 0x4000;

    [Flags]
    public enum Access : byte
    {
        None = 0,
        Read = 1 << 0,
        Write = 1 << 1,
        All = Read | Write,
    }

    public static uint StartOf(int segment) => segment == SegmentCount ? (uint)Length : (uint)segment * SmallSegment;

    public static int SegmentOf(uint offset) => (int)Math.Min(offset / SmallSegment, SegmentCount - 1);
}
