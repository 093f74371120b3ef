/* Control state: CPUID, MSRs, control and debug registers, descriptor and query instructions, ports. */
#include "sys_harness.h"

static void test_cpuid(void)
{
    struct kvs_cpuid_entry2 e[64];
    uint32_t n = 0, out[4];
    CHECK_EQ(cpuid_supported(e, &n), -KVS_ERANGE);
    CHECK(n > 0 && n <= 64);
    CHECK_EQ(cpuid_supported(e, &n), 0);
    for (uint32_t k = 0; k < n; k++)
        for (uint32_t m = 0; m < k; m++)
            CHECK(e[k].function != e[m].function || e[k].index != e[m].index, "leaf %x twice", e[k].function);

    be_long(0);
    cpuid_lookup(c, 0, 0, out);
    CHECK(!memcmp(&out[1], "Auth", 4) && !memcmp(&out[3], "enti", 4) && !memcmp(&out[2], "cAMD", 4));
    CHECK(cpuid_is_amd(c));
    cpuid_lookup(c, out[0] + 1, 0, out);
    CHECK_EQ(out[0] | out[1] | out[2] | out[3], 0);
    cpuid_lookup(c, 1, 0, out);
    CHECK_EQ(out[1] >> 24, 0);
    CHECK(out[3] & BIT(9));
    CHECK(out[2] & BIT(26) && !(out[2] & BIT(27)), "OSXSAVE follows CR4");
    CHECK_EQ(write_cr4(c, c->cr4 | CR4_OSXSAVE), 0);
    cpuid_lookup(c, 1, 0, out);
    CHECK(out[2] & BIT(27));
    cpuid_lookup(c, 0x40000000, 0, out);
    CHECK(!memcmp(&out[1], "KVMKVMKVM\0\0\0", 12));
    cpuid_lookup(c, 0x80000002, 0, out);
    CHECK(!memcmp(out, "KvmSharp Virtual", 16));
    cpuid_lookup(c, 0x15, 0, out);
    CHECK_EQ((uint64_t)out[2] / 1000 * out[1] / out[0], clock_ns_to_tsc(vm, 1000000));
    cpuid_lookup(c, 0xb, 7, out);
    CHECK_EQ(out[2], 7);
    CHECK_EQ(out[0] | out[1], 0);
    /* Cache sizes of leaf 4 and of the AMD leaves agree. */
    for (uint32_t sub = 0; sub < 3; sub++) {
        cpuid_lookup(c, 4, sub, out);
        uint32_t size = ((out[1] >> 22) + 1) * ((out[1] >> 12 & 0x3ff) + 1) * ((out[1] & 0xfff) + 1) * (out[2] + 1);
        CHECK_EQ(size, sub < 2 ? 64 << 10 : 512 << 10);
    }
    /* The instruction zero-extends. */
    c->gpr[RAX] = 0xffffffff00000000ull;
    c->gpr[RBX] = ~0ull;
    RUN("\x0f\xa2");
    CHECK_EQ(c->rip, CODE + 2);
    CHECK_EQ(c->gpr[RBX], 0x68747541);

    /* Features follow the table. */
    CHECK(has_feature(c, FEAT_SSE42) && has_feature(c, FEAT_LM) && has_feature(c, FEAT_XSAVE) && has_feature(c, FEAT_VME));
    for (uint32_t k = 0; k < c->cpuid_count; k++)
        if (c->cpuid[k].function == 0x80000001) c->cpuid[k].edx &= ~(1u << 20);
    cpuid_changed(c);
    CHECK(!has_feature(c, FEAT_NX));
    c->efer &= ~(uint64_t)EFER_NX;
    CHECK_EQ(write_efer(c, c->efer | EFER_NX), ST_FAULT);
    cpuid_supported(c->cpuid, &c->cpuid_count);
    cpuid_changed(c);
    CHECK(has_feature(c, FEAT_NX));
}

static bool writes(uint32_t msr, uint64_t v)
{
    uint64_t back = ~v;
    return msr_write(c, msr, v, false) == 0 && msr_read(c, msr, &back, false) == 0 && back == v;
}
static bool refuses(uint32_t msr, uint64_t v) { return msr_write(c, msr, v, false) < 0; }

