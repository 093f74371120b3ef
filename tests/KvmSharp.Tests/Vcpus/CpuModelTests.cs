namespace KvmSharp.Tests.Vcpus;

public sealed class CpuModelTests
{
    [Fact]
    public void DefaultIsAllThatTheCoreHas()
    {
        Assert.Equal("max", CpuModel.Default.Name);
        Assert.All(CpuModel.SupportedFeatureNames, f => Assert.Contains(f, CpuModel.Default.Features));
        // What the core or this host lacks is not in the leaves.
        var supported = CpuModel.SupportedFeatureNames;
        var leaves = CpuModel.Default.BuildCpuid(0, 2);
        Assert.All(CpuFeature.All.Where(f => !supported.Contains(f.Name) && f.Name != "ht"), f => Assert.DoesNotContain(leaves, l => f.IsIn(l)));
        Assert.All(CpuFeature.All.Where(f => supported.Contains(f.Name)), f => Assert.Contains(leaves, l => f.IsIn(l)));
    }

    [Fact]
    public void LevelTwoHasItsFeaturesAndNoMore()
    {
        var features = CpuModel.Parse("x86-64-v2").Features;
        Assert.All((string[])["sse4.2", "popcnt", "cx16", "ssse3", "lahf-lm", "nx", "lm", "syscall", "smep"], f => Assert.Contains(f, features));
        Assert.All((string[])["avx", "xsave", "bmi1", "movbe", "fma", "pku", "la57", "monitor"], f => Assert.DoesNotContain(f, features));
    }

