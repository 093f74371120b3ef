using System.Buffers.Binary;
using System.Text;

namespace KvmSharp.Firmware;

/// <summary>What the SMBIOS tables tell.</summary>
internal sealed record SmbiosOptions
{
    public int VcpuCount { get; init; } = 1;

    public ulong MemorySize { get; init; }

    public Guid Uuid { get; init; }

    /// <summary>Whether the tables describe the firmware; where there is some, it does that itself.</summary>
    public bool DescribeFirmware { get; init; } = true;
}

/// <summary>Builds the SMBIOS tables of a PC. Specification: DMTF DSP0134, System Management BIOS (SMBIOS) Reference Specification 2.8.</summary>
internal static class SmbiosTables
{
    /// <summary>Where the entry point lies without firmware: in the area that operating systems search, on a multiple of 16.</summary>
    public const ulong DefaultAddress = 0xf_0000;

    public const int EntryPointLength = 31;

    private const byte MajorVersion = 2;
    private const byte MinorVersion = 8;
    private const string Vendor = "KvmSharp";
    private const byte Unknown = 2;
    private const byte Other = 1;

    /// <summary>The structures, and how many bytes the largest one has.</summary>
    public static (byte[] Table, int Count, int Largest) Build(SmbiosOptions options)
    {
        var table = new List<byte>();
        var count = 0;
        var largest = 0;
        void Add(byte type, byte[] body, params ReadOnlySpan<string> strings)
        {
            var start = table.Count;
            var handle = (ushort)(type << 8);
            table.AddRange([type, (byte)(4 + body.Length), (byte)handle, (byte)(handle >> 8), .. body]);
            foreach (var text in strings)
            {
                table.AddRange(Encoding.ASCII.GetBytes(text));
                table.Add(0);
            }
            table.AddRange(strings.Length == 0 ? [0, 0] : [0]);
            count++;
            largest = Math.Max(largest, table.Count - start);
        }

        if (options.DescribeFirmware)
        {
            Add(0, Firmware(), Vendor, "1", "01/01/2025");
        }
        Add(1, [1, 2, 3, 0, .. options.Uuid.ToByteArray(), 6, 0, 0], Vendor, "PC", "1"); // woken by the power switch
        Add(3, Chassis(), Vendor);
        Add(4, Processor(options.VcpuCount), "CPU 0", Vendor);
        Add(16, MemoryArray(options.MemorySize));
        Add(17, MemoryDevice(options.MemorySize), "DIMM 0", Vendor);
        Add(19, MappedAddress(options.MemorySize));
        Add(32, [0, 0, 0, 0, 0, 0, 0]); // "No errors detected"
        Add(127, []);
        return ([.. table], count, largest);
    }

    /// <summary>The entry point for a table at an address. "SMBIOS 2.1 (32-bit) Entry Point".</summary>
    public static byte[] BuildEntryPoint((byte[] Table, int Count, int Largest) tables, uint address)
    {
        var entry = new byte[EntryPointLength];
        "_SM_"u8.CopyTo(entry);
        entry[5] = EntryPointLength;
        entry[6] = MajorVersion;
        entry[7] = MinorVersion;
        BinaryPrimitives.WriteUInt16LittleEndian(entry.AsSpan(8), (ushort)tables.Largest);
        "_DMI_"u8.CopyTo(entry.AsSpan(16));
        BinaryPrimitives.WriteUInt16LittleEndian(entry.AsSpan(22), (ushort)tables.Table.Length);
        BinaryPrimitives.WriteUInt32LittleEndian(entry.AsSpan(24), address);
        BinaryPrimitives.WriteUInt16LittleEndian(entry.AsSpan(28), (ushort)tables.Count);
        entry[30] = MajorVersion << 4 | MinorVersion;
        entry[21] = Checksum(entry.AsSpan(16));
        entry[4] = Checksum(entry);
        return entry;
    }

    // "BIOS Information (Type 0)"
    private static byte[] Firmware()
    {
        const byte VirtualMachine = 1 << 4; // in the second extension byte
        const byte AcpiSupported = 1 << 0;
        var body = new byte[20];
        body[0] = 1;
        body[1] = 2;
        body[4] = 3;
        body[8] = 1 << 3; // no characteristics
        body[14] = AcpiSupported;
        body[15] = VirtualMachine;
        body[16] = 1; // release 1.0
        body[18] = 0xff; // no embedded controller
        body[19] = 0xff;
        return body;
    }

