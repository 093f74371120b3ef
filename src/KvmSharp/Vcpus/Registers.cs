using System.Runtime.CompilerServices;
using System.Runtime.InteropServices;

namespace KvmSharp;

#pragma warning disable CS1591 // the register names are their own documentation

/// <summary>The general registers, RIP and RFLAGS. The layout is that of <c>struct kvm_regs</c>.</summary>
[StructLayout(LayoutKind.Sequential)]
public record struct Registers
{
    public ulong Rax, Rbx, Rcx, Rdx, Rsi, Rdi, Rsp, Rbp;
    public ulong R8, R9, R10, R11, R12, R13, R14, R15;
    public ulong Rip, Rflags;
}

/// <summary>A segment register with its hidden part. The layout is that of <c>struct kvm_segment</c>.</summary>
[StructLayout(LayoutKind.Sequential)]
public record struct SegmentRegister
{
    public ulong Base;
    /// <summary>The last valid offset in bytes, granularity applied.</summary>
    public uint Limit;
    public ushort Selector;
    /// <summary>The type field of the descriptor, 0 to 15.</summary>
    public byte Type;
    public byte Present;
    public byte Dpl;
    /// <summary>The D/B bit: 1 for 32-bit code or stack.</summary>
    public byte Db;
    /// <summary>The S bit: 1 for code and data, 0 for system segments.</summary>
    public byte S;
    /// <summary>The L bit: 1 for 64-bit code.</summary>
    public byte L;
    public byte G;
    public byte Avl;
    public byte Unusable;
    private byte _padding;
}

/// <summary>GDTR or IDTR. The layout is that of <c>struct kvm_dtable</c>.</summary>
[StructLayout(LayoutKind.Sequential)]
public record struct DescriptorTable
{
    public ulong Base;
    public ushort Limit;
    private ushort _padding0, _padding1, _padding2;
}

/// <summary>Segment and control registers. The layout is that of <c>struct kvm_sregs</c>.</summary>
[StructLayout(LayoutKind.Sequential)]
public record struct SpecialRegisters
{
    public SegmentRegister Cs, Ds, Es, Fs, Gs, Ss, Tr, Ldt;
    public DescriptorTable Gdt, Idt;
    public ulong Cr0, Cr2, Cr3, Cr4, Cr8, Efer, ApicBase;
    /// <summary>At most one bit: the vector of an external interrupt that is already taken.</summary>
    public InterruptBitmap InterruptBitmap;
}

/// <summary>256 bits, one for each interrupt vector.</summary>
[InlineArray(4)]
public struct InterruptBitmap : IEquatable<InterruptBitmap>
{
    private ulong _element0;

    /// <inheritdoc/>
    public readonly bool Equals(InterruptBitmap other) => ((ReadOnlySpan<ulong>)this).SequenceEqual(other);

    /// <inheritdoc/>
    public override readonly bool Equals(object? obj) => obj is InterruptBitmap other && Equals(other);

    /// <inheritdoc/>
    public override readonly int GetHashCode() => HashCode.Combine(this[0], this[1], this[2], this[3]);

    /// <summary>Whether both have the same bits set.</summary>
    public static bool operator ==(InterruptBitmap left, InterruptBitmap right) => left.Equals(right);

    /// <summary>Whether a bit differs.</summary>
    public static bool operator !=(InterruptBitmap left, InterruptBitmap right) => !left.Equals(right);
}

/// <summary>A 128-bit register: an XMM register, or an x87 register in its low 80 bits.</summary>
/// <param name="Low">Bits 0 to 63.</param>
/// <param name="High">Bits 64 to 127.</param>
[StructLayout(LayoutKind.Sequential)]
public readonly record struct Register128(ulong Low, ulong High);

/// <summary>Eight x87 registers, ST(0) first.</summary>
[InlineArray(8)]
public struct X87Registers
{
    private Register128 _element0;
}

/// <summary>Sixteen XMM registers.</summary>
[InlineArray(16)]
public struct XmmRegisters
{
    private Register128 _element0;
}

