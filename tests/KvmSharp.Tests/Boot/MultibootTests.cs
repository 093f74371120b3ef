using System.Text;
using KvmSharp.Boot;

namespace KvmSharp.Tests.Boot;

/// <summary>Multiboot 1 images: loaded as the specification says, or refused with one clear sentence.</summary>
public sealed class MultibootTests : IDisposable
{
    private const int Header = 0x100; // in images with address fields
    private const uint LoadAddress = 0x20_0000;

    private readonly VirtualMachine _machine = Images.CreateMachine();

    private GuestMemory Memory => _machine.Memory;

    public void Dispose() => _machine.Dispose();

    // Text from 0x80 on, header at 0x100, entry behind it.
    private static byte[] Flat(Action<byte[]>? change = null)
    {
        var image = new byte[0x3000];
        for (var i = 0; i < image.Length; i++)
        {
            image[i] = (byte)(i * 3 + 1);
        }
        WriteHeader(image, Header, 1 << 16);
        Images.U32(image, Header + 12, LoadAddress + 0x80);
        Images.U32(image, Header + 16, LoadAddress);
        Images.U32(image, Header + 20, LoadAddress + 0x2000);
        Images.U32(image, Header + 24, LoadAddress + 0x5000);
        Images.U32(image, Header + 28, LoadAddress + 0xa0);
        change?.Invoke(image);
        return image;
    }

    private static void WriteHeader(byte[] image, int at, uint flags)
    {
        Images.U32(image, at, 0x1bad_b002);
        Images.U32(image, at + 4, flags);
        Images.U32(image, at + 8, unchecked(0u - 0x1bad_b002 - flags));
    }

    private static byte[] Elf32(Action<byte[]>? change = null)
    {
        var image = new byte[0x2000];
        ((ReadOnlySpan<byte>)[0x7f, (byte)'E', (byte)'L', (byte)'F', 1, 1, 1]).CopyTo(image);
        Images.U16(image, 16, 2);
        Images.U16(image, 18, 3);
        Images.U32(image, 24, 0x40_0010);
        Images.U32(image, 28, 52);
        Images.U16(image, 42, 32);
        Images.U16(image, 44, 2);
        Segment32(image, 52, 0x1000, 0xc040_0000, 0x40_0000, 0x800, 0x1000);
        Segment32(image, 84, 0x1800, 0xc050_0000, 0x50_0000, 0x800, 0x3000);
        for (var i = 0x1000; i < image.Length; i++)
        {
            image[i] = (byte)(i * 5 + 1);
        }
        WriteHeader(image, 0x1800, 3);
        change?.Invoke(image);
        return image;
    }

    private static void Segment32(byte[] image, int at, uint offset, uint virtualAddress, uint address, uint fileSize, uint memorySize)
    {
        uint[] fields = [1, offset, virtualAddress, address, fileSize, memorySize];
        for (var i = 0; i < fields.Length; i++)
        {
            Images.U32(image, at + 4 * i, fields[i]);
        }
    }

    [Fact]
    public void AddressFieldsSayWhereTheImageGoes()
    {
        Memory.Fill(LoadAddress, 0x6000, 0xee);
        Load(Flat());
        var read = new byte[0x2000];
        Memory.Read(LoadAddress, read);
        Assert.Equal(Flat()[0x80..0x2080], read);
        Assert.All(Enumerable.Range(0x2000, 0x3000), i => Assert.Equal(0, Memory.Read<byte>(LoadAddress + (ulong)i)));
        Assert.Equal(0xee, Memory.Read<byte>(LoadAddress + 0x5000));
        Assert.Equal(LoadAddress + 0xa0, _machine.Vcpus[0].GetRegisters().Rip);
    }

    [Fact]
    public void WithoutAnEndTheWholeFileIsLoaded()
    {
        Load(Flat(i => { Images.U32(i, Header + 20, 0); Images.U32(i, Header + 24, 0); }));
        Assert.Equal(Flat()[^1], Memory.Read<byte>(LoadAddress + 0x3000 - 0x80 - 1));
    }

