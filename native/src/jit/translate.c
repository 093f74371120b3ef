/* From a tier-0 block to host code, and what host code calls when it leaves. */
#include <stdlib.h>

#include "jit_int.h"

OP(ud);
OP(nm);
OP(gp0);

static bool raises(kvs_handler fn) { return fn == op_ud || fn == op_nm || fn == op_gp0; }

static enum kind branch_classify(struct tinsn *x)
{
    const struct kvs_insn *s = x->s;
    switch (x->d.op) {
    case OP_jcc:
        x->reads = F_OSZAPC;
        return K_JCC;
    case OP_jmp: return K_JMP;
    case OP_call:
        x->touches = true;
        return K_CALL;
    case OP_ret:
        x->touches = true;
        return INSN_OSIZE(s) == 8 ? K_RET : K_LEAVE;
    case OP_jmp_ind:
        if (INSN_OSIZE(s) != 8 || (s->dst == INSN_MEM && !(s->seg & INSN_FAST))) return K_LEAVE;
        x->touches = true;
        return K_JMP_IND;
    case OP_call_ind:
        if (INSN_OSIZE(s) != 8 || s->dst == INSN_MEM) return K_LEAVE;
        x->touches = true;
        return K_CALL_IND;
    default: return K_LEAVE;
    }
}

static enum kind classify(struct trans *t, struct tinsn *x)
{
    const struct decoded *d = &x->d;
    if (raises(x->s->fn)) return K_LEAVE;
    if ((d->attr & (A_BRANCH | A_END)) || isa_op[d->op].cls == JCC) return branch_classify(x);
    if (d->attr & (A_SSE | A_AVX)) return simd_classify(t, x);
    if (d->attr & (A_X87 | A_MMX | A_SYS | A_PRIV | A_IO)) return K_HELPER;
    enum kind k = int_classify(t, x);
    if (k != K_HELPER) return k;
    x->touches = false;
    x->reads = x->writes = x->regs = 0;
    x->recipe.op = R_NONE;
    return K_HELPER;
}

/* The same bytes must still make the same slot: another processor may have stored to them since. */
static bool same(const struct kvs_insn *a, const struct kvs_insn *b, kvs_handler fn)
{
    return fn == b->fn && a->disp == b->disp && a->dst == b->dst && a->src == b->src && a->base == b->base &&
           a->index == b->index && a->scale == b->scale && a->seg == b->seg && a->osize == b->osize && a->len == b->len &&
           a->off == b->off && a->flags == b->flags;
}

static struct tinsn *append(struct trans *t, const struct kvs_insn *s, kvs_handler fn)
{
    struct tinsn *x = &t->t[t->n++];
    memset(x, 0, sizeof *x);
    x->s = s;
    x->fn = fn;
    return x;
}

/* Adds a block to the trace. False: nothing of it may be used. */
static bool decode_block(struct trans *t, const struct block *b)
{
    uint8_t copy[15 * MAX_INSNS];
    uint32_t bytes = b->bytes, pos = 0;
    if (bytes > sizeof copy || t->n + b->n + 1u > JIT_INSNS) return false;
    memcpy(copy, b->host, bytes);
    t->block[t->blocks++] = b;
    t->guest += b->n;
    t->end = NULL;
    for (const struct kvs_insn *s = b->insn;; s++) {
        if (s->fn == op_block_end) {
            t->end = s;
            return true;
        }
        kvs_handler fn = s == b->insn ? b->first : s->fn;
        struct tinsn *x = append(t, s, fn);
        if (raises(fn)) {
            x->kind = K_LEAVE;
            return true;
        }
        if (decode(copy + pos, bytes - pos, 64, true, t->c->cpuid_features, &x->d) != DECODE_OK) return false;
        struct kvs_insn again;
        lower(t->c, &x->d, b->mode, s->off, &again);
        pos += x->d.length;
        x->w = (uint8_t)INSN_OSIZE(&again);
        if (s->flags & INSN_FUSED && fn != again.fn) {
            /* The pair: operands of the comparison from the unfused form, which stays out of the block. */
            struct tinsn *jcc = append(t, s, fn);
            if (decode(copy + pos, bytes - pos, 64, true, t->c->cpuid_features, &jcc->d) != DECODE_OK) return false;
            struct kvs_insn fused = again;
            if (!lower_fused(&x->d, &jcc->d, b->mode, &fused) || !same(&fused, s, fn)) return false;
            pos += jcc->d.length;
            t->fused[t->fuseds] = again;
            x->s = &t->fused[t->fuseds++];
            x->kind = int_classify(t, x);
            jcc->kind = branch_classify(jcc);
            continue;
        }
        if (!same(&again, s, fn)) return false;
        x->kind = classify(t, x);
        if (isa_op[x->d.op].cls != JCC && (x->d.attr & A_END)) return true;
    }
}

