/* General-purpose instructions in host code. */
#include "jit_int.h"

static bool has_imm(const struct decoded *d)
{
    uint32_t k = isa_row[d->row].k[1];
    return k >= Ib && k <= I1;
}

/* The bits in which ADD, OR, ADC, SBB, AND, SUB, XOR, CMP differ: opcode bits 3-5, and group 80-83. */
static uint32_t alu_number(uint32_t op)
{
    switch (op) {
    case OP_add: return 0;
    case OP_or: return 1;
    case OP_adc: return 2;
    case OP_sbb: return 3;
    case OP_and: return 4;
    case OP_sub: return 5;
    case OP_xor: return 6;
    default: return 7;
    }
}

/* A host atomic only inside a cache line, as in tier 0 (mmu/span.c): what is not aligned goes there. */
static uint32_t lock_alignment(const struct tinsn *x) { return x->d.lock || x->d.op == OP_xchg ? x->w - 1u : 0; }

static uint32_t reg_bit(uint32_t n, uint32_t w) { return n == INSN_MEM ? 0 : 1u << gpr_number(n, w); }

static void alu_recipe(struct tinsn *x)
{
    const struct kvs_insn *s = x->s;
    struct recipe *r = &x->recipe;
    bool imm = has_imm(&x->d);
    if (x->d.is_mem && s->dst == INSN_MEM) return;
    if (x->d.is_mem && (x->d.op == OP_add || x->d.op == OP_sub || x->d.op == OP_cmp || x->d.op == OP_test)) return;
    if (x->w == 1 && ((s->dst & 1) || (!imm && !x->d.is_mem && (s->src & 1)))) return;
    *r = (struct recipe){ .w = x->w, .a = s->dst, .b = imm ? INSN_MEM : s->src, .imm = (int32_t)x->d.imm };
    switch (x->d.op) {
    case OP_cmp: r->op = R_CMP; break;
    case OP_test: r->op = R_TEST; break;
    case OP_and: case OP_or: case OP_xor:
        r->op = R_TEST;
        r->b = r->a;
        break;
    case OP_add:
        if (!imm && s->src == s->dst) return;
        r->op = R_ADD;
        break;
    case OP_sub:
        r->op = !imm && s->src == s->dst ? R_CMP : R_SUB;
        break;
    default: return;
    }
    r->regs = reg_bit(r->a, r->w) | reg_bit(r->b, r->w);
}

/* What flags the instruction reads, and which it leaves to chance: those come in from before. */
static void set_flags(struct tinsn *x, uint32_t read, uint32_t written)
{
    x->writes = written;
    x->reads = read | (written && written != F_OSZAPC ? F_OSZAPC & ~written : 0);
    x->merges = x->reads && !read;
}

