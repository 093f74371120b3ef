using KvmSharp.Devices;
using KvmSharp.Devices.Pci;

namespace KvmSharp.Tests.Devices.Pci;

public sealed class PciTests
{
    private const uint MemoryAndMaster = 0x6;
    private const byte Msi = 5;
    private const byte Msix = 0x11;

    [Fact]
    public void BothWaysLeadToTheSameRegisters()
    {
        using var bench = new PciBench(new TestFunction());
        Assert.Equal(0x29c0_8086u, bench.ReadPorts(0, 0));
        Assert.Equal(0xabcd_1234u, bench.ReadPorts(1, 0));
        Assert.Equal(0xabcd_1234u, bench.Read(1, 0));
        Assert.Equal(0xabcdu, bench.ReadPorts(1, 2, 2));
        Assert.Equal(0xabu, bench.ReadPorts(1, 3, 1));
        Assert.Equal(0x0580_0107u, bench.Read(1, 8));
        Assert.Equal(0x2222_1111u, bench.Read(1, 0x2c));
        Assert.Equal(1u, bench.Read(1, 0x3d, 1));
        bench.WritePorts(1, 0x3c, 1, 0x5a);
        Assert.Equal(0x5au, bench.Read(1, 0x3c, 1));
        bench.Write(1, 0, 4, 0);
        Assert.Equal(0xabcd_1234u, bench.Read(1, 0));
    }

    [Fact]
    public void NothingAnswersWhereNothingIs()
    {
        using var bench = new PciBench(new TestFunction());
        Assert.Equal(0xffff_ffffu, bench.ReadPorts(2, 0));
        Assert.Equal(0xffff_ffffu, bench.Read(2, 0));
        Assert.Equal(0xffff_ffffu, bench.ReadMemory(PciHost.DefaultEcamAddress + (1 << 20), 4)); // bus 1
        bench.Write(2, 4, 4, 0xffff_ffff);
        bench.Machine.Ports.Write(0xcf8, [0, 8, 0, 0]); // not enabled
        Span<byte> data = stackalloc byte[4];
        bench.Machine.Ports.Read(0xcfc, data);
        Assert.Equal(0xffff_ffffu, BitConverter.ToUInt32(data));
        Assert.Equal(0u, bench.Read(1, 0xffc)); // extended space without capabilities
    }

    [Fact]
    public void ResetControlKeepsItsPort()
    {
        using var machine = new VirtualMachine(new VirtualMachineOptions { MemorySize = 1 << 20, VcpuCount = 0 });
        var recorder = new RecordingMachine();
        _ = new PciHost(machine, new ResetControl(recorder));
        machine.Ports.Write(0xcf8, BitConverter.GetBytes(0x8000_0006));
        Assert.Empty(recorder.Requests);
        machine.Ports.Write(0xcf9, [6]);
        Assert.Equal(["reset"], recorder.Requests);
        Span<byte> data = stackalloc byte[4];
        machine.Ports.Read(0xcf8, data);
        Assert.Equal(0x8000_0004u, BitConverter.ToUInt32(data)); // the low bits select nothing
    }

    [Fact]
    public void BarsTellTheirSize()
    {
        using var bench = new PciBench(new TestFunction());
        foreach (var (register, mask) in new (int, uint)[] { (0x10, 0xffff_f000), (0x14, 0), (0x18, 0xffff_000c), (0x1c, 0xffff_ffff), (0x20, 0xffff_ffe1), (0x24, 0xffff_f000) })
        {
            bench.WritePorts(1, register, 4, 0xffff_ffff);
            Assert.Equal(mask, bench.ReadPorts(1, register));
        }
    }

    [Fact]
    public void RegistersAreWhereTheGuestPutsThem()
    {
        var function = new TestFunction();
        using var bench = new PciBench(function);
        bench.Write(1, 0x10, 4, 0xc000_0000);
        Assert.Empty(function.Moves); // decoding is off
        bench.Write(1, 4, 2, 2);
        Assert.Equal([(0, 0xc000_0000UL)], function.Moves);
        bench.WriteMemory(0xc000_0010, 4, 0x1234_5678);
        Assert.Equal(0x5678u, bench.ReadMemory(0xc000_0010, 2));
        bench.Write(1, 0x10, 4, 0xc123_4000);
        Assert.Equal(0x5678u, bench.ReadMemory(0xc123_4010, 2));
        Assert.Equal(0xffffu, bench.ReadMemory(0xc000_0010, 2));
        bench.Write(1, 0x1c, 4, 0x80); // the upper half of BAR 2
        Assert.Equal(0x5678u, bench.ReadMemory(0x80_0000_0010, 2));
        bench.Write(1, 4, 2, 1);
        Assert.Equal(0xffffu, bench.ReadMemory(0xc123_4010, 2));
        bench.Write(1, 0x20, 4, 0x1000);
        Span<byte> data = stackalloc byte[2];
        bench.Machine.Ports.Read(0x1010, data);
        Assert.Equal(0x5678, BitConverter.ToUInt16(data));
    }

