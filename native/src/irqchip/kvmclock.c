/*
 * kvmclock: guest memory holds a line from the guest's TSC to VM time. KVM "KVM-specific MSRs"
 *
 * Ticks are derived from the VM clock, so one line through (clock 0, TSC offset) holds for ever and
 * for every vCPU: readers on different vCPUs agree to the nanosecond, and a restored VM computes
 * the structure it was saved with.
 */
#include "irqchip.h"

#include "../mmu/mmu.h"

#define PVCLOCK_TSC_STABLE 1u

__extension__ typedef unsigned __int128 u128;

struct pvclock_vcpu_time_info {
    uint32_t version, pad0;
    uint64_t tsc_timestamp, system_time;
    uint32_t tsc_to_system_mul;
    int8_t tsc_shift;
    uint8_t flags, pad[2];
};
_Static_assert(sizeof(struct pvclock_vcpu_time_info) == 32, "pvclock layout");

struct pvclock_wall_clock { uint32_t version, sec, nsec; };

/* ns = ((ticks << shift) * mul) >> 32, a negative shift going right; mul has its top bit set. */
static void tsc_scale(uint32_t khz, uint32_t *mul, int8_t *shift)
{
    uint64_t num = 1000000, den = khz;
    *shift = 0;
    for (; num >= den; den <<= 1)
        ++*shift;
    for (; num * 2 < den; num <<= 1)
        --*shift;
    *mul = (uint32_t)((num << 32) / den);
}

static uint64_t scale_ticks(uint64_t ticks, uint32_t mul, int8_t shift)
{
    ticks = shift < 0 ? ticks >> -shift : ticks << shift;
    return (uint64_t)((u128)ticks * mul >> 32);
}

/* Writes a structure that begins with a version: odd while the rest changes. */
static void write_versioned(struct kvs_vm *vm, uint64_t gpa, void *data, uint64_t size)
{
    uint32_t version;
    if (vm_mem_read(vm, gpa, &version, 4))
        return;
    version = (version | 1) + 2; /* odd, and not the one that readers may have seen */
    if (vm_mem_write(vm, gpa, &version, 4))
        return;
    atomic_thread_fence(memory_order_seq_cst);
    (void)vm_mem_write(vm, gpa + 4, (uint8_t *)data + 4, size - 4);
    atomic_thread_fence(memory_order_seq_cst);
    version++;
    (void)vm_mem_write(vm, gpa, &version, 4);
}

void kvmclock_update(struct kvs_vcpu *c)
{
    if (!(c->msr_kvm_system_time & 1))
        return;
    struct pvclock_vcpu_time_info info = { .flags = PVCLOCK_TSC_STABLE };
    tsc_scale(clock_tsc_khz(c->vm), &info.tsc_to_system_mul, &info.tsc_shift);
    /* The line starts where guest TSC and clock both are at or after 0. */
    if (c->tsc_offset >= 0)
        info.tsc_timestamp = (uint64_t)c->tsc_offset;
    else
        info.system_time = scale_ticks(-(uint64_t)c->tsc_offset, info.tsc_to_system_mul, info.tsc_shift);
    write_versioned(c->vm, c->msr_kvm_system_time & ~1ull, &info, sizeof info);
}

void kvmclock_write_system_time(struct kvs_vcpu *c, uint64_t value)
{
    c->msr_kvm_system_time = value;
    kvmclock_update(c);
}

void kvmclock_write_wall_clock(struct kvs_vcpu *c, uint64_t value)
{
    c->msr_kvm_wall_clock = value;
    if (!value)
        return;
    /* The time of day at clock 0: the guest adds its system time. */
    uint64_t ns = clock_realtime(c->vm) - clock_now(c->vm);
    struct pvclock_wall_clock w = { 0, (uint32_t)(ns / 1000000000), (uint32_t)(ns % 1000000000) };
    write_versioned(c->vm, value, &w, sizeof w);
}
