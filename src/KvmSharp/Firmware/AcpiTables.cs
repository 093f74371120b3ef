using System.Buffers.Binary;
using System.Text;
using KvmSharp.Devices;
using KvmSharp.Devices.Pci;
using KvmSharp.Devices.Virtio;

namespace KvmSharp.Firmware;

/// <summary>What the ACPI tables announce.</summary>
internal sealed record AcpiTableOptions
{
    public int VcpuCount { get; init; } = 1;

    public ushort PmBase { get; init; } = AcpiTables.DefaultPmBase;

    /// <summary>Serial ports: base port and IRQ.</summary>
    public IReadOnlyList<(ushort Port, int Irq)> SerialPorts { get; init; } = [];

    public bool RealTimeClock { get; init; } = true;

    /// <summary>Whether there is a controller of keyboard and mouse.</summary>
    public bool Keyboard { get; init; }

    /// <summary>Whether there is a <see cref="PvPanic"/>.</summary>
    public bool PanicDevice { get; init; }

    /// <summary>Whether there is a PCI bus as <see cref="PciHost"/> has it.</summary>
    public bool Pci { get; init; }

    /// <summary>Where the configuration space of PCI functions is in memory.</summary>
    public uint EcamAddress { get; init; } = (uint)PciHost.DefaultEcamAddress;

    /// <summary>The first and the last address that PCI functions may be given below 4 GiB.</summary>
    public (uint First, uint Last) PciWindow { get; init; } = ((uint)PciHost.MemoryWindowStart, (uint)PciHost.MemoryWindowEnd - 1);

    /// <summary>Whether there is a VGA.</summary>
    public bool Vga { get; init; }

    /// <summary>Virtio devices without a bus: address of the registers and GSI.</summary>
    public IReadOnlyList<(uint Address, int Gsi)> VirtioMmio { get; init; } = [];
}

/// <summary>
/// Builds the ACPI tables of a PC: RSDP, RSDT and XSDT, FADT, FACS, MADT, MCFG, DSDT. Specification: ACPI 6.5, "ACPI System
/// Description Tables".
/// </summary>
internal static class AcpiTables
{
    /// <summary>Where the tables lie: in the area that operating systems search for the RSDP.</summary>
    public const ulong DefaultAddress = 0xe0000;

    public const ushort DefaultPmBase = 0x600;
    public const byte SciInterrupt = 9;
    public const uint LocalApicAddress = 0xfee0_0000;
    public const uint IoApicAddress = 0xfec0_0000;

    /// <summary>Where the FACS is, behind the RSDP.</summary>
    public const int FacsOffset = 64;

    /// <summary>Where in the FACS the guest says where it goes on after a sleep: an address below 1 MiB, four bytes.</summary>
    public const int FacsWakingVector = 12;

    private const int HeaderLength = 36;
    private const byte SystemIo = 1;
    private const byte ByteAccess = 1;
    private const byte WordAccess = 2;
    private const byte DoubleWordAccess = 3;

    /// <summary>Builds all tables as one piece that starts with the RSDP.</summary>
    /// <param name="address">The guest-physical address where the piece will lie, a multiple of 64 below 4 GiB.</param>
    /// <param name="options">What to announce.</param>
    public static byte[] Build(ulong address, AcpiTableOptions options)
    {
        var image = new MemoryStream();
        uint Place(byte[] table, int alignment)
        {
            while (image.Length % alignment != 0)
            {
                image.WriteByte(0);
            }
            var at = (uint)(address + (ulong)image.Length);
            image.Write(table);
            return at;
        }

        image.Write(new byte[36]); // the RSDP comes last, when the addresses are known
        var facs = Place(BuildFacs(), 64);
        var dsdt = Place(BuildDsdt(options), 16);
        var fadt = Place(BuildFadt(options, facs, dsdt), 16);
        var madt = Place(BuildMadt(options), 16);
        uint[] tables = options.Pci ? [fadt, madt, Place(BuildMcfg(options), 16)] : [fadt, madt];
        var rsdt = Place(BuildRootTable("RSDT", 4, tables), 16);
        var xsdt = Place(BuildRootTable("XSDT", 8, tables), 16);
        var bytes = image.ToArray();
        BuildRsdp(rsdt, xsdt).CopyTo(bytes, 0);
        return bytes;
    }

