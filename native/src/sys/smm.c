/*
 * System management mode: SMI, the state-save area, RSM. SDM 3C "System Management Mode"; the layouts of the
 * area are those that KVM and QEMU use: AMD APM 2 "SMM State-Save Area" for processors with long mode, and
 * the one of 32-bit processors with the hidden registers where QEMU has them.
 */
#include "transfer.h"

#define SMM_ENTRY 0x8000u
#define SMM_SAVE 0xfe00u /* from SMBASE on */
#define SMM_SAVE_SIZE 512u
/* I/O instruction restart and SMBASE relocation are there. SDM 3C "SMM Revision Identifier" */
#define SMM_REVISION_32 0x30000u
#define SMM_REVISION_64 0x30064u
#define IO_RESTART 0xff
#define ATTR_SAVED 0xf0ffu

/* Offsets in the area, that is from SMBASE + FE00H. */
enum {
    S64_ES = 0x000, S64_CS = 0x010, S64_SS = 0x020, S64_DS = 0x030, S64_FS = 0x040, S64_GS = 0x050, S64_GDTR = 0x060,
    S64_LDTR = 0x070, S64_IDTR = 0x080, S64_TR = 0x090, S64_IO_RIP = 0x0a0, S64_IO_RCX = 0x0a8, S64_IO_RSI = 0x0b0,
    S64_IO_RDI = 0x0b8, S64_IO_TRAP = 0x0c0, S64_IO_RESTART = 0x0c8, S64_HALT_RESTART = 0x0c9, S64_EFER = 0x0d0,
    S64_REVISION = 0x0fc, S64_SMBASE = 0x100, S64_CR4 = 0x148, S64_CR3 = 0x150, S64_CR0 = 0x158, S64_DR7 = 0x160,
    S64_DR6 = 0x168, S64_RFLAGS = 0x170, S64_RIP = 0x178, S64_R15 = 0x180, S64_RAX = 0x1f8,
};
enum {
    S32_SMBASE = 0x0f8, S32_REVISION = 0x0fc, S32_IO_RESTART = 0x100, S32_HALT_RESTART = 0x102, S32_IO_RDI = 0x104,
    S32_IO_RCX = 0x108, S32_IO_RSI = 0x10c, S32_IO_RIP = 0x110, S32_CR4 = 0x114, S32_DS = 0x12c, S32_FS = 0x138,
    S32_GS = 0x144, S32_IDTR = 0x150, S32_TR = 0x15c, S32_GDTR = 0x16c, S32_LDTR = 0x178, S32_ES = 0x184, S32_CS = 0x190,
    S32_SS = 0x19c, S32_ES_SEL = 0x1a8, S32_LDTR_SEL = 0x1c0, S32_TR_SEL = 0x1c4, S32_DR7 = 0x1c8, S32_DR6 = 0x1cc,
    S32_EAX = 0x1d0, S32_EIP = 0x1f0, S32_EFLAGS = 0x1f4, S32_CR3 = 0x1f8, S32_CR0 = 0x1fc,
};
static const uint16_t s64_segment[SEG_COUNT] = { S64_ES, S64_CS, S64_SS, S64_DS, S64_FS, S64_GS };
static const uint16_t s32_segment[SEG_COUNT] = { S32_ES, S32_CS, S32_SS, S32_DS, S32_FS, S32_GS };

/* What the area holds, in either layout. */
struct smm_state {
    uint64_t gpr[16], rip, rflags, cr0, cr3, cr4, efer, dr6, dr7;
    struct segment seg[SEG_COUNT], ldtr, tr;
    struct dtable gdtr, idtr;
    uint64_t io_rip, io_rcx, io_rsi, io_rdi;
    uint32_t io_trap, smbase;
    uint8_t io_restart, halt_restart;
};

/* ---- the area as bytes ---- */

