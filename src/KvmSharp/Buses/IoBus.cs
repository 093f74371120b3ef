using System.Runtime.CompilerServices;

namespace KvmSharp;

/// <summary>
/// The map from ports (or from guest-physical addresses) to devices. Lookups take no lock; mapping and unmapping are
/// allowed at any time from any thread.
/// </summary>
public sealed class IoBus
{
    private readonly Lock _lock = new();
    private readonly ulong _lastAddress;
    private Mapping[] _mappings = []; // sorted by first address; replaced as a whole, never changed

    /// <summary>Creates an empty bus.</summary>
    /// <param name="name">What error messages call it, for example <c>port</c>.</param>
    /// <param name="lastAddress">The highest address that exists on it.</param>
    public IoBus(string name, ulong lastAddress)
    {
        Name = name;
        _lastAddress = lastAddress;
    }

    /// <summary>What error messages call the bus.</summary>
    public string Name { get; }

    /// <summary>The mapped devices by ascending address. A device that is mapped twice is there twice.</summary>
    public IEnumerable<(ulong Address, ulong Length, IIoDevice Device)> Mappings =>
        Volatile.Read(ref _mappings).Select(m => (m.First, m.Last - m.First + 1, m.Device));

    /// <summary>Maps a device.</summary>
    /// <param name="device">The device.</param>
    /// <param name="address">The first address.</param>
    /// <param name="length">The length in bytes, at least 1.</param>
    /// <returns>A registration; disposing it unmaps the device. An access under way may still reach it then.</returns>
    /// <exception cref="KvmSharpException">The range overlaps another device or leaves the bus.</exception>
    public IDisposable Map(IIoDevice device, ulong address, ulong length)
    {
        ArgumentNullException.ThrowIfNull(device);
        ArgumentOutOfRangeException.ThrowIfZero(length);
        if (device.MaxAccessSize is not (1 or 2 or 4 or 8))
        {
            throw new KvmSharpException(KvmSharpErrorCode.InvalidArgument, "A device's widest access is 1, 2, 4 or 8 bytes.");
        }
        if (address > _lastAddress || length - 1 > _lastAddress - address)
        {
            throw new KvmSharpException(KvmSharpErrorCode.InvalidArgument,
                $"The {Name} range 0x{address:x} + 0x{length:x} ends beyond 0x{_lastAddress:x}.");
        }
        var mapping = new Mapping(address, address + (length - 1), device);
        lock (_lock)
        {
            if (FindOverlap(mapping) is { } other)
            {
                throw new KvmSharpException(KvmSharpErrorCode.Overlap,
                    $"The {Name} range 0x{mapping.First:x}-0x{mapping.Last:x} overlaps 0x{other.First:x}-0x{other.Last:x} of {other.Device.GetType().Name}.");
            }
            Insert(mapping);
        }
        return new Registration(this, mapping);
    }

    /// <summary>Maps a device where a guest wants it; null when the range is taken or leaves the bus.</summary>
    internal IDisposable? TryMap(IIoDevice device, ulong address, ulong length)
    {
        if (address > _lastAddress || length - 1 > _lastAddress - address)
        {
            return null;
        }
        var mapping = new Mapping(address, address + (length - 1), device);
        lock (_lock)
        {
            if (FindOverlap(mapping) is not null)
            {
                return null;
            }
            Insert(mapping);
        }
        return new Registration(this, mapping);
    }

    /// <summary>The guest reads from the bus. Bytes that no device answers become all ones.</summary>
    /// <param name="address">The first address.</param>
    /// <param name="data">Where the value goes.</param>
    /// <returns>Whether a device answered at least one byte.</returns>
    public bool Read(ulong address, Span<byte> data)
    {
        data.Fill(0xff);
        var mapping = Find(address);
        if (mapping is not null && mapping.Holds(address, data.Length))
        {
            mapping.Device.Read(address - mapping.First, data);
            return true;
        }
        return ReadPieces(address, data);
    }

