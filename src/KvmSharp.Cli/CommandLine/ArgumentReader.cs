namespace KvmSharp.Cli.CommandLine;

/// <summary>Walks command-line arguments; accepts both <c>--name value</c> and <c>--name=value</c>.</summary>
internal sealed class ArgumentReader(IReadOnlyList<string> arguments)
{
    private int _position;
    private string? _attachedValue;

    public string Current { get; private set; } = "";

    public bool IsOption => Current.Length > 1 && Current[0] == '-';

    public bool MoveNext()
    {
        if (_attachedValue is not null)
        {
            throw new CliException($"{Current} takes no value", ExitStatus.Usage);
        }

        if (_position >= arguments.Count)
        {
            return false;
        }

        Current = arguments[_position++];
        int equals = Current.StartsWith("--", StringComparison.Ordinal) ? Current.IndexOf('=') : -1;
        if (equals > 0)
        {
            _attachedValue = Current[(equals + 1)..];
            Current = Current[..equals];
        }

        return true;
    }

    public string Value(string description)
    {
        if (_attachedValue is { } attached)
        {
            _attachedValue = null;
            return attached;
        }

        if (_position >= arguments.Count)
        {
            throw new CliException($"{Current} needs {description}", ExitStatus.Usage);
        }

        return arguments[_position++];
    }

    public string NonEmptyValue(string description)
    {
        string value = Value(description);
        if (value.Length == 0)
        {
            throw new CliException($"{Current} needs {description}", ExitStatus.Usage);
        }

        return value;
    }

    public CliException Unknown() => IsOption
        ? new CliException($"unknown option '{Current}' (see kvmsharp --help)", ExitStatus.Usage)
        : new CliException($"unexpected argument '{Current}' (see kvmsharp --help)", ExitStatus.Usage);
}
