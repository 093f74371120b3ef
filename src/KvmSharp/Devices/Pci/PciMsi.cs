using static KvmSharp.Devices.Pci.PciRegisters;

namespace KvmSharp.Devices.Pci;

/// <summary>
/// The MSI capability with 64-bit addresses and per-vector masking. Specification: PCI Local Bus 3.0, "MSI Capability
/// Structure". The device calls under its interrupt lock.
/// </summary>
internal sealed class PciMsi
{
    private readonly PciConfigSpace _config;
    private readonly Action<MsiMessage> _send;
    private readonly int _offset;
    private readonly int _vectors;

    public PciMsi(PciConfigSpace config, int vectors, Action<MsiMessage> send)
    {
        if (vectors is < 1 or > MsiMaxVectors || !int.IsPow2(vectors))
        {
            throw new KvmSharpException(KvmSharpErrorCode.InvalidArgument, $"A PCI function has 1, 2, 4, 8, 16 or 32 MSI vectors, not {vectors}.");
        }
        _config = config;
        _send = send;
        _vectors = vectors;
        _offset = config.AddCapability(CapabilityMsi, MsiLength);
        var capable = int.Log2(vectors) << MsiCapableShift;
        config.DefineUInt16(_offset + MsiControl, (ushort)(Msi64Bit | MsiPerVectorMask | capable), MsiEnable | (7 << MsiEnabledShift));
        config.DefineUInt32(_offset + MsiAddress, 0, ~3u);
        config.DefineUInt32(_offset + MsiAddress + 4, 0, ~0u);
        config.DefineUInt16(_offset + MsiData, 0, 0xffff);
        config.DefineUInt32(_offset + MsiMask, 0, (uint)((1UL << vectors) - 1));
    }

    public bool IsEnabled => (_config.GetUInt16(_offset + MsiControl) & MsiEnable) != 0;

    private uint Pending
    {
        get => _config.GetUInt32(_offset + MsiPending);
        set => _config.SetUInt32(_offset + MsiPending, value);
    }

    // A guest may enable fewer vectors than there are; the rest is folded into them.
    private int EnabledVectors => Math.Min(1 << Math.Min((_config.GetUInt16(_offset + MsiControl) >> MsiEnabledShift) & 7, 5), _vectors);

    public void Signal(int vector)
    {
        vector &= EnabledVectors - 1;
        if ((_config.GetUInt32(_offset + MsiMask) >> vector & 1) != 0)
        {
            Pending |= 1u << vector;
            return;
        }
        Pending &= ~(1u << vector);
        var address = _config.GetUInt32(_offset + MsiAddress) | (ulong)_config.GetUInt32(_offset + MsiAddress + 4) << 32;
        // "Message Data": the low bits that number the vectors are the function's.
        var data = (uint)(_config.GetUInt16(_offset + MsiData) & ~(EnabledVectors - 1)) | (uint)vector;
        _send(new MsiMessage(address, data));
    }

    /// <summary>Vectors that were waiting and are not masked any more go out.</summary>
    public void ConfigWritten()
    {
        if (!IsEnabled)
        {
            return;
        }
        var due = Pending & ~_config.GetUInt32(_offset + MsiMask);
        for (var vector = 0; due != 0; vector++, due >>= 1)
        {
            if ((due & 1) != 0)
            {
                Pending &= ~(1u << vector);
                Signal(vector);
            }
        }
    }

    public void Save(StateWriter writer) => writer.WriteUInt32(Pending);

    public void Load(StateReader reader) => Pending = reader.ReadUInt32() & (uint)((1UL << _vectors) - 1);
}
