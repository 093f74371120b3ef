/* MONITOR and MWAIT: faults, what ends a wait, on both clocks and across a saved state. */
#include <pthread.h>

#include "../src/clock.h"
#include "sys_harness.h"

#define MONITOR "\x0f\x01\xc8"
#define MWAIT "\x0f\x01\xc9"
enum { LINE = DATA + 0x140, CODE2 = CODE + 0x800 };

static void be_waiting(uint32_t ecx, uint32_t eflags)
{
    be_long(0);
    memset(ram + LINE, 0, 64);
    c->gpr[RAX] = LINE + 17;
    c->gpr[RCX] = 0;
    RUN(MONITOR);
    CHECK_EQ(c->rip, CODE + 3);
    c->gpr[RCX] = ecx;
    c->eflags |= eflags;
}
static uint64_t waits(void) { return c->stats.halts; }

static void send(uint8_t vector)
{
    struct kvs_msi msi = { .address_lo = 0xfee00000, .data = vector };
    CHECK(kvs_signal_msi(vm, &msi) >= 0);
}
/* As MWAIT leaves it. */
static void be_in_wait(uint32_t eflags)
{
    be_waiting(0, eflags);
    memset(ram + CODE, 0x90, 16);
    c->monitor.armed = false;
    c->monitor.waiting = true;
    c->monitor.deadline = clock_now(vm) + MWAIT_MAX;
    c->monitor.rip = c->rip = CODE + 3;
}
static void enable_apic(void)
{
    struct kvs_lapic_state s;
    CHECK_EQ(kvs_vcpu_get_lapic(c, &s), 0);
    st32((uint8_t *)s.regs + 0xf0, 0x1ff);
    CHECK_EQ(kvs_vcpu_set_lapic(c, &s), 0);
}

static void set_intel(void)
{
    for (uint32_t k = 0; k < c->cpuid_count; k++)
        if (c->cpuid[k].function == 0) c->cpuid[k].ebx = 0x756e6547, c->cpuid[k].edx = 0x49656e69, c->cpuid[k].ecx = 0x6c65746e;
    cpuid_changed(c);
}

static void test_faults(void)
{
    uint32_t out[4];
    cpuid_lookup(c, 5, 0, out);
    CHECK(out[0] == 64 && out[1] == 64 && out[2] == 3);
    be_long(3);
    FAULTS_UD(MONITOR);
    be_long(3);
    FAULTS_UD(MWAIT);
    /* AMD's HWCR opens them to user code. */
    be_long(3);
    c->msr_hwcr = BIT(9);
    c->gpr[RAX] = LINE;
    RUN(MONITOR);
    CHECK_EQ(c->rip, CODE + 3);
    be_long(0);
    c->gpr[RCX] = 1;
    FAULTS(MONITOR, EXC_GP, 0);
    be_long(0);
    c->gpr[RCX] = 2;
    FAULTS(MWAIT, EXC_GP, 0);
    be_long(0);
    c->gpr[RAX] = BIT(57);
    FAULTS(MONITOR, EXC_GP, 0);
    be_long(0);
    c->gpr[RAX] = 0x40000000;
    RUN(MONITOR);
    CHECK(faulted(EXC_PF) && c->cr2 == 0x40000000);
    CHECK_EQ(stack64(0), 0);
    /* Hidden: by CPUID, and on Intel's by IA32_MISC_ENABLE. */
    set_intel();
    be_long(0);
    c->gpr[RAX] = LINE;
    RUN(MONITOR);
    CHECK_EQ(c->rip, CODE + 3);
    CHECK_EQ(msr_write(c, 0x1a0, c->msr_misc_enable & ~MISC_ENABLE_MONITOR, false), 0);
    cpuid_lookup(c, 1, 0, out);
    CHECK(!(out[2] & BIT(3)));
    FAULTS_UD(MONITOR);
    cpuid_supported(c->cpuid, &c->cpuid_count);
    for (uint32_t k = 0; k < c->cpuid_count; k++)
        if (c->cpuid[k].function == 1) c->cpuid[k].ecx &= ~8u;
    cpuid_changed(c);
    be_long(0);
    FAULTS_UD(MONITOR);
    cpuid_supported(c->cpuid, &c->cpuid_count);
    cpuid_changed(c);
}

