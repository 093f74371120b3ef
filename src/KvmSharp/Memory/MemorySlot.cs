using KvmSharp.Interop;

namespace KvmSharp;

/// <summary>How a slot behaves.</summary>
[Flags]
public enum MemorySlotFlags
{
    /// <summary>Plain RAM.</summary>
    None = 0,
    /// <summary>Writes of the guest and of the host are recorded page by page.</summary>
    LogDirtyPages = 1,
    /// <summary>ROM: a write of the guest goes to the MMIO bus.</summary>
    ReadOnly = 2,
}

/// <summary>A range of guest-physical addresses that host memory backs.</summary>
public sealed class MemorySlot
{
    internal unsafe MemorySlot(uint id, GuestAddress address, ulong size, GuestRam ram, ulong ramOffset, MemorySlotFlags flags, bool ofDevice)
    {
        OfDevice = ofDevice;
        Id = id;
        Address = address;
        Size = size;
        Ram = ram.Handle.Share();
        HostAddress = ram.Address + ramOffset;
        RamOffset = ramOffset;
        Flags = flags;
    }

    /// <summary>The number of the slot.</summary>
    public uint Id { get; }

    /// <summary>The first address.</summary>
    public GuestAddress Address { get; }

    /// <summary>The size in bytes.</summary>
    public ulong Size { get; }

    /// <summary>How the slot behaves.</summary>
    public MemorySlotFlags Flags { get; }

    // A guest can move it through registers of a device, which saves the content too.
    internal bool OfDevice { get; }

    // The slot's own reference, so that the owner may let go of the memory.
    internal RamHandle Ram { get; }

    internal unsafe byte* HostAddress { get; }

    internal ulong RamOffset { get; }

    /// <summary>Keeps the memory where it is for the length of a scope, even if the machine is disposed meanwhile.</summary>
    /// <exception cref="ObjectDisposedException">It is gone already.</exception>
    internal Held Hold() => new(Ram);

    internal bool Holds(ulong address, ulong length) =>
        address >= Address.Value && address - Address.Value <= Size && length <= Size - (address - Address.Value);

    internal readonly ref struct Held
    {
        private readonly RamHandle _ram;

        public Held(RamHandle ram)
        {
            var added = false;
            ram.DangerousAddRef(ref added);
            _ram = ram;
        }

        public void Dispose() => _ram.DangerousRelease();
    }
}
