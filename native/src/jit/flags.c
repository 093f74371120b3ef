/*
 * Status flags of the guest live in the host's flags from the instruction that makes them to the next
 * one that clobbers them: another flag instruction, or the check of a memory access. At each point they
 * are in the host's flags, in memory (kvs_vcpu.fl, as tier 0 has them), or in neither; then the recipe of
 * their producer makes them again from its operands, which still hold. That is for the cold path of an
 * access that faults or leaves: RFLAGS are exact there too. flags_plan finds where none of these holds,
 * and has the producer save its flags at once. Every way out of a block has them in memory.
 */
#include "jit_int.h"

/* RAX is busy: it goes to the scratch register meanwhile. */
void flags_save(struct emit *e, uint32_t scratch)
{
    e_mov(e, scratch, H_RAX);
    e8(e, 0x9f); /* LAHF */
    e_op(e, 0x90 | CC_O | OPC_0F | OPC_BYTE, 0, rm_reg(H_RAX));
    e_store(e, 2, CPU(fl), H_RAX);
    e_mov(e, H_RAX, scratch);
}

void flags_load(struct emit *e, uint32_t scratch)
{
    e_mov(e, scratch, H_RAX);
    e_op(e, 0xb7 | OPC_0F, H_RAX, CPU(fl));
    e_op(e, 0x80 | OPC_BYTE, 0, rm_reg(H_RAX)); /* ADD AL, 7F: overflows when AL is 1 */
    e8(e, 0x7f);
    e8(e, 0x9e); /* SAHF */
    e_mov(e, H_RAX, scratch);
}

/* op: the opcode of the form r/m, r; or the extension of group 80/81 for an immediate. */
static void recipe_step(struct trans *t, const struct recipe *r, uint32_t group, struct rm a)
{
    struct emit *e = &t->e;
    if (r->b == INSN_MEM) {
        e_op(e, opc_w(0x81, r->w), group, a);
        e_imm(e, r->w, (uint64_t)(int64_t)r->imm);
        return;
    }
    struct rm b = gpr_source(t, r->b, r->w);
    if (b.memory) {
        e_load(e, r->w, H_RCX, b);
        b = rm_reg(H_RCX);
    }
    e_op(e, opc_w(group << 3 | 1, r->w), b.reg, a);
}

void flags_recover(struct trans *t, const struct tinsn *p)
{
    struct emit *e = &t->e;
    const struct recipe *r = &p->recipe;
    struct rm a = gpr_source(t, r->a, r->w);
    switch (r->op) {
    case R_CMP: recipe_step(t, r, 7, a); break;
    case R_TEST:
        if (r->b == INSN_MEM) {
            e_op(e, opc_w(0xf7, r->w), 0, a);
            e_imm(e, r->w, (uint64_t)(int64_t)r->imm);
        } else {
            struct rm b = gpr_source(t, r->b, r->w);
            if (b.memory) {
                e_load(e, r->w, H_RCX, b);
                b = rm_reg(H_RCX);
            }
            e_op(e, opc_w(0x85, r->w), b.reg, a);
        }
        break;
    case R_ADD: case R_SUB:
        e_load(e, r->w, H_R12, a);
        recipe_step(t, r, r->op == R_ADD ? 5 : 0, rm_reg(H_R12));
        recipe_step(t, r, r->op == R_ADD ? 0 : 5, rm_reg(H_R12));
        break;
    default: t->failed = true; break;
    }
    flags_save(e, H_RCX);
}

void flags_to_memory(struct trans *t)
{
    if (t->fl.memory) return;
    if (t->fl.host) flags_save(&t->e, H_RCX);
    else if (t->fl.producer) flags_recover(t, t->fl.producer);
    else t->failed = true;
    t->fl.memory = true;
    if (!t->fl.host) t->fl.producer = NULL;
}

void flags_to_host(struct trans *t, uint32_t scratch)
{
    if (t->fl.host) return;
    if (!t->fl.memory) t->failed = true; /* the plan was wrong */
    flags_load(&t->e, scratch);
    t->fl.host = true;
}

static bool leaves(enum kind k)
{
    return k == K_HELPER || k == K_LEAVE || k == K_CALL || k == K_RET || k == K_JMP_IND || k == K_CALL_IND;
}

/* On the way round a loop the check of the budget has clobbered the host's flags. */
static bool needed(const struct trans *t, uint32_t p, uint32_t from, bool host, bool whole)
{
    const struct recipe *r = &t->t[p].recipe;
    for (uint32_t k = from; k < t->n; k++) {
        const struct tinsn *x = &t->t[k];
        if (leaves(x->kind)) return !host && !whole; /* in memory from here on */
        if (x->touches && !whole) return true;
        if (x->touches) host = false;
        if (x->reads && !host) return true;
        if (x->writes) return false;
        if (x->regs & r->regs) whole = false;
        if (x->back && (!whole || needed(t, p, 0, false, true))) return true;
        if (x->back && x->kind == K_JMP) return false;
    }
    return !host && !whole;
}

/* Does something need the flags of instruction p where they would be in none of the three places? */
static bool must_keep(const struct trans *t, uint32_t p) { return needed(t, p, p + 1, true, t->t[p].recipe.op != R_NONE); }

/* Can anything see the flags that instruction p leaves? */
static bool visible(const struct trans *t, uint32_t p)
{
    for (uint32_t k = p + 1; k < t->n; k++) {
        const struct tinsn *x = &t->t[k];
        if (leaves(x->kind) || x->touches || x->reads) return true;
        if (x->writes) return false;
    }
    return true;
}

void flags_plan(struct trans *t)
{
    /* What only lets flags pass, or leaves some undefined, need not have them when nobody looks. */
    for (uint32_t k = t->n; k-- > 0;)
        if (t->t[k].merges && !visible(t, k)) t->t[k].reads = 0;
    for (uint32_t k = 0; k < t->n; k++)
        if (t->t[k].writes) t->t[k].keep = must_keep(t, k);
}
