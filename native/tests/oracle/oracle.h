/*
 * The instruction oracle: runs one instruction on the host CPU, in a child process, and in the core,
 * from the same state, and compares everything that it leaves behind.
 *
 * Both sides see the same small address space below 4 GiB (so that 32-bit code sees it too):
 * code slots, and one data arena of three pages - two writable, one read-only, nothing around them -
 * that appears at three addresses: LOW for 16-bit addressing, MID, and HIGH for 64-bit addressing.
 */
#ifndef ORACLE_H
#define ORACLE_H

#include "encode.h"

#define STUB 0x10000000ull      /* host: way back to the runner; core: not mapped */
#define CODE 0x20000000ull
#define SLOT_SIZE 512u
#define SLOT_IP 256u            /* offset of the instruction in its slot; the rest is INT3 */
#define CODE_MAX 96u            /* bytes of a case */
#define BATCH 256u
#define CODE_SIZE (BATCH * SLOT_SIZE)
#define LOW 0x8000ull
#define MID 0x30008000ull /* low 16 bits as LOW */
#define HIGH 0x234567890000ull
#define ARENA_RW 0x2000u        /* two writable pages, then a read-only one */
#define ARENA_SIZE 0x3000u
#define FS_BASE 0x07654320ull   /* nothing is mapped near these */
#define GS_BASE 0x12345678ull

/* The parts of the arena that cases use: around the page boundary, and at the end of the writable part. */
#define WINDOW0 (0x1000u - 512u)
#define WINDOW0_SIZE 1024u
#define WINDOW1 (0x2000u - 128u)
#define WINDOW1_SIZE 128u
#define ENV_AT (MID + WINDOW1)
#define WINDOW_SIZE (WINDOW0_SIZE + WINDOW1_SIZE)

#define NO_VECTOR 0xffu
#define FX_YMM 576u /* upper halves of YMM0-15 */
#define FX_SIZE 832u

struct cpu_state {
    uint64_t gpr[16], rip, rflags;
    uint64_t cr2;
    uint32_t vector, error; /* of the exception, or NO_VECTOR */
    uint8_t fx[FX_SIZE] __attribute__((aligned(64))); /* XSAVE64 area: x87, SSE, AVX */
    uint8_t mem[WINDOW_SIZE];
    uint16_t selector[SEG_COUNT]; /* before: FS and GS always as in flat code */
    uint64_t fs_base, gs_base;
};

struct test_case {
    struct cpu_state in, host, core;
    uint8_t bytes[CODE_MAX];
    uint8_t length, bits;
    bool segments;       /* segment registers may change: compare them */
    bool ldt;            /* runs in segments of the local descriptor table */
    bool sequence;       /* several instructions; row is ROW_none then */
    uint8_t host_done; /* 0: the child died here */
    bool uses_x87, uses_sse;
    uint32_t row;
    struct decoded d;
    uint64_t target; /* linear address of the memory operand */
    uint64_t cs_base;
    uint8_t skip;        /* loops: length of an instruction that may raise #DE; see exhaust.h */
    bool step;           /* one instruction, whatever it is; see decode.c */
    /* what may differ */
    uint32_t flags_ignored;
    uint32_t gpr_ignored; /* bit per register */
    bool env; /* FNSTENV to the last window behind an x87 instruction: what it has left in FIP, FDP and FOP */
};

struct batch { uint32_t count; struct test_case c[BATCH]; };

/* ---- ldt.c ---- */
enum { LDT_CODE16_LOW, LDT_CODE16_HIGH, LDT_CODE32_LOW, LDT_CODE32_HIGH, LDT_CODE16_SEALED, LDT_CODE16_HIGH_SEALED, LDT_DATA16, LDT_DATA32, LDT_DATA_SHORT,
       LDT_DATA_DOWN16, LDT_DATA_DOWN32, LDT_DATA_SEALED, LDT_DATA_PAGES, LDT_COUNT };
