/*
 * The one clock of a VM, in ns, and the timers that hang on it.
 *
 * Real mode: host monotonic time minus the time spent paused; one thread per VM waits for the
 * earliest deadline. Virtual mode: the clock is what the running vCPU has retired (1 instruction =
 * 1 ns) plus the idle time jumped over; nobody waits, the run loop clips its instruction budget to
 * clock_next_deadline and calls clock_run_timers.
 */
#ifndef KVS_CLOCK_H
#define KVS_CLOCK_H

#include "vm.h"

#define CLOCK_NEVER UINT64_MAX

/* Embedded in its owner. Fires on the timer thread (real) or the vCPU thread (virtual), unlocked. */
struct vm_timer {
    uint64_t deadline; /* CLOCK_NEVER: not armed */
    void (*fire)(void *owner, uint64_t now);
    void *owner;
    struct vm_timer *next;
};

int clock_create(struct kvs_vm *vm);
void clock_destroy(struct kvs_vm *vm); /* stops the timer thread */
uint64_t clock_now(struct kvs_vm *vm);
void clock_pause(struct kvs_vm *vm, bool paused);
uint64_t clock_tsc(struct kvs_vm *vm);      /* TSC ticks of clock_now: exact, no overflow for centuries */
uint64_t clock_ns_to_tsc(struct kvs_vm *vm, uint64_t ns);
uint64_t clock_tsc_to_ns(struct kvs_vm *vm, uint64_t tsc); /* rounded up */
void clock_timer_add(struct kvs_vm *vm, struct vm_timer *t); /* once, at creation */
/* Also waits for a running fire(): hold no lock that fire() takes. */
void clock_timer_remove(struct kvs_vm *vm, struct vm_timer *t);
/*
 * Any thread, from fire() too. fire() may still run once for the old deadline, so it compares its
 * owner's own deadline, under the owner's lock, with now. Virtual mode: when the earliest deadline
 * moves forward, every vCPU gets REQ_EVENT so that the run loop clips its budget again.
 */
void clock_timer_arm(struct kvs_vm *vm, struct vm_timer *t, uint64_t deadline);
/* virtual mode: */
uint64_t clock_next_deadline(struct kvs_vm *vm);
void clock_set_virtual(struct kvs_vm *vm, uint64_t now); /* by the run loop: retired + idle */
void clock_run_timers(struct kvs_vm *vm);                /* fires what is due */
/* The guest TSC's rate in kHz; never 0. */
uint32_t clock_tsc_khz(struct kvs_vm *vm);
/* Real mode: starts the timer thread now, so that a host without threads is told early. */
int clock_start(struct kvs_vm *vm);
/*
 * kvs_get_clock, kvs_set_clock. Setting moves the VM clock itself, and with it every TSC; armed
 * deadlines stay where they are on that clock. Restore it before LAPIC, PIT and MSR state.
 */
void clock_get(struct kvs_vm *vm, struct kvs_clock_data *data);
int clock_set(struct kvs_vm *vm, const struct kvs_clock_data *data);
/* kvs_host_timer_arm: vCPU 0 gets REQ_HOST_TIMER at deadline. Any thread. */
int host_timer_arm(struct kvs_vm *vm, uint64_t deadline);
/* Host wall-clock time (real), or 2020-01-01 UTC plus the VM clock (virtual), in ns since 1970. */
uint64_t clock_realtime(struct kvs_vm *vm);

/* kvmclock: writes the guest's pvclock structures. KVM "KVM-specific MSRs" */
void kvmclock_write_system_time(struct kvs_vcpu *c, uint64_t value);
void kvmclock_write_wall_clock(struct kvs_vcpu *c, uint64_t value);
/* After c->tsc_offset has changed: the TSC-to-time line in guest memory follows. */
void kvmclock_update(struct kvs_vcpu *c);

#endif
