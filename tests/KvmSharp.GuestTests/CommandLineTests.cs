using System.Text;
using System.Text.Json;
using KvmSharp.GuestTests.Support;

namespace KvmSharp.GuestTests;

/// <summary>The kvmsharp program from outside.</summary>
public sealed class CommandLineTests : IDisposable
{
    private static readonly TimeSpan BootLimit = TimeSpan.FromSeconds(120);

    private readonly TemporaryDirectory _directory = new();

    [Fact]
    public async Task RunAloneBootsTheDemoGuest()
    {
        CommandResult result = await CommandRunner.KvmSharpAsync(["run"], BootLimit);
        Assert.True(result.Status == 0, result.ToString());
        Assert.Contains("KvmSharp demo guest", result.Output);
        Assert.Contains("power-off  ACPI", result.Output);
        Assert.Empty(result.Error);
    }

    [Fact]
    public async Task DebugExitGivesTheStatus()
    {
        string file = _directory.File("debug");
        CommandResult result = await CommandRunner.KvmSharpAsync(
            ["run", "--kernel", TestPaths.Guest("hello.elf"), "--device", "isa-debug-exit", "--debugcon", file, "--serial", "off"]);
        Assert.True(result.Status == 43 && result.Error.Length == 0, result.ToString());
        Assert.Equal("hello\n", File.ReadAllText(file));
    }

    [Fact]
    public async Task TripleFaultIsReported()
    {
        CommandResult result = await CommandRunner.KvmSharpAsync(
            ["run", "--kernel", TestPaths.Guest("triplefault.elf"), "--serial", "off"]);
        Assert.Equal(1, result.Status);
        Assert.Matches("^kvmsharp: [^\n]*[Tt]riple fault[^\n]*\n$", result.Error);
    }

    [Fact]
    public async Task SerialOutputCanGoToAFile()
    {
        string file = _directory.File("serial");
        CommandResult result = await CommandRunner.KvmSharpAsync(["run", "--serial", "file=" + file, "--json"], BootLimit);
        Assert.True(result.Status == 0, result.ToString());
        Assert.Contains("KvmSharp demo guest", File.ReadAllText(file));
        using JsonDocument json = JsonDocument.Parse(result.Output);
        Assert.Equal("PowerOff", json.RootElement.GetProperty("exit").GetString());
        Assert.True(json.RootElement.GetProperty("instructions").GetUInt64() > 1000);
    }

    [Theory]
    [InlineData("TERM", 143)]
    [InlineData("INT", 130)]
    [InlineData("HUP", 129)]
    public async Task SignalEndsARunningGuest(string signal, int status)
    {
        string file = _directory.File("debug");
        // A shell that started the tests in the background has them ignore SIGINT.
        using var kvmsharp = new InteractiveProgram(
            "env",
            [$"--default-signal={signal}", TestPaths.CommandLineProgram, "run", "--kernel", TestPaths.Guest("spin.elf"), "--serial", "off", "--debugcon", file]);
        await WaitForTextAsync(file, "spinning");
        await CommandRunner.RunAsync("kill", [$"-{signal}", $"{kvmsharp.Id}"]);
        CommandResult result = await kvmsharp.WaitAsync(TimeSpan.FromSeconds(60));
        Assert.True(result.Status == status, result.ToString());
        Assert.Matches("^kvmsharp: [^\n]+\n$", result.Error);
    }

    [Fact]
    public async Task KeysLeaveTheMachineAndTheTerminalIsRestored()
    {
        string log = _directory.File("debug");
        string script = _directory.File("script", Encoding.ASCII.GetBytes($"""
            stty -g > '{_directory.Path}/before'
            '{TestPaths.CommandLineProgram}' run --kernel '{TestPaths.Guest("idle.elf")}' --debugcon '{log}'
            echo status=$?
            stty -g > '{_directory.Path}/after'

            """));
        // script(1) gives the program a terminal.
        using var terminal = new InteractiveProgram("script", ["-qec", $"sh '{script}'", _directory.File("typescript")]);
        await WaitForTextAsync(log, "idle");
        await Task.Delay(200);
        terminal.Send("abc\u0003\u0001x");
        await terminal.ExpectAsync("status=", TimeSpan.FromSeconds(60));
        CommandResult result = await terminal.WaitAsync(TimeSpan.FromSeconds(60));
        Assert.Equal("kvmsharp: ended by Ctrl-A x\r\nstatus=1\r\n", result.Output);
        Assert.Equal(File.ReadAllText(_directory.File("before")), File.ReadAllText(_directory.File("after")));
    }

