using System.Buffers.Binary;
using System.Threading.Channels;
using KvmSharp.Networking;

namespace KvmSharp.Devices.Virtio;

/// <summary>A network card.</summary>
/// <param name="Backend">What it is plugged into.</param>
public sealed record VirtioNetworkOptions(INetworkBackend Backend) : VirtioDeviceOptions
{
    /// <summary>The card's address; not that of a group.</summary>
    public MacAddress MacAddress { get; init; } = new([0x52, 0x54, 0x00, 0x12, 0x34, 0x56]);

    /// <summary>The longest packet behind the Ethernet header, in bytes: 68 to 65535. Segments of larger packets keep to it.</summary>
    public int Mtu { get; init; } = 1500;

    internal override VirtioDevice Create(ClockMode clock) => new VirtioNetwork(this);

    internal override void Validate()
    {
        base.Validate();
        ArgumentNullException.ThrowIfNull(Backend);
        if (MacAddress.IsMulticast)
        {
            throw new KvmSharpException(KvmSharpErrorCode.InvalidArgument, $"A network card cannot have the address {MacAddress} of a group.");
        }
        if (Mtu is < 68 or > 65535)
        {
            throw new KvmSharpException(KvmSharpErrorCode.InvalidArgument, $"The MTU of a network card is 68 to 65535 bytes, not {Mtu}.");
        }
    }
}

/// <summary>
/// A network card: checksum and TCP segmentation offloads, mergeable buffers, control queue with address filters.
/// Specification: VIRTIO 1.2, "Network Device".
/// </summary>
public sealed partial class VirtioNetwork : VirtioDevice
{
    private const int QueueSize = 256;
    private const int ControlQueueSize = 64;
    private const int ReceiveQueue = 0;
    private const int TransmitQueue = 1;
    private const int ControlQueue = 2;
    private const int MergeMax = 64; // buffers for one packet

    // Configuration
    private readonly VirtioNetworkOptions _options;

    // Wiring
    private readonly INetworkBackend _backend;
    private readonly VirtqueueChain _chain = new();
    private readonly VirtqueueChain[] _merged = new VirtqueueChain[MergeMax];
    private readonly Queue<NetworkPacket> _arrived = new(); // finished for this guest, not yet delivered
    private readonly Queue<NetworkPacket> _leaving = new(); // finished for the backend, not yet taken
    private bool _waitsForArrival; // the channel will wake the device
    private bool _waitsForRoom;

    // State
    private readonly ReceiveFilter _filter = new();
    private ulong _guestOffloads;
    private bool _linkUp = true;

    /// <summary>Creates the card.</summary>
    /// <param name="options">The backend and how the guest sees the card.</param>
    public VirtioNetwork(VirtioNetworkOptions options)
        : base(DeviceKind, "network", Check(options) ? [QueueSize, QueueSize, ControlQueueSize] : [])
    {
        _options = options;
        _backend = options.Backend;
        _filter.Reset(options.MacAddress);
        for (var i = 0; i < MergeMax; i++)
        {
            _merged[i] = new VirtqueueChain();
        }
    }

    /// <summary>How many packets were thrown away because the guest's buffers did not fit or the packet contradicted itself.</summary>
    public long DroppedPackets { get; private set; }

    /// <summary>Whether the cable is plugged in. Callable from any thread.</summary>
    public bool IsLinkUp
    {
        get => Volatile.Read(ref _linkUp);
        set => ChangeConfig(() => _linkUp = value);
    }

    /// <summary>Stops the device's thread. The backend stays as it is.</summary>
    /// <param name="disposing">Always true.</param>
    protected override void Dispose(bool disposing)
    {
        base.Dispose(disposing);
        lock (DeviceLock)
        {
            DisposeAll(_arrived);
            DisposeAll(_leaving);
        }
        if (Machine is { } machine)
        {
            _backend.Detach(machine.Clock);
        }
    }

    private protected override void OnAttached() => _backend.Attach(Machine!.Clock);

    internal override uint PciClass => 0x02_00_00; // Ethernet controller

    internal override int ConfigLength => ConfigSize;

