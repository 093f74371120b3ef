using KvmSharp.Devices;

namespace KvmSharp.Tests.Devices;

/// <summary>A clock that stands still until a test moves it.</summary>
internal sealed class ManualClock
{
    private ulong _now;
    private ulong _deadline = VmClock.Never;

    public ManualClock(DateTimeOffset? start = null)
    {
        Clock = new VmClock(() => _now, d => _deadline = d, start ?? new DateTimeOffset(2024, 2, 29, 23, 59, 50, TimeSpan.Zero));
    }

    public VmClock Clock { get; }

    public ulong Now => _now;

    public ulong Deadline => _deadline;

    /// <summary>Moves on, calling timers at their deadlines.</summary>
    public void Advance(TimeSpan time) => AdvanceTo(_now + (ulong)time.Ticks * 100);

    public void AdvanceTo(ulong target)
    {
        while (_deadline <= target)
        {
            _now = Math.Max(_now, _deadline);
            Clock.RunDueTimers();
        }
        _now = target;
    }
}

internal static class DeviceExtensions
{
    public static byte ReadByte(this IIoDevice device, ulong offset)
    {
        Span<byte> data = [0xff];
        device.Read(offset, data);
        return data[0];
    }

    public static void WriteByte(this IIoDevice device, ulong offset, byte value) => device.Write(offset, [value]);

    public static uint ReadValue(this IIoDevice device, ulong offset, int size)
    {
        Span<byte> data = [0xff, 0xff, 0xff, 0xff];
        device.Read(offset, data[..size]);
        data[size..].Clear();
        return BitConverter.ToUInt32(data);
    }

    public static void WriteValue(this IIoDevice device, ulong offset, int size, uint value) =>
        device.Write(offset, BitConverter.GetBytes(value).AsSpan(0, size));

    public static byte[] Save(this IDeviceState device)
    {
        var writer = new StateWriter();
        device.SaveState(writer);
        return writer.ToArray();
    }

    public static void Load(this IDeviceState device, byte[] state)
    {
        var reader = new StateReader(state);
        device.LoadState(reader);
        reader.End();
    }
}

/// <summary>Remembers what devices asked for.</summary>
internal sealed class RecordingMachine : IMachineControl
{
    public List<string> Requests { get; } = [];

    public void RequestPowerOff() => Requests.Add("power off");

    public void RequestReset(string? detail = null) => Requests.Add("reset");

    public void RequestExit(int exitCode) => Requests.Add($"exit {exitCode}");
}
