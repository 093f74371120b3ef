/* Stack instructions. RSP changes only when nothing can fault any more. */
#include "interp.h"

void rsp_add(struct kvs_vcpu *c, int64_t delta)
{
    uint32_t width = stack_size(c);
    reg_set(c, RSP, width, c->gpr[RSP] + (uint64_t)delta);
}

static inline uint64_t stack_mask(const struct kvs_vcpu *c)
{
    uint32_t width = stack_size(c);
    return width == 8 ? ~0ull : width == 4 ? 0xffffffffull : 0xffffull;
}

int push(struct kvs_vcpu *c, uint64_t v, uint32_t size)
{
    int st = vwrite(c, SEG_SS, (c->gpr[RSP] - size) & stack_mask(c), &v, size);
    if (st == ST_OK) rsp_add(c, -(int64_t)size);
    return st;
}

int pop(struct kvs_vcpu *c, uint64_t *v, uint32_t size)
{
    *v = 0;
    int st = vread(c, SEG_SS, c->gpr[RSP] & stack_mask(c), v, size);
    if (st == ST_OK) rsp_add(c, size);
    return st;
}

OPX(push)
{
    uint32_t size = INSN_OSIZE(i);
    uint64_t v;
    int st = rm_read(c, i, i->dst, size, &v);
    return st == ST_OK ? push(c, v, size) : st;
}
OP(push64)
{
    uint64_t sp = c->gpr[RSP] - 8;
    FAST_HOST_AT(uint64_t, p, TLB_W, sp, op_push);
    st64(p, c->gpr[i->dst]);
    c->gpr[RSP] = sp;
    NEXT();
}
OPX(push_i) { return push(c, i->imm, INSN_OSIZE(i)); }
OP(push64_i)
{
    uint64_t sp = c->gpr[RSP] - 8;
    FAST_HOST_AT(uint64_t, p, TLB_W, sp, op_push_i);
    st64(p, i->imm);
    c->gpr[RSP] = sp;
    NEXT();
}

/* The same on a flat 32-bit stack. */
OP(push32)
{
    uint32_t sp = REG32(RSP) - 4;
    FAST_HOST_AT(uint32_t, p, TLB_W, sp, op_push);
    st32(p, REG32(i->dst));
    SET32(RSP, sp);
    NEXT();
}
OP(push32_i)
{
    uint32_t sp = REG32(RSP) - 4;
    FAST_HOST_AT(uint32_t, p, TLB_W, sp, op_push_i);
    st32(p, (uint32_t)i->imm);
    SET32(RSP, sp);
    NEXT();
}

/* POP with a memory operand computes its address with RSP already raised. SDM 2B "POP" */
OPX(pop)
{
    uint32_t size = INSN_OSIZE(i);
    uint64_t v = 0, old = c->gpr[RSP];
    int st = pop(c, &v, size);
    if (st != ST_OK) return st;
    if (i->dst != INSN_MEM) {
        reg_set(c, i->dst, size, v);
        return ST_OK;
    }
    st = insn_write(c, i, &v, size);
    if (st != ST_OK) c->gpr[RSP] = old;
    return st;
}
OP(pop64)
{
    FAST_HOST_AT(uint64_t, p, TLB_R, c->gpr[RSP], op_pop);
    uint64_t v = ld64(p);
    c->gpr[RSP] += 8;
    c->gpr[i->dst] = v;
    NEXT();
}

OP(pop32)
{
    FAST_HOST_AT(uint32_t, p, TLB_R, REG32(RSP), op_pop);
    uint32_t v = ld32(p);
    SET32(RSP, REG32(RSP) + 4);
    SET32(i->dst, v);
    NEXT();
}