    private protected override ulong DeviceFeatures =>
        FeatureChecksum | FeatureGuestChecksum | FeatureControlOffloads | FeatureMtu | FeatureMac | FeatureGuestTcp4 | FeatureGuestTcp6
        | FeatureHostTcp4 | FeatureHostTcp6 | FeatureMergeableBuffers | FeatureStatus | FeatureControlQueue | FeatureControlReceive
        | FeatureControlMac;

    private NetworkOffloads AcceptedByGuest =>
        ((_guestOffloads & FeatureGuestChecksum) != 0 ? NetworkOffloads.Checksum : 0)
        | ((_guestOffloads & FeatureGuestTcp4) != 0 ? NetworkOffloads.Tcp4 : 0)
        | ((_guestOffloads & FeatureGuestTcp6) != 0 ? NetworkOffloads.Tcp6 : 0);

    // "Feature bit requirements"
    private protected override bool SupportsFeatures(ulong features)
    {
        bool Needs(ulong feature, ulong needed) => (features & feature) == 0 || (features & needed) != 0;
        return Needs(FeatureGuestTcp4 | FeatureGuestTcp6, FeatureGuestChecksum) && Needs(FeatureHostTcp4 | FeatureHostTcp6, FeatureChecksum)
            && Needs(FeatureControlReceive | FeatureControlMac | FeatureControlOffloads, FeatureControlQueue);
    }

    private protected override void OnDriverReady() => _guestOffloads = DriverFeatures & GuestOffloads;

    private protected override void OnReset()
    {
        _filter.Reset(_options.MacAddress);
        _guestOffloads = 0;
        DisposeAll(_arrived);
    }

    private protected override void BuildConfig(Span<byte> image)
    {
        _options.MacAddress.CopyTo(image[ConfigMac..]);
        BinaryPrimitives.WriteUInt16LittleEndian(image[ConfigStatus..], IsLinkUp ? StatusLinkUp : (ushort)0);
        BinaryPrimitives.WriteUInt16LittleEndian(image[ConfigMtu..], (ushort)_options.Mtu);
    }

    private protected override bool Serve()
    {
        var more = false;
        if (HasFeature(FeatureControlQueue))
        {
            more |= ServeQueue(Queues[ControlQueue], _chain, Control);
        }
        more |= Transmit();
        more |= Receive();
        return more;
    }

    private protected override void SaveDevice(StateWriter writer)
    {
        // Packets on their way are lost, as on a wire.
        writer.WriteUInt64(_guestOffloads);
        writer.WriteBoolean(_linkUp);
        _filter.Save(writer);
    }

    private protected override void LoadDevice(StateReader reader)
    {
        _guestOffloads = reader.ReadUInt64() & GuestOffloads;
        _linkUp = reader.ReadBoolean();
        _filter.Load(reader);
    }

    private static bool Check(VirtioNetworkOptions options)
    {
        ArgumentNullException.ThrowIfNull(options);
        options.Validate();
        return true;
    }

    private static void DisposeAll(Queue<NetworkPacket> packets)
    {
        while (packets.TryDequeue(out var packet))
        {
            packet.Dispose();
        }
    }

    // From the guest.

    private bool Transmit()
    {
        var queue = Queues[TransmitQueue];
        var requests = 0;
        queue.SuppressNotifications();
        do
        {
            while (HasRoom() && queue.HasAvailable())
            {
                if (requests++ >= RequestBudget)
                {
                    return true;
                }
                queue.TryTake(_chain);
                Send(_chain);
                queue.Return(_chain, 0);
            }
            if (_leaving.Count != 0)
            {
                return false; // the backend wakes the device when there is room
            }
        }
        while (queue.RequestNotifications());
        return false;
    }

    private void Send(VirtqueueChain chain)
    {
        var length = (long)chain.ReadableLength - HeaderSize;
        if (length is < NetworkPacket.HeaderLength or > NetworkPacket.MaxLength)
        {
            DroppedPackets++;
            return;
        }
        Span<byte> header = stackalloc byte[HeaderSize];
        chain.Read(0, header);
        if (!TryReadOffload(header, out var offload))
        {
            DroppedPackets++;
            return;
        }
        if (!IsLinkUp)
        {
            return;
        }
        var packet = NetworkPacket.Create((int)length, offload);
        chain.Read(HeaderSize, packet.Data);
        PacketFinisher.Finish(packet, _backend.Accepts, _leaving.Enqueue);
        HasRoom();
    }

