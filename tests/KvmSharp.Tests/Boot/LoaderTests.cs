using System.Text;
using KvmSharp.Boot;

namespace KvmSharp.Tests.Boot;

public sealed class LoaderTests : IDisposable
{
    private const ulong ZeroPage = 0x7000;

    private readonly VirtualMachine _machine = Images.CreateMachine();
    private readonly LinuxBootOptions _options = new() { CommandLine = "console=ttyS0" };

    private GuestMemory Memory => _machine.Memory;

    private Vcpu Vcpu => _machine.Vcpus[0];

    public void Dispose() => _machine.Dispose();

    [Fact]
    public void BzImageStartsAsTheProtocolDemands()
    {
        LinuxLoader.Load(Memory, Vcpu, Images.Wrap(Images.BzImage()), _options with { RsdpAddress = 0xe0000 });
        var registers = Vcpu.GetRegisters();
        var special = Vcpu.GetSpecialRegisters();
        Assert.Equal((Images.Preferred + 0x200, ZeroPage, 2UL), (registers.Rip, registers.Rsi, registers.Rflags));
        Assert.Equal((0x10, 1, 0, 0x18, 0x18, 0x18), (special.Cs.Selector, special.Cs.L, special.Cs.Db, special.Ds.Selector, special.Es.Selector, special.Ss.Selector));
        Assert.Equal(0x500u, special.Efer);
        Assert.Equal(0x8000_0001u, special.Cr0 & 0x8000_0001);
        Assert.Equal(special.Gdt.Base + 0x10, special.Gdt.Base + special.Cs.Selector);
        Assert.Equal(0x00af_9b00_0000_ffffu, Memory.Read<ulong>(special.Gdt.Base + 0x10));
        Assert.Equal(0xffff_ffffu, Vcpu.Translate(0xffff_ffff)?.Address.Value);
        Assert.Null(Vcpu.Translate(0x1_0000_0000));

        Assert.Equal(0x5372_6448u, Memory.Read<uint>(ZeroPage + 0x202));
        Assert.Equal(0xff, Memory.Read<byte>(ZeroPage + 0x210));
        Assert.Equal(0x81, Memory.Read<byte>(ZeroPage + 0x211) & 0x81);
        Assert.Equal(0xe0000u, Memory.Read<ulong>(ZeroPage + 0x70));
        Assert.Equal(0, Memory.Read<byte>(ZeroPage + 0x1ef)); // the sentinel
        Assert.Equal("console=ttyS0\0", ReadText(Memory.Read<uint>(ZeroPage + 0x228), 14));
        Assert.Equal(4, Memory.Read<byte>(ZeroPage + 0x1e8));
        Assert.Equal((0ul, 0x9fc00ul, 1u), ReadMap(0));
        Assert.Equal((0x9fc00ul, 0x400ul, 2u), ReadMap(1));
        Assert.Equal((0xe0000ul, 0x20000ul, 2u), ReadMap(2));
        Assert.Equal((0x100000ul, (64ul << 20) - 0x100000, 1u), ReadMap(3));
        var body = new byte[Images.BodyLength];
        Memory.Read(Images.Preferred, body);
        Assert.Equal(Images.BzImage()[Images.SetupLength..], body);
    }

    [Theory]
    [InlineData(0x020f, Images.Preferred)]
    [InlineData(0x020a, Images.Preferred)]
    [InlineData(0x0209, 0x10_0000)]
    [InlineData(0x0206, 0x10_0000)]
    public void KernelWithoutA64BitEntryStartsInProtectedMode(int version, ulong address)
    {
        var image = Images.BzImage(i => { Images.U16(i, 0x206, (ushort)version); Images.U16(i, 0x236, 0); });
        LinuxLoader.Load(Memory, Vcpu, Images.Wrap(image), _options with { Initrd = Images.Wrap(new byte[0x1000]) });
        var registers = Vcpu.GetRegisters();
        var special = Vcpu.GetSpecialRegisters();
        Assert.Equal((address, ZeroPage, 2UL), (registers.Rip, registers.Rsi, registers.Rflags));
        Assert.Equal((0UL, 0UL, 0UL), (registers.Rbp, registers.Rdi, registers.Rbx));
        Assert.Equal((0x10, 0, 1, 0x18, 0x18, 0x18), (special.Cs.Selector, special.Cs.L, special.Cs.Db, special.Ds.Selector, special.Es.Selector, special.Ss.Selector));
        Assert.Equal((0u, 1u), (special.Efer, special.Cr0 & 0x8000_0001));
        Assert.Equal(0x00cf_9b00_0000_ffffu, Memory.Read<ulong>(special.Gdt.Base + 0x10));
        Assert.Equal(0x00cf_9300_0000_ffffu, Memory.Read<ulong>(special.Gdt.Base + 0x18));
        Assert.Equal((ushort)version, Memory.Read<ushort>(ZeroPage + 0x206));
        var body = new byte[Images.BodyLength];
        Memory.Read(address, body);
        Assert.Equal(image[Images.SetupLength..], body);
    }

