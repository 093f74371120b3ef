/* Task state segments: stacks for privilege changes, and hardware task switching.
 * SDM 3A "Task Management" */
#include "transfer.h"

static uint64_t la_truncate(const struct kvs_vcpu *c, uint64_t la) { return is_long_mode(c) ? la : (uint32_t)la; }

int tss_stack64(struct kvs_vcpu *c, uint32_t index, uint32_t ext, uint64_t *rsp)
{
    /* SDM 3A "TSS in 64-Bit Mode": RSP0-2 from byte 4 on, IST1-7 from byte 36 on */
    uint32_t off = 4 + 8 * index;
    if (c->tr.attr & ATTR_NULL || off + 7 > c->tr.limit) return raise_error(c, EXC_TS, sel_error(c->tr.sel) | ext);
    int st = lread(c, c->tr.base + off, rsp, 8, LA_SYSTEM);
    if (st != ST_OK) return st;
    return is_canonical(c, *rsp) ? ST_OK : raise_error(c, EXC_SS, ext);
}

int tss_stack(struct kvs_vcpu *c, uint32_t cpl, uint32_t ext, uint16_t *ss, uint64_t *sp, struct descriptor *d)
{
    bool is32 = c->tr.attr & 8;
    uint32_t off = is32 ? 4 + 8 * cpl : 2 + 4 * cpl, bytes = is32 ? 4 : 2;
    uint8_t raw[6] = { 0 };
    if (c->tr.attr & ATTR_NULL || off + 2 * bytes - 1 > c->tr.limit)
        return raise_error(c, EXC_TS, sel_error(c->tr.sel) | ext);
    int st = lread(c, la_truncate(c, c->tr.base + off), raw, bytes + 2, LA_SYSTEM);
    if (st != ST_OK) return st;
    *sp = is32 ? ld32(raw) : ld16(raw);
    *ss = ld16(raw + bytes);

    uint32_t error = sel_error(*ss) | ext;
    if (sel_is_null(*ss)) return raise_error(c, EXC_TS, ext);
    st = descriptor_read(c, *ss, d);
    if (st < 0) return raise_error(c, EXC_TS, error);
    if (st != ST_OK) return st;
    if ((*ss & 3u) != cpl || attr_dpl(d->attr) != cpl || !attr_is_writable_data(d->attr))
        return raise_error(c, EXC_TS, error);
    if (!(d->attr & ATTR_P)) return raise_error(c, EXC_SS, error);
    return descriptor_set_accessed(c, d);
}

/* ---- task switch ---- */

/* The dynamic fields of both TSS formats. */
struct task_image { uint32_t cr3, eip, eflags, gpr[8], ldt, trap; uint16_t sel[SEG_COUNT]; };
#define TSS16_LIMIT 43u
#define TSS32_LIMIT 103u

static int image_read(struct kvs_vcpu *c, uint64_t base, bool is32, struct task_image *t)
{
    uint8_t raw[104] = { 0 };
    int st = lread(c, base, raw, is32 ? TSS32_LIMIT + 1 : TSS16_LIMIT + 1, LA_SYSTEM);
    if (st != ST_OK) return st;
    *t = (struct task_image){ 0 };
    if (is32) {
        t->cr3 = ld32(raw + 28);
        t->eip = ld32(raw + 32);
        t->eflags = ld32(raw + 36);
        for (uint32_t k = 0; k < 8; k++) t->gpr[k] = ld32(raw + 40 + 4 * k);
        for (uint32_t k = 0; k < SEG_COUNT; k++) t->sel[k] = ld16(raw + 72 + 4 * k);
        t->ldt = ld16(raw + 96);
        t->trap = raw[100] & 1;
    } else {
        t->eip = ld16(raw + 14);
        t->eflags = ld16(raw + 16);
        for (uint32_t k = 0; k < 8; k++) t->gpr[k] = ld16(raw + 18 + 2 * k) | 0xffff0000u;
        for (uint32_t k = 0; k <= SEG_DS; k++) t->sel[k] = ld16(raw + 34 + 2 * k);
        t->ldt = ld16(raw + 42);
    }
    return ST_OK;
}

