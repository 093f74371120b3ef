using System.Buffers.Binary;
using System.Globalization;

namespace KvmSharp.Boot;

/// <summary>
/// An x86 executable in ELF32 or ELF64 format: what its headers say, checked. Specification: System V ABI, "Object Files"
/// and "Program Loading".
/// </summary>
internal sealed class ElfImage
{
    private const int MaxProgramHeaders = 1024;

    // "ELF Header"
    private const int Class = 4;
    private const int DataEncoding = 5;
    private const int Type = 16;
    private const int Machine = 18;
    private const int Entry = 24;
    private const byte Class32 = 1;
    private const byte Class64 = 2;
    private const byte LittleEndian = 1;
    private const ushort Executable = 2;
    private const ushort SharedObject = 3;
    private const ushort Machine386 = 3;
    private const ushort MachineX64 = 62;
    private const uint SegmentLoad = 1;

    private readonly ulong _entry;

    private ElfImage(bool is64Bit, ulong entry, List<Segment> segments)
    {
        Is64Bit = is64Bit;
        _entry = entry;
        Segments = segments;
    }

    public bool Is64Bit { get; }

    /// <summary>What is loaded; at least one, none of them empty.</summary>
    public IReadOnlyList<Segment> Segments { get; }

    public static bool IsElf(ReadOnlySpan<byte> image)
    {
        ReadOnlySpan<byte> magic = [0x7f, (byte)'E', (byte)'L', (byte)'F'];
        return image.StartsWith(magic);
    }

    public static ElfImage Read(string name, ReadOnlySpan<byte> image)
    {
        if (image.IsEmpty)
        {
            throw new BootImageException(BootImageProblem.Empty, $"'{name}' is empty.");
        }
        if (!IsElf(image))
        {
            throw new BootImageException(BootImageProblem.UnknownFormat, $"'{name}' is not an ELF image.");
        }
        if (image.Length <= Class)
        {
            throw new BootImageException(BootImageProblem.Truncated, $"'{name}' ends within its header.");
        }
        var is64Bit = image[Class] == Class64;
        if (image.Length < (is64Bit ? 64 : 52))
        {
            throw new BootImageException(BootImageProblem.Truncated, $"'{name}' ends within its header.");
        }
        var type = BinaryPrimitives.ReadUInt16LittleEndian(image[Type..]);
        var machine = BinaryPrimitives.ReadUInt16LittleEndian(image[Machine..]);
        if (image[Class] is not (Class32 or Class64) || image[DataEncoding] != LittleEndian
            || machine != (is64Bit ? MachineX64 : Machine386) || type is not (Executable or SharedObject))
        {
            throw new BootImageException(BootImageProblem.Unsupported, $"'{name}' is not an x86 executable.");
        }
        var entry = is64Bit ? BinaryPrimitives.ReadUInt64LittleEndian(image[Entry..]) : BinaryPrimitives.ReadUInt32LittleEndian(image[Entry..]);
        return new ElfImage(is64Bit, entry, ReadSegments(name, image, is64Bit));
    }

    /// <summary>The physical address of the entry point: kernels give it so; other programs may give a virtual one.</summary>
    public ulong FindEntry(string name)
    {
        foreach (var segment in Segments)
        {
            if (_entry >= segment.Address && _entry - segment.Address < segment.MemorySize)
            {
                return _entry;
            }
        }
        foreach (var segment in Segments)
        {
            if (_entry >= segment.VirtualAddress && _entry - segment.VirtualAddress < segment.MemorySize)
            {
                return segment.Address + (_entry - segment.VirtualAddress);
            }
        }
        throw new BootImageException(BootImageProblem.Malformed, $"'{name}' has its entry point outside of its segments.");
    }

