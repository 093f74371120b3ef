namespace KvmSharp.Devices.Pci;

// Intel I/O Controller Hub 9 (ICH9) Family, "LPC Interface Bridge Registers (D31:F0)", "Power Management I/O Registers" and
// "APM I/O Decode".

/// <content>The register map.</content>
internal sealed partial class LpcBridge
{
    // Configuration space
    private const int PmBase = 0x40;
    private const int AcpiControl = 0x44;
    private const int FirstRoute = 0x60; // PIRQA to PIRQD
    private const int SecondRoute = 0x68; // PIRQE to PIRQH
    private const int RouteCount = 4;
    private const int RootComplexBase = 0xf0;

    private const uint PmBaseMask = 0xff80;
    private const uint PmBaseIo = 1;
    private const byte AcpiEnable = 0x80;
    private const byte SciSelect = 0x07;
    private const byte RouteDisabled = 0x80;
    private const byte RouteInterrupt = 0x0f;
    private const byte RouteWritable = RouteDisabled | RouteInterrupt;
    private const ushort RoutableInterrupts = 0b1101_1110_1111_1000; // 3 to 7, 9 to 12, 14, 15
    private const int ConfigLock = 0xa0; // GEN_PMCON_1
    private const ushort SmiLock = 1 << 4;

    // From PMBASE
    private const int PmPortCount = 0x80;
    private const int GeneralEventEnables = 0x28;
    private const int SmiEnable = 0x30;
    private const int SmiStatus = 0x34;

    // SMI_EN and SMI_STS
    private const uint ApmEnable = 1 << 5;
    private const uint ApmStatus = 1 << 5;

    // Ports of the advanced power management
    private const ulong ApmPort = 0xb2;
    private const int ApmPortCount = 2;
}
