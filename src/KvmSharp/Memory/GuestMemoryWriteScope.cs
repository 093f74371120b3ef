using KvmSharp.Interop;

namespace KvmSharp;

/// <summary>
/// Guest memory that is open for writing in place. <see cref="Dispose"/> marks its pages dirty and drops code decoded
/// from them, so it must run after the last write; <c>using</c> sees to that.
/// </summary>
public unsafe ref struct GuestMemoryWriteScope
{
    private readonly VmHandle _vm;
    private readonly uint _space;
    private readonly GuestAddress _address;
    private RamHandle? _ram;

    internal GuestMemoryWriteScope(VmHandle vm, uint space, MemorySlot slot, GuestAddress address, int length)
    {
        var added = false;
        slot.Ram.DangerousAddRef(ref added);
        _ram = slot.Ram;
        _vm = vm;
        _space = space;
        _address = address;
        Data = new Span<byte>(slot.HostAddress + (address.Value - slot.Address.Value), length);
    }

    /// <summary>The memory; valid until <see cref="Dispose"/>.</summary>
    public Span<byte> Data { get; private set; }

    /// <summary>Ends the scope.</summary>
    public void Dispose()
    {
        if (_ram is { } ram)
        {
            _ram = null;
            // A slot that went away meanwhile needs neither dirty bits nor code marks.
            _ = NativeMethods.SpaceWritten(_vm, _space, _address.Value, (ulong)Data.Length);
            Data = default;
            ram.DangerousRelease();
        }
    }
}
