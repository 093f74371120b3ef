/*
 * String instructions. Each iteration commits before the next one starts, so a fault or an exit in
 * the middle of REP leaves the registers at the failing iteration and the instruction restarts there.
 * Where both sides are plain RAM, whole runs inside a page are moved at once.
 */
#include "interp.h"
#include "../isa/sem_alu.h"

/* Iterations between two looks at requests: bounds the latency of an interrupt. */
#define REP_CHUNK 65536u

static inline uint64_t count_get(const struct kvs_vcpu *c, const struct kvs_insn *i)
{
    return reg_get(c, RCX, INSN_ASIZE(i));
}
/* RSI, RDI and RCX of the address size; a 32-bit one zero-extends. */
static inline void reg_add(struct kvs_vcpu *c, const struct kvs_insn *i, uint32_t n, int64_t delta)
{
    uint32_t size = INSN_ASIZE(i);
    reg_set(c, n, size, reg_get(c, n, size) + (uint64_t)delta);
}
static inline bool repeats(const struct kvs_insn *i) { return i->flags & (INSN_REPE | INSN_REPNE); }
static inline uint32_t source_seg(const struct kvs_insn *i) { return i->seg & ~(uint32_t)INSN_FAST; }
static inline bool interrupted(struct kvs_vcpu *c)
{
    return c->code_modified || c->write_count || atomic_load_explicit(&c->limit, memory_order_relaxed) != BLOCK_LIMIT;
}

/* vspan at an index register, whose address size may be less than the segment: the run ends where it wraps. */
static uint8_t *run_at(struct kvs_vcpu *c, const struct kvs_insn *i, uint32_t seg, uint32_t n, bool write, uint64_t *bytes)
{
    const uint32_t asize = INSN_ASIZE(i);
    const uint64_t off = reg_get(c, n, asize);
    uint8_t *host = vspan(c, seg, off, write, bytes);
    if (asize < 8) *bytes = min_u64(*bytes, BIT(8 * asize) - off);
    return host;
}

/* Elements that fit the run of both sides, up to the count and the chunk; 0: do one by one. */
static uint64_t run_length(uint64_t count, uint64_t bytes, uint32_t size)
{
    return min_u64(min_u64(count, bytes / size), REP_CHUNK);
}

static int movs_one(struct kvs_vcpu *c, const struct kvs_insn *i, uint32_t size)
{
    uint64_t v = 0, asize = INSN_ASIZE(i);
    int st = vread(c, source_seg(i), reg_get(c, RSI, (uint32_t)asize), &v, size);
    if (st == ST_OK) st = vwrite(c, SEG_ES, reg_get(c, RDI, (uint32_t)asize), &v, size);
    if (st != ST_OK) return st;
    int64_t step = c->eflags & FLAG_DF ? -(int64_t)size : (int64_t)size;
    reg_add(c, i, RSI, step);
    reg_add(c, i, RDI, step);
    return ST_OK;
}

/* Forward copies may overlap so that a store feeds a later load; only then does order matter. */
static void copy_forward(uint8_t *d, const uint8_t *s, uint64_t n, uint32_t size)
{
    if (d <= s || (uint64_t)(d - s) >= n) {
        memmove(d, s, n);
        return;
    }
    uint64_t v = 0;
    for (uint64_t k = 0; k < n; k += size) {
        memcpy(&v, s + k, size);
        memcpy(d + k, &v, size);
    }
}

OPX(movs)
{
    uint32_t size = INSN_OSIZE(i);
    if (!repeats(i)) return movs_one(c, i, size);
    for (;;) {
        uint64_t count = count_get(c, i);
        if (count == 0) break;
        if (!(c->eflags & FLAG_DF)) {
            uint64_t sn = 0, dn = 0;
            uint8_t *s = run_at(c, i, source_seg(i), RSI, false, &sn);
            uint8_t *d = s ? run_at(c, i, SEG_ES, RDI, true, &dn) : NULL;
            uint64_t n = d ? run_length(count, min_u64(sn, dn), size) : 0;
            if (n) {
                copy_forward(d, s, n * size, size);
                reg_add(c, i, RSI, (int64_t)(n * size));
                reg_add(c, i, RDI, (int64_t)(n * size));
                reg_add(c, i, RCX, -(int64_t)n);
                if (n == count) break;
                if (interrupted(c)) return ST_AGAIN;
                continue;
            }
        }
        int st = movs_one(c, i, size);
        if (st != ST_OK) return st;
        reg_add(c, i, RCX, -1);
        iobus_insn_done(c);
        if (count == 1) break;
        if (interrupted(c)) return ST_AGAIN;
    }
    return ST_OK;
}

