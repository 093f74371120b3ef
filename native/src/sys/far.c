/* Far control transfers. SDM 2 "JMP", "CALL", "RET", "IRET/IRETD/IRETQ" */
#include "../mmu/segment.h"
#include "transfer.h"

/* ---- stacks ---- */

void stack_current(const struct kvs_vcpu *c, struct stack *s)
{
    const struct segment *ss = &c->seg[SEG_SS];
    uint32_t width = is_code64(c) ? 8 : ss->attr & ATTR_DB ? 4 : 2;
    *s = (struct stack){ .base = ss->base, .rsp = c->gpr[RSP], .limit = ss->limit, .attr = ss->attr,
                         .how = LA_USER_RULES, .flat = width == 8 };
    s->mask = width == 8 ? ~0ull : width == 4 ? 0xffffffffull : 0xffffull;
    if (s->flat) s->base = 0;
}

void stack_new(const struct kvs_vcpu *c, struct stack *s, const struct descriptor *d, uint64_t rsp, uint32_t cpl)
{
    *s = (struct stack){ .base = d->base, .rsp = rsp, .limit = d->limit, .attr = d->attr,
                         .mask = d->attr & ATTR_DB ? 0xffffffffull : 0xffffull,
                         .how = cpl < c->cpl ? LA_SYSTEM : LA_USER_RULES };
}

static bool stack_in_limit(const struct kvs_vcpu *c, const struct stack *s, uint64_t off, uint32_t bytes)
{
    uint64_t last = off + bytes - 1;
    if (s->flat) return is_canonical(c, off) && is_canonical(c, last) && last >= off;
    if (s->attr & ATTR_NULL) return false;
    if ((s->attr & (ATTR_CODE | ATTR_EC)) == ATTR_EC) return off > s->limit && last <= s->mask;
    return last <= s->limit;
}

int stack_push(struct kvs_vcpu *c, struct stack *s, const uint64_t *v, uint32_t n, uint32_t size)
{
    uint8_t frame[32 * 8 + 64];
    uint32_t total = n * size;
    if (total > sizeof frame) return raise_error(c, EXC_SS, s->error);
    for (uint32_t k = 0; k < n; k++) memcpy(frame + (n - 1 - k) * size, &v[k], size);

    uint64_t low = (s->rsp - total) & s->mask, last = low + total - 1, la = s->base + low;
    if (!s->flat) la = (uint32_t)la;
    const bool tagged = s->flat && s->how == LA_USER_RULES;
    int st;
    if (last >= low && last <= s->mask && (s->flat || la + total - 1 <= 0xffffffffull)) {
        if (tagged) la = la_untag(c, la);
        if (!stack_in_limit(c, s, s->flat ? la : low, total)) return raise_error(c, EXC_SS, s->error);
        if (s->how == LA_USER_RULES && (la & (size - 1)) && alignment_checked(c)) return raise_error(c, EXC_AC, 0);
        if ((st = lwrite(c, la, frame, total, s->how)) != ST_OK) return st;
    } else {
        /* The frame wraps around the end of the stack segment: item by item, checks before writes. */
        for (uint32_t pass = 0; pass < 2; pass++) {
            for (uint32_t k = 0; k < n; k++) {
                uint64_t off = (s->rsp - (uint64_t)(k + 1) * size) & s->mask;
                la = tagged ? la_untag(c, off) : s->flat ? off : (uint32_t)(s->base + off);
                if (!stack_in_limit(c, s, s->flat ? la : off, size)) return raise_error(c, EXC_SS, s->error);
                st = pass == 0 ? lwrite_check(c, la, size, s->how)
                               : lwrite(c, la, frame + (n - 1 - k) * size, size, s->how);
                if (st != ST_OK) return st;
            }
        }
    }
    s->rsp = (s->rsp & ~s->mask) | low;
    return ST_OK;
}

void stack_commit(struct kvs_vcpu *c, const struct stack *s)
{
    if (s->mask == 0xffff) c->gpr[RSP] = (c->gpr[RSP] & ~0xffffffffull) | (uint32_t)s->rsp;
    else c->gpr[RSP] = s->rsp & s->mask;
}

