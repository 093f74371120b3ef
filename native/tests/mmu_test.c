/* Segments, soft TLB and the slow accesses: what they answer, what they cache and what drops it. */
#include "../src/sys/sys.h"
#include "engine.h"
#include "harness.h"

#define RAM_SIZE (16u << 20)
enum { ROOT = 0x10000, L3 = 0x11000, L2 = 0x12000, L1 = 0x13000, DEVICE = 0xd0000000, ROM = 0xfff00000 };

static struct kvs_vm *vm;
static struct kvs_vcpu *c;
static struct kvs_ram *ram_object;
static uint8_t *ram;

static void forget(void)
{
    c->exc.pending = false;
    c->replay_count = c->replay_pos = 0;
    c->write_count = c->write_pos = 0;
    c->write_exited = c->io_read.active = false;
    c->code_modified = false;
    c->pending_dbg = 0;
}

static bool faulted(int st, uint8_t vector, uint32_t error)
{
    bool ok = st == ST_FAULT && c->exc.pending && c->exc.vector == vector && c->exc.error == error;
    if (!ok) printf("st %d pending %d vector %u error %x\n", st, c->exc.pending, c->exc.vector, c->exc.error);
    forget();
    return ok;
}

static void segments_flat(uint32_t cs_attr)
{
    for (int n = 0; n < SEG_COUNT; n++)
        c->seg[n] = (struct segment){ .limit = 0xffffffff, .attr = ATTR_P | ATTR_S | ATTR_W | ATTR_A | ATTR_DB | ATTR_G };
    c->seg[SEG_CS].attr = cs_attr | ATTR_P | ATTR_S | ATTR_CODE | ATTR_W | ATTR_A;
}

static void be_real(void)
{
    c->cr0 = c->cr4 = c->efer = 0;
    c->cpl = 0;
    c->eflags = 2;
    for (int n = 0; n < SEG_COUNT; n++) c->seg[n] = (struct segment){ .limit = 0xffff, .attr = ATTR_P | ATTR_S | ATTR_W };
    tlb_flush_all(c);
    vcpu_update_mode(c);
    forget();
}

static void be_protected(void)
{
    be_real();
    c->cr0 = CR0_PE;
    segments_flat(ATTR_DB);
    vcpu_update_mode(c);
}

/* 64-bit mode; pages 0-511 of the first 2 MiB at L1, identity, user, writable, A and D set. */
static void be_long(uint8_t cpl)
{
    be_protected();
    c->cr0 = CR0_PE | CR0_PG | CR0_WP;
    c->cr4 = CR4_PAE | CR4_PGE;
    c->efer = EFER_LME | EFER_LMA | EFER_NX;
    c->cr3 = ROOT;
    segments_flat(ATTR_L);
    c->cpl = cpl;
    memset(ram + ROOT, 0, 4 * PAGE_SIZE);
    st64(ram + ROOT, L3 | 0x67);
    st64(ram + L3, L2 | 0x67);
    st64(ram + L2, L1 | 0x67);
    for (uint64_t n = 0; n < 512; n++) st64(ram + L1 + 8 * n, n << 12 | 0x67);
    tlb_flush_all(c);
    vcpu_update_mode(c);
}

static void pte(uint64_t la, uint64_t v) { st64(ram + L1 + (la >> 12 & 511) * 8, v); }