static void put_segment64(uint8_t *p, const struct segment *s)
{
    st16(p, s->sel);
    st16(p + 2, (uint16_t)(s->attr & ATTR_SAVED));
    st32(p + 4, s->limit);
    st64(p + 8, s->base);
}
static void get_segment64(const uint8_t *p, struct segment *s)
{
    *s = (struct segment){ .base = ld64(p + 8), .limit = ld32(p + 4), .attr = ld16(p + 2) & ATTR_SAVED, .sel = ld16(p) };
}
static void put_segment32(uint8_t *p, uint8_t *sel, const struct segment *s)
{
    st32(p, (s->attr & ATTR_SAVED) << 8);
    st32(p + 4, s->limit);
    st32(p + 8, (uint32_t)s->base);
    st32(sel, s->sel);
}
static void get_segment32(const uint8_t *p, const uint8_t *sel, struct segment *s)
{
    *s = (struct segment){ .base = ld32(p + 8), .limit = ld32(p + 4), .attr = ld32(p) >> 8 & ATTR_SAVED, .sel = ld16(sel) };
}

static void encode64(const struct smm_state *s, uint8_t *p)
{
    for (uint32_t n = 0; n < SEG_COUNT; n++) put_segment64(p + s64_segment[n], &s->seg[n]);
    put_segment64(p + S64_LDTR, &s->ldtr);
    put_segment64(p + S64_TR, &s->tr);
    st32(p + S64_GDTR + 4, s->gdtr.limit);
    st64(p + S64_GDTR + 8, s->gdtr.base);
    st32(p + S64_IDTR + 4, s->idtr.limit);
    st64(p + S64_IDTR + 8, s->idtr.base);
    st64(p + S64_IO_RIP, s->io_rip);
    st64(p + S64_IO_RCX, s->io_rcx);
    st64(p + S64_IO_RSI, s->io_rsi);
    st64(p + S64_IO_RDI, s->io_rdi);
    st32(p + S64_IO_TRAP, s->io_trap);
    p[S64_HALT_RESTART] = s->halt_restart;
    st64(p + S64_EFER, s->efer);
    st32(p + S64_REVISION, SMM_REVISION_64);
    st32(p + S64_SMBASE, s->smbase);
    st64(p + S64_CR4, s->cr4);
    st64(p + S64_CR3, s->cr3);
    st64(p + S64_CR0, s->cr0);
    st64(p + S64_DR7, s->dr7);
    st64(p + S64_DR6, s->dr6);
    st64(p + S64_RFLAGS, s->rflags);
    st64(p + S64_RIP, s->rip);
    for (uint32_t n = 0; n < 16; n++) st64(p + S64_RAX - 8 * n, s->gpr[n]);
}
static void decode64(const uint8_t *p, struct smm_state *s)
{
    for (uint32_t n = 0; n < SEG_COUNT; n++) get_segment64(p + s64_segment[n], &s->seg[n]);
    get_segment64(p + S64_LDTR, &s->ldtr);
    get_segment64(p + S64_TR, &s->tr);
    s->gdtr = (struct dtable){ .base = ld64(p + S64_GDTR + 8), .limit = ld16(p + S64_GDTR + 4) };
    s->idtr = (struct dtable){ .base = ld64(p + S64_IDTR + 8), .limit = ld16(p + S64_IDTR + 4) };
    s->io_rip = ld64(p + S64_IO_RIP);
    s->io_rcx = ld64(p + S64_IO_RCX);
    s->io_rsi = ld64(p + S64_IO_RSI);
    s->io_rdi = ld64(p + S64_IO_RDI);
    s->io_restart = p[S64_IO_RESTART];
    s->halt_restart = p[S64_HALT_RESTART];
    s->efer = ld64(p + S64_EFER);
    s->smbase = ld32(p + S64_SMBASE);
    s->cr4 = ld64(p + S64_CR4);
    s->cr3 = ld64(p + S64_CR3);
    s->cr0 = ld64(p + S64_CR0);
    s->dr7 = ld64(p + S64_DR7);
    s->dr6 = ld64(p + S64_DR6);
    s->rflags = ld64(p + S64_RFLAGS);
    s->rip = ld64(p + S64_RIP);
    for (uint32_t n = 0; n < 16; n++) s->gpr[n] = ld64(p + S64_RAX - 8 * n);
}