static uint32_t stack_width(const struct kvs_vcpu *c)
{
    return is_code64(c) ? 8 : c->seg[SEG_SS].attr & ATTR_DB ? 4 : 2;
}

int stack_peek(struct kvs_vcpu *c, uint64_t offset, uint64_t *v, uint32_t size)
{
    uint64_t off = c->gpr[RSP] + offset;
    uint32_t width = stack_width(c);
    *v = 0;
    return vread(c, SEG_SS, width == 8 ? off : width == 4 ? (uint32_t)off : (uint16_t)off, v, size);
}

void stack_adjust(struct kvs_vcpu *c, uint64_t delta, uint32_t width)
{
    uint64_t rsp = c->gpr[RSP] + delta;
    if (width == 8) c->gpr[RSP] = rsp;
    else if (width == 4) c->gpr[RSP] = (uint32_t)rsp;
    else c->gpr[RSP] = (c->gpr[RSP] & ~0xffffull) | (rsp & 0xffff);
}

/* ---- code segments ---- */

int code_check_rip(struct kvs_vcpu *c, uint32_t attr, uint32_t limit, uint64_t off)
{
    bool ok = is_long_mode(c) && attr & ATTR_L ? is_canonical(c, off) : off <= limit;
    return ok ? ST_OK : raise_gp(c, 0);
}

static uint64_t truncate_to(uint64_t v, uint32_t size)
{
    return size == 8 ? v : size == 4 ? (uint32_t)v : (uint16_t)v;
}

/* L and D both set is reserved in IA-32e mode. */
static bool code_is_reserved(const struct kvs_vcpu *c, uint32_t attr)
{
    return is_long_mode(c) && (attr & (ATTR_L | ATTR_DB)) == (ATTR_L | ATTR_DB);
}

static void enter_code(struct kvs_vcpu *c, const struct descriptor *d, uint16_t sel, uint64_t rip)
{
    segment_set(&c->seg[SEG_CS], d, (uint16_t)((sel & 0xfffc) | c->cpl));
    c->rip = rip;
    segments_changed(c);
}

static int read_selector(struct kvs_vcpu *c, uint16_t sel, struct descriptor *d)
{
    if (sel_is_null(sel)) return raise_gp(c, 0);
    int st = descriptor_read(c, sel, d);
    return st < 0 ? raise_gp(c, sel_error(sel)) : st;
}

/* Direct transfer to a code segment: no change of privilege. */
static int check_direct(struct kvs_vcpu *c, uint16_t sel, const struct descriptor *d)
{
    uint32_t dpl = attr_dpl(d->attr), error = sel_error(sel);
    if (code_is_reserved(c, d->attr)) return raise_gp(c, error);
    if (attr_is_conforming(d->attr) ? dpl > c->cpl : (sel & 3u) > c->cpl || dpl != c->cpl) return raise_gp(c, error);
    if (!(d->attr & ATTR_P)) return raise_error(c, EXC_NP, error);
    return ST_OK;
}

struct call_gate { uint16_t sel; uint64_t off; uint32_t size, count; struct descriptor cs; };

