/* SSE to SSE4.2: the handlers of every two-form row of isa_sse.def, made from the rows, and its stores. */
#include "../isa/sem_sse.h"
#include "simd.h"

#define SHAPE_WRAP_BIN SIMD_WRAP
#define SHAPE_WRAP_BINU SIMD_WRAP
#define SHAPE_WRAP_MOVE SIMD_WRAP
#define SHAPE_WRAP_IMM SIMD_WRAP
#define SHAPE_WRAP_BLENDV SIMD_WRAP
#define SHAPE_WRAP_BLENDVU SIMD_WRAP
#define SHAPE_WRAP_FLAGS SIMD_WRAP
#define SHAPE_WRAP_TOGPR SIMD_WRAP
#define SHAPE_WRAP_OWN SIMD_WRAP
#define SHAPE_WRAP_SPLIT SIMD_WRAP_SPLIT
#define SIMD_WRAP(name, k1, at) SIMD_R(name##_r, sem_##name, k1) M_##k1(name##_m, sem_##name, k1, at)
#define SIMD_WRAP_SPLIT(name, k1, at) SIMD_R(name##_r, sem_##name##_r, k1) M_##k1(name##_m, sem_##name##_m, k1, at)
#define M_Wx SIMD_M
#define M_Wq SIMD_M
#define M_Wd SIMD_M
#define M_Ww SIMD_M
#define M_RdMb SIMD_M
#define M_RdMw SIMD_M
#define M_Ey(name, sem, k1, at) SIMD_M_EY(name, sem, at, SIMD_M)

#define SIMD_ROW(shape, name, mnem, feat, wr, map, pp, opc, k0, k1, k2, at)                       \
    SHAPE_##shape(name, mnem, k1) SHAPE_WRAP_##shape(name, k1, at)
