using System.Buffers.Binary;

namespace KvmSharp.Networking.Nat;

internal enum UnreachableReason
{
    Host,
    Port,
    Prohibited,
}

/// <summary>
/// ICMP towards the guest: echo of own addresses, errors, neighbor discovery and router advertisements. Specification: RFC 792,
/// RFC 4443, RFC 4861, RFC 4862, RFC 8106 (DNS servers). Used under the network's lock.
/// </summary>
internal sealed class Icmp(NatStack stack)
{
    private const byte EchoRequest4 = 8;
    private const byte EchoReply4 = 0;
    private const byte Unreachable4 = 3;
    private const byte EchoRequest6 = 128;
    private const byte EchoReply6 = 129;
    private const byte Unreachable6 = 1;
    private const byte RouterSolicitation = 133;
    private const byte RouterAdvertisement = 134;
    private const byte NeighborSolicitation = 135;
    private const byte NeighborAdvertisement = 136;
    private const byte DiscoveryHopLimit = 255;
    private const byte OptionSourceAddress = 1;
    private const byte OptionTargetAddress = 2;
    private const byte OptionPrefix = 3;
    private const byte OptionMtu = 5;
    private const byte OptionDns = 25;
    private const uint PrefixLifetime = 86_400;
    private const ushort RouterLifetime = 9000;
    private const long AdvertisementInterval = 600_000;
    private const int QuoteMax = 548; // RFC 1812: an error is at most 576 bytes long
    private const long ErrorInterval = 10; // RFC 4443, section 2.4 (f): a limit to the rate, in milliseconds

    private static readonly NetAddress AllNodes = NetAddress.FromIp6(((UInt128)0xff02 << 112) + 1);
    private static readonly MacAddress AllNodesMac = new([0x33, 0x33, 0, 0, 0, 1]);

    private long _nextAdvertisement = long.MaxValue;
    private long _lastError = long.MinValue / 2;

    public void Clear() => _nextAdvertisement = long.MaxValue;

    public void Input(in IpPacket packet, MacAddress mac)
    {
        var message = packet.Payload;
        if (message.Length < 8)
        {
            stack.CountDrop();
            return;
        }
        if (packet.IsIp6Discovery(message[0]))
        {
            InputDiscovery(packet, mac);
            return;
        }
        if (message[0] != (packet.Source.IsIp4 ? EchoRequest4 : EchoRequest6) || message[1] != 0)
        {
            return;
        }
        if (stack.Plan.IsOwn(packet.Destination))
        {
            Span<byte> answer = stack.Scratch.AsSpan(0, message.Length);
            message.CopyTo(answer);
            SendEchoReply(mac, packet.Destination, packet.Source, answer);
            return;
        }
        stack.Datagrams.Echo(packet, mac);
    }

    /// <summary>Makes an echo reply of a message and sends it.</summary>
    public void SendEchoReply(MacAddress mac, NetAddress source, NetAddress destination, Span<byte> message)
    {
        var isIp4 = source.IsIp4;
        message[0] = isIp4 ? EchoReply4 : EchoReply6;
        message[1] = 0;
        SendMessage(mac, source, destination, message);
    }

    /// <summary>Whether a message from the host's ICMP socket is an echo reply.</summary>
    public static bool IsEchoReply(ReadOnlySpan<byte> message, bool isIp4) => message.Length >= 8 && message[0] == (isIp4 ? EchoReply4 : EchoReply6);

    /// <summary>Tells a guest that a packet does not arrive.</summary>
    /// <param name="mac">The guest.</param>
    /// <param name="guest">Its address.</param>
    /// <param name="remote">Where the packet was to go.</param>
    /// <param name="protocol">The packet's protocol.</param>
    /// <param name="start">The start of the packet behind the IP header.</param>
    /// <param name="reason">Why.</param>
    public void SendUnreachable(MacAddress mac, NetAddress guest, NetAddress remote, byte protocol, ReadOnlySpan<byte> start, UnreachableReason reason)
    {
        if (stack.Now - _lastError < ErrorInterval || remote.IsMulticast)
        {
            return;
        }
        _lastError = stack.Now;
        start = start[..Math.Min(start.Length, QuoteMax)];
        var header = guest.IsIp4 ? IpNumbers.Ip4HeaderLength : IpNumbers.Ip6HeaderLength;
        var message = new byte[8 + header + start.Length];
        message[0] = guest.IsIp4 ? Unreachable4 : Unreachable6;
        message[1] = (guest.IsIp4, reason) switch
        {
            (true, UnreachableReason.Host) => 1,
            (true, UnreachableReason.Port) => 3,
            (true, _) => 13,
            (false, UnreachableReason.Host) => 3,
            (false, UnreachableReason.Port) => 4,
            (false, _) => 1,
        };
        PacketBuilder.WriteHeader(message.AsSpan(8), guest, remote, protocol, start.Length);
        start.CopyTo(message.AsSpan(8 + header));
        SendMessage(mac, stack.Plan.Gateway(guest), guest, message);
    }

