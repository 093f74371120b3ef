using System.Text;

namespace KvmSharp.Devices;

/// <content>What the screen shows.</content>
public sealed unsafe partial class VgaAdapter
{
    private const int MaxTextColumns = 256;
    private const int MaxTextRows = 128;
    private const string ControlCharacters =
        " ☺☻♥♦♣♠•◘○◙♂♀♪♫☼►◄↕‼¶§▬↨↑↓→←∟↔▲▼";
    private const string UpperHalf =
        "⌂ÇüéâäàåçêëèïîìÄÅÉæÆôöòûùÿÖÜ¢£¥₧ƒáíóúñÑªº¿⌐¬½¼¡«»░▒▓│┤╡╢╖╕╣║╗╝╜╛┐└┴┬├─┼╞╟╚╔╩╦╠═╬╧╨╤╥╙╘╒╓╫╪┘┌█▄▌▐▀αßΓπΣσµτΦΘΩδ∞φε∩≡±≥≤⌠⌡÷≈°∙·√ⁿ²■\u00a0";

    // What the last frame was made of; a frame without changes is not made anew.
    private DisplayFrame? _lastFrame;

    /// <summary>Whether the screen shows characters, so that <see cref="GetText"/> has something to tell.</summary>
    public bool IsTextMode
    {
        get
        {
            lock (_lock)
            {
                return IsTextModeLocked;
            }
        }
    }

    // Switched on without a size it shows nothing.
    private bool IsVbe => (_vbe[VbeEnable] & VbeEnabled) != 0 && _vbe[VbeWidth] != 0 && _vbe[VbeHeight] != 0;

    private bool IsTextModeLocked => !IsVbe && (_graphics[Miscellaneous] & IsGraphics) == 0 && _crtc[HorizontalDisplayEnd] != 0;

    /// <summary>
    /// The characters on the screen, those of code page 437 as Unicode: one line for each row, without blanks at its end. Callable
    /// from any thread.
    /// </summary>
    /// <returns>The text; empty in a graphics mode.</returns>
    /// <exception cref="ObjectDisposedException">The adapter has been disposed, with its machine for example.</exception>
    public string GetText()
    {
        lock (_lock)
        {
            ObjectDisposedException.ThrowIf(_isDisposed, this);
            if (!IsTextModeLocked)
            {
                return "";
            }
            var (columns, rows, _, _) = TextSize;
            var text = new StringBuilder();
            var line = new StringBuilder();
            for (var row = 0; row < rows; row++)
            {
                line.Clear();
                for (var column = 0; column < columns; column++)
                {
                    line.Append(ToUnicode(CellAt(row, column)[0]));
                }
                text.Append(line.ToString().TrimEnd()).Append('\n');
            }
            return text.ToString();
        }
    }

    /// <summary>Makes a frame of what the screen shows. Callable from any thread.</summary>
    /// <exception cref="ObjectDisposedException">The adapter has been disposed, with its machine for example.</exception>
    public DisplayFrame Capture()
    {
        var frame = new DisplayFrame();
        Refresh(frame);
        return frame;
    }

    /// <summary>Brings a frame of this adapter up to date. Callable from any thread, for one frame from one at a time.</summary>
    /// <param name="frame">What <see cref="Capture"/> gave.</param>
    /// <returns>The parts that have changed; the whole screen when its size has.</returns>
    /// <exception cref="ObjectDisposedException">The adapter has been disposed, with its machine for example.</exception>
    public IReadOnlyList<DisplayRectangle> Refresh(DisplayFrame frame)
    {
        ArgumentNullException.ThrowIfNull(frame);
        int width, height;
        uint[] pixels;
        lock (_lock)
        {
            ObjectDisposedException.ThrowIf(_isDisposed, this);
            CollectDirtyPages();
            if (!_changed && ReferenceEquals(_lastFrame, frame))
            {
                return [];
            }
            (width, height, pixels) = Render();
            _changed = false;
            _lastFrame = frame;
        }
        return frame.Update(width, height, pixels);
    }

