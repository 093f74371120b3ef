/*
 * The compute kernels of the benchmark. Each stresses one thing: register arithmetic, streaming
 * loads, byte scanning with branches, copying, dependent loads, calls, a switch interpreter, SSE2
 * floating point, sorting, and read-modify-write. Every result depends on all the work done.
 */
#include "kernels.h"

#define KEEP(value) __asm__ volatile("" : "+r"(value) : : "memory")

/* Where the kernels keep their data, in bytes from the start of the arena. */
enum {
    INPUT = 0,               /* 1 MiB of pseudo-random bytes */
    OUTPUT = 0x240000,       /* not a multiple of a power of two away from INPUT */
    MATRICES = 0x400000,
    COUNTERS = 0x500000,
    NUMBERS = 0x600000,
    REGISTERS = 0x700000,
    ORDER = 0x800000,        /* 4 MiB: a permutation */
    RING = 0x1000000,        /* 64 MiB: one cache line per element */
};

enum {
    INPUT_BYTES = 1 << 20,
    INPUT_WORDS = INPUT_BYTES / 8,
    RING_LINES = 1 << 20,
    LINE = 64,
};

static uint64_t next_random(uint64_t *state)
{
    uint64_t x = *state;
    x ^= x >> 12;
    x ^= x << 25;
    x ^= x >> 27;
    *state = x;
    return x * 0x2545f4914f6cdd1dull;
}

void kernels_prepare(uint8_t *arena)
{
    uint64_t seed = 0x853c49e6748fea9bull;
    uint64_t *input = (uint64_t *)(arena + INPUT);
    for (int i = 0; i < INPUT_WORDS; i++)
        input[i] = next_random(&seed);

    /* A single cycle through all lines (Sattolo's shuffle), so that no prefetcher can follow. */
    uint32_t *order = (uint32_t *)(arena + ORDER);
    for (uint32_t i = 0; i < RING_LINES; i++)
        order[i] = i;
    for (uint32_t i = RING_LINES - 1; i > 0; i--) {
        uint32_t j = (uint32_t)(next_random(&seed) % i);
        uint32_t other = order[j];
        order[j] = order[i];
        order[i] = other;
    }
    uint8_t *ring = arena + RING;
    for (uint32_t i = 0; i < RING_LINES; i++)
        *(uint64_t *)(ring + (uint64_t)i * LINE) = (uint64_t)order[i] * LINE;
}

static uint64_t run_alu(uint64_t rounds, uint8_t *arena)
{
    (void)arena;
    uint64_t a = 0x0123456789abcdefull, b = 0x9e3779b97f4a7c15ull, c = 1, d = 0;
    for (uint64_t i = 0; i < rounds; i++) {
        a ^= a << 7;
        a ^= a >> 9;
        b = b * 0xd1342543de82ef95ull + a;
        c = ((c + b) << 11 | (c + b) >> 53) ^ i;
        if (c & 0x20)
            d += a >> 3;
        else
            d ^= b;
        uint32_t low = (uint32_t)d - (uint32_t)c;
        c += d < b;
        d -= (low >> 4) & ((int32_t)low < 0 ? 0xffu : 0x3u);
    }
    return a ^ b ^ c ^ d;
}

static uint64_t run_sum(uint64_t rounds, uint8_t *arena)
{
    const uint64_t *input = (const uint64_t *)(arena + INPUT);
    uint64_t total = 0;
    for (uint64_t round = 0; round < rounds; round++) {
        for (int i = 0; i < INPUT_WORDS; i++)
            total += input[i];
        KEEP(total);
    }
    return total;
}

static uint64_t run_scan(uint64_t rounds, uint8_t *arena)
{
    uint64_t result = 0;
    for (uint64_t round = 0; round < rounds; round++) {
        const uint8_t *end = arena + INPUT + INPUT_BYTES;
        for (const uint8_t *at = arena + INPUT; at != end; at++) {
            if (*at == '\n')
                result += 5;
            else if (*at >= 0xfc)
                result ^= round + 1;
        }
        KEEP(result);
    }
    return result;
}

static uint64_t run_copy(uint64_t rounds, uint8_t *arena)
{
    const uint64_t *from = (const uint64_t *)(arena + INPUT);
    uint64_t *to = (uint64_t *)(arena + OUTPUT);
    uint64_t keep = 0;
    for (uint64_t round = 0; round < rounds; round++) {
        for (int i = 0; i < INPUT_WORDS; i++)
            to[i] = from[i];
        KEEP(keep);
    }
    return keep + to[INPUT_WORDS / 2];
}

static uint64_t run_chase(uint64_t rounds, uint8_t *arena)
{
    const uint8_t *ring = arena + RING;
    uint64_t position = 0;
    for (uint64_t i = 0; i < rounds; i++)
        position = *(const uint64_t *)(ring + position);
    return position;
}

/* -O1 keeps this a plain recursion; -O2 turns most of the calls into loops. */
__attribute__((noinline, noclone, optimize("O1"))) static uint64_t fibonacci(uint64_t n)
{
    return n < 2 ? n : fibonacci(n - 1) + fibonacci(n - 2);
}

static uint64_t run_fib(uint64_t rounds, uint8_t *arena)
{
    (void)arena;
    return fibonacci(rounds);
}

enum opcode { SET, COPY, PLUS, MINUS, MIX, TIMES, SHIFT, LOAD, STORE, LOOP, END };

struct instruction {
    uint8_t opcode, to, from, number;
};

