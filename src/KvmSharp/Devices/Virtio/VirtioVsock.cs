using System.Buffers.Binary;
using System.Threading.Channels;

namespace KvmSharp.Devices.Virtio;

/// <summary>Sockets between host and guest.</summary>
/// <param name="GuestCid">The guest's address: 3 to 0xFFFFFFFE.</param>
public sealed record VirtioVsockOptions(uint GuestCid = 3) : VirtioDeviceOptions
{
    internal override VirtioDevice Create(ClockMode clock) => new VirtioVsock(this);

    internal override void Validate()
    {
        base.Validate();
        if (GuestCid is < 3 or uint.MaxValue)
        {
            throw new KvmSharpException(KvmSharpErrorCode.InvalidArgument, $"A guest's socket address is 3 to 0xfffffffe, not {GuestCid}.");
        }
    }
}

/// <summary>Takes the connections that a guest makes to one port of the host.</summary>
public sealed class VsockListener : IDisposable
{
    private const int Backlog = 128;

    private readonly VirtioVsock _device;
    private readonly Channel<VsockStream> _accepted = Channel.CreateBounded<VsockStream>(Backlog);

    internal VsockListener(VirtioVsock device, uint port)
    {
        _device = device;
        Port = port;
    }

    /// <summary>The port.</summary>
    public uint Port { get; }

    /// <summary>Waits for a connection.</summary>
    /// <param name="cancellationToken">Ends the waiting.</param>
    /// <exception cref="ObjectDisposedException">The listener or the device was disposed.</exception>
    public async Task<VsockStream> AcceptAsync(CancellationToken cancellationToken = default)
    {
        try
        {
            return await _accepted.Reader.ReadAsync(cancellationToken).ConfigureAwait(false);
        }
        catch (ChannelClosedException)
        {
            throw new ObjectDisposedException(nameof(VsockListener));
        }
    }

    /// <summary>Refuses further connections.</summary>
    public void Dispose()
    {
        _device.RemoveListener(this);
        Close();
    }

    internal bool TryOffer(VsockStream stream) => _accepted.Writer.TryWrite(stream);

    internal void Close()
    {
        _accepted.Writer.TryComplete();
        while (_accepted.Reader.TryRead(out var stream))
        {
            stream.Dispose();
        }
    }
}

/// <summary>
/// Stream sockets between programs of the host and of the guest; the host's ends are .NET streams. Specification: VIRTIO 1.2,
/// "Socket Device".
/// </summary>
public sealed partial class VirtioVsock : VirtioDevice
{
    private const int QueueSize = 128;
    private const int PayloadMax = VsockStream.BufferSize;
    private const int ConnectionsMax = 256;
    private const int PendingMax = 256; // answers that wait for room: as long as there are many, the guest's packets are not read
    private const uint FirstOwnPort = 0xc000_0000;

    // Configuration
    private readonly uint _guestCid;

    // Wiring: connections do not outlive the device, nor a save
    private readonly VirtqueueChain _chain = new();
    private readonly byte[] _payload = new byte[PayloadMax];
    private readonly Dictionary<(uint Host, uint Guest), VsockStream> _connections = [];
    private readonly Dictionary<uint, VsockListener> _listeners = [];
    private readonly Queue<(uint Host, uint Guest, Operation Operation, uint Flags)> _pending = new();
    private uint _nextPort = FirstOwnPort;
    private bool _isDisposed;

    // State
    private bool _resetEventDue;

    /// <summary>Creates the device.</summary>
    /// <param name="options">The guest's address.</param>
    public VirtioVsock(VirtioVsockOptions options)
        : base(DeviceKind, "vsock", QueueSize, QueueSize, 16)
    {
        ArgumentNullException.ThrowIfNull(options);
        options.Validate();
        _guestCid = options.GuestCid;
    }

    internal override uint PciClass => 0x07_80_00; // communication controller, other

    internal override int ConfigLength => ConfigSize;

    private protected override ulong DeviceFeatures => 0; // without a feature bit: streams

    /// <summary>Accepts connections of the guest to a port of the host.</summary>
    /// <param name="port">The port.</param>
    /// <exception cref="KvmSharpException">Somebody listens there already.</exception>
    /// <exception cref="ObjectDisposedException">The device has been disposed, with its machine for example.</exception>
    public VsockListener Listen(uint port)
    {
        lock (DeviceLock)
        {
            ObjectDisposedException.ThrowIf(_isDisposed, this);
            var listener = new VsockListener(this, port);
            return _listeners.TryAdd(port, listener) ? listener
                : throw new KvmSharpException(KvmSharpErrorCode.AlreadyExists, $"Somebody listens at socket port {port} already.");
        }
    }

