using System.Buffers.Binary;
using System.Text;
using KvmSharp.Storage;
using static KvmSharp.Devices.Ide.IdeRegisters;

namespace KvmSharp.Devices.Ide;

/// <summary>
/// A CD-ROM drive. Specification: ATA/ATAPI-7, "PACKET Command feature set"; INCITS MMC-6 and SPC-4 for the commands.
/// </summary>
internal sealed class IdeCdRom(IdeCdRomOptions options) : IdeDrive
{
    private const int SectorSize = 2048;
    private const int PacketLength = 12;
    private const int MaxResponse = 1 << 16;

    // Sense keys and additional codes: SPC-4 "Sense data".
    private const byte NotReady = 2;
    private const byte MediumError = 3;
    private const byte IllegalRequest = 5;
    private const byte UnitAttention = 6;
    private const ushort NoMedium = 0x3a00;
    private const ushort MediumChanged = 0x2800;
    private const ushort InvalidCommand = 0x2000;
    private const ushort OutOfRange = 0x2100;
    private const ushort InvalidField = 0x2400;
    private const ushort ReadFailed = 0x1100;

    private IBlockBackend? _medium = options.Medium;
    private bool _mediumGone; // since the command under way began
    private byte[] _response = [];
    private long _position = -1; // in the medium; -1 while a response is read
    private int _responsePosition;
    private bool _useDma;
    private bool _isPacket; // of the command under way: packets tell their state in the registers
    private byte _senseKey;
    private ushort _senseCode;
    private bool _changed;
    private bool _eventPending;

    private enum Operation : byte
    {
        TestUnitReady = 0x00,
        RequestSense = 0x03,
        Inquiry = 0x12,
        ModeSense6 = 0x1a,
        StartStop = 0x1b,
        PreventRemoval = 0x1e,
        ReadCapacity = 0x25,
        Read10 = 0x28,
        Seek = 0x2b,
        ReadToc = 0x43,
        GetConfiguration = 0x46,
        GetEvent = 0x4a,
        ReadDiscInformation = 0x51,
        ModeSense10 = 0x5a,
        Read12 = 0xa8,
        SetSpeed = 0xbb,
        MechanismStatus = 0xbd,
        ReadCd = 0xbe,
    }

    private long SectorsOfMedium => _medium is { } medium ? (medium.Length + SectorSize - 1) / SectorSize : 0;

    public IBlockBackend? Medium => _medium;

    /// <summary>Exchanges the disc.</summary>
    public void Insert(IBlockBackend? medium)
    {
        _mediumGone = true;
        _medium = medium;
        _changed = medium is not null;
        _eventPending = true;
    }

    public override void Reset()
    {
        base.Reset();
        _senseKey = 0;
        _senseCode = 0;
        StatusBits = Status.None; // "a packet device ... DRDY cleared to zero"
    }