    [Fact]
    public void InitrdGoesHighAndWhole()
    {
        var initrd = new byte[0x12345];
        new Random(1).NextBytes(initrd);
        LinuxLoader.Load(Memory, Vcpu, Images.Wrap(Images.BzImage()), _options with { Initrd = Images.Wrap(initrd) });
        var address = Memory.Read<uint>(ZeroPage + 0x218);
        Assert.Equal((uint)initrd.Length, Memory.Read<uint>(ZeroPage + 0x21c));
        Assert.Equal(((64u << 20) - 0x12345) & ~0xfffu, address);
        var read = new byte[initrd.Length];
        Memory.Read(address, read);
        Assert.Equal(initrd, read);
    }

    [Fact]
    public void InitrdStaysBelowTheKernelsLimitAndClearOfIt()
    {
        var image = Images.BzImage(i => Images.U32(i, 0x22c, (uint)Images.Preferred + 0x1000));
        LinuxLoader.Load(Memory, Vcpu, Images.Wrap(image), _options with { Initrd = Images.Wrap(new byte[0x4000]) });
        Assert.Equal((uint)Images.Preferred - 0x4000, Memory.Read<uint>(ZeroPage + 0x218));
    }

    [Fact]
    public void RelocatableKernelGoesWhereItFits()
    {
        using var small = Images.CreateMachine(8 << 20);
        LinuxLoader.Load(small.Memory, small.Vcpus[0], Images.Wrap(Images.BzImage()), _options);
        Assert.Equal(0x20_0200u, small.Vcpus[0].GetRegisters().Rip);
        var fixedKernel = Images.BzImage(i => i[0x234] = 0);
        Assert.Equal(BootImageProblem.TooLarge, Images.Refuse(() => LinuxLoader.Load(small.Memory, small.Vcpus[0], Images.Wrap(fixedKernel), _options)));
        var hugeKernel = Images.BzImage(i => Images.U32(i, 0x260, 0xffff_ffff));
        Assert.Equal(BootImageProblem.TooLarge, Images.Refuse(() => LinuxLoader.Load(Memory, Vcpu, Images.Wrap(hugeKernel), _options)));
    }

    [Fact]
    public void ElfSegmentsGoToTheirPhysicalAddresses()
    {
        Memory.Fill(0x100_0000, 0x2000, 0xcc);
        ElfLoader.Load(Memory, Vcpu, Images.Wrap(Images.Elf()), _options with { Initrd = Images.Wrap(new byte[0x1000]) });
        Assert.Equal((0x100_0010UL, ZeroPage), (Vcpu.GetRegisters().Rip, Vcpu.GetRegisters().Rsi));
        Assert.Equal(0x100b_0601u, Memory.Read<uint>(0x100_0000));
        Assert.Equal(0u, Memory.Read<uint>(0x100_0800));
        Assert.Equal(0, Memory.Read<byte>(0x100_1fff));
        Assert.Equal(0xaa55, Memory.Read<ushort>(ZeroPage + 0x1fe));
        Assert.Equal((64u << 20) - 0x1000, Memory.Read<uint>(ZeroPage + 0x218));
    }

    [Fact]
    public void ElfEntryMayBeVirtual()
    {
        ElfLoader.Load(Memory, Vcpu, Images.Wrap(Images.Elf(i => Images.U64(i, 24, 0xffff_ffff_8120_0004))), _options);
        Assert.Equal(0x120_0004u, Vcpu.GetRegisters().Rip);
    }

