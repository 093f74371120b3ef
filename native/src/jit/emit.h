/* Host instructions, byte by byte. SDM 2A "Instruction Format" */
#ifndef KVS_JIT_EMIT_H
#define KVS_JIT_EMIT_H

#include "../util.h"

struct emit { uint8_t *p, *end; bool full; };

enum { H_RAX, H_RCX, H_RDX, H_RBX, H_RSP, H_RBP, H_RSI, H_RDI, H_R8, H_R9, H_R10, H_R11, H_R12, H_R13, H_R14, H_R15, H_NONE = 16 };

static inline void e8(struct emit *e, uint32_t b)
{
    if (UNLIKELY(e->p >= e->end)) e->full = true;
    else *e->p++ = (uint8_t)b;
}
static inline void e16(struct emit *e, uint32_t v) { e8(e, v); e8(e, v >> 8); }
static inline void e32(struct emit *e, uint32_t v) { e16(e, v); e16(e, v >> 16); }
static inline void e64(struct emit *e, uint64_t v) { e32(e, (uint32_t)v); e32(e, (uint32_t)(v >> 32)); }

/* A register or a memory operand. */
struct rm {
    uint8_t reg;         /* H_...; not used when memory */
    bool memory;
    uint8_t base, index; /* H_... or H_NONE */
    uint8_t scale;       /* shift count */
    int32_t disp;
};
static inline struct rm rm_reg(uint32_t reg) { return (struct rm){ .reg = (uint8_t)reg }; }
static inline struct rm rm_mem(uint32_t base, int32_t disp)
{
    return (struct rm){ .memory = true, .base = (uint8_t)base, .index = H_NONE, .disp = disp };
}
static inline struct rm rm_sib(uint32_t base, uint32_t index, uint32_t scale, int32_t disp)
{
    return (struct rm){ .memory = true, .base = (uint8_t)base, .index = (uint8_t)index, .scale = (uint8_t)scale, .disp = disp };
}

/* Opcode with what belongs to it. */
#define OPC_0F 0x100u
#define OPC_38 0x200u
#define OPC_3A 0x300u
#define OPC_MAP(o) (((o) >> 8) & 3)
#define OPC_66 0x1000u
#define OPC_F3 0x2000u
#define OPC_F2 0x3000u
#define OPC_PP(o) (((o) >> 12) & 3)
#define OPC_W 0x10000u     /* REX.W, VEX.W */
#define OPC_BYTE 0x20000u  /* the register operands are byte registers: SPL... need a REX prefix */
#define OPC_LOCK 0x40000u
#define OPC_L 0x80000u     /* VEX.L */

static inline void e_modrm(struct emit *e, uint32_t reg, struct rm m)
{
    reg = (reg & 7) << 3;
    if (!m.memory) {
        e8(e, 0xc0 | reg | (m.reg & 7));
        return;
    }
    bool sib = m.index != H_NONE || (m.base & 7) == 4 || m.base == H_NONE;
    if (m.base == H_NONE) {
        e8(e, reg | 4);
        e8(e, (uint32_t)m.scale << 6 | (m.index == H_NONE ? 4u : m.index & 7u) << 3 | 5);
        e32(e, (uint32_t)m.disp);
        return;
    }
    uint32_t mod = m.disp == 0 && (m.base & 7) != 5 ? 0 : m.disp == (int8_t)m.disp ? 1 : 2;
    e8(e, mod << 6 | reg | (sib ? 4 : m.base & 7u));
    if (sib) e8(e, (uint32_t)m.scale << 6 | (m.index == H_NONE ? 4u : m.index & 7u) << 3 | (m.base & 7u));
    if (mod == 1) e8(e, (uint32_t)m.disp);
    else if (mod == 2) e32(e, (uint32_t)m.disp);
}

static inline uint32_t rm_b(struct rm m) { return m.memory ? (m.base != H_NONE && m.base >= 8) : m.reg >= 8; }
static inline uint32_t rm_x(struct rm m) { return m.memory && m.index != H_NONE && m.index >= 8; }

