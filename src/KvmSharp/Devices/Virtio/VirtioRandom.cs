using System.Buffers.Binary;
using System.Security.Cryptography;

namespace KvmSharp.Devices.Virtio;

/// <summary>
/// A source of random bytes: the host's, or a repeatable one for runs that have to be identical. Specification: VIRTIO 1.2,
/// "Entropy Device".
/// </summary>
public sealed class VirtioRandom : VirtioDevice
{
    private const int DeviceKind = 4;
    private const int QueueSize = 64;
    private const int MaxRequest = 1 << 16; // a driver that wants more gets less than it asked for

    // Configuration
    private readonly ulong? _seed;

    // Wiring
    private readonly VirtqueueChain _chain = new();
    private readonly byte[] _buffer = new byte[MaxRequest];

    // State
    private ulong _blocks; // of the repeatable sequence

    /// <summary>Creates the device.</summary>
    /// <param name="seed">Start of a repeatable sequence, which is no secret; <see langword="null"/> for the host's generator.</param>
    public VirtioRandom(ulong? seed = null)
        : base(DeviceKind, "random", QueueSize)
    {
        _seed = seed;
    }

    internal override int ConfigLength => 0;

    private protected override ulong DeviceFeatures => 0;

    private protected override void BuildConfig(Span<byte> image)
    {
    }

    private protected override bool Serve() => ServeQueue(Queues[0], _chain, Fill);

    private protected override void SaveDevice(StateWriter writer) => writer.WriteUInt64(_blocks);

    private protected override void LoadDevice(StateReader reader) => _blocks = reader.ReadUInt64();

    private uint Fill(VirtqueueChain chain)
    {
        var data = _buffer.AsSpan(0, (int)Math.Min(chain.WritableLength, MaxRequest));
        if (_seed is { } seed)
        {
            FillRepeatably(seed, data);
        }
        else
        {
            RandomNumberGenerator.Fill(data);
        }
        chain.Write(0, data);
        return (uint)data.Length;
    }

    // Hashes of seed and position.
    private void FillRepeatably(ulong seed, Span<byte> data)
    {
        Span<byte> input = stackalloc byte[16];
        Span<byte> block = stackalloc byte[SHA256.HashSizeInBytes];
        BinaryPrimitives.WriteUInt64LittleEndian(input, seed);
        while (!data.IsEmpty)
        {
            BinaryPrimitives.WriteUInt64LittleEndian(input[8..], _blocks++);
            SHA256.HashData(input, block);
            var count = Math.Min(block.Length, data.Length);
            block[..count].CopyTo(data);
            data = data[count..];
        }
    }
}
