using System.Buffers.Binary;

namespace KvmSharp.Devices.Pci;

/// <summary>
/// Function 00:1f.0: the bridge to the old devices of a PC. It places the power management registers, leads the interrupt wires
/// of the PCI bus to interrupts of the PC/AT, and makes system management interrupts. Specification: Intel I/O Controller Hub 9
/// (ICH9) Family, "LPC Interface Bridge Registers (D31:F0)".
/// </summary>
internal sealed partial class LpcBridge : PciDevice
{
    // Wiring
    private readonly Lock _lock = new();
    private readonly AcpiPm? _powerManagement;
    private readonly PmBlock _block;
    private readonly Lock _routing = new();
    private readonly InterruptLine[,] _isaLines = new InterruptLine[PciHost.InterruptWires, 16];
    private readonly bool[] _wires = new bool[PciHost.InterruptWires];
    private readonly int[] _targets = new int[PciHost.InterruptWires]; // 0: none
    private VirtualMachine? _machine;
    private IDisposable? _registration;

    // State, beside the configuration space
    private readonly byte[] _generalEventEnables = new byte[8];
    private readonly byte[] _apm = new byte[ApmPortCount];
    private uint _smiEnable;
    private uint _smiStatus;
    private bool _locked; // follows from the configuration space

    /// <summary>Creates the bridge.</summary>
    /// <param name="powerManagement">The power management hardware, which the bridge places; null without.</param>
    public LpcBridge(AcpiPm? powerManagement)
        : base(new PciIdentity(0x8086, 0x2918, 0x06_01_00, 2, 0x1af4, 0x1100))
    {
        _powerManagement = powerManagement;
        _block = new PmBlock(this);
        Config.DefineUInt16(PciRegisters.Command, 7); // decoding and bus mastering are always on
        Config.DefineUInt32(PmBase, PmBaseIo, PmBaseMask);
        Config.DefineByte(AcpiControl, 0, AcpiEnable | SciSelect);
        for (var i = 0; i < RouteCount; i++)
        {
            Config.DefineByte(FirstRoute + i, RouteDisabled, RouteWritable);
            Config.DefineByte(SecondRoute + i, RouteDisabled, RouteWritable);
        }
        Config.DefineUInt32(RootComplexBase, 0, 0xffff_c001);
        Config.DefineUInt16(ConfigLock, 0, SmiLock);
    }

    /// <inheritdoc/>
    public override string StateName => "lpc-bridge";

    /// <summary>Where the power management registers answer; null while they do not.</summary>
    public ushort? PowerManagementAddress { get; private set; }

    // Without system management mode the enable reads as set, which tells firmware that there is nothing to set up.
    private uint FixedSmiEnable => _machine?.SystemManagementMemory is null ? ApmEnable : 0;

    /// <summary>Loses what a reset loses about system management interrupts, so that firmware sets them up again.</summary>
    public void ResetSystemManagement()
    {
        lock (_lock)
        {
            _smiEnable = FixedSmiEnable;
            _smiStatus = 0;
            _locked = false;
            Config.SetUInt16(ConfigLock, 0);
        }
    }

    /// <inheritdoc/>
    protected override void OnAttached(VirtualMachine machine)
    {
        _machine = machine;
        _smiEnable = FixedSmiEnable;
        for (var wire = 0; wire < PciHost.InterruptWires; wire++)
        {
            for (var irq = 0; irq < 16; irq++)
            {
                _isaLines[wire, irq] = machine.GetInterruptLine(irq);
            }
        }
        Host!.WireChanged += OnWireChanged;
        machine.Ports.Map(new ApmPorts(this), ApmPort, ApmPortCount);
    }

    /// <inheritdoc/>
    protected override void OnConfigWritten(int offset, int length)
    {
        if (offset < AcpiControl + 1 && PmBase < offset + length)
        {
            Place();
        }
        if (offset < FirstRoute + RouteCount && FirstRoute < offset + length)
        {
            UpdateRoutes();
        }
        if (offset < ConfigLock + 2 && ConfigLock < offset + length)
        {
            lock (_lock)
            {
                // "SMI_LOCK: ... once set, can only be cleared by a reset"
                _locked |= (Config.GetUInt16(ConfigLock) & SmiLock) != 0;
                Config.SetUInt16(ConfigLock, _locked ? SmiLock : (ushort)0);
            }
        }
    }

    /// <inheritdoc/>
    protected override void SaveDeviceState(StateWriter writer)
    {
        lock (_lock)
        {
            writer.WriteBytes(_generalEventEnables);
            writer.WriteBytes(_apm);
            writer.WriteUInt32(_smiEnable);
            writer.WriteUInt32(_smiStatus);
        }
        _powerManagement?.SaveState(writer);
    }

