using System.Buffers.Binary;
using System.Text;

namespace KvmSharp.Devices.Virtio;

/// <summary>A port of a virtio console.</summary>
/// <param name="Backend">The host's side.</param>
/// <param name="Name">What the guest's /dev/virtio-ports calls it: at most 64 ASCII characters, or empty.</param>
/// <param name="IsConsole">Whether the guest is to run a terminal on it; otherwise it is a plain stream of bytes.</param>
public sealed record VirtioConsolePort(ICharacterBackend Backend, string Name = "", bool IsConsole = false);

/// <summary>A console with one or several ports.</summary>
/// <param name="Ports">The ports; the first one always is a console. At most 31.</param>
public sealed record VirtioConsoleOptions(IReadOnlyList<VirtioConsolePort> Ports) : VirtioDeviceOptions
{
    /// <summary>The most ports that a console can have.</summary>
    public const int MaxPortCount = 31;

    /// <summary>The size of the terminal in characters; 0 for unknown.</summary>
    public ushort Columns { get; init; }

    /// <summary>The size of the terminal in lines; 0 for unknown.</summary>
    public ushort Rows { get; init; }

    internal override VirtioDevice Create(ClockMode clock) => new VirtioConsole(this);

    internal override void Validate()
    {
        base.Validate();
        ArgumentNullException.ThrowIfNull(Ports);
        if (Ports.Count is < 1 or > MaxPortCount)
        {
            throw new KvmSharpException(KvmSharpErrorCode.InvalidArgument, $"A console has 1 to {MaxPortCount} ports, not {Ports.Count}.");
        }
        foreach (var port in Ports)
        {
            ArgumentNullException.ThrowIfNull(port.Backend, nameof(Ports));
            if (port.Name.Length > 64 || !Ascii.IsValid(port.Name))
            {
                throw new KvmSharpException(KvmSharpErrorCode.InvalidArgument, $"The port name '{port.Name}' is not up to 64 ASCII characters.");
            }
        }
    }
}

/// <summary>A console with one or several ports. Specification: VIRTIO 1.2, "Console Device".</summary>
public sealed partial class VirtioConsole : VirtioDevice
{
    private const int QueueSize = 128;
    private const int BufferSize = 4096;

    // Messages that wait for room: as long as there are many, the guest's are not read.
    private const int PendingMax = 256;

    // Configuration
    private readonly VirtioConsoleOptions _options;

    // Wiring
    private readonly Port[] _ports;
    private readonly VirtqueueChain _chain = new();
    private readonly byte[] _buffer = new byte[BufferSize];

    // State
    private readonly Queue<byte[]> _pending = new(); // control messages for the driver
    private ushort _columns;
    private ushort _rows;

    /// <summary>Creates the console.</summary>
    /// <param name="options">Its ports.</param>
    public VirtioConsole(VirtioConsoleOptions options)
        : base(DeviceKind, "console", QueueSizes(options))
    {
        _options = options;
        _columns = options.Columns;
        _rows = options.Rows;
        _ports = [.. options.Ports.Select((port, i) => new Port(port, Queues[i == 0 ? 0 : 2 * i + 2], Queues[i == 0 ? 1 : 2 * i + 3], i == 0))];
        foreach (var port in options.Ports)
        {
            port.Backend.InputAvailable += Wake;
        }
    }

    internal override uint PciClass => 0x07_80_00; // communication controller, other

    internal override int ConfigLength => ConfigSize;

    private protected override ulong DeviceFeatures =>
        FeatureSize | FeatureEmergencyWrite | (_options.Ports.Count > 1 ? FeatureMultiplePorts : 0);

    private bool HasMultiplePorts => HasFeature(FeatureMultiplePorts);

    /// <summary>Tells the guest the size of the terminal. Callable from any thread.</summary>
    /// <param name="columns">Characters in a line.</param>
    /// <param name="rows">Lines.</param>
    public void Resize(ushort columns, ushort rows) =>
        ChangeConfig(() =>
        {
            _columns = columns;
            _rows = rows;
        });

