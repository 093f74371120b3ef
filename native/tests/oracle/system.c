/*
 * Rows of the system family that user mode may execute: segment registers, far transfers, selectors'
 * rights, software interrupts; and those that it may only try, for the exception they raise.
 */
#include "maker.h"

const char *row_excluded(uint32_t row)
{
    static const char *const machine[] = { "cpuid", "rdtsc", "rdtscp", "rdpid", "rdrand", "rdseed", "xgetbv", "rdpmc", NULL };
    static const char *const hypervisor[] = { "int1", "icebp", "vmcall", "vmmcall", "monitor", "mwait", NULL };
    static const char *const kernel[] = { "syscall", "sysenter", "sldt", "str", "smsw", "sgdt", "sidt", NULL };
    static const char *const vendor[] = { "sysexit", NULL };
    static const char *const keys[] = { "rdpkru", "wrpkru", NULL };
    const struct row_form *f = &row_forms[row];
    if (!f->id) return "no encoding";
    if (has_mnemonic(row, keys)) return "the host's keys are not the guest's";
    if (!host_has_row(row)) return "this host lacks it";
    if (has_mnemonic(row, machine)) return "its result belongs to the machine it runs on";
    if (has_mnemonic(row, hypervisor)) return "the host's hypervisor answers";
    if (has_mnemonic(row, kernel)) return "the host's kernel answers";
    if (has_mnemonic(row, vendor)) return "not the same for every vendor";
    return NULL;
}

const char *combo_excluded(const struct combo *k)
{
    uint16_t op = row_forms[k->row].op;
    bool far = op == OP_jmp_far || op == OP_call_far || op == OP_lss || op == OP_lfs || op == OP_lgs;
    /* Only Intel's processors have far pointers with a 64-bit offset. */
    return far && k->width == 64 ? "not the same for every vendor" : NULL;
}

bool row_is_system(uint32_t row)
{
    return row_forms[row].attr & (A_SYS | A_PRIV | A_IO);
}

/* Selectors whose descriptors are the same in both tables: all but those for thread-local storage. */
static uint16_t pick_selector(struct rng *r, bool code)
{
    static const uint16_t usual[] = { 0x2b, 0x2b, 0x33, 0x23, 0x2a, 0x28, 0x29, 0x32, 0x30, 0x22, 0x20 };
    uint32_t x = rnd_below(r, 16);
    if (x < 5) return code ? (rnd_one(r, 2) ? 0x33 : 0x23) : 0x2b;
    if (x < 11) return usual[rnd_below(r, ARRAY_SIZE(usual))];
    if (x < 13) return (uint16_t)rnd_below(r, 4);
    for (;;) {
        uint16_t s = (uint16_t)(x < 14 ? rnd_below(r, 0x80) : rnd(r));
        uint32_t index = s >> 3;
        if (code && (s & 4) && index < LDT_COUNT) continue; /* pick_far takes those */
        if ((s & 4) || index < 12 || index > 15) return s;
    }
}

/* A far pointer's two parts: what lies in the table's segments is reached by an offset of their own. */
static uint16_t pick_far(struct maker *m, uint32_t size, uint64_t *off)
{
    uint64_t at = m->t->in.rip + m->t->cs_base;
    bool call = m->t->d.op == OP_call_ptr || m->t->d.op == OP_call_far;
    uint16_t sel = pick_selector(m->r, true);
    /* A call to 64-bit code pushes without the base and limit of SS, or with: that differs by vendor. */
    while (call && m->t->ldt && sel >> 3 == 0x30 >> 3) sel = pick_selector(m->r, true);
    if (rnd_one(m->r, 3)) {
        uint32_t n = rnd_below(m->r, LDT_COUNT);
        bool reach = size > 2 || at - ldt_rows[n].base < 0xff00;
        if (reach || ldt_rows[n].kind < LDT_CODE) sel = (uint16_t)(n << 3 | 4 | (rnd_one(m->r, 4) ? rnd_below(m->r, 4) : 3));
    }
    *off = pick_landing(m, size, selector_base(sel));
    return sel;
}