    [Theory]
    [InlineData("x86-64-v1", "x86-64-v1")]
    [InlineData("QEMU64", "qemu64")]
    [InlineData("x86-64-v2,+RDRAND,-smap", "x86-64-v2,+rdrand,-smap")]
    [InlineData("x86-64-v2, +sse4_1 , -sse4-2", "x86-64-v2,+sse4.1,-sse4.2")]
    [InlineData("x86-64-v3,-AVX", "x86-64-v3,-avx")]
    [InlineData("max", "max")]
    [InlineData("max,vendor=genuineintel,-avx", "max,vendor=GenuineIntel,-avx")]
    [InlineData("qemu64,vendor=AuthenticAMD", "qemu64,vendor=AuthenticAMD")]
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
    [InlineData("max,vendor=Cyrix", "Cyrix")]
    [InlineData("max,vendor=", "")]
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
        Assert.Equal((1u, 1u | 1u << 28), (leaf.Ecx, leaf.Edx)); // several processors in the package
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
    public void LevelThreeIsLevelTwoAndMore()
    {
        var features = CpuModel.Parse("x86-64-v3").Features;
        Assert.All(CpuModel.Parse("x86-64-v2").Features, f => Assert.Contains(f, features));
        Assert.All((string[])["avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "lzcnt", "movbe", "xsave"], f => Assert.Contains(f, features));
        Assert.DoesNotContain("aes", features);
    }

    [Fact]
    public void FeaturesComeAndGoWithWhatTheyRequire()
    {
        var added = CpuModel.Parse("x86-64-v2,+vaes").Features;
        Assert.All((string[])["vaes", "aes", "avx", "xsave"], f => Assert.Contains(f, added));
        var removed = CpuModel.Parse("x86-64-v3,-xsave").Features;
        Assert.All((string[])["xsave", "xsaveopt", "avx", "avx2", "fma", "f16c"], f => Assert.DoesNotContain(f, removed));
        Assert.Contains("bmi2", removed);
    }

    [Fact]
    public void StateLeafDescribesWhatTheModelHas()
    {
        CpuidEntry[] core =
        [
            new() { Function = 0xd, Index = 0, Flags = 1, Eax = 7, Ecx = 832 },
            new() { Function = 0xd, Index = 1, Flags = 1, Eax = 0xf },
            new() { Function = 0xd, Index = 2, Flags = 1, Eax = 256, Ebx = 576 },
        ];
        Assert.Empty(CpuModel.Parse("x86-64-v2").Restrict(core, 0, 1));
        var leaves = CpuModel.Parse("x86-64-v3").Restrict(core, 0, 1);
        Assert.Equal([7u, 7u, 256u], leaves.Select(l => l.Eax)); // XSAVES is not of level 3
        Assert.Equal(832u, leaves[0].Ecx);
        leaves = CpuModel.Parse("x86-64-v3,-avx").Restrict(core, 0, 1);
        Assert.Equal([3u, 7u], leaves.Select(l => l.Eax));
        Assert.Equal(576u, leaves[0].Ecx);
    }

    [Fact]
    public void StateLeafHasRoomForTheLastComponent()
    {
        CpuidEntry[] core =
        [
            new() { Function = 7, Flags = 1, Ecx = 1 << 3 },
            new() { Function = 0xd, Index = 0, Flags = 1, Eax = 0x207, Ecx = 2696 },
            new() { Function = 0xd, Index = 2, Flags = 1, Eax = 256, Ebx = 576 },
            new() { Function = 0xd, Index = 9, Flags = 1, Eax = 8, Ebx = 2688 },
        ];
        Assert.Equal((0x207u, 2696u), State("max"));
        Assert.Equal((7u, 832u), State("max,-pku"));
        Assert.Equal((0x203u, 2696u), State("max,-avx"));
        Assert.Equal((7u, 832u), State("x86-64-v3"));

        (uint Components, uint Size) State(string model)
        {
            var leaf = CpuModel.Parse(model).Restrict(core, 0, 1).Single(l => l.Function == 0xd && l.Index == 0);
            return (leaf.Eax, leaf.Ecx);
        }
    }

    [Theory]
    [InlineData("max", 1)]
    [InlineData("max", 2)]
    [InlineData("max", 5)]
    [InlineData("max,vendor=GenuineIntel", 6)]
    [InlineData("x86-64-v1", 64)]
    public void OnePackageHasAllProcessors(string model, int count)
    {
        var idBits = 0;
        while (1 << idBits < count)
        {
            idBits++;
        }
        for (var index = 0; index < count; index++)
        {
            var leaves = CpuModel.Parse(model).BuildCpuid(index, count);
            var basic = Find(1, 0);
            Assert.Equal((uint)index, basic.Ebx >> 24);
            Assert.Equal((uint)count, (basic.Ebx >> 16) & 0xff);
            Assert.Equal(count > 1, ((basic.Edx >> 28) & 1) != 0);
            var (threads, cores) = (Find(0xb, 0), Find(0xb, 1));
            Assert.Equal((0u, 1u, 0x100u, (uint)index), (threads.Eax, threads.Ebx, threads.Ecx, threads.Edx));
            Assert.Equal(((uint)idBits, (uint)count, 0x201u, (uint)index), (cores.Eax, cores.Ebx, cores.Ecx, cores.Edx));
            if (model.EndsWith("Intel", StringComparison.Ordinal))
            {
                Assert.Equal((uint)(1 << idBits) - 1, Find(4, 0).Eax >> 26);
                Assert.Equal(0u, (Find(4, 0).Eax >> 14) & 0xfff);
            }
            else
            {
                Assert.Equal((uint)(count - 1), Find(0x8000_0008, 0).Ecx & 0xff);
                Assert.Equal((uint)idBits, (Find(0x8000_0008, 0).Ecx >> 12) & 0xf);
                Assert.Equal(count > 1, ((Find(0x8000_0001, 0).Ecx >> 1) & 1) != 0);
            }

            CpuidEntry Find(uint function, uint subleaf) => leaves.Single(l => l.Function == function && l.Index == subleaf);
        }
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

    [Theory]
    [InlineData(CpuVendor.GenuineIntel, "GenuineIntel")]
    [InlineData(CpuVendor.AuthenticAmd, "AuthenticAMD")]
    public void VendorIsShownWithWhatOnlyTheirProcessorsHave(CpuVendor vendor, string name)
    {
        var model = CpuModel.Parse("max").WithVendor(vendor);
        Assert.Equal(vendor, model.Vendor);
        Assert.Equal(vendor, model.Without("avx").With("nx").Vendor);
        using var machine = new VirtualMachine(new VirtualMachineOptions { Cpu = model });
        var leaves = machine.Vcpus[0].GetCpuid();
        CpuidEntry Leaf(uint function) => leaves.First(l => l.Function == function);
        var first = Leaf(0);
        Assert.Equal(name, string.Concat(((uint[])[first.Ebx, first.Edx, first.Ecx]).SelectMany(BitConverter.GetBytes).Select(b => (char)b)));
        var isIntel = vendor == CpuVendor.GenuineIntel;
        Assert.Equal(isIntel ? 6u : 15u, (Leaf(1).Eax >> 8) & 0xf);
        Assert.Equal(isIntel ? 0u : first.Ebx, Leaf(0x8000_0000).Ebx);
        Assert.Equal(Leaf(0x8000_0000).Eax, leaves.Max(l => l.Function));
        // AMD's repetition of leaf 1, and the shared bits beside it
        Assert.Equal(isIntel ? 0u : 1u, Leaf(0x8000_0001).Edx & 1);
        Assert.Equal(1u << 29 | 1u << 11, Leaf(0x8000_0001).Edx & (1u << 29 | 1u << 11));
    }

    [Fact]
    public void MachineChecksGoToTheirBank()
    {
        const ulong valid = 1UL << 63;
        using var machine = new VirtualMachine(new VirtualMachineOptions());
        var vcpu = machine.Vcpus[0];
        vcpu.InjectMachineCheck(new MachineCheck(3, valid | 0x123, 0x5000, 0x86, 0));
        Assert.Equal([valid | 0x123, 0x5000UL, 0x86UL], ((uint[])[0x40d, 0x40e, 0x40f]).Select(vcpu.GetMsr));
        Assert.Throws<KvmSharpException>(() => vcpu.InjectMachineCheck(new MachineCheck(3, 0x123, 0, 0, 0)));
        Assert.Throws<KvmSharpException>(() => vcpu.InjectMachineCheck(new MachineCheck(10, valid, 0, 0, 0)));
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
