using System.Buffers.Binary;
using System.Text;

namespace KvmSharp.Boot;

/// <summary>
/// The "zero page" and what else the start of a Linux kernel has in common for all image formats. Specification: the
/// kernel's Documentation/arch/x86/boot.rst and zero-page.rst.
/// </summary>
internal sealed class LinuxBootParameters
{
    // Where the pieces lie, all below 640 KiB.
    internal const ulong LowStart = 0x500;
    internal const ulong LowEnd = CommandLineAddress + MaxCommandLine + 1;
    private const ulong Gdt = 0x500;
    private const ulong ZeroPage = 0x7000;
    private const ulong StackTop = 0x9000;
    private const ulong PageTables = 0x9000;
    private const ulong CommandLineAddress = 0x20000;
    private const int MaxCommandLine = 0xffff;

    // Offsets in the zero page; those from 0x1f1 are the setup header's.
    internal const int SetupHeader = 0x1f1;
    private const int ExtendedMemoryKilobytes = 0x002;
    private const int RsdpAddress = 0x070;
    private const int ExtendedRamdiskImage = 0x0c0;
    private const int ExtendedRamdiskSize = 0x0c4;
    private const int ExtendedCommandLine = 0x0c8;
    private const int AlternativeMemoryKilobytes = 0x1e0;
    private const int MapEntries = 0x1e8;
    private const int BootFlag = 0x1fe;
    private const int HeaderMagic = 0x202;
    private const int LoaderType = 0x210;
    private const int LoadFlags = 0x211;
    private const int RamdiskImage = 0x218;
    private const int RamdiskSize = 0x21c;
    private const int HeapEnd = 0x224;
    private const int CommandLinePointer = 0x228;
    private const int MapTable = 0x2d0;
    private const int MaxMapEntries = 128;

    private const byte UndefinedLoader = 0xff;
    private const byte LoadedHigh = 1 << 0;
    private const byte CanUseHeap = 1 << 7;

    private readonly byte[] _page = new byte[4096];
    private readonly GuestMemory _memory;
    private readonly LinuxBootOptions _options;

    internal LinuxBootParameters(GuestMemory memory, LinuxBootOptions options)
    {
        _memory = memory;
        _options = options;
        Map = options.MemoryMap ?? MemoryMap.ForPc(memory);
        if (!memory.IsBacked(LowStart, LowEnd - LowStart))
        {
            throw new BootImageException(BootImageProblem.TooLarge, "The guest's memory is too small for a Linux kernel.");
        }
    }

    internal IReadOnlyList<MemoryRange> Map { get; }

    /// <summary>The setup header of the image, from 0x1f1 on.</summary>
    internal void SetHeader(ReadOnlySpan<byte> header) => header.CopyTo(_page.AsSpan(SetupHeader));

    internal void SetMagic()
    {
        BinaryPrimitives.WriteUInt16LittleEndian(_page.AsSpan(BootFlag), 0xaa55);
        "HdrS"u8.CopyTo(_page.AsSpan(HeaderMagic));
    }

    /// <summary>Whether usable memory of at least 1 MiB holds a range.</summary>
    internal bool IsUsable(ulong address, ulong length) => Map.Any(r => r.Kind == MemoryRangeKind.Usable && address >= MemoryMap.HighStart
        && address >= r.Address.Value && address <= r.End && length <= r.End - address && _memory.IsBacked(address, length));

    /// <summary>Puts the command line into memory.</summary>
    /// <param name="kernelName">For messages.</param>
    /// <param name="limit">The longest that the kernel takes, in bytes without the terminator.</param>
    internal void PlaceCommandLine(string kernelName, ulong limit)
    {
        if (_options.CommandLine.Contains('\0', StringComparison.Ordinal))
        {
            throw new KvmSharpException(KvmSharpErrorCode.InvalidArgument, "A kernel command line cannot contain NUL characters.");
        }
        var text = Encoding.UTF8.GetBytes(_options.CommandLine);
        limit = Math.Min(limit, MaxCommandLine);
        if ((ulong)text.Length > limit)
        {
            throw new BootImageException(BootImageProblem.CommandLineTooLong,
                $"The command line has {text.Length} bytes; '{kernelName}' takes at most {limit}.");
        }
        _memory.Write(CommandLineAddress, [.. text, 0]);
        BinaryPrimitives.WriteUInt32LittleEndian(_page.AsSpan(CommandLinePointer), (uint)CommandLineAddress);
        BinaryPrimitives.WriteUInt32LittleEndian(_page.AsSpan(ExtendedCommandLine), 0);
    }

    /// <summary>Puts the initial RAM disk as high as possible, clear of the kernel.</summary>
    /// <param name="highest">The highest address that its last byte may have.</param>
    /// <param name="occupied">Where the kernel lies, or will when it is unpacked.</param>
    internal void PlaceInitrd(ulong highest, IReadOnlyList<(ulong Start, ulong End)> occupied)
    {
        if (_options.Initrd is not { } initrd)
        {
            return;
        }
        var length = (ulong)initrd.Bytes.Length;
        if (length == 0)
        {
            throw new BootImageException(BootImageProblem.Empty, $"'{initrd.Name}' is empty.");
        }
        if (FindInitrdPlace(length, highest, occupied) is not { } address)
        {
            throw new BootImageException(BootImageProblem.TooLarge,
                $"'{initrd.Name}' with {length} bytes does not fit into the guest's memory beside the kernel.");
        }
        _memory.Write(address, initrd.Bytes.Span);
        BinaryPrimitives.WriteUInt32LittleEndian(_page.AsSpan(RamdiskImage), (uint)address);
        BinaryPrimitives.WriteUInt32LittleEndian(_page.AsSpan(RamdiskSize), (uint)length);
        BinaryPrimitives.WriteUInt32LittleEndian(_page.AsSpan(ExtendedRamdiskImage), (uint)(address >> 32));
        BinaryPrimitives.WriteUInt32LittleEndian(_page.AsSpan(ExtendedRamdiskSize), (uint)(length >> 32));
    }

