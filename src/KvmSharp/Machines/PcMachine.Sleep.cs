using KvmSharp.Boot;
using KvmSharp.Devices;
using KvmSharp.Firmware;

namespace KvmSharp;

/// <content>
/// Suspend to RAM. The processors lose their state; memory and devices keep theirs. Specification: ACPI 6.5, "Waking and
/// Sleeping".
/// </content>
public sealed partial class PcMachine
{
    private const byte ResumeFromSleep = 0xfe; // the shutdown status that SeaBIOS takes for it
    private const uint RealModeEnd = 0x10_0000;

    private CmosRtc? _realTimeClock;

    private void OfferSleep(AcpiPm powerManagement)
    {
        powerManagement.OfferSleep(Sleep, Wake);
        if (_realTimeClock is { } clock)
        {
            clock.AlarmRaised += powerManagement.SignalAlarm;
        }
    }

    private void Sleep()
    {
        if (Options.Firmware is not null)
        {
            _realTimeClock?.SetShutdownStatus(ResumeFromSleep);
            Pci!.Bridge.ResetSystemManagement();
            _lpcBridge!.ResetSystemManagement();
        }
        VirtualMachine.RequestTransition(() =>
        {
            foreach (var vcpu in VirtualMachine.Vcpus)
            {
                vcpu.Sleep();
            }
        });
    }

    // Firmware starts at the reset vector and finds the way itself; without it the machine does what firmware would.
    private void Wake() => VirtualMachine.RequestTransition(() =>
    {
        var vcpu = VirtualMachine.Vcpus[0];
        if (Options.Firmware is not null)
        {
            vcpu.Wake();
            return;
        }
        // "Firmware Waking Vector": CS is the address over 16, IP the rest.
        var vector = VirtualMachine.Memory.Read<uint>(AcpiTables.DefaultAddress + AcpiTables.FacsOffset + AcpiTables.FacsWakingVector);
        if (vector is 0 or >= RealModeEnd)
        {
            VirtualMachine.RequestReset($"The guest slept without a waking vector in the first megabyte: 0x{vector:x}.");
            return;
        }
        CpuSetup.EnterRealMode(vcpu, (ushort)(vector >> 4), (ushort)(vector & 0xf), 0);
        vcpu.Wake();
    });
}
