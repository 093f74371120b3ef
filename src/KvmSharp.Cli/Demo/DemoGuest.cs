using KvmSharp.Boot;

namespace KvmSharp.Cli.Demo;

/// <summary>The guest that runs when no kernel is named: assembled from demo.S when this program is built.</summary>
internal static class DemoGuest
{
    public const string Name = "demo guest";

    public static BootImage Load()
    {
        using Stream stream = typeof(DemoGuest).Assembly.GetManifestResourceStream("demo.elf")
            ?? throw new InvalidOperationException("The demo guest was not embedded.");
        var content = new byte[stream.Length];
        stream.ReadExactly(content);
        return BootImage.FromBytes(content, Name);
    }
}
