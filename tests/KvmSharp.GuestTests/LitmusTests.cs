using KvmSharp.GuestTests.Support;
using Xunit.Abstractions;

namespace KvmSharp.GuestTests;

/// <summary>
/// The memory model, locked operations and code and mappings that change, on real processors. KVMSHARP_LITMUS_ITERATIONS
/// makes the tests longer, that of shootdowns by a tenth of it.
/// </summary>
public sealed class LitmusTests(ITestOutputHelper output)
{
    private static readonly ulong? _iterations =
        Environment.GetEnvironmentVariable("KVMSHARP_LITMUS_ITERATIONS") is { Length: > 0 } text ? ulong.Parse(text) : null;

    [Theory]
    [InlineData("sb_mfence", 2, 20_000)]
    [InlineData("sb_xchg", 2, 20_000)]
    [InlineData("sb_lock", 2, 20_000)]
    [InlineData("sb_cpuid", 2, 20_000)]
    [InlineData("sb_own", 2, 20_000)]
    [InlineData("mp", 2, 20_000)]
    [InlineData("mp_string", 2, 20_000)]
    [InlineData("lb", 2, 20_000)]
    [InlineData("corr", 2, 20_000)]
    [InlineData("2+2w", 2, 20_000)]
    [InlineData("s", 2, 20_000)]
    [InlineData("rmw", 2, 50_000)]
    [InlineData("rmw", 4, 10_000)]
    [InlineData("split", 2, 20_000)]
    [InlineData("split", 4, 5_000)]
    [InlineData("tearing", 2, 100_000)]
    [InlineData("crossmodify", 2, 5_000)]
    [InlineData("crossmodify", 4, 1_000)]
    [InlineData("patchwait", 2, 3_000)]
    [InlineData("codestorm", 4, 20_000)]
    [InlineData("shootdown", 2, 5_000)]
    [InlineData("shootdown", 4, 300)]
    public async Task NothingForbiddenIsSeen(string test, int vcpus, ulong iterations) => await RunAsync(test, vcpus, iterations);

    [Fact]
    public async Task StoreBufferingIsSeen()
    {
        // What the model allows need not come in each run on a busy host.
        ulong seen = 0;
        for (ulong seed = 1; seen == 0 && seed <= 20; seed++)
        {
            seen = (await RunAsync("sb", 2, 50_000, seed))["relaxed"];
        }

        Assert.True(seen > 0, "no store waited in a store buffer");
    }

    private async Task<IReadOnlyDictionary<string, ulong>> RunAsync(string test, int vcpus, ulong iterations, ulong seed = 1)
    {
        TimeSpan limit = _iterations is null ? TimeSpan.FromMinutes(2) : TimeSpan.FromHours(1);
        ulong count = _iterations is not { } wanted ? iterations : test == "shootdown" ? wanted / 10 : wanted;
        IReadOnlyDictionary<string, ulong> counts = await SmpGuest.RunAsync(test, count, vcpus, seed, limit);
        output.WriteLine($"{test}, {vcpus} vCPUs: {string.Join(", ", counts.Select(pair => $"{pair.Key} {pair.Value}"))}");
        return counts;
    }
}
