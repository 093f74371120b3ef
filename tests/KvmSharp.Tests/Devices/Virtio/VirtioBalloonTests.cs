using KvmSharp.Devices.Virtio;

namespace KvmSharp.Tests.Devices.Virtio;

public sealed class VirtioBalloonTests
{
    private const ulong Statistics = 1UL << 1;

    [Fact]
    public void PagesGoBackToTheHost()
    {
        using var driver = Start();
        foreach (var page in new ulong[] { 0x900, 0x901, 0x902, 0xa00, 0x905 })
        {
            driver.Memory.Fill(page << 12, 4096, 0x77);
        }
        driver.Rings[0].Exchange(driver.Readable(Pages(0x901, 0x902, 0x900, 0xa00, 0xffff_ffff, 0x9000_0000)));
        Assert.All(new ulong[] { 0x900, 0x901, 0x902, 0xa00 }, page => Assert.Equal(0UL, driver.Memory.Read<ulong>(page << 12)));
        Assert.Equal(0x7777_7777_7777_7777, driver.Memory.Read<long>(0x905 << 12));
        driver.Memory.Write(0x900 << 12, 5); // and cost memory again when they are used
        Assert.Equal(5, driver.Memory.Read<int>(0x900 << 12));
        driver.Rings[1].Exchange(driver.Readable(Pages(0x900)));
        Assert.Equal(5, driver.Memory.Read<int>(0x900 << 12));
        Assert.False(driver.NeedsReset);
    }

    [Fact]
    public void ReadOnlyMemoryStays()
    {
        using var driver = Start();
        driver.Memory.AddRom(0x4000_0000, [1, 2, 3, 4]);
        driver.Rings[0].Exchange(driver.Readable(Pages(0x4_0000)));
        Assert.Equal(0x0403_0201, driver.Memory.Read<int>(0x4000_0000));
    }

    [Fact]
    public void TargetReachesTheGuestAndItsAnswerTheHost()
    {
        using var driver = Start();
        var balloon = (VirtioBalloon)driver.Device;
        balloon.Target = 64 << 20;
        Assert.Equal(1, driver.ConfigSignals);
        var config = new byte[8];
        balloon.ReadConfig(0, config);
        Assert.Equal(16384u, BitConverter.ToUInt32(config));
        balloon.WriteConfig(4, BitConverter.GetBytes(1000u));
        Assert.Equal(1000UL << 12, balloon.Actual);
        Assert.Throws<KvmSharpException>(() => balloon.Target = 100);
        Assert.Throws<KvmSharpException>(() => balloon.Target = 1UL << 60);
    }

    [Fact]
    public async Task StatisticsAreAskedFor()
    {
        using var driver = Start();
        var balloon = (VirtioBalloon)driver.Device;
        driver.Rings[2].Add(driver.Readable(Entry(4, 1000)));
        driver.Rings[2].Notify();
        Assert.Equal(0, driver.Rings[2].UsedIndex); // held until somebody asks
        var answer = balloon.GetStatisticsAsync();
        driver.RunTimers();
        Assert.Equal(1, driver.Rings[2].UsedIndex);
        Assert.False(answer.IsCompleted);
        driver.Rings[2].Add(driver.Readable([.. Entry(4, 2000), .. Entry(5, 3000), .. Entry(99, 1)]));
        driver.Rings[2].Notify();
        var statistics = await answer.WaitAsync(TimeSpan.FromSeconds(60));
        Assert.Equal(2000UL, statistics[BalloonStatistic.FreeMemory]);
        Assert.Equal(3000UL, statistics[BalloonStatistic.TotalMemory]);

        var writer = new StateWriter();
        balloon.Save(writer);
        balloon.Load(new StateReader(writer.ToArray()));
        var second = balloon.GetStatisticsAsync();
        driver.RunTimers();
        balloon.Dispose();
        await Assert.ThrowsAnyAsync<OperationCanceledException>(() => second.WaitAsync(TimeSpan.FromSeconds(60)));
        Assert.Throws<ObjectDisposedException>(() => { _ = balloon.GetStatisticsAsync(); }); // nobody would answer
    }

    [Theory]
    [InlineData(VirtioDriver.AllFeatures, 3)]
    [InlineData(~Statistics, 2)]
    public void FreePagesAreReported(ulong features, int queue)
    {
        using var driver = Start(features);
        driver.Memory.Fill(0x90_0000, 0x4000, 0x77);
        driver.Rings[queue].Exchange(new Buffer(0x90_0000, 0x2000, true), new Buffer(0x90_3001, 0x100, true));
        Assert.Equal(0, driver.Memory.Read<long>(0x90_0000));
        Assert.Equal(0, driver.Memory.Read<long>(0x90_1ff8));
        Assert.Equal(0x7777_7777_7777_7777, driver.Memory.Read<long>(0x90_2000));
        Assert.Equal(0x7777_7777_7777_7777, driver.Memory.Read<long>(0x90_3008)); // no whole page
    }

    [Fact]
    public void RequestsBeyondReasonNeedAReset()
    {
        using var driver = Start();
        driver.Rings[0].Add(new Buffer(0x90_0000, 0x1004, false));
        driver.Rings[0].Notify();
        Assert.True(driver.NeedsReset);
    }

    private static VirtioDriver Start(ulong features = VirtioDriver.AllFeatures) => new(new VirtioBalloon(new VirtioBalloonOptions()), features);

    private static byte[] Pages(params uint[] pages) => [.. pages.SelectMany(BitConverter.GetBytes)];

    private static byte[] Entry(ushort tag, ulong value) => [.. BitConverter.GetBytes(tag), .. BitConverter.GetBytes(value)];
}
