namespace KvmSharp.Devices.Virtio;

/// <summary>
/// The host's end of a connection with a guest's socket. Reading and writing are safe from two threads at once, one each.
/// Disposing closes the connection after what was written has been sent.
/// </summary>
public sealed class VsockStream : Stream
{
    // What either side may have under way: this is memory of the host that a guest can fill.
    internal const int BufferSize = 1 << 16;

    private readonly VirtioVsock _device;
    private readonly Lock _lock = new();
    private readonly ByteRing _input = new(BufferSize);
    private readonly ByteRing _output = new(BufferSize);
    private TaskCompletionSource _changed = NewSignal();
    private bool _inputEnded; // the guest sends no more
    private bool _outputEnded; // the guest receives no more
    private bool _broken;
    private bool _disposed;
    private uint _forwarded; // bytes of the guest that were read
    private uint _forwardedTold;
    private bool _creditWanted;

    internal VsockStream(VirtioVsock device, uint hostPort, uint guestPort)
    {
        _device = device;
        HostPort = hostPort;
        GuestPort = guestPort;
    }

    /// <summary>The port of this end.</summary>
    public uint HostPort { get; }

    /// <summary>The port of the guest's end.</summary>
    public uint GuestPort { get; }

    /// <inheritdoc/>
    public override bool CanRead => true;

    /// <inheritdoc/>
    public override bool CanWrite => true;

    /// <inheritdoc/>
    public override bool CanSeek => false;

    /// <inheritdoc/>
    public override long Length => throw new NotSupportedException();

    /// <inheritdoc/>
    public override long Position
    {
        get => throw new NotSupportedException();
        set => throw new NotSupportedException();
    }

    // The rest is the connection's state, which the device keeps under its lock.
    internal bool IsEstablished { get; set; }

    internal bool ShutdownSent { get; set; }

    internal uint PeerBufferSize { get; set; }

    internal uint PeerForwarded { get; set; }

    internal uint Sent { get; set; }

    /// <summary>Whether the guest is to learn how much has been read.</summary>
    internal bool CreditWanted
    {
        get
        {
            lock (_lock)
            {
                return _creditWanted;
            }
        }

        set
        {
            lock (_lock)
            {
                _creditWanted = value;
            }
        }
    }

    internal TaskCompletionSource<VsockStream>? Connecting { get; init; }

    /// <inheritdoc/>
    public override int Read(byte[] buffer, int offset, int count) => Read(buffer.AsSpan(offset, count));

    /// <inheritdoc/>
    public override int Read(Span<byte> buffer)
    {
        while (true)
        {
            if (TryRead(buffer, out var count) is not { } changed)
            {
                return count;
            }
            changed.Wait();
        }
    }

    /// <inheritdoc/>
    public override async ValueTask<int> ReadAsync(Memory<byte> buffer, CancellationToken cancellationToken = default)
    {
        while (true)
        {
            if (TryRead(buffer.Span, out var count) is not { } changed)
            {
                return count;
            }
            await changed.WaitAsync(cancellationToken).ConfigureAwait(false);
        }
    }

    /// <inheritdoc/>
    public override Task<int> ReadAsync(byte[] buffer, int offset, int count, CancellationToken cancellationToken) =>
        ReadAsync(buffer.AsMemory(offset, count), cancellationToken).AsTask();

    /// <inheritdoc/>
    public override void Write(byte[] buffer, int offset, int count) => Write(buffer.AsSpan(offset, count));

    /// <inheritdoc/>
    public override void Write(ReadOnlySpan<byte> buffer)
    {
        while (!buffer.IsEmpty)
        {
            if (TryWrite(buffer, out var count) is { } changed)
            {
                changed.Wait();
            }
            buffer = buffer[count..];
        }
    }

    /// <inheritdoc/>
    public override async ValueTask WriteAsync(ReadOnlyMemory<byte> buffer, CancellationToken cancellationToken = default)
    {
        while (!buffer.IsEmpty)
        {
            if (TryWrite(buffer.Span, out var count) is { } changed)
            {
                await changed.WaitAsync(cancellationToken).ConfigureAwait(false);
            }
            buffer = buffer[count..];
        }
    }

    /// <inheritdoc/>
    public override Task WriteAsync(byte[] buffer, int offset, int count, CancellationToken cancellationToken) =>
        WriteAsync(buffer.AsMemory(offset, count), cancellationToken).AsTask();

    /// <summary>Does nothing: what is written is on its way.</summary>
    public override void Flush()
    {
    }

    /// <inheritdoc/>
    public override long Seek(long offset, SeekOrigin origin) => throw new NotSupportedException();

    /// <inheritdoc/>
    public override void SetLength(long value) => throw new NotSupportedException();

    // Called by the device, under its lock.

    /// <summary>Bytes of the guest. False when it sent more than it was allowed.</summary>
    internal bool Receive(int count, Action<Span<byte>> copy)
    {
        lock (_lock)
        {
            if (_disposed || _inputEnded)
            {
                _forwarded += (uint)count; // nobody will read it
                _creditWanted = true;
                return true;
            }
            if (!_input.TryWrite(count, copy))
            {
                return false;
            }
            SignalLocked();
            return true;
        }
    }