    // "System Enclosure or Chassis (Type 3)": nothing is known to be wrong.
    private static byte[] Chassis()
    {
        const byte Safe = 3;
        var body = new byte[18];
        body[0] = 1;
        body[1] = Other;
        body[5] = body[6] = body[7] = Safe;
        body[8] = Unknown;
        return body;
    }

    // "Processor Information (Type 4)"
    private static byte[] Processor(int count)
    {
        const byte Central = 3;
        const byte Enabled = 0x41; // and populated
        const ushort Is64Bit = 1 << 2;
        const ushort IsMultiCore = 1 << 3;
        var body = new byte[38];
        body[0] = 1;
        body[1] = Central;
        body[2] = Other;
        body[3] = 2;
        body[20] = Enabled;
        body[21] = Other;
        BinaryPrimitives.WriteUInt16LittleEndian(body.AsSpan(22), 0xffff); // caches not told
        BinaryPrimitives.WriteUInt16LittleEndian(body.AsSpan(24), 0xffff);
        BinaryPrimitives.WriteUInt16LittleEndian(body.AsSpan(26), 0xffff);
        body[31] = body[32] = body[33] = (byte)Math.Min(count, 255);
        BinaryPrimitives.WriteUInt16LittleEndian(body.AsSpan(34), (ushort)(Is64Bit | (count > 1 ? IsMultiCore : 0)));
        body[36] = Other;
        return body;
    }

    // "Physical Memory Array (Type 16)"
    private static byte[] MemoryArray(ulong size)
    {
        const byte SystemBoard = 3;
        const byte SystemMemory = 3;
        const byte NoCorrection = 3;
        const uint UseExtended = 0x8000_0000;
        const ushort NoErrors = 0xfffe;
        var body = new byte[19];
        body[0] = SystemBoard;
        body[1] = SystemMemory;
        body[2] = NoCorrection;
        var isLarge = size >> 10 >= UseExtended;
        BinaryPrimitives.WriteUInt32LittleEndian(body.AsSpan(3), isLarge ? UseExtended : (uint)(size >> 10));
        BinaryPrimitives.WriteUInt16LittleEndian(body.AsSpan(7), NoErrors);
        body[9] = 1;
        BinaryPrimitives.WriteUInt64LittleEndian(body.AsSpan(11), isLarge ? size : 0);
        return body;
    }

    // "Memory Device (Type 17)"
    private static byte[] MemoryDevice(ulong size)
    {
        const ushort UseExtended = 0x7fff;
        const ushort NoErrors = 0xfffe;
        const byte Dimm = 9;
        const byte Ram = 7;
        const ushort OtherDetail = 1 << 1;
        var body = new byte[36];
        var megabytes = size >> 20;
        BinaryPrimitives.WriteUInt16LittleEndian(body, 16 << 8); // the array's handle
        BinaryPrimitives.WriteUInt16LittleEndian(body.AsSpan(2), NoErrors);
        BinaryPrimitives.WriteUInt16LittleEndian(body.AsSpan(4), 0xffff); // widths unknown
        BinaryPrimitives.WriteUInt16LittleEndian(body.AsSpan(6), 0xffff);
        BinaryPrimitives.WriteUInt16LittleEndian(body.AsSpan(8), megabytes < UseExtended ? (ushort)megabytes : UseExtended);
        body[10] = Dimm;
        body[12] = 1;
        body[14] = Ram;
        BinaryPrimitives.WriteUInt16LittleEndian(body.AsSpan(15), OtherDetail);
        body[19] = 2;
        BinaryPrimitives.WriteUInt32LittleEndian(body.AsSpan(24), megabytes < UseExtended ? 0 : (uint)megabytes);
        return body;
    }

    // "Memory Array Mapped Address (Type 19)"; addresses count in KiB, the hole below 4 GiB not told.
    private static byte[] MappedAddress(ulong size)
    {
        var body = new byte[27];
        var isLarge = size >> 10 > uint.MaxValue;
        BinaryPrimitives.WriteUInt32LittleEndian(body, isLarge ? uint.MaxValue : 0);
        BinaryPrimitives.WriteUInt32LittleEndian(body.AsSpan(4), isLarge ? uint.MaxValue : (uint)((size >> 10) - 1));
        BinaryPrimitives.WriteUInt16LittleEndian(body.AsSpan(8), 16 << 8);
        body[10] = 1;
        BinaryPrimitives.WriteUInt64LittleEndian(body.AsSpan(19), isLarge ? size - 1 : 0);
        return body;
    }

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
