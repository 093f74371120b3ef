/* Transfers of control: interrupts, IRET, far calls and returns, gates, double faults. */
#include "sys_harness.h"

/* ---- delivery ---- */

static void test_interrupts_protected(void)
{
    be_protected(0);
    c->eflags |= FLAG_IF | FLAG_NT;
    uint32_t flags = flags_read(c), esp = (uint32_t)c->gpr[RSP];
    RUN("\xcd\x50");
    CHECK_EQ(c->rip, HANDLERS + 0x500);
    CHECK_EQ(c->gpr[RSP], esp - 12);
    CHECK_EQ(stack32(0), CODE + 2);
    CHECK_EQ(stack32(1), CODE0);
    CHECK_EQ(stack32(2), flags);
    CHECK(!(c->eflags & (FLAG_IF | FLAG_TF | FLAG_NT)));
    be_protected(0);
    set_gate(IDT + 8 * 0x50, CODE0, TARGET, 0x8f, 0); /* a trap gate keeps IF */
    c->eflags |= FLAG_IF;
    RUN("\xcd\x50");
    CHECK(c->eflags & FLAG_IF);

    /* DPL of the gate stops software interrupts, not exceptions. */
    be_protected(3);
    FAULTS("\xcd\x50", EXC_GP, 0x50 * 8 + 2);
    be_protected(3);
    FAULTS("\xcc", EXC_GP, 3 * 8 + 2);
    be_protected(3);
    RUN("\xf1"); /* ICEBP is not software in that sense */
    CHECK_EQ(c->rip, HANDLERS + 16 * EXC_DB);
    CHECK_EQ(stack32(0), CODE + 1);
    be_protected(3);
    c->gpr[RCX] = 0;
    RUN("\xf7\xf1"); /* div ecx */
    CHECK(faulted(EXC_DE));
    CHECK_EQ(c->cpl, 0);
    CHECK_EQ(c->seg[SEG_SS].sel, DATA0);
    CHECK_EQ(c->gpr[RSP], STACK0 + 0x1000 - 20);
    CHECK_EQ(stack32(0), CODE);
    CHECK_EQ(stack32(1), CODE3);
    CHECK(stack32(2) & FLAG_RF);
    CHECK_EQ(stack32(3), STACK3 + 0x800);
    CHECK_EQ(stack32(4), DATA3);

    /* Not present, beyond the limit, of a wrong type. */
    be_protected(0);
    ram[IDT + 8 * 0x50 + 5] &= 0x7f;
    FAULTS("\xcd\x50", EXC_NP, 0x50 * 8 + 2);
    be_protected(0);
    FAULTS("\xcd\x80", EXC_GP, 0x80 * 8 + 2);
    be_protected(0);
    ram[IDT + 8 * 0x50 + 5] = 0x8c;
    FAULTS("\xcd\x50", EXC_GP, 0x50 * 8 + 2);
    be_protected(0);
    set_gate(IDT + 8 * 0x50, DATA0, TARGET, 0x8e, 0);
    FAULTS("\xcd\x50", EXC_GP, DATA0);
    be_protected(0);
    set_gate(IDT + 8 * 0x50, 0, TARGET, 0x8e, 0);
    FAULTS("\xcd\x50", EXC_GP, 0);
    be_protected(0);
    set_gate(IDT + 8 * 0x50, ABSENT, TARGET, 0x8e, 0);
    st32(ram + GDT + ABSENT + 4, ld32(ram + GDT + ABSENT + 4) | 0x800);
    FAULTS("\xcd\x50", EXC_NP, ABSENT);
    be_protected(0);
    set_gate(IDT + 8 * 0x50, CODE3, TARGET, 0x8e, 0); /* DPL below the current level of privilege */
    FAULTS("\xcd\x50", EXC_GP, CODE3 & ~3);

    /* A 16-bit gate pushes words. */
    be_protected(0);
    set_gate(IDT + 8 * 0x50, CODE0_16, 0x4321, 0x86, 0);
    esp = (uint32_t)c->gpr[RSP];
    RUN("\xcd\x50");
    CHECK_EQ(c->rip, 0x4321);
    CHECK_EQ(c->gpr[RSP], esp - 6);
    CHECK_EQ(c->mode & MODE_SIZE, MODE_16);
    CHECK_EQ(ld16(ram + c->gpr[RSP]), (CODE + 2) & 0xffff);

    /* Inner stack: TSS too short, null, wrong level, absent. */
    be_protected(3);
    c->tr.limit = 7;
    RUN("\x0f\x0b");
    CHECK_EQ(c->run->exit_reason, KVS_EXIT_SHUTDOWN);
    be_protected(3);
    st16(ram + TSS + 8, 0);
    RUN("\x0f\x0b");
    CHECK_EQ(c->run->exit_reason, KVS_EXIT_SHUTDOWN);
    be_protected(3);
    set_gate(IDT + 8 * 0x50, CODE1, TARGET, 0xee, 0);
    st16(ram + TSS + 16, DATA0);
    RUN("\xcd\x50"); /* level 1 wants SS with DPL 1; #TS goes to level 0 */
    CHECK(faulted(EXC_TS));
    CHECK_EQ(stack32(0), DATA0);
    CHECK_EQ(stack32(1), CODE);
    be_protected(3);
    set_gate(IDT + 8 * 0x50, CODE1, TARGET, 0xee, 0);
    RUN("\xcd\x50");
    CHECK_EQ(c->cpl, 1);
    CHECK_EQ(c->seg[SEG_CS].sel, CODE1);
    CHECK_EQ(c->gpr[RSP], STACK0 + 0x2000 - 20);

    /* Stack fault in the same level: expand-down limit. */
    be_protected(0);
    put_segment(SEG_SS, EXPAND_DOWN);
    c->seg[SEG_SS].limit = STACK0 + 0x7ff - 8;
    state_changed();
    st16(ram + TSS + 8, DATA0);
    RUN("\xcd\x50");
    CHECK_EQ(c->run->exit_reason, KVS_EXIT_SHUTDOWN); /* #SS cannot be delivered on it either */
}

