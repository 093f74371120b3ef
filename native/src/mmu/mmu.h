/* Guest memory as instructions see it: segments, page tables, soft TLB, and the slow paths. */
#ifndef KVS_MMU_H
#define KVS_MMU_H

#include "../vm.h"

/* ---- soft TLB (tlb.c) ---- */
static inline uint32_t tlb_index(uint64_t la) { return (uint32_t)(la >> PAGE_SHIFT) & (TLB_SIZE - 1); }

/* Host address for a plain RAM access that stays in its page, or NULL. */
static ALWAYS_INLINE uint8_t *tlb_probe(const struct kvs_vcpu *c, int kind, uint64_t la, uint32_t size)
{
    const struct tlb_entry *e = &c->tlb->e[kind][tlb_index(la)];
    return LIKELY((la ^ e->tag) <= PAGE_SIZE - size) ? (uint8_t *)(uintptr_t)(la + e->addend) : NULL;
}

static inline bool tlb_class_is_user(uint32_t k) { return k == TLB_USER || k == TLB_USER32; }
void tlb_init(struct kvs_vcpu *c);
/* Empties the slots that were filled when slots_logged was at least from. */
void slots_flush(struct kvs_vcpu *c, uint32_t from);
/* Makes this class the current one. Supervisor code uses the same slots with and without AC: what AC let in goes. */
static inline void tlb_select(struct kvs_vcpu *c, uint32_t class)
{
    struct tlb_class *k = &c->tlb_classes[class], *ac = &c->tlb_classes[TLB_SUPER_AC];
    if (k == c->tlb) return;
    if (k == ac) c->slots_before_ac = c->slots_logged;
    if (c->tlb == ac && (c->slots_logged != c->slots_before_ac || c->slots_logged > SLOT_LOG_SIZE)) slots_flush(c, c->slots_before_ac);
    c->tlb = k;
}
void tlb_flush_all(struct kvs_vcpu *c);        /* global pages too */
void tlb_flush_nonglobal(struct kvs_vcpu *c);  /* MOV to CR3 */
void tlb_flush_page(struct kvs_vcpu *c, uint64_t la); /* INVLPG: every class */
void tlb_flush_writes(struct kvs_vcpu *c);     /* every W tag */
void tlb_flush_data(struct kvs_vcpu *c);       /* every R and W tag */
/* Drops W tags of this vCPU that lead to the host page (its RAM is about to be marked as code). */
void tlb_deny_write(struct kvs_vcpu *c, const uint8_t *host_page);
void tlb_insert(struct kvs_vcpu *c, int kind, uint64_t la, const uint8_t *host, bool global);
void tlb_insert_class(struct kvs_vcpu *c, struct tlb_class *k, int kind, uint64_t la, const uint8_t *host, bool global);
/* la was filled from a mapping of 1 << page_bits bytes. */
void tlb_note_large(struct tlb_class *k, uint64_t la, uint32_t page_bits);
/*
 * After this vCPU has waited inside an instruction (vm_sync_begin with itself as the initiator):
 * others may have changed slots meanwhile, and their flush requests are due before the next access.
 */
void tlb_catch_up(struct kvs_vcpu *c);
/* Every block reached by linear address must be looked up anew. O(1). */
static inline void jc_flush(struct kvs_vcpu *c)
{
    c->jc_key += 1 << 16;
    c->fetch_evicted = false;
}

/*
 * Linear-address masking takes the metadata out of a pointer; what is left may still not be canonical.
 * For data accesses of 64-bit code alone. SDM 1 "Linear-Address Masking"
 */
static inline uint64_t la_untag(const struct kvs_vcpu *c, uint64_t la)
{
    const uint32_t bits = la >> 63 ? c->lam_super : c->lam_user;
    return LIKELY(!bits) ? la : (sign_extend(la, bits) & ~BIT(63)) | (la & BIT(63));
}

/* ---- page walk (walk.c) ---- */
enum { ACC_R = 0, ACC_W = 1, ACC_X = 2, ACC_RW = 3 /* read-modify-write: write checks */ };
struct translation {
    uint64_t gpa;
    bool writable;   /* W and dirty: a W tag may be given */
    bool readable_by_class[TLB_CLASSES];
    bool global;
    uint32_t page_bits; /* 12, 21, 22 or 30: size of the mapping */
};
/*
 * Walks the page tables for linear address la. user: the access counts as CPL 3; ac: EFLAGS.AC
 * lets a supervisor touch user pages. Sets A and D bits with lock cmpxchg. 0, or ST_FAULT with #PF
 * pending (or, when probe is set, -1 with no exception and no A/D update: debugger accesses).
 * SDM 3A "Paging", "Page-Fault Exceptions", "Accessed and Dirty Flags"
 */
