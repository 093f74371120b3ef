/*
 * MMX and SSE rows against the host: every row's register and memory form on random operands, under
 * random rounding and flush modes, first with all SIMD floating-point exceptions masked, then with
 * random masks, where the host's own trap is what the checked handlers must raise.
 */
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <ucontext.h>

#include "../src/interp/simd.h"

struct test_row { uint16_t row, op; uint8_t map, pp, opc, ext, mod; uint32_t at; uint8_t k[3]; const char *name; };
enum { NO_EXT = 0xff };
static const struct test_row rows[] = {
#define OPERATION(name, cls, mnem, feat, rd, wr, un)
#define ENC(name, map, pp, opc, mod, k0, k1, k2, at)                                              \
    { ROW_##map##_##pp##_##opc##_##mod, OP_##name, map, pp, opc, NO_EXT, mod, at, { k0, k1, k2 }, #name },
#define GRP(name, grp, pp, ext, mod, k0, k1, k2, at)                                              \
    { ROW_##grp##_##pp##_##ext##_##mod, OP_##name, grp, pp, 0, ext, mod, at, { k0, k1, k2 }, #name },
#include "../src/isa/isa_mmx.def"
#include "../src/isa/isa_sse.def"
};

/* Architectural state on both sides, as FXSAVE orders it. */
struct state {
    uint64_t gpr[16], flags;
    _Alignas(16) uint8_t fx[512];
    _Alignas(64) uint8_t mem[64];
};

static uint64_t seed = 0x9e3779b97f4a7c15u;
static uint64_t rnd(void)
{
    seed ^= seed << 13;
    seed ^= seed >> 7;
    seed ^= seed << 17;
    return seed * 0x2545f4914f6cdd1du;
}

static uint32_t float32(void)
{
    static const uint32_t special[] = { 0, 0x80000000, 0x3f800000, 0xbf800000, 0x7f800000, 0xff800000, 0x7fc00000, 0x7f800001,
        0x00000001, 0x007fffff, 0x00800000, 0x7f7fffff, 0x4f000000, 0xcf000000, 0x4effffff, 0x5f000000, 0x3f000000, 0x80400000 };
    switch (rnd() % 4) {
    case 0: return special[rnd() % ARRAY_SIZE(special)];
    case 1: return (uint32_t)rnd();
    case 2: return (uint32_t)(rnd() & 0x80ffffff);
    default: return (uint32_t)((rnd() & 0x80ffffff) + 0x3e000000);
    }
}
static uint64_t float64(void)
{
    static const uint64_t special[] = { 0, 1ull << 63, 0x3ff0000000000000, 0x7ff0000000000000, 0xfff0000000000000, 0x7ff8000000000000,
        0x7ff0000000000001, 1, 0x000fffffffffffff, 0x0010000000000000, 0x7fefffffffffffff, 0x41e0000000000000, 0xc3e0000000000000,
        0x3fe0000000000000, 0x36a0000000000000, 0x47f0000000000000 };
    switch (rnd() % 4) {
    case 0: return special[rnd() % ARRAY_SIZE(special)];
    case 1: return rnd();
    case 2: return rnd() & 0x801fffffffffffff;
    default: return (rnd() & 0x803fffffffffffff) + 0x3fd0000000000000;
    }
}
static void fill(uint8_t *p, uint32_t size)
{
    uint32_t how = (uint32_t)(rnd() % 4);
    for (uint32_t k = 0; k < size; k += 8) {
        uint64_t v = how == 0 ? rnd() : how == 1 ? float64() : float32() | (uint64_t)float32() << 32;
        if (how == 3 && rnd() % 2) v &= 0x0303030303030303u * (rnd() % 2) + 0xff00ff00u;
        st64(p + k, v);
    }
}

/* ---- the host ---- */
static uint8_t *code;
static volatile sig_atomic_t trapped;
static volatile uint32_t trap_mxcsr;
static void on_fpe(int sig, siginfo_t *info, void *context)
{
    ucontext_t *u = context;
    (void)sig, (void)info;
    trapped = 1;
    trap_mxcsr = u->uc_mcontext.fpregs->mxcsr;
    u->uc_mcontext.fpregs->mxcsr |= MXCSR_MASKS;
    u->uc_mcontext.gregs[REG_RIP] = (greg_t)(uintptr_t)(code + 32);
}

void host_run(struct state *s, const uint8_t *entry);
__asm__(".text\n.globl host_run\nhost_run:\n"
        "push %rbx\npush %rbp\npush %r12\npush %r13\npush %r14\npush %r15\npush %rsi\n"
        "mov %rdi,%r15\nfxrstor64 144(%r15)\n"
        "push 128(%r15)\npopfq\n"
        "mov (%r15),%rax\nmov 8(%r15),%rcx\nmov 16(%r15),%rdx\nmov 24(%r15),%rbx\nmov 40(%r15),%rbp\n"
        "mov 48(%r15),%rsi\nmov 56(%r15),%rdi\nmov 64(%r15),%r8\nmov 72(%r15),%r9\nmov 80(%r15),%r10\n"
        "mov 88(%r15),%r11\nmov 96(%r15),%r12\nmov 104(%r15),%r13\nmov 112(%r15),%r14\n"
        "call *(%rsp)\n"
        "mov %rax,(%r15)\nmov %rcx,8(%r15)\nmov %rdx,16(%r15)\nmov %rbx,24(%r15)\nmov %rbp,40(%r15)\n"
        "mov %rsi,48(%r15)\nmov %rdi,56(%r15)\nmov %r8,64(%r15)\nmov %r9,72(%r15)\nmov %r10,80(%r15)\n"
        "mov %r11,88(%r15)\nmov %r12,96(%r15)\nmov %r13,104(%r15)\nmov %r14,112(%r15)\n"
        "pushfq\npop 128(%r15)\nfxsave64 144(%r15)\nfninit\n"
        "pop %rsi\npop %r15\npop %r14\npop %r13\npop %r12\npop %rbp\npop %rbx\nret\n");
_Static_assert(offsetof(struct state, flags) == 128 && offsetof(struct state, fx) == 144, "host_run");

/* ---- the core ---- */
static int done(OPARGS)
{
    (void)c, (void)i, (void)budget;
    return 1000;
}

static void to_vcpu(struct kvs_vcpu *c, const struct state *s)
{
    for (int k = 0; k < 16; k++) c->gpr[k] = s->gpr[k];
    flags_set_status(c, (uint32_t)s->flags);
    c->fpu.fcw = ld16(s->fx);
    c->fpu.fsw = ld16(s->fx + 2);
    c->fpu.tags = s->fx[4];
    c->fpu.mxcsr = ld32(s->fx + 24);
    uint32_t top = c->fpu.fsw >> 11 & 7;
    for (uint32_t k = 0; k < 8; k++) memcpy(c->fpu.r[(top + k) & 7], s->fx + 32 + 16 * k, 10);
    for (uint32_t k = 0; k < 16; k++) memcpy(c->fpu.vec[k], s->fx + 160 + 16 * k, 16);
}
static void from_vcpu(const struct kvs_vcpu *c, uint32_t mxcsr, struct state *s)
{
    for (int k = 0; k < 15; k++) s->gpr[k] = c->gpr[k];
    s->flags = (s->flags & ~(uint64_t)FLAGS_STATUS) | flags_status(c);
    st16(s->fx + 2, c->fpu.fsw);
    s->fx[4] = c->fpu.tags;
    st32(s->fx + 24, mxcsr);
    uint32_t top = c->fpu.fsw >> 11 & 7;
    for (uint32_t k = 0; k < 8; k++) memcpy(s->fx + 32 + 16 * k, c->fpu.r[(top + k) & 7], 10);
    for (uint32_t k = 0; k < 16; k++) memcpy(s->fx + 160 + 16 * k, c->fpu.vec[k], 16);
}

static uint32_t encode(const struct test_row *r, bool memory, uint8_t *p)
{
    static const uint8_t opcodes[] = { [G0F71] = 0x71, [G0F72] = 0x72, [G0F73] = 0x73 };
    uint32_t n = 0;
    if (r->pp == P66) p[n++] = 0x66;
    if (r->pp == PF3) p[n++] = 0xf3;
    if (r->pp == PF2) p[n++] = 0xf2;
    uint8_t rex = 0x40 | (uint8_t)(rnd() & 0xd), modrm = (uint8_t)((rnd() & 0x38) | (memory ? 3 : 0xc0 | (rnd() & 7)));
    if (memory) rex &= 0xfe;
    /* General registers: not RSP and not R15, which hold up the test itself. */
    if ((modrm >> 3 & 7) == 4 || (modrm >> 3 & 7) == 7) modrm ^= 0x10;
    if (!memory && ((modrm & 7) == 4 || (modrm & 7) == 7)) modrm ^= 2;
    if (r->ext != NO_EXT) modrm = (uint8_t)((modrm & 0xc7) | r->ext << 3);
    if (rnd() % 4 || r->op == OP_crc32b || r->ext != NO_EXT) p[n++] = rex;
    p[n++] = 0x0f;
    if (r->ext == NO_EXT && r->map == M38) p[n++] = 0x38;
    if (r->ext == NO_EXT && r->map == M3A) p[n++] = 0x3a;
    p[n++] = r->ext != NO_EXT ? opcodes[r->map] : r->opc;
    if (r->k[0] != NA) p[n++] = modrm;
    if (r->k[1] == Ib || r->k[2] == Ib) p[n++] = (uint8_t)(rnd() % 2 ? rnd() : rnd() % 20);
    return n;
}

static bool same(const struct state *a, const struct state *b)
{
    return !memcmp(a->gpr, b->gpr, 15 * 8) && !memcmp(a->mem, b->mem, 64) && !((a->flags ^ b->flags) & FLAGS_STATUS) &&
           ld16(a->fx + 2) == ld16(b->fx + 2) && a->fx[4] == b->fx[4] && ld32(a->fx + 24) == ld32(b->fx + 24) &&
           !memcmp(a->fx + 32, b->fx + 32, 384);
}

static void dump(const struct state *s)
{
    printf("  flags %llx fsw %x tags %x mxcsr %x mem ", (unsigned long long)s->flags, ld16(s->fx + 2), s->fx[4], ld32(s->fx + 24));
    for (int k = 0; k < 16; k++) printf("%02x", s->mem[k]);
    for (int k = 0; k < 15; k++) printf("%s%016llx", k % 8 ? " " : "\n  ", (unsigned long long)s->gpr[k]);
    for (int k = 0; k < 16; k++)
        printf("%s%016llx:%016llx", k % 4 ? " " : "\n  ", (unsigned long long)ld64(s->fx + 168 + 16 * k),
               (unsigned long long)ld64(s->fx + 160 + 16 * k));
    for (int k = 0; k < 8; k++)
        printf("%s%04x:%016llx", k % 4 ? " " : "\n  ", ld16(s->fx + 40 + 16 * k), (unsigned long long)ld64(s->fx + 32 + 16 * k));
    printf("\n");
}

static int failures;
static struct state ours; /* its mem is the guest's memory operand, at the same address */
static void one(struct kvs_vcpu *c, const struct test_row *r, bool memory, bool traps)
{
    static struct state in, host;
    for (int k = 0; k < 15; k++) in.gpr[k] = rnd() % 3 ? rnd() : rnd() % 40;
    in.gpr[RBX] = (uintptr_t)ours.mem;
    in.flags = 0x202 | (rnd() & FLAGS_STATUS);
    memset(in.fx, 0, sizeof in.fx);
    st16(in.fx, 0x37f);
    st16(in.fx + 2, (uint16_t)(rnd() & 0x3800));
    in.fx[4] = (uint8_t)rnd();
    for (uint32_t k = 0; k < 8; k++) {
        fill(in.fx + 32 + 16 * k, 8);
        st16(in.fx + 40 + 16 * k, (uint16_t)rnd());
    }
    fill(in.fx + 160, 256);
    fill(in.mem, 64);
    uint32_t mxcsr = (uint32_t)(rnd() & 0x6000) | (rnd() % 4 ? 0 : MXCSR_FTZ) | (rnd() % 4 ? 0 : 0x40) |
                     (uint32_t)(rnd() & MXCSR_FLAGS) | MXCSR_MASKS;
    if (traps) mxcsr &= ~((uint32_t)rnd() & MXCSR_MASKS);
    st32(in.fx + 24, mxcsr);

    uint8_t bytes[16] = { 0 };
    uint32_t n = encode(r, memory, bytes);
    struct decoded d;
    if (decode(bytes, 15, 64, true, ~0ull, &d) != DECODE_OK || d.row != r->row || d.length != n) {
        printf("%s: does not decode to its row\n", r->name);
        failures++;
        return;
    }
    memcpy(code, bytes, n);
    memset(code + n, 0x90, 32 - n);
    code[32] = 0xc3;
    host = in;
    ours.mem[0] = 0;
    memcpy(ours.mem, in.mem, 64);
    trapped = 0;
    uint32_t saved = host_mxcsr_get();
    host_run(&host, code);
    host_mxcsr_set(saved);
    memcpy(host.mem, ours.mem, 64);
    if (trapped) st32(host.fx + 24, trap_mxcsr);

    uint32_t mode = MODE_64 | MODE_FLAT | MODE_PROTECTED | (~mxcsr & MXCSR_MASKS ? MODE_SSE_TRAPS : 0);
    ours = in;
    c->mode = mode;
    to_vcpu(c, &in);
    struct kvs_insn insn[2];
    memset(insn, 0, sizeof insn);
    lower(c, &d, mode, 0, insn);
    insn[1].fn = done;
    host_mxcsr_set(mxcsr | MXCSR_MASKS);
    int st = insn[0].fn(c, insn, 0);
    uint32_t after = mxcsr_read(c);
    host_mxcsr_set(saved);
    from_vcpu(c, after, &ours);

    bool our_trap = st == ST_FAULT && c->exc.pending && c->exc.vector == EXC_XM;
    if (our_trap != (bool)trapped || (!our_trap && st != 1000) || !same(&host, &ours)) {
        printf("%s %s:", r->name, memory ? "memory" : "register");
        for (uint32_t k = 0; k < n; k++) printf(" %02x", bytes[k]);
        printf("  status %d, host %s\n in:\n", st, trapped ? "traps" : "goes on");
        dump(&in);
        printf(" host:\n");
        dump(&host);
        printf(" ours:\n");
        dump(&ours);
        failures++;
    }
    c->exc.pending = false;
}

int main(int argc, char **argv)
{
    uint32_t rounds = argc > 1 ? (uint32_t)atoi(argv[1]) : 60;
    if (argc > 2) seed += (uint64_t)atoll(argv[2]) * 77777;
    struct kvs_vcpu *c = calloc(1, (sizeof *c + 63) & ~63ull);
    static struct tlb_class tlb[TLB_CLASSES];
    struct sigaction sa = { .sa_sigaction = on_fpe, .sa_flags = SA_SIGINFO };
    sigaction(SIGFPE, &sa, NULL);
    code = mmap(NULL, 4096, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (!c || code == MAP_FAILED) return 1;
    c->running = 1;
    c->cr4 = CR4_OSFXSR | CR4_OSXMMEXCPT;
    c->tlb = c->tlb_classes = tlb;
    uint64_t page = (uint64_t)(uintptr_t)ours.mem & ~(uint64_t)PAGE_MASK;
    for (uint32_t n = 0; n < TLB_CLASSES * TLB_KINDS; n++) {
        struct tlb_entry *e = tlb[n / TLB_KINDS].e[n % TLB_KINDS];
        for (uint32_t k = 0; k < TLB_SIZE; k++) e[k].tag = (uint64_t)(k ^ 1) << PAGE_SHIFT;
        e[tlb_index(page)] = (struct tlb_entry){ .tag = page, .addend = 0 };
    }
    uint32_t tested = 0;
    for (uint32_t n = 0; n < ARRAY_SIZE(rows); n++) {
        const struct test_row *r = &rows[n];
        if (r->op == OP_fxsave || r->op == OP_fxrstor || r->op == OP_ldmxcsr || r->op == OP_stmxcsr || r->op == OP_maskmovdqu ||
            r->op == OP_maskmovq || (r->ext != NO_EXT && r->map != G0F71 && r->map != G0F72 && r->map != G0F73)) continue;
        for (uint32_t t = 0; t < rounds && failures < 20; t++) {
            bool has_memory = r->mod != R && r->k[0] != NA, has_register = r->mod != M;
            if (has_register) one(c, r, false, false), one(c, r, false, true);
            if (has_memory) one(c, r, true, false), one(c, r, true, true);
        }
        tested++;
    }
    printf("simd: %u rows, %d failures\n", tested, failures);
    free(c);
    return failures ? 1 : 0;
}
