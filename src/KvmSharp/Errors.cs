namespace KvmSharp;

/// <summary>What kind of failure a <see cref="KvmSharpException"/> reports.</summary>
public enum KvmSharpErrorCode
{
    /// <summary>No more precise code applies.</summary>
    Unknown = 0,
    /// <summary>An argument is out of range or inconsistent.</summary>
    InvalidArgument = 1,
    /// <summary>The host has no memory or no threads left.</summary>
    OutOfMemory = 2,
    /// <summary>That id, slot or device exists already.</summary>
    AlreadyExists = 3,
    /// <summary>No such id, slot or device.</summary>
    NotFound = 4,
    /// <summary>The object is in use by another thread.</summary>
    Busy = 5,
    /// <summary>Not supported by the execution core or by this host.</summary>
    NotSupported = 6,
    /// <summary>The guest address range is not backed by memory.</summary>
    BadAddress = 7,
    /// <summary>The range overlaps another one.</summary>
    Overlap = 8,
    /// <summary>A write to read-only memory.</summary>
    ReadOnly = 9,
    /// <summary>A buffer is too small.</summary>
    BufferTooSmall = 10,
    /// <summary>A saved state is not one that a machine can be in.</summary>
    BadState = 11,
    /// <summary>The native library is missing or does not fit this assembly.</summary>
    NativeLibrary = 100,
    /// <summary>A boot image cannot be loaded.</summary>
    BootImage = 101,
    /// <summary>A disk image or another block backend failed.</summary>
    Storage = 102,
}

/// <summary>The base of every exception that this library defines.</summary>
public class KvmSharpException : Exception
{
    /// <summary>Creates the exception.</summary>
    /// <param name="errorCode">The kind of failure.</param>
    /// <param name="message">One clear sentence for the user.</param>
    /// <param name="innerException">The cause, if another exception is it.</param>
    public KvmSharpException(KvmSharpErrorCode errorCode, string message, Exception? innerException = null)
        : base(message, innerException)
    {
        ErrorCode = errorCode;
    }

    /// <summary>The kind of failure.</summary>
    public KvmSharpErrorCode ErrorCode { get; }
}

/// <summary>An access to guest memory that no slot backs, or a write to a read-only slot.</summary>
public sealed class GuestMemoryException : KvmSharpException
{
    /// <summary>Creates the exception.</summary>
    /// <param name="errorCode">The kind of failure.</param>
    /// <param name="address">The first address of the access.</param>
    /// <param name="length">The length of the access in bytes.</param>
    /// <param name="message">One clear sentence for the user.</param>
    public GuestMemoryException(KvmSharpErrorCode errorCode, GuestAddress address, ulong length, string message)
        : base(errorCode, message)
    {
        Address = address;
        Length = length;
    }

    /// <summary>The first address of the access.</summary>
    public GuestAddress Address { get; }

    /// <summary>The length of the access in bytes.</summary>
    public ulong Length { get; }
}

/// <summary>A CPU model or feature name that is unknown, or a feature that the execution core does not have.</summary>
public sealed class UnsupportedFeatureException : KvmSharpException
{
    /// <summary>Creates the exception.</summary>
    /// <param name="featureName">The name as the user wrote it.</param>
    /// <param name="message">One clear sentence for the user.</param>
    public UnsupportedFeatureException(string featureName, string message)
        : base(KvmSharpErrorCode.NotSupported, message)
    {
        FeatureName = featureName;
    }

    /// <summary>The name as the user wrote it.</summary>
    public string FeatureName { get; }
}

/// <summary>The native execution core is missing, cannot be loaded, or does not fit this assembly.</summary>
public sealed class NativeLibraryException : KvmSharpException
{
    /// <summary>Creates the exception.</summary>
    /// <param name="message">One clear sentence for the user.</param>
    /// <param name="innerException">The loader's own exception.</param>
    public NativeLibraryException(string message, Exception? innerException = null)
        : base(KvmSharpErrorCode.NativeLibrary, message, innerException)
    {
    }
}

/// <summary>A saved machine state that is damaged, of another version, or of another machine.</summary>
public sealed class MachineStateException : KvmSharpException
{
    /// <summary>Creates the exception.</summary>
    /// <param name="message">One clear sentence for the user.</param>
    /// <param name="innerException">The cause, if another exception is it.</param>
    public MachineStateException(string message, Exception? innerException = null)
        : base(KvmSharpErrorCode.BadState, message, innerException)
    {
    }
}
