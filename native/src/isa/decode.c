/*
 * Bytes to struct decoded. SDM 2A "Instruction Format", 2D "Opcode Map".
 *
 * Order: legacy prefixes, REX, VEX/EVEX, opcode map, row (by mandatory prefix and ModRM), ModRM and
 * SIB, displacement, immediates, then what makes the encoding illegal.
 */
#include "isa.h"

struct cursor {
    const uint8_t *p;
    uint32_t count, pos;
    bool overrun;
};

static uint64_t take(struct cursor *s, uint32_t n)
{
    uint64_t v = 0;
    if (s->pos + n > s->count) {
        s->overrun = true;
        s->pos += n;
        return 0;
    }
    memcpy(&v, s->p + s->pos, n);
    s->pos += n;
    return v;
}

static enum group group_of(uint32_t map, uint32_t opcode)
{
    if (map == M1) {
        switch (opcode) {
        case 0x80: return G80;
        case 0x81: return G81;
        case 0x82: return G82;
        case 0x83: return G83;
        case 0x8f: return G8F;
        case 0xc0: return GC0;
        case 0xc1: return GC1;
        case 0xc6: return GC6;
        case 0xc7: return GC7;
        case 0xd0: return GD0;
        case 0xd1: return GD1;
        case 0xd2: return GD2;
        case 0xd3: return GD3;
        case 0xf6: return GF6;
        case 0xf7: return GF7;
        case 0xfe: return GFE;
        case 0xff: return GFF;
        }
        if (opcode >= 0xd8 && opcode <= 0xdf) return (enum group)(GD8 + (opcode - 0xd8));
    } else if (map == M0F) {
        switch (opcode) {
        case 0x00: return G0F00;
        case 0x01: return G0F01;
        case 0x0d: return G0F0D;
        case 0x18: return G0F18;
        case 0x1e: return G0F1E;
        case 0x71: return G0F71;
        case 0x72: return G0F72;
        case 0x73: return G0F73;
        case 0xae: return G0FAE;
        case 0xb9: return G0FB9;
        case 0xba: return G0FBA;
        case 0xc7: return G0FC7;
        }
    } else if (map == V1) {
        switch (opcode) {
        case 0x71: return GV71;
        case 0x72: return GV72;
        case 0x73: return GV73;
        case 0xae: return GVAE;
        }
    } else if (map == V2 && opcode == 0xf3) {
        return GVF3;
    }
    return G_NONE;
}

static bool kind_has_modrm(uint32_t k)
{
    return (k >= Eb && k <= Rq) || (k >= M_ && k <= RyMd) || (k >= Sw && k <= Dr) || (k >= Vx && k <= Nq);
}

static bool row_has_modrm(uint32_t row)
{
    const struct row_info *r = &isa_row[row];
    return kind_has_modrm(r->k[0]) || kind_has_modrm(r->k[1]) || kind_has_modrm(r->k[2]);
}

static bool offered(uint64_t features, uint32_t feature) { return feature == FEAT_BASE || (features >> feature & 1); }

static bool row_usable(uint32_t row, uint32_t bits, uint64_t features)
{
    if (!row) return false;
    uint32_t feature = isa_op[isa_row[row].op].feature;
    if (!offered(features, feature)) return false;
    if (bits == 64 && (isa_row[row].attr & A_NO64)) return false;
    return bits == 64 || !(isa_row[row].attr & A_ONLY64);
}

/* The row for a table cell: the exact mandatory prefix first, then ANY; the exact mod first, then A. */
static uint32_t pick(struct decoded *d, const uint16_t *cell, uint32_t stride, uint32_t pp, uint32_t modkind,
                     uint32_t bits, uint64_t features)
{
    for (int pass = 0; pass < 2; pass++) {
        const uint16_t *m = cell + (pass ? ANY : pp) * stride;
        d->mandatory_prefix = !pass;
        if (row_usable(m[modkind], bits, features)) return m[modkind];
        if (row_usable(m[A], bits, features)) return m[A];
    }
    return ROW_none;
}

/* A row for either W first, then the one for this W; the exact mod before A. */
static uint32_t pick_vex(const struct decoded *d, uint32_t pp, uint32_t modkind, uint32_t bits, uint64_t features)
{
    for (int pass = 0; pass < 2; pass++) {
        const uint16_t *m = isa_vex[pass ? W0 + d->vw : WI][d->map - V1][pp][d->opcode];
        if (row_usable(m[modkind], bits, features)) return m[modkind];
        if (row_usable(m[A], bits, features)) return m[A];
    }
    return ROW_none;
}