/* Checks a call gate and the code segment behind it (but not the target's privilege). */
static int read_gate(struct kvs_vcpu *c, uint16_t sel, struct descriptor *d, struct call_gate *g)
{
    uint32_t type = d->attr & ATTR_TYPE, error = sel_error(sel), dpl = attr_dpl(d->attr);
    uint64_t high = 0;
    if (is_long_mode(c)) {
        uint32_t reserved = 0;
        struct descriptor whole = { 0 };
        if (type != SYS_CALL32) return raise_gp(c, error);
        int st = descriptor_read_high(c, sel, &whole, &reserved);
        if (st < 0 || (st == ST_OK && reserved & 0x1f00)) return raise_gp(c, error);
        if (st != ST_OK) return st;
        high = whole.base;
    }
    if (dpl < c->cpl || (sel & 3u) > dpl) return raise_gp(c, error);
    if (!(d->attr & ATTR_P)) return raise_error(c, EXC_NP, error);
    g->sel = (uint16_t)(d->lo >> 16);
    g->size = is_long_mode(c) ? 8 : type == SYS_CALL32 ? 4 : 2;
    g->off = (d->lo & 0xffff) | (g->size > 2 ? d->hi & 0xffff0000u : 0) | high;
    g->count = d->hi & 31;

    int st = read_selector(c, g->sel, &g->cs);
    if (st != ST_OK) return st;
    error = sel_error(g->sel);
    if (!attr_is_code(g->cs.attr) || attr_dpl(g->cs.attr) > c->cpl) return raise_gp(c, error);
    if (is_long_mode(c) && (g->cs.attr & (ATTR_L | ATTR_DB)) != ATTR_L) return raise_gp(c, error);
    if (!(g->cs.attr & ATTR_P)) return raise_error(c, EXC_NP, error);
    return ST_OK;
}

/* TSS or task gate in a far JMP or CALL. */
static int transfer_task(struct kvs_vcpu *c, uint16_t sel, const struct descriptor *d, int reason)
{
    uint32_t dpl = attr_dpl(d->attr), error = sel_error(sel);
    if (is_long_mode(c) || dpl < c->cpl || (sel & 3u) > dpl) return raise_gp(c, error);
    if ((d->attr & ATTR_TYPE) == SYS_TASK_GATE) {
        if (!(d->attr & ATTR_P)) return raise_error(c, EXC_NP, error);
        sel = (uint16_t)(d->lo >> 16);
    }
    return task_transfer(c, sel, reason);
}

static bool is_task(const struct descriptor *d)
{
    uint32_t type = d->attr & ATTR_TYPE;
    return type == SYS_TASK_GATE || type == SYS_TSS16 || type == SYS_TSS32;
}
static bool is_call_gate(const struct descriptor *d)
{
    uint32_t type = d->attr & ATTR_TYPE;
    return type == SYS_CALL16 || type == SYS_CALL32;
}

int far_jump(struct kvs_vcpu *c, uint16_t sel, uint64_t off, uint32_t size)
{
    int st;
    off = truncate_to(off, size);
    if (is_real_or_v86(c)) {
        if (off > (is_v86(c) ? 0xffffu : c->seg[SEG_CS].limit)) return raise_gp(c, 0);
        load_segment_real(c, SEG_CS, sel);
        c->rip = off;
        return ST_OK;
    }
    struct descriptor d;
    if ((st = read_selector(c, sel, &d)) != ST_OK) return st;
    if (attr_is_code(d.attr)) {
        if ((st = check_direct(c, sel, &d)) != ST_OK) return st;
        if ((st = code_check_rip(c, d.attr, d.limit, off)) != ST_OK) return st;
        if ((st = descriptor_set_accessed(c, &d)) != ST_OK) return st;
        enter_code(c, &d, sel, off);
        return ST_OK;
    }
    if (d.attr & ATTR_S) return raise_gp(c, sel_error(sel));
    if (is_task(&d)) return transfer_task(c, sel, &d, TASK_JUMP);
    if (!is_call_gate(&d)) return raise_gp(c, sel_error(sel));

    struct call_gate g;
    if ((st = read_gate(c, sel, &d, &g)) != ST_OK) return st;
    if (!attr_is_conforming(g.cs.attr) && attr_dpl(g.cs.attr) != c->cpl) return raise_gp(c, sel_error(g.sel));
    if ((st = code_check_rip(c, g.cs.attr, g.cs.limit, g.off)) != ST_OK) return st;
    if ((st = descriptor_set_accessed(c, &g.cs)) != ST_OK) return st;
    enter_code(c, &g.cs, g.sel, g.off);
    return ST_OK;
}

