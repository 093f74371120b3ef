/* Machine checks; MSRs that come and go with CPUID; IA32_MISC_ENABLE; performance counters that are not there. */
#include "sys_harness.h"

#define VAL BIT(63)
#define OVER BIT(62)
#define UC BIT(61)

static uint64_t bank(uint32_t n, uint32_t reg)
{
    uint64_t v = 0;
    CHECK_EQ(msr_read(c, 0x400 + 4 * n + reg, &v, false), 0);
    return v;
}
static int32_t inject(uint32_t n, uint64_t status, uint64_t addr, uint64_t mcg_status)
{
    struct kvs_x86_mce m = { .status = status, .addr = addr, .misc = addr + 1, .mcg_status = mcg_status, .bank = (uint8_t)n };
    return kvs_vcpu_set_mce(c, &m);
}
static bool writes(uint32_t msr, uint64_t v)
{
    uint64_t back = ~v;
    return msr_write(c, msr, v, false) == 0 && msr_read(c, msr, &back, false) == 0 && back == v;
}
static bool refuses(uint32_t msr, uint64_t v) { return msr_write(c, msr, v, false) < 0; }
static bool unreadable(uint32_t msr)
{
    uint64_t v;
    return msr_read(c, msr, &v, false) < 0;
}
static void be_ready(void)
{
    be_long(0);
    c->cr4 |= CR4_MCE;
}

static void test_banks(void)
{
    be_ready();
    CHECK_EQ(bank(0, 0), ~0ull);
    for (uint32_t n = 0; n < 10; n++) {
        CHECK(writes(0x400 + 4 * n, 0) && writes(0x400 + 4 * n, ~0ull) && refuses(0x400 + 4 * n, 0xaaaaaaaaaaaaaaaaull));
        CHECK(writes(0x400 + 4 * n, ~BIT(10)) && writes(0x400 + 4 * n, ~1ull) && writes(0x400 + 4 * n, ~0ull));
        CHECK(writes(0x401 + 4 * n, 0) && refuses(0x401 + 4 * n, 1));
        CHECK(writes(0x402 + 4 * n, 0xaaaaaaaaaaaaaaaaull) && writes(0x403 + 4 * n, ~0ull));
    }
    CHECK(unreadable(0x428) && refuses(0x428, 0));
    CHECK(writes(0x17b, 0) && writes(0x17b, ~0ull) && refuses(0x17b, 1));
    CHECK(writes(0x17a, 7) && refuses(0x17a, 8));
    /* AMD's McStatusWrEn */
    CHECK(writes(0xc0010015, BIT(18)) && writes(0x401, 5) && writes(0xc0010015, 0) && refuses(0x401, 5));
}

