/* The part of segment.c that raises nothing. */
#ifndef KVS_SEGMENT_H
#define KVS_SEGMENT_H

#include "mmu.h"

/* As seg_to_linear, but returns the vector of the fault (error code 0) instead of raising it, and
 * leaves #AC alone. *room: bytes of the segment from off on. size >= 1. */
uint8_t seg_check(struct kvs_vcpu *c, uint32_t seg, uint64_t off, uint32_t size, int access, uint64_t *la, uint64_t *room);

/* SDM 3A "Interrupt 17-Alignment Check Exception" */
static inline bool alignment_checked(const struct kvs_vcpu *c)
{
    return (c->eflags & FLAG_AC) && (c->cr0 & CR0_AM) && c->cpl == 3;
}

#endif
