using KvmSharp.Devices.Pci;
using KvmSharp.Devices.Virtio;
using KvmSharp.Tests.Devices.Pci;

namespace KvmSharp.Tests.Devices.Virtio;

public sealed class VirtioTransportTests
{
    private const ulong Descriptors = 0x1000;
    private const ulong Available = 0x2000;
    private const ulong Used = 0x3000;
    private const ulong Target = 0x4000;

    [Fact]
    public void PciFunctionTellsWhereItsRegistersAre()
    {
        using var bench = new PciBench(new VirtioPciTransport(new VirtioRandom()));
        Assert.Equal(0x1044_1af4u, bench.Read(1, 0));
        Assert.Equal(1u, bench.Read(1, 8, 1));
        var types = new List<uint>();
        for (var at = (int)bench.Read(1, 0x34, 1); at != 0; at = (int)bench.Read(1, at + 1, 1))
        {
            if (bench.Read(1, at, 1) == 9)
            {
                types.Add(bench.Read(1, at + 3, 1));
            }
        }
        Assert.Equal([1u, 3, 2, 5], types); // no device configuration in this one
    }

    [Theory]
    [InlineData(false)]
    [InlineData(true)]
    public void PciDriverGetsItsBytes(bool messages)
    {
        var device = new VirtioRandom(1);
        var function = new VirtioPciTransport(device);
        using var bench = new PciBench(function);
        bench.Host.AssignResources();
        bench.Write(1, 4, 2, 6);
        var common = function.Bars[1].MappedAt!.Value;
        Assert.Equal(4, function.Bars[1].Index);
        if (messages)
        {
            var table = function.Bars[0].MappedAt!.Value;
            bench.WriteMemory(table, 4, 0x9000);
            bench.WriteMemory(table + 8, 4, 0x77);
            bench.WriteMemory(table + 12, 4, 0);
            bench.Write(1, bench.FindCapability(1, 0x11) + 2, 2, 0x8000);
        }
        bench.WriteMemory(common + 0x14, 1, 0);
        Assert.Equal(0u, bench.ReadMemory(common + 0x14, 1));
        bench.WriteMemory(common + 0x14, 1, 3);
        bench.WriteMemory(common, 4, 1);
        Assert.Equal(1u, bench.ReadMemory(common + 4, 4)); // version 1
        bench.WriteMemory(common + 8, 4, 1);
        bench.WriteMemory(common + 12, 4, 1);
        bench.WriteMemory(common + 0x14, 1, 0xb);
        Assert.Equal(0xbu, bench.ReadMemory(common + 0x14, 1));
        Assert.Equal(1u, bench.ReadMemory(common + 0x12, 2));
        bench.WriteMemory(common + 0x16, 2, 0);
        Assert.Equal(64u, bench.ReadMemory(common + 0x18, 2));
        bench.WriteMemory(common + 0x18, 2, 8);
        bench.WriteMemory(common + 0x1a, 2, 0);
        bench.WriteMemory(common + 0x20, 4, (uint)Descriptors);
        bench.WriteMemory(common + 0x24, 4, 0);
        bench.WriteMemory(common + 0x28, 4, (uint)Available);
        bench.WriteMemory(common + 0x30, 4, (uint)Used);
        bench.WriteMemory(common + 0x1c, 2, 1);
        Assert.Equal(1u, bench.ReadMemory(common + 0x1c, 2));
        bench.WriteMemory(common + 0x14, 1, 0xf);
        Offer(bench.Machine.Memory);
        bench.WriteMemory(common + 0x3000, 2, 0); // notify
        Assert.Equal(1, bench.Machine.Memory.Read<ushort>(Used + 2));
        if (messages)
        {
            Assert.Equal(0x77u, bench.Machine.Memory.Read<uint>(0x9000));
            Assert.False(function.IsPinAsserted);
            bench.WriteMemory(common + 0x1a, 2, 2); // no such vector
            Assert.Equal(0xffffu, bench.ReadMemory(common + 0x1a, 2));
        }
        else
        {
            Assert.True(function.IsPinAsserted);
            Assert.Equal(1u, bench.ReadMemory(common + 0x1000, 1));
            Assert.False(function.IsPinAsserted);
            Assert.Equal(0u, bench.ReadMemory(common + 0x1000, 1));
        }
        var saved = bench.Host.Save();
        var second = new VirtioPciTransport(new VirtioRandom(1));
        using var other = new PciBench(second);
        other.Host.Load(saved);
        Assert.Equal(0xfu, other.ReadMemory(common + 0x14, 1));
        Assert.Equal(saved, other.Host.Save());

        bench.WriteMemory(common + 0x14, 1, 0);
        Assert.Equal(0u, bench.ReadMemory(common + 0x1c, 2));
        Assert.Equal(64u, bench.ReadMemory(common + 0x18, 2));
    }

