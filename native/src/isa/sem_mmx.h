/* Semantics of MMX instructions and of conversions between MMX and XMM registers. Included once: it
 * holds stubs. */
#ifndef KVS_SEM_MMX_H
#define KVS_SEM_MMX_H

#include "sem_simd.h"

#define MMX_SHAPE(name, k1, code)                                                                 \
    SEM(name)                                                                                     \
    {                                                                                             \
        __asm__ volatile("movq %0,%%xmm0\n\t" LOAD_##k1 " %1,%%xmm1\n\t" code "\n\tmovq %%xmm0,%0" \
                         : "+m"(MMX(i->dst)) : "m"(SRC(TYPE_##k1)) : "xmm0", "xmm1");             \
        mmx_exponent(c, i->dst);                                                                  \
    }
#define MMX_SHAPE_STUB(name, k1)                                                                  \
    SEM(name)                                                                                     \
    {                                                                                             \
        __asm__ volatile(LOAD_##k1 " %1,%%xmm1\n\t" CALL_STUB "movq %%xmm0,%0"                    \
                         : "=m"(MMX(i->dst)) : "m"(SRC(TYPE_##k1)), [stub] "r"(SIMD_STUB(name, i->imm)) \
                         : "xmm0", "xmm1");                                                       \
        mmx_exponent(c, i->dst);                                                                  \
    }
#define MMX_SHAPE_BIN(name, mnem, k1) MMX_SHAPE(name, k1, mnem " %%xmm1,%%xmm0")
#define MMX_SHAPE_PAIR(name, mnem, k1) MMX_SHAPE(name, k1, "punpcklqdq %%xmm1,%%xmm0\n\t" mnem " %%xmm0,%%xmm0")
#define MMX_SHAPE_OWN(name, mnem, k1)
#define MMX_SHAPE_TOXMM(name, mnem, k1)

MMX_SHAPE(punpckhbw_mm, Qq, "punpcklbw %%xmm1,%%xmm0\n\tpsrldq $8,%%xmm0")
MMX_SHAPE(punpckhwd_mm, Qq, "punpcklwd %%xmm1,%%xmm0\n\tpsrldq $8,%%xmm0")
MMX_SHAPE(punpckhdq_mm, Qq, "punpckldq %%xmm1,%%xmm0\n\tpsrldq $8,%%xmm0")
MMX_SHAPE(movq_mm, Qq, "movaps %%xmm1,%%xmm0")
/* Conversions from XMM: the two values, with zeros above them, which convert without an exception. */
#define TYPE_LOW struct simd8
#define LOAD_LOW "movq"
#define TYPE_BOTH struct simd16
#define LOAD_BOTH "movaps"
MMX_SHAPE(cvttps2pi, LOW, "cvttps2dq %%xmm1,%%xmm0")
MMX_SHAPE(cvtps2pi, LOW, "cvtps2dq %%xmm1,%%xmm0")
MMX_SHAPE(cvttpd2pi, BOTH, "cvttpd2dq %%xmm1,%%xmm0")
MMX_SHAPE(cvtpd2pi, BOTH, "cvtpd2dq %%xmm1,%%xmm0")
SEM(cvtpi2ps)
{
    __asm__ volatile("movaps %0,%%xmm0\n\tmovq %1,%%xmm1\n\tcvtdq2ps %%xmm1,%%xmm1\n\t"
                     "movsd %%xmm1,%%xmm0\n\tmovaps %%xmm0,%0"
                     : "+m"(XMM(i->dst)) : "m"(SRC(struct simd8)) : "xmm0", "xmm1");
}
SEM(cvtpi2pd)
{
    __asm__ volatile("movq %1,%%xmm0\n\tcvtdq2pd %%xmm0,%%xmm0\n\tmovaps %%xmm0,%0"
                     : "=m"(XMM(i->dst)) : "m"(SRC(struct simd8)) : "xmm0");
}
SEM(movd_mm)
{
    st64(c->fpu.r[i->dst & 7], INSN_OSIZE(i) == 8 ? ld64(src) : ld32(src));
    mmx_exponent(c, i->dst);
}
SEM(pinsrw_mm)
{
    st16(c->fpu.r[i->dst & 7] + (i->imm & 3) * 2, ld16(src));
    mmx_exponent(c, i->dst);
}
SEM(palignr_mm)
{
    uint32_t shift = (i->imm & 0xff) * 8;
    uint64_t low = ld64(src), high = ld64(c->fpu.r[i->dst & 7]), v = 0;
    if (shift == 0) v = low;
    else if (shift < 64) v = low >> shift | high << (64 - shift);
    else if (shift < 128) v = high >> (shift - 64);
    st64(c->fpu.r[i->dst & 7], v);
    mmx_exponent(c, i->dst);
}
SIMD_STUBS(pshufw, "pshuflw", "%xmm1,%xmm0");
MMX_SHAPE_STUB(pshufw, Qq)
SEM(pshufb_mm)
{
    uint64_t mask = ld64(src) & 0x8787878787878787u; /* the index has three bits here */
    __asm__ volatile("movq %0,%%xmm0\n\tmovq %1,%%xmm1\n\tpshufb %%xmm1,%%xmm0\n\tmovq %%xmm0,%0"
                     : "+m"(MMX(i->dst)) : "r"(mask) : "xmm0", "xmm1");
    mmx_exponent(c, i->dst);
}

#endif
