/* System management mode: SMI, the state-save area, RSM, the second address space, and what is held back meanwhile. */
#include "sys_harness.h"

enum { SMBASE = 0x30000, ENTRY = SMBASE + 0x8000, AREA = SMBASE + 0xfe00, SMRAM_SIZE = 0x20000 };
#define RSM "\x0f\xaa"

static struct kvs_ram *smram_object;
static uint8_t *smram;

static void map_smram(bool mapped)
{
    struct kvs_userspace_memory_region r = { .slot = 1u << 16, .guest_phys_addr = SMBASE, .memory_size = mapped ? SMRAM_SIZE : 0 };
    CHECK_EQ(kvs_memslot_set(vm, &r, mapped ? smram_object : NULL, 0), KVS_OK);
}

static void handler(const char *bytes, uint32_t n)
{
    CHECK_EQ(kvs_space_write(vm, KVS_SPACE_SMM, ENTRY, bytes, n), KVS_OK);
}
#define HANDLER(bytes) handler(bytes, sizeof(bytes) - 1)
static uint8_t *area(void) { return smram + 0xfe00; }

static void smi(void) { CHECK_EQ(kvs_vcpu_smi(c), KVS_OK); }

/* With a limit of 0 more instructions the loop takes what is pending and runs nothing. */
static uint32_t run_more(uint32_t n) { return run_at(c->rip, n); }

static void test_not_offered(void)
{
    struct kvs_userspace_memory_region r = { .slot = 1u << 16, .memory_size = 0x1000 };
    struct kvs_vcpu_events e;
    if (!machine_create(KVS_CLOCK_REAL)) return;
    CHECK_EQ(kvs_vcpu_smi(c), -KVS_ENOTSUP);
    CHECK_EQ(kvs_memslot_set(vm, &r, ram_object, 0), -KVS_ENOTSUP);
    be_long(0);
    FAULTS_UD(RSM);
    kvs_vcpu_get_events(c, &e);
    CHECK_EQ(e.smi.smm, 0);
    e.smi.smm = 1;
    CHECK_EQ(kvs_vcpu_set_events(c, &e), -KVS_EINVAL);
    uint64_t v;
    CHECK(msr_read(c, 0x34, &v, false) < 0);
    CHECK(msr_read(c, 0x9e, &v, true) == 0 && v == SMBASE);
    machine_destroy();
}

