using System.Reflection;

namespace KvmSharp.GuestTests.Support;

/// <summary>Where the things under test are.</summary>
internal static class TestPaths
{
    public static string RepositoryRoot { get; } = typeof(TestPaths).Assembly
        .GetCustomAttributes<AssemblyMetadataAttribute>().Single(item => item.Key == "RepositoryRoot").Value!;

    /// <summary>The kvmsharp program that was built with these tests.</summary>
    public static string CommandLineProgram { get; } = Path.Combine(AppContext.BaseDirectory, "KvmSharp.Cli");

    public static string Guest(string name) => Path.Combine(AppContext.BaseDirectory, "guests", name);
}

/// <summary>A directory that is deleted with its content.</summary>
internal sealed class TemporaryDirectory : IDisposable
{
    public string Path { get; } = Directory.CreateTempSubdirectory("kvmsharp-test-").FullName;

    public string File(string name, byte[]? content = null)
    {
        string path = System.IO.Path.Combine(Path, name);
        if (content is not null)
        {
            System.IO.File.WriteAllBytes(path, content);
        }

        return path;
    }

    public void Dispose() => Directory.Delete(Path, recursive: true);
}