static uint32_t pick_enc(struct decoded *d, uint32_t map, uint32_t pp, uint32_t modkind, uint32_t bits, uint64_t features)
{
    return pick(d, &isa_enc[map][0][d->opcode][0], sizeof isa_enc[0][0] / sizeof(uint16_t), pp, modkind, bits, features);
}

static uint32_t find_row(struct decoded *d, uint32_t bits, uint64_t features, uint32_t pp, uint8_t modrm, bool *has_modrm)
{
    uint32_t modkind = modrm >= 0xc0 ? R : M;
    uint32_t row;
    enum group g = group_of(d->map, d->opcode);
    if (g != G_NONE) {
        *has_modrm = true;
        if (modkind == R && g >= GD8 && g <= GDF) {
            row = isa_fix[TD8 + (g - GD8)][modrm & 63];
            if (row_usable(row, bits, features)) return row;
        } else if (modkind == R && g == G0F01) {
            row = isa_fix[T0F01][modrm & 63];
            if (row_usable(row, bits, features)) return row;
        }
        row = pick(d, &isa_grp[g][0][(modrm >> 3) & 7][0], sizeof isa_grp[0][0] / sizeof(uint16_t), pp, modkind, bits, features);
        if (row) return row;
    }
    if (d->map >= V1) {
        row = pick_vex(d, pp, modkind, bits, features);
        *has_modrm = row && row_has_modrm(row);
        return row;
    }
    if (d->map == M1 && bits == 64) {
        row = pick_enc(d, L1, pp, modkind, bits, features);
        if (row) {
            *has_modrm = row_has_modrm(row);
            return row;
        }
    }
    row = pick_enc(d, d->map, pp, modkind, bits, features);
    *has_modrm = row && row_has_modrm(row);
    return row;
}

static void modrm16(struct decoded *d, struct cursor *s)
{
    static const uint8_t base[8] = { RBX, RBX, RBP, RBP, RSI, RDI, RBP, RBX };
    static const uint8_t index[8] = { RSI, RDI, RSI, RDI, NO_INDEX, NO_INDEX, NO_INDEX, NO_INDEX };
    uint32_t rm = d->modrm & 7;
    d->base = base[rm];
    d->index = index[rm];
    if (d->mod == 0 && rm == 6) {
        d->base = GPR_ZERO;
        d->disp = (int16_t)take(s, 2);
    } else if (d->mod == 1) {
        d->disp = (int8_t)take(s, 1);
    } else if (d->mod == 2) {
        d->disp = (int16_t)take(s, 2);
    }
    if (d->base == RBP && !d->seg_override) d->seg = SEG_SS;
}

static void modrm32(struct decoded *d, struct cursor *s, bool code64)
{
    uint32_t rm = d->modrm & 7, rex_b = (d->rex & 1) << 3;
    d->index = NO_INDEX;
    if (rm == 4) {
        uint8_t sib = (uint8_t)take(s, 1);
        uint32_t index = ((sib >> 3) & 7) | (d->rex & 2) << 2;
        d->scale = sib >> 6;
        if (index != 4) d->index = (uint8_t)index;
        d->base = (uint8_t)((sib & 7) | rex_b);
        if ((sib & 7) == 5 && d->mod == 0) {
            d->base = GPR_ZERO;
            d->disp = (int32_t)take(s, 4);
        }
    } else {
        d->base = (uint8_t)(rm | rex_b);
        if (rm == 5 && d->mod == 0) {
            d->base = code64 ? GPR_RIPBASE : GPR_ZERO;
            d->rip_relative = code64;
            d->disp = (int32_t)take(s, 4);
        }
    }
    if (d->mod == 1) d->disp = (int8_t)take(s, 1);
    else if (d->mod == 2) d->disp = (int32_t)take(s, 4);
    if ((d->base == RSP || d->base == RBP) && !d->seg_override) d->seg = SEG_SS;
}

/* taken66: the row took 66 as part of its opcode, so that it says nothing about the size. */
static void operand_sizes(struct decoded *d, uint32_t bits, bool taken66)
{
    bool w = d->rex & 8, p66 = d->opsize66 && !taken66;
    if (bits == 64) {
        if (d->attr & A_W0OSZ) d->osize = w ? 8 : 4;
        else if (d->attr & A_F64) d->osize = 8;
        else if (d->attr & A_D64) d->osize = w ? 8 : p66 ? 2 : 8;
        else d->osize = w ? 8 : p66 ? 2 : 4;
    } else if (d->attr & A_W0OSZ) {
        d->osize = 4;
    } else {
        d->osize = (bits == 32) == p66 ? 2 : 4;
    }
}

