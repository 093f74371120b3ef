using System.Buffers.Binary;

namespace KvmSharp.Devices.Virtio;

/// <summary>What a guest tells about its memory. Specification: VIRTIO 1.2, "Memory Statistics Tags".</summary>
public enum BalloonStatistic
{
    /// <summary>Bytes read from swap space since the start.</summary>
    SwapIn = 0,
    /// <summary>Bytes written to swap space since the start.</summary>
    SwapOut = 1,
    /// <summary>Page faults that needed I/O since the start.</summary>
    MajorFaults = 2,
    /// <summary>Page faults that needed none since the start.</summary>
    MinorFaults = 3,
    /// <summary>Bytes that are not used for anything.</summary>
    FreeMemory = 4,
    /// <summary>Bytes that the guest has in all.</summary>
    TotalMemory = 5,
    /// <summary>Bytes that programs could get without swapping.</summary>
    AvailableMemory = 6,
    /// <summary>Bytes that hold copies of files.</summary>
    DiskCaches = 7,
    /// <summary>Huge pages handed out since the start.</summary>
    HugePageAllocations = 8,
    /// <summary>Huge pages that could not be handed out since the start.</summary>
    HugePageFailures = 9,
}

/// <summary>A memory balloon.</summary>
public sealed record VirtioBalloonOptions : VirtioDeviceOptions
{
    /// <summary>How many bytes the guest is to give up from the start on: a multiple of 4096.</summary>
    public ulong InitialTarget { get; init; }

    internal override VirtioDevice Create(ClockMode clock) => new VirtioBalloon(this);

    internal override void Validate()
    {
        base.Validate();
        VirtioBalloon.CheckTarget(InitialTarget);
    }
}

/// <summary>
/// A memory balloon: the guest gives up as much memory as it is told to, and reports what it does not use at the moment; both
/// goes back to the host. Specification: VIRTIO 1.2, "Traditional Memory Balloon Device".
/// </summary>
public sealed class VirtioBalloon : VirtioDevice
{
    private const int DeviceKind = 5;
    private const int QueueSize = 128;
    private const int PageShift = 12;

    // "Feature bits"
    private const ulong FeatureStatistics = 1UL << 1;
    private const ulong FeatureDeflateOnLowMemory = 1UL << 2;
    private const ulong FeatureReporting = 1UL << 5;

    // "Virtqueues": those of features that are not negotiated are not counted.
    private const int InflateQueue = 0;
    private const int DeflateQueue = 1;
    private const int StatisticsQueue = 2;

    // "Device configuration layout"
    private const int ConfigTarget = 0;
    private const int ConfigActual = 4;
    private const int ConfigSize = 8;

    // "Memory Statistics": tag and value
    private const int StatisticSize = 10;
    private const int StatisticValue = 2;
    private const int StatisticsMax = 64;

    // Drivers name 256 or 1024 pages at a time. Each can cost the host a system call, so more would take too long in one go.
    private const int PagesMax = 1024;
    private const int PagesBudget = PagesMax * sizeof(uint);

    // Wiring
    private readonly VirtqueueChain _chain = new();
    private readonly VirtqueueChain _statisticsChain = new();
    private readonly byte[] _pages = new byte[4096];
    private TaskCompletionSource<IReadOnlyDictionary<BalloonStatistic, ulong>>? _request;
    private bool _isDisposed;

    // State
    private uint _target; // pages
    private uint _actual;
    private bool _holdsStatistics; // a buffer of the driver's that goes back when new values are wanted

    /// <summary>Creates the balloon.</summary>
    /// <param name="options">How it starts.</param>
    public VirtioBalloon(VirtioBalloonOptions options)
        : base(DeviceKind, "balloon", QueueSize, QueueSize, QueueSize, QueueSize)
    {
        ArgumentNullException.ThrowIfNull(options);
        options.Validate();
        _target = (uint)(options.InitialTarget >> PageShift);
    }

    /// <summary>
    /// How many bytes the guest is to give up: a multiple of 4096. It follows as it can; lowering the target gives the
    /// memory back. Callable from any thread.
    /// </summary>
    public ulong Target
    {
        get => (ulong)Volatile.Read(ref _target) << PageShift;
        set
        {
            CheckTarget(value);
            ChangeConfig(() => _target = (uint)(value >> PageShift));
        }
    }

    /// <summary>How many bytes the guest says it has given up. Callable from any thread.</summary>
    public ulong Actual => (ulong)Volatile.Read(ref _actual) << PageShift;

    /// <summary>Stops the device's thread; questions to the guest are cancelled.</summary>
    /// <param name="disposing">Always true.</param>
    protected override void Dispose(bool disposing)
    {
        base.Dispose(disposing);
        lock (DeviceLock)
        {
            _isDisposed = true;
            _request?.TrySetCanceled();
            _request = null;
        }
    }

    internal override uint PciClass => 0x00_ff_00;

    internal override int ConfigLength => ConfigSize;

    private protected override ulong DeviceFeatures => FeatureStatistics | FeatureDeflateOnLowMemory | FeatureReporting;

    private int ReportingQueue => HasFeature(FeatureStatistics) ? StatisticsQueue + 1 : StatisticsQueue;

