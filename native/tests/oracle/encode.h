/* Makes machine code from rows of the instruction table. */
#ifndef ORACLE_ENCODE_H
#define ORACLE_ENCODE_H

#include "../../src/isa/isa.h"
#include "random.h"

struct row_form {
    const char *id;      /* as in the table: "add M1 ANY 0x00 A" */
    uint16_t op;
    uint8_t map;         /* escape bytes of the opcode */
    uint8_t pp, opcode;
    uint8_t ext;         /* ModRM.reg, or 0xff */
    uint8_t fixed_modrm; /* with is_fixed: the whole ModRM byte */
    bool is_fixed;
    uint8_t modkind;     /* A, M or R */
    uint8_t k[OPERANDS];
    uint32_t attr;
    bool vex;
    uint8_t vexw;        /* WI, W0, W1 */
};
extern const struct row_form row_forms[ROW_COUNT];

struct encode_request {
    uint32_t row, bits;   /* bits: 16, 32 or 64 */
    uint32_t width;       /* 8 (none), 16, 32 or 64: the operand size to encode; AVX: 8 or 16 for VEX.L = 0 or 1 */
    bool memory;          /* the memory form, where there is a choice */
    bool plain;           /* no redundant or overriding prefixes */
    bool lock, rep;       /* rep: let string instructions repeat */
    bool wild;            /* any displacement; else absolute addresses lie at `target` */
    uint64_t ip, target;  /* address of the instruction; where absolute operands point */
};

bool row_has_modrm(const struct row_form *f);
bool row_has_register_form(const struct row_form *f);
bool row_has_memory_form(const struct row_form *f);
/* Operand sizes that make a difference: bit 0: 8 (none), 1: 16, 2: 32, 3: 64. */
uint32_t row_widths(const struct row_form *f, uint32_t bits);
/* Returns the length, at most 15. */
uint32_t encode_row(struct rng *r, const struct encode_request *q, uint8_t out[16]);

#endif
