using System.Buffers.Binary;
using static KvmSharp.Devices.Ide.IdeRegisters;

namespace KvmSharp.Devices.Ide;

/// <summary>
/// One of the two cables of an IDE controller with up to two drives, and the half of the bus master that serves it. DMA is done
/// piece by piece on a thread of its own.
/// </summary>
internal sealed class IdeChannel
{
    private const int PieceSize = 1 << 16;

    // Wiring
    private readonly Lock _lock = new();
    private readonly IdeController _controller;
    private readonly InterruptLine _interrupt;
    private readonly IdeDrive?[] _drives;
    private readonly byte[] _piece = new byte[PieceSize];
    private Virtio.DeviceWorker? _worker;

    // State
    private int _selected;
    private byte _control;
    private byte _masterCommand;
    private byte _masterStatus;
    private uint _table;
    private uint _nextDescriptor;
    private uint _regionAddress;
    private uint _regionLeft;
    private bool _regionLast;

    public IdeChannel(IdeController controller, InterruptLine interrupt, IdeDrive? first, IdeDrive? second)
    {
        _controller = controller;
        _interrupt = interrupt;
        _drives = [first, second];
        foreach (var drive in _drives)
        {
            drive?.Reset();
        }
        CommandBlock = new CommandPorts(this);
        ControlBlock = new ControlPort(this);
    }

    public IIoDevice CommandBlock { get; }

    public IIoDevice ControlBlock { get; }

    private IdeDrive? Selected => _drives[_selected];

    public void Attach(VirtualMachine machine) => _worker = new Virtio.DeviceWorker(machine, Transfer);

    public void Detach() => _worker?.Dispose();

    public void Insert(IdeCdRom drive, Storage.IBlockBackend? medium)
    {
        lock (_lock)
        {
            drive.Insert(medium);
        }
    }

    public byte ReadMaster(int register)
    {
        lock (_lock)
        {
            return register switch
            {
                BusMasterCommand => _masterCommand,
                BusMasterStatus => _masterStatus,
                >= BusMasterTable => (byte)(_table >> (8 * (register - BusMasterTable))),
                _ => 0,
            };
        }
    }

    public void WriteMaster(int register, byte value)
    {
        var start = false;
        lock (_lock)
        {
            switch (register)
            {
                case BusMasterCommand:
                    start = (value & ~_masterCommand & BusMasterStart) != 0;
                    _masterCommand = (byte)(value & (BusMasterStart | BusMasterToMemory));
                    _masterStatus = (byte)(start ? _masterStatus | BusMasterActive : (value & BusMasterStart) == 0 ? _masterStatus & ~BusMasterActive : _masterStatus);
                    if (start)
                    {
                        _nextDescriptor = _table;
                        _regionLeft = 0;
                        _regionLast = false;
                    }
                    break;
                case BusMasterStatus:
                    _masterStatus = (byte)((_masterStatus & ~(value & (BusMasterError | BusMasterInterrupt)) & ~BusMasterCapable) | (value & BusMasterCapable));
                    break;
                case >= BusMasterTable:
                    var shift = 8 * (register - BusMasterTable);
                    _table = ((_table & ~(0xffu << shift)) | (uint)value << shift) & ~3u;
                    break;
                default:
                    break;
            }
        }
        if (start)
        {
            _worker?.Run();
        }
    }

    public void Save(StateWriter writer)
    {
        lock (_lock)
        {
            writer.WriteByte((byte)_selected);
            writer.WriteByte(_control);
            writer.WriteByte(_masterCommand);
            writer.WriteByte(_masterStatus);
            foreach (var value in (uint[])[_table, _nextDescriptor, _regionAddress, _regionLeft])
            {
                writer.WriteUInt32(value);
            }
            writer.WriteBoolean(_regionLast);
            foreach (var drive in _drives)
            {
                drive?.Save(writer);
            }
        }
    }

    public void Load(StateReader reader)
    {
        lock (_lock)
        {
            _selected = reader.ReadByte() & 1;
            _control = reader.ReadByte();
            _masterCommand = reader.ReadByte();
            _masterStatus = reader.ReadByte();
            _table = reader.ReadUInt32() & ~3u;
            _nextDescriptor = reader.ReadUInt32();
            _regionAddress = reader.ReadUInt32();
            _regionLeft = reader.ReadUInt32();
            _regionLast = reader.ReadBoolean();
            foreach (var drive in _drives)
            {
                drive?.Load(reader);
            }
            UpdateInterrupt();
        }
        _worker?.Restore(VmClock.Never); // a transfer may have been under way
    }

    private bool IsMasterReady => (_masterCommand & BusMasterStart) != 0 && (_masterStatus & BusMasterActive) != 0;

    private void Read(int register, Span<byte> data)
    {
        lock (_lock)
        {
            if (register == Data)
            {
                Selected?.ReadData(data);
            }
            else
            {
                for (var i = 0; i < data.Length; i++)
                {
                    data[i] = ReadOne(register + i);
                }
            }
            UpdateInterrupt();
        }
    }

    private byte ReadOne(int register)
    {
        if (Selected is not { } drive)
        {
            // The other drive, if there is one, answers for a missing second one: its status reads 0.
            return Array.Exists(_drives, d => d is not null) ? (byte)0 : (byte)0xff;
        }
        if (register == StatusCommand)
        {
            drive.InterruptPending = false;
            return (byte)drive.StatusBits;
        }
        return drive.ReadRegister(register, (_control & HighOrderByte) != 0);
    }