static int image_save(struct kvs_vcpu *c, uint32_t eflags)
{
    uint8_t raw[64] = { 0 };
    if (c->tr.attr & 8) {
        st32(raw, (uint32_t)c->rip);
        st32(raw + 4, eflags);
        for (uint32_t k = 0; k < 8; k++) st32(raw + 8 + 4 * k, (uint32_t)c->gpr[k]);
        for (uint32_t k = 0; k < SEG_COUNT; k++) st32(raw + 40 + 4 * k, c->seg[k].sel);
        return lwrite(c, (uint32_t)(c->tr.base + 32), raw, 64, LA_SYSTEM);
    }
    st16(raw, (uint16_t)c->rip);
    st16(raw + 2, (uint16_t)eflags);
    for (uint32_t k = 0; k < 8; k++) st16(raw + 4 + 2 * k, (uint16_t)c->gpr[k]);
    for (uint32_t k = 0; k <= SEG_DS; k++) st16(raw + 20 + 2 * k, c->seg[k].sel);
    return lwrite(c, (uint32_t)(c->tr.base + 14), raw, 28, LA_SYSTEM);
}

/* Busy bit of the old task, or of a TSS by selector. */
static int set_busy(struct kvs_vcpu *c, uint16_t sel, bool busy)
{
    struct descriptor d;
    int st = descriptor_read(c, sel, &d);
    if (st < 0) return ST_OK;
    if (st != ST_OK) return st;
    uint32_t type = d.attr & ATTR_TYPE;
    return descriptor_set_type(c, &d, busy ? type | 2 : type & ~2u);
}

/* SDM 3A "Task Switching": segment checks in the new task, #TS except where noted */
static int load_task_segment(struct kvs_vcpu *c, uint32_t seg, uint16_t sel, uint32_t ext)
{
    uint32_t error = sel_error(sel) | ext, rpl = sel & 3;
    struct descriptor d;
    if (sel_is_null(sel)) {
        if (seg == SEG_CS || seg == SEG_SS) return raise_error(c, EXC_TS, error);
        return ST_OK;
    }
    int st = descriptor_read(c, sel, &d);
    if (st < 0) return raise_error(c, EXC_TS, error);
    if (st != ST_OK) return st;
    uint32_t dpl = attr_dpl(d.attr);
    bool code = attr_is_code(d.attr), conforming = code && attr_is_conforming(d.attr), ok;
    uint8_t not_present = EXC_NP;
    if (seg == SEG_CS) {
        ok = code && (conforming ? dpl <= rpl : dpl == rpl);
    } else if (seg == SEG_SS) {
        ok = attr_is_writable_data(d.attr) && dpl == c->cpl && rpl == c->cpl;
        not_present = EXC_SS;
    } else {
        ok = (d.attr & ATTR_S) && (!code || d.attr & ATTR_W) && (conforming || (dpl >= c->cpl && dpl >= rpl));
    }
    if (!ok) return raise_error(c, EXC_TS, error);
    if (!(d.attr & ATTR_P)) return raise_error(c, not_present, error);
    if ((st = descriptor_set_accessed(c, &d)) != ST_OK) return st;
    segment_set(&c->seg[seg], &d, sel);
    return ST_OK;
}

/* Behind the point of no return: LDT, segments, error code, in the new task's context. */
static int enter_task(struct kvs_vcpu *c, const struct task_image *t, uint32_t ext, bool is32, bool has_error,
                      uint32_t error)
{
    static const uint8_t order[] = { SEG_CS, SEG_SS, SEG_ES, SEG_DS, SEG_FS, SEG_GS };
    uint16_t ldt = (uint16_t)t->ldt;
    int st;
    if (!sel_is_null(ldt)) {
        struct descriptor d;
        uint32_t ldt_error = sel_error(ldt) | ext;
        if (ldt & 4) return raise_error(c, EXC_TS, ldt_error);
        st = descriptor_read(c, ldt, &d);
        if (st < 0) return raise_error(c, EXC_TS, ldt_error);
        if (st != ST_OK) return st;
        if (d.attr & ATTR_S || (d.attr & ATTR_TYPE) != SYS_LDT || !(d.attr & ATTR_P))
            return raise_error(c, EXC_TS, ldt_error);
        segment_set(&c->ldtr, &d, ldt);
    }
    if (!(t->eflags & FLAG_VM) || !is32) {
        for (uint32_t k = 0; k < ARRAY_SIZE(order); k++)
            if ((st = load_task_segment(c, order[k], t->sel[order[k]], ext)) != ST_OK) return st;
    }
    segments_changed(c);
    if (has_error) {
        struct stack s;
        uint64_t item = error;
        stack_current(c, &s);
        s.error = ext;
        if ((st = stack_push(c, &s, &item, 1, is32 ? 4 : 2)) != ST_OK) return st;
        stack_commit(c, &s);
    }
    if (c->rip > c->seg[SEG_CS].limit) return raise_gp(c, ext);
    if (t->trap) c->pending_dbg |= DR6_BT;
    return ST_OK;
}