    private static char ToUnicode(byte code) => code switch
    {
        < 0x20 => ControlCharacters[code],
        < 0x7f => (char)code,
        _ => UpperHalf[code - 0x7f],
    };

    private (int Columns, int Rows, int CellWidth, int CellHeight) TextSize
    {
        get
        {
            var columns = Math.Min(_crtc[HorizontalDisplayEnd] + 1, MaxTextColumns);
            var cellHeight = (_crtc[MaximumScanLine] & 0x1f) + 1;
            var rows = Math.Clamp(ScanLines / cellHeight, 1, MaxTextRows);
            return (columns, rows, (_sequencer[ClockingMode] & EightDots) != 0 ? 8 : 9, cellHeight);
        }
    }

    // "Vertical Display Enable End" has bits 8 and 9 in the overflow register.
    private int ScanLines
    {
        get
        {
            var lines = (_crtc[VerticalDisplayEnd] | (_crtc[Overflow] & 2) << 7 | (_crtc[Overflow] & 0x40) << 3) + 1;
            return (_crtc[MaximumScanLine] & DoubleScan) != 0 ? Math.Max(lines / 2, 1) : lines;
        }
    }

    private int StartAddress => _crtc[StartAddressHigh] << 8 | _crtc[StartAddressLow];

    private ReadOnlySpan<byte> CellAt(int row, int column)
    {
        var cell = (StartAddress + row * _crtc[OffsetRegister] * 2 + column) % PlaneSize;
        return new ReadOnlySpan<byte>(_memory.Address + cell * 4, 4); // character, attribute, font
    }

    private (int Width, int Height, uint[] Pixels) Render()
    {
        if (IsVbe)
        {
            return _vbe[VbeDepth] == 4 ? RenderPlanes(_vbe[VbeWidth], _vbe[VbeHeight]) : RenderLinear();
        }
        if (_crtc[HorizontalDisplayEnd] == 0)
        {
            return (640, 480, Black(640, 480)); // nobody has set a mode yet
        }
        if (IsTextModeLocked)
        {
            return RenderText();
        }
        var width = (_crtc[HorizontalDisplayEnd] + 1) * 8;
        if ((_graphics[GraphicsMode] & Shift256) != 0)
        {
            width /= 2;
        }
        return RenderPlanes(width, Math.Max(ScanLines / RepeatedLines, 1));
    }

    // Rows that only repeat the one above are left out, unless the row scan counter takes part in the address.
    private int RepeatedLines => (_crtc[ModeControl] & 3) == 3 ? (_crtc[MaximumScanLine] & 0x1f) + 1 : 1;

    private bool IsBlank => (_sequencer[ClockingMode] & ScreenOff) != 0 || (_attributeIndex & PaletteSource) == 0;

    private static uint[] Black(int width, int height)
    {
        var pixels = new uint[width * height];
        Array.Fill(pixels, 0xff00_0000);
        return pixels;
    }

    private (int Width, int Height, uint[] Pixels) RenderText()
    {
        var (columns, rows, cellWidth, cellHeight) = TextSize;
        var (width, height) = (columns * cellWidth, rows * cellHeight);
        var pixels = Black(width, height);
        if (IsBlank)
        {
            return (width, height, pixels);
        }
        Span<uint> palette = stackalloc uint[16];
        ReadPalette(palette);
        var blink = (_attribute[AttributeMode] & Blink) != 0;
        var (fontA, fontB) = Fonts;
        var cursor = (_crtc[CursorStart] & CursorOff) == 0 ? _crtc[CursorHigh] << 8 | _crtc[CursorLow] : -1;
        for (var row = 0; row < rows; row++)
        {
            for (var column = 0; column < columns; column++)
            {
                var cell = CellAt(row, column);
                var attribute = cell[1];
                var foreground = palette[attribute & 0x0f];
                var background = palette[(attribute >> 4) & (blink ? 7 : 15)];
                var font = (attribute & 8) != 0 ? fontA : fontB;
                var hasNinth = (_attribute[AttributeMode] & LineGraphics) != 0 && (cell[0] & 0xe0) == 0xc0;
                var isCursor = cursor == (StartAddress + row * _crtc[OffsetRegister] * 2 + column) % PlaneSize;
                for (var y = 0; y < cellHeight; y++)
                {
                    uint bits = _memory.Address[(font + cell[0] * 32 + y) % PlaneSize * 4 + 2];
                    bits = cellWidth == 9 ? bits << 1 | (hasNinth ? bits & 1 : 0) : bits;
                    if (isCursor && y >= (_crtc[CursorStart] & 0x1f) && y <= (_crtc[CursorEnd] & 0x1f))
                    {
                        bits = uint.MaxValue;
                    }
                    var line = pixels.AsSpan((row * cellHeight + y) * width + column * cellWidth, cellWidth);
                    for (var x = 0; x < cellWidth; x++)
                    {
                        line[x] = (bits >> (cellWidth - 1 - x) & 1) != 0 ? foreground : background;
                    }
                }
            }
        }
        return (width, height, pixels);
    }