static void immediates(struct decoded *d, struct cursor *s)
{
    const uint8_t *k = isa_row[d->row].k;
    for (int n = 0; n < OPERANDS; n++) {
        switch (k[n]) {
        case Ib: d->imm = take(s, 1); break;
        case Lx: case Ll: d->imm = take(s, 1) & (d->bits == 64 ? 0xff : 0x7f); break;
        case Ibs: case Jb: d->imm = (uint64_t)(int64_t)(int8_t)take(s, 1); break;
        case Iw: d->imm = take(s, 2); break;
        case I1: d->imm = 1; break;
        case Iz: case Jz:
            d->imm = d->osize == 2 ? (uint64_t)(int64_t)(int16_t)take(s, 2) : (uint64_t)(int64_t)(int32_t)take(s, 4);
            break;
        case Iv: d->imm = take(s, d->osize); break;
        case Iwb:
            d->imm = take(s, 2);
            d->imm2 = (uint16_t)take(s, 1);
            break;
        case Ap:
            d->imm = take(s, d->osize);
            d->imm2 = (uint16_t)take(s, 2);
            break;
        case Ob: case Ov: d->imm = take(s, d->asize); break;
        default: break;
        }
    }
}

/* Consumes legacy prefixes and REX. Returns the last prefix-free byte's position. */
static void prefixes(struct decoded *d, struct cursor *s, uint32_t bits)
{
    for (; s->pos < s->count && s->pos < 15; s->pos++) {
        uint8_t b = s->p[s->pos];
        uint8_t seg = 0xff;
        switch (b) {
        case 0x66: d->opsize66 = true; break;
        case 0x67: d->addr67 = true; break;
        case 0xf0: d->lock = true; break;
        case 0xf2: case 0xf3: d->rep = b; break;
        case 0x26: seg = SEG_ES; break;
        case 0x2e: seg = SEG_CS; break;
        case 0x36: seg = SEG_SS; break;
        case 0x3e: seg = SEG_DS; break;
        case 0x64: seg = SEG_FS; break;
        case 0x65: seg = SEG_GS; break;
        default:
            if (bits == 64 && (b & 0xf0) == 0x40) {
                d->rex = b;
                continue;
            }
            return;
        }
        d->rex = 0; /* REX counts only right before the opcode */
        if (seg != 0xff) {
            /* SDM 1 "Segmentation in 64-Bit Mode": ES, CS, SS, DS overrides are ignored there and
             * leave an earlier FS or GS override in force. */
            if (bits == 64 && seg < SEG_FS) continue;
            d->seg = seg;
            d->seg_override = true;
        }
    }
}

/*
 * VEX, and EVEX, of which nothing is offered. SDM 2A "Intel Advanced Vector Extensions (VEX)". Outside
 * 64-bit mode there are 8 registers: what would select more is 1 there or ignored.
 */
static void vector_prefix(struct decoded *d, struct cursor *s, uint8_t first, uint32_t bits, uint32_t *pp, bool *legal)
{
    static const uint8_t pps[4] = { NP, P66, PF3, PF2 };
    *legal = !(d->opsize66 || d->rep || d->lock);
    uint32_t map, payload;
    if (first == 0x62) {
        (void)take(s, 3);
        d->evex = true;
        *legal = false;
        return;
    }
    if (first == 0xc5) {
        payload = (uint32_t)take(s, 1);
        map = 1;
        d->rex = 0x40 | (payload & 0x80 ? 0 : 4);
    } else {
        uint32_t rxb = (uint32_t)take(s, 1);
        payload = (uint32_t)take(s, 1);
        map = rxb & 0x1f;
        d->vw = payload >> 7;
        d->rex = (uint8_t)(0x40 | ((~rxb >> 5) & 7) | d->vw << 3);
    }
    d->vvvv = (~payload >> 3) & 15;
    d->vl = (payload >> 2) & 1;
    *pp = pps[payload & 3];
    d->vex_pp = (uint8_t)*pp;
    d->vex = true;
    if (bits != 64) d->rex = 0;
    if (map < 1 || map > 3) *legal = false;
    else d->map = (uint8_t)(V1 + map - 1);
}

