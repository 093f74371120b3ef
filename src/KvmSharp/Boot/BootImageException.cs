namespace KvmSharp.Boot;

/// <summary>Why a boot image was refused.</summary>
public enum BootImageProblem
{
    /// <summary>The file does not exist or cannot be read.</summary>
    Unreadable,
    /// <summary>The image is empty.</summary>
    Empty,
    /// <summary>The image is of no known format.</summary>
    UnknownFormat,
    /// <summary>The image ends before the data that its header announces.</summary>
    Truncated,
    /// <summary>The image's header contradicts itself.</summary>
    Malformed,
    /// <summary>The image is valid but needs something that is not supported, for example a start in real mode.</summary>
    Unsupported,
    /// <summary>The image does not fit into the guest's memory.</summary>
    TooLarge,
    /// <summary>The kernel's command line is longer than the kernel accepts.</summary>
    CommandLineTooLong,
}

/// <summary>A kernel, initial RAM disk or flat image that cannot be loaded.</summary>
public sealed class BootImageException : KvmSharpException
{
    /// <summary>Creates the exception.</summary>
    /// <param name="problem">Why the image was refused.</param>
    /// <param name="message">One clear sentence for the user.</param>
    /// <param name="innerException">The cause, if another exception is it.</param>
    public BootImageException(BootImageProblem problem, string message, Exception? innerException = null)
        : base(KvmSharpErrorCode.BootImage, message, innerException)
    {
        Problem = problem;
    }

    /// <summary>Why the image was refused.</summary>
    public BootImageProblem Problem { get; }
}
