using KvmSharp.Devices;

namespace KvmSharp.Tests.State;

public sealed class MachineStateTests
{
    [Theory]
    [InlineData(1)]
    [InlineData(1000)]
    [InlineData(77_777)]
    public void LoadedMachineGoesOnTheSame(ulong count)
    {
        using var first = CreatePc();
        Assert.True(first.VirtualMachine.RunUntil(count));
        var stream = new MemoryStream();
        first.VirtualMachine.SaveState(stream);

        using var second = CreatePc();
        stream.Position = 0;
        second.VirtualMachine.LoadState(stream);
        Assert.Equal(first.VirtualMachine.ComputeStateHash(), second.VirtualMachine.ComputeStateHash());
        Assert.True(first.VirtualMachine.RunUntil(count + 54_321));
        Assert.True(second.VirtualMachine.RunUntil(count + 54_321));
        Assert.Equal(first.VirtualMachine.ComputeStateHash(), second.VirtualMachine.ComputeStateHash());
        Assert.Equal(first.VirtualMachine.SaveState().ComputeHash(), second.VirtualMachine.ComputeStateHash());
    }

    [Fact]
    public void HashTellsStatesApart()
    {
        using var machine = CreatePc();
        var before = machine.VirtualMachine.ComputeStateHash();
        Assert.Equal(before, machine.VirtualMachine.ComputeStateHash());
        machine.VirtualMachine.Memory.Write<byte>(0x1f_ffff, 1);
        Assert.NotEqual(before, machine.VirtualMachine.ComputeStateHash());
        machine.VirtualMachine.Memory.Write<byte>(0x1f_ffff, 0);
        Assert.Equal(before, machine.VirtualMachine.ComputeStateHash());
        machine.VirtualMachine.Ports.Write(0x80, [1]);
        Assert.NotEqual(before, machine.VirtualMachine.ComputeStateHash());
    }

    [Fact]
    public void PausedMachineTakesAState()
    {
        using var machine = CreatePc();
        machine.VirtualMachine.RunUntil(1000);
        var state = machine.VirtualMachine.SaveState();
        var hash = state.ComputeHash();
        machine.VirtualMachine.RunUntil(50_000);
        var later = machine.VirtualMachine.ComputeStateHash();
        machine.VirtualMachine.LoadState(state);
        Assert.Equal(1000u, machine.VirtualMachine.Vcpus[0].InstructionCount);
        Assert.Equal(hash, machine.VirtualMachine.ComputeStateHash());
        Assert.True(machine.VirtualMachine.RunUntil(50_000));
        Assert.Equal(later, machine.VirtualMachine.ComputeStateHash());
    }

    [Fact]
    public async Task MachineMayBeDisposedWhileItsStateIsTaken()
    {
        for (var i = 0; i < 10; i++)
        {
            var machine = CreatePc();
            var taken = new TaskCompletionSource();
            void TakeForEver()
            {
                while (true)
                {
                    machine.VirtualMachine.ComputeStateHash();
                    taken.TrySetResult();
                }
            }
            var taking = Task.Run((Action)TakeForEver);
            await Task.WhenAny(taken.Task, taking);
            machine.Dispose();
            await Assert.ThrowsAnyAsync<InvalidOperationException>(() => taking); // of which ObjectDisposedException is one
        }
    }

    [Fact]
    public void StateWithAPartTwiceIsDamaged()
    {
        using var machine = CreatePc();
        var state = machine.VirtualMachine.SaveState();
        var stream = new MemoryStream();
        new MachineState([.. state.Sections, state.Sections[^1]]).Save(stream);
        stream.Position = 0;
        Assert.Throws<MachineStateException>(() => machine.VirtualMachine.LoadState(stream));
    }

    [Fact]
    public void InterruptLinesKeepTheirLevels()
    {
        using var first = CreatePc();
        first.PowerManagement!.PressPowerButton();
        first.VirtualMachine.Ports.Write(0x602, [0, 1]); // enable: the SCI goes high
        var state = first.VirtualMachine.SaveState();
        using var second = CreatePc();
        second.VirtualMachine.LoadState(state);
        Assert.Equal(state.ComputeHash(), second.VirtualMachine.ComputeStateHash());
        second.VirtualMachine.Ports.Write(0x600, [0, 1]);
        first.VirtualMachine.Ports.Write(0x600, [0, 1]);
        Assert.Equal(first.VirtualMachine.ComputeStateHash(), second.VirtualMachine.ComputeStateHash());
    }