static bool is_vvvv_kind(uint32_t k) { return k == Hx || k == Hl || k == By; }

/* What is illegal about a VEX-coded row that was found. SDM 2A "VEX Encoding and the VEX.L Bit", "VEX.vvvv". */
static bool vex_legal(struct decoded *d, uint32_t bits, uint64_t features)
{
    static const uint8_t wide[FEAT_DECODED] = { [FEAT_AVX] = FEAT_AVX2, [FEAT_AES] = FEAT_VAES, [FEAT_PCLMUL] = FEAT_VPCLMUL };
    const struct row_info *r = &isa_row[d->row];
    bool uses_vvvv = false;
    for (int n = 0; n < OPERANDS; n++) uses_vvvv |= is_vvvv_kind(r->k[n]);
    if (!uses_vvvv && d->vvvv != 0) return false;
    if (bits != 64) d->vvvv &= 7;
    if ((d->attr & A_AVX) && !offered(features, FEAT_AVX)) return false;
    if ((d->attr & A_L0) && d->vl) return false;
    if ((d->attr & A_L1) && !d->vl) return false;
    if ((d->attr & A_L2) && d->vl && !offered(features, wide[isa_op[d->op].feature])) return false;
    /* VPINSRQ and VPEXTRQ are no VPINSRD and VPEXTRD outside 64-bit mode; elsewhere VEX.W is ignored there. */
    if (bits != 64 && d->vw && (d->op == OP_vpinsrd || d->op == OP_vpextrd)) return false;
    if (r->k[1] == Mvd || r->k[1] == Mvq) {
        /* Gathers: VSIB, and three different registers. SDM 2A "Vector SIB (VSIB) Memory Addressing" */
        uint32_t index = d->index == NO_INDEX ? 4 : d->index;
        if ((d->modrm & 7) != 4 || d->asize == 2) return false;
        if (d->reg == index || d->reg == d->vvvv || index == d->vvvv) return false;
    }
    return true;
}

static void memory_operand(struct decoded *d, struct cursor *s, uint32_t bits)
{
    if (d->asize == 2) modrm16(d, s);
    else modrm32(d, s, bits == 64);
}

