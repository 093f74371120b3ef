/* System instructions that do not transfer control. SDM 2 "Instruction Set Reference" */
#include <sched.h>

#include "../irqchip/irqchip.h"
#include "../sys/transfer.h"
#include "interp.h"

#define REQUIRE_CPL0(c)                                                                           \
    do {                                                                                          \
        if ((c)->cpl != 0) return raise_gp(c, 0);                                                 \
    } while (0)

/* ---- flags ---- */

/* SDM 2 "CLI", "STI": IOPL decides in protected mode, and in virtual-8086 mode it must be 3 */
static bool may_change_if(const struct kvs_vcpu *c)
{
    return !is_protected(c) || (is_v86(c) ? iopl(c) == 3 : c->cpl <= iopl(c));
}

/* SDM 3B "Virtual-8086 Mode Extensions" and "Protected-Mode Virtual Interrupts": VIF takes the place of IF */
static bool has_virtual_if(const struct kvs_vcpu *c)
{
    return is_v86(c) ? (c->cr4 & CR4_VME) != 0 : c->cpl == 3 && (c->cr4 & CR4_PVI);
}

OPX(cli)
{
    if (LIKELY(may_change_if(c))) c->eflags &= ~FLAG_IF;
    else if (has_virtual_if(c)) c->eflags &= ~FLAG_VIF;
    else return raise_gp(c, 0);
    return ST_OK;
}
OPX(sti)
{
    if (UNLIKELY(!may_change_if(c))) {
        if (!has_virtual_if(c) || (c->eflags & FLAG_VIP)) return raise_gp(c, 0);
        c->eflags |= FLAG_VIF;
        return ST_OK;
    }
    if (!(c->eflags & FLAG_IF)) c->int_shadow = 2;
    c->eflags |= FLAG_IF;
    return ST_END;
}

OPX(pushf)
{
    uint32_t flags = flags_read(c) & ~(FLAG_VM | FLAG_RF);
    if (is_v86(c) && iopl(c) < 3) {
        if (!vme_flags(c, INSN_OSIZE(i))) return raise_gp(c, 0);
        flags = vme_image(c);
    }
    return push(c, flags, INSN_OSIZE(i));
}

/* SDM 2 "POPF/POPFD/POPFQ", table of effects */
OPX(popf)
{
    uint32_t size = INSN_OSIZE(i), mask = FLAGS_STATUS | FLAG_TF | FLAG_DF | FLAG_NT, clear = FLAG_RF;
    uint64_t v, rsp = c->gpr[RSP];
    bool virtual_if = is_v86(c) && iopl(c) < 3;
    if (virtual_if && !vme_flags(c, size)) return raise_gp(c, 0);
    int st = pop(c, &v, size);
    if (st != ST_OK) return st;
    if (virtual_if) {
        if ((st = vme_load(c, (uint32_t)v)) != ST_OK) c->gpr[RSP] = rsp;
        return st == ST_OK ? ST_END : st;
    }
    if (size > 2) mask |= FLAG_AC | FLAG_ID;
    if (c->cpl == 0) mask |= FLAG_IOPL;
    if (c->cpl <= iopl(c)) mask |= FLAG_IF;
    if (size > 2 && !is_v86(c)) clear |= FLAG_VIF | FLAG_VIP;
    flags_write(c, (flags_read(c) & ~(mask | clear)) | ((uint32_t)v & mask));
    vcpu_update_mode(c);
    return ST_END;
}

OPX(hlt)
{
    REQUIRE_CPL0(c);
    /* An INIT that has just arrived stays. */
    uint32_t runs = KVS_MP_STATE_RUNNABLE;
    atomic_compare_exchange_strong(&c->mp_state, &runs, KVS_MP_STATE_HALTED);
    return ST_END;
}
static int yield_turn(OPARGS)
{
    if (c->vm->config.clock_mode == KVS_CLOCK_REAL) {
        sched_yield();
        return ST_OK;
    }
    c->slice_end = vcpu_retired_at(c, i, budget) + 1;
    return ST_END;
}
/* A spinning vCPU lets the one it waits for run: vCPUs may outnumber processors. */
OPX(pause)
{
    if (LIKELY(atomic_load_explicit(&c->vm->vcpu_count, memory_order_relaxed) <= 1)) return ST_OK;
    return ++c->pauses % PAUSES_PER_TURN ? ST_OK : yield_turn(c, i, budget);
}

