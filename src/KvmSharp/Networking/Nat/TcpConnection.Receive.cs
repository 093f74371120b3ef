namespace KvmSharp.Networking.Nat;

/// <summary>RFC 9293, "Segment Arrives".</summary>
internal sealed partial class TcpConnection
{
    public void OnSegment(in TcpSegment segment, MacAddress mac)
    {
        switch (_state)
        {
            case TcpState.Closed:
                return;
            case TcpState.Connecting:
                // The guest repeats its SYN, which is answered when the host has answered; or it has given up.
                if (segment.Has(TcpFlags.Reset) && segment.Sequence == _receiveNext)
                {
                    Abort(false);
                }
                return;
            case TcpState.SynSent:
                OnSynAnswer(segment, mac);
                return;
            case TcpState.SynReceived when segment.Has(TcpFlags.Syn) && !segment.Has(TcpFlags.Ack) && segment.Sequence + 1 == _receiveNext:
                _synWanted = true; // our answer was lost
                _stack.MakeReady(this);
                return;
        }
        GuestMac = mac;
        if (!IsAcceptable(segment))
        {
            if (!segment.Has(TcpFlags.Reset))
            {
                WantAck();
            }
            return;
        }
        if (segment.Has(TcpFlags.Reset))
        {
            // RFC 5961, "Blind Reset Attack Using the RST Bit": only the exact number counts.
            if (segment.Sequence == _receiveNext)
            {
                Abort(false);
            }
            else
            {
                WantAck();
            }
            return;
        }
        if (segment.Has(TcpFlags.Syn))
        {
            WantAck(); // RFC 5961, "Blind Reset Attack Using the SYN Bit"
            return;
        }
        if (!segment.Has(TcpFlags.Ack))
        {
            return;
        }
        if (_state == TcpState.SynReceived && !CompleteHandshake(segment))
        {
            return;
        }
        if (After(segment.Acknowledgment, _sendMax))
        {
            WantAck();
            return;
        }
        TakeAcknowledgment(segment);
        if (_state == TcpState.Closed)
        {
            return;
        }
        if (_state == TcpState.TimeWait)
        {
            WantAck();
            SetTimer(TimeWaitLength);
            return;
        }
        TakePayload(segment);
        if (_state != TcpState.Closed)
        {
            _stack.MakeReady(this);
        }
    }

    private void OnSynAnswer(in TcpSegment segment, MacAddress mac)
    {
        var acknowledges = segment.Has(TcpFlags.Ack) && segment.Acknowledgment == _sendUnacknowledged + 1 && _sendMax == segment.Acknowledgment;
        if (segment.Has(TcpFlags.Reset))
        {
            if (acknowledges)
            {
                Abort(false); // nobody listens there
            }
            return;
        }
        if (segment.Has(TcpFlags.Ack) && !acknowledges)
        {
            _layer.SendReset(Key, mac, segment.Acknowledgment, 0, false);
            return;
        }
        if (!segment.Has(TcpFlags.Syn) || !acknowledges)
        {
            return; // a guest that connects to the very port at the same moment gets our next attempt
        }
        GuestMac = mac;
        TakeSyn(segment);
        _sendUnacknowledged = _sendNext = segment.Acknowledgment;
        _windowAcknowledgment = segment.Acknowledgment;
        Establish();
        WantAck();
    }

    private bool CompleteHandshake(in TcpSegment segment)
    {
        if (segment.Acknowledgment != _sendUnacknowledged + 1 || _sendMax != segment.Acknowledgment)
        {
            _layer.SendReset(Key, GuestMac, segment.Acknowledgment, 0, false);
            return false;
        }
        _sendUnacknowledged = _sendNext = segment.Acknowledgment;
        _sendWindow = (uint)segment.Window << _sendScale;
        _windowSequence = segment.Sequence;
        _windowAcknowledgment = segment.Acknowledgment;
        Establish();
        return true;
    }

    private void Establish()
    {
        _state = TcpState.Established;
        _synWanted = false;
        _retries = 0;
        _timeout = InitialTimeout;
        _timer = long.MaxValue;
        _hostReadable = true; // perhaps; looking tells
        _stack.MakeReady(this);
    }

