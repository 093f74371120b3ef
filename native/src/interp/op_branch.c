/*
 * Near branches. insn.since counts instructions up to and including the branch; direct branches
 * inside their page are chained to the target block (insn.target), all others go through the jump
 * cache. Blocks are chained only in flat code (MODE_CSFLAT): there a page offset decides it all.
 */
#include "interp.h"
#include "../isa/sem_alu.h"
#include "../jit/jit.h"

/* Out of budget or a request is pending: the run loop goes on at c->rip. Counting is done. */
static NOINLINE int branch_leave(OPARGS)
{
    c->budget = budget;
    c->cur = i;
    return ST_LOOKUP;
}

static NOINLINE int branch_leave_block(OPARGS)
{
    const struct block *b = (const struct block *)((const uint8_t *)i - offsetof(struct block, insn));
    c->rip = rip_truncate(c, c->gpr[GPR_RIPBASE] + b->off);
    c->budget = budget;
    c->cur = i;
    return ST_LOOKUP;
}

/* The branch did not retire: an exception or an exit at its own RIP. */
static NOINLINE int branch_fault(OPARGS, int st)
{
    c->budget = budget + 1;
    c->cur = i;
    c->rip = insn_rip(c, i);
    return st;
}

/* clang knows what branch_leave_block returns and would rather call it and return that itself. */
#if defined(__clang__)
#define TAIL_RETURN __attribute__((musttail)) return
#else
#define TAIL_RETURN return
#endif
#define ENTER_BLOCK(b)                                                                            \
    do {                                                                                          \
        if (UNLIKELY(budget < atomic_load_explicit(&c->limit, memory_order_relaxed)))             \
            TAIL_RETURN branch_leave_block(c, (b)->insn, budget);                                 \
        return (b)->insn[0].fn(c, (b)->insn, budget);                                             \
    } while (0)

static inline uint64_t code_linear(const struct kvs_vcpu *c, uint64_t rip)
{
    return is_code64(c) ? rip : (uint32_t)(c->seg[SEG_CS].base + rip);
}

/*
 * By itself, for the address of its local: a caller that took one could not tail-call the block, and a guest that
 * never links its branches would use up the host's stack.
 */
static NOINLINE struct block *target_block(struct kvs_vcpu *c)
{
    int st;
    return block_find(c, 0, &st);
}

static NOINLINE int dispatch_slow(OPARGS)
{
    uint64_t la = code_linear(c, c->rip);
    struct block *b = target_block(c);
    if (!b) {
        /* The run loop finds the same fault again, with the branch retired. */
        c->exc.pending = false;
        return branch_leave(c, i, budget);
    }
    if (!b->crosses && (c->mode & MODE_CSFLAT)) {
        struct jc_entry *e = &c->jc[jc_index(la)];
        e->la = la;
        e->key = c->jc_key;
        e->b = b;
        if (c->jit) jit_jump_cache(c, e);
    }
    ENTER_BLOCK(b);
}

int op_dispatch(OPARGS)
{
    uint64_t la = is_code64(c) ? c->rip : (uint32_t)(c->seg[SEG_CS].base + c->rip);
    const struct jc_entry *e = &c->jc[jc_index(la)];
    if (UNLIKELY(e->la != la || e->key != c->jc_key)) return dispatch_slow(c, i, budget);
    const struct block *b = e->b;
    c->gpr[GPR_RIPBASE] = c->rip - b->off;
    ENTER_BLOCK(b);
}

/* SDM 2A "Jcc", "JMP", "CALL": EIP is cut to the operand size, whatever the code size. */
static ALWAYS_INLINE uint64_t branch_target(const struct kvs_vcpu *c, const struct kvs_insn *i)
{
    uint64_t rip = c->gpr[GPR_RIPBASE] + (uint64_t)((int64_t)i->off + i->len + i->disp);
    return is_code64(c) ? rip : INSN_OSIZE(i) == 2 ? (uint16_t)rip : (uint32_t)rip;
}

/* A direct branch whose target is not chained (yet). Counting is done. */
static NOINLINE int branch_unlinked(OPARGS)
{
    int64_t off = (int64_t)i->off + i->len + i->disp;
    c->rip = branch_target(c, i);
    if (!(c->mode & MODE_CSFLAT) && c->rip > c->seg[SEG_CS].limit) {
        /* SDM 2A "Jcc", "JMP": the target is checked before the branch is taken. */
        c->exc.pending = false;
        return branch_fault(c, i, budget, raise_gp(c, 0));
    }
    if (off < 0 || off >= PAGE_SIZE || !(c->mode & MODE_CSFLAT)) return op_dispatch(c, i, budget);
    uint32_t generation = (uint32_t)(c->jc_key >> 16);
    struct block *b = target_block(c);
    if (!b) {
        c->exc.pending = false;
        return branch_leave(c, i, budget);
    }
    /* Decoding may have emptied the cache, and this instruction with it. */
    if (!b->crosses && (uint32_t)(c->jc_key >> 16) == generation && !c->code_modified)
        ((struct kvs_insn *)i)->target = b;
    ENTER_BLOCK(b);
}

