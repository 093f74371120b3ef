using System.Buffers.Binary;
using System.Globalization;
using System.Net;
using System.Net.Sockets;
using System.Text;

namespace KvmSharp.Networking;

/// <summary>What a DNS query asks for.</summary>
/// <param name="Name">The name in lower case, without a dot at the end.</param>
/// <param name="Type">The type of the records, for example 1 for IPv4 addresses and 28 for IPv6 addresses.</param>
public readonly record struct DnsQuestion(string Name, ushort Type);

/// <summary>The parts of DNS messages that a resolver needs. Specification: RFC 1035, RFC 3596, RFC 6891.</summary>
public static class DnsMessage
{
    /// <summary>The type of records with an IPv4 address.</summary>
    public const ushort TypeA = 1;

    /// <summary>The type of records with an IPv6 address.</summary>
    public const ushort TypeAaaa = 28;

    /// <summary>The response code for "no such name".</summary>
    public const int NameError = 3;

    /// <summary>The response code for "the server could not find out".</summary>
    public const int ServerFailure = 2;

    /// <summary>The response code for "the server does not want to".</summary>
    public const int Refused = 5;

    private const ushort TypeOptions = 41;
    private const ushort ClassInternet = 1;
    private const int HeaderLength = 12;
    private const int MaxNameLength = 255;
    private const int MaxRecords = 256;
    private const int ResponseFlag = 0x8000;
    private const int OperationMask = 0x7800;
    private const int TruncatedFlag = 0x0200;
    private const int RecursionDesired = 0x0100;
    private const int RecursionAvailable = 0x0080;

    /// <summary>Reads a query's question.</summary>
    /// <param name="message">The message.</param>
    /// <param name="question">The question.</param>
    /// <returns>Whether the message is a query with one well-formed question of the Internet class.</returns>
    public static bool TryReadQuestion(ReadOnlySpan<byte> message, out DnsQuestion question) =>
        TryReadQuestion(message, 0, out question, out _);

    /// <summary>Makes an answer to a query: addresses of the kind that it asks for, or none.</summary>
    /// <param name="query">The query.</param>
    /// <param name="addresses">Addresses of both kinds.</param>
    /// <param name="seconds">How long the answer may be kept, in seconds.</param>
    /// <exception cref="ArgumentException">The query is none.</exception>
    public static byte[] CreateAnswer(ReadOnlySpan<byte> query, IEnumerable<IPAddress> addresses, uint seconds = 60)
    {
        ArgumentNullException.ThrowIfNull(addresses);
        if (!TryReadQuestion(query, 0, out var question, out var end))
        {
            throw new ArgumentException("The message is not a DNS query with one question.", nameof(query));
        }
        var family = question.Type switch
        {
            TypeA => AddressFamily.InterNetwork,
            TypeAaaa => AddressFamily.InterNetworkV6,
            _ => AddressFamily.Unspecified,
        };
        var answer = new List<byte>(Header(query, end, 0));
        var count = 0;
        Span<byte> record = stackalloc byte[12];
        foreach (var address in addresses.Where(a => a.AddressFamily == family).Take(MaxRecords))
        {
            var bytes = address.GetAddressBytes();
            BinaryPrimitives.WriteUInt16BigEndian(record, 0xc000 | HeaderLength); // the name of the question
            BinaryPrimitives.WriteUInt16BigEndian(record[2..], question.Type);
            BinaryPrimitives.WriteUInt16BigEndian(record[4..], ClassInternet);
            BinaryPrimitives.WriteUInt32BigEndian(record[6..], seconds);
            BinaryPrimitives.WriteUInt16BigEndian(record[10..], (ushort)bytes.Length);
            answer.AddRange(record);
            answer.AddRange(bytes);
            count++;
        }
        var result = answer.ToArray();
        BinaryPrimitives.WriteUInt16BigEndian(result.AsSpan(6), (ushort)count);
        return result;
    }

    /// <summary>Makes an answer that only tells a failure.</summary>
    /// <param name="query">The query.</param>
    /// <param name="code">The response code, 1 to 15.</param>
    /// <exception cref="ArgumentException">The message has no header.</exception>
    public static byte[] CreateFailure(ReadOnlySpan<byte> query, int code)
    {
        ArgumentOutOfRangeException.ThrowIfLessThan(code, 1);
        ArgumentOutOfRangeException.ThrowIfGreaterThan(code, 15);
        if (query.Length < HeaderLength)
        {
            throw new ArgumentException("The message has no DNS header.", nameof(query));
        }
        return Header(query, TryReadQuestion(query, 0, out _, out var end) ? end : HeaderLength, code);
    }

    /// <summary>Whether an answer belongs to a query: its identifier and its question are the same.</summary>
    internal static bool IsAnswerTo(ReadOnlySpan<byte> answer, ReadOnlySpan<byte> query, ushort id) =>
        answer.Length >= HeaderLength && BinaryPrimitives.ReadUInt16BigEndian(answer) == id
        && (BinaryPrimitives.ReadUInt16BigEndian(answer[2..]) & ResponseFlag) != 0
        && TryReadQuestion(query, 0, out var asked, out _)
        && (BinaryPrimitives.ReadUInt16BigEndian(answer[4..]) == 0
            || (TryReadQuestion(answer, ResponseFlag, out var answered, out _) && asked == answered));

