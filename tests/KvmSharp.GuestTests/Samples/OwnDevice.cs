namespace KvmSharp.GuestTests.Samples;

#region own-device
/// <summary>Counts in one register what the guest adds to it in another.</summary>
public sealed class Adder : IIoDevice
{
    private uint _sum;

    public int MaxAccessSize => 4;

    public void Read(ulong offset, Span<byte> data)
    {
        if (offset == 4)
        {
            BitConverter.TryWriteBytes(data, _sum);
        }
    }

    public void Write(ulong offset, ReadOnlySpan<byte> data)
    {
        if (offset == 0 && data.Length == 4)
        {
            _sum += BitConverter.ToUInt32(data);
        }
    }
}
#endregion

internal static class OwnDevice
{
    public static async Task<VmExit> RunAsync(PcMachineOptions options)
    {
        #region own-device-use
        using var machine = new PcMachine(options);
        machine.VirtualMachine.Ports.Map(new Adder(), 0x700, 8);
        machine.VirtualMachine.Mmio.Map(new Adder(), 0xd000_0000, 8);
        machine.Start();
        return await machine.WaitForExitAsync();
        #endregion
    }
}
