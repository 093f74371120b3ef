/* Segment loads, system calls, hardware tasks, and when interrupts come. */
#include "sys_harness.h"

/* ---- segment loads ---- */

static void test_segments(void)
{
    be_protected(0);
    c->gpr[RAX] = ABSENT;
    FAULTS("\x8e\xd8", EXC_NP, ABSENT);
    be_protected(0);
    c->gpr[RAX] = ABSENT;
    FAULTS("\x8e\xd0", EXC_SS, ABSENT);
    be_protected(0);
    c->gpr[RAX] = 0;
    RUN("\x8e\xd8"); /* a null DS loads and then faults on use */
    CHECK_EQ(c->rip, CODE + 2);
    FAULTS("\xa1\x00\x00\x03\x00", EXC_GP, 0);
    be_protected(0);
    c->gpr[RAX] = 0;
    FAULTS("\x8e\xd0", EXC_GP, 0);
    be_protected(0);
    c->gpr[RAX] = EXECUTE_ONLY;
    FAULTS("\x8e\xd8", EXC_GP, EXECUTE_ONLY);
    be_protected(0);
    c->gpr[RAX] = READ_ONLY;
    FAULTS("\x8e\xd0", EXC_GP, READ_ONLY);
    be_protected(3);
    c->gpr[RAX] = DATA0;
    FAULTS("\x8e\xd8", EXC_GP, DATA0);
    be_protected(0);
    c->gpr[RAX] = 0x1000;
    FAULTS("\x8e\xd8", EXC_GP, 0x1000);
    be_protected(0);
    FAULTS_UD("\x8e\xc8"); /* mov cs */
    be_protected(0);
    FAULTS_UD("\x8e\xf8");
    be_protected(0);
    set_descriptor(LDT + 8, 0x1000, 0xff, 0x92);
    c->gpr[RAX] = 0xc;
    RUN("\x8e\xe0"); /* mov fs, LDT selector */
    CHECK_EQ(c->seg[SEG_FS].base, 0x1000);
    CHECK_EQ(ram[LDT + 8 + 5], 0x93);
    be_protected(0);
    c->gpr[RAX] = DATA0;
    RUN("\x8e\xd0");
    CHECK_EQ(c->int_shadow, 1);
    RUN("\x90");
    CHECK_EQ(c->int_shadow, 0);
    /* Load with pointer: both or nothing. */
    be_protected(0);
    st32(ram + DATA, 0x12345678);
    st16(ram + DATA + 4, DATA0);
    RUN("\x0f\xb5\x0d\x00\x00\x03\x00"); /* lgs ecx, [DATA] */
    CHECK_EQ(c->gpr[RCX], 0x12345678);
    CHECK_EQ(c->seg[SEG_GS].sel, DATA0);
    be_protected(0);
    st16(ram + DATA + 4, ABSENT);
    c->gpr[RCX] = 1;
    FAULTS("\xc5\x0d\x00\x00\x03\x00", EXC_NP, ABSENT);
    CHECK_EQ(c->gpr[RCX], 1);
    /* PUSH and POP. */
    be_protected(0);
    RUN_N("\x1e\x07", 2);
    CHECK_EQ(c->seg[SEG_ES].sel, DATA0);
    CHECK_EQ(c->gpr[RSP], STACK0 + 0x800);
    be_protected(0);
    push32(0x1000);
    FAULTS("\x1f", EXC_GP, 0x1000);
    CHECK_EQ(c->gpr[RSP], STACK0 + 0x800 - 4 - 16);
    be_long(0);
    RUN_N("\x0f\xa0\x0f\xa9", 2);
    CHECK_EQ(c->seg[SEG_GS].sel, DATA0);
    be_long(0);
    c->gpr[RAX] = 0;
    RUN("\x8e\xd0"); /* null SS below 3 in 64-bit mode */
    CHECK_EQ(c->rip, CODE + 2);
    be_long(3);
    c->gpr[RAX] = 3;
    FAULTS("\x8e\xd0", EXC_GP, 0);
    be_long(3);
    c->gpr[RAX] = ~0ull;
    RUN("\x8c\xd8"); /* mov eax, ds zero-extends */
    CHECK_EQ(c->gpr[RAX], DATA3);
    c->gpr[RAX] = ~0ull;
    RUN("\x66\x8c\xd8");
    CHECK_EQ(c->gpr[RAX], (~0ull << 16) | DATA3);
    /* Real mode keeps limit and attributes. */
    be_real();
    c->seg[SEG_DS].limit = 0xffffffff;
    c->gpr[RAX] = 0x1234;
    RUN("\x8e\xd8");
    CHECK_EQ(c->seg[SEG_DS].base, 0x12340);
    CHECK_EQ(c->seg[SEG_DS].limit, 0xffffffff);
    be_v86(0);
    c->gpr[RAX] = 0x1234;
    RUN("\x8e\xd8");
    CHECK_EQ(c->seg[SEG_DS].base, 0x12340);
}

