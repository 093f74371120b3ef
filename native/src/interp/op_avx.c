/* AVX and AVX2: the handlers of isa_avx.def, made from the rows, and what is written by hand. */
#include "vex.h"

/* ---- semantics that no shape describes ---- */
#define VVVV_REG (c->fpu.vec[INSN_VVVV(i)])
SEM(vmovss_rr_x) { set128(c, i->dst, (ld64(VVVV_REG) & ~0xffffffffull) | ld32(src), ld64(VVVV_REG + 8)); }
SEM(vmovsd_rr_x) { set128(c, i->dst, ld64(src), ld64(VVVV_REG + 8)); }
SEM(vmovss_rs_x) { sem_vmovss_rr_x(c, i, src); }
SEM(vmovsd_rs_x) { sem_vmovsd_rr_x(c, i, src); }
SEM(vmovhlps_x) { set128(c, i->dst, ld64((const uint8_t *)src + 8), ld64(VVVV_REG + 8)); }
SEM(vmovlhps_x) { set128(c, i->dst, ld64(VVVV_REG), ld64(src)); }
SEM(vmovd_x) { set128(c, i->dst, INSN_OSIZE(i) == 8 ? ld64(src) : ld32(src), 0); }
/* Element n, of so many bits, of vvvv replaced. */
static ALWAYS_INLINE void insert(struct kvs_vcpu *c, const struct kvs_insn *i, uint64_t v, uint32_t bits, uint32_t n)
{
    uint64_t half[2] = { ld64(VVVV_REG), ld64(VVVV_REG + 8) }, mask = ~0ull >> (64 - bits);
    uint32_t h = n * bits >> 6, at = n * bits & 63;
    half[h] = (half[h] & ~(mask << at)) | (v & mask) << at;
    set128(c, i->dst, half[0], half[1]);
}
SEM(vpinsrb_x) { insert(c, i, ld8(src), 8, i->imm & 15); }
SEM(vpinsrw_x) { insert(c, i, ld16(src), 16, i->imm & 7); }
SEM(vpinsrd_x)
{
    if (INSN_OSIZE(i) == 8) insert(c, i, ld64(src), 64, i->imm & 1);
    else insert(c, i, ld32(src), 32, i->imm & 3);
}
/* SDM 2 "INSERTPS": with a memory source the source selector (bits 7:6) is ignored. */
SIMD_STUBS(vinsertps_x, "vinsertps", "%xmm1,%xmm0,%xmm0");
SEM(vinsertps_x)
{
    __asm__ volatile("vmovdqa %[h],%%xmm0\n\tvmovss %[rm],%%xmm1\n\t" CALL_STUB VSTORE(x)
                     : VDEST : VHREG(x), VSRC(Wd, x), [stub] "r"(SIMD_STUB(vinsertps_x, i->imm & 0x3f)) : "xmm0", "xmm1");
}

/* ---- string compares: result in ECX or XMM0, and flags ---- */
#define PSTR_LOAD "vmovdqa %[a],%%xmm0\n\tvmovdqu %[b],%%xmm1\n\t" CALL_STUB
#define PSTR_IN(name) [a] "m"(XMM(i->dst)), [b] "m"(SRC(struct simd16)), [stub] "r"(SIMD_STUB(name, i->imm))
#define PSTR_E(name, mnem, store, out)                                                            \
    SIMD_STUBS(name, mnem, "%xmm1,%xmm0");                                                        \
    SEM(name)                                                                                     \
    {                                                                                             \
        uint32_t fl = pcmpestr_length(i, c->gpr[RAX]), index;                                     \
        __asm__ volatile(PSTR_LOAD "lahf\n\tseto %%al" store                                      \
                         : "+&a"(fl), "=&c"(index) out                                            \
                         : PSTR_IN(name), "d"(pcmpestr_length(i, c->gpr[RDX])) : "xmm0", "xmm1", "cc"); \
        c->fl = (uint16_t)fl;                                                                     \
        PSTR_RESULT                                                                               \
    }
#define PSTR_I(name, mnem, store, out)                                                            \
    SIMD_STUBS(name, mnem, "%xmm1,%xmm0");                                                        \
    SEM(name)                                                                                     \
    {                                                                                             \
        uint32_t fl, index;                                                                       \
        __asm__ volatile(PSTR_LOAD "lahf\n\tseto %%al" store                                      \
                         : "=&a"(fl), "=&c"(index) out : PSTR_IN(name) : "xmm0", "xmm1", "cc");   \
        c->fl = (uint16_t)fl;                                                                     \
        PSTR_RESULT                                                                               \
    }
#define COMMA ,
#define MASK_OUT COMMA [m] "=m"(YMM(0))
#define PSTR_RESULT SET32(RCX, index);
PSTR_E(vpcmpestri_x, "vpcmpestri", "", )
PSTR_I(vpcmpistri_x, "vpcmpistri", "", )
#undef PSTR_RESULT
#define PSTR_RESULT (void)index;
PSTR_E(vpcmpestrm_x, "vpcmpestrm", "\n\tvmovdqa %%ymm0,%[m]", MASK_OUT)
PSTR_I(vpcmpistrm_x, "vpcmpistrm", "\n\tvmovdqa %%ymm0,%[m]", MASK_OUT)

