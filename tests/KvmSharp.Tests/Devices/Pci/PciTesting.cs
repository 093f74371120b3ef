using KvmSharp.Devices.Pci;

namespace KvmSharp.Tests.Devices.Pci;

/// <summary>A machine without processors and a bus to put functions on, driven as a guest's accesses would.</summary>
internal sealed class PciBench : IDisposable
{
    public PciBench(params ReadOnlySpan<PciDevice> devices)
    {
        Machine = new VirtualMachine(new VirtualMachineOptions { MemorySize = 1 << 20, VcpuCount = 0, Clock = ClockMode.Virtual });
        Host = new PciHost(Machine);
        foreach (var device in devices)
        {
            Host.Add(device);
        }
    }

    public VirtualMachine Machine { get; }

    public PciHost Host { get; }

    public uint ReadPorts(int device, int register, int size = 4)
    {
        Machine.Ports.Write(0xcf8, BitConverter.GetBytes(0x8000_0000u | (uint)device << 11 | (uint)register & 0xfc));
        Span<byte> data = new byte[4];
        Machine.Ports.Read(0xcfcu + ((uint)register & 3), data[..size]);
        return BitConverter.ToUInt32(data);
    }

    public void WritePorts(int device, int register, int size, uint value)
    {
        Machine.Ports.Write(0xcf8, BitConverter.GetBytes(0x8000_0000u | (uint)device << 11 | (uint)register & 0xfc));
        Machine.Ports.Write(0xcfcu + ((uint)register & 3), BitConverter.GetBytes(value).AsSpan(0, size));
    }

    public uint Read(int device, int register, int size = 4) => ReadMemory(Ecam(device, register), size);

    public void Write(int device, int register, int size, uint value) => WriteMemory(Ecam(device, register), size, value);

    public uint ReadMemory(ulong address, int size)
    {
        Span<byte> data = new byte[4];
        Machine.Mmio.Read(address, data[..size]);
        return BitConverter.ToUInt32(data);
    }

    public void WriteMemory(ulong address, int size, uint value) =>
        Machine.Mmio.Write(address, BitConverter.GetBytes(value).AsSpan(0, size));

    /// <summary>The offset of a capability, 0 without it.</summary>
    public int FindCapability(int device, byte id)
    {
        for (var at = (int)Read(device, 0x34, 1); at != 0; at = (int)Read(device, at + 1, 1))
        {
            if (Read(device, at, 1) == id)
            {
                return at;
            }
        }
        return 0;
    }

    public void Dispose() => Machine.Dispose();

    private static ulong Ecam(int device, int register) => PciHost.DefaultEcamAddress + ((ulong)device << 15) + (ulong)register;
}

/// <summary>A function with one of everything; its registers are plain memory.</summary>
internal sealed class TestFunction : PciDevice, IIoDevice
{
    private readonly byte[] _registers = new byte[0x1000];

    public TestFunction(bool msi = true, bool msix = true)
        : base(new PciIdentity(0x1234, 0xabcd, 0x05_80_01, 7, 0x1111, 0x2222))
    {
        AddMemoryBar(0, 0x1000, this);
        AddMemoryBar(2, 0x10000, this, is64Bit: true, prefetchable: true);
        AddPortBar(4, 32, this);
        AddInterruptPin();
        if (msi)
        {
            AddMsi(4);
        }
        if (msix)
        {
            AddMsix(5, 3);
        }
    }

    public override string StateName => "test-function";

    public List<(int Bar, ulong? Address)> Moves { get; } = [];

    public bool Messages => UsesMessages;

    public void Read(ulong offset, Span<byte> data) => _registers.AsSpan((int)offset & 0xfff, data.Length).CopyTo(data);

    public void Write(ulong offset, ReadOnlySpan<byte> data) => data.CopyTo(_registers.AsSpan((int)offset & 0xfff));

    public void SetLevel(bool level) => SetInterruptLevel(level);

    public void Signal(int vector) => SignalInterrupt(vector);

    public bool DmaRead(GuestAddress address, Span<byte> data) => ReadMemory(address, data);

    public bool DmaWrite(GuestAddress address, ReadOnlySpan<byte> data) => WriteMemory(address, data);

    protected override void OnBarMoved(int bar, ulong? address) => Moves.Add((bar, address));

    protected override void SaveDeviceState(StateWriter writer) => writer.WriteBytes(_registers);

    protected override void LoadDeviceState(StateReader reader) => reader.ReadBytes(_registers.Length).CopyTo(_registers);
}
