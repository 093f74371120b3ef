namespace KvmSharp;

/// <summary>
/// A PC-compatible machine: one power cycle of it. <see cref="RunAsync"/> runs one from power-on to power-off with the
/// resets in between.
/// </summary>
public sealed class PcMachine : IDisposable, IAsyncDisposable
{
    /// <summary>Builds the machine and loads the kernel.</summary>
    /// <param name="options">What is in it.</param>
    /// <exception cref="KvmSharpException">An option is invalid or the host lacks what it needs.</exception>
    /// <exception cref="Boot.BootImageException">The kernel or the initial RAM disk cannot be loaded.</exception>
    /// <exception cref="UnsupportedFeatureException">The CPU model asks for a feature that the core does not have.</exception>
    public PcMachine(PcMachineOptions options)
    {
        ArgumentNullException.ThrowIfNull(options);
        options.Validate();
        Options = options;
        VirtualMachine = new VirtualMachine(new VirtualMachineOptions
        {
            Cpu = options.Cpu,
            Clock = options.Clock,
            StartTime = options.StartTime,
            VcpuCount = options.VcpuCount,
        });
    }

    /// <summary>What is in the machine.</summary>
    public PcMachineOptions Options { get; }

    /// <summary>The machine itself: memory, buses, interrupts, clock and vCPUs.</summary>
    public VirtualMachine VirtualMachine { get; }

    /// <summary>
    /// Runs a machine until it ends: builds it, starts it, and builds it anew after each reset unless
    /// <see cref="PcMachineOptions.NoReboot"/> is set.
    /// </summary>
    /// <param name="options">What is in it.</param>
    /// <param name="cancellationToken">Stops the machine; the result's kind is <see cref="VmExitKind.Stopped"/> then.</param>
    /// <returns>How the machine ended.</returns>
    public static async Task<VmExit> RunAsync(PcMachineOptions options, CancellationToken cancellationToken = default)
    {
        while (true)
        {
            await using var machine = new PcMachine(options);
            machine.Start();
            using var registration = cancellationToken.Register(() => machine.VirtualMachine.Stop());
            var exit = await machine.WaitForExitAsync().ConfigureAwait(false);
            if (exit.Kind != VmExitKind.Reset || options.NoReboot)
            {
                return exit;
            }
        }
    }

    /// <summary>Starts the machine.</summary>
    public void Start() => VirtualMachine.Start();

    /// <summary>Completes when the machine has come to its end.</summary>
    /// <param name="cancellationToken">Ends the waiting, not the machine.</param>
    /// <returns>How it ended.</returns>
    public Task<VmExit> WaitForExitAsync(CancellationToken cancellationToken = default) => VirtualMachine.WaitForExitAsync(cancellationToken);

    /// <summary>Stops the machine and frees what it holds.</summary>
    public void Dispose() => VirtualMachine.Dispose();

    /// <summary>Stops the machine and frees what it holds, without blocking the caller meanwhile.</summary>
    public ValueTask DisposeAsync() => VirtualMachine.DisposeAsync();
}
