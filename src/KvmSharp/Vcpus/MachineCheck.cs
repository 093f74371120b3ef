namespace KvmSharp;

/// <summary>A hardware error as a bank of a processor reports it (SDM 3B "Machine-Check Architecture").</summary>
/// <param name="Bank">The bank: 0 to 9.</param>
/// <param name="Status">
/// IA32_MCi_STATUS: bit 63 (VAL) must be set; bit 61 (UC) makes it an uncorrected error, which raises an exception.
/// </param>
/// <param name="Address">IA32_MCi_ADDR.</param>
/// <param name="Miscellaneous">IA32_MCi_MISC.</param>
/// <param name="GlobalStatus">IA32_MCG_STATUS of an uncorrected error: bit 2 (MCIP), bit 0 (RIPV), bit 1 (EIPV).</param>
public readonly record struct MachineCheck(byte Bank, ulong Status, ulong Address, ulong Miscellaneous, ulong GlobalStatus);
