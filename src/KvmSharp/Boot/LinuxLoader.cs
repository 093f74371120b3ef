using System.Buffers.Binary;
using System.Globalization;
using System.Numerics;

namespace KvmSharp.Boot;

/// <summary>
/// Loads a Linux bzImage and starts it at its 64-bit entry point, or at the 32-bit one of a kernel without. Specification:
/// the kernel's Documentation/arch/x86/boot.rst. The image is not trusted: everything in its header is checked.
/// </summary>
public static class LinuxLoader
{
    // "The Real-Mode Kernel Header"
    private const int SetupSectors = 0x1f1;
    private const int SystemSize = 0x1f4;
    private const int BootFlag = 0x1fe;
    private const int HeaderEnd = 0x201;
    private const int HeaderMagic = 0x202;
    private const int Version = 0x206;
    private const int LoadFlags = 0x211;
    private const int InitrdAddressMax = 0x22c;
    private const int KernelAlignment = 0x230;
    private const int RelocatableKernel = 0x234;
    private const int ExtendedLoadFlags = 0x236;
    private const int CommandLineSize = 0x238;
    private const int PreferredAddress = 0x258;
    private const int InitSize = 0x260;

    private const ushort BootFlagValue = 0xaa55;
    private const uint HeaderMagicValue = 0x5372_6448; // "HdrS"
    private const ushort OldestVersion = 0x0206; // 2.06 has cmdline_size
    private const ushort VersionPreferredAddress = 0x020a; // 2.10 has pref_address and init_size
    private const ushort Version64BitEntry = 0x020c; // 2.12 has xloadflags
    private const ulong TraditionalAddress = 0x10_0000; // "Loading The Rest of The Kernel"
    private const byte LoadedHigh = 1 << 0;
    private const ushort Has64BitEntry = 1 << 0;
    private const int SectorSize = 512;
    private const int EntryOffset = 0x200; // "64-bit BOOT PROTOCOL": start plus 0x200

    /// <summary>Whether an image looks like a bzImage.</summary>
    /// <param name="image">Its first bytes, 1 KiB or more if there are.</param>
    public static bool IsBzImage(ReadOnlySpan<byte> image) => image.Length >= HeaderMagic + 4
        && BinaryPrimitives.ReadUInt16LittleEndian(image[BootFlag..]) == BootFlagValue
        && BinaryPrimitives.ReadUInt32LittleEndian(image[HeaderMagic..]) == HeaderMagicValue;

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
        var body = FindBody(kernel.Name, image);
        var parameters = new LinuxBootParameters(memory, options);
        var (address, size) = FindPlace(kernel.Name, image, (ulong)body.Length, parameters);

