using System.Runtime.InteropServices;

namespace KvmSharp.Interop;

/// <summary>What .NET does not offer on memory.</summary>
internal static unsafe partial class MemoryMethods
{
    private const int MadviseRemove = 9; // MADV_REMOVE: Linux "madvise(2)"

    /// <summary>Frees the pages of a shared mapping; a host that cannot keeps them, zeroed.</summary>
    public static void Release(byte* address, ulong length)
    {
        if (Madvise(address, (nuint)length, MadviseRemove) != 0)
        {
            NativeMemory.Clear(address, (nuint)length);
        }
    }

    [LibraryImport("libc", EntryPoint = "madvise")]
    private static partial int Madvise(void* address, nuint length, int advice);
}
