using System.Buffers.Binary;

namespace KvmSharp.Networking.Nat;

/// <summary>Numbers of RFC 791, RFC 8200 and the registries that they name.</summary>
internal static class IpNumbers
{
    public const ushort EtherTypeIp4 = 0x0800;
    public const ushort EtherTypeArp = 0x0806;
    public const ushort EtherTypeIp6 = 0x86dd;
    public const byte Icmp4 = 1;
    public const byte Tcp = 6;
    public const byte Udp = 17;
    public const byte Icmp6 = 58;
    public const byte HopByHop = 0;
    public const byte Routing = 43;
    public const byte Fragment = 44;
    public const byte DestinationOptions = 60;
    public const int Ip4HeaderLength = 20;
    public const int Ip6HeaderLength = 40;
    public const int FragmentHeaderLength = 8;
    public const int UdpHeaderLength = 8;
    public const int TcpHeaderLength = 20;
    public const byte HopLimit = 64;
}

/// <summary>An IP packet of a guest: what its headers say, checked against its length.</summary>
internal readonly ref struct IpPacket
{
    private const int MaxExtensionHeaders = 8;
    private const int MoreFragments = 0x2000;

    public NetAddress Source { get; init; }

    public NetAddress Destination { get; init; }

    public byte Protocol { get; init; }

    public byte HopLimit { get; init; }

    /// <summary>From the protocol's own header on.</summary>
    public ReadOnlySpan<byte> Payload { get; init; }

    /// <summary>From the IP header on.</summary>
    public ReadOnlySpan<byte> Raw { get; init; }

    public bool IsFragment { get; init; }

    public uint FragmentId { get; init; }

    public int FragmentOffset { get; init; }

    public bool HasMoreFragments { get; init; }

    /// <summary>RFC 791, "Internet Header Format".</summary>
    public static bool TryParse4(ReadOnlySpan<byte> data, out IpPacket packet)
    {
        packet = default;
        if (data.Length < IpNumbers.Ip4HeaderLength || data[0] >> 4 != 4)
        {
            return false;
        }
        var header = (data[0] & 15) * 4;
        int total = BinaryPrimitives.ReadUInt16BigEndian(data[2..]);
        if (header < IpNumbers.Ip4HeaderLength || total < header || total > data.Length
            || PacketFinisher.Fold(PacketFinisher.Sum(data[..header])) != 0xffff)
        {
            return false;
        }
        int fragment = BinaryPrimitives.ReadUInt16BigEndian(data[6..]);
        packet = new IpPacket
        {
            Source = NetAddress.Read(data.Slice(12, 4)),
            Destination = NetAddress.Read(data.Slice(16, 4)),
            Protocol = data[9],
            HopLimit = data[8],
            Payload = data[header..total],
            Raw = data[..total],
            IsFragment = (fragment & 0x3fff) != 0,
            FragmentId = BinaryPrimitives.ReadUInt16BigEndian(data[4..]),
            FragmentOffset = (fragment & 0x1fff) * 8,
            HasMoreFragments = (fragment & MoreFragments) != 0,
        };
        return true;
    }

    /// <summary>RFC 8200, "IPv6 Extension Headers". Options are passed over; a routing header is obeyed by nobody here.</summary>
    public static bool TryParse6(ReadOnlySpan<byte> data, out IpPacket packet)
    {
        packet = default;
        if (data.Length < IpNumbers.Ip6HeaderLength || data[0] >> 4 != 6)
        {
            return false;
        }
        var total = IpNumbers.Ip6HeaderLength + BinaryPrimitives.ReadUInt16BigEndian(data[4..]);
        if (total > data.Length)
        {
            return false;
        }
        var source = NetAddress.Read(data.Slice(8, 16));
        var destination = NetAddress.Read(data.Slice(24, 16));
        if (source.IsIp4 || destination.IsIp4 || source.IsMulticast)
        {
            return false;
        }
        var protocol = data[6];
        var rest = data[IpNumbers.Ip6HeaderLength..total];
        for (var headers = 0; protocol is IpNumbers.HopByHop or IpNumbers.Routing or IpNumbers.DestinationOptions; headers++)
        {
            if (headers == MaxExtensionHeaders || rest.Length < 8 || rest.Length < (rest[1] + 1) * 8 || (protocol == IpNumbers.Routing && rest[3] != 0))
            {
                return false;
            }
            protocol = rest[0];
            rest = rest[((rest[1] + 1) * 8)..];
        }
        uint id = 0;
        int fragment = 0;
        var isFragment = protocol == IpNumbers.Fragment;
        if (isFragment)
        {
            if (rest.Length < IpNumbers.FragmentHeaderLength)
            {
                return false;
            }
            protocol = rest[0];
            fragment = BinaryPrimitives.ReadUInt16BigEndian(rest[2..]);
            id = BinaryPrimitives.ReadUInt32BigEndian(rest[4..]);
            rest = rest[IpNumbers.FragmentHeaderLength..];
        }
        packet = new IpPacket
        {
            Source = source,
            Destination = destination,
            Protocol = protocol,
            HopLimit = data[7],
            Payload = rest,
            Raw = data[..total],
            IsFragment = isFragment && (fragment & ~6) != 0, // RFC 6946: an atomic fragment is a whole packet
            FragmentId = id,
            FragmentOffset = fragment & ~7,
            HasMoreFragments = (fragment & 1) != 0,
        };
        return true;
    }

    /// <summary>The sum over the pseudo header (RFC 9293 and RFC 8200, "Upper-Layer Checksums").</summary>
    public static ulong PseudoSum(NetAddress source, NetAddress destination, byte protocol, int length)
    {
        Span<byte> bytes = stackalloc byte[32];
        source.CopyTo(bytes);
        destination.CopyTo(bytes[source.Length..]);
        return PacketFinisher.Sum(bytes[..(2 * source.Length)]) + protocol + (ulong)length;
    }

    /// <summary>Whether an ICMP message of this type is one of RFC 4861.</summary>
    public bool IsIp6Discovery(byte type) => !Source.IsIp4 && type is >= 133 and <= 137;

    /// <summary>Whether the checksum over pseudo header and payload is right.</summary>
    public bool HasValidChecksum() =>
        PacketFinisher.Fold(PseudoSum(Source, Destination, Protocol, Payload.Length) + PacketFinisher.Sum(Payload)) == 0xffff;
}

