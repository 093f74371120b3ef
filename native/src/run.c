/*
 * kvs_vcpu_run: enter, execute, handle in the core or exit. Read this first.
 *
 * One turn of the loop: requests from other threads, halt, events (exceptions, NMI, interrupts),
 * then a block, whose handlers chain until something unusual makes them leave with an ST_ code.
 */
#include <limits.h>
#include <time.h>

#include "clock.h"
#include "interp/interp.h"
#include "interp/x87.h"
#include "irqchip/irqchip.h"

OP(movs);
OP(stos);
OP(lods);
OP(cmps);
OP(scas);
OP(ins);
OP(outs);
OP(int_n);
OP(int3);
OP(into);
OP(int1);
OP(syscall);
OP(sysret);

#define BUDGET_MAX (INT64_C(1) << 40)
#define DR6_BS 0x4000u

/* Loop verdicts. */
enum verdict { GO_ON, EXIT };

int leave(OPARGS, int st)
{
    c->cur = i;
    c->budget = budget - i->since;
    switch (st) {
    case ST_FAULT: case ST_EXIT: case ST_AGAIN: c->rip = insn_rip(c, i); break;
    case ST_END: case ST_EXIT_DONE:
        c->rip = insn_next_rip(c, i);
        c->budget--;
        break;
    default: c->budget--; break; /* c->rip is set */
    }
    return st;
}

int op_ud(OPARGS) { return leave(c, i, budget, raise_ud(c)); }
int op_nm(OPARGS) { return leave(c, i, budget, raise_vector(c, EXC_NM)); }
int op_gp0(OPARGS) { return leave(c, i, budget, raise_gp(c, 0)); }

uint64_t vcpu_retired(const struct kvs_vcpu *c) { return c->retired_end - (uint64_t)c->budget; }
uint64_t vcpu_retired_at(const struct kvs_vcpu *c, const struct kvs_insn *i, int64_t budget)
{
    return c->retired_end - (uint64_t)budget + i->since;
}

static bool is_virtual_clock(const struct kvs_vcpu *c) { return c->vm->config.clock_mode == KVS_CLOCK_VIRTUAL; }

void vcpu_sync_clock(struct kvs_vcpu *c, const struct kvs_insn *i, int64_t budget)
{
    if (is_virtual_clock(c)) clock_set_virtual(c->vm, vcpu_retired_at(c, i, budget) + c->clock_base);
}

/* ---- exits ---- */
static enum verdict exit_with(struct kvs_vcpu *c, uint32_t reason)
{
    c->run->exit_reason = reason;
    return EXIT;
}

/* ---- virtual clock: one vCPU runs at a time, in a fixed order, so that runs repeat ---- */
static bool takes_turns(const struct kvs_vcpu *c) { return is_virtual_clock(c) && atomic_load(&c->vm->vcpu_count) > 1; }
static bool has_turn(const struct kvs_vcpu *c) { return !takes_turns(c) || atomic_load(&c->vm->turn) == c->id; }

static void report_state(struct kvs_vcpu *c)
{
    struct kvs_run *r = c->run;
    r->if_flag = (c->eflags & FLAG_IF) != 0;
    r->flags = c->in_smm ? KVS_RUN_X86_SMM : 0;
    r->ready_for_interrupt_injection = r->if_flag && !c->int_shadow && c->injected_irq < 0;
    r->cr8 = c->lapic ? lapic_cr8(c) : 0;
    r->apic_base = c->lapic ? lapic_base(c) : 0;
    c->stats.retired = vcpu_retired(c);
    if (is_virtual_clock(c) && has_turn(c)) clock_set_virtual(c->vm, vcpu_retired(c) + c->clock_base);
}

/* ---- quiesce: nobody is inside while vm->quiesced ---- */
static void leave_guest(struct kvs_vcpu *c)
{
    struct kvs_vm *vm = c->vm;
    pthread_mutex_lock(&vm->sync_lock);
    atomic_store(&c->in_guest, 0);
    pthread_cond_broadcast(&vm->sync_cond);
    pthread_mutex_unlock(&vm->sync_lock);
}

