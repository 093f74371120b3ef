/* Model-specific registers. SDM 4 "Model-Specific Registers", AMD APM 2 "MSR Cross-Reference",
 * KVM "KVM-specific MSRs" */
#include "../irqchip/irqchip.h"
#include "transfer.h"

enum {
    MSR_TSC = 0x10, MSR_KVM_WALL_CLOCK = 0x11, MSR_KVM_SYSTEM_TIME = 0x12, MSR_PLATFORM_ID = 0x17,
    MSR_APIC_BASE = 0x1b, MSR_EBL_CR_POWERON = 0x2a, MSR_SMI_COUNT = 0x34, MSR_FEAT_CTL = 0x3a, MSR_TSC_ADJUST = 0x3b, MSR_SPEC_CTRL = 0x48, MSR_PRED_CMD = 0x49, MSR_BIOS_UPDT_TRIG = 0x79,
    MSR_BIOS_SIGN_ID = 0x8b, MSR_SMBASE = 0x9e, MSR_MTRRCAP = 0xfe, MSR_ARCH_CAPABILITIES = 0x10a, MSR_FLUSH_CMD = 0x10b, MSR_SYSENTER_CS = 0x174, MSR_SYSENTER_ESP, MSR_SYSENTER_EIP,
    MSR_MCG_CAP = 0x179, MSR_MCG_STATUS = 0x17a, MSR_MCG_CTL = 0x17b, MSR_MISC_ENABLE = 0x1a0, MSR_DEBUGCTL = 0x1d9,
    MSR_LASTBRANCH_FROM = 0x1db, MSR_LASTINT_TO = 0x1de, MSR_MTRR_VAR0 = 0x200, MSR_MTRR_FIX64K = 0x250,
    MSR_MTRR_FIX16K = 0x258, MSR_MTRR_FIX4K = 0x268, MSR_PAT = 0x277, MSR_MTRR_DEF_TYPE = 0x2ff,
    MSR_MC0_CTL = 0x400, MSR_TSC_DEADLINE = 0x6e0, MSR_PKRS = 0x6e1, MSR_X2APIC_FIRST = 0x800, MSR_X2APIC_LAST = 0x8ff, MSR_XSS = 0xda0,
    MSR_KVM_WALL_CLOCK_NEW = 0x4b564d00, MSR_KVM_SYSTEM_TIME_NEW = 0x4b564d01, MSR_KVM_STEAL_TIME = 0x4b564d03,
    MSR_KVM_PV_EOI = 0x4b564d04, MSR_KVM_POLL_CONTROL = 0x4b564d05,
};
#define MSR_EFER 0xc0000080u
#define MSR_STAR 0xc0000081u
#define MSR_LSTAR 0xc0000082u
#define MSR_CSTAR 0xc0000083u
#define MSR_SFMASK 0xc0000084u
#define MSR_FS_BASE 0xc0000100u
#define MSR_GS_BASE 0xc0000101u
#define MSR_KERNEL_GS_BASE 0xc0000102u
#define MSR_TSC_AUX 0xc0000103u
#define MSR_K7_EVNTSEL0 0xc0010000u
#define MSR_K7_PERFCTR3 0xc0010007u
#define MSR_SYSCFG 0xc0010010u
#define MSR_HWCR 0xc0010015u
#define MSR_TOP_MEM 0xc001001au
#define MSR_TOP_MEM2 0xc001001du
#define MSR_NB_CFG 0xc001001fu
#define MSR_PATCH_LOADER 0xc0010020u
#define MSR_INT_PENDING 0xc0010055u
#define MSR_DE_CFG 0xc0011029u
#define MSR_BU_CFG 0xc0011023u
#define MSR_BU_CFG2 0xc001102au

