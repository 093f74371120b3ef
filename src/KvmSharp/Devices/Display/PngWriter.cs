using System.Buffers.Binary;
using System.IO.Compression;

namespace KvmSharp.Devices;

/// <summary>Portable Network Graphics (PNG) Specification, Third Edition: truecolour, 8 bits a sample, no filter.</summary>
internal static class PngWriter
{
    private const byte BitDepth = 8;
    private const byte TrueColor = 2;

    private static ReadOnlySpan<byte> Signature => [0x89, (byte)'P', (byte)'N', (byte)'G', 0x0d, 0x0a, 0x1a, 0x0a];

    public static void Write(Stream stream, int width, int height, ReadOnlySpan<uint> pixels)
    {
        if (width == 0 || height == 0)
        {
            throw new InvalidOperationException("An empty screen makes no image.");
        }
        stream.Write(Signature);
        var header = new byte[13];
        BinaryPrimitives.WriteInt32BigEndian(header, width);
        BinaryPrimitives.WriteInt32BigEndian(header.AsSpan(4), height);
        header[8] = BitDepth;
        header[9] = TrueColor;
        WriteChunk(stream, "IHDR"u8, header);
        using var data = new MemoryStream();
        using (var compressor = new ZLibStream(data, CompressionLevel.Fastest, leaveOpen: true))
        {
            var row = new byte[1 + 3 * width]; // a filter type of 0 comes first
            for (var y = 0; y < height; y++)
            {
                for (var x = 0; x < width; x++)
                {
                    var pixel = pixels[y * width + x];
                    row[1 + 3 * x] = (byte)(pixel >> 16);
                    row[2 + 3 * x] = (byte)(pixel >> 8);
                    row[3 + 3 * x] = (byte)pixel;
                }
                compressor.Write(row);
            }
        }
        WriteChunk(stream, "IDAT"u8, data.ToArray());
        WriteChunk(stream, "IEND"u8, []);
    }

    private static void WriteChunk(Stream stream, ReadOnlySpan<byte> type, ReadOnlySpan<byte> data)
    {
        Span<byte> number = stackalloc byte[4];
        BinaryPrimitives.WriteInt32BigEndian(number, data.Length);
        stream.Write(number);
        stream.Write(type);
        stream.Write(data);
        BinaryPrimitives.WriteUInt32BigEndian(number, ~Crc(data, Crc(type, uint.MaxValue)));
        stream.Write(number);
    }

    // "Cyclic Redundancy Code algorithm"
    private static uint Crc(ReadOnlySpan<byte> data, uint crc)
    {
        foreach (var value in data)
        {
            crc ^= value;
            for (var bit = 0; bit < 8; bit++)
            {
                crc = (crc & 1) != 0 ? 0xedb8_8320 ^ (crc >> 1) : crc >> 1;
            }
        }
        return crc;
    }
}
