/*
 * XSAVE, XSAVEOPT, XSAVEC, XSAVES, XRSTOR, XRSTORS, XGETBV, XSETBV.
 * SDM 1 "Managing State Using the XSAVE Feature Set"
 *
 * Components: x87 (0), SSE (1), AVX (2), PKRU (9). AVX is in the same place in the standard and the
 * compacted format. No supervisor component exists: XSS is 0.
 */
#include "../sys/xstate.h"
#include "simd.h"

#define HEADER XSTATE_HEADER
#define XMM_AT XSTATE_XMM
#define YMM_AT XSTATE_YMM
enum form { PLAIN, OPT, COMPACT };

static bool all_zero(const uint8_t *p, uint32_t size)
{
    uint64_t any = 0;
    for (uint32_t k = 0; k < size; k += 8) any |= ld64(p + k);
    return !any;
}

/* Components that are not in their initial configuration, found by looking. */
static uint64_t xinuse(const struct kvs_vcpu *c)
{
    const struct fpu *f = &c->fpu;
    uint64_t in_use = 0;
    bool x87 = f->fcw != 0x37f || f->fsw || f->tags || f->fop || f->fip || f->fdp || f->fcs || f->fds;
    for (uint32_t k = 0; k < 8; k++) x87 |= ld64(f->r[k]) || ld16(f->r[k] + 8);
    if (x87) in_use |= XSTATE_X87;
    for (uint32_t k = 0; k < 16; k++) {
        if (!all_zero(f->vec[k], 16)) in_use |= XSTATE_SSE;
        if (!all_zero(f->vec[k] + 16, 16)) in_use |= XSTATE_AVX;
    }
    if (c->pkru) in_use |= XSTATE_PKRU;
    return in_use;
}

static int unavailable(struct kvs_vcpu *c)
{
    if (!(c->cr4 & CR4_OSXSAVE)) return raise_ud(c);
    if (c->cr0 & CR0_TS) return raise_vector(c, EXC_NM);
    return ST_OK;
}

static uint64_t requested(const struct kvs_vcpu *c) { return c->xcr0 & (REG32(RAX) | (uint64_t)REG32(RDX) << 32); }
static uint32_t vector_count(const struct kvs_vcpu *c) { return is_code64(c) ? 16 : 8; }

static int area_address(struct kvs_vcpu *c, const struct kvs_insn *i, uint32_t size, int access, uint64_t *la)
{
    return simd_address(c, i, insn_offset(c, i), size, access, 63, 0, la);
}

static int save(struct kvs_vcpu *c, const struct kvs_insn *i, enum form form)
{
    _Alignas(64) uint8_t area[YMM_AT + 256] = { 0 };
    int st = unavailable(c);
    if (st != ST_OK) return st;
    uint64_t rfbm = requested(c), in_use = xinuse(c), written = rfbm, la;
    uint32_t n = vector_count(c), mxcsr = mxcsr_read(c), size = xstate_size(rfbm, form == COMPACT);
    if ((st = area_address(c, i, size, ACC_W, &la)) != ST_OK) return st;
    if (form == COMPACT && mxcsr != 0x1f80) in_use |= XSTATE_SSE;
    if (form != PLAIN) written &= in_use;
    if ((st = lwrite_check(c, la, size, LA_USER_RULES)) != ST_OK) return st;

    uint64_t bv = 0;
    if (form != COMPACT && (st = lread(c, la + HEADER, &bv, 8, LA_USER_RULES)) != ST_OK) return st;
    fx_put_x87(c, INSN_OSIZE(i) == 8, area);
    st32(area + 24, mxcsr);
    st32(area + 28, MXCSR_WRITABLE);
    for (uint32_t k = 0; k < 16; k++) {
        memcpy(area + XMM_AT + 16 * k, c->fpu.vec[k], 16);
        memcpy(area + YMM_AT + 16 * k, c->fpu.vec[k] + 16, 16);
    }
    st64(area + HEADER, (bv & ~rfbm) | (in_use & rfbm));
    st64(area + HEADER + 8, XCOMP_COMPACT | rfbm);

    /* MXCSR belongs to SSE in the compacted format, to SSE and AVX in the standard one. */
    bool with_mxcsr = form == COMPACT ? written & XSTATE_SSE : rfbm & (XSTATE_SSE | XSTATE_AVX);
    const struct { bool wanted; uint32_t from, size; } pieces[] = {
        { written & XSTATE_X87, 0, 24 }, { with_mxcsr, 24, 8 }, { written & XSTATE_X87, 32, 128 },
        { written & XSTATE_SSE, XMM_AT, 16 * n }, { true, HEADER, form == COMPACT ? 16 : 8 },
        { written & XSTATE_AVX, YMM_AT, 16 * n },
    };
    for (uint32_t k = 0; st == ST_OK && k < ARRAY_SIZE(pieces); k++)
        if (pieces[k].wanted) st = lwrite(c, la + pieces[k].from, area + pieces[k].from, pieces[k].size, LA_USER_RULES);
    if (st == ST_OK && (written & XSTATE_PKRU)) {
        const uint64_t pkru = c->pkru;
        st = lwrite(c, la + (form == COMPACT ? xstate_pkru_compacted(rfbm) : XSTATE_PKRU_AT), &pkru, 8, LA_USER_RULES);
    }
    return st;
}

