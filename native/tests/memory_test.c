/* RAM objects, slots, dirty log, host access and doorbells. */
#include <pthread.h>
#include <stdlib.h>

#include "../src/irqchip/irqchip.h"
#include "../src/mmu/mmu.h"
#include "harness.h"

static struct kvs_vm *vm;
static struct kvs_vcpu *c;

static int32_t slot_set(uint32_t id, uint64_t gpa, uint64_t size, uint32_t flags, struct kvs_ram *ram, uint64_t off)
{
    struct kvs_userspace_memory_region r = { .slot = id, .flags = flags, .guest_phys_addr = gpa, .memory_size = size };
    return kvs_memslot_set(vm, &r, ram, off);
}

static int32_t slot_set_host(uint32_t id, uint64_t gpa, uint64_t size, void *host)
{
    struct kvs_userspace_memory_region r = { .slot = id, .guest_phys_addr = gpa, .memory_size = size, .userspace_addr = (uintptr_t)host };
    return kvs_memslot_set(vm, &r, NULL, 0);
}

static void test_ram(void)
{
    struct kvs_ram *ram;
    CHECK_EQ(kvs_ram_create(0, &ram), -KVS_EINVAL);
    CHECK_EQ(kvs_ram_create(4097, &ram), -KVS_EINVAL);
    CHECK_EQ(kvs_ram_create(4096, NULL), -KVS_EINVAL);
    CHECK_EQ(kvs_ram_create(1ull << 50, &ram), -KVS_EINVAL);
    CHECK_EQ(kvs_ram_create(1ull << 36, &ram), 0); /* nothing is committed */
    uint8_t *p = kvs_ram_address(ram);
    p[(1ull << 36) - 1] = 1;
    kvs_ram_acquire(ram);
    kvs_ram_release(ram);
    CHECK_EQ(p[(1ull << 36) - 1], 1);
    kvs_ram_release(ram);
    kvs_ram_release(NULL);
}

