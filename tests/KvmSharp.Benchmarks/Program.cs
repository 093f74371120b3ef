using System.Globalization;
using KvmSharp.Benchmarks;

CultureInfo.CurrentCulture = CultureInfo.InvariantCulture;

int pairs = 5;
var engine = KvmSharp.ExecutionEngine.Auto;
string? only = null;
for (int i = 0; i < args.Length; i++)
{
    switch (args[i])
    {
        case "boot" or "compute" or "storage" or "network" or "disk":
            only = args[i];
            break;
        case "--pairs" when i + 1 < args.Length && int.TryParse(args[i + 1], out pairs) && pairs > 0:
            i++;
            break;
        case "--engine" when i + 1 < args.Length && Enum.TryParse(args[i + 1], ignoreCase: true, out engine):
            i++;
            break;
        default:
            Console.Error.WriteLine("usage: KvmSharp.Benchmarks [boot | compute | storage | network | disk] [--pairs N] [--engine interpreter|jit]");
            return 2;
    }
}

try
{
    if (only is null or "compute")
    {
        await ComputeBenchmark.RunAsync(engine);
    }

    if (only is null or "boot")
    {
        await BootBenchmark.RunAsync(pairs, engine);
    }

    if (only is null or "storage")
    {
        await StorageBenchmark.RunAsync(pairs);
    }

    if (only is null or "network")
    {
        await NetworkBenchmark.RunAsync(pairs, engine);
    }

    if (only is null or "disk")
    {
        await DiskBenchmark.RunAsync(pairs, engine);
    }

    return 0;
}
catch (BenchmarkException exception)
{
    Console.Error.WriteLine(exception.Message);
    return 1;
}
