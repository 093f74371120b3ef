namespace KvmSharp.Tests.Vcpus;

public sealed class CpuModelTests
{
    [Fact]
    public void DefaultIsLevelTwo()
    {
        Assert.Equal("x86-64-v2", CpuModel.Default.Name);
        foreach (var name in (string[])["sse4.2", "popcnt", "cx16", "ssse3", "lahf-lm", "nx", "lm", "syscall", "smep"])
        {
            Assert.Contains(name, CpuModel.Default.Features);
        }
        foreach (var name in (string[])["avx", "xsave", "bmi1", "movbe", "fma"])
        {
            Assert.DoesNotContain(name, CpuModel.Default.Features);
        }
    }

    [Theory]
    [InlineData("x86-64-v1", "x86-64-v1")]
    [InlineData("QEMU64", "qemu64")]
    [InlineData("x86-64-v2,+RDRAND,-smap", "x86-64-v2,+rdrand,-smap")]
    [InlineData("x86-64-v2, +sse4_1 , -sse4-2", "x86-64-v2,+sse4.1,-sse4.2")]
    [InlineData("max", "max")]
    public void ParsesModelsAndChanges(string text, string name) => Assert.Equal(name, CpuModel.Parse(text).Name);

    [Theory]
    [InlineData("", "")]
    [InlineData("pentium", "pentium")]
    [InlineData("x86-64-v2,", "")]
    [InlineData("x86-64-v2,avx", "avx")]
    [InlineData("x86-64-v2,+", "")]
    [InlineData("x86-64-v2,+warp", "warp")]
    [InlineData("x86-64-v2,-warp", "warp")]
    [InlineData("+avx", "+avx")]
    public void UnknownNamesAreRefused(string text, string name)
    {
        var e = Assert.Throws<UnsupportedFeatureException>(() => CpuModel.Parse(text));
        Assert.Equal(name, e.FeatureName);
        Assert.DoesNotContain('\n', e.Message);
        Assert.EndsWith(".", e.Message);
    }

    [Fact]
    public void EveryFeatureHasOneBitAndIsFoundByItsName()
    {
        Assert.Equal(CpuFeature.All.Count, CpuFeature.All.Select(f => f.Name).Distinct().Count());
        Assert.Equal(CpuFeature.All.Count, CpuFeature.All.Select(f => (f.Leaf, f.Subleaf, f.Register, f.Bit)).Distinct().Count());
        Assert.All(CpuFeature.All, f => Assert.Same(f, CpuFeature.Find(f.Name.ToUpperInvariant())));
    }

    [Fact]
    public void GuestIsOfferedNothingThatTheCoreLacks()
    {
        CpuidEntry[] core = [new() { Function = 1, Ecx = 1 << 0, Edx = 1 << 0 }];
        var leaf = CpuModel.Parse("max").Restrict(core, 3, 4).Single();
        Assert.Equal((1u, 1u), (leaf.Ecx, leaf.Edx));
        Assert.Equal(3u, leaf.Ebx >> 24);
        Assert.Equal(4u, (leaf.Ebx >> 16) & 0xff);
        Assert.Equal("avx", Assert.Throws<UnsupportedFeatureException>(() => CpuModel.Parse("max,+avx").Restrict(core, 0, 1)).FeatureName);
    }

    [Fact]
    public void RemovedFeaturesAreMaskedInEveryLeaf()
    {
        CpuidEntry[] core =
        [
            new() { Function = 1, Edx = 1 << 23, Ecx = uint.MaxValue },
            new() { Function = 0x8000_0001, Edx = (1u << 23) | (1u << 20) | (1u << 31) },
        ];
        var leaves = CpuModel.Parse("x86-64-v2,-mmx,-nx").Restrict(core, 0, 1);
        Assert.Equal(0u, leaves[0].Edx);
        Assert.Equal(1u << 31, leaves[1].Edx); // a bit without a name is a value, not a feature
        Assert.Equal(0u, leaves[0].Ecx & (1u << 28)); // AVX is not of level 2
        Assert.Equal(1u << 20, leaves[0].Ecx & (1u << 20));
    }

    [Fact]
    public void BrandNamesTheModel()
    {
        CpuidEntry[] core = [new() { Function = 0x8000_0002 }, new() { Function = 0x8000_0003 }, new() { Function = 0x8000_0004 }];
        var text = string.Concat(CpuModel.Parse("qemu64,+nx").Restrict([.. core, new() { Function = 0x8000_0001, Edx = 1 << 20 }], 0, 1).Take(3)
            .SelectMany(l => (uint[])[l.Eax, l.Ebx, l.Ecx, l.Edx]).SelectMany(BitConverter.GetBytes).Select(b => (char)b)).TrimEnd('\0');
        Assert.Equal("KvmSharp qemu64 processor", text);
    }

    [Fact]
    public void CoreHasLevelTwoWhole()
    {
        var supported = CpuModel.SupportedFeatureNames;
        foreach (var name in (string[])["cmov", "cx8", "fpu", "fxsr", "mmx", "syscall", "sse", "sse2", "cx16", "lahf-lm", "popcnt", "sse3", "sse4.1", "sse4.2", "ssse3"])
        {
            Assert.Contains(name, supported);
        }
    }

    [Fact]
    public void MachineShowsItsModel()
    {
        using var machine = new VirtualMachine(new VirtualMachineOptions { Cpu = CpuModel.Parse("x86-64-v2,-sse4.2") });
        var leaf = machine.Vcpus[0].GetCpuid().First(l => l.Function == 1);
        Assert.Equal(0u, leaf.Ecx & (1u << 20));
        Assert.Throws<UnsupportedFeatureException>(() => new VirtualMachine(new VirtualMachineOptions { Cpu = CpuModel.Default.With("avx512f") }));
    }
}
