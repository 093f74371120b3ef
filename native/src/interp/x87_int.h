/*
 * How x87 handlers work. The host executes the very instruction, in one of two ways:
 *
 *  - x87_slow: the whole guest stack is loaded with FRSTOR, the instruction runs under the guest's
 *    control word and FNSAVE, which does not wait, takes the result. This is exact by construction
 *    for stack faults, unmasked exceptions and undocumented encodings, and costs about 220 cycles.
 *  - fast paths: operands are known to be there; they are loaded onto the empty host stack, the
 *    instruction runs with all exceptions masked, and if a flag comes up that the guest has not
 *    masked, the result is dropped and x87_slow does it again. About 30 cycles.
 *
 * FNCLEX costs as much as x87_slow, so fast paths leave the exception flags in the host's status
 * word as long as the guest has them set too: flags are sticky, so a subset can do no harm. Moves,
 * exact conversions and compares of ordinary numbers need no host x87 at all.
 */
#ifndef KVS_X87_INT_H
#define KVS_X87_INT_H

#include "interp.h"
#include "x87.h"

/* FNSAVE with 32-bit operand size in protected mode. SDM 1 "x87 FPU State Image" */
struct x87_image {
    uint16_t cw, pad0, sw, pad1, tags, pad2;
    uint32_t ip;
    uint16_t cs, op;
    uint32_t dp;
    uint16_t ds, pad3;
    uint8_t st[8][10];
};
_Static_assert(sizeof(struct x87_image) == 108, "FNSAVE image");

/* opc: three low bits of the first byte above the ModRM byte, as FOP has them; memory forms: with mod 0, rm 6. */
#define OPC(byte, modrm) (((byte) & 7u) << 8 | (modrm))
#define OPC_MEM(byte, ext) OPC(byte, (ext) << 3 | 6u)

/* Runs opc on f's stack; *img is f afterwards. status: in and out, status flags of EFLAGS. */
void x87_host_run(const struct fpu *f, uint32_t opc, void *mem, uint32_t *status, struct x87_image *img);
void x87_image_commit(struct fpu *f, const struct x87_image *img);

/*
 * The complete instruction. size: bytes of the memory operand read, negative: written, 0: none.
 * With OPC_FETCHED the operand is in c->rmw.data already: a device must not be read twice.
 */
#define OPC_FETCHED 0x800u
int x87_whole(struct kvs_vcpu *c, const struct kvs_insn *i, uint32_t opc, int size); /* returns ST_... */
int x87_slow(OPARGS, uint32_t opc, int size);

/* Reads a memory operand that is not plain RAM or not in a flat mode, and goes on with body. */
typedef int x87_body(OPARGS, const uint8_t *p);
int x87_fetch(OPARGS, uint32_t size, x87_body *body);

static inline bool x87_not_done(int st) { return st == ST_FAULT || st == ST_EXIT || st == ST_AGAIN; }
/* After a store that went through every check: it may have hit decoded code or a device. */
static inline int x87_stored(const struct kvs_vcpu *c, int st)
{
    return st == ST_OK && (c->write_count | c->code_modified) ? ST_END : st;
}

/* Control words with all exceptions masked, by FCW bits 8-11 (precision and rounding). */
extern const uint16_t x87_masked_cw[16] __attribute__((visibility("hidden")));

typedef uint8_t x87_reg[10];
typedef struct { uint64_t m; uint32_t se; bool ok; } x87_ext; /* significand, sign and exponent */

static ALWAYS_INLINE uint32_t st_index(const struct fpu *f, uint32_t n) { return ((f->fsw >> 11) + n) & 7; }
static ALWAYS_INLINE uint8_t *st_reg(struct fpu *f, uint32_t n) { return f->r[st_index(f, n)]; }
static ALWAYS_INLINE bool st_full(const struct fpu *f, uint32_t n) { return (f->tags >> st_index(f, n)) & 1; }
#define HOST_REG(p) (*(x87_reg *)(p))

/*
 * No fast path: an exception is pending, or underflow is unmasked, which also signals exact tiny
 * results that set no flag when masked. SDM 1 "Numeric Underflow Exception (#U)"
 */
static ALWAYS_INLINE bool x87_strict(const struct fpu *f)
{
    return (f->fsw | FSW_UE) & ~(uint32_t)f->fcw & FSW_FLAGS;
}

static ALWAYS_INLINE bool ext_normal(x87_ext v) { return (v.se & 0x7fff) - 1 < 0x7ffe && v.m >> 63; }
static ALWAYS_INLINE x87_ext ext_load(const uint8_t *p)
{
    return (x87_ext){ ld64(p), ld16(p + 8), true };
}
static ALWAYS_INLINE void ext_store(uint8_t *p, uint64_t m, uint32_t se)
{
    st64(p, m);
    st16(p + 8, (uint16_t)se);
}
static ALWAYS_INLINE void st_set_top(struct fpu *f, uint32_t top)
{
    f->fsw = (uint16_t)((f->fsw & ~(FSW_TOP | FSW_C1)) | (top & 7) << 11);
}
static ALWAYS_INLINE void st_pop(struct fpu *f)
{
    uint32_t top = st_index(f, 0);
    f->tags &= (uint8_t)~(1u << top);
    f->fsw = (uint16_t)((f->fsw & ~FSW_TOP) | ((top + 1) & 7) << 11);
}
/* The register a push would fill; call st_pushed when it is filled. Push clears C1. */
static ALWAYS_INLINE bool st_can_push(const struct fpu *f) { return !st_full(f, 7) && !x87_strict(f); }
static ALWAYS_INLINE void st_pushed(struct fpu *f)
{
    uint32_t top = st_index(f, 7);
    f->tags |= (uint8_t)(1u << top);
    st_set_top(f, top);
}

