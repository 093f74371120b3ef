using KvmSharp.Devices.Virtio;
using KvmSharp.Networking;
using KvmSharp.Tests.Networking;

namespace KvmSharp.Tests.Devices.Virtio;

public sealed class VirtioNetworkTests
{
    private const ulong ChecksumFeatures = 1UL << 0 | 1UL << 11 | 1UL << 12; // and segmentation, which needs it
    private const ulong GuestOffloadFeatures = 1UL << 1 | 1UL << 7 | 1UL << 8;
    private const ulong Mergeable = 1UL << 15;
    private const byte NeedsChecksum = 1;
    private static readonly MacAddress Own = new([0x52, 0x54, 0, 0x12, 0x34, 0x56]);
    private static readonly MacAddress Other = new([0x52, 0x54, 0, 0x12, 0x34, 0x57]);
    private static readonly MacAddress Group = new([1, 0, 0x5e, 0, 0, 1]);

    [Fact]
    public void PacketsLeaveAsTheyAre()
    {
        var (driver, backend) = Start();
        using (driver)
        {
            var frame = Packets.Udp4("payload"u8);
            driver.Rings[1].Exchange(driver.Readable(Header()), driver.Readable(frame.AsSpan(0, 20)), driver.Readable(frame.AsSpan(20)));
            Assert.True(backend.Received.TryRead(out var packet));
            Assert.Equal(frame, packet.Data.ToArray());
            Assert.Equal(default, packet.Offload);
        }
    }

    [Fact]
    public void MissingChecksumsAreFilledInUnlessTheBackendTakesThem()
    {
        foreach (var accepts in new[] { NetworkOffloads.None, NetworkOffloads.All })
        {
            var (driver, backend) = Start(accepts: accepts);
            using (driver)
            {
                var frame = Packets.Udp4("payload"u8, withChecksum: false);
                driver.Rings[1].Exchange(driver.Readable(Header(NeedsChecksum, start: 34, offset: 6)), driver.Readable(frame));
                Assert.True(backend.Received.TryRead(out var packet));
                Assert.Equal(accepts == NetworkOffloads.All, packet.Offload.NeedsChecksum);
                Assert.Equal(accepts == NetworkOffloads.None, Packets.HasValidChecksums(packet.Data));
            }
        }
    }

    [Fact]
    public void LongPacketsAreCutUnlessTheBackendTakesThem()
    {
        foreach (var (accepts, count) in new[] { (NetworkOffloads.Checksum, 3), (NetworkOffloads.All, 1) })
        {
            var (driver, backend) = Start(accepts: accepts);
            using (driver)
            {
                using var tcp = Packets.Tcp(new byte[4200], false, false, 0x10);
                driver.Rings[1].Exchange(driver.Readable(Header(NeedsChecksum, 1, 1400, 34, 16)), driver.Readable(tcp.Data));
                for (var i = 0; i < count; i++)
                {
                    Assert.True(backend.Received.TryRead(out var packet));
                    Assert.Equal(count == 3, Packets.HasValidChecksums(packet.Data));
                }
                Assert.False(backend.Received.TryRead(out _));
            }
        }
    }

    [Theory]
    [InlineData(0, 3, 0, 60)] // no such segmentation
    [InlineData(0, 1, 1400, 60)] // segmentation without checksum
    [InlineData(0, 0, 0, 10)] // shorter than a header
    [InlineData(0, 0, 0, 70_000)] // longer than any
    public void PacketsThatMakeNoSenseAreDropped(byte flags, byte segmentation, ushort size, uint length)
    {
        var (driver, backend) = Start();
        using (driver)
        {
            driver.Rings[1].Exchange(driver.Readable(Header(flags, segmentation, size)), driver.Readable(new byte[length]));
            Assert.False(backend.Received.TryRead(out _));
            Assert.Equal(1, ((VirtioNetwork)driver.Device).DroppedPackets);
            Assert.False(driver.NeedsReset);
        }
    }

