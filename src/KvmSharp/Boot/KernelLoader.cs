namespace KvmSharp.Boot;

/// <summary>Loads a kernel of any supported format.</summary>
public static class KernelLoader
{
    /// <summary>
    /// Finds out the format of a kernel and loads it: an image with a Multiboot 1 header, an ELF
    /// image with a PVH entry point, a bzImage, or an ELF64 vmlinux. A
    /// Multiboot kernel gets the initial RAM disk as its module.
    /// </summary>
    /// <param name="memory">The guest's memory.</param>
    /// <param name="vcpu">The processor that starts the kernel; it must not be running.</param>
    /// <param name="kernel">The kernel.</param>
    /// <param name="options">What the kernel is given.</param>
    /// <exception cref="BootImageException">The format is unknown, or the kernel or the initial RAM disk cannot be loaded.</exception>
    public static void Load(GuestMemory memory, Vcpu vcpu, BootImage kernel, LinuxBootOptions options)
    {
        ArgumentNullException.ThrowIfNull(kernel);
        ArgumentNullException.ThrowIfNull(options);
        if (MultibootLoader.IsMultiboot(kernel.Bytes.Span))
        {
            MultibootLoader.Load(memory, vcpu, kernel, new MultibootOptions
            {
                CommandLine = options.CommandLine,
                Module = options.Initrd,
                MemoryMap = options.MemoryMap,
            });
        }
        else if (PvhLoader.IsPvh(kernel.Bytes.Span))
        {
            PvhLoader.Load(memory, vcpu, kernel, options);
        }
        else if (ElfLoader.IsElf(kernel.Bytes.Span))
        {
            ElfLoader.Load(memory, vcpu, kernel, options);
        }
        else if (LinuxLoader.IsBzImage(kernel.Bytes.Span))
        {
            LinuxLoader.Load(memory, vcpu, kernel, options);
        }
        else
        {
            throw kernel.Bytes.IsEmpty
                ? new BootImageException(BootImageProblem.Empty, $"'{kernel.Name}' is empty.")
                : new BootImageException(BootImageProblem.UnknownFormat, $"'{kernel.Name}' is neither a Linux bzImage nor an ELF or Multiboot kernel.");
        }
    }
}
