/* Doorbells: guest writes that wake a host thread without an exit. KVM's ioeventfd. */
#include <errno.h>
#include <stdlib.h>
#include <time.h>

#include "vm.h"

struct kvs_doorbell {
    struct kvs_vm *vm; /* holds a reference: either may go first */
    uint64_t address, datamatch;
    uint32_t length, flags;
    bool detached; /* no guest write rings it; changes with the world stopped, as does the address */
    pthread_mutex_t lock;
    pthread_cond_t cond;
    bool signalled, closed;
};

/* Immutable once published: vCPUs read it without a lock and it is replaced while they are stopped. */
struct doorbells { uint32_t count; struct kvs_doorbell *bell[]; };

static void ring(struct kvs_doorbell *d)
{
    pthread_mutex_lock(&d->lock);
    d->signalled = true;
    pthread_cond_signal(&d->cond);
    pthread_mutex_unlock(&d->lock);
}

static inline uint64_t low_bytes(uint64_t v, uint32_t size) { return size >= 8 ? v : v & (BIT(8 * size) - 1); }

bool doorbell_write(struct kvs_vm *vm, bool is_port, uint64_t addr, uint32_t size, uint64_t value)
{
    const struct doorbells *all = vm->doorbells;
    for (uint32_t n = 0; all && n < all->count; n++) {
        struct kvs_doorbell *d = all->bell[n];
        if (d->address != addr || d->detached || (bool)(d->flags & KVS_DOORBELL_PIO) != is_port) continue;
        if (d->length && d->length != size) continue;
        if ((d->flags & KVS_DOORBELL_DATAMATCH) && low_bytes(d->datamatch, size) != low_bytes(value, size)) continue;
        ring(d);
        return true;
    }
    return false;
}

/* Could one write ring both? */
static bool collide(const struct kvs_doorbell *a, const struct kvs_doorbell *b)
{
    if (a->detached || b->detached || a->address != b->address || ((a->flags ^ b->flags) & KVS_DOORBELL_PIO)) return false;
    if (!a->length || !b->length) return true;
    if (a->length != b->length) return false;
    return !(a->flags & b->flags & KVS_DOORBELL_DATAMATCH) ||
           low_bytes(a->datamatch, a->length) == low_bytes(b->datamatch, b->length);
}

/* With the world stopped. */
static int32_t table_add(struct kvs_vm *vm, struct kvs_doorbell *d)
{
    struct doorbells *old = vm->doorbells;
    uint32_t count = old ? old->count : 0;
    for (uint32_t n = 0; n < count; n++)
        if (collide(old->bell[n], d)) return -KVS_EEXIST;
    struct doorbells *all = malloc(sizeof *all + (count + 1) * sizeof all->bell[0]);
    if (!all) return -KVS_ENOMEM;
    if (count) memcpy(all->bell, old->bell, count * sizeof all->bell[0]);
    all->bell[count] = d;
    all->count = count + 1;
    vm->doorbells = all;
    free(old);
    return KVS_OK;
}

static void table_remove(struct kvs_vm *vm, struct kvs_doorbell *d)
{
    struct doorbells *all = vm->doorbells;
    for (uint32_t n = 0; all && n < all->count; n++) {
        if (all->bell[n] != d) continue;
        all->bell[n] = all->bell[--all->count];
        break;
    }
    if (all && !all->count) {
        vm->doorbells = NULL;
        free(all);
    }
}

static int32_t doorbell_init(struct kvs_doorbell *d)
{
    pthread_condattr_t attr;
    if (pthread_mutex_init(&d->lock, NULL)) return -KVS_ENOMEM;
    if (pthread_condattr_init(&attr)) {
        pthread_mutex_destroy(&d->lock);
        return -KVS_ENOMEM;
    }
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    int bad = pthread_cond_init(&d->cond, &attr);
    pthread_condattr_destroy(&attr);
    if (!bad) return KVS_OK;
    pthread_mutex_destroy(&d->lock);
    return -KVS_ENOMEM;
}

static void doorbell_free(struct kvs_doorbell *d)
{
    pthread_cond_destroy(&d->cond);
    pthread_mutex_destroy(&d->lock);
    free(d);
}

static bool shape_is_valid(uint64_t address, uint32_t length, uint32_t flags)
{
    if (flags & ~(KVS_DOORBELL_DATAMATCH | KVS_DOORBELL_PIO | KVS_DOORBELL_DETACHED)) return false;
    if (length > 8 || (length & (length - 1))) return false;
    if (!length && (flags & KVS_DOORBELL_DATAMATCH)) return false; /* which bytes would have to match? */
    if (address + length < address) return false;
    return !(flags & KVS_DOORBELL_PIO) || (address <= 0xffff && length <= 4);
}

