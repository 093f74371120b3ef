/*
 * Unmasked SIMD floating-point exceptions. SDM 1 "SIMD Floating-Point Exceptions", "Handling Unmasked
 * Exceptions". The instruction runs with everything masked and clean flags; what it would have raised
 * is then known, and its result is kept or taken back.
 */
#include "simd.h"

#include "../isa/sem_avx.h"

/* One scalar operation, in single or double precision. */
enum kind { ADD, SUB, MUL, DIV, NARROW, MADD };
struct scalar { enum kind kind; bool wide; uint32_t guest; };

/*
 * Masked and with clean flags. Unmasked underflow is raised for every tiny result, exact or not;
 * masked underflow sets its flag for exact ones only when they are flushed to zero.
 */
static uint32_t trial_mxcsr(uint32_t guest)
{
    return (guest & ~MXCSR_FLAGS) | MXCSR_MASKS | (mxcsr_unmasked(guest) & SIMD_UNDERFLOW ? MXCSR_FTZ : 0);
}

/* *a = *a op *b; MADD: *a * *b + *x */
static void scalar_run(const struct scalar *s, uint64_t *a, const uint64_t *b, const uint64_t *x)
{
#define SCALAR(insn) __asm__ volatile("movq %0,%%xmm0\n\t" insn " %1,%%xmm0\n\tmovq %%xmm0,%0" : "+m"(*a) : "m"(*b) : "xmm0")
#define FUSED(insn)                                                                               \
    __asm__ volatile("vmovq %0,%%xmm0\n\tvmovq %1,%%xmm1\n\t" insn " %2,%%xmm1,%%xmm0\n\tvmovq %%xmm0,%0" \
                     : "+m"(*a) : "m"(*b), "m"(*x) : "xmm0", "xmm1")
    switch (s->kind) {
    case ADD: if (s->wide) SCALAR("addsd"); else SCALAR("addss"); break;
    case SUB: if (s->wide) SCALAR("subsd"); else SCALAR("subss"); break;
    case MUL: if (s->wide) SCALAR("mulsd"); else SCALAR("mulss"); break;
    case DIV: if (s->wide) SCALAR("divsd"); else SCALAR("divss"); break;
    case NARROW: SCALAR("cvtsd2ss"); break;
    case MADD: { /* 132: first * third + second */
        uint64_t factor = *b;
        b = x;
        x = &factor;
        if (s->wide) FUSED("vfmadd132sd"); else FUSED("vfmadd132ss");
        break;
    }
    }
#undef SCALAR
#undef FUSED
}

/*
 * Would the result be inexact if the exponent had no bounds? That is what the precision flag says
 * when overflow or underflow is unmasked. The x87 unit rounds to single or double precision with a
 * wider exponent. SDM 1 "Numeric Overflow Exception (#O)", "Precision Control Field"
 */
static bool inexact_unbounded(const struct scalar *s, const uint64_t *a, const uint64_t *b)
{
    uint16_t saved, status;
    uint16_t control = (uint16_t)(0x3f | (s->wide && s->kind != NARROW ? 0x200 : 0) | ((s->guest >> 13) & 3) << 10);
    double x, y;
    float f, g;
    memcpy(&x, a, 8);
    memcpy(&y, b, 8);
    memcpy(&f, a, 4);
    memcpy(&g, b, 4);
    __asm__ volatile("fnstcw %0" : "=m"(saved));
    __asm__ volatile("fnclex\n\tfldcw %0" : : "m"(control));
    if (!s->wide) __asm__ volatile("flds %0\n\tflds %1" : : "m"(g), "m"(f));
    else if (s->kind == NARROW) __asm__ volatile("fld1\n\tfldl %0" : : "m"(y));
    else __asm__ volatile("fldl %0\n\tfldl %1" : : "m"(y), "m"(x));
    switch (s->kind) {
    case ADD: __asm__ volatile("fadd %st(1),%st"); break;
    case SUB: __asm__ volatile("fsub %st(1),%st"); break;
    case DIV: __asm__ volatile("fdiv %st(1),%st"); break;
    default: __asm__ volatile("fmul %st(1),%st"); break;
    }
    __asm__ volatile("fnstsw %0\n\tfstp %%st(0)\n\tfstp %%st(0)\n\tfnclex\n\tfldcw %1" : "=m"(status) : "m"(saved));
    return status & SIMD_PRECISION;
}

