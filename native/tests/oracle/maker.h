/* Inside the generator. */
#ifndef ORACLE_MAKER_H
#define ORACLE_MAKER_H

#include "oracle.h"

struct maker {
    struct rng *r;
    struct test_case *t;
    uint32_t slot;
    uint32_t pinned; /* registers that make up addresses */
    uint64_t target; /* of the memory operand, linear */
};

bool host_has_row(uint32_t row);
bool has_mnemonic(uint32_t row, const char *const *list);
/* Sets the low `size` bytes of a register. */
void set_low(uint64_t *reg, uint64_t v, uint32_t size);
/* The window byte at linear address la, or NULL. */
uint8_t *mem_at(struct maker *m, uint64_t la, uint32_t size);
/* Readable, but not bytes that a case chooses. */
bool foreign(struct maker *m, uint64_t la, uint32_t size);
void set_stack(struct maker *m);
/* Linear address of the top of the stack; and a stack that no access reaches. */
uint64_t stack_at(const struct maker *m);
void no_stack(struct maker *m);
/* A place to go, in a code segment with this base, that both sides can tell from others. */
uint64_t pick_landing(struct maker *m, uint32_t osize, uint64_t base);

/* ---- system.c: segments, far transfers, instructions that fault at CPL 3 ---- */
bool row_is_system(uint32_t row);
/* False: try another encoding. */
bool system_role(struct maker *m);

#endif