/* ---- segments ---- */
static void test_segments(void)
{
    uint64_t la;
    be_real();
    c->seg[SEG_DS].base = 0xffff0;
    CHECK_EQ(seg_to_linear(c, SEG_DS, 0xffff, 1, ACC_R, &la), ST_OK);
    CHECK_EQ(la, 0x10ffef);
    CHECK(faulted(seg_to_linear(c, SEG_DS, 0xffff, 2, ACC_R, &la), EXC_GP, 0));
    CHECK(faulted(seg_to_linear(c, SEG_SS, 0xffff, 2, ACC_W, &la), EXC_SS, 0));
    CHECK(faulted(seg_to_linear(c, SEG_DS, 0x10000, 1, ACC_R, &la), EXC_GP, 0));
    c->seg[SEG_ES].limit = 0xffffffff; /* a limit set in protected mode lives on */
    CHECK_EQ(seg_to_linear(c, SEG_ES, 0xdeadbeef, 4, ACC_W, &la), ST_OK);
    CHECK_EQ(la, 0xdeadbeef);
    CHECK_EQ(seg_to_linear(c, SEG_CS, 0x10, 2, ACC_W, &la), ST_OK); /* no types in real mode */

    be_protected();
    c->seg[SEG_DS] = (struct segment){ .base = 0xfffffff0, .limit = 0x1000, .attr = ATTR_P | ATTR_S };
    CHECK_EQ(seg_to_linear(c, SEG_DS, 0x20, 4, ACC_R, &la), ST_OK);
    CHECK_EQ(la, 0x10); /* linear addresses wrap at 4 GiB */
    CHECK_EQ(seg_to_linear(c, SEG_DS, 0xffd, 4, ACC_R, &la), ST_OK);
    CHECK(faulted(seg_to_linear(c, SEG_DS, 0xffe, 4, ACC_R, &la), EXC_GP, 0));
    CHECK(faulted(seg_to_linear(c, SEG_DS, 0xfffffffe, 4, ACC_R, &la), EXC_GP, 0));
    CHECK(faulted(seg_to_linear(c, SEG_DS, 0, 4, ACC_W, &la), EXC_GP, 0));  /* read-only data */
    CHECK(faulted(seg_to_linear(c, SEG_DS, 0, 4, ACC_RW, &la), EXC_GP, 0));
    CHECK(faulted(seg_to_linear(c, SEG_CS, 0, 4, ACC_W, &la), EXC_GP, 0));
    CHECK_EQ(seg_to_linear(c, SEG_CS, 0, 4, ACC_R, &la), ST_OK);
    c->seg[SEG_CS].attr &= ~ATTR_W; /* execute-only */
    CHECK(faulted(seg_to_linear(c, SEG_CS, 0, 4, ACC_R, &la), EXC_GP, 0));
    CHECK_EQ(seg_to_linear(c, SEG_CS, 0, 4, ACC_X, &la), ST_OK);
    c->seg[SEG_DS].attr = ATTR_NULL;
    CHECK(faulted(seg_to_linear(c, SEG_DS, 0, 1, ACC_R, &la), EXC_GP, 0));
    /* Expand-down: above the limit, up to 64 KiB or 4 GiB. */
    c->seg[SEG_SS] = (struct segment){ .limit = 0xfff, .attr = ATTR_P | ATTR_S | ATTR_W | ATTR_EC };
    CHECK(faulted(seg_to_linear(c, SEG_SS, 0xfff, 1, ACC_R, &la), EXC_SS, 0));
    CHECK_EQ(seg_to_linear(c, SEG_SS, 0x1000, 1, ACC_W, &la), ST_OK);
    CHECK_EQ(seg_to_linear(c, SEG_SS, 0xfffe, 2, ACC_W, &la), ST_OK);
    CHECK(faulted(seg_to_linear(c, SEG_SS, 0xffff, 2, ACC_W, &la), EXC_SS, 0));
    c->seg[SEG_SS].attr |= ATTR_DB;
    CHECK_EQ(seg_to_linear(c, SEG_SS, 0xffff, 2, ACC_W, &la), ST_OK);
    CHECK(faulted(seg_to_linear(c, SEG_SS, 0xffffffff, 2, ACC_W, &la), EXC_SS, 0));
    CHECK_EQ(seg_to_linear(c, SEG_ES | 0x80, 0x100000010, 4, ACC_R, &la), ST_OK);
    CHECK_EQ(la, 0x10);

    be_long(3);
    c->seg[SEG_FS].base = 0x100000;
    c->seg[SEG_DS].base = 0x5000; /* ignored */
    CHECK_EQ(seg_to_linear(c, SEG_FS, 0x10, 8, ACC_W, &la), ST_OK);
    CHECK_EQ(la, 0x100010);
    CHECK_EQ(seg_to_linear(c, SEG_DS, 0x10, 8, ACC_W, &la), ST_OK);
    CHECK_EQ(la, 0x10);
    CHECK_EQ(seg_to_linear(c, SEG_FS | 0x80, 0x10, 8, ACC_W, &la), ST_OK);
    CHECK_EQ(la, 0x10);
    CHECK_EQ(seg_to_linear(c, SEG_DS, 0x7ffffffffff8, 8, ACC_R, &la), ST_OK);
    CHECK(faulted(seg_to_linear(c, SEG_DS, 0x7ffffffffff9, 8, ACC_R, &la), EXC_GP, 0));
    CHECK(faulted(seg_to_linear(c, SEG_SS | 0x80, 0x800000000000, 1, ACC_R, &la), EXC_SS, 0));
    CHECK_EQ(seg_to_linear(c, SEG_SS, 0xffff800000000000, 8, ACC_R, &la), ST_OK);
    /* Alignment */
    c->cr0 |= CR0_AM;
    CHECK_EQ(seg_to_linear(c, SEG_DS, 3, 4, ACC_R, &la), ST_OK);
    c->eflags |= FLAG_AC;
    for (uint32_t size = 1; size <= 8; size *= 2)
        for (uint32_t off = 0; off < 8; off++) {
            int st = seg_to_linear(c, SEG_DS, off, size, ACC_W, &la);
            if (off % size) CHECK(faulted(st, EXC_AC, 0));
            else CHECK_EQ(st, ST_OK);
        }
    c->cpl = 0;
    CHECK_EQ(seg_to_linear(c, SEG_DS, 3, 4, ACC_R, &la), ST_OK);
}