/* ---- system calls ---- */

static void test_syscall(void)
{
    be_long(3);
    c->msr_star = (uint64_t)0x0013 << 48 | (uint64_t)CODE64 << 32;
    c->msr_lstar = TARGET;
    c->msr_sfmask = FLAG_IF | FLAG_TF | FLAG_DF;
    c->eflags |= FLAG_IF | FLAG_DF;
    RUN("\x0f\x05");
    CHECK_EQ(c->rip, TARGET);
    CHECK_EQ(c->cpl, 0);
    CHECK_EQ(c->gpr[RCX], CODE + 2);
    CHECK_EQ(c->gpr[R11], 2 | FLAG_IF | FLAG_DF);
    CHECK_EQ(flags_read(c), 2);
    CHECK_EQ(c->seg[SEG_CS].sel, CODE64);
    CHECK_EQ(c->seg[SEG_SS].sel, CODE64 + 8);
    memcpy(ram + TARGET, "\x48\x0f\x07", 3);
    block_cache_flush(c);
    run_at(TARGET, 1);
    CHECK_EQ(c->rip, CODE + 2);
    CHECK_EQ(c->cpl, 3);
    CHECK_EQ(c->seg[SEG_CS].sel, 0x23);
    CHECK_EQ(c->seg[SEG_SS].sel, 0x1b);
    CHECK_EQ(flags_read(c), 2 | FLAG_IF | FLAG_DF);
    CHECK(is_code64(c));
    /* SYSRET to compatibility mode. */
    be_long(0);
    c->msr_star = (uint64_t)0x0013 << 48;
    c->gpr[RCX] = TARGET;
    c->gpr[R11] = 0x202 | FLAG_RF | FLAG_VM;
    RUN("\x0f\x07");
    CHECK_EQ(c->mode & MODE_SIZE, MODE_32);
    CHECK_EQ(c->seg[SEG_CS].sel, 0x13);
    CHECK_EQ(flags_read(c), 0x202);
    be_long(3);
    FAULTS("\x48\x0f\x07", EXC_GP, 0);
    be_long(0);
    c->efer &= ~(uint64_t)EFER_SCE;
    FAULTS_UD("\x0f\x05");
    be_long(3);
    FAULTS_UD("\x0f\x34"); /* AMD: no SYSENTER in long mode */
    /* From compatibility mode through CSTAR, into 64-bit code. */
    be_compat(3);
    c->msr_star = (uint64_t)CODE64 << 32;
    c->msr_cstar = TARGET;
    RUN("\x0f\x05");
    CHECK_EQ(c->rip, TARGET);
    CHECK(is_code64(c));
    /* SYSENTER and SYSEXIT in legacy mode. */
    be_protected(3);
    c->msr_sysenter_cs = CODE0;
    c->msr_sysenter_eip = TARGET;
    c->msr_sysenter_esp = STACK0 + 0x100;
    RUN("\x0f\x34");
    CHECK_EQ(c->rip, TARGET);
    CHECK_EQ(c->cpl, 0);
    CHECK_EQ(c->gpr[RSP], STACK0 + 0x100);
    c->gpr[RCX] = STACK3;
    c->gpr[RDX] = CODE + 2;
    memcpy(ram + TARGET, "\x0f\x35", 2);
    block_cache_flush(c);
    run_at(TARGET, 1);
    CHECK_EQ(c->rip, CODE + 2);
    CHECK_EQ(c->cpl, 3);
    CHECK_EQ(c->seg[SEG_CS].sel, 0x1b);
    CHECK_EQ(c->gpr[RSP], STACK3);
    be_protected(3);
    FAULTS("\x0f\x34", EXC_GP, 0); /* SYSENTER_CS is null */
}

