/*
 * Accesses that no soft TLB tag could answer: page walk, TLB fill, ROM, MMIO, code pages, dirty log.
 *
 * W tags and code marks: whoever marks a page as code first stops the other vCPUs (vm_sync_begin)
 * and denies the page in every W array. A fill happens only in guest code, so the marks cannot
 * change between the test in fill() and the insertion.
 */
#include "access.h"

static inline struct tlb_class *access_class(struct kvs_vcpu *c, int how)
{
    /* SDM 3A "Determination of Access Rights": implicit accesses are supervisor ones whatever CPL and AC are */
    return how == LA_SYSTEM ? &c->tlb_classes[TLB_SUPER] : c->tlb;
}

static inline uint8_t *class_probe(const struct tlb_class *k, int kind, uint64_t la, uint32_t size)
{
    const struct tlb_entry *e = &k->e[kind][tlb_index(la)];
    return LIKELY((la ^ e->tag) <= PAGE_SIZE - size) ? (uint8_t *)(uintptr_t)(la + e->addend) : NULL;
}

static inline bool page_has_code(const struct memslot *s, const uint8_t *host)
{
    uint64_t page = (uint64_t)(host - s->ram->host) >> PAGE_SHIFT;
    return atomic_load_explicit(&s->ram->code_marks[page], memory_order_relaxed) != 0;
}

static inline bool page_logged_dirty(const struct memslot *s, uint64_t gpa)
{
    uint64_t page = (gpa - s->gpa) >> PAGE_SHIFT;
    return atomic_load_explicit(&s->dirty[page >> 6], memory_order_relaxed) >> (page & 63) & 1;
}

static void fill(struct kvs_vcpu *c, struct tlb_class *k, uint64_t la, const struct translation *t,
                 const struct memslot *s, const uint8_t *host)
{
    if (UNLIKELY(c->dr7 & 0xff) && debug_page_watched(c, la)) return;
    /* A system access goes where the same pointer in an instruction would not. */
    if (UNLIKELY(la_untag(c, la) != la)) return;
    /* Sums that wrap miss because no entry is there (vcpu.c). */
    if (UNLIKELY(la >> 32) && !is_long_mode(c)) return;
    if (t->readable_by_class[k - c->tlb_classes]) tlb_insert_class(c, k, TLB_R, la, host, t->global);
    if (t->writable && !(s->flags & KVS_MEM_READONLY) && !page_has_code(s, host) &&
        (!s->dirty || page_logged_dirty(s, t->gpa)))
        tlb_insert_class(c, k, TLB_W, la, host, t->global);
    tlb_note_large(k, la, t->page_bits);
}

/*
 * Virtual time is the count of retired instructions, which is not known inside a chain of handlers.
 * A device must see the exact time, so the instruction starts again and runs by itself.
 */
static int device_access(struct kvs_vcpu *c)
{
    if (!c->in_chain || c->vm->config.clock_mode != KVS_CLOCK_VIRTUAL) return ST_OK;
    c->step_next = true;
    return ST_AGAIN;
}

/* Translates an access that stays in its page. */
static int translate(struct kvs_vcpu *c, uint64_t la, uint32_t size, int access, int how, struct mem_part *p)
{
    struct tlb_class *k = access_class(c, how);
    p->la = la;
    p->size = size;
    p->host = class_probe(k, access == ACC_R ? TLB_R : TLB_W, la, size);
    if (p->host) {
        p->slot = NULL;
        p->gpa = 0;
        return ST_OK;
    }
    if (UNLIKELY(is_long_mode(c) && !is_canonical(c, la))) return raise_gp(c, 0);
    struct translation t;
    int st = mmu_walk(c, la, access, tlb_class_is_user((uint32_t)(k - c->tlb_classes)), k == &c->tlb_classes[TLB_SUPER_AC], false, &t);
    if (UNLIKELY(st)) return st;
    p->gpa = t.gpa;
    p->slot = memslot_find(vcpu_slots(c), t.gpa);
    if (!p->slot) return device_access(c);
    p->host = p->slot->host + (t.gpa - p->slot->gpa);
    if (access != ACC_R && !(p->slot->flags & KVS_MEM_READONLY)) memslot_mark_dirty(p->slot, t.gpa, size);
    fill(c, k, la, &t, p->slot, p->host);
    return ST_OK;
}

int access_translate(struct kvs_vcpu *c, uint64_t la, uint32_t size, int access, int how, struct mem_part part[2], uint32_t *count)
{
    const uint32_t first = (uint32_t)min_u64(size, PAGE_SIZE - (la & PAGE_MASK));
    *count = 1;
    if (LIKELY(first == size)) return translate(c, la, first, access, how, &part[0]);
    *count = 2;
    uint64_t next = la + first;
    /* Linear addresses are 32 bits wide but in 64-bit code and in the processor's own accesses in long mode. */
    if (!is_code64(c) && !(how == LA_SYSTEM && is_long_mode(c))) next = (uint32_t)next;
    int st = translate(c, la, first, access, how, &part[0]);
    return st ? st : translate(c, next, size - first, access, how, &part[1]);
}

static ALWAYS_INLINE void copy(void *to, const void *from, uint32_t size)
{
    switch (size) {
    case 1: memcpy(to, from, 1); break;
    case 2: memcpy(to, from, 2); break;
    case 4: memcpy(to, from, 4); break;
    case 8: memcpy(to, from, 8); break;
    case 16: memcpy(to, from, 16); break;
    default: memcpy(to, from, size); break;
    }
}