    /// <summary>Asks who has an IPv6 address.</summary>
    public void SendSolicitation(NetAddress target)
    {
        Span<byte> message = stackalloc byte[32];
        message.Clear();
        message[0] = NeighborSolicitation;
        target.CopyTo(message[8..]);
        message[24] = OptionSourceAddress;
        message[25] = 1;
        stack.Plan.Mac.CopyTo(message[26..]);
        var group = NetAddress.FromIp6(((UInt128)0xff02 << 112) + 0x1_ff00_0000 + (target.Ip6 & 0xff_ffff));
        SendMessage(MacOf(group), stack.Plan.Router6, group, message, DiscoveryHopLimit);
    }

    public long RunTimers(long now)
    {
        if (_nextAdvertisement <= now)
        {
            Advertise(AllNodesMac, AllNodes);
        }
        return _nextAdvertisement;
    }

    // RFC 4861, "Validation" of each kind of message: not from beyond a router, of full length, options not empty.
    private void InputDiscovery(in IpPacket packet, MacAddress mac)
    {
        var message = packet.Payload;
        if (!stack.Plan.HasIp6 || packet.HopLimit != DiscoveryHopLimit || message[1] != 0 || mac.IsMulticast)
        {
            return;
        }
        switch (message[0])
        {
            case RouterSolicitation:
                stack.Neighbors.Learn(packet.Source, mac);
                var direct = !packet.Source.IsUnspecified;
                Advertise(direct ? mac : AllNodesMac, direct ? packet.Source : AllNodes);
                break;
            case NeighborSolicitation when message.Length >= 24:
                stack.Neighbors.Learn(packet.Source, mac);
                var target = NetAddress.Read(message.Slice(8, 16));
                if (!target.IsIp4 && stack.Plan.IsOwn(target))
                {
                    var probes = packet.Source.IsUnspecified; // duplicate address detection: everybody is to hear
                    SendAdvertisement(probes ? AllNodesMac : mac, target, probes ? AllNodes : packet.Source, !probes);
                }
                break;
            case NeighborAdvertisement when message.Length >= 24:
                var owner = NetAddress.Read(message.Slice(8, 16));
                if (!owner.IsIp4)
                {
                    stack.Neighbors.Learn(owner, mac);
                }
                break;
        }
    }

    private void SendAdvertisement(MacAddress mac, NetAddress target, NetAddress destination, bool solicited)
    {
        Span<byte> message = stackalloc byte[32];
        message.Clear();
        message[0] = NeighborAdvertisement;
        message[4] = (byte)(0x80 | (solicited ? 0x40 : 0) | 0x20); // router, solicited, override
        target.CopyTo(message[8..]);
        message[24] = OptionTargetAddress;
        message[25] = 1;
        stack.Plan.Mac.CopyTo(message[26..]);
        SendMessage(mac, target, destination, message, DiscoveryHopLimit);
    }

    // RFC 4861, "Router Advertisement Message Format"
    private void Advertise(MacAddress mac, NetAddress destination)
    {
        Span<byte> message = stackalloc byte[16 + 8 + 8 + 32 + 24];
        message.Clear();
        message[0] = RouterAdvertisement;
        message[4] = IpNumbers.HopLimit;
        BinaryPrimitives.WriteUInt16BigEndian(message[6..], RouterLifetime);
        var options = message[16..];
        options[0] = OptionSourceAddress;
        options[1] = 1;
        stack.Plan.Mac.CopyTo(options[2..]);
        options = options[8..];
        options[0] = OptionMtu;
        options[1] = 1;
        BinaryPrimitives.WriteUInt32BigEndian(options[4..], (uint)stack.Options.Mtu);
        options = options[8..];
        options[0] = OptionPrefix;
        options[1] = 4;
        options[2] = 64;
        options[3] = 0xc0; // on this link, and for addresses
        BinaryPrimitives.WriteUInt32BigEndian(options[4..], PrefixLifetime);
        BinaryPrimitives.WriteUInt32BigEndian(options[8..], PrefixLifetime);
        NetAddress.FromIp6(stack.Plan.Prefix6).CopyTo(options[16..]);
        options = options[32..];
        options[0] = OptionDns;
        options[1] = 3;
        BinaryPrimitives.WriteUInt32BigEndian(options[4..], PrefixLifetime);
        stack.Plan.Dns6.CopyTo(options[8..]);
        SendMessage(mac, stack.Plan.Router6, destination, message, DiscoveryHopLimit);
        _nextAdvertisement = stack.Now + AdvertisementInterval;
        stack.SetDeadline(_nextAdvertisement);
    }

    private void SendMessage(MacAddress mac, NetAddress source, NetAddress destination, Span<byte> message, byte hopLimit = IpNumbers.HopLimit)
    {
        if (source.IsIp4)
        {
            message.Slice(2, 2).Clear();
            BinaryPrimitives.WriteUInt16BigEndian(message[2..], (ushort)~PacketFinisher.Fold(PacketFinisher.Sum(message)));
        }
        else
        {
            PacketBuilder.FillChecksum(source, destination, IpNumbers.Icmp6, message, 2);
        }
        stack.Builder.SendDatagram(mac, source, destination, source.IsIp4 ? IpNumbers.Icmp4 : IpNumbers.Icmp6, message, stack.Send, hopLimit);
    }

    // RFC 2464, "Address Mapping -- Multicast"
    private static MacAddress MacOf(NetAddress group)
    {
        Span<byte> bytes = stackalloc byte[16];
        group.CopyTo(bytes);
        return new MacAddress([0x33, 0x33, bytes[12], bytes[13], bytes[14], bytes[15]]);
    }
}