static void test_slots(struct kvs_ram *ram)
{
    CHECK_EQ(kvs_memslot_set(NULL, NULL, NULL, 0), -KVS_EINVAL);
    CHECK_EQ(slot_set(0, 0x1000, 0x10000, 0, ram, 0), 0);
    CHECK_EQ(slot_set(1, 0x10000, 0x1000, 0, ram, 0), -KVS_EOVERLAP);
    CHECK_EQ(slot_set(1, 0, 0x1000, 0, ram, 0), 0);
    CHECK_EQ(slot_set(2, 0, 0x2000, 0, ram, 0), -KVS_EOVERLAP);
    CHECK_EQ(slot_set(2, 0x11000, 0x1000, 0, ram, 0x11000), 0);
    CHECK_EQ(slot_set(3, 0x20800, 0x1000, 0, ram, 0), -KVS_EINVAL);
    CHECK_EQ(slot_set(3, 0x20000, 0x800, 0, ram, 0), -KVS_EINVAL);
    CHECK_EQ(slot_set(3, 0x20000, 0x1000, 4, ram, 0), -KVS_EINVAL);
    CHECK_EQ(slot_set(3, 0x20000, 0x1000, 0, ram, 0x800), -KVS_EINVAL);
    CHECK_EQ(slot_set(3, 0x20000, 0x1000, 0, ram, 1u << 20), -KVS_EINVAL);
    CHECK_EQ(slot_set(3, 0x20000, 0x2000, 0, ram, (1u << 20) - 0x1000), -KVS_EINVAL);
    CHECK_EQ(slot_set(3, ~0xfffull, 0x1000, 0, ram, 0), -KVS_EINVAL);
    CHECK_EQ(slot_set(3, BIT(46) - 0x1000, 0x2000, 0, ram, 0), -KVS_EINVAL);
    CHECK_EQ(slot_set(3, BIT(46) - 0x1000, 0x1000, 0, ram, 0), 0);
    CHECK_EQ(slot_set(3, 0, 0, 0, NULL, 0), 0);
    CHECK_EQ(slot_set(3, 0, 0, 0, NULL, 0), -KVS_ENOENT);
    CHECK_EQ(slot_set(0x10000, 0x20000, 0x1000, 0, ram, 0), -KVS_ENOTSUP);
    CHECK_EQ(slot_set(0x20000, 0x20000, 0x1000, 0, ram, 0), -KVS_EINVAL);
    CHECK_EQ(slot_set(40000, 0x20000, 0x1000, 0, ram, 0), -KVS_EINVAL);
    /* An existing slot keeps its size and memory; it may move and change flags. */
    CHECK_EQ(slot_set(2, 0x11000, 0x2000, 0, ram, 0x11000), -KVS_EINVAL);
    CHECK_EQ(slot_set(2, 0x11000, 0x1000, 0, ram, 0x12000), -KVS_EINVAL);
    CHECK_EQ(slot_set(2, 0x5000, 0x1000, 0, ram, 0x11000), -KVS_EOVERLAP);
    CHECK_EQ(slot_set(2, 0x30000, 0x1000, KVS_MEM_READONLY, ram, 0x11000), 0);
    uint64_t left;
    struct memslot *s;
    uint8_t *p = kvs_ram_address(ram);
    CHECK(!gpa_to_host(vm_slots(vm, 0), 0x11000, &left, &s));
    CHECK(gpa_to_host(vm_slots(vm, 0), 0x30010, &left, &s) == p + 0x11010);
    CHECK_EQ(left, 0xff0);
    CHECK_EQ(s->id, 2);
    CHECK(gpa_to_host(vm_slots(vm, 0), 0x10fff, &left, &s) == p + 0xffff);
    CHECK(!memslot_find(vm_slots(vm, 0), ~0ull) && !memslot_find(vm_slots(vm, 0), 0x2ffff) && !memslot_find(vm_slots(vm, 0), 0x31000));
    /* Host access: all or nothing, over adjacent slots, not into ROM. */
    uint8_t data[0x2000], back[0x2000];
    for (size_t n = 0; n < sizeof data; n++) data[n] = (uint8_t)(n * 7);
    CHECK_EQ(kvs_mem_write(vm, 0xff0, data, 0x20), 0);
    CHECK_EQ(kvs_mem_read(vm, 0xff0, back, 0x20), 0);
    CHECK(!memcmp(data, back, 0x20));
    memset(p + 0xf000, 0, 0x1000);
    CHECK_EQ(kvs_mem_write(vm, 0x10800, data, 0x1000), -KVS_EFAULT);
    CHECK_EQ(p[0xf800], 0);
    CHECK_EQ(kvs_mem_read(vm, 0x10800, back, 0x1000), -KVS_EFAULT);
    CHECK_EQ(kvs_mem_write(vm, 0x30000, data, 1), -KVS_EROFS);
    CHECK_EQ(kvs_mem_written(vm, 0x30000, 0x1000), 0);
    CHECK_EQ(kvs_mem_written(vm, 0x30000, 0x1001), -KVS_EFAULT);
    CHECK_EQ(kvs_mem_read(vm, ~0ull - 2, back, 16), -KVS_EFAULT);
    CHECK_EQ(kvs_mem_read(vm, 0x1000, NULL, 1), -KVS_EINVAL);
    CHECK_EQ(kvs_mem_read(vm, 0x1000, NULL, 0), 0);
    void *host;
    CHECK_EQ(kvs_mem_host_address(vm, 0x1000, 0x10000, &host), 0);
    CHECK(host == p);
    CHECK_EQ(kvs_mem_host_address(vm, 0x1000, 0x10001, &host), -KVS_EFAULT);
    /* Writes drop decoded code. */
    atomic_store(&ram->code_marks[3], 1);
    CHECK_EQ(kvs_mem_write(vm, 0x4000, data, 8), 0);
    CHECK_EQ(atomic_load(&ram->code_marks[3]), 0);
    for (uint32_t id = 0; id < 3; id++) CHECK_EQ(slot_set(id, 0, 0, 0, NULL, 0), 0);
}

