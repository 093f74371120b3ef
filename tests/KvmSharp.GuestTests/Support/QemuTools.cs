using KvmSharp.Cli.CommandLine;
using KvmSharp.Cli.Debian;
using KvmSharp.Cli.Terminal;

namespace KvmSharp.GuestTests.Support;

/// <summary>
/// QEMU's disk image tools, the reference for qcow2: those on the PATH, or Debian's package in the cache, obtained with apt
/// and without root like the kernels under test.
/// </summary>
internal sealed class QemuTools
{
    private const string Package = "qemu-utils";
    private const string LibraryDirectory = "usr/lib/x86_64-linux-gnu";

    private static readonly Lazy<Task<QemuTools>> _instance = new(() => FindAsync("PATH"));

    private readonly string _directory;
    private readonly Dictionary<string, string> _environment;

    private QemuTools(string directory, Dictionary<string, string> environment)
    {
        _directory = directory;
        _environment = environment;
    }

    public static Task<QemuTools> GetAsync() => _instance.Value;

    /// <summary>Runs qemu-img or qemu-io and returns how it ended.</summary>
    public Task<CommandResult> RunAsync(string tool, params string[] arguments) =>
        CommandRunner.RunAsync(Path.Combine(_directory, tool), arguments, environment: _environment);

    /// <summary>Runs qemu-img or qemu-io, which must succeed.</summary>
    public async Task<string> ExpectAsync(string tool, params string[] arguments)
    {
        CommandResult result = await RunAsync(tool, arguments);
        Assert.True(result.Status == 0, $"{tool} {string.Join(' ', arguments)}: {result}");
        return result.Output;
    }

    /// <summary>Finds the tools through a variable such as PATH, or else in the cache, which is filled if needed.</summary>
    internal static async Task<QemuTools> FindAsync(string pathVariable)
    {
        foreach (string directory in (Environment.GetEnvironmentVariable(pathVariable) ?? "").Split(':', StringSplitOptions.RemoveEmptyEntries))
        {
            if (File.Exists(Path.Combine(directory, "qemu-img")) && File.Exists(Path.Combine(directory, "qemu-io")))
            {
                return new QemuTools(directory, []);
            }
        }

        string cache = Path.Combine(DebianImages.DefaultCacheDirectory(), "debian", Package);
        string root = Path.Combine(cache, "root");
        if (!File.Exists(Path.Combine(cache, "complete")))
        {
            await FetchAsync(cache, root);
            File.WriteAllText(Path.Combine(cache, "complete"), "");
        }

        string libraries = $"{root}/{LibraryDirectory}:{root}/{LibraryDirectory["usr/".Length..]}";
        return new QemuTools(Path.Combine(root, "usr/bin"), new Dictionary<string, string> { ["LD_LIBRARY_PATH"] = libraries });
    }

    private static async Task FetchAsync(string cache, string root)
    {
        if (Directory.Exists(cache))
        {
            Directory.Delete(cache, recursive: true);
        }

        Directory.CreateDirectory(root);
        var apt = new AptClient(Path.Combine(cache, "apt"), new ProgressLine(TextWriter.Null, isTerminal: false));
        try
        {
            await FetchAllAsync(apt, cache, root);
        }
        catch (CliException)
        {
            await apt.UsePrivateListsAsync(CancellationToken.None);
            await FetchAllAsync(apt, cache, root);
        }
    }

    private static bool IsInstalled(string package) =>
        File.Exists($"/var/lib/dpkg/info/{package}.list") || File.Exists($"/var/lib/dpkg/info/{package}:amd64.list");

    /// <summary>Unpacks the package and those libraries it needs that the host does not have.</summary>
    private static async Task FetchAllAsync(AptClient apt, string cache, string root)
    {
        var seen = new HashSet<string> { Package };
        var wanted = new Queue<string>([Package]);
        while (wanted.TryDequeue(out string? name))
        {
            if (await apt.FindAsync(name, CancellationToken.None) is not { } package)
            {
                // Some names are virtual packages; if a library is missing, the tool says so.
                Assert.False(name == Package, $"apt knows no package '{Package}', which the comparison with QEMU's tools needs");
                continue;
            }

            string download = Path.Combine(cache, "download");
            Directory.CreateDirectory(download);
            string archive = await apt.DownloadAsync(package, download, CancellationToken.None);
            HostTool.Result result = await HostTool.RunAsync("dpkg-deb", ["-x", archive, root], null, CancellationToken.None);
            Assert.True(result.Succeeded, result.LastMessage);
            Directory.Delete(download, recursive: true);
            foreach (string dependency in package.Depends)
            {
                string plain = dependency.Split(':')[0];
                if ((plain.StartsWith("lib", StringComparison.Ordinal) || plain == "zlib1g") && seen.Add(plain) && !IsInstalled(plain))
                {
                    wanted.Enqueue(plain);
                }
            }
        }
    }
}
