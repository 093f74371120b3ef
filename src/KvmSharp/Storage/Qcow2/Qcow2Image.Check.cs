namespace KvmSharp.Storage;

/// <summary>What a check of an image may change.</summary>
public enum ImageRepair
{
    /// <summary>Nothing.</summary>
    None,
    /// <summary>Clusters that nothing uses become free again.</summary>
    Leaks,
    /// <summary>Also, reference counts and flags are made to fit the tables.</summary>
    All,
}

/// <summary>What a check of an image found.</summary>
public sealed class ImageCheckResult
{
    internal const int MaxMessages = 100;

    private readonly List<string> _messages = [];

    internal ImageCheckResult()
    {
    }

    /// <summary>Contradictions in the image; data may be lost or get lost when it is written.</summary>
    public long Errors { get; internal set; }

    /// <summary>Clusters that take space although nothing uses them; harmless.</summary>
    public long Leaks { get; internal set; }

    /// <summary>How many of the errors were repaired.</summary>
    public long RepairedErrors { get; internal set; }

    /// <summary>How many of the leaks were repaired.</summary>
    public long RepairedLeaks { get; internal set; }

    /// <summary>How many clusters of the disk have data in this image.</summary>
    public long AllocatedClusters { get; internal set; }

    /// <summary>How many of these are compressed.</summary>
    public long CompressedClusters { get; internal set; }

    /// <summary>How many clusters the disk has.</summary>
    public long TotalClusters { get; internal set; }

    /// <summary>Whether there is nothing wrong, or nothing any more.</summary>
    public bool IsClean => Errors == RepairedErrors && Leaks == RepairedLeaks;

    /// <summary>What was found, a sentence each; the first 100.</summary>
    public IReadOnlyList<string> Messages => _messages;

    internal void Error(string message)
    {
        Errors++;
        Say(message);
    }

    internal void Say(string message)
    {
        if (_messages.Count < MaxMessages)
        {
            _messages.Add(message);
        }
    }
}

public sealed partial class Qcow2Image
{
    /// <summary>Checks the tables of an image, and repairs them if wanted. Nobody else may use it meanwhile.</summary>
    /// <param name="store">Where the image is kept; it stays open.</param>
    /// <param name="repair">What may be changed.</param>
    /// <param name="cancellation">Ends the check early; what was repaired by then stays so.</param>
    /// <exception cref="StorageException">The image is so damaged that it cannot be checked, or it cannot be read or written.</exception>
    public static ImageCheckResult Check(IImageStore store, ImageRepair repair = ImageRepair.None, CancellationToken cancellation = default)
    {
        ArgumentNullException.ThrowIfNull(store);
        return new Qcow2Checker(store, cancellation).Run(repair);
    }

    /// <summary>Checks the tables of an image in a file, and repairs them if wanted.</summary>
    /// <param name="path">The file.</param>
    /// <param name="repair">What may be changed.</param>
    /// <param name="cancellation">Ends the check early; what was repaired by then stays so.</param>
    /// <exception cref="StorageException">The image is so damaged that it cannot be checked, or it cannot be read or written.</exception>
    public static ImageCheckResult Check(string path, ImageRepair repair = ImageRepair.None, CancellationToken cancellation = default)
    {
        using var store = FileImageStore.Open(path, readOnly: repair == ImageRepair.None);
        return Check(store, repair, cancellation);
    }
}
