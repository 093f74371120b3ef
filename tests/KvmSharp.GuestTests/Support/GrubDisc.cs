using KvmSharp.Cli.Debian;

namespace KvmSharp.GuestTests.Support;

/// <summary>A CD with GRUB, made by its own tools.</summary>
internal static class GrubDisc
{
    private static readonly Lazy<Task<byte[]>> _disc = new(MakeAsync);

    public const string Configuration = """
        set timeout=-1
        menuentry "first entry" { echo "first chosen"; outb 0xf4 0x11 }
        menuentry "second entry" { echo "second chosen"; outb 0xf4 0x15 }
        menuentry "memory test" { linux16 /boot/memtest.bin }
        menuentry "graphics" {
            insmod all_video
            set gfxmode=800x600x32
            insmod gfxterm
            loadfont unicode
            terminal_output gfxterm
            echo "in graphics"
            sleep 1000
        }
        """;

    public static Task<byte[]> GetAsync() => _disc.Value;

    private static async Task<byte[]> MakeAsync()
    {
        HostTool.Require("grub-mkrescue", "xorriso", "mformat");
        string directory = Directory.CreateTempSubdirectory("kvmsharp-grub-").FullName;
        try
        {
            string root = Path.Combine(directory, "root");
            Directory.CreateDirectory(Path.Combine(root, "boot/grub"));
            await File.WriteAllTextAsync(Path.Combine(root, "boot/grub/grub.cfg"), Configuration);
            File.Copy(await DebianFiles.GetAsync("memtest86+", "boot/memtest86+x64.bin"), Path.Combine(root, "boot/memtest.bin"));
            string disc = Path.Combine(directory, "grub.iso");
            HostTool.Result result = await HostTool.RunAsync(
                "grub-mkrescue", ["-d", "/usr/lib/grub/i386-pc", "-o", disc, root], directory, CancellationToken.None);
            Assert.True(result.Succeeded, result.LastMessage);
            return await File.ReadAllBytesAsync(disc);
        }
        finally
        {
            Directory.Delete(directory, recursive: true);
        }
    }
}
