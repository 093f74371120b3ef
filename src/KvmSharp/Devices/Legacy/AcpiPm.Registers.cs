namespace KvmSharp.Devices;

// ACPI Specification 6.5, section "ACPI Hardware Specification": "PM1 Event Registers", "PM1 Control Registers",
// "Power Management Timer (PM_TMR)".

/// <content>The register map.</content>
public sealed partial class AcpiPm
{
    /// <summary>Offset of the PM1 status and enable registers, two bytes each.</summary>
    public const int EventOffset = 0;

    /// <summary>Offset of the PM1 control register, two bytes.</summary>
    public const int ControlOffset = 4;

    /// <summary>Offset of the power management timer, four bytes.</summary>
    public const int TimerOffset = 8;

    /// <summary>The rate of the power management timer in Hz.</summary>
    public const ulong TimerFrequency = 3_579_545;

    /// <summary>The SLP_TYP value of the S3 state (suspend to RAM) in the DSDT's \_S3 package.</summary>
    public const byte SleepTypeS3 = 1;

    /// <summary>The SLP_TYP value of the S5 state (soft off) in the DSDT's \_S5 package.</summary>
    public const byte SleepTypeS5 = 5;

    private const int EnableOffset = 2;

    [Flags]
    private enum Event : ushort
    {
        None = 0,
        Timer = 1 << 0, // the highest bit of the timer has changed
        GlobalLock = 1 << 5,
        PowerButton = 1 << 8,
        SleepButton = 1 << 9,
        RealTimeClock = 1 << 10,
        Wake = 1 << 15, // the machine has slept
        Enables = Timer | GlobalLock | PowerButton | SleepButton | RealTimeClock,
        Statuses = Enables | Wake,
        WakeSources = PowerButton | RealTimeClock,
    }

    [Flags]
    private enum Control : ushort
    {
        None = 0,
        SciEnable = 1 << 0,
        BusMasterReload = 1 << 1,
        SleepEnable = 1 << 13, // write-only
        SleepTypeMask = 7 << SleepTypeShift,
        Writable = BusMasterReload | SleepTypeMask,
    }

    private const int SleepTypeShift = 10;
}
