/*
 * Struct decoded to text, in Intel syntax as GNU objdump -M intel prints it: sizes on every memory operand,
 * prefixes that mean nothing printed by name, pseudo-operations for comparison predicates.
 */
#include "isa.h"

#include <stdarg.h>
#include <stdio.h>

struct text {
    const struct decoded *d;
    const struct row_info *row;
    uint64_t rip;
    uint32_t bits;
    char *out;
    uint32_t size, length;
    /* what the operands have made use of; the rest is printed as prefixes */
    bool used66, used67, used_seg;
    uint8_t used_rex;
    bool comment;
    uint64_t comment_value;
};

static void put(struct text *t, const char *format, ...) __attribute__((format(printf, 2, 3)));
static void put(struct text *t, const char *format, ...)
{
    va_list a;
    if (t->length + 1 >= t->size) return;
    va_start(a, format);
    int n = vsnprintf(t->out + t->length, t->size - t->length, format, a);
    va_end(a);
    if (n > 0) t->length += (uint32_t)n;
    if (t->length >= t->size) t->length = t->size - 1;
}

static const char names64[16][4] = { "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15" };
static const char names8[16][5] = { "al", "cl", "dl", "bl", "spl", "bpl", "sil", "dil", "r8b", "r9b", "r10b", "r11b", "r12b", "r13b", "r14b", "r15b" };
static const char names8_old[8][3] = { "al", "cl", "dl", "bl", "ah", "ch", "dh", "bh" };
static const char names_seg[8][3] = { "es", "cs", "ss", "ds", "fs", "gs", "?", "?" };

static void put_reg(struct text *t, uint32_t n, uint32_t size)
{
    n &= 15;
    switch (size) {
    case 1:
        if (n >= 4 && n <= 7) t->used_rex |= t->d->rex & 0x40; /* SPL to DIL need a REX */
        put(t, "%s", t->d->rex || n > 7 ? names8[n] : names8_old[n]);
        break;
    case 2: put(t, n < 8 ? "%s" : "%sw", n < 8 ? names64[n] + 1 : names64[n]); break;
    case 4: put(t, n < 8 ? "e%s" : "%sd", n < 8 ? names64[n] + 1 : names64[n]); break;
    default: put(t, "%s", names64[n]); break;
    }
}

static void use_rex(struct text *t, uint8_t bits)
{
    if (t->d->rex & bits) t->used_rex |= 0x40 | (t->d->rex & bits);
}
/* The operand size was printed: whichever prefix made it is accounted for. */
static void use_osize(struct text *t)
{
    if (t->bits == 64 && (t->d->rex & 8) && !(t->d->attr & (A_D64 | A_F64))) use_rex(t, 8);
    else if (!(t->d->attr & (A_F64 | A_W0OSZ)) || t->bits != 64) t->used66 = true;
}

static void put_value(struct text *t, uint64_t v)
{
    if (t->bits == 64) put(t, "0x%llx", (unsigned long long)v);
    else put(t, "0x%x", (unsigned)v);
}
static void put_displacement(struct text *t, int64_t v)
{
    if (v < 0) put(t, "-0x%llx", (unsigned long long)(0 - (uint64_t)v));
    else put(t, "0x%llx", (unsigned long long)v);
}

/* 3E before an indirect branch. SDM 1 "Control-flow Enforcement Technology": no-track prefix */
static bool is_notrack(const struct decoded *d)
{
    return (d->op == OP_jmp_ind || d->op == OP_call_ind) && (!d->seg_override || d->seg == SEG_DS);
}

static void put_segment(struct text *t)
{
    if (!t->d->seg_override || is_notrack(t->d)) return;
    t->used_seg = true;
    put(t, "%s:", names_seg[t->d->seg]);
}

static void memory16(struct text *t)
{
    static const char forms[8][6] = { "bx+si", "bx+di", "bp+si", "bp+di", "si", "di", "bp", "bx" };
    const struct decoded *d = t->d;
    uint32_t rm = d->modrm & 7;
    if (d->mod == 0 && rm == 6) {
        if (!t->used_seg) put(t, "ds:");
        put_value(t, (uint16_t)d->disp);
        return;
    }
    put(t, "[%s", forms[rm]);
    if (d->disp || d->mod) {
        if (d->disp >= 0) put(t, "+");
        put_displacement(t, d->disp);
    }
    put(t, "]");
}

