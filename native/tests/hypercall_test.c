/* Hypercalls of a guest, answered as by KVM; and the paravirtual MSRs. KVM documentation "Linux KVM Hypercall" */
#include "vmtest.h"
#include "../src/util.h"

static struct vt t;

static uint64_t call(const uint8_t *insn, uint64_t nr, uint64_t a0, uint64_t a1, uint64_t a2, uint64_t a3)
{
    uint8_t code[] = { insn[0], insn[1], insn[2], 0xe6, 0xf4 };
    vt_code(&t, code, sizeof code);
    struct kvs_regs r = { .rax = nr, .rbx = a0, .rcx = a1, .rdx = a2, .rsi = a3, .rip = VT_CODE, .rsp = VT_STACK, .rflags = 2 };
    vt_must(kvs_vcpu_set_regs(t.vcpu, &r), "set_regs");
    CHECK(vt_run(&t) == KVS_EXIT_IO);
    vt_must(kvs_vcpu_get_regs(t.vcpu, &r), "get_regs");
    CHECK(r.rbx == a0 && r.rcx == a1 && r.rdx == a2 && r.rsi == a3);
    return r.rax;
}
static const uint8_t vmcall[] = { 0x0f, 0x01, 0xc1 }, vmmcall[] = { 0x0f, 0x01, 0xd9 };

static int write_msr(uint32_t index, uint64_t value) /* 0, or the vector that the guest got */
{
    static const uint8_t code[] = { 0x0f, 0x30, 0xe6, 0xf4 };
    vt_code(&t, code, sizeof code);
    struct kvs_regs r = { .rcx = index, .rax = (uint32_t)value, .rdx = value >> 32, .rip = VT_CODE, .rsp = VT_STACK, .rflags = 2 };
    vt_must(kvs_vcpu_set_regs(t.vcpu, &r), "set_regs");
    if (vt_run(&t) == KVS_EXIT_IO) return 0;
    CHECK(t.run->exit_reason == KVS_EXIT_SHUTDOWN); /* no IDT */
    struct kvs_vcpu_events e = { 0 };
    vt_must(kvs_vcpu_set_events(t.vcpu, &e), "set_events");
    vt_long_mode(&t);
    return 13;
}

static void hide(uint32_t bits)
{
    struct kvs_cpuid_entry2 e[256];
    uint32_t n = 256;
    vt_must(kvs_get_supported_cpuid(e, &n), "cpuid");
    for (uint32_t i = 0; i < n; i++)
        if (e[i].function == 0x40000001) e[i].eax &= ~bits;
    vt_must(kvs_vcpu_set_cpuid2(t.vcpu, e, n), "set_cpuid2");
}