static void test_interrupts_long(void)
{
    be_long(3);
    c->gpr[RSP] = STACK3 + 0x7f3;
    c->gpr[RCX] = 0;
    RUN("\x48\xf7\xf1");
    CHECK(faulted(EXC_DE));
    CHECK_EQ(c->cpl, 0);
    CHECK_EQ(c->seg[SEG_SS].sel, 0);
    CHECK(c->seg[SEG_SS].attr & ATTR_NULL);
    CHECK_EQ(c->gpr[RSP], STACK0 + 0x1000 - 40);
    CHECK_EQ(stack64(0), CODE);
    CHECK_EQ(stack64(1), CODE64_3);
    CHECK(stack64(2) & FLAG_RF);
    CHECK_EQ(stack64(3), STACK3 + 0x7f3);
    CHECK_EQ(stack64(4), DATA3);
    /* The same level: aligned, SS stays. */
    be_long(0);
    c->gpr[RSP] = STACK0 + 0x7f3;
    RUN("\xcd\x50");
    CHECK_EQ(c->gpr[RSP], STACK0 + 0x7f0 - 40);
    CHECK_EQ(c->seg[SEG_SS].sel, DATA0);
    CHECK_EQ(stack64(3), STACK0 + 0x7f3);
    /* IST, also without a change of level. */
    be_long(0);
    ram[IDT + 16 * EXC_UD + 4] = 1;
    RUN("\x0f\x0b");
    CHECK(faulted(EXC_UD));
    CHECK_EQ(c->gpr[RSP], IST1 + 0x100 - 40);
    CHECK_EQ(c->seg[SEG_SS].sel, DATA0);
    /* Error codes and CR2. */
    be_long(3);
    c->gpr[RSI] = 0x40000000;
    RUN("\x48\x89\x06");
    CHECK(faulted(EXC_PF));
    CHECK_EQ(c->cr2, 0x40000000);
    CHECK_EQ(stack64(0), PF_U | PF_W);
    be_long(0);
    c->gpr[RSI] = 0x0000800000000000ull;
    FAULTS("\x48\x89\x06", EXC_GP, 0);
    /* Only 64-bit gates into 64-bit code. */
    be_long(0);
    ram[IDT + 16 * 0x50 + 5] = 0x86;
    FAULTS("\xcd\x50", EXC_GP, 0x502 - 0x280 + 0);
    be_long(0);
    st16(ram + IDT + 16 * 0x50 + 2, CODE0);
    FAULTS("\xcd\x50", EXC_GP, CODE0);
    be_long(0);
    st32(ram + IDT + 16 * 0x50 + 8, 0x8000); /* handler at 0x8000'xxxxxxxx: not canonical */
    FAULTS("\xcd\x50", EXC_GP, 0);
    be_long(3);
    st64(ram + TSS + 4, 0x0000800000000000ull);
    st16(ram + IDT + 16 * 0x50 + 4, 0xee00);
    ram[IDT + 16 * EXC_SS + 4] = 1;
    RUN("\xcd\x50");
    CHECK(faulted(EXC_SS));
    CHECK_EQ(stack64(0), 0);

    /* From compatibility mode. */
    be_compat(3);
    RUN("\x0f\x0b");
    CHECK(faulted(EXC_UD));
    CHECK_EQ(stack64(1), CODE3);
    CHECK(is_code64(c));
}

