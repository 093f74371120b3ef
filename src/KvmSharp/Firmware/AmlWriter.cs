using System.Buffers.Binary;
using System.Text;

namespace KvmSharp.Firmware;

/// <summary>Writes ACPI Machine Language. Specification: ACPI 6.5, "ACPI Machine Language (AML) Specification".</summary>
internal sealed class AmlWriter
{
    private const byte ZeroOp = 0x00;
    private const byte OneOp = 0x01;
    private const byte NameOp = 0x08;
    private const byte BytePrefix = 0x0a;
    private const byte WordPrefix = 0x0b;
    private const byte DWordPrefix = 0x0c;
    private const byte StringPrefix = 0x0d;
    private const byte ScopeOp = 0x10;
    private const byte BufferOp = 0x11;
    private const byte PackageOp = 0x12;
    private const byte ExtOpPrefix = 0x5b;
    private const byte DeviceOp = 0x82;
    private const byte RootChar = 0x5c;
    private const byte MinMaxFixed = 0x0c;
    private const byte ReadWrite = 1;

    private readonly MemoryStream _stream = new();

    public byte[] ToArray() => _stream.ToArray();

    public AmlWriter Scope(string path, Action<AmlWriter> content) => Block([ScopeOp], path, content);

    public AmlWriter Device(string name, Action<AmlWriter> content) => Block([ExtOpPrefix, DeviceOp], name, content);

    public AmlWriter Name(string path, uint value)
    {
        _stream.WriteByte(NameOp);
        Path(path);
        return Integer(value);
    }

    public AmlWriter Name(string path, string value)
    {
        _stream.WriteByte(NameOp);
        Path(path);
        _stream.WriteByte(StringPrefix);
        _stream.Write(Encoding.ASCII.GetBytes(value));
        _stream.WriteByte(0);
        return this;
    }

    public AmlWriter NamePackage(string path, params uint[] values)
    {
        var elements = new AmlWriter();
        elements._stream.WriteByte((byte)values.Length);
        foreach (var value in values)
        {
            elements.Integer(value);
        }
        _stream.WriteByte(NameOp);
        Path(path);
        _stream.WriteByte(PackageOp);
        WithLength(elements.ToArray());
        return this;
    }

    /// <summary>A package of packages of numbers.</summary>
    public AmlWriter NamePackages(string path, IReadOnlyList<uint[]> packages)
    {
        var elements = new AmlWriter();
        elements._stream.WriteByte((byte)packages.Count);
        foreach (var package in packages)
        {
            var inner = new AmlWriter();
            inner._stream.WriteByte((byte)package.Length);
            foreach (var value in package)
            {
                inner.Integer(value);
            }
            elements._stream.WriteByte(PackageOp);
            elements.WithLength(inner.ToArray());
        }
        _stream.WriteByte(NameOp);
        Path(path);
        _stream.WriteByte(PackageOp);
        WithLength(elements.ToArray());
        return this;
    }

    public AmlWriter NameResources(string path, params byte[][] descriptors)
    {
        byte[] bytes = [.. descriptors.SelectMany(d => d), 0x79, 0]; // end tag; a checksum of 0 means none
        var buffer = new AmlWriter().Integer((uint)bytes.Length);
        buffer._stream.Write(bytes);
        _stream.WriteByte(NameOp);
        Path(path);
        _stream.WriteByte(BufferOp);
        WithLength(buffer.ToArray());
        return this;
    }

    /// <summary>"I/O Port Descriptor": ports that decode 16 address bits.</summary>
    public static byte[] Ports(ushort port, byte count) => [0x47, 1, (byte)port, (byte)(port >> 8), (byte)port, (byte)(port >> 8), 1, count];

    /// <summary>"IRQ Descriptor" without flags: an ISA interrupt, high, edge-triggered.</summary>
    public static byte[] Irq(int irq) => [0x22, (byte)(1 << irq), (byte)((1 << irq) >> 8)];

    /// <summary>"Extended Interrupt Descriptor": any GSI, level-triggered, active high, shared.</summary>
    public static byte[] Gsi(int gsi) => [0x89, 6, 0, 0x09, 1, .. BitConverter.GetBytes(gsi)];

