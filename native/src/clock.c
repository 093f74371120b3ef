/* The VM's clock, its timers, and the thread that waits for them in real mode. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "clock.h"

#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <time.h>
#if defined(__x86_64__)
#include <cpuid.h>
#include <x86intrin.h>
#endif

#define NS_PER_S 1000000000ull
#define VIRTUAL_EPOCH_S 1577836800ull /* 2020-01-01 00:00:00 UTC: virtual time knows no host date */
#define MAX_WAIT_NS (3600 * NS_PER_S)
#define NO_VCPU_RETRY_NS 1000000u

/* struct kvm_clock_data flags. KVM API "KVM_GET_CLOCK" */
#define CLOCK_DATA_TSC_STABLE 2u
#define CLOCK_DATA_REALTIME 4u
#define CLOCK_DATA_HOST_TSC 8u

__extension__ typedef unsigned __int128 u128;

struct clock {
    bool is_virtual;
    uint32_t tsc_khz;
    /* Read without the lock; seq is odd while the two below change together. */
    _Atomic uint32_t seq;
    _Atomic uint64_t offset; /* host monotonic time minus VM clock */
    _Atomic uint64_t frozen; /* the VM clock while paused; else CLOCK_NEVER */
    _Atomic uint64_t virtual_now;
    _Atomic uint64_t earliest; /* of all deadlines */
    pthread_mutex_t lock;
    pthread_cond_t changed; /* CLOCK_MONOTONIC; a deadline, the pause state or stop changed */
    pthread_cond_t fired;   /* firing became NULL */
    pthread_t thread, firing_thread;
    bool has_thread, stop, paused;
    struct vm_timer *timers, **tail;
    struct vm_timer *firing;
    pthread_mutex_t host_lock; /* before lock: keeps host_timer's two deadlines the same */
    struct vm_timer host_timer;
};

static uint64_t host_ns(clockid_t id)
{
    struct timespec ts;
    clock_gettime(id, &ts);
    return (uint64_t)ts.tv_sec * NS_PER_S + (uint64_t)ts.tv_nsec;
}

/*
 * The host's TSC rate, to the MHz. Ticks are derived from clock_now, never read, so this only
 * has to be a plausible rate, not a precise one.
 */
static uint32_t host_tsc_khz(void)
{
#if defined(__x86_64__)
    unsigned a, b, c, d;
    uint64_t khz = 0;
    /* SDM 2A "CPUID": leaf 15H, TSC / core crystal clock ratio */
    if (__get_cpuid(0x15, &a, &b, &c, &d) && a && b && c)
        khz = (uint64_t)c * b / a / 1000;
    if (khz < 100000 || khz > 20000000) {
        struct timespec pause = { 0, 10000000 };
        uint64_t ns = host_ns(CLOCK_MONOTONIC), tsc = __rdtsc();
        nanosleep(&pause, NULL);
        tsc = __rdtsc() - tsc;
        ns = host_ns(CLOCK_MONOTONIC) - ns;
        khz = ns ? (uint64_t)((u128)tsc * 1000000 / ns) : 0;
    }
    if (khz >= 100000 && khz <= 20000000)
        return (uint32_t)((khz + 500) / 1000 * 1000);
#endif
    return 1000000;
}

static void host_timer_fire(void *owner, uint64_t now);

int clock_create(struct kvs_vm *vm)
{
    struct clock *k = calloc(1, sizeof *k);
    if (!k)
        return -KVS_ENOMEM;
    pthread_condattr_t attr;
    if (pthread_condattr_init(&attr)) {
        free(k);
        return -KVS_ENOMEM;
    }
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(&k->changed, &attr);
    pthread_cond_init(&k->fired, &attr);
    pthread_condattr_destroy(&attr);
    pthread_mutex_init(&k->lock, NULL);
    pthread_mutex_init(&k->host_lock, NULL);
    k->is_virtual = vm->config.clock_mode == KVS_CLOCK_VIRTUAL;
    k->tsc_khz = vm->config.tsc_khz;
    if (!k->tsc_khz)
        k->tsc_khz = k->is_virtual ? 1000000 : host_tsc_khz();
    atomic_init(&k->frozen, CLOCK_NEVER);
    atomic_init(&k->earliest, CLOCK_NEVER);
    atomic_init(&k->offset, host_ns(CLOCK_MONOTONIC));
    k->tail = &k->timers;
    vm->clock = k;
    atomic_store(&vm->host_timer, CLOCK_NEVER);
    k->host_timer.fire = host_timer_fire;
    k->host_timer.owner = vm;
    clock_timer_add(vm, &k->host_timer);
    return KVS_OK;
}

