using System.Buffers.Binary;

namespace KvmSharp.Networking.Nat;

/// <summary>What goes to the guest, and when it goes again.</summary>
internal sealed partial class TcpConnection
{
    private int LongestPayload
    {
        get
        {
            var most = LongestPacket - IpNumbers.Ip6HeaderLength - IpNumbers.TcpHeaderLength;
            return most - most % _mss;
        }
    }

    public bool TryProduce(out NetworkPacket? packet)
    {
        packet = null;
        switch (_state)
        {
            case TcpState.Connecting or TcpState.Closed:
                return false;
            case TcpState.SynSent or TcpState.SynReceived:
                if (!_synWanted)
                {
                    return false;
                }
                packet = BuildSyn();
                return true;
            case TcpState.Established or TcpState.CloseWait or TcpState.FinWait1 or TcpState.Closing or TcpState.LastAck:
                if (!FillFromHost())
                {
                    return false;
                }
                packet = BuildData();
                break;
        }
        if (packet is null && _ackWanted)
        {
            packet = Build(_sendNext, TcpFlags.Ack, 0);
        }
        return packet is not null;
    }

    // Takes from the host what the guest may soon get. False if that broke the connection.
    private bool FillFromHost()
    {
        while (_hostReadable && !_hostEnded && _send.Length - (int)InFlight < LongestPayload)
        {
            var free = _send.GetFree(LongestPayload);
            if (free.IsEmpty)
            {
                break;
            }
            var count = _host!.Receive(free);
            switch (count)
            {
                case IHostStream.Failed:
                    Abort(true);
                    return false;
                case IHostStream.WouldBlock:
                    _hostReadable = false;
                    break;
                case 0:
                    _hostEnded = true;
                    break;
                default:
                    _send.Commit(count);
                    break;
            }
        }
        if (_send.Length == 0)
        {
            _send.Discard(0); // no memory for nothing
        }
        return true;
    }

    private NetworkPacket? BuildData()
    {
        if (_resend)
        {
            // RFC 5681, "Fast Retransmit/Fast Recovery"
            _resend = false;
            var again = Math.Min(Math.Min((int)Math.Min(InFlight, (uint)_send.Length), LongestPayload), (int)Math.Max(_congestionWindow, _mss));
            if (again > 0)
            {
                SetTimer(_timeout);
                return Build(_sendUnacknowledged, TcpFlags.Ack, again);
            }
        }
        if (FinSent)
        {
            return null;
        }
        var sent = (int)InFlight;
        var waiting = _send.Length - sent;
        var room = Math.Min(_sendWindow, _congestionWindow) - sent;
        var count = (int)Math.Min(Math.Min(waiting, LongestPayload), Math.Max(room, 0));
        // RFC 9293, "Sender's Algorithm -- When to Send Data": no small segments while others are on their way.
        if (count < waiting && count < _mss && sent != 0)
        {
            count = 0;
        }
        var fin = _hostEnded && count == waiting && (count > 0 || _sendWindow > sent || sent == 0);
        if (count == 0 && !fin)
        {
            if (waiting > 0 && sent == 0 && !_probing)
            {
                // RFC 9293, "Zero-Window Probing"
                _probing = true;
                _retries = 0;
                SetTimer(_timeout);
            }
            return null;
        }
        _probing = false;
        var packet = Build(_sendNext, TcpFlags.Ack | (count == waiting && count > 0 ? TcpFlags.Push : 0) | (fin ? TcpFlags.Fin : 0), count);
        var now = _stack.Now;
        if (_measureStart < 0 && _sendNext == _sendMax)
        {
            (_measureStart, _measureEnd) = (now, _sendNext + (uint)count);
        }
        _sendNext += (uint)count + (fin ? 1u : 0);
        if (After(_sendNext, _sendMax))
        {
            _sendMax = _sendNext;
        }
        if (_timer == long.MaxValue)
        {
            SetTimer(_timeout);
        }
        if (fin)
        {
            _state = _state switch
            {
                TcpState.Established => TcpState.FinWait1,
                TcpState.CloseWait => TcpState.LastAck,
                _ => _state,
            };
        }
        return packet;
    }

    private NetworkPacket BuildSyn()
    {
        _synWanted = false;
        Span<byte> options = stackalloc byte[8];
        var answers = _state == TcpState.SynReceived;
        var length = TcpSegment.WriteSynOptions(
            options, _stack.MaxSegment(Key.Guest), answers && _receiveScale == 0 ? null : ReceiveScale);
        _sendMax = _sendUnacknowledged + 1;
        return Build(_sendUnacknowledged, answers ? TcpFlags.Syn | TcpFlags.Ack : TcpFlags.Syn, 0, options[..length]);
    }

