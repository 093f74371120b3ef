using System.Globalization;
using KvmSharp.Cli.CommandLine;
using KvmSharp.Cli.Terminal;

namespace KvmSharp.Cli.Commands;

/// <summary><c>kvmsharp disasm</c>: shows the bytes of a file as instructions.</summary>
internal static class DisasmCommand
{
    private const int LongestInstruction = 15;

    public static int Run(IReadOnlyList<string> arguments)
    {
        string? path = null;
        int bits = 64;
        ulong address = 0;
        var reader = new ArgumentReader(arguments);
        while (reader.MoveNext())
        {
            switch (reader.Current)
            {
                case "--bits":
                    bits = reader.Value("16, 32 or 64") switch
                    {
                        "16" => 16,
                        "32" => 32,
                        "64" => 64,
                        string other => throw new CliException($"--bits: '{other}' is none of 16, 32, 64", ExitStatus.Usage),
                    };
                    break;
                case "--base":
                    address = ParseAddress(reader.NonEmptyValue("an address"));
                    break;
                case "-":
                case string name when !reader.IsOption:
                    path = path is null ? reader.Current : throw reader.Unknown();
                    break;
                default:
                    throw reader.Unknown();
            }
        }

        byte[] code = Read(path ?? throw new CliException("disasm needs a file, or - for standard input", ExitStatus.Usage));
        using var output = new StreamWriter(StandardStreams.OpenOutput());
        Write(output, code, bits, address);
        return ExitStatus.Success;
    }

    private static void Write(TextWriter output, ReadOnlySpan<byte> code, int bits, ulong address)
    {
        while (!code.IsEmpty)
        {
            ReadOnlySpan<byte> window = code[..Math.Min(code.Length, LongestInstruction)];
            int length = Disassembler.Disassemble(window, bits, address, out string text);
            if (length == 0)
            {
                length = 1;
                text = "(bad)";
            }

            string bytes = Convert.ToHexStringLower(code[..length]);
            output.WriteLine(string.Create(CultureInfo.InvariantCulture, $"{address:x16}  {bytes,-30}  {text}"));
            code = code[length..];
            address += (uint)length;
        }
    }

    private static byte[] Read(string path)
    {
        try
        {
            if (path != "-")
            {
                return Directory.Exists(path) ? throw new CliException($"'{path}' is a directory") : File.ReadAllBytes(path);
            }

            using Stream input = StandardStreams.OpenInput();
            using var content = new MemoryStream();
            input.CopyTo(content);
            return content.ToArray();
        }
        catch (Exception exception) when (exception is IOException or UnauthorizedAccessException)
        {
            throw new CliException($"cannot read '{path}': {exception.Message}", exception);
        }
    }

    private static ulong ParseAddress(string text)
    {
        bool valid = text.StartsWith("0x", StringComparison.OrdinalIgnoreCase)
            ? ulong.TryParse(text.AsSpan(2), NumberStyles.AllowHexSpecifier, CultureInfo.InvariantCulture, out ulong address)
            : ulong.TryParse(text, NumberStyles.None, CultureInfo.InvariantCulture, out address);
        return valid ? address : throw new CliException($"--base: '{text}' is not an address (examples: 0x7c00, 4096)", ExitStatus.Usage);
    }
}