void clock_destroy(struct kvs_vm *vm)
{
    struct clock *k = vm->clock;
    if (!k)
        return;
    pthread_mutex_lock(&k->lock);
    bool join = k->has_thread;
    k->stop = true;
    pthread_cond_broadcast(&k->changed);
    pthread_mutex_unlock(&k->lock);
    if (join)
        pthread_join(k->thread, NULL);
    pthread_cond_destroy(&k->changed);
    pthread_cond_destroy(&k->fired);
    pthread_mutex_destroy(&k->lock);
    pthread_mutex_destroy(&k->host_lock);
    vm->clock = NULL;
    free(k);
}

/* ---- time ---- */

uint64_t clock_now(struct kvs_vm *vm)
{
    struct clock *k = vm->clock;
    if (k->is_virtual)
        return atomic_load_explicit(&k->virtual_now, memory_order_acquire);
    for (;;) {
        uint32_t seq = atomic_load(&k->seq);
        if (seq & 1)
            continue;
        uint64_t now = atomic_load(&k->frozen);
        if (now == CLOCK_NEVER)
            now = host_ns(CLOCK_MONOTONIC) - atomic_load(&k->offset);
        if (LIKELY(atomic_load(&k->seq) == seq))
            return now;
    }
}

static void set_real(struct clock *k, uint64_t frozen, uint64_t offset)
{
    atomic_fetch_add(&k->seq, 1);
    atomic_store(&k->frozen, frozen);
    atomic_store(&k->offset, offset);
    atomic_fetch_add(&k->seq, 1);
}

void clock_pause(struct kvs_vm *vm, bool paused)
{
    struct clock *k = vm->clock;
    pthread_mutex_lock(&k->lock);
    if (paused != k->paused) {
        if (!k->is_virtual) {
            uint64_t now = clock_now(vm);
            if (paused)
                set_real(k, now, atomic_load(&k->offset));
            else
                set_real(k, CLOCK_NEVER, host_ns(CLOCK_MONOTONIC) - now);
        }
        k->paused = paused;
        pthread_cond_broadcast(&k->changed);
    }
    pthread_mutex_unlock(&k->lock);
}

void clock_set_virtual(struct kvs_vm *vm, uint64_t now)
{
    atomic_store_explicit(&vm->clock->virtual_now, now, memory_order_release);
}

uint32_t clock_tsc_khz(struct kvs_vm *vm) { return vm->clock->tsc_khz; }

uint64_t clock_ns_to_tsc(struct kvs_vm *vm, uint64_t ns)
{
    /* ns * khz / 10^6 rounded down, without a wide division: RDTSC comes here */
    uint64_t khz = vm->clock->tsc_khz;
    return ns / 1000000 * khz + ns % 1000000 * khz / 1000000;
}

uint64_t clock_tsc_to_ns(struct kvs_vm *vm, uint64_t tsc)
{
    uint32_t khz = vm->clock->tsc_khz;
    u128 ns = ((u128)tsc * 1000000 + khz - 1) / khz;
    return ns >= CLOCK_NEVER ? CLOCK_NEVER : (uint64_t)ns;
}

uint64_t clock_tsc(struct kvs_vm *vm) { return clock_ns_to_tsc(vm, clock_now(vm)); }

uint64_t clock_realtime(struct kvs_vm *vm)
{
    if (vm->clock->is_virtual)
        return VIRTUAL_EPOCH_S * NS_PER_S + clock_now(vm);
    return host_ns(CLOCK_REALTIME);
}