static void test_waits(bool virtual)
{
    /* Not armed, or written meanwhile: no wait. */
    be_long(0);
    uint64_t before = waits();
    RUN(MWAIT);
    CHECK(c->rip == CODE + 3 && waits() == before);
    for (uint32_t n = 0; n < 64; n++) {
        be_waiting(0, 0);
        ram[LINE + n] = 1;
        before = waits();
        RUN(MWAIT);
        CHECK(c->rip == CODE + 3 && waits() == before);
    }
    /* Alone it ends by itself; virtual time jumps to the end. */
    be_waiting(0, 0);
    before = waits();
    uint64_t start = clock_now(vm);
    RUN(MWAIT);
    CHECK(c->rip == CODE + 3 && waits() > before && clock_now(vm) >= start + MWAIT_MAX);
    if (virtual) CHECK(clock_now(vm) < start + MWAIT_MAX + 10);
    /* A second MWAIT is not armed. */
    before = waits();
    RUN(MWAIT);
    CHECK_EQ(waits(), before);
    /* An NMI or an interrupt ends the wait; the handler returns behind MWAIT. */
    for (int nmi = 0; nmi < 2; nmi++) {
        be_in_wait(nmi ? 0 : FLAG_IF);
        before = waits();
        if (nmi) {
            CHECK_EQ(kvs_vcpu_nmi(c), 0);
        } else {
            enable_apic();
            send(0x60);
        }
        c->insn_limit = vcpu_retired(c) + 1;
        CHECK_EQ(kvs_vcpu_run(c), 0);
        CHECK(faulted(nmi ? EXC_NMI : 0x60));
        CHECK(stack64(0) == CODE + 3 && waits() == before && !c->monitor.waiting);
    }
    be_waiting(1, 0);
    enable_apic();
    send(0x60);
    start = clock_now(vm);
    before = waits();
    RUN_N(MWAIT "\x90", 2);
    CHECK(c->rip == CODE + 4 && waits() == before);
    be_waiting(0, 0);
    enable_apic();
    send(0x60);
    before = waits();
    RUN_N(MWAIT "\x90", 2);
    CHECK(c->rip == CODE + 4 && waits() > before);
    /* The host gets in at once. */
    be_waiting(0, 0);
    c->run->immediate_exit = 1;
    memcpy(ram + CODE, MWAIT, 3);
    CHECK_EQ(run_at(CODE, 2), KVS_EXIT_INTR);
    c->run->immediate_exit = 0;
}

/* Half way through a wait: out, into a fresh state, and on. */
static void test_saved_state(void)
{
    struct kvs_core_state s, again;
    struct kvs_regs r;
    struct kvs_sregs sr;
    be_waiting(1, 0);
    CHECK_EQ(kvs_vcpu_get_core_state(c, &s), 0);
    CHECK(s.monitor_line == (LINE | 1) && s.mwait_rip == 0);
    memcpy(ram + CODE, MWAIT "\x90\x90", 5);
    block_cache_flush(c);
    c->rip = CODE;
    c->insn_limit = vcpu_retired(c) + 3;
    kvs_vcpu_kick(c);
    CHECK_EQ(kvs_vcpu_run(c), 0);
    CHECK_EQ(c->run->exit_reason, KVS_EXIT_INTR);
    c->monitor.armed = false; /* the wait itself, as MWAIT leaves it */
    c->monitor.waiting = c->monitor.any_interrupt = true;
    c->monitor.deadline = clock_now(vm) + 5000;
    c->monitor.rip = c->rip = CODE + 3;
    CHECK(!kvs_vcpu_get_core_state(c, &s) && !kvs_vcpu_get_regs(c, &r) && !kvs_vcpu_get_sregs(c, &sr));
    CHECK_EQ(s.monitor_line, LINE | 6);
    c->rip = 0;
    memset(&c->monitor, 0, sizeof c->monitor);
    CHECK(!kvs_vcpu_set_core_state(c, &s) && !kvs_vcpu_set_sregs(c, &sr) && !kvs_vcpu_set_regs(c, &r));
    CHECK_EQ(kvs_vcpu_get_core_state(c, &again), 0);
    CHECK(!memcmp(&s, &again, sizeof s));
    uint64_t before = waits(), start = clock_now(vm);
    c->insn_limit = vcpu_retired(c) + 1;
    CHECK_EQ(kvs_vcpu_run(c), 0);
    CHECK(c->rip == CODE + 4 && waits() > before && clock_now(vm) >= start + 5000 && clock_now(vm) < start + 6000);
    s.monitor_line = LINE | 8;
    CHECK_EQ(kvs_vcpu_set_core_state(c, &s), -KVS_ESTATE);
    s.monitor_line = BIT(50);
    CHECK_EQ(kvs_vcpu_set_core_state(c, &s), -KVS_ESTATE);
}

