/*
 * Random instruction streams in every mode, through the public functions only: real, virtual-8086,
 * protected 16- and 32-bit, compatibility and 64-bit code at CPL 0 and 3, over page tables, descriptor
 * tables and code that the streams themselves may overwrite, with MMIO holes, a read-only slot and a
 * page that appears at two guest physical addresses. Exits are answered at random.
 */
#include "fuzz.h"

#include <pthread.h>
#include <unistd.h>

#define KIB(n) ((n) * 1024u)
#define RAM_SIZE KIB(256)
#define ALIAS 0x100000u  /* RAM from 128 KiB on, once more */
#define ROM 0x120000u
#define ROM_SIZE KIB(16)
#define HOLE 0x200000u

/* Inside RAM; the real-mode vectors lie at 0. */
enum { PML4 = 0x1000, PDPT = 0x2000, PD = 0x3000, PT = 0x4000, PML5 = 0x5000, PAE_PDPT = 0x5800, PD32 = 0x6000, PT32 = 0x7000, GDT = 0x8000,
       IDT32 = 0x9000, IDT64 = 0xa000, TSS32 = 0xb000, TSS64 = 0xb800, TSS16 = 0xbc00, LDT = 0xbe00, STACKS = 0xc000, CODE = 0x10000 };
#define HIGH_HALF 0xffff800000000000ull

/* Selectors. */
enum { S_CODE16 = 0x08, S_DATA16 = 0x10, S_CODE32 = 0x18, S_DATA32 = 0x20, S_CODE64 = 0x28, S_UCODE16 = 0x30, S_UDATA16 = 0x38,
       S_UCODE32 = 0x40, S_UDATA32 = 0x48, S_UCODE64 = 0x50, S_CONFORMING = 0x58, S_EXPANDDOWN = 0x60, S_TSS32 = 0x68 /* two */,
       S_TSS16 = 0x78, S_LDT = 0x80 /* two */, S_CALL32 = 0x90, S_CALL16 = 0x98, S_TASK = 0xa0, S_CALL64 = 0xa8 /* two */,
       S_ODD = 0xb8, S_END = 0xf8 };

static struct machine {
    struct kvs_vm *vm;
    struct kvs_vcpu *c;
    struct kvs_ram *ram, *rom;
    uint8_t *m;
    struct kvs_run *run;
    bool irqchip;
    uint16_t system_rows[ROW_COUNT], system_count;
    uint32_t msrs[256], msr_count;
    uint64_t tried, refused, cr4;
    bool lam;
    bool smm, a20_off;
    uint32_t engine;   /* KVS_ENGINE_... */
    uint32_t patience; /* with one case, in microseconds */
    bool kicked;       /* the last case took too long */
} g = { .patience = 300 };

static void put64(uint32_t at, uint64_t v) { memcpy(g.m + at, &v, 8); }
static void put32(uint32_t at, uint32_t v) { memcpy(g.m + at, &v, 4); }

static uint64_t code_address(struct rng *r) { return CODE + (rnd(r) & 0x2fff0); }
static uint64_t any_address(struct rng *r)
{
    switch (rnd_below(r, 12)) {
    case 0: return rnd(r);
    case 1: return HOLE + (rnd(r) & 0xffff);
    case 2: return ALIAS + (rnd(r) & 0x1ffff);
    case 3: return ROM + (rnd(r) & (ROM_SIZE - 1));
    case 4: return HIGH_HALF + (rnd(r) & 0x3ffff);
    case 5: return 0xfee00000 + (rnd(r) & 0xfff);
    case 6: return (rnd(r) & 0x3f) << 12 | (0xff8 + (rnd(r) & 15));
    case 7: return rnd_value(r);
    default: return rnd(r) & (RAM_SIZE - 1);
    }
}

/*
 * A fault whose handler faults never retires an instruction and would go on for ever, as on silicon:
 * a second thread kicks a vCPU that has been in one case for too long.
 */
static struct { pthread_mutex_t lock; struct kvs_vcpu *c; uint64_t number; bool kicked; } watched = { PTHREAD_MUTEX_INITIALIZER, NULL, 0, false };

static void *watchdog(void *unused)
{
    uint64_t last = 0;
    for (;;) {
        usleep(g.patience);
        pthread_mutex_lock(&watched.lock);
        if (watched.c && watched.number == last) {
            watched.kicked = true;
            kvs_vcpu_kick(watched.c);
        }
        last = watched.number;
        pthread_mutex_unlock(&watched.lock);
    }
    return unused;
}
static void watch(struct kvs_vcpu *c)
{
    static bool started;
    pthread_t thread;
    if (!started) started = pthread_create(&thread, NULL, watchdog, NULL) == 0;
    pthread_mutex_lock(&watched.lock);
    watched.c = c;
    watched.number++;
    watched.kicked = false;
    pthread_mutex_unlock(&watched.lock);
}

