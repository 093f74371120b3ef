/* Widths of linear addresses, their masking, and protection keys: 5-level paging, LAM, PKU. */
#include "../src/sys/xstate.h"
#include "sys_harness.h"

enum { PML5 = 0x14000, TABLES = 0x15000, PAGE = 0x200000 };
#define FAR57 0x00abcd0000000000ull /* canonical with 57 bits only; its tables are at TABLES */
#define LAM_CR4 CR4_LAM_SUP

/* The harness's tables under a fifth level. */
static void be_long57(uint8_t cpl)
{
    be_long(cpl);
    memset(ram + PML5, 0, 4 * PAGE_SIZE);
    st64(ram + PML5, PML4 | 7);
    st64(ram + PML5 + 8 * (FAR57 >> 48 & 511), TABLES | 7);
    st64(ram + TABLES + 8 * (FAR57 >> 39 & 511), (TABLES + 0x1000) | 7);
    st64(ram + TABLES + 0x1000, (TABLES + 0x2000) | 7);
    for (uint32_t n = 0; n < 512; n++) st64(ram + TABLES + 0x2000 + 8 * n, (uint64_t)n << 21 | 0xe7);
    c->cr3 = PML5;
    c->cr4 |= CR4_LA57;
    vcpu_update_linear(c);
    state_changed();
}
static void put_cr3(uint64_t v) { c->exc.pending = false; CHECK_EQ(write_cr3(c, v), 0); }
static void put_cr4(uint64_t v) { c->exc.pending = false; CHECK_EQ(write_cr4(c, v), 0); }
static bool is_gp(int st)
{
    bool ok = st == ST_FAULT && c->exc.pending && c->exc.vector == EXC_GP && c->exc.error == 0;
    c->exc.pending = false;
    return ok;
}
static void hide(uint32_t leaf, uint32_t index, uint32_t ecx, uint32_t eax)
{
    for (uint32_t k = 0; k < c->cpuid_count; k++) {
        if (c->cpuid[k].function != leaf || c->cpuid[k].index != index) continue;
        c->cpuid[k].ecx &= ~ecx;
        c->cpuid[k].eax &= ~eax;
    }
    cpuid_changed(c);
}
static void offer_all(void)
{
    cpuid_supported(c->cpuid, &c->cpuid_count);
    cpuid_changed(c);
}

