/* The vCPU object: creation, reset, mode, requests. Its state for the host is in state.c. */
#include <stdlib.h>
#include <time.h>

#include "clock.h"
#include "interp/interp.h"
#include "jit/jit.h"
#include "irqchip/irqchip.h"

/* SDM 3A "5-Level Paging and 4-Level Paging", "Linear-Address Masking" */
void vcpu_update_linear(struct kvs_vcpu *c)
{
    const bool wide = c->cr4 & CR4_LA57;
    c->la_bits = wide ? 57 : 48;
    c->lam_user = !is_long_mode(c) ? 0 : c->cr3 & CR3_LAM_U57 ? 57 : c->cr3 & CR3_LAM_U48 ? 48 : 0;
    c->lam_super = !(c->cr4 & CR4_LAM_SUP) ? 0 : c->la_bits;
}

/* Base 0, writable, and every offset inside the limit. SDM 3A "Basic Flat Model" */
static bool segment_flat(const struct segment *s)
{
    return s->base == 0 && s->limit == 0xffffffffu && (s->attr & (ATTR_NULL | ATTR_CODE | ATTR_EC | ATTR_W)) == ATTR_W;
}

/*
 * Fast handlers add up 64 bits, of which 32-bit code means 32. A sum that does not fit misses as long as the soft TLB
 * knows nothing above 4 GiB, and the slow path cuts it: outside long mode, and in TLB_USER32.
 */
static bool data_flat32(const struct kvs_vcpu *c)
{
    return (!is_long_mode(c) || c->cpl == 3) && segment_flat(&c->seg[SEG_DS]) && segment_flat(&c->seg[SEG_SS]) &&
           segment_flat(&c->seg[SEG_ES]);
}

static uint32_t tlb_class_of(const struct kvs_vcpu *c)
{
    if (c->cpl == 3) return is_long_mode(c) && !is_code64(c) ? TLB_USER32 : TLB_USER;
    return c->eflags & FLAG_AC ? TLB_SUPER_AC : TLB_SUPER;
}

void vcpu_update_mode(struct kvs_vcpu *c)
{
    uint32_t m;
    const struct segment *cs = &c->seg[SEG_CS];
    if (is_long_mode(c) && (cs->attr & ATTR_L)) m = MODE_64 | MODE_CSFLAT;
    else m = is_protected(c) && !is_v86(c) && (cs->attr & ATTR_DB) ? MODE_32 : MODE_16;
    if ((m & MODE_SIZE) != MODE_64 && cs->base == 0 && cs->limit == 0xffffffffu) m |= MODE_CSFLAT;
    bool align = c->cpl == 3 && (c->cr0 & CR0_AM) && (c->eflags & FLAG_AC);
    if (!align && ((m & MODE_SIZE) == MODE_64 || ((m & MODE_SIZE) == MODE_32 && data_flat32(c)))) m |= MODE_FLAT;
    if (c->seg[SEG_SS].attr & ATTR_DB) m |= MODE_STACK32;
    if (c->cr0 & (CR0_EM | CR0_TS)) m |= MODE_X87_NM;
    if ((c->cr0 & CR0_MP) && (c->cr0 & CR0_TS)) m |= MODE_WAIT_NM;
    if (c->cr0 & CR0_EM) m |= MODE_MMX_UD | MODE_SSE_UD;
    if (!(c->cr4 & CR4_OSFXSR)) m |= MODE_SSE_UD;
    if (c->cr0 & CR0_TS) m |= MODE_SIMD_NM;
    if ((c->fpu.mxcsr & MXCSR_MASKS) != MXCSR_MASKS) m |= MODE_SSE_TRAPS;
    if (is_protected(c) && !is_v86(c)) m |= MODE_PROTECTED;
    if (c->cpl == 3) m |= MODE_USER;
    if (!(c->cr4 & CR4_OSXSAVE) || (c->xcr0 & 6) != 6) m |= MODE_AVX_UD;
    c->mode = m;
    vcpu_update_linear(c);
    c->jc_key = (c->jc_key & ~0xffffull) | m;
    tlb_select(c, tlb_class_of(c));
}

