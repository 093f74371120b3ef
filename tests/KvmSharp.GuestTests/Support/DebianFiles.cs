using KvmSharp.Cli.Debian;
using KvmSharp.Cli.Terminal;

namespace KvmSharp.GuestTests.Support;

/// <summary>Files of Debian packages: the host's own where the package is installed, otherwise unpacked into the cache.</summary>
internal static class DebianFiles
{
    private static readonly SemaphoreSlim _one = new(1);

    /// <summary>The path of a file.</summary>
    /// <param name="package">The package.</param>
    /// <param name="file">The file's path in the package, without the leading slash.</param>
    public static async Task<string> GetAsync(string package, string file)
    {
        string installed = Path.Combine("/", file);
        if (File.Exists(installed))
        {
            return installed;
        }

        await _one.WaitAsync();
        try
        {
            string root = Path.Combine(DebianImages.DefaultCacheDirectory(), "test-packages", package);
            string path = Path.Combine(root, file);
            if (!File.Exists(path))
            {
                await UnpackAsync(package, root);
            }

            return path;
        }
        finally
        {
            _one.Release();
        }
    }

    public static Task<string> SeaBiosAsync() => GetAsync("seabios", "usr/share/seabios/bios-256k.bin");

    public static Task<string> VideoBiosAsync() => GetAsync("seabios", "usr/share/seabios/vgabios-stdvga.bin");

    private static async Task UnpackAsync(string package, string root)
    {
        string download = Directory.CreateTempSubdirectory("kvmsharp-package-").FullName;
        try
        {
            var apt = new AptClient(
                Path.Combine(DebianImages.DefaultCacheDirectory(), "apt"), new ProgressLine(TextWriter.Null, isTerminal: false));
            AptPackage? found = await apt.FindAsync(package, CancellationToken.None);
            if (found is null)
            {
                await apt.UsePrivateListsAsync(CancellationToken.None);
                found = await apt.FindAsync(package, CancellationToken.None);
            }

            Assert.True(found is not null, $"apt does not know the package {package}");
            string archive = await apt.DownloadAsync(found, download, CancellationToken.None);
            Directory.CreateDirectory(root);
            HostTool.Result result = await HostTool.RunAsync("dpkg-deb", ["-x", archive, root], null, CancellationToken.None);
            Assert.True(result.Succeeded, result.LastMessage);
        }
        finally
        {
            Directory.Delete(download, recursive: true);
        }
    }
}
