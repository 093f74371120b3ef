/* The page walk. SDM 3A "Paging" */
#include "../sys/sys.h"

#define PTE_P 0x1u
#define PTE_W 0x2u
#define PTE_U 0x4u
#define PTE_A 0x20u
#define PTE_D 0x40u
#define PTE_PS 0x80u
#define PTE_G 0x100u
#define PTE_NX BIT(63)
#define PTE_KEY_SHIFT 59
#define LEVELS_MAX 5

/* An entry that the walk used. */
struct step { void *host; struct memslot *slot; uint64_t gpa; uint64_t value; };

enum { KEY_AD = 1, KEY_WD = 2 };

struct walk {
    struct step step[LEVELS_MAX];
    uint32_t steps;
    uint32_t page_bits;
    uint64_t base;   /* physical address of the page */
    uint64_t rights; /* AND of all entries: PTE_W and PTE_U count */
    bool nx;
    uint8_t key;     /* protection key: KEY_AD and KEY_WD as PKRU or PKRS has them for this page, 0 outside IA-32e paging */
};

static inline bool nx_on(const struct kvs_vcpu *c) { return (c->efer & EFER_NX) && (c->cr4 & CR4_PAE); }

/* AMD BKDG "SMM Overview": A20M# has no effect in system management mode */
static inline uint64_t a20_mask(const struct kvs_vcpu *c)
{
    return atomic_load_explicit(&c->vm->a20_mask, memory_order_relaxed) | (c->in_smm ? BIT(20) : 0);
}

/* A table outside memory reads as not present, as under KVM. near: the slot of the table above, or NULL. */
static ALWAYS_INLINE bool entry_read(struct kvs_vcpu *c, uint64_t gpa, bool wide, struct memslot *near, struct step *s)
{
    gpa &= a20_mask(c);
    if (!near || UNLIKELY(gpa - near->gpa >= near->size)) {
        near = memslot_find(vcpu_slots(c), gpa);
        if (UNLIKELY(!near)) return false;
    }
    s->slot = near;
    s->gpa = gpa;
    s->host = near->host + (gpa - near->gpa);
    s->value = wide ? atomic_load_explicit((_Atomic uint64_t *)s->host, memory_order_relaxed)
                    : atomic_load_explicit((_Atomic uint32_t *)s->host, memory_order_relaxed);
    return true;
}

/* Bits that must be zero in a present entry. SDM 3A "Reserved Bits" under each paging mode */
static ALWAYS_INLINE uint64_t reserved_bits(const struct kvs_vcpu *c, bool wide, bool is_long, uint32_t level, bool leaf)
{
    if (!wide) return level == 2 && leaf ? BIT(21) : 0; /* PSE-36: bits 13-20 are address bits 32-39 */
    uint64_t r = is_long ? (BIT(52) - 1) & ~PHYS_MASK : (BIT(63) - 1) & ~PHYS_MASK;
    if (!(c->efer & EFER_NX)) r |= PTE_NX;
    if (level >= 4 || (level == 3 && !has_feature(c, FEAT_1G))) r |= PTE_PS;
    if (leaf && level > 1) r |= (BIT(12 + 9 * (level - 1)) - 1) & ~(uint64_t)0x1fff;
    return r;
}

/* SDM 3A "Protection Keys": PKRU is for user-mode addresses, IA32_PKRS for supervisor-mode ones */
static uint8_t key_rights(const struct kvs_vcpu *c, uint32_t key, bool user_page)
{
    if (!(c->cr4 & (user_page ? CR4_PKE : CR4_PKS))) return 0;
    return (user_page ? c->pkru : (uint32_t)c->msr_pkrs) >> key * 2 & 3;
}

