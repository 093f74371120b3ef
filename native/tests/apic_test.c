/* Rules of the local APIC and the IOAPIC, one test for each, by the manual's section titles. */
#include "irqchip_test.h"

enum { EOI = 0xb0, LDR = 0xd0, DFR = 0xe0, SPIV = 0xf0, ESR = 0x280, ICR = 0x300, ICR2 = 0x310,
       LVT_TIMER = 0x320, LVT_THERMAL = 0x330, LVT_PERF = 0x340, LINT0 = 0x350, LINT1 = 0x360, LVT_ERROR = 0x370 };

static void ipi(struct kvs_vcpu *c, uint32_t dest, uint32_t low)
{
    apic(c, ICR2, dest << 24);
    apic(c, ICR, low);
}
static bool in_irr(struct kvs_vcpu *c, uint32_t v) { return apic_rd(c, 0x200 + (v >> 5) * 16) >> (v & 31) & 1; }
static bool in_isr(struct kvs_vcpu *c, uint32_t v) { return apic_rd(c, 0x100 + (v >> 5) * 16) >> (v & 31) & 1; }
static bool in_tmr(struct kvs_vcpu *c, uint32_t v) { return apic_rd(c, 0x180 + (v >> 5) * 16) >> (v & 31) & 1; }
static uint32_t errors(struct kvs_vcpu *c)
{
    apic(c, ESR, 0);
    return apic_rd(c, ESR);
}
static struct kvs_vm *quiet(uint32_t vcpus) /* enabled, and no virtual wire */
{
    struct kvs_vm *vm = machine(vcpus, KVS_CLOCK_VIRTUAL, 0);
    for (uint32_t i = 0; i < vcpus; i++) {
        enable(vm->vcpus[i]);
        apic(vm->vcpus[i], LINT0, 0x10000);
    }
    return vm;
}

/* "Local APIC ID": writable in xAPIC mode; physical destinations follow; two may have the same. */
static void test_id(void)
{
    struct kvs_vm *vm = quiet(2);
    struct kvs_vcpu *a = vm->vcpus[0], *b = vm->vcpus[1];
    uint64_t x;
    apic(b, 0x20, 0x42ffffff);
    CHECK_EQ(apic_rd(b, 0x20), 0x42000000);
    ipi(a, 1, 0x50);
    CHECK_EQ(take(b), -1);
    ipi(a, 0x42, 0x50);
    CHECK_EQ(take(b), 0x50);
    apic(a, 0x20, 0x42000000);
    ipi(b, 0x42, 0x60);
    CHECK_EQ(take(a), 0x60);
    CHECK_EQ(take(b), 0x60);

    /* It is part of the image; INIT keeps it; x2APIC mode and a disabled APIC lose it. */
    struct kvs_lapic_state s;
    lapic_get_state(b, &s);
    lapic_reset(b, false);
    CHECK_EQ(apic_rd(b, 0x20), 0x01000000);
    CHECK_EQ(lapic_set_state(b, &s), 0);
    CHECK_EQ(apic_rd(b, 0x20), 0x42000000);
    lapic_reset(b, true);
    CHECK_EQ(apic_rd(b, 0x20), 0x42000000);
    /* Moving the page changes nothing else. */
    CHECK_EQ(lapic_msr_write(b, 0x1b, 0xfed40800), 0);
    CHECK(lapic_mmio_match(b, 0xfed40020));
    CHECK_EQ(apic_rd(b, 0x20), 0x42000000);
    CHECK_EQ(lapic_msr_write(b, 0x1b, 0xfee00c00), 0);
    CHECK_EQ(lapic_msr_read(b, 0x802, &x), 0);
    CHECK_EQ(x, 1);
    CHECK_EQ(lapic_msr_write(b, 0x1b, 0xfee00000), 0);
    CHECK_EQ(lapic_msr_write(b, 0x1b, 0xfee00800), 0);
    CHECK_EQ(apic_rd(b, 0x20), 0x01000000);
    enable(b);
    ipi(a, 1, 0x51);
    CHECK_EQ(take(b), 0x51);
    scrap(vm);
}

