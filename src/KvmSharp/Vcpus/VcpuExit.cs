using System.Globalization;

namespace KvmSharp;

/// <summary>Why a vCPU returned to the host.</summary>
public enum VcpuExitReason
{
    /// <summary>None that this library knows.</summary>
    Unknown,
    /// <summary>The guest accessed a port that the core does not implement.</summary>
    Io,
    /// <summary>The guest accessed a physical address that no memory backs.</summary>
    Mmio,
    /// <summary>A HLT instruction without interrupt controller in the core.</summary>
    Halt,
    /// <summary>Somebody called <see cref="Vcpu.Kick"/>.</summary>
    Interrupted,
    /// <summary>A triple fault.</summary>
    Shutdown,
    /// <summary>A breakpoint or a single step of <see cref="Vcpu.SetSingleStep"/>.</summary>
    Debug,
    /// <summary>The guest can take an interrupt now.</summary>
    InterruptWindow,
    /// <summary>The core cannot go on.</summary>
    InternalError,
    /// <summary>A timer of <see cref="VmClock"/> is due.</summary>
    HostTimer,
    /// <summary>The count of <see cref="Vcpu.SetInstructionLimit"/> is reached.</summary>
    InstructionLimit,
}

/// <summary>One return of a vCPU to the host; valid until the vCPU runs again.</summary>
public readonly ref struct VcpuExit
{
    /// <summary>The reason.</summary>
    public VcpuExitReason Reason { get; init; }

    /// <summary>For I/O: the port. For MMIO: the guest-physical address. Otherwise the instruction pointer, where it is known.</summary>
    public ulong Address { get; init; }

    /// <summary>For I/O and MMIO: whether the guest writes.</summary>
    public bool IsWrite { get; init; }

    /// <summary>For I/O: 1, 2 or 4 bytes; for MMIO 1 to 8.</summary>
    public int Size { get; init; }

    /// <summary>For I/O: how many times the access repeats, as the string instructions do it; 1 otherwise.</summary>
    public int Count { get; init; }

    /// <summary>
    /// For I/O and MMIO: Size times Count bytes, to read for writes and to fill for reads.
    /// For an internal error: the bytes of the instruction.
    /// </summary>
    public Span<byte> Data { get; init; }

    /// <summary>For an internal error: what the core could not do.</summary>
    public uint Suberror { get; init; }

    /// <summary>A port access.</summary>
    /// <param name="port">The port.</param>
    /// <param name="isWrite">Whether the guest writes.</param>
    /// <param name="size">1, 2 or 4 bytes.</param>
    /// <param name="data">One or more items of that size.</param>
    public static VcpuExit ForIo(ushort port, bool isWrite, int size, Span<byte> data) => new()
    {
        Reason = VcpuExitReason.Io,
        Address = port,
        IsWrite = isWrite,
        Size = size,
        Count = data.Length / size,
        Data = data,
    };

    /// <summary>A memory-mapped access.</summary>
    /// <param name="address">The guest-physical address.</param>
    /// <param name="isWrite">Whether the guest writes.</param>
    /// <param name="data">1 to 8 bytes.</param>
    public static VcpuExit ForMmio(GuestAddress address, bool isWrite, Span<byte> data) => new()
    {
        Reason = VcpuExitReason.Mmio,
        Address = address.Value,
        IsWrite = isWrite,
        Size = data.Length,
        Count = 1,
        Data = data,
    };

    /// <summary>One line for logs.</summary>
    public override string ToString() => Reason switch
    {
        VcpuExitReason.Io or VcpuExitReason.Mmio => string.Create(CultureInfo.InvariantCulture,
            $"{(IsWrite ? "write" : "read")} of {Size} x {Count} bytes at {(Reason == VcpuExitReason.Io ? "port" : "address")} 0x{Address:x}"),
        VcpuExitReason.InternalError => string.Create(CultureInfo.InvariantCulture,
            $"internal error {Suberror} at RIP 0x{Address:x}, bytes {Convert.ToHexStringLower(Data)}"),
        _ => Reason.ToString(),
    };
}