/* Last-instruction pointers, as Intel documents them. SDM 1 "x87 FPU Instruction and Data (Operand) Pointers" */
static ALWAYS_INLINE void x87_note(struct kvs_vcpu *c, const struct kvs_insn *i)
{
    c->fpu.fip = insn_rip(c, i);
    c->fpu.fcs = c->seg[SEG_CS].sel;
    c->fpu.fop = (uint16_t)(i->imm & 0x7ff);
}
static ALWAYS_INLINE void x87_note_mem(struct kvs_vcpu *c, const struct kvs_insn *i)
{
    x87_note(c, i);
    uint32_t seg = i->seg & 7u;
    uint64_t off = insn_offset(c, i);
    /* The pointer is the offset: fast operands have the base of FS and GS folded in. */
    if (UNLIKELY((i->seg & INSN_FAST) && seg >= SEG_FS)) off -= c->seg[seg].base;
    c->fpu.fdp = off;
    c->fpu.fds = c->seg[seg].sel;
}

/* ---- fast paths on the host's x87 ---- */
static ALWAYS_INLINE void host_begin(const struct fpu *f)
{
    uint16_t sw;
    __asm__ volatile("fnstsw %0" : "=a"(sw));
    if (UNLIKELY(sw & FSW_FLAGS & ~(uint32_t)f->fsw)) __asm__ volatile("fnclex");
    __asm__ volatile("fldcw %0" : : "m"(x87_masked_cw[(f->fcw >> 8) & 15]));
}
static ALWAYS_INLINE void host_end(void)
{
    __asm__ volatile("fldcw %0" : : "m"(x87_masked_cw[3]));
}
/* Takes flags, C1 and the condition codes in `codes` from the host's status word. */
static ALWAYS_INLINE void host_flags(struct fpu *f, uint32_t sw, uint32_t codes)
{
    f->fsw = (uint16_t)((f->fsw & ~(FSW_C1 | codes)) | (sw & (FSW_FLAGS | FSW_C1 | codes)));
}

/* Exact widening of normal numbers, zeros and infinities; ok is false for the rest. */
static ALWAYS_INLINE x87_ext ext_from_f64(uint64_t v)
{
    uint32_t e = (uint32_t)(v >> 52) & 0x7ff, s = (uint32_t)(v >> 63) << 15;
    uint64_t m = v << 11;
    if (LIKELY(e - 1 < 0x7fe)) return (x87_ext){ m | BIT(63), s | (e + 16383 - 1023), true };
    m &= BIT(63) - 1;
    if (m) return (x87_ext){ 0, 0, false };
    return e ? (x87_ext){ BIT(63), s | 0x7fff, true } : (x87_ext){ 0, s, true };
}
static ALWAYS_INLINE x87_ext ext_from_f32(uint32_t v)
{
    uint32_t e = (v >> 23) & 0xff, s = v >> 31 << 15;
    uint64_t m = (uint64_t)v << 40;
    if (LIKELY(e - 1 < 0xfe)) return (x87_ext){ m | BIT(63), s | (e + 16383 - 127), true };
    m &= BIT(63) - 1;
    if (m) return (x87_ext){ 0, 0, false };
    return e ? (x87_ext){ BIT(63), s | 0x7fff, true } : (x87_ext){ 0, s, true };
}
static ALWAYS_INLINE x87_ext ext_from_int(int64_t v)
{
    if (!v) return (x87_ext){ 0, 0, true };
    uint64_t a = v < 0 ? 0 - (uint64_t)v : (uint64_t)v;
    uint32_t shift = (uint32_t)__builtin_clzll(a);
    return (x87_ext){ a << shift, (v < 0 ? 0x8000u : 0) | (16383 + 63 - shift), true };
}

#define X87_SLOW(opc, size) return x87_slow(c, i, budget, opc, size)

/* A handler that reads memory: OP_LOAD(name, size) { body with p, the operand's bytes } */
#define OP_LOAD(name, size)                                                                       \
    static int load_##name(OPARGS, const uint8_t *p);                                             \
    OP(name)                                                                                      \
    {                                                                                             \
        const uint8_t *p = insn_probe(c, i, TLB_R, size);                                         \
        if (LIKELY(p)) return load_##name(c, i, budget, p);                                       \
        return x87_fetch(c, i, budget, size, load_##name);                                        \
    }                                                                                             \
    static int load_##name(OPARGS, const uint8_t *p)
#define X87_SLOW_LOAD(opc, size) X87_SLOW((opc) | (p == c->rmw.data ? OPC_FETCHED : 0), size)

#endif
