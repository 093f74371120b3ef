/*
 * Random images for every state setter, some instructions under whatever they left, and every getter.
 * Images come from files: nothing in them may do more than make a setter refuse.
 */
#include "fuzz.h"
#include "../tests/engine.h"

#include <pthread.h>
#include <unistd.h>

static struct kvs_vm *vm;
static struct kvs_vcpu *c;
static struct kvs_ram *ram;
static struct kvs_run *run;
static bool chips;
#define RAM_SIZE 0x10000u

static struct { pthread_mutex_t lock; struct kvs_vcpu *c; uint64_t number; } watched = { PTHREAD_MUTEX_INITIALIZER, NULL, 0 };
static void *watchdog(void *unused)
{
    for (uint64_t last = 0;;) {
        usleep(300);
        pthread_mutex_lock(&watched.lock);
        if (watched.c && watched.number == last) kvs_vcpu_kick(watched.c);
        last = watched.number;
        pthread_mutex_unlock(&watched.lock);
    }
    return unused;
}
static void watch(struct kvs_vcpu *v)
{
    pthread_mutex_lock(&watched.lock);
    watched.c = v;
    watched.number++;
    pthread_mutex_unlock(&watched.lock);
}

/* Random bytes, or the present image with a few bits changed. */
static void scramble(struct rng *r, void *image, size_t size)
{
    uint8_t *p = image;
    if (rnd_one(r, 4)) {
        for (size_t i = 0; i < size; i++) p[i] = (uint8_t)rnd(r);
        return;
    }
    for (uint32_t n = rnd_below(r, 6); n > 0; n--) {
        size_t at = (size_t)(rnd(r) % size);
        if (rnd_one(r, 2)) p[at] ^= (uint8_t)(1 << rnd_below(r, 8));
        else if (at + 8 <= size) st64(p + at, rnd_value(r));
    }
}

#define IMAGE(type, name)                                         \
    do {                                                          \
        type x;                                                   \
        memset(&x, 0, sizeof x);                                  \
        kvs_vcpu_get_##name(c, &x);                               \
        scramble(r, &x, sizeof x);                                \
        int32_t rc = kvs_vcpu_set_##name(c, &x);                  \
        FUZZ_CHECK(rc == 0 || rc == -KVS_EINVAL || rc == -KVS_ESTATE || rc == -KVS_ENOTSUP || rc == -KVS_ENOENT); \
    } while (0)

static void set_something(struct rng *r)
{
    static uint32_t msrs[256], msr_count;
    if (!msr_count) {
        msr_count = 256;
        FUZZ_CHECK(kvs_get_msr_index_list(msrs, &msr_count) == 0 && msr_count);
    }
    switch (rnd_below(r, chips ? 20 : 15)) {
    case 0: case 1: IMAGE(struct kvs_regs, regs); break;
    case 2: case 3: case 4: IMAGE(struct kvs_sregs, sregs); break;
    case 5: IMAGE(struct kvs_fpu, fpu); break;
    case 6: IMAGE(struct kvs_xsave, xsave); break;
    case 7: IMAGE(struct kvs_xcrs, xcrs); break;
    case 8: IMAGE(struct kvs_vcpu_events, events); break;
    case 9: IMAGE(struct kvs_debugregs, debugregs); break;
    case 10: {
        struct kvs_mp_state mp = { rnd_one(r, 2) ? 0 : rnd_below(r, 6) };
        kvs_vcpu_set_mp_state(c, &mp);
        break;
    }
    case 11: {
        struct kvs_core_state s;
        kvs_vcpu_get_core_state(c, &s);
        scramble(r, &s, sizeof s);
        s.retired &= 0xffffffffffff;
        kvs_vcpu_set_core_state(c, &s);
        break;
    }
    case 12: {
        struct kvs_cpuid_entry2 e[64];
        uint32_t n = 64;
        if (kvs_get_supported_cpuid(e, &n)) break;
        if (rnd_one(r, 2)) scramble(r, e, n * sizeof *e);
        kvs_vcpu_set_cpuid2(c, e, rnd_one(r, 8) ? rnd_below(r, n + 1) : n);
        break;
    }
    case 13: {
        struct kvs_msr_entry e[4];
        for (int i = 0; i < 4; i++)
            e[i] = (struct kvs_msr_entry){ rnd_one(r, 8) ? (uint32_t)rnd_value(r) : msrs[rnd_below(r, msr_count)], 0, rnd_value(r) };
        int32_t rc = kvs_vcpu_set_msrs(c, e, 4);
        FUZZ_CHECK(rc <= 4);
        kvs_vcpu_get_msrs(c, e, 4);
        break;
    }
    case 14: {
        struct kvs_guest_debug d = { 0 };
        if (rnd_one(r, 4)) scramble(r, &d, sizeof d);
        kvs_vcpu_set_guest_debug(c, &d);
        struct kvs_translation t = { .linear_address = rnd_value(r) };
        kvs_vcpu_translate(c, &t);
        kvs_vcpu_set_trace(c, rnd_one(r, 8) ? rnd_below(r, 64) : 0);
        machine_check(r, c);
        break;
    }
    case 15: case 16: IMAGE(struct kvs_lapic_state, lapic); break;
    case 17: {
        struct kvs_irqchip x = { .chip_id = rnd_below(r, 4) };
        if (kvs_get_irqchip(vm, &x)) break;
        uint32_t id = x.chip_id;
        scramble(r, &x, sizeof x);
        if (!rnd_one(r, 16)) x.chip_id = id;
        kvs_set_irqchip(vm, &x);
        break;
    }
    case 18: {
        struct kvs_pit_state2 x;
        if (kvs_get_pit2(vm, &x)) break;
        scramble(r, &x, sizeof x);
        kvs_set_pit2(vm, &x);
        break;
    }
    default: {
        struct kvs_clock_data x;
        if (kvs_get_clock(vm, &x)) break;
        scramble(r, &x, sizeof x);
        x.clock &= 0xffffffffffffff;
        kvs_set_clock(vm, &x);
        break;
    }
    }
}

