using KvmSharp.Storage;

namespace KvmSharp.Devices.Ide;

/// <summary>A drive at an IDE controller: <see cref="IdeDiskOptions"/> or <see cref="IdeCdRomOptions"/>.</summary>
public abstract record IdeDriveOptions
{
    private protected IdeDriveOptions()
    {
    }

    /// <summary>What the guest sees as the serial number: at most 20 ASCII characters.</summary>
    public string SerialNumber { get; init; } = "";

    internal abstract IdeDrive Create();

    internal virtual void Validate()
    {
        ArgumentNullException.ThrowIfNull(SerialNumber);
        if (SerialNumber.Length > 20 || !System.Text.Ascii.IsValid(SerialNumber))
        {
            throw new KvmSharpException(KvmSharpErrorCode.InvalidArgument, $"The serial number '{SerialNumber}' is not up to 20 ASCII characters.");
        }
    }
}

/// <summary>An IDE disk.</summary>
/// <param name="Backend">Where its content is, in sectors of 512 bytes. The machine does not dispose it.</param>
public sealed record IdeDiskOptions(IBlockBackend Backend) : IdeDriveOptions
{
    /// <summary>Whether writes of the guest fail, even if the backend can be written.</summary>
    public bool ReadOnly { get; init; }

    internal override IdeDrive Create() => new IdeDisk(this);

    internal override void Validate()
    {
        base.Validate();
        ArgumentNullException.ThrowIfNull(Backend);
        if (Backend.SectorSize != 512)
        {
            throw new KvmSharpException(KvmSharpErrorCode.NotSupported, $"An IDE disk has sectors of 512 bytes, not {Backend.SectorSize}.");
        }
    }
}

/// <summary>A CD-ROM drive.</summary>
/// <param name="Medium">The disc, an ISO 9660 image for example; null for an empty drive. The machine does not dispose it.</param>
public sealed record IdeCdRomOptions(IBlockBackend? Medium) : IdeDriveOptions
{
    internal override IdeDrive Create() => new IdeCdRom(this);

    internal override void Validate()
    {
        base.Validate();
        if (Medium is { SectorSize: > 2048 })
        {
            throw new KvmSharpException(KvmSharpErrorCode.NotSupported, $"A disc has sectors of at most 2048 bytes, not {Medium.SectorSize}.");
        }
    }
}
