#include "random.h"

#include <string.h>

static const uint64_t boundary[] = {
    0, 1, 2, 3, 0x7f, 0x80, 0x81, 0xff, 0x100, 0x7fff, 0x8000, 0x8001, 0xffff, 0x10000, 0x7fffffff, 0x80000000,
    0x80000001, 0xffffffff, 0x100000000, 0x7fffffffffffffff, 0x8000000000000000, 0x8000000000000001,
    0xffffffffffffffff, 0xfffffffffffffffe, 0x5555555555555555, 0xaaaaaaaaaaaaaaaa, 0xffffffff80000000,
    0xffffffff7fffffff, 0xffffffffffffff80, 0xffffffffffffff7f, 0xffffffffffff8000, 0x00ff00ff00ff00ff,
    0x0123456789abcdef, 0x8080808080808080, 0x7f7f7f7f7f7f7f7f, 0x9999999999999999, 0x1010101010101010,
};
#define COUNT(a) (sizeof(a) / sizeof((a)[0]))

uint64_t rnd_value(struct rng *r)
{
    uint64_t x = rnd(r);
    switch (x & 7) {
    case 0: case 1: return boundary[rnd_below(r, COUNT(boundary))];
    case 2: return (1ull << (x >> 3 & 63)) + (x >> 9 & 3) - 1;
    case 3: return 0ull - (1ull << (x >> 3 & 63)) + (x >> 9 & 3) - 1;
    case 4: return (uint64_t)((int64_t)x >> (x >> 3 & 63));
    case 5: return x >> 3 >> (x >> 58 & 63);
    default: return rnd(r);
    }
}

static const uint64_t doubles[] = {
    0, 1, 2, 0x000fffffffffffff, 0x0010000000000000, 0x0010000000000001, 0x3ff0000000000000, 0x3ff0000000000001,
    0x3fefffffffffffff, 0x4000000000000000, 0x3fe0000000000000, 0x3fdfffffffffffff, 0x3fe0000000000001,
    0x3ff8000000000000, 0x4004000000000000, 0x400c000000000000, 0x41dfffffffc00000, 0x41e0000000000000,
    0x41dfffffffe00000, 0x41efffffffe00000, 0x41f0000000000000, 0x43dfffffffffffff, 0x43e0000000000000,
    0x43efffffffffffff, 0x43f0000000000000, 0x40dfffc000000000, 0x40e0000000000000, 0x40efffe000000000,
    0x7fefffffffffffff, 0x7fe0000000000000, 0x7ff0000000000000, 0x7ff0000000000001, 0x7ff7ffffffffffff,
    0x7ff8000000000000, 0x7fffffffffffffff, 0x7ff8000000000123, 0x7ff4000000000000, 0x47efffffe0000000,
    0x47efffffefffffff, 0x47f0000000000000, 0x36a0000000000000, 0x3690000000000000, 0x3810000000000000,
    0x380fffffffffffff, 0x5fe0000000000000, 0x1ff0000000000000, 0x4340000000000000, 0x4330000000000001,
    0x0008000000000000, 0x7fd0000000000000, 0x3ca0000000000000, 0x3cb0000000000000,
};
static const uint32_t floats[] = {
    0, 1, 2, 0x007fffff, 0x00800000, 0x00800001, 0x3f800000, 0x3f800001, 0x3f7fffff, 0x40000000, 0x3f000000,
    0x3effffff, 0x3f000001, 0x3fc00000, 0x40200000, 0x40600000, 0x4effffff, 0x4f000000, 0x4f000001, 0x4f7fffff,
    0x4f800000, 0x5effffff, 0x5f000000, 0x5f7fffff, 0x5f800000, 0x46fffe00, 0x47000000, 0x477fff00, 0x7f7fffff,
    0x7f000000, 0x7f800000, 0x7f800001, 0x7fbfffff, 0x7fc00000, 0x7fffffff, 0x7fc00123, 0x7fa00000, 0x5f000001,
    0x1f800000, 0x4b000000, 0x4b000001, 0x4b800000, 0x00400000, 0x7e800000, 0x33800000, 0x34000000,
};

uint64_t rnd_double(struct rng *r)
{
    uint64_t x = rnd(r), s = x << 63;
    switch (x >> 1 & 7) {
    case 0: case 1: case 2: return doubles[rnd_below(r, COUNT(doubles))] ^ s;
    case 3: return s | ((1023 - 32 + (x >> 8 & 63)) << 52) | (rnd(r) >> 12 & ~0ull << (x >> 16 & 63) % 52);
    case 4: return s | ((1023 + (x >> 8 & 3)) << 52) | rnd(r) >> 12;
    case 5: { int64_t v = (int64_t)rnd(r) >> (x >> 8 & 63); double d = (double)v; memcpy(&x, &d, 8); return x; }
    case 6: return s | ((x >> 8 & 1 ? (x >> 9 & 63) : 2046 - (x >> 9 & 63)) << 52) | rnd(r) >> 12;
    default: return rnd(r);
    }
}

