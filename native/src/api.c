/* Exported functions that only check their arguments and call inward. vCPU state is in state.c. */
#include <stdlib.h>

#include "clock.h"
#include "interp/interp.h"
#include "irqchip/irqchip.h"

KVS_API int32_t kvs_abi_version(void) { return KVS_ABI_VERSION; }

static const uint32_t abi_sizes[] = {
#define STRUCT(name) sizeof(struct name),
#define FIELD(name, field)
#include "../include/abi.def"
};
static const uint32_t abi_offsets[] = {
#define STRUCT(name)
#define FIELD(name, field) offsetof(struct name, field),
#include "../include/abi.def"
};

KVS_API int32_t kvs_abi_size(uint32_t id) { return id < ARRAY_SIZE(abi_sizes) ? (int32_t)abi_sizes[id] : -KVS_EINVAL; }
KVS_API int32_t kvs_abi_offset(uint32_t id) { return id < ARRAY_SIZE(abi_offsets) ? (int32_t)abi_offsets[id] : -KVS_EINVAL; }

KVS_API const char *kvs_strerror(int32_t result)
{
    static const char *const text[] = {
        [KVS_OK] = "success",
        [KVS_EINVAL] = "an argument is out of range or inconsistent",
        [KVS_ENOMEM] = "the host has no memory or no threads left",
        [KVS_EEXIST] = "it exists already",
        [KVS_ENOENT] = "there is no such object",
        [KVS_EBUSY] = "the object is in use by another thread",
        [KVS_ENOTSUP] = "not supported by this core or this host",
        [KVS_EFAULT] = "the guest address range is not backed by memory",
        [KVS_EOVERLAP] = "the memory slot overlaps another one",
        [KVS_EROFS] = "the memory slot is read-only",
        [KVS_ERANGE] = "the buffer is too small",
        [KVS_ESTATE] = "not a state that the object can be in",
    };
    uint32_t n = result < 0 ? 0u - (uint32_t)result : 0;
    return n < ARRAY_SIZE(text) ? text[n] : "unknown error";
}

KVS_API int32_t kvs_get_supported_cpuid(struct kvs_cpuid_entry2 *entries, uint32_t *count)
{
    if (!count || (*count && !entries)) return -KVS_EINVAL;
    return cpuid_supported(entries, count);
}

KVS_API int32_t kvs_get_msr_index_list(uint32_t *indices, uint32_t *count)
{
    if (!count || (*count && !indices)) return -KVS_EINVAL;
    return msr_index_list(indices, count);
}

/* ---- interrupts ---- */
KVS_API int32_t kvs_irqchip_create(struct kvs_vm *vm)
{
    if (!vm) return -KVS_EINVAL;
    pthread_mutex_lock(&vm->lock);
    int32_t rc = vm->irqchip ? -KVS_EEXIST : atomic_load(&vm->vcpu_count) ? -KVS_EBUSY : irqchip_create(vm);
    pthread_mutex_unlock(&vm->lock);
    return rc;
}

KVS_API int32_t kvs_pit_create(struct kvs_vm *vm)
{
    if (!vm) return -KVS_EINVAL;
    pthread_mutex_lock(&vm->lock);
    int32_t rc = vm->irqchip ? irqchip_create_pit(vm) : -KVS_ENOENT;
    pthread_mutex_unlock(&vm->lock);
    return rc;
}

#define WITH_IRQCHIP(vm, call) (!(vm) ? -KVS_EINVAL : !(vm)->irqchip ? -KVS_ENOENT : (call))
KVS_API int32_t kvs_get_irqchip(struct kvs_vm *vm, struct kvs_irqchip *chip)
{
    return chip ? WITH_IRQCHIP(vm, irqchip_get(vm, chip)) : -KVS_EINVAL;
}
KVS_API int32_t kvs_set_irqchip(struct kvs_vm *vm, const struct kvs_irqchip *chip)
{
    return chip ? WITH_IRQCHIP(vm, irqchip_set(vm, chip)) : -KVS_EINVAL;
}
KVS_API int32_t kvs_get_pit2(struct kvs_vm *vm, struct kvs_pit_state2 *pit)
{
    return pit ? WITH_IRQCHIP(vm, irqchip_get_pit(vm, pit)) : -KVS_EINVAL;
}
KVS_API int32_t kvs_set_pit2(struct kvs_vm *vm, const struct kvs_pit_state2 *pit)
{
    return pit ? WITH_IRQCHIP(vm, irqchip_set_pit(vm, pit)) : -KVS_EINVAL;
}
KVS_API int32_t kvs_irq_line(struct kvs_vm *vm, uint32_t gsi, uint32_t level)
{
    return WITH_IRQCHIP(vm, irqchip_set_line(vm, gsi, level));
}
KVS_API int32_t kvs_signal_msi(struct kvs_vm *vm, const struct kvs_msi *msi)
{
    return msi ? WITH_IRQCHIP(vm, irqchip_send_msi(vm, msi)) : -KVS_EINVAL;
}
KVS_API int32_t kvs_set_gsi_routing(struct kvs_vm *vm, const struct kvs_irq_routing_entry *entries, uint32_t count)
{
    return entries || !count ? WITH_IRQCHIP(vm, irqchip_set_routing(vm, entries, count)) : -KVS_EINVAL;
}

