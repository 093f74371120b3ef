/* The local descriptor table that the host child and the core share: 16-bit code, and data that is not flat. */
#include "oracle.h"

/* MID lies at offset LOW of the data segments, so that 16-bit addresses reach the arena. */
#define DATA_BASE ((uint32_t)(MID - LOW))

const struct ldt_row ldt_rows[LDT_COUNT] = {
    [LDT_CODE16_LOW] = { (uint32_t)CODE, 0xffff, LDT_CODE, false, false, false },
    [LDT_CODE16_HIGH] = { (uint32_t)CODE + 0x10000, 0xffff, LDT_CODE, false, false, false },
    [LDT_CODE32_LOW] = { (uint32_t)CODE, CODE_SIZE - 1, LDT_CODE, true, false, false },
    [LDT_CODE32_HIGH] = { (uint32_t)CODE + 0x10000, CODE_SIZE - 0x10001, LDT_CODE, true, false, false },
    [LDT_CODE16_SEALED] = { (uint32_t)CODE, 0xffff, LDT_CODE, false, true, false },
    [LDT_CODE16_HIGH_SEALED] = { (uint32_t)CODE + 0x10000, 0xffff, LDT_CODE, false, true, false },
    [LDT_DATA16] = { DATA_BASE, 0xffff, LDT_DATA, false, false, false },
    [LDT_DATA32] = { DATA_BASE, 0xffff, LDT_DATA, true, false, false },
    [LDT_DATA_SHORT] = { DATA_BASE, (uint32_t)LOW + 0x1010, LDT_DATA, false, false, false },
    [LDT_DATA_DOWN16] = { DATA_BASE, (uint32_t)LOW + 0xfe0, LDT_DOWN, false, false, false },
    [LDT_DATA_DOWN32] = { DATA_BASE, (uint32_t)LOW + 0xfe0, LDT_DOWN, true, false, false },
    [LDT_DATA_SEALED] = { DATA_BASE, 0xffff, LDT_DATA, false, true, false },
    [LDT_DATA_PAGES] = { 0, 0x3000a, LDT_DATA, true, false, true },
};

uint64_t ldt_descriptor(uint32_t n)
{
    const struct ldt_row *l = &ldt_rows[n];
    /* Linux marks every descriptor that it makes as accessed. */
    uint64_t type = 1u | (l->sealed ? 0 : 2u) | (uint32_t)l->kind << 2;
    return (l->limit & 0xffffu) | (uint64_t)(l->base & 0xffffffu) << 16 | (type | 0xf0u) << 40 | (uint64_t)(l->limit >> 16) << 48 |
           (uint64_t)l->big << 54 | (uint64_t)l->pages << 55 | (uint64_t)(l->base >> 24) << 56;
}

uint64_t selector_base(uint16_t selector)
{
    return (selector & 4) && selector >> 3 < LDT_COUNT ? ldt_rows[selector >> 3].base : 0;
}

static uint16_t pick_data(struct rng *r, bool stack)
{
    static const uint8_t special[] = { LDT_DATA_SHORT, LDT_DATA_DOWN16, LDT_DATA_DOWN32, LDT_DATA_PAGES, LDT_DATA32, LDT_DATA_SEALED };
    uint32_t x = rnd_below(r, 8);
    if (x < 4) return LDT_SELECTOR(LDT_DATA16);
    if (x < 5) return 0x2b;
    /* SS takes no segment that cannot be written. */
    return LDT_SELECTOR(special[rnd_below(r, stack ? 5 : 6)]);
}

void pick_segments(struct rng *r, struct test_case *t, uint32_t slot)
{
    uint16_t *s = t->in.selector;
    for (uint32_t n = 0; n < SEG_COUNT; n++) s[n] = 0x2b;
    s[SEG_CS] = t->bits == 64 ? 0x33 : 0x23;
    t->ldt = t->bits == 16 || (t->bits == 32 && rnd_one(r, 8));
    if (t->ldt) {
        /* Within reach of 16-bit offsets. */
        bool low = case_ip(slot) < CODE + 0x10000;
        uint32_t code = t->bits == 32 ? (low ? LDT_CODE32_LOW : LDT_CODE32_HIGH) : low ? LDT_CODE16_LOW : LDT_CODE16_HIGH;
        if (t->bits == 16 && rnd_one(r, 4)) code = code == LDT_CODE16_LOW ? LDT_CODE16_SEALED : LDT_CODE16_HIGH_SEALED;
        if (t->bits == 16 || rnd_one(r, 2)) s[SEG_CS] = LDT_SELECTOR(code);
        s[SEG_DS] = pick_data(r, false);
        s[SEG_ES] = rnd_one(r, 2) ? s[SEG_DS] : pick_data(r, false);
        s[SEG_SS] = pick_data(r, true);
    }
    t->cs_base = selector_base(s[SEG_CS]);
    t->in.rip = case_ip(slot) - t->cs_base;
}

/* SP rather than ESP: SS.B is clear. */
bool stack_is_16(const struct test_case *t)
{
    uint16_t s = t->in.selector[SEG_SS];
    return t->bits != 64 && (s & 4) && !ldt_rows[s >> 3].big;
}