void clock_get(struct kvs_vm *vm, struct kvs_clock_data *data)
{
    memset(data, 0, sizeof *data);
    data->clock = clock_now(vm);
    data->realtime = clock_realtime(vm);
    data->flags = CLOCK_DATA_TSC_STABLE | CLOCK_DATA_REALTIME;
}

int clock_set(struct kvs_vm *vm, const struct kvs_clock_data *data)
{
    struct clock *k = vm->clock;
    if (data->flags & ~(CLOCK_DATA_TSC_STABLE | CLOCK_DATA_REALTIME | CLOCK_DATA_HOST_TSC))
        return -KVS_EINVAL;
    uint64_t now = data->clock;
    /* The time that passed between saving and loading counts, as in KVM; virtual time has none. */
    if ((data->flags & CLOCK_DATA_REALTIME) && !k->is_virtual) {
        uint64_t real = clock_realtime(vm);
        if (real > data->realtime)
            now += real - data->realtime;
    }
    if (now < data->clock || now > INT64_MAX)
        return -KVS_EINVAL;
    pthread_mutex_lock(&k->lock);
    if (k->is_virtual)
        clock_set_virtual(vm, now);
    else
        set_real(k, k->paused ? now : CLOCK_NEVER, host_ns(CLOCK_MONOTONIC) - now);
    pthread_cond_broadcast(&k->changed);
    pthread_mutex_unlock(&k->lock);
    return KVS_OK;
}

/* ---- timers ---- */

/* Under the lock. The first of equals is the one added first: virtual runs repeat exactly. */
static struct vm_timer *earliest_timer(struct clock *k)
{
    struct vm_timer *first = NULL;
    for (struct vm_timer *t = k->timers; t; t = t->next)
        if (t->deadline != CLOCK_NEVER && (!first || t->deadline < first->deadline))
            first = t;
    atomic_store(&k->earliest, first ? first->deadline : CLOCK_NEVER);
    return first;
}

/* Under the lock, which it gives up while the owner's code runs. */
static void fire_timer(struct kvs_vm *vm, struct vm_timer *t, uint64_t now)
{
    struct clock *k = vm->clock;
    t->deadline = CLOCK_NEVER;
    earliest_timer(k);
    k->firing = t;
    k->firing_thread = pthread_self();
    pthread_mutex_unlock(&k->lock);
    t->fire(t->owner, now);
    pthread_mutex_lock(&k->lock);
    k->firing = NULL;
    pthread_cond_broadcast(&k->fired);
}

static void *timer_thread(void *arg)
{
    struct kvs_vm *vm = arg;
    struct clock *k = vm->clock;
    pthread_mutex_lock(&k->lock);
    while (!k->stop) {
        struct vm_timer *t = k->paused ? NULL : earliest_timer(k);
        if (!t) {
            pthread_cond_wait(&k->changed, &k->lock);
            continue;
        }
        uint64_t now = clock_now(vm);
        if (t->deadline <= now) {
            fire_timer(vm, t, now);
            continue;
        }
        uint64_t until = host_ns(CLOCK_MONOTONIC) + min_u64(t->deadline - now, MAX_WAIT_NS);
        struct timespec ts = { (time_t)(until / NS_PER_S), (long)(until % NS_PER_S) };
        pthread_cond_timedwait(&k->changed, &k->lock, &ts);
    }
    pthread_mutex_unlock(&k->lock);
    return NULL;
}

/* Under the lock. The thread takes no signal: they belong to the process's owner. */
static int start_thread(struct kvs_vm *vm)
{
    struct clock *k = vm->clock;
    if (k->has_thread || k->is_virtual || k->stop)
        return KVS_OK;
    sigset_t all, old;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    int error = pthread_create(&k->thread, NULL, timer_thread, vm);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    k->has_thread = !error;
    return error ? -KVS_ENOMEM : KVS_OK;
}

int clock_start(struct kvs_vm *vm)
{
    pthread_mutex_lock(&vm->clock->lock);
    int result = start_thread(vm);
    pthread_mutex_unlock(&vm->clock->lock);
    return result;
}

