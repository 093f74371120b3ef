/*
 * The page walk against a model written straight from the manual: every combination of permission
 * bits, access and control bits, then random entries with reserved bits in every mode.
 */
#include "../src/sys/sys.h"
#include "engine.h"
#include "harness.h"

#define RAM_SIZE (16u << 20)
enum { TABLE4 = 0x10000, TABLE3 = 0x11000, TABLE2 = 0x12000, TABLE1 = 0x13000, PDPT = 0x14020, TABLE5 = 0x15000 };
enum { MODE_LONG_, MODE_PAE_, MODE_LEGACY_, MODE_LONG5_ };

static struct kvs_vm *vm;
static struct kvs_vcpu *c;
static uint8_t *ram;

struct outcome { bool fault; uint32_t error; uint64_t gpa, entry[6]; bool writable; };
struct query { int mode, access; bool user, ac; uint64_t la, entry[6]; /* [5] or [4] down to [1]; [3] in PAE mode: PDPTE */ };

static bool bit(uint64_t v, int n) { return v >> n & 1; }
static uint64_t span(int high, int low) { return ((high == 63 ? 0 : 1ull << (high + 1)) - (1ull << low)); }

static bool is_long(int mode) { return mode == MODE_LONG_ || mode == MODE_LONG5_; }
static int top_level(int mode) { return mode == MODE_LONG5_ ? 5 : mode == MODE_LONG_ ? 4 : 2; }

static bool has_reserved(const struct query *q, int level, uint64_t e)
{
    bool nx_enabled = bit(c->efer, 11), ps = bit(e, 7);
    uint64_t bad = 0;
    if (is_long(q->mode)) {
        bad |= span(51, 46);
        if (level >= 4) bad |= 1 << 7;
        if (level == 3 && !has_feature(c, FEAT_1G)) bad |= 1 << 7;
        if (level == 3 && ps) bad |= span(29, 13);
        if (level == 2 && ps) bad |= span(20, 13);
        if (!nx_enabled) bad |= 1ull << 63;
    } else if (q->mode == MODE_PAE_) {
        bad |= span(62, 46);
        if (level == 2 && ps) bad |= span(20, 13);
        if (!nx_enabled) bad |= 1ull << 63;
    } else if (level == 2 && ps && bit(c->cr4, 4)) {
        bad |= 1 << 21;
    }
    return e & bad;
}

static struct outcome model(const struct query *q)
{
    struct outcome o = { 0 };
    memcpy(o.entry, q->entry, sizeof o.entry);
    bool w = q->access == ACC_W || q->access == ACC_RW, x = q->access == ACC_X;
    bool wp = bit(c->cr0, 16), smep = bit(c->cr4, 20), smap = bit(c->cr4, 21);
    bool nx_enabled = bit(c->efer, 11) && q->mode != MODE_LEGACY_;
    uint32_t base_error = (w ? 2 : 0) | (q->user ? 4 : 0) | (x && (nx_enabled || smep) ? 16 : 0);
    bool all_w = true, all_u = true, any_nx = false;
    int top = top_level(q->mode), leaf = 1;

    if (q->mode == MODE_PAE_ && !bit(q->entry[3], 0)) return o.fault = true, o.error = base_error, o;
    for (int level = top; level >= 1; level--) {
        uint64_t e = q->entry[level];
        if (!bit(e, 0)) return o.fault = true, o.error = base_error, o;
        if (has_reserved(q, level, e)) return o.fault = true, o.error = base_error | 1 | 8, o;
        all_w = all_w && bit(e, 1);
        all_u = all_u && bit(e, 2);
        if (q->mode != MODE_LEGACY_) any_nx = any_nx || bit(e, 63);
        leaf = level;
        if (level == 1 || (level < 4 && bit(e, 7) && (q->mode != MODE_LEGACY_ || bit(c->cr4, 4)))) break;
    }
    /* PKRU: AD in bit 2i, WD in bit 2i + 1 of key i, for data at user-mode addresses, in IA-32e paging. */
    int key = (int)(q->entry[leaf] >> 59 & 15);
    bool keyed = is_long(q->mode) && bit(c->cr4, 22) && all_u, ad = keyed && bit(c->pkru, 2 * key), wd = keyed && bit(c->pkru, 2 * key + 1);
    bool key_read = ad, key_write = ad || (wd && (q->user || wp)), denied = !x && (w ? key_write : key_read);
    bool ok;
    if (q->user) ok = all_u && (!w || all_w) && !(x && any_nx && nx_enabled);
    else if (x) ok = !(any_nx && nx_enabled) && !(smep && all_u);
    else ok = !(smap && all_u && !q->ac) && (!w || all_w || !wp);
    if (!ok || denied) return o.fault = true, o.error = base_error | 1 | (denied ? 32 : 0), o;

