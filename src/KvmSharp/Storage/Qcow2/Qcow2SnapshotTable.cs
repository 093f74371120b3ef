using System.Buffers.Binary;

namespace KvmSharp.Storage;

/// <summary>The snapshot table of a qcow2 image. Source: the qcow2 specification, "Snapshots".</summary>
internal sealed class Qcow2SnapshotTable
{
    private const int MaxBytes = 16 << 20;
    private const int EntryLength = 40;

    private Qcow2SnapshotTable(long length, IReadOnlyList<Entry> entries)
    {
        Length = length;
        Entries = entries;
    }

    /// <summary>The length of the table in the file, in bytes.</summary>
    internal long Length { get; }

    internal IReadOnlyList<Entry> Entries { get; }

    internal static Qcow2SnapshotTable Read(IImageStore store, Qcow2Header header)
    {
        var entries = new List<Entry>();
        var offset = header.SnapshotsOffset;
        Span<byte> bytes = stackalloc byte[EntryLength + 8];
        for (var i = 0; i < header.SnapshotCount; i++)
        {
            if (offset > store.Length - EntryLength)
            {
                throw new StorageException(StorageProblem.Truncated, "The qcow2 image ends before its snapshot table.");
            }
            store.Read(offset, bytes);
            var l1Offset = BinaryPrimitives.ReadUInt64BigEndian(bytes);
            var l1Entries = BinaryPrimitives.ReadUInt32BigEndian(bytes[8..]);
            int idLength = BinaryPrimitives.ReadUInt16BigEndian(bytes[12..]);
            int nameLength = BinaryPrimitives.ReadUInt16BigEndian(bytes[14..]);
            var seconds = BinaryPrimitives.ReadUInt32BigEndian(bytes[16..]);
            long stateBytes = BinaryPrimitives.ReadUInt32BigEndian(bytes[32..]);
            var extra = BinaryPrimitives.ReadUInt32BigEndian(bytes[36..]);
            if (extra >= 8)
            {
                stateBytes = (long)Math.Min(BinaryPrimitives.ReadUInt64BigEndian(bytes[EntryLength..]), long.MaxValue);
            }
            if (l1Entries > Qcow2Header.MaxL1Entries || extra > MaxBytes)
            {
                throw Qcow2Header.Unsupported($"{l1Entries} L1 table entries and {extra} bytes of extra data in snapshot {i}");
            }
            if ((l1Offset & ~Qcow2Header.OffsetMask) != 0 || (l1Offset & (ulong)(header.ClusterSize - 1)) != 0)
            {
                throw Qcow2Header.Corrupt($"the L1 table of snapshot {i} is at the impossible offset 0x{l1Offset:x}");
            }
            var names = new byte[idLength + nameLength];
            store.Read(offset + EntryLength + extra, names);
            entries.Add(new Entry(
                (long)l1Offset, (int)l1Entries,
                new Qcow2Snapshot(
                    Qcow2Header.Printable(names.AsSpan(0, idLength)), Qcow2Header.Printable(names.AsSpan(idLength)),
                    DateTimeOffset.FromUnixTimeSeconds(seconds), stateBytes)));
            offset += (EntryLength + extra + idLength + nameLength + 7) & ~7L;
            if (offset - header.SnapshotsOffset > MaxBytes)
            {
                throw Qcow2Header.Unsupported($"a snapshot table of more than {MaxBytes} bytes");
            }
        }
        return new Qcow2SnapshotTable(offset - header.SnapshotsOffset, entries);
    }

    internal sealed record Entry(long L1Offset, int L1Entries, Qcow2Snapshot Snapshot);
}
