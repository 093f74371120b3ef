/*
 * disasm [--cases N] [--seed N] [--keep N]: the disassembler against GNU objdump, over every row of the
 * table in 16-, 32- and 64-bit code, character for character after whitespace is made the same.
 */
#include "../oracle/encode.h"

#include <ctype.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#define SLOT 32u
struct item { uint32_t row; uint8_t bytes[16]; uint8_t length; };
static struct { uint32_t cases; uint64_t seed, keep; } options = { 4, 1, 40 };

/* Where objdump says something else on purpose. */
static const char *explained(const struct item *t, const char *ours, const char *theirs)
{
    const char *m = isa_op[row_forms[t->row].op].mnemonic;
    static const char *const aliases[] = { "fcom2", "fcomp3", "fcomp5", "fxch4", "fxch7", "fstp1", "fstp8", "fstp9", "ffreep", "salc", NULL };
    for (int i = 0; aliases[i]; i++)
        if (!strcmp(m, aliases[i]) && strstr(theirs, "(bad)")) return "objdump does not know the undocumented name";
    if (strstr(ours, "fence") && strstr(theirs, "(bad)")) return "the processor ignores ModRM.rm of the fences, objdump does not";
    if ((!strcmp(m, "vmovss") || !strcmp(m, "vmovsd")) && strstr(theirs, "ymm")) return "VEX.L is ignored, objdump names a YMM register";
    if ((!strcmp(m, "vpermq") || !strcmp(m, "vpermpd")) && strstr(theirs, "(bad)")) return "the processor ignores VEX.W, objdump does not";
    if (!strcmp(m, "wbinvd") && strstr(theirs, "(bad)")) return "66 before WBINVD is ignored";
    if (!strcmp(m, "fwait") && strstr(theirs, "rex")) return "objdump takes REX and FWAIT apart";
    if (!strncmp(ours, "nop", 3) || strstr(ours, " nop ")) {
        static const char *const others[] = { "bnd", "endbr", "rdssp", "cldemote", "prefetchit", NULL };
        for (int i = 0; others[i]; i++)
            if (strstr(theirs, others[i])) return "a hint that is no more than a NOP without MPX or CET";
    }
    return NULL;
}

static void normalise(char *s)
{
    char *o = s;
    bool space = false;
    for (char *p = s; *p; p++) {
        if (isspace((unsigned char)*p)) { space = o != s; continue; }
        if (space) *o++ = ' ';
        space = false;
        *o++ = *p;
    }
    *o = 0;
}

static bool generate(struct rng *r, uint32_t row, uint32_t bits, struct item *t)
{
    const struct row_form *f = &row_forms[row];
    uint32_t widths = row_widths(f, bits);
    for (int tries = 0; tries < 200; tries++) {
        struct encode_request q = { .row = row, .bits = bits, .plain = rnd_one(r, 2), .wild = true, .memory = rnd_one(r, 2) };
        q.width = 8u << rnd_below(r, 4);
        if (!(widths * 8 & q.width)) continue;
        q.lock = q.memory && (f->attr & A_LOCK) && row_has_memory_form(f) && rnd_one(r, 4);
        q.rep = rnd_one(r, 3);
        struct decoded d;
        memset(t->bytes, 0x90, sizeof t->bytes);
        t->length = (uint8_t)encode_row(r, &q, t->bytes);
        t->row = row;
        if (decode(t->bytes, 15, bits, true, ~0ull, &d) == DECODE_OK && d.row == row && d.length == t->length) return true;
    }
    return false;
}

/* At the end of a page only some of the bytes are there: each beginning must ask for more. */
static uint32_t check_beginnings(const struct item *t, uint32_t bits)
{
    struct decoded d;
    for (uint32_t n = 1; n < t->length; n++) {
        int result = decode(t->bytes, n, bits, true, ~0ull, &d);
        if (result == DECODE_MORE) continue;
        printf("%u-bit %s: its first %u bytes give %d:", bits, row_forms[t->row].id, n, result);
        for (int i = 0; i < t->length; i++) printf(" %02x", t->bytes[i]);
        printf("\n");
        return 1;
    }
    return 0;
}