int access_load(struct kvs_vcpu *c, const struct mem_part *part, uint32_t count, void *data)
{
    uint8_t *to = data;
    for (uint32_t n = 0; n < count; to += part[n].size, n++) {
        if (LIKELY(part[n].host)) {
            copy(to, part[n].host, part[n].size);
            continue;
        }
        for (uint32_t done = 0; done < part[n].size;) {
            uint32_t size = (uint32_t)min_u64(8, part[n].size - done);
            int st = iobus_mmio_read(c, part[n].gpa + done, to + done, size);
            if (st) return st;
            done += size;
        }
    }
    return ST_OK;
}

static inline bool part_is_ram(const struct mem_part *p)
{
    return p->host && !(p->slot && (p->slot->flags & KVS_MEM_READONLY));
}

uint32_t access_store(struct kvs_vcpu *c, const struct mem_part *part, uint32_t count, const void *data)
{
    const uint8_t *from = data;
    uint32_t code = 0;
    for (uint32_t n = 0; n < count; from += part[n].size, n++) {
        if (LIKELY(part_is_ram(&part[n]))) {
            copy(part[n].host, from, part[n].size);
            if (part[n].slot && page_has_code(part[n].slot, part[n].host)) code |= 1u << n;
            continue;
        }
        /* A store to a read-only slot is a device access, as under KVM. */
        for (uint32_t done = 0; done < part[n].size;) {
            uint32_t size = (uint32_t)min_u64(8, part[n].size - done);
            (void)iobus_mmio_write(c, part[n].gpa + done, from + done, size);
            done += size;
        }
    }
    return code;
}

/* Store first, check second: whoever decodes these bytes from now on sees the new ones. */
void access_code_check(struct kvs_vcpu *c, const struct mem_part *part, uint32_t count, uint32_t code)
{
    if (LIKELY(!code)) return;
    for (uint32_t n = 0; n < count; n++)
        if (code >> n & 1) code_store_check(c, part[n].slot, part[n].host, part[n].size);
}

/* Data breakpoints match accesses that took place. SDM 3B "Data Breakpoint Exception Condition" */
static inline void watch(struct kvs_vcpu *c, uint64_t la, uint32_t size, bool write, int how)
{
    if (UNLIKELY(c->dr7 & 0xff) && how == LA_USER_RULES) debug_check_access(c, la, size, write);
}

int lread(struct kvs_vcpu *c, uint64_t la, void *data, uint32_t size, int how)
{
    const uint8_t *p = class_probe(access_class(c, how), TLB_R, la, size);
    if (p) {
        copy(data, p, size);
        return ST_OK;
    }
    struct mem_part part[2];
    uint32_t count;
    int st = access_translate(c, la, size, ACC_R, how, part, &count);
    if (st == ST_OK) st = access_load(c, part, count, data);
    if (st == ST_OK) watch(c, la, size, false, how);
    return st;
}

int lwrite(struct kvs_vcpu *c, uint64_t la, const void *data, uint32_t size, int how)
{
    uint8_t *p = class_probe(access_class(c, how), TLB_W, la, size);
    if (p) {
        copy(p, data, size);
        return ST_OK;
    }
    struct mem_part part[2];
    uint32_t count;
    int st = access_translate(c, la, size, ACC_W, how, part, &count);
    if (st) return st;
    access_code_check(c, part, count, access_store(c, part, count, data));
    watch(c, la, size, true, how);
    return ST_OK;
}

int lwrite_check(struct kvs_vcpu *c, uint64_t la, uint32_t size, int how)
{
    struct mem_part part[2];
    uint32_t count;
    return access_translate(c, la, size, ACC_W, how, part, &count);
}

int vread(struct kvs_vcpu *c, uint32_t seg, uint64_t off, void *data, uint32_t size)
{
    uint64_t la;
    int st = seg_to_linear(c, seg, off, size, ACC_R, &la);
    return UNLIKELY(st) ? st : lread(c, la, data, size, LA_USER_RULES);
}

int vwrite(struct kvs_vcpu *c, uint32_t seg, uint64_t off, const void *data, uint32_t size)
{
    uint64_t la;
    int st = seg_to_linear(c, seg, off, size, ACC_W, &la);
    return UNLIKELY(st) ? st : lwrite(c, la, data, size, LA_USER_RULES);
}

static struct kvs_ram *ram_of_host(const struct memslots *m, const uint8_t *host)
{
    for (uint32_t n = 0; m && n < m->count; n++)
        if ((uint64_t)((uintptr_t)host - (uintptr_t)m->slot[n].host) < m->slot[n].size) return m->slot[n].ram;
    return NULL;
}

const uint8_t *mmu_fetch(struct kvs_vcpu *c, uint64_t la, struct kvs_ram **ram, int *st)
{
    *st = ST_OK;
    const uint8_t *host = tlb_probe(c, TLB_X, la, 1);
    if (host && (!ram || (*ram = ram_of_host(vcpu_slots(c), host)))) return host;
    struct translation t;
    if (UNLIKELY(is_code64(c) && !is_canonical(c, la))) { /* behind the end of the lower half */
        *st = raise_gp(c, 0);
        return NULL;
    }
    *st = mmu_walk(c, la, ACC_X, tlb_class_is_user((uint32_t)(c->tlb - c->tlb_classes)), false, false, &t);
    if (*st) return NULL;
    uint64_t left;
    struct memslot *s;
    host = gpa_to_host(vcpu_slots(c), t.gpa, &left, &s);
    if (!host) {
        *st = iobus_internal_error(c);
        return NULL;
    }
    if (ram) *ram = s->ram;
    tlb_insert(c, TLB_X, la, host, t.global);
    tlb_note_large(c->tlb, la, t.page_bits);
    return host;
}