/* reg: H_..., an XMM number, or the opcode extension. */
static inline void e_op(struct emit *e, uint32_t opc, uint32_t reg, struct rm m)
{
    static const uint8_t prefix[4] = { 0, 0x66, 0xf3, 0xf2 };
    if (opc & OPC_LOCK) e8(e, 0xf0);
    if (OPC_PP(opc)) e8(e, prefix[OPC_PP(opc)]);
    uint32_t rex = (opc & OPC_W ? 8u : 0) | (reg >= 8 ? 4u : 0) | rm_x(m) << 1 | rm_b(m);
    if (rex || ((opc & OPC_BYTE) && ((reg >= 4 && reg < 8) || (!m.memory && m.reg >= 4)))) e8(e, 0x40 | rex);
    switch (OPC_MAP(opc)) {
    case 1: e8(e, 0x0f); break;
    case 2: e16(e, 0x380f); break;
    case 3: e16(e, 0x3a0f); break;
    default: break;
    }
    e8(e, opc & 0xff);
    e_modrm(e, reg, m);
}

static inline void e_vex(struct emit *e, uint32_t opc, uint32_t reg, uint32_t vvvv, struct rm m)
{
    e8(e, 0xc4);
    e8(e, (reg >= 8 ? 0 : 0x80u) | (rm_x(m) ? 0 : 0x40u) | (rm_b(m) ? 0 : 0x20u) | OPC_MAP(opc));
    e8(e, (opc & OPC_W ? 0x80u : 0) | (~vvvv & 15) << 3 | (opc & OPC_L ? 4u : 0) | OPC_PP(opc));
    e8(e, opc & 0xff);
    e_modrm(e, reg, m);
}

/* ---- common shapes; _w: width in bytes ---- */
static inline uint32_t opc_w(uint32_t opc, uint32_t w) /* opc: the word form; bit 0 clear makes it a byte form */
{
    return w == 1 ? (opc & ~1u) | OPC_BYTE : w == 2 ? opc | OPC_66 : w == 8 ? opc | OPC_W : opc;
}
static inline void e_mov(struct emit *e, uint32_t dst, uint32_t src) { e_op(e, 0x89 | OPC_W, src, rm_reg(dst)); }
static inline void e_load(struct emit *e, uint32_t w, uint32_t dst, struct rm m) { e_op(e, opc_w(0x8b, w), dst, m); }
static inline void e_store(struct emit *e, uint32_t w, struct rm m, uint32_t src) { e_op(e, opc_w(0x89, w), src, m); }
static inline void e_lea(struct emit *e, uint32_t dst, struct rm m) { e_op(e, 0x8d | OPC_W, dst, m); }
static inline void e_mov_imm(struct emit *e, uint32_t dst, uint64_t v)
{
    if (v <= UINT32_MAX) {
        if (dst >= 8) e8(e, 0x41);
        e8(e, 0xb8 | (dst & 7));
        e32(e, (uint32_t)v);
    } else if ((int64_t)v == (int32_t)v) {
        e_op(e, 0xc7 | OPC_W, 0, rm_reg(dst));
        e32(e, (uint32_t)v);
    } else {
        e8(e, dst >= 8 ? 0x49 : 0x48);
        e8(e, 0xb8 | (dst & 7));
        e64(e, v);
    }
}
/* An immediate of width w (4 bytes, sign-extended, for 8). */
static inline void e_imm(struct emit *e, uint32_t w, uint64_t v)
{
    if (w == 1) e8(e, (uint32_t)v);
    else if (w == 2) e16(e, (uint32_t)v);
    else e32(e, (uint32_t)v);
}

/* Forward jumps: the site of the displacement, filled in later. Targets lie in the same code cache. */
static inline uint8_t *e_jcc(struct emit *e, uint32_t cond)
{
    e8(e, 0x0f);
    e8(e, 0x80 | cond);
    e32(e, 0);
    return e->p - 4;
}
static inline uint8_t *e_jmp(struct emit *e)
{
    e8(e, 0xe9);
    e32(e, 0);
    return e->p - 4;
}
static inline void e_land(struct emit *e, uint8_t *site)
{
    if (!e->full) st32(site, (uint32_t)(e->p - (site + 4)));
}
static inline void e_jmp_to(struct emit *e, const uint8_t *target)
{
    e8(e, 0xe9);
    e32(e, (uint32_t)(target - (e->p + 4)));
}
static inline void e_jcc_to(struct emit *e, uint32_t cond, const uint8_t *target)
{
    e8(e, 0x0f);
    e8(e, 0x80 | cond);
    e32(e, (uint32_t)(target - (e->p + 4)));
}
static inline void e_call_to(struct emit *e, const uint8_t *target)
{
    e8(e, 0xe8);
    e32(e, (uint32_t)(target - (e->p + 4)));
}
enum { CC_O, CC_NO, CC_B, CC_AE, CC_E, CC_NE, CC_BE, CC_A, CC_S, CC_NS, CC_P, CC_NP, CC_L, CC_GE, CC_LE, CC_G };

#endif