static void test_injection(void)
{
    be_ready();
    CHECK_EQ(inject(10, VAL, 0, 0), -KVS_EINVAL);
    CHECK_EQ(inject(0, UC, 0, 0), -KVS_EINVAL);
    /* Corrected: stored, no exception; the second is noted as overflow. */
    CHECK_EQ(inject(3, VAL | 0x123, 0x5000, 0), 0);
    RUN("\x90");
    CHECK_EQ(c->rip, CODE + 1);
    CHECK(bank(3, 1) == (VAL | 0x123) && bank(3, 2) == 0x5000 && bank(3, 3) == 0x5001);
    CHECK_EQ(inject(3, VAL | 0x124, 0x6000, 0), 0);
    CHECK(bank(3, 1) == (VAL | OVER | 0x124) && bank(3, 2) == 0x6000);
    /* Uncorrected: #MC before the next instruction, without an error code, at its RIP. */
    CHECK_EQ(inject(2, VAL | UC | 0x151, 0x7000, 5), 0);
    RUN("\x90");
    CHECK(faulted(EXC_MC));
    CHECK_EQ(stack64(0), CODE);
    CHECK_EQ(stack64(2) & FLAG_RF, 0);
    CHECK(c->msr_mcg_status == 5 && bank(2, 1) == (VAL | UC | 0x151));
    /* A corrected one does not overwrite it. */
    CHECK_EQ(inject(2, VAL | 0x99, 0x8000, 0), 0);
    CHECK(bank(2, 1) == (VAL | UC | OVER | 0x151) && bank(2, 2) == 0x7000);
    /* While MCIP is set the next one is fatal. */
    CHECK_EQ(inject(1, VAL | UC, 0, 4), 0);
    CHECK_EQ(RUN("\x90"), KVS_EXIT_SHUTDOWN);
    be_ready();
    c->cr4 &= ~(uint64_t)CR4_MCE;
    CHECK_EQ(inject(1, VAL | UC, 0, 4), 0);
    CHECK_EQ(RUN("\x90"), KVS_EXIT_SHUTDOWN);
    /* A bank, or all, that do not report. */
    be_ready();
    CHECK(writes(0x404, 0));
    CHECK_EQ(inject(1, VAL | UC, 0x111, 4), 0);
    CHECK_EQ(bank(1, 1), 0);
    CHECK(writes(0x404, ~0ull) && writes(0x17b, 0));
    CHECK_EQ(inject(1, VAL | UC, 0x111, 4), 0);
    CHECK_EQ(bank(1, 1), 0);
    RUN("\x90");
    CHECK_EQ(c->rip, CODE + 1);

    /* It wakes a halted vCPU, comes before an NMI and whatever IF and an interrupt shadow say. */
    be_ready();
    c->insn_limit = vcpu_retired(c) + 1;
    memcpy(ram + CODE, "\xf4\x90", 2);
    c->rip = CODE;
    c->eflags &= ~FLAG_IF;
    atomic_store(&c->mp_state, KVS_MP_STATE_HALTED);
    c->rip = CODE + 1;
    vcpu_post_nmi(c);
    CHECK_EQ(inject(0, VAL | UC, 0, 4), 0);
    kvs_vcpu_run(c);
    CHECK_EQ(c->run->exit_reason, KVS_EXIT_INSN_LIMIT);
    CHECK_EQ(c->rip, HANDLERS + 16 * EXC_NMI + 1); /* the NMI in the first instruction of #MC's handler */
    CHECK_EQ(stack64(0), HANDLERS + 16 * EXC_MC);
    be_ready();
    c->int_shadow = 1;
    CHECK_EQ(inject(0, VAL | UC, 0, 4), 0);
    RUN("\x90");
    CHECK(faulted(EXC_MC));
    /* An exception that waits is delivered first; then its handler is interrupted. */
    be_ready();
    raise_page_fault(c, 0x1234, 2);
    CHECK_EQ(inject(0, VAL | UC, 0, 4), 0);
    RUN("\x90");
    CHECK(faulted(EXC_MC) && c->cr2 == 0x1234);
    CHECK_EQ(stack64(0), HANDLERS + 16 * EXC_PF);
    /* A pending one is state. */
    be_ready();
    struct kvs_core_state s;
    CHECK_EQ(inject(0, VAL | UC, 0, 4), 0);
    CHECK_EQ(kvs_vcpu_get_core_state(c, &s), 0);
    be_ready();
    CHECK_EQ(kvs_vcpu_set_core_state(c, &s), 0);
    RUN("\x90");
    CHECK(faulted(EXC_MC));
    /* Reset clears everything, INIT nothing of the banks. */
    be_ready();
    CHECK_EQ(inject(0, VAL | UC, 0, 4), 0);
    vcpu_init_reset(c);
    CHECK(bank(0, 1) == (VAL | UC));
    vcpu_reset(c);
    CHECK(bank(0, 1) == 0 && c->msr_mcg_status == 0);
}

static void set_vendor(bool amd)
{
    cpuid_supported(c->cpuid, &c->cpuid_count);
    for (uint32_t k = 0; k < c->cpuid_count && !amd; k++)
        if (c->cpuid[k].function == 0) c->cpuid[k].ebx = 0x756e6547, c->cpuid[k].edx = 0x49656e69, c->cpuid[k].ecx = 0x6c65746e;
    cpuid_changed(c);
}
static void hide(uint32_t leaf, uint32_t ebx, uint32_t ecx, uint32_t edx)
{
    for (uint32_t k = 0; k < c->cpuid_count; k++) {
        if (c->cpuid[k].function != leaf || c->cpuid[k].index) continue;
        c->cpuid[k].ebx &= ~ebx;
        c->cpuid[k].ecx &= ~ecx;
        c->cpuid[k].edx &= ~edx;
    }
    cpuid_changed(c);
}

