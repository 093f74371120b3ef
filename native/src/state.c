/*
 * vCPU state in KVM's structures. Setters check the whole image first and change nothing when it
 * is not one that a processor can be in: images come from files.
 */
#include <stdlib.h>

#include "clock.h"
#include "interp/interp.h"
#include "interp/x87.h"
#include "irqchip/irqchip.h"
#include "sys/xstate.h"

/* The vCPU must be at rest: not running, no instruction half done. */
static int32_t take(struct kvs_vcpu *c)
{
    if (!c) return -KVS_EINVAL;
    return atomic_exchange(&c->running, 1) ? -KVS_EBUSY : KVS_OK;
}
static int32_t give(struct kvs_vcpu *c, int32_t rc)
{
    atomic_store(&c->running, 0);
    return rc;
}
#define TAKE(c, arg)                                                                              \
    do {                                                                                          \
        if (!(arg)) return -KVS_EINVAL;                                                           \
        int32_t rc_ = take(c);                                                                    \
        if (rc_ != KVS_OK) return rc_;                                                            \
    } while (0)

/* ---- general registers ---- */
KVS_API int32_t kvs_vcpu_get_regs(struct kvs_vcpu *c, struct kvs_regs *r)
{
    TAKE(c, r);
    const uint64_t *g = c->gpr;
    *r = (struct kvs_regs){ .rax = g[RAX], .rbx = g[RBX], .rcx = g[RCX], .rdx = g[RDX], .rsi = g[RSI], .rdi = g[RDI],
                            .rsp = g[RSP], .rbp = g[RBP], .r8 = g[R8], .r9 = g[R9], .r10 = g[R10], .r11 = g[R11],
                            .r12 = g[R12], .r13 = g[R13], .r14 = g[R14], .r15 = g[R15], .rip = c->rip,
                            .rflags = flags_read(c) };
    return give(c, KVS_OK);
}

KVS_API int32_t kvs_vcpu_set_regs(struct kvs_vcpu *c, const struct kvs_regs *r)
{
    TAKE(c, r);
    uint64_t *g = c->gpr;
    g[RAX] = r->rax, g[RBX] = r->rbx, g[RCX] = r->rcx, g[RDX] = r->rdx;
    g[RSI] = r->rsi, g[RDI] = r->rdi, g[RSP] = r->rsp, g[RBP] = r->rbp;
    g[R8] = r->r8, g[R9] = r->r9, g[R10] = r->r10, g[R11] = r->r11;
    g[R12] = r->r12, g[R13] = r->r13, g[R14] = r->r14, g[R15] = r->r15;
    c->rip = r->rip;
    flags_write(c, (uint32_t)r->rflags & FLAGS_ALL);
    c->exc.pending = false; /* as KVM: new registers, no half-delivered exception */
    vcpu_update_mode(c);
    return give(c, KVS_OK);
}

/* ---- segments and control registers ---- */
static void segment_get(const struct segment *s, struct kvs_segment *k)
{
    *k = (struct kvs_segment){ .base = s->base, .limit = s->limit, .selector = s->sel, .type = s->attr & ATTR_TYPE,
                               .present = (s->attr & ATTR_P) != 0, .dpl = (s->attr & ATTR_DPL) >> ATTR_DPL_SHIFT,
                               .db = (s->attr & ATTR_DB) != 0, .s = (s->attr & ATTR_S) != 0, .l = (s->attr & ATTR_L) != 0,
                               .g = (s->attr & ATTR_G) != 0, .avl = (s->attr & ATTR_AVL) != 0,
                               .unusable = (s->attr & ATTR_NULL) != 0 };
}

static void segment_set(const struct kvs_segment *k, struct segment *s)
{
    s->base = k->base;
    s->limit = k->limit;
    s->sel = k->selector;
    s->attr = (k->type & ATTR_TYPE) | (k->s ? ATTR_S : 0) | (uint32_t)(k->dpl & 3) << ATTR_DPL_SHIFT |
              (k->present ? ATTR_P : 0) | (k->avl ? ATTR_AVL : 0) | (k->l ? ATTR_L : 0) | (k->db ? ATTR_DB : 0) |
              (k->g ? ATTR_G : 0) | (k->unusable ? ATTR_NULL : 0);
}