/* False: kicked while waiting. */
static bool enter_guest(struct kvs_vcpu *c)
{
    struct kvs_vm *vm = c->vm;
    for (;;) {
        atomic_store(&c->in_guest, 1);
        if (LIKELY(!atomic_load(&vm->quiesced))) return true;
        leave_guest(c);
        pthread_mutex_lock(&c->wait_lock);
        bool kicked = false;
        while (!kicked && atomic_load(&vm->quiesced)) {
            kicked = (atomic_load(&c->requests) & REQ_KICK) || __atomic_load_n(&c->run->immediate_exit, __ATOMIC_RELAXED);
            if (!kicked) pthread_cond_wait(&c->wait_cond, &c->wait_lock);
        }
        pthread_mutex_unlock(&c->wait_lock);
        if (kicked) {
            atomic_fetch_and(&c->requests, ~(uint32_t)REQ_KICK);
            return false;
        }
    }
}

/* While this vCPU waits for something nobody needs to stop it. */
static void step_outside(struct kvs_vcpu *c)
{
    atomic_store(&c->in_guest, 0);
    if (UNLIKELY(atomic_load(&c->vm->quiesced))) leave_guest(c);
}

/* ---- requests ---- */
static enum verdict handle_requests(struct kvs_vcpu *c)
{
    const uint32_t flushes = REQ_TLB_FLUSH | REQ_W_FLUSH | REQ_CODE_FLUSH | REQ_CODE_DROP;
    uint32_t req = 0;
    for (;;) {
        atomic_store(&c->limit, BLOCK_LIMIT);
        req |= atomic_exchange(&c->requests, 0);
        if (req & REQ_TLB_FLUSH) tlb_flush_all(c);
        if (req & REQ_W_FLUSH) tlb_flush_writes(c);
        if (req & REQ_CODE_FLUSH) block_cache_flush(c);
        if (req & REQ_CODE_DROP) code_drop_pending(c);
        req &= ~flushes;
        if (req & REQ_KICK) {
            req &= ~(uint32_t)REQ_KICK;
            if (req) vcpu_request(c, req);
            return exit_with(c, KVS_EXIT_INTR);
        }
        bool wait = (req & REQ_SYNC) && atomic_load(&c->vm->quiesced);
        req &= ~(uint32_t)REQ_SYNC;
        if (!wait) break;
        leave_guest(c);
        if (!enter_guest(c)) {
            atomic_store(&c->in_guest, 0);
            if (req) vcpu_request(c, req);
            return exit_with(c, KVS_EXIT_INTR);
        }
        /* Whoever stopped this vCPU may have changed slots: the flushes it posted come before any access. */
    }
    if (req & REQ_HOST_TIMER) return exit_with(c, KVS_EXIT_HOST_TIMER);
    if ((req & REQ_EVENT) && (!takes_turns(c) || (has_turn(c) && c->in_slice))) pv_eoi_arrival(c);
    return GO_ON; /* REQ_EVENT: looked at in every turn */
}

/* ---- halt ---- */
static bool wakes(struct kvs_vcpu *c)
{
    if (atomic_load(&c->pv_unhalted)) return true;
    if ((atomic_load(&c->nmi_pending) && !c->nmi_masked) || c->mce_pending) return true;
    return (c->eflags & FLAG_IF) && (c->injected_irq >= 0 || (c->lapic && irqchip_has_interrupt(c)));
}

/* Is MWAIT over? */
static bool mwait_done(struct kvs_vcpu *c)
{
    const struct monitor *m = &c->monitor;
    const uint64_t now = clock_now(c->vm);
    if (wakes(c) || c->rip != m->rip || now >= m->deadline || m->deadline - now > MWAIT_MAX) return true;
    if (m->any_interrupt && (c->injected_irq >= 0 || (c->lapic && irqchip_has_interrupt(c)))) return true;
    return monitor_triggered(c);
}

