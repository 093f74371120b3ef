using System.Text;
using KvmSharp.Interop;

namespace KvmSharp;

/// <summary>Shows machine code as text.</summary>
public static unsafe class Disassembler
{
    /// <summary>Disassembles one instruction in Intel syntax.</summary>
    /// <param name="code">The bytes, starting at the instruction.</param>
    /// <param name="bits">The width of the code: 16, 32 or 64.</param>
    /// <param name="instructionPointer">The address of the instruction, for relative targets.</param>
    /// <param name="text">The text; <c>(bad)</c> for bytes that are no instruction.</param>
    /// <returns>The length of the instruction in bytes; 0 for bytes that are none.</returns>
    /// <exception cref="NativeLibraryException">The core cannot be loaded.</exception>
    public static int Disassemble(ReadOnlySpan<byte> code, int bits, ulong instructionPointer, out string text)
    {
        if (bits is not (16 or 32 or 64))
        {
            throw new ArgumentOutOfRangeException(nameof(bits), bits, "Code is 16, 32 or 64 bits wide.");
        }
        NativeLibraryLoader.EnsureLoaded();
        Span<byte> buffer = stackalloc byte[256];
        buffer.Clear();
        fixed (byte* p = code)
        fixed (byte* q = buffer)
        {
            var length = NativeMethods.Disassemble(p, (uint)code.Length, (uint)bits, instructionPointer, q, (uint)buffer.Length)
                .ThrowIfFailed("disassemble");
            text = Encoding.UTF8.GetString(buffer[..buffer.IndexOf((byte)0)]);
            return length;
        }
    }
}