static void test_entry_and_return(void)
{
    be_long(3);
    for (uint32_t n = 0; n < 16; n++) c->gpr[n] = 0x1111111111111111ull * n;
    c->gpr[RSP] = STACK3 + 0x800;
    c->dr6 = 0xffff0ff1;
    c->dr7 = 0x701;
    c->dr[0] = 0x123456;
    c->cr2 = 0x777000;
    flags_write(c, 2 | FLAG_CF | FLAG_IF | FLAG_OF | FLAG_ID);
    struct segment before[SEG_COUNT], tr = c->tr, ldtr = c->ldtr;
    memcpy(before, c->seg, sizeof before);
    uint64_t cr0 = c->cr0, cr4 = c->cr4, efer = c->efer, count = 0;
    HANDLER("\x90" RSM);
    memset(ram + CODE, 0x90, 64);
    c->rip = CODE + 5;
    smi();
    run_more(1); /* the NOP at the entry */
    CHECK(c->in_smm);
    CHECK_EQ(c->run->flags, KVS_RUN_X86_SMM);
    CHECK_EQ(c->rip, 0x8001);
    CHECK_EQ(c->seg[SEG_CS].base, SMBASE);
    CHECK_EQ(c->seg[SEG_CS].sel, SMBASE >> 4);
    CHECK_EQ(c->seg[SEG_CS].limit, 0xffffffff);
    CHECK_EQ(c->seg[SEG_DS].sel, 0);
    CHECK_EQ(c->seg[SEG_DS].limit, 0xffffffff);
    CHECK_EQ(c->cr0, cr0 & ~(uint64_t)(CR0_PE | CR0_PG | CR0_EM | CR0_TS));
    CHECK_EQ(c->cr4, 0);
    CHECK_EQ(c->efer, 0);
    CHECK_EQ(c->dr7, 0x400);
    CHECK_EQ(flags_read(c), 2);
    CHECK_EQ(c->cpl, 0);
    CHECK_EQ(c->cr2, 0x777000);
    CHECK_EQ(c->dr[0], 0x123456);
    CHECK(c->nmi_masked);
    /* AMD64 layout. */
    CHECK_EQ(ld64(area() + 0x1f8), 0); /* RAX */
    CHECK_EQ(ld64(area() + 0x1f0), 0x1111111111111111ull);
    CHECK_EQ(ld64(area() + 0x1d8), STACK3 + 0x800);
    CHECK_EQ(ld64(area() + 0x1c0), 0x7777777777777777ull); /* RDI */
    CHECK_EQ(ld64(area() + 0x180), 0xffffffffffffffffull); /* R15 */
    CHECK_EQ(ld64(area() + 0x178), CODE + 5);
    CHECK_EQ(ld64(area() + 0x170), 2u | FLAG_CF | FLAG_IF | FLAG_OF | FLAG_ID);
    CHECK_EQ(ld64(area() + 0x158), cr0);
    CHECK_EQ(ld64(area() + 0x150), PML4);
    CHECK_EQ(ld64(area() + 0x148), cr4);
    CHECK_EQ(ld64(area() + 0x160), 0x701);
    CHECK_EQ(ld64(area() + 0x168), 0xffff0ff1);
    CHECK_EQ(ld32(area() + 0x100), SMBASE);
    CHECK_EQ(ld32(area() + 0x0fc), 0x30064);
    CHECK_EQ(ld64(area() + 0x0d0), efer);
    CHECK_EQ(ld16(area() + 0x10), CODE64_3);
    CHECK_EQ(ld16(area() + 0x12), 0xa0fb);
    CHECK_EQ(ld32(area() + 0x14), 0xffffffff);
    CHECK_EQ(ld16(area() + 0x90), TSS_SEL);
    CHECK_EQ(ld64(area() + 0x98), TSS);
    CHECK_EQ(ld16(area() + 0x64), GDT_LIMIT);
    CHECK_EQ(ld64(area() + 0x88), IDT);
    CHECK(msr_read(c, 0x34, &count, false) == 0 && count >= 1);
    CHECK(msr_write(c, 0x34, 0, false) < 0);
    CHECK(msr_read(c, 0x9e, &count, false) < 0);

    run_more(1);
    CHECK(!c->in_smm);
    CHECK_EQ(c->run->flags, 0);
    CHECK_EQ(c->rip, CODE + 5);
    CHECK_EQ(c->cr0, cr0);
    CHECK_EQ(c->cr4, cr4);
    CHECK_EQ(c->efer, efer);
    CHECK_EQ(c->cr3, PML4);
    CHECK_EQ(c->dr7, 0x701);
    CHECK_EQ(c->cpl, 3);
    CHECK_EQ(flags_read(c), 2u | FLAG_CF | FLAG_IF | FLAG_OF | FLAG_ID);
    for (uint32_t n = 0; n < 16; n++) CHECK_EQ(c->gpr[n], n == RSP ? STACK3 + 0x800 : 0x1111111111111111ull * n);
    for (uint32_t n = 0; n < SEG_COUNT; n++) {
        CHECK_EQ(c->seg[n].base, before[n].base);
        CHECK_EQ(c->seg[n].sel, before[n].sel);
        CHECK_EQ(c->seg[n].attr, before[n].attr);
        CHECK_EQ(c->seg[n].limit, before[n].limit);
    }
    CHECK_EQ(c->tr.base, tr.base);
    CHECK_EQ(c->ldtr.attr, ldtr.attr);
    CHECK_EQ(c->idtr.base, IDT);
    CHECK(!c->nmi_masked);
    /* Null segments stay null. */
    be_long(0);
    c->gpr[RAX] = 0;
    RUN_N("\x8e\xd8\x8e\xd0\x90", 3);
    smi();
    run_more(2);
    CHECK(!c->in_smm);
    CHECK(c->seg[SEG_DS].attr & ATTR_NULL);
    CHECK(c->seg[SEG_SS].attr & ATTR_NULL);
    FAULTS_UD(RSM); /* outside */
}

