/* A small, fast, seedable generator and the values that find bugs. */
#ifndef ORACLE_RANDOM_H
#define ORACLE_RANDOM_H

#include <stdint.h>

struct rng { uint64_t s; };

static inline uint64_t rnd(struct rng *r)
{
    r->s += 0x9e3779b97f4a7c15ull;
    unsigned __int128 m = (unsigned __int128)r->s * (r->s ^ 0xd1b54a32d192ed03ull);
    return (uint64_t)(m >> 64) ^ (uint64_t)m;
}
static inline uint32_t rnd_below(struct rng *r, uint32_t n) { return (uint32_t)((rnd(r) >> 32) * n >> 32); }
/* True once in n. */
static inline int rnd_one(struct rng *r, uint32_t n) { return rnd_below(r, n) == 0; }

uint64_t rnd_value(struct rng *r);                 /* boundary or random, of any width */
uint64_t rnd_double(struct rng *r);                /* bits of an interesting double */
uint32_t rnd_float(struct rng *r);                 /* bits of an interesting float */
void rnd_extended(struct rng *r, uint8_t out[10]); /* an 80-bit value, invalid encodings too */
void rnd_vector(struct rng *r, uint8_t out[16]);   /* 16 bytes in one of many element styles */

#endif