/* "Error Status Register": a write latches what was seen; only it arms the interrupt again. */
static void test_errors(void)
{
    struct kvs_vm *vm = quiet(1);
    struct kvs_vcpu *c = vm->vcpus[0];
    apic(c, LVT_ERROR, 0xfe);
    (void)apic_rd(c, 0xc0); /* remote read: not there */
    CHECK_EQ(take(c), 0xfe);
    apic(c, EOI, 0);
    apic(c, ICR, 0x40005);
    CHECK_EQ(take(c), -1);
    CHECK_EQ(apic_rd(c, ESR), 0);
    CHECK_EQ(errors(c), 0xa0);
    CHECK_EQ(apic_rd(c, ESR), 0xa0);
    CHECK_EQ(errors(c), 0);
    apic(c, 0x400, 1); /* beyond the registers */
    apic(c, 0x3f0, 0x50); /* self IPI: x2APIC only */
    CHECK_EQ(take(c), 0xfe);
    apic(c, EOI, 0);
    CHECK_EQ(errors(c), 0x80);
    apic(c, LVT_ERROR, 0x100fe);
    apic(c, ICR, 0x40005);
    CHECK_EQ(take(c), -1);
    CHECK_EQ(errors(c), 0x20);
    (void)apic_rd(c, 0x90);
    apic(c, 0x90, 1);
    CHECK_EQ(errors(c), 0);
    scrap(vm);
}

/* "Interrupt, Task, and Processor Priority" */
static void test_priorities(void)
{
    struct kvs_vm *vm = quiet(1);
    struct kvs_vcpu *c = vm->vcpus[0];
    CHECK_EQ(apic_rd(c, 0x90), 0);
    apic(c, 0x80, 0x35);
    CHECK_EQ(apic_rd(c, 0xa0), 0x35);
    CHECK_EQ(apic_rd(c, 0x90), 0x35);
    apic(c, ICR, 0x40044);
    CHECK_EQ(apic_rd(c, 0x90), 0x40);
    CHECK_EQ(take(c), 0x44);
    CHECK_EQ(apic_rd(c, 0xa0), 0x40);
    apic(c, 0x80, 0x47); /* equal classes: the task's subclass */
    CHECK_EQ(apic_rd(c, 0xa0), 0x47);
    apic(c, EOI, 0);
    apic(c, ICR, 0x40040);
    CHECK_EQ(take(c), -1);
    apic(c, 0x80, 0x3f);
    CHECK_EQ(take(c), 0x40);
    apic(c, EOI, 0);
    lapic_set_cr8(c, 0xf);
    apic(c, ICR, 0x400ff);
    CHECK_EQ(take(c), -1);
    lapic_set_cr8(c, 0xe);
    CHECK_EQ(take(c), 0xff);
    /* CR8 is a register of the processor: it works without the APIC too. */
    CHECK_EQ(lapic_msr_write(c, 0x1b, 0xfee00100), 0);
    lapic_set_cr8(c, 7);
    CHECK_EQ(lapic_cr8(c), 7);
    scrap(vm);
}

/* "Local APIC State After It Has Been Software Disabled" */
static void test_software_disabled(void)
{
    struct kvs_vm *vm = quiet(2);
    struct kvs_vcpu *c = vm->vcpus[0];
    apic(c, LVT_TIMER, 0x30);
    apic(c, ICR, 0x40055);
    apic(c, SPIV, 0xff);
    CHECK_EQ(apic_rd(c, LVT_TIMER), 0x10030);
    CHECK_EQ(apic_rd(c, LVT_PERF), 0x10000);
    apic(c, LINT1, 0x400);
    CHECK_EQ(apic_rd(c, LINT1), 0x10400);
    CHECK_EQ(take(c), 0x55); /* what was pending stays */
    ipi(vm->vcpus[1], 0, 0x66);
    CHECK_EQ(take(c), -1);
    ipi(vm->vcpus[1], 0, 0x400); /* NMI, INIT, SMI and start-up are taken */
    CHECK_EQ(atomic_load(&c->nmi_pending), 1);
    apic(c, ICR, 0x80061); /* and it can still send */
    CHECK_EQ(take(vm->vcpus[1]), 0x61);
    apic(c, SPIV, 0x11ff);
    CHECK_EQ(apic_rd(c, SPIV), 0x11ff);
    apic(c, SPIV, 0xffffffff);
    CHECK_EQ(apic_rd(c, SPIV), 0x11ff);
    scrap(vm);
}

