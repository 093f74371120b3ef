/*
 * 32-bit code in flat segments has handlers of its own: what they do must be what the general ones do. Each random
 * instruction runs twice, in flat segments and with a limit in a segment that it does not use, which takes them away.
 */
#include "sys_harness.h"

enum { WINDOW = 2 * PAGE_SIZE, CASES = 3000 };
static uint64_t seed = 0x32;

static uint64_t rnd(void) { return random_next(&seed); }
static uint32_t below(uint32_t n) { return (uint32_t)(rnd() >> 33) % n; }

struct form { uint8_t length, bytes[3]; bool modrm; };
static const struct form forms[] = {
    { 1, { 0x8b }, true }, { 1, { 0x89 }, true }, { 1, { 0x8a }, true }, { 1, { 0x88 }, true }, { 2, { 0x66, 0x89 }, true },
    { 1, { 0x03 }, true }, { 1, { 0x11 }, true }, { 1, { 0x39 }, true }, { 1, { 0x85 }, true }, { 1, { 0xff }, true },
    { 1, { 0x8f }, true }, { 1, { 0xf7 }, true }, { 1, { 0xd3 }, true }, { 2, { 0x0f, 0xb6 }, true }, { 2, { 0x0f, 0xbf }, true },
    { 2, { 0x0f, 0xa3 }, true }, { 2, { 0x0f, 0xb1 }, true }, { 2, { 0x0f, 0x44 }, true }, { 1, { 0x8d }, true }, { 1, { 0x87 }, true },
    { 3, { 0xf3, 0x0f, 0x6f }, true }, { 2, { 0x0f, 0x11 }, true }, { 1, { 0xd9 }, true }, { 1, { 0xdd }, true },
    { 2, { 0x36, 0x8b }, true }, { 2, { 0x2e, 0x8b }, true }, { 2, { 0x64, 0x8b }, true }, { 2, { 0x67, 0x8b }, true }, { 1, { 0x81 }, true },
    { 2, { 0xf0, 0x01 }, true }, { 1, { 0xc4 }, true },
    { 1, { 0xa1 }, false }, { 1, { 0xa3 }, false }, { 1, { 0xa0 }, false }, { 1, { 0xa2 }, false }, { 2, { 0x66, 0xa3 }, false },
    { 1, { 0x50 }, false }, { 1, { 0x57 }, false }, { 1, { 0x58 }, false }, { 1, { 0x5c }, false }, { 1, { 0x68 }, false },
    { 1, { 0x6a }, false }, { 1, { 0xc9 }, false }, { 1, { 0xc3 }, false }, { 1, { 0xc2 }, false }, { 1, { 0xe8 }, false },
    { 2, { 0x66, 0x50 }, false }, { 2, { 0x66, 0xc9 }, false }, { 1, { 0xa5 }, false }, { 1, { 0xc8 }, false }, { 1, { 0x60 }, false },
};

/* A linear address: inside pages that were used, at their edges, around 0 and 4 GiB, or any. */
static uint32_t address(void)
{
    static const uint32_t places[] = { DATA, DATA + PAGE_SIZE, DATA + WINDOW, STACK3, 0, RAM_SIZE };
    if (below(32) == 0) return (uint32_t)rnd();
    return places[below(8) < 6 ? below(2) : below(ARRAY_SIZE(places))] + (below(4) ? below(PAGE_SIZE) : below(24) - 12);
}

static uint32_t make(uint8_t *p, uint64_t *gpr)
{
    const struct form *f = &forms[below(ARRAY_SIZE(forms))];
    memcpy(p, f->bytes, f->length);
    uint8_t *q = p + f->length;
    for (uint32_t n = 0; n < 16; n++) gpr[n] = rnd();
    gpr[RSP] = address();
    gpr[RBP] = address();
    gpr[RSI] = address();
    gpr[RDI] = address();
    st32(q, address());
    st32(q + 4, (uint32_t)rnd());
    if (!f->modrm) return (uint32_t)(q - p) + 4;
    uint32_t mod = below(3), reg = below(8), rm = below(8), sib = (uint32_t)rnd() & 0xff, target = address(), disp = (uint32_t)rnd();
    if (below(3)) disp = below(256) - 128;
    *q++ = (uint8_t)(mod << 6 | reg << 3 | rm);
    bool absolute = mod == 0 && rm == 5;
    if (rm == 4) {
        *q++ = (uint8_t)sib;
        uint32_t index = sib >> 3 & 7, base = sib & 7;
        absolute = mod == 0 && base == 5;
        if (below(3) && index != 4) gpr[index] = (uint32_t)(below(64) - 32);
        if (mod == 1) disp = (uint32_t)(int8_t)disp;
        if (mod == 0 && base != 5) disp = 0;
        uint32_t sum = target - disp - (index == 4 ? 0 : (uint32_t)gpr[index] << (sib >> 6));
        if (absolute) disp += sum;
        else gpr[base] = sum;
    } else if (absolute) {
        disp = target;
    } else {
        if (mod == 1) disp = (uint32_t)(int8_t)disp;
        if (mod == 0) disp = 0;
        gpr[rm] = target - disp;
    }
    if (below(8) == 0) gpr[below(8)] |= rnd() << 32; /* what 64-bit code has left */
    st32(q, disp);
    return (uint32_t)(q - p) + 8;
}

