/* Exceptions and interrupts: raising, delivery, double and triple fault.
 * SDM 3A "Interrupt and Exception Handling" */
#include "transfer.h"

int raise_vector(struct kvs_vcpu *c, uint8_t vector)
{
    c->exc.pending = true;
    c->exc.has_error = false;
    c->exc.vector = vector;
    c->exc.error = 0;
    c->exc.payload = 0;
    if (vector == EXC_DB) {
        c->exc.payload = c->pending_dbg;
        c->pending_dbg = 0;
    }
    return ST_FAULT;
}

int raise_error(struct kvs_vcpu *c, uint8_t vector, uint32_t error)
{
    raise_vector(c, vector);
    c->exc.has_error = true;
    c->exc.error = error;
    return ST_FAULT;
}

int raise_page_fault(struct kvs_vcpu *c, uint64_t la, uint32_t error)
{
    raise_error(c, EXC_PF, error);
    c->exc.payload = la;
    return ST_FAULT;
}

int raise_debug(struct kvs_vcpu *c, uint64_t dr6_bits)
{
    c->pending_dbg |= dr6_bits;
    return raise_vector(c, EXC_DB);
}

int raise_shutdown(struct kvs_vcpu *c)
{
    c->triple_fault = true;
    return raise_vector(c, EXC_DF);
}

/* SDM 3A "Interrupt 8-Double Fault Exception": benign, contributory, page fault, double fault */
enum { BENIGN, CONTRIBUTORY, PAGE_FAULT, DOUBLE_FAULT };
static int fault_class(uint8_t vector)
{
    switch (vector) {
    case EXC_DE: case EXC_TS: case EXC_NP: case EXC_SS: case EXC_GP: return CONTRIBUTORY;
    case EXC_PF: return PAGE_FAULT;
    case EXC_DF: return DOUBLE_FAULT;
    default: return BENIGN;
    }
}

/* What an exception leaves in CR2, DR6 and DR7 before its handler starts. */
static void take_payload(struct kvs_vcpu *c)
{
    if (c->exc.vector == EXC_PF) {
        c->cr2 = c->exc.payload;
    } else if (c->exc.vector == EXC_DB) {
        /* SDM 3B "Debug Status Register (DR6)": B0-B3 belong to this exception, the rest is sticky */
        c->dr6 = (c->dr6 & ~0xfull) | (c->exc.payload & 0xe00f);
        c->dr7 &= ~BIT(13); /* GD, so that the handler can use the registers */
        c->msr_debugctl &= ~BIT(1);
    }
}

/* The fault in c->exc hit the delivery of an event of class `first`. False: triple fault. */
static bool combine_faults(struct kvs_vcpu *c, int first)
{
    int second = fault_class(c->exc.vector);
    if (first == DOUBLE_FAULT && second != BENIGN) return false;
    if ((first == CONTRIBUTORY && second == CONTRIBUTORY) || (first == PAGE_FAULT && second != BENIGN)) {
        take_payload(c);
        raise_error(c, EXC_DF, 0);
    }
    return true;
}

/*
 * One attempt. A fault of the delivery is left pending in c->exc: benign ones such as #AC can follow
 * each other for ever, and the run loop must see requests in between.
 */
bool deliver_exception(struct kvs_vcpu *c)
{
    uint8_t vector = c->exc.vector;
    take_payload(c);
    if (vector != EXC_DB) c->pending_dbg = 0; /* the instruction will run again */
    c->exc.pending = false;
    int st = interrupt_enter(c, vector, INT_HARD_EXCEPTION, c->exc.has_error, c->exc.error);
    if (st == ST_OK) return true;
    if (st != ST_FAULT) {
        /* Descriptor tables or TSS where no memory is: no processor gets out of that either. */
        c->io_read.active = false;
        iobus_insn_done(c);
        return false;
    }
    if (combine_faults(c, fault_class(vector))) return true;
    c->exc.pending = false;
    return false;
}

