/* What the fuzzers share: options, and a generator that makes each epoch reproducible by itself. */
#ifndef KVS_FUZZ_H
#define KVS_FUZZ_H

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "../include/kvmsharp.h"
#include "../tests/oracle/encode.h"

struct fuzz_options { uint64_t cases, seed, first_epoch; double seconds; };

/* --cases N, --seconds S (whichever is first), --seed N, --epoch N: begin there. */
static inline struct fuzz_options fuzz_parse(int argc, char **argv)
{
    struct fuzz_options o = { UINT64_MAX, 1, 0, 10 };
    for (int i = 1; i + 1 < argc; i += 2) {
        if (!strcmp(argv[i], "--cases")) { o.cases = strtoull(argv[i + 1], NULL, 0); o.seconds = 1e9; }
        else if (!strcmp(argv[i], "--seconds")) o.seconds = strtod(argv[i + 1], NULL);
        else if (!strcmp(argv[i], "--seed")) o.seed = strtoull(argv[i + 1], NULL, 0);
        else if (!strcmp(argv[i], "--epoch")) o.first_epoch = strtoull(argv[i + 1], NULL, 0);
    }
    return o;
}

/* The epoch that runs; tells where a failed check was. */
static unsigned long long fuzz_epoch;

static inline double fuzz_now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

/*
 * Runs epochs of so many cases until the options say stop; each epoch starts from nothing, so that
 * --seed and --epoch reproduce a report. On a crash the last line of /dev/stderr's tail is the epoch.
 */
static inline int fuzz_main(int argc, char **argv, const char *name, uint64_t epoch_cases,
                            void (*epoch)(struct rng *r, uint64_t cases))
{
    struct fuzz_options o = fuzz_parse(argc, argv);
    double start = fuzz_now(), told = start;
    uint64_t done = 0, number = o.first_epoch;
    for (; done < o.cases && fuzz_now() - start < o.seconds; number++) {
        struct rng r = { o.seed * 0x9e3779b97f4a7c15ull + number * 0xd1b54a32d192ed03ull };
        uint64_t n = o.cases - done < epoch_cases ? o.cases - done : epoch_cases;
        rnd(&r);
        fuzz_epoch = number;
        if (fuzz_now() - told > 20) {
            fprintf(stderr, "%s: seed %llu epoch %llu, %llu cases\n", name, (unsigned long long)o.seed, (unsigned long long)number,
                    (unsigned long long)done);
            told = fuzz_now();
        }
        epoch(&r, n);
        done += n;
    }
    double took = fuzz_now() - start;
    printf("%s: %llu cases, %.0f/s, seed %llu, epochs %llu-%llu\n", name, (unsigned long long)done, (double)done / took,
           (unsigned long long)o.seed, (unsigned long long)o.first_epoch, (unsigned long long)(number - 1));
    printf("1 passed, 0 failed\n");
    return 0;
}

/* Something that must hold whatever the guest does. */
#define FUZZ_CHECK(condition)                                                             \
    do {                                                                                  \
        if (!(condition)) {                                                               \
            fprintf(stderr, "%s:%d: epoch %llu: does not hold: %s\n", __FILE__, __LINE__, fuzz_epoch, #condition); \
            abort();                                                                      \
        }                                                                                 \
    } while (0)

static inline void machine_check(struct rng *r, struct kvs_vcpu *c)
{
    struct kvs_x86_mce m = { .status = rnd(r) | (rnd_one(r, 4) ? 0 : 1ull << 63), .addr = rnd(r), .misc = rnd(r), .mcg_status = rnd(r) & 7,
                             .bank = (uint8_t)rnd_below(r, 12) };
    int32_t rc = kvs_vcpu_set_mce(c, &m);
    FUZZ_CHECK(rc == 0 || rc == -KVS_EINVAL);
}

#endif
