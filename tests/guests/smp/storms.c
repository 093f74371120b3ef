/* Code that other processors run is rewritten, and pages that they use are mapped elsewhere, as fast as it goes. */
#include "smp.h"

#define SHOOTDOWN_VECTOR 0x40
#define WINDOW 0x30000000ul /* beyond the machine's memory: mapped by the table below only */
#define POISON 0xdeadul

static u8 code[PAGE] __attribute__((aligned(PAGE)));
static struct lined stage[MAX_CPUS], wrong[MAX_CPUS];
static volatile u32 stop;

static u64 sum(struct lined *values)
{
    u64 total = 0;
    for (u32 n = 0; n < options.cpus; n++) total += values[n].value;
    return total;
}

static u32 call(u8 *at)
{
    u32 value;
    __asm__ volatile("call %1" : "=a"(value) : "r"(at) : "memory", "cc");
    return value;
}

/* mov eax, value; ret, the value aligned. */
static void write_code(u8 *at, u32 value)
{
    at[3] = 0xb8;
    *(volatile u32 *)(at + 4) = value;
    at[8] = 0xc3;
}

/*
 * SDM 3A "Handling Self- and Cross-Modifying Code": one writes, says so, the others serialize and run what was
 * written. Each processor writes in turn.
 */
static u64 crossmodify(u32 cpu)
{
    u64 state = options.seed + cpu, bad = 0;
    for (u64 n = 1; n <= options.iterations; n++) {
        u8 *at = code + 64 * (n & 3);
        if (n % options.cpus == cpu) {
            random_delay(&state, 63);
            if (n & 4) write_code(at, (u32)n);
            else { /* the same by another instruction: add eax, 1 after one less */
                static const u8 text[] = { 0x90, 0xb8, 0, 0, 0, 0, 0x83, 0xc0, 0x01, 0xc3 };
                for (u32 k = 0; k < sizeof text; k++) ((volatile u8 *)at)[3 + k] = text[k];
                for (u32 k = 0; k < 4; k++) ((volatile u8 *)at)[5 + k] = (u8)((n - 1) >> 8 * k);
            }
        } else {
            for (u32 spins = 0; stage[n % options.cpus].value < n; spins++)
                if (spins > 2000) pause();
            serialize();
        }
        if (call(at + 3) != (u32)n) bad++;
        stage[cpu].value = n;
        for (u32 k = 0; k < options.cpus; k++) /* nobody runs what is written next */
            for (u32 spins = 0; stage[k].value + 3 < n; spins++)
                if (spins > 2000) pause();
    }
    wrong[cpu].value = bad;
    barrier(cpu);
    if (cpu) return 0;
    report("crossmodify", "rewrites", options.iterations);
    return sum(wrong);
}

/*
 * The same without a branch in between: what follows the CPUID is fetched after it, however it was decoded
 * before. wait_and_run returns the operand that stands there when *flag has reached n.
 */
u32 wait_and_run(volatile u64 *flag, u64 n);
extern volatile u32 patched_operand;
__asm__(".pushsection .wtext, \"awx\"\n"
        ".balign 4096\n"
        "wait_and_run:\n"
        "push rbx\n"
        "1: cmp [rdi], rsi\n"
        "jb 1b\n"
        "cpuid\n"
        ".balign 4\n"
        "nop\n nop\n nop\n .byte 0xb8\n"
        "patched_operand: .long 0\n"
        "pop rbx\n"
        "ret\n"
        ".balign 4096\n"
        ".popsection\n");

static u64 patchwait(u32 cpu)
{
    u64 state = options.seed, bad = 0;
    for (u64 n = 1; n <= options.iterations; n++) {
        if (cpu == 0) {
            for (u32 k = 1; k < options.cpus; k++)
                for (u32 spins = 0; stage[k].value + 1 < n; spins++)
                    if (spins > 2000) pause();
            random_delay(&state, 127);
            patched_operand = (u32)n;
            stage[0].value = n;
        } else {
            if (wait_and_run(&stage[0].value, n) != (u32)n) bad++;
            stage[cpu].value = n;
        }
    }
    wrong[cpu].value = bad;
    barrier(cpu);
    if (cpu) return 0;
    report("patchwait", "rewrites", options.iterations);
    return sum(wrong);
}

