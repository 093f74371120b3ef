namespace KvmSharp.Devices;

/// <summary>A part of a screen.</summary>
/// <param name="X">The leftmost column.</param>
/// <param name="Y">The topmost row.</param>
/// <param name="Width">The number of columns.</param>
/// <param name="Height">The number of rows.</param>
public readonly record struct DisplayRectangle(int X, int Y, int Width, int Height);

/// <summary>What a screen showed at one moment. Not for use by several threads at once while it is refreshed.</summary>
public sealed class DisplayFrame
{
    private uint[] _pixels = [];

    internal DisplayFrame()
    {
    }

    /// <summary>The number of columns; 0 before anything was shown.</summary>
    public int Width { get; private set; }

    /// <summary>The number of rows.</summary>
    public int Height { get; private set; }

    /// <summary>The pixels by rows from the top, each 0xFFRRGGBB.</summary>
    public ReadOnlySpan<uint> Pixels => _pixels;

    /// <summary>Writes the frame as a PNG image (8 bits for each of red, green and blue).</summary>
    /// <param name="stream">Where it goes.</param>
    public void SavePng(Stream stream)
    {
        ArgumentNullException.ThrowIfNull(stream);
        PngWriter.Write(stream, Width, Height, _pixels);
    }

    /// <summary>Writes the frame as a PNG image.</summary>
    /// <param name="path">The file; an existing one is replaced.</param>
    public void SavePng(string path)
    {
        using var file = File.Create(path);
        SavePng(file);
    }

    /// <summary>Takes over a new picture.</summary>
    /// <returns>What has changed: tiles, joined along rows.</returns>
    internal IReadOnlyList<DisplayRectangle> Update(int width, int height, uint[] pixels)
    {
        const int TileWidth = 64;
        const int TileHeight = 16;
        if (width != Width || height != Height)
        {
            (Width, Height, _pixels) = (width, height, pixels);
            return width == 0 || height == 0 ? [] : [new DisplayRectangle(0, 0, width, height)];
        }
        var changed = new List<DisplayRectangle>();
        for (var y = 0; y < height; y += TileHeight)
        {
            var rows = Math.Min(TileHeight, height - y);
            var open = false;
            for (var x = 0; x < width; x += TileWidth)
            {
                var columns = Math.Min(TileWidth, width - x);
                if (!Differs(pixels, x, y, columns, rows))
                {
                    open = false;
                    continue;
                }
                if (open)
                {
                    changed[^1] = changed[^1] with { Width = changed[^1].Width + columns };
                }
                else
                {
                    changed.Add(new DisplayRectangle(x, y, columns, rows));
                }
                open = true;
            }
        }
        _pixels = pixels;
        return changed;
    }

    private bool Differs(uint[] pixels, int x, int y, int columns, int rows)
    {
        for (var row = y; row < y + rows; row++)
        {
            var start = row * Width + x;
            if (!pixels.AsSpan(start, columns).SequenceEqual(_pixels.AsSpan(start, columns)))
            {
                return true;
            }
        }
        return false;
    }
}
