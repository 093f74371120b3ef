/*
 * Semantics of VEX-coded vector instructions, like those of sem_simd.h: the host executes the very
 * instruction. Each exists for 128 bits (_x) and 256 bits (_y); src points to the ModRM.rm operand, of
 * any alignment unless the row says A_ALIGN.
 *
 * Results go to the register file as 256 bits: a VEX.128 instruction has cleared the upper half. The
 * compiler's code knows nothing of YMM registers, and what used them leaves them clean (VZEROUPPER),
 * so that SSE code that follows is not slowed down. SDM 1 "Mixing AVX Code with SSE Code"
 */
#ifndef KVS_SEM_AVX_H
#define KVS_SEM_AVX_H

#include "sem_simd.h"

struct simd32 { uint8_t b[32]; };
struct simd1 { uint8_t b[1]; };
#define YMM(n) (*(struct simd32 *)c->fpu.vec[n])
#define VREG_x(n) (*(struct simd16 *)c->fpu.vec[n])
#define VREG_y(n) (*(struct simd32 *)c->fpu.vec[n])
#define VEND_x
#define VEND_y "\n\tvzeroupper"

/* By operand kind and length: type, size, how to load it into a register. */
#define VT_Wl_x 16
#define VT_Wl_y 32
#define VT_Ml_x 16
#define VT_Ml_y 32
#define VT_Wh_x 8
#define VT_Wh_y 16
#define VT_Wf_x 4
#define VT_Wf_y 8
#define VT_We_x 2
#define VT_We_y 4
#define VT_Wm_x 8
#define VT_Wm_y 32
#define VT_Wx_x 16
#define VT_Wx_y 16
#define VT_Mdq_y 16
#define VT_Wq_x 8
#define VT_Wq_y 8
#define VT_Mq_x 8
#define VT_Wd_x 4
#define VT_Wd_y 4
#define VT_Ww_x 2
#define VT_Ww_y 2
#define VT_Wb_x 1
#define VT_Wb_y 1
#define VT_Ux_x 16
#define VT_RdMb_x 1
#define VT_RdMw_x 2
#define VT_Ed_x 4
#define VT_CAT(a, b) VT_CAT_(a, b)
#define VT_CAT_(a, b) a##b
#define VTYPE(s, L) struct VT_CAT(simd, VT_##s##_##L)
#define VSIZE(s, L) VT_CAT(VT_##s##_##L, u)
#define VLOAD_Wl_x "vmovdqu %[rm],%%xmm1\n\t"
#define VLOAD_Wl_y "vmovdqu %[rm],%%ymm1\n\t"
#define VLOAD_Wx_x "vmovdqu %[rm],%%xmm1\n\t"
#define VLOAD_Wx_y "vmovdqu %[rm],%%xmm1\n\t"
#define VLOAD_Wq_x "vmovq %[rm],%%xmm1\n\t"
#define VLOAD_Wd_x "vmovd %[rm],%%xmm1\n\t"

#define VSRC(s, L) [rm] "m"(SRC(VTYPE(s, L)))
#define VHREG(L) [h] "m"(VREG_##L(INSN_VVVV(i)))
#define VDEST [d] "=m"(YMM(i->dst))
#define VSTORE(L) "vmovdqa %%ymm0,%[d]" VEND_##L

/* ---- shapes; see isa_avx.def ---- */
/* Destination, vvvv, source. */
#define SEM_V3(name, mnem, L, s)                                                                  \
    SEM(name)                                                                                     \
    {                                                                                             \
        __asm__ volatile("vmovdqa %[h],%%" #L "mm0\n\t" mnem " %[rm],%%" #L "mm0,%%" #L "mm0\n\t" VSTORE(L) \
                         : VDEST : VHREG(L), VSRC(s, L) : "xmm0");                                \
    }