    // A packet that the guest's card or the guest itself cuts and sums up.
    private NetworkPacket Build(uint sequence, TcpFlags flags, int count, ReadOnlySpan<byte> options = default)
    {
        var header = IpNumbers.TcpHeaderLength + options.Length;
        var ipHeader = Key.Guest.IsIp4 ? IpNumbers.Ip4HeaderLength : IpNumbers.Ip6HeaderLength;
        var packet = _stack.Builder.CreateIp(GuestMac, Key.Remote, Key.Guest, IpNumbers.Tcp, header + count, new PacketOffload
        {
            NeedsChecksum = true,
            ChecksumStart = (ushort)(NetworkPacket.HeaderLength + ipHeader),
            ChecksumOffset = 16,
            Segmentation = count <= _mss ? PacketSegmentation.None : Key.Guest.IsIp4 ? PacketSegmentation.Tcp4 : PacketSegmentation.Tcp6,
            SegmentSize = count <= _mss ? (ushort)0 : (ushort)_mss,
        }, out var tcp);
        var acknowledges = (flags & TcpFlags.Ack) != 0;
        BinaryPrimitives.WriteUInt16BigEndian(tcp, Key.RemotePort);
        BinaryPrimitives.WriteUInt16BigEndian(tcp[2..], Key.GuestPort);
        BinaryPrimitives.WriteUInt32BigEndian(tcp[4..], sequence);
        BinaryPrimitives.WriteUInt32BigEndian(tcp[8..], acknowledges ? _receiveNext : 0);
        tcp[12] = (byte)(header / 4 << 4);
        tcp[13] = (byte)flags;
        BinaryPrimitives.WriteUInt16BigEndian(tcp[14..], TellWindow((flags & TcpFlags.Syn) != 0));
        BinaryPrimitives.WriteUInt16BigEndian(tcp[16..],
            PacketFinisher.Fold(IpPacket.PseudoSum(Key.Remote, Key.Guest, IpNumbers.Tcp, tcp.Length)));
        BinaryPrimitives.WriteUInt16BigEndian(tcp[18..], 0);
        options.CopyTo(tcp[IpNumbers.TcpHeaderLength..]);
        if (count > 0)
        {
            _send.CopyTo((int)(sequence - _sendUnacknowledged), tcp[header..]);
        }
        if (acknowledges)
        {
            _ackWanted = false;
        }
        return packet;
    }

    // The window's right edge never moves back (RFC 9293, "Managing the Window").
    private ushort TellWindow(bool unscaled)
    {
        var scale = unscaled ? 0 : _receiveScale;
        var room = (uint)Math.Min(ReceiveMaximum - _receive.Length, ushort.MaxValue << scale) >> scale << scale;
        if (After(_receiveNext + room, _receiveEdge))
        {
            _receiveEdge = _receiveNext + room;
        }
        return (ushort)Math.Min((_receiveEdge - _receiveNext) >> scale, ushort.MaxValue);
    }

    private void OnProgress(uint number, int bytes)
    {
        _retries = 0;
        if (_probing)
        {
            StopProbing();
        }
        if (_measureStart >= 0 && !Before(number, _measureEnd))
        {
            Measure(_stack.Now - _measureStart);
            _measureStart = -1;
        }
        // RFC 5681, "Slow Start and Congestion Avoidance"
        if (_duplicates >= 3)
        {
            _congestionWindow = _threshold;
        }
        else
        {
            _congestionWindow += _congestionWindow < _threshold ? bytes : Math.Max(1, (long)_mss * bytes / _congestionWindow);
            _congestionWindow = Math.Min(_congestionWindow, SendMaximum * 2L);
        }
        _duplicates = 0;
        _timer = long.MaxValue;
        if (InFlight != 0)
        {
            SetTimer(_timeout);
        }
    }

    private void OnDuplicate()
    {
        if (++_duplicates == 3)
        {
            _threshold = Math.Max(InFlight / 2, 2L * _mss);
            _congestionWindow = _threshold;
            _measureStart = -1;
            _resend = true;
            _stack.MakeReady(this);
        }
    }

    // RFC 6298
    private void Measure(long milliseconds)
    {
        if (_roundTrip < 0)
        {
            (_roundTrip, _variation) = (milliseconds, milliseconds / 2.0);
        }
        else
        {
            _variation = 0.75 * _variation + 0.25 * Math.Abs(_roundTrip - milliseconds);
            _roundTrip = 0.875 * _roundTrip + 0.125 * milliseconds;
        }
        ResetTimeout();
    }

    private void ResetTimeout() =>
        _timeout = _roundTrip < 0 ? InitialTimeout : Math.Clamp((long)(_roundTrip + 4 * _variation), MinTimeout, MaxTimeout);

    private void StopProbing()
    {
        (_probing, _retries) = (false, 0);
        ResetTimeout();
        _timer = long.MaxValue;
        if (InFlight != 0)
        {
            SetTimer(_timeout);
        }
    }

    private void Retry()
    {
        if (InFlight == 0 && !_probing)
        {
            return;
        }
        if (++_retries > MaxRetries)
        {
            Abort(true);
            return;
        }
        _timeout = Math.Min(_timeout * 2, MaxTimeout);
        SetTimer(_timeout);
        if (_probing)
        {
            if (_send.Length > 0)
            {
                _stack.Send(Build(_sendUnacknowledged, TcpFlags.Ack, 1));
                if (!After(_sendMax, _sendUnacknowledged))
                {
                    _sendMax = _sendUnacknowledged + 1; // the guest may take the byte
                }
            }
            return;
        }
        _threshold = Math.Max(InFlight / 2, 2L * _mss);
        _congestionWindow = _mss;
        _measureStart = -1; // RFC 6298, Karn's algorithm
        _duplicates = 0;
        _sendNext = _sendUnacknowledged;
        _stack.MakeReady(this);
    }
}
