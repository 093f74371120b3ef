using KvmSharp.Devices.Virtio;

namespace KvmSharp.Tests.Devices.Virtio;

/// <summary>Rings, with the simplest device behind them.</summary>
public sealed class VirtqueueTests
{
    private const int Next = 1;
    private const int Write = 2;
    private const int Indirect = 4;
    private const ulong EventIndex = 1UL << 29;
    private const ulong IndirectFeature = 1UL << 28;

    private static VirtioDriver Create(ulong features = VirtioDriver.AllFeatures, int size = 16) => new(new VirtioRandom(1), features, size);

    [Fact]
    public void BuffersComeBackInOrder()
    {
        using var driver = Create();
        var ring = driver.Rings[0];
        var first = driver.Writable(32);
        var second = driver.Writable(100);
        var one = ring.Add(first);
        var two = ring.Add(second);
        ring.Notify();
        Assert.Equal((one, 32u), ring.Take());
        Assert.Equal((two, 100u), ring.Take());
        Assert.Null(ring.Take());
        Assert.Equal(1, driver.QueueSignals[0]); // one interrupt for both
        Assert.DoesNotContain(driver.Content(first), b => b == 0xee && driver.Content(first).All(x => x == 0xee));
    }

    [Fact]
    public void RingsWrapAround()
    {
        using var driver = Create(size: 4);
        for (var i = 0; i < 70_000; i++)
        {
            driver.Rings[0].Add(new Buffer(0x80_0000, 1, true));
            driver.Rings[0].Notify();
            if (i % 1000 == 0)
            {
                Assert.Equal((ushort)(i + 1), driver.Rings[0].UsedIndex);
            }
        }
        Assert.Equal(unchecked((ushort)70_000), driver.Rings[0].UsedIndex);
        Assert.False(driver.NeedsReset);
    }

    [Fact]
    public void IndirectTablesWorkAloneAndBehindOthers()
    {
        using var driver = Create();
        var ring = driver.Rings[0];
        var a = driver.Writable(16);
        var b = driver.Writable(16);
        ring.AddIndirect(a, b);
        ring.Notify();
        Assert.Equal(32u, ring.Take()!.Value.Written);
        var table = driver.Allocate(32);
        ring.WriteDescriptor(0, b.Address, 16, Write, 0, table);
        ring.WriteDescriptor(3, a.Address, 16, Write | Next, 4);
        ring.WriteDescriptor(4, table, 16, Indirect, 0);
        ring.Offer(3);
        ring.Notify();
        Assert.Equal((3, 32u), ring.Take());
    }

    [Fact]
    public void ManyRequestsTakeSeveralPasses()
    {
        using var driver = new VirtioDriver(new VirtioRandom(1), queueSize: 64);
        var ring = driver.Rings[0];
        for (var round = 0; round < 4; round++)
        {
            for (var i = 0; i < 64; i++)
            {
                ring.Add(new Buffer(0x80_0000, 0x10_0000, true)); // a megabyte each counts against the budget
            }
            ring.Notify();
            Assert.True((ushort)(ring.AvailableIndex - ring.UsedIndex) > 32);
            for (var pass = 0; pass < 100 && ring.UsedIndex != ring.AvailableIndex; pass++)
            {
                driver.RunTimers();
            }
            Assert.Equal(ring.AvailableIndex, ring.UsedIndex);
        }
    }

    [Fact]
    public void DriverWithoutEventIndexUsesFlags()
    {
        using var driver = Create(~EventIndex);
        var ring = driver.Rings[0];
        driver.Memory.Write(ring.Available, (ushort)1); // no interrupts
        ring.Exchange(driver.Writable(8));
        Assert.Equal(0, driver.QueueSignals[0]);
        driver.Memory.Write(ring.Available, (ushort)0);
        ring.Exchange(driver.Writable(8));
        Assert.Equal(1, driver.QueueSignals[0]);
        Assert.Equal(0, driver.Memory.Read<ushort>(ring.Used)); // notifications wanted again
    }