static void put_vector(struct text *t, uint32_t n, const char *file) { put(t, "%s%u", file, n); }
static void put_vector_l(struct text *t, uint32_t n) { put_vector(t, n, t->d->vl ? "ymm" : "xmm"); }
static bool has_vector_index(const struct text *t) { return t->row->k[1] == Mvd || t->row->k[1] == Mvq; }
/* Doubleword indices of quadwords need but half a register. */
static bool wide_index(const struct decoded *d)
{
    bool quadwords = isa_row[d->row].k[1] == Mvq, quadword_indices = d->opcode & 1;
    return d->vl && !(quadwords && !quadword_indices);
}

static void memory32(struct text *t)
{
    const struct decoded *d = t->d;
    bool has_sib = (d->modrm & 7) == 4, has_base = d->base < 16, has_index = d->index < 16 || has_vector_index(t);
    bool long_names = d->asize == 8, vector = has_vector_index(t);
    bool disp32_only = !has_base && !d->rip_relative;
    bool need_index = has_sib && !has_base && !has_index && t->bits != 16 && d->asize == 4;
    bool bracket = has_base || need_index || (has_sib && (has_index || d->scale)) || d->rip_relative;
    /* d->scale is kept only with an index; the encoding is needed to show what it says. */
    use_rex(t, 1);
    if (has_sib) use_rex(t, 2);
    if (!bracket) {
        if (t->bits == 16) t->used67 = false;
        if (!t->used_seg) put(t, "ds:");
        put_value(t, (uint64_t)d->disp);
        return;
    }
    if (t->bits == 16 && !has_base && !has_index) t->used67 = false;
    put(t, "[");
    if (d->rip_relative) {
        put(t, "%s+", d->asize == 8 ? "rip" : "eip");
        put_value(t, (uint64_t)d->disp);
        t->comment = true;
        t->comment_value = t->rip + d->length + (uint64_t)d->disp;
        put(t, "]");
        return;
    }
    if (has_base) put_reg(t, d->base, long_names ? 8 : 4);
    if (has_sib && (d->scale || need_index || has_index || (d->base & 7) != RSP)) {
        if (has_base) put(t, "+");
        if (vector) put_vector(t, d->index < 16 ? d->index : 4, wide_index(d) ? "ymm" : "xmm");
        else if (has_index) put_reg(t, d->index, long_names ? 8 : 4);
        else put(t, long_names ? "riz" : "eiz");
        put(t, "*%d", 1 << d->scale);
    }
    if (d->disp || d->mod || disp32_only || (has_base && (d->base & 7) == RBP)) {
        int64_t disp = d->disp;
        if (need_index && t->bits == 64) disp = (uint32_t)disp; /* EIZ stands for the truncation */
        if (disp >= 0) put(t, "+");
        put_displacement(t, disp);
    }
    put(t, "]");
}

static void put_memory(struct text *t)
{
    t->used67 = true;
    put_segment(t);
    if (t->d->asize == 2) memory16(t);
    else memory32(t);
}

static void put_size(struct text *t, uint32_t size)
{
    switch (size) {
    case 1: put(t, "BYTE PTR "); break;
    case 2: put(t, "WORD PTR "); break;
    case 4: put(t, "DWORD PTR "); break;
    case 6: put(t, "FWORD PTR "); break;
    case 8: put(t, "QWORD PTR "); break;
    case 10: put(t, "TBYTE PTR "); break;
    case 16: put(t, "XMMWORD PTR "); break;
    case 32: put(t, "YMMWORD PTR "); break;
    default: break;
    }
}

static void put_string_operand(struct text *t, uint32_t k, uint32_t size)
{
    bool dest = k == Yb || k == Yv || k == Yz;
    t->used67 = true;
    if (k == Xz || k == Yz) t->used66 = true;
    else if (size > 1) use_osize(t);
    put_size(t, size);
    if (dest) put(t, "es:[");
    else {
        t->used_seg = true;
        put(t, "%s:[", names_seg[t->d->seg]);
    }
    put_reg(t, dest ? RDI : RSI, t->d->asize);
    put(t, "]");
}