    for (int level = top; level >= leaf; level--) o.entry[level] |= 1 << 5;
    if (w) o.entry[leaf] |= 1 << 6;
    uint64_t e = q->entry[leaf];
    if (q->mode == MODE_LEGACY_) {
        if (leaf == 1) o.gpa = (e & span(31, 12)) | (q->la & span(11, 0));
        else o.gpa = (e & span(31, 22)) | (e & span(20, 13)) << 19 | (q->la & span(21, 0));
    } else {
        int shift = leaf == 1 ? 12 : leaf == 2 ? 21 : 30;
        o.gpa = (e & span(45, shift)) | (q->la & span(shift - 1, 0));
    }
    bool may_write = q->user ? all_u && all_w : !(smap && all_u && !q->ac) && (all_w || !wp);
    o.writable = may_write && !key_write && bit(o.entry[leaf], 6);
    return o;
}

static void set_mode(int mode, bool wp, bool smep, bool smap, bool nx, bool pse)
{
    c->cr0 = CR0_PE | CR0_PG | (wp ? CR0_WP : 0);
    c->cr4 = (smep ? CR4_SMEP : 0) | (smap ? CR4_SMAP : 0) | (pse ? CR4_PSE : 0) | (mode != MODE_LEGACY_ ? CR4_PAE : 0);
    if (mode == MODE_LONG5_) c->cr4 |= CR4_LA57;
    c->efer = (nx ? EFER_NX : 0) | (is_long(mode) ? EFER_LME | EFER_LMA : 0);
    c->cr3 = mode == MODE_LONG5_ ? TABLE5 : mode == MODE_LONG_ ? TABLE4 : mode == MODE_PAE_ ? PDPT : TABLE2;
}

static uint8_t *slot_of(const struct query *q, int level)
{
    static const uint32_t table[6] = { 0, TABLE1, TABLE2, TABLE3, TABLE4, TABLE5 };
    if (q->mode == MODE_LEGACY_) return ram + table[level] + 4 * (q->la >> (12 + 10 * (level - 1)) & 1023);
    return ram + table[level] + 8 * (q->la >> (12 + 9 * (level - 1)) & 511);
}

static uint64_t entry_get(const struct query *q, int level)
{
    return q->mode == MODE_LEGACY_ ? ld32(slot_of(q, level)) : ld64(slot_of(q, level));
}

static void entry_put(const struct query *q, int level, uint64_t v)
{
    if (q->mode == MODE_LEGACY_) st32(slot_of(q, level), (uint32_t)v);
    else st64(slot_of(q, level), v);
}

