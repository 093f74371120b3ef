using System.Buffers.Binary;

namespace KvmSharp.Networking;

/// <summary>
/// Finishes packets: fills in checksums and cuts what is too long. Specification: RFC 1071 (the checksum), RFC 9293 (TCP),
/// RFC 791 and RFC 8200 (IP).
/// </summary>
public static class PacketFinisher
{
    private const ushort EtherTypeIp4 = 0x0800;
    private const ushort EtherTypeIp6 = 0x86dd;
    private const ushort EtherTypeVlan = 0x8100;
    private const byte ProtocolTcp = 6;
    private const int Ip4HeaderLength = 20;
    private const int Ip6HeaderLength = 40;
    private const int TcpHeaderLength = 20;
    private const int TcpChecksum = 16;
    private const int SegmentMin = 32; // smaller ones only serve to make many packets of one
    private const byte TcpFin = 1 << 0;
    private const byte TcpPush = 1 << 3;
    private const byte TcpCwr = 1 << 7;

    /// <summary>Does what a receiver does not accept unfinished.</summary>
    /// <param name="packet">The packet; it belongs to this method now.</param>
    /// <param name="accepted">What the receiver accepts.</param>
    /// <param name="output">Gets the finished packets, none if the packet contradicts itself.</param>
    public static void Finish(NetworkPacket packet, NetworkOffloads accepted, Action<NetworkPacket> output)
    {
        ArgumentNullException.ThrowIfNull(packet);
        ArgumentNullException.ThrowIfNull(output);
        var offload = packet.Offload;
        var accept = offload.Segmentation switch
        {
            PacketSegmentation.None => NetworkOffloads.None,
            PacketSegmentation.Tcp4 => NetworkOffloads.Tcp4,
            _ => NetworkOffloads.Tcp6,
        };
        if ((accepted & accept) != accept)
        {
            using (packet)
            {
                Segment(packet, output);
            }
        }
        else if (!offload.NeedsChecksum || (accepted & NetworkOffloads.Checksum) != 0)
        {
            output(packet);
        }
        else if (TryFillChecksum(packet.Data, offload.ChecksumStart, offload.ChecksumOffset))
        {
            var finished = NetworkPacket.Create(packet.Data, offload with { NeedsChecksum = false, ChecksumValid = true });
            packet.Dispose();
            output(finished);
        }
        else
        {
            packet.Dispose();
        }
    }

    /// <summary>Fills in the checksum that a frame lacks.</summary>
    /// <param name="frame">The frame; the sum of the pseudo header is where the checksum goes.</param>
    /// <param name="start">Where the sum starts.</param>
    /// <param name="offset">Where the checksum goes, from there.</param>
    /// <returns>Whether these places lie in the frame.</returns>
    public static bool TryFillChecksum(Span<byte> frame, int start, int offset)
    {
        if (start < 0 || offset < 0 || start + offset + 2 > frame.Length)
        {
            return false;
        }
        var sum = (ushort)~Fold(Sum(frame[start..]));
        // A checksum of 0 means "none" in UDP; its equal is sent, which is right in TCP too.
        BinaryPrimitives.WriteUInt16BigEndian(frame[(start + offset)..], sum == 0 ? (ushort)0xffff : sum);
        return true;
    }

    /// <summary>Adds up 16-bit words in network order.</summary>
    internal static ulong Sum(ReadOnlySpan<byte> data)
    {
        ulong sum = 0;
        for (; data.Length >= 8; data = data[8..])
        {
            var words = BinaryPrimitives.ReadUInt64BigEndian(data);
            sum += (words >> 48) + (words >> 32 & 0xffff) + (words >> 16 & 0xffff) + (words & 0xffff);
        }
        for (; data.Length >= 2; data = data[2..])
        {
            sum += BinaryPrimitives.ReadUInt16BigEndian(data);
        }
        return data.IsEmpty ? sum : sum + ((ulong)data[0] << 8);
    }

