/* Integer arithmetic, logic, shifts and moves: see op_alu.inc.h for the forms. */
#include "interp.h"
#include "../isa/sem_alu.h"

#define W 8
#include "op_alu.inc.h"
#define W 16
#include "op_alu.inc.h"
#define W 32
#include "op_alu.inc.h"
#define W 64
#include "op_alu.inc.h"

/* MOVZX, MOVSX, MOVSXD: source width and signedness by name, destination width by suffix. */
#define EXTEND_FORMS(name, S, D, assign)                                                          \
    OP(name##_r) { S v = (S)(sizeof(S) == 1 ? REG8(i->src) : c->gpr[i->src]); assign; NEXT(); }   \
    OPX(name##_m_slow)                                                                            \
    {                                                                                             \
        S v;                                                                                      \
        int st = insn_read(c, i, &v, sizeof v);                                                   \
        if (st == ST_OK) { assign; }                                                              \
        return st;                                                                                \
    }                                                                                             \
    OP(name##_m)                                                                                  \
    {                                                                                             \
        FAST_HOST(S, p, TLB_R, op_##name##_m_slow);                                               \
        S v = *p;                                                                                 \
        assign;                                                                                   \
        NEXT();                                                                                   \
    }                                                                                             \
    OP(name##_mx)                                                                                 \
    {                                                                                             \
        FAST_HOST_X(S, p, TLB_R, op_##name##_m_slow);                                             \
        S v = *p;                                                                                 \
        assign;                                                                                   \
        NEXT();                                                                                   \
    }
#define TO16 REG16(i->dst) = (uint16_t)v
#define TO32 SET32(i->dst, v)
#define TO64 REG64(i->dst) = (uint64_t)(int64_t)v
EXTEND_FORMS(movzx8_16, uint8_t, uint16_t, TO16)
EXTEND_FORMS(movzx8_32, uint8_t, uint32_t, TO32)
EXTEND_FORMS(movzx8_64, uint8_t, uint64_t, TO64)
EXTEND_FORMS(movzx16_16, uint16_t, uint16_t, TO16)
EXTEND_FORMS(movzx16_32, uint16_t, uint32_t, TO32)
EXTEND_FORMS(movzx16_64, uint16_t, uint64_t, TO64)
EXTEND_FORMS(movsx8_16, int8_t, uint16_t, TO16)
EXTEND_FORMS(movsx8_32, int8_t, uint32_t, TO32)
EXTEND_FORMS(movsx8_64, int8_t, uint64_t, TO64)
EXTEND_FORMS(movsx16_16, int16_t, uint16_t, TO16)
EXTEND_FORMS(movsx16_32, int16_t, uint32_t, TO32)
EXTEND_FORMS(movsx16_64, int16_t, uint64_t, TO64)
EXTEND_FORMS(movsx32_16, int32_t, uint16_t, TO16)
EXTEND_FORMS(movsx32_32, int32_t, uint32_t, TO32)
EXTEND_FORMS(movsx32_64, int32_t, uint64_t, TO64)

/* LEA never touches memory; the offset is cut to the address size, then to the operand size. */
OP(lea64) { REG64(i->dst) = insn_ea(c, i); NEXT(); }
OP(lea32) { SET32(i->dst, insn_ea(c, i)); NEXT(); }
OP(lea) { reg_set(c, i->dst, INSN_OSIZE(i), INSN_ASIZE(i) == 8 ? insn_ea(c, i) : INSN_ASIZE(i) == 4 ? (uint32_t)insn_ea(c, i) : (uint16_t)insn_ea(c, i)); NEXT(); }

OP(nop) { NEXT(); }
OP(prefetchw) { NEXT(); }

OPX(mov_moffs)
{
    uint32_t size = INSN_OSIZE(i), seg = i->seg & ~(uint32_t)INSN_FAST;
    uint64_t v = 0;
    if (i->dst == INSN_MEM) {
        v = reg_get(c, RAX, size);
        return vwrite(c, seg, i->imm, &v, size);
    }
    int st = vread(c, seg, i->imm, &v, size);
    if (st == ST_OK) reg_set(c, RAX, size, v);
    return st;
}

OP(xchg32_rr) { uint64_t a = REG32(i->dst), b = REG32(i->src); c->gpr[i->dst] = b; c->gpr[i->src] = a; NEXT(); }
OP(xchg64_rr) { uint64_t a = REG64(i->dst), b = REG64(i->src); c->gpr[i->dst] = b; c->gpr[i->src] = a; NEXT(); }
/* With memory XCHG is locked whether or not it says so. SDM 2C "XCHG" */
OPX(xchg)
{
    uint32_t size = INSN_OSIZE(i);
    if (i->dst != INSN_MEM) {
        uint64_t a = reg_get(c, i->dst, size), b = reg_get(c, i->src, size);
        reg_set(c, i->dst, size, b);
        reg_set(c, i->src, size, a);
        return ST_OK;
    }
    int st = vrmw_begin_locked(c, i->seg, insn_offset(c, i), size);
    if (st != ST_OK) return st;
    void *p = c->rmw.host ? (void *)c->rmw.host : (void *)c->rmw.data;
    uint64_t v = reg_get(c, i->src, size);
    switch (size) {
    case 1: v = __atomic_exchange_n((uint8_t *)p, (uint8_t)v, __ATOMIC_SEQ_CST); break;
    case 2: v = __atomic_exchange_n((uint16_t *)p, (uint16_t)v, __ATOMIC_SEQ_CST); break;
    case 4: v = __atomic_exchange_n((uint32_t *)p, (uint32_t)v, __ATOMIC_SEQ_CST); break;
    default: v = __atomic_exchange_n((uint64_t *)p, v, __ATOMIC_SEQ_CST); break;
    }
    reg_set(c, i->src, size, v);
    vrmw_end_locked(c);
    return ST_OK;
}

OP(cbw)
{
    switch (INSN_OSIZE(i)) {
    case 2: REG16(RAX) = (uint16_t)(int8_t)c->gpr[RAX]; break;
    case 4: SET32(RAX, (int16_t)c->gpr[RAX]); break;
    default: c->gpr[RAX] = (uint64_t)(int32_t)c->gpr[RAX]; break;
    }
    NEXT();
}
OP(cwd)
{
    switch (INSN_OSIZE(i)) {
    case 2: REG16(RDX) = (uint16_t)((int16_t)c->gpr[RAX] >> 15); break;
    case 4: SET32(RDX, (int32_t)c->gpr[RAX] >> 31); break;
    default: c->gpr[RDX] = (uint64_t)((int64_t)c->gpr[RAX] >> 63); break;
    }
    NEXT();
}

OP(sahf) { c->fl = (uint16_t)((c->fl & 1) | (REG8(RAX * 8 + 1) & 0xd5) << 8 | 0x200); NEXT(); }
OP(lahf) { REG8(RAX * 8 + 1) = (uint8_t)((c->fl >> 8 & 0xd5) | 2); NEXT(); }
OP(cmc) { c->fl ^= 0x100; NEXT(); }
OP(clc) { c->fl &= (uint16_t)~0x100; NEXT(); }
OP(stc) { c->fl |= 0x100; NEXT(); }
OP(cld) { c->eflags &= ~FLAG_DF; NEXT(); }
OP(std) { c->eflags |= FLAG_DF; NEXT(); }
OP(salc) { REG8(RAX * 8) = c->fl & 0x100 ? 0xff : 0; NEXT(); }

/* SETcc and CMOVcc: one handler per condition, so that the test is a constant. */
#define CONDITIONS(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11) X(12) X(13) X(14) X(15)
#define SETCC(cc) OP(setcc_##cc) { REG8(i->dst) = cond_test(c->fl, cc); NEXT(); }
CONDITIONS(SETCC)
OPX(setcc_m)
{
    uint8_t v = cond_test(c->fl, i->flags & 15);
    return insn_write(c, i, &v, 1);
}
#define CMOV(cc)                                                                                  \
    OP(cmov32_##cc) { c->gpr[i->dst] = cond_test(c->fl, cc) ? REG32(i->src) : REG32(i->dst); NEXT(); } \
    OP(cmov64_##cc) { c->gpr[i->dst] = cond_test(c->fl, cc) ? REG64(i->src) : REG64(i->dst); NEXT(); }
CONDITIONS(CMOV)
/* 16 bits, or memory: the operand is read whatever the condition says. SDM 2A "CMOVcc" */
OPX(cmov_any)
{
    uint32_t size = INSN_OSIZE(i);
    uint64_t v;
    int st = rm_read(c, i, i->src, size, &v);
    if (st != ST_OK) return st;
    if (!cond_test(c->fl, i->flags & 15)) v = reg_get(c, i->dst, size);
    reg_set(c, i->dst, size, v);
    return ST_OK;
}
