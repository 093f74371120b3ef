/* One vCPU in a chosen mode with tables in place, driven one instruction at a time. */
#ifndef KVS_SYS_HARNESS_H
#define KVS_SYS_HARNESS_H

#include "../src/interp/interp.h"
#include "engine.h"
#include "../src/irqchip/irqchip.h"
#include "../src/sys/transfer.h"
#include "harness.h"

#define RAM_SIZE (4u << 20)
enum { GDT = 0x1000, IDT = 0x2000, HANDLERS = 0x4000, PML4 = 0x8000, PDPT = 0x9000, PD = 0xa000, TSS = 0xb000,
       TSS2 = 0xc000, LDT = 0xd000, CODE = 0x10000, STACK0 = 0x20000, STACK3 = 0x28000, DATA = 0x30000,
       IST1 = 0x38000, TARGET = 0x11000 };
/* Selectors. */
enum { CODE0 = 0x08, DATA0 = 0x10, CODE3 = 0x1b, DATA3 = 0x23, CODE0_16 = 0x28, DATA0_16 = 0x30, TSS_SEL = 0x38,
       /* 0x40: upper half */ LDT_SEL = 0x48, GATE = 0x58, CONFORMING = 0x68, TSS2_SEL = 0x70, TASK_GATE = 0x80,
       CODE64 = 0x88, CODE64_3 = 0x93, ABSENT = 0x98, READ_ONLY = 0xa0, EXECUTE_ONLY = 0xa8, EXPAND_DOWN = 0xb0,
       TSS16_SEL = 0xb8, CODE1 = 0xc1, DATA1 = 0xc9, GDT_LIMIT = 0xff };

uint64_t vcpu_retired(const struct kvs_vcpu *c);

static struct kvs_vm *vm;
static struct kvs_vcpu *c;
static struct kvs_ram *ram_object;
static uint8_t *ram;

static inline void set_descriptor(uint32_t at, uint32_t base, uint32_t limit, uint32_t attr)
{
    st32(ram + at, (limit & 0xffff) | base << 16);
    st32(ram + at + 4, (base >> 16 & 0xff) | (attr & 0xf0ff) << 8 | (limit & 0xf0000) | (base & 0xff000000u));
}
static inline void set_gate(uint32_t at, uint16_t sel, uint32_t off, uint32_t attr, uint32_t count)
{
    st32(ram + at, (off & 0xffff) | (uint32_t)sel << 16);
    st32(ram + at + 4, (off & 0xffff0000u) | attr << 8 | count);
}
static inline uint8_t gdt_type(uint16_t sel) { return ram[GDT + (sel & 0xfff8) + 5]; }

static inline void set_tables(bool long_mode)
{
    memset(ram, 0, 0x10000);
    set_descriptor(GDT + 0x08, 0, 0xfffff, 0xc09b);
    set_descriptor(GDT + 0x10, 0, 0xfffff, 0xc093);
    set_descriptor(GDT + 0x18, 0, 0xfffff, 0xc0fb);
    set_descriptor(GDT + 0x20, 0, 0xfffff, 0xc0f3);
    set_descriptor(GDT + 0x28, 0, 0xffff, 0x009b);
    set_descriptor(GDT + 0x30, 0, 0xffff, 0x0093);
    set_descriptor(GDT + 0x38, TSS, 0x2000, 0x8b);
    set_descriptor(GDT + 0x48, LDT, 0xff, 0x82);
    set_gate(GDT + 0x58, long_mode ? CODE64 : CODE0, TARGET, 0xec, long_mode ? 0 : 2);
    set_descriptor(GDT + 0x68, 0, 0xfffff, 0xc09e);
    set_descriptor(GDT + 0x70, TSS2, 0x67, 0x89);
    set_gate(GDT + 0x80, TSS2_SEL, 0, 0xe5, 0);
    set_descriptor(GDT + 0x88, 0, 0xfffff, 0xa09b);
    set_descriptor(GDT + 0x90, 0, 0xfffff, 0xa0fb);
    set_descriptor(GDT + 0x98, 0, 0xfffff, 0xc013);
    set_descriptor(GDT + 0xa0, 0, 0xfffff, 0xc091);
    set_descriptor(GDT + 0xa8, 0, 0xfffff, 0xc099);
    set_descriptor(GDT + 0xb0, 0, 0x0000f, 0xc097);
    set_descriptor(GDT + 0xb8, TSS2, 0x2b, 0x81);
    set_descriptor(GDT + 0xc0, 0, 0xfffff, 0xc0bb);
    set_descriptor(GDT + 0xc8, 0, 0xfffff, 0xc0b3);
    for (uint32_t v = 0; v < 128; v++) {
        set_gate(IDT + v * (long_mode ? 16 : 8), long_mode ? CODE64 : CODE0, HANDLERS + 16 * v, 0x8e, 0);
        memset(ram + HANDLERS + 16 * v, 0x90, 16);
    }
    st32(ram + TSS + 4, STACK0 + 0x1000);
    st32(ram + TSS + 8, long_mode ? 0 : DATA0);
    if (long_mode) {
        st64(ram + TSS + 36, IST1 + 0x100 + 8);
    } else {
        st32(ram + TSS + 12, STACK0 + 0x2000);
        st32(ram + TSS + 16, DATA1);
    }
    st16(ram + TSS + 102, 0x80);
    for (uint32_t n = 0; n < 512; n++) st64(ram + PD + 8 * n, (uint64_t)n << 21 | 0xe7);
    st64(ram + PDPT, PD | 7);
    st64(ram + PML4, PDPT | 7);
}

