namespace KvmSharp;

/// <summary>Carries port and memory accesses of a guest to the devices: a function of buses and exit alone.</summary>
public static class ExitDispatcher
{
    /// <summary>Completes an exit on the buses. A read that no device answers gives all ones; such a write is lost.</summary>
    /// <param name="ports">The port bus.</param>
    /// <param name="mmio">The bus of memory-mapped registers.</param>
    /// <param name="exit">The exit; its data is filled for reads.</param>
    /// <returns>Whether the exit was a port or memory access at all.</returns>
    public static bool Dispatch(IoBus ports, IoBus mmio, in VcpuExit exit)
    {
        switch (exit.Reason)
        {
            case VcpuExitReason.Io:
                for (var i = 0; i < exit.Count; i++)
                {
                    Access(ports, exit, exit.Data.Slice(i * exit.Size, exit.Size));
                }
                return true;
            case VcpuExitReason.Mmio:
                Access(mmio, exit, exit.Data);
                return true;
            default:
                return false;
        }
    }

    private static void Access(IoBus bus, in VcpuExit exit, Span<byte> data)
    {
        if (exit.IsWrite)
        {
            bus.Write(exit.Address, data);
        }
        else
        {
            bus.Read(exit.Address, data);
        }
    }
}
