/* The local APIC's registers by MMIO and MSR, its modes, its life and its image. */
#include "lapic_impl.h"

#include <stdlib.h>

static bool cpuid_has(struct kvs_vcpu *c, uint64_t ecx_bit)
{
    for (uint32_t i = 0; i < c->cpuid_count; i++)
        if (c->cpuid[i].function == 1)
            return c->cpuid[i].ecx & ecx_bit;
    return !c->cpuid_count;
}

static uint32_t lvt_writable(const struct lapic *l, uint32_t offset)
{
    switch (offset) {
    case R_LVT_TIMER: return cpuid_has(l->vcpu, CPUID1_ECX_TSC_DEADLINE) ? 0x700ff : 0x300ff;
    case R_LVT_THERMAL: case R_LVT_PERF: return 0x107ff;
    case R_LVT_LINT0: case R_LVT_LINT1: return 0x1a7ff;
    case R_LVT_ERROR: return 0x100ff;
    }
    return 0;
}

static bool write_lvt(struct lapic *l, uint32_t offset, uint32_t value)
{
    uint32_t writable = lvt_writable(l, offset);
    if (!writable)
        return false;
    value &= writable;
    if (!(rd(l, R_SPIV) & SPIV_ENABLE))
        value |= LVT_MASKED;
    if (offset == R_LVT_LINT0 && value & LVT_LEVEL)
        value |= rd(l, offset) & LVT_REMOTE_IRR;
    if (offset == R_LVT_TIMER)
        lapic_write_lvt_timer(l, value);
    else
        *reg(l, offset) = value;
    if (offset == R_LVT_LINT0)
        lapic_lint0_level(l);
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
        *value = lapic_processor_priority(l);
        return true;
    case R_TMCCT:
        *value = lapic_timer_count(l);
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
        lapic_write_tmict(l, value);
        return true;
    case R_TDCR:
        lapic_write_tdcr(l, value);
        return true;
    }
    return write_lvt(l, offset, value);
}

/* The register's form depends on the mode. */
static void set_id(struct lapic *l, uint32_t value)
{
    *reg(l, R_ID) = value;
    atomic_store(&l->dest, x2apic(l) ? value : value >> 24);
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
    pv_eoi_sync(c);
    pthread_mutex_lock(&l->lock);
    if (offset == R_DFR || offset == R_ICR2)
        value = rd(l, offset);
    else if (offset == R_APR)
        value = lapic_arbitration_priority(l);
    else if (offset != R_EOI && !read_register(l, offset, &value)) {
        value = 0;
        lapic_report_error(l, ERR_REGISTER);
    }
    lapic_unlock(l);
    return value;
}