static void test_five_levels(void)
{
    uint32_t out[4];
    /* SDM 3A "Control Registers": CR4.LA57 stays as it is in IA-32e mode. */
    be_long(0);
    CHECK(is_gp(write_cr4(c, c->cr4 | CR4_LA57)));
    be_long57(0);
    CHECK(is_gp(write_cr4(c, c->cr4 & ~(uint64_t)CR4_LA57)));
    be_protected(0);
    put_cr4(CR4_PAE | CR4_LA57);
    put_cr4(CR4_PAE);
    put_cr4(CR4_PAE | CR4_LA57);
    CHECK_EQ(write_efer(c, EFER_LME), 0);
    be_long57(0);
    st64(ram + PML5, ld64(ram + PML5));
    put_cr3(PML5);
    cpuid_lookup(c, 0x80000008, 0, out);
    CHECK_EQ(out[0] >> 8 & 255, 57);

    /* Data, stack and code beyond 48 bits. */
    be_long57(3);
    st64(ram + DATA, 0x1122334455667788ull);
    c->gpr[RDI] = FAR57 + DATA;
    RUN("\x48\x8b\x07");
    CHECK_EQ(c->gpr[RAX], 0x1122334455667788ull);
    c->gpr[RSP] = FAR57 + STACK3 + 0x800;
    RUN("\x50");
    CHECK_EQ(ld64(ram + STACK3 + 0x7f8), 0x1122334455667788ull);
    memcpy(ram + TARGET, "\x90\x90\x90\x90", 4);
    CHECK_EQ(run_at(FAR57 + TARGET, 3), KVS_EXIT_INSN_LIMIT);
    CHECK_EQ(c->rip, FAR57 + TARGET + 3);
    be_long57(3);
    c->gpr[RAX] = FAR57 + TARGET;
    RUN("\xff\xe0");
    CHECK_EQ(c->rip, FAR57 + TARGET);
    be_long57(0);
    c->gpr[RCX] = FAR57 + TARGET;
    c->gpr[R11] = 2;
    c->msr_star = 0x0083ull << 48;
    RUN("\x48\x0f\x07");
    CHECK_EQ(c->rip, FAR57 + TARGET);
    be_long57(0);
    c->gpr[RDI] = 0x0100000000000000ull;
    FAULTS("\x48\x8b\x07", EXC_GP, 0);
    be_long57(3);
    c->gpr[RSP] = 0x0100000000000008ull;
    FAULTS("\x50", EXC_SS, 0);
    /* A missing fifth-level entry, and a reserved bit in one. */
    be_long57(0);
    c->gpr[RDI] = BIT(50);
    RUN("\x48\x8b\x07");
    CHECK(faulted(EXC_PF) && c->cr2 == BIT(50));
    CHECK_EQ(stack64(0), 0);
    be_long57(0);
    st64(ram + PML5 + 8 * (FAR57 >> 48 & 511), TABLES | 0x87);
    c->gpr[RDI] = FAR57 + DATA;
    RUN("\x48\x8b\x07");
    CHECK(faulted(EXC_PF));
    CHECK_EQ(stack64(0), PF_P | PF_RSVD);
    /* With four levels the same address is not canonical. */
    be_long(0);
    c->gpr[RDI] = FAR57 + DATA;
    FAULTS("\x48\x8b\x07", EXC_GP, 0);
    be_long(0);
    c->gpr[RAX] = FAR57 + TARGET;
    FAULTS("\xff\xe0", EXC_GP, 0);

    /* Registers that hold addresses take 57 bits in either mode where CPUID has them, and 48 where it has not. */
    for (int wide = 0; wide < 2; wide++) {
        if (!wide) hide(7, 0, 1u << 16, 0);
        be_long(0);
        static const uint32_t msrs[] = { 0xc0000100, 0xc0000101, 0xc0000102, 0xc0000082, 0xc0000083, 0x175, 0x176 };
        for (uint32_t k = 0; k < ARRAY_SIZE(msrs); k++) {
            CHECK_EQ(msr_write(c, msrs[k], FAR57, false), wide ? 0 : -1);
            CHECK_EQ(msr_write(c, msrs[k], BIT(57), false), -1);
            CHECK_EQ(msr_write(c, msrs[k], 0x7fffffffffffull, false), 0);
        }
        be_long(0);
        c->gpr[RDI] = DATA;
        st16(ram + DATA, 0xff);
        st64(ram + DATA + 2, FAR57);
        RUN("\x0f\x01\x1f"); /* lidt */
        CHECK_EQ(c->idtr.base == FAR57, wide);
        be_long(0);
        st64(ram + DATA + 8, FAR57);
        st64(ram + DATA, 0);
        c->gpr[RSI] = DATA;
        c->gpr[RCX] = 0;
        RUN("\x66\x0f\x38\x82\x0e"); /* invpcid */
        CHECK_EQ(c->rip == CODE + 5, wide);
        cpuid_lookup(c, 0x80000008, 0, out);
        CHECK_EQ(out[0] >> 8 & 255, wide ? 57 : 48);
        CHECK_EQ(cr4_allowed(c) & CR4_LA57, wide ? CR4_LA57 : 0);
        offer_all();
    }
    /* An interrupt through an IDT at an address that is not canonical any more cannot be delivered. */
    be_long(0);
    c->idtr.base = FAR57;
    CHECK_EQ(RUN("\x0f\x0b"), KVS_EXIT_SHUTDOWN);
}

/* Runs a load through RDI, a store through it, PUSH with it as RSP; all must do the same. */
static bool reaches(uint64_t pointer, uint64_t where)
{
    bool ok = true;
    st64(ram + where, 0x123456789abcdef0ull);
    c->gpr[RDI] = pointer;
    c->gpr[RAX] = 0;
    RUN("\x48\x8b\x07");
    ok = ok && c->gpr[RAX] == 0x123456789abcdef0ull && c->rip == CODE + 3;
    c->gpr[RAX] = 77;
    RUN("\xf0\x48\x01\x07"); /* lock add [rdi], rax */
    ok = ok && ld64(ram + where) == 0x123456789abcdef0ull + 77;
    c->gpr[RSP] = pointer + 8;
    RUN("\x50");
    ok = ok && ld64(ram + where) == 77 && c->gpr[RSP] == pointer;
    c->gpr[RCX] = 1;
    RUN("\xf3\x48\xab"); /* rep stosq */
    ok = ok && c->gpr[RDI] == pointer + 8;
    return ok;
}
static bool refused(uint64_t pointer)
{
    c->gpr[RDI] = pointer;
    c->gpr[RSP] = (c->cpl == 3 ? STACK3 : STACK0) + 0x800;
    RUN("\x48\x8b\x07");
    return c->rip == HANDLERS + 16 * EXC_GP + 1 && stack64(0) == 0;
}