#define MTRR_VARS 8u
/* 8 variable ranges, fixed ranges, write-combining. SDM 3A "IA32_MTRRCAP" */
#define MTRRCAP (MTRR_VARS | BIT(8) | BIT(10))
/*
 * SDM 4 "IA32_ARCH_CAPABILITIES": RDCL_NO, IBRS_ALL, SKIP_L1DFL_VMENTRY, SSB_NO, MDS_NO, IF_PSCHANGE_MC_NO, TAA_NO,
 * SBDR_SSDP_NO, FBSDP_NO, PSDP_NO, BHI_NO, PBRSB_NO, GDS_NO, RFDS_NO, ITS_NO: no guest instruction runs ahead here.
 */
#define ARCH_CAPABILITIES (BIT(0) | BIT(1) | BIT(3) | BIT(4) | BIT(5) | BIT(6) | BIT(8) | BIT(13) | BIT(14) | BIT(15) | BIT(20) | \
                           BIT(24) | BIT(26) | BIT(27) | BIT(62))
/* AMD APM 2 "Hardware Configuration Register": MONMWAITUSEREN, McStatusWrEn, TscFreqSel are kept; FFDIS (6), IGNNE (8)
 * and CPBDIS (25) have nothing to switch here, and neither has TLBCACHEDIS (3). */
#define HWCR_KEPT (BIT(9) | BIT(18) | BIT(24))
#define HWCR_IGNORED (BIT(3) | BIT(6) | BIT(8) | BIT(25))
/* Bits of IA32_MISC_ENABLE that exist, and those of them that only tell something. */
#define MISC_ENABLE_BITS (MISC_ENABLE_RESET | MISC_ENABLE_FIXED | BIT(3) | BIT(16) | MISC_ENABLE_LIMIT_CPUID | BIT(23) | \
                          MISC_ENABLE_XD_DISABLE)
#define MISC_ENABLE_FIXED (BIT(7) | BIT(11) | BIT(12))

uint64_t tsc_read(struct kvs_vcpu *c) { return clock_tsc(c->vm) + (uint64_t)c->tsc_offset; }

/* Index into msr_mtrr_fix, or -1. */
static int mtrr_fix_index(uint32_t msr)
{
    if (msr == MSR_MTRR_FIX64K) return 0;
    if (msr == MSR_MTRR_FIX16K || msr == MSR_MTRR_FIX16K + 1) return (int)(1 + msr - MSR_MTRR_FIX16K);
    if (msr >= MSR_MTRR_FIX4K && msr < MSR_MTRR_FIX4K + 8) return (int)(3 + msr - MSR_MTRR_FIX4K);
    return -1;
}
static bool is_mtrr_var(uint32_t msr) { return msr >= MSR_MTRR_VAR0 && msr < MSR_MTRR_VAR0 + 2 * MTRR_VARS; }
static bool is_mc(uint32_t msr) { return msr >= MSR_MC0_CTL && msr < MSR_MC0_CTL + 4 * MC_BANKS; }

/* Every byte a memory type: UC, WC, WT, WP, WB, and UC- in the PAT only. */
static bool memory_types_valid(uint64_t v, bool pat)
{
    uint32_t legal = 1 << 0 | 1 << 1 | 1 << 4 | 1 << 5 | 1 << 6 | (pat ? 1 << 7 : 0);
    for (uint32_t k = 0; k < 8; k++) {
        uint32_t type = (uint8_t)(v >> (8 * k));
        if (type > 7 || !(legal >> type & 1)) return false;
    }
    return true;
}