struct outcome {
    uint64_t gpr[16], rip, cr2, retired;
    uint32_t flags, reason, cpl;
    struct fpu fpu;
    uint8_t memory[RAM_SIZE >> 4];
};

static void warm(uint32_t at)
{
    uint8_t byte = 0;
    if (lread(c, at, &byte, 1, LA_USER_RULES) || lwrite(c, at, &byte, 1, LA_USER_RULES)) c->exc.pending = false;
}

static void run_case(void (*be)(uint8_t), uint8_t cpl, bool flat, const uint8_t *bytes, const uint64_t *gpr, uint64_t fill, struct outcome *o)
{
    memset(ram, 0, RAM_SIZE);
    be(cpl);
    for (uint32_t n = 0; n < WINDOW; n += 8) st64(ram + DATA + n, fill * (n + 1));
    memcpy(ram + CODE, bytes, 16);
    c->cr4 |= CR4_OSFXSR;
    put_segment(SEG_FS, DATA3);
    put_segment(SEG_GS, DATA3);
    if (!flat) c->seg[SEG_ES].limit = 0xfffffffeu;
    segments_changed(c);
    CHECK_EQ(!!(c->mode & MODE_FLAT), flat);
    for (uint32_t at = 0; at < WINDOW; at += PAGE_SIZE) warm(DATA + at);
    warm(STACK3);
    memcpy(c->gpr, gpr, sizeof o->gpr);
    uint64_t before = vcpu_retired(c);
    o->reason = run_at(CODE, 1);
    memcpy(o->gpr, c->gpr, sizeof o->gpr);
    o->rip = c->rip;
    o->cr2 = c->cr2;
    o->retired = vcpu_retired(c) - before;
    o->flags = flags_read(c);
    o->cpl = c->cpl;
    o->fpu = c->fpu;
    memcpy(o->memory, ram, sizeof o->memory);
}

static void test_random(const char *mode, void (*be)(uint8_t), uint8_t cpl)
{
    static struct outcome a, b;
    uint32_t faults = 0;
    for (uint32_t n = 0; n < CASES; n++) {
        uint8_t bytes[32] = { 0 };
        uint64_t gpr[16], fill = rnd();
        make(bytes, gpr);
        /* An instruction that uses ES would find the limit. */
        if (bytes[0] == 0xa5 || bytes[0] == 0xc4) gpr[RDI] = DATA + below(PAGE_SIZE);
        run_case(be, cpl, true, bytes, gpr, fill, &a);
        run_case(be, cpl, false, bytes, gpr, fill, &b);
        faults += a.rip >= HANDLERS && a.rip < HANDLERS + 0x1000;
        CHECK(!memcmp(a.gpr, b.gpr, sizeof a.gpr) && a.rip == b.rip && a.cr2 == b.cr2 && a.flags == b.flags && a.reason == b.reason &&
              a.cpl == b.cpl && a.retired == b.retired && !memcmp(&a.fpu, &b.fpu, sizeof a.fpu) && !memcmp(a.memory, b.memory, sizeof a.memory),
              "%s at level %u, case %u: %02x %02x %02x %02x %02x %02x %02x", mode, cpl, n, bytes[0], bytes[1], bytes[2], bytes[3], bytes[4], bytes[5], bytes[6]);
    }
    CHECK(faults > 10 && faults < CASES / 2);
}

/* SDM 3A "Limit Checking": nothing goes across 4 GiB. */
static void test_limit(void)
{
    be_protected(0);
    c->gpr[RBX] = 0xfffffffdu;
    FAULTS("\x8b\x03", EXC_GP, 0);
    be_protected(0);
    c->gpr[RBX] = 0xfffffffdu;
    FAULTS("\x36\x8b\x03", EXC_SS, 0);
    be_protected(0);
    c->gpr[RBX] = 0x10;
    FAULTS("\x8b\x43\xed", EXC_GP, 0);
}

