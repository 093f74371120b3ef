/* Ways out of a block in host code. Everything that leaves has the flags in memory. */
#include "jit_int.h"

static void count(struct trans *t, const struct kvs_insn *s) { e_lea(&t->e, H_BUDGET, rm_mem(H_BUDGET, -(int32_t)s->since)); }

/* To offset off from the start of the page: patched to a jump once the target is known, when it is in this page. */
static void go_to(struct trans *t, int64_t off)
{
    struct emit *e = &t->e;
    struct jit *j = t->j;
    if (off < 0 || off >= PAGE_SIZE) {
        e_load(e, 8, H_RCX, gpr_slot(GPR_RIPBASE));
        if (off == (int32_t)off) {
            e_lea(e, H_RCX, rm_mem(H_RCX, (int32_t)off));
        } else {
            e_mov_imm(e, H_R12, (uint64_t)off);
            e_op(e, 0x01 | OPC_W, H_R12, rm_reg(H_RCX));
        }
        e_jmp_to(e, j->rw + (j->dispatch - j->rx));
        return;
    }
    uint32_t r = pool_take(t, 1);
    if (t->failed) return;
    uint8_t *site = e_jmp(e);
    e_land(e, site); /* for now: the next instruction */
    e_mov_imm(e, H_RCX, r * sizeof(struct kvs_insn));
    e_jmp_to(e, j->rw + (j->out - j->rx));
    *(struct jit_edge *)(void *)&j->pool[r] = (struct jit_edge){ .fn = jit_edge_unlinked, .site = (uint32_t)(site - j->rw), .off = (uint16_t)off };
}

static int64_t target_of(const struct tinsn *x)
{
    /* A fused pair has one slot: its length is that of both. */
    return (int64_t)x->s->off + x->s->len + x->s->disp;
}

void branch_taken(struct trans *t, uint32_t k) { go_to(t, target_of(&t->t[k])); }

/* The address in reg: canonical, else the cold path of insn k raises. */
static void check_canonical(struct trans *t, uint32_t k, uint32_t reg, uint32_t scratch)
{
    struct emit *e = &t->e;
    e_mov(e, scratch, reg);
    e_op(e, 0xc1 | OPC_W, 7, rm_reg(scratch));
    e8(e, 47);
    e_op(e, 0x83 | OPC_W, 0, rm_reg(scratch));
    e8(e, 1);
    e_op(e, 0x83 | OPC_W, 7, rm_reg(scratch));
    e8(e, 1);
    cold_add(t, k, e_jcc(e, CC_A));
}

/* Stores the return address below the stack pointer; RSP is not changed yet. */
static void push_return(struct trans *t, uint32_t k)
{
    struct emit *e = &t->e;
    const struct kvs_insn *s = t->t[k].s;
    struct rm m = access_at(t, k, (struct ea){ RSP, GPR_ZERO, 0, -8 }, TLB_W, 8, 0);
    e_load(e, 8, t->free, gpr_slot(GPR_RIPBASE));
    e_lea(e, t->free, rm_mem(t->free, s->off + s->len));
    e_store(e, 8, m, t->free);
    e_lea(e, H_R13, rm_mem(H_R13, -8));
}

void branch_emit(struct trans *t, uint32_t k)
{
    struct emit *e = &t->e;
    const struct tinsn *x = &t->t[k];
    const struct kvs_insn *s = x->s;
    const uint8_t *dispatch = t->j->rw + (t->j->dispatch - t->j->rx);
    switch (x->kind) {
    case K_JCC: {
        flags_to_host(t, H_RCX);
        count(t, s);
        uint8_t *site = e_jcc(e, x->d.cond);
        t->cold[t->colds++] = (struct cold){ .what = COLD_BRANCH, .k = k, .before = t->fl, .site = { site }, .sites = 1 };
        break;
    }
    case K_JMP:
        flags_to_memory(t);
        count(t, s);
        go_to(t, target_of(x));
        break;
    case K_CALL:
        flags_to_memory(t);
        push_return(t, k);
        count(t, s);
        go_to(t, target_of(x));
        break;
    case K_RET: {
        flags_to_memory(t);
        struct rm m = access_at(t, k, (struct ea){ RSP, GPR_ZERO, 0, 0 }, TLB_R, 8, 0);
        e_load(e, 8, H_RCX, m);
        check_canonical(t, k, H_RCX, H_R12);
        e_lea(e, H_R13, rm_mem(H_R13, (int32_t)(8 + s->imm)));
        count(t, s);
        e_jmp_to(e, dispatch);
        break;
    }
    case K_JMP_IND:
        flags_to_memory(t);
        if (s->dst == INSN_MEM) {
            struct rm m = access_of(t, k, TLB_R, 8, 0);
            e_load(e, 8, H_RCX, m);
        } else {
            e_load(e, 8, H_RCX, gpr_source(t, s->dst, 8));
        }
        check_canonical(t, k, H_RCX, H_R12);
        count(t, s);
        e_jmp_to(e, dispatch);
        break;
    case K_CALL_IND: { /* by a register; the target is read before RSP changes */
        flags_to_memory(t);
        e_load(e, 8, H_RCX, gpr_source(t, s->dst, 8));
        check_canonical(t, k, H_RCX, H_R12);
        push_return(t, k);
        if (s->dst == RSP) e_lea(e, H_RCX, rm_mem(H_R13, 8));
        else e_load(e, 8, H_RCX, gpr_source(t, s->dst, 8));
        count(t, s);
        e_jmp_to(e, dispatch);
        break;
    }
    case K_LEAVE:
        flags_to_memory(t);
        e_mov_imm(e, H_RCX, (uint64_t)(uintptr_t)s);
        e_jmp_to(e, t->j->rw + (t->j->out_abs - t->j->rx));
        break;
    default: t->failed = true; break;
    }
}

void branch_end(struct trans *t)
{
    flags_to_memory(t);
    count(t, t->end);
    go_to(t, t->end->off);
}
