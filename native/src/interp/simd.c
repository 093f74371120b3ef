/* SIMD: handler table, slow paths, MXCSR. */
#include "simd.h"

#include "../isa/sem_simd.h"
#include "../mmu/segment.h"

/* ---- table ---- */
#define DECLARE_SIMD(name) OP(name##_r); OP(name##_m);
#define DECLARE_SIMD_STORE(name) DECLARE_SIMD(name)
#define DECLARE_HELP(name)
#define DECLARE_K(name) OP(name##_r); OP(name##_m); OP(name##_k);
#define ENTRY_SIMD(name) [OP_##name] = { op_##name##_r, op_##name##_m, NULL },
#define ENTRY_SIMD_STORE(name) ENTRY_SIMD(name)
#define ENTRY_HELP(name)
#define DECLARE_VEX_SIMD(name)
#define ENTRY_VEX_SIMD(name)
#define ENTRY_K(name) [OP_##name] = { op_##name##_r, op_##name##_m, op_##name##_k },

#define ENC(name, map, pp, opc, mod, k0, k1, k2, at)
#define GRP(name, grp, pp, ext, mod, k0, k1, k2, at)
#define VEX(name, map, pp, opc, mod, w, k0, k1, k2, k3, at)
#define OPERATION(name, cls, mnem, feat, rd, wr, un) DECLARE_##cls(name)
#define SIMD_FP_ROW(shape, name, mnem, feat, wr, map, pp, opc, k0, k1, k2, at) DECLARE_K(name)
#define MMX_FP_ROW(shape, name, mnem, feat, map, pp, opc, k0, k1, k2, at) DECLARE_K(name)
#include "../isa/isa_mmx.def"
#include "../isa/isa_sse.def"
#include "../isa/isa_crypto.def"
#undef OPERATION

static const struct { kvs_handler r, m, checked; } simd_ops[OP_COUNT] = {
#define OPERATION(name, cls, mnem, feat, rd, wr, un) ENTRY_##cls(name)
#define SIMD_FP_ROW(shape, name, mnem, feat, wr, map, pp, opc, k0, k1, k2, at) ENTRY_K(name)
#define MMX_FP_ROW(shape, name, mnem, feat, map, pp, opc, k0, k1, k2, at) ENTRY_K(name)
#include "../isa/isa_mmx.def"
#include "../isa/isa_sse.def"
#include "../isa/isa_crypto.def"
};

kvs_handler simd_handler(const struct decoded *d, uint32_t mode)
{
    kvs_handler r = simd_ops[d->op].r, m = simd_ops[d->op].m, checked = simd_ops[d->op].checked;
    if (!r) return op_ud;
    if (checked && (mode & MODE_SSE_TRAPS)) return checked;
    return d->is_mem ? m : r;
}

/* ---- slow paths ---- */
int simd_address(struct kvs_vcpu *c, const struct kvs_insn *i, uint64_t off, uint32_t size, int access, uint32_t gp,
                 uint32_t ac, uint64_t *la)
{
    uint32_t n = i->seg & 0x7fu;
    /* Silicon looks at the alignment before it finds an address beyond a limit, or not canonical; not in FXSAVE. */
    if (gp && !ac) {
        bool based = !(i->seg & INSN_FAST) && (n >= SEG_FS || !is_code64(c));
        if ((based ? off + c->seg[n].base : off) & gp) return raise_gp(c, 0);
    }
    int st = seg_to_linear(c, i->seg, off, size, access, la);
    if (st != ST_OK) return st;
    if ((*la & ac) && alignment_checked(c)) return raise_error(c, EXC_AC, 0);
    return *la & gp ? raise_gp(c, 0) : ST_OK;
}

/* Silicon's alignment check looks at no more than 16 bytes. */
static uint32_t checked_bits(uint32_t size) { return size > 16 ? 15 : size - 1; }

int simd_read(struct kvs_vcpu *c, const struct kvs_insn *i, void *data, uint32_t how)
{
    uint32_t size = how & SIMD_SIZE, aligned = how & SIMD_ALIGNED;
    uint64_t la;
    int st = simd_address(c, i, insn_offset(c, i), size, ACC_R, aligned ? size - 1 : 0, aligned ? 0 : checked_bits(size), &la);
    return st != ST_OK ? st : lread(c, la, data, size, LA_USER_RULES);
}

static int simd_write(struct kvs_vcpu *c, const struct kvs_insn *i, const void *data, uint32_t how)
{
    uint32_t size = how & SIMD_SIZE, aligned = how & SIMD_ALIGNED;
    uint64_t la;
    int st = simd_address(c, i, insn_offset(c, i), size, ACC_W, aligned ? size - 1 : 0, aligned ? 0 : checked_bits(size), &la);
    return st != ST_OK ? st : lwrite(c, la, data, size, LA_USER_RULES);
}

static NOINLINE int simd_load(struct kvs_vcpu *c, const struct kvs_insn *i, simd_sem core, uint32_t how)
{
    _Alignas(32) uint8_t data[32] = { 0 };
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
