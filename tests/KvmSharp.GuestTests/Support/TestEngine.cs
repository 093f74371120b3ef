namespace KvmSharp.GuestTests.Support;

/// <summary>The engine of guests whose test does not choose one: KVMSHARP_ENGINE=interpreter runs them on the interpreter alone.</summary>
internal static class TestEngine
{
    public static ExecutionEngine Value => Environment.GetEnvironmentVariable("KVMSHARP_ENGINE") switch
    {
        null or "" => ExecutionEngine.Auto,
        "interpreter" => ExecutionEngine.Interpreter,
        "jit" => ExecutionEngine.Jit,
        string other => throw new InvalidOperationException($"KVMSHARP_ENGINE is '{other}'; 'interpreter' or 'jit' are known"),
    };
}