    [Theory]
    [InlineData(false)]
    [InlineData(true)]
    public void ElfGoesToItsPhysicalAddresses(bool is64Bit)
    {
        var image = is64Bit ? Images.Elf(i => WriteHeader(i, 0x1900, 0)) : Elf32();
        Load(image);
        var address = is64Bit ? 0x120_0000ul : 0x50_0000;
        var read = new byte[0x800];
        Memory.Read(address, read);
        Assert.Equal(image[0x1800..], read);
        Assert.Equal(is64Bit ? 0x100_0010ul : 0x40_0010, _machine.Vcpus[0].GetRegisters().Rip);
    }

    [Fact]
    public void VirtualEntryPointIsTranslated()
    {
        Load(Elf32(i => Images.U32(i, 24, 0xc050_0020)));
        Assert.Equal(0x50_0020ul, _machine.Vcpus[0].GetRegisters().Rip);
    }

    [Fact]
    public void MachineStateIsTheSpecified()
    {
        Load(Elf32());
        var registers = _machine.Vcpus[0].GetRegisters();
        var special = _machine.Vcpus[0].GetSpecialRegisters();
        Assert.Equal((0x2bad_b002ul, 2ul), (registers.Rax, registers.Rflags));
        Assert.Equal(1u, special.Cr0 & 0x8000_0001);
        Assert.Equal(0u, special.Efer);
        Assert.Equal((1, 0, 0xffff_ffffu, 0ul), (special.Cs.Db, special.Cs.L, special.Cs.Limit, special.Cs.Base));
        foreach (var segment in (SegmentRegister[])[special.Ds, special.Es, special.Fs, special.Gs, special.Ss])
        {
            Assert.Equal((3, 0xffff_ffffu, 0ul), (segment.Type, segment.Limit, segment.Base));
        }
        Assert.Equal(0x00cf_9b00_0000_ffffu, Memory.Read<ulong>(special.Gdt.Base + special.Cs.Selector));
    }

    [Fact]
    public void InformationTellsAll()
    {
        var module = new byte[0x1234];
        new Random(2).NextBytes(module);
        MultibootLoader.Load(Memory, _machine.Vcpus[0], BootImage.FromBytes(Elf32(), "/some where/my kernel.elf"), new MultibootOptions
        {
            CommandLine = "a=1  b",
            Module = BootImage.FromBytes(module, "dir/env file"),
        });
        var at = _machine.Vcpus[0].GetRegisters().Rbx;
        Assert.True(at is >= 0x1000 and < 0x9_fc00);
        uint Field(ulong offset) => Memory.Read<uint>(at + offset);
        Assert.Equal(1u | 4 | 8 | 0x40 | 0x200, Field(0));
        Assert.Equal((639u, (63u << 10)), (Field(4), Field(8)));
        Assert.Equal("my_kernel.elf a=1  b", ReadText(Field(16)));
        Assert.Equal("KvmSharp", ReadText(Field(64)));
        Assert.Equal(1u, Field(20));

        ulong entry = Field(24);
        ulong start = Memory.Read<uint>(entry), end = Memory.Read<uint>(entry + 4);
        Assert.Equal("env_file", ReadText(Memory.Read<uint>(entry + 8)));
        Assert.Equal(0u, Memory.Read<uint>(entry + 12));
        Assert.Equal(0x50_3000ul, start); // the first page behind the kernel
        var read = new byte[end - start];
        Memory.Read(start, read);
        Assert.Equal(module, read);

        ulong map = Field(48), mapEnd = map + Field(44);
        var ranges = new List<(ulong, ulong, uint)>();
        while (map < mapEnd)
        {
            ranges.Add((Memory.Read<ulong>(map + 4), Memory.Read<ulong>(map + 12), Memory.Read<uint>(map + 20)));
            map += Memory.Read<uint>(map) + 4;
        }
        Assert.Equal([(0, 0x9_fc00, 1), (0x9_fc00, 0x400, 2), (0xe_0000, 0x2_0000, 2), (0x10_0000, (64ul << 20) - 0x10_0000, 1)], ranges);
    }

    [Fact]
    public void WithoutAModuleThereIsNone()
    {
        Load(Elf32());
        var at = _machine.Vcpus[0].GetRegisters().Rbx;
        Assert.Equal((0u, 0u), (Memory.Read<uint>(at) & 8, Memory.Read<uint>(at + 20)));
        Assert.Equal("test", ReadText(Memory.Read<uint>(at + 16)));
    }

