using System.Buffers.Binary;
using KvmSharp.Boot;

namespace KvmSharp.Tests.Boot;

/// <summary>Valid images, for tests to damage.</summary>
internal static class Images
{
    public const int SetupSectors = 2;
    public const int SetupLength = (SetupSectors + 1) * 512;
    public const int BodyLength = 0x3000;
    public const ulong Preferred = 0x100_0000;
    public const uint InitSize = 0x20_0000;

    public static byte[] BzImage(Action<byte[]>? change = null)
    {
        var image = new byte[SetupLength + BodyLength];
        image[0x1f1] = SetupSectors;
        U32(image, 0x1f4, BodyLength / 16);
        U16(image, 0x1fe, 0xaa55);
        image[0x201] = 0x6a;
        "HdrS"u8.CopyTo(image.AsSpan(0x202));
        U16(image, 0x206, 0x020f);
        image[0x211] = 1;
        U32(image, 0x22c, 0x7fff_ffff);
        U32(image, 0x230, 0x20_0000);
        image[0x234] = 1;
        U16(image, 0x236, 0x003f);
        U32(image, 0x238, 2047);
        U64(image, 0x258, Preferred);
        U32(image, 0x260, InitSize);
        for (var i = 0; i < BodyLength; i++)
        {
            image[SetupLength + i] = (byte)(i * 7 + 1);
        }
        change?.Invoke(image);
        return image;
    }

    public static byte[] Elf(Action<byte[]>? change = null)
    {
        var image = new byte[0x2000];
        ((ReadOnlySpan<byte>)[0x7f, (byte)'E', (byte)'L', (byte)'F', 2, 1, 1]).CopyTo(image);
        U16(image, 16, 2);
        U16(image, 18, 62);
        U64(image, 24, 0x100_0010); // entry
        U64(image, 32, 64); // program headers
        U16(image, 54, 56);
        U16(image, 56, 2);
        Segment(image, 64, 1, 0x1000, 0xffff_ffff_8100_0000, 0x100_0000, 0x800, 0x2000);
        Segment(image, 120, 1, 0x1800, 0xffff_ffff_8120_0000, 0x120_0000, 0x800, 0x800);
        for (var i = 0x1000; i < image.Length; i++)
        {
            image[i] = (byte)(i * 5 + 1);
        }
        change?.Invoke(image);
        return image;
    }

    public static void Segment(byte[] image, int at, uint type, ulong offset, ulong virtualAddress, ulong address, ulong fileSize, ulong memorySize)
    {
        U32(image, at, type);
        U64(image, at + 8, offset);
        U64(image, at + 16, virtualAddress);
        U64(image, at + 24, address);
        U64(image, at + 32, fileSize);
        U64(image, at + 40, memorySize);
    }

    public static void U16(byte[] image, int at, ushort value) => BinaryPrimitives.WriteUInt16LittleEndian(image.AsSpan(at), value);

    public static void U32(byte[] image, int at, uint value) => BinaryPrimitives.WriteUInt32LittleEndian(image.AsSpan(at), value);

    public static void U64(byte[] image, int at, ulong value) => BinaryPrimitives.WriteUInt64LittleEndian(image.AsSpan(at), value);

    public static BootImage Wrap(byte[] bytes) => BootImage.FromBytes(bytes, "test");

    /// <summary>A machine that is made anew for each load would be slow; loaders only write memory and registers.</summary>
    public static VirtualMachine CreateMachine(ulong size = 64 << 20) => new(new VirtualMachineOptions { MemorySize = size });

    public static BootImageProblem Refuse(Action load)
    {
        var e = Assert.Throws<BootImageException>(load);
        Assert.EndsWith(".", e.Message);
        Assert.DoesNotContain('\n', e.Message);
        return e.Problem;
    }
}
