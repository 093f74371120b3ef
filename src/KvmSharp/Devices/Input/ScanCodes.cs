namespace KvmSharp.Devices;

// IBM Personal System/2 Hardware Interface Technical Reference, "Keyboards (101- and 102-Key)", "Scan Codes"; the translation
// is that of the controller, "Scan Code Translation".

internal static class ScanCodes
{
    public const byte Extended = 0xe0;
    public const byte Break = 0xf0; // prefix in set 2
    public const byte Set1Break = 0x80;

    // From a code of set 2 to that of set 1.
    private static ReadOnlySpan<byte> Translation =>
    [
        0xff, 0x43, 0x41, 0x3f, 0x3d, 0x3b, 0x3c, 0x58, 0x64, 0x44, 0x42, 0x40, 0x3e, 0x0f, 0x29, 0x59,
        0x65, 0x38, 0x2a, 0x70, 0x1d, 0x10, 0x02, 0x5a, 0x66, 0x71, 0x2c, 0x1f, 0x1e, 0x11, 0x03, 0x5b,
        0x67, 0x2e, 0x2d, 0x20, 0x12, 0x05, 0x04, 0x5c, 0x68, 0x39, 0x2f, 0x21, 0x14, 0x13, 0x06, 0x5d,
        0x69, 0x31, 0x30, 0x23, 0x22, 0x15, 0x07, 0x5e, 0x6a, 0x72, 0x32, 0x24, 0x16, 0x08, 0x09, 0x5f,
        0x6b, 0x33, 0x25, 0x17, 0x18, 0x0b, 0x0a, 0x60, 0x6c, 0x34, 0x35, 0x26, 0x27, 0x19, 0x0c, 0x61,
        0x6d, 0x73, 0x28, 0x74, 0x1a, 0x0d, 0x62, 0x6e, 0x3a, 0x36, 0x1c, 0x1b, 0x75, 0x2b, 0x63, 0x76,
        0x55, 0x56, 0x77, 0x78, 0x79, 0x7a, 0x0e, 0x7b, 0x7c, 0x4f, 0x7d, 0x4b, 0x47, 0x7e, 0x7f, 0x6f,
        0x52, 0x53, 0x50, 0x4c, 0x4d, 0x48, 0x01, 0x45, 0x57, 0x4e, 0x51, 0x4a, 0x37, 0x49, 0x46, 0x54,
    ];

    /// <summary>What the controller makes of a byte of the keyboard.</summary>
    public static byte Translate(byte code) => code switch
    {
        < 0x80 => Translation[code],
        0x83 => 0x41,
        0x84 => 0x54,
        _ => code,
    };

    /// <summary>The code of a key in set 2, and whether it has the prefix 0xE0. Pause and Print Screen are sequences.</summary>
    public static (byte Code, bool IsExtended) Of(Key key) => key switch
    {
        Key.A => (0x1c, false), Key.B => (0x32, false), Key.C => (0x21, false), Key.D => (0x23, false), Key.E => (0x24, false),
        Key.F => (0x2b, false), Key.G => (0x34, false), Key.H => (0x33, false), Key.I => (0x43, false), Key.J => (0x3b, false),
        Key.K => (0x42, false), Key.L => (0x4b, false), Key.M => (0x3a, false), Key.N => (0x31, false), Key.O => (0x44, false),
        Key.P => (0x4d, false), Key.Q => (0x15, false), Key.R => (0x2d, false), Key.S => (0x1b, false), Key.T => (0x2c, false),
        Key.U => (0x3c, false), Key.V => (0x2a, false), Key.W => (0x1d, false), Key.X => (0x22, false), Key.Y => (0x35, false),
        Key.Z => (0x1a, false),
        Key.D0 => (0x45, false), Key.D1 => (0x16, false), Key.D2 => (0x1e, false), Key.D3 => (0x26, false), Key.D4 => (0x25, false),
        Key.D5 => (0x2e, false), Key.D6 => (0x36, false), Key.D7 => (0x3d, false), Key.D8 => (0x3e, false), Key.D9 => (0x46, false),
        Key.Enter => (0x5a, false), Key.Escape => (0x76, false), Key.Backspace => (0x66, false), Key.Tab => (0x0d, false),
        Key.Space => (0x29, false), Key.Minus => (0x4e, false), Key.Equal => (0x55, false), Key.LeftBracket => (0x54, false),
        Key.RightBracket => (0x5b, false), Key.Backslash => (0x5d, false), Key.Semicolon => (0x4c, false),
        Key.Apostrophe => (0x52, false), Key.Grave => (0x0e, false), Key.Comma => (0x41, false), Key.Period => (0x49, false),
        Key.Slash => (0x4a, false), Key.CapsLock => (0x58, false), Key.Iso102 => (0x61, false),
        Key.F1 => (0x05, false), Key.F2 => (0x06, false), Key.F3 => (0x04, false), Key.F4 => (0x0c, false), Key.F5 => (0x03, false),
        Key.F6 => (0x0b, false), Key.F7 => (0x83, false), Key.F8 => (0x0a, false), Key.F9 => (0x01, false), Key.F10 => (0x09, false),
        Key.F11 => (0x78, false), Key.F12 => (0x07, false),
        Key.ScrollLock => (0x7e, false), Key.NumLock => (0x77, false),
        Key.Insert => (0x70, true), Key.Home => (0x6c, true), Key.PageUp => (0x7d, true), Key.Delete => (0x71, true),
        Key.End => (0x69, true), Key.PageDown => (0x7a, true), Key.Right => (0x74, true), Key.Left => (0x6b, true),
        Key.Down => (0x72, true), Key.Up => (0x75, true),
        Key.KeypadDivide => (0x4a, true), Key.KeypadMultiply => (0x7c, false), Key.KeypadSubtract => (0x7b, false),
        Key.KeypadAdd => (0x79, false), Key.KeypadEnter => (0x5a, true), Key.KeypadDecimal => (0x71, false),
        Key.Keypad0 => (0x70, false), Key.Keypad1 => (0x69, false), Key.Keypad2 => (0x72, false), Key.Keypad3 => (0x7a, false),
        Key.Keypad4 => (0x6b, false), Key.Keypad5 => (0x73, false), Key.Keypad6 => (0x74, false), Key.Keypad7 => (0x6c, false),
        Key.Keypad8 => (0x75, false), Key.Keypad9 => (0x7d, false),
        Key.LeftControl => (0x14, false), Key.LeftShift => (0x12, false), Key.LeftAlt => (0x11, false), Key.LeftSuper => (0x1f, true),
        Key.RightControl => (0x14, true), Key.RightShift => (0x59, false), Key.RightAlt => (0x11, true),
        Key.RightSuper => (0x27, true), Key.Menu => (0x2f, true),
        _ => throw new ArgumentOutOfRangeException(nameof(key), key, "There is no such key."),
    };

    /// <summary>The bytes that a key sends in set 2 when it goes down or up.</summary>
    public static byte[] Sequence(Key key, bool isDown)
    {
        if (key == Key.Pause)
        {
            return isDown ? [0xe1, 0x14, 0x77, 0xe1, Break, 0x14, Break, 0x77] : [];
        }
        if (key == Key.PrintScreen)
        {
            return isDown ? [Extended, 0x12, Extended, 0x7c] : [Extended, Break, 0x7c, Extended, Break, 0x12];
        }
        var (code, isExtended) = Of(key);
        return (isExtended, isDown) switch
        {
            (false, true) => [code],
            (false, false) => [Break, code],
            (true, true) => [Extended, code],
            (true, false) => [Extended, Break, code],
        };
    }
}
