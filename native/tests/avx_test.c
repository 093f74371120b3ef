/*
 * XSAVE state, what makes AVX available, gathers that are interrupted, and the legality of every VEX
 * encoding against the host. What the instructions compute is the oracle's affair.
 */
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "sys_harness.h"
#include "../src/sys/xstate.h"

#define VADDPS "\xc5\xfc\x58\xc1"         /* vaddps ymm0,ymm0,ymm1 */
#define ANDN "\xc4\xe2\x78\xf2\xc1"       /* andn eax,eax,ecx */
#define XGETBV "\x0f\x01\xd0"
#define XSETBV "\x0f\x01\xd1"
#define XSAVE "\x48\x0f\xae\x23"          /* xsave64 [rbx] */
#define XRSTOR "\x48\x0f\xae\x2b"         /* xrstor64 [rbx] */
#define XSAVEC "\x48\x0f\xc7\x23"         /* xsavec64 [rbx] */

static void enable_avx(void)
{
    c->cr4 |= CR4_OSXSAVE | CR4_OSXMMEXCPT;
    c->xcr0 = 7;
    state_changed();
}

static void test_available(void)
{
    be_long(0);
    FAULTS_UD(VADDPS);
    be_long(0);
    c->cr4 |= CR4_OSXSAVE;
    state_changed();
    FAULTS_UD(VADDPS); /* XCR0 */
    be_long(0);
    enable_avx();
    c->cr0 |= CR0_TS;
    vcpu_update_mode(c);
    RUN(VADDPS);
    CHECK(faulted(EXC_NM), "TS");
    /* Neither CR0.EM nor CR4.OSFXSR has a say. */
    be_long(0);
    enable_avx();
    c->cr0 |= CR0_EM;
    c->cr4 &= ~(uint64_t)CR4_OSFXSR;
    vcpu_update_mode(c);
    RUN(VADDPS);
    CHECK_EQ(c->rip, CODE + 4);
    be_compat(0);
    enable_avx();
    RUN(VADDPS);
    CHECK_EQ(c->rip, CODE + 4);
    /* No VEX outside protected mode, for general registers neither. */
    be_real();
    enable_avx();
    FAULTS_UD(VADDPS);
    be_v86(3);
    enable_avx();
    FAULTS_UD(ANDN);
    be_long(3);
    RUN(ANDN);
    CHECK_EQ(c->rip, CODE + 5);
    /* Prefixes that may not stand before VEX. */
    static const char *const prefixed[] = { "\xf0" ANDN, "\x66" ANDN, "\xf2" ANDN, "\xf3" ANDN, "\x48" ANDN };
    for (uint32_t k = 0; k < ARRAY_SIZE(prefixed); k++) {
        be_long(0);
        run_n(prefixed[k], 6, 1);
        CHECK(faulted(EXC_UD), "prefix %u", k);
    }
    be_long(0);
    RUN("\x65\x67" ANDN);
    CHECK_EQ(c->rip, CODE + 7);
}

static void hide(uint32_t leaf, uint32_t reg, uint32_t bit)
{
    struct kvs_cpuid_entry2 e[64];
    uint32_t n = ARRAY_SIZE(e);
    CHECK_EQ(kvs_get_supported_cpuid(e, &n), 0);
    for (uint32_t k = 0; k < n; k++)
        if (e[k].function == leaf && e[k].index == 0) (&e[k].eax)[reg] &= ~(1u << bit);
    CHECK_EQ(kvs_vcpu_set_cpuid2(c, e, n), 0);
}

