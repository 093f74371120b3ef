using System.Buffers.Binary;
using System.Text;
using KvmSharp.Storage;

namespace KvmSharp.Devices.Virtio;

/// <summary>
/// A disk: flush, discard, write-zeroes, several queues, read-only. Requests are carried out one after the other on the
/// device's thread. Specification: VIRTIO 1.2, "Block Device".
/// </summary>
public sealed partial class VirtioBlock : VirtioDevice
{
    private const int QueueSize = 256;
    private const int SegmentMax = QueueSize - 2; // header and status take one each
    private const int BufferSize = 1 << 18;
    private const int DirectPiece = 16384; // from this size on a piece of memory is worth a request of its own
    private const uint RangeSectorsMax = 1 << 21;
    private const int RangeMax = 16;

    // Configuration
    private readonly VirtioBlockOptions _options;
    private readonly IBlockBackend _backend;
    private readonly byte[] _serialNumber = new byte[SerialNumberSize];

    // Wiring
    private readonly byte[] _buffer = new byte[BufferSize];
    private readonly Active[] _active;

    // State
    private bool _writeback = true;

    /// <summary>Creates the disk.</summary>
    /// <param name="options">The backend and how the guest sees it. The device does not dispose the backend.</param>
    public VirtioBlock(VirtioBlockOptions options)
        : base(DeviceKind, "block", QueueSizes(options))
    {
        _options = options;
        _backend = options.Backend;
        Encoding.ASCII.GetBytes(options.SerialNumber).CopyTo(_serialNumber, 0);
        _active = [.. Queues.Select(q => new Active(q))];
    }

    internal override uint PciClass => 0x01_80_00; // mass storage, other

    internal override int ConfigLength => ConfigSize;

    private protected override ulong DeviceFeatures =>
        FeatureSegmentMax | FeatureBlockSize | FeatureTopology | FeatureFlush | FeatureConfigWriteback
        | (IsReadOnly ? FeatureReadOnly : 0)
        | (Queues.Count > 1 ? FeatureMultiQueue : 0)
        | (CanDiscard ? FeatureDiscard : 0)
        | (CanWriteZeroes ? FeatureWriteZeroes : 0);

    private bool IsReadOnly => _options.ReadOnly || _backend.IsReadOnly;

    private bool CanDiscard => !IsReadOnly && (_backend.Capabilities & BlockCapabilities.Discard) != 0;

    private bool CanWriteZeroes => !IsReadOnly && (_backend.Capabilities & BlockCapabilities.WriteZeroes) != 0;

    // "Device Requirements: Device Initialization": a driver that cannot flush gets every write through.
    private bool WritesThrough => !HasFeature(FeatureFlush) || !_writeback;

    private protected override void BuildConfig(Span<byte> image)
    {
        var sectorsPerBlock = (uint)(_backend.SectorSize >> SectorShift);
        BinaryPrimitives.WriteUInt64LittleEndian(image[ConfigCapacity..], (ulong)_backend.Length >> SectorShift);
        BinaryPrimitives.WriteUInt32LittleEndian(image[ConfigSegmentMax..], SegmentMax);
        BinaryPrimitives.WriteUInt32LittleEndian(image[ConfigBlockSize..], (uint)_backend.SectorSize);
        // The host's page cache works in 4 KiB; smaller writes make it read first.
        image[ConfigPhysicalBlockExponent] = (byte)Math.Max(0, int.Log2(4096 / _backend.SectorSize));
        image[ConfigWriteback] = _writeback ? (byte)1 : (byte)0;
        BinaryPrimitives.WriteUInt16LittleEndian(image[ConfigQueueCount..], (ushort)Queues.Count);
        if (CanDiscard)
        {
            BinaryPrimitives.WriteUInt32LittleEndian(image[ConfigDiscardSectors..], RangeSectorsMax);
            BinaryPrimitives.WriteUInt32LittleEndian(image[ConfigDiscardSegments..], RangeMax);
            BinaryPrimitives.WriteUInt32LittleEndian(image[ConfigDiscardAlignment..],
                Math.Max((uint)_backend.DiscardGranularity >> SectorShift, sectorsPerBlock));
        }
        if (CanWriteZeroes)
        {
            BinaryPrimitives.WriteUInt32LittleEndian(image[ConfigZeroSectors..], RangeSectorsMax);
            BinaryPrimitives.WriteUInt32LittleEndian(image[ConfigZeroSegments..], RangeMax);
            image[ConfigZeroMayUnmap] = 1;
        }
    }

