/*
 * Unmasked SIMD floating-point exceptions. SDM 1 "SIMD Floating-Point Exceptions", "Handling Unmasked
 * Exceptions". The instruction runs with everything masked and clean flags; what it would have raised
 * is then known, and its result is kept or taken back.
 */
#include "simd.h"

#include "../isa/sem_simd.h"

#define PRE_COMPUTATION 0x07u /* #I #D #Z */
#define OVERFLOW_FLAG 0x08u
#define UNDERFLOW_FLAG 0x10u
#define PRECISION_FLAG 0x20u

/* One scalar operation, in single or double precision. */
enum kind { ADD, SUB, MUL, DIV, NARROW };
struct scalar { enum kind kind; bool wide; uint32_t guest; };

static uint32_t unmasked_of(uint32_t mxcsr) { return ~(mxcsr >> 7) & MXCSR_FLAGS; }
/*
 * Masked and with clean flags. Unmasked underflow is raised for every tiny result, exact or not;
 * masked underflow sets its flag for exact ones only when they are flushed to zero.
 */
static uint32_t trial_mxcsr(uint32_t guest)
{
    return (guest & ~MXCSR_FLAGS) | MXCSR_MASKS | (unmasked_of(guest) & UNDERFLOW_FLAG ? MXCSR_FTZ : 0);
}

static void scalar_run(const struct scalar *s, uint64_t *a, const uint64_t *b)
{
#define SCALAR(insn) __asm__ volatile("movq %0,%%xmm0\n\t" insn " %1,%%xmm0\n\tmovq %%xmm0,%0" : "+m"(*a) : "m"(*b) : "xmm0")
    switch (s->kind) {
    case ADD: if (s->wide) SCALAR("addsd"); else SCALAR("addss"); break;
    case SUB: if (s->wide) SCALAR("subsd"); else SCALAR("subss"); break;
    case MUL: if (s->wide) SCALAR("mulsd"); else SCALAR("mulss"); break;
    case DIV: if (s->wide) SCALAR("divsd"); else SCALAR("divss"); break;
    case NARROW: SCALAR("cvtsd2ss"); break;
    }
#undef SCALAR
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
    return status & PRECISION_FLAG;
}

/* Flags of a op b under the guest's masks; *a becomes the result. */
static uint32_t scalar_flags(const struct scalar *s, uint64_t *a, const uint64_t *b)
{
    uint64_t first = *a;
    host_mxcsr_set(trial_mxcsr(s->guest));
    scalar_run(s, a, b);
    uint32_t flags = host_mxcsr_get() & MXCSR_FLAGS;
    if (flags & unmasked_of(s->guest) & (OVERFLOW_FLAG | UNDERFLOW_FLAG)) {
        flags &= ~PRECISION_FLAG;
        if (inexact_unbounded(s, &first, b)) flags |= PRECISION_FLAG;
    }
    return flags;
}

/* An unmasked exception found before the computation leaves no flags of what the computation would raise. */
static uint32_t reported(uint32_t flags, uint32_t unmasked)
{
    return flags & unmasked & PRE_COMPUTATION ? flags & PRE_COMPUTATION : flags;
}

static uint64_t element(const uint8_t *v, uint32_t n, bool wide) { return wide ? ld64(v + 8 * n) : ld32(v + 4 * n); }

/* SDM 2A "DPPS", "DPPD": products, sums of pairs, their sum; a step that traps ends it. */
static uint32_t dot_product_flags(struct scalar s, const uint8_t *dst, const uint8_t *src, uint32_t select)
{
    uint32_t flags = 0, count = s.wide ? 2 : 4, unmasked = unmasked_of(s.guest);
    uint64_t t[4] = { 0 };
    s.kind = MUL;
    for (uint32_t n = 0; n < count; n++) {
        if (!(select >> (4 + n) & 1)) continue;
        uint64_t b = element(src, n, s.wide);
        t[n] = element(dst, n, s.wide);
        flags |= scalar_flags(&s, &t[n], &b);
    }
    flags = reported(flags, unmasked);
    s.kind = ADD;
    for (; count > 1 && !(flags & unmasked); count /= 2) {
        uint32_t step = 0;
        for (uint32_t n = 0; n < count / 2; n++) {
            uint64_t sum = t[2 * n];
            step |= scalar_flags(&s, &sum, &t[2 * n + 1]);
            t[n] = sum;
        }
        flags |= reported(step, unmasked);
    }
    return flags;
}