        var headerLength = HeaderMagic + image[HeaderEnd] - SetupSectors;
        parameters.SetHeader(image.Slice(SetupSectors, headerLength));
        var limit = BinaryPrimitives.ReadUInt32LittleEndian(image[CommandLineSize..]);
        parameters.PlaceCommandLine(kernel.Name, limit == 0 ? 255 : limit);
        parameters.PlaceInitrd(BinaryPrimitives.ReadUInt32LittleEndian(image[InitrdAddressMax..]), [(address, address + size)]);
        memory.Write(address, body);
        if (Is64Bit(image))
        {
            parameters.Start(vcpu, address + EntryOffset);
        }
        else
        {
            parameters.StartIn32BitMode(vcpu, (uint)address);
        }
    }

    private static ushort VersionOf(ReadOnlySpan<byte> image) => BinaryPrimitives.ReadUInt16LittleEndian(image[Version..]);

    private static bool Is64Bit(ReadOnlySpan<byte> image) => VersionOf(image) >= Version64BitEntry
        && (BinaryPrimitives.ReadUInt16LittleEndian(image[ExtendedLoadFlags..]) & Has64BitEntry) != 0;

    // How far the header reaches in which version.
    private static int RequiredLength(ushort version) => version switch
    {
        >= Version64BitEntry => 0x268,
        >= VersionPreferredAddress => 0x264,
        _ => 0x23c,
    };

    // Checks the header and returns the protected-mode part.
    private static ReadOnlySpan<byte> FindBody(string name, ReadOnlySpan<byte> image)
    {
        if (image.IsEmpty)
        {
            throw new BootImageException(BootImageProblem.Empty, $"'{name}' is empty.");
        }
        if (!IsBzImage(image))
        {
            throw new BootImageException(BootImageProblem.UnknownFormat, $"'{name}' is not a Linux bzImage.");
        }
        if (image.Length < Version + 2 || image.Length < RequiredLength(VersionOf(image)))
        {
            throw new BootImageException(BootImageProblem.Truncated, $"'{name}' ends within its header.");
        }
        var version = VersionOf(image);
        if (version < OldestVersion || (image[LoadFlags] & LoadedHigh) == 0)
        {
            throw new BootImageException(BootImageProblem.Unsupported, string.Create(CultureInfo.InvariantCulture,
                $"'{name}' can only be started in real mode (boot protocol {version >> 8}.{version & 0xff:d2}), which is not supported."));
        }
        var headerEnd = HeaderMagic + image[HeaderEnd];
        if (headerEnd < RequiredLength(version))
        {
            throw new BootImageException(BootImageProblem.Malformed, $"'{name}' has a header that is shorter than its version says.");
        }
        var setupSectors = image[SetupSectors] == 0 ? 4 : image[SetupSectors];
        var setupLength = (setupSectors + 1) * SectorSize;
        var bodyLength = (ulong)BinaryPrimitives.ReadUInt32LittleEndian(image[SystemSize..]) * 16;
        // The size counts paragraphs of 16 bytes, so the last may be incomplete.
        if (setupLength >= image.Length || (ulong)(image.Length - setupLength) + 15 < bodyLength)
        {
            throw new BootImageException(BootImageProblem.Truncated,
                $"'{name}' is truncated: it has {image.Length} bytes, its header says {(ulong)setupLength + bodyLength}.");
        }
        if (bodyLength <= (Is64Bit(image) ? (ulong)EntryOffset : 0) || headerEnd > setupLength)
        {
            throw new BootImageException(BootImageProblem.Malformed, $"'{name}' has no room for its entry point.");
        }
        return image.Slice(setupLength, (int)Math.Min(bodyLength, (ulong)(image.Length - setupLength)));
    }

    // Where the kernel goes and how much memory it takes there until it knows the memory map.
    private static (ulong Address, ulong Size) FindPlace(string name, ReadOnlySpan<byte> image, ulong bodyLength, LinuxBootParameters parameters)
    {
        // Before 2.10 a header does not say how much memory unpacking takes; eight times the packed length is ample.
        var isSizeKnown = VersionOf(image) >= VersionPreferredAddress;
        var size = isSizeKnown ? Math.Max(BinaryPrimitives.ReadUInt32LittleEndian(image[InitSize..]), bodyLength) : 8 * bodyLength;
        var preferred = isSizeKnown ? BinaryPrimitives.ReadUInt64LittleEndian(image[PreferredAddress..]) : TraditionalAddress;
        // The entry page tables map the first 4 GiB, and a 32-bit kernel reaches no more.
        bool Fits(ulong address) => address <= uint.MaxValue && size <= (1UL << 32) - address && parameters.IsUsable(address, size);
        if (Fits(preferred))
        {
            return (preferred, size);
        }
        if (image[RelocatableKernel] == 0)
        {
            throw new BootImageException(BootImageProblem.TooLarge, string.Create(CultureInfo.InvariantCulture,
                $"'{name}' is not relocatable and needs {size >> 20} MiB of memory at 0x{preferred:x}."));
        }
        var alignment = BinaryPrimitives.ReadUInt32LittleEndian(image[KernelAlignment..]);
        if (!BitOperations.IsPow2(alignment))
        {
            throw new BootImageException(BootImageProblem.Malformed, $"'{name}' wants an alignment that is not a power of two.");
        }
        foreach (var range in parameters.Map)
        {
            var start = Math.Max(range.Address.Value, MemoryMap.HighStart);
            var address = (start + alignment - 1) & ~((ulong)alignment - 1);
            if (Fits(address))
            {
                return (address, size);
            }
        }
        throw new BootImageException(BootImageProblem.TooLarge, string.Create(CultureInfo.InvariantCulture,
            $"'{name}' needs {(size >> 20) + 1} MiB of memory at its start; the guest has too little."));
    }
}
