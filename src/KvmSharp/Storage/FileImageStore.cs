using KvmSharp.Interop;
using Microsoft.Win32.SafeHandles;

namespace KvmSharp.Storage;

/// <summary>
/// An image in a file, or on a block device of the host. A writer locks the file against everybody else, readers against
/// writers (advisory locks). All members are callable from any thread.
/// </summary>
public sealed class FileImageStore : IImageStore
{
    private const int DiskFullResult = unchecked((int)0x80070070);

    private readonly SafeFileHandle _file;
    private readonly bool _isDevice;
    private volatile bool _cannotPunch;
    private volatile bool _cannotZero;

    private FileImageStore(string path, SafeFileHandle file, bool isReadOnly)
    {
        Path = path;
        _file = file;
        IsReadOnly = isReadOnly;
        // A device has no length of its own; the end that a seek finds does not move.
        _isDevice = RandomAccess.GetLength(file) == 0 && FileMethods.Size(file) > 0;
    }

    /// <summary>The file, as an absolute path.</summary>
    public string Path { get; }

    /// <inheritdoc/>
    public bool IsReadOnly { get; }

    /// <inheritdoc/>
    public bool CanReleaseSpace => !IsReadOnly && !_cannotPunch;

    /// <inheritdoc/>
    public long Length => _isDevice ? FileMethods.Size(_file) : Wrap("read", static store => RandomAccess.GetLength(store._file));

    /// <summary>Opens an existing file.</summary>
    /// <param name="path">The file.</param>
    /// <param name="readOnly">Whether to open it for reading only.</param>
    /// <exception cref="StorageException">The file cannot be opened, or somebody else uses it.</exception>
    public static FileImageStore Open(string path, bool readOnly)
    {
        ArgumentException.ThrowIfNullOrEmpty(path);
        path = System.IO.Path.GetFullPath(path);
        if (Directory.Exists(path))
        {
            throw new StorageException(StorageProblem.Unreadable, $"'{path}' is a directory.");
        }
        return Open(path, FileMode.Open, readOnly);
    }

    /// <summary>Creates an empty file.</summary>
    /// <param name="path">The file.</param>
    /// <param name="overwrite">Whether a file that exists already loses its content; otherwise it is an error.</param>
    /// <exception cref="StorageException">The file cannot be created.</exception>
    public static FileImageStore Create(string path, bool overwrite = false)
    {
        ArgumentException.ThrowIfNullOrEmpty(path);
        path = System.IO.Path.GetFullPath(path);
        if (!overwrite && File.Exists(path))
        {
            throw new StorageException(StorageProblem.AlreadyExists, $"'{path}' exists already.");
        }
        // Not FileMode.Create, which would cut the file before the lock on it is taken.
        var store = Open(path, overwrite ? FileMode.OpenOrCreate : FileMode.CreateNew, readOnly: false);
        try
        {
            store.SetLength(0);
            return store;
        }
        catch
        {
            store.Dispose();
            throw;
        }
    }

    /// <inheritdoc/>
    public void Read(long offset, Span<byte> buffer)
    {
        try
        {
            while (buffer.Length > 0)
            {
                var count = RandomAccess.Read(_file, buffer, offset);
                if (count == 0)
                {
                    buffer.Clear();
                    return;
                }
                offset += count;
                buffer = buffer[count..];
            }
        }
        catch (Exception exception) when (exception is IOException or UnauthorizedAccessException)
        {
            throw Failure("read", exception);
        }
    }

    /// <inheritdoc/>
    public void Write(long offset, ReadOnlySpan<byte> data)
    {
        CheckWritable();
        try
        {
            RandomAccess.Write(_file, data, offset);
        }
        catch (Exception exception) when (exception is IOException or UnauthorizedAccessException)
        {
            throw Failure("write", exception);
        }
    }

    /// <inheritdoc/>
    public void SetLength(long length)
    {
        CheckWritable();
        if (_isDevice)
        {
            if (length > Length)
            {
                throw new StorageException(StorageProblem.NoSpace, $"The device '{Path}' is full.");
            }
            return;
        }
        try
        {
            RandomAccess.SetLength(_file, length);
        }
        catch (Exception exception) when (exception is IOException or UnauthorizedAccessException)
        {
            throw Failure("resize", exception);
        }
    }