/* Until a request arrives or, with `turn`, it is this vCPU's turn. */
static enum verdict wait_for_request(struct kvs_vcpu *c, bool turn)
{
    step_outside(c);
    pthread_mutex_lock(&c->wait_lock);
    while (!atomic_load(&c->requests) && !__atomic_load_n(&c->run->immediate_exit, __ATOMIC_RELAXED) &&
           !(turn && has_turn(c)))
        pthread_cond_wait(&c->wait_cond, &c->wait_lock);
    pthread_mutex_unlock(&c->wait_lock);
    return enter_guest(c) ? GO_ON : exit_with(c, KVS_EXIT_INTR);
}

static bool waits_for_sipi(uint32_t mp_state)
{
    return mp_state == KVS_MP_STATE_INIT_RECEIVED || mp_state == KVS_MP_STATE_UNINITIALIZED;
}

/*
 * The signals that would be taken now. SMI and INIT wait for the end of system management mode, SMI and all
 * else for the end of the wait for a SIPI. SDM 3C "SMI Handler Execution Environment", SDM 3A "MP Initialization
 * Protocol Algorithm for MP Systems"
 */
static uint32_t usable_signals(const struct kvs_vcpu *c)
{
    uint32_t s = atomic_load_explicit(&c->signals, memory_order_acquire);
    if (LIKELY(!s)) return 0;
    if (c->in_smm) s &= ~(uint32_t)(SIG_SMI | SIG_INIT);
    if (c->int_shadow || waits_for_sipi(atomic_load(&c->mp_state))) s &= ~(uint32_t)SIG_SMI;
    return s & (SIG_SMI | SIG_INIT | SIG_SIPI);
}

static void take_init(struct kvs_vcpu *c)
{
    vcpu_init_reset(c);
    if (c->lapic) lapic_reset(c, true);
    /* The state before the signal, so that a SIPI finds one of them: vcpu_post_sipi. */
    atomic_store(&c->mp_state, c->id == 0 ? KVS_MP_STATE_RUNNABLE : KVS_MP_STATE_INIT_RECEIVED);
    atomic_fetch_and(&c->signals, ~(uint32_t)SIG_INIT);
}

static void take_sipi(struct kvs_vcpu *c)
{
    uint32_t s = atomic_fetch_and(&c->signals, ~(uint32_t)(SIG_SIPI | SIG_SIPI_VECTOR));
    /* A SIPI behind an INIT that is held back by system management mode is lost, as under KVM. */
    if (!waits_for_sipi(atomic_load(&c->mp_state))) return;
    c->sipi_vector = s >> 8 & 0xff;
    load_segment_real(c, SEG_CS, (uint16_t)(c->sipi_vector << 8));
    c->rip = 0;
    segments_changed(c);
    atomic_store(&c->mp_state, KVS_MP_STATE_RUNNABLE);
}

/* SDM 3A "Priority Among Concurrent Events": SMI, then INIT. */
static void take_signals(struct kvs_vcpu *c, uint32_t usable)
{
    if (usable & SIG_SMI) {
        bool halted = atomic_load(&c->mp_state) == KVS_MP_STATE_HALTED;
        atomic_fetch_and(&c->signals, ~(uint32_t)SIG_SMI);
        smm_enter(c, halted);
        if (halted) atomic_store(&c->mp_state, KVS_MP_STATE_RUNNABLE);
    } else if (usable & SIG_INIT) {
        take_init(c);
    } else {
        take_sipi(c);
    }
}

/* Would that vCPU do something if it had the turn? It waits for it, so its state stands still. */
static bool has_work(struct kvs_vcpu *c)
{
    uint32_t state = atomic_load(&c->mp_state);
    if (c->shut_down) return false;
    if (state == KVS_MP_STATE_RUNNABLE && c->monitor.waiting) return usable_signals(c) || mwait_done(c);
    return state == KVS_MP_STATE_RUNNABLE || usable_signals(c) || (state == KVS_MP_STATE_HALTED && wakes(c));
}

