/* SIMD: handler table, slow paths, MXCSR and its exceptions. */
#include "simd.h"

#include "../isa/sem_simd.h"

/* ---- table ---- */
#define DECLARE_SIMD(name) OP(name##_r); OP(name##_m);
#define DECLARE_SIMD_STORE(name) DECLARE_SIMD(name)
#define DECLARE_HELP(name)
#define DECLARE_K(name) OP(name##_r); OP(name##_m); OP(name##_k);
#define ENTRY_SIMD(name) [OP_##name] = { op_##name##_r, op_##name##_m, NULL },
#define ENTRY_SIMD_STORE(name) ENTRY_SIMD(name)
#define ENTRY_HELP(name)
#define ENTRY_K(name) [OP_##name] = { op_##name##_r, op_##name##_m, op_##name##_k },

#define ENC(name, map, pp, opc, mod, k0, k1, k2, at)
#define GRP(name, grp, pp, ext, mod, k0, k1, k2, at)
#define OPERATION(name, cls, mnem, feat, rd, wr, un) DECLARE_##cls(name)
#define SIMD_FP_ROW(shape, name, mnem, feat, wr, map, pp, opc, k0, k1, k2, at) DECLARE_K(name)
#define MMX_FP_ROW(shape, name, mnem, feat, map, pp, opc, k0, k1, k2, at) DECLARE_K(name)
#include "../isa/isa_mmx.def"
#include "../isa/isa_sse.def"
#undef OPERATION

static const struct { kvs_handler r, m, checked; } simd_ops[OP_COUNT] = {
#define OPERATION(name, cls, mnem, feat, rd, wr, un) ENTRY_##cls(name)
#define SIMD_FP_ROW(shape, name, mnem, feat, wr, map, pp, opc, k0, k1, k2, at) ENTRY_K(name)
#define MMX_FP_ROW(shape, name, mnem, feat, map, pp, opc, k0, k1, k2, at) ENTRY_K(name)
#include "../isa/isa_mmx.def"
#include "../isa/isa_sse.def"
};

kvs_handler simd_handler(const struct decoded *d, uint32_t mode)
{
    kvs_handler r = simd_ops[d->op].r, m = simd_ops[d->op].m, checked = simd_ops[d->op].checked;
    if (!r) return op_ud;
    if (checked && (mode & MODE_SSE_TRAPS)) return checked;
    return d->is_mem ? m : r;
}

/* ---- slow paths ---- */
static int simd_read(struct kvs_vcpu *c, const struct kvs_insn *i, void *data, uint32_t how)
{
    uint32_t size = how & SIMD_SIZE;
    if (!(how & SIMD_ALIGNED)) return insn_read(c, i, data, size);
    /* Segment checks come before the alignment check, that before paging. */
    uint64_t la;
    int st = seg_to_linear(c, i->seg, insn_offset(c, i), size, ACC_R, &la);
    if (st != ST_OK) return st;
    if (la & (size - 1)) return raise_gp(c, 0);
    return lread(c, la, data, size, LA_USER_RULES);
}

static int simd_write(struct kvs_vcpu *c, const struct kvs_insn *i, const void *data, uint32_t how)
{
    uint32_t size = how & SIMD_SIZE;
    if (!(how & SIMD_ALIGNED)) return insn_write(c, i, data, size);
    uint64_t la;
    int st = seg_to_linear(c, i->seg, insn_offset(c, i), size, ACC_W, &la);
    if (st != ST_OK) return st;
    if (la & (size - 1)) return raise_gp(c, 0);
    return lwrite(c, la, data, size, LA_USER_RULES);
}

static NOINLINE int simd_load(struct kvs_vcpu *c, const struct kvs_insn *i, simd_sem core, uint32_t how)
{
    _Alignas(16) uint8_t data[16] = { 0 };
    int st = simd_read(c, i, data, how);
    if (st != ST_OK) return st;
    core(c, i, data);
    if (how & SIMD_MMX) mmx_enter(c);
    return ST_OK;
}

NOINLINE int simd_load_slow(OPARGS, simd_sem core, uint32_t how)
{
    int st = simd_load(c, i, core, how);
    if (UNLIKELY(st != ST_OK)) return leave(c, i, budget, st);
    NEXT();
}