/// <summary>x87 and SSE state. The layout is that of <c>struct kvm_fpu</c>.</summary>
[StructLayout(LayoutKind.Sequential)]
public struct FpuRegisters
{
    public X87Registers St;
    public ushort Fcw, Fsw;
    /// <summary>The abridged tag word, as in FXSAVE.</summary>
    public byte Ftw;
    private byte _padding1;
    public ushort LastOpcode;
    public ulong LastIp, LastDp;
    public XmmRegisters Xmm;
    public uint Mxcsr;
    private uint _padding2;
}

/// <summary>One CPUID leaf. The layout is that of <c>struct kvm_cpuid_entry2</c>.</summary>
[StructLayout(LayoutKind.Sequential)]
public record struct CpuidEntry
{
    /// <summary>The leaf, in EAX.</summary>
    public uint Function;
    /// <summary>The sub-leaf, in ECX; counts only if <see cref="Flags"/> has bit 0.</summary>
    public uint Index;
    /// <summary>Bit 0: <see cref="Index"/> is significant.</summary>
    public uint Flags;
    public uint Eax, Ebx, Ecx, Edx;
    private uint _padding0, _padding1, _padding2;
}

#pragma warning restore CS1591

/// <summary>What a linear address leads to at the moment.</summary>
/// <param name="Address">The guest-physical address.</param>
/// <param name="Writable">Whether the page tables allow writes.</param>
/// <param name="UserMode">Whether the page tables allow user-mode access.</param>
public readonly record struct Translation(GuestAddress Address, bool Writable, bool UserMode);

/// <summary>Counters of a vCPU since its creation.</summary>
public readonly record struct VcpuStatistics
{
    /// <summary>Instructions retired; a REP instruction counts once.</summary>
    public ulong Instructions { get; init; }

    /// <summary>Exits to the host of any kind.</summary>
    public ulong Exits { get; init; }

    /// <summary>Exits for port I/O.</summary>
    public ulong IoExits { get; init; }

    /// <summary>Exits for memory-mapped I/O.</summary>
    public ulong MmioExits { get; init; }

    /// <summary>Times that the vCPU went idle.</summary>
    public ulong Halts { get; init; }

    /// <summary>External interrupts taken.</summary>
    public ulong Interrupts { get; init; }

    /// <summary>Exceptions delivered.</summary>
    public ulong Exceptions { get; init; }

    /// <summary>Basic blocks decoded.</summary>
    public ulong BlocksDecoded { get; init; }

    /// <summary>Basic blocks dropped because their code changed.</summary>
    public ulong BlocksInvalidated { get; init; }

    /// <summary>Times that the cache of decoded code was emptied.</summary>
    public ulong CacheFlushes { get; init; }

    /// <summary>Translations entered into the soft TLB.</summary>
    public ulong TlbFills { get; init; }

    /// <summary>Times that the soft TLB was emptied.</summary>
    public ulong TlbFlushes { get; init; }
}

/// <summary>One executed instruction of a trace. The layout is that of <c>struct kvs_trace_entry</c>.</summary>
[StructLayout(LayoutKind.Sequential)]
public struct TraceEntry
{
    /// <summary>Instructions retired before this one.</summary>
    public ulong Retired;
    /// <summary>The instruction pointer.</summary>
    public ulong Rip;
    /// <summary>The linear address of the instruction.</summary>
    public ulong Linear;
    /// <summary>The general registers before the instruction, in encoding order: RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8 ...</summary>
    public TraceRegisters Registers;
    /// <summary>RFLAGS before the instruction.</summary>
    public ulong Rflags;
    /// <summary>The bytes of the instruction.</summary>
    public InstructionBytes Bytes;
    /// <summary>How many of <see cref="Bytes"/> could be fetched.</summary>
    public byte Length;
    /// <summary>The width of the code: 16, 32 or 64.</summary>
    public uint Mode;
    /// <summary>The current privilege level.</summary>
    public uint Cpl;
}

/// <summary>Sixteen general registers in encoding order.</summary>
[InlineArray(16)]
public struct TraceRegisters
{
    private ulong _element0;
}

/// <summary>The longest instruction.</summary>
[InlineArray(15)]
public struct InstructionBytes
{
    private byte _element0;
}
