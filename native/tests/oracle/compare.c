/* What must be equal, what may differ, and how a difference is shown. */
#include "oracle.h"

#include <stdarg.h>
#include <stdio.h>

static bool is(const struct test_case *t, const char *mnemonic) 
{
    return !t->sequence && !t->step && !strcmp(isa_op[t->d.op].mnemonic, mnemonic);
}

void case_undefined(struct test_case *t)
{
    const struct decoded *d = &t->d;
    t->flags_ignored = t->gpr_ignored = 0;
    if (host_is_recorded()) return;
    uint32_t size = operand_size(d, 0) * 8;
    t->flags_ignored = isa_op[d->op].undefined;
    t->gpr_ignored = 0;
    switch (d->op) {
    case OP_rol: case OP_ror: case OP_rcl: case OP_rcr: case OP_shl: case OP_shr: case OP_sar: case OP_shld: case OP_shrd: {
        bool twice = d->op == OP_shld || d->op == OP_shrd;
        uint8_t kind = row_forms[t->row].k[twice ? 2 : 1];
        uint32_t count = (kind == CL_ ? (uint32_t)t->in.gpr[RCX] & 0xff : (uint32_t)d->imm) & (size == 64 ? 63 : 31);
        bool shift = twice || d->op == OP_shl || d->op == OP_shr || d->op == OP_sar;
        /* SDM 2B "SAL/SAR/SHL/SHR": AF undefined; OF by a count of one only; CF up to the size.
         * "RCL/RCR/ROL/ROR": OF by a count of one only. */
        t->flags_ignored = count == 0 ? 0 : (count != 1 ? FLAG_OF : 0) | (shift ? FLAG_AF : 0);
        if ((d->op == OP_shl || d->op == OP_shr) && count >= size) t->flags_ignored |= FLAG_CF;
        if (twice && count > size) {
            t->flags_ignored = FLAGS_STATUS;
            t->gpr_ignored = d->is_mem ? 0x10000 : 1u << d->rm;
        }
        break;
    }
    case OP_bswap:
        if (d->osize == 2) t->gpr_ignored = 1u << ((d->opcode & 7) | (d->rex & 1) << 3);
        break;
    default: break;
    }
}

static bool differ(char *why, size_t size, const char *format, ...)
{
    va_list a;
    va_start(a, format);
    vsnprintf(why, size, format, a);
    va_end(a);
    return false;
}

/* A faulting instruction of several stores may have done some of them; the manuals do not say which. */
static bool partial_stores(const struct test_case *t)
{
    if (!t->sequence && (t->d.op == OP_call_far || t->d.op == OP_call_ptr)) return true;
    static const char *const several[] = { "fxsave", "fnsave", "fsave", "fnstenv", "fstenv", "pusha", "enter", "maskmovdqu", "vmaskmovdqu", "maskmovq",
                                           "fxsave64", "xsave", "xsaveopt", "xsavec", NULL };
    for (int i = 0; several[i]; i++)
        if (is(t, several[i])) return true;
    return false;
}

/* Zen 5 adds the immediate of a far return to all of ESP where the manuals add it to SP. */
static bool far_return_carry(const struct test_case *t, int reg)
{
    return reg == RSP && is(t, "retf") && t->d.op == OP_retf_n && stack_is_16(t) && !((t->host.gpr[RSP] ^ t->core.gpr[RSP]) & 0xffff) &&
           (uint32_t)(t->host.gpr[RSP] - t->core.gpr[RSP]) == 0x10000;
}

static uint64_t flags_mask(const struct test_case *t)
{
    /* What is undefined is known for the end of a sequence only. */
    if (t->sequence && t->host.vector != NO_VECTOR) return FLAG_DF | FLAG_IF | FLAG_RF;
    return (FLAGS_STATUS | FLAG_DF | FLAG_AC | FLAG_ID | FLAG_NT | FLAG_IF | FLAG_IOPL | FLAG_TF | FLAG_RF | FLAG_VM) &
           ~(uint64_t)t->flags_ignored;
}

/*
 * AMD processors store last-instruction pointers only with an exception pending, and their MXCSR
 * has one more bit: bytes 6-23 and 28-31 of the image may differ.
 */
