/*
 * Code that several write: a vCPU must run what it has stored itself at once, whatever else happens to the page
 * meanwhile, and what the host has written once it knows of it. Slots that are replaced while a vCPU decodes.
 */
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "vmtest.h"

#define STORES 20000u
#define SLOT_ROUNDS 300
#define HOST_WRITES 20000u
#define FUNCTIONS 0x20000u
#define WINDOW 0x2000000u
#define WINDOW_PAGES 64u

static _Atomic int finished;

static struct kvs_vcpu *second_vcpu(struct vt *t, uint64_t rip, uint64_t rdi, uint64_t rcx)
{
    struct kvs_vcpu *v;
    struct kvs_sregs s;
    struct kvs_regs r = { .rip = rip, .rsp = VT_STACK - 0x1000, .rflags = 2, .rdi = rdi, .rcx = rcx };
    vt_must(kvs_vcpu_create(t->vm, 1, &v), "vcpu 1");
    vt_must(kvs_vcpu_get_sregs(t->vcpu, &s), "get_sregs");
    vt_must(kvs_vcpu_set_sregs(v, &s), "set_sregs");
    vt_must(kvs_vcpu_set_regs(v, &r), "set_regs");
    vt_must(kvs_vcpu_set_mp_state(v, &(struct kvs_mp_state){ KVS_MP_STATE_RUNNABLE }), "mp_state");
    return v;
}

static void *run_to_halt(void *v)
{
    struct kvs_run *run = kvs_vcpu_run_block(v);
    do vt_must(kvs_vcpu_run(v), "run");
    while (run->exit_reason == KVS_EXIT_INTR);
    return NULL;
}

/* Both rewrite a function of their own in the same page and call it. */
static void own_stores(void)
{
    static const uint8_t code[] = {
        0xff, 0xc2,                 /* L: inc edx */
        0x89, 0x57, 0x01,           /* mov [rdi + 1], edx */
        0xff, 0xd7,                 /* call rdi */
        0x39, 0xd0,                 /* cmp eax, edx */
        0x75, 0x05,                 /* jne out */
        0xff, 0xc9,                 /* dec ecx */
        0x75, 0xf1,                 /* jnz L */
        0xf4,                       /* hlt */
        0xbb, 0x01, 0x00, 0x00, 0x00, 0xf4, /* out: mov ebx, 1; hlt */
    };
    static const uint8_t function[] = { 0xb8, 0, 0, 0, 0, 0xc3 }; /* mov eax, imm32; ret */
    struct vt t = vt_create(16 << 20, KVS_CLOCK_REAL, 0);
    vt_long_mode(&t);
    for (uint32_t n = 0; n < 2; n++) {
        memcpy(t.mem + VT_CODE + n * 0x1000, code, sizeof code);
        memcpy(t.mem + FUNCTIONS + n * 0x800, function, sizeof function);
    }
    struct kvs_regs r = { .rip = VT_CODE, .rsp = VT_STACK, .rflags = 2, .rdi = FUNCTIONS, .rcx = STORES };
    vt_must(kvs_vcpu_set_regs(t.vcpu, &r), "set_regs");
    struct kvs_vcpu *v = second_vcpu(&t, VT_CODE + 0x1000, FUNCTIONS + 0x800, STORES);
    pthread_t thread;
    pthread_create(&thread, NULL, run_to_halt, v);
    run_to_halt(t.vcpu);
    pthread_join(thread, NULL);
    vt_must(kvs_vcpu_get_regs(t.vcpu, &r), "regs");
    CHECK(r.rbx == 0 && r.rdx == STORES);
    vt_must(kvs_vcpu_get_regs(v, &r), "regs");
    CHECK(r.rbx == 0 && r.rdx == STORES);
    kvs_vcpu_destroy(v);
    vt_destroy(&t);
}

/*
 * The host takes the memory away and puts other, smaller memory elsewhere while a vCPU waits to mark what it has
 * decoded there: code near the end of a large slot, so that the marks of the small one do not reach that far.
 */
#define WINDOW_SIZE (1u << 30)
#define WINDOW_CODE (WINDOW + WINDOW_SIZE - WINDOW_PAGES * 4096)

static void set_slot(struct vt *t, uint64_t gpa, uint64_t size, uint8_t *host)
{
    struct kvs_userspace_memory_region r = { .slot = 5, .guest_phys_addr = gpa, .memory_size = size, .userspace_addr = (uintptr_t)host };
    vt_must(kvs_memslot_set(t->vm, &r, NULL, 0), "slot");
}