KVS_API int32_t kvs_vcpu_get_sregs(struct kvs_vcpu *c, struct kvs_sregs *s)
{
    TAKE(c, s);
    memset(s, 0, sizeof *s);
    segment_get(&c->seg[SEG_CS], &s->cs);
    segment_get(&c->seg[SEG_DS], &s->ds);
    segment_get(&c->seg[SEG_ES], &s->es);
    segment_get(&c->seg[SEG_FS], &s->fs);
    segment_get(&c->seg[SEG_GS], &s->gs);
    segment_get(&c->seg[SEG_SS], &s->ss);
    segment_get(&c->tr, &s->tr);
    segment_get(&c->ldtr, &s->ldt);
    s->gdt = (struct kvs_dtable){ .base = c->gdtr.base, .limit = c->gdtr.limit };
    s->idt = (struct kvs_dtable){ .base = c->idtr.base, .limit = c->idtr.limit };
    s->cr0 = c->cr0;
    s->cr2 = c->cr2;
    s->cr3 = c->cr3;
    s->cr4 = c->cr4;
    s->efer = c->efer;
    s->cr8 = c->lapic ? lapic_cr8(c) : 0;
    s->apic_base = c->lapic ? lapic_base(c) : 0;
    if (c->injected_irq >= 0) s->interrupt_bitmap[c->injected_irq >> 6] |= BIT(c->injected_irq & 63);
    return give(c, KVS_OK);
}

/* Combinations that no sequence of instructions can reach. SDM 3A "Control Registers" */
static bool sregs_possible(const struct kvs_vcpu *c, const struct kvs_sregs *s)
{
    bool pg = s->cr0 & CR0_PG, lme = s->efer & EFER_LME, lma = s->efer & EFER_LMA;
    if (s->cr0 >> 32 || s->cr4 & ~cr4_allowed(c) || s->efer & ~efer_allowed(c)) return false;
    if (pg && !(s->cr0 & CR0_PE)) return false;
    if ((s->cr0 & CR0_NW) && !(s->cr0 & CR0_CD)) return false;
    if (lma != (lme && pg)) return false;
    if (lma && !(s->cr4 & CR4_PAE)) return false;
    if (!lma && (s->cr4 & CR4_PCIDE)) return false;
    if (s->cs.l && s->cs.db && lma) return false;
    if (s->cr3 & ~cr3_allowed(c)) return false;
    if (s->cr8 > 15) return false;
    return !(lma && (!is_canonical_widest(c, s->fs.base) || !is_canonical_widest(c, s->gs.base) || !is_canonical_widest(c, s->gdt.base) ||
                     !is_canonical_widest(c, s->idt.base) || !is_canonical_widest(c, s->tr.base) || !is_canonical_widest(c, s->ldt.base)));
}

static void reload_pdptrs(struct kvs_vcpu *c)
{
    if (!(c->cr0 & CR0_PG) || !(c->cr4 & CR4_PAE) || is_long_mode(c)) return;
    pthread_mutex_lock(&c->vm->lock); /* outside guest code only this keeps the slots in place */
    (void)mmu_load_pdptrs(c, c->cr3);
    pthread_mutex_unlock(&c->vm->lock);
}

KVS_API int32_t kvs_vcpu_set_sregs(struct kvs_vcpu *c, const struct kvs_sregs *s)
{
    TAKE(c, s);
    if (!sregs_possible(c, s)) return give(c, -KVS_EINVAL);
    if (c->lapic && s->apic_base != lapic_base(c) && lapic_restore_base(c, s->apic_base) != 0) return give(c, -KVS_EINVAL);
    segment_set(&s->cs, &c->seg[SEG_CS]);
    segment_set(&s->ds, &c->seg[SEG_DS]);
    segment_set(&s->es, &c->seg[SEG_ES]);
    segment_set(&s->fs, &c->seg[SEG_FS]);
    segment_set(&s->gs, &c->seg[SEG_GS]);
    segment_set(&s->ss, &c->seg[SEG_SS]);
    segment_set(&s->tr, &c->tr);
    segment_set(&s->ldt, &c->ldtr);
    c->gdtr = (struct dtable){ .base = s->gdt.base, .limit = s->gdt.limit };
    c->idtr = (struct dtable){ .base = s->idt.base, .limit = s->idt.limit };
    c->cr0 = s->cr0 | CR0_ET;
    c->cr2 = s->cr2;
    c->cr3 = s->cr3;
    c->cr4 = s->cr4;
    c->efer = s->efer;
    if (c->lapic) lapic_set_cr8(c, (uint32_t)s->cr8);
    c->injected_irq = -1;
    for (int n = 0; n < 256; n++)
        if (s->interrupt_bitmap[n >> 6] & BIT(n & 63)) c->injected_irq = (int16_t)n;
    c->cpl = is_protected(c) ? c->eflags & FLAG_VM ? 3 : (c->seg[SEG_SS].attr & ATTR_DPL) >> ATTR_DPL_SHIFT : 0;
    reload_pdptrs(c);
    tlb_flush_all(c);
    segments_changed(c);
    vcpu_update_mode(c);
    return give(c, KVS_OK);
}

