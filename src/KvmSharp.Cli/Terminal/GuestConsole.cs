namespace KvmSharp.Cli.Terminal;

/// <summary>
/// Standard input on its way to the guest. On a terminal it looks for Ctrl-A sequences; from a pipe
/// or file every byte is the guest's, but none is read before <paramref name="ready"/> is set: a driver
/// that starts up discards what a serial port has received by then.
/// </summary>
internal sealed class GuestInput(Stream input, bool watchEscapes, Action<HostRequest> onRequest, WaitHandle? ready) : Stream
{
    private readonly EscapeFilter _filter = new();

    public override bool CanRead => true;

    public override bool CanSeek => false;

    public override bool CanWrite => false;

    public override long Length => throw new NotSupportedException();

    public override long Position
    {
        get => throw new NotSupportedException();
        set => throw new NotSupportedException();
    }

    public override int Read(Span<byte> buffer)
    {
        if (!watchEscapes || buffer.Length < 2)
        {
            ready?.WaitOne();
            return input.Read(buffer);
        }

        Span<byte> typed = stackalloc byte[Math.Min(buffer.Length - 1, 256)];
        while (true)
        {
            int count = input.Read(typed);
            if (count <= 0)
            {
                return 0;
            }

            HostRequest request = _filter.Filter(typed[..count], buffer, out int forGuest);
            if (request != HostRequest.None)
            {
                onRequest(request);
            }

            if (forGuest > 0)
            {
                return forGuest;
            }
        }
    }

    public override int Read(byte[] buffer, int offset, int count) => Read(buffer.AsSpan(offset, count));

    public override void Flush()
    {
    }

    public override long Seek(long offset, SeekOrigin origin) => throw new NotSupportedException();

    public override void SetLength(long value) => throw new NotSupportedException();

    public override void Write(byte[] buffer, int offset, int count) => throw new NotSupportedException();
}

/// <summary>
/// The guest's output on its way to standard output; tells when nobody reads it any more, and when
/// <paramref name="awaited"/> has come by.
/// </summary>
internal sealed class GuestOutput(Stream output, Action<string> onBroken, byte[] awaited, EventWaitHandle? seen) : Stream
{
    private bool _broken;
    private int _matched;

    public override bool CanRead => false;

    public override bool CanSeek => false;

    public override bool CanWrite => true;

    public override long Length => throw new NotSupportedException();

    public override long Position
    {
        get => throw new NotSupportedException();
        set => throw new NotSupportedException();
    }

    public override void Write(ReadOnlySpan<byte> buffer)
    {
        Watch(buffer);
        if (_broken)
        {
            return;
        }

        try
        {
            output.Write(buffer);
        }
        catch (IOException exception)
        {
            _broken = true;
            onBroken(exception.Message);
        }
    }

    public override void Write(byte[] buffer, int offset, int count) => Write(buffer.AsSpan(offset, count));

    public override void Flush()
    {
    }

    public override int Read(byte[] buffer, int offset, int count) => throw new NotSupportedException();

    public override long Seek(long offset, SeekOrigin origin) => throw new NotSupportedException();

    public override void SetLength(long value) => throw new NotSupportedException();

    // The awaited text starts with a character that it has nowhere else, so that a mismatch can only
    // be the start of a new match.
    private void Watch(ReadOnlySpan<byte> buffer)
    {
        for (int i = 0; i < buffer.Length && _matched < awaited.Length; i++)
        {
            _matched = buffer[i] == awaited[_matched] ? _matched + 1 : buffer[i] == awaited[0] ? 1 : 0;
            if (_matched == awaited.Length)
            {
                seen?.Set();
            }
        }
    }
}
