using System.Buffers;

namespace KvmSharp.Storage;

/// <summary>What a block backend can do beyond reading and writing.</summary>
[Flags]
public enum BlockCapabilities
{
    /// <summary>Nothing.</summary>
    None = 0,
    /// <summary><see cref="IBlockBackend.Discard"/> gives space back.</summary>
    Discard = 1,
    /// <summary><see cref="IBlockBackend.WriteZeroes"/> is faster than writing zeros.</summary>
    WriteZeroes = 2,
}

/// <summary>A piece of a disk whose content is of one kind.</summary>
/// <param name="Length">How many bytes from the asked offset on, at least one sector.</param>
/// <param name="IsZero">Whether all of it reads as zero; otherwise nothing is known about the content.</param>
public readonly record struct BlockExtent(long Length, bool IsZero);

/// <summary>
/// A disk: what a block device of the guest reads and writes. Implement <see cref="Length"/>, <see cref="Read"/>,
/// <see cref="Write"/> and <see cref="Flush"/> to give a guest a disk of your own; the other members have defaults.
/// </summary>
/// <remarks>
/// Offsets and lengths are bytes in multiples of <see cref="SectorSize"/>. Calls come from I/O threads and may block; several
/// can be under way at once. What overlapping requests leave behind is undefined, but each sector then holds what one of them
/// wrote. A failure is a <see cref="StorageException"/>; the guest sees an I/O error. Data is durable once a
/// <see cref="Flush"/> that began after the end of the write has returned.
/// </remarks>
public interface IBlockBackend : IDisposable
{
    /// <summary>The size of the disk in bytes, a multiple of <see cref="SectorSize"/>; it does not change.</summary>
    long Length { get; }

    /// <summary>The unit of requests in bytes: a power of two from 512 to 4096.</summary>
    int SectorSize => 512;

    /// <summary>Whether writes are refused.</summary>
    bool IsReadOnly => false;

    /// <summary>What the backend can do beyond reading and writing.</summary>
    BlockCapabilities Capabilities => BlockCapabilities.None;

    /// <summary>The unit, in bytes, in which discarding gives space back.</summary>
    int DiscardGranularity => SectorSize;

    /// <summary>Reads a range.</summary>
    /// <param name="offset">The first byte.</param>
    /// <param name="buffer">Where the content goes; filled completely.</param>
    /// <exception cref="StorageException">The range is invalid or cannot be read.</exception>
    void Read(long offset, Span<byte> buffer);

    /// <summary>Writes a range.</summary>
    /// <param name="offset">The first byte.</param>
    /// <param name="data">The new content.</param>
    /// <exception cref="StorageException">The range is invalid or cannot be written.</exception>
    void Write(long offset, ReadOnlySpan<byte> data);

    /// <summary>Makes everything durable that was written before the call.</summary>
    /// <exception cref="StorageException">The host could not store it; it may be lost.</exception>
    void Flush();

    /// <summary>Tells that a range is not needed. Each sector of it keeps its content or reads as zero afterwards.</summary>
    /// <param name="offset">The first byte.</param>
    /// <param name="length">The number of bytes.</param>
    /// <exception cref="StorageException">The range is invalid or the backend cannot be written.</exception>
    void Discard(long offset, long length) => BlockRange.CheckWrite(this, offset, length);

    /// <summary>Makes a range read as zero.</summary>
    /// <param name="offset">The first byte.</param>
    /// <param name="length">The number of bytes.</param>
    /// <param name="mayDiscard">Whether the space may be given back; if not, a later write there needs no new space.</param>
    /// <exception cref="StorageException">The range is invalid or cannot be written.</exception>
    void WriteZeroes(long offset, long length, bool mayDiscard)
    {
        BlockRange.CheckWrite(this, offset, length);
        BlockRange.FillWithZeroes(offset, length, Write);
    }

    /// <summary>Tells what is known about the content from an offset on, so that copying can leave out what is zero.</summary>
    /// <param name="offset">The first byte.</param>
    /// <param name="length">How far to look, in bytes; at least one sector.</param>
    /// <returns>A piece that begins at <paramref name="offset"/> and is not longer than <paramref name="length"/>.</returns>
    /// <exception cref="StorageException">The range is invalid or cannot be read.</exception>
    BlockExtent GetExtent(long offset, long length)
    {
        BlockRange.Check(this, offset, length);
        return new BlockExtent(length, false);
    }
}

/// <summary>Checks and loops that every backend needs.</summary>
internal static class BlockRange
{
    internal const int DefaultSectorSize = 512;
    private const int ChunkSize = 1 << 18;

    internal delegate void Writer(long offset, ReadOnlySpan<byte> data);

    internal static void Check(IBlockBackend backend, long offset, long length)
    {
        if ((ulong)offset > (ulong)backend.Length || (ulong)length > (ulong)(backend.Length - offset))
        {
            throw new StorageException(
                StorageProblem.OutOfRange, $"The request for {length} bytes at {offset} is beyond the end of the disk, {backend.Length}.");
        }
        if (((offset | length) & (backend.SectorSize - 1)) != 0)
        {
            throw new StorageException(
                StorageProblem.OutOfRange, $"The request for {length} bytes at {offset} is not in whole sectors of {backend.SectorSize} bytes.");
        }
    }

    internal static void CheckWrite(IBlockBackend backend, long offset, long length)
    {
        Check(backend, offset, length);
        if (backend.IsReadOnly)
        {
            throw new StorageException(StorageProblem.ReadOnly, "The disk cannot be written.");
        }
    }

    internal static void FillWithZeroes(long offset, long length, Writer write)
    {
        var size = (int)Math.Min(length, ChunkSize);
        var zeroes = ArrayPool<byte>.Shared.Rent(size);
        try
        {
            zeroes.AsSpan(0, size).Clear();
            while (length > 0)
            {
                var count = (int)Math.Min(length, size);
                write(offset, zeroes.AsSpan(0, count));
                offset += count;
                length -= count;
            }
        }
        finally
        {
            ArrayPool<byte>.Shared.Return(zeroes);
        }
    }

    /// <summary>Reads from a backend that may be shorter than the range; what is beyond its end is zero.</summary>
    internal static void ReadOrZero(IBlockBackend backend, long offset, Span<byte> buffer)
    {
        var present = (int)Math.Clamp(backend.Length - offset, 0, buffer.Length);
        if (present > 0)
        {
            backend.Read(offset, buffer[..present]);
        }
        buffer[present..].Clear();
    }

    internal static bool IsZero(ReadOnlySpan<byte> data) => !data.ContainsAnyExcept((byte)0);
}