    /// <summary>Asks the guest about its memory. One question at a time; a second one gets the first one's answer.</summary>
    /// <param name="cancellationToken">Ends the waiting, for a guest that does not answer.</param>
    /// <returns>What the guest told; guests leave some values out.</returns>
    /// <exception cref="ObjectDisposedException">The balloon has been disposed, with its machine for example.</exception>
    public Task<IReadOnlyDictionary<BalloonStatistic, ulong>> GetStatisticsAsync(CancellationToken cancellationToken = default)
    {
        Task<IReadOnlyDictionary<BalloonStatistic, ulong>> task;
        lock (DeviceLock)
        {
            ObjectDisposedException.ThrowIf(_isDisposed, this);
            _request ??= new TaskCompletionSource<IReadOnlyDictionary<BalloonStatistic, ulong>>(TaskCreationOptions.RunContinuationsAsynchronously);
            task = _request.Task;
        }
        Wake();
        return task.WaitAsync(cancellationToken);
    }

    internal static void CheckTarget(ulong target)
    {
        if (target % GuestMemory.PageSize != 0 || target >> PageShift > uint.MaxValue)
        {
            throw new KvmSharpException(KvmSharpErrorCode.InvalidArgument, $"A balloon of {target} bytes is not a number of whole pages in range.");
        }
    }

    private protected override void BuildConfig(Span<byte> image)
    {
        BinaryPrimitives.WriteUInt32LittleEndian(image[ConfigTarget..], Volatile.Read(ref _target));
        BinaryPrimitives.WriteUInt32LittleEndian(image[ConfigActual..], Volatile.Read(ref _actual));
    }

    private protected override void OnConfigWritten(int offset, ReadOnlySpan<byte> data)
    {
        if (offset == ConfigActual && data.Length == 4)
        {
            Volatile.Write(ref _actual, BinaryPrimitives.ReadUInt32LittleEndian(data));
        }
    }

    private protected override void OnReset()
    {
        _actual = 0;
        _holdsStatistics = false;
    }

    private protected override bool Serve()
    {
        var more = ServeQueue(Queues[InflateQueue], _chain, Inflate, PagesBudget);
        more |= ServeQueue(Queues[DeflateQueue], _chain, _ => 0); // pages come back when they are touched
        if (HasFeature(FeatureStatistics))
        {
            ServeStatistics();
        }
        if (HasFeature(FeatureReporting))
        {
            more |= ServeQueue(Queues[ReportingQueue], _chain, Report);
        }
        return more;
    }

    private protected override void SaveDevice(StateWriter writer)
    {
        writer.WriteUInt32(_target);
        writer.WriteUInt32(_actual);
        writer.WriteBoolean(_holdsStatistics);
    }

    private protected override void LoadDevice(StateReader reader)
    {
        _target = reader.ReadUInt32();
        _actual = reader.ReadUInt32();
        _holdsStatistics = reader.ReadBoolean();
        if (_holdsStatistics)
        {
            Queues[StatisticsQueue].TakeAgain(_statisticsChain);
        }
    }

    // Numbers of 4 KiB pages; neighbours go together.
    private uint Inflate(VirtqueueChain chain)
    {
        if (chain.ReadableLength > PagesMax * sizeof(uint))
        {
            throw new VirtioProtocolException("A balloon request names too many pages.");
        }
        ulong start = 0, count = 0;
        for (uint done = 0; done + sizeof(uint) <= chain.ReadableLength;)
        {
            var part = _pages.AsSpan(0, (int)Math.Min((uint)_pages.Length, (chain.ReadableLength - done) & ~3u));
            chain.Read(done, part);
            done += (uint)part.Length;
            for (; !part.IsEmpty; part = part[sizeof(uint)..])
            {
                ulong page = BinaryPrimitives.ReadUInt32LittleEndian(part);
                if (count != 0 && page == start + count)
                {
                    count++;
                }
                else if (count != 0 && page + 1 == start)
                {
                    start--;
                    count++;
                }
                else
                {
                    Release(start, count);
                    (start, count) = (page, 1);
                }
            }
        }
        Release(start, count);
        return 0;
    }

    // "Free Page Reporting": the buffers themselves are the pages.
    private uint Report(VirtqueueChain chain)
    {
        for (uint offset = 0; offset < chain.WritableLength;)
        {
            var length = chain.WritablePiece(offset, out var address);
            if ((address.Value | length) % GuestMemory.PageSize == 0)
            {
                Machine!.Memory.Release(address, length);
            }
            offset += length;
        }
        return 0;
    }

    private void ServeStatistics()
    {
        var queue = Queues[StatisticsQueue];
        if (_holdsStatistics && _request is not null)
        {
            queue.Return(_statisticsChain, 0);
            _holdsStatistics = false;
        }
        while (!_holdsStatistics && (queue.HasAvailable() || queue.RequestNotifications()))
        {
            queue.TryTake(_statisticsChain);
            _holdsStatistics = true;
            var statistics = ReadStatistics(_statisticsChain);
            if (statistics.Count != 0)
            {
                _request?.TrySetResult(statistics);
                _request = null;
            }
        }
    }

    private static Dictionary<BalloonStatistic, ulong> ReadStatistics(VirtqueueChain chain)
    {
        var statistics = new Dictionary<BalloonStatistic, ulong>();
        Span<byte> entry = stackalloc byte[StatisticSize];
        for (uint done = 0; done + StatisticSize <= chain.ReadableLength && done < StatisticSize * StatisticsMax; done += StatisticSize)
        {
            chain.Read(done, entry);
            statistics[(BalloonStatistic)BinaryPrimitives.ReadUInt16LittleEndian(entry)] = BinaryPrimitives.ReadUInt64LittleEndian(entry[StatisticValue..]);
        }
        return statistics;
    }

    private void Release(ulong page, ulong count)
    {
        if (count != 0)
        {
            Machine!.Memory.Release(page << PageShift, count << PageShift);
        }
    }
}