    private protected override void OnConfigWritten(int offset, ReadOnlySpan<byte> data)
    {
        if (offset == ConfigWriteback && data.Length == 1 && HasFeature(FeatureConfigWriteback) && data[0] <= 1)
        {
            _writeback = data[0] == 1;
        }
    }

    private protected override void OnReset()
    {
        _writeback = true;
        foreach (var active in _active)
        {
            active.Busy = false;
        }
    }

    private protected override bool Serve()
    {
        var more = false;
        foreach (var active in _active)
        {
            more |= Serve(active);
        }
        return more;
    }

    private protected override void SaveDevice(StateWriter writer)
    {
        writer.WriteBoolean(_writeback);
        foreach (var active in _active)
        {
            writer.WriteBoolean(active.Busy);
            writer.WriteUInt32((uint)active.Type);
            writer.WriteUInt64(active.Sector);
            writer.WriteUInt32(active.Done);
        }
    }

    private protected override void LoadDevice(StateReader reader)
    {
        _writeback = reader.ReadBoolean();
        foreach (var active in _active)
        {
            active.Busy = reader.ReadBoolean();
            active.Type = (RequestType)reader.ReadUInt32();
            active.Sector = reader.ReadUInt64();
            active.Done = reader.ReadUInt32();
            active.Written = 0;
            active.Status = RequestStatus.Ok;
            if (!active.Busy)
            {
                continue;
            }
            // The request under way is found where it was; a guest that changed it meanwhile gets what it wrote.
            active.Queue.TakeAgain(active.Chain);
            if (!HasFrame(active.Chain))
            {
                throw new MachineStateException("The saved state is damaged: a disk request under way is none.");
            }
        }
    }

    private static int[] QueueSizes(VirtioBlockOptions options)
    {
        ArgumentNullException.ThrowIfNull(options);
        options.Validate();
        var sizes = new int[options.QueueCount];
        Array.Fill(sizes, QueueSize);
        return sizes;
    }

    // Requests of a queue in their order. A long one goes on in the next pass, so that no pass takes long.
    private bool Serve(Active active)
    {
        var requests = 0;
        var bytes = ByteBudget;
        var queue = active.Queue;
        queue.SuppressNotifications();
        do
        {
            while (active.Busy || queue.HasAvailable())
            {
                if (requests++ >= RequestBudget || bytes <= 0)
                {
                    return true;
                }
                if (!active.Busy)
                {
                    queue.TryTake(active.Chain);
                    Begin(active);
                    bytes -= HeaderSize;
                }
                if (!Continue(active, ref bytes))
                {
                    return true;
                }
            }
        }
        while (queue.RequestNotifications());
        return false;
    }

    private static void Begin(Active active)
    {
        var chain = active.Chain;
        if (!HasFrame(chain))
        {
            throw new VirtioProtocolException("A disk request has no header or no room for its status.");
        }
        Span<byte> header = stackalloc byte[HeaderSize];
        chain.Read(0, header);
        active.Type = (RequestType)BinaryPrimitives.ReadUInt32LittleEndian(header);
        active.Sector = BinaryPrimitives.ReadUInt64LittleEndian(header[HeaderSector..]);
        active.Done = active.Written = 0;
        active.Status = RequestStatus.Ok;
        active.Busy = true;
    }

    private static bool HasFrame(VirtqueueChain chain) => chain.ReadableLength >= HeaderSize && chain.WritableLength >= 1;

    /// <returns>Whether the request is done.</returns>
    private bool Continue(Active active, ref int bytes)
    {
        var chain = active.Chain;
        try
        {
            switch (active.Type)
            {
                case RequestType.In or RequestType.Out:
                    if (!Transfer(active, active.Type == RequestType.Out, active.Sector, ref bytes))
                    {
                        return false;
                    }
                    break;
                case RequestType.Flush when HasFeature(FeatureFlush):
                    _backend.Flush();
                    break;
                case RequestType.GetId:
                    WriteSerialNumber(active);
                    break;
                case RequestType.Discard when HasFeature(FeatureDiscard):
                    active.Status = ChangeRanges(chain, zero: false);
                    break;
                case RequestType.WriteZeroes when HasFeature(FeatureWriteZeroes):
                    active.Status = ChangeRanges(chain, zero: true);
                    break;
                default:
                    active.Status = RequestStatus.Unsupported;
                    break;
            }
        }
        catch (StorageException)
        {
            active.Status = RequestStatus.IoError;
        }
        chain.Write(chain.WritableLength - 1, [(byte)active.Status]);
        active.Queue.Return(chain, active.Written + 1);
        active.Busy = false;
        return true;
    }