/* CALL through a gate into a more privileged segment. */
static int call_inner(struct kvs_vcpu *c, struct call_gate *g)
{
    uint32_t cpl = attr_dpl(g->cs.attr), n = 0;
    uint64_t items[36], sp;
    struct descriptor d = { 0 };
    struct stack s;
    uint16_t ss = (uint16_t)cpl;
    int st;
    items[n++] = c->seg[SEG_SS].sel;
    items[n++] = c->gpr[RSP];
    if (g->size == 8) {
        if ((st = tss_stack64(c, cpl, 0, &sp)) != ST_OK) return st;
        s = (struct stack){ .rsp = sp, .mask = ~0ull, .flat = true, .how = LA_SYSTEM };
    } else {
        if ((st = tss_stack(c, cpl, 0, &ss, &sp, &d)) != ST_OK) return st;
        stack_new(c, &s, &d, sp, cpl);
        s.error = sel_error(ss);
        for (uint32_t k = g->count; k > 0; k--)
            if ((st = stack_peek(c, (uint64_t)(k - 1) * g->size, &items[n++], g->size)) != ST_OK) return st;
    }
    items[n++] = c->seg[SEG_CS].sel;
    items[n++] = c->rip;
    if ((st = code_check_rip(c, g->cs.attr, g->cs.limit, g->off)) != ST_OK) return st;
    if ((st = stack_push(c, &s, items, n, g->size)) != ST_OK) return st;
    if ((st = descriptor_set_accessed(c, &g->cs)) != ST_OK) return st;
    if (g->size == 8) segment_set_null(&c->seg[SEG_SS], ss, cpl);
    else segment_set(&c->seg[SEG_SS], &d, ss);
    stack_commit(c, &s);
    c->cpl = (uint8_t)cpl;
    enter_code(c, &g->cs, g->sel, g->off);
    return ST_OK;
}

int far_call(struct kvs_vcpu *c, uint16_t sel, uint64_t off, uint32_t size)
{
    int st;
    struct stack s;
    uint64_t frame[2] = { c->seg[SEG_CS].sel, c->rip };
    off = truncate_to(off, size);
    stack_current(c, &s);
    if (is_real_or_v86(c)) {
        if (off > (is_v86(c) ? 0xffffu : c->seg[SEG_CS].limit)) return raise_gp(c, 0);
        if ((st = stack_push(c, &s, frame, 2, size)) != ST_OK) return st;
        stack_commit(c, &s);
        load_segment_real(c, SEG_CS, sel);
        c->rip = off;
        return ST_OK;
    }
    struct descriptor d;
    if ((st = read_selector(c, sel, &d)) != ST_OK) return st;
    if (attr_is_code(d.attr)) {
        if ((st = check_direct(c, sel, &d)) != ST_OK) return st;
        if ((st = code_check_rip(c, d.attr, d.limit, off)) != ST_OK) return st;
        if ((st = stack_push(c, &s, frame, 2, size)) != ST_OK) return st;
        if ((st = descriptor_set_accessed(c, &d)) != ST_OK) return st;
        stack_commit(c, &s);
        enter_code(c, &d, sel, off);
        return ST_OK;
    }
    if (d.attr & ATTR_S) return raise_gp(c, sel_error(sel));
    if (is_task(&d)) return transfer_task(c, sel, &d, TASK_CALL);
    if (!is_call_gate(&d)) return raise_gp(c, sel_error(sel));

    struct call_gate g;
    if ((st = read_gate(c, sel, &d, &g)) != ST_OK) return st;
    if (!attr_is_conforming(g.cs.attr) && attr_dpl(g.cs.attr) < c->cpl) return call_inner(c, &g);
    if ((st = code_check_rip(c, g.cs.attr, g.cs.limit, g.off)) != ST_OK) return st;
    if ((st = stack_push(c, &s, frame, 2, g.size)) != ST_OK) return st;
    if ((st = descriptor_set_accessed(c, &g.cs)) != ST_OK) return st;
    stack_commit(c, &s);
    enter_code(c, &g.cs, g.sel, g.off);
    return ST_OK;
}

/* ---- returns ---- */