static void test_masking(void)
{
    const uint64_t low = DATA, high = 0xffff800000000000ull + DATA;
    be_long(0);
    CHECK(is_gp(write_cr3(c, PML4 | BIT(60))));
    put_cr3(PML4 | CR3_LAM_U48 | CR3_LAM_U57);
    put_cr3(PML4);
    for (int user = 0; user < 2; user++) {
        be_long(user ? 3 : 0);
        st64(ram + PML4 + 8 * 256, PDPT | 7); /* the upper half's first 512 GiB are the lower half's */
        state_changed();
        CHECK(reaches(low, DATA) && reaches(high, DATA));
        be_long(user ? 3 : 0);
        CHECK(refused(low | 0x2aull << 57));
        /* LAM48 for user pointers: bits 62:48 */
        be_long(user ? 3 : 0);
        put_cr3(PML4 | CR3_LAM_U48);
        for (int b = 48; b < 63; b++) CHECK(reaches(low | BIT(b), DATA), "%d", b);
        CHECK(refused(low | BIT(63)));
        be_long(user ? 3 : 0);
        put_cr3(PML4 | CR3_LAM_U48);
        CHECK(refused(low | BIT(47))); /* the sign stays */
        be_long(user ? 3 : 0);
        put_cr3(PML4 | CR3_LAM_U48);
        CHECK(refused(high ^ BIT(60))); /* not a user pointer */
        /* LAM57: bits 62:57, whatever LAM48 says */
        be_long(user ? 3 : 0);
        put_cr3(PML4 | CR3_LAM_U57 | CR3_LAM_U48);
        for (int b = 57; b < 63; b++) CHECK(reaches(low | BIT(b), DATA), "%d", b);
        for (int b = 47; b < 57; b++) {
            be_long(user ? 3 : 0);
            put_cr3(PML4 | CR3_LAM_U57 | CR3_LAM_U48);
            CHECK(refused(low | BIT(b)), "%d", b);
        }
        /* Pointers of the upper half follow CR4.LAM_SUP at any CPL. */
        be_long(user ? 3 : 0);
        st64(ram + PML4 + 8 * 256, PDPT | 7);
        put_cr4(c->cr4 | CR4_LAM_SUP);
        for (int b = 48; b < 63; b++) CHECK(reaches(high & ~BIT(b), DATA), "%d", b);
        CHECK(refused(low | BIT(60)));
    }
    /* With five levels CR4.LAM_SUP means LAM57, and LAM48 takes address bits away from user pointers. */
    be_long57(0);
    put_cr3(PML5 | CR3_LAM_U48);
    CHECK(reaches((FAR57 & (0x1ffull << 48)) | DATA, DATA));
    put_cr4(c->cr4 | CR4_LAM_SUP);
    CHECK(refused((0xff00000000000000ull | DATA) & ~BIT(56)));

    /* What is no data access goes by the whole address. */
    be_long(3);
    put_cr3(PML4 | CR3_LAM_U48);
    c->gpr[RAX] = TARGET | BIT(60);
    FAULTS("\xff\xe0", EXC_GP, 0);
    be_long(0);
    put_cr3(PML4 | CR3_LAM_U48);
    c->gpr[RDI] = DATA | BIT(60);
    RUN("\x0f\x01\x3f"); /* invlpg: nothing happens */
    CHECK_EQ(c->rip, CODE + 3);
    st64(ram + DATA, 0);
    st64(ram + DATA + 8, DATA);
    c->gpr[RCX] = 0;
    RUN("\x66\x0f\x38\x82\x0f"); /* invpcid: its descriptor may be tagged */
    CHECK_EQ(c->rip, CODE + 5);
    st64(ram + DATA + 8, DATA | BIT(60));
    FAULTS("\x66\x0f\x38\x82\x0f", EXC_GP, 0); /* the address in it may not */
    be_long(0);
    put_cr3(PML4 | CR3_LAM_U48);
    st64(ram + DATA + 2, DATA | BIT(60));
    c->gpr[RDI] = DATA;
    FAULTS("\x0f\x01\x1f", EXC_GP, 0);
    be_compat(0);
    put_cr3(PML4 | CR3_LAM_U48);
    c->gpr[RDI] = DATA;
    st32(ram + DATA, 5);
    RUN("\x8b\x07");
    CHECK_EQ(c->gpr[RAX], 5);
    /* A page fault reports the address without its metadata. */
    be_long(0);
    put_cr3(PML4 | CR3_LAM_U48);
    c->gpr[RDI] = 0x40000000 | 0x55ull << 50;
    RUN("\x48\x8b\x07");
    CHECK(faulted(EXC_PF));
    CHECK_EQ(c->cr2, 0x40000000);
    /* Breakpoints watch the address that is accessed. */
    be_long(0);
    put_cr3(PML4 | CR3_LAM_U48);
    CHECK_EQ(debug_write_register(c, 0, DATA), 0);
    CHECK_EQ(debug_write_register(c, 7, 0xf0001), 0);
    c->gpr[RDI] = DATA | BIT(55);
    run_n("\x48\x8b\x07", 3, 2);
    CHECK(faulted(EXC_DB) && (c->dr6 & 15) == 1);
    /* An interrupt uses the stack that RSP names. */
    be_long(0);
    put_cr3(PML4 | CR3_LAM_U48);
    c->gpr[RSP] = (STACK0 + 0x800) | BIT(58);
    RUN("\x0f\x0b");
    CHECK_EQ(c->rip, HANDLERS + 16 * EXC_UD + 1);
    CHECK_EQ(ld64(ram + STACK0 + 0x800 - 40), CODE);

    hide(7, 1, 0, 1u << 26);
    be_long(0);
    CHECK(is_gp(write_cr3(c, PML4 | CR3_LAM_U48)) && is_gp(write_cr3(c, PML4 | CR3_LAM_U57)) && is_gp(write_cr4(c, c->cr4 | CR4_LAM_SUP)));
    offer_all();
}