static void *replace_window(void *arg)
{
    struct vt *t = arg;
    uint8_t *window = mmap(NULL, WINDOW_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    uint8_t *other = aligned_alloc(4096, 4096);
    for (uint32_t page = 0; page < WINDOW_PAGES; page++) window[WINDOW_SIZE - 4096 - page * 4096] = 0xc3; /* ret */
    for (int n = 0; n < SLOT_ROUNDS; n++) {
        set_slot(t, WINDOW, WINDOW_SIZE, window);
        sched_yield();
        for (volatile int k = n * 37 % 4000; k > 0; k--) continue;
        vt_must(kvs_vm_quiesce(t->vm), "quiesce");
        set_slot(t, 0, 0, NULL);
        set_slot(t, WINDOW, 4096, other);
        vt_must(kvs_vm_resume(t->vm), "resume");
        set_slot(t, 0, 0, NULL);
    }
    atomic_store(&finished, 1);
    kvs_vcpu_kick(t->vcpu);
    munmap(window, WINDOW_SIZE);
    free(other);
    return NULL;
}

static void replaced_slots(void)
{
    static const uint8_t code[] = {
        0xb9, WINDOW_PAGES, 0, 0, 0,                /* L: mov ecx, pages */
        0xbf, 0, 0, 0xfc, 0x41,                     /* mov edi, WINDOW_CODE */
        0xff, 0xd7,                                 /* M: call rdi */
        0x81, 0xc7, 0x00, 0x10, 0x00, 0x00,         /* add edi, 4096 */
        0xff, 0xc9,                                 /* dec ecx */
        0x75, 0xf4,                                 /* jnz M */
        0xeb, 0xe8,                                 /* jmp L */
    };
    static const uint8_t spin[] = { 0xeb, 0xfe };
    struct vt t = vt_create(16 << 20, KVS_CLOCK_REAL, 0);
    vt_long_mode(&t);
    vt_code(&t, code, sizeof code);
    memcpy(t.mem + VT_CODE + 0x1000, spin, sizeof spin);
    struct kvs_vcpu *v = second_vcpu(&t, VT_CODE + 0x1000, 0, 0); /* never runs: what counts is that there are two */
    pthread_t thread;
    uint32_t odd = 0;
    atomic_store(&finished, 0);
    pthread_create(&thread, NULL, replace_window, &t);
    while (!atomic_load(&finished)) {
        vt_must(kvs_vcpu_run(t.vcpu), "run");
        /* While the slot is not there: code that is nowhere. */
        odd += t.run->exit_reason != KVS_EXIT_INTR && t.run->exit_reason != KVS_EXIT_INTERNAL_ERROR;
    }
    pthread_join(thread, NULL);
    CHECK(odd == 0);
    kvs_vcpu_destroy(v);
    vt_destroy(&t);
}

/* The host writes a function, then says so; a vCPU that has heard of it must not run the one before. */
static void *write_function(void *arg)
{
    struct vt *t = arg;
    for (uint32_t n = 1; n <= HOST_WRITES; n++) {
        vt_must(kvs_mem_write(t->vm, FUNCTIONS + 1, &n, 4), "function");
        vt_must(kvs_mem_write(t->vm, FUNCTIONS + 0x1000, &n, 4), "flag");
    }
    return NULL;
}

static void host_stores(void)
{
    static const uint8_t code[] = {
        0x8b, 0x97, 0x00, 0x10, 0x00, 0x00,         /* L: mov edx, [rdi + 0x1000] */
        0xff, 0xd7,                                 /* call rdi */
        0x39, 0xd0,                                 /* cmp eax, edx */
        0x72, 0x05,                                 /* jb out */
        0x39, 0xca,                                 /* cmp edx, ecx */
        0x72, 0xf0,                                 /* jb L */
        0xf4,                                       /* hlt */
        0xbb, 0x01, 0x00, 0x00, 0x00, 0xf4,         /* out: mov ebx, 1; hlt */
    };
    static const uint8_t function[] = { 0xb8, 0, 0, 0, 0, 0xc3 };
    struct vt t = vt_create(16 << 20, KVS_CLOCK_REAL, 0);
    vt_long_mode(&t);
    vt_code(&t, code, sizeof code);
    memcpy(t.mem + FUNCTIONS, function, sizeof function);
    struct kvs_regs r = { .rip = VT_CODE, .rsp = VT_STACK, .rflags = 2, .rdi = FUNCTIONS, .rcx = HOST_WRITES };
    vt_must(kvs_vcpu_set_regs(t.vcpu, &r), "set_regs");
    pthread_t thread;
    pthread_create(&thread, NULL, write_function, &t);
    run_to_halt(t.vcpu);
    pthread_join(thread, NULL);
    vt_must(kvs_vcpu_get_regs(t.vcpu, &r), "regs");
    CHECK(r.rbx == 0);
    vt_destroy(&t);
}

int main(void)
{
    own_stores();
    replaced_slots();
    host_stores();
    return vt_report();
}
