using System.Text;

namespace KvmSharp.Devices;

/// <summary>Keeps output in memory and gives input that the program sends. All members are callable from any thread.</summary>
public sealed class MemoryCharacterBackend : ICharacterBackend
{
    private readonly object _gate = new();
    private readonly MemoryStream _output = new();
    private readonly Queue<byte> _input = new();
    private readonly int _maxOutput;
    private long _dropped;

    /// <summary>Creates a backend without output and input.</summary>
    /// <param name="maxOutput">How many bytes of output are kept. A guest can write without end; what comes after is dropped.</param>
    public MemoryCharacterBackend(int maxOutput = 64 << 20)
    {
        ArgumentOutOfRangeException.ThrowIfNegative(maxOutput);
        _maxOutput = maxOutput;
    }

    /// <inheritdoc/>
    public event Action? InputAvailable;

    /// <summary>Raised on the vCPU thread after output has arrived.</summary>
    public event Action<ReadOnlyMemory<byte>>? OutputWritten;

    /// <summary>How many bytes of output were dropped because of the limit.</summary>
    public long DroppedBytes
    {
        get
        {
            lock (_gate)
            {
                return _dropped;
            }
        }
    }

    /// <summary>All output so far, up to the limit.</summary>
    public byte[] GetOutput()
    {
        lock (_gate)
        {
            return _output.ToArray();
        }
    }

    /// <summary>All output so far, read as UTF-8.</summary>
    public string GetOutputText()
    {
        lock (_gate)
        {
            return Encoding.UTF8.GetString(_output.GetBuffer(), 0, (int)_output.Length);
        }
    }

    /// <summary>Sends input to the guest.</summary>
    /// <param name="data">The bytes.</param>
    public void SendInput(ReadOnlySpan<byte> data)
    {
        lock (_gate)
        {
            foreach (var b in data)
            {
                _input.Enqueue(b);
            }
        }
        InputAvailable?.Invoke();
    }

    /// <summary>Sends text to the guest, as UTF-8.</summary>
    /// <param name="text">The text.</param>
    public void SendInput(string text) => SendInput(Encoding.UTF8.GetBytes(text));

    /// <summary>Waits until the output contains a text.</summary>
    /// <param name="text">The text.</param>
    /// <param name="timeout">How long to wait, on the host's clock.</param>
    /// <param name="start">Where to start looking, in bytes of the output.</param>
    /// <returns>The position after the text, or -1 if it did not come in time.</returns>
    public int WaitForOutput(string text, TimeSpan timeout, int start = 0)
    {
        ArgumentOutOfRangeException.ThrowIfNegative(start);
        var wanted = Encoding.UTF8.GetBytes(text);
        var deadline = Environment.TickCount64 + (long)timeout.TotalMilliseconds;
        lock (_gate)
        {
            while (true)
            {
                var output = _output.GetBuffer().AsSpan(0, (int)_output.Length);
                if (start < output.Length)
                {
                    var found = output[start..].IndexOf(wanted);
                    if (found >= 0)
                    {
                        return start + found + wanted.Length;
                    }
                    start = Math.Max(start, output.Length - wanted.Length + 1);
                }
                var left = deadline - Environment.TickCount64;
                if (left <= 0 || !Monitor.Wait(_gate, (int)Math.Min(left, int.MaxValue)))
                {
                    if (Environment.TickCount64 >= deadline)
                    {
                        return -1;
                    }
                }
            }
        }
    }

    /// <inheritdoc/>
    public void Write(ReadOnlySpan<byte> data)
    {
        lock (_gate)
        {
            var kept = Math.Min(data.Length, _maxOutput - (int)_output.Length);
            _output.Write(data[..kept]);
            _dropped += data.Length - kept;
            Monitor.PulseAll(_gate);
        }
        OutputWritten?.Invoke(data.ToArray());
    }

    /// <inheritdoc/>
    public int Read(Span<byte> buffer)
    {
        lock (_gate)
        {
            var count = 0;
            while (count < buffer.Length && _input.TryDequeue(out var b))
            {
                buffer[count++] = b;
            }
            return count;
        }
    }
}