static void test_interrupts_real(void)
{
    be_real();
    c->eflags |= FLAG_IF | FLAG_AC;
    RUN("\xcd\x50");
    CHECK_EQ(c->rip, 0x500);
    CHECK_EQ(c->seg[SEG_CS].base, 0x4000);
    CHECK_EQ(c->gpr[RSP], 0x7fa);
    CHECK_EQ(ld16(ram + STACK0 + 0x7fa), 2);
    CHECK_EQ(ld16(ram + STACK0 + 0x7fc), CODE >> 4);
    CHECK_EQ(ld16(ram + STACK0 + 0x7fe), 0x202);
    CHECK(!(c->eflags & (FLAG_IF | FLAG_AC)));
    memcpy(ram + HANDLERS + 0x500, "\xcf", 1);
    block_cache_flush(c);
    run_at(0x500, 1);
    CHECK_EQ(c->rip, 2);
    CHECK_EQ(c->seg[SEG_CS].sel, CODE >> 4);
    CHECK(c->eflags & FLAG_IF);
    /* An IDT too short: #GP, then double fault, then the end. */
    be_real();
    c->idtr.limit = 0x3f;
    RUN("\xcd\x50");
    CHECK(faulted(EXC_GP));
    CHECK_EQ(c->gpr[RSP], 0x7fa); /* no error code */
    be_real();
    c->idtr.limit = 0;
    RUN("\xcd\x50");
    CHECK_EQ(c->run->exit_reason, KVS_EXIT_SHUTDOWN);
    /* SP wraps between pushes. */
    be_real();
    c->gpr[RSP] = 2;
    RUN("\xcd\x50");
    CHECK_EQ(c->gpr[RSP], 0xfffc);
    CHECK_EQ(ld16(ram + STACK0), 2);
    CHECK_EQ(ld16(ram + STACK0 + 0xfffe), CODE >> 4);
    be_real();
    c->gpr[RSP] = 1;
    RUN("\xcd\x50");
    CHECK_EQ(c->run->exit_reason, KVS_EXIT_SHUTDOWN);
}

