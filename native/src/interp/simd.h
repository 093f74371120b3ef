/* Choice and slow paths of SIMD handlers. */
#ifndef KVS_SIMD_H
#define KVS_SIMD_H

#include "interp.h"

/* Handler of a row of class SIMD or SIMD_STORE: register or memory form; with MODE_SSE_TRAPS in mode
 * the checked form of those with A_FP. Never NULL. */
kvs_handler simd_handler(const struct decoded *d, uint32_t mode);

/* ---- MXCSR in the host register: the guest's while c->running and guest code may run ---- */
static inline uint32_t host_mxcsr_get(void)
{
    uint32_t v;
    __asm__ volatile("stmxcsr %0" : "=m"(v));
    return v;
}
static inline void host_mxcsr_set(uint32_t v) { __asm__ volatile("ldmxcsr %0" : : "m"(v)); }
#define MXCSR_WRITABLE 0xffffu /* what FXSAVE gives as MXCSR_MASK */
#define MXCSR_FTZ 0x8000u

/* From an instruction: ST_OK, or ST_END when other handlers hold from now on. */
int load_mxcsr(struct kvs_vcpu *c, uint32_t value);
/* x87 state in the FXSAVE layout; wide: 64-bit instruction and operand pointers. op_sse_state.c */
void fx_put_x87(const struct kvs_vcpu *c, bool wide, uint8_t *area);
void fx_get_x87(struct kvs_vcpu *c, bool wide, const uint8_t *area);

/* ---- slow paths: a size, and how ---- */
#define SIMD_SIZE 0xffu
#define SIMD_ALIGNED 0x100u /* #GP(0) unless aligned */
#define SIMD_MMX 0x200u     /* touches MMX registers */
#define SIMD_VEX 0x400u     /* first operand in VEX.vvvv, written as 256 bits */
#define SIMD_Y 0x800u       /* VEX.L = 1 */
#define SIMD_W 0x1000u      /* VEX.W = 1 */
/* Which arithmetic a checked instruction does: opcode (0x100 added in map 0F 3A, 0x200 in 0F 38) and prefix. */
#define SIMD_FP_MAP(map) ((map) == M3A || (map) == V3 ? 0x100 : (map) == M38 || (map) == V2 ? 0x200 : 0)
#define SIMD_FP(map, pp, opc) ((uint32_t)((opc) | SIMD_FP_MAP(map)) << 16 | (uint32_t)(pp) << 28)
#define SIMD_FP_OPCODE(how) ((how) >> 16 & 0x3ff)
#define SIMD_FP_PREFIX(how) ((how) >> 28)

/* Bytes of data with bit 7 set in mask go to seg:rDI. op_sse_state.c */
int masked_store(struct kvs_vcpu *c, const struct kvs_insn *i, const uint8_t *data, const uint8_t *mask, uint32_t size);
int op_mf(OPARGS); /* #MF: an x87 exception is pending */
/*
 * Linear address of size bytes at off in the segment of i, checked: with bits of gp set in it #GP(0),
 * with bits of ac set #AC where alignment is checked (for sizes 2, 4 and 8 that is included).
 */
int simd_address(struct kvs_vcpu *c, const struct kvs_insn *i, uint64_t off, uint32_t size, int access, uint32_t gp,
                 uint32_t ac, uint64_t *la);
int simd_read(struct kvs_vcpu *c, const struct kvs_insn *i, void *data, uint32_t how);
/* Reads the memory operand through every check and runs the semantic; core: a simd_sem. */
int simd_load_slow(OPARGS, void (*core)(struct kvs_vcpu *, const struct kvs_insn *, const void *), uint32_t how);
/* Stores size bytes from `from`, which lies in the vCPU. */
int simd_store_slow(OPARGS, const void *from, uint32_t how);
/* MODE_SSE_TRAPS: runs masked, inspects the flags, raises or commits. reg: the register operand. */
int simd_checked(OPARGS, void (*core)(struct kvs_vcpu *, const struct kvs_insn *, const void *), uint32_t how,
                 const void *reg);

