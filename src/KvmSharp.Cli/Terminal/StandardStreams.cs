using KvmSharp.Cli.CommandLine;
using Microsoft.Win32.SafeHandles;

namespace KvmSharp.Cli.Terminal;

/// <summary>The process's standard input and output as plain byte streams, without line editing.</summary>
internal static class StandardStreams
{
    private const int CloseOnExec = 0x80000; // O_CLOEXEC of Linux on x86-64

    public static Stream OpenInput()
    {
        if (IsClosed(0))
        {
            throw new CliException("standard input is closed (give it </dev/null, or use --serial off or --serial file=F)");
        }

        return Open(0, FileAccess.Read);
    }

    public static Stream OpenOutput()
    {
        if (IsClosed(1))
        {
            throw new CliException("standard output is closed");
        }

        return Open(1, FileAccess.Write);
    }

    /// <summary>Standard output (1) or error (2); what is written to a closed one is lost.</summary>
    public static Stream OpenForMessages(int descriptor) => IsClosed(descriptor) ? Stream.Null : Open(descriptor, FileAccess.Write);

    private static Stream Open(int descriptor, FileAccess access)
    {
        try
        {
            var stream = new FileStream(new SafeFileHandle(descriptor, ownsHandle: false), access, bufferSize: 0);

            // In a file, a FileStream keeps a position of its own, which others who write to the same open
            // file do not see. The console's streams use the shared one, but they edit lines on a terminal
            // and hide a broken pipe.
            return !stream.CanSeek ? stream : descriptor switch
            {
                0 => Console.OpenStandardInput(),
                1 => Console.OpenStandardOutput(),
                _ => Console.OpenStandardError(),
            };
        }
        catch (Exception exception) when (exception is IOException or UnauthorizedAccessException or ArgumentException)
        {
            throw new CliException(
                $"standard stream {descriptor} cannot be used: {exception.Message}", exception);
        }
    }

    // A descriptor that was closed when the process started is soon taken by a file of the runtime
    // itself. Those are all opened close-on-exec, and an inherited descriptor never has that flag.
    private static bool IsClosed(int descriptor)
    {
        try
        {
            foreach (string line in File.ReadLines($"/proc/self/fdinfo/{descriptor}"))
            {
                if (line.StartsWith("flags:", StringComparison.Ordinal))
                {
                    return (Convert.ToInt64(line[6..].Trim(), 8) & CloseOnExec) != 0;
                }
            }

            return false;
        }
        catch (FileNotFoundException)
        {
            return true;
        }
        catch (Exception exception) when (exception is IOException or UnauthorizedAccessException or FormatException)
        {
            return false; // no /proc: nothing can be said
        }
    }
}