    [Fact]
    public void InformationAndModuleStayClearOfTheKernel()
    {
        // From 0x8000 to 0x92000, and from 1 MiB to 60 MiB.
        var image = Elf32(i =>
        {
            Segment32(i, 52, 0x1000, 0x8000, 0x8000, 0x800, 0x8_a000);
            Segment32(i, 84, 0x1800, 0x10_0000, 0x10_0000, 0x800, 59 << 20);
            Images.U32(i, 24, 0x8000);
        });
        MultibootLoader.Load(Memory, _machine.Vcpus[0], Images.Wrap(image), new MultibootOptions { Module = Images.Wrap([1, 2, 3]) });
        var at = _machine.Vcpus[0].GetRegisters().Rbx;
        Assert.Equal(0x9_2000ul, at);
        Assert.Equal(60u << 20, Memory.Read<uint>((ulong)Memory.Read<uint>(at + 24)));
    }

    [Fact]
    public void ModuleGoesBelowAKernelThatEndsWithMemory()
    {
        var image = Elf32(i =>
        {
            Segment32(i, 52, 0x1000, 0x30_0000, 0x30_0000, 0x800, 61 << 20);
            Segment32(i, 84, 0x1800, 0x20_0000, 0x20_0000, 0x800, 0x1000);
            Images.U32(i, 24, 0x20_0000);
        });
        MultibootLoader.Load(Memory, _machine.Vcpus[0], Images.Wrap(image), new MultibootOptions { Module = Images.Wrap(new byte[0x1000]) });
        var at = _machine.Vcpus[0].GetRegisters().Rbx;
        Assert.Equal(0x10_0000u, Memory.Read<uint>((ulong)Memory.Read<uint>(at + 24)));
    }

    [Fact]
    public void BadHeadersAreRefused()
    {
        (BootImageProblem, byte[])[] cases =
        [
            (BootImageProblem.UnknownFormat, Flat(i => i[Header] ^= 1)),
            (BootImageProblem.UnknownFormat, Flat(i => i[Header + 8] ^= 1)), // checksum
            (BootImageProblem.UnknownFormat, Flat()[1..]), // not aligned
            (BootImageProblem.UnknownFormat, [.. new byte[8192 - 8], .. Flat()[Header..]]), // not within the first 8 KiB
            (BootImageProblem.UnknownFormat, Flat()[..(Header + 11)]),
            (BootImageProblem.Unsupported, Flat(i => WriteHeader(i, Header, 1 << 16 | 1 << 2))), // a video mode
            (BootImageProblem.Unsupported, Flat(i => WriteHeader(i, Header, 1 << 16 | 1 << 15))),
            (BootImageProblem.Truncated, Flat()[..(Header + 31)]),
            (BootImageProblem.Malformed, Flat(i => Images.U32(i, Header + 12, LoadAddress - 4))), // header before the text
            (BootImageProblem.Malformed, Flat(i => Images.U32(i, Header + 12, LoadAddress + 0x104))), // text before the file
            (BootImageProblem.Malformed, Flat(i => Images.U32(i, Header + 20, LoadAddress))),
            (BootImageProblem.Truncated, Flat(i => Images.U32(i, Header + 20, LoadAddress + 0x3000))),
            (BootImageProblem.Malformed, Flat(i => Images.U32(i, Header + 24, LoadAddress + 0x1fff))),
            (BootImageProblem.TooLarge, Flat(i => Images.U32(i, Header + 24, 64 << 20 | 1))),
            (BootImageProblem.Malformed, Flat(i => Images.U32(i, Header + 28, LoadAddress - 1))),
            (BootImageProblem.Malformed, Flat(i => Images.U32(i, Header + 28, LoadAddress + 0x5000))),
            (BootImageProblem.TooLarge, Flat(i =>
            {
                Images.U32(i, Header + 12, 0xffff_ff80);
                Images.U32(i, Header + 16, 0xffff_ff00);
                Images.U32(i, Header + 20, 0);
                Images.U32(i, Header + 24, 0);
                Images.U32(i, Header + 28, 0xffff_ff00);
            })),
            (BootImageProblem.Malformed, Flat(i => WriteHeader(i, Header, 0))), // neither addresses nor ELF
            (BootImageProblem.Unsupported, Elf32(i => Images.U16(i, 18, 40))),
            (BootImageProblem.Unsupported, Elf32(i => i[4] = 3)),
            (BootImageProblem.Malformed, Elf32(i => Images.U16(i, 42, 31))),
            (BootImageProblem.Malformed, Elf32(i => Images.U16(i, 44, 0))),
            (BootImageProblem.Truncated, Elf32(i => Images.U32(i, 28, uint.MaxValue))),
            (BootImageProblem.Malformed, Elf32(i => Images.U32(i, 24, 0x60_0000))),
            (BootImageProblem.Truncated, Elf32(i => Images.U32(i, 52 + 4, 0x1fff))),
            (BootImageProblem.Malformed, Elf32(i => Images.U32(i, 52 + 16, 0x1001))),
            (BootImageProblem.TooLarge, Elf32(i => Images.U32(i, 52 + 20, uint.MaxValue))),
            (BootImageProblem.TooLarge, Elf32(i => Images.U32(i, 84 + 12, 64 << 20))),
            (BootImageProblem.Empty, []),
        ];
        foreach (var (problem, image) in cases)
        {
            Assert.Equal(problem, Images.Refuse(() => Load(image)));
        }
    }