static void encode32(const struct smm_state *s, uint8_t *p)
{
    for (uint32_t n = 0; n < SEG_COUNT; n++) put_segment32(p + s32_segment[n], p + S32_ES_SEL + 4 * n, &s->seg[n]);
    put_segment32(p + S32_LDTR, p + S32_LDTR_SEL, &s->ldtr);
    put_segment32(p + S32_TR, p + S32_TR_SEL, &s->tr);
    st32(p + S32_GDTR + 4, s->gdtr.limit);
    st32(p + S32_GDTR + 8, (uint32_t)s->gdtr.base);
    st32(p + S32_IDTR + 4, s->idtr.limit);
    st32(p + S32_IDTR + 8, (uint32_t)s->idtr.base);
    st32(p + S32_IO_RIP, (uint32_t)s->io_rip);
    st32(p + S32_IO_RCX, (uint32_t)s->io_rcx);
    st32(p + S32_IO_RSI, (uint32_t)s->io_rsi);
    st32(p + S32_IO_RDI, (uint32_t)s->io_rdi);
    st16(p + S32_HALT_RESTART, s->halt_restart);
    st32(p + S32_REVISION, SMM_REVISION_32);
    st32(p + S32_SMBASE, s->smbase);
    st32(p + S32_CR4, (uint32_t)s->cr4);
    st32(p + S32_CR3, (uint32_t)s->cr3);
    st32(p + S32_CR0, (uint32_t)s->cr0);
    st32(p + S32_DR7, (uint32_t)s->dr7);
    st32(p + S32_DR6, (uint32_t)s->dr6);
    st32(p + S32_EFLAGS, (uint32_t)s->rflags);
    st32(p + S32_EIP, (uint32_t)s->rip);
    for (uint32_t n = 0; n < 8; n++) st32(p + S32_EAX + 4 * n, (uint32_t)s->gpr[n]);
}
static void decode32(const uint8_t *p, struct smm_state *s)
{
    for (uint32_t n = 0; n < SEG_COUNT; n++) get_segment32(p + s32_segment[n], p + S32_ES_SEL + 4 * n, &s->seg[n]);
    get_segment32(p + S32_LDTR, p + S32_LDTR_SEL, &s->ldtr);
    get_segment32(p + S32_TR, p + S32_TR_SEL, &s->tr);
    s->gdtr = (struct dtable){ .base = ld32(p + S32_GDTR + 8), .limit = ld16(p + S32_GDTR + 4) };
    s->idtr = (struct dtable){ .base = ld32(p + S32_IDTR + 8), .limit = ld16(p + S32_IDTR + 4) };
    s->io_rip = ld32(p + S32_IO_RIP);
    s->io_rcx = ld32(p + S32_IO_RCX);
    s->io_rsi = ld32(p + S32_IO_RSI);
    s->io_rdi = ld32(p + S32_IO_RDI);
    s->io_restart = p[S32_IO_RESTART];
    s->halt_restart = p[S32_HALT_RESTART];
    s->smbase = ld32(p + S32_SMBASE);
    s->cr4 = ld32(p + S32_CR4);
    s->cr3 = ld32(p + S32_CR3);
    s->cr0 = ld32(p + S32_CR0);
    s->dr7 = ld32(p + S32_DR7);
    s->dr6 = ld32(p + S32_DR6);
    s->rflags = ld32(p + S32_EFLAGS);
    s->rip = ld32(p + S32_EIP);
    for (uint32_t n = 0; n < 8; n++) s->gpr[n] = ld32(p + S32_EAX + 4 * n);
}

/* The area in physical memory. Where no memory is, writes are lost and reads give ones. */
static void area_access(struct kvs_vcpu *c, uint8_t *area, bool write)
{
    for (uint32_t done = 0; done < SMM_SAVE_SIZE;) {
        uint64_t gpa = (uint32_t)(c->smbase + SMM_SAVE + done), left = 0;
        uint32_t n = (uint32_t)min_u64(SMM_SAVE_SIZE - done, PAGE_SIZE - (gpa & PAGE_MASK));
        struct memslot *s = NULL;
        uint8_t *host = gpa_to_host(vcpu_slots(c), gpa, &left, &s);
        if (!write) {
            if (host) memcpy(area + done, host, n);
            else memset(area + done, 0xff, n);
        } else if (host && !(s->flags & KVS_MEM_READONLY)) {
            memcpy(host, area + done, n);
            memslot_mark_dirty(s, gpa, n);
            code_store_check(c, s, host, n);
        }
        done += n;
    }
}

