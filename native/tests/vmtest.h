/* A small machine for native tests: RAM at 0, long mode with identity page tables, code at 0x8000. */
#ifndef KVS_VMTEST_H
#define KVS_VMTEST_H

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../include/kvmsharp.h"
#include "engine.h"

static int vt_passed, vt_failed;
#define CHECK(cond)                                                                               \
    do {                                                                                          \
        if (cond) vt_passed++;                                                                    \
        else {                                                                                    \
            vt_failed++;                                                                          \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #cond);                            \
        }                                                                                         \
    } while (0)

static inline int vt_report(void)
{
    printf("%d passed, %d failed\n", vt_passed, vt_failed);
    return vt_failed != 0;
}

struct vt {
    struct kvs_vm *vm;
    struct kvs_vcpu *vcpu;
    struct kvs_ram *ram;
    struct kvs_run *run;
    uint8_t *mem;
};
#define VT_CODE 0x8000u
#define VT_STACK 0x7000u
#define VT_TABLES 0x10000u

static inline void vt_must(int rc, const char *what)
{
    if (rc >= 0) return;
    fprintf(stderr, "%s: %s\n", what, kvs_strerror(rc));
    exit(2);
}

static inline struct vt vt_create(uint64_t ram_size, uint32_t clock_mode, int irqchip)
{
    struct vt t = { 0 };
    struct kvs_vm_config config = { .size = sizeof config, .clock_mode = clock_mode, TEST_ENGINE };
    vt_must(kvs_vm_create(&config, &t.vm), "kvs_vm_create");
    if (irqchip) {
        vt_must(kvs_irqchip_create(t.vm), "kvs_irqchip_create");
        vt_must(kvs_pit_create(t.vm), "kvs_pit_create");
    }
    vt_must(kvs_ram_create(ram_size, &t.ram), "kvs_ram_create");
    struct kvs_userspace_memory_region r = { .memory_size = ram_size };
    vt_must(kvs_memslot_set(t.vm, &r, t.ram, 0), "kvs_memslot_set");
    vt_must(kvs_vcpu_create(t.vm, 0, &t.vcpu), "kvs_vcpu_create");
    t.run = kvs_vcpu_run_block(t.vcpu);
    t.mem = kvs_ram_address(t.ram);
    return t;
}

static inline void vt_destroy(struct vt *t)
{
    kvs_vcpu_destroy(t->vcpu);
    kvs_vm_destroy(t->vm);
    kvs_ram_release(t->ram);
}

/* 64-bit code at VT_CODE, 4 GiB mapped one to one with 2 MiB pages. */
static inline void vt_long_mode(struct vt *t)
{
    uint64_t *pml4 = (uint64_t *)(t->mem + VT_TABLES), *pdpt = pml4 + 512, *pd = pdpt + 512;
    pml4[0] = (VT_TABLES + 0x1000) | 7;
    for (uint64_t n = 0; n < 4; n++) pdpt[n] = (VT_TABLES + 0x2000 + n * 0x1000) | 7;
    for (uint64_t n = 0; n < 2048; n++) pd[n] = n << 21 | 0x87;
    struct kvs_sregs s;
    vt_must(kvs_vcpu_get_sregs(t->vcpu, &s), "get_sregs");
    struct kvs_segment code = { .limit = 0xffffffff, .selector = 8, .type = 11, .present = 1, .s = 1, .l = 1, .g = 1 };
    struct kvs_segment data = { .limit = 0xffffffff, .selector = 16, .type = 3, .present = 1, .s = 1, .db = 1, .g = 1 };
    s.cs = code;
    s.ds = s.es = s.fs = s.gs = s.ss = data;
    s.cr0 = 0x80050033;
    s.cr3 = VT_TABLES;
    s.cr4 = 0x620;
    s.efer = 0xd01;
    vt_must(kvs_vcpu_set_sregs(t->vcpu, &s), "set_sregs");
    struct kvs_regs r = { .rip = VT_CODE, .rsp = VT_STACK, .rflags = 2 };
    vt_must(kvs_vcpu_set_regs(t->vcpu, &r), "set_regs");
}

static inline void vt_code(struct vt *t, const void *code, uint64_t size)
{
    vt_must(kvs_mem_write(t->vm, VT_CODE, code, size), "kvs_mem_write");
}

/* Runs until an exit that is not KVS_EXIT_INTR; returns its reason. */
static inline uint32_t vt_run(struct vt *t)
{
    do vt_must(kvs_vcpu_run(t->vcpu), "kvs_vcpu_run");
    while (t->run->exit_reason == KVS_EXIT_INTR);
    return t->run->exit_reason;
}

#endif
