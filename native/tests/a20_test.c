/* Address line A20: data, code and page tables, and that nothing translated before outlives a change. */
#include "sys_harness.h"

static void set_a20(uint32_t enabled) { CHECK_EQ(kvs_vm_set_a20(vm, enabled), KVS_OK); }

static void test_call(void)
{
    uint32_t enabled = 7;
    CHECK_EQ(kvs_vm_get_a20(vm, &enabled), KVS_OK);
    CHECK_EQ(enabled, 1);
    CHECK_EQ(kvs_vm_set_a20(vm, 2), -KVS_EINVAL);
    CHECK_EQ(kvs_vm_set_a20(NULL, 1), -KVS_EINVAL);
    CHECK_EQ(kvs_vm_get_a20(vm, NULL), -KVS_EINVAL);
    set_a20(0);
    CHECK_EQ(kvs_vm_get_a20(vm, &enabled), KVS_OK);
    CHECK_EQ(enabled, 0);
    set_a20(1);
}

/* FFFF:0010 is 1 MiB, or 0. */
static void test_real_data(void)
{
    be_real();
    segment_set_real(&c->seg[SEG_ES], 0xffff);
    segments_changed(c);
    c->gpr[RBX] = 0x710;
    ram[0x700] = 1;
    ram[0x100700] = 2;
    RUN("\x26\x8a\x07"); /* mov al, es:[bx] */
    CHECK_EQ(c->gpr[RAX] & 0xff, 2);
    set_a20(0);
    RUN("\x26\x8a\x07");
    CHECK_EQ(c->gpr[RAX] & 0xff, 1);
    c->gpr[RAX] = 0x33;
    RUN("\x26\x88\x07");
    CHECK_EQ(ram[0x700], 0x33);
    CHECK_EQ(ram[0x100700], 2);
    set_a20(1);
    RUN("\x26\x88\x07");
    CHECK_EQ(ram[0x100700], 0x33);
}

static void test_code(void)
{
    be_protected(0);
    memcpy(ram + 0x100000 + CODE, "\xb8\x02\x00\x00\x00\xeb\xf9", 7); /* mov eax, 2; jmp $-5 */
    memcpy(ram + CODE, "\xb8\x01\x00\x00\x00\xeb\xf9", 7);
    for (int n = 0; n < 3; n++) {
        run_at(0x100000 + CODE, 3);
        CHECK_EQ(c->gpr[RAX], 2);
        set_a20(0);
        run_at(0x100000 + CODE, 3);
        CHECK_EQ(c->gpr[RAX], 1);
        set_a20(1);
    }
    /* The chain of blocks that ran before the change is left too. */
    run_at(0x100000 + CODE, 101);
    CHECK_EQ(c->gpr[RAX], 2);
    set_a20(0);
    run_at(c->rip, 2);
    CHECK_EQ(c->gpr[RAX], 1);
    set_a20(1);
}

/* A page of 2 MiB: both of its mebibytes are the lower one. */
static void test_paging(void)
{
    be_long(0);
    st32(ram + 0x30000, 0x1111);
    st32(ram + 0x130000, 0x2222);
    c->gpr[RBX] = 0x130000;
    RUN("\x8b\x03");
    CHECK_EQ(c->gpr[RAX], 0x2222);
    set_a20(0);
    RUN("\x8b\x03");
    CHECK_EQ(c->gpr[RAX], 0x1111);
    /* The page directory as well: its copy one mebibyte up is not looked at. */
    st64(ram + PDPT, (PD + 0x100000) | 7);
    memset(ram + PD + 0x100000, 0, 0x1000);
    c->gpr[RCX] = PML4;
    RUN_N("\x0f\x22\xd9\x8b\x03", 2); /* mov cr3, rcx */
    CHECK_EQ(c->rip, CODE + 5);
    CHECK_EQ(c->gpr[RAX], 0x1111);
    set_a20(1);
    memset(ram + PD + 0x100000, 0, 0x1000);
}

/* INIT and reset are inputs of the processor; the line belongs to the machine. */
static void test_reset(void)
{
    uint32_t enabled = 1;
    set_a20(0);
    kvs_vcpu_reset(c);
    vcpu_init_reset(c);
    kvs_vm_get_a20(vm, &enabled);
    CHECK_EQ(enabled, 0);
    set_a20(1);
}

int main(void)
{
    if (!machine_create(KVS_CLOCK_REAL)) return 2;
    test_call();
    test_real_data();
    test_code();
    test_paging();
    test_reset();
    machine_destroy();
    return checks_report();
}
