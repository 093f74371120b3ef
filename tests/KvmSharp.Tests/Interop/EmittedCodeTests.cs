using System.Diagnostics;
using System.Text.RegularExpressions;

namespace KvmSharp.Tests.Interop;

/// <summary>
/// The interpreter's handlers must only tail-call each other: a handler that calls the next one instead leaves a frame behind,
/// and a guest that takes this way often enough uses up the host's stack.
/// </summary>
public sealed partial class EmittedCodeTests
{
    // These call a handler, or a timer's function, and go on afterwards.
    private static readonly string[] Callers = ["kvs_vcpu_run", "step", "run_block", "fire_timer"];

    [Fact]
    public async Task HandlersTailCallEachOther()
    {
        var library = Path.Combine(AppContext.BaseDirectory, "runtimes", "linux-x64", "native", "libkvmsharp.so");
        using var objdump = Process.Start(new ProcessStartInfo("objdump", ["-d", "--no-show-raw-insn", library]) { RedirectStandardOutput = true })!;
        var function = "";
        var wrong = new List<string>();
        while (await objdump.StandardOutput.ReadLineAsync() is { } line)
        {
            if (Function().Match(line) is { Success: true } start)
            {
                function = start.Groups[1].Value.Split('.')[0];
            }
            else if (IndirectCall().IsMatch(line) && !Callers.Contains(function))
            {
                wrong.Add($"{function}: {line.Trim()}");
            }
        }
        Assert.NotEqual("", function);
        Assert.Empty(wrong);
    }

    // Unchained branches of every kind, far more often than the stack has room for frames.
    [Fact]
    public void LoopThroughAPageCrossingInstructionNeedsNoStack()
    {
        using var machine = new VirtualMachine(new VirtualMachineOptions { MemorySize = 1 << 20, InterruptController = false });
        // At 0x10ffe: inc rax (crosses the page); cmp rax, 3000000; jne back; hlt
        byte[] code = [0x48, 0xff, 0xc0, 0x48, 0x3d, 0xc0, 0xc6, 0x2d, 0x00, 0x75, 0xf5, 0xf4];
        KvmSharp.Boot.FlatLoader.Load(machine.Memory, machine.Vcpus[0], KvmSharp.Boot.BootImage.FromBytes(code), 0x10ffe);
        Assert.Equal(VcpuExitReason.Halt, machine.Vcpus[0].Run().Reason);
        Assert.Equal(3_000_000u, machine.Vcpus[0].GetRegisters().Rax);
    }

    [GeneratedRegex(@"^[0-9a-f]+ <([^>]+)>:")]
    private static partial Regex Function();

    // Handlers are called through the decoded instruction; functions of instruction semantics come in a register.
    [GeneratedRegex(@"\bcall +\*(0x[0-9a-f]+)?\(")]
    private static partial Regex IndirectCall();
}