static void test_msrs(void)
{
    uint64_t v;
    be_long(0);
    CHECK(writes(0x277, 0x0007010600070406ull) && refuses(0x277, 2) && refuses(0x277, 8) && refuses(0x277, 3ull << 56));
    CHECK(writes(0x2ff, 0xc06) && refuses(0x2ff, 0x1c06) && refuses(0x2ff, 7));
    CHECK(writes(0x200, 0x80000006) && refuses(0x200, 0x80000106) && refuses(0x200, BIT(46)) && writes(0x201, 0x3fff80000800ull));
    CHECK(refuses(0x201, 1) && writes(0x250, 0x0606060606060606ull) && refuses(0x26f, 7) && refuses(0x210, 0));
    CHECK(writes(0xc0000082, 0xffffffff81000000ull) && refuses(0xc0000082, BIT(56)));
    CHECK(writes(0xc0000102, 0xffff800000000000ull) && refuses(0xc0000102, 0x0100000000000000ull));
    CHECK(writes(0x176, 0xffff800000000000ull) && refuses(0x175, BIT(56)) && writes(0x174, 0x10));
    CHECK(writes(0xc0000081, 0x0023001000000000ull));
    CHECK(writes(0xc0000100, 0x7fffffffffffull) && refuses(0xc0000100, BIT(63)));
    CHECK_EQ(c->gpr[GPR_FSBASE], 0x7fffffffffffull);
    CHECK(refuses(0xc0000080, BIT(12)) && refuses(0xc0000080, BIT(14)));
    CHECK(refuses(0xc0000080, EFER_SCE), "LME cannot change while paging");
    CHECK(msr_write(c, 0xc0000080, EFER_LME | EFER_SCE, false) == 0 && c->efer == (EFER_LME | EFER_LMA | EFER_SCE));
    CHECK(msr_read(c, 0x12345678, &v, false) < 0 && refuses(0x12345678, 0));
    CHECK(msr_read(c, 0xfe, &v, false) == 0 && v == 0x508 && refuses(0xfe, 0x508));
    CHECK(msr_read(c, 0x179, &v, false) == 0 && v == mce_capability() && (v & 255) == 10 && refuses(0x179, v) && refuses(0x401, 1) && msr_write(c, 0x401, 1, true) == 0);
    CHECK(msr_write(c, 0x401, 0, false) == 0 && refuses(0x428, 0));
    CHECK(msr_read(c, 0xc0010055, &v, false) == 0 && v == 0 && msr_read(c, 0xc0010010, &v, false) == 0 && v == 0);
    CHECK(msr_write(c, 0xc0010015, 0x40, false) == 0 && refuses(0xc0010015, BIT(0)));
    CHECK(msr_read(c, 0xc0011029, &v, false) == 0 && v == 2 && msr_write(c, 0xc0011029, 2, false) == 0);
    /* SDM 3B "Time-Stamp Counter Adjustment": each moves the other; the clock of this VM stands. */
    CHECK_EQ(kvs_clock_pause(c->vm, 1), 0);
    uint64_t tsc = tsc_read(c);
    CHECK(msr_read(c, 0x3b, &v, false) == 0 && v == 0);
    CHECK(writes(0x3b, 1000));
    CHECK_EQ(tsc_read(c), tsc + 1000);
    CHECK(msr_write(c, 0x10, tsc, false) == 0 && msr_read(c, 0x3b, &v, false) == 0 && v == 0);
    CHECK(writes(0x3b, (uint64_t)-500));
    CHECK_EQ(tsc_read(c), tsc - 500);
    CHECK(msr_write(c, 0x3b, 77, true) == 0); /* the host restores the value only */
    CHECK_EQ(tsc_read(c), tsc - 500);
    CHECK_EQ(kvs_clock_pause(c->vm, 0), 0);
    CHECK(msr_read(c, 0xc0000103, &v, false) == 0);
    CHECK(writes(0x4b564d05, 0) && refuses(0x4b564d05, 2));
    CHECK(msr_write(c, 0x10, 1000, false) == 0 && msr_read(c, 0x10, &v, false) == 0 && v >= 1000 && v < 1000 + 1000000000ull);

    uint32_t list[256], n = 256;
    CHECK_EQ(msr_index_list(list, &n), 0);
    for (uint32_t k = 0; k < n; k++) CHECK(msr_read(c, list[k], &v, true) == 0 && msr_write(c, list[k], v, true) == 0, "%x", list[k]);

    /* RDMSR and WRMSR. */
    be_long(0);
    c->gpr[RCX] = 0xffffffffc0000082ull;
    c->gpr[RAX] = 0xabcdef0081000000ull;
    c->gpr[RDX] = 0xffffffffull;
    RUN("\x0f\x30");
    CHECK_EQ(c->msr_lstar, 0xffffffff81000000ull);
    c->gpr[RAX] = c->gpr[RDX] = ~0ull;
    RUN("\x0f\x32");
    CHECK_EQ(c->gpr[RAX], 0x81000000);
    CHECK_EQ(c->gpr[RDX], 0xffffffff);
    c->gpr[RCX] = 0x12345678;
    FAULTS("\x0f\x32", EXC_GP, 0);
    be_long(3);
    c->gpr[RCX] = 0x10;
    FAULTS("\x0f\x32", EXC_GP, 0);
}

static bool is_gp(int st)
{
    bool ok = st == ST_FAULT && c->exc.pending && c->exc.vector == EXC_GP && c->exc.error == 0;
    c->exc.pending = false;
    return ok;
}
static bool cr0_refuses(uint64_t v) { return is_gp(write_cr0(c, v)); }
static bool cr3_refuses(uint64_t v) { return is_gp(write_cr3(c, v)); }
static bool cr4_refuses(uint64_t v) { return is_gp(write_cr4(c, v)); }