enum kind int_classify(struct trans *t, struct tinsn *x)
{
    const struct decoded *d = &x->d;
    const struct kvs_insn *s = x->s;
    const struct op_info *op = &isa_op[d->op];
    uint32_t w = x->w;
    bool imm = has_imm(d), fast = s->seg & INSN_FAST;
    if (d->is_mem && !(d->attr & A_NOFAULT)) {
        if (!fast) return K_HELPER;
        x->touches = true;
    }
    set_flags(x, op->read, op->written & ~op->undefined);
    switch (op->cls) {
    case ALU2: case TEST2: case MOVES:
        if (op->written) set_flags(x, op->read, F_OSZAPC);
        if (d->op != OP_cmp && d->op != OP_test) x->regs = reg_bit(s->dst, w);
        if (op->cls != MOVES) alu_recipe(x);
        return K_ALU;
    case UNARY:
        x->regs = reg_bit(s->dst, w);
        return K_UNARY;
    case SHIFT:
        x->regs = reg_bit(s->dst, w);
        if (isa_row[d->row].k[1] == CL_) set_flags(x, op->read, F_OC); /* a count of zero keeps them all */
        else if (s->imm == 0) set_flags(x, 0, 0);
        else if (d->op == OP_shl || d->op == OP_shr || d->op == OP_sar) set_flags(x, 0, F_OSZAPC);
        else set_flags(x, op->read, F_OC);
        return K_SHIFT;
    case EXTEND:
        x->regs = reg_bit(s->dst, 8);
        return w == 2 ? K_HELPER : K_EXTEND;
    case SETCC:
        x->regs = reg_bit(s->dst, 1);
        return K_SETCC;
    case CMOV:
        x->regs = reg_bit(s->dst, w);
        return w == 2 ? K_HELPER : K_CMOV;
    default: break;
    }
    switch (d->op) {
    case OP_nop: case OP_nop_hint: case OP_prefetchw: case OP_prefetchnta: case OP_prefetcht0: case OP_prefetcht1:
    case OP_prefetcht2: return d->rep ? K_HELPER : K_NOP;
    case OP_lfence: case OP_mfence: case OP_sfence: return K_FENCE;
    case OP_lea:
        x->regs = reg_bit(s->dst, w);
        return w == 2 || d->asize == 2 ? K_HELPER : K_LEA;
    case OP_push: case OP_push_i:
        if (w != 8 || (d->op == OP_push && s->dst == INSN_MEM)) return K_HELPER;
        x->touches = true;
        x->regs = 1u << RSP;
        return K_PUSH;
    case OP_pop:
        if (w != 8 || s->dst == INSN_MEM) return K_HELPER;
        x->touches = true;
        x->regs = 1u << RSP | reg_bit(s->dst, 8);
        return K_POP;
    case OP_leave:
        if (w != 8) return K_HELPER;
        x->touches = true;
        x->regs = 1u << RSP | 1u << RBP;
        return K_LEAVE_FRAME;
    case OP_xchg:
        if (w < 4) return K_HELPER;
        x->regs = reg_bit(s->dst, w) | reg_bit(s->src, w);
        return K_XCHG;
    case OP_cmpxchg:
        if (w < 4 || s->dst != INSN_MEM) return K_HELPER;
        x->regs = 1u << RAX;
        return K_CMPXCHG;
    case OP_xadd:
        if (w < 4 || s->dst != INSN_MEM) return K_HELPER;
        x->regs = reg_bit(s->src, w);
        return K_XADD;
    case OP_imul2: case OP_imul3:
        if (w < 4) return K_HELPER;
        x->regs = reg_bit(s->dst, w);
        return K_IMUL;
    case OP_mul: case OP_imul:
        if (w < 4) return K_HELPER;
        x->regs = 1u << RAX | 1u << RDX;
        return K_MUL;
    case OP_bsf: case OP_bsr: case OP_tzcnt: case OP_lzcnt: case OP_popcnt:
        if (w < 4) return K_HELPER;
        x->regs = reg_bit(s->dst, w);
        return K_SCAN;
    case OP_bt: case OP_bts: case OP_btr: case OP_btc:
        if (w < 4 || (d->is_mem && !imm)) return K_HELPER;
        if (d->op != OP_bt) x->regs = reg_bit(s->dst, w);
        return K_BT;
    case OP_bswap:
        if (w < 4) return K_HELPER;
        x->regs = reg_bit(s->dst, w);
        return K_BSWAP;
    case OP_cbw:
        x->regs = 1u << RAX;
        return K_WIDEN;
    case OP_cwd:
        x->regs = 1u << RDX;
        return K_WIDEN;
    case OP_clc: case OP_stc: case OP_cmc: return K_FLAG;
    default: return K_HELPER;
    }
}

static void emit_imm_alu(struct emit *e, uint32_t w, uint32_t lock, uint32_t group, struct rm m, uint64_t imm)
{
    if (w != 1 && (int64_t)imm == (int8_t)imm) {
        e_op(e, opc_w(0x83, w) | lock, group, m);
        e8(e, (uint32_t)imm);
    } else {
        e_op(e, opc_w(0x81, w) | lock, group, m);
        e_imm(e, w, imm);
    }
}

