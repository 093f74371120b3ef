/*
 * Instructions of so small an input that all of it can be tried: 8-bit arithmetic, shifts and rotates by
 * every count, multiply, divide, and decimal adjustment, over all operands and all status flags.
 *
 * The same loop runs on the host CPU and in the core: it takes EAX, EBX and flags from one array, runs the
 * instruction, and puts EAX and flags into another. Undefined flags are compared like the others: the core
 * gives what this host's silicon gives (docs/support.md).
 */
#include "exhaust.h"

#include <stdio.h>

#define RECORDS 65536u
struct input { uint32_t eax, ebx, flags; };
struct output { uint32_t eax, flags; };
#define BLOCK_OUT (RECORDS * sizeof(struct input))
_Static_assert(BLOCK_OUT + RECORDS * sizeof(struct output) <= BLOCK_SIZE, "both arrays fit");

enum shape { AL_BL, AL_CL, AL_IMM, AL_ONLY, AX_ONLY, AX_BL, AX_IMM };
struct operation { const char *name; uint8_t shape, length, bytes[3]; bool only32, faults; };

static const struct operation operations[] = {
    { "add", AL_BL, 2, { 0x00, 0xd8 }, false, false }, { "or", AL_BL, 2, { 0x08, 0xd8 }, false, false },
    { "adc", AL_BL, 2, { 0x10, 0xd8 }, false, false }, { "sbb", AL_BL, 2, { 0x18, 0xd8 }, false, false },
    { "and", AL_BL, 2, { 0x20, 0xd8 }, false, false }, { "sub", AL_BL, 2, { 0x28, 0xd8 }, false, false },
    { "xor", AL_BL, 2, { 0x30, 0xd8 }, false, false }, { "cmp", AL_BL, 2, { 0x38, 0xd8 }, false, false },
    { "test", AL_BL, 2, { 0x84, 0xd8 }, false, false }, { "xadd", AL_BL, 3, { 0x0f, 0xc0, 0xd8 }, false, false },
    { "not", AL_ONLY, 2, { 0xf6, 0xd0 }, false, false }, { "neg", AL_ONLY, 2, { 0xf6, 0xd8 }, false, false },
    { "inc", AL_ONLY, 2, { 0xfe, 0xc0 }, false, false }, { "dec", AL_ONLY, 2, { 0xfe, 0xc8 }, false, false },
    { "rol cl", AL_CL, 2, { 0xd2, 0xc0 }, false, false }, { "ror cl", AL_CL, 2, { 0xd2, 0xc8 }, false, false },
    { "rcl cl", AL_CL, 2, { 0xd2, 0xd0 }, false, false }, { "rcr cl", AL_CL, 2, { 0xd2, 0xd8 }, false, false },
    { "shl cl", AL_CL, 2, { 0xd2, 0xe0 }, false, false }, { "shr cl", AL_CL, 2, { 0xd2, 0xe8 }, false, false },
    { "sal cl", AL_CL, 2, { 0xd2, 0xf0 }, false, false }, { "sar cl", AL_CL, 2, { 0xd2, 0xf8 }, false, false },
    { "rol 1", AL_ONLY, 2, { 0xd0, 0xc0 }, false, false }, { "ror 1", AL_ONLY, 2, { 0xd0, 0xc8 }, false, false },
    { "rcl 1", AL_ONLY, 2, { 0xd0, 0xd0 }, false, false }, { "rcr 1", AL_ONLY, 2, { 0xd0, 0xd8 }, false, false },
    { "shl 1", AL_ONLY, 2, { 0xd0, 0xe0 }, false, false }, { "shr 1", AL_ONLY, 2, { 0xd0, 0xe8 }, false, false },
    { "sal 1", AL_ONLY, 2, { 0xd0, 0xf0 }, false, false }, { "sar 1", AL_ONLY, 2, { 0xd0, 0xf8 }, false, false },
    { "rol i", AL_IMM, 3, { 0xc0, 0xc0 }, false, false }, { "ror i", AL_IMM, 3, { 0xc0, 0xc8 }, false, false },
    { "rcl i", AL_IMM, 3, { 0xc0, 0xd0 }, false, false }, { "rcr i", AL_IMM, 3, { 0xc0, 0xd8 }, false, false },
    { "shl i", AL_IMM, 3, { 0xc0, 0xe0 }, false, false }, { "shr i", AL_IMM, 3, { 0xc0, 0xe8 }, false, false },
    { "sal i", AL_IMM, 3, { 0xc0, 0xf0 }, false, false }, { "sar i", AL_IMM, 3, { 0xc0, 0xf8 }, false, false },
    { "mul", AL_BL, 2, { 0xf6, 0xe3 }, false, false }, { "imul", AL_BL, 2, { 0xf6, 0xeb }, false, false },
    { "div", AX_BL, 2, { 0xf6, 0xf3 }, false, true }, { "idiv", AX_BL, 2, { 0xf6, 0xfb }, false, true },
    { "daa", AL_ONLY, 1, { 0x27 }, true, false }, { "das", AL_ONLY, 1, { 0x2f }, true, false },
    { "aaa", AX_ONLY, 1, { 0x37 }, true, false }, { "aas", AX_ONLY, 1, { 0x3f }, true, false },
    { "aam", AX_IMM, 2, { 0xd4 }, true, true }, { "aad", AX_IMM, 2, { 0xd5 }, true, false },
};