    /// <inheritdoc/>
    public void Flush()
    {
        if (!IsReadOnly && FileMethods.FlushData(_file) is var error and not 0)
        {
            throw error is FileMethods.NoSpace or FileMethods.QuotaExceeded
                ? new StorageException(StorageProblem.NoSpace, $"Cannot flush '{Path}': no space is left.")
                : new StorageException(StorageProblem.InputOutput, $"Cannot flush '{Path}': error {error}.");
        }
    }

    /// <inheritdoc/>
    public bool TryZero(long offset, long length, bool releaseSpace)
    {
        CheckWritable();
        if (length == 0)
        {
            return true;
        }
        if (releaseSpace && !_cannotPunch)
        {
            if (FileMethods.TryPunchHole(_file, offset, length))
            {
                return true;
            }
            _cannotPunch = true;
        }
        if (!releaseSpace && !_cannotZero)
        {
            if (FileMethods.TryZeroRange(_file, offset, length))
            {
                return true;
            }
            _cannotZero = true;
        }
        return false;
    }

    /// <inheritdoc/>
    public BlockExtent GetExtent(long offset, long length)
    {
        ArgumentOutOfRangeException.ThrowIfNegative(offset);
        ArgumentOutOfRangeException.ThrowIfLessThan(length, 1);
        if (_isDevice)
        {
            return new BlockExtent(length, false);
        }
        var data = FileMethods.NextData(_file, offset, out var known);
        if (data != offset)
        {
            return known ? new BlockExtent(Math.Min(length, (data ?? long.MaxValue) - offset), true) : new BlockExtent(length, false);
        }
        var hole = FileMethods.NextHole(_file, offset);
        return new BlockExtent(hole > offset ? Math.Min(length, hole - offset) : length, false);
    }

    /// <summary>Closes the file. What was not flushed is not durable.</summary>
    public void Dispose() => _file.Dispose();

    private static FileImageStore Open(string path, FileMode mode, bool readOnly)
    {
        SafeFileHandle? file = null;
        try
        {
            file = File.OpenHandle(
                path, mode, readOnly ? FileAccess.Read : FileAccess.ReadWrite, readOnly ? FileShare.Read : FileShare.None,
                FileOptions.RandomAccess);
            var store = new FileImageStore(path, file, readOnly);
            file = null;
            return store;
        }
        catch (Exception exception) when (exception is FileNotFoundException or DirectoryNotFoundException)
        {
            throw new StorageException(StorageProblem.Unreadable, $"'{path}' does not exist.", exception);
        }
        catch (UnauthorizedAccessException exception)
        {
            throw new StorageException(
                StorageProblem.Unreadable, $"'{path}' cannot be opened for {(readOnly ? "reading" : "writing")}: permission denied.", exception);
        }
        catch (IOException exception)
        {
            // flock(2) with LOCK_NB gives EWOULDBLOCK.
            const int WouldBlock = 11;
            throw exception.HResult == WouldBlock || exception.Message.Contains("used by another process", StringComparison.Ordinal)
                ? new StorageException(StorageProblem.InUse, $"'{path}' is in use.", exception)
                : mode == FileMode.CreateNew && File.Exists(path)
                    ? new StorageException(StorageProblem.AlreadyExists, $"'{path}' exists already.", exception)
                    : new StorageException(StorageProblem.Unreadable, $"'{path}' cannot be opened: {exception.Message}", exception);
        }
        catch (NotSupportedException exception)
        {
            throw new StorageException(StorageProblem.Unreadable, $"'{path}' is neither a file nor a block device.", exception);
        }
        finally
        {
            file?.Dispose();
        }
    }

    private void CheckWritable()
    {
        if (IsReadOnly)
        {
            throw new StorageException(StorageProblem.ReadOnly, $"'{Path}' is open for reading only.");
        }
    }

    private T Wrap<T>(string action, Func<FileImageStore, T> call)
    {
        try
        {
            return call(this);
        }
        catch (Exception exception) when (exception is IOException or UnauthorizedAccessException)
        {
            throw Failure(action, exception);
        }
    }

    private StorageException Failure(string action, Exception exception) => exception.HResult switch
    {
        FileMethods.NoSpace or FileMethods.QuotaExceeded or FileMethods.FileTooBig or DiskFullResult =>
            new StorageException(StorageProblem.NoSpace, $"Cannot {action} '{Path}': no space is left.", exception),
        _ => new StorageException(StorageProblem.InputOutput, $"Cannot {action} '{Path}': {exception.Message}", exception),
    };
}
