/* Makes cases: an instruction from a row, and a state that gives it something to do. */
#include "maker.h"

bool has_mnemonic(uint32_t row, const char *const *list)
{
    const char *m = isa_op[row_forms[row].op].mnemonic;
    for (; *list; list++)
        if (!strcmp(m, *list)) return true;
    return false;
}

static uint64_t host_has(void)
{
    static uint64_t features;
    if (!features) features = host_features();
    return features;
}
bool host_has_row(uint32_t row)
{
    uint32_t feature = isa_op[row_forms[row].op].feature;
    bool avx = row_forms[row].attr & A_AVX;
    return (feature == FEAT_BASE || host_has() >> feature & 1) && (!avx || host_has() >> FEAT_AVX & 1);
}

static uint64_t seg_base(const struct test_case *t, uint32_t seg)
{
    if (seg == SEG_FS) return FS_BASE;
    if (seg == SEG_GS) return GS_BASE;
    return t->bits == 64 ? 0 : selector_base(t->in.selector[seg]);
}
/* Linear address of the arena as an address of that size in that segment can reach it. */
static uint64_t arena_of(const struct maker *m, uint32_t seg, uint32_t asize)
{
    uint64_t base = seg_base(m->t, seg);
    if (asize == 2) return seg < SEG_FS && base ? base + LOW : LOW;
    return asize == 8 && rnd_one(m->r, 2) ? HIGH : MID;
}

/* Offset in the arena for an operand of so many bytes. */
static uint32_t pick_offset(struct rng *r, uint32_t size, bool align16)
{
    uint32_t off, x = rnd_below(r, 64);
    if (size == FX_SIZE) {
        off = WINDOW0 + rnd_below(r, 256);
        if (!rnd_one(r, 8)) off &= ~63u;
        return x == 0 ? 0x3000 + (off & 0xfc0) : off;
    }
    if (size > 64) {
        off = WINDOW0 + rnd_below(r, 512);
        if (align16 ? !rnd_one(r, 8) : rnd_one(r, 2)) off &= ~15u;
        return x == 0 ? 0x3000 + (off & 0xff0) : off;
    }
    if (x < 44) off = 0x1000 - 160 + rnd_below(r, 320);
    else if (x < 56) off = 0x1000 - 1 - rnd_below(r, size ? size : 16);
    else if (x < 60) off = 0x2000 - rnd_below(r, 64);
    else if (x < 61) off = 0x2000 + rnd_below(r, 0xff0);
    else if (x < 62) off = 0x3000 - rnd_below(r, 32);
    else if (x < 63) off = 0x3000 + rnd_below(r, 0x1000);
    else off = 0u - rnd_below(r, 0x1000);
    if (align16 && !rnd_one(r, 8)) off &= ~15u;
    return off;
}

/* Linear. */
static uint64_t pick_address(struct maker *m, uint32_t seg, uint32_t asize, uint32_t size, bool align16)
{
    struct rng *r = m->r;
    if (asize == 8 && rnd_one(r, 64)) return rnd(r) | 0x0000900000000000ull; /* mostly not canonical */
    if (m->t->ldt && rnd_one(r, 32)) return seg_base(m->t, seg) + (uint16_t)(8 - rnd_below(r, 40)); /* at the ends of the segment */
    return arena_of(m, seg, asize) + (uint64_t)(int64_t)(int32_t)pick_offset(r, size, align16);
}

static uint64_t truncate_to(uint64_t v, uint32_t size)
{
    return size == 8 ? v : size == 4 ? (uint32_t)v : size == 2 ? (uint16_t)v : (uint8_t)v;
}
void set_low(uint64_t *reg, uint64_t v, uint32_t size)
{
    uint64_t mask = size == 8 ? ~0ull : (1ull << 8 * size) - 1;
    *reg = (*reg & ~mask) | (v & mask);
}

/* Chooses base and index values so that the operand lies at the target. */
static void solve_address(struct maker *m, uint32_t size, bool align16)
{
    const struct decoded *d = &m->t->d;
    uint64_t *g = m->t->in.gpr;
    uint32_t as = d->asize;
    bool has_base = d->base < 16, has_index = d->index < 16;
    if (!has_base && !has_index) {
        m->target = seg_base(m->t, d->seg) + truncate_to((d->rip_relative ? m->t->in.rip + d->length : 0) + (uint64_t)d->disp, as);
        return;
    }
    uint64_t off = pick_address(m, d->seg, as, size, align16) - seg_base(m->t, d->seg), disp = (uint64_t)d->disp;
    if (has_base && has_index && d->base == d->index) {
        uint64_t mul = 1 + (1ull << d->scale), rest = truncate_to(off - disp, as);
        if (as == 8) { uint64_t q = rest / mul; off = q * mul + disp; set_low(&g[d->base], q, as); }
        else { off = rest - rest % mul + disp; set_low(&g[d->base], rest / mul, as); }
    } else if (has_base) {
        uint64_t x = 0;
        if (has_index) {
            if (rnd_one(m->r, 2)) set_low(&g[d->index], rnd_below(m->r, 256) - 128ull, as);
            x = g[d->index] << d->scale;
        }
        set_low(&g[d->base], off - disp - x, as);
    } else {
        uint64_t rest = truncate_to(off - disp, as) & ~((1ull << d->scale) - 1);
        off = rest + disp;
        set_low(&g[d->index], rest >> d->scale, as);
    }
    if (has_base) m->pinned |= 1u << d->base;
    if (has_index) m->pinned |= 1u << d->index;
    m->target = seg_base(m->t, d->seg) + truncate_to(off, as);
    if (m->t->bits != 64) m->target = (uint32_t)m->target;
}