/* ---- floating point ---- */
KVS_API int32_t kvs_vcpu_get_fpu(struct kvs_vcpu *c, struct kvs_fpu *f)
{
    TAKE(c, f);
    memset(f, 0, sizeof *f);
    for (uint32_t n = 0; n < 8; n++) memcpy(f->fpr[n], c->fpu.r[((c->fpu.fsw >> 11) + n) & 7], 10);
    f->fcw = c->fpu.fcw;
    f->fsw = c->fpu.fsw;
    f->ftwx = c->fpu.tags;
    f->last_opcode = c->fpu.fop;
    f->last_ip = c->fpu.fip;
    f->last_dp = c->fpu.fdp;
    f->mxcsr = c->fpu.mxcsr;
    for (uint32_t n = 0; n < 16; n++) memcpy(f->xmm[n], c->fpu.vec[n], 16);
    return give(c, KVS_OK);
}

#define MXCSR_ALLOWED 0xffffu

static void fpu_load(struct kvs_vcpu *c, const struct kvs_fpu *f)
{
    for (uint32_t n = 0; n < 8; n++) {
        uint8_t *r = c->fpu.r[((f->fsw >> 11) + n) & 7];
        memset(r, 0, 16);
        memcpy(r, f->fpr[n], 10);
    }
    c->fpu.fcw = (f->fcw & 0x1f3f) | 0x40;
    c->fpu.fsw = f->fsw;
    c->fpu.tags = f->ftwx;
    x87_update_es(&c->fpu);
    c->fpu.fop = f->last_opcode & 0x7ff;
    c->fpu.fip = f->last_ip;
    c->fpu.fdp = f->last_dp;
    c->fpu.mxcsr = f->mxcsr;
    for (uint32_t n = 0; n < 16; n++) memcpy(c->fpu.vec[n], f->xmm[n], 16);
    vcpu_update_mode(c);
}

KVS_API int32_t kvs_vcpu_set_fpu(struct kvs_vcpu *c, const struct kvs_fpu *f)
{
    TAKE(c, f);
    if (f->mxcsr & ~MXCSR_ALLOWED) return give(c, -KVS_EINVAL);
    fpu_load(c, f);
    return give(c, KVS_OK);
}

/* The XSAVE area in the standard format. AVX and PKRU are there when the CPUID table has them. SDM 1 "XSAVE Area" */
KVS_API int32_t kvs_vcpu_get_xsave(struct kvs_vcpu *c, struct kvs_xsave *x)
{
    TAKE(c, x);
    uint8_t *p = (uint8_t *)x->region;
    memset(x, 0, sizeof *x);
    st16(p, c->fpu.fcw);
    st16(p + 2, c->fpu.fsw);
    p[4] = c->fpu.tags;
    st16(p + 6, c->fpu.fop);
    st64(p + 8, c->fpu.fip);
    st64(p + 16, c->fpu.fdp);
    st32(p + 24, c->fpu.mxcsr);
    st32(p + 28, MXCSR_ALLOWED);
    for (uint32_t n = 0; n < 8; n++) memcpy(p + 32 + n * 16, c->fpu.r[((c->fpu.fsw >> 11) + n) & 7], 10);
    for (uint32_t n = 0; n < 16; n++) memcpy(p + XSTATE_XMM + n * 16, c->fpu.vec[n], 16);
    st64(p + XSTATE_HEADER, xcr0_allowed(c));
    if (has_feature(c, FEAT_AVX))
        for (uint32_t n = 0; n < 16; n++) memcpy(p + XSTATE_YMM + n * 16, c->fpu.vec[n] + 16, 16);
    if (has_feature(c, FEAT_PKU)) st32(p + XSTATE_PKRU_AT, c->pkru);
    return give(c, KVS_OK);
}