static uint64_t mask_to(uint64_t v, uint32_t size) { return size == 8 ? v : v & ((1ull << 8 * size) - 1); }

static void put_target(struct text *t, bool near32)
{
    uint64_t segment = (t->rip + t->d->length) & 0xffff0000;
    if (near32 && t->bits != 64) {
        t->used66 = true;
        if (t->d->opsize66) segment = 0;
    }
    uint64_t target = t->rip + t->d->length + t->d->imm;
    if (t->bits == 64) put(t, "0x%llx", (unsigned long long)target);
    else if (near32 && t->d->osize == 2) put(t, "0x%x", (unsigned)(segment | (target & 0xffff)));
    else put(t, "0x%x", (unsigned)target);
}

static void put_rm(struct text *t, uint32_t size, uint32_t memory_size)
{
    if (t->d->is_mem) {
        put_size(t, memory_size);
        put_memory(t);
    } else {
        use_rex(t, 1);
        put_reg(t, t->d->rm, size);
    }
}

static bool is(const struct text *t, const char *m) { return !strcmp(isa_op[t->d->op].mnemonic, m); }

/* Operand n. */
static void put_operand(struct text *t, int n)
{
    const struct decoded *d = t->d;
    uint32_t k = t->row->k[n], size = operand_size(d, n);
    switch (k) {
    case Rv:
        if (t->row->k[1 - n] == Cr || t->row->k[1 - n] == Dr) size = t->bits == 64 ? 8 : 4; /* as wide as the mode */
        else use_osize(t);
        put_rm(t, size, size);
        break;
    case Ev: use_osize(t); put_rm(t, size, size); break;
    case Ew: put_rm(t, d->op == OP_lar || d->op == OP_lsl ? d->osize : size, size); break;
    case Eb: case Ed: case Eq: case Rd:
    case Mb: case Mw: case Md: case Mq: case Mdq: case Mt: put_rm(t, size, is(t, "lddqu") || is(t, "invpcid") ? 0 : size); break;
    case Rq: put_rm(t, t->bits == 64 ? 8 : 4, 8); break;
    case Ey: case Ry: use_rex(t, 8); put_rm(t, size, size); break;
    case RyMd: use_rex(t, 8); put_rm(t, size, 4); break;
    case RdMb: put_rm(t, 4, 1); break;
    case RdMw: put_rm(t, 4, 2); break;
    case Gv: use_osize(t); use_rex(t, 4); put_reg(t, d->reg, size); break;
    case Gy: use_rex(t, 12); put_reg(t, d->reg, d->op == OP_invpcid && t->bits == 64 ? 8 : size); break;
    case Gb: case Gw: case Gd: case Gq:
        use_rex(t, 4);
        if (k == Gd && (d->rex & 8) && (d->attr & A_W0OSZ) && !is(t, "pextrw")) { /* PMOVMSKB and the like: the upper half is zero */
            use_rex(t, 8);
            size = 8;
        }
        if (k == Gd && d->vex && d->vw && t->bits == 64 && !is(t, "vpextrw")) size = 8;
        put_reg(t, d->reg, size);
        break;
    case Zv: use_osize(t); use_rex(t, 1); put_reg(t, (d->opcode & 7) | (d->rex & 1) << 3, size); break;
    case Zb: use_rex(t, 1); put_reg(t, (d->opcode & 7) | (d->rex & 1) << 3, 1); break;
    case M_: put_memory(t); break;
    case Mp: t->used66 = true; put_size(t, d->osize == 2 ? 4 : 6); put_memory(t); break;
    case Ma: use_osize(t); put_size(t, d->osize * 2u); put_memory(t); break;
    case Ms: case Mf: put_memory(t); break;
    case Ib: put(t, "0x%llx", (unsigned long long)mask_to(d->imm, 1)); break;
    case Ibs: case Iz: case Iv: {
        /* As wide as the operation it belongs to. */
        uint32_t width = n && operand_size(d, 0) ? operand_size(d, 0) : d->osize;
        if (k != Ibs || width != 1) use_osize(t);
        put(t, "0x%llx", (unsigned long long)mask_to(d->imm, width));
        break;
    }
    case Iw: put(t, "0x%llx", (unsigned long long)mask_to(d->imm, 2)); break;
    case I1: put(t, "1"); break;
    case Iwb: put(t, "0x%x,0x%x", (unsigned)(uint16_t)d->imm, d->imm2); break;
    case Jb: case Jz: put_target(t, k == Jz); break;
    case Ap: use_osize(t); put(t, "0x%x:0x%llx", d->imm2, (unsigned long long)d->imm); break;
    case Ob: case Ov:
        if (d->asize == 8 || t->bits != 64) t->used67 = t->bits != 64 ? false : true;
        put_segment(t);
        if (!t->used_seg) put(t, "ds:");
        put(t, "0x%llx", (unsigned long long)d->imm);
        break;
    case Sw: put(t, "%s", names_seg[d->reg & 7]); break;
    case Cr: use_rex(t, 4); put(t, "cr%u", d->reg); break;
    case Dr: use_rex(t, 4); put(t, t->bits == 64 || d->reg < 8 ? "dr%u" : "db%u", d->reg); break;
    case AL_: put(t, "al"); break;
    case AX_: put(t, "ax"); break;
    case CL_: put(t, "cl"); break;
    case DX_: put(t, "dx"); break;
    case eAX_: t->used66 = true; put_reg(t, RAX, size); break;
    case rAX: use_osize(t); put_reg(t, RAX, size); break;
    case ES_: case CS_: case SS_: case DS_: case FS_: case GS_: put(t, "%s", names_seg[k - ES_]); break;
    case Xb: case Xv: case Yb: case Yv: case Xz: case Yz: put_string_operand(t, k, size); break;
    case Vx: use_rex(t, 4); put_vector(t, d->reg, "xmm"); break;
    case Vl: put_vector_l(t, d->reg); break;
    case Hx: put_vector(t, d->vvvv, "xmm"); break;
    case Hl: put_vector_l(t, d->vvvv); break;
    case By: put_reg(t, d->vvvv, size); break;
    case Lx: put_vector(t, d->imm >> 4 & 15, "xmm"); break;
    case Ll: put_vector_l(t, d->imm >> 4 & 15); break;
    case Mvd: case Mvq: case Ml:
        if (!is(t, "vlddqu")) put_size(t, size);
        put_memory(t);
        break;
    case Wl: case Wm: case Ul:
        if (d->is_mem) { put_size(t, size); put_memory(t); }
        else put_vector_l(t, d->rm);
        break;
    case Wx: case Wq: case Wd: case Ww: case Wb: case Ux: case Wh: case Wf: case We:
        if (d->is_mem) { put_size(t, size); put_memory(t); }
        else { use_rex(t, 1); put_vector(t, d->rm, "xmm"); }
        break;
    case Pq: put_vector(t, d->reg & 7, "mm"); break;
    case Qq: case Qd: case Nq:
        if (d->is_mem) { put_size(t, size); put_memory(t); }
        else put_vector(t, d->rm & 7, "mm");
        break;
    case XMM0_: put(t, "xmm0"); break;
    case ST0_: put(t, "st"); break;
    case STi: put(t, "st(%u)", d->modrm & 7); break;
    default: break;
    }
}