uint8_t *mem_at(struct maker *m, uint64_t la, uint32_t size)
{
    uint64_t off = la - HIGH < ARENA_SIZE ? la - HIGH : la - MID < ARENA_SIZE ? la - MID : la - LOW;
    if (off >= WINDOW0 && off + size <= WINDOW0 + WINDOW0_SIZE) return m->t->in.mem + (off - WINDOW0);
    if (off >= WINDOW1 && off + size <= WINDOW1 + WINDOW1_SIZE) return m->t->in.mem + WINDOW0_SIZE + (off - WINDOW1);
    return NULL;
}

bool foreign(struct maker *m, uint64_t la, uint32_t size)
{
    if (la - CODE < CODE_SIZE) return true;
    uint64_t off = la - HIGH < ARENA_SIZE + 512 ? la - HIGH : la - MID < ARENA_SIZE + 512 ? la - MID : la - LOW;
    return off < ARENA_SIZE && !mem_at(m, la, size);
}

static void set_reg(struct maker *m, uint32_t reg, uint64_t v)
{
    if (!(m->pinned >> reg & 1)) m->t->in.gpr[reg] = v;
}

/* A pointer register of an implicit operand. */
static uint64_t set_pointer(struct maker *m, uint32_t reg, uint64_t la, uint32_t asize)
{
    if (m->pinned >> reg & 1) return 0;
    set_low(&m->t->in.gpr[reg], la, asize);
    m->pinned |= 1u << reg;
    return la;
}

static uint32_t stack_width(const struct test_case *t) { return t->bits == 64 ? 8 : stack_is_16(t) ? 2 : 4; }
void set_stack(struct maker *m)
{
    uint32_t as = stack_width(m->t);
    uint64_t off = rnd_one(m->r, 16) ? pick_offset(m->r, 8, false) : 0x1000 - 96 + rnd_below(m->r, 192);
    if (!rnd_one(m->r, 8)) off &= ~7ull;
    uint64_t la = arena_of(m, SEG_SS, as) + (uint64_t)(int64_t)(int32_t)off;
    if (m->t->ldt && rnd_one(m->r, 16)) la = seg_base(m->t, SEG_SS) + (uint16_t)(16 - rnd_below(m->r, 40));
    set_pointer(m, RSP, la - seg_base(m->t, SEG_SS), as);
}
uint64_t stack_at(const struct maker *m)
{
    uint64_t la = seg_base(m->t, SEG_SS) + truncate_to(m->t->in.gpr[RSP], stack_width(m->t));
    return m->t->bits == 64 ? la : (uint32_t)la;
}
void no_stack(struct maker *m)
{
    uint32_t as = stack_width(m->t);
    set_low(&m->t->in.gpr[RSP], arena_of(m, SEG_SS, as) + ARENA_SIZE + 0x10 - seg_base(m->t, SEG_SS), as);
}

/* Landing places that both sides can tell. base: of the code segment, which `rip` counts from. */
static bool landing_ok(const struct test_case *t, uint64_t rip, uint64_t base)
{
    uint64_t la = rip + base, start = t->in.rip + t->cs_base;
    if (base) la = (uint32_t)la;
    if (la - (STUB - 0x100) < 0x2200) return false;
    if (la - CODE < CODE_SIZE) return (la - (start - SLOT_IP)) < SLOT_SIZE && la - start >= CODE_MAX + 16;
    return la < 0x500000000000ull || la >= 0x800000000000ull;
}
uint64_t pick_landing(struct maker *m, uint32_t osize, uint64_t base)
{
    for (;;) {
        uint64_t rip;
        uint32_t x = rnd_below(m->r, 16);
        if (x < 12) rip = m->t->in.rip + m->t->cs_base - base - 200 + rnd_below(m->r, 400);
        else if (x < 14 || osize < 8) rip = 0x40000000 + (rnd(m->r) & 0x0fffffff);
        else if (x < 15) rip = 0x110000000000ull + (rnd(m->r) & 0xffffffffffull);
        else rip = rnd(m->r) | 0x0000900000000000ull;
        if (landing_ok(m->t, truncate_to(rip, osize), base)) return rip;
    }
}

static void fill_operand(struct maker *m, uint64_t la, uint32_t size)
{
    uint8_t *p = mem_at(m, la, size);
    struct rng *r = m->r;
    if (!p) return;
    if (m->t->d.attr & A_X87 && size <= 10) {
        uint8_t b[16];
        if (size == 4) st32(b, rnd_one(r, 3) ? (uint32_t)rnd_value(r) : rnd_float(r));
        else if (size == 10 && rnd_one(r, 2)) {
            for (int i = 0; i < 9; i++) b[i] = (uint8_t)(rnd_below(r, 10) | rnd_below(r, 10) << 4);
            b[9] = (uint8_t)(rnd(r) & 0x80);
        } else if (size == 10) rnd_extended(r, b);
        else st64(b, rnd_one(r, 3) ? rnd_value(r) : rnd_double(r));
        memcpy(p, b, size);
    } else if (m->t->d.attr & (A_SSE | A_MMX | A_AVX)) {
        uint8_t v[16];
        for (uint32_t i = 0; i < size; i += 16) {
            rnd_vector(r, v);
            memcpy(p + i, v, size - i < 16 ? size - i : 16);
        }
    } else {
        for (uint32_t i = 0; i < size; i += 8) {
            uint64_t v = rnd_value(r);
            memcpy(p + i, &v, size - i < 8 ? size - i : 8);
        }
    }
}