    [Fact]
    public void PlacesThatMakeNoSenseHoldNothing()
    {
        var first = new TestFunction();
        var second = new TestFunction();
        using var bench = new PciBench(first, second);
        bench.Write(1, 4, 2, 3);
        bench.Write(2, 4, 2, 3);
        bench.Write(1, 0x10, 4, 0xc000_0000);
        bench.Write(2, 0x10, 4, 0xc000_0000); // taken
        Assert.DoesNotContain(second.Moves, m => m.Address is not null);
        bench.Write(1, 0x10, 4, 0xc010_0000); // and free again
        Assert.Equal((0, 0xc000_0000UL), second.Moves[^1]);
        bench.Write(2, 0x10, 4, (uint)PciHost.DefaultEcamAddress);
        Assert.Equal((0, null), second.Moves[^1]);
        bench.Write(2, 0x18, 4, 0xffff_0000);
        bench.Write(2, 0x1c, 4, 0xffff_ffff); // the last bytes of the address space
        Assert.Equal((2, 0xffff_ffff_ffff_0000UL), second.Moves[^1]);
        bench.Write(2, 0x20, 4, 0xffe0);
        Assert.Equal((4, 0xffe0UL), second.Moves[^1]);
        bench.Write(2, 0x20, 4, 0x1ffe0); // no such port
        Assert.Equal((4, null), second.Moves[^1]);
        bench.Write(2, 0x20, 4, 0xcf8); // the bus's own
        Assert.Equal((4, null), second.Moves[^1]);
    }

    [Fact]
    public void EcamCanBeMovedAndSwitchedOff()
    {
        using var bench = new PciBench();
        bench.WritePorts(0, 0x60, 4, 0xd000_0005); // 64 MiB
        Assert.Equal(0xffff_ffffu, bench.Read(0, 0));
        Assert.Equal(0x29c0_8086u, bench.ReadMemory(0xd000_0000, 4));
        Assert.Equal(0xffff_ffffu, bench.ReadMemory(0xd000_0000 + (64 << 20), 4));
        bench.WritePorts(0, 0x60, 4, 0);
        Assert.Equal(0xffff_ffffu, bench.ReadMemory(0xd000_0000, 4));
    }

    [Fact]
    public void AssignedResourcesDoNotOverlap()
    {
        using var bench = new PciBench(new TestFunction(), new TestFunction(), new TestFunction());
        bench.Host.AssignResources();
        var ranges = bench.Host.Devices.SelectMany(d => d.Bars).Select(b => (b.IsIo, b.MappedAt, b.Size)).ToList();
        Assert.Equal(12, ranges.Count);
        Assert.All(ranges, r => Assert.True(r.MappedAt is { } at && at % r.Size == 0));
        foreach (var (isIo, at, size) in ranges)
        {
            Assert.Single(ranges, r => r.IsIo == isIo && r.MappedAt < at + size && at < r.MappedAt + r.Size);
        }
        Assert.Equal(3u, bench.Read(1, 4, 2) & 7); // bus mastering is the driver's decision
        Assert.Equal(17u, bench.Read(1, 0x3c, 1));
    }

    [Fact]
    public void FunctionsOfOneDeviceAreFound()
    {
        using var bench = new PciBench();
        bench.Host.Add(new TestFunction(), new PciAddress(5));
        Assert.Equal(0u, bench.Read(5, 0x0e, 1));
        bench.Host.Add(new TestFunction(), new PciAddress(5, 3));
        Assert.Equal(0x80u, bench.Read(5, 0x0e, 1));
        Assert.Equal(0xabcd_1234u, bench.ReadMemory(PciHost.DefaultEcamAddress + (5 << 15) + (3 << 12), 4));
        Assert.Throws<KvmSharpException>(() => bench.Host.Add(new TestFunction(), new PciAddress(5, 3)));
        Assert.Throws<KvmSharpException>(() => bench.Host.Add(new TestFunction(), new PciAddress(32)));
    }

    [Fact]
    public void PinFollowsLevelCommandAndMessages()
    {
        var function = new TestFunction();
        using var bench = new PciBench(function);
        function.SetLevel(true);
        Assert.True(function.IsPinAsserted);
        Assert.Equal(0x18u, bench.Read(1, 6, 2)); // interrupt status, capabilities
        bench.Write(1, 4, 2, 0x400);
        Assert.False(function.IsPinAsserted);
        bench.Write(1, 4, 2, 0);
        Assert.True(function.IsPinAsserted);
        bench.Write(1, bench.FindCapability(1, Msix) + 2, 2, 0x8000);
        Assert.False(function.IsPinAsserted);
        Assert.True(function.Messages);
        bench.Write(1, bench.FindCapability(1, Msix) + 2, 2, 0);
        function.SetLevel(false);
        Assert.False(function.IsPinAsserted);
        Assert.Equal(0x10u, bench.Read(1, 6, 2));
    }