    /// <summary>Stops the device's thread and lets go of the backends.</summary>
    /// <param name="disposing">Always true.</param>
    protected override void Dispose(bool disposing)
    {
        foreach (var port in _options.Ports)
        {
            port.Backend.InputAvailable -= Wake;
        }
        base.Dispose(disposing);
    }

    private protected override void BuildConfig(Span<byte> image)
    {
        BinaryPrimitives.WriteUInt16LittleEndian(image[ConfigColumns..], _columns);
        BinaryPrimitives.WriteUInt16LittleEndian(image[ConfigRows..], _rows);
        BinaryPrimitives.WriteUInt32LittleEndian(image[ConfigMaxPorts..], (uint)_ports.Length);
    }

    // "Device Operation": output before the driver is set up, a character at a time.
    private protected override void OnConfigWritten(int offset, ReadOnlySpan<byte> data)
    {
        if (offset == ConfigEmergencyWrite)
        {
            _ports[0].Backend.Write(data[..1]);
        }
    }

    private protected override void OnReset()
    {
        _pending.Clear();
        foreach (var port in _ports)
        {
            port.GuestOpen = false;
        }
    }

    private protected override bool Serve()
    {
        var more = false;
        if (HasMultiplePorts)
        {
            more |= ServeControl();
        }
        foreach (var port in _ports)
        {
            if (port.IsFirst || HasMultiplePorts)
            {
                more |= ServeQueue(port.Transmit, _chain, chain => Output(port, chain));
                more |= Input(port);
            }
        }
        return more;
    }

    private protected override void SaveDevice(StateWriter writer)
    {
        writer.WriteUInt16(_columns);
        writer.WriteUInt16(_rows);
        foreach (var port in _ports)
        {
            writer.WriteBoolean(port.GuestOpen);
            writer.WriteUInt16((ushort)port.InputCount);
            writer.WriteBytes(port.Input.AsSpan(0, port.InputCount));
        }
        writer.WriteUInt16((ushort)_pending.Count);
        foreach (var message in _pending)
        {
            writer.WriteByte((byte)message.Length);
            writer.WriteBytes(message);
        }
    }

    private protected override void LoadDevice(StateReader reader)
    {
        _columns = reader.ReadUInt16();
        _rows = reader.ReadUInt16();
        foreach (var port in _ports)
        {
            port.GuestOpen = reader.ReadBoolean();
            port.InputCount = reader.ReadUInt16();
            if (port.InputCount > port.Input.Length)
            {
                throw new MachineStateException("The saved state is damaged: a console holds more input than it can.");
            }
            reader.ReadBytes(port.InputCount).CopyTo(port.Input);
        }
        for (var count = reader.ReadUInt16(); count > 0; count--)
        {
            _pending.Enqueue(reader.ReadBytes(reader.ReadByte()).ToArray());
        }
    }

    private static int[] QueueSizes(VirtioConsoleOptions options)
    {
        ArgumentNullException.ThrowIfNull(options);
        options.Validate();
        // With one port the control queues are not there.
        var sizes = new int[options.Ports.Count == 1 ? 2 : 2 * options.Ports.Count + 2];
        Array.Fill(sizes, QueueSize);
        return sizes;
    }

    // Output of any length leaves in pieces; of one chain at most as much as a pass may move.
    private uint Output(Port port, VirtqueueChain chain)
    {
        var length = Math.Min(chain.ReadableLength, ByteBudget);
        for (uint done = 0; done < length;)
        {
            var data = _buffer.AsSpan(0, (int)Math.Min(BufferSize, length - done));
            chain.Read(done, data);
            port.Backend.Write(data);
            done += (uint)data.Length;
        }
        return 0;
    }

