using System.Diagnostics;
using System.Formats.Tar;
using System.Security.Cryptography;
using KvmSharp.Boot;
using KvmSharp.Cli.CommandLine;
using KvmSharp.Cli.Terminal;

namespace KvmSharp.Cli.Debian;

/// <summary>Which of Debian's kernel packages to boot.</summary>
internal enum DebianFlavor
{
    /// <summary>linux-image-cloud-amd64: drivers for virtual machines only.</summary>
    Cloud,

    /// <summary>linux-image-amd64: the kernel of ordinary installations.</summary>
    Generic,

    /// <summary>linux-image-686:i386: the 32-bit kernel without physical address extension.</summary>
    I686,

    /// <summary>linux-image-686-pae:i386: the 32-bit kernel with physical address extension.</summary>
    I686Pae,
}

/// <summary>A kernel and an initramfs, verified and ready to boot.</summary>
internal sealed record DebianImage(string Kernel, string Initrd, string KernelPackage, string KernelVersion);

/// <summary>
/// Provides Debian's kernel and a BusyBox userland through the host's own package tools, without
/// root. What was obtained once stays in a cache directory and is checked against its SHA-256
/// every time it is used.
/// </summary>
internal sealed class DebianImages(string cacheDirectory, IProgressSink progress)
{
    private const string BusyboxPackage = "busybox-static";
    private const string AptStateName = "apt";

    // Part of the manifest's name: a new version of the init script or layout makes old files unused.
    private const string FormatVersion = "4";

    /// <summary>The directory for cached files: $XDG_CACHE_HOME/kvmsharp, or ~/.cache/kvmsharp.</summary>
    public static string DefaultCacheDirectory()
    {
        // XDG Base Directory Specification: relative paths there are to be ignored.
        string? cache = Environment.GetEnvironmentVariable("XDG_CACHE_HOME");
        if (!string.IsNullOrEmpty(cache) && Path.IsPathRooted(cache))
        {
            return Path.Combine(cache, "kvmsharp");
        }

        string home = Environment.GetEnvironmentVariable("HOME") is { Length: > 0 } variable
            ? variable
            : Environment.GetFolderPath(Environment.SpecialFolder.UserProfile);
        return home.Length > 0
            ? Path.Combine(home, ".cache", "kvmsharp")
            : throw new CliException("there is no home directory for the cache; set XDG_CACHE_HOME");
    }

    /// <summary>Returns the images from the cache, or obtains them first.</summary>
    /// <param name="flavor">Which kernel.</param>
    /// <param name="refresh">Ask for the newest packages even when the cache holds some.</param>
    /// <param name="cancellation">Ends the work early.</param>
    public async Task<DebianImage> ObtainAsync(DebianFlavor flavor, bool refresh, CancellationToken cancellation)
    {
        string directory = Path.Combine(cacheDirectory, "debian");
        try
        {
            Directory.CreateDirectory(directory);
            using FileStream exclusive = await LockAsync(Path.Combine(directory, "lock"), cancellation).ConfigureAwait(false);
            string manifest = Path.Combine(directory, $"{FlavorName(flavor)}-{FormatVersion}.manifest");
            if (!refresh && ReadManifest(manifest, directory) is { } cached)
            {
                return cached;
            }

            DebianImage image = await WithAptAsync(
                directory, MetaPackage(flavor), apt => FetchAsync(apt, directory, flavor, cancellation), cancellation).ConfigureAwait(false);
            WriteManifest(manifest, image);
            return image;
        }
        catch (Exception exception) when (exception is IOException or UnauthorizedAccessException)
        {
            throw new CliException($"cannot use the cache directory: {exception.Message}", exception);
        }
        finally
        {
            progress.Clear();
        }
    }

