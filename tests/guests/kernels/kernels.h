/* Ten compute kernels: freestanding C that runs the same natively and in a guest. */
#ifndef KERNELS_H
#define KERNELS_H

#include <stdint.h>

enum {
    ARENA_SIZE = 96 << 20, /* memory that the kernels work in */
};

struct kernel {
    const char *name;
    uint64_t (*run)(uint64_t rounds, uint8_t *arena);
    uint64_t rounds;
};

enum { KERNEL_COUNT = 10 };
extern const struct kernel kernels[KERNEL_COUNT];

/* Fills the arena; the kernels expect it to have been called once. */
void kernels_prepare(uint8_t *arena);

#endif
