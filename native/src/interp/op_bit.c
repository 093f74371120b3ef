/* Bit, multiply, divide, decimal and compare-exchange instructions: not the hottest, so generic. */
#include "interp.h"
#include "../isa/sem_alu.h"

/* r = name(a, b) at size 2, 4 or 8. */
#define CALL3(size, r, name, a, b)                                                                \
    switch (size) {                                                                               \
    case 2: r = sem_##name##16(&c->fl, (uint16_t)(a), (uint16_t)(b)); break;                      \
    case 4: r = sem_##name##32(&c->fl, (uint32_t)(a), (uint32_t)(b)); break;                      \
    default: r = sem_##name##64(&c->fl, a, b); break;                                             \
    }

OP(imul2_64rr) { REG64(i->dst) = sem_imul64(&c->fl, REG64(i->dst), REG64(i->src)); NEXT(); }
OP(imul2_32rr) { SET32(i->dst, sem_imul32(&c->fl, REG32(i->dst), REG32(i->src))); NEXT(); }
OPX(imul2)
{
    uint32_t size = INSN_OSIZE(i);
    uint64_t v, r;
    int st = rm_read(c, i, i->src, size, &v);
    if (st != ST_OK) return st;
    CALL3(size, r, imul, c->gpr[i->dst], v)
    reg_set(c, i->dst, size, r);
    return ST_OK;
}
OPX(imul3)
{
    uint32_t size = INSN_OSIZE(i);
    uint64_t v, r;
    int st = rm_read(c, i, i->src, size, &v);
    if (st != ST_OK) return st;
    CALL3(size, r, imul, v, i->imm)
    reg_set(c, i->dst, size, r);
    return ST_OK;
}

#define MULTIPLY(name)                                                                            \
    OPX(name)                                                                                     \
    {                                                                                             \
        uint32_t size = INSN_OSIZE(i);                                                            \
        uint64_t v;                                                                               \
        int st = rm_read(c, i, i->dst, size, &v);                                                 \
        if (st != ST_OK) return st;                                                               \
        switch (size) {                                                                           \
        case 1: REG16(RAX) = sem_##name##_wide8(&c->fl, REG8(0), (uint8_t)v); break;              \
        case 2: {                                                                                 \
            uint16_t lo = REG16(RAX), hi;                                                         \
            sem_##name##_wide16(&c->fl, &lo, &hi, (uint16_t)v);                                   \
            REG16(RAX) = lo;                                                                      \
            REG16(RDX) = hi;                                                                      \
            break;                                                                                \
        }                                                                                         \
        case 4: {                                                                                 \
            uint32_t lo = REG32(RAX), hi;                                                         \
            sem_##name##_wide32(&c->fl, &lo, &hi, (uint32_t)v);                                   \
            SET32(RAX, lo);                                                                       \
            SET32(RDX, hi);                                                                       \
            break;                                                                                \
        }                                                                                         \
        default: sem_##name##_wide64(&c->fl, &c->gpr[RAX], &c->gpr[RDX], v); break;               \
        }                                                                                         \
        return ST_OK;                                                                             \
    }
MULTIPLY(mul)
MULTIPLY(imul)
OP(mul_64r) { sem_mul_wide64(&c->fl, &c->gpr[RAX], &c->gpr[RDX], c->gpr[i->dst]); NEXT(); }