    private bool Input(Port port)
    {
        // A driver throws away what arrives at a port that nobody has open.
        if (!port.IsFirst && !port.GuestOpen && !port.IsConsole)
        {
            return false;
        }
        for (var requests = 0; requests < RequestBudget; requests++)
        {
            if (port.InputCount == 0)
            {
                port.InputCount = port.Backend.Read(port.Input);
            }
            if (port.InputCount == 0 || (!port.Receive.HasAvailable() && !port.Receive.RequestNotifications()))
            {
                return false;
            }
            port.Receive.TryTake(_chain);
            var count = (int)Math.Min((uint)port.InputCount, _chain.WritableLength);
            _chain.Write(0, port.Input.AsSpan(0, count));
            port.Receive.Return(_chain, (uint)count);
            port.Input.AsSpan(count, port.InputCount - count).CopyTo(port.Input);
            port.InputCount -= count;
        }
        return true;
    }

    private bool ServeControl()
    {
        var queue = Queues[ControlTransmitQueue];
        Span<byte> message = stackalloc byte[ControlSize];
        var requests = 0;
        do
        {
            while (_pending.Count < PendingMax && queue.HasAvailable())
            {
                if (requests++ >= RequestBudget)
                {
                    return true;
                }
                queue.TryTake(_chain);
                if (_chain.ReadableLength >= ControlSize)
                {
                    _chain.Read(0, message);
                    HandleControl(message);
                }
                queue.Return(_chain, 0);
            }
            SendPending();
        }
        while (queue.RequestNotifications() && _pending.Count < PendingMax);
        return false;
    }

    private void SendPending()
    {
        var queue = Queues[ControlReceiveQueue];
        while (_pending.TryPeek(out var message) && (queue.HasAvailable() || queue.RequestNotifications()))
        {
            queue.TryTake(_chain);
            var count = Math.Min((uint)message.Length, _chain.WritableLength);
            _chain.Write(0, message.AsSpan(0, (int)count));
            queue.Return(_chain, count);
            _pending.Dequeue();
        }
    }

    private void HandleControl(ReadOnlySpan<byte> message)
    {
        var id = BinaryPrimitives.ReadUInt32LittleEndian(message);
        var value = BinaryPrimitives.ReadUInt16LittleEndian(message[ControlValue..]);
        var kind = (ControlMessage)BinaryPrimitives.ReadUInt16LittleEndian(message[ControlEvent..]);
        if (kind == ControlMessage.DeviceReady)
        {
            for (var i = 0; value == 1 && i < _ports.Length; i++)
            {
                Post((uint)i, ControlMessage.PortAdd, 1);
            }
            return;
        }
        if (id >= _ports.Length)
        {
            return;
        }
        var port = _ports[id];
        switch (kind)
        {
            case ControlMessage.PortReady when value == 1:
                if (port.IsConsole)
                {
                    Post(id, ControlMessage.ConsolePort, 1);
                }
                if (port.Name.Length > 0)
                {
                    Post(id, ControlMessage.PortName, 1, port.Name);
                }
                Post(id, ControlMessage.PortOpen, 1); // the host's side always is
                break;
            case ControlMessage.PortOpen:
                port.GuestOpen = value == 1;
                break;
            default:
                break;
        }
    }

    private void Post(uint id, ControlMessage kind, ushort value, string name = "")
    {
        var message = new byte[ControlSize + name.Length];
        BinaryPrimitives.WriteUInt32LittleEndian(message, id);
        BinaryPrimitives.WriteUInt16LittleEndian(message.AsSpan(ControlEvent), (ushort)kind);
        BinaryPrimitives.WriteUInt16LittleEndian(message.AsSpan(ControlValue), value);
        Encoding.ASCII.GetBytes(name).CopyTo(message, ControlSize);
        _pending.Enqueue(message);
    }

    private sealed class Port(VirtioConsolePort port, Virtqueue receive, Virtqueue transmit, bool isFirst)
    {
        public ICharacterBackend Backend => port.Backend;

        public string Name => port.Name;

        public bool IsFirst => isFirst;

        public bool IsConsole => isFirst || port.IsConsole;

        public Virtqueue Receive => receive;

        public Virtqueue Transmit => transmit;

        public byte[] Input { get; } = new byte[BufferSize];

        public int InputCount { get; set; }

        public bool GuestOpen { get; set; }
    }
}
