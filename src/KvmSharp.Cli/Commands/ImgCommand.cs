using System.Buffers;
using System.Globalization;
using System.Runtime.InteropServices;
using System.Text;
using System.Text.Json;
using KvmSharp.Cli.CommandLine;
using KvmSharp.Cli.Terminal;
using KvmSharp.Storage;

namespace KvmSharp.Cli.Commands;

/// <summary><c>kvmsharp img</c>: creates, describes, converts and checks disk images.</summary>
internal static class ImgCommand
{
    private static readonly string[] _qcow2Keys = ["cluster", "refcount_bits", "version"];

    public static int Run(IReadOnlyList<string> arguments)
    {
        using var cancellation = new CancellationTokenSource();
        void Cancel(PosixSignalContext context)
        {
            context.Cancel = true;
            cancellation.Cancel();
        }

        using PosixSignalRegistration interrupt = PosixSignalRegistration.Create(PosixSignal.SIGINT, Cancel);
        using PosixSignalRegistration terminate = PosixSignalRegistration.Create(PosixSignal.SIGTERM, Cancel);
        string[] rest = [.. arguments.Skip(1)];
        try
        {
            return arguments.FirstOrDefault() switch
            {
                "create" => Create(rest),
                "info" => Info(rest),
                "convert" => Convert(rest, cancellation.Token),
                "check" => Check(rest, cancellation.Token),
                null => throw new CliException("img needs create, info, convert or check (see kvmsharp --help)", ExitStatus.Usage),
                string other => throw new CliException($"img: '{other}' is none of create, info, convert, check (see kvmsharp --help)", ExitStatus.Usage),
            };
        }
        catch (ArgumentException exception)
        {
            // What an option is wrong about is in the first line; the name of the parameter means nothing to a user.
            string message = exception.ParamName is null ? exception.Message : exception.Message.Replace($" (Parameter '{exception.ParamName}')", "", StringComparison.Ordinal);
            throw new CliException($"img: {message}", exception, ExitStatus.Usage);
        }
    }

    private static int Create(string[] words)
    {
        var arguments = new ImageArguments("create", 1, words, ["size", "format", "backing", "backing_format", .. _qcow2Keys]);
        string path = arguments.Files[0];
        ImageFormat format = TargetFormat(arguments, path);
        string? backing = arguments.Text("backing");
        Qcow2CreateOptions? options = TargetOptions(arguments, format, backing);
        long size = arguments.Size("size") ?? (backing is null ? throw arguments.Usage("needs size=") : BackingLength(path, backing, options!));
        DiskImage.Create(path, format, size, options);
        return ExitStatus.Success;
    }

    private static int Info(string[] words)
    {
        var arguments = new ImageArguments("info", 1, words, "format", "--json");
        var info = ImageInfo.Read(arguments.Files[0], arguments.Format("format"));
        Messages.Output.WriteLine(arguments.Json ? ToJson(json => Describe(json, info)) : ToText(info));
        return ExitStatus.Success;
    }

    private static int Convert(string[] words, CancellationToken cancellation)
    {
        var arguments = new ImageArguments("convert", 2, words, ["format", "source_format", "backing_depth", "overwrite", .. _qcow2Keys]);
        string target = arguments.Files[1];
        ImageFormat format = TargetFormat(arguments, target);
        Qcow2CreateOptions? options = TargetOptions(arguments, format, backing: null);
        if (!arguments.Switch("overwrite") && File.Exists(target))
        {
            throw new CliException($"'{target}' exists already (overwrite=on replaces it)");
        }

        using IBlockBackend source = OpenSource(arguments);
        // The target appears when it is complete, and an existing one stays until then.
        string partial = target + ".part";
        var progress = new ProgressLine(Messages.Error, !Console.IsErrorRedirected);
        try
        {
            DiskImage.Create(partial, format, source.Length, options);
            try
            {
                using (IBlockBackend disk = DiskImage.Open(partial, new DiskImageOptions { Format = format }))
                {
                    DiskImage.Copy(source, disk, Console.IsErrorRedirected ? null : new Progress(progress, source.Length), cancellation);
                }

                File.Move(partial, target, arguments.Switch("overwrite"));
            }
            catch
            {
                File.Delete(partial);
                throw;
            }
        }
        catch (Exception exception) when (exception is IOException or UnauthorizedAccessException)
        {
            throw new CliException($"cannot write '{target}': {exception.Message}", exception);
        }
        finally
        {
            progress.Clear();
        }

        return ExitStatus.Success;
    }

