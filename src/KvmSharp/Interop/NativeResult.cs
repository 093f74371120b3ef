using System.Runtime.InteropServices;

namespace KvmSharp.Interop;

internal static unsafe class NativeResult
{
    /// <summary>Turns a negative result of the core into an exception.</summary>
    /// <param name="result">The result.</param>
    /// <param name="action">What was tried, to complete "Cannot ...".</param>
    internal static int ThrowIfFailed(this int result, string action)
    {
        if (result < 0)
        {
            throw ToException(result, action);
        }
        return result;
    }

    internal static KvmSharpException ToException(int result, string action)
    {
        var text = Marshal.PtrToStringUTF8((nint)NativeMethods.StrError(result)) ?? "unknown error";
        var code = Enum.IsDefined((KvmSharpErrorCode)(-result)) ? (KvmSharpErrorCode)(-result) : KvmSharpErrorCode.Unknown;
        return new KvmSharpException(code, $"Cannot {action}: {text}.");
    }
}
