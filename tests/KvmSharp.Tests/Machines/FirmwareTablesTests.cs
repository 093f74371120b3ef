using System.Buffers.Binary;
using System.Text;
using KvmSharp.Boot;
using KvmSharp.Devices;
using KvmSharp.Tests.Devices;

namespace KvmSharp.Tests.Machines;

/// <summary>Firmware places and links the ACPI tables by a script; each kind of firmware computes checksums in its way.</summary>
public sealed class FirmwareTablesTests
{
    private const ulong RsdpAddress = 0xf_5000;
    private const ulong TablesAddress = 0x3f_0000;

    [Theory]
    [InlineData(true)] // subtracts the sum from what is there, as SeaBIOS does
    [InlineData(false)] // replaces it by what the sum lacks, as EDK II does
    public void LinkedTablesAddUp(bool subtracts)
    {
        using var machine = new PcMachine(new PcMachineOptions { MemorySize = 4 << 20, Firmware = BootImage.FromBytes(new byte[0x1_0000]) });
        var files = new Dictionary<string, byte[]>
        {
            ["etc/acpi/rsdp"] = ReadFile(machine.FwCfg!, "etc/acpi/rsdp"),
            ["etc/acpi/tables"] = ReadFile(machine.FwCfg!, "etc/acpi/tables"),
        };
        Link(files, ReadFile(machine.FwCfg!, "etc/table-loader"), subtracts);

        var rsdp = files["etc/acpi/rsdp"];
        var tables = files["etc/acpi/tables"];
        Assert.Equal((0, 0), (Sum(rsdp.AsSpan(0, 20)), Sum(rsdp)));
        var xsdt = Table(tables, BinaryPrimitives.ReadUInt64LittleEndian(rsdp.AsSpan(24)));
        var rsdt = Table(tables, BinaryPrimitives.ReadUInt32LittleEndian(rsdp.AsSpan(16)));
        Assert.Equal(("XSDT", "RSDT"), (Signature(xsdt), Signature(rsdt)));
        string[] signatures = [.. Enumerable.Range(0, (xsdt.Length - 36) / 8)
            .Select(i => Signature(Table(tables, BinaryPrimitives.ReadUInt64LittleEndian(xsdt.AsSpan(36 + 8 * i)))))];
        Assert.Equal(["FACP", "APIC", "MCFG"], signatures);
        var fadt = Table(tables, BinaryPrimitives.ReadUInt64LittleEndian(xsdt.AsSpan(36)));
        Assert.Equal("DSDT", Signature(Table(tables, BinaryPrimitives.ReadUInt64LittleEndian(fadt.AsSpan(140)))));
        var facs = BinaryPrimitives.ReadUInt32LittleEndian(fadt.AsSpan(36)) - TablesAddress;
        Assert.Equal("FACS", Encoding.ASCII.GetString(tables, (int)facs, 4));
    }

    private static void Link(Dictionary<string, byte[]> files, byte[] script, bool subtracts)
    {
        for (var at = 0; at < script.Length; at += 128)
        {
            var entry = script.AsSpan(at, 128);
            var file = files[Name(entry[4..60])];
            switch (BinaryPrimitives.ReadUInt32LittleEndian(entry))
            {
                case 1: // where to put a file: at addresses of this test's own
                    break;
                case 2: // a pointer
                    var offset = BinaryPrimitives.ReadInt32LittleEndian(entry[116..]);
                    var target = Name(entry[60..116]) == "etc/acpi/tables" ? TablesAddress : RsdpAddress;
                    var pointer = file.AsSpan(offset, entry[120]);
                    var value = new byte[8];
                    pointer.CopyTo(value);
                    BitConverter.GetBytes(BitConverter.ToUInt64(value) + target).AsSpan(0, pointer.Length).CopyTo(pointer);
                    break;
                case 3: // a checksum
                    var result = BinaryPrimitives.ReadInt32LittleEndian(entry[60..]);
                    var sum = Sum(file.AsSpan(BinaryPrimitives.ReadInt32LittleEndian(entry[64..]), BinaryPrimitives.ReadInt32LittleEndian(entry[68..])));
                    file[result] = (byte)((subtracts ? file[result] : 0) - sum);
                    break;
                default:
                    Assert.Fail("The script has a command that firmware does not know.");
                    break;
            }
        }
    }

    private static byte[] ReadFile(FwCfg device, string name)
    {
        byte[] Read(ushort key, int length)
        {
            device.WriteValue(0, 2, key);
            return [.. Enumerable.Range(0, length).Select(_ => device.ReadByte(1))];
        }

        var count = BinaryPrimitives.ReadInt32BigEndian(Read(0x19, 4));
        var directory = Read(0x19, 4 + 64 * count).AsSpan(4);
        while (Name(directory[8..64]) != name)
        {
            directory = directory[64..];
        }
        return Read(BinaryPrimitives.ReadUInt16BigEndian(directory[4..]), BinaryPrimitives.ReadInt32BigEndian(directory));
    }

    private static byte[] Table(byte[] tables, ulong address)
    {
        var start = (int)(address - TablesAddress);
        var table = tables[start..(start + BinaryPrimitives.ReadInt32LittleEndian(tables.AsSpan(start + 4)))];
        Assert.Equal(0, Sum(table));
        return table;
    }

    private static string Signature(byte[] table) => Encoding.ASCII.GetString(table, 0, 4);

    private static string Name(ReadOnlySpan<byte> name) => Encoding.ASCII.GetString(name).TrimEnd('\0');

    private static byte Sum(ReadOnlySpan<byte> bytes)
    {
        byte sum = 0;
        foreach (var b in bytes)
        {
            sum += b;
        }
        return sum;
    }
}
