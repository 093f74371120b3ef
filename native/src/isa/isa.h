/*
 * The instruction set as data. isa_*.def is THE instruction table; this header turns its rows into
 * enums and tables, decode.c turns bytes into struct decoded, interp/lower.c turns that into handlers.
 *
 * Row macros (each reader defines the ones it wants and includes isa.def):
 *
 *   OPERATION(name, class, "mnemonic", FEATURE, read, written, undefined)
 *       status flags as F_... masks. undefined: by the manuals; all of them are what Zen 5 leaves, which the
 *       oracle checks on such a host
 *   ENC(name, map, pp, opcode, mod, k0, k1, k2, attributes)       one opcode byte
 *   GRP(name, group, pp, ext, mod, k0, k1, k2, attributes)        opcode with ModRM.reg extension
 *   FIX(name, table, modrm, attributes)                           whole ModRM byte (x87, 0F 01)
 *   VEX(name, map, pp, opcode, mod, w, k0, k1, k2, k3, attributes)    VEX-coded; w: WI any, W0, W1
 *   VGRP(name, group, pp, ext, mod, k0, k1, k2, attributes)       VEX-coded, with ModRM.reg extension
 *
 * pp: ANY (66 is operand size, F2/F3 ignored or REP), or NP P66 PF3 PF2 as mandatory prefixes; a row
 * with the exact prefix wins over ANY. mod: A any, M memory only, R register only.
 */
#ifndef KVS_ISA_H
#define KVS_ISA_H

#include "../sys/sys.h"

enum { F_NONE = 0, F_C = FLAG_CF, F_P = FLAG_PF, F_A = FLAG_AF, F_Z = FLAG_ZF, F_S = FLAG_SF, F_O = FLAG_OF,
       F_OSZAPC = FLAGS_STATUS, F_SZAPC = FLAGS_STATUS & ~FLAG_OF, F_OSZAP = FLAGS_STATUS & ~FLAG_CF,
       F_OSZPC = FLAGS_STATUS & ~FLAG_AF, F_OC = FLAG_OF | FLAG_CF, F_OSAPC = FLAGS_STATUS & ~FLAG_ZF,
       F_SZP = FLAG_SF | FLAG_ZF | FLAG_PF, F_OAC = FLAG_OF | FLAG_AF | FLAG_CF, F_SZAP = FLAG_SF | FLAG_ZF | FLAG_AF | FLAG_PF,
       F_OSP = FLAG_OF | FLAG_SF | FLAG_PF, F_OSAP = FLAG_OF | FLAG_SF | FLAG_AF | FLAG_PF, F_ZPC = FLAG_ZF | FLAG_PF | FLAG_CF };

enum pp { ANY, NP, P66, PF3, PF2, PP_COUNT };
enum modkind { A, M, R, MODKIND_COUNT };
enum vexw { WI, W0, W1, VEXW_COUNT };

/* Opcode maps with one row per opcode byte. */
enum map { M1, L1 /* one-byte opcodes that differ in 64-bit mode */, M0F, M38, M3A, V1, V2, V3, MAP_COUNT };
/* Groups: rows by ModRM.reg. Named by opcode. */
enum group {
    G_NONE, G80, G81, G82, G83, G8F, GC0, GC1, GD0, GD1, GD2, GD3, GC6, GC7, GF6, GF7, GFE, GFF,
    G0F00, G0F01, G0F0D, G0F18, G0F1E, G0F71, G0F72, G0F73, G0FAE, G0FB9, G0FBA, G0FC7,
    GD8, GD9, GDA, GDB, GDC, GDD, GDE, GDF, GV71, GV72, GV73, GVAE, GVF3, GROUP_COUNT
};
/* Tables by the whole ModRM byte (register forms). */
enum fixtab { TD8, TD9, TDA, TDB, TDC, TDD, TDE, TDF, T0F01, FIXTAB_COUNT };

