using System.Globalization;
using System.Net;

namespace KvmSharp.Networking;

/// <summary>The protocols that an <see cref="EgressRule"/> can allow.</summary>
[Flags]
public enum EgressProtocol
{
    /// <summary>None.</summary>
    None = 0,
    /// <summary>TCP.</summary>
    Tcp = 1,
    /// <summary>UDP.</summary>
    Udp = 2,
    /// <summary>Echo requests.</summary>
    Icmp = 4,
    /// <summary>All of these.</summary>
    All = Tcp | Udp | Icmp,
}

/// <summary>One thing that guests may reach: addresses or a name, ports, protocols. All parts have to fit.</summary>
public sealed record EgressRule
{
    /// <summary>The addresses; without these and without a name, all.</summary>
    public IPNetwork? Network { get; init; }

    /// <summary>
    /// A name such as <c>example.com</c>, or <c>*.example.com</c> for all names below one. It stands for the addresses that the
    /// network's own DNS has answered for such a name, as long as those answers are good.
    /// </summary>
    public string? Name { get; init; }

    /// <summary>The lowest port, 0 to 65535. Ports do not count for echo requests.</summary>
    public int FirstPort { get; init; }

    /// <summary>The highest port, <see cref="FirstPort"/> to 65535.</summary>
    public int LastPort { get; init; } = 65535;

    /// <summary>The protocols.</summary>
    public EgressProtocol Protocols { get; init; } = EgressProtocol.All;

    /// <summary>
    /// Reads a rule like <c>192.0.2.0/24</c>, <c>tcp:example.com:443</c>, <c>udp:[2001:db8::1]:5000-5010</c> or <c>*.example.com:80</c>.
    /// A single <c>*</c> is every address.
    /// </summary>
    /// <param name="text">The text.</param>
    /// <exception cref="FormatException">The text is no rule.</exception>
    public static EgressRule Parse(string text)
    {
        ArgumentNullException.ThrowIfNull(text);
        var rest = text;
        var protocols = EgressProtocol.All;
        foreach (var (name, value) in new[] { ("tcp:", EgressProtocol.Tcp), ("udp:", EgressProtocol.Udp), ("icmp:", EgressProtocol.Icmp) })
        {
            if (rest.StartsWith(name, StringComparison.Ordinal))
            {
                (protocols, rest) = (value, rest[name.Length..]);
                break;
            }
        }
        var ports = "";
        if (rest.StartsWith('['))
        {
            var end = rest.IndexOf(']');
            if (end < 0 || (end + 1 < rest.Length && rest[end + 1] is not (':' or '/')))
            {
                throw Invalid(text);
            }
            var colon = rest.IndexOf(':', end);
            ports = colon < 0 ? "" : rest[(colon + 1)..];
            rest = rest[1..end] + (colon < 0 ? rest[(end + 1)..] : rest[(end + 1)..colon]);
            if (colon >= 0 && ports.Length == 0)
            {
                throw Invalid(text);
            }
        }
        else if (rest.Count(c => c == ':') == 1)
        {
            var colon = rest.IndexOf(':');
            (rest, ports) = (rest[..colon], rest[(colon + 1)..]);
            if (ports.Length == 0)
            {
                throw Invalid(text);
            }
        }
        var rule = new EgressRule { Protocols = protocols };
        if (ports.Length != 0)
        {
            var bounds = ports.Split('-');
            if (bounds.Length > 2 || !TryParsePort(bounds[0], out var first) || !TryParsePort(bounds[^1], out var last) || last < first)
            {
                throw Invalid(text);
            }
            rule = rule with { FirstPort = first, LastPort = last };
        }
        if (rest == "*")
        {
            return rule;
        }
        if (IPAddress.TryParse(rest, out var address) && (address.AddressFamily != System.Net.Sockets.AddressFamily.InterNetwork || rest.Count(c => c == '.') == 3))
        {
            return rule with { Network = new IPNetwork(address, address.GetAddressBytes().Length * 8) };
        }
        if (rest.Contains('/'))
        {
            return IPNetwork.TryParse(rest, out var network) ? rule with { Network = network } : throw Invalid(text);
        }
        return IsName(rest) ? rule with { Name = rest } : throw Invalid(text);
    }

    internal void Validate()
    {
        if (FirstPort < 0 || LastPort > 65535 || LastPort < FirstPort)
        {
            throw new KvmSharpException(KvmSharpErrorCode.InvalidArgument, $"Ports {FirstPort} to {LastPort} of an egress rule are not ports.");
        }
        if (Name is not null && (Network is not null || !IsName(Name)))
        {
            throw new KvmSharpException(KvmSharpErrorCode.InvalidArgument, $"'{Name}' is not a name for an egress rule, or it has addresses too.");
        }
    }

    internal bool FitsName(string name) => Name is not null && (Name.StartsWith("*.", StringComparison.Ordinal)
        ? name.EndsWith(Name[1..], StringComparison.OrdinalIgnoreCase)
        : name.Equals(Name.TrimEnd('.'), StringComparison.OrdinalIgnoreCase));

    internal bool Fits(EgressProtocol protocol, int port) =>
        (Protocols & protocol) != 0 && (protocol == EgressProtocol.Icmp || (port >= FirstPort && port <= LastPort));

    private static bool IsName(string text)
    {
        var plain = text.StartsWith("*.", StringComparison.Ordinal) ? text[2..] : text;
        return plain.Length is > 0 and < 254 && plain.Split('.').All(label => label.Length is > 0 and < 64 && label.All(c => char.IsAsciiLetterOrDigit(c) || c is '-' or '_'));
    }

    private static bool TryParsePort(string text, out int port) =>
        int.TryParse(text, NumberStyles.None, CultureInfo.InvariantCulture, out port) && port is >= 0 and <= 65535;

    private static FormatException Invalid(string text) => new($"'{text}' is not a rule such as 192.0.2.0/24, tcp:example.com:443 or *.example.com.");
}
