/*
 * The local APIC in xAPIC and x2APIC mode. SDM 3A "Advanced Programmable Interrupt Controller (APIC)"
 *
 * regs[] has the layout of KVM's image. Everything but the three atomics is under l->lock; other
 * threads come through lapic_deliver, the vCPU's own through the rest. The bus clock is 1 GHz, one
 * count per nanosecond and divider step, as in KVM. The APIC ID is read-only, as on current parts.
 */
#include "chips.h"

#include <stdlib.h>

enum {
    R_ID = 0x20, R_VERSION = 0x30, R_TPR = 0x80, R_PPR = 0xa0, R_EOI = 0xb0, R_LDR = 0xd0,
    R_DFR = 0xe0, R_SPIV = 0xf0, R_ISR = 0x100, R_TMR = 0x180, R_IRR = 0x200, R_ESR = 0x280,
    R_LVT_CMCI = 0x2f0, R_ICR = 0x300, R_ICR2 = 0x310, R_LVT_TIMER = 0x320, R_LVT_THERMAL = 0x330,
    R_LVT_PERF = 0x340, R_LVT_LINT0 = 0x350, R_LVT_LINT1 = 0x360, R_LVT_ERROR = 0x370,
    R_TMICT = 0x380, R_TMCCT = 0x390, R_TDCR = 0x3e0, R_SELF_IPI = 0x3f0,
};
/* Words of the image that the hardware leaves unused hold what it does not show. */
enum { IMAGE_ERRORS = (R_ESR >> 2) + 1, IMAGE_TIMER_LO = (R_TMCCT >> 2) + 1, IMAGE_TIMER_HI };

#define BASE_BSP 0x100ull
#define BASE_X2APIC 0x400ull
#define BASE_ENABLE 0x800ull
#define BASE_DEFAULT 0xfee00000ull
#define BASE_RESERVED (~PHYS_MASK | 0x2ffull)

#define APIC_VERSION 0x50014u /* six LVT entries, no EOI-broadcast suppression */
#define SPIV_ENABLE 0x100u
#define SPIV_WRITABLE 0x1ffu
#define LVT_MASKED 0x10000u
#define LVT_STATUS 0x5000u /* delivery status and remote IRR: read-only */
#define LVT_TIMER_MODE 0x60000u
enum { TIMER_ONE_SHOT = 0, TIMER_PERIODIC = 0x20000, TIMER_TSC_DEADLINE = 0x40000 };

#define ICR_BUSY 0x1000u
#define ICR_X2_RESERVED 0xfff32000u
#define ERR_SEND_VECTOR 0x20u
#define ERR_RECEIVE_VECTOR 0x40u
#define ERR_REGISTER 0x80u
#define ERR_ALL 0xe0u

#define MSR_APIC_BASE 0x1bu
#define MSR_TSC_DEADLINE 0x6e0u
#define CPUID1_ECX_X2APIC BIT(21)
#define CPUID1_ECX_TSC_DEADLINE BIT(24)

static uint32_t *reg(struct lapic *l, uint32_t offset) { return &l->regs[(offset & 0xfff) >> 2]; }

static uint32_t rd(const struct lapic *l, uint32_t offset) { return l->regs[(offset & 0xfff) >> 2]; }

static bool hw_enabled(struct lapic *l) { return atomic_load(&l->base) & BASE_ENABLE; }

static bool x2apic(struct lapic *l) { return atomic_load(&l->base) & BASE_X2APIC; }

static struct kvs_vm *vm_of(struct lapic *l) { return l->vcpu->vm; }

static uint32_t *vector_word(struct lapic *l, uint32_t bank, uint8_t vector)
{
    return reg(l, bank + (uint32_t)(vector >> 5) * 0x10);
}
static void set_vector(struct lapic *l, uint32_t bank, uint8_t v) { *vector_word(l, bank, v) |= 1u << (v & 31); }
static void clear_vector(struct lapic *l, uint32_t bank, uint8_t v) { *vector_word(l, bank, v) &= ~(1u << (v & 31)); }
static bool test_vector(struct lapic *l, uint32_t bank, uint8_t v) { return *vector_word(l, bank, v) >> (v & 31) & 1; }

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
static uint32_t processor_priority(const struct lapic *l)
{
    int isr = highest_vector(l, R_ISR);
    uint32_t in_service = isr < 0 ? 0 : (uint32_t)isr & 0xf0, tpr = rd(l, R_TPR) & 0xff;
    return (tpr & 0xf0) >= in_service ? tpr : in_service;
}

