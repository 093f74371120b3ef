using System.Reflection;
using System.Runtime.InteropServices;

namespace KvmSharp.Interop;

/// <summary>Finds the execution core and checks that it fits this assembly, once per process.</summary>
internal static unsafe class NativeLibraryLoader
{
    /// <summary>Names a library file to load instead of the one beside the program, for example a sanitizer build.</summary>
    internal const string PathVariable = "KVMSHARP_NATIVE_LIBRARY";

    internal const int SupportedAbiVersion = 1;

    private static readonly Lazy<bool> _loaded = new(Load);

    /// <summary>Called by everything that makes a native object; later calls need no check.</summary>
    /// <exception cref="NativeLibraryException">The library is missing or does not fit.</exception>
    internal static void EnsureLoaded() => _ = _loaded.Value;

    private static bool Load()
    {
        try
        {
            NativeLibrary.SetDllImportResolver(typeof(NativeLibraryLoader).Assembly, Resolve);
            var version = NativeMethods.AbiVersion();
            if (version != SupportedAbiVersion)
            {
                throw new NativeLibraryException(
                    $"The native library has ABI version {version}; this assembly needs version {SupportedAbiVersion}.");
            }
            AbiLayout.Check();
            return true;
        }
        catch (DllNotFoundException e)
        {
            throw new NativeLibraryException(
                $"The native library {FileName} was not found; on linux-x64 it belongs in runtimes/linux-x64/native beside the program.", e);
        }
        catch (BadImageFormatException e)
        {
            throw new NativeLibraryException($"The native library {FileName} is not for this kind of processor.", e);
        }
        catch (EntryPointNotFoundException e)
        {
            throw new NativeLibraryException($"The native library {FileName} does not belong to this assembly: {e.Message}", e);
        }
    }

    private static string FileName => "libkvmsharp.so";

    private static nint Resolve(string name, Assembly assembly, DllImportSearchPath? searchPath)
    {
        if (name != NativeMethods.Library)
        {
            return 0;
        }
        if (Environment.GetEnvironmentVariable(PathVariable) is { Length: > 0 } path)
        {
            return NativeLibrary.Load(path);
        }
        var architecture = RuntimeInformation.ProcessArchitecture.ToString().ToLowerInvariant();
        string[] candidates =
        [
            Path.Combine(AppContext.BaseDirectory, "runtimes", $"linux-{architecture}", "native", FileName),
            Path.Combine(AppContext.BaseDirectory, FileName),
        ];
        foreach (var candidate in candidates)
        {
            if (File.Exists(candidate))
            {
                return NativeLibrary.Load(candidate);
            }
        }
        // The runtime's own search knows where NuGet put the package.
        return NativeLibrary.TryLoad(name, assembly, searchPath, out var handle) ? handle : 0;
    }
}
