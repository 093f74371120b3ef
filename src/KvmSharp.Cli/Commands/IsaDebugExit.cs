using KvmSharp;

namespace KvmSharp.Cli.Commands;
internal sealed class IsaDebugExit(IMachineControl machine) : IIoDevice
{
    public void Read(ulong offset, Span<byte> data) => data.Clear();
    public void Write(ulong offset, ReadOnlySpan<byte> data) => machine.RequestExit((data[0] << 1) | 1);
}
