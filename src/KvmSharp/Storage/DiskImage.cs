using System.Buffers;

namespace KvmSharp.Storage;

/// <summary>The formats of disk images.</summary>
public enum ImageFormat
{
    /// <summary>The content of the disk, byte for byte.</summary>
    Raw,
    /// <summary>The format of QEMU, version 2 or 3, in which only what was written takes space.</summary>
    Qcow2,
}

/// <summary>How to open a disk image.</summary>
public sealed class DiskImageOptions
{
    /// <summary>The format, or null to find out from the content.</summary>
    public ImageFormat? Format { get; init; }

    /// <summary>Whether to open the image for reading only.</summary>
    public bool ReadOnly { get; init; }

    /// <summary>
    /// How many backing files may be followed, one behind the other; 0 refuses images that need one. The names come from the
    /// images: with a depth above 0, an image can make this process read any file that it may read. A guest can make its raw
    /// disk look like such an image, so give <see cref="Format"/>, too, for a disk that a guest wrote to.
    /// </summary>
    public int MaxBackingDepth { get; init; }

    /// <summary>How much memory each of the two caches of tables may take per qcow2 image, in bytes.</summary>
    public long CacheBytes { get; init; } = 8 << 20;
}

/// <summary>Opens, creates and copies disk images in files, whatever their format.</summary>
public static class DiskImage
{
    /// <summary>The largest <see cref="DiskImageOptions.MaxBackingDepth"/>.</summary>
    public const int BackingDepthLimit = 64;

    private const int CopySize = 1 << 20;
    private const int ZeroGranularity = 4096;

    /// <summary>Finds out the format of an image: qcow2 if it begins like one, otherwise raw.</summary>
    /// <param name="path">The file.</param>
    /// <exception cref="StorageException">The file cannot be read.</exception>
    public static ImageFormat DetectFormat(string path)
    {
        using var store = FileImageStore.Open(path, readOnly: true);
        return DetectFormat(store);
    }

    /// <summary>Opens an image.</summary>
    /// <param name="path">The file.</param>
    /// <param name="options">How to open it.</param>
    /// <exception cref="StorageException">The image cannot be opened or is damaged.</exception>
    public static IBlockBackend Open(string path, DiskImageOptions? options = null)
    {
        options ??= new DiskImageOptions();
        if (options.MaxBackingDepth is < 0 or > BackingDepthLimit)
        {
            throw new ArgumentOutOfRangeException(nameof(options), $"The depth of backing files is 0 to {BackingDepthLimit}.");
        }
        return OpenChain(path, options, options.MaxBackingDepth, []);
    }

    /// <summary>Creates an image without any data.</summary>
    /// <param name="path">The file; it must not exist.</param>
    /// <param name="format">Its format.</param>
    /// <param name="length">The size of the disk in bytes, a multiple of 512.</param>
    /// <param name="options">More about a qcow2 image; not allowed for raw ones.</param>
    /// <exception cref="ArgumentException">An option is out of range, or options contradict each other.</exception>
    /// <exception cref="StorageException">The file cannot be created, or the format cannot hold such a disk.</exception>
    public static void Create(string path, ImageFormat format, long length, Qcow2CreateOptions? options = null)
    {
        Qcow2Image.CheckCreation(length, options ?? new Qcow2CreateOptions());
        if (format == ImageFormat.Raw && options is not null)
        {
            throw new ArgumentException("A raw image has no options.", nameof(options));
        }
        var store = FileImageStore.Create(path);
        try
        {
            if (format == ImageFormat.Qcow2)
            {
                Qcow2Image.Create(store, length, options);
            }
            else
            {
                store.SetLength(length);
            }
            store.Dispose();
        }
        catch
        {
            store.Dispose();
            File.Delete(path);
            throw;
        }
    }

    /// <summary>Copies the content of a disk to another one that is at least as large and reads as zero. Zeros are left out.</summary>
    /// <param name="source">What to copy.</param>
    /// <param name="target">Where it goes. It is flushed at the end.</param>
    /// <param name="progress">Told how many bytes are done, in order.</param>
    /// <param name="cancellation">Ends the copying early.</param>
    /// <returns>How many bytes were written.</returns>
    /// <exception cref="StorageException">A disk failed, or the target is smaller.</exception>
    public static long Copy(IBlockBackend source, IBlockBackend target, IProgress<long>? progress = null, CancellationToken cancellation = default)
    {
        ArgumentNullException.ThrowIfNull(source);
        ArgumentNullException.ThrowIfNull(target);
        if (target.Length < source.Length)
        {
            throw new StorageException(StorageProblem.OutOfRange, $"A disk of {source.Length} bytes does not fit into one of {target.Length} bytes.");
        }
        var written = 0L;
        var buffer = ArrayPool<byte>.Shared.Rent(CopySize);
        try
        {
            for (var offset = 0L; offset < source.Length;)
            {
                cancellation.ThrowIfCancellationRequested();
                var extent = source.GetExtent(offset, source.Length - offset);
                if (extent.Length <= 0)
                {
                    throw new StorageException(StorageProblem.InputOutput, "The source disk tells of a piece without length.");
                }
                var end = offset + extent.Length;
                while (!extent.IsZero && offset < end)
                {
                    cancellation.ThrowIfCancellationRequested();
                    var count = (int)Math.Min(end - offset, CopySize);
                    source.Read(offset, buffer.AsSpan(0, count));
                    written += WriteNonZero(target, offset, buffer.AsSpan(0, count));
                    offset += count;
                    progress?.Report(offset);
                }
                offset = end;
                progress?.Report(offset);
            }
        }
        finally
        {
            ArrayPool<byte>.Shared.Return(buffer);
        }
        target.Flush();
        return written;
    }

