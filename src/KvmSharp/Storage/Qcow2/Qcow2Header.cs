using System.Buffers.Binary;
using System.Numerics;
using System.Text;

namespace KvmSharp.Storage;

// "Features" of the qcow2 specification.
[Flags]
internal enum Qcow2Incompatible : ulong
{
    None = 0,
    Dirty = 1,
    Corrupt = 2,
    ExternalDataFile = 4,
    CompressionType = 8,
    ExtendedL2 = 16,
    Understood = Dirty | Corrupt | CompressionType,
}

/// <summary>
/// The header of a qcow2 image, its extensions included. Source: the qcow2 specification in QEMU's documentation, "Header",
/// "Header padding", "Header extensions". Reading checks everything that the header alone can tell.
/// </summary>
internal sealed class Qcow2Header
{
    internal const uint MagicNumber = 0x514649fb;
    internal const int MinClusterBits = 9;
    internal const int MaxClusterBits = 21;
    internal const int Version2Length = 72;
    internal const int Version3Length = 112;
    internal const int FeatureOffset = 72;
    internal const int L1Offset = 36;
    internal const int RefcountTableOffset = 48;
    internal const ulong AutoclearBitmaps = 1;
    internal const ulong CompatibleLazyRefcounts = 1;
    internal const int MaxBackingNameLength = 1023;

    // Bounds for the memory that an image can make its reader use.
    internal const int MaxL1Entries = 1 << 20;
    internal const int MaxRefcountTableEntries = 1 << 19;
    internal const int MaxSnapshots = 1 << 16;
    private const int MaxExtensionBytes = 1 << 20;

    internal const uint ExtensionBackingFormat = 0xe2792aca;
    internal const uint ExtensionFeatureNames = 0x6803f857;
    internal const uint ExtensionBitmaps = 0x23852875;

    // The highest offset that a table entry can hold: bits 9 to 55.
    internal const ulong OffsetMask = 0x00ff_ffff_ffff_fe00;

    public int Version { get; init; } = 3;

    public int ClusterBits { get; init; }

    public int ClusterSize => 1 << ClusterBits;

    public long Size { get; init; }

    public int L1Entries { get; set; }

    public long L1TableOffset { get; set; }

    public long RefcountTableTableOffset { get; set; }

    public int RefcountTableClusters { get; set; }

    public int RefcountOrder { get; init; } = 4;

    public int SnapshotCount { get; init; }

    public long SnapshotsOffset { get; init; }

    public Qcow2Incompatible Incompatible { get; set; }

    public ulong Compatible { get; init; }

    public ulong Autoclear { get; set; }

    public string? BackingFile { get; init; }

    public string? BackingFormat { get; private set; }

    public (int Count, long Offset, int Size)? Bitmaps { get; private set; }

    public string IncompatibleNames => string.Join(", ", Enum.GetValues<Qcow2Incompatible>()
        .Where(flag => flag is not (Qcow2Incompatible.None or Qcow2Incompatible.Understood) && Incompatible.HasFlag(flag)));

    /// <summary>How many bytes of the virtual disk one L2 table maps, as a shift.</summary>
    public int L2CoverageBits => ClusterBits + ClusterBits - 3;

    public int L1EntriesNeeded => NeededL1Entries(Size, ClusterBits) is var needed and <= MaxL1Entries
        ? (int)needed
        : throw Unsupported($"a disk of {Size} bytes in clusters of {ClusterSize} bytes");

    public static long NeededL1Entries(long size, int clusterBits) =>
        (long)(((ulong)size + (1UL << (clusterBits + clusterBits - 3)) - 1) >> (clusterBits + clusterBits - 3));

    public static bool HasMagic(IImageStore store)
    {
        Span<byte> magic = stackalloc byte[4];
        store.Read(0, magic);
        return store.Length >= Version2Length && BinaryPrimitives.ReadUInt32BigEndian(magic) == MagicNumber;
    }

