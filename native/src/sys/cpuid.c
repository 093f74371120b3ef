/* CPUID. SDM 2 "CPUID", AMD APM 3 "Obtaining Processor Information", KVM "KVM CPUID bits"
 *
 * Offered is what this core implements on this host and nothing else; the processor presented is an AMD family 15
 * one, which operating systems drive without model-specific surprises. */
#include <cpuid.h>

#include "../irqchip/irqchip.h"
#include "transfer.h"
#include "xstate.h"

enum { EAX_, EBX_, ECX_, EDX_ };

#define SIGNATURE 0x00060fb1u /* family 15, model 107, stepping 1 */
#define EDX_1 (BIT(0) | BIT(1) | BIT(2) | BIT(3) | BIT(4) | BIT(5) | BIT(6) | BIT(7) | BIT(8) | BIT(9) | BIT(11) | BIT(12) | \
               BIT(13) | BIT(14) | BIT(15) | BIT(16) | BIT(17) | BIT(19) | BIT(23) | BIT(24) | BIT(25) | BIT(26))
/* What runs as the instructions of the host is taken out where that has them not: see host_lacks. */
#define ECX_1 (BIT(0) | BIT(1) | BIT(3) | BIT(9) | BIT(12) | BIT(13) | BIT(17) | BIT(19) | BIT(20) | BIT(21) | BIT(22) | BIT(23) | BIT(24) | \
               BIT(25) | BIT(26) | BIT(28) | BIT(29) | BIT(30) | BIT(31))
/* FSGSBASE, TSC_ADJUST, BMI1, AVX2, SMEP, BMI2, ERMS (REP MOVSB works in bulk here), INVPCID, RDSEED, ADX, SMAP,
 * CLFLUSHOPT, CLWB, SHA */
#define EBX_7 (BIT(0) | BIT(1) | BIT(3) | BIT(5) | BIT(7) | BIT(8) | BIT(9) | BIT(10) | BIT(18) | BIT(19) | BIT(20) | BIT(23) | \
               BIT(24) | BIT(29))
/* UMIP, PKU, GFNI, VAES, VPCLMULQDQ, LA57, RDPID, PKS */
#define ECX_7 (BIT(2) | BIT(3) | BIT(8) | BIT(9) | BIT(10) | BIT(16) | BIT(22) | BIT(31))
#define EDX_7 (BIT(26) | BIT(27) | BIT(28) | BIT(29) | BIT(31)) /* IBRS and IBPB, STIBP, FLUSH_CMD, ARCH_CAPABILITIES, SSBD */
#define EAX_7_1 BIT(26) /* LAM */
#define EBX_80000008 (BIT(12) | BIT(14) | BIT(15) | BIT(24) | BIT(26)) /* IBPB, IBRS, STIBP, SSBD, no need for it */
/* AMD repeats leaf 1 here; plus SYSCALL, NX, 1-GByte pages, RDTSCP, LM */
#define EDX_80000001 ((EDX_1 & 0x0183f3ffu) | BIT(11) | BIT(20) | BIT(26) | BIT(27) | BIT(29))
/* KVM: clock source (both MSR pairs), no I/O delay, poll control, stable clock, and what sys.h names */
#define KVM_FEATURES (BIT(0) | BIT(1) | BIT(3) | BIT(12) | BIT(24) | KVM_FEATURE_STEAL_TIME | KVM_FEATURE_PV_EOI | \
                      KVM_FEATURE_PV_UNHALT | KVM_FEATURE_PV_SEND_IPI | KVM_FEATURE_PV_SCHED_YIELD)
#define INDEXED KVS_CPUID_FLAG_SIGNIFICANT_INDEX

