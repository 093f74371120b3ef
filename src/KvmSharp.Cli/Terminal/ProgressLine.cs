using System.Diagnostics;
using System.Globalization;

namespace KvmSharp.Cli.Terminal;

/// <summary>Where long work reports how far it is.</summary>
internal interface IProgressSink
{
    /// <summary>A new piece of work has begun.</summary>
    void Step(string what);

    /// <summary>So many bytes of the current piece are done; <paramref name="total"/> may be 0 (unknown).</summary>
    void Advance(string what, long done, long total);

    /// <summary>Removes what is shown.</summary>
    void Clear();
}

/// <summary>One line on a terminal that is rewritten in place; plain lines per step elsewhere.</summary>
internal sealed class ProgressLine(TextWriter writer, bool isTerminal) : IProgressSink
{
    private readonly Stopwatch _sinceStart = Stopwatch.StartNew();
    private int _shownWidth;
    private string _lastStep = "";

    public void Step(string what)
    {
        if (isTerminal)
        {
            Show(what);
        }
        else if (what != _lastStep)
        {
            writer.WriteLine(string.Create(CultureInfo.InvariantCulture, $"kvmsharp: {what}"));
        }

        _lastStep = what;
    }

    public void Advance(string what, long done, long total)
    {
        const double MiB = 1 << 20;
        if (!isTerminal)
        {
            Step(what);
        }
        else if (total > 0)
        {
            Show(string.Create(CultureInfo.InvariantCulture, $"{what}  {done / MiB:F1} of {total / MiB:F1} MiB  ({Math.Min(100, done * 100 / total)} %)"));
        }
        else
        {
            Show(string.Create(CultureInfo.InvariantCulture, $"{what}  {_sinceStart.Elapsed.TotalSeconds:F0} s"));
        }
    }

    public void Clear()
    {
        if (isTerminal && _shownWidth > 0)
        {
            writer.Write("\r" + new string(' ', _shownWidth) + "\r");
            _shownWidth = 0;
        }
    }

    private void Show(string text)
    {
        writer.Write("\r" + text.PadRight(_shownWidth));
        _shownWidth = text.Length;
    }
}
