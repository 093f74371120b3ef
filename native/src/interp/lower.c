/* From struct decoded to struct kvs_insn: picks the handler and packs the operands. */
#include "interp.h"

/* ---- handlers by class, from the rows ---- */
#define WIDTH_DECL(name, form) OP(name##8##form); OP(name##16##form); OP(name##32##form); OP(name##64##form);
#define WIDTH_LIST(name, form) { op_##name##8##form, op_##name##16##form, op_##name##32##form, op_##name##64##form }

#define DECL_HELP(name) OP(name);
#define DECL_ALU2(name)                                                                           \
    WIDTH_DECL(name, _rr) WIDTH_DECL(name, _ri) WIDTH_DECL(name, _rm) WIDTH_DECL(name, _mr)       \
    WIDTH_DECL(name, _mi) WIDTH_DECL(name, _lock)                                                 \
    WIDTH_DECL(name, _rm_slow) WIDTH_DECL(name, _mr_slow) WIDTH_DECL(name, _mi_slow)              \
    WIDTH_DECL(name, _rmx) WIDTH_DECL(name, _mrx) WIDTH_DECL(name, _mix)
#define DECL_TEST2(name)
#define DECL_UNARY(name)                                                                          \
    WIDTH_DECL(name, _r) WIDTH_DECL(name, _m) WIDTH_DECL(name, _mx) WIDTH_DECL(name, _m_slow) WIDTH_DECL(name, _lock)
#define DECL_SHIFT(name)                                                                          \
    WIDTH_DECL(name, _ri) WIDTH_DECL(name, _rz) WIDTH_DECL(name, _rc) WIDTH_DECL(name, _m)        \
    WIDTH_DECL(name, _mx) WIDTH_DECL(name, _m_slow)
#define DECL_MOVES(name)
#define DECL_EXTEND(name)
#define DECL_JCC(name)
#define DECL_SETCC(name)
#define DECL_CMOV(name)
#define DECL_SIMD(name)
#define DECL_SIMD_STORE(name)
#define DECL_VEX_SIMD(name)
#define OPERATION(name, cls, mnem, feat, rd, wr, un) DECL_##cls(name)
#include "../isa/isa.def"
/* CMP and TEST only read: other forms. */
#define READ_ONLY_DECL(name)                                                                      \
    WIDTH_DECL(name, _rr) WIDTH_DECL(name, _ri) WIDTH_DECL(name, _rm) WIDTH_DECL(name, _mr)       \
    WIDTH_DECL(name, _mi) WIDTH_DECL(name, _m_slow)                                               \
    WIDTH_DECL(name, _rmx) WIDTH_DECL(name, _mrx) WIDTH_DECL(name, _mix)
READ_ONLY_DECL(test)
WIDTH_DECL(cmp, _m_slow)
WIDTH_DECL(mov, _rr) WIDTH_DECL(mov, _ri) WIDTH_DECL(mov, _rm) WIDTH_DECL(mov, _mr) WIDTH_DECL(mov, _mi)
WIDTH_DECL(mov, _rmx) WIDTH_DECL(mov, _mrx) WIDTH_DECL(mov, _mix)
WIDTH_DECL(mov, _rm_slow) WIDTH_DECL(mov, _m_slow)

/* A memory form with an index comes right behind the one without. */
enum alu_form { RR, RI, RM, RMX, MR, MRX, MI, MIX, LOCKED, RM_SLOW, MR_SLOW, MI_SLOW, ALU_FORMS };
#define ALU_ROW(name)                                                                             \
    { WIDTH_LIST(name, _rr), WIDTH_LIST(name, _ri), WIDTH_LIST(name, _rm), WIDTH_LIST(name, _rmx), \
      WIDTH_LIST(name, _mr), WIDTH_LIST(name, _mrx), WIDTH_LIST(name, _mi), WIDTH_LIST(name, _mix), \
      WIDTH_LIST(name, _lock), WIDTH_LIST(name, _rm_slow),                 \
      WIDTH_LIST(name, _mr_slow), WIDTH_LIST(name, _mi_slow) }
#define READ_ONLY_ROW(name)                                                                       \
    { WIDTH_LIST(name, _rr), WIDTH_LIST(name, _ri), WIDTH_LIST(name, _rm), WIDTH_LIST(name, _rmx), \
      WIDTH_LIST(name, _mr), WIDTH_LIST(name, _mrx), WIDTH_LIST(name, _mi), WIDTH_LIST(name, _mix), { 0 }, WIDTH_LIST(name, _m_slow), WIDTH_LIST(name, _m_slow),         \
      WIDTH_LIST(name, _m_slow) }
