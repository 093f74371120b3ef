namespace KvmSharp.Interop;

internal static unsafe class SupportedCpuid
{
    /// <summary>What CPUID the core can offer.</summary>
    internal static CpuidEntry[] Get()
    {
        NativeLibraryLoader.EnsureLoaded();
        var entries = new CpuidEntry[256];
        var count = (uint)entries.Length;
        fixed (CpuidEntry* p = entries)
        {
            NativeMethods.GetSupportedCpuid(p, &count).ThrowIfFailed("read the supported CPUID leaves");
        }
        return entries[..(int)count];
    }
}
