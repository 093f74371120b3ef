/* The XSAVE area and XCR0. SDM 1 "XSAVE Area", "Enabling the XSAVE Feature Set and XSAVE-Enabled Features" */
#ifndef KVS_XSTATE_H
#define KVS_XSTATE_H

#include "sys.h"

#define XSTATE_X87 1ull
#define XSTATE_SSE 2ull
#define XSTATE_AVX 4ull
#define XSTATE_XMM 160u    /* byte offsets */
#define XSTATE_HEADER 512u
#define XSTATE_YMM 576u
#define XCOMP_COMPACT BIT(63)

static inline uint64_t xcr0_allowed(const struct kvs_vcpu *c)
{
    return XSTATE_X87 | XSTATE_SSE | (has_feature(c, FEAT_AVX) ? XSTATE_AVX : 0);
}
static inline bool xcr0_legal(const struct kvs_vcpu *c, uint64_t v)
{
    return !(v & ~xcr0_allowed(c)) && (v & XSTATE_X87) && (!(v & XSTATE_AVX) || (v & XSTATE_SSE));
}

#endif
