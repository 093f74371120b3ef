/* Between the files of the translator. */
#ifndef KVS_JIT_INT_H
#define KVS_JIT_INT_H

#include "emit.h"
#include "jit.h"

#define H_CPU H_R15
#define H_BUDGET H_R11

/* Something that host code leaves to: its handler comes first, as in kvs_insn. */
struct jit_edge {
    kvs_handler fn;
    struct block *target; /* once known */
    uint32_t site;        /* displacement to patch, from the start of the code cache */
    uint16_t off;         /* of the target in its page */
    uint8_t pad[10];
};
_Static_assert(sizeof(struct jit_edge) == sizeof(struct kvs_insn), "the same pool holds both");

struct jit {
    uint8_t *rw, *rx;     /* two views of the code cache */
    uint32_t used, start; /* start: behind the thunks */
    struct kvs_insn *pool; /* records that host code leaves to */
    uint32_t pool_used;
    uint32_t threshold;
    struct trans *trans;  /* work space */
    /* thunks, in the executable view */
    const uint8_t *enter, *resume, *resume_simd, *out, *out_abs, *dispatch, *unpair, *untranslated, *simd_load;
    const uint8_t *refill[2]; /* TLB_R, TLB_W */
    uint32_t next_slot[2][2]; /* as kvs_vcpu.slots */
};
#define JIT_CODE_SIZE (32u << 20)
#define JIT_POOL_SIZE ((16u << 20) / sizeof(struct kvs_insn))
#define JIT_BLOCK_MAX 65536u /* more than any trace can need */

extern const uint8_t jit_host_of[GPR_COUNT];
int jit_make_thunks(struct kvs_vcpu *c);
int jit_edge_unlinked(OPARGS);
int jit_dispatch_miss(OPARGS);
int jit_leave_head(OPARGS);

/* ---- a block being translated ---- */
enum kind {
    K_HELPER,  /* by its tier-0 handler, then on */
    K_LEAVE,   /* on in tier 0 from here */
    K_NOP, K_FENCE, K_ALU, K_UNARY, K_SHIFT, K_EXTEND, K_SETCC, K_CMOV, K_LEA, K_PUSH, K_POP, K_LEAVE_FRAME,
    K_XCHG, K_CMPXCHG, K_XADD, K_IMUL, K_MUL, K_SCAN, K_BT, K_BSWAP, K_WIDEN, K_FLAG, K_SIMD,
    K_JCC, K_JMP, K_CALL, K_RET, K_JMP_IND, K_CALL_IND,
    K_THROUGH, /* from one block of a trace into the next */
};

/* How to find a producer's flags again from its operands; see flags.c. */
struct recipe {
    enum { R_NONE, R_CMP, R_TEST, R_ADD, R_SUB } op;
    uint8_t w, a, b;      /* registers as in kvs_insn; b == INSN_MEM: the immediate */
    uint32_t regs;        /* mask of a and b */
    int32_t imm;
};

struct tinsn {
    struct decoded d;
    const struct kvs_insn *s; /* of tier 0; shared by a fused pair */
    kvs_handler fn;           /* its handler */
    enum kind kind;
    uint8_t w;
    bool touches;             /* has a memory access: may fault, and the check clobbers host flags */
    uint32_t reads, writes;   /* status flags; reads include what a partial writer keeps */
    uint32_t regs;            /* general registers written */
    bool merges;              /* reads flags only for those that it does not define */
    bool keep;                /* flags: saved at once, since a later place needs them in memory */
    bool back;                /* a branch to the start of the trace: closes a loop */
    struct recipe recipe;
};

struct flag_state {
    bool host, memory;        /* where the current flags are; neither: by the producer's recipe */
    const struct tinsn *producer;
};

struct cold {
    uint8_t *site[3];
    uint32_t sites;
    uint32_t k, pass;
    enum { COLD_INSN, COLD_BRANCH, COLD_CALL, COLD_RET, COLD_POLL } what;
    struct flag_state before, after;
    uint8_t *back;            /* COLD_INSN: where to go on; NULL: does not come back */
    struct {
        uint8_t *site, *back; /* of a memory operand whose slot does not hit; NULL: none */
        int32_t slot;         /* from the vCPU */
        uint32_t size;
        int kind;
    } miss;
};

/*
 * A trace: a block and those that it flows into, as far as they are decoded. A branch back to its start
 * leads into a second copy of the instructions up to it, in which the flags from before are as the first
 * copy left them: so a loop need not save them each time around.
 */
