/* Virtual-8086 mode extensions: the virtual interrupt flag and the redirection of INT n. SDM 3B "8086 Emulation" */
#include "transfer.h"

uint32_t vme_image(const struct kvs_vcpu *c)
{
    uint32_t flags = flags_read(c) & ~(FLAG_IF | FLAG_VM | FLAG_RF);
    return flags | FLAG_IOPL | (flags & FLAG_VIF ? FLAG_IF : 0);
}

/* SDM 2 "POPF/POPFD/POPFQ", "IRET/IRETD/IRETQ": a pending virtual interrupt, or single-step, is the monitor's affair */
int vme_load(struct kvs_vcpu *c, uint32_t flags)
{
    if (((flags & FLAG_IF) && (c->eflags & FLAG_VIP)) || (flags & FLAG_TF)) return raise_gp(c, 0);
    const uint32_t mask = FLAGS_STATUS | FLAG_TF | FLAG_DF | FLAG_NT;
    uint32_t f = (flags_read(c) & ~(mask | FLAG_VIF | FLAG_RF)) | (flags & mask);
    flags_write(c, f | (flags & FLAG_IF ? FLAG_VIF : 0));
    vcpu_update_mode(c);
    return ST_OK;
}

/* SDM 3B "Method 5: Software Interrupt Handling" and so on: the bit map ends where the I/O permission map starts. */
static int redirection_bit(struct kvs_vcpu *c, uint8_t vector, bool *set)
{
    uint16_t map = 0;
    uint8_t byte = 0;
    if (c->tr.attr & ATTR_NULL || !(c->tr.attr & 8) || c->tr.limit < 103) return raise_gp(c, 0);
    int st = lread(c, (uint32_t)(c->tr.base + 102), &map, 2, LA_SYSTEM);
    if (st != ST_OK) return st;
    uint32_t off = (uint32_t)map - 32 + (vector >> 3);
    if (map < 32 || off > c->tr.limit) return raise_gp(c, 0);
    if ((st = lread(c, (uint32_t)(c->tr.base + off), &byte, 1, LA_SYSTEM)) != ST_OK) return st;
    *set = byte >> (vector & 7) & 1;
    return ST_OK;
}

/* Through the interrupt vector table at linear address 0, as an 8086 does, with the rights of the program. */
static int enter_program(struct kvs_vcpu *c, uint8_t vector)
{
    uint32_t entry = 0, flags = iopl(c) < 3 ? vme_image(c) : flags_read(c);
    int st = lread(c, vector * 4u, &entry, 4, LA_USER_RULES);
    if (st != ST_OK) return st;
    struct stack s;
    stack_current(c, &s);
    uint64_t frame[3] = { flags & 0xffff, c->seg[SEG_CS].sel, c->rip & 0xffff };
    if ((st = stack_push(c, &s, frame, 3, 2)) != ST_OK) return st;
    stack_commit(c, &s);
    c->eflags &= ~(FLAG_TF | FLAG_RF | (iopl(c) < 3 ? FLAG_VIF : FLAG_IF));
    segment_set_v86(&c->seg[SEG_CS], (uint16_t)(entry >> 16));
    c->rip = entry & 0xffff;
    segments_changed(c);
    return ST_OK;
}

int v86_interrupt(struct kvs_vcpu *c, uint8_t vector, bool *done)
{
    *done = false;
    if (c->cr4 & CR4_VME) {
        bool set = false;
        int st = redirection_bit(c, vector, &set);
        if (st != ST_OK) return st;
        if (!set) {
            *done = true;
            return enter_program(c, vector);
        }
    }
    return iopl(c) < 3 ? raise_gp(c, 0) : ST_OK;
}