    [Fact]
    public void GuestWithoutOffloadsMayNotUseThem()
    {
        var (driver, backend) = Start(features: ~ChecksumFeatures);
        using (driver)
        {
            driver.Rings[1].Exchange(driver.Readable(Header(NeedsChecksum, start: 34, offset: 6)), driver.Readable(Packets.Udp4("x"u8)));
            Assert.False(backend.Received.TryRead(out _));
        }
        using var bad = new VirtioDriver(new VirtioNetwork(new VirtioNetworkOptions(new ChannelNetworkBackend())), start: false);
        bad.Negotiate(~1UL); // segmentation without checksums
        Assert.Equal(VirtioStatus.None, bad.Device.Status & VirtioStatus.FeaturesOk);
    }

    [Fact]
    public void FullBackendHoldsTheGuestBack()
    {
        var (driver, backend) = Start(capacity: 2);
        using (driver)
        {
            for (var i = 0; i < 6; i++)
            {
                driver.Rings[1].Add(driver.Readable([.. Header(), .. Packets.Udp4([(byte)i])]));
            }
            driver.Rings[1].Notify();
            Assert.Equal(3, driver.Rings[1].UsedIndex); // two, and one that waits
            for (var i = 0; i < 6; i++)
            {
                NetworkPacket? packet = null;
                SpinWait.SpinUntil(() =>
                {
                    driver.RunTimers();
                    return backend.Received.TryRead(out packet);
                }, 5000);
                Assert.Equal(i, packet!.Data[42]);
            }
            SpinWait.SpinUntil(() =>
            {
                driver.RunTimers();
                return driver.Rings[1].UsedIndex == 6;
            }, 5000);
            Assert.Equal(6, driver.Rings[1].UsedIndex);
        }
    }

    [Fact]
    public void PacketsArriveInOneBuffer()
    {
        var (driver, backend) = Start(features: ~Mergeable);
        using (driver)
        {
            var small = driver.Writable(20);
            var large = driver.Writable(2000);
            driver.Rings[0].Add(large);
            var frame = Packets.Udp4("hello"u8);
            Deliver(driver, backend, frame);
            Assert.Equal((uint)(12 + frame.Length), driver.Rings[0].Take()!.Value.Written);
            Assert.Equal(frame, driver.Content(large)[12..(12 + frame.Length)]);
            Assert.Equal(1, driver.Content(large)[10]);
            driver.Rings[0].Add(small);
            Deliver(driver, backend, frame); // does not fit
            Assert.Equal(1, ((VirtioNetwork)driver.Device).DroppedPackets);
            Assert.Equal(1, driver.Rings[0].UsedIndex);
        }
    }

    [Fact]
    public void LargePacketsAreSpreadOverBuffers()
    {
        var (driver, backend) = Start();
        using (driver)
        {
            using var tcp = Packets.Tcp(Enumerable.Range(0, 3000).Select(i => (byte)i).ToArray(), false, false, 0x10);
            var expected = tcp.Data.ToArray();
            var buffers = new[] { driver.Writable(1000), driver.Writable(1000), driver.Writable(1000), driver.Writable(1000) };
            driver.Rings[0].Add(buffers[0]);
            driver.Rings[0].Add(buffers[1]);
            backend.Send.TryWrite(NetworkPacket.Create(expected, tcp.Offload));
            Pump(driver, () => driver.Rings[0].AvailableEvent == 2); // not enough yet: a notification is wanted of the next
            Assert.Equal(2, driver.Rings[0].AvailableEvent);
            Assert.Equal(0, driver.Rings[0].UsedIndex);
            driver.Rings[0].Add(buffers[2]);
            driver.Rings[0].Add(buffers[3]);
            driver.Rings[0].Notify();
            Assert.Equal(4, driver.Rings[0].UsedIndex);
            var content = buffers.SelectMany(driver.Content).ToArray();
            Assert.Equal(expected, content[12..(12 + expected.Length)]);
            Assert.Equal([1, 1, 128, 0, 1400 & 255, 1400 >> 8, 34, 0, 16, 0, 4, 0], content[..12].Select(b => (int)b));
            uint[] written = [.. Enumerable.Range(0, 4).Select(_ => driver.Rings[0].Take()!.Value.Written)];
            Assert.Equal([1000u, 1000, 1000, (uint)expected.Length + 12 - 3000], written);
        }
    }