static void alu(struct trans *t, uint32_t k)
{
    struct emit *e = &t->e;
    const struct tinsn *x = &t->t[k];
    const struct kvs_insn *s = x->s;
    uint32_t w = x->w, n = alu_number(x->d.op), lock = x->d.lock ? OPC_LOCK : 0;
    bool move = x->d.op == OP_mov, test = x->d.op == OP_test, imm = has_imm(&x->d);
    bool writes = x->d.op != OP_cmp && !test;
    uint32_t opc = move ? 0x89 : test ? 0x85 : n << 3 | 1; /* r/m, r */
    if (s->dst == INSN_MEM) {
        struct rm m = access_of(t, k, writes ? TLB_W : TLB_R, w, lock_alignment(x));
        if (x->reads) flags_to_host(t, t->free);
        if (imm && !move && !test) {
            emit_imm_alu(e, w, lock, n, m, x->d.imm);
        } else if (imm) {
            e_op(e, opc_w(move ? 0xc7 : 0xf7, w), 0, m);
            e_imm(e, w, x->d.imm);
        } else {
            struct rm r = gpr_source(t, s->src, w);
            if (r.memory) {
                if (w == 1) e_op(e, 0xb6 | OPC_0F, t->free, r);
                else e_load(e, w, t->free, r);
                r = rm_reg(t->free);
            }
            e_op(e, opc_w(opc, w) | lock, r.reg, m);
        }
        return;
    }
    if (s->src == INSN_MEM && !imm) {
        struct rm m = access_of(t, k, TLB_R, w, 0);
        if (x->reads) flags_to_host(t, t->free);
        struct dest d = gpr_open(t, s->dst, w, !move, true, t->free);
        e_op(e, opc_w(test ? opc : opc | 2, w), d.m.reg, m);
        if (writes) gpr_close(t, d);
        return;
    }
    if (x->reads) flags_to_host(t, H_R12);
    struct dest d = gpr_open(t, s->dst, w, !move, false, H_R12);
    if (imm && move && !d.m.memory) {
        if (w == 8) e_mov_imm(e, d.m.reg, x->d.imm);
        else if (w == 4) e_mov_imm(e, d.m.reg, (uint32_t)x->d.imm);
        else {
            e_op(e, opc_w(0xc7, w), 0, d.m);
            e_imm(e, w, x->d.imm);
        }
    } else if (imm && move && w == 8 && (int64_t)x->d.imm != (int32_t)x->d.imm) {
        e_mov_imm(e, H_R12, x->d.imm);
        e_store(e, 8, d.m, H_R12);
    } else if (imm && !move && !test) {
        emit_imm_alu(e, w, 0, n, d.m, x->d.imm);
    } else if (imm) {
        e_op(e, opc_w(move ? 0xc7 : 0xf7, w), 0, d.m);
        e_imm(e, w, x->d.imm);
    } else {
        struct rm r = gpr_source(t, s->src, w);
        if (r.memory && d.m.memory) {
            if (w == 1) e_op(e, 0xb6 | OPC_0F, H_RCX, r);
            else e_load(e, w, H_RCX, r);
            r = rm_reg(H_RCX);
        }
        if (!r.memory) e_op(e, opc_w(opc, w), r.reg, d.m);
        else e_op(e, opc_w(test ? opc : opc | 2, w), d.m.reg, r);
    }
    if (writes) gpr_close(t, d);
}

/* A destination that is read and written, in memory or a register, with the flags from before if need be. */
static struct rm modify(struct trans *t, uint32_t k, struct dest *d)
{
    const struct tinsn *x = &t->t[k];
    struct rm m;
    if (x->s->dst == INSN_MEM) {
        m = access_of(t, k, TLB_W, x->w, lock_alignment(x));
        d->reload = H_NONE;
        d->back = false;
        if (x->reads) flags_to_host(t, t->free);
        return m;
    }
    t->free = H_RCX;
    if (x->reads) flags_to_host(t, H_R12);
    *d = gpr_open(t, x->s->dst, x->w, true, false, H_R12);
    return d->m;
}

static void unary(struct trans *t, uint32_t k)
{
    const struct tinsn *x = &t->t[k];
    struct dest d = { 0 };
    struct rm m = modify(t, k, &d);
    uint32_t lock = x->d.lock ? OPC_LOCK : 0;
    if (x->d.op == OP_inc || x->d.op == OP_dec) e_op(&t->e, opc_w(0xff, x->w) | lock, x->d.op == OP_dec, m);
    else e_op(&t->e, opc_w(0xf7, x->w) | lock, x->d.op == OP_not ? 2 : 3, m);
    if (x->s->dst != INSN_MEM) gpr_close(t, d);
}