static const kvs_handler alu_handlers[][ALU_FORMS][4] = {
    ALU_ROW(add), ALU_ROW(or), ALU_ROW(adc), ALU_ROW(sbb), ALU_ROW(and), ALU_ROW(sub), ALU_ROW(xor),
    READ_ONLY_ROW(cmp), READ_ONLY_ROW(test),
    { WIDTH_LIST(mov, _rr), WIDTH_LIST(mov, _ri), WIDTH_LIST(mov, _rm), WIDTH_LIST(mov, _rmx),
      WIDTH_LIST(mov, _mr), WIDTH_LIST(mov, _mrx), WIDTH_LIST(mov, _mi), WIDTH_LIST(mov, _mix), { 0 }, WIDTH_LIST(mov, _rm_slow), WIDTH_LIST(mov, _m_slow), WIDTH_LIST(mov, _m_slow) },
};
static int alu_index(uint32_t op)
{
    switch (op) {
    case OP_add: return 0;
    case OP_or: return 1;
    case OP_adc: return 2;
    case OP_sbb: return 3;
    case OP_and: return 4;
    case OP_sub: return 5;
    case OP_xor: return 6;
    case OP_cmp: return 7;
    case OP_test: return 8;
    default: return 9;
    }
}

enum unary_form { UR, UM, UMX, UM_SLOW, ULOCK, UNARY_FORMS };
#define UNARY_ROW(name) \
    { WIDTH_LIST(name, _r), WIDTH_LIST(name, _m), WIDTH_LIST(name, _mx), WIDTH_LIST(name, _m_slow), WIDTH_LIST(name, _lock) }
static const kvs_handler unary_handlers[][UNARY_FORMS][4] = { UNARY_ROW(inc), UNARY_ROW(dec), UNARY_ROW(neg), UNARY_ROW(not) };

enum shift_form { SI, SZ, SC, SM, SMX, SM_SLOW, SHIFT_FORMS };
#define SHIFT_LIST(name) { WIDTH_LIST(name, _ri), WIDTH_LIST(name, _rz), WIDTH_LIST(name, _rc), WIDTH_LIST(name, _m), WIDTH_LIST(name, _mx), WIDTH_LIST(name, _m_slow) }
static const kvs_handler shift_handlers[][SHIFT_FORMS][4] = {
    SHIFT_LIST(rol), SHIFT_LIST(ror), SHIFT_LIST(rcl), SHIFT_LIST(rcr), SHIFT_LIST(shl), SHIFT_LIST(shr), SHIFT_LIST(sar),
};

/* [source 8, 16, 32][destination 16, 32, 64][register, memory, with index, slow] */
#define SX_DECL(name) OP(name##_r); OP(name##_m); OP(name##_mx); OP(name##_m_slow);
#define SX_ROW(name) { op_##name##_r, op_##name##_m, op_##name##_mx, op_##name##_m_slow }
#define SX3(X, name) X(name##_16) X(name##_32) X(name##_64)
SX3(SX_DECL, movzx8) SX3(SX_DECL, movzx16)
SX3(SX_DECL, movsx8) SX3(SX_DECL, movsx16) SX3(SX_DECL, movsx32)
#define SX3_ROW(name) { SX_ROW(name##_16), SX_ROW(name##_32), SX_ROW(name##_64) }
static const kvs_handler movzx_handlers[2][3][4] = { SX3_ROW(movzx8), SX3_ROW(movzx16) };
static const kvs_handler movsx_handlers[3][3][4] = { SX3_ROW(movsx8), SX3_ROW(movsx16), SX3_ROW(movsx32) };

static const kvs_handler help_handlers[OP_COUNT] = {
#define LIST_HELP(name) [OP_##name] = op_##name,
#define LIST_ALU2(name)
#define LIST_TEST2(name)
#define LIST_UNARY(name)
#define LIST_SHIFT(name)
#define LIST_MOVES(name)
#define LIST_EXTEND(name)
#define LIST_JCC(name)
#define LIST_SETCC(name)
#define LIST_CMOV(name)
#define LIST_SIMD(name)
#define LIST_SIMD_STORE(name)
#define LIST_VEX_SIMD(name)
#define OPERATION(name, cls, mnem, feat, rd, wr, un) LIST_##cls(name)
#include "../isa/isa.def"
};

