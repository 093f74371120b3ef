/* The run loop: exits, completion of reads, exact stops, kicks, self-modifying code. */
#include <pthread.h>
#include <stdatomic.h>
#include <time.h>

#include "vmtest.h"

static const uint8_t count_and_out[] = {
    0xb9, 0x40, 0x42, 0x0f, 0x00,       /* mov ecx, 1000000 */
    0x31, 0xc0,                         /* xor eax, eax */
    0x01, 0xc8,                         /* add eax, ecx */
    0xff, 0xc9,                         /* dec ecx */
    0x75, 0xfa,                         /* jnz -6 */
    0xe7, 0x80,                         /* out 0x80, eax */
    0xe5, 0x81,                         /* in eax, 0x81 */
    0x89, 0xc3,                         /* mov ebx, eax */
    0x48, 0xb8, 0, 0, 0, 0xd0, 0, 0, 0, 0, /* mov rax, 0xd0000000 */
    0x48, 0x01, 0x18,                   /* add [rax], rbx */
    0xf4,                               /* hlt */
};

static void exits(void)
{
    struct vt t = vt_create(16 << 20, KVS_CLOCK_REAL, 0);
    vt_long_mode(&t);
    vt_code(&t, count_and_out, sizeof count_and_out);
    CHECK(vt_run(&t) == KVS_EXIT_IO);
    CHECK(t.run->io.direction == KVS_EXIT_IO_OUT && t.run->io.port == 0x80 && t.run->io.size == 4);
    uint32_t sum;
    memcpy(&sum, (uint8_t *)t.run + t.run->io.data_offset, 4);
    CHECK(sum == (uint32_t)(1000000ull * 1000001 / 2));
    CHECK(vt_run(&t) == KVS_EXIT_IO);
    CHECK(t.run->io.direction == KVS_EXIT_IO_IN && t.run->io.port == 0x81);
    uint32_t v = 0x12345678;
    memcpy((uint8_t *)t.run + t.run->io.data_offset, &v, 4);
    CHECK(vt_run(&t) == KVS_EXIT_MMIO && !t.run->mmio.is_write);
    CHECK(t.run->mmio.phys_addr == 0xd0000000u && t.run->mmio.len == 8);
    uint64_t m = 0x1111111111111111ull;
    memcpy(t.run->mmio.data, &m, 8);
    CHECK(vt_run(&t) == KVS_EXIT_MMIO && t.run->mmio.is_write);
    memcpy(&m, t.run->mmio.data, 8);
    CHECK(m == 0x1111111111111111ull + 0x12345678);
    CHECK(vt_run(&t) == KVS_EXIT_HLT);
    struct kvs_core_state cs;
    CHECK(kvs_vcpu_get_core_state(t.vcpu, &cs) == 0 && cs.retired == 2 + 3000000 + 6);
    vt_destroy(&t);
}

/* Stopping at every count gives the same states as running through. */
static void exact_stops(void)
{
    struct vt t = vt_create(16 << 20, KVS_CLOCK_VIRTUAL, 1);
    vt_long_mode(&t);
    vt_code(&t, count_and_out, sizeof count_and_out);
    for (uint64_t n = 1; n < 200; n++) {
        CHECK(kvs_vcpu_set_insn_limit(t.vcpu, n) == 0);
        CHECK(vt_run(&t) == KVS_EXIT_INSN_LIMIT);
        struct kvs_core_state cs;
        struct kvs_regs r;
        kvs_vcpu_get_core_state(t.vcpu, &cs);
        kvs_vcpu_get_regs(t.vcpu, &r);
        CHECK(cs.retired == n);
        if (n >= 2) CHECK(r.rcx == 1000000 - (n - 2 + 1) / 3);
    }
    kvs_vcpu_set_insn_limit(t.vcpu, ~0ull);
    CHECK(vt_run(&t) == KVS_EXIT_IO);
    vt_destroy(&t);
}

/* Overwrites the immediate of the instruction behind the store, a thousand times. */
static void self_modifying(void)
{
    static const uint8_t code[] = {
        0xb9, 0xe8, 0x03, 0, 0,             /* mov ecx, 1000 */
        0x31, 0xd2,                         /* xor edx, edx */
        0x89, 0x0d, 0x01, 0, 0, 0,          /* L: mov [rip + 1], ecx */
        0xb8, 0, 0, 0, 0,                   /* mov eax, imm32 (just written) */
        0x01, 0xc2,                         /* add edx, eax */
        0xff, 0xc9,                         /* dec ecx */
        0x75, 0xef,                         /* jnz L */
        0xf4,
    };
    struct vt t = vt_create(16 << 20, KVS_CLOCK_REAL, 0);
    vt_long_mode(&t);
    vt_code(&t, code, sizeof code);
    CHECK(vt_run(&t) == KVS_EXIT_HLT);
    struct kvs_regs r;
    kvs_vcpu_get_regs(t.vcpu, &r);
    CHECK(r.rdx == 1000 * 1001 / 2);
    vt_destroy(&t);
}

static _Atomic int kicked_enough;

static void *kicker(void *arg)
{
    struct vt *t = arg;
    /* Kicks that come close together are one: no count of them is enough. */
    while (!atomic_load(&kicked_enough)) {
        nanosleep(&(struct timespec){ .tv_nsec = 100000 }, NULL);
        kvs_vcpu_kick(t->vcpu);
    }
    return NULL;
}