/* Each mode comes back as it was, virtual-8086 and PAE paging included. */
static void test_modes(void)
{
    HANDLER(RSM);
    be_real();
    c->rip = 0x10;
    memset(ram + CODE, 0x90, 64);
    smi();
    run_more(2);
    CHECK_EQ(c->rip, 0x11);
    CHECK_EQ(c->seg[SEG_CS].base, CODE);
    CHECK_EQ(c->mode & MODE_SIZE, MODE_16);
    be_v86(3);
    memset(ram + CODE, 0x90, 64);
    c->rip = 0;
    smi();
    run_more(2);
    CHECK_EQ(c->rip, 1);
    CHECK(is_v86(c));
    CHECK_EQ(c->cpl, 3);
    be_compat(0);
    memset(ram + CODE, 0x90, 64);
    c->rip = CODE;
    smi();
    run_more(2);
    CHECK_EQ(c->rip, CODE + 1);
    CHECK_EQ(c->mode & MODE_SIZE, MODE_32);
    be_protected(0);
    for (uint32_t n = 0; n < 4; n++) st64(ram + PDPT + 8 * n, PD | 1);
    c->cr4 = CR4_PAE;
    c->cr3 = PDPT;
    c->gpr[RAX] = CR0_PG | CR0_PE | CR0_NE;
    RUN_N("\x0f\x22\xc0\x90", 1); /* mov cr0, eax */
    CHECK(c->cr0 & CR0_PG);
    c->pdptr[0] = 0; /* as if left over */
    smi();
    run_more(2);
    CHECK_EQ(c->pdptr[0], PD | 1);
    CHECK_EQ(c->rip, CODE + 4);
    /* An invalid table: shutdown. */
    smi();
    run_more(0);
    st64(ram + PDPT, PD | 1 | 1 << 5);
    CHECK_EQ(run_more(1), KVS_EXIT_SHUTDOWN);
}

static void test_layout32(void)
{
    struct kvs_cpuid_entry2 e[256];
    uint32_t count = 256;
    kvs_vcpu_get_cpuid2(c, e, &count);
    struct kvs_cpuid_entry2 saved[256];
    memcpy(saved, e, sizeof e);
    for (uint32_t n = 0; n < count; n++)
        if (e[n].function == 0x80000001) e[n].edx &= ~(1u << 29);
    kvs_vcpu_set_cpuid2(c, e, count);
    be_protected(3);
    c->gpr[RAX] = 0x11223344;
    c->gpr[RDI] = 0x55667788;
    HANDLER(RSM);
    memset(ram + CODE, 0x90, 64);
    c->rip = CODE;
    smi();
    run_more(0);
    CHECK_EQ(ld32(area() + 0x1d0), 0x11223344);
    CHECK_EQ(ld32(area() + 0x1ec), 0x55667788);
    CHECK_EQ(ld32(area() + 0x1f0), CODE);
    CHECK_EQ(ld32(area() + 0x1fc), c->cr0 | CR0_PE);
    CHECK_EQ(ld32(area() + 0x1ac), CODE3);
    CHECK_EQ(ld32(area() + 0x190), 0xc0fb00);
    CHECK_EQ(ld32(area() + 0x0f8), SMBASE);
    CHECK_EQ(ld32(area() + 0x0fc), 0x30000);
    st32(area() + 0x1d0, 0x99);
    run_more(2);
    CHECK(!c->in_smm);
    CHECK_EQ(c->rip, CODE + 1);
    CHECK_EQ(c->gpr[RAX], 0x99);
    CHECK_EQ(c->cpl, 3);
    CHECK_EQ(c->seg[SEG_DS].sel, DATA3);
    kvs_vcpu_set_cpuid2(c, saved, count);
}