/* 0, or the P and RSVD bits of the error code plus WALK_FAULT: the walk found no page. */
#define WALK_FAULT 0x80000000u
static ALWAYS_INLINE uint32_t walk_levels(struct kvs_vcpu *c, uint64_t la, uint64_t table, uint32_t top,
                                          bool wide, bool is_long, struct walk *w)
{
    const uint32_t index_bits = wide ? 9 : 10, bytes = wide ? 8 : 4;
    struct memslot *near = NULL;
    uint64_t rights = ~0ull, any = 0;
    w->steps = 0;
    for (uint32_t level = top;; level--) {
        const uint32_t shift = PAGE_SHIFT + index_bits * (level - 1);
        struct step *s = &w->step[w->steps++];
        if (UNLIKELY(!entry_read(c, table + (la >> shift & ((1u << index_bits) - 1)) * bytes, wide, near, s))) return WALK_FAULT;
        near = s->slot;
        const uint64_t e = s->value;
        if (!(e & PTE_P)) return WALK_FAULT;
        const bool leaf = level == 1 || ((e & PTE_PS) && level < 4 && (wide || (c->cr4 & CR4_PSE)));
        if (UNLIKELY(e & reserved_bits(c, wide, is_long, level, leaf))) return WALK_FAULT | PF_P | PF_RSVD;
        rights &= e;
        any |= e;
        if (leaf) {
            w->rights = rights;
            w->nx = wide && any >> 63;
            w->key = is_long && UNLIKELY(c->cr4 & (CR4_PKE | CR4_PKS)) ? key_rights(c, e >> PTE_KEY_SHIFT & 15, rights & PTE_U) : 0;
            w->page_bits = shift;
            if (wide) w->base = e & PHYS_MASK & ~(BIT(shift) - 1);
            else if (level == 1) w->base = e & 0xfffff000u;
            else w->base = (e & 0xffc00000u) | (e >> 13 & 0xff) << 32;
            return 0;
        }
        table = wide ? e & PHYS_MASK & ~(uint64_t)PAGE_MASK : e & 0xfffff000u;
    }
}

static uint32_t walk_tables(struct kvs_vcpu *c, uint64_t la, struct walk *w)
{
    if (LIKELY(is_long_mode(c)))
        return walk_levels(c, la, c->cr3 & PHYS_MASK & ~(uint64_t)PAGE_MASK, UNLIKELY(c->cr4 & CR4_LA57) ? 5 : 4, true, true, w);
    if (!(c->cr4 & CR4_PAE)) return walk_levels(c, la, c->cr3 & 0xfffff000u, 2, false, false, w);
    uint64_t pdpte = c->pdptr[la >> 30 & 3];
    if (!(pdpte & PTE_P)) return WALK_FAULT;
    return walk_levels(c, la, pdpte & PHYS_MASK & ~(uint64_t)PAGE_MASK, 2, true, false, w);
}

/* SDM 3A "Protection Keys": data accesses, whoever makes them */
static inline bool key_denies(const struct kvs_vcpu *c, const struct walk *w, int access, bool user)
{
    if (LIKELY(!w->key) || access == ACC_X) return false;
    return (w->key & KEY_AD) || (access != ACC_R && (user || (c->cr0 & CR0_WP)));
}

/* SDM 3A "Determination of Access Rights" */
static inline bool allowed(const struct kvs_vcpu *c, const struct walk *w, int access, bool user, bool ac)
{
    const bool user_page = w->rights & PTE_U;
    if (access == ACC_X) {
        if (w->nx && nx_on(c)) return false;
        return user ? user_page : !(user_page && (c->cr4 & CR4_SMEP));
    }
    if (user ? !user_page : user_page && (c->cr4 & CR4_SMAP) && !ac) return false;
    if (key_denies(c, w, access, user)) return false;
    if (access == ACC_R || (w->rights & PTE_W)) return true;
    return !user && !(c->cr0 & CR0_WP);
}

/*
 * Sets A in every entry used and D in the leaf of a write. Done once the access is known to be
 * allowed, so that a fault leaves the tables alone, as KVM does. Tables in read-only slots keep
 * what they have. False: an entry changed meanwhile: walk again.
 * SDM 3A "Accessed and Dirty Flags"
 */
