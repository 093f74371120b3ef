/* The local APIC: its registers, and what lapic.c, lapic_timer.c and lapic_regs.c share. */
#ifndef KVS_LAPIC_IMPL_H
#define KVS_LAPIC_IMPL_H

#include "chips.h"

enum {
    R_ID = 0x20, R_VERSION = 0x30, R_TPR = 0x80, R_APR = 0x90, R_PPR = 0xa0, R_EOI = 0xb0, R_LDR = 0xd0,
    R_DFR = 0xe0, R_SPIV = 0xf0, R_ISR = 0x100, R_TMR = 0x180, R_IRR = 0x200, R_ESR = 0x280,
    R_LVT_CMCI = 0x2f0, R_ICR = 0x300, R_ICR2 = 0x310, R_LVT_TIMER = 0x320, R_LVT_THERMAL = 0x330,
    R_LVT_PERF = 0x340, R_LVT_LINT0 = 0x350, R_LVT_LINT1 = 0x360, R_LVT_ERROR = 0x370,
    R_TMICT = 0x380, R_TMCCT = 0x390, R_TDCR = 0x3e0, R_SELF_IPI = 0x3f0,
};
/* Words of the image that the hardware leaves unused hold what it does not show. */
enum { IMAGE_ERRORS = (R_ESR >> 2) + 1, IMAGE_FLAGS, IMAGE_TIMER_LO = (R_TMCCT >> 2) + 1, IMAGE_TIMER_HI };

enum { IMAGE_EXTINT = 1, IMAGE_PV_EOI = 2 };

#define BASE_BSP 0x100ull
#define BASE_X2APIC 0x400ull
#define BASE_ENABLE 0x800ull
#define BASE_DEFAULT 0xfee00000ull
#define BASE_RESERVED (~PHYS_MASK | 0x2ffull)

#define APIC_VERSION 0x1050014u /* six LVT entries, EOI-broadcast suppression */
#define SPIV_ENABLE 0x100u
#define SPIV_NO_BROADCAST 0x1000u
#define SPIV_WRITABLE 0x11ffu
#define LVT_MASKED 0x10000u
#define LVT_LEVEL 0x8000u
#define LVT_REMOTE_IRR 0x4000u
#define LVT_STATUS 0x5000u /* delivery status and remote IRR: read-only */
#define LVT_TIMER_MODE 0x60000u
enum { TIMER_ONE_SHOT = 0, TIMER_PERIODIC = 0x20000, TIMER_TSC_DEADLINE = 0x40000 };

#define ICR_BUSY 0x1000u
#define ICR_X2_RESERVED 0xfff32000u
#define ERR_SEND_VECTOR 0x20u
#define ERR_RECEIVE_VECTOR 0x40u
#define ERR_REGISTER 0x80u
#define ERR_ALL 0xe0u

#define MSR_APIC_BASE 0x1bu
#define MSR_TSC_DEADLINE 0x6e0u
#define CPUID1_ECX_X2APIC BIT(21)
#define CPUID1_ECX_TSC_DEADLINE BIT(24)

static inline uint32_t *reg(struct lapic *l, uint32_t offset) { return &l->regs[(offset & 0x3ff) >> 2]; }

static inline uint32_t rd(const struct lapic *l, uint32_t offset) { return l->regs[(offset & 0x3ff) >> 2]; }

static inline bool hw_enabled(struct lapic *l) { return atomic_load(&l->base) & BASE_ENABLE; }

static inline bool x2apic(struct lapic *l) { return atomic_load(&l->base) & BASE_X2APIC; }

static inline struct kvs_vm *vm_of(struct lapic *l) { return l->vcpu->vm; }

static inline uint32_t *vector_word(struct lapic *l, uint32_t bank, uint8_t vector)
{
    return reg(l, bank + (uint32_t)(vector >> 5) * 0x10);
}
static inline void set_vector(struct lapic *l, uint32_t bank, uint8_t v) { *vector_word(l, bank, v) |= 1u << (v & 31); }
static inline void clear_vector(struct lapic *l, uint32_t bank, uint8_t v) { *vector_word(l, bank, v) &= ~(1u << (v & 31)); }
static inline bool test_vector(struct lapic *l, uint32_t bank, uint8_t v) { return *vector_word(l, bank, v) >> (v & 31) & 1; }

/* ---- lapic.c ---- */
uint32_t lapic_processor_priority(const struct lapic *l);
uint32_t lapic_arbitration_priority(const struct lapic *l);
/* Under the lock, after every change of what the lock-free readers want to know. True: there is news. */
bool lapic_refresh(struct lapic *l);
/* Refreshes, unlocks, and tells the vCPU if there is news. */
void lapic_unlock(struct lapic *l);
void lapic_report_error(struct lapic *l, uint32_t bit); /* under the lock */
/* Under the lock: a local source has fired. */
void lapic_deliver_local(struct lapic *l, uint32_t lvt_register);
/* Under the lock: a level at LINT0 that is not in service asks. */
void lapic_lint0_level(struct lapic *l);
void lapic_write_eoi(struct lapic *l);                  /* these three take the lock */
void lapic_write_tpr(struct lapic *l, uint32_t value);
void lapic_write_icr(struct lapic *l, uint32_t low, uint32_t high);

/* ---- lapic_timer.c: under the lock, but for the callback ---- */
static inline uint32_t lapic_timer_mode(const struct lapic *l) { return rd(l, R_LVT_TIMER) & LVT_TIMER_MODE; }
void lapic_timer_set(struct lapic *l, uint64_t expiry);
uint64_t lapic_timer_remaining(struct lapic *l);
uint32_t lapic_timer_count(struct lapic *l);
void lapic_timer_fire(void *owner, uint64_t now);
void lapic_timer_restore(struct lapic *l, const uint32_t *image);
void lapic_arm_tsc_deadline(struct lapic *l);
void lapic_write_tmict(struct lapic *l, uint32_t value);
void lapic_write_tdcr(struct lapic *l, uint32_t value);
void lapic_write_lvt_timer(struct lapic *l, uint32_t value);

#endif
