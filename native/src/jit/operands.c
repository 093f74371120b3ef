/* Registers and memory operands of a block being translated. */
#include "jit_int.h"

const uint8_t *to_rx(const struct trans *t, const uint8_t *rw) { return t->j->rx + (rw - t->j->rw); }

uint32_t pool_take(struct trans *t, uint32_t count)
{
    if (t->j->pool_used + count > JIT_POOL_SIZE) {
        t->failed = true;
        return 0;
    }
    uint32_t n = t->j->pool_used;
    t->j->pool_used += count;
    return n;
}

struct rm gpr_source(struct trans *t, uint32_t n, uint32_t w)
{
    uint32_t reg = gpr_number(n, w), host = jit_host_of[reg];
    if (w == 1 && (n & 1)) { /* AH, CH, DH, BH: byte 1 */
        if (host != H_NONE) e_store(&t->e, 8, gpr_slot(reg), host);
        return rm_mem(H_CPU, (int32_t)n);
    }
    return host == H_NONE ? gpr_slot(reg) : rm_reg(host);
}

/*
 * Opens general register n for an instruction that writes it: a host register, or memory. Narrow writes to
 * a register in memory go there directly, those that clear the upper half through the scratch register.
 */
struct dest gpr_open(struct trans *t, uint32_t n, uint32_t w, bool read, bool need_register, uint32_t scratch)
{
    struct dest d = { .m = gpr_source(t, n, w), .n = (uint8_t)n, .w = (uint8_t)w, .reload = H_NONE };
    if (!d.m.memory) return d;
    uint32_t host = jit_host_of[gpr_number(n, w)];
    if (host != H_NONE) d.reload = (uint8_t)host;
    if (!need_register && w != 4) return d;
    if (read && w == 1) e_op(&t->e, 0xb6 | OPC_0F, scratch, d.m);
    else if (read) e_load(&t->e, 8, scratch, d.m); /* all of it: BSF may leave it alone */
    d.m = rm_reg(scratch);
    d.back = true;
    return d;
}

void gpr_close(struct trans *t, struct dest d)
{
    struct rm slot = rm_mem(H_CPU, (int32_t)(d.w == 1 ? d.n : d.n * 8));
    if (d.back) e_store(&t->e, d.w == 4 ? 8 : d.w, slot, d.m.reg);
    if (d.reload != H_NONE) e_load(&t->e, 8, d.reload, gpr_slot(d.n >> 3));
}

/* ---- addresses ---- */
static bool in_memory(uint32_t n) { return n != GPR_ZERO && jit_host_of[n] == H_NONE; }

void ea_load(struct trans *t, struct ea a, uint32_t dst)
{
    struct emit *e = &t->e;
    uint32_t base = H_NONE, index = H_NONE;
    if (a.base != GPR_ZERO) {
        base = jit_host_of[a.base];
        if (base == H_NONE) {
            e_load(e, 8, H_RCX, gpr_slot(a.base));
            base = H_RCX;
        }
    }
    if (a.index != GPR_ZERO) {
        index = jit_host_of[a.index];
        if (index == H_NONE) {
            e_load(e, 8, H_R12, gpr_slot(a.index));
            index = H_R12;
        }
    }
    if (base == dst && index == H_NONE && a.disp == 0) return;
    e_lea(e, dst, rm_sib(base, index, a.scale, a.disp));
}

/* ---- cold paths ---- */
static struct cold *cold_of(struct trans *t, uint32_t k)
{
    struct cold *c = t->colds ? &t->cold[t->colds - 1] : NULL;
    if (c && c->what == COLD_INSN && c->k == k && c->pass == t->pass) return c;
    c = &t->cold[t->colds++];
    *c = (struct cold){ .k = k, .pass = t->pass, .what = COLD_INSN, .before = t->fl };
    c->before.host = false; /* the check has clobbered them */
    return c;
}

void cold_add(struct trans *t, uint32_t k, uint8_t *site)
{
    struct cold *c = cold_of(t, k);
    c->site[c->sites++] = site;
}

void cold_here(struct trans *t, uint32_t k)
{
    struct cold *c = t->colds ? &t->cold[t->colds - 1] : NULL;
    if (!c || c->what != COLD_INSN || c->k != k || c->pass != t->pass) return;
    c->back = t->e.p;
    c->after = t->fl;
}

