using System.Buffers.Binary;
using System.Text;

namespace KvmSharp.Boot;

/// <summary>What a Multiboot kernel is given at its start.</summary>
public sealed record MultibootOptions
{
    /// <summary>
    /// The kernel's arguments, without NUL characters; passed as UTF-8 behind the file name of the kernel, which is the first
    /// word of its command line.
    /// </summary>
    public string CommandLine { get; init; } = "";

    /// <summary>The one boot module, or <see langword="null"/> for none.</summary>
    public BootImage? Module { get; init; }

    /// <summary>The memory map; <see langword="null"/> takes <see cref="Boot.MemoryMap.ForPc"/>.</summary>
    public IReadOnlyList<MemoryRange>? MemoryMap { get; init; }
}

/// <summary>
/// Loads a Multiboot 1 kernel - ELF32, ELF64, or any format whose header has the address fields - and starts it in protected
/// mode. Specification: Multiboot Specification 0.6.96. The image is not trusted: everything in its headers is checked.
/// </summary>
public static class MultibootLoader
{
    private const uint LoaderMagic = 0x2bad_b002; // "Machine state": what EAX holds
    private const string LoaderName = "KvmSharp";

    // The information goes below 640 KiB and above what real-mode start-up code of kernels likes to use.
    private const ulong InformationStart = 0x9000;

    // "Boot information format"
    private const int InformationLength = 116;
    private const int LowerMemory = 4;
    private const int UpperMemory = 8;
    private const int CommandLine = 16;
    private const int ModuleCount = 20;
    private const int ModuleAddress = 24;
    private const int MapLength = 44;
    private const int MapAddress = 48;
    private const int LoaderNameAddress = 64;
    private const uint HasMemorySize = 1 << 0;
    private const uint HasCommandLine = 1 << 2;
    private const uint HasModules = 1 << 3;
    private const uint HasMap = 1 << 6;
    private const uint HasLoaderName = 1 << 9;
    private const int ModuleLength = 16;
    private const int MapEntryLength = 24;
    private const int GdtLength = 32;

    /// <summary>Whether an image has a Multiboot 1 header.</summary>
    /// <param name="image">Its first bytes, 8 KiB or more if there are.</param>
    public static bool IsMultiboot(ReadOnlySpan<byte> image) => MultibootHeader.Find(image) is not null;

    /// <summary>Loads a kernel with its command line and module.</summary>
    /// <param name="memory">The guest's memory.</param>
    /// <param name="vcpu">The processor that starts the kernel; it must not be running.</param>
    /// <param name="kernel">The kernel.</param>
    /// <param name="options">What the kernel is given.</param>
    /// <exception cref="BootImageException">The kernel or the module cannot be loaded.</exception>
    public static void Load(GuestMemory memory, Vcpu vcpu, BootImage kernel, MultibootOptions options)
    {
        ArgumentNullException.ThrowIfNull(memory);
        ArgumentNullException.ThrowIfNull(vcpu);
        ArgumentNullException.ThrowIfNull(kernel);
        ArgumentNullException.ThrowIfNull(options);
        var image = kernel.Bytes.Span;
        var (segments, entry) = ReadImage(kernel.Name, image);
        foreach (var segment in segments)
        {
            segment.CheckMemory(kernel.Name, memory);
        }
        var occupied = segments.Select(s => (Start: s.Address, s.End)).ToList();
        var map = options.MemoryMap ?? MemoryMap.ForPc(memory);

        var module = default((ulong Start, ulong End));
        if (options.Module is { } file)
        {
            module = PlaceModule(memory, map, file, occupied);
            occupied.Add(module);
        }
        var information = new Information(kernel.Name, options, module, map);
        if (FindPlace(memory, map, InformationStart, MemoryMap.ExtendedBiosData, (ulong)information.Length, occupied) is not { } address)
        {
            throw new BootImageException(BootImageProblem.TooLarge, $"What '{kernel.Name}' is to be told, its command line included, does not fit below 640 KiB.");
        }
        foreach (var segment in segments)
        {
            segment.CopyTo(memory, image);
        }
        memory.Write(address, information.Build((uint)address));
        CpuSetup.EnterProtectedMode(vcpu, memory, address + InformationLength, new Registers { Rip = entry, Rax = LoaderMagic, Rbx = address });
    }

    private static (IReadOnlyList<ElfImage.Segment> Segments, ulong Entry) ReadImage(string name, ReadOnlySpan<byte> image)
    {
        if (image.IsEmpty)
        {
            throw new BootImageException(BootImageProblem.Empty, $"'{name}' is empty.");
        }
        if (MultibootHeader.Find(image) is not { } header)
        {
            throw new BootImageException(BootImageProblem.UnknownFormat, $"'{name}' has no Multiboot header.");
        }
        header.CheckRequirements(name);
        if (header.HasAddresses)
        {
            var (segment, start) = header.ReadAddresses(name, image);
            return ([segment], start);
        }
        if (!ElfImage.IsElf(image))
        {
            throw new BootImageException(BootImageProblem.Malformed, $"'{name}' is no ELF image, and its Multiboot header does not say where it is loaded.");
        }
        var elf = ElfImage.Read(name, image);
        var entry = elf.FindEntry(name);
        return (elf.Segments, entry);
    }

