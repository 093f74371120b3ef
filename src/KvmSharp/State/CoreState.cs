using System.Runtime.CompilerServices;
using System.Runtime.InteropServices;
using KvmSharp.Interop;

namespace KvmSharp;

/// <summary>What a machine's execution core holds, as sections of a saved state.</summary>
internal static unsafe class CoreState
{
    private const uint MsrTscDeadline = 0x6e0; // SDM 3A "TSC-Deadline Mode"

    internal static void SaveVcpu(Vcpu vcpu, bool hasLapic, Action<string, ReadOnlyMemory<byte>> add)
    {
        using var owned = vcpu.TakeOwnership();
        var prefix = $"vcpu{vcpu.Index}/";
        var handle = vcpu.Handle;

        KvsCoreState core;
        NativeMethods.VcpuGetCoreState(handle, &core).ThrowIfFailed("save the vCPU");
        add(prefix + "core", Bytes(core));
        Registers regs;
        NativeMethods.VcpuGetRegs(handle, &regs).ThrowIfFailed("save the registers");
        add(prefix + "regs", Bytes(regs));
        SpecialRegisters sregs;
        NativeMethods.VcpuGetSregs(handle, &sregs).ThrowIfFailed("save the special registers");
        add(prefix + "sregs", Bytes(sregs));
        KvsXsave xsave;
        NativeMethods.VcpuGetXsave(handle, &xsave).ThrowIfFailed("save the FPU");
        add(prefix + "xsave", Bytes(xsave));
        KvsXcrs xcrs;
        NativeMethods.VcpuGetXcrs(handle, &xcrs).ThrowIfFailed("save XCR0");
        add(prefix + "xcrs", Bytes(xcrs));
        KvsDebugregs debug;
        NativeMethods.VcpuGetDebugregs(handle, &debug).ThrowIfFailed("save the debug registers");
        add(prefix + "debugregs", Bytes(debug));
        add(prefix + "msrs", MemoryMarshal.AsBytes(GetMsrs(handle).AsSpan()).ToArray());
        KvsVcpuEvents events;
        NativeMethods.VcpuGetEvents(handle, &events).ThrowIfFailed("save pending events");
        add(prefix + "events", Bytes(events));
        KvsMpState mpState;
        NativeMethods.VcpuGetMpState(handle, &mpState).ThrowIfFailed("save the activity state");
        add(prefix + "mp-state", Bytes(mpState));
        if (hasLapic)
        {
            KvsLapicState lapic;
            NativeMethods.VcpuGetLapic(handle, &lapic).ThrowIfFailed("save the local APIC");
            add(prefix + "lapic", Bytes(lapic));
        }
    }

    /// <summary>The count of instructions; before the clock, which depends on it in virtual time.</summary>
    internal static void LoadVcpuCount(Vcpu vcpu, MachineState state)
    {
        using var owned = vcpu.TakeOwnership();
        var core = Get<KvsCoreState>(state, $"vcpu{vcpu.Index}/core");
        Check(NativeMethods.VcpuSetCoreState(vcpu.Handle, &core), "the vCPU");
    }

    /// <summary>All else; after the clock, since timers of the local APIC count on it.</summary>
    internal static void LoadVcpu(Vcpu vcpu, bool hasLapic, MachineState state)
    {
        using var owned = vcpu.TakeOwnership();
        var prefix = $"vcpu{vcpu.Index}/";
        var handle = vcpu.Handle;

        var sregs = Get<SpecialRegisters>(state, prefix + "sregs");
        Check(NativeMethods.VcpuSetSregs(handle, &sregs), "the special registers");
        var regs = Get<Registers>(state, prefix + "regs");
        Check(NativeMethods.VcpuSetRegs(handle, &regs), "the registers");
        var xcrs = Get<KvsXcrs>(state, prefix + "xcrs");
        Check(NativeMethods.VcpuSetXcrs(handle, &xcrs), "XCR0");
        var xsave = Get<KvsXsave>(state, prefix + "xsave");
        Check(NativeMethods.VcpuSetXsave(handle, &xsave), "the FPU");
        var debug = Get<KvsDebugregs>(state, prefix + "debugregs");
        Check(NativeMethods.VcpuSetDebugregs(handle, &debug), "the debug registers");
        var msrs = GetMsrs(state, prefix + "msrs");
        SetMsrs(handle, [.. msrs.Where(m => m.Index != MsrTscDeadline)]);
        if (hasLapic)
        {
            var lapic = Get<KvsLapicState>(state, prefix + "lapic");
            Check(NativeMethods.VcpuSetLapic(handle, &lapic), "the local APIC");
        }
        // The deadline counts only in a local APIC whose timer is in that mode.
        SetMsrs(handle, [.. msrs.Where(m => m.Index == MsrTscDeadline)]);
        var events = Get<KvsVcpuEvents>(state, prefix + "events");
        Check(NativeMethods.VcpuSetEvents(handle, &events), "pending events");
        var mpState = Get<KvsMpState>(state, prefix + "mp-state");
        Check(NativeMethods.VcpuSetMpState(handle, &mpState), "the activity state");
    }