/* Sites share slots when there are more of them: those translated one after the other do not. */
static int32_t slot_take(struct trans *t, int kind)
{
    uint32_t user = (t->b->mode & MODE_USER) != 0;
    uint32_t n = t->j->next_slot[user][kind]++ % SLOT_COUNT;
    return (int32_t)(offsetof(struct kvs_vcpu, slots) + ((user * 2 + (uint32_t)kind) * SLOT_COUNT + n) * sizeof(struct tlb_slot));
}

struct rm access_at(struct trans *t, uint32_t k, struct ea a, int kind, uint32_t size, uint32_t align)
{
    struct emit *e = &t->e;
    int32_t slot = slot_take(t, kind);
    struct rm tag = rm_mem(H_CPU, slot + (int32_t)offsetof(struct tlb_slot, tag));
    struct rm addend = rm_mem(H_CPU, slot + (int32_t)offsetof(struct tlb_slot, addend));
    ea_load(t, a, H_RCX);
    if (align) {
        e_op(e, 0xf6 | OPC_BYTE, 0, rm_reg(H_RCX));
        e8(e, align);
        cold_add(t, k, e_jcc(e, CC_NE));
    }
    e_op(e, 0x33 | OPC_W, H_RCX, tag);
    e_op(e, 0x3b | OPC_W, H_RCX, rm_mem(H_CPU, slot + (int32_t)offsetof(struct tlb_slot, bound)));
    struct cold *c = cold_of(t, k);
    c->miss.site = e_jcc(e, CC_AE);
    c->miss.back = e->p;
    c->miss.slot = slot;
    c->miss.size = size;
    c->miss.kind = kind;
    t->fl.host = false;
    if (in_memory(a.base) || in_memory(a.index)) {
        e_op(e, 0x33 | OPC_W, H_RCX, tag); /* the linear address again */
        e_op(e, 0x03 | OPC_W, H_RCX, addend);
        t->free = H_R12;
        return rm_mem(H_RCX, 0);
    }
    e_load(e, 8, H_R12, addend);
    t->free = H_RCX;
    if (a.index == GPR_ZERO) return a.base == GPR_ZERO ? rm_mem(H_R12, a.disp) : rm_sib(jit_host_of[a.base], H_R12, 0, a.disp);
    if (a.base != GPR_ZERO) e_op(e, 0x03 | OPC_W, H_R12, rm_reg(jit_host_of[a.base]));
    return rm_sib(H_R12, jit_host_of[a.index], a.scale, a.disp);
}

/* The soft TLB, and if that does not know the page either, or the operand leaves it, the handler. */
static void miss_emit(struct trans *t, const struct cold *c)
{
    struct emit *e = &t->e;
    e_land(e, c->miss.site);
    e_lea(e, H_R12, rm_mem(H_CPU, c->miss.slot));
    e_call_to(e, t->j->rw + (t->j->refill[c->miss.kind] - t->j->rx));
    e_op(e, 0x81 | OPC_W, 7, rm_reg(H_RCX));
    e32(e, PAGE_SIZE - c->miss.size);
    e_jcc_to(e, CC_BE, c->miss.back);
}

void cold_emit(struct trans *t)
{
    struct emit *e = &t->e;
    struct jit *j = t->j;
    for (uint32_t n = 0; n < t->colds && !t->failed; n++) {
        struct cold *c = &t->cold[n];
        if (c->miss.site) miss_emit(t, c);
        for (uint32_t s = 0; s < c->sites; s++) e_land(e, c->site[s]);
        t->fl = c->before;
        if (c->what == COLD_CALL || c->what == COLD_RET) {
            branch_cold(t, c);
            continue;
        }
        if (c->what == COLD_BRANCH) {
            flags_to_memory(t);
            branch_taken(t, c->k);
            continue;
        }
        flags_to_memory(t);
        if (c->what == COLD_POLL) {
            leave_emit(t);
            continue;
        }
        const struct kvs_insn *s = t->t[c->k].s;
        uint32_t r = pool_take(t, 2);
        if (t->failed) return;
        j->pool[r] = *s;
        j->pool[r].fn = t->t[c->k].fn;
        e_mov_imm(e, H_RCX, r * sizeof(struct kvs_insn));
        e_jmp_to(e, j->rw + (j->out - j->rx));
        if (!c->back) continue;
        j->pool[r + 1] = *s;
        j->pool[r + 1].fn = (kvs_handler)(uintptr_t)(t->simd ? j->resume_simd : j->resume);
        j->pool[r + 1].imm = (uint64_t)(uintptr_t)(c->after.host ? to_rx(t, e->p) : to_rx(t, c->back));
        if (c->after.host) {
            flags_load(e, H_RCX);
            e_jmp_to(e, c->back);
        }
    }
}
