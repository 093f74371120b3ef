/*
 * The local APIC in xAPIC and x2APIC mode. SDM 3A "Advanced Programmable Interrupt Controller (APIC)"
 *
 * regs[] has the layout of KVM's image. Everything but the three atomics is under l->lock; other
 * threads come through lapic_deliver, the vCPU's own through the rest. The bus clock is 1 GHz, one
 * count per nanosecond and divider step, as in KVM. In xAPIC mode software can change the APIC ID.
 */
#include "lapic_impl.h"

static int highest_vector(const struct lapic *l, uint32_t bank)
{
    for (int i = 7; i >= 0; i--) {
        uint32_t word = rd(l, bank + (uint32_t)i * 0x10);
        if (word)
            return i * 32 + 31 - __builtin_clz(word);
    }
    return -1;
}

/* SDM 3A "Task and Processor Priorities" */
uint32_t lapic_processor_priority(const struct lapic *l)
{
    int isr = highest_vector(l, R_ISR);
    uint32_t in_service = isr < 0 ? 0 : (uint32_t)isr & 0xf0, tpr = rd(l, R_TPR) & 0xff;
    return (tpr & 0xf0) >= in_service ? tpr : in_service;
}

bool lapic_refresh(struct lapic *l)
{
    bool output = atomic_load(&vm_of(l)->irqchip->pic.output);
    bool before = atomic_load(&l->deliverable) || (output && atomic_load(&l->accepts_pic));
    int irr = highest_vector(l, R_IRR);
    bool enabled = hw_enabled(l);
    uint32_t lint0 = rd(l, R_LVT_LINT0);
    bool deliverable = enabled && (l->extint || (irr >= 0 && ((uint32_t)irr & 0xf0) > (lapic_processor_priority(l) & 0xf0)));
    /* Virtual wire: SDM 3A "Local Vector Table"; without a local APIC the pair drives INTR itself. */
    bool pic = enabled ? !(lint0 & LVT_MASKED) && (lint0 >> 8 & 7) == DELIVER_EXTINT
                       : (atomic_load(&l->base) & BASE_BSP) != 0;
    atomic_store(&l->deliverable, deliverable);
    atomic_store(&l->accepts_pic, pic);
    /* A lower one that waits for the guest's flag counts too: it ends the wait. */
    return (!before && (deliverable || (output && pic))) || (irr >= 0 && atomic_load(&l->pv_eoi));
}

void lapic_unlock(struct lapic *l)
{
    bool look = lapic_refresh(l);
    pthread_mutex_unlock(&l->lock);
    if (look)
        vcpu_request(l->vcpu, REQ_EVENT);
}

/* ---- taking interrupts ---- */

static bool accept_vector(struct lapic *l, uint8_t vector, bool level);

void lapic_report_error(struct lapic *l, uint32_t bit)
{
    uint32_t lvt = rd(l, R_LVT_ERROR);
    /* SDM 3A "Error Handling": only the write to ESR arms the interrupt again. */
    bool armed = !l->errors;
    l->errors |= bit;
    /* An illegal vector in the error entry itself must not report for ever. */
    if (armed && !(lvt & LVT_MASKED) && (lvt & 0xff) >= 16)
        (void)accept_vector(l, (uint8_t)lvt, false);
}

static bool accept_vector(struct lapic *l, uint8_t vector, bool level)
{
    if (!hw_enabled(l) || !(rd(l, R_SPIV) & SPIV_ENABLE))
        return false;
    if (vector < 16) {
        lapic_report_error(l, ERR_RECEIVE_VECTOR);
        return false;
    }
    if (level)
        set_vector(l, R_TMR, vector);
    else
        clear_vector(l, R_TMR, vector);
    set_vector(l, R_IRR, vector);
    return true;
}

/* SDM 3A "Local Vector Table". ExtINT is a state of LINT0, not an event: lapic_refresh. */
void lapic_deliver_local(struct lapic *l, uint32_t lvt_register)
{
    uint32_t lvt = rd(l, lvt_register), mode = lvt >> 8 & 7;
    if (lvt & LVT_MASKED)
        return;
    if (lvt_register == R_LVT_TIMER || lvt_register == R_LVT_ERROR || mode == DELIVER_FIXED)
        (void)accept_vector(l, (uint8_t)lvt, false);
    else if (mode == DELIVER_NMI)
        vcpu_post_nmi(l->vcpu);
    else if (mode == DELIVER_INIT)
        vcpu_post_init(l->vcpu);
    else if (mode == DELIVER_SMI && vm_of(l)->config.flags & KVS_VM_SMM)
        vcpu_post_smi(l->vcpu);
}

