using KvmSharp.Devices.Pci;
using KvmSharp.Storage;
using static KvmSharp.Devices.Ide.IdeRegisters;

namespace KvmSharp.Devices.Ide;

/// <summary>
/// An IDE controller with two channels at the ports and interrupts of the PC/AT, and a bus master. Specification: Intel 82371SB
/// (PIIX3), "IDE Controller"; Programming Interface for Bus Master IDE Controller 1.0.
/// </summary>
public sealed class IdeController : PciDevice, IDisposable
{
    /// <summary>The most drives.</summary>
    public const int MaxDrives = 4;

    private const int BusMasterBar = 4;
    private const int FirstTiming = 0x40; // two bytes for each channel
    private const int DriveTiming = 0x44;

    private static readonly (ulong Command, ulong Control, int Irq)[] Resources = [(0x1f0, 0x3f6, 14), (0x170, 0x376, 15)];

    private readonly IdeDrive?[] _drives;
    private readonly IdeChannel[] _channels = new IdeChannel[2];
    private readonly VirtualMachine _machine;

    /// <summary>Creates the controller.</summary>
    /// <param name="machine">The machine.</param>
    /// <param name="drives">First and second drive of the first channel, then those of the second; null is no drive.</param>
    /// <exception cref="KvmSharpException">There are too many drives or one of them cannot be.</exception>
    public IdeController(VirtualMachine machine, IReadOnlyList<IdeDriveOptions?> drives)
        : base(new PciIdentity(0x8086, 0x7010, 0x01_01_80, 0, 0x1af4, 0x1100))
    {
        ArgumentNullException.ThrowIfNull(machine);
        ArgumentNullException.ThrowIfNull(drives);
        if (drives.Count > MaxDrives)
        {
            throw new KvmSharpException(KvmSharpErrorCode.InvalidArgument, $"An IDE controller has at most {MaxDrives} drives.");
        }
        _machine = machine;
        _drives = new IdeDrive?[MaxDrives];
        for (var i = 0; i < drives.Count; i++)
        {
            drives[i]?.Validate();
            _drives[i] = drives[i]?.Create();
        }
        for (var i = 0; i < _channels.Length; i++)
        {
            _channels[i] = new IdeChannel(this, machine.GetInterruptLine(Resources[i].Irq), _drives[2 * i], _drives[2 * i + 1]);
            Config.DefineUInt16(FirstTiming + 2 * i, 0x8000, 0xffff); // decoding is on
        }
        Config.DefineByte(DriveTiming, 0, 0xff);
        AddPortBar(BusMasterBar, 2 * BusMasterChannelLength, new BusMaster(_channels));
    }

    /// <inheritdoc/>
    public override string StateName => "ide";

    /// <summary>Puts another disc into a CD-ROM drive. The old one is not disposed. Callable from any thread.</summary>
    /// <param name="drive">The drive's number.</param>
    /// <param name="medium">The disc; null leaves the drive empty.</param>
    /// <exception cref="KvmSharpException">There is no CD-ROM drive with this number.</exception>
    public void InsertDisc(int drive, IBlockBackend? medium)
    {
        if (drive is < 0 or >= MaxDrives || _drives[drive] is not IdeCdRom cdRom)
        {
            throw new KvmSharpException(KvmSharpErrorCode.NotFound, $"IDE drive {drive} is no CD-ROM drive.");
        }
        _channels[drive / 2].Insert(cdRom, medium);
    }

    /// <summary>Ends the threads of the controller, when the machine is gone.</summary>
    public void Dispose()
    {
        foreach (var channel in _channels)
        {
            channel.Detach();
        }
    }

    internal bool Read(uint address, Span<byte> data) => ReadMemory(address, data);

    internal bool Write(uint address, ReadOnlySpan<byte> data) => WriteMemory(address, data);

    /// <inheritdoc/>
    protected override void OnAttached(VirtualMachine machine)
    {
        for (var i = 0; i < _channels.Length; i++)
        {
            _channels[i].Attach(_machine);
            _machine.Ports.Map(_channels[i].CommandBlock, Resources[i].Command, CommandBlockLength);
            _machine.Ports.Map(_channels[i].ControlBlock, Resources[i].Control, 1);
        }
    }

    /// <inheritdoc/>
    protected override void SaveDeviceState(StateWriter writer)
    {
        foreach (var channel in _channels)
        {
            channel.Save(writer);
        }
    }

    /// <inheritdoc/>
    protected override void LoadDeviceState(StateReader reader)
    {
        foreach (var channel in _channels)
        {
            channel.Load(reader);
        }
    }

    private sealed class BusMaster(IdeChannel[] channels) : IIoDevice
    {
        public int MaxAccessSize => 4;

        public void Read(ulong offset, Span<byte> data)
        {
            for (var i = 0; i < data.Length; i++)
            {
                var at = (int)offset + i;
                data[i] = channels[at / BusMasterChannelLength].ReadMaster(at % BusMasterChannelLength);
            }
        }

        public void Write(ulong offset, ReadOnlySpan<byte> data)
        {
            for (var i = 0; i < data.Length; i++)
            {
                var at = (int)offset + i;
                channels[at / BusMasterChannelLength].WriteMaster(at % BusMasterChannelLength, data[i]);
            }
        }
    }
}
