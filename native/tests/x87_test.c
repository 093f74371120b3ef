/*
 * Every x87 handler against the host: random stacks, control words, tags and operands, the result
 * compared in all 108 bytes of the FNSAVE image, memory and EFLAGS. The reference runs the encoding
 * that the instruction table names, as bytes on an executable page. Usage: x87_test [cases] [seed]
 */
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "../src/interp/interp.h"
#include "../src/interp/x87.h"

/* ---- what handlers call, over one flat buffer ---- */
enum { MEM_SIZE = 128 };
static uint8_t *page; /* guest page at GUEST_LA; the operand is at MEM_OFF */
#define GUEST_LA 0x7654321000ull
#define MEM_OFF 0x7f8u
static bool fault_memory;

int leave(OPARGS, int st) { return st; }
static int finished(OPARGS) { return 1000; }
int raise_vector(struct kvs_vcpu *c, uint8_t vector)
{
    c->exc.pending = true;
    c->exc.vector = vector;
    return ST_FAULT;
}
static uint8_t *operand(uint64_t off) { return page + (off - GUEST_LA); }
int vread(struct kvs_vcpu *c, uint32_t seg, uint64_t off, void *data, uint32_t size)
{
    if (fault_memory) return raise_vector(c, EXC_PF);
    memcpy(data, operand(off), size);
    return ST_OK;
}
int vwrite(struct kvs_vcpu *c, uint32_t seg, uint64_t off, const void *data, uint32_t size)
{
    if (fault_memory) return raise_vector(c, EXC_PF);
    memcpy(operand(off), data, size);
    return ST_OK;
}
int seg_to_linear(struct kvs_vcpu *c, uint32_t seg, uint64_t off, uint32_t size, int access, uint64_t *la)
{
    *la = off;
    return ST_OK;
}
int seg_check_alignment(struct kvs_vcpu *c, uint32_t seg, uint64_t off, uint32_t align, int access) { return ST_OK; }
int lwrite_check(struct kvs_vcpu *c, uint64_t la, uint32_t size, int how)
{
    return fault_memory ? raise_vector(c, EXC_PF) : ST_OK;
}