    internal static void SaveClock(VmHandle vm, Action<string, ReadOnlyMemory<byte>> add)
    {
        KvsClockData clock;
        NativeMethods.GetClock(vm, &clock).ThrowIfFailed("save the clock");
        // The host's time of day is no state of the guest.
        add("clock", BitConverter.GetBytes(clock.Clock));
    }

    internal static void LoadClock(VmHandle vm, MachineState state)
    {
        var clock = new KvsClockData { Clock = Get<ulong>(state, "clock") };
        Check(NativeMethods.SetClock(vm, &clock), "the clock");
    }

    internal static void SaveChips(VmHandle vm, Action<string, ReadOnlyMemory<byte>> add)
    {
        for (uint i = 0; i < 3; i++)
        {
            var chip = new KvsIrqchip { ChipId = i };
            NativeMethods.GetIrqchip(vm, &chip).ThrowIfFailed("save the interrupt controllers");
            add($"irqchip{i}", Bytes(chip));
        }
        KvsPitState2 pit;
        NativeMethods.GetPit2(vm, &pit).ThrowIfFailed("save the interval timer");
        add("pit", Bytes(pit));
    }

    internal static void LoadChips(VmHandle vm, MachineState state)
    {
        for (uint i = 0; i < 3; i++)
        {
            var chip = Get<KvsIrqchip>(state, $"irqchip{i}");
            if (chip.ChipId != i)
            {
                throw new MachineStateException("The saved state is damaged: an interrupt controller has a wrong number.");
            }
            Check(NativeMethods.SetIrqchip(vm, &chip), "the interrupt controllers");
        }
        var pit = Get<KvsPitState2>(state, "pit");
        Check(NativeMethods.SetPit2(vm, &pit), "the interval timer");
    }

    internal static T Get<T>(MachineState state, string name)
        where T : unmanaged
    {
        var data = state.Find(name) ?? throw new MachineStateException($"The saved state has no part '{name}'.");
        return data.Length == Unsafe.SizeOf<T>()
            ? MemoryMarshal.Read<T>(data.Span)
            : throw new MachineStateException($"The saved state is damaged: its part '{name}' has a wrong length.");
    }

    private static byte[] Bytes<T>(in T value)
        where T : unmanaged => MemoryMarshal.AsBytes(new ReadOnlySpan<T>(in value)).ToArray();

    private static KvsMsrEntry[] GetMsrs(VcpuHandle handle)
    {
        uint count = 0;
        _ = NativeMethods.GetMsrIndexList(null, &count); // too small a buffer gives the number
        var indices = new uint[count];
        fixed (uint* p = indices)
        {
            NativeMethods.GetMsrIndexList(p, &count).ThrowIfFailed("list the MSRs");
        }
        var entries = new List<KvsMsrEntry>();
        foreach (var index in indices)
        {
            // One at a time: a model may lack some of them.
            var entry = new KvsMsrEntry { Index = index };
            if (NativeMethods.VcpuGetMsrs(handle, &entry, 1).ThrowIfFailed("save the MSRs") == 1)
            {
                entries.Add(entry);
            }
        }
        return [.. entries];
    }

    private static KvsMsrEntry[] GetMsrs(MachineState state, string name)
    {
        var data = state.Find(name) ?? throw new MachineStateException($"The saved state has no part '{name}'.");
        if (data.Length % sizeof(KvsMsrEntry) != 0)
        {
            throw new MachineStateException($"The saved state is damaged: its part '{name}' has a wrong length.");
        }
        return MemoryMarshal.Cast<byte, KvsMsrEntry>(data.Span).ToArray();
    }

    private static void SetMsrs(VcpuHandle handle, KvsMsrEntry[] entries)
    {
        fixed (KvsMsrEntry* p = entries)
        {
            var done = NativeMethods.VcpuSetMsrs(handle, p, (uint)entries.Length);
            Check(done, "the MSRs");
            if (done != entries.Length)
            {
                throw new MachineStateException($"The saved state does not fit: this machine does not take MSR 0x{entries[done].Index:x}.");
            }
        }
    }

    private static void Check(int result, string what)
    {
        if (result < 0)
        {
            var cause = NativeResult.ToException(result, $"load {what}");
            throw new MachineStateException($"The saved state does not fit this machine: {what} cannot be loaded.", cause);
        }
    }
}
