/*
 * Slots come and go, the dirty log is read and memory is written from other threads while the guest
 * stores to them, runs code from them and uses LOCK across cache lines. Nothing may touch memory that
 * is gone, and no write may be missing from the log.
 */
#include <pthread.h>
#include <stdatomic.h>
#include <time.h>

#include "vmtest.h"

#define WINDOW 0x2000000u
#define LOGGED 0x3000000u
#define LOGGED_PAGES 64u
#define ROUNDS 400

static const uint8_t code[] = {
    0xbf, 0x00, 0x00, 0x00, 0x02,                   /* mov edi, WINDOW */
    0xbb, 0x00, 0x00, 0x00, 0x03,                   /* mov ebx, LOGGED */
    0xff, 0xc1,                                     /* inc ecx */
    0x89, 0x0f,                                     /* mov [rdi], ecx */
    0x8b, 0x87, 0x00, 0x10, 0x00, 0x00,             /* mov eax, [rdi + 0x1000] */
    0xf0, 0xff, 0x47, 0x3e,                         /* lock inc dword [rdi + 62] */
    0x89, 0xca,                                     /* mov edx, ecx */
    0x83, 0xe2, 0x3f,                               /* and edx, 63 */
    0xc1, 0xe2, 0x0c,                               /* shl edx, 12 */
    0x89, 0x0c, 0x13,                               /* mov [rbx + rdx], ecx */
    0x48, 0x8d, 0x87, 0x00, 0x20, 0x00, 0x00,       /* lea rax, [rdi + 0x2000] */
    0xff, 0xd0,                                     /* call rax */
    0xeb, 0xdc,                                     /* jmp to inc ecx */
};

static struct vt t;
static struct kvs_ram *log_ram;
static _Atomic int finished;

static void set_window(uint64_t size, uint32_t flags)
{
    struct kvs_ram *ram = NULL;
    struct kvs_userspace_memory_region r = { .slot = 5, .flags = flags, .guest_phys_addr = WINDOW, .memory_size = size };
    if (size) {
        vt_must(kvs_ram_create(size, &ram), "ram");
        memset((uint8_t *)kvs_ram_address(ram) + 0x2000, 0x90, 64);
        ((uint8_t *)kvs_ram_address(ram))[0x2020] = 0xc3;
    }
    vt_must(kvs_memslot_set(t.vm, &r, ram, 0), "window");
    kvs_ram_release(ram);
}

static void *slots(void *unused)
{
    (void)unused;
    for (int n = 0; n < ROUNDS; n++) {
        set_window(0x4000, n & 1);
        nanosleep(&(struct timespec){ .tv_nsec = n % 8 ? 50000 : 2000000 }, NULL);
        if (n % 4 == 0) {
            static const uint8_t ret = 0xc3;
            vt_must(kvs_mem_write(t.vm, WINDOW + 0x2000 + (uint64_t)(n & 31), &ret, 1), "patch");
        }
        set_window(0, 0);
    }
    atomic_store(&finished, 1);
    return NULL;
}

/* Snapshot by log: what the log does not name must not have changed since the last look. */
static void *logs(void *arg)
{
    uint32_t *wrong = arg, copy[LOGGED_PAGES] = { 0 };
    const uint8_t *mem = kvs_ram_address(log_ram);
    while (!atomic_load(&finished)) {
        uint64_t bits;
        vt_must(kvs_vm_quiesce(t.vm), "quiesce");
        vt_must(kvs_get_dirty_log(t.vm, 6, &bits, 1), "dirty log");
        for (uint32_t page = 0; page < LOGGED_PAGES; page++) {
            uint32_t now;
            memcpy(&now, mem + 4096 * page, 4);
            if (now != copy[page] && !(bits >> page & 1)) ++*wrong;
            copy[page] = now;
        }
        vt_must(kvs_vm_resume(t.vm), "resume");
        nanosleep(&(struct timespec){ .tv_nsec = 20000 }, NULL);
    }
    return NULL;
}

int main(void)
{
    pthread_t a, b;
    uint32_t wrong = 0, exits = 0, odd = 0;
    t = vt_create(16 << 20, KVS_CLOCK_REAL, 0);
    vt_long_mode(&t);
    vt_code(&t, code, sizeof code);
    vt_must(kvs_ram_create(LOGGED_PAGES * 4096, &log_ram), "ram");
    struct kvs_userspace_memory_region r = { .slot = 6, .flags = KVS_MEM_LOG_DIRTY_PAGES, .guest_phys_addr = LOGGED, .memory_size = LOGGED_PAGES * 4096 };
    vt_must(kvs_memslot_set(t.vm, &r, log_ram, 0), "slot");
    pthread_create(&a, NULL, slots, NULL);
    pthread_create(&b, NULL, logs, &wrong);
    while (!atomic_load(&finished)) {
        vt_must(kvs_vcpu_run(t.vcpu), "run");
        exits++;
        /* Without the slot: device accesses, and code that is nowhere. */
        if (t.run->exit_reason != KVS_EXIT_MMIO && t.run->exit_reason != KVS_EXIT_INTERNAL_ERROR) odd++;
    }
    pthread_join(a, NULL);
    pthread_join(b, NULL);
    CHECK(wrong == 0);
    CHECK(odd == 0);
    CHECK(exits > 0);
    uint64_t bits;
    struct kvs_vcpu_stats stats;
    vt_must(kvs_get_dirty_log(t.vm, 6, &bits, 1), "dirty log");
    vt_must(kvs_vcpu_get_stats(t.vcpu, &stats), "stats");
    CHECK(stats.retired > 10000);
    kvs_ram_release(log_ram);
    vt_destroy(&t);
    return vt_report();
}
