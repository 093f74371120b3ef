using KvmSharp.Boot;

namespace KvmSharp.Tests.Boot;

/// <summary>Whatever is in an image: it loads, or it is refused with one clear sentence.</summary>
public sealed class BadImageTests : IDisposable
{
    private readonly VirtualMachine _machine = Images.CreateMachine();

    public void Dispose() => _machine.Dispose();

    public static TheoryData<string, BootImageProblem> BadBzImages => new()
    {
        { "no body", BootImageProblem.Truncated },
        { "half a body", BootImageProblem.Truncated },
        { "header only", BootImageProblem.Truncated },
        { "old protocol", BootImageProblem.Unsupported },
        { "2.06 that ends early", BootImageProblem.Truncated },
        { "2.10 with a header of 2.06", BootImageProblem.Malformed },
        { "32-bit kernel without a body", BootImageProblem.Malformed },
        { "32-bit kernel beyond 4 GiB", BootImageProblem.TooLarge },
        { "loaded low", BootImageProblem.Unsupported },
        { "short header", BootImageProblem.Malformed },
        { "tiny body", BootImageProblem.Malformed },
        { "huge body", BootImageProblem.Truncated },
        { "setup beyond the end", BootImageProblem.Truncated },
        { "odd alignment", BootImageProblem.Malformed },
        { "no alignment", BootImageProblem.Malformed },
        { "fixed beyond memory", BootImageProblem.TooLarge },
        { "fixed at the end of the address space", BootImageProblem.TooLarge },
        { "fixed over the boot data", BootImageProblem.TooLarge },
        { "alignment beyond memory", BootImageProblem.TooLarge },
    };

    [Theory]
    [MemberData(nameof(BadBzImages))]
    public void BadBzImageIsRefused(string name, BootImageProblem problem)
    {
        var image = name switch
        {
            "no body" => Images.BzImage()[..Images.SetupLength],
            "half a body" => Images.BzImage()[..(Images.SetupLength + Images.BodyLength / 2)],
            "header only" => Images.BzImage()[..0x240],
            "old protocol" => Images.BzImage(i => Images.U16(i, 0x206, 0x0205)),
            "2.06 that ends early" => Images.BzImage(i => Images.U16(i, 0x206, 0x0206))[..0x23b],
            "2.10 with a header of 2.06" => Images.BzImage(i => { Images.U16(i, 0x206, 0x020a); i[0x201] = 0x3c; }),
            "32-bit kernel without a body" => Images.BzImage(i => { Images.U16(i, 0x236, 0); Images.U32(i, 0x1f4, 0); }),
            "32-bit kernel beyond 4 GiB" => Images.BzImage(i => { Images.U16(i, 0x236, 0); i[0x234] = 0; Images.U64(i, 0x258, 1UL << 32); }),
            "loaded low" => Images.BzImage(i => i[0x211] = 0),
            "short header" => Images.BzImage(i => i[0x201] = 0x10),
            "tiny body" => Images.BzImage(i => Images.U32(i, 0x1f4, 1)),
            "huge body" => Images.BzImage(i => Images.U32(i, 0x1f4, uint.MaxValue)),
            "setup beyond the end" => Images.BzImage(i => i[0x1f1] = 0xff),
            "odd alignment" => Images.BzImage(i => { Images.U32(i, 0x230, 0x30_0000); Images.U64(i, 0x258, 0); }),
            "no alignment" => Images.BzImage(i => { Images.U32(i, 0x230, 0); Images.U64(i, 0x258, 0); }),
            "fixed beyond memory" => Images.BzImage(i => { i[0x234] = 0; Images.U64(i, 0x258, 1UL << 30); }),
            "fixed at the end of the address space" => Images.BzImage(i => { i[0x234] = 0; Images.U64(i, 0x258, ulong.MaxValue - 4095); }),
            "fixed over the boot data" => Images.BzImage(i => { i[0x234] = 0; Images.U64(i, 0x258, 0x7000); }),
            _ => Images.BzImage(i => { Images.U32(i, 0x230, 1u << 31); Images.U64(i, 0x258, 0); }),
        };
        Assert.Equal(problem, Images.Refuse(() => Load(image)));
    }