static uint64_t run_vm(uint64_t rounds, uint8_t *arena)
{
    static const struct instruction program[] = {
        {SET, 0, 0, 9}, {SET, 1, 0, 4}, {SET, 2, 0, 77},
        /* 3: */ {PLUS, 0, 1, 0}, {TIMES, 0, 2, 0}, {MIX, 1, 0, 0}, {SHIFT, 3, 0, 7},
        {LOAD, 4, 3, 0}, {PLUS, 4, 1, 0}, {STORE, 4, 3, 0}, {COPY, 5, 4, 0},
        {MINUS, 1, 5, 0}, {LOOP, 7, 0, 3}, {END, 0, 0, 0},
    };
    uint64_t *memory = (uint64_t *)(arena + REGISTERS);
    uint64_t r[8] = {0};
    r[7] = rounds;
    for (int i = 0; i < 2048; i++)
        memory[i] = (uint64_t)i;
    for (uint32_t pc = 0;;) {
        const struct instruction *in = &program[pc++];
        switch (in->opcode) {
        case SET: r[in->to] = in->number; break;
        case COPY: r[in->to] = r[in->from]; break;
        case PLUS: r[in->to] += r[in->from]; break;
        case MINUS: r[in->to] -= r[in->from]; break;
        case MIX: r[in->to] ^= r[in->from]; break;
        case TIMES: r[in->to] *= r[in->from]; break;
        case SHIFT: r[in->to] = r[in->from] >> in->number; break;
        case LOAD: r[in->to] = memory[r[in->from] & 2047]; break;
        case STORE: memory[r[in->from] & 2047] = r[in->to]; break;
        case LOOP:
            if (--r[in->to] != 0)
                pc = in->number;
            break;
        default: return r[0] ^ r[1];
        }
    }
}

enum { SIDE = 96 };
typedef double pair __attribute__((vector_size(16)));

static uint64_t run_mat(uint64_t rounds, uint8_t *arena)
{
    double *a = (double *)(arena + MATRICES), *b = a + SIDE * SIDE;
    pair *product = (pair *)(b + SIDE * SIDE);
    for (int i = 0; i < SIDE * SIDE; i++) {
        a[i] = 0.5 * i - 100;
        b[i] = 7.25 - 0.0625 * i;
    }
    for (uint64_t round = 0; round < rounds; round++) {
        for (int row = 0; row < SIDE; row++) {
            pair *out = product + row * SIDE / 2;
            for (int j = 0; j < SIDE / 2; j++)
                out[j] = (pair){0, 0};
            for (int k = 0; k < SIDE; k++) {
                pair factor = {a[row * SIDE + k], a[row * SIDE + k]};
                const pair *in = (const pair *)(b + k * SIDE);
                for (int j = 0; j < SIDE / 2; j++)
                    out[j] += factor * in[j];
            }
        }
        a[round % SIDE] += 1;
    }
    double total = 0;
    for (int i = 0; i < SIDE * SIDE / 2; i++)
        total += product[i][0] - product[i][1];
    return (uint64_t)(int64_t)total;
}

enum { NUMBER_COUNT = 30000 };

__attribute__((noinline, noclone)) static void sort(uint32_t *first, uint32_t *last)
{
    while (last - first > 16) {
        uint32_t pivot = first[(last - first) / 2];
        uint32_t *low = first, *high = last;
        while (low <= high) {
            while (*low < pivot)
                low++;
            while (*high > pivot)
                high--;
            if (low <= high) {
                uint32_t value = *low;
                *low++ = *high;
                *high-- = value;
            }
        }
        if (high - first < last - low) {
            sort(first, high);
            first = low;
        } else {
            sort(low, last);
            last = high;
        }
    }
    for (uint32_t *next = first + 1; next <= last; next++) {
        uint32_t value = *next;
        uint32_t *hole = next;
        for (; hole > first && hole[-1] > value; hole--)
            *hole = hole[-1];
        *hole = value;
    }
}

static uint64_t run_qsort(uint64_t rounds, uint8_t *arena)
{
    uint32_t *numbers = (uint32_t *)(arena + NUMBERS);
    uint64_t result = 0;
    for (uint64_t round = 0; round < rounds; round++) {
        uint32_t value = 0x1234567 + (uint32_t)round;
        for (int i = 0; i < NUMBER_COUNT; i++) {
            value = value * 22695477 + 1;
            numbers[i] = value;
        }
        sort(numbers, numbers + NUMBER_COUNT - 1);
        result = result * 31 + numbers[NUMBER_COUNT / 3];
    }
    return result;
}

static uint64_t run_hist(uint64_t rounds, uint8_t *arena)
{
    uint32_t *counters = (uint32_t *)(arena + COUNTERS);
    for (int i = 0; i < 256; i++)
        counters[i] = 0;
    for (uint64_t round = 0; round < rounds; round++)
        for (int i = 0; i < INPUT_BYTES / 4; i++)
            counters[arena[INPUT + i]]++;
    return counters[17] * 65537ull + counters[200];
}

const struct kernel kernels[KERNEL_COUNT] = {
    {"alu", run_alu, 2000000}, {"sum", run_sum, 40},    {"scan", run_scan, 10},
    {"copy", run_copy, 30},    {"chase", run_chase, 300000}, {"fib", run_fib, 25},
    {"vm", run_vm, 100000},    {"mat", run_mat, 2},     {"qsort", run_qsort, 4},
    {"hist", run_hist, 10},
};
