using System.Text;
using KvmSharp.Interop;

namespace KvmSharp;

/// <summary>
/// The processor that a guest sees: a named set of features, changed by <c>+feature</c> and <c>-feature</c>. A guest is
/// never offered what the execution core lacks. Immutable.
/// </summary>
public sealed class CpuModel
{
    // What every model has: it concerns the system, not programs.
    private const string SystemFeatures =
        "x2apic,tsc-deadline,hypervisor,pcid,smep,smap,umip,invpcid,tsc-adjust,pdpe1gb,rdtscp,invtsc,fsgsbase,3dnowprefetch,erms,fsrm,arat," +
        "kvmclock-old,kvm-nopiodelay,kvmclock,kvm-asyncpf,kvm-steal-time,kvm-pv-eoi,kvm-pv-unhalt,kvm-pv-ipi,kvm-poll-control," +
        "kvm-pv-sched-yield,kvmclock-stable-bit";

    // The levels of the x86-64 psABI, section "Machine Interface", and what every 64-bit operating system expects besides.
    private const string V1Features =
        "fpu,vme,de,pse,tsc,msr,pae,mce,cx8,apic,sep,mtrr,pge,mca,cmov,pat,pse36,clflush,mmx,fxsr,sse,sse2,syscall,nx,lm,cr8legacy," +
        SystemFeatures;

    private const string V2Features = V1Features + ",cx16,lahf-lm,popcnt,sse3,ssse3,sse4.1,sse4.2";

    private const string V3Features = V2Features + ",avx,avx2,bmi1,bmi2,f16c,fma,lzcnt,movbe,xsave,xsaveopt,xsavec,xgetbv1";

    private const string Qemu64Features = V1Features + ",cx16,lahf-lm,sse3";

    private const string VendorKey = "vendor=";
    private const uint LegacyStateSize = 576; // of the XSAVE area with its header

    private static readonly CpuModel[] Models =
    [
        new("x86-64-v1", V1Features),
        new("x86-64-v2", V2Features),
        new("x86-64-v3", V3Features),
        new("qemu64", Qemu64Features),
        new("max", string.Join(',', CpuFeature.All.Select(f => f.Name))),
    ];

    private readonly HashSet<CpuFeature> _features;
    private readonly CpuVendor? _vendor; // the core's own if it is not chosen
    private readonly CpuFeature[] _required; // asked for by name: missing ones are errors, not silently left out

    private CpuModel(string name, string features)
    {
        Name = name;
        BaseName = name;
        _features = [.. features.Split(',').Select(CpuFeature.Find).OfType<CpuFeature>()];
        _required = [];
    }

    private CpuModel(string name, string baseName, CpuVendor? vendor, HashSet<CpuFeature> features, CpuFeature[] required)
    {
        _vendor = vendor;
        Name = name;
        BaseName = baseName;
        _features = features;
        _required = required;
    }

    /// <summary>max: all features that the execution core has on this host.</summary>
    public static CpuModel Default => Models[^1];

    /// <summary>The names that <see cref="Parse"/> knows.</summary>
    public static IReadOnlyList<string> ModelNames => [.. Models.Select(m => m.Name)];

    /// <summary>The names of all features that <see cref="Parse"/> knows.</summary>
    public static IReadOnlyList<string> FeatureNames => [.. CpuFeature.All.Select(f => f.Name)];

    /// <summary>The names of the features that the execution core has on this host.</summary>
    /// <exception cref="NativeLibraryException">The core cannot be loaded.</exception>
    public static IReadOnlyList<string> SupportedFeatureNames
    {
        get
        {
            var supported = GetSupportedCpuid();
            return [.. CpuFeature.All.Where(f => IsSupported(f, supported)).Select(f => f.Name)];
        }
    }

    /// <summary>The model and its changes, as <see cref="Parse"/> takes them.</summary>
    public string Name { get; }

    /// <summary>The model without changes.</summary>
    public string BaseName { get; }

    /// <summary>The names of the model's features. Those that the core lacks are left out when a machine is made.</summary>
    public IReadOnlyList<string> Features => [.. CpuFeature.All.Where(_features.Contains).Select(f => f.Name)];