/* Bytes of the memory operand for a case to fill; NULL with *retry when they are not its own. */
static uint8_t *operand(struct maker *m, uint32_t size, bool *retry)
{
    *retry = foreign(m, m->target, size);
    return mem_at(m, m->target, size);
}

/* Values on the stack, each of the operand size; no stack at all when they do not fit. */
static void push_values(struct maker *m, const uint64_t *v, uint32_t count)
{
    struct test_case *t = m->t;
    uint32_t size = t->d.osize;
    set_stack(m);
    uint8_t *p = mem_at(m, stack_at(m), count * size);
    if (!p) {
        no_stack(m);
        return;
    }
    for (uint32_t i = 0; i < count; i++) memcpy(p + i * size, &v[i], size);
}

static bool role_far_memory(struct maker *m, bool code)
{
    struct test_case *t = m->t;
    uint32_t size = t->d.osize;
    bool retry;
    uint8_t *p = operand(m, size + 2, &retry);
    uint64_t off = rnd_value(m->r);
    uint16_t sel = code ? pick_far(m, size, &off) : pick_selector(m->r, false);
    if (p) {
        memcpy(p, &off, size);
        st16(p + size, sel);
    }
    return !retry;
}

/* A far pointer in the instruction itself: its last bytes. */
static void role_far_immediate(struct maker *m)
{
    struct test_case *t = m->t;
    uint64_t off;
    uint16_t sel = pick_far(m, t->d.osize, &off);
    memcpy(t->bytes + t->length - 2 - t->d.osize, &off, t->d.osize);
    memcpy(t->bytes + t->length - 2, &sel, 2);
    t->d.imm = off;
    t->d.imm2 = sel;
}

static bool role_selector_operand(struct maker *m)
{
    struct test_case *t = m->t;
    uint16_t sel = pick_selector(m->r, false);
    bool retry = false;
    if (t->d.is_mem) {
        uint8_t *p = operand(m, 2, &retry);
        if (p) st16(p, sel);
    } else set_low(&t->in.gpr[t->d.rm], sel, 2);
    return !retry;
}

bool system_role(struct maker *m)
{
    struct test_case *t = m->t;
    struct rng *r = m->r;
    uint64_t frame[5];
    t->segments = true;
    switch (t->d.op) {
    case OP_mov_to_sreg: case OP_verr: case OP_verw: case OP_lar: case OP_lsl: return role_selector_operand(m);
    case OP_lds: case OP_les: case OP_lss: case OP_lfs: case OP_lgs: return role_far_memory(m, false);
    case OP_jmp_far: return role_far_memory(m, true);
    case OP_call_far:
        /* Whether a call to compatibility mode pushes through 32 or 64 bits of RSP differs by vendor. */
        if (!(m->pinned >> RSP & 1)) {
            set_stack(m);
            if (t->bits == 64 && t->in.gpr[RSP] - HIGH < ARENA_SIZE) t->in.gpr[RSP] = t->in.gpr[RSP] - HIGH + MID;
        }
        if (t->bits == 64 && t->in.gpr[RSP] >> 32) return false;
        return role_far_memory(m, true);
    case OP_jmp_ptr: role_far_immediate(m); break;
    case OP_call_ptr: set_stack(m); role_far_immediate(m); break;
    case OP_push_sreg: set_stack(m); break;
    case OP_pop_sreg:
        frame[0] = pick_selector(r, false) | (rnd(r) & ~0xffffull);
        push_values(m, frame, 1);
        break;
    case OP_retf: case OP_retf_n: case OP_iret: {
        frame[1] = pick_far(m, t->d.osize, &frame[0]) | (rnd(r) & ~0xffffull);
        frame[2] = rnd(r) & ~(uint64_t)(FLAG_TF | FLAG_NT);
        frame[3] = MID + 0x1000 + rnd_below(r, 64);
        frame[4] = rnd_one(r, 4) ? pick_selector(r, false) : 0x2b;
        push_values(m, frame, t->d.op == OP_iret ? 5 : 2);
        break;
    }
    case OP_int_n: return (uint8_t)t->d.imm != 0x80; /* a system call */
    default: break;
    }
    return true;
}