/* After every change of what the lock-free readers want to know. True: there is news to look at. */
static bool refresh(struct lapic *l)
{
    bool output = atomic_load(&vm_of(l)->irqchip->pic.output);
    bool before = atomic_load(&l->deliverable) || (output && atomic_load(&l->accepts_pic));
    int irr = highest_vector(l, R_IRR);
    bool enabled = hw_enabled(l);
    uint32_t lint0 = rd(l, R_LVT_LINT0);
    bool deliverable = enabled && irr >= 0 && ((uint32_t)irr & 0xf0) > (processor_priority(l) & 0xf0);
    /* Virtual wire: SDM 3A "Local Vector Table"; without a local APIC the pair drives INTR itself. */
    bool pic = enabled ? !(lint0 & LVT_MASKED) && (lint0 >> 8 & 7) == DELIVER_EXTINT
                       : (atomic_load(&l->base) & BASE_BSP) != 0;
    atomic_store(&l->deliverable, deliverable);
    atomic_store(&l->accepts_pic, pic);
    return !before && (deliverable || (output && pic));
}

static void unlock_and_tell(struct lapic *l)
{
    bool look = refresh(l);
    pthread_mutex_unlock(&l->lock);
    if (look)
        vcpu_request(l->vcpu, REQ_EVENT);
}

/* ---- taking interrupts ---- */

static bool accept_vector(struct lapic *l, uint8_t vector, bool level);

static void report_error(struct lapic *l, uint32_t bit)
{
    uint32_t lvt = rd(l, R_LVT_ERROR);
    bool is_new = !(l->errors & bit);
    l->errors |= bit;
    /* An illegal vector in the error entry itself must not report for ever. */
    if (is_new && !(lvt & LVT_MASKED) && (lvt & 0xff) >= 16)
        (void)accept_vector(l, (uint8_t)lvt, false);
}

static bool accept_vector(struct lapic *l, uint8_t vector, bool level)
{
    if (!hw_enabled(l) || !(rd(l, R_SPIV) & SPIV_ENABLE))
        return false;
    if (vector < 16) {
        report_error(l, ERR_RECEIVE_VECTOR);
        return false;
    }
    if (level)
        set_vector(l, R_TMR, vector);
    else
        clear_vector(l, R_TMR, vector);
    set_vector(l, R_IRR, vector);
    return true;
}

static void post_nmi(struct kvs_vcpu *c)
{
    atomic_store(&c->nmi_pending, true);
    vcpu_request(c, REQ_EVENT);
}

/* A local source has fired. Under the lock; true: an NMI is to be posted. */
static bool deliver_local(struct lapic *l, uint32_t lvt_register)
{
    uint32_t lvt = rd(l, lvt_register), mode = lvt >> 8 & 7;
    if (lvt & LVT_MASKED)
        return false;
    if (lvt_register == R_LVT_TIMER || lvt_register == R_LVT_ERROR || mode == DELIVER_FIXED)
        (void)accept_vector(l, (uint8_t)lvt, false);
    return lvt_register != R_LVT_TIMER && lvt_register != R_LVT_ERROR && mode == DELIVER_NMI;
}

void lapic_lint0_rise(struct lapic *l)
{
    pthread_mutex_lock(&l->lock);
    bool nmi = hw_enabled(l) && deliver_local(l, R_LVT_LINT0);
    (void)refresh(l);
    bool tell = atomic_load(&l->accepts_pic) || atomic_load(&l->deliverable);
    pthread_mutex_unlock(&l->lock);
    if (nmi)
        post_nmi(l->vcpu);
    else if (tell)
        vcpu_request(l->vcpu, REQ_EVENT);
}

/* SDM 3A "MP Initialization Protocol Algorithm": a start-up IPI counts only while waiting for one. */
static int start_up(struct kvs_vcpu *c, uint8_t vector)
{
    uint32_t state = atomic_load(&c->mp_state);
    if (state != KVS_MP_STATE_INIT_RECEIVED && state != KVS_MP_STATE_UNINITIALIZED)
        return 0;
    c->sipi_vector = vector;
    if (!atomic_compare_exchange_strong(&c->mp_state, &state, KVS_MP_STATE_SIPI_RECEIVED))
        return 0;
    vcpu_request(c, REQ_EVENT);
    return 1;
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
        unlock_and_tell(l);
        return taken;
    case DELIVER_NMI:
        post_nmi(c);
        return 1;
    case DELIVER_INIT:
        atomic_store(&c->mp_state, KVS_MP_STATE_INIT_RECEIVED);
        vcpu_request(c, REQ_EVENT);
        return 1;
    case DELIVER_SIPI:
        return (atomic_load(&l->base) & BASE_BSP) ? 0 : start_up(c, m->vector);
    }
    return 0; /* SMI: there is no system-management mode; ExtINT comes from LINT0 only */
}

