/* What the guests of several processors share. */
#ifndef SMP_H
#define SMP_H

typedef unsigned char u8;
typedef unsigned u32;
typedef unsigned long u64;

#define MAX_CPUS 16
#define LINE 64
#define PAGE 4096

struct options {
    u64 iterations, seed;
    u32 cpus;
    char test[32];
};
extern struct options options;

/* Each on a cache line of its own. */
struct lined { volatile u64 value; u8 rest[LINE - 8]; };

static inline void pause(void) { __asm__ volatile("pause"); }
static inline void serialize(void)
{
    u32 a = 0, b, c = 0, d;
    __asm__ volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d) : : "memory");
}

int same(const char *a, const char *b); /* texts */
void say(const char *text);
void say_number(u64 value);
void report(const char *name, const char *what, u64 value); /* "name: what=value" */
__attribute__((noreturn)) void finish(int failed);

u64 random_next(u64 *state);
void random_delay(u64 *state, u64 mask);

/* All processors meet; none goes on before the last has come. */
void barrier(u32 cpu);

void send_ipi_to_others(u32 vector);
void end_of_interrupt(void);
void set_gate(u32 vector, void (*entry)(void));
void shootdown_entry(void);
void shootdown_interrupt(void);
u64 *map_page_table(u64 address); /* a table of 4 KiB pages for 2 MiB at address */
u32 this_cpu(void);

/* One test: run on every processor; processor 0 returns the number of violations. */
u64 litmus_run(u32 cpu, const char *name);
u64 atomics_run(u32 cpu, const char *name);
u64 storms_run(u32 cpu, const char *name);
#define NOT_MINE (~0ul)

#endif
