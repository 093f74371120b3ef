using System.Buffers.Binary;
using System.Text;
using KvmSharp.Storage;
using static KvmSharp.Devices.Ide.IdeRegisters;

namespace KvmSharp.Devices.Ide;

/// <summary>An IDE disk. Specification: ATA/ATAPI-7, "General feature set", "48-bit Address feature set".</summary>
internal sealed class IdeDisk(IdeDiskOptions options) : IdeDrive
{
    private const int SectorSize = 512;
    private const byte MaxMultiple = 16;
    private const int DefaultHeads = 16;
    private const int DefaultSectors = 63;
    private const long MaxCylinders = 16383;
    private const long Limit28 = 1 << 28;

    private readonly IBlockBackend _backend = options.Backend;
    private readonly long _sectorCount = options.Backend.Length / SectorSize;
    private long _sector;
    private byte _multiple;
    private byte _heads = DefaultHeads;
    private byte _sectorsPerTrack = DefaultSectors;

    private bool IsReadOnly => options.ReadOnly || _backend.IsReadOnly;

    private long Cylinders => Math.Min(_sectorCount / (DefaultHeads * DefaultSectors), MaxCylinders);

    public override void Reset()
    {
        base.Reset();
        _multiple = 0;
        StatusBits = Status.Ready | Status.SeekComplete;
    }

    public override void Execute(Command command)
    {
        switch (command)
        {
            case Command.ReadSectors or Command.ReadSectorsOnce or Command.ReadSectorsExt:
                StartRead(1, command == Command.ReadSectorsExt);
                break;
            case Command.ReadMultiple or Command.ReadMultipleExt:
                StartRead(_multiple, command == Command.ReadMultipleExt);
                break;
            case Command.WriteSectors or Command.WriteSectorsOnce or Command.WriteSectorsExt:
                StartWrite(1, command == Command.WriteSectorsExt);
                break;
            case Command.WriteMultiple or Command.WriteMultipleExt:
                StartWrite(_multiple, command == Command.WriteMultipleExt);
                break;
            case Command.ReadDma or Command.ReadDmaOnce or Command.ReadDmaExt:
                StartDisk(command == Command.ReadDmaExt, false, length => StartDma(length, toMemory: true));
                break;
            case Command.WriteDma or Command.WriteDmaOnce or Command.WriteDmaExt:
                StartDisk(command == Command.WriteDmaExt, true, length => StartDma(length, toMemory: false));
                break;
            case Command.Verify or Command.VerifyOnce or Command.VerifyExt:
                StartDisk(command == Command.VerifyExt, false, _ => Complete());
                break;
            case Command.Identify:
                BlockSize = SectorSize;
                _sector = -1; // the identification is what is read
                StartPioIn(SectorSize);
                break;
            case Command.SetMultiple when Count[0] is 0 or 1 or 2 or 4 or 8 or MaxMultiple:
                _multiple = Count[0];
                Complete();
                break;
            case Command.InitializeParameters when Count[0] != 0:
                _sectorsPerTrack = Count[0];
                _heads = (byte)((DeviceRegister & 0x0f) + 1);
                Complete();
                break;
            case Command.FlushCache or Command.FlushCacheExt:
                Try(Error.Aborted, () =>
                {
                    _backend.Flush();
                    Complete();
                });
                break;
            case Command.SetFeatures:
                SetFeatures();
                break;
            case Command.CheckPowerMode:
                Count[0] = 0xff; // always awake
                Complete();
                break;
            case Command.Recalibrate or Command.Seek or Command.StandbyImmediate or Command.IdleImmediate or Command.Standby
                or Command.Idle or Command.Sleep:
                Complete();
                break;
            default:
                Fail(Error.Aborted);
                break;
        }
    }

    public override void Save(StateWriter writer)
    {
        base.Save(writer);
        writer.WriteInt64(_sector);
        writer.WriteByte(_multiple);
        writer.WriteByte(_heads);
        writer.WriteByte(_sectorsPerTrack);
    }

    public override void Load(StateReader reader)
    {
        base.Load(reader);
        _sector = reader.ReadInt64();
        _multiple = reader.ReadByte();
        _heads = reader.ReadByte();
        _sectorsPerTrack = reader.ReadByte();
        if (_sector < -1 || _sector > _sectorCount || _multiple > MaxMultiple || _heads == 0 || _sectorsPerTrack == 0)
        {
            throw Damaged();
        }
    }

    protected override void SetSignature()
    {
        Count[0] = Low[0] = 1;
        Mid[0] = High[0] = 0;
    }

    protected override bool ProduceStream(Span<byte> data)
    {
        if (_sector < 0)
        {
            FillIdentification(data);
            return true;
        }
        try
        {
            _backend.Read(_sector * SectorSize, data);
            _sector += data.Length / SectorSize;
            return true;
        }
        catch (StorageException)
        {
            Fail(Error.Uncorrectable);
            return false;
        }
    }

    protected override bool ConsumeStream(ReadOnlySpan<byte> data)
    {
        try
        {
            _backend.Write(_sector * SectorSize, data);
            _sector += data.Length / SectorSize;
            return true;
        }
        catch (StorageException)
        {
            Fail(Error.Aborted);
            return false;
        }
    }

    protected override void ExecutePacket(ReadOnlySpan<byte> packet) => Fail(Error.Aborted);

