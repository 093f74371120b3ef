/* Virtual-8086 mode extensions and protected-mode virtual interrupts. */
#include "sys_harness.h"

enum { MAP = 0x200 };

static void be_vme(uint32_t level, bool on)
{
    be_v86(level);
    c->cr4 = on ? CR4_VME : 0;
    st16(ram + TSS + 102, MAP);
    memset(ram + TSS + MAP - 32, 0, 32); /* every INT n to the program */
    for (uint32_t v = 0; v < 256; v++) st32(ram + 4 * v, 0x12340000u | (0x100 + v));
    state_changed();
}
static uint16_t stack16(uint32_t n) { return ld16(ram + STACK3 + (c->gpr[RSP] & 0xffff) + 2 * n); }
static bool vif(void) { return c->eflags & FLAG_VIF; }
static bool gp(void) { return faulted(EXC_GP); }
#define FINE(n) CHECK_EQ(c->rip, n)

static void test_cli_sti(void)
{
    /* Virtual-8086 mode: IOPL 3 is as ever, below it VIF with VME, #GP without. */
    be_vme(3, true);
    c->eflags |= FLAG_IF | FLAG_VIF;
    RUN("\xfa");
    CHECK(!(c->eflags & FLAG_IF) && vif());
    RUN("\xfb");
    CHECK((c->eflags & FLAG_IF) && vif());
    for (uint32_t level = 0; level < 3; level++) {
        be_vme(level, true);
        c->eflags |= FLAG_IF | FLAG_VIF;
        RUN("\xfa");
        FINE(1);
        CHECK((c->eflags & FLAG_IF) && !vif());
        RUN("\xfb");
        FINE(1);
        CHECK(vif());
        CHECK_EQ(c->int_shadow, 0);
        c->eflags |= FLAG_VIP;
        RUN("\xfa"); /* CLI does not ask */
        FINE(1);
        RUN("\xfb");
        CHECK(gp());
        be_vme(level, false);
        RUN("\xfa");
        CHECK(gp());
        be_vme(level, false);
        RUN("\xfb");
        CHECK(gp());
    }
    /* Protected mode: PVI at CPL 3 only; VME alone is nothing there. */
    for (uint32_t pvi = 0; pvi < 2; pvi++) {
        be_protected(3);
        c->cr4 = pvi ? CR4_PVI : CR4_VME;
        state_changed();
        c->eflags |= FLAG_IF | FLAG_VIF;
        RUN("\xfa");
        if (!pvi) {
            CHECK(gp());
            continue;
        }
        FINE(CODE + 1);
        CHECK((c->eflags & FLAG_IF) && !vif());
        RUN("\xfb");
        CHECK(vif());
        c->eflags |= FLAG_VIP;
        FAULTS("\xfb", EXC_GP, 0);
        be_protected(3);
        c->cr4 = CR4_PVI;
        c->eflags |= FLAG_IOPL | FLAG_VIP;
        RUN("\xfb");
        FINE(CODE + 1);
        CHECK((c->eflags & FLAG_IF) && !vif());
    }
    be_long(3);
    c->cr4 |= CR4_PVI;
    RUN("\xfb");
    FINE(CODE + 1);
    CHECK(vif());
    /* PUSHF and POPF know nothing of PVI. */
    be_protected(3);
    c->cr4 = CR4_PVI;
    push32(FLAG_IF | FLAG_CF);
    RUN("\x9d");
    CHECK(!vif() && !(c->eflags & FLAG_IF) && flags_status(c) & FLAG_CF);
}

static void test_pushf_popf(void)
{
    be_vme(0, true);
    c->eflags |= FLAG_VIF | FLAG_NT;
    RUN("\x9c");
    FINE(1);
    CHECK_EQ(stack16(0), FLAG_VIF ? 2u | FLAG_IF | FLAG_IOPL | FLAG_NT : 0);
    c->eflags &= ~FLAG_VIF;
    c->eflags |= FLAG_IF;
    RUN("\x9c");
    CHECK_EQ(stack16(0), 2u | FLAG_IOPL | FLAG_NT);
    RUN("\x66\x9c"); /* 32 bits: never */
    CHECK(gp());
    be_vme(0, true);
    RUN("\x66\x9d");
    CHECK(gp());
    be_vme(0, false);
    RUN("\x9c");
    CHECK(gp());
    be_vme(0, true);
    st16(ram + STACK3 + 0x800, FLAG_IF | FLAG_CF | FLAG_DF | FLAG_IOPL);
    RUN("\x9d");
    FINE(1);
    CHECK_EQ(c->gpr[RSP], 0x802);
    CHECK(vif() && !(c->eflags & FLAG_IF) && iopl(c) == 0 && (c->eflags & FLAG_DF) && (flags_status(c) & FLAG_CF) && is_v86(c));
    be_vme(0, true);
    c->eflags |= FLAG_IF | FLAG_VIF;
    st16(ram + STACK3 + 0x800, 0);
    RUN("\x9d");
    CHECK(!vif() && (c->eflags & FLAG_IF));
    /* IF with VIP, and TF, are for the monitor. */
    be_vme(0, true);
    c->eflags |= FLAG_VIP;
    st16(ram + STACK3 + 0x800, FLAG_IF);
    RUN("\x9d");
    CHECK(gp());
    CHECK_EQ(stack32(4), 0x800); /* ESP of the program */
    be_vme(0, true);
    c->eflags |= FLAG_VIP;
    st16(ram + STACK3 + 0x800, FLAG_CF);
    RUN("\x9d");
    FINE(1);
    be_vme(0, true);
    st16(ram + STACK3 + 0x800, FLAG_TF);
    RUN("\x9d");
    CHECK(gp());
    be_vme(3, true);
    c->eflags |= FLAG_VIP;
    st16(ram + STACK3 + 0x800, FLAG_IF);
    RUN("\x9d");
    FINE(1);
    CHECK((c->eflags & FLAG_IF) && !vif());
}

