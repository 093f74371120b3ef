using KvmSharp.Boot;
using KvmSharp.Devices;
using KvmSharp.GuestTests.Support;

namespace KvmSharp.GuestTests;

/// <summary>Guests in assembly that check the processor and the machine from inside.</summary>
public sealed class AssembledGuestTests
{
    [Fact]
    public async Task GuestChoosesTheExitCode()
    {
        GuestResult result = await GuestRunner.RunAsync("hello");
        Assert.Equal((VmExitKind.DebugExit, 43, "hello\n"), (result.Exit.Kind, result.Exit.ExitCode, result.Output));
    }

    [Theory]
    [InlineData("exceptions", "faults ok\ntraps ok\n")]
    [InlineData("selfmodify", "self-modification ok\n")]
    [InlineData("usermode", "ring 3 ok\ncompatibility mode ok\n")]
    [InlineData("modes", "modes ok\n")]
    public async Task GuestFindsEverythingInOrder(string guest, string output)
    {
        foreach (ClockMode clock in (ClockMode[])[ClockMode.Real, ClockMode.Virtual])
        {
            GuestResult result = await GuestRunner.RunAsync(guest, options => options with { Clock = clock });
            Assert.True(result.Exit is { Kind: VmExitKind.DebugExit, ExitCode: 1 }, result.ToString());
            Assert.Equal(output, result.Output);
        }
    }

    [Theory]
    [InlineData("multiboot.elf")]
    [InlineData("multiboot32.elf")]
    [InlineData("multiboot.bin")]
    public async Task MultibootKernelIsGivenWhatTheSpecificationSays(string image)
    {
        GuestResult result = await GuestRunner.RunAsync("multiboot", options => options with
        {
            Kernel = BootImage.FromFile(TestPaths.Guest(image)),
            CommandLine = "check=1 two",
            Initrd = BootImage.FromBytes("module text"u8.ToArray()),
            VcpuCount = 3,
        });
        Assert.True(result.Exit is { Kind: VmExitKind.DebugExit, ExitCode: 1 }, result.ToString());
        Assert.Equal("multiboot ok\n", result.Output);
    }

    [Fact]
    public async Task TestDeviceAndFirmwareConfigurationWork()
    {
        GuestResult result = await GuestRunner.RunAsync("testdevice", options => options with
        {
            TestDevice = true,
            FwCfgFiles = [new FwCfgFile("opt/test", "file content"u8.ToArray())],
            VcpuCount = 2,
        });
        Assert.True(result.Exit is { Kind: VmExitKind.DebugExit, ExitCode: 1 }, result.ToString());
        Assert.Equal("latch ok\nbuffer ok\ninterrupts ok\nfw_cfg ok\n", result.Output);
    }

    [Fact]
    public async Task TripleFaultEndsTheMachine()
    {
        GuestResult result = await GuestRunner.RunAsync("triplefault");
        Assert.True(result.Exit.Kind == VmExitKind.TripleFault, result.ToString());
        Assert.Equal("going down\n", result.Output);
    }

    [Fact]
    public async Task RunningGuestCanBePausedResumedAndStopped()
    {
        var console = new MemoryCharacterBackend();
        await using var machine = new PcMachine(GuestRunner.Options("spin", console));
        machine.Start();
        Assert.True(console.WaitForOutput("spinning", TimeSpan.FromSeconds(60)) > 0);
        Vcpu vcpu = machine.VirtualMachine.Vcpus[0];
        ulong last = 0;
        for (int i = 0; i < 50; i++)
        {
            machine.VirtualMachine.Pause();
            ulong count = vcpu.InstructionCount;
            for (int wait = 0; count == last && wait < 200; wait++)
            {
                // A busy host may not have run the guest at all in between.
                machine.VirtualMachine.Resume();
                await Task.Delay(5);
                machine.VirtualMachine.Pause();
                count = vcpu.InstructionCount;
            }

            Assert.True(count > last, $"no progress between pauses: {last}, {count}");
            Assert.Equal(count, vcpu.InstructionCount);
            last = count;
            machine.VirtualMachine.Resume();
            await Task.Delay(2);
        }

        machine.VirtualMachine.Stop();
        Assert.Equal(VmExitKind.Stopped, (await machine.WaitForExitAsync()).Kind);
    }

    [Fact]
    public async Task InstructionLimitIsExact()
    {
        await using var machine = new PcMachine(GuestRunner.Options("spin"));
        foreach (ulong count in (ulong[])[1, 2, 3, 100, 101, 5000, 123_457, 10_000_001])
        {
            Assert.True(machine.VirtualMachine.RunUntil(count));
            Assert.Equal(count, machine.VirtualMachine.Vcpus[0].InstructionCount);
        }
    }
}
