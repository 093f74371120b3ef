/* The PIT: examples, and every mode against a model that counts each tick as the data sheet tells it. */
#include "irqchip_test.h"

static uint64_t pit_ns(uint64_t ticks) { return (ticks * 1000000000 + 1193181) / 1193182; }

/* To the first ns of the tick that comes n ticks later. */
static void ticks(struct kvs_vm *vm, uint64_t n)
{
    __extension__ unsigned __int128 now = clock_now(vm);
    advance(vm, pit_ns((uint64_t)(now * 1193182 / 1000000000) + n) - clock_now(vm));
}

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
    CHECK_EQ(status(vm, 2), 0x70); /* the count is loaded with the next tick */
    ticks(vm, 1);
    CHECK_EQ(status(vm, 2), 0x30);
    ticks(vm, 1000);
    CHECK_EQ(pit_count(vm, 2), 10932);
    out(vm, 0x61, 0); /* a low gate holds the count */
    advance(vm, 50000000);
    CHECK_EQ(pit_count(vm, 2), 10932);
    out(vm, 0x61, 1);
    ticks(vm, 10931);
    CHECK_EQ(in(vm, 0x61) & 0x20, 0);
    ticks(vm, 1);
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
    CHECK_EQ(in(vm, 0x61) & 0x20, 0x20);
    ticks(vm, 1);
    CHECK_EQ(in(vm, 0x61) & 0x20, 0);
    ticks(vm, 60);
    out(vm, 0x61, 0); out(vm, 0x61, 1);
    CHECK_EQ(in(vm, 0x61) & 0x20, 0);
    ticks(vm, 61);
    CHECK_EQ(in(vm, 0x61) & 0x20, 0);
    CHECK_EQ(pit_count(vm, 2), 40);
    ticks(vm, 41);
    CHECK_EQ(in(vm, 0x61) & 0x20, 0x20);
    /* Mode 2: low for the last tick. A new count waits for the end of the period. */
    set_count(vm, 2, 2, 1000);
    ticks(vm, 1 + 2000 + 300);
    CHECK_EQ(pit_count(vm, 2), 700);
    out(vm, 0x42, 500 & 0xff); out(vm, 0x42, 500 >> 8);
    CHECK_EQ(status(vm, 2) & 0x40, 0x40);
    CHECK_EQ(pit_count(vm, 2), 700);
    ticks(vm, 699);
    CHECK_EQ(in(vm, 0x61) & 0x20, 0);
    ticks(vm, 101);
    CHECK_EQ(status(vm, 2) & 0x40, 0);
    CHECK_EQ(pit_count(vm, 2), 400);
    /* Mode 3: odd counts are high one tick longer. */
    set_count(vm, 2, 3, 101);
    ticks(vm, 51);
    CHECK_EQ(in(vm, 0x61) & 0x20, 0x20);
    ticks(vm, 1);
    CHECK_EQ(in(vm, 0x61) & 0x20, 0);
    out(vm, 0x61, 2); /* a low gate forces high */
    CHECK_EQ(in(vm, 0x61) & 0x23, 0x22);
    out(vm, 0x61, 1);
    /* Mode 4 and 5: one low tick. */
    set_count(vm, 2, 4, 100);
    ticks(vm, 101);
    CHECK_EQ(in(vm, 0x61) & 0x20, 0);
    ticks(vm, 1);
    CHECK_EQ(in(vm, 0x61) & 0x20, 0x20);
    set_count(vm, 2, 5, 100);
    ticks(vm, 100);
    CHECK_EQ(in(vm, 0x61) & 0x20, 0x20);
    out(vm, 0x61, 0); out(vm, 0x61, 1);
    ticks(vm, 101);
    CHECK_EQ(in(vm, 0x61) & 0x20, 0);
    /* BCD. */
    out(vm, 0x43, 0xb1);
    out(vm, 0x42, 0x34); out(vm, 0x42, 0x12);
    ticks(vm, 36);
    CHECK_EQ(pit_count(vm, 2), 0x1199);
    /* LSB only. */
    out(vm, 0x43, 0x90);
    out(vm, 0x42, 200);
    ticks(vm, 51);
    CHECK_EQ(in(vm, 0x42), 150);
    /* Read-back of both: status first, then the latched count. */
    set_count(vm, 2, 2, 0);
    ticks(vm, 2);
    out(vm, 0x43, 0xc8);
    ticks(vm, 100);
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
    set_count(vm, 0, 2, 11932); /* 100 Hz; the output is high, so that this is no edge */
    CHECK_EQ(take(vm->vcpus[0]), -1);
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
    /* Now it is low: mode 2 and 3 raise it with the control word. */
    set_count(vm, 0, 0, 0);
    CHECK_EQ(take(vm->vcpus[0]), -1);
    set_count(vm, 0, 3, 1193);
    CHECK_EQ(take(vm->vcpus[0]), 0x20);
    out(vm, 0x20, 0x20);
    ticks(vm, 1 + 700); /* the low half ends early: an edge */
    out(vm, 0x43, 0x34);
    CHECK_EQ(take(vm->vcpus[0]), 0x20);
    out(vm, 0x20, 0x20);
    set_count(vm, 0, 3, 1193);
    CHECK_EQ(take(vm->vcpus[0]), -1);
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


