/* Far transfers, interrupts and fast system calls as instructions. */
#include "../sys/transfer.h"
#include "interp.h"

static int jumped(int st) { return st == ST_OK ? ST_LOOKUP : st; }

/* ---- interrupts ---- */

static int software_interrupt(OPARGS, uint8_t vector, int kind)
{
    c->rip = insn_next_rip(c, i);
    return jumped(interrupt_enter(c, vector, kind, false, 0));
}

OPX(int3) { return software_interrupt(c, i, budget, EXC_BP, INT_INT3); }
OPX(int1)
{
    /* SDM 2 "INT n/INTO/INT3/INT1": a #DB that IOPL and gate DPL do not stop; DR6 is left alone */
    const uint64_t held = c->pending_dbg; /* data breakpoints of a MOV SS before it: they are of the same #DB */
    int st = software_interrupt(c, i, budget, EXC_DB, INT_INT1);
    if (UNLIKELY(held) && st == ST_LOOKUP) {
        c->dr6 = (c->dr6 & ~0xfull) | held;
        c->pending_dbg = 0;
    }
    return st;
}
OPX(int_n)
{
    /* SDM 3B "Virtual-8086 Mode": INT n is sensitive to IOPL, INT3 and INTO are not */
    if (is_v86(c)) {
        bool done;
        uint64_t rip = c->rip;
        c->rip = insn_next_rip(c, i);
        int st = v86_interrupt(c, (uint8_t)i->imm, &done);
        if (st != ST_OK || done) return jumped(st);
        c->rip = rip;
    }
    return software_interrupt(c, i, budget, (uint8_t)i->imm, INT_SOFT);
}
OPX(into)
{
    if (!(flags_status(c) & FLAG_OF)) return ST_END;
    return software_interrupt(c, i, budget, EXC_OF, INT_INTO);
}

OPX(iret)
{
    c->rip = insn_next_rip(c, i);
    atomic_thread_fence(memory_order_seq_cst); /* SDM 3A "Serializing Instructions" */
    return jumped(far_iret(c, INSN_OSIZE(i)));
}

/* ---- far JMP, CALL, RET ---- */

int insn_far_pointer(struct kvs_vcpu *c, const struct kvs_insn *i, uint64_t *off, uint16_t *sel)
{
    uint32_t size = INSN_OSIZE(i);
    uint8_t raw[10];
    /* Two data, as the alignment check sees them. */
    uint64_t at = insn_offset(c, i), next = at + size;
    if (!(i->seg & INSN_FAST) && INSN_ASIZE(i) != 8) next = INSN_ASIZE(i) == 4 ? (uint32_t)next : (uint16_t)next;
    int st = vread(c, i->seg, at, raw, size);
    if (st == ST_OK) st = vread(c, i->seg, next, raw + size, 2);
    if (st != ST_OK) return st;
    *off = size == 8 ? ld64(raw) : size == 4 ? ld32(raw) : ld16(raw);
    *sel = ld16(raw + size);
    return ST_OK;
}

OPX(jmp_ptr)
{
    c->rip = insn_next_rip(c, i);
    return jumped(far_jump(c, (uint16_t)(i->imm >> 32), (uint32_t)i->imm, INSN_OSIZE(i)));
}
OPX(call_ptr)
{
    c->rip = insn_next_rip(c, i);
    return jumped(far_call(c, (uint16_t)(i->imm >> 32), (uint32_t)i->imm, INSN_OSIZE(i)));
}
OPX(jmp_far)
{
    uint64_t off;
    uint16_t sel;
    int st = insn_far_pointer(c, i, &off, &sel);
    if (st != ST_OK) return st;
    c->rip = insn_next_rip(c, i);
    return jumped(far_jump(c, sel, off, INSN_OSIZE(i)));
}
OPX(call_far)
{
    uint64_t off;
    uint16_t sel;
    int st = insn_far_pointer(c, i, &off, &sel);
    if (st != ST_OK) return st;
    c->rip = insn_next_rip(c, i);
    return jumped(far_call(c, sel, off, INSN_OSIZE(i)));
}
OPX(retf)
{
    c->rip = insn_next_rip(c, i);
    return jumped(far_return(c, INSN_OSIZE(i), 0));
}
OPX(retf_n)
{
    c->rip = insn_next_rip(c, i);
    return jumped(far_return(c, INSN_OSIZE(i), (uint32_t)i->imm & 0xffff));
}

/* ---- fast system calls ---- */

#define ATTR_CODE_FLAT (ATTR_G | ATTR_P | ATTR_S | ATTR_CODE | ATTR_W | ATTR_A)
#define ATTR_DATA_FLAT (ATTR_G | ATTR_DB | ATTR_P | ATTR_S | ATTR_W | ATTR_A)

/* CS and SS of fixed contents: nothing is read from the descriptor tables. */
static void set_flat(struct kvs_vcpu *c, uint16_t cs, uint16_t ss, uint32_t cpl, bool code64)
{
    uint32_t dpl = cpl << ATTR_DPL_SHIFT;
    segment_set_flat(&c->seg[SEG_CS], (uint16_t)((cs & 0xfffc) | cpl), ATTR_CODE_FLAT | dpl | (code64 ? ATTR_L : ATTR_DB));
    segment_set_flat(&c->seg[SEG_SS], (uint16_t)((ss & 0xfffc) | cpl), ATTR_DATA_FLAT | dpl);
    c->cpl = (uint8_t)cpl;
}

