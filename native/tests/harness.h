/* What every native test program needs: checks that count, and a small fast generator. */
#ifndef KVS_HARNESS_H
#define KVS_HARNESS_H

#include <inttypes.h>
#include <stdio.h>

static unsigned checks_passed, checks_failed;

#define CHECK(cond, ...)                                                                          \
    do {                                                                                          \
        if (cond) checks_passed++;                                                                \
        else if (++checks_failed <= 40) {                                                         \
            printf("%s:%d: %s: ", __FILE__, __LINE__, #cond);                                     \
            printf(" " __VA_ARGS__);                                                               \
            printf("\n");                                                                         \
        }                                                                                         \
    } while (0)

#define CHECK_EQ(a, b)                                                                            \
    do {                                                                                          \
        unsigned long long a_ = (unsigned long long)(a), b_ = (unsigned long long)(b);            \
        CHECK(a_ == b_, "%s = 0x%llx, %s = 0x%llx", #a, a_, #b, b_);                              \
    } while (0)

static inline int checks_report(void)
{
    printf("%u passed, %u failed\n", checks_passed, checks_failed);
    return checks_failed != 0;
}

/* xorshift64*: the same sequence on every host. */
static inline uint64_t random_next(uint64_t *state)
{
    uint64_t x = *state;
    x ^= x >> 12;
    x ^= x << 25;
    x ^= x >> 27;
    *state = x;
    return x * 0x2545f4914f6cdd1dull;
}

#endif