    /// <summary>
    /// Obtains an initramfs with kernel modules, to be put behind the image's own. The kernel parameter
    /// <c>kvmsharp.modules</c> (names joined by commas) loads some of them with what they need.
    /// </summary>
    /// <param name="image">The image that they are for.</param>
    /// <param name="cancellation">Ends the work early.</param>
    private async Task<string> ObtainModulesAsync(DebianImage image, CancellationToken cancellation)
    {
        string directory = Path.Combine(cacheDirectory, "debian");
        string file = Path.Combine(directory, $"modules-{KernelModules.FormatVersion}_{image.KernelPackage.Replace(':', '-')}_{image.KernelVersion}.cpio.gz");
        try
        {
            using FileStream exclusive = await LockAsync(Path.Combine(directory, "lock"), cancellation).ConfigureAwait(false);
            if (IsIntact(file))
            {
                return file;
            }

            byte[] content = await WithAptAsync(
                directory, image.KernelPackage, apt => FetchModulesAsync(apt, image, directory, cancellation), cancellation).ConfigureAwait(false);
            WriteAtomically(file + ".sha256", System.Text.Encoding.ASCII.GetBytes(Convert.ToHexStringLower(SHA256.HashData(content)) + "\n"));
            WriteAtomically(file, content);
            return file;
        }
        catch (Exception exception) when (exception is IOException or UnauthorizedAccessException)
        {
            throw new CliException($"cannot use the cache directory: {exception.Message}", exception);
        }
        finally
        {
            progress.Clear();
        }
    }

    private async Task<byte[]> FetchModulesAsync(AptClient apt, DebianImage image, string directory, CancellationToken cancellation)
    {
        AptPackage package = await apt.RequireAsync(image.KernelPackage, cancellation).ConfigureAwait(false);
        if (package.Version != image.KernelVersion)
        {
            throw new CliException($"apt has {image.KernelPackage} {package.Version}, the cached kernel is {image.KernelVersion}; use --refresh");
        }

        var modules = new KernelModules();
        await WithPackageAsync(apt, package, directory, (archive, _) => ReadArchiveAsync(archive, package.Name, modules.AddAsync, cancellation),
            cancellation).ConfigureAwait(false);
        return modules.Build();
    }

    /// <summary>The image's initramfs with the kernel modules behind it.</summary>
    /// <param name="image">The image.</param>
    /// <param name="cancellation">Ends the work early.</param>
    public async Task<BootImage> WithModulesAsync(DebianImage image, CancellationToken cancellation)
    {
        string modules = await ObtainModulesAsync(image, cancellation).ConfigureAwait(false);
        return BootImage.FromBytes((byte[])[.. File.ReadAllBytes(image.Initrd), .. File.ReadAllBytes(modules)], image.Initrd);
    }

    /// <summary>The name of a kernel on the command line.</summary>
    internal static string FlavorName(DebianFlavor flavor) => flavor switch
    {
        DebianFlavor.Cloud => "cloud",
        DebianFlavor.Generic => "generic",
        DebianFlavor.I686 => "686",
        _ => "686-pae",
    };

    private static string MetaPackage(DebianFlavor flavor) => flavor switch
    {
        DebianFlavor.Cloud => "linux-image-cloud-amd64",
        DebianFlavor.Generic => "linux-image-amd64",
        DebianFlavor.I686 => "linux-image-686:i386",
        _ => "linux-image-686-pae:i386",
    };

    // What stands behind the colon of a package of another architecture.
    private static string? Architecture(string package) => package.IndexOf(':') is >= 0 and int colon ? package[(colon + 1)..] : null;

    /// <summary>Uses apt with the host's package lists, and once more with new ones if that fails.</summary>
    private async Task<T> WithAptAsync<T>(
        string directory, string package, Func<AptClient, Task<T>> use, CancellationToken cancellation)
    {
        HostTool.Require("apt-get", "apt-cache", "dpkg-deb");
        string state = Path.Combine(directory, AptStateName);
        var apt = new AptClient(state, progress, Architecture(package));
        try
        {
            return await use(apt).ConfigureAwait(false);
        }
        catch (CliException)
        {
            // No lists, or lists that name versions which the archive has already replaced.
            await apt.UsePrivateListsAsync(cancellation).ConfigureAwait(false);
            return await use(apt).ConfigureAwait(false);
        }
        finally
        {
            if (Directory.Exists(state))
            {
                Directory.Delete(state, recursive: true);
            }
        }
    }

