/* SMI, INIT and SIPI as other threads post them; the run loop takes them. */
#include "vcpu.h"

void vcpu_post_smi(struct kvs_vcpu *c)
{
    atomic_fetch_or(&c->signals, SIG_SMI);
    vcpu_request(c, REQ_EVENT);
}

/* Whatever SIPI came before, this INIT comes behind it. */
void vcpu_post_init(struct kvs_vcpu *c)
{
    uint32_t old = atomic_load(&c->signals);
    while (!atomic_compare_exchange_weak(&c->signals, &old, (old & SIG_SMI) | SIG_INIT)) continue;
    vcpu_request(c, REQ_EVENT);
}

/* SDM 3A "MP Initialization Protocol Algorithm": a start-up IPI counts only while waiting for one. An INIT that
 * was posted but not taken yet is as good as taken; see take_signals. */
bool vcpu_post_sipi(struct kvs_vcpu *c, uint8_t vector)
{
    uint32_t old = atomic_load(&c->signals), state;
    do {
        state = atomic_load(&c->mp_state);
        if (!(old & SIG_INIT) && state != KVS_MP_STATE_INIT_RECEIVED && state != KVS_MP_STATE_UNINITIALIZED) return false;
        if (old & SIG_SIPI) return true; /* the first one counts */
    } while (!atomic_compare_exchange_weak(&c->signals, &old, old | SIG_SIPI | (uint32_t)vector << 8));
    vcpu_request(c, REQ_EVENT);
    return true;
}