    private void Write(int register, ReadOnlySpan<byte> data)
    {
        bool dma;
        lock (_lock)
        {
            if (register == Data)
            {
                Selected?.WriteData(data);
            }
            else
            {
                for (var i = 0; i < data.Length; i++)
                {
                    WriteOne(register + i, data[i]);
                }
            }
            UpdateInterrupt();
            dma = Selected is { WaitsForDma: true } && IsMasterReady;
        }
        if (dma)
        {
            _worker?.Run();
        }
    }

    // Both drives hear everything but commands.
    private void WriteOne(int register, byte value)
    {
        if (register != StatusCommand)
        {
            _control &= unchecked((byte)~HighOrderByte);
            foreach (var drive in _drives)
            {
                drive?.WriteRegister(register, value);
            }
            if (register == Device)
            {
                _selected = (value & DeviceSecond) != 0 ? 1 : 0;
            }
            return;
        }
        var command = (Command)value;
        if (command == Command.ExecuteDiagnostic)
        {
            ResetDrives();
            if (_drives[0] is { } first)
            {
                first.InterruptPending = true;
            }
        }
        else if (Selected is { } drive && ((drive.StatusBits & Status.Busy) == 0 || command == Command.DeviceReset))
        {
            drive.InterruptPending = false;
            drive.Execute(command);
        }
    }

    private void WriteControl(byte value)
    {
        lock (_lock)
        {
            if ((value & ~_control & SoftwareReset) != 0)
            {
                ResetDrives();
            }
            _control = value;
            UpdateInterrupt();
        }
    }

    private byte ReadAlternateStatus()
    {
        lock (_lock)
        {
            return Selected is { } drive ? (byte)drive.StatusBits : Array.Exists(_drives, d => d is not null) ? (byte)0 : (byte)0xff;
        }
    }

    private void ResetDrives()
    {
        foreach (var drive in _drives)
        {
            drive?.Reset();
        }
        _selected = 0;
        _masterStatus &= unchecked((byte)~BusMasterActive);
    }

    private void UpdateInterrupt()
    {
        var asserted = Selected is { InterruptPending: true } && (_control & InterruptDisable) == 0;
        if (asserted && !_interrupt.IsHigh)
        {
            _masterStatus |= BusMasterInterrupt;
        }
        _interrupt.Set(asserted);
    }

    // On the worker's thread. The lock is let go of between pieces, so that the guest can look at the registers and reset.
    private void Transfer()
    {
        bool more;
        do
        {
            lock (_lock)
            {
                more = TransferPiece();
                UpdateInterrupt();
            }
        }
        while (more);
    }

    private bool TransferPiece()
    {
        if (!IsMasterReady || Selected is not { WaitsForDma: true } drive)
        {
            return false;
        }
        var length = (int)Math.Min(drive.DmaLeft, PieceSize);
        var piece = _piece.AsSpan(0, length);
        if (drive.IsDmaToMemory)
        {
            if (!drive.TakeForDma(piece) || !Move(piece, toMemory: true))
            {
                return StopMaster();
            }
        }
        else if (!Move(piece, toMemory: false) || !drive.GiveFromDma(piece))
        {
            return StopMaster();
        }
        if (drive.DmaLeft > 0)
        {
            return true;
        }
        drive.EndDma();
        // "Bus Master IDE Active": stays set when the table describes more than the drive had.
        if (_regionLast && _regionLeft == 0)
        {
            _masterStatus &= unchecked((byte)~BusMasterActive);
        }
        return false;
    }

    // Memory that is not there, or a table that is too short: the drive goes on waiting until it is reset.
    private bool StopMaster()
    {
        _masterStatus &= unchecked((byte)~BusMasterActive);
        return false;
    }

    private bool Move(Span<byte> data, bool toMemory)
    {
        while (!data.IsEmpty)
        {
            if (_regionLeft == 0 && !NextRegion())
            {
                return false;
            }
            var part = data[..(int)Math.Min((uint)data.Length, _regionLeft)];
            if (!(toMemory ? _controller.Write(_regionAddress, part) : _controller.Read(_regionAddress, part)))
            {
                _masterStatus |= BusMasterError;
                return false;
            }
            _regionAddress += (uint)part.Length;
            _regionLeft -= (uint)part.Length;
            data = data[part.Length..];
        }
        return true;
    }

    private bool NextRegion()
    {
        Span<byte> descriptor = stackalloc byte[DescriptorLength];
        if (_regionLast || !_controller.Read(_nextDescriptor, descriptor))
        {
            return false;
        }
        _nextDescriptor += DescriptorLength;
        _regionAddress = BinaryPrimitives.ReadUInt32LittleEndian(descriptor) & ~1u;
        var length = BinaryPrimitives.ReadUInt16LittleEndian(descriptor[4..]) & 0xfffeu;
        _regionLeft = length == 0 ? 1u << 16 : length;
        _regionLast = (BinaryPrimitives.ReadUInt16LittleEndian(descriptor[6..]) & DescriptorLast) != 0;
        return true;
    }

    private sealed class CommandPorts(IdeChannel channel) : IIoDevice
    {
        public int MaxAccessSize => 4;

        public void Read(ulong offset, Span<byte> data) => channel.Read((int)offset, data);

        public void Write(ulong offset, ReadOnlySpan<byte> data) => channel.Write((int)offset, data);
    }

    private sealed class ControlPort(IdeChannel channel) : IIoDevice
    {
        public int MaxAccessSize => 1;

        public void Read(ulong offset, Span<byte> data) => data[0] = channel.ReadAlternateStatus();

        public void Write(ulong offset, ReadOnlySpan<byte> data) => channel.WriteControl(data[0]);
    }
}
