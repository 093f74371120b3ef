/* The VM object, its lifetime, and stopping the world. */
#include <stdlib.h>

#include "clock.h"
#include "irqchip/irqchip.h"
#include "mmu/mmu.h"

KVS_API int32_t kvs_vm_create(const struct kvs_vm_config *config, struct kvs_vm **out)
{
    if (!config || !out || config->size != sizeof *config || config->clock_mode > KVS_CLOCK_VIRTUAL || (config->flags & ~KVS_VM_SMM) ||
        config->engine > KVS_ENGINE_JIT ||
        config->tsc_khz > 100000000u)
        return -KVS_EINVAL;
    struct kvs_vm *vm = calloc(1, sizeof *vm);
    if (!vm) return -KVS_ENOMEM;
    vm->config = *config;
    if (vm->config.clock_mode == KVS_CLOCK_VIRTUAL && vm->config.tsc_khz == 0) vm->config.tsc_khz = 1000000;
    atomic_store(&vm->refs, 1);
    atomic_store(&vm->a20_mask, ~0ull);
    pthread_mutex_init(&vm->lock, NULL);
    pthread_mutex_init(&vm->sync_lock, NULL);
    pthread_mutex_init(&vm->drop_lock, NULL);
    pthread_cond_init(&vm->sync_cond, NULL);
    int rc = clock_create(vm);
    if (rc != KVS_OK) {
        vm_release(vm);
        return rc;
    }
    *out = vm;
    return KVS_OK;
}

static void vm_free(struct kvs_vm *vm)
{
    for (uint32_t n = 0; n < MAX_VCPUS; n++)
        if (vm->vcpus[n]) vcpu_free(vm->vcpus[n]);
    if (vm->clock) clock_destroy(vm);
    if (vm->irqchip) irqchip_destroy(vm);
    memslots_free(vm);
    pthread_cond_destroy(&vm->sync_cond);
    pthread_mutex_destroy(&vm->drop_lock);
    pthread_mutex_destroy(&vm->sync_lock);
    pthread_mutex_destroy(&vm->lock);
    free(vm);
}

void vm_release(struct kvs_vm *vm)
{
    if (atomic_fetch_sub(&vm->refs, 1) == 1) vm_free(vm);
}

KVS_API void kvs_vm_destroy(struct kvs_vm *vm)
{
    if (!vm) return;
    vm_release(vm);
}

KVS_API int32_t kvs_vcpu_create(struct kvs_vm *vm, uint32_t id, struct kvs_vcpu **out)
{
    if (!vm || !out || id >= MAX_VCPUS) return -KVS_EINVAL;
    vm_sync_begin(vm, NULL); /* a single vCPU does without stopping the others: none may come while it relies on that */
    pthread_mutex_lock(&vm->lock);
    int rc = vm->vcpus[id] ? -KVS_EEXIST : id > atomic_load(&vm->vcpu_count) ? -KVS_EINVAL : vcpu_create(vm, id, out);
    if (rc == KVS_OK) {
        atomic_fetch_add(&vm->refs, 1);
        vm->vcpus[id] = *out;
        if (id >= atomic_load(&vm->vcpu_count)) atomic_store(&vm->vcpu_count, id + 1);
    }
    pthread_mutex_unlock(&vm->lock);
    vm_sync_end(vm, NULL);
    return rc;
}

KVS_API int32_t kvs_vcpu_destroy(struct kvs_vcpu *c)
{
    if (!c) return -KVS_EINVAL;
    if (atomic_exchange(&c->running, 1)) return -KVS_EBUSY;
    /* Other vCPUs, lines and timers may still post to it: it stops being run (running stays set), and
     * its memory goes with the VM. */
    if (c->lapic) lapic_reset(c, false);
    vm_release(c->vm);
    return KVS_OK;
}

void vm_request_all(struct kvs_vm *vm, uint32_t req)
{
    for (uint32_t n = 0; n < atomic_load(&vm->vcpu_count); n++)
        if (vm->vcpus[n]) vcpu_request(vm->vcpus[n], req);
}