    private async Task<DebianImage> FetchAsync(
        AptClient apt, string directory, DebianFlavor flavor, CancellationToken cancellation)
    {
        progress.Step("looking up packages");
        AptPackage meta = await apt.RequireAsync(MetaPackage(flavor), cancellation).ConfigureAwait(false);
        string? architecture = Architecture(meta.Name);
        string suffix = architecture is null ? "" : ":" + architecture;
        string kernelName = meta.Depends.FirstOrDefault(name => name.StartsWith("linux-image-", StringComparison.Ordinal))
            ?? throw new CliException($"package {meta.Name} names no kernel");
        AptPackage kernel = await apt.RequireAsync(kernelName + suffix, cancellation).ConfigureAwait(false);
        AptPackage busybox = await apt.RequireAsync(BusyboxPackage + suffix, cancellation).ConfigureAwait(false);

        string kernelFile = Path.Combine(directory, $"vmlinuz_{FileName(kernel)}");
        await EnsureAsync(
            apt, kernel, kernelFile,
            name => name.StartsWith("boot/vmlinuz-", StringComparison.Ordinal), cancellation).ConfigureAwait(false);

        string busyboxFile = Path.Combine(directory, $"busybox_{FileName(busybox)}");
        await EnsureAsync(
            apt, busybox, busyboxFile,
            name => name is "bin/busybox" or "usr/bin/busybox", cancellation).ConfigureAwait(false);

        progress.Step("building the initramfs");
        string initrdFile = Path.Combine(directory, $"initramfs-{FormatVersion}_{FileName(busybox)}.cpio.gz");
        // The host may be unable to run programs of another architecture.
        IReadOnlyList<string> applets = architecture is null ? await ListAppletsAsync(busyboxFile, cancellation).ConfigureAwait(false) : ["sh"];
        WriteAtomically(initrdFile, InitramfsBuilder.Build(File.ReadAllBytes(busyboxFile), applets));
        return new DebianImage(kernelFile, initrdFile, kernel.Name, kernel.Version);
    }

    private static string FileName(AptPackage package) =>
        $"{package.Name}_{package.Version}".Replace(':', '-').Replace('/', '-');

    private static bool IsIntact(string file) => File.Exists(file) && File.Exists(file + ".sha256")
        && File.ReadAllText(file + ".sha256").Trim() == HashOf(file);

    /// <summary>Downloads a package and takes one file out of it, unless that file is there already.</summary>
    private async Task EnsureAsync(
        AptClient apt, AptPackage package, string target, Func<string, bool> wanted, CancellationToken cancellation)
    {
        if (IsIntact(target))
        {
            return;
        }

        await WithPackageAsync(apt, package, Path.GetDirectoryName(target)!, async (archive, temporary) =>
        {
            string extracted = Path.Combine(temporary, "file");
            await ExtractAsync(archive, wanted, extracted, package.Name, cancellation).ConfigureAwait(false);
            if (!OperatingSystem.IsWindows())
            {
                File.SetUnixFileMode(extracted, UnixFileMode.UserRead | UnixFileMode.UserWrite | UnixFileMode.UserExecute
                    | UnixFileMode.GroupRead | UnixFileMode.OtherRead);
            }

            WriteAtomically(target + ".sha256", System.Text.Encoding.ASCII.GetBytes(HashOf(extracted) + "\n"));
            File.Move(extracted, target, overwrite: true);
        }, cancellation).ConfigureAwait(false);
    }

    /// <summary>Downloads a package into a directory of its own, which is gone when its use ends.</summary>
    private async Task WithPackageAsync(
        AptClient apt, AptPackage package, string directory, Func<string, string, Task> use, CancellationToken cancellation)
    {
        string temporary = Path.Combine(directory, "download");
        if (Directory.Exists(temporary))
        {
            Directory.Delete(temporary, recursive: true);
        }

        Directory.CreateDirectory(temporary);
        try
        {
            string archive = await apt.DownloadAsync(package, temporary, cancellation).ConfigureAwait(false);
            progress.Step($"unpacking {package.Name}");
            await use(archive, temporary).ConfigureAwait(false);
        }
        finally
        {
            Directory.Delete(temporary, recursive: true);
        }
    }

    /// <summary>Copies the first matching file of a package's file system archive.</summary>
    private static async Task ExtractAsync(
        string package, Func<string, bool> wanted, string target, string packageName, CancellationToken cancellation)
    {
        bool found = false;
        await ReadArchiveAsync(package, packageName, async (name, content) =>
        {
            if (wanted(name))
            {
                await using FileStream output = File.Create(target);
                await content.CopyToAsync(output, cancellation).ConfigureAwait(false);
                found = true;
            }

            return !found;
        }, cancellation).ConfigureAwait(false);
        if (!found)
        {
            throw new CliException($"package {packageName} does not hold the expected file");
        }
    }

