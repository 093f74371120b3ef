/* The soft TLB: direct-mapped arrays with logs of what was filled, so that a flush costs what was used. */
#include "mmu.h"

static inline void entry_clear(struct tlb_entry *e, uint32_t index)
{
    /* The page number of this tag selects the neighbour: no address that looks here can match. */
    e->tag = (uint64_t)(index ^ 1) << PAGE_SHIFT;
    e->addend = 0;
}

static void kind_clear(struct tlb_class *k, int kind)
{
    for (uint32_t n = 0; n < TLB_SIZE; n++) entry_clear(&k->e[kind][n], n);
    k->log[kind][0].count = k->log[kind][1].count = 0;
}

static inline bool log_overflowed(const struct tlb_log *log) { return log->count > TLB_LOG_SIZE; }

static void log_clear(struct tlb_class *k, int kind, int which)
{
    struct tlb_log *log = &k->log[kind][which];
    for (uint32_t n = 0; n < log->count; n++) entry_clear(&k->e[kind][log->index[n]], log->index[n]);
    log->count = 0;
}

static void kind_flush(struct tlb_class *k, int kind)
{
    if (log_overflowed(&k->log[kind][0]) || log_overflowed(&k->log[kind][1])) {
        kind_clear(k, kind);
        return;
    }
    log_clear(k, kind, 0);
    log_clear(k, kind, 1);
}

void slots_flush(struct kvs_vcpu *c, uint32_t from)
{
    if (from > SLOT_LOG_SIZE || c->slots_logged > SLOT_LOG_SIZE) {
        struct tlb_slot *slot = &c->slots[0][0][0];
        for (uint32_t n = 0; n < sizeof c->slots / sizeof *slot; n++) slot[n].bound = 0;
        c->slots_logged = c->slots_before_ac = 0;
        return;
    }
    for (uint32_t n = from; n < c->slots_logged; n++) ((struct tlb_slot *)(void *)((uint8_t *)c + c->slots_log[n]))->bound = 0;
    c->slots_logged = from;
    if (c->slots_before_ac > from) c->slots_before_ac = from;
}

void tlb_init(struct kvs_vcpu *c)
{
    slots_flush(c, 0);
    for (int k = 0; k < TLB_CLASSES; k++) {
        struct tlb_class *tc = &c->tlb_classes[k];
        for (int kind = 0; kind < TLB_KINDS; kind++) kind_clear(tc, kind);
        memset(tc->large, 0, sizeof tc->large);
        tc->huge = 0;
    }
    jc_flush(c);
}

void tlb_flush_all(struct kvs_vcpu *c)
{
    slots_flush(c, 0);
    for (int k = 0; k < TLB_CLASSES; k++) {
        struct tlb_class *tc = &c->tlb_classes[k];
        for (int kind = 0; kind < TLB_KINDS; kind++) kind_flush(tc, kind);
        memset(tc->large, 0, sizeof tc->large);
        tc->huge = 0;
    }
    jc_flush(c);
    c->stats.tlb_flushes++;
}

void tlb_flush_nonglobal(struct kvs_vcpu *c)
{
    slots_flush(c, 0);
    for (int k = 0; k < TLB_CLASSES; k++) {
        struct tlb_class *tc = &c->tlb_classes[k];
        for (int kind = 0; kind < TLB_KINDS; kind++) {
            /* Which entries are global is known by the logs alone. */
            if (log_overflowed(&tc->log[kind][0])) kind_clear(tc, kind);
            else log_clear(tc, kind, 0);
        }
    }
    jc_flush(c);
    c->stats.tlb_flushes++;
}

void tlb_flush_writes(struct kvs_vcpu *c)
{
    slots_flush(c, 0);
    for (int k = 0; k < TLB_CLASSES; k++) kind_flush(&c->tlb_classes[k], TLB_W);
    c->stats.tlb_flushes++;
}

void tlb_flush_data(struct kvs_vcpu *c)
{
    for (int k = 0; k < TLB_CLASSES; k++) kind_flush(&c->tlb_classes[k], TLB_R);
    tlb_flush_writes(c);
}

static inline bool entry_is_empty(const struct tlb_entry *e, uint32_t index) { return tlb_index(e->tag) != index; }

/* Drops what lies in the aligned region of 1 << bits bytes around la, a large page: what the logs name, or all. */
static bool region_clear(struct tlb_class *k, int kind, uint64_t la, uint32_t bits)
{
    struct tlb_entry *e = k->e[kind];
    bool found = false;
    if (log_overflowed(&k->log[kind][0]) || log_overflowed(&k->log[kind][1])) {
        kind_clear(k, kind);
        return true;
    }
    for (int which = 0; which < 2; which++) {
        struct tlb_log *log = &k->log[kind][which];
        uint32_t kept = 0;
        for (uint32_t n = 0; n < log->count; n++) {
            const uint16_t index = log->index[n];
            if ((e[index].tag ^ la) >> bits == 0) {
                entry_clear(&e[index], index);
                found = true;
            }
            /* Addresses that come and go must not fill the log. */
            if (!entry_is_empty(&e[index], index)) log->index[kept++] = index;
        }
        log->count = kept;
    }
    return found;
}

