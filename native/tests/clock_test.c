/* The VM clock, kvmclock and the PIT. */
#include "irqchip_test.h"

/* ---- PIT ---- */
static uint64_t pit_ns(uint64_t ticks) { return (ticks * 1000000000 + 1193181) / 1193182; }

static uint32_t pit_count(struct kvs_vm *vm, uint16_t n)
{
    out(vm, 0x43, (uint32_t)n << 6);
    uint32_t low = in(vm, 0x40 + n);
    return low | in(vm, 0x40 + n) << 8;
}

static uint32_t status(struct kvs_vm *vm, uint16_t n)
{
    out(vm, 0x43, 0xe0 | 2u << n);
    return in(vm, 0x40 + n);
}

static void set_count(struct kvs_vm *vm, uint16_t n, uint32_t mode, uint32_t count)
{
    out(vm, 0x43, (uint32_t)n << 6 | 0x30 | mode << 1);
    out(vm, 0x40 + n, count & 0xff);
    out(vm, 0x40 + n, count >> 8);
}

static void test_pit_channel2(void)
{
    struct kvs_vm *vm = machine(1, KVS_CLOCK_VIRTUAL, 0);
    CHECK_EQ(in(vm, 0x61) & 0x23, 0);
    out(vm, 0x61, 1);
    /* Mode 0, as a TSC calibration does. */
    set_count(vm, 2, 0, 11932);
    CHECK_EQ(in(vm, 0x61) & 0x21, 1);
    CHECK_EQ(status(vm, 2), 0x30);
    advance(vm, pit_ns(1000));
    CHECK_EQ(pit_count(vm, 2), 10932);
    out(vm, 0x61, 0); /* a low gate holds the count */
    advance(vm, 50000000);
    CHECK_EQ(pit_count(vm, 2), 10932);
    out(vm, 0x61, 1);
    advance(vm, pit_ns(10931));
    CHECK_EQ(in(vm, 0x61) & 0x20, 0);
    advance(vm, pit_ns(1));
    CHECK_EQ(in(vm, 0x61) & 0x20, 0x20);
    CHECK_EQ(status(vm, 2), 0xb0);
    /* Byte by byte without a latch. */
    out(vm, 0x43, 0xb0);
    CHECK_EQ(status(vm, 2), 0x70); /* null count */
    out(vm, 0x42, 0xff); out(vm, 0x42, 0xff);
    (void)in(vm, 0x42);
    CHECK_EQ(in(vm, 0x42), 0xff);
    /* Mode 1: triggered by the gate, again and again. */
    out(vm, 0x61, 0);
    set_count(vm, 2, 1, 100);
    CHECK_EQ(in(vm, 0x61) & 0x20, 0x20);
    advance(vm, 1000000);
    out(vm, 0x61, 1);
    CHECK_EQ(in(vm, 0x61) & 0x20, 0);
    advance(vm, pit_ns(60));
    out(vm, 0x61, 0); out(vm, 0x61, 1);
    advance(vm, pit_ns(60));
    CHECK_EQ(in(vm, 0x61) & 0x20, 0);
    CHECK_EQ(pit_count(vm, 2), 40);
    advance(vm, pit_ns(41));
    CHECK_EQ(in(vm, 0x61) & 0x20, 0x20);
    /* Mode 2: low for the last tick. A new count waits for the end of the period. */
    set_count(vm, 2, 2, 1000);
    advance(vm, pit_ns(2000 + 300));
    CHECK_EQ(pit_count(vm, 2), 700);
    out(vm, 0x42, 500 & 0xff); out(vm, 0x42, 500 >> 8);
    CHECK_EQ(status(vm, 2) & 0x40, 0x40);
    CHECK_EQ(pit_count(vm, 2), 700);
    advance(vm, pit_ns(699));
    CHECK_EQ(in(vm, 0x61) & 0x20, 0);
    advance(vm, pit_ns(101));
    CHECK_EQ(status(vm, 2) & 0x40, 0);
    CHECK_EQ(pit_count(vm, 2), 400);
    /* Mode 3: odd counts are high one tick longer. */
    set_count(vm, 2, 3, 101);
    advance(vm, pit_ns(50));
    CHECK_EQ(in(vm, 0x61) & 0x20, 0x20);
    advance(vm, pit_ns(2));
    CHECK_EQ(in(vm, 0x61) & 0x20, 0);
    out(vm, 0x61, 2); /* a low gate forces high */
    CHECK_EQ(in(vm, 0x61) & 0x23, 0x22);
    out(vm, 0x61, 1);
    /* Mode 4 and 5: one low tick. */
    set_count(vm, 2, 4, 100);
    advance(vm, pit_ns(100));
    CHECK_EQ(in(vm, 0x61) & 0x20, 0);
    advance(vm, pit_ns(1));
    CHECK_EQ(in(vm, 0x61) & 0x20, 0x20);
    set_count(vm, 2, 5, 100);
    advance(vm, pit_ns(100));
    CHECK_EQ(in(vm, 0x61) & 0x20, 0x20);
    out(vm, 0x61, 0); out(vm, 0x61, 1);
    advance(vm, pit_ns(100));
    CHECK_EQ(in(vm, 0x61) & 0x20, 0);
    /* BCD. */
    out(vm, 0x43, 0xb1);
    out(vm, 0x42, 0x34); out(vm, 0x42, 0x12);
    advance(vm, pit_ns(35));
    CHECK_EQ(pit_count(vm, 2), 0x1199);
    /* LSB only. */
    out(vm, 0x43, 0x90);
    out(vm, 0x42, 200);
    advance(vm, pit_ns(50));
    CHECK_EQ(in(vm, 0x42), 150);
    /* Read-back of both: status first, then the latched count. */
    set_count(vm, 2, 2, 0);
    advance(vm, pit_ns(1));
    out(vm, 0x43, 0xc8);
    advance(vm, pit_ns(100));
    CHECK_EQ(in(vm, 0x42), 0xb4);
    CHECK_EQ(in(vm, 0x42), 0xff);
    CHECK_EQ(in(vm, 0x42), 0xff);
    /* The refresh bit toggles. */
    uint32_t first = in(vm, 0x61) & 0x10;
    advance(vm, 15085);
    CHECK(first != (in(vm, 0x61) & 0x10));
    scrap(vm);
}