    [Fact]
    public void EventIndexHoldsInterruptsBack()
    {
        using var driver = Create();
        var ring = driver.Rings[0];
        ring.Exchange(driver.Writable(8));
        Assert.Equal(1, driver.QueueSignals[0]); // the first one always
        ring.SetUsedEvent(3);
        ring.Exchange(driver.Writable(8));
        ring.Exchange(driver.Writable(8));
        Assert.Equal(1, driver.QueueSignals[0]);
        ring.Exchange(driver.Writable(8)); // number 3
        Assert.Equal(2, driver.QueueSignals[0]);
        Assert.Equal(4, ring.AvailableEvent);
    }

    [Fact]
    public void FeaturesMustBeOffered()
    {
        using var driver = new VirtioDriver(new VirtioRandom(), start: false);
        driver.Device.SetStatus(VirtioStatus.Acknowledge | VirtioStatus.Driver);
        driver.Device.SetDriverFeatures(ulong.MaxValue, 1UL << 50 | 1UL << 32);
        driver.Device.SetStatus(driver.Device.Status | VirtioStatus.FeaturesOk);
        Assert.Equal(VirtioStatus.None, driver.Device.Status & VirtioStatus.FeaturesOk);
        driver.Device.SetDriverFeatures(ulong.MaxValue, EventIndex); // not of version 1
        driver.Device.SetStatus(driver.Device.Status | VirtioStatus.FeaturesOk);
        Assert.Equal(VirtioStatus.None, driver.Device.Status & VirtioStatus.FeaturesOk);
        driver.Device.SetStatus(driver.Device.Status | VirtioStatus.DriverOk);
        Assert.Equal(VirtioStatus.None, driver.Device.Status & VirtioStatus.DriverOk);
        driver.Device.SetDriverFeatures(ulong.MaxValue, 1UL << 32);
        driver.Device.SetStatus(driver.Device.Status | VirtioStatus.FeaturesOk);
        Assert.NotEqual(VirtioStatus.None, driver.Device.Status & VirtioStatus.FeaturesOk);
        driver.Device.SetDriverFeatures(ulong.MaxValue, 0); // too late
        Assert.Equal(1UL << 32, driver.Device.DriverFeatures);
    }

    // Each breaks one rule; the device asks for a reset, tells the driver, and works again after it.
    public static TheoryData<string> BrokenRings =>
    [
        "head", "next", "loop", "self", "ahead", "nowhere", "wraps", "empty", "order", "huge", "hole", "rom",
        "indirect-nested", "indirect-next", "indirect-empty", "indirect-odd", "indirect-large", "indirect-nowhere", "indirect-loop", "indirect-leaves",
        "indirect-off",
    ];