/* Registers that are plain storage. */
static uint64_t *msr_storage(struct kvs_vcpu *c, uint32_t msr)
{
    switch (msr) {
    case MSR_SYSENTER_CS: return &c->msr_sysenter_cs;
    case MSR_SYSENTER_ESP: return &c->msr_sysenter_esp;
    case MSR_SYSENTER_EIP: return &c->msr_sysenter_eip;
    case MSR_STAR: return &c->msr_star;
    case MSR_LSTAR: return &c->msr_lstar;
    case MSR_CSTAR: return &c->msr_cstar;
    case MSR_SFMASK: return &c->msr_sfmask;
    case MSR_KERNEL_GS_BASE: return &c->msr_kernel_gs_base;
    case MSR_TSC_AUX: return &c->msr_tsc_aux;
    case MSR_PAT: return &c->msr_pat;
    case MSR_MTRR_DEF_TYPE: return &c->msr_mtrr_def;
    case MSR_MISC_ENABLE: return &c->msr_misc_enable;
    case MSR_MCG_STATUS: return &c->msr_mcg_status;
    case MSR_MCG_CTL: return &c->msr_mcg_ctl;
    case MSR_SPEC_CTRL: return &c->msr_spec_ctrl;
    case MSR_HWCR: return &c->msr_hwcr;
    case MSR_DEBUGCTL: return &c->msr_debugctl;
    case MSR_PKRS: return &c->msr_pkrs;
    case MSR_BIOS_SIGN_ID: return &c->msr_microcode;
    case MSR_KVM_WALL_CLOCK: case MSR_KVM_WALL_CLOCK_NEW: return &c->msr_kvm_wall_clock;
    case MSR_KVM_SYSTEM_TIME: case MSR_KVM_SYSTEM_TIME_NEW: return &c->msr_kvm_system_time;
    case MSR_KVM_POLL_CONTROL: return &c->msr_kvm_poll_control;
    case MSR_KVM_STEAL_TIME: return &c->msr_kvm_steal_time;
    case MSR_KVM_PV_EOI: return &c->msr_kvm_pv_eoi;
    case MSR_TSC_ADJUST: return &c->msr_tsc_adjust;
    case MSR_SMI_COUNT: return &c->msr_smi_count;
    default: break;
    }
    if (is_mtrr_var(msr)) return &c->msr_mtrr_var[msr - MSR_MTRR_VAR0];
    if (mtrr_fix_index(msr) >= 0) return &c->msr_mtrr_fix[mtrr_fix_index(msr)];
    if (is_mc(msr)) return &c->msr_mc[msr - MSR_MC0_CTL];
    return NULL;
}

static uint64_t spec_ctrl_allowed(const struct kvs_vcpu *c)
{
    uint64_t allowed = 0;
    if (has_feature(c, FEAT_SPECCTRL) || has_feature(c, FEAT_AMDIBRS)) allowed |= BIT(0);
    if (has_feature(c, FEAT_STIBP) || has_feature(c, FEAT_AMDSTIBP)) allowed |= BIT(1);
    if (has_feature(c, FEAT_SSBD) || has_feature(c, FEAT_AMDSSBD)) allowed |= BIT(2);
    return allowed;
}