/* "Valid Combinations for the Pentium 4 and Intel Xeon Processors' Local xAPIC ICR" */
static void test_shorthands(void)
{
    struct kvs_vm *vm = quiet(3);
    struct kvs_vcpu **v = vm->vcpus;
    apic(v[0], ICR, 0xc0400); /* NMI to the others */
    CHECK_EQ(atomic_load(&v[0]->nmi_pending), 0);
    CHECK_EQ(atomic_load(&v[1]->nmi_pending), 1);
    CHECK_EQ(atomic_load(&v[2]->nmi_pending), 1);
    apic(v[0], ICR, 0x40400); /* to itself: no such combination */
    CHECK_EQ(atomic_load(&v[0]->nmi_pending), 0);
    /* Lowest priority among the others: exactly one. */
    apic(v[1], 0x80, 0x20);
    apic(v[0], ICR, 0xc0140);
    CHECK_EQ(take(v[0]), -1);
    CHECK_EQ(take(v[1]), -1);
    CHECK_EQ(take(v[2]), 0x40);
    apic(v[0], ICR, 0x40051 | 0x8000); /* the trigger mode is ignored: an edge */
    CHECK_EQ(take(v[0]), 0x51);
    CHECK(!in_tmr(v[0], 0x51));
    apic(v[0], ICR, 0x40752); /* ExtINT, remote read: not for software */
    apic(v[0], ICR, 0x40352);
    CHECK_EQ(take(v[0]), -1);
    CHECK_EQ(apic_rd(v[0], ICR), 0x40352);
    CHECK_EQ(apic_rd(v[0], ICR) & 0x1000, 0); /* idle at once */
    /* Broadcast with INIT. */
    apic(v[0], ICR, 0xc4500);
    CHECK_EQ(atomic_load(&v[0]->signals), 0);
    CHECK_EQ(atomic_load(&v[2]->signals), SIG_INIT);
    apic(v[0], ICR, 0xc4699);
    CHECK_EQ(atomic_load(&v[1]->signals), SIG_INIT | SIG_SIPI | 0x9900);
    /* SMI: there when the machine has system-management mode. */
    vm->config.flags = KVS_VM_SMM;
    apic(v[0], ICR, 0xc0200);
    CHECK_EQ(atomic_load(&v[0]->signals), 0);
    CHECK(atomic_load(&v[2]->signals) & SIG_SMI);
    scrap(vm);
}

/* "Logical Destination Mode and Local APIC ID": an illegal model matches nobody; LDR keeps 8 bits. */
static void test_logical(void)
{
    struct kvs_vm *vm = quiet(2);
    struct kvs_vcpu **v = vm->vcpus;
    apic(v[1], LDR, 0xffffffff);
    CHECK_EQ(apic_rd(v[1], LDR), 0xff000000);
    apic(v[1], DFR, 0x10000000);
    CHECK_EQ(apic_rd(v[1], DFR), 0x1fffffff);
    ipi(v[0], 0x0f, 0x850);
    CHECK_EQ(take(v[1]), -1);
    apic(v[1], DFR, 0xf0000000);
    ipi(v[0], 0x80, 0x850);
    CHECK_EQ(take(v[1]), 0x50);
    apic(v[1], DFR, 0);
    apic(v[1], LDR, 0x34000000); /* cluster 3, member 2 */
    ipi(v[0], 0x3b, 0x861);
    CHECK_EQ(take(v[1]), -1);
    ipi(v[0], 0x3f, 0x861);
    CHECK_EQ(take(v[1]), 0x61);
    apic(v[1], EOI, 0);
    ipi(v[0], 0xff, 0x862);
    CHECK_EQ(take(v[1]), 0x62);
    CHECK_EQ(take(v[0]), 0x62);
    scrap(vm);
}