/* The same addresses hold other memory in SMM; no translation and no decoded code crosses over. */
static void test_spaces(void)
{
    be_protected(0);
    memset(ram + SMBASE, 0, SMRAM_SIZE);
    memset(smram + 0x100, 0x5a, 4);
    memset(ram + SMBASE + 0x100, 0x11, 4);
    HANDLER("\x2e\x66\xa1\x00\x01\x66\xba\x78\x56\x34\x12\x2e\x66\x89\x16\x00\x02" RSM);
    /* mov eax, cs:[0x100]; mov edx, 0x12345678; mov cs:[0x200], edx; rsm */
    memcpy(ram + ENTRY, "\xa1\x00\x01\x03\x00\xeb\xf9", 7); /* the same address outside: mov eax, [SMBASE + 0x100] */
    for (int n = 0; n < 3; n++) {
        c->gpr[RAX] = c->gpr[RDX] = 0;
        run_at(ENTRY, 2);
        CHECK_EQ(c->gpr[RAX], 0x11111111);
        smi();
        run_more(3);
        CHECK(c->in_smm);
        CHECK_EQ(c->gpr[RAX], 0x5a5a5a5a);
        CHECK_EQ(c->gpr[RDX], 0x12345678);
        CHECK_EQ(ld32(smram + 0x200), 0x12345678);
        CHECK_EQ(ld32(ram + SMBASE + 0x200), 0);
        run_more(1);
        CHECK(!c->in_smm);
        CHECK_EQ(c->gpr[RAX], 0x11111111);
        run_at(ENTRY, 2);
        CHECK_EQ(c->gpr[RAX], 0x11111111);
    }
    uint8_t byte = 0;
    CHECK_EQ(kvs_space_read(vm, KVS_SPACE_SMM, SMBASE + 0x100, &byte, 1), KVS_OK);
    CHECK_EQ(byte, 0x5a);
    CHECK_EQ(kvs_mem_read(vm, SMBASE + 0x100, &byte, 1), KVS_OK);
    CHECK_EQ(byte, 0x11);
    CHECK_EQ(kvs_space_read(vm, KVS_SPACE_SMM, 0, &byte, 1), -KVS_EFAULT);
    CHECK_EQ(kvs_space_read(vm, 2, 0, &byte, 1), -KVS_EINVAL);
    /* Code that the host changes in the second space. */
    HANDLER("\xb0\x77" RSM);
    smi();
    run_more(1);
    CHECK_EQ(c->gpr[RAX] & 0xff, 0x77);
    run_more(1);
    /* Without any slot in the second space SMM sees the first. */
    map_smram(false);
    memcpy(ram + ENTRY, "\xb0\x66" RSM, 4);
    smi();
    run_at(CODE, 1);
    CHECK_EQ(c->gpr[RAX] & 0xff, 0x66);
    CHECK_EQ(ld32(ram + AREA + 0x100), SMBASE);
    run_more(1);
    map_smram(true);
    /* A20 has no effect in there. */
    memset(ram + CODE, 0x90, 64);
    HANDLER(RSM);
    kvs_vm_set_a20(vm, 0);
    smi();
    run_at(CODE, 2);
    CHECK_EQ(c->rip, CODE + 1);
    kvs_vm_set_a20(vm, 1);
}

static void test_smbase(void)
{
    be_protected(0);
    memset(ram + CODE, 0x90, 64);
    HANDLER(RSM);
    smi();
    run_at(CODE, 0);
    st32(area() + 0x100, SMBASE + 0x8000);
    run_more(1);
    CHECK_EQ(c->smbase, SMBASE + 0x8000);
    memcpy(smram + 0x10000, "\x90" RSM, 3);
    smi();
    run_more(1);
    CHECK_EQ(c->seg[SEG_CS].base, SMBASE + 0x8000);
    CHECK_EQ(c->rip, 0x8001);
    CHECK_EQ(ld32(smram + 0x17e00 + 0x100), SMBASE + 0x8000);
    run_more(1);
    vcpu_init_reset(c);
    CHECK_EQ(c->smbase, SMBASE + 0x8000); /* INIT leaves it */
    vcpu_reset(c);
    CHECK_EQ(c->smbase, SMBASE);
}

static uint32_t resume_with(uint32_t offset, uint64_t value)
{
    be_long(0);
    HANDLER(RSM);
    smi();
    run_at(CODE, 0);
    CHECK(c->in_smm);
    st64(area() + offset, value);
    return run_more(1);
}

