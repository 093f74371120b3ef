using System.Buffers.Binary;
using KvmSharp.Devices.Pci;
using static KvmSharp.Devices.Virtio.VirtioPciRegisters;

namespace KvmSharp.Devices.Virtio;

/// <summary>
/// A virtio device as a PCI function: modern registers only, one interrupt vector for each queue and one for configuration
/// changes. All queues share one notification address. Specification: VIRTIO 1.2, "Virtio Over PCI Bus".
/// </summary>
internal sealed class VirtioPciTransport : PciDevice, IVirtioTransport
{
    private const int MsixBar = 1;
    private const int RegisterBar = 4;
    private const int CommonOffset = 0x0000;
    private const int IsrOffset = 0x1000;
    private const int DeviceOffset = 0x2000;
    private const int NotifyOffset = 0x3000;
    private const int PartLength = 0x1000;
    private const int RegisterLength = 0x4000;

    // Wiring
    private readonly VirtioDevice _device;
    private readonly Registers _registers;
    private readonly Lock _isrLock = new();
    private readonly int _accessCapability;

    // State
    private readonly ushort[] _queueVectors;
    private uint _deviceFeatureSelect;
    private uint _driverFeatureSelect;
    private ushort _configVector = NoVector;
    private ushort _queueSelect;
    private byte _isr;

    public VirtioPciTransport(VirtioDevice device)
        : base(new PciIdentity(VendorId, (ushort)(FirstDeviceId + device.Kind), device.PciClass, Revision, VendorId, SubsystemId))
    {
        _device = device;
        _queueVectors = new ushort[device.Queues.Count];
        Array.Fill(_queueVectors, NoVector);
        _registers = new Registers(this);
        AddInterruptPin();
        AddMsix(MsixBar, device.Queues.Count + 1);
        AddMemoryBar(RegisterBar, RegisterLength, _registers, is64Bit: true, prefetchable: true);
        AddRange(CommonConfig, CommonOffset, CommonLength, CapabilityLength);
        AddRange(IsrConfig, IsrOffset, PartLength, CapabilityLength);
        if (device.ConfigLength > 0)
        {
            AddRange(DeviceConfig, DeviceOffset, PartLength, CapabilityLength);
        }
        AddRange(NotifyConfig, NotifyOffset, PartLength, CapabilityLength + 4); // the multiplier stays 0
        _accessCapability = AddRange(PciConfigAccess, 0, 0, CapabilityLength + 4);
        Config.DefineByte(_accessCapability + CapabilityBar, 0, 0xff);
        Config.DefineUInt32(_accessCapability + CapabilityOffset, 0, ~0u);
        Config.DefineUInt32(_accessCapability + CapabilityRangeLength, 0, ~0u);
        Config.DefineUInt32(_accessCapability + AccessData, 0, ~0u);
    }

    public override string StateName => _device.StateName;

    private int Queue => _queueSelect;

    public void SignalQueue(int queue)
    {
        if (UsesMessages)
        {
            SignalVector(Volatile.Read(ref _queueVectors[queue]));
        }
        else
        {
            RaiseIsr(IsrQueue);
        }
    }

    public void SignalConfigChange()
    {
        if (UsesMessages)
        {
            SignalVector(Volatile.Read(ref _configVector));
        }
        else
        {
            RaiseIsr(IsrConfigChange);
        }
    }

    protected override void OnAttached(VirtualMachine machine) => _device.Attach(machine, this);

    protected override void OnBarMoved(int bar, ulong? address)
    {
        if (bar == RegisterBar)
        {
            _device.AttachDoorbell(address + NotifyOffset);
        }
    }

    // "PCI configuration access capability": the data field is a window into the registers.
    protected override void OnConfigRead(int offset, int length)
    {
        if (TouchesWindow(offset, length) && Window() is var (target, count))
        {
            Span<byte> data = stackalloc byte[4];
            data.Clear();
            _registers.Read(target, data[..count]);
            Config.SetUInt32(_accessCapability + AccessData, BinaryPrimitives.ReadUInt32LittleEndian(data));
        }
    }

    protected override void OnConfigWritten(int offset, int length)
    {
        if (TouchesWindow(offset, length) && Window() is var (target, count))
        {
            Span<byte> data = stackalloc byte[4];
            BinaryPrimitives.WriteUInt32LittleEndian(data, Config.GetUInt32(_accessCapability + AccessData));
            _registers.Write(target, data[..count]);
        }
    }

