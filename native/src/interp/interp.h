/*
 * Tier 0. A decoded block is an array of struct kvs_insn; each points to its handler and handlers
 * tail-call each other with three pinned arguments (c, i, budget). Rules for handlers:
 *  - hot handlers make only tail calls; anything unusual goes to a NOINLINE twin op_..._slow;
 *  - never take the address of a local in a handler: gcc would then not emit a tail call;
 *  - commit architectural state only when nothing can fault any more;
 *  - retired instructions are counted at branches and when leaving, from insn.since.
 */
#ifndef KVS_INTERP_H
#define KVS_INTERP_H

#include "../isa/isa.h"

#define OPARGS struct kvs_vcpu *c, const struct kvs_insn *i, int64_t budget
typedef int (*kvs_handler)(OPARGS);

struct kvs_insn {
    kvs_handler fn;
    union { uint64_t imm; struct block *target; };
    int32_t disp;        /* displacement; RIP-relative: from the page start; branches: relative target */
    uint8_t dst, src;    /* first and second operand: register number (8-bit: byte offset into gpr),
                            XMM/MMX/x87/segment number, or INSN_MEM */
    uint8_t base, index; /* into gpr[] */
    uint8_t scale;       /* shift count */
    uint8_t seg;         /* SEG_..., with INSN_FAST: base + index + disp is the linear address */
    uint8_t osize;       /* operand size in bits 0-3 (1, 2, 4, 8), address size in bits 4-7 (2, 4, 8) */
    uint8_t len;
    uint16_t off;        /* of the instruction in its page */
    uint8_t since;       /* instructions since the last counting point: before this one; on branches
                            and block ends: including it */
    uint8_t flags;       /* INSN_REPE, INSN_REPNE, INSN_LOCK; low nibble: condition */
};
_Static_assert(sizeof(struct kvs_insn) == 32, "two instructions per cache line");

#define INSN_FAST 0x80
#define INSN_REPE 0x10  /* F3 */
#define INSN_REPNE 0x20 /* F2 */
#define INSN_LOCK 0x40
#define INSN_FUSED 0x80 /* two instructions in one: CMP or TEST with the Jcc behind it */
#define INSN_OSIZE(i) ((uint32_t)(i)->osize & 15)
#define INSN_ASIZE(i) ((uint32_t)(i)->osize >> 4)

/* VEX: imm holds the immediate in bits 0-7, vvvv in bits 8-11, a gather's vector index in 12-15,
 * its scale in 16-17, VEX.L in 18. */
#define INSN_VVVV(i) ((uint32_t)((i)->imm >> 8) & 15)
#define INSN_VINDEX(i) ((uint32_t)((i)->imm >> 12) & 15)
#define INSN_VSCALE(i) ((uint32_t)((i)->imm >> 16) & 3)
#define INSN_VL(i) ((uint32_t)((i)->imm >> 18) & 1)
#define INSN_IS4(i) ((uint32_t)((i)->imm >> 4) & 15)

/* The empty asm keeps gcc from computing i + 1 twice: add, then an indirect jump. */
#define NEXT()                                                                                    \
    do {                                                                                          \
        i++;                                                                                      \
        __asm__("" : "+r"(i));                                                                    \
        return i->fn(c, i, budget);                                                               \
    } while (0)
#define OP_(name) int op_##name(OPARGS)
#define OP(name) OP_(name)

/* Leaves the chain: sets c->cur, c->rip and c->budget according to st; returns st. */
int leave(OPARGS, int st);

/*
 * SDM 3A "Serializing Instructions": what was stored before is seen by all vCPUs, and what follows is fetched
 * anew, since the run loop first drops the code that others have changed.
 */
static inline int serialized(int st)
{
    atomic_thread_fence(memory_order_seq_cst);
    return st == ST_OK ? ST_END : st;
}

/*
 * A handler whose work is an ordinary function: OPX(name) { body; return ST_...; }
 * The body may take addresses of locals and call anything.
 */
#define OPX(name) OPX_(name)
#define OPX_(name)                                                                                \
    static NOINLINE int x_##name(OPARGS);                                                         \
    int op_##name(OPARGS)                                                                         \
    {                                                                                             \
        int st = x_##name(c, i, budget);                                                          \
        if (UNLIKELY(st != ST_OK)) return leave(c, i, budget, st);                                \
        if (UNLIKELY(c->write_count | c->code_modified)) return leave(c, i, budget, ST_END);      \
        NEXT();                                                                                   \
    }                                                                                             \
    static NOINLINE int x_##name(OPARGS)
#define UNUSED_OPARGS (void)c, (void)i, (void)budget