    // "Packet Transmission": the header's fields mean something with their features only.
    private bool TryReadOffload(ReadOnlySpan<byte> header, out PacketOffload offload)
    {
        offload = default;
        var needsChecksum = (header[0] & HeaderNeedsChecksum) != 0;
        var segmentation = header[HeaderSegmentation] & ~SegmentationCongestion;
        var allowed = (PacketSegmentation)segmentation switch
        {
            PacketSegmentation.None => true,
            PacketSegmentation.Tcp4 => HasFeature(FeatureHostTcp4) && needsChecksum,
            PacketSegmentation.Tcp6 => HasFeature(FeatureHostTcp6) && needsChecksum,
            _ => false,
        };
        if (!allowed || (needsChecksum && !HasFeature(FeatureChecksum)))
        {
            return false;
        }
        offload = new PacketOffload
        {
            NeedsChecksum = needsChecksum,
            ChecksumStart = BinaryPrimitives.ReadUInt16LittleEndian(header[HeaderChecksumStart..]),
            ChecksumOffset = BinaryPrimitives.ReadUInt16LittleEndian(header[HeaderChecksumOffset..]),
            Segmentation = (PacketSegmentation)segmentation,
            SegmentSize = BinaryPrimitives.ReadUInt16LittleEndian(header[HeaderSegmentSize..]),
        };
        return true;
    }

    // Passes on what is finished. Whether the backend has taken it all.
    private bool HasRoom()
    {
        while (_leaving.TryPeek(out var packet))
        {
            if (_backend.FromGuest.TryWrite(packet))
            {
                _leaving.Dequeue();
                continue;
            }
            if (Volatile.Read(ref _waitsForRoom))
            {
                return false;
            }
            var room = _backend.FromGuest.WaitToWriteAsync();
            if (!room.IsCompleted)
            {
                Volatile.Write(ref _waitsForRoom, true);
                WakeAfter(room, () => Volatile.Write(ref _waitsForRoom, false));
                return false;
            }
            if (!room.IsCompletedSuccessfully || !room.Result)
            {
                DisposeAll(_leaving); // nobody is at the other end any more
            }
        }
        return true;
    }

    // To the guest.

    private bool Receive()
    {
        var queue = Queues[ReceiveQueue];
        for (var packets = 0; ; packets++)
        {
            if (!HasArrived())
            {
                return false;
            }
            if (packets >= RequestBudget)
            {
                return true;
            }
            if (!queue.HasAvailable() && !queue.RequestNotifications())
            {
                return false;
            }
            if (!Deliver(queue, _arrived.Peek()))
            {
                return false; // more buffers are needed; the driver notifies of them
            }
            _arrived.Dequeue().Dispose();
        }
    }

    private bool HasArrived()
    {
        while (_arrived.Count == 0)
        {
            if (_backend.ToGuest.TryRead(out var packet))
            {
                if (packet.Length is >= NetworkPacket.HeaderLength && IsLinkUp && _filter.Accepts(new MacAddress(packet.Data[..MacAddress.Length])))
                {
                    PacketFinisher.Finish(packet, AcceptedByGuest, _arrived.Enqueue);
                }
                else
                {
                    packet.Dispose();
                }
                continue;
            }
            if (Volatile.Read(ref _waitsForArrival))
            {
                return false;
            }
            var arrival = _backend.ToGuest.WaitToReadAsync();
            if (!arrival.IsCompleted)
            {
                Volatile.Write(ref _waitsForArrival, true);
                WakeAfter(arrival, () => Volatile.Write(ref _waitsForArrival, false));
                return false;
            }
            if (!arrival.IsCompletedSuccessfully || !arrival.Result)
            {
                return false; // nothing will come any more
            }
        }
        return true;
    }

    private void WakeAfter(ValueTask<bool> task, Action clear) =>
        task.ConfigureAwait(false).GetAwaiter().OnCompleted(() =>
        {
            clear();
            Wake();
        });

