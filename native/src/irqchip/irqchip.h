/* Interrupt controllers as the rest of the core sees them. */
#ifndef KVS_IRQCHIP_H
#define KVS_IRQCHIP_H

#include "../clock.h"

int irqchip_create(struct kvs_vm *vm);
int irqchip_create_pit(struct kvs_vm *vm);
void irqchip_destroy(struct kvs_vm *vm);

/* ---- vCPU side: called on the vCPU's own thread ---- */
/* Is there an external interrupt that this vCPU would take if EFLAGS.IF allowed it? Takes no lock. */
bool irqchip_has_interrupt(struct kvs_vcpu *c);
/* Acknowledges the highest-priority one (LAPIC IRR to ISR, or PIC INTA). -1: none after all. */
int irqchip_ack(struct kvs_vcpu *c);

/* ---- paravirt.c: on the vCPU's own thread ---- */
#define STEAL_RESERVED 0x3eu /* address bits of the MSR that must be zero */
bool steal_time_available(void);                 /* does this host count it? */
void steal_time_enable(struct kvs_vcpu *c);      /* after msr_kvm_steal_time was written by the guest */
void steal_time_update(struct kvs_vcpu *c);      /* if it is on: now and then */
void steal_time_close(struct kvs_vcpu *c);
void pv_eoi_sync(struct kvs_vcpu *c);            /* before what depends on the interrupts in service */
void pv_eoi_arrival(struct kvs_vcpu *c);         /* an interrupt may have arrived */
int pv_eoi_enable(struct kvs_vcpu *c, uint64_t value, bool host); /* -1: #GP(0) */

/* ---- hypercalls: any thread ---- */
/* To the LAPICs with the IDs first + (set bits); ICR gives vector and mode. How many took it. */
uint32_t irqchip_send_ipi(struct kvs_vm *vm, uint64_t set, uint32_t first, uint32_t icr);
void irqchip_unhalt(struct kvs_vm *vm, uint32_t apic_id);

/* ---- LAPIC ---- */
int lapic_create(struct kvs_vcpu *c);  /* when the VM has an irqchip */
void lapic_destroy(struct kvs_vcpu *c);
void lapic_reset(struct kvs_vcpu *c, bool is_init);
bool lapic_mmio_match(struct kvs_vcpu *c, uint64_t gpa); /* enabled in xAPIC mode and in its page */
uint32_t lapic_mmio_read(struct kvs_vcpu *c, uint32_t offset);
void lapic_mmio_write(struct kvs_vcpu *c, uint32_t offset, uint32_t value);
/* MSRs 0x800-0x8ff, IA32_APIC_BASE, IA32_TSC_DEADLINE: 0, or -1 for #GP(0). */
int lapic_msr_read(struct kvs_vcpu *c, uint32_t msr, uint64_t *value);
int lapic_msr_write(struct kvs_vcpu *c, uint32_t msr, uint64_t value);
uint64_t lapic_base(struct kvs_vcpu *c);
int lapic_set_base(struct kvs_vcpu *c, uint64_t value); /* -1: #GP(0) */
/* The same for the host's state load: any state that exists is allowed, not only legal transitions. */
int lapic_restore_base(struct kvs_vcpu *c, uint64_t value);
/* After c->tsc_offset has changed: a TSC-deadline timer follows. */
void lapic_tsc_changed(struct kvs_vcpu *c);
uint32_t lapic_cr8(struct kvs_vcpu *c);
void lapic_set_cr8(struct kvs_vcpu *c, uint32_t value);
void lapic_get_state(struct kvs_vcpu *c, struct kvs_lapic_state *s);
int lapic_set_state(struct kvs_vcpu *c, const struct kvs_lapic_state *s);

/* ---- lines and messages: any thread ---- */
int irqchip_set_line(struct kvs_vm *vm, uint32_t gsi, uint32_t level);
int irqchip_send_msi(struct kvs_vm *vm, const struct kvs_msi *msi);
int irqchip_set_routing(struct kvs_vm *vm, const struct kvs_irq_routing_entry *e, uint32_t n);
int irqchip_get(struct kvs_vm *vm, struct kvs_irqchip *chip);
int irqchip_set(struct kvs_vm *vm, const struct kvs_irqchip *chip);
int irqchip_get_pit(struct kvs_vm *vm, struct kvs_pit_state2 *pit);
int irqchip_set_pit(struct kvs_vm *vm, const struct kvs_pit_state2 *pit);

/* ---- ports and MMIO that the in-core devices claim; false: not mine ---- */
bool irqchip_port_read(struct kvs_vcpu *c, uint16_t port, uint32_t size, uint32_t *value);
bool irqchip_port_write(struct kvs_vcpu *c, uint16_t port, uint32_t size, uint32_t value);
bool ioapic_mmio_read(struct kvs_vm *vm, uint64_t gpa, void *data, uint32_t size);
bool ioapic_mmio_write(struct kvs_vm *vm, uint64_t gpa, const void *data, uint32_t size);

#endif