    [Fact]
    public async Task DebianRunsCommandsFromAPipeAndPowersOff()
    {
        CommandResult result = await CommandRunner.KvmSharpAsync(
            ["run", "debian", "--memory", "512M"], BootLimit, "echo 6 times 7 is $((6 * 7))\npoweroff -f\n");
        Assert.True(result.Status == 0, result.ToString());
        Assert.Contains("6 times 7 is 42", result.Output);
    }

    [Fact]
    public async Task RebootEndsTheRunWithNoReboot()
    {
        CommandResult result = await CommandRunner.KvmSharpAsync(
            ["run", "debian", "--no-reboot", "--json"], BootLimit, "reboot -f\n");
        Assert.True(result.Status == 0, result.ToString());
        Assert.Contains("\"exit\":\"Reset\"", result.Error);
    }

    [Fact]
    public async Task RebootStartsTheMachineAnew()
    {
        using var kvmsharp = new InteractiveProgram(TestPaths.CommandLineProgram, ["run", "debian", "--json"]);
        await kvmsharp.ExpectAsync("~ # ", BootLimit);
        kvmsharp.Send("reboot -f\n");
        await kvmsharp.ExpectAsync("~ # ", BootLimit);
        kvmsharp.Send("poweroff -f\n");
        CommandResult result = await kvmsharp.WaitAsync(BootLimit);
        Assert.True(result.Status == 0, result.ToString());
        Assert.Contains("\"exit\":\"PowerOff\"", result.Error);
        Assert.Contains("\"boots\":2", result.Error);
    }

    [Fact]
    public async Task ExitOfTheShellPowersOff()
    {
        CommandResult result = await CommandRunner.KvmSharpAsync(["run", "debian", "--append", "quiet"], BootLimit, "exit\n");
        Assert.True(result.Status == 0, result.ToString());
    }

    [Fact]
    public async Task TraceShowsInstructions()
    {
        string file = _directory.File("trace");
        CommandResult result = await CommandRunner.KvmSharpAsync(
            ["run", "--trace", $"{file},regs,count=1000", "--clock", "virtual"], BootLimit);
        Assert.True(result.Status == 0, result.ToString());
        string[] lines = File.ReadAllLines(file);
        Assert.Equal(1000, lines.Length);
        Assert.Matches("^ +0 64/0 0000000001000000  fa +cli +rax=", lines[0]);
        Assert.Matches("^ +1 64/0 0000000001000001  fc +cld +rax=", lines[1]);
    }

    [Fact]
    public async Task DisassemblyIsPrinted()
    {
        string file = _directory.File("code", [0x48, 0x01, 0xd8, 0xe8, 0xf8, 0xff, 0xff, 0xff, 0x0f, 0x0b, 0xf4]);
        CommandResult result = await CommandRunner.KvmSharpAsync(["disasm", file, "--base", "0x1000"]);
        Assert.True(result.Status == 0, result.ToString());
        Assert.Equal(
            "0000000000001000  4801d8                          add    rax,rbx\n" +
            "0000000000001003  e8f8ffffff                      call   0x1000\n" +
            "0000000000001008  0f0b                            ud2\n" +
            "000000000000100a  f4                              hlt\n",
            result.Output);
    }

