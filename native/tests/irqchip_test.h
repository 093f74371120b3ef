/*
 * Fake vCPUs for the tests of clock and interrupt controllers. It defines vcpu_request and guest
 * memory, so that of the core only clock.c and irqchip/ are linked.
 */
#ifndef IRQCHIP_TEST_H
#define IRQCHIP_TEST_H

#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "../src/irqchip/chips.h"

static _Atomic int passed, failed;
#define CHECK(cond)                                                                \
    do {                                                                           \
        if (cond) {                                                                \
            passed++;                                                              \
        } else {                                                                   \
            failed++;                                                              \
            printf("%s:%d: %s: %s\n", __FILE__, __LINE__, __func__, #cond);        \
        }                                                                          \
    } while (0)
#define CHECK_EQ(a, b)                                                             \
    do {                                                                           \
        long long a_ = (long long)(a), b_ = (long long)(b);                        \
        if (a_ == b_) {                                                            \
            passed++;                                                              \
        } else {                                                                   \
            failed++;                                                              \
            printf("%s:%d: %s: %s is 0x%llx, not 0x%llx\n", __FILE__, __LINE__, __func__, #a, a_, b_); \
        }                                                                          \
    } while (0)

/* ---- what the controllers need from the rest of the core ---- */
static uint8_t guest_memory[0x2000];

void vcpu_request(struct kvs_vcpu *c, uint32_t req) { atomic_fetch_or(&c->requests, req); }

int32_t vm_mem_read(struct kvs_vm *vm, uint64_t gpa, void *data, uint64_t length)
{
    (void)vm;
    if (gpa >= sizeof guest_memory || length > sizeof guest_memory - gpa)
        return -KVS_EFAULT;
    memcpy(data, guest_memory + gpa, length);
    return 0;
}

int32_t vm_mem_write(struct kvs_vm *vm, uint64_t gpa, const void *data, uint64_t length)
{
    (void)vm;
    if (gpa >= sizeof guest_memory || length > sizeof guest_memory - gpa)
        return -KVS_EFAULT;
    memcpy(guest_memory + gpa, data, length);
    return 0;
}

/* ---- a machine ---- */
static inline struct kvs_vm *machine(uint32_t vcpus, uint32_t mode, uint32_t khz)
{
    struct kvs_vm *vm = calloc(1, sizeof *vm);
    vm->config.clock_mode = mode;
    vm->config.tsc_khz = khz;
    CHECK_EQ(clock_create(vm), 0);
    CHECK_EQ(irqchip_create(vm), 0);
    CHECK_EQ(irqchip_create_pit(vm), 0);
    for (uint32_t i = 0; i < vcpus; i++) {
        struct kvs_vcpu *c = calloc(1, sizeof *c);
        c->vm = vm;
        c->id = i;
        atomic_init(&c->mp_state, i ? KVS_MP_STATE_UNINITIALIZED : KVS_MP_STATE_RUNNABLE);
        CHECK_EQ(lapic_create(c), 0);
        vm->vcpus[i] = c;
        atomic_fetch_add(&vm->vcpu_count, 1);
    }
    return vm;
}

static inline void scrap(struct kvs_vm *vm)
{
    for (uint32_t i = 0; i < vm->vcpu_count; i++) {
        lapic_destroy(vm->vcpus[i]);
        free(vm->vcpus[i]);
    }
    irqchip_destroy(vm);
    clock_destroy(vm);
    free(vm);
}

static inline void advance(struct kvs_vm *vm, uint64_t ns)
{
    uint64_t end = clock_now(vm) + ns;
    while (clock_next_deadline(vm) <= end) {
        clock_set_virtual(vm, max_u64(clock_next_deadline(vm), clock_now(vm)));
        clock_run_timers(vm);
    }
    clock_set_virtual(vm, end);
}

static inline void out(struct kvs_vm *vm, uint16_t port, uint32_t value)
{
    CHECK(irqchip_port_write(vm->vcpus[0], port, 1, value));
}
static inline uint32_t in(struct kvs_vm *vm, uint16_t port)
{
    uint32_t value = 0xdead;
    CHECK(irqchip_port_read(vm->vcpus[0], port, 1, &value));
    return value;
}
static inline int take(struct kvs_vcpu *c) { return irqchip_has_interrupt(c) ? irqchip_ack(c) : -1; }
static inline void apic(struct kvs_vcpu *c, uint32_t offset, uint32_t value) { lapic_mmio_write(c, offset, value); }
static inline uint32_t apic_rd(struct kvs_vcpu *c, uint32_t offset) { return lapic_mmio_read(c, offset); }
static inline void enable(struct kvs_vcpu *c) { apic(c, 0xf0, 0x1ff); }

static inline void ioapic_wr(struct kvs_vm *vm, uint32_t index, uint32_t value)
{
    CHECK(ioapic_mmio_write(vm, 0xfec00000, &index, 4));
    CHECK(ioapic_mmio_write(vm, 0xfec00010, &value, 4));
}
static inline uint32_t ioapic_rd(struct kvs_vm *vm, uint32_t index)
{
    uint32_t value = 0;
    CHECK(ioapic_mmio_write(vm, 0xfec00000, &index, 4));
    CHECK(ioapic_mmio_read(vm, 0xfec00010, &value, 4));
    return value;
}

static inline void pic_init(struct kvs_vm *vm, uint8_t icw4)
{
    out(vm, 0x20, 0x11); out(vm, 0x21, 0x20); out(vm, 0x21, 0x04); out(vm, 0x21, icw4);
    out(vm, 0xa0, 0x11); out(vm, 0xa1, 0x28); out(vm, 0xa1, 0x02); out(vm, 0xa1, 0x01);
}

#endif
