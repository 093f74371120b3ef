using System.IO.Compression;
using KvmSharp.Cli.Debian;

namespace KvmSharp.GuestTests.Support;

/// <summary>A userland whose first process powers the machine off.</summary>
internal static class PowerOffInitrd
{
    public static byte[] Build()
    {
        using var content = new MemoryStream();
        using (var gzip = new GZipStream(content, CompressionLevel.Optimal, leaveOpen: true))
        {
            var archive = new CpioWriter(gzip);
            archive.AddDirectory("dev");
            archive.AddCharacterDevice("dev/console", 5, 1, 0x180);
            archive.AddExecutable("init", File.ReadAllBytes(TestPaths.Guest("init-poweroff")));
            archive.Finish();
        }

        return content.ToArray();
    }
}