/* "EOI Register", "Directed EOIs": suppressed broadcasts, and the IOAPIC's own EOI register. */
static void test_directed_eoi(void)
{
    struct kvs_vm *vm = quiet(1);
    struct kvs_vcpu *c = vm->vcpus[0];
    uint32_t value = 0x44;
    ioapic_wr(vm, 0x10 + 2 * 20, 0x8044);
    ioapic_wr(vm, 0x10 + 2 * 21, 0x8055);
    apic(c, SPIV, 0x11ff);
    irqchip_set_line(vm, 20, 1);
    irqchip_set_line(vm, 21, 1);
    CHECK_EQ(take(c), 0x55);
    irqchip_set_line(vm, 21, 0);
    apic(c, EOI, 0);
    CHECK_EQ(ioapic_rd(vm, 0x10 + 2 * 21), 0xc055); /* nobody told the IOAPIC */
    CHECK_EQ(take(c), 0x44);
    apic(c, EOI, 0);
    CHECK_EQ(take(c), -1);
    CHECK(ioapic_mmio_write(vm, 0xfec00040, &value, 4));
    CHECK_EQ(take(c), 0x44); /* still high */
    CHECK_EQ(ioapic_rd(vm, 0x10 + 2 * 21), 0xc055);
    value = 0x55;
    CHECK(ioapic_mmio_write(vm, 0xfec00040, &value, 4));
    CHECK_EQ(ioapic_rd(vm, 0x10 + 2 * 21), 0x8055);
    CHECK(ioapic_mmio_read(vm, 0xfec00040, &value, 4));
    CHECK_EQ(value, 0);
    /* Not suppressed: the broadcast does it. */
    apic(c, SPIV, 0x1ff);
    irqchip_set_line(vm, 20, 0);
    apic(c, EOI, 0);
    CHECK_EQ(ioapic_rd(vm, 0x10 + 2 * 20), 0x8044);
    scrap(vm);
}

/* "Local Vector Table": LINT0 as fixed level with remote IRR, as NMI, INIT; delivery of the others. */
static void test_lint0(void)
{
    struct kvs_vm *vm = machine(1, KVS_CLOCK_VIRTUAL, 0);
    struct kvs_vcpu *c = vm->vcpus[0];
    enable(c);
    pic_init(vm, 0x01);
    apic(c, LINT0, 0x8031);
    irqchip_set_line(vm, 3, 1);
    CHECK_EQ(apic_rd(c, LINT0), 0xc031);
    CHECK_EQ(take(c), 0x31);
    CHECK(in_tmr(c, 0x31));
    CHECK_EQ(take(c), -1);
    apic(c, LINT0, 0x8031); /* a write does not clear it */
    CHECK_EQ(apic_rd(c, LINT0), 0xc031);
    struct kvs_lapic_state s, t;
    lapic_get_state(c, &s);
    CHECK_EQ(lapic_set_state(c, &s), 0);
    lapic_get_state(c, &t);
    CHECK(!memcmp(&s, &t, sizeof s));
    apic(c, EOI, 0);
    CHECK_EQ(take(c), 0x31); /* the PIC's output is still high */
    out(vm, 0x20, 0x0c); (void)in(vm, 0x20); /* taken by poll: it falls */
    apic(c, EOI, 0);
    CHECK_EQ(take(c), -1);
    CHECK_EQ(apic_rd(c, LINT0), 0x8031);
    out(vm, 0x20, 0x20);
    irqchip_set_line(vm, 3, 0);
    /* Unmasking finds the level. */
    apic(c, LINT0, 0x18031);
    irqchip_set_line(vm, 3, 1);
    CHECK_EQ(take(c), -1);
    apic(c, LINT0, 0x8031);
    CHECK_EQ(take(c), 0x31);
    apic(c, LINT0, 0x31); /* an edge entry has no remote IRR */
    CHECK_EQ(apic_rd(c, LINT0), 0x31);
    apic(c, EOI, 0);
    out(vm, 0x20, 0x0c); (void)in(vm, 0x20); out(vm, 0x20, 0x20);
    irqchip_set_line(vm, 3, 0);
    apic(c, LINT0, 0x500);
    irqchip_set_line(vm, 3, 1);
    CHECK_EQ(atomic_load(&c->signals), SIG_INIT);
    /* Writable bits. */
    apic(c, LVT_THERMAL, 0xffffffff);
    CHECK_EQ(apic_rd(c, LVT_THERMAL), 0x107ff);
    apic(c, LVT_PERF, 0xffffffff);
    CHECK_EQ(apic_rd(c, LVT_PERF), 0x107ff);
    apic(c, LINT1, 0xffffffff);
    CHECK_EQ(apic_rd(c, LINT1), 0x1a7ff);
    apic(c, LVT_ERROR, 0xffffffff);
    CHECK_EQ(apic_rd(c, LVT_ERROR), 0x100ff);
    apic(c, LVT_TIMER, 0xffffffff);
    CHECK_EQ(apic_rd(c, LVT_TIMER), 0x700ff);
    scrap(vm);
}

