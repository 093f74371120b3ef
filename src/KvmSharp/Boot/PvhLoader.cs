using System.Buffers.Binary;
using System.Globalization;

namespace KvmSharp.Boot;

/// <summary>
/// Loads an ELF kernel that names a PVH entry point and starts it there, in protected mode without paging. Specification: Xen,
/// "x86/HVM direct boot ABI". The image is not trusted: everything in its headers is checked.
/// </summary>
public static class PvhLoader
{
    private const ulong CommandLineLimit = 0xffff;

    private const uint SegmentNote = 4;
    private const uint NotePhysicalEntry = 18; // XEN_ELFNOTE_PHYS32_ENTRY
    private const int NoteHeader = 12;
    private const int MaxProgramHeaders = 1024;
    private const byte Class64 = 2;

    /// <summary>Whether an image is an ELF executable with a PVH entry point.</summary>
    /// <param name="image">The image.</param>
    public static bool IsPvh(ReadOnlySpan<byte> image) => FindEntry(image) is not null;

    /// <summary>Loads a kernel with its command line and initial RAM disk.</summary>
    /// <param name="memory">The guest's memory.</param>
    /// <param name="vcpu">The processor that starts the kernel; it must not be running.</param>
    /// <param name="kernel">The kernel.</param>
    /// <param name="options">What the kernel is given.</param>
    /// <exception cref="BootImageException">The kernel or the initial RAM disk cannot be loaded.</exception>
    public static void Load(GuestMemory memory, Vcpu vcpu, BootImage kernel, LinuxBootOptions options)
    {
        ArgumentNullException.ThrowIfNull(memory);
        ArgumentNullException.ThrowIfNull(vcpu);
        ArgumentNullException.ThrowIfNull(kernel);
        ArgumentNullException.ThrowIfNull(options);
        var image = kernel.Bytes.Span;
        var elf = ElfImage.Read(kernel.Name, image);
        if (FindEntry(image) is not { } entry)
        {
            throw new BootImageException(BootImageProblem.UnknownFormat, $"'{kernel.Name}' has no PVH entry point.");
        }
        var parameters = new LinuxBootParameters(memory, options);
        foreach (var segment in elf.Segments)
        {
            segment.CheckMemory(kernel.Name, memory);
            if (segment.Address < LinuxBootParameters.LowEnd && segment.End > LinuxBootParameters.LowStart)
            {
                throw new BootImageException(BootImageProblem.Unsupported, string.Create(CultureInfo.InvariantCulture,
                    $"'{kernel.Name}' has a segment at 0x{segment.Address:x}, where its start information goes."));
            }
        }
        if (!elf.Segments.Any(s => entry >= s.Address && entry < s.End))
        {
            throw new BootImageException(BootImageProblem.Malformed, string.Create(CultureInfo.InvariantCulture,
                $"'{kernel.Name}' has its PVH entry point, 0x{entry:x}, outside of what is loaded."));
        }
        parameters.PlaceCommandLine(kernel.Name, CommandLineLimit);
        parameters.PlaceInitrd(uint.MaxValue, [.. elf.Segments.Select(s => (s.Address, s.End))]);
        foreach (var segment in elf.Segments)
        {
            segment.CopyTo(memory, image);
        }
        parameters.StartPvh(vcpu, entry);
    }

    // System V ABI, "Note Section": name and description are padded to multiples of four.
    private static uint? FindEntry(ReadOnlySpan<byte> image)
    {
        if (!ElfImage.IsElf(image) || image.Length < 64)
        {
            return null;
        }
        var is64Bit = image[4] == Class64;
        var table = is64Bit ? BinaryPrimitives.ReadUInt64LittleEndian(image[32..]) : BinaryPrimitives.ReadUInt32LittleEndian(image[28..]);
        var size = BinaryPrimitives.ReadUInt16LittleEndian(image[(is64Bit ? 54 : 42)..]);
        var count = BinaryPrimitives.ReadUInt16LittleEndian(image[(is64Bit ? 56 : 44)..]);
        if (size < (is64Bit ? 56 : 32) || count > MaxProgramHeaders)
        {
            return null;
        }
        for (var i = 0; i < count; i++)
        {
            if (Part(image, table + (ulong)i * size, size) is not { Length: > 0 } header)
            {
                return null;
            }
            var (offset, length) = is64Bit
                ? (BinaryPrimitives.ReadUInt64LittleEndian(header[8..]), BinaryPrimitives.ReadUInt64LittleEndian(header[32..]))
                : (BinaryPrimitives.ReadUInt32LittleEndian(header[4..]), BinaryPrimitives.ReadUInt32LittleEndian(header[16..]));
            if (BinaryPrimitives.ReadUInt32LittleEndian(header) == SegmentNote && FindNote(Part(image, offset, length)) is { } entry)
            {
                return entry;
            }
        }
        return null;
    }

    private static uint? FindNote(ReadOnlySpan<byte> notes)
    {
        while (notes.Length >= NoteHeader)
        {
            var nameLength = BinaryPrimitives.ReadUInt32LittleEndian(notes);
            var length = BinaryPrimitives.ReadUInt32LittleEndian(notes[4..]);
            var type = BinaryPrimitives.ReadUInt32LittleEndian(notes[8..]);
            notes = notes[NoteHeader..];
            var start = ((ulong)nameLength + 3) & ~3UL;
            var end = start + (((ulong)length + 3) & ~3UL);
            if (end > (ulong)notes.Length)
            {
                return null;
            }
            if (type == NotePhysicalEntry && length is 4 or 8 && notes[..(int)nameLength].SequenceEqual("Xen\0"u8))
            {
                return BinaryPrimitives.ReadUInt32LittleEndian(notes[(int)start..]);
            }
            notes = notes[(int)end..];
        }
        return null;
    }

    private static ReadOnlySpan<byte> Part(ReadOnlySpan<byte> image, ulong offset, ulong length) =>
        offset <= (ulong)image.Length && length <= (ulong)image.Length - offset ? image.Slice((int)offset, (int)length) : default;
}
