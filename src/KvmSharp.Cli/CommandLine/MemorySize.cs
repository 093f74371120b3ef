using System.Globalization;

namespace KvmSharp.Cli.CommandLine;

/// <summary>Reads sizes such as <c>512M</c>, <c>1G</c> or <c>262144K</c>; a bare number is MiB.</summary>
internal static class MemorySize
{
    public static long Parse(string option, string text)
    {
        long unit = 1L << 20;
        ReadOnlySpan<char> digits = text;
        if (text.EndsWith("iB", StringComparison.Ordinal))
        {
            digits = digits[..^2];
        }

        if (digits.Length > 0 && !char.IsAsciiDigit(digits[^1]))
        {
            unit = char.ToUpperInvariant(digits[^1]) switch
            {
                'K' => 1L << 10,
                'M' => 1L << 20,
                'G' => 1L << 30,
                'T' => 1L << 40,
                _ => 0,
            };
            digits = digits[..^1];
        }

        if (unit == 0 || !ulong.TryParse(digits, NumberStyles.None, CultureInfo.InvariantCulture, out ulong value))
        {
            throw new CliException($"{option}: '{text}' is not a size (examples: 512M, 1G)", ExitStatus.Usage);
        }

        if (value > (ulong)(long.MaxValue / unit))
        {
            throw new CliException($"{option}: {text} is more memory than a guest can have", ExitStatus.Usage);
        }

        return (long)value * unit;
    }
}