struct loop {
    uint32_t k;                /* the branch back */
    uint8_t *site, *after;     /* where the first copy jumps into the second, and the second goes on in the first */
    struct flag_state state, after_state;
};
#define JIT_INSNS (BLOCK_LIMIT + 32u) /* with what joins blocks */
#define JIT_LOOPS 2
#define JIT_BLOCKS 16
struct trans {
    struct kvs_vcpu *c;
    struct jit *j;
    struct block *b;
    struct emit e;
    uint32_t n;
    const struct kvs_insn *end; /* the slot behind the last instruction when straight flow gets there, or NULL */
    bool simd, failed;
    struct flag_state fl;
    uint32_t free;              /* scratch register that the last access left */
    uint32_t colds, pass;
    struct cold cold[2 * (1 + JIT_LOOPS) * JIT_INSNS];
    uint32_t fuseds;
    struct kvs_insn fused[JIT_INSNS]; /* the comparisons of fused pairs, by themselves */
    uint32_t blocks;
    const struct block *block[JIT_BLOCKS];
    uint32_t guest;            /* instructions: at most BLOCK_LIMIT between two checks of the budget */
    uint32_t loops;
    struct loop loop[JIT_LOOPS];
    const struct loop *copying; /* NULL in the first copy */
    uint8_t *loop_head;
    struct tinsn t[JIT_INSNS];
};

/* flags.c */
void flags_plan(struct trans *t);
void flags_save(struct emit *e, uint32_t scratch);
void flags_load(struct emit *e, uint32_t scratch);
void flags_recover(struct trans *t, const struct tinsn *producer); /* into memory, by the recipe */
void flags_to_memory(struct trans *t);
void flags_to_host(struct trans *t, uint32_t scratch);

/* lower_int.c, lower_simd.c, lower_branch.c; classify returns K_HELPER for what it does not know */
enum kind int_classify(struct trans *t, struct tinsn *x);
enum kind simd_classify(struct trans *t, struct tinsn *x);
void int_emit(struct trans *t, uint32_t k);
void simd_emit(struct trans *t, uint32_t k);
void branch_emit(struct trans *t, uint32_t k);
void branch_end(struct trans *t);
int64_t branch_target_of(const struct tinsn *x); /* from the start of the page */
void leave_emit(struct trans *t); /* to the run loop, at the start of the trace */
void cold_emit(struct trans *t);
void branch_cold(struct trans *t, const struct cold *c); /* COLD_CALL, COLD_RET */
void branch_taken(struct trans *t, uint32_t k); /* to the target of insn k; flags are in memory */

/* operands.c */
struct ea { uint8_t base, index, scale; int32_t disp; };
static inline struct ea ea_of(const struct kvs_insn *s) { return (struct ea){ s->base, s->index, s->scale, s->disp }; }
void ea_load(struct trans *t, struct ea a, uint32_t dst); /* dst: H_RCX */
/* Checked access of insn k; returns the operand and leaves t->free as scratch. align: mask or 0. */
struct rm access_at(struct trans *t, uint32_t k, struct ea a, int kind, uint32_t size, uint32_t align);
static inline struct rm access_of(struct trans *t, uint32_t k, int kind, uint32_t size, uint32_t align)
{
    return access_at(t, k, ea_of(t->t[k].s), kind, size, align);
}
void cold_add(struct trans *t, uint32_t k, uint8_t *site);
void cold_here(struct trans *t, uint32_t k); /* insn k is done: its cold path comes back here */
/* General register n (width 1: byte offset) as an operand; high bytes through memory. */
struct rm gpr_source(struct trans *t, uint32_t n, uint32_t w);
struct dest { struct rm m; uint8_t n, w, reload; bool back; };
struct dest gpr_open(struct trans *t, uint32_t n, uint32_t w, bool read, bool need_register, uint32_t scratch);
void gpr_close(struct trans *t, struct dest d);
static inline struct rm gpr_slot(uint32_t n) { return rm_mem(H_CPU, (int32_t)(n * 8)); }
static inline uint32_t gpr_number(uint32_t n, uint32_t w) { return w == 1 ? n >> 3 : n; }
const uint8_t *to_rx(const struct trans *t, const uint8_t *rw);
uint32_t pool_take(struct trans *t, uint32_t count);

#define CPU(field) rm_mem(H_CPU, (int32_t)offsetof(struct kvs_vcpu, field))

#endif