    protected override void SaveDeviceState(StateWriter writer)
    {
        writer.WriteUInt32(_deviceFeatureSelect);
        writer.WriteUInt32(_driverFeatureSelect);
        writer.WriteUInt16(_configVector);
        writer.WriteUInt16(_queueSelect);
        writer.WriteByte(_isr);
        foreach (var vector in _queueVectors)
        {
            writer.WriteUInt16(vector);
        }
        _device.Save(writer);
    }

    protected override void LoadDeviceState(StateReader reader)
    {
        _deviceFeatureSelect = reader.ReadUInt32();
        _driverFeatureSelect = reader.ReadUInt32();
        _configVector = CheckVector(reader.ReadUInt16());
        _queueSelect = reader.ReadUInt16();
        _isr = (byte)(reader.ReadByte() & (IsrQueue | IsrConfigChange));
        for (var i = 0; i < _queueVectors.Length; i++)
        {
            _queueVectors[i] = CheckVector(reader.ReadUInt16());
        }
        _device.Load(reader);
    }

    private int AddRange(byte type, uint offset, uint length, int capabilityLength)
    {
        var at = Config.AddCapability(PciRegisters.CapabilityVendor, capabilityLength);
        Config.DefineByte(at + 2, (byte)capabilityLength);
        Config.DefineByte(at + CapabilityType, type);
        Config.DefineByte(at + CapabilityBar, RegisterBar);
        Config.DefineUInt32(at + CapabilityOffset, offset);
        Config.DefineUInt32(at + CapabilityRangeLength, length);
        return at;
    }

    private bool TouchesWindow(int offset, int length) =>
        offset < _accessCapability + AccessData + 4 && _accessCapability + AccessData < offset + length;

    private (ulong Target, int Count)? Window()
    {
        var length = Config.GetUInt32(_accessCapability + CapabilityRangeLength);
        var offset = Config.GetUInt32(_accessCapability + CapabilityOffset);
        var valid = Config.GetByte(_accessCapability + CapabilityBar) == RegisterBar && length is 1 or 2 or 4
            && offset % length == 0 && offset <= RegisterLength - length;
        return valid ? (offset, (int)length) : null;
    }

    private void SignalVector(ushort vector)
    {
        if (vector != NoVector)
        {
            SignalInterrupt(vector);
        }
    }

    private void RaiseIsr(byte cause)
    {
        lock (_isrLock)
        {
            _isr |= cause;
            SetInterruptLevel(true);
        }
    }

    // "ISR status capability": reading clears it and takes the interrupt back.
    private byte TakeIsr()
    {
        lock (_isrLock)
        {
            var isr = _isr;
            _isr = 0;
            SetInterruptLevel(false);
            return isr;
        }
    }

    // A vector that does not exist reads back as "none", by which the driver sees the failure.
    private ushort CheckVector(ushort vector) => vector <= _queueVectors.Length ? vector : NoVector;

    private void ReadCommon(int offset, Span<byte> data)
    {
        Span<byte> image = stackalloc byte[CommonLength + 8];
        image.Clear();
        void U16(Span<byte> target, int at, int value) => BinaryPrimitives.WriteUInt16LittleEndian(target[at..], (ushort)value);
        BinaryPrimitives.WriteUInt32LittleEndian(image[DeviceFeatureSelect..], _deviceFeatureSelect);
        BinaryPrimitives.WriteUInt32LittleEndian(image[DeviceFeature..], FeatureHalf(_device.OfferedFeatures, _deviceFeatureSelect));
        BinaryPrimitives.WriteUInt32LittleEndian(image[DriverFeatureSelect..], _driverFeatureSelect);
        BinaryPrimitives.WriteUInt32LittleEndian(image[DriverFeature..], FeatureHalf(_device.DriverFeatures, _driverFeatureSelect));
        U16(image, ConfigVector, _configVector);
        U16(image, QueueCount, _device.Queues.Count);
        image[DeviceStatus] = (byte)_device.Status;
        image[ConfigGeneration] = _device.ConfigGeneration;
        U16(image, QueueSelect, _queueSelect);
        if (_queueSelect < _device.Queues.Count)
        {
            var queue = _device.Queues[_queueSelect];
            U16(image, QueueSize, queue.Size);
            U16(image, QueueVector, _queueVectors[_queueSelect]);
            U16(image, QueueEnable, queue.IsReady ? 1 : 0);
            BinaryPrimitives.WriteUInt64LittleEndian(image[QueueDescriptors..], queue.Descriptors);
            BinaryPrimitives.WriteUInt64LittleEndian(image[QueueDriver..], queue.Available);
            BinaryPrimitives.WriteUInt64LittleEndian(image[QueueDevice..], queue.Used);
        }
        if (offset < CommonLength)
        {
            image.Slice(offset, data.Length).CopyTo(data);
        }
    }

