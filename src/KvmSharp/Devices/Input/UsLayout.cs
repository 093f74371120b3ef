namespace KvmSharp.Devices;

/// <summary>Where characters are on a keyboard of the United States.</summary>
internal static class UsLayout
{
    private const string Plain = "`1234567890-=[]\\;',./";
    private const string Shifted = "~!@#$%^&*()_+{}|:\"<>?";

    private static ReadOnlySpan<Key> Keys =>
    [
        Key.Grave, Key.D1, Key.D2, Key.D3, Key.D4, Key.D5, Key.D6, Key.D7, Key.D8, Key.D9, Key.D0, Key.Minus, Key.Equal,
        Key.LeftBracket, Key.RightBracket, Key.Backslash, Key.Semicolon, Key.Apostrophe, Key.Comma, Key.Period, Key.Slash,
    ];

    public static (Key Key, bool IsShifted)? Find(char character)
    {
        switch (character)
        {
            case >= 'a' and <= 'z':
                return (Key.A + (character - 'a'), false);
            case >= 'A' and <= 'Z':
                return (Key.A + (character - 'A'), true);
            case ' ':
                return (Key.Space, false);
            case '\n':
                return (Key.Enter, false);
            case '\t':
                return (Key.Tab, false);
            case '\b':
                return (Key.Backspace, false);
            case '\u001b':
                return (Key.Escape, false);
            default:
                break;
        }
        if (Plain.IndexOf(character, StringComparison.Ordinal) is >= 0 and var plain)
        {
            return (Keys[plain], false);
        }
        return Shifted.IndexOf(character, StringComparison.Ordinal) is >= 0 and var shifted ? (Keys[shifted], true) : null;
    }
}