static void test_caller_memory(void)
{
    uint8_t *p = aligned_alloc(4096, 0x10000);
    memset(p, 0, 0x10000);
    CHECK_EQ(slot_set_host(0, 0, 0x1000, NULL), -KVS_EINVAL);
    CHECK_EQ(slot_set_host(0, 0, 0x1000, p + 8), -KVS_EINVAL);
    CHECK_EQ(slot_set_host(0, 0, 0x8000, p), 0);
    CHECK_EQ(slot_set_host(1, 0x10000, 0x1000, p + 0x1000), 0); /* shares marks with the first */
    CHECK(memslot_find(vm_slots(vm, 0), 0)->ram == memslot_find(vm_slots(vm, 0), 0x10000)->ram);
    CHECK_EQ(memslot_find(vm_slots(vm, 0), 0x10000)->ram_offset, 0x1000);
    CHECK_EQ(slot_set_host(2, 0x20000, 0x2000, p + 0x7000), -KVS_ENOTSUP);
    CHECK_EQ(slot_set_host(0, 0, 0, NULL), 0);
    CHECK_EQ(kvs_mem_write(vm, 0x10000, "hello", 5), 0);
    CHECK(!memcmp(p + 0x1000, "hello", 5));
    CHECK_EQ(slot_set_host(1, 0x11000, 0x1000, p + 0x1000), 0);
    CHECK_EQ(slot_set_host(1, 0x11000, 0x1000, p), -KVS_EINVAL);
    CHECK_EQ(slot_set_host(1, 0, 0, NULL), 0);
    free(p);
}

static void be_flat(void)
{
    c->cr0 = CR0_PE;
    for (int n = 0; n < SEG_COUNT; n++)
        c->seg[n] = (struct segment){ .limit = 0xffffffff, .attr = ATTR_P | ATTR_S | ATTR_W | ATTR_DB | (n == SEG_CS ? ATTR_CODE : 0) };
    c->cpl = 0;
    vcpu_update_mode(c);
    tlb_flush_all(c);
}

static void obey(void)
{
    uint32_t r = atomic_exchange(&c->requests, 0);
    if (r & REQ_TLB_FLUSH) tlb_flush_all(c);
    if (r & REQ_W_FLUSH) tlb_flush_writes(c);
}

static void test_dirty(struct kvs_ram *ram)
{
    uint64_t bits[4], v = 1;
    be_flat();
    CHECK_EQ(slot_set(0, 0, 0x50000, 0, ram, 0), 0);
    CHECK_EQ(kvs_get_dirty_log(vm, 0, bits, 4), -KVS_ENOENT);
    obey();
    CHECK_EQ(vwrite(c, SEG_DS, 0x3000, &v, 8), ST_OK);
    CHECK(tlb_probe(c, TLB_W, 0x3000, 8));
    CHECK_EQ(slot_set(0, 0, 0x50000, KVS_MEM_LOG_DIRTY_PAGES, ram, 0), 0);
    CHECK(atomic_load(&c->requests) & REQ_TLB_FLUSH);
    obey();
    CHECK_EQ(kvs_get_dirty_log(vm, 0, bits, 1), -KVS_ERANGE);
    CHECK_EQ(kvs_get_dirty_log(vm, 7, bits, 4), -KVS_ENOENT);
    CHECK_EQ(kvs_get_dirty_log(vm, 0, NULL, 4), -KVS_EINVAL);
    CHECK_EQ(kvs_get_dirty_log(vm, 0, bits, 4), 0);
    obey();
    CHECK_EQ(bits[0] | bits[1] | bits[2] | bits[3], 0);
    CHECK_EQ(vread(c, SEG_DS, 0x3000, &v, 8), ST_OK);
    CHECK(!tlb_probe(c, TLB_W, 0x3000, 8) && tlb_probe(c, TLB_R, 0x3000, 8));
    CHECK_EQ(vwrite(c, SEG_DS, 0x3ffc, &v, 8), ST_OK); /* pages 3 and 4 */
    CHECK_EQ(vwrite(c, SEG_DS, 0x41000, &v, 8), ST_OK);
    CHECK(tlb_probe(c, TLB_W, 0x3000, 8));
    CHECK_EQ(kvs_mem_write(vm, 0x7ff8, &v, 8), 0);
    CHECK_EQ(kvs_mem_written(vm, 0x8fff, 2), 0);
    CHECK_EQ(kvs_get_dirty_log(vm, 0, bits, 4), 0);
    CHECK_EQ(bits[0], 0x398);
    CHECK_EQ(bits[1], 2);
    CHECK(atomic_load(&c->requests) & REQ_W_FLUSH);
    obey();
    CHECK(!tlb_probe(c, TLB_W, 0x3000, 8));
    /* LOCKed and RMW stores too. */
    CHECK_EQ(vrmw_begin_locked(c, SEG_DS, 0x5000, 4), ST_OK);
    vrmw_end_locked(c);
    CHECK_EQ(vrmw_begin(c, SEG_DS, 0x6000, 4), ST_OK);
    vrmw_end(c);
    /* Moving keeps the log. */
    CHECK_EQ(slot_set(0, 0x100000, 0x50000, KVS_MEM_LOG_DIRTY_PAGES, ram, 0), 0);
    obey();
    CHECK_EQ(kvs_get_dirty_log(vm, 0, bits, 2), 0);
    CHECK_EQ(bits[0], 0x60);
    CHECK_EQ(slot_set(0, 0x100000, 0x50000, 0, ram, 0), 0);
    CHECK_EQ(kvs_get_dirty_log(vm, 0, bits, 4), -KVS_ENOENT);
    CHECK_EQ(slot_set(0, 0, 0, 0, NULL, 0), 0);
    CHECK(atomic_load(&c->requests) & REQ_CODE_FLUSH);
    obey();
}

