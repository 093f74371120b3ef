using System.Diagnostics;
using System.Globalization;
using System.Net;
using System.Net.Sockets;
using System.Text;
using KvmSharp.Boot;
using KvmSharp.Cli.Debian;
using KvmSharp.Cli.Terminal;

namespace KvmSharp.Benchmarks;

/// <summary>
/// A guest fetches a file by HTTP from the host's loopback and sends as much there, through the user-mode network of kvmsharp
/// and of QEMU's translator, in turns: the same kernel, the same programs. The host takes the time.
/// </summary>
internal static class NetworkBenchmark
{
    private const string Peer = "qemu-system-x86_64";
    private const string PeerProcessor = "qemu64,+cx16,+lahf_lm,+popcnt,+sse3,+ssse3,+sse4.1,+sse4.2";
    private const int Size = 100_000_000;
    private const int Transfers = 3; // in one boot
    private static readonly TimeSpan Limit = TimeSpan.FromMinutes(5);

    public static async Task RunAsync(int pairs, ExecutionEngine engine)
    {
        if (HostTool.Find(Peer) is null)
        {
            throw new BenchmarkException($"{Peer} is not installed: there is nothing to compare with");
        }

        var progress = new ProgressLine(Console.Error, !Console.IsErrorRedirected);
        var images = new DebianImages(DebianImages.DefaultCacheDirectory(), progress);
        DebianImage image = await images.ObtainAsync(DebianFlavor.Cloud, refresh: false, CancellationToken.None);
        BootImage initrd = await images.WithModulesAsync(image, CancellationToken.None);
        string directory = Directory.CreateTempSubdirectory("kvmsharp-bench-").FullName;
        try
        {
            string file = Path.Combine(directory, "initrd");
            File.WriteAllBytes(file, initrd.Bytes.ToArray());
            await MeasureAsync(image, file, directory, pairs, engine);
        }
        finally
        {
            Directory.Delete(directory, recursive: true);
        }
    }

    private static async Task MeasureAsync(DebianImage image, string initrd, string directory, int pairs, ExecutionEngine engine)
    {
        using var server = new TransferServer(new byte[Size]);
        // wget sends a file as one text, so there must be no zero in it; BusyBox's nc writes 1 KiB at a time.
        string append = "console=ttyS0 quiet kvmsharp.modules=virtio_pci,virtio_net,af_packet kvmsharp.net=dhcp kvmsharp.run="
            + $"yes,|,head,-c,{Size},>/tmp/data;,for,i,in,{string.Join(',', Enumerable.Range(1, Transfers))};,do,wget,-q,-O,/dev/null,http://10.0.2.2:{server.DownloadPort}/file;,"
            + $"wget,-q,-O,/dev/null,--post-file,/tmp/data,http://10.0.2.2:{server.UploadPort}/file;,done";
        string[] ours =
        [
            "run", "--kernel", image.Kernel, "--initrd", initrd, "--append", append, "--net", "user",
            "--engine", engine.ToString().ToLowerInvariant(),
            "--serial", "file=" + Path.Combine(directory, "ours"), "--no-reboot",
        ];
        string[] peer =
        [
            "-accel", "tcg", "-nodefaults", "-display", "none", "-no-reboot", "-cpu", PeerProcessor, "-m", "512",
            "-kernel", image.Kernel, "-initrd", initrd, "-append", append, "-serial", "file:" + Path.Combine(directory, "peer"),
            "-netdev", "user,id=net", "-device", "virtio-net-pci,netdev=net",
        ];
        Console.WriteLine($"Network: {Size / 1_000_000} MB over HTTP to the guest, and from it, {Transfers} times in each boot; MB/s");
        Console.WriteLine($"{"pair",4}  {"to: kvmsharp",14}  {"QEMU TCG",10}  {"ratio",6}  {"from: kvmsharp",14}  {"QEMU TCG",10}  {"ratio",6}");
        List<double> down = [], up = [];
        for (int pair = 1; pair <= pairs; pair++)
        {
            (double ourDown, double ourUp) = await RunOneAsync(Path.Combine(AppContext.BaseDirectory, "KvmSharp.Cli"), ours, server, directory);
            (double peerDown, double peerUp) = await RunOneAsync(Peer, peer, server, directory);
            down.Add(ourDown / peerDown);
            up.Add(ourUp / peerUp);
            Console.WriteLine(string.Create(CultureInfo.InvariantCulture,
                $"{pair,4}  {ourDown,14:F0}  {peerDown,10:F0}  {ourDown / peerDown,6:F2}  {ourUp,14:F0}  {peerUp,10:F0}  {ourUp / peerUp,6:F2}"));
        }

        Console.WriteLine(string.Create(CultureInfo.InvariantCulture,
            $"median ratio to the guest {Statistics.Median(down):F2}, from the guest {Statistics.Median(up):F2}"));
    }