    private static IBlockBackend OpenSource(ImageArguments arguments)
    {
        int depth = arguments.Number("backing_depth", 0);
        if (depth > DiskImage.BackingDepthLimit)
        {
            throw arguments.Usage($"backing_depth: {depth} is more than {DiskImage.BackingDepthLimit}");
        }

        try
        {
            return DiskImage.Open(arguments.Files[0], new DiskImageOptions
            {
                ReadOnly = true,
                Format = arguments.Format("source_format"),
                MaxBackingDepth = depth,
            });
        }
        catch (StorageException exception) when (exception.Problem == StorageProblem.BackingFile && depth == 0)
        {
            throw new CliException($"{exception.Message} (backing_depth=1 allows one)", exception);
        }
    }

    private static int Check(string[] words, CancellationToken cancellation)
    {
        var arguments = new ImageArguments("check", 1, words, "repair", "--json");
        ImageRepair repair = arguments.Text("repair") switch
        {
            null => ImageRepair.None,
            "leaks" => ImageRepair.Leaks,
            "all" => ImageRepair.All,
            string other => throw arguments.Usage($"repair: '{other}' is neither leaks nor all"),
        };
        string path = arguments.Files[0];
        if (DiskImage.DetectFormat(path) == ImageFormat.Raw)
        {
            throw new CliException($"'{path}' is not a qcow2 image; raw images have nothing that could be checked");
        }

        ImageCheckResult result = Qcow2Image.Check(path, repair, cancellation);
        if (arguments.Json)
        {
            Messages.Output.WriteLine(ToJson(json => Describe(json, result)));
        }
        else
        {
            foreach (string message in result.Messages)
            {
                Messages.Output.WriteLine(message);
            }

            Messages.Output.WriteLine(string.Create(
                CultureInfo.InvariantCulture,
                $"{result.AllocatedClusters} of {result.TotalClusters} clusters allocated, {result.CompressedClusters} compressed"));
            if (result.RepairedErrors + result.RepairedLeaks > 0)
            {
                Messages.Output.WriteLine(string.Create(CultureInfo.InvariantCulture, $"{result.RepairedErrors} errors and {result.RepairedLeaks} leaks repaired"));
            }
        }

        return result.IsClean ? ExitStatus.Success : throw new CliException(string.Create(
            CultureInfo.InvariantCulture,
            $"'{path}' has {result.Errors - result.RepairedErrors} errors and {result.Leaks - result.RepairedLeaks} leaked clusters"
            + $"{(result.Errors == 0 && repair == ImageRepair.None ? " (repair=leaks frees them)" : "")}"));
    }

    private static ImageFormat TargetFormat(ImageArguments arguments, string path) => arguments.Format("format") ?? Path.GetExtension(path).ToLowerInvariant() switch
    {
        ".qcow2" or ".qcow" => ImageFormat.Qcow2,
        ".raw" or ".img" => ImageFormat.Raw,
        _ => throw arguments.Usage($"the name '{path}' does not tell the format; give format=raw or format=qcow2"),
    };

    private static Qcow2CreateOptions? TargetOptions(ImageArguments arguments, ImageFormat format, string? backing)
    {
        if (format == ImageFormat.Raw)
        {
            return Array.Find([.. _qcow2Keys, "backing", "backing_format"], arguments.Has) is { } key
                ? throw arguments.Usage($"{key} goes with format=qcow2 only")
                : null;
        }

        var defaults = new Qcow2CreateOptions();
        return new Qcow2CreateOptions
        {
            ClusterSize = (int)Math.Min(arguments.Size("cluster") ?? defaults.ClusterSize, int.MaxValue),
            RefcountBits = arguments.Number("refcount_bits", defaults.RefcountBits),
            Version = arguments.Number("version", defaults.Version),
            BackingFile = backing,
            BackingFormat = arguments.Format("backing_format") ?? (backing is null ? null
                : throw arguments.Usage("backing needs backing_format=raw or backing_format=qcow2")),
        };
    }

    private static long BackingLength(string path, string backing, Qcow2CreateOptions options)
    {
        string directory = Path.GetDirectoryName(Path.GetFullPath(path)) ?? "/";
        return ImageInfo.Read(Path.Combine(directory, backing), options.BackingFormat).Length;
    }

