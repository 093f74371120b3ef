using System.Buffers.Binary;
using System.Net;
using System.Net.Sockets;

namespace KvmSharp.Networking.Nat;

/// <summary>An IPv4 or IPv6 address as a value; IPv4 in the form of RFC 4291, "IPv4-Mapped IPv6 Address".</summary>
internal readonly record struct NetAddress
{
    private static readonly UInt128 Mapped = 0xffff_0000_0000UL;

    private readonly UInt128 _value;

    private NetAddress(UInt128 value) => _value = value;

    public bool IsIp4 => _value >> 32 == 0xffff;

    public int Length => IsIp4 ? 4 : 16;

    public uint Ip4 => (uint)_value;

    public UInt128 Ip6 => _value;

    public bool IsUnspecified => IsIp4 ? Ip4 == 0 : _value == UInt128.Zero;

    public bool IsMulticast => IsIp4 ? Ip4 >> 28 == 0xe : _value >> 120 == 0xff;

    public bool IsLinkLocal => IsIp4 ? Ip4 >> 16 == 0xa9fe : (ushort)(_value >> 118) == 0xfe80 >> 6;

    /// <summary>
    /// Whether packets with this destination may go to an ordinary host: not groups, not everybody, and nothing that a host
    /// takes for itself - its loopback networks, the unspecified address, which Linux connects to itself, and IPv4 in the
    /// clothes of IPv6.
    /// </summary>
    public bool IsOrdinary => IsIp4
        ? Ip4 >> 24 is not 0 and not 127 && Ip4 >> 28 is not 0xe and not 0xf && !IsLinkLocal
        : _value >> 64 != UInt128.Zero && !IsMulticast && !IsLinkLocal;

    public static NetAddress FromIp4(uint value) => new(Mapped | value);

    public static NetAddress FromIp6(UInt128 value) => new(value);

    public static NetAddress Read(ReadOnlySpan<byte> bytes) => bytes.Length == 4
        ? FromIp4(BinaryPrimitives.ReadUInt32BigEndian(bytes))
        : new NetAddress(BinaryPrimitives.ReadUInt128BigEndian(bytes));

    public static NetAddress From(IPAddress address)
    {
        Span<byte> bytes = stackalloc byte[16];
        address.TryWriteBytes(bytes, out var count);
        return Read(bytes[..count]);
    }

    public void CopyTo(Span<byte> target)
    {
        if (IsIp4)
        {
            BinaryPrimitives.WriteUInt32BigEndian(target, Ip4);
        }
        else
        {
            BinaryPrimitives.WriteUInt128BigEndian(target, _value);
        }
    }

    public IPAddress ToIPAddress()
    {
        Span<byte> bytes = stackalloc byte[16];
        CopyTo(bytes);
        return new IPAddress(bytes[..Length]);
    }

    public override string ToString() => ToIPAddress().ToString();
}

/// <summary>The two ends of a flow, the guest's first.</summary>
internal readonly record struct FlowKey(NetAddress Guest, ushort GuestPort, NetAddress Remote, ushort RemotePort);

/// <summary>The addresses of a user-mode network.</summary>
internal sealed class AddressPlan
{
    private const int FirstGuest = 15;
    private readonly uint _mask;
    private readonly uint _base;
    private readonly UInt128 _prefix;

    public AddressPlan(IPNetwork network4, IPNetwork? network6)
    {
        if (network4.BaseAddress.AddressFamily != AddressFamily.InterNetwork || network4.PrefixLength is < 8 or > 27)
        {
            throw new KvmSharpException(KvmSharpErrorCode.InvalidArgument, $"The guest's network is IPv4 with a prefix of 8 to 27 bits, not {network4}.");
        }
        if (network6 is { } six && (six.BaseAddress.AddressFamily != AddressFamily.InterNetworkV6 || six.PrefixLength != 64))
        {
            // RFC 4862: an interface identifier has 64 bits.
            throw new KvmSharpException(KvmSharpErrorCode.InvalidArgument, $"The guest's second network is IPv6 with a prefix of 64 bits, not {six}.");
        }
        PrefixLength4 = network4.PrefixLength;
        _mask = uint.MaxValue << (32 - network4.PrefixLength);
        _base = NetAddress.From(network4.BaseAddress).Ip4;
        if (!NetAddress.FromIp4(_base).IsOrdinary)
        {
            throw new KvmSharpException(KvmSharpErrorCode.InvalidArgument, $"The guest's network cannot be {network4}.");
        }
        Gateway4 = NetAddress.FromIp4(_base + 2);
        Dns4 = NetAddress.FromIp4(_base + 3);
        HasIp6 = network6 is not null;
        _prefix = network6 is { } v6 ? NetAddress.From(v6.BaseAddress).Ip6 : default;
        Gateway6 = NetAddress.FromIp6(_prefix + 2);
        Dns6 = NetAddress.FromIp6(_prefix + 3);
        Router6 = NetAddress.FromIp6(((UInt128)0xfe80 << 112) + 2);
        Span<byte> mac = [0x52, 0x55, 0, 0, 0, 0];
        Gateway4.CopyTo(mac[2..]);
        Mac = new MacAddress(mac);
    }

    /// <summary>The address of everything that is not a guest.</summary>
    public MacAddress Mac { get; }

    public int PrefixLength4 { get; }

    public uint Mask4 => _mask;

    public NetAddress Gateway4 { get; }

    public NetAddress Dns4 { get; }

    public bool HasIp6 { get; }

    public UInt128 Prefix6 => _prefix;

    public NetAddress Gateway6 { get; }

    public NetAddress Dns6 { get; }

    public NetAddress Router6 { get; }

    public NetAddress Broadcast4 => NetAddress.FromIp4(_base | ~_mask);

    public NetAddress FirstGuest4 => NetAddress.FromIp4(_base + FirstGuest);

    /// <summary>How many addresses the DHCP server has.</summary>
    public int GuestCount => (int)Math.Min(~_mask - FirstGuest, 1024);

    public NetAddress Gateway(NetAddress like) => like.IsIp4 ? Gateway4 : Gateway6;

    public bool IsGateway(NetAddress address) => address == Gateway4 || (HasIp6 && (address == Gateway6 || address == Router6));

    public bool IsDns(NetAddress address) => address == Dns4 || (HasIp6 && address == Dns6);

    public bool IsOwn(NetAddress address) => IsGateway(address) || IsDns(address);

    /// <summary>Whether an address is on the guest's side.</summary>
    public bool IsInside(NetAddress address) =>
        address.IsIp4 ? (address.Ip4 & _mask) == _base : HasIp6 && (address.Ip6 >> 64 == _prefix >> 64 || address.IsLinkLocal);

    /// <summary>Whether a guest may have this address.</summary>
    public bool IsGuest(NetAddress address) =>
        IsInside(address) && !IsOwn(address) && (!address.IsIp4 || ((address.Ip4 & ~_mask) != 0 && address != Broadcast4));
}