/* Gives the turn to the next vCPU that has work. False: there is none. */
static bool pass_turn(struct kvs_vcpu *c)
{
    struct kvs_vm *vm = c->vm;
    uint32_t count = atomic_load(&vm->vcpu_count);
    clock_set_virtual(vm, vcpu_retired(c) + c->clock_base);
    for (uint32_t k = 1; k < count; k++) {
        struct kvs_vcpu *next = vm->vcpus[(c->id + k) % count];
        if (!next || !has_work(next)) continue;
        c->in_slice = false;
        atomic_store(&vm->turn, next->id);
        pthread_mutex_lock(&next->wait_lock);
        pthread_cond_broadcast(&next->wait_cond);
        pthread_mutex_unlock(&next->wait_lock);
        return true;
    }
    return false;
}

/* The clock goes on from where the last one left it. */
static void start_slice(struct kvs_vcpu *c)
{
    c->clock_base = clock_now(c->vm) - vcpu_retired(c);
    c->slice_end = vcpu_retired(c) + TURN_LENGTH;
    c->in_slice = true;
}

/* Virtual clock, nobody has anything to do: on to the next deadline. False: there is none. */
static bool jump_idle(struct kvs_vcpu *c)
{
    uint64_t deadline = clock_next_deadline(c->vm), now = vcpu_retired(c) + c->clock_base;
    for (uint32_t k = 0; k < atomic_load(&c->vm->vcpu_count); k++) {
        const struct kvs_vcpu *v = c->vm->vcpus[k];
        if (v && v->monitor.waiting) deadline = min_u64(deadline, v->monitor.deadline);
    }
    if (deadline == CLOCK_NEVER) return false;
    if (deadline > now) c->clock_base += deadline - now;
    clock_set_virtual(c->vm, max_u64(deadline, now));
    clock_run_timers(c->vm);
    return true;
}

/* MWAIT: looks at the line, at first soon and then after ever longer pauses. */
#define MWAIT_LOOK_MIN 20000u /* ns */
#define MWAIT_LOOK_MAX 1000000u
static enum verdict mwait(struct kvs_vcpu *c)
{
    c->stats.halts++;
    if (is_virtual_clock(c)) {
        if (!takes_turns(c) || !pass_turn(c)) (void)jump_idle(c);
        return GO_ON;
    }
    uint64_t now = clock_now(c->vm), start = c->monitor.deadline - min_u64(c->monitor.deadline, MWAIT_MAX);
    uint64_t pause = min_u64(max_u64(now > start ? (now - start) / 4 : 0, MWAIT_LOOK_MIN), MWAIT_LOOK_MAX);
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_nsec += (long)pause;
    if (until.tv_nsec >= 1000000000) until.tv_sec++, until.tv_nsec -= 1000000000;
    step_outside(c);
    pthread_mutex_lock(&c->wait_lock);
    if (!atomic_load(&c->requests) && !__atomic_load_n(&c->run->immediate_exit, __ATOMIC_RELAXED))
        pthread_cond_timedwait(&c->wait_cond, &c->wait_lock, &until);
    pthread_mutex_unlock(&c->wait_lock);
    return enter_guest(c) ? GO_ON : exit_with(c, KVS_EXIT_INTR);
}

static enum verdict halted(struct kvs_vcpu *c)
{
    uint32_t state = atomic_load(&c->mp_state);
    pv_eoi_sync(c);
    if (state == KVS_MP_STATE_HALTED && wakes(c)) {
        atomic_store(&c->pv_unhalted, false);
        atomic_store(&c->mp_state, KVS_MP_STATE_RUNNABLE);
        return GO_ON;
    }
    if (!c->lapic && state == KVS_MP_STATE_HALTED) {
        atomic_store(&c->mp_state, KVS_MP_STATE_RUNNABLE);
        return exit_with(c, KVS_EXIT_HLT);
    }
    c->stats.halts++;
    if (is_virtual_clock(c)) {
        if ((takes_turns(c) && pass_turn(c)) || jump_idle(c)) return GO_ON;
    }
    return wait_for_request(c, false);
}

