using System.Text;

namespace KvmSharp.GuestTests.Support;

/// <summary>Says where two states of a machine differ.</summary>
internal static class StateComparison
{
    private const int Shown = 16;

    public static void AssertEqual(MachineState expected, MachineState actual)
    {
        var differences = new StringBuilder();
        Dictionary<string, ReadOnlyMemory<byte>> others = actual.Sections.ToDictionary(section => section.Name, section => section.Data);
        foreach (MachineState.Section section in expected.Sections)
        {
            if (!others.Remove(section.Name, out ReadOnlyMemory<byte> other))
            {
                differences.AppendLine($"{section.Name}: missing");
            }
            else if (!section.Data.Span.SequenceEqual(other.Span))
            {
                differences.AppendLine($"{section.Name}: {Describe(section.Data.Span, other.Span)}");
            }
        }

        foreach (string name in others.Keys)
        {
            differences.AppendLine($"{name}: unexpected");
        }

        Assert.True(differences.Length == 0, differences.ToString());
    }

    private static string Describe(ReadOnlySpan<byte> expected, ReadOnlySpan<byte> actual)
    {
        int at = expected.CommonPrefixLength(actual) & ~7;
        return $"lengths {expected.Length} and {actual.Length}, at {at:x}: " +
            $"{Convert.ToHexString(expected[at..Math.Min(expected.Length, at + Shown)])} and " +
            $"{Convert.ToHexString(actual[at..Math.Min(actual.Length, at + Shown)])}";
    }
}
