using System.Buffers.Binary;
using System.IO.Compression;
using KvmSharp.Devices;
using KvmSharp.Devices.Pci;

namespace KvmSharp.Tests.Devices;

/// <summary>The VGA, through the buses of a machine that never runs.</summary>
public sealed class VgaAdapterTests : IDisposable
{
    private const ulong Window = 0xa_0000;
    private const ulong FrameBuffer = 0xd000_0000;

    private readonly VirtualMachine _machine = new(new VirtualMachineOptions { MemorySize = 1 << 16, Clock = ClockMode.Virtual });
    private readonly PciHost _pci;
    private readonly VgaAdapter _vga = new(new byte[3000]);

    public VgaAdapterTests()
    {
        _pci = new PciHost(_machine);
        _pci.Add(_vga);
    }

    public void Dispose()
    {
        _machine.Dispose();
        _vga.Dispose();
    }

    [Fact]
    public void TextIsReadAndDrawn()
    {
        SetTextMode(2, 1);
        Assert.True(_vga.IsTextMode);
        _machine.Mmio.Write(0xb_8000, [(byte)'H', 0x07, (byte)'i', 0x1e]);
        LoadGlyph('H', [0x81, 0xff]);
        LoadGlyph('i', [0x01, 0x80]);
        Assert.Equal("Hi\n", _vga.GetText());
        var frame = _vga.Capture();
        Assert.Equal((16, 16), (frame.Width, frame.Height));
        Assert.Equal(0xff000000 | 7 * 0x040404, frame.Pixels[0]); // DAC entry 7: see SetTextMode
        Assert.Equal(0xff000000, frame.Pixels[1]);
        Assert.Equal(0xff000000 | 7 * 0x040404, frame.Pixels[7]);
        Assert.Equal(0xff000000 | 1 * 0x040404, frame.Pixels[8]); // the background of the second character
        Assert.Equal(0xff000000 | 14 * 0x040404, frame.Pixels[15]);
    }

    [Fact]
    public void EveryStateOfTheRegistersMakesAPicture()
    {
        var random = new Random(3);
        var value = new byte[2];
        _machine.Ports.Write(0x1ce, [4, 0]);
        _machine.Ports.Write(0x1d0, [1, 0]); // on, with no size
        _vga.Capture().SavePng(new MemoryStream());
        for (var i = 0; i < 300; i++)
        {
            for (var n = 0; n < 60; n++)
            {
                random.NextBytes(value);
                _machine.Ports.Write(0x3b0u + (uint)random.Next(0x30), value.AsSpan(0, 1 + random.Next(2)));
                if (n % 8 == 0)
                {
                    _machine.Ports.Write(0x1ce, [(byte)random.Next(11), 0]);
                    _machine.Ports.Write(0x1d0, [(byte)random.Next(256), (byte)random.Next(8)]);
                }
            }
            var frame = _vga.Capture();
            Assert.InRange(frame.Width, 1, 2560);
            Assert.InRange(frame.Height, 1, 1600);
            Assert.Equal(frame.Width * frame.Height, frame.Pixels.Length);
            _vga.GetText();
        }
    }

    [Fact]
    public async Task ScreenOfAMachineThatGoesIsNotLookedAt()
    {
        SetTextMode(80, 25);
        var frame = _vga.Capture();
        var looking = Task.Run(() =>
        {
            for (var i = 0; i < 10_000; i++)
            {
                _vga.GetText();
                _vga.Capture();
                _vga.Refresh(frame);
            }
        });
        while (looking.Status < TaskStatus.Running)
        {
            await Task.Yield();
        }
        Dispose();
        await Assert.ThrowsAsync<ObjectDisposedException>(() => looking);
        Assert.Throws<ObjectDisposedException>(_vga.Capture);
        Assert.Throws<ObjectDisposedException>(_vga.GetText);
        Assert.Throws<ObjectDisposedException>(() => _vga.Refresh(frame));
        Assert.Equal(640 * 400, frame.Pixels.Length); // what was taken stays
    }

    [Fact]
    public void ChangesAreTold()
    {
        SetTextMode(80, 25);
        var frame = _vga.Capture();
        Assert.Empty(_vga.Refresh(frame));
        LoadGlyph('#', [0xff]);
        Assert.Empty(_vga.Refresh(frame)); // no such character on the screen
        _machine.Mmio.Write(0xb_8000 + 2 * (80 * 3 + 40), [(byte)'#', 0x07]);
        Assert.Equal([new DisplayRectangle(320, 48, 64, 16)], _vga.Refresh(frame));
        Assert.Equal(0xff000000 | 7 * 0x040404, frame.Pixels[48 * 640 + 320]);
        Assert.Empty(_vga.Refresh(frame));
    }