/* ---- segment registers ---- */

OPX(mov_from_sreg)
{
    if (i->src >= SEG_COUNT) return raise_ud(c);
    uint16_t sel = c->seg[i->src].sel;
    return rm_write(c, i, i->dst, i->dst == INSN_MEM ? 2 : INSN_OSIZE(i), sel);
}
/* Decoded code depends on segments through the mode alone. SDM 2B "MOV": a load of SS holds off interrupts and traps. */
static int segment_loaded(struct kvs_vcpu *c, uint32_t seg, uint32_t mode_before)
{
    if (seg == SEG_SS) c->int_shadow = 1;
    return seg == SEG_SS || c->mode != mode_before ? ST_END : ST_OK;
}
OPX(mov_to_sreg)
{
    uint64_t v;
    const uint32_t mode = c->mode;
    if (i->dst >= SEG_COUNT || i->dst == SEG_CS) return raise_ud(c);
    int st = rm_read(c, i, i->src, 2, &v);
    if (st != ST_OK) return st;
    if ((st = load_segment(c, i->dst, (uint16_t)v)) != ST_OK) return st;
    return segment_loaded(c, i->dst, mode);
}
OPX(push_sreg) { return push(c, c->seg[i->dst].sel, INSN_OSIZE(i)); }
OPX(pop_sreg)
{
    const uint32_t size = INSN_OSIZE(i), width = stack_size(c), mode = c->mode;
    uint64_t v;
    int st = stack_peek(c, 0, &v, size);
    if (st != ST_OK) return st;
    if ((st = load_segment(c, i->dst, (uint16_t)v)) != ST_OK) return st;
    stack_adjust(c, size, width);
    return segment_loaded(c, i->dst, mode);
}

static int load_pointer(struct kvs_vcpu *c, const struct kvs_insn *i, uint32_t seg)
{
    uint64_t off;
    uint16_t sel;
    int st = insn_far_pointer(c, i, &off, &sel);
    if (st != ST_OK) return st;
    if ((st = load_segment(c, seg, sel)) != ST_OK) return st;
    reg_set(c, i->dst, INSN_OSIZE(i), off);
    return ST_END;
}
OPX(les) { return load_pointer(c, i, SEG_ES); }
OPX(lds) { return load_pointer(c, i, SEG_DS); }
OPX(lss) { return load_pointer(c, i, SEG_SS); }
OPX(lfs) { return load_pointer(c, i, SEG_FS); }
OPX(lgs) { return load_pointer(c, i, SEG_GS); }

/* In 64-bit mode the bases of FS and GS are part of no decoded code: they are read from gpr[]. */
static void set_base(struct kvs_vcpu *c, uint32_t seg, uint64_t v)
{
    c->seg[seg].base = v;
    c->gpr[seg == SEG_FS ? GPR_FSBASE : GPR_GSBASE] = v;
}
OPX(swapgs)
{
    REQUIRE_CPL0(c);
    uint64_t v = c->seg[SEG_GS].base;
    set_base(c, SEG_GS, c->msr_kernel_gs_base);
    c->msr_kernel_gs_base = v;
    return ST_OK;
}
static int read_base(struct kvs_vcpu *c, const struct kvs_insn *i, uint32_t seg)
{
    if (!(c->cr4 & CR4_FSGSBASE)) return raise_ud(c);
    reg_set(c, i->dst, INSN_OSIZE(i), c->seg[seg].base);
    return ST_OK;
}
static int write_base(struct kvs_vcpu *c, const struct kvs_insn *i, uint32_t seg)
{
    uint64_t v = reg_get(c, i->dst, INSN_OSIZE(i));
    if (!(c->cr4 & CR4_FSGSBASE)) return raise_ud(c);
    if (!is_canonical(c, v)) return raise_gp(c, 0); /* not as WRMSR has it: silicon that has 57 bits goes by CR4.LA57 */
    set_base(c, seg, v);
    return ST_OK;
}
OPX(rdfsbase) { return read_base(c, i, SEG_FS); }
OPX(rdgsbase) { return read_base(c, i, SEG_GS); }
OPX(wrfsbase) { return write_base(c, i, SEG_FS); }
OPX(wrgsbase) { return write_base(c, i, SEG_GS); }