static void test_speculation_registers(void)
{
    uint64_t v;
    set_vendor(true);
    be_ready();
    for (uint64_t n = 0; n < 8; n++) CHECK(writes(0x48, n));
    CHECK(refuses(0x48, 8) && refuses(0x48, BIT(63)));
    CHECK(unreadable(0x49) && msr_write(c, 0x49, 1, false) == 0 && msr_write(c, 0x49, 0, false) == 0 && refuses(0x49, 2));
    CHECK(unreadable(0x10b) && msr_write(c, 0x10b, 1, false) == 0 && refuses(0x10b, 3));
    CHECK(msr_read(c, 0x10a, &v, false) == 0 && (v & 3) == 3 && refuses(0x10a, v) && msr_write(c, 0x10a, v, true) == 0);
    hide(7, 0, 0, 1u << 27 | 1u << 31);
    hide(0x80000008, 1u << 15 | 1u << 24, 0, 0);
    CHECK(writes(0x48, 1) && refuses(0x48, 2) && refuses(0x48, 4));
    hide(7, 0, 0, ~0u);
    CHECK(writes(0x48, 1) && msr_write(c, 0x49, 1, false) == 0); /* AMD's bits are still there */
    CHECK(unreadable(0x10a) && refuses(0x10b, 1));
    hide(0x80000008, ~0u, 0, 0);
    CHECK(unreadable(0x48) && refuses(0x48, 0) && refuses(0x49, 0) && unreadable(0x3a));
    set_vendor(true);
}

static void test_misc_enable(void)
{
    uint32_t out[4];
    uint64_t v;
    set_vendor(false);
    be_ready();
    CHECK(msr_read(c, 0x1a0, &v, false) == 0 && (v & (1 | BIT(11) | BIT(12))) == (1 | BIT(11) | BIT(12)));
    static const uint8_t reserved[] = { 1, 2, 4, 5, 6, 8, 9, 10, 13, 14, 15, 17, 19, 20, 21, 24, 33, 35, 63 };
    for (uint32_t k = 0; k < ARRAY_SIZE(reserved); k++) CHECK(refuses(0x1a0, v | BIT(reserved[k])), "%u", reserved[k]);
    CHECK(msr_write(c, 0x1a0, v & ~BIT(11), false) == 0 && c->msr_misc_enable == v); /* it only tells */
    CHECK(writes(0x1a0, v | BIT(22)));
    cpuid_lookup(c, 0, 0, out);
    CHECK_EQ(out[0], 2);
    cpuid_lookup(c, 7, 0, out);
    CHECK(writes(0x1a0, v | BIT(34)));
    cpuid_lookup(c, 0x80000001, 0, out);
    CHECK(!(out[3] & BIT(20)) && !(efer_allowed(c) & EFER_NX));
    CHECK(writes(0x1a0, v));
    CHECK(efer_allowed(c) & EFER_NX);
    CHECK(msr_read(c, 0x3a, &v, false) == 0 && v == 1 && refuses(0x3a, 1));
    CHECK(unreadable(0xc0010015));
    /* No counters on Intel's; AMD's four stand still. */
    for (int amd = 0; amd < 2; amd++) {
        set_vendor(amd);
        be_long(0);
        c->gpr[RCX] = 3;
        c->gpr[RAX] = 77;
        if (amd) {
            RUN("\x0f\x33");
            CHECK(c->rip == CODE + 2 && c->gpr[RAX] == 0 && c->gpr[RDX] == 0);
            c->gpr[RCX] = 4;
            FAULTS("\x0f\x33", EXC_GP, 0);
            be_long(3);
            FAULTS("\x0f\x33", EXC_GP, 0);
            be_long(3);
            CHECK_EQ(write_cr4(c, c->cr4 | CR4_PCE), 0);
            RUN("\x0f\x33");
            CHECK_EQ(c->rip, CODE + 2);
        } else {
            FAULTS("\x0f\x33", EXC_GP, 0);
        }
    }
}

int main(void)
{
    if (!machine_create(KVS_CLOCK_REAL)) return 2;
    test_banks();
    test_injection();
    test_speculation_registers();
    test_misc_enable();
    machine_destroy();
    return checks_report();
}