    // "Character Map Select": bits 2, 3 and 5 are map A, 0, 1 and 4 map B.
    private (int A, int B) Fonts
    {
        get
        {
            static int Address(int map) => (map & 3) * 0x4000 + (map >> 2) * 0x2000;
            var select = _sequencer[CharacterMapSelect];
            return (Address((select >> 2 & 3) | (select >> 3 & 4)), Address((select & 3) | (select >> 2 & 4)));
        }
    }

    // Sixteen colours through the attribute controller, or as they are, to entries of the DAC.
    private void ReadPalette(Span<uint> palette)
    {
        for (var i = 0; i < 16; i++)
        {
            var index = _attribute[i] & 0x3f;
            index = (_attribute[AttributeMode] & PaletteBits45) != 0
                ? (index & 0x0f) | (_attribute[ColorSelect] & 0x0f) << 4
                : index | (_attribute[ColorSelect] & 0x0c) << 4;
            palette[i] = Color(index);
        }
    }

    private uint Color(int index)
    {
        var entry = _dac.AsSpan((index & _dacMask) * 3, 3);
        if ((_vbe[VbeEnable] & VbeDac8) != 0)
        {
            return 0xff00_0000 | (uint)entry[0] << 16 | (uint)entry[1] << 8 | entry[2];
        }
        static uint Widen(byte value) => (uint)((value & 0x3f) << 2 | (value & 0x3f) >> 4);
        return 0xff00_0000 | Widen(entry[0]) << 16 | Widen(entry[1]) << 8 | Widen(entry[2]);
    }

    private (int Width, int Height, uint[] Pixels) RenderPlanes(int width, int height)
    {
        var pixels = Black(width, height);
        if (IsBlank && !IsVbe)
        {
            return (width, height, pixels);
        }
        var colors = new uint[256];
        var is256 = !IsVbe && (_graphics[GraphicsMode] & Shift256) != 0;
        if (is256)
        {
            for (var i = 0; i < colors.Length; i++)
            {
                colors[i] = Color(i);
            }
        }
        else
        {
            ReadPalette(colors);
        }
        var enabled = _attribute[PlaneEnable] & 0x0f;
        var panning = is256 ? (_attribute[PixelPanning] & 7) / 2 : _attribute[PixelPanning] & 7;
        var lineCompare = _crtc[LineCompare] | (_crtc[Overflow] & 0x10) << 4 | (_crtc[MaximumScanLine] & 0x40) << 3;
        lineCompare /= RepeatedLines * ((_crtc[MaximumScanLine] & DoubleScan) != 0 ? 2 : 1);
        for (var y = 0; y < height; y++)
        {
            var (start, row, pan) = !IsVbe && y > lineCompare ? (0, y - lineCompare - 1, 0) : (FirstAddress, y, panning);
            var line = pixels.AsSpan(y * width, width);
            for (var x = 0; x < width; x++)
            {
                line[x] = colors[is256 ? Dot256(start, row, x + pan) : Dot16(start, row, x + pan) & (byte)enabled];
            }
        }
        return (width, height, pixels);
    }