void vcpu_request(struct kvs_vcpu *c, uint32_t req)
{
    atomic_fetch_or(&c->requests, req);
    atomic_store(&c->limit, INT64_MAX);
    pthread_mutex_lock(&c->wait_lock);
    pthread_cond_broadcast(&c->wait_cond);
    pthread_mutex_unlock(&c->wait_lock);
}

static void segment_reset(struct segment *s, uint16_t sel, uint64_t base, uint32_t attr)
{
    *s = (struct segment){ .base = base, .limit = 0xffff, .attr = attr, .sel = sel };
}

static void fpu_reset(struct fpu *f)
{
    memset(f, 0, sizeof *f);
    f->fcw = 0x40;
    f->tags = 0xff; /* power-on: all zero, all valid. SDM 3A "Processor State After Reset" */
    f->mxcsr = 0x1f80;
}

static void common_reset(struct kvs_vcpu *c)
{
    memset(c->gpr, 0, sizeof c->gpr);
    c->gpr[GPR_BIAS] = GPR_BIAS_VALUE;
    c->gpr[GPR_4G] = GPR_4G_VALUE;
    c->gpr[RDX] = 0x600;
    c->rip = 0xfff0;
    flags_write(c, 2);
    for (int n = 0; n < SEG_COUNT; n++) segment_reset(&c->seg[n], 0, 0, ATTR_P | ATTR_S | ATTR_W | ATTR_A);
    segment_reset(&c->seg[SEG_CS], 0xf000, 0xffff0000u, ATTR_P | ATTR_S | ATTR_CODE | ATTR_W | ATTR_A);
    segment_reset(&c->ldtr, 0, 0, ATTR_P | 2);
    segment_reset(&c->tr, 0, 0, ATTR_P | 11);
    c->gdtr = c->idtr = (struct dtable){ .base = 0, .limit = 0xffff };
    c->cr2 = c->cr3 = c->cr4 = 0;
    c->efer = 0;
    memset(c->dr, 0, sizeof c->dr);
    c->dr6 = 0xffff0ff0u;
    c->dr7 = 0x400;
    memset(c->pdptr, 0, sizeof c->pdptr);
    c->cpl = 0;
    c->int_shadow = 0;
    memset(&c->monitor, 0, sizeof c->monitor);
    memset(&c->exc, 0, sizeof c->exc);
    c->pending_dbg = 0;
    c->nmi_masked = c->triple_fault = c->in_smm = c->smm_inside_nmi = c->shut_down = false;
    atomic_fetch_and(&c->signals, ~(uint32_t)SIG_SMI);
    c->io_trap.info = 0;
    atomic_store(&c->nmi_pending, 0);
    atomic_store(&c->pv_unhalted, false);
    /* As under KVM: after an INIT too nobody expects the old guest's memory to change. */
    c->msr_kvm_system_time = c->msr_kvm_steal_time = c->msr_kvm_pv_eoi = 0;
    c->injected_irq = -1;
    iobus_insn_done(c);
    c->write_count = c->write_pos = 0;
    c->write_exited = false;
    c->io_read.active = false;
    c->code_modified = 0;
    c->near_stores = 0;
    tlb_flush_all(c);
    block_cache_flush(c);
}

void vcpu_init_reset(struct kvs_vcpu *c)
{
    uint64_t cd_nw = c->cr0 & (CR0_CD | CR0_NW);
    common_reset(c);
    c->cr0 = CR0_ET | cd_nw;
    vcpu_update_mode(c);
}

