namespace KvmSharp.Devices.Virtio;

// VIRTIO 1.2, "Console Device".

/// <content>Features, configuration layout, control messages.</content>
public sealed partial class VirtioConsole
{
    private const int DeviceKind = 3;

    // "Feature bits"
    private const ulong FeatureSize = 1UL << 0;
    private const ulong FeatureMultiplePorts = 1UL << 1;
    private const ulong FeatureEmergencyWrite = 1UL << 2;

    // "Device configuration layout"
    private const int ConfigColumns = 0;
    private const int ConfigRows = 2;
    private const int ConfigMaxPorts = 4;
    private const int ConfigEmergencyWrite = 8;
    private const int ConfigSize = 12;

    // "Virtqueues": two for port 0, two for control messages, two for each further port.
    private const int ControlReceiveQueue = 2;
    private const int ControlTransmitQueue = 3;

    // "Multiport Device Operation": struct virtio_console_control
    private const int ControlSize = 8;
    private const int ControlEvent = 4;
    private const int ControlValue = 6;

    private enum ControlMessage : ushort
    {
        DeviceReady = 0,
        PortAdd = 1,
        PortRemove = 2,
        PortReady = 3,
        ConsolePort = 4,
        Resize = 5,
        PortOpen = 6,
        PortName = 7,
    }
}
