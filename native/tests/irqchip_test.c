/*
 * Clock, interrupt controllers, PIT and kvmclock, on fake vCPUs. It brings its own vcpu_request and
 * guest memory, so that of the core only clock.c and irqchip/ are linked.
 */
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "../src/irqchip/chips.h"

static _Atomic int passed, failed;
#define CHECK(cond)                                                                \
    do {                                                                           \
        if (cond) {                                                                \
            passed++;                                                              \
        } else {                                                                   \
            failed++;                                                              \
            printf("%s:%d: %s: %s\n", __FILE__, __LINE__, __func__, #cond);        \
        }                                                                          \
    } while (0)
#define CHECK_EQ(a, b)                                                             \
    do {                                                                           \
        long long a_ = (long long)(a), b_ = (long long)(b);                        \
        if (a_ == b_) {                                                            \
            passed++;                                                              \
        } else {                                                                   \
            failed++;                                                              \
            printf("%s:%d: %s: %s is 0x%llx, not 0x%llx\n", __FILE__, __LINE__, __func__, #a, a_, b_); \
        }                                                                          \
    } while (0)

/* ---- what the controllers need from the rest of the core ---- */
static uint8_t guest_memory[0x2000];
static struct memslot slot0;

void vcpu_request(struct kvs_vcpu *c, uint32_t req) { atomic_fetch_or(&c->requests, req); }

uint8_t *gpa_to_host(struct kvs_vm *vm, uint64_t gpa, uint64_t *left, struct memslot **slot)
{
    (void)vm;
    if (gpa >= sizeof guest_memory)
        return NULL;
    *left = sizeof guest_memory - gpa;
    *slot = &slot0;
    return guest_memory + gpa;
}

int32_t vm_mem_write(struct kvs_vm *vm, uint64_t gpa, const void *data, uint64_t length)
{
    (void)vm;
    if (gpa >= sizeof guest_memory || length > sizeof guest_memory - gpa)
        return -KVS_EFAULT;
    memcpy(guest_memory + gpa, data, length);
    return 0;
}

/* ---- a machine ---- */
static struct kvs_vm *machine(uint32_t vcpus, uint32_t mode, uint32_t khz)
{
    struct kvs_vm *vm = calloc(1, sizeof *vm);
    vm->config.clock_mode = mode;
    vm->config.tsc_khz = khz;
    CHECK_EQ(clock_create(vm), 0);
    CHECK_EQ(irqchip_create(vm), 0);
    CHECK_EQ(irqchip_create_pit(vm), 0);
    for (uint32_t i = 0; i < vcpus; i++) {
        struct kvs_vcpu *c = calloc(1, sizeof *c);
        c->vm = vm;
        c->id = i;
        atomic_init(&c->mp_state, i ? KVS_MP_STATE_UNINITIALIZED : KVS_MP_STATE_RUNNABLE);
        CHECK_EQ(lapic_create(c), 0);
        vm->vcpus[i] = c;
        atomic_fetch_add(&vm->vcpu_count, 1);
    }
    return vm;
}

static void scrap(struct kvs_vm *vm)
{
    for (uint32_t i = 0; i < vm->vcpu_count; i++) {
        lapic_destroy(vm->vcpus[i]);
        free(vm->vcpus[i]);
    }
    irqchip_destroy(vm);
    clock_destroy(vm);
    free(vm);
}

static void advance(struct kvs_vm *vm, uint64_t ns)
{
    uint64_t end = clock_now(vm) + ns;
    while (clock_next_deadline(vm) <= end) {
        clock_set_virtual(vm, max_u64(clock_next_deadline(vm), clock_now(vm)));
        clock_run_timers(vm);
    }
    clock_set_virtual(vm, end);
}

static void out(struct kvs_vm *vm, uint16_t port, uint32_t value)
{
    CHECK(irqchip_port_write(vm->vcpus[0], port, 1, value));
}
static uint32_t in(struct kvs_vm *vm, uint16_t port)
{
    uint32_t value = 0xdead;
    CHECK(irqchip_port_read(vm->vcpus[0], port, 1, &value));
    return value;
}
static int take(struct kvs_vcpu *c) { return irqchip_has_interrupt(c) ? irqchip_ack(c) : -1; }
static void apic(struct kvs_vcpu *c, uint32_t offset, uint32_t value) { lapic_mmio_write(c, offset, value); }
static uint32_t apic_rd(struct kvs_vcpu *c, uint32_t offset) { return lapic_mmio_read(c, offset); }
static void enable(struct kvs_vcpu *c) { apic(c, 0xf0, 0x1ff); }

static void ioapic_wr(struct kvs_vm *vm, uint32_t index, uint32_t value)
{
    CHECK(ioapic_mmio_write(vm, 0xfec00000, &index, 4));
    CHECK(ioapic_mmio_write(vm, 0xfec00010, &value, 4));
}
static uint32_t ioapic_rd(struct kvs_vm *vm, uint32_t index)
{
    uint32_t value = 0;
    CHECK(ioapic_mmio_write(vm, 0xfec00000, &index, 4));
    CHECK(ioapic_mmio_read(vm, 0xfec00010, &value, 4));
    return value;
}

static void pic_init(struct kvs_vm *vm, uint8_t icw4)
{
    out(vm, 0x20, 0x11); out(vm, 0x21, 0x20); out(vm, 0x21, 0x04); out(vm, 0x21, icw4);
    out(vm, 0xa0, 0x11); out(vm, 0xa1, 0x28); out(vm, 0xa1, 0x02); out(vm, 0xa1, 0x01);
}

/* ---- PIC ---- */
static void test_pic(void)
{
    struct kvs_vm *vm = machine(1, KVS_CLOCK_VIRTUAL, 0);
    struct kvs_vcpu *c = vm->vcpus[0];
    pic_init(vm, 0x01);
    CHECK_EQ(in(vm, 0x21), 0);
    out(vm, 0x21, 0xfb);
    CHECK_EQ(in(vm, 0x21), 0xfb);
    out(vm, 0x21, 0);

    /* Priorities, in-service blocking, EOI. */
    irqchip_set_line(vm, 4, 1);
    CHECK(atomic_load(&c->requests) & REQ_EVENT);
    irqchip_set_line(vm, 1, 1);
    CHECK_EQ(take(c), 0x21);
    CHECK_EQ(take(c), -1);
    out(vm, 0x20, 0x0b);
    CHECK_EQ(in(vm, 0x20), 0x02);
    out(vm, 0x20, 0x0a);
    CHECK_EQ(in(vm, 0x20), 0x10);
    out(vm, 0x20, 0x20);
    CHECK_EQ(take(c), 0x24);
    out(vm, 0x20, 0x64);
    /* The lines are still high: an edge needs low and high again. */
    irqchip_set_line(vm, 4, 1);
    CHECK_EQ(take(c), -1);
    irqchip_set_line(vm, 4, 0);
    irqchip_set_line(vm, 4, 1);
    CHECK_EQ(take(c), 0x24);
    out(vm, 0x20, 0x20);
    irqchip_set_line(vm, 4, 0);
    irqchip_set_line(vm, 1, 0);

    /* Cascade: both need an EOI; the next slave request follows. */
    irqchip_set_line(vm, 12, 1);
    irqchip_set_line(vm, 8, 1);
    CHECK_EQ(take(c), 0x28);
    out(vm, 0xa0, 0x20);
    CHECK_EQ(take(c), -1);
    out(vm, 0x20, 0x20);
    CHECK_EQ(take(c), 0x2c);
    out(vm, 0xa0, 0x20); out(vm, 0x20, 0x20);
    CHECK_EQ(take(c), -1);
    irqchip_set_line(vm, 8, 0);
    irqchip_set_line(vm, 12, 0);
    /* A slave request that is masked before the acknowledge goes away. */
    irqchip_set_line(vm, 10, 1);
    out(vm, 0xa1, 0x04);
    CHECK_EQ(take(c), -1);
    out(vm, 0xa1, 0);
    CHECK_EQ(take(c), 0x2a);
    out(vm, 0xa0, 0x20); out(vm, 0x20, 0x20);
    irqchip_set_line(vm, 10, 0);

    /* Level through ELCR: follows the line. */
    out(vm, 0x4d1, 0xff);
    CHECK_EQ(in(vm, 0x4d1), 0xde);
    out(vm, 0x4d0, 0xff);
    CHECK_EQ(in(vm, 0x4d0), 0xf8);
    irqchip_set_line(vm, 11, 1);
    CHECK_EQ(take(c), 0x2b);
    out(vm, 0xa0, 0x20); out(vm, 0x20, 0x20);
    CHECK_EQ(take(c), 0x2b);
    irqchip_set_line(vm, 11, 0);
    out(vm, 0xa0, 0x20); out(vm, 0x20, 0x20);
    CHECK_EQ(take(c), -1);
    out(vm, 0x4d0, 0); out(vm, 0x4d1, 0);

    /* Rotation: after IRQ 3 it is the lowest. */
    irqchip_set_line(vm, 3, 1);
    CHECK_EQ(take(c), 0x23);
    out(vm, 0x20, 0xa0);
    irqchip_set_line(vm, 3, 0);
    irqchip_set_line(vm, 3, 1);
    irqchip_set_line(vm, 5, 1);
    CHECK_EQ(take(c), 0x25);
    out(vm, 0x20, 0x65);
    CHECK_EQ(take(c), 0x23);
    out(vm, 0x20, 0x20);
    out(vm, 0x20, 0xc7); /* back to IRQ 0 highest */

    /* Special mask mode: a masked in-service level lets lower ones through. */
    irqchip_set_line(vm, 1, 1);
    CHECK_EQ(take(c), 0x21);
    irqchip_set_line(vm, 6, 1);
    CHECK_EQ(take(c), -1);
    out(vm, 0x21, 0x02);
    CHECK_EQ(take(c), -1);
    out(vm, 0x20, 0x68);
    CHECK_EQ(take(c), 0x26);
    out(vm, 0x20, 0x66); out(vm, 0x20, 0x48); out(vm, 0x21, 0); out(vm, 0x20, 0x61);

    /* Poll. */
    out(vm, 0x20, 0x0c);
    CHECK_EQ(in(vm, 0x20), 0);
    irqchip_set_line(vm, 7, 1);
    out(vm, 0x20, 0x0c);
    CHECK_EQ(in(vm, 0x20), 0x87);
    CHECK_EQ(take(c), -1);
    out(vm, 0x20, 0x20);

    /* Specially fully nested: a better slave request interrupts the slave's service. */
    for (int i = 1; i < 16; i++)
        irqchip_set_line(vm, (uint32_t)i, 0);
    pic_init(vm, 0x11);
    irqchip_set_line(vm, 13, 1);
    CHECK_EQ(take(c), 0x2d);
    irqchip_set_line(vm, 9, 1);
    CHECK_EQ(take(c), 0x29);

    /* Automatic EOI, with rotation. */
    irqchip_set_line(vm, 13, 0); irqchip_set_line(vm, 9, 0);
    pic_init(vm, 0x03);
    out(vm, 0x20, 0x80);
    irqchip_set_line(vm, 3, 0); irqchip_set_line(vm, 3, 1);
    CHECK_EQ(take(c), 0x23);
    out(vm, 0x20, 0x0b);
    CHECK_EQ(in(vm, 0x20), 0);
    irqchip_set_line(vm, 3, 0); irqchip_set_line(vm, 3, 1);
    irqchip_set_line(vm, 4, 0); irqchip_set_line(vm, 4, 1);
    CHECK_EQ(take(c), 0x24);
    CHECK_EQ(take(c), 0x23);

    /* ICW1 forgets the edge of a line that stays high. */
    irqchip_set_line(vm, 5, 0); irqchip_set_line(vm, 5, 1);
    pic_init(vm, 0x01);
    irqchip_set_line(vm, 5, 1);
    CHECK_EQ(take(c), -1);

    /* Images. */
    struct kvs_irqchip a = { .chip_id = KVS_IRQCHIP_PIC_MASTER }, b = a;
    CHECK_EQ(irqchip_get(vm, &a), 0);
    CHECK_EQ(irqchip_set(vm, &a), 0);
    CHECK_EQ(irqchip_get(vm, &b), 0);
    CHECK(!memcmp(&a, &b, sizeof a));
    a.chip.pic.priority_add = 8;
    CHECK_EQ(irqchip_set(vm, &a), -KVS_ESTATE);
    a.chip_id = 3;
    CHECK_EQ(irqchip_set(vm, &a), -KVS_EINVAL);
    scrap(vm);
}

/* ---- virtual wire ---- */
static void test_virtual_wire(void)
{
    struct kvs_vm *vm = machine(2, KVS_CLOCK_VIRTUAL, 0);
    struct kvs_vcpu *c = vm->vcpus[0];
    pic_init(vm, 0x01);
    irqchip_set_line(vm, 1, 1);
    CHECK(irqchip_has_interrupt(c));
    CHECK(!irqchip_has_interrupt(vm->vcpus[1]));
    apic(c, 0x350, 0x10700);
    CHECK(!irqchip_has_interrupt(c));
    enable(c);
    atomic_store(&c->requests, 0);
    apic(c, 0x350, 0x700);
    CHECK(atomic_load(&c->requests) & REQ_EVENT);
    CHECK(irqchip_has_interrupt(c));
    apic(c, 0x350, 0x10700);
    CHECK_EQ(lapic_msr_write(c, 0x1b, 0xfee00100), 0); /* globally disabled */
    CHECK_EQ(take(c), 0x21);
    /* As a fixed interrupt, and as an NMI. */
    CHECK_EQ(lapic_msr_write(c, 0x1b, 0xfee00900), 0);
    enable(c);
    out(vm, 0x20, 0x20);
    apic(c, 0x350, 0x31);
    irqchip_set_line(vm, 1, 0); irqchip_set_line(vm, 1, 1);
    CHECK_EQ(take(c), 0x31);
    apic(c, 0xb0, 0);
    apic(c, 0x350, 0x400);
    out(vm, 0x20, 0x0c); (void)in(vm, 0x20); out(vm, 0x20, 0x20);
    irqchip_set_line(vm, 1, 0); irqchip_set_line(vm, 1, 1);
    CHECK(atomic_load(&c->nmi_pending));
    scrap(vm);
}

/* ---- IOAPIC ---- */
static void test_ioapic(void)
{
    struct kvs_vm *vm = machine(1, KVS_CLOCK_VIRTUAL, 0);
    struct kvs_vcpu *c = vm->vcpus[0];
    enable(c);
    apic(c, 0x350, 0x10700); /* no virtual wire */
    CHECK_EQ(ioapic_rd(vm, 1), 0x170011);
    CHECK_EQ(ioapic_rd(vm, 0x10), 0x10000);
    ioapic_wr(vm, 0, 0x0f000000);
    CHECK_EQ(ioapic_rd(vm, 0), 0x0f000000);
    CHECK(!ioapic_mmio_read(vm, 0xfec00100, guest_memory, 4));
    CHECK_EQ(ioapic_rd(vm, 0xff), 0);

    /* Edge; GSI 0 is pin 2. */
    ioapic_wr(vm, 0x14, 0x30);
    irqchip_set_line(vm, 0, 1);
    CHECK_EQ(take(c), 0x30);
    irqchip_set_line(vm, 0, 1);
    apic(c, 0xb0, 0);
    CHECK_EQ(take(c), -1);
    irqchip_set_line(vm, 0, 0);
    irqchip_set_line(vm, 0, 1);
    CHECK_EQ(take(c), 0x30);
    apic(c, 0xb0, 0);

    /* Level: remote IRR until EOI, again while high. */
    ioapic_wr(vm, 0x10 + 2 * 20, 0x8041);
    irqchip_set_line(vm, 20, 1);
    CHECK_EQ(ioapic_rd(vm, 0x10 + 2 * 20), 0xc041);
    CHECK_EQ(take(c), 0x41);
    CHECK_EQ(take(c), -1);
    apic(c, 0xb0, 0);
    CHECK_EQ(take(c), 0x41);
    irqchip_set_line(vm, 20, 0);
    apic(c, 0xb0, 0);
    CHECK_EQ(take(c), -1);
    CHECK_EQ(ioapic_rd(vm, 0x10 + 2 * 20), 0x8041);
    /* Masked while high, delivered at unmask. */
    ioapic_wr(vm, 0x10 + 2 * 20, 0x18041);
    irqchip_set_line(vm, 20, 1);
    CHECK_EQ(take(c), -1);
    ioapic_wr(vm, 0x10 + 2 * 20, 0x8041);
    CHECK_EQ(take(c), 0x41);
    /* The switch to edge clears remote IRR. */
    ioapic_wr(vm, 0x10 + 2 * 20, 0x10041);
    CHECK_EQ(ioapic_rd(vm, 0x10 + 2 * 20), 0x10041);
    irqchip_set_line(vm, 20, 0);
    apic(c, 0xb0, 0);
    /* Read-only and reserved bits. */
    ioapic_wr(vm, 0x12, 0xfffff0ff);
    CHECK_EQ(ioapic_rd(vm, 0x12), 0x1a0ff);
    ioapic_wr(vm, 0x13, 0xffffffff);
    CHECK_EQ(ioapic_rd(vm, 0x13), 0xff000000);

    struct kvs_irqchip a = { .chip_id = KVS_IRQCHIP_IOAPIC }, b = a;
    CHECK_EQ(irqchip_get(vm, &a), 0);
    CHECK_EQ(irqchip_set(vm, &a), 0);
    CHECK_EQ(irqchip_get(vm, &b), 0);
    CHECK(!memcmp(&a, &b, sizeof a));
    a.chip.ioapic.base_address = ~0ull;
    CHECK_EQ(irqchip_set(vm, &a), -KVS_ESTATE);
    scrap(vm);
}

/* ---- LAPIC ---- */
static void test_lapic_priority(void)
{
    struct kvs_vm *vm = machine(1, KVS_CLOCK_VIRTUAL, 0);
    struct kvs_vcpu *c = vm->vcpus[0];
    struct kvs_msi msi = { .address_lo = 0xfee00000, .data = 0x55 };
    CHECK_EQ(apic_rd(c, 0x30), 0x50014);
    CHECK_EQ(apic_rd(c, 0x350), 0x700);
    CHECK_EQ(apic_rd(c, 0xf0), 0xff);
    CHECK_EQ(irqchip_send_msi(vm, &msi), 0); /* software-disabled */
    apic(c, 0x320, 0x20);
    CHECK_EQ(apic_rd(c, 0x320), 0x10020);
    enable(c);
    CHECK_EQ(irqchip_send_msi(vm, &msi), 1);
    msi.data = 0x61;
    CHECK_EQ(irqchip_send_msi(vm, &msi), 1);
    msi.address_lo = 0x1000;
    CHECK_EQ(irqchip_send_msi(vm, &msi), 0);
    msi.address_lo = 0xfee00000;
    CHECK_EQ(take(c), 0x61);
    CHECK_EQ(apic_rd(c, 0xa0), 0x60);
    CHECK_EQ(take(c), -1); /* 0x55 is below */
    msi.data = 0x6f;
    irqchip_send_msi(vm, &msi);
    CHECK_EQ(take(c), -1); /* the same class */
    msi.data = 0x70;
    irqchip_send_msi(vm, &msi);
    CHECK_EQ(take(c), 0x70);
    CHECK_EQ(apic_rd(c, 0x130), 1u << 16 | 1u << 1);
    apic(c, 0xb0, 0);
    CHECK_EQ(take(c), -1);
    apic(c, 0xb0, 0);
    CHECK_EQ(take(c), 0x6f);
    apic(c, 0xb0, 0);
    lapic_set_cr8(c, 5);
    CHECK_EQ(apic_rd(c, 0x80), 0x50);
    CHECK_EQ(take(c), -1);
    atomic_store(&c->requests, 0);
    lapic_set_cr8(c, 4);
    CHECK_EQ(atomic_load(&c->requests), REQ_EVENT);
    CHECK_EQ(lapic_cr8(c), 4);
    CHECK_EQ(take(c), 0x55);
    apic(c, 0xb0, 0);
    apic(c, 0xb0, 0); /* nothing in service */

    /* Errors: latched by a write to ESR; the entry delivers. */
    apic(c, 0x370, 0xfe);
    msi.data = 5;
    irqchip_send_msi(vm, &msi);
    CHECK_EQ(apic_rd(c, 0x280), 0);
    apic(c, 0x280, 0);
    CHECK_EQ(apic_rd(c, 0x280), 0x40);
    CHECK_EQ(take(c), 0xfe);
    apic(c, 0xb0, 0);
    apic(c, 0x300, 0x40003); /* self IPI, illegal vector */
    (void)apic_rd(c, 0x2f0);
    apic(c, 0x280, 0);
    CHECK_EQ(apic_rd(c, 0x280), 0xa0);
    apic(c, 0x370, 0x03); /* an illegal error vector does not recurse */
    (void)apic_rd(c, 0x2f0);
    apic(c, 0x370, 0x100ff);
    apic(c, 0x280, 0);
    scrap(vm);
}

static void to_x2apic(struct kvs_vcpu *c)
{
    CHECK_EQ(lapic_msr_write(c, 0x1b, lapic_base(c) | 0xc00), 0);
    CHECK_EQ(lapic_msr_write(c, 0x80f, 0x1ff), 0);
}

static void test_ipi(void)
{
    struct kvs_vm *vm = machine(4, KVS_CLOCK_VIRTUAL, 0);
    struct kvs_vcpu **v = vm->vcpus;
    for (int i = 0; i < 4; i++) {
        enable(v[i]);
        apic(v[i], 0xd0, 1u << (24 + i));
    }
    apic(v[0], 0x310, 2u << 24);
    apic(v[0], 0x300, 0x50);
    CHECK_EQ(take(v[2]), 0x50);
    CHECK_EQ(take(v[0]), -1);
    apic(v[0], 0x310, 0xau << 24); /* logical flat: 1 and 3 */
    apic(v[0], 0x300, 0x851);
    CHECK_EQ(take(v[1]), 0x51);
    CHECK_EQ(take(v[3]), 0x51);
    CHECK_EQ(take(v[2]), -1);
    apic(v[0], 0x300, 0xc0060); /* all but self */
    CHECK_EQ(take(v[0]), -1);
    CHECK_EQ(take(v[2]), 0x60);
    apic(v[0], 0x300, 0x80061); /* all with self */
    CHECK_EQ(take(v[0]), 0x61);
    apic(v[0], 0x300, 0x40072); /* self */
    CHECK_EQ(take(v[0]), 0x72);
    apic(v[0], 0x310, 0xffu << 24);
    apic(v[0], 0x300, 0x00080); /* physical broadcast */
    CHECK_EQ(take(v[0]), 0x80);
    CHECK_EQ(take(v[2]), 0x80);
    CHECK_EQ(take(v[3]), 0x80);
    /* Cluster model: cluster 1, members 0 and 1. */
    for (int i = 0; i < 4; i++) {
        apic(v[i], 0xe0, 0x0fffffff);
        apic(v[i], 0xd0, (uint32_t)(0x10 * (1 + i / 2) + (1 << (i & 1))) << 24);
    }
    apic(v[0], 0x310, 0x22u << 24);
    apic(v[0], 0x300, 0x890);
    CHECK_EQ(take(v[3]), 0x90);
    CHECK_EQ(take(v[2]), -1);
    /* NMI, INIT, SIPI. */
    apic(v[0], 0x310, 1u << 24);
    apic(v[0], 0x300, 0x400);
    CHECK(atomic_load(&v[1]->nmi_pending));
    atomic_store(&v[1]->mp_state, KVS_MP_STATE_RUNNABLE);
    apic(v[0], 0x300, 0x4612);
    CHECK_EQ(atomic_load(&v[1]->mp_state), KVS_MP_STATE_RUNNABLE); /* not waiting for it */
    apic(v[0], 0x300, 0x8500);                                     /* de-assert: nothing */
    CHECK_EQ(atomic_load(&v[1]->mp_state), KVS_MP_STATE_RUNNABLE);
    apic(v[0], 0x300, 0xc500);
    CHECK_EQ(atomic_load(&v[1]->mp_state), KVS_MP_STATE_INIT_RECEIVED);
    apic(v[0], 0x300, 0x4612);
    CHECK_EQ(atomic_load(&v[1]->mp_state), KVS_MP_STATE_SIPI_RECEIVED);
    CHECK_EQ(v[1]->sipi_vector, 0x12);
    apic(v[0], 0x300, 0x4634);
    CHECK_EQ(v[1]->sipi_vector, 0x12);
    /* Lowest priority goes to exactly one, the least busy. */
    for (int i = 0; i < 4; i++) {
        lapic_reset(v[i], true);
        enable(v[i]);
        apic(v[i], 0xd0, 1u << (24 + i));
        apic(v[i], 0x80, i == 2 ? 0x10 : 0x40);
    }
    struct kvs_msi msi = { .address_lo = 0xfeeff004, .data = 0x1a5 };
    CHECK_EQ(irqchip_send_msi(vm, &msi), 1);
    CHECK_EQ(take(v[2]), 0xa5);

    /* x2APIC. */
    for (int i = 0; i < 4; i++)
        to_x2apic(v[i]);
    uint64_t x;
    CHECK_EQ(lapic_msr_read(v[3], 0x802, &x), 0);
    CHECK_EQ(x, 3);
    CHECK_EQ(lapic_msr_read(v[3], 0x80d, &x), 0);
    CHECK_EQ(x, 8);
    CHECK_EQ(lapic_msr_write(v[0], 0x830, 3ull << 32 | 0xb1), 0);
    CHECK_EQ(take(v[3]), 0xb1);
    CHECK_EQ(lapic_msr_write(v[0], 0x830, 6ull << 32 | 0x8b2), 0); /* logical: 1 and 2 */
    CHECK_EQ(take(v[1]), 0xb2);
    CHECK_EQ(take(v[2]), 0xb2);
    CHECK_EQ(lapic_msr_write(v[0], 0x830, 0xffffffffull << 32 | 0xc3), 0);
    CHECK_EQ(take(v[1]), 0xc3);
    CHECK_EQ(lapic_msr_write(v[0], 0x83f, 0xd4), 0);
    CHECK_EQ(take(v[0]), 0xd4);
    CHECK_EQ(lapic_msr_read(v[0], 0x83f, &x), -1);
    CHECK_EQ(lapic_msr_write(v[0], 0x83f, 0x1d4), -1);
    CHECK_EQ(lapic_msr_write(v[0], 0x80b, 1), -1);
    CHECK_EQ(lapic_msr_write(v[0], 0x80b, 0), 0);
    CHECK_EQ(lapic_msr_write(v[0], 0x802, 0), -1);
    CHECK_EQ(lapic_msr_write(v[0], 0x80e, 0), -1);
    CHECK_EQ(lapic_msr_write(v[0], 0x831, 0), -1);
    CHECK_EQ(lapic_msr_write(v[0], 0x808, 0x100), -1);
    CHECK_EQ(lapic_msr_write(v[0], 0x830, 1ull << 20), -1);
    CHECK_EQ(lapic_msr_write(v[0], 0x832, 1ull << 32), -1);
    CHECK_EQ(lapic_msr_write(v[0], 0x835, 0x10700), 0);
    CHECK_EQ(lapic_msr_read(v[0], 0x8ff, &x), -1);
    CHECK_EQ(lapic_msr_read(v[0], 0x82f, &x), -1);
    CHECK(!lapic_mmio_match(v[0], 0xfee00000));
    /* Illegal transitions. */
    CHECK_EQ(lapic_msr_write(v[0], 0x1b, 0xfee00900), -1);
    CHECK_EQ(lapic_msr_write(v[0], 0x1b, 0xfee00500), -1);
    CHECK_EQ(lapic_msr_write(v[0], 0x1b, 0xfee00d01), -1);
    CHECK_EQ(lapic_msr_write(v[0], 0x1b, 0xfee00100), 0);
    CHECK_EQ(lapic_msr_write(v[0], 0x1b, 0xfee00d00), -1);
    CHECK_EQ(lapic_msr_write(v[0], 0x1b, 0xfee00900), 0);
    CHECK(lapic_mmio_match(v[0], 0xfee00ff0));
    CHECK_EQ(lapic_msr_read(v[0], 0x802, &x), -1);
    CHECK_EQ(lapic_restore_base(v[0], 0xfee00d00), 0);
    scrap(vm);
}

static void test_lapic_timer(void)
{
    struct kvs_vm *vm = machine(1, KVS_CLOCK_VIRTUAL, 2000000);
    struct kvs_vcpu *c = vm->vcpus[0];
    enable(c);
    apic(c, 0x3e0, 0x3); /* by 16 */
    apic(c, 0x320, 0x40);
    apic(c, 0x380, 1000);
    CHECK_EQ(clock_next_deadline(vm), 16000);
    advance(vm, 8000);
    CHECK_EQ(apic_rd(c, 0x390), 500);
    apic(c, 0x3e0, 0xb); /* by 1: 500 counts are left */
    CHECK_EQ(apic_rd(c, 0x390), 500);
    advance(vm, 499);
    CHECK_EQ(take(c), -1);
    advance(vm, 1);
    CHECK_EQ(take(c), 0x40);
    apic(c, 0xb0, 0);
    CHECK_EQ(apic_rd(c, 0x390), 0);
    CHECK_EQ(clock_next_deadline(vm), CLOCK_NEVER);

    apic(c, 0x320, 0x20041); /* periodic */
    apic(c, 0x380, 100000);
    for (int i = 0; i < 3; i++) {
        advance(vm, 99999);
        CHECK_EQ(take(c), -1);
        advance(vm, 1);
        CHECK_EQ(take(c), 0x41);
        apic(c, 0xb0, 0);
    }
    advance(vm, 30000);

    /* Save, load, save: the same, with the time that is left. */
    struct kvs_lapic_state a, b;
    lapic_get_state(c, &a);
    lapic_reset(c, false);
    CHECK_EQ(clock_next_deadline(vm), CLOCK_NEVER);
    CHECK_EQ(lapic_set_state(c, &a), 0);
    lapic_get_state(c, &b);
    CHECK(!memcmp(&a, &b, sizeof a));
    advance(vm, 69999);
    CHECK_EQ(take(c), -1);
    advance(vm, 1);
    CHECK_EQ(take(c), 0x41);
    apic(c, 0xb0, 0);
    /* Without our words, as KVM saves it: the count decides. */
    memset(a.regs + 0x394, 0, 8);
    CHECK_EQ(lapic_set_state(c, &a), 0);
    advance(vm, 70000);
    CHECK_EQ(take(c), 0x41);
    apic(c, 0xb0, 0);

    /* A tiny period is stretched; missed periods are merged. */
    apic(c, 0x380, 1);
    uint64_t start = clock_now(vm);
    CHECK_EQ(clock_next_deadline(vm), start + 10000);
    clock_set_virtual(vm, start + 1000005);
    clock_run_timers(vm);
    CHECK_EQ(clock_next_deadline(vm), start + 1010000);
    CHECK_EQ(take(c), 0x41);
    CHECK_EQ(take(c), -1);
    apic(c, 0xb0, 0);
    apic(c, 0x380, 0);
    CHECK_EQ(clock_next_deadline(vm), CLOCK_NEVER);

    /* TSC deadline; 2 ticks per ns. */
    uint64_t x = 0;
    CHECK_EQ(lapic_msr_write(c, 0x6e0, 1), 0); /* not in that mode: ignored */
    CHECK_EQ(lapic_msr_read(c, 0x6e0, &x), 0);
    CHECK_EQ(x, 0);
    apic(c, 0x320, 0x40042);
    c->tsc_offset = 1000000;
    uint64_t now = clock_now(vm), tsc = clock_tsc(vm) + 1000000;
    CHECK_EQ(lapic_msr_write(c, 0x6e0, tsc + 2001), 0);
    CHECK_EQ(clock_next_deadline(vm), now + 1001);
    CHECK_EQ(apic_rd(c, 0x390), 0);
    CHECK_EQ(lapic_msr_read(c, 0x6e0, &x), 0);
    CHECK_EQ(x, tsc + 2001);
    c->tsc_offset += 1000;
    lapic_tsc_changed(c);
    CHECK_EQ(clock_next_deadline(vm), now + 501);
    advance(vm, 501);
    CHECK_EQ(take(c), 0x42);
    apic(c, 0xb0, 0);
    CHECK_EQ(lapic_msr_read(c, 0x6e0, &x), 0);
    CHECK_EQ(x, 0);
    CHECK_EQ(lapic_msr_write(c, 0x6e0, 5), 0); /* in the past: at once */
    CHECK_EQ(take(c), 0x42);
    CHECK_EQ(lapic_msr_write(c, 0x6e0, ~0ull), 0);
    CHECK_EQ(take(c), -1);
    apic(c, 0x320, 0x10042); /* leaving the mode disarms */
    CHECK_EQ(clock_next_deadline(vm), CLOCK_NEVER);

    memset(&a, 0xff, sizeof a);
    CHECK_EQ(lapic_set_state(c, &a), -KVS_ESTATE);
    a.regs[0x322] = 2; /* periodic */
    CHECK_EQ(lapic_set_state(c, &a), 0);
    CHECK_EQ(apic_rd(c, 0x20), 0);
    CHECK_EQ(apic_rd(c, 0x200) & 0xffff, 0);
    lapic_get_state(c, &a);
    CHECK_EQ(lapic_set_state(c, &a), 0);
    lapic_get_state(c, &b);
    CHECK(!memcmp(&a, &b, sizeof a));
    scrap(vm);
}

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

/* ---- routing ---- */
static void test_routing(void)
{
    struct kvs_vm *vm = machine(2, KVS_CLOCK_VIRTUAL, 0);
    struct kvs_vcpu *c = vm->vcpus[1];
    enable(c);
    struct kvs_irq_routing_entry e[3];
    memset(e, 0, sizeof e);
    e[0].gsi = 100;
    e[0].type = KVS_IRQ_ROUTING_MSI;
    e[0].u.msi.address_lo = 0xfee01000;
    e[0].u.msi.data = 0x4077;
    e[1].gsi = 100;
    e[1].type = KVS_IRQ_ROUTING_IRQCHIP;
    e[1].u.irqchip.irqchip = KVS_IRQCHIP_IOAPIC;
    e[1].u.irqchip.pin = 5;
    e[2].gsi = 4095;
    e[2].type = KVS_IRQ_ROUTING_MSI;
    CHECK_EQ(irqchip_set_routing(vm, e, 3), 0);
    ioapic_wr(vm, 0x10 + 2 * 5 + 1, 1u << 24);
    ioapic_wr(vm, 0x10 + 2 * 5, 0x88);
    CHECK_EQ(irqchip_set_line(vm, 100, 1), 0);
    CHECK_EQ(take(c), 0x88);
    apic(c, 0xb0, 0);
    CHECK_EQ(take(c), 0x77);
    apic(c, 0xb0, 0);
    irqchip_set_line(vm, 100, 0);
    CHECK_EQ(take(c), -1);
    CHECK_EQ(irqchip_set_line(vm, 5, 1), 0); /* no route any more */
    CHECK_EQ(take(c), -1);
    CHECK_EQ(irqchip_set_line(vm, 4096, 1), -KVS_EINVAL);
    e[1].u.irqchip.pin = 24;
    CHECK_EQ(irqchip_set_routing(vm, e, 3), -KVS_EINVAL);
    e[1].u.irqchip.pin = 5;
    e[1].gsi = 4096;
    CHECK_EQ(irqchip_set_routing(vm, e, 3), -KVS_EINVAL);
    CHECK_EQ(irqchip_set_routing(vm, e, 4097), -KVS_EINVAL);
    uint32_t value;
    CHECK(irqchip_port_write(c, 0x4d0, 2, 0xffff));
    CHECK(irqchip_port_read(c, 0x4d0, 2, &value));
    CHECK_EQ(value, 0xdef8);
    CHECK(!irqchip_port_read(c, 0x22, 1, &value));
    CHECK(!irqchip_port_read(c, 0x21, 2, &value));
    CHECK(!irqchip_port_read(c, 0xffff, 4, &value));
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

/* ---- anything a guest or a host may do, from several threads ---- */
static uint64_t next_random(uint64_t *s)
{
    *s ^= *s << 13; *s ^= *s >> 7; *s ^= *s << 17;
    return *s;
}

struct chaos { struct kvs_vm *vm; uint32_t vcpu; uint64_t seed; int rounds; };

static void *chaos_thread(void *arg)
{
    struct chaos *k = arg;
    struct kvs_vcpu *c = k->vm->vcpus[k->vcpu];
    static const uint16_t ports[] = { 0x20, 0x21, 0xa0, 0xa1, 0x4d0, 0x4d1, 0x40, 0x41, 0x42, 0x43, 0x61 };
    for (int i = 0; i < k->rounds; i++) {
        uint64_t r = next_random(&k->seed), v = next_random(&k->seed), x;
        uint32_t value;
        struct kvs_msi msi = { .address_lo = 0xfee00000 | ((uint32_t)v & 0xfffff), .data = (uint32_t)(v >> 20) };
        switch (r & 15) {
        case 0: case 1: case 2:
            (void)irqchip_port_write(c, ports[(r >> 8) % ARRAY_SIZE(ports)], 1 + (r >> 20) % 4, (uint32_t)v);
            break;
        case 3:
            (void)irqchip_port_read(c, ports[(r >> 8) % ARRAY_SIZE(ports)], 1 + (r >> 20) % 4, &value);
            break;
        case 4: case 5:
            lapic_mmio_write(c, (uint32_t)(r >> 8) & 0xff0, (uint32_t)(r & 0x10000 ? v : v & 0xfff));
            break;
        case 6:
            (void)lapic_mmio_read(c, (uint32_t)(r >> 8) & 0xfff);
            break;
        case 7:
            (void)lapic_msr_write(c, 0x800 + ((r >> 8) & 0xff), r & 0x10000 ? v : v & 0x7ff);
            (void)lapic_msr_read(c, 0x800 + ((r >> 16) & 0xff), &x);
            break;
        case 8:
            (void)lapic_msr_write(c, 0x1b, 0xfee00000 | (v & 0xd00));
            enable(c);
            break;
        case 9:
            (void)lapic_msr_write(c, 0x6e0, clock_tsc(k->vm) + (v & 0xffff));
            break;
        case 10:
            (void)ioapic_mmio_write(k->vm, 0xfec00000 + (r >> 8 & 0x10), &v, 1 + (r >> 20) % 8);
            (void)ioapic_mmio_read(k->vm, 0xfec00000 + (r >> 9 & 0x1f), &x, 1 + (r >> 24) % 8);
            break;
        case 11: case 12:
            (void)irqchip_set_line(k->vm, (uint32_t)(r >> 8) % 26, r >> 20 & 1);
            break;
        case 13:
            (void)irqchip_send_msi(k->vm, &msi);
            break;
        case 14:
            value = (uint32_t)take(c);
            CHECK((int)value == -1 || value < 256);
            break;
        default: {
            struct kvs_lapic_state s;
            struct kvs_pit_state2 p;
            struct kvs_irqchip chip = { .chip_id = (uint32_t)(r >> 8) % 3 };
            lapic_get_state(c, &s);
            (void)irqchip_get_pit(k->vm, &p);
            (void)irqchip_get(k->vm, &chip);
            ((uint8_t *)&s)[(r >> 12) % sizeof s] = (uint8_t)v;
            ((uint8_t *)&p)[(r >> 22) % sizeof p] = (uint8_t)(v >> 8);
            ((uint8_t *)&chip.chip)[(r >> 30) % sizeof chip.chip.ioapic] = (uint8_t)(v >> 16);
            (void)lapic_set_state(c, &s);
            (void)irqchip_set_pit(k->vm, &p);
            if (r >> 60 == 0)
                (void)irqchip_set(k->vm, &chip);
            break;
        }
        }
        if (k->vm->config.clock_mode == KVS_CLOCK_VIRTUAL) {
            clock_set_virtual(k->vm, clock_now(k->vm) + (r >> 40 & 0xfff));
            clock_run_timers(k->vm);
        }
    }
    return NULL;
}

static void test_chaos(void)
{
    struct kvs_vm *vm = machine(2, KVS_CLOCK_VIRTUAL, 0);
    struct chaos k = { vm, 1, 0x9e3779b97f4a7c15ull, 100000 };
    (void)chaos_thread(&k);
    scrap(vm);

    vm = machine(3, KVS_CLOCK_REAL, 3000000);
    struct chaos ks[3];
    pthread_t t[3];
    for (uint32_t i = 0; i < 3; i++) {
        ks[i] = (struct chaos){ vm, i, 0x1234567ull * (i + 1), 30000 };
        CHECK_EQ(pthread_create(&t[i], NULL, chaos_thread, &ks[i]), 0);
    }
    for (int i = 0; i < 3; i++)
        pthread_join(t[i], NULL);
    scrap(vm);
}

int main(void)
{
    test_pic();
    test_virtual_wire();
    test_ioapic();
    test_lapic_priority();
    test_ipi();
    test_lapic_timer();
    test_pit_channel2();
    test_pit_irq();
    test_routing();
    test_clock_arithmetic();
    test_real_clock();
    test_chaos();
    printf("%d passed, %d failed\n", passed, failed);
    return failed != 0;
}
