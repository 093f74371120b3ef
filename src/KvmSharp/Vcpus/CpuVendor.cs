using System.Text;

namespace KvmSharp;

/// <summary>Who made a processor.</summary>
public enum CpuVendor
{
    /// <summary>AMD.</summary>
    AuthenticAmd,
    /// <summary>Intel.</summary>
    GenuineIntel,
}

/// <summary>What CPUID says about the maker, and what only one maker's processors have.</summary>
internal static class CpuVendorLeaves
{
    private const uint LastExtendedLeaf = 0x8000_0008; // of Intel's processors

    // SDM 2A "CPUID", "Version Information": family 6, model 94, stepping 3.
    private const uint IntelSignature = 0x0005_06e3;

    // SDM 2A "CPUID", "Encoding of CPUID Leaf 2 Descriptors": leaf 4 describes the caches; TLBs are not described.
    private const uint DescriptorsElsewhere = 0x00fe_ff01;

    // SDM 2A "CPUID", "Extended Processor Signature and Feature Bits": SYSCALL, NX, 1-GByte pages, RDTSCP, 64-bit mode.
    private const uint IntelExtendedFeatures = 1 << 11 | 1 << 20 | 1 << 26 | 1 << 27 | 1 << 29;

    public static string NameOf(CpuVendor vendor) => vendor switch
    {
        CpuVendor.AuthenticAmd => "AuthenticAMD",
        CpuVendor.GenuineIntel => "GenuineIntel",
        _ => throw new ArgumentOutOfRangeException(nameof(vendor)),
    };

    public static bool Has(CpuVendor vendor, in CpuidEntry leaf) =>
        vendor == CpuVendor.AuthenticAmd || leaf.Function is < 0x8000_0000 or <= LastExtendedLeaf;

    public static void Set(CpuVendor vendor, ref CpuidEntry leaf)
    {
        if (leaf.Function is 0 or 0x8000_0000)
        {
            var name = Encoding.ASCII.GetBytes(NameOf(vendor));
            leaf.Ebx = BitConverter.ToUInt32(name, 0);
            leaf.Edx = BitConverter.ToUInt32(name, 4);
            leaf.Ecx = BitConverter.ToUInt32(name, 8);
        }
        if (vendor == CpuVendor.GenuineIntel)
        {
            SetIntel(ref leaf);
        }
    }

    // The core describes an AMD processor.
    private static void SetIntel(ref CpuidEntry leaf)
    {
        switch (leaf.Function)
        {
            case 1:
                leaf.Eax = IntelSignature;
                break;
            case 2:
                leaf.Eax = DescriptorsElsewhere;
                break;
            case 0x8000_0000:
                (leaf.Eax, leaf.Ebx, leaf.Ecx, leaf.Edx) = (LastExtendedLeaf, 0, 0, 0);
                break;
            case 0x8000_0001:
                leaf.Eax = 0;
                leaf.Edx &= IntelExtendedFeatures;
                break;
            case 0x8000_0005:
                (leaf.Eax, leaf.Ebx, leaf.Ecx, leaf.Edx) = (0, 0, 0, 0);
                break;
            case 0x8000_0006:
                (leaf.Eax, leaf.Ebx, leaf.Edx) = (0, 0, 0);
                leaf.Ecx &= 0xffff_f0ff;
                break;
        }
    }
}