static const char conditions[16][4] = { "o", "no", "b", "ae", "e", "ne", "be", "a", "s", "ns", "p", "np", "l", "ge", "le", "g" };

/* The mnemonic where it depends on more than the operation; drop: operands not to be printed. */
static void mnemonic(struct text *t, char name[32], uint32_t *drop)
{
    static const struct { const char *m; char name[4][10]; } by_size[] = { /* 16, 32, 64 bits */
        { "cbw", { "cbw", "cwde", "cdqe" } }, { "cwd", { "cwd", "cdq", "cqo" } }, { "jcxz", { "jcxz", "jecxz", "jrcxz" } },
        { "iret", { "iretw", "iret", "iretq" } },
    };
    const struct decoded *d = t->d;
    const char *m = isa_op[d->op].mnemonic;
    uint32_t size = d->osize, native = t->bits == 16 ? 2 : 4;
    snprintf(name, 32, "%s", m);
    *drop = 0;
    for (size_t i = 0; i < ARRAY_SIZE(by_size); i++) {
        if (strcmp(m, by_size[i].m)) continue;
        if (!strcmp(m, "jcxz")) { size = d->asize; t->used67 = true; }
        else use_osize(t);
        snprintf(name, 32, "%s", by_size[i].name[size == 2 ? 0 : size == 4 ? 1 : 2]);
        if (!strcmp(m, "iret") && t->bits == 16) snprintf(name, 32, size == 2 ? "iret" : "iretd");
        return;
    }
    if (d->op == OP_jcc || d->op == OP_setcc || d->op == OP_cmov) {
        snprintf(name, 32, "%s%s", m, conditions[d->cond]);
        return;
    }
    /* A size suffix where no operand shows the size. */
    static const char *const suffixed[] = { "pusha", "popa", "pushf", "popf", "leave", "enter", "ret", "retf", "call", "jmp", "lgdt", "lidt", "sgdt",
                                            "sidt", NULL };
    bool no_operand = t->row->k[0] == NA || t->row->k[0] == Iw || t->row->k[0] == Iwb || t->row->k[0] == Jz || t->row->k[0] == Ms;
    for (int i = 0; suffixed[i] && no_operand; i++) {
        if (strcmp(m, suffixed[i])) continue;
        if (!(t->bits == 64 && (d->attr & A_F64))) t->used66 = true;
        if (t->row->k[0] == Ms) {
            if (t->bits != 64) strcat(name, size == 2 ? "w" : "d");
            return;
        }
        if (size == 2 && native == 4) strcat(name, "w");
        else if (size == 4 && native == 2) strcat(name, "d");
        if (size == 8 && !strcmp(m, "retf")) { strcat(name, "q"); use_rex(t, 8); }
        return;
    }
    if (d->op == OP_prefetchw) {
        uint32_t reg = d->modrm >> 3 & 7;
        strcpy(name, reg == 1 ? "prefetchw" : reg == 2 ? "prefetchwt1" : "prefetch");
    }
    static const char *const by_rexw[][2] = { { "movd", "movq" }, { "pextrd", "pextrq" }, { "pinsrd", "pinsrq" },
        { "pcmpestrm", "pcmpestrmq" }, { "pcmpestri", "pcmpestriq" }, { "fxsave", "fxsave64" }, { "fxrstor", "fxrstor64" },
        { "xsave", "xsave64" }, { "xsaveopt", "xsaveopt64" }, { "xsavec", "xsavec64" }, { "xsaves", "xsaves64" }, { "xrstor", "xrstor64" },
        { "xrstors", "xrstors64" }, { "vmovd", "vmovq" }, { "vpextrd", "vpextrq" }, { "vpinsrd", "vpinsrq" },
        { "vpcmpestrm", "vpcmpestrmq" }, { "vpcmpestri", "vpcmpestriq" } };
    for (size_t i = 0; i < ARRAY_SIZE(by_rexw) && (d->rex & 8); i++) {
        if (strcmp(m, by_rexw[i][0])) continue;
        strcpy(name, by_rexw[i][1]);
        use_rex(t, 8);
    }
    if (d->op == OP_fneni || d->op == OP_fndisi) strcat(name, "(8087 only)");
    if (d->op == OP_fnsetpm) strcat(name, "(287 only)");
    if (t->bits == 64 && (is(t, "sysret") || is(t, "sysexit"))) {
        strcat(name, d->rex & 8 ? "q" : "d");
        use_rex(t, 8);
    }
    /* Nothing but the suffix shows the size of a pushed constant, or of FS and GS. */
    bool pushed_immediate = d->op == OP_push_i || ((d->op == OP_push_sreg || d->op == OP_pop_sreg) && d->map == M0F);
    if (pushed_immediate) t->used66 = true;
    if (pushed_immediate && d->osize == 2 && native == 4) strcat(name, "w");
    if (pushed_immediate && d->osize == 4 && native == 2) strcat(name, "d");
    if (d->op == OP_cmpxchg8b) {
        use_rex(t, 8);
        if (d->osize == 8) strcpy(name, "cmpxchg16b");
    } else if (d->op == OP_nop && d->map == M1) {
        if (d->opsize66) { strcpy(name, "xchg"); use_osize(t); }
    } else if (d->op == OP_mov_moffs) {
        if (t->bits != 64 || d->asize != 8) strcpy(name, "mov");
    } else if (d->op == OP_mov && d->osize == 8 && t->row->k[1] == Iv) strcpy(name, "movabs");
}


