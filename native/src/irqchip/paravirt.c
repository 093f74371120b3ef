/*
 * What a KVM guest shares with its hypervisor beside the clock: steal time, and the flag by which it
 * ends an interrupt without an exit. KVM documentation "KVM-specific MSRs"
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <fcntl.h>
#include <stdlib.h>
#include <unistd.h>

#include "../mmu/mmu.h"
#include "../sys/sys.h"
#include "chips.h"

/* ---- steal time ---- */

struct steal_time { uint64_t steal; uint32_t version, flags; uint8_t preempted, pad8[3]; uint32_t pad[11]; };
_Static_assert(sizeof(struct steal_time) == 64, "KVM's layout");

#define STEAL_UPDATE_NS 1000000u
#define SCHEDSTAT "/proc/thread-self/schedstat"

bool steal_time_available(void) { return access(SCHEDSTAT, R_OK) == 0; }

/* How long this thread was runnable but not running, in ns. Linux "Scheduler Statistics" */
static bool run_delay(struct kvs_vcpu *c, uint64_t *ns)
{
    struct steal *s = &c->steal;
    char text[96];
    pid_t thread = gettid();
    if (s->thread != thread) {
        if (s->thread)
            close(s->fd);
        s->thread = 0;
        s->fd = open(SCHEDSTAT, O_RDONLY | O_CLOEXEC);
        if (s->fd < 0)
            return false;
        s->thread = thread;
        s->counts = false;
    }
    ssize_t n = pread(s->fd, text, sizeof text - 1, 0);
    if (n <= 0) { /* of a thread that has ended: another one got its number */
        steal_time_close(c);
        return false;
    }
    text[n] = 0;
    char *second = strchr(text, ' ');
    if (!second)
        return false;
    *ns = strtoull(second, NULL, 10);
    return true;
}

/* Odd while the rest changes. What the guest has written there counts on, as it does after a migration. */
static void publish(struct kvs_vcpu *c, uint64_t more)
{
    uint64_t gpa = c->msr_kvm_steal_time & ~(uint64_t)(STEAL_RESERVED | 1);
    struct steal_time t;
    if (vm_mem_read(c->vm, gpa, &t, sizeof t))
        return;
    t.version = (t.version | 1) + (t.version & 1 ? 2 : 0);
    if (vm_mem_write(c->vm, gpa + offsetof(struct steal_time, version), &t.version, 4))
        return;
    atomic_thread_fence(memory_order_seq_cst);
    t.steal += more;
    t.version++;
    (void)vm_mem_write(c->vm, gpa, &t.steal, 8);
    (void)vm_mem_write(c->vm, gpa + offsetof(struct steal_time, flags), &(uint8_t[5]){ 0 }, 5); /* flags, preempted */
    atomic_thread_fence(memory_order_seq_cst);
    (void)vm_mem_write(c->vm, gpa + offsetof(struct steal_time, version), &t.version, 4);
}

/* Nothing is stolen from a machine whose time is its instructions. */
void steal_time_enable(struct kvs_vcpu *c)
{
    uint64_t ns;
    c->steal.counts = false;
    if (!(c->msr_kvm_steal_time & 1))
        return;
    if (c->vm->config.clock_mode == KVS_CLOCK_REAL && run_delay(c, &ns)) {
        c->steal.counts = true;
        c->steal.seen = ns;
        c->steal.updated = clock_now(c->vm);
    }
    publish(c, 0);
}

void steal_time_update(struct kvs_vcpu *c)
{
    struct steal *s = &c->steal;
    uint64_t ns, now = clock_now(c->vm);
    if (c->vm->config.clock_mode != KVS_CLOCK_REAL || now - s->updated < STEAL_UPDATE_NS)
        return;
    s->updated = now;
    if (!run_delay(c, &ns))
        return;
    uint64_t more = s->counts && ns > s->seen ? ns - s->seen : 0;
    s->seen = ns;
    s->counts = true;
    if (more)
        publish(c, more);
}

void steal_time_close(struct kvs_vcpu *c)
{
    if (c->steal.thread)
        close(c->steal.fd);
    c->steal.thread = 0;
}

/* ---- end of interrupt through memory ---- */

/*
 * With the acknowledge of an edge that has nothing pending behind it, bit 0 of the guest's word is set;
 * the guest clears it instead of writing to EOI. It is looked at when it matters: before the guest reaches
 * a LAPIC register, before it halts, and when another interrupt arrives, which takes the offer back. So
 * neither exits nor a save change what the guest sees.
 */
static uint64_t pv_eoi_word(const struct kvs_vcpu *c) { return c->msr_kvm_pv_eoi & ~3ull; }

void pv_eoi_offer(struct kvs_vcpu *c)
{
    uint8_t flags;
    if (vm_mem_read(c->vm, pv_eoi_word(c), &flags, 1) == 0) {
        flags |= 1;
        if (vm_mem_write(c->vm, pv_eoi_word(c), &flags, 1) == 0)
            return;
    }
    atomic_store(&c->lapic->pv_eoi, false);
}

void pv_eoi_sync(struct kvs_vcpu *c)
{
    uint8_t flags;
    struct lapic *l = c->lapic;
    if (LIKELY(!l || !atomic_load_explicit(&l->pv_eoi, memory_order_relaxed)))
        return;
    atomic_store(&l->pv_eoi, false);
    if (vm_mem_read(c->vm, pv_eoi_word(c), &flags, 1))
        return;
    if (flags & 1) {
        flags &= 0xfe;
        (void)vm_mem_write(c->vm, pv_eoi_word(c), &flags, 1);
    } else {
        lapic_end_interrupt(l);
    }
}

/* A request of any other kind, such as those after a state was loaded, leaves the offer as it is. */
void pv_eoi_arrival(struct kvs_vcpu *c)
{
    struct lapic *l = c->lapic;
    if (UNLIKELY(l && atomic_load_explicit(&l->pv_eoi, memory_order_relaxed)) && lapic_requested(l))
        pv_eoi_sync(c);
}

int pv_eoi_enable(struct kvs_vcpu *c, uint64_t value, bool host)
{
    uint8_t flags;
    if (!host) {
        pv_eoi_sync(c);
        if ((value & 1) && vm_mem_read(c->vm, value & ~3ull, &flags, 1))
            return -1;
    }
    c->msr_kvm_pv_eoi = value;
    return 0;
}