    public static Qcow2Header Read(IImageStore store)
    {
        Span<byte> bytes = stackalloc byte[Version3Length];
        store.Read(0, bytes);
        if (store.Length < Version2Length || U32(bytes, 0) != MagicNumber)
        {
            throw new StorageException(StorageProblem.UnknownFormat, "The file is not a qcow2 image.");
        }
        var version = U32(bytes, 4);
        if (version is not (2 or 3))
        {
            throw Unsupported($"qcow2 version {version}");
        }
        var clusterBits = U32(bytes, 20);
        if (clusterBits is < MinClusterBits or > MaxClusterBits)
        {
            throw Corrupt($"its cluster size is 2^{clusterBits} bytes");
        }
        if (U32(bytes, 32) is var encryption and not 0)
        {
            throw Unsupported($"encryption (method {encryption})");
        }
        uint headerLength = Version2Length;
        ulong incompatible = 0, compatible = 0, autoclear = 0;
        uint refcountOrder = 4;
        if (version == 3)
        {
            (incompatible, compatible, autoclear) = (U64(bytes, 72), U64(bytes, 80), U64(bytes, 88));
            (refcountOrder, headerLength) = (U32(bytes, 96), U32(bytes, 100));
            if (headerLength < 104 || headerLength > 1 << (int)clusterBits || headerLength % 8 != 0)
            {
                throw Corrupt($"its header has {headerLength} bytes");
            }
            if (refcountOrder > 6)
            {
                throw Corrupt($"its reference counts have 2^{refcountOrder} bits");
            }
            if (headerLength > 104 && bytes[104] != 0)
            {
                throw Unsupported(bytes[104] == 1 ? "zstd compression" : $"compression type {bytes[104]}");
            }
        }
        var size = U64(bytes, 24);
        if (size > (ulong)(long.MaxValue - (1 << MaxClusterBits)))
        {
            throw Corrupt($"its disk has {size} bytes");
        }
        var header = new Qcow2Header
        {
            Version = (int)version,
            ClusterBits = (int)clusterBits,
            Size = (long)size,
            L1Entries = Bounded(U32(bytes, L1Offset), MaxL1Entries, "L1 table entries"),
            L1TableOffset = ClusterOffset(U64(bytes, 40), clusterBits, "L1 table"),
            RefcountTableTableOffset = ClusterOffset(U64(bytes, RefcountTableOffset), clusterBits, "refcount table"),
            RefcountTableClusters = Bounded(U32(bytes, 56), MaxRefcountTableEntries >> ((int)clusterBits - 3), "refcount table clusters"),
            RefcountOrder = (int)refcountOrder,
            SnapshotCount = Bounded(U32(bytes, 60), MaxSnapshots, "snapshots"),
            SnapshotsOffset = U32(bytes, 60) == 0 ? 0 : ClusterOffset(U64(bytes, 64), clusterBits, "snapshot table"),
            Incompatible = (Qcow2Incompatible)incompatible,
            Compatible = compatible,
            Autoclear = autoclear,
            BackingFile = ReadBackingName(store, U64(bytes, 8), U32(bytes, 16), clusterBits),
        };
        header.ReadExtensions(store, headerLength, U64(bytes, 8), out var featureNames);
        header.CheckFeatures(featureNames);
        if (header.L1Entries < header.L1EntriesNeeded)
        {
            throw Corrupt($"its L1 table has {header.L1Entries} entries where {header.L1EntriesNeeded} are needed");
        }
        return header;
    }

    /// <summary>The first cluster of a new image, up to the end of the backing file's name.</summary>
    public byte[] ToBytes(string? backingFormat)
    {
        var bytes = new List<byte>();
        U32(MagicNumber);
        U32((uint)Version);
        var name = Encoding.UTF8.GetBytes(BackingFile ?? "");
        var format = Encoding.UTF8.GetBytes(backingFormat ?? "");
        var headerLength = Version == 2 ? Version2Length : Version3Length;
        var extensions = 8 + (format.Length == 0 ? 0 : 8 + ((format.Length + 7) & ~7));
        U64(name.Length == 0 ? 0 : (ulong)(headerLength + extensions));
        U32((uint)name.Length);
        U32((uint)ClusterBits);
        U64((ulong)Size);
        U32(0);
        U32((uint)L1Entries);
        U64((ulong)L1TableOffset);
        U64((ulong)RefcountTableTableOffset);
        U32((uint)RefcountTableClusters);
        U32((uint)SnapshotCount);
        U64((ulong)SnapshotsOffset);
        if (Version >= 3)
        {
            U64((ulong)Incompatible);
            U64(Compatible);
            U64(Autoclear);
            U32((uint)RefcountOrder);
            U32((uint)headerLength);
            U64(0);
        }
        if (format.Length > 0)
        {
            U32(ExtensionBackingFormat);
            U32((uint)format.Length);
            bytes.AddRange(format);
            bytes.AddRange(new byte[-format.Length & 7]);
        }
        U64(0);
        bytes.AddRange(name);
        return [.. bytes];

        void U32(uint value)
        {
            Span<byte> buffer = stackalloc byte[4];
            BinaryPrimitives.WriteUInt32BigEndian(buffer, value);
            bytes.AddRange(buffer);
        }

        void U64(ulong value)
        {
            Span<byte> buffer = stackalloc byte[8];
            BinaryPrimitives.WriteUInt64BigEndian(buffer, value);
            bytes.AddRange(buffer);
        }
    }