static void test_invalid_state(void)
{
    CHECK_EQ(resume_with(0x148, CR4_PAE | BIT(40)), KVS_EXIT_SHUTDOWN);
    CHECK_EQ(run_more(1), KVS_EXIT_SHUTDOWN);
    CHECK_EQ(resume_with(0x158, CR0_PG), KVS_EXIT_SHUTDOWN);
    CHECK_EQ(resume_with(0x158, CR0_PG | CR0_PE | CR0_NW), KVS_EXIT_SHUTDOWN);
    CHECK_EQ(resume_with(0x158, BIT(32)), KVS_EXIT_SHUTDOWN);
    CHECK_EQ(resume_with(0x0d0, EFER_LME | EFER_LMA | BIT(63)), KVS_EXIT_SHUTDOWN);
    CHECK_EQ(resume_with(0x160, BIT(32)), KVS_EXIT_SHUTDOWN);
    CHECK_EQ(resume_with(0x058, 0x8000000000000000ull), KVS_EXIT_SHUTDOWN); /* GS base */
    CHECK_EQ(resume_with(0x178, CODE + 3), KVS_EXIT_INSN_LIMIT);
    CHECK_EQ(c->rip, CODE + 3);
    /* The processor that is shut down can be reset. */
    resume_with(0x148, BIT(40));
    vcpu_reset(c);
    CHECK(!c->in_smm && !c->shut_down && !c->triple_fault);
}

static void test_latching(void)
{
    be_long(0);
    memset(ram + CODE, 0x90, 64);
    HANDLER("\x90\x90" RSM);
    smi();
    run_at(CODE, 1);
    CHECK_EQ(c->msr_smi_count, 1);
    smi();
    smi(); /* one is remembered */
    struct kvs_vcpu_events e;
    kvs_vcpu_get_events(c, &e);
    CHECK_EQ(e.smi.smm, 1);
    CHECK_EQ(e.smi.pending, 1);
    CHECK_EQ(e.flags, KVS_VCPUEVENT_VALID_SMM);
    run_more(1);
    CHECK_EQ(c->rip, 0x8002);
    run_more(1); /* RSM, and at once the next one */
    run_more(0);
    CHECK(c->in_smm);
    CHECK_EQ(c->rip, 0x8000);
    CHECK_EQ(ld64(area() + 0x178), CODE);
    run_more(3);
    CHECK(!c->in_smm);
    CHECK_EQ(c->rip, CODE);
    CHECK_EQ(c->msr_smi_count, 2);

    /* NMI waits for RSM; an IRET in the handler lets it in earlier. */
    smi();
    run_more(0);
    kvs_vcpu_nmi(c);
    run_more(1);
    CHECK_EQ(c->rip, 0x8001);
    kvs_vcpu_get_events(c, &e);
    CHECK_EQ(e.nmi.pending, 1);
    CHECK_EQ(e.nmi.masked, 1);
    run_more(2);
    run_more(1);
    CHECK(faulted(EXC_NMI));
    CHECK(c->nmi_masked);
    /* An SMI inside an NMI handler: still masked behind it. */
    smi();
    run_more(0);
    kvs_vcpu_get_events(c, &e);
    CHECK_EQ(e.smi.smm_inside_nmi, 1);
    run_more(3);
    CHECK(!c->in_smm && c->nmi_masked);

    /* INIT waits for RSM. */
    be_long(0);
    smi();
    run_at(CODE, 0);
    vcpu_post_init(c);
    kvs_vcpu_get_events(c, &e);
    CHECK_EQ(e.smi.latched_init, 1);
    struct kvs_mp_state mp = { KVS_MP_STATE_INIT_RECEIVED };
    CHECK_EQ(kvs_vcpu_set_mp_state(c, &mp), -KVS_EINVAL);
    run_more(2);
    CHECK(c->in_smm);
    run_more(1);
    CHECK(!c->in_smm);
    run_more(0);
    CHECK_EQ(c->rip, 0xfff0);
    CHECK_EQ(c->seg[SEG_CS].base, 0xffff0000u);
    CHECK_EQ(atomic_load(&c->signals), 0);
    /* SMI under MOV SS comes one instruction later. */
    be_protected(0);
    memcpy(ram + CODE, "\x8e\xd0\x90\x90", 4);
    c->gpr[RAX] = DATA0;
    HANDLER("\x90" RSM);
    run_at(CODE, 1);
    CHECK_EQ(c->int_shadow, 1);
    smi();
    run_more(1);
    CHECK(c->in_smm);
    CHECK_EQ(ld64(area() + 0x178), CODE + 3);
    run_more(2);
}