static void fill(uint8_t *d, uint64_t v, uint64_t n, uint32_t size)
{
    switch (size) {
    case 1: memset(d, (int)v, n); break;
    case 2: for (uint64_t k = 0; k < n; k++) st16(d + k * 2, (uint16_t)v); break;
    case 4: for (uint64_t k = 0; k < n; k++) st32(d + k * 4, (uint32_t)v); break;
    default: for (uint64_t k = 0; k < n; k++) st64(d + k * 8, v); break;
    }
}

OPX(stos)
{
    uint32_t size = INSN_OSIZE(i), asize = INSN_ASIZE(i);
    int64_t step = c->eflags & FLAG_DF ? -(int64_t)size : (int64_t)size;
    bool rep = repeats(i);
    for (;;) {
        uint64_t count = rep ? count_get(c, i) : 1;
        if (count == 0) break;
        if (rep && step > 0) {
            uint64_t dn = 0;
            uint8_t *d = run_at(c, i, SEG_ES, RDI, true, &dn);
            uint64_t n = d ? run_length(count, dn, size) : 0;
            if (n) {
                fill(d, c->gpr[RAX], n, size);
                reg_add(c, i, RDI, (int64_t)(n * size));
                reg_add(c, i, RCX, -(int64_t)n);
                if (n == count) break;
                if (interrupted(c)) return ST_AGAIN;
                continue;
            }
        }
        uint64_t v = c->gpr[RAX];
        int st = vwrite(c, SEG_ES, reg_get(c, RDI, asize), &v, size);
        if (st != ST_OK) return st;
        reg_add(c, i, RDI, step);
        if (!rep) break;
        reg_add(c, i, RCX, -1);
        if (count == 1) break;
        if (interrupted(c)) return ST_AGAIN;
    }
    return ST_OK;
}

OPX(lods)
{
    uint32_t size = INSN_OSIZE(i), asize = INSN_ASIZE(i);
    int64_t step = c->eflags & FLAG_DF ? -(int64_t)size : (int64_t)size;
    bool rep = repeats(i);
    for (uint32_t done = 0;;) {
        uint64_t count = rep ? count_get(c, i) : 1, v = 0;
        if (count == 0) break;
        int st = vread(c, source_seg(i), reg_get(c, RSI, asize), &v, size);
        if (st != ST_OK) return st;
        reg_set(c, RAX, size, v);
        reg_add(c, i, RSI, step);
        if (!rep) break;
        reg_add(c, i, RCX, -1);
        iobus_insn_done(c);
        if (count == 1) break;
        if (++done == REP_CHUNK || interrupted(c)) return ST_AGAIN;
    }
    return ST_OK;
}

/* REPE stops at a difference, REPNE at a match. */
static inline bool search_ends(const struct kvs_vcpu *c, const struct kvs_insn *i)
{
    return i->flags & INSN_REPE ? !(c->fl & 0x4000) : (c->fl & 0x4000) != 0;
}

OPX(cmps)
{
    uint32_t size = INSN_OSIZE(i), asize = INSN_ASIZE(i);
    int64_t step = c->eflags & FLAG_DF ? -(int64_t)size : (int64_t)size;
    bool rep = repeats(i);
    for (uint32_t done = 0;;) {
        uint64_t count = rep ? count_get(c, i) : 1, a = 0, b = 0;
        if (count == 0) break;
        int st = vread(c, source_seg(i), reg_get(c, RSI, asize), &a, size);
        if (st == ST_OK) st = vread(c, SEG_ES, reg_get(c, RDI, asize), &b, size);
        if (st != ST_OK) return st;
        sem_cmp(&c->fl, size, a, b);
        reg_add(c, i, RSI, step);
        reg_add(c, i, RDI, step);
        if (!rep) break;
        reg_add(c, i, RCX, -1);
        iobus_insn_done(c);
        if (count == 1 || search_ends(c, i)) break;
        if (++done == REP_CHUNK || interrupted(c)) return ST_AGAIN;
    }
    return ST_OK;
}

OPX(scas)
{
    uint32_t size = INSN_OSIZE(i), asize = INSN_ASIZE(i);
    int64_t step = c->eflags & FLAG_DF ? -(int64_t)size : (int64_t)size;
    bool rep = repeats(i);
    for (uint32_t done = 0;;) {
        uint64_t count = rep ? count_get(c, i) : 1, b = 0;
        if (count == 0) break;
        int st = vread(c, SEG_ES, reg_get(c, RDI, asize), &b, size);
        if (st != ST_OK) return st;
        sem_cmp(&c->fl, size, reg_get(c, RAX, size), b);
        reg_add(c, i, RDI, step);
        if (!rep) break;
        reg_add(c, i, RCX, -1);
        iobus_insn_done(c);
        if (count == 1 || search_ends(c, i)) break;
        if (++done == REP_CHUNK || interrupted(c)) return ST_AGAIN;
    }
    return ST_OK;
}
