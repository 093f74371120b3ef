namespace KvmSharp.Tests.Memory;

public sealed class GuestMemoryTests : IDisposable
{
    private readonly VirtualMachine _machine = new(new VirtualMachineOptions { MemorySize = 0x10000 });

    private GuestMemory Memory => _machine.Memory;

    public void Dispose() => _machine.Dispose();

    [Fact]
    public void ValuesAreLittleEndianAndMayBeUnaligned()
    {
        Memory.Write(0x1001, 0x1122_3344_5566_7788UL);
        Assert.Equal(0x88, Memory.Read<byte>(0x1001));
        Assert.Equal(0x1122_3344u, Memory.Read<uint>(0x1005));
    }

    [Fact]
    public void FillThatMeetsReadOnlyMemoryChangesNothing()
    {
        Memory.AddRom(0x10000, new byte[4096]);
        var e = Assert.Throws<GuestMemoryException>(() => Memory.Fill(0x8000, 0x9000, 1));
        Assert.Equal(KvmSharpErrorCode.ReadOnly, e.ErrorCode);
        Assert.Equal(0, Memory.Read<byte>(0x8000));
        Memory.Fill(0x8000, 0x8000, 1);
        Assert.Equal(1, Memory.Read<byte>(0xffff));
    }

    [Theory]
    [InlineData(0xffff, 2)]
    [InlineData(0x10000, 1)]
    [InlineData(0x10000, 4096)]
    [InlineData(0xffff_ffff_ffff_ffff, 1)]
    [InlineData(0xffff_ffff_ffff_ffff, 2)]
    [InlineData(0xffff_ffff_ffff_f000, 8192)]
    [InlineData(0x8000_0000_0000_0000, 1)]
    public void AccessBeyondMemoryThrowsAndChangesNothing(ulong address, int length)
    {
        Memory.Write<byte>(0xffff, 0x5a);
        var data = new byte[length];
        data.AsSpan().Fill(0xcc);
        var e = Assert.Throws<GuestMemoryException>(() => Memory.Write(address, data));
        Assert.Equal((KvmSharpErrorCode.BadAddress, address, (ulong)length), (e.ErrorCode, e.Address.Value, e.Length));
        Assert.Throws<GuestMemoryException>(() => Memory.Read(address, data));
        Assert.Throws<GuestMemoryException>(() => Memory.Fill(address, (ulong)length, 1));
        Assert.Throws<GuestMemoryException>(() => { using var scope = Memory.BeginWrite(address, length); });
        Assert.False(Memory.IsBacked(address, (ulong)length));
        Assert.Equal(0x5a, Memory.Read<byte>(0xffff));
    }

    [Fact]
    public void AccessMaySpanAdjacentSlots()
    {
        Memory.AddRam(0x10000, 0x1000);
        Memory.Write(0xfffe, 0x4433_2211u);
        Assert.Equal(0x4433_2211u, Memory.Read<uint>(0xfffe));
        Assert.True(Memory.IsBacked(0, 0x11000));
        Assert.False(Memory.IsBacked(0, 0x11001));
        Memory.Fill(0xf800, 0x1000, 0xee);
        Assert.Equal(0xee, Memory.Read<byte>(0x107ff));
        Assert.Throws<GuestMemoryException>(() => { using var scope = Memory.BeginWrite(0xf800, 0x1000); }); // one slot only
    }

    [Fact]
    public void EmptyAccessesAreHarmless()
    {
        Memory.Read(0, []);
        Memory.Write(0, []);
        Memory.Fill(0x100, 0, 1);
        using var scope = Memory.BeginWrite(0x100, 0);
        Assert.True(scope.Data.IsEmpty);
    }

    [Fact]
    public void WriteScopeMarksPagesDirty()
    {
        var slot = Memory.AddRam(0x100000, 0x10000, MemorySlotFlags.LogDirtyPages);
        Memory.TakeDirtyLog(slot);
        using (var scope = Memory.BeginWrite(0x102ffe, 4))
        {
            scope.Data.Fill(1);
        }
        Memory.Write<byte>(0x105000, 1);
        Assert.Equal([0b10_1100UL], Memory.TakeDirtyLog(slot));
        Assert.Equal([0UL], Memory.TakeDirtyLog(slot));
        Assert.Equal(0x0101_0101u, Memory.Read<uint>(0x102ffe));
        Assert.Throws<KvmSharpException>(() => Memory.TakeDirtyLog(Memory.Slots[0]));
    }

