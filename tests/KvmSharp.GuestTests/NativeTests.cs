using KvmSharp.GuestTests.Support;

namespace KvmSharp.GuestTests;

/// <summary>The test programs of the execution core, with the instruction oracle and the fuzzers, each bounded in time.</summary>
public sealed class NativeTests
{
    private static readonly TimeSpan Limit = TimeSpan.FromMinutes(8);

    [Theory]
    [InlineData("check")]
    [InlineData("fuzz-check")]
    public async Task NativeTestProgramsPass(string target)
    {
        CommandResult result = await CommandRunner.RunAsync(
            "make", ["--no-print-directory", "-j2", "-C", Path.Combine(TestPaths.RepositoryRoot, "native"), target], Limit);
        Assert.True(result.Status == 0, result.ToString());
    }
}
