using System.Buffers.Binary;
using System.Net;
using System.Net.Sockets;
using System.Security.Cryptography;

namespace KvmSharp.Networking;

/// <summary>Answers the DNS queries of guests.</summary>
public interface IDnsResolver
{
    /// <summary>Answers one query. Called from several threads at once.</summary>
    /// <param name="query">The whole message, with one well-formed question.</param>
    /// <param name="overStream">Whether the guest asks over TCP, so that the answer may be long.</param>
    /// <param name="cancellationToken">Ends the attempt: the network is gone.</param>
    /// <returns>The answer, or <see langword="null"/> when there is none; the guest is told then.</returns>
    ValueTask<byte[]?> ResolveAsync(ReadOnlyMemory<byte> query, bool overStream, CancellationToken cancellationToken);
}

/// <summary>Passes queries on to DNS servers: the first one that answers counts. Specification: RFC 1035, RFC 5452.</summary>
public sealed class DnsServers : IDnsResolver
{
    private const string Configuration = "/etc/resolv.conf";
    private const int Port = 53;
    private const int MaxServers = 3;
    private const int Rounds = 2;
    private static readonly TimeSpan Patience = TimeSpan.FromSeconds(2);

    private readonly IReadOnlyList<IPEndPoint>? _servers;

    /// <summary>Passes queries on to the servers of the host's configuration, as it is at the time of each query.</summary>
    public DnsServers()
    {
    }

    /// <summary>Passes queries on to these servers.</summary>
    /// <param name="servers">The servers in the order in which they are asked.</param>
    public DnsServers(params IEnumerable<IPEndPoint> servers)
    {
        ArgumentNullException.ThrowIfNull(servers);
        _servers = [.. servers];
    }

    /// <inheritdoc/>
    public async ValueTask<byte[]?> ResolveAsync(ReadOnlyMemory<byte> query, bool overStream, CancellationToken cancellationToken)
    {
        var servers = _servers ?? ReadConfiguration();
        for (var round = 0; round < Rounds; round++)
        {
            foreach (var server in servers)
            {
                using var patience = CancellationTokenSource.CreateLinkedTokenSource(cancellationToken);
                patience.CancelAfter(Patience);
                try
                {
                    return overStream
                        ? await AskStreamAsync(server, query, patience.Token).ConfigureAwait(false)
                        : await AskAsync(server, query, patience.Token).ConfigureAwait(false);
                }
                catch (Exception e) when (e is SocketException or IOException or OperationCanceledException && !cancellationToken.IsCancellationRequested)
                {
                    // This one does not answer; the next may.
                }
            }
        }
        return null;
    }

    /// <summary>resolv.conf(5): lines "nameserver ADDRESS".</summary>
    internal static IReadOnlyList<IPEndPoint> ParseConfiguration(IEnumerable<string> lines)
    {
        var servers = new List<IPEndPoint>();
        foreach (var line in lines)
        {
            if (line.Split([' ', '\t'], StringSplitOptions.RemoveEmptyEntries) is ["nameserver", var text, ..] && servers.Count < MaxServers
                && IPAddress.TryParse(text, out var address))
            {
                servers.Add(new IPEndPoint(address, Port));
            }
        }
        return servers.Count != 0 ? servers : [new IPEndPoint(IPAddress.Loopback, Port)];
    }

    private static IReadOnlyList<IPEndPoint> ReadConfiguration()
    {
        try
        {
            return ParseConfiguration(File.ReadLines(Configuration));
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException)
        {
            return ParseConfiguration([]); // as resolv.conf(5) says of a missing file
        }
    }

    // RFC 5452: another source port and another identifier for each query, and only the answer to it counts.
    private static async Task<byte[]> AskAsync(IPEndPoint server, ReadOnlyMemory<byte> query, CancellationToken cancellationToken)
    {
        using var socket = new Socket(server.AddressFamily, SocketType.Dgram, ProtocolType.Udp);
        await socket.ConnectAsync(server, cancellationToken).ConfigureAwait(false);
        var message = query.ToArray();
        var id = (ushort)RandomNumberGenerator.GetInt32(65536);
        BinaryPrimitives.WriteUInt16BigEndian(message, id);
        await socket.SendAsync(message, cancellationToken).ConfigureAwait(false);
        var buffer = new byte[65536];
        while (true)
        {
            var count = await socket.ReceiveAsync(buffer, cancellationToken).ConfigureAwait(false);
            if (DnsMessage.IsAnswerTo(buffer.AsSpan(0, count), message, id))
            {
                query.Span[..2].CopyTo(buffer);
                return buffer[..count];
            }
        }
    }

    private static async Task<byte[]> AskStreamAsync(IPEndPoint server, ReadOnlyMemory<byte> query, CancellationToken cancellationToken)
    {
        using var socket = new Socket(server.AddressFamily, SocketType.Stream, ProtocolType.Tcp);
        await socket.ConnectAsync(server, cancellationToken).ConfigureAwait(false);
        using var stream = new NetworkStream(socket);
        var message = new byte[2 + query.Length];
        BinaryPrimitives.WriteUInt16BigEndian(message, (ushort)query.Length);
        query.CopyTo(message.AsMemory(2));
        await stream.WriteAsync(message, cancellationToken).ConfigureAwait(false);
        var length = new byte[2];
        await stream.ReadExactlyAsync(length, cancellationToken).ConfigureAwait(false);
        var answer = new byte[BinaryPrimitives.ReadUInt16BigEndian(length)];
        await stream.ReadExactlyAsync(answer, cancellationToken).ConfigureAwait(false);
        return DnsMessage.IsAnswerTo(answer, query.Span, BinaryPrimitives.ReadUInt16BigEndian(query.Span))
            ? answer : throw new IOException("The DNS server answers another question.");
    }
}
