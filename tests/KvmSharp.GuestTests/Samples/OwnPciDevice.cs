using KvmSharp.Devices.Pci;

namespace KvmSharp.GuestTests.Samples;

#region own-pci-device
/// <summary>Squares numbers: write one at offset 0, read its square at 4. An interrupt tells that it is there.</summary>
public sealed class Squarer : PciDevice, IIoDevice
{
    private uint _square;

    public Squarer()
        : base(new PciIdentity(VendorId: 0x1234, DeviceId: 0x5153, ClassCode: 0xff_00_00))
    {
        AddMemoryBar(0, 4096, this);
        AddMsix(bar: 1, vectors: 1);
    }

    public override string StateName => "squarer";

    public int MaxAccessSize => 4;

    public void Read(ulong offset, Span<byte> data)
    {
        data.Clear();
        if (offset == 4 && data.Length == 4)
        {
            BitConverter.TryWriteBytes(data, _square);
        }
    }

    public void Write(ulong offset, ReadOnlySpan<byte> data)
    {
        if (offset == 0 && data.Length == 4)
        {
            uint number = BitConverter.ToUInt32(data);
            _square = number * number;
            SignalInterrupt(0);
        }
    }

    protected override void SaveDeviceState(StateWriter writer) => writer.WriteUInt32(_square);

    protected override void LoadDeviceState(StateReader reader) => _square = reader.ReadUInt32();
}
#endregion

internal static class OwnPciDevice
{
    public static PcMachineOptions AddTo(PcMachineOptions options)
    {
        #region own-pci-device-use
        options = options with { PciDevices = [() => new Squarer()] };
        #endregion
        return options;
    }
}