/* ---- tasks ---- */

static void put_task32(uint32_t at, uint32_t eip)
{
    st32(ram + at + 28, 0);
    st32(ram + at + 32, eip);
    st32(ram + at + 36, 2);
    for (uint32_t k = 0; k < 8; k++) st32(ram + at + 40 + 4 * k, 0x1000 + k);
    st32(ram + at + 56, STACK0 + 0x400); /* ESP */
    static const uint16_t sel[] = { DATA0, CODE0, DATA0, DATA0, 0, 0 };
    for (uint32_t k = 0; k < 6; k++) st16(ram + at + 72 + 4 * k, sel[k]);
    st16(ram + at + 96, LDT_SEL);
}

static void test_tasks(void)
{
    /* JMP: the old task is free, the new one busy. */
    be_protected(0);
    put_task32(TSS2, TARGET);
    c->gpr[RAX] = 0xabcd;
    RUN("\xea\x00\x00\x00\x00\x70\x00");
    CHECK_EQ(c->rip, TARGET);
    CHECK_EQ(c->tr.sel, TSS2_SEL);
    CHECK_EQ(c->gpr[RAX], 0x1000);
    CHECK_EQ(c->gpr[RSP], STACK0 + 0x400);
    CHECK_EQ(gdt_type(TSS_SEL), 0x89);
    CHECK_EQ(gdt_type(TSS2_SEL), 0x8b);
    CHECK_EQ(ld32(ram + TSS + 32), CODE + 7);
    CHECK_EQ(ld32(ram + TSS + 40), 0xabcd);
    CHECK_EQ(ld16(ram + TSS + 76), CODE0);
    CHECK(c->cr0 & CR0_TS);
    CHECK_EQ(c->ldtr.base, LDT);
    /* CALL through a task gate, and back by IRET. */
    be_protected(3);
    put_task32(TSS2, TARGET);
    RUN("\x9a\x00\x00\x00\x00\x83\x00");
    CHECK_EQ(c->rip, TARGET);
    CHECK_EQ(c->cpl, 0);
    CHECK(c->eflags & FLAG_NT);
    CHECK_EQ(ld16(ram + TSS2), TSS_SEL);
    CHECK_EQ(gdt_type(TSS_SEL), 0x8b);
    memcpy(ram + TARGET, "\xcf", 1);
    block_cache_flush(c);
    run_at(TARGET, 1);
    CHECK_EQ(c->rip, CODE + 7);
    CHECK_EQ(c->cpl, 3);
    CHECK_EQ(c->tr.sel, TSS_SEL);
    CHECK_EQ(gdt_type(TSS2_SEL), 0x89);
    CHECK_EQ(ld32(ram + TSS2 + 32), TARGET + 1);
    CHECK(!(c->eflags & FLAG_NT));
    /* An exception with an error code through a task gate. */
    be_protected(3);
    put_task32(TSS2, TARGET);
    set_gate(IDT + 8 * EXC_GP, TSS2_SEL, 0, 0x85, 0);
    ram[TARGET] = 0x90;
    RUN("\xf4");
    CHECK_EQ(c->rip, TARGET + 1);
    CHECK_EQ(c->gpr[RSP], STACK0 + 0x400 - 4);
    CHECK_EQ(stack32(0), 0);
    CHECK_EQ(ld32(ram + TSS + 32), CODE);
    /* A bad segment in the new task is that task's #TS. */
    be_protected(0);
    put_task32(TSS2, TARGET);
    st16(ram + TSS2 + 72, 0x1000);
    RUN("\xea\x00\x00\x00\x00\x70\x00");
    CHECK_EQ(c->rip, HANDLERS + 16 * EXC_TS);
    CHECK_EQ(stack32(0), 0x1000);
    CHECK_EQ(stack32(1), TARGET);
    CHECK_EQ(c->tr.sel, TSS2_SEL);
    /* Busy, absent, too short: nothing has happened. */
    be_protected(0);
    FAULTS("\xea\x00\x00\x00\x00\x38\x00", EXC_GP, TSS_SEL);
    be_protected(0);
    ram[GDT + TSS2_SEL + 5] &= 0x7f;
    FAULTS("\xea\x00\x00\x00\x00\x70\x00", EXC_NP, TSS2_SEL);
    be_protected(0);
    ram[GDT + TSS2_SEL] = 0x66;
    FAULTS("\xea\x00\x00\x00\x00\x70\x00", EXC_TS, TSS2_SEL);
    CHECK_EQ(c->tr.sel, TSS_SEL);
    /* A 286 task. */
    be_protected(0);
    memset(ram + TSS2, 0, 0x40);
    st16(ram + TSS2 + 14, 0x4321);
    st16(ram + TSS2 + 16, 2);
    st16(ram + TSS2 + 18, 0x7777);
    st16(ram + TSS2 + 34, DATA0);
    st16(ram + TSS2 + 36, CODE0);
    st16(ram + TSS2 + 38, DATA0);
    st16(ram + TSS2 + 40, DATA0);
    RUN("\xea\x00\x00\x00\x00\xb8\x00");
    CHECK_EQ(c->rip, 0x4321);
    CHECK_EQ((uint16_t)c->gpr[RAX], 0x7777);
    CHECK_EQ(gdt_type(TSS16_SEL), 0x83);
    /* The T bit traps before the first instruction. */
    be_protected(0);
    put_task32(TSS2, TARGET);
    ram[TSS2 + 100] = 1;
    RUN_N("\xea\x00\x00\x00\x00\x70\x00", 2);
    CHECK(faulted(EXC_DB));
    CHECK(c->dr6 & DR6_BT);
    CHECK_EQ(stack32(0), TARGET);
    /* A task in virtual-8086 mode. */
    be_protected(0);
    put_task32(TSS2, 0x10);
    st32(ram + TSS2 + 36, FLAG_VM | 2);
    st16(ram + TSS2 + 76, CODE >> 4);
    RUN("\xea\x00\x00\x00\x00\x70\x00");
    CHECK(is_v86(c));
    CHECK_EQ(c->seg[SEG_CS].base, CODE);
    CHECK_EQ(c->cpl, 3);
    /* None in IA-32e mode. */
    be_compat(0);
    FAULTS("\xea\x00\x00\x00\x00\x70\x00", EXC_GP, TSS2_SEL);
}