static void test_hidden(void)
{
    static const struct { uint32_t leaf, reg, bit; char bytes[8]; } rows[] = {
        { 7, 1, 3, ANDN }, { 1, 2, 28, VADDPS }, { 7, 1, 5, "\xc5\xfd\xfe\xc1" /* vpaddd ymm0,ymm0,ymm1 */ },
        { 1, 2, 12, "\xc4\xe2\x79\x98\xc1" /* vfmadd132ps */ }, { 1, 2, 29, "\xc4\xe2\x79\x13\xc1" /* vcvtph2ps */ },
        { 7, 2, 9, "\xc4\xe2\x7d\xdc\xc1" /* vaesenc ymm */ }, { 1, 2, 25, "\x66\x0f\x38\xdc\xc1" /* aesenc */ },
        { 1, 2, 28, "\xc4\xe2\x79\xdc\xc1" /* vaesenc xmm */ }, { 7, 2, 10, "\xc4\xe3\x7d\x44\xc1\x11" /* vpclmulqdq ymm */ },
        { 7, 2, 8, "\x66\x0f\x38\xcf\xc1" /* gf2p8mulb */ }, { 7, 1, 29, "\x0f\x38\xc8\xc1" /* sha1nexte */ },
        { 1, 2, 22, "\x0f\x38\xf0\x03" /* movbe */ }, { 1, 2, 30, "\x0f\xc7\xf0" /* rdrand */ }, { 7, 1, 8, "\xc4\xe2\x7b\xf6\xc1" /* mulx */ },
        { 7, 1, 19, "\x66\x0f\x38\xf6\xc1" /* adcx */ }, { 7, 2, 22, "\xf3\x0f\xc7\xf8" /* rdpid */ },
    };
    uint64_t lacks = host_lacks();
    for (uint32_t k = 0; k < ARRAY_SIZE(rows); k++) {
        for (int hidden = 0; hidden < 2; hidden++) {
            be_long(0);
            enable_avx();
            c->gpr[RBX] = DATA;
            if (hidden) hide(rows[k].leaf, rows[k].reg, rows[k].bit);
            else hide(0, 0, 31); /* nothing */
            state_changed();
            run_n(rows[k].bytes, 8, 1);
            bool ud = c->rip == HANDLERS + 16 * EXC_UD + 1;
            if (hidden || !lacks) CHECK_EQ(ud, hidden);
        }
    }
    /* Without LZCNT and BMI1 the prefix means nothing: BSR and BSF. */
    for (uint32_t k = 0; k < 2; k++) {
        be_long(0);
        if (k) hide(0x80000001, 2, 5);
        else hide(0, 0, 31);
        state_changed();
        c->gpr[RCX] = 0x100;
        RUN("\xf3\x0f\xbd\xc1");
        CHECK_EQ(c->gpr[RAX], k ? 8 : 23);
    }
    hide(0, 0, 31);
}

static void test_control(void)
{
    uint32_t out[4];
    be_long(0);
    FAULTS_UD(XGETBV);
    be_long(0);
    FAULTS_UD(XSAVE);
    be_long(0);
    c->cr4 |= CR4_OSXSAVE;
    state_changed();
    c->gpr[RCX] = 0;
    RUN(XGETBV);
    CHECK_EQ(c->gpr[RAX] | c->gpr[RDX], 1);
    cpuid_lookup(c, 0xd, 0, out);
    CHECK_EQ(out[1], 576);
    CHECK_EQ(out[2], XSTATE_AREA_MAX); /* PKRU is the last */
    uint64_t all = out[0];
    static const uint64_t wrong[] = { 0, 2, 5, 0xf, 1ull << 32 | 1, 1ull << 63 | 3 };
    for (uint32_t k = 0; k < ARRAY_SIZE(wrong); k++) {
        be_long(0);
        c->cr4 |= CR4_OSXSAVE;
        state_changed();
        c->gpr[RAX] = (uint32_t)wrong[k];
        c->gpr[RDX] = wrong[k] >> 32;
        FAULTS(XSETBV, EXC_GP, 0);
    }
    be_long(3);
    c->cr4 |= CR4_OSXSAVE;
    state_changed();
    c->gpr[RAX] = 1;
    FAULTS(XSETBV, EXC_GP, 0);
    be_long(0);
    c->cr4 |= CR4_OSXSAVE;
    state_changed();
    c->gpr[RAX] = all;
    c->gpr[RDX] = 0;
    RUN(XSETBV);
    CHECK_EQ(c->xcr0, all);
    cpuid_lookup(c, 0xd, 0, out);
    CHECK_EQ(out[1], out[2]);
    c->gpr[RCX] = 2;
    FAULTS(XGETBV, EXC_GP, 0);
    be_long(0);
    FAULTS_UD("\x66" XSAVE);
    /* Misaligned; then a mask without components writes the header alone. */
    be_long(0);
    enable_avx();
    c->gpr[RBX] = DATA + 32;
    FAULTS(XSAVE, EXC_GP, 0);
    be_long(0);
    enable_avx();
    memset(ram + DATA, 0xee, 1024);
    c->gpr[RBX] = DATA;
    c->gpr[RAX] = c->gpr[RDX] = 0;
    RUN(XSAVE);
    CHECK_EQ(ld64(ram + DATA + 512), 0xeeeeeeeeeeeeeeee);
    CHECK_EQ(ld64(ram + DATA + 24), 0xeeeeeeeeeeeeeeee);
}

