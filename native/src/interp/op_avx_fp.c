/* AVX floating point, FMA, F16C: the handlers of isa_avx_fp.def, made from the rows, and VCVTPS2PH. */
#include "vex.h"

#define CVTSI2(name, mnem)                                                                        \
    SEM(name)                                                                                     \
    {                                                                                             \
        if (INSN_OSIZE(i) == 8)                                                                   \
            __asm__ volatile("vmovdqa %[h],%%xmm0\n\t" mnem "q %[rm],%%xmm0,%%xmm0\n\t" VSTORE(x)  \
                             : VDEST : VHREG(x), VSRC(Wq, x) : "xmm0");                           \
        else                                                                                      \
            __asm__ volatile("vmovdqa %[h],%%xmm0\n\t" mnem "l %[rm],%%xmm0,%%xmm0\n\t" VSTORE(x)  \
                             : VDEST : VHREG(x), VSRC(Wd, x) : "xmm0");                           \
    }
CVTSI2(vcvtsi2ss_x, "vcvtsi2ss")
CVTSI2(vcvtsi2sd_x, "vcvtsi2sd")

/* The checked handler of a row. */
#define HOW_Wl(L) VHOW(Wl, L, 0)
#define HOW_Wh(L) VHOW(Wh, L, 0)
#define HOW_Wd(L) VHOW(Wd, L, 0)
#define HOW_Wq(L) VHOW(Wq, L, 0)
#define HOW_Ey(L) (INSN_OSIZE(i) | SIMD_VEX)
#define HOW_W(w) ((w) == W1 ? SIMD_W : 0)
#define CHECK_XY(name, s, fp) V_K(name##_x, sem_##name##_x, s, HOW_##s(x) | (fp)) V_K(name##_y, sem_##name##_y, s, HOW_##s(y) | (fp))
#define CHECK_X0(name, s, fp) V_K(name##_x, sem_##name##_x, s, HOW_##s(x) | (fp))
#define CHECK_XS(name, s, fp) V_K(name##_x, sem_##name##_x, s, HOW_##s(x) | (fp))

#define OPERATION(name, cls, mnem, feat, rd, wr, un)
#define VEX(name, map, pp, opc, mod, w, k0, k1, k2, k3, at)
#define VSIMD_N(shape, lens, name, mnem, feat, wr, map, pp, opc, mod, w, s, at) GEN_##lens(shape, name, mnem, mod, s, at)
#define VSIMD_FP_N(shape, lens, name, mnem, feat, wr, map, pp, opc, mod, w, s, at)                \
    GEN_##lens(shape, name, mnem, mod, s, at) CHECK_##lens(name, s, SIMD_FP(map, pp, opc) | HOW_W(w))
#include "../isa/isa_avx_fp.def"

/* ---- VCVTPS2PH: a store that computes ---- */
SIMD_STUBS(vcvtps2ph_x, "vcvtps2ph", "%xmm0,%xmm0");
SIMD_STUBS(vcvtps2ph_y, "vcvtps2ph", "%ymm0,%xmm0");
static void to_halves(const uint8_t *from, bool wide, uint32_t imm, uint8_t out[16])
{
    if (wide)
        __asm__ volatile("vmovdqu %1,%%ymm0\n\t" CALL_STUB "vmovdqu %%xmm0,%0\n\tvzeroupper"
                         : "=m"(*(struct simd16 *)out) : "m"(*(const struct simd32 *)from), [stub] "r"(SIMD_STUB(vcvtps2ph_y, imm))
                         : "xmm0");
    else
        __asm__ volatile("vmovdqu %1,%%xmm0\n\t" CALL_STUB "vmovdqu %%xmm0,%0"
                         : "=m"(*(struct simd16 *)out) : "m"(*(const struct simd16 *)from), [stub] "r"(SIMD_STUB(vcvtps2ph_x, imm))
                         : "xmm0");
}

/* Runs masked and with clean flags; returns those that it raises. */
static uint32_t halves_flags(uint32_t mxcsr, const uint8_t *from, bool wide, uint32_t imm, uint8_t out[16])
{
    host_mxcsr_set((mxcsr & ~MXCSR_FLAGS) | MXCSR_MASKS);
    to_halves(from, wide, imm, out);
    return host_mxcsr_get() & MXCSR_FLAGS;
}

/* Has the number more significant bits than a half-precision one? */
static bool needs_rounding(uint32_t single)
{
    uint32_t m = (single & 0x7fffff) | (single & 0x7f800000 ? 0x800000 : 0);
    return m && 32 - __builtin_clz(m) - __builtin_ctz(m) > 11;
}

/*
 * With something unmasked: unmasked underflow is raised for exact tiny results too, and with overflow or
 * underflow unmasked the precision flag is that of a result without bounds of the exponent.
 */
static uint32_t halves_unmasked(uint32_t mxcsr, const uint8_t *from, uint32_t count, uint32_t imm)
{
    uint32_t all = 0, unmasked = mxcsr_unmasked(mxcsr);
    for (uint32_t n = 0; n < count; n++) {
        uint8_t one[16] = { 0 }, out[16];
        memcpy(one, from + 4 * n, 4);
        uint32_t flags = halves_flags(mxcsr, one, false, imm, out), half = ld16(out);
        if (unmasked & SIMD_UNDERFLOW && !(half & 0x7c00) && half & 0x3ff) flags |= SIMD_UNDERFLOW;
        if (flags & unmasked & (SIMD_OVERFLOW | SIMD_UNDERFLOW)) {
            flags &= ~SIMD_PRECISION;
            if (needs_rounding(ld32(one))) flags |= SIMD_PRECISION;
        }
        all |= flags;
    }
    return simd_reported(all, unmasked);
}

OPX(vcvtps2ph)
{
    UNUSED_OPARGS;
    uint8_t out[16];
    const uint8_t *from = c->fpu.vec[i->src];
    bool wide = INSN_VL(i);
    uint32_t mxcsr = mxcsr_read(c), unmasked = mxcsr_unmasked(mxcsr), size = wide ? 16 : 8;
    uint64_t la = 0;
    if (i->dst == INSN_MEM) { /* faults of the store come before those of the computation */
        int st = simd_address(c, i, insn_offset(c, i), size, ACC_W, 0, size - 1, &la);
        if (st == ST_OK) st = lwrite_check(c, la, size, LA_USER_RULES);
        if (st != ST_OK) return st;
    }
    uint32_t flags = halves_flags(mxcsr, from, wide, (uint32_t)i->imm, out);
    if (unmasked) {
        uint32_t exact = halves_unmasked(mxcsr, from, wide ? 8 : 4, (uint32_t)i->imm);
        if (exact & unmasked) {
            mxcsr_write(c, mxcsr | exact);
            return raise_vector(c, c->cr4 & CR4_OSXMMEXCPT ? EXC_XM : EXC_UD);
        }
    }
    host_mxcsr_set(mxcsr | flags | MXCSR_MASKS);
    if (i->dst == INSN_MEM) return lwrite(c, la, out, size, LA_USER_RULES);
    set128(c, i->dst, ld64(out), wide ? ld64(out + 8) : 0);
    return ST_OK;
}
