/* x87 arithmetic and comparison. */
#include "x87_int.h"

/* ---- two operands, result in one of them ---- */

/*
 * The host holds the destination in ST(1) and the other operand in ST(0), or the destination alone
 * with the operand in memory; one value is left. The pop forms of the byte encodings are used
 * because assemblers disagree on the mnemonics of subtraction and division.
 */
#define HOST_ADDP ".byte 0xde, 0xc1"
#define HOST_MULP ".byte 0xde, 0xc9"
#define HOST_SUBP ".byte 0xde, 0xe9"  /* ST(1) - ST(0) */
#define HOST_SUBRP ".byte 0xde, 0xe1" /* ST(0) - ST(1) */
#define HOST_DIVP ".byte 0xde, 0xf9"
#define HOST_DIVRP ".byte 0xde, 0xf1"

/* A flag the guest does not mask: forget the result and let the host do it with the guest's masks. */
#define UNMASKED(sw) UNLIKELY((sw) & ~(uint32_t)f->fcw & FSW_FLAGS)
#define REDO_IF_UNMASKED(sw, redo)                                            \
    if (UNMASKED(sw)) {                                                       \
        __asm__ volatile("fstp %st(0)");                                      \
        host_end();                                                           \
        redo;                                                                 \
    }
#define STORE_RESULT(reg) __asm__ volatile("fstpt %0" : "=m"(HOST_REG(reg)))

#define BINARY(name, n, d, s, insn, opc, POP)                                 \
    OP(name)                                                                  \
    {                                                                         \
        struct fpu *f = &c->fpu;                                              \
        uint32_t num = n;                                                     \
        uint16_t sw;                                                          \
        if (UNLIKELY(!st_full(f, 0) || !st_full(f, num) || x87_strict(f)))   \
            X87_SLOW((opc) + num, 0);                                         \
        uint8_t *dst = st_reg(f, d), *src = st_reg(f, s);                     \
        host_begin(f);                                                        \
        __asm__ volatile("fldt %1; fldt %2; " insn "; fnstsw %0"              \
                         : "=a"(sw) : "m"(HOST_REG(dst)), "m"(HOST_REG(src))); \
        REDO_IF_UNMASKED(sw, X87_SLOW((opc) + num, 0))                                  \
        STORE_RESULT(dst);                                                    \
        host_end();                                                           \
        host_flags(f, sw, 0);                                                 \
        POP;                                                                  \
        x87_note(c, i);                                                       \
        NEXT();                                                               \
    }
#define ST0_STI(name, insn, modrm) BINARY(name, i->src, 0, num, insn, OPC(0xd8, modrm), )
#define STI_ST0(name, insn, modrm) BINARY(name, i->dst, num, 0, insn, OPC(0xdc, modrm), )
#define STI_POP(name, insn, modrm) BINARY(name, i->dst, num, 0, insn, OPC(0xde, modrm), st_pop(f))
ST0_STI(fadd_st0, HOST_ADDP, 0xc0)
ST0_STI(fmul_st0, HOST_MULP, 0xc8)
ST0_STI(fsub_st0, HOST_SUBP, 0xe0)
ST0_STI(fsubr_st0, HOST_SUBRP, 0xe8)
ST0_STI(fdiv_st0, HOST_DIVP, 0xf0)
ST0_STI(fdivr_st0, HOST_DIVRP, 0xf8)
STI_ST0(fadd_sti, HOST_ADDP, 0xc0)
STI_ST0(fmul_sti, HOST_MULP, 0xc8)
STI_ST0(fsubr_sti, HOST_SUBRP, 0xe0)
STI_ST0(fsub_sti, HOST_SUBP, 0xe8)
STI_ST0(fdivr_sti, HOST_DIVRP, 0xf0)
STI_ST0(fdiv_sti, HOST_DIVP, 0xf8)
STI_POP(faddp, HOST_ADDP, 0xc0)
STI_POP(fmulp, HOST_MULP, 0xc8)
STI_POP(fsubrp, HOST_SUBRP, 0xe0)
STI_POP(fsubp, HOST_SUBP, 0xe8)
STI_POP(fdivrp, HOST_DIVRP, 0xf0)
STI_POP(fdivp, HOST_DIVP, 0xf8)

