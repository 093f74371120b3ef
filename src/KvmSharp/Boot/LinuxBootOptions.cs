namespace KvmSharp.Boot;

/// <summary>What a Linux kernel is given at its start.</summary>
public sealed record LinuxBootOptions
{
    /// <summary>The command line, without NUL characters; passed as UTF-8.</summary>
    public string CommandLine { get; init; } = "";

    /// <summary>The initial RAM disk, or <see langword="null"/> for none.</summary>
    public BootImage? Initrd { get; init; }

    /// <summary>Where the ACPI tables' RSDP lies; <see langword="null"/> lets the kernel search for it.</summary>
    public GuestAddress? RsdpAddress { get; init; }

    /// <summary>The memory map; <see langword="null"/> takes <see cref="Boot.MemoryMap.ForPc"/>.</summary>
    public IReadOnlyList<MemoryRange>? MemoryMap { get; init; }
}
