/* Small things that every file of the core uses. */
#ifndef KVS_UTIL_H
#define KVS_UTIL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define LIKELY(x) __builtin_expect(!!(x), 1)
#define UNLIKELY(x) __builtin_expect(!!(x), 0)
#define NOINLINE __attribute__((noinline))
#define ALWAYS_INLINE __attribute__((always_inline)) inline
#define ARRAY_SIZE(a) (sizeof(a) / sizeof((a)[0]))

#define PAGE_SHIFT 12
#define PAGE_SIZE 4096u
#define PAGE_MASK 4095u

#define BIT(n) (1ull << (n))

/* Sized loads and stores that tolerate any alignment; aligned ones are single host accesses. */
#define KVS_DEFINE_LDST(bits)                                                                     \
    static inline uint##bits##_t ld##bits(const void *p)                                          \
    {                                                                                             \
        uint##bits##_t v;                                                                         \
        memcpy(&v, p, sizeof v);                                                                  \
        return v;                                                                                 \
    }                                                                                             \
    static inline void st##bits(void *p, uint##bits##_t v) { memcpy(p, &v, sizeof v); }
KVS_DEFINE_LDST(8)
KVS_DEFINE_LDST(16)
KVS_DEFINE_LDST(32)
KVS_DEFINE_LDST(64)
#undef KVS_DEFINE_LDST

static inline uint64_t min_u64(uint64_t a, uint64_t b) { return a < b ? a : b; }
static inline uint64_t max_u64(uint64_t a, uint64_t b) { return a > b ? a : b; }

#endif
