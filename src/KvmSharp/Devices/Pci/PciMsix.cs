using System.Buffers.Binary;
using static KvmSharp.Devices.Pci.PciRegisters;

namespace KvmSharp.Devices.Pci;

/// <summary>
/// The MSI-X capability with its table and pending bits, which share a BAR of their own. Specification: PCI Local Bus 3.0,
/// "MSI-X Capability and Table Structures".
/// </summary>
internal sealed class PciMsix : IIoDevice
{
    private readonly PciConfigSpace _config;
    private readonly Lock _lock;
    private readonly Action<MsiMessage> _send;
    private readonly int _offset;
    private readonly int _vectors;
    private readonly int _pbaOffset;
    private readonly byte[] _table;
    private readonly byte[] _pending; // whole quadwords

    public PciMsix(PciConfigSpace config, int bar, int vectors, Lock interruptLock, Action<MsiMessage> send)
    {
        if (vectors is < 1 or > MsixMaxVectors)
        {
            throw new KvmSharpException(KvmSharpErrorCode.InvalidArgument, $"A PCI function has 1 to 2048 MSI-X vectors, not {vectors}.");
        }
        _config = config;
        _lock = interruptLock;
        _send = send;
        _vectors = vectors;
        _table = new byte[vectors * MsixEntrySize];
        _pending = new byte[(vectors + 63) / 64 * 8];
        var half = Math.Max((int)System.Numerics.BitOperations.RoundUpToPowerOf2((uint)_table.Length), GuestMemory.PageSize / 2);
        _pbaOffset = half;
        BarSize = 2UL * (uint)half;
        MaskAll();
        _offset = config.AddCapability(CapabilityMsix, MsixLength);
        config.DefineUInt16(_offset + MsixControl, (ushort)(vectors - 1), MsixEnable | MsixFunctionMask);
        config.DefineUInt32(_offset + MsixTable, (uint)bar);
        config.DefineUInt32(_offset + MsixPba, (uint)(_pbaOffset | bar));
    }

    public ulong BarSize { get; }

    public bool IsEnabled => (_config.GetUInt16(_offset + MsixControl) & MsixEnable) != 0;

    private bool IsFunctionMasked => (_config.GetUInt16(_offset + MsixControl) & MsixFunctionMask) != 0;

    public void Read(ulong offset, Span<byte> data)
    {
        lock (_lock)
        {
            for (var i = 0; i < data.Length; i++)
            {
                var at = (int)offset + i;
                data[i] = at < _table.Length ? _table[at]
                    : at >= _pbaOffset && at < _pbaOffset + _pending.Length ? _pending[at - _pbaOffset]
                    : (byte)0;
            }
        }
    }

    public void Write(ulong offset, ReadOnlySpan<byte> data)
    {
        lock (_lock)
        {
            if (offset + (ulong)data.Length > (ulong)_table.Length)
            {
                return; // the pending bits are read-only
            }
            data.CopyTo(_table.AsSpan((int)offset));
            Deliver((int)offset / MsixEntrySize);
        }
    }

    /// <summary>Sends a vector's message, or notes that it is due. Under the interrupt lock.</summary>
    public void Signal(int vector)
    {
        if ((uint)vector >= (uint)_vectors)
        {
            return;
        }
        if (IsFunctionMasked || IsMasked(vector))
        {
            _pending[vector >> 3] |= (byte)(1 << (vector & 7));
            return;
        }
        var entry = _table.AsSpan(vector * MsixEntrySize, MsixEntrySize);
        _send(new MsiMessage(BinaryPrimitives.ReadUInt64LittleEndian(entry) & ~3UL, BinaryPrimitives.ReadUInt32LittleEndian(entry[MsixEntryData..])));
    }

    /// <summary>Vectors that were waiting and are not masked any more go out. Under the interrupt lock.</summary>
    public void ConfigWritten()
    {
        for (var vector = 0; vector < _vectors; vector++)
        {
            if (_pending[vector >> 3] == 0)
            {
                vector |= 7;
                continue;
            }
            Deliver(vector);
        }
    }

    public void Save(StateWriter writer)
    {
        writer.WriteBytes(_table);
        writer.WriteBytes(_pending);
    }

    public void Load(StateReader reader)
    {
        reader.ReadBytes(_table.Length).CopyTo(_table);
        reader.ReadBytes(_pending.Length).CopyTo(_pending);
    }

    private bool IsMasked(int vector) => (_table[vector * MsixEntrySize + MsixEntryControl] & MsixEntryMasked) != 0;

    private void Deliver(int vector)
    {
        var bit = (byte)(1 << (vector & 7));
        if ((_pending[vector >> 3] & bit) != 0 && IsEnabled && !IsFunctionMasked && !IsMasked(vector))
        {
            _pending[vector >> 3] &= (byte)~bit;
            Signal(vector);
        }
    }

    private void MaskAll()
    {
        for (var vector = 0; vector < _vectors; vector++)
        {
            _table[vector * MsixEntrySize + MsixEntryControl] = (byte)MsixEntryMasked;
        }
    }
}