/* An unmasked exception found before the computation leaves no flags of what the computation would raise. */
#define SIMD_PRE_COMPUTATION 0x07u /* #I #D #Z */
static inline uint32_t simd_reported(uint32_t flags, uint32_t unmasked)
{
    return flags & unmasked & SIMD_PRE_COMPUTATION ? flags & SIMD_PRE_COMPUTATION : flags;
}
#define SIMD_OVERFLOW 0x08u
#define SIMD_UNDERFLOW 0x10u
#define SIMD_PRECISION 0x20u
static inline uint32_t mxcsr_unmasked(uint32_t mxcsr) { return ~(mxcsr >> 7) & MXCSR_FLAGS; }

/* ---- wrappers: what a row's operand kinds mean for its handlers ---- */
#define SIZE_Wx 16u
#define SIZE_Wq 8u
#define SIZE_Wd 4u
#define SIZE_Ww 2u
#define SIZE_Qq 8u
#define SIZE_Qd 4u
#define SIZE_Ey (INSN_OSIZE(i) == 8 ? 8u : 4u)
#define SIZE_Ed 4u
#define SIZE_RdMb 1u
#define SIZE_RdMw 2u
#define SIZE_Mq 8u
#define SIZE_Mdq 16u
#define REG_Wx (c->fpu.vec[i->src])
#define REG_Wq (c->fpu.vec[i->src])
#define REG_Wd (c->fpu.vec[i->src])
#define REG_Ww (c->fpu.vec[i->src])
#define REG_Qq (c->fpu.r[i->src & 7])
#define REG_Qd (c->fpu.r[i->src & 7])
#define REG_Ey (&c->gpr[i->src])
#define REG_RdMb (&c->gpr[i->src])
#define REG_RdMw (&c->gpr[i->src])

/* A host page is at least as aligned as a guest page, so the host address answers for alignment. */
#define SIMD_MISALIGNED(p, at) (((at) & A_ALIGN) && ((uintptr_t)(p) & 15))
#define SIMD_HOW(k1, at) (SIZE_##k1 | (((at) & A_ALIGN) ? SIMD_ALIGNED : 0))

#define SIMD_R(name, sem, k1)                                                                     \
    OP(name)                                                                                      \
    {                                                                                             \
        sem(c, i, REG_##k1);                                                                      \
        NEXT();                                                                                   \
    }
#define SIMD_M(name, sem, k1, at)                                                                 \
    OP(name)                                                                                      \
    {                                                                                             \
        const uint8_t *p = insn_probe(c, i, TLB_R, SIZE_##k1);                                    \
        if (UNLIKELY(!p || SIMD_MISALIGNED(p, at))) return simd_load_slow(c, i, budget, sem, SIMD_HOW(k1, at)); \
        sem(c, i, p);                                                                             \
        NEXT();                                                                                   \
    }
/* The two widths of an Ey operand as two handlers: each with a constant size. */
#define SIMD_M_EY(name, sem, at, M)                                                               \
    static M(name##4, sem, Ed, at)                                                                \
    static M(name##8, sem, Mq, at)                                                                \
    OP(name) { return INSN_OSIZE(i) == 8 ? op_##name##8(c, i, budget) : op_##name##4(c, i, budget); }
#define SIMD_K(name, sem, k1, how)                                                                \
    OP(name) { return simd_checked(c, i, budget, sem, how, i->src == INSN_MEM ? NULL : REG_##k1); }
/* Register file to memory; `from` is a location in the vCPU. */
#define SIMD_ST(name, from, k0, at)                                                               \
    OP(name)                                                                                      \
    {                                                                                             \
        const void *from_ = (from);                                                               \
        uint8_t *p = insn_probe(c, i, TLB_W, SIZE_##k0);                                          \
        if (UNLIKELY(!p || SIMD_MISALIGNED(p, at))) return simd_store_slow(c, i, budget, from_, SIMD_HOW(k0, at)); \
        __builtin_memcpy(p, from_, SIZE_##k0);                                                    \
        NEXT();                                                                                   \
    }

#endif