static bool someone_inside(struct kvs_vm *vm, const struct kvs_vcpu *self)
{
    for (uint32_t n = 0; n < atomic_load(&vm->vcpu_count); n++)
        if (vm->vcpus[n] && vm->vcpus[n] != self && atomic_load(&vm->vcpus[n]->in_guest)) return true;
    return false;
}

void vm_sync_begin(struct kvs_vm *vm, struct kvs_vcpu *self)
{
    /* With one vCPU its own thread has the machine to itself. */
    if (self && atomic_load(&vm->vcpu_count) <= 1) return;
    const void *me = self ? (const void *)self : vm;
    pthread_mutex_lock(&vm->sync_lock);
    if (self) {
        atomic_store(&self->in_guest, 0);
        pthread_cond_broadcast(&vm->sync_cond);
    }
    while (vm->sync_owner && !(me == vm && vm->sync_owner == vm)) pthread_cond_wait(&vm->sync_cond, &vm->sync_lock);
    vm->sync_owner = me;
    vm->sync_depth++;
    atomic_fetch_add(&vm->quiesced, 1);
    for (uint32_t n = 0; n < atomic_load(&vm->vcpu_count); n++)
        if (vm->vcpus[n] && vm->vcpus[n] != self) vcpu_request(vm->vcpus[n], REQ_SYNC);
    while (someone_inside(vm, self)) pthread_cond_wait(&vm->sync_cond, &vm->sync_lock);
    pthread_mutex_unlock(&vm->sync_lock);
}

void vm_sync_end(struct kvs_vm *vm, struct kvs_vcpu *self)
{
    pthread_mutex_lock(&vm->sync_lock);
    bool mine = vm->sync_owner == (self ? (const void *)self : vm);
    if (mine) {
        if (self) atomic_store(&self->in_guest, 1);
        if (--vm->sync_depth == 0) vm->sync_owner = NULL;
        atomic_fetch_sub(&vm->quiesced, 1);
        pthread_cond_broadcast(&vm->sync_cond);
    }
    pthread_mutex_unlock(&vm->sync_lock);
    for (uint32_t n = 0; mine && n < atomic_load(&vm->vcpu_count); n++) {
        struct kvs_vcpu *c = vm->vcpus[n];
        if (!c || c == self) continue;
        pthread_mutex_lock(&c->wait_lock);
        pthread_cond_broadcast(&c->wait_cond);
        pthread_mutex_unlock(&c->wait_lock);
    }
}

#define A20_MASKED (~BIT(20))

KVS_API int32_t kvs_vm_set_a20(struct kvs_vm *vm, uint32_t enabled)
{
    if (!vm || enabled > 1) return -KVS_EINVAL;
    uint64_t mask = enabled ? ~0ull : A20_MASKED;
    vm_sync_begin(vm, NULL);
    /* No processor sees half of it: all stand still, and their translations go. */
    if (atomic_exchange(&vm->a20_mask, mask) != mask) vm_request_all(vm, REQ_TLB_FLUSH);
    vm_sync_end(vm, NULL);
    return KVS_OK;
}

KVS_API int32_t kvs_vm_get_a20(struct kvs_vm *vm, uint32_t *enabled)
{
    if (!vm || !enabled) return -KVS_EINVAL;
    *enabled = atomic_load(&vm->a20_mask) == ~0ull;
    return KVS_OK;
}

KVS_API int32_t kvs_vm_quiesce(struct kvs_vm *vm)
{
    if (!vm) return -KVS_EINVAL;
    vm_sync_begin(vm, NULL);
    return KVS_OK;
}

KVS_API int32_t kvs_vm_resume(struct kvs_vm *vm)
{
    if (!vm) return -KVS_EINVAL;
    pthread_mutex_lock(&vm->sync_lock);
    bool held = vm->sync_owner == vm;
    pthread_mutex_unlock(&vm->sync_lock);
    if (!held) return -KVS_ESTATE;
    vm_sync_end(vm, NULL);
    return KVS_OK;
}
