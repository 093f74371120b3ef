/*
 * VMASKMOV, VPMASKMOV and gathers: elements that a mask selects. An element that is not selected is
 * not accessed and cannot fault. SDM 2 "VMASKMOV", "VPGATHERDD/VPGATHERDQ"
 */
#include "../mmu/segment.h"
#include "vex.h"

static uint64_t offset_add(const struct kvs_insn *i, uint64_t off, uint64_t add)
{
    off += add;
    if (i->seg & INSN_FAST) return off;
    return INSN_ASIZE(i) == 8 ? off : INSN_ASIZE(i) == 4 ? (uint32_t)off : (uint16_t)off;
}

static bool selected(const uint8_t *mask, uint32_t n, uint32_t size) { return mask[n * size + size - 1] & 0x80; }

/* ---- masked loads and stores, element by element ---- */
/* The linear address of an element: no alignment check, whatever its size. Offsets of elements do not wrap at 64 KiB. */
static int element_address(struct kvs_vcpu *c, const struct kvs_insn *i, uint64_t off, uint32_t size, int access, uint64_t *la)
{
    uint64_t room;
    uint8_t fault = seg_check(c, i->seg, off, size, access, la, &room);
    return UNLIKELY(fault) ? raise_error(c, fault, 0) : ST_OK;
}

static int masked_access(struct kvs_vcpu *c, const struct kvs_insn *i, uint8_t *data, uint32_t size, int access)
{
    const uint8_t *mask = c->fpu.vec[INSN_VVVV(i)];
    uint64_t off = insn_offset(c, i), la;
    uint32_t count = (INSN_VL(i) ? 32 : 16) / size;
    for (uint32_t n = 0; access == ACC_W && n < count; n++) { /* all or nothing */
        if (!selected(mask, n, size)) continue;
        int st = element_address(c, i, off + n * size, size, access, &la);
        if (st == ST_OK) st = lwrite_check(c, la, size, LA_USER_RULES);
        if (st != ST_OK) return st;
    }
    for (uint32_t n = 0; n < count; n++) {
        if (!selected(mask, n, size)) continue;
        int st = element_address(c, i, off + n * size, size, access, &la);
        if (st == ST_OK) st = access == ACC_W ? lwrite(c, la, data + n * size, size, LA_USER_RULES)
                                              : lread(c, la, data + n * size, size, LA_USER_RULES);
        if (st != ST_OK) return st;
    }
    return ST_OK;
}

static NOINLINE int masked_load(struct kvs_vcpu *c, const struct kvs_insn *i, uint32_t size)
{
    uint8_t data[32] = { 0 };
    int st = masked_access(c, i, data, size, ACC_R);
    if (st == ST_OK) memcpy(c->fpu.vec[i->dst], data, 32);
    return st;
}

static NOINLINE int masked_load_slow(OPARGS, uint32_t size)
{
    int st = masked_load(c, i, size);
    if (UNLIKELY(st != ST_OK)) return leave(c, i, budget, st);
    NEXT();
}
static NOINLINE int masked_store_slow(OPARGS, uint32_t size)
{
    int st = masked_access(c, i, c->fpu.vec[i->src], size, ACC_W);
    if (UNLIKELY(st != ST_OK)) return leave(c, i, budget, st);
    if (UNLIKELY(c->write_count | c->code_modified)) return leave(c, i, budget, ST_END);
    NEXT();
}

