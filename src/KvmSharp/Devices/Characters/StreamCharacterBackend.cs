namespace KvmSharp.Devices;

/// <summary>Connects a guest's serial port or console to streams of the host.</summary>
public sealed class StreamCharacterBackend : ICharacterBackend, IDisposable
{
    private readonly Stream _output;
    private readonly Stream? _input;
    private readonly object _gate = new();
    private byte[] _pending = [];
    private int _start;
    private bool _disposed;

    /// <summary>Connects two streams. Disposing the backend leaves them open.</summary>
    /// <param name="output">Where output goes; flushed after each write.</param>
    /// <param name="input">Where input comes from; <see langword="null"/> for none. A background thread reads it.</param>
    public StreamCharacterBackend(Stream output, Stream? input = null)
    {
        ArgumentNullException.ThrowIfNull(output);
        _output = output;
        _input = input;
        if (input is not null)
        {
            new Thread(ReadInput) { IsBackground = true, Name = "character input" }.Start();
        }
    }

    /// <inheritdoc/>
    public event Action? InputAvailable;

    /// <summary>Raised on the reading thread when the input has come to its end.</summary>
    public event Action? InputEnded;

    /// <summary>A backend on the standard streams of the process.</summary>
    public static StreamCharacterBackend ForStandardStreams() => new(Console.OpenStandardOutput(), Console.OpenStandardInput());

    /// <inheritdoc/>
    public void Write(ReadOnlySpan<byte> data)
    {
        try
        {
            _output.Write(data);
            _output.Flush();
        }
        catch (IOException)
        {
            // The reader of a pipe is gone; a serial line without listener loses its characters too.
        }
    }

    /// <inheritdoc/>
    public int Read(Span<byte> buffer)
    {
        lock (_gate)
        {
            var count = Math.Min(buffer.Length, _pending.Length - _start);
            _pending.AsSpan(_start, count).CopyTo(buffer);
            _start += count;
            if (_start == _pending.Length)
            {
                Monitor.PulseAll(_gate);
            }
            return count;
        }
    }

    /// <summary>Stops taking input; a read under way ends with the stream.</summary>
    public void Dispose()
    {
        lock (_gate)
        {
            _disposed = true;
            Monitor.PulseAll(_gate);
        }
    }

    // Reads on only when the guest has taken what was read, so that a long input waits in its stream.
    private void ReadInput()
    {
        var buffer = new byte[4096];
        try
        {
            int count;
            while ((count = _input!.Read(buffer)) > 0)
            {
                lock (_gate)
                {
                    _pending = buffer[..count];
                    _start = 0;
                }
                InputAvailable?.Invoke();
                lock (_gate)
                {
                    while (_start < _pending.Length && !_disposed)
                    {
                        Monitor.Wait(_gate);
                    }
                    if (_disposed)
                    {
                        return;
                    }
                }
            }
        }
        catch (Exception e) when (e is IOException or ObjectDisposedException)
        {
            // A closed stream is the end of the input.
        }
        InputEnded?.Invoke();
    }
}
