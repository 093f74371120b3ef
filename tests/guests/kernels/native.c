/* Runs the kernels on the host: "name result best-ns" per line. */
#include "kernels.h"

#include <stdio.h>
#include <stdlib.h>
#include <time.h>

static uint64_t now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

int main(int argc, char **argv)
{
    int repetitions = argc > 1 ? atoi(argv[1]) : 8;
    uint8_t *arena = aligned_alloc(4096, ARENA_SIZE);
    if (!arena)
        return 1;
    for (size_t i = 0; i < ARENA_SIZE; i += 4096)
        arena[i] = 0;
    kernels_prepare(arena);
    for (int i = 0; i < KERNEL_COUNT; i++) {
        uint64_t best = UINT64_MAX, result = 0;
        for (int r = 0; r < repetitions; r++) {
            uint64_t start = now();
            result = kernels[i].run(kernels[i].rounds, arena);
            uint64_t time = now() - start;
            if (time < best)
                best = time;
        }
        printf("%s %llu %llu\n", kernels[i].name, (unsigned long long)result, (unsigned long long)best);
    }
    free(arena);
    return 0;
}