/* The decoded block at this offset of the page, if the trace may go on with it. */
static const struct block *next_block(const struct trans *t, int64_t off)
{
    if (off < 0 || off >= PAGE_SIZE || t->blocks == JIT_BLOCKS) return NULL;
    const struct block *b = block_peek(t->c, t->b->host - t->b->off + off, t->b->mode);
    if (!b || b->crosses || t->guest + b->n > BLOCK_LIMIT || t->n + b->n + 2u > JIT_INSNS) return NULL;
    for (uint32_t n = 0; n < t->blocks; n++)
        if (t->block[n] == b) return NULL;
    return b;
}

static bool decode_trace(struct trans *t)
{
    const struct block *b = t->b;
    while (b) {
        uint32_t n = t->n, fuseds = t->fuseds;
        const struct kvs_insn *end = t->end;
        if (!decode_block(t, b)) {
            if (b == t->b) return false;
            /* Its first instruction has been modified, or so: the trace ends before it. */
            t->n = n;
            t->fuseds = fuseds;
            t->end = end;
            if (!end) t->t[n - 1].kind = K_JMP;
            else t->n--;
            break;
        }
        struct tinsn *last = &t->t[t->n - 1];
        if (t->end) {
            if ((b = next_block(t, t->end->off))) append(t, t->end, t->end->fn)->kind = K_THROUGH;
        } else if (last->kind == K_JMP && (b = next_block(t, branch_target_of(last)))) {
            last->kind = K_THROUGH;
        } else {
            b = NULL;
        }
    }
    uint32_t loops = 0;
    for (uint32_t k = 0; k < t->n; k++) {
        struct tinsn *x = &t->t[k];
        if (x->kind != K_JCC && x->kind != K_JMP) continue;
        x->back = loops < JIT_LOOPS && branch_target_of(x) == t->b->off;
        loops += x->back;
    }
    return true;
}

static bool worthwhile(const struct trans *t)
{
    uint32_t native = 0;
    if (!t->n || t->t[0].kind == K_LEAVE) return false;
    for (uint32_t k = 0; k < t->n; k++) native += t->t[k].kind != K_HELPER && t->t[k].kind != K_LEAVE;
    return native * 2 > t->n;
}

static bool is_branch(enum kind k) { return k == K_LEAVE || k >= K_JCC; }

static void helper(struct trans *t, uint32_t k)
{
    struct emit *e = &t->e;
    flags_to_memory(t);
    cold_add(t, k, e_jmp(e));
    t->fl = (struct flag_state){ .memory = true };
}

static void emit_insns(struct trans *t, uint32_t count)
{
    struct emit *e = &t->e;
    for (uint32_t k = 0; k < count && !t->failed && !e->full; k++) {
        const struct tinsn *x = &t->t[k];
        if (x->kind == K_HELPER) helper(t, k);
        else if (is_branch(x->kind)) branch_emit(t, k);
        else if (x->kind == K_SIMD) simd_emit(t, k);
        else int_emit(t, k);
        if (is_branch(x->kind)) continue;
        if (x->writes) {
            t->fl = (struct flag_state){ .host = true, .producer = x };
            if (x->keep) {
                flags_save(e, H_RCX);
                t->fl.memory = true;
            }
        }
        cold_here(t, k);
    }
}

static uint8_t *emit_poll(struct trans *t)
{
    e_op(&t->e, 0x3b | OPC_W, H_BUDGET, CPU(limit));
    return e_jcc(&t->e, CC_L);
}

static void emit_loop(struct trans *t, struct loop *l)
{
    struct emit *e = &t->e;
    t->copying = l;
    t->pass++;
    e_land(e, l->site);
    t->loop_head = e->p;
    t->fl = l->state;
    t->cold[t->colds++] = (struct cold){ .what = COLD_POLL, .pass = t->pass, .before = t->fl, .site = { emit_poll(t) }, .sites = 1 };
    emit_insns(t, l->k + 1);
    if (t->t[l->k].kind == K_JCC) {
        if (t->fl.memory != l->after_state.memory || t->fl.host != l->after_state.host) t->failed = true;
        e_jmp_to(e, l->after);
    }
    t->copying = NULL;
}

void leave_emit(struct trans *t)
{
    uint32_t r = pool_take(t, 1);
    if (t->failed) return;
    t->j->pool[r] = t->b->insn[0];
    t->j->pool[r].fn = jit_leave_head;
    t->j->pool[r].target = t->b;
    e_mov_imm(&t->e, H_RCX, r * sizeof(struct kvs_insn));
    e_jmp_to(&t->e, t->j->rw + (t->j->out - t->j->rx));
}

static void emit_trace(struct trans *t)
{
    struct emit *e = &t->e;
    struct block *b = t->b;
    uint8_t *head = e->p;
    uint8_t *leave = emit_poll(t);
    uint8_t *entry = e->p;
    uint8_t *load = NULL, *loaded = NULL;
    if (t->simd) {
        e_op(e, 0x80 | OPC_BYTE, 7, CPU(simd_live));
        e8(e, 0);
        load = e_jcc(e, CC_E);
        loaded = e->p;
    }
    t->fl = (struct flag_state){ .memory = true };
    emit_insns(t, t->n);
    if (t->end) branch_end(t);
    for (uint32_t n = 0; n < t->loops && !t->failed && !e->full; n++) emit_loop(t, &t->loop[n]);
    cold_emit(t);
    if (load) {
        e_land(e, load);
        e8(e, 0x4c); /* LEA R12, [RIP + loaded] */
        e8(e, 0x8d);
        e8(e, 0x25);
        e32(e, (uint32_t)(loaded - (e->p + 4)));
        e_jmp_to(e, t->j->rw + (t->j->simd_load - t->j->rx));
    }
    e_land(e, leave);
    leave_emit(t);
    if (t->failed || e->full) return;
    t->j->used = ((uint32_t)(e->p - t->j->rw) + 15) & ~15u;
    b->n = (uint16_t)t->guest;
    b->jit_entry = to_rx(t, entry);
    b->jit = to_rx(t, head);
}