static void test_control_registers(void)
{
    be_protected(0);
    CHECK(cr0_refuses(CR0_PG) && cr0_refuses(CR0_PE | CR0_NW) && cr0_refuses(BIT(32) | CR0_PE));
    CHECK_EQ(write_cr0(c, CR0_PE | CR0_EM | BIT(7)), 0);
    CHECK_EQ(c->cr0, CR0_PE | CR0_EM | CR0_ET);
    CHECK(c->mode & MODE_X87_NM && c->mode & MODE_SSE_UD);
    CHECK(cr4_refuses(CR4_PCIDE) && cr4_refuses(BIT(40)) && cr4_refuses(BIT(23)));
    CHECK_EQ(write_cr3(c, 0xffffffff00001fffull), 0);
    CHECK_EQ(c->cr3, 0x1fff);

    /* Into IA-32e mode: PAE first, and not from a CS with L. */
    be_protected(0);
    CHECK_EQ(write_efer(c, EFER_LME | EFER_LMA), 0);
    CHECK_EQ(c->efer, EFER_LME);
    CHECK(cr0_refuses(CR0_PE | CR0_PG));
    CHECK_EQ(write_cr4(c, CR4_PAE), 0);
    CHECK_EQ(write_cr3(c, PML4), 0);
    c->seg[SEG_CS].attr |= ATTR_L;
    CHECK(cr0_refuses(CR0_PE | CR0_PG));
    c->seg[SEG_CS].attr &= ~ATTR_L;
    CHECK_EQ(write_cr0(c, CR0_PE | CR0_PG), 0);
    CHECK_EQ(c->efer, EFER_LME | EFER_LMA);
    CHECK(cr4_refuses(0));
    CHECK_EQ(write_cr0(c, CR0_PE), 0);
    CHECK_EQ(c->efer, EFER_LME);

    be_long(0);
    CHECK(cr0_refuses(CR0_PE) && cr3_refuses(BIT(63) | PML4) && cr3_refuses(BIT(46)) && cr3_refuses(BIT(52)));
    c->cr3 = PML4 | 8;
    CHECK(cr4_refuses(c->cr4 | CR4_PCIDE));
    c->cr3 = PML4;
    CHECK_EQ(write_cr4(c, c->cr4 | CR4_PCIDE), 0);
    CHECK_EQ(write_cr3(c, BIT(63) | PML4 | 5), 0);
    CHECK_EQ(c->cr3, PML4 | 5);
    CHECK_EQ(write_cr4(c, c->cr4 & ~(uint64_t)CR4_PCIDE), 0);

    /* PAE without IA-32e mode loads the PDPTRs and refuses their reserved bits. */
    be_protected(0);
    st64(ram + PDPT, PD | 1);
    for (uint32_t n = 1; n < 4; n++) st64(ram + PDPT + 8 * n, 0);
    CHECK_EQ(write_cr4(c, CR4_PAE), 0);
    CHECK_EQ(write_cr3(c, PDPT), 0);
    CHECK_EQ(write_cr0(c, CR0_PE | CR0_PG), 0);
    CHECK_EQ(c->pdptr[0], PD | 1);
    st64(ram + PDPT + 8, PD | 3);
    CHECK(cr3_refuses(PDPT));
    RUN("\x90");
    CHECK_EQ(c->rip, CODE + 1);

    /* The instructions. */
    be_long(0);
    c->gpr[R8] = 5;
    RUN("\x45\x0f\x22\xc0"); /* mov cr8, r8 */
    RUN("\x44\x0f\x20\xc1"); /* mov rcx, cr8 */
    CHECK_EQ(c->gpr[RCX], 5);
    c->gpr[RAX] = 16;
    FAULTS("\x44\x0f\x22\xc0", EXC_GP, 0);
    be_long(0);
    FAULTS_UD("\x0f\x20\xc8"); /* CR1 */
    be_long(0);
    RUN("\x0f\x20\x00"); /* mod is ignored */
    CHECK_EQ(c->gpr[RAX], c->cr0);
    CHECK_EQ(c->rip, CODE + 3);
    be_long(3);
    FAULTS("\x0f\x20\xc0", EXC_GP, 0);
    be_long(3);
    FAULTS("\x0f\x06", EXC_GP, 0); /* clts */
    be_protected(0);
    c->gpr[RAX] = 0xe;
    RUN("\x0f\x01\xf0"); /* lmsw ax: PE stays */
    CHECK_EQ(c->cr0 & 0xf, 0xf);
    c->gpr[RAX] = ~0ull;
    RUN("\x0f\x01\xe0"); /* smsw eax */
    CHECK_EQ(c->gpr[RAX], c->cr0);
}