static void test_double_fault(void)
{
    /* Page fault whose handler is not present: #NP on top of #PF is a double fault. */
    be_long(0);
    ram[IDT + 16 * EXC_PF + 5] &= 0x7f;
    c->gpr[RSI] = 0x40000000;
    RUN("\x8b\x06");
    CHECK(faulted(EXC_DF));
    CHECK_EQ(stack64(0), 0);
    CHECK_EQ(stack64(1), CODE);
    CHECK_EQ(c->cr2, 0x40000000);
    /* Contributory on benign is delivered by itself, with EXT. */
    be_long(0);
    ram[IDT + 16 * EXC_UD + 5] &= 0x7f;
    RUN("\x0f\x0b");
    CHECK(faulted(EXC_NP));
    CHECK_EQ(stack64(0), EXC_UD * 8 + 3);
    /* Page fault on benign is delivered in turn; page fault on that is a double fault. */
    be_long(3);
    st64(ram + TSS + 4, 0x40001000); /* every stack switch faults */
    ram[IDT + 16 * EXC_DF + 4] = 1;
    RUN("\x0f\x0b");
    CHECK(faulted(EXC_DF));
    CHECK_EQ(c->gpr[RSP], IST1 + 0x100 - 48);
    CHECK_EQ(c->cr2, 0x40001000 - 8 * 6);
    /* Nothing works: triple fault. */
    be_long(0);
    c->idtr.limit = 0;
    RUN("\x0f\x0b");
    CHECK_EQ(c->run->exit_reason, KVS_EXIT_SHUTDOWN);
    CHECK_EQ(kvs_vcpu_run(c), 0);
    CHECK_EQ(c->run->exit_reason, KVS_EXIT_SHUTDOWN);
    /* Tables where no memory is. */
    be_long(0);
    c->idtr.base = 0x3000000;
    st64(ram + PD + 8 * 24, 0x3000000 | 0xe7);
    state_changed();
    RUN("\x0f\x0b");
    CHECK_EQ(c->run->exit_reason, KVS_EXIT_SHUTDOWN);
}

/* ---- returns ---- */

static void put_frame64(uint64_t rip, uint64_t cs, uint64_t flags, uint64_t rsp, uint64_t ss)
{
    uint64_t frame[5] = { rip, cs, flags, rsp, ss };
    memcpy(ram + c->gpr[RSP], frame, sizeof frame);
}

static void test_iret_long(void)
{
    be_long(0);
    put_frame64(TARGET, CODE64_3, 0x3202 | FLAG_AC | FLAG_NT, STACK3, DATA3);
    RUN("\x48\xcf");
    CHECK_EQ(c->rip, TARGET);
    CHECK_EQ(c->cpl, 3);
    CHECK_EQ(c->gpr[RSP], STACK3);
    CHECK_EQ(flags_read(c), 0x3202 | FLAG_AC | FLAG_NT);
    CHECK_EQ(c->tlb - c->tlb_classes, TLB_USER);
    CHECK_EQ(c->seg[SEG_DS].sel, 0); /* DPL 0 data segments do not follow */
    /* ... but in 64-bit mode FS and GS have their base still */
    be_long(0);
    c->seg[SEG_GS].base = 0x123456789000ull;
    put_frame64(TARGET, CODE64_3, 2, STACK3, DATA3);
    RUN("\x48\xcf");
    CHECK_EQ(c->seg[SEG_GS].sel, 0);
    CHECK_EQ(c->seg[SEG_GS].attr & ATTR_NULL, ATTR_NULL);
    CHECK_EQ(c->seg[SEG_GS].base, 0x123456789000ull);
    /* To user mode IF and IOPL are not user mode's to change. */
    be_long(3);
    put_frame64(TARGET, CODE64_3, 0x3202, STACK3 + 0x100, DATA3);
    RUN("\x48\xcf");
    CHECK_EQ(flags_read(c), 2);
    CHECK_EQ(c->gpr[RSP], STACK3 + 0x100);
    /* The same level pops SS:RSP too; a null SS is fine below 3. */
    be_long(0);
    put_frame64(TARGET, CODE64, 2, STACK0 + 0x123, 0);
    RUN("\x48\xcf");
    CHECK_EQ(c->gpr[RSP], STACK0 + 0x123);
    CHECK_EQ(c->seg[SEG_SS].sel, 0);
    be_long(0);
    put_frame64(TARGET, CODE64_3, 2, STACK3, 3);
    FAULTS("\x48\xcf", EXC_GP, 0);
    be_long(0);
    put_frame64(0x800000000000ull, CODE64_3, 2, STACK3, DATA3);
    FAULTS("\x48\xcf", EXC_GP, 0);
    be_long(0);
    put_frame64(TARGET, DATA0, 2, STACK0, DATA0);
    FAULTS("\x48\xcf", EXC_GP, DATA0);
    be_long(0);
    c->eflags |= FLAG_NT;
    FAULTS("\x48\xcf", EXC_GP, 0);
    /* To compatibility mode; IRETD with a 32-bit frame. */
    be_long(0);
    uint32_t frame[5] = { TARGET, CODE3, 0x202, STACK3, DATA3 };
    memcpy(ram + c->gpr[RSP], frame, sizeof frame);
    RUN("\xcf");
    CHECK_EQ(c->mode & MODE_SIZE, MODE_32);
    CHECK_EQ(c->gpr[RSP], STACK3);
    be_long(0);
    put_frame64(TARGET, CODE3, 2, STACK3, DATA3);
    ram[GDT + (CODE3 & ~7) + 6] |= 0x20; /* L and D */
    FAULTS("\x48\xcf", EXC_GP, CODE3 & ~3);
    /* NMIs stay blocked until IRET. */
    be_long(0);
    c->nmi_masked = true;
    put_frame64(TARGET, CODE64, 2, STACK0, DATA0);
    RUN("\x48\xcf");
    CHECK(!c->nmi_masked);
}