    [Fact]
    public void OtherMachinesAreRefused()
    {
        using var machine = CreatePc();
        var state = machine.VirtualMachine.SaveState();
        PcMachineOptions[] others =
        [
            Options() with { MemorySize = 8 << 20 },
            Options() with { Clock = ClockMode.Real },
            Options() with { Cpu = CpuModel.Default.Without("sse4.2") },
            Options() with { RealTimeClock = false },
            Options() with { Acpi = false },
            Options() with { SerialPorts = [new MemoryCharacterBackend(), new MemoryCharacterBackend()] },
        ];
        foreach (var options in others)
        {
            using var other = new PcMachine(options);
            var e = Assert.Throws<MachineStateException>(() => other.VirtualMachine.LoadState(state));
            Assert.EndsWith(".", e.Message);
        }
    }

    [Fact]
    public void DamagedStreamsAreRefused()
    {
        using var machine = CreatePc();
        var stream = new MemoryStream();
        machine.VirtualMachine.SaveState(stream);
        var bytes = stream.ToArray();
        var random = new Random(5);
        for (var i = 0; i < 50; i++)
        {
            var damaged = (byte[])bytes.Clone();
            damaged[i < 25 ? random.Next(200) : random.Next(bytes.Length)] ^= (byte)random.Next(1, 256);
            Assert.Throws<MachineStateException>(() => MachineState.Load(new MemoryStream(damaged)));
            Assert.Throws<MachineStateException>(() => MachineState.Load(new MemoryStream(bytes, 0, random.Next(bytes.Length))));
        }
        Assert.Throws<MachineStateException>(() => MachineState.Load(new MemoryStream()));
        Assert.Throws<MachineStateException>(() => MachineState.Load(new MemoryStream(new byte[1000])));
        var noise = new byte[5000];
        random.NextBytes(noise);
        Assert.Throws<MachineStateException>(() => MachineState.Load(new MemoryStream(noise)));
    }

    [Fact]
    public void ForgedStatesAreRefusedOrHarmless()
    {
        using var source = CreatePc();
        source.VirtualMachine.RunUntil(500);
        var state = source.VirtualMachine.SaveState();
        var random = new Random(9);
        var loaded = 0;
        for (var i = 0; i < 150; i++)
        {
            var sections = state.Sections.ToArray();
            var index = random.Next(sections.Length);
            var data = sections[index].Data.ToArray();
            if (data.Length == 0)
            {
                continue;
            }
            for (var n = random.Next(1, 4); n > 0; n--)
            {
                data[random.Next(data.Length)] = (byte)random.Next(256);
            }
            sections[index] = sections[index] with { Data = random.Next(5) == 0 ? data[..random.Next(data.Length)] : data };
            using var machine = CreatePc();
            try
            {
                machine.VirtualMachine.LoadState(new MachineState(sections));
                machine.VirtualMachine.RunUntil(machine.VirtualMachine.Vcpus[0].InstructionCount + 1000, new CancellationTokenSource(2000).Token);
                loaded++;
            }
            catch (Exception e) when (e is MachineStateException or OperationCanceledException)
            {
                // refused, or the guest sleeps
            }
        }
        Assert.True(loaded > 0);
    }

    // A guest that uses timer, serial port, real-time clock and memory.
    private static PcMachine CreatePc()
    {
        var machine = new PcMachine(Options());
        byte[] code =
        [
            0xb0, 0x83, 0xba, 0xfb, 0x03, 0x00, 0x00, 0xee, // mov al, 0x83; mov edx, 0x3fb; out dx, al
            // 1:
            0x48, 0xff, 0xc3, // inc rbx
            0x48, 0x89, 0x1c, 0xdd, 0, 0, 0x10, 0, // mov [rbx * 8 + 0x100000], rbx
            0x48, 0x81, 0xe3, 0xff, 0xff, 0, 0, // and rbx, 0xffff
            0xb0, 0x00, 0xe6, 0x70, 0xe4, 0x71, // mov al, 0; out 0x70, al; in al, 0x71
            0xe4, 0x40, // in al, 0x40
            0xe6, 0x80, // out 0x80, al
            0x0f, 0x31, // rdtsc
            0xba, 0x08, 0x06, 0x00, 0x00, 0xed, // mov edx, 0x608; in eax, dx
            0xeb, 0xda, // jmp 1b
        ];
        KvmSharp.Boot.FlatLoader.Load(machine.VirtualMachine.Memory, machine.VirtualMachine.Vcpus[0], KvmSharp.Boot.BootImage.FromBytes(code), 0x10000);
        return machine;
    }

    private static PcMachineOptions Options() => new()
    {
        MemorySize = 4 << 20,
        Clock = ClockMode.Virtual,
        SerialPorts = [new MemoryCharacterBackend()],
    };
}
