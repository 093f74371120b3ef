/* The local APIC's timer: a count-down, or a TSC deadline, on the VM clock. SDM 3A "APIC Timer" */
#include "lapic_impl.h"

static uint32_t divider(const struct lapic *l)
{
    uint32_t d = rd(l, R_TDCR);
    return 1u << (((d & 3) + ((d >> 1) & 4) + 1) & 7);
}

static uint64_t timer_span(const struct lapic *l) { return (uint64_t)rd(l, R_TMICT) * divider(l); }

static uint64_t timer_period(const struct lapic *l) { return max_u64(timer_span(l), MIN_TIMER_PERIOD_NS); }

void lapic_timer_set(struct lapic *l, uint64_t expiry)
{
    l->expiry = expiry;
    clock_timer_arm(vm_of(l), &l->timer, expiry);
}

uint64_t lapic_timer_remaining(struct lapic *l)
{
    uint64_t now = clock_now(vm_of(l));
    return l->expiry == CLOCK_NEVER || l->expiry <= now ? 0 : l->expiry - now;
}

uint32_t lapic_timer_count(struct lapic *l)
{
    uint64_t left = lapic_timer_remaining(l), span = timer_span(l);
    if (!left && lapic_timer_mode(l) == TIMER_PERIODIC && l->expiry != CLOCK_NEVER) /* the next period has begun */
        left = timer_period(l) - (clock_now(vm_of(l)) - l->expiry) % timer_period(l);
    if (lapic_timer_mode(l) == TIMER_TSC_DEADLINE || !span)
        return 0;
    return (uint32_t)((left > span ? left % span : left) / divider(l));
}

static void timer_expired(struct lapic *l, uint64_t now)
{
    lapic_deliver_local(l, R_LVT_TIMER);
    l->tsc_deadline = 0;
    if (lapic_timer_mode(l) != TIMER_PERIODIC || !rd(l, R_TMICT)) {
        l->expiry = CLOCK_NEVER;
        return;
    }
    /* Periods that nobody saw are merged into this one; the phase stays. */
    uint64_t period = timer_period(l), late = now - l->expiry;
    lapic_timer_set(l, l->expiry + (late / period + 1) * period);
}

/* What the timer thread has not come to yet happened before the register is written. */
static void catch_up(struct lapic *l)
{
    uint64_t now = clock_now(vm_of(l));
    if (l->expiry != CLOCK_NEVER && l->expiry <= now)
        timer_expired(l, now);
}

void lapic_write_tmict(struct lapic *l, uint32_t value)
{
    if (lapic_timer_mode(l) == TIMER_TSC_DEADLINE)
        return;
    catch_up(l);
    *reg(l, R_TMICT) = value;
    if (!value)
        lapic_timer_set(l, CLOCK_NEVER);
    else if (lapic_timer_mode(l) == TIMER_PERIODIC)
        lapic_timer_set(l, clock_now(vm_of(l)) + timer_period(l));
    else
        lapic_timer_set(l, clock_now(vm_of(l)) + timer_span(l));
}

/* The count goes on from where it is, at the new rate. */
void lapic_write_tdcr(struct lapic *l, uint32_t value)
{
    uint64_t old = divider(l), left = lapic_timer_remaining(l);
    *reg(l, R_TDCR) = value & 0xb;
    if (left && lapic_timer_mode(l) != TIMER_TSC_DEADLINE)
        lapic_timer_set(l, clock_now(vm_of(l)) + max_u64(left * divider(l) / old, 1));
}

void lapic_timer_fire(void *owner, uint64_t now)
{
    struct lapic *l = owner;
    pthread_mutex_lock(&l->lock);
    if (l->expiry != CLOCK_NEVER && l->expiry <= now)
        timer_expired(l, now);
    lapic_unlock(l);
}

void lapic_arm_tsc_deadline(struct lapic *l)
{
    struct kvs_vm *vm = vm_of(l);
    if (!l->tsc_deadline) {
        lapic_timer_set(l, CLOCK_NEVER);
        return;
    }
    uint64_t now = clock_now(vm), ticks = clock_ns_to_tsc(vm, now);
    uint64_t guest = ticks + (uint64_t)l->vcpu->tsc_offset;
    if (l->tsc_deadline <= guest) {
        lapic_timer_set(l, CLOCK_NEVER);
        l->expiry = now;
        timer_expired(l, now);
        return;
    }
    uint64_t more = l->tsc_deadline - guest;
    lapic_timer_set(l, more > UINT64_MAX - ticks ? CLOCK_NEVER : clock_tsc_to_ns(vm, ticks + more));
}

void lapic_tsc_changed(struct kvs_vcpu *c)
{
    struct lapic *l = c->lapic;
    if (!l)
        return;
    pthread_mutex_lock(&l->lock);
    if (lapic_timer_mode(l) == TIMER_TSC_DEADLINE && l->tsc_deadline)
        lapic_arm_tsc_deadline(l);
    lapic_unlock(l);
}

void lapic_write_lvt_timer(struct lapic *l, uint32_t value)
{
    uint32_t old = lapic_timer_mode(l);
    catch_up(l);
    *reg(l, R_LVT_TIMER) = value;
    /* Into and out of TSC-deadline mode the timer is disarmed; one-shot and periodic keep the count. */
    if (lapic_timer_mode(l) != old && (lapic_timer_mode(l) == TIMER_TSC_DEADLINE || old == TIMER_TSC_DEADLINE)) {
        *reg(l, R_TMICT) = 0;
        l->tsc_deadline = 0;
        lapic_timer_set(l, CLOCK_NEVER);
    }
}

/* Under the lock: continues a count-down from the image. */
void lapic_timer_restore(struct lapic *l, const uint32_t *image)
{
    uint64_t longest = lapic_timer_mode(l) == TIMER_PERIODIC ? timer_period(l) : timer_span(l);
    uint64_t left = (uint64_t)image[IMAGE_TIMER_HI] << 32 | image[IMAGE_TIMER_LO];
    if (lapic_timer_mode(l) == TIMER_TSC_DEADLINE) {
        lapic_arm_tsc_deadline(l);
        return;
    }
    l->tsc_deadline = 0;
    if (!left)
        left = (uint64_t)image[R_TMCCT >> 2] * divider(l);
    if (!left && lapic_timer_mode(l) == TIMER_PERIODIC)
        left = longest;
    if (!rd(l, R_TMICT))
        left = 0;
    lapic_timer_set(l, left ? clock_now(vm_of(l)) + min_u64(left, longest) : CLOCK_NEVER);
}
