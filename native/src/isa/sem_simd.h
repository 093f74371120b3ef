/*
 * Semantics of SIMD instructions: the host executes the very instruction on the guest's values, so
 * results, NaN payloads, rounding and the flags in MXCSR are the silicon's. MMX instructions run on
 * host XMM registers: MMX ones would disturb the host's x87 state.
 *
 * A semantic is sem_<name>(c, i, src): src points to the second operand, in the register file, in
 * guest RAM or in a buffer; 16-byte aligned where the row says A_ALIGN.
 */
#ifndef KVS_SEM_SIMD_H
#define KVS_SEM_SIMD_H

#include "../interp/interp.h"

/* Operand types of asm constraints: no alignment promised to the compiler. */
struct simd16 { uint8_t b[16]; };
struct simd8 { uint8_t b[8]; };
struct simd4 { uint8_t b[4]; };
struct simd2 { uint8_t b[2]; };
#define TYPE_Wx struct simd16
#define TYPE_Wq struct simd8
#define TYPE_Wd struct simd4
#define TYPE_Ww struct simd2
#define TYPE_Qq struct simd8
#define TYPE_Qd struct simd4
#define LOAD_Wx "movups"
#define LOAD_Wq "movq"
#define LOAD_Wd "movd"
#define LOAD_Qq "movq"
#define LOAD_Qd "movd"

#define SIMD_ARGS struct kvs_vcpu *c, const struct kvs_insn *i, const void *src
typedef void (*simd_sem)(SIMD_ARGS);
#define SEM(name) static ALWAYS_INLINE void sem_##name(SIMD_ARGS)
#define SRC(type) (*(const type *)src)
#define XMM(n) (*(struct simd16 *)c->fpu.vec[n])
#define MMX(n) (*(struct simd8 *)c->fpu.r[(n) & 7])

/*
 * Instructions with an immediate in the opcode: one stub per value, 8 bytes apart, working on the
 * registers that the caller has loaded. The asm steps over the red zone before it calls one.
 */
#define SIMD_STUBS(name, insn, operands)                                                          \
    __asm__(".pushsection .text.simd_stubs,\"ax\",@progbits\n\t.p2align 3\nsimd_stub_" #name ":\n\t" \
            ".set kvs_imm,0\n\t.rept 256\n\t.p2align 3\n\t" insn " $kvs_imm," operands "\n\tret\n\t" \
            ".set kvs_imm,kvs_imm+1\n\t.endr\n\t.popsection\n");                                  \
    extern const uint8_t simd_stub_##name[] __attribute__((visibility("hidden")))
#define SIMD_STUB(name, n) (simd_stub_##name + ((n) & 0xff) * 8)
#define CALL_STUB "lea -128(%%rsp),%%rsp\n\tcall *%[stub]\n\tlea 128(%%rsp),%%rsp\n\t"

