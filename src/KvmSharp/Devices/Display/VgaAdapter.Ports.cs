using System.Buffers.Binary;

namespace KvmSharp.Devices;

/// <content>The registers.</content>
public sealed partial class VgaAdapter
{
    private bool IsColor => (_miscellaneous & MiscellaneousColor) != 0;

    private void ReadPort(int offset, Span<byte> data)
    {
        lock (_lock)
        {
            if (Normalize(offset) is { } register && Get(register) is { } value)
            {
                data[0] = value;
            }
        }
    }

    private void WritePort(int offset, byte value)
    {
        lock (_lock)
        {
            if (Normalize(offset) is { } register)
            {
                Set(register, value);
            }
        }
    }

    // The CRT controller is at one of two places.
    private int? Normalize(int offset) => offset switch
    {
        MonochromeIndex or MonochromeData or MonochromeStatus1 => IsColor ? null : offset + (ColorIndex - MonochromeIndex),
        ColorIndex or ColorData or ColorStatus1 => IsColor ? offset : null,
        _ => offset,
    };

    private byte? Get(int register)
    {
        switch (register)
        {
            case AttributeIndex:
                return _attributeIndex;
            case AttributeData:
                return (_attributeIndex & 0x1f) < AttributeCount ? _attribute[_attributeIndex & 0x1f] : (byte)0;
            case MiscellaneousWrite:
                return SwitchSense;
            case SequencerIndex:
                return _sequencerIndex;
            case SequencerData:
                return _sequencerIndex < SequencerCount ? _sequencer[_sequencerIndex] : (byte)0;
            case DacMask:
                return _dacMask;
            case DacReadIndex:
                return _dacReading ? (byte)3 : (byte)0;
            case DacWriteIndex:
                return (byte)(_dacWrite / 3);
            case DacData:
                var value = _dac[_dacRead];
                _dacRead = (ushort)((_dacRead + 1) % _dac.Length);
                return value;
            case FeatureRead:
                return 0;
            case MiscellaneousRead:
                return _miscellaneous;
            case GraphicsIndex:
                return _graphicsIndex;
            case GraphicsData:
                return _graphicsIndex < GraphicsCount ? _graphics[_graphicsIndex] : (byte)0;
            case ColorIndex:
                return _crtcIndex;
            case ColorData:
                return _crtcIndex < CrtcCount ? _crtc[_crtcIndex] : (byte)0;
            case ColorStatus1:
                _attributeExpectsData = false;
                return ReadStatus1();
            default:
                return null;
        }
    }

    // The beam, as far as programs wait for it: the retraces of a monitor with 31 kHz and 70 Hz.
    private byte ReadStatus1()
    {
        var now = _machine?.Clock.Nanoseconds ?? 0;
        var inFrame = now % FrameNanoseconds;
        if (inFrame > FrameNanoseconds * 92 / 100)
        {
            return inFrame > FrameNanoseconds * 96 / 100 ? (byte)(DisplayInactive | VerticalRetrace) : DisplayInactive;
        }
        return inFrame % LineNanoseconds > LineNanoseconds * 3 / 4 ? DisplayInactive : (byte)0;
    }

    private void Set(int register, byte value)
    {
        switch (register)
        {
            case AttributeIndex:
                SetAttribute(value);
                break;
            case MiscellaneousWrite:
                _miscellaneous = value;
                break;
            case SequencerIndex:
                _sequencerIndex = value;
                break;
            case SequencerData when _sequencerIndex < SequencerCount:
                _sequencer[_sequencerIndex] = value;
                break;
            case DacMask:
                _dacMask = value;
                break;
            case DacReadIndex:
                _dacRead = (ushort)(value * 3);
                _dacReading = true;
                return;
            case DacWriteIndex:
                _dacWrite = (ushort)(value * 3);
                _dacReading = false;
                return;
            case DacData:
                _dac[_dacWrite] = (_vbe[VbeEnable] & VbeDac8) != 0 ? value : (byte)(value & 0x3f);
                _dacWrite = (ushort)((_dacWrite + 1) % _dac.Length);
                break;
            case GraphicsIndex:
                _graphicsIndex = value;
                return;
            case GraphicsData when _graphicsIndex < GraphicsCount:
                _graphics[_graphicsIndex] = value;
                break;
            case ColorIndex:
                _crtcIndex = value;
                return;
            case ColorData when _crtcIndex < CrtcCount:
                SetCrtc(value);
                break;
            default:
                return;
        }
        _changed = true;
    }

    // Index and data share a port; reading status 1 makes the next one an index.
    private void SetAttribute(byte value)
    {
        if (!_attributeExpectsData)
        {
            _attributeIndex = (byte)(value & 0x3f);
        }
        else if ((_attributeIndex & 0x1f) < AttributeCount)
        {
            _attribute[_attributeIndex & 0x1f] = value;
        }
        _attributeExpectsData = !_attributeExpectsData;
    }

