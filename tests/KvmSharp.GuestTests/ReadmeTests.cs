using System.Text.RegularExpressions;
using KvmSharp.GuestTests.Samples;
using KvmSharp.GuestTests.Support;

namespace KvmSharp.GuestTests;

/// <summary>The code in the README and the documents is code that is compiled and run here.</summary>
public sealed partial class ReadmeTests
{
    private static readonly string Documents = string.Concat(Directory
        .GetFiles(Path.Combine(TestPaths.RepositoryRoot, "docs"), "*.md", SearchOption.AllDirectories)
        .Append(Path.Combine(TestPaths.RepositoryRoot, "README.md")).Select(File.ReadAllText));

    [Fact]
    public void CodeInTheDocumentsIsTheCodeOfTheSamples()
    {
        string samples = string.Concat(Directory
            .GetFiles(Path.Combine(TestPaths.RepositoryRoot, "tests", "KvmSharp.GuestTests", "Samples"), "*.cs").Select(File.ReadAllText));
        Dictionary<string, string> regions = Regions().Matches(samples)
            .ToDictionary(match => match.Groups[1].Value, match => Unindent(match.Groups[2].Value));
        MatchCollection blocks = CodeBlocks().Matches(Documents);
        Assert.NotEmpty(blocks);
        foreach (Match block in blocks)
        {
            string name = block.Groups[1].Value;
            Assert.True(regions.TryGetValue(name, out string? code), $"no sample has the region '{name}'");
            Assert.Equal(code, block.Groups[2].Value.TrimEnd());
        }
    }

    [Fact]
    public void LinksLeadSomewhere()
    {
        foreach (string file in Directory.GetFiles(Path.Combine(TestPaths.RepositoryRoot, "docs"), "*.md", SearchOption.AllDirectories)
            .Append(Path.Combine(TestPaths.RepositoryRoot, "README.md")))
        {
            foreach (Match link in Links().Matches(File.ReadAllText(file)))
            {
                string target = Path.Combine(Path.GetDirectoryName(file)!, link.Groups[1].Value.Split('#')[0]);
                Assert.True(File.Exists(target) || Directory.Exists(target), $"{file}: {link.Groups[1].Value}");
            }
        }
    }

    [Fact]
    public async Task BootSampleBoots()
    {
        Cli.Debian.DebianImage image = await DebianCache.CloudAsync();
        using var directory = new TemporaryDirectory();
        string initrd = directory.File("initrd", PowerOffInitrd.Build());
        using var console = new MemoryStream();
        VmExit exit = await BootLinux.RunAsync(image.Kernel, initrd, console).WaitAsync(TimeSpan.FromMinutes(2));
        Assert.Equal(VmExitKind.PowerOff, exit.Kind);
        Assert.Contains("Linux version", System.Text.Encoding.ASCII.GetString(console.ToArray()));
    }

    [Fact]
    public async Task DeviceSampleAnswersTheGuest()
    {
        VmExit exit = await OwnDevice.RunAsync(GuestRunner.Options("adder")).WaitAsync(TimeSpan.FromSeconds(60));
        Assert.Equal((VmExitKind.DebugExit, 1), (exit.Kind, exit.ExitCode));
    }

    private static string Unindent(string text)
    {
        string[] lines = text.TrimEnd().Split('\n');
        int indent = lines.Where(line => line.Length > 0).Min(line => line.Length - line.TrimStart().Length);
        return string.Join('\n', lines.Select(line => line.Length == 0 ? line : line[indent..]));
    }

    [GeneratedRegex("""#region (\S+)\n(.*?)\n *#endregion""", RegexOptions.Singleline)]
    private static partial Regex Regions();

    [GeneratedRegex("""<!-- sample: (\S+) -->\n```csharp\n(.*?)```""", RegexOptions.Singleline)]
    private static partial Regex CodeBlocks();

    [GeneratedRegex("""\]\((?!https?:|#)([^)]+)\)""")]
    private static partial Regex Links();
}