/* ---- events before the next instruction, by priority. SDM 3A "Priority Among Concurrent Events" ---- */
static enum verdict shutdown(struct kvs_vcpu *c)
{
    c->shut_down = true;
    if (takes_turns(c)) (void)pass_turn(c);
    return exit_with(c, KVS_EXIT_SHUTDOWN);
}

static enum verdict events(struct kvs_vcpu *c)
{
    if (c->exc.pending) {
        c->stats.exceptions++;
        if (UNLIKELY(c->triple_fault) || !deliver_exception(c)) {
            c->triple_fault = c->exc.pending = false;
            return shutdown(c);
        }
        if (UNLIKELY(c->exc.pending)) return GO_ON; /* the delivery faulted: once more, with a look at requests */
    }
    if (UNLIKELY(c->mce_pending)) {
        if (!mce_deliver(c)) return shutdown(c);
        if (UNLIKELY(c->exc.pending)) return GO_ON;
    }
    if (c->int_shadow) return GO_ON;
    uint8_t nmis = atomic_load(&c->nmi_pending);
    if (UNLIKELY(nmis) && !c->nmi_masked) {
        atomic_fetch_sub(&c->nmi_pending, 1);
        c->nmi_masked = true;
        if (!deliver_interrupt(c, EXC_NMI)) return shutdown(c);
    } else if (UNLIKELY(nmis > 1)) {
        atomic_store(&c->nmi_pending, 1); /* while one is handled the latch holds one more */
    }
    if (c->eflags & FLAG_IF) {
        int vector = c->injected_irq;
        if (vector < 0 && c->lapic && irqchip_has_interrupt(c)) vector = irqchip_ack(c);
        if (vector >= 0) {
            c->injected_irq = -1;
            c->stats.interrupts++;
            if (UNLIKELY(c->msr_kvm_steal_time & 1)) steal_time_update(c);
            if (!deliver_interrupt(c, (uint8_t)vector)) return shutdown(c);
        } else if (c->run->request_interrupt_window && !c->lapic) {
            return exit_with(c, KVS_EXIT_IRQ_WINDOW_OPEN);
        }
    }
    return GO_ON;
}

/* ---- tracing ---- */
static void trace_record(struct kvs_vcpu *c)
{
    struct kvs_trace_entry *e = &c->trace[(c->trace_head + c->trace_count) % c->trace_size];
    if (c->trace_count == c->trace_size) c->trace_head = (c->trace_head + 1) % c->trace_size;
    else c->trace_count++;
    memset(e, 0, sizeof *e);
    e->retired = vcpu_retired(c);
    e->rip = c->rip;
    e->linear = is_code64(c) ? c->rip : (uint32_t)(c->seg[SEG_CS].base + c->rip);
    memcpy(e->gpr, c->gpr, sizeof e->gpr);
    e->rflags = flags_read(c);
    e->mode = is_code64(c) ? 64 : (c->mode & MODE_SIZE) == MODE_32 ? 32 : 16;
    e->cpl = c->cpl;
    for (uint32_t n = 0; n < sizeof e->bytes; n++) {
        struct translation t;
        uint64_t la = e->linear + n;
        if (!is_code64(c)) la = (uint32_t)la;
        if (mmu_walk(c, la, ACC_X, c->cpl == 3, false, true, &t) != 0) break;
        const uint8_t *host = gpa_to_host(vcpu_slots(c), t.gpa, NULL, NULL);
        if (!host) break;
        e->bytes[n] = *host;
        e->length++;
    }
}