/* Does the CPUID table give the guest this register? */
static bool msr_offered(const struct kvs_vcpu *c, uint32_t msr)
{
    uint32_t out[4];
    switch (msr) {
    case MSR_SYSENTER_CS: case MSR_SYSENTER_ESP: case MSR_SYSENTER_EIP: return has_feature(c, FEAT_SEP);
    case MSR_STAR: return has_feature(c, FEAT_SYSCALL);
    case MSR_LSTAR: case MSR_CSTAR: case MSR_SFMASK: case MSR_FS_BASE: case MSR_GS_BASE: case MSR_KERNEL_GS_BASE:
        return has_feature(c, FEAT_LM);
    case MSR_EFER: return efer_allowed(c) != 0;
    case MSR_TSC_AUX: return has_feature(c, FEAT_RDTSCP);
    case MSR_PAT: return has_feature(c, FEAT_PAT);
    case MSR_MTRRCAP: case MSR_MTRR_DEF_TYPE: return has_feature(c, FEAT_MTRR);
    case MSR_TSC: return has_feature(c, FEAT_TSC);
    case MSR_TSC_DEADLINE: return c->lapic && has_feature(c, FEAT_TSCDEADLINE);
    case MSR_TSC_ADJUST: return has_feature(c, FEAT_TSCADJUST);
    case MSR_MCG_CAP: case MSR_MCG_STATUS: case MSR_MCG_CTL: return has_feature(c, FEAT_MCE);
    case MSR_SPEC_CTRL: return spec_ctrl_allowed(c) != 0;
    case MSR_PRED_CMD: return has_feature(c, FEAT_SPECCTRL) || has_feature(c, FEAT_IBPB);
    case MSR_FLUSH_CMD: return has_feature(c, FEAT_FLUSHL1D);
    case MSR_ARCH_CAPABILITIES: return has_feature(c, FEAT_ARCHCAP);
    case MSR_FEAT_CTL: return !cpuid_is_amd(c);
    case MSR_HWCR: return cpuid_is_amd(c);
    case MSR_SMI_COUNT: return c->vm->config.flags & KVS_VM_SMM;
    case MSR_SMBASE: return false; /* SDM 4: guests read it in VMX only */
    case MSR_XSS: return has_feature(c, FEAT_XSAVES);
    case MSR_PKRS: return has_feature(c, FEAT_PKS);
    case MSR_KVM_WALL_CLOCK: case MSR_KVM_SYSTEM_TIME:
        cpuid_lookup((struct kvs_vcpu *)c, 0x40000001, 0, out);
        return out[0] & 1;
    case MSR_KVM_WALL_CLOCK_NEW: case MSR_KVM_SYSTEM_TIME_NEW:
        cpuid_lookup((struct kvs_vcpu *)c, 0x40000001, 0, out);
        return out[0] & 8;
    case MSR_KVM_POLL_CONTROL:
        cpuid_lookup((struct kvs_vcpu *)c, 0x40000001, 0, out);
        return out[0] & BIT(12);
    case MSR_KVM_STEAL_TIME:
        cpuid_lookup((struct kvs_vcpu *)c, 0x40000001, 0, out);
        return out[0] & KVM_FEATURE_STEAL_TIME;
    case MSR_KVM_PV_EOI:
        cpuid_lookup((struct kvs_vcpu *)c, 0x40000001, 0, out);
        return c->lapic && out[0] & KVM_FEATURE_PV_EOI;
    default: break;
    }
    if (is_mtrr_var(msr) || mtrr_fix_index(msr) >= 0) return has_feature(c, FEAT_MTRR);
    if (is_mc(msr)) return has_feature(c, FEAT_MCE);
    if (msr >= MSR_X2APIC_FIRST && msr <= MSR_X2APIC_LAST) return c->lapic && has_feature(c, FEAT_X2APIC);
    return true;
}

int msr_read(struct kvs_vcpu *c, uint32_t msr, uint64_t *value, bool host)
{
    if (!host && !msr_offered(c, msr)) return -1;
    const uint64_t *storage = msr_storage(c, msr);
    if (storage) {
        *value = *storage;
        return 0;
    }
    if (msr >= MSR_X2APIC_FIRST && msr <= MSR_X2APIC_LAST) return c->lapic ? lapic_msr_read(c, msr, value) : -1;
    if (msr >= MSR_LASTBRANCH_FROM && msr <= MSR_LASTINT_TO) {
        *value = 0;
        return 0;
    }
    *value = 0;
    switch (msr) {
    case MSR_TSC: *value = tsc_read(c); return 0;
    case MSR_APIC_BASE: *value = c->lapic ? lapic_base(c) : c->run->apic_base; return 0;
    case MSR_TSC_DEADLINE: return c->lapic ? lapic_msr_read(c, msr, value) : -1;
    case MSR_MTRRCAP: *value = MTRRCAP; return 0;
    case MSR_MCG_CAP: *value = mce_capability(); return 0;
    case MSR_ARCH_CAPABILITIES: *value = ARCH_CAPABILITIES; return 0;
    case MSR_FEAT_CTL: *value = 1; return 0; /* locked, and nothing in it enabled */
    case MSR_EFER: *value = c->efer; return 0;
    case MSR_SMBASE: *value = c->smbase; return 0;
    case MSR_FS_BASE: *value = c->seg[SEG_FS].base; return 0;
    case MSR_GS_BASE: *value = c->seg[SEG_GS].base; return 0;
    case MSR_PLATFORM_ID: case MSR_EBL_CR_POWERON: case MSR_XSS: return 0;
    default: break;
    }
    if (!host && !cpuid_is_amd(c)) return -1;
    if (msr >= MSR_K7_EVNTSEL0 && msr <= MSR_K7_PERFCTR3) return 0;
    switch (msr) {
    case MSR_SYSCFG: case MSR_TOP_MEM: case MSR_TOP_MEM2: case MSR_NB_CFG: case MSR_INT_PENDING:
    case MSR_BU_CFG: case MSR_BU_CFG2: return 0;
    case MSR_DE_CFG: *value = 2; return 0; /* LFENCE is serializing */
    default: return -1;
    }
}