/* ---- tables ---- */
static uint64_t descriptor(uint32_t base, uint32_t limit, uint32_t type, uint32_t dpl, uint32_t flags)
{
    return (limit & 0xffff) | (uint64_t)(base & 0xffffff) << 16 | (uint64_t)(type | dpl << 5 | 0x80) << 40 |
           (uint64_t)(limit >> 16 & 15) << 48 | (uint64_t)flags << 52 | (uint64_t)(base >> 24) << 56;
}
static uint64_t gate(uint64_t target, uint32_t sel, uint32_t type, uint32_t dpl, uint32_t count)
{
    return (target & 0xffff) | (uint64_t)sel << 16 | (uint64_t)count << 32 | (uint64_t)(type | dpl << 5 | 0x80) << 40 | (target >> 16 & 0xffff) << 48;
}

static uint64_t pte(struct rng *r, uint64_t pa, bool wide)
{
    uint64_t v = pa | 7;
    uint32_t x = (uint32_t)rnd(r);
    if (!(x & 31)) v &= ~1ull;
    if (!(x >> 5 & 15)) v &= ~2ull;
    if (!(x >> 9 & 15)) v &= ~4ull;
    if (x >> 13 & 1) v |= 0x60;
    if (!(x >> 14 & 7)) v |= 0x100;
    if (wide && !(x >> 17 & 15)) v |= 1ull << 63;
    if (wide && x >> 28 == 1) v |= (uint64_t)(rnd(r) & 15) << 59; /* a protection key */
    if (wide && !(x >> 21 & 255)) v |= 1ull << (36 + (x >> 29));
    return v;
}

static void build_paging(struct rng *r)
{
    memset(g.m + PML4, 0, 0x7000);
    put64(PML4, PDPT | 7);
    put64(PML4 + 8 * 256, PDPT | 7);
    put64(PML4 + 8 * 255, rnd(r) & 0x3f027);
    put64(PML5, PML4 | 7);
    put64(PML5 + 8 * 511, PML4 | 7);
    put64(PML5 + 8 * 2, rnd(r) & 0x3f067);
    put64(PDPT, PD | 7);
    put64(PDPT + 8, pte(r, 0, true) | 0x80);
    put64(PD, PT | 7);
    put64(PD + 8, pte(r, 0x200000, true) | 0x80); /* the hole, by a large page */
    put64(PD + 16, pte(r, 0, true) | 0x80);
    put64(PD + 24, PT | 7);
    for (uint32_t i = 0; i < 4; i++) put64(PAE_PDPT + 8 * i, i < 2 ? PD | 1 : rnd_one(r, 8) ? PD | 1 : 0);
    put32(PD32, PT32 | 7);
    put32(PD32 + 4, 0x00000087); /* 4 MiB page */
    put32(PD32 + 8, PT32 | 7);
    for (uint32_t i = 0; i < 512; i++) {
        uint64_t pa = i * 0x1000;
        put64(PT + 8 * i, pte(r, pa, true));
        put32(PT32 + 4 * i, (uint32_t)pte(r, pa, false));
        put32(PT32 + 4 * (i + 512), (uint32_t)pte(r, rnd(r) & 0x3ff000, false));
    }
    /* The tables that a stream needs to get anywhere. */
    for (uint32_t p = 0x8; p < 0x10; p++) { put64(PT + 8 * p, p << 12 | 3); put32(PT32 + 4 * p, p << 12 | 3); }
}

