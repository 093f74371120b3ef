namespace KvmSharp.Cli.CommandLine;

internal static class HelpText
{
    public const string Text = """
        kvmsharp runs x86-64 guests inside this process, without virtualization hardware or privileges.

        kvmsharp run [options]           boots a kernel; without --kernel, the built-in demo guest
        kvmsharp run debian [options]    boots Debian's kernel to a shell; gets it with apt, without root
        kvmsharp img COMMAND ...         creates, describes, converts and checks disk images; see below
        kvmsharp disasm FILE             shows machine code: [--bits 16|32|64] [--base ADDRESS]
        kvmsharp doctor                  checks whether this host can run guests: [--json]
        kvmsharp --version, --help

        Options of run:
          --kernel FILE          a Linux bzImage, an ELF64 vmlinux or a Multiboot 1 kernel
          --firmware FILE        firmware to start in instead of a kernel, for example SeaBIOS
          --video-bios FILE      its video BIOS (default: vgabios-stdvga.bin next to it)
          --boot disk,cdrom,network     where it looks for an operating system, in this order
          --smm                  system management mode for it
          --screenshot FILE      an image (PNG) of its screen when the run ends
          --initrd FILE          its initial RAM disk or module
          --append TEXT          its command line ('run debian': added to console=ttyS0)
          --memory SIZE          guest memory, for example 512M (the default) or 1G
          --cpu MODEL,+f,-f      x86-64-v1, -v2, -v3, qemu64 or max (the default), and changed features;
                                 vendor=GenuineIntel or vendor=AuthenticAMD
          --cpus N               processors; default 1
          --serial stdio|file=F|off     where COM1 leads (default: stdio)
          --debugcon FILE        where ports 0xe9 and 0x402 lead
          --disk F[,format=raw|qcow2][,readonly][,serial=S][,queues=N][,interface=ide]     a virtio or an IDE disk
          --cdrom FILE           an image in a CD-ROM drive
          --device isa-debug-exit[,iobase=0xf4]     lets the guest choose the exit status
          --device pvpanic       a kernel's panic ends the run
          --device virtio-rng[,seed=N]   random bytes; virtio-console,file=F: output to a file;
                                 virtio-balloon,target=SIZE: memory that the guest is to give up
                                 disks and virtio devices take transport=pci (the default) or mmio
          --device fw_cfg[,name=opt/N,file=F]       configuration data for the guest, and how many processors
          --device pc-testdev    what self-checking boot images expect: latch, page flush, interrupt lines
          --net user[,hostfwd=tcp::2222-:22][,restrict][,allow=tcp:example.com:443][,dns=ADDRESS[:PORT]]
                [,loopback=off][,ipv6=off][,subnet=10.0.2.0/24][,mac=M][,capture=FILE]
                                 a network card behind the host's own sockets; hostfwd and allow as often as
                                 needed; allow and restrict: the guest reaches only what is allowed
          --clock real|virtual   virtual: time is counted in instructions; runs are identical
          --engine auto|interpreter|jit    jit: translate hot code to host code; auto: where the host lets it
          --no-pci               no PCI bus, unless a device needs one
          --no-reboot            a reset by the guest ends the run
          --trace stderr|FILE[,regs][,count=N]      every executed instruction, with registers on request
          --json                 one line about the run when it ends
          --flavor cloud|generic|686|686-pae     'run debian': which kernel; the last two are i386
          --refresh              'run debian': look for newer packages

        Disk images (raw or qcow2; the format of a new file is told by its name or by format=):
          img create FILE size=10G [format=F] [cluster=64K] [refcount_bits=16] [version=3]
                     [backing=FILE backing_format=F]    size= may be left out with a backing file
          img info FILE [format=F] [--json]
          img convert SOURCE TARGET [format=F] [source_format=F] [backing_depth=N] [overwrite=on] [cluster=64K] ...
          img check FILE [repair=leaks|all] [--json]

        On a terminal, Ctrl-A x ends the machine and Ctrl-A Ctrl-A sends Ctrl-A; all other keys are the guest's.
        Exit status: what the guest chose through the debug exit device, 0 after a power-off, otherwise not 0.
        """;
}
