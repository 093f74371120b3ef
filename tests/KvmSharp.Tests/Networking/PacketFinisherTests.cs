using System.Buffers.Binary;
using KvmSharp.Networking;

namespace KvmSharp.Tests.Networking;

public sealed class PacketFinisherTests
{
    [Fact]
    public void ChecksumIsFilledIn()
    {
        // UDP over IPv4 from 10.0.0.1:1 to 10.0.0.2:2 with the pseudo header's sum in place.
        var frame = Packets.Udp4(payload: [1, 2, 3], withChecksum: false);
        Assert.True(PacketFinisher.TryFillChecksum(frame, 34, 6));
        Assert.True(Packets.HasValidChecksums(frame));
        Assert.False(PacketFinisher.TryFillChecksum(frame, 34, frame.Length));
        Assert.False(PacketFinisher.TryFillChecksum(frame, frame.Length - 1, 0));
        Assert.False(PacketFinisher.TryFillChecksum(frame, -1, 0));
    }

    [Fact]
    public void ZeroBecomesItsEqual()
    {
        byte[] frame = [0xff, 0xff, 0, 0];
        Assert.True(PacketFinisher.TryFillChecksum(frame, 0, 2));
        Assert.Equal([0xff, 0xff, 0xff, 0xff], frame);
    }

    [Theory]
    [InlineData(false, false)]
    [InlineData(true, false)]
    [InlineData(false, true)]
    public void LongPacketsAreCut(bool ip6, bool vlan)
    {
        var payload = Enumerable.Range(0, 5000).Select(i => (byte)(i * 3)).ToArray();
        var packet = Packets.Tcp(payload, ip6, vlan, flags: 0x99); // FIN, PSH, ACK, CWR
        var segments = new List<byte[]>();
        PacketFinisher.Finish(packet, NetworkOffloads.Checksum, s =>
        {
            Assert.Equal(PacketSegmentation.None, s.Offload.Segmentation);
            segments.Add(s.Data.ToArray());
            s.Dispose();
        });
        Assert.Equal(4, segments.Count); // of 1400 bytes
        var header = 14 + (vlan ? 4 : 0) + (ip6 ? 40 : 20) + 32;
        Assert.Equal(payload, segments.SelectMany(s => s[header..]));
        Assert.All(segments, s => Assert.True(Packets.HasValidChecksums(s)));
        Assert.Equal([0x90, 0x10, 0x10, 0x19], segments.Select(s => (int)s[header - 32 + 13]));
        Assert.Equal([100u, 1500, 2900, 4300], segments.Select(s => BinaryPrimitives.ReadUInt32BigEndian(s.AsSpan(header - 32 + 4))));
    }

    [Fact]
    public void WhatTheReceiverAcceptsStaysAsItIs()
    {
        var packet = Packets.Tcp(new byte[3000], false, false, 0x10);
        NetworkPacket? same = null;
        PacketFinisher.Finish(packet, NetworkOffloads.All, p => same = p);
        Assert.Same(packet, same);
        packet.Dispose();
        Assert.Throws<ObjectDisposedException>(() => packet.Data.Length);
        packet.Dispose();
    }

    // Nothing that a guest calls a packet may do more than vanish.
    [Fact]
    public void PacketsThatContradictThemselvesVanish()
    {
        var random = new Random(1);
        for (var i = 0; i < 20_000; i++)
        {
            byte[] frame;
            using (var good = Packets.Tcp(new byte[random.Next(200)], random.Next(2) == 0, random.Next(4) == 0, (byte)random.Next(256)))
            {
                frame = good.Data[..random.Next(good.Length + 1)].ToArray();
            }
            for (var change = random.Next(4); change > 0 && frame.Length > 0; change--)
            {
                frame[random.Next(frame.Length)] = (byte)random.Next(256);
            }
            var packet = NetworkPacket.Create(frame, new PacketOffload
            {
                NeedsChecksum = random.Next(2) == 0,
                ChecksumStart = (ushort)random.Next(random.Next(1, 65536)),
                ChecksumOffset = (ushort)random.Next(random.Next(1, 65536)),
                Segmentation = (PacketSegmentation)(random.Next(3) switch { 0 => 0, 1 => 1, _ => 4 }),
                SegmentSize = (ushort)random.Next(100),
            });
            PacketFinisher.Finish(packet, (NetworkOffloads)random.Next(8), p => p.Dispose());
        }
    }
}