/* The flags of an instruction of which an unmasked exception is known: all that its elements raise. */
static uint32_t exact_flags(uint32_t how, uint32_t flags, uint32_t guest, const uint8_t *dst, const uint8_t *src, uint32_t imm)
{
    uint32_t opcode = SIMD_FP_OPCODE(how), pp = SIMD_FP_PREFIX(how), all = 0;
    bool wide = pp == P66 || pp == PF2, scalar = pp == PF3 || pp == PF2;
    struct scalar s = { ADD, wide, guest };
    switch (opcode) {
    case 0x58: break;
    case 0x59: s.kind = MUL; break;
    case 0x5c: s.kind = SUB; break;
    case 0x5e: s.kind = DIV; break;
    case 0x5a:
        if (!wide) return reported(flags, unmasked_of(guest)); /* widening is exact */
        s.kind = NARROW;
        break;
    case 0x7c: case 0x7d: case 0xd0:
        s.wide = pp == P66;
        scalar = false;
        break;
    case 0x100 | 0x40: case 0x100 | 0x41:
        s.wide = opcode & 1;
        return dot_product_flags(s, dst, src, imm);
    default: return reported(flags, unmasked_of(guest));
    }
    uint32_t count = scalar ? 1 : s.wide ? 2 : 4;
    for (uint32_t n = 0; n < count; n++) {
        uint64_t a = element(dst, n, s.wide), b = element(src, n, s.wide);
        if (opcode == 0x7c || opcode == 0x7d) {
            const uint8_t *from = n < count / 2 ? dst : src;
            uint32_t pair = n % (count / 2) * 2;
            a = element(from, pair, s.wide);
            b = element(from, pair + 1, s.wide);
            s.kind = opcode == 0x7c ? ADD : SUB;
        } else if (opcode == 0xd0) {
            s.kind = n & 1 ? ADD : SUB;
        }
        all |= scalar_flags(&s, &a, &b);
    }
    return reported(all, unmasked_of(guest));
}

static NOINLINE int simd_run_checked(struct kvs_vcpu *c, const struct kvs_insn *i, simd_sem core, uint32_t how,
                                     const void *reg)
{
    _Alignas(16) uint8_t data[16] = { 0 };
    if ((how & SIMD_MMX) && mmx_pending(c)) return raise_vector(c, EXC_MF);
    if (!reg) {
        int st = simd_read(c, i, data, how);
        if (st != ST_OK) return st;
        reg = data;
    }
    if (how & SIMD_MMX) mmx_enter(c); /* this much happens even if it traps */
    /* What any of these instructions can write. */
    uint8_t xmm[16], mmx[16];
    memcpy(xmm, c->fpu.vec[i->dst & 15], 16);
    memcpy(mmx, c->fpu.r[i->dst & 7], 16);
    uint64_t gpr = c->gpr[i->dst & 15];
    uint16_t fl = c->fl;

    uint32_t guest = mxcsr_read(c), unmasked = unmasked_of(guest);
    host_mxcsr_set(trial_mxcsr(guest));
    core(c, i, reg);
    uint32_t flags = host_mxcsr_get() & MXCSR_FLAGS;
    if (!(flags & unmasked)) {
        host_mxcsr_set(guest | MXCSR_MASKS | flags);
        return ST_OK;
    }
    memcpy(c->fpu.vec[i->dst & 15], xmm, 16);
    memcpy(c->fpu.r[i->dst & 7], mmx, 16);
    c->gpr[i->dst & 15] = gpr;
    c->fl = fl;
    flags = exact_flags(how, flags, guest, xmm, reg, (uint32_t)i->imm);
    mxcsr_write(c, guest | flags);
    return raise_vector(c, c->cr4 & CR4_OSXMMEXCPT ? EXC_XM : EXC_UD);
}

NOINLINE int simd_checked(OPARGS, simd_sem core, uint32_t how, const void *reg)
{
    int st = simd_run_checked(c, i, core, how, reg);
    if (UNLIKELY(st != ST_OK)) return leave(c, i, budget, st);
    NEXT();
}
