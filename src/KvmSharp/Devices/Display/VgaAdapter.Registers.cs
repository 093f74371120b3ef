namespace KvmSharp.Devices;

// IBM Video Subsystem Technical Reference (VGA): "General Registers", "Sequencer", "CRT Controller", "Graphics Controller",
// "Attribute Controller", "Video Digital-to-Analog Converter". The extension is that of Bochs, "VBE DISPI interface".

/// <content>The register map.</content>
public sealed partial class VgaAdapter
{
    private const ulong PortBase = 0x3b0;
    private const int PortCount = 0x30; // to 0x3df

    // Offsets from 0x3B0. The CRT controller and status 1 are at 0x3B4 or at 0x3D4, as MiscellaneousOutput says.
    private const int MonochromeIndex = 0x04;
    private const int MonochromeData = 0x05;
    private const int MonochromeStatus1 = 0x0a;
    private const int AttributeIndex = 0x10; // and data, by turns
    private const int AttributeData = 0x11;
    private const int MiscellaneousWrite = 0x12; // reads as input status 0
    private const int SequencerIndex = 0x14;
    private const int SequencerData = 0x15;
    private const int DacMask = 0x16;
    private const int DacReadIndex = 0x17; // reads as the state
    private const int DacWriteIndex = 0x18;
    private const int DacData = 0x19;
    private const int FeatureRead = 0x1a;
    private const int MiscellaneousRead = 0x1c;
    private const int GraphicsIndex = 0x1e;
    private const int GraphicsData = 0x1f;
    private const int ColorIndex = 0x24;
    private const int ColorData = 0x25;
    private const int ColorStatus1 = 0x2a;

    private const byte MiscellaneousColor = 1 << 0; // in MiscellaneousOutput: ports at 0x3Dx
    private const byte SwitchSense = 1 << 4; // input status 0: a colour monitor
    private const byte DisplayInactive = 1 << 0; // input status 1
    private const byte VerticalRetrace = 1 << 3;

    private const int SequencerCount = 5;
    private const int ClockingMode = 1;
    private const int MapMask = 2;
    private const int CharacterMapSelect = 3;
    private const int MemoryMode = 4;
    private const byte EightDots = 1 << 0; // in ClockingMode
    private const byte ScreenOff = 1 << 5;
    private const byte Chain4 = 1 << 3; // in MemoryMode

    private const int GraphicsCount = 9;
    private const int SetReset = 0;
    private const int EnableSetReset = 1;
    private const int ColorCompare = 2;
    private const int DataRotate = 3;
    private const int ReadMapSelect = 4;
    private const int GraphicsMode = 5;
    private const int Miscellaneous = 6;
    private const int ColorDontCare = 7;
    private const int BitMask = 8;
    private const byte OddEven = 1 << 4; // in GraphicsMode
    private const byte ReadCompare = 1 << 3;
    private const byte ShiftInterleave = 1 << 5;
    private const byte Shift256 = 1 << 6;
    private const byte IsGraphics = 1 << 0; // in Miscellaneous

    private const int CrtcCount = 0x19;
    private const int HorizontalDisplayEnd = 0x01;
    private const int Overflow = 0x07;
    private const int MaximumScanLine = 0x09;
    private const int CursorStart = 0x0a;
    private const int CursorEnd = 0x0b;
    private const int StartAddressHigh = 0x0c;
    private const int StartAddressLow = 0x0d;
    private const int CursorHigh = 0x0e;
    private const int CursorLow = 0x0f;
    private const int VerticalRetraceEnd = 0x11;
    private const int VerticalDisplayEnd = 0x12;
    private const int OffsetRegister = 0x13;
    private const int Underline = 0x14;
    private const int ModeControl = 0x17;
    private const int LineCompare = 0x18;
    private const byte Protect = 1 << 7; // in VerticalRetraceEnd: registers 0 to 7 cannot be written
    private const byte DoubleScan = 1 << 7; // in MaximumScanLine
    private const byte CursorOff = 1 << 5; // in CursorStart
    private const byte DoubleWordMode = 1 << 6; // in Underline
    private const byte ByteMode = 1 << 6; // in ModeControl

    private const int AttributeCount = 0x15;
    private const int AttributeMode = 0x10;
    private const int PlaneEnable = 0x12;
    private const int PixelPanning = 0x13;
    private const int ColorSelect = 0x14;
    private const byte AttributeGraphics = 1 << 0; // in AttributeMode
    private const byte LineGraphics = 1 << 2;
    private const byte Blink = 1 << 3;
    private const byte PaletteBits45 = 1 << 7;
    private const byte PaletteSource = 1 << 5; // in the index: the screen shows something

    // The window below 1 MiB, and which part of it Miscellaneous selects.
    private const ulong WindowBase = 0xa_0000;
    private const int WindowLength = 0x2_0000;

    // Bochs VBE
    private const ulong VbePort = 0x1ce; // index; data at 0x1CF or 0x1D0
    private const int VbePortCount = 4;
    private const int VbeCount = 11;
    private const int VbeId = 0;
    private const int VbeWidth = 1;
    private const int VbeHeight = 2;
    private const int VbeDepth = 3;
    private const int VbeEnable = 4;
    private const int VbeBank = 5;
    private const int VbeVirtualWidth = 6;
    private const int VbeVirtualHeight = 7;
    private const int VbeOffsetX = 8;
    private const int VbeOffsetY = 9;
    private const int VbeMemory = 10;
    private const ushort VbeOldestId = 0xb0c0;
    private const ushort VbeNewestId = 0xb0c5;
    private const ushort VbeEnabled = 1 << 0;
    private const ushort VbeCapabilities = 1 << 1;
    private const ushort VbeDac8 = 1 << 5;
    private const ushort VbeKeepMemory = 1 << 7;
    private const int VbeMaxWidth = 2560;
    private const int VbeMaxHeight = 1600;
    private const int VbeMaxDepth = 32;

    // The second memory range of the PCI function.
    private const int RegisterRange = 0x1000;
    private const int RangePorts = 0x400; // 0x3C0 to 0x3DF
    private const int RangeVbe = 0x500; // two bytes each
}
