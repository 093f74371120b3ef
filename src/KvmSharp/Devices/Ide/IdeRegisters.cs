namespace KvmSharp.Devices.Ide;

// ATA/ATAPI-7 (INCITS 397), volume 1 "Register Delivered Command Set" and volume 2 "Parallel Transport"; Programming Interface
// for Bus Master IDE Controller 1.0; Intel 82371SB (PIIX3), "IDE Controller".

internal static class IdeRegisters
{
    // Offsets from the command block, port 0x1F0 or 0x170.
    public const int Data = 0;
    public const int ErrorFeatures = 1;
    public const int SectorCount = 2; // interrupt reason in packet commands
    public const int LbaLow = 3;
    public const int LbaMid = 4; // byte count in packet commands
    public const int LbaHigh = 5;
    public const int Device = 6;
    public const int StatusCommand = 7;
    public const int CommandBlockLength = 8;

    public const byte DeviceSecond = 1 << 4; // in Device
    public const byte DeviceLba = 1 << 6;
    public const byte DeviceAlwaysOne = 0xa0;

    // Device control, port 0x3F6 or 0x376; reads as the status without acknowledging the interrupt.
    public const byte InterruptDisable = 1 << 1;
    public const byte SoftwareReset = 1 << 2;
    public const byte HighOrderByte = 1 << 7;

    [Flags]
    public enum Status : byte
    {
        None = 0,
        Error = 1 << 0,
        DataRequest = 1 << 3,
        SeekComplete = 1 << 4,
        DeviceFault = 1 << 5,
        Ready = 1 << 6,
        Busy = 1 << 7,
    }

    [Flags]
    public enum Error : byte
    {
        None = 0,
        Aborted = 1 << 2,
        NotFound = 1 << 4,
        Uncorrectable = 1 << 6,
    }

    // Interrupt reason
    public const byte ReasonCommand = 1 << 0;
    public const byte ReasonToHost = 1 << 1;

    public const byte DiagnosticPassed = 1;

    public enum Command : byte
    {
        Nop = 0x00,
        DeviceReset = 0x08,
        Recalibrate = 0x10,
        ReadSectors = 0x20,
        ReadSectorsOnce = 0x21,
        ReadSectorsExt = 0x24,
        ReadDmaExt = 0x25,
        ReadMultipleExt = 0x29,
        WriteSectors = 0x30,
        WriteSectorsOnce = 0x31,
        WriteSectorsExt = 0x34,
        WriteDmaExt = 0x35,
        WriteMultipleExt = 0x39,
        Verify = 0x40,
        VerifyOnce = 0x41,
        VerifyExt = 0x42,
        Seek = 0x70,
        ExecuteDiagnostic = 0x90,
        InitializeParameters = 0x91,
        Packet = 0xa0,
        IdentifyPacket = 0xa1,
        ReadMultiple = 0xc4,
        WriteMultiple = 0xc5,
        SetMultiple = 0xc6,
        ReadDma = 0xc8,
        ReadDmaOnce = 0xc9,
        WriteDma = 0xca,
        WriteDmaOnce = 0xcb,
        StandbyImmediate = 0xe0,
        IdleImmediate = 0xe1,
        Standby = 0xe2,
        Idle = 0xe3,
        CheckPowerMode = 0xe5,
        Sleep = 0xe6,
        FlushCache = 0xe7,
        FlushCacheExt = 0xea,
        Identify = 0xec,
        SetFeatures = 0xef,
    }

    // Bus master registers, from the channel's half of BAR 4.
    public const int BusMasterCommand = 0;
    public const int BusMasterStatus = 2;
    public const int BusMasterTable = 4;
    public const int BusMasterChannelLength = 8;
    public const byte BusMasterStart = 1 << 0;
    public const byte BusMasterToMemory = 1 << 3;
    public const byte BusMasterActive = 1 << 0;
    public const byte BusMasterError = 1 << 1;
    public const byte BusMasterInterrupt = 1 << 2;
    public const byte BusMasterCapable = 0x60; // what firmware notes about the two drives

    // Physical region descriptor
    public const int DescriptorLength = 8;
    public const ushort DescriptorLast = 1 << 15;
}