/* ---- clock ---- */
KVS_API uint64_t kvs_clock_now(struct kvs_vm *vm) { return vm ? clock_now(vm) : 0; }
KVS_API int32_t kvs_get_clock(struct kvs_vm *vm, struct kvs_clock_data *clock)
{
    if (!vm || !clock) return -KVS_EINVAL;
    clock_get(vm, clock);
    return KVS_OK;
}
KVS_API int32_t kvs_set_clock(struct kvs_vm *vm, const struct kvs_clock_data *clock)
{
    if (!vm || !clock) return -KVS_EINVAL;
    return clock_set(vm, clock);
}
KVS_API int32_t kvs_clock_pause(struct kvs_vm *vm, uint32_t paused)
{
    if (!vm || paused > 1) return -KVS_EINVAL;
    clock_pause(vm, paused);
    return KVS_OK;
}
KVS_API int32_t kvs_host_timer_arm(struct kvs_vm *vm, uint64_t deadline)
{
    return vm ? host_timer_arm(vm, deadline) : -KVS_EINVAL;
}

/* ---- vCPU control ---- */
KVS_API struct kvs_run *kvs_vcpu_run_block(struct kvs_vcpu *c) { return c ? c->run : NULL; }

KVS_API void kvs_vcpu_kick(struct kvs_vcpu *c)
{
    if (c) vcpu_request(c, REQ_KICK);
}

KVS_API int32_t kvs_vcpu_nmi(struct kvs_vcpu *c)
{
    if (!c) return -KVS_EINVAL;
    vcpu_post_nmi(c);
    return KVS_OK;
}

KVS_API int32_t kvs_vcpu_smi(struct kvs_vcpu *c)
{
    if (!c) return -KVS_EINVAL;
    if (!(c->vm->config.flags & KVS_VM_SMM)) return -KVS_ENOTSUP;
    vcpu_post_smi(c);
    return KVS_OK;
}

/* Takes the vCPU for its owner; every exported function on its state goes through here. */
static bool own(struct kvs_vcpu *c) { return c && !atomic_exchange(&c->running, 1); }
static int32_t disown(struct kvs_vcpu *c, int32_t rc)
{
    atomic_store(&c->running, 0);
    return rc;
}

KVS_API int32_t kvs_vcpu_reset(struct kvs_vcpu *c)
{
    if (!own(c)) return c ? -KVS_EBUSY : -KVS_EINVAL;
    vcpu_reset(c);
    return disown(c, KVS_OK);
}

KVS_API int32_t kvs_vcpu_set_insn_limit(struct kvs_vcpu *c, uint64_t retired)
{
    if (!own(c)) return c ? -KVS_EBUSY : -KVS_EINVAL;
    c->insn_limit = retired;
    return disown(c, KVS_OK);
}

KVS_API int32_t kvs_vcpu_interrupt(struct kvs_vcpu *c, uint32_t vector)
{
    if (vector > 255) return -KVS_EINVAL;
    if (!own(c)) return c ? -KVS_EBUSY : -KVS_EINVAL;
    if (c->lapic) return disown(c, -KVS_ENOTSUP);
    if (c->injected_irq >= 0) return disown(c, -KVS_EEXIST);
    c->injected_irq = (int16_t)vector;
    return disown(c, KVS_OK);
}

KVS_API int32_t kvs_vcpu_get_stats(struct kvs_vcpu *c, struct kvs_vcpu_stats *stats)
{
    if (!c || !stats) return -KVS_EINVAL;
    *stats = c->stats;
    return KVS_OK;
}

KVS_API int32_t kvs_vcpu_set_trace(struct kvs_vcpu *c, uint32_t entries)
{
    if (entries > 1u << 20) return -KVS_EINVAL;
    if (!own(c)) return c ? -KVS_EBUSY : -KVS_EINVAL;
    struct kvs_trace_entry *ring = entries ? calloc(entries, sizeof *ring) : NULL;
    if (entries && !ring) return disown(c, -KVS_ENOMEM);
    free(c->trace);
    c->trace = ring;
    c->trace_size = entries;
    c->trace_head = c->trace_count = 0;
    return disown(c, KVS_OK);
}

KVS_API int32_t kvs_vcpu_read_trace(struct kvs_vcpu *c, struct kvs_trace_entry *entries, uint32_t count)
{
    if (count && !entries) return -KVS_EINVAL;
    if (!own(c)) return c ? -KVS_EBUSY : -KVS_EINVAL;
    uint32_t n = 0;
    for (; n < count && c->trace_count; n++) {
        entries[n] = c->trace[c->trace_head];
        c->trace_head = (c->trace_head + 1) % c->trace_size;
        c->trace_count--;
    }
    return disown(c, (int32_t)n);
}
