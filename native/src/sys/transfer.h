/* Stacks, descriptors and control transfers, as exception.c, far.c and task.c share them. */
#ifndef KVS_TRANSFER_H
#define KVS_TRANSFER_H

#include "sys.h"

#define DR6_FIXED 0xffff0ff0ull
#define DR6_WRITABLE 0xe00full
#define DR7_FIXED 0x400ull
#define DR7_WRITABLE 0xffff23ffull
#define DR6_BD BIT(13)
#define DR6_BS BIT(14)
#define DR6_BT BIT(15)

/* System descriptor types. SDM 3A "System Descriptor Types" */
enum { SYS_TSS16 = 1, SYS_LDT = 2, SYS_TSS16_BUSY = 3, SYS_CALL16 = 4, SYS_TASK_GATE = 5, SYS_INT16 = 6,
       SYS_TRAP16 = 7, SYS_TSS32 = 9, SYS_TSS32_BUSY = 11, SYS_CALL32 = 12, SYS_INT32 = 14, SYS_TRAP32 = 15 };

static inline uint32_t attr_dpl(uint32_t attr) { return (attr & ATTR_DPL) >> ATTR_DPL_SHIFT; }
static inline bool attr_is_code(uint32_t attr) { return (attr & (ATTR_S | ATTR_CODE)) == (ATTR_S | ATTR_CODE); }
static inline bool attr_is_conforming(uint32_t attr) { return attr & ATTR_EC; }
static inline bool attr_is_writable_data(uint32_t attr)
{
    return (attr & (ATTR_S | ATTR_CODE | ATTR_W)) == (ATTR_S | ATTR_W);
}
static inline bool sel_is_null(uint16_t sel) { return (sel & 0xfffc) == 0; }
static inline uint32_t sel_error(uint16_t sel) { return sel & 0xfffcu; }

/* ---- segment.c ---- */
/* Second half of a 16-byte system descriptor: upper base; 0, ST_FAULT, ST_EXIT or -1. */
int descriptor_read_high(struct kvs_vcpu *c, uint16_t sel, struct descriptor *d, uint32_t *reserved);
int descriptor_set_accessed(struct kvs_vcpu *c, struct descriptor *d);
/* Rewrites the type byte (TSS busy bit). */
int descriptor_set_type(struct kvs_vcpu *c, struct descriptor *d, uint32_t type);
void segment_set(struct segment *s, const struct descriptor *d, uint16_t sel);
void segment_set_null(struct segment *s, uint16_t sel, uint32_t dpl);
void segment_set_flat(struct segment *s, uint16_t sel, uint32_t attr);
void segment_set_v86(struct segment *s, uint16_t sel);
void segment_set_real(struct segment *s, uint16_t sel);

/* ---- far.c: a stack that is not yet, or not only, SS:RSP ---- */
struct stack {
    uint64_t base, rsp, mask;
    uint32_t limit, attr;
    int how;         /* LA_... */
    uint32_t error;  /* of #SS */
    bool flat;       /* 64-bit: canonical check only */
};
void stack_current(const struct kvs_vcpu *c, struct stack *s);
/* A new stack in the segment d for code at the given CPL. */
void stack_new(const struct kvs_vcpu *c, struct stack *s, const struct descriptor *d, uint64_t rsp, uint32_t cpl);
/* Pushes n items, v[0] first; memory is written only when all of it can be. */
int stack_push(struct kvs_vcpu *c, struct stack *s, const uint64_t *v, uint32_t n, uint32_t size);
void stack_commit(struct kvs_vcpu *c, const struct stack *s);
/* Item at RSP + offset of the current stack. */
int stack_peek(struct kvs_vcpu *c, uint64_t offset, uint64_t *v, uint32_t size);
/* RSP += delta in the given stack width. */
void stack_adjust(struct kvs_vcpu *c, uint64_t delta, uint32_t width);

/* All: c->rip is the next RIP on entry and the new one on success. 0, ST_FAULT or ST_EXIT. */
int far_jump(struct kvs_vcpu *c, uint16_t sel, uint64_t off, uint32_t size);
int far_call(struct kvs_vcpu *c, uint16_t sel, uint64_t off, uint32_t size);
int far_return(struct kvs_vcpu *c, uint32_t size, uint32_t pop);
int far_iret(struct kvs_vcpu *c, uint32_t size);
/* #GP(0) unless off may be the RIP of code segment attributes attr with limit. */
int code_check_rip(struct kvs_vcpu *c, uint32_t attr, uint32_t limit, uint64_t off);

/* ---- v86.c: virtual-8086 mode with CR4.VME at IOPL < 3 ---- */
/* May instructions that move FLAGS of this size run there? */
static inline bool vme_flags(const struct kvs_vcpu *c, uint32_t size) { return (c->cr4 & CR4_VME) && size == 2; }
uint32_t vme_image(const struct kvs_vcpu *c);          /* FLAGS as they are pushed: IOPL 3, VIF in the place of IF */
int vme_load(struct kvs_vcpu *c, uint32_t flags);      /* FLAGS that were popped: 0 or ST_FAULT */
/* INT n in virtual-8086 mode: *done, the program's own handler runs; else the processor's is to be entered. */
int v86_interrupt(struct kvs_vcpu *c, uint8_t vector, bool *done);

/* ---- task.c ---- */
enum { TASK_JUMP, TASK_CALL, TASK_INTERRUPT, TASK_IRET };
/*
 * Stack of privilege level cpl from the current TSS. ext: EXT bit for error codes. The descriptor
 * is checked; its accessed bit is set. Not for long mode.
 */
int tss_stack(struct kvs_vcpu *c, uint32_t cpl, uint32_t ext, uint16_t *ss, uint64_t *sp, struct descriptor *d);
/* RSPn (index = n) or ISTn (index = n + 3) of the 64-bit TSS. */
int tss_stack64(struct kvs_vcpu *c, uint32_t index, uint32_t ext, uint64_t *rsp);
/*
 * Hardware task switch. A fault before the point of no return leaves everything as it was; one behind
 * it is raised in the new task (c->rip is the new RIP then, and *switched is set).
 */
int task_switch(struct kvs_vcpu *c, uint16_t sel, int reason, uint32_t ext, bool has_error, uint32_t error, bool *switched);
/* Through a task gate's TSS selector or a TSS selector in a far transfer; checks done by task_switch. */
int task_transfer(struct kvs_vcpu *c, uint16_t sel, int reason);

#endif
