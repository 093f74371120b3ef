using static KvmSharp.Devices.Ide.IdeRegisters;

namespace KvmSharp.Devices.Ide;

/// <summary>
/// What IDE disks and CD-ROM drives have in common: the task file and the data phase of a command, which is a stream of bytes
/// that goes through the data register in blocks or by bus-master DMA in pieces. All calls come under the channel's lock.
/// </summary>
internal abstract class IdeDrive
{
    private const int MaxBlock = 1 << 16;

    private readonly byte[] _block = new byte[MaxBlock];
    private int _blockPosition;
    private int _blockEnd;

    /// <summary>The two values last written to a register; commands with 48-bit addresses use both.</summary>
    protected byte[] Features { get; } = new byte[2];

    protected byte[] Count { get; } = new byte[2];

    protected byte[] Low { get; } = new byte[2];

    protected byte[] Mid { get; } = new byte[2];

    protected byte[] High { get; } = new byte[2];

    protected byte DeviceRegister { get; set; }

    protected Error ErrorBits { get; set; }

    protected Phase CurrentPhase { get; private set; }

    /// <summary>How many bytes of the data phase are still to be moved, those of the current block not counted.</summary>
    protected long StreamLeft { get; set; }

    /// <summary>The size of the blocks that go through the data register.</summary>
    protected int BlockSize { get; set; } = 512;

    public Status StatusBits { get; protected set; }

    /// <summary>Whether the drive wants an interrupt.</summary>
    public bool InterruptPending { get; set; }

    /// <summary>Whether the drive waits for the bus master.</summary>
    public bool WaitsForDma => CurrentPhase is Phase.DmaIn or Phase.DmaOut;

    public bool IsDmaToMemory => CurrentPhase == Phase.DmaIn;

    protected enum Phase : byte
    {
        None,
        PioIn,
        PioOut,
        Packet,
        DmaIn,
        DmaOut,
    }

    public void WriteRegister(int register, byte value)
    {
        var pair = register switch
        {
            ErrorFeatures => Features,
            SectorCount => Count,
            LbaLow => Low,
            LbaMid => Mid,
            LbaHigh => High,
            _ => null,
        };
        if (pair is not null)
        {
            pair[1] = pair[0];
            pair[0] = value;
        }
        else if (register == Device)
        {
            DeviceRegister = value;
        }
    }

    public byte ReadRegister(int register, bool highOrder)
    {
        var index = highOrder ? 1 : 0;
        return register switch
        {
            ErrorFeatures => (byte)ErrorBits,
            SectorCount => Count[index],
            LbaLow => Low[index],
            LbaMid => Mid[index],
            LbaHigh => High[index],
            _ => (byte)(DeviceRegister | DeviceAlwaysOne),
        };
    }

    /// <summary>The host reads the data register.</summary>
    public void ReadData(Span<byte> data)
    {
        data.Fill(0);
        if (CurrentPhase != Phase.PioIn)
        {
            return;
        }
        var count = Math.Min(data.Length, _blockEnd - _blockPosition);
        _block.AsSpan(_blockPosition, count).CopyTo(data);
        _blockPosition += count;
        if (_blockPosition == _blockEnd)
        {
            if (StreamLeft > 0)
            {
                NextBlockIn();
            }
            else
            {
                EndCommand();
            }
        }
    }

    /// <summary>The host writes the data register.</summary>
    public void WriteData(ReadOnlySpan<byte> data)
    {
        if (CurrentPhase is not (Phase.PioOut or Phase.Packet))
        {
            return;
        }
        var count = Math.Min(data.Length, _blockEnd - _blockPosition);
        data[..count].CopyTo(_block.AsSpan(_blockPosition));
        _blockPosition += count;
        if (_blockPosition != _blockEnd)
        {
            return;
        }
        var block = _block.AsSpan(0, _blockEnd);
        if (CurrentPhase == Phase.Packet)
        {
            SetPhase(Phase.None);
            ExecutePacket(block);
        }
        else if (ConsumeStream(block))
        {
            if (StreamLeft > 0)
            {
                NextBlockOut();
                InterruptPending = true;
            }
            else
            {
                Complete();
            }
        }
    }

    /// <summary>The bus master takes the next bytes of the data phase.</summary>
    /// <returns>Whether the command goes on; otherwise it has ended with an error.</returns>
    public bool TakeForDma(Span<byte> data)
    {
        StreamLeft -= data.Length;
        return ProduceStream(data);
    }

    /// <summary>The bus master delivers the next bytes of the data phase.</summary>
    /// <returns>Whether the command goes on; otherwise it has ended with an error.</returns>
    public bool GiveFromDma(ReadOnlySpan<byte> data)
    {
        StreamLeft -= data.Length;
        return ConsumeStream(data);
    }

    /// <summary>How many bytes the bus master has to move still.</summary>
    public long DmaLeft => WaitsForDma ? StreamLeft : 0;

    /// <summary>The bus master has moved everything.</summary>
    public void EndDma() => EndCommand();

    /// <summary>A reset by hardware, by the control register or by command: the registers tell what the drive is.</summary>
    public virtual void Reset()
    {
        SetPhase(Phase.None);
        StreamLeft = 0;
        InterruptPending = false;
        ErrorBits = (Error)DiagnosticPassed;
        DeviceRegister = 0;
        SetSignature();
    }