/* Comparison predicates and other immediates that objdump folds into the name. */
static void pseudo_operation(struct text *t, char name[32], uint32_t *drop)
{
    static const char predicates[32][9] = { "eq", "lt", "le", "unord", "neq", "nlt", "nle", "ord", "eq_uq", "nge", "ngt", "false", "neq_oq",
        "ge", "gt", "true", "eq_os", "lt_oq", "le_oq", "unord_s", "neq_us", "nlt_uq", "nle_uq", "ord_s", "eq_us", "nge_uq", "ngt_uq",
        "false_os", "neq_os", "ge_oq", "gt_oq", "true_us" };
    static const char pclmul[4][6] = { "lqlq", "hqlq", "lqhq", "hqhq" };
    const struct decoded *d = t->d;
    const char *plain = name + d->vex, *v = d->vex ? "v" : ""; /* without the V of VEX */
    bool compare = !strcmp(plain, "cmpps") || !strcmp(plain, "cmppd") || !strcmp(plain, "cmpss") || !strcmp(plain, "cmpsd");
    uint32_t immediate = d->vex ? 8 : 4; /* the operand that goes into the name */
    if (compare && t->row->k[d->vex ? 3 : 2] == Ib && d->imm < (d->vex ? 32 : 8)) {
        char suffix[3] = { plain[3], plain[4], 0 };
        snprintf(name, 32, "%scmp%s%s", v, predicates[d->imm], suffix);
        *drop |= immediate;
    } else if (!strcmp(plain, "pclmulqdq") && (d->imm < 4 || d->imm == 0x10 || d->imm == 0x11)) {
        snprintf(name, 32, "%spclmul%sdq", v, pclmul[d->imm < 4 ? d->imm : d->imm - 14]);
        *drop |= immediate;
    } else if (d->op == OP_vzero && d->vl) {
        strcpy(name, "vzeroall");
    }
}