    [Theory]
    [MemberData(nameof(BrokenRings))]
    public void BrokenRingsNeedAReset(string rule)
    {
        using var driver = Create(rule == "indirect-off" ? ~IndirectFeature : VirtioDriver.AllFeatures);
        var ring = driver.Rings[0];
        driver.Memory.AddRom(0x4000_0000, new byte[4096]);
        var table = driver.Allocate(64);
        var good = driver.Writable(8).Address;
        switch (rule)
        {
            case "head": ring.Offer(16); break;
            case "next": Chain(good, 8, Write | Next, 16); break;
            case "loop":
                ring.WriteDescriptor(1, good, 8, Write | Next, 0);
                Chain(good, 8, Write | Next, 1);
                break;
            case "self": Chain(good, 8, Write | Next, 0); break;
            case "ahead": ring.SetAvailableIndex(17); break;
            case "nowhere": Chain(1UL << 40, 8, Write, 0); break;
            case "wraps": Chain(ulong.MaxValue - 3, 8, Write, 0); break;
            case "empty": Chain(good, 0, Write, 0); break;
            case "order":
                ring.WriteDescriptor(1, good, 8, 0, 0);
                Chain(good, 8, Write | Next, 1);
                break;
            case "huge": Chain(good, uint.MaxValue, Write, 0); break;
            case "hole": Chain((32 << 20) - 4, 8, Write, 0); break; // half in memory
            case "rom": Chain(0x4000_0000, 8, Write, 0); break;
            case "indirect-nested":
                ring.WriteDescriptor(0, table + 16, 16, Indirect, 0, table);
                Chain(table, 16, Indirect, 0);
                break;
            case "indirect-next":
                ring.WriteDescriptor(0, good, 8, Write, 0, table);
                Chain(table, 16, Indirect | Next, 1);
                break;
            case "indirect-empty": Chain(table, 0, Indirect, 0); break;
            case "indirect-odd": Chain(table, 17, Indirect, 0); break;
            case "indirect-large": Chain(table, 16 * 1025, Indirect, 0); break;
            case "indirect-nowhere": Chain(1UL << 40, 16, Indirect, 0); break;
            case "indirect-loop":
                ring.WriteDescriptor(0, good, 8, Write | Next, 1, table);
                ring.WriteDescriptor(1, good, 8, Write | Next, 0, table);
                Chain(table, 32, Indirect, 0);
                break;
            case "indirect-leaves":
                ring.WriteDescriptor(0, good, 8, Write | Next, 1, table);
                Chain(table, 16, Indirect, 0);
                break;
            case "indirect-off":
                ring.WriteDescriptor(0, good, 8, Write, 0, table);
                Chain(table, 16, Indirect, 0);
                break;
            default: throw new ArgumentException(rule);
        }
        ring.Notify();
        Assert.True(driver.NeedsReset, rule);
        Assert.Equal(1, driver.ConfigSignals);
        Assert.NotNull(driver.Device.FailureReason);
        Assert.Equal(0, ring.UsedIndex);
        ring.Notify(); // nothing more happens
        Assert.Equal(1, driver.ConfigSignals);

        driver.Negotiate();
        ring.Enable();
        driver.Ready();
        Assert.Equal(8u, ring.Exchange(driver.Writable(8)));
        Assert.Null(driver.Device.FailureReason);

        void Chain(ulong address, uint length, int flags, int next)
        {
            ring.WriteDescriptor(0, address, length, flags, next);
            ring.Offer(0);
        }
    }

    [Theory]
    [InlineData(0, 0x10_0000, 0x10_8000, 0x10_c000)] // size
    [InlineData(3, 0x10_0000, 0x10_8000, 0x10_c000)]
    [InlineData(128, 0x10_0000, 0x10_8000, 0x10_c000)]
    [InlineData(65536, 0x10_0000, 0x10_8000, 0x10_c000)]
    [InlineData(16, 0x10_0008, 0x10_8000, 0x10_c000)] // alignment
    [InlineData(16, 0x10_0000, 0x10_8001, 0x10_c000)]
    [InlineData(16, 0x10_0000, 0x10_8000, 0x10_c002)]
    [InlineData(16, 0x200_0000, 0x10_8000, 0x10_c000)] // beyond memory
    [InlineData(16, 0x10_0000, 0x1ff_fffe, 0x10_c000)]
    [InlineData(16, 0x10_0000, 0x10_8000, 0xffff_ffff_ffff_fffc)]
    [InlineData(16, 0x10_0000, 0x10_00f0, 0x10_c000)] // overlap
    [InlineData(16, 0x10_0000, 0x10_8000, 0x10_8010)]
    [InlineData(16, 0x10_0000, 0x10_8000, 0x10_0000)]
    public void BrokenLayoutsNeedAReset(int size, ulong descriptors, ulong available, ulong used)
    {
        using var driver = new VirtioDriver(new VirtioRandom(), start: false);
        driver.Negotiate();
        var ring = driver.Rings[0];
        (ring.Descriptors, ring.Available, ring.Used) = (descriptors, available, used);
        ring.Enable(size);
        Assert.True(driver.NeedsReset);
        Assert.Equal(0, driver.ConfigSignals); // the driver is not at work yet
        driver.Ready();
        driver.Device.Notify();
    }

