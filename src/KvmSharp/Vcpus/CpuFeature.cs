namespace KvmSharp;

/// <summary>A register of a CPUID leaf.</summary>
internal enum CpuidRegister
{
    Eax,
    Ebx,
    Ecx,
    Edx,
}

/// <summary>One named bit of CPUID.</summary>
/// <param name="Name">The name in lower case.</param>
/// <param name="Leaf">The leaf.</param>
/// <param name="Subleaf">The sub-leaf.</param>
/// <param name="Register">The register.</param>
/// <param name="Bit">The bit.</param>
internal sealed record CpuFeature(string Name, uint Leaf, uint Subleaf, CpuidRegister Register, int Bit)
{
    // SDM 2A "CPUID", APM 3 "Obtaining Processor Information Via the CPUID Instruction",
    // and the kernel's description of the KVM CPUID bits for 0x4000_0001.
    internal static readonly IReadOnlyList<CpuFeature> All =
    [
        .. Leaf1Ecx(), .. Leaf1Edx(), .. Leaf7(), .. Extended(), .. Paravirtual(),
    ];

    private static readonly Dictionary<string, string> Aliases = new(StringComparer.Ordinal)
    {
        ["pni"] = "sse3",
        ["sse4_1"] = "sse4.1",
        ["sse4_2"] = "sse4.2",
        ["sse4-1"] = "sse4.1",
        ["sse4-2"] = "sse4.2",
        ["cmpxchg16b"] = "cx16",
        ["cmpxchg8b"] = "cx8",
        ["cx8b"] = "cx8",
        ["tsc_deadline_timer"] = "tsc-deadline",
        ["lahf_lm"] = "lahf-lm",
        ["abm"] = "lzcnt",
        ["sha_ni"] = "sha-ni",
        ["sha"] = "sha-ni",
        ["constant_tsc"] = "invtsc",
        ["nonstop_tsc"] = "invtsc",
        ["tsc_adjust"] = "tsc-adjust",
        ["fxsr_opt"] = "fxsr-opt",
        ["1gb"] = "pdpe1gb",
        ["clfsh"] = "clflush",
        ["i64"] = "lm",
        ["xd"] = "nx",
    };

    // What a feature is nothing without: SDM 1 "Detection of AVX Instructions" and its neighbours.
    private static readonly Dictionary<string, string[]> Requirements = new(StringComparer.Ordinal)
    {
        ["xsaveopt"] = ["xsave"],
        ["xsavec"] = ["xsave"],
        ["xgetbv1"] = ["xsave"],
        ["xsaves"] = ["xsave", "xsavec"],
        ["avx"] = ["xsave"],
        ["avx2"] = ["avx"],
        ["fma"] = ["avx"],
        ["f16c"] = ["avx"],
        ["vaes"] = ["avx", "aes"],
        ["vpclmulqdq"] = ["avx", "pclmulqdq"],
    };

    private static readonly Dictionary<string, CpuFeature> ByName = All.ToDictionary(f => f.Name, StringComparer.Ordinal);

    internal static CpuFeature? Find(string name)
    {
        var key = name.Trim().ToLowerInvariant();
        if (Aliases.TryGetValue(key, out var canonical))
        {
            key = canonical;
        }
        return ByName.GetValueOrDefault(key) ?? ByName.GetValueOrDefault(key.Replace('_', '-'));
    }

    /// <summary>The feature and all that it requires.</summary>
    internal IEnumerable<CpuFeature> WithRequirements() =>
        Requirements.TryGetValue(Name, out var names) ? names.SelectMany(n => ByName[n].WithRequirements()).Prepend(this).Distinct() : [this];

    internal bool IsIn(in CpuidEntry entry)
    {
        if (entry.Function != Leaf || ((entry.Flags & 1) != 0 && entry.Index != Subleaf) || ((entry.Flags & 1) == 0 && Subleaf != 0))
        {
            return false;
        }
        var value = Register switch
        {
            CpuidRegister.Eax => entry.Eax,
            CpuidRegister.Ebx => entry.Ebx,
            CpuidRegister.Ecx => entry.Ecx,
            _ => entry.Edx,
        };
        return ((value >> Bit) & 1) != 0;
    }