#define CONDITIONS(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11) X(12) X(13) X(14) X(15)
#define COND_DECL(cc) OP(setcc_##cc); OP(cmov32_##cc); OP(cmov64_##cc);
CONDITIONS(COND_DECL)
#define SETCC_ROW(cc) op_setcc_##cc,
#define CMOV32_ROW(cc) op_cmov32_##cc,
#define CMOV64_ROW(cc) op_cmov64_##cc,
static const kvs_handler setcc_handlers[16] = { CONDITIONS(SETCC_ROW) };
static const kvs_handler cmov32_handlers[16] = { CONDITIONS(CMOV32_ROW) };
static const kvs_handler cmov64_handlers[16] = { CONDITIONS(CMOV64_ROW) };
extern const kvs_handler jcc_handlers[16];
extern const kvs_handler fused_handlers[2][3][2][16];
OP(setcc_m);
OP(cmov_any);
OP(lea32);
OP(lea64);
OP(push64);
OP(push64_i);
OP(pop64);
OP(push32);
OP(push32_i);
OP(pop32);
OP(leave32);
OP(call32);
OP(call_ind32);
OP(jmp_ind32);
OP(ret32);
OP(xchg32_rr);
OP(xchg64_rr);
OP(imul2_32rr);
OP(imul2_64rr);
OP(mul_64r);

/* ---- operands ---- */
static bool is_byte_kind(uint32_t k)
{
    return k == Eb || k == Gb || k == Zb || k == AL_ || k == Ob || k == Xb || k == Yb;
}

static bool is_memory_kind(uint32_t k)
{
    return (k >= Eb && k <= Ey) || (k >= M_ && k <= RyMd) || (k >= Wx && k <= Wm) || k == Qq || k == Qd;
}

/* Without REX, byte registers 4-7 are AH, CH, DH, BH: byte 1 of registers 0-3. */
static uint8_t byte_offset(const struct decoded *d, uint32_t reg)
{
    return (uint8_t)(!d->rex && reg >= 4 && reg < 8 ? (reg - 4) * 8 + 1 : reg * 8);
}

static uint8_t operand_register(const struct decoded *d, uint32_t k)
{
    uint32_t z = (d->opcode & 7u) | (d->rex & 1u) << 3;
    switch (k) {
    case Eb: return byte_offset(d, d->rm);
    case Gb: return byte_offset(d, d->reg);
    case Zb: return byte_offset(d, z);
    case Zv: return (uint8_t)z;
    case Gw: case Gd: case Gq: case Gv: case Gy: case Cr: case Dr: case Vx: case Vl: return d->reg;
    case Hx: case Hl: case By: return d->vvvv;
    case Sw: case Pq: return d->reg & 7;
    case Qq: case Qd: case Nq: case STi: return d->rm & 7;
    case AL_: case AX_: case rAX: case eAX_: case ST0_: case XMM0_: return 0;
    case CL_: return RCX;
    case DX_: return RDX;
    case ES_: return SEG_ES;
    case CS_: return SEG_CS;
    case SS_: return SEG_SS;
    case DS_: return SEG_DS;
    case FS_: return SEG_FS;
    case GS_: return SEG_GS;
    default: return d->rm;
    }
}

static uint8_t operand_field(const struct decoded *d, uint32_t k)
{
    if (k == Ob || k == Ov) return INSN_MEM;
    if (k == NA || (k >= Ib && k <= Ap)) return INSN_MEM; /* immediate: handlers look at imm */
    return d->is_mem && is_memory_kind(k) ? INSN_MEM : operand_register(d, k);
}

static bool has_vector_index(const struct decoded *d) { return isa_row[d->row].k[1] == Mvd || isa_row[d->row].k[1] == Mvq; }

/* The second operand is the first one after the destination that VEX.vvvv does not name. */
static void vex_operands(const struct decoded *d, struct kvs_insn *out)
{
    const uint8_t *k = isa_row[d->row].k;
    uint32_t n = k[1] == Hx || k[1] == Hl || k[1] == By ? 2 : 1;
    out->src = operand_field(d, k[n]);
    out->imm = (d->imm & 0xff) | (uint64_t)d->vvvv << 8 | (uint64_t)d->vl << 18;
    if (has_vector_index(d)) out->imm |= (uint64_t)(d->index == NO_INDEX ? 4 : d->index) << 12 | (uint64_t)d->scale << 16;
}