OPX(pusha)
{
    uint32_t size = INSN_OSIZE(i);
    uint8_t image[32];
    for (uint32_t n = 0; n < 8; n++) {
        uint64_t v = c->gpr[7 - n]; /* EDI lowest, EAX highest */
        memcpy(image + n * size, &v, size);
    }
    /* One store at a time: a 16-bit stack pointer may wrap between two of them. */
    uint64_t mask = stack_mask(c), sp = c->gpr[RSP];
    for (uint32_t n = 0; n < 8; n++) {
        uint64_t la;
        int st = seg_to_linear(c, SEG_SS, (sp - (n + 1) * size) & mask, size, ACC_W, &la);
        if (st == ST_OK) st = lwrite_check(c, la, size, LA_USER_RULES);
        if (st != ST_OK) return st;
    }
    for (uint32_t n = 0; n < 8; n++) {
        int st = vwrite(c, SEG_SS, (sp - (n + 1) * size) & mask, image + (7 - n) * size, size);
        if (st != ST_OK) return st;
    }
    rsp_add(c, -8 * (int64_t)size);
    return ST_OK;
}
OPX(popa)
{
    uint32_t size = INSN_OSIZE(i);
    uint64_t v[8] = { 0 }, mask = stack_mask(c), sp = c->gpr[RSP];
    for (uint32_t n = 0; n < 8; n++) {
        int st = vread(c, SEG_SS, (sp + n * size) & mask, &v[n], size);
        if (st != ST_OK) return st;
    }
    for (uint32_t n = 0; n < 8; n++)
        if (7 - n != RSP) reg_set(c, 7 - n, size, v[n]);
    rsp_add(c, 8 * (int64_t)size);
    return ST_OK;
}

/* The n-th value below SP may be stored. */
static int push_check(struct kvs_vcpu *c, uint64_t sp, uint32_t n, uint32_t size)
{
    uint64_t la;
    int st = seg_to_linear(c, SEG_SS, (sp - n * size) & stack_mask(c), size, ACC_W, &la);
    return st == ST_OK ? lwrite_check(c, la, size, LA_USER_RULES) : st;
}

/*
 * SDM 2A "ENTER". imm: frame size, nesting level above bit 16. Two passes in the manual's order: the
 * first only looks for faults; in the second each frame pointer is read behind the stores before it,
 * since the areas may overlap.
 */
OPX(enter)
{
    uint32_t size = INSN_OSIZE(i), level = (i->imm >> 16) & 31, stores = level ? level + 1 : 1;
    uint64_t mask = stack_mask(c), sp = c->gpr[RSP], frame = sp - size, v = 0;
    uint64_t final = sp - stores * size - (i->imm & 0xffff);
    int st = push_check(c, sp, 1, size);
    for (uint32_t k = 1; st == ST_OK && k < level; k++) {
        st = vread(c, SEG_SS, (c->gpr[RBP] - k * size) & mask, &v, size);
        if (st == ST_OK) st = push_check(c, sp, k + 1, size);
    }
    if (st == ST_OK) st = push_check(c, sp, stores, size);
    /* The new top of stack must be writable too. */
    if (st == ST_OK) st = push_check(c, final, 0, size);
    if (st != ST_OK) return st;
    st = vwrite(c, SEG_SS, (sp - size) & mask, &c->gpr[RBP], size);
    for (uint32_t k = 1; st == ST_OK && k < level; k++) {
        st = vread(c, SEG_SS, (c->gpr[RBP] - k * size) & mask, &v, size);
        if (st == ST_OK) st = vwrite(c, SEG_SS, (sp - (k + 1) * size) & mask, &v, size);
    }
    if (st == ST_OK && level) st = vwrite(c, SEG_SS, (sp - stores * size) & mask, &frame, size);
    if (st != ST_OK) return st;
    reg_set(c, RBP, size, frame);
    reg_set(c, RSP, stack_size(c), final);
    return ST_OK;
}

OPX(leave)
{
    uint32_t size = INSN_OSIZE(i), width = stack_size(c);
    uint64_t v = 0, frame = reg_get(c, RBP, width);
    int st = vread(c, SEG_SS, frame, &v, size);
    if (st != ST_OK) return st;
    reg_set(c, RSP, width, frame + size);
    reg_set(c, RBP, size, v);
    return ST_OK;
}
OP(leave32)
{
    FAST_HOST_AT(uint32_t, p, TLB_R, REG32(RBP), op_leave);
    uint32_t v = ld32(p);
    SET32(RSP, REG32(RBP) + 4);
    SET32(RBP, v);
    NEXT();
}
