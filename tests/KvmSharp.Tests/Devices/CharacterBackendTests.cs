using KvmSharp.Devices;

namespace KvmSharp.Tests.Devices;

public sealed class CharacterBackendTests
{
    [Fact]
    public void OutputIsKeptUpToALimit()
    {
        var backend = new MemoryCharacterBackend(maxOutput: 10);
        backend.Write("123456"u8);
        backend.Write("7890abc"u8);
        backend.Write("d"u8);
        Assert.Equal("1234567890", backend.GetOutputText());
        Assert.Equal(4, backend.DroppedBytes);
        Assert.Throws<ArgumentOutOfRangeException>(() => new MemoryCharacterBackend(-1));
    }

    [Fact]
    public void StreamsAreConnectedBothWays()
    {
        using var output = new MemoryStream();
        var text = new string('x', 10_000) + "end";
        using var backend = new StreamCharacterBackend(output, new MemoryStream(System.Text.Encoding.ASCII.GetBytes(text)));
        using var ended = new ManualResetEventSlim();
        backend.InputEnded += ended.Set;
        var received = "";
        var buffer = new byte[7];
        for (var i = 0; i < 1_000_000 && received.Length < text.Length; i++)
        {
            var count = backend.Read(buffer);
            received += System.Text.Encoding.ASCII.GetString(buffer, 0, count);
            if (count == 0)
            {
                Thread.Yield();
            }
        }
        Assert.Equal(text, received);
        Assert.True(ended.Wait(TimeSpan.FromSeconds(60)));
        backend.Write("out"u8);
        Assert.Equal("out", System.Text.Encoding.ASCII.GetString(output.ToArray()));
    }

    [Fact]
    public void ClosedOutputIsNoFailure()
    {
        using var backend = new StreamCharacterBackend(new BrokenStream());
        backend.Write("lost"u8);
    }

    [Fact]
    public async Task MemoryBackendFindsText()
    {
        var backend = new MemoryCharacterBackend();
        Assert.Equal(-1, backend.WaitForOutput("x", TimeSpan.FromMilliseconds(20)));
        backend.Write("login: ..."u8);
        Assert.Equal(6, backend.WaitForOutput("login:", TimeSpan.Zero));
        Assert.Equal(-1, backend.WaitForOutput("login:", TimeSpan.Zero, 6));
        var later = Task.Run(() => backend.WaitForOutput("shell", TimeSpan.FromSeconds(60)));
        backend.Write("sh"u8);
        backend.Write("ell"u8);
        Assert.Equal(15, await later);
    }

    private sealed class BrokenStream : MemoryStream
    {
        public override void Write(ReadOnlySpan<byte> buffer) => throw new IOException("gone");
    }
}
