/* VEX-coded vector rows: which handler. */
#include "simd.h"

/* r and m: register and memory form of the ModRM.rm operand; k: checked, of those that raise SIMD exceptions. */
#define DECLARE_ONE(name) OP(name##_r); OP(name##_m); OP(name##_k);
#define DECLARE_XY(name) DECLARE_ONE(name##_x) DECLARE_ONE(name##_y)
#define DECLARE_X0(name) DECLARE_ONE(name##_x)
#define DECLARE_XS(name) DECLARE_ONE(name##_x)
#define DECLARE_Y1(name) DECLARE_ONE(name##_y)
#define FORMS_A(name) op_##name##_r, op_##name##_m
#define FORMS_M(name) NULL, op_##name##_m
#define FORMS_R(name) op_##name##_r, NULL
#define PLAIN(name, mod) { FORMS_##mod(name), NULL }
#define CHECKED(name, mod) { FORMS_##mod(name), op_##name##_k }
#define ENTRY_XY(name, mod, F) [OP_##name] = { F(name##_x, mod), F(name##_y, mod) },
#define ENTRY_X0(name, mod, F) [OP_##name] = { F(name##_x, mod), { NULL, NULL, NULL } },
#define ENTRY_XS(name, mod, F) [OP_##name] = { F(name##_x, mod), F(name##_x, mod) },
#define ENTRY_Y1(name, mod, F) [OP_##name] = { { NULL, NULL, NULL }, F(name##_y, mod) },

#define OPERATION(name, cls, mnem, feat, rd, wr, un)
#define ENC(name, map, pp, opc, mod, k0, k1, k2, at)
#define VEX(name, map, pp, opc, mod, w, k0, k1, k2, k3, at)
#define VGRP(name, grp, pp, ext, mod, k0, k1, k2, at)
#define VSIMD_N(shape, lens, name, mnem, feat, wr, map, pp, opc, mod, w, s, at) DECLARE_##lens(name)
#include "../isa/isa_avx.def"
#define VSIMD_N(shape, lens, name, mnem, feat, wr, map, pp, opc, mod, w, s, at) DECLARE_##lens(name)
#define VSIMD_FP_N VSIMD_N
#include "../isa/isa_avx_fp.def"
#define VSIMD_N(shape, lens, name, mnem, feat, wr, map, pp, opc, mod, w, s, at) DECLARE_##lens(name)
#include "../isa/isa_crypto.def"

static const struct { kvs_handler r, m, checked; } vex_ops[OP_COUNT][2] = {
#define VSIMD_N(shape, lens, name, mnem, feat, wr, map, pp, opc, mod, w, s, at) ENTRY_##lens(name, mod, PLAIN)
#include "../isa/isa_avx.def"
#define VSIMD_N(shape, lens, name, mnem, feat, wr, map, pp, opc, mod, w, s, at) ENTRY_##lens(name, mod, PLAIN)
#define VSIMD_FP_N(shape, lens, name, mnem, feat, wr, map, pp, opc, mod, w, s, at) ENTRY_##lens(name, mod, CHECKED)
#include "../isa/isa_avx_fp.def"
#define VSIMD_N(shape, lens, name, mnem, feat, wr, map, pp, opc, mod, w, s, at) ENTRY_##lens(name, mod, PLAIN)
#include "../isa/isa_crypto.def"
};

kvs_handler vex_handler(const struct decoded *d, uint32_t mode)
{
    kvs_handler h = d->is_mem ? vex_ops[d->op][d->vl].m : vex_ops[d->op][d->vl].r;
    kvs_handler checked = vex_ops[d->op][d->vl].checked;
    if (checked && (mode & MODE_SSE_TRAPS)) return checked;
    return h ? h : op_ud;
}