    internal static StorageException Corrupt(string what) => new(StorageProblem.Corrupt, $"The qcow2 image is damaged: {what}.");

    internal static StorageException Unsupported(string what) => new(StorageProblem.Unsupported, $"The qcow2 image needs {what}, which is not supported.");

    private void CheckFeatures(IReadOnlyDictionary<int, string> names)
    {
        var unknown = (ulong)(Incompatible & ~Qcow2Incompatible.Understood);
        if (unknown != 0)
        {
            var bit = BitOperations.TrailingZeroCount(unknown);
            throw Unsupported((Qcow2Incompatible)(1UL << bit) switch
            {
                Qcow2Incompatible.ExternalDataFile => "an external data file",
                Qcow2Incompatible.ExtendedL2 => "extended L2 entries (subclusters)",
                _ => names.TryGetValue(bit, out var name) ? $"the feature '{name}' (incompatible bit {bit})" : $"incompatible feature bit {bit}",
            });
        }
    }

    private static string? ReadBackingName(IImageStore store, ulong offset, uint length, uint clusterBits)
    {
        if (offset == 0)
        {
            return null;
        }
        if (length is 0 or > MaxBackingNameLength || offset > (1UL << (int)clusterBits) - length)
        {
            throw Corrupt("the name of its backing file is outside of the header");
        }
        var name = new byte[length];
        store.Read((long)offset, name);
        return Printable(name) is { Length: > 0 } text && !name.Contains((byte)0) ? text : throw Corrupt("the name of its backing file is empty or no text");
    }

    private void ReadExtensions(IImageStore store, long offset, ulong backingNameOffset, out Dictionary<int, string> featureNames)
    {
        featureNames = [];
        // Extensions end where the backing file's name begins, or with the cluster.
        var end = backingNameOffset == 0 ? ClusterSize : (long)backingNameOffset;
        end = Math.Min(end, offset + MaxExtensionBytes);
        Span<byte> head = stackalloc byte[8];
        while (offset + 8 <= end)
        {
            store.Read(offset, head);
            var (type, length) = (U32(head, 0), U32(head, 4));
            offset += 8;
            if (type == 0)
            {
                return;
            }
            if (length > end - offset)
            {
                throw Corrupt($"header extension 0x{type:x8} is longer than the header");
            }
            ReadExtension(store, type, offset, (int)length, featureNames);
            offset += (length + 7) & ~7L;
        }
    }

    private void ReadExtension(IImageStore store, uint type, long offset, int length, Dictionary<int, string> featureNames)
    {
        switch (type)
        {
            case ExtensionBackingFormat:
                var format = new byte[Math.Min(length, 64)];
                store.Read(offset, format);
                BackingFormat = Printable(format);
                break;
            case ExtensionFeatureNames:
                Span<byte> entry = stackalloc byte[48];
                for (var position = 0; position + 48 <= length; position += 48)
                {
                    store.Read(offset + position, entry);
                    if (entry[0] == 0 && entry[1] < 64)
                    {
                        featureNames.TryAdd(entry[1], Printable(entry[2..]));
                    }
                }
                break;
            case ExtensionBitmaps when length >= 24:
                Span<byte> bitmaps = stackalloc byte[24];
                store.Read(offset, bitmaps);
                if ((Autoclear & AutoclearBitmaps) != 0)
                {
                    Bitmaps = (
                        Bounded(U32(bitmaps, 0), 65535, "bitmaps"), ClusterOffset(U64(bitmaps, 16), (uint)ClusterBits, "bitmap directory"),
                        Bounded(U64(bitmaps, 8), 16 << 20, "bytes of bitmap directory"));
                }
                break;
        }
    }

    // A name from the image can end up on a terminal.
    internal static string Printable(ReadOnlySpan<byte> utf8)
    {
        var text = Encoding.UTF8.GetString(utf8).TrimEnd('\0');
        return string.Concat(text.Select(c => char.IsControl(c) ? '?' : c));
    }

    private static int Bounded(ulong value, int limit, string what) => value <= (ulong)limit
        ? (int)value
        : throw Unsupported($"{value} {what} (the limit is {limit})");

    private static long ClusterOffset(ulong value, uint clusterBits, string what) =>
        (value & ((1UL << (int)clusterBits) - 1)) == 0 && (value & ~OffsetMask) == 0
            ? (long)value
            : throw Corrupt($"its {what} is at the impossible offset 0x{value:x}");

    private static uint U32(ReadOnlySpan<byte> bytes, int offset) => BinaryPrimitives.ReadUInt32BigEndian(bytes[offset..]);

    private static ulong U64(ReadOnlySpan<byte> bytes, int offset) => BinaryPrimitives.ReadUInt64BigEndian(bytes[offset..]);
}