static void build_descriptors(struct rng *r)
{
    uint64_t *d = (uint64_t *)(g.m + GDT);
    uint32_t base = rnd_one(r, 4) ? (uint32_t)rnd_below(r, 0x8000) : 0;
    memset(d, 0, 0x100);
#define D(sel) d[(sel) / 8]
    D(S_CODE16) = descriptor(base, 0xffff, 0x1b, 0, 0);
    D(S_DATA16) = descriptor(base, 0xffff, 0x13, 0, 0);
    D(S_CODE32) = descriptor(0, 0xfffff, 0x1b, 0, 0xc);
    D(S_DATA32) = descriptor(0, 0xfffff, 0x13, 0, 0xc);
    D(S_CODE64) = descriptor(0, 0xfffff, 0x1b, 0, 0xa);
    D(S_UCODE16) = descriptor(base, 0xffff, 0x1a, 3, 0);
    D(S_UDATA16) = descriptor(base, 0xffff, 0x12, 3, 0);
    D(S_UCODE32) = descriptor(0, 0xfffff, 0x1b, 3, 0xc);
    D(S_UDATA32) = descriptor(0, 0xfffff, 0x13, 3, 0xc);
    D(S_UCODE64) = descriptor(0, 0xfffff, 0x1b, 3, 0xa);
    D(S_CONFORMING) = descriptor(0, 0xfffff, 0x1f, 0, 0xc);
    D(S_EXPANDDOWN) = descriptor(0, (uint32_t)rnd(r) & 0xfffff, 0x16, rnd_below(r, 4), (uint32_t)rnd(r) & 0xc);
    D(S_TSS32) = descriptor(TSS32, 0x7ff, 9, 0, 0);
    D(S_TSS16) = descriptor(TSS16, 0x2b, rnd_one(r, 2) ? 1 : 3, 0, 0);
    D(S_LDT) = descriptor(LDT, 0xff, 2, 0, 0);
    D(S_CALL32) = gate(code_address(r), S_CODE32, 12, 3, rnd_below(r, 32));
    D(S_CALL16) = gate(code_address(r) & 0xffff, S_CODE16, 4, 3, rnd_below(r, 32));
    D(S_TASK) = gate(0, rnd_one(r, 2) ? S_TSS16 : S_TSS32, 5, 3, 0);
    D(S_CALL64) = gate(code_address(r), S_CODE64, 12, 3, 0);
    for (uint32_t s = S_ODD; s < S_END; s += 8) D(s) = rnd(r);
    for (uint32_t i = 0; i < 16; i++) put64(LDT + 8 * i, rnd_one(r, 2) ? d[rnd_below(r, 24)] : rnd(r));
#undef D
    for (uint32_t v = 0; v < 256; v++) {
        static const uint8_t types[] = { 14, 14, 14, 15, 6, 7, 5, 12 };
        uint32_t dpl = rnd_one(r, 2) ? 3 : 0, type = types[rnd_below(r, 8)];
        put64(IDT32 + 8 * v, type == 5 ? gate(0, S_TSS16, 5, dpl, 0)
                                       : gate(code_address(r), rnd_one(r, 16) ? S_CONFORMING : type < 8 ? S_CODE16 : S_CODE32, type, dpl, 0));
        put64(IDT64 + 16 * v, gate(code_address(r), rnd_one(r, 32) ? S_CODE32 : S_CODE64, rnd_one(r, 2) ? 14 : 15, dpl, rnd_below(r, 8)));
        put64(IDT64 + 16 * v + 8, rnd_one(r, 8) ? HIGH_HALF >> 32 : 0);
        put32(4 * v, (uint32_t)(code_address(r) & 0xffff) | (uint32_t)(rnd_below(r, 4) << 28));
    }
    for (uint32_t i = 0; i < 0x800; i += 8) put64(TSS32 + i, rnd_one(r, 2) ? ~0ull : 0);
    for (uint32_t i = 0; i < 3; i++) { put32(TSS32 + 4 + 8 * i, STACKS + 0x1000 * (i + 1)); put32(TSS32 + 8 + 8 * i, i == 0 ? S_DATA32 : (uint32_t)rnd(r) & 0xff); }
    put32(TSS32 + 0x64, 0x00680000);
    put32(TSS64, 0);
    for (uint32_t i = 0; i < 3; i++) put64(TSS64 + 4 + 8 * i, STACKS + 0x1000 * (i + 1));
    for (uint32_t i = 0; i < 7; i++) put64(TSS64 + 0x24 + 8 * i, rnd_one(r, 8) ? any_address(r) : STACKS + 0x3000 + 0x100 * i);
    put32(TSS64 + 0x64, 0x00680000);
    for (uint32_t i = 0; i < 0x2c; i += 2) put32(TSS16 + i, (uint32_t)rnd(r) & 0xf8);
}

/* ---- code ---- */
static void write_code(struct rng *r, uint32_t at, uint32_t bytes, uint32_t bits)
{
    uint32_t end = at + bytes;
    while (at < end) {
        struct encode_request q = { .bits = bits, .width = 8u << rnd_below(r, 4), .memory = rnd_one(r, 2), .plain = rnd_one(r, 2),
            .lock = rnd_one(r, 32), .rep = rnd_one(r, 3), .wild = rnd_one(r, 4), .ip = at, .target = rnd_one(r, 8) ? HOLE + rnd_below(r, 256) : rnd(r) & 0x3ffff };
        uint8_t e[16];
        q.row = rnd_one(r, 2) ? g.system_rows[rnd_below(r, g.system_count)] : 1 + rnd_below(r, ROW_COUNT - 1);
        uint32_t n = encode_row(r, &q, e);
        if (rnd_one(r, 12)) e[rnd_below(r, n)] = (uint8_t)rnd(r);
        if (rnd_one(r, 24)) { st64(e, rnd(r)); n = 1 + rnd_below(r, 8); }
        memcpy(g.m + (at & (RAM_SIZE - 1)), e, at % RAM_SIZE + n > RAM_SIZE ? 0 : n);
        at += n;
    }
}

/* Loops and skips of instructions that seldom fault: what a translator makes traces of. */
static void write_loops(struct rng *r, uint32_t at, uint32_t bytes, uint32_t bits)
{
    uint32_t start[64], starts = 0, end = at + bytes, patch = 0;
    if (at % 0x1000 + bytes + 32 > 0x1000) at -= bytes + 32; /* in one page: wherever RIP is, it finds code */
    end = at + bytes;
    while (at < end && starts < ARRAY_SIZE(start)) {
        uint8_t e[16];
        uint32_t n;
        start[starts++] = at;
        if (!rnd_one(r, 5)) {
            struct encode_request q = { .bits = bits, .width = 8u << rnd_below(r, 4), .memory = rnd_one(r, 4), .plain = true, .ip = at, .target = rnd(r) & 0x3ffff };
            do q.row = (uint16_t)(1 + rnd_below(r, ROW_COUNT - 1));
            while (row_forms[q.row].attr & (A_SYS | A_PRIV | A_IO | A_END | A_BRANCH));
            n = encode_row(r, &q, e);
        } else if (rnd_one(r, 3)) { /* JMP or Jcc over what follows */
            e[0] = rnd_one(r, 3) ? 0xeb : (uint8_t)(0x70 | rnd_below(r, 16));
            e[1] = 0;
            n = 2;
        } else { /* Jcc or JMP back */
            e[0] = rnd_one(r, 6) ? 0xeb : (uint8_t)(0x70 | rnd_below(r, 16));
            uint32_t to = start[rnd_one(r, 2) ? 0 : rnd_below(r, starts)];
            e[1] = (uint8_t)(to - (at + 2));
            n = at + 2 - to <= 128 ? 2 : 0;
        }
        memcpy(g.m + at, e, n);
        if (patch) g.m[patch - 1] = (uint8_t)(at + n - patch);
        patch = n == 2 && e[1] == 0 && (e[0] == 0xeb || e[0] >> 4 == 7) ? at + n : 0;
        at += n;
    }
}