static bool same_fxsave(const struct test_case *t, char *why, size_t size)
{
    uint64_t image = (t->target & 0xfff) + 0x1000 * ((t->target >> 12) - ((t->target >= HIGH ? HIGH : t->target >= MID ? MID : LOW) >> 12));
    for (uint32_t i = 0; i < WINDOW_SIZE; i++) {
        uint64_t at = (i < WINDOW0_SIZE ? WINDOW0 + i : WINDOW1 + i - WINDOW0_SIZE) - image;
        if ((at >= 6 && at < 24) || (at >= 28 && at < 32)) continue;
        if (t->host.mem[i] != t->core.mem[i]) return differ(why, size, "FXSAVE image at %x: %02x, core %02x", (unsigned)at, t->host.mem[i], t->core.mem[i]);
    }
    return true;
}

/* x87 environments: the host's kernel may have taken the CPU away meanwhile, and it gives back pointers of zero. */
static bool lost_pointers(const struct test_case *t)
{
    if (!is(t, "fnstenv") && !is(t, "fnsave")) return false;
    uint32_t first = t->d.osize == 2 ? 6 : 12, last = t->d.osize == 2 ? 14 : 28;
    uint64_t image = (t->target & 0xfff) + 0x1000 * ((t->target >> 12) - ((t->target >= HIGH ? HIGH : t->target >= MID ? MID : LOW) >> 12));
    for (uint32_t i = 0; i < WINDOW_SIZE; i++) {
        uint64_t at = (i < WINDOW0_SIZE ? WINDOW0 + i : WINDOW1 + i - WINDOW0_SIZE) - image;
        bool pointer = at >= first && at < last;
        bool high_word = t->d.osize != 2 && at >= 26; /* all ones in either case */
        if (t->host.mem[i] != t->core.mem[i] && !(pointer && (t->host.mem[i] == 0 || high_word))) return false;
    }
    return true;
}

static bool is_image(const struct test_case *t)
{
    static const char *const images[] = { "fxsave", "fxrstor", "fnsave", "frstor", "fnstenv", "fldenv", "xsave", "xsaveopt", "xsavec", "xrstor", NULL };
    for (int i = 0; images[i]; i++)
        if (is(t, images[i])) return true;
    return false;
}
bool case_soils_memory(const struct test_case *t, const struct cpu_state *after) { return after->vector != NO_VECTOR || is_image(t); }

/* Which byte of an operand of many the processor touches first is its own affair. */
static bool same_fault_address(const struct test_case *t)
{
    if (t->host.cr2 == t->core.cr2) return true;
    /* Frames of far transfers: pushed and popped in an order of the processor's own. */
    if (t->segments) {
        uint64_t low = min_u64(t->host.cr2, t->core.cr2), high = max_u64(t->host.cr2, t->core.cr2);
        return high - low < 5 * 8 && (is(t, "iret") || is(t, "retf") || is(t, "call"));
    }
    return is_image(t) && t->host.cr2 - t->target < FX_SIZE && t->core.cr2 - t->target < FX_SIZE;
}

static bool operand_is_m80(const struct test_case *t)
{
    const uint8_t *k = row_forms[t->row].k;
    return k[0] == Mt || k[1] == Mt;
}