void vcpu_reset(struct kvs_vcpu *c)
{
    common_reset(c);
    c->cr0 = CR0_ET | CR0_CD | CR0_NW;
    fpu_reset(&c->fpu);
    c->msr_star = c->msr_lstar = c->msr_cstar = c->msr_sfmask = c->msr_kernel_gs_base = 0;
    c->msr_sysenter_cs = c->msr_sysenter_esp = c->msr_sysenter_eip = 0;
    c->msr_pat = 0x0007040600070406ull;
    c->msr_tsc_aux = c->msr_spec_ctrl = c->msr_mtrr_def = c->msr_mcg_status = c->msr_debugctl = c->msr_hwcr = 0;
    c->msr_misc_enable = MISC_ENABLE_RESET;
    memset(c->msr_mtrr_fix, 0, sizeof c->msr_mtrr_fix);
    memset(c->msr_mtrr_var, 0, sizeof c->msr_mtrr_var);
    mce_reset(c);
    c->msr_kvm_wall_clock = 0;
    c->msr_kvm_poll_control = 1;
    c->msr_tsc_adjust = 0;
    /* All TSCs of a machine agree: the BSP's reset sets them. */
    const struct kvs_vcpu *bsp = c->vm->vcpus[0];
    c->tsc_offset = c->id && bsp ? bsp->tsc_offset : -(int64_t)clock_tsc(c->vm);
    c->smbase = 0x30000; /* SDM 3C "SMRAM"; INIT leaves it */
    c->msr_smi_count = 0;
    c->xcr0 = 1;
    c->pkru = 0;
    c->msr_pkrs = 0;
    c->budget = 0;
    c->retired_end = 0;
    c->insn_limit = UINT64_MAX;
    atomic_store(&c->mp_state, c->id == 0 ? KVS_MP_STATE_RUNNABLE : KVS_MP_STATE_UNINITIALIZED);
    c->sipi_vector = 0;
    atomic_store(&c->signals, 0);
    if (c->lapic) lapic_reset(c, false);
    vcpu_update_mode(c);
}

int vcpu_create(struct kvs_vm *vm, uint32_t id, struct kvs_vcpu **out)
{
    struct kvs_vcpu *c = aligned_alloc(64, (sizeof *c + 63) & ~(size_t)63);
    if (!c) return -KVS_ENOMEM;
    memset(c, 0, sizeof *c);
    c->vm = vm;
    c->id = id;
    atomic_store(&c->limit, BLOCK_LIMIT);
    pthread_condattr_t attr;
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_mutex_init(&c->wait_lock, NULL);
    pthread_cond_init(&c->wait_cond, &attr);
    pthread_condattr_destroy(&attr);
    c->run = calloc(1, sizeof *c->run);
    c->tlb_classes = aligned_alloc(64, (TLB_CLASSES * sizeof *c->tlb_classes + 63) & ~(size_t)63);
    c->step_block = calloc(1, sizeof(struct block) + (MAX_INSNS + 1) * sizeof(struct kvs_insn));
    uint32_t count = 0;
    cpuid_supported(NULL, &count);
    c->cpuid = calloc(count ? count : 1, sizeof *c->cpuid);
    int rc = c->run && c->tlb_classes && c->step_block && c->cpuid ? block_cache_create(c) : -KVS_ENOMEM;
    if (rc == KVS_OK && vm->config.engine != KVS_ENGINE_INTERPRETER) {
        rc = jit_create(c, vm->config.jit_threshold ? vm->config.jit_threshold : 32);
        if (rc == -KVS_ENOTSUP && vm->config.engine == KVS_ENGINE_AUTO) rc = KVS_OK;
    }
    if (rc == KVS_OK && vm->irqchip) rc = lapic_create(c);
    if (rc != KVS_OK) {
        vcpu_free(c);
        return rc;
    }
    c->tlb = c->tlb_classes;
    tlb_init(c);
    c->cpuid_count = count;
    cpuid_supported(c->cpuid, &c->cpuid_count);
    vcpu_reset(c);
    cpuid_changed(c);
    *out = c;
    return KVS_OK;
}

void vcpu_free(struct kvs_vcpu *c)
{
    if (c->lapic) lapic_destroy(c);
    steal_time_close(c);
    jit_destroy(c);
    block_cache_destroy(c);
    free(c->run);
    free(c->tlb_classes);
    free(c->step_block);
    free(c->cpuid);
    free(c->trace);
    pthread_cond_destroy(&c->wait_cond);
    pthread_mutex_destroy(&c->wait_lock);
    free(c);
}