    [Fact]
    public void DamageAnywhereInTheHeadersIsHarmless()
    {
        var random = new Random(5);
        for (var i = 0; i < 2000; i++)
        {
            var isElf = i % 2 == 0;
            var image = isElf ? Elf32() : Flat();
            for (var n = random.Next(1, 6); n > 0; n--)
            {
                var at = isElf ? random.Next(4, 116) : random.Next(Header + 12, Header + 32);
                image[at] = random.Next(3) switch { 0 => 0, 1 => 0xff, _ => (byte)random.Next(256) };
            }
            if (random.Next(4) == 0)
            {
                image = image[..random.Next(image.Length)];
            }
            try
            {
                MultibootLoader.Load(Memory, _machine.Vcpus[0], Images.Wrap(image), new MultibootOptions { Module = Images.Wrap(new byte[random.Next(1, 1 << 16)]) });
            }
            catch (BootImageException e)
            {
                Assert.EndsWith(".", e.Message);
            }
        }
    }

    [Fact]
    public void WhatDoesNotFitIsRefused()
    {
        var huge = Images.Wrap(new byte[64 << 20]);
        Assert.Equal(BootImageProblem.TooLarge, Images.Refuse(() => Load(Elf32(), huge)));
        Assert.Equal(BootImageProblem.Empty, Images.Refuse(() => Load(Elf32(), Images.Wrap([]))));
        Assert.Equal(BootImageProblem.TooLarge, Images.Refuse(() => MultibootLoader.Load(Memory, _machine.Vcpus[0], Images.Wrap(Elf32()),
            new MultibootOptions { CommandLine = new string('x', 700_000) })));
        Assert.Throws<KvmSharpException>(() => MultibootLoader.Load(Memory, _machine.Vcpus[0], Images.Wrap(Elf32()), new MultibootOptions { CommandLine = "a\0b" }));
    }

    [Fact]
    public void KernelLoaderKnowsTheFormat()
    {
        KernelLoader.Load(Memory, _machine.Vcpus[0], Images.Wrap(Elf32()), new LinuxBootOptions { CommandLine = "x", Initrd = Images.Wrap([7]) });
        var at = _machine.Vcpus[0].GetRegisters().Rbx;
        Assert.Equal("test x", ReadText(Memory.Read<uint>(at + 16)));
        Assert.Equal(7, Memory.Read<byte>(Memory.Read<uint>((ulong)Memory.Read<uint>(at + 24))));
    }

    private void Load(byte[] image, BootImage? module = null) =>
        MultibootLoader.Load(Memory, _machine.Vcpus[0], Images.Wrap(image), new MultibootOptions { Module = module });

    private string ReadText(ulong address)
    {
        var text = new List<byte>();
        byte next;
        while ((next = Memory.Read<byte>(address++)) != 0)
        {
            text.Add(next);
        }
        return Encoding.UTF8.GetString([.. text]);
    }
}