/* Rewritten while the others run it: an aligned operand is the old or the new one, and in the end the last. */
static u64 codestorm(u32 cpu)
{
    u64 bad = 0, calls = 0;
    u8 *at = code + 1024;
    if (cpu == 0) write_code(at, 0);
    barrier(cpu);
    if (cpu == 0) {
        for (u32 n = 1; n <= options.iterations; n++) {
            *(volatile u32 *)(at + 4) = (n & 0xffff) * 0x10001;
            if ((n & 63) == 0) pause();
        }
        stop = 1;
    } else {
        while (!stop) {
            u32 value = call(at + 3);
            if (value >> 16 != (value & 0xffff)) bad++;
            calls++;
        }
        serialize();
        if (call(at + 3) != (options.iterations & 0xffff) * 0x10001) bad++;
    }
    wrong[cpu].value = bad;
    stage[cpu].value = calls;
    barrier(cpu);
    if (cpu) return 0;
    report("codestorm", "rewrites", options.iterations);
    report("codestorm", "calls", sum(stage));
    return sum(wrong);
}

static volatile u64 *table;
static volatile u64 generation;
static struct lined acknowledged[MAX_CPUS];
static u64 pages[3][PAGE / 8] __attribute__((aligned(PAGE)));

void shootdown_interrupt(void)
{
    u64 now = generation;
    if (now & 1) {
        __asm__ volatile("invlpg [%0]" : : "r"(WINDOW) : "memory");
    } else {
        u64 cr3;
        __asm__ volatile("mov %0, cr3\n mov cr3, %0" : "=r"(cr3) : : "memory");
    }
    acknowledged[this_cpu()].value = now;
    end_of_interrupt();
}

/*
 * A page is mapped to one of three places in turn. Once all have acknowledged, the place before is poisoned:
 * nobody may see that or store there. What each counted in the page must be there.
 */
static u64 shootdown(u32 cpu)
{
    u64 bad = 0, counted = 0, found[MAX_CPUS] = { 0 };
    volatile u64 *window = (volatile u64 *)WINDOW;
    if (cpu == 0) {
        table = map_page_table(WINDOW);
        table[0] = (u64)pages[0] | 3;
        set_gate(SHOOTDOWN_VECTOR, shootdown_entry);
    }
    barrier(cpu);
    if (cpu == 0) {
        for (u64 n = 1; n <= options.iterations; n++) {
            u64 *next = pages[n % 3], *before = pages[(n - 1) % 3];
            next[0] = n;
            for (u32 k = 1; k < options.cpus; k++) next[8 * k] = 0;
            generation = n;
            table[0] = (u64)next | 3;
            send_ipi_to_others(SHOOTDOWN_VECTOR);
            for (u32 k = 1; k < options.cpus; k++)
                while (acknowledged[k].value < n) pause();
            before[0] = POISON << 32;
            for (u32 k = 1; k < options.cpus; k++) {
                found[k] += before[8 * k];
                before[8 * k] = POISON << 32;
            }
        }
        stop = 1;
    } else {
        __asm__ volatile("sti");
        while (!stop) {
            u64 least = acknowledged[cpu].value, seen = window[0], most = generation;
            if (seen < least || seen > most) bad++;
            __asm__ volatile("lock inc %0" : "+m"(window[8 * cpu]) : : "cc", "memory");
            if (++counted % 64 == 0) pause();
        }
        __asm__ volatile("cli");
        stage[cpu].value = counted;
    }
    wrong[cpu].value = bad;
    barrier(cpu);
    if (cpu) return 0;
    for (u32 k = 1; k < options.cpus; k++) {
        found[k] += pages[options.iterations % 3][8 * k];
        if (found[k] != stage[k].value) bad++;
    }
    report("shootdown", "remaps", options.iterations);
    report("shootdown", "accesses", sum(stage));
    return sum(wrong) + bad;
}

u64 storms_run(u32 cpu, const char *name)
{
    if (same(name, "crossmodify")) return crossmodify(cpu);
    if (same(name, "patchwait")) return patchwait(cpu);
    if (same(name, "codestorm")) return codestorm(cpu);
    if (same(name, "shootdown")) return shootdown(cpu);
    return NOT_MINE;
}