/* Caches in both descriptions (leaf 4; AMD 0x80000005 and 6): L1 64 KBytes 2-way, L2 512 KBytes 16-way. */
static const struct kvs_cpuid_entry2 offered[] = {
    { .function = 0, .eax = 0x16, .ebx = 0x68747541, .ecx = 0x444d4163, .edx = 0x69746e65 }, /* AuthenticAMD */
    { .function = 1, .eax = SIGNATURE, .ebx = 8 << 8 | 1 << 16, .ecx = (uint32_t)ECX_1, .edx = (uint32_t)EDX_1 },
    { .function = 2, .eax = 1 },
    { .function = 4, .index = 0, .flags = INDEXED, .eax = 0x121, .ebx = 63 | 1 << 22, .ecx = 511 },
    { .function = 4, .index = 1, .flags = INDEXED, .eax = 0x122, .ebx = 63 | 1 << 22, .ecx = 511 },
    { .function = 4, .index = 2, .flags = INDEXED, .eax = 0x143, .ebx = 63 | 15 << 22, .ecx = 511 },
    { .function = 4, .index = 3, .flags = INDEXED },
    /* Lines of 64 bytes, interrupts may end a wait while they are masked; no sub-states are listed: kernels then idle with
     * HLT, which waits without looking. */
    { .function = 5, .eax = 64, .ebx = 64, .ecx = 3 },
    { .function = 6, .eax = 4 }, /* ARAT: the APIC timer never stops */
    { .function = 7, .index = 0, .flags = INDEXED, .eax = 1, .ebx = (uint32_t)EBX_7, .ecx = (uint32_t)ECX_7, .edx = (uint32_t)EDX_7 },
    { .function = 7, .index = 1, .flags = INDEXED, .eax = (uint32_t)EAX_7_1 },
    { .function = 0xb, .index = 0, .flags = INDEXED, .ebx = 1, .ecx = 0x100 },
    { .function = 0xb, .index = 1, .flags = INDEXED, .ebx = 1, .ecx = 0x201 },
    { .function = 0xb, .index = 2, .flags = INDEXED, .ecx = 2 },
    /* Sizes follow XCR0. XSAVEOPT, XSAVEC, XGETBV with ECX = 1, XSAVES; AVX: 256 bytes behind the header */
    { .function = 0xd, .index = 0, .flags = INDEXED, .eax = 0x207, .ecx = XSTATE_AREA_MAX },
    { .function = 0xd, .index = 1, .flags = INDEXED, .eax = 15 },
    { .function = 0xd, .index = 2, .flags = INDEXED, .eax = 256, .ebx = XSTATE_YMM },
    { .function = 0xd, .index = 9, .flags = INDEXED, .eax = 8, .ebx = XSTATE_PKRU_AT },
    { .function = 0x15 }, /* filled from the clock of the VM */
    { .function = 0x16 },
    { .function = 0x40000000, .eax = 0x40000001, .ebx = 0x4b4d564b, .ecx = 0x564b4d56, .edx = 0x4d }, /* KVMKVMKVM */
    { .function = 0x40000001, .eax = (uint32_t)KVM_FEATURES },
    { .function = 0x80000000, .eax = 0x80000021, .ebx = 0x68747541, .ecx = 0x444d4163, .edx = 0x69746e65 },
    { .function = 0x80000001, .eax = SIGNATURE, .ecx = BIT(0) | BIT(5), .edx = (uint32_t)EDX_80000001 },
    { .function = 0x80000002, .eax = 0x536d764b, .ebx = 0x70726168, .ecx = 0x72695620, .edx = 0x6c617574 },
    { .function = 0x80000003, .eax = 0x55504320 }, /* "KvmSharp Virtual CPU" */
    { .function = 0x80000004 },
    { .function = 0x80000005, .eax = 0x01ff01ff, .ebx = 0x01ff01ff, .ecx = 0x40020140, .edx = 0x40020140 },
    { .function = 0x80000006, .ebx = 0x42004200, .ecx = 0x02008140 },
    { .function = 0x80000007, .edx = BIT(8) }, /* invariant TSC */
    { .function = 0x80000008, .eax = MAXPHYADDR | 57 << 8, .ebx = (uint32_t)EBX_80000008 },
    /* LFENCE serializes, a null selector clears the base, Automatic IBRS: no branch of one guest mode is
     * predicted from another one's history here, so kernels need no retpolines. */
    { .function = 0x80000021, .eax = BIT(2) | BIT(6) | BIT(8) },
};

