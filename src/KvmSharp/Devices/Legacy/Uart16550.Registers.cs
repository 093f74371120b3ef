namespace KvmSharp.Devices;

// National Semiconductor PC16550D, "Registers". Offsets from the first port.

/// <content>The register map.</content>
public sealed partial class Uart16550
{
    private const int FifoSize = 16;

    // 1.8432 MHz crystal: the divisor counts sixteenths of a bit.
    private const ulong CrystalFrequency = 1_843_200;

    private enum Register
    {
        ReceiverBufferOrTransmitterHolding = 0, // divisor latch, low byte, with DLAB
        InterruptEnable = 1, // divisor latch, high byte, with DLAB
        InterruptIdentOrFifoControl = 2,
        LineControl = 3,
        ModemControl = 4,
        LineStatus = 5,
        ModemStatus = 6,
        Scratch = 7,
    }

    [Flags]
    private enum InterruptEnable : byte
    {
        None = 0,
        ReceivedData = 1 << 0,
        TransmitterEmpty = 1 << 1,
        LineStatus = 1 << 2,
        ModemStatus = 1 << 3,
        All = 0x0f,
    }

    // "Interrupt Identification Register", in the order of priority.
    private enum InterruptCause : byte
    {
        LineStatus = 0x06,
        ReceivedData = 0x04,
        CharacterTimeout = 0x0c,
        TransmitterEmpty = 0x02,
        ModemStatus = 0x00,
        None = 0x01,
    }

    [Flags]
    private enum FifoControl : byte
    {
        None = 0,
        Enable = 1 << 0,
        ResetReceiver = 1 << 1,
        ResetTransmitter = 1 << 2,
        TriggerMask = 0xc0,
    }

    [Flags]
    private enum LineControl : byte
    {
        None = 0,
        WordLengthMask = 0x03,
        TwoStopBits = 1 << 2,
        ParityEnable = 1 << 3,
        DivisorLatchAccess = 1 << 7,
    }

    [Flags]
    private enum ModemControl : byte
    {
        None = 0,
        DataTerminalReady = 1 << 0,
        RequestToSend = 1 << 1,
        Out1 = 1 << 2,
        Out2 = 1 << 3, // on a PC the gate of the interrupt
        Loopback = 1 << 4,
        All = 0x1f,
    }

    [Flags]
    private enum LineStatus : byte
    {
        None = 0,
        DataReady = 1 << 0,
        OverrunError = 1 << 1,
        ParityError = 1 << 2,
        FramingError = 1 << 3,
        BreakInterrupt = 1 << 4,
        TransmitterHoldingEmpty = 1 << 5,
        TransmitterEmpty = 1 << 6,
        ErrorInFifo = 1 << 7,
        CharacterErrors = ParityError | FramingError | BreakInterrupt,
        Errors = OverrunError | CharacterErrors,
    }

    [Flags]
    private enum ModemStatus : byte
    {
        None = 0,
        DeltaClearToSend = 1 << 0,
        DeltaDataSetReady = 1 << 1,
        TrailingEdgeRing = 1 << 2,
        DeltaCarrierDetect = 1 << 3,
        Deltas = 0x0f,
        ClearToSend = 1 << 4,
        DataSetReady = 1 << 5,
        Ring = 1 << 6,
        CarrierDetect = 1 << 7,
    }
}