    [Fact]
    public void RomCannotBeWritten()
    {
        Memory.AddRom(0xf0000, [1, 2, 3]);
        Assert.Equal(0x0003_0201u, Memory.Read<uint>(0xf0000));
        Assert.Equal(0x1000u, Memory.Slots[^1].Size);
        Assert.Equal(KvmSharpErrorCode.ReadOnly, Assert.Throws<GuestMemoryException>(() => Memory.Write<byte>(0xf0000, 0)).ErrorCode);
        Assert.Equal(KvmSharpErrorCode.ReadOnly,
            Assert.Throws<GuestMemoryException>(() => { using var scope = Memory.BeginWrite(0xf0000, 1); }).ErrorCode);
        Assert.Equal(1, Memory.Read<byte>(0xf0000));
    }

    [Theory]
    [InlineData(0x20001, 0x1000)]
    [InlineData(0x20000, 0x1001)]
    [InlineData(0x20000, 0)]
    [InlineData(0xf000, 0x1000)]
    [InlineData(0x8000, 0x10000)]
    [InlineData(0xffff_ffff_ffff_f000, 0x2000)]
    [InlineData(0x20000, 0xffff_ffff_ffff_f000)]
    public void InvalidSlotsAreRefused(ulong address, ulong size)
    {
        Assert.Throws<KvmSharpException>(() => Memory.AddRam(address, size));
        Assert.Single(Memory.Slots);
    }

    [Fact]
    public void RemovedSlotIsGone()
    {
        var slot = Memory.AddRam(0x100000, 0x1000);
        Memory.Write<byte>(0x100000, 1);
        Memory.Remove(slot);
        Assert.Throws<GuestMemoryException>(() => Memory.Read<byte>(0x100000));
        Assert.Throws<KvmSharpException>(() => Memory.Remove(slot));
        Memory.AddRam(0x100000, 0x1000);
        Assert.Equal(0, Memory.Read<byte>(0x100000));
    }

    [Fact]
    public void SameMemoryMayBeMappedTwice()
    {
        var ram = new GuestRam(0x2000);
        ram.Write(0x1000, [0x11]);
        Memory.Map(ram, 0, 0x100000, 0x2000);
        Memory.Map(ram, 0x1000, 0x200000, 0x1000);
        Assert.Throws<InvalidOperationException>(() => ram.Write(0, [1]));
        Assert.Throws<KvmSharpException>(() => Memory.Map(ram, 0x1000, 0x300000, 0x2000));
        ram.Dispose(); // the slots keep it
        Memory.Write<byte>(0x101000, 0x22);
        Assert.Equal(0x22, Memory.Read<byte>(0x200000));
        Assert.Throws<ObjectDisposedException>(() => Memory.Map(ram, 0, 0x400000, 0x1000));
    }

    [Fact]
    public void WriteScopeOutlivesItsSlotAndItsMachine()
    {
        var slot = Memory.AddRam(0x100000, 0x1000);
        using (var scope = Memory.BeginWrite(0x100000, 0x1000))
        {
            Memory.Remove(slot);
            scope.Data.Fill(1);
        }
        Assert.Throws<GuestMemoryException>(() => { using var scope = Memory.BeginWrite(0x100000, 1); });
    }

    [Fact]
    public async Task SlotsComeAndGoWhileTheGuestRuns()
    {
        using var machine = Guest.Create(Guest.CountLoop);
        machine.Start();
        await Task.Run(() =>
        {
            for (var i = 0; i < 500; i++)
            {
                var slot = machine.Memory.AddRam(0x4000_0000, 0x4000, MemorySlotFlags.LogDirtyPages);
                machine.Memory.Write(0x4000_1000, i);
                Assert.Equal(2u, machine.Memory.TakeDirtyLog(slot)[0]);
                machine.Memory.Remove(slot);
            }
        }).WaitAsync(TimeSpan.FromSeconds(60));
        machine.Stop();
    }
}