    private int FirstAddress => IsVbe ? (_vbe[VbeOffsetY] * VbePitch * 2 + _vbe[VbeOffsetX]) / 8 : StartAddress;

    // The address in a plane of the character clock that shows a dot. "CRT Controller", "Mode Control Register"
    private uint PlaneAddress(int start, int row, int clock)
    {
        if (IsVbe)
        {
            return (uint)(start + row * _vbe[VbeVirtualWidth] / 8 + clock) % (MemorySize / 4);
        }
        var scans = RepeatedLines == 1 ? (_crtc[MaximumScanLine] & 0x1f) + 1 : 1;
        var address = (uint)(start + row / scans * _crtc[OffsetRegister] * 2 + clock);
        // Word and double-word mode show every second and fourth byte of a plane; here those lie next to each other.
        var shift = (_crtc[Underline] & DoubleWordMode) != 0 ? 2 : (_crtc[ModeControl] & ByteMode) != 0 ? 0 : 1;
        address <<= shift;
        for (var bit = 0; bit < 2; bit++)
        {
            if ((_crtc[ModeControl] >> bit & 1) == 0)
            {
                address = (address & ~(0x2000u << bit)) | (uint)(row % scans >> bit & 1) << (13 + bit);
            }
        }
        return (address >> shift) % PlaneSize;
    }

    private byte Dot256(int start, int row, int x) => _memory.Address[PlaneAddress(start, row, x / 4) * 4 + x % 4];

    private int Dot16(int start, int row, int x)
    {
        var planes = _memory.Address + PlaneAddress(start, row, x / 8) * 4;
        if (!IsVbe && (_graphics[GraphicsMode] & ShiftInterleave) != 0)
        {
            // Two bits a dot: the first four dots from planes 0 and 2, the others from 1 and 3.
            var half = x / 4 % 2;
            var low = planes[half] >> (6 - 2 * (x % 4)) & 3;
            var high = planes[half + 2] >> (6 - 2 * (x % 4)) & 3;
            return low | high << 2;
        }
        var bit = 7 - x % 8;
        return (planes[0] >> bit & 1) | (planes[1] >> bit & 1) << 1 | (planes[2] >> bit & 1) << 2 | (planes[3] >> bit & 1) << 3;
    }

    private (int Width, int Height, uint[] Pixels) RenderLinear()
    {
        int width = _vbe[VbeWidth], height = _vbe[VbeHeight], depth = _vbe[VbeDepth];
        var bytes = (depth + 7) / 8;
        var pixels = new uint[width * height];
        var colors = new uint[256];
        for (var i = 0; i < colors.Length && depth == 8; i++)
        {
            colors[i] = Color(i);
        }
        for (var y = 0; y < height; y++)
        {
            var source = new ReadOnlySpan<byte>(
                _memory.Address + (_vbe[VbeOffsetY] + y) * VbePitch + _vbe[VbeOffsetX] * bytes, width * bytes);
            var line = pixels.AsSpan(y * width, width);
            for (var x = 0; x < width; x++)
            {
                line[x] = depth switch
                {
                    8 => colors[source[x]],
                    15 => FromBits(source[2 * x] | source[2 * x + 1] << 8, 5),
                    16 => FromBits(source[2 * x] | source[2 * x + 1] << 8, 6),
                    _ => 0xff00_0000 | (uint)source[bytes * x + 2] << 16 | (uint)source[bytes * x + 1] << 8 | source[bytes * x],
                };
            }
        }
        return (width, height, pixels);
    }

    private static uint FromBits(int value, int greenBits)
    {
        var red = value >> (5 + greenBits) & 0x1f;
        var green = value >> 5 & ((1 << greenBits) - 1);
        var blue = value & 0x1f;
        return 0xff00_0000 | (uint)(red << 3 | red >> 2) << 16
            | (uint)(green << (8 - greenBits) | green >> (2 * greenBits - 8)) << 8 | (uint)(blue << 3 | blue >> 2);
    }
}
