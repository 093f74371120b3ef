/* SSE state and what is left: FXSAVE, FXRSTOR, MXCSR, fences, hints, masked stores, CRC32, POPCNT. */
#include "../isa/sem_simd.h"
#include "../mmu/segment.h"
#include "simd.h"

/* ---- MXCSR ---- */
/* Rewritten masks choose other handlers for floating point: the block ends when that changes. */
int load_mxcsr(struct kvs_vcpu *c, uint32_t value)
{
    uint32_t mode = c->mode;
    mxcsr_write(c, value);
    return c->mode == mode ? ST_OK : ST_END;
}

static int ldmxcsr(struct kvs_vcpu *c, const struct kvs_insn *i)
{
    uint32_t v;
    int st = insn_read(c, i, &v, 4);
    if (st != ST_OK) return st;
    if (v & ~MXCSR_WRITABLE) return raise_gp(c, 0);
    return load_mxcsr(c, v);
}
OPX(ldmxcsr) { UNUSED_OPARGS; return ldmxcsr(c, i); }
OPX(vldmxcsr) { UNUSED_OPARGS; return ldmxcsr(c, i); }

static int stmxcsr(struct kvs_vcpu *c, const struct kvs_insn *i)
{
    uint32_t v = mxcsr_read(c);
    return insn_write(c, i, &v, 4);
}
OPX(stmxcsr) { UNUSED_OPARGS; return stmxcsr(c, i); }
OPX(vstmxcsr) { UNUSED_OPARGS; return stmxcsr(c, i); }

/* ---- FXSAVE and FXRSTOR. SDM 2A "FXSAVE", "FXRSTOR" ---- */
#define FX_BASE 160u /* header and ST registers */
/* The part of the area that is used: XMM8-15 only in 64-bit code, no XMM at all without CR4.OSFXSR. */
static uint32_t fx_size(const struct kvs_vcpu *c)
{
    return !(c->cr4 & CR4_OSFXSR) ? FX_BASE : is_code64(c) ? FX_BASE + 256 : FX_BASE + 128;
}

/* The alignment check covers doublewords only, as on silicon; beyond that misalignment is #GP(0). */
static int fx_address(struct kvs_vcpu *c, const struct kvs_insn *i, int access, uint64_t *la)
{
    return simd_address(c, i, insn_offset(c, i), 512, access, 15, 3, la);
}

void fx_put_x87(const struct kvs_vcpu *c, bool wide, uint8_t *area)
{
    const struct fpu *f = &c->fpu;
    st16(area, f->fcw);
    st16(area + 2, f->fsw);
    area[4] = f->tags;
    st16(area + 6, f->fop & 0x7ff);
    if (wide) {
        st64(area + 8, f->fip);
        st64(area + 16, f->fdp);
    } else {
        st32(area + 8, (uint32_t)f->fip);
        st16(area + 12, f->fcs);
        st32(area + 16, (uint32_t)f->fdp);
        st16(area + 20, f->fds);
    }
    uint32_t top = f->fsw >> 11 & 7;
    for (uint32_t k = 0; k < 8; k++) memcpy(area + 32 + 16 * k, f->r[(top + k) & 7], 10);
}

void fx_get_x87(struct kvs_vcpu *c, bool wide, const uint8_t *area)
{
    struct fpu *f = &c->fpu;
    f->fcw = (uint16_t)((ld16(area) & 0x1f3f) | 0x40);
    /* ES and B follow from the flags and their masks, whatever the image says. */
    uint16_t fsw = ld16(area + 2) & 0x7f7f;
    f->fsw = (uint16_t)(fsw & ~f->fcw & 0x3f ? fsw | 0x8080 : fsw);
    f->tags = area[4];
    f->fop = ld16(area + 6) & 0x7ff;
    if (wide) {
        f->fip = ld64(area + 8);
        f->fdp = ld64(area + 16);
        f->fcs = f->fds = 0;
    } else {
        f->fip = ld32(area + 8);
        f->fcs = ld16(area + 12);
        f->fdp = ld32(area + 16);
        f->fds = ld16(area + 20);
    }
    uint32_t top = f->fsw >> 11 & 7;
    for (uint32_t k = 0; k < 8; k++) memcpy(f->r[(top + k) & 7], area + 32 + 16 * k, 10);
}

OPX(fxsave)
{
    UNUSED_OPARGS;
    _Alignas(16) uint8_t area[512] = { 0 };
    uint64_t la;
    int st = fx_address(c, i, ACC_W, &la);
    if (st != ST_OK) return st;
    fx_put_x87(c, INSN_OSIZE(i) == 8, area);
    st32(area + 24, mxcsr_read(c));
    st32(area + 28, MXCSR_WRITABLE);
    for (uint32_t k = 0; k < 16; k++) memcpy(area + FX_BASE + 16 * k, c->fpu.vec[k], 16);
    /* All 512 bytes must be writable, though the tail is left alone; silicon looks at the end first. */
    st = lwrite_check(c, la + 511, 1, LA_USER_RULES);
    if (st == ST_OK) st = lwrite_check(c, la, 512, LA_USER_RULES);
    return st != ST_OK ? st : lwrite(c, la, area, fx_size(c), LA_USER_RULES);
}

