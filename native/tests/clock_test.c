/* The VM clock and kvmclock. */
#include "irqchip_test.h"

/* ---- clock ---- */
struct probe { struct kvs_vm *vm; struct vm_timer timer; _Atomic uint32_t fired; _Atomic uint64_t at; uint64_t again; };
static void probe_fire(void *owner, uint64_t now)
{
    struct probe *p = owner;
    atomic_store(&p->at, now);
    if (atomic_fetch_add(&p->fired, 1) < 4 && p->again)
        clock_timer_arm(p->vm, &p->timer, now + p->again);
}

static void nap(long ms)
{
    struct timespec ts = { ms / 1000, ms % 1000 * 1000000 };
    nanosleep(&ts, NULL);
}

static void test_clock_arithmetic(void)
{
    struct kvs_vm *vm = machine(1, KVS_CLOCK_VIRTUAL, 2599987);
    for (uint64_t tsc = 1; tsc < UINT64_MAX / 11; tsc = tsc * 11 + 3) {
        uint64_t ns = clock_tsc_to_ns(vm, tsc);
        CHECK(clock_ns_to_tsc(vm, ns) >= tsc);
        CHECK(clock_ns_to_tsc(vm, ns - 1) < tsc);
    }
    CHECK_EQ(clock_ns_to_tsc(vm, 3155760000ull * 1000000000), 3155760000ull * 2599987000); /* a century */
    clock_set_virtual(vm, 1000000000);
    CHECK_EQ(clock_tsc(vm), 2599987000);
    CHECK_EQ(clock_realtime(vm), 1577836801ll * 1000000000);

    /* kvmclock: the guest's arithmetic gives the VM clock, for any TSC offset. */
    struct kvs_vcpu *c = vm->vcpus[0];
    static const int64_t offsets[] = { 0, 123456789, -1300000000 };
    for (int i = 0; i < 3; i++) {
        c->tsc_offset = offsets[i];
        kvmclock_write_system_time(c, 0x1000 | 1);
        uint32_t version = ld32(guest_memory + 0x1000), mul = ld32(guest_memory + 0x1018);
        int8_t shift = (int8_t)guest_memory[0x101c];
        CHECK_EQ(version & 1, 0);
        CHECK_EQ(guest_memory[0x101d], 1);
        uint64_t delta = clock_tsc(vm) + (uint64_t)c->tsc_offset - ld64(guest_memory + 0x1008);
        delta = shift < 0 ? delta >> -shift : delta << shift;
        __extension__ typedef unsigned __int128 u128;
        int64_t ns = (int64_t)(ld64(guest_memory + 0x1010) + (uint64_t)((u128)delta * mul >> 32));
        CHECK(llabs(ns - (int64_t)clock_now(vm)) <= 3);
    }
    kvmclock_write_wall_clock(c, 0x800);
    CHECK_EQ(ld32(guest_memory + 0x804), 1577836800);
    kvmclock_write_system_time(c, sizeof guest_memory - 8 + 1); /* not all there: no crash */
    kvmclock_write_wall_clock(c, ~3ull);

    struct kvs_clock_data d;
    clock_get(vm, &d);
    CHECK_EQ(d.clock, 1000000000);
    d.clock = 77;
    CHECK_EQ(clock_set(vm, &d), 0);
    CHECK_EQ(clock_now(vm), 77);
    d.flags = 1u << 31;
    CHECK_EQ(clock_set(vm, &d), -KVS_EINVAL);

    CHECK_EQ(host_timer_arm(vm, 500), 0);
    atomic_store(&c->requests, 0);
    advance(vm, 400);
    CHECK_EQ(atomic_load(&c->requests) & REQ_HOST_TIMER, 0);
    advance(vm, 100);
    CHECK(atomic_load(&c->requests) & REQ_HOST_TIMER);
    scrap(vm);
}

static void test_real_clock(void)
{
    struct kvs_vm *vm = machine(1, KVS_CLOCK_REAL, 0);
    CHECK(clock_tsc_khz(vm) >= 100000);
    struct probe p = { .vm = vm, .again = 1000000 };
    p.timer.fire = probe_fire;
    p.timer.owner = &p;
    clock_timer_add(vm, &p.timer);
    uint64_t start = clock_now(vm);
    clock_timer_arm(vm, &p.timer, start + 3600000000000ull);
    clock_timer_arm(vm, &p.timer, start + 5000000);
    for (int i = 0; i < 400 && atomic_load(&p.fired) < 5; i++)
        nap(5);
    CHECK_EQ(atomic_load(&p.fired), 5);
    CHECK(atomic_load(&p.at) >= start + 9000000);
    clock_pause(vm, true);
    uint64_t frozen = clock_now(vm);
    atomic_store(&p.fired, 10);
    clock_timer_arm(vm, &p.timer, frozen + 1000000);
    nap(20);
    CHECK_EQ(clock_now(vm), frozen);
    CHECK_EQ(atomic_load(&p.fired), 10);
    clock_pause(vm, false);
    for (int i = 0; i < 400 && atomic_load(&p.fired) < 11; i++)
        nap(5);
    CHECK_EQ(atomic_load(&p.fired), 11);
    CHECK(clock_now(vm) < frozen + 10000000000ull);
    struct kvs_clock_data d = { .clock = 5000000000 };
    CHECK_EQ(clock_set(vm, &d), 0);
    CHECK(clock_now(vm) >= 5000000000 && clock_now(vm) < 60000000000);
    /* A LAPIC timer and the host's timer from the thread. */
    struct kvs_vcpu *c = vm->vcpus[0];
    enable(c);
    apic(c, 0x3e0, 0xb);
    apic(c, 0x320, 0x20041);
    apic(c, 0x380, 1000);
    CHECK_EQ(host_timer_arm(vm, clock_now(vm) + 2000000), 0);
    int seen = 0;
    for (int i = 0; i < 400 && (seen < 5 || !(atomic_load(&c->requests) & REQ_HOST_TIMER)); i++) {
        nap(2);
        if (take(c) == 0x41) {
            seen++;
            apic(c, 0xb0, 0);
        }
    }
    CHECK(seen >= 5);
    CHECK(atomic_load(&c->requests) & REQ_HOST_TIMER);
    clock_timer_remove(vm, &p.timer);
    scrap(vm);
}

int main(void)
{
    test_clock_arithmetic();
    test_real_clock();
    printf("%d passed, %d failed\n", passed, failed);
    return failed != 0;
}