KVS_API int32_t kvs_vcpu_set_xsave(struct kvs_vcpu *c, const struct kvs_xsave *x)
{
    TAKE(c, x);
    const uint8_t *p = (const uint8_t *)x->region;
    uint64_t bv = ld64(p + XSTATE_HEADER);
    if ((bv & ~xcr0_allowed(c)) || ld64(p + XSTATE_HEADER + 8) || (ld32(p + 24) & ~MXCSR_ALLOWED)) return give(c, -KVS_EINVAL);
    struct kvs_fpu f = { .fcw = 0x37f, .mxcsr = 0x1f80 };
    if (bv & XSTATE_X87) {
        f.fcw = ld16(p);
        f.fsw = ld16(p + 2);
        f.ftwx = p[4];
        f.last_opcode = ld16(p + 6);
        f.last_ip = ld64(p + 8);
        f.last_dp = ld64(p + 16);
        for (uint32_t n = 0; n < 8; n++) memcpy(f.fpr[n], p + 32 + n * 16, 16);
    }
    if (bv & (XSTATE_SSE | XSTATE_AVX)) f.mxcsr = ld32(p + 24);
    if (bv & XSTATE_SSE)
        for (uint32_t n = 0; n < 16; n++) memcpy(f.xmm[n], p + XSTATE_XMM + n * 16, 16);
    fpu_load(c, &f);
    for (uint32_t n = 0; n < 16; n++) {
        if (bv & XSTATE_AVX) memcpy(c->fpu.vec[n] + 16, p + XSTATE_YMM + n * 16, 16);
        else memset(c->fpu.vec[n] + 16, 0, 16);
    }
    pkru_write(c, bv & XSTATE_PKRU ? ld32(p + XSTATE_PKRU_AT) : 0);
    return give(c, KVS_OK);
}

KVS_API int32_t kvs_vcpu_get_xcrs(struct kvs_vcpu *c, struct kvs_xcrs *x)
{
    TAKE(c, x);
    memset(x, 0, sizeof *x);
    x->nr_xcrs = 1;
    x->xcrs[0].value = c->xcr0;
    return give(c, KVS_OK);
}
KVS_API int32_t kvs_vcpu_set_xcrs(struct kvs_vcpu *c, const struct kvs_xcrs *x)
{
    TAKE(c, x);
    if (x->nr_xcrs > 1 || x->flags || (x->nr_xcrs && (x->xcrs[0].xcr || !xcr0_legal(c, x->xcrs[0].value))))
        return give(c, -KVS_EINVAL);
    if (x->nr_xcrs) c->xcr0 = x->xcrs[0].value;
    vcpu_update_mode(c);
    return give(c, KVS_OK);
}

/* ---- MSRs and CPUID ---- */
KVS_API int32_t kvs_vcpu_get_msrs(struct kvs_vcpu *c, struct kvs_msr_entry *e, uint32_t count)
{
    if (count > INT32_MAX) return -KVS_EINVAL;
    TAKE(c, e || !count);
    uint32_t n = 0;
    while (n < count && msr_read(c, e[n].index, &e[n].data, true) == 0) n++;
    return give(c, (int32_t)n);
}
KVS_API int32_t kvs_vcpu_set_msrs(struct kvs_vcpu *c, const struct kvs_msr_entry *e, uint32_t count)
{
    if (count > INT32_MAX) return -KVS_EINVAL;
    TAKE(c, e || !count);
    uint32_t n = 0;
    while (n < count && msr_write(c, e[n].index, e[n].data, true) == 0) n++;
    segments_changed(c); /* FS and GS bases are MSRs too */
    return give(c, (int32_t)n);
}