bool deliver_interrupt(struct kvs_vcpu *c, uint8_t vector)
{
    int st = interrupt_enter(c, vector, INT_EXTERNAL, false, 0);
    if (st == ST_OK) return true;
    if (st != ST_FAULT) {
        c->io_read.active = false;
        iobus_insn_done(c);
        return false;
    }
    return deliver_exception(c);
}

/* ---- entering a handler ---- */

struct event { uint8_t vector; bool is_soft, has_error; uint32_t error, ext, flags; };

/* EFLAGS image: RF is set for faults, so that an instruction breakpoint does not hit twice.
 * SDM 3B "Instruction-Breakpoint Exception Condition" */
static uint32_t flags_image(const struct kvs_vcpu *c, uint8_t vector, int kind)
{
    uint32_t f = flags_read(c);
    /* Set already in the middle of a repeated instruction, which debug traps and interrupts leave for a while. */
    if (kind == INT_EXTERNAL || kind == INT_NMI || (kind == INT_HARD_EXCEPTION && vector == EXC_DB)) return f;
    return kind == INT_HARD_EXCEPTION && vector != EXC_MC ? f | FLAG_RF : f & ~FLAG_RF;
}

/* SDM 3B "Interrupt and Exception Handling" of the real-address mode */
static int enter_real(struct kvs_vcpu *c, const struct event *e)
{
    uint32_t entry = 0;
    if (e->vector * 4u + 3 > c->idtr.limit) return raise_gp(c, e->vector * 8u + 2 + e->ext);
    int st = lread(c, (uint32_t)(c->idtr.base + e->vector * 4u), &entry, 4, LA_SYSTEM);
    if (st != ST_OK) return st;
    struct stack s;
    stack_current(c, &s);
    uint64_t frame[3] = { e->flags & 0xffff, c->seg[SEG_CS].sel, c->rip & 0xffff };
    if ((entry & 0xffff) > c->seg[SEG_CS].limit) return raise_gp(c, e->ext);
    if ((st = stack_push(c, &s, frame, 3, 2)) != ST_OK) return st;
    stack_commit(c, &s);
    c->eflags &= ~(FLAG_IF | FLAG_TF | FLAG_AC | FLAG_RF);
    segment_set_real(&c->seg[SEG_CS], (uint16_t)(entry >> 16));
    c->rip = entry & 0xffff;
    segments_changed(c);
    return 0;
}

/* Reads and checks the handler's code segment. */
static int handler_segment(struct kvs_vcpu *c, uint16_t sel, uint32_t ext, struct descriptor *d)
{
    uint32_t error = sel_error(sel) | ext;
    if (sel_is_null(sel)) return raise_gp(c, ext);
    int st = descriptor_read(c, sel, d);
    if (st < 0) return raise_gp(c, error);
    if (st != ST_OK) return st;
    if (!attr_is_code(d->attr) || attr_dpl(d->attr) > c->cpl) return raise_gp(c, error);
    if (!(d->attr & ATTR_P)) return raise_error(c, EXC_NP, error);
    return 0;
}

static void enter_commit(struct kvs_vcpu *c, const struct stack *s, const struct descriptor *cs, uint16_t sel,
                         uint32_t cpl, uint64_t rip, bool trap_gate)
{
    stack_commit(c, s);
    c->eflags &= ~(FLAG_TF | FLAG_NT | FLAG_RF | FLAG_VM);
    if (!trap_gate) c->eflags &= ~FLAG_IF;
    segment_set(&c->seg[SEG_CS], cs, (uint16_t)((sel & 0xfffc) | cpl));
    c->cpl = (uint8_t)cpl;
    c->rip = rip;
}

