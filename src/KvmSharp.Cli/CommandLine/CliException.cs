namespace KvmSharp.Cli.CommandLine;

/// <summary>A failure that the user can act on: printed as one line, without a stack trace.</summary>
internal sealed class CliException : Exception
{
    public CliException(string message, int exitStatus = ExitStatus.Failure)
        : base(message) => Status = exitStatus;

    public CliException(string message, Exception inner, int exitStatus = ExitStatus.Failure)
        : base(message, inner) => Status = exitStatus;

    public int Status { get; }
}

/// <summary>What <c>kvmsharp</c> returns when the guest gives no status of its own.</summary>
internal static class ExitStatus
{
    public const int Success = 0;
    public const int Failure = 1;
    public const int Usage = 2;
}
