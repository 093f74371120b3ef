using System.Buffers.Binary;
using System.Text;

namespace KvmSharp.Devices;

/// <summary>A named file in the firmware configuration device.</summary>
/// <param name="Name">1 to <see cref="FwCfg.MaxFileNameLength"/> printable ASCII characters; those of users begin with <c>opt/</c>.</param>
/// <param name="Content">What the guest reads; not copied.</param>
public sealed record FwCfgFile(string Name, ReadOnlyMemory<byte> Content);

/// <summary>
/// The firmware configuration device: numbered items and named files that the host gives to firmware and kernels. It has the
/// ports 0x510 and 0x511 and the DMA interface at 0x514. Specification: QEMU's "QEMU Firmware Configuration (fw_cfg) Device".
/// Items are added before the machine starts; then any thread may access the registers.
/// </summary>
public sealed partial class FwCfg : IIoDevice, IDeviceState
{
    /// <summary>The usual first port.</summary>
    public const ulong BasePort = 0x510;

    /// <summary>How many ports the device takes.</summary>
    public const int PortCount = 12;

    /// <summary>The longest name of a file, in ASCII characters.</summary>
    public const int MaxFileNameLength = 55;

    /// <summary>The most files.</summary>
    public const int MaxFileCount = 0x1000;

    private const int DmaChunk = 1 << 16;

    // Configuration
    private readonly Dictionary<ushort, ReadOnlyMemory<byte>> _items = [];
    private readonly SortedDictionary<string, ReadOnlyMemory<byte>> _files = new(StringComparer.Ordinal);

    // Wiring
    private readonly Lock _lock = new();
    private readonly GuestMemory _memory;

    // State
    private ushort _key;
    private uint _offset; // in the selected item
    private uint _dmaAddressHigh;

    /// <summary>Creates the device with the items that every machine has.</summary>
    /// <param name="memory">Where DMA goes.</param>
    /// <param name="memorySize">RAM in bytes.</param>
    /// <param name="processorCount">The number of processors, 1 to 65535; APIC ids are below it.</param>
    public FwCfg(GuestMemory memory, ulong memorySize, int processorCount)
    {
        ArgumentNullException.ThrowIfNull(memory);
        ArgumentOutOfRangeException.ThrowIfLessThan(processorCount, 1);
        ArgumentOutOfRangeException.ThrowIfGreaterThan(processorCount, ushort.MaxValue);
        _memory = memory;
        AddItem(SignatureKey, "QEMU"u8.ToArray());
        AddItem(IdKey, BitConverter.GetBytes(TraditionalInterface | DmaInterface));
        AddItem(RamSizeKey, BitConverter.GetBytes(memorySize));
        AddItem(ProcessorCountKey, BitConverter.GetBytes((ushort)processorCount));
        AddItem(MaxProcessorsKey, BitConverter.GetBytes((ushort)processorCount));
        NumberFiles();
    }

    /// <inheritdoc/>
    public int MaxAccessSize => 8;

    /// <inheritdoc/>
    public string StateName => "fw-cfg";

    /// <summary>The names of the files, in the order of the directory.</summary>
    public IReadOnlyList<string> FileNames => [.. _files.Keys];

    /// <summary>Adds an item. Before the machine starts.</summary>
    /// <param name="key">Its number: below 0x20 but not the file directory, or from 0x8000 to 0xBFFF.</param>
    /// <param name="content">What the guest reads; not copied.</param>
    /// <exception cref="ArgumentException">The number is not one of an item, or it is taken.</exception>
    public void AddItem(ushort key, ReadOnlyMemory<byte> content)
    {
        if (key is FileDirectoryKey or (>= FirstFileKey and < ArchitectureLocal) or >= (ArchitectureLocal | EndOfKeys) || !_items.TryAdd(key, content))
        {
            throw new ArgumentException($"0x{key:x} is not the number of an item that can be added.", nameof(key));
        }
    }

    /// <summary>Adds a named file. Before the machine starts.</summary>
    /// <param name="name">1 to <see cref="MaxFileNameLength"/> printable ASCII characters; those of users begin with <c>opt/</c>.</param>
    /// <param name="content">What the guest reads; not copied.</param>
    /// <exception cref="ArgumentException">The name is invalid or taken, or there are <see cref="MaxFileCount"/> files.</exception>
    public void AddFile(string name, ReadOnlyMemory<byte> content)
    {
        CheckFileName(name);
        if (_files.Count >= MaxFileCount)
        {
            throw new ArgumentException($"There are {MaxFileCount} files already.", nameof(name));
        }
        if (!_files.TryAdd(name, content))
        {
            throw new ArgumentException($"There is a file '{name}' already.", nameof(name));
        }
        NumberFiles();
    }

    /// <inheritdoc/>
    public void Read(ulong offset, Span<byte> data)
    {
        lock (_lock)
        {
            if (offset == DataRegister && data.Length == 1)
            {
                Take(data);
            }
            else if (offset >= DmaAddressHigh)
            {
                // "Reading the DMA address register gives the signature": "QEMU CFG", most significant byte first.
                "QEMU CFG"u8.Slice((int)(offset - DmaAddressHigh), data.Length).CopyTo(data);
            }
            else
            {
                data.Clear();
            }
        }
    }