static void test_debug_registers(void)
{
    be_long(0);
    c->gpr[RAX] = 0xffffffff;
    RUN("\x0f\x23\xf0"); /* mov dr6, rax */
    RUN("\x0f\x21\xf1");
    CHECK_EQ(c->gpr[RCX], 0xffffefff);
    c->gpr[RAX] = BIT(32);
    FAULTS("\x0f\x23\xf8", EXC_GP, 0);
    be_long(0);
    RUN("\x0f\x21\xe0"); /* DR4 is DR6 */
    CHECK_EQ(c->gpr[RAX], 0xffff0ff0);
    c->cr4 |= CR4_DE;
    FAULTS_UD("\x0f\x21\xe0");
    be_long(0);
    c->dr7 |= BIT(13); /* GD */
    RUN("\x0f\x21\xc0");
    CHECK(faulted(EXC_DB));
    CHECK_EQ(c->dr6, 0xffff0ff0 | BIT(13));
    CHECK_EQ(c->dr7, 0x400);
    CHECK_EQ(stack64(0), CODE);

    /* Instruction breakpoint: a fault, once, and RF lets the instruction pass. */
    be_long(0);
    c->dr[1] = CODE + 1;
    c->dr7 = 0x404;
    RUN_N("\x90\x90\x90", 2);
    CHECK(faulted(EXC_DB));
    CHECK_EQ(c->dr6, 0xffff0ff2);
    CHECK_EQ(stack64(0), CODE + 1);
    CHECK(!(stack64(2) & FLAG_RF));
    st64(ram + c->gpr[RSP] + 16, stack64(2) | FLAG_RF);
    memcpy(ram + 0x5000, "\x48\xcf", 2);
    block_cache_flush(c);
    run_at(0x5000, 3);
    CHECK_EQ(c->rip, CODE + 3);

    /* Behind MOV SS it is lost on Intel's processors, and comes on AMD's. */
    for (uint32_t amd = 0; amd < 2; amd++) {
        be_long(0);
        uint32_t vendor = c->cpuid[0].ebx;
        if (!amd) c->cpuid[0].ebx = 0x756e6547; /* "Genu" */
        c->gpr[RAX] = DATA0;
        c->dr[0] = CODE + 2;
        c->dr7 = 0x402;
        RUN_N("\x8e\xd0\x90\x90", 2);
        CHECK_EQ(amd ? faulted(EXC_DB) : c->rip == CODE + 3, 1);
        c->cpuid[0].ebx = vendor;
        c->dr7 = 0x400;
    }
    /* Data breakpoint: a trap behind the store. */
    be_long(0);
    c->dr[0] = DATA + 2;
    c->dr7 = 0x400 | 1 | 1 << 16 | 1 << 18;
    tlb_flush_all(c);
    c->gpr[RDI] = DATA;
    RUN_N("\x89\x07\x90", 2); /* mov [rdi], eax */
    CHECK(faulted(EXC_DB));
    CHECK_EQ(c->dr6 & 15, 1);
    CHECK_EQ(stack64(0), CODE + 2);
    be_long(0);
    c->dr[0] = DATA + 4;
    c->dr7 = 0x400 | 1 | 1 << 16;
    tlb_flush_all(c);
    c->gpr[RDI] = DATA;
    RUN_N("\x89\x07\x8b\x47\x04\x90", 3); /* beside it, and a load under a write breakpoint */
    CHECK_EQ(c->rip, CODE + 6);

    /* Single-step: a trap behind one instruction; INT clears TF and is not stepped. */
    be_long(0);
    c->eflags |= FLAG_TF;
    RUN_N("\x90\x90", 2);
    CHECK(faulted(EXC_DB));
    CHECK_EQ(c->dr6, 0xffff4ff0);
    CHECK_EQ(stack64(0), CODE + 1);
    CHECK(stack64(2) & FLAG_TF);
    be_long(0);
    c->eflags |= FLAG_TF;
    RUN_N("\xcd\x50", 2);
    CHECK(faulted(0x50));
    /* REP traps after each iteration, and retires once. */
    be_long(0);
    c->eflags |= FLAG_TF;
    c->gpr[RCX] = 2;
    c->gpr[RSI] = DATA;
    c->gpr[RDI] = DATA + 16;
    memcpy(ram + DATA, "xy", 2);
    RUN("\xf3\xa4\x90");
    CHECK(faulted(EXC_DB));
    CHECK_EQ(stack64(0), CODE);
    CHECK_EQ(c->gpr[RCX], 1);
    CHECK_EQ(ld16(ram + DATA + 16), 'x');
    c->eflags |= FLAG_TF;
    run_at(CODE, 2);
    CHECK(faulted(EXC_DB));
    CHECK_EQ(stack64(0), CODE + 2);
    CHECK_EQ(c->gpr[RCX], 0);
    be_long(0);
    c->eflags |= FLAG_TF;
    c->gpr[RCX] = 5;
    c->gpr[RDI] = DATA;
    c->gpr[RAX] = 'z';
    RUN_N("\xf3\xae\x90", 2); /* repe scasb ends at once */
    CHECK(faulted(EXC_DB));
    CHECK_EQ(stack64(0), CODE + 2);
    CHECK_EQ(c->gpr[RCX], 4);
    /* BTF: only branches trap, and it is off then. */
    be_long(0);
    c->eflags |= FLAG_TF;
    c->msr_debugctl = 2;
    RUN_N("\x90\x90\xeb\x02\x90\x90\x90", 4);
    CHECK(faulted(EXC_DB));
    CHECK_EQ(stack64(0), CODE + 6);
    CHECK_EQ(c->msr_debugctl, 0);
    /* MOV SS defers it by one instruction. */
    be_long(0);
    c->eflags |= FLAG_TF;
    c->gpr[RAX] = DATA0;
    RUN_N("\x8e\xd0\x90\x90", 3);
    CHECK(faulted(EXC_DB));
    CHECK_EQ(stack64(0), CODE + 3);
}

