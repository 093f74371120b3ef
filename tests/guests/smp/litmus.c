/*
 * Litmus tests of two processors: what each stores and loads, how often each outcome came, and that no
 * outcome came that the memory model forbids. SDM 3A "Memory Ordering in P6 and More Recent Processor
 * Families"; the names are those of the literature.
 */
#include "smp.h"

#define BATCH 256

/* x and y far apart, then in one line with code, then in two pages. */
struct cell { volatile u64 x; u8 gap[LINE - 8]; volatile u64 y; u8 rest[LINE - 8]; };
static struct cell cells[BATCH] __attribute__((aligned(PAGE)));
static struct { u64 a, b; } results[2][BATCH];
static struct lined at[2];
static u64 fillers[2][64] __attribute__((aligned(PAGE)));

/* Stores first, so that the one under test waits in the store buffer. */
static inline void fill_store_buffer(u32 cpu)
{
    for (u32 n = 0; n < 64; n += 8) *(volatile u64 *)&fillers[cpu][n] = n;
}

#define STORE(to, value) "mov qword ptr [" to "], " value "\n"
#define LOAD(reg, from) "mov " reg ", qword ptr [" from "]\n"
#define X "%[x]"
#define Y "%[y]"
#define A "%[a]"
#define B "%[b]"
#define BODY(name, first, second)                                                                          \
    static void name(u32 cpu, struct cell *c, u64 *ra, u64 *rb)                                            \
    {                                                                                                      \
        u64 a = 0, b = 0, one = 1;                                                                         \
        if (cpu == 0)                                                                                      \
            __asm__ volatile(first : [a] "+&r"(a), [b] "+&r"(b), [one] "+&r"(one) : [x] "r"(&c->x), [y] "r"(&c->y) : "memory", "cc");  \
        else                                                                                               \
            __asm__ volatile(second : [a] "+&r"(a), [b] "+&r"(b), [one] "+&r"(one) : [x] "r"(&c->x), [y] "r"(&c->y) : "memory", "cc"); \
        *ra = a;                                                                                           \
        *rb = b;                                                                                           \
    }

BODY(sb, STORE(X, "1") LOAD(A, Y), STORE(Y, "1") LOAD(A, X))
BODY(sb_mfence, STORE(X, "1") "mfence\n" LOAD(A, Y), STORE(Y, "1") "mfence\n" LOAD(A, X))
BODY(sb_xchg, "xchg qword ptr [" X "], %[one]\n" LOAD(A, Y), "xchg qword ptr [" Y "], %[one]\n" LOAD(A, X))
BODY(sb_lock, STORE(X, "1") "lock or dword ptr [rsp], 0\n" LOAD(A, Y), STORE(Y, "1") "lock or dword ptr [rsp], 0\n" LOAD(A, X))
BODY(sb_cpuid, STORE(X, "1") "push rbx\n push rcx\n push rdx\n push rax\n cpuid\n pop rax\n pop rdx\n pop rcx\n pop rbx\n" LOAD(A, Y),
     STORE(Y, "1") "push rbx\n push rcx\n push rdx\n push rax\n cpuid\n pop rax\n pop rdx\n pop rcx\n pop rbx\n" LOAD(A, X))
/* A processor sees its own store at once. */
BODY(sb_own, STORE(X, "1") LOAD(B, X) LOAD(A, Y), STORE(Y, "1") LOAD(B, Y) LOAD(A, X))
BODY(mp, STORE(X, "1") STORE(Y, "1"), LOAD(A, Y) LOAD(B, X))
BODY(mp_string, STORE(X, "1") "push rdi\n push rcx\n push rax\n lea rdi, [" Y "]\n mov ecx, 8\n mov al, 1\n rep stosb\n pop rax\n pop rcx\n pop rdi\n",
     LOAD(A, Y) LOAD(B, X))
BODY(lb, LOAD(A, X) STORE(Y, "1"), LOAD(A, Y) STORE(X, "1"))
BODY(corr, STORE(X, "1"), LOAD(A, X) LOAD(B, X))
BODY(two_two_w, STORE(X, "1") STORE(Y, "2"), STORE(Y, "1") STORE(X, "2"))
BODY(s, STORE(X, "2") STORE(Y, "1"), LOAD(A, Y) STORE(X, "1"))