    /// <summary>Completes the zero page and makes the vCPU start at a 64-bit entry point.</summary>
    internal void Start(Vcpu vcpu, ulong entry)
    {
        Complete();
        CpuSetup.EnterLongMode(vcpu, _memory, Gdt, PageTables, new Registers { Rip = entry, Rsi = ZeroPage, Rsp = StackTop });
    }

    /// <summary>Completes the zero page and makes the vCPU start as "32-bit BOOT PROTOCOL" demands.</summary>
    internal void StartIn32BitMode(Vcpu vcpu, uint entry)
    {
        Complete();
        CpuSetup.EnterProtectedMode(vcpu, _memory, Gdt, new Registers { Rip = entry, Rsi = ZeroPage, Rsp = StackTop });
    }

    /// <summary>Makes the vCPU start at a PVH entry point: Xen, "x86/HVM direct boot ABI".</summary>
    internal void StartPvh(Vcpu vcpu, uint entry)
    {
        const uint Magic = 0x336e_c578;
        const int Module = 64; // behind the start information, which has 56 bytes
        const int Ranges = 128;
        const int RangeLength = 24;
        var hasModule = _options.Initrd is not null;
        var count = Math.Min(Map.Count, MaxMapEntries);
        var info = new byte[Ranges + count * RangeLength];
        void U32(int offset, uint value) => BinaryPrimitives.WriteUInt32LittleEndian(info.AsSpan(offset), value);
        void U64(int offset, ulong value) => BinaryPrimitives.WriteUInt64LittleEndian(info.AsSpan(offset), value);
        U32(0, Magic);
        U32(4, 1); // version
        U32(12, hasModule ? 1u : 0);
        U64(16, hasModule ? ZeroPage + Module : 0);
        U64(24, CommandLineAddress);
        U64(32, _options.RsdpAddress?.Value ?? 0);
        U64(40, ZeroPage + Ranges);
        U32(48, (uint)count);
        U64(Module, BinaryPrimitives.ReadUInt32LittleEndian(_page.AsSpan(RamdiskImage)));
        U64(Module + 8, BinaryPrimitives.ReadUInt32LittleEndian(_page.AsSpan(RamdiskSize)));
        for (var i = 0; i < count; i++)
        {
            U64(Ranges + i * RangeLength, Map[i].Address.Value);
            U64(Ranges + i * RangeLength + 8, Map[i].Length);
            U32(Ranges + i * RangeLength + 16, (uint)Map[i].Kind);
        }
        _memory.Write(ZeroPage, info);
        CpuSetup.EnterProtectedMode(vcpu, _memory, Gdt, new Registers { Rip = entry, Rbx = ZeroPage });
    }

    private void Complete()
    {
        _page[LoaderType] = UndefinedLoader;
        _page[LoadFlags] |= LoadedHigh | CanUseHeap;
        BinaryPrimitives.WriteUInt16LittleEndian(_page.AsSpan(HeapEnd), 0xfe00);
        if (_options.RsdpAddress is { } rsdp)
        {
            BinaryPrimitives.WriteUInt64LittleEndian(_page.AsSpan(RsdpAddress), rsdp.Value);
        }
        WriteMap();
        _memory.Write(ZeroPage, _page);
    }

    private ulong? FindInitrdPlace(ulong length, ulong highest, IReadOnlyList<(ulong Start, ulong End)> occupied)
    {
        foreach (var range in Map.Where(r => r.Kind == MemoryRangeKind.Usable).OrderByDescending(r => r.Address.Value))
        {
            var top = Math.Min(range.End, highest + 1);
            while (top >= length && top > range.Address.Value)
            {
                var address = (top - length) & ~(ulong)(GuestMemory.PageSize - 1);
                if (!IsUsable(address, length))
                {
                    break;
                }
                var clash = occupied.Where(o => address < o.End && o.Start < address + length).Select(o => o.Start).DefaultIfEmpty(ulong.MaxValue).Min();
                if (clash == ulong.MaxValue)
                {
                    return address;
                }
                top = clash;
            }
        }
        return null;
    }

    private void WriteMap()
    {
        var count = Math.Min(Map.Count, MaxMapEntries);
        _page[MapEntries] = (byte)count;
        for (var i = 0; i < count; i++)
        {
            var entry = _page.AsSpan(MapTable + 20 * i);
            BinaryPrimitives.WriteUInt64LittleEndian(entry, Map[i].Address.Value);
            BinaryPrimitives.WriteUInt64LittleEndian(entry[8..], Map[i].Length);
            BinaryPrimitives.WriteUInt32LittleEndian(entry[16..], (uint)Map[i].Kind);
        }
        var high = Map.FirstOrDefault(r => r.Kind == MemoryRangeKind.Usable && r.Address.Value == MemoryMap.HighStart).Length >> 10;
        BinaryPrimitives.WriteUInt16LittleEndian(_page.AsSpan(ExtendedMemoryKilobytes), (ushort)Math.Min(high, 0xffff));
        BinaryPrimitives.WriteUInt32LittleEndian(_page.AsSpan(AlternativeMemoryKilobytes), (uint)Math.Min(high, uint.MaxValue));
    }
}
