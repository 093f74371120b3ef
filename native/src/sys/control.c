/* Control registers and EFER. SDM 3A "Control Registers", "Extended Feature Enable Register" */
#include "transfer.h"

#define CR4_PAGING (CR4_PSE | CR4_PAE | CR4_PGE | CR4_PCIDE | CR4_SMEP | CR4_SMAP | CR4_PKE | CR4_LA57 | CR4_LAM_SUP | CR4_PKS)

static void flush_translations(struct kvs_vcpu *c)
{
    tlb_flush_all(c);
    jc_flush(c);
}

static bool uses_pdptrs(uint64_t cr0, uint64_t cr4, uint64_t efer)
{
    return cr0 & CR0_PG && cr4 & CR4_PAE && !(efer & EFER_LME);
}

int write_cr0(struct kvs_vcpu *c, uint64_t v)
{
    uint64_t old = c->cr0, changed;
    if (v >> 32) return raise_gp(c, 0);
    v &= CR0_PE | CR0_MP | CR0_EM | CR0_TS | CR0_NE | CR0_WP | CR0_AM | CR0_NW | CR0_CD | CR0_PG;
    v |= CR0_ET;
    changed = old ^ v;
    if (v & CR0_PG && !(v & CR0_PE)) return raise_gp(c, 0);
    if (v & CR0_NW && !(v & CR0_CD)) return raise_gp(c, 0);

    uint64_t efer = c->efer;
    if (changed & CR0_PG) {
        if (v & CR0_PG) {
            if (efer & EFER_LME) {
                /* SDM 3A "Initializing IA-32e Mode" */
                bool bad_tr = !(c->tr.attr & ATTR_NULL) && !(c->tr.attr & 8);
                if (!(c->cr4 & CR4_PAE) || c->seg[SEG_CS].attr & ATTR_L || bad_tr) return raise_gp(c, 0);
                efer |= EFER_LMA;
            }
        } else {
            if (is_code64(c) || c->cr4 & CR4_PCIDE) return raise_gp(c, 0);
            efer &= ~(uint64_t)EFER_LMA;
        }
    }
    /* SDM 3A "PDPTE Registers": loaded when CR0.CD, NW or PG change with PAE paging in use */
    if (uses_pdptrs(v, c->cr4, efer) && changed & (CR0_PG | CR0_CD | CR0_NW) && mmu_load_pdptrs(c, c->cr3) < 0)
        return raise_gp(c, 0);

    c->cr0 = v;
    c->efer = efer;
    if (changed & (CR0_PG | CR0_PE | CR0_WP)) flush_translations(c);
    vcpu_update_mode(c);
    return ST_OK;
}

uint64_t cr3_allowed(const struct kvs_vcpu *c)
{
    return PHYS_MASK | (has_feature(c, FEAT_LAM) ? CR3_LAM_U48 | CR3_LAM_U57 : 0);
}

int write_cr3(struct kvs_vcpu *c, uint64_t v)
{
    bool keep = false;
    if (is_long_mode(c)) {
        if (c->cr4 & CR4_PCIDE) {
            keep = v >> 63;
            v &= ~BIT(63);
        }
        if (v & ~cr3_allowed(c)) return raise_gp(c, 0);
    } else {
        v = (uint32_t)v;
        if (uses_pdptrs(c->cr0, c->cr4, c->efer) && mmu_load_pdptrs(c, v) < 0) return raise_gp(c, 0);
    }
    /* The soft TLB holds one PCID: only a rewrite of the same CR3 may keep what is there. */
    if (!keep || v != c->cr3) {
        const uint64_t changed = v ^ c->cr3;
        c->cr3 = v;
        if (UNLIKELY(changed & (CR3_LAM_U48 | CR3_LAM_U57))) {
            vcpu_update_linear(c);
            tlb_flush_all(c);
        } else {
            tlb_flush_nonglobal(c);
        }
        jc_flush(c);
    }
    return ST_OK;
}

