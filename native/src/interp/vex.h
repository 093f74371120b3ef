/* Handlers of VEX-coded vector rows, made from the rows. Included by the files that define them. */
#ifndef KVS_VEX_H
#define KVS_VEX_H

#include "../isa/sem_avx.h"
#include "simd.h"

/* The ModRM.rm operand in its register. */
#define VREG_Wl (c->fpu.vec[i->src])
#define VREG_Wh VREG_Wl
#define VREG_Wf VREG_Wl
#define VREG_We VREG_Wl
#define VREG_Wm VREG_Wl
#define VREG_Wx VREG_Wl
#define VREG_Wq VREG_Wl
#define VREG_Wd VREG_Wl
#define VREG_Ww VREG_Wl
#define VREG_Wb VREG_Wl
#define VREG_Ul VREG_Wl
#define VREG_Ux VREG_Wl
#define VREG_Ey (&c->gpr[i->src])
#define VREG_RdMb VREG_Ey
#define VREG_RdMw VREG_Ey

#define VMISALIGNED(p, at, s, L) (((at) & A_ALIGN) && ((uintptr_t)(p) & (VSIZE(s, L) - 1)))
#define VHOW(s, L, at) (VSIZE(s, L) | (((at) & A_ALIGN) ? SIMD_ALIGNED : 0) | SIMD_VEX | VHOW_##L)
#define VHOW_x 0u
#define VHOW_y SIMD_Y