static void test_iret_protected(void)
{
    be_protected(0);
    push32(DATA3), push32(STACK3), push32(0x3202), push32(CODE3), push32(TARGET);
    RUN("\xcf");
    CHECK_EQ(c->cpl, 3);
    CHECK_EQ(c->gpr[RSP], STACK3);
    CHECK_EQ(c->seg[SEG_ES].sel, 0);
    CHECK_EQ(iopl(c), 3);
    be_protected(0);
    push32(0x202), push32(CODE0), push32(TARGET);
    RUN("\xcf");
    CHECK_EQ(c->gpr[RSP], STACK0 + 0x800);
    CHECK_EQ(c->rip, TARGET);
    be_protected(3);
    push32(2), push32(CODE0), push32(TARGET);
    FAULTS("\xcf", EXC_GP, CODE0); /* inward */
    be_protected(0);
    push32(DATA0), push32(STACK3), push32(2), push32(CODE3), push32(TARGET);
    FAULTS("\xcf", EXC_GP, DATA0);
    be_protected(0);
    push32(ABSENT | 3), push32(STACK3), push32(2), push32(CODE3), push32(TARGET);
    ram[GDT + ABSENT + 5] = 0x73;
    FAULTS("\xcf", EXC_SS, ABSENT);

    /* Into virtual-8086 mode and back by an exception. */
    be_protected(0);
    static const uint32_t segs[] = { 0x5555, 0x4444, 0x3000, 0x2222, STACK3 >> 4, 0x700, FLAG_VM | 0x3202, CODE >> 4, 0 };
    for (uint32_t n = 0; n < ARRAY_SIZE(segs); n++) push32(segs[n]);
    memcpy(ram + 0x5000, "\xcf", 1);
    memcpy(ram + CODE, "\x90\x0f\x0b", 3);
    block_cache_flush(c);
    run_at(0x5000, 2);
    CHECK(is_v86(c));
    CHECK_EQ(c->cpl, 3);
    CHECK_EQ(c->seg[SEG_GS].base, 0x55550);
    CHECK_EQ(c->seg[SEG_ES].base, 0x22220);
    CHECK_EQ(c->rip, 1);
    run_at(1, 1);
    CHECK(faulted(EXC_UD));
    CHECK(!is_v86(c));
    CHECK_EQ(c->gpr[RSP], STACK0 + 0x1000 - 36);
    CHECK_EQ(stack32(0), 1);
    CHECK_EQ(stack32(1), CODE >> 4);
    CHECK(stack32(2) & FLAG_VM);
    CHECK_EQ(stack32(3), 0x700);
    CHECK_EQ(stack32(5), 0x2222);
    CHECK_EQ(stack32(8), 0x5555);
    CHECK(c->seg[SEG_DS].attr & ATTR_NULL);
    /* INT n needs IOPL 3 there; IRET too. */
    be_v86(0);
    RUN("\xcd\x50");
    CHECK(faulted(EXC_GP));
    CHECK_EQ(stack32(0), 0);
    be_v86(0);
    RUN("\xcf");
    CHECK(faulted(EXC_GP));
    be_v86(3);
    st16(ram + STACK3 + 0x800, 0x77);
    st16(ram + STACK3 + 0x802, 0x1200);
    st16(ram + STACK3 + 0x804, 0x0202);
    RUN("\xcf");
    CHECK_EQ(c->rip, 0x77);
    CHECK_EQ(c->seg[SEG_CS].base, 0x12000);
    CHECK_EQ(iopl(c), 3);
    CHECK(is_v86(c));
    be_v86(3);
    set_gate(IDT + 8 * 0x50, CODE1, TARGET, 0xee, 0); /* v86 goes to level 0 only */
    RUN("\xcd\x50");
    CHECK(faulted(EXC_GP));
    CHECK_EQ(stack32(0), CODE1 & ~3);
}