uint64_t cr4_allowed(const struct kvs_vcpu *c)
{
    static const struct { uint32_t bit; uint8_t feature; } by_feature[] = {
        { CR4_VME | CR4_PVI, FEAT_VME }, { CR4_TSD, FEAT_TSC }, { CR4_DE, FEAT_DE }, { CR4_PSE, FEAT_PSE },
        { CR4_PAE, FEAT_PAE }, { CR4_MCE, FEAT_MCE }, { CR4_PGE, FEAT_PGE }, { CR4_OSFXSR, FEAT_FXSR },
        { CR4_OSXMMEXCPT, FEAT_SSE }, { CR4_UMIP, FEAT_UMIP }, { CR4_FSGSBASE, FEAT_FSGSBASE },
        { CR4_PCIDE, FEAT_PCID }, { CR4_OSXSAVE, FEAT_XSAVE }, { CR4_SMEP, FEAT_SMEP }, { CR4_SMAP, FEAT_SMAP },
        { CR4_PKE, FEAT_PKU }, { CR4_LA57, FEAT_LA57 }, { CR4_LAM_SUP, FEAT_LAM }, { CR4_PKS, FEAT_PKS },
    };
    uint64_t allowed = CR4_PCE;
    for (uint32_t k = 0; k < ARRAY_SIZE(by_feature); k++)
        if (has_feature(c, by_feature[k].feature)) allowed |= by_feature[k].bit;
    return allowed;
}

int write_cr4(struct kvs_vcpu *c, uint64_t v)
{
    uint64_t old = c->cr4, changed = old ^ v;
    if (v & ~cr4_allowed(c)) return raise_gp(c, 0);
    if (is_long_mode(c)) {
        /* SDM 3A "Control Registers": the number of levels changes outside IA-32e mode only */
        if (!(v & CR4_PAE) || changed & CR4_LA57) return raise_gp(c, 0);
    } else if (v & CR4_PCIDE) {
        return raise_gp(c, 0);
    }
    /* SDM 3A "Process-Context Identifiers (PCIDs)" */
    if (changed & v & CR4_PCIDE && c->cr3 & 0xfff) return raise_gp(c, 0);
    if (uses_pdptrs(c->cr0, v, c->efer) && changed & (CR4_PAE | CR4_PGE | CR4_PSE | CR4_SMEP)) {
        uint64_t cr4 = c->cr4;
        c->cr4 = v;
        if (mmu_load_pdptrs(c, c->cr3) < 0) {
            c->cr4 = cr4;
            return raise_gp(c, 0);
        }
    }
    c->cr4 = v;
    if (changed & CR4_PAGING) flush_translations(c);
    vcpu_update_mode(c);
    return ST_OK;
}

uint64_t efer_allowed(const struct kvs_vcpu *c)
{
    uint64_t allowed = 0;
    if (has_feature(c, FEAT_SYSCALL)) allowed |= EFER_SCE;
    if (has_feature(c, FEAT_LM)) allowed |= EFER_LME | EFER_LMA;
    if (has_feature(c, FEAT_NX) && (cpuid_is_amd(c) || !(c->msr_misc_enable & MISC_ENABLE_XD_DISABLE))) allowed |= EFER_NX;
    if (has_feature(c, FEAT_AUTOIBRS)) allowed |= EFER_AUTOIBRS;
    return allowed;
}

int write_efer(struct kvs_vcpu *c, uint64_t v)
{
    uint64_t changed;
    if (v & ~efer_allowed(c)) return raise_gp(c, 0);
    v = (v & ~(uint64_t)EFER_LMA) | (c->efer & EFER_LMA); /* LMA follows LME and CR0.PG */
    changed = v ^ c->efer;
    if (changed & EFER_LME && c->cr0 & CR0_PG) return raise_gp(c, 0);
    c->efer = v;
    if (changed & EFER_NX) flush_translations(c);
    vcpu_update_mode(c);
    return ST_OK;
}

/* Code needs no key, so what was fetched stays. */
void pkru_write(struct kvs_vcpu *c, uint32_t v)
{
    if (v == c->pkru) return;
    c->pkru = v;
    if (c->cr4 & CR4_PKE) tlb_flush_data(c);
}