    [Fact]
    public void ConfigurationSpaceIsAWindowToTheRegisters()
    {
        var function = new VirtioPciTransport(new VirtioRandom());
        using var bench = new PciBench(function);
        var window = 0;
        for (var at = (int)bench.Read(1, 0x34, 1); at != 0; at = (int)bench.Read(1, at + 1, 1))
        {
            window = bench.Read(1, at, 1) == 9 && bench.Read(1, at + 3, 1) == 5 ? at : window;
        }
        bench.Write(1, window + 4, 1, 4);
        bench.Write(1, window + 8, 4, 0x12);
        bench.Write(1, window + 12, 4, 2);
        Assert.Equal(1u, bench.Read(1, window + 16, 2)); // the number of queues
        bench.Write(1, window + 8, 4, 0x14);
        bench.Write(1, window + 12, 4, 1);
        bench.Write(1, window + 16, 1, 1);
        Assert.Equal(1u, bench.Read(1, window + 16, 1)); // the status
        bench.Write(1, window + 12, 4, 3); // no length
        bench.Write(1, window + 16, 4, 0);
        bench.Write(1, window + 12, 4, 4);
        bench.Write(1, window + 8, 4, 0xffff_fffc); // not in the registers
        bench.Write(1, window + 16, 4, 0);
        bench.Write(1, window + 4, 1, 1); // another BAR
        bench.Write(1, window + 16, 4, 0);
    }

    [Fact]
    public void MmioDriverGetsItsBytes()
    {
        using var machine = new VirtualMachine(new VirtualMachineOptions { MemorySize = 1 << 20, VcpuCount = 0, Clock = ClockMode.Virtual });
        var line = machine.GetInterruptLine(20);
        var transport = new VirtioMmioTransport(machine, new VirtioRandom(1), 0xfeb0_0000, line);
        uint Read(uint register) => transport.ReadValue(register, 4);
        void Write(uint register, uint value) => transport.WriteValue(register, 4, value);
        Assert.Equal(0x7472_6976u, Read(0));
        Assert.Equal(2u, Read(4));
        Assert.Equal(4u, Read(8));
        Assert.Equal(0u, transport.ReadValue(4, 1)); // control registers take 32 bits
        Write(0x70, 0);
        Write(0x70, 3);
        Write(0x14, 1);
        Assert.Equal(1u, Read(0x10));
        Write(0x24, 1);
        Write(0x20, 1);
        Write(0x70, 0xb);
        Assert.Equal(0xbu, Read(0x70));
        Write(0x30, 5);
        Assert.Equal(0u, Read(0x34)); // no such queue
        Write(0x30, 0);
        Assert.Equal(64u, Read(0x34));
        Write(0x38, 8);
        Write(0x80, (uint)Descriptors);
        Write(0x90, (uint)Available);
        Write(0xa0, (uint)Used);
        Write(0x44, 1);
        Assert.Equal(1u, Read(0x44));
        Write(0x70, 0xf);
        Offer(machine.Memory);
        Write(0x50, 0);
        Assert.Equal(1, machine.Memory.Read<ushort>(Used + 2));
        Assert.True(line.IsHigh);
        Assert.Equal(1u, Read(0x60));
        Write(0x64, 1);
        Assert.False(line.IsHigh);
        Assert.Equal(uint.MaxValue, Read(0xb0));

        var saved = transport.Save();
        using var otherMachine = new VirtualMachine(new VirtualMachineOptions { MemorySize = 1 << 20, VcpuCount = 0, Clock = ClockMode.Virtual });
        var other = new VirtioMmioTransport(otherMachine, new VirtioRandom(1), 0xfeb0_0000, otherMachine.GetInterruptLine(20));
        other.Load(saved);
        Assert.Equal(saved, other.Save());
        Write(0x70, 0);
        Assert.Equal(0u, Read(0x44));
    }

    [Theory]
    [InlineData(1)]
    [InlineData(2)]
    public void RandomRegistersDoNoHarm(int seed)
    {
        var function = new VirtioPciTransport(new VirtioRandom(1));
        using var bench = new PciBench(function);
        bench.Host.AssignResources();
        var registers = function.Bars[1].MappedAt!.Value;
        var mmio = new VirtioMmioTransport(bench.Machine, new VirtioRandom(1), 0xfeb0_0000, bench.Machine.GetInterruptLine(20));
        var random = new Random(seed);
        for (var i = 0; i < 20_000; i++)
        {
            var size = 1 << random.Next(4);
            var data = BitConverter.GetBytes(random.Next(3) == 0 ? random.NextInt64() : random.Next(16));
            var offset = (ulong)(random.Next(2) == 0 ? random.Next(0x40) : random.Next(0x4000)) & ~(ulong)(size - 1);
            bench.Machine.Mmio.Write(registers + offset, data.AsSpan(0, size));
            bench.Machine.Mmio.Read(registers + offset, data.AsSpan(0, size));
            bench.Machine.Mmio.Write(0xfeb0_0000 + (ulong)random.Next(0x200), data.AsSpan(0, size));
            bench.Machine.Mmio.Read(0xfeb0_0000 + (ulong)random.Next(0x200), data.AsSpan(0, size));
            bench.Machine.Clock.RunDueTimers();
        }
    }

    private static void Offer(GuestMemory memory)
    {
        memory.Write(Descriptors, Target);
        memory.Write(Descriptors + 8, 32u);
        memory.Write(Descriptors + 12, (ushort)2);
        memory.Write(Available + 2, (ushort)1);
    }
}