    [Fact]
    public void GuestWithoutOffloadsGetsFinishedPackets()
    {
        var (driver, backend) = Start(features: ~GuestOffloadFeatures);
        using (driver)
        {
            var buffers = Enumerable.Range(0, 4).Select(_ => driver.Writable(2000)).ToArray();
            foreach (var buffer in buffers)
            {
                driver.Rings[0].Add(buffer);
            }
            using var tcp = Packets.Tcp(new byte[4200], false, false, 0x10);
            backend.Send.TryWrite(NetworkPacket.Create(tcp.Data, tcp.Offload));
            Pump(driver, () => driver.Rings[0].UsedIndex == 3);
            Assert.Equal(3, driver.Rings[0].UsedIndex);
            Assert.All(buffers[..3], b => Assert.True(Packets.HasValidChecksums(driver.Content(b).AsSpan(12, 14 + 52 + 1400))));
        }
    }

    [Fact]
    public void FiltersDecideWhatArrives()
    {
        var (driver, backend) = Start();
        using (driver)
        {
            for (var i = 0; i < 12; i++)
            {
                driver.Rings[0].Add(new Buffer(0x90_0000, 2000, true));
            }
            Assert.True(Arrives(Other)); // promiscuous until told otherwise
            Assert.Equal(0, Command(driver, 0, 0, [0]));
            Assert.False(Arrives(Other));
            Assert.True(Arrives(Own));
            Assert.True(Arrives(MacAddress.Broadcast));
            Assert.False(Arrives(Group));
            Assert.Equal(0, Command(driver, 1, 0, [1, 0, 0, 0, .. Bytes(Other), 1, 0, 0, 0, .. Bytes(Group)]));
            Assert.True(Arrives(Other));
            Assert.True(Arrives(Group));
            Assert.Equal(0, Command(driver, 1, 0, [0, 0, 0, 0, 0, 0, 0, 0]));
            Assert.False(Arrives(Group));
            Assert.Equal(0, Command(driver, 0, 1, [1])); // all groups
            Assert.True(Arrives(Group));
            Assert.Equal(0, Command(driver, 0, 5, [1])); // no broadcast
            Assert.False(Arrives(MacAddress.Broadcast));
            Assert.Equal(0, Command(driver, 1, 1, Bytes(Other)));
            Assert.True(Arrives(Other));
            Assert.False(Arrives(Own));
            Assert.Equal(0, Command(driver, 1, 0, [0, 2, 0, 0])); // more than are kept
            Assert.True(Arrives(Own));

            Assert.Equal(1, Command(driver, 1, 1, Bytes(Group)));
            Assert.Equal(1, Command(driver, 1, 0, [3, 0, 0, 0]));
            Assert.Equal(1, Command(driver, 0, 6, [1]));
            Assert.Equal(1, Command(driver, 4, 0, [1, 0]));
            Assert.Equal(1, Command(driver, 5, 0, BitConverter.GetBytes(1UL << 60)));
            Assert.Equal(0, Command(driver, 5, 0, BitConverter.GetBytes(0UL)));
            Assert.Equal(1, Command(driver, 0, 0, []));
        }

        bool Arrives(MacAddress target)
        {
            var before = driver.Rings[0].UsedIndex;
            var frame = Packets.Udp4("x"u8);
            target.CopyTo(frame);
            Deliver(driver, backend, frame);
            return driver.Rings[0].UsedIndex != before;
        }
    }

    [Fact]
    public void UnpluggedCardsPassNothing()
    {
        var (driver, backend) = Start();
        using (driver)
        {
            var card = (VirtioNetwork)driver.Device;
            card.IsLinkUp = false;
            Assert.Equal(1, driver.ConfigSignals);
            var config = new byte[12];
            card.ReadConfig(0, config);
            Assert.Equal([0x52, 0x54, 0, 0x12, 0x34, 0x56, 0, 0, 0, 0, 0xdc, 5], config);
            driver.Rings[1].Exchange(driver.Readable([.. Header(), .. Packets.Udp4("x"u8)]));
            Assert.False(backend.Received.TryRead(out _));
            driver.Rings[0].Add(driver.Writable(2000));
            Deliver(driver, backend, Packets.Udp4("x"u8));
            Assert.Equal(0, driver.Rings[0].UsedIndex);
            card.IsLinkUp = true;
            Deliver(driver, backend, Packets.Udp4("x"u8));
            Assert.Equal(1, driver.Rings[0].UsedIndex);
        }
    }

