/* What may happen while an instruction waits for the host: slots go, the dirty log is read, TF is set. */
#include "vmtest.h"

#define DEVICE 0xd0000000u
#define WINDOW 0x2000000u /* a second RAM slot */

static const uint8_t copy_code[] = {
    0xbe, 0x00, 0x00, 0x00, 0xd0,       /* mov esi, DEVICE */
    0xbf, 0x00, 0x00, 0x00, 0x02,       /* mov edi, WINDOW */
    0xb9, 0x04, 0x00, 0x00, 0x00,       /* mov ecx, 4 */
    0x89, 0x0f,                         /* mov [rdi], ecx: caches the page */
    0xf3, 0xa5,                         /* rep movsd */
    0xf4,                               /* hlt */
};

static struct kvs_userspace_memory_region window(uint64_t size, uint32_t flags)
{
    return (struct kvs_userspace_memory_region){ .slot = 5, .flags = flags, .guest_phys_addr = WINDOW, .memory_size = size };
}

/* The destination of MOVS vanishes while its source is being read: its writes become device writes. */
static void slot_goes(void)
{
    struct vt t = vt_create(16 << 20, KVS_CLOCK_REAL, 0);
    vt_long_mode(&t);
    vt_code(&t, copy_code, sizeof copy_code);
    struct kvs_ram *ram;
    vt_must(kvs_ram_create(0x200000, &ram), "ram");
    struct kvs_userspace_memory_region r = window(0x200000, 0), none = window(0, 0);
    vt_must(kvs_memslot_set(t.vm, &r, ram, 0), "slot");
    kvs_ram_release(ram);
    for (uint32_t n = 0; n < 4; n++) {
        CHECK(vt_run(&t) == KVS_EXIT_MMIO);
        CHECK(!t.run->mmio.is_write && t.run->mmio.phys_addr == DEVICE + 4 * n && t.run->mmio.len == 4);
        memcpy(t.run->mmio.data, &(uint32_t){ 0x1000 + n }, 4);
        if (n == 1) vt_must(kvs_memslot_set(t.vm, &none, NULL, 0), "delete"); /* unmaps the memory */
        if (n < 1) continue;
        CHECK(vt_run(&t) == KVS_EXIT_MMIO);
        CHECK(t.run->mmio.is_write && t.run->mmio.phys_addr == WINDOW + 4 * n);
        CHECK(!memcmp(t.run->mmio.data, &(uint32_t){ 0x1000 + n }, 4));
    }
    CHECK(vt_run(&t) == KVS_EXIT_HLT);
    vt_destroy(&t);
}

static void dirty_log_is_read(void)
{
    struct vt t = vt_create(16 << 20, KVS_CLOCK_REAL, 0);
    vt_long_mode(&t);
    vt_code(&t, copy_code, sizeof copy_code);
    struct kvs_ram *ram;
    vt_must(kvs_ram_create(0x200000, &ram), "ram");
    struct kvs_userspace_memory_region r = window(0x200000, KVS_MEM_LOG_DIRTY_PAGES);
    vt_must(kvs_memslot_set(t.vm, &r, ram, 0), "slot");
    uint64_t bits[8];
    for (uint32_t n = 0; n < 4; n++) {
        CHECK(vt_run(&t) == KVS_EXIT_MMIO && !t.run->mmio.is_write);
        CHECK(kvs_get_dirty_log(t.vm, 5, bits, 8) == 0);
        CHECK(bits[0] == 1); /* each iteration dirties the page anew */
    }
    CHECK(vt_run(&t) == KVS_EXIT_HLT);
    CHECK(kvs_get_dirty_log(t.vm, 5, bits, 8) == 0 && bits[0] == 1);
    kvs_ram_release(ram);
    vt_destroy(&t);
}

