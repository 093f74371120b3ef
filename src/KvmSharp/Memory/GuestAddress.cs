using System.Globalization;

namespace KvmSharp;

/// <summary>A guest-physical address.</summary>
/// <param name="Value">The address in bytes.</param>
public readonly record struct GuestAddress(ulong Value) : IComparable<GuestAddress>
{
    /// <summary>Makes an address of a number.</summary>
    /// <param name="value">The address in bytes.</param>
    public static implicit operator GuestAddress(ulong value) => new(value);

    /// <summary>The address as a number.</summary>
    /// <param name="address">The address.</param>
    public static implicit operator ulong(GuestAddress address) => address.Value;

    /// <summary>The address <paramref name="offset"/> bytes further; wraps around at 2^64.</summary>
    /// <param name="address">The address.</param>
    /// <param name="offset">The distance in bytes.</param>
    public static GuestAddress operator +(GuestAddress address, ulong offset) => new(unchecked(address.Value + offset));

    /// <inheritdoc/>
    public int CompareTo(GuestAddress other) => Value.CompareTo(other.Value);

    /// <summary>The address in hexadecimal, for example <c>0x100000</c>.</summary>
    public override string ToString() => string.Create(CultureInfo.InvariantCulture, $"0x{Value:x}");
}