    [Fact]
    public void PlanesAreWrittenInAllModes()
    {
        SetPlanarMode();
        Sequencer(2, 0x05);
        Write(0, 0xf0); // mode 0
        Assert.Equal([0xf0, 0, 0xf0, 0], Planes(0));
        Sequencer(2, 0x0f);
        Graphics(0, 0x0a);
        Graphics(1, 0x02); // plane 1 from set/reset
        Graphics(8, 0x0f);
        Read(1); // the latches
        Write(1, 0xff);
        Assert.Equal([0x0f, 0x0f, 0x0f, 0x0f], Planes(1));
        Graphics(8, 0xff);
        Graphics(1, 0);
        Graphics(3, 0x18); // exclusive or
        Read(0);
        Write(0, 0xff);
        Assert.Equal([0x0f, 0xff, 0x0f, 0xff], Planes(0));
        Graphics(3, 0);
        Graphics(5, 1); // latches
        Read(0);
        Write(2, 0x00);
        Assert.Equal([0x0f, 0xff, 0x0f, 0xff], Planes(2));
        Graphics(5, 2); // the value is a colour
        Write(3, 0x06);
        Assert.Equal([0, 0xff, 0xff, 0], Planes(3));
        Graphics(5, 3); // the value is a mask
        Graphics(0, 0x09);
        Read(4);
        Write(4, 0x3c);
        Assert.Equal([0x3c, 0, 0, 0x3c], Planes(4));
        Graphics(5, 8); // reading compares
        Graphics(2, 0x09);
        Graphics(7, 0x0f);
        Assert.Equal(0x3c, Read(4));
    }

    [Fact]
    public void SixteenColorsAreDrawn()
    {
        SetPlanarMode();
        Sequencer(2, 0x0f);
        Graphics(5, 2);
        Write(0, 0x0e);
        var frame = _vga.Capture();
        Assert.Equal((640, 480), (frame.Width, frame.Height));
        Assert.Equal(0xff000000 | 14 * 0x040404, frame.Pixels[7]);
        Assert.Equal(0xff000000, frame.Pixels[8]);
        Assert.False(_vga.IsTextMode);
        Assert.Equal("", _vga.GetText());
    }

    [Theory]
    [InlineData(8, 1, 0xff080808)]
    [InlineData(15, 2, 0xff000010)]
    [InlineData(16, 2, 0xff000010)]
    [InlineData(24, 3, 0xff040302)]
    [InlineData(32, 4, 0xff040302)]
    public void LinearFrameBufferIsDrawn(int depth, int bytes, uint expected)
    {
        SetPalette();
        SetVbe(64, 32, depth);
        PlaceFrameBuffer();
        var frame = _vga.Capture();
        Assert.Equal((64, 32), (frame.Width, frame.Height));
        _machine.Memory.Write(FrameBuffer + (ulong)(bytes * (64 * 5 + 3)), new byte[] { 2, bytes > 2 ? (byte)3 : (byte)0, 4, 0 }.AsSpan(0, bytes));
        Assert.Equal([new DisplayRectangle(0, 0, 64, 16)], _vga.Refresh(frame));
        Assert.Equal(expected, frame.Pixels[64 * 5 + 3]);
        Vbe(9, 5); // the view moves down
        _vga.Refresh(frame);
        Assert.Equal(expected, frame.Pixels[3]);
    }

    [Fact]
    public void BankAndLinearFrameBufferAreTheSameMemory()
    {
        SetVbe(640, 480, 8);
        PlaceFrameBuffer();
        Sequencer(4, 0x0e);
        Sequencer(2, 0x0f);
        Graphics(6, 5);
        Vbe(5, 3);
        _machine.Mmio.Write(Window + 0x123, [0x5a]);
        Assert.Equal(0x5a, _machine.Memory.Read<byte>(FrameBuffer + 0x3_0123));
        Vbe(5, 0x1000); // beyond the memory: ignored
        Assert.Equal(3, ReadVbe(5));
    }

    [Fact]
    public void VbeRegistersKeepWithinTheMemory()
    {
        Vbe(4, 2);
        Assert.Equal((2560, 1600, 32), (ReadVbe(1), ReadVbe(2), ReadVbe(3)));
        Assert.Equal(256, ReadVbe(10));
        var random = new Random(5);
        for (var i = 0; i < 20_000; i++)
        {
            Vbe((ushort)random.Next(12), (ushort)random.Next(random.Next(2) == 0 ? 64 : 65536));
            if (i % 200 == 0)
            {
                _vga.Capture();
            }
        }
    }

