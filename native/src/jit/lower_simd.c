/* SSE and AVX instructions in host code: the same opcode on the same vector registers. */
#include "jit_int.h"

/* Operand kinds that may pass: registers and memory that ModRM and VEX.vvvv name, and immediates. */
static bool is_vector(uint32_t k) { return (k >= Vx && k <= Ul) || k == Hx || k == Hl; }
static bool is_general(uint32_t k)
{
    return k == Gd || k == Gy || k == Ey || k == Ed || k == RdMb || k == RdMw || k == RyMd || k == Ew || k == Eb;
}
static bool is_modrm_reg(uint32_t k) { return k == Vx || k == Vl || k == Gd || k == Gy; }
static bool is_vvvv(uint32_t k) { return k == Hx || k == Hl; }
static bool is_immediate(uint32_t k) { return k == Ib || k == Lx || k == Ll; }
static bool is_plain_memory(uint32_t k) { return k == Mb || k == Mw || k == Md || k == Mq || k == Mdq || k == Ml; }

/* Instructions with operands that no field names, or that are more than their operands. */
static bool excluded(uint32_t op)
{
    switch (op) {
    case OP_maskmovdqu: case OP_ldmxcsr: case OP_stmxcsr: case OP_pcmpestri: case OP_pcmpestrm: case OP_pcmpistri:
    case OP_pcmpistrm: case OP_vpcmpestri: case OP_vpcmpestrm: case OP_vpcmpistri: case OP_vpcmpistrm: case OP_vmaskmovdqu:
    case OP_vldmxcsr: case OP_vstmxcsr: return true;
    default: return false;
    }
}

enum kind simd_classify(struct trans *t, struct tinsn *x)
{
    const struct decoded *d = &x->d;
    const struct row_info *row = &isa_row[d->row];
    const struct op_info *op = &isa_op[d->op];
    if (!(d->attr & (A_SSE | A_AVX)) || (d->attr & (A_MMX | A_X87 | A_SYS)) || excluded(d->op)) return K_HELPER;
    if (d->vex && op->cls != VEX_SIMD && d->is_mem) return K_HELPER; /* masked and gathered */
    if (((d->attr & A_FP) || d->op == OP_vcvtps2ph) && (t->b->mode & MODE_SSE_TRAPS)) return K_HELPER;
    if (d->is_mem && !(x->s->seg & INSN_FAST)) return K_HELPER;
    for (uint32_t n = 0; n < OPERANDS; n++) {
        uint32_t k = row->k[n];
        if (k == NA || is_immediate(k) || k == XMM0_ || is_vector(k) || is_general(k) || is_plain_memory(k)) continue;
        return K_HELPER;
    }
    x->touches = d->is_mem;
    x->writes = op->written ? F_OSZAPC : 0;
    if (op->written && op->written != F_OSZAPC) return K_HELPER;
    if (is_general(row->k[0]) && !(d->is_mem && !is_modrm_reg(row->k[0])))
        x->regs = 1u << (is_modrm_reg(row->k[0]) ? d->reg : d->rm);
    t->simd = true;
    return K_SIMD;
}

void simd_emit(struct trans *t, uint32_t k)
{
    struct emit *e = &t->e;
    const struct tinsn *x = &t->t[k];
    const struct decoded *d = &x->d;
    const struct row_info *row = &isa_row[d->row];
    static const uint32_t maps[MAP_COUNT] = { [M0F] = OPC_0F, [M38] = OPC_38, [M3A] = OPC_3A, [V1] = OPC_0F, [V2] = OPC_38, [V3] = OPC_3A };
    uint32_t opc = d->opcode | maps[d->map] | (d->rex & 8 ? OPC_W : 0);
    if (d->op == OP_vzero) {
        e8(e, 0xc5);
        e8(e, d->vl ? 0xfc : 0xf8);
        e8(e, 0x77);
        return;
    }
    if (d->vex) opc |= (d->vex_pp - NP) * OPC_66 | (d->vl ? OPC_L : 0);
    if (d->mandatory_prefix) opc |= d->rep == 0xf3 ? OPC_F3 : d->rep == 0xf2 ? OPC_F2 : d->opsize66 ? OPC_66 : 0;
    uint32_t reg = d->reg, n_rm = 0, n_reg = OPERANDS;
    for (uint32_t n = 0; n < OPERANDS; n++) {
        uint32_t kind = row->k[n];
        if (kind == NA || is_immediate(kind) || kind == XMM0_ || is_vvvv(kind)) continue;
        if (is_modrm_reg(kind)) n_reg = n;
        else n_rm = n;
    }
    uint32_t rm_kind = row->k[n_rm];
    struct rm m;
    t->free = H_R12;
    struct dest dst = { 0 };
    bool close = false;
    if (d->is_mem) {
        uint32_t size = operand_size(d, (int)n_rm);
        m = access_of(t, k, n_rm == 0 ? TLB_W : TLB_R, size, d->attr & A_ALIGN ? size - 1 : 0);
    } else if (is_general(rm_kind) && n_rm == 0) {
        dst = gpr_open(t, d->rm, 4, false, true, t->free); /* the upper half is cleared, or written with REX.W */
        close = true;
        m = dst.m;
    } else if (is_general(rm_kind)) {
        m = gpr_source(t, d->rm, 8);
    } else {
        m = rm_reg(d->rm);
    }
    if (n_reg < OPERANDS && is_general(row->k[n_reg])) {
        dst = gpr_open(t, d->reg, 4, false, true, t->free);
        close = true;
        reg = dst.m.reg;
    }
    if (d->vex) e_vex(e, opc, reg, d->vvvv, m);
    else e_op(e, opc, reg, m);
    for (uint32_t n = 1; n < OPERANDS; n++)
        if (is_immediate(row->k[n])) e8(e, (uint32_t)d->imm);
    if (close) gpr_close(t, dst);
}
