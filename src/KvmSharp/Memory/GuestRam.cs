using KvmSharp.Interop;

namespace KvmSharp;

/// <summary>
/// A piece of host memory that can back guest memory, in one slot or in several. It lives as long as its owner or a slot
/// needs it, so that disposal is safe in any order. All members are callable from any thread.
/// </summary>
public sealed unsafe class GuestRam : IDisposable
{
    private int _mapped;

    /// <summary>Allocates memory that reads as zero. Pages cost host memory when they are first touched.</summary>
    /// <param name="size">The size in bytes, a multiple of 4096 and at least 4096.</param>
    /// <exception cref="KvmSharpException">The size is invalid or the host has no memory left.</exception>
    public GuestRam(ulong size)
    {
        if (size == 0 || size % GuestMemory.PageSize != 0 || size > GuestMemory.MaxSize)
        {
            throw new KvmSharpException(KvmSharpErrorCode.InvalidArgument, $"The memory size {size} is not a positive multiple of 4096 bytes in range.");
        }
        NativeLibraryLoader.EnsureLoaded();
        var result = NativeMethods.RamCreate(size, out var handle);
        if (result < 0)
        {
            handle.SetHandleAsInvalid();
            throw NativeResult.ToException(result, $"allocate {size} bytes of guest memory");
        }
        Handle = handle;
        Size = size;
        Address = NativeMethods.RamAddress(handle);
    }

    /// <summary>The size in bytes.</summary>
    public ulong Size { get; }

    internal RamHandle Handle { get; }

    internal byte* Address { get; }

    /// <summary>Fills memory that no slot maps yet, for example with the content of a ROM.</summary>
    /// <param name="offset">Where to write, in bytes from the start.</param>
    /// <param name="data">What to write.</param>
    /// <exception cref="InvalidOperationException">A slot maps the memory already; use <see cref="GuestMemory.Write(GuestAddress, ReadOnlySpan{byte})"/>.</exception>
    public void Write(ulong offset, ReadOnlySpan<byte> data)
    {
        if (offset > Size || (ulong)data.Length > Size - offset)
        {
            throw new ArgumentOutOfRangeException(nameof(offset));
        }
        if (Volatile.Read(ref _mapped) != 0)
        {
            throw new InvalidOperationException("The memory is mapped into a guest; write through GuestMemory.");
        }
        var added = false;
        try
        {
            Handle.DangerousAddRef(ref added);
            data.CopyTo(new Span<byte>(Address + offset, data.Length));
        }
        finally
        {
            if (added)
            {
                Handle.DangerousRelease();
            }
        }
    }

    /// <summary>
    /// Reads what the guest sees there. The owner calls this and <see cref="WriteUnseen"/> while it holds the memory.
    /// </summary>
    internal void ReadRaw(ulong offset, Span<byte> data)
    {
        CheckRange(offset, data.Length);
        new ReadOnlySpan<byte>(Address + offset, data.Length).CopyTo(data);
    }

    /// <summary>Writes past the dirty log and the decoded code: for a part from which no guest executes at the moment.</summary>
    internal void WriteUnseen(ulong offset, ReadOnlySpan<byte> data)
    {
        CheckRange(offset, data.Length);
        data.CopyTo(new Span<byte>(Address + offset, data.Length));
    }

    private void CheckRange(ulong offset, int length)
    {
        ObjectDisposedException.ThrowIf(Handle.IsClosed, this);
        if (offset > Size || (ulong)length > Size - offset)
        {
            throw new ArgumentOutOfRangeException(nameof(offset));
        }
    }

    /// <summary>Gives up this owner's reference; slots keep theirs.</summary>
    public void Dispose() => Handle.Dispose();

    internal void MarkMapped() => Volatile.Write(ref _mapped, 1);
}
