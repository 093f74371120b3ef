namespace KvmSharp;

/// <summary>A message-signalled interrupt: a write of <paramref name="Data"/> to <paramref name="Address"/>.</summary>
/// <param name="Address">The address, 0xFEEx_xxxx for local APICs (SDM 3A "Message Address Register Format").</param>
/// <param name="Data">The data: vector, delivery mode and trigger (SDM 3A "Message Data Register Format").</param>
public readonly record struct MsiMessage(ulong Address, uint Data);

/// <summary>Where a GSI leads.</summary>
public readonly record struct GsiRoute
{
    private GsiRoute(int gsi, bool isMsi, InterruptChip chip, int pin, MsiMessage message)
    {
        Gsi = gsi;
        IsMsi = isMsi;
        Chip = chip;
        Pin = pin;
        Message = message;
    }

    /// <summary>The global system interrupt.</summary>
    public int Gsi { get; }

    /// <summary>Whether it sends <see cref="Message"/>; otherwise it drives <see cref="Pin"/> of <see cref="Chip"/>.</summary>
    public bool IsMsi { get; }

    /// <summary>The controller.</summary>
    public InterruptChip Chip { get; }

    /// <summary>The controller's input.</summary>
    public int Pin { get; }

    /// <summary>The message.</summary>
    public MsiMessage Message { get; }

    /// <summary>A route to an input of an interrupt controller.</summary>
    /// <param name="gsi">The global system interrupt.</param>
    /// <param name="chip">The controller.</param>
    /// <param name="pin">0 to 7 for a PIC, 0 to 23 for the IOAPIC.</param>
    public static GsiRoute ToPin(int gsi, InterruptChip chip, int pin) => new(gsi, false, chip, pin, default);

    /// <summary>A route to a message.</summary>
    /// <param name="gsi">The global system interrupt.</param>
    /// <param name="message">What raising the line sends.</param>
    public static GsiRoute ToMessage(int gsi, MsiMessage message) => new(gsi, true, default, 0, message);
}

/// <summary>An interrupt controller with input pins.</summary>
public enum InterruptChip
{
    /// <summary>The first 8259A, IRQ 0 to 7.</summary>
    PicMaster = 0,
    /// <summary>The second 8259A, IRQ 8 to 15.</summary>
    PicSlave = 1,
    /// <summary>The IOAPIC.</summary>
    Ioapic = 2,
}