    private static IEnumerable<CpuFeature> Leaf1Ecx() => Bits(1, 0, CpuidRegister.Ecx,
        (0, "sse3"), (1, "pclmulqdq"), (3, "monitor"), (9, "ssse3"), (12, "fma"), (13, "cx16"), (17, "pcid"), (19, "sse4.1"),
        (20, "sse4.2"), (21, "x2apic"), (22, "movbe"), (23, "popcnt"), (24, "tsc-deadline"), (25, "aes"), (26, "xsave"),
        (28, "avx"), (29, "f16c"), (30, "rdrand"), (31, "hypervisor"));

    private static IEnumerable<CpuFeature> Leaf1Edx() => Bits(1, 0, CpuidRegister.Edx,
        (0, "fpu"), (1, "vme"), (2, "de"), (3, "pse"), (4, "tsc"), (5, "msr"), (6, "pae"), (7, "mce"), (8, "cx8"), (9, "apic"),
        (11, "sep"), (12, "mtrr"), (13, "pge"), (14, "mca"), (15, "cmov"), (16, "pat"), (17, "pse36"), (19, "clflush"),
        (23, "mmx"), (24, "fxsr"), (25, "sse"), (26, "sse2"), (27, "ss"), (28, "ht"));

    private static IEnumerable<CpuFeature> Leaf7() =>
    [
        .. Bits(7, 0, CpuidRegister.Ebx,
            (0, "fsgsbase"), (1, "tsc-adjust"), (3, "bmi1"), (5, "avx2"), (7, "smep"), (8, "bmi2"), (9, "erms"), (10, "invpcid"),
            (16, "avx512f"), (17, "avx512dq"), (18, "rdseed"), (19, "adx"), (20, "smap"), (21, "avx512ifma"), (23, "clflushopt"),
            (24, "clwb"), (28, "avx512cd"), (29, "sha-ni"), (30, "avx512bw"), (31, "avx512vl")),
        .. Bits(7, 0, CpuidRegister.Ecx, (2, "umip"), (3, "pku"), (8, "gfni"), (9, "vaes"), (10, "vpclmulqdq"), (16, "la57"), (22, "rdpid"), (31, "pks")),
        .. Bits(7, 0, CpuidRegister.Edx, (4, "fsrm"), (26, "spec-ctrl"), (27, "stibp"), (28, "flush-l1d"), (29, "arch-capabilities"), (31, "ssbd")),
        .. Bits(7, 1, CpuidRegister.Eax, (26, "lam")),
        .. Bits(6, 0, CpuidRegister.Eax, (2, "arat")),
        .. Bits(0xd, 1, CpuidRegister.Eax, (0, "xsaveopt"), (1, "xsavec"), (2, "xgetbv1"), (3, "xsaves")),
    ];

    private static IEnumerable<CpuFeature> Extended() =>
    [
        .. Bits(0x8000_0001, 0, CpuidRegister.Ecx, (0, "lahf-lm"), (4, "cr8legacy"), (5, "lzcnt"), (6, "sse4a"), (7, "misalignsse"), (8, "3dnowprefetch")),
        .. Bits(0x8000_0001, 0, CpuidRegister.Edx, (11, "syscall"), (20, "nx"), (22, "mmxext"), (25, "fxsr-opt"), (26, "pdpe1gb"), (27, "rdtscp"), (29, "lm")),
        .. Bits(0x8000_0007, 0, CpuidRegister.Edx, (8, "invtsc")),
        .. Bits(0x8000_0008, 0, CpuidRegister.Ebx, (12, "ibpb"), (14, "ibrs"), (15, "amd-stibp"), (24, "amd-ssbd"), (26, "amd-no-ssb")),
    ];

    private static IEnumerable<CpuFeature> Paravirtual() => Bits(0x4000_0001, 0, CpuidRegister.Eax,
        (0, "kvmclock-old"), (1, "kvm-nopiodelay"), (3, "kvmclock"), (4, "kvm-asyncpf"), (5, "kvm-steal-time"), (6, "kvm-pv-eoi"),
        (7, "kvm-pv-unhalt"), (11, "kvm-pv-ipi"), (12, "kvm-poll-control"), (13, "kvm-pv-sched-yield"), (24, "kvmclock-stable-bit"));

    private static IEnumerable<CpuFeature> Bits(uint leaf, uint subleaf, CpuidRegister register, params (int Bit, string Name)[] bits) =>
        bits.Select(b => new CpuFeature(b.Name, leaf, subleaf, register, b.Bit));
}