/* A user page at PAGE with key 5; PKRU as given. */
static void be_keyed(uint8_t cpl, uint32_t pkru, uint64_t cr0_wp)
{
    be_long(cpl);
    st64(ram + PD + 8, PAGE | 0xe7 | 5ull << 59);
    st64(ram + PAGE, 0x77);
    c->cr0 = (c->cr0 & ~(uint64_t)CR0_WP) | cr0_wp;
    put_cr4(c->cr4 | CR4_PKE);
    pkru_write(c, pkru);
    c->gpr[RDI] = PAGE;
}

/* The same as a supervisor page, with IA32_PKRS. */
static void be_supervisor_keyed(uint64_t pkrs, uint64_t cr0_wp)
{
    be_keyed(0, 3u << 10, cr0_wp);
    st64(ram + PD + 8, PAGE | 0xe3 | 5ull << 59);
    put_cr4(c->cr4 | CR4_PKS);
    CHECK_EQ(msr_write(c, 0x6e1, pkrs, false), 0);
}

static void test_keys(void)
{
    const uint32_t ad = 1u << 10, wd = 2u << 10;
    uint32_t out[4];
    /* The instructions. */
    be_long(0);
    FAULTS_UD("\x0f\x01\xee");
    be_long(3);
    FAULTS_UD("\x0f\x01\xef");
    cpuid_lookup(c, 7, 0, out);
    CHECK(out[2] & BIT(3) && !(out[2] & BIT(4)));
    for (int cpl = 0; cpl <= 3; cpl += 3) {
        be_keyed((uint8_t)cpl, 0, CR0_WP);
        cpuid_lookup(c, 7, 0, out);
        CHECK(out[2] & BIT(4));
        c->gpr[RAX] = 0xffffffff55555550ull;
        c->gpr[RCX] = c->gpr[RDX] = 0xabcd00000000ull;
        RUN("\x0f\x01\xef");
        CHECK_EQ(c->pkru, 0x55555550);
        c->gpr[RAX] = c->gpr[RDX] = ~0ull;
        RUN("\x0f\x01\xee");
        CHECK(c->gpr[RAX] == 0x55555550 && c->gpr[RDX] == 0);
        c->gpr[RCX] = 1;
        FAULTS("\x0f\x01\xee", EXC_GP, 0);
        be_keyed((uint8_t)cpl, 0, CR0_WP);
        c->gpr[RDX] = 1;
        c->gpr[RCX] = 0;
        FAULTS("\x0f\x01\xef", EXC_GP, 0);
        be_keyed((uint8_t)cpl, 0, CR0_WP);
        FAULTS_UD("\x66\x0f\x01\xef");
        be_keyed((uint8_t)cpl, 0, CR0_WP);
        FAULTS_UD("\xf3\x0f\x01\xee");
    }
    /* Loads and stores; whatever was cached before PKRU changed. */
    for (int cpl = 0; cpl <= 3; cpl += 3) {
        for (int wp = 0; wp < 2; wp++) {
            const uint32_t user = cpl ? PF_U : 0;
            static const uint32_t rights[] = { 0, 1, 2, 3 };
            for (uint32_t k = 0; k < 4; k++) {
                bool no_read = rights[k] & 1, no_write = no_read || ((rights[k] & 2) && (cpl || wp));
                be_keyed((uint8_t)cpl, 0, wp ? CR0_WP : 0);
                RUN("\x48\x8b\x07");
                RUN("\x48\x89\x07");
                CHECK_EQ(c->rip, CODE + 3);
                c->gpr[RAX] = rights[k] << 10;
                c->gpr[RCX] = c->gpr[RDX] = 0;
                RUN("\x0f\x01\xef");
                if (no_read) FAULTS("\x48\x8b\x07", EXC_PF, PF_P | PF_PK | user);
                else {
                    RUN("\x48\x8b\x07");
                    CHECK_EQ(c->rip, CODE + 3);
                }
                be_keyed((uint8_t)cpl, rights[k] << 10, wp ? CR0_WP : 0);
                if (no_write) FAULTS("\x48\x89\x07", EXC_PF, PF_P | PF_W | PF_PK | user);
                else {
                    RUN("\x48\x89\x07");
                    CHECK_EQ(c->rip, CODE + 3);
                }
                be_keyed((uint8_t)cpl, rights[k] << 10, wp ? CR0_WP : 0);
                if (no_write) FAULTS("\xf0\x48\xff\x07", EXC_PF, PF_P | PF_W | PF_PK | user);
                be_keyed((uint8_t)cpl, rights[k] << 10, wp ? CR0_WP : 0);
                memset(ram + PAGE, 0x90, 8);
                CHECK_EQ(run_at(PAGE, 2), KVS_EXIT_INSN_LIMIT); /* code needs no key */
                CHECK_EQ(c->rip, PAGE + 2);
            }
        }
    }
    /* A supervisor page has no key; a page that is denied anyway says that the key denies it too. */
    be_keyed(0, ad, CR0_WP);
    st64(ram + PD + 8, PAGE | 0xe3 | 5ull << 59);
    RUN("\x48\x8b\x07");
    CHECK_EQ(c->rip, CODE + 3);
    be_keyed(3, wd, CR0_WP);
    st64(ram + PD + 8, PAGE | 0xe5 | 5ull << 59);
    FAULTS("\x48\x89\x07", EXC_PF, PF_P | PF_W | PF_PK | PF_U);
    be_keyed(0, ad, CR0_WP);
    st64(ram + PD, 0xe3);
    c->cr4 |= CR4_SMAP;
    state_changed();
    FAULTS("\x48\x8b\x07", EXC_PF, PF_P | PF_PK);
    /* CR4.PKE off: no keys, and PKRU keeps its value. */
    be_keyed(3, ad | wd, CR0_WP);
    put_cr4(c->cr4 & ~(uint64_t)CR4_PKE);
    RUN("\x48\x89\x07");
    CHECK(c->rip == CODE + 3 && c->pkru == (ad | wd));

    /* Keys of supervisor pages: IA32_PKRS. */
    for (int wp = 0; wp < 2; wp++) {
        for (uint32_t rights = 0; rights < 4; rights++) {
            bool no_read = rights & 1, no_write = no_read || (rights & 2 && wp);
            be_supervisor_keyed(rights << 10, wp ? CR0_WP : 0);
            if (no_read) FAULTS("\x48\x8b\x07", EXC_PF, PF_P | PF_PK);
            else RUN("\x48\x8b\x07");
            if (!no_read) CHECK_EQ(c->rip, CODE + 3);
            be_supervisor_keyed(rights << 10, wp ? CR0_WP : 0);
            if (no_write) FAULTS("\x48\x89\x07", EXC_PF, PF_P | PF_W | PF_PK);
            else RUN("\x48\x89\x07");
            if (!no_write) CHECK_EQ(c->rip, CODE + 3);
            memset(ram + PAGE, 0x90, 8);
            CHECK_EQ(run_at(PAGE, 1), KVS_EXIT_INSN_LIMIT);
        }
    }
    /* WRMSR takes effect at once; neither register is about the other's pages. */
    be_supervisor_keyed(0, CR0_WP);
    RUN("\x48\x8b\x07");
    c->gpr[RCX] = 0x6e1;
    c->gpr[RDX] = 0;
    c->gpr[RAX] = ad;
    RUN("\x0f\x30");
    FAULTS("\x48\x8b\x07", EXC_PF, PF_P | PF_PK);
    be_keyed(0, 0, CR0_WP);
    put_cr4(c->cr4 | CR4_PKS);
    CHECK_EQ(msr_write(c, 0x6e1, ad, false), 0);
    RUN("\x48\x8b\x07");
    CHECK_EQ(c->rip, CODE + 3);
    be_supervisor_keyed(ad, CR0_WP);
    put_cr4(c->cr4 & ~(uint64_t)CR4_PKS);
    RUN("\x48\x8b\x07");
    CHECK(c->rip == CODE + 3 && c->msr_pkrs == ad);
    CHECK_EQ(msr_write(c, 0x6e1, 1ull << 32, false), -1);
    hide(7, 0, 1u << 31, 0);
    be_long(0);
    CHECK(is_gp(write_cr4(c, c->cr4 | CR4_PKS)));
    CHECK_EQ(msr_write(c, 0x6e1, 0, false), -1);
    offer_all();

    /* XSAVE and its relatives. */
    static const struct { const char *save, *load; uint32_t at; } forms[] = {
        { "\x48\x0f\xae\x27", "\x48\x0f\xae\x2f", XSTATE_PKRU_AT }, /* xsave64, xrstor64 */
        { "\x48\x0f\xc7\x27", "\x48\x0f\xae\x2f", XSTATE_YMM },     /* xsavec64: AVX is not asked for */
        { "\x48\x0f\xc7\x2f", "\x48\x0f\xc7\x1f", XSTATE_YMM },     /* xsaves64, xrstors64 */
    };
    for (uint32_t k = 0; k < ARRAY_SIZE(forms); k++) {
        be_keyed(0, 0xa5a50, CR0_WP);
        put_cr4(c->cr4 | CR4_OSXSAVE);
        c->xcr0 = XSTATE_X87 | XSTATE_SSE | XSTATE_PKRU;
        c->gpr[RDI] = DATA;
        c->gpr[RAX] = 0x202;
        c->gpr[RDX] = 0;
        memset(ram + DATA, 0, 4096);
        run_n(forms[k].save, 4, 1);
        CHECK_EQ(c->rip, CODE + 4);
        CHECK_EQ(ld64(ram + DATA + forms[k].at), 0xa5a50);
        CHECK_EQ(ld64(ram + DATA + 512) & 0x200, 0x200);
        st32(ram + DATA + forms[k].at, 0x500);
        run_n(forms[k].load, 4, 1);
        CHECK_EQ(c->rip, CODE + 4);
        CHECK_EQ(c->pkru, 0x500);
        st64(ram + DATA + 512, 0); /* not there: its initial value */
        run_n(forms[k].load, 4, 1);
        CHECK_EQ(c->pkru, 0);
    }
    cpuid_lookup(c, 0xd, 0, out);
    CHECK(out[1] == XSTATE_PKRU_AT + 8 && out[2] == XSTATE_PKRU_AT + 8 && (out[0] & 0x200));
    cpuid_lookup(c, 0xd, 1, out);
    CHECK_EQ(out[1], XSTATE_YMM + 8);
    cpuid_lookup(c, 0xd, 9, out);
    CHECK(out[0] == 8 && out[1] == XSTATE_PKRU_AT && out[2] == 0);
    /* The host's view. */
    struct kvs_xsave image;
    pkru_write(c, 0x12340);
    CHECK_EQ(kvs_vcpu_get_xsave(c, &image), 0);
    pkru_write(c, 0);
    CHECK_EQ(kvs_vcpu_set_xsave(c, &image), 0);
    CHECK_EQ(c->pkru, 0x12340);
    vcpu_init_reset(c);
    CHECK_EQ(c->pkru, 0x12340);
    vcpu_reset(c);
    CHECK_EQ(c->pkru, 0);
    hide(7, 0, 1u << 3, 0);
    be_long(0);
    CHECK(is_gp(write_cr4(c, c->cr4 | CR4_PKE)));
    FAULTS_UD("\x0f\x01\xee");
    CHECK(!xcr0_legal(c, 0x203));
    offer_all();
    CHECK(xcr0_legal(c, 0x203));
}

int main(void)
{
    if (!machine_create(KVS_CLOCK_REAL)) return 2;
    test_five_levels();
    test_masking();
    test_keys();
    machine_destroy();
    return checks_report();
}