    [Fact]
    public void EndsOfTheBackendDoNoHarm()
    {
        var (driver, backend) = Start();
        using (driver)
        {
            backend.Send.Complete();
            ((INetworkBackend)backend).FromGuest.Complete();
            driver.Rings[1].Exchange(driver.Readable([.. Header(), .. Packets.Udp4("x"u8)]));
            driver.Rings[0].Add(driver.Writable(2000));
            driver.Rings[0].Notify();
            Assert.False(driver.NeedsReset);
        }
    }

    [Fact]
    public void StateComesBack()
    {
        var (driver, _) = Start();
        var (other, _) = Start();
        using (driver)
        using (other)
        {
            Command(driver, 0, 0, [0]);
            Command(driver, 1, 0, [1, 0, 0, 0, .. Bytes(Other), 1, 0, 0, 0, .. Bytes(Group)]);
            var writer = new StateWriter();
            driver.Device.Save(writer);
            var reader = new StateReader(writer.ToArray());
            other.Device.Load(reader);
            reader.End();
            var again = new StateWriter();
            other.Device.Save(again);
            Assert.Equal(writer.ToArray(), again.ToArray());
        }
    }

    [Fact]
    public void OptionsAreChecked()
    {
        var backend = new ChannelNetworkBackend();
        Assert.Throws<KvmSharpException>(() => new VirtioNetwork(new VirtioNetworkOptions(backend) { MacAddress = Group }));
        Assert.Throws<KvmSharpException>(() => new VirtioNetwork(new VirtioNetworkOptions(backend) { Mtu = 60 }));
        Assert.True(MacAddress.TryParse("52:54:00:12:34:57", out var parsed));
        Assert.Equal(Other, parsed);
        Assert.Equal("52:54:00:12:34:57", parsed.ToString());
        Assert.All(["", "52:54", "52:54:00:12:34:5", "52:54:00:12:34:5x", "52:54:00:12:34:56:78", null], t => Assert.False(MacAddress.TryParse(t, out _)));
    }

    private static (VirtioDriver Driver, ChannelNetworkBackend Backend) Start(
        ulong features = VirtioDriver.AllFeatures, NetworkOffloads accepts = NetworkOffloads.None, int capacity = 16)
    {
        var backend = new ChannelNetworkBackend(capacity, accepts);
        return (new VirtioDriver(new VirtioNetwork(new VirtioNetworkOptions(backend)), features), backend);
    }

    private static byte[] Header(byte flags = 0, byte segmentation = 0, ushort size = 0, ushort start = 0, ushort offset = 0) =>
        [flags, segmentation, 0, 0, .. BitConverter.GetBytes(size), .. BitConverter.GetBytes(start), .. BitConverter.GetBytes(offset), 0, 0];

    private static byte[] Bytes(MacAddress address)
    {
        var bytes = new byte[6];
        address.CopyTo(bytes);
        return bytes;
    }

    private static int Command(VirtioDriver driver, byte kind, byte command, byte[] data)
    {
        var answer = driver.Writable(1);
        driver.Rings[2].Exchange(driver.Readable([kind, command, .. data]), answer);
        return driver.Content(answer)[0];
    }

    private static void Deliver(VirtioDriver driver, ChannelNetworkBackend backend, byte[] frame)
    {
        Assert.True(backend.Send.TryWrite(NetworkPacket.Create(frame)));
        var before = driver.Rings[0].UsedIndex;
        driver.Device.Notify(); // the device also wakes by itself, a moment later
        Pump(driver, () => driver.Rings[0].UsedIndex != before, 0);
    }

    private static void Pump(VirtioDriver driver, Func<bool> until, int milliseconds = 5000) => SpinWait.SpinUntil(() =>
    {
        driver.RunTimers();
        return until();
    }, milliseconds);
}
