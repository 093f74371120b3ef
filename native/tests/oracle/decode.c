/*
 * What is an instruction, and how long is it? Byte strings - random ones, rows of the table with prefixes and
 * bits that do not belong there, and long ones - as one step of the host CPU and of the core. No register
 * points to memory, so that most operands fault; the exception, or RIP behind the instruction, must agree.
 */
#include "oracle.h"

#include <stdio.h>

static const uint8_t legacy_prefixes[] = { 0x66, 0x66, 0x66, 0xf2, 0xf2, 0xf3, 0xf3, 0xf0, 0x67, 0x2e, 0x3e, 0x26, 0x36, 0x64, 0x65 };

static bool is_prefix(uint8_t b)
{
    for (size_t i = 0; i < sizeof legacy_prefixes; i++)
        if (legacy_prefixes[i] == b) return true;
    return false;
}

/* What the bytes are after their prefixes. */
struct shape { const uint8_t *op; bool p66, rep, lock, vex; uint8_t rex, vmap; uint32_t prefixes; };
static struct shape shape_of(const uint8_t *p, uint32_t bits)
{
    struct shape s = { .op = p };
    for (; s.prefixes < 15; s.op++, s.prefixes++) {
        if (*s.op == 0x66) s.p66 = true;
        else if (*s.op == 0xf2 || *s.op == 0xf3) s.rep = true;
        else if (*s.op == 0xf0) s.lock = true;
        else if (bits == 64 && (*s.op & 0xf0) == 0x40) { s.rex = *s.op; continue; }
        else if (!is_prefix(*s.op)) break;
        s.rex = 0;
    }
    s.vex = (*s.op == 0xc4 || *s.op == 0xc5) && (bits == 64 || s.op[1] >= 0xc0);
    if (s.vex) {
        s.vmap = *s.op == 0xc5 ? 1 : s.op[1] & 31;
        s.op += *s.op == 0xc5 ? 2 : 3;
    }
    return s;
}

/* Not to be tried: what leaves for the kernel or the hypervisor, or would let the next instruction run too. */
static bool unsafe(const uint8_t *p, uint32_t bits)
{
    struct shape s = shape_of(p, bits);
    const uint8_t *o = s.op;
    if (s.vex) return false;
    if (o[0] == 0xcd || o[0] == 0xf1) return true;               /* INT, INT1 */
    if (o[0] == 0x17 || (o[0] == 0x8e && (o[1] & 0x38) == 0x10)) return true; /* POP SS, MOV SS */
    if (o[0] != 0x0f) return false;
    if (o[1] == 0x05 || o[1] == 0x34 || o[1] == 0x35 || o[1] == 0x07) return true; /* SYSCALL and its kin */
    if (o[1] == 0x00 && (o[2] & 0x30) == 0) return true;         /* SLDT, STR: Linux emulates them under UMIP */
    if (o[1] == 0x01 && (o[2] & 0x38) <= 0x20 && (o[2] < 0xc0 || (o[2] & 0x38) == 0x20)) return true; /* SGDT, SIDT, SMSW */
    return o[1] == 0x01 && (o[2] == 0xc1 || o[2] == 0xd9 || (o[2] >= 0xc8 && o[2] <= 0xcf) || (o[2] >= 0xd8 && o[2] <= 0xdf)); /* VMX, SVM, MONITOR */
}

