using System.IO.Compression;
using System.Text;

namespace KvmSharp.Cli.Debian;

/// <summary>
/// Builds an initramfs with the kernel modules that virtual devices and disks need: files under <c>/lib/modules</c>, and
/// for each a list with the ending <c>.load</c> of what to load in which order.
/// </summary>
internal sealed class KernelModules
{
    /// <summary>Part of the cached file's name.</summary>
    public const string FormatVersion = "3";

    private static readonly HashSet<string> _wanted =
    [
        "virtio", "virtio_ring", "virtio_pci_modern_dev", "virtio_pci_legacy_dev", "virtio_pci", "virtio_mmio",
        "virtio_blk", "virtio_console", "virtio_balloon", "rng_core", "virtio_rng",
        "virtio_net", "net_failover", "failover", "af_packet",
        "vsock", "vmw_vsock_virtio_transport_common", "vmw_vsock_virtio_transport",
        "ext4", "jbd2", "mbcache", "crc16", "crc32c_generic", "libcrc32c", "fat", "vfat", "nls_cp437", "nls_ascii",
        "scsi_common", "scsi_mod", "libata", "ata_piix", "crct10dif_common", "crc_t10dif", "crct10dif_generic", "t10_pi", "crc64",
        "crc64_rocksoft", "crc64_rocksoft_generic", "sd_mod", "cdrom", "sr_mod", "isofs",
    ];

    private readonly SortedDictionary<string, byte[]> _modules = new(StringComparer.Ordinal);

    /// <summary>Takes a file of the kernel package if it is a wanted module.</summary>
    /// <returns>True: all files are to be shown.</returns>
    public async Task<bool> AddAsync(string name, Stream content)
    {
        if (name.EndsWith(".ko", StringComparison.Ordinal))
        {
            string module = Normalize(Path.GetFileNameWithoutExtension(name));
            if (_wanted.Contains(module))
            {
                using var memory = new MemoryStream();
                await content.CopyToAsync(memory).ConfigureAwait(false);
                _modules[module] = memory.ToArray();
            }
        }

        return true;
    }

    /// <summary>The compressed archive; equal input gives equal bytes.</summary>
    public byte[] Build()
    {
        using var compressed = new MemoryStream();
        using (var gzip = new GZipStream(compressed, CompressionLevel.Optimal, leaveOpen: true))
        {
            var archive = new CpioWriter(gzip);
            archive.AddDirectory("lib");
            archive.AddDirectory("lib/modules");
            foreach (string module in _wanted.Order(StringComparer.Ordinal))
            {
                var order = new List<string>();
                Resolve(module, order);
                archive.AddFile($"lib/modules/{module}.load", Encoding.ASCII.GetBytes(string.Join('\n', order) + "\n"));
                if (_modules.TryGetValue(module, out byte[]? content))
                {
                    archive.AddFile($"lib/modules/{module}.ko", content);
                }
            }

            archive.Finish();
        }

        return compressed.ToArray();
    }

    // What is built into the kernel has no file and needs none.
    private void Resolve(string module, List<string> order)
    {
        if (!_modules.TryGetValue(module, out byte[]? content) || order.Contains(module))
        {
            return;
        }

        foreach (string needed in Dependencies(content))
        {
            Resolve(needed, order);
        }

        // ext4 finds its checksums by name, not by symbol.
        if (module is "jbd2" or "libcrc32c")
        {
            Resolve("crc32c_generic", order);
        }

        // vfat finds its character sets by name too.
        if (module is "vfat")
        {
            Resolve("nls_cp437", order);
            Resolve("nls_ascii", order);
        }

        // sd_mod's protection information finds its checksums by name too.
        if (module is "crc_t10dif")
        {
            Resolve("crct10dif_generic", order);
        }

        if (module is "crc64_rocksoft")
        {
            Resolve("crc64_rocksoft_generic", order);
        }

        order.Add(module);
    }

    /// <summary>The field <c>depends=</c> of the section .modinfo: names joined by commas, ended by a zero byte.</summary>
    private static string[] Dependencies(ReadOnlySpan<byte> module)
    {
        int start = module.IndexOf("\0depends="u8);
        if (start < 0)
        {
            return [];
        }

        ReadOnlySpan<byte> value = module[(start + "\0depends=".Length)..];
        string text = Encoding.ASCII.GetString(value[..value.IndexOf((byte)0)]);
        return [.. text.Split(',', StringSplitOptions.RemoveEmptyEntries).Select(Normalize)];
    }

    private static string Normalize(string module) => module.Replace('-', '_');
}