int32_t kvs_doorbell_create(struct kvs_vm *vm, uint64_t address, uint32_t length, uint64_t datamatch,
                            uint32_t flags, struct kvs_doorbell **doorbell)
{
    if (!vm || !doorbell || !shape_is_valid(address, length, flags)) return -KVS_EINVAL;
    struct kvs_doorbell *d = calloc(1, sizeof *d);
    if (!d) return -KVS_ENOMEM;
    *d = (struct kvs_doorbell){ .vm = vm, .address = address, .length = length, .datamatch = datamatch, .flags = flags,
                                .detached = flags & KVS_DOORBELL_DETACHED };
    int32_t st = doorbell_init(d);
    if (st) {
        free(d);
        return st;
    }
    vm_sync_begin(vm, NULL);
    pthread_mutex_lock(&vm->lock);
    st = table_add(vm, d);
    pthread_mutex_unlock(&vm->lock);
    vm_sync_end(vm, NULL);
    if (st) {
        doorbell_free(d);
        return st;
    }
    atomic_fetch_add(&vm->refs, 1);
    *doorbell = d;
    return KVS_OK;
}

int32_t kvs_doorbell_ring(struct kvs_doorbell *d)
{
    if (!d) return -KVS_EINVAL;
    ring(d);
    return KVS_OK;
}

/* With the world stopped. */
static int32_t table_move(struct kvs_doorbell *d, uint64_t address, bool detached)
{
    const struct doorbells *all = d->vm->doorbells;
    struct kvs_doorbell wanted = { .address = address, .length = d->length, .datamatch = d->datamatch,
                                   .flags = d->flags, .detached = detached };
    for (uint32_t n = 0; all && n < all->count; n++)
        if (all->bell[n] != d && collide(all->bell[n], &wanted)) return -KVS_EEXIST;
    d->address = address;
    d->detached = detached;
    return KVS_OK;
}

int32_t kvs_doorbell_move(struct kvs_doorbell *d, uint64_t address, uint32_t attached)
{
    if (!d || !shape_is_valid(address, d->length, d->flags)) return -KVS_EINVAL;
    vm_sync_begin(d->vm, NULL);
    pthread_mutex_lock(&d->vm->lock);
    int32_t st = table_move(d, address, !attached);
    pthread_mutex_unlock(&d->vm->lock);
    vm_sync_end(d->vm, NULL);
    return st;
}

static bool time_after(uint32_t ms, struct timespec *t)
{
    if (clock_gettime(CLOCK_MONOTONIC, t)) return false;
    t->tv_sec += (time_t)(ms / 1000);
    t->tv_nsec += (long)(ms % 1000) * 1000000;
    if (t->tv_nsec >= 1000000000) {
        t->tv_nsec -= 1000000000;
        t->tv_sec++;
    }
    return true;
}

int32_t kvs_doorbell_wait(struct kvs_doorbell *d, int32_t timeout_ms)
{
    struct timespec until;
    if (!d || timeout_ms < -1) return -KVS_EINVAL;
    if (timeout_ms > 0 && !time_after((uint32_t)timeout_ms, &until)) return -KVS_ENOTSUP;
    pthread_mutex_lock(&d->lock);
    bool timed_out = timeout_ms == 0;
    while (!d->signalled && !d->closed && !timed_out) {
        if (timeout_ms < 0) pthread_cond_wait(&d->cond, &d->lock);
        else timed_out = pthread_cond_timedwait(&d->cond, &d->lock, &until) == ETIMEDOUT;
    }
    int32_t st = d->closed ? -KVS_ESTATE : d->signalled;
    d->signalled = false;
    pthread_mutex_unlock(&d->lock);
    return st;
}

void kvs_doorbell_close(struct kvs_doorbell *d)
{
    if (!d) return;
    pthread_mutex_lock(&d->lock);
    d->closed = true;
    pthread_cond_broadcast(&d->cond);
    pthread_mutex_unlock(&d->lock);
}

void kvs_doorbell_destroy(struct kvs_doorbell *d)
{
    if (!d) return;
    struct kvs_vm *vm = d->vm;
    kvs_doorbell_close(d);
    vm_sync_begin(vm, NULL);
    pthread_mutex_lock(&vm->lock);
    table_remove(vm, d);
    pthread_mutex_unlock(&vm->lock);
    vm_sync_end(vm, NULL);
    doorbell_free(d);
    vm_release(vm);
}

/* Each doorbell holds a reference to the VM, so none is left when the VM goes. */
void doorbells_free(struct kvs_vm *vm)
{
    free(vm->doorbells);
    vm->doorbells = NULL;
}