/// <summary>Makes the frames that a guest gets.</summary>
internal sealed class PacketBuilder(AddressPlan plan, int mtu)
{
    private ushort _identification;

    /// <summary>A frame with Ethernet and IP headers; the caller fills in the payload.</summary>
    public NetworkPacket CreateIp(
        MacAddress target, NetAddress source, NetAddress destination, byte protocol, int length, PacketOffload offload, out Span<byte> payload,
        byte hopLimit = IpNumbers.HopLimit)
    {
        var header = source.IsIp4 ? IpNumbers.Ip4HeaderLength : IpNumbers.Ip6HeaderLength;
        var packet = NetworkPacket.Create(NetworkPacket.HeaderLength + header + length, offload);
        var data = packet.Data;
        WriteEthernet(data, target, source.IsIp4 ? IpNumbers.EtherTypeIp4 : IpNumbers.EtherTypeIp6);
        if (source.IsIp4)
        {
            WriteIp4(data[NetworkPacket.HeaderLength..], source, destination, protocol, length, _identification++, 0x4000, hopLimit);
        }
        else
        {
            WriteIp6(data[NetworkPacket.HeaderLength..], source, destination, protocol, length, hopLimit);
        }
        payload = data[(NetworkPacket.HeaderLength + header)..];
        return packet;
    }

    public void WriteEthernet(Span<byte> frame, MacAddress target, ushort type)
    {
        target.CopyTo(frame);
        plan.Mac.CopyTo(frame[MacAddress.Length..]);
        BinaryPrimitives.WriteUInt16BigEndian(frame[12..], type);
    }