/* A finite number as an odd integer (0: zero) times a power of two. */
struct exact { unsigned __int128 m; int e; bool negative; };
static struct exact exact_of(uint64_t v, bool wide, bool daz)
{
    uint32_t fraction = wide ? 52 : 23;
    struct exact x = { v & ((1ull << fraction) - 1), 0, wide ? v >> 63 : v >> 31 & 1 };
    int biased = (int)(v >> fraction & (wide ? 0x7ff : 0xff));
    if (biased) x.m |= 1ull << fraction;
    else if (daz) x.m = 0;
    x.e = (biased ? biased : 1) - (wide ? 1075 : 150);
    while (x.m && !(x.m & 1)) x.m >>= 1, x.e++;
    return x;
}
static uint32_t bit_length(unsigned __int128 m)
{
    uint64_t high = (uint64_t)(m >> 64), low = (uint64_t)m;
    return high ? 128 - (uint32_t)__builtin_clzll(high) : low ? 64 - (uint32_t)__builtin_clzll(low) : 0;
}
/* Does a * b + x, finite all of them, need more bits than the format has? */
static bool madd_inexact(const struct scalar *s, uint64_t a, uint64_t b, uint64_t x)
{
    bool daz = s->guest & 0x40;
    struct exact p = exact_of(a, s->wide, daz), q = exact_of(b, s->wide, daz), r = exact_of(x, s->wide, daz);
    uint32_t precision = s->wide ? 53 : 24;
    p.m *= q.m; /* odd times odd */
    p.e += q.e;
    p.negative ^= q.negative;
    if (!p.m || !r.m) return bit_length(p.m | r.m) > precision;
    if (p.e < r.e) {
        struct exact t = p;
        p = r;
        r = t;
    }
    /* p is a multiple of a higher power of two: the sum is odd in units of r's, or cancels if they are equal. */
    uint32_t up = (uint32_t)(p.e - r.e);
    if (bit_length(p.m) + up > 126) return true;
    p.m <<= up;
    unsigned __int128 sum = p.negative == r.negative ? p.m + r.m : p.m > r.m ? p.m - r.m : r.m - p.m;
    while (sum && !(sum & 1)) sum >>= 1;
    return bit_length(sum) > precision;
}

/* Flags of the operation under the guest's masks; *a becomes the result. x: only for MADD. */
static uint32_t scalar_flags(const struct scalar *s, uint64_t *a, const uint64_t *b, const uint64_t *x)
{
    uint64_t first = *a;
    host_mxcsr_set(trial_mxcsr(s->guest));
    scalar_run(s, a, b, x);
    uint32_t flags = host_mxcsr_get() & MXCSR_FLAGS;
    if (flags & mxcsr_unmasked(s->guest) & (SIMD_OVERFLOW | SIMD_UNDERFLOW)) {
        flags &= ~SIMD_PRECISION;
        if (s->kind == MADD ? madd_inexact(s, first, *b, *x) : inexact_unbounded(s, &first, b)) flags |= SIMD_PRECISION;
    }
    return flags;
}

static uint64_t element(const uint8_t *v, uint32_t n, bool wide) { return wide ? ld64(v + 8 * n) : ld32(v + 4 * n); }

