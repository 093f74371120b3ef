/* Where instruction bytes end: pages, segment limits, canonical addresses; bytes that were no instruction change. */
#include "sys_harness.h"

/* Stores one byte as the guest, from code in another page. */
static void guest_store(uint32_t at, uint8_t value)
{
    uint8_t code[] = { 0xc6, 0x04, 0x25, 0, 0, 0, 0, value }; /* mov byte [at], value */
    st32(code + 3, at);
    memcpy(ram + DATA, code, sizeof code);
    run_at(DATA, 1);
    CHECK_EQ(c->rip, DATA + sizeof code);
    CHECK_EQ(ram[at], value);
}

/* 0F 04 is no instruction, 0F A2 is CPUID; the second byte lies in another granule, or in another page. */
static void no_instruction_becomes_one(uint32_t at)
{
    be_long(0);
    memset(ram + CODE, 0x90, 0x2000);
    ram[at] = 0x0f;
    ram[at + 1] = 0x04;
    run_at(at, 1);
    CHECK(faulted(EXC_UD), "at %x", at);
    guest_store(at + 1, 0xa2);
    run_at(at, 1);
    CHECK_EQ(c->rip, at + 2);
    guest_store(at + 1, 0x04);
    run_at(at, 1);
    CHECK(faulted(EXC_UD), "at %x", at);
}

/* Sixteen bytes are too long; a NOP among the prefixes ends the instruction there. */
static void too_long_becomes_shorter(uint32_t at, uint32_t nop)
{
    be_long(0);
    memset(ram + CODE, 0x90, 0x2000);
    memset(ram + at, 0x66, 15);
    run_at(at, 1);
    CHECK(faulted(EXC_GP), "at %x", at);
    guest_store(at + nop, 0x90);
    run_at(at, 1);
    CHECK_EQ(c->rip, at + nop + 1);
}

/* The rest of the instruction is in a page that is there no longer. */
static void second_page_goes(void)
{
    be_long(0);
    for (uint32_t n = 0; n < 512; n++) st64(ram + LDT + 0x1000 + 8 * n, (uint64_t)n << 12 | 0x67);
    st64(ram + PD, (LDT + 0x1000) | 0x67);
    state_changed();
    memset(ram + CODE, 0x90, 0x2000);
    ram[CODE + 0xfff] = 0x0f;
    ram[CODE + 0x1000] = 0x04;
    run_at(CODE + 0xfff, 1);
    CHECK(faulted(EXC_UD), "both pages");
    st64(ram + LDT + 0x1000 + 8 * ((CODE >> 12) + 1), 0);
    tlb_flush_all(c);
    run_at(CODE + 0xfff, 1);
    CHECK(faulted(EXC_PF), "the second page is gone");
    CHECK_EQ(c->cr2, CODE + 0x1000);
}

/* The lower half of the address space ends in the middle of an instruction, and something is mapped behind it. */
static void fetch_is_canonical(void)
{
    be_long(0);
    st64(ram + PDPT + 8 * 511, PD | 7);
    st64(ram + PD + 8 * 511, 0x200000 | 0xe7);
    st64(ram + PML4 + 8 * 255, PDPT | 7);
    st64(ram + PML4 + 8 * 256, PDPT | 7);
    state_changed();
    ram[0x3fffff] = 0x0f;
    ram[0] = 0xa2;
    for (int again = 0; again < 2; again++) {
        run_at(0x7fffffffffffull, 1);
        CHECK(faulted(EXC_GP), "again %d", again);
        CHECK_EQ(stack64(0), 0);
        CHECK_EQ(stack64(1), 0x7fffffffffffull);
    }
}