static const struct { uint8_t feature; uint32_t leaf; uint8_t reg, bit; } feature_bits[] = {
    { FEAT_FPU, 1, EDX_, 0 }, { FEAT_VME, 1, EDX_, 1 }, { FEAT_DE, 1, EDX_, 2 }, { FEAT_PSE, 1, EDX_, 3 },
    { FEAT_TSC, 1, EDX_, 4 }, { FEAT_MSR, 1, EDX_, 5 }, { FEAT_PAE, 1, EDX_, 6 }, { FEAT_MCE, 1, EDX_, 7 },
    { FEAT_CX8, 1, EDX_, 8 }, { FEAT_SEP, 1, EDX_, 11 }, { FEAT_MTRR, 1, EDX_, 12 }, { FEAT_PGE, 1, EDX_, 13 },
    { FEAT_CMOV, 1, EDX_, 15 }, { FEAT_PAT, 1, EDX_, 16 }, { FEAT_CLFLUSH, 1, EDX_, 19 }, { FEAT_MMX, 1, EDX_, 23 },
    { FEAT_FXSR, 1, EDX_, 24 }, { FEAT_SSE, 1, EDX_, 25 }, { FEAT_SSE2, 1, EDX_, 26 },
    { FEAT_SSE3, 1, ECX_, 0 }, { FEAT_FMA, 1, ECX_, 12 }, { FEAT_AVX, 1, ECX_, 28 }, { FEAT_F16C, 1, ECX_, 29 },
    { FEAT_PCLMUL, 1, ECX_, 1 }, { FEAT_MONITOR, 1, ECX_, 3 }, { FEAT_SSSE3, 1, ECX_, 9 },
    { FEAT_CX16, 1, ECX_, 13 }, { FEAT_PCID, 1, ECX_, 17 }, { FEAT_SSE41, 1, ECX_, 19 }, { FEAT_SSE42, 1, ECX_, 20 },
    { FEAT_X2APIC, 1, ECX_, 21 }, { FEAT_MOVBE, 1, ECX_, 22 }, { FEAT_POPCNT, 1, ECX_, 23 },
    { FEAT_TSCDEADLINE, 1, ECX_, 24 }, { FEAT_AES, 1, ECX_, 25 }, { FEAT_XSAVE, 1, ECX_, 26 }, { FEAT_RDRAND, 1, ECX_, 30 },
    { FEAT_FSGSBASE, 7, EBX_, 0 }, { FEAT_BMI1, 7, EBX_, 3 }, { FEAT_SMEP, 7, EBX_, 7 }, { FEAT_BMI2, 7, EBX_, 8 },
    { FEAT_INVPCID, 7, EBX_, 10 }, { FEAT_RDSEED, 7, EBX_, 18 }, { FEAT_ADX, 7, EBX_, 19 }, { FEAT_SMAP, 7, EBX_, 20 },
    { FEAT_CLFLUSHOPT, 7, EBX_, 23 }, { FEAT_SHA, 7, EBX_, 29 }, { FEAT_UMIP, 7, ECX_, 2 }, { FEAT_AVX2, 7, EBX_, 5 },
    { FEAT_CLWB, 7, EBX_, 24 }, { FEAT_GFNI, 7, ECX_, 8 }, { FEAT_VAES, 7, ECX_, 9 }, { FEAT_VPCLMUL, 7, ECX_, 10 },
    { FEAT_RDPID, 7, ECX_, 22 }, { FEAT_PKU, 7, ECX_, 3 }, { FEAT_LA57, 7, ECX_, 16 }, { FEAT_PKS, 7, ECX_, 31 }, { FEAT_TSCADJUST, 7, EBX_, 1 },
    { FEAT_SPECCTRL, 7, EDX_, 26 }, { FEAT_STIBP, 7, EDX_, 27 }, { FEAT_FLUSHL1D, 7, EDX_, 28 }, { FEAT_ARCHCAP, 7, EDX_, 29 },
    { FEAT_SSBD, 7, EDX_, 31 }, { FEAT_LAM, 7, EAX_, 26 },
    { FEAT_IBPB, 0x80000008, EBX_, 12 }, { FEAT_AMDIBRS, 0x80000008, EBX_, 14 }, { FEAT_AMDSTIBP, 0x80000008, EBX_, 15 },
    { FEAT_AMDSSBD, 0x80000008, EBX_, 24 },
    { FEAT_XSAVEOPT, 0xd, EAX_, 0 }, { FEAT_XSAVEC, 0xd, EAX_, 1 }, { FEAT_XGETBV1, 0xd, EAX_, 2 }, { FEAT_XSAVES, 0xd, EAX_, 3 },
    { FEAT_LAHF64, 0x80000001, ECX_, 0 }, { FEAT_LZCNT, 0x80000001, ECX_, 5 }, { FEAT_PREFETCHW, 0x80000001, ECX_, 8 },
    { FEAT_SYSCALL, 0x80000001, EDX_, 11 }, { FEAT_NX, 0x80000001, EDX_, 20 }, { FEAT_1G, 0x80000001, EDX_, 26 },
    { FEAT_RDTSCP, 0x80000001, EDX_, 27 }, { FEAT_LM, 0x80000001, EDX_, 29 },
    { FEAT_AUTOIBRS, 0x80000021, EAX_, 8 },
};

