using System.Buffers.Binary;
using System.Numerics;
using System.Text;

namespace KvmSharp.Storage;

public sealed partial class Qcow2Image
{
    /// <summary>Writes an image without any data into an empty store. The store stays open.</summary>
    /// <param name="store">The store; what it contains is lost.</param>
    /// <param name="length">The size of the disk in bytes, a multiple of 512.</param>
    /// <param name="options">What the image is to be like.</param>
    /// <exception cref="ArgumentException">An option is out of range, or options contradict each other.</exception>
    /// <exception cref="StorageException">The disk is too large for the cluster size, or the store failed.</exception>
    public static void Create(IImageStore store, long length, Qcow2CreateOptions? options = null)
    {
        ArgumentNullException.ThrowIfNull(store);
        options ??= new Qcow2CreateOptions();
        CheckCreation(length, options);
        var clusterBits = BitOperations.Log2((uint)options.ClusterSize);
        long clusterSize = options.ClusterSize;
        var order = BitOperations.Log2((uint)options.RefcountBits);
        var l1Entries = Qcow2Header.NeededL1Entries(length, clusterBits);
        if (l1Entries > Qcow2Header.MaxL1Entries)
        {
            throw new StorageException(
                StorageProblem.Unsupported, $"A disk of {length} bytes is too large for clusters of {clusterSize} bytes.");
        }

        // The refcount table has room for a full disk, so that it need not move later.
        var countsPerBlock = clusterSize * 8 >> order;
        var fullClusters = Divide(length, clusterSize) + l1Entries * 2 + 16;
        var tableEntries = Math.Min(Divide(fullClusters * 17 / 16, countsPerBlock), Qcow2Header.MaxRefcountTableEntries);
        var tableClusters = Math.Max(1, Divide(tableEntries * 8, clusterSize));
        var l1Clusters = Math.Max(1, Divide(l1Entries * 8, clusterSize));
        long blocks = 1;
        while (1 + tableClusters + blocks + l1Clusters > blocks * countsPerBlock)
        {
            blocks++;
        }
        var used = 1 + tableClusters + blocks + l1Clusters;
        if (blocks > tableClusters * clusterSize / 8)
        {
            throw new StorageException(
                StorageProblem.Unsupported, $"A disk of {length} bytes is too large for clusters of {clusterSize} bytes and reference counts of {options.RefcountBits} bits.");
        }

        var header = new Qcow2Header
        {
            Version = options.Version,
            ClusterBits = clusterBits,
            Size = length,
            L1Entries = (int)l1Entries,
            L1TableOffset = (1 + tableClusters + blocks) * clusterSize,
            RefcountTableTableOffset = clusterSize,
            RefcountTableClusters = (int)tableClusters,
            RefcountOrder = order,
            BackingFile = options.BackingFile,
        };
        var headerBytes = header.ToBytes(options.BackingFormat?.ToName());
        if (headerBytes.Length > clusterSize)
        {
            throw new ArgumentException("The name of the backing file does not fit into a cluster.", nameof(options));
        }

        store.SetLength(0);
        // Written, not left as holes: no later change of a table needs new space and can fail for the lack of it.
        BlockRange.FillWithZeroes(0, used * clusterSize, store.Write);
        var firstBlock = 1 + tableClusters;
        Span<byte> entry = stackalloc byte[8];
        for (long block = 0; block < blocks; block++)
        {
            var content = new byte[clusterSize];
            for (var i = 0; i < Math.Min(countsPerBlock, used - block * countsPerBlock); i++)
            {
                Qcow2Refcounts.SetCount(content, i, 1, order);
            }
            store.Write((firstBlock + block) * clusterSize, content);
            BinaryPrimitives.WriteInt64BigEndian(entry, (firstBlock + block) * clusterSize);
            store.Write(clusterSize + block * 8, entry);
        }
        // Nobody takes the file for an image before it is one.
        store.Flush();
        store.Write(0, headerBytes);
        store.Flush();
    }

    /// <summary>Creates an image without any data in a file.</summary>
    /// <param name="path">The file; it must not exist.</param>
    /// <param name="length">The size of the disk in bytes, a multiple of 512.</param>
    /// <param name="options">What the image is to be like; no backing file.</param>
    /// <returns>The image, open for writing.</returns>
    /// <exception cref="ArgumentException">An option is out of range, or options contradict each other.</exception>
    /// <exception cref="StorageException">The file cannot be created, or the disk is too large for the cluster size.</exception>
    public static Qcow2Image Create(string path, long length, Qcow2CreateOptions? options = null)
    {
        if (options?.BackingFile is not null)
        {
            throw new ArgumentException($"Use {nameof(DiskImage)}.{nameof(DiskImage.Create)} for an image with a backing file.", nameof(options));
        }
        CheckCreation(length, options ?? new Qcow2CreateOptions());
        var store = FileImageStore.Create(path);
        try
        {
            Create(store, length, options);
            return Open(store);
        }
        catch
        {
            store.Dispose();
            File.Delete(path);
            throw;
        }
    }

    internal static void CheckCreation(long length, Qcow2CreateOptions options)
    {
        ArgumentOutOfRangeException.ThrowIfNegative(length);
        if (length % BlockRange.DefaultSectorSize != 0)
        {
            throw new ArgumentException($"The size {length} is not a multiple of {BlockRange.DefaultSectorSize} bytes.", nameof(length));
        }
        if (length > long.MaxValue >> 4)
        {
            throw new ArgumentException($"The size {length} is beyond what an image can have.", nameof(length));
        }
        if (!BitOperations.IsPow2(options.ClusterSize)
            || options.ClusterSize is < 1 << Qcow2Header.MinClusterBits or > 1 << Qcow2Header.MaxClusterBits)
        {
            throw new ArgumentException(
                $"The cluster size {options.ClusterSize} is not a power of two from 512 to 2097152.", nameof(options));
        }
        if (options.Version is not (2 or 3))
        {
            throw new ArgumentException($"There is no version {options.Version} of qcow2; use 2 or 3.", nameof(options));
        }
        if (!BitOperations.IsPow2(options.RefcountBits) || options.RefcountBits is < 1 or > 64
            || (options.Version == 2 && options.RefcountBits != 16))
        {
            throw new ArgumentException(
                $"Reference counts of {options.RefcountBits} bits are not possible in version {options.Version}.", nameof(options));
        }
        if (options.BackingFile is { } name)
        {
            if (options.BackingFormat is null)
            {
                throw new ArgumentException("A backing file needs its format.", nameof(options));
            }
            if (name.Length == 0 || name.Contains('\0') || Encoding.UTF8.GetByteCount(name) > Qcow2Header.MaxBackingNameLength)
            {
                throw new ArgumentException(
                    $"The name of the backing file is empty or longer than {Qcow2Header.MaxBackingNameLength} bytes.", nameof(options));
            }
        }
    }

    private static long Divide(long value, long by) => (value + by - 1) / by;
}