    /// <summary>Shows the files of a package's file system archive until the visitor has enough.</summary>
    private static async Task ReadArchiveAsync(
        string package, string packageName, Func<string, Stream, Task<bool>> visit, CancellationToken cancellation)
    {
        // The tar stream is read here instead of unpacking everything: a kernel package holds
        // hundreds of megabytes of modules, and the kernel itself comes first.
        using Process process = Process.Start(HostTool.StartInfo("dpkg-deb", ["--fsys-tarfile", package]))
            ?? throw new CliException("cannot start 'dpkg-deb'");
        process.StandardInput.Close();
        process.ErrorDataReceived += static (_, _) => { };
        process.BeginErrorReadLine();
        try
        {
            await using var tar = new TarReader(process.StandardOutput.BaseStream, leaveOpen: true);
            while (await tar.GetNextEntryAsync(copyData: false, cancellation).ConfigureAwait(false) is { } entry)
            {
                string name = entry.Name.StartsWith("./", StringComparison.Ordinal) ? entry.Name[2..] : entry.Name;
                if (entry.DataStream is not null && !await visit(name, entry.DataStream).ConfigureAwait(false))
                {
                    return;
                }
            }
        }
        catch (Exception exception) when (exception is InvalidDataException or EndOfStreamException or FormatException)
        {
            throw new CliException($"package {packageName} is damaged: {exception.Message}", exception);
        }
        finally
        {
            process.Kill(entireProcessTree: true);
            await process.WaitForExitAsync(CancellationToken.None).ConfigureAwait(false);
        }
    }

    private static async Task<IReadOnlyList<string>> ListAppletsAsync(string busybox, CancellationToken cancellation)
    {
        HostTool.Result result = await HostTool.RunAsync(busybox, ["--list"], null, cancellation).ConfigureAwait(false);
        return result.Succeeded
            ? result.Output.Split('\n', StringSplitOptions.RemoveEmptyEntries | StringSplitOptions.TrimEntries)
            : throw new CliException($"cannot list the commands of busybox: {result.LastMessage}");
    }

    private static async Task<FileStream> LockAsync(string path, CancellationToken cancellation)
    {
        while (true)
        {
            try
            {
                return new FileStream(path, FileMode.OpenOrCreate, FileAccess.ReadWrite, FileShare.None);
            }
            catch (IOException) when (File.Exists(path))
            {
                // Another process is filling the cache.
                await Task.Delay(100, cancellation).ConfigureAwait(false);
            }
        }
    }

    // The manifest: package and version, then "sha256 file-name" for the kernel and the initramfs.
    private static DebianImage? ReadManifest(string path, string directory)
    {
        if (!File.Exists(path))
        {
            return null;
        }

        string[][] lines = [.. File.ReadAllLines(path).Select(line => line.Split(' ', 2))];
        if (lines.Length != 3 || lines.Any(line => line.Length != 2))
        {
            return null;
        }

        string kernel = Path.Combine(directory, lines[1][1]);
        string initrd = Path.Combine(directory, lines[2][1]);
        bool intact = File.Exists(kernel) && File.Exists(initrd)
            && HashOf(kernel) == lines[1][0] && HashOf(initrd) == lines[2][0];
        return intact ? new DebianImage(kernel, initrd, lines[0][0], lines[0][1]) : null;
    }

    private static void WriteManifest(string path, DebianImage image)
    {
        string text = $"{image.KernelPackage} {image.KernelVersion}\n"
            + $"{HashOf(image.Kernel)} {Path.GetFileName(image.Kernel)}\n"
            + $"{HashOf(image.Initrd)} {Path.GetFileName(image.Initrd)}\n";
        WriteAtomically(path, System.Text.Encoding.UTF8.GetBytes(text));
    }

    private static void WriteAtomically(string path, byte[] content)
    {
        string temporary = path + ".new";
        File.WriteAllBytes(temporary, content);
        File.Move(temporary, path, overwrite: true);
    }

    private static string HashOf(string path)
    {
        using FileStream file = File.OpenRead(path);
        return Convert.ToHexStringLower(SHA256.HashData(file));
    }
}