/*
 * The displacement is kept sign-extended; a large negative one is meant as an address in the upper half. What does
 * not fit 32 bits all the same takes the slow path.
 */
#define LARGE_NEGATIVE (-(1 << 24))
static void address_flat32(const struct decoded *d, struct kvs_insn *out)
{
    if (d->asize != 4 || (d->seg != SEG_DS && d->seg != SEG_SS && d->seg != SEG_ES)) return;
    if (out->disp < LARGE_NEGATIVE) {
        if (out->base == GPR_ZERO) out->base = GPR_4G;
        else if (out->index == NO_INDEX) out->index = GPR_4G;
        if (out->index == GPR_4G) out->scale = 0;
    }
    out->seg = d->seg | INSN_FAST;
}

static void address(const struct decoded *d, uint32_t mode, uint16_t off, struct kvs_insn *out)
{
    int64_t disp = d->disp;
    out->base = d->base;
    out->index = d->index;
    out->scale = d->scale;
    if (has_vector_index(d)) {
        out->index = NO_INDEX;
        out->scale = 0;
    }
    out->seg = d->seg;
    if (d->rip_relative) {
        disp += off + d->length;
        if (disp > INT32_MAX) { /* only with the index free, which RIP-relative forms have */
            disp -= GPR_BIAS_VALUE;
            out->index = GPR_BIAS;
        }
    }
    out->disp = (int32_t)disp;
    if (d->op == OP_lea) return; /* an offset: no segment base */
    if (!(mode & MODE_FLAT)) return;
    if ((mode & MODE_SIZE) == MODE_32) {
        address_flat32(d, out);
        return;
    }
    if (d->asize != 8) return;
    /* LEA and its like compute an offset: no segment base. */
    if ((d->seg != SEG_FS && d->seg != SEG_GS) || (d->attr & A_NOFAULT)) {
        out->seg = d->seg | INSN_FAST;
        return;
    }
    uint8_t base = d->seg == SEG_FS ? GPR_FSBASE : GPR_GSBASE;
    if (out->index == NO_INDEX) out->index = base;
    else if (out->base == GPR_ZERO) out->base = base;
    else return;
    if (out->index == base) out->scale = 0;
    out->seg = d->seg | INSN_FAST;
}

static uint32_t width_index(uint32_t size) { return size == 1 ? 0 : size == 2 ? 1 : size == 4 ? 2 : 3; }

static uint32_t has_index(const struct kvs_insn *out) { return out->index != NO_INDEX; }

static kvs_handler two_operand(const struct decoded *d, const struct kvs_insn *out)
{
    const uint8_t *k = isa_row[d->row].k;
    uint32_t w = width_index(INSN_OSIZE(out));
    bool imm = k[1] >= Ib && k[1] <= I1, fast = out->seg & INSN_FAST;
    uint32_t form;
    if (d->lock) form = LOCKED;
    else if (out->dst == INSN_MEM) form = imm ? (fast ? MI + has_index(out) : MI_SLOW) : fast ? MR + has_index(out) : MR_SLOW;
    else if (imm) form = RI;
    else form = out->src == INSN_MEM ? (fast ? RM + has_index(out) : RM_SLOW) : RR;
    return alu_handlers[alu_index(d->op)][form][w];
}

static kvs_handler shift(const struct decoded *d, struct kvs_insn *out)
{
    static const uint8_t index[] = { [OP_rol] = 0, [OP_ror] = 1, [OP_rcl] = 2, [OP_rcr] = 3, [OP_shl] = 4, [OP_shr] = 5, [OP_sar] = 6 };
    bool by_cl = isa_row[d->row].k[1] == CL_;
    uint32_t w = width_index(INSN_OSIZE(out)), form = by_cl ? SC : SI;
    if (!by_cl) {
        out->imm &= INSN_OSIZE(out) == 8 ? 63 : 31;
        if (!out->imm) form = SZ;
    }
    if (out->dst == INSN_MEM) form = out->seg & INSN_FAST ? SM + has_index(out) : SM_SLOW;
    return shift_handlers[index[d->op]][form][w];
}

