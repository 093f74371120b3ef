using KvmSharp.GuestTests.Support;

namespace KvmSharp.GuestTests;

/// <summary>The NuGet package works in a project that knows nothing but a folder with the package.</summary>
public sealed class PackageTests : IDisposable
{
    private const string Project = """
        <Project Sdk="Microsoft.NET.Sdk">
          <PropertyGroup>
            <OutputType>Exe</OutputType>
            <TargetFramework>net10.0</TargetFramework>
          </PropertyGroup>
          <ItemGroup>
            <PackageReference Include="KvmSharp" Version="*" />
          </ItemGroup>
        </Project>
        """;

    // B0 2A: mov al, 42; E6 F4: out 0xf4, al; F4: hlt
    private const string Program = """
        using KvmSharp;
        using System;
        using System.Threading.Tasks;

        using var machine = new VirtualMachine(new VirtualMachineOptions { MemorySize = 1 << 20 });
        machine.Ports.Map(new ExitPort(machine), 0xf4, 1);
        machine.Memory.Write(0x1000, new byte[] { 0xb0, 0x2a, 0xe6, 0xf4, 0xf4 });
        Vcpu vcpu = machine.Vcpus[0];
        SpecialRegisters special = vcpu.GetSpecialRegisters();
        special.Cs.Base = 0;
        special.Cs.Selector = 0;
        vcpu.SetSpecialRegisters(special);
        Registers registers = vcpu.GetRegisters();
        registers.Rip = 0x1000;
        vcpu.SetRegisters(registers);
        machine.Start();
        Console.WriteLine($"guest said {(await machine.WaitForExitAsync()).ExitCode}");

        class ExitPort(IMachineControl machine) : IIoDevice
        {
            public void Read(ulong offset, Span<byte> data) { }
            public void Write(ulong offset, ReadOnlySpan<byte> data) => machine.RequestExit(data[0]);
        }
        """;

    private readonly TemporaryDirectory _directory = new();

    [Fact]
    public async Task PackageWorksInAnEmptyProject()
    {
        string feed = Directory.CreateDirectory(_directory.File("feed")).FullName;
        string application = Directory.CreateDirectory(_directory.File("application")).FullName;
        string library = Path.Combine(TestPaths.RepositoryRoot, "src", "KvmSharp");
        await DotnetAsync(library, "pack", "-c", "Release", "-o", feed);
        Assert.Single(Directory.GetFiles(feed, "KvmSharp.*.nupkg"));

        File.WriteAllText(Path.Combine(application, "application.csproj"), Project);
        File.WriteAllText(Path.Combine(application, "Program.cs"), Program);
        File.WriteAllText(Path.Combine(application, "nuget.config"), $"""
            <configuration>
              <packageSources>
                <clear />
                <add key="local" value="{feed}" />
              </packageSources>
            </configuration>
            """);
        await DotnetAsync(application, "build", "-c", "Release", "-o", _directory.File("output"));
        CommandResult run = await CommandRunner.RunAsync(_directory.File("output/application"), []);
        Assert.True(run.Status == 0, run.ToString());
        Assert.Equal("guest said 42\n", run.Output);
    }

    public void Dispose() => _directory.Dispose();

    private async Task DotnetAsync(string directory, params string[] arguments)
    {
        var environment = new Dictionary<string, string>
        {
            ["NUGET_PACKAGES"] = _directory.File("packages"),
            ["DOTNET_CLI_TELEMETRY_OPTOUT"] = "1",
            ["DOTNET_NOLOGO"] = "1",
            // The test host passes settings of its own build on; they are not those of a user.
            ["MSBUILDDISABLENODEREUSE"] = "1",
        };
        CommandResult result = await CommandRunner.RunAsync(
            "dotnet", arguments, TimeSpan.FromMinutes(4), directory: directory, environment: environment);
        Assert.True(result.Status == 0, result.ToString());
    }
}