    // "Root System Description Pointer (RSDP)"
    private static byte[] BuildRsdp(uint rsdt, uint xsdt)
    {
        var rsdp = new byte[36];
        Encoding.ASCII.GetBytes("RSD PTR ").CopyTo(rsdp, 0);
        Encoding.ASCII.GetBytes("KVMSHP").CopyTo(rsdp, 9);
        rsdp[15] = 2;
        BinaryPrimitives.WriteUInt32LittleEndian(rsdp.AsSpan(16), rsdt);
        BinaryPrimitives.WriteUInt32LittleEndian(rsdp.AsSpan(20), (uint)rsdp.Length);
        BinaryPrimitives.WriteUInt64LittleEndian(rsdp.AsSpan(24), xsdt);
        rsdp[8] = Checksum(rsdp.AsSpan(0, 20));
        rsdp[32] = Checksum(rsdp);
        return rsdp;
    }

    private static byte[] BuildRootTable(string signature, int entrySize, params uint[] tables)
    {
        var body = new byte[tables.Length * entrySize];
        for (var i = 0; i < tables.Length; i++)
        {
            BinaryPrimitives.WriteUInt32LittleEndian(body.AsSpan(i * entrySize), tables[i]);
        }
        return BuildTable(signature, 1, body);
    }

    // "Firmware ACPI Control Structure (FACS)"; it has no checksum.
    private static byte[] BuildFacs()
    {
        var facs = new byte[64];
        Encoding.ASCII.GetBytes("FACS").CopyTo(facs, 0);
        BinaryPrimitives.WriteUInt32LittleEndian(facs.AsSpan(4), (uint)facs.Length);
        facs[32] = 2;
        return facs;
    }

    // "Fixed ACPI Description Table (FADT)"; offsets count from the start of the table.
    private static byte[] BuildFadt(AcpiTableOptions options, uint facs, uint dsdt)
    {
        const byte Revision = 6;
        const byte MinorRevision = 5;
        const ushort LegacyDevices = 1 << 0;
        const ushort KeyboardController = 1 << 1;
        const ushort VgaNotPresent = 1 << 2;
        const ushort RtcNotPresent = 1 << 5;
        const uint WriteBackInvalidate = 1 << 0;
        const uint ProcessorC1 = 1 << 2;
        const uint NoFixedSleepButton = 1 << 5;
        const uint NoFixedRtcAlarm = 1 << 6;
        const uint Timer32Bit = 1 << 8;
        const uint ResetRegister = 1 << 10;

        var fadt = new byte[276];
        var span = fadt.AsSpan();
        void U16(int offset, ushort value) => BinaryPrimitives.WriteUInt16LittleEndian(fadt.AsSpan(offset), value);
        void U32(int offset, uint value) => BinaryPrimitives.WriteUInt32LittleEndian(fadt.AsSpan(offset), value);
        U32(36, facs);
        U32(40, dsdt);
        U16(46, SciInterrupt);
        // SMI_CMD, ACPI_ENABLE and ACPI_DISABLE stay 0: the machine is always in ACPI mode.
        U32(56, options.PmBase + (uint)AcpiPm.EventOffset);
        U32(64, options.PmBase + (uint)AcpiPm.ControlOffset);
        U32(76, options.PmBase + (uint)AcpiPm.TimerOffset);
        fadt[88] = 4; // PM1_EVT_LEN
        fadt[89] = 2; // PM1_CNT_LEN
        fadt[91] = 4; // PM_TMR_LEN
        U16(96, 0xfff); // C2 and C3 latencies beyond the limits: not supported
        U16(98, 0xffff);
        fadt[108] = options.RealTimeClock ? (byte)0x32 : (byte)0; // the century's CMOS register
        U16(109, (ushort)(LegacyDevices | (options.Vga ? 0 : VgaNotPresent) | (options.RealTimeClock ? 0 : RtcNotPresent)
            | (options.Keyboard ? KeyboardController : 0)));
        U32(112, WriteBackInvalidate | ProcessorC1 | NoFixedSleepButton | Timer32Bit | ResetRegister
            | (options.RealTimeClock ? 0 : NoFixedRtcAlarm));
        GenericAddress(span[116..], 8, ByteAccess, ResetControl.ResetPort);
        fadt[128] = ResetControl.FullReset;
        fadt[131] = MinorRevision;
        BinaryPrimitives.WriteUInt64LittleEndian(span[140..], dsdt);
        GenericAddress(span[148..], 32, WordAccess, options.PmBase + (ulong)AcpiPm.EventOffset);
        GenericAddress(span[172..], 16, WordAccess, options.PmBase + (ulong)AcpiPm.ControlOffset);
        GenericAddress(span[208..], 32, DoubleWordAccess, options.PmBase + (ulong)AcpiPm.TimerOffset);
        return BuildTable("FACP", Revision, fadt[HeaderLength..]);
    }

