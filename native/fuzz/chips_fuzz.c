/*
 * The in-core devices under random port, MMIO and MSR sequences of a guest, random lines, MSIs, routes
 * and clock moves from the host. The guest is flat 32-bit code made of OUT, IN, stores, loads, WRMSR.
 */
#include "fuzz.h"

#include <pthread.h>
#include <unistd.h>

static struct kvs_vm *vm;
static struct kvs_vcpu *c;
static struct kvs_ram *ram;
static struct kvs_run *run;
#define RAM_SIZE 0x10000u
#define CODE 0x4000u
#define IDT 0x1000u
#define GDT 0x0800u

static struct { pthread_mutex_t lock; struct kvs_vcpu *c; uint64_t number; } watched = { PTHREAD_MUTEX_INITIALIZER, NULL, 0 };
static void *watchdog(void *unused)
{
    for (uint64_t last = 0;;) {
        usleep(500);
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

static uint32_t port(struct rng *r)
{
    static const uint16_t ports[] = { 0x20, 0x21, 0xa0, 0xa1, 0x4d0, 0x4d1, 0x40, 0x41, 0x42, 0x43, 0x61, 0x92, 0x70, 0x3f8, 0xcf8 };
    return rnd_one(r, 16) ? (uint32_t)rnd(r) & 0xffff : ports[rnd_below(r, ARRAY_SIZE(ports))];
}
static uint32_t device_address(struct rng *r)
{
    if (rnd_one(r, 3)) return 0xfec00000 + (rnd_one(r, 2) ? 0 : 0x10) + (rnd_one(r, 8) ? rnd_below(r, 64) : 0);
    return 0xfee00000 + (rnd_one(r, 8) ? rnd_below(r, 4096) : rnd_below(r, 64) * 16);
}
static uint32_t device_value(struct rng *r)
{
    switch (rnd_below(r, 5)) {
    case 0: return rnd_below(r, 64);
    case 1: return (uint32_t)rnd_value(r);
    case 2: return rnd_below(r, 256) | (uint32_t)(rnd(r) & 7) << 8 | (uint32_t)(rnd(r) & 7) << 14;
    case 3: return rnd_below(r, 256) << 24;
    default: return (uint32_t)rnd(r);
    }
}

static uint8_t *mov_eax(uint8_t *p, uint32_t v) { *p++ = 0xb8; st32(p, v); return p + 4; }

static uint8_t *write_access(struct rng *r, uint8_t *p)
{
    static const uint32_t msrs[] = { 0x1b, 0x6e0, 0x10, 0x3b, 0x4b564d00, 0x4b564d01, 0x11, 0x12, 0x174, 0x277, 0x2ff, 0x1a0, 0xc0000080, 0x4b564d05,
                                     0x4b564d03, 0x4b564d04, 0x4b564d04 };
    switch (rnd_below(r, 10)) {
    case 0: case 1: { /* OUT DX */
        *p++ = 0xba; st32(p, port(r)); p += 4;
        p = mov_eax(p, device_value(r));
        uint32_t x = rnd_below(r, 8);
        if (x == 0) *p++ = 0x66;
        *p++ = x < 2 ? 0xef : 0xee;
        break;
    }
    case 2: /* IN DX */
        *p++ = 0xba; st32(p, port(r)); p += 4;
        *p++ = rnd_one(r, 8) ? 0xed : 0xec;
        break;
    case 3: case 4: { /* MOV [device], imm */
        uint32_t x = rnd_below(r, 16);
        if (x == 0) { *p++ = 0xc6; *p++ = 5; st32(p, device_address(r)); p += 4; *p++ = (uint8_t)rnd(r); break; }
        if (x == 1) *p++ = 0x66;
        *p++ = 0xc7; *p++ = 5; st32(p, device_address(r)); p += 4;
        st32(p, device_value(r)); p += x == 1 ? 2 : 4;
        break;
    }
    case 5: /* MOV EAX, [device] */
        *p++ = 0xa1; st32(p, device_address(r)); p += 4;
        break;
    case 6: case 7: { /* WRMSR, RDMSR */
        uint32_t m = rnd_one(r, 2) ? 0x800 + rnd_below(r, 0x40) : msrs[rnd_below(r, ARRAY_SIZE(msrs))];
        *p++ = 0xb9; st32(p, rnd_one(r, 32) ? (uint32_t)rnd(r) : m); p += 4;
        p = mov_eax(p, m == 0x1b ? 0xfee00000 | rnd_below(r, 16) << 8 : device_value(r));
        *p++ = 0xba; st32(p, rnd_one(r, 2) ? 0 : rnd_below(r, 256)); p += 4;
        *p++ = 0x0f; *p++ = rnd_one(r, 4) ? 0x32 : 0x30;
        break;
    }
    case 8: { /* VMMCALL with EAX, EBX, ECX, EDX, ESI */
        static const uint8_t calls[] = { 1, 5, 9, 10, 11, 12 };
        p = mov_eax(p, rnd_one(r, 16) ? (uint32_t)rnd(r) : calls[rnd_below(r, ARRAY_SIZE(calls))]);
        for (uint32_t n = 0; n < 4; n++) {
            static const uint8_t mov[] = { 0xbb, 0xb9, 0xba, 0xbe };
            *p++ = mov[n];
            st32(p, rnd_one(r, 4) ? device_value(r) : n == 3 ? rnd_below(r, 0x800) : rnd_below(r, 4));
            p += 4;
        }
        *p++ = 0x0f; *p++ = 0x01; *p++ = 0xd9;
        break;
    }
    default: { /* STI, CLI, HLT, PAUSE, MOV CR8 has no 32-bit form: LOCK-free RMW on the device */
        uint32_t x = rnd_below(r, 8);
        if (x < 3) *p++ = 0xfb;
        else if (x < 4) *p++ = 0xfa;
        else if (x < 5) *p++ = 0xf4;
        else { *p++ = 0x81; *p++ = 0x35; st32(p, device_address(r)); p += 4; st32(p, device_value(r)); p += 4; }
        break;
    }
    }
    return p;
}

static void host_side(struct rng *r)
{
    switch (rnd_below(r, 10)) {
    case 0: case 1: case 2: kvs_irq_line(vm, rnd_one(r, 16) ? (uint32_t)rnd(r) : rnd_below(r, 26), rnd_below(r, 2)); break;
    case 3: {
        struct kvs_msi msi = { .address_lo = 0xfee00000 | (uint32_t)(rnd(r) & 0xfffff), .address_hi = rnd_one(r, 4) ? (uint32_t)rnd(r) : 0, .data = device_value(r) };
        kvs_signal_msi(vm, &msi);
        break;
    }
    case 4: {
        struct kvs_irq_routing_entry e[32];
        uint32_t n = rnd_below(r, 33);
        memset(e, 0, sizeof e);
        for (uint32_t i = 0; i < n; i++) {
            e[i].gsi = rnd_one(r, 32) ? (uint32_t)rnd(r) : rnd_below(r, 40);
            e[i].type = 1 + rnd_below(r, 2) + (rnd_one(r, 64) ? 1 : 0);
            if (e[i].type == 1) { e[i].u.irqchip.irqchip = rnd_below(r, 3) + (rnd_one(r, 64) ? 1 : 0); e[i].u.irqchip.pin = rnd_below(r, rnd_one(r, 16) ? 256 : 24); }
            else { e[i].u.msi.address_lo = 0xfee00000 | (uint32_t)(rnd(r) & 0xfffff); e[i].u.msi.data = device_value(r); }
        }
        kvs_set_gsi_routing(vm, e, n);
        break;
    }
    case 5: kvs_host_timer_arm(vm, kvs_clock_now(vm) + rnd_below(r, 100000)); break;
    case 6:
        kvs_vcpu_nmi(c);
        (void)kvs_vcpu_smi(c);
        break;
    case 7: {
        struct kvs_clock_data d;
        kvs_get_clock(vm, &d);
        d.clock += rnd_below(r, 1000000);
        kvs_set_clock(vm, &d);
        break;
    }
    case 8: {
        struct kvs_lapic_state l;
        struct kvs_irqchip x = { .chip_id = rnd_below(r, 3) };
        struct kvs_pit_state2 p;
        FUZZ_CHECK(kvs_vcpu_get_lapic(c, &l) == 0 && kvs_vcpu_set_lapic(c, &l) == 0);
        FUZZ_CHECK(kvs_get_irqchip(vm, &x) == 0 && kvs_set_irqchip(vm, &x) == 0);
        FUZZ_CHECK(kvs_get_pit2(vm, &p) == 0 && kvs_set_pit2(vm, &p) == 0);
        break;
    }
    default: break;
    }
}

static void epoch(struct rng *r, uint64_t cases)
{
    static bool started;
    pthread_t thread;
    struct kvs_vm_config config = { .size = sizeof config, .clock_mode = rnd_one(r, 8) ? KVS_CLOCK_REAL : KVS_CLOCK_VIRTUAL, .flags = rnd_one(r, 2) ? KVS_VM_SMM : 0 };
    if (!started) started = pthread_create(&thread, NULL, watchdog, NULL) == 0;
    FUZZ_CHECK(kvs_vm_create(&config, &vm) == 0 && kvs_ram_create(RAM_SIZE, &ram) == 0 && kvs_irqchip_create(vm) == 0 && kvs_pit_create(vm) == 0);
    struct kvs_userspace_memory_region region = { .memory_size = RAM_SIZE };
    FUZZ_CHECK(kvs_memslot_set(vm, &region, ram, 0) == 0 && kvs_vcpu_create(vm, 0, &c) == 0);
    run = kvs_vcpu_run_block(c);
    uint8_t *m = kvs_ram_address(ram);
    st64(m + GDT + 8, 0x00cf9b000000ffff);
    st64(m + GDT + 16, 0x00cf93000000ffff);
    for (uint32_t v = 0; v < 256; v++) {
        /* Handlers: POP EAX for an error code is not worth it; each tells the LAPIC and returns. */
        uint32_t h = 0x3000 + (v < 32 ? 16 : 0);
        st64(m + IDT + 8 * v, (h & 0xffff) | 8ull << 16 | 0x8e00ull << 32);
    }
    static const uint8_t eoi[] = { 0xc7, 0x05, 0xb0, 0x00, 0xe0, 0xfe, 0, 0, 0, 0, 0xcf };
    memcpy(m + 0x3000, eoi, sizeof eoi);
    memcpy(m + 0x3010, "\xf4", 1);
    for (uint64_t n = 0; n < cases; n++) {
        uint8_t *p = m + CODE;
        for (int i = 0; i < 24; i++) p = write_access(r, p);
        *p++ = 0xe6; /* OUT 0xf4: the end */
        *p++ = 0xf4;
        kvs_mem_written(vm, CODE, 1024);
        struct kvs_sregs s;
        struct kvs_regs x;
        memset(&x, 0, sizeof x);
        kvs_vcpu_get_sregs(c, &s);
        s.cs = (struct kvs_segment){ .limit = ~0u, .selector = 8, .type = 11, .present = 1, .s = 1, .db = 1, .g = 1 };
        s.ds = s.es = s.fs = s.gs = s.ss = (struct kvs_segment){ .limit = ~0u, .selector = 16, .type = 3, .present = 1, .s = 1, .db = 1, .g = 1 };
        s.gdt = (struct kvs_dtable){ .base = GDT, .limit = 0x17 };
        s.idt = (struct kvs_dtable){ .base = IDT, .limit = 0x7ff };
        s.cr0 = CR0_PE | CR0_ET;
        s.cr4 = s.efer = 0;
        x.rip = CODE;
        x.rsp = 0x3000;
        x.rflags = 2;
        FUZZ_CHECK(kvs_vcpu_set_sregs(c, &s) == 0 && kvs_vcpu_set_regs(c, &x) == 0);
        struct kvs_mp_state mp = { KVS_MP_STATE_RUNNABLE };
        kvs_vcpu_set_mp_state(c, &mp);
        struct kvs_core_state core;
        kvs_vcpu_get_core_state(c, &core);
        kvs_vcpu_set_insn_limit(c, core.retired + 400);
        watch(c);
        for (int exits = 0; exits < 24; exits++) {
            if (rnd_one(r, 2)) host_side(r);
            FUZZ_CHECK(kvs_vcpu_run(c) == 0);
            uint32_t reason = run->exit_reason;
            if (reason == KVS_EXIT_INSN_LIMIT || reason == KVS_EXIT_SHUTDOWN || reason == KVS_EXIT_INTR || reason == KVS_EXIT_INTERNAL_ERROR) break;
            if (reason == KVS_EXIT_IO && run->io.port == 0xf4) break;
            if (reason == KVS_EXIT_MMIO) st64(run->mmio.data, rnd(r));
        }
        watch(NULL);
        if (rnd_one(r, 64)) kvs_vcpu_reset(c);
    }
    FUZZ_CHECK(kvs_vcpu_destroy(c) == 0);
    kvs_vm_destroy(vm);
    kvs_ram_release(ram);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (size < 8) return 0;
    struct rng r = { ld64(data) };
    epoch(&r, 4);
    return 0;
}

#ifndef KVS_LIBFUZZER
int main(int argc, char **argv) { return fuzz_main(argc, argv, "chips_fuzz", 200, epoch); }
#endif