    public override void Execute(Command command)
    {
        switch (command)
        {
            case Command.Packet:
                _useDma = (Features[0] & 1) != 0;
                _isPacket = true;
                Count[0] = ReasonCommand;
                StartPacket(PacketLength);
                break;
            case Command.IdentifyPacket:
                _isPacket = false;
                _response = Identification();
                _responsePosition = 0;
                _position = -1;
                BlockSize = _response.Length;
                StartPioIn(_response.Length);
                break;
            case Command.Identify or Command.ReadSectors:
                SetSignature(); // so that hosts can tell what this is
                Fail(Error.Aborted);
                break;
            case Command.DeviceReset:
                Reset();
                break;
            case Command.CheckPowerMode:
                Count[0] = 0xff;
                Complete();
                break;
            case Command.SetFeatures when Features[0] == 3:
            case Command.IdleImmediate or Command.StandbyImmediate or Command.Standby or Command.Idle or Command.Sleep:
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
        writer.WriteUInt32((uint)_response.Length);
        writer.WriteBytes(_response);
        writer.WriteInt64(_position);
        writer.WriteUInt32((uint)_responsePosition);
        writer.WriteBoolean(_useDma);
        writer.WriteBoolean(_isPacket);
        writer.WriteByte(_senseKey);
        writer.WriteUInt16(_senseCode);
        writer.WriteBoolean(_changed);
        writer.WriteBoolean(_eventPending);
    }

    public override void Load(StateReader reader)
    {
        base.Load(reader);
        var length = reader.ReadUInt32();
        if (length > MaxResponse)
        {
            throw Damaged();
        }
        _response = reader.ReadBytes((int)length).ToArray();
        _position = reader.ReadInt64();
        _responsePosition = (int)reader.ReadUInt32();
        _useDma = reader.ReadBoolean();
        _isPacket = reader.ReadBoolean();
        _senseKey = reader.ReadByte();
        _senseCode = reader.ReadUInt16();
        _changed = reader.ReadBoolean();
        _eventPending = reader.ReadBoolean();
        if (_position < -1 || _responsePosition < 0 || _responsePosition > _response.Length)
        {
            throw Damaged();
        }
        _mediumGone = _medium is null;
    }

    protected override void SetSignature()
    {
        Count[0] = Low[0] = 1;
        Mid[0] = 0x14;
        High[0] = 0xeb;
    }

    protected override bool ProduceStream(Span<byte> data)
    {
        if (_position < 0)
        {
            var count = Math.Min(data.Length, _response.Length - _responsePosition);
            _response.AsSpan(_responsePosition, count).CopyTo(data);
            data[count..].Clear();
            _responsePosition += count;
            return true;
        }
        if (_mediumGone)
        {
            Check(NotReady, NoMedium);
            return false;
        }
        try
        {
            // Blocks need not be whole sectors of the backend.
            var start = _position & ~(SectorSize - 1L);
            var sectors = new byte[(_position + data.Length - start + SectorSize - 1) & ~(SectorSize - 1L)];
            BlockRange.ReadOrZero(_medium!, start, sectors);
            sectors.AsSpan((int)(_position - start), data.Length).CopyTo(data);
            _position += data.Length;
            return true;
        }
        catch (StorageException)
        {
            Check(MediumError, ReadFailed);
            return false;
        }
    }

    protected override bool ConsumeStream(ReadOnlySpan<byte> data)
    {
        Fail(Error.Aborted); // no command takes data
        return false;
    }

    protected override void OnBlockIn(int length)
    {
        if (!_isPacket)
        {
            return;
        }
        Count[0] = ReasonToHost;
        Mid[0] = (byte)length;
        High[0] = (byte)(length >> 8);
    }

    // "PACKET": the status comes with an interrupt of its own.
    protected override void OnStreamRead()
    {
        if (!_isPacket)
        {
            return;
        }
        Count[0] = ReasonToHost | ReasonCommand;
        InterruptPending = true;
    }

    protected override void ExecutePacket(ReadOnlySpan<byte> packet)
    {
        var operation = (Operation)packet[0];
        var allocation = BinaryPrimitives.ReadUInt16BigEndian(packet[7..]);
        if (_changed && operation is not (Operation.Inquiry or Operation.RequestSense or Operation.GetEvent or Operation.GetConfiguration))
        {
            _changed = false;
            Check(UnitAttention, MediumChanged);
            return;
        }
        if (_medium is null && operation is Operation.TestUnitReady or Operation.ReadCapacity or Operation.Read10 or Operation.Read12
            or Operation.ReadCd or Operation.ReadToc or Operation.Seek or Operation.ReadDiscInformation)
        {
            Check(NotReady, NoMedium);
            return;
        }
        switch (operation)
        {
            case Operation.TestUnitReady or Operation.PreventRemoval or Operation.Seek or Operation.SetSpeed:
                Succeed();
                break;
            case Operation.StartStop:
                StartStop(packet[4]);
                break;
            case Operation.RequestSense:
                RespondSense(packet[4]);
                break;
            case Operation.Inquiry:
                Respond(Inquiry(), BinaryPrimitives.ReadUInt16BigEndian(packet[3..]));
                break;
            case Operation.ReadCapacity:
                var capacity = new byte[8];
                BinaryPrimitives.WriteUInt32BigEndian(capacity, (uint)(SectorsOfMedium - 1));
                BinaryPrimitives.WriteUInt32BigEndian(capacity.AsSpan(4), SectorSize);
                Respond(capacity, capacity.Length);
                break;
            case Operation.Read10:
                ReadSectors(BinaryPrimitives.ReadUInt32BigEndian(packet[2..]), allocation);
                break;
            case Operation.Read12:
                ReadSectors(BinaryPrimitives.ReadUInt32BigEndian(packet[2..]), BinaryPrimitives.ReadUInt32BigEndian(packet[6..]));
                break;
            case Operation.ReadCd when (packet[9] & 0xf8) == 0x10:
                ReadSectors(BinaryPrimitives.ReadUInt32BigEndian(packet[2..]), (uint)(packet[6] << 16 | packet[7] << 8 | packet[8]));
                break;
            case Operation.ReadToc:
                ReadToc((packet[1] & 2) != 0, packet[2] & 0x0f | packet[9] >> 6, packet[6], allocation);
                break;
            case Operation.ModeSense6:
                ModeSense(packet[2], packet[4], 4);
                break;
            case Operation.ModeSense10:
                ModeSense(packet[2], allocation, 8);
                break;
            case Operation.GetConfiguration:
                Respond(Configuration(), allocation);
                break;
            case Operation.GetEvent:
                GetEvent((packet[1] & 1) != 0, packet[4], allocation);
                break;
            case Operation.ReadDiscInformation:
                Respond(DiscInformation(), allocation);
                break;
            case Operation.MechanismStatus:
                Respond(new byte[8], BinaryPrimitives.ReadUInt16BigEndian(packet[8..]));
                break;
            case Operation.ReadCd:
                Check(IllegalRequest, InvalidField);
                break;
            default:
                Check(IllegalRequest, InvalidCommand);
                break;
        }
    }

    protected override void Fail(Error error)
    {
        base.Fail(error);
        Count[0] = ReasonToHost | ReasonCommand;
    }

    private void Succeed()
    {
        Complete();
        Count[0] = ReasonToHost | ReasonCommand;
    }

    // "CHECK CONDITION": the sense key is in the error register too.
    private void Check(byte key, ushort code)
    {
        _senseKey = key;
        _senseCode = code;
        Fail((Error)(key << 4) | Error.Aborted);
    }

    private void RespondSense(byte length)
    {
        var sense = new byte[18];
        sense[0] = 0x70; // current, fixed format
        sense[2] = _senseKey;
        sense[7] = 10;
        sense[12] = (byte)(_senseCode >> 8);
        sense[13] = (byte)_senseCode;
        if (_changed && _senseKey == 0)
        {
            _changed = false;
            sense[2] = UnitAttention;
            sense[12] = MediumChanged >> 8;
        }
        _senseKey = 0;
        _senseCode = 0;
        Respond(sense, length);
    }

    // A guest that ejects gets an empty drive.
    private void StartStop(byte flags)
    {
        const byte Load = 1 << 1;
        const byte Start = 1 << 0;
        if ((flags & Load) != 0 && (flags & Start) == 0 && _medium is not null)
        {
            _medium = null;
            _eventPending = true;
        }
        Succeed();
    }

    private void ReadSectors(uint first, uint count)
    {
        if (first > SectorsOfMedium || count > SectorsOfMedium - first)
        {
            Check(IllegalRequest, OutOfRange);
        }
        else if (count == 0)
        {
            Succeed();
        }
        else
        {
            _mediumGone = false;
            _position = (long)first * SectorSize;
            StartStream((long)count * SectorSize);
        }
    }

    private void Respond(byte[] response, int allocation)
    {
        _response = response;
        _responsePosition = 0;
        _position = -1;
        var length = Math.Min(response.Length, allocation);
        if (length == 0)
        {
            Succeed();
        }
        else
        {
            StartStream(length);
        }
    }

    private void StartStream(long length)
    {
        if (_useDma)
        {
            StartDma(length, toMemory: true);
            return;
        }
        // "Byte Count": at most so many bytes a block; odd limits round down.
        var limit = Mid[0] | High[0] << 8;
        limit = limit is 0 or 0xffff ? 0xfffe : limit & ~1;
        BlockSize = Math.Max(limit, 2);
        StartPioIn(length);
    }

    private static byte[] Inquiry()
    {
        const byte CdRom = 5;
        var data = new byte[36];
        data[0] = CdRom;
        data[1] = 0x80; // removable
        data[3] = 0x21; // ATAPI
        data[4] = (byte)(data.Length - 5);
        Encoding.ASCII.GetBytes("KvmSharp").CopyTo(data, 8);
        Encoding.ASCII.GetBytes("CD-ROM          ").CopyTo(data, 16);
        Encoding.ASCII.GetBytes("1   ").CopyTo(data, 32);
        return data;
    }

    // MMC-6 "READ TOC/PMA/ATIP Command": one data track and the lead-out.
    private void ReadToc(bool inMinutes, int format, byte track, int allocation)
    {
        const byte LeadOut = 0xaa;
        const byte DataTrack = 0x14;
        byte[] Address(long sector)
        {
            var frames = sector + 150;
            return inMinutes
                ? [0, (byte)(frames / 4500), (byte)(frames / 75 % 60), (byte)(frames % 75)]
                : [(byte)(sector >> 24), (byte)(sector >> 16), (byte)(sector >> 8), (byte)sector];
        }

        switch (format)
        {
            case 0 when track is 0 or 1 or LeadOut:
                byte[] first = track <= 1 ? [0, DataTrack, 1, 0, .. Address(0)] : [];
                byte[] toc = [0, 0, 1, 1, .. first, 0, DataTrack, LeadOut, 0, .. Address(SectorsOfMedium)];
                toc[1] = (byte)(toc.Length - 2);
                Respond(toc, allocation);
                break;
            case 1: // sessions
                Respond([0, 10, 1, 1, 0, DataTrack, 1, 0, .. Address(0)], allocation);
                break;
            case 2: // full
                byte[] full =
                [
                    0, 0, 1, 1,
                    1, DataTrack, 0, 0xa0, 0, 0, 0, 0, 1, 0, 0,
                    1, DataTrack, 0, 0xa1, 0, 0, 0, 0, 1, 0, 0,
                    1, DataTrack, 0, 0xa2, 0, 0, 0, .. Address(SectorsOfMedium),
                    1, DataTrack, 0, 1, 0, 0, 0, .. Address(0),
                ];
                full[1] = (byte)(full.Length - 2);
                Respond(full, allocation);
                break;
            default:
                Check(IllegalRequest, InvalidField);
                break;
        }
    }

    private void ModeSense(byte page, int allocation, int headerLength)
    {
        const byte ErrorRecovery = 0x01;
        const byte Capabilities = 0x2a;
        const byte All = 0x3f;
        var body = new List<byte>();
        if ((page & All) is ErrorRecovery or All)
        {
            body.AddRange([ErrorRecovery, 6, 0, 5, 0, 0, 0, 0]);
        }
        if ((page & All) is Capabilities or All)
        {
            // Reads CD-R, CD-RW, DVD-ROM; mode 2; tray, can lock and eject.
            body.AddRange([Capabilities, 18, 0x0b, 0, 0x70, 0, 0x29, 0, 0x02, 0xc2, 0, 2, 2, 0, 0x02, 0xc2, 0, 0, 0, 0]);
        }
        if (body.Count == 0)
        {
            Check(IllegalRequest, InvalidField);
            return;
        }
        var header = new byte[headerLength];
        var length = headerLength + body.Count;
        if (headerLength == 8)
        {
            BinaryPrimitives.WriteUInt16BigEndian(header, (ushort)(length - 2));
        }
        else
        {
            header[0] = (byte)(length - 1);
        }
        Respond([.. header, .. body], allocation);
    }

    // MMC-6 "GET CONFIGURATION Command": profiles CD-ROM and DVD-ROM, core, removable medium.
    private byte[] Configuration()
    {
        const ushort CdRom = 8;
        const ushort DvdRom = 0x10;
        const long CdSectors = 80 * 60 * 75;
        var current = _medium is null ? (ushort)0 : SectorsOfMedium > CdSectors ? DvdRom : CdRom;
        byte[] data =
        [
            0, 0, 0, 0, 0, 0, 0, (byte)current,
            0, 0, 3, 8, 0, (byte)DvdRom, (byte)(current == DvdRom ? 1 : 0), 0, 0, (byte)CdRom, (byte)(current == CdRom ? 1 : 0), 0,
            0, 1, 0x0b, 8, 0, 0, 0, 2, 1, 0, 0, 0,
            0, 3, 3, 4, 0x29, 0, 0, 0,
        ];
        BinaryPrimitives.WriteUInt32BigEndian(data, (uint)(data.Length - 4));
        return data;
    }

    // MMC-6 "GET EVENT STATUS NOTIFICATION Command": only polled, only about the medium.
    private void GetEvent(bool polled, byte classes, int allocation)
    {
        const byte Media = 4;
        const byte NewMedia = 2;
        const byte Removed = 3;
        if (!polled)
        {
            Check(IllegalRequest, InvalidField);
            return;
        }
        if ((classes & 1 << Media) == 0)
        {
            Respond([0, 2, 0x80, 1 << Media], allocation); // "No Event Available"
            return;
        }
        var code = !_eventPending ? (byte)0 : _medium is null ? Removed : NewMedia;
        _eventPending = false;
        Respond([0, 6, Media, 1 << Media, code, (byte)(_medium is null ? 0 : 2), 0, 0], allocation);
    }

    private static byte[] DiscInformation()
    {
        var data = new byte[34];
        data[1] = 32;
        data[2] = 0x0e; // complete
        data[3] = data[4] = data[5] = data[6] = 1;
        data[7] = 0x20;
        return data;
    }

    // "IDENTIFY PACKET DEVICE"
    private byte[] Identification()
    {
        var words = new ushort[256];
        words[0] = 0x85c0; // CD-ROM, removable, packets of 12 bytes, DRQ at once
        IdeText.Fill(words, 10, 10, options.SerialNumber);
        IdeText.Fill(words, 23, 4, "1");
        IdeText.Fill(words, 27, 20, "KvmSharp CD-ROM");
        words[49] = 1 << 9 | 1 << 8;
        words[53] = 3;
        words[63] = 0x0407;
        words[64] = 3;
        words[65] = words[66] = words[67] = words[68] = 120;
        words[80] = 0xf0;
        words[82] = 1 << 14 | 1 << 9 | 1 << 4; // NOP, DEVICE RESET, PACKET
        words[83] = words[84] = 1 << 14;
        words[85] = words[82];
        words[87] = 1 << 14;
        var data = new byte[512];
        IdeText.Copy(words, data);
        return data;
    }
}