/* Without the feature the TSC-deadline mode, the MSR and x2APIC mode are not there. */
static void test_hidden_features(void)
{
    struct kvs_vm *vm = quiet(1);
    struct kvs_vcpu *c = vm->vcpus[0];
    struct kvs_cpuid_entry2 leaf = { .function = 1 };
    uint64_t x;
    c->cpuid = &leaf;
    c->cpuid_count = 1;
    apic(c, LVT_TIMER, 0x700ff);
    CHECK_EQ(apic_rd(c, LVT_TIMER), 0x300ff);
    CHECK_EQ(lapic_msr_read(c, 0x6e0, &x), -1);
    CHECK_EQ(lapic_msr_write(c, 0x6e0, 1), -1);
    CHECK_EQ(lapic_msr_write(c, 0x1b, 0xfee00d00), -1);
    CHECK_EQ(lapic_msr_write(c, 0x1b, 0xfee00500), -1);
    leaf.ecx = 1u << 21;
    CHECK_EQ(lapic_msr_write(c, 0x1b, 0xfee00d00), 0);
    CHECK_EQ(lapic_msr_write(c, 0x832, 0x400ff), -1); /* a reserved bit now */
    CHECK_EQ(lapic_msr_write(c, 0x832, 0x200ff), 0);
    CHECK_EQ(lapic_msr_write(c, 0x809, 0), -1);
    CHECK_EQ(lapic_msr_read(c, 0x809, &x), -1);
    CHECK_EQ(lapic_msr_read(c, 0x80c, &x), -1);
    CHECK_EQ(lapic_msr_read(c, 0x80e, &x), -1);
    CHECK_EQ(lapic_msr_read(c, 0x831, &x), -1);
    CHECK_EQ(lapic_msr_write(c, 0x80f, 0x11ff), 0);
    CHECK_EQ(lapic_msr_write(c, 0x80f, 0x3ff), -1);
    CHECK_EQ(lapic_msr_write(c, 0x828, 1), -1);
    CHECK_EQ(lapic_msr_write(c, 0x839, 1), -1);
    c->cpuid_count = 0;
    scrap(vm);
}

/* "Handling Multiple NMIs": one is taken, one is held; more are lost. */
static void test_nmi_count(void)
{
    struct kvs_vm *vm = quiet(2);
    struct kvs_vcpu **v = vm->vcpus;
    for (int i = 0; i < 5; i++)
        ipi(v[0], 1, 0x400);
    CHECK_EQ(atomic_load(&v[1]->nmi_pending), 2);
    scrap(vm);
}