/* ---- reads and writes ---- */
static void test_access(void)
{
    uint64_t v = 0;
    be_long(3);
    st64(ram + 0x5ff8, 0x1122334455667788);
    st64(ram + 0x9000, 0x99aabbccddeeff00);
    pte(0x6000, 0x9067);
    CHECK(!tlb_probe(c, TLB_R, 0x5ff8, 8));
    CHECK_EQ(vread(c, SEG_DS, 0x5ff8, &v, 8), ST_OK);
    CHECK_EQ(v, 0x1122334455667788);
    CHECK(tlb_probe(c, TLB_R, 0x5ff8, 8) == ram + 0x5ff8);
    CHECK(tlb_probe(c, TLB_W, 0x5ff8, 8) == ram + 0x5ff8); /* dirty already */
    CHECK(!tlb_probe(c, TLB_R, 0x5ff9, 8));
    CHECK(!tlb_probe(c, TLB_R, 0x5ff8 + BIT(24), 1));
    CHECK_EQ(vread(c, SEG_DS, 0x5ffc, &v, 8), ST_OK);
    CHECK_EQ(v, 0xddeeff0011223344);
    v = 0xa1a2a3a4a5a6a7a8;
    CHECK_EQ(vwrite(c, SEG_DS, 0x5ffd, &v, 8), ST_OK);
    CHECK_EQ(ld32(ram + 0x5ffc), 0xa6a7a844);
    CHECK_EQ(ld64(ram + 0x9000), 0x99aabba1a2a3a4a5);
    /* A fault in the second page leaves the first alone, and CR2 is where the second begins. */
    pte(0x6000, 0);
    tlb_flush_page(c, 0x6000);
    v = 0;
    CHECK_EQ(vwrite(c, SEG_DS, 0x5ffc, &v, 8), ST_FAULT);
    CHECK_EQ(c->exc.payload, 0x6000);
    CHECK(faulted(ST_FAULT, EXC_PF, PF_W | PF_U));
    CHECK_EQ(ld32(ram + 0x5ffc), 0xa6a7a844);
    CHECK_EQ(vread(c, SEG_DS, 0x5ffc, &v, 8), ST_FAULT);
    CHECK(faulted(ST_FAULT, EXC_PF, PF_U));
    /* D comes with the first write, and the W tag with D. */
    pte(0x7000, 0x7007);
    CHECK_EQ(vread(c, SEG_DS, 0x7000, &v, 8), ST_OK);
    CHECK_EQ(ld64(ram + L1 + 7 * 8), 0x7027);
    CHECK(tlb_probe(c, TLB_R, 0x7000, 8) && !tlb_probe(c, TLB_W, 0x7000, 8));
    CHECK_EQ(vwrite(c, SEG_DS, 0x7000, &v, 8), ST_OK);
    CHECK_EQ(ld64(ram + L1 + 7 * 8), 0x7067);
    CHECK(tlb_probe(c, TLB_W, 0x7000, 8));
    /* Classes: what a supervisor has cached is no user's. */
    pte(0x8000, 0x8063);
    CHECK_EQ(lread(c, 0x8000, &v, 8, LA_SYSTEM), ST_OK);
    CHECK(!tlb_probe(c, TLB_R, 0x8000, 8));
    CHECK(faulted(vread(c, SEG_DS, 0x8000, &v, 8), EXC_PF, PF_P | PF_U));
    /* SMAP: implicit accesses never pass, explicit ones with AC do. */
    be_long(0);
    c->cr4 |= CR4_SMAP;
    c->eflags |= FLAG_AC;
    vcpu_update_mode(c);
    CHECK_EQ(vread(c, SEG_DS, 0x9000, &v, 8), ST_OK);
    CHECK(faulted(lread(c, 0x9000, &v, 8, LA_SYSTEM), EXC_PF, PF_P));
    c->eflags &= ~FLAG_AC;
    vcpu_update_mode(c);
    CHECK(!tlb_probe(c, TLB_R, 0x9000, 8));
    CHECK(faulted(vread(c, SEG_DS, 0x9000, &v, 8), EXC_PF, PF_P));
    CHECK(faulted(lread(c, 0x900000000000, &v, 8, LA_SYSTEM), EXC_GP, 0));
    /* Linear addresses of 32-bit code wrap. */
    be_protected();
    ram[0] = 0x5a;
    memset(ram + RAM_SIZE, 0xe5, PAGE_SIZE);
    uint8_t two[2];
    c->seg[SEG_DS].base = 1;
    CHECK_EQ(vread(c, SEG_DS, ROM + 0xffffe, two, 2), ST_OK);
    CHECK_EQ(two[1], 0x5a);
    /* Offsets do not. */
    c->seg[SEG_DS].base = 0;
    CHECK(faulted(vread(c, SEG_DS, ROM + 0xfffff, two, 2), EXC_GP, 0));
}