/* ---- SMI ---- */

static void collect(const struct kvs_vcpu *c, bool halted, struct smm_state *s)
{
    const struct io_trap *io = &c->io_trap;
    memcpy(s->gpr, c->gpr, sizeof s->gpr);
    memcpy(s->seg, c->seg, sizeof s->seg);
    s->ldtr = c->ldtr;
    s->tr = c->tr;
    s->gdtr = c->gdtr;
    s->idtr = c->idtr;
    s->rip = c->rip;
    s->rflags = flags_read(c);
    s->cr0 = c->cr0;
    s->cr3 = c->cr3;
    s->cr4 = c->cr4;
    s->efer = c->efer;
    s->dr6 = c->dr6;
    s->dr7 = c->dr7;
    s->smbase = c->smbase;
    s->halt_restart = halted;
    s->io_restart = 0;
    /* SDM 3C "I/O Instruction Restart": only an SMI right behind an I/O instruction can go back to it */
    bool io_valid = io->info != 0 && io->retired == vcpu_retired(c) && !halted;
    s->io_trap = io_valid ? io->info : 0;
    s->io_rip = io_valid ? io->rip : c->rip;
    s->io_rcx = io_valid ? io->rcx : c->gpr[RCX];
    s->io_rsi = io_valid ? io->rsi : c->gpr[RSI];
    s->io_rdi = io_valid ? io->rdi : c->gpr[RDI];
}

static void space_changed(struct kvs_vcpu *c)
{
    tlb_flush_all(c); /* translations do not say of which address space they are */
    vcpu_update_linear(c);
    segments_changed(c);
}

void smm_set(struct kvs_vcpu *c, bool in_smm)
{
    if (c->in_smm == in_smm) return;
    c->in_smm = in_smm;
    space_changed(c);
}

void smm_enter(struct kvs_vcpu *c, bool halted)
{
    uint8_t area[SMM_SAVE_SIZE] = { 0 };
    struct smm_state s;
    collect(c, halted, &s);
    if (has_feature(c, FEAT_LM)) encode64(&s, area);
    else encode32(&s, area);
    c->in_smm = true;
    c->io_trap.info = 0;
    c->msr_smi_count++;
    area_access(c, area, true);

    c->smm_inside_nmi = c->nmi_masked;
    c->nmi_masked = true;
    c->int_shadow = 0;
    /* SDM 3C "SMI Handler Execution Environment", "Initial SMM Execution Environment" */
    flags_write(c, 2);
    c->rip = SMM_ENTRY;
    c->cr0 &= ~(uint64_t)(CR0_PE | CR0_EM | CR0_TS | CR0_PG);
    c->cr4 = 0;
    c->efer = 0;
    c->dr7 = 0x400;
    c->idtr = (struct dtable){ 0, 0 }; /* as KVM: silicon sets the limit to 0 */
    for (uint32_t n = 0; n < SEG_COUNT; n++)
        c->seg[n] = (struct segment){ .limit = 0xffffffffu, .attr = ATTR_G | ATTR_P | ATTR_S | ATTR_W | ATTR_A };
    c->seg[SEG_CS].attr |= ATTR_CODE;
    c->seg[SEG_CS].sel = (uint16_t)(c->smbase >> 4);
    c->seg[SEG_CS].base = c->smbase;
    c->cpl = 0;
    space_changed(c);
}

/* ---- RSM ---- */

/* SDM 3C "RSM: ... If the processor detects invalid state information in the saved state map, it enters the
 * shutdown state"; AMD APM 2 "Leaving SMM" */