    // A message to an address that is no local APIC's is an ordinary write, which shows it to the test.
    [Fact]
    public void MsiHonoursMaskAndNumberOfVectors()
    {
        var function = new TestFunction(msix: false);
        using var bench = new PciBench(function);
        var at = bench.FindCapability(1, Msi);
        Assert.Equal(0x0184u, bench.Read(1, at + 2, 2));
        bench.Write(1, 4, 2, MemoryAndMaster);
        bench.Write(1, at + 4, 4, 0x8000);
        bench.Write(1, at + 12, 2, 0xabcf);
        function.Signal(1);
        Assert.Equal(0u, bench.Machine.Memory.Read<uint>(0x8000)); // not enabled
        bench.Write(1, at + 2, 2, 0x21); // four vectors
        function.Signal(2);
        Assert.Equal(0xabceu, bench.Machine.Memory.Read<uint>(0x8000));
        bench.Write(1, at + 16, 4, 8);
        function.Signal(3);
        Assert.Equal(0xabceu, bench.Machine.Memory.Read<uint>(0x8000));
        Assert.Equal(8u, bench.Read(1, at + 20));
        bench.Write(1, at + 16, 4, 0);
        Assert.Equal(0xabcfu, bench.Machine.Memory.Read<uint>(0x8000));
        Assert.Equal(0u, bench.Read(1, at + 20));
        bench.Write(1, at + 2, 2, 0x71); // more than there are
        function.Signal(1);
        Assert.Equal(0xabcdu, bench.Machine.Memory.Read<uint>(0x8000));
        bench.Write(1, at + 2, 2, 0x01); // one vector for all
        function.Signal(2);
        Assert.Equal(0xabcfu, bench.Machine.Memory.Read<uint>(0x8000));
    }

    [Fact]
    public void MsixHonoursBothMasks()
    {
        var function = new TestFunction();
        using var bench = new PciBench(function);
        var at = bench.FindCapability(1, Msix);
        const ulong Table = 0xc000_0000;
        Assert.Equal(2u, bench.Read(1, at + 2, 2));
        Assert.Equal(5u, bench.Read(1, at + 4)); // the table in BAR 5
        var pba = Table + (bench.Read(1, at + 8) & ~7u);
        bench.Write(1, 0x24, 4, (uint)Table);
        bench.Write(1, 4, 2, MemoryAndMaster);
        Assert.Equal(1u, bench.ReadMemory(Table + 12, 4)); // masked from the start
        for (var vector = 0u; vector < 3; vector++)
        {
            bench.WriteMemory(Table + 16 * vector, 4, 0x8000 + 4 * vector);
            bench.WriteMemory(Table + 16 * vector + 8, 4, 0x11 * (vector + 1));
        }
        bench.Write(1, at + 2, 2, 0x8000);
        function.Signal(1);
        function.Signal(3); // no such vector
        Assert.Equal(0u, bench.Machine.Memory.Read<uint>(0x8004));
        Assert.Equal(2u, bench.ReadMemory(pba, 4));
        bench.WriteMemory(pba, 4, 0); // read-only
        bench.WriteMemory(Table + 16 + 12, 4, 0);
        Assert.Equal(0x22u, bench.Machine.Memory.Read<uint>(0x8004));
        Assert.Equal(0u, bench.ReadMemory(pba, 4));
        bench.Write(1, at + 2, 2, 0xc000); // the whole function masked
        bench.WriteMemory(Table + 12, 4, 0);
        function.Signal(0);
        Assert.Equal(0u, bench.Machine.Memory.Read<uint>(0x8000));
        bench.Write(1, at + 2, 2, 0x8000);
        Assert.Equal(0x11u, bench.Machine.Memory.Read<uint>(0x8000));
        bench.Write(1, 4, 2, 2); // without bus mastering no message leaves
        bench.Machine.Memory.Write(0x8000, 0u);
        function.Signal(0);
        Assert.Equal(0u, bench.Machine.Memory.Read<uint>(0x8000));
    }

