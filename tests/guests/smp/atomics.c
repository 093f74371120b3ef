/* Locked operations, also across lines and pages, and values that must not tear. */
#include "smp.h"

static u8 area[4 * PAGE] __attribute__((aligned(PAGE)));
static u64 pair[2] __attribute__((aligned(16))) = { 0, ~0ul };
static struct lined wrong[MAX_CPUS], extra[MAX_CPUS];
static volatile u32 stop;

static u64 sum(struct lined *values)
{
    u64 total = 0;
    for (u32 n = 0; n < options.cpus; n++) total += values[n].value;
    return total;
}

/* Each operation n times per processor; what they leave behind is known. */
static u64 rmw(u32 cpu)
{
    static volatile u64 inc, added, exchanged, guarded, dec;
    static volatile u32 lock, bits;
    u64 state = options.seed + cpu, failures = 0, own = 0;
    for (u64 n = 0; n < options.iterations; n++) {
        random_delay(&state, 15);
        __asm__ volatile("lock inc %0" : "+m"(inc) : : "cc");
        u64 k = n & 7, old = k;
        __asm__ volatile("lock xadd %0, %1" : "+m"(added), "+r"(old) : : "cc", "memory");
        own += k;
        for (u64 seen = exchanged;;) {
            u64 before = seen;
            __asm__ volatile("lock cmpxchg %0, %2" : "+m"(exchanged), "+a"(seen) : "r"(seen + 3) : "cc", "memory");
            if (seen == before) break;
        }
        for (;;) {
            u32 taken = 1;
            __asm__ volatile("xchg %0, %1" : "+m"(lock), "+r"(taken) : : "memory");
            if (!taken) break;
            pause();
        }
        guarded++;
        __asm__ volatile("" : : : "memory");
        lock = 0;
        __asm__ volatile("lock sub %0, 2" : "+m"(dec) : : "cc");
        u8 was;
        __asm__ volatile("lock btc %1, %2; setc %0" : "=r"(was), "+m"(bits) : "r"(cpu) : "cc");
        if (was != (n & 1)) failures++;
        u64 low = pair[0], high = pair[1];
        for (u8 done = 0; !done;)
            __asm__ volatile("lock cmpxchg16b [%3]\n setz %0"
                             : "=q"(done), "+a"(low), "+d"(high) : "r"(pair), "b"(low + 1), "c"(~(low + 1)) : "cc", "memory");
        if (high != ~low) failures++;
        u8 *byte = &area[200];
        __asm__ volatile("lock add byte ptr [%0], 1" : : "r"(byte) : "cc", "memory");
        __asm__ volatile("lock add word ptr [%0], 1" : : "r"(byte + 2) : "cc", "memory");
    }
    wrong[cpu].value = failures;
    extra[cpu].value = own;
    barrier(cpu);
    if (cpu) return 0;
    u64 all = options.iterations * options.cpus;
    u32 expected_bits = options.iterations & 1 ? (1u << options.cpus) - 1 : 0;
    report("rmw", "operations", all * 9);
    return sum(wrong) + (inc != all) + (added != sum(extra)) + (exchanged != 3 * all) + (guarded != all) + (dec + 2 * all != 0) +
           (bits != expected_bits) + (pair[0] != all) + (pair[1] != ~all) + (area[200] != (u8)all) +
           (*(unsigned short *)&area[202] != (unsigned short)all);
}

/* Across a line, across a page, and such an operation beside one of an aligned half of it. */
static u64 split(u32 cpu)
{
    u8 *line = area + LINE - 2, *page = area + PAGE - 3, *wide = area + 10 * LINE - 4, *page16 = area + 2 * PAGE - 1;
    u64 state = options.seed + cpu;
    for (u64 n = 0; n < options.iterations; n++) {
        random_delay(&state, 15);
        __asm__ volatile("lock inc dword ptr [%0]" : : "r"(line) : "cc", "memory");
        __asm__ volatile("lock inc dword ptr [%0]" : : "r"(page) : "cc", "memory");
        __asm__ volatile("lock add word ptr [%0], 3" : : "r"(page16) : "cc", "memory");
        if (cpu & 1) __asm__ volatile("lock inc dword ptr [%0]" : : "r"(wide + 4) : "cc", "memory");
        else __asm__ volatile("lock add qword ptr [%0], %1" : : "r"(wide), "r"(1ul << 32 | 1) : "cc", "memory");
    }
    barrier(cpu);
    if (cpu) return 0;
    u64 all = options.iterations * options.cpus, even = options.iterations * ((options.cpus + 1) / 2);
    report("split", "operations", all * 4);
    return (*(u32 *)line != (u32)all) + (*(u32 *)page != (u32)all) + (*(unsigned short *)page16 != (unsigned short)(3 * all)) +
           (*(u32 *)wide != (u32)even) + (*(u32 *)(wide + 4) != (u32)all);
}

/* SDM 3A "Guaranteed Atomic Operations": aligned ones, and others within a line. */
static u64 tearing(u32 cpu)
{
    static volatile u64 *const places[] = { (u64 *)area, (u64 *)(area + 5), (u64 *)(area + LINE - 8), (u64 *)(area + LINE + 33) };
    u64 bad = 0;
    for (u64 n = 0; cpu == 0 && n < options.iterations; n++)
        for (u32 k = 0; k < 4; k += 1 + (k == 0)) *places[k] = n & 1 ? ~0ul : 0; /* places 0 and 1 overlap */
    if (cpu == 0) stop = 1;
    while (!stop)
        for (u32 k = 0; k < 4; k += 1 + (k == 0)) {
            u64 v = *places[k];
            if (v != 0 && v != ~0ul) bad++;
        }
    wrong[cpu].value = bad;
    barrier(cpu);
    if (cpu) return 0;
    report("tearing", "stores", options.iterations * 3);
    return sum(wrong);
}

u64 atomics_run(u32 cpu, const char *name)
{
    if (same(name, "rmw")) return rmw(cpu);
    if (same(name, "split")) return split(cpu);
    if (same(name, "tearing")) return tearing(cpu);
    return NOT_MINE;
}
