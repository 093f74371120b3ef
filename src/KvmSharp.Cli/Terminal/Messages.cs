namespace KvmSharp.Cli.Terminal;

/// <summary>
/// Text for the user. It does not go through <c>Console.Out</c> and <c>Console.Error</c>: those
/// initialize the terminal for programs that read keys through the console and write escape sequences to it.
/// </summary>
internal static class Messages
{
    public static TextWriter Output { get; } = new StreamWriter(StandardStreams.OpenForMessages(1)) { AutoFlush = true };

    public static TextWriter Error { get; } = new StreamWriter(StandardStreams.OpenForMessages(2)) { AutoFlush = true };
}
