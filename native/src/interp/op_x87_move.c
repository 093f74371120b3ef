/* x87 data transfer: loads, stores, exchanges, conditional moves, constants. */
#include "x87_int.h"

/* ---- loads ---- */
#define LOAD_MEM(name, size, convert, opc)                                    \
    OP_LOAD(name, size)                                                       \
    {                                                                         \
        struct fpu *f = &c->fpu;                                              \
        if (UNLIKELY(!st_can_push(f))) X87_SLOW_LOAD(opc, size);              \
        x87_ext v = convert;                                                  \
        if (UNLIKELY(!v.ok)) X87_SLOW_LOAD(opc, size);                        \
        ext_store(st_reg(f, 7), v.m, v.se);                                   \
        st_pushed(f);                                                         \
        x87_note_mem(c, i);                                                   \
        NEXT();                                                               \
    }
LOAD_MEM(fld_m32, 4, ext_from_f32(ld32(p)), OPC_MEM(0xd9, 0))
LOAD_MEM(fld_m64, 8, ext_from_f64(ld64(p)), OPC_MEM(0xdd, 0))
LOAD_MEM(fld_m80, 10, ext_load(p), OPC_MEM(0xdb, 5))
LOAD_MEM(fild_m16, 2, ext_from_int((int16_t)ld16(p)), OPC_MEM(0xdf, 0))
LOAD_MEM(fild_m32, 4, ext_from_int((int32_t)ld32(p)), OPC_MEM(0xdb, 0))
LOAD_MEM(fild_m64, 8, ext_from_int((int64_t)ld64(p)), OPC_MEM(0xdf, 5))

OP(fld_st)
{
    struct fpu *f = &c->fpu;
    if (UNLIKELY(!st_can_push(f) || !st_full(f, i->dst))) X87_SLOW(OPC(0xd9, 0xc0 + i->dst), 0);
    x87_ext v = ext_load(st_reg(f, i->dst));
    ext_store(st_reg(f, 7), v.m, v.se);
    st_pushed(f);
    x87_note(c, i);
    NEXT();
}

#define LOAD_CONSTANT(name, m, se, modrm)                                     \
    OP(name)                                                                  \
    {                                                                         \
        struct fpu *f = &c->fpu;                                              \
        if (UNLIKELY(!st_can_push(f))) X87_SLOW(OPC(0xd9, modrm), 0);         \
        ext_store(st_reg(f, 7), m, se);                                       \
        st_pushed(f);                                                         \
        x87_note(c, i);                                                       \
        NEXT();                                                               \
    }
LOAD_CONSTANT(fld1, BIT(63), 0x3fff, 0xe8)
LOAD_CONSTANT(fldz, 0, 0, 0xee)

