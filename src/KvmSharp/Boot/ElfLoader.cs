using System.Buffers.Binary;
using System.Globalization;

namespace KvmSharp.Boot;

/// <summary>
/// Loads an ELF64 kernel (vmlinux) to the physical addresses of its segments and starts it like a bzImage's 64-bit entry
/// point, with a zero page in RSI. Specification: System V ABI, "Object Files" and "Program Loading". The image is not
/// trusted: everything in its headers is checked.
/// </summary>
public static class ElfLoader
{
    private const int HeaderSize = 64;
    private const int ProgramHeaderSize = 56;
    private const int MaxProgramHeaders = 1024;

    // "ELF Header"
    private const int Class = 4;
    private const int DataEncoding = 5;
    private const int Type = 16;
    private const int Machine = 18;
    private const int Entry = 24;
    private const int ProgramHeaderOffset = 32;
    private const int ProgramHeaderEntrySize = 54;
    private const int ProgramHeaderCount = 56;
    private const byte Class64 = 2;
    private const byte LittleEndian = 1;
    private const ushort Executable = 2;
    private const ushort SharedObject = 3;
    private const ushort MachineX64 = 62;
    private const uint SegmentLoad = 1;

    // The command line's limit of all x86 kernels (COMMAND_LINE_SIZE), less the terminator.
    private const ulong CommandLineLimit = 2047;

    private readonly record struct Segment(ulong Offset, ulong VirtualAddress, ulong Address, ulong FileSize, ulong MemorySize);

    /// <summary>Whether an image looks like ELF.</summary>
    /// <param name="image">Its first bytes.</param>
    public static bool IsElf(ReadOnlySpan<byte> image)
    {
        ReadOnlySpan<byte> magic = [0x7f, (byte)'E', (byte)'L', (byte)'F'];
        return image.StartsWith(magic);
    }

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
        CheckHeader(kernel.Name, image);
        var segments = ReadSegments(kernel.Name, image);
        var entry = FindEntry(kernel.Name, BinaryPrimitives.ReadUInt64LittleEndian(image[Entry..]), segments);
        var parameters = new LinuxBootParameters(memory, options);
        foreach (var segment in segments)
        {
            CheckPlace(kernel.Name, segment, memory);
        }
        parameters.SetMagic();
        parameters.PlaceCommandLine(kernel.Name, CommandLineLimit);
        parameters.PlaceInitrd(uint.MaxValue, [.. segments.Select(s => (s.Address, s.Address + s.MemorySize))]);
        foreach (var segment in segments)
        {
            memory.Write(segment.Address, image.Slice((int)segment.Offset, (int)segment.FileSize));
            memory.Fill(segment.Address + segment.FileSize, segment.MemorySize - segment.FileSize, 0);
        }
        parameters.Start(vcpu, entry);
    }

    private static void CheckHeader(string name, ReadOnlySpan<byte> image)
    {
        if (image.IsEmpty)
        {
            throw new BootImageException(BootImageProblem.Empty, $"'{name}' is empty.");
        }
        if (!IsElf(image))
        {
            throw new BootImageException(BootImageProblem.UnknownFormat, $"'{name}' is not an ELF image.");
        }
        if (image.Length < HeaderSize)
        {
            throw new BootImageException(BootImageProblem.Truncated, $"'{name}' ends within its header.");
        }
        var type = BinaryPrimitives.ReadUInt16LittleEndian(image[Type..]);
        if (image[Class] != Class64 || image[DataEncoding] != LittleEndian
            || BinaryPrimitives.ReadUInt16LittleEndian(image[Machine..]) != MachineX64 || type is not (Executable or SharedObject))
        {
            throw new BootImageException(BootImageProblem.Unsupported, $"'{name}' is not a 64-bit x86 executable.");
        }
    }

    private static List<Segment> ReadSegments(string name, ReadOnlySpan<byte> image)
    {
        var offset = BinaryPrimitives.ReadUInt64LittleEndian(image[ProgramHeaderOffset..]);
        var entrySize = BinaryPrimitives.ReadUInt16LittleEndian(image[ProgramHeaderEntrySize..]);
        var count = BinaryPrimitives.ReadUInt16LittleEndian(image[ProgramHeaderCount..]);
        if (count == 0 || count > MaxProgramHeaders || entrySize < ProgramHeaderSize)
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
            var segment = new Segment(
                BinaryPrimitives.ReadUInt64LittleEndian(header[8..]),
                BinaryPrimitives.ReadUInt64LittleEndian(header[16..]),
                BinaryPrimitives.ReadUInt64LittleEndian(header[24..]),
                BinaryPrimitives.ReadUInt64LittleEndian(header[32..]),
                BinaryPrimitives.ReadUInt64LittleEndian(header[40..]));
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

    // A kernel's entry point is a physical address; other programs may give a virtual one.
    private static ulong FindEntry(string name, ulong entry, List<Segment> segments)
    {
        foreach (var segment in segments)
        {
            if (entry >= segment.Address && entry - segment.Address < segment.MemorySize)
            {
                return entry;
            }
        }
        foreach (var segment in segments)
        {
            if (entry >= segment.VirtualAddress && entry - segment.VirtualAddress < segment.MemorySize)
            {
                return segment.Address + (entry - segment.VirtualAddress);
            }
        }
        throw new BootImageException(BootImageProblem.Malformed, $"'{name}' has its entry point outside of its segments.");
    }

    private static void CheckPlace(string name, Segment segment, GuestMemory memory)
    {
        if (!memory.IsBacked(segment.Address, segment.MemorySize) || segment.Address + segment.MemorySize > 1UL << 32)
        {
            throw new BootImageException(BootImageProblem.TooLarge, string.Create(CultureInfo.InvariantCulture,
                $"'{name}' needs memory from 0x{segment.Address:x} to 0x{segment.Address + segment.MemorySize:x}; the guest has too little."));
        }
        if (segment.Address < LinuxBootParameters.LowEnd && segment.Address + segment.MemorySize > LinuxBootParameters.LowStart)
        {
            throw new BootImageException(BootImageProblem.Unsupported, string.Create(CultureInfo.InvariantCulture,
                $"'{name}' has a segment at 0x{segment.Address:x}, where its boot parameters go."));
        }
    }
}
