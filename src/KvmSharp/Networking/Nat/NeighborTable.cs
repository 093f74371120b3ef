using System.Buffers.Binary;

namespace KvmSharp.Networking.Nat;

/// <summary>
/// Which guest has which address, learned from what guests send. Specification: RFC 826 (ARP), RFC 4861 (neighbor discovery).
/// Used under the network's lock.
/// </summary>
internal sealed class NeighborTable(NatStack stack)
{
    private const int Maximum = 256;
    private const int ArpLength = 28;
    private const ushort ArpRequest = 1;
    private const ushort ArpReply = 2;

    private readonly Dictionary<NetAddress, MacAddress> _entries = [];
    private readonly Queue<NetAddress> _order = new();

    public int Count => _entries.Count;

    public bool TryGet(NetAddress address, out MacAddress mac) => _entries.TryGetValue(address, out mac);

    public void Clear()
    {
        _entries.Clear();
        _order.Clear();
    }

    public void Learn(NetAddress address, MacAddress mac)
    {
        if (mac.IsMulticast || !stack.Plan.IsGuest(address) || (_entries.TryGetValue(address, out var known) && known == mac))
        {
            return;
        }
        if (!_entries.ContainsKey(address))
        {
            if (_entries.Count == Maximum)
            {
                _entries.Remove(_order.Dequeue());
            }
            _order.Enqueue(address);
        }
        _entries[address] = mac;
        stack.Tcp.OnNeighbor(address);
    }

    /// <summary>Asks all guests who has an address.</summary>
    public void Ask(NetAddress address)
    {
        if (!address.IsIp4)
        {
            stack.Icmp.SendSolicitation(address);
            return;
        }
        SendArp(MacAddress.Broadcast, ArpRequest, stack.Plan.Gateway4, default, address);
    }

    /// <summary>RFC 826, "Packet Reception".</summary>
    public void InputArp(ReadOnlySpan<byte> arp)
    {
        if (arp.Length < ArpLength || BinaryPrimitives.ReadUInt64BigEndian(arp) >> 16 != 0x0001_0800_0604)
        {
            stack.CountDrop();
            return;
        }
        var operation = BinaryPrimitives.ReadUInt16BigEndian(arp[6..]);
        var mac = new MacAddress(arp.Slice(8, MacAddress.Length));
        var sender = NetAddress.Read(arp.Slice(14, 4));
        var target = NetAddress.Read(arp.Slice(24, 4));
        Learn(sender, mac);
        if (operation == ArpRequest && stack.Plan.IsOwn(target) && !mac.IsMulticast)
        {
            SendArp(mac, ArpReply, target, mac, sender);
        }
    }

    private void SendArp(MacAddress to, ushort operation, NetAddress sender, MacAddress targetMac, NetAddress target)
    {
        var packet = NetworkPacket.Create(NetworkPacket.HeaderLength + ArpLength);
        var data = packet.Data;
        stack.Builder.WriteEthernet(data, to, IpNumbers.EtherTypeArp);
        var arp = data[NetworkPacket.HeaderLength..];
        BinaryPrimitives.WriteUInt64BigEndian(arp, 0x0001_0800_0604_0000UL | operation);
        stack.Plan.Mac.CopyTo(arp[8..]);
        sender.CopyTo(arp[14..]);
        targetMac.CopyTo(arp[18..]);
        target.CopyTo(arp[24..]);
        stack.Send(packet);
    }
}