/* Two faults in one instruction whose order the manuals leave open, or give differently. */
static bool either_fault(const struct test_case *t)
{
    uint32_t both = 1u << (t->host.vector & 31) | 1u << (t->core.vector & 31);
    /* Misaligned by less than four bytes: SDM 2A "FXSAVE" allows #AC for #GP. */
    bool x87_only = (t->d.attr & A_X87) && !is(t, "fxsave") && !is(t, "fxrstor");
    if (is_image(t) && !x87_only && both == (1u << EXC_AC | 1u << EXC_GP)) return true;
    /* Both pages of an image fault: either may be reported. */
    if (is_image(t) && both == 1u << EXC_PF) return true;
    /* A return to another privilege level: silicon looks at the outer stack before it refuses the selector;
     * and a RIP that is not canonical beside a bad selector. */
    if (is(t, "retf") || is(t, "iret")) return both & 1u << EXC_GP && !(both & ~(1u << EXC_GP | 1u << EXC_PF | 1u << EXC_SS | 1u << EXC_AC));
    /* So is an 80-bit number and a masked store, which move in two pieces, and what a far call reads, pushes and checks. */
    bool far_call = !t->sequence && (t->d.op == OP_call_far || t->d.op == OP_call_ptr);
    bool pieces = far_call || (!t->sequence && t->ldt && (operand_is_m80(t) || is(t, "maskmovdqu") || is(t, "vmaskmovdqu")));
    if (pieces && !(both & ~(1u << EXC_PF | 1u << EXC_GP | 1u << EXC_SS | 1u << EXC_AC))) return true;
    /* An image that ends beyond its segment and is misaligned, or begins in a page that is not there. */
    if (is_image(t) && t->ldt && !(both & ~(1u << EXC_PF | 1u << EXC_GP | 1u << EXC_SS | 1u << EXC_AC))) return true;
    /* The target is not canonical, or beyond the limit, and the stack cannot be written. */
    if (!t->sequence && (t->d.op == OP_call_ind || (t->d.op == OP_call && t->ldt))) return (both & 1u << EXC_GP) && (both & (1u << EXC_SS | 1u << EXC_PF | 1u << EXC_AC));
    return false;
}

/* The rest of the state is that of cases without FNSTENV. */
static bool same_pointers(const struct test_case *t, char *why, size_t size)
{
    const uint8_t *h = t->host.mem + WINDOW0_SIZE, *c = t->core.mem + WINDOW0_SIZE;
    /* The host's kernel may have taken the CPU away meanwhile, and it gives back pointers of zero. */
    if (!ld32(h + 12) && !ld32(h + 20)) return true;
    if (ld32(h + 12) != ld32(c + 12)) return differ(why, size, "fip %x, core %x", ld32(h + 12), ld32(c + 12));
    if ((ld16(h + 18) ^ ld16(c + 18)) & 0x7ff) return differ(why, size, "fop %x, core %x", ld16(h + 18) & 0x7ff, ld16(c + 18) & 0x7ff);
    if (t->d.is_mem && ld32(h + 20) != ld32(c + 20)) return differ(why, size, "fdp %x, core %x", ld32(h + 20), ld32(c + 20));
    if (ld16(h + 16) != ld16(c + 16)) return differ(why, size, "fcs %x, core %x", ld16(h + 16), ld16(c + 16));
    if (t->d.is_mem && ld16(h + 24) != ld16(c + 24)) return differ(why, size, "fds %x, core %x", ld16(h + 24), ld16(c + 24));
    return true;
}