static void kicks(int halted)
{
    static const uint8_t spin[] = { 0xeb, 0xfe }, sleeps[] = { 0xf4, 0xeb, 0xfd };
    struct vt t = vt_create(16 << 20, KVS_CLOCK_REAL, halted);
    vt_long_mode(&t);
    if (halted) vt_code(&t, sleeps, sizeof sleeps);
    else vt_code(&t, spin, sizeof spin);
    /* A kick before the run counts for the next one. */
    kvs_vcpu_kick(t.vcpu);
    vt_must(kvs_vcpu_run(t.vcpu), "run");
    CHECK(t.run->exit_reason == KVS_EXIT_INTR);
    t.run->immediate_exit = 1;
    vt_must(kvs_vcpu_run(t.vcpu), "run");
    CHECK(t.run->exit_reason == KVS_EXIT_INTR);
    t.run->immediate_exit = 0;
    pthread_t thread;
    atomic_store(&kicked_enough, 0);
    pthread_create(&thread, NULL, kicker, &t);
    int exits = 0;
    for (; exits < 50; exits++) {
        vt_must(kvs_vcpu_run(t.vcpu), "run");
        CHECK(t.run->exit_reason == KVS_EXIT_INTR);
    }
    atomic_store(&kicked_enough, 1);
    pthread_join(thread, NULL);
    vt_destroy(&t);
}

/* A divide error with no IDT: triple fault. */
static void triple_fault(void)
{
    static const uint8_t code[] = { 0x31, 0xc9, 0xf7, 0xf1 };
    struct vt t = vt_create(16 << 20, KVS_CLOCK_REAL, 0);
    vt_long_mode(&t);
    struct kvs_sregs s;
    kvs_vcpu_get_sregs(t.vcpu, &s);
    s.idt.limit = 0;
    kvs_vcpu_set_sregs(t.vcpu, &s);
    vt_code(&t, code, sizeof code);
    CHECK(vt_run(&t) == KVS_EXIT_SHUTDOWN);
    CHECK(vt_run(&t) == KVS_EXIT_SHUTDOWN);
    vt_destroy(&t);
}

/*
 * #AC whose delivery at CPL 3 meets #AC on its misaligned stack, for ever: a processor hangs in that,
 * the host must not. SDM 3A "Interrupt 17-Alignment Check Exception"
 */
static void endless_delivery(void)
{
    static const uint8_t code[] = { 0x8b, 0x04, 0x24 }; /* mov eax, [esp] */
    struct vt t = vt_create(16 << 20, KVS_CLOCK_REAL, 0);
    uint64_t *gdt = (uint64_t *)(t.mem + 0x1000), *idt = (uint64_t *)(t.mem + 0x2000);
    gdt[1] = 0x00cffb000000ffffull;
    gdt[2] = 0x00cff3000000ffffull;
    idt[17] = 0x0000ee00000b0000ull | VT_CODE;
    struct kvs_sregs s;
    kvs_vcpu_get_sregs(t.vcpu, &s);
    s.cs = (struct kvs_segment){ .limit = 0xffffffff, .selector = 11, .type = 11, .present = 1, .dpl = 3, .db = 1, .s = 1, .g = 1 };
    s.ds = s.es = s.fs = s.gs = s.ss =
        (struct kvs_segment){ .limit = 0xffffffff, .selector = 19, .type = 3, .present = 1, .dpl = 3, .db = 1, .s = 1, .g = 1 };
    s.gdt = (struct kvs_dtable){ .base = 0x1000, .limit = 23 };
    s.idt = (struct kvs_dtable){ .base = 0x2000, .limit = 255 };
    s.cr0 = 0x40031; /* AM, NE, ET, PE */
    CHECK(kvs_vcpu_set_sregs(t.vcpu, &s) == 0);
    struct kvs_regs r = { .rip = VT_CODE, .rsp = VT_STACK + 1, .rflags = 0x40002 };
    CHECK(kvs_vcpu_set_regs(t.vcpu, &r) == 0);
    vt_code(&t, code, sizeof code);
    pthread_t thread;
    atomic_store(&kicked_enough, 0);
    pthread_create(&thread, NULL, kicker, &t);
    struct kvs_vcpu_stats stats;
    do {
        vt_must(kvs_vcpu_run(t.vcpu), "run");
        CHECK(t.run->exit_reason == KVS_EXIT_INTR);
        kvs_vcpu_get_stats(t.vcpu, &stats);
    } while (stats.exceptions < 1000);
    atomic_store(&kicked_enough, 1);
    pthread_join(thread, NULL);
    vt_destroy(&t);
}

/* No CPUID table at all is a table. */
static void empty_cpuid(void)
{
    struct vt t = vt_create(16 << 20, KVS_CLOCK_REAL, 0);
    uint32_t count = 0;
    CHECK(kvs_vcpu_set_cpuid2(t.vcpu, NULL, 0) == 0);
    CHECK(kvs_vcpu_get_cpuid2(t.vcpu, NULL, &count) == 0 && count == 0);
    CHECK(kvs_vcpu_set_cpuid2(t.vcpu, NULL, 1) == -KVS_EINVAL);
    vt_destroy(&t);
}

int main(void)
{
    empty_cpuid();
    endless_delivery();
    exits();
    exact_stops();
    self_modifying();
    kicks(0);
    kicks(1);
    triple_fault();
    return vt_report();
}