static void shift(struct trans *t, uint32_t k)
{
    const struct tinsn *x = &t->t[k];
    uint32_t ext = x->d.op == OP_rol ? 0 : x->d.op == OP_ror ? 1 : x->d.op == OP_rcl ? 2 : x->d.op == OP_rcr ? 3 :
                   x->d.op == OP_shl ? 4 : x->d.op == OP_shr ? 5 : 7;
    struct dest d = { 0 };
    struct rm m = modify(t, k, &d);
    if (isa_row[x->d.row].k[1] == CL_) {
        if (m.memory && m.base == H_RCX) {
            e_mov(&t->e, H_R12, H_RCX);
            m = rm_mem(H_R12, 0);
        }
        e_op(&t->e, 0x89, H_R14, rm_reg(H_RCX)); /* the guest's CL */
        e_op(&t->e, opc_w(0xd3, x->w), ext, m);
    } else {
        e_op(&t->e, opc_w(0xc1, x->w), ext, m);
        e8(&t->e, (uint32_t)x->s->imm);
    }
    if (x->s->dst != INSN_MEM) gpr_close(t, d);
}

/* The source operand: general register or checked memory. */
static struct rm source(struct trans *t, uint32_t k, uint32_t n, uint32_t w)
{
    if (n == INSN_MEM) return access_of(t, k, TLB_R, w, 0);
    t->free = H_R12;
    return gpr_source(t, n, w);
}

static void extend(struct trans *t, uint32_t k)
{
    const struct tinsn *x = &t->t[k];
    uint32_t from = isa_row[x->d.row].k[1] == Eb ? 1 : isa_row[x->d.row].k[1] == Ew ? 2 : 4;
    struct rm m = source(t, k, x->s->src, from);
    struct dest d = gpr_open(t, x->s->dst, x->w, false, true, t->free);
    uint32_t wide = x->w == 8 ? OPC_W : 0, byte = from == 1 ? OPC_BYTE : 0;
    if (from == 4) e_op(&t->e, 0x63 | wide, d.m.reg, m);
    else e_op(&t->e, ((x->d.op == OP_movzx ? 0xb6u : 0xbeu) | (from == 2)) | OPC_0F | wide | byte, d.m.reg, m);
    gpr_close(t, d);
}

static void setcc(struct trans *t, uint32_t k)
{
    const struct tinsn *x = &t->t[k];
    if (x->s->dst == INSN_MEM) {
        struct rm m = access_of(t, k, TLB_W, 1, 0);
        flags_to_host(t, t->free);
        e_op(&t->e, 0x90 | x->d.cond | OPC_0F | OPC_BYTE, 0, m);
        return;
    }
    flags_to_host(t, H_R12);
    struct dest d = gpr_open(t, x->s->dst, 1, false, false, H_R12);
    e_op(&t->e, 0x90 | x->d.cond | OPC_0F | OPC_BYTE, 0, d.m);
    gpr_close(t, d);
}

static void cmov(struct trans *t, uint32_t k)
{
    const struct tinsn *x = &t->t[k];
    struct rm m = source(t, k, x->s->src, x->w);
    flags_to_host(t, t->free);
    struct dest d = gpr_open(t, x->s->dst, x->w, true, true, t->free);
    e_op(&t->e, 0x40u | x->d.cond | OPC_0F | (x->w == 8 ? OPC_W : 0), d.m.reg, m);
    gpr_close(t, d);
}

static void exchange(struct trans *t, uint32_t k)
{
    struct emit *e = &t->e;
    const struct tinsn *x = &t->t[k];
    const struct kvs_insn *s = x->s;
    if (s->dst == INSN_MEM || s->src == INSN_MEM) {
        struct rm m = access_of(t, k, TLB_W, x->w, lock_alignment(x));
        struct dest d = gpr_open(t, s->dst == INSN_MEM ? s->src : s->dst, x->w, true, true, t->free);
        e_op(e, opc_w(0x87, x->w), d.m.reg, m);
        gpr_close(t, d);
        return;
    }
    struct rm a = gpr_source(t, s->dst, x->w), b = gpr_source(t, s->src, x->w);
    e_load(e, x->w, H_RCX, a);
    e_load(e, x->w, H_R12, b);
    e_store(e, 8, b, H_RCX);
    e_store(e, 8, a, H_R12);
}