/* ---- when interrupts come ---- */

static void pend(uint8_t vector)
{
    CHECK_EQ(msr_write(c, 0x1b, 0xfee00900, false), 0);
    CHECK_EQ(msr_write(c, 0x1b, 0xfee00d00, false), 0); /* x2APIC */
    CHECK_EQ(msr_write(c, 0x80f, 0x1ff, false), 0);
    CHECK_EQ(msr_write(c, 0x83f, vector, false), 0); /* SELF IPI */
}

static void test_windows(void)
{
    /* STI lets one more instruction pass; so does MOV SS, and it holds NMIs too. */
    be_long(0);
    pend(0x60);
    RUN_N("\xfb\x90\x90", 3);
    CHECK(faulted(0x60));
    CHECK_EQ(stack64(0), CODE + 2);
    be_long(0);
    pend(0x60);
    RUN_N("\xfb\xfa\x90\x90", 4); /* STI, CLI: none */
    CHECK_EQ(c->rip, CODE + 4);
    be_long(0);
    pend(0x60);
    c->eflags |= FLAG_IF;
    RUN("\x90");
    CHECK(faulted(0x60));
    CHECK_EQ(stack64(0), CODE);
    CHECK(!(c->eflags & FLAG_IF));
    be_long(0);
    c->gpr[RAX] = DATA0;
    RUN("\x8e\xd0"); /* mov ss */
    atomic_store(&c->nmi_pending, true);
    vcpu_request(c, REQ_EVENT);
    run_at(CODE + 2, 2);
    CHECK(faulted(EXC_NMI));
    CHECK_EQ(stack64(0), CODE + 3);
    CHECK(c->nmi_masked);
    atomic_store(&c->nmi_pending, true);
    vcpu_request(c, REQ_EVENT);
    run_at(c->rip, 2);
    CHECK_EQ(c->rip, HANDLERS + 16 * EXC_NMI + 3); /* masked until IRET */
    memcpy(ram + HANDLERS + 0x200, "\x48\xcf", 2);
    block_cache_flush(c);
    run_at(HANDLERS + 0x200, 2);
    CHECK(faulted(EXC_NMI));
    CHECK_EQ(stack64(0), CODE + 3);
    /* The task priority holds interrupts below it; lowering CR8 lets them in. */
    be_long(0);
    c->eflags |= FLAG_IF;
    c->gpr[RAX] = 8;
    RUN("\x44\x0f\x22\xc0");
    pend(0x60);
    RUN_N("\x90\x31\xc0\x44\x0f\x22\xc0\x90", 4);
    CHECK(faulted(0x60));
    CHECK_EQ(stack64(0), CODE + 7);
    /* HLT ends with the interrupt, whose frame points behind it. */
    be_long(0);
    pend(0x60);
    RUN_N("\xfb\xf4\x90", 3);
    CHECK(faulted(0x60));
    CHECK_EQ(stack64(0), CODE + 2);
}