/* ---- budget ---- */
/* Sets c->budget to what may retire before something must be looked at. False: nothing may. */
static enum verdict set_budget(struct kvs_vcpu *c)
{
    uint64_t retired = vcpu_retired(c), n = BUDGET_MAX;
    if (retired >= c->insn_limit) return exit_with(c, KVS_EXIT_INSN_LIMIT);
    n = min_u64(n, c->insn_limit - retired);
    if (is_virtual_clock(c)) {
        uint64_t now = retired + c->clock_base, deadline;
        clock_set_virtual(c->vm, now);
        deadline = clock_next_deadline(c->vm);
        if (deadline <= now) clock_run_timers(c->vm);
        deadline = clock_next_deadline(c->vm);
        if (deadline != CLOCK_NEVER) n = min_u64(n, deadline > now ? deadline - now : 1);
        if (takes_turns(c)) n = min_u64(n, c->slice_end > retired ? c->slice_end - retired : 1);
    }
    c->budget = (int64_t)n;
    c->retired_end = retired + n;
    return GO_ON;
}

/* The host steps this guest: report after each instruction. */
static bool host_steps(const struct kvs_vcpu *c)
{
    return (c->guest_debug.control & (KVS_GUESTDBG_ENABLE | KVS_GUESTDBG_SINGLESTEP)) ==
           (KVS_GUESTDBG_ENABLE | KVS_GUESTDBG_SINGLESTEP);
}

static enum verdict exit_debug(struct kvs_vcpu *c, uint64_t dr6)
{
    struct kvs_debug_exit_arch *a = &c->run->debug.arch;
    memset(a, 0, sizeof *a);
    a->exception = EXC_DB;
    a->pc = (is_code64(c) ? 0 : c->seg[SEG_CS].base) + c->rip;
    a->dr6 = dr6;
    a->dr7 = c->dr7;
    return exit_with(c, KVS_EXIT_DEBUG);
}

/*
 * SDM 3B "Single-Step Exception Condition": what clears TF on its way into a handler is not stepped. After SYSRET
 * the TF that it has loaded decides, see op_sysret.
 */
static bool entered_handler(const struct kvs_vcpu *c, kvs_handler fn)
{
    return !(c->eflags & FLAG_TF) && (fn == op_int_n || fn == op_int3 || fn == op_into || fn == op_int1 || fn == op_syscall ||
                                     fn == op_sysret);
}

static bool is_string(kvs_handler fn)
{
    return fn == op_movs || fn == op_stos || fn == op_lods || fn == op_cmps || fn == op_scas || fn == op_ins || fn == op_outs;
}

/*
 * SDM 3B "Single-Step Exception Condition": a repeated string instruction traps after each iteration.
 * It runs with a count of 1; *more: it goes on at its own RIP and has not retired.
 */
static int step_iteration(struct kvs_vcpu *c, const struct kvs_insn *i, bool *more)
{
    uint32_t asize = INSN_ASIZE(i);
    uint64_t rcx = c->gpr[RCX], count = reg_get(c, RCX, asize);
    *more = false;
    if (count < 2) return i->fn(c, i, 1);
    reg_set(c, RCX, asize, 1);
    int st = i->fn(c, i, 1);
    if (st == ST_FAULT || st == ST_EXIT || st == ST_AGAIN) {
        c->gpr[RCX] = rcx;
        return st;
    }
    reg_set(c, RCX, asize, count - 1);
    bool zf = flags_status(c) & FLAG_ZF, compares = i->fn == op_cmps || i->fn == op_scas;
    if (compares && zf != ((i->flags & INSN_REPE) != 0)) return st;
    *more = true;
    c->rip = insn_rip(c, i);
    c->budget++;
    return st == ST_EXIT_DONE ? ST_EXIT_RIP : ST_LOOKUP;
}

