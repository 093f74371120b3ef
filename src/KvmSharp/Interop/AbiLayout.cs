using System.Runtime.CompilerServices;

namespace KvmSharp.Interop;

/// <summary>The structures that cross the boundary, in the order of native/include/abi.def.</summary>
internal static class AbiLayout
{
    /// <summary>A structure's name in C and its counterpart here.</summary>
    internal static readonly IReadOnlyList<(string NativeName, Type Type, int Size)> Structures =
    [
        Row<KvsDebugExitArch>("kvs_debug_exit_arch"),
        Row<KvsRunIo>("kvs_run_io"),
        Row<KvsRunMmio>("kvs_run_mmio"),
        Row<KvsRunInternal>("kvs_run_internal"),
        Row<KvsRunSystemEvent>("kvs_run_system_event"),
        Row<KvsRun>("kvs_run"),
        Row<Registers>("kvs_regs"),
        Row<SegmentRegister>("kvs_segment"),
        Row<DescriptorTable>("kvs_dtable"),
        Row<SpecialRegisters>("kvs_sregs"),
        Row<FpuRegisters>("kvs_fpu"),
        Row<KvsXsave>("kvs_xsave"),
        Row<KvsXcr>("kvs_xcr"),
        Row<KvsXcrs>("kvs_xcrs"),
        Row<KvsMsrEntry>("kvs_msr_entry"),
        Row<CpuidEntry>("kvs_cpuid_entry2"),
        Row<KvsDebugregs>("kvs_debugregs"),
        Row<KvsGuestDebug>("kvs_guest_debug"),
        Row<KvsMpState>("kvs_mp_state"),
        Row<KvsX86Mce>("kvs_x86_mce"),
        Row<KvsVcpuEvents>("kvs_vcpu_events"),
        Row<KvsLapicState>("kvs_lapic_state"),
        Row<KvsTranslation>("kvs_translation"),
        Row<KvsCoreState>("kvs_core_state"),
        Row<KvsPicState>("kvs_pic_state"),
        Row<KvsIoapicState>("kvs_ioapic_state"),
        Row<KvsIrqchip>("kvs_irqchip"),
        Row<KvsPitChannelState>("kvs_pit_channel_state"),
        Row<KvsPitState2>("kvs_pit_state2"),
        Row<KvsIrqRoutingEntry>("kvs_irq_routing_entry"),
        Row<KvsMsi>("kvs_msi"),
        Row<KvsClockData>("kvs_clock_data"),
        Row<KvsUserspaceMemoryRegion>("kvs_userspace_memory_region"),
        Row<KvsVmConfig>("kvs_vm_config"),
        Row<KvsVcpuStats>("kvs_vcpu_stats"),
        Row<TraceEntry>("kvs_trace_entry"),
    ];

    /// <summary>Compares all sizes with the loaded library's; a test compares all offsets too.</summary>
    /// <exception cref="NativeLibraryException">One differs.</exception>
    internal static void Check()
    {
        for (var i = 0; i < Structures.Count; i++)
        {
            var native = NativeMethods.AbiSize((uint)i);
            if (native != Structures[i].Size)
            {
                throw new NativeLibraryException(
                    $"The native library does not fit this assembly: its {Structures[i].NativeName} has {native} bytes instead of {Structures[i].Size}.");
            }
        }
        if (NativeMethods.AbiSize((uint)Structures.Count) >= 0)
        {
            throw new NativeLibraryException("The native library does not fit this assembly: it has more structures.");
        }
    }

    private static (string NativeName, Type Type, int Size) Row<T>(string nativeName)
        where T : unmanaged => (nativeName, typeof(T), Unsafe.SizeOf<T>());
}