    /// <summary>
    /// Who made the processor, as CPUID tells it. Where the processors of the two differ in what instructions do - SYSCALL and
    /// SYSENTER outside of 64-bit mode, SYSRET to a non-canonical address - this decides.
    /// </summary>
    public CpuVendor Vendor => _vendor ?? CpuVendor.AuthenticAmd;

    /// <summary>
    /// Reads a model from text: a model's name, then changes, separated by commas: <c>x86-64-v2,+rdrand,-smap</c>,
    /// <c>max,vendor=GenuineIntel</c>.
    /// </summary>
    /// <param name="text">The text; case does not matter.</param>
    /// <exception cref="UnsupportedFeatureException">A name is unknown.</exception>
    public static CpuModel Parse(string text)
    {
        ArgumentNullException.ThrowIfNull(text);
        var parts = text.Split(',', StringSplitOptions.TrimEntries);
        var model = Array.Find(Models, m => string.Equals(m.Name, parts[0], StringComparison.OrdinalIgnoreCase))
            ?? throw new UnsupportedFeatureException(parts[0], $"There is no CPU model '{parts[0]}'; the models are {string.Join(", ", ModelNames)}.");
        foreach (var part in parts.Skip(1))
        {
            model = part switch
            {
                ['+', .. var name] => model.With(name),
                ['-', .. var name] => model.Without(name),
                _ when part.StartsWith(VendorKey, StringComparison.OrdinalIgnoreCase) => model.WithVendor(FindVendor(part[VendorKey.Length..])),
                _ => throw new UnsupportedFeatureException(part, $"The CPU feature '{part}' must start with + or -."),
            };
        }
        return model;
    }

    /// <summary>The model with one more feature, and with those that it requires.</summary>
    /// <param name="feature">The feature's name.</param>
    /// <exception cref="UnsupportedFeatureException">The name is unknown.</exception>
    public CpuModel With(string feature)
    {
        var added = FindFeature(feature);
        return new CpuModel($"{Name},+{added.Name}", BaseName, _vendor, [.. _features, .. added.WithRequirements()], [.. _required.Where(f => f != added), added]);
    }

    /// <summary>The model without a feature, and without those that require it.</summary>
    /// <param name="feature">The feature's name.</param>
    /// <exception cref="UnsupportedFeatureException">The name is unknown.</exception>
    public CpuModel Without(string feature)
    {
        var removed = FindFeature(feature);
        return new CpuModel($"{Name},-{removed.Name}", BaseName, _vendor, [.. _features.Where(IsKept)], [.. _required.Where(IsKept)]);

        bool IsKept(CpuFeature feature) => !feature.WithRequirements().Contains(removed);
    }

    /// <summary>The model as another maker's processor, with a family and model of theirs.</summary>
    /// <param name="vendor">The maker.</param>
    public CpuModel WithVendor(CpuVendor vendor) =>
        new($"{Name},{VendorKey}{CpuVendorLeaves.NameOf(vendor)}", BaseName, vendor, _features, _required);

    /// <summary>The CPUID leaves of a vCPU: those of the execution core, less what the model does not have.</summary>
    /// <param name="vcpuIndex">The vCPU, which is its APIC id too.</param>
    /// <param name="vcpuCount">The number of vCPUs in the machine.</param>
    /// <exception cref="UnsupportedFeatureException">The core lacks a feature that was asked for with +.</exception>
    /// <exception cref="NativeLibraryException">The core cannot be loaded.</exception>
    public IReadOnlyList<CpuidEntry> BuildCpuid(int vcpuIndex, int vcpuCount)
    {
        ArgumentOutOfRangeException.ThrowIfNegative(vcpuIndex);
        ArgumentOutOfRangeException.ThrowIfLessThanOrEqual(vcpuCount, vcpuIndex);
        return Restrict(GetSupportedCpuid(), vcpuIndex, vcpuCount);
    }

    /// <inheritdoc/>
    public override string ToString() => Name;

