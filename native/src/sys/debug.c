/* Debug registers, breakpoints and single-step. SDM 3B "Debug, Branch Profile, TSC" */
#include "transfer.h"

#define DR7_GD BIT(13)

enum { BP_EXECUTE, BP_WRITE, BP_IO, BP_READ_WRITE };

static bool bp_enabled(const struct kvs_vcpu *c, uint32_t n) { return (c->dr7 >> (2 * n)) & 3; }
static uint32_t bp_kind(const struct kvs_vcpu *c, uint32_t n) { return (uint32_t)(c->dr7 >> (16 + 4 * n)) & 3; }
/* SDM 3B "Debug Control Register (DR7)": LEN 00, 01, 10, 11 = 1, 2, 8, 4 bytes */
static uint32_t bp_length(const struct kvs_vcpu *c, uint32_t n)
{
    static const uint8_t length[] = { 1, 2, 8, 4 };
    return length[(c->dr7 >> (18 + 4 * n)) & 3];
}
static bool bp_is_data(const struct kvs_vcpu *c, uint32_t n)
{
    return bp_enabled(c, n) && (bp_kind(c, n) == BP_WRITE || bp_kind(c, n) == BP_READ_WRITE);
}
static bool host_step(const struct kvs_vcpu *c)
{
    uint32_t both = KVS_GUESTDBG_ENABLE | KVS_GUESTDBG_SINGLESTEP;
    return (c->guest_debug.control & both) == both;
}

bool debug_stepping(struct kvs_vcpu *c)
{
    return c->eflags & FLAG_TF || c->dr7 & 0xff || c->trace_size != 0 || host_step(c);
}

bool debug_before(struct kvs_vcpu *c)
{
    if (!(c->dr7 & 0xff)) {
        c->eflags &= ~FLAG_RF;
        return false;
    }
    /* An instruction that restarts after a device read has been here before. */
    if (c->replay_count != 0 || c->io_read.active) return false;
    if (c->eflags & FLAG_RF) {
        c->eflags &= ~FLAG_RF;
        return false;
    }
    /* SDM 3A "Masking Exceptions and Interrupts When Switching Stacks"; AMD's processors hold back traps only. */
    if (c->int_shadow & 1 && !cpuid_is_amd(c)) return false;
    uint64_t la = is_code64(c) ? c->rip : (uint32_t)(c->seg[SEG_CS].base + c->rip), hits = 0;
    for (uint32_t n = 0; n < 4; n++)
        if (bp_enabled(c, n) && bp_kind(c, n) == BP_EXECUTE && c->dr[n] == la) hits |= BIT(n);
    if (!hits) return false;
    raise_debug(c, hits);
    return true;
}

void debug_check_access(struct kvs_vcpu *c, uint64_t la, uint32_t size, bool write)
{
    for (uint32_t n = 0; n < 4; n++) {
        if (!bp_is_data(c, n) || (!write && bp_kind(c, n) == BP_WRITE)) continue;
        uint64_t length = bp_length(c, n), start = c->dr[n] & ~(length - 1);
        if (la < start + length && start < la + size) c->pending_dbg |= BIT(n);
    }
}

void debug_check_port(struct kvs_vcpu *c, uint16_t port, uint32_t size)
{
    if (!(c->cr4 & CR4_DE)) return;
    for (uint32_t n = 0; n < 4; n++) {
        if (!bp_enabled(c, n) || bp_kind(c, n) != BP_IO) continue;
        uint64_t length = bp_length(c, n), start = c->dr[n] & ~(length - 1);
        if (port < start + length && start < (uint64_t)port + size) c->pending_dbg |= BIT(n);
    }
}

bool debug_page_watched(const struct kvs_vcpu *c, uint64_t la)
{
    if (LIKELY(!(c->dr7 & 0xff))) return false;
    for (uint32_t n = 0; n < 4; n++)
        if (bp_is_data(c, n) && (c->dr[n] ^ la) >> PAGE_SHIFT == 0) return true;
    return false;
}

static bool any_data_breakpoint(const struct kvs_vcpu *c)
{
    for (uint32_t n = 0; n < 4; n++)
        if (bp_is_data(c, n)) return true;
    return false;
}

/* DR4 and DR5 are DR6 and DR7 unless CR4.DE; general detect traps every access. */
static int debug_access(struct kvs_vcpu *c, uint32_t *n)
{
    if (*n > 7) return raise_ud(c);
    if (*n == 4 || *n == 5) {
        if (c->cr4 & CR4_DE) return raise_ud(c);
        *n += 2;
    }
    return c->dr7 & DR7_GD ? raise_debug(c, DR6_BD) : ST_OK;
}

int debug_read_register(struct kvs_vcpu *c, uint32_t n, uint64_t *v)
{
    int st = debug_access(c, &n);
    if (st != ST_OK) return st;
    *v = n < 4 ? c->dr[n] : n == 6 ? (c->dr6 & DR6_WRITABLE) | DR6_FIXED : (c->dr7 & DR7_WRITABLE) | DR7_FIXED;
    return ST_OK;
}

int debug_write_register(struct kvs_vcpu *c, uint32_t n, uint64_t v)
{
    int st = debug_access(c, &n);
    if (st != ST_OK) return st;
    if (n >= 6 && v >> 32) return raise_gp(c, 0);
    bool watched = any_data_breakpoint(c);
    if (n < 4) c->dr[n] = v;
    else if (n == 6) c->dr6 = (v & DR6_WRITABLE) | DR6_FIXED;
    else c->dr7 = (v & DR7_WRITABLE) | DR7_FIXED;
    if (watched || any_data_breakpoint(c)) tlb_flush_all(c); /* watched pages have no R and W tags */
    return ST_OK;
}