/* ---- floating point ---- */
#define MXCSR_MM 0x20000u /* AMD's misaligned SSE mode, which the core does not offer */
static uint32_t random_mxcsr(struct rng *r)
{
    uint32_t x = (uint32_t)rnd(r);
    uint32_t v = 0x1f80 | (x & 0x6000) | (x >> 16 & 0x3f);
    if (x >> 22 & 1) v &= ~0x3fu;
    if (!(x >> 23 & 7)) v |= 0x8000;
    if (!(x >> 26 & 7)) v |= 0x40;
    if (!(x >> 29 & 7)) v = (v & ~0x1f80u) | ((uint32_t)rnd(r) & 0x1f80);
    return v;
}

static void random_x87(struct rng *r, uint8_t *fx, bool mmx)
{
    uint64_t x = rnd(r);
    uint16_t fcw = 0x37f, fsw = (uint16_t)((x & 7) << 11);
    if (x >> 3 & 1) fcw = (uint16_t)((fcw & ~0xf00) | (x >> 4 & 0xf) << 8);
    if (!(x >> 8 & 7)) fcw = (uint16_t)((fcw & ~0x3f) | (x >> 11 & 0x3f));
    if (x >> 17 & 1) fcw |= (uint16_t)(x >> 18 & 0x1000);
    fsw |= (uint16_t)(x >> 20 & 0x4700);
    if (!(x >> 36 & 3)) fsw |= (uint16_t)(x >> 38 & 0x3f);
    if (!(x >> 44 & 3)) fsw |= 0x40 & (uint16_t)(x >> 40);
    if ((fsw & ~fcw & 0x3f) && !(x >> 46 & 3)) fcw |= 0x3f;
    if (fsw & ~fcw & 0x3f) fsw |= 0x8080;
    uint8_t tags = 0xff;
    if (!(x >> 48 & 3)) tags = (uint8_t)(x >> 50);
    if (mmx && (x >> 58 & 1)) tags = (uint8_t)(x >> 50);
    st16(fx, fcw);
    st16(fx + 2, fsw);
    st16(fx + 4, tags);
    st16(fx + 6, (uint16_t)(rnd(r) & 0x7ff));
    st64(fx + 8, rnd(r) >> 17);
    st64(fx + 16, rnd(r) >> 17);
    for (int i = 0; i < 8; i++) {
        uint8_t v[16];
        memset(fx + 32 + 16 * i, 0, 16);
        if (mmx) {
            rnd_vector(r, v);
            memcpy(fx + 32 + 16 * i, v, 10);
        } else {
            rnd_extended(r, fx + 32 + 16 * i);
            if (i && rnd_one(r, 6)) memcpy(fx + 32 + 16 * i, fx + 32, 10);
        }
    }
}

static void random_flags(struct rng *r, struct test_case *t)
{
    uint64_t x = rnd(r);
    t->in.rflags = 0x202 | (x & FLAGS_STATUS);
    if (!(x >> 32 & 7)) t->in.rflags |= FLAG_DF;
    if (!(x >> 35 & 63)) t->in.rflags |= FLAG_AC;
    if (!(x >> 41 & 31)) t->in.rflags |= FLAG_ID;
}

static void fresh_fx(struct rng *r, uint8_t *fx)
{
    memset(fx, 0, FX_SIZE);
    st64(fx + 512, host_components());
    st16(fx, 0x37f);
    st16(fx + 4, 0);
    st32(fx + 24, 0x1f80);
    for (int i = 0; i < 16; i++) rnd_vector(r, fx + 160 + 16 * i);
    for (int i = 0; i < 16; i++) rnd_vector(r, fx + FX_YMM + 16 * i);
}

/* An FXSAVE image in memory, for FXRSTOR. */
static void memory_fxrstor(struct maker *m)
{
    uint8_t *p = mem_at(m, m->target, 512);
    if (!p) return;
    uint8_t fx[FX_SIZE];
    fresh_fx(m->r, fx);
    random_x87(m->r, fx, false);
    st32(fx + 24, rnd_one(m->r, 8) ? (uint32_t)rnd(m->r) & ~MXCSR_MM : random_mxcsr(m->r));
    memcpy(p, fx, 416);
}

#define XSAVE_COMPONENTS 0xf8u /* of a host, that the core has not */

/* Components in EDX:EAX, of which the core has x87, SSE and AVX. */
static bool role_xsave(struct maker *m)
{
    uint64_t mask = rnd_one(m->r, 3) ? 7 : rnd_value(m->r);
    set_reg(m, RAX, mask & ~(uint64_t)XSAVE_COMPONENTS);
    random_x87(m->r, m->t->in.fx, false);
    st32(m->t->in.fx + 24, random_mxcsr(m->r));
    return !(m->t->in.gpr[RAX] & XSAVE_COMPONENTS);
}

/* An XSAVE area in memory, for XRSTOR: standard or compacted, now and then with a header that is not legal. */
static void memory_xrstor(struct maker *m)
{
    struct rng *r = m->r;
    uint8_t *p = mem_at(m, m->target, FX_SIZE), fx[FX_SIZE];
    if (!p) return;
    fresh_fx(r, fx);
    random_x87(r, fx, false);
    st32(fx + 24, rnd_one(r, 8) ? (uint32_t)rnd(r) & ~MXCSR_MM : random_mxcsr(r));
    bool compact = rnd_one(r, 2);
    uint64_t comp = rnd_below(r, 8) & host_components(), bv = rnd_below(r, 8) & (compact ? comp : host_components());
    static const uint64_t wrong[] = { 1, 2, 4, 1ull << 62, 1ull << 63, 1ull << 40, 8 };
    if (rnd_one(r, 12)) bv ^= wrong[rnd_below(r, 7)];
    if (rnd_one(r, 12)) comp ^= wrong[rnd_below(r, 7)];
    st64(fx + 512, bv);
    st64(fx + 520, compact ? comp | 1ull << 63 : rnd_one(r, 12) ? comp : 0);
    if (rnd_one(r, 12)) fx[528 + rnd_below(r, 48)] = 1;
    memcpy(p, fx, FX_SIZE);
}