/* Reserved bits of the storage registers. */
static bool msr_value_valid(const struct kvs_vcpu *c, uint32_t msr, uint64_t v, bool host)
{
    uint64_t addr_reserved = ~PHYS_MASK;
    switch (msr) {
    case MSR_SYSENTER_ESP: case MSR_SYSENTER_EIP: case MSR_LSTAR: case MSR_CSTAR: case MSR_KERNEL_GS_BASE:
        return is_canonical_widest(c, v);
    case MSR_SYSENTER_CS: case MSR_SFMASK: case MSR_PKRS: return v >> 32 == 0;
    case MSR_TSC_AUX: return v >> 32 == 0 || cpuid_is_amd(c);
    case MSR_PAT: return memory_types_valid(v, true);
    /* SDM 3A "IA32_MTRR_DEF_TYPE MSR": type, fixed-range enable, enable */
    case MSR_MTRR_DEF_TYPE: return !(v & ~0xcffull) && memory_types_valid(v & 0xff, false);
    case MSR_MCG_STATUS: return host || !(v & ~7ull);
    case MSR_MCG_CTL: return host || v == 0 || v == ~0ull;
    case MSR_SPEC_CTRL: return !(v & ~spec_ctrl_allowed(c));
    case MSR_HWCR: return !(v & ~(HWCR_KEPT | HWCR_IGNORED));
    case MSR_MISC_ENABLE: return !(v & ~MISC_ENABLE_BITS);
    case MSR_DEBUGCTL: return !(v & ~3ull); /* LBR and BTF */
    case MSR_BIOS_SIGN_ID: return host || v == 0;
    case MSR_SMI_COUNT: return host;
    case MSR_KVM_POLL_CONTROL: return v <= 1;
    case MSR_KVM_STEAL_TIME: return !(v & STEAL_RESERVED);
    default: break;
    }
    if (is_mtrr_var(msr)) {
        if (msr & 1) return !(v & (addr_reserved | 0x7ff)); /* mask: valid bit 11 */
        return !(v & (addr_reserved | 0xf00)) && memory_types_valid(v & 0xff, false);
    }
    if (mtrr_fix_index(msr) >= 0) return memory_types_valid(v, false);
    return !is_mc(msr) || mce_value_valid(c, msr - MSR_MC0_CTL, v, host);
}

static int set_segment_base(struct kvs_vcpu *c, uint32_t seg, uint64_t v)
{
    if (!is_canonical_widest(c, v)) return -1;
    c->seg[seg].base = v;
    segments_changed(c);
    return 0;
}

static void set_tsc_offset(struct kvs_vcpu *c, int64_t offset)
{
    if (offset == c->tsc_offset) return;
    c->tsc_offset = offset;
    if (c->lapic) lapic_tsc_changed(c);
    kvmclock_update(c);
}