/* SDM 3A "Limit Checking": the segment ends before the page that is not there matters. */
static void limit_before_page(void)
{
    be_protected(0);
    c->seg[SEG_CS].limit = RAM_SIZE - 1;
    state_changed();
    ram[RAM_SIZE - 1] = 0x0f;
    for (int again = 0; again < 2; again++) {
        run_at(RAM_SIZE - 1, 1);
        CHECK(faulted(EXC_GP), "again %d", again);
        CHECK_EQ(stack32(0), 0);
        CHECK_EQ(stack32(1), RAM_SIZE - 1);
        c->seg[SEG_CS].limit = RAM_SIZE - 1;
        state_changed();
    }
}

/* The same code in segments that end in the middle of it, behind it, and again in its middle. */
static void limits_differ(void)
{
    be_protected(0);
    memset(ram + CODE, 0x90, 64);
    memcpy(ram + CODE + 3, "\xb8\x01\x02\x03\x04", 5); /* mov eax, imm32 */
    for (uint32_t n = 0; n < 12; n++) {
        static const uint8_t ends[] = { 2, 64, 3, 6, 7, 64 };
        const uint32_t end = ends[n % 6];
        put_segment(SEG_CS, CODE0); /* decoded code stays */
        c->seg[SEG_CS].limit = CODE + end;
        c->gpr[RAX] = 0;
        segments_changed(c);
        run_at(CODE, 4);
        if (end >= 7) {
            CHECK_EQ(c->rip, CODE + 8);
            CHECK_EQ(c->gpr[RAX], 0x04030201);
        } else {
            CHECK(faulted(EXC_GP), "end %u", end);
            CHECK_EQ(stack32(1), CODE + 3);
        }
    }
}

/* 16-bit addresses wrap at 64 KiB, also in segments that go on and in the middle of a page. */
static void strings_wrap(void)
{
    be_real();
    c->seg[SEG_ES].base = DATA + 0x10;
    c->seg[SEG_ES].limit = c->seg[SEG_DS].limit = 0xffffffff;
    state_changed();
    memset(ram + DATA, 0, 0x11000);
    c->gpr[RAX] = 0x55;
    c->gpr[RCX] = 0x20;
    c->gpr[RDI] = 0xfff0;
    RUN("\xf3\xaa"); /* rep stosb */
    CHECK_EQ(c->gpr[RCX] & 0xffff, 0);
    CHECK_EQ(c->gpr[RDI] & 0xffff, 0x10);
    CHECK_EQ(ram[DATA + 0x1000f], 0x55);
    CHECK_EQ(ram[DATA + 0x10010], 0);
    CHECK_EQ(ram[DATA + 0x10], 0x55);
    CHECK_EQ(ram[DATA + 0x1f], 0x55);
    CHECK_EQ(ram[DATA + 0x20], 0);
    /* The source wraps, and the destination does not. */
    c->seg[SEG_DS].base = DATA + 0x10;
    for (uint32_t n = 0; n < 0x10; n++) ram[DATA + 0x10 + n] = (uint8_t)(n + 1);
    state_changed();
    c->gpr[RCX] = 0x20;
    c->gpr[RSI] = 0xfff0;
    c->gpr[RDI] = 0x4000;
    RUN("\xf3\xa4"); /* rep movsb */
    CHECK_EQ(ram[DATA + 0x4010 + 0xf], 0x55);
    CHECK_EQ(ram[DATA + 0x4010 + 0x10], 1);
    CHECK_EQ(ram[DATA + 0x4010 + 0x1f], 0x10);
    CHECK_EQ(c->gpr[RSI] & 0xffff, 0x10);
}

int main(void)
{
    if (!machine_create(KVS_CLOCK_REAL)) return 2;
    no_instruction_becomes_one(CODE + 63);
    no_instruction_becomes_one(CODE + 0xfff);
    too_long_becomes_shorter(CODE + 60, 8);
    too_long_becomes_shorter(CODE + 0x1000 - 4, 8);
    second_page_goes();
    fetch_is_canonical();
    limit_before_page();
    limits_differ();
    strings_wrap();
    machine_destroy();
    return checks_report();
}
