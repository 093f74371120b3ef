using System.Globalization;
using System.Net;
using System.Net.Sockets;

namespace KvmSharp.Networking;

/// <summary>The protocols that a <see cref="PortForward"/> can carry.</summary>
public enum ForwardProtocol
{
    /// <summary>TCP.</summary>
    Tcp = 0,
    /// <summary>UDP.</summary>
    Udp = 1,
}

/// <summary>A port of the host that leads to one of a guest.</summary>
/// <param name="HostPort">The host's port; 0 takes a free one.</param>
/// <param name="GuestPort">The guest's port, 1 to 65535.</param>
public sealed record PortForward(int HostPort, int GuestPort)
{
    /// <summary>The protocol.</summary>
    public ForwardProtocol Protocol { get; init; }

    /// <summary>The host's address; other hosts reach the guest only if this is not the loopback address.</summary>
    public IPAddress HostAddress { get; init; } = IPAddress.Loopback;

    /// <summary>The guest's address, or <see langword="null"/> for the first one that the DHCP server gives away.</summary>
    public IPAddress? GuestAddress { get; init; }

    /// <summary>Reads a forward like <c>tcp::2222-:22</c>: protocol, host address and port, guest address and port.</summary>
    /// <param name="text">The text.</param>
    /// <exception cref="FormatException">The text is no forward.</exception>
    public static PortForward Parse(string text)
    {
        ArgumentNullException.ThrowIfNull(text);
        var invalid = new FormatException($"'{text}' is not a forward such as tcp::2222-:22 or udp:127.0.0.1:5353-10.0.2.15:53.");
        var colon = text.IndexOf(':');
        var dash = text.IndexOf('-');
        if (colon < 0 || dash < colon)
        {
            throw invalid;
        }
        ForwardProtocol? protocol = text[..colon] switch
        {
            "tcp" or "" => ForwardProtocol.Tcp,
            "udp" => ForwardProtocol.Udp,
            _ => null,
        };
        if (protocol is null || !TryParseEnd(text[(colon + 1)..dash], out var host, out var hostPort)
            || !TryParseEnd(text[(dash + 1)..], out var guest, out var guestPort) || guestPort == 0)
        {
            throw invalid;
        }
        return new PortForward(hostPort, guestPort) { Protocol = protocol.Value, HostAddress = host ?? IPAddress.Loopback, GuestAddress = guest };
    }

    /// <summary>The form that <see cref="Parse"/> reads.</summary>
    public override string ToString()
    {
        static string End(IPAddress? address, int port) => string.Create(CultureInfo.InvariantCulture,
            $"{(address?.AddressFamily == AddressFamily.InterNetworkV6 ? $"[{address}]" : address?.ToString())}:{port}");
        return $"{(Protocol == ForwardProtocol.Tcp ? "tcp" : "udp")}:{End(HostAddress, HostPort)}-{End(GuestAddress, GuestPort)}";
    }

    private static bool TryParseEnd(string text, out IPAddress? address, out int port)
    {
        address = null;
        port = 0;
        var colon = text.LastIndexOf(':');
        if (colon < 0 || !int.TryParse(text.AsSpan(colon + 1), NumberStyles.None, CultureInfo.InvariantCulture, out port) || port > 65535)
        {
            return false;
        }
        var name = text[..colon];
        if (name.StartsWith('[') && name.EndsWith(']'))
        {
            name = name[1..^1];
        }
        return name.Length == 0 || IPAddress.TryParse(name, out address);
    }
}
