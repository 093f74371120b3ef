/*
 * MONITOR and MWAIT. SDM 2 "MONITOR", "MWAIT"
 *
 * MONITOR remembers a line of memory by a digest of its contents: stores of other vCPUs and of devices go
 * straight to host memory and tell nobody. While MWAIT waits, the run loop looks at the line from time to time,
 * ever more rarely; a store of the bytes that were there already goes unseen until the wait ends by itself,
 * which MWAIT may do at any time.
 */
#include "../clock.h"
#include "../sys/transfer.h"
#include "interp.h"

#define LINE 64u

/* False: no memory there. */
static bool line_digest(struct kvs_vcpu *c, uint64_t gpa, uint64_t *digest)
{
    const uint8_t *host = gpa_to_host(vcpu_slots(c), gpa, NULL, NULL);
    if (!host) return false;
    uint64_t h = 0x9e3779b97f4a7c15ull;
    for (uint32_t k = 0; k < LINE; k += 8) {
        h ^= atomic_load_explicit((const _Atomic uint64_t *)(host + k), memory_order_acquire);
        h *= 0xff51afd7ed558ccdull;
        h ^= h >> 32;
    }
    *digest = h;
    return true;
}

bool monitor_triggered(struct kvs_vcpu *c)
{
    uint64_t digest;
    return !line_digest(c, c->monitor.line, &digest) || digest != c->monitor.digest;
}

/* AMD APM 2 "Hardware Configuration Register": MonMwaitUserEn; SDM 4 "IA32_MISC_ENABLE": Enable Monitor FSM */
static bool is_there(const struct kvs_vcpu *c)
{
    if (cpuid_is_amd(c)) return c->cpl == 0 || (c->msr_hwcr & BIT(9));
    return c->cpl == 0 && (c->msr_misc_enable & MISC_ENABLE_MONITOR);
}

OPX(monitor)
{
    UNUSED_OPARGS;
    uint64_t la;
    struct translation t;
    if (!is_there(c)) return raise_ud(c);
    if (REG32(RCX) != 0) return raise_gp(c, 0);
    int st = seg_to_linear(c, i->seg & ~(uint32_t)INSN_FAST, reg_get(c, RAX, INSN_ASIZE(i)), 1, ACC_R, &la);
    if (st == ST_OK) st = mmu_walk(c, la, ACC_R, c->cpl == 3, c->eflags & FLAG_AC, false, &t);
    if (st != ST_OK) return st;
    if (UNLIKELY(c->dr7 & 0xff)) debug_check_access(c, la, 1, false);
    c->monitor.line = t.gpa & ~(uint64_t)(LINE - 1);
    c->monitor.armed = line_digest(c, c->monitor.line, &c->monitor.digest);
    return ST_OK;
}

OPX(mwait)
{
    uint32_t leaf[4];
    if (!is_there(c)) return raise_ud(c);
    cpuid_lookup(c, 5, 0, leaf);
    if (REG32(RCX) & ~((leaf[2] & 3) == 3 ? 1u : 0u)) return raise_gp(c, 0);
    const bool armed = c->monitor.armed;
    c->monitor.armed = false;
    /* Without a local APIC here only the host could end the wait, and it has no word for it. */
    if (!armed || !c->lapic || monitor_triggered(c)) return ST_OK;
    vcpu_sync_clock(c, i, budget);
    c->monitor.waiting = true;
    c->monitor.any_interrupt = REG32(RCX) & 1;
    c->monitor.deadline = clock_now(c->vm) + MWAIT_MAX;
    c->monitor.rip = insn_next_rip(c, i);
    return ST_END;
}
