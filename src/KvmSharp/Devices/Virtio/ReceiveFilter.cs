using System.Buffers.Binary;
using KvmSharp.Networking;

namespace KvmSharp.Devices.Virtio;

/// <summary>Which packets a network card takes. Specification: VIRTIO 1.2, "Packet Receive Filtering" and "Setting MAC Address Filtering".</summary>
internal sealed class ReceiveFilter
{
    // A guest that names more gets all of that kind.
    private const int TableMax = 256;

    private const int ModePromiscuous = 0;
    private const int ModeAllMulticast = 1;
    private const int ModeAllUnicast = 2;
    private const int ModeNoMulticast = 3;
    private const int ModeNoUnicast = 4;
    private const int ModeNoBroadcast = 5;
    private const int ModeCount = 6;

    private readonly bool[] _modes = new bool[ModeCount];
    private readonly HashSet<MacAddress> _table = [];
    private MacAddress _address;
    private bool _unicastOverflow;
    private bool _multicastOverflow;

    public void Reset(MacAddress address)
    {
        Array.Clear(_modes);
        _modes[ModePromiscuous] = true; // until the driver says otherwise
        _table.Clear();
        _unicastOverflow = _multicastOverflow = false;
        _address = address;
    }

    public bool Accepts(MacAddress destination)
    {
        if (_modes[ModePromiscuous])
        {
            return true;
        }
        if (destination == MacAddress.Broadcast)
        {
            return !_modes[ModeNoBroadcast];
        }
        if (destination.IsMulticast)
        {
            return !_modes[ModeNoMulticast] && (_modes[ModeAllMulticast] || _multicastOverflow || _table.Contains(destination));
        }
        return !_modes[ModeNoUnicast] && (_modes[ModeAllUnicast] || _unicastOverflow || destination == _address || _table.Contains(destination));
    }

    public bool SetMode(int mode, bool on)
    {
        if ((uint)mode >= ModeCount)
        {
            return false;
        }
        _modes[mode] = on;
        return true;
    }

    public bool SetAddress(MacAddress address)
    {
        if (address.IsMulticast)
        {
            return false;
        }
        _address = address;
        return true;
    }

    /// <summary>Two tables, each a number of entries and the entries: unicast, then multicast.</summary>
    public bool SetTable(ReadOnlySpan<byte> data)
    {
        var table = new HashSet<MacAddress>();
        Span<bool> overflow = [false, false];
        for (var kind = 0; kind < 2; kind++)
        {
            if (data.Length < 4)
            {
                return false;
            }
            var count = BinaryPrimitives.ReadUInt32LittleEndian(data);
            data = data[4..];
            if (count > TableMax)
            {
                // The rest is longer than what is looked at; that it is too long is all that matters.
                overflow[kind] = true;
                if (kind == 0)
                {
                    overflow[1] = true;
                }
                break;
            }
            if ((ulong)data.Length < count * MacAddress.Length)
            {
                return false;
            }
            for (var i = 0; i < (int)count; i++)
            {
                table.Add(new MacAddress(data.Slice(i * MacAddress.Length, MacAddress.Length)));
            }
            data = data[((int)count * MacAddress.Length)..];
        }
        _table.Clear();
        _table.UnionWith(table);
        (_unicastOverflow, _multicastOverflow) = (overflow[0], overflow[1]);
        return true;
    }

    public void Save(StateWriter writer)
    {
        Span<byte> bytes = stackalloc byte[MacAddress.Length];
        foreach (var mode in _modes)
        {
            writer.WriteBoolean(mode);
        }
        writer.WriteBoolean(_unicastOverflow);
        writer.WriteBoolean(_multicastOverflow);
        _address.CopyTo(bytes);
        writer.WriteBytes(bytes);
        writer.WriteUInt16((ushort)_table.Count);
        foreach (var address in _table.OrderBy(a => a.ToString(), StringComparer.Ordinal))
        {
            address.CopyTo(bytes);
            writer.WriteBytes(bytes);
        }
    }

    public void Load(StateReader reader)
    {
        for (var i = 0; i < ModeCount; i++)
        {
            _modes[i] = reader.ReadBoolean();
        }
        _unicastOverflow = reader.ReadBoolean();
        _multicastOverflow = reader.ReadBoolean();
        _address = new MacAddress(reader.ReadBytes(MacAddress.Length));
        _table.Clear();
        for (var count = reader.ReadUInt16(); count > 0; count--)
        {
            _table.Add(new MacAddress(reader.ReadBytes(MacAddress.Length)));
        }
    }
}