/* ---- state ---- */
static struct kvs_segment seg(uint16_t sel, uint32_t base, uint32_t limit, uint8_t type, uint8_t dpl, uint8_t db, uint8_t l)
{
    return (struct kvs_segment){ .base = base, .limit = limit, .selector = sel, .type = type, .present = 1, .dpl = dpl, .db = db, .s = 1,
                                 .l = l, .g = limit > 0xfffff };
}

enum { REAL, V86, PROT16, PROT32, COMPAT, LONG, MODES };

static uint32_t set_state(struct rng *r, uint32_t mode, uint64_t *rip_out)
{
    uint32_t cpl = mode == REAL ? 0 : mode == V86 ? 3 : rnd_one(r, 2) ? 3 : 0, bits = mode == LONG ? 64 : mode == PROT32 || mode == COMPAT ? 32 : 16;
    bool lm = mode >= COMPAT, paging = lm || (mode != REAL && rnd_one(r, 2)), pae = lm || rnd_one(r, 2);
    struct kvs_sregs s, base;
    struct kvs_regs x;
    kvs_vcpu_get_sregs(g.c, &base);
    memset(&s, 0, sizeof s);
    s.apic_base = base.apic_base;
    uint64_t rip = code_address(r);
    uint8_t u = (uint8_t)cpl;
    if (mode == REAL || mode == V86) {
        uint16_t cs = (uint16_t)((rip >> 4) & 0xf000);
        struct kvs_segment data = seg(0, 0, 0xffff, 3, u, 0, 0);
        rip -= (uint32_t)cs << 4;
        s.ds = s.es = s.fs = s.gs = s.ss = data;
        s.cs = seg(cs, (uint32_t)cs << 4, 0xffff, mode == V86 ? 3 : 11, u, 0, 0);
        if (rnd_one(r, 2)) s.ds = seg(0x1000, 0x10000, 0xffff, 3, u, 0, 0);
        if (mode == REAL && rnd_one(r, 8)) s.ds = seg(0, 0, 0xffffffff, 3, 0, 1, 0); /* "unreal" */
    } else {
        bool b16 = mode == PROT16;
        uint16_t code = b16 ? (u ? S_UCODE16 : S_CODE16) : mode == LONG ? (u ? S_UCODE64 : S_CODE64) : u ? S_UCODE32 : S_CODE32;
        uint16_t data = b16 ? (u ? S_UDATA16 : S_DATA16) : u ? S_UDATA32 : S_DATA32;
        uint64_t d;
        memcpy(&d, g.m + GDT + data, 8);
        uint32_t b = (uint32_t)(d >> 16 & 0xffffff), limit = b16 ? 0xffff : 0xffffffff;
        s.cs = seg((uint16_t)(code | u), b, limit, 11, u, bits == 32, mode == LONG);
        s.ds = seg((uint16_t)(data | u), b, limit, 3, u, !b16, 0);
        s.es = s.fs = s.gs = s.ss = s.ds;
        if (lm && rnd_one(r, 2)) {
            s.fs.base = any_address(r);
            s.gs.base = any_address(r);
            if (!rnd_one(r, 16)) s.fs.base = (uint64_t)((int64_t)(s.fs.base << 16) >> 16), s.gs.base = (uint64_t)((int64_t)(s.gs.base << 16) >> 16);
        }
        if (b16) rip &= 0xffff;
        if (rnd_one(r, 8)) s.es.unusable = 1;
    }
    s.tr = (struct kvs_segment){ .base = lm ? TSS64 : TSS32, .limit = 0x7ff, .selector = S_TSS32, .type = 11, .present = 1 };
    s.ldt = (struct kvs_segment){ .base = LDT, .limit = 0xff, .selector = S_LDT, .type = 2, .present = 1 };
    s.gdt = (struct kvs_dtable){ .base = GDT, .limit = 0xff };
    s.idt = mode == REAL ? (struct kvs_dtable){ .base = 0, .limit = 0x3ff }
                         : (struct kvs_dtable){ .base = lm ? IDT64 : IDT32, .limit = lm ? 0xfff : 0x7ff };
    s.cr0 = CR0_ET | CR0_NE | (mode == REAL ? 0 : CR0_PE) | (paging ? CR0_PG : 0) | (rnd(r) & (CR0_WP | CR0_AM | CR0_MP));
    if (rnd_one(r, 16)) s.cr0 |= rnd_one(r, 2) ? CR0_TS : CR0_EM;
    s.cr4 = (rnd_one(r, 8) ? 0 : CR4_OSFXSR | CR4_OSXMMEXCPT) | (rnd(r) & (CR4_PGE | CR4_PSE | CR4_TSD | CR4_DE | CR4_VME | CR4_PCE));
    if (pae) s.cr4 |= CR4_PAE;
    if (rnd_one(r, 4)) s.cr4 |= rnd(r) & (CR4_SMEP | CR4_SMAP | CR4_UMIP | CR4_PVI);
    if (rnd_one(r, 2)) s.cr4 |= CR4_OSXSAVE | (rnd(r) & CR4_FSGSBASE);
    if (lm && rnd_one(r, 4)) s.cr4 |= CR4_PCIDE;
    if (rnd_one(r, 4)) s.cr4 |= rnd(r) & (CR4_PKE | CR4_LA57 | CR4_LAM_SUP | CR4_MCE);
    s.cr4 &= g.cr4;
    s.cr3 = !paging ? 0 : !lm ? (pae ? PAE_PDPT : PD32) : s.cr4 & CR4_LA57 ? PML5 : PML4;
    if (lm && g.lam && rnd_one(r, 4)) s.cr3 |= rnd(r) & (CR3_LAM_U48 | CR3_LAM_U57);
    s.efer = (rnd(r) & (EFER_SCE | EFER_NX)) | (lm ? EFER_LME | EFER_LMA : 0);
    s.cr8 = g.irqchip ? rnd(r) & 15 : 0;
    if (rnd_one(r, 64)) ((uint8_t *)&s)[rnd_below(r, sizeof s)] ^= (uint8_t)(1 << rnd_below(r, 8));

    uint64_t *q = (uint64_t *)&x;
    for (int i = 0; i < 16; i++) q[i] = rnd_one(r, 3) ? rnd_value(r) : any_address(r);
    x.rcx = rnd_one(r, 2) ? rnd_below(r, 70) : rnd_one(r, 4) ? g.msrs[rnd_below(r, g.msr_count)] : x.rcx;
    x.rsp = rnd_one(r, 8) ? x.rsp : STACKS + 0x800 + rnd_below(r, 0x1000);
    x.rip = rip;
    x.rflags = 2 | (rnd(r) & (FLAGS_STATUS | FLAG_IF | FLAG_DF));
    if (mode == V86) x.rflags |= FLAG_VM;
    if (rnd_one(r, 8)) x.rflags |= rnd(r) & (FLAG_AC | FLAG_NT | FLAG_TF | FLAG_IOPL | FLAG_ID | FLAG_RF | FLAG_VIF | FLAG_VIP);
    *rip_out = rip + (mode == REAL || mode == V86 || mode == PROT16 ? s.cs.base : 0);
    /* Flags first: V86 decides what the segments mean. */
    if (kvs_vcpu_set_regs(g.c, &x) != 0 || kvs_vcpu_set_sregs(g.c, &s) != 0 || kvs_vcpu_set_regs(g.c, &x) != 0) return 0;

    struct kvs_fpu f;
    memset(&f, 0, sizeof f);
    for (int i = 0; i < 8; i++) rnd_extended(r, f.fpr[i]);
    for (int i = 0; i < 16; i++) rnd_vector(r, f.xmm[i]);
    f.fcw = rnd_one(r, 4) ? (uint16_t)rnd(r) : 0x37f;
    f.fsw = (uint16_t)rnd(r) & 0x7f3f;
    f.ftwx = (uint8_t)rnd(r);
    f.mxcsr = rnd_one(r, 4) ? (uint32_t)rnd(r) & 0xffff : 0x1f80;
    kvs_vcpu_set_fpu(g.c, &f);
    struct kvs_vcpu_events e;
    kvs_vcpu_get_events(g.c, &e);
    memset(&e.exception, 0, sizeof e.exception);
    memset(&e.interrupt, 0, sizeof e.interrupt);
    e.nmi.pending = 0;
    e.nmi.masked = rnd_one(r, 8);
    e.triple_fault.pending = 0;
    e.flags = KVS_VCPUEVENT_VALID_SMM;
    memset(&e.smi, 0, sizeof e.smi);
    if (g.smm && rnd_one(r, 8)) {
        e.smi.smm = rnd_one(r, 2);
        e.smi.pending = rnd_one(r, 2);
        e.smi.smm_inside_nmi = rnd_one(r, 4);
        e.smi.latched_init = rnd_one(r, 16);
    }
    FUZZ_CHECK(kvs_vcpu_set_events(g.c, &e) == 0);
    if (rnd_one(r, 32) || g.a20_off) {
        g.a20_off = rnd_one(r, 4);
        FUZZ_CHECK(kvs_vm_set_a20(g.vm, !g.a20_off) == 0);
    }
    struct kvs_mp_state mp = { KVS_MP_STATE_RUNNABLE };
    kvs_vcpu_set_mp_state(g.c, &mp);
    if (rnd_one(r, 16)) {
        struct kvs_debugregs dr = { .dr6 = 0xffff0ff0, .dr7 = 0x400 | (rnd(r) & 0xffff03ff) };
        for (int i = 0; i < 4; i++) dr.db[i] = rnd_one(r, 2) ? rip + rnd_below(r, 32) : any_address(r);
        kvs_vcpu_set_debugregs(g.c, &dr);
    } else {
        struct kvs_debugregs dr = { .dr6 = 0xffff0ff0, .dr7 = 0x400 };
        kvs_vcpu_set_debugregs(g.c, &dr);
    }
    return bits;
}