static void test_far(void)
{
    be_protected(0);
    RUN("\xea\x00\x10\x01\x00\x08\x00"); /* jmp 0x08:0x11000 */
    CHECK_EQ(c->rip, TARGET);
    be_protected(0);
    RUN("\x66\xea\x34\x12\x28\x00"); /* to 16-bit code */
    CHECK_EQ(c->mode & MODE_SIZE, MODE_16);
    CHECK_EQ(c->rip, 0x1234);
    be_protected(0);
    FAULTS("\xea\x00\x10\x01\x00\x10\x00", EXC_GP, DATA0);
    be_protected(0);
    FAULTS("\xea\x00\x10\x01\x00\x1b\x00", EXC_GP, CODE3 & ~3);
    be_protected(0);
    FAULTS("\xea\x00\x10\x01\x00\x00\x00", EXC_GP, 0);
    be_protected(0);
    FAULTS("\xea\x00\x10\x01\x00\x28\x00", EXC_GP, 0); /* offset beyond 64 KiB */
    be_protected(3);
    RUN("\xea\x00\x10\x01\x00\x68\x00"); /* conforming: the level stays */
    CHECK_EQ(c->seg[SEG_CS].sel, CONFORMING | 3);
    CHECK_EQ(c->cpl, 3);
    CHECK_EQ(gdt_type(CONFORMING), 0x9f); /* accessed */

    /* CALL and RETF. */
    be_protected(0);
    RUN("\x9a\x00\x10\x01\x00\x08\x00");
    CHECK_EQ(c->rip, TARGET);
    CHECK_EQ(stack32(0), CODE + 7);
    CHECK_EQ(stack32(1), CODE0);
    memcpy(ram + TARGET, "\xca\x08\x00", 3);
    run_at(TARGET, 1);
    CHECK_EQ(c->rip, CODE + 7);
    CHECK_EQ(c->gpr[RSP], STACK0 + 0x808);

    /* Call gate to level 0 with two parameters, and back. */
    be_protected(3);
    c->gpr[RSP] = STACK3 + 0x800;
    st32(ram + STACK3 + 0x800, 0x11111111);
    st32(ram + STACK3 + 0x804, 0x22222222);
    RUN("\x9a\xff\xff\xff\xff\x5b\x00");
    CHECK_EQ(c->rip, TARGET);
    CHECK_EQ(c->cpl, 0);
    CHECK_EQ(c->gpr[RSP], STACK0 + 0x1000 - 24);
    CHECK_EQ(stack32(0), CODE + 7);
    CHECK_EQ(stack32(1), CODE3);
    CHECK_EQ(stack32(2), 0x11111111);
    CHECK_EQ(stack32(3), 0x22222222);
    CHECK_EQ(stack32(4), STACK3 + 0x800);
    CHECK_EQ(stack32(5), DATA3);
    put_segment(SEG_DS, DATA0);
    state_changed();
    run_at(TARGET, 1);
    CHECK_EQ(c->cpl, 3);
    CHECK_EQ(c->rip, CODE + 7);
    CHECK_EQ(c->gpr[RSP], STACK3 + 0x808);
    CHECK_EQ(c->seg[SEG_SS].sel, DATA3);
    CHECK_EQ(c->seg[SEG_DS].sel, 0);
    CHECK_EQ(c->seg[SEG_ES].sel, DATA3);
    be_protected(3);
    ram[GDT + GATE + 5] = 0x8c; /* DPL 0 */
    FAULTS("\x9a\xff\xff\xff\xff\x5b\x00", EXC_GP, GATE);
    be_protected(3);
    FAULTS("\xea\xff\xff\xff\xff\x5b\x00", EXC_GP, CODE0); /* JMP cannot change the level */
    be_protected(3);
    ram[GDT + GATE + 5] &= 0x7f;
    FAULTS("\x9a\xff\xff\xff\xff\x5b\x00", EXC_NP, GATE);

    /* Real mode. */
    be_real();
    RUN("\x9a\x10\x00\x00\x11");
    CHECK_EQ(c->rip, 0x10);
    CHECK_EQ(c->seg[SEG_CS].base, TARGET);
    CHECK_EQ(ld32(ram + STACK0 + 0x7fc), (CODE >> 4) << 16 | 5);
    memcpy(ram + TARGET + 0x10, "\xcb", 1);
    run_at(0x10, 1);
    CHECK_EQ(c->rip, 5);
    CHECK_EQ(c->gpr[RSP], 0x800);

    /* 64-bit mode: memory forms with REX.W, and a gate. */
    be_long(0);
    c->gpr[RSI] = DATA;
    st64(ram + DATA, TARGET);
    st16(ram + DATA + 8, CODE64);
    RUN("\x48\xff\x1e"); /* call m16:64 */
    CHECK_EQ(c->rip, TARGET);
    CHECK_EQ(stack64(0), CODE + 3);
    CHECK_EQ(stack64(1), CODE64);
    memcpy(ram + TARGET, "\x48\xcb", 2);
    block_cache_flush(c);
    run_at(TARGET, 1);
    CHECK_EQ(c->rip, CODE + 3);
    CHECK_EQ(c->gpr[RSP], STACK0 + 0x800);
    be_long(0);
    FAULTS_UD("\xea\x00\x10\x01\x00\x08\x00");
    be_long(0);
    FAULTS_UD("\xff\xe8"); /* far jump to a register */
    be_long(0);
    c->gpr[RSI] = DATA;
    st64(ram + DATA, 0x0000800000000000ull);
    st16(ram + DATA + 8, CODE64);
    FAULTS("\x48\xff\x2e", EXC_GP, 0);
    be_long(3);
    c->gpr[RSI] = DATA;
    st32(ram + DATA, 0);
    st16(ram + DATA + 4, GATE | 3);
    RUN("\xff\x1e");
    CHECK_EQ(c->rip, TARGET);
    CHECK_EQ(c->cpl, 0);
    CHECK_EQ(c->gpr[RSP], STACK0 + 0x1000 - 32);
    CHECK_EQ(stack64(0), CODE + 2);
    CHECK_EQ(stack64(1), CODE64_3);
    CHECK_EQ(stack64(2), STACK3 + 0x800);
    CHECK_EQ(stack64(3), DATA3);
    CHECK(c->seg[SEG_SS].attr & ATTR_NULL);
    /* To compatibility mode and back. */
    be_long(0);
    c->gpr[RSI] = DATA;
    st32(ram + DATA, TARGET);
    st16(ram + DATA + 4, CODE0);
    memcpy(ram + TARGET, "\xea\x00\x50\x00\x00\x88\x00", 7); /* jmp 0x88:0x5000 */
    memset(ram + 0x5000, 0x90, 16);
    RUN_N("\xff\x2e", 1);
    CHECK_EQ(c->mode & MODE_SIZE, MODE_32);
    CHECK_EQ(c->rip, TARGET);
    run_at(TARGET, 1);
    CHECK(is_code64(c));
    CHECK_EQ(c->rip, 0x5000);
}