static int new_tss_check(struct kvs_vcpu *c, uint16_t sel, int reason, uint32_t ext, struct descriptor *d)
{
    uint32_t error = sel_error(sel) | ext;
    uint8_t vector = reason == TASK_IRET ? EXC_TS : EXC_GP;
    if (sel_is_null(sel) || sel & 4) return raise_error(c, vector, error);
    int st = descriptor_read(c, sel, d);
    if (st < 0) return raise_error(c, vector, error);
    if (st != ST_OK) return st;
    uint32_t type = d->attr & (ATTR_S | ATTR_TYPE);
    bool ok = reason == TASK_IRET ? type == SYS_TSS16_BUSY || type == SYS_TSS32_BUSY
                                  : type == SYS_TSS16 || type == SYS_TSS32;
    if (!ok) return raise_error(c, vector, error);
    if (!(d->attr & ATTR_P)) return raise_error(c, EXC_NP, error);
    if (d->limit < (type & 8 ? TSS32_LIMIT : TSS16_LIMIT)) return raise_error(c, EXC_TS, error);
    return ST_OK;
}

int task_switch(struct kvs_vcpu *c, uint16_t sel, int reason, uint32_t ext, bool has_error, uint32_t error, bool *switched)
{
    struct descriptor d;
    struct task_image t;
    *switched = false;
    int st = new_tss_check(c, sel, reason, ext, &d);
    if (st != ST_OK) return st;
    bool is32 = d.attr & 8, nested = reason == TASK_CALL || reason == TASK_INTERRUPT;
    uint64_t base = d.base;
    if ((st = image_read(c, base, is32, &t)) != ST_OK) return st;

    uint32_t old_flags = flags_read(c);
    if (reason == TASK_IRET) old_flags &= ~FLAG_NT;
    if (c->tr.attr & ATTR_NULL || c->tr.limit < (c->tr.attr & 8 ? TSS32_LIMIT : TSS16_LIMIT))
        return raise_error(c, EXC_TS, sel_error(c->tr.sel) | ext);
    if ((st = image_save(c, old_flags)) != ST_OK) return st;
    if (nested) {
        uint16_t link = c->tr.sel;
        if ((st = lwrite(c, base, &link, 2, LA_SYSTEM)) != ST_OK) return st;
    }
    if (!nested && (st = set_busy(c, c->tr.sel, false)) != ST_OK) return st;
    if (reason != TASK_IRET && (st = descriptor_set_type(c, &d, (d.attr & ATTR_TYPE) | 2)) != ST_OK) return st;

    /* From here on the new task runs. */
    *switched = true;
    segment_set(&c->tr, &d, sel);
    c->tr.attr |= 2;
    c->cr0 |= CR0_TS;
    c->dr7 &= ~0x155ull; /* the local enable bits */
    uint32_t flags = t.eflags & (FLAGS_STATUS | FLAG_TF | FLAG_IF | FLAG_DF | FLAG_IOPL | FLAG_NT | FLAG_RF |
                                 FLAG_VM | FLAG_AC | FLAG_VIF | FLAG_VIP | FLAG_ID);
    if (nested) flags |= FLAG_NT;
    flags_write(c, flags);
    for (uint32_t k = 0; k < 8; k++) c->gpr[k] = t.gpr[k];
    c->rip = t.eip;
    bool to_v86 = flags & FLAG_VM;
    for (uint32_t k = 0; k < SEG_COUNT; k++) {
        if (to_v86) segment_set_v86(&c->seg[k], t.sel[k]);
        else segment_set_null(&c->seg[k], t.sel[k], 0);
    }
    segment_set_null(&c->ldtr, (uint16_t)t.ldt, 0);
    c->cpl = to_v86 ? 3 : t.sel[SEG_CS] & 3;
    segments_changed(c);
    if (is32 && c->cr0 & CR0_PG) {
        uint64_t cr3 = t.cr3;
        if (c->cr4 & CR4_PAE && mmu_load_pdptrs(c, cr3) < 0) return raise_gp(c, ext);
        if (c->cr3 != cr3) {
            c->cr3 = cr3;
            tlb_flush_nonglobal(c);
            jc_flush(c);
        }
    }
    return enter_task(c, &t, ext, is32, has_error, error);
}

int task_transfer(struct kvs_vcpu *c, uint16_t sel, int reason)
{
    bool switched;
    int st = task_switch(c, sel, reason, 0, false, 0, &switched);
    if (!switched) return st;
    /* The faults of a new task are its own: they are delivered with its RIP, not with the RIP of the
     * instruction that switched. */
    if (st == ST_FAULT && !deliver_exception(c)) return raise_shutdown(c);
    return st == ST_FAULT ? ST_OK : st;
}
