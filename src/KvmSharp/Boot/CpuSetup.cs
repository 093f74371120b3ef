namespace KvmSharp.Boot;

/// <summary>Puts a processor that comes out of reset into the mode that a program expects at its start.</summary>
internal static class CpuSetup
{
    internal const ushort CodeSelector = 0x10;
    internal const ushort DataSelector = 0x18;

    // SDM 3A "Control Registers", "Extended Feature Enable Register".
    private const ulong Cr0ProtectedMode = 1UL << 0;
    private const ulong Cr0ExtensionType = 1UL << 4;
    private const ulong Cr0NumericError = 1UL << 5;
    private const ulong Cr0WriteProtect = 1UL << 16;
    private const ulong Cr0Paging = 1UL << 31;
    private const ulong Cr4PhysicalAddressExtension = 1UL << 5;
    private const ulong EferLongModeEnable = 1UL << 8;
    private const ulong EferLongModeActive = 1UL << 10;
    private const ulong LargePage = 1UL << 7;
    private const ulong PresentWritable = 3;

    internal static void EnterRealMode(Vcpu vcpu, ushort segment, ushort offset, ushort stackPointer)
    {
        var special = vcpu.GetSpecialRegisters();
        special.Cs = RealModeSegment(segment, isCode: true);
        special.Ds = special.Es = special.Fs = special.Gs = special.Ss = RealModeSegment(0, isCode: false);
        vcpu.SetSpecialRegisters(special);
        vcpu.SetRegisters(new Registers { Rip = offset, Rsp = stackPointer, Rflags = 2 });
    }

    /// <summary>32-bit protected mode, flat segments, no paging, interrupts off.</summary>
    internal static void EnterProtectedMode(Vcpu vcpu, GuestMemory memory, GuestAddress gdt, in Registers registers)
    {
        var special = vcpu.GetSpecialRegisters();
        SetFlatSegments(ref special, memory, gdt, is64Bit: false);
        special.Cr3 = special.Cr4 = special.Efer = 0;
        special.Cr0 = Cr0ProtectedMode | Cr0ExtensionType | Cr0NumericError;
        vcpu.SetSpecialRegisters(special);
        vcpu.SetRegisters(registers with { Rflags = 2 });
    }

    /// <summary>64-bit mode, the first 4 GiB mapped to themselves with 2 MiB pages, interrupts off.</summary>
    /// <param name="vcpu">The processor.</param>
    /// <param name="memory">Where GDT and page tables go.</param>
    /// <param name="gdt">Room for 32 bytes.</param>
    /// <param name="pageTables">Room for 6 pages.</param>
    /// <param name="registers">The general registers at the start.</param>
    internal static void EnterLongMode(Vcpu vcpu, GuestMemory memory, GuestAddress gdt, GuestAddress pageTables, in Registers registers)
    {
        var directory = pageTables + GuestMemory.PageSize;
        memory.Fill(pageTables, 2 * GuestMemory.PageSize, 0);
        memory.Write(pageTables, directory.Value | PresentWritable);
        for (ulong i = 0; i < 4; i++)
        {
            memory.Write(directory + 8 * i, (directory.Value + (i + 1) * GuestMemory.PageSize) | PresentWritable);
        }
        var entries = new byte[4 * GuestMemory.PageSize];
        for (ulong i = 0; i < 4 * 512; i++)
        {
            BitConverter.TryWriteBytes(entries.AsSpan((int)i * 8), (i << 21) | LargePage | PresentWritable);
        }
        memory.Write(directory + GuestMemory.PageSize, entries);

        var special = vcpu.GetSpecialRegisters();
        SetFlatSegments(ref special, memory, gdt, is64Bit: true);
        special.Cr3 = pageTables.Value;
        special.Cr4 = Cr4PhysicalAddressExtension;
        special.Efer = EferLongModeEnable | EferLongModeActive;
        special.Cr0 = Cr0ProtectedMode | Cr0ExtensionType | Cr0NumericError | Cr0WriteProtect | Cr0Paging;
        vcpu.SetSpecialRegisters(special);
        vcpu.SetRegisters(registers with { Rflags = 2 });
    }

    // SDM 3A "Segment Descriptors". 0x10 and 0x18 are where the Linux boot protocol wants code and data.
    private static void SetFlatSegments(ref SpecialRegisters special, GuestMemory memory, GuestAddress gdt, bool is64Bit)
    {
        ulong[] descriptors = [0, 0, is64Bit ? 0x00af_9b00_0000_ffffUL : 0x00cf_9b00_0000_ffffUL, 0x00cf_9300_0000_ffffUL];
        for (var i = 0; i < descriptors.Length; i++)
        {
            memory.Write(gdt + (ulong)i * 8, descriptors[i]);
        }
        special.Gdt = new DescriptorTable { Base = gdt.Value, Limit = (ushort)(descriptors.Length * 8 - 1) };
        special.Idt = new DescriptorTable { Base = 0, Limit = 0 };
        special.Cs = new SegmentRegister
        {
            Selector = CodeSelector,
            Limit = 0xffff_ffff,
            Type = 0xb,
            S = 1,
            Present = 1,
            G = 1,
            L = is64Bit ? (byte)1 : (byte)0,
            Db = is64Bit ? (byte)0 : (byte)1,
        };
        special.Ds = special.Es = special.Fs = special.Gs = special.Ss = new SegmentRegister
        {
            Selector = DataSelector,
            Limit = 0xffff_ffff,
            Type = 3,
            S = 1,
            Present = 1,
            G = 1,
            Db = 1,
        };
        special.Tr = new SegmentRegister { Limit = 0x67, Type = 0xb, Present = 1 };
        special.Ldt = new SegmentRegister { Unusable = 1 };
    }

    private static SegmentRegister RealModeSegment(ushort segment, bool isCode) => new()
    {
        Selector = segment,
        Base = (ulong)segment << 4,
        Limit = 0xffff,
        Type = isCode ? (byte)0xb : (byte)3,
        S = 1,
        Present = 1,
    };
}