static void operands(struct text *t, uint32_t drop)
{
    const struct decoded *d = t->d;
    if (is(t, "xlat")) {
        t->used67 = true;
        put(t, "BYTE PTR ");
        t->used_seg = true;
        put(t, "%s:[", names_seg[d->seg]);
        put_reg(t, RBX, d->asize);
        put(t, "]");
        return;
    }
    if (d->op == OP_nop && d->map == M1 && d->opsize66) {
        put(t, t->bits == 16 ? "eax,eax" : "ax,ax");
        return;
    }
    for (int n = 0; n < OPERANDS; n++) {
        if (t->row->k[n] == NA || (drop >> n & 1)) continue;
        if (n) put(t, ",");
        if (d->op == OP_cmpxchg8b) put(t, d->osize == 8 ? "OWORD PTR " : "QWORD PTR ");
        put_operand(t, n);
    }
}

struct prefix_list { uint8_t b[16]; uint32_t n; };

static const char *rep_name(const struct text *t, uint8_t b)
{
    const struct decoded *d = t->d;
    uint8_t k0 = t->row->k[0];
    if (d->attr & A_REP) return b == 0xf2 ? "repnz" : is(t, "cmps") || is(t, "scas") ? "repz" : "rep";
    if (d->is_mem && (d->lock ? (d->attr & A_LOCK) : d->op == OP_xchg)) return b == 0xf2 ? "xacquire" : "xrelease";
    if (b == 0xf3 && d->is_mem && (d->attr & A_HLE) && d->op == OP_mov) return "xrelease";
    if (b == 0xf2 && (k0 == Jb || k0 == Jz || is(t, "ret") || d->op == OP_jmp_ind || d->op == OP_call_ind) && !is(t, "loop") &&
        !is(t, "loope") && !is(t, "loopne") && !is(t, "jcxz"))
        return "bnd";
    return b == 0xf2 ? "repnz" : "repz";
}