static void run(const struct query *q)
{
    int top = top_level(q->mode);
    for (int level = 1; level <= top; level++) entry_put(q, level, q->entry[level]);
    if (q->mode == MODE_PAE_) c->pdptr[q->la >> 30 & 3] = q->entry[3];
    struct outcome want = model(q);
    struct translation t = { 0 }, p;
    c->exc.pending = false;
    struct outcome seen = want; /* a debugger has every key */
    if (c->pkru) {
        uint32_t pkru = c->pkru;
        c->pkru = 0;
        seen = model(q);
        c->pkru = pkru;
    }
    int probe = mmu_walk(c, q->la, q->access, q->user, q->ac, true, &p);
    CHECK(!c->exc.pending);
    for (int level = 1; level <= top; level++) CHECK_EQ(entry_get(q, level), q->entry[level]);
    int st = mmu_walk(c, q->la, q->access, q->user, q->ac, false, &t);
    bool ok = st == (want.fault ? ST_FAULT : ST_OK) && probe == (seen.fault ? -1 : 0);
    if (want.fault) ok = ok && c->exc.pending && c->exc.vector == EXC_PF && c->exc.error == want.error && c->exc.payload == q->la;
    else ok = ok && t.gpa == want.gpa && p.gpa == want.gpa && t.writable == want.writable;
    CHECK(ok, "mode %d access %d user %d ac %d la %" PRIx64 " entries %" PRIx64 " %" PRIx64 " %" PRIx64 " %" PRIx64
          " cr0 %" PRIx64 " cr4 %" PRIx64 " efer %" PRIx64 ": st %d error %x/%x gpa %" PRIx64 "/%" PRIx64,
          q->mode, q->access, q->user, q->ac, q->la, q->entry[4], q->entry[3], q->entry[2], q->entry[1],
          c->cr0, c->cr4, c->efer, st, c->exc.error, want.error, t.gpa, want.gpa);
    for (int level = 1; level <= top; level++) CHECK_EQ(entry_get(q, level), want.entry[level]);
}

/* P, W, U, A, D and NX of the leaf, P, W, U, NX of the level above. */
static void test_matrix(int mode)
{
    for (uint32_t control = 0; control < 32; control++) {
        set_mode(mode, control & 1, control & 2, control & 4, control & 8, control & 16);
        for (uint32_t bits = 0; bits < 1024; bits++) {
            struct query q = { .mode = mode, .la = 0x40201123 };
            uint64_t nx = mode == MODE_LEGACY_ ? 0 : 1ull << 63;
            q.entry[5] = TABLE4 | 0x27;
            q.entry[4] = TABLE3 | 0x27;
            q.entry[3] = TABLE2 | (mode == MODE_PAE_ ? 1 : 0x27);
            q.entry[2] = TABLE1 | (bits & 1) | (bits & 2) | (bits & 4) | (bits & 8 ? nx : 0);
            q.entry[1] = 0x555000 | (bits >> 4 & 7) | (bits & 128 ? 0x20 : 0) | (bits & 256 ? 0x40 : 0) | (bits & 512 ? nx : 0);
            for (int access = ACC_R; access <= ACC_RW; access++)
                for (int who = 0; who < 4; who++) {
                    q.access = access;
                    q.user = who & 1;
                    q.ac = who & 2;
                    run(&q);
                }
        }
    }
}

/* Every permission of every key against every access, with WP and SMAP. */
static void test_keys(int mode)
{
    for (uint32_t control = 0; control < 8; control++) {
        set_mode(mode, control & 1, false, control & 2, true, false);
        if (control & 4) c->cr4 |= CR4_PKE;
        for (uint32_t bits = 0; bits < 64; bits++) {
            struct query q = { .mode = mode, .la = 0x40201123 };
            q.entry[5] = TABLE4 | 0x27;
            q.entry[4] = TABLE3 | 0x27;
            q.entry[3] = TABLE2 | (mode == MODE_PAE_ ? 1 : 0x27);
            q.entry[2] = TABLE1 | 3 | (bits & 4);
            q.entry[1] = 0x555000 | 0x65 | (bits & 2);
            if (is_long(mode)) q.entry[2] |= 0x5ull << 59, q.entry[1] |= 0xbull << 59; /* the leaf's key counts */
            c->pkru = (bits >> 3 & 3) << 22 | (bits & 1 ? 3 << 10 : 0);
            for (int access = ACC_R; access <= ACC_RW; access++)
                for (int who = 0; who < 4; who++) {
                    q.access = access;
                    q.user = who & 1;
                    q.ac = who & 2;
                    run(&q);
                }
        }
    }
    c->pkru = 0;
}

