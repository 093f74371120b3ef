using KvmSharp.Devices.Virtio;

namespace KvmSharp.Tests.Devices.Virtio;

/// <summary>A buffer of a chain: an address and a length, for the device to read or to write.</summary>
internal readonly record struct Buffer(ulong Address, uint Length, bool Writable);

/// <summary>
/// A driver in the test: it has a machine's memory, negotiates with a device directly, builds rings and looks at what comes
/// back. The machine has no processor and a virtual clock, so that devices work at once.
/// </summary>
internal sealed class VirtioDriver : IVirtioTransport, IDisposable
{
    public const ulong AllFeatures = ulong.MaxValue;
    private const ulong RingArea = 0x10_0000;
    private const ulong RingStep = 0x1_0000;
    private const ulong BufferArea = 0x80_0000;

    private ulong _nextBuffer = BufferArea;

    public VirtioDriver(VirtioDevice device, ulong features = AllFeatures, int queueSize = 16, bool start = true)
    {
        Device = device;
        Machine = new VirtualMachine(new VirtualMachineOptions { MemorySize = 32 << 20, VcpuCount = 0, Clock = ClockMode.Virtual });
        device.Attach(Machine, this);
        Rings = [.. device.Queues.Select(q => new Ring(this, q.Index, Math.Min(queueSize, q.MaxSize)))];
        if (start)
        {
            Negotiate(features);
            foreach (var ring in Rings)
            {
                ring.Enable();
            }
            Ready();
        }
    }

    public VirtioDevice Device { get; }

    public VirtualMachine Machine { get; }

    public GuestMemory Memory => Machine.Memory;

    public Ring[] Rings { get; }

    public int[] QueueSignals { get; } = new int[80];

    public int ConfigSignals { get; private set; }

    public bool NeedsReset => (Device.Status & VirtioStatus.NeedsReset) != 0;

    public void SignalQueue(int queue) => QueueSignals[queue]++;

    public void SignalConfigChange() => ConfigSignals++;

    public void Negotiate(ulong features = AllFeatures)
    {
        Device.SetStatus(VirtioStatus.None);
        Device.SetStatus(VirtioStatus.Acknowledge | VirtioStatus.Driver);
        Device.SetDriverFeatures(ulong.MaxValue, features & Device.OfferedFeatures);
        Device.SetStatus(VirtioStatus.Acknowledge | VirtioStatus.Driver | VirtioStatus.FeaturesOk);
    }

    public void Ready() => Device.SetStatus(Device.Status | VirtioStatus.DriverOk);

    /// <summary>Lets put-off work go on, as a vCPU between two instructions would.</summary>
    public void RunTimers() => Machine.Clock.RunDueTimers();

    public ulong Allocate(uint length)
    {
        var address = _nextBuffer;
        _nextBuffer += (length + 63) & ~63UL;
        return address;
    }

    public Buffer Readable(ReadOnlySpan<byte> content)
    {
        var address = Allocate((uint)content.Length);
        Memory.Write(address, content);
        return new Buffer(address, (uint)content.Length, false);
    }

    public Buffer Writable(uint length)
    {
        var address = Allocate(length);
        Memory.Fill(address, length, 0xee);
        return new Buffer(address, length, true);
    }

    public byte[] Content(Buffer buffer)
    {
        var data = new byte[buffer.Length];
        Memory.Read(buffer.Address, data);
        return data;
    }

    public void Dispose()
    {
        Machine.Dispose();
        Device.Dispose();
    }

    /// <summary>One queue from the driver's side.</summary>
    internal sealed class Ring(VirtioDriver driver, int index, int size)
    {
        private ushort _next;
        private ushort _available;
        private ushort _seen;

        public int Size => size;

        public ulong Descriptors { get; set; } = RingArea + (ulong)index * RingStep;

        public ulong Available { get; set; } = RingArea + (ulong)index * RingStep + 0x8000;