/* One instruction by itself: single-step, breakpoints, interrupt shadow, I/O being completed, tracing. */
static int step(struct kvs_vcpu *c)
{
    uint8_t shadow = c->int_shadow;
    bool tf = c->eflags & FLAG_TF;
    int st;
    c->int_shadow = 0;
    c->eflags &= ~FLAG_RF; /* it was for this instruction */
    struct block *b = block_find(c, 1, &st);
    if (!b) return st;
    if (c->trace) trace_record(c);
    int64_t rest = c->budget - 1;
    c->budget = 1;
    kvs_handler fn = b->insn[0].fn;
    uint64_t next = insn_next_rip(c, b->insn);
    bool more = false;
    if ((tf || host_steps(c)) && b->insn[0].flags & (INSN_REPE | INSN_REPNE) && is_string(fn))
        st = step_iteration(c, b->insn, &more);
    else
        st = fn(c, b->insn, 1);
    c->budget += rest;
    bool done = st != ST_FAULT && st != ST_EXIT && st != ST_AGAIN;
    /* SDM 3B "Instruction-Breakpoint Exception Condition": RF lasts until a repeated instruction is through */
    if ((c->dr7 & 0xff) && (more || st == ST_EXIT || st == ST_AGAIN)) c->eflags |= FLAG_RF;
    if (!done) {
        if (st == ST_EXIT) c->int_shadow = shadow; /* the instruction comes again */
        return st;
    }
    /* SDM 3B "Single-Stepping on Branches": with BTF only what branched traps */
    if (c->msr_debugctl & 2 && (more || c->rip == next)) tf = false;
    /* SDM 3A "Single-Step Exception Condition": TF as it was before, and none under MOV SS. */
    if (tf && c->int_shadow != 1 && !entered_handler(c, fn)) c->pending_dbg |= DR6_BS;
    return st;
}

/* A trap: the RIP is already the next one. */
static void debug_trap(struct kvs_vcpu *c)
{
    uint64_t dr6 = c->pending_dbg;
    if (c->int_shadow == 1) return; /* held back by MOV SS */
    c->pending_dbg = 0;
    /* SDM 2 "HLT": a debug exception ends the halt, be it the trap of the HLT itself */
    uint32_t halted = KVS_MP_STATE_HALTED;
    atomic_compare_exchange_strong(&c->mp_state, &halted, KVS_MP_STATE_RUNNABLE);
    raise_debug(c, dr6);
}

static enum verdict after(struct kvs_vcpu *c, int st)
{
    switch (st) {
    case ST_FAULT:
        iobus_insn_done(c);
        c->write_count = c->write_pos = 0; /* it did not happen, and comes again */
        return GO_ON; /* events() delivers it */
    case ST_EXIT: return EXIT;
    case ST_AGAIN: break;
    case ST_EXIT_DONE: case ST_EXIT_RIP:
        iobus_insn_done(c);
        c->code_modified = 0;
        return EXIT;
    default: break;
    }
    iobus_insn_done(c);
    c->code_modified = 0;
    if (UNLIKELY(c->write_count) && iobus_flush_writes(c)) return EXIT;
    if (UNLIKELY(c->pending_dbg) && st != ST_AGAIN) debug_trap(c);
    return GO_ON;
}