/* Components that LDMXCSR and FXRSTOR do not reach: PKRU, and the upper halves of vectors. */
static void set_keys(struct rng *r)
{
    struct kvs_xsave x;
    struct kvs_xcrs xcrs = { .nr_xcrs = 1, .xcrs[0] = { .value = rnd_one(r, 2) ? 0x207 : 7 } };
    kvs_vcpu_set_xcrs(g.c, &xcrs); /* refused where the host has no AVX */
    FUZZ_CHECK(kvs_vcpu_get_xsave(g.c, &x) == 0);
    for (uint32_t i = 576; i < sizeof x; i += 8) st64((uint8_t *)&x + i, rnd_one(r, 2) ? rnd(r) : 0);
    FUZZ_CHECK(kvs_vcpu_set_xsave(g.c, &x) == 0);
}

/* ---- running ---- */
static void answer(struct rng *r)
{
    struct kvs_run *run = g.run;
    switch (run->exit_reason) {
    case KVS_EXIT_IO:
        FUZZ_CHECK(run->io.size == 1 || run->io.size == 2 || run->io.size == 4);
        FUZZ_CHECK(run->io.data_offset + run->io.size * run->io.count <= sizeof *run);
        if (run->io.direction == KVS_EXIT_IO_IN)
            for (uint32_t i = 0; i < run->io.size * run->io.count; i++) ((uint8_t *)run)[run->io.data_offset + i] = (uint8_t)rnd(r);
        break;
    case KVS_EXIT_MMIO:
        FUZZ_CHECK(run->mmio.len >= 1 && run->mmio.len <= 8);
        if (!run->mmio.is_write) st64(run->mmio.data, rnd(r));
        break;
    default: break;
    }
    if (rnd_one(r, 16)) kvs_vcpu_nmi(g.c);
    if (rnd_one(r, 32)) machine_check(r, g.c);
    if (g.smm && rnd_one(r, 8)) FUZZ_CHECK(kvs_vcpu_smi(g.c) == 0);
    if (!g.irqchip && rnd_one(r, 8)) kvs_vcpu_interrupt(g.c, rnd_below(r, 256));
    if (g.irqchip && rnd_one(r, 8)) kvs_irq_line(g.vm, rnd_below(r, 26), rnd_below(r, 2));
    if (rnd_one(r, 32)) kvs_vcpu_kick(g.c);
    run->request_interrupt_window = rnd_one(r, 8);
}

