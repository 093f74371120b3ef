/*
 * Semantics of BMI1, BMI2, LZCNT, ADX in portable C. size: 4 or 8 (2 too for the counts); operands
 * are zero-extended to 64 bits, results need cutting to size by the caller.
 */
#ifndef KVS_SEM_BMI_H
#define KVS_SEM_BMI_H

#include "../vcpu.h"

static ALWAYS_INLINE uint64_t size_mask(uint32_t size) { return ~0ull >> (64 - 8 * size); }
static ALWAYS_INLINE uint32_t parity_flag(uint64_t r) { return __builtin_parity((uint8_t)r) ? 0 : FLAG_PF; }
static ALWAYS_INLINE uint32_t result_flags(uint64_t r, uint32_t size)
{
    return (r ? 0 : FLAG_ZF) | (r >> (8 * size - 1) & 1 ? FLAG_SF : 0) | parity_flag(r);
}

/* APM 3 "LZCNT", "TZCNT": OF stays, SF, AF and PF are cleared by silicon. */
static ALWAYS_INLINE uint32_t count_flags(uint32_t old, uint64_t v, uint64_t n)
{
    return (old & FLAG_OF) | (v ? 0 : FLAG_CF) | (n ? 0 : FLAG_ZF);
}
static ALWAYS_INLINE uint64_t sem_lzcnt(uint64_t v, uint32_t size)
{
    return v ? (uint32_t)__builtin_clzll(v) - (64 - 8 * size) : 8 * size;
}
static ALWAYS_INLINE uint64_t sem_tzcnt(uint64_t v, uint32_t size) { return v ? (uint32_t)__builtin_ctzll(v) : 8 * size; }

static ALWAYS_INLINE uint64_t sem_andn(uint64_t a, uint64_t b, uint32_t size, uint32_t *fl)
{
    uint64_t r = ~a & b & size_mask(size);
    *fl = result_flags(r, size);
    return r;
}
static ALWAYS_INLINE uint64_t sem_blsr(uint64_t v, uint32_t size, uint32_t *fl)
{
    uint64_t r = (v - 1) & v;
    *fl = result_flags(r, size) | (v ? 0 : FLAG_CF);
    return r;
}
static ALWAYS_INLINE uint64_t sem_blsmsk(uint64_t v, uint32_t size, uint32_t *fl)
{
    uint64_t r = ((v - 1) ^ v) & size_mask(size);
    *fl = result_flags(r, size) | (v ? 0 : FLAG_CF);
    return r;
}
static ALWAYS_INLINE uint64_t sem_blsi(uint64_t v, uint32_t size, uint32_t *fl)
{
    uint64_t r = (0 - v) & v;
    *fl = result_flags(r, size) | (v ? FLAG_CF : 0);
    return r;
}
static ALWAYS_INLINE uint64_t sem_bextr(uint64_t v, uint64_t control, uint32_t size, uint32_t *fl)
{
    uint32_t start = control & 0xff, length = control >> 8 & 0xff;
    uint64_t r = start < 64 ? v >> start : 0;
    if (length < 64) r &= (1ull << length) - 1;
    *fl = (r ? 0 : FLAG_ZF) | FLAG_AF | parity_flag(r);
    (void)size;
    return r;
}
static ALWAYS_INLINE uint64_t sem_bzhi(uint64_t v, uint64_t control, uint32_t size, uint32_t *fl)
{
    uint32_t n = control & 0xff;
    uint64_t r = n < 8 * size ? v & ((1ull << n) - 1) : v;
    *fl = result_flags(r, size) | (n >= 8 * size ? FLAG_CF : 0);
    return r;
}

/* A step for each set bit of the mask. */
static inline uint64_t sem_pext(uint64_t v, uint64_t mask)
{
    uint64_t r = 0;
    for (uint64_t bit = 1; mask; bit += bit, mask &= mask - 1)
        if (v & mask & (0 - mask)) r |= bit;
    return r;
}
static inline uint64_t sem_pdep(uint64_t v, uint64_t mask)
{
    uint64_t r = 0;
    for (; mask; v >>= 1, mask &= mask - 1)
        if (v & 1) r |= mask & (0 - mask);
    return r;
}

#endif
