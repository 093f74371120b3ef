/* MMX: handlers of every row of isa_mmx.def. */
#include "../isa/sem_mmx.h"
#include "simd.h"

/* A pending x87 exception comes first; then the operand; then the x87 state changes with the result. */
#define MMX_R(name, sem, k1)                                                                      \
    OP(name)                                                                                      \
    {                                                                                             \
        if (mmx_pending(c)) return op_mf(c, i, budget);                                           \
        sem(c, i, REG_##k1);                                                                      \
        mmx_enter(c);                                                                             \
        NEXT();                                                                                   \
    }
#define MMX_M(name, sem, k1, at)                                                                  \
    OP(name)                                                                                      \
    {                                                                                             \
        if (mmx_pending(c)) return op_mf(c, i, budget);                                           \
        const uint8_t *p = insn_probe(c, i, TLB_R, SIZE_##k1);                                    \
        if (UNLIKELY(!p || SIMD_MISALIGNED(p, at)))                                               \
            return simd_load_slow(c, i, budget, sem, SIMD_HOW(k1, at) | SIMD_MMX);                \
        sem(c, i, p);                                                                             \
        mmx_enter(c);                                                                             \
        NEXT();                                                                                   \
    }
#define MMX_ST(name, from, k0)                                                                    \
    OP(name)                                                                                      \
    {                                                                                             \
        const void *from_ = (from);                                                               \
        if (mmx_pending(c)) return op_mf(c, i, budget);                                           \
        uint8_t *p = insn_probe(c, i, TLB_W, SIZE_##k0);                                          \
        if (UNLIKELY(!p)) return simd_store_slow(c, i, budget, from_, SIZE_##k0 | SIMD_MMX);      \
        __builtin_memcpy(p, from_, SIZE_##k0);                                                    \
        mmx_enter(c);                                                                             \
        NEXT();                                                                                   \
    }

#define M_Qq MMX_M
#define M_Qd MMX_M
#define M_Wx MMX_M
#define M_Wq MMX_M
#define M_RdMw MMX_M
#define M_Ey(name, sem, k1, at) SIMD_M_EY(name, sem, at, MMX_M)

#define WRAP_BIN MMX_WRAP
#define WRAP_PAIR MMX_WRAP
#define WRAP_OWN MMX_WRAP
#define MMX_WRAP(name, k1, at) MMX_R(name##_r, sem_##name, k1) M_##k1(name##_m, sem_##name, k1, at)
#define K_OWN(name, k1, at) SIMD_K(name##_k, sem_##name, k1, SIMD_HOW(k1, at) | SIMD_MMX)
/* Conversions to XMM touch the x87 state only when the source is an MMX register. */
#define WRAP_TOXMM(name, k1, at) MMX_R(name##_r, sem_##name, k1) SIMD_M(name##_m, sem_##name, k1, at)
#define K_TOXMM(name, k1, at)                                                                     \
    SIMD_K(name##_k, sem_##name, k1, SIMD_HOW(k1, at) | (i->src == INSN_MEM ? 0 : SIMD_MMX))

#define MMX_ROW(shape, name, mnem, feat, map, pp, opc, k0, k1, k2, at)                            \
    MMX_SHAPE_##shape(name, mnem, k1) WRAP_##shape(name, k1, at)
#define MMX_FP_ROW(shape, name, mnem, feat, map, pp, opc, k0, k1, k2, at)                         \
    MMX_ROW(shape, name, mnem, feat, map, pp, opc, k0, k1, k2, at)                                \
    K_##shape(name, k1, at)
#define OPERATION(name, cls, mnem, feat, rd, wr, un)
#define ENC(name, map, pp, opc, mod, k0, k1, k2, at)
#define GRP(name, grp, pp, ext, mod, k0, k1, k2, at)
#include "../isa/isa_mmx.def"
#undef OPERATION
#undef ENC
#undef GRP

/* ---- stores ---- */
#define MSRC (c->fpu.r[i->src & 7])
MMX_ST(movq_mm_st_m, MSRC, Qq)
MMX_ST(movntq, MSRC, Qq)
static MMX_ST(movd_mm_st_m4, MSRC, Qd)
static MMX_ST(movd_mm_st_m8, MSRC, Qq)
OP(movd_mm_st_m)
{
    return INSN_OSIZE(i) == 8 ? op_movd_mm_st_m8(c, i, budget) : op_movd_mm_st_m4(c, i, budget);
}
MMX_R(movq_mm_st_r, sem_movq_mm, Qq)

/* ---- register operands only ---- */
#define MMX_OP(name, code)                                                                        \
    OP(name)                                                                                      \
    {                                                                                             \
        if (mmx_pending(c)) return op_mf(c, i, budget);                                           \
        code;                                                                                     \
        mmx_enter(c);                                                                             \
        NEXT();                                                                                   \
    }
MMX_OP(movd_mm_st_r, c->gpr[i->dst] = INSN_OSIZE(i) == 8 ? ld64(MSRC) : ld32(MSRC))
MMX_OP(pextrw_mm, c->gpr[i->dst] = ld16(MSRC + (i->imm & 3) * 2))
MMX_OP(pmovmskb_mm, __asm__ volatile("movq %1,%%xmm0\n\tpmovmskb %%xmm0,%k0"
                                     : "=r"(c->gpr[i->dst]) : "m"(MMX(i->src)) : "xmm0"))
MMX_OP(movq2dq, __asm__ volatile("movq %1,%%xmm0\n\tmovaps %%xmm0,%0"
                                 : "=m"(XMM(i->dst)) : "m"(MMX(i->src)) : "xmm0"))
MMX_OP(movdq2q, st64(c->fpu.r[i->dst & 7], ld64(c->fpu.vec[i->src])); mmx_exponent(c, i->dst))
#define MMX_SHIFT_I(name, mnem)                                                                   \
    MMX_OP(name, __asm__ volatile("movq %0,%%xmm0\n\tmovd %1,%%xmm1\n\t" mnem " %%xmm1,%%xmm0\n\tmovq %%xmm0,%0" \
                                  : "+m"(MMX(i->dst)) : "r"((uint32_t)i->imm & 0xff) : "xmm0", "xmm1"); \
           mmx_exponent(c, i->dst))
MMX_SHIFT_I(psrlw_mm_i, "psrlw")
MMX_SHIFT_I(psraw_mm_i, "psraw")
MMX_SHIFT_I(psllw_mm_i, "psllw")
MMX_SHIFT_I(psrld_mm_i, "psrld")
MMX_SHIFT_I(psrad_mm_i, "psrad")
MMX_SHIFT_I(pslld_mm_i, "pslld")
MMX_SHIFT_I(psrlq_mm_i, "psrlq")
MMX_SHIFT_I(psllq_mm_i, "psllq")

/* SDM 3A "Effect of MMX Instructions on MMX, x87 FPU and SSE State": EMMS clears TOP as well. */
OP(emms)
{
    if (mmx_pending(c)) return op_mf(c, i, budget);
    mmx_enter(c);
    c->fpu.tags = 0;
    NEXT();
}
