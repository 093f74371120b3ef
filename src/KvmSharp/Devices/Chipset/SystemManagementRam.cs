using KvmSharp.Devices.Pci;
using static KvmSharp.Devices.SystemManagementRamRegisters;

namespace KvmSharp.Devices;

/// <summary>
/// The memory behind the video memory that belongs to system management mode. There it is always seen; firmware can open it for
/// everybody, fill it, and lock it until the next reset. Specification: Intel 3 Series Express Chipset Family, "SMRAM - System
/// Management RAM Control".
/// </summary>
internal sealed class SystemManagementRam
{
    // Wiring
    private readonly GuestMemory _memory;
    private readonly GuestRam _ram;
    private MemorySlot? _window;

    // State: a copy of the register that a locked one goes back to
    private ControlBits _control = ControlBits.Location;

    /// <summary>Creates the memory, closed and not locked, as after a reset.</summary>
    /// <param name="memory">The guest's memory outside of system management mode.</param>
    /// <param name="ram">RAM whose offsets are addresses, and that system management mode sees; the machine keeps it.</param>
    public SystemManagementRam(GuestMemory memory, GuestRam ram)
    {
        _memory = memory;
        _ram = ram;
    }

    /// <summary>Makes the registers.</summary>
    public static void Define(PciConfigSpace config)
    {
        config.DefineByte(Control, (byte)ControlBits.Location, (byte)ControlBits.Writable);
        config.DefineByte(ExtendedControl, ExtendedReset);
    }

    /// <summary>The guest has written the register.</summary>
    public void ControlWritten(PciConfigSpace config)
    {
        var value = (_control & ControlBits.Lock) != 0 ? _control : (ControlBits)config.GetByte(Control);
        Set(config, (value & ControlBits.Lock) != 0 ? value & ~ControlBits.Open : value);
    }

    /// <summary>Takes over the register of a saved machine.</summary>
    public void Load(PciConfigSpace config) => Set(config, (ControlBits)config.GetByte(Control));

    /// <summary>As after a reset.</summary>
    public void Reset(PciConfigSpace config) => Set(config, ControlBits.Location);

    private void Set(PciConfigSpace config, ControlBits value)
    {
        _control = value;
        config.DefineByte(Control, (byte)value, (byte)ControlBits.Writable);
        var open = (value & (ControlBits.Open | ControlBits.Enable)) == (ControlBits.Open | ControlBits.Enable);
        if (open && _window is null)
        {
            _window = _memory.TryMapOfDevice(_ram, Address, Address, Length);
        }
        else if (!open && _window is { } window)
        {
            _memory.Remove(window);
            _window = null;
        }
    }
}