    /// <summary>Connects to a port of the guest.</summary>
    /// <param name="port">The port.</param>
    /// <param name="cancellationToken">Gives the attempt up, for a guest that does not answer.</param>
    /// <exception cref="IOException">Nobody listens there, or the guest has no driver for sockets.</exception>
    /// <exception cref="ObjectDisposedException">The device has been disposed, with its machine for example.</exception>
    public async Task<VsockStream> ConnectAsync(uint port, CancellationToken cancellationToken = default)
    {
        VsockStream stream;
        lock (DeviceLock)
        {
            ObjectDisposedException.ThrowIf(_isDisposed, this);
            if (!IsDriverReady || _connections.Count >= ConnectionsMax)
            {
                throw new IOException("The guest has no driver for sockets, or too many connections.");
            }
            do
            {
                _nextPort = _nextPort == uint.MaxValue - 1 ? FirstOwnPort : _nextPort + 1;
            }
            while (_connections.ContainsKey((_nextPort, port)));
            stream = new VsockStream(this, _nextPort, port)
            {
                Connecting = new TaskCompletionSource<VsockStream>(TaskCreationOptions.RunContinuationsAsynchronously),
            };
            _connections.Add((_nextPort, port), stream);
            _pending.Enqueue((_nextPort, port, Operation.Request, 0));
        }
        Wake();
        try
        {
            return await stream.Connecting.Task.WaitAsync(cancellationToken).ConfigureAwait(false);
        }
        catch
        {
            lock (DeviceLock)
            {
                if (_connections.Remove((stream.HostPort, stream.GuestPort)))
                {
                    _pending.Enqueue((stream.HostPort, stream.GuestPort, Operation.Reset, 0));
                }
            }
            Wake();
            throw;
        }
    }

    /// <summary>Stops the device's thread; connections break and listeners close.</summary>
    /// <param name="disposing">Always true.</param>
    protected override void Dispose(bool disposing)
    {
        base.Dispose(disposing);
        VsockListener[] listeners;
        lock (DeviceLock)
        {
            _isDisposed = true;
            BreakAll();
            listeners = [.. _listeners.Values];
            _listeners.Clear();
        }
        foreach (var listener in listeners)
        {
            listener.Close();
        }
    }

    internal void StreamChanged() => Wake();

    internal void RemoveListener(VsockListener listener)
    {
        lock (DeviceLock)
        {
            if (_listeners.GetValueOrDefault(listener.Port) == listener)
            {
                _listeners.Remove(listener.Port);
            }
        }
    }

    private protected override void BuildConfig(Span<byte> image) => BinaryPrimitives.WriteUInt64LittleEndian(image, _guestCid);

    private protected override void OnReset() => BreakAll();

    private protected override bool Serve()
    {
        SendResetEvent();
        var more = Transmit();
        more |= Receive();
        return more;
    }

    private protected override void SaveDevice(StateWriter writer) => writer.WriteBoolean(_resetEventDue);

    // "Device Operation": connections are not there any more; the event tells the guest.
    private protected override void LoadDevice(StateReader reader)
    {
        _ = reader.ReadBoolean();
        _resetEventDue = true;
    }

    private void BreakAll()
    {
        foreach (var stream in _connections.Values)
        {
            stream.Break();
        }
        _connections.Clear();
        _pending.Clear();
        _resetEventDue = false;
    }

    private void SendResetEvent()
    {
        var queue = Queues[EventQueue];
        if (_resetEventDue && queue.TryTake(_chain))
        {
            if (_chain.WritableLength >= sizeof(uint))
            {
                _chain.Write(0, BitConverter.GetBytes(EventTransportReset));
            }
            queue.Return(_chain, Math.Min(_chain.WritableLength, sizeof(uint)));
            _resetEventDue = false;
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
            while (_pending.Count < PendingMax && queue.HasAvailable())
            {
                if (requests++ >= RequestBudget)
                {
                    return true;
                }
                queue.TryTake(_chain);
                HandlePacket(_chain);
                queue.Return(_chain, 0);
            }
            SendPending();
        }
        while (queue.RequestNotifications() && _pending.Count < PendingMax);
        return false;
    }