static void *run_other(void *other)
{
    kvs_vcpu_run(other);
    return NULL;
}

/* The other vCPU's store ends the wait long before its time. */
static void test_store(bool virtual)
{
    struct kvs_vcpu *first = c, *second;
    CHECK_EQ(kvs_vcpu_create(vm, 1, &second), 0);
    for (int turn = 0; turn < 3; turn++) {
        be_long(0);
        struct kvs_sregs s;
        struct kvs_regs r;
        CHECK(!kvs_vcpu_get_sregs(first, &s) && !kvs_vcpu_get_regs(first, &r));
        s.apic_base = 0xfee00800;
        CHECK_EQ(kvs_vcpu_set_sregs(second, &s), 0);
        r.rip = CODE2;
        r.rsp -= 0x400;
        r.rdi = LINE;
        r.rcx = 300000;
        CHECK_EQ(kvs_vcpu_set_regs(second, &r), 0);
        struct kvs_mp_state mp = { KVS_MP_STATE_RUNNABLE };
        CHECK_EQ(kvs_vcpu_set_mp_state(second, &mp), 0);
        memset(ram + LINE, 0, 64);
        /* monitor; mwait; cmp byte [rdi], 0; je -: until it is written */
        static const char waiter[] = "\x31\xc9\x48\x89\xf8\x0f\x01\xc8\x80\x3f\x00\x75\x05\x0f\x01\xc9\xeb\xee\xe6\x80\x90";
        /* loop; mov byte [rdi], 1; hlt */
        static const char writer[] = "\xe2\xfe\xc6\x07\x01\xf4";
        memcpy(ram + CODE, waiter, sizeof waiter);
        memcpy(ram + CODE2, writer, sizeof writer);
        block_cache_flush(first);
        block_cache_flush(second);
        c->gpr[RDI] = LINE;
        c->rip = CODE;
        c->insn_limit = UINT64_MAX;
        pthread_t thread;
        uint64_t start = clock_now(vm), before = waits();
        CHECK_EQ(pthread_create(&thread, NULL, run_other, second), 0);
        CHECK_EQ(kvs_vcpu_run(first), 0);
        kvs_vcpu_kick(second);
        pthread_join(thread, NULL);
        CHECK_EQ(first->run->exit_reason, KVS_EXIT_IO);
        CHECK_EQ(ram[LINE], 1);
        if (virtual) CHECK(waits() > before && clock_now(vm) - start < 2000000);
        first->run->immediate_exit = 1;
        CHECK_EQ(kvs_vcpu_run(first), 0);
        first->run->immediate_exit = 0;
    }
    CHECK_EQ(kvs_vcpu_destroy(second), 0);
}

int main(void)
{
    for (int virtual = 0; virtual < 2; virtual++) {
        if (!machine_create(virtual ? KVS_CLOCK_VIRTUAL : KVS_CLOCK_REAL)) return 2;
        if (!virtual) test_faults();
        test_waits(virtual);
        if (virtual) test_saved_state();
        test_store(virtual);
        machine_destroy();
    }
    return checks_report();
}
