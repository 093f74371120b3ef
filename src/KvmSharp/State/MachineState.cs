using System.Buffers.Binary;
using System.Security.Cryptography;
using System.Text;

namespace KvmSharp;

/// <summary>
/// The complete state of a machine at an instruction boundary: processors, interrupt controllers, clock, devices, memory.
/// It is loaded into a machine that is made in the same way. Immutable.
/// </summary>
public sealed class MachineState
{
    internal const int MaxSectionLength = 64 << 20;

    private const uint FormatVersion = 1;
    private const int MaxSections = 1 << 20;
    private const int MaxNameLength = 256;

    private readonly IReadOnlyList<Section> _sections;

    internal MachineState(IReadOnlyList<Section> sections)
    {
        _sections = sections;
    }

    /// <summary>A named part: <c>clock</c>, <c>vcpu0/regs</c>, <c>device/ports/3f8/uart16550</c>, <c>memory/100000000</c> ...</summary>
    internal readonly record struct Section(string Name, ReadOnlyMemory<byte> Data);

    private static ReadOnlySpan<byte> Magic => "KVMSHRPS"u8;

    internal IReadOnlyList<Section> Sections => _sections;

    /// <summary>Reads a state that <see cref="Save"/> wrote.</summary>
    /// <param name="stream">Where it comes from; read up to the end of the state.</param>
    /// <exception cref="MachineStateException">It is no state, of another version, or damaged.</exception>
    public static MachineState Load(Stream stream)
    {
        ArgumentNullException.ThrowIfNull(stream);
        try
        {
            using var hash = IncrementalHash.CreateHash(HashAlgorithmName.SHA256);
            var header = ReadHashed(stream, hash, 16);
            if (!header.AsSpan(0, 8).SequenceEqual(Magic))
            {
                throw new MachineStateException("The stream does not contain a saved machine state.");
            }
            var version = BinaryPrimitives.ReadUInt32LittleEndian(header.AsSpan(8));
            if (version != FormatVersion)
            {
                throw new MachineStateException($"The saved state has format version {version}; this library reads version {FormatVersion}.");
            }
            var count = BinaryPrimitives.ReadUInt32LittleEndian(header.AsSpan(12));
            if (count > MaxSections)
            {
                throw Damaged();
            }
            var sections = new List<Section>();
            var names = new HashSet<string>(StringComparer.Ordinal);
            for (var i = 0; i < count; i++)
            {
                var lengths = ReadHashed(stream, hash, 8);
                var nameLength = BinaryPrimitives.ReadUInt32LittleEndian(lengths);
                var dataLength = BinaryPrimitives.ReadUInt32LittleEndian(lengths.AsSpan(4));
                if (nameLength > MaxNameLength || dataLength > MaxSectionLength)
                {
                    throw Damaged();
                }
                var name = Encoding.UTF8.GetString(ReadHashed(stream, hash, (int)nameLength));
                if (!names.Add(name))
                {
                    throw Damaged();
                }
                sections.Add(new Section(name, ReadHashed(stream, hash, (int)dataLength)));
            }
            var expected = hash.GetHashAndReset();
            var found = new byte[expected.Length];
            stream.ReadExactly(found);
            return expected.AsSpan().SequenceEqual(found) ? new MachineState(sections) : throw Damaged();
        }
        catch (EndOfStreamException e)
        {
            throw new MachineStateException("The saved state is damaged: it ends too early.", e);
        }
    }

    /// <summary>Writes the state.</summary>
    /// <param name="stream">Where it goes.</param>
    public void Save(Stream stream)
    {
        ArgumentNullException.ThrowIfNull(stream);
        using var hash = IncrementalHash.CreateHash(HashAlgorithmName.SHA256);
        void Write(ReadOnlySpan<byte> bytes)
        {
            hash.AppendData(bytes);
            stream.Write(bytes);
        }

        Span<byte> header = stackalloc byte[16];
        Magic.CopyTo(header);
        BinaryPrimitives.WriteUInt32LittleEndian(header[8..], FormatVersion);
        BinaryPrimitives.WriteUInt32LittleEndian(header[12..], (uint)_sections.Count);
        Write(header);
        Span<byte> lengths = stackalloc byte[8];
        foreach (var section in _sections)
        {
            WriteHead(lengths, section.Name, section.Data.Length, out var name);
            Write(lengths);
            Write(name);
            Write(section.Data.Span);
        }
        stream.Write(hash.GetHashAndReset());
    }

    /// <summary>SHA-256 over the whole state. Two machines with the same hash go on in the same way.</summary>
    public byte[] ComputeHash()
    {
        using var hasher = new Hasher();
        foreach (var section in _sections)
        {
            hasher.Add(section.Name, section.Data.Span);
        }
        return hasher.Finish();
    }

    internal ReadOnlyMemory<byte>? Find(string name)
    {
        foreach (var section in _sections)
        {
            if (section.Name == name)
            {
                return section.Data;
            }
        }
        return null;
    }

    private static void WriteHead(Span<byte> lengths, string sectionName, int dataLength, out byte[] name)
    {
        name = Encoding.UTF8.GetBytes(sectionName);
        BinaryPrimitives.WriteUInt32LittleEndian(lengths, (uint)name.Length);
        BinaryPrimitives.WriteUInt32LittleEndian(lengths[4..], (uint)dataLength);
    }

    private static byte[] ReadHashed(Stream stream, IncrementalHash hash, int count)
    {
        var bytes = new byte[count];
        stream.ReadExactly(bytes);
        hash.AppendData(bytes);
        return bytes;
    }

    private static MachineStateException Damaged() => new("The saved state is damaged.");

    /// <summary>Computes the hash of a state section by section, without keeping them.</summary>
    internal sealed class Hasher : IDisposable
    {
        private readonly IncrementalHash _hash = IncrementalHash.CreateHash(HashAlgorithmName.SHA256);

        public void Add(string name, ReadOnlySpan<byte> data)
        {
            Span<byte> lengths = stackalloc byte[8];
            WriteHead(lengths, name, data.Length, out var nameBytes);
            _hash.AppendData(lengths);
            _hash.AppendData(nameBytes);
            _hash.AppendData(data);
        }

        public byte[] Finish() => _hash.GetHashAndReset();

        public void Dispose() => _hash.Dispose();
    }
}