    /// <summary>How much has been read, for a packet that tells the guest.</summary>
    internal uint TellForwarded()
    {
        lock (_lock)
        {
            _creditWanted = false;
            return _forwardedTold = _forwarded;
        }
    }

    internal int PendingOutput
    {
        get
        {
            lock (_lock)
            {
                return _output.Count;
            }
        }
    }

    internal void TakeOutput(Span<byte> target)
    {
        lock (_lock)
        {
            _output.Read(target);
            SignalLocked();
        }
    }

    /// <summary>Whether this end was disposed and everything has been sent.</summary>
    internal bool WantsShutdown
    {
        get
        {
            lock (_lock)
            {
                return _disposed && _output.Count == 0;
            }
        }
    }

    internal void End(bool input, bool output)
    {
        lock (_lock)
        {
            _inputEnded |= input;
            _outputEnded |= output;
            SignalLocked();
        }
    }

    internal void Break()
    {
        lock (_lock)
        {
            // After both ends were shut down a reset is the regular end.
            _broken |= !_inputEnded;
            _inputEnded = _outputEnded = true;
            SignalLocked();
        }
        Connecting?.TrySetException(new IOException("The guest refused the connection or is gone."));
    }

    /// <inheritdoc/>
    protected override void Dispose(bool disposing)
    {
        lock (_lock)
        {
            if (_disposed)
            {
                return;
            }
            _disposed = true;
            _forwarded += (uint)_input.Count;
            _input.Clear();
            SignalLocked();
        }
        _device.StreamChanged();
        base.Dispose(disposing);
    }

    // Null when there is a result, otherwise what to wait for.
    private Task? TryRead(Span<byte> buffer, out int count)
    {
        bool tell;
        lock (_lock)
        {
            ObjectDisposedException.ThrowIf(_disposed, this);
            count = Math.Min(buffer.Length, _input.Count);
            if (count == 0 && buffer.Length != 0)
            {
                return _inputEnded ? (_broken ? throw new IOException("The guest has reset the connection.") : null) : _changed.Task;
            }
            _input.Read(buffer[..count]);
            _forwarded += (uint)count;
            // "Buffer Space Management": often enough that the guest is not held up, seldom enough to cost little.
            tell = _forwarded - _forwardedTold >= BufferSize / 2 && !_creditWanted;
            _creditWanted |= tell;
        }
        if (tell)
        {
            _device.StreamChanged();
        }
        return null;
    }

    private Task? TryWrite(ReadOnlySpan<byte> buffer, out int count)
    {
        lock (_lock)
        {
            ObjectDisposedException.ThrowIf(_disposed, this);
            if (_outputEnded)
            {
                throw new IOException("The guest receives no more.");
            }
            count = Math.Min(buffer.Length, _output.Free);
            if (count == 0)
            {
                return _changed.Task;
            }
            _output.Write(buffer[..count]);
        }
        _device.StreamChanged();
        return null;
    }

    private void SignalLocked()
    {
        var changed = _changed;
        _changed = NewSignal();
        changed.TrySetResult();
    }

    private static TaskCompletionSource NewSignal() => new(TaskCreationOptions.RunContinuationsAsynchronously);
}

/// <summary>A buffer of fixed size whose bytes leave in the order in which they came. Its memory comes with the first byte.</summary>
internal sealed class ByteRing(int capacity)
{
    private byte[] _bytes = [];
    private int _start;

    public int Count { get; private set; }

    public int Free => capacity - Count;

    public void Write(ReadOnlySpan<byte> data)
    {
        while (!data.IsEmpty)
        {
            var piece = NextPiece(data.Length);
            data[..piece.Length].CopyTo(piece);
            Count += piece.Length;
            data = data[piece.Length..];
        }
    }

    public bool TryWrite(int count, Action<Span<byte>> fill)
    {
        if (count > Free)
        {
            return false;
        }
        while (count > 0)
        {
            var piece = NextPiece(count);
            fill(piece);
            Count += piece.Length;
            count -= piece.Length;
        }
        return true;
    }

    public void Read(Span<byte> target)
    {
        while (!target.IsEmpty)
        {
            var piece = _bytes.AsSpan(_start, Math.Min(target.Length, Math.Min(Count, capacity - _start)));
            piece.CopyTo(target);
            _start = (_start + piece.Length) % capacity;
            Count -= piece.Length;
            target = target[piece.Length..];
        }
    }

    public void Clear() => Count = 0;

    private Span<byte> NextPiece(int wanted)
    {
        if (_bytes.Length == 0)
        {
            _bytes = new byte[capacity];
        }
        var end = (_start + Count) % capacity;
        var room = end >= _start && Count < capacity ? capacity - end : _start - end;
        return _bytes.AsSpan(end, Math.Min(wanted, room));
    }
}
