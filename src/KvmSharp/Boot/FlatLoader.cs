namespace KvmSharp.Boot;

/// <summary>The mode in which a flat image starts.</summary>
public enum CodeWidth
{
    /// <summary>Real mode; CS = address / 16 if the address does not fit into IP, SS:SP = 0:0x7000.</summary>
    Bits16 = 16,
    /// <summary>Protected mode without paging, flat segments, ESP = 0x8000.</summary>
    Bits32 = 32,
    /// <summary>64-bit mode, the first 4 GiB mapped to themselves, RSP = 0x8000.</summary>
    Bits64 = 64,
}

/// <summary>Loads an image without header and prepares a vCPU to start in it, interrupts off.</summary>
public static class FlatLoader
{
    /// <summary>In 32- and 64-bit mode, GDT, page tables and stack lie from here ...</summary>
    public const ulong ReservedStart = 0x500;

    /// <summary>... to below this address; an image must not overlap them.</summary>
    public const ulong ReservedEnd = 0x8000;

    private const ulong PageTables = 0x1000;
    private const ushort RealModeStack = 0x7000;

    /// <summary>Loads an image.</summary>
    /// <param name="memory">The guest's memory.</param>
    /// <param name="vcpu">The processor that starts in the image; it must not be running.</param>
    /// <param name="image">The image.</param>
    /// <param name="address">Where it is loaded, and where it starts unless <paramref name="entry"/> says otherwise.</param>
    /// <param name="width">The mode in which it starts.</param>
    /// <param name="entry">The address of the first instruction.</param>
    /// <exception cref="BootImageException">The image is empty, does not fit, or overlaps the reserved area.</exception>
    public static void Load(GuestMemory memory, Vcpu vcpu, BootImage image, GuestAddress address, CodeWidth width = CodeWidth.Bits64,
        GuestAddress? entry = null)
    {
        ArgumentNullException.ThrowIfNull(memory);
        ArgumentNullException.ThrowIfNull(vcpu);
        ArgumentNullException.ThrowIfNull(image);
        var length = (ulong)image.Bytes.Length;
        if (length == 0)
        {
            throw new BootImageException(BootImageProblem.Empty, $"'{image.Name}' is empty.");
        }
        if (!memory.IsBacked(address, length))
        {
            throw new BootImageException(BootImageProblem.TooLarge, $"'{image.Name}' with {length} bytes does not fit into the guest's memory at {address}.");
        }
        if (width != CodeWidth.Bits16 && address.Value < ReservedEnd && address.Value + length > ReservedStart)
        {
            throw new BootImageException(BootImageProblem.Unsupported,
                $"'{image.Name}' at {address} overlaps the area from 0x{ReservedStart:x} to 0x{ReservedEnd:x} that its start needs.");
        }
        var start = entry ?? address;
        var registers = new Registers { Rip = start.Value, Rsp = ReservedEnd };
        memory.Write(address, image.Bytes.Span);
        switch (width)
        {
            case CodeWidth.Bits16:
                if (start.Value > 0xf_ffff)
                {
                    throw new BootImageException(BootImageProblem.Unsupported, $"'{image.Name}' cannot start in real mode at {start}, above 1 MiB.");
                }
                var segment = start.Value > 0xffff ? (ushort)(start.Value >> 4) : (ushort)0;
                CpuSetup.EnterRealMode(vcpu, segment, (ushort)(start.Value - ((ulong)segment << 4)), RealModeStack);
                break;
            case CodeWidth.Bits32:
                CpuSetup.EnterProtectedMode(vcpu, memory, ReservedStart, registers);
                break;
            case CodeWidth.Bits64:
                CpuSetup.EnterLongMode(vcpu, memory, ReservedStart, PageTables, registers);
                break;
            default:
                throw new ArgumentOutOfRangeException(nameof(width));
        }
    }
}
