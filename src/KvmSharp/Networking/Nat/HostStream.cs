using System.Net;
using System.Net.Sockets;

namespace KvmSharp.Networking.Nat;

/// <summary>What a connection gets to know of its host side. Called on any thread, without the network's lock.</summary>
internal interface IHostStreamEvents
{
    /// <summary>The attempt to connect has ended.</summary>
    void OnConnected(SocketError error);

    /// <summary>There are bytes to receive, or the end has come.</summary>
    void OnReadable();

    /// <summary>Bytes can be sent again.</summary>
    void OnWritable();
}

/// <summary>The host side of a guest's connection. Used under the network's lock; nothing here blocks.</summary>
internal interface IHostStream : IDisposable
{
    /// <summary>The result for "not now".</summary>
    const int WouldBlock = -1;

    /// <summary>The result for a broken connection.</summary>
    const int Failed = -2;

    /// <summary>Receives bytes: their number, 0 at the end, or one of the constants. After "not now" an event follows.</summary>
    int Receive(Span<byte> buffer);

    /// <summary>Sends bytes: how many were taken, or one of the constants. After "not now" an event follows.</summary>
    int Send(ReadOnlySpan<byte> bytes);

    /// <summary>Nothing more will be sent.</summary>
    void ShutdownSend();

    /// <summary>Breaks the connection: the other side gets to know that it did not end in good order.</summary>
    void Abort();
}

/// <summary>A TCP socket of the host.</summary>
internal sealed class HostSocketStream : IHostStream
{
    private const int PendingSize = 64 << 10;

    private readonly Socket _socket;
    private readonly IHostStreamEvents _events;
    private readonly SocketAsyncEventArgs _reading = new();
    private readonly Lock _lock = new();
    private SocketAsyncEventArgs? _writing; // made when the host holds back for the first time
    private volatile bool _waitsForData;
    private volatile bool _receiveFailed; // waiting has taken the error away
    private bool _sends; // bytes of ours are with the host
    private bool _sendFailed;
    private bool _sendBlocked; // the connection wants to know
    private bool _shutdownWanted;
    private bool _closeWanted;
    private bool _closed;

    public HostSocketStream(Socket socket, IHostStreamEvents events)
    {
        _socket = socket;
        _events = events;
        _reading.SetBuffer(Memory<byte>.Empty);
        _reading.Completed += (_, _) => OnReadable();
        socket.Blocking = false;
        socket.NoDelay = true;
        socket.SetSocketOption(SocketOptionLevel.Socket, SocketOptionName.KeepAlive, true);
    }

    /// <summary>Begins to connect; the result comes as an event, also when it is there at once.</summary>
    public static HostSocketStream Connect(IPEndPoint target, IHostStreamEvents events)
    {
        var socket = new Socket(target.AddressFamily, SocketType.Stream, ProtocolType.Tcp);
        var stream = new HostSocketStream(socket, events);
        _ = stream.ConnectAsync(target);
        return stream;
    }

    public int Receive(Span<byte> buffer)
    {
        if (_waitsForData)
        {
            return IHostStream.WouldBlock;
        }
        if (_receiveFailed)
        {
            return IHostStream.Failed;
        }
        var count = _socket.Receive(buffer, SocketFlags.None, out var error);
        if (error == SocketError.Success)
        {
            return count;
        }
        return error == SocketError.WouldBlock ? WaitForData() : IHostStream.Failed;
    }

    public int Send(ReadOnlySpan<byte> bytes)
    {
        lock (_lock)
        {
            if (_sendFailed)
            {
                return IHostStream.Failed;
            }
            if (_sends)
            {
                _sendBlocked = true;
                return IHostStream.WouldBlock;
            }
        }
        var count = _socket.Send(bytes, SocketFlags.None, out var error);
        if (error == SocketError.Success)
        {
            return count;
        }
        return error == SocketError.WouldBlock ? SendLater(bytes) : IHostStream.Failed;
    }

    public void ShutdownSend()
    {
        lock (_lock)
        {
            _shutdownWanted = true;
            if (_sends || _closed)
            {
                return;
            }
        }
        Shutdown();
    }