    // "Generic Address Structure (GAS)"
    private static void GenericAddress(Span<byte> target, byte bits, byte accessSize, ulong address)
    {
        target[0] = SystemIo;
        target[1] = bits;
        target[3] = accessSize;
        BinaryPrimitives.WriteUInt64LittleEndian(target[4..], address);
    }

    // "Multiple APIC Description Table (MADT)"
    private static byte[] BuildMadt(AcpiTableOptions options)
    {
        const byte IoApicId = 0;
        const byte TimerGsi = 2;
        const ushort ActiveHighLevel = 0x0d;
        var body = new List<byte>();
        body.AddRange(BitConverter.GetBytes(LocalApicAddress));
        body.AddRange(BitConverter.GetBytes(1u)); // PCAT_COMPAT: there is a PIC pair too
        for (var i = 0; i < options.VcpuCount; i++)
        {
            body.AddRange([0, 8, (byte)i, (byte)i, 1, 0, 0, 0]); // Processor Local APIC, enabled
        }
        body.AddRange([1, 12, IoApicId, 0, .. BitConverter.GetBytes(IoApicAddress), 0, 0, 0, 0]);
        body.AddRange([2, 10, 0, 0, TimerGsi, 0, 0, 0, 0, 0]); // IRQ 0 is wired to input 2
        body.AddRange([2, 10, 0, SciInterrupt, SciInterrupt, 0, 0, 0, .. BitConverter.GetBytes(ActiveHighLevel)]);
        body.AddRange([4, 6, 0xff, 0, 0, 1]); // NMI at LINT1 of every local APIC
        return BuildTable("APIC", 5, [.. body]);
    }

    // "Differentiated System Description Table (DSDT)"
    private static byte[] BuildDsdt(AcpiTableOptions options)
    {
        var aml = new AmlWriter();
        aml.Scope("\\_SB", system =>
        {
            for (var i = 0; i < options.VcpuCount; i++)
            {
                var uid = (uint)i;
                system.Device($"C{i:X3}", d => d.Name("_HID", "ACPI0007").Name("_UID", uid));
            }
            for (var i = 0; i < options.SerialPorts.Count; i++)
            {
                var (port, irq) = options.SerialPorts[i];
                var uid = (uint)i + 1;
                system.Device($"COM{uid}", d => d
                    .Name("_HID", AmlWriter.EisaId("PNP0501"))
                    .Name("_UID", uid)
                    .NameResources("_CRS", AmlWriter.Ports(port, Uart16550.PortCount), AmlWriter.Irq(irq)));
            }
            if (options.PanicDevice)
            {
                system.Device("PEVT", d => d
                    .Name("_HID", "QEMU0001")
                    .NameResources("_CRS", AmlWriter.Ports((ushort)PvPanic.DefaultPort, 1)));
            }
            if (options.Keyboard)
            {
                system.Device("KBD", d => d
                    .Name("_HID", AmlWriter.EisaId("PNP0303"))
                    .NameResources("_CRS", AmlWriter.Ports(0x60, 1), AmlWriter.Ports(0x64, 1), AmlWriter.Irq(1)));
                system.Device("MOU", d => d
                    .Name("_HID", AmlWriter.EisaId("PNP0F13"))
                    .NameResources("_CRS", AmlWriter.Irq(12)));
            }
            if (options.Pci)
            {
                DescribePci(system, options);
            }
            for (var i = 0; i < options.VirtioMmio.Count; i++)
            {
                var (address, gsi) = options.VirtioMmio[i];
                var uid = (uint)i;
                system.Device($"VM{i:X2}", d => d
                    .Name("_HID", "LNRO0005")
                    .Name("_UID", uid)
                    .NameResources("_CRS", AmlWriter.Memory(address, (uint)VirtioMmioTransport.Length), AmlWriter.Gsi(gsi)));
            }
            if (options.RealTimeClock)
            {
                system.Device("RTC", d => d
                    .Name("_HID", AmlWriter.EisaId("PNP0B00"))
                    .NameResources("_CRS", AmlWriter.Ports(0x70, CmosRtc.PortCount), AmlWriter.Irq(8)));
            }
        });
        aml.NamePackage("\\_S3", AcpiPm.SleepTypeS3, AcpiPm.SleepTypeS3, 0, 0);
        aml.NamePackage("\\_S5", AcpiPm.SleepTypeS5, AcpiPm.SleepTypeS5, 0, 0);
        return BuildTable("DSDT", 2, aml.ToArray());
    }