    // RFC 9293, "Segment acceptability test".
    private bool IsAcceptable(in TcpSegment segment)
    {
        var window = _receiveEdge - _receiveNext;
        var length = segment.SequenceLength;
        if (length == 0)
        {
            return window == 0 ? segment.Sequence == _receiveNext : IsInWindow(segment.Sequence, window);
        }
        return window != 0 && (IsInWindow(segment.Sequence, window) || IsInWindow(segment.Sequence + length - 1, window));
    }

    private bool IsInWindow(uint sequence, uint window) => sequence - _receiveNext < window;

    private void TakeAcknowledgment(in TcpSegment segment)
    {
        var number = segment.Acknowledgment;
        if (Before(number, _sendUnacknowledged))
        {
            return;
        }
        var window = (uint)segment.Window << _sendScale;
        if (After(number, _sendUnacknowledged))
        {
            var finAcknowledged = _hostEnded && number - _sendUnacknowledged > (uint)_send.Length;
            var bytes = (int)Math.Min(number - _sendUnacknowledged, (uint)_send.Length);
            _send.Discard(bytes);
            _sendUnacknowledged = number;
            if (Before(_sendNext, number))
            {
                _sendNext = number;
            }
            OnProgress(number, bytes);
            if (finAcknowledged)
            {
                OnFinAcknowledged();
                if (_state == TcpState.Closed)
                {
                    return;
                }
            }
        }
        else if (number == _sendUnacknowledged && segment.SequenceLength == 0 && window == _sendWindow && InFlight != 0)
        {
            OnDuplicate();
        }
        if (Before(_windowSequence, segment.Sequence) || (_windowSequence == segment.Sequence && !After(_windowAcknowledgment, number)))
        {
            _sendWindow = window;
            _windowSequence = segment.Sequence;
            _windowAcknowledgment = number;
            if (_probing && window != 0)
            {
                StopProbing();
            }
        }
        if (_probing)
        {
            _retries = 0; // it lives; it has only no room
        }
    }

    private void OnFinAcknowledged()
    {
        switch (_state)
        {
            case TcpState.FinWait1:
                _state = TcpState.FinWait2;
                _timer = long.MaxValue;
                break;
            case TcpState.Closing:
                EnterTimeWait();
                break;
            case TcpState.LastAck when _receive.Length == 0:
                Remove();
                break;
            case TcpState.LastAck:
                EnterTimeWait(); // the host has not taken everything yet
                break;
        }
    }

    private void EnterTimeWait()
    {
        _state = TcpState.TimeWait;
        if (_receive.Length == 0)
        {
            _host?.Dispose();
        }
        SetTimer(TimeWaitLength);
    }

    private void TakePayload(in TcpSegment segment)
    {
        if (segment.SequenceLength == 0)
        {
            return;
        }
        WantAck();
        if (_guestEnded || _state is not (TcpState.Established or TcpState.FinWait1 or TcpState.FinWait2))
        {
            return; // behind its FIN a guest has nothing to say
        }
        var payload = segment.Payload;
        var start = segment.Sequence;
        if (segment.Has(TcpFlags.Fin) && !After(start + (uint)payload.Length, _receiveEdge))
        {
            _earlyFin ??= start + (uint)payload.Length;
        }
        if (Before(start, _receiveNext))
        {
            var known = Math.Min(_receiveNext - start, (uint)payload.Length);
            payload = payload[(int)known..];
            start += known;
        }
        if (!payload.IsEmpty && !After(start, _receiveEdge))
        {
            payload = payload[..(int)Math.Min((uint)payload.Length, _receiveEdge - start)];
            if (start == _receiveNext)
            {
                TakeInOrder(payload);
            }
            else if (_early.TryAdd(start - _receiveNext, (uint)payload.Length) && !_receive.TryPlace((int)(start - _receiveNext), payload))
            {
                _early.Clear(); // no memory for what comes early: it comes again
            }
        }
        if (_state != TcpState.Closed && _earlyFin == _receiveNext)
        {
            _earlyFin = null;
            _receiveNext++;
            OnGuestEnded();
        }
    }