static inline void state_changed(void)
{
    tlb_flush_all(c);
    block_cache_flush(c);
    segments_changed(c);
}

/* A segment register as loading `sel` from the GDT would leave it. */
static inline void put_segment(uint32_t seg, uint16_t sel)
{
    struct descriptor d;
    if (sel_is_null(sel)) segment_set_null(&c->seg[seg], sel, 0);
    else if (descriptor_read(c, sel, &d) == 0) segment_set(&c->seg[seg], &d, sel);
}

static inline void be_common(bool long_mode)
{
    vcpu_reset(c);
    set_tables(long_mode);
    c->gdtr = (struct dtable){ GDT, GDT_LIMIT };
    c->idtr = (struct dtable){ IDT, long_mode ? 128 * 16 - 1 : 128 * 8 - 1 };
    c->cr0 = CR0_PE | CR0_ET | CR0_NE;
    if (long_mode) {
        c->cr0 |= CR0_PG | CR0_WP;
        c->cr4 = CR4_PAE | CR4_OSFXSR;
        c->cr3 = PML4;
        c->efer = EFER_LME | EFER_LMA | EFER_SCE | EFER_NX;
    }
    c->tr = (struct segment){ .base = TSS, .limit = 0x2000, .attr = 0x8b, .sel = TSS_SEL };
    c->ldtr = (struct segment){ .base = LDT, .limit = 0xff, .attr = 0x82, .sel = LDT_SEL };
    state_changed();
}
static inline void set_level(uint16_t code, uint16_t data, uint8_t cpl)
{
    put_segment(SEG_CS, code);
    for (uint32_t seg = 0; seg < SEG_COUNT; seg++)
        if (seg != SEG_CS) put_segment(seg, data);
    c->cpl = cpl;
    c->gpr[RSP] = (cpl == 3 ? STACK3 : STACK0) + 0x800;
    state_changed();
}
/* 32-bit protected mode without paging. */
static inline void be_protected(uint8_t cpl)
{
    be_common(false);
    set_level(cpl == 3 ? CODE3 : CODE0, cpl == 3 ? DATA3 : DATA0, cpl);
}
static inline void be_long(uint8_t cpl)
{
    be_common(true);
    set_level(cpl == 3 ? CODE64_3 : CODE64, cpl == 3 ? DATA3 : DATA0, cpl);
}
static inline void be_compat(uint8_t cpl)
{
    be_common(true);
    set_level(cpl == 3 ? CODE3 : CODE0, cpl == 3 ? DATA3 : DATA0, cpl);
}
static inline void be_real(void)
{
    vcpu_reset(c);
    memset(ram, 0, 0x10000);
    c->cr0 = CR0_ET;
    for (uint32_t seg = 0; seg < SEG_COUNT; seg++) segment_set_real(&c->seg[seg], seg == SEG_CS ? CODE >> 4 : seg == SEG_SS ? STACK0 >> 4 : DATA >> 4);
    c->idtr = (struct dtable){ 0, 0x3ff };
    for (uint32_t v = 0; v < 256; v++) st32(ram + 4 * v, 0x04000000u | v * 16);
    memset(ram + HANDLERS, 0x90, 0x1000);
    c->gpr[RSP] = 0x800;
    state_changed();
}
/* Virtual-8086 mode under the 32-bit tables. */
static inline void be_v86(uint32_t level)
{
    be_protected(0);
    c->eflags |= FLAG_VM | level << 12;
    c->cpl = 3;
    for (uint32_t seg = 0; seg < SEG_COUNT; seg++) segment_set_v86(&c->seg[seg], seg == SEG_CS ? CODE >> 4 : seg == SEG_SS ? STACK3 >> 4 : DATA >> 4);
    c->gpr[RSP] = 0x800;
    state_changed();
}