static void *wait_once(void *d) { return (void *)(intptr_t)kvs_doorbell_wait(d, -1); }

static void test_doorbells(void)
{
    struct kvs_doorbell *a, *b, *p, *x = NULL;
    CHECK_EQ(kvs_doorbell_create(NULL, 0, 4, 0, 0, &a), -KVS_EINVAL);
    CHECK_EQ(kvs_doorbell_create(vm, 0x1000, 3, 0, 0, &a), -KVS_EINVAL);
    CHECK_EQ(kvs_doorbell_create(vm, 0x1000, 16, 0, 0, &a), -KVS_EINVAL);
    CHECK_EQ(kvs_doorbell_create(vm, 0x1000, 4, 0, 8, &a), -KVS_EINVAL);
    CHECK_EQ(kvs_doorbell_create(vm, 0x1000, 0, 0, KVS_DOORBELL_DATAMATCH, &a), -KVS_EINVAL);
    CHECK_EQ(kvs_doorbell_create(vm, ~0ull, 4, 0, 0, &a), -KVS_EINVAL);
    CHECK_EQ(kvs_doorbell_create(vm, 0x10000, 2, 0, KVS_DOORBELL_PIO, &a), -KVS_EINVAL);
    CHECK_EQ(kvs_doorbell_create(vm, 0xd0000000, 2, 1, KVS_DOORBELL_DATAMATCH, &a), 0);
    CHECK_EQ(kvs_doorbell_create(vm, 0xd0000000, 2, 0x10001, KVS_DOORBELL_DATAMATCH, &x), -KVS_EEXIST);
    CHECK_EQ(kvs_doorbell_create(vm, 0xd0000000, 2, 2, KVS_DOORBELL_DATAMATCH, &b), 0);
    CHECK_EQ(kvs_doorbell_create(vm, 0xd0000000, 0, 0, 0, &x), -KVS_EEXIST);
    CHECK_EQ(kvs_doorbell_create(vm, 0x510, 0, 0, KVS_DOORBELL_PIO, &p), 0);
    CHECK_EQ(kvs_doorbell_wait(a, 0), 0);
    CHECK_EQ(kvs_doorbell_wait(a, 5), 0);
    CHECK_EQ(kvs_doorbell_wait(a, -2), -KVS_EINVAL);
    uint16_t v = 1;
    CHECK_EQ(iobus_mmio_write(c, 0xd0000000, &v, 2), ST_OK);
    CHECK_EQ(c->write_count, 0);
    CHECK_EQ(kvs_doorbell_wait(a, 0), 1);
    CHECK_EQ(kvs_doorbell_wait(a, 0), 0);
    CHECK_EQ(kvs_doorbell_wait(b, 0), 0);
    v = 3; /* nobody's value: an exit */
    CHECK_EQ(iobus_mmio_write(c, 0xd0000000, &v, 2), ST_OK);
    CHECK_EQ(iobus_mmio_write(c, 0xd0000000, &v, 1), ST_OK);
    CHECK_EQ(c->write_count, 2);
    c->write_count = 0;
    CHECK_EQ(iobus_port_write(c, 0x510, 7, 2), ST_OK);
    CHECK_EQ(kvs_doorbell_wait(p, -1), 1);
    CHECK_EQ(iobus_port_write(c, 0x511, 7, 1), ST_EXIT_DONE);
    /* The host rings too, and takes it elsewhere. */
    CHECK_EQ(kvs_doorbell_ring(b), 0);
    CHECK_EQ(kvs_doorbell_wait(b, 0), 1);
    CHECK_EQ(kvs_doorbell_create(vm, 0xd0000000, 2, 1, KVS_DOORBELL_DATAMATCH | KVS_DOORBELL_DETACHED, &x), 0);
    CHECK_EQ(kvs_doorbell_move(x, 0xd0000000, 1), -KVS_EEXIST);
    CHECK_EQ(kvs_doorbell_move(x, ~0ull, 1), -KVS_EINVAL);
    CHECK_EQ(kvs_doorbell_move(x, 0xd0001000, 1), 0);
    v = 1;
    CHECK_EQ(iobus_mmio_write(c, 0xd0001000, &v, 2), ST_OK);
    CHECK_EQ(kvs_doorbell_wait(x, 0), 1);
    CHECK_EQ(kvs_doorbell_wait(a, 0), 0);
    CHECK_EQ(kvs_doorbell_move(x, 0xd0001000, 0), 0);
    CHECK_EQ(iobus_mmio_write(c, 0xd0001000, &v, 2), ST_OK);
    CHECK_EQ(kvs_doorbell_wait(x, 0), 0);
    CHECK_EQ(c->write_count, 1);
    c->write_count = 0;
    kvs_doorbell_destroy(x);
    /* In virtual time it is an exit. */
    vm->config.clock_mode = KVS_CLOCK_VIRTUAL;
    v = 1;
    CHECK_EQ(iobus_mmio_write(c, 0xd0000000, &v, 2), ST_OK);
    CHECK_EQ(c->write_count, 1);
    c->write_count = 0;
    CHECK_EQ(iobus_port_write(c, 0x510, 7, 2), ST_EXIT_DONE);
    CHECK_EQ(kvs_doorbell_wait(a, 0), 0);
    vm->config.clock_mode = KVS_CLOCK_REAL;
    /* Closing wakes. */
    pthread_t t;
    void *result;
    CHECK_EQ(pthread_create(&t, NULL, wait_once, b), 0);
    kvs_doorbell_close(b);
    pthread_join(t, &result);
    CHECK_EQ((intptr_t)result, -KVS_ESTATE);
    kvs_doorbell_destroy(b);
    CHECK_EQ(kvs_doorbell_create(vm, 0xd0000000, 2, 2, KVS_DOORBELL_DATAMATCH, &b), 0);
    kvs_doorbell_destroy(a);
    kvs_doorbell_destroy(b);
    kvs_doorbell_destroy(p);
    CHECK(!vm->doorbells);
    kvs_doorbell_destroy(NULL);
}