static void test_images(void)
{
    struct kvs_xsave x, y;
    be_long(0);
    enable_avx();
    for (uint32_t k = 0; k < 16; k++)
        for (uint32_t n = 0; n < 32; n++) c->fpu.vec[k][n] = (uint8_t)(k * 32 + n);
    c->fpu.fcw = 0x37f;
    c->fpu.tags = 0;
    /* The compacted form leaves out what is in its initial state: x87 here. */
    memset(ram + DATA, 0, 1024);
    c->gpr[RBX] = DATA;
    c->gpr[RAX] = 7;
    c->gpr[RDX] = 0;
    RUN(XSAVEC);
    CHECK_EQ(ld64(ram + DATA + 512), 6);
    CHECK_EQ(ld64(ram + DATA + 520), XCOMP_COMPACT | 7);
    CHECK(!memcmp(ram + DATA + XSTATE_YMM + 48, c->fpu.vec[3] + 16, 16));
    CHECK_EQ(kvs_vcpu_get_xsave(c, &x), 0);
    CHECK_EQ(ld64((uint8_t *)x.region + 512), 0x207);
    /* Away and back, by the host and by the guest. */
    for (uint32_t k = 0; k < 16; k++) memset(c->fpu.vec[k], 0, 32);
    CHECK_EQ(kvs_vcpu_set_xsave(c, &x), 0);
    CHECK_EQ(c->fpu.vec[15][31], (uint8_t)(15 * 32 + 31));
    for (uint32_t k = 0; k < 16; k++) memset(c->fpu.vec[k], 0, 32);
    RUN(XRSTOR);
    CHECK_EQ(kvs_vcpu_get_xsave(c, &y), 0);
    CHECK(!memcmp((uint8_t *)x.region + 160, (uint8_t *)y.region + 160, sizeof x - 160));
    /* A component that the image does not hold becomes initial. */
    st64(ram + DATA + 512, 2);
    RUN(XRSTOR);
    CHECK_EQ(ld64(c->fpu.vec[1] + 16), 0);
    CHECK_EQ(c->fpu.vec[1][0], 32);
    st64(ram + DATA + 512, 8);
    FAULTS(XRSTOR, EXC_GP, 0);
    /* Without AVX in the CPUID table there is no such component. */
    hide(1, 2, 28);
    CHECK_EQ(kvs_vcpu_set_xsave(c, &x), -KVS_EINVAL);
    CHECK_EQ(kvs_vcpu_get_xsave(c, &x), 0);
    CHECK_EQ(ld64((uint8_t *)x.region + 512), 0x203);
    struct kvs_xcrs xcrs = { .nr_xcrs = 1, .xcrs[0] = { .value = 7 } };
    CHECK_EQ(kvs_vcpu_set_xcrs(c, &xcrs), -KVS_EINVAL);
    hide(0, 0, 31);
    CHECK_EQ(kvs_vcpu_set_xcrs(c, &xcrs), 0);
    xcrs.xcrs[0].value = 5;
    CHECK_EQ(kvs_vcpu_set_xcrs(c, &xcrs), -KVS_EINVAL);
    CHECK_EQ(kvs_vcpu_get_xcrs(c, &xcrs), 0);
    CHECK_EQ(xcrs.xcrs[0].value, 7);
}