/* ---- descriptor tables ---- */

/* SDM 3A "User-Mode Instruction Prevention (UMIP)" */
static bool umip_forbids(const struct kvs_vcpu *c) { return c->cr4 & CR4_UMIP && c->cpl != 0; }

static int store_word(struct kvs_vcpu *c, const struct kvs_insn *i, uint64_t v)
{
    if (umip_forbids(c)) return raise_gp(c, 0);
    return rm_write(c, i, i->dst, i->dst == INSN_MEM ? 2 : INSN_OSIZE(i), v);
}
OPX(sldt) { return store_word(c, i, c->ldtr.sel); }
OPX(str) { return store_word(c, i, c->tr.sel); }
OPX(smsw) { return store_word(c, i, c->cr0); }

static int store_table(struct kvs_vcpu *c, const struct kvs_insn *i, const struct dtable *t)
{
    uint8_t raw[10];
    if (umip_forbids(c)) return raise_gp(c, 0);
    st16(raw, t->limit);
    st64(raw + 2, t->base);
    return insn_write(c, i, raw, is_code64(c) ? 10 : 6);
}
static int load_table(struct kvs_vcpu *c, const struct kvs_insn *i, struct dtable *t)
{
    uint8_t raw[10] = { 0 };
    REQUIRE_CPL0(c);
    int st = insn_read(c, i, raw, is_code64(c) ? 10 : 6);
    if (st != ST_OK) return st;
    uint64_t base = ld64(raw + 2);
    if (!is_code64(c) && INSN_OSIZE(i) == 2) base &= 0xffffff; /* SDM 2 "LGDT/LIDT": 24 bits */
    if (!is_canonical_widest(c, base)) return raise_gp(c, 0);
    *t = (struct dtable){ .base = base, .limit = ld16(raw) };
    return ST_OK;
}
OPX(sgdt) { return store_table(c, i, &c->gdtr); }
OPX(sidt) { return store_table(c, i, &c->idtr); }
OPX(lgdt) { return serialized(load_table(c, i, &c->gdtr)); }
OPX(lidt) { return serialized(load_table(c, i, &c->idtr)); }

/* System descriptor of LLDT and LTR: always in the GDT; 16 bytes in IA-32e mode. */
static int read_system(struct kvs_vcpu *c, uint16_t sel, struct descriptor *d)
{
    uint32_t reserved = 0, error = sel_error(sel);
    if (sel & 4) return raise_gp(c, error);
    int st = descriptor_read(c, sel, d);
    if (st == ST_OK && is_long_mode(c)) {
        st = descriptor_read_high(c, sel, d, &reserved);
        if (st == ST_OK && (reserved & 0x1f00 || !is_canonical_widest(c, d->base))) return raise_gp(c, error);
    }
    return st < 0 ? raise_gp(c, error) : st;
}

OPX(lldt)
{
    uint64_t v;
    struct descriptor d;
    REQUIRE_CPL0(c);
    int st = rm_read(c, i, i->dst, 2, &v);
    if (st != ST_OK) return st;
    uint16_t sel = (uint16_t)v;
    if (sel_is_null(sel)) {
        segment_set_null(&c->ldtr, sel, 0);
        return serialized(ST_OK);
    }
    if ((st = read_system(c, sel, &d)) != ST_OK) return st;
    if ((d.attr & (ATTR_S | ATTR_TYPE)) != SYS_LDT) return raise_gp(c, sel_error(sel));
    if (!(d.attr & ATTR_P)) return raise_error(c, EXC_NP, sel_error(sel));
    segment_set(&c->ldtr, &d, sel);
    return serialized(ST_OK);
}
OPX(ltr)
{
    uint64_t v;
    struct descriptor d;
    REQUIRE_CPL0(c);
    int st = rm_read(c, i, i->dst, 2, &v);
    if (st != ST_OK) return st;
    uint16_t sel = (uint16_t)v;
    if (sel_is_null(sel)) return raise_gp(c, 0);
    if ((st = read_system(c, sel, &d)) != ST_OK) return st;
    uint32_t type = d.attr & (ATTR_S | ATTR_TYPE);
    if (type != SYS_TSS32 && (type != SYS_TSS16 || is_long_mode(c))) return raise_gp(c, sel_error(sel));
    if (!(d.attr & ATTR_P)) return raise_error(c, EXC_NP, sel_error(sel));
    if ((st = descriptor_set_type(c, &d, type | 2)) != ST_OK) return st;
    segment_set(&c->tr, &d, sel);
    return serialized(ST_OK);
}