static void test_results(void)
{
    t = vt_create(4 << 20, KVS_CLOCK_VIRTUAL, 1);
    vt_long_mode(&t);
    CHECK(call(vmcall, 1000, 1, 2, 3, 4) == (uint64_t)-1000);
    CHECK(call(vmmcall, 1000, 1, 2, 3, 4) == (uint64_t)-1000);
    CHECK(call(vmmcall, ~0ull, 0, 0, 0, 0) == (uint64_t)-1000);
    CHECK(call(vmmcall, 1, 0, 0, 0, 0) == 0); /* KVM_HC_VAPIC_POLL_IRQ */
    CHECK(call(vmmcall, 2, 0, 0, 0, 0) == (uint64_t)-1000);
    CHECK(call(vmmcall, 12, 0, 0, 0, 0) == (uint64_t)-1000);
    CHECK(call(vmmcall, 11, 0, 0, 0, 0) == 0); /* yield */
    CHECK(call(vmmcall, 10, 0xffffffff, 0, 0xffffffff, 0) == 0); /* no such IDs */
    CHECK(call(vmmcall, 10, 1, 0, 0, 0x845) == (uint64_t)-22);
    CHECK(call(vmmcall, 10, 1, 0, 0, 0x40045) == (uint64_t)-22);
    CHECK(call(vmmcall, 10, 1, 0, 0, 0x45) == 0); /* the local APIC is software-disabled */
    CHECK(call(vmmcall, 5, 0, 99, 0, 0) == 0);

    /* The wall clock beside the TSC: in virtual time exactly. */
    memset(t.mem + 0x5000, 0xff, 64);
    CHECK(call(vmmcall, 9, 0x5000, 0, 0, 0) == 0);
    struct kvs_clock_data clock;
    vt_must(kvs_get_clock(t.vm, &clock), "get_clock");
    uint64_t ns = ld64(t.mem + 0x5000) * 1000000000 + ld64(t.mem + 0x5008);
    CHECK(ns <= clock.realtime && clock.realtime - ns < 100);
    CHECK(ns - 1577836800ull * 1000000000 == ld64(t.mem + 0x5010)); /* 1 GHz */
    CHECK(ld32(t.mem + 0x5018) == 0 && t.mem[0x503f] == 0 && t.mem[0x5040] == 0);
    CHECK(call(vmmcall, 9, 0x5000, 1, 0, 0) == (uint64_t)-95);
    CHECK(call(vmmcall, 9, 1ull << 40, 0, 0, 0) == (uint64_t)-14);

    /* Features that are hidden are not there. */
    hide(BIT(7) | BIT(11) | BIT(13));
    CHECK(call(vmmcall, 5, 0, 0, 0, 0) == (uint64_t)-1000);
    CHECK(call(vmmcall, 10, 1, 0, 0, 0x45) == (uint64_t)-1000);
    CHECK(call(vmmcall, 11, 0, 0, 0, 0) == (uint64_t)-1000);
    hide(0);

    /* Outside 64-bit mode: 32 bits of everything. */
    struct kvs_sregs s;
    vt_must(kvs_vcpu_get_sregs(t.vcpu, &s), "get_sregs");
    s.cs.l = 0;
    s.cs.db = 1;
    vt_must(kvs_vcpu_set_sregs(t.vcpu, &s), "set_sregs");
    CHECK(call(vmmcall, 0xabcd000003e8ull, 0, 0, 0, 0) == 0xfffffc18);
    CHECK(call(vmmcall, 0xabcd00000001ull, 0, 0, 0, 0) == 0);
    /* Not for user code. */
    s.cs.dpl = s.ss.dpl = 3;
    s.cs.selector |= 3;
    s.ss.selector |= 3;
    vt_must(kvs_vcpu_set_sregs(t.vcpu, &s), "set_sregs");
    static const uint8_t user[] = { 0x0f, 0x01, 0xd9, 0xeb, 0xfe };
    vt_code(&t, user, sizeof user);
    struct kvs_regs r = { .rax = 1, .rip = VT_CODE, .rsp = VT_STACK, .rflags = 2 };
    struct kvs_core_state core;
    vt_must(kvs_vcpu_get_core_state(t.vcpu, &core), "core");
    vt_must(kvs_vcpu_set_regs(t.vcpu, &r), "set_regs");
    vt_must(kvs_vcpu_set_insn_limit(t.vcpu, core.retired + 10), "limit");
    CHECK(vt_run(&t) == KVS_EXIT_INSN_LIMIT);
    vt_must(kvs_vcpu_get_regs(t.vcpu, &r), "get_regs");
    CHECK(r.rax == 0xffffffff);
    vt_destroy(&t);
}