static void test_locked_and_rmw(void)
{
    be_long(3);
    st64(ram + 0x5ff8, 5);
    CHECK_EQ(vrmw_begin(c, SEG_DS, 0x5ff8, 8), ST_OK);
    CHECK_EQ(ld64(c->rmw.data), 5);
    st64(c->rmw.data, 6);
    vrmw_end(c);
    CHECK_EQ(ld64(ram + 0x5ff8), 6);
    CHECK_EQ(vrmw_begin_locked(c, SEG_DS, 0x5ff8, 8), ST_OK);
    CHECK(c->rmw.host == ram + 0x5ff8);
    vrmw_end_locked(c);
    st64(ram + 0x5ffc, 0x0807060504030201); /* across pages 5 and 6 */
    CHECK_EQ(vrmw_begin_locked(c, SEG_DS, 0x5ffc, 8), ST_OK);
    CHECK(!c->rmw.host);
    CHECK_EQ(ld64(c->rmw.data), 0x0807060504030201);
    st64(c->rmw.data, 0x1817161514131211);
    vrmw_end_locked(c);
    CHECK_EQ(ld64(ram + 0x5ffc), 0x1817161514131211);
    CHECK_EQ(vrmw_begin_locked(c, SEG_DS, 0x503c, 8), ST_OK); /* across cache lines */
    CHECK(!c->rmw.host);
    vrmw_end_locked(c);
    pte(0x6000, 0x6065);
    tlb_flush_all(c);
    CHECK(faulted(vrmw_begin(c, SEG_DS, 0x6000, 4), EXC_PF, PF_P | PF_W | PF_U));
    CHECK(faulted(vrmw_begin_locked(c, SEG_DS, 0x5ffe, 4), EXC_PF, PF_P | PF_W | PF_U));
    CHECK_EQ(atomic_load(&vm->quiesced), 0);
}

