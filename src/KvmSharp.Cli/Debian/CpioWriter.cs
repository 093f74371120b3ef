using System.Globalization;
using System.Text;

namespace KvmSharp.Cli.Debian;

/// <summary>
/// Writes a cpio archive in the "newc" format, the one the Linux kernel unpacks as an initramfs
/// (Linux "initramfs buffer format"). All times are zero, so that equal content gives equal bytes.
/// </summary>
internal sealed class CpioWriter(Stream output)
{
    private const uint DirectoryType = 0x4000;
    private const uint CharacterDeviceType = 0x2000;
    private const uint RegularFileType = 0x8000;
    private const uint SymbolicLinkType = 0xa000;
    private const string TrailerName = "TRAILER!!!";

    private uint _nextInode = 1;
    private long _written;

    public void AddDirectory(string path, uint permissions = 0x1ed) =>
        WriteEntry(path, DirectoryType | permissions, [], links: 2);

    public void AddFile(string path, ReadOnlySpan<byte> content, uint permissions = 0x1a4) =>
        WriteEntry(path, RegularFileType | permissions, content);

    public void AddExecutable(string path, ReadOnlySpan<byte> content) => AddFile(path, content, 0x1ed);

    public void AddSymbolicLink(string path, string target) =>
        WriteEntry(path, SymbolicLinkType | 0x1ff, Encoding.UTF8.GetBytes(target));

    public void AddCharacterDevice(string path, uint major, uint minor, uint permissions) =>
        WriteEntry(path, CharacterDeviceType | permissions, [], deviceMajor: major, deviceMinor: minor);

    /// <summary>Writes the end marker; nothing can be added afterwards.</summary>
    public void Finish()
    {
        _nextInode = 0;
        WriteEntry(TrailerName, 0, []);
        Pad(512);
    }

    private void WriteEntry(
        string path, uint mode, ReadOnlySpan<byte> content, uint links = 1, uint deviceMajor = 0, uint deviceMinor = 0)
    {
        byte[] name = Encoding.UTF8.GetBytes(path + "\0");
        uint inode = _nextInode;
        _nextInode++;
        ReadOnlySpan<uint> fields =
        [
            inode, mode, 0, 0, links, 0, checked((uint)content.Length), 0, 0, deviceMajor, deviceMinor,
            (uint)name.Length, 0,
        ];

        var header = new StringBuilder("070701", 110);
        foreach (uint field in fields)
        {
            header.Append(field.ToString("x8", CultureInfo.InvariantCulture));
        }

        Write(Encoding.ASCII.GetBytes(header.ToString()));
        Write(name);
        Pad(4);
        Write(content);
        Pad(4);
    }

    private void Write(ReadOnlySpan<byte> bytes)
    {
        output.Write(bytes);
        _written += bytes.Length;
    }

    private void Pad(int alignment)
    {
        int padding = (int)(-_written & (alignment - 1));
        if (padding != 0)
        {
            Write(new byte[padding]);
        }
    }
}
