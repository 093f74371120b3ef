using System.IO.Compression;
using System.Text;

namespace KvmSharp.Cli.Debian;

/// <summary>Builds the initramfs of <c>kvmsharp run debian</c>: BusyBox, its applet links and an init script.</summary>
internal static class InitramfsBuilder
{
    /// <summary>
    /// Process 1 of the guest. A command in the kernel parameter <c>kvmsharp.run</c> (words joined
    /// by commas) runs instead of the shell; the machine powers off when either ends.
    /// </summary>
    private const string InitScript = """
        #!/bin/sh
        [ -e /bin/mount ] || /bin/busybox --install -s /bin
        export PATH=/bin HOME=/root TERM=${TERM:-linux} PS1='\w # '
        mount -t proc proc /proc
        mount -t sysfs sysfs /sys
        mount -t devtmpfs devtmpfs /dev
        mkdir -p /dev/pts /dev/shm
        mount -t devpts devpts /dev/pts
        mount -t tmpfs tmpfs /tmp
        hostname kvmsharp
        read -r cmdline </proc/cmdline
        case "$cmdline" in
        *kvmsharp.modules=*)
            modules=${cmdline#*kvmsharp.modules=}
            for module in $(echo "${modules%% *}" | tr ',' ' '); do
                for file in $(cat /lib/modules/$module.load); do insmod /lib/modules/$file.ko 2>/dev/null; done
            done
            ;;
        esac
        case "$cmdline" in
        *kvmsharp.net=dhcp*)
            ifconfig lo 127.0.0.1 up
            for path in /sys/class/net/eth*; do
                ifconfig ${path##*/} up
                udhcpc -i ${path##*/} -s /etc/udhcpc.script -n -q -t 5 -T 1 >/dev/null 2>&1 || echo "no address by DHCP for ${path##*/}"
            done
            ;;
        esac
        cd /root
        command=$(sed -n 's/.*kvmsharp\.run=\([^ ]*\).*/\1/p' /proc/cmdline | tr ',' ' ')
        if [ -n "$command" ]; then
            sh -c "$command"
        else
            echo
            echo "Linux $(uname -r) is up after $(cut -d' ' -f1 /proc/uptime) s. 'exit' powers the machine off; Ctrl-A x ends it at once."
            setsid sh -c 'exec sh -i </dev/ttyS0 >/dev/ttyS0 2>&1'
        fi
        sync
        poweroff -f

        """;

    /// <summary>What udhcpc runs when it has an address.</summary>
    private const string DhcpScript = """
        #!/bin/sh
        case "$1" in
        bound|renew)
            ifconfig $interface $ip netmask $subnet ${mtu:+mtu $mtu}
            for router in $router; do route add default gw $router dev $interface 2>/dev/null; done
            for server in $dns; do echo "nameserver $server"; done >/etc/resolv.conf
            ;;
        esac

        """;

    /// <summary>What the init script prints when the shell is about to read; see its text.</summary>
    public const string ReadyText = "Ctrl-A x ends it at once";

    private static readonly string[] _directories =
        ["bin", "dev", "etc", "proc", "root", "run", "sys", "tmp", "usr", "usr/share", "var"];

    /// <summary>The compressed archive; equal input gives equal bytes.</summary>
    /// <param name="busybox">A statically linked BusyBox.</param>
    /// <param name="applets">The names it answers to; with only <c>sh</c>, the guest asks it for the others.</param>
    public static byte[] Build(ReadOnlySpan<byte> busybox, IEnumerable<string> applets)
    {
        using var compressed = new MemoryStream();
        using (var gzip = new GZipStream(compressed, CompressionLevel.Optimal, leaveOpen: true))
        {
            var archive = new CpioWriter(gzip);
            foreach (string directory in _directories)
            {
                archive.AddDirectory(directory);
            }

            // The kernel opens this one for process 1 before anything is mounted on /dev.
            archive.AddCharacterDevice("dev/console", 5, 1, 0x180);
            archive.AddCharacterDevice("dev/null", 1, 3, 0x1b6);
            archive.AddSymbolicLink("sbin", "bin");
            archive.AddSymbolicLink("usr/bin", "/bin");
            archive.AddSymbolicLink("usr/sbin", "/bin");
            archive.AddExecutable("bin/busybox", busybox);
            foreach (string applet in applets.Where(IsPlainName).Distinct().Order(StringComparer.Ordinal))
            {
                archive.AddSymbolicLink("bin/" + applet, "busybox");
            }

            archive.AddFile("etc/passwd", "root:x:0:0:root:/root:/bin/sh\n"u8);
            archive.AddFile("etc/group", "root:x:0:\n"u8);
            archive.AddExecutable("etc/udhcpc.script", Encoding.ASCII.GetBytes(DhcpScript));
            archive.AddExecutable("init", Encoding.ASCII.GetBytes(InitScript));
            archive.Finish();
        }

        return compressed.ToArray();
    }

    private static bool IsPlainName(string applet) =>
        applet.Length > 0 && applet != "busybox" && !applet.Contains('/') && !applet.StartsWith('.');
}
