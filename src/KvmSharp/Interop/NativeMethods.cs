using System.Runtime.CompilerServices;
using System.Runtime.InteropServices;

[assembly: DisableRuntimeMarshalling]

namespace KvmSharp.Interop;

/// <summary>Every call into the execution core. Names and thread rules are those of native/include/kvmsharp.h.</summary>
internal static unsafe partial class NativeMethods
{
    internal const string Library = "kvmsharp";

    // Library

    [LibraryImport(Library, EntryPoint = "kvs_abi_version")]
    internal static partial int AbiVersion();

    [LibraryImport(Library, EntryPoint = "kvs_abi_size")]
    internal static partial int AbiSize(uint structId);

    [LibraryImport(Library, EntryPoint = "kvs_abi_offset")]
    internal static partial int AbiOffset(uint fieldId);

    [LibraryImport(Library, EntryPoint = "kvs_strerror")]
    internal static partial byte* StrError(int result);

    [LibraryImport(Library, EntryPoint = "kvs_get_supported_cpuid")]
    internal static partial int GetSupportedCpuid(CpuidEntry* entries, uint* count);

    [LibraryImport(Library, EntryPoint = "kvs_get_msr_index_list")]
    internal static partial int GetMsrIndexList(uint* indices, uint* count);

    [LibraryImport(Library, EntryPoint = "kvs_disassemble")]
    internal static partial int Disassemble(byte* bytes, uint count, uint bits, ulong rip, byte* text, uint textSize);

    // VM

    [LibraryImport(Library, EntryPoint = "kvs_vm_create")]
    internal static partial int VmCreate(KvsVmConfig* config, out VmHandle vm);

    [LibraryImport(Library, EntryPoint = "kvs_vm_destroy")]
    internal static partial void VmDestroy(nint vm);

    [LibraryImport(Library, EntryPoint = "kvs_ram_create")]
    internal static partial int RamCreate(ulong size, out RamHandle ram);

    [LibraryImport(Library, EntryPoint = "kvs_ram_acquire")]
    internal static partial void RamAcquire(RamHandle ram);

    [LibraryImport(Library, EntryPoint = "kvs_ram_release")]
    internal static partial void RamRelease(nint ram);

    [LibraryImport(Library, EntryPoint = "kvs_ram_address")]
    internal static partial byte* RamAddress(RamHandle ram);

    [LibraryImport(Library, EntryPoint = "kvs_memslot_set")]
    internal static partial int MemslotSet(VmHandle vm, KvsUserspaceMemoryRegion* region, RamHandle ram, ulong ramOffset);

    [LibraryImport(Library, EntryPoint = "kvs_space_read")]
    internal static partial int SpaceRead(VmHandle vm, uint space, ulong gpa, void* data, ulong length);

    [LibraryImport(Library, EntryPoint = "kvs_space_write")]
    internal static partial int SpaceWrite(VmHandle vm, uint space, ulong gpa, void* data, ulong length);

    [LibraryImport(Library, EntryPoint = "kvs_space_written")]
    internal static partial int SpaceWritten(VmHandle vm, uint space, ulong gpa, ulong length);

    [LibraryImport(Library, EntryPoint = "kvs_get_dirty_log")]
    internal static partial int GetDirtyLog(VmHandle vm, uint slot, ulong* bitmap, ulong words);

    [LibraryImport(Library, EntryPoint = "kvs_vm_set_a20")]
    internal static partial int VmSetA20(VmHandle vm, uint enabled);

    // Interrupts, clock, doorbells

    [LibraryImport(Library, EntryPoint = "kvs_irqchip_create")]
    internal static partial int IrqchipCreate(VmHandle vm);

    [LibraryImport(Library, EntryPoint = "kvs_pit_create")]
    internal static partial int PitCreate(VmHandle vm);

    [LibraryImport(Library, EntryPoint = "kvs_get_irqchip")]
    internal static partial int GetIrqchip(VmHandle vm, KvsIrqchip* chip);

    [LibraryImport(Library, EntryPoint = "kvs_set_irqchip")]
    internal static partial int SetIrqchip(VmHandle vm, KvsIrqchip* chip);

    [LibraryImport(Library, EntryPoint = "kvs_get_pit2")]
    internal static partial int GetPit2(VmHandle vm, KvsPitState2* pit);

    [LibraryImport(Library, EntryPoint = "kvs_set_pit2")]
    internal static partial int SetPit2(VmHandle vm, KvsPitState2* pit);

    [LibraryImport(Library, EntryPoint = "kvs_irq_line")]
    internal static partial int IrqLine(VmHandle vm, uint gsi, uint level);

    [LibraryImport(Library, EntryPoint = "kvs_signal_msi")]
    internal static partial int SignalMsi(VmHandle vm, KvsMsi* msi);

