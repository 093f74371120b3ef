/*
 * oracle [--cases N] [--seed N] [--bits 16|32|64] [--only TEXT] [--verbose] [--keep N] [--host]
 *
 * For every row of the instruction table that can run in user mode, in each form and width, 64-, 32- and
 * 16-bit code: N cases on the host CPU and in the core. Fails on any difference.
 */
#include "exhaust.h"

#include <stdio.h>
#include <stdlib.h>
#include <time.h>

static struct { uint64_t cases, seed, keep, bits; const char *only; bool verbose, host_only, exhaustive, bounded, decode; } options = { .cases = 200, .seed = 1, .keep = 5 };
static struct {
    uint64_t cases, differences, faults, combos, ungenerated;
    uint64_t row_cases[ROW_COUNT], row_differences[ROW_COUNT];
} total;

static void check_batch(struct batch *b)
{
    for (uint32_t i = 0; i < b->count; i++) {
        struct test_case *t = &b->c[i];
        char why[128];
        total.cases++;
        total.row_cases[t->row]++;
        if (t->host.vector != NO_VECTOR) total.faults++;
        if (options.host_only || compare_case(t, why, sizeof why)) continue;
        total.differences++;
        if (total.row_differences[t->row]++ < options.keep) print_case(t, why);
    }
}

/* Two batches: the core runs one while the child runs the same, then the next is made. */
static void run_combo(struct batch *b, struct rng *r, const struct combo *k)
{
    uint64_t left = options.cases;
    total.combos++;
    while (left) {
        uint32_t n = left < BATCH ? (uint32_t)left : BATCH;
        b->count = 0;
        for (uint32_t i = 0; i < n; i++)
            if (generate_case(r, k, b->count, &b->c[b->count])) b->count++;
        total.ungenerated += n - b->count;
        if (!b->count) return;
        host_begin(b);
        if (!options.host_only) core_run(b);
        host_end(b);
        check_batch(b);
        left -= n;
    }
}

static void run_row(struct batch *b, uint32_t row)
{
    const struct row_form *f = &row_forms[row];
    for (uint32_t bits = 16; bits <= 64; bits *= 2) {
        if (options.bits && options.bits != bits) continue;
        if (f->attr & (bits == 64 ? A_NO64 : A_ONLY64)) continue;
        uint32_t widths = row_widths(f, bits);
        for (uint32_t w = 0; w < 4; w++) {
            if (!(widths >> w & 1)) continue;
            for (int memory = 0; memory < 2; memory++) {
                if (row_has_modrm(f) && !f->is_fixed) {
                    if (memory ? !row_has_memory_form(f) : !row_has_register_form(f)) continue;
                } else if (memory) continue;
                struct combo k = { row, bits, 8u << w, memory };
                if (combo_excluded(&k)) continue;
                struct rng r = { options.seed * 0x9e3779b97f4a7c15ull + row * 1000003ull + bits * 31 + w * 7 + (uint64_t)memory };
                rnd(&r);
                run_combo(b, &r, &k);
            }
        }
    }
}

/* As many cases as a row of two forms and three widths gets, in either code size. */
static void run_sequences(struct batch *b)
{
    for (uint32_t bits = 16; bits <= 64; bits *= 2) {
        if (options.bits && options.bits != bits) continue;
        struct rng r = { options.seed * 0x9e3779b97f4a7c15ull + bits };
        total.combos++;
        for (uint64_t left = options.cases * 30; left;) {
            uint32_t n = left < BATCH ? (uint32_t)left : BATCH;
            b->count = 0;
            for (uint32_t i = 0; i < n; i++)
                if (generate_sequence(&r, bits, b->count, &b->c[b->count])) b->count++;
            total.ungenerated += n - b->count;
            host_begin(b);
            if (!options.host_only) core_run(b);
            host_end(b);
            check_batch(b);
            left -= n;
        }
    }
}

