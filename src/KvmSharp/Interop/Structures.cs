using System.Runtime.CompilerServices;
using System.Runtime.InteropServices;

namespace KvmSharp.Interop;

// The structures of native/include/kvmsharp.h that have no public counterpart, in the order of that file.
// A test compares every offset with the native library's.

internal enum ExitReason : uint
{
    Unknown = 0,
    Io = 2,
    Hypercall = 3,
    Debug = 4,
    Hlt = 5,
    Mmio = 6,
    IrqWindowOpen = 7,
    Shutdown = 8,
    FailEntry = 9,
    Intr = 10,
    InternalError = 17,
    SystemEvent = 24,
    IoapicEoi = 26,
    HostTimer = 0x1000,
    InsnLimit = 0x1001,
}

[StructLayout(LayoutKind.Sequential)]
internal struct KvsDebugExitArch
{
    public uint Exception, Pad;
    public ulong Pc, Dr6, Dr7;
}

[StructLayout(LayoutKind.Sequential)]
internal struct KvsRunIo
{
    public byte Direction, Size;
    public ushort Port;
    public uint Count;
    public ulong DataOffset;
}

[StructLayout(LayoutKind.Sequential)]
internal unsafe struct KvsRunMmio
{
    public ulong PhysAddr;
    public fixed byte Data[8];
    public uint Len;
    public byte IsWrite;
    public fixed byte Pad[3];
}

[StructLayout(LayoutKind.Sequential)]
internal unsafe struct KvsRunInternal
{
    public uint Suberror, Ndata;
    public fixed ulong Data[16];
}

[StructLayout(LayoutKind.Sequential)]
internal unsafe struct KvsRunSystemEvent
{
    public uint Type, Ndata;
    public fixed ulong Data[16];
}

[StructLayout(LayoutKind.Explicit)]
internal unsafe struct KvsRun
{
    [FieldOffset(0)] public byte RequestInterruptWindow;
    [FieldOffset(1)] public byte ImmediateExit;
    [FieldOffset(8)] public ExitReason ExitReason;
    [FieldOffset(12)] public byte ReadyForInterruptInjection;
    [FieldOffset(13)] public byte IfFlag;
    [FieldOffset(14)] public ushort Flags;
    [FieldOffset(16)] public ulong Cr8;
    [FieldOffset(24)] public ulong ApicBase;
    [FieldOffset(32)] public KvsRunIo Io;
    [FieldOffset(32)] public KvsRunMmio Mmio;
    [FieldOffset(32)] public KvsDebugExitArch Debug;
    [FieldOffset(32)] public KvsRunInternal Internal;
    [FieldOffset(32)] public KvsRunSystemEvent SystemEvent;
    [FieldOffset(32)] public fixed byte Padding[256];
    [FieldOffset(288)] public ulong KvmValidRegs;
    [FieldOffset(296)] public ulong KvmDirtyRegs;
    [FieldOffset(304)] public fixed byte SyncRegs[2048];
    [FieldOffset(2352)] public fixed byte IoData[64];
}

[StructLayout(LayoutKind.Sequential)]
internal unsafe struct KvsXsave
{
    public fixed uint Region[1024];
}

[StructLayout(LayoutKind.Sequential)]
internal struct KvsXcr
{
    public uint Xcr, Reserved;
    public ulong Value;
}

[InlineArray(16)]
internal struct KvsXcrArray
{
    private KvsXcr _element0;
}

[StructLayout(LayoutKind.Sequential)]
internal unsafe struct KvsXcrs
{
    public uint NrXcrs, Flags;
    public KvsXcrArray Xcrs;
    public fixed ulong Padding[16];
}

[StructLayout(LayoutKind.Sequential)]
internal struct KvsMsrEntry
{
    public uint Index, Reserved;
    public ulong Data;
}

[StructLayout(LayoutKind.Sequential)]
internal unsafe struct KvsDebugregs
{
    public fixed ulong Db[4];
    public ulong Dr6, Dr7, Flags;
    public fixed ulong Reserved[9];
}

[StructLayout(LayoutKind.Sequential)]
internal unsafe struct KvsGuestDebug
{
    public uint Control, Pad;
    public fixed ulong Debugreg[8];
}

[StructLayout(LayoutKind.Sequential)]
internal struct KvsMpState
{
    public const uint Runnable = 0;
    public const uint Uninitialized = 1;

    public uint MpState;
}

[StructLayout(LayoutKind.Sequential)]
internal unsafe struct KvsX86Mce
{
    public ulong Status, Addr, Misc, McgStatus;
    public byte Bank;
    public fixed byte Pad1[7];
    public fixed ulong Pad2[3];
}

