using KvmSharp.Cli.Debian;
using KvmSharp.Cli.Terminal;

namespace KvmSharp.GuestTests.Support;

/// <summary>Debian's kernels and the BusyBox initramfs, obtained as <c>kvmsharp run debian</c> does.</summary>
internal static class DebianCache
{
    private static readonly Lazy<Task<DebianImage>> _cloud = new(() => ObtainAsync(DebianFlavor.Cloud));
    private static readonly Lazy<Task<DebianImage>> _generic = new(() => ObtainAsync(DebianFlavor.Generic));

    public static Task<DebianImage> CloudAsync() => _cloud.Value;

    public static Task<DebianImage> GenericAsync() => _generic.Value;

    private static Task<DebianImage> ObtainAsync(DebianFlavor flavor) =>
        new DebianImages(DebianImages.DefaultCacheDirectory(), new ProgressLine(TextWriter.Null, isTerminal: false))
            .ObtainAsync(flavor, refresh: false, CancellationToken.None);
}