/* FLDENV and FRSTOR: 14 or 28 bytes of environment, then registers. */
static void memory_env(struct maker *m, bool registers)
{
    uint32_t step = m->t->d.osize == 2 ? 2 : 4, env = 7 * step;
    uint8_t *p = mem_at(m, m->target, env + (registers ? 80 : 0)), fx[512];
    if (!p) return;
    random_x87(m->r, fx, false);
    for (uint32_t i = 0; i < env; i += 2) st16(p + i, (uint16_t)rnd(m->r));
    st16(p, ld16(fx));
    st16(p + step, ld16(fx + 2));
    for (int i = 0; registers && i < 8; i++) memcpy(p + env + 10 * i, fx + 32 + 16 * i, 10);
}

/* ---- roles: what an operation needs beside random values ---- */
static uint32_t index_size(const struct test_case *t) { return t->d.asize; }

static void role_string(struct maker *m)
{
    struct test_case *t = m->t;
    struct rng *r = m->r;
    uint32_t as = index_size(t), size = 1;
    bool source = false, dest = false, written = t->d.op == OP_movs || t->d.op == OP_stos;
    for (int i = 0; i < OPERANDS; i++) {
        uint8_t k = row_forms[t->row].k[i];
        if (k == Xb || k == Xv || k == Xz) source = true;
        if (k == Yb || k == Yv || k == Yz) dest = true;
        if (k == Xv || k == Yv) size = t->d.osize;
    }
    uint64_t count = rnd_below(r, 1 + 320 / size / (rnd_one(r, 2) ? 1 : 8));
    bool runaway = t->d.rep && rnd_one(r, 24);
    /* In 64-bit code one arena for both, so that they overlap. */
    uint64_t base = arena_of(m, SEG_ES, as), from = t->bits == 64 ? base : arena_of(m, t->d.seg, as);
    uint64_t s = from + 0x1000 - 160 + rnd_below(r, 320), e = base + 0x1000 - 160 + rnd_below(r, 320);
    if (rnd_one(r, 3)) e = s - from + base + rnd_below(r, 40) - 20; /* overlapping */
    if (!t->d.rep && rnd_one(r, 8)) {
        s = pick_address(m, t->d.seg, as, size, false);
        e = pick_address(m, SEG_ES, as, size, false);
    }
    if (runaway) {
        t->in.rflags &= ~(uint64_t)FLAG_DF;
        e = base + 0x2000 - rnd_below(r, 128);
        if (!written || !dest) s = from + 0x2000 - rnd_below(r, 128);
        count = rnd_one(r, 2) ? rnd_value(r) : rnd_below(r, 5000);
    }
    if (rnd_one(r, 2)) { s &= ~7ull; e &= ~7ull; }
    if (source) set_pointer(m, RSI, s - seg_base(t, t->d.seg), as);
    if (dest) set_pointer(m, RDI, e - (t->bits == 64 ? 0 : seg_base(t, SEG_ES)), as);
    /* Zen 5 takes the whole registers for its look at overlap: with different upper halves and 16-bit
     * addresses it copies in blocks what must go byte by byte. */
    if (source && dest && as == 2) { t->in.gpr[RSI] &= 0xffff; t->in.gpr[RDI] &= 0xffff; }
    if (t->d.rep) set_low(&t->in.gpr[RCX], count, as);
    /* Runs of equal elements, so that REPE and REPNE go on. */
    uint32_t style = rnd_below(r, 4);
    if (style == 0) memset(t->in.mem, (int)(t->in.gpr[RAX] & 0xff), WINDOW_SIZE);
    else if (style == 1) {
        for (uint32_t i = 0; i + 8 <= WINDOW_SIZE; i += 8) memcpy(t->in.mem + i, &t->in.gpr[RAX], size);
        t->in.mem[rnd_below(r, WINDOW_SIZE)] ^= 1;
    } else for (uint32_t i = 0; i + 8 <= WINDOW_SIZE; i += 8) st64(t->in.mem + i, rnd(r));
}

static void role_divide(struct maker *m)
{
    uint64_t *g = m->t->in.gpr;
    uint32_t size = operand_size(&m->t->d, 0), x = rnd_below(m->r, 8);
    if (size == 1) {
        if (x < 6) set_low(&g[RAX], rnd_below(m->r, x < 3 ? 0x100 : 0x2000) * (x & 1 ? 1ull : ~0ull), 2);
        return;
    }
    if (m->pinned >> RDX & 1) return;
    uint64_t high = 0;
    if (x < 3) high = 0;
    else if (x < 5) high = (uint64_t)((int64_t)(g[RAX] << (64 - 8 * size)) >> 63);
    else if (x < 6) high = rnd_below(m->r, 100);
    else high = g[RDX];
    set_low(&g[RDX], high, size);
}

static void role_compare(struct maker *m)
{
    struct test_case *t = m->t;
    if (!rnd_one(m->r, 2)) return;
    if (t->d.op == OP_cmpxchg8b) {
        uint32_t half = t->d.osize == 8 ? 8 : 4;
        uint8_t *p = mem_at(m, m->target, 2 * half);
        if (!p || (m->pinned & 5)) return;
        set_low(&t->in.gpr[RAX], ld64(p), half);
        set_low(&t->in.gpr[RDX], half == 8 ? ld64(p + 8) : ld32(p + 4), half);
        return;
    }
    uint32_t size = operand_size(&t->d, 0);
    if (t->d.is_mem) {
        uint8_t *p = mem_at(m, m->target, size);
        if (p && !(m->pinned & 1)) {
            uint64_t v = 0;
            memcpy(&v, p, size);
            set_low(&t->in.gpr[RAX], v, size);
        }
    } else if (size > 1) set_low(&t->in.gpr[RAX], t->in.gpr[t->d.rm], size);
}

