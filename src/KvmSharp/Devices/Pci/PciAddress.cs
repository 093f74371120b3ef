using System.Globalization;

namespace KvmSharp.Devices.Pci;

/// <summary>The place of a PCI function on the root bus.</summary>
/// <param name="Device">The device number, 0 to 31.</param>
/// <param name="Function">The function number, 0 to 7.</param>
public readonly record struct PciAddress(int Device, int Function = 0) : IComparable<PciAddress>
{
    internal int Index => (Device << 3) | Function;

    internal bool IsValid => Device is >= 0 and < 32 && Function is >= 0 and < 8;

    /// <inheritdoc/>
    public int CompareTo(PciAddress other) => Index.CompareTo(other.Index);

    /// <summary>The address as tools print it, for example <c>00:03.0</c>.</summary>
    public override string ToString() => string.Create(CultureInfo.InvariantCulture, $"00:{Device:x2}.{Function:x}");
}

/// <summary>How a PCI function introduces itself.</summary>
/// <param name="VendorId">Who made it.</param>
/// <param name="DeviceId">What it is; the vendor's numbering.</param>
/// <param name="ClassCode">Class, subclass and programming interface, one byte each, the class in bits 16 to 23.</param>
/// <param name="RevisionId">The vendor's revision number.</param>
/// <param name="SubsystemVendorId">Who built it in.</param>
/// <param name="SubsystemId">That vendor's numbering.</param>
public readonly record struct PciIdentity(
    ushort VendorId, ushort DeviceId, uint ClassCode, byte RevisionId = 0, ushort SubsystemVendorId = 0, ushort SubsystemId = 0);