static void put_prefixes(struct text *t, const struct prefix_list *p)
{
    static const char seg_names[6][3] = { "es", "cs", "ss", "ds", "fs", "gs" };
    const struct decoded *d = t->d;
    uint32_t seen = 0; /* bits: 66, 67, segment, F2/F3 whose last one is accounted for */
    uint32_t last_rep = 16;
    bool hide[16] = { false };
    for (uint32_t i = p->n; i-- > 0;) {
        uint8_t b = p->b[i];
        uint32_t kind = 0;
        bool used = false;
        if (b == 0x66) { kind = 1; used = t->used66 || (d->mandatory_prefix && !d->rep); }
        else if (b == 0x67) { kind = 2; used = t->used67; }
        else if (b == 0xf2 || b == 0xf3) { kind = 8; used = d->mandatory_prefix; }
        else if (b == 0xf0) kind = 16;
        else if (t->bits == 64 && (b & 0xf0) == 0x40) { kind = 32; used = t->used_rex == b; }
        else { kind = 4; used = t->used_seg; }
        if (kind == 8 && !(seen & kind)) last_rep = i;
        if (!(seen & kind) && used) hide[i] = true;
        seen |= kind;
    }
    for (uint32_t i = 0; i < p->n; i++) {
        uint8_t b = p->b[i];
        if (hide[i]) continue;
        switch (b) {
        case 0x66: put(t, t->bits == 16 ? "data32 " : "data16 "); break;
        case 0x67: put(t, t->bits == 32 ? "addr16 " : "addr32 "); break;
        case 0xf0: put(t, "lock "); break;
        case 0xf2: case 0xf3: put(t, "%s ", i == last_rep ? rep_name(t, b) : b == 0xf2 ? "repnz" : "repz"); break;
        case 0x26: case 0x2e: case 0x36: put(t, "%s ", seg_names[(b - 0x26) >> 3]); break;
        case 0x3e: put(t, is_notrack(d) && !memchr(p->b + i + 1, 0x3e, p->n - i - 1) ? "notrack " : "ds "); break;
        case 0x64: case 0x65: put(t, "%s ", seg_names[b - 0x60]); break;
        default: put(t, "rex%s%s%s%s%s ", b & 15 ? "." : "", b & 8 ? "W" : "", b & 4 ? "R" : "", b & 2 ? "X" : "", b & 1 ? "B" : ""); break;
        }
    }
}

static void format(const struct decoded *d, uint64_t rip, const struct prefix_list *p, char *out, uint32_t size)
{
    char body[128] = "", name[32];
    struct text t = { .d = d, .row = &isa_row[d->row], .rip = rip, .bits = d->bits, .out = body, .size = sizeof body };
    uint32_t drop;
    mnemonic(&t, name, &drop);
    pseudo_operation(&t, name, &drop);
    operands(&t, drop);
    uint32_t body_length = t.length;
    t.out = out;
    t.size = size;
    t.length = 0;
    out[0] = 0;
    put_prefixes(&t, p);
    if (body_length) put(&t, t.length ? "%s %s" : "%-6s %s", name, body);
    else put(&t, "%s", name);
    if (t.comment) put(&t, "        # 0x%llx", (unsigned long long)t.comment_value);
}

int32_t kvs_disassemble(const uint8_t *bytes, uint32_t count, uint32_t bits, uint64_t rip, char *text, uint32_t text_size)
{
    struct decoded d;
    struct prefix_list p = { { 0 }, 0 };
    if (!bytes || !text || !text_size || (bits != 16 && bits != 32 && bits != 64)) return 0;
    if (decode(bytes, count, bits, true, ~0ull, &d) != DECODE_OK) {
        snprintf(text, text_size, "(bad)");
        return 0;
    }
    for (uint32_t i = 0; i < d.length && p.n < sizeof p.b; i++) {
        uint8_t b = bytes[i];
        bool prefix = b == 0x66 || b == 0x67 || b == 0xf0 || b == 0xf2 || b == 0xf3 || (b & 0xe7) == 0x26 || b == 0x64 || b == 0x65 ||
                      (bits == 64 && (b & 0xf0) == 0x40);
        if (!prefix) break;
        p.b[p.n++] = b;
    }
    format(&d, rip, &p, text, text_size);
    return d.length;
}
