#include "encode.h"

static const struct { uint8_t map, opcode; } group_opcode[GROUP_COUNT] = {
    [G80] = { M1, 0x80 }, [G81] = { M1, 0x81 }, [G82] = { M1, 0x82 }, [G83] = { M1, 0x83 }, [G8F] = { M1, 0x8f },
    [GC0] = { M1, 0xc0 }, [GC1] = { M1, 0xc1 }, [GD0] = { M1, 0xd0 }, [GD1] = { M1, 0xd1 }, [GD2] = { M1, 0xd2 },
    [GD3] = { M1, 0xd3 }, [GC6] = { M1, 0xc6 }, [GC7] = { M1, 0xc7 }, [GF6] = { M1, 0xf6 }, [GF7] = { M1, 0xf7 },
    [GFE] = { M1, 0xfe }, [GFF] = { M1, 0xff }, [G0F00] = { M0F, 0x00 }, [G0F01] = { M0F, 0x01 },
    [G0F0D] = { M0F, 0x0d }, [G0F18] = { M0F, 0x18 }, [G0F1E] = { M0F, 0x1e }, [G0F71] = { M0F, 0x71 },
    [G0F72] = { M0F, 0x72 }, [G0F73] = { M0F, 0x73 }, [G0FAE] = { M0F, 0xae }, [G0FB9] = { M0F, 0xb9 },
    [G0FBA] = { M0F, 0xba }, [G0FC7] = { M0F, 0xc7 }, [GD8] = { M1, 0xd8 }, [GD9] = { M1, 0xd9 },
    [GDA] = { M1, 0xda }, [GDB] = { M1, 0xdb }, [GDC] = { M1, 0xdc }, [GDD] = { M1, 0xdd }, [GDE] = { M1, 0xde },
    [GDF] = { M1, 0xdf }, [GV71] = { V1, 0x71 }, [GV72] = { V1, 0x72 }, [GV73] = { V1, 0x73 }, [GVAE] = { V1, 0xae },
    [GVF3] = { V2, 0xf3 },
};
static uint8_t fixed_map(int t) { return t == T0F01 ? M0F : M1; }
static uint8_t fixed_opcode(int t) { return t == T0F01 ? 0x01 : (uint8_t)(0xd8 + t - TD8); }