    public void Abort()
    {
        lock (_lock)
        {
            if (_closed)
            {
                return;
            }
            try
            {
                _socket.LingerState = new LingerOption(true, 0); // its close is a reset
            }
            catch (SocketException)
            {
                _sendFailed = true; // the other side was first
            }
            _sends = false;
        }
        Dispose();
    }

    public void Dispose()
    {
        lock (_lock)
        {
            if (_closed || _closeWanted)
            {
                return;
            }
            if (_sends)
            {
                _closeWanted = true; // after the last bytes
                return;
            }
            _closed = true;
        }
        Close();
    }

    private async Task ConnectAsync(IPEndPoint target)
    {
        var error = SocketError.Success;
        await Task.CompletedTask.ConfigureAwait(ConfigureAwaitOptions.ForceYielding); // the connection's constructor comes first
        try
        {
            await _socket.ConnectAsync(target).ConfigureAwait(false);
        }
        catch (SocketException e)
        {
            error = e.SocketErrorCode;
        }
        catch (ObjectDisposedException)
        {
            error = SocketError.OperationAborted;
        }
        _events.OnConnected(error);
    }

    // A receive of nothing ends when there is something, and needs no buffer meanwhile.
    private int WaitForData()
    {
        _waitsForData = true; // first: the event may come before the call returns
        try
        {
            if (!_socket.ReceiveAsync(_reading))
            {
                // Between the two attempts something has come; it is told as if it came later.
                ThreadPool.UnsafeQueueUserWorkItem(static s => s.OnReadable(), this, preferLocal: true);
            }
            return IHostStream.WouldBlock;
        }
        catch (SocketException)
        {
            _waitsForData = false;
            return IHostStream.Failed;
        }
    }

    private void OnReadable()
    {
        _receiveFailed = _reading.SocketError != SocketError.Success;
        _waitsForData = false;
        if (!_closed)
        {
            _events.OnReadable();
        }
    }

    // The host holds back: some bytes stay here and go when it lets them.
    private int SendLater(ReadOnlySpan<byte> bytes)
    {
        if (_writing is null)
        {
            _writing = new SocketAsyncEventArgs();
            _writing.SetBuffer(new byte[PendingSize], 0, 0);
            _writing.Completed += (_, e) => OnSent(e);
        }
        var count = Math.Min(bytes.Length, PendingSize);
        bytes[..count].CopyTo(_writing.Buffer);
        lock (_lock)
        {
            _sends = true;
        }
        try
        {
            _writing.SetBuffer(0, count);
            if (!_socket.SendAsync(_writing))
            {
                ThreadPool.UnsafeQueueUserWorkItem(static s => s.OnSent(s._writing!), this, preferLocal: true);
            }
            return count;
        }
        catch (SocketException)
        {
            lock (_lock)
            {
                (_sends, _sendFailed) = (false, true);
            }
            return IHostStream.Failed;
        }
    }

    private void OnSent(SocketAsyncEventArgs sent)
    {
        try
        {
            while (sent.SocketError == SocketError.Success && sent.BytesTransferred < sent.Count)
            {
                sent.SetBuffer(sent.Offset + sent.BytesTransferred, sent.Count - sent.BytesTransferred);
                if (_socket.SendAsync(sent))
                {
                    return;
                }
            }
        }
        catch (ObjectDisposedException)
        {
            return; // given up meanwhile
        }
        bool shutdown, close, tell;
        lock (_lock)
        {
            _sends = false;
            _sendFailed |= sent.SocketError != SocketError.Success;
            shutdown = _shutdownWanted && !_closed;
            close = _closeWanted && !_closed;
            tell = _sendBlocked && !_closed && !_closeWanted;
            _sendBlocked = false;
            _closed |= close;
        }
        if (shutdown)
        {
            Shutdown();
        }
        if (close)
        {
            Close();
        }
        if (tell)
        {
            _events.OnWritable();
        }
    }

    private void Shutdown()
    {
        try
        {
            _socket.Shutdown(SocketShutdown.Send);
        }
        catch (Exception e) when (e is SocketException or ObjectDisposedException)
        {
            _sendFailed = true; // the other side was first; receiving tells it
        }
    }

    private void Close()
    {
        _socket.Dispose();
        _reading.Dispose();
        _writing?.Dispose();
    }
}