/* ---- one counter of the 8254, clocked. Data sheet "Mode Definitions" ---- */
struct model { uint32_t mode, cr, ce; bool bcd, odd, gate, out, null, loaded, pending, trigger, expired; };

static uint32_t wrap(const struct model *m) { return m->bcd ? 10000 : 65536; }

static void model_control(struct model *m, uint32_t mode, bool bcd)
{
    *m = (struct model){ .mode = mode, .bcd = bcd, .gate = m->gate, .out = mode != 0, .null = true };
}
static void model_count(struct model *m, uint32_t count)
{
    bool runs = m->loaded && (m->mode == 1 || m->mode == 5 || ((m->mode == 2 || m->mode == 3) && m->gate));
    m->cr = count ? count : wrap(m);
    m->null = true;
    if (m->mode == 0)
        m->out = m->loaded = false;
    if (!runs && m->mode != 1 && m->mode != 5)
        m->pending = true; /* loaded with the next clock */
}
static void model_gate(struct model *m, bool gate)
{
    if (gate && !m->gate)
        m->trigger = m->cr && (m->mode == 1 || m->mode == 5 || ((m->mode == 2 || m->mode == 3) && (m->loaded || m->pending)));
    if (!gate && (m->mode == 2 || m->mode == 3))
        m->out = true;
    m->gate = gate;
}
static void model_load(struct model *m)
{
    m->ce = m->mode == 3 ? m->cr & ~1u : m->cr;
    m->odd = m->cr & 1;
    m->null = m->pending = m->trigger = m->expired = false;
    m->loaded = true;
}
static void model_clock(struct model *m)
{
    if (m->pending || m->trigger) {
        model_load(m);
        m->out = m->mode != 0 && m->mode != 1;
        return;
    }
    if (!m->loaded || (!m->gate && m->mode != 1 && m->mode != 5))
        return;
    switch (m->mode) {
    case 2:
        if (--m->ce == 0)
            model_load(m);
        m->out = m->ce != 1;
        break;
    case 3: /* an odd count spends one clock more, at zero, in its high half */
        if (m->ce == 0 || (m->ce == 2 && !(m->out && m->odd))) {
            m->out = !m->out;
            model_load(m);
        } else {
            m->ce -= 2;
        }
        break;
    default:
        m->ce = (m->ce + wrap(m) - 1) % wrap(m);
        if (m->mode < 2)
            m->out |= m->ce == 0;
        else
            m->out = m->ce != 0 || m->expired;
        m->expired |= m->ce == 0;
        break;
    }
}

static uint64_t rnd_state = 88172645463325252ull;
static uint32_t below(uint32_t n)
{
    rnd_state ^= rnd_state << 13; rnd_state ^= rnd_state >> 7; rnd_state ^= rnd_state << 17;
    return (uint32_t)((rnd_state >> 20) % n);
}
static uint32_t to_bcd(uint32_t v) { return v / 1000 % 10 << 12 | v / 100 % 10 << 8 | v / 10 % 10 << 4 | v % 10; }

