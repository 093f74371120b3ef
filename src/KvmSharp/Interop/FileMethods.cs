using System.Runtime.InteropServices;
using Microsoft.Win32.SafeHandles;

namespace KvmSharp.Interop;

/// <summary>What the class library does not offer for files: holes, and flushing without the file's times. All of it is libc.</summary>
internal static partial class FileMethods
{
    internal const int PermissionDenied = 13;
    internal const int FileTooBig = 27;
    internal const int NoSpace = 28;
    internal const int ReadOnlyFileSystem = 30;
    internal const int QuotaExceeded = 122;

    private const string Libc = "libc";

    // linux/falloc.h
    private const int KeepSize = 1;
    private const int PunchHoleMode = 2;
    private const int ZeroRangeMode = 16;

    // lseek(2)
    private const int SeekEnd = 2;
    private const int SeekData = 3;
    private const int SeekHole = 4;

    private const int Interrupted = 4;
    private const int NoSuchOffset = 6;

    /// <summary>Gives the space of a range back; it reads as zero afterwards. False if the file system cannot.</summary>
    internal static bool TryPunchHole(SafeFileHandle file, long offset, long length) =>
        Retry(() => Fallocate(file, PunchHoleMode | KeepSize, offset, length)) == 0;

    /// <summary>Makes a range read as zero and keeps its space. False if the file system cannot.</summary>
    internal static bool TryZeroRange(SafeFileHandle file, long offset, long length) =>
        Retry(() => Fallocate(file, ZeroRangeMode | KeepSize, offset, length)) == 0;

    /// <summary>Waits until the content is on stable storage. Returns 0 or an errno value.</summary>
    internal static int FlushData(SafeFileHandle file) => Retry(() => Fdatasync(file)) == 0 ? 0 : Marshal.GetLastPInvokeError();

    /// <summary>The size of a file or block device, or a negative value.</summary>
    internal static long Size(SafeFileHandle file) => Seek(file, 0, SeekEnd);

    /// <summary>The offset of the next data at or after an offset; null if the rest is a hole or holes are not known.</summary>
    internal static long? NextData(SafeFileHandle file, long offset, out bool known)
    {
        var result = Seek(file, offset, SeekData);
        known = result >= 0 || Marshal.GetLastPInvokeError() == NoSuchOffset;
        return result >= 0 ? result : null;
    }

    /// <summary>The offset of the next hole at or after an offset, the end of the file at the latest; negative if not known.</summary>
    internal static long NextHole(SafeFileHandle file, long offset) => Seek(file, offset, SeekHole);

    private static int Retry(Func<int> call)
    {
        int result;
        do
        {
            result = call();
        }
        while (result != 0 && Marshal.GetLastPInvokeError() == Interrupted);
        return result;
    }

    [LibraryImport(Libc, EntryPoint = "fallocate", SetLastError = true)]
    private static partial int Fallocate(SafeFileHandle file, int mode, long offset, long length);

    [LibraryImport(Libc, EntryPoint = "fdatasync", SetLastError = true)]
    private static partial int Fdatasync(SafeFileHandle file);

    [LibraryImport(Libc, EntryPoint = "lseek", SetLastError = true)]
    private static partial long Seek(SafeFileHandle file, long offset, int origin);
}
