using System.Globalization;
using System.Text;

namespace KvmSharp.Cli.Commands;

/// <summary>Runs a machine piece by piece and writes every executed instruction as one line of text.</summary>
internal sealed class TraceWriter(TextWriter output, bool registers, ulong count)
{
    private const int RingSize = 16384;

    private static readonly string[] RegisterNames =
        ["rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"];

    private readonly TraceEntry[] _entries = new TraceEntry[RingSize];
    private readonly StringBuilder _line = new();
    private ulong _left = count;
    private ulong _lastRetired = ulong.MaxValue;
    private ulong _lastRip;

    /// <summary>Runs until the machine ends or enough is traced; then the machine is running untraced.</summary>
    /// <exception cref="OperationCanceledException">The token was cancelled.</exception>
    public void Run(VirtualMachine machine, CancellationToken cancellation)
    {
        Vcpu vcpu = machine.Vcpus[0];
        vcpu.SetTrace(RingSize);
        bool more = true;
        while (more && _left > 0)
        {
            try
            {
                more = machine.RunUntil(vcpu.InstructionCount + Math.Min(RingSize, _left), cancellation);
            }
            finally
            {
                Drain(vcpu);
            }
        }

        output.Flush();
        if (more)
        {
            vcpu.SetTrace(0);
            machine.Resume();
        }
    }

    private void Drain(Vcpu vcpu)
    {
        int taken;
        while ((taken = vcpu.ReadTrace(_entries)) > 0)
        {
            foreach (ref readonly TraceEntry entry in _entries.AsSpan(0, taken))
            {
                // An instruction that waits for a device is started again, and a repeated one goes on in
                // pieces: one instruction all the same.
                if (entry.Retired != _lastRetired || entry.Rip != _lastRip)
                {
                    output.WriteLine(Format(entry));
                    _left -= Math.Min(_left, 1);
                }

                _lastRetired = entry.Retired;
                _lastRip = entry.Rip;
            }
        }

        output.Flush();
    }

    private string Format(in TraceEntry entry)
    {
        ReadOnlySpan<byte> bytes = entry.Bytes;
        bytes = bytes[..entry.Length];
        int length = Disassembler.Disassemble(bytes, (int)entry.Mode, entry.Rip, out string text);
        _line.Clear();
        _line.Append(CultureInfo.InvariantCulture, $"{entry.Retired,12} {entry.Mode}/{entry.Cpl} {entry.Rip:x16}  ");
        _line.Append(CultureInfo.InvariantCulture, $"{Convert.ToHexStringLower(length == 0 ? bytes : bytes[..length]),-30}  {text}");
        if (registers)
        {
            _line.Append(' ', Math.Max(1, 100 - _line.Length));
            for (int i = 0; i < RegisterNames.Length; i++)
            {
                _line.Append(CultureInfo.InvariantCulture, $" {RegisterNames[i]}={entry.Registers[i]:x}");
            }

            _line.Append(CultureInfo.InvariantCulture, $" rflags={entry.Rflags:x}");
        }

        return _line.ToString();
    }
}