static void get_everything(struct rng *r)
{
    struct kvs_regs a; struct kvs_sregs b; struct kvs_fpu f; struct kvs_xsave x; struct kvs_xcrs xc; struct kvs_vcpu_events e;
    struct kvs_debugregs d; struct kvs_mp_state mp; struct kvs_core_state s; struct kvs_vcpu_stats st;
    struct kvs_cpuid_entry2 cp[64];
    struct kvs_trace_entry tr[8];
    uint32_t n = 64;
    FUZZ_CHECK(kvs_vcpu_get_regs(c, &a) == 0 && kvs_vcpu_get_sregs(c, &b) == 0 && kvs_vcpu_get_fpu(c, &f) == 0 && kvs_vcpu_get_xsave(c, &x) == 0 &&
               kvs_vcpu_get_xcrs(c, &xc) == 0 && kvs_vcpu_get_events(c, &e) == 0 && kvs_vcpu_get_debugregs(c, &d) == 0 &&
               kvs_vcpu_get_mp_state(c, &mp) == 0 && kvs_vcpu_get_core_state(c, &s) == 0 && kvs_vcpu_get_stats(c, &st) == 0 &&
               kvs_vcpu_get_cpuid2(c, cp, &n) == 0 && kvs_vcpu_read_trace(c, tr, 8) >= 0);
    (void)r;
}

static void epoch(struct rng *r, uint64_t cases)
{
    static bool started;
    pthread_t thread;
    struct kvs_vm_config config = { .size = sizeof config, .clock_mode = KVS_CLOCK_VIRTUAL, .flags = rnd_one(r, 2) ? KVS_VM_SMM : 0, TEST_ENGINE };
    if (!started) started = pthread_create(&thread, NULL, watchdog, NULL) == 0;
    chips = rnd_one(r, 2);
    FUZZ_CHECK(kvs_vm_create(&config, &vm) == 0 && kvs_ram_create(RAM_SIZE, &ram) == 0);
    if (chips) FUZZ_CHECK(kvs_irqchip_create(vm) == 0 && kvs_pit_create(vm) == 0);
    struct kvs_userspace_memory_region region = { .memory_size = RAM_SIZE };
    FUZZ_CHECK(kvs_memslot_set(vm, &region, ram, 0) == 0 && kvs_vcpu_create(vm, 0, &c) == 0);
    run = kvs_vcpu_run_block(c);
    uint8_t *m = kvs_ram_address(ram);
    for (uint32_t i = 0; i < RAM_SIZE; i += 8) st64(m + i, rnd(r));
    for (uint64_t n = 0; n < cases; n++) {
        for (uint32_t k = rnd_below(r, 4); k > 0; k--) set_something(r);
        struct kvs_core_state s;
        kvs_vcpu_get_core_state(c, &s);
        kvs_vcpu_set_insn_limit(c, s.retired + 16);
        watch(c);
        for (int exits = 0; exits < 4; exits++) {
            FUZZ_CHECK(kvs_vcpu_run(c) == 0);
            if (run->exit_reason == KVS_EXIT_INSN_LIMIT || run->exit_reason == KVS_EXIT_SHUTDOWN || run->exit_reason == KVS_EXIT_INTR) break;
            if (run->exit_reason == KVS_EXIT_MMIO) st64(run->mmio.data, rnd(r));
        }
        watch(NULL);
        get_everything(r);
        if (rnd_one(r, 16)) kvs_vcpu_reset(c);
    }
    FUZZ_CHECK(kvs_vcpu_destroy(c) == 0);
    kvs_vm_destroy(vm);
    kvs_ram_release(ram);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (size < 8) return 0;
    struct rng r = { ld64(data) };
    epoch(&r, 20);
    return 0;
}

#ifndef KVS_LIBFUZZER
int main(int argc, char **argv) { return fuzz_main(argc, argv, "state_fuzz", 500, epoch); }
#endif
