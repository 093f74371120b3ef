using System.Buffers.Binary;
using System.Text;
using KvmSharp.Devices;

namespace KvmSharp.Firmware;

/// <summary>
/// What firmware reads through the firmware configuration device to set the machine up. Specification: QEMU's "QEMU Firmware
/// Configuration (fw_cfg) Device", and the files that SeaBIOS and OVMF look for.
/// </summary>
internal static class FirmwareFiles
{
    private const string TablesFile = "etc/acpi/tables";
    private const string RsdpFile = "etc/acpi/rsdp";
    private const int ChecksumOffset = 9;
    private const int RsdpChecksum = 8;
    private const int RsdpExtendedChecksum = 32;

    /// <summary>The ranges of RAM. Entries as in the E820 map: address, length, kind.</summary>
    public static byte[] MemoryMap(ulong below4G, ulong above4G)
    {
        const uint Ram = 1;
        var map = new List<byte>();
        void Add(ulong address, ulong length) =>
            map.AddRange([.. BitConverter.GetBytes(address), .. BitConverter.GetBytes(length), .. BitConverter.GetBytes(Ram)]);
        Add(0, below4G);
        if (above4G != 0)
        {
            Add(4UL << 30, above4G);
        }
        return [.. map];
    }

    /// <summary>Adds the SMBIOS tables; firmware places them and completes the entry point.</summary>
    public static void AddSmbios(FwCfg fwCfg, SmbiosOptions options)
    {
        var tables = SmbiosTables.Build(options);
        fwCfg.AddFile("etc/smbios/smbios-tables", tables.Table);
        fwCfg.AddFile("etc/smbios/smbios-anchor", SmbiosTables.BuildEntryPoint(tables, 0));
    }

    /// <summary>Adds the ACPI tables and the script with which firmware places and links them.</summary>
    /// <returns>The tables, which may change until firmware reads them, as long as their length stays.</returns>
    public static byte[] AddAcpi(FwCfg fwCfg, AcpiTableOptions options)
    {
        const int RsdpLength = 36;
        var image = BuildAcpi(options);
        fwCfg.AddFile(RsdpFile, image[..RsdpLength]);
        fwCfg.AddFile(TablesFile, image);
        fwCfg.AddFile("etc/table-loader", BuildLoader(image));
        return image;
    }

    /// <summary>
    /// The tables with zeros for the checksums that the script completes: some firmware adds up what is there, other firmware
    /// replaces it by what is missing from a sum that counts it.
    /// </summary>
    public static byte[] BuildAcpi(AcpiTableOptions options)
    {
        var image = AcpiTables.Build(0, options);
        foreach (var (table, _, _) in FindPointers(image))
        {
            image[table + ChecksumOffset] = 0;
        }
        image[RsdpChecksum] = image[RsdpExtendedChecksum] = 0;
        return image;
    }

    // The tables refer to each other by offsets, to which the script adds where firmware has put them.
    private static byte[] BuildLoader(ReadOnlySpan<byte> image)
    {
        const uint Allocate = 1;
        const uint AddPointer = 2;
        const uint AddChecksum = 3;
        const byte HighMemory = 1;
        const byte LowMemory = 2;
        const int EntryLength = 128;
        const int NameLength = 56;
        var script = new MemoryStream();
        void Write(uint command, string file, string? source, params ReadOnlySpan<byte> rest)
        {
            var entry = new byte[EntryLength];
            BinaryPrimitives.WriteUInt32LittleEndian(entry, command);
            Encoding.ASCII.GetBytes(file, entry.AsSpan(4));
            if (source is not null)
            {
                Encoding.ASCII.GetBytes(source, entry.AsSpan(4 + NameLength));
            }
            rest.CopyTo(entry.AsSpan(4 + NameLength * (source is null ? 1 : 2)));
            script.Write(entry);
        }

        void Pointer(string file, int offset, byte size) => Write(AddPointer, file, TablesFile, [.. BitConverter.GetBytes(offset), size]);
        void Sum(string file, int offset, int start, int length) => Write(AddChecksum, file, null,
            [.. BitConverter.GetBytes(offset), .. BitConverter.GetBytes(start), .. BitConverter.GetBytes(length)]);

        Write(Allocate, RsdpFile, null, [16, 0, 0, 0, LowMemory]);
        Write(Allocate, TablesFile, null, [64, 0, 0, 0, HighMemory]);
        foreach (var (table, offsets, size) in FindPointers(image))
        {
            foreach (var offset in offsets)
            {
                Pointer(TablesFile, table + offset, size);
            }
        }
        foreach (var table in FindPointers(image).Select(p => p.Table).Distinct())
        {
            Sum(TablesFile, table + ChecksumOffset, table, BinaryPrimitives.ReadInt32LittleEndian(image[(table + 4)..]));
        }
        Pointer(RsdpFile, 16, 4);
        Pointer(RsdpFile, 24, 8);
        Sum(RsdpFile, RsdpChecksum, 0, 20);
        Sum(RsdpFile, RsdpExtendedChecksum, 0, 36);
        return script.ToArray();
    }

    private static List<(int Table, int[] Offsets, byte Size)> FindPointers(ReadOnlySpan<byte> image)
    {
        const int HeaderLength = 36;
        var rsdt = BinaryPrimitives.ReadInt32LittleEndian(image[16..]);
        var xsdt = BinaryPrimitives.ReadInt32LittleEndian(image[24..]);
        var found = new List<(int, int[], byte)>();
        foreach (var (table, size) in ((int, byte)[])[(rsdt, 4), (xsdt, 8)])
        {
            var length = BinaryPrimitives.ReadInt32LittleEndian(image[(table + 4)..]);
            var offsets = new List<int>();
            for (var offset = HeaderLength; offset < length; offset += size)
            {
                offsets.Add(offset);
            }
            found.Add((table, [.. offsets], size));
        }
        var fadt = BinaryPrimitives.ReadInt32LittleEndian(image[(rsdt + HeaderLength)..]);
        found.Add((fadt, [36, 40], 4)); // FIRMWARE_CTRL and DSDT
        found.Add((fadt, [140], 8)); // X_DSDT
        return found;
    }
}