#define SEM_S3 SEM_V3
/* Destination, source. */
#define SEM_V2(name, mnem, L, s)                                                                  \
    SEM(name)                                                                                     \
    {                                                                                             \
        __asm__ volatile(mnem " %[rm],%%" #L "mm0\n\t" VSTORE(L) : VDEST : VSRC(s, L) : "xmm0");   \
    }
#define SEM_S2 SEM_V2
/* The same with a result of half the length. */
#define SEM_N2(name, mnem, L, s)                                                                  \
    SEM(name)                                                                                     \
    {                                                                                             \
        __asm__ volatile(mnem #L " %[rm],%%xmm0\n\t" VSTORE(L) : VDEST : VSRC(s, L) : "xmm0");     \
    }
/* With an immediate in the opcode; see SIMD_STUBS. */
#define SEM_V3I(name, mnem, L, s) SEM_V3I_(name, mnem, L, s, VI_##s##_##L)
#define SEM_V3I_(name, mnem, L, s, R)                                                             \
    SIMD_STUBS(name, mnem, "%" R "mm1,%" #L "mm0,%" #L "mm0");                                    \
    SEM(name)                                                                                     \
    {                                                                                             \
        __asm__ volatile("vmovdqa %[h],%%" #L "mm0\n\t" VLOAD_##s##_##L CALL_STUB VSTORE(L)       \
                         : VDEST : VHREG(L), VSRC(s, L), [stub] "r"(SIMD_STUB(name, i->imm)) : "xmm0", "xmm1"); \
    }
#define SEM_S3I SEM_V3I
#define VI_Wl_x "x"
#define VI_Wl_y "y"
#define VI_Wx_x "x"
#define VI_Wx_y "x" /* the inserted half */
#define VI_Wq_x "x"
#define VI_Wd_x "x"
#define SEM_V2I(name, mnem, L, s)                                                                 \
    SIMD_STUBS(name, mnem, "%" #L "mm1,%" #L "mm0");                                              \
    SEM(name)                                                                                     \
    {                                                                                             \
        __asm__ volatile(VLOAD_##s##_##L CALL_STUB VSTORE(L)                                      \
                         : VDEST : VSRC(s, L), [stub] "r"(SIMD_STUB(name, i->imm)) : "xmm0", "xmm1"); \
    }
/* A fourth register, named by the immediate. */
#define SEM_V4(name, mnem, L, s)                                                                  \
    SEM(name)                                                                                     \
    {                                                                                             \
        __asm__ volatile("vmovdqa %[h],%%" #L "mm0\n\tvmovdqa %[m],%%" #L "mm1\n\t"               \
                         mnem " %%" #L "mm1,%[rm],%%" #L "mm0,%%" #L "mm0\n\t" VSTORE(L)           \
                         : VDEST : VHREG(L), VSRC(s, L), [m] "m"(VREG_##L(INSN_IS4(i))) : "xmm0", "xmm1"); \
    }
/* FMA: the destination is an operand too. */
#define SEM_F3(name, mnem, L, s)                                                                  \
    SEM(name)                                                                                     \
    {                                                                                             \
        __asm__ volatile("vmovdqa %[o],%%" #L "mm0\n\tvmovdqa %[h],%%" #L "mm1\n\t"               \
                         mnem " %[rm],%%" #L "mm1,%%" #L "mm0\n\t" VSTORE(L)                       \
                         : VDEST : VHREG(L), VSRC(s, L), [o] "m"(VREG_##L(i->dst)) : "xmm0", "xmm1"); \
    }
#define SEM_F3S SEM_F3
/* Status flags; the layout of c->fl. */
#define SEM_FL(name, mnem, L, s)                                                                  \
    SEM(name)                                                                                     \
    {                                                                                             \
        uint16_t fl;                                                                              \
        __asm__ volatile("vmovdqa %[r],%%" #L "mm0\n\t" mnem " %[rm],%%" #L "mm0\n\tlahf\n\tseto %%al" VEND_##L \
                         : "=&a"(fl) : [r] "m"(VREG_##L(i->dst)), VSRC(s, L) : "xmm0", "cc");     \
        c->fl = fl;                                                                               \
    }
#define SEM_FLS SEM_FL
#define SEM_GPR(name, mnem, L, s)                                                                 \
    SEM(name)                                                                                     \
    {                                                                                             \
        uint64_t v;                                                                               \
        if (INSN_OSIZE(i) == 8) __asm__ volatile(mnem " %1,%q0" : "=r"(v) : "m"(SRC(VTYPE(s, L)))); \
        else __asm__ volatile(mnem " %1,%k0" : "=r"(v) : "m"(SRC(VTYPE(s, L))));                  \
        c->gpr[i->dst] = v;                                                                       \
    }
#define SEM_MSK(name, mnem, L, s)                                                                 \
    SEM(name)                                                                                     \
    {                                                                                             \
        uint64_t v;                                                                               \
        __asm__ volatile("vmovdqa %1,%%" #L "mm0\n\t" mnem " %%" #L "mm0,%k0" VEND_##L            \
                         : "=r"(v) : "m"(SRC(VTYPE(Wl, L))) : "xmm0");                            \
        c->gpr[i->dst] = v;                                                                       \
    }
/* Written by hand. */
#define SEM_OWN2(name, mnem, L, s)
#define SEM_OWN3(name, mnem, L, s)
#define SEM_OWN3I(name, mnem, L, s)
#define SEM_PSTR(name, mnem, L, s)
#define SEM_MERGE(name, mnem, L, s)
#define SEM_ST(name, mnem, L, s)
#define SEM_STX(name, mnem, L, s)
#define SEM_STS(name, mnem, L, s)
#define SEM_STH(name, mnem, L, s)
#define SEM_STQ(name, mnem, L, s)
#define SEM_STE(name, mnem, L, s)
#define SEM_STI(name, mnem, L, s)

/* A register whose upper half is clear. */
static ALWAYS_INLINE void set128(struct kvs_vcpu *c, uint32_t n, uint64_t low, uint64_t high)
{
    uint8_t *to = c->fpu.vec[n];
    st64(to, low);
    st64(to + 8, high);
    st64(to + 16, 0);
    st64(to + 24, 0);
}

#endif
