using KvmSharp.Boot;
using KvmSharp.Cli.Debian;
using KvmSharp.Cli.Terminal;

namespace KvmSharp.GuestTests.Support;

/// <summary>Debian's kernels and the BusyBox initramfs, obtained as <c>kvmsharp run debian</c> does.</summary>
internal static class DebianCache
{
    private static readonly Lazy<Task<DebianImage>> _cloud = new(() => ObtainAsync(DebianFlavor.Cloud));
    private static readonly Lazy<Task<DebianImage>> _generic = new(() => ObtainAsync(DebianFlavor.Generic));
    private static readonly Lazy<Task<DebianImage>> _i686 = new(() => ObtainAsync(DebianFlavor.I686));
    private static readonly Lazy<Task<DebianImage>> _i686Pae = new(() => ObtainAsync(DebianFlavor.I686Pae));

    public static Task<DebianImage> CloudAsync() => _cloud.Value;

    public static Task<DebianImage> GenericAsync() => _generic.Value;

    public static Task<DebianImage> GetAsync(DebianFlavor flavor) => flavor switch
    {
        DebianFlavor.Cloud => _cloud.Value,
        DebianFlavor.Generic => _generic.Value,
        DebianFlavor.I686 => _i686.Value,
        _ => _i686Pae.Value,
    };

    /// <summary>The image's initramfs with modules for virtual devices.</summary>
    public static Task<BootImage> WithModulesAsync(DebianImage image) => Images().WithModulesAsync(image, CancellationToken.None);

    private static Task<DebianImage> ObtainAsync(DebianFlavor flavor) =>
        Images().ObtainAsync(flavor, refresh: false, CancellationToken.None);

    private static DebianImages Images() =>
        new(DebianImages.DefaultCacheDirectory(), new ProgressLine(TextWriter.Null, isTerminal: false));
}