const struct row_form row_forms[ROW_COUNT] = {
#define ENC(name, map, pp, opc, mod, k0, k1, k2, at)                                              \
    [ROW_##map##_##pp##_##opc##_##mod] = { #name " " #map " " #pp " " #opc " " #mod, OP_##name, map, pp, opc, 0xff, 0, \
                                           false, mod, { k0, k1, k2, NA }, at, false, WI },
#define GRP(name, grp, pp, ext, mod, k0, k1, k2, at)                                              \
    [ROW_##grp##_##pp##_##ext##_##mod] = { #name " " #grp " " #pp " " #ext " " #mod, OP_##name, 0x80, pp, grp, ext, 0, \
                                           false, mod, { k0, k1, k2, NA }, at, false, WI },
#define FIX(name, tab, mrm, at)                                                                   \
    [ROW_##tab##_##mrm] = { #name " " #tab " " #mrm, OP_##name, 0x81, ANY, tab, 0xff, mrm, true, R, { NA, NA, NA, NA }, at, false, WI },
#define VEX(name, map, pp, opc, mod, w, k0, k1, k2, k3, at)                                       \
    [ROW_##map##_##pp##_##opc##_##mod##_##w] = { #name " " #map " " #pp " " #opc " " #mod " " #w, OP_##name, map, pp, opc, 0xff, 0, \
                                                 false, mod, { k0, k1, k2, k3 }, at, true, w },
#define VGRP(name, grp, pp, ext, mod, k0, k1, k2, at)                                             \
    [ROW_##grp##_##pp##_##ext##_##mod] = { #name " " #grp " " #pp " " #ext " " #mod, OP_##name, 0x80, pp, grp, ext, 0, \
                                           false, mod, { k0, k1, k2, NA }, at, true, WI },
#include "../../src/isa/isa.def"
};

static void row_opcode(const struct row_form *f, uint8_t *map, uint8_t *opcode)
{
    if (f->map == 0x80) { *map = group_opcode[f->opcode].map; *opcode = group_opcode[f->opcode].opcode; }
    else if (f->map == 0x81) { *map = fixed_map(f->opcode); *opcode = fixed_opcode(f->opcode); }
    else { *map = f->map; *opcode = f->opcode; }
}

static bool kind_is_rm(uint8_t k)
{
    return (k >= Eb && k <= Ey) || (k >= Rv && k <= Rq) || (k >= M_ && k <= RyMd) || (k >= Wx && k <= Ul) ||
           (k >= Qq && k <= Nq);
}
static bool kind_is_reg(uint8_t k)
{
    return (k >= Gb && k <= Gy) || (k >= Sw && k <= Dr) || k == Vx || k == Vl || k == Pq;
}

bool row_has_modrm(const struct row_form *f)
{
    if (f->ext != 0xff || f->is_fixed) return true;
    for (int i = 0; i < OPERANDS; i++)
        if (kind_is_rm(f->k[i]) || kind_is_reg(f->k[i])) return true;
    return false;
}
static bool rm_kind(const struct row_form *f, bool memory)
{
    for (int i = 0; i < OPERANDS; i++) {
        uint8_t k = f->k[i];
        if ((k >= Rv && k <= Rq) || k == Ux || k == Ul || k == Nq) return !memory;
        if (k >= M_ && k <= Mf) return memory;
    }
    return true;
}
bool row_has_memory_form(const struct row_form *f)
{
    return row_has_modrm(f) && !f->is_fixed && f->modkind != R && rm_kind(f, true);
}
bool row_has_register_form(const struct row_form *f)
{
    return row_has_modrm(f) && !f->is_fixed && f->modkind != M && rm_kind(f, false);
}

uint32_t row_widths(const struct row_form *f, uint32_t bits)
{
    uint8_t map, opcode;
    bool v = false, y = false, any_operand = false, vector = false, by_l = false;
    row_opcode(f, &map, &opcode);
    for (int i = 0; i < OPERANDS; i++) {
        uint8_t k = f->k[i];
        if (k != NA) any_operand = true;
        if (k == Ev || k == Gv || k == Rv || k == Zv || k == Iz || k == Iv || k == Jz || k == Ov || k == rAX ||
            k == eAX_ || k == Xv || k == Yv || k == Xz || k == Yz || k == Ma || k == Mp || k == Ap || k == Iwb || k == Jb)
            v = true;
        if (k == Ey || k == Gy || k == Ry || k == RyMd || k == RdMw || k == RdMb) y = true;
        if (k == Vx || (k >= Wx && k <= Nq)) vector = true;
        if (k == Vl || k == Wl || k == Ul || k == Wh || k == Wf || k == We || k == Wm || k == Hl || k == Ml) by_l = true;
        if (k == Mvd || k == Mvq) by_l = true;
    }
    if (f->attr & A_AVX && !y) return f->attr & A_L0 ? 1 : f->attr & A_L1 ? 2 : by_l || !any_operand ? 3 : 1;
    if (f->is_fixed || (map == M1 && opcode >= 0xd8 && opcode <= 0xdf)) return 1;
    if (!any_operand || (f->attr & A_D64)) v = true;
    if (f->op == OP_cmpxchg8b) y = true;
    if (f->attr & A_F64) return bits == 64 ? 8 : 2 | 4;
    if (v && (f->attr & A_D64)) return bits == 64 ? 2 | 8 : 2 | 4;
    if (y || (v && (f->attr & A_W0OSZ)) || (v && vector)) return bits == 64 ? 4 | 8 : 4;
    if (v) return bits == 64 ? 2 | 4 | 8 : 2 | 4;
    return 1;
}

struct memory_bytes { uint8_t modrm, sib, rex; bool has_sib, rip_relative, absolute; uint32_t disp_size; };

static bool uses_vvvv(const struct row_form *f)
{
    for (int i = 0; i < OPERANDS; i++)
        if (f->k[i] == Hx || f->k[i] == Hl || f->k[i] == By) return true;
    return false;
}
static bool is_gather(const struct row_form *f) { return f->k[1] == Mvd || f->k[1] == Mvq; }

/* The VEX prefix: two bytes where that is enough, now and then. Returns its length. */
static uint32_t vex_prefix(struct rng *r, const struct row_form *f, uint32_t bits, uint8_t map, uint32_t rex, bool l, uint8_t *out)
{
    static const uint8_t pps[PP_COUNT] = { [NP] = 0, [P66] = 1, [PF3] = 2, [PF2] = 3 };
    uint32_t vvvv = uses_vvvv(f) ? rnd_below(r, 16) : 0, n = 0;
    if (bits != 64) rex = (rex & 8) | rnd_below(r, 2); /* R and X must be clear, B and the top of vvvv are ignored */
    bool shortened = map == V1 && !(rex & 11) && (bits == 64 || vvvv < 8) && rnd_one(r, 2);
    uint8_t last = (uint8_t)((~vvvv & 15) << 3 | (uint32_t)l << 2 | pps[f->pp]);
    out[n++] = shortened ? 0xc5 : 0xc4;
    if (shortened) {
        out[n++] = (uint8_t)(last | (rex & 4 ? 0 : 0x80));
    } else {
        out[n++] = (uint8_t)((~rex & 7) << 5 | (uint32_t)(map - V1 + 1));
        out[n++] = (uint8_t)(last | (rex & 8) << 4);
    }
    return n;
}

/* Chooses an addressing form of the given address size. */
static void choose_memory(struct rng *r, uint32_t bits, uint32_t asize, struct memory_bytes *m)
{
    *m = (struct memory_bytes){ 0 };
    uint32_t mod = rnd_below(r, 3), rm = rnd_below(r, 8);
    if (asize == 16) {
        m->disp_size = mod == 1 ? 1 : mod == 2 || rm == 6 ? 2 : 0;
        m->absolute = mod == 0 && rm == 6;
    } else {
        m->disp_size = mod == 1 ? 1 : mod == 2 ? 4 : 0;
        if (bits == 64) m->rex |= rnd_below(r, 4); /* X and B */
        if (rm == 4) {
            m->has_sib = true;
            m->sib = (uint8_t)rnd(r);
            if ((m->sib & 7) == 5 && mod == 0) {
                m->disp_size = 4;
                m->absolute = (m->sib & 0x38) == 0x20 && !(m->rex & 2);
            }
        } else if (rm == 5 && mod == 0) {
            m->disp_size = 4;
            if (bits == 64) m->rip_relative = true;
            else m->absolute = true;
        }
    }
    m->modrm = (uint8_t)(mod << 6 | rm);
}

static uint64_t random_immediate(struct rng *r) { return rnd_one(r, 3) ? rnd(r) : rnd_value(r); }

static void shuffle(struct rng *r, uint8_t *p, uint32_t n)
{
    for (uint32_t i = n; i > 1; i--) {
        uint32_t j = rnd_below(r, i);
        uint8_t t = p[i - 1];
        p[i - 1] = p[j];
        p[j] = t;
    }
}

uint32_t encode_row(struct rng *r, const struct encode_request *q, uint8_t out[16])
{
    const struct row_form *f = &row_forms[q->row];
    uint8_t map, opcode, prefix[8], b[40];
    uint32_t np = 0, n = 0, bits = q->bits, rex = 0, imm_size[2] = { 0, 0 };
    uint32_t widths = row_widths(f, bits);
    bool byte_regs = false, no_osize_use = widths == 1, branch8 = false, moffs = false;
    row_opcode(f, &map, &opcode);

    /* operand size */
    bool want66 = false, wantw = false;
    if (!no_osize_use) {
        if (bits == 64) {
            if (f->attr & A_F64) want66 = false;
            else if (f->pp == ANY && !(f->attr & A_W0OSZ) && map != M38 && map != M3A) want66 = q->width == 16;
            else if (q->width == 16 && f->pp != P66) want66 = true;
            wantw = q->width == 64 && !(f->attr & (A_D64 | A_F64));
        } else want66 = (q->width == 16) != (bits == 16);
    }
    if (f->vex) {
        bool y = !no_osize_use && !(widths & 3);
        wantw = f->vexw == W1 || (f->vexw == WI && (y && bits == 64 ? q->width == 64 : !q->plain && rnd_one(r, 4)));
        want66 = false;
    }
    if (f->pp == P66 && !f->vex) want66 = true;
    if (f->pp == NP) want66 = false;
    if (want66) prefix[np++] = 0x66;
    if (f->pp == PF3 && !f->vex) prefix[np++] = 0xf3;
    if (f->pp == PF2 && !f->vex) prefix[np++] = 0xf2;
    if (q->lock) prefix[np++] = 0xf0;
    if (q->rep && (f->attr & A_REP)) prefix[np++] = rnd_one(r, 2) ? 0xf2 : 0xf3;
    for (int i = 0; i < OPERANDS; i++)
        if (f->k[i] == Eb || f->k[i] == Gb || f->k[i] == Zb) byte_regs = true;

    /* address size */
    bool a67 = !q->plain && rnd_one(r, 6);
    if (is_gather(f) && bits != 64) a67 = bits == 16; /* a vector index needs a SIB byte */
    uint32_t asize = bits == 64 ? (a67 ? 32 : 64) : bits == 32 ? (a67 ? 16 : 32) : (a67 ? 32 : 16);
    if (a67) prefix[np++] = 0x67;
    static const uint8_t segs[] = { 0x26, 0x2e, 0x36, 0x3e, 0x64, 0x65 };
    bool seg = !q->plain && rnd_one(r, 8);
    if (seg) {
        uint8_t s = segs[rnd_below(r, 6)];
        if (asize == 16 && s >= 0x64) s = 0x3e;
        /* On a Jcc these are hints; 64 has been given a meaning there too. */
        if (!(f->op == OP_jcc && s >= 0x64)) prefix[np++] = s;
    }
    if (!q->plain && !q->lock && (f->attr & A_HLE) && q->memory && rnd_one(r, 8) && f->pp == ANY) prefix[np++] = 0xf3;
    shuffle(r, prefix, np);
    if (!q->plain && rnd_one(r, 16) && np && np < 3) { prefix[np] = prefix[0]; np++; } /* a repeated prefix */

    /* ModRM */
    struct memory_bytes m = { 0 };
    bool has_modrm = row_has_modrm(f);
    bool memory = has_modrm && q->memory && row_has_memory_form(f);
    uint32_t reg = rnd_below(r, 8), rm = rnd_below(r, 8);
    if (bits == 64 && !f->is_fixed) {
        rex |= rnd_below(r, 2) << 2; /* R */
        if (!memory) rex |= rnd_below(r, 2); /* B */
    }
    for (int i = 0; i < OPERANDS; i++) {
        if (f->k[i] == Sw) { reg = rnd_below(r, 6); rex &= ~4u; }
        if (f->k[i] == Zv || f->k[i] == Zb) rex &= ~4u;
        if (f->k[i] == Cr || f->k[i] == Dr) rex &= ~4u;
        if (f->k[i] == Pq || f->k[i] == Qq || f->k[i] == Nq || f->k[i] == Qd) { /* REX.R and B do not extend MMX */ }
    }
    if (f->ext != 0xff) { reg = f->ext; rex &= ~4u; }
    if (memory) {
        do choose_memory(r, bits, asize, &m);
        while (is_gather(f) && !m.has_sib && asize != 16);
        rex = (rex & 4) | m.rex;
        m.modrm |= (uint8_t)(reg << 3);
    } else m.modrm = f->is_fixed ? f->fixed_modrm : (uint8_t)(0xc0 | reg << 3 | rm);
    if (!has_modrm && map == M1 && opcode == 0x90) rex = 0;
    if (wantw) rex |= 8;
    else if (bits == 64 && no_osize_use && !f->vex && !q->plain && rnd_one(r, 6) && f->op != OP_cmpxchg8b) rex |= 8;
    bool need_rex = bits == 64 && (rex || (byte_regs && rnd_one(r, 2)) || (!q->plain && rnd_one(r, 10)));
    if (bits != 64 || f->vex) need_rex = false;

    /* A REX that is not last is ignored. */
    for (uint32_t i = 0; i < np; i++) b[n++] = prefix[i];
    if (need_rex) b[n++] = (uint8_t)(0x40 | rex);
    if (f->vex) {
        bool ignored = !(f->attr & (A_L0 | A_L1)) && widths == 1; /* scalar instructions do not look at VEX.L */
        bool l = f->attr & A_AVX && (ignored || !(widths & 3) ? !(f->attr & A_L0) && !q->plain && rnd_one(r, 4) : q->width == 16);
        n += vex_prefix(r, f, bits, map, rex, l, b + n);
    }
    if (map == M0F || map == M38 || map == M3A) b[n++] = 0x0f;
    if (map == M38) b[n++] = 0x38;
    if (map == M3A) b[n++] = 0x3a;
    b[n++] = opcode;

    uint32_t osize = bits == 64 ? (q->width == 16 ? 2 : wantw || ((f->attr & (A_D64 | A_F64)) && q->width == 64) ? 8 : 4)
                                : (q->width == 16 ? 2 : 4);
    if (no_osize_use) osize = bits == 16 ? 2 : 4;
    uint32_t ni = 0;
    for (int i = 0; i < OPERANDS; i++) {
        switch (f->k[i]) {
        case Ib: case Ibs: case Lx: case Ll: imm_size[ni++] = 1; break;
        case Jb: imm_size[ni++] = 1; branch8 = true; break;
        case Iw: imm_size[ni++] = 2; break;
        case Iz: case Jz: imm_size[ni++] = osize == 2 ? 2 : 4; break;
        case Iv: imm_size[ni++] = osize; break;
        case Iwb: imm_size[0] = 2; imm_size[1] = 1; ni = 2; break;
        case Ap: imm_size[0] = osize == 2 ? 2 : 4; imm_size[1] = 2; ni = 2; break;
        case Ob: case Ov: moffs = true; break;
        default: break;
        }
    }
    if (has_modrm) b[n++] = m.modrm;
    if (memory) {
        if (m.has_sib) b[n++] = m.sib;
        uint64_t disp = rnd_one(r, 4) ? rnd_value(r) : (uint64_t)((int64_t)rnd(r) >> (64 - 14));
        if (m.disp_size == 1 || q->wild) disp = rnd_one(r, 3) ? rnd_value(r) : rnd(r);
        if (m.absolute && !q->wild) disp = q->target;
        if (m.rip_relative && !q->wild) disp = q->target - (q->ip + n + m.disp_size + imm_size[0] + imm_size[1]);
        st64(b + n, disp);
        n += m.disp_size;
    }
    if (moffs) { st64(b + n, q->wild ? rnd(r) : q->target); n += asize / 8; }
    for (uint32_t i = 0; i < ni; i++) {
        st64(b + n, branch8 ? (uint64_t)(rnd_below(r, 256)) : random_immediate(r));
        n += imm_size[i];
    }
    if (n > 15) { /* too many prefixes: the plain form fits */
        struct encode_request plain = *q;
        plain.plain = true;
        return encode_row(r, &plain, out);
    }
    memcpy(out, b, n);
    return n;
}