static void exchange_add(struct trans *t, uint32_t k)
{
    const struct tinsn *x = &t->t[k];
    uint32_t lock = x->d.lock ? OPC_LOCK : 0;
    struct rm m = access_of(t, k, TLB_W, x->w, lock_alignment(x));
    if (x->d.op == OP_xadd) {
        struct dest d = gpr_open(t, x->s->src, x->w, true, true, t->free);
        e_op(&t->e, opc_w(0xc1, x->w) | OPC_0F | lock, d.m.reg, m);
        gpr_close(t, d);
        return;
    }
    struct rm r = gpr_source(t, x->s->src, x->w);
    if (r.memory) {
        e_load(&t->e, x->w, t->free, r);
        r = rm_reg(t->free);
    }
    e_op(&t->e, opc_w(0xb1, x->w) | OPC_0F | lock, r.reg, m);
}

static void multiply(struct trans *t, uint32_t k)
{
    struct emit *e = &t->e;
    const struct tinsn *x = &t->t[k];
    if (x->kind == K_MUL) {
        struct rm m = source(t, k, x->s->dst, x->w);
        if (x->reads) flags_to_host(t, t->free);
        e_op(e, opc_w(0xf7, x->w), x->d.op == OP_mul ? 4 : 5, m);
        return;
    }
    struct rm m = source(t, k, x->s->src, x->w);
    if (x->reads) flags_to_host(t, t->free);
    bool three = x->d.op == OP_imul3;
    struct dest d = gpr_open(t, x->s->dst, x->w, !three, true, t->free);
    e_op(e, three ? opc_w(0x69, x->w) : opc_w(0xaf, x->w) | OPC_0F, d.m.reg, m);
    if (three) e32(e, (uint32_t)x->d.imm);
    gpr_close(t, d);
}

static void bits(struct trans *t, uint32_t k)
{
    struct emit *e = &t->e;
    const struct tinsn *x = &t->t[k];
    if (x->kind == K_SCAN) {
        struct rm m = source(t, k, x->s->src, x->w);
        if (x->reads) flags_to_host(t, t->free);
        struct dest d = gpr_open(t, x->s->dst, x->w, true, true, t->free);
        uint32_t opc = x->d.op == OP_popcnt ? 0xb8 | OPC_F3 : x->d.op == OP_bsf ? 0xbc : x->d.op == OP_bsr ? 0xbd :
                       x->d.op == OP_tzcnt ? 0xbc | OPC_F3 : 0xbd | OPC_F3;
        e_op(e, opc | OPC_0F | (x->w == 8 ? OPC_W : 0), d.m.reg, m);
        gpr_close(t, d);
        return;
    }
    uint32_t n = x->d.op == OP_bt ? 4 : x->d.op == OP_bts ? 5 : x->d.op == OP_btr ? 6 : 7;
    uint32_t wide = (x->w == 8 ? OPC_W : 0) | OPC_0F, lock = x->d.lock ? OPC_LOCK : 0;
    bool imm = has_imm(&x->d);
    struct dest d = { 0 };
    struct rm m;
    if (x->s->dst == INSN_MEM) {
        m = access_of(t, k, n == 4 ? TLB_R : TLB_W, x->w, lock_alignment(x));
        if (x->reads) flags_to_host(t, t->free);
    } else {
        if (x->reads) flags_to_host(t, H_R12);
        d = gpr_open(t, x->s->dst, x->w, true, true, H_R12); /* a memory operand would mean a bit string */
        m = d.m;
    }
    if (imm) {
        e_op(e, 0xba | wide | lock, n, m);
        e8(e, (uint32_t)x->d.imm);
    } else {
        struct rm r = gpr_source(t, x->s->src, x->w);
        if (r.memory) {
            e_load(e, x->w, H_RCX, r);
            r = rm_reg(H_RCX);
        }
        e_op(e, (0x83u | n << 3) | wide, r.reg, m);
    }
    if (x->s->dst != INSN_MEM && n != 4) gpr_close(t, d);
}

