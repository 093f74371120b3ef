namespace KvmSharp.Devices;

// IBM Personal System/2 Hardware Interface Technical Reference, "Keyboard and Auxiliary Device Controller": "Controller
// Commands", "Status Register", "Command Byte", "Output Port".

/// <content>The register map.</content>
public sealed partial class KeyboardController
{
    private const int DataOffset = 0; // port 0x60
    private const int CommandOffset = 4; // port 0x64

    [Flags]
    private enum Status : byte
    {
        None = 0,
        OutputFull = 1 << 0,
        InputFull = 1 << 1, // never: the controller takes what it gets at once
        SystemFlag = 1 << 2,
        WasCommand = 1 << 3,
        NotInhibited = 1 << 4,
        AuxiliaryData = 1 << 5,
    }

    [Flags]
    private enum CommandByte : byte
    {
        None = 0,
        KeyboardInterrupt = 1 << 0,
        AuxiliaryInterrupt = 1 << 1,
        SystemFlag = 1 << 2,
        KeyboardDisabled = 1 << 4,
        AuxiliaryDisabled = 1 << 5,
        Translate = 1 << 6,
        All = 0x77,
    }

    [Flags]
    private enum OutputPort : byte
    {
        None = 0,
        NotReset = 1 << 0,
        A20 = 1 << 1,
        AuxiliaryFull = 1 << 5,
        KeyboardFull = 1 << 4,
        Rest = 0xcc, // the clock and data lines of both devices, at rest
    }

    private const byte ReadMemory = 0x20; // to 0x3f; the first byte is the command byte
    private const byte WriteMemory = 0x60; // to 0x7f
    private const int MemorySize = 32;
    private const byte DisableAuxiliary = 0xa7;
    private const byte EnableAuxiliary = 0xa8;
    private const byte TestAuxiliary = 0xa9;
    private const byte SelfTest = 0xaa;
    private const byte TestKeyboard = 0xab;
    private const byte DisableKeyboard = 0xad;
    private const byte EnableKeyboard = 0xae;
    private const byte ReadInputPort = 0xc0;
    private const byte ReadOutputPort = 0xd0;
    private const byte WriteOutputPort = 0xd1;
    private const byte WriteKeyboardOutput = 0xd2;
    private const byte WriteAuxiliaryOutput = 0xd3;
    private const byte WriteAuxiliary = 0xd4;
    private const byte DisableA20 = 0xdd; // not IBM's, but what later controllers have and guests use
    private const byte EnableA20 = 0xdf;
    private const byte PulseOutput = 0xf0; // to 0xff: bits 0 to 3 say which lines stay

    private const byte SelfTestPassed = 0x55;
    private const byte TestPassed = 0x00;
    private const byte InputPort = 0x80; // the keyboard is not locked
}