#define MASK_LOAD(mnem, L)                                                                        \
    __asm__ volatile("vmovdqa %1,%%" #L "mm0\n\t" mnem " %2,%%" #L "mm0,%%" #L "mm0\n\tvmovdqa %%ymm0,%0" VEND_##L \
                     : "=m"(YMM(i->dst)) : "m"(VREG_##L(INSN_VVVV(i))), "m"(*(const VTYPE(Wl, L) *)p) : "xmm0")
#define MASK_STORE(mnem, L)                                                                       \
    __asm__ volatile("vmovdqa %1,%%" #L "mm0\n\tvmovdqa %2,%%" #L "mm1\n\t" mnem " %%" #L "mm1,%%" #L "mm0,%0" VEND_##L \
                     : "+m"(*(VTYPE(Wl, L) *)p) : "m"(VREG_##L(INSN_VVVV(i))), "m"(VREG_##L(i->src)) : "xmm0", "xmm1")
#define MASKED_L(name, mnem, size, L)                                                             \
    static OP(name##_##L)                                                                         \
    {                                                                                             \
        const uint8_t *p = insn_probe(c, i, TLB_R, VSIZE(Wl, L));                                 \
        if (UNLIKELY(!p)) return masked_load_slow(c, i, budget, size);                            \
        MASK_LOAD(mnem, L);                                                                       \
        NEXT();                                                                                   \
    }                                                                                             \
    static OP(name##_st_##L)                                                                      \
    {                                                                                             \
        uint8_t *p = insn_probe(c, i, TLB_W, VSIZE(Wl, L));                                       \
        if (UNLIKELY(!p)) return masked_store_slow(c, i, budget, size);                           \
        MASK_STORE(mnem, L);                                                                      \
        NEXT();                                                                                   \
    }
#define MASKED(name, mnem, size)                                                                  \
    MASKED_L(name, mnem, size, x)                                                                 \
    MASKED_L(name, mnem, size, y)                                                                 \
    OP(name) { return INSN_VL(i) ? op_##name##_y(c, i, budget) : op_##name##_x(c, i, budget); }   \
    OP(name##_st) { return INSN_VL(i) ? op_##name##_st_y(c, i, budget) : op_##name##_st_x(c, i, budget); }
/* Doublewords and quadwords are the same to the memory whatever they hold; these need no AVX2. */
MASKED(vmaskmovps, "vmaskmovps", 4)
MASKED(vmaskmovpd, "vmaskmovpd", 8)
MASKED(vpmaskmovd, "vmaskmovps", 4)
MASKED(vpmaskmovq, "vmaskmovpd", 8)

/* ---- gathers ---- */
/*
 * Elements are loaded in order. Each done clears its mask, so that after a fault the instruction goes
 * on where it was. An access that has to wait for the host starts the whole instruction anew.
 */
static int gather(struct kvs_vcpu *c, const struct kvs_insn *i, uint32_t size, uint32_t index_size)
{
    uint8_t *mask = c->fpu.vec[INSN_VVVV(i)], *to = c->fpu.vec[i->dst], data[32];
    const uint8_t *index = c->fpu.vec[INSN_VINDEX(i)];
    uint32_t count = (INSN_VL(i) ? 32 : 16) / (size > index_size ? size : index_size), n;
    uint64_t base = insn_offset(c, i), la;
    int st = ST_OK;
    memcpy(data, to, 32);
    for (n = 0; n < count; n++) {
        if (!selected(mask, n, size)) continue;
        int64_t x = index_size == 8 ? (int64_t)ld64(index + 8 * n) : (int32_t)ld32(index + 4 * n);
        uint64_t off = offset_add(i, base, (uint64_t)x << INSN_VSCALE(i));
        st = element_address(c, i, off, size, ACC_R, &la);
        if (st == ST_OK) st = lread(c, la, data + n * size, size, LA_USER_RULES);
        if (st != ST_OK) break;
    }
    if (st == ST_EXIT) return st;
    if (st == ST_OK) {
        memset(mask, 0, 32);
        memset(data + count * size, 0, 32 - count * size);
    } else {
        memset(mask, 0, n * size); /* those left out as well, as silicon does */
    }
    memcpy(to, data, 32);
    return st;
}
#define GATHER(name, size, index_size) OPX(name) { UNUSED_OPARGS; return gather(c, i, size, index_size); }
GATHER(vpgatherdd, 4, 4)
GATHER(vpgatherdq, 8, 4)
GATHER(vpgatherqd, 4, 8)
GATHER(vpgatherqq, 8, 8)
GATHER(vgatherdps, 4, 4)
GATHER(vgatherdpd, 8, 4)
GATHER(vgatherqps, 4, 8)
GATHER(vgatherqpd, 8, 8)