static void role_bit_string(struct maker *m)
{
    struct test_case *t = m->t;
    if (!t->d.is_mem || (m->pinned >> t->d.reg & 1)) return;
    set_low(&t->in.gpr[t->d.reg], rnd_below(m->r, 2400) - 1200ull, t->d.osize);
}

static void role_stack(struct maker *m)
{
    struct test_case *t = m->t;
    uint16_t op = t->d.op;
    uint32_t as = stack_width(t);
    set_stack(m);
    if (op == OP_leave || op == OP_enter)
        set_pointer(m, RBP, arena_of(m, SEG_SS, as) - seg_base(t, SEG_SS) + 0x1000 + rnd_below(m->r, 256), as);
    uint8_t *p = mem_at(m, stack_at(m), 8);
    if (op == OP_ret) {
        uint64_t rip = pick_landing(m, t->d.osize, t->cs_base);
        if (p) memcpy(p, &rip, t->d.osize);
        else no_stack(m); /* never return through bytes we did not choose */
    } else if (op == OP_call_ind && !t->d.is_mem) {
        if (t->d.rm != RSP) t->in.gpr[t->d.rm] = pick_landing(m, t->d.osize, t->cs_base);
    }
}

static void role_indirect(struct maker *m)
{
    struct test_case *t = m->t;
    uint64_t rip = pick_landing(m, t->d.osize, t->cs_base);
    if (!t->d.is_mem) { set_low(&t->in.gpr[t->d.rm], rip, t->d.osize); return; }
    uint8_t *p = mem_at(m, m->target, t->d.osize);
    if (p) memcpy(p, &rip, t->d.osize);
}

static bool is_gather(const struct row_form *f) { return f->k[1] == Mvd || f->k[1] == Mvq; }

/* What only the host has there. */
static bool touches_stub(uint64_t la) { return la - (STUB - 0x400) < 0x2800; }

/* A base in the arena and indices around it; some of them wild, so that elements fault. */
static void role_gather(struct maker *m)
{
    struct test_case *t = m->t;
    struct rng *r = m->r;
    const struct decoded *d = &t->d;
    uint32_t as = d->asize, index = d->index < 16 ? d->index : 4, isize = d->opcode & 1 ? 8 : 4, size = operand_size(d, 1);
    uint64_t center = arena_of(m, d->seg, as) + 0x1000 - seg_base(m->t, d->seg), base = (uint64_t)d->disp;
    if (d->base < 16) {
        if (!rnd_one(r, 16)) set_low(&t->in.gpr[d->base], center - base - (rnd_below(r, 64) << d->scale), as);
        base += t->in.gpr[d->base];
        m->pinned |= 1u << d->base;
    }
    uint8_t *lo = t->in.fx + 160 + 16 * index, *hi = t->in.fx + FX_YMM + 16 * index;
    bool wild = rnd_one(r, 3);
    for (uint32_t n = 0; n < 32 / isize; n++) {
        uint8_t *p = n * isize < 16 ? lo + n * isize : hi + n * isize - 16;
        uint64_t to = center + (uint64_t)(int64_t)(int32_t)(rnd_below(r, 320) - 160), v = (uint64_t)((int64_t)(to - base) >> d->scale);
        if (wild && rnd_one(r, 4)) v = ((uint64_t)(int64_t)(int32_t)pick_offset(r, size, false) + center - 0x1000 - base) >> d->scale;
        if (wild && rnd_one(r, 8)) v = rnd_value(r);
        uint64_t at = seg_base(m->t, d->seg) + truncate_to(base + ((isize == 4 ? (uint64_t)(int64_t)(int32_t)v : v) << d->scale), as);
        if (touches_stub(at)) v = 0;
        memcpy(p, &v, isize);
    }
    m->target = center + seg_base(m->t, d->seg);
}

static bool is_mnemonic(const struct test_case *t, const char *name) { return !strcmp(isa_op[t->d.op].mnemonic, name); }

static bool is_mxcsr_load(const struct test_case *t) { return is_mnemonic(t, "ldmxcsr") || is_mnemonic(t, "vldmxcsr"); }