/* ---- the x87 rows of the table ---- */
struct test_row { const char *name; kvs_handler fn; uint8_t byte, modrm; bool memory; uint8_t k0, k1; };
#define OPERATION(name, cls, mnem, feat, rd, wr, un) OP(name);
#define ENC(name, map, pp, opc, mod, k0, k1, k2, at)
#define GRP(name, grp, pp, ext, mod, k0, k1, k2, at)
#define FIX(name, tab, mrm, at)
#include "../src/isa/isa_x87.def"
#undef OPERATION
#undef GRP
#undef FIX
static const struct test_row rows[] = {
#define OPERATION(name, cls, mnem, feat, rd, wr, un)
#define GRP(name, grp, pp, ext, mod, k0, k1, k2, at)                                               \
    { #name, op_##name, 0xd8 + grp - GD8, mod == M ? ext << 3 | 6 : 0xc0 | ext << 3, mod == M, k0, k1 },
#define FIX(name, tab, mrm, at) { #name, op_##name, 0xd8 + tab - TD8, mrm, false, NA, NA },
#include "../src/isa/isa_x87.def"
};

/* ---- random material ---- */
static uint64_t seed;
static uint64_t rnd(void)
{
    seed ^= seed << 13;
    seed ^= seed >> 7;
    seed ^= seed << 17;
    return seed * 0x2545f4914f6cdd1dull;
}
static uint32_t below(uint32_t n) { return (uint32_t)((rnd() >> 32) * n >> 32); }

static void random_real(uint8_t *p)
{
    static const uint64_t edges[] = { 0, 1, BIT(62), BIT(63), BIT(63) | 1, ~0ull, BIT(63) | BIT(62), BIT(63) | BIT(62) | 1,
                                      BIT(63) | 0x400, BIT(63) | 0x800, ~0x7ffull, BIT(63) | BIT(39), BIT(62) | 5, ~0ull >> 1 };
    uint64_t m = below(3) ? rnd() : edges[below(ARRAY_SIZE(edges))];
    uint32_t e;
    switch (below(12)) {
    case 0: e = 0; break;
    case 1: e = 0x7fff; break;
    case 2: e = below(0x8000); break;
    case 3: e = 1 + below(80); break;
    case 4: e = 0x7ffe - below(80); break;
    case 5: e = 16383 - 1023 - 60 + below(70); break; /* around the limits of double and float */
    case 6: e = 16383 + 1018 + below(10); break;
    case 7: e = 16383 - 127 - 30 + below(40); break;
    case 8: e = 16383 + 122 + below(10); break;
    default: e = 16383 - 8 + below(80); break; /* integers and their neighbours */
    }
    if (below(8)) m |= BIT(63);
    if (!below(10)) m = 0, e = 0;
    if (!below(4)) m &= ~0ull << below(64);
    st64(p, m);
    st16(p + 8, (uint16_t)(e | (below(2) ? 0x8000 : 0)));
}

static void random_operand(uint8_t *p, uint32_t n)
{
    for (uint32_t k = 0; k < n; k++) p[k] = (uint8_t)rnd();
    switch (below(8)) {
    case 0: random_real(p); break;
    case 1: st64(p, below(3)); break;
    case 2: st64(p, (uint64_t)0x7ff << 52 | (below(2) ? rnd() & (BIT(52) - 1) : 0)); break;
    case 3: st64(p, rnd() & (BIT(52) - 1)); break;
    case 4: { double d = (double)(int32_t)rnd() / 4; memcpy(p, &d, 8); break; }
    case 5: { float d = (float)(int16_t)rnd() / 4; memcpy(p, &d, 4); break; }
    case 6: /* packed decimal digits */
        for (uint32_t k = 0; k < 10; k++) p[k] = (uint8_t)(below(10) << 4 | below(10));
        break;
    }
}

static void random_state(struct fpu *f)
{
    for (uint32_t k = 0; k < 8; k++) random_real(f->r[k]);
    if (!below(4)) memcpy(f->r[below(8)], f->r[below(8)], 16);
    if (!below(6)) f->r[below(8)][9] ^= 0x80;
    uint32_t masks = below(2) ? 0x3f : below(2) ? 0x3f & ~(1u << below(6)) : below(64);
    f->fcw = (uint16_t)(masks | 0x40 | (below(2) ? 3 : below(4)) << 8 | below(4) << 10 | (below(2) << 12));
    if (!below(3)) f->fcw = 0x37f;
    uint32_t flags = below(64) & below(64);
    if (below(16)) flags &= masks;
    f->fsw = (uint16_t)(flags | below(2) << 6 | below(8) << 11 | (rnd() & (FSW_C0 | FSW_C1 | FSW_C2 | FSW_C3)));
    if (flags & FSW_FLAGS & ~(uint32_t)f->fcw) f->fsw |= FSW_ES | FSW_B;
    f->tags = below(3) ? 0xff : (uint8_t)(rnd() | (below(2) ? rnd() : 0));
    if (!below(3)) f->tags &= (uint8_t)~(1u << (((f->fsw >> 11) - 1) & 7)); /* room for a push */
    f->fip = (uint32_t)rnd();
    f->fdp = (uint32_t)rnd();
    f->fcs = (uint16_t)rnd();
    f->fds = (uint16_t)rnd();
    f->fop = rnd() & 0x7ff;
}

/* ---- reference ---- */
struct image { uint8_t env[28]; uint8_t st[8][10]; };
static uint8_t *code;
static uint64_t (*reference)(struct image *img, void *mem, uint64_t flags);

static void build_reference(bool opsize16, uint8_t byte, uint8_t modrm)
{
    uint8_t *p = code;
    const uint8_t head[] = { 0x52, 0x9d, 0xdd, 0x27 };       /* push rdx; popf; frstor [rdi] */
    const uint8_t tail[] = { 0xdd, 0x37, 0x9c, 0x58, 0xc3 }; /* fnsave [rdi]; pushf; pop rax; ret */
    memcpy(p, head, sizeof head);
    p += sizeof head;
    if (opsize16) *p++ = 0x66;
    *p++ = byte;
    *p++ = modrm;
    memcpy(p, tail, sizeof tail);
    memcpy(&reference, &code, sizeof code);
}

static void image_of(const struct fpu *f, struct image *img)
{
    x87_env_store(f, 4, false, img->env);
    for (uint32_t k = 0; k < 8; k++) memcpy(img->st[k], f->r[((f->fsw >> 11) + k) & 7], 10);
}

/* ---- comparison ---- */
static void dump(const char *what, const struct image *img, const uint8_t *mem, uint32_t flags)
{
    printf("  %-9s cw %04x sw %04x tags %04x flags %03x mem", what, ld16(img->env), ld16(img->env + 4), ld16(img->env + 8), flags);
    for (int k = 0; k < 10; k++) printf(" %02x", mem[k]);
    printf("\n            ");
    for (int k = 0; k < 8; k++)
        printf("%04x:%016llx%s", ld16(img->st[k] + 8), (unsigned long long)ld64(img->st[k]), k == 3 ? "\n            " : k == 7 ? "\n" : " ");
}

static uint64_t passed, failed;
static struct kvs_vcpu *c;

static bool is_control(const char *n)
{
    return !strncmp(n, "fn", 2) ? strcmp(n, "fnop") != 0 : !strcmp(n, "fldcw") || !strcmp(n, "fldenv") || !strcmp(n, "frstor");
}

static void one_case(const struct test_row *row, uint32_t i_st, bool opsize16)
{
    struct kvs_insn insn[2];
    struct image before, want, got;
    uint8_t mem[MEM_SIZE], want_mem[MEM_SIZE];
    struct fpu *f = &c->fpu;
    bool control = is_control(row->name), fast = below(4) != 0;
    fault_memory = row->memory && !below(32);
    if (fault_memory) fast = false;

    random_state(f);
    random_operand(mem, MEM_SIZE);
    if (!strcmp(row->name, "fldenv") || !strcmp(row->name, "frstor")) {
        struct fpu other;
        random_state(&other);
        x87_env_store(&other, opsize16 ? 2 : 4, false, mem);
        if (below(2)) st16(mem + (opsize16 ? 4 : 8), (uint16_t)rnd());
        if (below(2)) st16(mem, (uint16_t)rnd());
        if (below(2)) st16(mem + (opsize16 ? 2 : 4), (uint16_t)rnd());
    }
    memcpy(want_mem, mem, sizeof mem);
    memcpy(page + MEM_OFF, mem, sizeof mem);
    image_of(f, &before);
    want = before;
    uint32_t flags = (uint32_t)rnd() & FLAGS_STATUS, want_flags = flags;
    bool pending = x87_pending(f);
    bool waits = strncmp(row->name, "fn", 2) != 0 || !strcmp(row->name, "fnop");
    int want_st = 1000;
    if (waits && pending) want_st = ST_FAULT;
    else if (!strcmp(row->name, "fnstsw_ax")) c->gpr[RAX] = rnd();
    if (want_st == 1000 && !fault_memory) {
        /* A context switch in the middle may lose the pointers: agreed when two runs are equal. */
        struct image again;
        uint8_t mem_again[MEM_SIZE];
        do {
            memcpy(want_mem, mem, sizeof mem);
            memcpy(mem_again, mem, sizeof mem);
            want = again = before;
            want_flags = (uint32_t)reference(&want, want_mem, flags | 0x202) & FLAGS_STATUS;
            if (!control) break;
            reference(&again, mem_again, flags | 0x202);
        } while (memcmp(&want, &again, sizeof want) || memcmp(want_mem, mem_again, sizeof mem));
    }

    memset(insn, 0, sizeof insn);
    insn[0].fn = row->fn;
    insn[1].fn = finished;
    insn[0].dst = row->memory ? INSN_MEM : row->k0 == STi ? (uint8_t)i_st : 0;
    insn[0].src = row->k1 == STi ? (uint8_t)i_st : 0;
    insn[0].base = RBX;
    insn[0].index = GPR_ZERO;
    insn[0].seg = (uint8_t)(SEG_DS | (fast ? INSN_FAST : 0));
    insn[0].osize = (uint8_t)(0x80 | (opsize16 ? 2 : 4));
    insn[0].imm = (row->byte & 7u) << 8 | row->modrm | i_st;
    insn[0].off = 0x123;
    c->gpr[RBX] = GUEST_LA + MEM_OFF;
    c->exc.pending = false;
    flags_set_status(c, flags);
    struct fpu saved = *f;
    int st = insn[0].fn(c, insn, 0);

    uint16_t host_cw, host_env[14];
    __asm__ volatile("fnstcw %0; fnstenv %1; fldcw %0" : "=m"(host_cw), "=m"(host_env));
    bool clean = host_cw == 0x37f && host_env[4] == 0xffff && !(host_env[2] & (FSW_TOP | FSW_ES));
    image_of(f, &got);
    bool unchanged_expected = want_st == ST_FAULT || (fault_memory && st == ST_FAULT);
    bool good = clean && (st == want_st || (fault_memory && st == ST_FAULT && c->exc.vector == EXC_PF));
    if (fault_memory && st == 1000) { /* the store was suppressed by an unmasked exception */
        want = before;
        (void)reference(&want, want_mem, flags | 0x202);
        good = good && !memcmp(want_mem, mem, sizeof mem);
    }
    if (want_st == ST_FAULT) good = good && c->exc.vector == EXC_MF;
    if (unchanged_expected) good = good && !memcmp(&saved, f, offsetof(struct fpu, vec)) && !memcmp(&before, &want, sizeof want);
    else if (!control) { /* pointers are ours; the reference has host addresses */
        good = good && f->fip == c->gpr[GPR_RIPBASE] + 0x123 && f->fop == (insn[0].imm & 0x7ff) && f->fcs == c->seg[SEG_CS].sel;
        if (row->memory) good = good && f->fdp == GUEST_LA + MEM_OFF && f->fds == c->seg[SEG_DS].sel;
        memcpy(got.env + 12, want.env + 12, 16);
    }
    /* What the stored image holds as opcode for the 16-bit layout is not defined. */
    if (control && opsize16) memcpy(got.env + 12, want.env + 12, 16);
    if (!strcmp(row->name, "fnstsw_ax") && st == 1000) good = good && (uint16_t)c->gpr[RAX] == saved.fsw;
    good = good && !memcmp(&got, &want, sizeof got) && !memcmp(page + MEM_OFF, want_mem, sizeof mem) && flags_status(c) == want_flags;
    if (good) {
        passed++;
        return;
    }
    static const char *last;
    failed++;
    if (last == row->name) return; /* one of each */
    last = row->name;
    printf("FAIL %s %02x %02x i=%u %s st %d (want %d) clean %d\n", row->name, row->byte, row->modrm, i_st,
           !row->memory ? "" : fast ? "fast" : "slow", st, want_st, clean);
    dump("before", &before, mem, flags);
    dump("host", &want, want_mem, want_flags);
    dump("handler", &got, page + MEM_OFF, flags_status(c));
}

static void check(bool ok, const char *what)
{
    if (ok) passed++;
    else failed++, printf("FAIL %s\n", what);
}

/* The layouts of real and virtual-8086 mode, which the host cannot make. SDM 1 "x87 FPU State Image" */
static void real_layouts(void)
{
    struct fpu f, g;
    uint8_t p[28];
    memset(&f, 0, sizeof f);
    x87_init(&f);
    check(f.fcw == 0x37f && x87_full_tags(&f) == 0xffff, "init");
    f.fip = 0x5678;
    f.fcs = 0xf123;
    f.fdp = 0x4321;
    f.fds = 0xe111;
    f.fop = 0x7a5;
    check(x87_env_store(&f, 2, true, p) == 14, "size of the 16-bit environment");
    check(ld16(p + 6) == 0x68a8 && ld16(p + 8) == 0xf7a5 && ld16(p + 10) == 0x5431 && ld16(p + 12) == 0xe000, "16-bit real layout");
    x87_env_load(&g, 2, true, p);
    check(g.fip == 0xf68a8 && g.fdp == 0xe5431 && g.fop == 0x7a5, "16-bit real layout read back");
    f.fip = 0x9abc5678;
    f.fcs = 0;
    check(x87_env_store(&f, 4, true, p) == 28, "size of the 32-bit environment");
    check(ld32(p + 12) == 0xffff5678 && ld32(p + 16) == 0x09abc7a5 && ld32(p + 20) == 0xffff5431 && ld32(p + 24) == 0x0000e000, "32-bit real layout");
    x87_env_load(&g, 4, true, p);
    check(g.fip == 0x9abc5678 && g.fdp == 0xe5431 && g.fop == 0x7a5, "32-bit real layout read back");
}

static void wait_cases(void)
{
    struct kvs_insn insn[2] = { { .fn = op_fwait }, { .fn = finished } };
    x87_init(&c->fpu);
    c->cr0 = CR0_PE | CR0_TS;
    check(insn[0].fn(c, insn, 0) == 1000, "FWAIT with TS alone");
    c->cr0 |= CR0_MP;
    check(insn[0].fn(c, insn, 0) == ST_FAULT && c->exc.vector == EXC_NM, "FWAIT with MP and TS");
    c->cr0 = CR0_PE;
    c->fpu.fsw = FSW_IE;
    check(insn[0].fn(c, insn, 0) == 1000, "FWAIT with a masked exception");
    c->fpu.fcw &= ~FSW_IE;
    check(insn[0].fn(c, insn, 0) == ST_FAULT && c->exc.vector == EXC_MF, "FWAIT with a pending exception");
}

int main(int argc, char **argv)
{
    uint32_t cases = argc > 1 ? (uint32_t)strtoul(argv[1], NULL, 0) : 10000;
    seed = argc > 2 ? strtoull(argv[2], NULL, 0) : 0x9e3779b97f4a7c15ull;
    page = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    code = mmap(NULL, 4096, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    c = calloc(1, sizeof *c);
    c->tlb = calloc(1, sizeof *c->tlb);
    if (page == MAP_FAILED || code == MAP_FAILED || !c || !c->tlb) return 2;
    for (int kind = 0; kind < TLB_KINDS; kind++)
        c->tlb->e[kind][tlb_index(GUEST_LA)] = (struct tlb_entry){ GUEST_LA, (uint64_t)(uintptr_t)page - GUEST_LA };
    c->mode = MODE_64 | MODE_FLAT | MODE_PROTECTED;
    c->cr0 = CR0_PE | CR0_NE;
    c->seg[SEG_CS].sel = 0x33;
    c->seg[SEG_DS].sel = 0x2b;
    c->gpr[GPR_RIPBASE] = 0xffffffff81234000ull;
    c->fpu.fcw = FCW_INIT;
    uint32_t tested = 0;
    for (uint32_t r = 0; r < ARRAY_SIZE(rows); r++) {
        const struct test_row *row = &rows[r];
        tested++;
        bool by_st = row->k0 == STi || row->k1 == STi, image = row->memory && row->k0 == M_;
        for (uint32_t v = 0; v < (by_st ? 8u : image ? 2u : 1u); v++) {
            uint32_t i_st = by_st ? v : 0;
            build_reference(image && v, row->byte, (uint8_t)(row->modrm | i_st));
            for (uint32_t k = 0; k < cases / (by_st ? 8 : 1); k++) one_case(row, i_st, image && v);
        }
    }
    real_layouts();
    wait_cases();
    x87_host_clean();
    printf("%u encodings, %llu passed, %llu failed\n", tested, (unsigned long long)passed, (unsigned long long)failed);
    free(c->tlb);
    free(c);
    return failed != 0;
}