    // PCI Firmware Specification 3.3, "MCFG Table Description": one segment, all buses.
    private static byte[] BuildMcfg(AcpiTableOptions options) =>
        BuildTable("MCFG", 1, [.. new byte[8], .. BitConverter.GetBytes((ulong)options.EcamAddress), 0, 0, 0, 0xff, 0, 0, 0, 0]);

    // ACPI 6.5, "_PRT (PCI Routing Table)": device, pin, no link device, GSI. Without functions beyond the root bus only
    // its windows matter.
    private static void DescribePci(AmlWriter system, AcpiTableOptions options)
    {
        var routes = new List<uint[]>();
        for (var device = 0; device < 32; device++)
        {
            for (var pin = 0; pin < 4; pin++)
            {
                routes.Add([(uint)device << 16 | 0xffff, (uint)pin, 0, (uint)(PciHost.FirstInterrupt + PciHost.WireOf(device, pin))]);
            }
        }
        system.Device("PCI0", d => d
            .Name("_HID", AmlWriter.EisaId("PNP0A08"))
            .Name("_CID", AmlWriter.EisaId("PNP0A03"))
            .Name("_UID", 0u)
            .Name("_SEG", 0u)
            .Name("_BBN", 0u)
            .NameResources("_CRS",
                AmlWriter.BusWindow(0, 0xff),
                AmlWriter.Ports((ushort)PciHost.BasePort, PciHost.PortCount),
                AmlWriter.PortWindow(0, (ushort)(PciHost.BasePort - 1)),
                AmlWriter.PortWindow((ushort)(PciHost.BasePort + PciHost.PortCount), 0xffff),
                AmlWriter.MemoryWindow(options.PciWindow.First, options.PciWindow.Last),
                AmlWriter.HighMemoryWindow(PciHost.HighWindowStart, PciHost.HighWindowEnd - 1))
            .NamePackages("_PRT", routes));
        // "PCI Express Enhanced Configuration": the range belongs to the motherboard.
        system.Device("MBRD", d => d
            .Name("_HID", AmlWriter.EisaId("PNP0C02"))
            .NameResources("_CRS", AmlWriter.Memory(options.EcamAddress, 256U << 20)));
    }

    // "System Description Table Header"
    private static byte[] BuildTable(string signature, byte revision, byte[] body)
    {
        var table = new byte[HeaderLength + body.Length];
        Encoding.ASCII.GetBytes(signature).CopyTo(table, 0);
        BinaryPrimitives.WriteUInt32LittleEndian(table.AsSpan(4), (uint)table.Length);
        table[8] = revision;
        Encoding.ASCII.GetBytes("KVMSHPKVMSHARP").CopyTo(table, 10);
        BinaryPrimitives.WriteUInt32LittleEndian(table.AsSpan(24), 1);
        Encoding.ASCII.GetBytes("KVMS").CopyTo(table, 28);
        BinaryPrimitives.WriteUInt32LittleEndian(table.AsSpan(32), 1);
        body.CopyTo(table, HeaderLength);
        table[9] = Checksum(table);
        return table;
    }

    // What makes the bytes, with a checksum of 0 among them, add up to 0.
    private static byte Checksum(ReadOnlySpan<byte> bytes)
    {
        byte sum = 0;
        foreach (var b in bytes)
        {
            sum += b;
        }
        return (byte)-sum;
    }
}
