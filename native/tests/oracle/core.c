/* Runs cases in the core: a small long-mode machine with the same user address space as the host side. */
#include "exhaust.h"
#include "../engine.h"

#include <stdlib.h>
#include <sys/mman.h>

/* Guest physical layout. */
enum { P_TABLES = 0x1000, P_GDT = 0x80000, P_IDT = 0x81000, P_TSS = 0x82000, P_STACK = 0x83000, P_HANDLERS = 0x84000, P_LDT = 0x85000,
       P_ARENA = 0x90000, P_CODE = 0x100000, P_BLOCK = 0x100000 + CODE_SIZE, P_END = P_BLOCK + BLOCK_SIZE };
#define KERNEL 0xffffffff80000000ull /* linear address of physical 0, supervisor only */
#define PTE_P 1ull
#define PTE_W 2ull
#define PTE_U 4ull
#define PTE_NX (1ull << 63)

static struct {
    struct kvs_vm *vm;
    struct kvs_vcpu *c;
    uint8_t *ram;
    uint64_t next_table;
    struct segment seg32[SEG_COUNT], seg64[SEG_COUNT], ldt[LDT_COUNT];
} core;

static uint64_t *table_entry(uint64_t table, uint64_t la, uint32_t level)
{
    return (uint64_t *)(core.ram + table) + (la >> (12 + 9 * level) & 511);
}
static void map_page(uint64_t la, uint64_t pa, uint64_t flags)
{
    uint64_t table = P_TABLES;
    for (uint32_t level = 3; level; level--) {
        uint64_t *e = table_entry(table, la, level);
        if (!*e) {
            *e = core.next_table | PTE_P | PTE_W | PTE_U;
            core.next_table += 0x1000;
        }
        table = *e & 0x000ffffffffff000ull;
    }
    *table_entry(table, la, 0) = pa | flags;
}

static void build_memory(void)
{
    core.next_table = P_TABLES + 0x1000;
    for (uint64_t pa = P_GDT; pa < P_LDT + 0x1000; pa += 0x1000) map_page(KERNEL + pa, pa, PTE_P | PTE_W);
    for (uint64_t off = 0; off < CODE_SIZE; off += 0x1000) map_page(CODE + off, P_CODE + off, PTE_P | PTE_U);
    for (uint64_t off = 0; off < BLOCK_SIZE; off += 0x1000) map_page(BLOCK + off, P_BLOCK + off, PTE_P | PTE_W | PTE_U | PTE_NX);
    const uint64_t arenas[] = { LOW, MID, HIGH };
    for (size_t i = 0; i < ARRAY_SIZE(arenas); i++) {
        if (arenas[i] == LOW && !host_has_low()) continue;
        for (uint64_t off = 0; off < ARENA_SIZE; off += 0x1000)
            map_page(arenas[i] + off, P_ARENA + off, PTE_P | PTE_U | PTE_NX | (off < ARENA_RW ? PTE_W : 0));
    }
    uint64_t *gdt = (uint64_t *)(core.ram + P_GDT);
    gdt[2] = 0x00af9b000000ffff; /* 10: kernel code */
    gdt[3] = 0x00cf93000000ffff; /* 18: kernel data */
    gdt[4] = 0x00cffb000000ffff; /* 23: user code, 32 bits */
    gdt[5] = 0x00cff3000000ffff; /* 2b: user data */
    gdt[6] = 0x00affb000000ffff; /* 33: user code, 64 bits */
    for (uint32_t n = 0; n < LDT_COUNT; n++) st64(core.ram + P_LDT + 8 * n, ldt_descriptor(n));
    for (uint32_t v = 0; v < 256; v++) {
        uint64_t h = KERNEL + P_HANDLERS + v * 16, *gate = (uint64_t *)(core.ram + P_IDT + v * 16);
        uint64_t dpl = v == EXC_BP || v == EXC_OF ? 3 : 0;
        gate[0] = (h & 0xffff) | 0x10ull << 16 | 1ull << 32 /* IST 1 */ | (0x8e | dpl << 5) << 40 | (h >> 16 & 0xffff) << 48;
        gate[1] = h >> 32;
    }
    memset(core.ram + P_HANDLERS, 0xf4, 0x1000);
    st64(core.ram + P_TSS + 0x24, KERNEL + P_STACK + 0x1000);
    st16(core.ram + P_TSS + 0x66, 0x68);
    arena_fill(core.ram + P_ARENA);
    memset(core.ram + P_CODE, 0xcc, CODE_SIZE);
}