static int storage_write(struct kvs_vcpu *c, uint32_t msr, uint64_t *storage, uint64_t v, bool host)
{
    if (!msr_value_valid(c, msr, v, host)) return -1;
    switch (msr) {
    case MSR_KVM_WALL_CLOCK: case MSR_KVM_WALL_CLOCK_NEW:
        *storage = v;
        if (!host) kvmclock_write_wall_clock(c, v);
        return 0;
    case MSR_KVM_SYSTEM_TIME: case MSR_KVM_SYSTEM_TIME_NEW:
        *storage = v;
        /* On restore the structure is in guest memory already, and with a virtual clock it is right. */
        if (!host || c->vm->config.clock_mode == KVS_CLOCK_REAL) kvmclock_write_system_time(c, v);
        return 0;
    case MSR_KVM_STEAL_TIME:
        *storage = v;
        if (!host) steal_time_enable(c);
        return 0;
    case MSR_KVM_PV_EOI: return pv_eoi_enable(c, v, host);
    case MSR_TSC_ADJUST:
        /* The host restores value and TSC separately. */
        if (!host) set_tsc_offset(c, c->tsc_offset + (int64_t)(v - *storage));
        *storage = v;
        return 0;
    case MSR_BIOS_SIGN_ID: /* the guest writes 0 before it asks for the revision with CPUID */
        if (host) *storage = v;
        return 0;
    case MSR_TSC_AUX: *storage = (uint32_t)v; return 0;
    case MSR_PKRS:
        *storage = v;
        if (c->cr4 & CR4_PKS) tlb_flush_data(c);
        return 0;
    case MSR_HWCR: *storage = v & HWCR_KEPT; return 0;
    case MSR_MISC_ENABLE:
        if (!host) v = (v & ~MISC_ENABLE_FIXED) | (*storage & MISC_ENABLE_FIXED);
        *storage = v;
        return 0;
    default: *storage = v; return 0;
    }
}

/* AMD registers that read as a constant here. */
static int amd_write(uint32_t msr, uint64_t v)
{
    if (msr >= MSR_K7_EVNTSEL0 && msr <= MSR_K7_PERFCTR3) return 0; /* no counters: writes have no effect */
    switch (msr) {
    case MSR_DE_CFG: return v & ~2ull ? -1 : 0;
    case MSR_SYSCFG: case MSR_TOP_MEM: case MSR_TOP_MEM2: case MSR_INT_PENDING: return v ? -1 : 0;
    case MSR_NB_CFG: case MSR_BU_CFG: case MSR_BU_CFG2: case MSR_PATCH_LOADER: return 0;
    default: return -1;
    }
}

