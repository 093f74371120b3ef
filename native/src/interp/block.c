/*
 * Decoded blocks: built from guest bytes, found by host address and mode, dropped when the bytes
 * change. Each vCPU has its own cache. Memory is a bump arena; when it is full everything goes.
 *
 * A block holds instructions of one page (or one single instruction that crosses into the next).
 * The page's code marks (kvs_ram.code_marks) say which 64-byte granules some vCPU has decoded; such
 * pages never get a W tag, so code_store_check sees every store to them.
 */
#include <stdlib.h>
#include <sys/mman.h>

#include "interp.h"
#include "../jit/jit.h"

#define ARENA_SIZE (48u << 20)
#define HASH_BITS 15
#define PAGE_HASH_BITS 12
/* Harmless stores to a page with code before its code is dropped to get fast stores back. */
#define PAGE_PATIENCE 64

/* A host page from which this vCPU has decoded something. */
struct code_page {
    struct code_page *hash_next;
    const uint8_t *host;
    struct block *blocks;
};

struct block_cache {
    uint8_t *arena;
    size_t used;
    uint32_t generation;
    struct block *hash[1u << HASH_BITS];
    struct code_page *pages[1u << PAGE_HASH_BITS];
};

static uint32_t block_hash(const uint8_t *host, uint32_t mode)
{
    uint64_t h = ((uint64_t)(uintptr_t)host ^ (uint64_t)mode << 40) * 0x9e3779b97f4a7c15ull;
    return (uint32_t)(h >> (64 - HASH_BITS));
}
static uint32_t page_hash(const uint8_t *host)
{
    return (uint32_t)((((uint64_t)(uintptr_t)host >> PAGE_SHIFT) * 0x9e3779b97f4a7c15ull) >> (64 - PAGE_HASH_BITS));
}
static const uint8_t *page_of(const uint8_t *host) { return (const uint8_t *)((uintptr_t)host & ~(uintptr_t)PAGE_MASK); }