static void compare(struct kvs_vm *vm, uint16_t n, struct model *m, bool reads)
{
    out(vm, 0x43, 0xe0 | 2u << n);
    uint32_t st = in(vm, 0x40 + n);
    CHECK_EQ(st >> 7, m->out);
    CHECK_EQ(st >> 6 & 1, m->null);
    CHECK_EQ(st & 0x3f, 0x30 | m->mode << 1 | m->bcd);
    if (n == 2)
        CHECK_EQ(in(vm, 0x61) >> 5 & 1, m->out);
    /* Before the first load and between a count and its load the data sheet leaves the reading open. */
    if (reads && m->loaded && !m->pending && !m->trigger)
        CHECK_EQ(pit_count(vm, n), m->bcd ? to_bcd(m->ce) : m->ce & 0xffff);
}

static void test_pit_model(uint16_t n)
{
    struct kvs_vm *vm = machine(1, KVS_CLOCK_VIRTUAL, 0);
    struct model m = { .gate = n == 0 };
    pic_init(vm, 0x03); /* automatic EOI: every edge is taken */
    for (int round = 0; round < 500; round++) {
        bool bcd = below(4) == 0;
        uint32_t mode = below(6), least = n ? 3 : 12; /* shorter ones are thinned on channel 0 */
        model_control(&m, mode, bcd);
        out(vm, 0x43, (uint32_t)n << 6 | 0x30 | (below(2) && (mode == 2 || mode == 3) ? mode + 4 : mode) << 1 | bcd);
        compare(vm, n, &m, false);
        ticks(vm, 1 + below(3));
        (void)take(vm->vcpus[0]); /* the control word may raise the output */
        for (int step = 0; step < 8; step++) {
            uint32_t count = below(16) == 0 ? 0 : below(3) ? least + below(40) : least + below(3000);
            uint32_t run = below(4) ? below(100) : below(200000), act = below(4);
            if (act < 2 || !step) {
                uint32_t raw = bcd ? to_bcd(count) : count;
                out(vm, 0x40 + n, raw & 0xff);
                if (mode == 0) { /* the first byte stops it */
                    m.loaded = m.out = m.pending = false;
                    m.null = true;
                    compare(vm, n, &m, false);
                }
                out(vm, 0x40 + n, raw >> 8);
                model_count(&m, count);
            } else if (n == 2) {
                bool gate = below(2);
                out(vm, 0x61, gate);
                model_gate(&m, gate);
            }
            compare(vm, n, &m, false);
            if (below(2))
                run = run % 60;
            bool last = m.out;
            for (uint32_t t = 0; t < run; t++) {
                model_clock(&m);
                if (n == 0) { /* each rise is one interrupt, in that very tick */
                    ticks(vm, 1);
                    CHECK_EQ(take(vm->vcpus[0]), m.out && !last ? 0x20 : -1);
                    last = m.out;
                } else if (run < 60) {
                    ticks(vm, 1);
                    compare(vm, n, &m, true);
                }
            }
            if (n && run >= 60)
                ticks(vm, run);
            if (!run)
                ticks(vm, 1), model_clock(&m);
            (void)take(vm->vcpus[0]);
            compare(vm, n, &m, true);
            /* At any point the image holds it all. */
            struct kvs_pit_state2 a, b;
            CHECK_EQ(irqchip_get_pit(vm, &a), 0);
            if (below(4) == 0)
                out(vm, 0x43, (uint32_t)n << 6 | 0x34);
            CHECK_EQ(irqchip_set_pit(vm, &a), 0);
            CHECK_EQ(irqchip_get_pit(vm, &b), 0);
            CHECK(!memcmp(&a, &b, sizeof a));
            (void)take(vm->vcpus[0]); /* of the control word between */
            if (failed > 20)
                return;
        }
    }
    scrap(vm);
}

int main(void)
{
    test_pit_channel2();
    test_pit_irq();
    test_pit_model(2);
    test_pit_model(0);
    printf("%d passed, %d failed\n", passed, failed);
    return failed != 0;
}
