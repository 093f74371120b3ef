using KvmSharp.Storage;

namespace KvmSharp.Devices.Virtio;

/// <summary>How a virtio device is connected to the machine.</summary>
public enum VirtioTransport
{
    /// <summary>As a function on the PCI bus.</summary>
    Pci = 0,
    /// <summary>By registers at a fixed address, announced by ACPI. A PC has room for a few of these.</summary>
    Mmio = 1,
}

/// <summary>A virtio device that a machine is to have. The backends that it names may outlive the machine.</summary>
public abstract record VirtioDeviceOptions
{
    private protected VirtioDeviceOptions()
    {
    }

    /// <summary>How the device is connected.</summary>
    public VirtioTransport Transport { get; init; }

    internal abstract VirtioDevice Create(ClockMode clock);

    internal virtual void Validate()
    {
        if (Transport is not (VirtioTransport.Pci or VirtioTransport.Mmio))
        {
            throw new KvmSharpException(KvmSharpErrorCode.InvalidArgument, $"The virtio transport {Transport} does not exist.");
        }
    }
}

/// <summary>A disk.</summary>
/// <param name="Backend">What is on it.</param>
public sealed record VirtioBlockOptions(IBlockBackend Backend) : VirtioDeviceOptions
{
    /// <summary>The most queues that a disk can have.</summary>
    public const int MaxQueueCount = 16;

    /// <summary>Whether the guest may only read, even if the backend can be written.</summary>
    public bool ReadOnly { get; init; }

    /// <summary>What the guest sees as the serial number: at most 20 ASCII characters.</summary>
    public string SerialNumber { get; init; } = "";

    /// <summary>The number of request queues: 1 to <see cref="MaxQueueCount"/>. A driver uses at most one per processor.</summary>
    public int QueueCount { get; init; } = 1;

    internal override VirtioDevice Create(ClockMode clock) => new VirtioBlock(this);

    internal override void Validate()
    {
        base.Validate();
        ArgumentNullException.ThrowIfNull(Backend);
        ArgumentNullException.ThrowIfNull(SerialNumber);
        if (SerialNumber.Length > 20 || !System.Text.Ascii.IsValid(SerialNumber))
        {
            throw new KvmSharpException(KvmSharpErrorCode.InvalidArgument, $"The serial number '{SerialNumber}' is not up to 20 ASCII characters.");
        }
        if (QueueCount is < 1 or > MaxQueueCount)
        {
            throw new KvmSharpException(KvmSharpErrorCode.InvalidArgument, $"A disk has 1 to {MaxQueueCount} queues, not {QueueCount}.");
        }
    }
}

/// <summary>A source of random bytes.</summary>
public sealed record VirtioRandomOptions : VirtioDeviceOptions
{
    /// <summary>
    /// Start of a repeatable sequence, which is no secret. Without one the bytes are the host's on a real clock, and those of
    /// seed 0 on a virtual clock.
    /// </summary>
    public ulong? Seed { get; init; }

    internal override VirtioDevice Create(ClockMode clock) => new VirtioRandom(Seed ?? (clock == ClockMode.Virtual ? 0 : null));
}