static void test_descriptor_tables(void)
{
    be_long(0);
    c->gpr[RDI] = DATA;
    RUN("\x0f\x01\x07"); /* sgdt */
    CHECK_EQ(ld16(ram + DATA), GDT_LIMIT);
    CHECK_EQ(ld64(ram + DATA + 2), GDT);
    st64(ram + DATA + 2, 0x0100000000000000ull);
    FAULTS("\x0f\x01\x17", EXC_GP, 0); /* lgdt, not canonical */
    be_protected(0);
    c->gpr[RDI] = DATA;
    st16(ram + DATA, 0x123);
    st32(ram + DATA + 2, 0xff001000);
    RUN("\x66\x0f\x01\x1f"); /* lidt, 16-bit operand size: 24 bits of base */
    CHECK_EQ(c->idtr.base, 0x1000);
    CHECK_EQ(c->idtr.limit, 0x123);
    be_long(3);
    c->gpr[RDI] = DATA;
    RUN("\x0f\x01\x07");
    CHECK_EQ(c->rip, CODE + 3);
    c->cr4 |= CR4_UMIP;
    FAULTS("\x0f\x01\x07", EXC_GP, 0);

    /* LLDT and LTR. */
    be_protected(0);
    c->gpr[RAX] = LDT_SEL;
    RUN("\x0f\x00\xd0");
    CHECK_EQ(c->ldtr.base, LDT);
    c->gpr[RAX] = 0;
    RUN("\x0f\x00\xd0");
    CHECK(c->ldtr.attr & ATTR_NULL);
    c->gpr[RAX] = DATA0;
    FAULTS("\x0f\x00\xd0", EXC_GP, DATA0);
    be_protected(0);
    c->gpr[RAX] = TSS2_SEL;
    RUN("\x0f\x00\xd8");
    CHECK_EQ(c->tr.base, TSS2);
    CHECK_EQ(gdt_type(TSS2_SEL), 0x8b);
    FAULTS("\x0f\x00\xd8", EXC_GP, TSS2_SEL); /* busy now */
    be_protected(0);
    c->gpr[RAX] = 0x10000 | TSS_SEL;
    RUN("\x0f\x00\xc9"); /* str ecx */
    CHECK_EQ(c->gpr[RCX], TSS_SEL);
    be_long(0);
    c->gpr[RAX] = TSS2_SEL;
    st32(ram + GDT + TSS2_SEL + 8, 0x01000000);
    st32(ram + GDT + TSS2_SEL + 12, 0);
    FAULTS("\x0f\x00\xd8", EXC_GP, TSS2_SEL); /* base 0x01000000'0000c000 is not canonical */
    be_long(0);
    c->gpr[RAX] = TSS2_SEL;
    st32(ram + GDT + TSS2_SEL + 8, 0xffffffff);
    st32(ram + GDT + TSS2_SEL + 4, ld32(ram + GDT + TSS2_SEL + 4) | 0xff000000u);
    RUN("\x0f\x00\xd8");
    CHECK_EQ(c->tr.base, 0xffffffffff00c000ull);
    be_real();
    RUN("\x0f\x00\xd8");
    CHECK(faulted(EXC_UD));
}

static bool zf(void) { return flags_status(c) & FLAG_ZF; }

static void test_queries(void)
{
    be_protected(3);
    c->gpr[RCX] = DATA3;
    RUN("\x0f\x02\xc1"); /* lar eax, ecx */
    CHECK(zf());
    CHECK_EQ(c->gpr[RAX], 0x00cff300);
    RUN("\x0f\x03\xc1"); /* lsl */
    CHECK(zf());
    CHECK_EQ(c->gpr[RAX], 0xffffffff);
    c->gpr[RCX] = DATA0 | 3;
    RUN("\x0f\x02\xc1");
    CHECK(!zf());
    CHECK_EQ(c->gpr[RAX], 0xffffffff);
    c->gpr[RCX] = 0;
    RUN("\x0f\x02\xc1");
    CHECK(!zf());
    c->gpr[RCX] = 0x1000;
    RUN("\x0f\x03\xc1");
    CHECK(!zf());
    c->gpr[RCX] = GATE | 3;
    RUN("\x0f\x02\xc1");
    CHECK(zf(), "LAR sees call gates");
    RUN("\x0f\x03\xc1");
    CHECK(!zf(), "LSL does not");
    c->gpr[RCX] = CONFORMING | 3;
    RUN("\x0f\x00\xe1"); /* verr */
    CHECK(zf());
    RUN("\x0f\x00\xe9"); /* verw */
    CHECK(!zf());
    be_protected(0);
    c->gpr[RCX] = EXECUTE_ONLY;
    RUN("\x0f\x00\xe1");
    CHECK(!zf());
    c->gpr[RCX] = READ_ONLY;
    RUN("\x0f\x00\xe9");
    CHECK(!zf());
    RUN("\x0f\x00\xe1");
    CHECK(zf());
    c->gpr[RAX] = 0x11110010;
    c->gpr[RCX] = 3;
    RUN("\x63\xc8"); /* arpl ax, cx */
    CHECK(zf());
    CHECK_EQ(c->gpr[RAX], 0x11110013);
    c->gpr[RCX] = 1;
    RUN("\x63\xc8");
    CHECK(!zf());
    CHECK_EQ(c->gpr[RAX], 0x11110013);
    be_real();
    RUN("\x0f\x02\xc1");
    CHECK(faulted(EXC_UD));
}

static uint32_t run_io(void)
{
    c->insn_limit = vcpu_retired(c) + 1;
    kvs_vcpu_run(c);
    return c->run->exit_reason;
}