static uint64_t random_entry(uint64_t *seed, uint64_t next, bool wide)
{
    uint64_t r = random_next(seed), e = next | 7;
    bool large = (r >> 10) % 3 == 0;
    if (large) e = (e & 0xfff) | 0x80;
    if (r % 8 == 0) e ^= 1;
    if (r >> 3 & 1) e ^= 2 * (r >> 4 & 1);
    if (r >> 5 & 1) e ^= 4 * (r >> 6 & 1);
    e |= (r >> 7 & 1) << 5 | (r >> 8 & 1) << 6 | (r >> 9 & 1) << 8;
    if ((r >> 12) % 4 == 0) e |= 1ull << (random_next(seed) % (wide ? 64 : 32));
    if ((r >> 14) % 8 == 0 && wide) e |= 1ull << 63;
    if ((r >> 17) % 4 == 0) e ^= random_next(seed) & (wide ? span(45, 30) : span(31, large ? 22 : 13)); /* where it leads */
    return e;
}

static void test_random(void)
{
    uint64_t seed = 0x1234567;
    for (uint32_t n = 0; n < 300000; n++) {
        uint64_t r = random_next(&seed);
        int mode = (int)(r % 4);
        set_mode(mode, r & 0x100, r & 0x200, r & 0x400, r & 0x800, r & 0x1000);
        if (r & 0x4000) c->cr4 |= CR4_PKE;
        c->pkru = (uint32_t)random_next(&seed);
        c->cpuid_features = r & 0x2000 ? BIT(FEAT_1G) : 0;
        struct query q = { .mode = mode, .access = (int)(r >> 16 & 3), .user = r & 0x100000, .ac = r & 0x200000 };
        q.la = random_next(&seed);
        q.la = is_long(mode) ? sign_extend(q.la, mode == MODE_LONG_ ? 48 : 57) : (uint32_t)q.la;
        q.entry[5] = random_entry(&seed, TABLE4, true);
        if (mode == MODE_LONG5_) q.entry[5] = (q.entry[5] & ~span(45, 12)) | TABLE4;
        bool wide = mode != MODE_LEGACY_;
        q.entry[4] = random_entry(&seed, TABLE3, wide);
        q.entry[3] = mode == MODE_PAE_ ? TABLE2 | ((r >> 22) % 8 != 0) : random_entry(&seed, TABLE2, wide);
        q.entry[2] = random_entry(&seed, TABLE1, wide);
        q.entry[1] = random_entry(&seed, 0x345000, wide);
        /* Entries lead to the next table or are large: keep the model's fixed tables. */
        if (is_long(mode)) q.entry[4] = (q.entry[4] & ~span(45, 12)) | TABLE3;
        if (is_long(mode) && !(q.entry[3] & 0x80)) q.entry[3] = (q.entry[3] & ~span(45, 12)) | TABLE2;
        if (!(q.entry[2] & 0x80) || (!wide && !(c->cr4 & CR4_PSE))) q.entry[2] = (q.entry[2] & ~span(wide ? 45 : 31, 12)) | TABLE1;
        run(&q);
    }
    c->cpuid_features = 0;
    c->pkru = 0;
}