static void save_and_load(struct rng *r)
{
    struct kvs_regs x;
    struct kvs_sregs s, s2;
    struct kvs_fpu f;
    struct kvs_vcpu_events e;
    g.run->immediate_exit = 1; /* finishes an instruction that waits for the host */
    kvs_vcpu_run(g.c);
    g.run->immediate_exit = 0;
    FUZZ_CHECK(kvs_vcpu_get_regs(g.c, &x) == 0 && kvs_vcpu_get_sregs(g.c, &s) == 0 && kvs_vcpu_get_fpu(g.c, &f) == 0 &&
               kvs_vcpu_get_events(g.c, &e) == 0);
    FUZZ_CHECK(kvs_vcpu_set_fpu(g.c, &f) == 0);
    /* A state that was read is a state that can be set. */
    FUZZ_CHECK(kvs_vcpu_set_sregs(g.c, &s) == 0);
    FUZZ_CHECK(kvs_vcpu_set_regs(g.c, &x) == 0);
    FUZZ_CHECK(kvs_vcpu_set_events(g.c, &e) == 0);
    kvs_vcpu_get_sregs(g.c, &s2);
    FUZZ_CHECK(!memcmp(&s, &s2, sizeof s));
    struct kvs_xsave v, v2;
    struct kvs_core_state k, k2;
    FUZZ_CHECK(kvs_vcpu_get_xsave(g.c, &v) == 0 && kvs_vcpu_set_xsave(g.c, &v) == 0 && kvs_vcpu_get_xsave(g.c, &v2) == 0);
    FUZZ_CHECK(!memcmp(&v, &v2, sizeof v));
    FUZZ_CHECK(kvs_vcpu_get_core_state(g.c, &k) == 0 && kvs_vcpu_set_core_state(g.c, &k) == 0 && kvs_vcpu_get_core_state(g.c, &k2) == 0);
    FUZZ_CHECK(!memcmp(&k, &k2, sizeof k));
    (void)r;
}