    [LibraryImport(Library, EntryPoint = "kvs_set_gsi_routing")]
    internal static partial int SetGsiRouting(VmHandle vm, KvsIrqRoutingEntry* entries, uint count);

    [LibraryImport(Library, EntryPoint = "kvs_get_clock")]
    internal static partial int GetClock(VmHandle vm, KvsClockData* clock);

    [LibraryImport(Library, EntryPoint = "kvs_set_clock")]
    internal static partial int SetClock(VmHandle vm, KvsClockData* clock);

    [LibraryImport(Library, EntryPoint = "kvs_clock_now")]
    internal static partial ulong ClockNow(VmHandle vm);

    [LibraryImport(Library, EntryPoint = "kvs_clock_pause")]
    internal static partial int ClockPause(VmHandle vm, uint paused);

    [LibraryImport(Library, EntryPoint = "kvs_host_timer_arm")]
    internal static partial int HostTimerArm(VmHandle vm, ulong deadline);

    [LibraryImport(Library, EntryPoint = "kvs_doorbell_create")]
    internal static partial int DoorbellCreate(VmHandle vm, ulong address, uint length, ulong datamatch, uint flags,
        out DoorbellHandle doorbell);

    [LibraryImport(Library, EntryPoint = "kvs_doorbell_wait")]
    internal static partial int DoorbellWait(DoorbellHandle doorbell, int timeoutMilliseconds);

    [LibraryImport(Library, EntryPoint = "kvs_doorbell_ring")]
    internal static partial int DoorbellRing(DoorbellHandle doorbell);

    [LibraryImport(Library, EntryPoint = "kvs_doorbell_move")]
    internal static partial int DoorbellMove(DoorbellHandle doorbell, ulong address, uint attached);

    [LibraryImport(Library, EntryPoint = "kvs_doorbell_close")]
    internal static partial void DoorbellClose(DoorbellHandle doorbell);

    [LibraryImport(Library, EntryPoint = "kvs_doorbell_destroy")]
    internal static partial void DoorbellDestroy(nint doorbell);

    // vCPU. The thread that runs a vCPU holds a reference for its whole life and calls with the raw pointer.

    [LibraryImport(Library, EntryPoint = "kvs_vcpu_create")]
    internal static partial int VcpuCreate(VmHandle vm, uint id, out VcpuHandle vcpu);

    [LibraryImport(Library, EntryPoint = "kvs_vcpu_destroy")]
    internal static partial int VcpuDestroy(nint vcpu);

    [LibraryImport(Library, EntryPoint = "kvs_vcpu_run_block")]
    internal static partial KvsRun* VcpuRunBlock(VcpuHandle vcpu);

    [LibraryImport(Library, EntryPoint = "kvs_vcpu_run")]
    internal static partial int VcpuRun(nint vcpu);

    [LibraryImport(Library, EntryPoint = "kvs_vcpu_kick")]
    internal static partial void VcpuKick(VcpuHandle vcpu);

    [LibraryImport(Library, EntryPoint = "kvs_vcpu_reset")]
    internal static partial int VcpuReset(VcpuHandle vcpu);

    [LibraryImport(Library, EntryPoint = "kvs_vcpu_set_insn_limit")]
    internal static partial int VcpuSetInsnLimit(VcpuHandle vcpu, ulong retired);

    [LibraryImport(Library, EntryPoint = "kvs_vcpu_get_regs")]
    internal static partial int VcpuGetRegs(VcpuHandle vcpu, Registers* regs);

    [LibraryImport(Library, EntryPoint = "kvs_vcpu_set_regs")]
    internal static partial int VcpuSetRegs(VcpuHandle vcpu, Registers* regs);

    [LibraryImport(Library, EntryPoint = "kvs_vcpu_get_sregs")]
    internal static partial int VcpuGetSregs(VcpuHandle vcpu, SpecialRegisters* sregs);

    [LibraryImport(Library, EntryPoint = "kvs_vcpu_set_sregs")]
    internal static partial int VcpuSetSregs(VcpuHandle vcpu, SpecialRegisters* sregs);

    [LibraryImport(Library, EntryPoint = "kvs_vcpu_get_fpu")]
    internal static partial int VcpuGetFpu(VcpuHandle vcpu, FpuRegisters* fpu);

    [LibraryImport(Library, EntryPoint = "kvs_vcpu_set_fpu")]
    internal static partial int VcpuSetFpu(VcpuHandle vcpu, FpuRegisters* fpu);

    [LibraryImport(Library, EntryPoint = "kvs_vcpu_get_xsave")]
    internal static partial int VcpuGetXsave(VcpuHandle vcpu, KvsXsave* xsave);

    [LibraryImport(Library, EntryPoint = "kvs_vcpu_set_xsave")]
    internal static partial int VcpuSetXsave(VcpuHandle vcpu, KvsXsave* xsave);