static kvs_handler extend(const struct decoded *d, const struct kvs_insn *out)
{
    uint32_t from = isa_row[d->row].k[1] == Eb ? 0 : isa_row[d->row].k[1] == Ew ? 1 : 2;
    uint32_t to = d->osize == 2 ? 0 : d->osize == 4 ? 1 : 2;
    uint32_t form = out->src != INSN_MEM ? 0 : out->seg & INSN_FAST ? 1 + has_index(out) : 3;
    return d->op == OP_movzx ? movzx_handlers[from][to][form] : movsx_handlers[from][to][form];
}

/* The quick forms on a flat 32-bit stack. */
static const uint32_t stack_flat32 = MODE_FLAT | MODE_STACK32;
static kvs_handler help_flat32(const struct decoded *d, uint32_t mode, const struct kvs_insn *out)
{
    switch (d->op) {
    case OP_push: return out->dst != INSN_MEM ? op_push32 : NULL;
    case OP_push_i: return op_push32_i;
    case OP_pop: return out->dst != INSN_MEM ? op_pop32 : NULL;
    case OP_leave: return op_leave32;
    default: break;
    }
    if (!(mode & MODE_CSFLAT)) return NULL; /* a limit for the target */
    switch (d->op) {
    case OP_call: return op_call32;
    case OP_call_ind: return op_call_ind32;
    case OP_jmp_ind: return op_jmp_ind32;
    case OP_ret: return op_ret32;
    default: return NULL;
    }
}

/* A MOV with an operand that has a displacement alone. */
static kvs_handler moffs_flat32(const struct decoded *d, struct kvs_insn *out)
{
    out->disp = (int32_t)d->imm;
    address_flat32(d, out);
    return out->seg & INSN_FAST ? two_operand(d, out) : op_mov_moffs;
}

/* The plain handlers of operations that also have quick forms. */
static kvs_handler help(const struct decoded *d, uint32_t mode, struct kvs_insn *out)
{
    bool code64 = (mode & MODE_SIZE) == MODE_64 && (mode & MODE_FLAT);
    if ((mode & stack_flat32) == stack_flat32 && (mode & MODE_SIZE) == MODE_32 && d->osize == 4) {
        kvs_handler h = help_flat32(d, mode, out);
        if (h) return h;
    }
    switch (d->op) {
    case OP_lea:
        if (d->asize == 8 && d->osize == 8) return op_lea64;
        if (d->asize >= 4 && d->osize >= 4) return op_lea32; /* either size cuts to 32 bits */
        break;
    case OP_push:
        if (code64 && d->osize == 8 && out->dst != INSN_MEM) return op_push64;
        break;
    case OP_push_i:
        if (code64 && d->osize == 8) return op_push64_i;
        break;
    case OP_pop:
        if (code64 && d->osize == 8 && out->dst != INSN_MEM) return op_pop64;
        break;
    case OP_mov_moffs:
        if ((mode & MODE_FLAT) && (mode & MODE_SIZE) == MODE_32) return moffs_flat32(d, out);
        break;
    case OP_xchg:
        if (out->dst != INSN_MEM && INSN_OSIZE(out) == 8) return op_xchg64_rr;
        if (out->dst != INSN_MEM && INSN_OSIZE(out) == 4) return op_xchg32_rr;
        break;
    case OP_imul2:
        if (out->src != INSN_MEM && d->osize == 8) return op_imul2_64rr;
        if (out->src != INSN_MEM && d->osize == 4) return op_imul2_32rr;
        break;
    case OP_mul:
        if (out->dst != INSN_MEM && INSN_OSIZE(out) == 8) return op_mul_64r;
        break;
    default: break;
    }
    return help_handlers[d->op];
}

/* #UD and #NM that the mode decides. SDM 3A "System Programming for Instruction Set Extensions" */
static kvs_handler unavailable(const struct decoded *d, uint32_t mode)
{
    if ((d->attr & A_X87) && (mode & MODE_X87_NM)) return op_nm;
    if ((d->attr & A_MMX) && (mode & MODE_MMX_UD)) return op_ud;
    if ((d->attr & A_SSE) && (mode & MODE_SSE_UD)) return op_ud;
    if ((d->attr & A_AVX) && (mode & MODE_AVX_UD)) return op_ud;
    if ((d->attr & (A_MMX | A_SSE | A_AVX)) && (mode & MODE_SIMD_NM)) return op_nm;
    return NULL;
}