/* SDM 3A "Determining IPI Destination" */
bool lapic_match(struct lapic *l, const struct apic_message *m)
{
    uint32_t broadcast = m->wide ? UINT32_MAX : 0xff;
    if (!hw_enabled(l))
        return false;
    if (m->dest == broadcast)
        return true;
    if (!m->logical)
        return m->dest == l->id;
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

uint32_t lapic_priority(struct lapic *l)
{
    pthread_mutex_lock(&l->lock);
    uint32_t priority = processor_priority(l) & 0xf0;
    int irr = highest_vector(l, R_IRR);
    if (irr >= 0 && ((uint32_t)irr & 0xf0) > priority)
        priority = (uint32_t)irr & 0xf0;
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
    if (atomic_load(&l->deliverable)) {
        vector = highest_vector(l, R_IRR);
        clear_vector(l, R_IRR, (uint8_t)vector);
        set_vector(l, R_ISR, (uint8_t)vector);
        (void)refresh(l);
    }
    pthread_mutex_unlock(&l->lock);
    return vector;
}

static void write_eoi(struct lapic *l)
{
    pthread_mutex_lock(&l->lock);
    int vector = highest_vector(l, R_ISR);
    bool level = false;
    if (vector >= 0) {
        level = test_vector(l, R_TMR, (uint8_t)vector);
        clear_vector(l, R_ISR, (uint8_t)vector);
    }
    unlock_and_tell(l);
    if (level) {
        struct irqchip *chip = vm_of(l)->irqchip;
        pthread_mutex_lock(&chip->lock);
        ioapic_eoi(chip, (uint8_t)vector);
        pthread_mutex_unlock(&chip->lock);
    }
}

static void write_tpr(struct lapic *l, uint32_t value)
{
    pthread_mutex_lock(&l->lock);
    *reg(l, R_TPR) = value & 0xff;
    unlock_and_tell(l);
}

/* SDM 3A "Issuing Interprocessor Interrupts" */
static void write_icr(struct lapic *l, uint32_t low, uint32_t high)
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
        report_error(l, ERR_SEND_VECTOR);
    unlock_and_tell(l);
    /* INIT level de-assert only touches the arbitration IDs of old buses. */
    bool deassert = m.mode == DELIVER_INIT && (low & 0xc000) == 0x8000;
    if (illegal || deassert || m.mode == DELIVER_RESERVED || m.mode == DELIVER_EXTINT)
        return;
    m.lowest = m.mode == DELIVER_LOWEST && !shorthand;
    pthread_mutex_lock(&chip->lock);
    if (!shorthand) {
        (void)apic_send(chip, &m);
    } else if (shorthand == 1) {
        if (m.mode == DELIVER_FIXED)
            (void)lapic_deliver(l, &m);
    } else {
        for (uint32_t i = 0; i < chip->lapic_count; i++)
            if (chip->lapics[i] != l || (shorthand == 2 && m.mode <= DELIVER_LOWEST))
                (void)lapic_deliver(chip->lapics[i], &m);
    }
    pthread_mutex_unlock(&chip->lock);
}

/* ---- the timer: SDM 3A "APIC Timer" ---- */

static uint32_t timer_mode(const struct lapic *l) { return rd(l, R_LVT_TIMER) & LVT_TIMER_MODE; }

static uint32_t divider(const struct lapic *l)
{
    uint32_t d = rd(l, R_TDCR);
    return 1u << (((d & 3) + ((d >> 1) & 4) + 1) & 7);
}

static uint64_t timer_span(const struct lapic *l) { return (uint64_t)rd(l, R_TMICT) * divider(l); }

static uint64_t timer_period(const struct lapic *l) { return max_u64(timer_span(l), MIN_TIMER_PERIOD_NS); }

static void set_expiry(struct lapic *l, uint64_t expiry)
{
    l->expiry = expiry;
    clock_timer_arm(vm_of(l), &l->timer, expiry);
}

static uint64_t timer_remaining(struct lapic *l)
{
    uint64_t now = clock_now(vm_of(l));
    return l->expiry == CLOCK_NEVER || l->expiry <= now ? 0 : l->expiry - now;
}

static uint32_t timer_count(struct lapic *l)
{
    uint64_t left = timer_remaining(l), span = timer_span(l);
    if (timer_mode(l) == TIMER_TSC_DEADLINE || !span)
        return 0;
    return (uint32_t)((left > span ? left % span : left) / divider(l));
}

