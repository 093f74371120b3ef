using System.Numerics;

namespace KvmSharp;

/// <summary>What CPUID says about the processors of a machine: one package whose cores have one thread each.</summary>
internal static class CpuTopology
{
    private const uint HyperThreading = 1u << 28;  // more than one logical processor in the package
    private const uint LegacyMultiCore = 1u << 1;  // APM 3 "CPUID Fn8000_0001_ECX": those are cores, not threads
    private const int MaxCoresInLeaf4 = 64;

    public static void Set(CpuVendor vendor, int index, int count, ref CpuidEntry leaf)
    {
        var idBits = BitOperations.Log2(BitOperations.RoundUpToPowerOf2((uint)count));
        switch (leaf.Function)
        {
            case 1:
                leaf.Ebx = (leaf.Ebx & 0x0000_ffff) | ((uint)Math.Min(count, 255) << 16) | ((uint)index << 24);
                leaf.Edx = count > 1 ? leaf.Edx | HyperThreading : leaf.Edx & ~HyperThreading;
                break;
            // SDM 2A "CPUID", "Deterministic Cache Parameters Leaf": ids of cores in the package; caches are not shared.
            case 4 when vendor == CpuVendor.GenuineIntel && leaf.Eax != 0:
                leaf.Eax = (leaf.Eax & 0x0000_3fff) | ((uint)Math.Min(1 << idBits, MaxCoresInLeaf4) - 1) << 26;
                break;
            // SDM 2A "CPUID", "Extended Topology Enumeration Leaf": threads of a core, cores of the package.
            case 0xb or 0x1f:
                leaf.Edx = (uint)index;
                if (leaf.Index == 1)
                {
                    (leaf.Eax, leaf.Ebx) = ((uint)idBits, (uint)count);
                }
                break;
            case 0x8000_0001 when vendor == CpuVendor.AuthenticAmd:
                leaf.Ecx = count > 1 ? leaf.Ecx | LegacyMultiCore : leaf.Ecx & ~LegacyMultiCore;
                break;
            // APM 3 "CPUID Fn8000_0008_ECX": number of cores less one, bits of the APIC id that number them.
            case 0x8000_0008 when vendor == CpuVendor.AuthenticAmd:
                leaf.Ecx = (uint)(count - 1) | (uint)idBits << 12;
                break;
        }
    }
}