OPX(xsave) { UNUSED_OPARGS; return save(c, i, PLAIN); }
OPX(xsaveopt) { UNUSED_OPARGS; return save(c, i, OPT); }
OPX(xsavec) { UNUSED_OPARGS; return save(c, i, COMPACT); }
OPX(xsaves)
{
    UNUSED_OPARGS;
    if (!(c->cr4 & CR4_OSXSAVE)) return raise_ud(c);
    if (c->cpl != 0) return raise_gp(c, 0);
    return save(c, i, COMPACT);
}

/* SDM 1 "Operation of XRSTOR": what a header may say. */
static bool header_legal(const struct kvs_vcpu *c, const uint8_t *header, bool supervisor)
{
    uint64_t bv = ld64(header), comp = ld64(header + 8);
    if (!(comp & XCOMP_COMPACT)) return !supervisor && !comp && !ld64(header + 16) && !(bv & ~c->xcr0);
    comp &= ~XCOMP_COMPACT;
    return !(comp & ~c->xcr0) && !(bv & ~comp) && all_zero(header + 16, 48) &&
           (supervisor || has_feature(c, FEAT_XSAVEC));
}

static void load_vectors(struct kvs_vcpu *c, const uint8_t *from, uint32_t at, uint32_t n)
{
    for (uint32_t k = 0; k < n; k++) {
        if (from) memcpy(c->fpu.vec[k] + at, from + 16 * k, 16);
        else memset(c->fpu.vec[k] + at, 0, 16);
    }
}

static int restore(struct kvs_vcpu *c, const struct kvs_insn *i, bool supervisor)
{
    _Alignas(64) uint8_t area[YMM_AT + 256] = { 0 };
    int st = unavailable(c);
    if (st != ST_OK) return st;
    uint64_t rfbm = requested(c), la, pkru = 0;
    uint32_t n = vector_count(c);
    if ((st = area_address(c, i, xstate_size(rfbm & ~XSTATE_PKRU, false), ACC_R, &la)) != ST_OK) return st;
    if ((st = lread(c, la + HEADER, area + HEADER, 64, LA_USER_RULES)) != ST_OK) return st;
    if (!header_legal(c, area + HEADER, supervisor)) return raise_gp(c, 0);
    bool compact = ld64(area + HEADER + 8) & XCOMP_COMPACT;
    uint64_t load = rfbm & ld64(area + HEADER), clear = rfbm & ~load;
    bool with_mxcsr = compact ? load & XSTATE_SSE : rfbm & (XSTATE_SSE | XSTATE_AVX);
    const struct { bool wanted; uint32_t from, size; } pieces[] = {
        { load & XSTATE_X87, 0, 24 }, { with_mxcsr, 24, 8 }, { load & XSTATE_X87, 32, 128 },
        { load & XSTATE_SSE, XMM_AT, 16 * n }, { load & XSTATE_AVX, YMM_AT, 16 * n },
    };
    for (uint32_t k = 0; k < ARRAY_SIZE(pieces); k++) {
        if (!pieces[k].wanted) continue;
        st = lread(c, la + pieces[k].from, area + pieces[k].from, pieces[k].size, LA_USER_RULES);
        if (st != ST_OK) return st;
    }
    if (load & XSTATE_PKRU) {
        uint32_t at = compact ? xstate_pkru_compacted(ld64(area + HEADER + 8)) : XSTATE_PKRU_AT;
        if ((st = lread(c, la + at, &pkru, 8, LA_USER_RULES)) != ST_OK) return st;
    }
    uint32_t mxcsr = ld32(area + 24);
    if (with_mxcsr && (mxcsr & ~MXCSR_WRITABLE)) return raise_gp(c, 0);

    if (clear & XSTATE_X87) st16(area, 0x37f); /* all else is 0 then */
    if (rfbm & XSTATE_X87) fx_get_x87(c, INSN_OSIZE(i) == 8, area);
    if (rfbm & XSTATE_SSE) load_vectors(c, load & XSTATE_SSE ? area + XMM_AT : NULL, 0, n);
    if (rfbm & XSTATE_AVX) load_vectors(c, load & XSTATE_AVX ? area + YMM_AT : NULL, 16, n);
    if (rfbm & XSTATE_PKRU) pkru_write(c, (uint32_t)pkru);
    if (compact && (clear & XSTATE_SSE)) return load_mxcsr(c, 0x1f80);
    return with_mxcsr ? load_mxcsr(c, mxcsr) : ST_OK;
}

OPX(xrstor) { UNUSED_OPARGS; return restore(c, i, false); }
OPX(xrstors)
{
    UNUSED_OPARGS;
    if (!(c->cr4 & CR4_OSXSAVE)) return raise_ud(c);
    if (c->cpl != 0) return raise_gp(c, 0);
    return restore(c, i, true);
}

OPX(xgetbv)
{
    UNUSED_OPARGS;
    if (!(c->cr4 & CR4_OSXSAVE)) return raise_ud(c);
    uint32_t n = REG32(RCX);
    if (n > 1 || (n == 1 && !has_feature(c, FEAT_XGETBV1))) return raise_gp(c, 0);
    uint64_t v = n ? c->xcr0 & xinuse(c) : c->xcr0;
    SET32(RAX, v);
    SET32(RDX, v >> 32);
    return ST_OK;
}

OPX(xsetbv)
{
    UNUSED_OPARGS;
    uint64_t v = REG32(RAX) | (uint64_t)REG32(RDX) << 32;
    if (!(c->cr4 & CR4_OSXSAVE)) return raise_ud(c);
    if (c->cpl != 0 || REG32(RCX) != 0 || !xcr0_legal(c, v)) return raise_gp(c, 0);
    c->xcr0 = v;
    vcpu_update_mode(c);
    return ST_END;
}