OPX(fxrstor)
{
    UNUSED_OPARGS;
    _Alignas(16) uint8_t area[512];
    uint64_t la;
    int st = fx_address(c, i, ACC_R, &la);
    if (st != ST_OK) return st;
    uint32_t size = fx_size(c);
    /* All 512 bytes must be readable; silicon looks at the end first. */
    st = lread(c, la + 511, area + 511, 1, LA_USER_RULES);
    if (st == ST_OK) st = lread(c, la, area, size, LA_USER_RULES);
    if (st != ST_OK) return st;
    uint32_t mxcsr = ld32(area + 24);
    if (size > FX_BASE && (mxcsr & ~MXCSR_WRITABLE)) return raise_gp(c, 0);
    fx_get_x87(c, INSN_OSIZE(i) == 8, area);
    if (size == FX_BASE) return ST_OK;
    for (uint32_t k = 0; k < (size - FX_BASE) / 16; k++) memcpy(c->fpu.vec[k], area + FX_BASE + 16 * k, 16);
    return load_mxcsr(c, mxcsr);
}

/* ---- ordering and hints ---- */
/* Guest loads and stores are host loads and stores in the same order: only MFENCE has work to do. */
OP(lfence) { NEXT(); }
OP(sfence) { NEXT(); }
OP(mfence)
{
    __asm__ volatile("mfence" : : : "memory");
    NEXT();
}
OP(prefetchnta) { NEXT(); }
OP(prefetcht0) { NEXT(); }
OP(prefetcht1) { NEXT(); }
OP(prefetcht2) { NEXT(); }
OP(nop_hint) { NEXT(); }

/* ---- masked stores ---- */
/*
 * Bytes of data whose mask byte has bit 7 set go to seg:rDI. The whole operand is checked first, also
 * for an empty mask, which SDM 2B "MASKMOVDQU" leaves to the implementation.
 */
int masked_store(struct kvs_vcpu *c, const struct kvs_insn *i, const uint8_t *data, const uint8_t *mask, uint32_t size)
{
    uint64_t off = c->gpr[RDI], la, linear = is_code64(c) ? ~0ull : UINT32_MAX;
    if (INSN_ASIZE(i) != 8) off = INSN_ASIZE(i) == 4 ? (uint32_t)off : (uint16_t)off;
    int st = simd_address(c, i, off, size, ACC_W, 0, 7, &la);
    if (st == ST_OK) st = lwrite_check(c, la, size, LA_USER_RULES);
    uint32_t bits = 0;
    for (uint32_t k = 0; k < size; k++) bits |= (uint32_t)(mask[k] >> 7) << k;
    while (st == ST_OK && bits) {
        uint32_t from = (uint32_t)__builtin_ctz(bits);
        uint32_t run = (uint32_t)__builtin_ctz(~(bits >> from));
        st = lwrite(c, (la + from) & linear, data + from, run, LA_USER_RULES);
        bits &= ~(((1u << run) - 1) << from);
    }
    return st;
}

OPX(maskmovdqu)
{
    UNUSED_OPARGS;
    return masked_store(c, i, c->fpu.vec[i->dst], c->fpu.vec[i->src], 16);
}

OPX(vmaskmovdqu)
{
    UNUSED_OPARGS;
    return masked_store(c, i, c->fpu.vec[i->dst], c->fpu.vec[i->src], 16);
}

OPX(maskmovq)
{
    UNUSED_OPARGS;
    if (mmx_pending(c)) return raise_vector(c, EXC_MF);
    mmx_enter(c); /* silicon does not wait for the store */
    return masked_store(c, i, c->fpu.r[i->dst & 7], c->fpu.r[i->src & 7], 8);
}

/* ---- general registers ---- */
OPX(crc32b)
{
    UNUSED_OPARGS;
    uint64_t v;
    int st = rm_read(c, i, i->src, 1, &v);
    if (st != ST_OK) return st;
    uint32_t crc = REG32(i->dst);
    __asm__("crc32b %1,%0" : "+r"(crc) : "q"((uint8_t)v));
    SET32(i->dst, crc);
    return ST_OK;
}

OPX(crc32)
{
    UNUSED_OPARGS;
    uint64_t v, crc = REG32(i->dst);
    uint32_t size = INSN_OSIZE(i);
    int st = rm_read(c, i, i->src, size, &v);
    if (st != ST_OK) return st;
    switch (size) {
    case 2: __asm__("crc32w %w1,%k0" : "+r"(crc) : "r"(v)); break;
    case 4: __asm__("crc32l %k1,%k0" : "+r"(crc) : "r"(v)); break;
    default: __asm__("crc32q %1,%0" : "+r"(crc) : "r"(v)); break;
    }
    SET32(i->dst, crc);
    return ST_OK;
}

static ALWAYS_INLINE void popcnt_set(struct kvs_vcpu *c, const struct kvs_insn *i, uint64_t v)
{
    uint32_t size = INSN_OSIZE(i);
    uint32_t n = (uint32_t)__builtin_popcountll(v);
    if (size == 2) *(uint16_t *)&c->gpr[i->dst] = (uint16_t)n;
    else SET32(i->dst, n);
    flags_set_status(c, v ? 0 : FLAG_ZF);
}

static NOINLINE int popcnt_mem(struct kvs_vcpu *c, const struct kvs_insn *i)
{
    uint64_t v = 0;
    int st = insn_read(c, i, &v, INSN_OSIZE(i));
    if (st == ST_OK) popcnt_set(c, i, v);
    return st;
}
static NOINLINE int op_popcnt_slow(OPARGS)
{
    int st = popcnt_mem(c, i);
    if (UNLIKELY(st != ST_OK)) return leave(c, i, budget, st);
    NEXT();
}
OP(popcnt)
{
    if (i->src == INSN_MEM) return op_popcnt_slow(c, i, budget);
    uint32_t size = INSN_OSIZE(i);
    uint64_t v = c->gpr[i->src];
    popcnt_set(c, i, size == 2 ? (uint16_t)v : size == 4 ? (uint32_t)v : v);
    NEXT();
}