    private void TakeInOrder(ReadOnlySpan<byte> payload)
    {
        var rest = payload;
        if (_receive.Length == 0 && _early.IsEmpty && _hostWritable)
        {
            var count = _host!.Send(rest);
            if (count == IHostStream.Failed)
            {
                Abort(true);
                return;
            }
            _hostWritable = count != IHostStream.WouldBlock;
            count = Math.Max(count, 0);
            _receiveNext += (uint)count;
            rest = rest[count..];
        }
        if (rest.IsEmpty)
        {
            return;
        }
        if (!_receive.TryPlace(0, rest))
        {
            return; // not acknowledged, so it comes again
        }
        _receive.Commit(rest.Length);
        _receiveNext += (uint)rest.Length;
        var more = _early.Advance((uint)rest.Length);
        _receive.Commit((int)more);
        _receiveNext += more;
        PassOn();
    }

    private void OnGuestEnded()
    {
        _guestEnded = true;
        WantAck();
        switch (_state)
        {
            case TcpState.Established:
                _state = TcpState.CloseWait;
                break;
            case TcpState.FinWait1:
                _state = TcpState.Closing;
                break;
            case TcpState.FinWait2 when _receive.Length == 0:
                EnterTimeWait();
                return;
        }
        PassOn();
    }

    /// <summary>Gives the host what it takes.</summary>
    private void PassOn()
    {
        if (_state == TcpState.Closed)
        {
            return;
        }
        while (_receive.Length != 0 && _hostWritable)
        {
            var count = _host!.Send(_receive.First);
            if (count == IHostStream.Failed)
            {
                Abort(true);
                return;
            }
            _hostWritable = count != IHostStream.WouldBlock;
            _receive.Discard(Math.Max(count, 0), !_early.IsEmpty);
        }
        if (_guestEnded && _receive.Length == 0 && !_shutdownDone)
        {
            _shutdownDone = true;
            _host!.ShutdownSend();
            if (_state is TcpState.FinWait2 or TcpState.TimeWait)
            {
                EnterTimeWait();
            }
        }
        // RFC 9293, "Receiver's Algorithm -- When to Send a Window Update": enough to be worth a segment.
        var room = (uint)(ReceiveMaximum - _receive.Length);
        if (room - (_receiveEdge - _receiveNext) >= ReceiveMaximum / 4 && _receiveEdge - _receiveNext < ReceiveMaximum / 4)
        {
            WantAck();
        }
    }

    private void WantAck()
    {
        _ackWanted = true;
        _stack.MakeReady(this);
    }
}

/// <summary>Which bytes behind a gap have come: distances from the next byte that is expected. Bounded.</summary>
internal sealed class ReceiveGaps
{
    private const int Maximum = 32;

    private readonly List<(uint Start, uint End)> _ranges = [];

    public bool IsEmpty => _ranges.Count == 0;

    public int Count => _ranges.Count;

    public void Clear() => _ranges.Clear();

    /// <summary>Notes a range.</summary>
    /// <returns>False when there are too many; the bytes are to be forgotten then.</returns>
    public bool TryAdd(uint start, uint length)
    {
        var end = start + length;
        var at = 0;
        while (at < _ranges.Count && _ranges[at].End < start)
        {
            at++;
        }
        var last = at;
        while (last < _ranges.Count && _ranges[last].Start <= end)
        {
            start = Math.Min(start, _ranges[last].Start);
            end = Math.Max(end, _ranges[last].End);
            last++;
        }
        if (last == at && _ranges.Count == Maximum)
        {
            return false;
        }
        _ranges.RemoveRange(at, last - at);
        _ranges.Insert(at, (start, end));
        return true;
    }

    /// <summary>So many bytes have come in order.</summary>
    /// <returns>How many more have become so.</returns>
    public uint Advance(uint count)
    {
        uint more = 0;
        while (_ranges.Count != 0 && _ranges[0].Start <= count)
        {
            more = Math.Max(more, _ranges[0].End > count ? _ranges[0].End - count : 0);
            _ranges.RemoveAt(0);
        }
        for (var i = 0; i < _ranges.Count; i++)
        {
            _ranges[i] = (_ranges[i].Start - count - more, _ranges[i].End - count - more);
        }
        return more;
    }
}
