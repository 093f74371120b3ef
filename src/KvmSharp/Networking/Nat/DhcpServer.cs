using System.Buffers.Binary;
using System.Text;

namespace KvmSharp.Networking.Nat;

/// <summary>
/// Gives guests their addresses. Specification: RFC 2131 (DHCP), RFC 2132 (options). An Ethernet address keeps its IP address as
/// long as there are free ones. Used under the network's lock.
/// </summary>
internal sealed class DhcpServer(NatStack stack)
{
    private const int FixedLength = 236;
    private const int OptionsStart = FixedLength + 4;
    private const int ReplyLength = 548; // RFC 2131: what every client takes, without IP and UDP headers
    private const uint MagicCookie = 0x6382_5363;
    private const ushort BroadcastFlag = 0x8000;
    private const ushort ServerPort = 67;
    private const ushort ClientPort = 68;
    private const uint LeaseTime = 86_400;

    private const byte OptionPad = 0;
    private const byte OptionMask = 1;
    private const byte OptionRouter = 3;
    private const byte OptionDns = 6;
    private const byte OptionDomain = 15;
    private const byte OptionMtu = 26;
    private const byte OptionBroadcast = 28;
    private const byte OptionRequestedAddress = 50;
    private const byte OptionLeaseTime = 51;
    private const byte OptionMessageType = 53;
    private const byte OptionServer = 54;
    private const byte OptionEnd = 255;

    private enum Message : byte
    {
        Discover = 1,
        Offer = 2,
        Request = 3,
        Decline = 4,
        Acknowledge = 5,
        Refuse = 6,
        Release = 7,
        Inform = 8,
    }

    private readonly Dictionary<MacAddress, NetAddress> _leases = [];
    private readonly Dictionary<NetAddress, MacAddress> _owners = [];
    private readonly Queue<MacAddress> _order = new();
    private readonly HashSet<NetAddress> _declined = []; // in use by somebody who did not ask

    public int LeaseCount => _leases.Count;

    public void Clear()
    {
        _leases.Clear();
        _owners.Clear();
        _order.Clear();
        _declined.Clear();
    }

    public void Input(ReadOnlySpan<byte> request, MacAddress sender)
    {
        if (request.Length < OptionsStart || request[0] != 1 || request[1] != 1 || request[2] != MacAddress.Length
            || BinaryPrimitives.ReadUInt32BigEndian(request[FixedLength..]) != MagicCookie)
        {
            stack.CountDrop();
            return;
        }
        var mac = new MacAddress(request.Slice(28, MacAddress.Length));
        var options = request[OptionsStart..];
        var type = FindOption(options, OptionMessageType, 1);
        if (mac.IsMulticast || sender.IsMulticast || type.IsEmpty)
        {
            return;
        }
        var server = FindOption(options, OptionServer, 4);
        if (!server.IsEmpty && NetAddress.Read(server) != stack.Plan.Gateway4)
        {
            return; // the client has chosen another server
        }
        var current = NetAddress.Read(request.Slice(12, 4));
        var requestedOption = FindOption(options, OptionRequestedAddress, 4);
        var requested = requestedOption.IsEmpty ? current : NetAddress.Read(requestedOption);
        switch ((Message)type[0])
        {
            case Message.Discover:
                if (Lease(mac) is { } offered)
                {
                    Reply(request, sender, Message.Offer, offered);
                }
                break;
            case Message.Request:
                // A client that knows its address from before may have it back if it is free.
                if (requested == Lease(mac, requested))
                {
                    stack.Neighbors.Learn(requested, sender);
                    Reply(request, sender, Message.Acknowledge, requested);
                }
                else
                {
                    Reply(request, sender, Message.Refuse, default);
                }
                break;
            case Message.Inform:
                Reply(request, sender, Message.Acknowledge, default);
                break;
            case Message.Decline when _leases.TryGetValue(mac, out var refused) && refused == requested:
                Forget(mac);
                _declined.Add(refused);
                break;
            case Message.Release when _leases.TryGetValue(mac, out var released) && released == current:
                Forget(mac);
                break;
        }
    }

    private NetAddress? Lease(MacAddress mac, NetAddress? wanted = null)
    {
        if (_leases.TryGetValue(mac, out var lease))
        {
            return lease;
        }
        var first = stack.Plan.FirstGuest4.Ip4;
        var count = stack.Plan.GuestCount;
        if (wanted is { } address && address.IsIp4 && address.Ip4 - first < (uint)count && IsFree(address))
        {
            return Take(mac, address);
        }
        for (var i = 0u; i < count; i++)
        {
            if (IsFree(NetAddress.FromIp4(first + i)))
            {
                return Take(mac, NetAddress.FromIp4(first + i));
            }
        }
        if (_order.Count == 0)
        {
            _declined.Clear();
            return null;
        }
        Forget(_order.Peek()); // the oldest one; a client that is still there asks again
        return Lease(mac);
    }