    /// <summary>Folds a sum into 16 bits with end-around carry.</summary>
    internal static ushort Fold(ulong sum)
    {
        while (sum >> 16 != 0)
        {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        return (ushort)sum;
    }

    // Each segment gets all headers; sequence number, lengths, identification, flags and checksums are its own.
    private static void Segment(NetworkPacket packet, Action<NetworkPacket> output)
    {
        ReadOnlySpan<byte> frame = packet.Data;
        var isIp6 = packet.Offload.Segmentation == PacketSegmentation.Tcp6;
        if (packet.Offload.SegmentSize < SegmentMin || !TryFindTcp(frame, isIp6, out var ip, out var tcp))
        {
            return;
        }
        var tcpLength = (frame[tcp + 12] >> 4) * 4;
        var payload = tcp + tcpLength;
        if (tcpLength < TcpHeaderLength || payload > frame.Length)
        {
            return;
        }
        var sequence = BinaryPrimitives.ReadUInt32BigEndian(frame[(tcp + 4)..]);
        var flags = frame[tcp + 13];
        var number = 0;
        for (var done = payload; done == payload || done < frame.Length; number++)
        {
            var count = Math.Min(packet.Offload.SegmentSize, frame.Length - done);
            var last = done + count == frame.Length;
            var segment = NetworkPacket.Create(payload + count, new PacketOffload { ChecksumValid = true });
            var data = segment.Data;
            frame[..payload].CopyTo(data);
            frame.Slice(done, count).CopyTo(data[payload..]);
            BinaryPrimitives.WriteUInt32BigEndian(data[(tcp + 4)..], sequence + (uint)(done - payload));
            data[tcp + 13] = (byte)(flags & ~(last ? 0 : TcpFin | TcpPush) & ~(number == 0 ? 0 : TcpCwr));
            FinishIp(data, ip, tcp, isIp6, number);
            output(segment);
            done += count;
            if (count == 0)
            {
                break;
            }
        }
    }

    private static void FinishIp(Span<byte> data, int ip, int tcp, bool isIp6, int number)
    {
        ulong pseudo;
        var tcpBytes = data.Length - tcp;
        if (isIp6)
        {
            BinaryPrimitives.WriteUInt16BigEndian(data[(ip + 4)..], (ushort)(data.Length - ip - Ip6HeaderLength));
            pseudo = Sum(data.Slice(ip + 8, 32));
        }
        else
        {
            BinaryPrimitives.WriteUInt16BigEndian(data[(ip + 2)..], (ushort)(data.Length - ip));
            var identification = BinaryPrimitives.ReadUInt16BigEndian(data[(ip + 4)..]);
            BinaryPrimitives.WriteUInt16BigEndian(data[(ip + 4)..], (ushort)(identification + number));
            data.Slice(ip + 10, 2).Clear();
            BinaryPrimitives.WriteUInt16BigEndian(data[(ip + 10)..], (ushort)~Fold(Sum(data[ip..tcp])));
            pseudo = Sum(data.Slice(ip + 12, 8));
        }
        data.Slice(tcp + TcpChecksum, 2).Clear();
        var sum = Sum(data[tcp..]) + pseudo + ProtocolTcp + (ulong)tcpBytes;
        BinaryPrimitives.WriteUInt16BigEndian(data[(tcp + TcpChecksum)..], (ushort)~Fold(sum));
    }

    private static bool TryFindTcp(ReadOnlySpan<byte> frame, bool isIp6, out int ip, out int tcp)
    {
        ip = NetworkPacket.HeaderLength;
        tcp = 0;
        if (frame.Length < ip)
        {
            return false;
        }
        var type = BinaryPrimitives.ReadUInt16BigEndian(frame[12..]);
        if (type == EtherTypeVlan)
        {
            ip += 4;
            if (frame.Length < ip)
            {
                return false;
            }
            type = BinaryPrimitives.ReadUInt16BigEndian(frame[16..]);
        }
        if (type != (isIp6 ? EtherTypeIp6 : EtherTypeIp4) || frame.Length < ip + (isIp6 ? Ip6HeaderLength : Ip4HeaderLength))
        {
            return false;
        }
        // Extension headers of IPv6 are left to who finds them; guests send TCP without.
        tcp = ip + (isIp6 ? Ip6HeaderLength : (frame[ip] & 15) * 4);
        var protocol = frame[ip + (isIp6 ? 6 : 9)];
        return tcp >= ip + Ip4HeaderLength && frame.Length >= tcp + TcpHeaderLength && protocol == ProtocolTcp;
    }
}
