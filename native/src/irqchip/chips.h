/* The in-core interrupt controllers: their state and the calls between them. Lock order: routing.c */
#ifndef KVS_CHIPS_H
#define KVS_CHIPS_H

#include "irqchip.h"

/* The shortest period of a periodic timer: a guest cannot make the host spin in its timer thread. */
#define MIN_TIMER_PERIOD_NS 10000u

/* Delivery modes. SDM 3A "Interrupt Command Register (ICR)" */
enum { DELIVER_FIXED, DELIVER_LOWEST, DELIVER_SMI, DELIVER_RESERVED, DELIVER_NMI, DELIVER_INIT,
       DELIVER_SIPI, DELIVER_EXTINT };

struct apic_message {
    uint32_t dest;
    uint8_t vector, mode;
    bool logical;
    bool level;  /* level triggered: the EOI goes back to the IOAPIC */
    bool wide;   /* a 32-bit x2APIC destination; otherwise 8 bits */
    bool lowest; /* to one of the destinations only */
    bool everyone; /* a shorthand: dest does not count */
    const struct lapic *except; /* with everyone */
};

#define APIC_REGS 256
struct lapic {
    /* Read without the lock. */
    _Atomic bool deliverable; /* the highest request beats the processor priority */
    _Atomic bool pv_eoi;      /* the guest may end the highest interrupt in service by a flag in its memory */
    _Atomic bool accepts_pic; /* an ExtINT from the PIC pair would be taken */
    _Atomic uint64_t base;    /* IA32_APIC_BASE */
    _Atomic uint32_t dest;    /* the APIC ID: what a physical destination is compared with */
    /* Under the lock. */
    pthread_mutex_t lock;
    uint32_t regs[APIC_REGS]; /* register at byte offset o: regs[o >> 2]; KVM's image */
    uint32_t errors;          /* seen since the last write to ESR */
    bool extint;              /* an ExtINT message: the PIC pair has the vector */
    uint64_t expiry;          /* of the count-down or the TSC deadline; CLOCK_NEVER: stopped */
    uint64_t tsc_deadline;
    struct vm_timer timer;
    /* Constant. */
    struct kvs_vcpu *vcpu;
    uint32_t id; /* at reset, and in x2APIC mode */
};

struct ioapic {
    _Atomic uint64_t base; /* read without the lock */
    uint32_t select, id, lines;
    uint64_t redir[KVS_IOAPIC_PINS];
};

struct pic8259 {
    struct kvs_pic_state chip[2];
    _Atomic bool output; /* INT of the master */
};

struct pit_channel {
    struct kvs_pit_channel_state s; /* but for count_load_time, which is start */
    int64_t start;       /* in ticks; see pit8254.c */
    int64_t load_tick;   /* the count is loaded with this tick */
    uint32_t next_count; /* of modes 1, 2, 3, 5: taken at the next cycle or trigger; 0 none */
    bool loaded;         /* a count was written since the control word */
    bool at_end;         /* mode 3: next_count waits for the end of the low half */
    bool was_low;        /* the output before load_tick */
    bool is_new;         /* what is loaded then was written after the last load */
};

struct pit8254 {
    pthread_mutex_t lock;
    struct kvs_vm *vm;
    struct pit_channel ch[3];
    bool speaker, hpet_legacy;
    bool line; /* GSI 0, as last set: between edges the output may be low */
    uint64_t next_event; /* of channel 0, in ns: its output rises or a count is taken; CLOCK_NEVER none */
    bool event_rises;
    struct vm_timer timer;
};

#define MAX_GSI 4096u
#define MAX_ROUTES 4096u
#define NO_ROUTE 0xffffu
struct routes {
    uint16_t first[MAX_GSI], next[MAX_ROUTES];
    struct kvs_irq_routing_entry entry[MAX_ROUTES];
};

struct irqchip {
    pthread_mutex_t lock; /* routes, pic, ioapic, lapics */
    struct kvs_vm *vm;
    struct routes *routes;
    struct pic8259 pic;
    struct ioapic ioapic;
    struct lapic *lapics[MAX_VCPUS];
    uint32_t lapic_count;
    struct pit8254 *pit; /* NULL: none; set before the first vCPU runs */
};

/* ---- routing.c ---- */
/* Under chip->lock. The number of LAPICs that took it; -1: no destination. */
int apic_send(struct irqchip *chip, const struct apic_message *m);

/* ---- lapic.c (with lapic_timer.c, lapic_regs.c): under chip->lock; each takes the LAPIC's ---- */
int lapic_deliver(struct lapic *l, const struct apic_message *m); /* 1 taken, 0 not */
#define ACK_EXTINT (-2)
bool lapic_match(struct lapic *l, const struct apic_message *m);
uint32_t lapic_priority(struct lapic *l); /* for lowest-priority arbitration */
bool lapic_takes_fixed(struct lapic *l);
void lapic_lint0_rise(struct lapic *l);   /* the PIC pair's output went high */
int lapic_ack(struct lapic *l);           /* takes only the LAPIC's lock; ACK_EXTINT: ask the PIC pair */

/* ---- paravirt.c ---- */
void pv_eoi_offer(struct kvs_vcpu *c); /* without locks, after an acknowledge has set l->pv_eoi */
void lapic_end_interrupt(struct lapic *l); /* lapic.c: EOI of an edge; takes the lock */
bool lapic_requested(struct lapic *l);     /* is an interrupt in IRR? takes the lock */

/* ---- ioapic.c: under chip->lock ---- */
void ioapic_reset(struct ioapic *io);
void ioapic_set_line(struct irqchip *chip, uint32_t pin, bool level);
void ioapic_eoi(struct irqchip *chip, uint8_t vector);
void ioapic_extint(struct irqchip *chip); /* the PIC pair's output, which is also at pin 0, went high */
void ioapic_get_state(const struct ioapic *io, struct kvs_ioapic_state *s);
int ioapic_set_state(struct irqchip *chip, const struct kvs_ioapic_state *s);

/* ---- pic8259.c: under chip->lock ---- */
void pic_reset(struct pic8259 *pic);
void pic_set_line(struct irqchip *chip, uint32_t irq, bool level); /* 0-15 */
int pic_ack(struct irqchip *chip); /* -1: no request */
int pic_spurious(const struct irqchip *chip); /* the vector of IR7 */
bool pic_claims(uint16_t port);
uint8_t pic_port_read(struct irqchip *chip, uint16_t port);
void pic_port_write(struct irqchip *chip, uint16_t port, uint8_t value);
int pic_set_state(struct irqchip *chip, uint32_t n, const struct kvs_pic_state *s);

/* ---- pit8254.c: without chip->lock ---- */
int pit_create(struct kvs_vm *vm, struct pit8254 **out);
void pit_destroy(struct pit8254 *p);
bool pit_claims(uint16_t port);
uint8_t pit_port_read(struct pit8254 *p, uint16_t port);
void pit_port_write(struct pit8254 *p, uint16_t port, uint8_t value);
void pit_get_state(struct pit8254 *p, struct kvs_pit_state2 *s);
int pit_set_state(struct pit8254 *p, const struct kvs_pit_state2 *s);

#endif