/* ---- the rows ---- */
#define OPERATION(name, cls, mnem, feat, rd, wr, un)
#define VEX(name, map, pp, opc, mod, w, k0, k1, k2, k3, at)
#define VGRP(name, grp, pp, ext, mod, k0, k1, k2, at)
#define VSIMD_N(shape, lens, name, mnem, feat, wr, map, pp, opc, mod, w, s, at) GEN_##lens(shape, name, mnem, mod, s, at)
#include "../isa/isa_avx.def"
#undef OPERATION
#undef VEX
#undef VGRP

/* ---- stores by hand ---- */
V_ST_M(vmovq_st_x_m, VFROM, 8u, 0)
V_R(vmovq_st_x, sem_vmovq_x, Wq)
static V_ST_M(vmovd_st_x_m4, VFROM, 4u, 0)
static V_ST_M(vmovd_st_x_m8, VFROM, 8u, 0)
OP(vmovd_st_x_m) { return INSN_OSIZE(i) == 8 ? op_vmovd_st_x_m8(c, i, budget) : op_vmovd_st_x_m4(c, i, budget); }
V_ST_M(vpextrb_x_m, VFROM + (i->imm & 15), 1u, 0)
V_ST_M(vpextrw_st_x_m, VFROM + (i->imm & 7) * 2, 2u, 0)
V_ST_M(vextractps_x_m, VFROM + (i->imm & 3) * 4, 4u, 0)
static V_ST_M(vpextrd_x_m4, VFROM + (i->imm & 3) * 4, 4u, 0)
static V_ST_M(vpextrd_x_m8, VFROM + (i->imm & 1) * 8, 8u, 0)
OP(vpextrd_x_m) { return INSN_OSIZE(i) == 8 ? op_vpextrd_x_m8(c, i, budget) : op_vpextrd_x_m4(c, i, budget); }
#define TO_GPR(name, value)                                                                       \
    OP(name)                                                                                      \
    {                                                                                             \
        c->gpr[i->dst] = (value);                                                                 \
        NEXT();                                                                                   \
    }
TO_GPR(vmovd_st_x_r, INSN_OSIZE(i) == 8 ? ld64(VFROM) : ld32(VFROM))
TO_GPR(vpextrb_x_r, VFROM[i->imm & 15])
TO_GPR(vpextrw_st_x_r, ld16(VFROM + (i->imm & 7) * 2))
TO_GPR(vpextrw, ld16(VFROM + (i->imm & 7) * 2))
TO_GPR(vpextrd_x_r, INSN_OSIZE(i) == 8 ? ld64(VFROM + (i->imm & 1) * 8) : ld32(VFROM + (i->imm & 3) * 4))
TO_GPR(vextractps_x_r, ld32(VFROM + (i->imm & 3) * 4))

/* ---- shifts by an immediate: those by a count with that value shift everything out alike ---- */
#define SHIFT_ASM(mnem, L)                                                                        \
    __asm__ volatile("vmovdqa %1,%%" #L "mm0\n\tvmovd %2,%%xmm1\n\t" mnem " %%xmm1,%%" #L "mm0,%%" #L "mm0\n\t" \
                     "vmovdqa %%ymm0,%0" VEND_##L                                                 \
                     : "=m"(YMM(i->dst)) : "m"(VREG_##L(i->src)), "r"((uint32_t)i->imm & 0xff) : "xmm0", "xmm1")
#define SHIFT_I(name, mnem)                                                                       \
    OP(name)                                                                                      \
    {                                                                                             \
        if (INSN_VL(i)) SHIFT_ASM(mnem, y);                                                       \
        else SHIFT_ASM(mnem, x);                                                                  \
        NEXT();                                                                                   \
    }
SHIFT_I(vpsrlw_i, "vpsrlw")
SHIFT_I(vpsraw_i, "vpsraw")
SHIFT_I(vpsllw_i, "vpsllw")
SHIFT_I(vpsrld_i, "vpsrld")
SHIFT_I(vpsrad_i, "vpsrad")
SHIFT_I(vpslld_i, "vpslld")
SHIFT_I(vpsrlq_i, "vpsrlq")
SHIFT_I(vpsllq_i, "vpsllq")
#define BYTES_ASM(name, L)                                                                        \
    __asm__ volatile("vmovdqa %1,%%" #L "mm0\n\t" CALL_STUB "vmovdqa %%ymm0,%0" VEND_##L          \
                     : "=m"(YMM(i->dst)) : "m"(VREG_##L(i->src)), [stub] "r"(SIMD_STUB(name##_##L, i->imm)) : "xmm0")
#define SHIFT_BYTES(name)                                                                         \
    SIMD_STUBS(name##_x, #name, "%xmm0,%xmm0");                                                   \
    SIMD_STUBS(name##_y, #name, "%ymm0,%ymm0");                                                   \
    OP(name)                                                                                      \
    {                                                                                             \
        if (INSN_VL(i)) BYTES_ASM(name, y);                                                       \
        else BYTES_ASM(name, x);                                                                  \
        NEXT();                                                                                   \
    }
SHIFT_BYTES(vpsrldq)
SHIFT_BYTES(vpslldq)

/* VZEROUPPER and VZEROALL; outside 64-bit mode there are eight registers. */
OP(vzero)
{
    for (uint32_t k = 0, n = is_code64(c) ? 16 : 8; k < n; k++) {
        if (INSN_VL(i)) set128(c, k, 0, 0);
        st64(c->fpu.vec[k] + 16, 0);
        st64(c->fpu.vec[k] + 24, 0);
    }
    NEXT();
}
