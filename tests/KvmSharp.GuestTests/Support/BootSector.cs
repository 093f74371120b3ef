using System.Buffers.Binary;
using System.Text;

namespace KvmSharp.GuestTests.Support;

/// <summary>A boot sector that tells through the BIOS and the debug console that it runs, waits for a key and ends with it as its exit code.</summary>
internal static class BootSector
{
    public const string Message = "boot sector here";

    private const int SectorOfCd = 2048;

    // 16-bit code at 0x7C00.
    private static readonly byte[] _code =
    [
        0x31, 0xc0, // xor ax, ax
        0x8e, 0xd8, // mov ds, ax
        0xbe, 0x1f, 0x7c, // mov si, message
        0xac, // next: lodsb
        0x08, 0xc0, // or al, al
        0x74, 0x0d, // jz end
        0xb4, 0x0e, // mov ah, 0x0e
        0xbb, 0x07, 0x00, // mov bx, 7
        0xcd, 0x10, // int 0x10
        0xba, 0xe9, 0x00, // mov dx, 0xe9
        0xee, // out dx, al
        0xeb, 0xee, // jmp next
        0x31, 0xc0, // end: xor ax, ax
        0xcd, 0x16, // int 0x16
        0xe6, 0xf4, // out 0xf4, al
    ];

    /// <summary>A disk of 1 MiB.</summary>
    public static byte[] Disk()
    {
        var disk = new byte[1 << 20];
        _code.CopyTo(disk, 0);
        Encoding.ASCII.GetBytes(Message + "\r\n\0").CopyTo(disk, _code.Length);
        disk[510] = 0x55;
        disk[511] = 0xaa;
        return disk;
    }

    /// <summary>A CD with nothing but that: ECMA-119 and the El Torito Bootable CD-ROM Format Specification 1.0.</summary>
    public static byte[] Cd()
    {
        const int Catalog = 19;
        const int Image = 20;
        var disc = new byte[(Image + 4) * SectorOfCd];
        void Descriptor(int sector, byte type, string text, int at)
        {
            Span<byte> target = disc.AsSpan(sector * SectorOfCd, SectorOfCd);
            target[0] = type;
            Encoding.ASCII.GetBytes("CD001").CopyTo(target[1..]);
            target[6] = 1;
            Encoding.ASCII.GetBytes(text).CopyTo(target[at..]);
        }

        Descriptor(16, 1, "TEST", 40);
        Descriptor(17, 0, "EL TORITO SPECIFICATION", 7);
        BinaryPrimitives.WriteUInt32LittleEndian(disc.AsSpan(17 * SectorOfCd + 0x47), Catalog);
        Descriptor(18, 255, "", 7);
        Span<byte> catalog = disc.AsSpan(Catalog * SectorOfCd, 64);
        catalog[0] = 1; // validation entry
        catalog[30] = 0x55;
        catalog[31] = 0xaa;
        ushort sum = 0;
        for (int i = 0; i < 32; i += 2)
        {
            sum += BinaryPrimitives.ReadUInt16LittleEndian(catalog[i..]);
        }

        BinaryPrimitives.WriteUInt16LittleEndian(catalog[28..], (ushort)-sum);
        catalog[32] = 0x88; // bootable, no emulation
        catalog[38] = 4; // sectors of 512 bytes
        BinaryPrimitives.WriteUInt32LittleEndian(catalog[40..], Image);
        Disk().AsSpan(0, 512).CopyTo(disc.AsSpan(Image * SectorOfCd));
        return disc;
    }
}