static void write_tmict(struct lapic *l, uint32_t value)
{
    if (timer_mode(l) == TIMER_TSC_DEADLINE)
        return;
    *reg(l, R_TMICT) = value;
    if (!value)
        set_expiry(l, CLOCK_NEVER);
    else if (timer_mode(l) == TIMER_PERIODIC)
        set_expiry(l, clock_now(vm_of(l)) + timer_period(l));
    else
        set_expiry(l, clock_now(vm_of(l)) + timer_span(l));
}

/* The count goes on from where it is, at the new rate. */
static void write_tdcr(struct lapic *l, uint32_t value)
{
    uint64_t old = divider(l), left = timer_remaining(l);
    *reg(l, R_TDCR) = value & 0xb;
    if (left && timer_mode(l) != TIMER_TSC_DEADLINE)
        set_expiry(l, clock_now(vm_of(l)) + max_u64(left * divider(l) / old, 1));
}

static void timer_expired(struct lapic *l, uint64_t now)
{
    (void)deliver_local(l, R_LVT_TIMER);
    l->tsc_deadline = 0;
    if (timer_mode(l) != TIMER_PERIODIC || !rd(l, R_TMICT)) {
        l->expiry = CLOCK_NEVER;
        return;
    }
    /* Periods that nobody saw are merged into this one; the phase stays. */
    uint64_t period = timer_period(l), late = now - l->expiry;
    set_expiry(l, l->expiry + (late / period + 1) * period);
}

static void timer_fire(void *owner, uint64_t now)
{
    struct lapic *l = owner;
    pthread_mutex_lock(&l->lock);
    if (l->expiry != CLOCK_NEVER && l->expiry <= now)
        timer_expired(l, now);
    unlock_and_tell(l);
}

static void arm_tsc_deadline(struct lapic *l)
{
    struct kvs_vm *vm = vm_of(l);
    if (!l->tsc_deadline) {
        set_expiry(l, CLOCK_NEVER);
        return;
    }
    uint64_t now = clock_now(vm), ticks = clock_ns_to_tsc(vm, now);
    uint64_t guest = ticks + (uint64_t)l->vcpu->tsc_offset;
    if (l->tsc_deadline <= guest) {
        set_expiry(l, CLOCK_NEVER);
        l->expiry = now;
        timer_expired(l, now);
        return;
    }
    uint64_t more = l->tsc_deadline - guest;
    set_expiry(l, more > UINT64_MAX - ticks ? CLOCK_NEVER : clock_tsc_to_ns(vm, ticks + more));
}

void lapic_tsc_changed(struct kvs_vcpu *c)
{
    struct lapic *l = c->lapic;
    if (!l)
        return;
    pthread_mutex_lock(&l->lock);
    if (timer_mode(l) == TIMER_TSC_DEADLINE && l->tsc_deadline)
        arm_tsc_deadline(l);
    unlock_and_tell(l);
}

static void write_lvt_timer(struct lapic *l, uint32_t value)
{
    uint32_t old = timer_mode(l);
    *reg(l, R_LVT_TIMER) = value;
    /* Into and out of TSC-deadline mode the timer is disarmed; one-shot and periodic keep the count. */
    if (timer_mode(l) != old && (timer_mode(l) == TIMER_TSC_DEADLINE || old == TIMER_TSC_DEADLINE)) {
        *reg(l, R_TMICT) = 0;
        l->tsc_deadline = 0;
        set_expiry(l, CLOCK_NEVER);
    }
}

/* ---- registers ---- */

static uint32_t lvt_writable(uint32_t offset)
{
    switch (offset) {
    case R_LVT_TIMER: return 0x700ff;
    case R_LVT_THERMAL: case R_LVT_PERF: return 0x107ff;
    case R_LVT_LINT0: case R_LVT_LINT1: return 0x1a7ff;
    case R_LVT_ERROR: return 0x100ff;
    }
    return 0;
}

static bool write_lvt(struct lapic *l, uint32_t offset, uint32_t value)
{
    uint32_t writable = lvt_writable(offset);
    if (!writable)
        return false;
    value &= writable;
    if (!(rd(l, R_SPIV) & SPIV_ENABLE))
        value |= LVT_MASKED;
    if (offset == R_LVT_TIMER)
        write_lvt_timer(l, value);
    else
        *reg(l, offset) = value;
    return true;
}

