/* Loops that run whole on either side. */
#ifndef ORACLE_EXHAUST_H
#define ORACLE_EXHAUST_H

#include "oracle.h"

/* Memory that loops read and write, at this address on both sides. */
#define BLOCK 0x40000000ull
#define BLOCK_SIZE 0x180000u
#define DIVIDE_MARK 0xd1d1d1d1u /* in EAX: #DE, and on behind the instruction */

uint8_t *core_block(void);
/* Runs case 0, a loop, to its end. */
void core_run_loop(struct batch *b);

/* Returns the number of differences. */
uint64_t exhaust(struct batch *b, bool full, const char *only);

#endif
