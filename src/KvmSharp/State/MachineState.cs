namespace KvmSharp;

/// <summary>The complete state of a machine at an instruction boundary: processors, interrupt controllers, clock, devices, memory.</summary>
public sealed partial class MachineState
{
}