    // False when the guest has not made enough buffers available.
    private bool Deliver(Virtqueue queue, NetworkPacket packet)
    {
        var total = (uint)(HeaderSize + packet.Length);
        var merge = HasFeature(FeatureMergeableBuffers);
        var taken = 0;
        uint room = 0;
        while (room < total)
        {
            if (taken == (merge ? MergeMax : 1))
            {
                // "Setting Up Receive Buffers": it fits into no buffer that the driver would make.
                queue.Untake(taken);
                DroppedPackets++;
                return true;
            }
            if (!queue.HasAvailable() && !queue.RequestNotifications())
            {
                queue.Untake(taken); // the notification is for buffers behind those
                return false;
            }
            queue.TryTake(_merged[taken]);
            if (_merged[taken].WritableLength < HeaderSize)
            {
                throw new VirtioProtocolException("A receive buffer has no room for a header.");
            }
            room += Math.Min(_merged[taken++].WritableLength, total);
        }
        Span<byte> header = stackalloc byte[HeaderSize];
        WriteHeader(header, packet, taken);
        _merged[0].Write(0, header);
        ReadOnlySpan<byte> rest = packet.Data;
        for (var i = 0; i < taken; i++)
        {
            var start = i == 0 ? HeaderSize : 0;
            var count = (int)Math.Min(_merged[i].WritableLength - (uint)start, (uint)rest.Length);
            _merged[i].Write((uint)start, rest[..count]);
            rest = rest[count..];
            queue.Put(_merged[i], (uint)(start + count));
        }
        queue.Publish(); // all at once: the driver expects them together
        return true;
    }

    private static void WriteHeader(Span<byte> header, NetworkPacket packet, int buffers)
    {
        var offload = packet.Offload;
        header.Clear();
        header[0] = offload.NeedsChecksum ? HeaderNeedsChecksum : offload.ChecksumValid ? HeaderDataValid : (byte)0;
        header[HeaderSegmentation] = (byte)offload.Segmentation;
        if (offload.NeedsChecksum)
        {
            BinaryPrimitives.WriteUInt16LittleEndian(header[HeaderChecksumStart..], offload.ChecksumStart);
            BinaryPrimitives.WriteUInt16LittleEndian(header[HeaderChecksumOffset..], offload.ChecksumOffset);
        }
        if (offload.Segmentation != PacketSegmentation.None)
        {
            BinaryPrimitives.WriteUInt16LittleEndian(header[HeaderSegmentSize..], offload.SegmentSize);
            BinaryPrimitives.WriteUInt16LittleEndian(header[HeaderLength..], (ushort)Math.Min(packet.Length, 128));
        }
        BinaryPrimitives.WriteUInt16LittleEndian(header[HeaderBuffers..], (ushort)buffers);
    }

    // "Control Virtqueue"

    private uint Control(VirtqueueChain chain)
    {
        if (chain.ReadableLength < ControlHeaderSize || chain.WritableLength < 1)
        {
            throw new VirtioProtocolException("A control command has no header or no room for its answer.");
        }
        Span<byte> header = stackalloc byte[ControlHeaderSize];
        chain.Read(0, header);
        var command = (ControlCommand)(header[0] << 8 | header[1]);
        var data = new byte[Math.Min(chain.ReadableLength - ControlHeaderSize, 4096)];
        chain.Read(ControlHeaderSize, data);
        chain.Write(0, [Execute(command, data) ? ControlOk : ControlError]);
        return 1;
    }

    private bool Execute(ControlCommand command, ReadOnlySpan<byte> data)
    {
        switch (command)
        {
            case <= ControlCommand.NoBroadcast when HasFeature(FeatureControlReceive) && data.Length >= 1:
                return _filter.SetMode((int)command, data[0] != 0);
            case ControlCommand.SetMacTable when HasFeature(FeatureControlReceive):
                return _filter.SetTable(data);
            case ControlCommand.SetMac when HasFeature(FeatureControlMac) && data.Length >= MacAddress.Length:
                return _filter.SetAddress(new MacAddress(data[..MacAddress.Length]));
            case ControlCommand.SetOffloads when HasFeature(FeatureControlOffloads) && data.Length >= 8:
                var offloads = BinaryPrimitives.ReadUInt64LittleEndian(data);
                if ((offloads & ~(DriverFeatures & GuestOffloads)) != 0)
                {
                    return false;
                }
                _guestOffloads = offloads;
                return true;
            default:
                return false;
        }
    }
}