static void test_restart(void)
{
    /* HLT goes on waiting, unless the handler says otherwise. */
    be_long(0);
    memcpy(ram + CODE, "\xf4\x90\x90", 3);
    HANDLER(RSM);
    atomic_store(&c->mp_state, KVS_MP_STATE_HALTED);
    smi();
    run_at(CODE + 1, 0);
    CHECK(c->in_smm);
    CHECK_EQ(area()[0xc9], 1);
    CHECK_EQ(ld64(area() + 0x178), CODE + 1);
    CHECK_EQ(smm_resume(c), ST_LOOKUP);
    CHECK_EQ(atomic_load(&c->mp_state), KVS_MP_STATE_HALTED);
    CHECK_EQ(c->rip, CODE + 1);
    smi();
    run_more(0);
    area()[0xc9] = 0;
    run_more(2);
    CHECK_EQ(atomic_load(&c->mp_state), KVS_MP_STATE_RUNNABLE);
    CHECK_EQ(c->rip, CODE + 2);

    /* I/O restart: the OUT that the host answered with an SMI runs again. */
    be_long(0);
    memcpy(ram + CODE, "\x90\xe6\xb2\x90\x90", 5); /* nop; out 0xb2, al; nop */
    c->gpr[RAX] = 0x42;
    CHECK_EQ(run_at(CODE, 5), KVS_EXIT_IO);
    smi();
    run_more(0);
    CHECK_EQ(ld32(area() + 0xc0), 0xb2u << 16 | 1u << 4 | 2); /* port, 8 bits, valid, OUT */
    CHECK_EQ(ld64(area() + 0xa0), CODE + 1);
    area()[0xc8] = 0xff;
    run_more(1);
    CHECK_EQ(c->rip, CODE + 1);
    CHECK_EQ(run_more(5), KVS_EXIT_IO);
    run_more(1); /* not behind an I/O instruction any more */
    smi();
    run_more(0);
    CHECK_EQ(ld32(area() + 0xc0), 0);
    area()[0xc8] = 0xff;
    run_more(1);
    CHECK_EQ(c->rip, CODE + 4);
    /* REP OUTSB: back to before the byte. */
    be_long(0);
    memcpy(ram + CODE, "\xf3\x6e\x90", 3);
    c->gpr[RCX] = 3;
    c->gpr[RSI] = DATA;
    c->gpr[RDX] = 0xb2;
    CHECK_EQ(run_at(CODE, 5), KVS_EXIT_IO);
    smi();
    run_more(0);
    CHECK_EQ(ld32(area() + 0xc0), 0xb2u << 16 | 1u << 4 | 8 | 4 | 2);
    CHECK_EQ(ld64(area() + 0x1f0), 2);
    area()[0xc8] = 0xff;
    run_more(1);
    CHECK_EQ(c->gpr[RCX], 3);
    CHECK_EQ(c->gpr[RSI], DATA);
    CHECK_EQ(c->rip, CODE);
}

static void test_state(void)
{
    be_long(0);
    memset(ram + CODE, 0x90, 64);
    HANDLER("\x90" RSM);
    smi();
    run_at(CODE, 1);
    struct kvs_vcpu_events e;
    struct kvs_sregs sregs;
    struct kvs_regs regs;
    kvs_vcpu_get_events(c, &e);
    kvs_vcpu_get_sregs(c, &sregs);
    kvs_vcpu_get_regs(c, &regs);
    vcpu_reset(c);
    CHECK_EQ(kvs_vcpu_set_sregs(c, &sregs), KVS_OK);
    CHECK_EQ(kvs_vcpu_set_regs(c, &regs), KVS_OK);
    CHECK_EQ(kvs_vcpu_set_events(c, &e), KVS_OK);
    CHECK(c->in_smm);
    run_more(1);
    CHECK(!c->in_smm);
    CHECK_EQ(c->rip, CODE);
    CHECK(is_code64(c));
}

int main(void)
{
    test_not_offered();
    if (!machine_create_with(KVS_CLOCK_REAL, KVS_VM_SMM) || kvs_ram_create(SMRAM_SIZE, &smram_object)) return 2;
    smram = kvs_ram_address(smram_object);
    map_smram(true);
    test_entry_and_return();
    test_modes();
    test_layout32();
    test_spaces();
    test_smbase();
    test_invalid_state();
    test_latching();
    test_restart();
    test_state();
    kvs_ram_release(smram_object);
    machine_destroy();
    return checks_report();
}