static bool apply_roles(struct maker *m)
{
    struct test_case *t = m->t;
    struct rng *r = m->r;
    uint16_t op = t->d.op;
    uint64_t next = t->in.rip + t->d.length;
    t->segments = false;
    if (row_is_system(t->row)) return system_role(m);
    switch (op) {
    case OP_movs: case OP_cmps: case OP_stos: case OP_lods: case OP_scas: role_string(m); break;
    case OP_div: case OP_idiv: role_divide(m); break;
    case OP_cmpxchg: case OP_cmpxchg8b: role_compare(m); break;
    case OP_bt: case OP_bts: case OP_btr: case OP_btc:
        if (row_forms[t->row].k[1] == Gv) role_bit_string(m);
        break;
    case OP_push: case OP_push_i: case OP_pop: case OP_pusha: case OP_popa: case OP_enter: case OP_leave: case OP_ret:
        role_stack(m);
        break;
    case OP_call: role_stack(m); break;
    case OP_call_ind: role_stack(m); role_indirect(m); break;
    case OP_jmp_ind: role_indirect(m); break;
    case OP_loop: case OP_loope: case OP_loopne: case OP_jcxz:
        if (rnd_one(r, 2)) set_low(&t->in.gpr[RCX], rnd_below(r, 3), rnd_one(r, 2) ? 8 : t->d.asize);
        break;
    case OP_xlat: {
        uint64_t la = pick_address(m, t->d.seg, t->d.asize, 1, false) - seg_base(t, t->d.seg);
        set_low(&t->in.gpr[RBX], la - (t->in.gpr[RAX] & 0xff), t->d.asize);
        break;
    }
    case OP_bound: {
        uint8_t *p = mem_at(m, m->target, 2 * t->d.osize);
        if (p && !rnd_one(r, 3)) {
            set_low((uint64_t *)&m->target, 0, 0);
            uint64_t lo = t->d.osize == 2 ? 0x8000 : 0x80000000, hi = lo - 1;
            if (rnd_one(r, 3)) lo = t->in.gpr[t->d.reg];
            memcpy(p, &lo, t->d.osize);
            memcpy(p + t->d.osize, &hi, t->d.osize);
        }
        break;
    }
    case OP_rol: case OP_ror: case OP_rcl: case OP_rcr: case OP_shl: case OP_shr: case OP_sar: case OP_shld: case OP_shrd:
        if (rnd_one(r, 2) && !(m->pinned & 2)) set_low(&t->in.gpr[RCX], rnd_below(r, 70), 1);
        break;
    default: break;
    }
    bool chosen = op == OP_call_ind || op == OP_jmp_ind || is_mxcsr_load(t) || is_mnemonic(t, "fxrstor") ||
                  is_mnemonic(t, "xrstor");
    if (t->d.is_mem && chosen && foreign(m, m->target, is_mnemonic(t, "xrstor") ? FX_SIZE : is_mnemonic(t, "fxrstor") ? 512 : is_mxcsr_load(t) ? 4 : t->d.osize))
        return false;
    uint8_t k0 = row_forms[t->row].k[0];
    if (k0 == Jz && t->bits == 16 && rnd_one(r, 2)) {
        uint64_t imm = pick_landing(m, t->d.osize, t->cs_base) - next;
        memcpy(t->bytes + t->length - t->d.osize, &imm, t->d.osize);
        t->d.imm = t->d.osize == 2 ? (uint64_t)(int64_t)(int16_t)imm : (uint64_t)(int64_t)(int32_t)imm;
    }
    if ((k0 == Jb || k0 == Jz) && !landing_ok(t, truncate_to(next + t->d.imm, t->bits == 64 ? 8 : t->d.osize), t->cs_base)) return false;
    if (is_mnemonic(t, "popf")) {
        role_stack(m);
        uint8_t *p = mem_at(m, stack_at(m), 8);
        if (p) p[1] &= 0xfe; /* no single-step */
        else return false;
    } else if (is_mnemonic(t, "pushf")) role_stack(m);
    else if (is_mxcsr_load(t)) {
        uint8_t *p = mem_at(m, m->target, 4);
        if (p) st32(p, rnd_one(r, 8) ? (uint32_t)rnd(r) & ~MXCSR_MM : random_mxcsr(r));
    } else if (is_mnemonic(t, "fxrstor")) memory_fxrstor(m);
    else if (!strncmp(isa_op[op].mnemonic, "xsave", 5)) return role_xsave(m);
    else if (is_mnemonic(t, "xrstor")) {
        if (!role_xsave(m)) return false;
        memory_xrstor(m);
    }
    else if (is_mnemonic(t, "fldenv")) memory_env(m, false);
    else if (is_mnemonic(t, "frstor")) memory_env(m, true);
    else if (is_mnemonic(t, "maskmovq") || is_mnemonic(t, "maskmovdqu") || is_mnemonic(t, "vmaskmovdqu")) {
        set_pointer(m, RDI, pick_address(m, t->d.seg, t->d.asize, 16, false) - seg_base(t, t->d.seg), t->d.asize);
    } else if (!strncmp(isa_op[op].mnemonic, "pcmpestr", 8) || !strncmp(isa_op[op].mnemonic, "vpcmpestr", 9)) {
        if (!rnd_one(r, 4)) set_reg(m, RAX, rnd_below(r, 40) - 20ull);
        if (!rnd_one(r, 4)) set_reg(m, RDX, rnd_below(r, 40) - 20ull);
    }
    return true;
}

/* Bytes of memory operand that the row names itself. */
static uint32_t memory_size(const struct decoded *d)
{
    const struct row_form *f = &row_forms[d->row];
    if (d->op == OP_cmpxchg8b) return d->osize == 8 ? 16 : 8;
    for (int i = 0; i < OPERANDS; i++) {
        uint8_t k = f->k[i];
        if (k == Mvd || k == Mvq) return 0;
        if ((k >= Eb && k <= Ey) || (k >= Mb && k <= RyMd) || (k >= Wx && k <= Wm) || k == Qq || k == Qd || k == Ob || k == Ov)
            return operand_size(d, i);
    }
    if (d->attr & A_X87) return 108;
    return f->k[0] == M_ || f->k[1] == M_ ? 16 : 0;
}

static void fresh_slot(struct rng *r, struct test_case *t)
{
    if (t->uses_sse) return;
    for (uint32_t i = 0; i + 8 <= WINDOW_SIZE; i += 8) st64(t->in.mem + i, rnd(r));
    fresh_fx(r, t->in.fx);
    t->uses_sse = true;
}

/* AMD: LOCK MOV CR0 is MOV CR8 (APM 3 "MOV CRn"), and Zen does not mind LOCK VERW. */
static bool lock_has_meaning(uint16_t op) { return op == OP_mov_from_cr || op == OP_mov_to_cr || op == OP_verw; }