/* 82093AA "I/O Redirection Table Registers": every delivery mode, destination and trigger. */
static void test_ioapic_modes(void)
{
    struct kvs_vm *vm = quiet(2);
    struct kvs_vcpu **v = vm->vcpus;
    uint32_t pin = 0x10 + 2 * 20;
    ioapic_wr(vm, pin + 1, 1u << 24);
    ioapic_wr(vm, pin, 0x8400); /* NMI: always an edge, no remote IRR */
    irqchip_set_line(vm, 20, 1);
    CHECK_EQ(atomic_load(&v[1]->nmi_pending), 1);
    CHECK_EQ(ioapic_rd(vm, pin), 0x8400);
    irqchip_set_line(vm, 20, 0);
    ioapic_wr(vm, pin, 0x500);
    irqchip_set_line(vm, 20, 1);
    CHECK_EQ(atomic_load(&v[1]->signals), SIG_INIT);
    irqchip_set_line(vm, 20, 0);
    ioapic_wr(vm, pin, 0x650); /* start-up is for software: reserved here */
    irqchip_set_line(vm, 20, 1);
    CHECK_EQ(atomic_load(&v[1]->signals), SIG_INIT);
    irqchip_set_line(vm, 20, 0);
    vm->config.flags = KVS_VM_SMM;
    ioapic_wr(vm, pin, 0x200);
    irqchip_set_line(vm, 20, 1);
    CHECK(atomic_load(&v[1]->signals) & SIG_SMI);
    irqchip_set_line(vm, 20, 0);

    /* Lowest priority, level: remote IRR as with fixed. */
    apic(v[0], LDR, 1u << 24);
    apic(v[1], LDR, 2u << 24);
    apic(v[0], 0x80, 0x20);
    ioapic_wr(vm, pin + 1, 3u << 24);
    ioapic_wr(vm, pin, 0x8944);
    irqchip_set_line(vm, 20, 1);
    CHECK_EQ(take(v[0]), -1);
    CHECK_EQ(take(v[1]), 0x44);
    CHECK_EQ(ioapic_rd(vm, pin), 0xc944);
    irqchip_set_line(vm, 20, 0);
    apic(v[1], EOI, 0);
    CHECK_EQ(ioapic_rd(vm, pin), 0x8944);
    /* The polarity bit is stored; lines are asserted or not. */
    ioapic_wr(vm, pin, 0xa944);
    CHECK_EQ(ioapic_rd(vm, pin), 0xa944);
    CHECK_EQ(take(v[1]), -1);

    /* An edge while masked is lost. */
    ioapic_wr(vm, pin + 1, 0);
    ioapic_wr(vm, pin, 0x10033);
    irqchip_set_line(vm, 20, 1);
    ioapic_wr(vm, pin, 0x33);
    apic(v[0], 0x80, 0);
    CHECK_EQ(take(v[0]), -1);
    irqchip_set_line(vm, 20, 0);
    irqchip_set_line(vm, 20, 1);
    CHECK_EQ(take(v[0]), 0x33);
    apic(v[0], EOI, 0);
    irqchip_set_line(vm, 20, 0);
    /* An illegal vector reaches the local APIC, which reports it. */
    ioapic_wr(vm, pin, 0x8008);
    irqchip_set_line(vm, 20, 1);
    CHECK_EQ(ioapic_rd(vm, pin), 0x8008);
    CHECK_EQ(errors(v[0]), 0x40);
    irqchip_set_line(vm, 20, 0);
    /* EOI of a vector ends every level pin that has it. */
    ioapic_wr(vm, 0x10 + 2 * 22, 0x8070);
    ioapic_wr(vm, 0x10 + 2 * 23, 0x8070);
    irqchip_set_line(vm, 22, 1);
    CHECK_EQ(take(v[0]), 0x70);
    irqchip_set_line(vm, 23, 1);
    irqchip_set_line(vm, 22, 0);
    irqchip_set_line(vm, 23, 0);
    CHECK(in_irr(v[0], 0x70) && in_isr(v[0], 0x70));
    apic(v[0], EOI, 0);
    CHECK_EQ(ioapic_rd(vm, 0x10 + 2 * 22), 0x8070);
    CHECK_EQ(ioapic_rd(vm, 0x10 + 2 * 23), 0x8070);
    /* The arbitration ID follows the ID and is read-only. */
    ioapic_wr(vm, 0, 0xffffffff);
    ioapic_wr(vm, 2, 0);
    CHECK_EQ(ioapic_rd(vm, 2), 0x0f000000);
    ioapic_wr(vm, 1, 0);
    CHECK_EQ(ioapic_rd(vm, 1), 0x170020);
    scrap(vm);
}

