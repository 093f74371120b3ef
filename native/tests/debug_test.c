/* Debug traps next to HLT, MOV SS, INT1 and repeated I/O. */
#include "sys_harness.h"

static bool db(void) { return faulted(EXC_DB); }

static void test_halt(void)
{
    /* The trap of a stepped HLT ends the halt. */
    be_long(0);
    c->eflags |= FLAG_TF;
    RUN_N("\xf4\x90", 2);
    CHECK(db());
    CHECK_EQ(stack64(0), CODE + 1);
    CHECK_EQ(c->dr6, 0xffff4ff0u);
    CHECK_EQ(atomic_load(&c->mp_state), KVS_MP_STATE_RUNNABLE);
    /* STI holds interrupts back, not traps. */
    be_long(0);
    c->eflags |= FLAG_TF;
    RUN_N("\xfb\xf4", 2);
    CHECK(db());
    CHECK_EQ(stack64(0), CODE + 1);
}

/* A data breakpoint of MOV SS waits for the next instruction; an INT1 there is the same #DB, INT 1 another one. */
static void test_mov_ss(void)
{
    for (int n = 0; n < 2; n++) {
        be_protected(0);
        st16(ram + DATA, DATA0);
        c->dr[1] = DATA;
        c->dr7 = 0x00f00408;
        state_changed();
        set_gate(IDT + 8, CODE0, HANDLERS + 16, 0x8e, 0);
        c->gpr[RBX] = DATA;
        if (n == 0) RUN_N("\x8e\x13\xf1", 3); /* mov ss, [ebx]; int1 */
        else RUN_N("\x8e\x13\x90", 3);
        CHECK(db());
        CHECK_EQ(stack32(0), CODE + 3);
        CHECK_EQ(c->dr6, 0xffff0ff2u);
        CHECK_EQ(c->pending_dbg, 0);
    }
    be_protected(0);
    RUN_N("\xf1", 2);
    CHECK(db());
    CHECK_EQ(c->dr6, 0xffff0ff0u);
}

/* A code breakpoint on a repeated OUTS hits before the first byte and not again after each of them. */
static void test_repeated_output(void)
{
    be_long(0);
    c->dr[0] = CODE;
    c->dr7 = 0x402;
    c->gpr[RCX] = 3;
    c->gpr[RSI] = DATA;
    c->gpr[RDX] = 0x80;
    RUN_N("\xf3\x6e\x90", 1);
    CHECK(db());
    CHECK_EQ(stack64(0), CODE);
    CHECK(!(stack64(2) & FLAG_RF)); /* the handler's affair */
    CHECK_EQ(c->gpr[RCX], 3);
    be_long(0);
    c->dr[0] = CODE;
    c->dr7 = 0x402;
    c->gpr[RCX] = 3;
    c->gpr[RSI] = DATA;
    c->gpr[RDX] = 0x80;
    memcpy(ram + CODE, "\xf3\x6e\x90", 3);
    c->eflags |= FLAG_RF; /* back from the handler */
    for (uint64_t left = 2;; left--) {
        CHECK_EQ(c->rip, left == 2 ? c->rip : CODE);
        CHECK_EQ(run_at(left == 2 ? CODE : c->rip, 8), KVS_EXIT_IO);
        CHECK_EQ(c->gpr[RCX], left);
        if (!left) break;
    }
    run_at(c->rip, 1);
    CHECK_EQ(c->rip, CODE + 3);
    /* An I/O breakpoint traps behind each byte, at the instruction while it goes on. */
    be_long(0);
    c->cr4 |= CR4_DE;
    c->dr[0] = 0x80;
    c->dr7 = 0x20402;
    c->gpr[RCX] = 2;
    c->gpr[RSI] = DATA;
    c->gpr[RDX] = 0x80;
    memcpy(ram + CODE, "\xf3\x6e\x90", 3);
    CHECK_EQ(run_at(CODE, 8), KVS_EXIT_IO);
    run_at(c->rip, 1);
    CHECK(db());
    CHECK_EQ(stack64(0), CODE);
    CHECK_EQ(c->dr6, 0xffff0ff1u);
    CHECK_EQ(c->gpr[RCX], 1);
}

int main(void)
{
    if (!machine_create(KVS_CLOCK_REAL)) return 2;
    test_halt();
    test_mov_ss();
    test_repeated_output();
    machine_destroy();
    return checks_report();
}