static void set_zf(struct kvs_vcpu *c, bool zf)
{
    uint32_t f = flags_status(c);
    flags_set_status(c, zf ? f | FLAG_ZF : f & ~FLAG_ZF);
}

/* Bit n: system descriptor type n is valid for LAR, LSL. [IA-32e mode] */
static const uint16_t lar_types[2] = { 0x1a3e, 0x1a04 }, lsl_types[2] = { 0x0a0e, 0x0a04 };

/* Reads the descriptor of a query. *visible: it exists, its type fits, and privilege lets it be seen. */
static int query(struct kvs_vcpu *c, uint16_t sel, uint32_t system_types, struct descriptor *d, bool *visible)
{
    *visible = false;
    if (sel_is_null(sel)) return ST_OK;
    int st = descriptor_read(c, sel, d);
    if (st < 0) return ST_OK;
    if (st != ST_OK) return st;
    uint32_t dpl = attr_dpl(d->attr);
    bool conforming = attr_is_code(d->attr) && attr_is_conforming(d->attr);
    if (!(d->attr & ATTR_S) && !(system_types >> (d->attr & ATTR_TYPE) & 1)) return ST_OK;
    *visible = conforming || (c->cpl <= dpl && (sel & 3u) <= dpl);
    return ST_OK;
}
static int lar_lsl(struct kvs_vcpu *c, const struct kvs_insn *i, bool is_lsl)
{
    uint64_t v;
    struct descriptor d;
    bool visible;
    int st = rm_read(c, i, i->src, 2, &v);
    if (st != ST_OK) return st;
    st = query(c, (uint16_t)v, (is_lsl ? lsl_types : lar_types)[is_long_mode(c)], &d, &visible);
    if (st != ST_OK) return st;
    if (visible) reg_set(c, i->dst, INSN_OSIZE(i), is_lsl ? d.limit : d.hi & 0x00ffff00);
    set_zf(c, visible);
    return ST_OK;
}
static int verify(struct kvs_vcpu *c, const struct kvs_insn *i, bool write)
{
    uint64_t v;
    struct descriptor d;
    bool visible;
    int st = rm_read(c, i, i->dst, 2, &v);
    if (st != ST_OK) return st;
    if ((st = query(c, (uint16_t)v, 0, &d, &visible)) != ST_OK) return st;
    if (visible) visible = write ? attr_is_writable_data(d.attr) : !attr_is_code(d.attr) || d.attr & ATTR_W;
    set_zf(c, visible);
    return ST_OK;
}
OPX(lar) { return lar_lsl(c, i, false); }
OPX(lsl) { return lar_lsl(c, i, true); }
OPX(verr) { return verify(c, i, false); }
OPX(verw) { return verify(c, i, true); }

OPX(arpl)
{
    uint64_t v;
    uint32_t rpl = c->gpr[i->src] & 3;
    int st = rm_read(c, i, i->dst, 2, &v);
    if (st != ST_OK) return st;
    bool adjust = (v & 3) < rpl;
    if (adjust && (st = rm_write(c, i, i->dst, 2, (v & ~3ull) | rpl)) != ST_OK) return st;
    set_zf(c, adjust);
    return ST_OK;
}

/* ---- control registers ---- */

static uint32_t cr_size(const struct kvs_vcpu *c) { return is_code64(c) ? 8 : 4; }