/* "Interrupt Modes" of the MultiProcessor Specification: the PIC pair through pin 0. */
static void test_extint(void)
{
    struct kvs_vm *vm = quiet(2);
    struct kvs_vcpu *c = vm->vcpus[1];
    pic_init(vm, 0x01);
    ioapic_wr(vm, 0x11, 1u << 24);
    ioapic_wr(vm, 0x10, 0x700);
    irqchip_set_line(vm, 3, 1);
    CHECK(atomic_load(&c->requests) & REQ_EVENT);
    struct kvs_lapic_state s;
    lapic_get_state(c, &s);
    lapic_reset(c, false);
    CHECK(!irqchip_has_interrupt(c));
    CHECK_EQ(lapic_set_state(c, &s), 0);
    lapic_set_cr8(c, 0xf); /* not subject to the task's priority */
    CHECK_EQ(take(c), 0x23);
    CHECK_EQ(take(c), -1);
    out(vm, 0x20, 0x20);
    irqchip_set_line(vm, 3, 0);
    irqchip_set_line(vm, 5, 1);
    out(vm, 0x21, 0xff); /* gone before the acknowledge: spurious */
    CHECK_EQ(take(c), 0x27);
    out(vm, 0x20, 0x0b);
    CHECK_EQ(in(vm, 0x20), 0);
    /* Unmasked while the PICs ask. */
    ioapic_wr(vm, 0x10, 0x10700);
    out(vm, 0x21, 0);
    CHECK_EQ(take(c), -1);
    ioapic_wr(vm, 0x10, 0x700);
    CHECK_EQ(take(c), 0x25);
    /* Any other mode: pin 0 is not the PICs'. */
    out(vm, 0x20, 0x20);
    ioapic_wr(vm, 0x10, 0x40);
    lapic_set_cr8(c, 0);
    irqchip_set_line(vm, 5, 0);
    irqchip_set_line(vm, 5, 1);
    CHECK_EQ(take(c), -1);
    scrap(vm);
}

/* "APIC Timer": an expiry that the timer thread has not seen yet is not lost when the registers are written. */
static void test_late_timer(void)
{
    struct kvs_vm *vm = quiet(1);
    struct kvs_vcpu *c = vm->vcpus[0];
    apic(c, 0x3e0, 0xb);
    apic(c, LVT_TIMER, 0x40);
    apic(c, 0x380, 1000);
    clock_set_virtual(vm, clock_now(vm) + 1500);
    CHECK_EQ(apic_rd(c, 0x390), 0);
    apic(c, 0x380, 1000);
    CHECK_EQ(take(c), 0x40);
    apic(c, EOI, 0);
    CHECK_EQ(apic_rd(c, 0x390), 1000);
    clock_set_virtual(vm, clock_now(vm) + 1500);
    apic(c, LVT_TIMER, 0x10040); /* masked too late */
    CHECK_EQ(take(c), 0x40);
    scrap(vm);
}

/* An image of the state at reset, and images that no guest can make. */
static void test_images(void)
{
    struct kvs_vm *vm = machine(1, KVS_CLOCK_VIRTUAL, 0);
    struct kvs_vcpu *c = vm->vcpus[0];
    struct kvs_lapic_state s, t;
    lapic_get_state(c, &s);
    CHECK_EQ(lapic_set_state(c, &s), 0);
    lapic_get_state(c, &t);
    CHECK(!memcmp(&s, &t, sizeof s));
    uint64_t seed = 0x2545f4914f6cdd1dull;
    for (int i = 0; i < 2000; i++) {
        for (size_t n = 0; n < sizeof s.regs; n += 8) {
            seed ^= seed << 13; seed ^= seed >> 7; seed ^= seed << 17;
            memcpy(s.regs + n, &seed, 8);
        }
        CHECK_EQ(lapic_set_state(c, &s), 0);
        lapic_get_state(c, &s);
        CHECK_EQ(lapic_set_state(c, &s), 0);
        lapic_get_state(c, &t);
        CHECK(!memcmp(&s, &t, sizeof s));
        for (int k = 0; k < 4; k++) {
            int v = take(c);
            CHECK(v == -1 || (v >= 0 && v < 256));
            apic(c, EOI, 0);
        }
        advance(vm, 1000000);
    }
    scrap(vm);
}

int main(void)
{
    test_id();
    test_errors();
    test_priorities();
    test_software_disabled();
    test_shorthands();
    test_logical();
    test_directed_eoi();
    test_lint0();
    test_hidden_features();
    test_nmi_count();
    test_ioapic_modes();
    test_extint();
    test_late_timer();
    test_images();
    printf("%d passed, %d failed\n", passed, failed);
    return failed != 0;
}
