using System.Text;
using KvmSharp.Cli.CommandLine;
using KvmSharp.Cli.Debian;
using KvmSharp.Cli.Terminal;

namespace KvmSharp.GuestTests;

/// <summary>Parts of the command that need no guest.</summary>
public sealed class CommandPartsTests
{
    [Theory]
    [InlineData("512M", 512L << 20)]
    [InlineData("1G", 1L << 30)]
    [InlineData("2g", 2L << 30)]
    [InlineData("64", 64L << 20)]
    [InlineData("4096K", 4L << 20)]
    [InlineData("3GiB", 3L << 30)]
    [InlineData("1T", 1L << 40)]
    public void SizesAreRead(string text, long size) => Assert.Equal(size, MemorySize.Parse("--memory", text));

    [Theory]
    [InlineData("")]
    [InlineData("M")]
    [InlineData("-1M")]
    [InlineData("1.5G")]
    [InlineData("1P")]
    [InlineData("0x10M")]
    [InlineData("1M1")]
    [InlineData("9999999999T")]
    [InlineData("99999999999999999999999999")]
    public void OtherSizesAreRefused(string text) => Assert.Throws<CliException>(() => MemorySize.Parse("--memory", text));

    [Theory]
    [InlineData("plain text", "plain text", "None")]
    [InlineData("\u0003\u0004\u001b[A", "\u0003\u0004\u001b[A", "None")]
    [InlineData("a\u0001xb", "a", "Quit")]
    [InlineData("a\u0001hb", "ab", "Help")]
    [InlineData("a\u0001\u0001b", "a\u0001b", "None")]
    [InlineData("a\u0001ab", "a\u0001b", "None")]
    [InlineData("a\u0001zb", "a\u0001zb", "None")]
    public void EscapesAreFound(string typed, string forGuest, string request)
    {
        for (int split = 0; split <= typed.Length; split++)
        {
            var filter = new EscapeFilter();
            var received = new StringBuilder();
            HostRequest found = HostRequest.None;
            foreach (string part in (string[])[typed[..split], typed[split..]])
            {
                var buffer = new byte[part.Length + 1];
                HostRequest result = filter.Filter(Encoding.Latin1.GetBytes(part), buffer, out int count);
                received.Append(Encoding.Latin1.GetString(buffer, 0, count));
                if (result != HostRequest.None)
                {
                    found = result;
                }

                if (result == HostRequest.Quit)
                {
                    break;
                }
            }

            Assert.Equal((forGuest, request), (received.ToString(), found.ToString()));
        }
    }

    [Fact]
    public void OptionsAreRead()
    {
        RunOptions options = RunOptionsParser.Parse(
        [
            "--kernel", "k", "--initrd=i", "--append", "a b=c", "--memory", "1G", "--cpu", "x86-64-v2,-smap", "--serial", "file=s",
            "--debugcon", "d", "--device", "isa-debug-exit,iobase=0x501", "--clock", "virtual", "--engine", "jit",
            "--no-pci", "--no-reboot", "--trace", "t,regs,count=5", "--json",
        ]);
        Assert.Equal(new RunOptions().BootOrder, options.BootOrder);
        Assert.Equal(
            new RunOptions
            {
                BootOrder = options.BootOrder, // a list: compared above
                Kernel = "k", Initrd = "i", Append = "a b=c", Memory = 1L << 30, Cpu = "x86-64-v2,-smap", Serial = SerialTarget.File,
                SerialFile = "s", DebugconFile = "d", DebugExitPort = 0x501, VirtualClock = true, Engine = ExecutionEngine.Jit, Pci = false, NoReboot = true,
                Trace = TraceTarget.File, TraceFile = "t", TraceRegisters = true, TraceCount = 5, Json = true,
            },
            options);
    }

    [Fact]
    public void ArchiveHasTheFormatThatTheKernelReads()
    {
        using var stream = new MemoryStream();
        var archive = new CpioWriter(stream);
        archive.AddDirectory("dev");
        archive.AddCharacterDevice("dev/console", 5, 1, 0x180);
        archive.AddFile("file", "content"u8);
        archive.AddSymbolicLink("link", "file");
        archive.Finish();
        Assert.Equal(0, stream.Length % 512);

        byte[] bytes = stream.ToArray();
        var entries = new List<string>();
        for (int at = 0; ;)
        {
            Assert.Equal(0, at % 4);
            Assert.Equal("070701", Encoding.ASCII.GetString(bytes, at, 6));
            uint Field(int index) => Convert.ToUInt32(Encoding.ASCII.GetString(bytes, at + 6 + (8 * index), 8), 16);
            string name = Encoding.ASCII.GetString(bytes, at + 110, (int)Field(11) - 1);
            int start = (at + 110 + (int)Field(11) + 3) & ~3;
            if (name == "TRAILER!!!")
            {
                break;
            }

            string content = Encoding.ASCII.GetString(bytes, start, (int)Field(6));
            entries.Add($"{name} {Convert.ToString(Field(1), 8)} {Field(9)}:{Field(10)} {content}");
            at = (start + (int)Field(6) + 3) & ~3;
        }

        Assert.Equal(["dev 40755 0:0 ", "dev/console 20600 5:1 ", "file 100644 0:0 content", "link 120777 0:0 file"], entries);
    }

    [Fact]
    public void PackageRecordsAreRead()
    {
        AptPackage? package = AptClient.ParseRecord(
            "Package: linux-image-cloud-amd64\nVersion: 6.1.2-1\nSize: 1234\nDepends: linux-image-6.1.0-1-cloud-amd64 (= 6.1.2-1), foo | bar\n" +
            "Description: x\n more: y\n\nPackage: other\nVersion: 1\n",
            "linux-image-cloud-amd64");
        Assert.NotNull(package);
        Assert.Equal(("6.1.2-1", 1234L, "linux-image-6.1.0-1-cloud-amd64"), (package.Version, package.Size, package.Depends[0]));
        Assert.Null(AptClient.ParseRecord("N: no such package\n", "x"));
    }
}