    private void HandlePacket(VirtqueueChain chain)
    {
        if (chain.ReadableLength < HeaderSize)
        {
            throw new VirtioProtocolException("A socket packet has no header.");
        }
        Span<byte> header = stackalloc byte[HeaderSize];
        chain.Read(0, header);
        var length = BinaryPrimitives.ReadUInt32LittleEndian(header[HeaderLength..]);
        if (length > chain.ReadableLength - HeaderSize || length > PayloadMax)
        {
            throw new VirtioProtocolException("A socket packet is longer than its buffers.");
        }
        if (BinaryPrimitives.ReadUInt64LittleEndian(header[HeaderSourceCid..]) != _guestCid
            || BinaryPrimitives.ReadUInt64LittleEndian(header[HeaderTargetCid..]) != HostCid)
        {
            return;
        }
        var guest = BinaryPrimitives.ReadUInt32LittleEndian(header[HeaderSourcePort..]);
        var host = BinaryPrimitives.ReadUInt32LittleEndian(header[HeaderTargetPort..]);
        var operation = (Operation)BinaryPrimitives.ReadUInt16LittleEndian(header[HeaderOperation..]);
        if (BinaryPrimitives.ReadUInt16LittleEndian(header[HeaderType..]) != TypeStream)
        {
            Refuse(host, guest, operation);
            return;
        }
        if (operation == Operation.Request)
        {
            Accept(host, guest, header);
            return;
        }
        if (!_connections.TryGetValue((host, guest), out var stream))
        {
            Refuse(host, guest, operation);
            return;
        }
        stream.PeerBufferSize = BinaryPrimitives.ReadUInt32LittleEndian(header[HeaderBufferSize..]);
        stream.PeerForwarded = BinaryPrimitives.ReadUInt32LittleEndian(header[HeaderForwarded..]);
        HandleOperation(stream, operation, BinaryPrimitives.ReadUInt32LittleEndian(header[HeaderFlags..]), chain, (int)length);
    }

    private void HandleOperation(VsockStream stream, Operation operation, uint flags, VirtqueueChain chain, int length)
    {
        switch (operation)
        {
            case Operation.Response when stream.Connecting is { } connecting && !stream.IsEstablished:
                stream.IsEstablished = true;
                connecting.TrySetResult(stream);
                break;
            case Operation.ReadWrite when stream.IsEstablished:
                uint done = HeaderSize;
                if (!stream.Receive(length, piece =>
                {
                    chain.Read(done, piece);
                    done += (uint)piece.Length;
                }))
                {
                    Drop(stream, tell: true); // more than it was allowed to send
                }
                break;
            case Operation.CreditUpdate when stream.IsEstablished:
                break;
            case Operation.CreditRequest when stream.IsEstablished:
                stream.CreditWanted = true;
                break;
            case Operation.Shutdown when stream.IsEstablished:
                stream.End(input: (flags & NoMoreSend) != 0, output: (flags & NoMoreReceive) != 0);
                if ((flags & (NoMoreSend | NoMoreReceive)) == (NoMoreSend | NoMoreReceive))
                {
                    Drop(stream, tell: true);
                }
                break;
            case Operation.Reset:
                Drop(stream, tell: false);
                break;
            default:
                Drop(stream, tell: true);
                break;
        }
    }

    private void Accept(uint host, uint guest, ReadOnlySpan<byte> header)
    {
        if (_connections.ContainsKey((host, guest)) || _connections.Count >= ConnectionsMax || !_listeners.TryGetValue(host, out var listener))
        {
            Refuse(host, guest, Operation.Request);
            return;
        }
        var stream = new VsockStream(this, host, guest)
        {
            IsEstablished = true,
            PeerBufferSize = BinaryPrimitives.ReadUInt32LittleEndian(header[HeaderBufferSize..]),
            PeerForwarded = BinaryPrimitives.ReadUInt32LittleEndian(header[HeaderForwarded..]),
        };
        if (!listener.TryOffer(stream))
        {
            Refuse(host, guest, Operation.Request);
            return;
        }
        _connections.Add((host, guest), stream);
        _pending.Enqueue((host, guest, Operation.Response, 0));
    }

    private void Refuse(uint host, uint guest, Operation operation)
    {
        if (operation != Operation.Reset)
        {
            _pending.Enqueue((host, guest, Operation.Reset, 0));
        }
    }