/* Instructions of the host that no CPU model here offers; NULL: not one of those. docs/support.md */
static const char *not_offered(const uint8_t *p, uint32_t bits)
{
    struct shape s = shape_of(p, bits);
    const uint8_t *o = s.op;
    if (!s.vex && o[0] == 0x62 && (bits == 64 || o[1] >= 0xc0)) return "AVX-512";
    if (s.vex && s.vmap == 1 && ((o[0] >= 0x41 && o[0] <= 0x4b) || (o[0] >= 0x90 && o[0] <= 0x99))) return "AVX-512 opmasks";
    if (s.vex && s.vmap == 3 && o[0] >= 0x30 && o[0] <= 0x33) return "AVX-512 opmasks";
    if (s.vex && s.vmap == 2 && o[0] >= 0x50 && o[0] <= 0x53) return "AVX-VNNI";
    if (s.vex || o[0] != 0x0f) return NULL;
    if (o[1] == 0x78 || o[1] == 0x79) return "SSE4A";
    if (o[1] == 0x2b && s.rep) return "SSE4A";
    if (o[1] == 0x01 && o[2] >= 0xf9) return "CLZERO, MONITORX, RDPRU, INVLPGB";
    if (o[1] == 0x01 && (o[2] == 0xee || o[2] == 0xef)) return "PKU";
    if (o[1] == 0x38 && (o[2] == 0xf8 || o[2] == 0xf9)) return "MOVDIRI, MOVDIR64B";
    return NULL;
}

static uint32_t random_string(struct rng *r, uint32_t bits, uint8_t *p)
{
    uint32_t n = 0, prefixes = rnd_one(r, 2) ? 0 : rnd_below(r, 4);
    if (rnd_one(r, 64)) prefixes = 8 + rnd_below(r, 8);
    while (n < prefixes) p[n++] = legacy_prefixes[rnd_below(r, sizeof legacy_prefixes)];
    if (bits == 64 && rnd_one(r, 3)) p[n++] = (uint8_t)(0x40 | rnd_below(r, 16));
    switch (rnd_below(r, 8)) {
    case 0: case 1: break;
    case 2: case 3: p[n++] = 0x0f; break;
    case 4: p[n++] = 0x0f; p[n++] = rnd_one(r, 2) ? 0x38 : 0x3a; break;
    case 5: p[n++] = 0xc5; p[n++] = (uint8_t)(rnd(r) | (bits == 64 ? 0 : 0xc0)); break;
    case 6:
        p[n++] = 0xc4;
        p[n++] = (uint8_t)((rnd(r) & 0xe0) | (bits == 64 ? 0 : 0xc0) | (rnd_one(r, 16) ? rnd_below(r, 32) : 1 + rnd_below(r, 3)));
        p[n++] = (uint8_t)(rnd_one(r, 2) ? rnd(r) : rnd(r) | 0x78);
        break;
    default: break;
    }
    for (uint32_t end = n + 12; n < end; n++) p[n] = (uint8_t)rnd(r);
    return n;
}

/* A row, with something added to or changed in it. */
static uint32_t bent_row(struct rng *r, uint32_t bits, uint64_t ip, uint8_t *p)
{
    for (;;) {
        uint32_t row = 1 + rnd_below(r, ROW_COUNT - 1), w = rnd_below(r, 4), n = 0;
        const struct row_form *f = &row_forms[row];
        if (!f->id || (f->attr & (bits == 64 ? A_NO64 : A_ONLY64))) continue;
        bool memory = rnd_one(r, 2);
        if (row_has_modrm(f) && !f->is_fixed && !(memory ? row_has_memory_form(f) : row_has_register_form(f))) memory = !memory;
        struct encode_request q = { .row = row, .bits = bits, .width = 8u << w, .memory = memory, .plain = true, .wild = true, .ip = ip };
        if (!(row_widths(f, bits) >> w & 1)) continue;
        uint32_t added = rnd_below(r, 4);
        if (rnd_one(r, 32)) added = 6 + rnd_below(r, 9);
        while (n < added) p[n++] = legacy_prefixes[rnd_below(r, sizeof legacy_prefixes)];
        if (bits == 64 && rnd_one(r, 4)) p[n++] = (uint8_t)(0x40 | rnd_below(r, 16));
        memset(p + n, 0x90, 16);
        uint32_t length = encode_row(r, &q, p + n);
        if (rnd_one(r, 3)) p[n + rnd_below(r, f->vex ? 3 : length)] ^= (uint8_t)(1u << rnd_below(r, 8));
        return n + length;
    }
}

