/* VEX forms of AES, PCLMULQDQ and GFNI, made from the rows; the SSE forms are in op_sse.c. */
#include "vex.h"

#define OPERATION(name, cls, mnem, feat, rd, wr, un)
#define ENC(name, map, pp, opc, mod, k0, k1, k2, at)
#define VEX(name, map, pp, opc, mod, w, k0, k1, k2, k3, at)
#define VSIMD_N(shape, lens, name, mnem, feat, wr, map, pp, opc, mod, w, s, at) GEN_##lens(shape, name, mnem, mod, s, at)
#include "../isa/isa_crypto.def"
