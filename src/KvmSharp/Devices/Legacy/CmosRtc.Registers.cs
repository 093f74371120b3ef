namespace KvmSharp.Devices;

// Motorola MC146818A, "Address Map" and "Registers"; the PC's additions as in the IBM PC/AT Technical Reference,
// "Real-Time Clock/Complementary Metal Oxide Semiconductor RAM Information".

/// <content>The register map.</content>
public sealed partial class CmosRtc
{
    private const int RegisterCount = 128;

    private const byte Seconds = 0x00;
    private const byte SecondsAlarm = 0x01;
    private const byte Minutes = 0x02;
    private const byte MinutesAlarm = 0x03;
    private const byte Hours = 0x04;
    private const byte HoursAlarm = 0x05;
    private const byte DayOfWeek = 0x06; // 1 is Sunday
    private const byte DayOfMonth = 0x07;
    private const byte Month = 0x08;
    private const byte Year = 0x09;
    private const byte RegisterA = 0x0a;
    private const byte RegisterB = 0x0b;
    private const byte RegisterC = 0x0c;
    private const byte RegisterD = 0x0d;
    private const byte ShutdownStatus = 0x0f; // what firmware finds at a reset: why it came
    private const byte Equipment = 0x14;
    private const byte BaseMemory = 0x15; // KiB below 640 KiB, two bytes
    private const byte ExtendedMemory = 0x17; // KiB above 1 MiB, two bytes
    private const byte ExtendedMemoryFound = 0x30; // the same again
    private const byte Century = 0x32;
    private const byte MemoryAbove16M = 0x34; // 64 KiB units, two bytes
    private const byte BootFlags = 0x38; // as Bochs and SeaBIOS use it; the third boot device in the upper half
    private const byte BootOrder = 0x3d; // the first and the second
    private const byte NoFloppyCheck = 1 << 0;
    private const byte MemoryAbove4G = 0x5b; // 64 KiB units, three bytes

    private const byte HourPm = 0x80;
    private const byte AlarmDontCare = 0xc0;
    private const byte NmiMask = 0x80;
    private const byte ValidRam = 0x80; // register D
    private const byte UpdateInProgress = 0x80; // register A

    // "The update in progress bit is a 1 ... 244 microseconds" before the update.
    private const ulong UpdateWarning = 244_000;

    // Register A: with this divider chain the crystal has 32,768 Hz and time runs.
    private const int DividerMask = 0x70;
    private const int DividerRunning = 0x20;
    private const int DividerReset = 0x60; // 11x
    private const int RateMask = 0x0f;
    private const ulong CrystalFrequency = 32_768;

    [Flags]
    private enum Control : byte
    {
        None = 0,
        DaylightSavings = 1 << 0,
        Hours24 = 1 << 1,
        Binary = 1 << 2,
        SquareWave = 1 << 3,
        UpdateInterrupt = 1 << 4,
        AlarmInterrupt = 1 << 5,
        PeriodicInterrupt = 1 << 6,
        Set = 1 << 7,
    }

    // Register C; the flags sit where their enables sit in register B.
    [Flags]
    private enum Flag : byte
    {
        None = 0,
        Update = 1 << 4,
        Alarm = 1 << 5,
        Periodic = 1 << 6,
        InterruptRequest = 1 << 7,
    }
}