static inline bool page_clear(struct tlb_class *k, int kind, uint64_t la)
{
    const uint32_t n = tlb_index(la);
    if ((k->e[kind][n].tag ^ la) >> PAGE_SHIFT) return false;
    entry_clear(&k->e[kind][n], n);
    return true;
}

/* Spread, or the kernel's direct map would share a bit with every low user address. */
static inline uint32_t huge_hash(uint64_t la) { return (uint32_t)((la >> 30) * 0x9e3779b97f4a7c15ull >> 58); }
static inline uint32_t large_hash(uint64_t la) { return (uint32_t)((la >> 22) * 0x9e3779b97f4a7c15ull >> 52); }

void tlb_note_large(struct tlb_class *k, uint64_t la, uint32_t page_bits)
{
    if (page_bits <= PAGE_SHIFT) return;
    if (page_bits > 22) {
        k->huge |= BIT(huge_hash(la));
        return;
    }
    uint32_t h = large_hash(la);
    k->large[h >> 6] |= BIT(h & 63);
}

/* SDM 3A "Operations that Invalidate TLBs and Paging-Structure Caches": INVLPG drops every entry of a large page */
void tlb_flush_page(struct kvs_vcpu *c, uint64_t la)
{
    slots_flush(c, 0);
    uint32_t h = large_hash(la);
    /* Whatever the jump cache reaches was fetched once: it is in the tables still, or was evicted. */
    bool fetched = c->fetch_evicted;
    for (int k = 0; k < TLB_CLASSES; k++) {
        struct tlb_class *tc = &c->tlb_classes[k];
        uint32_t bits = PAGE_SHIFT;
        if (tc->large[h >> 6] & BIT(h & 63)) bits = 22;
        if (tc->huge & BIT(huge_hash(la))) bits = 30;
        for (int kind = 0; kind < TLB_KINDS; kind++) {
            bool found = bits == PAGE_SHIFT ? page_clear(tc, kind, la) : region_clear(tc, kind, la, bits);
            fetched |= found && kind == TLB_X;
        }
    }
    if (fetched) jc_flush(c);
    c->stats.tlb_flushes++;
}

static inline void deny(struct tlb_entry *e, uint32_t n, uint64_t page)
{
    if (e->addend + e->tag == page) entry_clear(e, n);
}

void tlb_deny_write(struct kvs_vcpu *c, const uint8_t *host_page)
{
    uint64_t page = (uint64_t)(uintptr_t)host_page & ~(uint64_t)PAGE_MASK;
    slots_flush(c, 0);
    for (int k = 0; k < TLB_CLASSES; k++) {
        struct tlb_class *tc = &c->tlb_classes[k];
        struct tlb_entry *e = tc->e[TLB_W];
        const struct tlb_log *log = tc->log[TLB_W];
        if (log_overflowed(&log[0]) || log_overflowed(&log[1])) {
            for (uint32_t n = 0; n < TLB_SIZE; n++) deny(&e[n], n, page);
            continue;
        }
        for (int w = 0; w < 2; w++)
            for (uint32_t n = 0; n < log[w].count; n++) deny(&e[log[w].index[n]], log[w].index[n], page);
    }
}

void tlb_insert_class(struct kvs_vcpu *c, struct tlb_class *k, int kind, uint64_t la, const uint8_t *host, bool global)
{
    uint32_t n = tlb_index(la);
    uint64_t page = la & ~(uint64_t)PAGE_MASK;
    struct tlb_entry *e = &k->e[kind][n];
    struct tlb_log *log = &k->log[kind][global];
    if (log->count < TLB_LOG_SIZE) log->index[log->count++] = (uint16_t)n;
    else log->count = TLB_LOG_SIZE + 1;
    if (kind == TLB_X && !entry_is_empty(e, n) && e->tag != page) c->fetch_evicted = true;
    e->tag = page;
    e->addend = ((uint64_t)(uintptr_t)host & ~(uint64_t)PAGE_MASK) - page;
    c->stats.tlb_fills++;
}

void tlb_insert(struct kvs_vcpu *c, int kind, uint64_t la, const uint8_t *host, bool global)
{
    tlb_insert_class(c, c->tlb, kind, la, host, global);
}

void tlb_catch_up(struct kvs_vcpu *c)
{
    uint32_t req = atomic_load_explicit(&c->requests, memory_order_acquire);
    if (UNLIKELY(req & REQ_TLB_FLUSH)) tlb_flush_all(c);
    else if (UNLIKELY(req & REQ_W_FLUSH)) tlb_flush_writes(c);
}