/* KVM_HC_KICK_CPU ends one HLT, with interrupts off too, also when it comes first; a save keeps it. */
static void test_unhalt(void)
{
    static const uint8_t code[] = { 0xb8, 5, 0, 0, 0, 0x31, 0xc9, 0x0f, 0x01, 0xd9, 0xe6, 0xf4, 0xf4, 0xe6, 0xf5, 0xf4 };
    t = vt_create(4 << 20, KVS_CLOCK_VIRTUAL, 1);
    vt_long_mode(&t);
    vt_code(&t, code, sizeof code);
    CHECK(vt_run(&t) == KVS_EXIT_IO && t.run->io.port == 0xf4);
    struct kvs_core_state core;
    vt_must(kvs_vcpu_get_core_state(t.vcpu, &core), "core");
    CHECK(core.flags == KVS_CORE_PV_UNHALTED);
    core.flags = 0;
    vt_must(kvs_vcpu_set_core_state(t.vcpu, &core), "core");
    core.flags = KVS_CORE_PV_UNHALTED;
    vt_must(kvs_vcpu_set_core_state(t.vcpu, &core), "core");
    CHECK(vt_run(&t) == KVS_EXIT_IO && t.run->io.port == 0xf5);
    vt_must(kvs_vcpu_get_core_state(t.vcpu, &core), "core");
    CHECK(core.flags == 0);
    /* The second HLT waits until somebody stops it. */
    kvs_vcpu_kick(t.vcpu);
    for (int i = 0; i < 3; i++) {
        kvs_vcpu_kick(t.vcpu);
        vt_must(kvs_vcpu_run(t.vcpu), "run");
        CHECK(t.run->exit_reason == KVS_EXIT_INTR);
    }
    struct kvs_mp_state mp;
    vt_must(kvs_vcpu_get_mp_state(t.vcpu, &mp), "mp_state");
    CHECK(mp.mp_state == KVS_MP_STATE_RUNNABLE || mp.mp_state == KVS_MP_STATE_HALTED);
    core.flags = 1ull << 41;
    CHECK(kvs_vcpu_set_core_state(t.vcpu, &core) == -KVS_ESTATE);
    vt_destroy(&t);
}

static void test_msrs(void)
{
    enum { STEAL = 0x4b564d03, PV_EOI = 0x4b564d04, POLL = 0x4b564d05, ASYNC_PF = 0x4b564d02, ADJUST = 0x3b };
    t = vt_create(4 << 20, KVS_CLOCK_VIRTUAL, 1);
    vt_long_mode(&t);
    CHECK(write_msr(STEAL, 0x5041) == 0);
    CHECK(ld32(t.mem + 0x5040 + 8) == 2);
    CHECK(write_msr(STEAL, 0x5043) == 13);
    CHECK(write_msr(STEAL, 0x5061) == 13);
    CHECK(write_msr(PV_EOI, 0x5081) == 0);
    CHECK(write_msr(PV_EOI, 1ull << 40 | 1) == 13);
    CHECK(write_msr(POLL, 2) == 13);
    CHECK(write_msr(POLL, 0) == 0);
    CHECK(write_msr(ASYNC_PF, 0) == 13);
    CHECK(write_msr(ADJUST, 1000) == 0);
    struct kvs_msr_entry e[] = { { .index = STEAL }, { .index = PV_EOI }, { .index = ADJUST }, { .index = POLL } };
    CHECK(kvs_vcpu_get_msrs(t.vcpu, e, 4) == 4);
    CHECK(e[0].data == 0x5041 && e[1].data == 0x5081 && e[2].data == 1000 && e[3].data == 0);
    hide(BIT(5) | BIT(6) | BIT(12));
    CHECK(write_msr(STEAL, 0) == 13);
    CHECK(write_msr(PV_EOI, 0) == 13);
    CHECK(write_msr(POLL, 1) == 13);
    hide(0);
    /* A reset ends what the old guest had agreed on; the list of state to save has all of it. */
    uint32_t list[512], n = 512, found = 0;
    vt_must(kvs_get_msr_index_list(list, &n), "list");
    for (uint32_t i = 0; i < n; i++) found += list[i] == STEAL || list[i] == PV_EOI || list[i] == ADJUST || list[i] == POLL;
    CHECK(found == 4);
    vt_must(kvs_vcpu_reset(t.vcpu), "reset");
    CHECK(kvs_vcpu_get_msrs(t.vcpu, e, 4) == 4);
    CHECK(e[0].data == 0 && e[1].data == 0 && e[2].data == 0 && e[3].data == 1);
    vt_destroy(&t);
}

int main(void)
{
    test_results();
    test_unhalt();
    test_msrs();
    return vt_report();
}