    private static List<Segment> ReadSegments(string name, ReadOnlySpan<byte> image, bool is64Bit)
    {
        var offset = is64Bit ? BinaryPrimitives.ReadUInt64LittleEndian(image[32..]) : BinaryPrimitives.ReadUInt32LittleEndian(image[28..]);
        var entrySize = BinaryPrimitives.ReadUInt16LittleEndian(image[(is64Bit ? 54 : 42)..]);
        var count = BinaryPrimitives.ReadUInt16LittleEndian(image[(is64Bit ? 56 : 44)..]);
        if (count == 0 || count > MaxProgramHeaders || entrySize < (is64Bit ? 56 : 32))
        {
            throw new BootImageException(BootImageProblem.Malformed, $"'{name}' has no valid program headers.");
        }
        var tableSize = (ulong)count * entrySize;
        if (offset > (ulong)image.Length || tableSize > (ulong)image.Length - offset)
        {
            throw new BootImageException(BootImageProblem.Truncated, $"'{name}' is truncated: its program headers lie beyond its end.");
        }
        var segments = new List<Segment>();
        for (var i = 0; i < count; i++)
        {
            var header = image[(int)(offset + (ulong)i * entrySize)..];
            if (BinaryPrimitives.ReadUInt32LittleEndian(header) != SegmentLoad)
            {
                continue;
            }
            var segment = is64Bit ? Segment.Read64(header) : Segment.Read32(header);
            if (segment.MemorySize == 0)
            {
                continue;
            }
            if (segment.FileSize > segment.MemorySize || segment.Address > ulong.MaxValue - segment.MemorySize)
            {
                throw new BootImageException(BootImageProblem.Malformed, $"'{name}' has a segment whose sizes contradict each other.");
            }
            if (segment.Offset > (ulong)image.Length || segment.FileSize > (ulong)image.Length - segment.Offset)
            {
                throw new BootImageException(BootImageProblem.Truncated, $"'{name}' is truncated: a segment lies beyond its end.");
            }
            segments.Add(segment);
        }
        return segments.Count != 0 ? segments : throw new BootImageException(BootImageProblem.Malformed, $"'{name}' has nothing to load.");
    }

    /// <summary>A part of an image that is loaded; behind what the file holds it is filled with zeros.</summary>
    internal readonly record struct Segment(ulong Offset, ulong VirtualAddress, ulong Address, ulong FileSize, ulong MemorySize)
    {
        public ulong End => Address + MemorySize;

        public static Segment Read32(ReadOnlySpan<byte> header) => new(
            BinaryPrimitives.ReadUInt32LittleEndian(header[4..]),
            BinaryPrimitives.ReadUInt32LittleEndian(header[8..]),
            BinaryPrimitives.ReadUInt32LittleEndian(header[12..]),
            BinaryPrimitives.ReadUInt32LittleEndian(header[16..]),
            BinaryPrimitives.ReadUInt32LittleEndian(header[20..]));

        public static Segment Read64(ReadOnlySpan<byte> header) => new(
            BinaryPrimitives.ReadUInt64LittleEndian(header[8..]),
            BinaryPrimitives.ReadUInt64LittleEndian(header[16..]),
            BinaryPrimitives.ReadUInt64LittleEndian(header[24..]),
            BinaryPrimitives.ReadUInt64LittleEndian(header[32..]),
            BinaryPrimitives.ReadUInt64LittleEndian(header[40..]));

        public void CheckMemory(string name, GuestMemory memory)
        {
            if (End > 1UL << 32 || !memory.IsBacked(Address, MemorySize))
            {
                throw new BootImageException(BootImageProblem.TooLarge, string.Create(CultureInfo.InvariantCulture,
                    $"'{name}' needs memory from 0x{Address:x} to 0x{End:x}; the guest has too little."));
            }
        }

        public void CopyTo(GuestMemory memory, ReadOnlySpan<byte> image)
        {
            memory.Write(Address, image.Slice((int)Offset, (int)FileSize));
            memory.Fill(Address + FileSize, MemorySize - FileSize, 0);
        }
    }
}