static void test_ports(void)
{
    be_protected(0);
    c->gpr[RDX] = 0x3f8;
    c->gpr[RAX] = 0x11223344;
    CHECK_EQ(RUN("\xee"), KVS_EXIT_IO);
    CHECK(c->run->io.direction == KVS_EXIT_IO_OUT && c->run->io.size == 1 && c->run->io.port == 0x3f8);
    CHECK_EQ(c->run->io_data[0], 0x44);
    CHECK_EQ(c->rip, CODE + 1);
    CHECK_EQ(RUN("\xe5\x80"), KVS_EXIT_IO);
    CHECK(c->run->io.direction == KVS_EXIT_IO_IN && c->run->io.size == 4 && c->run->io.port == 0x80);
    CHECK_EQ(c->rip, CODE);
    st32(c->run->io_data, 0xcafef00d);
    CHECK_EQ(run_io(), KVS_EXIT_INSN_LIMIT);
    CHECK_EQ(c->gpr[RAX], 0xcafef00d);
    CHECK_EQ(c->rip, CODE + 2);

    /* REP OUTSB and INSW, an exit for each element. */
    c->gpr[RSI] = DATA;
    c->gpr[RCX] = 3;
    memcpy(ram + DATA, "abc", 3);
    uint32_t reason = RUN("\xf3\x6e");
    for (uint32_t n = 0; n < 3; n++, reason = run_io()) {
        CHECK_EQ(reason, KVS_EXIT_IO);
        CHECK_EQ(c->run->io_data[0], 'a' + n);
        CHECK_EQ(c->gpr[RCX], 2 - n);
        if (n == 2) break;
    }
    CHECK_EQ(c->rip, CODE + 2);
    c->gpr[RDI] = DATA + 4;
    c->gpr[RCX] = 2;
    c->eflags |= FLAG_DF;
    RUN("\xf3\x66\x6d");
    st16(c->run->io_data, 0x1111);
    run_io();
    st16(c->run->io_data, 0x2222);
    CHECK_EQ(run_io(), KVS_EXIT_INSN_LIMIT);
    CHECK_EQ(ld32(ram + DATA + 2), 0x11112222);
    CHECK_EQ(c->gpr[RDI], DATA);
    CHECK_EQ(c->gpr[RCX], 0);

    /* IOPL and the bitmap. */
    be_protected(3);
    c->gpr[RDX] = 0x80;
    st16(ram + TSS + 102, 0x80);
    memset(ram + TSS + 0x80, 0, 0x100);
    ram[TSS + 0x80 + 0x10] = 2;
    CHECK_EQ(RUN("\xee"), KVS_EXIT_IO);
    FAULTS("\xef", EXC_GP, 0); /* four ports from 0x80: 0x81 is closed */
    be_protected(3);
    c->gpr[RDX] = 0x81;
    memset(ram + TSS + 0x80, 0, 0x100);
    ram[TSS + 0x80 + 0x10] = 2;
    FAULTS("\xee", EXC_GP, 0);
    be_protected(3);
    c->gpr[RDX] = 0xfff8;
    c->tr.limit = 0x80 + 0x1fff;
    FAULTS("\xee", EXC_GP, 0); /* the byte behind the last is beyond the limit */
    be_protected(3);
    c->eflags |= FLAG_IOPL;
    c->gpr[RDX] = 0x81;
    CHECK_EQ(RUN("\xee"), KVS_EXIT_IO);
    be_v86(3);
    c->gpr[RDX] = 0x81;
    memset(ram + TSS + 0x80, 0xff, 0x100);
    RUN("\xee");
    CHECK(faulted(EXC_GP), "virtual-8086 mode asks the bitmap whatever the IOPL");
}

static void test_flags(void)
{
    be_long(0);
    RUN("\xfb\x90");
    CHECK_EQ(c->int_shadow, 2);
    CHECK(c->eflags & FLAG_IF);
    RUN("\xfa");
    CHECK(!(c->eflags & FLAG_IF));
    be_protected(3);
    FAULTS("\xfb", EXC_GP, 0);
    be_protected(3);
    c->eflags |= FLAG_IOPL;
    RUN("\xfb");
    CHECK(c->eflags & FLAG_IF);

    /* POPF: IOPL needs CPL 0, IF needs CPL <= IOPL, VM and RF are never loaded. */
    be_protected(3);
    st32(ram + c->gpr[RSP], 0x3f7fd7 & ~FLAG_TF);
    RUN("\x9d");
    CHECK_EQ(flags_read(c), FLAGS_STATUS | FLAG_DF | FLAG_NT | FLAG_AC | FLAG_ID | 2);
    be_protected(0);
    st32(ram + c->gpr[RSP], 0x3f7fd7 & ~FLAG_TF);
    RUN("\x9d");
    CHECK_EQ(flags_read(c), FLAGS_STATUS | FLAG_DF | FLAG_NT | FLAG_AC | FLAG_ID | FLAG_IF | FLAG_IOPL | 2);
    RUN("\x66\x9c");
    CHECK_EQ(ld16(ram + c->gpr[RSP]), (uint16_t)flags_read(c));
    be_v86(0);
    RUN("\x9c");
    CHECK(faulted(EXC_GP));
    be_v86(3);
    RUN("\x9c");
    CHECK_EQ(ld16(ram + STACK3 + 0x7fe) & 0x3002, 0x3002);
    be_v86(3);
    st16(ram + STACK3 + 0x800, 0);
    RUN("\x9d");
    CHECK_EQ(iopl(c), 3);
}