/* SDM 2A "DPPS", "DPPD": products, sums of pairs, their sum; a step that traps ends it. lanes: of 128 bits. */
static uint32_t dot_product_flags(struct scalar s, const uint8_t *dst, const uint8_t *src, uint32_t select, uint32_t lanes)
{
    uint32_t flags = 0, count = s.wide ? 2 : 4, unmasked = mxcsr_unmasked(s.guest);
    uint64_t t[2][4] = { { 0 }, { 0 } };
    s.kind = MUL;
    for (uint32_t k = 0; k < lanes * count; k++) {
        uint32_t lane = k / count, n = k % count;
        if (!(select >> (4 + n) & 1)) continue;
        uint64_t b = element(src + 16 * lane, n, s.wide);
        t[lane][n] = element(dst + 16 * lane, n, s.wide);
        flags |= scalar_flags(&s, &t[lane][n], &b, NULL);
    }
    flags = simd_reported(flags, unmasked);
    s.kind = ADD;
    for (; count > 1 && !(flags & unmasked); count /= 2) {
        uint32_t step = 0;
        for (uint32_t k = 0; k < lanes * count / 2; k++) {
            uint32_t lane = k / (count / 2), n = k % (count / 2);
            uint64_t sum = t[lane][2 * n];
            step |= scalar_flags(&s, &sum, &t[lane][2 * n + 1], NULL);
            t[lane][n] = sum;
        }
        flags |= simd_reported(step, unmasked);
    }
    return flags;
}

/* HADD, HSUB: pairs of the first operand's lane, then of the second's. ADDSUB: even elements subtract. */
static uint32_t pairs_flags(struct scalar s, uint32_t opcode, const uint8_t *dst, const uint8_t *src)
{
    uint32_t all = 0, count = s.wide ? 2 : 4;
    for (uint32_t n = 0; n < count; n++) {
        uint64_t a = element(dst, n, s.wide), b = element(src, n, s.wide);
        if (opcode == 0xd0) {
            s.kind = n & 1 ? ADD : SUB;
        } else {
            const uint8_t *from = n < count / 2 ? dst : src;
            uint32_t pair = n % (count / 2) * 2;
            a = element(from, pair, s.wide);
            b = element(from, pair + 1, s.wide);
            s.kind = opcode == 0x7c ? ADD : SUB;
        }
        all |= scalar_flags(&s, &a, &b, NULL);
    }
    return all;
}

/* SDM 2 "VFMADD132PD" and the rest: opcode bits 4-5 give the order of operands, bits 0-3 the signs. */
static uint32_t fused_flags(struct scalar s, uint32_t opcode, const uint8_t *dst, const uint8_t *v, const uint8_t *src, uint32_t count)
{
    uint32_t all = 0, low = opcode & 15, order = opcode >> 4 & 3;
    uint64_t sign = s.wide ? 1ull << 63 : 1ull << 31;
    s.kind = MADD;
    for (uint32_t n = 0; n < count; n++) {
        uint64_t o1 = element(dst, n, s.wide), o2 = element(v, n, s.wide), o3 = element(src, n, s.wide);
        uint64_t a = order == 3 ? o2 : o1, b = order == 2 ? o2 : o3, x = order == 1 ? o2 : order == 2 ? o3 : o1;
        bool alternate = low < 8, odd = n & 1;
        if (alternate ? (low == 6) != odd : low == 10 || low == 11 || low >= 14) x ^= sign;
        if (low >= 12) a ^= sign;
        all |= scalar_flags(&s, &a, &b, &x);
    }
    return all;
}

/* What a checked instruction reads, as it was before. */
struct operands { const uint8_t *first, *destination, *source; uint32_t imm; };