static void one(struct rng *r)
{
    uint64_t rip;
    uint32_t bits = 0, tries = 0;
    /* Some states are refused; too many would mean that nothing is tested. */
    while (!bits) {
        FUZZ_CHECK(tries++ < 1000);
        bits = set_state(r, rnd_below(r, MODES), &rip);
    }
    g.refused += tries - 1;
    g.tried += tries;
    FUZZ_CHECK(g.tried < 10000 || g.refused < g.tried / 2);
    const uint32_t at = (uint32_t)rip & (RAM_SIZE - 1), bytes = 48 + rnd_below(r, 100);
    if (rnd_one(r, 3)) write_loops(r, at, bytes, bits);
    else write_code(r, at, bytes, bits);
    kvs_mem_written(g.vm, rip & (RAM_SIZE - 1) & ~63ull, 256);
    struct kvs_core_state s;
    kvs_vcpu_get_core_state(g.c, &s);
    kvs_vcpu_set_insn_limit(g.c, s.retired + 64 + (rnd_one(r, 4) ? rnd_below(r, 4000) : 0));
    if (rnd_one(r, 32)) {
        struct kvs_guest_debug d = { .control = KVS_GUESTDBG_ENABLE | KVS_GUESTDBG_SINGLESTEP };
        kvs_vcpu_set_guest_debug(g.c, &d);
    }
    if (rnd_one(r, 4)) set_keys(r);
    watch(g.c);
    for (uint32_t exits = 0; exits < 24; exits++) {
        int32_t rc = kvs_vcpu_run(g.c);
        FUZZ_CHECK(rc == 0);
        uint32_t reason = g.run->exit_reason;
        if (reason == KVS_EXIT_INSN_LIMIT || reason == KVS_EXIT_SHUTDOWN || reason == KVS_EXIT_INTERNAL_ERROR) break;
        if (reason == KVS_EXIT_HLT && !rnd_one(r, 4)) break;
        if (reason == KVS_EXIT_INTR && watched.kicked) break;
        answer(r);
        if (rnd_one(r, 64)) save_and_load(r);
    }
    if (rnd_one(r, 16)) save_and_load(r);
    struct kvs_guest_debug off = { 0 };
    kvs_vcpu_set_guest_debug(g.c, &off);
    g.kicked = watched.kicked;
    watch(NULL);
}

static void machine_create(struct rng *r)
{
    struct kvs_vm_config config = { .size = sizeof config, .clock_mode = KVS_CLOCK_VIRTUAL, .engine = g.engine, .jit_threshold = 1 };
    g.irqchip = rnd_one(r, 2);
    g.smm = rnd_one(r, 2);
    g.a20_off = false;
    config.flags = g.smm ? KVS_VM_SMM : 0;
    FUZZ_CHECK(kvs_vm_create(&config, &g.vm) == 0 && kvs_ram_create(RAM_SIZE, &g.ram) == 0 && kvs_ram_create(ROM_SIZE, &g.rom) == 0);
    if (g.irqchip) FUZZ_CHECK(kvs_irqchip_create(g.vm) == 0 && kvs_pit_create(g.vm) == 0);
    struct kvs_userspace_memory_region ram = { .slot = 0, .memory_size = RAM_SIZE, .flags = rnd_one(r, 2) ? KVS_MEM_LOG_DIRTY_PAGES : 0 };
    struct kvs_userspace_memory_region alias = { .slot = 1, .guest_phys_addr = ALIAS, .memory_size = KIB(128) };
    struct kvs_userspace_memory_region rom = { .slot = 2, .guest_phys_addr = ROM, .memory_size = ROM_SIZE, .flags = KVS_MEM_READONLY };
    FUZZ_CHECK(kvs_memslot_set(g.vm, &ram, g.ram, 0) == 0 && kvs_memslot_set(g.vm, &alias, g.ram, KIB(128)) == 0 &&
               kvs_memslot_set(g.vm, &rom, g.rom, 0) == 0);
    if (g.smm && rnd_one(r, 2)) {
        /* In system management mode the two halves of RAM have changed places. */
        struct kvs_userspace_memory_region low = { .slot = 1 << 16, .memory_size = RAM_SIZE / 2 };
        struct kvs_userspace_memory_region high = { .slot = 1 << 16 | 1, .guest_phys_addr = RAM_SIZE / 2, .memory_size = RAM_SIZE / 2 };
        FUZZ_CHECK(kvs_memslot_set(g.vm, &low, g.ram, RAM_SIZE / 2) == 0 && kvs_memslot_set(g.vm, &high, g.ram, 0) == 0);
    }
    g.m = kvs_ram_address(g.ram);
    FUZZ_CHECK(kvs_vcpu_create(g.vm, 0, &g.c) == 0);
    g.run = kvs_vcpu_run_block(g.c);
    struct kvs_cpuid_entry2 cpuid[64];
    uint32_t count = 64;
    FUZZ_CHECK(kvs_get_supported_cpuid(cpuid, &count) == 0 && kvs_vcpu_set_cpuid2(g.c, cpuid, count) == 0);
    /* What CR4 may hold follows from CPUID. */
    g.cr4 = ~0ull;
    for (uint32_t i = 0; i < count; i++) {
        if (cpuid[i].function == 1) {
            if (!(cpuid[i].edx >> 1 & 1)) g.cr4 &= ~(uint64_t)(CR4_VME | CR4_PVI);
            if (!(cpuid[i].ecx >> 26 & 1)) g.cr4 &= ~(uint64_t)CR4_OSXSAVE;
            if (!(cpuid[i].ecx >> 17 & 1)) g.cr4 &= ~(uint64_t)CR4_PCIDE;
        } else if (cpuid[i].function == 7 && cpuid[i].index == 0) {
            if (!(cpuid[i].ebx & 1)) g.cr4 &= ~(uint64_t)CR4_FSGSBASE;
            if (!(cpuid[i].ebx >> 7 & 1)) g.cr4 &= ~(uint64_t)CR4_SMEP;
            if (!(cpuid[i].ebx >> 20 & 1)) g.cr4 &= ~(uint64_t)CR4_SMAP;
            if (!(cpuid[i].ecx >> 2 & 1)) g.cr4 &= ~(uint64_t)CR4_UMIP;
            if (!(cpuid[i].ecx >> 3 & 1)) g.cr4 &= ~(uint64_t)CR4_PKE;
            if (!(cpuid[i].ecx >> 16 & 1)) g.cr4 &= ~(uint64_t)CR4_LA57;
        } else if (cpuid[i].function == 7 && cpuid[i].index == 1) {
            g.lam = cpuid[i].eax >> 26 & 1;
        }
    }
    if (!g.lam) g.cr4 &= ~(uint64_t)CR4_LAM_SUP;
    struct kvs_msr_entry msrs[] = {
        { 0xc0000081, 0, (uint64_t)(S_UCODE16 | 3) << 48 | (uint64_t)S_CODE64 << 32 }, { 0xc0000082, 0, CODE + 0x100 }, { 0xc0000083, 0, CODE + 0x200 },
        { 0xc0000084, 0, rnd(r) & 0x7fff }, { 0x174, 0, S_CODE32 }, { 0x175, 0, STACKS + 0x1000 }, { 0x176, 0, CODE + 0x300 },
    };
    kvs_vcpu_set_msrs(g.c, msrs, ARRAY_SIZE(msrs));
    struct kvs_msr_entry smbase = { 0x9e, 0, rnd_below(r, RAM_SIZE - KIB(64)) };
    if (rnd_one(r, 2)) FUZZ_CHECK(kvs_vcpu_set_msrs(g.c, &smbase, 1) == 1);
    g.msr_count = ARRAY_SIZE(g.msrs);
    FUZZ_CHECK(kvs_get_msr_index_list(g.msrs, &g.msr_count) == 0);
    uint8_t *rom_bytes = kvs_ram_address(g.rom);
    for (uint32_t i = 0; i < ROM_SIZE; i += 8) st64(rom_bytes + i, rnd(r));
    for (uint32_t i = 0; i < RAM_SIZE; i += 8) st64(g.m + i, rnd(r));
    g.system_count = 0;
    for (uint32_t row = 1; row < ROW_COUNT; row++)
        if ((row_forms[row].attr & (A_SYS | A_PRIV | A_IO | A_END)) || !(row_forms[row].attr & (A_SSE | A_MMX | A_X87)))
            g.system_rows[g.system_count++] = (uint16_t)row;
}