/* ---- XMM shapes ---- */
#define SHAPE_BIN(name, mnem, k1)                                                                 \
    SEM(name)                                                                                     \
    {                                                                                             \
        __asm__ volatile("movaps %0,%%xmm0\n\t" mnem " %1,%%xmm0\n\tmovaps %%xmm0,%0"             \
                         : "+m"(XMM(i->dst)) : "m"(SRC(TYPE_##k1)) : "xmm0");                     \
    }
/* The same with an operand of any alignment. */
#define SHAPE_BINU(name, mnem, k1)                                                                \
    SEM(name)                                                                                     \
    {                                                                                             \
        __asm__ volatile("movaps %0,%%xmm0\n\tmovups %1,%%xmm1\n\t" mnem " %%xmm1,%%xmm0\n\tmovaps %%xmm0,%0" \
                         : "+m"(XMM(i->dst)) : "m"(SRC(TYPE_##k1)) : "xmm0", "xmm1");             \
    }
#define SHAPE_MOVE(name, mnem, k1)                                                                \
    SEM(name)                                                                                     \
    {                                                                                             \
        __asm__ volatile("movups %1,%%xmm0\n\tmovaps %%xmm0,%0"                                   \
                         : "=m"(XMM(i->dst)) : "m"(SRC(TYPE_##k1)) : "xmm0");                     \
    }
#define SHAPE_IMM(name, mnem, k1)                                                                 \
    SIMD_STUBS(name, mnem, "%xmm1,%xmm0");                                                        \
    SEM(name)                                                                                     \
    {                                                                                             \
        __asm__ volatile("movaps %0,%%xmm0\n\t" LOAD_##k1 " %1,%%xmm1\n\t" CALL_STUB "movaps %%xmm0,%0" \
                         : "+m"(XMM(i->dst)) : "m"(SRC(TYPE_##k1)), [stub] "r"(SIMD_STUB(name, i->imm)) \
                         : "xmm0", "xmm1");                                                       \
    }
#define SHAPE_BLENDV(name, mnem, k1)                                                              \
    SEM(name)                                                                                     \
    {                                                                                             \
        __asm__ volatile("movaps %2,%%xmm0\n\tmovaps %0,%%xmm1\n\t" mnem " %%xmm0,%1,%%xmm1\n\t"  \
                         "movaps %%xmm1,%0"                                                       \
                         : "+m"(XMM(i->dst)) : "m"(SRC(TYPE_##k1)), "m"(XMM(0)) : "xmm0", "xmm1"); \
    }
#define SHAPE_BLENDVU(name, mnem, k1)                                                             \
    SEM(name)                                                                                     \
    {                                                                                             \
        __asm__ volatile("movaps %2,%%xmm0\n\tmovaps %0,%%xmm1\n\tmovups %1,%%xmm2\n\t"           \
                         mnem " %%xmm0,%%xmm2,%%xmm1\n\tmovaps %%xmm1,%0"                         \
                         : "+m"(XMM(i->dst)) : "m"(SRC(TYPE_##k1)), "m"(XMM(0)) : "xmm0", "xmm1", "xmm2"); \
    }
/* LAHF and SETO give the layout of c->fl. */
#define SHAPE_FLAGS(name, mnem, k1)                                                               \
    SEM(name)                                                                                     \
    {                                                                                             \
        uint16_t fl;                                                                              \
        __asm__ volatile("movaps %1,%%xmm0\n\t" mnem " %2,%%xmm0\n\tlahf\n\tseto %%al"            \
                         : "=&a"(fl) : "m"(XMM(i->dst)), "m"(SRC(TYPE_##k1)) : "xmm0", "cc");     \
        c->fl = fl;                                                                               \
    }
#define SHAPE_TOGPR(name, mnem, k1)                                                               \
    SEM(name)                                                                                     \
    {                                                                                             \
        uint64_t v;                                                                               \
        if (INSN_OSIZE(i) == 8) __asm__ volatile(mnem " %1,%q0" : "=r"(v) : "m"(SRC(TYPE_##k1))); \
        else __asm__ volatile(mnem " %1,%k0" : "=r"(v) : "m"(SRC(TYPE_##k1)));                    \
        c->gpr[i->dst] = v;                                                                       \
    }
#define SHAPE_OWN(name, mnem, k1)
#define SHAPE_SPLIT(name, mnem, k1)

/* PCMPESTRx: an explicit length saturates at the element count, 16 or 8; a quadword length may not be cut to 32 bits before. */
static ALWAYS_INLINE uint32_t pcmpestr_length(const struct kvs_insn *i, uint64_t v)
{
    int64_t n = INSN_OSIZE(i) == 8 ? (int64_t)v : (int32_t)v;
    return n > 16 || n < -16 ? 16 : (uint32_t)n;
}

/* ---- MMX ----
 * SDM 1 "Effect of MMX, x87 FPU, FXSAVE, and FXRSTOR Instructions on the x87 FPU Tag Word": every MMX
 * instruction sets TOP to 0 and all tags to valid; a written register gets an all-ones exponent.
 */
static ALWAYS_INLINE void mmx_enter(struct kvs_vcpu *c)
{
    c->fpu.fsw &= (uint16_t)~0x3800u;
    c->fpu.tags = 0xff;
}
static ALWAYS_INLINE bool mmx_pending(const struct kvs_vcpu *c) { return UNLIKELY(c->fpu.fsw & 0x80); }
static ALWAYS_INLINE void mmx_exponent(struct kvs_vcpu *c, uint32_t n) { st16(c->fpu.r[n & 7] + 8, 0xffff); }

#endif