static void test_rest(void)
{
    static const char *const undefined[] = { "\x0f\x0b", "\x0f\xff\xc0", "\x0f\xb9\xc0", "\x0f\xaa", "\x0f\x01\xd0",
                                             "\x0f\x01\xd1" };
    for (uint32_t k = 0; k < ARRAY_SIZE(undefined); k++) {
        be_long(0);
        run_n(undefined[k], 3, 1);
        CHECK(faulted(EXC_UD), "%u", k);
    }
    be_long(3);
    FAULTS("\xf4", EXC_GP, 0);
    be_long(3);
    FAULTS("\x0f\x01\x3f", EXC_GP, 0); /* invlpg */
    be_long(3);
    FAULTS("\x0f\x09", EXC_GP, 0);
    be_long(3);
    FAULTS("\x0f\x33", EXC_GP, 0);
    be_long(0);
    RUN("\x0f\x01\xd9");
    CHECK_EQ(c->gpr[RAX], (uint64_t)-1000);
    be_long(0);
    c->cr4 |= CR4_SMAP;
    RUN("\x0f\x01\xcb");
    CHECK(c->eflags & FLAG_AC && c->tlb == &c->tlb_classes[TLB_SUPER_AC]);
    RUN("\x0f\x01\xca");
    CHECK(!(c->eflags & FLAG_AC) && c->tlb == &c->tlb_classes[TLB_SUPER]);
    be_long(3);
    FAULTS_UD("\x0f\x01\xcb");

    /* FS and GS bases. */
    be_long(0);
    FAULTS_UD("\xf3\x48\x0f\xae\xc0");
    be_long(0);
    c->cr4 |= CR4_FSGSBASE;
    c->gpr[RCX] = 0xffff800000001234ull;
    RUN("\xf3\x48\x0f\xae\xd1"); /* wrfsbase rcx */
    RUN("\xf3\x48\x0f\xae\xc0"); /* rdfsbase rax */
    CHECK_EQ(c->gpr[RAX], 0xffff800000001234ull);
    CHECK_EQ(c->gpr[GPR_FSBASE], 0xffff800000001234ull);
    c->gpr[RCX] = BIT(48);
    FAULTS("\xf3\x48\x0f\xae\xd9", EXC_GP, 0);
    be_long(0);
    c->msr_kernel_gs_base = 0x1000;
    RUN("\x0f\x01\xf8");
    CHECK_EQ(c->gpr[GPR_GSBASE], 0x1000);
    CHECK_EQ(c->msr_kernel_gs_base, 0);

    /* Pages: INVLPG and INVPCID see a changed entry. */
    be_long(0);
    c->gpr[RDI] = 0x200000;
    st64(ram + 0x200000, 0x1111);
    st64(ram + 0x000000, 0x2222);
    RUN("\x48\x8b\x07");
    CHECK_EQ(c->gpr[RAX], 0x1111);
    st64(ram + PD + 8, 0xe7); /* the second 2 MiB now lead to the first */
    RUN_N("\x0f\x01\x3f\x48\x8b\x07", 2);
    CHECK_EQ(c->gpr[RAX], 0x2222);
    st64(ram + PD + 8, 0x2000e7);
    memset(ram + DATA, 0, 16);
    c->gpr[RSI] = DATA;
    c->gpr[RCX] = 2;
    RUN_N("\x66\x0f\x38\x82\x0e\x48\x8b\x07", 2);
    CHECK_EQ(c->gpr[RAX], 0x1111);
    c->gpr[RCX] = 4;
    FAULTS("\x66\x0f\x38\x82\x0e", EXC_GP, 0);
    st64(ram, 0);

    /* CLFLUSH faults like a load. */
    be_long(0);
    c->gpr[RDI] = 0x40000000;
    RUN("\x0f\xae\x3f");
    CHECK(faulted(EXC_PF));
    CHECK_EQ(c->cr2, 0x40000000);
    CHECK_EQ(stack64(0), 0);
    be_long(0);
    c->gpr[RDI] = DATA;
    RUN("\x0f\xae\x3f");
    CHECK_EQ(c->rip, CODE + 3);

    /* The TSC runs, and CR4.TSD closes it to user code. */
    be_long(3);
    RUN("\x0f\x31");
    uint64_t t0 = c->gpr[RAX] | c->gpr[RDX] << 32;
    RUN("\x0f\x01\xf9");
    CHECK((c->gpr[RAX] | c->gpr[RDX] << 32) > t0);
    c->cr4 |= CR4_TSD;
    FAULTS("\x0f\x31", EXC_GP, 0);
}

/* What docs/support.md says of last-branch records and of x87 errors without CR0.NE. */
static void test_without_hardware(void)
{
    be_long(0);
    CHECK_EQ(msr_write(c, 0x1d9, 1, false), 0); /* DEBUGCTL.LBR */
    RUN_N("\xeb\x00\xeb\x00\x90", 3);
    for (uint32_t msr = 0x1db; msr <= 0x1de; msr++) {
        uint64_t v = ~0ull;
        CHECK_EQ(msr_read(c, msr, &v, false), 0);
        CHECK_EQ(v, 0);
        CHECK_EQ(msr_write(c, msr, 0, false), -1);
    }
    CHECK_EQ(msr_write(c, 0x1d9, 4, false), -1);
    static const char *const waiting[] = { "\x9b", "\xd9\xe8", "\x0f\x77", "\xd9\xd0" }; /* fwait, fld1, emms, fnop */
    for (uint32_t n = 0; n < 2 * ARRAY_SIZE(waiting); n++) {
        be_protected(0);
        if (n & 1) c->cr0 &= ~(uint64_t)CR0_NE;
        state_changed();
        c->fpu.fcw = 0x37b; /* division by zero is unmasked, and has happened */
        c->fpu.fsw = 0x8084;
        run_n(waiting[n / 2], 2, 1);
        CHECK(faulted(EXC_MF));
        CHECK_EQ(stack32(0), CODE);
    }
}

/*
 * Code that has run often at an address moves; the same with its fetch translation evicted by another 16 MiB away. The
 * routines are 4 MiB away from the code that calls them: an INVLPG among large pages drops as much.
 */