#define SIMD_FP_ROW(shape, name, mnem, feat, wr, map, pp, opc, k0, k1, k2, at)                    \
    SIMD_ROW(shape, name, mnem, feat, wr, map, pp, opc, k0, k1, k2, at)                           \
    SIMD_K(name##_k, sem_##name, k1, SIMD_HOW(k1, at) | SIMD_FP(map, pp, opc))
#define OPERATION(name, cls, mnem, feat, rd, wr, un)
#define ENC(name, map, pp, opc, mod, k0, k1, k2, at)
#define GRP(name, grp, pp, ext, mod, k0, k1, k2, at)
#include "../isa/isa_sse.def"
#define SIMD_ROW(shape, name, mnem, feat, wr, map, pp, opc, k0, k1, k2, at)                       \
    SHAPE_##shape(name, mnem, k1) SHAPE_WRAP_##shape(name, k1, at)
#define VEX(name, map, pp, opc, mod, w, k0, k1, k2, k3, at)
#include "../isa/isa_crypto.def"
#undef OPERATION
#undef ENC
#undef GRP
#undef VEX

/* ---- stores: memory forms ---- */
#define XSRC (c->fpu.vec[i->src])
SIMD_ST(movups_st_m, XSRC, Wx, 0)
SIMD_ST(movupd_st_m, XSRC, Wx, 0)
SIMD_ST(movdqu_st_m, XSRC, Wx, 0)
SIMD_ST(movaps_st_m, XSRC, Wx, A_ALIGN)
SIMD_ST(movapd_st_m, XSRC, Wx, A_ALIGN)
SIMD_ST(movdqa_st_m, XSRC, Wx, A_ALIGN)
SIMD_ST(movss_st_m, XSRC, Wd, 0)
SIMD_ST(movsd_x_st_m, XSRC, Wq, 0)
SIMD_ST(movq_st_m, XSRC, Wq, 0)
SIMD_ST(pextrb_m, XSRC + (i->imm & 15), RdMb, 0)
SIMD_ST(pextrw_st_m, XSRC + (i->imm & 7) * 2, RdMw, 0)
SIMD_ST(extractps_m, XSRC + (i->imm & 3) * 4, Ed, 0)
/* Memory destination only. Non-temporal hints have no effect on guest RAM. */
SIMD_ST(movlps_st, XSRC, Mq, 0)
SIMD_ST(movlpd_st, XSRC, Mq, 0)
SIMD_ST(movhps_st, XSRC + 8, Mq, 0)
SIMD_ST(movhpd_st, XSRC + 8, Mq, 0)
SIMD_ST(movntps, XSRC, Mdq, A_ALIGN)
SIMD_ST(movntpd, XSRC, Mdq, A_ALIGN)
SIMD_ST(movntdq, XSRC, Mdq, A_ALIGN)

static SIMD_ST(movd_st_m4, XSRC, Ed, 0)
static SIMD_ST(movd_st_m8, XSRC, Mq, 0)
OP(movd_st_m) { return INSN_OSIZE(i) == 8 ? op_movd_st_m8(c, i, budget) : op_movd_st_m4(c, i, budget); }
static SIMD_ST(pextrd_m4, XSRC + (i->imm & 3) * 4, Ed, 0)
static SIMD_ST(pextrd_m8, XSRC + (i->imm & 1) * 8, Mq, 0)
OP(pextrd_m) { return INSN_OSIZE(i) == 8 ? op_pextrd_m8(c, i, budget) : op_pextrd_m4(c, i, budget); }
static SIMD_ST(movnti4, &c->gpr[i->src], Ed, 0)
static SIMD_ST(movnti8, &c->gpr[i->src], Mq, 0)
OP(movnti) { return INSN_OSIZE(i) == 8 ? op_movnti8(c, i, budget) : op_movnti4(c, i, budget); }

/* ---- stores: register forms ---- */
SIMD_R(movups_st_r, sem_movups, Wx)
SIMD_R(movupd_st_r, sem_movups, Wx)
SIMD_R(movdqu_st_r, sem_movups, Wx)
SIMD_R(movaps_st_r, sem_movups, Wx)
SIMD_R(movapd_st_r, sem_movups, Wx)
SIMD_R(movdqa_st_r, sem_movups, Wx)
SIMD_R(movss_st_r, sem_movss_r, Wx)
SIMD_R(movsd_x_st_r, sem_movsd_x_r, Wx)
SIMD_R(movq_st_r, sem_movq, Wq)
#define TO_GPR(name, value)                                                                       \
    OP(name)                                                                                      \
    {                                                                                             \
        c->gpr[i->dst] = (value);                                                                 \
        NEXT();                                                                                   \
    }
TO_GPR(movd_st_r, INSN_OSIZE(i) == 8 ? ld64(XSRC) : ld32(XSRC))
TO_GPR(pextrb_r, XSRC[i->imm & 15])
TO_GPR(pextrw_st_r, ld16(XSRC + (i->imm & 7) * 2))
TO_GPR(pextrw, ld16(XSRC + (i->imm & 7) * 2))
TO_GPR(pextrd_r, INSN_OSIZE(i) == 8 ? ld64(XSRC + (i->imm & 1) * 8) : ld32(XSRC + (i->imm & 3) * 4))
TO_GPR(extractps_r, ld32(XSRC + (i->imm & 3) * 4))

/* ---- one form only ---- */
SHAPE_BIN(movlps, "movlps", Wq)
SHAPE_BIN(movhps, "movhps", Wq)
SIMD_M(movlps, sem_movlps, Wq, 0)
SIMD_M(movlpd, sem_movlps, Wq, 0)
SIMD_M(movhps, sem_movhps, Wq, 0)
SIMD_M(movhpd, sem_movhps, Wq, 0)
SIMD_M(lddqu, sem_movups, Wx, 0)
SIMD_M(movntdqa, sem_movups, Wx, A_ALIGN)
/* High half of the source to the low half of the destination, and the other way round. */
OP(movhlps)
{
    sem_movlps(c, i, XSRC + 8);
    NEXT();
}
OP(movlhps)
{
    sem_movhps(c, i, XSRC);
    NEXT();
}
#define MASK_TO_GPR(name)                                                                         \
    OP(name)                                                                                      \
    {                                                                                             \
        uint64_t v;                                                                               \
        __asm__ volatile("movaps %1,%%xmm0\n\t" #name " %%xmm0,%k0" : "=r"(v) : "m"(XMM(i->src)) : "xmm0"); \
        c->gpr[i->dst] = v;                                                                       \
        NEXT();                                                                                   \
    }
MASK_TO_GPR(movmskps)
MASK_TO_GPR(movmskpd)
MASK_TO_GPR(pmovmskb)

/* A shift by an immediate is a shift by a count with that value: both shift everything out alike. */
#define SHIFT_I(name, mnem)                                                                       \
    OP(name)                                                                                      \
    {                                                                                             \
        __asm__ volatile("movaps %0,%%xmm0\n\tmovd %1,%%xmm1\n\t" mnem " %%xmm1,%%xmm0\n\tmovaps %%xmm0,%0" \
                         : "+m"(XMM(i->dst)) : "r"((uint32_t)i->imm & 0xff) : "xmm0", "xmm1");    \
        NEXT();                                                                                   \
    }
SHIFT_I(psrlw_i, "psrlw")
SHIFT_I(psraw_i, "psraw")
SHIFT_I(psllw_i, "psllw")
SHIFT_I(psrld_i, "psrld")
SHIFT_I(psrad_i, "psrad")
SHIFT_I(pslld_i, "pslld")
SHIFT_I(psrlq_i, "psrlq")
SHIFT_I(psllq_i, "psllq")
#define SHIFT_BYTES(name)                                                                         \
    SIMD_STUBS(name, #name, "%xmm0");                                                             \
    OP(name)                                                                                      \
    {                                                                                             \
        __asm__ volatile("movaps %0,%%xmm0\n\t" CALL_STUB "movaps %%xmm0,%0"                      \
                         : "+m"(XMM(i->dst)) : [stub] "r"(SIMD_STUB(name, i->imm)) : "xmm0");     \
        NEXT();                                                                                   \
    }
SHIFT_BYTES(psrldq)
SHIFT_BYTES(pslldq)