static bool parse(int argc, char **argv)
{
    for (int i = 1; i < argc; i++) {
        bool more = i + 1 < argc;
        if (!strcmp(argv[i], "--cases") && more) options.cases = strtoull(argv[++i], NULL, 0);
        else if (!strcmp(argv[i], "--seed") && more) options.seed = strtoull(argv[++i], NULL, 0);
        else if (!strcmp(argv[i], "--keep") && more) options.keep = strtoull(argv[++i], NULL, 0);
        else if (!strcmp(argv[i], "--bits") && more) options.bits = strtoull(argv[++i], NULL, 0);
        else if (!strcmp(argv[i], "--only") && more) options.only = argv[++i];
        else if (!strcmp(argv[i], "--exhaustive")) options.exhaustive = true;
        else if (!strcmp(argv[i], "--bounded")) options.exhaustive = options.bounded = true;
        else if (!strcmp(argv[i], "--decode")) options.decode = true;
        else if (!strcmp(argv[i], "--verbose")) options.verbose = true;
        else if (!strcmp(argv[i], "--host")) options.host_only = true;
        else return false;
    }
    return true;
}

static double seconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

int main(int argc, char **argv)
{
    const char *error = "";
    if (!parse(argc, argv)) {
        fprintf(stderr, "usage: oracle [--cases N] [--seed N] [--bits 16|32|64] [--only TEXT] [--keep N] [--verbose]\n");
        return 2;
    }
    struct batch *b = shared_alloc(sizeof *b);
    if (!b || !host_start(&error) || (!options.host_only && !core_start(&error))) {
        fprintf(stderr, "oracle: %s\n", error);
        return 1;
    }
    if (options.exhaustive) {
        uint64_t differences = exhaust(b, !options.bounded, options.only);
        printf("%u passed, %u failed\n", !differences, !!differences);
        return differences != 0;
    }
    if (options.decode) {
        uint64_t differences = decode_strings(b, options.cases, options.seed, options.keep);
        printf("%u passed, %u failed\n", !differences, !!differences);
        return differences != 0;
    }
    double start = seconds();
    uint32_t rows = 0, reached = 0;
    for (uint32_t row = 1; row < ROW_COUNT; row++) {
        if (options.only && !strstr(row_forms[row].id, options.only)) continue;
        rows++;
        if (row_excluded(row)) continue;
        run_row(b, row);
        if (total.row_cases[row]) reached++;
    }
    if (!options.only || !strcmp(options.only, "sequence")) run_sequences(b);
    double took = seconds() - start;
    if (!options.only && !options.host_only) total.differences += exhaust(b, false, NULL) + decode_strings(b, options.cases * 300, options.seed, options.keep);
    host_stop();
    if (!options.host_only) core_stop();

    uint32_t bad = 0;
    printf("rows not reached:\n");
    for (uint32_t row = 1; row < ROW_COUNT; row++) {
        if (options.only && !strstr(row_forms[row].id, options.only)) continue;
        if (total.row_cases[row] == 0) printf("  %-36s %s\n", row_forms[row].id, row_excluded(row) ? row_excluded(row) : "NOT GENERATED");
        if (!row_excluded(row) && total.row_cases[row] == 0) bad++;
    }
    if (options.verbose) {
        printf("cases by row:\n");
        for (uint32_t row = 1; row < ROW_COUNT; row++)
            if (total.row_cases[row]) printf("  %-36s %llu\n", row_forms[row].id, (unsigned long long)total.row_cases[row]);
    }
    for (uint32_t row = 0; row < ROW_COUNT; row++)
        if (total.row_differences[row])
            printf("  differs: %-36s %llu of %llu\n", row ? row_forms[row].id : "sequence", (unsigned long long)total.row_differences[row],
                   (unsigned long long)total.row_cases[row]);
    printf("rows %u, reached %u, combinations %llu, cases %llu (%.0f/s), with an exception %llu, not generated %llu\n", rows, reached,
           (unsigned long long)total.combos, (unsigned long long)total.cases, (double)total.cases / took, (unsigned long long)total.faults,
           (unsigned long long)total.ungenerated);
    printf("unexplained differences: %llu\n", (unsigned long long)total.differences);
    bool ok = total.differences == 0 && bad == 0;
    printf("%u passed, %u failed\n", ok, !ok);
    return !ok;
}
