using KvmSharp.GuestTests.Support;

namespace KvmSharp.GuestTests;

/// <summary>
/// Whatever is wrong with the command line or the files it names: one clear line on standard
/// error, a status other than 0, no stack trace and no hang.
/// </summary>
public sealed class BadInputTests : IDisposable
{
    private readonly TemporaryDirectory _directory = new();

    public static TheoryData<string, string> CommandLines => new()
    {
        { "", "command" },
        { "frobnicate", "frobnicate" },
        { "--frobnicate", "--frobnicate" },
        { "run --frobnicate", "--frobnicate" },
        { "run -x", "-x" },
        { "run redhat", "redhat" },
        { "run debian extra", "extra" },
        { "run debian --flavor rt", "rt" },
        { "run debian --kernel x", "--kernel" },
        { "run --flavor cloud", "--flavor" },
        { "run --kernel", "--kernel" },
        { "run --kernel=", "--kernel" },
        { "run --append quiet", "--append" },
        { "run --initrd x", "--initrd" },
        { "run --memory", "--memory" },
        { "run --memory 512M --memory 1G", "--memory" },
        { "run --memory lots", "lots" },
        { "run --memory -1", "-1" },
        { "run --memory 1.5G", "1.5G" },
        { "run --memory 0", "memory" },
        { "run --memory 1K", "memory" },
        { "run --memory 64K", "memory" },
        { "run --memory 999999T", "memory" },
        { "run --memory 99999999999999999999999", "memory" },
        { "run --cpus 65", "--cpus" },
        { "run --cpus 0", "--cpus" },
        { "run --cpus many", "many" },
        { "run --cpu 8086", "8086" },
        { "run --cpu x86-64-v2,+warp", "warp" },
        { "run --cpu x86-64-v2,+svm", "svm" },
        { "run --cpu x86-64-v2,sse2", "sse2" },
        { "run --cpu ,", "--cpu" },
        { "run --serial tcp", "tcp" },
        { "run --serial file=", "--serial" },
        { "run --serial file=/nonexistent/serial", "/nonexistent/serial" },
        { "run --debugcon /nonexistent/debug", "/nonexistent/debug" },
        { "run --debugcon /", "/" },
        { "run --trace /nonexistent/trace", "/nonexistent/trace" },
        { "run --trace stderr,everything", "everything" },
        { "run --device", "--device" },
        { "run --device warp-drive", "warp-drive" },
        { "run --device isa-debug-exit,iobase=zero", "zero" },
        { "run --device isa-debug-exit,iobase=0x12345", "0x12345" },
        { "run --device isa-debug-exit,color=red", "color" },
        { "run --device isa-debug-exit,iobase", "iobase" },
        { "run --device isa-debug-exit,iobase=0x3f8", "0x3f8" },
        { "run --engine steam", "steam" },
        { "run --clock sundial", "sundial" },
        { "run --no-reboot=yes", "--no-reboot" },
        { "run --firmware /nonexistent/bios", "/nonexistent/bios" },
        { "run --firmware a --kernel b", "--firmware" },
        { "run --disk path=x", "--disk" },
        { "run --net token-ring", "token-ring" },
        { "run --net switch", "VirtualSwitch" },
        { "run --net user,color=red", "color" },
        { "run --net user,hostfwd=tcp::22", "tcp::22" },
        { "run --net user,allow=a:b:c", "a:b:c" },
        { "run --net user,loopback=maybe", "maybe" },
        { "run --net user,subnet=10.0.0.0/30", "10.0.0.0/30" },
        { "run --net user,mac=x,mac=y", "mac" },
        { "run --net user,capture=/nonexistent/a.pcap", "/nonexistent/a.pcap" },
        { "run --net user --clock virtual", "virtual" },
        { "run --kernel /nonexistent/vmlinuz", "/nonexistent/vmlinuz" },
        { "run --kernel /", "/" },
        { "run --kernel /dev/null", "/dev/null" },
        { "disasm", "file" },
        { "disasm /nonexistent/code", "/nonexistent/code" },
        { "disasm /", "/" },
        { "disasm /dev/null --bits 48", "48" },
        { "disasm /dev/null --base here", "here" },
        { "doctor --frobnicate", "--frobnicate" },
    };

    [Theory]
    [MemberData(nameof(CommandLines))]
    public async Task CommandLineIsRefused(string commandLine, string mentioned)
    {
        CommandResult result = await CommandRunner.KvmSharpAsync(commandLine.Split(' ', StringSplitOptions.RemoveEmptyEntries));
        AssertOneLine(result, mentioned);
    }

