using System.Net;
using KvmSharp.Devices.Virtio;
using KvmSharp.Networking;

namespace KvmSharp.Cli.CommandLine;

/// <summary>One <c>--net user,key=value...</c>.</summary>
internal sealed record NetworkArgument(UserNetworkOptions Options)
{
    public MacAddress? MacAddress { get; init; }

    public string? CaptureFile { get; init; }

    public VirtioTransport Transport { get; init; }
}

/// <summary>Reads the argument of <c>--net</c>.</summary>
internal static class NetworkParser
{
    private const int DnsPort = 53;
    private static readonly string[] _repeatable = ["hostfwd", "allow", "dns"];

    public static RunOptions Parse(RunOptions options, string text)
    {
        string[] parts = text.Split(',');
        switch (parts[0])
        {
            case "none" when parts.Length == 1:
                return options;
            case "user":
                return options with { Networks = [.. options.Networks, ParseUser(parts.Skip(1))] };
            case "switch":
                throw Usage("--net switch: a switch joins machines of one process; use VirtualSwitch in the library");
            default:
                throw Usage($"--net: '{text}' is neither user[,...] nor none");
        }
    }

    private static NetworkArgument ParseUser(IEnumerable<string> parts)
    {
        var argument = new NetworkArgument(new UserNetworkOptions());
        var servers = new List<IPEndPoint>();
        var seen = new HashSet<string>();
        foreach (string part in parts)
        {
            int equals = part.IndexOf('=');
            (string key, string value) = equals < 0 ? (part, "") : (part[..equals], part[(equals + 1)..]);
            if (value.Length == 0 && (equals >= 0 || key != "restrict"))
            {
                throw Usage($"--net: '{part}' is not of the form key=value");
            }

            if (!_repeatable.Contains(key) && !seen.Add(key))
            {
                throw Usage($"--net: {key} is given twice");
            }

            UserNetworkOptions network = argument.Options;
            argument = key switch
            {
                "hostfwd" => argument with { Options = network with { Forwards = [.. network.Forwards, Read(PortForward.Parse, value)] } },
                "allow" => argument with { Options = network with { Egress = [.. network.Egress ?? [], Read(EgressRule.Parse, value)] } },
                "restrict" => IsOn(key, value.Length == 0 ? "on" : value) ? argument with { Options = network with { Egress = network.Egress ?? [] } } : argument,
                "loopback" => argument with { Options = network with { AllowHostLoopback = IsOn(key, value) } },
                "ipv6" => IsOn(key, value) ? argument : argument with { Options = network with { Network6 = null } },
                "subnet" => argument with { Options = network with { Network4 = Read(IPNetwork.Parse, value) } },
                "dns" => AddServer(argument, servers, value),
                "mac" => argument with { MacAddress = ParseMac(value) },
                "capture" => argument with { CaptureFile = value },
                "transport" => argument with { Transport = DeviceParser.ParseTransport(value) },
                _ => throw Usage($"--net: unknown property '{key}' (there is hostfwd, allow, restrict, dns, loopback, ipv6, subnet, mac, capture, transport)"),
            };
        }

        return servers.Count == 0 ? argument : argument with { Options = argument.Options with { DnsResolver = new DnsServers(servers) } };
    }

    private static NetworkArgument AddServer(NetworkArgument argument, List<IPEndPoint> servers, string text)
    {
        if (!IPEndPoint.TryParse(text, out IPEndPoint? server))
        {
            throw Usage($"--net: '{text}' is not the address of a DNS server");
        }

        servers.Add(server.Port == 0 ? new IPEndPoint(server.Address, DnsPort) : server);
        return argument;
    }

    private static bool IsOn(string key, string value) => value switch
    {
        "on" => true,
        "off" => false,
        _ => throw Usage($"--net: {key} is on or off, not '{value}'"),
    };

    private static MacAddress ParseMac(string text) =>
        MacAddress.TryParse(text, out MacAddress address) && !address.IsMulticast ? address : throw Usage($"--net: mac '{text}' is not the address of a card");

    private static T Read<T>(Func<string, T> parse, string text)
    {
        try
        {
            return parse(text);
        }
        catch (FormatException exception)
        {
            throw Usage($"--net: {exception.Message}");
        }
    }

    private static CliException Usage(string message) => new(message, ExitStatus.Usage);
}