int msr_write(struct kvs_vcpu *c, uint32_t msr, uint64_t v, bool host)
{
    if (!host && !msr_offered(c, msr)) return -1;
    uint64_t *storage = msr_storage(c, msr);
    if (storage) return storage_write(c, msr, storage, v, host);
    if (msr >= MSR_X2APIC_FIRST && msr <= MSR_X2APIC_LAST) return c->lapic ? lapic_msr_write(c, msr, v) : -1;
    switch (msr) {
    case MSR_TSC: {
        int64_t offset = (int64_t)(v - clock_tsc(c->vm));
        /* SDM 3B "Time-Stamp Counter Adjustment": a write to the TSC shows in IA32_TSC_ADJUST */
        if (!host) c->msr_tsc_adjust += (uint64_t)(offset - c->tsc_offset);
        set_tsc_offset(c, offset);
        return 0;
    }
    case MSR_APIC_BASE:
        if (c->lapic) return host ? lapic_restore_base(c, v) : lapic_set_base(c, v);
        if (v & (~PHYS_MASK | 0x2ff)) return -1;
        c->run->apic_base = v;
        return 0;
    case MSR_TSC_DEADLINE: return c->lapic ? lapic_msr_write(c, msr, v) : -1;
    case MSR_EFER:
        if (host) {
            v = (v & ~(uint64_t)EFER_LMA) | (c->efer & EFER_LMA); /* LMA comes with CR0, as under KVM */
            if (v & ~efer_allowed(c) || (v & EFER_LMA && !(v & EFER_LME))) return -1;
            c->efer = v;
            tlb_flush_all(c);
            vcpu_update_mode(c);
            return 0;
        }
        return write_efer(c, v) == ST_OK ? 0 : -1;
    case MSR_SMBASE:
        if (v >> 32) return -1;
        c->smbase = (uint32_t)v;
        return 0;
    case MSR_FS_BASE: return set_segment_base(c, SEG_FS, v);
    case MSR_GS_BASE: return set_segment_base(c, SEG_GS, v);
    /* Nothing is predicted or cached that a guest could find: the commands have nothing to do. */
    case MSR_PRED_CMD: case MSR_FLUSH_CMD: return v & ~1ull ? -1 : 0;
    case MSR_ARCH_CAPABILITIES: return host && v == ARCH_CAPABILITIES ? 0 : -1;
    case MSR_FEAT_CTL: return host && v == 1 ? 0 : -1;
    case MSR_BIOS_UPDT_TRIG: return 0; /* microcode updates are accepted and do nothing, as under KVM */
    case MSR_EBL_CR_POWERON: return 0;
    case MSR_XSS: return v ? -1 : 0; /* no supervisor state component */
    default: break;
    }
    if (!host && !cpuid_is_amd(c)) return -1;
    return amd_write(msr, v);
}

static const uint32_t state_msrs[] = {
    MSR_TSC, MSR_APIC_BASE, MSR_TSC_ADJUST, MSR_SMI_COUNT, MSR_SMBASE, MSR_BIOS_SIGN_ID, MSR_SYSENTER_CS, MSR_SYSENTER_ESP, MSR_SYSENTER_EIP,
    MSR_MCG_STATUS, MSR_MCG_CTL, MSR_SPEC_CTRL, MSR_HWCR, MSR_MISC_ENABLE, MSR_DEBUGCTL, MSR_PKRS, MSR_PAT, MSR_MTRR_DEF_TYPE, MSR_MTRR_FIX64K, MSR_MTRR_FIX16K,
    MSR_MTRR_FIX16K + 1, MSR_MTRR_FIX4K, MSR_MTRR_FIX4K + 1, MSR_MTRR_FIX4K + 2, MSR_MTRR_FIX4K + 3,
    MSR_MTRR_FIX4K + 4, MSR_MTRR_FIX4K + 5, MSR_MTRR_FIX4K + 6, MSR_MTRR_FIX4K + 7, MSR_EFER, MSR_STAR, MSR_LSTAR,
    MSR_CSTAR, MSR_SFMASK, MSR_FS_BASE, MSR_GS_BASE, MSR_KERNEL_GS_BASE, MSR_TSC_AUX, MSR_KVM_POLL_CONTROL,
    MSR_KVM_STEAL_TIME, MSR_KVM_PV_EOI,
    MSR_KVM_WALL_CLOCK_NEW, MSR_KVM_SYSTEM_TIME_NEW, MSR_TSC_DEADLINE, /* after the TSC: it is compared with it */
};

int32_t msr_index_list(uint32_t *indices, uint32_t *count)
{
    uint32_t capacity = *count, n = 0, needed = (uint32_t)ARRAY_SIZE(state_msrs) + 2 * MTRR_VARS + 4 * MC_BANKS;
    *count = needed;
    if (capacity < needed) return -KVS_ERANGE;
    for (uint32_t k = 0; k < ARRAY_SIZE(state_msrs); k++) indices[n++] = state_msrs[k];
    for (uint32_t k = 0; k < 2 * MTRR_VARS; k++) indices[n++] = MSR_MTRR_VAR0 + k;
    for (uint32_t k = 0; k < 4 * MC_BANKS; k++) indices[n++] = MSR_MC0_CTL + k;
    return KVS_OK;
}
