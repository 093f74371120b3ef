/* Descriptors and segment registers. SDM 3A "Segment Registers", "Segment Descriptors" */
#include "transfer.h"

static int table_lookup(const struct kvs_vcpu *c, uint16_t sel, uint32_t bytes, uint64_t *la)
{
    uint32_t off = sel & 0xfff8;
    if (sel & 4) {
        if (c->ldtr.attr & ATTR_NULL || (uint64_t)off + bytes - 1 > c->ldtr.limit) return -1;
        *la = c->ldtr.base + off;
    } else {
        if (off + bytes - 1 > c->gdtr.limit) return -1;
        *la = c->gdtr.base + off;
    }
    if (!is_long_mode(c)) *la = (uint32_t)*la;
    return 0;
}

int descriptor_read(struct kvs_vcpu *c, uint16_t sel, struct descriptor *d)
{
    uint64_t la, raw = 0;
    if (table_lookup(c, sel, 8, &la) < 0) return -1;
    int st = lread(c, la, &raw, 8, LA_SYSTEM);
    if (st != ST_OK) return st;
    uint32_t lo = (uint32_t)raw, hi = (uint32_t)(raw >> 32);
    *d = (struct descriptor){ .la = la, .lo = lo, .hi = hi };
    d->base = (lo >> 16) | (hi & 0xff) << 16 | (hi & 0xff000000u);
    d->limit = (lo & 0xffff) | (hi & 0xf0000);
    d->attr = (hi >> 8) & 0xf0ff;
    if (d->attr & ATTR_G) d->limit = d->limit << 12 | 0xfff;
    return 0;
}

int descriptor_read_high(struct kvs_vcpu *c, uint16_t sel, struct descriptor *d, uint32_t *reserved)
{
    uint64_t la, raw = 0;
    if (table_lookup(c, sel, 16, &la) < 0) return -1;
    int st = lread(c, la + 8, &raw, 8, LA_SYSTEM);
    if (st != ST_OK) return st;
    d->base |= raw << 32;
    *reserved = (uint32_t)(raw >> 32);
    return 0;
}

int descriptor_set_type(struct kvs_vcpu *c, struct descriptor *d, uint32_t type)
{
    uint8_t byte = (uint8_t)((d->attr & 0xf0) | type);
    int st = lwrite(c, d->la + 5, &byte, 1, LA_SYSTEM);
    if (st != ST_OK) return st;
    d->attr = (d->attr & ~(uint32_t)ATTR_TYPE) | type;
    d->hi = (d->hi & ~0xf00u) | type << 8;
    return 0;
}

/* SDM 3A "Code- and Data-Segment Descriptor Types": set whenever the selector is loaded */
int descriptor_set_accessed(struct kvs_vcpu *c, struct descriptor *d)
{
    if (d->attr & ATTR_A) return 0;
    return descriptor_set_type(c, d, (d->attr & ATTR_TYPE) | ATTR_A);
}

void segment_set(struct segment *s, const struct descriptor *d, uint16_t sel)
{
    *s = (struct segment){ .base = d->base, .limit = d->limit, .attr = d->attr, .sel = sel };
}

void segment_set_null(struct segment *s, uint16_t sel, uint32_t dpl)
{
    *s = (struct segment){ .attr = ATTR_NULL | dpl << ATTR_DPL_SHIFT, .sel = sel };
}

void segment_set_flat(struct segment *s, uint16_t sel, uint32_t attr)
{
    *s = (struct segment){ .limit = 0xffffffffu, .attr = attr, .sel = sel };
}

/* SDM 3B "8086 Emulation": 64-KByte read/write segments of DPL 3 */
void segment_set_v86(struct segment *s, uint16_t sel)
{
    *s = (struct segment){ .base = (uint32_t)sel << 4, .limit = 0xffff, .attr = 0xf3, .sel = sel };
}

/* Real mode sets selector and base only: limit and attributes stay as protected mode left them. */
void segment_set_real(struct segment *s, uint16_t sel)
{
    if (s->attr & ATTR_NULL || !(s->attr & ATTR_P)) {
        s->attr = 0x93;
        s->limit = 0xffff;
    }
    s->base = (uint32_t)sel << 4;
    s->sel = sel;
}

void load_segment_real(struct kvs_vcpu *c, uint32_t seg, uint16_t sel)
{
    if (is_v86(c)) segment_set_v86(&c->seg[seg], sel);
    else segment_set_real(&c->seg[seg], sel);
    segments_changed(c);
}

static int load_null(struct kvs_vcpu *c, uint32_t seg, uint16_t sel)
{
    if (seg == SEG_SS) {
        /* SDM 2 "MOV": a null SS is for 64-bit mode below CPL 3 only, with RPL = CPL */
        if (!is_code64(c) || c->cpl == 3 || (sel & 3) != c->cpl) return raise_gp(c, 0);
        segment_set_null(&c->seg[seg], sel, c->cpl);
    } else {
        segment_set_null(&c->seg[seg], sel, 0);
    }
    segments_changed(c);
    return 0;
}

int load_segment(struct kvs_vcpu *c, uint32_t seg, uint16_t sel)
{
    if (is_real_or_v86(c)) {
        load_segment_real(c, seg, sel);
        return 0;
    }
    if (sel_is_null(sel)) return load_null(c, seg, sel);

    struct descriptor d;
    uint32_t error = sel_error(sel), rpl = sel & 3;
    int st = descriptor_read(c, sel, &d);
    if (st < 0) return raise_gp(c, error);
    if (st != ST_OK) return st;
    uint32_t dpl = attr_dpl(d.attr);
    if (seg == SEG_SS) {
        if (rpl != c->cpl || dpl != c->cpl || !attr_is_writable_data(d.attr)) return raise_gp(c, error);
        if (!(d.attr & ATTR_P)) return raise_error(c, EXC_SS, error);
    } else {
        bool readable = (d.attr & ATTR_S) && (!(d.attr & ATTR_CODE) || (d.attr & ATTR_W));
        bool conforming = attr_is_code(d.attr) && attr_is_conforming(d.attr);
        if (!readable || (!conforming && (rpl > dpl || c->cpl > dpl))) return raise_gp(c, error);
        if (!(d.attr & ATTR_P)) return raise_error(c, EXC_NP, error);
    }
    if ((st = descriptor_set_accessed(c, &d)) != ST_OK) return st;
    segment_set(&c->seg[seg], &d, sel);
    segments_changed(c);
    return 0;
}

void segments_changed(struct kvs_vcpu *c)
{
    c->gpr[GPR_FSBASE] = c->seg[SEG_FS].base;
    c->gpr[GPR_GSBASE] = c->seg[SEG_GS].base;
    vcpu_update_mode(c);
}
