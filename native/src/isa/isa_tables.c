/* The instruction table as data. A duplicate encoding is a redefined enumerator in isa.h. */
#include "isa.h"

const struct op_info isa_op[OP_COUNT] = {
#define OPERATION(name, cls, mnem, feat, rd, wr, un) [OP_##name] = { mnem, rd, wr, un, cls, feat },
#include "isa.def"
};

const struct row_info isa_row[ROW_COUNT] = {
#define ENC(name, map, pp, opc, mod, k0, k1, k2, at)                                              \
    [ROW_##map##_##pp##_##opc##_##mod] = { OP_##name, { k0, k1, k2, NA }, at },
#define GRP(name, grp, pp, ext, mod, k0, k1, k2, at)                                              \
    [ROW_##grp##_##pp##_##ext##_##mod] = { OP_##name, { k0, k1, k2, NA }, at },
#define FIX(name, tab, mrm, at) [ROW_##tab##_##mrm] = { OP_##name, { NA, NA, NA, NA }, at },
#define VEX(name, map, pp, opc, mod, w, k0, k1, k2, k3, at)                                       \
    [ROW_##map##_##pp##_##opc##_##mod##_##w] = { OP_##name, { k0, k1, k2, k3 }, at },
#define VGRP(name, grp, pp, ext, mod, k0, k1, k2, at)                                             \
    [ROW_##grp##_##pp##_##ext##_##mod] = { OP_##name, { k0, k1, k2, NA }, at },
#include "isa.def"
};

const uint16_t isa_enc[V1][PP_COUNT][256][MODKIND_COUNT] = {
#define ENC(name, map, pp, opc, mod, k0, k1, k2, at)                                              \
    [map][pp][opc][mod] = ROW_##map##_##pp##_##opc##_##mod,
#include "isa.def"
};

const uint16_t isa_vex[VEXW_COUNT][MAP_COUNT - V1][PP_COUNT][256][MODKIND_COUNT] = {
#define VEX(name, map, pp, opc, mod, w, k0, k1, k2, k3, at)                                       \
    [w][map - V1][pp][opc][mod] = ROW_##map##_##pp##_##opc##_##mod##_##w,
#include "isa.def"
};

const uint16_t isa_grp[GROUP_COUNT][PP_COUNT][8][MODKIND_COUNT] = {
#define GRP(name, grp, pp, ext, mod, k0, k1, k2, at)                                              \
    [grp][pp][ext][mod] = ROW_##grp##_##pp##_##ext##_##mod,
#define VGRP(name, grp, pp, ext, mod, k0, k1, k2, at)                                             \
    [grp][pp][ext][mod] = ROW_##grp##_##pp##_##ext##_##mod,
#include "isa.def"
};

const uint16_t isa_fix[FIXTAB_COUNT][64] = {
#define FIX(name, tab, mrm, at) [tab][(mrm) & 63] = ROW_##tab##_##mrm,
#include "isa.def"
};