[StructLayout(LayoutKind.Sequential)]
internal unsafe struct KvsVcpuEvents
{
    public byte ExceptionInjected, ExceptionNr, ExceptionHasErrorCode, ExceptionPending;
    public uint ExceptionErrorCode;
    public byte InterruptInjected, InterruptNr, InterruptSoft, InterruptShadow;
    public byte NmiInjected, NmiPending, NmiMasked, NmiPad;
    public uint SipiVector, Flags;
    public byte SmiSmm, SmiPending, SmiInsideNmi, SmiLatchedInit;
    public byte TripleFaultPending;
    public fixed byte Reserved[26];
    public byte ExceptionHasPayload;
    public ulong ExceptionPayload;
}

[StructLayout(LayoutKind.Sequential)]
internal unsafe struct KvsLapicState
{
    public fixed byte Regs[1024];
}

[StructLayout(LayoutKind.Sequential)]
internal unsafe struct KvsTranslation
{
    public ulong LinearAddress, PhysicalAddress;
    public byte Valid, Writeable, Usermode;
    public fixed byte Pad[5];
}

[StructLayout(LayoutKind.Sequential)]
internal unsafe struct KvsCoreState
{
    public ulong Retired, Flags;
    public ulong MonitorLine, MonitorDigest, MwaitDeadline, MwaitRip;
    public ulong IoTrapInfo, IoTrapRip, IoTrapRcx, IoTrapRsi, IoTrapRdi, Turn;
    public fixed ulong Reserved[4];
}

[StructLayout(LayoutKind.Sequential)]
internal struct KvsPicState
{
    public byte LastIrr, Irr, Imr, Isr, PriorityAdd, IrqBase, ReadRegSelect, Poll, SpecialMask, InitState, AutoEoi,
        RotateOnAutoEoi, SpecialFullyNestedMode, Init4, Elcr, ElcrMask;
}

[StructLayout(LayoutKind.Sequential)]
internal unsafe struct KvsIoapicState
{
    public const int Pins = 24;
    public ulong BaseAddress;
    public uint Ioregsel, Id, Irr, Pad;
    public fixed ulong Redirtbl[Pins];
}

[StructLayout(LayoutKind.Explicit)]
internal unsafe struct KvsIrqchip
{
    [FieldOffset(0)] public uint ChipId;
    [FieldOffset(4)] public uint Pad;
    [FieldOffset(8)] public fixed byte Dummy[512];
    [FieldOffset(8)] public KvsPicState Pic;
    [FieldOffset(8)] public KvsIoapicState Ioapic;
}

[StructLayout(LayoutKind.Sequential)]
internal struct KvsPitChannelState
{
    public uint Count;
    public ushort LatchedCount;
    public byte CountLatched, StatusLatched, Status, ReadState, WriteState, WriteLatch, RwMode, Mode, Bcd, Gate;
    public long CountLoadTime;
}

[InlineArray(3)]
internal struct KvsPitChannels
{
    private KvsPitChannelState _element0;
}

[StructLayout(LayoutKind.Sequential)]
internal unsafe struct KvsPitState2
{
    public KvsPitChannels Channels;
    public uint Flags;
    public fixed uint Reserved[9];
}

[StructLayout(LayoutKind.Explicit, Size = 48)]
internal struct KvsIrqRoutingEntry
{
    public const uint TypeIrqchip = 1, TypeMsi = 2;
    [FieldOffset(0)] public uint Gsi;
    [FieldOffset(4)] public uint Type;
    [FieldOffset(8)] public uint Flags;
    [FieldOffset(12)] public uint Pad;
    [FieldOffset(16)] public uint IrqchipChip;
    [FieldOffset(20)] public uint IrqchipPin;
    [FieldOffset(16)] public uint MsiAddressLo;
    [FieldOffset(20)] public uint MsiAddressHi;
    [FieldOffset(24)] public uint MsiData;
    [FieldOffset(28)] public uint MsiDevid;
}

[StructLayout(LayoutKind.Sequential)]
internal unsafe struct KvsMsi
{
    public uint AddressLo, AddressHi, Data, Flags, Devid;
    public fixed byte Pad[12];
}

[StructLayout(LayoutKind.Sequential)]
internal unsafe struct KvsClockData
{
    public ulong Clock;
    public uint Flags, Pad0;
    public ulong Realtime, HostTsc;
    public fixed uint Pad[4];
}

[StructLayout(LayoutKind.Sequential)]
internal struct KvsUserspaceMemoryRegion
{
    public const uint LogDirtyPages = 1, ReadOnly = 2;
    public uint Slot, Flags;
    public ulong GuestPhysAddr, MemorySize, UserspaceAddr;
}

[StructLayout(LayoutKind.Sequential)]
internal struct KvsVmConfig
{
    public const uint SystemManagementMode = 1;
    public uint Size, ClockMode, TscKhz, Flags, Engine, JitThreshold;
}

[StructLayout(LayoutKind.Sequential)]
internal unsafe struct KvsVcpuStats
{
    public ulong Retired, Exits, ExitsIo, ExitsMmio, Halts, Interrupts, Exceptions;
    public ulong BlocksDecoded, BlocksInvalidated, CacheFlushes, TlbFills, TlbFlushes;
    public fixed ulong Reserved[4];
}
