/* Ways out of a block in host code. Everything that leaves has the flags in memory. */
#include "jit_int.h"

static void count(struct trans *t, const struct kvs_insn *s) { e_lea(&t->e, H_BUDGET, rm_mem(H_BUDGET, -(int32_t)s->since)); }

/* RCX: the linear address of offset off from the start of the page. */
static void load_address(struct emit *e, int64_t off)
{
    e_load(e, 8, H_RCX, gpr_slot(GPR_RIPBASE));
    if (off == (int32_t)off) {
        e_lea(e, H_RCX, rm_mem(H_RCX, (int32_t)off));
    } else {
        e_mov_imm(e, H_R12, (uint64_t)off);
        e_op(e, 0x01 | OPC_W, H_R12, rm_reg(H_RCX));
    }
}

static const uint8_t *thunk(const struct trans *t, const uint8_t *rx) { return t->j->rw + (rx - t->j->rx); }

/* For a jump or call at site to a place in this page: leads here until the target is known, then there. */
static void edge(struct trans *t, uint8_t *site, uint32_t off)
{
    struct emit *e = &t->e;
    struct jit *j = t->j;
    uint32_t r = pool_take(t, 1);
    if (t->failed) return;
    e_land(e, site);
    e_mov_imm(e, H_RCX, r * sizeof(struct kvs_insn));
    e_jmp_to(e, thunk(t, j->out));
    *(struct jit_edge *)(void *)&j->pool[r] = (struct jit_edge){ .fn = jit_edge_unlinked, .site = (uint32_t)(site - j->rw), .off = (uint16_t)off };
}

static bool in_page(int64_t off) { return off >= 0 && off < PAGE_SIZE; }

static void go_to(struct trans *t, int64_t off)
{
    if (in_page(off)) {
        edge(t, e_jmp(&t->e), (uint32_t)off);
        return;
    }
    load_address(&t->e, off);
    e_jmp_to(&t->e, thunk(t, t->j->dispatch));
}

int64_t branch_target_of(const struct tinsn *x)
{
    /* A fused pair has one slot: its length is that of both. */
    return (int64_t)x->s->off + x->s->len + x->s->disp;
}

void branch_taken(struct trans *t, uint32_t k) { go_to(t, branch_target_of(&t->t[k])); }

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

/* Stores the return address below the stack pointer and leaves it in RCX. */
static void push_return(struct trans *t, uint32_t k)
{
    struct emit *e = &t->e;
    const struct kvs_insn *s = t->t[k].s;
    struct rm m = access_at(t, k, (struct ea){ RSP, GPR_ZERO, 0, -8 }, TLB_W, 8, 0);
    e_load(e, 8, H_RCX, gpr_slot(GPR_RIPBASE));
    e_lea(e, H_RCX, rm_mem(H_RCX, s->off + s->len));
    e_store(e, 8, m, H_RCX);
    e_lea(e, H_R13, rm_mem(H_R13, -8));
}

/* The second half of a call: to offset off of the page, or to the address in this register or slot. */
static void call_to(struct trans *t, uint32_t k, bool direct, int64_t off, struct rm target)
{
    struct emit *e = &t->e;
    const struct kvs_insn *s = t->t[k].s;
    int32_t back = s->off + s->len;
    bool pair = in_page(back), linked = direct && in_page(off);
    count(t, s);
    if (pair) {
        e_op(e, 0xff, 6, rm_reg(H_RCX));
        e_op(e, 0x3b | OPC_W, H_RSP, CPU(host_sp_low));
        uint8_t *site = e_jcc(e, CC_B);
        t->cold[t->colds++] = (struct cold){ .what = COLD_CALL, .k = k, .site = { site }, .sites = 1, .back = e->p };
    }
    if (!linked) {
        if (direct) load_address(e, off);
        else e_load(e, 8, H_RCX, target);
    }
    if (!pair) {
        if (linked) edge(t, e_jmp(e), (uint32_t)off);
        else e_jmp_to(e, thunk(t, t->j->dispatch));
        return;
    }
    uint8_t *call = NULL;
    if (linked) {
        e8(e, 0xe8);
        e32(e, 0);
        call = e->p - 4;
    } else {
        e_call_to(e, thunk(t, t->j->dispatch));
    }
    /* Back, with the return address in RCX. */
    e_lea(e, H_RSP, rm_mem(H_RSP, 8));
    e_lea(e, H_R12, rm_mem(H_RCX, -back));
    e_store(e, 8, gpr_slot(GPR_RIPBASE), H_R12);
    go_to(t, back);
    if (linked) edge(t, call, (uint32_t)off);
}