static uint32_t feature_subleaf(uint32_t feature, uint32_t leaf) { return leaf == 0xd || feature == FEAT_LAM; }

/*
 * The instructions of these run as the host's own, so that only a host that has them can offer them.
 * An operating system that does not save YMM registers makes a host without AVX. SDM 1 "Detection of AVX
 * Instructions"
 */
#define HOST_VECTORS (BIT(FEAT_AVX) | BIT(FEAT_AVX2) | BIT(FEAT_FMA) | BIT(FEAT_F16C) | BIT(FEAT_VAES) | BIT(FEAT_VPCLMUL))
#define HOST_RUN (HOST_VECTORS | BIT(FEAT_AES) | BIT(FEAT_PCLMUL) | BIT(FEAT_SHA) | BIT(FEAT_GFNI))
uint64_t host_features(void)
{
    static const uint32_t leaves[] = { 1, 7, 0xd, 0x80000001 };
    uint64_t has = 0;
    bool saves_ymm = false;
    for (uint32_t n = 0; n < ARRAY_SIZE(leaves); n++) { /* each once: under a hypervisor CPUID takes long */
        uint32_t r[4];
        if (!__get_cpuid_count(leaves[n], feature_subleaf(FEAT_BASE, leaves[n]), &r[EAX_], &r[EBX_], &r[ECX_], &r[EDX_])) continue;
        for (uint32_t k = 0; k < ARRAY_SIZE(feature_bits); k++) {
            if (feature_bits[k].leaf != leaves[n] || feature_bits[k].feature >= FEAT_DECODED) continue;
            if (r[feature_bits[k].reg] >> feature_bits[k].bit & 1) has |= BIT(feature_bits[k].feature);
        }
        if (leaves[n] == 1 && r[ECX_] & BIT(27)) { /* OSXSAVE */
            uint32_t xcr0, high;
            __asm__ volatile("xgetbv" : "=a"(xcr0), "=d"(high) : "c"(0));
            saves_ymm = (xcr0 & 6) == 6;
        }
    }
    return saves_ymm ? has : has & ~HOST_VECTORS;
}

uint64_t host_lacks(void) { return HOST_RUN & ~host_features(); }

