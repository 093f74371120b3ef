/* The VM: memory, in-core devices, clock, and the list of vCPUs. */
#ifndef KVS_VM_H
#define KVS_VM_H

#include "vcpu.h"

#define MAX_VCPUS 255

/*
 * RAM: reference counted. Beside it stands one word per page that marks the 64-byte granules
 * from which some vCPU has decoded code (bit n = granule n). A page with a non-zero mark never
 * gets a W tag in any soft TLB, so every store to it reaches code_store_check.
 */
struct kvs_ram {
    _Atomic uint32_t refs;
    uint8_t *host;
    uint64_t size;
    bool owned; /* mmap of ours; otherwise the caller's memory */
    int fd;
    _Atomic uint64_t *code_marks; /* per page */
};

struct memslot {
    uint64_t gpa, size;
    struct kvs_ram *ram;
    uint64_t ram_offset;
    uint8_t *host;            /* ram->host + ram_offset */
    uint32_t id;              /* bits 0-15 id, 16-31 address space */
    uint32_t flags;           /* KVS_MEM_... */
    _Atomic uint64_t *dirty;  /* bitmap, when KVS_MEM_LOG_DIRTY_PAGES */
};

/* Immutable once published; replaced as a whole under vm_sync. Sorted by gpa. */
struct memslots { uint32_t count; struct memslot slot[]; };

struct irqchip; /* irqchip/irqchip.h */
struct clock;   /* clock.h */

struct kvs_vm {
    _Atomic uint32_t refs;
    struct kvs_vm_config config;
    pthread_mutex_t lock;           /* slots, doorbells, vCPU list, configuration */
    _Atomic(struct memslots *) slots[KVS_SPACE_COUNT];
    uint64_t slot_changes;          /* counts them; under vm_sync */
    struct kvs_vcpu *vcpus[MAX_VCPUS]; /* by index of creation */
    _Atomic uint32_t vcpu_count;
    struct irqchip *irqchip;        /* NULL: none */
    struct clock *clock;
    _Atomic uint64_t a20_mask;      /* ~0, or ~(1 << 20) */
    struct doorbells *doorbells;
    /* quiesce */
    pthread_mutex_t sync_lock;
    pthread_cond_t sync_cond;
    _Atomic uint32_t quiesced;
    _Atomic uint64_t host_timer;    /* deadline of KVS_EXIT_HOST_TIMER, ~0 none */
    const void *sync_owner;         /* under sync_lock: a vCPU, or the VM itself for the host */
    uint32_t sync_depth;            /* of the host's nesting */
    _Atomic uint32_t turn;          /* virtual clock: the vCPU that may run */
    /* host pages whose code was dropped; each vCPU follows with its own drop_seen */
    pthread_mutex_t drop_lock;
    uint64_t drop_count;
    const uint8_t *drop_page[256];
};

/* ---- memslot.c ---- */
struct memslot *memslot_find(struct memslots *m, uint64_t gpa); /* NULL: no memory there */
static inline struct memslots *vm_slots(struct kvs_vm *vm, uint32_t space)
{
    return atomic_load_explicit(&vm->slots[space], memory_order_acquire);
}
/* The address space that this vCPU is in. KVM "KVM_CAP_MULTI_ADDRESS_SPACE" */
static inline struct memslots *vcpu_slots(struct kvs_vcpu *c)
{
    struct memslots *smm = UNLIKELY(c->in_smm) ? vm_slots(c->vm, KVS_SPACE_SMM) : NULL;
    return UNLIKELY(smm != NULL) && smm->count ? smm : vm_slots(c->vm, KVS_SPACE_NORMAL);
}
/* Host address of a guest physical byte, or NULL. *left: bytes to the end of the slot. */
uint8_t *gpa_to_host(struct memslots *m, uint64_t gpa, uint64_t *left, struct memslot **slot);
void memslot_mark_dirty(struct memslot *s, uint64_t gpa, uint64_t length);
int memslot_set(struct kvs_vm *vm, const struct kvs_userspace_memory_region *r, struct kvs_ram *ram, uint64_t ram_offset);
void memslots_free(struct kvs_vm *vm);  /* the last user is gone: slots and the doorbell table */

/* ---- doorbell.c ---- */
void doorbells_free(struct kvs_vm *vm);
/* A write by a vCPU in guest code: true when a doorbell took it. */
bool doorbell_write(struct kvs_vm *vm, bool is_port, uint64_t addr, uint32_t size, uint64_t value);

/* ---- vm.c: stop the world ---- */
/*
 * Returns when no vCPU but `self` (NULL: the host) is in guest code; vm_sync_end lets them go on. Only
 * one can hold the world; a vCPU that waits for it counts as outside meanwhile, so what it knew of
 * slots and translations is stale afterwards (tlb_catch_up). Host threads may nest.
 */
void vm_sync_begin(struct kvs_vm *vm, struct kvs_vcpu *self);
void vm_sync_end(struct kvs_vm *vm, struct kvs_vcpu *self);
/* Posts requests to every vCPU. */
void vm_request_all(struct kvs_vm *vm, uint32_t req);
void vm_release(struct kvs_vm *vm);

/* ---- iobus.c: device side of physical addresses and ports ---- */
/*
 * Return ST_OK (done in the core), or ST_EXIT with the run block filled. Reads that the host must
 * answer are replayed from c->replay on restart; writes are queued in c->writes and leave as exits
 * of at most 8 bytes after the instruction. size <= 8 here.
 */
int iobus_mmio_read(struct kvs_vcpu *c, uint64_t gpa, void *data, uint32_t size);
int iobus_mmio_write(struct kvs_vcpu *c, uint64_t gpa, const void *data, uint32_t size); /* queues; always ST_OK */
int iobus_port_read(struct kvs_vcpu *c, uint16_t port, uint32_t *data, uint32_t size);
int iobus_port_write(struct kvs_vcpu *c, uint16_t port, uint32_t data, uint32_t size); /* ST_OK or ST_EXIT_DONE */
/* Something that no device can answer, at c->rip: KVS_EXIT_INTERNAL_ERROR. Returns ST_EXIT. */
int iobus_internal_error(struct kvs_vcpu *c);
/* Before re-entering guest code: completes the exit that the host has answered. */
void iobus_complete_exit(struct kvs_vcpu *c);
/* After an instruction: pushes queued writes out. True: the run block holds an exit. */
bool iobus_flush_writes(struct kvs_vcpu *c);
/* The instruction retired or faulted: forget its replay log. */
static inline void iobus_insn_done(struct kvs_vcpu *c) { c->replay_count = c->replay_pos = 0; }

#endif
