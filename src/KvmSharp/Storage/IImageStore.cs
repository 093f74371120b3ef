namespace KvmSharp.Storage;

/// <summary>
/// Where the bytes of a disk image are kept, usually a file: a sequence of bytes that can grow. Implement it to keep images
/// somewhere else; <see cref="RawBlockBackend"/> and <see cref="Qcow2Image"/> turn a store into a disk.
/// </summary>
/// <remarks>
/// Any offset and length is allowed. Calls may come from several threads at once. A failure is a
/// <see cref="StorageException"/>. Writes may reach stable storage in any order until <see cref="Flush"/> returns; image
/// formats rely on nothing else for their consistency.
/// </remarks>
public interface IImageStore : IDisposable
{
    /// <summary>The number of bytes.</summary>
    long Length { get; }

    /// <summary>Whether writes are refused.</summary>
    bool IsReadOnly { get; }

    /// <summary>Whether <see cref="TryZero"/> can give space back.</summary>
    bool CanReleaseSpace => false;

    /// <summary>Reads a range; what is beyond the end reads as zero.</summary>
    /// <param name="offset">The first byte.</param>
    /// <param name="buffer">Where the content goes; filled completely.</param>
    /// <exception cref="StorageException">The range cannot be read.</exception>
    void Read(long offset, Span<byte> buffer);

    /// <summary>Writes a range. A write beyond the end makes the store longer; what lies between reads as zero.</summary>
    /// <param name="offset">The first byte.</param>
    /// <param name="data">The new content.</param>
    /// <exception cref="StorageException">The range cannot be written.</exception>
    void Write(long offset, ReadOnlySpan<byte> data);

    /// <summary>Changes the number of bytes. New ones read as zero.</summary>
    /// <param name="length">The new number.</param>
    /// <exception cref="StorageException">The length cannot be changed.</exception>
    void SetLength(long length);

    /// <summary>Makes everything durable that was written before the call, the length included.</summary>
    /// <exception cref="StorageException">The host could not store it; it may be lost.</exception>
    void Flush();

    /// <summary>Makes a range read as zero without writing zeros, if the store can. The length stays.</summary>
    /// <param name="offset">The first byte.</param>
    /// <param name="length">The number of bytes.</param>
    /// <param name="releaseSpace">Whether to give the space back.</param>
    /// <returns>False if nothing was done.</returns>
    bool TryZero(long offset, long length, bool releaseSpace) => false;

    /// <summary>Tells what is known about the content from an offset on.</summary>
    /// <param name="offset">The first byte.</param>
    /// <param name="length">How far to look, in bytes; at least 1.</param>
    /// <returns>A piece that begins at <paramref name="offset"/> and is not longer than <paramref name="length"/>.</returns>
    BlockExtent GetExtent(long offset, long length) => new(length, false);
}