OPX(mov_from_cr)
{
    uint64_t v;
    switch (i->src) {
    case 0: v = c->cr0; break;
    case 2: v = c->cr2; break;
    case 3: v = c->cr3; break;
    case 4: v = c->cr4; break;
    case 8: v = c->lapic ? lapic_cr8(c) : c->run->cr8 & 15; break;
    default: return raise_ud(c);
    }
    REQUIRE_CPL0(c);
    reg_set(c, i->dst, cr_size(c), v);
    return ST_OK;
}
OPX(mov_to_cr)
{
    uint64_t v = reg_get(c, i->src, cr_size(c));
    int st = ST_OK;
    if (i->dst != 0 && i->dst != 2 && i->dst != 3 && i->dst != 4 && i->dst != 8) return raise_ud(c);
    REQUIRE_CPL0(c);
    switch (i->dst) {
    case 0: st = write_cr0(c, v); break;
    case 2: c->cr2 = v; break;
    case 3: st = write_cr3(c, v); break;
    case 4: st = write_cr4(c, v); break;
    default:
        if (v > 15) return raise_gp(c, 0);
        if (c->lapic) lapic_set_cr8(c, (uint32_t)v);
        else c->run->cr8 = v;
        return ST_END;
    }
    return serialized(st);
}
OPX(mov_from_dr)
{
    uint64_t v;
    REQUIRE_CPL0(c);
    int st = debug_read_register(c, i->src, &v);
    if (st == ST_OK) reg_set(c, i->dst, cr_size(c), v);
    return st;
}
OPX(mov_to_dr)
{
    REQUIRE_CPL0(c);
    return serialized(debug_write_register(c, i->dst, reg_get(c, i->src, cr_size(c))));
}
OPX(clts)
{
    REQUIRE_CPL0(c);
    c->cr0 &= ~(uint64_t)CR0_TS;
    vcpu_update_mode(c);
    return ST_END;
}
OPX(lmsw)
{
    uint64_t v;
    REQUIRE_CPL0(c);
    int st = rm_read(c, i, i->dst, 2, &v);
    if (st != ST_OK) return st;
    /* PE can be set but not cleared here. */
    return serialized(write_cr0(c, (c->cr0 & ~0xeull) | (v & 0xf)));
}

static int set_ac(struct kvs_vcpu *c, bool on)
{
    if (c->cpl != 0) return raise_ud(c);
    /* At CPL 0 AC decides nothing but which soft TLB class serves. */
    if (on) c->eflags |= FLAG_AC;
    else c->eflags &= ~FLAG_AC;
    tlb_select(c, on ? TLB_SUPER_AC : TLB_SUPER);
    return ST_OK;
}
OPX(clac) { return set_ac(c, false); }
OPX(stac) { return set_ac(c, true); }

/* SDM 2 "RDPKRU", "WRPKRU" */
OPX(rdpkru)
{
    if (!(c->cr4 & CR4_PKE)) return raise_ud(c);
    if (REG32(RCX) != 0) return raise_gp(c, 0);
    SET32(RAX, c->pkru);
    SET32(RDX, 0);
    return ST_OK;
}
OPX(wrpkru)
{
    if (!(c->cr4 & CR4_PKE)) return raise_ud(c);
    if (REG32(RCX) != 0 || REG32(RDX) != 0) return raise_gp(c, 0);
    pkru_write(c, REG32(RAX));
    return ST_OK;
}

/* ---- TLB and caches ---- */