bool compare_case(const struct test_case *t, char *why, size_t size)
{
    const struct cpu_state *h = &t->host, *c = &t->core;
    if (!t->host_done) return differ(why, size, "the host process died or hung");
    if (h->vector != c->vector && either_fault(t)) return true;
    if (h->vector != c->vector) return differ(why, size, "exception %x, core %x", h->vector, c->vector);
    if (h->error != c->error && !either_fault(t) && !(h->cr2 >> 63 && ((h->error ^ c->error) & ~PF_P) == 0))
        return differ(why, size, "error code %x, core %x", h->error, c->error);
    if (!same_fault_address(t)) return differ(why, size, "fault address %llx, core %llx", (unsigned long long)h->cr2, (unsigned long long)c->cr2);
    if (h->rip != c->rip) return differ(why, size, "rip %llx, core %llx", (unsigned long long)h->rip, (unsigned long long)c->rip);
    if (is(t, "popa") && h->vector != NO_VECTOR) return true; /* the host keeps what it had popped */
    bool compatibility = t->segments && ((h->selector[SEG_CS] & ~3) == 0x20 || (h->selector[SEG_CS] & 4)); /* upper halves are undefined */
    uint64_t mask = t->bits != 64 || compatibility ? 0xffffffff : ~0ull;
    for (int i = 0; i < (t->bits != 64 ? 8 : 16); i++)
        if (((h->gpr[i] ^ c->gpr[i]) & mask) && !(t->gpr_ignored >> i & 1) && !far_return_carry(t, i))
            return differ(why, size, "gpr %d: %llx, core %llx", i, (unsigned long long)h->gpr[i], (unsigned long long)c->gpr[i]);
    for (int n = 0; t->segments && n < SEG_COUNT; n++) {
        if (n == SEG_CS && !h->selector[n]) continue; /* went on behind the instruction */
        if (n != SEG_CS && n != SEG_SS && h->selector[n] == 0 && c->selector[n] <= 3) continue; /* an interrupt on the host clears null selectors */
        if (h->selector[n] != c->selector[n]) return differ(why, size, "selector %d: %x, core %x", n, h->selector[n], c->selector[n]);
    }
    if (t->segments && (h->fs_base != c->fs_base || h->gs_base != c->gs_base))
        return differ(why, size, "bases of FS and GS %llx %llx, core %llx %llx", (unsigned long long)h->fs_base, (unsigned long long)h->gs_base,
                      (unsigned long long)c->fs_base, (unsigned long long)c->gs_base);
    uint64_t f = (h->rflags ^ c->rflags) & flags_mask(t);
    if (f) return differ(why, size, "rflags differ in %llx", (unsigned long long)f);
    bool skip_memory = (t->gpr_ignored & 0x10000) || (h->vector != NO_VECTOR && partial_stores(t));
    bool saves = is(t, "fxsave") || is(t, "xsave") || is(t, "xsaveopt") || is(t, "xsavec");
    if (!skip_memory && saves && h->vector == NO_VECTOR) {
        if (!same_fxsave(t, why, size)) return false;
    } else if (!skip_memory && t->env && h->vector == NO_VECTOR) {
        return same_pointers(t, why, size);
    } else if (!skip_memory && memcmp(h->mem, c->mem, WINDOW_SIZE) && !lost_pointers(t)) {
        uint32_t i = 0;
        while (h->mem[i] == c->mem[i]) i++;
        return differ(why, size, "memory at arena+%x: %02x, core %02x", i < WINDOW0_SIZE ? WINDOW0 + i : WINDOW1 + i - WINDOW0_SIZE,
                      h->mem[i], c->mem[i]);
    }
    for (int i = 0; i < 16 && host_components() & 4; i++)
        if (memcmp(h->fx + FX_YMM + 16 * i, c->fx + FX_YMM + 16 * i, 16)) return differ(why, size, "upper half of ymm%d", i);
    if (!memcmp(h->fx, c->fx, 24) && !memcmp(h->fx + 32, c->fx + 32, 384) && ld32(h->fx + 24) == ld32(c->fx + 24)) return true;
    if (ld32(h->fx + 24) != ld32(c->fx + 24)) return differ(why, size, "mxcsr %x, core %x", ld32(h->fx + 24), ld32(c->fx + 24));
    if (is(t, "maskmovq") && h->vector != NO_VECTOR) return true; /* the host has begun to use the MMX registers */
    if (ld16(h->fx) != ld16(c->fx)) return differ(why, size, "fcw %x, core %x", ld16(h->fx), ld16(c->fx));
    if (ld16(h->fx + 2) != ld16(c->fx + 2)) return differ(why, size, "fsw %x, core %x", ld16(h->fx + 2), ld16(c->fx + 2));
    if (h->fx[4] != c->fx[4]) return differ(why, size, "tags %x, core %x", h->fx[4], c->fx[4]);
    for (int i = 0; i < 8; i++)
        if (memcmp(h->fx + 32 + 16 * i, c->fx + 32 + 16 * i, 10)) return differ(why, size, "st(%d)", i);
    for (int i = 0; i < 16; i++)
        if (memcmp(h->fx + 160 + 16 * i, c->fx + 160 + 16 * i, 16)) return differ(why, size, "xmm%d", i);
    return true;
}