        public ulong Used { get; set; } = RingArea + (ulong)index * RingStep + 0xc000;

        public ushort AvailableIndex => _available;

        public ushort UsedIndex => driver.Memory.Read<ushort>(Used + 2);

        public ushort AvailableEvent => driver.Memory.Read<ushort>(Used + 4 + 8UL * (uint)size);

        public void Enable(int? otherSize = null)
        {
            driver.Memory.Fill(RingArea + (ulong)index * RingStep, RingStep, 0);
            _next = _available = _seen = 0;
            driver.Device.ChangeQueue(index, q =>
            {
                q.SetSize(otherSize ?? size);
                q.SetDescriptors(Descriptors);
                q.SetAvailable(Available);
                q.SetUsed(Used);
                q.Enable();
            });
        }

        public void WriteDescriptor(int at, ulong address, uint length, int flags, int next, ulong? table = null)
        {
            var target = (table ?? Descriptors) + 16UL * (uint)at;
            driver.Memory.Write(target, address);
            driver.Memory.Write(target + 8, length);
            driver.Memory.Write(target + 12, (ushort)flags);
            driver.Memory.Write(target + 14, (ushort)next);
        }

        /// <summary>Makes a chain available, without a notification.</summary>
        public int Add(params ReadOnlySpan<Buffer> buffers)
        {
            var head = _next;
            for (var i = 0; i < buffers.Length; i++)
            {
                var last = i == buffers.Length - 1;
                WriteDescriptor((head + i) % size, buffers[i].Address, buffers[i].Length,
                    (buffers[i].Writable ? 2 : 0) | (last ? 0 : 1), (head + i + 1) % size);
            }
            _next = (ushort)((head + buffers.Length) % size);
            Offer(head);
            return head;
        }

        /// <summary>The same through an indirect table.</summary>
        public int AddIndirect(params ReadOnlySpan<Buffer> buffers)
        {
            var table = driver.Allocate((uint)buffers.Length * 16);
            for (var i = 0; i < buffers.Length; i++)
            {
                WriteDescriptor(i, buffers[i].Address, buffers[i].Length, (buffers[i].Writable ? 2 : 0) | (i == buffers.Length - 1 ? 0 : 1), i + 1, table);
            }
            var head = _next;
            WriteDescriptor(head, table, (uint)buffers.Length * 16, 4, 0);
            _next = (ushort)((head + 1) % size);
            Offer(head);
            return head;
        }

        /// <summary>Puts a head into the available ring.</summary>
        public void Offer(int head)
        {
            driver.Memory.Write(Available + 4 + 2UL * (uint)(_available % size), (ushort)head);
            SetAvailableIndex((ushort)(_available + 1));
        }

        public void SetAvailableIndex(ushort value)
        {
            _available = value;
            driver.Memory.Write(Available + 2, value);
        }

        public void SetUsedEvent(ushort value) => driver.Memory.Write(Available + 4 + 2UL * (uint)size, value);

        public void Notify() => driver.Device.Notify();

        /// <summary>The next chain that has come back: its head and the number of bytes written.</summary>
        public (int Head, uint Written)? Take()
        {
            if (_seen == UsedIndex)
            {
                return null;
            }
            var element = Used + 4 + 8UL * (uint)(_seen % size);
            _seen++;
            return ((int)driver.Memory.Read<uint>(element), driver.Memory.Read<uint>(element + 4));
        }

        /// <summary>Offers a chain, notifies, and expects it back.</summary>
        public uint Exchange(params ReadOnlySpan<Buffer> buffers)
        {
            var head = Add(buffers);
            Notify();
            for (var i = 0; i < 1000 && _seen == UsedIndex; i++)
            {
                driver.RunTimers();
            }
            var back = Take();
            Assert.NotNull(back);
            Assert.Equal(head, back.Value.Head);
            return back.Value.Written;
        }
    }
}
