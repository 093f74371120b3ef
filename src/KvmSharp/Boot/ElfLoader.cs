using System.Globalization;

namespace KvmSharp.Boot;

/// <summary>
/// Loads an ELF64 kernel (vmlinux) to the physical addresses of its segments and starts it like a bzImage's 64-bit entry
/// point, with a zero page in RSI. Specification: System V ABI, "Object Files" and "Program Loading". The image is not
/// trusted: everything in its headers is checked.
/// </summary>
public static class ElfLoader
{
    // The command line's limit of all x86 kernels (COMMAND_LINE_SIZE), less the terminator.
    private const ulong CommandLineLimit = 2047;

    /// <summary>Whether an image looks like ELF.</summary>
    /// <param name="image">Its first bytes.</param>
    public static bool IsElf(ReadOnlySpan<byte> image) => ElfImage.IsElf(image);

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
        if (!elf.Is64Bit)
        {
            throw new BootImageException(BootImageProblem.Unsupported, $"'{kernel.Name}' is not a 64-bit x86 executable.");
        }
        var segments = elf.Segments;
        var entry = elf.FindEntry(kernel.Name);
        var parameters = new LinuxBootParameters(memory, options);
        foreach (var segment in segments)
        {
            CheckPlace(kernel.Name, segment, memory);
        }
        parameters.SetMagic();
        parameters.PlaceCommandLine(kernel.Name, CommandLineLimit);
        parameters.PlaceInitrd(uint.MaxValue, [.. segments.Select(s => (s.Address, s.End))]);
        foreach (var segment in segments)
        {
            segment.CopyTo(memory, image);
        }
        parameters.Start(vcpu, entry);
    }

    private static void CheckPlace(string name, in ElfImage.Segment segment, GuestMemory memory)
    {
        segment.CheckMemory(name, memory);
        if (segment.Address < LinuxBootParameters.LowEnd && segment.End > LinuxBootParameters.LowStart)
        {
            throw new BootImageException(BootImageProblem.Unsupported, string.Create(CultureInfo.InvariantCulture,
                $"'{name}' has a segment at 0x{segment.Address:x}, where its boot parameters go."));
        }
    }
}
