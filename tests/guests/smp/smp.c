/* Starts all processors and runs the test that the command line names. */
#include "smp.h"

#define TRAMPOLINE 0x10000ul
#define APIC 0xfee00000ul

struct options options = { .iterations = 20000, .seed = 1, .cpus = 2 };

extern u8 trampoline_start[], trampoline_end[], trampoline_cr3[];
extern u64 idt[512];
extern volatile u32 next_cpu;
void fault_entry(void);

static volatile u32 started;
static struct lined arrived[MAX_CPUS];
static u64 page_table[512] __attribute__((aligned(PAGE)));

static void outb(u32 port, u8 value) { __asm__ volatile("out %w1, %b0" : : "a"(value), "d"(port)); }
static volatile u32 *apic(u32 reg) { return (volatile u32 *)(APIC + reg); }

void say(const char *text)
{
    while (*text) outb(0xe9, (u8)*text++);
}

void say_number(u64 value)
{
    char digits[24], *p = digits + sizeof digits - 1;
    *p = 0;
    do *--p = (char)('0' + value % 10);
    while (value /= 10);
    say(p);
}

int same(const char *a, const char *b)
{
    while (*a && *a == *b) a++, b++;
    return *a == *b;
}

void report(const char *name, const char *what, u64 value)
{
    say(name);
    say(": ");
    say(what);
    say("=");
    say_number(value);
    say("\n");
}

void finish(int failed)
{
    outb(0xf4, (u8)failed);
    for (;;) __asm__ volatile("hlt");
}

/* Without an error code its place holds the RIP. */
__attribute__((used)) void fault(u64 first, u64 second, u64 cr2)
{
    report("unexpected exception", "first word", first);
    report("unexpected exception", "second word", second);
    report("unexpected exception", "cr2", cr2);
    finish(2);
}

u64 random_next(u64 *state)
{
    u64 x = *state;
    x ^= x << 13;
    x ^= x >> 7;
    x ^= x << 17;
    return *state = x;
}

void random_delay(u64 *state, u64 mask)
{
    for (u64 n = random_next(state) & mask; n; n--) __asm__ volatile("" : : : "memory");
}

void barrier(u32 cpu)
{
    u64 generation = arrived[cpu].value + 1;
    __asm__ volatile("xchg %0, %1" : "+r"(generation), "+m"(arrived[cpu].value) : : "memory");
    generation++;
    for (u32 n = 0; n < options.cpus; n++)
        while (arrived[n].value < generation) pause();
    __asm__ volatile("" : : : "memory");
}

u32 this_cpu(void) { return *apic(0x20) >> 24; }

/* SDM 3A "Issuing Interprocessor Interrupts" */
void send_ipi_to_others(u32 vector) { *apic(0x300) = 0xc4000 | vector; }
void end_of_interrupt(void) { *apic(0xb0) = 0; }

void set_gate(u32 vector, void (*entry)(void))
{
    u64 to = (u64)entry;
    idt[2 * vector] = (to & 0xffff) | 8ul << 16 | 0x8e00ul << 32 | (to >> 16 & 0xffff) << 48;
    idt[2 * vector + 1] = to >> 32;
}

u64 *map_page_table(u64 address)
{
    u64 cr3;
    __asm__ volatile("mov %0, cr3" : "=r"(cr3));
    u64 *pml4 = (u64 *)(cr3 & ~0xffful), *pdpt = (u64 *)(pml4[0] & ~0xffful), *pd = (u64 *)(pdpt[address >> 30] & ~0xffful);
    pd[address >> 21 & 511] = (u64)page_table | 3;
    __asm__ volatile("mov cr3, %0" : : "r"(cr3) : "memory");
    return page_table;
}

static void run(u32 cpu)
{
    *apic(0xf0) = 0x1ff; /* software enable */
    barrier(cpu);
    u64 bad = litmus_run(cpu, options.test);
    if (bad == NOT_MINE) bad = atomics_run(cpu, options.test);
    if (bad == NOT_MINE) bad = storms_run(cpu, options.test);
    barrier(cpu);
    if (cpu != 0) return;
    if (bad == NOT_MINE) say("no such test\n");
    else report(options.test, "violations", bad);
    finish(bad != 0);
}

__attribute__((used)) void ap_main(void)
{
    u32 cpu = this_cpu();
    __atomic_fetch_add(&started, 1, __ATOMIC_SEQ_CST);
    if (cpu < options.cpus) run(cpu);
}

static u64 number(const char **p)
{
    u64 value = 0;
    while (**p >= '0' && **p <= '9') value = value * 10 + (u64)(*(*p)++ - '0');
    return value;
}

/* "test=NAME n=N seed=N cpus=N" */
static void parse(const char *p)
{
    while (*p) {
        const char *value = p;
        while (*value && *value != '=' && *value != ' ') value++;
        char first = *p;
        if (*value == '=') value++;
        p = value;
        if (first == 'n') options.iterations = number(&p);
        else if (first == 's') options.seed = number(&p);
        else if (first == 'c') options.cpus = (u32)number(&p);
        else if (first == 't')
            for (u32 n = 0; n + 1 < sizeof options.test && *p && *p != ' '; n++) options.test[n] = *p++;
        while (*p && *p != ' ') p++;
        while (*p == ' ') p++;
    }
}

__attribute__((used)) void boot_main(u64 zero_page)
{
    parse((const char *)(u64)*(u32 *)(zero_page + 0x228));
    for (u32 vector = 0; vector < 32; vector++) set_gate(vector, fault_entry);
    u64 cr3;
    __asm__ volatile("mov %0, cr3" : "=r"(cr3));
    *(u32 *)trampoline_cr3 = (u32)cr3;
    for (u64 n = 0; n < (u64)(trampoline_end - trampoline_start); n++) ((volatile u8 *)TRAMPOLINE)[n] = trampoline_start[n];
    *apic(0xf0) = 0x1ff;
    if (options.cpus > 1) {
        *apic(0x300) = 0xc4500; /* INIT, all but this one */
        *apic(0x300) = 0xc4600 | (u32)(TRAMPOLINE >> 12);
    }
    while (started + 1 < options.cpus) pause();
    run(0);
}
