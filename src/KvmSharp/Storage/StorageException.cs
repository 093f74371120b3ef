namespace KvmSharp.Storage;

/// <summary>Why a disk image or block backend failed.</summary>
public enum StorageProblem
{
    /// <summary>The file does not exist or cannot be opened.</summary>
    Unreadable,
    /// <summary>The file exists already.</summary>
    AlreadyExists,
    /// <summary>Somebody else has the file open.</summary>
    InUse,
    /// <summary>The host reported an error while reading, writing or flushing.</summary>
    InputOutput,
    /// <summary>The host's storage, a quota or a limit of the backend is full.</summary>
    NoSpace,
    /// <summary>A write to a backend that cannot be written.</summary>
    ReadOnly,
    /// <summary>A request beyond the end of the disk, or not in whole sectors.</summary>
    OutOfRange,
    /// <summary>The file is not of the expected format.</summary>
    UnknownFormat,
    /// <summary>The image ends before data that it refers to.</summary>
    Truncated,
    /// <summary>The image contradicts itself.</summary>
    Corrupt,
    /// <summary>The image was not closed cleanly and must be repaired before it is written.</summary>
    NeedsRepair,
    /// <summary>The image is valid but needs something that is not supported; the message names it.</summary>
    Unsupported,
    /// <summary>The image needs a backing file, which was not asked for or cannot be used.</summary>
    BackingFile,
}

/// <summary>A disk image that cannot be used, or a request that a block backend could not carry out.</summary>
public sealed class StorageException : KvmSharpException
{
    /// <summary>Creates the exception.</summary>
    /// <param name="problem">What went wrong.</param>
    /// <param name="message">One clear sentence for the user.</param>
    /// <param name="innerException">The cause, if another exception is it.</param>
    public StorageException(StorageProblem problem, string message, Exception? innerException = null)
        : base(KvmSharpErrorCode.Storage, message, innerException)
    {
        Problem = problem;
    }

    /// <summary>What went wrong.</summary>
    public StorageProblem Problem { get; }
}