/* Memory that the two sides do not share; a far pointer there, and each would see its own. */
static bool reaches(const struct test_case *t)
{
    struct decoded d;
    if (decode(t->bytes, 15, t->bits, true, ~0ull, &d) != DECODE_OK || !d.is_mem || d.asize == 2) return false;
    uint64_t la = (uint64_t)d.disp + (d.rip_relative ? t->in.rip + d.length : 0);
    if (d.base < 16) la += t->in.gpr[d.base];
    if (d.index < 16) la += t->in.gpr[d.index] << d.scale;
    la += d.seg == SEG_FS ? FS_BASE : d.seg == SEG_GS ? GS_BASE : 0;
    if (t->bits != 64) la = (uint32_t)la;
    return la - (STUB - 0x10000) < CODE + CODE_SIZE + 0x10000 - STUB || la - 0x3fff0000 < 0x200000;
}

static bool generate_string(struct rng *r, uint32_t bits, uint32_t slot, struct test_case *t)
{
    uint8_t p[64];
    memset(p, 0x90, sizeof p);
    t->bits = (uint8_t)bits;
    do pick_segments(r, t, slot);
    while (bits == 32 && t->ldt);
    /* IRETQ gives a 16-bit stack but the low half of ESP. */
    if (t->ldt) t->in.selector[SEG_SS] = t->in.selector[SEG_DS] = t->in.selector[SEG_ES] = LDT_SELECTOR(LDT_DATA32);
    uint32_t n = rnd_one(r, 2) ? random_string(r, bits, p) : bent_row(r, bits, t->in.rip, p);
    if (unsafe(p, bits)) return false;
    t->length = (uint8_t)(n < 24 ? 24 : n);
    memcpy(t->bytes, p, t->length);
    t->sequence = t->segments = t->env = false;
    t->step = true;
    t->row = ROW_none;
    memset(&t->d, 0, sizeof t->d);
    memset(t->in.fx, 0, FX_SIZE);
    st16(t->in.fx, 0x37f);
    st32(t->in.fx + 24, 0x1f80);
    st64(t->in.fx + 512, host_components());
    t->in.rflags = 0x202 | (rnd(r) & FLAGS_STATUS);
    for (int i = 0; i < 16; i++) {
        uint64_t v = rnd(r);
        t->in.gpr[i] = bits == 64 ? 0x600000000000ull | (v & 0xfffffffffull) : 0x60000000 | (v & 0x0fffffff);
    }
    return !reaches(t);
}

/* AMD's processors take 66 on near branches in 64-bit code as a 16-bit operand size, Intel's do not; the core does not. */
static bool short_branch(const uint8_t *p, uint32_t bits)
{
    struct shape s = shape_of(p, bits);
    const uint8_t *o = s.op;
    if (bits != 64 || !s.p66 || s.vex) return false;
    return o[0] == 0xe8 || o[0] == 0xe9 || o[0] == 0xeb || (o[0] & 0xf0) == 0x70 || (o[0] >= 0xe0 && o[0] <= 0xe3) || o[0] == 0xc2 ||
           o[0] == 0xc3 || (o[0] == 0xff && ((o[1] & 0x38) == 0x10 || (o[1] & 0x38) == 0x20)) || (o[0] == 0x0f && (o[1] & 0xf0) == 0x80);
}
static bool is_string(const uint8_t *p, uint32_t bits)
{
    struct shape s = shape_of(p, bits);
    return s.rep && ((s.op[0] >= 0xa4 && s.op[0] <= 0xa7) || (s.op[0] >= 0xaa && s.op[0] <= 0xaf) || (s.op[0] >= 0x6c && s.op[0] <= 0x6f));
}

