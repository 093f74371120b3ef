using KvmSharp.Interop;

namespace KvmSharp;

/// <summary>Which guest writes ring a doorbell.</summary>
public sealed record DoorbellOptions
{
    /// <summary>The port or guest-physical address.</summary>
    public required ulong Address { get; init; }

    /// <summary>Whether <see cref="Address"/> is a port.</summary>
    public bool IsPort { get; init; }

    /// <summary>The width of the write in bytes: 1, 2, 4 or 8; 0 takes any width.</summary>
    public int Length { get; init; }

    /// <summary>The value that must be written; <see langword="null"/> takes any.</summary>
    public ulong? Value { get; init; }
}

/// <summary>
/// A guest write that signals the host without leaving the guest, as KVM's ioeventfd does. On a virtual clock the handler
/// runs on the vCPU thread instead, so that runs stay identical.
/// </summary>
public sealed class Doorbell : IDisposable
{
    private readonly DoorbellHandle _handle;
    private readonly Action _handler;
    private readonly VirtualMachine _machine;
    private readonly Thread? _thread;
    private int _disposed;

    internal Doorbell(DoorbellHandle handle, DoorbellOptions options, Action handler, bool synchronous, VirtualMachine machine)
    {
        _handle = handle;
        Options = options;
        _handler = handler;
        _machine = machine;
        if (!synchronous)
        {
            _thread = new Thread(Wait) { IsBackground = true, Name = $"doorbell 0x{options.Address:x}" };
            _thread.Start();
        }
    }

    /// <summary>Which writes ring.</summary>
    public DoorbellOptions Options { get; }

    /// <summary>Removes the doorbell and waits for a handler under way, unless it is the handler that calls.</summary>
    public void Dispose()
    {
        if (Interlocked.Exchange(ref _disposed, 1) != 0)
        {
            return;
        }
        _machine.RemoveDoorbell(this);
        NativeMethods.DoorbellClose(_handle);
        if (_thread is not null && _thread != Thread.CurrentThread)
        {
            _thread.Join();
        }
        _handle.Dispose();
    }

    /// <summary>Wakes the thread as a guest write does. Not on a virtual clock.</summary>
    internal void RingFromHost()
    {
        try
        {
            _ = NativeMethods.DoorbellRing(_handle);
        }
        catch (ObjectDisposedException)
        {
            // The machine is gone; an event of the host came too late.
        }
    }

    /// <summary>Takes the doorbell to another address, or where no guest write rings it. False when another one has the address.</summary>
    internal bool TryMove(ulong? address)
    {
        if (NativeMethods.DoorbellMove(_handle, address ?? Options.Address, address is null ? 0u : 1u) < 0)
        {
            _ = NativeMethods.DoorbellMove(_handle, Options.Address, 0);
            return false;
        }
        return true;
    }

    internal bool Matches(bool isPort, ulong address, ReadOnlySpan<byte> data)
    {
        if (isPort != Options.IsPort || address != Options.Address || (Options.Length != 0 && Options.Length != data.Length))
        {
            return false;
        }
        if (Options.Value is not { } value)
        {
            return true;
        }
        ulong written = 0;
        for (var i = 0; i < data.Length; i++)
        {
            written |= (ulong)data[i] << (8 * i);
        }
        return written == value;
    }

    internal void Ring() => _handler();

    private void Wait()
    {
        var added = false;
        try
        {
            _handle.DangerousAddRef(ref added);
            while (NativeMethods.DoorbellWait(_handle, -1) == 1 && _machine.EnterDeviceWork())
            {
                try
                {
                    _handler();
                }
                finally
                {
                    _machine.ExitDeviceWork();
                }
            }
        }
        catch (Exception e)
        {
            _machine.ReportFault(e);
        }
        finally
        {
            if (added)
            {
                _handle.DangerousRelease();
            }
        }
    }
}