KVS_API int32_t kvs_vcpu_get_cpuid2(struct kvs_vcpu *c, struct kvs_cpuid_entry2 *e, uint32_t *count)
{
    TAKE(c, count && (e || !*count));
    uint32_t room = *count;
    *count = c->cpuid_count;
    if (room < c->cpuid_count) return give(c, -KVS_ERANGE);
    if (c->cpuid_count) memcpy(e, c->cpuid, c->cpuid_count * sizeof *e);
    return give(c, KVS_OK);
}
KVS_API int32_t kvs_vcpu_set_cpuid2(struct kvs_vcpu *c, const struct kvs_cpuid_entry2 *e, uint32_t count)
{
    if (count > 256) return -KVS_EINVAL;
    TAKE(c, e || !count);
    struct kvs_cpuid_entry2 *copy = calloc(count ? count : 1, sizeof *copy);
    if (!copy) return give(c, -KVS_ENOMEM);
    if (count) memcpy(copy, e, count * sizeof *copy);
    free(c->cpuid);
    c->cpuid = copy;
    c->cpuid_count = count;
    cpuid_changed(c);
    block_cache_flush(c);
    return give(c, KVS_OK);
}

/* ---- events ---- */
KVS_API int32_t kvs_vcpu_get_events(struct kvs_vcpu *c, struct kvs_vcpu_events *e)
{
    TAKE(c, e);
    memset(e, 0, sizeof *e);
    e->exception.injected = c->exc.pending;
    e->exception.nr = c->exc.vector;
    e->exception.has_error_code = c->exc.has_error;
    e->exception.error_code = c->exc.error;
    e->exception_has_payload = c->exc.pending;
    e->exception_payload = c->exc.pending ? c->exc.payload : 0;
    e->interrupt.injected = c->injected_irq >= 0;
    e->interrupt.nr = c->injected_irq >= 0 ? (uint8_t)c->injected_irq : 0;
    e->interrupt.shadow = c->int_shadow;
    e->nmi.pending = atomic_load(&c->nmi_pending);
    e->nmi.masked = c->nmi_masked;
    uint32_t signals = atomic_load(&c->signals);
    e->sipi_vector = signals & SIG_SIPI ? signals >> 8 & 0xff : c->sipi_vector;
    e->flags = KVS_VCPUEVENT_VALID_SMM;
    e->smi.smm = c->in_smm;
    e->smi.pending = (signals & SIG_SMI) != 0;
    e->smi.smm_inside_nmi = c->smm_inside_nmi;
    e->smi.latched_init = (signals & SIG_INIT) != 0; /* also one that is not held back, but not taken yet */
    e->triple_fault.pending = c->shut_down || (c->exc.pending && c->triple_fault);
    return give(c, KVS_OK);
}
KVS_API int32_t kvs_vcpu_set_events(struct kvs_vcpu *c, const struct kvs_vcpu_events *e)
{
    TAKE(c, e);
    if ((e->exception.injected && (e->exception.nr > 31 || e->exception.nr == EXC_NMI)) || e->interrupt.shadow > 2 || e->sipi_vector > 0xff)
        return give(c, -KVS_EINVAL);
    bool smm_valid = e->flags & KVS_VCPUEVENT_VALID_SMM;
    if (smm_valid && (e->smi.smm || e->smi.pending) && !(c->vm->config.flags & KVS_VM_SMM)) return give(c, -KVS_EINVAL);
    c->exc.pending = e->exception.injected;
    c->triple_fault = false;
    c->exc.vector = e->exception.nr;
    c->exc.has_error = e->exception.has_error_code;
    c->exc.error = e->exception.error_code;
    c->exc.payload = e->exception_has_payload ? e->exception_payload : 0;
    c->injected_irq = e->interrupt.injected ? e->interrupt.nr : -1;
    c->int_shadow = e->interrupt.shadow;
    atomic_store(&c->nmi_pending, e->nmi.pending < 2 ? e->nmi.pending : 2);
    c->nmi_masked = e->nmi.masked != 0;
    c->sipi_vector = e->sipi_vector;
    c->shut_down = e->triple_fault.pending != 0;
    if (smm_valid) {
        smm_set(c, e->smi.smm != 0);
        reload_pdptrs(c); /* from the address space that it is now */
        c->smm_inside_nmi = e->smi.smm && e->smi.smm_inside_nmi;
        atomic_store(&c->signals, (e->smi.pending ? SIG_SMI : 0) | (e->smi.latched_init ? SIG_INIT : 0));
    }
    return give(c, KVS_OK);
}