static void test_syscall_edges(void)
{
    /* AMD: SYSRET to a non-canonical RCX faults in user mode. */
    be_long(0);
    c->msr_star = (uint64_t)0x0013 << 48;
    c->gpr[RCX] = 0x0000800000000000ull;
    c->gpr[R11] = 2;
    RUN_N("\x48\x0f\x07", 2);
    CHECK(faulted(EXC_GP));
    CHECK_EQ(stack64(0), 0);
    CHECK_EQ(stack64(1), 0x0000800000000000ull);
    CHECK_EQ(stack64(2), 0x23);
    /* SYSCALL with TF masked by SFMASK is not stepped; behind SYSRET that sets TF the trap comes as if SYSCALL had just ended. */
    be_long(3);
    c->msr_star = (uint64_t)0x0013 << 48 | (uint64_t)CODE64 << 32;
    c->msr_lstar = TARGET;
    c->msr_sfmask = FLAG_TF;
    c->eflags |= FLAG_TF;
    memcpy(ram + TARGET, "\x90\x48\x0f\x07", 4);
    RUN_N("\x0f\x05\x90\x90", 4);
    CHECK(faulted(EXC_DB));
    CHECK_EQ(stack64(0), CODE + 2);
    CHECK_EQ(stack64(1), 0x23);
    /* POPF that clears TF is still stepped. */
    be_long(0);
    c->eflags |= FLAG_TF;
    st64(ram + c->gpr[RSP], 2);
    RUN_N("\x9d\x90", 2);
    CHECK(faulted(EXC_DB));
    CHECK_EQ(stack64(0), CODE + 1);
    CHECK(!(stack64(2) & FLAG_TF));
}

/* A shutdown that a kick comes before is part of the state. */
static void test_saved_shutdown(void)
{
    struct kvs_vcpu_events e;
    be_protected(0);
    c->rip = CODE;
    raise_shutdown(c);
    c->run->immediate_exit = 1;
    kvs_vcpu_run(c);
    c->run->immediate_exit = 0;
    CHECK_EQ(c->run->exit_reason, KVS_EXIT_INTR);
    CHECK_EQ(kvs_vcpu_get_events(c, &e), 0);
    CHECK_EQ(e.triple_fault.pending, 1);
    be_protected(0);
    CHECK_EQ(kvs_vcpu_set_events(c, &e), 0);
    kvs_vcpu_run(c);
    CHECK_EQ(c->run->exit_reason, KVS_EXIT_SHUTDOWN);
}

int main(void)
{
    if (!machine_create(KVS_CLOCK_REAL)) return 2;
    test_segments();
    test_syscall();
    test_syscall_edges();
    test_tasks();
    test_windows();
    test_saved_shutdown();
    machine_destroy();
    return checks_report();
}