    private void SetCrtc(byte value)
    {
        if (_crtcIndex <= Overflow && (_crtc[VerticalRetraceEnd] & Protect) != 0)
        {
            if (_crtcIndex == Overflow)
            {
                const byte LineCompare8 = 1 << 4; // is not protected
                _crtc[Overflow] = (byte)((_crtc[Overflow] & ~LineCompare8) | (value & LineCompare8));
            }
            return;
        }
        _crtc[_crtcIndex] = value;
    }

    private void ReadVbePort(ulong offset, Span<byte> data)
    {
        lock (_lock)
        {
            if (data.Length == 2)
            {
                BinaryPrimitives.WriteUInt16LittleEndian(data, offset == 0 ? _vbeIndex : ReadVbe(_vbeIndex));
            }
        }
    }

    private void WriteVbePort(ulong offset, ReadOnlySpan<byte> data)
    {
        if (data.Length != 2)
        {
            return;
        }
        var value = BinaryPrimitives.ReadUInt16LittleEndian(data);
        lock (_lock)
        {
            if (offset == 0)
            {
                _vbeIndex = value;
            }
            else
            {
                WriteVbe(_vbeIndex, value);
            }
        }
    }

    private ushort ReadVbe(int index)
    {
        lock (_lock)
        {
            var capabilities = (_vbe[VbeEnable] & VbeCapabilities) != 0;
            return index switch
            {
                VbeWidth when capabilities => VbeMaxWidth,
                VbeHeight when capabilities => VbeMaxHeight,
                VbeDepth when capabilities => VbeMaxDepth,
                VbeVirtualHeight when VbePitch != 0 => (ushort)Math.Min(MemorySize / VbePitch, ushort.MaxValue),
                VbeMemory => MemorySize >> 16,
                >= 0 and < VbeCount => _vbe[index],
                _ => 0,
            };
        }
    }

    private void WriteVbe(int index, ushort value)
    {
        lock (_lock)
        {
            var isOn = (_vbe[VbeEnable] & VbeEnabled) != 0;
            switch (index)
            {
                case VbeId when value is >= VbeOldestId and <= VbeNewestId:
                case VbeWidth when !isOn && value is > 0 and <= VbeMaxWidth && value % 8 == 0:
                case VbeHeight when !isOn && value is > 0 and <= VbeMaxHeight:
                case VbeDepth when !isOn && value is 0 or 4 or 8 or 15 or 16 or 24 or 32:
                    _vbe[index] = index == VbeDepth && value == 0 ? (ushort)8 : value;
                    break;
                case VbeBank when (value << 16) < MemorySize:
                    _vbe[index] = value;
                    break;
                case VbeVirtualWidth when value >= _vbe[VbeWidth] && (long)VbePitchOf(value) * _vbe[VbeHeight] <= MemorySize:
                case VbeOffsetX or VbeOffsetY:
                    _vbe[index] = value;
                    CheckVbe();
                    break;
                case VbeEnable:
                    Enable(value, isOn);
                    break;
                default:
                    return;
            }
            _changed = true;
        }
    }

    private void Enable(ushort value, bool wasOn)
    {
        _vbe[VbeEnable] = (ushort)(value & ~VbeKeepMemory);
        if ((value & VbeEnabled) == 0)
        {
            _vbe[VbeBank] = 0;
            return;
        }
        if (wasOn)
        {
            return;
        }
        _vbe[VbeVirtualWidth] = _vbe[VbeWidth];
        _vbe[VbeOffsetX] = _vbe[VbeOffsetY] = _vbe[VbeBank] = 0;
        CheckVbe();
        if ((value & VbeKeepMemory) == 0)
        {
            FillMemory(0, Math.Min(VbePitch * _vbe[VbeHeight], MemorySize));
        }
    }

    private int VbePitch => VbePitchOf(_vbe[VbeVirtualWidth]);

    private int VbePitchOf(int width) => _vbe[VbeDepth] switch
    {
        4 => width / 2, // four planes
        var depth => width * ((depth + 7) / 8),
    };

    // What is shown must lie in memory; a guest can set the registers in any order.
    private void CheckVbe()
    {
        _vbe[VbeWidth] = Math.Min(_vbe[VbeWidth], (ushort)VbeMaxWidth);
        _vbe[VbeHeight] = Math.Min(_vbe[VbeHeight], (ushort)VbeMaxHeight);
        if (_vbe[VbeDepth] is not (4 or 8 or 15 or 16 or 24 or 32))
        {
            _vbe[VbeDepth] = 8;
        }
        _vbe[VbeVirtualWidth] = Math.Max(_vbe[VbeVirtualWidth], _vbe[VbeWidth]);
        if ((long)VbePitch * _vbe[VbeHeight] > MemorySize)
        {
            _vbe[VbeVirtualWidth] = _vbe[VbeWidth];
        }
        var last = (long)(_vbe[VbeOffsetY] + _vbe[VbeHeight]) * VbePitch + (long)_vbe[VbeOffsetX] * 4;
        if (last > MemorySize)
        {
            _vbe[VbeOffsetX] = _vbe[VbeOffsetY] = 0;
        }
    }
}