/* Rounded by the guest's rounding control; no flag but C1, which a push clears. */
#define LOAD_ROUNDED(name, modrm)                                             \
    OP(name)                                                                  \
    {                                                                         \
        struct fpu *f = &c->fpu;                                              \
        if (UNLIKELY(!st_can_push(f))) X87_SLOW(OPC(0xd9, modrm), 0);         \
        host_begin(f);                                                        \
        __asm__ volatile(#name "; fstpt %0" : "=m"(HOST_REG(st_reg(f, 7))));  \
        host_end();                                                           \
        st_pushed(f);                                                         \
        x87_note(c, i);                                                       \
        NEXT();                                                               \
    }
LOAD_ROUNDED(fldl2t, 0xe9)
LOAD_ROUNDED(fldl2e, 0xea)
LOAD_ROUNDED(fldpi, 0xeb)
LOAD_ROUNDED(fldlg2, 0xec)
LOAD_ROUNDED(fldln2, 0xed)

/* ---- register moves ---- */
OP(fxch)
{
    struct fpu *f = &c->fpu;
    if (UNLIKELY(!st_full(f, 0) || !st_full(f, i->dst) || x87_strict(f))) X87_SLOW(OPC(0xd9, 0xc8 + i->dst), 0);
    x87_ext a = ext_load(st_reg(f, 0)), b = ext_load(st_reg(f, i->dst));
    ext_store(st_reg(f, 0), b.m, b.se);
    ext_store(st_reg(f, i->dst), a.m, a.se);
    f->fsw &= (uint16_t)~FSW_C1;
    x87_note(c, i);
    NEXT();
}

#define STORE_ST(name, modrm, POP)                                            \
    OP(name)                                                                  \
    {                                                                         \
        struct fpu *f = &c->fpu;                                              \
        if (UNLIKELY(!st_full(f, 0) || x87_strict(f)))                       \
            X87_SLOW(OPC(0xdd, modrm + i->dst), 0);                           \
        x87_ext v = ext_load(st_reg(f, 0));                                   \
        ext_store(st_reg(f, i->dst), v.m, v.se);                              \
        f->tags |= (uint8_t)(1u << st_index(f, i->dst));                      \
        f->fsw &= (uint16_t)~FSW_C1;                                          \
        POP;                                                                  \
        x87_note(c, i);                                                       \
        NEXT();                                                               \
    }
STORE_ST(fst_st, 0xd0, )
STORE_ST(fstp_st, 0xd8, st_pop(f))

/* c->fl holds AH of LAHF in bits 8-15. A false condition changes nothing but the pointers; C1 stays either way. */
#define FL_CF 0x100u
#define FL_PF 0x400u
#define FL_ZF 0x4000u
#define CMOV(name, byte, modrm, flags, want)                                  \
    OP(name)                                                                  \
    {                                                                         \
        struct fpu *f = &c->fpu;                                              \
        if (UNLIKELY(!st_full(f, 0) || !st_full(f, i->src) || x87_strict(f))) \
            X87_SLOW(OPC(byte, modrm + i->src), 0);                           \
        if (!!(c->fl & (flags)) == want) {                                    \
            x87_ext v = ext_load(st_reg(f, i->src));                          \
            ext_store(st_reg(f, 0), v.m, v.se);                               \
        }                                                                     \
        x87_note(c, i);                                                       \
        NEXT();                                                               \
    }
CMOV(fcmovb, 0xda, 0xc0, FL_CF, 1)
CMOV(fcmove, 0xda, 0xc8, FL_ZF, 1)
CMOV(fcmovbe, 0xda, 0xd0, FL_CF | FL_ZF, 1)
CMOV(fcmovu, 0xda, 0xd8, FL_PF, 1)
CMOV(fcmovnb, 0xdb, 0xc0, FL_CF, 0)
CMOV(fcmovne, 0xdb, 0xc8, FL_ZF, 0)
CMOV(fcmovnbe, 0xdb, 0xd0, FL_CF | FL_ZF, 0)
CMOV(fcmovnu, 0xdb, 0xd8, FL_PF, 0)

/* ---- stores ---- */

/*
 * The general store: the host converts ST(0) into a local, which is written before anything else
 * changes. `insn` pops the host's stack.
 */
#define STORE_CONVERT(name, size, insn, opc, POP)                             \
    static NOINLINE int convert_##name(OPARGS)                                \
    {                                                                         \
        struct fpu *f = &c->fpu;                                              \
        uint8_t out[size], *p;                                                \
        uint16_t sw;                                                          \
        int st = ST_OK;                                                       \
        UNUSED_OPARGS;                                                        \
        if (UNLIKELY(!st_full(f, 0) || x87_strict(f))) return x87_whole(c, i, opc, -size); \
        host_begin(f);                                                        \
        __asm__ volatile("fldt %2; " insn " %1; fnstsw %0"                    \
                         : "=a"(sw), "=m"(out) : "m"(HOST_REG(st_reg(f, 0)))); \
        host_end();                                                           \
        if (UNLIKELY(sw & ~(uint32_t)f->fcw & FSW_FLAGS)) return x87_whole(c, i, opc, -size); \
        if ((p = insn_probe(c, i, TLB_W, size)) != NULL) {                    \
            memcpy(p, out, size);                                             \
        } else {                                                              \
            st = insn_write(c, i, out, size);                                 \
            if (x87_not_done(st)) return st;                                  \
            st = x87_stored(c, st);                                           \
        }                                                                     \
        host_flags(f, sw, 0);                                                 \
        POP;                                                                  \
        x87_note_mem(c, i);                                                   \
        return st;                                                            \
    }                                                                         \
    static NOINLINE int store_##name(OPARGS)                                  \
    {                                                                         \
        int st = convert_##name(c, i, budget);                                \
        if (UNLIKELY(st != ST_OK)) return leave(c, i, budget, st);            \
        NEXT();                                                               \
    }
#define STORE_INT(name, size, insn, opc, POP)                                 \
    STORE_CONVERT(name, size, insn, opc, POP)                                 \
    OP(name) { return store_##name(c, i, budget); }
STORE_INT(fist_m16, 2, "fistps", OPC_MEM(0xdf, 2), )
STORE_INT(fist_m32, 4, "fistpl", OPC_MEM(0xdb, 2), )
STORE_INT(fistp_m16, 2, "fistps", OPC_MEM(0xdf, 3), st_pop(f))
STORE_INT(fistp_m32, 4, "fistpl", OPC_MEM(0xdb, 3), st_pop(f))
STORE_INT(fistp_m64, 8, "fistpll", OPC_MEM(0xdf, 7), st_pop(f))
STORE_INT(fisttp_m16, 2, "fisttps", OPC_MEM(0xdf, 1), st_pop(f))
STORE_INT(fisttp_m32, 4, "fisttpl", OPC_MEM(0xdb, 1), st_pop(f))
STORE_INT(fisttp_m64, 8, "fisttpll", OPC_MEM(0xdd, 1), st_pop(f))

/* A value that the narrow format holds exactly needs no host: no rounding, no flag, C1 clear. */
#define STORE_FLOAT(name, type, insn, opc, POP, ebits, mbits)                 \
    STORE_CONVERT(name, (int)sizeof(type), insn, opc, POP)                    \
    OP(name)                                                                  \
    {                                                                         \
        struct fpu *f = &c->fpu;                                              \
        uint8_t *p = insn_probe(c, i, TLB_W, sizeof(type));                   \
        if (UNLIKELY(!p || !st_full(f, 0) || x87_strict(f))) return store_##name(c, i, budget); \
        x87_ext v = ext_load(st_reg(f, 0));                                   \
        uint32_t e = (v.se & 0x7fff) - 16383 + ((1u << (ebits - 1)) - 1);     \
        type sign = (type)(v.se >> 15) << (sizeof(type) * 8 - 1);             \
        type out;                                                             \
        if (LIKELY(!(v.m & (BIT(63 - mbits) - 1)) && v.m >> 63 && e - 1 < (1u << ebits) - 2)) \
            out = sign | (type)e << mbits | (type)(v.m << 1 >> (64 - mbits)); \
        else if ((v.m | (v.se & 0x7fff)) == 0)                                \
            out = sign;                                                       \
        else                                                                  \
            return store_##name(c, i, budget);                                \
        memcpy(p, &out, sizeof(type));                                        \
        f->fsw &= (uint16_t)~FSW_C1;                                          \
        POP;                                                                  \
        x87_note_mem(c, i);                                                   \
        NEXT();                                                               \
    }
STORE_FLOAT(fst_m32, uint32_t, "fstps", OPC_MEM(0xd9, 2), , 8, 23)
STORE_FLOAT(fstp_m32, uint32_t, "fstps", OPC_MEM(0xd9, 3), st_pop(f), 8, 23)
STORE_FLOAT(fst_m64, uint64_t, "fstpl", OPC_MEM(0xdd, 2), , 11, 52)
STORE_FLOAT(fstp_m64, uint64_t, "fstpl", OPC_MEM(0xdd, 3), st_pop(f), 11, 52)

STORE_CONVERT(fstp_m80, 10, "fstpt", OPC_MEM(0xdb, 7), st_pop(f))
OP(fstp_m80)
{
    struct fpu *f = &c->fpu;
    uint8_t *p = insn_probe(c, i, TLB_W, 10);
    if (UNLIKELY(!p || !st_full(f, 0) || x87_strict(f))) return store_fstp_m80(c, i, budget);
    x87_ext v = ext_load(st_reg(f, 0));
    ext_store(p, v.m, v.se);
    st_pop(f);
    f->fsw &= (uint16_t)~FSW_C1;
    x87_note_mem(c, i);
    NEXT();
}