KVS_API int32_t kvs_vcpu_get_lapic(struct kvs_vcpu *c, struct kvs_lapic_state *s)
{
    TAKE(c, s);
    if (!c->lapic) return give(c, -KVS_ENOENT);
    lapic_get_state(c, s);
    return give(c, KVS_OK);
}
KVS_API int32_t kvs_vcpu_set_lapic(struct kvs_vcpu *c, const struct kvs_lapic_state *s)
{
    TAKE(c, s);
    return give(c, c->lapic ? lapic_set_state(c, s) : -KVS_ENOENT);
}

KVS_API int32_t kvs_vcpu_get_mp_state(struct kvs_vcpu *c, struct kvs_mp_state *s)
{
    TAKE(c, s);
    /* A SIPI that was posted but not taken yet; its vector is among the events. */
    s->mp_state = atomic_load(&c->signals) & SIG_SIPI && !c->in_smm ? KVS_MP_STATE_SIPI_RECEIVED : atomic_load(&c->mp_state);
    return give(c, KVS_OK);
}
KVS_API int32_t kvs_vcpu_set_mp_state(struct kvs_vcpu *c, const struct kvs_mp_state *s)
{
    TAKE(c, s);
    bool sipi = s->mp_state == KVS_MP_STATE_SIPI_RECEIVED;
    if (s->mp_state > KVS_MP_STATE_SIPI_RECEIVED) return give(c, -KVS_EINVAL);
    if (c->in_smm && (sipi || s->mp_state == KVS_MP_STATE_INIT_RECEIVED)) return give(c, -KVS_EINVAL);
    atomic_store(&c->mp_state, sipi ? KVS_MP_STATE_INIT_RECEIVED : s->mp_state);
    atomic_fetch_and(&c->signals, ~(uint32_t)(SIG_SIPI | SIG_SIPI_VECTOR));
    if (sipi) atomic_fetch_or(&c->signals, SIG_SIPI | c->sipi_vector << 8);
    return give(c, KVS_OK);
}

/* ---- debug registers ---- */
KVS_API int32_t kvs_vcpu_get_debugregs(struct kvs_vcpu *c, struct kvs_debugregs *r)
{
    TAKE(c, r);
    memset(r, 0, sizeof *r);
    memcpy(r->db, c->dr, sizeof r->db);
    r->dr6 = c->dr6;
    r->dr7 = c->dr7;
    return give(c, KVS_OK);
}
KVS_API int32_t kvs_vcpu_set_debugregs(struct kvs_vcpu *c, const struct kvs_debugregs *r)
{
    TAKE(c, r);
    if (r->flags || r->dr6 >> 32 || r->dr7 >> 32) return give(c, -KVS_EINVAL);
    memcpy(c->dr, r->db, sizeof r->db);
    c->dr6 = (r->dr6 & 0xe00f) | 0xffff0ff0u;
    c->dr7 = (r->dr7 & 0xffff2bffu) | 0x400;
    tlb_flush_all(c);
    return give(c, KVS_OK);
}
KVS_API int32_t kvs_vcpu_set_guest_debug(struct kvs_vcpu *c, const struct kvs_guest_debug *g)
{
    TAKE(c, g);
    if (g->control & ~(KVS_GUESTDBG_ENABLE | KVS_GUESTDBG_SINGLESTEP)) return give(c, -KVS_EINVAL);
    c->guest_debug = *g;
    return give(c, KVS_OK);
}

