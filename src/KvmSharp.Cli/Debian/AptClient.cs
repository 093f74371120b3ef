using System.Globalization;
using KvmSharp.Cli.CommandLine;
using KvmSharp.Cli.Terminal;

namespace KvmSharp.Cli.Debian;

/// <summary>What apt knows about one package version.</summary>
internal sealed record AptPackage(string Name, string Version, long Size, IReadOnlyList<string> Depends);

/// <summary>
/// Looks up and downloads packages with the host's own apt, without root. It starts with the
/// host's package lists; where those are missing or out of date it fetches lists of its own into
/// <paramref name="stateDirectory"/>. Signatures and hashes are checked by apt either way. Packages of another
/// <paramref name="architecture"/> than the host's have names that end with a colon and it.
/// </summary>
internal sealed class AptClient(string stateDirectory, IProgressSink progress, string? architecture = null)
{
    private bool _privateState;
    private string? _incompleteLists;

    /// <summary>Switches to private package lists and fetches them.</summary>
    public async Task UsePrivateListsAsync(CancellationToken cancellation)
    {
        foreach (string directory in (ReadOnlySpan<string>)["lists/partial", "cache/archives/partial"])
        {
            Directory.CreateDirectory(Path.Combine(stateDirectory, directory));
        }

        _privateState = true;
        progress.Step("fetching package lists");
        HostTool.Result result = await RunAsync("apt-get", ["update"], null, cancellation).ConfigureAwait(false);
        if (!result.Succeeded)
        {
            // A mirror may be in the middle of an update; apt keeps the lists that it could verify, which may be enough.
            _incompleteLists = $"apt-get update failed: {result.LastMessage}";
        }
    }

    /// <summary>Like <see cref="FindAsync"/>, but the package must be there.</summary>
    public async Task<AptPackage> RequireAsync(string name, CancellationToken cancellation) =>
        await FindAsync(name, cancellation).ConfigureAwait(false)
        ?? throw new CliException(_incompleteLists
            ?? $"apt knows no package '{name}'; are Debian's sources for {architecture ?? "amd64"} configured?");

    /// <summary>The candidate version of a package, or <see langword="null"/> if apt does not know it.</summary>
    public async Task<AptPackage?> FindAsync(string name, CancellationToken cancellation)
    {
        HostTool.Result result =
            await RunAsync("apt-cache", ["show", "--no-all-versions", name], null, cancellation).ConfigureAwait(false);
        return result.Succeeded ? ParseRecord(result.Output, name) : null;
    }

    /// <summary>Downloads one package into an empty directory and returns the file.</summary>
    public async Task<string> DownloadAsync(AptPackage package, string directory, CancellationToken cancellation)
    {
        Task<HostTool.Result> download = RunAsync(
            "apt-get", ["download", "-q", $"{package.Name}={package.Version}"], directory, cancellation);
        while (await Task.WhenAny(download, Task.Delay(200, cancellation)).ConfigureAwait(false) != download)
        {
            cancellation.ThrowIfCancellationRequested();
            long present = new DirectoryInfo(directory).EnumerateFiles().Sum(file => file.Exists ? file.Length : 0);
            progress.Advance($"downloading {package.Name}", present, package.Size);
        }

        HostTool.Result result = await download.ConfigureAwait(false);
        string? file = Directory.EnumerateFiles(directory, "*.deb").FirstOrDefault();
        if (!result.Succeeded || file is null)
        {
            throw new CliException($"cannot download {package.Name}: {result.LastMessage}");
        }

        return file;
    }

    /// <summary>Reads the fields that matter from the first record of <c>apt-cache show</c>.</summary>
    internal static AptPackage? ParseRecord(string text, string name)
    {
        string? version = null;
        long size = 0;
        var depends = new List<string>();
        foreach (string line in text.Split('\n'))
        {
            if (line.Length == 0 && version is not null)
            {
                break;
            }

            int colon = line.IndexOf(':');
            if (colon <= 0 || char.IsWhiteSpace(line[0]))
            {
                continue;
            }

            string value = line[(colon + 1)..].Trim();
            switch (line[..colon])
            {
                case "Version":
                    version = value;
                    break;
                case "Size":
                    _ = long.TryParse(value, NumberStyles.None, CultureInfo.InvariantCulture, out size);
                    break;
                case "Depends":
                    depends.AddRange(value.Split(',').Select(item => item.Trim().Split(' ')[0]));
                    break;
            }
        }

        return version is null ? null : new AptPackage(name, version, size, depends);
    }

    private Task<HostTool.Result> RunAsync(
        string tool, IEnumerable<string> arguments, string? directory, CancellationToken cancellation)
    {
        List<string> options =
        [
            "-o", "APT::Sandbox::User=root",
            "-o", "Acquire::Languages=none",
            "-o", "Acquire::Retries=2",
            "-o", "Acquire::http::Timeout=30",
            "-o", "Acquire::https::Timeout=30",
        ];
        if (architecture is not null)
        {
            options.AddRange(["-o", "APT::Architectures::=amd64", "-o", $"APT::Architectures::={architecture}"]);
        }

        if (_privateState)
        {
            options.AddRange(
            [
                "-o", $"Dir::State={stateDirectory}",
                "-o", $"Dir::State::lists={stateDirectory}/lists",
                "-o", "Dir::State::status=/var/lib/dpkg/status",
                "-o", $"Dir::Cache={stateDirectory}/cache",
                "-o", $"Dir::Cache::archives={stateDirectory}/cache/archives",
                "-o", "Acquire::GzipIndexes=true",
            ]);
        }
        else
        {
            // The host's cache files may not be writable for this user; apt then works in memory.
            options.AddRange(["-o", "Dir::Cache::pkgcache=", "-o", "Dir::Cache::srcpkgcache="]);
        }

        return HostTool.RunAsync(tool, [.. options, .. arguments], directory, cancellation);
    }
}