int32_t cpuid_supported(struct kvs_cpuid_entry2 *entries, uint32_t *count)
{
    uint32_t capacity = *count;
    *count = (uint32_t)ARRAY_SIZE(offered);
    if (capacity < ARRAY_SIZE(offered)) return -KVS_ERANGE;
    memcpy(entries, offered, sizeof offered);
    uint64_t lacks = host_lacks();
    for (uint32_t n = 0; !steal_time_available() && n < ARRAY_SIZE(offered); n++)
        if (entries[n].function == 0x40000001) entries[n].eax &= ~(uint32_t)KVM_FEATURE_STEAL_TIME;
    for (uint32_t k = 0; k < ARRAY_SIZE(feature_bits); k++) {
        if (feature_bits[k].feature >= FEAT_DECODED || !(lacks >> feature_bits[k].feature & 1)) continue;
        for (uint32_t n = 0; n < ARRAY_SIZE(offered); n++) {
            if (entries[n].function != feature_bits[k].leaf || entries[n].index != feature_subleaf(feature_bits[k].feature, feature_bits[k].leaf)) continue;
            uint32_t *const out[4] = { &entries[n].eax, &entries[n].ebx, &entries[n].ecx, &entries[n].edx };
            *out[feature_bits[k].reg] &= ~(uint32_t)BIT(feature_bits[k].bit);
        }
    }
    for (uint32_t n = 0; lacks >> FEAT_AVX & 1 && n < ARRAY_SIZE(offered); n++) {
        if (entries[n].function != 0xd) continue;
        if (entries[n].index == 0) entries[n].eax &= ~(uint32_t)XSTATE_AVX;
        else if (entries[n].index == 2) entries[n].eax = entries[n].ebx = 0;
    }
    return KVS_OK;
}

/* SDM 2 "CPUID", leaf 80000008H: what the guest is told about linear addresses follows from LA57. */
static uint32_t linear_bits(const struct kvs_vcpu *c) { return has_feature(c, FEAT_LA57) ? 57 : 48; }

static const struct kvs_cpuid_entry2 *find(const struct kvs_vcpu *c, uint32_t leaf, uint32_t subleaf)
{
    for (uint32_t k = 0; k < c->cpuid_count; k++) {
        const struct kvs_cpuid_entry2 *e = &c->cpuid[k];
        if (e->function == leaf && (!(e->flags & INDEXED) || e->index == subleaf)) return e;
    }
    return NULL;
}

bool cpuid_is_amd(const struct kvs_vcpu *c)
{
    const struct kvs_cpuid_entry2 *e = find(c, 0, 0);
    return e && e->ebx == 0x68747541 && e->edx == 0x69746e65 && e->ecx == 0x444d4163;
}

/* Highest leaf of the range that `leaf` is in; 0: no such range. */
static uint32_t range_maximum(const struct kvs_vcpu *c, uint32_t leaf)
{
    uint32_t first = leaf >= 0x40000000 && leaf < 0x50000000 ? leaf & 0xffffff00u : leaf & 0xffff0000u;
    const struct kvs_cpuid_entry2 *e = find(c, first, 0);
    return e ? e->eax : 0;
}