static void set_vendor(bool amd)
{
    cpuid_supported(c->cpuid, &c->cpuid_count);
    for (uint32_t k = 0; k < c->cpuid_count && !amd; k++)
        if (c->cpuid[k].function == 0) c->cpuid[k].ebx = 0x756e6547, c->cpuid[k].edx = 0x49656e69, c->cpuid[k].ecx = 0x6c65746e;
    cpuid_changed(c);
}

/* Where the two vendors' fast system calls differ; and TF as SYSRET loads it. */
static void test_vendors(void)
{
    for (int amd = 0; amd < 2; amd++) {
        set_vendor(amd);
        be_compat(3);
        c->msr_cstar = c->msr_lstar = TARGET;
        c->msr_star = (uint64_t)CODE64 << 32;
        RUN("\x0f\x05");
        if (amd) CHECK_EQ(c->rip, TARGET);
        else CHECK(faulted(EXC_UD));
        be_long(0);
        c->msr_sysenter_cs = CODE64;
        c->msr_sysenter_eip = TARGET;
        RUN("\x0f\x34");
        if (amd) CHECK(faulted(EXC_UD));
        else CHECK_EQ(c->rip, TARGET);
        /* SYSRET to an address that is not canonical: Intel's faults with the privilege of the kernel, AMD's of the user. */
        be_long(0);
        c->gpr[RCX] = BIT(60);
        c->gpr[R11] = 2;
        c->msr_star = 0x0083ull << 48;
        uint64_t rsp = c->gpr[RSP];
        RUN("\x48\x0f\x07");
        if (amd) CHECK(c->cpl == 3 && c->rip == BIT(60));
        else CHECK(faulted(EXC_GP) && stack64(1) == CODE && c->gpr[RSP] > rsp - 64);
        /* SS */
        be_long(0);
        segment_set_null(&c->seg[SEG_SS], 0, 0);
        c->msr_star = 0x0083ull << 48;
        c->gpr[RCX] = TARGET;
        RUN("\x48\x0f\x07");
        CHECK_EQ(c->seg[SEG_SS].sel, 0x8b);
        CHECK_EQ((c->seg[SEG_SS].attr & ATTR_NULL) != 0, amd);
        CHECK_EQ(c->seg[SEG_SS].attr & ATTR_DPL, ATTR_DPL);
    }
    /* The trap comes behind SYSRET itself, in user code; TF that it clears does not trap. */
    set_vendor(true);
    be_long(0);
    c->msr_star = 0x0083ull << 48;
    c->gpr[RCX] = TARGET;
    c->gpr[R11] = 2 | FLAG_TF;
    RUN_N("\x48\x0f\x07", 2);
    CHECK(faulted(EXC_DB));
    CHECK(stack64(0) == TARGET && stack64(1) == CODE64_3 && (c->dr6 & DR6_BS));
    be_long(0);
    c->msr_star = 0x0083ull << 48;
    c->gpr[RCX] = TARGET;
    c->gpr[R11] = 2;
    c->eflags |= FLAG_TF;
    memset(ram + TARGET, 0x90, 4);
    RUN_N("\x48\x0f\x07", 2);
    CHECK(c->rip == TARGET + 1 && c->cpl == 3);
}

int main(void)
{
    if (!machine_create(KVS_CLOCK_REAL)) return 2;
    test_interrupts_protected();
    test_interrupts_long();
    test_interrupts_real();
    test_double_fault();
    test_iret_long();
    test_iret_protected();
    test_far();
    test_vendors();
    machine_destroy();
    return checks_report();
}