    /// <summary>The guest writes to the bus. Bytes that no device takes are lost.</summary>
    /// <param name="address">The first address.</param>
    /// <param name="data">The value.</param>
    /// <returns>Whether a device took at least one byte.</returns>
    public bool Write(ulong address, ReadOnlySpan<byte> data)
    {
        var mapping = Find(address);
        if (mapping is not null && mapping.Holds(address, data.Length))
        {
            mapping.Device.Write(address - mapping.First, data);
            return true;
        }
        return WritePieces(address, data);
    }

    // Accesses that are wider than the device or that leave it.
    private bool ReadPieces(ulong address, Span<byte> data)
    {
        var answered = false;
        while (!data.IsEmpty && address <= _lastAddress)
        {
            var mapping = Find(address);
            var length = PieceLength(mapping, address, data.Length);
            if (mapping is not null)
            {
                mapping.Device.Read(address - mapping.First, data[..length]);
                answered = true;
            }
            data = data[length..];
            if (!Advance(ref address, length))
            {
                break;
            }
        }
        return answered;
    }

    private bool WritePieces(ulong address, ReadOnlySpan<byte> data)
    {
        var answered = false;
        while (!data.IsEmpty && address <= _lastAddress)
        {
            var mapping = Find(address);
            var length = PieceLength(mapping, address, data.Length);
            if (mapping is not null)
            {
                mapping.Device.Write(address - mapping.First, data[..length]);
                answered = true;
            }
            data = data[length..];
            if (!Advance(ref address, length))
            {
                break;
            }
        }
        return answered;
    }

    private static bool Advance(ref ulong address, int length)
    {
        var next = unchecked(address + (ulong)length);
        var advanced = next > address;
        address = next;
        return advanced;
    }

    private static int PieceLength(Mapping? mapping, ulong address, int wanted)
    {
        if (mapping is null)
        {
            return 1;
        }
        var offset = address - mapping.First;
        var size = (ulong)mapping.MaxAccessSize;
        var length = Math.Min((ulong)wanted, size - (offset & (size - 1)));
        return (int)Math.Min(length - 1, mapping.Last - address) + 1;
    }

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private Mapping? Find(ulong address)
    {
        var mappings = Volatile.Read(ref _mappings);
        int low = 0, high = mappings.Length - 1;
        while (low <= high)
        {
            var middle = (low + high) >> 1;
            var mapping = mappings[middle];
            if (address < mapping.First)
            {
                high = middle - 1;
            }
            else if (address > mapping.Last)
            {
                low = middle + 1;
            }
            else
            {
                return mapping;
            }
        }
        return null;
    }

    private Mapping? FindOverlap(Mapping mapping) =>
        Array.Find(_mappings, other => other.First <= mapping.Last && mapping.First <= other.Last);

    // Keeps the order of addresses. Under the lock.
    private void Insert(Mapping mapping)
    {
        var index = 0;
        while (index < _mappings.Length && _mappings[index].First < mapping.First)
        {
            index++;
        }
        Volatile.Write(ref _mappings, [.. _mappings[..index], mapping, .. _mappings[index..]]);
    }

    private void Unmap(Mapping mapping)
    {
        lock (_lock)
        {
            Volatile.Write(ref _mappings, [.. _mappings.Where(m => !ReferenceEquals(m, mapping))]);
        }
    }

    private sealed class Mapping(ulong first, ulong last, IIoDevice device)
    {
        public ulong First { get; } = first;

        public ulong Last { get; } = last;

        public IIoDevice Device { get; } = device;

        public int MaxAccessSize { get; } = device.MaxAccessSize;

        // One call suffices: the access lies within the device and is no wider than the device takes.
        public bool Holds(ulong address, int length) => length <= MaxAccessSize && (ulong)length - 1 <= Last - address;
    }

    private sealed class Registration(IoBus bus, Mapping mapping) : IDisposable
    {
        public void Dispose() => bus.Unmap(mapping);
    }
}