static bool resumable(const struct kvs_vcpu *c, const struct smm_state *s)
{
    bool pg = s->cr0 & CR0_PG, lme = s->efer & EFER_LME, lma = s->efer & EFER_LMA;
    if (s->cr0 >> 32 || (pg && !(s->cr0 & CR0_PE)) || ((s->cr0 & CR0_NW) && !(s->cr0 & CR0_CD))) return false;
    if (s->cr4 & ~cr4_allowed(c) || s->efer & ~efer_allowed(c)) return false;
    if (lma != (lme && pg) || (lma && !(s->cr4 & CR4_PAE)) || (!lma && (s->cr4 & CR4_PCIDE))) return false;
    if (lma && (s->seg[SEG_CS].attr & (ATTR_L | ATTR_DB)) == (ATTR_L | ATTR_DB)) return false;
    if (lma && ((s->rflags & FLAG_VM) || s->cr3 & ~cr3_allowed(c))) return false;
    if (!lma && s->cr3 >> 32) return false;
    if (s->dr6 >> 32 || s->dr7 >> 32 || ((s->rflags & FLAG_VM) && !(s->cr0 & CR0_PE))) return false;
    /* Wide linear addresses are a matter of CR4. */
    uint32_t la_bits = s->cr4 & CR4_LA57 ? 57 : 48;
    if (lma) {
        const uint64_t bases[] = { s->seg[SEG_FS].base, s->seg[SEG_GS].base, s->ldtr.base, s->tr.base, s->gdtr.base, s->idtr.base };
        for (uint32_t n = 0; n < ARRAY_SIZE(bases); n++)
            if (sign_extend(bases[n], la_bits) != bases[n]) return false;
    }
    return true;
}

static struct segment restored(const struct segment *from)
{
    struct segment s = *from;
    if (!(s.attr & ATTR_P)) s.attr |= ATTR_NULL;
    return s;
}

int smm_resume(struct kvs_vcpu *c)
{
    uint8_t area[SMM_SAVE_SIZE];
    struct smm_state s = { .cr0 = 0 };
    if (!c->in_smm) return raise_ud(c);
    area_access(c, area, false);
    if (has_feature(c, FEAT_LM)) decode64(area, &s);
    else decode32(area, &s);
    if (!resumable(c, &s)) return raise_shutdown(c);
    if ((s.cr0 & CR0_PG) && (s.cr4 & CR4_PAE) && !(s.efer & EFER_LMA)) {
        /* The tables are those of the address space that goes on. */
        c->in_smm = false;
        int st = mmu_load_pdptrs(c, s.cr3);
        c->in_smm = true;
        if (st < 0) return raise_shutdown(c);
    }
    if (s.io_restart == IO_RESTART) {
        s.rip = s.io_rip;
        s.gpr[RCX] = s.io_rcx;
        s.gpr[RSI] = s.io_rsi;
        s.gpr[RDI] = s.io_rdi;
    }

    c->in_smm = false;
    if (!c->smm_inside_nmi) c->nmi_masked = false;
    c->smm_inside_nmi = false;
    memcpy(c->gpr, s.gpr, sizeof s.gpr);
    for (uint32_t n = 0; n < SEG_COUNT; n++) c->seg[n] = restored(&s.seg[n]);
    c->ldtr = restored(&s.ldtr);
    c->tr = restored(&s.tr);
    c->gdtr = s.gdtr;
    c->idtr = s.idtr;
    c->cr0 = s.cr0 | CR0_ET;
    c->cr3 = s.cr3;
    c->cr4 = s.cr4;
    c->efer = s.efer;
    c->dr6 = (s.dr6 & DR6_WRITABLE) | DR6_FIXED;
    c->dr7 = (s.dr7 & DR7_WRITABLE) | DR7_FIXED;
    c->smbase = s.smbase;
    c->rip = s.rip;
    flags_write(c, (uint32_t)s.rflags & FLAGS_ALL);
    c->cpl = !is_protected(c) ? 0 : is_v86(c) ? 3 : (uint8_t)attr_dpl(c->seg[SEG_SS].attr);
    space_changed(c);
    /* SDM 3C "Auto HALT Restart" */
    if (s.halt_restart & 1) atomic_store(&c->mp_state, KVS_MP_STATE_HALTED);
    return ST_LOOKUP;
}
