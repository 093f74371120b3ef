using KvmSharp.Boot;

namespace KvmSharp.Tests.Boot;

/// <summary>Kernels with a PVH entry point.</summary>
public sealed class PvhTests
{
    private const uint Entry = 0x100_0100;
    private const int NoteHeader = 176; // the third program header
    private const int Note = 0x800;

    [Fact]
    public void KernelStartsWithItsInformation()
    {
        using var vm = Images.CreateMachine();
        var kernel = Images.Wrap(WithNote());
        var initrd = BootImage.FromBytes(new byte[5000], "initrd");
        Assert.True(PvhLoader.IsPvh(kernel.Bytes.Span));
        KernelLoader.Load(vm.Memory, vm.Vcpus[0], kernel, new LinuxBootOptions
        {
            CommandLine = "a b",
            Initrd = initrd,
            RsdpAddress = 0xe_0000,
        });
        var registers = vm.Vcpus[0].GetRegisters();
        var special = vm.Vcpus[0].GetSpecialRegisters();
        Assert.Equal(Entry, registers.Rip);
        Assert.Equal(1UL, special.Cr0 & 0x8000_0001); // protected, not paged
        var info = registers.Rbx;
        var memory = vm.Memory;
        Assert.Equal((0x336e_c578u, 1u, 0u, 1u),
            (memory.Read<uint>(info), memory.Read<uint>(info + 4), memory.Read<uint>(info + 8), memory.Read<uint>(info + 12)));
        var module = memory.Read<ulong>(info + 16);
        Assert.Equal(5000UL, memory.Read<ulong>(module + 8));
        Assert.True(memory.Read<ulong>(module) >= 0x120_0800);
        var commandLine = memory.Read<ulong>(info + 24);
        Assert.Equal(0x0062_2061u, memory.Read<uint>(commandLine));
        Assert.Equal(0xe_0000UL, memory.Read<ulong>(info + 32));
        var map = memory.Read<ulong>(info + 40);
        var expected = MemoryMap.ForPc(memory);
        Assert.Equal((uint)expected.Count, memory.Read<uint>(info + 48));
        for (var i = 0; i < expected.Count; i++)
        {
            var at = map + 24 * (ulong)i;
            Assert.Equal((expected[i].Address.Value, expected[i].Length, (uint)expected[i].Kind),
                (memory.Read<ulong>(at), memory.Read<ulong>(at + 8), memory.Read<uint>(at + 16)));
        }
        Assert.Equal(5 * 0x1000 + 1 & 0xff, memory.Read<byte>(0x100_0000));
    }

    [Fact]
    public void OtherNotesAndDamageAreNoEntryPoint()
    {
        Assert.False(PvhLoader.IsPvh(Images.Elf()));
        Assert.False(PvhLoader.IsPvh(Images.BzImage()));
        Assert.False(PvhLoader.IsPvh([]));
        Assert.False(PvhLoader.IsPvh(WithNote(image => image[Note + 8] = 17))); // another type
        Assert.False(PvhLoader.IsPvh(WithNote(image => image[Note + 12] = (byte)'Y'))); // another owner
        Assert.False(PvhLoader.IsPvh(WithNote(image => Images.U32(image, Note, uint.MaxValue))));
        Assert.False(PvhLoader.IsPvh(WithNote(image => Images.U32(image, Note + 4, uint.MaxValue))));
        Assert.False(PvhLoader.IsPvh(WithNote(image => Images.U64(image, NoteHeader + 8, ulong.MaxValue))));
        Assert.False(PvhLoader.IsPvh(WithNote(image => Images.U64(image, NoteHeader + 32, ulong.MaxValue))));
        Assert.False(PvhLoader.IsPvh(WithNote(image => Images.U64(image, 32, ulong.MaxValue - 8))));
    }

    [Fact]
    public void EntryPointOutsideIsRefused()
    {
        using var vm = Images.CreateMachine();
        var kernel = Images.Wrap(WithNote(image => Images.U32(image, Note + 16, 0x200_0000)));
        Assert.Equal(BootImageProblem.Malformed, Images.Refuse(() => PvhLoader.Load(vm.Memory, vm.Vcpus[0], kernel, new LinuxBootOptions())));
    }

    [Fact]
    public void RandomDamageIsRefusedOrLoads()
    {
        using var vm = Images.CreateMachine(8 << 20);
        var random = new Random(8);
        for (var i = 0; i < 2000; i++)
        {
            var image = WithNote();
            for (var j = 0; j < 3; j++)
            {
                image[random.Next(2) == 0 ? random.Next(232) : Note + random.Next(24)] = (byte)random.Next(256);
            }
            try
            {
                KernelLoader.Load(vm.Memory, vm.Vcpus[0], Images.Wrap(image), new LinuxBootOptions());
            }
            catch (BootImageException)
            {
                // what a damaged image is for
            }
        }
    }

    private static byte[] WithNote(Action<byte[]>? change = null) => Images.Elf(image =>
    {
        Images.U16(image, 56, 3);
        Images.Segment(image, NoteHeader, 4, Note, 0, 0, 24, 24);
        Images.U32(image, Note, 4);
        Images.U32(image, Note + 4, 4);
        Images.U32(image, Note + 8, 18);
        "Xen\0"u8.CopyTo(image.AsSpan(Note + 12));
        Images.U32(image, Note + 16, Entry);
        change?.Invoke(image);
    });
}