    internal static ImageFormat DetectFormat(IImageStore store) => Qcow2Header.HasMagic(store) ? ImageFormat.Qcow2 : ImageFormat.Raw;

    internal static string ToName(this ImageFormat format) => format == ImageFormat.Qcow2 ? "qcow2" : "raw";

    private static long WriteNonZero(IBlockBackend target, long offset, ReadOnlySpan<byte> data)
    {
        var written = 0L;
        var granularity = Math.Max(ZeroGranularity, target.SectorSize);
        for (var from = 0; from < data.Length;)
        {
            var to = from;
            while (to < data.Length && !BlockRange.IsZero(data[to..Math.Min(to + granularity, data.Length)]))
            {
                to = Math.Min(to + granularity, data.Length);
            }
            if (to > from)
            {
                target.Write(offset + from, data[from..to]);
                written += to - from;
            }
            from = Math.Min(to + granularity, data.Length);
        }
        return written;
    }

    private static IBlockBackend OpenChain(string path, DiskImageOptions options, int depth, HashSet<string> chain)
    {
        path = ResolveLinks(path);
        if (!chain.Add(path))
        {
            throw new StorageException(StorageProblem.BackingFile, $"'{path}' is its own backing file.");
        }
        var store = FileImageStore.Open(path, options.ReadOnly);
        try
        {
            if ((options.Format ?? DetectFormat(store)) == ImageFormat.Raw)
            {
                return new RawBlockBackend(store);
            }
            var header = Qcow2Header.Read(store);
            if (header.BackingFile is not null && depth == 0 && chain.Count > 1)
            {
                throw new StorageException(StorageProblem.BackingFile, $"'{path}' has a backing file, too, which is more than are allowed behind each other.");
            }
            var backing = header.BackingFile is { } name && depth > 0 ? OpenBacking(path, name, header.BackingFormat, options, depth, chain) : null;
            // Takes over the store and the backing disk, also when it fails.
            return Qcow2Image.Open(store, new Qcow2OpenOptions { ReadOnly = options.ReadOnly, CacheBytes = options.CacheBytes, Backing = backing });
        }
        catch
        {
            store.Dispose();
            throw;
        }
    }

    private static IBlockBackend OpenBacking(
        string path, string name, string? formatName, DiskImageOptions options, int depth, HashSet<string> chain)
    {
        // A raw backing file must not be taken for something else because of what a guest wrote to it.
        ImageFormat format = formatName switch
        {
            "raw" => ImageFormat.Raw,
            "qcow2" => ImageFormat.Qcow2,
            null => throw new StorageException(StorageProblem.BackingFile, $"'{path}' does not say of which format its backing file '{name}' is."),
            _ => throw new StorageException(StorageProblem.Unsupported, $"The backing file '{name}' has the format '{formatName}', which is not supported."),
        };
        if (name.StartsWith("file:", StringComparison.Ordinal))
        {
            name = name["file:".Length..];
        }
        else if (name.IndexOf(':') is var colon and > 0 && name.IndexOf('/') is var slash && (slash < 0 || colon < slash))
        {
            throw new StorageException(StorageProblem.Unsupported, $"The backing file '{name}' is not a plain file.");
        }
        var directory = Path.GetDirectoryName(path) ?? "/";
        try
        {
            return OpenChain(
                Path.Combine(directory, name), new DiskImageOptions { Format = format, ReadOnly = true, CacheBytes = options.CacheBytes },
                depth - 1, chain);
        }
        catch (StorageException exception) when (exception.Problem is StorageProblem.Unreadable or StorageProblem.InUse)
        {
            throw new StorageException(StorageProblem.BackingFile, $"The backing file of '{path}' cannot be used: {exception.Message}", exception);
        }
    }

    private static string ResolveLinks(string path)
    {
        ArgumentException.ThrowIfNullOrEmpty(path);
        path = Path.GetFullPath(path);
        try
        {
            return File.ResolveLinkTarget(path, returnFinalTarget: true)?.FullName ?? path;
        }
        catch (Exception exception) when (exception is IOException or UnauthorizedAccessException)
        {
            // Opening says what is wrong.
            return path;
        }
    }
}