static bool lint0_is_level(const struct lapic *l)
{
    return (rd(l, R_LVT_LINT0) & (LVT_LEVEL | 0x700)) == LVT_LEVEL; /* fixed: the others are edges, or ExtINT */
}

void lapic_lint0_level(struct lapic *l)
{
    uint32_t *lvt = reg(l, R_LVT_LINT0);
    if (!hw_enabled(l) || !lint0_is_level(l) || (*lvt & (LVT_MASKED | LVT_REMOTE_IRR)) ||
        !atomic_load(&vm_of(l)->irqchip->pic.output))
        return;
    if (accept_vector(l, (uint8_t)*lvt, true))
        *lvt |= LVT_REMOTE_IRR;
}

void lapic_lint0_rise(struct lapic *l)
{
    pthread_mutex_lock(&l->lock);
    if (lint0_is_level(l))
        lapic_lint0_level(l);
    else if (hw_enabled(l))
        lapic_deliver_local(l, R_LVT_LINT0);
    (void)lapic_refresh(l);
    bool tell = atomic_load(&l->accepts_pic) || atomic_load(&l->deliverable);
    pthread_mutex_unlock(&l->lock);
    if (tell)
        vcpu_request(l->vcpu, REQ_EVENT);
}

int lapic_deliver(struct lapic *l, const struct apic_message *m)
{
    struct kvs_vcpu *c = l->vcpu;
    if (!hw_enabled(l))
        return 0;
    switch (m->mode) {
    case DELIVER_FIXED:
    case DELIVER_LOWEST:
        pthread_mutex_lock(&l->lock);
        bool taken = accept_vector(l, m->vector, m->level);
        lapic_unlock(l);
        return taken;
    case DELIVER_NMI:
        vcpu_post_nmi(c);
        return 1;
    case DELIVER_INIT:
        vcpu_post_init(c);
        return 1;
    case DELIVER_SMI:
        if (!(c->vm->config.flags & KVS_VM_SMM))
            return 0;
        vcpu_post_smi(c);
        return 1;
    case DELIVER_EXTINT:
        pthread_mutex_lock(&l->lock);
        l->extint = true;
        lapic_unlock(l);
        return 1;
    case DELIVER_SIPI:
        return !(atomic_load(&l->base) & BASE_BSP) && vcpu_post_sipi(c, m->vector);
    }
    return 0;
}

/* SDM 3A "Determining IPI Destination" */
bool lapic_match(struct lapic *l, const struct apic_message *m)
{
    uint32_t broadcast = m->wide ? UINT32_MAX : 0xff;
    if (!hw_enabled(l))
        return false;
    if (m->everyone)
        return l != m->except;
    if (m->dest == broadcast)
        return true;
    if (!m->logical)
        return m->dest == atomic_load(&l->dest);
    pthread_mutex_lock(&l->lock);
    uint32_t ldr = rd(l, R_LDR), dfr = rd(l, R_DFR);
    pthread_mutex_unlock(&l->lock);
    if (x2apic(l))
        return m->dest >> 16 == ldr >> 16 && (m->dest & ldr & 0xffff);
    if (m->dest > 0xff)
        return false;
    ldr >>= 24;
    if (dfr >> 28 == 0xf)
        return ldr & m->dest;
    return dfr >> 28 == 0 && ldr >> 4 == m->dest >> 4 && (ldr & m->dest & 0xf);
}

/* SDM 3A "Arbitration Priority Register": the task's priority, unless something in or before service has more. */
uint32_t lapic_arbitration_priority(const struct lapic *l)
{
    int irr = highest_vector(l, R_IRR);
    uint32_t priority = lapic_processor_priority(l), request = irr < 0 ? 0 : (uint32_t)irr & 0xf0;
    return request > (priority & 0xf0) ? request : priority;
}

uint32_t lapic_priority(struct lapic *l)
{
    pthread_mutex_lock(&l->lock);
    uint32_t priority = lapic_arbitration_priority(l) & 0xf0;
    pthread_mutex_unlock(&l->lock);
    return priority;
}

bool lapic_takes_fixed(struct lapic *l)
{
    pthread_mutex_lock(&l->lock);
    bool takes = rd(l, R_SPIV) & SPIV_ENABLE;
    pthread_mutex_unlock(&l->lock);
    return takes;
}

