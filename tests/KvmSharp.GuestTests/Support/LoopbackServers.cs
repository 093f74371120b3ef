using System.Net;
using System.Net.Sockets;
using System.Security.Cryptography;
using System.Text;

namespace KvmSharp.GuestTests.Support;

/// <summary>An HTTP server on the host's loopback that answers every GET with the same bytes.</summary>
internal sealed class LoopbackHttpServer : IDisposable
{
    private readonly Socket _listener;
    private readonly byte[] _content;

    public LoopbackHttpServer(byte[] content, IPAddress? address = null)
    {
        _content = content;
        _listener = new Socket((address ?? IPAddress.Loopback).AddressFamily, SocketType.Stream, ProtocolType.Tcp);
        _listener.Bind(new IPEndPoint(address ?? IPAddress.Loopback, 0));
        _listener.Listen(16);
        _ = ServeAsync();
    }

    public int Port => ((IPEndPoint)_listener.LocalEndPoint!).Port;

    public string Checksum => $"{Convert.ToHexStringLower(SHA256.HashData(_content))}  -\n";

    public void Dispose() => _listener.Dispose();

    private async Task ServeAsync()
    {
        while (true)
        {
            try
            {
                Socket socket = await _listener.AcceptAsync();
                _ = AnswerAsync(socket);
            }
            catch (Exception exception) when (exception is SocketException or ObjectDisposedException)
            {
                return; // the test is over
            }
        }
    }

    private async Task AnswerAsync(Socket socket)
    {
        using (socket)
        {
            try
            {
                var request = new byte[4096];
                int length = 0;
                while (request.AsSpan(0, length).IndexOf("\r\n\r\n"u8) < 0)
                {
                    int count = await socket.ReceiveAsync(request.AsMemory(length));
                    if (count == 0)
                    {
                        return;
                    }

                    length += count;
                }

                await SendAllAsync(socket, Encoding.ASCII.GetBytes($"HTTP/1.0 200 OK\r\nContent-Length: {_content.Length}\r\n\r\n"));
                await SendAllAsync(socket, _content);
                socket.Shutdown(SocketShutdown.Send);
                await socket.ReceiveAsync(request);
            }
            catch (SocketException)
            {
                return; // the guest has gone away
            }
        }
    }

    private static async Task SendAllAsync(Socket socket, ReadOnlyMemory<byte> bytes)
    {
        while (!bytes.IsEmpty)
        {
            bytes = bytes[await socket.SendAsync(bytes)..];
        }
    }
}