static void test_code_and_watch(void)
{
    uint64_t v = 1, bytes;
    struct kvs_ram *r;
    int st;
    be_long(3);
    const uint8_t *host = mmu_fetch(c, 0x5123, &r, &st);
    CHECK(host == ram + 0x5123 && r == ram_object);
    CHECK(tlb_probe(c, TLB_X, 0x5123, 1) == ram + 0x5123);
    CHECK(mmu_fetch(c, 0x5124, &r, &st) == ram + 0x5124 && r == ram_object);
    pte(0x6000, 0x6067 | BIT(63));
    CHECK(!mmu_fetch(c, 0x6000, &r, &st));
    CHECK(faulted(st, EXC_PF, PF_P | PF_U | PF_I));
    /* A page with code gets no W tag, an existing one goes, and stores are noticed. */
    CHECK_EQ(vwrite(c, SEG_DS, 0x5000, &v, 8), ST_OK);
    CHECK(tlb_probe(c, TLB_W, 0x5000, 8));
    tlb_deny_write(c, ram + 0x5000);
    CHECK(!tlb_probe(c, TLB_W, 0x5000, 8) && tlb_probe(c, TLB_R, 0x5000, 8));
    atomic_store(&ram_object->code_marks[5], 1);
    CHECK(!c->code_modified);
    CHECK(!vspan(c, SEG_DS, 0x5000, true, &bytes));
    CHECK_EQ(vwrite(c, SEG_DS, 0x5000, &v, 8), ST_OK);
    CHECK(c->code_modified);
    CHECK_EQ(atomic_load(&ram_object->code_marks[5]), 0);
    forget();
    atomic_store(&ram_object->code_marks[5], ~0ull);
    tlb_flush_all(c);
    CHECK_EQ(vrmw_begin_locked(c, SEG_DS, 0x5010, 8), ST_OK);
    CHECK(!c->rmw.host);
    st64(c->rmw.data, 77);
    vrmw_end_locked(c);
    CHECK(c->code_modified);
    CHECK_EQ(ld64(ram + 0x5010), 77);
    atomic_store(&ram_object->code_marks[5], 0);
    forget();
    /* Spans end with the page and with the segment. */
    CHECK_EQ(vread(c, SEG_DS, 0x8000, &v, 8), ST_OK);
    CHECK(vspan(c, SEG_DS, 0x8ff0, false, &bytes) == ram + 0x8ff0);
    CHECK_EQ(bytes, 16);
    CHECK(!vspan(c, SEG_DS, 0x800000000000, false, &bytes) && !c->exc.pending);
    be_protected();
    c->seg[SEG_ES].limit = 0x8fff;
    c->seg[SEG_ES].base = 0x10;
    CHECK_EQ(vread(c, SEG_ES, 0x8f00, &v, 8), ST_OK);
    CHECK(vspan(c, SEG_ES, 0x8f00, true, &bytes) == ram + 0x8f10);
    CHECK_EQ(bytes, 0xf0);
    c->seg[SEG_ES].limit = 0x8f0f;
    CHECK(vspan(c, SEG_ES, 0x8f00, true, &bytes) && bytes == 0x10);
    CHECK(!vspan(c, SEG_ES, 0x8f10, true, &bytes) && !c->exc.pending);
    /* A watched page stays out of the TLB, and a hit is recorded after the access. */
    be_long(0);
    c->dr[0] = 0x5008;
    c->dr7 = 0x2 | 3 << 16 | 2 << 18; /* G0, read or write, 8 bytes */
    CHECK_EQ(vread(c, SEG_DS, 0x5000, &v, 8), ST_OK);
    CHECK_EQ(c->pending_dbg, 0);
    CHECK(!tlb_probe(c, TLB_R, 0x5000, 8) && !tlb_probe(c, TLB_W, 0x5000, 8));
    CHECK_EQ(vwrite(c, SEG_DS, 0x5004, &v, 8), ST_OK);
    CHECK_EQ(c->pending_dbg & 15, 1);
    c->dr7 = 0;
    forget();
}