/* Runs n instructions from the given bytes at CS:0 of real and v86 mode, CODE elsewhere. */
static inline uint32_t run_at(uint64_t rip, uint32_t n)
{
    c->rip = rip;
    c->insn_limit = vcpu_retired(c) + n;
    kvs_vcpu_run(c);
    return c->run->exit_reason;
}
static inline uint64_t code_start(void) { return is_real_or_v86(c) ? 0 : CODE; }
static inline uint32_t run_n(const char *bytes, uint32_t length, uint32_t n)
{
    memset(ram + CODE, 0x90, 64);
    memcpy(ram + CODE, bytes, length);
    block_cache_flush(c);
    return run_at(code_start(), n);
}
#define RUN(bytes) run_n(bytes, sizeof(bytes) - 1, 1)
#define RUN_N(bytes, n) run_n(bytes, sizeof(bytes) - 1, n)

/* The instruction faulted: its handler has run its first NOP. */
static inline bool faulted(uint32_t vector)
{
    bool ok = c->run->exit_reason == KVS_EXIT_INSN_LIMIT && c->rip == HANDLERS - (is_protected(c) ? 0 : 0x4000) + 16 * vector + 1;
    if (!ok) printf("  exit 0x%x rip 0x%llx cs %x\n", c->run->exit_reason, (unsigned long long)c->rip, c->seg[SEG_CS].sel);
    return ok;
}
static inline void push32(uint32_t v)
{
    c->gpr[RSP] -= 4;
    st32(ram + c->gpr[RSP], v);
}
static inline uint32_t stack32(uint32_t n) { return ld32(ram + c->gpr[RSP] + 4 * n); }
static inline uint64_t stack64(uint32_t n) { return ld64(ram + c->gpr[RSP] + 8 * n); }
/* Bytes that fault with an error code on the (32-bit or 64-bit) stack, at the instruction itself. */
#define FAULTS(bytes, vector, error_code)                                                         \
    do {                                                                                          \
        RUN(bytes);                                                                               \
        CHECK(faulted(vector), "%s", #bytes);                                                     \
        CHECK_EQ(is_long_mode(c) ? stack64(0) : stack32(0), (uint32_t)(error_code));              \
        CHECK_EQ(is_long_mode(c) ? stack64(1) : stack32(1), CODE);                                \
    } while (0)
#define FAULTS_UD(bytes)                                                                          \
    do {                                                                                          \
        RUN(bytes);                                                                               \
        CHECK(faulted(EXC_UD), "%s", #bytes);                                                     \
    } while (0)

static inline bool machine_create_with(uint32_t clock_mode, uint32_t flags)
{
    struct kvs_vm_config config = { .size = sizeof config, .clock_mode = clock_mode, .flags = flags, TEST_ENGINE };
    struct kvs_userspace_memory_region region = { .memory_size = RAM_SIZE };
    if (kvs_vm_create(&config, &vm) || kvs_ram_create(RAM_SIZE, &ram_object) || kvs_memslot_set(vm, &region, ram_object, 0) ||
        kvs_irqchip_create(vm) || kvs_vcpu_create(vm, 0, &c)) return false;
    ram = kvs_ram_address(ram_object);
    return true;
}
static inline bool machine_create(uint32_t clock_mode) { return machine_create_with(clock_mode, 0); }
static inline void machine_destroy(void)
{
    kvs_vcpu_destroy(c);
    kvs_ram_release(ram_object);
    kvs_vm_destroy(vm);
}

#endif