void branch_cold(struct trans *t, const struct cold *c)
{
    struct emit *e = &t->e;
    const struct kvs_insn *s = t->t[c->k].s;
    if (c->what == COLD_CALL) {
        /* Too many pairs: starts again with this one. */
        e_load(e, 8, H_RSP, CPU(host_sp));
        e_lea(e, H_RSP, rm_mem(H_RSP, -16));
        e_op(e, 0xff, 6, rm_reg(H_RCX));
        e_jmp_to(e, c->back);
        return;
    }
    e_lea(e, H_R13, rm_mem(H_R13, (int32_t)(8 + s->imm)));
    count(t, s);
    e_jmp_to(e, thunk(t, t->j->unpair));
}

/* The branch back to the start of the trace, once counted. False: it is an ordinary one here. */
static bool loop_branch(struct trans *t, uint32_t k)
{
    struct emit *e = &t->e;
    const struct tinsn *x = &t->t[k];
    const struct loop *l = t->copying;
    struct flag_state state = { .memory = t->fl.memory, .producer = t->fl.producer };
    if (!l) {
        uint8_t *site = x->kind == K_JCC ? e_jcc(e, x->d.cond) : e_jmp(e);
        t->loop[t->loops++] = (struct loop){ .k = k, .site = site, .after = e->p, .state = state, .after_state = t->fl };
        return true;
    }
    if (l->k != k) return false;
    if (state.memory != l->state.memory || state.producer != l->state.producer) t->failed = true;
    if (x->kind == K_JCC) e_jcc_to(e, x->d.cond, t->loop_head);
    else e_jmp_to(e, t->loop_head);
    return true;
}

void branch_emit(struct trans *t, uint32_t k)
{
    struct emit *e = &t->e;
    const struct tinsn *x = &t->t[k];
    const struct kvs_insn *s = x->s;
    const uint8_t *dispatch = thunk(t, t->j->dispatch);
    switch (x->kind) {
    case K_JCC: {
        flags_to_host(t, H_RCX);
        count(t, s);
        if (x->back && loop_branch(t, k)) break;
        uint8_t *site = e_jcc(e, x->d.cond);
        t->cold[t->colds++] = (struct cold){ .what = COLD_BRANCH, .k = k, .before = t->fl, .site = { site }, .sites = 1 };
        break;
    }
    case K_THROUGH: count(t, s); break;
    case K_JMP:
        if (!x->back) flags_to_memory(t);
        count(t, s);
        if (x->back && loop_branch(t, k)) break;
        go_to(t, branch_target_of(x));
        break;
    case K_CALL:
        flags_to_memory(t);
        push_return(t, k);
        call_to(t, k, true, branch_target_of(x), rm_reg(H_NONE));
        break;
    case K_RET: {
        flags_to_memory(t);
        struct rm m = access_at(t, k, (struct ea){ RSP, GPR_ZERO, 0, 0 }, TLB_R, 8, 0);
        e_load(e, 8, H_RCX, m);
        e_op(e, 0x3b | OPC_W, H_RCX, rm_mem(H_RSP, 8));
        uint8_t *paired = e_jcc(e, CC_E);
        check_canonical(t, k, H_RCX, H_R12);
        t->cold[t->colds++] = (struct cold){ .what = COLD_RET, .k = k, .site = { e_jmp(e) }, .sites = 1 };
        e_land(e, paired);
        e_lea(e, H_R13, rm_mem(H_R13, (int32_t)(8 + s->imm)));
        count(t, s);
        e8(e, 0xc3);
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
        if (s->dst == RSP) {
            /* What it was before the push. */
            e_lea(e, H_R12, rm_mem(H_R13, 8));
            call_to(t, k, false, 0, rm_reg(H_R12));
        } else {
            call_to(t, k, false, 0, gpr_source(t, s->dst, 8));
        }
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