/* vpgatherdd ymm1,[rbx+ymm2*4],ymm3 over a page that is not there yet. */
static void test_gather(void)
{
    static const uint32_t absent = 0x200000;
    be_long(0);
    enable_avx();
    c->fpu.vec[1][0] = 1;
    for (uint32_t k = 0; k < 8; k++) {
        st32(c->fpu.vec[2] + 4 * k, k < 5 ? k * 3 : (absent - DATA) / 4 + k);
        st32(c->fpu.vec[3] + 4 * k, k == 1 ? 0x7fffffff : 0x80000000);
        st32(c->fpu.vec[1] + 4 * k, 0x11111111);
        st32(ram + DATA + 12 * k, 100 + k);
        st32(ram + absent + 4 * k, 200 + k);
    }
    st64(ram + PD + 8, 0);
    tlb_flush_all(c);
    c->gpr[RBX] = DATA;
    FAULTS("\xc4\xe2\x65\x90\x0c\x93", EXC_PF, 0);
    CHECK_EQ(c->cr2, absent + 20);
    for (uint32_t k = 0; k < 8; k++) {
        CHECK_EQ(ld32(c->fpu.vec[3] + 4 * k), k < 5 ? 0 : 0x80000000);
        CHECK_EQ(ld32(c->fpu.vec[1] + 4 * k), k < 5 && k != 1 ? 100 + k : 0x11111111);
    }
    /* The page comes; the elements that are done are not touched again. */
    st64(ram + PD + 8, 0x2000e7);
    memset(ram + DATA, 0, 128);
    put_segment(SEG_CS, CODE64);
    state_changed();
    c->rip = CODE;
    c->insn_limit = vcpu_retired(c) + 1;
    kvs_vcpu_run(c);
    CHECK_EQ(c->rip, CODE + 6);
    for (uint32_t k = 0; k < 8; k++) {
        CHECK_EQ(ld32(c->fpu.vec[3] + 4 * k), 0);
        CHECK_EQ(ld32(c->fpu.vec[1] + 4 * k), k == 1 ? 0x11111111 : k < 5 ? 100 + k : 200 + k);
    }
    /* An element that is not selected may lie anywhere: vmaskmovps ymm1,ymm3,[rbx] before the missing page. */
    st64(ram + PD + 8, 0);
    tlb_flush_all(c);
    for (uint32_t k = 0; k < 8; k++) st32(c->fpu.vec[3] + 4 * k, k < 4 ? 0xffffffff : 0);
    st32(ram + absent - 16, 77);
    c->gpr[RBX] = absent - 16;
    RUN("\xc4\xe2\x65\x2c\x0b");
    CHECK_EQ(c->rip, CODE + 5);
    CHECK_EQ(ld32(c->fpu.vec[1]), 77);
    CHECK_EQ(ld32(c->fpu.vec[1] + 16), 0);
    st32(c->fpu.vec[3] + 16, 0xffffffff);
    FAULTS("\xc4\xe2\x65\x2e\x0b", EXC_PF, 2);
    CHECK_EQ(c->cr2, absent);
}

/* With the virtual clock a random number follows from where the run is. */
static void test_random(void)
{
    uint64_t first[8], again;
    be_long(0);
    for (uint32_t k = 0; k < 8; k++) {
        RUN("\x48\x0f\xc7\xf0");
        CHECK_EQ(flags_status(c), FLAG_CF);
        first[k] = c->gpr[RAX];
        for (uint32_t n = 0; n < k; n++) CHECK(first[k] != first[n], "%u", k);
    }
    struct kvs_core_state s = { 0 };
    CHECK_EQ(kvs_vcpu_get_core_state(c, &s), 0);
    RUN("\x48\x0f\xc7\xf8");
    again = c->gpr[RAX];
    CHECK_EQ(kvs_vcpu_set_core_state(c, &s), 0);
    RUN("\x48\x0f\xc7\xf8");
    CHECK_EQ(c->gpr[RAX], again);
}

/* ---- every VEX encoding: what is #UD here is #UD on the host, and the other way round ---- */
static sigjmp_buf back;
static void on_signal(int sig) { siglongjmp(back, sig); }

/* Encodings that the host has and the core does not: AVX-512's mask registers, AVX-VNNI and the like. */
static bool beyond(uint32_t map, uint32_t opcode)
{
    if (map == 1) return (opcode >= 0x41 && opcode <= 0x4b) || (opcode >= 0x90 && opcode <= 0x99);
    if (map == 2) return (opcode >= 0x48 && opcode <= 0x5f && opcode != 0x58 && opcode != 0x59 && opcode != 0x5a) || opcode == 0x72 ||
                         (opcode >= 0xb0 && opcode <= 0xb5) || (opcode >= 0xcb && opcode <= 0xcd) || (opcode >= 0xd0 && opcode <= 0xda) ||
                         (opcode >= 0xe0 && opcode <= 0xef);
    /* Map 3: mask shifts, SM3 and SM4, and FMA4, which may be there without being announced. */
    return (opcode >= 0x30 && opcode <= 0x33) || opcode == 0x48 || opcode == 0x49 || (opcode >= 0x5c && opcode <= 0x5f) ||
           (opcode >= 0x68 && opcode <= 0x7f) || opcode == 0xde;
}