    private void WriteCommon(int offset, ReadOnlySpan<byte> data)
    {
        if (data.Length == 8 && offset is QueueDescriptors or QueueDriver or QueueDevice)
        {
            WriteCommon(offset, data[..4]);
            WriteCommon(offset + 4, data[4..]);
            return;
        }
        var value = data.Length switch
        {
            1 => data[0],
            2 => BinaryPrimitives.ReadUInt16LittleEndian(data),
            4 => BinaryPrimitives.ReadUInt32LittleEndian(data),
            _ => 0u,
        };
        switch (offset, data.Length)
        {
            case (DeviceFeatureSelect, 4):
                _deviceFeatureSelect = value;
                break;
            case (DriverFeatureSelect, 4):
                _driverFeatureSelect = value;
                break;
            case (DriverFeature, 4) when _driverFeatureSelect < 2:
                var shift = 32 * (int)_driverFeatureSelect;
                _device.SetDriverFeatures(0xffff_ffffUL << shift, (ulong)value << shift);
                break;
            case (ConfigVector, 2):
                Volatile.Write(ref _configVector, CheckVector((ushort)value));
                break;
            case (DeviceStatus, 1):
                WriteStatus((byte)value);
                break;
            case (QueueSelect, 2):
                _queueSelect = (ushort)value;
                break;
            case (QueueSize, 2):
                _device.ChangeQueue(Queue, q => q.SetSize((int)value));
                break;
            case (QueueVector, 2) when _queueSelect < _queueVectors.Length:
                Volatile.Write(ref _queueVectors[_queueSelect], CheckVector((ushort)value));
                break;
            case (QueueEnable, 2) when value == 1:
                _device.ChangeQueue(Queue, q => q.Enable());
                break;
            case (QueueDescriptors or QueueDescriptors + 4, 4):
                _device.ChangeQueue(Queue, q => q.SetDescriptors(VirtioMmioTransport.Half(q.Descriptors, offset != QueueDescriptors, value)));
                break;
            case (QueueDriver or QueueDriver + 4, 4):
                _device.ChangeQueue(Queue, q => q.SetAvailable(VirtioMmioTransport.Half(q.Available, offset != QueueDriver, value)));
                break;
            case (QueueDevice or QueueDevice + 4, 4):
                _device.ChangeQueue(Queue, q => q.SetUsed(VirtioMmioTransport.Half(q.Used, offset != QueueDevice, value)));
                break;
            default:
                break; // read-only, reserved, or not of the field's width
        }
    }

    private void WriteStatus(byte value)
    {
        _device.SetStatus((VirtioStatus)value);
        if (value == 0)
        {
            Array.Fill(_queueVectors, NoVector);
            _configVector = NoVector;
            TakeIsr();
        }
    }

    private static uint FeatureHalf(ulong features, uint select) => select < 2 ? (uint)(features >> (32 * (int)select)) : 0;

    private sealed class Registers(VirtioPciTransport transport) : IIoDevice
    {
        public void Read(ulong offset, Span<byte> data)
        {
            data.Clear();
            var part = (int)offset & ~(PartLength - 1);
            var within = (int)offset & (PartLength - 1);
            switch (part)
            {
                case CommonOffset:
                    transport.ReadCommon(within, data);
                    break;
                case IsrOffset when within == 0:
                    data[0] = transport.TakeIsr();
                    break;
                case DeviceOffset:
                    transport._device.ReadConfig((ulong)within, data);
                    break;
                default:
                    break;
            }
        }

        public void Write(ulong offset, ReadOnlySpan<byte> data)
        {
            var part = (int)offset & ~(PartLength - 1);
            var within = (int)offset & (PartLength - 1);
            switch (part)
            {
                case CommonOffset:
                    transport.WriteCommon(within, data);
                    break;
                case DeviceOffset:
                    transport._device.WriteConfig((ulong)within, data);
                    break;
                case NotifyOffset:
                    transport._device.Notify(); // usually the doorbell has taken it
                    break;
                default:
                    break;
            }
        }
    }
}
