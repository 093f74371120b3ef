namespace KvmSharp.Boot;

/// <summary>The bytes of a kernel or initial RAM disk, and what messages call them.</summary>
public sealed class BootImage
{
    /// <summary>The largest image that is read, in bytes.</summary>
    public const int MaxLength = 0x7fff_0000;

    private BootImage(string name, ReadOnlyMemory<byte> bytes)
    {
        Name = name;
        Bytes = bytes;
    }

    /// <summary>What messages call it, for example the path.</summary>
    public string Name { get; }

    /// <summary>The content.</summary>
    public ReadOnlyMemory<byte> Bytes { get; }

    /// <summary>Makes an image of bytes in memory.</summary>
    /// <param name="bytes">The content; not copied.</param>
    /// <param name="name">What messages call it.</param>
    public static BootImage FromBytes(ReadOnlyMemory<byte> bytes, string name = "image") => new(name, bytes);

    /// <summary>Reads a file.</summary>
    /// <param name="path">The path; a pipe will do.</param>
    /// <exception cref="BootImageException">The file is missing, unreadable, a directory, empty, or larger than <see cref="MaxLength"/>.</exception>
    public static BootImage FromFile(string path)
    {
        ArgumentNullException.ThrowIfNull(path);
        if (path.Length == 0 || path.Contains('\0', StringComparison.Ordinal))
        {
            throw new BootImageException(BootImageProblem.Unreadable, $"'{path.Replace('\0', '?')}' is not a file name.");
        }
        if (Directory.Exists(path))
        {
            throw new BootImageException(BootImageProblem.Unreadable, $"'{path}' is a directory.");
        }
        try
        {
            using var file = new FileStream(path, FileMode.Open, FileAccess.Read, FileShare.ReadWrite | FileShare.Delete, 1);
            var bytes = file.CanSeek && file.Length > 0 ? ReadFile(file, path) : ReadPipe(file, path);
            return bytes.Length != 0 ? new BootImage(path, bytes) : throw new BootImageException(BootImageProblem.Empty, $"'{path}' is empty.");
        }
        catch (FileNotFoundException e)
        {
            throw new BootImageException(BootImageProblem.Unreadable, $"'{path}' does not exist.", e);
        }
        catch (DirectoryNotFoundException e)
        {
            throw new BootImageException(BootImageProblem.Unreadable, $"'{path}' does not exist.", e);
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException or NotSupportedException)
        {
            throw new BootImageException(BootImageProblem.Unreadable, $"'{path}' cannot be read: {e.Message}", e);
        }
    }

    private static byte[] ReadFile(FileStream file, string path)
    {
        if (file.Length > MaxLength)
        {
            throw TooLarge(path);
        }
        var bytes = new byte[file.Length];
        var count = file.ReadAtLeast(bytes, bytes.Length, throwOnEndOfStream: false);
        return count == bytes.Length ? bytes : bytes[..count];
    }

    private static byte[] ReadPipe(FileStream file, string path)
    {
        using var content = new MemoryStream();
        var buffer = new byte[81920];
        int count;
        while ((count = file.Read(buffer)) > 0)
        {
            if (content.Length + count > MaxLength)
            {
                throw TooLarge(path);
            }
            content.Write(buffer, 0, count);
        }
        return content.ToArray();
    }

    private static BootImageException TooLarge(string path) => new(BootImageProblem.TooLarge, $"'{path}' is larger than {MaxLength} bytes.");
}