static void test_iret(void)
{
    be_vme(0, true);
    st16(ram + STACK3 + 0x800, 0x20);
    st16(ram + STACK3 + 0x802, CODE >> 4);
    st16(ram + STACK3 + 0x804, FLAG_IF | FLAG_ZF | FLAG_IOPL);
    RUN("\xcf");
    FINE(0x20);
    CHECK(vif() && !(c->eflags & FLAG_IF) && iopl(c) == 0 && (flags_status(c) & FLAG_ZF) && is_v86(c));
    CHECK_EQ(c->gpr[RSP], 0x806);
    be_vme(0, true);
    c->eflags |= FLAG_VIP;
    st16(ram + STACK3 + 0x804, FLAG_IF);
    RUN("\xcf");
    CHECK(gp());
    be_vme(0, true);
    RUN("\x66\xcf");
    CHECK(gp());
    be_vme(0, false);
    RUN("\xcf");
    CHECK(gp());
}

static void test_int(void)
{
    /* Bit clear: the program's own handler, at any IOPL. */
    be_vme(0, true);
    c->eflags |= FLAG_IF | FLAG_VIF;
    RUN("\xcd\x21");
    FINE(0x121);
    CHECK_EQ(c->seg[SEG_CS].sel, 0x1234);
    CHECK(is_v86(c) && !vif() && (c->eflags & FLAG_IF));
    CHECK_EQ(stack16(0), 2);
    CHECK_EQ(stack16(1), CODE >> 4);
    CHECK_EQ(stack16(2), 2u | FLAG_IF | FLAG_IOPL);
    be_vme(3, true);
    c->eflags |= FLAG_IF | FLAG_VIF;
    RUN("\xcd\x21");
    FINE(0x121);
    CHECK(vif() && !(c->eflags & FLAG_IF));
    CHECK_EQ(stack16(2), 2u | FLAG_IF | FLAG_IOPL);
    /* Bit set: #GP below IOPL 3, else through the gate. */
    be_vme(0, true);
    ram[TSS + MAP - 32 + 4] = 1 << 1;
    RUN("\xcd\x21");
    CHECK(gp());
    be_vme(3, true);
    ram[TSS + MAP - 32 + 4] = 1 << 1;
    set_gate(IDT + 8 * 0x21, CODE0, HANDLERS + 16 * 0x21, 0xee, 0);
    RUN_N("\xcd\x21", 2);
    CHECK(faulted(0x21));
    be_vme(3, true);
    RUN("\xcd\x20"); /* a neighbour's bit is clear */
    FINE(0x120);
    /* INT3 is never redirected. */
    be_vme(3, true);
    set_gate(IDT + 8 * 3, CODE0, HANDLERS + 16 * 3, 0xee, 0);
    RUN_N("\xcc", 2);
    CHECK(faulted(3));
    /* The bit map outside the TSS. */
    be_vme(3, true);
    st16(ram + TSS + 102, 0x2100);
    RUN("\xcd\xff");
    CHECK(gp());
    be_vme(0, false);
    RUN("\xcd\x21");
    CHECK(gp());
}

static void test_offer(void)
{
    uint32_t out[4];
    cpuid_lookup(c, 1, 0, out);
    CHECK(out[3] & 2);
    CHECK(cr4_allowed(c) & CR4_VME);
    CHECK(cr4_allowed(c) & CR4_PVI);
}

int main(void)
{
    if (!machine_create(KVS_CLOCK_REAL)) return 2;
    test_offer();
    test_cli_sti();
    test_pushf_popf();
    test_iret();
    test_int();
    machine_destroy();
    return checks_report();
}