NOINLINE int simd_store_slow(OPARGS, const void *from, uint32_t how)
{
    int st = simd_write(c, i, from, how);
    if (UNLIKELY(st != ST_OK)) return leave(c, i, budget, st);
    if (how & SIMD_MMX) mmx_enter(c);
    if (UNLIKELY(c->write_count | c->code_modified)) return leave(c, i, budget, ST_END);
    NEXT();
}

NOINLINE OP(mf) { return leave(c, i, budget, raise_vector(c, EXC_MF)); }

/* ---- MXCSR ---- */
uint32_t mxcsr_read(struct kvs_vcpu *c)
{
    if (!c->running) return c->fpu.mxcsr;
    return (host_mxcsr_get() & ~MXCSR_MASKS) | (c->fpu.mxcsr & MXCSR_MASKS);
}

void mxcsr_write(struct kvs_vcpu *c, uint32_t value)
{
    c->fpu.mxcsr = value;
    if (c->running) host_mxcsr_set(value | MXCSR_MASKS);
    vcpu_update_mode(c);
}

/* ---- unmasked exceptions ----
 * SDM 1 "SSE and SSE2 SIMD Floating-Point Exceptions", "Handling Unmasked Exceptions". The
 * instruction runs with everything masked and clean flags; what it would have raised is then known.
 */
#define PRE_COMPUTATION 0x07u /* #I #D #Z */
#define UNDERFLOW 0x10u
#define PRECISION 0x20u

static NOINLINE int simd_trap(struct kvs_vcpu *c, uint32_t guest, uint32_t flags)
{
    mxcsr_write(c, guest | flags);
    return raise_vector(c, c->cr4 & CR4_OSXMMEXCPT ? EXC_XM : EXC_UD);
}

static NOINLINE int simd_run_checked(struct kvs_vcpu *c, const struct kvs_insn *i, simd_sem core, uint32_t how,
                                     const void *reg)
{
    _Alignas(16) uint8_t data[16] = { 0 };
    if ((how & SIMD_MMX) && (c->fpu.fsw & 0x80)) return raise_vector(c, EXC_MF);
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

    uint32_t guest = mxcsr_read(c);
    uint32_t unmasked = ~(guest >> 7) & MXCSR_FLAGS;
    uint32_t quiet = (guest & ~MXCSR_FLAGS) | MXCSR_MASKS;
    /* Unmasked underflow is raised for every tiny result, exact or not; masked underflow sets its
     * flag for exact ones only when they are flushed to zero. */
    host_mxcsr_set(unmasked & UNDERFLOW ? quiet | MXCSR_FTZ : quiet);
    core(c, i, reg);
    uint32_t flags = host_mxcsr_get() & MXCSR_FLAGS;
    uint32_t raised = flags & unmasked;
    if (!raised) {
        host_mxcsr_set(quiet | ((guest | flags) & MXCSR_FLAGS));
        return ST_OK;
    }
    memcpy(c->fpu.vec[i->dst & 15], xmm, 16);
    memcpy(c->fpu.r[i->dst & 7], mmx, 16);
    c->gpr[i->dst & 15] = gpr;
    c->fl = fl;
    if (raised & PRE_COMPUTATION) return simd_trap(c, guest, flags & PRE_COMPUTATION);
    if ((raised & UNDERFLOW) && (flags & PRECISION)) {
        /* Flushing made it inexact; look again without. */
        host_mxcsr_set(quiet & ~MXCSR_FTZ);
        core(c, i, reg);
        flags = (flags & ~PRECISION) | (host_mxcsr_get() & PRECISION);
        memcpy(c->fpu.vec[i->dst & 15], xmm, 16);
        c->fl = fl;
    }
    return simd_trap(c, guest, flags);
}

NOINLINE int simd_checked(OPARGS, simd_sem core, uint32_t how, const void *reg)
{
    int st = simd_run_checked(c, i, core, how, reg);
    if (UNLIKELY(st != ST_OK)) return leave(c, i, budget, st);
    NEXT();
}