    [LibraryImport(Library, EntryPoint = "kvs_vcpu_get_xcrs")]
    internal static partial int VcpuGetXcrs(VcpuHandle vcpu, KvsXcrs* xcrs);

    [LibraryImport(Library, EntryPoint = "kvs_vcpu_set_xcrs")]
    internal static partial int VcpuSetXcrs(VcpuHandle vcpu, KvsXcrs* xcrs);

    [LibraryImport(Library, EntryPoint = "kvs_vcpu_get_msrs")]
    internal static partial int VcpuGetMsrs(VcpuHandle vcpu, KvsMsrEntry* entries, uint count);

    [LibraryImport(Library, EntryPoint = "kvs_vcpu_set_msrs")]
    internal static partial int VcpuSetMsrs(VcpuHandle vcpu, KvsMsrEntry* entries, uint count);

    [LibraryImport(Library, EntryPoint = "kvs_vcpu_get_cpuid2")]
    internal static partial int VcpuGetCpuid2(VcpuHandle vcpu, CpuidEntry* entries, uint* count);

    [LibraryImport(Library, EntryPoint = "kvs_vcpu_set_cpuid2")]
    internal static partial int VcpuSetCpuid2(VcpuHandle vcpu, CpuidEntry* entries, uint count);

    [LibraryImport(Library, EntryPoint = "kvs_vcpu_get_events")]
    internal static partial int VcpuGetEvents(VcpuHandle vcpu, KvsVcpuEvents* events);

    [LibraryImport(Library, EntryPoint = "kvs_vcpu_set_events")]
    internal static partial int VcpuSetEvents(VcpuHandle vcpu, KvsVcpuEvents* events);

    [LibraryImport(Library, EntryPoint = "kvs_vcpu_get_lapic")]
    internal static partial int VcpuGetLapic(VcpuHandle vcpu, KvsLapicState* lapic);

    [LibraryImport(Library, EntryPoint = "kvs_vcpu_set_lapic")]
    internal static partial int VcpuSetLapic(VcpuHandle vcpu, KvsLapicState* lapic);

    [LibraryImport(Library, EntryPoint = "kvs_vcpu_get_mp_state")]
    internal static partial int VcpuGetMpState(VcpuHandle vcpu, KvsMpState* state);

    [LibraryImport(Library, EntryPoint = "kvs_vcpu_set_mp_state")]
    internal static partial int VcpuSetMpState(VcpuHandle vcpu, KvsMpState* state);

    [LibraryImport(Library, EntryPoint = "kvs_vcpu_get_debugregs")]
    internal static partial int VcpuGetDebugregs(VcpuHandle vcpu, KvsDebugregs* regs);

    [LibraryImport(Library, EntryPoint = "kvs_vcpu_set_debugregs")]
    internal static partial int VcpuSetDebugregs(VcpuHandle vcpu, KvsDebugregs* regs);

    [LibraryImport(Library, EntryPoint = "kvs_vcpu_get_core_state")]
    internal static partial int VcpuGetCoreState(VcpuHandle vcpu, KvsCoreState* state);

    [LibraryImport(Library, EntryPoint = "kvs_vcpu_set_core_state")]
    internal static partial int VcpuSetCoreState(VcpuHandle vcpu, KvsCoreState* state);

    [LibraryImport(Library, EntryPoint = "kvs_vcpu_set_guest_debug")]
    internal static partial int VcpuSetGuestDebug(VcpuHandle vcpu, KvsGuestDebug* debug);

    [LibraryImport(Library, EntryPoint = "kvs_vcpu_translate")]
    internal static partial int VcpuTranslate(VcpuHandle vcpu, KvsTranslation* translation);

    [LibraryImport(Library, EntryPoint = "kvs_vcpu_set_mce")]
    internal static partial int VcpuSetMce(VcpuHandle vcpu, KvsX86Mce* mce);

    [LibraryImport(Library, EntryPoint = "kvs_vcpu_interrupt")]
    internal static partial int VcpuInterrupt(VcpuHandle vcpu, uint vector);

    [LibraryImport(Library, EntryPoint = "kvs_vcpu_nmi")]
    internal static partial int VcpuNmi(VcpuHandle vcpu);

    [LibraryImport(Library, EntryPoint = "kvs_vcpu_smi")]
    internal static partial int VcpuSmi(VcpuHandle vcpu);

    [LibraryImport(Library, EntryPoint = "kvs_vcpu_get_stats")]
    internal static partial int VcpuGetStats(VcpuHandle vcpu, KvsVcpuStats* stats);

    [LibraryImport(Library, EntryPoint = "kvs_vcpu_set_trace")]
    internal static partial int VcpuSetTrace(VcpuHandle vcpu, uint entries);

    [LibraryImport(Library, EntryPoint = "kvs_vcpu_read_trace")]
    internal static partial int VcpuReadTrace(VcpuHandle vcpu, TraceEntry* entries, uint count);
}