static void write_spiv(struct lapic *l, uint32_t value)
{
    *reg(l, R_SPIV) = value & SPIV_WRITABLE;
    if (!(value & SPIV_ENABLE))
        for (uint32_t o = R_LVT_TIMER; o <= R_LVT_ERROR; o += 0x10)
            *reg(l, o) |= LVT_MASKED;
}

/* Registers that a read finds in both modes. False: there is none. */
static bool read_register(struct lapic *l, uint32_t offset, uint32_t *value)
{
    switch (offset) {
    case R_PPR:
        *value = processor_priority(l);
        return true;
    case R_TMCCT:
        *value = timer_count(l);
        return true;
    case R_ID: case R_VERSION: case R_TPR: case R_LDR: case R_SPIV: case R_ESR: case R_ICR:
    case R_LVT_TIMER: case R_LVT_THERMAL: case R_LVT_PERF: case R_LVT_LINT0: case R_LVT_LINT1:
    case R_LVT_ERROR: case R_TMICT: case R_TDCR:
        *value = rd(l, offset);
        return true;
    }
    *value = rd(l, offset);
    return offset >= R_ISR && offset < R_ESR && !(offset & 0xf);
}

/* Registers that are written the same way in both modes; under the lock. */
static bool write_register(struct lapic *l, uint32_t offset, uint32_t value)
{
    switch (offset) {
    case R_SPIV:
        write_spiv(l, value);
        return true;
    case R_ESR:
        *reg(l, R_ESR) = l->errors;
        l->errors = 0;
        return true;
    case R_TMICT:
        write_tmict(l, value);
        return true;
    case R_TDCR:
        write_tdcr(l, value);
        return true;
    }
    return write_lvt(l, offset, value);
}

bool lapic_mmio_match(struct kvs_vcpu *c, uint64_t gpa)
{
    if (!c->lapic)
        return false;
    uint64_t base = atomic_load_explicit(&c->lapic->base, memory_order_relaxed);
    return (base & (BASE_ENABLE | BASE_X2APIC)) == BASE_ENABLE && ((base ^ gpa) & ~(uint64_t)PAGE_MASK) == 0;
}

uint32_t lapic_mmio_read(struct kvs_vcpu *c, uint32_t offset)
{
    struct lapic *l = c->lapic;
    uint32_t value = 0;
    if (!l || offset >= 0x400 || (offset & 0xf))
        return 0;
    pthread_mutex_lock(&l->lock);
    if (offset == R_DFR || offset == R_ICR2)
        value = rd(l, offset);
    else if (offset != R_EOI && !read_register(l, offset, &value)) {
        value = 0;
        report_error(l, ERR_REGISTER);
    }
    unlock_and_tell(l);
    return value;
}

void lapic_mmio_write(struct kvs_vcpu *c, uint32_t offset, uint32_t value)
{
    struct lapic *l = c->lapic;
    if (!l || offset >= 0x400 || (offset & 0xf))
        return;
    if (offset == R_EOI) {
        write_eoi(l);
        return;
    }
    if (offset == R_TPR) {
        write_tpr(l, value);
        return;
    }
    pthread_mutex_lock(&l->lock);
    bool icr = offset == R_ICR, known = true;
    uint32_t high = rd(l, R_ICR2);
    if (offset == R_LDR)
        *reg(l, R_LDR) = value & 0xff000000;
    else if (offset == R_DFR)
        *reg(l, R_DFR) = value | 0x0fffffff;
    else if (offset == R_ICR2)
        *reg(l, R_ICR2) = value & 0xff000000;
    else if (!icr && offset != R_ID && offset != R_VERSION && offset != R_PPR && offset != R_TMCCT)
        known = write_register(l, offset, value);
    if (!known)
        report_error(l, ERR_REGISTER);
    unlock_and_tell(l);
    if (icr)
        write_icr(l, value & 0xcffff, high);
}

/* ---- MSRs ---- */

static bool cpuid_has(struct kvs_vcpu *c, uint64_t ecx_bit)
{
    for (uint32_t i = 0; i < c->cpuid_count; i++)
        if (c->cpuid[i].function == 1)
            return c->cpuid[i].ecx & ecx_bit;
    return !c->cpuid_count;
}

uint64_t lapic_base(struct kvs_vcpu *c) { return c->lapic ? atomic_load(&c->lapic->base) : 0; }

static uint32_t x2apic_ldr(uint32_t id) { return (id >> 4) << 16 | 1u << (id & 15); }