static void translate(struct kvs_vcpu *c, struct block *b)
{
    struct trans *t = c->jit->trans;
    struct jit *j = c->jit;
    t->c = c;
    t->j = j;
    t->b = b;
    t->n = t->colds = t->fuseds = t->blocks = t->guest = t->loops = t->pass = 0;
    t->simd = t->failed = false;
    t->end = NULL;
    t->copying = NULL;
    uint32_t pool = j->pool_used;
    if (decode_trace(t) && worthwhile(t)) {
        flags_plan(t);
        uint8_t *p = j->rw + j->used;
        t->e = (struct emit){ p, p + min_u64(JIT_BLOCK_MAX, JIT_CODE_SIZE - j->used), false };
        emit_trace(t);
    }
    if (b->jit) b->insn[0].fn = (kvs_handler)(uintptr_t)j->enter;
    else j->pool_used = pool;
}

/* ---- counting ---- */
static NOINLINE int jit_hot(OPARGS)
{
    struct block *b = (struct block *)((uintptr_t)i - offsetof(struct block, insn));
    struct jit *j = c->jit;
    b->insn[0].fn = b->first;
    if (JIT_CODE_SIZE - j->used < JIT_BLOCK_MAX || JIT_POOL_SIZE - j->pool_used < 1024) {
        /* Full: everything goes. */
        c->rip = c->gpr[GPR_RIPBASE] + b->off;
        c->budget = budget;
        c->cur = i;
        block_cache_flush(c);
        return ST_LOOKUP;
    }
    translate(c, b);
    /* Without a check of the budget on this way in, which was for the block alone. */
    return budget < b->n ? b->first(c, i, budget) : b->insn[0].fn(c, i, budget);
}

static int jit_count(OPARGS)
{
    struct block *b = (struct block *)((uintptr_t)i - offsetof(struct block, insn));
    if (UNLIKELY(++b->heat >= c->jit->threshold)) return jit_hot(c, i, budget);
    return b->first(c, i, budget);
}

void jit_watch(struct kvs_vcpu *c, struct block *b)
{
    const uint32_t want = MODE_FLAT | MODE_CSFLAT;
    b->first = b->insn[0].fn;
    if ((b->mode & MODE_SIZE) != MODE_64 || (b->mode & want) != want || b->crosses) return;
    b->insn[0].fn = jit_count;
}

/* ---- where host code leaves to ---- */
int jit_leave_head(OPARGS)
{
    const struct block *b = i->target;
    c->rip = c->gpr[GPR_RIPBASE] + b->off;
    c->budget = budget;
    c->cur = b->insn;
    return ST_LOOKUP;
}

void jit_jump_cache(const struct kvs_vcpu *c, struct jc_entry *e) { e->host = e->b->jit ? e->b->jit : c->jit->untranslated; }

int jit_dispatch_miss(OPARGS)
{
    struct jc_entry *e = &c->jc[jc_index(c->rip)];
    if (e->la == c->rip && e->key == c->jc_key) jit_jump_cache(c, e);
    return op_dispatch(c, i, budget);
}

static NOINLINE struct block *edge_target(struct kvs_vcpu *c, struct jit_edge *edge)
{
    struct jit *j = c->jit;
    struct block *b = edge->target;
    if (!b) {
        int st;
        uint32_t generation = (uint32_t)(c->jc_key >> 16), site = edge->site;
        b = block_find(c, 0, &st);
        if (!b) {
            c->exc.pending = false; /* the run loop finds it again, with the branch retired */
            return NULL;
        }
        /* Decoding may have emptied the caches, and the edge with them. */
        if (b->crosses || (uint32_t)(c->jc_key >> 16) != generation || c->code_modified) return b;
        edge->target = b;
        edge->site = site;
    }
    if (b->jit) st32(j->rw + edge->site, (uint32_t)(b->jit - (j->rx + edge->site + 4)));
    return b;
}

int jit_edge_unlinked(OPARGS)
{
    struct jit_edge *edge = (struct jit_edge *)(uintptr_t)i;
    c->rip = c->gpr[GPR_RIPBASE] + edge->off;
    const struct block *b = edge_target(c, edge);
    if (UNLIKELY(!b || budget < atomic_load_explicit(&c->limit, memory_order_relaxed))) {
        c->budget = budget;
        c->cur = i;
        return ST_LOOKUP;
    }
    return b->insn[0].fn(c, b->insn, budget);
}