    private bool IsFree(NetAddress address) => !_owners.ContainsKey(address) && !_declined.Contains(address);

    private NetAddress Take(MacAddress mac, NetAddress address)
    {
        _leases[mac] = address;
        _owners[address] = mac;
        _order.Enqueue(mac);
        return address;
    }

    private void Forget(MacAddress mac)
    {
        if (_leases.Remove(mac, out var address))
        {
            _owners.Remove(address);
            for (var i = _order.Count; i > 0; i--)
            {
                if (_order.Dequeue() is var other && other != mac)
                {
                    _order.Enqueue(other);
                }
            }
        }
    }

    private static ReadOnlySpan<byte> FindOption(ReadOnlySpan<byte> options, byte code, int length)
    {
        while (!options.IsEmpty && options[0] != OptionEnd)
        {
            if (options[0] == OptionPad)
            {
                options = options[1..];
                continue;
            }
            if (options.Length < 2 || options.Length < 2 + options[1])
            {
                break;
            }
            if (options[0] == code && options[1] == length)
            {
                return options.Slice(2, length);
            }
            options = options[(2 + options[1])..];
        }
        return default;
    }

    // RFC 2131, "Constructing and sending DHCP messages"
    private void Reply(ReadOnlySpan<byte> request, MacAddress sender, Message type, NetAddress address)
    {
        var plan = stack.Plan;
        var reply = stack.Scratch.AsSpan(IpNumbers.UdpHeaderLength, ReplyLength);
        reply.Clear();
        reply[0] = 2;
        request[1..12].CopyTo(reply[1..]);
        reply[3] = 0; // hops
        reply[8..10].Clear(); // seconds
        request.Slice(10, 2).CopyTo(reply[10..]);
        if (type == Message.Acknowledge)
        {
            request.Slice(12, 4).CopyTo(reply[12..]);
        }
        var hasAddress = address != default;
        if (hasAddress)
        {
            address.CopyTo(reply[16..]);
        }
        plan.Gateway4.CopyTo(reply[20..]);
        request.Slice(28, 16).CopyTo(reply[28..]);
        BinaryPrimitives.WriteUInt32BigEndian(reply[FixedLength..], MagicCookie);
        var writer = new OptionWriter(reply[OptionsStart..]);
        writer.Add(OptionMessageType, [(byte)type]);
        writer.Add(OptionServer, plan.Gateway4);
        if (type != Message.Refuse)
        {
            if (hasAddress)
            {
                writer.Add(OptionLeaseTime, LeaseTime);
            }
            writer.Add(OptionMask, plan.Mask4);
            writer.Add(OptionRouter, plan.Gateway4);
            writer.Add(OptionDns, plan.Dns4);
            writer.Add(OptionBroadcast, plan.Broadcast4);
            writer.Add(OptionMtu, [(byte)(stack.Options.Mtu >> 8), (byte)stack.Options.Mtu]);
            if (stack.Options.DomainName is { Length: > 0 } domain)
            {
                writer.Add(OptionDomain, Encoding.ASCII.GetBytes(domain));
            }
        }
        writer.End();
        // To the card that asked, whatever it says about itself inside; by broadcast if it cannot receive otherwise yet.
        var knows = BinaryPrimitives.ReadUInt32BigEndian(request[12..]) != 0 && type != Message.Refuse;
        var broadcast = type == Message.Refuse || (!knows && (!hasAddress || (BinaryPrimitives.ReadUInt16BigEndian(request[10..]) & BroadcastFlag) != 0));
        var target = broadcast ? NetAddress.FromIp4(uint.MaxValue) : knows ? NetAddress.Read(request.Slice(12, 4)) : address;
        stack.Datagrams.SendUdp(broadcast ? MacAddress.Broadcast : sender, new FlowKey(target, ClientPort, plan.Gateway4, ServerPort), ReplyLength);
    }

    private ref struct OptionWriter(Span<byte> target)
    {
        private Span<byte> _rest = target;

        public void Add(byte code, scoped ReadOnlySpan<byte> value)
        {
            _rest[0] = code;
            _rest[1] = (byte)value.Length;
            value.CopyTo(_rest[2..]);
            _rest = _rest[(2 + value.Length)..];
        }

        public void Add(byte code, NetAddress value) => Add(code, value.Ip4);

        public void Add(byte code, uint value)
        {
            Span<byte> bytes = stackalloc byte[4];
            BinaryPrimitives.WriteUInt32BigEndian(bytes, value);
            Add(code, bytes);
        }

        public void End() => _rest[0] = OptionEnd;
    }
}