    // Behind the kernel if there is room, and page-aligned as "boot modules must be" on request.
    private static (ulong Start, ulong End) PlaceModule(GuestMemory memory, IReadOnlyList<MemoryRange> map, BootImage file,
        List<(ulong Start, ulong End)> occupied)
    {
        var length = (ulong)file.Bytes.Length;
        if (length == 0)
        {
            throw new BootImageException(BootImageProblem.Empty, $"'{file.Name}' is empty.");
        }
        var behind = Math.Max(MemoryMap.HighStart, occupied.Max(o => o.End));
        var start = FindPlace(memory, map, behind, 1UL << 32, length, occupied)
            ?? FindPlace(memory, map, MemoryMap.HighStart, 1UL << 32, length, occupied)
            ?? throw new BootImageException(BootImageProblem.TooLarge,
                $"'{file.Name}' with {length} bytes does not fit into the guest's memory beside the kernel.");
        memory.Write(start, file.Bytes.Span);
        return (start, start + length);
    }

    private static ulong? FindPlace(GuestMemory memory, IReadOnlyList<MemoryRange> map, ulong start, ulong end, ulong length,
        List<(ulong Start, ulong End)> occupied)
    {
        foreach (var range in map.Where(r => r.Kind == MemoryRangeKind.Usable).OrderBy(r => r.Address.Value))
        {
            var address = AlignUp(Math.Max(start, range.Address.Value));
            var limit = Math.Min(end, range.End);
            while (address < limit && length <= limit - address)
            {
                var clash = occupied.Where(o => address < o.End && o.Start < address + length).Select(o => o.End).DefaultIfEmpty(0ul).Max();
                if (clash == 0)
                {
                    if (memory.IsBacked(address, length))
                    {
                        return address;
                    }
                    break;
                }
                address = AlignUp(clash);
            }
        }
        return null;
    }

    private static ulong AlignUp(ulong address) => (address + GuestMemory.PageSize - 1) & ~(ulong)(GuestMemory.PageSize - 1);

    // The structure, room for a GDT, and all that the structure points to.
    private sealed class Information
    {
        private readonly byte[] _commandLine;
        private readonly byte[] _moduleName;
        private readonly (ulong Start, ulong End) _module;
        private readonly IReadOnlyList<MemoryRange> _map;

        public Information(string kernelName, MultibootOptions options, (ulong Start, ulong End) module, IReadOnlyList<MemoryRange> map)
        {
            ArgumentNullException.ThrowIfNull(options.CommandLine);
            if (options.CommandLine.Contains('\0', StringComparison.Ordinal))
            {
                throw new KvmSharpException(KvmSharpErrorCode.InvalidArgument, "A kernel command line cannot contain NUL characters.");
            }
            var name = OneWord(kernelName);
            _commandLine = Encoding.UTF8.GetBytes(options.CommandLine.Length == 0 ? name : $"{name} {options.CommandLine}");
            _moduleName = options.Module is { } file ? Encoding.UTF8.GetBytes(OneWord(file.Name)) : [];
            _module = module;
            _map = map;
        }

        public int Length => InformationLength + GdtLength + ModuleLength + MapEntryLength * _map.Count
            + _commandLine.Length + 1 + _moduleName.Length + 1 + LoaderName.Length + 1;

        public byte[] Build(uint address)
        {
            var bytes = new byte[Length];
            var next = InformationLength + GdtLength;
            void Set(int offset, uint value) => BinaryPrimitives.WriteUInt32LittleEndian(bytes.AsSpan(offset), value);
            uint Append(ReadOnlySpan<byte> text)
            {
                var at = address + (uint)next;
                text.CopyTo(bytes.AsSpan(next));
                next += text.Length + 1;
                return at;
            }

            var flags = HasMemorySize | HasCommandLine | HasMap | HasLoaderName;
            Set(LowerMemory, Kilobytes(0, MemoryMap.VideoStart));
            Set(UpperMemory, Kilobytes(MemoryMap.HighStart, uint.MaxValue));

            var moduleAt = next;
            next += ModuleLength;
            Set(MapAddress, address + (uint)next);
            Set(MapLength, (uint)(MapEntryLength * _map.Count));
            foreach (var range in _map)
            {
                // "The size is ... the size of the associated structure ... not including itself."
                Set(next, MapEntryLength - 4);
                BinaryPrimitives.WriteUInt64LittleEndian(bytes.AsSpan(next + 4), range.Address.Value);
                BinaryPrimitives.WriteUInt64LittleEndian(bytes.AsSpan(next + 12), range.Length);
                Set(next + 20, (uint)range.Kind);
                next += MapEntryLength;
            }
            Set(CommandLine, Append(_commandLine));
            Set(LoaderNameAddress, Append(Encoding.ASCII.GetBytes(LoaderName)));
            if (_module.End != 0)
            {
                flags |= HasModules;
                Set(ModuleCount, 1);
                Set(ModuleAddress, address + (uint)moduleAt);
                Set(moduleAt, (uint)_module.Start);
                Set(moduleAt + 4, (uint)_module.End);
                Set(moduleAt + 8, Append(_moduleName));
            }
            Set(0, flags);
            return bytes;
        }

        // "Lower memory starts at address 0, and upper memory starts at address 1 megabyte": up to the first hole.
        private uint Kilobytes(ulong start, ulong limit)
        {
            var end = start;
            foreach (var range in _map.Where(r => r.Kind == MemoryRangeKind.Usable).OrderBy(r => r.Address.Value))
            {
                if (range.Address.Value <= end && range.End > end)
                {
                    end = range.End;
                }
            }
            return (uint)((Math.Min(end, limit) - start) >> 10);
        }

        // Paths of the host are none of the guest's business, and blanks would end the word.
        private static string OneWord(string name)
        {
            var file = Path.GetFileName(name);
            return string.Concat((file.Length == 0 ? "kernel" : file).Select(c => char.IsWhiteSpace(c) || c == '\0' ? '_' : c));
        }
    }
}