    internal IReadOnlyList<CpuidEntry> Restrict(IReadOnlyList<CpuidEntry> supported, int vcpuIndex, int vcpuCount)
    {
        if (Array.Find(_required, f => !IsSupported(f, supported)) is { } missing)
        {
            throw new UnsupportedFeatureException(missing.Name, $"The CPU feature '{missing.Name}' is not supported.");
        }
        var leaves = supported.Where(leaf => HasStateLeaf(leaf) && CpuVendorLeaves.Has(Vendor, leaf)).ToArray();
        foreach (ref var leaf in leaves.AsSpan())
        {
            if (_vendor is { } vendor)
            {
                CpuVendorLeaves.Set(vendor, ref leaf);
            }
            Mask(ref leaf);
            switch (leaf.Function)
            {
                case 0xd when leaf.Index == 0:
                    SetStateComponents(ref leaf, leaves);
                    break;
                case >= 0x8000_0002 and <= 0x8000_0004:
                    SetBrand(ref leaf);
                    break;
                default:
                    CpuTopology.Set(Vendor, vcpuIndex, vcpuCount, ref leaf);
                    break;
            }
        }
        return leaves;
    }

    // Leaf 0xD describes the state that XSAVE manages (SDM 2A "CPUID").
    private bool HasStateLeaf(CpuidEntry leaf) => leaf.Function != 0xd || (Has("xsave") && leaf.Index switch
    {
        2 => Has("avx") && leaf.Eax != 0,
        9 => Has("pku"),
        _ => true,
    });

    private static void SetStateComponents(ref CpuidEntry leaf, IReadOnlyList<CpuidEntry> leaves)
    {
        leaf.Eax &= 3;
        leaf.Ecx = LegacyStateSize;
        foreach (var component in leaves.Where(l => l.Function == 0xd && l.Index >= 2))
        {
            leaf.Eax |= 1u << (int)component.Index;
            leaf.Ecx = Math.Max(leaf.Ecx, component.Ebx + component.Eax);
        }
    }

    private bool Has(string feature) => _features.Contains(FindFeature(feature));

    private static CpuidEntry[] GetSupportedCpuid() => SupportedCpuid.Get();

    private static bool IsSupported(CpuFeature feature, IReadOnlyList<CpuidEntry> supported) => supported.Any(e => feature.IsIn(e));

    private static CpuVendor FindVendor(string name)
    {
        foreach (var vendor in Enum.GetValues<CpuVendor>())
        {
            if (string.Equals(name, CpuVendorLeaves.NameOf(vendor), StringComparison.OrdinalIgnoreCase))
            {
                return vendor;
            }
        }
        throw new UnsupportedFeatureException(name, $"There is no CPU vendor '{name}'; there are AuthenticAMD and GenuineIntel.");
    }

    private static CpuFeature FindFeature(string name) =>
        CpuFeature.Find(name) ?? throw new UnsupportedFeatureException(name, $"There is no CPU feature '{name}'.");

    // Bits without a name in the table stay as the core gives them: they are no features but values.
    private void Mask(ref CpuidEntry leaf)
    {
        foreach (var feature in CpuFeature.All)
        {
            if (_features.Contains(feature) || !feature.IsIn(leaf))
            {
                continue;
            }
            var mask = ~(1u << feature.Bit);
            switch (feature.Register)
            {
                case CpuidRegister.Eax:
                    leaf.Eax &= mask;
                    break;
                case CpuidRegister.Ebx:
                    leaf.Ebx &= mask;
                    break;
                case CpuidRegister.Ecx:
                    leaf.Ecx &= mask;
                    break;
                default:
                    leaf.Edx &= mask;
                    break;
            }
        }
        // An AMD processor repeats these bits of leaf 1 (APM 3 "CPUID Fn8000_0001_EDX").
        if (leaf.Function == 0x8000_0001)
        {
            foreach (var feature in CpuFeature.All)
            {
                if (feature is { Leaf: 1, Register: CpuidRegister.Edx, Bit: <= 9 or (>= 12 and <= 17) or 23 or 24 } && !_features.Contains(feature))
                {
                    leaf.Edx &= ~(1u << feature.Bit);
                }
            }
        }
    }

    private void SetBrand(ref CpuidEntry leaf)
    {
        var text = new byte[48];
        Encoding.ASCII.GetBytes($"KvmSharp {BaseName} processor", text);
        var part = text.AsSpan((int)(leaf.Function - 0x8000_0002) * 16);
        leaf.Eax = BitConverter.ToUInt32(part);
        leaf.Ebx = BitConverter.ToUInt32(part[4..]);
        leaf.Ecx = BitConverter.ToUInt32(part[8..]);
        leaf.Edx = BitConverter.ToUInt32(part[12..]);
    }
}
