using System.Buffers.Binary;
using static KvmSharp.Devices.Virtio.VirtioMmioRegisters;

namespace KvmSharp.Devices.Virtio;

/// <summary>
/// A virtio device behind memory-mapped registers without a bus. Specification: VIRTIO 1.2, "Virtio Over MMIO".
/// </summary>
internal sealed class VirtioMmioTransport : IIoDevice, IDeviceState, IVirtioTransport
{
    /// <summary>The length of the registers in bytes.</summary>
    public const ulong Length = 0x200;

    private const byte UsedBuffer = 1 << 0;
    private const byte ConfigChange = 1 << 1;

    // Wiring
    private readonly VirtioDevice _device;
    private readonly InterruptLine _interrupt;
    private readonly Lock _interruptLock = new();

    // State
    private uint _deviceFeaturesSelect;
    private uint _driverFeaturesSelect;
    private uint _queueSelect;
    private byte _interruptStatus;

    public VirtioMmioTransport(VirtualMachine machine, VirtioDevice device, ulong address, InterruptLine interrupt)
    {
        _device = device;
        _interrupt = interrupt;
        device.Attach(machine, this);
        machine.Mmio.Map(this, address, Length);
        device.AttachDoorbell(address + QueueNotify);
    }

    public int MaxAccessSize => 4;

    public string StateName => _device.StateName;

    private int Queue => (int)Math.Min(_queueSelect, int.MaxValue);

    public void Read(ulong offset, Span<byte> data)
    {
        if (offset >= Config)
        {
            _device.ReadConfig(offset - Config, data);
            return;
        }
        // "Driver Requirements: MMIO Device Register Layout": control registers take aligned accesses of 32 bits.
        data.Clear();
        if (data.Length == 4)
        {
            BinaryPrimitives.WriteUInt32LittleEndian(data, ReadRegister((int)offset));
        }
    }

    public void Write(ulong offset, ReadOnlySpan<byte> data)
    {
        if (offset >= Config)
        {
            _device.WriteConfig(offset - Config, data);
        }
        else if (offset == QueueNotify)
        {
            _device.Notify(); // usually the doorbell has taken it
        }
        else if (data.Length == 4)
        {
            WriteRegister((int)offset, BinaryPrimitives.ReadUInt32LittleEndian(data));
        }
    }

    public void SignalQueue(int queue) => Raise(UsedBuffer);

    public void SignalConfigChange() => Raise(ConfigChange);

    public void SaveState(StateWriter writer)
    {
        writer.WriteUInt32(_deviceFeaturesSelect);
        writer.WriteUInt32(_driverFeaturesSelect);
        writer.WriteUInt32(_queueSelect);
        writer.WriteByte(_interruptStatus);
        _device.Save(writer);
    }

    public void LoadState(StateReader reader)
    {
        _deviceFeaturesSelect = reader.ReadUInt32();
        _driverFeaturesSelect = reader.ReadUInt32();
        _queueSelect = reader.ReadUInt32();
        lock (_interruptLock)
        {
            _interruptStatus = (byte)(reader.ReadByte() & (UsedBuffer | ConfigChange));
            _interrupt.Set(_interruptStatus != 0);
        }
        _device.Load(reader);
    }

    private uint ReadRegister(int offset)
    {
        switch (offset)
        {
            case Magic:
                return MagicValue;
            case VirtioMmioRegisters.Version:
                return VersionValue;
            case DeviceId:
                return (uint)_device.Kind;
            case VendorId:
                return VendorValue;
            case DeviceFeatures:
                return _deviceFeaturesSelect < 2 ? (uint)(_device.OfferedFeatures >> (32 * (int)_deviceFeaturesSelect)) : 0;
            case QueueSizeMax:
                return _device.ReadQueue(Queue, q => (uint)q.MaxSize, 0u);
            case QueueReady:
                return _device.ReadQueue(Queue, q => q.IsReady ? 1u : 0u, 0u);
            case InterruptStatus:
                lock (_interruptLock)
                {
                    return _interruptStatus;
                }
            case VirtioMmioRegisters.Status:
                return (uint)_device.Status;
            case >= SharedMemoryLengthLow and <= SharedMemoryBaseHigh:
                return uint.MaxValue; // there is no shared memory
            case VirtioMmioRegisters.ConfigGeneration:
                return _device.ConfigGeneration;
            default:
                return 0;
        }
    }

    private void WriteRegister(int offset, uint value)
    {
        switch (offset)
        {
            case DeviceFeaturesSelect:
                _deviceFeaturesSelect = value;
                break;
            case DriverFeaturesSelect:
                _driverFeaturesSelect = value;
                break;
            case VirtioMmioRegisters.DriverFeatures:
                if (_driverFeaturesSelect < 2)
                {
                    var shift = 32 * (int)_driverFeaturesSelect;
                    _device.SetDriverFeatures(0xffff_ffffUL << shift, (ulong)value << shift);
                }
                break;
            case QueueSelect:
                _queueSelect = value;
                break;
            case QueueSize:
                _device.ChangeQueue(Queue, q => q.SetSize((int)Math.Min(value, 0x10000)));
                break;
            case QueueReady:
                _device.ChangeQueue(Queue, q =>
                {
                    if (value == 1)
                    {
                        q.Enable();
                    }
                    else
                    {
                        q.Disable();
                    }
                });
                break;
            case InterruptAcknowledge:
                lock (_interruptLock)
                {
                    _interruptStatus &= (byte)~value;
                    _interrupt.Set(_interruptStatus != 0);
                }
                break;
            case VirtioMmioRegisters.Status:
                _device.SetStatus((VirtioStatus)value);
                if (value == 0)
                {
                    Reset();
                }
                break;
            case QueueDescriptorsLow or QueueDescriptorsHigh:
                _device.ChangeQueue(Queue, q => q.SetDescriptors(Half(q.Descriptors, offset == QueueDescriptorsHigh, value)));
                break;
            case QueueDriverLow or QueueDriverHigh:
                _device.ChangeQueue(Queue, q => q.SetAvailable(Half(q.Available, offset == QueueDriverHigh, value)));
                break;
            case QueueDeviceLow or QueueDeviceHigh:
                _device.ChangeQueue(Queue, q => q.SetUsed(Half(q.Used, offset == QueueDeviceHigh, value)));
                break;
            default:
                break;
        }
    }

    internal static ulong Half(ulong old, bool high, uint value) =>
        high ? (old & 0xffff_ffff) | (ulong)value << 32 : (old & ~0xffff_ffffUL) | value;

    private void Raise(byte cause)
    {
        lock (_interruptLock)
        {
            _interruptStatus |= cause;
            _interrupt.Set(true);
        }
    }

    private void Reset()
    {
        lock (_interruptLock)
        {
            _interruptStatus = 0;
            _interrupt.Set(false);
        }
    }
}