/* The mode follows each segment register, whatever changes it. */
static void test_mode_follows(void)
{
    static const char load_ds[] = "\x8e\xd8\x8b\x03", pop_es[] = "\x07\x26\x8b\x03";
    be_protected(0);
    CHECK(c->mode & MODE_FLAT);
    c->gpr[RBX] = DATA;
    st32(ram + DATA, 0x12345678);
    RUN_N("\x8b\x03\x8b\x03", 2);
    CHECK_EQ(c->gpr[RAX], 0x12345678);
    c->gpr[RAX] = 0; /* a null selector: the load behind it faults */
    RUN_N(load_ds, 2);
    CHECK(faulted(EXC_GP));
    CHECK(!(c->mode & MODE_FLAT));
    CHECK_EQ(stack32(1), CODE + 2);

    be_protected(0);
    c->gpr[RBX] = DATA;
    c->gpr[RAX] = DATA0_16; /* 64 KiB */
    RUN_N(load_ds, 2);
    CHECK(faulted(EXC_GP));
    be_protected(0);
    c->gpr[RAX] = DATA0_16;
    RUN_N("\x8e\xd8\xb8\x10\x00\x00\x00\x8e\xd8\x8b\x03", 3);
    CHECK(c->mode & MODE_FLAT);
    be_protected(0);
    c->gpr[RBX] = DATA;
    push32(0);
    RUN_N(pop_es, 2);
    CHECK(faulted(EXC_GP));
    /* Read-only, and what grows down. */
    be_protected(0);
    c->gpr[RBX] = DATA;
    c->gpr[RAX] = READ_ONLY;
    RUN_N("\x8e\xd8\x8b\x0b\x89\x0b", 3);
    CHECK(faulted(EXC_GP));
    CHECK_EQ(stack32(1), CODE + 4);
    be_protected(0);
    put_segment(SEG_DS, EXPAND_DOWN);
    segments_changed(c);
    CHECK(!(c->mode & MODE_FLAT));
    /* A 16-bit stack pointer in flat segments. */
    be_protected(0);
    c->seg[SEG_SS].attr &= ~(uint32_t)ATTR_DB;
    c->gpr[RSP] = 0xabcd0000;
    segments_changed(c);
    RUN("\x50");
    CHECK_EQ(c->gpr[RSP], 0xabcdfffc);
    /* #AC is checked in the general handlers. */
    be_protected(3);
    CHECK(c->mode & MODE_FLAT);
    c->cr0 |= CR0_AM;
    c->eflags |= FLAG_AC;
    vcpu_update_mode(c);
    CHECK(!(c->mode & MODE_FLAT));
    /* Level 0 in compatibility mode: addresses above 4 GiB are in the soft TLB. */
    be_compat(0);
    CHECK(!(c->mode & MODE_FLAT));
}

/* A sum that wraps is the address below 4 GiB, though the one above is mapped and in use. */
static void test_above_4g(void)
{
    be_long(3);
    st64(ram + PML4 + 8 * 511, PDPT | 7);
    st64(ram + PDPT + 8 * 511, PD | 7);
    c->gpr[RBX] = 0xffffffffc0000000ull + DATA;
    st32(ram + DATA, 0x87654321);
    RUN_N("\x8b\x03\x89\x03", 2);
    CHECK_EQ(c->gpr[RAX], 0x87654321);
    put_segment(SEG_CS, CODE3);
    segments_changed(c);
    CHECK(c->mode & MODE_FLAT);
    c->gpr[RBX] = DATA;
    RUN("\x8b\x83\x00\x00\x00\xc0");
    CHECK(faulted(EXC_PF));
    CHECK_EQ(c->cr2, 0xc0000000u + DATA);
    /* Left over from 64-bit code. */
    be_compat(3);
    c->gpr[RBX] = 0xffffffff00000000ull + DATA;
    RUN("\x8b\x03");
    CHECK_EQ(c->gpr[RAX], 0x87654321);
}

int main(void)
{
    if (!machine_create(KVS_CLOCK_VIRTUAL)) return 2;
    test_limit();
    test_mode_follows();
    test_above_4g();
    test_random("protected", be_protected, 0);
    test_random("protected", be_protected, 3);
    test_random("compatibility", be_compat, 3);
    machine_destroy();
    return checks_report();
}
