/* Port instructions. SDM 1 "Input/Output" */
#include "../sys/transfer.h"
#include "interp.h"

/* SDM 1 "I/O Permission Bit Map": consulted above IOPL and always in virtual-8086 mode */
static int bitmap_check(struct kvs_vcpu *c, uint16_t port, uint32_t size)
{
    const struct segment *tr = &c->tr;
    uint16_t map = 0, bits = 0;
    if (tr->attr & ATTR_NULL || !(tr->attr & 8) || tr->limit < 103) return raise_gp(c, 0);
    int st = lread(c, tr->base + 102, &map, 2, LA_SYSTEM);
    if (st != ST_OK) return st;
    uint32_t off = map + port / 8u;
    if (off + 1 > tr->limit) return raise_gp(c, 0); /* the byte behind is always read too */
    if ((st = lread(c, tr->base + off, &bits, 2, LA_SYSTEM)) != ST_OK) return st;
    return (bits >> (port & 7)) & ((1u << size) - 1) ? raise_gp(c, 0) : ST_OK;
}

static int port_check(struct kvs_vcpu *c, uint16_t port, uint32_t size)
{
    if (!is_protected(c) || (!is_v86(c) && c->cpl <= iopl(c))) return ST_OK;
    return bitmap_check(c, port, size);
}

/* Only an SMI ever asks. AMD APM 2 "SMM I/O Trap Offset" */
static inline bool notes_io(const struct kvs_vcpu *c) { return UNLIKELY(c->vm->config.flags & KVS_VM_SMM); }
enum { TRAP_IN = 1, TRAP_VALID = 2, TRAP_STRING = 4, TRAP_REP = 8, TRAP_SIZE_SHIFT = 4, TRAP_PORT_SHIFT = 16 };

/* Before the instruction (or iteration) changes registers; note_io_done follows when it is done. */
static void note_io(struct kvs_vcpu *c, const struct kvs_insn *i, uint16_t port, uint32_t kind)
{
    c->io_trap = (struct io_trap){ .rip = insn_rip(c, i), .rcx = c->gpr[RCX], .rsi = c->gpr[RSI], .rdi = c->gpr[RDI] };
    c->io_trap.retired = TRAP_VALID | kind | INSN_OSIZE(i) << TRAP_SIZE_SHIFT | (uint32_t)port << TRAP_PORT_SHIFT;
}
/* retires: the whole instruction is done, not an iteration of it. */
static void note_io_done(OPARGS, bool retires)
{
    c->io_trap.info = (uint32_t)c->io_trap.retired;
    c->io_trap.retired = vcpu_retired_at(c, i, budget) + retires;
}

OPX(in)
{
    uint32_t size = INSN_OSIZE(i), v = 0;
    uint16_t port = i->src == RDX ? REG16(RDX) : (uint16_t)i->imm;
    int st = port_check(c, port, size);
    if (st != ST_OK) return st;
    vcpu_sync_clock(c, i, budget);
    if ((st = iobus_port_read(c, port, &v, size)) != ST_OK) return st;
    if (notes_io(c)) {
        note_io(c, i, port, TRAP_IN);
        note_io_done(c, i, budget, true);
    }
    reg_set(c, RAX, size, v);
    return ST_OK;
}

OPX(out)
{
    uint32_t size = INSN_OSIZE(i);
    uint16_t port = i->dst == RDX ? REG16(RDX) : (uint16_t)i->imm;
    int st = port_check(c, port, size);
    if (st != ST_OK) return st;
    vcpu_sync_clock(c, i, budget);
    if (notes_io(c)) {
        note_io(c, i, port, 0);
        note_io_done(c, i, budget, true);
    }
    return iobus_port_write(c, port, (uint32_t)reg_get(c, RAX, size), size);
}

/* ---- strings: an iteration commits before the next one starts ---- */

static void advance(struct kvs_vcpu *c, const struct kvs_insn *i, uint32_t reg)
{
    uint32_t size = INSN_OSIZE(i), asize = INSN_ASIZE(i);
    reg_set(c, reg, asize, reg_get(c, reg, asize) + (c->eflags & FLAG_DF ? -(uint64_t)size : size));
}

static int ins_one(struct kvs_vcpu *c, const struct kvs_insn *i, uint16_t port)
{
    uint32_t size = INSN_OSIZE(i), v = 0;
    uint64_t la;
    /* The port is read only when the store cannot fault: reads have side effects. */
    int st = seg_to_linear(c, SEG_ES, reg_get(c, RDI, INSN_ASIZE(i)), size, ACC_W, &la);
    if (st == ST_OK) st = lwrite_check(c, la, size, LA_USER_RULES);
    if (st == ST_OK) st = iobus_port_read(c, port, &v, size);
    if (st == ST_OK) st = vwrite(c, SEG_ES, reg_get(c, RDI, INSN_ASIZE(i)), &v, size);
    if (st != ST_OK) return st;
    advance(c, i, RDI);
    return ST_OK;
}

static int outs_one(struct kvs_vcpu *c, const struct kvs_insn *i, uint16_t port)
{
    uint32_t size = INSN_OSIZE(i), v = 0;
    int st = vread(c, i->seg & ~(uint32_t)INSN_FAST, reg_get(c, RSI, INSN_ASIZE(i)), &v, size);
    if (st != ST_OK) return st;
    advance(c, i, RSI);
    return iobus_port_write(c, port, v, size);
}

static int string_io(OPARGS, bool input)
{
    uint32_t size = INSN_OSIZE(i), asize = INSN_ASIZE(i);
    uint16_t port = REG16(RDX);
    bool rep = i->flags & (INSN_REPE | INSN_REPNE);
    int st = port_check(c, port, size); /* also with a count of zero */
    if (st != ST_OK) return st;
    if (rep && reg_get(c, RCX, asize) == 0) return ST_OK;
    vcpu_sync_clock(c, i, budget);
    for (;;) {
        if (notes_io(c)) note_io(c, i, port, TRAP_STRING | (rep ? TRAP_REP : 0) | (input ? TRAP_IN : 0));
        st = input ? ins_one(c, i, port) : outs_one(c, i, port);
        if (st != ST_OK && st != ST_EXIT_DONE) return st;
        if (notes_io(c)) note_io_done(c, i, budget, !rep || reg_get(c, RCX, asize) == 1);
        if (!rep) return st;
        uint64_t count = reg_get(c, RCX, asize) - 1;
        reg_set(c, RCX, asize, count);
        iobus_insn_done(c);
        if (count == 0) return st;
        /* The exit of an element that is not the last one: the instruction comes back for the rest. */
        if (st == ST_EXIT_DONE) return ST_EXIT;
        if (c->code_modified || c->write_count || c->pending_dbg || atomic_load_explicit(&c->limit, memory_order_relaxed) != BLOCK_LIMIT)
            return ST_AGAIN;
    }
}

OPX(ins) { return string_io(c, i, budget, true); }
OPX(outs) { return string_io(c, i, budget, false); }
