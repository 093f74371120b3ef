/*
 * Runs the kernels in a guest. Each run is framed by writes to two ports that the host watches,
 * the number of the kernel to START_PORT and, behind the run, its result to RESULT_PORT in two
 * halves; the host takes time and retired instructions at those points. Ends by debug exit.
 */
#include "kernels.h"

enum { START_PORT = 0x700, RESULT_PORT = 0x704, EXIT_PORT = 0xf4 };
enum { ARENA = 0x8000000, REPETITIONS = 12 };

static void out32(uint16_t port, uint32_t value)
{
    __asm__ volatile("outl %0, %1" : : "a"(value), "Nd"(port) : "memory");
}

void guest_main(void)
{
    uint8_t *arena = (uint8_t *)(uintptr_t)ARENA;
    kernels_prepare(arena);
    for (uint32_t i = 0; i < KERNEL_COUNT; i++) {
        for (int r = 0; r < REPETITIONS; r++) {
            out32(START_PORT, i);
            uint64_t result = kernels[i].run(kernels[i].rounds, arena);
            out32(RESULT_PORT, (uint32_t)result);
            out32(RESULT_PORT, (uint32_t)(result >> 32));
        }
    }
    out32(EXIT_PORT, 0);
}
