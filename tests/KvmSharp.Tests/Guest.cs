using KvmSharp.Boot;

namespace KvmSharp.Tests;

/// <summary>Small guests in machine code.</summary>
internal static class Guest
{
    public const ulong CodeAddress = 0x10000;

    /// <summary>jmp $</summary>
    public static readonly byte[] Spin = [0xeb, 0xfe];

    /// <summary>1: inc rax; out 0x80, al; jmp 1b</summary>
    public static readonly byte[] PortLoop = [0x48, 0xff, 0xc0, 0xe6, 0x80, 0xeb, 0xf9];

    /// <summary>1: inc rax; mov [0x20000], rax; jmp 1b</summary>
    public static readonly byte[] CountLoop = [0x48, 0xff, 0xc0, 0x48, 0x89, 0x04, 0x25, 0, 0, 2, 0, 0xeb, 0xf3];

    /// <summary>cli; 1: hlt; jmp 1b</summary>
    public static readonly byte[] Idle = [0xfa, 0xf4, 0xeb, 0xfd];

    public static VirtualMachine Create(byte[] code, ClockMode clock = ClockMode.Real, bool interruptController = true)
    {
        var machine = new VirtualMachine(new VirtualMachineOptions
        {
            MemorySize = 1 << 20,
            Clock = clock,
            InterruptController = interruptController,
        });
        FlatLoader.Load(machine.Memory, machine.Vcpus[0], BootImage.FromBytes(code), CodeAddress);
        return machine;
    }
}