static struct kvs_segment user_segment(uint16_t selector, uint8_t type, uint64_t base, bool l)
{
    return (struct kvs_segment){ .base = base, .limit = 0xffffffff, .selector = selector, .type = type, .present = 1, .dpl = 3,
                                 .db = !l, .s = 1, .l = l, .g = 1 };
}

/* What the descriptors of the table look like in a segment register. */
static bool table_segments(struct kvs_sregs *s)
{
    for (uint32_t n = 0; n < LDT_COUNT; n++) {
        const struct ldt_row *l = &ldt_rows[n];
        bool code = l->kind >= LDT_CODE;
        struct kvs_segment g = { .base = l->base, .limit = l->pages ? l->limit << 12 | 0xfff : l->limit, .selector = LDT_SELECTOR(n),
                                 .type = (uint8_t)(1 | (l->sealed ? 0 : 2) | l->kind << 2), .present = 1, .dpl = 3, .db = l->big, .s = 1, .g = l->pages };
        if (code) s->cs = g;
        else s->ds = g;
        if (kvs_vcpu_set_sregs(core.c, s)) return false;
        core.ldt[n] = core.c->seg[code ? SEG_CS : SEG_DS];
    }
    return true;
}

bool core_start(const char **error)
{
    struct kvs_vm_config config = { .size = sizeof config, .clock_mode = KVS_CLOCK_VIRTUAL, TEST_ENGINE };
    *error = "out of memory";
    core.ram = mmap(NULL, P_END, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (core.ram == MAP_FAILED) return false;
    build_memory();
    *error = "cannot create the machine";
    struct kvs_userspace_memory_region region = { .memory_size = P_END, .userspace_addr = (uintptr_t)core.ram };
    if (kvs_vm_create(&config, &core.vm) || kvs_memslot_set(core.vm, &region, NULL, 0) || kvs_vcpu_create(core.vm, 0, &core.c)) return false;
    struct kvs_sregs s;
    if (kvs_vcpu_get_sregs(core.c, &s)) return false;
    s.ds = s.es = s.ss = user_segment(0x2b, 3, 0, false);
    s.fs = user_segment(0x2b, 3, FS_BASE, false);
    s.gs = user_segment(0x2b, 3, GS_BASE, false);
    s.tr = (struct kvs_segment){ .base = KERNEL + P_TSS, .limit = 0x67, .selector = 0x40, .type = 11, .present = 1 };
    s.ldt = (struct kvs_segment){ .base = KERNEL + P_LDT, .limit = 8 * LDT_COUNT - 1, .selector = 0x50, .type = 2, .present = 1 };
    s.gdt = (struct kvs_dtable){ .base = KERNEL + P_GDT, .limit = 7 * 8 - 1 };
    s.idt = (struct kvs_dtable){ .base = KERNEL + P_IDT, .limit = 0xfff };
    s.cr0 = CR0_PE | CR0_MP | CR0_ET | CR0_NE | CR0_WP | CR0_AM | CR0_PG;
    s.cr3 = P_TABLES;
    s.cr4 = CR4_PAE | CR4_PGE | CR4_OSFXSR | CR4_OSXMMEXCPT | CR4_OSXSAVE;
    s.efer = EFER_LME | EFER_LMA | EFER_SCE | EFER_NX;
    *error = "the core refuses the machine's state";
    s.cs = user_segment(0x23, 11, 0, false);
    if (kvs_vcpu_set_sregs(core.c, &s)) return false;
    memcpy(core.seg32, core.c->seg, sizeof core.seg32);
    s.cs = user_segment(0x33, 11, 0, true);
    if (kvs_vcpu_set_sregs(core.c, &s)) return false;
    memcpy(core.seg64, core.c->seg, sizeof core.seg64);
    if (!table_segments(&s)) return false;
    core.c->cr4 |= CR4_FSGSBASE;
    core.c->cpuid_features = ~host_lacks(); /* every row that this host has, whatever the CPU model offers */
    core.c->xcr0 = host_components();
    return true;
}

static void load_state(struct kvs_vcpu *c, const struct test_case *t)
{
    memcpy(c->seg, t->bits == 64 ? core.seg64 : core.seg32, sizeof c->seg);
    for (uint32_t n = 0; t->ldt && n < SEG_FS; n++)
        if (t->in.selector[n] & 4) c->seg[n] = core.ldt[t->in.selector[n] >> 3];
    memcpy(c->gpr, t->in.gpr, sizeof t->in.gpr);
    c->cpl = 3;
    c->rip = t->in.rip;
    c->cr2 = 0;
    flags_write(c, (uint32_t)t->in.rflags);
    const uint8_t *fx = t->in.fx;
    c->fpu.fcw = ld16(fx);
    c->fpu.fsw = ld16(fx + 2);
    c->fpu.tags = fx[4];
    c->fpu.fop = ld16(fx + 6);
    c->fpu.fip = ld64(fx + 8);
    c->fpu.fdp = ld64(fx + 16);
    c->fpu.fcs = c->fpu.fds = 0;
    c->fpu.mxcsr = ld32(fx + 24);
    uint32_t top = c->fpu.fsw >> 11 & 7;
    for (uint32_t i = 0; i < 8; i++) memcpy(c->fpu.r[(top + i) & 7], fx + 32 + 16 * i, 10);
    for (uint32_t i = 0; i < 16; i++) {
        memcpy(c->fpu.vec[i], fx + 160 + 16 * i, 16);
        memcpy(c->fpu.vec[i] + 16, fx + FX_YMM + 16 * i, 16);
    }
    c->mp_state = KVS_MP_STATE_RUNNABLE;
    c->int_shadow = 0;
    c->exc.pending = false;
    segments_changed(c);
    vcpu_update_mode(c);
}

static void save_state(struct kvs_vcpu *c, struct cpu_state *o)
{
    memcpy(o->gpr, c->gpr, sizeof o->gpr);
    o->rip = c->rip;
    o->rflags = flags_read(c);
    uint8_t *fx = o->fx;
    st16(fx, c->fpu.fcw);
    st16(fx + 2, c->fpu.fsw);
    st16(fx + 4, c->fpu.tags);
    st16(fx + 6, c->fpu.fop);
    st64(fx + 8, c->fpu.fip);
    st64(fx + 16, c->fpu.fdp);
    st32(fx + 24, c->fpu.mxcsr);
    uint32_t top = c->fpu.fsw >> 11 & 7;
    for (uint32_t i = 0; i < 8; i++) memcpy(fx + 32 + 16 * i, c->fpu.r[(top + i) & 7], 10);
    for (uint32_t i = 0; i < 16; i++) {
        memcpy(fx + 160 + 16 * i, c->fpu.vec[i], 16);
        memcpy(fx + FX_YMM + 16 * i, c->fpu.vec[i] + 16, 16);
    }
}

static void save_segments(const struct kvs_vcpu *c, struct cpu_state *o)
{
    for (uint32_t n = 0; n < SEG_COUNT; n++) o->selector[n] = c->seg[n].sel;
    o->fs_base = c->seg[SEG_FS].base;
    o->gs_base = c->seg[SEG_GS].base;
}

/* The frame that the exception has left on the interrupt stack. */
static void take_fault(struct kvs_vcpu *c, struct cpu_state *o)
{
    static const uint32_t with_error = 1u << EXC_DF | 1u << EXC_TS | 1u << EXC_NP | 1u << EXC_SS | 1u << EXC_GP | 1u << EXC_PF | 1u << EXC_AC;
    uint64_t handler = (c->rip - (KERNEL + P_HANDLERS)) & ~15ull;
    if (handler >= 4096) { o->vector = 0xfe; return; }
    o->vector = (uint32_t)(handler >> 4);
    const uint8_t *frame = core.ram + P_STACK + 0x1000 - 40;
    if (o->vector < 32 && with_error >> o->vector & 1) o->error = ld32(frame - 8);
    if (o->vector == EXC_PF) o->cr2 = c->cr2;
    o->rip = ld64(frame);
    o->rflags = ld64(frame + 16);
    o->selector[SEG_CS] = ld16(frame + 8);
    o->selector[SEG_SS] = ld16(frame + 32);
    o->gpr[RSP] = ld64(frame + 24);
}

/* stepped: by the instruction limit. Else the code runs on into what stands behind it, as on the host. */
static void run_case(struct test_case *t, bool stepped)
{
    struct kvs_vcpu *c = core.c;
    struct cpu_state *o = &t->core;
    window_load(core.ram + P_ARENA, t->in.mem);
    load_state(c, t);
    struct kvs_core_state s;
    kvs_vcpu_get_core_state(c, &s);
    uint64_t next = t->in.rip + t->length;
    int32_t result;
    uint32_t reason;
    for (uint32_t steps = 1;; steps++) {
        kvs_vcpu_set_insn_limit(c, stepped ? s.retired + steps : s.retired + 100000);
        result = kvs_vcpu_run(c);
        reason = kvs_vcpu_run_block(c)->exit_reason;
        if (!(t->sequence || t->env) || !stepped || result || reason != KVS_EXIT_INSN_LIMIT || c->cpl != 3 || c->rip == next || steps == 32) break;
    }
    o->vector = NO_VECTOR;
    o->error = 0;
    o->cr2 = 0;
    save_state(c, o);
    if (t->segments) save_segments(c, o);
    window_save(core.ram + P_ARENA, o->mem);
    if (result || (reason != KVS_EXIT_HLT && reason != KVS_EXIT_INSN_LIMIT)) {
        o->vector = 0xfd;
        o->error = reason;
    } else if (c->cpl != 3) {
        take_fault(c, o);
        if (o->vector == EXC_PF && o->rip == STUB && o->cr2 == STUB && !stepped) {
            o->vector = NO_VECTOR;
            o->rip = next;
        } else if (landed(t, o)) {
            o->vector = NO_VECTOR;
            o->rip--;
        } else if (o->vector == EXC_PF && o->rip + selector_base(o->selector[SEG_CS]) == o->cr2 && (o->error & PF_I) && o->cr2 != t->in.rip + t->cs_base) {
            o->vector = NO_VECTOR;
        }
        if (o->vector == NO_VECTOR) {
            o->error = 0;
            o->cr2 = 0;
            o->rflags &= ~(uint64_t)FLAG_RF;
        }
    } else if (!stepped) o->vector = 0xfc; /* ran away */
    if (case_soils_memory(t, o)) arena_fill(core.ram + P_ARENA);
}

static void put_code(const struct batch *b)
{
    for (uint32_t i = 0; i < b->count; i++) {
        uint8_t *p = core.ram + P_CODE + i * SLOT_SIZE + SLOT_IP;
        memcpy(p, (const uint8_t *)(uintptr_t)case_ip(i), CODE_MAX + 16);
    }
    kvs_mem_written(core.vm, P_CODE, CODE_SIZE);
}

void core_run(struct batch *b)
{
    put_code(b);
    for (uint32_t i = 0; i < b->count; i++) run_case(&b->c[i], b->c[i].step || (i & 1));
}

uint8_t *core_block(void) { return core.ram + P_BLOCK; }

void core_run_loop(struct batch *b)
{
    struct test_case *t = &b->c[0];
    struct kvs_core_state s;
    put_code(b);
    t->core = t->in; /* the host runs from the other */
    for (;;) {
        struct test_case now = { .bits = t->bits, .in = t->core };
        load_state(core.c, &now);
        kvs_vcpu_get_core_state(core.c, &s);
        kvs_vcpu_set_insn_limit(core.c, s.retired + 100000000);
        if (kvs_vcpu_run(core.c) || core.c->cpl == 3) return; /* the results are not there: a difference */
        save_state(core.c, &t->core);
        take_fault(core.c, &t->core);
        if (t->core.vector != EXC_DE || !t->skip) return;
        t->core.gpr[RAX] = DIVIDE_MARK;
        t->core.rip += t->skip;
    }
}

void core_stop(void)
{
    kvs_vcpu_destroy(core.c);
    kvs_vm_destroy(core.vm);
    munmap(core.ram, P_END);
}