static void stack(struct trans *t, uint32_t k)
{
    struct emit *e = &t->e;
    const struct tinsn *x = &t->t[k];
    const struct kvs_insn *s = x->s;
    if (x->kind == K_PUSH) {
        struct rm m = access_at(t, k, (struct ea){ RSP, GPR_ZERO, 0, -8 }, TLB_W, 8, 0);
        if (x->d.op == OP_push_i) {
            e_op(e, 0xc7 | OPC_W, 0, m);
            e32(e, (uint32_t)x->d.imm);
        } else {
            struct rm r = gpr_source(t, s->dst, 8);
            if (r.memory) {
                e_load(e, 8, t->free, r);
                r = rm_reg(t->free);
            }
            e_store(e, 8, m, r.reg);
        }
        e_lea(e, H_R13, rm_mem(H_R13, -8));
        return;
    }
    if (x->kind == K_POP) {
        struct rm m = access_at(t, k, (struct ea){ RSP, GPR_ZERO, 0, 0 }, TLB_R, 8, 0);
        e_load(e, 8, t->free, m);
        e_lea(e, H_R13, rm_mem(H_R13, 8));
        uint32_t host = jit_host_of[s->dst];
        if (host != H_NONE) e_mov(e, host, t->free);
        else e_store(e, 8, gpr_slot(s->dst), t->free);
        return;
    }
    struct rm m = access_at(t, k, (struct ea){ RBP, GPR_ZERO, 0, 0 }, TLB_R, 8, 0);
    e_load(e, 8, t->free, m);
    e_lea(e, H_R13, rm_mem(H_RBP, 8));
    e_mov(e, H_RBP, t->free);
}

void int_emit(struct trans *t, uint32_t k)
{
    struct emit *e = &t->e;
    const struct tinsn *x = &t->t[k];
    switch (x->kind) {
    case K_NOP: break;
    case K_FENCE:
        e8(e, 0x0f);
        e8(e, 0xae);
        e8(e, x->d.op == OP_lfence ? 0xe8 : x->d.op == OP_mfence ? 0xf0 : 0xf8);
        break;
    case K_ALU: alu(t, k); break;
    case K_UNARY: unary(t, k); break;
    case K_SHIFT: shift(t, k); break;
    case K_EXTEND: extend(t, k); break;
    case K_SETCC: setcc(t, k); break;
    case K_CMOV: cmov(t, k); break;
    case K_LEA: {
        struct dest d = gpr_open(t, x->s->dst, x->w, false, true, H_RCX);
        if (x->w == 8 && x->d.asize == 8 && !d.m.memory && d.m.reg != H_RCX) {
            ea_load(t, ea_of(x->s), d.m.reg);
        } else {
            ea_load(t, ea_of(x->s), H_RCX);
            if (x->w == 4 || x->d.asize == 4) e_op(e, 0x89, H_RCX, d.m); /* clears the upper half */
            else if (d.m.reg != H_RCX) e_mov(e, d.m.reg, H_RCX);
        }
        gpr_close(t, d);
        break;
    }
    case K_PUSH: case K_POP: case K_LEAVE_FRAME: stack(t, k); break;
    case K_XCHG: exchange(t, k); break;
    case K_CMPXCHG: case K_XADD: exchange_add(t, k); break;
    case K_IMUL: case K_MUL: multiply(t, k); break;
    case K_SCAN: case K_BT: bits(t, k); break;
    case K_BSWAP: {
        struct dest d = gpr_open(t, x->s->dst, x->w, true, true, H_R12);
        uint32_t r = d.m.reg;
        uint32_t rex = (x->w == 8 ? 8u : 0) | (r >= 8);
        if (rex) e8(e, 0x40 | rex);
        e8(e, 0x0f);
        e8(e, 0xc8 | (r & 7));
        gpr_close(t, d);
        break;
    }
    case K_WIDEN:
        if (x->d.osize == 2) e8(e, 0x66);
        if (x->d.osize == 8) e8(e, 0x48);
        e8(e, x->d.op == OP_cbw ? 0x98 : 0x99);
        break;
    case K_FLAG:
        flags_to_host(t, H_R12);
        e8(e, x->d.op == OP_clc ? 0xf8 : x->d.op == OP_stc ? 0xf9 : 0xf5);
        break;
    default: t->failed = true; break;
    }
}