int lapic_ack(struct lapic *l)
{
    int vector = -1;
    pthread_mutex_lock(&l->lock);
    if (l->extint && hw_enabled(l)) {
        vector = ACK_EXTINT;
        l->extint = false;
        (void)lapic_refresh(l);
    } else if (atomic_load(&l->deliverable)) {
        vector = highest_vector(l, R_IRR);
        clear_vector(l, R_IRR, (uint8_t)vector);
        set_vector(l, R_ISR, (uint8_t)vector);
        bool alone = (l->vcpu->msr_kvm_pv_eoi & 1) && highest_vector(l, R_IRR) < 0 && !test_vector(l, R_TMR, (uint8_t)vector);
        atomic_store(&l->pv_eoi, alone);
        (void)lapic_refresh(l);
    }
    pthread_mutex_unlock(&l->lock);
    return vector;
}

bool lapic_requested(struct lapic *l)
{
    pthread_mutex_lock(&l->lock);
    bool any = highest_vector(l, R_IRR) >= 0;
    pthread_mutex_unlock(&l->lock);
    return any;
}

void lapic_end_interrupt(struct lapic *l)
{
    pthread_mutex_lock(&l->lock);
    int vector = highest_vector(l, R_ISR);
    if (vector >= 0)
        clear_vector(l, R_ISR, (uint8_t)vector);
    lapic_unlock(l);
}

void lapic_write_eoi(struct lapic *l)
{
    pthread_mutex_lock(&l->lock);
    int vector = highest_vector(l, R_ISR);
    bool level = false;
    if (vector >= 0) {
        level = test_vector(l, R_TMR, (uint8_t)vector);
        clear_vector(l, R_ISR, (uint8_t)vector);
        if ((uint8_t)rd(l, R_LVT_LINT0) == vector) {
            *reg(l, R_LVT_LINT0) &= ~LVT_REMOTE_IRR;
            lapic_lint0_level(l);
        }
    }
    /* SDM 3A "EOI Register": the suppressed broadcast is made up for by the IOAPIC's EOI register */
    level = level && !(rd(l, R_SPIV) & SPIV_NO_BROADCAST);
    lapic_unlock(l);
    if (level) {
        struct irqchip *chip = vm_of(l)->irqchip;
        pthread_mutex_lock(&chip->lock);
        ioapic_eoi(chip, (uint8_t)vector);
        pthread_mutex_unlock(&chip->lock);
    }
}

void lapic_write_tpr(struct lapic *l, uint32_t value)
{
    pthread_mutex_lock(&l->lock);
    *reg(l, R_TPR) = value & 0xff;
    lapic_unlock(l);
}

/* SDM 3A "Issuing Interprocessor Interrupts" */
void lapic_write_icr(struct lapic *l, uint32_t low, uint32_t high)
{
    struct irqchip *chip = vm_of(l)->irqchip;
    struct apic_message m = { .vector = (uint8_t)low, .mode = low >> 8 & 7, .logical = low >> 11 & 1 };
    uint32_t shorthand = low >> 18 & 3;
    pthread_mutex_lock(&l->lock);
    m.wide = x2apic(l);
    m.dest = m.wide ? high : high >> 24;
    *reg(l, R_ICR) = low & ~ICR_BUSY;
    *reg(l, R_ICR2) = high;
    bool illegal = m.mode <= DELIVER_LOWEST && m.vector < 16;
    if (illegal)
        lapic_report_error(l, ERR_SEND_VECTOR);
    lapic_unlock(l);
    /* INIT level de-assert only touches the arbitration IDs of old buses. */
    bool deassert = m.mode == DELIVER_INIT && (low & 0xc000) == 0x8000;
    if (illegal || deassert || m.mode == DELIVER_RESERVED || m.mode == DELIVER_EXTINT)
        return;
    m.lowest = m.mode == DELIVER_LOWEST;
    m.everyone = shorthand >= 2;
    /* "Valid Combinations": the sender itself takes vectors only. */
    m.except = shorthand == 2 && m.mode <= DELIVER_LOWEST ? NULL : l;
    pthread_mutex_lock(&chip->lock);
    if (shorthand != 1)
        (void)apic_send(chip, &m);
    else if (m.mode == DELIVER_FIXED)
        (void)lapic_deliver(l, &m);
    pthread_mutex_unlock(&chip->lock);
}