/* SDM 3A "Local APIC State After Power-Up or Reset"; everything but the base. */
static void reset_registers(struct lapic *l)
{
    memset(l->regs, 0, sizeof l->regs);
    l->errors = 0;
    l->tsc_deadline = 0;
    set_expiry(l, CLOCK_NEVER);
    *reg(l, R_VERSION) = APIC_VERSION;
    *reg(l, R_DFR) = UINT32_MAX;
    *reg(l, R_SPIV) = 0xff;
    for (uint32_t o = R_LVT_TIMER; o <= R_LVT_ERROR; o += 0x10)
        *reg(l, o) = LVT_MASKED;
    /* As KVM does: the PIC pair reaches the boot processor before anything sets up the APIC. */
    if (l->id == 0)
        *reg(l, R_LVT_LINT0) = DELIVER_EXTINT << 8;
}

static void set_mode_registers(struct lapic *l)
{
    *reg(l, R_ID) = x2apic(l) ? l->id : l->id << 24;
    if (x2apic(l))
        *reg(l, R_LDR) = x2apic_ldr(l->id);
}

static void change_base(struct lapic *l, uint64_t value)
{
    uint64_t old = atomic_load(&l->base);
    pthread_mutex_lock(&l->lock);
    atomic_store(&l->base, value);
    if ((old & BASE_ENABLE) && !(value & BASE_ENABLE))
        reset_registers(l); /* SDM 3A "Enabling or Disabling the Local APIC": state may be lost */
    if ((old ^ value) & BASE_X2APIC && !(value & BASE_X2APIC))
        *reg(l, R_LDR) = 0;
    set_mode_registers(l);
    unlock_and_tell(l);
}

/* SDM 3A "x2APIC State Transitions" */
int lapic_set_base(struct kvs_vcpu *c, uint64_t value)
{
    struct lapic *l = c->lapic;
    if (!l || (value & BASE_RESERVED))
        return -1;
    uint64_t old = atomic_load(&l->base), mode = value & (BASE_ENABLE | BASE_X2APIC);
    uint64_t old_mode = old & (BASE_ENABLE | BASE_X2APIC);
    if (mode == BASE_X2APIC || ((mode & BASE_X2APIC) && !cpuid_has(c, CPUID1_ECX_X2APIC)))
        return -1;
    if (mode != old_mode && ((mode == BASE_ENABLE && (old_mode & BASE_X2APIC)) ||
                             ((mode & BASE_X2APIC) && !old_mode)))
        return -1;
    change_base(l, value);
    return 0;
}

int lapic_restore_base(struct kvs_vcpu *c, uint64_t value)
{
    if (!c->lapic || (value & BASE_RESERVED) || (value & (BASE_ENABLE | BASE_X2APIC)) == BASE_X2APIC)
        return -1;
    change_base(c->lapic, value);
    return 0;
}

static int write_tsc_deadline(struct lapic *l, uint64_t value)
{
    if (!cpuid_has(l->vcpu, CPUID1_ECX_TSC_DEADLINE))
        return -1;
    pthread_mutex_lock(&l->lock);
    if (timer_mode(l) == TIMER_TSC_DEADLINE) {
        l->tsc_deadline = value;
        arm_tsc_deadline(l);
    }
    unlock_and_tell(l);
    return 0;
}

int lapic_msr_read(struct kvs_vcpu *c, uint32_t msr, uint64_t *value)
{
    struct lapic *l = c->lapic;
    if (!l)
        return -1;
    if (msr == MSR_APIC_BASE) {
        *value = atomic_load(&l->base);
        return 0;
    }
    if (msr == MSR_TSC_DEADLINE && cpuid_has(c, CPUID1_ECX_TSC_DEADLINE)) {
        pthread_mutex_lock(&l->lock);
        *value = l->tsc_deadline;
        pthread_mutex_unlock(&l->lock);
        return 0;
    }
    if (msr < 0x800 || msr > 0x8ff || !x2apic(l))
        return -1;
    uint32_t offset = (msr & 0xff) << 4, low = 0;
    pthread_mutex_lock(&l->lock);
    bool known = read_register(l, offset, &low);
    *value = low;
    if (offset == R_ICR)
        *value |= (uint64_t)rd(l, R_ICR2) << 32;
    pthread_mutex_unlock(&l->lock);
    return known ? 0 : -1;
}

/* Bits that WRMSR may set; a register that is not there, or is read-only, has none. */
static uint32_t x2apic_writable(uint32_t offset)
{
    switch (offset) {
    case R_TPR: case R_SELF_IPI: return 0xff;
    case R_SPIV: return SPIV_WRITABLE;
    case R_TMICT: return UINT32_MAX;
    case R_TDCR: return 0xb;
    case R_LVT_LINT0: case R_LVT_LINT1: return lvt_writable(offset) | LVT_STATUS;
    }
    uint32_t lvt = lvt_writable(offset);
    return lvt ? lvt | 0x1000 : 0;
}