static void test_code_moves(bool small_pages, bool evicted)
{
    enum { TABLE = 0x12000, OLD = 0x230100, NEW = 0x30100, LINEAR = 0x830100,
           ALIAS = LINEAR + 0x40 + (TLB_SIZE << PAGE_SHIFT) }; /* + 0x40: elsewhere in the jump cache */
    static const char code[] = "\xba\xe8\x03\x00\x00\xff\xd1\xff\xca\x75\xfa" /* 1000 times: call rcx */
                               "\x41\xff\xd0"                                 /* call r8 */
                               "\x48\x89\x3e\x0f\x01\x39"                     /* mov [rsi], rdi; invlpg [rcx] */
                               "\xff\xd1\xeb\xfe";                            /* call rcx; jmp $ */
    be_long(0);
    memcpy(ram + OLD, "\xb8\x01\x00\x00\x00\xc3", 6);
    memcpy(ram + NEW, "\xb8\x02\x00\x00\x00\xc3", 6);
    ram[OLD + 0x40] = 0xc3;
    memset(ram + TABLE, 0, PAGE_SIZE);
    st64(ram + TABLE + 8 * (LINEAR >> 12 & 511), (OLD & ~0xfff) | 7);
    st64(ram + PD + 8 * (LINEAR >> 21), small_pages ? TABLE | 7 : (OLD & ~0x1fffff) | 0xe7);
    st64(ram + PD + 8 * (ALIAS >> 21), ld64(ram + PD + 8 * (LINEAR >> 21)));
    c->gpr[RCX] = LINEAR;
    c->gpr[R8] = evicted ? ALIAS : LINEAR;
    c->gpr[RSI] = small_pages ? TABLE + 8 * (LINEAR >> 12 & 511) : PD + 8 * (LINEAR >> 21);
    c->gpr[RDI] = small_pages ? (NEW & ~0xfff) | 7 : 0xe7;
    run_n(code, sizeof code - 1, 20000);
    CHECK_EQ(c->rip, CODE + sizeof code - 3);
    CHECK_EQ(c->gpr[RAX], 2);
}

/* No host instruction ever locks across cache lines, which stalls or is refused: such operands take the way around. */
static void test_split_locks(void)
{
    static const struct { const char *bytes; uint32_t length; } forms[] = {
        { "\xf0\xff\x07", 3 },             /* lock inc dword [rdi] */
        { "\xf0\x48\x01\x07", 4 },         /* lock add [rdi], rax */
        { "\x48\x87\x07", 3 },             /* xchg [rdi], rax */
        { "\xf0\x48\x0f\xb1\x07", 5 },     /* lock cmpxchg [rdi], rax */
        { "\xf0\x0f\xc1\x07", 4 },         /* lock xadd [rdi], eax */
        { "\xf0\x0f\xba\x2f\x03", 5 },     /* lock bts dword [rdi], 3 */
    };
    for (uint32_t n = 0; n < ARRAY_SIZE(forms); n++) {
        uint8_t code[16] = { 0xb9, 40, 0, 0, 0 }; /* mov ecx, 40 */
        uint32_t end = 5 + forms[n].length;
        memcpy(code + 5, forms[n].bytes, forms[n].length);
        memcpy(code + end, "\xff\xc9\x75", 3); /* dec ecx; jnz */
        code[end + 3] = (uint8_t)-(forms[n].length + 4);
        memcpy(code + end + 4, "\xeb\xfe", 2);
        be_long(0);
        memcpy(ram + CODE, code, sizeof code);
        for (uint32_t split = 0; split < 2; split++) {
            c->gpr[RDI] = DATA + (split ? 62 : 64);
            run_at(CODE, 200); /* translated, and in the soft TLB */
            c->rmw.la = 0;
            run_at(CODE, 200);
            CHECK(c->rmw.la == c->gpr[RDI] || !split, "form %u", n);
        }
    }
}

/* Returns to addresses that only an attacker has on the stack, without a call before them. */
static void test_odd_returns(void)
{
    static const uint64_t addresses[] = { BIT(63), BIT(63) | 1, BIT(47), ~BIT(63), 0 };
    for (uint32_t n = 0; n < ARRAY_SIZE(addresses); n++) {
        uint8_t code[] = { 0x48, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0x50, 0xc3 }; /* mov rax, imm64; push rax; ret */
        be_long(0);
        st64(code + 2, addresses[n]);
        memcpy(ram + CODE, code, sizeof code);
        memcpy(ram, "\xeb\xfe", 2);
        run_at(CODE, 60);
        CHECK_EQ(c->run->exit_reason, KVS_EXIT_INSN_LIMIT);
        if (!addresses[n]) {
            CHECK_EQ(c->rip, 0);
            continue;
        }
        CHECK(c->rip > HANDLERS + 16 * EXC_GP && c->rip < HANDLERS + 16 * EXC_GP + 64, "address %u, rip %llx", n, (unsigned long long)c->rip);
        CHECK_EQ(stack64(0), 0);
        CHECK_EQ(stack64(1), CODE + 11);
    }
}

int main(void)
{
    if (!machine_create(KVS_CLOCK_REAL)) return 2;
    for (int n = 0; n < 4; n++) test_code_moves(n & 1, n & 2);
    test_cpuid();
    test_msrs();
    test_control_registers();
    test_debug_registers();
    test_descriptor_tables();
    test_queries();
    test_ports();
    test_flags();
    test_rest();
    test_split_locks();
    test_odd_returns();
    test_without_hardware();
    machine_destroy();
    return checks_report();
}
