/* The code cache of a vCPU, never writable where it is executable, and the thunks at its start. */
#include <errno.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include "jit_int.h"

const uint8_t jit_host_of[GPR_COUNT] = {
    H_RAX, H_R14, H_RDX, H_RBX, H_R13, H_RBP, H_RSI, H_RDI, H_R8, H_R9, H_R10,
    H_NONE, H_NONE, H_NONE, H_NONE, H_NONE, H_NONE, H_NONE, H_NONE, H_NONE, H_NONE, H_NONE,
};

int jit_create(struct kvs_vcpu *c, uint32_t threshold)
{
    struct jit *j = calloc(1, sizeof *j);
    if (!j) return -KVS_ENOMEM;
    j->trans = malloc(sizeof *j->trans);
    if (!j->trans) {
        free(j);
        return -KVS_ENOMEM;
    }
    j->rw = j->rx = MAP_FAILED;
    j->pool = mmap(NULL, JIT_POOL_SIZE * sizeof *j->pool, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    int fd = memfd_create("kvs-code", MFD_CLOEXEC);
    if (fd >= 0 && ftruncate(fd, JIT_CODE_SIZE) == 0) {
        j->rw = mmap(NULL, JIT_CODE_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        j->rx = mmap(NULL, JIT_CODE_SIZE, PROT_READ | PROT_EXEC, MAP_SHARED, fd, 0);
    }
    if (fd >= 0) close(fd);
    c->jit = j;
    if (j->pool == MAP_FAILED || j->rw == MAP_FAILED || j->rx == MAP_FAILED) {
        jit_destroy(c);
        return -KVS_ENOTSUP;
    }
    j->threshold = threshold;
    return jit_make_thunks(c);
}

void jit_destroy(struct kvs_vcpu *c)
{
    struct jit *j = c->jit;
    if (!j) return;
    if (j->pool != MAP_FAILED) munmap(j->pool, JIT_POOL_SIZE * sizeof *j->pool);
    if (j->rw != MAP_FAILED) munmap(j->rw, JIT_CODE_SIZE);
    if (j->rx != MAP_FAILED) munmap((void *)(uintptr_t)j->rx, JIT_CODE_SIZE);
    free(j->trans);
    free(j);
    c->jit = NULL;
}

void jit_flush(struct kvs_vcpu *c)
{
    if (!c->jit) return;
    c->jit->used = c->jit->start;
    c->jit->pool_used = 1;
}

/* ---- thunks ---- */
static void load_registers(struct emit *e)
{
    for (uint32_t n = 0; n < 16; n++)
        if (jit_host_of[n] != H_NONE) e_load(e, 8, jit_host_of[n], gpr_slot(n));
}
static void store_registers(struct emit *e)
{
    for (uint32_t n = 0; n < 16; n++)
        if (jit_host_of[n] != H_NONE) e_store(e, 8, gpr_slot(n), jit_host_of[n]);
}
static bool wide(void) { return __builtin_cpu_supports("avx"); }
static void vectors_move(struct emit *e, bool store, uint32_t length)
{
    for (uint32_t n = 0; n < 16; n++) {
        struct rm m = rm_mem(H_CPU, (int32_t)(offsetof(struct kvs_vcpu, fpu.vec) + n * 64));
        if (wide()) e_vex(e, (store ? 0x7f : 0x6f) | OPC_0F | OPC_F3 | length, n, 0, m);
        else e_op(e, (store ? 0x11 : 0x10) | OPC_0F, n, m);
    }
}
static void vectors_store(struct emit *e)
{
    vectors_move(e, true, OPC_L);
    if (wide()) { /* VZEROUPPER: what runs now is SSE code */
        e8(e, 0xc5);
        e8(e, 0xf8);
        e8(e, 0x77);
    }
    e_op(e, 0xc6 | OPC_BYTE, 0, CPU(simd_live));
    e8(e, 0);
}
/*
 * Where the upper halves are zero, as in a guest that does without AVX, the processor must know: else every
 * SSE instruction waits for the old value of its destination, to keep the upper half.
 */
static void vectors_load(struct emit *e)
{
    uint8_t *upper = NULL, *loaded = NULL;
    if (wide()) {
        for (uint32_t n = 0; n < 16; n++) { /* VMOVDQU and VPOR into XMM0 and XMM1, VPTEST */
            struct rm m = rm_mem(H_CPU, (int32_t)(offsetof(struct kvs_vcpu, fpu.vec) + n * 64 + 16));
            if (n < 2) e_vex(e, 0x6f | OPC_0F | OPC_F3, n, 0, m);
            else e_vex(e, 0xeb | OPC_0F | OPC_66, n & 1, n & 1, m);
        }
        e_vex(e, 0xeb | OPC_0F | OPC_66, 0, 0, rm_reg(1));
        e_vex(e, 0x17 | OPC_38 | OPC_66, 0, 0, rm_reg(0));
        upper = e_jcc(e, CC_NE);
    }
    vectors_move(e, false, 0);
    if (upper) {
        loaded = e_jmp(e);
        e_land(e, upper);
        vectors_move(e, false, OPC_L);
        e_land(e, loaded);
    }
    e_op(e, 0xc6 | OPC_BYTE, 0, CPU(simd_live));
    e8(e, 1);
}
static const uint8_t saved[] = { H_RBX, H_RBP, H_R12, H_R13, H_R14, H_R15 };
/*
 * The host's stack holds a pair for each guest call that host code made and that has not returned: the
 * guest's return address and, below, the host's. A return that finds its guest address there is a host
 * return, which the processor predicts. Below all is a pair of address 0 and a thunk that looks up where
 * such a return goes: a guest can have any value on its stack. Whatever leaves host code gives the pairs up,
 * so that none outlives a change of mappings, modes or code.
 */
#define PAIRS_SIZE 32768
static void prologue(struct emit *e, const uint8_t *unpair)
{
    for (uint32_t n = 0; n < ARRAY_SIZE(saved); n++) e_op(e, 0xff, 6, rm_reg(saved[n]));
    e_mov(e, H_CPU, H_RDI);
    e_mov(e, H_BUDGET, H_RDX);
    e_store(e, 8, CPU(host_sp), H_RSP);
    e_lea(e, H_R12, rm_mem(H_RSP, -PAIRS_SIZE));
    e_store(e, 8, CPU(host_sp_low), H_R12);
    e_mov_imm(e, H_R12, 0);
    e_op(e, 0xff, 6, rm_reg(H_R12));
    e_mov_imm(e, H_R12, (uint64_t)(uintptr_t)unpair);
    e_op(e, 0xff, 6, rm_reg(H_R12));
}

int jit_make_thunks(struct kvs_vcpu *c)
{
    struct jit *j = c->jit;
    struct emit e = { j->rw, j->rw + JIT_CODE_SIZE, false };
#define HERE() (j->rx + (e.p - j->rw))
    /* A return that does not belong to the last call: pairs are given up. */
    j->unpair = HERE();
    e_load(&e, 8, H_RSP, CPU(host_sp));
    e_lea(&e, H_RSP, rm_mem(H_RSP, -16));
    uint8_t *to_dispatch = e_jmp(&e);
    /* From tier 0 into a block; called as a handler with i = b->insn. */
    j->enter = HERE();
    prologue(&e, j->unpair);
    e_load(&e, 8, H_R12, rm_mem(H_RSI, (int32_t)offsetof(struct block, jit_entry) - (int32_t)offsetof(struct block, insn)));
    load_registers(&e);
    e_op(&e, 0xff, 4, rm_reg(H_R12));
    /* Back from a tier-0 handler, in the middle of a block: i->imm is the host address. */
    for (int simd = 0; simd < 2; simd++) {
        *(simd ? &j->resume_simd : &j->resume) = HERE();
        prologue(&e, j->unpair);
        e_load(&e, 8, H_R12, rm_mem(H_RSI, offsetof(struct kvs_insn, imm)));
        load_registers(&e);
        if (simd) vectors_load(&e);
        e_op(&e, 0xff, 4, rm_reg(H_R12));
    }
    /* To a handler: RCX is the number of its record times the size of one (out), or its address (out_abs). */
    j->out = HERE();
    e_mov_imm(&e, H_R12, (uint64_t)(uintptr_t)j->pool);
    e_op(&e, 0x01 | OPC_W, H_R12, rm_reg(H_RCX));
    j->out_abs = HERE();
    e_load(&e, 8, H_RSP, CPU(host_sp));
    store_registers(&e);
    e_op(&e, 0x80 | OPC_BYTE, 7, CPU(simd_live));
    e8(&e, 0);
    uint8_t *dead = e_jcc(&e, CC_E);
    vectors_store(&e);
    e_land(&e, dead);
    e_mov(&e, H_RSI, H_RCX);
    e_mov(&e, H_RDI, H_CPU);
    e_mov(&e, H_RDX, H_BUDGET);
    for (uint32_t n = ARRAY_SIZE(saved); n-- > 0;) e_op(&e, 0x8f, 0, rm_reg(saved[n]));
    e_op(&e, 0xff, 4, rm_mem(H_RSI, 0));
    /* Vector registers of the guest into the host's; R12 is the way back. */
    j->simd_load = HERE();
    vectors_load(&e);
    e_op(&e, 0xff, 4, rm_reg(H_R12));
    /* Fills the slot at R12 from the soft TLB; RCX is the address xor its tag, and the same again on return. */
    for (int kind = 0; kind < 2; kind++) {
        const int32_t tag = (int32_t)(kind * TLB_SIZE * sizeof(struct tlb_entry)) + (int32_t)offsetof(struct tlb_class, e);
        const struct rm logged = CPU(slots_logged);
        _Static_assert(sizeof(struct tlb_entry) == 16 && offsetof(struct tlb_entry, tag) == 0, "the index is scaled by shifts");
        j->refill[kind] = HERE();
        e_op(&e, 0xff, 6, rm_reg(H_RAX));
        e_op(&e, 0x33 | OPC_W, H_RCX, rm_mem(H_R12, offsetof(struct tlb_slot, tag)));
        e_op(&e, 0x89, H_RCX, rm_reg(H_RAX));
        e_op(&e, 0xc1, 5, rm_reg(H_RAX)); /* page number times 16 */
        e8(&e, PAGE_SHIFT - 4);
        e_op(&e, 0x81, 4, rm_reg(H_RAX));
        e32(&e, (TLB_SIZE - 1) << 4);
        e_op(&e, 0x03 | OPC_W, H_RAX, CPU(tlb));
        e_op(&e, 0x33 | OPC_W, H_RCX, rm_mem(H_RAX, tag));
        e_op(&e, 0x81 | OPC_W, 7, rm_reg(H_RCX));
        e32(&e, PAGE_SIZE);
        uint8_t *miss = e_jcc(&e, CC_AE);
        e_op(&e, 0xff, 6, rm_reg(H_RDX));
        e_load(&e, 8, H_RDX, rm_mem(H_RAX, tag));
        e_store(&e, 8, rm_mem(H_R12, offsetof(struct tlb_slot, tag)), H_RDX);
        e_load(&e, 8, H_RDX, rm_mem(H_RAX, tag + (int32_t)offsetof(struct tlb_entry, addend)));
        e_store(&e, 8, rm_mem(H_R12, offsetof(struct tlb_slot, addend)), H_RDX);
        /* Logged when it was empty, and under AC, whose translations go when AC does. */
        e_mov_imm(&e, H_RAX, TLB_SUPER_AC * sizeof(struct tlb_class));
        e_op(&e, 0x03 | OPC_W, H_RAX, CPU(tlb_classes));
        e_op(&e, 0x3b | OPC_W, H_RAX, CPU(tlb));
        uint8_t *ac = e_jcc(&e, CC_E);
        e_op(&e, 0x83 | OPC_W, 7, rm_mem(H_R12, offsetof(struct tlb_slot, bound)));
        e8(&e, 0);
        uint8_t *filled = e_jcc(&e, CC_NE);
        e_land(&e, ac);
        e_op(&e, 0xc7 | OPC_W, 0, rm_mem(H_R12, offsetof(struct tlb_slot, bound)));
        e32(&e, SLOT_BOUND);
        e_load(&e, 4, H_RDX, logged);
        e_op(&e, 0x81, 7, rm_reg(H_RDX));
        e32(&e, SLOT_LOG_SIZE);
        uint8_t *overflow = e_jcc(&e, CC_A);
        e_lea(&e, H_RAX, rm_mem(H_RDX, 1));
        e_store(&e, 4, logged, H_RAX);
        uint8_t *full = e_jcc(&e, CC_E);
        e_mov(&e, H_RAX, H_R12);
        e_op(&e, 0x2b | OPC_W, H_RAX, rm_reg(H_CPU));
        e_store(&e, 4, rm_sib(H_CPU, H_RDX, 2, offsetof(struct kvs_vcpu, slots_log)), H_RAX);
        e_land(&e, filled);
        e_land(&e, overflow);
        e_land(&e, full);
        e_op(&e, 0x8f, 0, rm_reg(H_RDX));
        e_land(&e, miss);
        e_op(&e, 0x8f, 0, rm_reg(H_RAX));
        e8(&e, 0xc3);
    }
    /* To the block at linear address RCX, through the jump cache. */
    _Static_assert(sizeof(struct jc_entry) == 32 && JC_BITS == 12 && PAGE_SHIFT == 12, "the thunk knows the jump cache");
    j->dispatch = HERE();
    e_land(&e, to_dispatch);
    e_mov(&e, H_R12, H_RCX);
    e_op(&e, 0xc1 | OPC_W, 5, rm_reg(H_R12));
    e8(&e, JC_BITS);
    e_op(&e, 0x31, H_RCX, rm_reg(H_R12));
    e_op(&e, 0x81, 4, rm_reg(H_R12));
    e32(&e, JC_SIZE - 1);
    e_op(&e, 0xc1, 4, rm_reg(H_R12));
    e8(&e, 5);
    e_op(&e, 0x03 | OPC_W, H_R12, CPU(jc));
    e_op(&e, 0x3b | OPC_W, H_RCX, rm_mem(H_R12, offsetof(struct jc_entry, la)));
    uint8_t *miss = e_jcc(&e, CC_NE);
    e_op(&e, 0x81 | OPC_W, 4, rm_reg(H_RCX));
    e32(&e, ~PAGE_MASK);
    e_store(&e, 8, gpr_slot(GPR_RIPBASE), H_RCX);
    e_load(&e, 8, H_RCX, CPU(jc_key));
    e_op(&e, 0x3b | OPC_W, H_RCX, rm_mem(H_R12, offsetof(struct jc_entry, key)));
    uint8_t *old = e_jcc(&e, CC_NE);
    e_op(&e, 0xff, 4, rm_mem(H_R12, offsetof(struct jc_entry, host)));
    e_land(&e, old);
    j->untranslated = HERE();
    e_load(&e, 8, H_RCX, rm_mem(H_R12, offsetof(struct jc_entry, la)));
    e_land(&e, miss);
    e_store(&e, 8, CPU(rip), H_RCX);
    e_mov_imm(&e, H_RCX, 0); /* record 0 */
    e_jmp_to(&e, j->rw + (j->out - j->rx));
#undef HERE
    j->pool[0] = (struct kvs_insn){ .fn = jit_dispatch_miss };
    j->pool_used = 1;
    j->start = j->used = ((uint32_t)(e.p - j->rw) + 63) & ~63u;
    return KVS_OK;
}
