namespace KvmSharp.Cli.Terminal;

/// <summary>What a key after Ctrl-A asks the host for.</summary>
internal enum HostRequest
{
    None,
    Quit,
    Help,
}

/// <summary>
/// Watches typed bytes for Ctrl-A: Ctrl-A x leaves, Ctrl-A h helps, Ctrl-A Ctrl-A (or Ctrl-A a)
/// sends one Ctrl-A. Everything else goes to the guest unchanged.
/// </summary>
internal sealed class EscapeFilter
{
    private const byte ControlA = 1;

    private bool _afterEscape;

    /// <summary>Copies the guest's share of <paramref name="typed"/> to the front of <paramref name="toGuest"/>.</summary>
    /// <param name="typed">What was read from the terminal.</param>
    /// <param name="toGuest">Room for one byte more than <paramref name="typed"/> has.</param>
    /// <param name="count">How many bytes are for the guest.</param>
    /// <returns>The last request found; nothing behind a <see cref="HostRequest.Quit"/> is looked at.</returns>
    public HostRequest Filter(ReadOnlySpan<byte> typed, Span<byte> toGuest, out int count)
    {
        HostRequest request = HostRequest.None;
        count = 0;
        foreach (byte key in typed)
        {
            if (!_afterEscape)
            {
                if (key == ControlA)
                {
                    _afterEscape = true;
                }
                else
                {
                    toGuest[count++] = key;
                }

                continue;
            }

            _afterEscape = false;
            switch (key)
            {
                case (byte)'x' or (byte)'X':
                    return HostRequest.Quit;
                case (byte)'h' or (byte)'?':
                    request = HostRequest.Help;
                    break;
                case ControlA or (byte)'a':
                    toGuest[count++] = ControlA;
                    break;
                default:
                    toGuest[count++] = ControlA;
                    toGuest[count++] = key;
                    break;
            }
        }

        return request;
    }
}
