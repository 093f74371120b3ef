/* Machine checks: the banks and the exception. SDM 3B "Machine-Check Architecture", KVM "KVM_X86_SET_MCE" */
#include "sys.h"

#define STATUS_VAL BIT(63)
#define STATUS_OVER BIT(62)
#define STATUS_UC BIT(61)
enum { MC_CTL, MC_STATUS, MC_ADDR, MC_MISC };

void mce_reset(struct kvs_vcpu *c)
{
    memset(c->msr_mc, 0, sizeof c->msr_mc);
    for (uint32_t bank = 0; bank < MC_BANKS; bank++) c->msr_mc[4 * bank + MC_CTL] = ~0ull;
    c->msr_mcg_ctl = ~0ull;
    c->mce_pending = MCE_NONE;
}

/* IA32_MCG_CTL is there; software error recovery is reported */
uint64_t mce_capability(void) { return MC_BANKS | BIT(8) | BIT(24); }

bool mce_value_valid(const struct kvs_vcpu *c, uint32_t n, uint64_t v, bool host)
{
    if (host) return true;
    switch (n & 3) {
    /* All or nothing; kernels leave out bit 10 of bank 4 of a K8 and bit 0 of bank 0 of a P6. */
    case MC_CTL: return v == 0 || (v | BIT(10) | 1) == ~0ull;
    /* SDM 3B "IA32_MCi_STATUS MSRS": software clears it; AMD APM 2 "HWCR": McStatusWrEn */
    case MC_STATUS: return v == 0 || (cpuid_is_amd(c) && c->msr_hwcr & BIT(18));
    default: return true;
    }
}

bool mce_deliver(struct kvs_vcpu *c)
{
    const bool fatal = c->mce_pending == MCE_SHUTDOWN;
    c->mce_pending = MCE_NONE;
    if (fatal) return false;
    raise_vector(c, EXC_MC);
    return deliver_exception(c);
}

KVS_API int32_t kvs_vcpu_set_mce(struct kvs_vcpu *c, const struct kvs_x86_mce *m)
{
    if (!c || !m) return -KVS_EINVAL;
    if (atomic_exchange(&c->running, 1)) return -KVS_EBUSY;
    int32_t rc = -KVS_EINVAL;
    if (m->bank < MC_BANKS && (m->status & STATUS_VAL)) {
        uint64_t *bank = c->msr_mc + 4 * m->bank, status = m->status;
        const bool uncorrected = status & STATUS_UC;
        rc = KVS_OK;
        if (uncorrected && (c->msr_mcg_ctl != ~0ull || bank[MC_CTL] != ~0ull)) {
            /* The bank does not report. */
        } else if (uncorrected && (!(c->cr4 & CR4_MCE) || (c->msr_mcg_status & MCG_STATUS_MCIP))) {
            /* SDM 3B "Machine-Check Exception": nobody listens, or one more while one is handled */
            c->mce_pending = MCE_SHUTDOWN;
        } else if (uncorrected || !(bank[MC_STATUS] & STATUS_VAL) || !(bank[MC_STATUS] & STATUS_UC)) {
            if (bank[MC_STATUS] & STATUS_VAL) status |= STATUS_OVER;
            bank[MC_STATUS] = status;
            bank[MC_ADDR] = m->addr;
            bank[MC_MISC] = m->misc;
            if (uncorrected) {
                c->msr_mcg_status = m->mcg_status;
                c->mce_pending = MCE_EXCEPTION;
            }
        } else {
            bank[MC_STATUS] |= STATUS_OVER; /* the uncorrected one stays */
        }
    }
    atomic_store(&c->running, 0);
    if (rc == KVS_OK) vcpu_request(c, REQ_EVENT);
    return rc;
}