    /// <summary>"32-Bit Fixed Memory Range Descriptor": read-write.</summary>
    public static byte[] Memory(uint address, uint length) =>
        [0x86, 9, 0, 1, .. BitConverter.GetBytes(address), .. BitConverter.GetBytes(length)];

    /// <summary>"Word Address Space Descriptor": bus numbers that a bridge passes on.</summary>
    public static byte[] BusWindow(byte first, byte last) => WordWindow(2, 0, first, last);

    /// <summary>"Word Address Space Descriptor": ports that a bridge passes on.</summary>
    public static byte[] PortWindow(ushort first, ushort last) => WordWindow(1, 3, first, last);

    /// <summary>"DWord Address Space Descriptor": memory addresses that a bridge passes on.</summary>
    public static byte[] MemoryWindow(uint first, uint last)
    {
        byte[] descriptor = [0x87, 0x17, 0, 0, MinMaxFixed, ReadWrite];
        return [.. descriptor, .. new uint[] { 0, first, last, 0, last - first + 1 }.SelectMany(BitConverter.GetBytes)];
    }

    /// <summary>"QWord Address Space Descriptor": memory addresses that a bridge passes on.</summary>
    public static byte[] HighMemoryWindow(ulong first, ulong last)
    {
        byte[] descriptor = [0x8a, 0x2b, 0, 0, MinMaxFixed, ReadWrite];
        return [.. descriptor, .. new ulong[] { 0, first, last, 0, last - first + 1 }.SelectMany(BitConverter.GetBytes)];
    }

    /// <summary>A plug-and-play id like PNP0501 as a number ("EISAID").</summary>
    public static uint EisaId(string id)
    {
        var vendor = ((id[0] - 0x40) << 10) | ((id[1] - 0x40) << 5) | (id[2] - 0x40);
        var product = Convert.ToUInt16(id[3..], 16);
        return BinaryPrimitives.ReverseEndianness(((uint)vendor << 16) | product);
    }

    private static byte[] WordWindow(byte type, byte flags, ushort first, ushort last)
    {
        byte[] descriptor = [0x88, 0x0d, 0, type, MinMaxFixed, flags];
        return [.. descriptor, .. new[] { (ushort)0, first, last, (ushort)0, (ushort)(last - first + 1) }.SelectMany(BitConverter.GetBytes)];
    }

    private AmlWriter Block(byte[] opcode, string path, Action<AmlWriter> content)
    {
        var inner = new AmlWriter();
        inner.Path(path);
        content(inner);
        _stream.Write(opcode);
        WithLength(inner.ToArray());
        return this;
    }

    private AmlWriter Integer(uint value)
    {
        Span<byte> bytes = stackalloc byte[4];
        BinaryPrimitives.WriteUInt32LittleEndian(bytes, value);
        switch (value)
        {
            case 0:
                _stream.WriteByte(ZeroOp);
                break;
            case 1:
                _stream.WriteByte(OneOp);
                break;
            case <= byte.MaxValue:
                _stream.WriteByte(BytePrefix);
                _stream.Write(bytes[..1]);
                break;
            case <= ushort.MaxValue:
                _stream.WriteByte(WordPrefix);
                _stream.Write(bytes[..2]);
                break;
            default:
                _stream.WriteByte(DWordPrefix);
                _stream.Write(bytes);
                break;
        }
        return this;
    }

    // One name segment, with or without the root character.
    private void Path(string path)
    {
        if (path.StartsWith('\\'))
        {
            _stream.WriteByte(RootChar);
            path = path[1..];
        }
        _stream.Write(Encoding.ASCII.GetBytes(path.PadRight(4, '_')));
    }

    // "Package Length Encoding": the length counts its own bytes.
    private void WithLength(byte[] content)
    {
        var length = content.Length;
        if (length + 1 <= 0x3f)
        {
            _stream.WriteByte((byte)(length + 1));
        }
        else
        {
            var extra = length + 2 <= 0xfff ? 1 : length + 3 <= 0xf_ffff ? 2 : 3;
            var total = length + 1 + extra;
            _stream.WriteByte((byte)((extra << 6) | (total & 0x0f)));
            for (var i = 0; i < extra; i++)
            {
                _stream.WriteByte((byte)(total >> (4 + 8 * i)));
            }
        }
        _stream.Write(content);
    }
}