static int count_ticks(struct kvs_vm *vm, int vector, uint64_t ns, uint64_t step)
{
    int ticks = 0;
    for (uint64_t t = 0; t < ns; t += step) {
        advance(vm, step);
        if (take(vm->vcpus[0]) == vector) {
            ticks++;
            out(vm, 0x20, 0x20);
        }
    }
    return ticks;
}

static void test_pit_irq(void)
{
    struct kvs_vm *vm = machine(1, KVS_CLOCK_VIRTUAL, 0);
    pic_init(vm, 0x01);
    CHECK_EQ(count_ticks(vm, 0x20, 10000000, 100000), 0);
    set_count(vm, 0, 2, 11932); /* 100 Hz; the output rises at once */
    (void)count_ticks(vm, 0x20, 1000, 1000);
    CHECK_EQ(count_ticks(vm, 0x20, 1000000000, 100000), 99);
    /* Images keep the phase. */
    struct kvs_pit_state2 a, b;
    CHECK_EQ(irqchip_get_pit(vm, &a), 0);
    uint64_t due = clock_next_deadline(vm);
    set_count(vm, 0, 2, 100);
    CHECK_EQ(irqchip_set_pit(vm, &a), 0);
    CHECK_EQ(irqchip_get_pit(vm, &b), 0);
    CHECK(!memcmp(&a, &b, sizeof a));
    CHECK_EQ(clock_next_deadline(vm), due);
    /* One shot. */
    set_count(vm, 0, 0, 1193);
    (void)count_ticks(vm, 0x20, 1000, 1000);
    CHECK_EQ(count_ticks(vm, 0x20, 990000, 10000), 0);
    CHECK_EQ(count_ticks(vm, 0x20, 100000000, 10000), 1);
    set_count(vm, 0, 3, 1193);
    (void)count_ticks(vm, 0x20, 1000, 1000);
    CHECK_EQ(count_ticks(vm, 0x20, 100000000, 10000), 100);
    set_count(vm, 0, 4, 1193);
    (void)count_ticks(vm, 0x20, 1000, 1000);
    CHECK_EQ(count_ticks(vm, 0x20, 100000000, 10000), 1);
    /* The fastest count does not make a storm. */
    set_count(vm, 0, 2, 2);
    uint64_t now = clock_now(vm);
    CHECK(clock_next_deadline(vm) >= now + 8000);
    CHECK(count_ticks(vm, 0x20, 1000000, 1000) <= 120);
    /* Hostile images. */
    a.channels[1].count = 70000;
    CHECK_EQ(irqchip_set_pit(vm, &a), -KVS_ESTATE);
    memset(&a, 0, sizeof a);
    for (int i = 0; i < 3; i++) {
        a.channels[i].mode = 255; /* KVM's power-on state */
        a.channels[i].count = 65536;
        a.channels[i].count_load_time = INT64_MAX;
    }
    CHECK_EQ(irqchip_set_pit(vm, &a), 0);
    CHECK_EQ(clock_next_deadline(vm), CLOCK_NEVER);
    scrap(vm);
}

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
    test_pit_channel2();
    test_pit_irq();
    test_clock_arithmetic();
    test_real_clock();
    printf("%d passed, %d failed\n", passed, failed);
    return failed != 0;
}