/* Flags are undefined; Zen 5 keeps CF and OF, sets AF, clears the others. */
#define DIVIDE(name, T8, S)                                                                       \
    OPX(name)                                                                                     \
    {                                                                                             \
        uint32_t size = INSN_OSIZE(i);                                                            \
        uint64_t v;                                                                               \
        int st = rm_read(c, i, i->dst, size, &v);                                                 \
        if (st != ST_OK) return st;                                                               \
        bool ok;                                                                                  \
        switch (size) {                                                                           \
        case 1: {                                                                                 \
            uint8_t q, r;                                                                         \
            ok = sem_##name##8((S)REG16(RAX), (T8)v, &q, &r);                                     \
            if (ok) REG16(RAX) = (uint16_t)(q | r << 8);                                          \
            break;                                                                                \
        }                                                                                         \
        case 2: {                                                                                 \
            uint16_t q, r;                                                                        \
            ok = sem_##name##16(REG16(RAX), REG16(RDX), (uint16_t)v, &q, &r);                     \
            if (ok) {                                                                             \
                REG16(RAX) = q;                                                                   \
                REG16(RDX) = r;                                                                   \
            }                                                                                     \
            break;                                                                                \
        }                                                                                         \
        case 4: {                                                                                 \
            uint32_t q, r;                                                                        \
            ok = sem_##name##32(REG32(RAX), REG32(RDX), (uint32_t)v, &q, &r);                     \
            if (ok) {                                                                             \
                SET32(RAX, q);                                                                    \
                SET32(RDX, r);                                                                    \
            }                                                                                     \
            break;                                                                                \
        }                                                                                         \
        default: {                                                                                \
            uint64_t q, r;                                                                        \
            ok = sem_##name##64(c->gpr[RAX], c->gpr[RDX], v, &q, &r);                             \
            if (ok) {                                                                             \
                c->gpr[RAX] = q;                                                                  \
                c->gpr[RDX] = r;                                                                  \
            }                                                                                     \
            break;                                                                                \
        }                                                                                         \
        }                                                                                         \
        if (!ok) return raise_vector(c, EXC_DE);                                                  \
        c->fl = (uint16_t)((c->fl & 0x101) | 0x1200);                                             \
        return ST_OK;                                                                             \
    }
DIVIDE(div, uint8_t, uint16_t)
DIVIDE(idiv, int8_t, int16_t)

#define DOUBLE_SHIFT(name)                                                                        \
    OPX(name)                                                                                     \
    {                                                                                             \
        uint32_t size = INSN_OSIZE(i);                                                            \
        uint8_t count = i->flags & 1 ? REG8(RCX * 8) : (uint8_t)i->imm;                           \
        uint64_t b = reg_get(c, i->src, size), a, r;                                              \
        if (i->dst == INSN_MEM) {                                                                 \
            int st = insn_rmw_begin(c, i, size);                                                  \
            if (st != ST_OK) return st;                                                           \
            a = ld64(c->rmw.data);                                                                \
        } else {                                                                                  \
            a = reg_get(c, i->dst, size);                                                         \
        }                                                                                         \
        switch (size) {                                                                           \
        case 2: r = sem_##name##16(&c->fl, (uint16_t)a, (uint16_t)b, count); break;               \
        case 4: r = sem_##name##32(&c->fl, (uint32_t)a, (uint32_t)b, count); break;               \
        default: r = sem_##name##64(&c->fl, a, b, count); break;                                  \
        }                                                                                         \
        if (i->dst == INSN_MEM) {                                                                 \
            st64(c->rmw.data, r);                                                                 \
            vrmw_end(c);                                                                          \
        } else {                                                                                  \
            reg_set(c, i->dst, size, r);                                                          \
        }                                                                                         \
        return ST_OK;                                                                             \
    }
DOUBLE_SHIFT(shld)
DOUBLE_SHIFT(shrd)

/* With a register bit number, memory is a bit string around the operand: the offset is signed. */
static uint64_t bit_string_offset(const struct kvs_vcpu *c, const struct kvs_insn *i, uint32_t size)
{
    int64_t bit = size == 2 ? (int16_t)c->gpr[i->src] : size == 4 ? (int32_t)c->gpr[i->src] : (int64_t)c->gpr[i->src];
    int64_t delta = (bit >> (size == 2 ? 4 : size == 4 ? 5 : 6)) * size;
    uint64_t off = insn_ea(c, i) + (uint64_t)delta;
    if (i->seg & INSN_FAST) return off;
    return INSN_ASIZE(i) == 8 ? off : INSN_ASIZE(i) == 4 ? (uint32_t)off : (uint16_t)off;
}

