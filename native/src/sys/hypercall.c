/* Hypercalls, numbered and answered as by KVM. KVM documentation "Linux KVM Hypercall" */
#include "../irqchip/irqchip.h"
#include "sys.h"

enum { HC_VAPIC_POLL_IRQ = 1, HC_KICK_CPU = 5, HC_CLOCK_PAIRING = 9, HC_SEND_IPI = 10, HC_SCHED_YIELD = 11 };
enum { HC_EPERM = 1, HC_EFAULT = 14, HC_EINVAL = 22, HC_EOPNOTSUPP = 95, HC_ENOSYS = 1000 };
#define NS_PER_S 1000000000u
#define ICR_DESTINATION_MODE 0x800u
#define ICR_SHORTHAND 0xc0000u

struct clock_pairing { int64_t sec, nsec; uint64_t tsc; uint32_t flags, pad[9]; };
_Static_assert(sizeof(struct clock_pairing) == 64, "KVM's layout");

/* The host's time of day and the guest's TSC at one moment. */
static int64_t clock_pairing(struct kvs_vcpu *c, uint64_t gpa, uint64_t type)
{
    if (type != 0) /* KVM_CLOCK_PAIRING_WALLCLOCK is the only one */
        return -HC_EOPNOTSUPP;
    uint64_t before = tsc_read(c), ns = clock_realtime(c->vm), after = tsc_read(c);
    struct clock_pairing pairing = { .sec = (int64_t)(ns / NS_PER_S), .nsec = (int64_t)(ns % NS_PER_S),
                                     .tsc = before + (after - before) / 2 };
    return vm_mem_write(c->vm, gpa, &pairing, sizeof pairing) ? -HC_EFAULT : 0;
}

static int64_t send_ipi(struct kvs_vcpu *c, uint64_t low, uint64_t high, uint32_t first, uint64_t icr, uint32_t width)
{
    if (icr & (ICR_DESTINATION_MODE | ICR_SHORTHAND))
        return -HC_EINVAL;
    if (!c->lapic)
        return -HC_EOPNOTSUPP;
    return (int64_t)irqchip_send_ipi(c->vm, low, first, (uint32_t)icr) +
           irqchip_send_ipi(c->vm, high, first + width, (uint32_t)icr);
}

static int64_t hypercall(struct kvs_vcpu *c, bool *yields)
{
    bool wide = is_code64(c);
    uint64_t mask = wide ? UINT64_MAX : UINT32_MAX;
    uint64_t a0 = c->gpr[RBX] & mask, a1 = c->gpr[RCX] & mask, a2 = c->gpr[RDX] & mask, a3 = c->gpr[RSI] & mask;
    uint32_t features[4];
    if (c->cpl != 0)
        return -HC_EPERM;
    cpuid_lookup(c, 0x40000001, 0, features);
    switch (c->gpr[RAX] & mask) {
    case HC_VAPIC_POLL_IRQ: return 0;
    case HC_KICK_CPU:
        if (!(features[0] & KVM_FEATURE_PV_UNHALT))
            break;
        irqchip_unhalt(c->vm, (uint32_t)a1);
        return 0;
    case HC_CLOCK_PAIRING: return clock_pairing(c, a0, a1);
    case HC_SEND_IPI:
        if (!(features[0] & KVM_FEATURE_PV_SEND_IPI))
            break;
        return send_ipi(c, a0, a1, (uint32_t)a2, a3, wide ? 64 : 32);
    case HC_SCHED_YIELD:
        if (!(features[0] & KVM_FEATURE_PV_SCHED_YIELD))
            break;
        *yields = true;
        return 0;
    default: break;
    }
    return -HC_ENOSYS;
}

bool hypercall_run(struct kvs_vcpu *c)
{
    bool yields = false;
    int64_t result = hypercall(c, &yields);
    c->gpr[RAX] = is_code64(c) ? (uint64_t)result : (uint32_t)result;
    return yields;
}