static enum verdict turn(struct kvs_vcpu *c)
{
    bool in_flight = c->replay_count > 0;
    if (LIKELY(!in_flight)) {
        if (UNLIKELY(atomic_load_explicit(&c->limit, memory_order_relaxed) != BLOCK_LIMIT || atomic_load(&c->requests)) &&
            handle_requests(c) == EXIT)
            return EXIT;
        if (UNLIKELY(__atomic_load_n(&c->run->immediate_exit, __ATOMIC_RELAXED))) return exit_with(c, KVS_EXIT_INTR);
        if (UNLIKELY(takes_turns(c))) {
            if (!has_turn(c)) {
                return wait_for_request(c, true);
            }
            if (!c->in_slice) {
                /* For what came meanwhile, at a point that does not depend on when this thread saw it. */
                pv_eoi_arrival(c);
                start_slice(c);
            }
            if (vcpu_retired(c) >= c->slice_end) {
                if (!pass_turn(c)) start_slice(c);
                return GO_ON;
            }
        }
        const uint32_t signals = usable_signals(c);
        if (UNLIKELY(signals) && !c->exc.pending && !c->pending_dbg) {
            take_signals(c, signals);
            return GO_ON;
        }
        if (UNLIKELY(atomic_load(&c->mp_state) != KVS_MP_STATE_RUNNABLE)) return halted(c);
        if (UNLIKELY(c->monitor.waiting)) {
            if (!c->pending_dbg && !c->exc.pending && !mwait_done(c)) return mwait(c);
            c->monitor.waiting = false;
        }
        if (UNLIKELY(c->pending_dbg) && !c->exc.pending) debug_trap(c); /* of an instruction that ended in an exit */
        if (events(c) == EXIT) return EXIT;
        c->code_modified = 0; /* by a frame over code, which is dropped already */
        if (UNLIKELY(c->write_count) && iobus_flush_writes(c)) return EXIT; /* of a frame on a stack that is no memory */
        if (UNLIKELY(c->exc.pending || signals)) return GO_ON; /* what waited for the exception comes now */
    } else {
        tlb_catch_up(c); /* slots may have changed during the exit */
    }
    if (set_budget(c) == EXIT) return EXIT;
    bool host_step = host_steps(c);
    int st;
    if (UNLIKELY(in_flight || c->int_shadow || c->step_next || host_step || c->trace || debug_stepping(c))) {
        if (!in_flight && debug_before(c)) return c->run->exit_reason == KVS_EXIT_DEBUG ? EXIT : GO_ON;
        c->step_next = false;
        st = step(c);
        enum verdict v = after(c, st);
        if (v == GO_ON && host_step && st != ST_AGAIN && c->replay_count == 0) {
            if (c->exc.pending && events(c) == EXIT) return EXIT;
            return exit_debug(c, DR6_BS);
        }
        return v;
    }
    struct block *b = block_find(c, 0, &st);
    if (LIKELY(b != NULL)) {
        if (UNLIKELY(c->budget < b->n)) {
            /* An exact stop falls into this block: run just as much of it. */
            b = block_find(c, (uint32_t)min_u64((uint64_t)c->budget, MAX_INSNS - 1), &st);
            if (!b) return after(c, st);
        }
        c->in_chain = true;
        st = b->insn[0].fn(c, b->insn, c->budget);
        c->in_chain = false;
    }
    return after(c, st);
}

static uint32_t host_mxcsr(void)
{
    uint32_t v;
    __asm__ volatile("stmxcsr %0" : "=m"(v));
    return v;
}

KVS_API int32_t kvs_vcpu_run(struct kvs_vcpu *c)
{
    if (!c) return -KVS_EINVAL;
    if (atomic_exchange(&c->running, 1)) return -KVS_EBUSY;
    c->run->exit_reason = KVS_EXIT_UNKNOWN;
    c->stats.exits++;
    if (!enter_guest(c)) {
        atomic_store(&c->in_guest, 0);
        atomic_fetch_and(&c->requests, ~(uint32_t)REQ_KICK);
        c->run->exit_reason = KVS_EXIT_INTR;
        atomic_store(&c->running, 0);
        return KVS_OK;
    }
    c->saved_host_mxcsr = host_mxcsr();
    uint32_t guest = c->fpu.mxcsr | MXCSR_MASKS;
    __asm__ volatile("ldmxcsr %0" : : "m"(guest));

    if (is_virtual_clock(c) && has_turn(c)) c->clock_base = clock_now(c->vm) - vcpu_retired(c);
    iobus_complete_exit(c);
    enum verdict v = GO_ON;
    if (c->shut_down) v = exit_with(c, KVS_EXIT_SHUTDOWN);
    else if (c->write_count && iobus_flush_writes(c)) v = EXIT;
    while (v == GO_ON) v = turn(c);

    c->fpu.mxcsr = mxcsr_read(c);
    __asm__ volatile("ldmxcsr %0" : : "m"(c->saved_host_mxcsr));
    x87_host_clean();
    report_state(c);
    if (UNLIKELY(atomic_load(&c->vm->quiesced))) leave_guest(c);
    else atomic_store(&c->in_guest, 0);
    /* A quiesce may have begun between the test and the store. */
    if (UNLIKELY(atomic_load(&c->vm->quiesced))) leave_guest(c);
    atomic_store(&c->running, 0);
    return KVS_OK;
}
