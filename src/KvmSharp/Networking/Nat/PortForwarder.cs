using System.Net;
using System.Net.Sockets;

namespace KvmSharp.Networking.Nat;

/// <summary>Ports of the host that lead to guests.</summary>
internal sealed class PortForwarder(NatStack stack)
{
    private const int Backlog = 128;

    private readonly List<IDisposable> _listeners = [];
    private readonly List<UdpForward> _datagrams = [];

    /// <summary>Opens a port.</summary>
    /// <returns>Where the host listens.</returns>
    /// <exception cref="KvmSharpException">The port cannot be had.</exception>
    public IPEndPoint Add(PortForward forward)
    {
        var guest = forward.GuestAddress is { } address ? NetAddress.From(address) : stack.Plan.FirstGuest4;
        if (forward.GuestPort is < 1 or > 65535 || forward.HostPort is < 0 or > 65535)
        {
            throw new KvmSharpException(KvmSharpErrorCode.InvalidArgument, $"The forward {forward} names a port that does not exist.");
        }
        if (!stack.Plan.IsGuest(guest))
        {
            throw new KvmSharpException(KvmSharpErrorCode.InvalidArgument, $"The forward {forward} leads to an address that no guest can have.");
        }
        var isTcp = forward.Protocol == ForwardProtocol.Tcp;
        Socket? socket = null;
        try
        {
            socket = new Socket(forward.HostAddress.AddressFamily, isTcp ? SocketType.Stream : SocketType.Dgram, isTcp ? ProtocolType.Tcp : ProtocolType.Udp);
            socket.Bind(new IPEndPoint(forward.HostAddress, forward.HostPort));
            if (isTcp)
            {
                socket.Listen(Backlog);
            }
        }
        catch (SocketException e)
        {
            socket?.Dispose();
            throw new KvmSharpException(KvmSharpErrorCode.AlreadyExists, $"The host's side of the forward {forward} cannot be had: {e.Message}.", e);
        }
        var end = (IPEndPoint)socket.LocalEndPoint!;
        lock (stack.Gate)
        {
            if (stack.IsDisposed)
            {
                socket.Dispose();
                throw new ObjectDisposedException(nameof(UserNetwork));
            }
            _listeners.Add(socket);
            if (!isTcp)
            {
                _datagrams.Add(new UdpForward(stack, socket, guest, (ushort)forward.GuestPort));
            }
        }
        if (isTcp)
        {
            _ = AcceptAsync(socket, guest, (ushort)forward.GuestPort);
        }
        return end;
    }

    /// <summary>Passes a guest's datagram on if it is an answer to a forwarded one. Under the lock.</summary>
    public bool TryAnswer(FlowKey key, ReadOnlySpan<byte> payload)
    {
        foreach (var forward in _datagrams)
        {
            if (forward.TryAnswer(key, payload))
            {
                return true;
            }
        }
        return false;
    }

    /// <summary>Forgets who has sent. Under the lock.</summary>
    public void Clear()
    {
        foreach (var forward in _datagrams)
        {
            forward.Clear();
        }
    }

    public void Dispose()
    {
        foreach (var listener in _listeners)
        {
            listener.Dispose();
        }
        _listeners.Clear();
        _datagrams.Clear();
    }

    private async Task AcceptAsync(Socket listener, NetAddress guest, ushort port)
    {
        while (true)
        {
            Socket socket;
            try
            {
                socket = await listener.AcceptAsync().ConfigureAwait(false);
            }
            catch (SocketException e) when (e.SocketErrorCode is not (SocketError.OperationAborted or SocketError.Interrupted or SocketError.NotSocket))
            {
                // That caller is gone again, or the host has no sockets left for the moment.
                await Task.Delay(50).ConfigureAwait(false);
                continue;
            }
            catch (Exception e) when (e is SocketException or ObjectDisposedException)
            {
                return;
            }
            stack.Enter(() =>
            {
                if (stack.IsDisposed)
                {
                    socket.Dispose();
                }
                else
                {
                    stack.Tcp.Open(socket, guest, port);
                }
            });
        }
    }
}

/// <summary>A UDP port of the host that leads to a guest. Each sender gets a port of the gateway.</summary>
internal sealed class UdpForward
{
    private const int MaxSenders = 256;
    private const int FirstPort = 32768;

    private readonly NatStack _stack;
    private readonly Socket _socket;
    private readonly NetAddress _guest;
    private readonly ushort _port;
    private readonly NetAddress _gateway;
    private readonly Dictionary<SocketAddress, ushort> _ports = [];
    private readonly Dictionary<ushort, SocketAddress> _senders = [];
    private readonly int _firstPort;
    private int _next;

    public UdpForward(NatStack stack, Socket socket, NetAddress guest, ushort port)
    {
        _stack = stack;
        _socket = socket;
        _guest = guest;
        _port = port;
        _gateway = stack.Plan.Gateway(guest);
        _firstPort = FirstPort + ((IPEndPoint)socket.LocalEndPoint!).Port % 64 * MaxSenders;
        _ = ReceiveAsync();
    }

    public bool TryAnswer(FlowKey key, ReadOnlySpan<byte> payload)
    {
        if (key.Guest != _guest || key.GuestPort != _port || key.Remote != _gateway || !_senders.TryGetValue(key.RemotePort, out var sender))
        {
            return false;
        }
        try
        {
            _socket.SendTo(payload, SocketFlags.None, sender);
        }
        catch (SocketException)
        {
            _stack.CountDrop(); // a datagram may be lost
        }
        return true;
    }

    public void Clear()
    {
        _ports.Clear();
        _senders.Clear();
    }

    private async Task ReceiveAsync()
    {
        var buffer = new byte[65536];
        var sender = new SocketAddress(_socket.AddressFamily);
        while (true)
        {
            int count;
            try
            {
                count = await _socket.ReceiveFromAsync(buffer, SocketFlags.None, sender).ConfigureAwait(false);
            }
            catch (SocketException e) when (e.SocketErrorCode is not (SocketError.OperationAborted or SocketError.Interrupted or SocketError.NotSocket))
            {
                continue; // the news that an earlier answer did not arrive
            }
            catch (Exception e) when (e is SocketException or ObjectDisposedException)
            {
                return;
            }
            _stack.Enter(() => Deliver(sender, buffer.AsSpan(0, count)));
        }
    }

    private void Deliver(SocketAddress sender, ReadOnlySpan<byte> payload)
    {
        if (!_stack.Neighbors.TryGet(_guest, out var mac))
        {
            _stack.Neighbors.Ask(_guest);
            _stack.CountDrop();
            return;
        }
        if (!_ports.TryGetValue(sender, out var port))
        {
            port = (ushort)(_firstPort + _next);
            _next = (_next + 1) % MaxSenders;
            if (_senders.Remove(port, out var oldest))
            {
                _ports.Remove(oldest);
            }
            var copy = new SocketAddress(sender.Family, sender.Size);
            sender.Buffer[..sender.Size].CopyTo(copy.Buffer);
            _ports[copy] = port;
            _senders[port] = copy;
        }
        payload.CopyTo(_stack.Scratch.AsSpan(IpNumbers.UdpHeaderLength));
        _stack.Datagrams.SendUdp(mac, new FlowKey(_guest, _port, _gateway, port), payload.Length);
    }
}