void lapic_mmio_write(struct kvs_vcpu *c, uint32_t offset, uint32_t value)
{
    struct lapic *l = c->lapic;
    if (!l || offset >= 0x400 || (offset & 0xf))
        return;
    pv_eoi_sync(c);
    if (offset == R_EOI) {
        lapic_write_eoi(l);
        return;
    }
    if (offset == R_TPR) {
        lapic_write_tpr(l, value);
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
    else if (offset == R_ID)
        set_id(l, value & 0xff000000);
    else if (!icr && offset != R_VERSION && offset != R_APR && offset != R_PPR && offset != R_TMCCT)
        known = write_register(l, offset, value);
    if (!known)
        lapic_report_error(l, ERR_REGISTER);
    lapic_unlock(l);
    if (icr)
        lapic_write_icr(l, value & 0xcffff, high);
}

/* ---- MSRs ---- */

uint64_t lapic_base(struct kvs_vcpu *c) { return c->lapic ? atomic_load(&c->lapic->base) : 0; }

static uint32_t x2apic_ldr(uint32_t id) { return (id >> 4) << 16 | 1u << (id & 15); }

/* SDM 3A "Local APIC State After Power-Up or Reset"; everything but the base. */
static void reset_registers(struct lapic *l)
{
    memset(l->regs, 0, sizeof l->regs);
    l->errors = 0;
    l->extint = false;
    atomic_store(&l->pv_eoi, false);
    l->tsc_deadline = 0;
    lapic_timer_set(l, CLOCK_NEVER);
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
    set_id(l, x2apic(l) ? l->id : l->id << 24);
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
    if ((old ^ value) & (BASE_ENABLE | BASE_X2APIC))
        set_mode_registers(l);
    lapic_unlock(l);
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
    if (lapic_timer_mode(l) == TIMER_TSC_DEADLINE) {
        l->tsc_deadline = value;
        lapic_arm_tsc_deadline(l);
    }
    lapic_unlock(l);
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
    pv_eoi_sync(c);
    pthread_mutex_lock(&l->lock);
    bool known = read_register(l, offset, &low);
    *value = low;
    if (offset == R_ICR)
        *value |= (uint64_t)rd(l, R_ICR2) << 32;
    pthread_mutex_unlock(&l->lock);
    return known ? 0 : -1;
}

/* Bits that WRMSR may set; a register that is not there, or is read-only, has none. */
static uint32_t x2apic_writable(const struct lapic *l, uint32_t offset)
{
    switch (offset) {
    case R_TPR: case R_SELF_IPI: return 0xff;
    case R_SPIV: return SPIV_WRITABLE;
    case R_TMICT: return UINT32_MAX;
    case R_TDCR: return 0xb;
    case R_LVT_LINT0: case R_LVT_LINT1: return lvt_writable(l, offset) | LVT_STATUS;
    }
    uint32_t lvt = lvt_writable(l, offset);
    return lvt ? lvt | 0x1000 : 0;
}

static int x2apic_write(struct lapic *l, uint32_t offset, uint64_t value)
{
    if (offset == R_ICR) {
        if (value & ICR_X2_RESERVED)
            return -1;
        lapic_write_icr(l, (uint32_t)value, (uint32_t)(value >> 32));
        return 0;
    }
    uint32_t writable = x2apic_writable(l, offset);
    if ((!writable && offset != R_EOI && offset != R_ESR) || (value & ~(uint64_t)writable))
        return -1;
    switch (offset) {
    case R_EOI:
        lapic_write_eoi(l);
        break;
    case R_TPR:
        lapic_write_tpr(l, (uint32_t)value);
        break;
    case R_SELF_IPI:
        lapic_write_icr(l, (uint32_t)value | 1u << 18, 0);
        break;
    default:
        pthread_mutex_lock(&l->lock);
        (void)write_register(l, offset, (uint32_t)value);
        lapic_unlock(l);
        break;
    }
    return 0;
}

int lapic_msr_write(struct kvs_vcpu *c, uint32_t msr, uint64_t value)
{
    struct lapic *l = c->lapic;
    if (!l)
        return -1;
    if (msr == MSR_TSC_DEADLINE)
        return write_tsc_deadline(l, value);
    pv_eoi_sync(c);
    if (msr == MSR_APIC_BASE)
        return lapic_set_base(c, value);
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
    if (!c->lapic)
        return;
    pv_eoi_sync(c);
    lapic_write_tpr(c->lapic, (value & 0xf) << 4);
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
    l->timer.fire = lapic_timer_fire;
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
        (void)lapic_refresh(l);
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

/* INIT leaves the base, and with it the mode, and the ID alone. SDM 3A "Local APIC State After It Receives an INIT Reset" */
void lapic_reset(struct kvs_vcpu *c, bool is_init)
{
    struct lapic *l = c->lapic;
    if (!l)
        return;
    pthread_mutex_lock(&l->lock);
    uint32_t id = rd(l, R_ID);
    if (!is_init)
        atomic_store(&l->base, BASE_DEFAULT | BASE_ENABLE | (l->id ? 0 : BASE_BSP));
    reset_registers(l);
    set_mode_registers(l);
    if (is_init)
        set_id(l, id);
    (void)lapic_refresh(l);
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
    image[R_PPR >> 2] = lapic_processor_priority(l);
    image[R_TMCCT >> 2] = lapic_timer_count(l);
    image[IMAGE_ERRORS] = l->errors;
    image[IMAGE_FLAGS] = (l->extint ? IMAGE_EXTINT : 0) | (atomic_load(&l->pv_eoi) ? IMAGE_PV_EOI : 0);
    /* The count alone would lose the divider's phase. 1: expired, not yet seen by the timer thread. */
    if (lapic_timer_mode(l) != TIMER_TSC_DEADLINE && l->expiry != CLOCK_NEVER) {
        uint64_t left = max_u64(lapic_timer_remaining(l), 1);
        image[IMAGE_TIMER_LO] = (uint32_t)left;
        image[IMAGE_TIMER_HI] = (uint32_t)(left >> 32);
    }
    pthread_mutex_unlock(&l->lock);
    memcpy(s->regs, image, sizeof image);
}

int lapic_set_state(struct kvs_vcpu *c, const struct kvs_lapic_state *s)
{
    struct lapic *l = c->lapic;
    uint32_t image[APIC_REGS];
    if (!l)
        return -KVS_ENOENT;
    memcpy(image, s->regs, sizeof image);
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
        *reg(l, o) = (image[o >> 2] & lvt_writable(l, o)) |
                     (rd(l, R_SPIV) & SPIV_ENABLE || (o == R_LVT_LINT0 && l->id == 0) ? 0 : LVT_MASKED); /* see reset_registers */
    if (rd(l, R_LVT_LINT0) & LVT_LEVEL)
        *reg(l, R_LVT_LINT0) |= image[R_LVT_LINT0 >> 2] & LVT_REMOTE_IRR;
    *reg(l, R_DFR) = image[R_DFR >> 2] | 0x0fffffff;
    *reg(l, R_VERSION) = APIC_VERSION;
    set_mode_registers(l);
    if (!x2apic(l)) {
        set_id(l, image[R_ID >> 2] & 0xff000000);
        *reg(l, R_LDR) &= 0xff000000;
        *reg(l, R_ICR2) &= 0xff000000;
    }
    l->errors = image[IMAGE_ERRORS] & ERR_ALL;
    l->extint = image[IMAGE_FLAGS] & IMAGE_EXTINT;
    atomic_store(&l->pv_eoi, image[IMAGE_FLAGS] & IMAGE_PV_EOI);
    lapic_timer_restore(l, image);
    lapic_unlock(l);
    return KVS_OK;
}