static void test_tables_elsewhere(void)
{
    struct translation t;
    set_mode(MODE_LONG_, true, false, false, true, false);
    /* A table outside memory is not present. */
    c->cr3 = 0x20000000;
    c->exc.pending = false;
    CHECK_EQ(mmu_walk(c, 0x1000, ACC_W, true, false, false, &t), ST_FAULT);
    CHECK_EQ(c->exc.error, PF_W | PF_U);
    /* A table in ROM gives a translation and keeps its A and D bits. */
    c->cr3 = TABLE4;
    st64(ram + TABLE4, TABLE3 | 7);
    st64(ram + TABLE3, TABLE2 | 7);
    st64(ram + TABLE2, 0x1000000 | 7); /* the ROM slot */
    st64(ram + RAM_SIZE + 8, 0x5000 | 7);
    CHECK_EQ(mmu_walk(c, 0x1234, ACC_W, false, false, false, &t), ST_OK);
    CHECK_EQ(t.gpa, 0x5234);
    CHECK(t.writable);
    CHECK_EQ(ld64(ram + RAM_SIZE + 8), 0x5000 | 7);
    CHECK_EQ(ld64(ram + TABLE2), 0x1000000 | 0x27);
    /* A20 masks pages and tables. */
    atomic_store(&vm->a20_mask, ~BIT(20));
    st64(ram + TABLE2, TABLE1 | BIT(20) | 7);
    st64(ram + TABLE1 + 8, 0x105000 | 7);
    CHECK_EQ(mmu_walk(c, 0x1234, ACC_R, false, false, false, &t), ST_OK);
    CHECK_EQ(t.gpa, 0x5234);
    c->cr0 = CR0_PE;
    CHECK_EQ(mmu_walk(c, 0x1ffff0, ACC_R, false, false, false, &t), ST_OK);
    CHECK_EQ(t.gpa, 0xffff0);
    atomic_store(&vm->a20_mask, ~0ull);
    CHECK_EQ(mmu_walk(c, 0x1ffff0, ACC_R, false, false, false, &t), ST_OK);
    CHECK_EQ(t.gpa, 0x1ffff0);
}

static void test_pdptrs(void)
{
    set_mode(MODE_PAE_, true, false, false, false, false);
    for (int n = 0; n < 4; n++) st64(ram + PDPT + 8 * n, TABLE2 | 1 | (uint64_t)n << 9);
    CHECK_EQ(mmu_load_pdptrs(c, PDPT | 0x18), 0); /* bits 3 and 4 are PWT and PCD */
    CHECK_EQ(c->pdptr[3], TABLE2 | 1 | 3 << 9);
    for (int b = 1; b < 64; b++) {
        bool reserved = b == 1 || b == 2 || (b >= 5 && b <= 8) || b >= 46;
        st64(ram + PDPT + 16, (TABLE2 | 1) ^ BIT(b));
        uint64_t before = c->pdptr[2];
        CHECK_EQ(mmu_load_pdptrs(c, PDPT), reserved ? -1 : 0);
        if (reserved) CHECK_EQ(c->pdptr[2], before);
        st64(ram + PDPT + 16, BIT(b)); /* not present: nothing is reserved */
        CHECK_EQ(mmu_load_pdptrs(c, PDPT), 0);
    }
    CHECK_EQ(mmu_load_pdptrs(c, 0x70000000), -1);
}

int main(void)
{
    struct kvs_vm_config config = { .size = sizeof config, .clock_mode = KVS_CLOCK_VIRTUAL, TEST_ENGINE };
    struct kvs_ram *r;
    if (kvs_vm_create(&config, &vm) || kvs_vcpu_create(vm, 0, &c) || kvs_ram_create(RAM_SIZE + PAGE_SIZE, &r)) return 1;
    ram = kvs_ram_address(r);
    struct kvs_userspace_memory_region low = { .memory_size = RAM_SIZE };
    struct kvs_userspace_memory_region rom = { .slot = 1, .flags = KVS_MEM_READONLY, .guest_phys_addr = RAM_SIZE, .memory_size = PAGE_SIZE };
    CHECK_EQ(kvs_memslot_set(vm, &low, r, 0), 0);
    CHECK_EQ(kvs_memslot_set(vm, &rom, r, RAM_SIZE), 0);
    c->cpuid_features = 0;
    test_matrix(MODE_LONG_);
    test_matrix(MODE_PAE_);
    test_matrix(MODE_LEGACY_);
    test_matrix(MODE_LONG5_);
    test_keys(MODE_LONG_);
    test_keys(MODE_LONG5_);
    test_keys(MODE_PAE_);
    test_keys(MODE_LEGACY_);
    test_random();
    test_tables_elsewhere();
    test_pdptrs();
    kvs_vcpu_destroy(c);
    kvs_vm_destroy(vm);
    kvs_ram_release(r);
    return checks_report();
}