int decode(const uint8_t *p, uint32_t count, uint32_t bits, bool protected_mode, uint64_t features, struct decoded *d)
{
    struct cursor s = { p, count > 15 ? 15 : count, 0, false };
    memset(d, 0, sizeof *d);
    d->bits = (uint8_t)bits;
    d->seg = SEG_DS;
    d->index = NO_INDEX;
    d->base = GPR_ZERO;
    prefixes(d, &s, bits);

    uint32_t pp = d->rep == 0xf3 ? PF3 : d->rep == 0xf2 ? PF2 : d->opsize66 ? P66 : NP;
    d->map = M1;
    d->opcode = (uint8_t)take(&s, 1);
    bool legal = true;
    if (d->opcode == 0x0f) {
        d->map = M0F;
        d->opcode = (uint8_t)take(&s, 1);
        if (d->opcode == 0x38 || d->opcode == 0x3a) {
            d->map = d->opcode == 0x38 ? M38 : M3A;
            d->opcode = (uint8_t)take(&s, 1);
        }
    } else if (d->opcode == 0xc4 || d->opcode == 0xc5 || d->opcode == 0x62) {
        /* Outside 64-bit mode these are LES, LDS and BOUND unless their ModRM says "register". */
        if (s.pos < s.count ? bits == 64 || (protected_mode && p[s.pos] >= 0xc0) : bits == 64) {
            if (d->rex) return DECODE_UD;
            vector_prefix(d, &s, d->opcode, bits, &pp, &legal);
            d->opcode = (uint8_t)take(&s, 1);
        }
    }
    if (s.overrun) return s.count == 15 ? DECODE_LONG : DECODE_MORE;
    d->asize = bits == 64 ? (d->addr67 ? 4 : 8) : (bits == 32) == d->addr67 ? 2 : 4;
    if (!legal) return DECODE_UD;

    uint8_t modrm = s.pos < s.count ? p[s.pos] : 0;
    bool has_modrm = false;
    /* 90 with REX.B is XCHG R8, rAX; F3 90 is PAUSE with or without it. */
    if (d->map == M1 && d->opcode == 0x90 && (d->rex & 1) && d->rep != 0xf3) {
        d->row = ROW_M1_ANY_0x91_A;
    } else {
        d->row = (uint16_t)find_row(d, bits, features, pp, modrm, &has_modrm);
        /* A ModRM byte that is not there yet may be one that the opcode wants: beyond groups only its kind counts. */
        if (s.pos >= s.count && !has_modrm && !d->row) {
            has_modrm = group_of(d->map, d->opcode) != G_NONE;
            if (!has_modrm) (void)find_row(d, bits, features, pp, 0xc0, &has_modrm);
        }
    }
    if (has_modrm && s.pos >= s.count) return s.count == 15 ? DECODE_LONG : DECODE_MORE;
    if (!d->row) return DECODE_UD;
    const struct row_info *r = &isa_row[d->row];
    d->op = r->op;
    d->attr = r->attr;
    d->cond = d->opcode & 15;
    d->has_modrm = has_modrm;
    if (has_modrm) {
        d->modrm = modrm;
        s.pos++;
        d->mod = modrm >> 6;
        /* MOV to and from control and debug registers ignores mod. */
        if (d->map == M0F && d->opcode >= 0x20 && d->opcode <= 0x23) d->mod = 3;
        d->reg = (uint8_t)(((modrm >> 3) & 7) | (d->rex & 4) << 1);
        d->rm = (uint8_t)((modrm & 7) | (d->rex & 1) << 3);
        d->is_mem = d->mod != 3;
        if (d->is_mem) memory_operand(d, &s, bits);
    }
    operand_sizes(d, bits, d->mandatory_prefix && pp == P66);
    immediates(d, &s);
    if (s.overrun) return s.pos > 15 ? DECODE_LONG : DECODE_MORE;
    d->length = (uint8_t)s.pos;
    if (d->lock && !((d->attr & A_LOCK) && d->is_mem)) return DECODE_UD;
    /* There is no DR8, for no privilege level. */
    if ((r->k[0] == Dr || r->k[1] == Dr) && d->reg >= 8) return DECODE_UD;
    if ((d->attr & A_PROT) && !protected_mode) return DECODE_UD;
    if ((d->attr & (A_NOREP | A_NOPREFIX)) && d->rep) return DECODE_UD;
    if ((d->attr & A_NOPREFIX) && d->opsize66) return DECODE_UD;
    if (d->vex && !vex_legal(d, bits, features)) return DECODE_UD;
    /* LAHF and SAHF in 64-bit mode are a feature of their own; CMPXCHG16B too. */
    if (bits == 64 && (d->op == OP_lahf || d->op == OP_sahf) && !((features >> FEAT_LAHF64) & 1)) return DECODE_UD;
    if (d->op == OP_cmpxchg8b && d->osize == 8 && !((features >> FEAT_CX16) & 1)) return DECODE_UD;
    return DECODE_OK;
}

uint32_t operand_size(const struct decoded *d, int n)
{
    switch (isa_row[d->row].k[n]) {
    case Eb: case Gb: case Zb: case Mb: case RdMb: case Ib: case Ibs: case Ob: case AL_: case CL_: case Xb: case Yb: case Wb: return 1;
    case Ew: case Gw: case Mw: case RdMw: case Iw: case AX_: case DX_: case Sw: case Ww: return 2;
    case Ed: case Gd: case Rd: case Md: case Wd: case Qd: case Mvd: return 4;
    case Eq: case Gq: case Rq: case Mq: case Wq: case Pq: case Qq: case Nq: case Mvq: return 8;
    case Ev: case Gv: case Rv: case Zv: case Iv: case Ov: case rAX: case Xv: case Yv: return d->osize;
    case Iz: return d->osize == 2 ? 2 : 4;
    case Ey: case Gy: case Ry: case RyMd: case By: return (d->rex & 8) ? 8 : 4;
    case eAX_: case Xz: case Yz: return d->osize == 2 ? 2 : 4;
    case Cr: case Dr: return 8;
    case Mdq: case Vx: case Wx: case Ux: case XMM0_: case Hx: case Lx: return 16;
    case Vl: case Wl: case Ul: case Hl: case Ll: case Ml: return d->vl ? 32 : 16;
    case Wh: return d->vl ? 16 : 8;
    case Wf: return d->vl ? 8 : 4;
    case We: return d->vl ? 4 : 2;
    case Wm: return d->vl ? 32 : 8;
    case Mp: return d->osize + 2u;
    case Ma: return d->osize * 2u;
    case Mt: return 10;
    case Mf: return 512;
    default: return 0;
    }
}