/* What depends on the vCPU's state or its VM. */
static void fill_dynamic(struct kvs_vcpu *c, uint32_t leaf, uint32_t subleaf, uint32_t out[4])
{
    const bool amd = cpuid_is_amd(c);
    switch (leaf) {
    case 0xd: /* the areas for what XCR0 enables: standard, compacted */
        if (subleaf == 0 && has_feature(c, FEAT_XSAVE)) out[EBX_] = xstate_size(c->xcr0, false);
        if (subleaf == 1 && (has_feature(c, FEAT_XSAVEC) || has_feature(c, FEAT_XSAVES))) out[EBX_] = xstate_size(c->xcr0, true);
        break;
    case 7:
        if (subleaf == 0) out[ECX_] = (out[ECX_] & ~(uint32_t)BIT(4)) | (c->cr4 & CR4_PKE ? BIT(4) : 0); /* OSPKE */
        break;
    case 1:
        out[EBX_] = (out[EBX_] & 0x00ffffffu) | (c->id & 0xff) << 24;
        out[ECX_] &= ~(uint32_t)BIT(27);
        if (c->cr4 & CR4_OSXSAVE) out[ECX_] |= BIT(27);
        if (c->lapic && !(lapic_base(c) & BIT(11))) out[EDX_] &= ~(uint32_t)BIT(9);
        if (!amd && !(c->msr_misc_enable & MISC_ENABLE_MONITOR)) out[ECX_] &= ~(uint32_t)BIT(3);
        break;
    case 0x80000001:
        if (amd && c->lapic && !(lapic_base(c) & BIT(11))) out[EDX_] &= ~(uint32_t)BIT(9);
        if (!amd && (c->msr_misc_enable & MISC_ENABLE_XD_DISABLE)) out[EDX_] &= ~(uint32_t)BIT(20);
        break;
    case 0: /* SDM 4 "IA32_MISC_ENABLE": Limit CPUID Maxval */
        if (!amd && (c->msr_misc_enable & MISC_ENABLE_LIMIT_CPUID) && out[EAX_] > 2) out[EAX_] = 2;
        break;
    case 0x80000008: out[EAX_] = (out[EAX_] & ~0xff00u) | linear_bits(c) << 8; break;
    case 0xb: case 0x1f: out[EDX_] = c->id; break;
    case 0x15:
        /* SDM 2 "CPUID", leaf 15H: TSC = crystal * EBX / EAX. The crystal also drives the APIC timer: 1 GHz. */
        if (out[EAX_] == 0) {
            out[EAX_] = 1000000;
            out[EBX_] = (uint32_t)clock_ns_to_tsc(c->vm, 1000000);
            out[ECX_] = 1000000000;
        }
        break;
    case 0x16:
        if (out[EAX_] == 0) {
            out[EAX_] = out[EBX_] = (uint32_t)(clock_ns_to_tsc(c->vm, 1000000) / 1000) & 0xffff;
            out[ECX_] = 100;
        }
        break;
    default: break;
    }
}

void cpuid_lookup(struct kvs_vcpu *c, uint32_t leaf, uint32_t subleaf, uint32_t out[4])
{
    const struct kvs_cpuid_entry2 *e = find(c, leaf, subleaf);
    memset(out, 0, 16);
    if (leaf > range_maximum(c, leaf)) {
        /* SDM 2 "CPUID": beyond the last leaf Intel answers with the highest basic leaf, AMD with zeros */
        const struct kvs_cpuid_entry2 *basic = find(c, 0, 0);
        if (!basic || cpuid_is_amd(c)) return;
        leaf = basic->eax;
        e = find(c, leaf, subleaf);
    }
    if (e) {
        out[EAX_] = e->eax;
        out[EBX_] = e->ebx;
        out[ECX_] = e->ecx;
        out[EDX_] = e->edx;
    } else if (leaf == 0xb || leaf == 0x1f) {
        out[ECX_] = subleaf & 0xff; /* an invalid level still returns its number and the APIC id */
        if (!find(c, leaf, 0)) {
            out[ECX_] = 0;
            return;
        }
    } else {
        return;
    }
    fill_dynamic(c, leaf, subleaf, out);
}

void cpuid_changed(struct kvs_vcpu *c)
{
    uint64_t features[2] = { 0, 0 };
    for (uint32_t k = 0; k < ARRAY_SIZE(feature_bits); k++) {
        uint32_t feature = feature_bits[k].feature, leaf = feature_bits[k].leaf;
        const struct kvs_cpuid_entry2 *e = find(c, leaf, feature_subleaf(feature, leaf));
        if (!e) continue;
        const uint32_t out[4] = { e->eax, e->ebx, e->ecx, e->edx };
        if (out[feature_bits[k].reg] >> feature_bits[k].bit & 1) features[feature / 64] |= BIT(feature % 64);
    }
    c->cpuid_features = features[0] & ~host_lacks();
    c->cpuid_system = features[1];
    if (c->blocks) vcpu_request(c, REQ_CODE_FLUSH);
}