/* After a return to less privilege: data segments that the new level may not use become null.
 * SDM 3A "Returning from a Called Procedure" */
static void drop_privileged_segments(struct kvs_vcpu *c)
{
    static const uint8_t data[] = { SEG_ES, SEG_DS, SEG_FS, SEG_GS };
    for (uint32_t k = 0; k < ARRAY_SIZE(data); k++) {
        struct segment *s = &c->seg[data[k]];
        bool conforming = attr_is_code(s->attr) && attr_is_conforming(s->attr);
        if (s->attr & ATTR_NULL || conforming || attr_dpl(s->attr) >= c->cpl) continue;
        /* Selector and descriptor become null; the base, which 64-bit mode uses whatever these are, is left alone. */
        uint64_t base = s->base;
        segment_set_null(s, 0, 0);
        s->base = base;
    }
}

/* Code segment of RET and IRET: RPL becomes CPL. */
static int check_return(struct kvs_vcpu *c, uint16_t sel, struct descriptor *d)
{
    uint32_t rpl = sel & 3, error = sel_error(sel);
    int st = read_selector(c, sel, d);
    if (st != ST_OK) return st;
    uint32_t dpl = attr_dpl(d->attr);
    if (!attr_is_code(d->attr) || rpl < c->cpl || code_is_reserved(c, d->attr)) return raise_gp(c, error);
    if (attr_is_conforming(d->attr) ? dpl > rpl : dpl != rpl) return raise_gp(c, error);
    if (!(d->attr & ATTR_P)) return raise_error(c, EXC_NP, error);
    return ST_OK;
}

/* Stack segment of a return to privilege level rpl; a null one is allowed into 64-bit code below 3. */
static int check_return_stack(struct kvs_vcpu *c, uint16_t sel, uint32_t rpl, bool to64, struct descriptor *d)
{
    uint32_t error = sel_error(sel);
    if (sel_is_null(sel)) {
        if (!to64 || rpl == 3 || (sel & 3u) != rpl) return raise_gp(c, 0);
        *d = (struct descriptor){ .attr = ATTR_NULL | rpl << ATTR_DPL_SHIFT };
        return ST_OK;
    }
    int st = read_selector(c, sel, d);
    if (st != ST_OK) return st;
    if ((sel & 3u) != rpl || !attr_is_writable_data(d->attr) || attr_dpl(d->attr) != rpl) return raise_gp(c, error);
    if (!(d->attr & ATTR_P)) return raise_error(c, EXC_SS, error);
    return ST_OK;
}

static void set_return_stack(struct kvs_vcpu *c, const struct descriptor *d, uint16_t sel, uint64_t rsp, bool to64)
{
    if (d->attr & ATTR_NULL) segment_set_null(&c->seg[SEG_SS], sel, attr_dpl(d->attr));
    else segment_set(&c->seg[SEG_SS], d, sel);
    if (to64) c->gpr[RSP] = rsp;
    else if (d->attr & ATTR_DB) c->gpr[RSP] = (uint32_t)rsp;
    else c->gpr[RSP] = (c->gpr[RSP] & ~0xffffull) | (rsp & 0xffff);
}

