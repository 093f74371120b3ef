namespace KvmSharp.Devices;

/// <summary>The keys of a PC keyboard with 105 keys, named by what is on them in the United States.</summary>
public enum Key
{
#pragma warning disable CS1591 // the names say it
    A, B, C, D, E, F, G, H, I, J, K, L, M, N, O, P, Q, R, S, T, U, V, W, X, Y, Z,
    D0, D1, D2, D3, D4, D5, D6, D7, D8, D9,
    Enter, Escape, Backspace, Tab, Space, Minus, Equal, LeftBracket, RightBracket, Backslash, Semicolon, Apostrophe, Grave,
    Comma, Period, Slash, CapsLock,
    F1, F2, F3, F4, F5, F6, F7, F8, F9, F10, F11, F12,
    PrintScreen, ScrollLock, Pause, Insert, Home, PageUp, Delete, End, PageDown, Right, Left, Down, Up,
    NumLock, KeypadDivide, KeypadMultiply, KeypadSubtract, KeypadAdd, KeypadEnter, KeypadDecimal,
    Keypad0, Keypad1, Keypad2, Keypad3, Keypad4, Keypad5, Keypad6, Keypad7, Keypad8, Keypad9,
    LeftControl, LeftShift, LeftAlt, LeftSuper, RightControl, RightShift, RightAlt, RightSuper, Menu,
    Iso102,
#pragma warning restore CS1591
}

/// <summary>The buttons of a mouse.</summary>
[Flags]
public enum MouseButtons
{
    /// <summary>None.</summary>
    None = 0,
    /// <summary>The left button.</summary>
    Left = 1 << 0,
    /// <summary>The right button.</summary>
    Right = 1 << 1,
    /// <summary>The middle button, or the wheel pressed.</summary>
    Middle = 1 << 2,
}