    /// <inheritdoc/>
    protected override void LoadDeviceState(StateReader reader)
    {
        lock (_lock)
        {
            reader.ReadBytes(_generalEventEnables.Length).CopyTo(_generalEventEnables);
            reader.ReadBytes(_apm.Length).CopyTo(_apm);
            _smiEnable = reader.ReadUInt32() | FixedSmiEnable;
            _smiStatus = reader.ReadUInt32();
            _locked = (Config.GetUInt16(ConfigLock) & SmiLock) != 0;
        }
        _powerManagement?.LoadState(reader);
        Place();
        UpdateRoutes();
    }

    private void OnWireChanged(int wire, bool high)
    {
        lock (_routing)
        {
            _wires[wire] = high;
            UpdateRoute(wire);
        }
    }

    private void UpdateRoutes()
    {
        lock (_routing)
        {
            for (var wire = 0; wire < PciHost.InterruptWires; wire++)
            {
                UpdateRoute(wire);
            }
        }
    }

    // "PIRQ[n]_ROUT": the wires lead to the IOAPIC in any case, and to these interrupts of the PC/AT if they are enabled.
    private void UpdateRoute(int wire)
    {
        var route = Config.GetByte(FirstRoute + wire);
        var irq = route & RouteInterrupt;
        var target = (route & RouteDisabled) == 0 && (RoutableInterrupts >> irq & 1) != 0 ? irq : 0;
        if (_targets[wire] != target)
        {
            _isaLines[wire, _targets[wire]].Set(false);
            _targets[wire] = target;
        }
        if (target != 0)
        {
            _isaLines[wire, target].Set(_wires[wire]);
        }
    }

    private void Place()
    {
        var wanted = (Config.GetByte(AcpiControl) & AcpiEnable) != 0 ? (ushort)(Config.GetUInt32(PmBase) & PmBaseMask) : (ushort)0;
        if (wanted == (PowerManagementAddress ?? 0))
        {
            return;
        }
        _registration?.Dispose();
        _registration = wanted != 0 ? _machine!.Ports.TryMap(_block, wanted, PmPortCount) : null;
        PowerManagementAddress = _registration is null ? null : wanted;
    }

    private void ReadBlock(int offset, Span<byte> data)
    {
        Span<byte> block = stackalloc byte[PmPortCount];
        block.Clear();
        _powerManagement?.Read(0, block[..AcpiPm.PortCount]);
        lock (_lock)
        {
            _generalEventEnables.CopyTo(block[GeneralEventEnables..]);
            BinaryPrimitives.WriteUInt32LittleEndian(block[SmiEnable..], _smiEnable);
            BinaryPrimitives.WriteUInt32LittleEndian(block[SmiStatus..], _smiStatus);
        }
        block.Slice(offset, data.Length).CopyTo(data);
    }

    private void WriteBlock(int offset, ReadOnlySpan<byte> data)
    {
        if (offset < AcpiPm.PortCount)
        {
            _powerManagement?.Write((ulong)offset, data);
            return;
        }
        lock (_lock)
        {
            for (var i = 0; i < data.Length; i++)
            {
                var at = offset + i;
                if (at is >= GeneralEventEnables and < GeneralEventEnables + 8)
                {
                    _generalEventEnables[at - GeneralEventEnables] = data[i];
                }
                else if (at is >= SmiEnable and < SmiEnable + 4)
                {
                    var shift = 8 * (at - SmiEnable);
                    _smiEnable = (_smiEnable & ~(0xffu << shift)) | (uint)data[i] << shift | FixedSmiEnable;
                }
                else if (at is >= SmiStatus and < SmiStatus + 4)
                {
                    _smiStatus &= ~((uint)data[i] << (8 * (at - SmiStatus))); // write one to clear
                }
            }
        }
    }

    // No general-purpose event ever happens here, so their status reads 0.
    private sealed class PmBlock(LpcBridge bridge) : IIoDevice
    {
        public int MaxAccessSize => 4;

        public void Read(ulong offset, Span<byte> data) => bridge.ReadBlock((int)offset, data);

        public void Write(ulong offset, ReadOnlySpan<byte> data) => bridge.WriteBlock((int)offset, data);
    }

    // A write of a command interrupts the processor that writes it. Virtual chipsets ask for APMC_EN only, and firmware sets
    // no more.
    private void WriteApm(ulong offset, byte value)
    {
        lock (_lock)
        {
            _apm[offset] = value;
            if (offset != 0 || (_smiEnable & ~FixedSmiEnable & ApmEnable) == 0)
            {
                return;
            }
            _smiStatus |= ApmStatus;
        }
        var vcpus = _machine!.Vcpus;
        (vcpus.FirstOrDefault(v => v.IsCurrentThread) ?? vcpus.FirstOrDefault())?.InjectSmi();
    }

    // Two latches: a command and a status that firmware and operating system pass each other.
    private sealed class ApmPorts(LpcBridge bridge) : IIoDevice
    {
        public int MaxAccessSize => 1;

        public void Read(ulong offset, Span<byte> data)
        {
            lock (bridge._lock)
            {
                data[0] = bridge._apm[offset];
            }
        }

        public void Write(ulong offset, ReadOnlySpan<byte> data) => bridge.WriteApm(offset, data[0]);
    }
}