static uint64_t operand_linear(const struct kvs_vcpu *c, const struct kvs_insn *i)
{
    uint32_t seg = i->seg & ~(uint32_t)INSN_FAST;
    uint64_t off = insn_offset(c, i);
    if (i->seg & INSN_FAST) return off;
    if (is_code64(c)) return seg >= SEG_FS ? off + c->seg[seg].base : off;
    return (uint32_t)(off + c->seg[seg].base);
}
OPX(invlpg)
{
    REQUIRE_CPL0(c);
    uint64_t la = operand_linear(c, i);
    if (is_canonical(c, la)) tlb_flush_page(c, la);
    return serialized(ST_OK);
}
/* SDM 2 "INVPCID". The soft TLB holds the current PCID alone. */
OPX(invpcid)
{
    uint64_t desc[2], type = reg_get(c, i->dst, cr_size(c));
    REQUIRE_CPL0(c);
    if (type > 3) return raise_gp(c, 0);
    int st = insn_read(c, i, desc, 16);
    if (st != ST_OK) return st;
    if (type < 2 && desc[0] >> 12) return raise_gp(c, 0);
    if (type < 2 && desc[0] && !(c->cr4 & CR4_PCIDE)) return raise_gp(c, 0);
    if (type == 0 && !is_canonical_widest(c, desc[1])) return raise_gp(c, 0);
    bool current = !(c->cr4 & CR4_PCIDE) || (desc[0] & 0xfff) == (c->cr3 & 0xfff);
    if (type == 0 && current) tlb_flush_page(c, desc[1]);
    else if (type == 2) tlb_flush_all(c);
    else if (type == 3 || current) tlb_flush_nonglobal(c);
    jc_flush(c);
    return serialized(ST_OK);
}
OPX(invd)
{
    REQUIRE_CPL0(c);
    return serialized(ST_OK);
}
OPX(wbinvd)
{
    REQUIRE_CPL0(c);
    return serialized(ST_OK);
}
/*
 * SDM 2 "CLFLUSH", "CLWB": fault like a byte load, and then there is no cache to flush. Unlike a load, they
 * may name code that cannot be read.
 */
static int flush_line(struct kvs_vcpu *c, const struct kvs_insn *i)
{
    uint64_t la;
    struct translation t;
    int st = seg_to_linear(c, i->seg, insn_offset(c, i), 1, ACC_X, &la);
    if (st != ST_OK) return st;
    return mmu_walk(c, la, ACC_R, c->cpl == 3, c->eflags & FLAG_AC, false, &t);
}
OPX(clflush) { return flush_line(c, i); }
OPX(clflushopt) { return flush_line(c, i); }
OPX(clwb) { return flush_line(c, i); }

/* ---- identification, time, MSRs ---- */

OPX(cpuid)
{
    uint32_t out[4];
    cpuid_lookup(c, REG32(RAX), REG32(RCX), out);
    SET32(RAX, out[0]);
    SET32(RBX, out[1]);
    SET32(RCX, out[2]);
    SET32(RDX, out[3]);
    return serialized(ST_OK);
}

static int read_tsc(OPARGS)
{
    if (c->cr4 & CR4_TSD && c->cpl != 0) return raise_gp(c, 0);
    vcpu_sync_clock(c, i, budget);
    uint64_t tsc = tsc_read(c);
    SET32(RAX, tsc);
    SET32(RDX, tsc >> 32);
    return ST_OK;
}
OPX(rdtsc) { return read_tsc(c, i, budget); }
OPX(rdtscp)
{
    int st = read_tsc(c, i, budget);
    if (st == ST_OK) SET32(RCX, c->msr_tsc_aux);
    return st;
}
/* An AMD processor has four counters whatever CPUID says (APM 2 "Performance Monitoring Counters"); these stand still. */
OPX(rdpmc)
{
    if ((c->cpl != 0 && !(c->cr4 & CR4_PCE)) || !cpuid_is_amd(c) || REG32(RCX) > 3) return raise_gp(c, 0);
    SET32(RAX, 0);
    SET32(RDX, 0);
    return ST_OK;
}

OPX(rdmsr)
{
    uint64_t v;
    REQUIRE_CPL0(c);
    vcpu_sync_clock(c, i, budget);
    if (msr_read(c, REG32(RCX), &v, false) < 0) return raise_gp(c, 0);
    SET32(RAX, v);
    SET32(RDX, v >> 32);
    return ST_OK;
}
OPX(wrmsr)
{
    uint64_t v = REG32(RAX) | (uint64_t)REG32(RDX) << 32;
    REQUIRE_CPL0(c);
    vcpu_sync_clock(c, i, budget);
    if (msr_write(c, REG32(RCX), v, false) < 0) return raise_gp(c, 0);
    return serialized(ST_OK);
}

/* Both of them on every processor: under KVM the host's own form is patched in. */
static int hypercall(OPARGS)
{
    vcpu_sync_clock(c, i, budget);
    if (hypercall_run(c)) (void)yield_turn(c, i, budget);
    return ST_END; /* it may have written guest memory */
}
OPX(vmcall) { return hypercall(c, i, budget); }
OPX(vmmcall) { return hypercall(c, i, budget); }