static bool update_accessed_dirty(struct kvs_vcpu *c, struct walk *w, bool write, uint32_t bytes)
{
    for (uint32_t n = 0; n < w->steps; n++) {
        struct step *s = &w->step[n];
        uint64_t want = s->value | PTE_A | (write && n + 1 == w->steps ? PTE_D : 0);
        if (LIKELY(want == s->value) || (s->slot->flags & KVS_MEM_READONLY)) continue;
        bool done;
        if (bytes == 8) {
            uint64_t old = s->value;
            done = atomic_compare_exchange_strong((_Atomic uint64_t *)s->host, &old, want);
        } else {
            uint32_t old = (uint32_t)s->value;
            done = atomic_compare_exchange_strong((_Atomic uint32_t *)s->host, &old, (uint32_t)want);
        }
        if (!done) return false;
        s->value = want;
        memslot_mark_dirty(s->slot, s->gpa, bytes);
        uint64_t page = (uint64_t)((uint8_t *)s->host - s->slot->ram->host) >> PAGE_SHIFT;
        if (UNLIKELY(atomic_load_explicit(&s->slot->ram->code_marks[page], memory_order_relaxed)))
            code_store_check(c, s->slot, s->host, bytes);
    }
    return true;
}

int mmu_walk(struct kvs_vcpu *c, uint64_t la, int access, bool user, bool ac, bool probe, struct translation *t)
{
    const uint64_t a20 = a20_mask(c);
    const bool write = access == ACC_W || access == ACC_RW;
    if (!(c->cr0 & CR0_PG)) {
        *t = (struct translation){ .gpa = (uint32_t)la & a20, .writable = true, .page_bits = PAGE_SHIFT,
                                   .readable_by_class = { true, true, true, true } };
        return ST_OK;
    }
    struct walk w;
    uint32_t error;
    for (;;) {
        error = walk_tables(c, la, &w);
        if (error) break;
        if (probe) w.key = 0; /* a debugger looks */
        if (!allowed(c, &w, access, user, ac)) {
            /* SDM 3A "Page-Fault Exceptions": PK whatever else denied the access too */
            error = WALK_FAULT | PF_P | (key_denies(c, &w, access, user) ? PF_PK : 0);
            break;
        }
        if (probe || update_accessed_dirty(c, &w, write, is_long_mode(c) || (c->cr4 & CR4_PAE) ? 8 : 4)) break;
    }
    if (UNLIKELY(error)) {
        if (probe) return -1;
        error &= ~WALK_FAULT;
        if (write) error |= PF_W;
        if (user) error |= PF_U;
        /* SDM 3A "Page-Fault Exceptions": I/D only where fetches can be told apart */
        if (access == ACC_X && (nx_on(c) || (c->cr4 & CR4_SMEP))) error |= PF_I;
        return raise_page_fault(c, la, error);
    }
    const uint64_t leaf = w.step[w.steps - 1].value;
    t->gpa = (w.base | (la & (BIT(w.page_bits) - 1))) & a20;
    t->page_bits = w.page_bits;
    t->global = (leaf & PTE_G) && (c->cr4 & CR4_PGE);
    t->writable = ((leaf & PTE_D) || (write && !probe)) && allowed(c, &w, ACC_W, user, ac);
    for (int k = 0; k < TLB_CLASSES; k++)
        t->readable_by_class[k] = allowed(c, &w, ACC_R, tlb_class_is_user((uint32_t)k), k == TLB_SUPER_AC);
    return ST_OK;
}

/* SDM 3A "PDPTE Registers". Outside memory: refused, as KVM does. */
int mmu_load_pdptrs(struct kvs_vcpu *c, uint64_t cr3)
{
    const uint64_t reserved = ~PHYS_MASK | 0x1e6;
    uint64_t value[4];
    for (uint32_t n = 0; n < 4; n++) {
        struct step s;
        if (!entry_read(c, (cr3 & 0xffffffe0u) + 8 * n, true, NULL, &s)) return -1;
        if ((s.value & PTE_P) && (s.value & reserved)) return -1;
        value[n] = s.value;
    }
    memcpy(c->pdptr, value, sizeof value);
    return 0;
}