/// <summary>Makes and checks packets.</summary>
internal static class Packets
{
    public static byte[] Udp4(ReadOnlySpan<byte> payload, bool withChecksum = true)
    {
        var frame = new byte[42 + payload.Length];
        Ethernet(frame, false, false);
        var ip = frame.AsSpan(14);
        Ip4(ip, 17, 8 + payload.Length);
        var udp = ip[20..];
        udp[1] = 1;
        udp[3] = 2;
        BinaryPrimitives.WriteUInt16BigEndian(udp[4..], (ushort)(8 + payload.Length));
        payload.CopyTo(udp[8..]);
        BinaryPrimitives.WriteUInt16BigEndian(udp[6..], PacketFinisher.Fold(PacketFinisher.Sum(ip.Slice(12, 8)) + 17 + 8 + (ulong)payload.Length));
        if (withChecksum)
        {
            PacketFinisher.TryFillChecksum(frame, 34, 6);
        }
        return frame;
    }

    public static NetworkPacket Tcp(ReadOnlySpan<byte> payload, bool ip6, bool vlan, byte flags)
    {
        var ipStart = vlan ? 18 : 14;
        var tcpStart = ipStart + (ip6 ? 40 : 20);
        var frame = new byte[tcpStart + 32 + payload.Length];
        Ethernet(frame, ip6, vlan);
        var ip = frame.AsSpan(ipStart);
        ulong pseudo;
        if (ip6)
        {
            ip[0] = 0x60;
            BinaryPrimitives.WriteUInt16BigEndian(ip[4..], (ushort)(32 + payload.Length));
            ip[6] = 6;
            ip[7] = 64;
            ip[8] = ip[24] = 0xfd;
            ip[39] = 2;
            pseudo = PacketFinisher.Sum(ip.Slice(8, 32));
        }
        else
        {
            Ip4(ip, 6, 32 + payload.Length);
            pseudo = PacketFinisher.Sum(ip.Slice(12, 8));
        }
        var tcp = frame.AsSpan(tcpStart);
        BinaryPrimitives.WriteUInt32BigEndian(tcp[4..], 100);
        tcp[12] = 0x80; // twelve bytes of options
        tcp[13] = flags;
        tcp.Slice(20, 12).Fill(1);
        payload.CopyTo(tcp[32..]);
        BinaryPrimitives.WriteUInt16BigEndian(tcp[16..], PacketFinisher.Fold(pseudo + 6 + 32 + (ulong)payload.Length));
        return NetworkPacket.Create(frame, new PacketOffload
        {
            NeedsChecksum = true,
            ChecksumStart = (ushort)tcpStart,
            ChecksumOffset = 16,
            Segmentation = ip6 ? PacketSegmentation.Tcp6 : PacketSegmentation.Tcp4,
            SegmentSize = 1400,
        });
    }

    public static bool HasValidChecksums(ReadOnlySpan<byte> frame)
    {
        var vlan = frame[12] == 0x81;
        var ip = frame[(vlan ? 18 : 14)..];
        if (ip[0] >> 4 == 4)
        {
            var length = BinaryPrimitives.ReadUInt16BigEndian(ip[2..]);
            var sum = PacketFinisher.Sum(ip.Slice(12, 8)) + ip[9] + (ulong)length - 20 + PacketFinisher.Sum(ip[20..]);
            return length == ip.Length && PacketFinisher.Fold(PacketFinisher.Sum(ip[..20])) == 0xffff && PacketFinisher.Fold(sum) == 0xffff;
        }
        var payload = BinaryPrimitives.ReadUInt16BigEndian(ip[4..]);
        return payload == ip.Length - 40
            && PacketFinisher.Fold(PacketFinisher.Sum(ip.Slice(8, 32)) + ip[6] + payload + PacketFinisher.Sum(ip[40..])) == 0xffff;
    }

    private static void Ethernet(Span<byte> frame, bool ip6, bool vlan)
    {
        new MacAddress([0x52, 0x54, 0, 0x12, 0x34, 0x56]).CopyTo(frame);
        new MacAddress([2, 0, 0, 0, 0, 1]).CopyTo(frame[6..]);
        if (vlan)
        {
            frame[12] = 0x81;
            frame[15] = 7;
        }
        BinaryPrimitives.WriteUInt16BigEndian(frame[(vlan ? 16 : 12)..], ip6 ? (ushort)0x86dd : (ushort)0x0800);
    }

    private static void Ip4(Span<byte> ip, byte protocol, int payload)
    {
        ip[0] = 0x45;
        BinaryPrimitives.WriteUInt16BigEndian(ip[2..], (ushort)(20 + payload));
        BinaryPrimitives.WriteUInt16BigEndian(ip[4..], 0xffff); // counts over its end
        ip[8] = 64;
        ip[9] = protocol;
        ip[12] = ip[16] = 10;
        ip[15] = 1;
        ip[19] = 2;
        BinaryPrimitives.WriteUInt16BigEndian(ip[10..], (ushort)~PacketFinisher.Fold(PacketFinisher.Sum(ip[..20])));
    }
}