    /// <inheritdoc/>
    public void Write(ulong offset, ReadOnlySpan<byte> data)
    {
        lock (_lock)
        {
            switch (offset, data.Length)
            {
                case (SelectorRegister, 2):
                    Select(BinaryPrimitives.ReadUInt16LittleEndian(data));
                    break;
                case (DmaAddressHigh, 4):
                    _dmaAddressHigh = BinaryPrimitives.ReadUInt32BigEndian(data);
                    break;
                case (DmaAddressHigh, 8):
                    Transfer(BinaryPrimitives.ReadUInt64BigEndian(data));
                    break;
                case (DmaAddressLow, 4):
                    var address = ((ulong)_dmaAddressHigh << 32) | BinaryPrimitives.ReadUInt32BigEndian(data);
                    _dmaAddressHigh = 0;
                    Transfer(address);
                    break;
                default: // "Writes to the data register are ignored."
                    break;
            }
        }
    }

    /// <inheritdoc/>
    public void SaveState(StateWriter writer)
    {
        ArgumentNullException.ThrowIfNull(writer);
        lock (_lock)
        {
            writer.WriteUInt16(_key);
            writer.WriteUInt32(_offset);
            writer.WriteUInt32(_dmaAddressHigh);
        }
    }

    /// <inheritdoc/>
    public void LoadState(StateReader reader)
    {
        ArgumentNullException.ThrowIfNull(reader);
        lock (_lock)
        {
            _key = reader.ReadUInt16();
            _offset = reader.ReadUInt32();
            _dmaAddressHigh = reader.ReadUInt32();
        }
    }

    internal static void CheckFileName(string name)
    {
        ArgumentNullException.ThrowIfNull(name);
        if (name.Length is 0 or > MaxFileNameLength || name.Any(c => c is <= ' ' or > '~'))
        {
            throw new ArgumentException($"'{name}' is not a file name of 1 to {MaxFileNameLength} printable ASCII characters.", nameof(name));
        }
    }

    // Files are numbered in the order of their names, so that the same files have the same numbers.
    private void NumberFiles()
    {
        var directory = new byte[DirectoryHeaderLength + DirectoryEntryLength * _files.Count];
        BinaryPrimitives.WriteUInt32BigEndian(directory, (uint)_files.Count);
        var entry = directory.AsSpan(DirectoryHeaderLength);
        var key = FirstFileKey;
        foreach (var (name, content) in _files)
        {
            BinaryPrimitives.WriteUInt32BigEndian(entry, (uint)content.Length);
            BinaryPrimitives.WriteUInt16BigEndian(entry[4..], key);
            Encoding.ASCII.GetBytes(name, entry[DirectoryNameOffset..]);
            entry = entry[DirectoryEntryLength..];
            _items[key++] = content;
        }
        _items[FileDirectoryKey] = directory;
    }

    private void Select(ushort key)
    {
        _key = (ushort)(key & ~EndOfKeys);
        _offset = 0;
    }

    // "Reading beyond the end of an item, or an item that is not there, gives zeros."
    private void Take(Span<byte> data)
    {
        var rest = Rest;
        var count = Math.Min(rest.Length, data.Length);
        rest[..count].CopyTo(data);
        data[count..].Clear();
        Skip((uint)data.Length);
    }

    private ReadOnlySpan<byte> Rest =>
        _items.TryGetValue(_key, out var item) && _offset < (uint)item.Length ? item.Span[(int)_offset..] : [];

    private void Skip(uint count) => _offset = (uint)Math.Min((ulong)_offset + count, uint.MaxValue);

    // "struct FWCfgDmaAccess" in guest memory says what to do; its control field is cleared when all is done.
    private void Transfer(ulong address)
    {
        Span<byte> access = stackalloc byte[DmaAccessLength];
        if (!_memory.TryRead(address, access))
        {
            return; // there is no place for an error either
        }
        var control = BinaryPrimitives.ReadUInt32BigEndian(access);
        var length = BinaryPrimitives.ReadUInt32BigEndian(access[4..]);
        var target = BinaryPrimitives.ReadUInt64BigEndian(access[8..]);
        var operation = (DmaControl)control & (DmaControl.Read | DmaControl.Write | DmaControl.Skip);
        if (((DmaControl)control & DmaControl.Select) != 0)
        {
            Select((ushort)(control >> 16));
        }
        var done = operation switch
        {
            // "If both are set, reading wins": the bits are looked at in the order read, write, skip.
            _ when (operation & DmaControl.Read) != 0 => CopyOut(target, length),
            _ when (operation & DmaControl.Write) != 0 => false, // no item can be written to
            _ => SkipAll(length, operation),
        };
        Span<byte> result = stackalloc byte[4];
        BinaryPrimitives.WriteUInt32BigEndian(result, done ? 0u : (uint)DmaControl.Error);
        _memory.TryWrite(address, result);
    }

    private bool SkipAll(uint length, DmaControl operation)
    {
        if (operation == DmaControl.Skip)
        {
            Skip(length);
        }
        return true;
    }

    private bool CopyOut(ulong target, uint length)
    {
        if (target > ulong.MaxValue - length || !_memory.IsBacked(target, length))
        {
            return false;
        }
        var chunk = new byte[Math.Min(length, DmaChunk)];
        while (length != 0)
        {
            var part = chunk.AsSpan(0, (int)Math.Min(length, (uint)chunk.Length));
            Take(part);
            if (!_memory.TryWrite(target, part))
            {
                return false;
            }
            target += (uint)part.Length;
            length -= (uint)part.Length;
        }
        return true;
    }
}
