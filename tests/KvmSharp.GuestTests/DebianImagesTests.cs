using KvmSharp.Cli.Debian;
using KvmSharp.Cli.Terminal;
using KvmSharp.GuestTests.Support;

namespace KvmSharp.GuestTests;

/// <summary>Obtaining Debian's files with the host's apt tools.</summary>
public sealed class DebianImagesTests : IDisposable
{
    private readonly TemporaryDirectory _directory = new();
    private readonly ProgressLine _silent = new(TextWriter.Null, isTerminal: false);

    [Fact]
    public async Task DamagedFilesAreObtainedAgain()
    {
        var images = new DebianImages(_directory.Path, _silent);
        DebianImage first = await images.ObtainAsync(DebianFlavor.Cloud, refresh: false, CancellationToken.None);
        byte[] kernel = File.ReadAllBytes(first.Kernel);
        byte[] initrd = File.ReadAllBytes(first.Initrd);

        DateTime written = File.GetLastWriteTimeUtc(first.Kernel);
        Assert.Equal(first, await images.ObtainAsync(DebianFlavor.Cloud, refresh: false, CancellationToken.None));
        Assert.Equal(written, File.GetLastWriteTimeUtc(first.Kernel));

        byte[] damaged = [.. kernel];
        damaged[damaged.Length / 2] ^= 1;
        File.WriteAllBytes(first.Kernel, damaged);
        File.WriteAllBytes(first.Initrd, initrd[..1000]);
        Assert.Equal(first, await images.ObtainAsync(DebianFlavor.Cloud, refresh: false, CancellationToken.None));
        Assert.Equal(kernel, File.ReadAllBytes(first.Kernel));
        Assert.Equal(initrd, File.ReadAllBytes(first.Initrd));
    }

    [Fact]
    public async Task PrivatePackageListsServeHostsWithoutLists()
    {
        var apt = new AptClient(_directory.Path, _silent);
        await apt.UsePrivateListsAsync(CancellationToken.None);
        AptPackage? package = await apt.FindAsync("linux-image-cloud-amd64", CancellationToken.None);
        Assert.NotNull(package);
        Assert.Contains(package.Depends, name => name.StartsWith("linux-image-", StringComparison.Ordinal));
        Assert.NotEmpty(Directory.GetFiles(Path.Combine(_directory.Path, "lists")));
    }

    [Fact]
    public async Task CacheThatCannotBeWrittenIsReported()
    {
        string file = _directory.File("file", [1]);
        CommandResult result = await CommandRunner.RunAsync(
            TestPaths.CommandLineProgram, ["run", "debian"], environment: new Dictionary<string, string> { ["XDG_CACHE_HOME"] = file });
        Assert.Equal(1, result.Status);
        Assert.Matches("^kvmsharp: cannot use the cache directory: [^\n]+\n$", result.Error);
    }

    public void Dispose() => _directory.Dispose();
}