/* ---- operands ---- */
/* Linear address when INSN_FAST (of 32-bit code if it fits 32 bits), else the offset before address-size truncation. */
static ALWAYS_INLINE uint64_t insn_ea(const struct kvs_vcpu *c, const struct kvs_insn *i)
{
    return c->gpr[i->base] + (c->gpr[i->index] << i->scale) + (uint64_t)(int64_t)i->disp;
}
static ALWAYS_INLINE uint64_t insn_ea_base(const struct kvs_vcpu *c, const struct kvs_insn *i)
{
    return c->gpr[i->base] + (uint64_t)(int64_t)i->disp;
}
/* Offset truncated to the address size (as LEA and string instructions see it). */
static inline uint64_t insn_offset(const struct kvs_vcpu *c, const struct kvs_insn *i)
{
    uint64_t ea = insn_ea(c, i);
    return INSN_ASIZE(i) == 8 ? ea : INSN_ASIZE(i) == 4 ? (uint32_t)ea : (uint16_t)ea;
}
/* Host address of a plain RAM operand, or NULL: use the slow functions. */
static ALWAYS_INLINE uint8_t *insn_probe(const struct kvs_vcpu *c, const struct kvs_insn *i, int kind, uint32_t size)
{
    return LIKELY(i->seg & INSN_FAST) ? tlb_probe(c, kind, insn_ea(c, i), size) : NULL;
}
/*
 * In handlers that lower.c picks only for INSN_FAST operands: declares T *p, the host address of the
 * operand, or goes on in the slow twin.
 */