    /// <returns>Whether the transfer is done.</returns>
    private bool Transfer(Active active, bool write, ulong sector, ref int bytes)
    {
        var length = write ? active.Chain.ReadableLength - HeaderSize : active.Chain.WritableLength - 1;
        if (!IsInside(sector, length) || (write && IsReadOnly))
        {
            active.Status = RequestStatus.IoError;
            return true;
        }
        var start = (long)sector << SectorShift;
        while (active.Done < length)
        {
            if (bytes <= 0)
            {
                return false;
            }
            var count = write ? WritePiece(active, start, length) : ReadPiece(active, start, length);
            active.Done += count;
            bytes -= (int)count;
        }
        if (write && WritesThrough)
        {
            _backend.Flush();
        }
        active.Written = write ? 0 : length;
        return true;
    }

    // Large pieces of memory go straight to the backend, small ones are gathered: a call for each page would cost more.
    private uint ReadPiece(Active active, long start, uint length)
    {
        var chain = active.Chain;
        var piece = Math.Min(chain.WritablePiece(active.Done, out var address), length - active.Done);
        var count = piece & ~(uint)(_backend.SectorSize - 1);
        if (count >= DirectPiece || count == length - active.Done)
        {
            count = Math.Min(count, BufferSize);
            using var scope = Machine!.Memory.TryBeginWrite(address, (int)count, out var found);
            if (found)
            {
                _backend.Read(start + active.Done, scope.Data);
                return count;
            }
        }
        count = Math.Min(length - active.Done, BufferSize);
        var data = _buffer.AsSpan(0, (int)count);
        _backend.Read(start + active.Done, data);
        chain.Write(active.Done, data);
        return count;
    }

    private uint WritePiece(Active active, long start, uint length)
    {
        var count = Math.Min(length - active.Done, BufferSize);
        var data = _buffer.AsSpan(0, (int)count);
        active.Chain.Read(HeaderSize + active.Done, data);
        _backend.Write(start + active.Done, data);
        return count;
    }

    // "Device Requirements: Device Operation": what lies beyond the capacity or is not in whole blocks fails.
    private bool IsInside(ulong sector, ulong length)
    {
        var capacity = (ulong)_backend.Length >> SectorShift;
        var sectors = length >> SectorShift;
        var mask = (ulong)_backend.SectorSize - 1;
        return (length & mask) == 0 && ((sector << SectorShift) & mask) == 0 && sector <= capacity && sectors <= capacity - sector;
    }

    private void WriteSerialNumber(Active active)
    {
        var count = Math.Min(active.Chain.WritableLength - 1, SerialNumberSize);
        active.Chain.Write(0, _serialNumber.AsSpan(0, (int)count));
        active.Written = count;
    }

    private RequestStatus ChangeRanges(VirtqueueChain chain, bool zero)
    {
        var length = chain.ReadableLength - HeaderSize;
        if (length == 0 || length % RangeSize != 0 || length > RangeSize * RangeMax)
        {
            return RequestStatus.IoError;
        }
        Span<byte> ranges = stackalloc byte[RangeSize * RangeMax];
        ranges = ranges[..(int)length];
        chain.Read(HeaderSize, ranges);
        for (; !ranges.IsEmpty; ranges = ranges[RangeSize..])
        {
            var sector = BinaryPrimitives.ReadUInt64LittleEndian(ranges);
            var count = BinaryPrimitives.ReadUInt32LittleEndian(ranges[RangeCount..]);
            var flags = BinaryPrimitives.ReadUInt32LittleEndian(ranges[RangeFlags..]);
            // "Device Requirements: Device Operation": unknown flags, and unmap in a discard, are not supported.
            if ((flags & ~(zero ? RangeUnmap : 0)) != 0)
            {
                return RequestStatus.Unsupported;
            }
            if (count > RangeSectorsMax || !IsInside(sector, (ulong)count << SectorShift))
            {
                return RequestStatus.IoError;
            }
            var (offset, bytes) = ((long)sector << SectorShift, (long)count << SectorShift);
            if (zero)
            {
                _backend.WriteZeroes(offset, bytes, (flags & RangeUnmap) != 0);
            }
            else
            {
                _backend.Discard(offset, bytes);
            }
        }
        if (zero && WritesThrough)
        {
            _backend.Flush();
        }
        return RequestStatus.Ok;
    }

    /// <summary>The request that a queue is at.</summary>
    private sealed class Active(Virtqueue queue)
    {
        public Virtqueue Queue => queue;

        public VirtqueueChain Chain { get; } = new();

        public bool Busy { get; set; }

        public uint Done { get; set; }

        public uint Written { get; set; }

        public RequestStatus Status { get; set; }

        public RequestType Type { get; set; }

        public ulong Sector { get; set; }
    }
}
