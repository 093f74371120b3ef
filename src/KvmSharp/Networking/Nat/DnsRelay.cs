using System.Buffers.Binary;

namespace KvmSharp.Networking.Nat;

/// <summary>
/// The DNS server that guests see. It asks the resolver, and notes the addresses of names that egress rules name.
/// Used under the network's lock, except for what says otherwise.
/// </summary>
internal sealed class DnsRelay(NatStack stack)
{
    private const int MaxQueries = 128;
    private const int HeaderLength = 12;

    private readonly CancellationTokenSource _end = new();

    public int Running { get; private set; }

    public void Dispose()
    {
        _end.Cancel();
        _end.Dispose();
    }

    public void AskByUdp(FlowKey key, MacAddress mac, ReadOnlySpan<byte> query)
    {
        var longest = DnsMessage.MaxAnswerLength(query);
        Ask(query, false, answer =>
        {
            if (answer.Length > longest)
            {
                answer = DnsMessage.Truncate(answer);
            }
            answer.CopyTo(stack.Scratch.AsSpan(IpNumbers.UdpHeaderLength));
            stack.Datagrams.SendUdp(mac, key, answer.Length);
        });
    }

    /// <summary>Finds an answer.</summary>
    /// <param name="query">The query.</param>
    /// <param name="overStream">Whether it may be long.</param>
    /// <param name="answered">Gets the answer, under the network's lock; not called for what is no query.</param>
    /// <returns>Whether an answer will come.</returns>
    public bool Ask(ReadOnlySpan<byte> query, bool overStream, Action<byte[]> answered)
    {
        if (query.Length < HeaderLength || (query[2] & 0x80) != 0)
        {
            stack.CountDrop();
            return false;
        }
        if (!DnsMessage.TryReadQuestion(query, out var question))
        {
            answered(DnsMessage.CreateFailure(query, 1));
            return true;
        }
        if (Running == MaxQueries)
        {
            stack.CountDrop(); // over UDP the guest asks again
            return false;
        }
        if (!stack.Policy.PermitsName(question.Name))
        {
            answered(DnsMessage.CreateFailure(query, DnsMessage.Refused));
            return true;
        }
        Running++;
        _ = ResolveAsync(query.ToArray(), question, overStream, answered, _end.Token);
        return true;
    }

    private async Task ResolveAsync(byte[] query, DnsQuestion question, bool overStream, Action<byte[]> answered, CancellationToken cancellation)
    {
        await Task.CompletedTask.ConfigureAwait(ConfigureAwaitOptions.ForceYielding); // a resolver is foreign code: not under the lock
        byte[]? answer = null;
        try
        {
            answer = await stack.Options.DnsResolver.ResolveAsync(query, overStream, cancellation).ConfigureAwait(false);
        }
        catch (Exception e) when (e is not OutOfMemoryException)
        {
            stack.CountDrop(); // whatever went wrong there, the guest gets to know that there is no answer
        }
        stack.Enter(() =>
        {
            Running--;
            if (cancellation.IsCancellationRequested)
            {
                return;
            }
            if (answer is null || answer.Length is < HeaderLength or > ushort.MaxValue)
            {
                answered(DnsMessage.CreateFailure(query, DnsMessage.ServerFailure));
                return;
            }
            answer = (byte[])answer.Clone(); // the resolver may give it to others too
            BinaryPrimitives.WriteUInt16BigEndian(answer, BinaryPrimitives.ReadUInt16BigEndian(query));
            // The owner of a name must not be able to open the gateway, which is the host's loopback.
            stack.Policy.Learn(
                question.Name, DnsMessage.ReadAddresses(answer).Where(a => !stack.Plan.IsInside(NetAddress.From(a.Address))), stack.Now);
            answered(answer);
        });
    }
}

/// <summary>The DNS server's end of a TCP connection. Specification: RFC 7766; one query at a time.</summary>
internal sealed class DnsStream(DnsRelay relay, IHostStreamEvents events) : IHostStream
{
    private const int Maximum = 2 + 4096; // no query is longer in good faith

    private readonly byte[] _query = new byte[Maximum];
    private int _length;
    private byte[]? _answer;
    private int _sent;
    private bool _asks;
    private bool _ended;
    private bool _connected;
    private bool _broken;

    public int Receive(Span<byte> buffer)
    {
        if (_answer is null)
        {
            return _broken ? IHostStream.Failed : _ended && !_asks ? 0 : IHostStream.WouldBlock;
        }
        var count = Math.Min(buffer.Length, _answer.Length - _sent);
        _answer.AsSpan(_sent, count).CopyTo(buffer);
        _sent += count;
        if (_sent == _answer.Length)
        {
            _answer = null;
            TellLater(false);
        }
        return count;
    }

    public int Send(ReadOnlySpan<byte> bytes)
    {
        if (_asks || _answer is not null)
        {
            return IHostStream.WouldBlock;
        }
        var wanted = _length < 2 ? 2 : 2 + BinaryPrimitives.ReadUInt16BigEndian(_query);
        if (wanted > Maximum)
        {
            return IHostStream.Failed;
        }
        var count = Math.Min(bytes.Length, wanted - _length);
        bytes[..count].CopyTo(_query.AsSpan(_length));
        _length += count;
        if (_length > 2 && _length == wanted)
        {
            var length = _length - 2;
            _length = 0;
            _asks = true;
            if (!relay.Ask(_query.AsSpan(2, length), true, OnAnswer))
            {
                _asks = false;
                _broken = true;
                TellLater(true);
            }
        }
        else if (_length == 2 && BinaryPrimitives.ReadUInt16BigEndian(_query) == 0)
        {
            return IHostStream.Failed;
        }
        return count;
    }

    public void ShutdownSend()
    {
        _ended = true;
        TellLater(true);
    }

    public void Abort() => _ended = true;

    public void Dispose() => _ended = true;

    /// <summary>There is nobody to wait for: the connection stands.</summary>
    public void Start()
    {
        if (!_connected)
        {
            _connected = true;
            ThreadPool.UnsafeQueueUserWorkItem(static e => e.OnConnected(System.Net.Sockets.SocketError.Success), events, preferLocal: true);
        }
    }

    private void OnAnswer(byte[] answer)
    {
        _asks = false;
        _answer = new byte[2 + answer.Length];
        BinaryPrimitives.WriteUInt16BigEndian(_answer, (ushort)answer.Length);
        answer.CopyTo(_answer.AsSpan(2));
        _sent = 0;
        TellLater(true);
    }

    // Events come without the network's lock, and this is called with it.
    private void TellLater(bool readable) => ThreadPool.UnsafeQueueUserWorkItem(
        static s => (s.readable ? (Action)s.events.OnReadable : s.events.OnWritable)(), (events, readable), preferLocal: true);
}
