/* PIC pair, IOAPIC, local APIC and routing; and everything at once from several threads. */
#include "irqchip_test.h"

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
    CHECK_EQ(ioapic_rd(vm, 1), 0x170020);
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
    CHECK_EQ(apic_rd(c, 0x30), 0x1050014);
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
    CHECK_EQ(atomic_load(&v[1]->signals), 0); /* not waiting for it */
    apic(v[0], 0x300, 0x8500);                /* de-assert: nothing */
    CHECK_EQ(atomic_load(&v[1]->signals), 0);
    apic(v[0], 0x300, 0xc500);
    CHECK_EQ(atomic_load(&v[1]->signals), SIG_INIT);
    apic(v[0], 0x300, 0x4612);
    CHECK_EQ(atomic_load(&v[1]->signals), SIG_INIT | SIG_SIPI | 0x1200);
    apic(v[0], 0x300, 0x4634); /* the first one counts */
    CHECK_EQ(atomic_load(&v[1]->signals), SIG_INIT | SIG_SIPI | 0x1200);
    apic(v[0], 0x300, 0xc500); /* INIT once more: the SIPI before it is void */
    CHECK_EQ(atomic_load(&v[1]->signals), SIG_INIT);
    atomic_store(&v[1]->signals, 0);
    atomic_store(&v[1]->mp_state, KVS_MP_STATE_INIT_RECEIVED);
    apic(v[0], 0x300, 0x4634);
    CHECK_EQ(atomic_load(&v[1]->signals), SIG_SIPI | 0x3400);
    atomic_store(&v[1]->signals, 0);
    /* SMI: only where the machine has it. */
    apic(v[0], 0x300, 0x200);
    CHECK_EQ(atomic_load(&v[1]->signals), 0);
    v[1]->vm->config.flags |= KVS_VM_SMM;
    apic(v[0], 0x300, 0x200);
    CHECK_EQ(atomic_load(&v[1]->signals), SIG_SMI);
    atomic_store(&v[1]->signals, 0);
    struct kvs_msi smi = { .address_lo = 0xfee01000, .data = 0x200 };
    CHECK_EQ(irqchip_send_msi(v[1]->vm, &smi), 1);
    CHECK_EQ(atomic_load(&v[1]->signals), SIG_SMI);
    atomic_store(&v[1]->signals, 0);
    v[1]->vm->config.flags = 0;
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
    CHECK_EQ(lapic_set_state(c, &a), 0); /* the reserved timer mode: a guest can write it too */
    a.regs[0x322] = 2; /* periodic */
    CHECK_EQ(lapic_set_state(c, &a), 0);
    CHECK_EQ(apic_rd(c, 0x20), 0xff000000);
    CHECK_EQ(apic_rd(c, 0x200) & 0xffff, 0);
    lapic_get_state(c, &a);
    CHECK_EQ(lapic_set_state(c, &a), 0);
    lapic_get_state(c, &b);
    CHECK(!memcmp(&a, &b, sizeof a));
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
    test_routing();
    test_chaos();
    printf("%d passed, %d failed\n", passed, failed);
    return failed != 0;
}