    [Fact]
    public void BadElfIsRefused()
    {
        (BootImageProblem, Action<byte[]>)[] cases =
        [
            (BootImageProblem.Unsupported, i => i[4] = 1),
            (BootImageProblem.Unsupported, i => i[5] = 2),
            (BootImageProblem.Unsupported, i => Images.U16(i, 18, 3)),
            (BootImageProblem.Unsupported, i => Images.U16(i, 16, 1)),
            (BootImageProblem.Malformed, i => Images.U16(i, 56, 0)),
            (BootImageProblem.Malformed, i => Images.U16(i, 56, 0xffff)),
            (BootImageProblem.Malformed, i => Images.U16(i, 54, 8)),
            (BootImageProblem.Truncated, i => Images.U64(i, 32, 0x1fff)),
            (BootImageProblem.Truncated, i => Images.U64(i, 32, ulong.MaxValue)),
            (BootImageProblem.Malformed, i => Images.U64(i, 24, 0x500_0000)), // entry
            (BootImageProblem.Malformed, i => { Images.U32(i, 64, 4); Images.U32(i, 120, 4); }), // nothing to load
            (BootImageProblem.Truncated, i => Images.U64(i, 64 + 8, 0x1fff)),
            (BootImageProblem.Truncated, i => Images.U64(i, 64 + 8, ulong.MaxValue)),
            (BootImageProblem.Malformed, i => Images.U64(i, 64 + 32, ulong.MaxValue)),
            (BootImageProblem.TooLarge, i => Images.U64(i, 64 + 40, 1UL << 40)),
            (BootImageProblem.Malformed, i => { Images.U64(i, 64 + 40, ulong.MaxValue); }),
            (BootImageProblem.TooLarge, i => Images.U64(i, 120 + 24, 1UL << 40)),
            (BootImageProblem.Unsupported, i => Images.U64(i, 120 + 24, 0x7000)),
            (BootImageProblem.TooLarge, i => Images.U64(i, 120 + 24, (64 << 20) - 0x400)),
        ];
        foreach (var (problem, change) in cases)
        {
            Assert.Equal(problem, Images.Refuse(() => Load(Images.Elf(change))));
        }
        for (var length = 4; length < 64; length += 4)
        {
            Assert.Equal(BootImageProblem.Truncated, Images.Refuse(() => Load(Images.Elf()[..length])));
        }
    }

    [Fact]
    public void DamageAnywhereInTheHeadersIsHarmless()
    {
        var random = new Random(3);
        for (var i = 0; i < 2000; i++)
        {
            var isElf = i % 2 == 0;
            var image = isElf ? Images.Elf() : Images.BzImage();
            for (var n = random.Next(1, 6); n > 0; n--)
            {
                var at = isElf ? random.Next(4, 176) : random.Next(0x1f1, 0x268);
                image[at] = random.Next(3) switch { 0 => 0, 1 => 0xff, _ => (byte)random.Next(256) };
            }
            if (random.Next(4) == 0)
            {
                image = image[..random.Next(image.Length)];
            }
            try
            {
                Load(image, new byte[random.Next(1, 1 << 16)]);
            }
            catch (BootImageException e)
            {
                Assert.EndsWith(".", e.Message);
            }
        }
    }

    [Fact]
    public void InitrdMustFit()
    {
        Assert.Equal(BootImageProblem.TooLarge, Images.Refuse(() => Load(Images.BzImage(), new byte[64 << 20])));
        Assert.Equal(BootImageProblem.Empty, Images.Refuse(() => Load(Images.BzImage(), [])));
        var early = Images.BzImage(i => Images.U32(i, 0x22c, 0xfffff));
        Assert.Equal(BootImageProblem.TooLarge, Images.Refuse(() => Load(early, new byte[100])));
    }

    [Fact]
    public void MachineMayBeTooSmall()
    {
        using var tiny = Images.CreateMachine(64 << 10);
        Assert.Equal(BootImageProblem.TooLarge,
            Images.Refuse(() => KernelLoader.Load(tiny.Memory, tiny.Vcpus[0], Images.Wrap(Images.BzImage()), new LinuxBootOptions())));
        using var small = Images.CreateMachine(1 << 20);
        Assert.Equal(BootImageProblem.TooLarge,
            Images.Refuse(() => KernelLoader.Load(small.Memory, small.Vcpus[0], Images.Wrap(Images.BzImage()), new LinuxBootOptions())));
    }

    [Fact]
    public void BadFilesAreRefused()
    {
        var directory = Directory.CreateTempSubdirectory("kvmsharp");
        try
        {
            var empty = Path.Combine(directory.FullName, "empty");
            File.WriteAllBytes(empty, []);
            Assert.Equal(BootImageProblem.Empty, Images.Refuse(() => BootImage.FromFile(empty)));
            Assert.Equal(BootImageProblem.Unreadable, Images.Refuse(() => BootImage.FromFile(directory.FullName)));
            Assert.Equal(BootImageProblem.Unreadable, Images.Refuse(() => BootImage.FromFile(Path.Combine(directory.FullName, "missing"))));
            Assert.Equal(BootImageProblem.Unreadable, Images.Refuse(() => BootImage.FromFile(Path.Combine(empty, "below"))));
            Assert.Equal(BootImageProblem.Unreadable, Images.Refuse(() => BootImage.FromFile("")));
            Assert.Equal(BootImageProblem.Unreadable, Images.Refuse(() => BootImage.FromFile("a\0b")));
            Assert.Equal(BootImageProblem.Empty, Images.Refuse(() => BootImage.FromFile("/dev/null")));
            var good = Path.Combine(directory.FullName, "good");
            File.WriteAllBytes(good, [1, 2, 3]);
            Assert.Equal([1, 2, 3], BootImage.FromFile(good).Bytes.ToArray());
        }
        finally
        {
            directory.Delete(recursive: true);
        }
    }

    private void Load(byte[] image, byte[]? initrd = null) => KernelLoader.Load(_machine.Memory, _machine.Vcpus[0], Images.Wrap(image),
        new LinuxBootOptions { Initrd = initrd is null ? null : Images.Wrap(initrd) });
}