/* TF: one #DB after each instruction, also after those that leave for the host. */
static void traps_follow(void)
{
    static const uint8_t code[] = {
        0x0f, 0x01, 0x1c, 0x25, 0x00, 0x60, 0, 0,                   /* lidt [0x6000] */
        0xbb, 0x00, 0x00, 0x00, 0xd0,                               /* mov ebx, DEVICE */
        0x9c, 0x80, 0x4c, 0x24, 0x01, 0x01, 0x9d,                   /* pushf; or byte [rsp+1], 1; popf */
        0xe6, 0x80,                                                 /* out 0x80, al */
        0x89, 0x03,                                                 /* mov [rbx], eax */
        0x8b, 0x03,                                                 /* mov eax, [rbx] */
        0x90,
        0x9c, 0x80, 0x64, 0x24, 0x01, 0xfe, 0x9d,                   /* TF off */
        0xf4,
    };
    /* The handler appends the RIP it came from to a list at 0x5000, whose end is at 0x5ff8. */
    static const uint8_t handler[] = {
        0x50, 0x57,                                                 /* push rax; push rdi */
        0x48, 0x8b, 0x44, 0x24, 0x10,                               /* mov rax, [rsp+16] */
        0x48, 0x8b, 0x3c, 0x25, 0xf8, 0x5f, 0, 0,                   /* mov rdi, [0x5ff8] */
        0x48, 0x89, 0x07,                                           /* mov [rdi], rax */
        0x48, 0x83, 0x04, 0x25, 0xf8, 0x5f, 0, 0, 0x08,             /* add qword [0x5ff8], 8 */
        0x5f, 0x58, 0x48, 0xcf,                                     /* pop rdi; pop rax; iretq */
    };
    struct vt t = vt_create(16 << 20, KVS_CLOCK_REAL, 0);
    vt_long_mode(&t);
    vt_code(&t, code, sizeof code);
    memcpy(t.mem + 0x9000, handler, sizeof handler);
    memcpy(t.mem + 0x5ff8, &(uint64_t){ 0x5000 }, 8);
    /* GDT at 0x4000 for the gate's selector, IDT at 0x4100. */
    memcpy(t.mem + 0x4008, &(uint64_t){ 0x00af9b000000ffffull }, 8);
    memcpy(t.mem + 0x4010, &(uint64_t){ 0x00cf93000000ffffull }, 8);
    memcpy(t.mem + 0x4110, &(uint64_t){ 0x00008e0000089000ull }, 8);
    memcpy(t.mem + 0x6000, &(uint16_t){ 0xfff }, 2);
    memcpy(t.mem + 0x6002, &(uint64_t){ 0x4100 }, 8);
    struct kvs_sregs s;
    vt_must(kvs_vcpu_get_sregs(t.vcpu, &s), "get_sregs");
    s.gdt.base = 0x4000;
    s.gdt.limit = 0x17;
    vt_must(kvs_vcpu_set_sregs(t.vcpu, &s), "set_sregs");
    CHECK(vt_run(&t) == KVS_EXIT_IO);
    CHECK(vt_run(&t) == KVS_EXIT_MMIO && t.run->mmio.is_write);
    CHECK(vt_run(&t) == KVS_EXIT_MMIO && !t.run->mmio.is_write);
    CHECK(vt_run(&t) == KVS_EXIT_HLT);
    /* After OUT, the store, the load, NOP, PUSHF, AND; and after POPF, which began with TF set. */
    static const uint8_t after[] = { 0x16, 0x18, 0x1a, 0x1b, 0x1c, 0x21, 0x22 };
    uint64_t end;
    memcpy(&end, t.mem + 0x5ff8, 8);
    CHECK(end == 0x5000 + 8 * sizeof after);
    for (size_t n = 0; n < sizeof after; n++) {
        uint64_t rip;
        memcpy(&rip, t.mem + 0x5000 + 8 * n, 8);
        CHECK(rip == VT_CODE + after[n]);
        if (rip != VT_CODE + after[n]) fprintf(stderr, "trap %zu at %llx\n", n, (unsigned long long)rip);
    }
    vt_destroy(&t);
}

int main(void)
{
    slot_goes();
    dirty_log_is_read();
    traps_follow();
    return vt_report();
}
