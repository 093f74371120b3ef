using KvmSharp.Interop;

namespace KvmSharp.Firmware;

/// <summary>
/// What a PC BIOS leaves running for the program that it starts, for kernels that are loaded without one and fall back to
/// real mode: interrupt controllers with their vectors, the timer at 18.2 Hz, and handlers that acknowledge and return, at the
/// addresses where every BIOS has them. Specification: IBM PC/AT Technical Reference, "System BIOS"; Phoenix System BIOS for IBM
/// PCs, "Compatibility Table".
/// </summary>
internal static class LegacyBios
{
    private const uint TimerHandler = 0xf_fea5; // INT 08H
    private const uint DummyHandler = 0xf_ff53; // IRET
    private const int FirstVector = 0x08;
    private const int SecondVector = 0x70;

    // push ax; mov al, 20h (non-specific EOI); out 20h, al; pop ax; iret
    private static readonly byte[] AcknowledgeFirst = [0x50, 0xb0, 0x20, 0xe6, 0x20, 0x58, 0xcf];
    private static readonly byte[] Return = [0xcf];

    /// <summary>Puts handlers and vectors into memory.</summary>
    /// <param name="memory">The memory of a PC.</param>
    internal static void InstallHandlers(GuestMemory memory)
    {
        memory.Write(TimerHandler, AcknowledgeFirst);
        memory.Write(DummyHandler, Return);
        for (var vector = 0; vector < 0x78; vector++)
        {
            var isIrq = vector is >= FirstVector and < FirstVector + 8;
            memory.Write((GuestAddress)(ulong)(vector * 4), 0xf000_0000 | (ushort)(isIrq ? TimerHandler : DummyHandler));
        }
    }

    /// <summary>Starts controllers and timer. Before the machine starts.</summary>
    /// <param name="vm">The machine.</param>
    internal static unsafe void StartTimer(VmHandle vm)
    {
        // What the core keeps in the reserved words of the timer's image.
        const int ReservedNextCount = 0;
        const int ReservedBits = 3;
        const uint ChannelHasNoCount = 1;
        const byte MaskAllButTimerAndCascade = 0xfa;
        for (uint id = 0; id < 2; id++)
        {
            var chip = new KvsIrqchip { ChipId = id };
            NativeMethods.GetIrqchip(vm, &chip).ThrowIfFailed("set up the interrupt controllers");
            chip.Pic.IrqBase = (byte)(id == 0 ? FirstVector : SecondVector);
            chip.Pic.Imr = id == 0 ? MaskAllButTimerAndCascade : (byte)0xff;
            chip.Pic.Init4 = 1;
            NativeMethods.SetIrqchip(vm, &chip).ThrowIfFailed("set up the interrupt controllers");
        }
        KvsPitState2 pit;
        NativeMethods.GetPit2(vm, &pit).ThrowIfFailed("set up the interval timer");
        pit.Channels[0] = new KvsPitChannelState { Count = 0x1_0000, RwMode = 3, ReadState = 3, WriteState = 3, Mode = 3, Gate = 1 };
        pit.Reserved[ReservedNextCount] = 0x1_0000;
        pit.Reserved[ReservedBits] &= ~ChannelHasNoCount;
        NativeMethods.SetPit2(vm, &pit).ThrowIfFailed("set up the interval timer");
    }
}
