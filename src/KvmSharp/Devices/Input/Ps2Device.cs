namespace KvmSharp.Devices;

/// <summary>What a PS/2 keyboard and a PS/2 mouse have in common: a short queue of bytes to the controller, and commands with an argument.</summary>
public abstract class Ps2Device
{
    internal const int QueueLength = 16;

    internal const byte Acknowledge = 0xfa;
    internal const byte Resend = 0xfe;
    internal const byte SelfTestPassed = 0xaa;

    private readonly Action _dataReady;
    private readonly Queue<byte> _queue = new();

    private protected Ps2Device(Lock gate, Action dataReady)
    {
        Gate = gate;
        _dataReady = dataReady;
    }

    /// <summary>The controller's lock: everything here happens under it.</summary>
    private protected Lock Gate { get; }

    private protected byte LastSent { get; private set; }

    /// <summary>The command that waits for its argument; 0 if none does.</summary>
    private protected byte PendingCommand { get; set; }

    private protected int QueueRoom => QueueLength - _queue.Count;

    /// <summary>The controller hands over a byte of the guest.</summary>
    internal void Receive(byte value)
    {
        var command = PendingCommand;
        PendingCommand = 0;
        if (command != 0)
        {
            TakeArgument(command, value);
        }
        else if (value == Resend)
        {
            Send(LastSent);
        }
        else
        {
            TakeCommand(value);
        }
    }

    /// <summary>The controller takes the next byte.</summary>
    internal bool TrySend(out byte value)
    {
        if (_queue.Count == 0)
        {
            Refill();
        }
        if (!_queue.TryDequeue(out value))
        {
            return false;
        }
        LastSent = value;
        return true;
    }

    internal virtual void Save(StateWriter writer)
    {
        writer.WriteByte(LastSent);
        writer.WriteByte(PendingCommand);
        writer.WriteByte((byte)_queue.Count);
        writer.WriteBytes(_queue.ToArray());
    }

    internal virtual void Load(StateReader reader)
    {
        LastSent = reader.ReadByte();
        PendingCommand = reader.ReadByte();
        var count = reader.ReadByte();
        if (count > QueueLength)
        {
            throw new MachineStateException("The saved state is damaged: an input device has too many bytes under way.");
        }
        _queue.Clear();
        foreach (var value in reader.ReadBytes(count))
        {
            _queue.Enqueue(value);
        }
    }

    /// <summary>The queue is empty: what had no room can come.</summary>
    private protected virtual void Refill()
    {
    }

    private protected abstract void TakeCommand(byte command);

    private protected abstract void TakeArgument(byte command, byte value);

    private protected void Send(params ReadOnlySpan<byte> bytes)
    {
        foreach (var value in bytes)
        {
            // A reply that finds no room pushes the oldest byte out: the guest has stopped reading.
            if (_queue.Count == QueueLength)
            {
                _queue.Dequeue();
            }
            _queue.Enqueue(value);
        }
    }

    private protected void ClearQueue() => _queue.Clear();

    private protected void NotifyController() => _dataReady();
}