static void machine_destroy(void)
{
    FUZZ_CHECK(kvs_vcpu_destroy(g.c) == 0);
    kvs_vm_destroy(g.vm);
    kvs_ram_release(g.ram);
    kvs_ram_release(g.rom);
}

/* After each case; lockstep.c compares. True: the epoch ends. */
#ifndef INSN_STREAM_DONE
#define INSN_STREAM_DONE(n) false
#endif

static void epoch(struct rng *r, uint64_t cases)
{
    machine_create(r);
    for (uint64_t n = 0; n < cases; n++) {
        if (n % 16 == 0) {
            build_paging(r);
            build_descriptors(r);
            kvs_mem_written(g.vm, 0, CODE);
        }
        if (rnd_one(r, 64)) {
            uint64_t bits[1];
            kvs_get_dirty_log(g.vm, 0, bits, 1);
        }
        if (rnd_one(r, 256)) {
            struct kvs_userspace_memory_region alias = { .slot = 1, .guest_phys_addr = ALIAS };
            kvs_memslot_set(g.vm, &alias, NULL, 0);
            alias.memory_size = KIB(128);
            alias.flags = rnd_one(r, 2) ? KVS_MEM_READONLY : 0;
            FUZZ_CHECK(kvs_memslot_set(g.vm, &alias, g.ram, KIB(128)) == 0);
        }
        one(r);
        if (INSN_STREAM_DONE(n)) break;
    }
    machine_destroy();
}

/* The input is machine code; the state comes from its first bytes. */
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (size < 9 || size > 4096) return 0;
    struct rng r = { ld64(data) };
    machine_create(&r);
    build_paging(&r);
    build_descriptors(&r);
    uint64_t rip;
    if (set_state(&r, data[8] % MODES, &rip)) {
        size_t room = RAM_SIZE - (rip & (RAM_SIZE - 1)), n = size - 9 < room ? size - 9 : room;
        memcpy(g.m + (rip & (RAM_SIZE - 1)), data + 9, n);
        kvs_vcpu_set_insn_limit(g.c, 1000);
        watch(g.c);
        for (int exits = 0; exits < 64 && kvs_vcpu_run(g.c) == 0 && g.run->exit_reason != KVS_EXIT_INSN_LIMIT && !watched.kicked; exits++)
            answer(&r);
        watch(NULL);
    }
    machine_destroy();
    return 0;
}

#ifndef KVS_LIBFUZZER
int main(int argc, char **argv) { return fuzz_main(argc, argv, "insn_stream", 500, epoch); }
#endif