/* What silicon does and the core does not: docs/support.md, "Where processors differ". */
static bool vendor_quirk(const uint8_t *p, uint32_t bits)
{
    struct shape s = shape_of(p, bits);
    const uint8_t *o = s.op;
    if (s.vex) return false;
    if (o[0] == 0x8f && (o[1] & 0x38)) return true; /* AMD's XOP: #GP or #UD by what follows */
    if (s.rep && (o[0] == 0xe0 || o[0] == 0xe1)) return true; /* Zen 5: F2 and F3 turn LOOPE and LOOPNE into one another */
    return s.lock && o[0] == 0x0f && ((o[1] == 0x00 && (o[2] & 0x38) == 0x28) || o[1] == 0x20 || o[1] == 0x22); /* LOCK VERW; MOV CR8 */
}

static bool same(const struct test_case *t, char *why, size_t size)
{
    const struct cpu_state *h = &t->host, *c = &t->core;
    /* What is no instruction has no certain length, but may be found too long. */
    uint32_t both = 1u << (h->vector & 31) | 1u << (c->vector & 31);
    if (both == (1u << EXC_GP | 1u << EXC_UD) && shape_of(t->bytes, t->bits).prefixes > 3) return true;
    if (is_string(t->bytes, t->bits) && !(both & 1u << EXC_UD)) return true; /* TF stops between repetitions */
    if (short_branch(t->bytes, t->bits) || vendor_quirk(t->bytes, t->bits)) return true;
    if (!t->host_done) snprintf(why, size, "the host process died or hung");
    else if ((h->vector == EXC_UD) != (c->vector == EXC_UD)) snprintf(why, size, "exception %x, core %x", h->vector, c->vector);
    else if (h->vector == NO_VECTOR && c->vector == NO_VECTOR && h->rip != c->rip)
        snprintf(why, size, "rip %llx, core %llx", (unsigned long long)h->rip, (unsigned long long)c->rip);
    else if ((h->vector == NO_VECTOR) != (c->vector == NO_VECTOR)) snprintf(why, size, "exception %x, core %x", h->vector, c->vector);
    else return true;
    return false;
}

uint64_t decode_strings(struct batch *b, uint64_t cases, uint64_t seed, uint64_t keep)
{
    struct rng r = { seed * 0x9e3779b97f4a7c15ull + 99 };
    static struct { const char *what; uint64_t n; } others[16];
    uint64_t differences = 0, tried = 0, legal = 0;
    for (uint32_t bits = 16; bits <= 64; bits *= 2) {
        for (uint64_t done = 0; done < cases / 3;) {
            b->count = 0;
            while (b->count < BATCH)
                if (generate_string(&r, bits, b->count, &b->c[b->count])) b->count++;
            host_begin(b);
            core_run(b);
            host_end(b);
            done += b->count;
            for (uint32_t i = 0; i < b->count; i++) {
                const struct test_case *t = &b->c[i];
                char why[96] = "", text[96] = "";
                tried++;
                legal += t->host.vector != EXC_UD;
                if (same(t, why, sizeof why)) continue;
                const char *what = t->core.vector == EXC_UD && t->host.vector != EXC_UD ? not_offered(t->bytes, t->bits) : NULL;
                if (what) {
                    int n = 0;
                    while (others[n].what && strcmp(others[n].what, what)) n++;
                    others[n].what = what;
                    others[n].n++;
                    continue;
                }
                if (differences++ >= keep) continue;
                kvs_disassemble(t->bytes, 15, t->bits, t->in.rip, text, sizeof text);
                printf("DIFFERENCE: %u-bit code:", bits);
                for (uint32_t k = 0; k < 17; k++) printf(" %02x", t->bytes[k]);
                printf("  %s: %s (at %llx, error %x cr2 %llx, core error %x cr2 %llx)\n", text, why, (unsigned long long)t->in.rip, t->host.error,
                       (unsigned long long)t->host.cr2, t->core.error, (unsigned long long)t->core.cr2);
            }
        }
    }
    printf("byte strings %llu, of them instructions %llu, differences %llu; of the host alone:", (unsigned long long)tried,
           (unsigned long long)legal, (unsigned long long)differences);
    for (int n = 0; others[n].what; n++) printf(" %s %llu;", others[n].what, (unsigned long long)others[n].n);
    printf("\n");
    return differences;
}