    [Fact]
    public void BusMastersReachMemoryOnly()
    {
        var function = new TestFunction();
        using var bench = new PciBench(function);
        bench.Host.AssignResources();
        var data = new byte[] { 1, 2, 3, 4 };
        Assert.False(function.DmaWrite(0x5000, data)); // not allowed yet
        bench.Write(1, 4, 2, MemoryAndMaster);
        Assert.True(function.DmaWrite(0x5000, data));
        var read = new byte[4];
        Assert.True(function.DmaRead(0x5000, read));
        Assert.Equal(data, read);
        var own = function.Bars[0].MappedAt!.Value;
        foreach (var address in new[] { own, PciHost.DefaultEcamAddress, 0xfee0_0000UL, (1UL << 20) - 2, ulong.MaxValue - 1 })
        {
            Assert.False(function.DmaWrite(address, data));
            Assert.False(function.DmaRead(address, read));
            Assert.All(read, b => Assert.Equal(0xff, b));
        }
        Assert.Equal(0u, bench.ReadMemory(own, 4));
    }

    [Fact]
    public void StateComesBack()
    {
        var function = new TestFunction();
        using var bench = new PciBench(function);
        bench.Host.AssignResources();
        bench.Write(1, 4, 2, 7);
        bench.WriteMemory(function.Bars[0].MappedAt!.Value, 4, 0xcafe);
        bench.Write(1, bench.FindCapability(1, Msix) + 2, 2, 0x8000);
        function.Signal(1); // pending
        var saved = bench.Host.Save();

        var other = new TestFunction();
        using var second = new PciBench(other);
        second.Host.Load(saved);
        Assert.Equal(0xcafeu, second.ReadMemory(function.Bars[0].MappedAt!.Value, 4));
        Assert.Equal(saved, second.Host.Save());
        Assert.Throws<MachineStateException>(() => second.Host.Load(saved[..^1]));
        using var third = new PciBench();
        Assert.Throws<MachineStateException>(() => third.Host.Load(saved));
        Assert.Throws<MachineStateException>(() => second.Host.Load(third.Host.Save()));
    }

    [Fact]
    public void ShapesThatDoNotExistAreRefused()
    {
        Assert.Throws<KvmSharpException>(() => new OddFunction(f => f.Memory(0, 24)));
        Assert.Throws<KvmSharpException>(() => new OddFunction(f => f.Memory(0, 8)));
        Assert.Throws<KvmSharpException>(() => new OddFunction(f => f.Memory(6, 4096)));
        Assert.Throws<KvmSharpException>(() => new OddFunction(f => f.Memory(5, 4096, true)));
        Assert.Throws<KvmSharpException>(() => new OddFunction(f =>
        {
            f.Memory(2, 4096, true);
            f.Memory(3, 4096);
        }));
        Assert.Throws<KvmSharpException>(() => new OddFunction(f => f.Ports(0, 512)));
        Assert.Throws<KvmSharpException>(() => new OddFunction(f => f.Msi(3)));
        Assert.Throws<KvmSharpException>(() => new OddFunction(f => f.Msix(2049)));
        Assert.Throws<KvmSharpException>(() => new OddFunction(f => f.Config.AddCapability(9, 193)));
        var function = new OddFunction(f => f.Memory(0, 4096));
        using var bench = new PciBench(function);
        Assert.Throws<InvalidOperationException>(() => function.Memory(1, 4096));
        Assert.Throws<InvalidOperationException>(() => bench.Host.Add(function));
    }

    // Nothing that a guest writes into configuration space may get out of it.
    [Theory]
    [InlineData(1)]
    [InlineData(2)]
    public void RandomConfigurationDoesNoHarm(int seed)
    {
        using var bench = new PciBench(new TestFunction(), new TestFunction());
        var random = new Random(seed);
        uint[] values = [0, 0xffff_ffff, 0xc000_0000, 0xe000_0000, 0xfee0_0000, 0x7, 0x3f8, 0x8001];
        for (var i = 0; i < 20_000; i++)
        {
            var value = random.Next(2) == 0 ? values[random.Next(values.Length)] : (uint)random.NextInt64(1L << 32);
            var size = 1 << random.Next(3);
            bench.WritePorts(random.Next(4), random.Next(0x100 / size) * size, size, value);
            bench.ReadPorts(random.Next(4), random.Next(0x40) * 4);
        }
    }

    private sealed class OddFunction : PciDevice, IIoDevice
    {
        public OddFunction(Action<OddFunction> build)
            : base(new PciIdentity(1, 2, 3)) => build(this);

        public override string StateName => "odd";

        public void Memory(int bar, ulong size, bool is64Bit = false) => AddMemoryBar(bar, size, this, is64Bit);

        public void Ports(int bar, int size) => AddPortBar(bar, size, this);

        public void Msi(int vectors) => AddMsi(vectors);

        public void Msix(int vectors) => AddMsix(0, vectors);

        public void Read(ulong offset, Span<byte> data)
        {
        }

        public void Write(ulong offset, ReadOnlySpan<byte> data)
        {
        }
    }
}