static uint32_t check_mode(uint32_t bits, uint64_t *checked)
{
    static uint32_t row_bad[ROW_COUNT];
    uint32_t n = 0, bad = 0, excused = 0;
    memset(row_bad, 0, sizeof row_bad);
    struct item *items = calloc((size_t)ROW_COUNT * options.cases, sizeof *items);
    char path[] = "/tmp/disasm-XXXXXX", command[256], line[512];
    int fd = mkstemp(path);
    struct rng r = { options.seed * 977 + bits };
    if (!items || fd < 0) return 1;
    for (uint32_t row = 1; row < ROW_COUNT; row++) {
        if (!row_forms[row].id || (row_forms[row].attr & (bits == 64 ? A_NO64 : A_ONLY64))) continue;
        for (uint32_t i = 0; i < options.cases; i++) {
            if (!generate(&r, row, bits, &items[n])) { printf("%u-bit: no encoding of %s\n", bits, row_forms[row].id); bad++; break; }
            bad += check_beginnings(&items[n++], bits);
        }
    }
    for (uint32_t i = 0; i < n; i++) {
        uint8_t slot[SLOT];
        memset(slot, 0x90, sizeof slot);
        memcpy(slot, items[i].bytes, items[i].length);
        if (write(fd, slot, SLOT) != (ssize_t)SLOT) return 1;
    }
    close(fd);
    snprintf(command, sizeof command, "objdump -D -b binary -M intel --no-show-raw-insn -w -m %s %s",
             bits == 64 ? "i386:x86-64" : bits == 32 ? "i386" : "i8086", path);
    FILE *p = popen(command, "r");
    uint64_t seen = 0;
    while (p && fgets(line, sizeof line, p)) {
        char *colon = strchr(line, ':'), *end;
        if (!colon) continue;
        unsigned long address = strtoul(line, &end, 16);
        if (end != colon || address % SLOT || address / SLOT >= n) continue;
        const struct item *t = &items[address / SLOT];
        char theirs[256], ours[256], whole[256];
        struct decoded d;
        snprintf(theirs, sizeof theirs, "%s", colon + 1);
        normalise(theirs);
        int32_t length = kvs_disassemble(t->bytes, 15, bits, address, whole, sizeof whole);
        snprintf(ours, sizeof ours, "%s", whole);
        normalise(ours);
        seen++;
        if (length == t->length && !strcmp(ours, theirs)) continue;
        if (explained(t, ours, theirs)) { excused++; continue; }
        bad++;
        if (bad > options.keep || row_bad[t->row]++ > 1) continue;
        printf("%u-bit %s:", bits, row_forms[t->row].id);
        for (int i = 0; i < t->length; i++) printf(" %02x", t->bytes[i]);
        printf("\n    ours    %s\n    objdump %s\n", ours, theirs);
        (void)d;
    }
    if (p) pclose(p);
    unlink(path);
    free(items);
    if (seen != n) { printf("%u-bit: %llu of %u instructions in objdump's output\n", bits, (unsigned long long)seen, n); bad++; }
    *checked += seen;
    printf("%u-bit: %u instructions, %u differ, %u explained\n", bits, n, bad, excused);
    return bad;
}

int main(int argc, char **argv)
{
    for (int i = 1; i + 1 < argc; i += 2) {
        if (!strcmp(argv[i], "--cases")) options.cases = (uint32_t)strtoul(argv[i + 1], NULL, 0);
        else if (!strcmp(argv[i], "--seed")) options.seed = strtoull(argv[i + 1], NULL, 0);
        else if (!strcmp(argv[i], "--keep")) options.keep = strtoull(argv[i + 1], NULL, 0);
    }
    uint64_t checked = 0;
    uint32_t bad = 0;
    for (uint32_t bits = 16; bits <= 64; bits *= 2) bad += check_mode(bits, &checked);
    printf("%llu passed, %u failed\n", (unsigned long long)(checked - bad), bad);
    return bad != 0;
}
