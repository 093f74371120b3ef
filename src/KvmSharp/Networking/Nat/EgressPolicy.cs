using System.Net;

namespace KvmSharp.Networking.Nat;

/// <summary>What guests may reach, and the addresses that stand for names at the moment. Used under the network's lock.</summary>
internal sealed class EgressPolicy(IReadOnlyList<EgressRule>? rules)
{
    private const int MaxLearned = 4096;
    private const uint MinSeconds = 60; // a program may take a while from the answer to the connection
    private const uint MaxSeconds = 3600;

    private readonly Dictionary<NetAddress, Learned> _learned = [];

    public int LearnedCount => _learned.Count;

    public bool Permits(EgressProtocol protocol, NetAddress address, int port, long now)
    {
        if (rules is null)
        {
            return true;
        }
        _learned.TryGetValue(address, out var learned);
        foreach (var rule in rules)
        {
            if (rule.Fits(protocol, port)
                && (rule.Name is null ? rule.Network?.Contains(address.ToIPAddress()) ?? true : learned is not null && learned.Holds(rule, now)))
            {
                return true;
            }
        }
        return false;
    }

    /// <summary>Whether a name may be asked for: one that a rule names. Other names would carry messages out.</summary>
    public bool PermitsName(string name) => rules is null || rules.Any(r => r.FitsName(name));

    /// <summary>A name has been answered.</summary>
    public void Learn(string name, IEnumerable<(IPAddress Address, uint Seconds)> addresses, long now)
    {
        if (rules is null)
        {
            return;
        }
        foreach (var rule in rules)
        {
            if (!rule.FitsName(name))
            {
                continue;
            }
            foreach (var (address, seconds) in addresses)
            {
                var key = NetAddress.From(address);
                if (!_learned.TryGetValue(key, out var learned))
                {
                    if (_learned.Count == MaxLearned)
                    {
                        _learned.Remove(_learned.MinBy(l => l.Value.LastUntil).Key);
                    }
                    _learned[key] = learned = new Learned();
                }
                learned.Until[rule] = now + Math.Clamp(seconds, MinSeconds, MaxSeconds) * 1000L;
            }
        }
    }

    public void Clear() => _learned.Clear();

    private sealed class Learned
    {
        public Dictionary<EgressRule, long> Until { get; } = []; // at most one entry for each rule

        public long LastUntil => Until.Values.Max();

        public bool Holds(EgressRule rule, long now) => Until.TryGetValue(rule, out var until) && now < until;
    }
}