static struct {
    struct batch *b;
    uint8_t *host, *core; /* the block, on either side */
    uint64_t tried, differences;
    uint32_t fill;
    uint8_t faulting[RECORDS / 8]; /* dividends that fault with the divisor at hand */
    bool full;
} x;

/* EAX from the record's flags word: AL = OF, AH = the other flags. */
static uint32_t flags_word(uint32_t n)
{
    return (n & 1) << 8 | (n >> 1 & 1) << 10 | (n >> 2 & 1) << 12 | (n >> 3 & 1) << 14 | (n >> 4 & 1) << 15 | (n >> 5 & 1);
}

static void make_loop(struct test_case *t, const struct operation *o, uint32_t imm, uint32_t bits)
{
    static const uint8_t head[] = { 0x8b, 0x46, 0x08, 0x04, 0x7f, 0x9e, 0x8b, 0x06, 0x8b, 0x5e, 0x04, 0x8b, 0xcb };
    static const uint8_t tail[] = { 0x8b, 0xd0, 0x9f, 0x0f, 0x90, 0xc0, 0x89, 0x17, 0x89, 0x47, 0x04, 0x83, 0xc6, 0x0c, 0x83, 0xc7, 0x08,
                                    0xff, 0xcd, 0x75 };
    memset(t, 0, sizeof *t);
    t->bits = (uint8_t)bits;
    t->sequence = true;
    for (uint32_t n = 0; n < SEG_COUNT; n++) t->in.selector[n] = 0x2b;
    t->in.selector[SEG_CS] = bits == 64 ? 0x33 : 0x23;
    t->in.rip = case_ip(0);
    t->in.rflags = 0x202;
    st16(t->in.fx, 0x37f);
    st32(t->in.fx + 24, 0x1f80);
    st64(t->in.fx + 512, host_components());
    uint8_t *p = t->bytes;
    memcpy(p, head, sizeof head);
    p += sizeof head;
    memcpy(p, o->bytes, o->length);
    if (o->shape == AL_IMM || o->shape == AX_IMM) p[o->length - 1] = (uint8_t)imm;
    p += o->length;
    memcpy(p, tail, sizeof tail);
    p += sizeof tail;
    *p = (uint8_t)(t->bytes - p - 1);
    t->length = (uint8_t)(p + 1 - t->bytes);
    t->skip = o->faults ? o->length : 0;
}

static void run_loop(const struct operation *o, uint32_t imm, uint32_t bits)
{
    struct test_case *t = &x.b->c[0];
    if (!x.fill) return;
    make_loop(t, o, imm, bits);
    t->in.gpr[RSI] = BLOCK;
    t->in.gpr[RDI] = BLOCK + BLOCK_OUT;
    t->in.gpr[RBP] = x.fill;
    x.b->count = 1;
    memcpy(x.core, x.host, x.fill * sizeof(struct input));
    memset(x.host + BLOCK_OUT, 0xaa, x.fill * sizeof(struct output));
    memset(x.core + BLOCK_OUT, 0x55, x.fill * sizeof(struct output));
    host_begin(x.b);
    core_run_loop(x.b);
    host_end(x.b);
    const struct input *in = (const struct input *)x.host;
    const struct output *h = (const struct output *)(x.host + BLOCK_OUT), *c = (const struct output *)(x.core + BLOCK_OUT);
    x.tried += x.fill;
    for (uint32_t i = 0; i < x.fill; i++) {
        if (h[i].eax == c[i].eax && h[i].flags == c[i].flags) continue;
        if (x.differences++ < 20)
            printf("  %s, %u-bit code: eax %x ebx %x imm %x flags %x: eax %x flags %x, core %x %x\n", o->name, bits, in[i].eax, in[i].ebx, imm,
                   in[i].flags, h[i].eax, h[i].flags, c[i].eax, c[i].flags);
    }
    x.fill = 0;
}