/* SDM 2 "SYSCALL"; outside 64-bit mode AMD APM 3 "SYSCALL" */
OPX(syscall)
{
    if (!(c->efer & EFER_SCE) || !is_protected(c) || (!is_code64(c) && !cpuid_is_amd(c))) return raise_ud(c);
    uint16_t cs = (uint16_t)(c->msr_star >> 32);
    uint64_t next = insn_next_rip(c, i);
    if (is_long_mode(c)) {
        uint64_t flags = flags_read(c) & ~FLAG_RF;
        c->rip = is_code64(c) ? c->msr_lstar : c->msr_cstar;
        c->gpr[RCX] = next;
        c->gpr[R11] = flags;
        flags_write(c, (uint32_t)(flags & ~c->msr_sfmask));
    } else {
        c->gpr[RCX] = (uint32_t)next;
        c->rip = (uint32_t)c->msr_star;
        c->eflags &= ~(FLAG_VM | FLAG_IF | FLAG_RF);
    }
    set_flat(c, cs, (uint16_t)((cs & 0xfffc) + 8), 0, is_long_mode(c));
    segments_changed(c);
    return ST_LOOKUP;
}

/* SDM 2 "SYSRET" */
OPX(sysret)
{
    bool to64 = INSN_OSIZE(i) == 8;
    if (!(c->efer & EFER_SCE) || !is_protected(c) || (!is_code64(c) && !cpuid_is_amd(c))) return raise_ud(c);
    if (c->cpl != 0) return raise_gp(c, 0);
    /* Intel checks RCX while still at CPL 0; AMD loads it and faults in user mode. */
    if (to64 && !is_canonical(c, c->gpr[RCX]) && !cpuid_is_amd(c)) return raise_gp(c, 0);
    uint16_t base = (uint16_t)(c->msr_star >> 48);
    c->rip = to64 ? c->gpr[RCX] : (uint32_t)c->gpr[RCX];
    if (is_long_mode(c)) flags_write(c, (uint32_t)c->gpr[R11] & 0x3c7fd7);
    else c->eflags |= FLAG_IF;
    if (c->eflags & FLAG_TF && is_long_mode(c)) c->pending_dbg |= DR6_BS; /* it traps at once, not behind the next instruction */
    const struct segment ss = c->seg[SEG_SS];
    set_flat(c, (uint16_t)(base + (to64 ? 16 : 0)), (uint16_t)(base + 8), 3, to64);
    if (cpuid_is_amd(c)) {
        /* AMD APM 3 "SYSRET": of SS only the selector changes, even when it was a null one. */
        const uint16_t sel = c->seg[SEG_SS].sel;
        c->seg[SEG_SS] = ss;
        c->seg[SEG_SS].sel = sel;
        c->seg[SEG_SS].attr |= ATTR_DPL;
    }
    segments_changed(c);
    return ST_LOOKUP;
}

/* SDM 2 "SYSENTER"; AMD has it in legacy mode only */
OPX(sysenter)
{
    bool long_mode = is_long_mode(c);
    if (long_mode && cpuid_is_amd(c)) return raise_ud(c);
    if (!is_protected(c) || !(c->msr_sysenter_cs & 0xfffc)) return raise_gp(c, 0);
    uint16_t cs = (uint16_t)c->msr_sysenter_cs & 0xfffc;
    c->eflags &= ~(FLAG_VM | FLAG_IF | FLAG_RF);
    c->rip = long_mode ? c->msr_sysenter_eip : (uint32_t)c->msr_sysenter_eip;
    c->gpr[RSP] = long_mode ? c->msr_sysenter_esp : (uint32_t)c->msr_sysenter_esp;
    set_flat(c, cs, (uint16_t)(cs + 8), 0, long_mode);
    segments_changed(c);
    return ST_LOOKUP;
}

/* SDM 2 "SYSEXIT" */
OPX(sysexit)
{
    bool to64 = INSN_OSIZE(i) == 8;
    if (is_long_mode(c) && cpuid_is_amd(c)) return raise_ud(c);
    if (!is_protected(c) || c->cpl != 0 || !(c->msr_sysenter_cs & 0xfffc)) return raise_gp(c, 0);
    if (to64 && (!is_canonical(c, c->gpr[RCX]) || !is_canonical(c, c->gpr[RDX]))) return raise_gp(c, 0);
    uint16_t cs = (uint16_t)((c->msr_sysenter_cs & 0xfffc) + (to64 ? 32 : 16));
    c->gpr[RSP] = to64 ? c->gpr[RCX] : (uint32_t)c->gpr[RCX];
    c->rip = to64 ? c->gpr[RDX] : (uint32_t)c->gpr[RDX];
    set_flat(c, cs, (uint16_t)(cs + 8), 3, to64);
    segments_changed(c);
    return ST_LOOKUP;
}

OPX(rsm) { return smm_resume(c); }
OPX(ud0) { return raise_ud(c); }
OPX(ud1) { return raise_ud(c); }
OPX(ud2) { return raise_ud(c); }