/* ---- flushing ---- */
static void warm(uint64_t la)
{
    uint8_t b;
    int st;
    CHECK_EQ(vread(c, SEG_DS, la, &b, 1), ST_OK);
    CHECK_EQ(vwrite(c, SEG_DS, la, &b, 1), ST_OK);
    CHECK(mmu_fetch(c, la, NULL, &st) != NULL);
}
static int cached(uint64_t la)
{
    return (tlb_probe(c, TLB_R, la, 1) ? 1 : 0) | (tlb_probe(c, TLB_W, la, 1) ? 2 : 0) | (tlb_probe(c, TLB_X, la, 1) ? 4 : 0);
}

static void test_flush(void)
{
    for (int overflow = 0; overflow < 2; overflow++) {
        be_long(0);
        for (uint64_t n = 0; n < 512; n++) pte(n << 12, n << 12 | 0x63 | (n & 1) << 8);
        uint64_t jc = c->jc_key;
        for (int round = 0; round < (overflow ? 3 : 1); round++) {
            for (uint64_t n = 0x20; n < (overflow ? 512 : 0x80); n++) {
                warm(n << 12);
                if (round < 2 && overflow) tlb_flush_page(c, n << 12);
            }
        }
        CHECK_EQ(cached(0x20000), 7);
        CHECK_EQ(cached(0x21000), 7);
        tlb_flush_page(c, 0x22fff);
        CHECK_EQ(cached(0x22000), 0);
        CHECK_EQ(cached(0x23000), 7);
        CHECK(c->jc_key != jc);
        tlb_flush_writes(c);
        CHECK_EQ(cached(0x23000), 5);
        CHECK_EQ(cached(0x24000), 5);
        warm(0x23000);
        warm(0x24000);
        tlb_flush_nonglobal(c);
        CHECK_EQ(cached(0x24000), 0);
        if (!overflow) CHECK_EQ(cached(0x23000), 7);
        tlb_flush_all(c);
        for (uint64_t n = 0; n < 512; n++) CHECK_EQ(cached(n << 12), 0);
    }
    /* INVLPG drops every piece of a large page, whatever its address in it. */
    be_long(0);
    st64(ram + L2 + 8, 0x200000 | 0xe3);
    st64(ram + L3 + 8, 0xe3); /* 1 GiB page at 1 GiB */
    c->cpuid_features |= BIT(FEAT_1G);
    warm(0x201000);
    warm(0x3ff000);
    st64(ram + L2 + 32, 0x800000 | 0xe3);
    warm(0x805000);
    tlb_flush_page(c, 0x300000);
    CHECK_EQ(cached(0x201000) | cached(0x3ff000), 0);
    CHECK_EQ(cached(0x805000), 7);
    warm(0x40000000 + 0x801000);
    tlb_flush_page(c, 0x7ffff000);
    CHECK_EQ(cached(0x40801000), 0);
    CHECK_EQ(cached(0x805000), 7);
    /* Every class at once. */
    c->cpl = 3;
    vcpu_update_mode(c);
    warm(0x5000);
    c->cpl = 0;
    vcpu_update_mode(c);
    tlb_flush_page(c, 0x5000);
    c->cpl = 3;
    vcpu_update_mode(c);
    CHECK_EQ(cached(0x5000), 0);
    /* An empty entry matches nothing, in every slot. */
    tlb_flush_all(c);
    for (uint64_t n = 0; n < TLB_SIZE; n++) CHECK_EQ(cached(n << 12) | cached(~(n << 12)), 0);
}