static void put(uint32_t ax, uint32_t bl, uint32_t flags)
{
    ((struct input *)x.host)[x.fill++] = (struct input){ 0x5ca10000u | ax, 0xbead0000u | bl << 8 | bl, 0x77770000u | flags_word(flags) };
}

/* All dividends with one divisor. What faults with no flag set is not tried again with all the others. */
static void run_divide(const struct operation *o, uint32_t bl, uint32_t bits)
{
    for (uint32_t f = 0; f < 64; f++) {
        if (!x.full && f != 21) continue; /* bounded: one combination */
        for (uint32_t ax = 0; ax < RECORDS; ax++)
            if (f == 0 || f == 63 || !x.full || !(x.faulting[ax / 8] >> (ax & 7) & 1)) put(ax, bl, f);
        run_loop(o, 0, bits);
        if (f) continue;
        const struct output *h = (const struct output *)(x.host + BLOCK_OUT);
        memset(x.faulting, 0, sizeof x.faulting);
        for (uint32_t ax = 0; ax < RECORDS; ax++)
            if (h[ax].eax == DIVIDE_MARK) x.faulting[ax / 8] |= (uint8_t)(1u << (ax & 7));
    }
}

static void run_operation(const struct operation *o, uint32_t bits)
{
    static const uint8_t some[] = { 0, 21, 63 };
    static const uint8_t immediates[] = { 0, 1, 8, 9, 10, 16, 31, 32, 0xff };
    static const uint8_t divisors[] = { 1, 3, 10, 128, 200, 255 };
    uint32_t flags = x.full ? 64 : sizeof some;
    bool imm = o->shape == AL_IMM || o->shape == AX_IMM;
    switch (o->shape) {
    case AL_BL: case AL_CL:
        for (uint32_t f = 0; f < flags; f++) {
            for (uint32_t n = 0; n < RECORDS; n++) put(0x4200 | (n & 0xff), n >> 8, x.full ? f : some[f]);
            run_loop(o, 0, bits);
        }
        break;
    case AX_BL:
        for (uint32_t n = 0; n < (x.full ? 256 : sizeof divisors); n++) run_divide(o, x.full ? n : divisors[n], bits);
        break;
    default: {
        uint32_t values = o->shape == AX_ONLY || o->shape == AX_IMM ? 65536 : 256, count = !imm ? 1 : x.full ? 256 : sizeof immediates;
        for (uint32_t n = 0; n < count; n++) {
            uint32_t i = x.full ? n : immediates[n];
            for (uint32_t f = 0; f < 64; f++) {
                if (values == 65536 && !x.full && f % 21) continue;
                if (o->faults && i == 0 && f && f != 63) continue;
                for (uint32_t v = 0; v < values; v++) put(v, 0x5a, f);
                if (values == 65536 || f % 32 == 31) run_loop(o, i, bits);
            }
            run_loop(o, i, bits);
        }
        break;
    }
    }
}

uint64_t exhaust(struct batch *b, bool full, const char *only)
{
    x.b = b;
    x.full = full;
    x.host = (uint8_t *)(uintptr_t)BLOCK;
    x.core = core_block();
    for (size_t n = 0; n < ARRAY_SIZE(operations); n++) {
        const struct operation *o = &operations[n];
        if (only && strcmp(only, o->name)) continue;
        uint64_t before = x.differences;
        for (uint32_t bits = 32; bits <= 64; bits += 32) {
            if (bits == 64 && (o->only32 || o->faults)) continue;
            run_operation(o, bits);
        }
        if (x.differences != before) printf("  differs: %s\n", o->name);
    }
    printf("exhaustive%s: operations %zu, inputs %llu, differences %llu\n", full ? "" : " (bounded)", ARRAY_SIZE(operations),
           (unsigned long long)x.tried, (unsigned long long)x.differences);
    return x.differences;
}