/* Behind instructions that are not about the state of the unit itself. */
static void append_environment(struct test_case *t)
{
    static const char *const control[] = { "fxsave", "fxrstor", "fnsave", "frstor", "fnstenv", "fldenv", "fldcw", "fnstcw", "fnstsw", "fnclex", "fninit",
        "fwait", "fnop", "xsave", "xsavec", "xsaveopt", "xrstor", NULL };
    if (has_mnemonic(t->row, control)) return;
    uint8_t *p = t->bytes + t->length;
    *p++ = 0xd9;
    if (t->bits == 64) *p++ = 0x34;
    *p++ = t->bits == 64 ? 0x25 : 0x35;
    st32(p, (uint32_t)ENV_AT);
    t->length = (uint8_t)(p + 4 - t->bytes);
    t->env = true;
}

bool generate_case(struct rng *r, const struct combo *k, uint32_t slot, struct test_case *t)
{
    struct maker m = { r, t, slot, 0, 0 };
    const struct row_form *f = &row_forms[k->row];
    fresh_slot(r, t);
    t->sequence = t->step = t->env = false;
    t->skip = 0;
    for (int tries = 0;; tries++) {
        if (tries == 64) return false;
        t->bits = (uint8_t)k->bits;
        pick_segments(r, t, slot);
        struct encode_request q = { .row = k->row, .bits = k->bits, .width = k->width, .memory = k->memory,
            .plain = rnd_one(r, 2), .rep = !rnd_one(r, 3), .ip = t->in.rip };
        q.lock = k->memory && (f->attr & A_LOCK) && rnd_one(r, 4);
        if (rnd_one(r, 200) && !(f->attr & A_LOCK) && !f->vex && !lock_has_meaning(f->op)) q.lock = true;
        q.target = MID - seg_base(t, SEG_DS) + pick_offset(r, f->k[0] != Mf ? 16 : f->attr & A_X87 ? 512 : FX_SIZE, true);
        t->length = (uint8_t)encode_row(r, &q, t->bytes);
        int st = decode(t->bytes, 15, k->bits, true, host_has(), &t->d);
        if (q.lock && st == DECODE_UD) t->d.length = t->length; /* an illegal LOCK is a case too */
        else if (st != DECODE_OK || t->d.row != k->row || t->d.length != t->length) continue;
        if (t->d.asize == 2 && !host_has_low()) continue;
        t->row = k->row;
        m.pinned = 0;
        for (int i = 0; i < 16; i++) t->in.gpr[i] = rnd_value(r);
        random_flags(r, t);
        if (f->attr & (A_X87 | A_MMX)) random_x87(r, t->in.fx, f->attr & A_MMX);
        if (f->attr & A_AVX) {
            for (int i = 0; i < 16; i++) rnd_vector(r, t->in.fx + FX_YMM + 16 * i);
            if (rnd_one(r, 4)) memcpy(t->in.fx + FX_YMM + 16 * t->d.reg, t->in.fx + FX_YMM + 16 * t->d.rm, 16);
            if (rnd_one(r, 8)) memcpy(t->in.fx + FX_YMM + 16 * t->d.vvvv, t->in.fx + FX_YMM + 16 * t->d.rm, 16);
        }
        if (f->attr & (A_SSE | A_AVX)) {
            st32(t->in.fx + 24, random_mxcsr(r));
            for (int i = 0; i < 16; i++) rnd_vector(r, t->in.fx + 160 + 16 * i);
            if (rnd_one(r, 4)) memcpy(t->in.fx + 160 + 16 * t->d.reg, t->in.fx + 160 + 16 * t->d.rm, rnd_one(r, 2) ? 16 : 8);
            if (f->vex && rnd_one(r, 8)) memcpy(t->in.fx + 160 + 16 * t->d.vvvv, t->in.fx + 160 + 16 * t->d.rm, 16);
        }
        uint32_t size = memory_size(&t->d);
        if (f->k[0] == Mf && !(f->attr & A_X87)) size = FX_SIZE;
        if (is_gather(f)) role_gather(&m);
        else if (t->d.is_mem) {
            solve_address(&m, size, t->d.attr & A_ALIGN);
            if (size) fill_operand(&m, m.target, size);
            /* equal operands now and then */
            uint8_t *p = size && size <= 16 ? mem_at(&m, m.target, size) : NULL;
            if (p && rnd_one(r, 6)) {
                if (f->attr & (A_SSE | A_AVX)) memcpy(p, t->in.fx + 160 + 16 * t->d.reg, size);
                else if (size <= 8) memcpy(p, &t->in.gpr[t->d.reg], size);
            }
        } else if (f->k[0] == Ob || f->k[0] == Ov || f->k[1] == Ob || f->k[1] == Ov) {
            m.target = t->d.imm + seg_base(t, t->d.seg);
        } else if (t->d.has_modrm && rnd_one(r, 8)) {
            t->in.gpr[t->d.rm] = t->in.gpr[t->d.reg];
        }
        if (!apply_roles(&m) || touches_stub(m.target)) continue;
        /* Zen 5 wraps the parts of an image at 64 KiB, where others, and the core, meet the limit. */
        if (t->d.is_mem && t->d.asize == 2 && size > 32 && (uint16_t)(m.target - seg_base(t, t->d.seg)) + size > 0x10000) continue;
        if (t->bits != 64)
            for (int i = 0; i < 16; i++) t->in.gpr[i] = (uint32_t)t->in.gpr[i];
        t->target = m.target;
        case_undefined(t);
        if ((f->attr & A_X87) && !t->ldt && rnd_one(r, 4)) append_environment(t);
        return true;
    }
}