OPX(bt)
{
    uint32_t size = INSN_OSIZE(i);
    uint64_t a = 0, n = i->src == INSN_MEM ? i->imm : c->gpr[i->src], r;
    if (i->dst == INSN_MEM) {
        int st = vread(c, i->seg, i->src == INSN_MEM ? insn_offset(c, i) : bit_string_offset(c, i, size), &a, size);
        if (st != ST_OK) return st;
    } else {
        a = reg_get(c, i->dst, size);
    }
    CALL3(size, r, bt, a, n)
    (void)r;
    return ST_OK;
}

#define BIT_CHANGE(name)                                                                          \
    OPX(name)                                                                                     \
    {                                                                                             \
        uint32_t size = INSN_OSIZE(i);                                                            \
        uint64_t a, r, n = i->src == INSN_MEM ? i->imm : c->gpr[i->src];                          \
        if (i->dst != INSN_MEM) {                                                                 \
            CALL3(size, r, name, c->gpr[i->dst], n)                                               \
            reg_set(c, i->dst, size, r);                                                          \
            return ST_OK;                                                                         \
        }                                                                                         \
        uint64_t off = i->src == INSN_MEM ? insn_offset(c, i) : bit_string_offset(c, i, size);    \
        if (!(i->flags & INSN_LOCK)) {                                                            \
            int st = vrmw_begin(c, i->seg, off, size);                                            \
            if (st != ST_OK) return st;                                                           \
            a = ld64(c->rmw.data);                                                                \
            CALL3(size, r, name, a, n)                                                            \
            st64(c->rmw.data, r);                                                                 \
            vrmw_end(c);                                                                          \
            return ST_OK;                                                                         \
        }                                                                                         \
        int st = vrmw_begin_locked(c, i->seg, off, size);                                         \
        if (st != ST_OK) return st;                                                               \
        void *p = c->rmw.host ? (void *)c->rmw.host : (void *)c->rmw.data;                        \
        uint16_t fl = c->fl;                                                                      \
        bool done;                                                                                \
        do {                                                                                      \
            c->fl = fl;                                                                           \
            if (size == 2) {                                                                      \
                uint16_t old = __atomic_load_n((uint16_t *)p, __ATOMIC_RELAXED);                  \
                done = __atomic_compare_exchange_n((uint16_t *)p, &old, sem_##name##16(&c->fl, old, (uint16_t)n), false, __ATOMIC_SEQ_CST, __ATOMIC_RELAXED); \
            } else if (size == 4) {                                                               \
                uint32_t old = __atomic_load_n((uint32_t *)p, __ATOMIC_RELAXED);                  \
                done = __atomic_compare_exchange_n((uint32_t *)p, &old, sem_##name##32(&c->fl, old, (uint32_t)n), false, __ATOMIC_SEQ_CST, __ATOMIC_RELAXED); \
            } else {                                                                              \
                uint64_t old = __atomic_load_n((uint64_t *)p, __ATOMIC_RELAXED);                  \
                done = __atomic_compare_exchange_n((uint64_t *)p, &old, sem_##name##64(&c->fl, old, n), false, __ATOMIC_SEQ_CST, __ATOMIC_RELAXED); \
            }                                                                                     \
        } while (!done);                                                                          \
        vrmw_end_locked(c);                                                                       \
        return ST_OK;                                                                             \
    }
BIT_CHANGE(bts)
BIT_CHANGE(btr)
BIT_CHANGE(btc)

#define BIT_SCAN(name)                                                                            \
    OPX(name)                                                                                     \
    {                                                                                             \
        uint32_t size = INSN_OSIZE(i);                                                            \
        uint64_t v, r;                                                                            \
        int st = rm_read(c, i, i->src, size, &v);                                                 \
        if (st != ST_OK) return st;                                                               \
        if (size == 8 ? !v : size == 4 ? !(uint32_t)v : !(uint16_t)v) {                           \
            CALL3(size, r, name, c->gpr[i->dst], v) /* flags; the destination stays whole */      \
            (void)r;                                                                              \
            return ST_OK;                                                                         \
        }                                                                                         \
        CALL3(size, r, name, c->gpr[i->dst], v)                                                   \
        reg_set(c, i->dst, size, r);                                                              \
        return ST_OK;                                                                             \
    }
BIT_SCAN(bsf)
BIT_SCAN(bsr)

OP(bswap)
{
    switch (INSN_OSIZE(i)) {
    case 2: REG16(i->dst) = 0; break; /* undefined; silicon clears the 16 bits */
    case 4: SET32(i->dst, __builtin_bswap32(REG32(i->dst))); break;
    default: c->gpr[i->dst] = __builtin_bswap64(c->gpr[i->dst]); break;
    }
    NEXT();
}

/* ---- decimal: SDM 2A "DAA", "AAA", "AAM" and their twins ---- */
static void decimal_carries(struct kvs_vcpu *c, bool af, bool cf)
{
    c->fl = (uint16_t)((c->fl & ~0x1100) | (af ? 0x1000 : 0) | (cf ? 0x100 : 0));
}
static void decimal_flags(struct kvs_vcpu *c, uint8_t al, bool af, bool cf)
{
    sem_test8(&c->fl, al, al);
    decimal_carries(c, af, cf);
}
/*
 * What the manuals leave undefined is what Zen 5 does: DAA and DAS leave the OF of one addition or subtraction
 * of the whole correction, AAA and AAS the flags of that of AX, AAD those of its addition.
 */
OPX(daa)
{
    uint8_t al = REG8(0), old = al;
    bool af = c->fl & 0x1000, cf = c->fl & 0x100;
    if ((al & 15) > 9 || af) {
        al += 6;
        af = true;
    }
    if (old > 0x99 || cf) {
        al += 0x60;
        cf = true;
    } else {
        cf = false;
    }
    if (!((old & 15) > 9 || (c->fl & 0x1000))) af = false;
    REG8(0) = al;
    sem_add8(&c->fl, old, (uint8_t)(al - old));
    decimal_carries(c, af, cf);
    return ST_OK;
}
OPX(das)
{
    uint8_t al = REG8(0), old = al;
    bool af = c->fl & 0x1000, cf = c->fl & 0x100, new_cf = false;
    if ((al & 15) > 9 || af) {
        new_cf = cf || al < 6;
        al -= 6;
        af = true;
    } else {
        af = false;
    }
    if (old > 0x99 || cf) {
        al -= 0x60;
        new_cf = true;
    }
    REG8(0) = al;
    sem_sub8(&c->fl, old, (uint8_t)(old - al));
    decimal_carries(c, af, new_cf);
    return ST_OK;
}
OPX(aaa)
{
    bool carry = (REG8(0) & 15) > 9 || (c->fl & 0x1000);
    REG16(RAX) = sem_add16(&c->fl, REG16(RAX), carry ? 0x106 : 0);
    REG8(0) &= 15;
    decimal_carries(c, carry, carry);
    return ST_OK;
}
OPX(aas)
{
    bool carry = (REG8(0) & 15) > 9 || (c->fl & 0x1000);
    REG16(RAX) = sem_sub16(&c->fl, REG16(RAX), carry ? 0x106 : 0);
    REG8(0) &= 15;
    decimal_carries(c, carry, carry);
    return ST_OK;
}
OPX(aam)
{
    uint8_t base = (uint8_t)i->imm;
    if (base == 0) return raise_vector(c, EXC_DE);
    uint8_t al = REG8(0);
    REG8(1) = al / base;
    REG8(0) = al % base;
    decimal_flags(c, REG8(0), false, false);
    return ST_OK;
}
OPX(aad)
{
    REG16(RAX) = sem_add8(&c->fl, REG8(0), (uint8_t)(REG8(1) * (uint8_t)i->imm));
    return ST_OK;
}

OPX(xlat)
{
    uint64_t off = c->gpr[RBX] + REG8(0);
    off = INSN_ASIZE(i) == 8 ? off : INSN_ASIZE(i) == 4 ? (uint32_t)off : (uint16_t)off;
    uint8_t v;
    int st = vread(c, i->seg & ~(uint32_t)INSN_FAST, off, &v, 1);
    if (st == ST_OK) REG8(0) = v;
    return st;
}

OPX(bound)
{
    uint32_t size = INSN_OSIZE(i);
    uint8_t pair[8];
    uint64_t off = insn_offset(c, i), upper = INSN_ASIZE(i) == 2 ? (uint16_t)(off + size) : (uint32_t)(off + size);
    int st = vread(c, i->seg, off, pair, size);
    if (st == ST_OK) st = vread(c, i->seg, upper, pair + size, size);
    if (st != ST_OK) return st;
    bool out = size == 2
        ? (int16_t)c->gpr[i->dst] < (int16_t)ld16(pair) || (int16_t)c->gpr[i->dst] > (int16_t)ld16(pair + 2)
        : (int32_t)c->gpr[i->dst] < (int32_t)ld32(pair) || (int32_t)c->gpr[i->dst] > (int32_t)ld32(pair + 4);
    return out ? raise_vector(c, EXC_BR) : ST_OK;
}

static uint64_t compare_exchange(void *p, uint32_t size, uint64_t expected, uint64_t desired)
{
    switch (size) {
    case 1: {
        uint8_t e = (uint8_t)expected;
        __atomic_compare_exchange_n((uint8_t *)p, &e, (uint8_t)desired, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
        return e;
    }
    case 2: {
        uint16_t e = (uint16_t)expected;
        __atomic_compare_exchange_n((uint16_t *)p, &e, (uint16_t)desired, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
        return e;
    }
    case 4: {
        uint32_t e = (uint32_t)expected;
        __atomic_compare_exchange_n((uint32_t *)p, &e, (uint32_t)desired, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
        return e;
    }
    default:
        __atomic_compare_exchange_n((uint64_t *)p, &expected, desired, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
        return expected;
    }
}

OPX(cmpxchg)
{
    uint32_t size = INSN_OSIZE(i);
    uint64_t acc = reg_get(c, RAX, size), src = reg_get(c, i->src, size), old;
    if (i->dst != INSN_MEM) {
        old = reg_get(c, i->dst, size);
        if (old == acc) reg_set(c, i->dst, size, src); /* else not written: not even zero-extended */
    } else {
        /* The destination is written in any case, so it must be writable. */
        bool lock = i->flags & INSN_LOCK;
        int st = lock ? vrmw_begin_locked(c, i->seg, insn_offset(c, i), size)
                      : vrmw_begin(c, i->seg, insn_offset(c, i), size);
        if (st != ST_OK) return st;
        if (lock) {
            old = compare_exchange(c->rmw.host ? (void *)c->rmw.host : (void *)c->rmw.data, size, acc, src);
            vrmw_end_locked(c);
        } else {
            old = 0;
            memcpy(&old, c->rmw.data, size);
            if (old == acc) memcpy(c->rmw.data, &src, size);
            vrmw_end(c);
        }
    }
    sem_cmp(&c->fl, size, acc, old);
    if (old != acc) reg_set(c, RAX, size, old);
    return ST_OK;
}

OPX(xadd)
{
    uint32_t size = INSN_OSIZE(i);
    uint64_t src = reg_get(c, i->src, size), old, sum;
    void *p = NULL;
    bool lock = i->flags & INSN_LOCK;
    if (i->dst != INSN_MEM) {
        old = reg_get(c, i->dst, size);
    } else {
        int st = lock ? vrmw_begin_locked(c, i->seg, insn_offset(c, i), size)
                      : vrmw_begin(c, i->seg, insn_offset(c, i), size);
        if (st != ST_OK) return st;
        if (lock) {
            p = c->rmw.host ? (void *)c->rmw.host : (void *)c->rmw.data;
            switch (size) {
            case 1: old = __atomic_fetch_add((uint8_t *)p, (uint8_t)src, __ATOMIC_SEQ_CST); break;
            case 2: old = __atomic_fetch_add((uint16_t *)p, (uint16_t)src, __ATOMIC_SEQ_CST); break;
            case 4: old = __atomic_fetch_add((uint32_t *)p, (uint32_t)src, __ATOMIC_SEQ_CST); break;
            default: old = __atomic_fetch_add((uint64_t *)p, src, __ATOMIC_SEQ_CST); break;
            }
        } else {
            old = 0;
            memcpy(&old, c->rmw.data, size);
        }
    }
    switch (size) {
    case 1: sum = sem_add8(&c->fl, (uint8_t)old, (uint8_t)src); break;
    case 2: sum = sem_add16(&c->fl, (uint16_t)old, (uint16_t)src); break;
    case 4: sum = sem_add32(&c->fl, (uint32_t)old, (uint32_t)src); break;
    default: sum = sem_add64(&c->fl, old, src); break;
    }
    reg_set(c, i->src, size, old);
    if (i->dst != INSN_MEM) {
        reg_set(c, i->dst, size, sum); /* after src: XADD r, r leaves the sum */
    } else if (lock) {
        vrmw_end_locked(c);
    } else {
        memcpy(c->rmw.data, &sum, size);
        vrmw_end(c);
    }
    return ST_OK;
}

/* CMPXCHG8B, and CMPXCHG16B with REX.W, whose operand must be aligned. */
OPX(cmpxchg8b)
{
    bool wide = INSN_OSIZE(i) == 8, lock = i->flags & INSN_LOCK, equal;
    uint64_t off = insn_offset(c, i);
    if (wide) {
        uint64_t la;
        int st = seg_to_linear_aligned(c, i->seg, off, 16, ACC_RW, &la);
        if (st != ST_OK) return st;
    }
    int st = lock ? vrmw_begin_locked(c, i->seg, off, wide ? 16 : 8) : vrmw_begin(c, i->seg, off, wide ? 16 : 8);
    if (st != ST_OK) return st;
    uint64_t *p = lock && c->rmw.host ? (uint64_t *)c->rmw.host : (uint64_t *)c->rmw.data;
    if (wide) {
        unsigned long long lo = c->gpr[RAX], hi = c->gpr[RDX];
        bool z;
        __asm__ volatile("lock cmpxchg16b %1" : "=@ccz"(z), "+m"(*(unsigned __int128 *)p), "+a"(lo), "+d"(hi)
                         : "b"(c->gpr[RBX]), "c"(c->gpr[RCX]));
        equal = z;
        if (!equal) {
            c->gpr[RAX] = lo;
            c->gpr[RDX] = hi;
        }
    } else {
        uint64_t expected = (uint64_t)REG32(RDX) << 32 | REG32(RAX);
        uint64_t desired = (uint64_t)REG32(RCX) << 32 | REG32(RBX), old;
        old = compare_exchange(p, 8, expected, desired);
        equal = old == expected;
        if (!equal) {
            SET32(RAX, old);
            SET32(RDX, old >> 32);
        }
    }
    c->fl = (uint16_t)((c->fl & ~0x4000) | (equal ? 0x4000 : 0));
    if (lock) vrmw_end_locked(c);
    else vrmw_end(c);
    return ST_OK;
}