static uint32_t legality(uint8_t *code, uint8_t *data)
{
    static uint32_t bad;
    static uint64_t features, checked;
    features = ~host_lacks();
    struct sigaction a = { .sa_handler = on_signal, .sa_flags = SA_NODEFER | SA_ONSTACK };
    static uint8_t stack[1 << 16];
    sigaltstack(&(stack_t){ .ss_sp = stack, .ss_size = sizeof stack }, NULL);
    static const int signals[] = { SIGILL, SIGSEGV, SIGBUS, SIGFPE, SIGTRAP };
    for (uint32_t k = 0; k < ARRAY_SIZE(signals); k++) sigaction(signals[k], &a, NULL);
    static uint32_t n;
    for (n = 0; n < 3u << 17; n++) {
        uint32_t map = n >> 17, opcode = n & 0xff, last = n >> 8 & 7, w = n >> 11 & 1, vvvv = n >> 12 & 1, mem = n >> 13 & 1, reg = n >> 14 & 7;
        map++;
        if (beyond(map, opcode)) continue;
        /* rax + rdx * 1 or xmm2 * 1: the data; no register of the host's is a destination by ModRM.rm but rax and rcx. */
        uint8_t bytes[16] = { 0xc4, (uint8_t)(0xe0 | map), (uint8_t)(w << 7 | (vvvv ? 0x78 : 0x70) | last), (uint8_t)opcode,
                              (uint8_t)((mem ? 0x04 : 0xc1) | reg << 3), mem ? 0x10 : 0, 0, 0 };
        struct decoded d;
        const bool legal = decode(bytes, 15, 64, true, features, &d) == DECODE_OK;
        if (legal && !mem && (reg == 4 || reg == 5) && (isa_row[d.row].k[0] == Gd || (d.attr & A_W0OSZ))) continue; /* ESP or EBP is written */
        memset(code, 0x90, 32);
        memcpy(code, bytes, legal ? d.length : 5);
        code[31] = 0xc3;
        int sig = sigsetjmp(back, 0);
        if (!sig)
            __asm__ volatile("push %%rbx\n\tpush %%rbp\n\tmov %1,%%rdi\n\txor %%edx,%%edx\n\tcall *%0\n\tpop %%rbp\n\tpop %%rbx"
                             : : "r"(code), "a"(data) : "rcx", "rdx", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15",
                               "memory", "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10",
                               "xmm11", "xmm12", "xmm13", "xmm14", "xmm15");
        uint32_t mxcsr = 0x1f80;
        __asm__ volatile("ldmxcsr %0" : : "m"(mxcsr));
        checked++;
        if ((sig != SIGILL) == legal) continue;
        if (bad++ < 20)
            printf("VEX map %u opcode %02x pp %u L %u W %u vvvv %s %s reg %u: %s on the host\n", map, opcode, last & 3, last >> 2, w,
                   vvvv ? "1111" : "1110", mem ? "memory" : "register", reg, sig == SIGILL ? "#UD" : "legal");
    }
    fflush(stdout);
    return bad || checked < 200000;
}

static void test_legality(void)
{
    if (host_lacks() & BIT(FEAT_AVX)) return;
    uint8_t *code = mmap(NULL, 4096, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    uint8_t *data = mmap(NULL, 1 << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    pid_t pid = fork();
    if (pid == 0) _exit(legality(code, data + (1 << 19)) ? 1 : 0);
    int status = 1;
    waitpid(pid, &status, 0);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0, "status %x", status);
}

int main(void)
{
    if (!machine_create(KVS_CLOCK_VIRTUAL)) return 1;
    test_control();
    if (!(host_lacks() & BIT(FEAT_AVX))) {
        test_available();
        test_images();
        test_gather();
    }
    test_hidden();
    test_random();
    test_legality();
    machine_destroy();
    return checks_report();
}
