using System.Text;
using KvmSharp.Devices;
using KvmSharp.Devices.Virtio;

namespace KvmSharp.Tests.Devices.Virtio;

public sealed class VirtioSmallDeviceTests
{
    [Fact]
    public void SeededBytesRepeatAndOthersDoNot()
    {
        byte[] Take(ulong? seed)
        {
            using var driver = new VirtioDriver(new VirtioRandom(seed));
            var target = driver.Writable(64);
            Assert.Equal(64u, driver.Rings[0].Exchange(target));
            return driver.Content(target);
        }
        Assert.Equal(Take(1), Take(1));
        Assert.NotEqual(Take(1), Take(2));
        Assert.NotEqual(Take(null), Take(null));
    }

    [Fact]
    public void LargeRequestsGetLessRandomnessThanTheyAskFor()
    {
        using var driver = new VirtioDriver(new VirtioRandom());
        Assert.Equal(65536u, driver.Rings[0].Exchange(new Buffer(0x80_0000, 1 << 20, true)));
        Assert.Equal(0u, driver.Rings[0].Exchange(driver.Readable(new byte[8]))); // nothing to fill
    }

    [Fact]
    public void OnePortPassesBytesBothWays()
    {
        var backend = new MemoryCharacterBackend();
        using var driver = new VirtioDriver(new VirtioConsole(new VirtioConsoleOptions([new VirtioConsolePort(backend)])));
        Assert.Equal(2, driver.Rings.Length);
        driver.Rings[1].Exchange(driver.Readable("hello "u8), driver.Readable("world"u8));
        Assert.Equal("hello world", backend.GetOutputText());

        var first = driver.Writable(4);
        driver.Rings[0].Add(first);
        driver.Rings[0].Notify();
        Assert.Equal(0, driver.Rings[0].UsedIndex);
        backend.SendInput("abcdef");
        driver.RunTimers();
        Assert.Equal((0, 4u), driver.Rings[0].Take());
        Assert.Equal("abcd"u8.ToArray(), driver.Content(first));
        var second = driver.Writable(16);
        driver.Rings[0].Add(second);
        driver.Rings[0].Notify();
        Assert.Equal(2u, driver.Rings[0].Take()!.Value.Written);
        Assert.Equal("ef"u8.ToArray(), driver.Content(second)[..2]);
        Assert.Equal(1, driver.QueueSignals[0]); // the driver has asked for none after the first
    }

    [Fact]
    public void PortsAreAnnouncedNamedAndOpened()
    {
        var console = new MemoryCharacterBackend();
        var stream = new MemoryCharacterBackend();
        var options = new VirtioConsoleOptions([new VirtioConsolePort(console), new VirtioConsolePort(stream, "org.example.1")]);
        using var driver = new VirtioDriver(new VirtioConsole(options), queueSize: 32);
        Assert.Equal(6, driver.Rings.Length);
        var room = new List<Buffer>();
        for (var i = 0; i < 20; i++)
        {
            room.Add(driver.Writable(64));
            driver.Rings[2].Add(room[i]);
        }
        Send(driver, 0xffff_ffff, 0, 1);
        Assert.Equal([(0u, 1, 1, ""), (1u, 1, 1, "")], Receive(driver, room));
        Send(driver, 0, 3, 1);
        Send(driver, 1, 3, 1);
        Send(driver, 9, 3, 1); // no such port
        Assert.Equal([(0u, 4, 1, ""), (0u, 6, 1, ""), (1u, 7, 1, "org.example.1"), (1u, 6, 1, "")], Receive(driver, room));

        // Input waits until somebody in the guest has the port open.
        var target = driver.Writable(16);
        driver.Rings[4].Add(target);
        stream.SendInput("x");
        driver.RunTimers();
        Assert.Equal(0, driver.Rings[4].UsedIndex);
        Send(driver, 1, 6, 1);
        Assert.Equal(1, driver.Rings[4].UsedIndex);
        driver.Rings[5].Exchange(driver.Readable("to the host"u8));
        Assert.Equal("to the host", stream.GetOutputText());
        Assert.Equal("", console.GetOutputText());
    }

    [Fact]
    public void GuestThatDoesNotReadMessagesIsNotReadEither()
    {
        var backend = new MemoryCharacterBackend();
        var options = new VirtioConsoleOptions([new VirtioConsolePort(backend), new VirtioConsolePort(backend)]);
        using var driver = new VirtioDriver(new VirtioConsole(options), queueSize: 64);
        for (var i = 0; i < 1000 && driver.Rings[3].AvailableIndex - driver.Rings[3].UsedIndex < 60; i++)
        {
            driver.Rings[3].Add(driver.Readable([0, 0, 0, 0, 0, 0, 1, 0]));
            driver.Rings[3].Notify();
        }
        Assert.InRange((int)driver.Rings[3].UsedIndex, 100, 300);
    }

    [Fact]
    public void ConsoleTellsItsSizeAndTakesEarlyOutput()
    {
        var backend = new MemoryCharacterBackend();
        var console = new VirtioConsole(new VirtioConsoleOptions([new VirtioConsolePort(backend)]) { Columns = 80, Rows = 25 });
        using var driver = new VirtioDriver(console);
        var config = new byte[12];
        console.ReadConfig(0, config);
        Assert.Equal([80, 0, 25, 0, 1, 0, 0, 0, 0, 0, 0, 0], config);
        console.WriteConfig(8, [(byte)'!', 0, 0, 0]);
        Assert.Equal("!", backend.GetOutputText());
        console.Resize(132, 50);
        console.ReadConfig(0, config);
        Assert.Equal(132, config[0]);
        Assert.Equal(1, driver.ConfigSignals);
        Assert.Equal(1, console.ConfigGeneration);
    }

    [Fact]
    public void ConsoleStateComesBack()
    {
        var backend = new MemoryCharacterBackend();
        var options = new VirtioConsoleOptions([new VirtioConsolePort(backend), new VirtioConsolePort(backend, "n")]);
        using var driver = new VirtioDriver(new VirtioConsole(options));
        backend.SendInput("late");
        driver.RunTimers();
        Send(driver, 0, 0, 1); // messages that nobody has read
        var writer = new StateWriter();
        driver.Device.Save(writer);
        using var other = new VirtioDriver(new VirtioConsole(options), start: false);
        var reader = new StateReader(writer.ToArray());
        other.Device.Load(reader);
        reader.End();
        var again = new StateWriter();
        other.Device.Save(again);
        Assert.Equal(writer.ToArray(), again.ToArray());
    }

    private static void Send(VirtioDriver driver, uint id, ushort kind, ushort value) =>
        driver.Rings[3].Exchange(driver.Readable([.. BitConverter.GetBytes(id), .. BitConverter.GetBytes(kind), .. BitConverter.GetBytes(value)]));

    private static List<(uint Id, int Kind, int Value, string Name)> Receive(VirtioDriver driver, List<Buffer> room)
    {
        var messages = new List<(uint, int, int, string)>();
        while (driver.Rings[2].Take() is var (head, written))
        {
            var data = driver.Content(room[head])[..(int)written];
            messages.Add((BitConverter.ToUInt32(data), BitConverter.ToUInt16(data, 4), BitConverter.ToUInt16(data, 6), Encoding.ASCII.GetString(data[8..])));
        }
        return messages;
    }
}
