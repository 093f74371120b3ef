using System.Buffers;
using System.Diagnostics;
using System.Text;
using System.Text.Json;

namespace KvmSharp.Cli.Commands;

/// <summary>What a run cost, summed over resets; printed by <c>--json</c>.</summary>
internal sealed class RunReport
{
    private readonly Stopwatch _stopwatch = new();
    private int _boots;
    private ulong _instructions;
    private ulong _exits;

    public void Start()
    {
        _stopwatch.Start();
        _boots++;
    }

    public void Add(VirtualMachine machine)
    {
        _stopwatch.Stop();
        foreach (Vcpu vcpu in machine.Vcpus)
        {
            VcpuStatistics statistics = vcpu.GetStatistics();
            _instructions += statistics.Instructions;
            _exits += statistics.Exits;
        }
    }

    public string ToJson(VmExit exit, int status)
    {
        var buffer = new ArrayBufferWriter<byte>();
        using (var json = new Utf8JsonWriter(buffer))
        {
            json.WriteStartObject();
            json.WriteString("exit", exit.Kind.ToString());
            json.WriteNumber("status", status);
            json.WriteString("detail", exit.Detail);
            json.WriteNumber("boots", _boots);
            json.WriteNumber("instructions", _instructions);
            json.WriteNumber("exits", _exits);
            json.WriteNumber("seconds", Math.Round(_stopwatch.Elapsed.TotalSeconds, 3));
            json.WriteEndObject();
        }

        return Encoding.UTF8.GetString(buffer.WrittenSpan);
    }
}
