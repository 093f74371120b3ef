/* Semantics of XMM instructions that no shape of sem_simd.h describes. Included once: it holds stubs. */
#ifndef KVS_SEM_SSE_H
#define KVS_SEM_SSE_H

#include "sem_simd.h"

/* ---- XMM, by hand ---- */
SEM(movss_r)
{
    __asm__ volatile("movaps %0,%%xmm0\n\tmovaps %1,%%xmm1\n\tmovss %%xmm1,%%xmm0\n\tmovaps %%xmm0,%0"
                     : "+m"(XMM(i->dst)) : "m"(SRC(struct simd16)) : "xmm0", "xmm1");
}
SEM(movss_m)
{
    __asm__ volatile("movss %1,%%xmm0\n\tmovaps %%xmm0,%0"
                     : "=m"(XMM(i->dst)) : "m"(SRC(struct simd4)) : "xmm0");
}
SEM(movsd_x_r)
{
    __asm__ volatile("movaps %0,%%xmm0\n\tmovaps %1,%%xmm1\n\tmovsd %%xmm1,%%xmm0\n\tmovaps %%xmm0,%0"
                     : "+m"(XMM(i->dst)) : "m"(SRC(struct simd16)) : "xmm0", "xmm1");
}
SEM(movq)
{
    __asm__ volatile("movq %1,%%xmm0\n\tmovaps %%xmm0,%0"
                     : "=m"(XMM(i->dst)) : "m"(SRC(struct simd8)) : "xmm0");
}
SEM(movsd_x_m) { sem_movq(c, i, src); }
SEM(movd)
{
    if (INSN_OSIZE(i) == 8) sem_movq(c, i, src);
    else sem_movss_m(c, i, src);
}
SEM(cvtsi2ss)
{
    if (INSN_OSIZE(i) == 8)
        __asm__ volatile("movaps %0,%%xmm0\n\tcvtsi2ssq %1,%%xmm0\n\tmovaps %%xmm0,%0"
                         : "+m"(XMM(i->dst)) : "m"(SRC(struct simd8)) : "xmm0");
    else
        __asm__ volatile("movaps %0,%%xmm0\n\tcvtsi2ssl %1,%%xmm0\n\tmovaps %%xmm0,%0"
                         : "+m"(XMM(i->dst)) : "m"(SRC(struct simd4)) : "xmm0");
}
SEM(cvtsi2sd)
{
    if (INSN_OSIZE(i) == 8)
        __asm__ volatile("movaps %0,%%xmm0\n\tcvtsi2sdq %1,%%xmm0\n\tmovaps %%xmm0,%0"
                         : "+m"(XMM(i->dst)) : "m"(SRC(struct simd8)) : "xmm0");
    else
        __asm__ volatile("movaps %0,%%xmm0\n\tcvtsi2sdl %1,%%xmm0\n\tmovaps %%xmm0,%0"
                         : "+m"(XMM(i->dst)) : "m"(SRC(struct simd4)) : "xmm0");
}
SEM(pinsrb) { c->fpu.vec[i->dst][i->imm & 15] = ld8(src); }
SEM(pinsrw) { st16(c->fpu.vec[i->dst] + (i->imm & 7) * 2, ld16(src)); }
SEM(pinsrd)
{
    if (INSN_OSIZE(i) == 8) st64(c->fpu.vec[i->dst] + (i->imm & 1) * 8, ld64(src));
    else st32(c->fpu.vec[i->dst] + (i->imm & 3) * 4, ld32(src));
}
SIMD_STUBS(insertps, "insertps", "%xmm1,%xmm0");
SEM(insertps_r)
{
    __asm__ volatile("movaps %0,%%xmm0\n\tmovaps %1,%%xmm1\n\t" CALL_STUB "movaps %%xmm0,%0"
                     : "+m"(XMM(i->dst)) : "m"(SRC(struct simd16)), [stub] "r"(SIMD_STUB(insertps, i->imm))
                     : "xmm0", "xmm1");
}
/* SDM 2A "INSERTPS": with a memory source the source selector (bits 7:6) is ignored. */
SEM(insertps_m)
{
    __asm__ volatile("movaps %0,%%xmm0\n\tmovss %1,%%xmm1\n\t" CALL_STUB "movaps %%xmm0,%0"
                     : "+m"(XMM(i->dst)) : "m"(SRC(struct simd4)), [stub] "r"(SIMD_STUB(insertps, i->imm & 0x3f))
                     : "xmm0", "xmm1");
}

/* ---- string compares: result in ECX or XMM0, and flags ---- */
SIMD_STUBS(pcmpestrm, "pcmpestrm", "%xmm1,%xmm0");
SIMD_STUBS(pcmpestri, "pcmpestri", "%xmm1,%xmm0");
SIMD_STUBS(pcmpistrm, "pcmpistrm", "%xmm1,%xmm0");
SIMD_STUBS(pcmpistri, "pcmpistri", "%xmm1,%xmm0");
#define PCMPSTR_LOAD "movaps %[a],%%xmm0\n\tmovups %[b],%%xmm1\n\t" CALL_STUB
#define PCMPSTR_IN(name) [a] "m"(XMM(i->dst)), [b] "m"(SRC(struct simd16)), [stub] "r"(SIMD_STUB(name, i->imm))
SEM(pcmpestrm)
{
    uint32_t fl = pcmpestr_length(i, c->gpr[RAX]);
    __asm__ volatile(PCMPSTR_LOAD "lahf\n\tseto %%al\n\tmovaps %%xmm0,%[out]"
                     : "+&a"(fl), [out] "=m"(XMM(0))
                     : PCMPSTR_IN(pcmpestrm), "d"(pcmpestr_length(i, c->gpr[RDX])) : "xmm0", "xmm1", "cc");
    c->fl = (uint16_t)fl;
}
SEM(pcmpestri)
{
    uint32_t fl = pcmpestr_length(i, c->gpr[RAX]), index;
    __asm__ volatile(PCMPSTR_LOAD "lahf\n\tseto %%al"
                     : "+&a"(fl), "=&c"(index)
                     : PCMPSTR_IN(pcmpestri), "d"(pcmpestr_length(i, c->gpr[RDX])) : "xmm0", "xmm1", "cc");
    c->fl = (uint16_t)fl;
    SET32(RCX, index);
}
SEM(pcmpistrm)
{
    uint32_t fl;
    __asm__ volatile(PCMPSTR_LOAD "lahf\n\tseto %%al\n\tmovaps %%xmm0,%[out]"
                     : "=&a"(fl), [out] "=m"(XMM(0)) : PCMPSTR_IN(pcmpistrm) : "xmm0", "xmm1", "cc");
    c->fl = (uint16_t)fl;
}
SEM(pcmpistri)
{
    uint32_t fl, index;
    __asm__ volatile(PCMPSTR_LOAD "lahf\n\tseto %%al"
                     : "=&a"(fl), "=&c"(index) : PCMPSTR_IN(pcmpistri) : "xmm0", "xmm1", "cc");
    c->fl = (uint16_t)fl;
    SET32(RCX, index);
}

#endif