/* Operand kinds, SDM 2D "Opcode Map" notation. The comment says which register file. */
enum opkind {
    NA,
    Eb, Ew, Ed, Eq, Ev, Ey,     /* ModRM.rm: GPR or memory; y = 4 or 8 by REX.W; v = operand size */
    Gb, Gw, Gd, Gq, Gv, Gy,     /* ModRM.reg: GPR */
    Rv, Ry, Rd, Rq,             /* ModRM.rm: GPR, register only */
    Zb, Zv,                     /* opcode bits 0-2: GPR */
    M_, Mb, Mw, Md, Mq, Mdq, Ml, Mvd, Mvq, Mp, Ma, Mt, Ms, Mf, /* memory: none, sizes (l: VEX.L), doublewords and
                                   quadwords by vector index, far pointer, bound pair, 80 bits, GDT image, FXSAVE area */
    RdMb, RdMw, RyMd,           /* GPR 32 bits or memory of that size (PEXTR/PINSR, MOV Sreg) */
    Ib, Ibs, Iw, Iz, Iv, I1,    /* immediates: byte, sign-extended byte, 2, 2/4 sign-extended, full, constant 1 */
    Iwb,                        /* ENTER: 16-bit then 8-bit */
    Jb, Jz, Ap,                 /* relative branch, far pointer */
    Ob, Ov,                     /* moffs */
    Sw, Cr, Dr,                 /* ModRM.reg: segment, control, debug register */
    AL_, AX_, CL_, DX_, rAX, eAX_, /* fixed: AL, AX, CL, DX, accumulator of operand size, EAX/AX for IN/OUT */
    ES_, CS_, SS_, DS_, FS_, GS_,  /* fixed segment registers */
    Xb, Xv, Yb, Yv, Xz, Yz,     /* string operands DS:rSI and ES:rDI; z = 2 or 4 */
    Vx, Vl,                     /* ModRM.reg: XMM; l: XMM or YMM by VEX.L */
    Wx, Wq, Wd, Ww, Wb,         /* ModRM.rm: XMM or memory of 16, 8, 4, 2, 1 bytes */
    Wl, Wh, Wf, We, Wm,         /* ModRM.rm: by VEX.L; XMM or memory of a half, a quarter, an eighth of that; VMOVDDUP's */
    Ux, Ul,                     /* ModRM.rm: XMM; by VEX.L, register only */
    Pq,                         /* ModRM.reg: MMX */
    Qq, Qd,                     /* ModRM.rm: MMX or memory of 8 or 4 bytes */
    Nq,                         /* ModRM.rm: MMX, register only */
    XMM0_,                      /* fixed XMM0 */
    Hx, Hl, By,                 /* VEX.vvvv: XMM; by VEX.L; GPR of 4 or 8 bytes by VEX.W */
    Lx, Ll,                     /* bits 4-7 of the immediate: XMM; by VEX.L */
    ST0_, STi,                  /* x87 */
    OPKIND_COUNT
};