uint32_t rnd_float(struct rng *r)
{
    uint64_t x = rnd(r);
    uint32_t s = (uint32_t)(x << 31), y = (uint32_t)(x >> 41);
    switch (x >> 1 & 7) {
    case 0: case 1: case 2: return floats[rnd_below(r, COUNT(floats))] ^ s;
    case 3: return s | (uint32_t)((127 - 32 + (x >> 8 & 63)) << 23) | (y & ~0u << (x >> 16 & 31) % 23);
    case 4: return s | (uint32_t)((127 + (x >> 8 & 3)) << 23) | y;
    case 5: { int32_t v = (int32_t)rnd(r) >> (x >> 8 & 31); float f = (float)v; memcpy(&y, &f, 4); return y; }
    case 6: return s | (uint32_t)((x >> 8 & 1 ? (x >> 9 & 31) : 254 - (x >> 9 & 31)) << 23) | y;
    default: return (uint32_t)rnd(r);
    }
}

void rnd_extended(struct rng *r, uint8_t out[10])
{
    static const uint64_t mantissas[] = { 0, 1, 0x4000000000000000, 0x7fffffffffffffff, 0x8000000000000000,
        0x8000000000000001, 0xc000000000000000, 0xc000000000000001, 0xa000000000000000, 0xffffffffffffffff,
        0xbfffffffffffffff, 0xfffffffffffff800, 0xfffffffffffffc00, 0x80000000000003ff, 0x8000000000000400,
        0xffffff8000000000, 0xffffff0000000000, 0x8000008000000000, 0x8000000000000800 };
    static const uint16_t exponents[] = { 0, 1, 2, 0x3fff, 0x4000, 0x3ffe, 0x3ffd, 0x7fff, 0x7ffe, 0x7ffd, 0x401e, 0x401f,
        0x403d, 0x403e, 0x403f, 0x3fc0, 0x3fbf, 0x3c01, 0x3c00, 0x43fe, 0x43ff, 0x3f81, 0x3f80, 0x407e, 0x407f, 0x400e,
        0x400d, 0x3f6a, 0x3bcd, 0x5fff, 0x1fff, 0x4001, 0x4038, 0x4039 };
    uint64_t x = rnd(r), m;
    uint16_t e;
    switch (x & 7) {
    case 0: m = mantissas[rnd_below(r, COUNT(mantissas))]; e = exponents[rnd_below(r, COUNT(exponents))]; break;
    case 1: m = mantissas[rnd_below(r, COUNT(mantissas))] | 1ull << 63; e = exponents[rnd_below(r, COUNT(exponents))]; break;
    case 2: m = rnd(r) | 1ull << 63; e = exponents[rnd_below(r, COUNT(exponents))]; break;
    case 3: m = (rnd(r) | 1ull << 63) & ~0ull << (x >> 8 & 63); e = (uint16_t)(0x3fff + (x >> 16 & 63)); break;
    case 4: m = rnd(r) | 1ull << 63; e = (uint16_t)(0x3fff - 70 + (x >> 16) % 140); break;
    case 5: m = 1ull << 63 | (x >> 20 & 1) << 62; e = (uint16_t)(0x3fff - 2 + (x >> 16 & 7)); break;
    case 6: m = rnd(r) | 1ull << 63; e = (uint16_t)((x >> 32 & 1) ? 0x7ffe - (x >> 16 & 63) : (x >> 16 & 63)); break;
    default: m = rnd(r); e = (uint16_t)(x >> 16) & 0x7fff; break;
    }
    e |= (uint16_t)((x >> 63) << 15);
    memcpy(out, &m, 8);
    memcpy(out + 8, &e, 2);
}

void rnd_vector(struct rng *r, uint8_t out[16])
{
    uint64_t q[2];
    switch (rnd_below(r, 12)) {
    case 0: case 1: case 2: q[0] = rnd_double(r); q[1] = rnd_double(r); break;
    case 3: case 4: case 5:
        q[0] = rnd_float(r) | (uint64_t)rnd_float(r) << 32;
        q[1] = rnd_float(r) | (uint64_t)rnd_float(r) << 32;
        break;
    case 6: q[0] = rnd_value(r); q[1] = rnd_value(r); break;
    case 7:
        for (int i = 0; i < 2; i++) q[i] = (uint32_t)rnd_value(r) | rnd_value(r) << 32;
        break;
    case 8:
        for (int i = 0; i < 8; i++) { uint16_t v = (uint16_t)(rnd_value(r) >> (rnd(r) & 48)); memcpy((uint8_t *)q + 2 * i, &v, 2); }
        break;
    case 9:
        for (int i = 0; i < 16; i++) {
            static const uint8_t b[] = { 0, 1, 0x7f, 0x80, 0xff, 0x81, 0x0f, 0x10, 0xfe };
            ((uint8_t *)q)[i] = rnd_one(r, 2) ? b[rnd_below(r, sizeof b)] : (uint8_t)rnd(r);
        }
        break;
    case 10: q[0] = q[1] = rnd_one(r, 2) ? 0 : ~0ull; break;
    default: q[0] = rnd(r); q[1] = rnd(r); break;
    }
    memcpy(out, q, 16);
}
