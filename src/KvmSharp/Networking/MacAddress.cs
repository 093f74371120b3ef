using System.Buffers.Binary;
using System.Globalization;

namespace KvmSharp.Networking;

/// <summary>An Ethernet address.</summary>
public readonly record struct MacAddress
{
    /// <summary>The length in bytes.</summary>
    public const int Length = 6;

    private readonly ulong _value; // first byte highest

    /// <summary>Makes an address of its bytes.</summary>
    /// <param name="bytes">Six bytes in the order of transmission.</param>
    public MacAddress(ReadOnlySpan<byte> bytes)
    {
        ArgumentOutOfRangeException.ThrowIfNotEqual(bytes.Length, Length, nameof(bytes));
        _value = (ulong)BinaryPrimitives.ReadUInt16BigEndian(bytes) << 32 | BinaryPrimitives.ReadUInt32BigEndian(bytes[2..]);
    }

    /// <summary>The address that every station receives.</summary>
    public static MacAddress Broadcast { get; } = new([0xff, 0xff, 0xff, 0xff, 0xff, 0xff]);

    /// <summary>Whether it names a group of stations; the broadcast address does.</summary>
    public bool IsMulticast => (_value >> 40 & 1) != 0;

    /// <summary>Writes the bytes in the order of transmission.</summary>
    /// <param name="target">Room for six bytes.</param>
    public void CopyTo(Span<byte> target)
    {
        BinaryPrimitives.WriteUInt16BigEndian(target, (ushort)(_value >> 32));
        BinaryPrimitives.WriteUInt32BigEndian(target[2..], (uint)_value);
    }

    /// <summary>Reads an address like <c>52:54:00:12:34:56</c>.</summary>
    /// <param name="text">The text.</param>
    /// <param name="address">The address.</param>
    /// <returns>Whether the text is one.</returns>
    public static bool TryParse(string? text, out MacAddress address)
    {
        address = default;
        var parts = text?.Split(':') ?? [];
        Span<byte> bytes = stackalloc byte[Length];
        for (var i = 0; i < parts.Length; i++)
        {
            if (parts.Length != Length || parts[i].Length != 2
                || !byte.TryParse(parts[i], NumberStyles.AllowHexSpecifier, CultureInfo.InvariantCulture, out bytes[i]))
            {
                return false;
            }
        }
        address = new MacAddress(bytes);
        return parts.Length == Length;
    }

    /// <summary>The address in hexadecimal, for example <c>52:54:00:12:34:56</c>.</summary>
    public override string ToString()
    {
        Span<byte> b = stackalloc byte[Length];
        CopyTo(b);
        return string.Create(CultureInfo.InvariantCulture, $"{b[0]:x2}:{b[1]:x2}:{b[2]:x2}:{b[3]:x2}:{b[4]:x2}:{b[5]:x2}");
    }
}
