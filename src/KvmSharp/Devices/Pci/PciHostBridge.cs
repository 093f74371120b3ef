using static KvmSharp.Devices.Pci.PciRegisters;

namespace KvmSharp.Devices.Pci;

/// <summary>
/// Function 00:00.0: the host bridge itself, which places ECAM. It introduces itself as a memory controller that firmware
/// and operating systems know. Specification: Intel 3 Series Express Chipset Family, "PCIEXBAR - PCI Express Register Range
/// Base Address".
/// </summary>
internal sealed class PciHostBridge() : PciDevice(new PciIdentity(0x8086, 0x29c0, 0x06_00_00, 2, 0x1af4, 0x1100))
{
    private const int EcamRegister = 0x60;
    private const uint EcamEnable = 1;
    private const ulong EcamWritable = 0xf_f000_0007; // 36 address bits, length, enable; bits 26 and 27 depend on the length

    private ulong _programmed;
    private ShadowMemory? _shadow;
    private SystemManagementRam? _systemManagementRam;

    public override string StateName => "host-bridge";

    /// <summary>ECAM answers at another address, below 4 GiB.</summary>
    public event Action<ulong>? EcamMoved;

    /// <summary>Adds the attribute registers of memory below 1 MiB, and switches ECAM off as after a reset, for firmware to set up.</summary>
    public void AddShadowMemory(ShadowMemory shadow)
    {
        _shadow = shadow;
        for (var i = 0; i < ShadowMemoryRegisters.RegisterCount; i++)
        {
            var writable = i == 0 ? ShadowMemoryRegisters.FirstRegisterWritable : ShadowMemoryRegisters.RegisterWritable;
            Config.DefineByte(ShadowMemoryRegisters.FirstRegister + i, 0, writable);
        }
        Config.SetUInt32(EcamRegister, (uint)PciHost.DefaultEcamAddress);
        Update();
    }

    /// <summary>Adds the control of the memory of system management mode.</summary>
    public void AddSystemManagementRam(SystemManagementRam ram)
    {
        _systemManagementRam = ram;
        SystemManagementRam.Define(Config);
    }

    /// <summary>Loses what a reset loses about system management mode, so that firmware sets it up again.</summary>
    public void ResetSystemManagement() => _systemManagementRam?.Reset(Config);

    protected override void OnAttached(VirtualMachine machine)
    {
        Config.DefineUInt32(EcamRegister, (uint)PciHost.DefaultEcamAddress | EcamEnable, unchecked((uint)EcamWritable) | 0x0c00_0000);
        Config.DefineUInt32(EcamRegister + 4, 0, (uint)(EcamWritable >> 32));
        Update();
    }

    protected override void OnConfigWritten(int offset, int length)
    {
        if (offset < EcamRegister + 8 && EcamRegister < offset + length)
        {
            Update();
        }
        if (offset < ShadowMemoryRegisters.FirstRegister + ShadowMemoryRegisters.RegisterCount
            && ShadowMemoryRegisters.FirstRegister < offset + length)
        {
            UpdateShadow();
        }
        if (offset <= SystemManagementRamRegisters.Control && SystemManagementRamRegisters.Control < offset + length)
        {
            _systemManagementRam?.ControlWritten(Config);
        }
    }

    // The shadow memory loads what its registers say itself.
    protected override void LoadDeviceState(StateReader reader)
    {
        Update();
        _systemManagementRam?.Load(Config);
    }

    private void UpdateShadow()
    {
        Span<byte> registers = stackalloc byte[ShadowMemoryRegisters.RegisterCount];
        Config.Read(ShadowMemoryRegisters.FirstRegister, registers);
        _shadow?.SetAttributes(registers);
    }

    private void Update()
    {
        var register = Config.GetUInt32(EcamRegister) | (ulong)Config.GetUInt32(EcamRegister + 4) << 32;
        if (register == _programmed)
        {
            return;
        }
        _programmed = register;
        var size = ((register >> 1) & 3) switch
        {
            0 => 256UL << 20,
            1 => 128UL << 20,
            2 => 64UL << 20,
            _ => 0UL, // reserved
        };
        var enabled = (register & EcamEnable) != 0 && size != 0;
        ulong? address = enabled ? register & ~0x3ff_ffffUL & ~(size - 1) : null;
        Host!.MoveEcam(address, size);
        if (address is { } at and <= uint.MaxValue)
        {
            EcamMoved?.Invoke(at);
        }
    }
}