int mmu_walk(struct kvs_vcpu *c, uint64_t la, int access, bool user, bool ac, bool probe, struct translation *t);
/* Loads the PAE PDPTRs from CR3. 0, or -1 when a reserved bit is set (#GP(0) of MOV to CR). */
int mmu_load_pdptrs(struct kvs_vcpu *c, uint64_t cr3);

/* ---- slow accesses (access.c) ----
 * Return ST_OK, ST_FAULT (exception pending) or ST_EXIT (the host must answer an MMIO read).
 * Any size up to 512 bytes; may cross pages. Writes check all pages before the first byte is stored.
 * Aligned accesses of 1, 2, 4, 8 bytes to RAM are single host accesses.
 */
enum { LA_USER_RULES = 0, LA_SYSTEM = 1 /* implicit supervisor access: descriptor tables, TSS, IDT */ };
int lread(struct kvs_vcpu *c, uint64_t la, void *data, uint32_t size, int how);
int lwrite(struct kvs_vcpu *c, uint64_t la, const void *data, uint32_t size, int how);
/* Checks that a later lwrite of the range cannot fault (sets A/D); for multi-part writes. */
int lwrite_check(struct kvs_vcpu *c, uint64_t la, uint32_t size, int how);

/* Logical address to linear: segment type, limit, canonical and alignment checks. (segment.c)
 * seg bit 7 (INSN_FAST): off is linear already; only the canonical check (#SS for SEG_SS) remains, or that at 4 GiB.
 * #AC (CPL 3, CR0.AM, EFLAGS.AC) is checked here by the size of a single datum: 2, 4, 8, 10. */
int seg_to_linear(struct kvs_vcpu *c, uint32_t seg, uint64_t off, uint32_t size, int access, uint64_t *la);
/* The same for operands that must be aligned to their size, a power of two: #GP(0), never #AC. */
int seg_to_linear_aligned(struct kvs_vcpu *c, uint32_t seg, uint64_t off, uint32_t size, int access, uint64_t *la);
/* The #AC check alone, for operands of several data. */
int seg_check_alignment(struct kvs_vcpu *c, uint32_t seg, uint64_t off, uint32_t align, int access);

int vread(struct kvs_vcpu *c, uint32_t seg, uint64_t off, void *data, uint32_t size);
int vwrite(struct kvs_vcpu *c, uint32_t seg, uint64_t off, const void *data, uint32_t size);
/*
 * Read-modify-write: begin checks for write and loads the value into c->rmw.data; end stores
 * c->rmw.data and cannot fault. A LOCKed operation on RAM inside one page uses c->rmw.host (non-NULL
 * then) with a host atomic directly and skips end; otherwise the world is stopped around it:
 * vrmw_begin_locked / vrmw_end_locked.
 */
int vrmw_begin(struct kvs_vcpu *c, uint32_t seg, uint64_t off, uint32_t size);
void vrmw_end(struct kvs_vcpu *c);
int vrmw_begin_locked(struct kvs_vcpu *c, uint32_t seg, uint64_t off, uint32_t size);
void vrmw_end_locked(struct kvs_vcpu *c);
/* Plain RAM from seg:off on, for bulk string operations: host address and bytes up to the end of the
 * page (at least 1), or NULL: do it element by element. Never faults, never exits. */
uint8_t *vspan(struct kvs_vcpu *c, uint32_t seg, uint64_t off, bool write, uint64_t *bytes);

/* Instruction fetch for the block builder: host address of the byte at linear address la, or NULL
 * with *st = ST_FAULT (#PF pending) or ST_EXIT (not RAM: internal error prepared in the run block). */
const uint8_t *mmu_fetch(struct kvs_vcpu *c, uint64_t la, struct kvs_ram **ram, int *st);

/* Any store to RAM that did not go through a W tag calls this first: drops decoded code under
 * [host, host + size) in every vCPU (sets c->code_modified when it was this one's). (interp/block.c) */
void code_store_check(struct kvs_vcpu *c, struct memslot *s, uint8_t *host, uint32_t size);
/* The same for the host side (DMA, loaders). Any thread. */
void code_invalidate(struct kvs_vm *vm, struct kvs_ram *ram, uint64_t ram_offset, uint64_t size);

/* ---- guest memory for the host and for in-core devices (memslot.c). Any thread ---- */
int32_t vm_mem_read(struct kvs_vm *vm, uint64_t gpa, void *data, uint64_t len);
int32_t vm_mem_write(struct kvs_vm *vm, uint64_t gpa, const void *data, uint64_t len);

#endif