    private static string ToText(ImageInfo info)
    {
        var lines = new List<string>
        {
            $"file            {info.Path}",
            $"format          {FormatName(info)}",
            $"size            {Bytes(info.Length)}",
            $"file length     {Bytes(info.FileLength)}",
            $"allocated       {Bytes(info.AllocatedBytes)}",
        };
        if (info.Format == ImageFormat.Qcow2)
        {
            lines.Add($"cluster size    {Bytes(info.ClusterSize)}");
            lines.Add(string.Create(CultureInfo.InvariantCulture, $"refcount bits   {info.RefcountBits}"));
        }

        if (info.BackingFile is { } backing)
        {
            lines.Add($"backing file    {backing} ({info.BackingFormat ?? "format not given"})");
        }

        lines.AddRange(info.Snapshots.Select(snapshot => string.Create(
            CultureInfo.InvariantCulture, $"snapshot {snapshot.Id,-6} {snapshot.Name}  {snapshot.Created:yyyy-MM-dd HH:mm:ss}")));
        if (info.IsDirty || info.IsCorrupt)
        {
            lines.Add($"state           {(info.IsCorrupt ? "damaged" : "not closed cleanly")}; 'kvmsharp img check' repairs");
        }

        return string.Join(Environment.NewLine, lines);
    }

    private static void Describe(Utf8JsonWriter json, ImageInfo info)
    {
        json.WriteString("file", info.Path);
        json.WriteString("format", info.Format == ImageFormat.Qcow2 ? "qcow2" : "raw");
        json.WriteNumber("size", info.Length);
        json.WriteNumber("fileLength", info.FileLength);
        json.WriteNumber("allocated", info.AllocatedBytes);
        if (info.Format == ImageFormat.Raw)
        {
            return;
        }

        json.WriteNumber("version", info.Version);
        json.WriteNumber("clusterSize", info.ClusterSize);
        json.WriteNumber("refcountBits", info.RefcountBits);
        json.WriteBoolean("lazyRefcounts", info.LazyRefcounts);
        json.WriteBoolean("dirty", info.IsDirty);
        json.WriteBoolean("corrupt", info.IsCorrupt);
        json.WriteString("backingFile", info.BackingFile);
        json.WriteString("backingFormat", info.BackingFormat);
        json.WriteStartArray("snapshots");
        foreach (Qcow2Snapshot snapshot in info.Snapshots)
        {
            json.WriteStartObject();
            json.WriteString("id", snapshot.Id);
            json.WriteString("name", snapshot.Name);
            json.WriteString("created", snapshot.Created);
            json.WriteNumber("stateBytes", snapshot.StateBytes);
            json.WriteEndObject();
        }

        json.WriteEndArray();
    }

    private static void Describe(Utf8JsonWriter json, ImageCheckResult result)
    {
        json.WriteBoolean("clean", result.IsClean);
        json.WriteNumber("errors", result.Errors);
        json.WriteNumber("leaks", result.Leaks);
        json.WriteNumber("repairedErrors", result.RepairedErrors);
        json.WriteNumber("repairedLeaks", result.RepairedLeaks);
        json.WriteNumber("allocatedClusters", result.AllocatedClusters);
        json.WriteNumber("compressedClusters", result.CompressedClusters);
        json.WriteNumber("totalClusters", result.TotalClusters);
        json.WriteStartArray("messages");
        foreach (string message in result.Messages)
        {
            json.WriteStringValue(message);
        }

        json.WriteEndArray();
    }

    private static string ToJson(Action<Utf8JsonWriter> write)
    {
        var buffer = new ArrayBufferWriter<byte>();
        using (var json = new Utf8JsonWriter(buffer))
        {
            json.WriteStartObject();
            write(json);
            json.WriteEndObject();
        }

        return Encoding.UTF8.GetString(buffer.WrittenSpan);
    }

    private static string FormatName(ImageInfo info) =>
        info.Format == ImageFormat.Raw ? "raw" : string.Create(CultureInfo.InvariantCulture, $"qcow2, version {info.Version}");

    private static string Bytes(long value)
    {
        (double unit, string name) = value switch
        {
            >= 1L << 40 => (1L << 40, "TiB"),
            >= 1L << 30 => (1L << 30, "GiB"),
            >= 1L << 20 => (1L << 20, "MiB"),
            _ => (1L << 10, "KiB"),
        };
        return string.Create(CultureInfo.InvariantCulture, $"{value} bytes ({value / unit:0.##} {name})");
    }

    private sealed class Progress(ProgressLine line, long total) : IProgress<long>
    {
        public void Report(long value) => line.Advance("converting", value, total);
    }
}
