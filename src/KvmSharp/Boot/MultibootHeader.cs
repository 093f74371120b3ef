using System.Buffers.Binary;

namespace KvmSharp.Boot;

// Multiboot Specification 0.6.96, "OS image format".

/// <summary>The header by which an image asks to be loaded as Multiboot says.</summary>
internal readonly struct MultibootHeader
{
    private const int SearchLength = 8192; // "within the first 8192 bytes of the OS image, and 32-bit aligned"
    private const uint Magic = 0x1bad_b002;
    private const int Length = 12;
    private const int AddressLength = 32;

    // "The Layout of Multiboot header"
    private const int HeaderAddressField = 12;
    private const int LoadAddressField = 16;
    private const int LoadEndField = 20;
    private const int BssEndField = 24;
    private const int EntryField = 28;

    // "If bit 0 is set, all boot modules must be aligned on page boundaries", which they are here in any case;
    // bit 1 asks for the memory map, which is always there.
    private const uint SatisfiedRequirements = 3;
    private const uint VideoMode = 1 << 2;
    private const uint RequirementMask = 0xffff;
    private const uint AddressFieldsValid = 1 << 16;

    private MultibootHeader(int position, uint flags)
    {
        Position = position;
        Flags = flags;
    }

    public int Position { get; }

    public bool HasAddresses => (Flags & AddressFieldsValid) != 0;

    private uint Flags { get; }

    public static MultibootHeader? Find(ReadOnlySpan<byte> image)
    {
        for (var at = 0; at <= Math.Min(image.Length, SearchLength) - Length; at += 4)
        {
            if (BinaryPrimitives.ReadUInt32LittleEndian(image[at..]) != Magic)
            {
                continue;
            }
            var flags = BinaryPrimitives.ReadUInt32LittleEndian(image[(at + 4)..]);
            var checksum = BinaryPrimitives.ReadUInt32LittleEndian(image[(at + 8)..]);
            if (unchecked(Magic + flags + checksum) == 0)
            {
                return new MultibootHeader(at, flags);
            }
        }
        return null;
    }

    /// <summary>Refuses an image that wants what is not there: "the loader must ... fail if it cannot".</summary>
    public void CheckRequirements(string name)
    {
        if ((Flags & RequirementMask & ~SatisfiedRequirements) is not 0 and var unknown)
        {
            throw new BootImageException(BootImageProblem.Unsupported, unknown == VideoMode
                ? $"'{name}' requires a video mode, and the machine has no display."
                : $"'{name}' requires features that Multiboot 1 does not have (flags 0x{unknown:x}).");
        }
    }

    /// <summary>The one segment and the entry point of an image whose header has the address fields.</summary>
    public (ElfImage.Segment Segment, ulong Entry) ReadAddresses(string name, ReadOnlySpan<byte> image)
    {
        if (image.Length - Position < AddressLength)
        {
            throw new BootImageException(BootImageProblem.Truncated, $"'{name}' ends within its header.");
        }
        var header = image[Position..];
        ulong headerAddress = BinaryPrimitives.ReadUInt32LittleEndian(header[HeaderAddressField..]);
        ulong start = BinaryPrimitives.ReadUInt32LittleEndian(header[LoadAddressField..]);
        ulong end = BinaryPrimitives.ReadUInt32LittleEndian(header[LoadEndField..]);
        ulong bssEnd = BinaryPrimitives.ReadUInt32LittleEndian(header[BssEndField..]);
        ulong entry = BinaryPrimitives.ReadUInt32LittleEndian(header[EntryField..]);
        // "load_addr ... must be less than or equal to header_addr"; the header's place in the file tells where the text begins.
        if (start > headerAddress || headerAddress - start > (ulong)Position)
        {
            throw new BootImageException(BootImageProblem.Malformed, $"'{name}' says that it begins before the start of the file.");
        }
        var offset = (ulong)Position - (headerAddress - start);
        var fileSize = (ulong)image.Length - offset;
        if (end != 0) // otherwise text and data are the whole file
        {
            if (end <= start)
            {
                throw new BootImageException(BootImageProblem.Malformed, $"'{name}' ends before its beginning.");
            }
            if (end - start > fileSize)
            {
                throw new BootImageException(BootImageProblem.Truncated, $"'{name}' is truncated: its header says {offset + (end - start)} bytes.");
            }
            fileSize = end - start;
        }
        if (bssEnd != 0 && bssEnd < start + fileSize)
        {
            throw new BootImageException(BootImageProblem.Malformed, $"'{name}' has its bss within its data.");
        }
        var size = Math.Max(fileSize, bssEnd == 0 ? 0 : bssEnd - start);
        if (entry < start || entry - start >= size)
        {
            throw new BootImageException(BootImageProblem.Malformed, $"'{name}' has its entry point outside of itself.");
        }
        return (new ElfImage.Segment(offset, start, start, fileSize, size), entry);
    }
}
