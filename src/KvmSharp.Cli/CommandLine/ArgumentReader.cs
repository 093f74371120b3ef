namespace KvmSharp.Cli.CommandLine;

/// <summary>Walks command-line arguments; accepts both <c>--name value</c> and <c>--name=value</c>.</summary>
internal sealed class ArgumentReader(IReadOnlyList<string> arguments)
{
    private int position;
    private string? attachedValue;

    public string Current { get; private set; } = "";

    public bool IsOption => Current.Length > 1 && Current[0] == '-';

    public bool MoveNext()
    {
        if (attachedValue is not null)
        {
            throw new CliException($"{Current} takes no value", ExitStatus.Usage);
        }

        if (position >= arguments.Count)
        {
            return false;
        }

        Current = arguments[position++];
        int equals = Current.StartsWith("--", StringComparison.Ordinal) ? Current.IndexOf('=') : -1;
        if (equals > 0)
        {
            attachedValue = Current[(equals + 1)..];
            Current = Current[..equals];
        }

        return true;
    }

    public string Value(string description)
    {
        if (attachedValue is { } attached)
        {
            attachedValue = null;
            return attached;
        }

        if (position >= arguments.Count)
        {
            throw new CliException($"{Current} needs {description}", ExitStatus.Usage);
        }

        return arguments[position++];
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
