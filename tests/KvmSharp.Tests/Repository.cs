namespace KvmSharp.Tests;

internal static class Repository
{
    /// <summary>The top of the source tree that the tests were built from.</summary>
    public static string Root { get; } = Find();

    private static string Find()
    {
        var directory = AppContext.BaseDirectory;
        while (!File.Exists(Path.Combine(directory, "KvmSharp.sln")))
        {
            directory = Path.GetDirectoryName(directory) ?? throw new InvalidOperationException("The tests run outside of the source tree.");
        }
        return directory;
    }
}