#define MEMORY(name, insn, size, opc)                                         \
    OP_LOAD(name, size)                                                       \
    {                                                                         \
        struct fpu *f = &c->fpu;                                              \
        uint16_t sw;                                                          \
        if (UNLIKELY(!st_full(f, 0) || x87_strict(f))) X87_SLOW_LOAD(opc, size); \
        uint8_t *dst = st_reg(f, 0);                                          \
        host_begin(f);                                                        \
        __asm__ volatile("fldt %1; " insn " %2; fnstsw %0"                    \
                         : "=a"(sw) : "m"(HOST_REG(dst)), "m"(*(const uint8_t (*)[size])p)); \
        REDO_IF_UNMASKED(sw, X87_SLOW_LOAD(opc, size))                                       \
        STORE_RESULT(dst);                                                    \
        host_end();                                                           \
        host_flags(f, sw, 0);                                                 \
        x87_note_mem(c, i);                                                   \
        NEXT();                                                               \
    }
#define MEMORY_ALL(op, insn, ext)                                             \
    MEMORY(f##op##_m32, "f" insn "s", 4, OPC_MEM(0xd8, ext))                  \
    MEMORY(f##op##_m64, "f" insn "l", 8, OPC_MEM(0xdc, ext))                  \
    MEMORY(fi##op##_m32, "fi" insn "l", 4, OPC_MEM(0xda, ext))                \
    MEMORY(fi##op##_m16, "fi" insn "s", 2, OPC_MEM(0xde, ext))
MEMORY_ALL(add, "add", 0)
MEMORY_ALL(mul, "mul", 1)
MEMORY_ALL(sub, "sub", 4)
MEMORY_ALL(subr, "subr", 5)
MEMORY_ALL(div, "div", 6)
MEMORY_ALL(divr, "divr", 7)

/* ---- one operand in ST(0), or two without and with a pop; `codes`: the condition codes they set ---- */
#define UNARY(name, insn, modrm, codes)                                       \
    OP(name)                                                                  \
    {                                                                         \
        struct fpu *f = &c->fpu;                                              \
        uint16_t sw;                                                          \
        if (UNLIKELY(!st_full(f, 0) || x87_strict(f))) X87_SLOW(OPC(0xd9, modrm), 0); \
        uint8_t *dst = st_reg(f, 0);                                          \
        host_begin(f);                                                        \
        __asm__ volatile("fldt %1; " insn "; fnstsw %0" : "=a"(sw) : "m"(HOST_REG(dst))); \
        REDO_IF_UNMASKED(sw, X87_SLOW(OPC(0xd9, modrm), 0))                             \
        STORE_RESULT(dst);                                                    \
        host_end();                                                           \
        host_flags(f, sw, codes);                                             \
        x87_note(c, i);                                                       \
        NEXT();                                                               \
    }
UNARY(fsqrt, "fsqrt", 0xfa, 0)
UNARY(frndint, "frndint", 0xfc, 0)
UNARY(f2xm1, "f2xm1", 0xf0, 0)
UNARY(fsin, "fsin", 0xfe, FSW_C2)
UNARY(fcos, "fcos", 0xff, FSW_C2)

/*
 * ST(0) = ST(0) op ST(1): the operand in ST(1) stays, and is dropped on the host. Remainders leave
 * C0 and C3 alone when an operand is special, so `normal` sends those the slow way.
 */
#define WITH_ST1(name, insn, modrm, normal, codes)                                    \
    OP(name)                                                                  \
    {                                                                         \
        struct fpu *f = &c->fpu;                                              \
        uint16_t sw;                                                          \
        if (UNLIKELY(!st_full(f, 0) || !st_full(f, 1) || x87_strict(f)))     \
            X87_SLOW(OPC(0xd9, modrm), 0);                                    \
        uint8_t *dst = st_reg(f, 0), *src = st_reg(f, 1);                     \
        if (normal && !(ext_normal(ext_load(dst)) && ext_normal(ext_load(src)))) \
            X87_SLOW(OPC(0xd9, modrm), 0);                                    \
        host_begin(f);                                                        \
        __asm__ volatile("fldt %2; fldt %1; " insn "; fnstsw %0; fstp %%st(1)" \
                         : "=a"(sw) : "m"(HOST_REG(dst)), "m"(HOST_REG(src))); \
        REDO_IF_UNMASKED(sw, X87_SLOW(OPC(0xd9, modrm), 0))                             \
        STORE_RESULT(dst);                                                    \
        host_end();                                                           \
        host_flags(f, sw, codes);                                             \
        x87_note(c, i);                                                       \
        NEXT();                                                               \
    }
WITH_ST1(fscale, "fscale", 0xfd, false, 0)
WITH_ST1(fprem, "fprem", 0xf8, true, FSW_C0 | FSW_C2 | FSW_C3)
WITH_ST1(fprem1, "fprem1", 0xf5, true, FSW_C0 | FSW_C2 | FSW_C3)
BINARY(fyl2x, 1, 1, 0, "fyl2x", OPC(0xd9, 0xf1) - 1, st_pop(f))
BINARY(fyl2xp1, 1, 1, 0, "fyl2xp1", OPC(0xd9, 0xf9) - 1, st_pop(f))
BINARY(fpatan, 1, 1, 0, "fpatan", OPC(0xd9, 0xf3) - 1, st_pop(f))

OP(fchs)
{
    struct fpu *f = &c->fpu;
    if (UNLIKELY(!st_full(f, 0) || x87_strict(f))) X87_SLOW(OPC(0xd9, 0xe0), 0);
    st_reg(f, 0)[9] ^= 0x80;
    f->fsw &= (uint16_t)~FSW_C1;
    x87_note(c, i);
    NEXT();
}

OP(fabs)
{
    struct fpu *f = &c->fpu;
    if (UNLIKELY(!st_full(f, 0) || x87_strict(f))) X87_SLOW(OPC(0xd9, 0xe1), 0);
    st_reg(f, 0)[9] &= 0x7f;
    f->fsw &= (uint16_t)~FSW_C1;
    x87_note(c, i);
    NEXT();
}

/* ---- comparison ---- */

/* Normal numbers, zeros and infinities compare without any flag. */
static ALWAYS_INLINE bool ext_ordinary(x87_ext v)
{
    uint32_t e = v.se & 0x7fff;
    return ext_normal(v) || (e == 0x7fff && v.m == BIT(63)) || (e | v.m) == 0;
}
/* FSW_C0: a < b, FSW_C3: equal. Both ordinary. */
static ALWAYS_INLINE uint32_t ext_compare(x87_ext a, x87_ext b)
{
    if ((a.m | b.m) == 0) return FSW_C3;
    if ((a.se ^ b.se) & 0x8000) return a.se & 0x8000 ? FSW_C0 : 0;
    if (a.se == b.se && a.m == b.m) return FSW_C3;
    bool below = a.se != b.se ? a.se < b.se : a.m < b.m; /* of magnitudes: the signs are equal */
    return below != (bool)(a.se & 0x8000) ? FSW_C0 : 0;
}
static ALWAYS_INLINE void set_codes(struct kvs_vcpu *c, uint32_t codes)
{
    c->fpu.fsw = (uint16_t)((c->fpu.fsw & ~(FSW_C0 | FSW_C1 | FSW_C2 | FSW_C3)) | codes);
}
/* FCOMI writes ZF and CF where FCOM writes C3 and C0, and clears OF, SF, AF and PF. The host keeps C1. */
static ALWAYS_INLINE void set_eflags(struct kvs_vcpu *c, uint32_t codes)
{
    c->fl = (uint16_t)((codes & FSW_C0) | (codes & FSW_C3) | 0x200u); /* bits 8 and 14 both here and there */
}

#define COMPARE(name, n, opc, SET, POP)                                       \
    OP(name)                                                                  \
    {                                                                         \
        struct fpu *f = &c->fpu;                                              \
        uint32_t num = n;                                                     \
        if (UNLIKELY(!st_full(f, 0) || !st_full(f, num) || x87_strict(f)))   \
            X87_SLOW((opc) + num, 0);                                         \
        x87_ext a = ext_load(st_reg(f, 0)), b = ext_load(st_reg(f, num));     \
        if (UNLIKELY(!ext_ordinary(a) || !ext_ordinary(b)))                   \
            X87_SLOW((opc) + num, 0);                                         \
        SET(c, ext_compare(a, b));                                            \
        POP;                                                                  \
        x87_note(c, i);                                                       \
        NEXT();                                                               \
    }
COMPARE(fcom_st, i->dst, OPC(0xd8, 0xd0), set_codes, )
COMPARE(fcomp_st, i->dst, OPC(0xd8, 0xd8), set_codes, st_pop(f))
COMPARE(fcompp, 1, OPC(0xde, 0xd9) - 1, set_codes, st_pop(f); st_pop(f))
COMPARE(fucom_st, i->dst, OPC(0xdd, 0xe0), set_codes, )
COMPARE(fucomp_st, i->dst, OPC(0xdd, 0xe8), set_codes, st_pop(f))
COMPARE(fucompp, 1, OPC(0xda, 0xe9) - 1, set_codes, st_pop(f); st_pop(f))
COMPARE(fcomi, i->src, OPC(0xdb, 0xf0), set_eflags, )
COMPARE(fcomip, i->src, OPC(0xdf, 0xf0), set_eflags, st_pop(f))
COMPARE(fucomi, i->src, OPC(0xdb, 0xe8), set_eflags, )
COMPARE(fucomip, i->src, OPC(0xdf, 0xe8), set_eflags, st_pop(f))

OP(ftst)
{
    struct fpu *f = &c->fpu;
    if (UNLIKELY(!st_full(f, 0) || x87_strict(f))) X87_SLOW(OPC(0xd9, 0xe4), 0);
    x87_ext a = ext_load(st_reg(f, 0));
    if (UNLIKELY(!ext_ordinary(a))) X87_SLOW(OPC(0xd9, 0xe4), 0);
    set_codes(c, ext_compare(a, (x87_ext){ 0, 0, true }));
    x87_note(c, i);
    NEXT();
}

/* SDM 2A "FXAM-Examine Floating-Point": never signals, not even on an empty register. */
static ALWAYS_INLINE uint32_t ext_class(x87_ext v)
{
    uint32_t e = v.se & 0x7fff;
    if (ext_normal(v)) return FSW_C2;
    if (e == 0) return v.m ? FSW_C3 | FSW_C2 : FSW_C3;
    if (!(v.m >> 63)) return 0; /* unsupported */
    return v.m << 1 ? FSW_C0 : FSW_C2 | FSW_C0;
}
OP(fxam)
{
    struct fpu *f = &c->fpu;
    if (UNLIKELY(x87_pending(f))) X87_SLOW(OPC(0xd9, 0xe5), 0);
    x87_ext v = ext_load(st_reg(f, 0));
    set_codes(c, (st_full(f, 0) ? ext_class(v) : FSW_C3 | FSW_C0) | (v.se & 0x8000 ? FSW_C1 : 0));
    x87_note(c, i);
    NEXT();
}

#define COMPARE_MEM(name, size, convert, opc, POP)                            \
    OP_LOAD(name, size)                                                       \
    {                                                                         \
        struct fpu *f = &c->fpu;                                              \
        if (UNLIKELY(!st_full(f, 0) || x87_strict(f))) X87_SLOW_LOAD(opc, size); \
        x87_ext a = ext_load(st_reg(f, 0)), b = convert;                      \
        if (UNLIKELY(!b.ok || !ext_ordinary(a))) X87_SLOW_LOAD(opc, size);    \
        set_codes(c, ext_compare(a, b));                                      \
        POP;                                                                  \
        x87_note_mem(c, i);                                                   \
        NEXT();                                                               \
    }
COMPARE_MEM(fcom_m32, 4, ext_from_f32(ld32(p)), OPC_MEM(0xd8, 2), )
COMPARE_MEM(fcomp_m32, 4, ext_from_f32(ld32(p)), OPC_MEM(0xd8, 3), st_pop(f))
COMPARE_MEM(fcom_m64, 8, ext_from_f64(ld64(p)), OPC_MEM(0xdc, 2), )
COMPARE_MEM(fcomp_m64, 8, ext_from_f64(ld64(p)), OPC_MEM(0xdc, 3), st_pop(f))
COMPARE_MEM(ficom_m32, 4, ext_from_int((int32_t)ld32(p)), OPC_MEM(0xda, 2), )
COMPARE_MEM(ficomp_m32, 4, ext_from_int((int32_t)ld32(p)), OPC_MEM(0xda, 3), st_pop(f))
COMPARE_MEM(ficom_m16, 2, ext_from_int((int16_t)ld16(p)), OPC_MEM(0xde, 2), )
COMPARE_MEM(ficomp_m16, 2, ext_from_int((int16_t)ld16(p)), OPC_MEM(0xde, 3), st_pop(f))
