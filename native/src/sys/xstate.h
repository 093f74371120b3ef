/* The XSAVE area and XCR0. SDM 1 "XSAVE Area", "Enabling the XSAVE Feature Set and XSAVE-Enabled Features" */
#ifndef KVS_XSTATE_H
#define KVS_XSTATE_H

#include "sys.h"

#define XSTATE_X87 1ull
#define XSTATE_SSE 2ull
#define XSTATE_AVX 4ull
#define XSTATE_PKRU 0x200ull
#define XSTATE_XMM 160u    /* byte offsets */
#define XSTATE_HEADER 512u
#define XSTATE_YMM 576u      /* the first component behind the header */
#define XSTATE_PKRU_AT 2688u /* room for what AVX-512 has in front of it */
#define XSTATE_AREA_MAX (XSTATE_PKRU_AT + 8)
#define XCOMP_COMPACT BIT(63)

static inline uint64_t xcr0_allowed(const struct kvs_vcpu *c)
{
    return XSTATE_X87 | XSTATE_SSE | (has_feature(c, FEAT_AVX) ? XSTATE_AVX : 0) | (has_feature(c, FEAT_PKU) ? XSTATE_PKRU : 0);
}
static inline bool xcr0_legal(const struct kvs_vcpu *c, uint64_t v)
{
    return !(v & ~xcr0_allowed(c)) && (v & XSTATE_X87) && (!(v & XSTATE_AVX) || (v & XSTATE_SSE));
}

/* Where PKRU lies when the area is compacted and holds these components. No component asks for alignment. */
static inline uint32_t xstate_pkru_compacted(uint64_t components) { return XSTATE_YMM + (components & XSTATE_AVX ? 256 : 0); }
static inline uint32_t xstate_size(uint64_t components, bool compacted)
{
    if (!(components & XSTATE_PKRU)) return components & XSTATE_AVX ? XSTATE_YMM + 256 : XSTATE_YMM;
    return (compacted ? xstate_pkru_compacted(components) : XSTATE_PKRU_AT) + 8;
}

#endif