    [Fact]
    public void FormatIsFoundOut()
    {
        KernelLoader.Load(Memory, Vcpu, Images.Wrap(Images.Elf()), _options);
        Assert.Equal(0x100_0010u, Vcpu.GetRegisters().Rip);
        KernelLoader.Load(Memory, Vcpu, Images.Wrap(Images.BzImage()), _options);
        Assert.Equal(Images.Preferred + 0x200, Vcpu.GetRegisters().Rip);
        Assert.Equal(BootImageProblem.UnknownFormat, Images.Refuse(() => KernelLoader.Load(Memory, Vcpu, Images.Wrap(new byte[5000]), _options)));
        Assert.Equal(BootImageProblem.Empty, Images.Refuse(() => KernelLoader.Load(Memory, Vcpu, Images.Wrap([]), _options)));
    }

    [Theory]
    [InlineData(CodeWidth.Bits16, 0x7c00, 0)]
    [InlineData(CodeWidth.Bits16, 0x1_2345, 0x1234)]
    [InlineData(CodeWidth.Bits32, 0x10_0000, 0x10)]
    [InlineData(CodeWidth.Bits64, 0x10_0000, 0x10)]
    public void FlatImageStartsInItsMode(CodeWidth width, ulong address, int codeSelector)
    {
        FlatLoader.Load(Memory, Vcpu, Images.Wrap([0x90]), address, width);
        var special = Vcpu.GetSpecialRegisters();
        Assert.Equal(codeSelector, special.Cs.Selector);
        Assert.Equal(address, special.Cs.Base + Vcpu.GetRegisters().Rip);
        Assert.Equal(width != CodeWidth.Bits16, (special.Cr0 & 1) != 0);
        Assert.Equal(width == CodeWidth.Bits64, special.Cs.L == 1);
        Assert.Equal(width == CodeWidth.Bits32, special.Cs.Db == 1);
    }

    [Fact]
    public void FlatImageThatDoesNotFitIsRefused()
    {
        Assert.Equal(BootImageProblem.Empty, Images.Refuse(() => FlatLoader.Load(Memory, Vcpu, Images.Wrap([]), 0x10000)));
        Assert.Equal(BootImageProblem.TooLarge, Images.Refuse(() => FlatLoader.Load(Memory, Vcpu, Images.Wrap(new byte[2]), (64 << 20) - 1)));
        Assert.Equal(BootImageProblem.TooLarge, Images.Refuse(() => FlatLoader.Load(Memory, Vcpu, Images.Wrap(new byte[2]), ulong.MaxValue)));
        Assert.Equal(BootImageProblem.Unsupported, Images.Refuse(() => FlatLoader.Load(Memory, Vcpu, Images.Wrap(new byte[0x400]), 0x7f00)));
        Assert.Equal(BootImageProblem.Unsupported, Images.Refuse(() => FlatLoader.Load(Memory, Vcpu, Images.Wrap(new byte[2]), 0x20_0000, CodeWidth.Bits16)));
    }

    [Fact]
    public void CommandLineHasItsLimit()
    {
        var kernel = Images.Wrap(Images.BzImage());
        LinuxLoader.Load(Memory, Vcpu, kernel, new LinuxBootOptions { CommandLine = new string('x', 2047) });
        Assert.Equal(BootImageProblem.CommandLineTooLong,
            Images.Refuse(() => LinuxLoader.Load(Memory, Vcpu, kernel, new LinuxBootOptions { CommandLine = new string('x', 2048) })));
        var generous = Images.Wrap(Images.BzImage(i => Images.U32(i, 0x238, uint.MaxValue)));
        Assert.Equal(BootImageProblem.CommandLineTooLong,
            Images.Refuse(() => LinuxLoader.Load(Memory, Vcpu, generous, new LinuxBootOptions { CommandLine = new string('x', 100_000) })));
        Assert.Throws<KvmSharpException>(() => LinuxLoader.Load(Memory, Vcpu, kernel, new LinuxBootOptions { CommandLine = "a\0b" }));
    }

    private string ReadText(ulong address, int length)
    {
        var bytes = new byte[length];
        Memory.Read(address, bytes);
        return Encoding.ASCII.GetString(bytes);
    }

    private (ulong, ulong, uint) ReadMap(int index)
    {
        var entry = ZeroPage + 0x2d0 + (ulong)index * 20;
        return (Memory.Read<ulong>(entry), Memory.Read<ulong>(entry + 8), Memory.Read<uint>(entry + 16));
    }
}