static int x2apic_write(struct lapic *l, uint32_t offset, uint64_t value)
{
    if (offset == R_ICR) {
        if (value & ICR_X2_RESERVED)
            return -1;
        write_icr(l, (uint32_t)value, (uint32_t)(value >> 32));
        return 0;
    }
    uint32_t writable = x2apic_writable(offset);
    if ((!writable && offset != R_EOI && offset != R_ESR) || (value & ~(uint64_t)writable))
        return -1;
    switch (offset) {
    case R_EOI:
        write_eoi(l);
        break;
    case R_TPR:
        write_tpr(l, (uint32_t)value);
        break;
    case R_SELF_IPI:
        write_icr(l, (uint32_t)value | 1u << 18, 0);
        break;
    default:
        pthread_mutex_lock(&l->lock);
        (void)write_register(l, offset, (uint32_t)value);
        unlock_and_tell(l);
        break;
    }
    return 0;
}

int lapic_msr_write(struct kvs_vcpu *c, uint32_t msr, uint64_t value)
{
    struct lapic *l = c->lapic;
    if (!l)
        return -1;
    if (msr == MSR_APIC_BASE)
        return lapic_set_base(c, value);
    if (msr == MSR_TSC_DEADLINE)
        return write_tsc_deadline(l, value);
    if (msr < 0x800 || msr > 0x8ff || !x2apic(l))
        return -1;
    return x2apic_write(l, (msr & 0xff) << 4, value);
}

uint32_t lapic_cr8(struct kvs_vcpu *c)
{
    struct lapic *l = c->lapic;
    if (!l)
        return 0;
    pthread_mutex_lock(&l->lock);
    uint32_t value = rd(l, R_TPR) >> 4 & 0xf;
    pthread_mutex_unlock(&l->lock);
    return value;
}

void lapic_set_cr8(struct kvs_vcpu *c, uint32_t value)
{
    if (c->lapic)
        write_tpr(c->lapic, (value & 0xf) << 4);
}

/* ---- life and state ---- */

int lapic_create(struct kvs_vcpu *c)
{
    struct irqchip *chip = c->vm->irqchip;
    if (!chip)
        return -KVS_ENOENT;
    if (c->id >= MAX_VCPUS) /* 255 is the xAPIC broadcast */
        return -KVS_EINVAL;
    struct lapic *l = calloc(1, sizeof *l);
    if (!l)
        return -KVS_ENOMEM;
    pthread_mutex_init(&l->lock, NULL);
    l->vcpu = c;
    l->id = c->id;
    l->timer.fire = timer_fire;
    l->timer.owner = l;
    clock_timer_add(c->vm, &l->timer);
    pthread_mutex_lock(&chip->lock);
    int result = chip->lapic_count < MAX_VCPUS ? KVS_OK : -KVS_EINVAL;
    for (uint32_t i = 0; i < chip->lapic_count; i++)
        if (chip->lapics[i]->id == l->id)
            result = -KVS_EEXIST;
    if (!result) {
        atomic_store(&l->base, BASE_DEFAULT | BASE_ENABLE | (l->id ? 0 : BASE_BSP));
        reset_registers(l);
        set_mode_registers(l);
        (void)refresh(l);
        chip->lapics[chip->lapic_count++] = l;
        c->lapic = l;
    }
    pthread_mutex_unlock(&chip->lock);
    if (result) {
        clock_timer_remove(c->vm, &l->timer);
        pthread_mutex_destroy(&l->lock);
        free(l);
    }
    return result;
}

void lapic_destroy(struct kvs_vcpu *c)
{
    struct lapic *l = c->lapic;
    if (!l)
        return;
    struct irqchip *chip = c->vm->irqchip;
    pthread_mutex_lock(&chip->lock);
    for (uint32_t i = 0; i < chip->lapic_count; i++) {
        if (chip->lapics[i] != l)
            continue;
        memmove(&chip->lapics[i], &chip->lapics[i + 1], (--chip->lapic_count - i) * sizeof chip->lapics[0]);
        break;
    }
    pthread_mutex_unlock(&chip->lock);
    clock_timer_remove(c->vm, &l->timer);
    c->lapic = NULL;
    pthread_mutex_destroy(&l->lock);
    free(l);
}