    /// <summary>The addresses in an answer, with the seconds that they are good for.</summary>
    internal static List<(IPAddress Address, uint Seconds)> ReadAddresses(ReadOnlySpan<byte> answer)
    {
        var result = new List<(IPAddress, uint)>();
        if (!TryReadQuestion(answer, ResponseFlag, out _, out var at))
        {
            return result;
        }
        int count = BinaryPrimitives.ReadUInt16BigEndian(answer[6..]);
        for (var i = 0; i < Math.Min(count, MaxRecords); i++)
        {
            if (!TrySkipName(answer, ref at) || answer.Length < at + 10)
            {
                break;
            }
            var record = answer[at..];
            var type = BinaryPrimitives.ReadUInt16BigEndian(record);
            int length = BinaryPrimitives.ReadUInt16BigEndian(record[8..]);
            if (record.Length < 10 + length)
            {
                break;
            }
            if (BinaryPrimitives.ReadUInt16BigEndian(record[2..]) == ClassInternet && (type, length) is (TypeA, 4) or (TypeAaaa, 16))
            {
                result.Add((new IPAddress(record.Slice(10, length)), BinaryPrimitives.ReadUInt32BigEndian(record[4..])));
            }
            at += 10 + length;
        }
        return result;
    }

    /// <summary>How long an answer over UDP may be (RFC 6891, "Requestor's Payload Size").</summary>
    internal static int MaxAnswerLength(ReadOnlySpan<byte> query)
    {
        const int Classic = 512;
        if (!TryReadQuestion(query, 0, out _, out var at))
        {
            return Classic;
        }
        // A plain query has nothing behind its question but the options.
        var others = BinaryPrimitives.ReadUInt16BigEndian(query[6..]) + BinaryPrimitives.ReadUInt16BigEndian(query[8..]);
        return others == 0 && BinaryPrimitives.ReadUInt16BigEndian(query[10..]) != 0 && query.Length >= at + 11 && query[at] == 0
            && BinaryPrimitives.ReadUInt16BigEndian(query[(at + 1)..]) == TypeOptions
            ? Math.Clamp((int)BinaryPrimitives.ReadUInt16BigEndian(query[(at + 3)..]), Classic, 4096)
            : Classic;
    }

    /// <summary>An answer without its records that says that there are more than fit.</summary>
    internal static byte[] Truncate(ReadOnlySpan<byte> answer)
    {
        var end = TryReadQuestion(answer, ResponseFlag, out _, out var at) ? at : HeaderLength;
        var result = answer[..end].ToArray();
        result[2] |= TruncatedFlag >> 8;
        result.AsSpan(6, 6).Clear();
        if (end == HeaderLength)
        {
            result.AsSpan(4, 2).Clear();
        }
        return result;
    }

    private static byte[] Header(ReadOnlySpan<byte> query, int end, int code)
    {
        var header = query[..end].ToArray();
        int flags = BinaryPrimitives.ReadUInt16BigEndian(query[2..]);
        BinaryPrimitives.WriteUInt16BigEndian(header.AsSpan(2),
            (ushort)(ResponseFlag | (flags & (OperationMask | RecursionDesired)) | RecursionAvailable | code));
        header.AsSpan(4, 8).Clear();
        header[5] = end > HeaderLength ? (byte)1 : (byte)0;
        return header;
    }

    private static bool TryReadQuestion(ReadOnlySpan<byte> message, int kind, out DnsQuestion question, out int end)
    {
        question = default;
        end = 0;
        if (message.Length < HeaderLength || (BinaryPrimitives.ReadUInt16BigEndian(message[2..]) & ResponseFlag) != kind
            || (kind == 0 && (BinaryPrimitives.ReadUInt16BigEndian(message[2..]) & OperationMask) != 0)
            || BinaryPrimitives.ReadUInt16BigEndian(message[4..]) != 1)
        {
            return false;
        }
        var name = new StringBuilder();
        var at = HeaderLength;
        while (true)
        {
            if (at >= message.Length || message[at] > 63 || at + 1 + message[at] > message.Length || at - HeaderLength > MaxNameLength)
            {
                return false; // a question has nothing before it that its name could point to
            }
            int length = message[at++];
            if (length == 0)
            {
                break;
            }
            if (name.Length != 0)
            {
                name.Append('.');
            }
            foreach (var c in message.Slice(at, length))
            {
                // RFC 4343: what is not plain is written as \DDD, and no such name equals a plain one.
                _ = c is > 0x20 and < 0x7f and not (byte)'.' and not (byte)'\\'
                    ? name.Append(char.ToLowerInvariant((char)c))
                    : name.Append(CultureInfo.InvariantCulture, $"\\{c:d3}");
            }
            at += length;
        }
        if (message.Length < at + 4 || BinaryPrimitives.ReadUInt16BigEndian(message[(at + 2)..]) != ClassInternet)
        {
            return false;
        }
        question = new DnsQuestion(name.ToString(), BinaryPrimitives.ReadUInt16BigEndian(message[at..]));
        end = at + 4;
        return true;
    }

    private static bool TrySkipName(ReadOnlySpan<byte> message, ref int at)
    {
        while (at < message.Length)
        {
            int length = message[at++];
            switch (length >> 6)
            {
                case 3: // RFC 1035, "Message compression": a pointer ends a name
                    at++;
                    return at <= message.Length;
                case 0 when length == 0:
                    return true;
                case 0:
                    at += length;
                    break;
                default:
                    return false;
            }
        }
        return false;
    }
}