void lower(struct kvs_vcpu *c, const struct decoded *d, uint32_t mode, uint16_t off, struct kvs_insn *out)
{
    const uint8_t *k = isa_row[d->row].k;
    memset(out, 0, sizeof *out);
    out->off = off;
    out->len = d->length;
    uint32_t size = is_byte_kind(k[0]) || is_byte_kind(k[1]) ? 1 : d->osize;
    if (isa_op[d->op].cls == EXTEND) size = d->osize;
    if ((k[0] == eAX_ || k[1] == eAX_ || k[0] == Xz || k[1] == Xz || k[0] == Yz || k[1] == Yz) && size == 8) size = 4;
    out->osize = (uint8_t)(size | (uint32_t)d->asize << 4);
    out->imm = d->imm;
    out->seg = d->seg;
    out->base = out->index = GPR_ZERO;
    out->flags = (uint8_t)(d->cond | (d->rep == 0xf3 ? INSN_REPE : d->rep == 0xf2 ? INSN_REPNE : 0) | (d->lock ? INSN_LOCK : 0));
    out->dst = operand_field(d, k[0]);
    out->src = operand_field(d, k[1]);
    if (d->vex) vex_operands(d, out);
    if (d->is_mem) address(d, mode, off, out);
    if (d->attr & A_X87) out->imm = (d->opcode & 7u) << 8 | d->modrm; /* FOP */
    kvs_handler h = unavailable(d, mode);
    if (h) {
        out->fn = h;
        return;
    }
    switch (isa_op[d->op].cls) {
    case ALU2: case TEST2: case MOVES: h = two_operand(d, out); break;
    case UNARY: {
        uint32_t n = d->op == OP_inc ? 0 : d->op == OP_dec ? 1 : d->op == OP_neg ? 2 : 3;
        uint32_t form = d->lock ? ULOCK : out->dst != INSN_MEM ? UR : out->seg & INSN_FAST ? UM + has_index(out) : UM_SLOW;
        h = unary_handlers[n][form][width_index(size)];
        break;
    }
    case SHIFT: h = shift(d, out); break;
    case EXTEND: h = extend(d, out); break;
    case JCC:
        h = jcc_handlers[d->cond];
        out->disp = (int32_t)d->imm;
        out->target = NULL;
        break;
    case SETCC: h = out->dst == INSN_MEM ? op_setcc_m : setcc_handlers[d->cond]; break;
    case CMOV:
        h = op_cmov_any;
        if (out->src != INSN_MEM && size == 8) h = cmov64_handlers[d->cond];
        if (out->src != INSN_MEM && size == 4) h = cmov32_handlers[d->cond];
        break;
    case SIMD: case SIMD_STORE: h = simd_handler(d, mode); break;
    case VEX_SIMD: h = vex_handler(d, mode); break;
    default: h = help(d, mode, out); break;
    }
    if (k[0] == Jb || k[0] == Jz) {
        out->disp = (int32_t)d->imm;
        out->target = NULL;
    }
    if (k[0] == Ap) out->imm = d->imm | (uint64_t)d->imm2 << 32;
    if (k[0] == Iwb) out->imm = d->imm | (uint64_t)d->imm2 << 16;
    if (d->op == OP_shld || d->op == OP_shrd) out->flags = (uint8_t)((out->flags & 0xf0) | (k[2] == CL_));
    out->fn = h;
}

bool lower_fused(const struct decoded *d, const struct decoded *jcc, uint32_t mode, struct kvs_insn *out)
{
    if ((d->op != OP_cmp && d->op != OP_test) || isa_op[jcc->op].cls != JCC || d->is_mem || d->lock) return false;
    uint32_t size = INSN_OSIZE(out);
    bool imm = out->src == INSN_MEM;
    /* A relative branch of 16-bit operand size truncates the target: left to the plain handler. */
    if (size == 2 || !(mode & MODE_CSFLAT) || jcc->osize == 2) return false;
    out->fn = fused_handlers[d->op == OP_test][size == 1 ? 0 : size == 4 ? 1 : 2][imm][jcc->cond];
    if (imm) st32(&out->base, (uint32_t)d->imm); /* base, index, scale, seg: sign-extended on use */
    out->disp = (int32_t)jcc->imm;
    out->target = NULL;
    out->len = (uint8_t)(d->length + jcc->length);
    out->osize = (uint8_t)(jcc->osize | (out->osize & 0xf0));
    out->flags = (uint8_t)(jcc->cond | INSN_FUSED);
    return true;
}