int far_return(struct kvs_vcpu *c, uint32_t size, uint32_t pop)
{
    uint64_t rip, cs, rsp = 0, ss = 0;
    int st;
    if ((st = stack_peek(c, 0, &rip, size)) != ST_OK || (st = stack_peek(c, size, &cs, size)) != ST_OK) return st;
    uint16_t sel = (uint16_t)cs;
    uint32_t width = stack_width(c);
    if (is_real_or_v86(c)) {
        if (rip > (is_v86(c) ? 0xffffu : c->seg[SEG_CS].limit)) return raise_gp(c, 0);
        stack_adjust(c, 2 * size + pop, width);
        load_segment_real(c, SEG_CS, sel);
        c->rip = rip;
        return ST_OK;
    }
    struct descriptor d, sd;
    if ((st = check_return(c, sel, &d)) != ST_OK) return st;
    uint32_t rpl = sel & 3;
    bool to64 = is_long_mode(c) && d.attr & ATTR_L;
    if (rpl == c->cpl) {
        if ((st = code_check_rip(c, d.attr, d.limit, rip)) != ST_OK) return st;
        if ((st = descriptor_set_accessed(c, &d)) != ST_OK) return st;
        stack_adjust(c, 2 * size + pop, width);
        enter_code(c, &d, sel, rip);
        return ST_OK;
    }
    if ((st = stack_peek(c, 2 * size + pop, &rsp, size)) != ST_OK) return st;
    if ((st = stack_peek(c, 3 * size + pop, &ss, size)) != ST_OK) return st;
    if ((st = check_return_stack(c, (uint16_t)ss, rpl, to64, &sd)) != ST_OK) return st;
    if ((st = code_check_rip(c, d.attr, d.limit, rip)) != ST_OK) return st;
    if ((st = descriptor_set_accessed(c, &d)) != ST_OK) return st;
    if (!(sd.attr & ATTR_NULL) && (st = descriptor_set_accessed(c, &sd)) != ST_OK) return st;
    c->cpl = (uint8_t)rpl;
    set_return_stack(c, &sd, (uint16_t)ss, rsp, to64);
    stack_adjust(c, pop, to64 ? 8 : sd.attr & ATTR_DB ? 4 : 2);
    drop_privileged_segments(c);
    enter_code(c, &d, sel, rip);
    return ST_OK;
}

/* Flags that IRET may load at the current privilege. SDM 2 "IRET/IRETD/IRETQ", "POPF/POPFD/POPFQ" */
static uint32_t iret_mask(const struct kvs_vcpu *c, uint32_t size)
{
    uint32_t mask = FLAGS_STATUS | FLAG_TF | FLAG_DF | FLAG_NT;
    if (size > 2) mask |= FLAG_RF | FLAG_AC | FLAG_ID;
    if (c->cpl == 0) mask |= FLAG_IOPL | (size > 2 ? FLAG_VIF | FLAG_VIP : 0);
    if (c->cpl <= iopl(c)) mask |= FLAG_IF;
    return mask;
}

static void iret_flags(struct kvs_vcpu *c, uint32_t flags, uint32_t mask)
{
    flags_write(c, (flags_read(c) & ~mask) | (flags & mask));
}

static int iret_real(struct kvs_vcpu *c, uint32_t size)
{
    uint64_t rip, cs, flags;
    int st;
    bool virtual_if = is_v86(c) && iopl(c) < 3;
    if (virtual_if && !vme_flags(c, size)) return raise_gp(c, 0);
    if ((st = stack_peek(c, 0, &rip, size)) != ST_OK || (st = stack_peek(c, size, &cs, size)) != ST_OK ||
        (st = stack_peek(c, 2 * size, &flags, size)) != ST_OK) return st;
    if (rip > (is_v86(c) ? 0xffffu : c->seg[SEG_CS].limit)) return raise_gp(c, 0);
    uint32_t mask = FLAGS_STATUS | FLAG_TF | FLAG_IF | FLAG_DF | FLAG_NT;
    if (!is_v86(c)) mask |= FLAG_IOPL;
    if (size > 2) mask |= FLAG_RF | FLAG_AC | FLAG_ID;
    if (virtual_if && (st = vme_load(c, (uint32_t)flags)) != ST_OK) return st;
    stack_adjust(c, 3 * size, stack_width(c));
    if (!virtual_if) iret_flags(c, (uint32_t)flags, mask);
    load_segment_real(c, SEG_CS, (uint16_t)cs);
    c->rip = rip;
    return ST_OK;
}

