/*
 * Both engines on the same random instruction streams: after each, the complete state of the processor and
 * the memory must be the same, and so must be what led there - exits, their order, instruction counts.
 */
#define KVS_LIBFUZZER
#include <stdbool.h>
static bool lockstep_done(unsigned long long n);
#define INSN_STREAM_DONE(n) lockstep_done(n)
#include "insn_stream.c"

#define EPOCH_CASES 40
struct outcome {
    struct kvs_regs regs;
    struct kvs_sregs sregs;
    struct kvs_fpu fpu;
    struct kvs_vcpu_events events;
    uint64_t retired;
    bool kicked;
};
static struct outcome expected[EPOCH_CASES];
static uint8_t memory[EPOCH_CASES][RAM_SIZE];
static bool comparing;
static uint64_t compared, kicked;

static void show(const char *what, const void *a, const void *b, size_t size)
{
    const uint8_t *x = a, *y = b;
    for (size_t i = 0; i < size; i++)
        if (x[i] != y[i]) fprintf(stderr, "  %s+%zu: interpreter %02x, jit %02x\n", what, i, x[i], y[i]);
}

/* A case that had to be kicked ended where it happened to be: nothing behind it repeats. */
static bool lockstep_done(unsigned long long n)
{
    struct outcome o;
    memset(&o, 0, sizeof o);
    if (comparing ? expected[n].kicked || g.kicked : g.kicked) {
        expected[n].kicked = true;
        kicked++;
        return true;
    }
    g.run->immediate_exit = 1;
    kvs_vcpu_run(g.c);
    g.run->immediate_exit = 0;
    struct kvs_core_state s;
    FUZZ_CHECK(kvs_vcpu_get_regs(g.c, &o.regs) == 0 && kvs_vcpu_get_sregs(g.c, &o.sregs) == 0 &&
               kvs_vcpu_get_fpu(g.c, &o.fpu) == 0 && kvs_vcpu_get_events(g.c, &o.events) == 0 &&
               kvs_vcpu_get_core_state(g.c, &s) == 0);
    o.retired = s.retired;
    struct outcome *e = &expected[n];
    if (!comparing) {
        *e = o;
        memcpy(memory[n], g.m, RAM_SIZE);
        return false;
    }
    compared++;
    if (!memcmp(e, &o, sizeof o) && !memcmp(memory[n], g.m, RAM_SIZE)) return false;
    fprintf(stderr, "lockstep: epoch %llu case %llu differs: retired %llu, %llu; RIP %llx, %llx\n", fuzz_epoch, n, (unsigned long long)e->retired,
            (unsigned long long)o.retired, (unsigned long long)e->regs.rip, (unsigned long long)o.regs.rip);
    fprintf(stderr, "  code before:");
    for (uint64_t at = (e->regs.rip - 96) & (RAM_SIZE - 1); at < ((e->regs.rip + 16) & (RAM_SIZE - 1)); at++) fprintf(stderr, " %02x", memory[n][at]);
    fprintf(stderr, "\n");
    show("regs", &e->regs, &o.regs, sizeof o.regs);
    show("sregs", &e->sregs, &o.sregs, sizeof o.sregs);
    show("fpu", &e->fpu, &o.fpu, sizeof o.fpu);
    show("events", &e->events, &o.events, sizeof o.events);
    show("memory", memory[n], g.m, RAM_SIZE);
    abort();
}

static void both(struct rng *r, uint64_t cases)
{
    struct rng again = *r;
    g.engine = KVS_ENGINE_INTERPRETER;
    comparing = false;
    epoch(r, cases);
    g.engine = KVS_ENGINE_JIT;
    comparing = true;
    epoch(&again, cases);
}

int main(int argc, char **argv)
{
    g.patience = 20000;
    int rc = fuzz_main(argc, argv, "lockstep", EPOCH_CASES, both);
    fprintf(stderr, "lockstep: %llu cases compared, %llu epochs ended by a kick\n", (unsigned long long)compared, (unsigned long long)kicked / 2);
    return rc;
}