/* Attributes of an encoding. */
#define A_LOCK BIT(0)    /* LOCK is legal with a memory destination */
#define A_NO64 BIT(1)    /* #UD in 64-bit mode */
#define A_ONLY64 BIT(2)  /* #UD (or another row) outside 64-bit mode */
#define A_D64 BIT(3)     /* operand size defaults to 64 in 64-bit mode (66 gives 16) */
#define A_F64 BIT(4)     /* operand size is 64 in 64-bit mode whatever the prefixes */
#define A_END BIT(5)     /* ends a block: branch, or changes what blocks depend on */
#define A_PRIV BIT(6)    /* CPL 0 only (checked by the handler) */
#define A_PROT BIT(7)    /* #UD in real and virtual-8086 mode */
#define A_REP BIT(8)     /* string instruction: F2/F3 repeat */
#define A_X87 BIT(9)     /* #NM rules of x87 */
#define A_MMX BIT(10)    /* #NM and #UD rules of MMX */
#define A_SSE BIT(11)    /* #NM and #UD rules of SSE */
#define A_ALIGN BIT(12)  /* a 16-byte memory operand must be aligned: #GP(0) */
#define A_FP BIT(13)     /* SSE floating point: raises SIMD exceptions (MODE_SSE_TRAPS chooses the checked handler) */
#define A_IO BIT(14)     /* IOPL or I/O bitmap decides (checked by the handler) */
#define A_SYS BIT(15)    /* cannot run in user mode or touches system state: not for the oracle */
#define A_HLE BIT(16)    /* XACQUIRE/XRELEASE prefixes are ignored here */
#define A_W0OSZ BIT(17)  /* operand size is 32, or 64 with REX.W; 66 does not matter */
#define A_BRANCH BIT(19) /* near branch: counts itself; its handler is in op_branch.c */
#define A_AVX BIT(20)    /* #NM and #UD rules of AVX; needs FEAT_AVX too */
#define A_L0 BIT(21)     /* #UD with VEX.L = 1 */
#define A_L1 BIT(22)     /* #UD with VEX.L = 0 */
#define A_L2 BIT(23)     /* the 256-bit form is a feature of its own: AVX2, VAES, VPCLMULQDQ */
#define A_NOREP BIT(24)  /* #UD with F2 or F3 */
#define A_NOPREFIX BIT(25) /* #UD with 66, F2 or F3 */
#define A_NOFAULT BIT(18) /* memory operand is not accessed (LEA, NOP, prefetch, INVLPG) */

/* Operands of the shapes of isa_avx.def; s: the kind of the ModRM.rm operand. */
#define K_V3(s) Vl, Hl, s, NA
#define K_S3(s) Vx, Hx, s, NA
#define K_OWN3(s) Vx, Hx, s, NA
#define K_F3(s) Vl, Hl, s, NA
#define K_F3S(s) Vx, Hx, s, NA
#define K_V2(s) Vl, s, NA, NA
#define K_S2(s) Vx, s, NA, NA
#define K_OWN2(s) Vx, s, NA, NA
#define K_N2(s) Vx, s, NA, NA
#define K_V3I(s) Vl, Hl, s, Ib
#define K_S3I(s) Vx, Hx, s, Ib
#define K_OWN3I(s) Vx, Hx, s, Ib
#define K_V2I(s) Vl, s, Ib, NA
#define K_PSTR(s) Vx, s, Ib, NA
#define K_V4(s) Vl, Hl, s, Ll
#define K_FL(s) Vl, s, NA, NA
#define K_FLS(s) Vx, s, NA, NA
#define K_GPR(s) Gy, s, NA, NA
#define K_MSK(s) Gd, s, NA, NA
#define K_MERGE(s) s, Hx, Vx, NA
#define K_ST(s) s, Vl, NA, NA
#define K_STX(s) s, Vl, Ib, NA
#define K_STS(s) s, Vx, NA, NA
#define K_STH(s) s, Vx, NA, NA
#define K_STQ(s) s, Vx, NA, NA
#define K_STE(s) s, Vx, NA, NA
#define K_STI(s) s, Vx, Ib, NA
#define LEN_XY 0
#define LEN_XS 0
#define LEN_X0 A_L0
#define LEN_Y1 A_L1
#define VEX_I(...) VEX(__VA_ARGS__)

enum op {
    OP_none,
#define OPERATION(name, cls, mnem, feat, rd, wr, un) OP_##name,
#include "isa.def"
    OP_COUNT
};

/* One id per row; a duplicate encoding does not compile. */
enum row {
    ROW_none,
#define ENC(name, map, pp, opc, mod, k0, k1, k2, at) ROW_##map##_##pp##_##opc##_##mod,
#define GRP(name, grp, pp, ext, mod, k0, k1, k2, at) ROW_##grp##_##pp##_##ext##_##mod,
#define FIX(name, tab, mrm, at) ROW_##tab##_##mrm,
#define VEX(name, map, pp, opc, mod, w, k0, k1, k2, k3, at) ROW_##map##_##pp##_##opc##_##mod##_##w,
#define VGRP(name, grp, pp, ext, mod, k0, k1, k2, at) ROW_##grp##_##pp##_##ext##_##mod,
#include "isa.def"
    ROW_COUNT
};