static int iret_to_v86(struct kvs_vcpu *c, uint64_t rip, uint16_t cs, uint32_t flags)
{
    uint64_t v[6]; /* ESP SS ES DS FS GS */
    int st;
    for (uint32_t k = 0; k < 6; k++)
        if ((st = stack_peek(c, 12 + 4 * k, &v[k], 4)) != ST_OK) return st;
    if (rip > 0xffff) return raise_gp(c, 0);
    c->gpr[RSP] = (uint32_t)v[0];
    flags_write(c, flags & (FLAGS_STATUS | FLAG_TF | FLAG_IF | FLAG_DF | FLAG_IOPL | FLAG_NT | FLAG_RF | FLAG_VM |
                            FLAG_AC | FLAG_VIF | FLAG_VIP | FLAG_ID));
    segment_set_v86(&c->seg[SEG_CS], cs);
    segment_set_v86(&c->seg[SEG_SS], (uint16_t)v[1]);
    segment_set_v86(&c->seg[SEG_ES], (uint16_t)v[2]);
    segment_set_v86(&c->seg[SEG_DS], (uint16_t)v[3]);
    segment_set_v86(&c->seg[SEG_FS], (uint16_t)v[4]);
    segment_set_v86(&c->seg[SEG_GS], (uint16_t)v[5]);
    c->cpl = 3;
    c->rip = rip;
    segments_changed(c);
    return ST_OK;
}

static int iret_task(struct kvs_vcpu *c)
{
    uint16_t link = 0;
    int st = lread(c, c->tr.base, &link, 2, LA_SYSTEM);
    return st != ST_OK ? st : task_transfer(c, link, TASK_IRET);
}

static int iret_protected(struct kvs_vcpu *c, uint32_t size)
{
    uint64_t rip, cs, flags, rsp = 0, ss = 0;
    int st;
    if (c->eflags & FLAG_NT) return is_long_mode(c) ? raise_gp(c, 0) : iret_task(c);
    if ((st = stack_peek(c, 0, &rip, size)) != ST_OK || (st = stack_peek(c, size, &cs, size)) != ST_OK ||
        (st = stack_peek(c, 2 * size, &flags, size)) != ST_OK) return st;
    uint16_t sel = (uint16_t)cs;
    if (size == 4 && flags & FLAG_VM && c->cpl == 0 && !is_long_mode(c))
        return iret_to_v86(c, rip, sel, (uint32_t)flags);

    struct descriptor d, sd = { 0 };
    if ((st = check_return(c, sel, &d)) != ST_OK) return st;
    uint32_t rpl = sel & 3, mask = iret_mask(c, size), width = stack_width(c);
    bool to64 = is_long_mode(c) && d.attr & ATTR_L, pops_stack = rpl != c->cpl || is_code64(c);
    if (pops_stack) {
        if ((st = stack_peek(c, 3 * size, &rsp, size)) != ST_OK) return st;
        if ((st = stack_peek(c, 4 * size, &ss, size)) != ST_OK) return st;
        if ((st = check_return_stack(c, (uint16_t)ss, rpl, to64, &sd)) != ST_OK) return st;
    }
    if ((st = code_check_rip(c, d.attr, d.limit, rip)) != ST_OK) return st;
    if ((st = descriptor_set_accessed(c, &d)) != ST_OK) return st;
    if (pops_stack) {
        if (!(sd.attr & ATTR_NULL) && (st = descriptor_set_accessed(c, &sd)) != ST_OK) return st;
        set_return_stack(c, &sd, (uint16_t)ss, rsp, to64);
    } else {
        stack_adjust(c, 3 * size, width);
    }
    bool outward = rpl != c->cpl;
    iret_flags(c, (uint32_t)flags, mask);
    c->cpl = (uint8_t)rpl;
    if (outward) drop_privileged_segments(c);
    enter_code(c, &d, sel, rip);
    return ST_OK;
}

int far_iret(struct kvs_vcpu *c, uint32_t size)
{
    int st = is_real_or_v86(c) ? iret_real(c, size) : iret_protected(c, size);
    if (st != ST_OK) return st;
    /* RF lasts for one instruction. Where no breakpoint can look at it, it is over at once. */
    if (!(c->dr7 & 0xff)) c->eflags &= ~FLAG_RF;
    c->nmi_masked = false; /* SDM 3A "Handling Multiple NMIs": blocked until the next IRET */
    return ST_OK;
}