    private void StartRead(int sectorsPerBlock, bool is48Bit)
    {
        if (sectorsPerBlock == 0)
        {
            Fail(Error.Aborted); // SET MULTIPLE MODE has to come first
            return;
        }
        BlockSize = sectorsPerBlock * SectorSize;
        StartDisk(is48Bit, false, StartPioIn);
    }

    private void StartWrite(int sectorsPerBlock, bool is48Bit)
    {
        if (sectorsPerBlock == 0)
        {
            Fail(Error.Aborted);
            return;
        }
        BlockSize = sectorsPerBlock * SectorSize;
        StartDisk(is48Bit, true, StartPioOut);
    }

    private void StartDisk(bool is48Bit, bool isWrite, Action<long> start)
    {
        var count = is48Bit ? Count[0] | Count[1] << 8 : Count[0];
        count = count != 0 ? count : is48Bit ? 1 << 16 : 1 << 8;
        if (isWrite && IsReadOnly)
        {
            Fail(Error.Aborted);
        }
        else if (Address(is48Bit) is not { } sector || sector >= _sectorCount || count > _sectorCount - sector)
        {
            Fail(Error.NotFound);
        }
        else
        {
            _sector = sector;
            start((long)count * SectorSize);
        }
    }

    private long? Address(bool is48Bit)
    {
        if (is48Bit)
        {
            return Low[0] | (long)Mid[0] << 8 | (long)High[0] << 16 | (long)Low[1] << 24 | (long)Mid[1] << 32 | (long)High[1] << 40;
        }
        if ((DeviceRegister & DeviceLba) != 0)
        {
            return Low[0] | Mid[0] << 8 | High[0] << 16 | (DeviceRegister & 0x0f) << 24;
        }
        var head = DeviceRegister & 0x0f;
        return Low[0] == 0 || Low[0] > _sectorsPerTrack || head >= _heads
            ? null
            : ((long)(Mid[0] | High[0] << 8) * _heads + head) * _sectorsPerTrack + Low[0] - 1;
    }

    private void SetFeatures()
    {
        const byte TransferMode = 0x03;
        const byte EnableWriteCache = 0x02;
        const byte DisableWriteCache = 0x82;
        const byte EnableReadAhead = 0xaa;
        const byte DisableReadAhead = 0x55;
        if (Features[0] is TransferMode or EnableWriteCache or EnableReadAhead or DisableReadAhead or DisableWriteCache)
        {
            Complete();
        }
        else
        {
            Fail(Error.Aborted);
        }
    }

    private void Try(Error error, Action action)
    {
        try
        {
            action();
        }
        catch (StorageException)
        {
            Fail(error);
        }
    }

    // "IDENTIFY DEVICE": numbers of words.
    private void FillIdentification(Span<byte> data)
    {
        var words = new ushort[256];
        words[0] = 1 << 6; // a fixed device
        words[1] = (ushort)Cylinders;
        words[3] = DefaultHeads;
        words[6] = DefaultSectors;
        IdeText.Fill(words, 10, 10, options.SerialNumber);
        IdeText.Fill(words, 23, 4, "1");
        IdeText.Fill(words, 27, 20, "KvmSharp Disk");
        words[47] = 0x8000 | MaxMultiple;
        words[49] = 1 << 9 | 1 << 8; // LBA, DMA
        words[50] = 1 << 14;
        words[51] = 0x200; // PIO mode 2
        words[53] = 7;
        words[54] = (ushort)Cylinders;
        words[55] = _heads;
        words[56] = _sectorsPerTrack;
        var old = (uint)Math.Min(_sectorCount, (long)words[54] * _heads * _sectorsPerTrack);
        words[57] = (ushort)old;
        words[58] = (ushort)(old >> 16);
        words[59] = (ushort)(_multiple != 0 ? 0x100 | _multiple : 0);
        var short28 = (uint)Math.Min(_sectorCount, Limit28 - 1);
        words[60] = (ushort)short28;
        words[61] = (ushort)(short28 >> 16);
        words[63] = 0x0407; // multiword DMA 0 to 2, the last one in use
        words[64] = 3; // PIO 3 and 4
        words[65] = words[66] = words[67] = words[68] = 120;
        words[80] = 0xf0; // ATA-4 to ATA-7
        words[82] = 1 << 14 | 1 << 5; // NOP, write cache
        words[83] = 1 << 14 | 1 << 13 | 1 << 12 | 1 << 10; // FLUSH CACHE (EXT), 48-bit addresses
        words[84] = 1 << 14;
        words[85] = words[82];
        words[86] = 1 << 13 | 1 << 12 | 1 << 10;
        words[87] = 1 << 14;
        for (var i = 0; i < 4; i++)
        {
            words[100 + i] = (ushort)(_sectorCount >> (16 * i));
        }
        IdeText.Copy(words, data);
    }
}

/// <summary>Texts in identifications: two characters a word, the first one in the high byte, filled up with blanks.</summary>
internal static class IdeText
{
    public static void Fill(ushort[] words, int start, int count, string text)
    {
        var bytes = Encoding.ASCII.GetBytes(text.PadRight(2 * count)[..(2 * count)]);
        for (var i = 0; i < count; i++)
        {
            words[start + i] = BinaryPrimitives.ReadUInt16BigEndian(bytes.AsSpan(2 * i));
        }
    }

    public static void Copy(ushort[] words, Span<byte> data)
    {
        for (var i = 0; i < words.Length && 2 * i + 1 < data.Length; i++)
        {
            BinaryPrimitives.WriteUInt16LittleEndian(data[(2 * i)..], words[i]);
        }
    }
}