    [Fact]
    public void AnyRegistersCanBeDrawn()
    {
        var random = new Random(6);
        var data = new byte[8];
        for (var i = 0; i < 60_000; i++)
        {
            random.NextBytes(data);
            var length = 1 << random.Next(4);
            if (random.Next(3) == 0)
            {
                _machine.Mmio.Write(Window + (ulong)random.Next(0x2_0000), data.AsSpan(0, length));
                _machine.Mmio.Read(Window + (ulong)random.Next(0x2_0000), data.AsSpan(0, length));
            }
            else
            {
                _machine.Ports.Write((ulong)random.Next(0x3b0, 0x3e0), data.AsSpan(0, Math.Min(length, 4)));
                _machine.Ports.Read((ulong)random.Next(0x3b0, 0x3e0), data.AsSpan(0, Math.Min(length, 4)));
            }
            if (i % 500 == 0)
            {
                var frame = _vga.Capture();
                Assert.Equal(frame.Width * frame.Height, frame.Pixels.Length);
                _vga.GetText();
            }
        }
        var state = _machine.SaveState();
        _machine.LoadState(state);
    }

    [Fact]
    public void StateIsKept()
    {
        SetTextMode(80, 25);
        _machine.Mmio.Write(0xb_8000, [(byte)'O', 0x07, (byte)'K', 0x07]);
        var state = _machine.SaveState();
        using var machine = new VirtualMachine(new VirtualMachineOptions { MemorySize = 1 << 16, Clock = ClockMode.Virtual });
        using var vga = new VgaAdapter(new byte[3000]);
        new PciHost(machine).Add(vga);
        machine.LoadState(state);
        Assert.StartsWith("OK\n", vga.GetText(), StringComparison.Ordinal);
        Assert.Equal(state.ComputeHash(), machine.ComputeStateHash());
    }

    [Fact]
    public void OptionRomIsWhereTheGuestPutsIt()
    {
        Config(0x30, 0xffff_ffff);
        Assert.Equal(0xffff_f001, ReadConfig(0x30)); // 4 KiB
        Config(0x30, 0xd800_0001);
        Span<byte> data = stackalloc byte[1];
        Assert.False(_machine.Mmio.Read(0xd800_0000, data)); // memory decoding is off
        Config(0x04, 2);
        Assert.True(_machine.Mmio.Read(0xd800_0000, data));
        Assert.Equal(0, data[0]);
        _machine.Mmio.Read(0xd800_0fff, data);
        Assert.Equal(0xff, data[0]);
        Config(0x30, 0xd800_0000);
        Assert.False(_machine.Mmio.Read(0xd800_0000, data));
    }

    [Fact]
    public void PictureIsAValidPng()
    {
        SetVbe(40, 20, 32);
        PlaceFrameBuffer();
        _machine.Memory.Write(FrameBuffer + 4, [0x30, 0x20, 0x10, 0]);
        using var stream = new MemoryStream();
        _vga.Capture().SavePng(stream);
        var png = stream.ToArray();
        Assert.Equal([0x89, 0x50, 0x4e, 0x47, 0x0d, 0x0a, 0x1a, 0x0a], png[..8]);
        Assert.Equal((40, 20), (BinaryPrimitives.ReadInt32BigEndian(png.AsSpan(16)), BinaryPrimitives.ReadInt32BigEndian(png.AsSpan(20))));
        var length = BinaryPrimitives.ReadInt32BigEndian(png.AsSpan(33));
        using var rows = new ZLibStream(new MemoryStream(png, 41, length), CompressionMode.Decompress);
        var pixels = new byte[20 * (1 + 40 * 3)];
        rows.ReadExactly(pixels);
        Assert.Equal([0, 0, 0, 0, 0x10, 0x20, 0x30], pixels[..7]);
        // The check sum of an empty IEND chunk is known.
        Assert.Equal([0, 0, 0, 0, 0x49, 0x45, 0x4e, 0x44, 0xae, 0x42, 0x60, 0x82], png[^12..]);
    }

    private void SetTextMode(int columns, int rows)
    {
        SetPalette();
        Port(0x3c2, 0x63);
        Sequencer(1, 1); // eight dots
        Sequencer(2, 3);
        Sequencer(4, 2);
        Graphics(5, 0x10);
        Graphics(6, 0x0e);
        var lines = rows * 16 - 1;
        Crtc(0x11, 0);
        Crtc(0x01, (byte)(columns - 1));
        Crtc(0x07, (byte)((lines >> 7 & 2) | (lines >> 3 & 0x40)));
        Crtc(0x09, 15);
        Crtc(0x0a, 0x20); // no cursor
        Crtc(0x12, (byte)lines);
        Crtc(0x13, (byte)(columns / 2));
        Crtc(0x17, 0xa3);
    }

