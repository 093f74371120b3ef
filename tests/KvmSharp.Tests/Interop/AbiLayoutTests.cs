using System.Reflection;
using System.Runtime.InteropServices;
using System.Text.RegularExpressions;
using KvmSharp.Interop;

namespace KvmSharp.Tests.Interop;

/// <summary>Every field of every structure that crosses the boundary lies where the native library has it.</summary>
public sealed partial class AbiLayoutTests
{
    [Fact]
    public void StructuresAreThoseOfTheDefinition() => Assert.Equal(
        ReadDefinition().Where(r => r.Field is null).Select(r => r.Structure),
        AbiLayout.Structures.Select(s => s.NativeName));

    [Fact]
    public void SizesAreThoseOfTheLibrary()
    {
        NativeLibraryLoader.EnsureLoaded();
        for (var i = 0; i < AbiLayout.Structures.Count; i++)
        {
            Assert.Equal((AbiLayout.Structures[i].NativeName, AbiLayout.Structures[i].Size),
                (AbiLayout.Structures[i].NativeName, NativeMethods.AbiSize((uint)i)));
        }
    }

    [Fact]
    public void OffsetsAreThoseOfTheLibrary()
    {
        NativeLibraryLoader.EnsureLoaded();
        var types = AbiLayout.Structures.ToDictionary(s => s.NativeName, s => s.Type);
        var wrong = new List<string>();
        uint id = 0;
        foreach (var (structure, field) in ReadDefinition())
        {
            if (field is null)
            {
                continue;
            }
            var native = NativeMethods.AbiOffset(id++);
            // Unions and groups without a counterpart are covered by the fields in them.
            if (FindOffset(types[structure], field) is { } managed && managed != native)
            {
                wrong.Add($"{structure}.{field}: {managed} here, {native} in the library");
            }
        }
        Assert.True(NativeMethods.AbiOffset(id) < 0);
        Assert.Empty(wrong);
    }

    [Fact]
    public void EveryManagedFieldIsCompared()
    {
        var definition = ReadDefinition().Where(r => r.Field is not null).ToLookup(r => r.Structure, r => r.Field!);
        foreach (var (name, type, _) in AbiLayout.Structures)
        {
            var compared = definition[name].Select(f => FindField(type, f)).OfType<FieldInfo>().Select(f => f.Name).ToHashSet();
            var fields = Fields(type).Where(f => f.IsPublic).Select(f => f.Name);
            Assert.Equal((name, ""), (name, string.Join(", ", fields.Where(f => !compared.Contains(f)))));
        }
    }

    private static IEnumerable<(string Structure, string? Field)> ReadDefinition()
    {
        var text = File.ReadAllText(Path.Combine(Repository.Root, "native", "include", "abi.def"));
        foreach (Match row in Rows().Matches(text))
        {
            yield return row.Groups[1].Value == "STRUCT" ? (row.Groups[2].Value, null) : (row.Groups[2].Value, row.Groups[3].Value);
        }
    }

    private static FieldInfo[] Fields(Type type) => type.GetFields(BindingFlags.Instance | BindingFlags.Public | BindingFlags.NonPublic);

    private static FieldInfo? FindField(Type type, string nativeField)
    {
        if (nativeField == "u.pad")
        {
            return null; // the other members of the union are compared
        }
        // exception.error_code and u.msi.data are ExceptionErrorCode and MsiData here.
        var parts = nativeField.Split('.').Where(p => p is not ("chip" or "u")).ToArray();
        var name = string.Concat(parts).Replace("_", "", StringComparison.Ordinal);
        var renamed = (type.Name, nativeField) switch
        {
            ("KvsIrqRoutingEntry", "u.irqchip.irqchip") => "irqchipchip",
            ("FpuRegisters", "fpr") => "st",
            ("FpuRegisters", "ftwx") => "ftw",
            ("TraceEntry", "gpr") => "registers",
            ("KvsVcpuEvents", "smi.smm_inside_nmi") => "smiinsidenmi",
            _ => name,
        };
        return Fields(type).FirstOrDefault(f => f.Name.TrimStart('_').Equals(renamed, StringComparison.OrdinalIgnoreCase));
    }

    private static int? FindOffset(Type type, string nativeField)
    {
        if (FindField(type, nativeField) is not { } field)
        {
            return null;
        }
        var method = typeof(AbiLayoutTests).GetMethod(nameof(OffsetOf), BindingFlags.Static | BindingFlags.NonPublic)!;
        return (int)method.MakeGenericMethod(type).Invoke(null, [field.Name])!;
    }

    private static int OffsetOf<T>(string field) => (int)Marshal.OffsetOf<T>(field);

    [GeneratedRegex(@"^(STRUCT|FIELD)\((\w+)(?:, ([\w.]+))?\)", RegexOptions.Multiline)]
    private static partial Regex Rows();
}