void clock_timer_add(struct kvs_vm *vm, struct vm_timer *t)
{
    struct clock *k = vm->clock;
    pthread_mutex_lock(&k->lock);
    t->deadline = CLOCK_NEVER;
    t->next = NULL;
    *k->tail = t;
    k->tail = &t->next;
    pthread_mutex_unlock(&k->lock);
}

void clock_timer_remove(struct kvs_vm *vm, struct vm_timer *t)
{
    struct clock *k = vm->clock;
    if (!k)
        return;
    pthread_mutex_lock(&k->lock);
    for (struct vm_timer **p = &k->timers; *p; p = &(*p)->next) {
        if (*p != t)
            continue;
        *p = t->next;
        if (k->tail == &t->next)
            k->tail = p;
        break;
    }
    t->deadline = CLOCK_NEVER;
    while (k->firing == t && !pthread_equal(k->firing_thread, pthread_self()))
        pthread_cond_wait(&k->fired, &k->lock);
    earliest_timer(k);
    pthread_mutex_unlock(&k->lock);
}

/* Without any VM lock: callers hold a controller's lock. */
static void request_all(struct kvs_vm *vm)
{
    uint32_t count = atomic_load(&vm->vcpu_count);
    for (uint32_t i = 0; i < count && i < MAX_VCPUS; i++)
        if (vm->vcpus[i])
            vcpu_request(vm->vcpus[i], REQ_EVENT);
}

void clock_timer_arm(struct kvs_vm *vm, struct vm_timer *t, uint64_t deadline)
{
    struct clock *k = vm->clock;
    pthread_mutex_lock(&k->lock);
    uint64_t before = atomic_load(&k->earliest);
    t->deadline = deadline;
    earliest_timer(k);
    bool earlier = atomic_load(&k->earliest) < before;
    if (earlier && !k->is_virtual) {
        (void)start_thread(vm); /* clock_start has reported a host without threads */
        pthread_cond_signal(&k->changed);
    }
    pthread_mutex_unlock(&k->lock);
    if (earlier && k->is_virtual)
        request_all(vm);
}

uint64_t clock_next_deadline(struct kvs_vm *vm)
{
    return atomic_load(&vm->clock->earliest);
}

void clock_run_timers(struct kvs_vm *vm)
{
    struct clock *k = vm->clock;
    if (atomic_load(&k->earliest) > clock_now(vm))
        return;
    pthread_mutex_lock(&k->lock);
    uint64_t now = clock_now(vm);
    /* Each owner re-arms to a time after now, so this ends. */
    for (struct vm_timer *t; !k->paused && (t = earliest_timer(k)) && t->deadline <= now;)
        fire_timer(vm, t, now);
    pthread_mutex_unlock(&k->lock);
}

/* ---- the host's timer ---- */

int host_timer_arm(struct kvs_vm *vm, uint64_t deadline)
{
    struct clock *k = vm->clock;
    int result = clock_start(vm);
    if (result)
        return result;
    pthread_mutex_lock(&k->host_lock);
    atomic_store(&vm->host_timer, deadline);
    clock_timer_arm(vm, &k->host_timer, deadline);
    pthread_mutex_unlock(&k->host_lock);
    return KVS_OK;
}

static void host_timer_fire(void *owner, uint64_t now)
{
    struct kvs_vm *vm = owner;
    struct clock *k = vm->clock;
    struct kvs_vcpu *c = NULL;
    pthread_mutex_lock(&k->host_lock);
    if (atomic_load(&vm->host_timer) <= now) {
        c = atomic_load(&vm->vcpu_count) ? vm->vcpus[0] : NULL;
        if (c) {
            atomic_store(&vm->host_timer, CLOCK_NEVER);
        } else {
            /* Nobody is there to exit yet: the deadline stays due. */
            clock_timer_arm(vm, &k->host_timer, now + NO_VCPU_RETRY_NS);
        }
    }
    pthread_mutex_unlock(&k->host_lock);
    if (c)
        vcpu_request(c, REQ_HOST_TIMER);
}