    [Fact]
    public async Task ImagesAreCreatedConvertedAndChecked()
    {
        string raw = _directory.File("a.raw", new byte[3 << 20]), image = _directory.File("b.qcow2"), back = _directory.File("c.img");
        await ImgAsync("convert", raw, image, "cluster=4K");
        await ImgAsync("check", image);
        await ImgAsync("convert", image, back);
        Assert.Equal(File.ReadAllBytes(raw), File.ReadAllBytes(back));
        using (JsonDocument json = JsonDocument.Parse(await ImgAsync("info", image, "--json")))
        {
            Assert.Equal("qcow2", json.RootElement.GetProperty("format").GetString());
            Assert.Equal(3 << 20, json.RootElement.GetProperty("size").GetInt64());
            Assert.Equal(4096, json.RootElement.GetProperty("clusterSize").GetInt32());
        }

        string overlay = _directory.File("top.qcow2");
        await ImgAsync("create", overlay, "backing=b.qcow2", "backing_format=qcow2");
        Assert.Contains("backing file    b.qcow2 (qcow2)", await ImgAsync("info", overlay));
        await ImgAsync("convert", overlay, back, "backing_depth=1", "overwrite=on");
        using JsonDocument check = JsonDocument.Parse(await ImgAsync("check", image, "repair=leaks", "--json"));
        Assert.True(check.RootElement.GetProperty("clean").GetBoolean());

        async Task<string> ImgAsync(params string[] arguments)
        {
            CommandResult result = await CommandRunner.KvmSharpAsync(["img", .. arguments]);
            Assert.True(result.Status == 0 && result.Error.Length == 0, result.ToString());
            return result.Output;
        }
    }

    [Theory]
    [InlineData("", 2)]
    [InlineData("frob", 2)]
    [InlineData("create", 2)]
    [InlineData("create x.qcow2", 2)]
    [InlineData("create x.qcow2 size=12Q", 2)]
    [InlineData("create x.qcow2 size=1000", 2)]
    [InlineData("create x.qcow2 size=1M cluster=3K", 2)]
    [InlineData("create x.qcow2 size=1M size=2M", 2)]
    [InlineData("create x.dat size=1M", 2)]
    [InlineData("create x.raw size=1M cluster=64K", 2)]
    [InlineData("create x.qcow2 backing=y", 2)]
    [InlineData("create x.qcow2 size=9000000T", 2)]
    [InlineData("create text.qcow2 size=1M", 1)]
    [InlineData("info missing", 1)]
    [InlineData("info text.qcow2 format=qcow2", 1)]
    [InlineData("check text.qcow2", 1)]
    [InlineData("check text.qcow2 repair=some", 2)]
    [InlineData("convert text.qcow2", 2)]
    [InlineData("convert missing y.raw", 1)]
    [InlineData("convert text.qcow2 y.raw source_format=qcow2", 1)]
    public async Task WrongImgCommandIsOneLine(string arguments, int status)
    {
        _directory.File("text.qcow2", new byte[1024]);
        CommandResult result = await CommandRunner.RunAsync(
            TestPaths.CommandLineProgram, ["img", .. arguments.Split(' ', StringSplitOptions.RemoveEmptyEntries)], directory: _directory.Path);
        Assert.True(result.Status == status && result.Output.Length == 0, result.ToString());
        Assert.Matches("^kvmsharp: [^\n]+\n$", result.Error);
        Assert.Equal(["text.qcow2"], Directory.GetFiles(_directory.Path).Select(Path.GetFileName));
    }

    [Fact]
    public async Task DoctorIsContent()
    {
        CommandResult result = await CommandRunner.KvmSharpAsync(["doctor", "--json"], BootLimit);
        Assert.True(result.Status == 0, result.ToString());
        using JsonDocument json = JsonDocument.Parse(result.Output);
        Assert.Contains(json.RootElement.EnumerateArray(), item => item.GetProperty("name").GetString() == "self-test");
    }

    [Theory]
    [InlineData("--help", "kvmsharp run debian")]
    [InlineData("--version", "kvmsharp 0.")]
    [InlineData("run --help", "--no-reboot")]
    public async Task HelpIsPrinted(string arguments, string text)
    {
        CommandResult result = await CommandRunner.KvmSharpAsync(arguments.Split(' '));
        Assert.True(result.Status == 0 && result.Error.Length == 0, result.ToString());
        Assert.Contains(text, result.Output);
    }

    public void Dispose() => _directory.Dispose();

    private static async Task WaitForTextAsync(string file, string text)
    {
        for (int i = 0; i < 1200; i++)
        {
            if (File.Exists(file) && File.ReadAllText(file).Contains(text, StringComparison.Ordinal))
            {
                return;
            }

            await Task.Delay(50);
        }

        Assert.Fail($"'{text}' did not appear in {file}");
    }
}