int block_cache_create(struct kvs_vcpu *c)
{
    struct block_cache *bc = calloc(1, sizeof *bc);
    struct jc_entry *jc = calloc(JC_SIZE, sizeof *jc);
    void *arena = mmap(NULL, ARENA_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (!bc || !jc || arena == MAP_FAILED) {
        free(bc);
        free(jc);
        if (arena != MAP_FAILED) munmap(arena, ARENA_SIZE);
        return -KVS_ENOMEM;
    }
    bc->arena = arena;
    c->blocks = bc;
    c->jc = jc;
    return KVS_OK;
}

void block_cache_destroy(struct kvs_vcpu *c)
{
    if (!c->blocks) return;
    munmap(c->blocks->arena, ARENA_SIZE);
    free(c->blocks);
    free(c->jc);
    c->blocks = NULL;
    c->jc = NULL;
}

void block_cache_flush(struct kvs_vcpu *c)
{
    struct block_cache *bc = c->blocks;
    bc->used = 0;
    bc->generation++;
    memset(bc->hash, 0, sizeof bc->hash);
    memset(bc->pages, 0, sizeof bc->pages);
    jc_flush(c);
    jit_flush(c);
    c->stats.cache_flushes++;
}

/* ---- code marks ---- */
static uint64_t granules(uint32_t first, uint32_t bytes)
{
    uint32_t a = first >> 6, b = (first + bytes - 1) >> 6;
    return (b == 63 ? ~0ull : (1ull << (b + 1)) - 1) & ~((1ull << a) - 1);
}

/*
 * Marks the bytes as code. False: this vCPU waited for others, so host pointers and translations are
 * stale and the caller starts again. SDM 3A "Handling Self- and Cross-Modifying Code"
 */
static bool mark_code(struct kvs_vcpu *c, struct kvs_ram *ram, const uint8_t *host, uint32_t bytes)
{
    struct kvs_vm *vm = c->vm;
    uint64_t page = (uint64_t)(host - ram->host) >> PAGE_SHIFT;
    uint64_t bits = granules((uint32_t)((uintptr_t)host & PAGE_MASK), bytes);
    uint64_t old = atomic_load_explicit(&ram->code_marks[page], memory_order_relaxed);
    if ((old & bits) == bits) return true;
    if (old == 0 && atomic_load(&vm->vcpu_count) > 1) {
        /* First code in this page: no vCPU may go on storing to it through a W tag. */
        const uint64_t changes = vm->slot_changes;
        vm_sync_begin(vm, c);
        tlb_catch_up(c);
        bool same = changes == vm->slot_changes; /* else ram may be gone */
        if (same) {
            for (uint32_t n = 0; n < atomic_load(&vm->vcpu_count); n++)
                if (vm->vcpus[n] && vm->vcpus[n] != c) vcpu_request(vm->vcpus[n], REQ_W_FLUSH);
            atomic_fetch_or(&ram->code_marks[page], bits);
        }
        vm_sync_end(vm, c);
        if (same) tlb_deny_write(c, page_of(host));
        return false;
    }
    if (old == 0) tlb_deny_write(c, page_of(host));
    atomic_fetch_or(&ram->code_marks[page], bits);
    return true;
}

/* ---- dropping code ---- */
static struct code_page *page_find(struct block_cache *bc, const uint8_t *page)
{
    struct code_page *p = bc->pages[page_hash(page)];
    while (p && p->host != page) p = p->hash_next;
    return p;
}

static void unhash(struct block_cache *bc, struct block *b)
{
    struct block **link = &bc->hash[block_hash(b->host, b->mode)];
    while (*link && *link != b) link = &(*link)->hash_next;
    if (*link) *link = b->hash_next;
    b->dead = 1;
}

/* Drops this vCPU's blocks of a page. Their memory stays until the next flush. */
static void page_drop(struct kvs_vcpu *c, const uint8_t *page)
{
    struct code_page *p = page_find(c->blocks, page);
    if (!p) return;
    for (struct block *b = p->blocks; b; b = b->page_next) {
        if (!b->dead) {
            unhash(c->blocks, b);
            c->stats.blocks_invalidated++;
        }
    }
    p->blocks = NULL;
    jc_flush(c);
}

/*
 * Pages first to last of ram change: this vCPU's blocks go at once, the others' at their next poll. A vCPU that finds
 * the marks gone stores without any check, and must not enter its own old blocks afterwards: it has been told before
 * the marks go, and then waits for the lock until the log names the page.
 */
static void pages_drop(struct kvs_vm *vm, struct kvs_vcpu *self, struct kvs_ram *ram, uint64_t first, uint64_t last)
{
    bool told = false;
    pthread_mutex_lock(&vm->drop_lock);
    for (uint64_t page = first; page <= last; page++) {
        const uint8_t *host = ram->host + (page << PAGE_SHIFT);
        if (self) page_drop(self, host); /* without marks too: another vCPU may have been quicker */
        if (!atomic_load_explicit(&ram->code_marks[page], memory_order_relaxed)) continue;
        for (uint32_t n = 0; !told && n < atomic_load(&vm->vcpu_count); n++)
            if (vm->vcpus[n] && vm->vcpus[n] != self) vcpu_request(vm->vcpus[n], REQ_CODE_DROP);
        told = true;
        atomic_store(&ram->code_marks[page], 0);
        vm->drop_page[vm->drop_count++ % ARRAY_SIZE(vm->drop_page)] = host;
    }
    pthread_mutex_unlock(&vm->drop_lock);
}

void code_drop_pending(struct kvs_vcpu *c)
{
    struct kvs_vm *vm = c->vm;
    const uint32_t size = ARRAY_SIZE(vm->drop_page);
    pthread_mutex_lock(&vm->drop_lock);
    if (vm->drop_count - c->drop_seen > size) block_cache_flush(c);
    else while (c->drop_seen != vm->drop_count) page_drop(c, vm->drop_page[c->drop_seen++ % size]);
    c->drop_seen = vm->drop_count;
    pthread_mutex_unlock(&vm->drop_lock);
}

void code_store_check(struct kvs_vcpu *c, struct memslot *s, uint8_t *host, uint32_t size)
{
    struct kvs_ram *ram = s->ram;
    uint64_t off = (uint64_t)(host - ram->host), page = off >> PAGE_SHIFT;
    uint64_t marks = atomic_load_explicit(&ram->code_marks[page], memory_order_relaxed);
    if (marks && !(marks & granules((uint32_t)(off & PAGE_MASK), size))) {
        /* Data beside code. A page that keeps being stored to gives up its code. */
        if (++c->near_stores < PAGE_PATIENCE) return;
        c->near_stores = 0;
    }
    pages_drop(c->vm, c, ram, page, page);
    c->code_modified = true;
}

void code_invalidate(struct kvs_vm *vm, struct kvs_ram *ram, uint64_t ram_offset, uint64_t size)
{
    if (!size) return;
    uint64_t first = ram_offset >> PAGE_SHIFT, last = (ram_offset + size - 1) >> PAGE_SHIFT;
    bool any = false;
    for (uint64_t page = first; page <= last && !any; page++)
        any = atomic_load_explicit(&ram->code_marks[page], memory_order_relaxed) != 0;
    if (any) pages_drop(vm, NULL, ram, first, last);
}

/* ---- building ---- */
static void *arena_alloc(struct kvs_vcpu *c, size_t size)
{
    struct block_cache *bc = c->blocks;
    size = (size + 63) & ~(size_t)63;
    if (bc->used + size > ARENA_SIZE) block_cache_flush(c);
    void *p = bc->arena + bc->used;
    bc->used += size;
    return p;
}

static bool register_block(struct kvs_vcpu *c, struct block *b, const uint8_t *page)
{
    struct block_cache *bc = c->blocks;
    struct code_page *p = page_find(bc, page);
    if (!p) {
        uint32_t generation = bc->generation;
        p = arena_alloc(c, sizeof *p);
        if (bc->generation != generation) return false; /* the flush took the block with it */
        uint32_t h = page_hash(page);
        *p = (struct code_page){ .hash_next = bc->pages[h], .host = page };
        bc->pages[h] = p;
    }
    b->page_next = p->blocks;
    p->blocks = b;
    return true;
}

/* What the bytes at the start of a block give: instructions into out[], bytes consumed in *bytes. */
struct build {
    struct kvs_insn insn[MAX_INSNS + 1];
    uint32_t slots, guest, bytes;
    uint32_t looked_at; /* bytes of this page that decoding depended on; bytes or more */
    uint32_t room;      /* to the limit of CS, where an instruction does not fit into it; else 0 */
    bool ended, crosses, raises;
    uint8_t code[MAX_BYTES]; /* of an instruction that crosses pages */
};

static void add_raiser(struct build *bd, kvs_handler fn, uint16_t off, uint32_t since)
{
    struct kvs_insn *o = &bd->insn[bd->slots++];
    memset(o, 0, sizeof *o);
    o->fn = fn;
    o->off = off;
    o->since = (uint8_t)since;
    bd->guest++;
    bd->ended = bd->raises = true;
}

static int build_block(struct kvs_vcpu *c, const uint8_t *host, uint64_t rip, uint16_t off, uint32_t max, struct build *bd)
{
    uint32_t mode = c->mode, bits = (mode & MODE_SIZE) == MODE_64 ? 64 : (mode & MODE_SIZE) == MODE_32 ? 32 : 16;
    bool protected_mode = mode & MODE_PROTECTED;
    uint32_t left = PAGE_SIZE - off, pos = 0, since = 0;
    uint64_t limit_left = UINT64_MAX;
    if (bits != 64 && !(mode & MODE_CSFLAT)) limit_left = (uint64_t)c->seg[SEG_CS].limit - rip + 1; /* rip checked */
    struct decoded d, next;
    bd->slots = bd->guest = bd->room = 0;
    bd->ended = bd->crosses = bd->raises = false;

    while (!bd->ended && bd->guest < max && bd->slots < MAX_INSNS - 1) {
        uint8_t joined[MAX_BYTES];
        const uint8_t *p = host + pos;
        uint32_t avail = left - pos;
        int r = decode(p, avail, bits, protected_mode, c->cpuid_features, &d);
        if (r == DECODE_MORE) {
            if (bd->guest) break; /* gets a block of its own */
            if (avail >= limit_left) {
                bd->room = (uint32_t)limit_left;
                add_raiser(bd, op_gp0, (uint16_t)(off + pos), since);
                break;
            }
            /* The instruction goes on in the next page. */
            uint64_t la = (bits == 64 ? rip : (uint32_t)(c->seg[SEG_CS].base + rip)) + avail;
            struct kvs_ram *ram2;
            int st;
            if (bits != 64) la = (uint32_t)la;
            const uint8_t *tail = mmu_fetch(c, la, &ram2, &st);
            if (!tail) return st;
            uint32_t n = MAX_BYTES - avail;
            memcpy(joined, p, avail);
            memcpy(joined + avail, tail, n);
            r = decode(joined, sizeof joined, bits, protected_mode, c->cpuid_features, &d);
            bd->crosses = true;
            memcpy(bd->code, joined, sizeof bd->code);
        }
        uint32_t length = r == DECODE_OK ? d.length : 1;
        if (r == DECODE_LONG || (uint64_t)pos + length > limit_left) {
            if (r != DECODE_LONG) bd->room = (uint32_t)limit_left;
            add_raiser(bd, op_gp0, (uint16_t)(off + pos), since);
            break;
        }
        if (r != DECODE_OK) {
            add_raiser(bd, op_ud, (uint16_t)(off + pos), since);
            bd->bytes = pos + 1;
            break;
        }
        struct kvs_insn *o = &bd->insn[bd->slots++];
        lower(c, &d, mode, (uint16_t)(off + pos), o);
        o->since = (uint8_t)since;
        pos += d.length;
        since++;
        bd->guest++;
        uint32_t cls = isa_op[d.op].cls;
        if (cls == JCC) {
            o->since = (uint8_t)since;
            since = 0;
        } else if (d.attr & A_END) {
            bd->ended = true;
            if (d.attr & A_BRANCH) {
                o->since = (uint8_t)since;
                since = 0;
            }
        } else if ((d.op == OP_cmp || d.op == OP_test) && !d.is_mem && bd->guest < max && !bd->crosses && pos < left &&
                   decode(host + pos, left - pos, bits, protected_mode, c->cpuid_features, &next) == DECODE_OK &&
                   (uint64_t)pos + next.length <= limit_left && lower_fused(&d, &next, mode, o)) {
            pos += next.length;
            since++;
            bd->guest++;
            o->since = (uint8_t)since;
            since = 0;
        }
        if (bd->crosses) break;
    }
    /* Wherever straight flow leaves the block. */
    struct kvs_insn *o = &bd->insn[bd->slots++];
    memset(o, 0, sizeof *o);
    o->fn = op_block_end;
    o->off = (uint16_t)(off + pos);
    o->since = (uint8_t)since;
    o->osize = (uint8_t)(bits == 64 ? 8 : 4);
    if (!bd->bytes || pos > bd->bytes) bd->bytes = pos ? pos : 1;
    /* What is no instruction here may be one with other bytes behind it. */
    bd->looked_at = bd->raises ? (uint32_t)min_u64(pos + MAX_BYTES, left) : (uint32_t)min_u64(bd->bytes, left);
    return ST_OK;
}

struct block *block_peek(const struct kvs_vcpu *c, const uint8_t *host, uint32_t mode)
{
    struct block *b = c->blocks->hash[block_hash(host, mode)];
    while (b && (b->host != host || b->mode != mode)) b = b->hash_next;
    return b;
}

struct block *block_find(struct kvs_vcpu *c, uint32_t max, int *st)
{
    bool code64 = is_code64(c);
    uint64_t rip = c->rip, la = code64 ? rip : (uint32_t)(c->seg[SEG_CS].base + rip);
    *st = ST_FAULT;
    if (code64) {
        if (!is_canonical(c, rip)) {
            raise_gp(c, 0);
            return NULL;
        }
    } else if (rip > c->seg[SEG_CS].limit) {
        raise_gp(c, 0);
        return NULL;
    }
    struct kvs_ram *ram;
    uint16_t off = la & PAGE_MASK;
    uint32_t mode = c->mode;
restart:;
    const uint8_t *host = mmu_fetch(c, la, &ram, st);
    if (!host) return NULL;

    struct block_cache *bc = c->blocks;
    if (max == 0) {
        for (struct block *b = bc->hash[block_hash(host, mode)]; b; b = b->hash_next) {
            if (b->host != host || b->mode != mode) continue;
            if (b->crosses) {
                /* Not marked in its second page, which may also be another one now: compare. */
                struct kvs_ram *ram2;
                uint64_t tail = (la | PAGE_MASK) + 1;
                uint32_t head = PAGE_SIZE - off, end = b->insn[0].len ? b->insn[0].len : MAX_BYTES; /* 0: it raises */
                const uint8_t *second = mmu_fetch(c, code64 ? tail : (uint32_t)tail, &ram2, st);
                if (!second) return NULL;
                if (memcmp(second, b->code + head, end - head)) continue;
            }
            /* Code segments with a limit: only blocks that end by it remember it. */
            if (!code64 && !(mode & MODE_CSFLAT)) {
                const uint64_t room = c->seg[SEG_CS].limit - rip + 1;
                if (b->room ? b->room != room : b->bytes > room) continue;
            }
            c->gpr[GPR_RIPBASE] = rip - off;
            return b;
        }
    }

    /* Another vCPU or the host may be storing here: decode from a copy, mark, and see whether the bytes stayed. */
    uint8_t copy[MAX_BYTES * MAX_INSNS];
    if (!max) memcpy(copy, host, min_u64(sizeof copy, PAGE_SIZE - off));
    struct build bd;
    bd.bytes = 0;
    int r = build_block(c, max ? host : copy, rip, off, max ? max : MAX_INSNS - 1, &bd);
    if (r != ST_OK) {
        *st = r;
        return NULL;
    }
    if (!max && (!mark_code(c, ram, host, bd.looked_at) || memcmp(copy, host, bd.looked_at))) {
        if (!atomic_load(&c->requests)) goto restart;
        *st = ST_AGAIN; /* whoever stores here may go on for ever: requests come first */
        return NULL;
    }
    size_t size = sizeof(struct block) + bd.slots * sizeof(struct kvs_insn);
    struct block *b = max ? (struct block *)c->step_block : arena_alloc(c, size);
    memset(b, 0, sizeof *b);
    b->host = host;
    b->crosses = bd.crosses;
    memcpy(b->code, bd.code, sizeof b->code);
    b->mode = mode;
    b->off = off;
    b->bytes = (uint16_t)bd.bytes;
    b->room = (uint16_t)bd.room;
    b->n = (uint16_t)bd.guest;
    memcpy(b->insn, bd.insn, bd.slots * sizeof(struct kvs_insn));
    c->gpr[GPR_RIPBASE] = rip - off;
    if (max) return b;
    c->stats.blocks_decoded++;
    if (!register_block(c, b, page_of(host))) return block_find(c, 0, st);
    uint32_t h = block_hash(host, mode);
    b->hash_next = bc->hash[h];
    bc->hash[h] = b;
    if (c->jit) jit_watch(c, b);
    return b;
}