static void print_state(const char *name, const struct cpu_state *s, bool result)
{
    static const char *const names[16] = { "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi",
                                           "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15" };
    printf("  %s: rip %llx rflags %llx", name, (unsigned long long)s->rip, (unsigned long long)s->rflags);
    if (result && s->vector != NO_VECTOR) printf(" exception %u error %x cr2 %llx", s->vector, s->error, (unsigned long long)s->cr2);
    for (int i = 0; i < 16; i++) printf("%s%s %016llx", i % 4 ? "  " : "\n    ", names[i], (unsigned long long)s->gpr[i]);
    printf("\n    fcw %04x fsw %04x tags %02x fop %03x fip %llx fdp %llx mxcsr %x\n", ld16(s->fx), ld16(s->fx + 2), s->fx[4], ld16(s->fx + 6),
           (unsigned long long)ld64(s->fx + 8), (unsigned long long)ld64(s->fx + 16), ld32(s->fx + 24));
}
static void print_fp(const struct test_case *t)
{
    for (int i = 0; i < 8; i++) {
        const uint8_t *a = t->in.fx + 32 + 16 * i, *h = t->host.fx + 32 + 16 * i, *c = t->core.fx + 32 + 16 * i;
        printf("    st%d   before %04x_%016llx host %04x_%016llx core %04x_%016llx%s\n", i, ld16(a + 8), (unsigned long long)ld64(a), ld16(h + 8),
               (unsigned long long)ld64(h), ld16(c + 8), (unsigned long long)ld64(c), memcmp(h, c, 10) ? "  <--" : "");
    }
    for (int i = 0; i < 16; i++) {
        const uint8_t *a = t->in.fx + 160 + 16 * i, *h = t->host.fx + 160 + 16 * i, *c = t->core.fx + 160 + 16 * i;
        printf("    xmm%-2d before %016llx_%016llx host %016llx_%016llx core %016llx_%016llx%s\n", i, (unsigned long long)ld64(a + 8),
               (unsigned long long)ld64(a), (unsigned long long)ld64(h + 8), (unsigned long long)ld64(h), (unsigned long long)ld64(c + 8),
               (unsigned long long)ld64(c), memcmp(h, c, 16) ? "  <--" : "");
        a = t->in.fx + FX_YMM + 16 * i, h = t->host.fx + FX_YMM + 16 * i, c = t->core.fx + FX_YMM + 16 * i;
        if (!(t->d.attr & A_AVX) && !memcmp(h, c, 16)) continue;
        printf("     upper before %016llx_%016llx host %016llx_%016llx core %016llx_%016llx%s\n", (unsigned long long)ld64(a + 8),
               (unsigned long long)ld64(a), (unsigned long long)ld64(h + 8), (unsigned long long)ld64(h), (unsigned long long)ld64(c + 8),
               (unsigned long long)ld64(c), memcmp(h, c, 16) ? "  <--" : "");
    }
}

void print_case(const struct test_case *t, const char *why)
{
    char text[128] = "";
    printf("DIFFERENCE: %s: %s\n", t->sequence ? "sequence" : row_forms[t->row].id, why);
    if (t->ldt)
        printf("  cs %x ss %x ds %x es %x, code base %llx\n", t->in.selector[SEG_CS], t->in.selector[SEG_SS], t->in.selector[SEG_DS],
               t->in.selector[SEG_ES], (unsigned long long)t->cs_base);
    for (uint32_t at = 0; at < t->length;) {
        int32_t n = kvs_disassemble(t->bytes + at, t->length - at < 15 ? t->length - at : 15, t->bits, t->in.rip + at, text, sizeof text);
        if (n == 0) n = t->length - (int32_t)at;
        printf("  %u-bit code:", t->bits);
        for (int i = 0; i < n; i++) printf(" %02x", t->bytes[at + (uint32_t)i]);
        printf("   %s\n", text);
        at += (uint32_t)n;
    }
    print_state("before", &t->in, false);
    print_state("host", &t->host, true);
    print_state("core", &t->core, true);
    if (t->d.attr & (A_X87 | A_MMX | A_SSE | A_AVX) || is_image(t)) print_fp(t);
    int shown = 0;
    for (uint32_t i = 0; i < WINDOW_SIZE && shown < 12; i += 8) {
        uint64_t b = ld64(t->in.mem + i), h = ld64(t->host.mem + i), c = ld64(t->core.mem + i);
        if (b == h && b == c) continue;
        printf("    arena+%04x before %016llx host %016llx core %016llx%s\n", i < WINDOW0_SIZE ? WINDOW0 + i : WINDOW1 + i - WINDOW0_SIZE,
               (unsigned long long)b, (unsigned long long)h, (unsigned long long)c, h != c ? "  <--" : "");
        shown++;
    }
    fflush(stdout);
}