    public abstract void Execute(Command command);

    public virtual void Save(StateWriter writer)
    {
        foreach (var pair in (byte[][])[Features, Count, Low, Mid, High])
        {
            writer.WriteBytes(pair);
        }
        writer.WriteByte(DeviceRegister);
        writer.WriteByte((byte)ErrorBits);
        writer.WriteByte((byte)StatusBits);
        writer.WriteBoolean(InterruptPending);
        writer.WriteByte((byte)CurrentPhase);
        writer.WriteInt64(StreamLeft);
        writer.WriteUInt32((uint)BlockSize);
        writer.WriteUInt32((uint)_blockPosition);
        writer.WriteUInt32((uint)_blockEnd);
        writer.WriteBytes(_block.AsSpan(0, _blockEnd));
    }

    public virtual void Load(StateReader reader)
    {
        foreach (var pair in (byte[][])[Features, Count, Low, Mid, High])
        {
            reader.ReadBytes(2).CopyTo(pair);
        }
        DeviceRegister = reader.ReadByte();
        ErrorBits = (Error)reader.ReadByte();
        StatusBits = (Status)reader.ReadByte();
        InterruptPending = reader.ReadBoolean();
        CurrentPhase = (Phase)reader.ReadByte();
        StreamLeft = reader.ReadInt64();
        BlockSize = (int)reader.ReadUInt32();
        _blockPosition = (int)reader.ReadUInt32();
        _blockEnd = (int)reader.ReadUInt32();
        if (!Enum.IsDefined(CurrentPhase) || StreamLeft < 0 || BlockSize is < 2 or > MaxBlock || _blockEnd is < 0 or > MaxBlock
            || _blockPosition < 0 || _blockPosition > _blockEnd)
        {
            throw Damaged();
        }
        reader.ReadBytes(_blockEnd).CopyTo(_block);
    }

    protected static MachineStateException Damaged() => new("The saved state is damaged: an IDE drive is in an impossible state.");

    /// <summary>Fills the next bytes of data for the host. On a failure it ends the command with <see cref="Fail"/>.</summary>
    protected abstract bool ProduceStream(Span<byte> data);

    /// <summary>Takes the next bytes of data of the host. On a failure it ends the command with <see cref="Fail"/>.</summary>
    protected abstract bool ConsumeStream(ReadOnlySpan<byte> data);

    protected abstract void ExecutePacket(ReadOnlySpan<byte> packet);

    protected abstract void SetSignature();

    /// <summary>A block is about to go to the host through the data register.</summary>
    protected virtual void OnBlockIn(int length)
    {
    }

    /// <summary>The host has read everything.</summary>
    protected virtual void OnStreamRead()
    {
    }

    protected void StartPioIn(long length)
    {
        StreamLeft = length;
        SetPhase(Phase.PioIn);
        NextBlockIn();
    }

    protected void StartPioOut(long length)
    {
        StreamLeft = length;
        SetPhase(Phase.PioOut);
        NextBlockOut();
    }

    protected void StartPacket(int length)
    {
        SetPhase(Phase.Packet);
        (_blockPosition, _blockEnd) = (0, length);
        StatusBits = Status.Ready | Status.SeekComplete | Status.DataRequest;
    }

    protected void StartDma(long length, bool toMemory)
    {
        StreamLeft = length;
        SetPhase(toMemory ? Phase.DmaIn : Phase.DmaOut);
        StatusBits = Status.Ready | Status.SeekComplete | Status.DataRequest;
    }

    /// <summary>The command has done what it should.</summary>
    protected void Complete()
    {
        SetPhase(Phase.None);
        ErrorBits = Error.None;
        StatusBits = Status.Ready | Status.SeekComplete;
        InterruptPending = true;
    }

    /// <summary>The command ends with an error.</summary>
    protected virtual void Fail(Error error)
    {
        SetPhase(Phase.None);
        StreamLeft = 0;
        ErrorBits = error;
        StatusBits = Status.Ready | Status.SeekComplete | Status.Error;
        InterruptPending = true;
    }

    private void SetPhase(Phase phase)
    {
        CurrentPhase = phase;
        _blockPosition = _blockEnd = 0;
    }

    private void EndCommand()
    {
        var interrupt = CurrentPhase != Phase.PioIn; // "PIO data-in": the last block has had its interrupt
        Complete();
        InterruptPending = interrupt;
        OnStreamRead();
    }

    private void NextBlockIn()
    {
        var length = (int)Math.Min(Math.Min(StreamLeft, BlockSize), MaxBlock);
        StreamLeft -= length;
        (_blockPosition, _blockEnd) = (0, length);
        if (ProduceStream(_block.AsSpan(0, length)))
        {
            StatusBits = Status.Ready | Status.SeekComplete | Status.DataRequest;
            InterruptPending = true;
            OnBlockIn(length);
        }
    }

    private void NextBlockOut()
    {
        var length = (int)Math.Min(Math.Min(StreamLeft, BlockSize), MaxBlock);
        StreamLeft -= length;
        (_blockPosition, _blockEnd) = (0, length);
        StatusBits = Status.Ready | Status.SeekComplete | Status.DataRequest;
    }
}
