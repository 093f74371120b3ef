/* Memory operands in translated pieces; between access.c and span.c. */
#ifndef KVS_ACCESS_H
#define KVS_ACCESS_H

#include "../irqchip/irqchip.h"
#include "../sys/sys.h"

/* Translates [la, la + size), size <= 4096, into one or two pieces, with every check. ST_OK or ST_FAULT. */
int access_translate(struct kvs_vcpu *c, uint64_t la, uint32_t size, int access, int how, struct mem_part part[2], uint32_t *count);
/* ST_OK, or ST_EXIT when the host must answer. */
int access_load(struct kvs_vcpu *c, const struct mem_part *part, uint32_t count, void *data);
/* Cannot fail. Returns which pieces hit decoded code: to be given to access_code_check. */
uint32_t access_store(struct kvs_vcpu *c, const struct mem_part *part, uint32_t count, const void *data);
void access_code_check(struct kvs_vcpu *c, const struct mem_part *part, uint32_t count, uint32_t code);

#endif