struct outcome { u64 a0, b0, a1, b1, x, y; };

static int both_zero(const struct outcome *o) { return o->a0 == 0 && o->a1 == 0; }
static int never(const struct outcome *o) { (void)o; return 0; }
static int not_own(const struct outcome *o) { return o->b0 != 1 || o->b1 != 1; }
static int late_data(const struct outcome *o) { return o->a1 != 0 && o->b1 == 0; }
static int both_one(const struct outcome *o) { return o->a0 == 1 && o->a1 == 1; }
static int backwards(const struct outcome *o) { return o->a1 == 1 && o->b1 == 0; }
static int both_first(const struct outcome *o) { return o->x == 1 && o->y == 1; }
static int overtaken(const struct outcome *o) { return o->a1 == 1 && o->x == 2; }

static const struct litmus {
    const char *name;
    void (*body)(u32 cpu, struct cell *c, u64 *a, u64 *b);
    int (*forbidden)(const struct outcome *o);
    int (*relaxed)(const struct outcome *o); /* allowed, and to be seen */
} tests[] = {
    { "sb", sb, never, both_zero },
    { "sb_mfence", sb_mfence, both_zero, never },
    { "sb_xchg", sb_xchg, both_zero, never },
    { "sb_lock", sb_lock, both_zero, never },
    { "sb_cpuid", sb_cpuid, both_zero, never },
    { "sb_own", sb_own, not_own, both_zero },
    { "mp", mp, late_data, never },
    { "mp_string", mp_string, late_data, never },
    { "lb", lb, both_one, never },
    { "corr", corr, backwards, never },
    { "2+2w", two_two_w, both_first, never },
    { "s", s, overtaken, never },
};

/* Both are at the same iteration when they go on. */
static inline void meet(u32 cpu, u64 n)
{
    at[cpu].value = n;
    for (u32 spins = 0; at[cpu ^ 1].value < n; spins++)
        if (spins > 2000) pause();
}

static u64 run_litmus(u32 cpu, const struct litmus *t)
{
    u64 state = options.seed * 0x9e3779b97f4a7c15ul + cpu * 77 + 1, forbidden = 0, relaxed = 0, seen[4] = { 0 }, step = 0;
    for (u64 done = 0; done < options.iterations; done += BATCH) {
        if (cpu == 0)
            for (u32 n = 0; n < BATCH; n++) cells[n].x = cells[n].y = 0;
        barrier(cpu);
        if (cpu < 2) {
            u64 mask = (1ul << (random_next(&state) % 7)) - 1;
            int filled = random_next(&state) & 1;
            for (u32 n = 0; n < BATCH; n++) {
                meet(cpu, ++step);
                random_delay(&state, mask);
                if (filled) fill_store_buffer(cpu);
                t->body(cpu, &cells[n], &results[cpu][n].a, &results[cpu][n].b);
            }
        }
        barrier(cpu);
        for (u32 n = 0; cpu == 0 && n < BATCH; n++) {
            struct outcome o = { results[0][n].a, results[0][n].b, results[1][n].a, results[1][n].b, cells[n].x, cells[n].y };
            forbidden += (u64)t->forbidden(&o);
            relaxed += (u64)t->relaxed(&o);
            seen[(o.a0 != 0) * 2 + (o.a1 != 0)]++;
        }
    }
    if (cpu == 0) {
        report(t->name, "iterations", seen[0] + seen[1] + seen[2] + seen[3]);
        report(t->name, "00", seen[0]);
        report(t->name, "01", seen[1]);
        report(t->name, "10", seen[2]);
        report(t->name, "11", seen[3]);
        report(t->name, "relaxed", relaxed);
    }
    return forbidden;
}

u64 litmus_run(u32 cpu, const char *name)
{
    for (u32 n = 0; n < sizeof tests / sizeof tests[0]; n++)
        if (same(tests[n].name, name)) return run_litmus(cpu, &tests[n]);
    return NOT_MINE;
}
