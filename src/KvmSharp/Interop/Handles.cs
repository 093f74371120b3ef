using System.Runtime.InteropServices;

namespace KvmSharp.Interop;

internal sealed class VmHandle : SafeHandle
{
    public VmHandle()
        : base(0, ownsHandle: true)
    {
    }

    public override bool IsInvalid => handle == 0;

    protected override bool ReleaseHandle()
    {
        NativeMethods.VmDestroy(handle);
        return true;
    }
}

/// <summary>A vCPU; keeps its VM alive.</summary>
internal sealed class VcpuHandle : SafeHandle
{
    private VmHandle? _vm;

    public VcpuHandle()
        : base(0, ownsHandle: true)
    {
    }

    public override bool IsInvalid => handle == 0;

    public void KeepAlive(VmHandle vm)
    {
        var added = false;
        vm.DangerousAddRef(ref added);
        _vm = vm;
    }

    protected override bool ReleaseHandle()
    {
        var released = NativeMethods.VcpuDestroy(handle) >= 0;
        _vm?.DangerousRelease();
        return released;
    }
}

/// <summary>One reference to a piece of RAM.</summary>
internal sealed class RamHandle : SafeHandle
{
    public RamHandle()
        : base(0, ownsHandle: true)
    {
    }

    /// <summary>A second reference, with a life of its own.</summary>
    public RamHandle Share()
    {
        var added = false;
        DangerousAddRef(ref added);
        try
        {
            NativeMethods.RamAcquire(this);
            var shared = new RamHandle();
            shared.SetHandle(handle);
            return shared;
        }
        finally
        {
            DangerousRelease();
        }
    }

    public override bool IsInvalid => handle == 0;

    protected override bool ReleaseHandle()
    {
        NativeMethods.RamRelease(handle);
        return true;
    }
}

/// <summary>A doorbell; keeps its VM alive.</summary>
internal sealed class DoorbellHandle : SafeHandle
{
    private VmHandle? _vm;

    public DoorbellHandle()
        : base(0, ownsHandle: true)
    {
    }

    public override bool IsInvalid => handle == 0;

    public void KeepAlive(VmHandle vm)
    {
        var added = false;
        vm.DangerousAddRef(ref added);
        _vm = vm;
    }

    protected override bool ReleaseHandle()
    {
        NativeMethods.DoorbellDestroy(handle);
        _vm?.DangerousRelease();
        return true;
    }
}