    [Fact]
    public async Task EmptyValuesAreRefused()
    {
        foreach (string option in (string[])["--kernel", "--memory", "--cpu", "--serial", "--device", "--engine", "--clock", "--cpus"])
        {
            AssertOneLine(await CommandRunner.KvmSharpAsync(["run", option, ""]), option);
        }
    }

    [Theory]
    [InlineData("empty", 0)]
    [InlineData("one byte", 1)]
    [InlineData("one sector", 512)]
    [InlineData("a page", 4096)]
    [InlineData("a megabyte", 1 << 20)]
    public async Task RandomKernelIsRefused(string name, int size)
    {
        byte[] content = new byte[size];
        new Random(size).NextBytes(content);
        string kernel = _directory.File(name, content);
        AssertOneLine(await CommandRunner.KvmSharpAsync(["run", "--kernel", kernel]), kernel);
    }

    [Fact]
    public async Task TruncatedKernelIsRefused()
    {
        byte[] kernel = File.ReadAllBytes((await DebianCache.CloudAsync()).Kernel);
        foreach (int size in (int[])[100, 513, 700, 4096, 20000, kernel.Length / 2, kernel.Length - 70000])
        {
            string path = _directory.File($"vmlinuz-{size}", kernel[..size]);
            AssertOneLine(await CommandRunner.KvmSharpAsync(["run", "--kernel", path]), path);
        }
    }

    [Fact]
    public async Task TruncatedElfIsRefused()
    {
        byte[] guest = File.ReadAllBytes(TestPaths.Guest("hello.elf"));
        foreach (int size in (int[])[4, 16, 63, 64, 100, 4096])
        {
            string path = _directory.File($"guest-{size}", guest[..size]);
            AssertOneLine(await CommandRunner.KvmSharpAsync(["run", "--kernel", path]), path);
        }
    }

    [Fact]
    public async Task BadInitrdIsRefused()
    {
        string kernel = (await DebianCache.CloudAsync()).Kernel;
        AssertOneLine(await CommandRunner.KvmSharpAsync(["run", "--kernel", kernel, "--initrd", "/nonexistent/initrd"]), "/nonexistent/initrd");
        AssertOneLine(await CommandRunner.KvmSharpAsync(["run", "--kernel", kernel, "--initrd", _directory.Path]), _directory.Path);
        string huge = _directory.File("huge");
        using (FileStream file = File.Create(huge))
        {
            file.SetLength(600L << 20);
        }

        AssertOneLine(await CommandRunner.KvmSharpAsync(["run", "--kernel", kernel, "--initrd", huge]), "memory");
    }

    [Fact]
    public async Task KernelThatDoesNotFitIsRefused()
    {
        string kernel = (await DebianCache.CloudAsync()).Kernel;
        AssertOneLine(await CommandRunner.KvmSharpAsync(["run", "--kernel", kernel, "--memory", "16M"]), "memory");
    }

    [Fact]
    public async Task CommandLineThatIsTooLongIsRefused()
    {
        string kernel = (await DebianCache.CloudAsync()).Kernel;
        AssertOneLine(await CommandRunner.KvmSharpAsync(["run", "--kernel", kernel, "--append", new string('x', 5000)]), "command line");
    }

    [Theory]
    [InlineData("<&-", "input")]
    [InlineData(">&-", "output")]
    public async Task ClosedStandardStreamIsReported(string redirection, string mentioned)
    {
        CommandResult result = await CommandRunner.RunAsync(
            "/bin/sh", ["-c", $"exec '{TestPaths.CommandLineProgram}' run {redirection}"]);
        AssertOneLine(result, mentioned);
    }

    public void Dispose() => _directory.Dispose();

    private static void AssertOneLine(CommandResult result, string mentioned)
    {
        Assert.True(result.Status is > 0 and < 128, result.ToString());
        Assert.True(result.Output.Length == 0, result.ToString());
        string line = result.Error.TrimEnd('\n');
        Assert.True(line.StartsWith("kvmsharp: ", StringComparison.Ordinal) && !line.Contains('\n'), result.ToString());
        Assert.DoesNotContain("Exception", line);
        Assert.True(line.Contains(mentioned, StringComparison.OrdinalIgnoreCase), result.ToString());
    }
}