/* SDM 2 "INT n/INTO/INT3/INT1", IA-32e: 64-bit gates */
static int enter_long(struct kvs_vcpu *c, const struct event *e)
{
    uint32_t idt_error = e->vector * 8u + 2 + e->ext;
    uint64_t gate[2] = { 0, 0 };
    if (e->vector * 16u + 15 > c->idtr.limit) return raise_gp(c, idt_error);
    int st = lread(c, c->idtr.base + e->vector * 16u, gate, 16, LA_SYSTEM);
    if (st != ST_OK) return st;
    uint32_t attr = (uint32_t)(gate[0] >> 40) & 0xff, type = attr & 0x1f;
    if (type != SYS_INT32 && type != SYS_TRAP32) return raise_gp(c, idt_error);
    if (e->is_soft && attr_dpl(attr) < c->cpl) return raise_gp(c, idt_error);
    if (!(attr & ATTR_P)) return raise_error(c, EXC_NP, idt_error);

    uint16_t sel = (uint16_t)(gate[0] >> 16);
    uint64_t rip = (gate[0] & 0xffff) | (gate[0] >> 32 & 0xffff0000u) | gate[1] << 32;
    struct descriptor cs;
    if ((st = handler_segment(c, sel, e->ext, &cs)) != ST_OK) return st;
    if ((cs.attr & (ATTR_L | ATTR_DB)) != ATTR_L) return raise_gp(c, sel_error(sel) | e->ext);
    uint32_t cpl = attr_is_conforming(cs.attr) ? c->cpl : attr_dpl(cs.attr), ist = (uint32_t)(gate[0] >> 32) & 7;

    uint64_t rsp = c->gpr[RSP];
    if (ist != 0) st = tss_stack64(c, ist + 3, e->ext, &rsp);
    else if (cpl < c->cpl) st = tss_stack64(c, cpl, e->ext, &rsp);
    if (st != ST_OK) return st;
    struct stack s = { .rsp = rsp & ~15ull, .mask = ~0ull, .flat = true, .error = e->ext,
                       .how = cpl < c->cpl ? LA_SYSTEM : LA_USER_RULES };
    uint64_t frame[6] = { c->seg[SEG_SS].sel, c->gpr[RSP], e->flags, c->seg[SEG_CS].sel, c->rip, e->error };
    if (!is_canonical(c, rip)) return raise_gp(c, e->ext);
    if ((st = stack_push(c, &s, frame, e->has_error ? 6 : 5, 8)) != ST_OK) return st;
    if ((st = descriptor_set_accessed(c, &cs)) != ST_OK) return st;
    if (cpl != c->cpl) segment_set_null(&c->seg[SEG_SS], (uint16_t)cpl, cpl);
    enter_commit(c, &s, &cs, sel, cpl, rip, type == SYS_TRAP32);
    segments_changed(c);
    return 0;
}

/* Into a more privileged stack; from virtual-8086 mode the data segments go there too. */
static int enter_inner(struct kvs_vcpu *c, const struct event *e, struct descriptor *cs, uint16_t sel,
                       uint64_t rip, uint32_t type)
{
    uint32_t cpl = attr_dpl(cs->attr), size = type & 8 ? 4 : 2, n = 0;
    bool from_v86 = is_v86(c);
    uint16_t ss;
    uint64_t sp, frame[10];
    struct descriptor d;
    struct stack s;
    int st = tss_stack(c, cpl, e->ext, &ss, &sp, &d);
    if (st != ST_OK) return st;
    stack_new(c, &s, &d, sp, cpl);
    s.error = sel_error(ss) | e->ext;
    if (from_v86) {
        frame[n++] = c->seg[SEG_GS].sel;
        frame[n++] = c->seg[SEG_FS].sel;
        frame[n++] = c->seg[SEG_DS].sel;
        frame[n++] = c->seg[SEG_ES].sel;
    }
    frame[n++] = c->seg[SEG_SS].sel;
    frame[n++] = c->gpr[RSP];
    frame[n++] = e->flags;
    frame[n++] = c->seg[SEG_CS].sel;
    frame[n++] = c->rip;
    if (e->has_error) frame[n++] = e->error;
    if (rip > cs->limit) return raise_gp(c, e->ext);
    if ((st = stack_push(c, &s, frame, n, size)) != ST_OK) return st;
    if ((st = descriptor_set_accessed(c, cs)) != ST_OK) return st;
    segment_set(&c->seg[SEG_SS], &d, ss);
    if (from_v86)
        for (uint32_t seg = 0; seg < SEG_COUNT; seg++)
            if (seg != SEG_CS && seg != SEG_SS) segment_set_null(&c->seg[seg], 0, 0);
    enter_commit(c, &s, cs, sel, cpl, rip, type & 1);
    segments_changed(c);
    return 0;
}