#define FAST_HOST_AT(T, p, kind, la, slow)                                                        \
    const uint64_t p##_la = (la);                                                                 \
    const struct tlb_entry *p##_e = &c->tlb->e[kind][tlb_index(p##_la)];                          \
    if (UNLIKELY((p##_la ^ p##_e->tag) > PAGE_SIZE - sizeof(T))) return slow(c, i, budget);       \
    typedef T p##_any __attribute__((aligned(1), may_alias)); /* guest addresses have any alignment */ \
    p##_any *p = (p##_any *)(uintptr_t)(p##_la + p##_e->addend)
/* With a base only, and with an index too: most operands have none. */
#define FAST_HOST(T, p, kind, slow) FAST_HOST_AT(T, p, kind, insn_ea_base(c, i), slow)
#define FAST_HOST_X(T, p, kind, slow) FAST_HOST_AT(T, p, kind, insn_ea(c, i), slow)
/* Memory operand of i through every check. ST_OK, ST_FAULT or ST_EXIT. */
static inline int insn_read(struct kvs_vcpu *c, const struct kvs_insn *i, void *data, uint32_t size)
{
    return vread(c, i->seg, insn_offset(c, i), data, size);
}
static inline int insn_write(struct kvs_vcpu *c, const struct kvs_insn *i, const void *data, uint32_t size)
{
    return vwrite(c, i->seg, insn_offset(c, i), data, size);
}
/* A far pointer in memory: offset of the operand size, selector (op_far.c). */
int insn_far_pointer(struct kvs_vcpu *c, const struct kvs_insn *i, uint64_t *off, uint16_t *sel);
static inline int insn_rmw_begin(struct kvs_vcpu *c, const struct kvs_insn *i, uint32_t size)
{
    return vrmw_begin(c, i->seg, insn_offset(c, i), size);
}

#define REG8(n) (((uint8_t *)c->gpr)[n])             /* n: byte offset */
#define REG16(n) (*(uint16_t *)&c->gpr[n])
#define REG32(n) (*(uint32_t *)&c->gpr[n])           /* read; write with SET32, which zero-extends */
#define REG64(n) (c->gpr[n])
#define SET32(n, v) (c->gpr[n] = (uint32_t)(v))

/* Generic register access by size 1, 2, 4, 8 (size 1: byte offset). */
static inline uint64_t reg_get(const struct kvs_vcpu *c, uint32_t n, uint32_t size)
{
    switch (size) {
    case 1: return ((const uint8_t *)c->gpr)[n];
    case 2: return (uint16_t)c->gpr[n];
    case 4: return (uint32_t)c->gpr[n];
    default: return c->gpr[n];
    }
}
static inline void reg_set(struct kvs_vcpu *c, uint32_t n, uint32_t size, uint64_t v)
{
    switch (size) {
    case 1: ((uint8_t *)c->gpr)[n] = (uint8_t)v; break;
    case 2: *(uint16_t *)&c->gpr[n] = (uint16_t)v; break;
    case 4: c->gpr[n] = (uint32_t)v; break;
    default: c->gpr[n] = v; break;
    }
}
/* First operand (dst) or second (src), register or memory. */
static inline int rm_read(struct kvs_vcpu *c, const struct kvs_insn *i, uint32_t n, uint32_t size, uint64_t *v)
{
    *v = 0;
    if (n == INSN_MEM) return insn_read(c, i, v, size);
    *v = reg_get(c, n, size);
    return ST_OK;
}
static inline int rm_write(struct kvs_vcpu *c, const struct kvs_insn *i, uint32_t n, uint32_t size, uint64_t v)
{
    if (n == INSN_MEM) return insn_write(c, i, &v, size);
    reg_set(c, n, size, v);
    return ST_OK;
}

/* RIP of this instruction and of the next. 16-bit code may run above 64 KiB where the limit of CS allows it. */
static inline uint64_t rip_truncate(const struct kvs_vcpu *c, uint64_t rip) { return is_code64(c) ? rip : (uint32_t)rip; }
static inline uint64_t insn_rip(const struct kvs_vcpu *c, const struct kvs_insn *i)
{
    return rip_truncate(c, c->gpr[GPR_RIPBASE] + i->off);
}
/* EIP of 16-bit code may pass 0xffff only by a jump; sequential flow keeps 32 bits and meets the limit check. */
static inline uint64_t insn_next_rip(const struct kvs_vcpu *c, const struct kvs_insn *i)
{
    uint64_t next = c->gpr[GPR_RIPBASE] + i->off + i->len;
    return is_code64(c) ? next : (uint32_t)next;
}

/* Stack width in bytes: 8, 4 or 2. */
static inline uint32_t stack_size(const struct kvs_vcpu *c)
{
    return is_code64(c) ? 8 : c->mode & MODE_STACK32 ? 4 : 2;
}
/* Push and pop through every check; RSP changes only on success. (op_stack.c) */
int push(struct kvs_vcpu *c, uint64_t v, uint32_t size);
int pop(struct kvs_vcpu *c, uint64_t *v, uint32_t size);
void rsp_add(struct kvs_vcpu *c, int64_t delta); /* by the stack width */

/* ---- blocks (block.c) ---- */
#define MAX_INSNS 48
#define MAX_BYTES 15 /* of an instruction */
struct block {
    struct block *hash_next, *page_next;
    const uint8_t *host;      /* of the first byte: the key, with mode */
    uint32_t mode;
    uint16_t off;             /* of the first byte in its page */
    uint16_t bytes;
    uint16_t n;               /* guest instructions: upper bound of what one pass retires */
    uint16_t room;            /* bytes up to the limit of CS, which its last instruction exceeds; else 0 */
    uint8_t dead;
    uint8_t crosses;          /* one instruction that goes on in the next page: never chained */
    uint8_t code[MAX_BYTES];  /* its bytes, compared at every look-up */
    uint32_t heat;            /* tier 1: executions seen */
    kvs_handler first;        /* tier 1: what insn[0].fn was */
    const uint8_t *jit, *jit_entry; /* host code, with and without the check of the budget; NULL: none */
    struct kvs_insn insn[];
};
struct jc_entry { uint64_t la; uint64_t key; struct block *b; const uint8_t *host; /* tier 1 */ };
#define JC_BITS 12
#define JC_SIZE (1u << JC_BITS)
static inline uint32_t jc_index(uint64_t la) { return (uint32_t)(la ^ (la >> JC_BITS)) & (JC_SIZE - 1); }

int block_cache_create(struct kvs_vcpu *c);
void block_cache_destroy(struct kvs_vcpu *c);
void block_cache_flush(struct kvs_vcpu *c);
void code_drop_pending(struct kvs_vcpu *c); /* REQ_CODE_DROP */
/* Block at c->rip, decoded if need be; max: at most so many instructions, uncached (0: no bound).
 * NULL with *st = ST_FAULT, ST_EXIT or ST_AGAIN. Sets gpr[GPR_RIPBASE]. */
struct block *block_find(struct kvs_vcpu *c, uint32_t max, int *st);
/* The block of these bytes, if it is there. */
struct block *block_peek(const struct kvs_vcpu *c, const uint8_t *host, uint32_t mode);
/* Branch to c->rip from a handler: through the jump cache, or ST_LOOKUP to the run loop. */
int op_dispatch(OPARGS);
/* Turns a decoded instruction into kvs_insn: picks handler, fills operands. (lower.c) */
void lower(struct kvs_vcpu *c, const struct decoded *d, uint32_t mode, uint16_t off, struct kvs_insn *out);
/* Makes one instruction of a CMP or TEST (out, from d) and the Jcc behind it, if it can. */
bool lower_fused(const struct decoded *d, const struct decoded *jcc, uint32_t mode, struct kvs_insn *out);

/* Handlers that raise; used for bytes that are no instruction here. */
OP(ud);
OP(nm);
OP(gp0);
OP(block_end);

/* lower.c's hook into the SIMD handlers (op_sse*.c): register or memory form, plain or checked. */
kvs_handler simd_handler(const struct decoded *d, uint32_t mode);
kvs_handler vex_handler(const struct decoded *d, uint32_t mode);

#endif