    private static async Task<(double Down, double Up)> RunOneAsync(string program, string[] arguments, TransferServer server, string directory)
    {
        server.Clear();
        await Programs.RunAsync(program, arguments, Limit);
        if (server.Downloads.Count != Transfers || server.Uploads.Count != Transfers)
        {
            throw new BenchmarkException($"{program}: {server.Downloads.Count} and {server.Uploads.Count} transfers instead of {Transfers}\n"
                + string.Join('\n', Directory.GetFiles(directory).Where(f => !f.EndsWith("initrd", StringComparison.Ordinal)).Select(File.ReadAllText)));
        }

        return (Statistics.Median(server.Downloads), Statistics.Median(server.Uploads));
    }

    /// <summary>Sends a file to who asks, takes what is sent, and notes the rates in MB/s.</summary>
    private sealed class TransferServer : IDisposable
    {
        private readonly byte[] _content;
        private readonly Socket _download = Listen();
        private readonly Socket _upload = Listen();

        public TransferServer(byte[] content)
        {
            _content = content;
            new Thread(() => Serve(_download, Send, Downloads)) { IsBackground = true }.Start();
            new Thread(() => Serve(_upload, Receive, Uploads)) { IsBackground = true }.Start();
        }

        public List<double> Downloads { get; } = [];

        public List<double> Uploads { get; } = [];

        public int DownloadPort => ((IPEndPoint)_download.LocalEndPoint!).Port;

        public int UploadPort => ((IPEndPoint)_upload.LocalEndPoint!).Port;

        public void Clear()
        {
            Downloads.Clear();
            Uploads.Clear();
        }

        public void Dispose()
        {
            _download.Dispose();
            _upload.Dispose();
        }

        private static Socket Listen()
        {
            var socket = new Socket(AddressFamily.InterNetwork, SocketType.Stream, ProtocolType.Tcp);
            socket.Bind(new IPEndPoint(IPAddress.Loopback, 0));
            socket.Listen(4);
            return socket;
        }

        private static void Serve(Socket listener, Func<Socket, TimeSpan> transfer, List<double> rates)
        {
            while (true)
            {
                try
                {
                    using Socket socket = listener.Accept();
                    socket.ReceiveTimeout = 60_000;
                    rates.Add(Size / transfer(socket).TotalSeconds / 1e6);
                }
                catch (Exception exception) when (exception is SocketException or ObjectDisposedException)
                {
                    return; // the measurement is over
                }
            }
        }

        private TimeSpan Send(Socket socket)
        {
            var request = new byte[4096];
            socket.Receive(request);
            long start = Stopwatch.GetTimestamp();
            socket.Send(Encoding.ASCII.GetBytes($"HTTP/1.0 200 OK\r\nContent-Length: {_content.Length}\r\n\r\n"));
            for (int at = 0; at < _content.Length;)
            {
                at += socket.Send(_content, at, _content.Length - at, SocketFlags.None);
            }

            socket.Shutdown(SocketShutdown.Send);
            return socket.Receive(request) == 0 ? Stopwatch.GetElapsedTime(start) : throw new BenchmarkException("the guest sent more than a request");
        }

        // The guest reads its file before it sends anything.
        private TimeSpan Receive(Socket socket)
        {
            var buffer = new byte[1 << 20];
            long bytes = socket.Receive(buffer);
            long start = Stopwatch.GetTimestamp();
            for (int count; bytes < Size && (count = socket.Receive(buffer)) > 0; bytes += count)
            {
                // Nothing is done with it.
            }

            TimeSpan time = Stopwatch.GetElapsedTime(start);
            socket.Send("HTTP/1.0 200 OK\r\nContent-Length: 0\r\n\r\n"u8);
            socket.Shutdown(SocketShutdown.Send);
            while (socket.Receive(buffer) > 0)
            {
                // What is left of the request.
            }

            return time;
        }
    }
}
