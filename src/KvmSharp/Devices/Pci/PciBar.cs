using static KvmSharp.Devices.Pci.PciRegisters;

namespace KvmSharp.Devices.Pci;

/// <summary>One range of ports or addresses of a PCI function and the base address register that places it.</summary>
internal sealed class PciBar(PciDevice device, int index, ulong size, bool isIo, bool is64Bit, IIoDevice registers, bool isRom = false)
{
    private IDisposable? _registration;

    public PciDevice Device => device;

    public int Index => index;

    public ulong Size => size;

    public bool IsIo => isIo;

    public bool Is64Bit => is64Bit;

    /// <summary>Whether the range is the expansion ROM, which has a register and a switch of its own.</summary>
    public bool IsRom => isRom;

    public IIoDevice Registers => registers;

    /// <summary>Where the range answers at the moment, if anywhere.</summary>
    public ulong? MappedAt { get; private set; }

    /// <summary>Where the guest wants the range to answer; null while decoding is off or the address makes no sense.</summary>
    public ulong? WantedAddress
    {
        get
        {
            var command = (CommandBits)device.Config.GetUInt16(Command);
            if ((command & (isIo ? CommandBits.IoSpace : CommandBits.MemorySpace)) == 0)
            {
                return null;
            }
            if (isRom && (device.Config.GetUInt32(ExpansionRom) & ExpansionRomEnable) == 0)
            {
                return null;
            }
            var address = Address;
            // 0 is what nobody has set yet; PCI 3.0, "Implementation Note: Sizing a 32-bit Base Address Register".
            return address == 0 || address > LastAddress - (size - 1) ? null : address;
        }
    }

    public ulong Address
    {
        get
        {
            var offset = Offset;
            var low = device.Config.GetUInt32(offset) & ~Flags;
            return is64Bit ? low | (ulong)device.Config.GetUInt32(offset + 4) << 32 : low;
        }

        set
        {
            var offset = Offset;
            var flags = device.Config.GetUInt32(offset) & Flags;
            device.Config.SetUInt32(offset, (uint)value | flags);
            if (is64Bit)
            {
                device.Config.SetUInt32(offset + 4, (uint)(value >> 32));
            }
        }
    }

    private int Offset => isRom ? ExpansionRom : FirstBar + 4 * index;

    private uint Flags => isRom ? 0x7ff : isIo ? 3u : 15u;

    private ulong LastAddress => isIo ? ushort.MaxValue : is64Bit ? ulong.MaxValue : uint.MaxValue;

    public void Unmap()
    {
        if (_registration is { } registration)
        {
            registration.Dispose();
            _registration = null;
            MappedAt = null;
            device.BarMoved(this);
        }
    }

    // A range that another device holds already stays with that device.
    public void TryMap(IoBus bus, ulong address)
    {
        if (bus.TryMap(registers, address, size) is { } registration)
        {
            _registration = registration;
            MappedAt = address;
            device.BarMoved(this);
        }
    }
}