/* ---- sequences ---- */
/* Rows whose instructions do the same wherever they stand: nothing that jumps, uses the stack or an
 * address in registers, leaves undefined registers, or stores instruction pointers. */
static bool fits_sequence(uint32_t row)
{
    static const char *const unfit[] = { "div", "idiv", "aam", "shld", "shrd", "bswap", "push", "pop", "pusha", "popa", "pushf", "popf", "enter",
        "leave", "ret", "call", "jmp", "loop", "loope", "loopne", "jcxz", "xlat", "bound", "movs", "cmps", "stos", "lods", "scas", "int3", "into",
        "ud0", "ud1", "ud2", "maskmovq", "maskmovdqu", "vmaskmovdqu", "fxsave", "fxrstor", "fnsave", "frstor", "fnstenv", "fldenv", "ldmxcsr", "vldmxcsr", "fldcw", "fnstcw",
        "bsf", "bsr", "j", "xsave", "xsavec", "xsaveopt", "xrstor", NULL };
    const struct row_form *f = &row_forms[row];
    return f->id && !row_excluded(row) && !(f->attr & (A_END | A_SYS | A_PRIV | A_IO)) && !has_mnemonic(row, unfit) && !is_gather(f);
}

/* One instruction without registers in its address; false: try again. */
static bool sequence_step(struct rng *r, struct test_case *t, uint32_t row, struct decoded *d, uint8_t *out)
{
    uint32_t widths = row_widths(&row_forms[row], t->bits), w = rnd_below(r, 4);
    struct encode_request q = { .row = row, .bits = t->bits, .width = 8u << w, .memory = rnd_one(r, 2), .plain = !rnd_one(r, 4),
        .ip = t->in.rip + t->length, .target = MID + WINDOW0 + (rnd(r) & 0x3f0) };
    if (!(widths >> w & 1)) return false;
    memset(out, 0x90, 16);
    uint32_t n = encode_row(r, &q, out);
    if (decode(out, 15, t->bits, true, ~0ull, d) != DECODE_OK || d->row != row || d->length != n) return false;
    /* A bit offset in a register reaches beyond the bytes that a case restores. */
    if (d->is_mem && row_forms[row].k[1] == Gv && (d->op == OP_bt || d->op == OP_bts || d->op == OP_btr || d->op == OP_btc)) return false;
    return !d->is_mem || (d->base >= 16 && d->index >= 16 && d->seg < SEG_FS && d->asize != 2);
}

bool generate_sequence(struct rng *r, uint32_t bits, uint32_t slot, struct test_case *t)
{
    static uint16_t rows[3][ROW_COUNT], counts[3]; /* integer, SIMD, x87 */
    if (!counts[0]) {
        for (uint32_t row = 1; row < ROW_COUNT; row++) {
            if (!fits_sequence(row)) continue;
            uint32_t attr = row_forms[row].attr, kind = attr & A_X87 ? 2 : attr & (A_SSE | A_MMX) ? 1 : 0;
            rows[kind][counts[kind]++] = (uint16_t)row;
        }
    }
    fresh_slot(r, t);
    t->sequence = true;
    t->step = t->env = false;
    t->skip = 0;
    t->segments = false;
    t->row = ROW_none;
    memset(&t->d, 0, sizeof t->d);
    t->bits = (uint8_t)bits;
    do pick_segments(r, t, slot);
    while (t->in.selector[SEG_DS] != 0x2b);
    t->length = 0;
    t->gpr_ignored = 0;
    random_flags(r, t);
    t->in.rflags &= ~(uint64_t)FLAG_AC;
    for (int i = 0; i < 16; i++) t->in.gpr[i] = bits != 64 ? (uint32_t)rnd_value(r) : rnd_value(r);
    random_x87(r, t->in.fx, false);
    st16(t->in.fx, 0x37f);
    st16(t->in.fx + 2, ld16(t->in.fx + 2) & 0x7f7f);
    st32(t->in.fx + 24, random_mxcsr(r) | 0x1f80);
    for (uint32_t i = 0; i < 64; i += 8) st64(t->in.mem + rnd_below(r, WINDOW0_SIZE - 8), rnd_value(r));
    uint32_t undefined = 0, style = rnd_below(r, 4), jump_at = 0;
    for (uint32_t n = 2 + rnd_below(r, 5); n > 0;) {
        struct decoded d;
        uint8_t b[16];
        uint32_t kind = style == 0 ? rnd_below(r, 3) : style == 1 ? 1 : 0;
        uint32_t row = rows[kind][rnd_below(r, counts[kind])];
        if (!sequence_step(r, t, row, &d, b)) continue;
        const struct op_info *op = &isa_op[d.op];
        bool shift = op->cls == SHIFT;
        if ((op->read | (shift ? FLAGS_STATUS : 0)) & undefined) continue; /* a count of zero keeps them all */
        if (t->length + d.length + 3u > CODE_MAX) break;
        memcpy(t->bytes + t->length, b, d.length);
        t->length += d.length;
        if (jump_at) { /* the jump goes over this one */
            t->bytes[jump_at] = d.length;
            undefined |= op->undefined;
            jump_at = 0;
        } else undefined = (undefined & ~(op->written & ~op->undefined)) | op->undefined;
        if (shift) undefined |= op->undefined;
        if (host_is_recorded()) undefined = 0;
        n--;
        if (n && !rnd_one(r, 3) && !undefined) {
            t->bytes[t->length++] = (uint8_t)(0x70 | rnd_below(r, 16));
            jump_at = t->length++;
        }
    }
    if (jump_at) t->bytes[jump_at] = 0;
    t->flags_ignored = undefined;
    return true;
}