/* ---- the rest ---- */
#define CORE_MCE_SHIFT 16 /* behind the bits of DR6 in the flags of struct kvs_core_state */
/* Where the vCPUs are in their turns decides what runs next. Any value is a possible one. */
static uint64_t turn_state(const struct kvs_vcpu *c)
{
    if (c->vm->config.clock_mode != KVS_CLOCK_VIRTUAL || atomic_load(&c->vm->vcpu_count) <= 1) return 0;
    uint64_t retired = vcpu_retired(c), left = c->in_slice && c->slice_end > retired ? c->slice_end - retired : 0;
    return (atomic_load(&c->vm->turn) == c->id) | (uint64_t)c->in_slice << 1 | (c->pauses % PAUSES_PER_TURN) << 8 |
           min_u64(left, TURN_LENGTH) << 32;
}
static void turn_restore(struct kvs_vcpu *c, uint64_t turn)
{
    if (c->vm->config.clock_mode != KVS_CLOCK_VIRTUAL || atomic_load(&c->vm->vcpu_count) <= 1) return;
    if (turn & 1) atomic_store(&c->vm->turn, c->id);
    c->in_slice = (turn & 3) == 3;
    c->slice_end = vcpu_retired(c) + min_u64(turn >> 32, TURN_LENGTH);
    c->pauses = (turn >> 8 & 0xff) % PAUSES_PER_TURN;
}
KVS_API int32_t kvs_vcpu_get_core_state(struct kvs_vcpu *c, struct kvs_core_state *s)
{
    TAKE(c, s);
    memset(s, 0, sizeof *s);
    s->retired = vcpu_retired(c);
    s->flags = c->pending_dbg | (uint64_t)c->mce_pending << CORE_MCE_SHIFT |
               (atomic_load(&c->pv_unhalted) ? KVS_CORE_PV_UNHALTED : 0);
    if (c->io_trap.info && c->io_trap.retired == s->retired) {
        s->io_trap_info = c->io_trap.info;
        s->io_trap_rip = c->io_trap.rip;
        s->io_trap_rcx = c->io_trap.rcx;
        s->io_trap_rsi = c->io_trap.rsi;
        s->io_trap_rdi = c->io_trap.rdi;
    }
    const struct monitor *m = &c->monitor;
    if (m->armed || m->waiting) {
        s->monitor_line = m->line | m->armed | m->waiting << 1 | m->any_interrupt << 2;
        s->monitor_digest = m->digest;
    }
    if (m->waiting) {
        s->mwait_deadline = m->deadline;
        s->mwait_rip = m->rip;
    }
    s->turn = turn_state(c);
    return give(c, KVS_OK);
}
KVS_API int32_t kvs_vcpu_set_core_state(struct kvs_vcpu *c, const struct kvs_core_state *s)
{
    TAKE(c, s);
    const uint64_t dbg = s->flags & (BIT(CORE_MCE_SHIFT) - 1), mce = s->flags >> CORE_MCE_SHIFT & 3;
    const bool line_legal = !(s->monitor_line & 0x38) && s->monitor_line <= PHYS_MASK;
    if (s->flags & ~(0xe00full | 3ull << CORE_MCE_SHIFT | KVS_CORE_PV_UNHALTED) || mce > MCE_SHUTDOWN || !line_legal)
        return give(c, -KVS_ESTATE);
    c->mce_pending = (uint8_t)mce;
    c->budget = 0;
    c->retired_end = s->retired;
    turn_restore(c, s->turn);
    c->stats.retired = s->retired;
    c->pending_dbg = dbg;
    atomic_store(&c->pv_unhalted, (s->flags & KVS_CORE_PV_UNHALTED) != 0);
    c->io_trap = (struct io_trap){ .info = (uint32_t)s->io_trap_info, .retired = s->retired, .rip = s->io_trap_rip,
                                   .rcx = s->io_trap_rcx, .rsi = s->io_trap_rsi, .rdi = s->io_trap_rdi };
    c->monitor = (struct monitor){ .armed = s->monitor_line & 1, .waiting = s->monitor_line >> 1 & 1,
                                   .any_interrupt = s->monitor_line >> 2 & 1, .line = s->monitor_line & ~63ull,
                                   .digest = s->monitor_digest, .deadline = s->mwait_deadline, .rip = s->mwait_rip };
    return give(c, KVS_OK);
}

KVS_API int32_t kvs_vcpu_translate(struct kvs_vcpu *c, struct kvs_translation *t)
{
    TAKE(c, t);
    struct translation w;
    uint64_t la = t->linear_address;
    memset(t, 0, sizeof *t);
    t->linear_address = la;
    pthread_mutex_lock(&c->vm->lock); /* outside guest code only this keeps the slots in place */
    if (is_canonical(c, la) && mmu_walk(c, la, ACC_R, false, true, true, &w) == 0) {
        t->physical_address = w.gpa;
        t->valid = 1;
        t->usermode = w.readable_by_class[TLB_USER];
        t->writeable = mmu_walk(c, la, ACC_W, false, true, true, &w) == 0;
    }
    pthread_mutex_unlock(&c->vm->lock);
    return give(c, KVS_OK);
}