    /// <summary>A finished packet of UDP or ICMP, in fragments if the wire takes no longer ones.</summary>
    public void SendDatagram(
        MacAddress target, NetAddress source, NetAddress destination, byte protocol, ReadOnlySpan<byte> payload, Action<NetworkPacket> output,
        byte hopLimit = IpNumbers.HopLimit)
    {
        var header = source.IsIp4 ? IpNumbers.Ip4HeaderLength : IpNumbers.Ip6HeaderLength;
        if (header + payload.Length <= mtu)
        {
            var whole = CreateIp(target, source, destination, protocol, payload.Length, new PacketOffload { ChecksumValid = true }, out var room, hopLimit);
            payload.CopyTo(room);
            output(whole);
            return;
        }
        // RFC 791, "Fragmentation and Reassembly"; RFC 8200, "Fragment Header".
        var id = _identification++;
        var prefix = header + (source.IsIp4 ? 0 : IpNumbers.FragmentHeaderLength);
        var step = (mtu - prefix) & ~7;
        for (var done = 0; done < payload.Length; done += step)
        {
            var count = Math.Min(step, payload.Length - done);
            var more = done + count < payload.Length;
            var fragment = NetworkPacket.Create(NetworkPacket.HeaderLength + prefix + count);
            var data = fragment.Data;
            WriteEthernet(data, target, source.IsIp4 ? IpNumbers.EtherTypeIp4 : IpNumbers.EtherTypeIp6);
            data = data[NetworkPacket.HeaderLength..];
            if (source.IsIp4)
            {
                WriteIp4(data, source, destination, protocol, count, id, (more ? 0x2000 : 0) | done / 8, hopLimit);
            }
            else
            {
                WriteIp6(data, source, destination, IpNumbers.Fragment, IpNumbers.FragmentHeaderLength + count, hopLimit);
                data[header] = protocol;
                data[header + 1] = 0;
                BinaryPrimitives.WriteUInt16BigEndian(data[(header + 2)..], (ushort)(done | (more ? 1 : 0)));
                BinaryPrimitives.WriteUInt32BigEndian(data[(header + 4)..], id);
            }
            payload.Slice(done, count).CopyTo(data[prefix..]);
            output(fragment);
        }
    }

    /// <summary>Puts the checksum over pseudo header and payload where it belongs.</summary>
    public static void FillChecksum(NetAddress source, NetAddress destination, byte protocol, Span<byte> payload, int at)
    {
        payload.Slice(at, 2).Clear();
        var sum = (ushort)~PacketFinisher.Fold(IpPacket.PseudoSum(source, destination, protocol, payload.Length) + PacketFinisher.Sum(payload));
        BinaryPrimitives.WriteUInt16BigEndian(payload[at..], sum == 0 && protocol == IpNumbers.Udp ? (ushort)0xffff : sum);
    }

    /// <summary>The header of a packet of a guest, as it may have been.</summary>
    public static void WriteHeader(Span<byte> ip, NetAddress source, NetAddress destination, byte protocol, int length)
    {
        if (source.IsIp4)
        {
            WriteIp4(ip, source, destination, protocol, length, 0, 0, IpNumbers.HopLimit);
        }
        else
        {
            WriteIp6(ip, source, destination, protocol, length, IpNumbers.HopLimit);
        }
    }

    private static void WriteIp4(
        Span<byte> ip, NetAddress source, NetAddress destination, byte protocol, int length, ushort id, int fragment, byte hopLimit)
    {
        ip[..IpNumbers.Ip4HeaderLength].Clear();
        ip[0] = 0x45;
        BinaryPrimitives.WriteUInt16BigEndian(ip[2..], (ushort)(IpNumbers.Ip4HeaderLength + length));
        BinaryPrimitives.WriteUInt16BigEndian(ip[4..], id);
        BinaryPrimitives.WriteUInt16BigEndian(ip[6..], (ushort)fragment);
        ip[8] = hopLimit;
        ip[9] = protocol;
        source.CopyTo(ip[12..]);
        destination.CopyTo(ip[16..]);
        BinaryPrimitives.WriteUInt16BigEndian(ip[10..], (ushort)~PacketFinisher.Fold(PacketFinisher.Sum(ip[..IpNumbers.Ip4HeaderLength])));
    }

    private static void WriteIp6(Span<byte> ip, NetAddress source, NetAddress destination, byte next, int length, byte hopLimit)
    {
        ip[..8].Clear();
        ip[0] = 0x60;
        BinaryPrimitives.WriteUInt16BigEndian(ip[4..], (ushort)length);
        ip[6] = next;
        ip[7] = hopLimit;
        source.CopyTo(ip[8..]);
        destination.CopyTo(ip[24..]);
    }
}
