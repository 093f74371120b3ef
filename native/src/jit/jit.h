/*
 * Tier 1: hot blocks become host code. Same instruction set, so most instructions are re-emitted with
 * other registers; what the translator does not know runs in its tier-0 handler on the same state.
 * A translated block is entered through insn[0].fn like any other block, and leaves by a tail call
 * into a handler, so the two tiers mix freely. Each vCPU has its own code.
 *
 * Host registers: guest registers 0-10 live in host registers (jit_host_of), the others in gpr[]. R15 is
 * the vCPU, R11 the budget, RCX and R12 are scratch. Status flags: see flags.c.
 */
#ifndef KVS_JIT_H
#define KVS_JIT_H

#include "../interp/interp.h"

struct jit;

/* Without executable memory: -KVS_ENOTSUP. */
int jit_create(struct kvs_vcpu *c, uint32_t threshold);
void jit_destroy(struct kvs_vcpu *c);
/* All blocks are gone. */
void jit_flush(struct kvs_vcpu *c);
/* A new block: counts its executions from now on and translates it when it is hot. */
void jit_watch(struct kvs_vcpu *c, struct block *b);
/* Sets the host address of an entry of the jump cache. */
void jit_jump_cache(const struct kvs_vcpu *c, struct jc_entry *e);

#endif