enum { LDT_DATA, LDT_DOWN, LDT_CODE }; /* Linux makes no conforming segments */
/* sealed: data that cannot be written, code that cannot be read; big: D/B; pages: G. */
struct ldt_row { uint32_t base, limit; uint8_t kind; bool big, sealed, pages; };
extern const struct ldt_row ldt_rows[LDT_COUNT];
#define LDT_SELECTOR(n) ((uint16_t)((n) << 3 | 7))
uint64_t ldt_descriptor(uint32_t n);
uint64_t selector_base(uint16_t selector); /* 0 for all but those of the table */
/* Sets ldt, cs_base, in.selector and in.rip. */
void pick_segments(struct rng *r, struct test_case *t, uint32_t slot);
bool stack_is_16(const struct test_case *t);

/* ---- generate.c ---- */
struct combo { uint32_t row, bits, width; bool memory; };
/* False: the row cannot be run that way. */
bool generate_case(struct rng *r, const struct combo *k, uint32_t slot, struct test_case *t);
/* Some instructions one behind the other, with conditional jumps over one of them. */
bool generate_sequence(struct rng *r, uint32_t bits, uint32_t slot, struct test_case *t);
/* NULL, or why the row is not for the oracle. */
const char *row_excluded(uint32_t row);
const char *combo_excluded(const struct combo *k);
/* Flags and registers that the manuals leave undefined for this very case. */
void case_undefined(struct test_case *t);

/* ---- host.c ---- */
bool host_start(const char **error);
void host_begin(struct batch *b); /* returns at once; the batch lies in memory from shared_alloc */
void host_end(struct batch *b);
void host_stop(void);
bool host_has_low(void);
/* The silicon whose undefined results the core gives: AMD family 1Ah, Zen 5. On others they are masked. */
bool host_is_recorded(void);
uint64_t host_components(void); /* of XSAVE, that the oracle looks at */
void *shared_alloc(size_t size);

/* ---- core.c ---- */
bool core_start(const char **error);
void core_run(struct batch *b);
void core_stop(void);

/* ---- decode.c ---- */
/* Random byte strings: which of them are instructions, and of what length. Returns the number of differences. */
uint64_t decode_strings(struct batch *b, uint64_t cases, uint64_t seed, uint64_t keep);

/* ---- compare.c ---- */
/* Empty string: equal. */
bool compare_case(const struct test_case *t, char *why, size_t size);
void print_case(const struct test_case *t, const char *why);
/* Ran into a fault, or saved an image of which some bytes may differ: memory is to be made the same again. */
bool case_soils_memory(const struct test_case *t, const struct cpu_state *after);

static inline uint64_t case_ip(uint32_t slot) { return CODE + slot * SLOT_SIZE + SLOT_IP; }
/* Met the INT3s that fill the case's slot, not those of the case. */
static inline bool landed(const struct test_case *t, const struct cpu_state *o)
{
    uint64_t at = o->rip - 1 + selector_base(o->selector[SEG_CS]) - (t->in.rip + t->cs_base);
    return o->vector == EXC_BP && at + SLOT_IP < SLOT_SIZE && at >= t->length;
}
static inline void window_load(uint8_t *arena, const uint8_t *mem)
{
    memcpy(arena + WINDOW0, mem, WINDOW0_SIZE);
    memcpy(arena + WINDOW1, mem + WINDOW0_SIZE, WINDOW1_SIZE);
}
static inline void window_save(const uint8_t *arena, uint8_t *mem)
{
    memcpy(mem, arena + WINDOW0, WINDOW0_SIZE);
    memcpy(mem + WINDOW0_SIZE, arena + WINDOW1, WINDOW1_SIZE);
}
/* What the arena holds outside the windows, and all of its read-only page. */
static inline void arena_fill(uint8_t *arena)
{
    for (uint32_t i = 0; i < ARENA_SIZE; i++) arena[i] = (uint8_t)(i * 37 + (i >> 8));
}

#endif
