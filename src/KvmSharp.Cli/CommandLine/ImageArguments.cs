using System.Globalization;
using KvmSharp.Storage;

namespace KvmSharp.Cli.CommandLine;

/// <summary>The arguments of <c>kvmsharp img</c>: file names first, then <c>key=value</c> words, and <c>--json</c>.</summary>
internal sealed class ImageArguments
{
    private readonly string _command;
    private readonly Dictionary<string, string> _values = [];

    public ImageArguments(string command, int files, IReadOnlyList<string> arguments, params ReadOnlySpan<string> keys)
    {
        _command = command;
        var names = new List<string>();
        var known = keys.ToArray();
        foreach (string argument in arguments)
        {
            if (argument == "--json" && known.Contains("--json"))
            {
                Json = true;
            }
            else if (argument.StartsWith('-'))
            {
                throw Usage($"unknown option '{argument}'");
            }
            else if (names.Count < files)
            {
                names.Add(argument.Length > 0 ? argument : throw Usage("a file name is empty"));
            }
            else
            {
                Add(argument, known);
            }
        }

        Files = names.Count == files ? names : throw Usage(files == 1 ? "needs a file" : "needs a source and a target file");
    }

    public IReadOnlyList<string> Files { get; }

    public bool Json { get; }

    public bool Has(string key) => _values.ContainsKey(key);

    public string? Text(string key) => _values.GetValueOrDefault(key);

    public ImageFormat? Format(string key) => Text(key) switch
    {
        null => null,
        "raw" => ImageFormat.Raw,
        "qcow2" => ImageFormat.Qcow2,
        string other => throw Usage($"{key}: '{other}' is neither raw nor qcow2"),
    };

    public bool Switch(string key) => Text(key) switch
    {
        null or "off" => false,
        "on" => true,
        string other => throw Usage($"{key}: '{other}' is neither on nor off"),
    };

    /// <summary>Reads <c>10G</c>, <c>64K</c> and the like; a bare number is bytes.</summary>
    public long? Size(string key)
    {
        if (Text(key) is not { } text)
        {
            return null;
        }

        ReadOnlySpan<char> digits = text.EndsWith("iB", StringComparison.Ordinal) ? text.AsSpan(0, text.Length - 2) : text;
        int shift = digits.Length == 0 ? -1 : char.ToUpperInvariant(digits[^1]) switch
        {
            'K' => 10,
            'M' => 20,
            'G' => 30,
            'T' => 40,
            _ => 0,
        };
        digits = shift > 0 ? digits[..^1] : digits;
        return shift >= 0 && long.TryParse(digits, NumberStyles.None, CultureInfo.InvariantCulture, out long value) && value <= long.MaxValue >> shift
            ? value << shift
            : throw Usage($"{key}: '{text}' is not a size (examples: 10G, 512M, 65536)");
    }

    public int Number(string key, int missing) => Text(key) is not { } text ? missing
        : int.TryParse(text, NumberStyles.None, CultureInfo.InvariantCulture, out int value) ? value
        : throw Usage($"{key}: '{text}' is not a number");

    public CliException Usage(string message) => new($"img {_command}: {message} (see kvmsharp --help)", ExitStatus.Usage);

    private void Add(string argument, string[] known)
    {
        int equals = argument.IndexOf('=');
        if (equals <= 0 || equals == argument.Length - 1)
        {
            throw Usage($"'{argument}' is not of the form key=value");
        }

        string key = argument[..equals];
        if (!known.Contains(key))
        {
            throw Usage($"unknown key '{key}' (there is {string.Join(", ", known.Where(name => !name.StartsWith('-')))})");
        }

        if (!_values.TryAdd(key, argument[(equals + 1)..]))
        {
            throw Usage($"{key} is given twice");
        }
    }
}