    private void SetPlanarMode()
    {
        SetPalette();
        Port(0x3c2, 0xe3);
        Sequencer(1, 1);
        Sequencer(4, 6);
        Graphics(5, 0);
        Graphics(6, 5);
        Crtc(0x11, 0);
        Crtc(0x01, 79);
        Crtc(0x07, 0x02 | 0x10);
        Crtc(0x09, 0x40);
        Crtc(0x12, 0xdf);
        Crtc(0x13, 40);
        Crtc(0x17, 0xe3);
        Crtc(0x18, 0xff);
    }

    // Entry n of palette and DAC is a grey of n.
    private void SetPalette()
    {
        Port(0x3c8, 0);
        for (var i = 0; i < 768; i++)
        {
            Port(0x3c9, (byte)(i / 3));
        }
        Span<byte> data = stackalloc byte[1];
        _machine.Ports.Read(0x3da, data);
        for (byte i = 0; i < 0x15; i++)
        {
            Port(0x3c0, i);
            Port(0x3c0, i switch { < 16 => i, 0x12 => 0x0f, _ => 0 });
        }
        Port(0x3c0, 0x20);
    }

    private void LoadGlyph(char character, byte[] rows)
    {
        Sequencer(2, 4);
        Sequencer(4, 6);
        Graphics(5, 0);
        Graphics(6, 4);
        _machine.Mmio.Write(Window + (ulong)character * 32, rows);
        Sequencer(2, 3);
        Sequencer(4, 2);
        Graphics(5, 0x10);
        Graphics(6, 0x0e);
    }

    private void SetVbe(ushort width, ushort height, int depth)
    {
        Vbe(4, 0);
        Vbe(1, width);
        Vbe(2, height);
        Vbe(3, (ushort)depth);
        Vbe(4, 0x41);
    }

    private void PlaceFrameBuffer()
    {
        Config(0x10, (uint)FrameBuffer);
        Config(0x04, 2);
    }

    private byte[] Planes(ulong offset)
    {
        var mode = ReadIndexed(0x3ce, 5);
        Graphics(5, 0);
        var result = new byte[4];
        for (byte plane = 0; plane < 4; plane++)
        {
            Graphics(4, plane);
            result[plane] = Read(offset);
        }
        Graphics(5, mode);
        return result;
    }

    private byte Read(ulong offset)
    {
        Span<byte> data = stackalloc byte[1];
        _machine.Mmio.Read(Window + offset, data);
        return data[0];
    }

    private void Write(ulong offset, byte value) => _machine.Mmio.Write(Window + offset, [value]);

    private void Port(ulong port, byte value) => _machine.Ports.Write(port, [value]);

    private byte ReadIndexed(ulong port, byte index)
    {
        Port(port, index);
        Span<byte> data = stackalloc byte[1];
        _machine.Ports.Read(port + 1, data);
        return data[0];
    }

    private void Sequencer(byte index, byte value) => _machine.Ports.Write(0x3c4, [index, value]);

    private void Graphics(byte index, byte value) => _machine.Ports.Write(0x3ce, [index, value]);

    private void Crtc(byte index, byte value) => _machine.Ports.Write(0x3d4, [index, value]);

    private void Vbe(ushort index, ushort value)
    {
        _machine.Ports.Write(0x1ce, BitConverter.GetBytes(index));
        _machine.Ports.Write(0x1cf, BitConverter.GetBytes(value));
    }

    private ushort ReadVbe(ushort index)
    {
        _machine.Ports.Write(0x1ce, BitConverter.GetBytes(index));
        Span<byte> data = stackalloc byte[2];
        _machine.Ports.Read(0x1d0, data);
        return BitConverter.ToUInt16(data);
    }

    private void Config(byte offset, uint value)
    {
        _machine.Ports.Write(0xcf8, BitConverter.GetBytes(0x8000_0000 | 1u << 11 | offset));
        _machine.Ports.Write(0xcfc, BitConverter.GetBytes(value));
    }

    private uint ReadConfig(byte offset)
    {
        _machine.Ports.Write(0xcf8, BitConverter.GetBytes(0x8000_0000 | 1u << 11 | offset));
        Span<byte> data = stackalloc byte[4];
        _machine.Ports.Read(0xcfc, data);
        return BitConverter.ToUInt32(data);
    }
}