    [Fact]
    public void QueueDoesNotMoveWhileItIsReady()
    {
        using var driver = Create();
        driver.Device.ChangeQueue(0, q =>
        {
            q.SetUsed(ulong.MaxValue);
            q.SetDescriptors(ulong.MaxValue);
            q.SetAvailable(ulong.MaxValue);
            q.SetSize(1);
        });
        Assert.Equal(8u, driver.Rings[0].Exchange(driver.Writable(8)));
    }

    [Fact]
    public void MemoryThatGoesAwayIsAFailureOfTheDriver()
    {
        using var driver = Create();
        var slot = driver.Memory.AddRam(0x5000_0000, 1 << 16);
        var ring = driver.Rings[0];
        driver.Device.SetStatus(VirtioStatus.None);
        driver.Negotiate();
        (ring.Descriptors, ring.Available, ring.Used) = (0x5000_0000, 0x5000_8000, 0x5000_c000);
        ring.Enable();
        driver.Ready();
        driver.Memory.Remove(slot);
        driver.Device.Notify();
        Assert.True(driver.NeedsReset);
    }

    [Fact]
    public void StateGoesOnInAnotherDevice()
    {
        using var driver = Create();
        var ring = driver.Rings[0];
        ring.SetUsedEvent(1);
        ring.Exchange(driver.Writable(40));
        ring.Add(driver.Writable(8)); // not notified of yet
        var writer = new StateWriter();
        driver.Device.Save(writer);
        var state = writer.ToArray();
        ring.Notify();
        var expected = driver.Content(new Buffer(driver.Memory.Read<ulong>(ring.Descriptors + 16), 8, true));

        using var other = new VirtioDriver(new VirtioRandom(1), start: false);
        CopyMemory(driver, other, ring, usedIndex: 1);
        var reader = new StateReader(state);
        other.Device.Load(reader);
        reader.End();
        other.Device.Notify();
        Assert.Equal(2, other.Rings[0].UsedIndex);
        Assert.Equal(expected, other.Content(new Buffer(other.Memory.Read<ulong>(ring.Descriptors + 16), 8, true)));
        Assert.Equal(1, other.QueueSignals[0]);

        for (var i = 0; i < state.Length; i++)
        {
            var damaged = state.ToArray();
            damaged[i] ^= 0xff;
            try
            {
                other.Device.Load(new StateReader(damaged));
                other.Device.Notify();
            }
            catch (MachineStateException)
            {
            }
        }
    }

    // Any content of rings: never an exception, always an end.
    [Theory]
    [InlineData(1)]
    [InlineData(2)]
    [InlineData(3)]
    public void RandomRingsDoNoHarm(int seed)
    {
        using var driver = Create(size: 8);
        var random = new Random(seed);
        var ring = driver.Rings[0];
        for (var i = 0; i < 5000; i++)
        {
            for (var d = 0; d < 8; d++)
            {
                ulong[] addresses = [0x80_0000, 0x80_1000, 0x1ff_fff0, 0x200_0000, ulong.MaxValue - 8, ring.Descriptors, ring.Used];
                uint[] lengths = [0, 1, 16, 64, 128, 4096, uint.MaxValue];
                ring.WriteDescriptor(d, addresses[random.Next(random.Next(1, 8))], lengths[random.Next(7)], random.Next(8), random.Next(random.Next(1, 10)));
            }
            ring.Offer(random.Next(random.Next(7, 10)));
            if (random.Next(50) == 0)
            {
                ring.SetAvailableIndex((ushort)random.Next(65536));
            }
            ring.Notify();
            driver.RunTimers();
            if (driver.NeedsReset)
            {
                driver.Negotiate();
                ring.Enable();
                driver.Ready();
            }
        }
    }

    private static void CopyMemory(VirtioDriver from, VirtioDriver to, VirtioDriver.Ring ring, ushort usedIndex)
    {
        var data = new byte[0x1_0000];
        from.Memory.Read(ring.Descriptors, data);
        to.Memory.Write(ring.Descriptors, data);
        to.Memory.Write(ring.Used + 2, usedIndex);
    }
}