struct op_info { const char *mnemonic; uint32_t read, written, undefined; uint8_t cls, feature; };
#define OPERANDS 4
struct row_info { uint16_t op; uint8_t k[OPERANDS]; uint32_t attr; };
extern const struct op_info isa_op[OP_COUNT];
extern const struct row_info isa_row[ROW_COUNT];
extern const uint16_t isa_enc[V1][PP_COUNT][256][MODKIND_COUNT];
extern const uint16_t isa_vex[VEXW_COUNT][MAP_COUNT - V1][PP_COUNT][256][MODKIND_COUNT];
extern const uint16_t isa_grp[GROUP_COUNT][PP_COUNT][8][MODKIND_COUNT];
extern const uint16_t isa_fix[FIXTAB_COUNT][64];

/* How rows of an operation become handlers; see interp/lower.c. */
enum op_class {
    HELP,      /* one handler op_<name> that reads its operands generically */
    ALU2,      /* add or adc sbb and sub xor cmp: forms x widths, LOCK forms */
    TEST2,     /* test */
    UNARY,     /* inc dec neg not: r and m, LOCK forms */
    SHIFT,     /* shl shr sar rol ror rcl rcr: by immediate or CL */
    MOVES,     /* mov between GPR, memory and immediate */
    EXTEND,    /* movzx movsx movsxd */
    JCC, SETCC, CMOV, /* by condition: imm low bits of the opcode */
    SIMD,      /* op_<name>_r and op_<name>_m: register and memory form of the second operand */
    VEX_SIMD,  /* op_<name>_x_r, _x_m, _y_r, _y_m: the same for VEX.L = 0 and 1 */
    SIMD_STORE, /* op_<name>_m: memory destination; op_<name>_r where a register form exists */
};

#define NO_INDEX GPR_ZERO
#define INSN_MEM 0xff    /* in dst/src: the operand is memory */

struct decoded {
    uint16_t row, op;
    uint32_t attr;
    uint8_t bits;            /* 16, 32 or 64: the code size it was decoded for */
    uint8_t length;
    uint8_t map, opcode, modrm;
    bool has_modrm, is_mem;
    uint8_t mod, reg, rm;    /* reg and rm with REX extensions */
    uint8_t rex;             /* 0x40-0x4f or 0 */
    uint8_t seg;             /* SEG_... of the memory operand, override applied */
    bool seg_override, opsize66, addr67, lock;
    uint8_t rep;             /* 0, 0xf2 or 0xf3 */
    uint8_t osize, asize;    /* 1 is never used here: 2, 4 or 8 */
    uint8_t base, index, scale; /* GPR_... numbers; NO_INDEX for none; GPR_RIPBASE for RIP-relative */
    int64_t disp;
    bool rip_relative;
    bool mandatory_prefix;   /* the row was found under its exact prefix, not under ANY */
    uint64_t imm;
    uint16_t imm2;           /* selector of a far pointer, ENTER's level */
    uint8_t cond;            /* low nibble of the opcode, for Jcc, SETcc, CMOVcc */
    bool vex, evex;
    uint8_t vvvv, vl, vw, vex_pp; /* vw: VEX.W, also where rex leaves it out; vex_pp: NP ... */
};

/* decode.c. bits: 16, 32 or 64. Returns DECODE_... ; on OK d->length is set.
 * DECODE_UD: no such instruction (also with hidden feature or illegal LOCK). DECODE_MORE: needs more
 * than `count` bytes. DECODE_LONG: over 15 bytes (#GP). features: bit mask of FEAT_..., ~0 = all. */
enum { DECODE_OK, DECODE_UD, DECODE_MORE, DECODE_LONG };
int decode(const uint8_t *p, uint32_t count, uint32_t bits, bool protected_mode, uint64_t features, struct decoded *d);
/* Size in bytes of operand k of d (memory or register); 0 where it has none. */
uint32_t operand_size(const struct decoded *d, int k);

#endif