/* The flags of an instruction of which an unmasked exception is known: all that its elements raise. */
static uint32_t exact_flags(uint32_t how, uint32_t flags, uint32_t guest, const struct operands *o)
{
    uint32_t opcode = SIMD_FP_OPCODE(how), pp = SIMD_FP_PREFIX(how), all = 0, unmasked = mxcsr_unmasked(guest);
    uint32_t lanes = how & SIMD_Y ? 2 : 1;
    bool wide = pp == P66 || pp == PF2, scalar = pp == PF3 || pp == PF2;
    struct scalar s = { ADD, wide, guest };
    switch (opcode) {
    case 0x58: break;
    case 0x59: s.kind = MUL; break;
    case 0x5c: s.kind = SUB; break;
    case 0x5e: s.kind = DIV; break;
    case 0x5a:
        if (!wide) return simd_reported(flags, unmasked); /* widening is exact */
        s.kind = NARROW;
        break;
    case 0x7c: case 0x7d: case 0xd0:
        s.wide = pp == P66;
        for (uint32_t k = 0; k < lanes; k++) all |= pairs_flags(s, opcode, o->first + 16 * k, o->source + 16 * k);
        return simd_reported(all, unmasked);
    case 0x100 | 0x40: case 0x100 | 0x41:
        s.wide = opcode & 1;
        return dot_product_flags(s, o->first, o->source, o->imm, lanes);
    default:
        if (!(opcode & 0x200) || (opcode & 0xff) == 0x13) return simd_reported(flags, unmasked);
        s.wide = how & SIMD_W;
        scalar = (opcode & 15) > 8 && (opcode & 1);
        all = fused_flags(s, opcode, o->destination, o->first, o->source, scalar ? 1 : lanes * (s.wide ? 2 : 4));
        return simd_reported(all, unmasked);
    }
    uint32_t count = scalar ? 1 : lanes * (s.wide ? 2 : 4);
    for (uint32_t n = 0; n < count; n++) {
        uint64_t a = element(o->first, n, s.wide), b = element(o->source, n, s.wide);
        all |= scalar_flags(&s, &a, &b, NULL);
    }
    return simd_reported(all, unmasked);
}

static NOINLINE int simd_run_checked(struct kvs_vcpu *c, const struct kvs_insn *i, simd_sem core, uint32_t how,
                                     const void *reg)
{
    _Alignas(32) uint8_t data[32] = { 0 };
    if ((how & SIMD_MMX) && mmx_pending(c)) return raise_vector(c, EXC_MF);
    if (!reg) {
        int st = simd_read(c, i, data, how);
        if (st != ST_OK) return st;
        reg = data;
    }
    if (how & SIMD_MMX) mmx_enter(c); /* this much happens even if it traps */
    /* What any of these instructions can write. */
    uint8_t vec[32], first[32], source[32], mmx[16];
    memcpy(vec, c->fpu.vec[i->dst & 15], 32);
    memcpy(first, c->fpu.vec[how & SIMD_VEX ? INSN_VVVV(i) : i->dst & 15u], 32);
    memcpy(source, reg, how & SIMD_SIZE);
    memcpy(mmx, c->fpu.r[i->dst & 7], 16);
    uint64_t gpr = c->gpr[i->dst & 15];
    uint16_t fl = c->fl;

    uint32_t guest = mxcsr_read(c), unmasked = mxcsr_unmasked(guest);
    host_mxcsr_set(trial_mxcsr(guest));
    core(c, i, reg);
    uint32_t flags = host_mxcsr_get() & MXCSR_FLAGS;
    if (!(flags & unmasked)) {
        host_mxcsr_set(guest | MXCSR_MASKS | flags);
        return ST_OK;
    }
    memcpy(c->fpu.vec[i->dst & 15], vec, 32);
    memcpy(c->fpu.r[i->dst & 7], mmx, 16);
    c->gpr[i->dst & 15] = gpr;
    c->fl = fl;
    flags = exact_flags(how, flags, guest, &(struct operands){ first, vec, source, (uint32_t)i->imm });
    mxcsr_write(c, guest | flags);
    return raise_vector(c, c->cr4 & CR4_OSXMMEXCPT ? EXC_XM : EXC_UD);
}

NOINLINE int simd_checked(OPARGS, simd_sem core, uint32_t how, const void *reg)
{
    int st = simd_run_checked(c, i, core, how, reg);
    if (UNLIKELY(st != ST_OK)) return leave(c, i, budget, st);
    NEXT();
}