    private void Drop(VsockStream stream, bool tell)
    {
        _connections.Remove((stream.HostPort, stream.GuestPort));
        stream.Break();
        if (tell)
        {
            _pending.Enqueue((stream.HostPort, stream.GuestPort, Operation.Reset, 0));
        }
    }

    // To the guest.

    private bool Receive()
    {
        SendPending();
        var budget = RequestBudget;
        foreach (var stream in _connections.Values)
        {
            if (!stream.IsEstablished)
            {
                continue;
            }
            while (SendData(stream))
            {
                if (--budget == 0)
                {
                    return true;
                }
            }
            if (stream.WantsShutdown && !stream.ShutdownSent && HasRoom())
            {
                stream.ShutdownSent = true;
                Send(stream.HostPort, stream.GuestPort, stream, Operation.Shutdown, NoMoreReceive | NoMoreSend, []);
            }
            else if (stream.CreditWanted && HasRoom())
            {
                Send(stream.HostPort, stream.GuestPort, stream, Operation.CreditUpdate, 0, []);
            }
        }
        return false;
    }

    private bool HasRoom() => Queues[ReceiveQueue].HasAvailable() || Queues[ReceiveQueue].RequestNotifications();

    // One packet of what was written, as far as the guest has room for it.
    private bool SendData(VsockStream stream)
    {
        // "Buffer Space Management"; a guest that claims to have read more than it got has no room.
        var underWay = stream.Sent - stream.PeerForwarded;
        var credit = underWay <= stream.PeerBufferSize ? stream.PeerBufferSize - underWay : 0;
        var count = (int)Math.Min(Math.Min((uint)stream.PendingOutput, credit), PayloadMax);
        if (count == 0 || !HasRoom())
        {
            return false;
        }
        var queue = Queues[ReceiveQueue];
        queue.TryTake(_chain);
        if (_chain.WritableLength <= HeaderSize)
        {
            throw new VirtioProtocolException("A socket buffer has no room for a packet.");
        }
        var data = _payload.AsSpan(0, (int)Math.Min((uint)count, _chain.WritableLength - HeaderSize));
        stream.TakeOutput(data);
        stream.Sent += (uint)data.Length;
        Fill(stream.HostPort, stream.GuestPort, stream, Operation.ReadWrite, 0, data);
        return true;
    }

    private void SendPending()
    {
        while (_pending.TryPeek(out var packet) && HasRoom())
        {
            _pending.Dequeue();
            Send(packet.Host, packet.Guest, _connections.GetValueOrDefault((packet.Host, packet.Guest)), packet.Operation, packet.Flags, []);
        }
    }

    private void Send(uint host, uint guest, VsockStream? stream, Operation operation, uint flags, ReadOnlySpan<byte> data)
    {
        Queues[ReceiveQueue].TryTake(_chain);
        if (_chain.WritableLength < HeaderSize)
        {
            throw new VirtioProtocolException("A socket buffer has no room for a header.");
        }
        Fill(host, guest, stream, operation, flags, data);
    }

    private void Fill(uint host, uint guest, VsockStream? stream, Operation operation, uint flags, ReadOnlySpan<byte> data)
    {
        Span<byte> header = stackalloc byte[HeaderSize];
        header.Clear();
        BinaryPrimitives.WriteUInt64LittleEndian(header[HeaderSourceCid..], HostCid);
        BinaryPrimitives.WriteUInt64LittleEndian(header[HeaderTargetCid..], _guestCid);
        BinaryPrimitives.WriteUInt32LittleEndian(header[HeaderSourcePort..], host);
        BinaryPrimitives.WriteUInt32LittleEndian(header[HeaderTargetPort..], guest);
        BinaryPrimitives.WriteUInt32LittleEndian(header[HeaderLength..], (uint)data.Length);
        BinaryPrimitives.WriteUInt16LittleEndian(header[HeaderType..], TypeStream);
        BinaryPrimitives.WriteUInt16LittleEndian(header[HeaderOperation..], (ushort)operation);
        BinaryPrimitives.WriteUInt32LittleEndian(header[HeaderFlags..], flags);
        if (stream is not null)
        {
            BinaryPrimitives.WriteUInt32LittleEndian(header[HeaderBufferSize..], VsockStream.BufferSize);
            BinaryPrimitives.WriteUInt32LittleEndian(header[HeaderForwarded..], stream.TellForwarded());
        }
        _chain.Write(0, header);
        _chain.Write(HeaderSize, data);
        Queues[ReceiveQueue].Return(_chain, (uint)(HeaderSize + data.Length));
    }
}