/* SDM 2 "INT n/INTO/INT3/INT1", protected mode */
static int enter_protected(struct kvs_vcpu *c, const struct event *e)
{
    uint32_t idt_error = e->vector * 8u + 2 + e->ext;
    uint64_t gate = 0;
    if (e->vector * 8u + 7 > c->idtr.limit) return raise_gp(c, idt_error);
    int st = lread(c, (uint32_t)(c->idtr.base + e->vector * 8u), &gate, 8, LA_SYSTEM);
    if (st != ST_OK) return st;
    uint32_t attr = (uint32_t)(gate >> 40) & 0xff, type = attr & 0x1f;
    uint16_t sel = (uint16_t)(gate >> 16);
    if (type != SYS_TASK_GATE && type != SYS_INT16 && type != SYS_TRAP16 && type != SYS_INT32 && type != SYS_TRAP32)
        return raise_gp(c, idt_error);
    if (e->is_soft && attr_dpl(attr) < c->cpl) return raise_gp(c, idt_error);
    if (!(attr & ATTR_P)) return raise_error(c, EXC_NP, idt_error);
    if (type == SYS_TASK_GATE) {
        bool switched;
        return task_switch(c, sel, TASK_INTERRUPT, e->ext, e->has_error, e->error, &switched);
    }

    struct descriptor cs;
    if ((st = handler_segment(c, sel, e->ext, &cs)) != ST_OK) return st;
    uint64_t rip = (gate & 0xffff) | (type & 8 ? gate >> 32 & 0xffff0000u : 0);
    uint32_t dpl = attr_dpl(cs.attr);
    bool conforming = attr_is_conforming(cs.attr);
    if (is_v86(c) && (conforming || dpl != 0)) return raise_gp(c, sel_error(sel) | e->ext);
    if (!conforming && dpl < c->cpl) return enter_inner(c, e, &cs, sel, rip, type);

    struct stack s;
    stack_current(c, &s);
    s.error = e->ext;
    uint64_t frame[4] = { e->flags, c->seg[SEG_CS].sel, c->rip, e->error };
    if (rip > cs.limit) return raise_gp(c, e->ext);
    if ((st = stack_push(c, &s, frame, e->has_error ? 4 : 3, type & 8 ? 4 : 2)) != ST_OK) return st;
    if ((st = descriptor_set_accessed(c, &cs)) != ST_OK) return st;
    enter_commit(c, &s, &cs, sel, c->cpl, rip, type & 1);
    segments_changed(c);
    return 0;
}

int interrupt_enter(struct kvs_vcpu *c, uint8_t vector, int kind, bool has_error, uint32_t error)
{
    bool is_soft = kind == INT_SOFT || kind == INT_INT3 || kind == INT_INTO;
    atomic_thread_fence(memory_order_seq_cst); /* SDM 3A "Store Buffer": empty before a handler starts */
    struct event e = { .vector = vector, .is_soft = is_soft, .has_error = has_error, .error = error,
                       .ext = !is_soft, .flags = flags_image(c, vector, kind) };
    int st = !is_protected(c) ? enter_real(c, &e) : is_long_mode(c) ? enter_long(c, &e) : enter_protected(c, &e);
    if (st == ST_OK) c->int_shadow = 0;
    return st;
}