/* Handles may be let go in any order. */
static void test_lifetimes(void)
{
    struct kvs_vm_config config = { .size = sizeof config };
    struct kvs_vm *other;
    struct kvs_ram *ram;
    struct kvs_doorbell *d;
    CHECK_EQ(kvs_vm_create(&config, &other), 0);
    CHECK_EQ(kvs_ram_create(0x10000, &ram), 0);
    struct kvs_userspace_memory_region r = { .memory_size = 0x10000, .flags = KVS_MEM_LOG_DIRTY_PAGES };
    CHECK_EQ(kvs_memslot_set(other, &r, ram, 0), 0);
    CHECK_EQ(kvs_doorbell_create(other, 0x1000, 4, 0, 0, &d), 0);
    kvs_ram_release(ram);
    CHECK_EQ(kvs_mem_write(other, 0x8000, "x", 1), 0);
    kvs_vm_destroy(other);
    kvs_doorbell_destroy(d);
}

int main(void)
{
    struct kvs_vm_config config = { .size = sizeof config, .clock_mode = KVS_CLOCK_REAL };
    struct kvs_ram *ram;
    if (kvs_vm_create(&config, &vm) || kvs_vcpu_create(vm, 0, &c) || kvs_ram_create(1u << 20, &ram)) return 1;
    test_ram();
    test_slots(ram);
    test_caller_memory();
    test_dirty(ram);
    test_doorbells();
    test_lifetimes();
    kvs_vcpu_destroy(c);
    kvs_vm_destroy(vm);
    kvs_ram_release(ram);
    return checks_report();
}