/* INIT leaves the base, and with it the mode, alone. SDM 3A "Local APIC State After It Receives an INIT Reset" */
void lapic_reset(struct kvs_vcpu *c, bool is_init)
{
    struct lapic *l = c->lapic;
    if (!l)
        return;
    pthread_mutex_lock(&l->lock);
    if (!is_init)
        atomic_store(&l->base, BASE_DEFAULT | BASE_ENABLE | (l->id ? 0 : BASE_BSP));
    reset_registers(l);
    set_mode_registers(l);
    (void)refresh(l);
    pthread_mutex_unlock(&l->lock);
}

void lapic_get_state(struct kvs_vcpu *c, struct kvs_lapic_state *s)
{
    struct lapic *l = c->lapic;
    memset(s, 0, sizeof *s);
    if (!l)
        return;
    uint32_t image[APIC_REGS];
    pthread_mutex_lock(&l->lock);
    memcpy(image, l->regs, sizeof image);
    image[R_PPR >> 2] = processor_priority(l);
    image[R_TMCCT >> 2] = timer_count(l);
    image[IMAGE_ERRORS] = l->errors;
    /* The count alone would lose the divider's phase. 1: expired, not yet seen by the timer thread. */
    if (timer_mode(l) != TIMER_TSC_DEADLINE && l->expiry != CLOCK_NEVER) {
        uint64_t left = max_u64(timer_remaining(l), 1);
        image[IMAGE_TIMER_LO] = (uint32_t)left;
        image[IMAGE_TIMER_HI] = (uint32_t)(left >> 32);
    }
    pthread_mutex_unlock(&l->lock);
    memcpy(s->regs, image, sizeof image);
}

/* Under the lock: continues a count-down from the image. */
static void restore_timer(struct lapic *l, const uint32_t *image)
{
    uint64_t longest = timer_mode(l) == TIMER_PERIODIC ? timer_period(l) : timer_span(l);
    uint64_t left = (uint64_t)image[IMAGE_TIMER_HI] << 32 | image[IMAGE_TIMER_LO];
    if (timer_mode(l) == TIMER_TSC_DEADLINE) {
        arm_tsc_deadline(l);
        return;
    }
    l->tsc_deadline = 0;
    if (!left)
        left = (uint64_t)image[R_TMCCT >> 2] * divider(l);
    if (!left && timer_mode(l) == TIMER_PERIODIC)
        left = longest;
    if (!rd(l, R_TMICT))
        left = 0;
    set_expiry(l, left ? clock_now(vm_of(l)) + min_u64(left, longest) : CLOCK_NEVER);
}

int lapic_set_state(struct kvs_vcpu *c, const struct kvs_lapic_state *s)
{
    struct lapic *l = c->lapic;
    uint32_t image[APIC_REGS];
    if (!l)
        return -KVS_ENOENT;
    memcpy(image, s->regs, sizeof image);
    if ((image[R_LVT_TIMER >> 2] & LVT_TIMER_MODE) == LVT_TIMER_MODE)
        return -KVS_ESTATE;
    pthread_mutex_lock(&l->lock);
    static const struct { uint16_t offset; uint32_t mask; } plain[] = {
        { R_TPR, 0xff }, { R_LDR, UINT32_MAX }, { R_SPIV, SPIV_WRITABLE }, { R_ESR, ERR_ALL },
        { R_ICR, 0xcefff }, { R_ICR2, UINT32_MAX }, { R_TMICT, UINT32_MAX }, { R_TDCR, 0xb },
    };
    memset(l->regs, 0, sizeof l->regs);
    for (size_t i = 0; i < ARRAY_SIZE(plain); i++)
        *reg(l, plain[i].offset) = image[plain[i].offset >> 2] & plain[i].mask;
    for (uint32_t o = R_ISR; o < R_ESR; o += 0x10)
        *reg(l, o) = image[o >> 2];
    /* Vectors 0-15 are never pending. */
    for (uint32_t bank = R_ISR; bank <= R_IRR; bank += 0x80)
        *reg(l, bank) &= 0xffff0000;
    for (uint32_t o = R_LVT_TIMER; o <= R_LVT_ERROR; o += 0x10)
        *reg(l, o) = image[o >> 2] & lvt_writable(o);
    *reg(l, R_DFR) = image[R_DFR >> 2] | 0x0fffffff;
    *reg(l, R_VERSION) = APIC_VERSION;
    set_mode_registers(l);
    if (!x2apic(l)) {
        *reg(l, R_LDR) &= 0xff000000;
        *reg(l, R_ICR2) &= 0xff000000;
    }
    l->errors = image[IMAGE_ERRORS] & ERR_ALL;
    restore_timer(l, image);
    unlock_and_tell(l);
    return KVS_OK;
}