/* ---- devices ---- */
static void answer(uint64_t gpa, uint32_t size, uint64_t data)
{
    CHECK_EQ(c->run->exit_reason, KVS_EXIT_MMIO);
    CHECK_EQ(c->run->mmio.phys_addr, gpa);
    CHECK_EQ(c->run->mmio.len, size);
    CHECK_EQ(c->run->mmio.is_write, 0);
    memcpy(c->run->mmio.data, &data, 8);
    c->run->mmio.len = 200; /* only the bytes count */
    iobus_complete_exit(c);
}
static void expect_write(uint64_t gpa, uint32_t size, uint64_t data)
{
    uint64_t got;
    CHECK(iobus_flush_writes(c));
    CHECK_EQ(c->run->exit_reason, KVS_EXIT_MMIO);
    CHECK_EQ(c->run->mmio.phys_addr, gpa);
    CHECK_EQ(c->run->mmio.len, size);
    CHECK_EQ(c->run->mmio.is_write, 1);
    memcpy(&got, c->run->mmio.data, 8);
    CHECK_EQ(got, data);
    iobus_complete_exit(c);
}

static void test_devices(void)
{
    uint8_t buffer[32];
    uint64_t v = 0;
    be_protected();
    /* 16 bytes leave as two reads; the instruction restarts after each. */
    CHECK_EQ(vread(c, SEG_DS, DEVICE, buffer, 16), ST_EXIT);
    answer(DEVICE, 8, 0x1111111111111111);
    CHECK_EQ(vread(c, SEG_DS, DEVICE, buffer, 16), ST_EXIT);
    answer(DEVICE + 8, 8, 0x2222222222222222);
    CHECK_EQ(vread(c, SEG_DS, DEVICE, buffer, 16), ST_OK);
    CHECK_EQ(ld64(buffer), 0x1111111111111111);
    CHECK_EQ(ld64(buffer + 8), 0x2222222222222222);
    iobus_insn_done(c);
    /* Another address on the second try: what was recorded from there on is dropped. */
    CHECK_EQ(vread(c, SEG_DS, DEVICE, &v, 4), ST_EXIT);
    answer(DEVICE, 4, 1);
    CHECK_EQ(vread(c, SEG_DS, DEVICE + 4, &v, 4), ST_EXIT);
    answer(DEVICE + 4, 4, 2);
    CHECK_EQ(c->replay_count, 1);
    CHECK_EQ(vread(c, SEG_DS, DEVICE + 4, &v, 4), ST_OK);
    CHECK_EQ(v, 2);
    iobus_insn_done(c);
    /* RMW: the write leaves after the instruction. */
    CHECK_EQ(vrmw_begin(c, SEG_DS, DEVICE + 0x10, 4), ST_EXIT);
    answer(DEVICE + 0x10, 4, 0x10);
    CHECK_EQ(vrmw_begin_locked(c, SEG_DS, DEVICE + 0x10, 4), ST_OK);
    CHECK(!c->rmw.host);
    CHECK_EQ(ld32(c->rmw.data), 0x10);
    st32(c->rmw.data, 0x11);
    vrmw_end_locked(c);
    iobus_insn_done(c);
    expect_write(DEVICE + 0x10, 4, 0x11);
    CHECK(!iobus_flush_writes(c));
    CHECK_EQ(atomic_load(&vm->quiesced), 0);
    /* A big write: fragments of 8 bytes and the rest. */
    for (int n = 0; n < 32; n++) buffer[n] = (uint8_t)n;
    CHECK_EQ(vwrite(c, SEG_DS, DEVICE + 3, buffer, 20), ST_OK);
    expect_write(DEVICE + 3, 8, 0x0706050403020100);
    expect_write(DEVICE + 11, 8, 0x0f0e0d0c0b0a0908);
    expect_write(DEVICE + 19, 4, 0x13121110);
    CHECK(!iobus_flush_writes(c));
    /* A store to ROM is a device's; a read is not. */
    v = ~0ull;
    CHECK_EQ(vwrite(c, SEG_DS, ROM + 0xff000, &v, 2), ST_OK);
    CHECK_EQ(ram[RAM_SIZE], 0xe5);
    expect_write(ROM + 0xff000, 2, 0xffff);
    CHECK_EQ(vread(c, SEG_DS, ROM + 0xff000, &v, 2), ST_OK);
    CHECK_EQ((uint16_t)v, 0xe5e5);
    CHECK(!tlb_probe(c, TLB_W, ROM + 0xff000, 1) && tlb_probe(c, TLB_R, ROM + 0xff000, 1));
    /* Across RAM and device. */
    ram[RAM_SIZE - 1] = 0xaa;
    CHECK_EQ(vread(c, SEG_DS, RAM_SIZE - 1, &v, 4), ST_EXIT);
    answer(RAM_SIZE, 3, 0xccddbb);
    CHECK_EQ(vread(c, SEG_DS, RAM_SIZE - 1, &v, 4), ST_OK);
    CHECK_EQ((uint32_t)v, 0xccddbbaa);
    iobus_insn_done(c);
    /* Fetching from a device is no exception. */
    int st;
    CHECK(!mmu_fetch(c, DEVICE, NULL, &st));
    CHECK_EQ(st, ST_EXIT);
    CHECK_EQ(c->run->exit_reason, KVS_EXIT_INTERNAL_ERROR);
    /* Ports */
    uint32_t p = 0;
    CHECK_EQ(iobus_port_read(c, 0x3f8, &p, 1), ST_EXIT);
    CHECK_EQ(c->run->exit_reason, KVS_EXIT_IO);
    CHECK_EQ(c->run->io.port, 0x3f8);
    CHECK_EQ(c->run->io.direction, KVS_EXIT_IO_IN);
    memset((uint8_t *)c->run + c->run->io.data_offset, 0x77, 8);
    iobus_complete_exit(c);
    CHECK_EQ(iobus_port_read(c, 0x3f8, &p, 1), ST_OK);
    CHECK_EQ(p, 0x77);
    iobus_insn_done(c);
    CHECK_EQ(iobus_port_write(c, 0x3f8, 0x12345678, 2), ST_EXIT_DONE);
    CHECK_EQ(ld32((uint8_t *)c->run + c->run->io.data_offset), 0x5678);
    CHECK_EQ(c->run->io.direction, KVS_EXIT_IO_OUT);
    CHECK_EQ(c->run->io.count, 1);
    CHECK_EQ(c->stats.exits_io, 2);
}

int main(void)
{
    struct kvs_vm_config config = { .size = sizeof config, .clock_mode = KVS_CLOCK_VIRTUAL, TEST_ENGINE };
    if (kvs_vm_create(&config, &vm) || kvs_vcpu_create(vm, 0, &c) || kvs_ram_create(RAM_SIZE + PAGE_SIZE, &ram_object)) return 1;
    ram = kvs_ram_address(ram_object);
    struct kvs_userspace_memory_region low = { .memory_size = RAM_SIZE };
    struct kvs_userspace_memory_region rom = { .slot = 1, .flags = KVS_MEM_READONLY, .guest_phys_addr = ROM + 0xff000, .memory_size = PAGE_SIZE };
    CHECK_EQ(kvs_memslot_set(vm, &low, ram_object, 0), 0);
    CHECK_EQ(kvs_memslot_set(vm, &rom, ram_object, RAM_SIZE), 0);
    test_segments();
    test_access();
    test_locked_and_rmw();
    test_code_and_watch();
    test_flush();
    test_devices();
    kvs_vcpu_destroy(c);
    kvs_vm_destroy(vm);
    kvs_ram_release(ram_object);
    return checks_report();
}