#define V_R(name, sem, s)                                                                         \
    OP(name##_r)                                                                                  \
    {                                                                                             \
        sem(c, i, VREG_##s);                                                                      \
        NEXT();                                                                                   \
    }
#define V_M(name, sem, L, s, at)                                                                  \
    OP(name##_m)                                                                                  \
    {                                                                                             \
        const uint8_t *p = insn_probe(c, i, TLB_R, VSIZE(s, L));                                  \
        if (UNLIKELY(!p || VMISALIGNED(p, at, s, L))) return simd_load_slow(c, i, budget, sem, VHOW(s, L, at)); \
        sem(c, i, p);                                                                             \
        NEXT();                                                                                   \
    }
#define V_K(name, sem, s, how) \
    OP(name##_k) { return simd_checked(c, i, budget, sem, how, i->src == INSN_MEM ? NULL : VREG_##s); }

/* Stores: `from` is a location in the vCPU. */
#define V_ST_M(name, from, size, at)                                                              \
    OP(name)                                                                                      \
    {                                                                                             \
        const void *from_ = (from);                                                               \
        uint8_t *p = insn_probe(c, i, TLB_W, size);                                               \
        if (UNLIKELY(!p || (((at) & A_ALIGN) && ((uintptr_t)p & ((size) - 1)))))                  \
            return simd_store_slow(c, i, budget, from_, (size) | (((at) & A_ALIGN) ? SIMD_ALIGNED : 0)); \
        __builtin_memcpy(p, from_, size);                                                         \
        NEXT();                                                                                   \
    }

/* ---- what a row generates: GEN_<lengths>, then for each length semantics and handlers ---- */
#define GEN_XY(shape, name, mnem, mod, s, at) GEN(shape, name##_x, mnem, x, mod, s, at) GEN(shape, name##_y, mnem, y, mod, s, at)
#define GEN_X0(shape, name, mnem, mod, s, at) GEN(shape, name##_x, mnem, x, mod, s, at)
#define GEN_XS(shape, name, mnem, mod, s, at) GEN(shape, name##_x, mnem, x, mod, s, at)
#define GEN_Y1(shape, name, mnem, mod, s, at) GEN(shape, name##_y, mnem, y, mod, s, at)
#define GEN(shape, name, mnem, L, mod, s, at) SEM_##shape(name, mnem, L, s) WRAP_##shape(name, L, mod, s, at)
#define WRAP_STD(name, L, mod, s, at) WRAP_##mod(name, L, s, at)
#define WRAP_A(name, L, s, at) V_R(name, sem_##name, s) V_M_##s(name, L, s, at)
#define WRAP_M(name, L, s, at) V_M_##s(name, L, s, at)
#define WRAP_R(name, L, s, at) V_R(name, sem_##name, s)
#define V_M_STD(name, L, s, at) V_M(name, sem_##name, L, s, at)
#define V_M_Wl V_M_STD
#define V_M_Ml V_M_STD
#define V_M_Wh V_M_STD
#define V_M_Wf V_M_STD
#define V_M_We V_M_STD
#define V_M_Wm V_M_STD
#define V_M_Wx V_M_STD
#define V_M_Wq V_M_STD
#define V_M_Mq V_M_STD
#define V_M_Mdq V_M_STD
#define V_M_Wd V_M_STD
#define V_M_Ww V_M_STD
#define V_M_Wb V_M_STD
#define V_M_RdMb V_M_STD
#define V_M_RdMw V_M_STD
/* The two widths of an Ey operand as two handlers: each with a constant size. */
#define V_M_Ey(name, L, s, at)                                                                    \
    static V_M(name##4, sem_##name, L, Wd, at)                                                    \
    static V_M(name##8, sem_##name, L, Wq, at)                                                    \
    OP(name##_m) { return INSN_OSIZE(i) == 8 ? op_##name##8_m(c, i, budget) : op_##name##4_m(c, i, budget); }

#define WRAP_V3 WRAP_STD
#define WRAP_S3 WRAP_STD
#define WRAP_V2 WRAP_STD
#define WRAP_S2 WRAP_STD
#define WRAP_N2 WRAP_STD
#define WRAP_V3I WRAP_STD
#define WRAP_S3I WRAP_STD
#define WRAP_V2I WRAP_STD
#define WRAP_V4 WRAP_STD
#define WRAP_F3 WRAP_STD
#define WRAP_F3S WRAP_STD
#define WRAP_FL WRAP_STD
#define WRAP_FLS WRAP_STD
#define WRAP_GPR WRAP_STD
#define WRAP_MSK WRAP_STD
#define WRAP_OWN2 WRAP_STD
#define WRAP_OWN3 WRAP_STD
#define WRAP_OWN3I WRAP_STD
#define WRAP_PSTR WRAP_STD
/* Register to register: what a MERGE row reads first is vvvv, like OWN3's. */
#define WRAP_MERGE(name, L, mod, s, at) V_R(name, sem_##name, Ux)
/* ---- stores ---- */
#define VFROM (c->fpu.vec[i->src])
#define WRAP_ST(name, L, mod, s, at) V_ST_M(name##_m, VFROM, VSIZE(s, L), at) WRAP_ST_##mod(name, L)
#define WRAP_ST_M(name, L)
#define WRAP_ST_A(name, L)                                                                        \
    OP(name##_r)                                                                                  \
    {                                                                                             \
        __asm__ volatile("vmovdqa %1,%%" #L "mm0\n\tvmovdqa %%ymm0,%0" VEND_##L                   \
                         : "=m"(YMM(i->dst)) : "m"(VREG_##L(i->src)) : "xmm0");                   \
        NEXT();                                                                                   \
    }
#define WRAP_STS(name, L, mod, s, at) V_ST_M(name##_m, VFROM, VSIZE(s, L), at)
#define WRAP_STH(name, L, mod, s, at) V_ST_M(name##_m, VFROM + 8, VSIZE(s, L), at)
#define WRAP_STX(name, L, mod, s, at)                                                             \
    V_ST_M(name##_m, VFROM + (i->imm & 1) * 16, VSIZE(s, L), at)                                  \
    OP(name##_r)                                                                                  \
    {                                                                                             \
        const uint8_t *half = VFROM + (i->imm & 1) * 16;                                          \
        set128(c, i->dst, ld64(half), ld64(half + 8));                                         \
        NEXT();                                                                                   \
    }
#define WRAP_STQ(name, L, mod, s, at) /* by hand */
#define WRAP_STE(name, L, mod, s, at)
#define WRAP_STI(name, L, mod, s, at)

#endif
