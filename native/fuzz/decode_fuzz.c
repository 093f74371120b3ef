/* The decoder and the disassembler over random and nearly valid bytes, with buffers of any size. */
#include "fuzz.h"

static void one(const uint8_t *bytes, uint32_t count, uint32_t bits, uint32_t text_size)
{
    /* Exact allocations, so that any overrun is seen. */
    uint8_t *copy = malloc(count ? count : 1);
    char *text = malloc(text_size ? text_size : 1);
    struct decoded d;
    memcpy(copy, bytes, count);
    int st = decode(copy, count, bits, count & 1, ~0ull, &d);
    if (st == DECODE_OK) {
        FUZZ_CHECK(d.length >= 1 && d.length <= 15 && d.length <= count);
        FUZZ_CHECK(d.row > 0 && d.row < ROW_COUNT);
        for (int k = 0; k < 3; k++) FUZZ_CHECK(operand_size(&d, k) <= 512);
    }
    int32_t length = kvs_disassemble(copy, count, bits, 0x1234567890, text, text_size);
    FUZZ_CHECK(length >= 0 && length <= 15);
    if (text_size) FUZZ_CHECK(memchr(text, 0, text_size));
    free(copy);
    free(text);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (size < 2) return 0;
    static const uint32_t bits[] = { 16, 32, 64, 64 };
    one(data + 2, (uint32_t)(size - 2 > 20 ? 20 : size - 2), bits[data[0] & 3], data[1]);
    return 0;
}

static void epoch(struct rng *r, uint64_t cases)
{
    static const uint32_t bits[] = { 16, 32, 64 };
    for (uint64_t n = 0; n < cases; n++) {
        uint8_t b[24];
        uint32_t mode = bits[rnd_below(r, 3)], count = rnd_below(r, 18);
        for (int i = 0; i < 24; i += 8) st64(b + i, rnd(r));
        if (!rnd_one(r, 4)) {
            struct encode_request q = { .row = 1 + rnd_below(r, ROW_COUNT - 1), .bits = mode, .width = 8u << rnd_below(r, 4),
                .memory = rnd_one(r, 2), .plain = rnd_one(r, 2), .lock = rnd_one(r, 8), .rep = rnd_one(r, 4), .wild = true };
            uint8_t e[16];
            uint32_t len = encode_row(r, &q, e);
            memcpy(b, e, len);
            if (rnd_one(r, 3)) b[rnd_below(r, len)] = (uint8_t)rnd(r);
            if (!rnd_one(r, 4)) count = 15;
        }
        one(b, count, mode, rnd_one(r, 4) ? rnd_below(r, 64) : 128);
    }
}

#ifndef KVS_LIBFUZZER
int main(int argc, char **argv) { return fuzz_main(argc, argv, "decode_fuzz", 100000, epoch); }
#endif