#define TAKE_BRANCH()                                                                             \
    do {                                                                                          \
        const struct block *b = i->target;                                                        \
        if (UNLIKELY(!b)) return branch_unlinked(c, i, budget);                                   \
        ENTER_BLOCK(b);                                                                           \
    } while (0)

#define CONDITIONS(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11) X(12) X(13) X(14) X(15)
#define JCC(cc)                                                                                   \
    OP(jcc_##cc)                                                                                  \
    {                                                                                             \
        budget -= i->since;                                                                       \
        if (!cond_test(c->fl, cc)) NEXT();                                                        \
        TAKE_BRANCH();                                                                            \
    }
CONDITIONS(JCC)

/* CMP or TEST with the Jcc behind it. The immediate of the _ri form lies where the unused
 * address fields are; see lower_fused. */
static inline int32_t fused_imm(const struct kvs_insn *i) { return (int32_t)ld32(&i->base); }
#define FUSED(op, W, ctype, cc, cond)                                                             \
    OP(op##W##_rr_j##cc)                                                                          \
    {                                                                                             \
        budget -= i->since;                                                                       \
        sem_##op##W(&c->fl, FUSED_GET##W(i->dst), FUSED_GET##W(i->src));                          \
        if (!cond_test(c->fl, cond)) NEXT();                                                      \
        TAKE_BRANCH();                                                                            \
    }                                                                                             \
    OP(op##W##_ri_j##cc)                                                                          \
    {                                                                                             \
        budget -= i->since;                                                                       \
        sem_##op##W(&c->fl, FUSED_GET##W(i->dst), (ctype)fused_imm(i));                           \
        if (!cond_test(c->fl, cond)) NEXT();                                                      \
        TAKE_BRANCH();                                                                            \
    }
#define FUSED_GET8(n) REG8(n)
#define FUSED_GET32(n) REG32(n)
#define FUSED_GET64(n) REG64(n)
#define FUSED_ALL(cc)                                                                             \
    FUSED(cmp, 8, uint8_t, cc, cc) FUSED(cmp, 32, uint32_t, cc, cc) FUSED(cmp, 64, uint64_t, cc, cc) \
    FUSED(test, 8, uint8_t, cc, cc) FUSED(test, 32, uint32_t, cc, cc) FUSED(test, 64, uint64_t, cc, cc)
CONDITIONS(FUSED_ALL)

const kvs_handler jcc_handlers[16] = {
#define ROW(cc) op_jcc_##cc,
    CONDITIONS(ROW)
#undef ROW
};
/* [cmp, test][8, 32, 64][rr, ri][condition] */
const kvs_handler fused_handlers[2][3][2][16] = {
#define ROW(cc) op_cmp8_rr_j##cc,
    { { { CONDITIONS(ROW) },
#undef ROW
#define ROW(cc) op_cmp8_ri_j##cc,
        { CONDITIONS(ROW) } },
#undef ROW
#define ROW(cc) op_cmp32_rr_j##cc,
      { { CONDITIONS(ROW) },
#undef ROW
#define ROW(cc) op_cmp32_ri_j##cc,
        { CONDITIONS(ROW) } },
#undef ROW
#define ROW(cc) op_cmp64_rr_j##cc,
      { { CONDITIONS(ROW) },
#undef ROW
#define ROW(cc) op_cmp64_ri_j##cc,
        { CONDITIONS(ROW) } } },
#undef ROW
#define ROW(cc) op_test8_rr_j##cc,
    { { { CONDITIONS(ROW) },
#undef ROW
#define ROW(cc) op_test8_ri_j##cc,
        { CONDITIONS(ROW) } },
#undef ROW
#define ROW(cc) op_test32_rr_j##cc,
      { { CONDITIONS(ROW) },
#undef ROW
#define ROW(cc) op_test32_ri_j##cc,
        { CONDITIONS(ROW) } },
#undef ROW
#define ROW(cc) op_test64_rr_j##cc,
      { { CONDITIONS(ROW) },
#undef ROW
#define ROW(cc) op_test64_ri_j##cc,
        { CONDITIONS(ROW) } } },
#undef ROW
};

OP(jmp)
{
    budget -= i->since;
    TAKE_BRANCH();
}

/* Ends a block that no branch ends: goes on at the next instruction. Not an instruction itself. */
static NOINLINE int block_end_leave(OPARGS)
{
    c->rip = insn_next_rip(c, i);
    return branch_leave(c, i, budget);
}
static NOINLINE int block_end_unlinked(OPARGS)
{
    if (!is_code64(c) && !(c->mode & MODE_CSFLAT)) return block_end_leave(c, i, budget);
    return branch_unlinked(c, i, budget);
}
OP(block_end)
{
    budget -= i->since;
    const struct block *b = i->target;
    if (UNLIKELY(!b)) return block_end_unlinked(c, i, budget);
    ENTER_BLOCK(b);
}

/* LOOPcc and JrCXZ: the counter has the address size. SDM 2A "LOOP/LOOPcc" */
static inline bool count_down(struct kvs_vcpu *c, const struct kvs_insn *i)
{
    uint32_t size = INSN_ASIZE(i);
    reg_set(c, RCX, size, c->gpr[RCX] - 1);
    return reg_get(c, RCX, size) != 0;
}
/* The target is checked before RCX changes: a #GP must leave it alone. */
static inline bool target_bad(const struct kvs_vcpu *c, const struct kvs_insn *i)
{
    if (LIKELY(c->mode & MODE_CSFLAT)) return false;
    return branch_target(c, i) > c->seg[SEG_CS].limit;
}
#define LOOP(name, condition)                                                                     \
    OP(name)                                                                                      \
    {                                                                                             \
        budget -= i->since;                                                                       \
        if (UNLIKELY(target_bad(c, i)) && reg_get(c, RCX, INSN_ASIZE(i)) != 1 && (condition))     \
            return branch_unlinked(c, i, budget);                                                 \
        if (!count_down(c, i) || !(condition)) NEXT();                                            \
        TAKE_BRANCH();                                                                            \
    }
LOOP(loop, true)
LOOP(loope, c->fl & 0x4000)
LOOP(loopne, !(c->fl & 0x4000))
OP(jcxz)
{
    budget -= i->since;
    if (reg_get(c, RCX, INSN_ASIZE(i)) != 0) NEXT();
    TAKE_BRANCH();
}

/* ---- calls, returns, indirect jumps ---- */
/* The branch itself faults, before RSP or RIP change. SDM 2A "JMP", "CALL", 2B "RET" */
static inline bool maybe_not_canonical(uint64_t rip) { return (uint64_t)(((int64_t)rip >> 47) + 1) > 1; } /* the slow twin knows */
static int near_target_check(struct kvs_vcpu *c, uint64_t rip)
{
    if (is_code64(c)) return is_canonical(c, rip) ? ST_OK : raise_gp(c, 0);
    return rip > c->seg[SEG_CS].limit ? raise_gp(c, 0) : ST_OK;
}

static NOINLINE int x_call_slow(OPARGS)
{
    int st = near_target_check(c, branch_target(c, i));
    if (st != ST_OK) return st;
    return push(c, insn_next_rip(c, i), INSN_OSIZE(i));
}
static NOINLINE int call_slow(OPARGS)
{
    int st = x_call_slow(c, i, budget);
    if (st != ST_OK) return branch_fault(c, i, budget, st);
    if (UNLIKELY(c->write_count || c->code_modified)) {
        c->rip = branch_target(c, i);
        return branch_leave(c, i, budget);
    }
    TAKE_BRANCH();
}
OP(call)
{
    budget -= i->since;
    if (UNLIKELY(!is_code64(c) || !(c->mode & MODE_FLAT))) return call_slow(c, i, budget);
    uint64_t sp = c->gpr[RSP] - 8;
    FAST_HOST_AT(uint64_t, p, TLB_W, sp, call_slow);
    st64(p, c->gpr[GPR_RIPBASE] + i->off + i->len);
    c->gpr[RSP] = sp;
    TAKE_BRANCH();
}

/* Leaves after the counted branch when stores of it must go out first. */
#define DISPATCH()                                                                                \
    do {                                                                                          \
        if (UNLIKELY(c->write_count || c->code_modified)) return branch_leave(c, i, budget);      \
        return op_dispatch(c, i, budget);                                                         \
    } while (0)

static NOINLINE int x_call_ind(OPARGS)
{
    uint32_t size = INSN_OSIZE(i);
    uint64_t rip;
    int st = rm_read(c, i, i->dst, size, &rip);
    if (st == ST_OK) st = near_target_check(c, rip);
    if (st == ST_OK) st = push(c, insn_next_rip(c, i), size);
    if (st == ST_OK) c->rip = rip;
    return st;
}
static NOINLINE int call_ind_slow(OPARGS)
{
    int st = x_call_ind(c, i, budget);
    if (st != ST_OK) return branch_fault(c, i, budget, st);
    DISPATCH();
}
OP(call_ind)
{
    budget -= i->since;
    if (UNLIKELY(i->dst == INSN_MEM || !is_code64(c) || !(c->mode & MODE_FLAT))) return call_ind_slow(c, i, budget);
    uint64_t sp = c->gpr[RSP] - 8, rip = c->gpr[i->dst];
    if (UNLIKELY(maybe_not_canonical(rip))) return call_ind_slow(c, i, budget);
    FAST_HOST_AT(uint64_t, p, TLB_W, sp, call_ind_slow);
    st64(p, c->gpr[GPR_RIPBASE] + i->off + i->len);
    c->gpr[RSP] = sp;
    c->rip = rip;
    return op_dispatch(c, i, budget);
}

static NOINLINE int x_jmp_ind(OPARGS)
{
    uint64_t rip;
    int st = rm_read(c, i, i->dst, INSN_OSIZE(i), &rip);
    if (st == ST_OK) st = near_target_check(c, rip);
    if (st == ST_OK) c->rip = rip;
    return st;
}
static NOINLINE int jmp_ind_slow(OPARGS)
{
    int st = x_jmp_ind(c, i, budget);
    if (st != ST_OK) return branch_fault(c, i, budget, st);
    return op_dispatch(c, i, budget);
}
OP(jmp_ind)
{
    budget -= i->since;
    if (UNLIKELY(!is_code64(c))) return jmp_ind_slow(c, i, budget);
    uint64_t rip;
    if (i->dst != INSN_MEM) {
        rip = c->gpr[i->dst];
    } else {
        const uint8_t *p = insn_probe(c, i, TLB_R, 8);
        if (UNLIKELY(!p)) return jmp_ind_slow(c, i, budget);
        rip = ld64(p);
    }
    if (UNLIKELY(maybe_not_canonical(rip))) return jmp_ind_slow(c, i, budget);
    c->rip = rip;
    return op_dispatch(c, i, budget);
}

static NOINLINE int x_ret(OPARGS)
{
    uint32_t size = INSN_OSIZE(i), width = stack_size(c);
    uint64_t sp = reg_get(c, RSP, width), rip = 0;
    int st = vread(c, SEG_SS, sp, &rip, size);
    if (st == ST_OK) st = near_target_check(c, rip);
    if (st != ST_OK) return st;
    rsp_add(c, (int64_t)(size + i->imm));
    c->rip = rip;
    return ST_OK;
}
static NOINLINE int ret_slow(OPARGS)
{
    int st = x_ret(c, i, budget);
    if (st != ST_OK) return branch_fault(c, i, budget, st);
    return op_dispatch(c, i, budget);
}
OP(ret)
{
    budget -= i->since;
    if (UNLIKELY(!is_code64(c) || !(c->mode & MODE_FLAT))) return ret_slow(c, i, budget);
    FAST_HOST_AT(uint64_t, p, TLB_R, c->gpr[RSP], ret_slow);
    uint64_t rip = ld64(p);
    if (UNLIKELY(maybe_not_canonical(rip))) return ret_slow(c, i, budget);
    c->rip = rip;
    c->gpr[RSP] += 8 + i->imm;
    return op_dispatch(c, i, budget);
}

/*
 * Flat 32-bit code on a flat stack: every target is inside the limit. A push at ESP 0 to 3 crosses a page, and so
 * takes the slow twin.
 */
OP(call32)
{
    budget -= i->since;
    uint32_t sp = REG32(RSP) - 4;
    FAST_HOST_AT(uint32_t, p, TLB_W, sp, call_slow);
    st32(p, (uint32_t)insn_next_rip(c, i));
    SET32(RSP, sp);
    TAKE_BRANCH();
}
OP(call_ind32)
{
    budget -= i->since;
    uint32_t sp = REG32(RSP) - 4, rip;
    if (i->dst != INSN_MEM) {
        rip = REG32(i->dst);
    } else {
        const uint8_t *from = insn_probe(c, i, TLB_R, 4);
        if (UNLIKELY(!from)) return call_ind_slow(c, i, budget);
        rip = ld32(from);
    }
    FAST_HOST_AT(uint32_t, p, TLB_W, sp, call_ind_slow);
    st32(p, (uint32_t)insn_next_rip(c, i));
    SET32(RSP, sp);
    c->rip = rip;
    return op_dispatch(c, i, budget);
}
OP(jmp_ind32)
{
    budget -= i->since;
    if (i->dst != INSN_MEM) {
        c->rip = REG32(i->dst);
        return op_dispatch(c, i, budget);
    }
    const uint8_t *p = insn_probe(c, i, TLB_R, 4);
    if (UNLIKELY(!p)) return jmp_ind_slow(c, i, budget);
    c->rip = ld32(p);
    return op_dispatch(c, i, budget);
}
OP(ret32)
{
    budget -= i->since;
    FAST_HOST_AT(uint32_t, p, TLB_R, REG32(RSP), ret_slow);
    c->rip = ld32(p);
    SET32(RSP, REG32(RSP) + 4 + (uint32_t)i->imm);
    return op_dispatch(c, i, budget);
}
