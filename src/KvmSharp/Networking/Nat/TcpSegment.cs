using System.Buffers.Binary;

namespace KvmSharp.Networking.Nat;

[Flags]
internal enum TcpFlags : byte
{
    None = 0,
    Fin = 1,
    Syn = 2,
    Reset = 4,
    Push = 8,
    Ack = 16,
}

/// <summary>A TCP segment of a guest. Specification: RFC 9293, "Header Format"; RFC 7323, "Window Scale Option".</summary>
internal readonly ref struct TcpSegment
{
    private const byte OptionEnd = 0;
    private const byte OptionNothing = 1;
    private const byte OptionMss = 2;
    private const byte OptionWindowScale = 3;
    private const byte MaxWindowScale = 14;

    public ushort SourcePort { get; init; }

    public ushort DestinationPort { get; init; }

    public uint Sequence { get; init; }

    public uint Acknowledgment { get; init; }

    public TcpFlags Flags { get; init; }

    public ushort Window { get; init; }

    public ReadOnlySpan<byte> Options { get; init; }

    public ReadOnlySpan<byte> Payload { get; init; }

    public bool Has(TcpFlags flag) => (Flags & flag) != 0;

    /// <summary>The length in sequence numbers.</summary>
    public uint SequenceLength => (uint)Payload.Length + (Has(TcpFlags.Syn) ? 1u : 0) + (Has(TcpFlags.Fin) ? 1u : 0);

    public static bool TryParse(ReadOnlySpan<byte> data, out TcpSegment segment)
    {
        segment = default;
        if (data.Length < IpNumbers.TcpHeaderLength)
        {
            return false;
        }
        var header = (data[12] >> 4) * 4;
        if (header < IpNumbers.TcpHeaderLength || header > data.Length)
        {
            return false;
        }
        segment = new TcpSegment
        {
            SourcePort = BinaryPrimitives.ReadUInt16BigEndian(data),
            DestinationPort = BinaryPrimitives.ReadUInt16BigEndian(data[2..]),
            Sequence = BinaryPrimitives.ReadUInt32BigEndian(data[4..]),
            Acknowledgment = BinaryPrimitives.ReadUInt32BigEndian(data[8..]),
            Flags = (TcpFlags)(data[13] & 0x1f),
            Window = BinaryPrimitives.ReadUInt16BigEndian(data[14..]),
            Options = data[IpNumbers.TcpHeaderLength..header],
            Payload = data[header..],
        };
        return segment.SourcePort != 0 && segment.DestinationPort != 0;
    }

    /// <summary>The options of a SYN; those that are not there or make no sense get their defaults.</summary>
    public (int Mss, int? WindowScale) ReadSynOptions(int defaultMss)
    {
        var mss = defaultMss;
        int? scale = null;
        for (var rest = Options; !rest.IsEmpty && rest[0] != OptionEnd;)
        {
            if (rest[0] == OptionNothing)
            {
                rest = rest[1..];
                continue;
            }
            if (rest.Length < 2 || rest[1] < 2 || rest[1] > rest.Length)
            {
                break;
            }
            if (rest[0] == OptionMss && rest[1] == 4)
            {
                mss = BinaryPrimitives.ReadUInt16BigEndian(rest[2..]);
            }
            else if (rest[0] == OptionWindowScale && rest[1] == 3)
            {
                scale = Math.Min(rest[2], MaxWindowScale);
            }
            rest = rest[rest[1]..];
        }
        return (mss, scale);
    }

    public static int WriteSynOptions(Span<byte> target, int mss, int? scale)
    {
        target[0] = OptionMss;
        target[1] = 4;
        BinaryPrimitives.WriteUInt16BigEndian(target[2..], (ushort)mss);
        if (scale is null)
        {
            return 4;
        }
        target[4] = OptionNothing;
        target[5] = OptionWindowScale;
        target[6] = 3;
        target[7] = (byte)scale;
        return 8;
    }
}
