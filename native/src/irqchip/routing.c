/*
 * GSI routing, MSIs, destinations, and what the rest of the core calls.
 *
 * Locks, outermost first: pit->lock, chip->lock, lapic->lock, clock's host_lock, clock's lock, and
 * last the vCPU's wait_lock inside vcpu_request, which is called under the ones before it. So:
 * nothing that takes a lock of this directory may be called under wait_lock. irqchip_has_interrupt
 * takes none and may. Timer callbacks start with no lock held; two LAPICs are never locked at once.
 */
#include "chips.h"

#include <stdlib.h>

int irqchip_create(struct kvs_vm *vm)
{
    if (vm->irqchip)
        return -KVS_EEXIST;
    /* LAPICs come with their vCPUs: one that exists already would have none. */
    if (atomic_load(&vm->vcpu_count))
        return -KVS_EBUSY;
    int result = clock_start(vm);
    if (result)
        return result;
    struct irqchip *chip = calloc(1, sizeof *chip);
    if (!chip)
        return -KVS_ENOMEM;
    chip->routes = malloc(sizeof *chip->routes);
    if (!chip->routes) {
        free(chip);
        return -KVS_ENOMEM;
    }
    pthread_mutex_init(&chip->lock, NULL);
    chip->vm = vm;
    pic_reset(&chip->pic);
    ioapic_reset(&chip->ioapic);
    memset(chip->routes->first, 0xff, sizeof chip->routes->first);
    vm->irqchip = chip;

    /* PC wiring: GSI 0-15 to both controllers, 0 to pin 2; GSI 2 is the cascade and leads nowhere. */
    struct kvs_irq_routing_entry e[16 + KVS_IOAPIC_PINS];
    uint32_t n = 0;
    memset(e, 0, sizeof e);
    for (uint32_t gsi = 0; gsi < KVS_IOAPIC_PINS; gsi++) {
        if (gsi == 2)
            continue;
        e[n].gsi = gsi;
        e[n].type = KVS_IRQ_ROUTING_IRQCHIP;
        e[n].u.irqchip.irqchip = KVS_IRQCHIP_IOAPIC;
        e[n++].u.irqchip.pin = gsi ? gsi : 2;
        if (gsi >= 16)
            continue;
        e[n].gsi = gsi;
        e[n].type = KVS_IRQ_ROUTING_IRQCHIP;
        e[n].u.irqchip.irqchip = gsi < 8 ? KVS_IRQCHIP_PIC_MASTER : KVS_IRQCHIP_PIC_SLAVE;
        e[n++].u.irqchip.pin = gsi & 7;
    }
    result = irqchip_set_routing(vm, e, n);
    if (result)
        irqchip_destroy(vm);
    return result;
}

int irqchip_create_pit(struct kvs_vm *vm)
{
    if (!vm->irqchip)
        return -KVS_ENOENT;
    if (vm->irqchip->pit)
        return -KVS_EEXIST;
    return pit_create(vm, &vm->irqchip->pit);
}

/* After the vCPUs (and their LAPICs) and before the clock. */
void irqchip_destroy(struct kvs_vm *vm)
{
    struct irqchip *chip = vm->irqchip;
    if (!chip)
        return;
    if (chip->pit)
        pit_destroy(chip->pit);
    vm->irqchip = NULL;
    pthread_mutex_destroy(&chip->lock);
    free(chip->routes);
    free(chip);
}

/* ---- vCPU side ---- */

bool irqchip_has_interrupt(struct kvs_vcpu *c)
{
    struct lapic *l = c->lapic;
    return l && (atomic_load(&l->deliverable) ||
                 (atomic_load(&l->accepts_pic) && atomic_load(&c->vm->irqchip->pic.output)));
}

int irqchip_ack(struct kvs_vcpu *c)
{
    struct lapic *l = c->lapic;
    struct irqchip *chip = c->vm->irqchip;
    int vector = -1;
    if (!l)
        return -1;
    /* ExtINT is not subject to the processor priority. */
    if (atomic_load(&l->accepts_pic) && atomic_load(&chip->pic.output)) {
        pthread_mutex_lock(&chip->lock);
        vector = pic_ack(chip);
        pthread_mutex_unlock(&chip->lock);
    }
    if (vector >= 0)
        return vector;
    pv_eoi_sync(c); /* of the interrupt that this one displaces: there is one offer, and one answer */
    vector = lapic_ack(l);
    if (vector == ACK_EXTINT) {
        pthread_mutex_lock(&chip->lock);
        vector = pic_ack(chip);
        if (vector < 0) /* 8259A data sheet: the request went away before the INTA cycle */
            vector = pic_spurious(chip);
        pthread_mutex_unlock(&chip->lock);
    } else if (UNLIKELY(atomic_load_explicit(&l->pv_eoi, memory_order_relaxed))) {
        pv_eoi_offer(c);
    }
    return vector;
}

/* ---- destinations ---- */

/*
 * Lowest priority: the least busy destination; among equals the vector decides, so that load is
 * spread over vectors and no state is needed. SDM 3A "Lowest Priority Delivery Mode"
 */
static struct lapic *choose_lowest(struct irqchip *chip, const struct apic_message *m)
{
    struct lapic *best[MAX_VCPUS];
    uint32_t count = 0, lowest = UINT32_MAX;
    for (uint32_t i = 0; i < chip->lapic_count; i++) {
        struct lapic *l = chip->lapics[i];
        if (!lapic_match(l, m) || !lapic_takes_fixed(l))
            continue;
        uint32_t priority = lapic_priority(l);
        if (priority < lowest) {
            lowest = priority;
            count = 0;
        }
        if (priority == lowest)
            best[count++] = l;
    }
    return count ? best[m->vector % count] : NULL;
}

int apic_send(struct irqchip *chip, const struct apic_message *m)
{
    int taken = 0, matched = 0;
    if (m->lowest) {
        struct lapic *l = choose_lowest(chip, m);
        return l ? lapic_deliver(l, m) : -1;
    }
    for (uint32_t i = 0; i < chip->lapic_count; i++) {
        if (!lapic_match(chip->lapics[i], m))
            continue;
        matched++;
        taken += lapic_deliver(chip->lapics[i], m);
    }
    return matched ? taken : -1;
}

/* SDM 3A "Message Signalled Interrupts". Under chip->lock. */
static int send_msi(struct irqchip *chip, uint32_t address_lo, uint32_t data)
{
    struct apic_message m = {
        .dest = address_lo >> 12 & 0xff,
        .vector = (uint8_t)data,
        .mode = data >> 8 & 7,
        .logical = address_lo >> 2 & 1,
        .level = data >> 15 & 1,
    };
    bool redirect = address_lo >> 3 & 1;
    /* Elsewhere it would be a write to memory, not a message. */
    if (address_lo >> 20 != 0xfee || m.mode == DELIVER_RESERVED || m.mode == DELIVER_SIPI)
        return -1;
    m.lowest = m.mode == DELIVER_LOWEST || (m.mode == DELIVER_FIXED && redirect && m.logical);
    return apic_send(chip, &m);
}

int irqchip_send_msi(struct kvs_vm *vm, const struct kvs_msi *msi)
{
    struct irqchip *chip = vm->irqchip;
    if (!chip)
        return -KVS_ENOENT;
    if (msi->flags & ~1u) /* KVM_MSI_VALID_DEVID: the device id is not needed here */
        return -KVS_EINVAL;
    pthread_mutex_lock(&chip->lock);
    int taken = send_msi(chip, msi->address_lo, msi->data);
    pthread_mutex_unlock(&chip->lock);
    return taken > 0 ? taken : 0;
}

/* ---- hypercalls ---- */

uint32_t irqchip_send_ipi(struct kvs_vm *vm, uint64_t set, uint32_t first, uint32_t icr)
{
    struct irqchip *chip = vm->irqchip;
    struct apic_message m = { .vector = (uint8_t)icr, .mode = icr >> 8 & 7 };
    uint32_t taken = 0;
    if (!chip || m.mode == DELIVER_RESERVED || m.mode == DELIVER_EXTINT)
        return 0;
    pthread_mutex_lock(&chip->lock);
    for (uint32_t i = 0; set && i < chip->lapic_count; i++) {
        uint32_t n = atomic_load(&chip->lapics[i]->dest) - first; /* IDs below the first become large */
        if (n < 64 && set >> n & 1)
            taken += (uint32_t)lapic_deliver(chip->lapics[i], &m);
    }
    pthread_mutex_unlock(&chip->lock);
    return taken;
}

void irqchip_unhalt(struct kvs_vm *vm, uint32_t apic_id)
{
    struct irqchip *chip = vm->irqchip;
    if (!chip)
        return;
    pthread_mutex_lock(&chip->lock);
    for (uint32_t i = 0; i < chip->lapic_count; i++) {
        if (atomic_load(&chip->lapics[i]->dest) != apic_id)
            continue;
        atomic_store(&chip->lapics[i]->vcpu->pv_unhalted, true);
        vcpu_request(chip->lapics[i]->vcpu, REQ_EVENT);
    }
    pthread_mutex_unlock(&chip->lock);
}

/* ---- lines ---- */

int irqchip_set_line(struct kvs_vm *vm, uint32_t gsi, uint32_t level)
{
    struct irqchip *chip = vm->irqchip;
    if (!chip)
        return -KVS_ENOENT;
    if (gsi >= MAX_GSI)
        return -KVS_EINVAL;
    pthread_mutex_lock(&chip->lock);
    struct routes *r = chip->routes;
    for (uint32_t i = r->first[gsi]; i != NO_ROUTE; i = r->next[i]) {
        const struct kvs_irq_routing_entry *e = &r->entry[i];
        if (e->type == KVS_IRQ_ROUTING_MSI) {
            if (level)
                (void)send_msi(chip, e->u.msi.address_lo, e->u.msi.data);
        } else if (e->u.irqchip.irqchip == KVS_IRQCHIP_IOAPIC) {
            ioapic_set_line(chip, e->u.irqchip.pin, level != 0);
        } else {
            pic_set_line(chip, e->u.irqchip.irqchip * 8 + e->u.irqchip.pin, level != 0);
        }
    }
    pthread_mutex_unlock(&chip->lock);
    return KVS_OK;
}

static bool route_is_valid(const struct kvs_irq_routing_entry *e)
{
    if (e->gsi >= MAX_GSI)
        return false;
    if (e->type == KVS_IRQ_ROUTING_MSI)
        return !(e->flags & ~1u);
    return e->type == KVS_IRQ_ROUTING_IRQCHIP && !e->flags && e->u.irqchip.irqchip <= KVS_IRQCHIP_IOAPIC &&
           e->u.irqchip.pin < (e->u.irqchip.irqchip == KVS_IRQCHIP_IOAPIC ? KVS_IOAPIC_PINS : 8u);
}

int irqchip_set_routing(struct kvs_vm *vm, const struct kvs_irq_routing_entry *e, uint32_t n)
{
    struct irqchip *chip = vm->irqchip;
    if (!chip)
        return -KVS_ENOENT;
    if (n > MAX_ROUTES || (n && !e))
        return -KVS_EINVAL;
    struct routes *r = malloc(sizeof *r);
    if (!r)
        return -KVS_ENOMEM;
    memset(r->first, 0xff, sizeof r->first);
    for (uint32_t i = n; i-- > 0;) { /* backwards, so that each GSI's list is in the given order */
        r->entry[i] = e[i];
        if (!route_is_valid(&r->entry[i])) {
            free(r);
            return -KVS_EINVAL;
        }
        r->next[i] = r->first[e[i].gsi];
        r->first[e[i].gsi] = (uint16_t)i;
    }
    pthread_mutex_lock(&chip->lock);
    struct routes *old = chip->routes;
    chip->routes = r;
    pthread_mutex_unlock(&chip->lock);
    free(old);
    return KVS_OK;
}

/* ---- state ---- */

int irqchip_get(struct kvs_vm *vm, struct kvs_irqchip *out)
{
    struct irqchip *chip = vm->irqchip;
    if (!chip)
        return -KVS_ENOENT;
    if (out->chip_id > KVS_IRQCHIP_IOAPIC)
        return -KVS_EINVAL;
    memset(&out->chip, 0, sizeof out->chip);
    pthread_mutex_lock(&chip->lock);
    if (out->chip_id == KVS_IRQCHIP_IOAPIC)
        ioapic_get_state(&chip->ioapic, &out->chip.ioapic);
    else
        out->chip.pic = chip->pic.chip[out->chip_id];
    pthread_mutex_unlock(&chip->lock);
    return KVS_OK;
}

int irqchip_set(struct kvs_vm *vm, const struct kvs_irqchip *in)
{
    struct irqchip *chip = vm->irqchip;
    if (!chip)
        return -KVS_ENOENT;
    if (in->chip_id > KVS_IRQCHIP_IOAPIC)
        return -KVS_EINVAL;
    pthread_mutex_lock(&chip->lock);
    int result = in->chip_id == KVS_IRQCHIP_IOAPIC ? ioapic_set_state(chip, &in->chip.ioapic)
                                                   : pic_set_state(chip, in->chip_id, &in->chip.pic);
    pthread_mutex_unlock(&chip->lock);
    return result;
}

int irqchip_get_pit(struct kvs_vm *vm, struct kvs_pit_state2 *pit)
{
    if (!vm->irqchip || !vm->irqchip->pit)
        return -KVS_ENOENT;
    pit_get_state(vm->irqchip->pit, pit);
    return KVS_OK;
}

int irqchip_set_pit(struct kvs_vm *vm, const struct kvs_pit_state2 *pit)
{
    if (!vm->irqchip || !vm->irqchip->pit)
        return -KVS_ENOENT;
    return pit_set_state(vm->irqchip->pit, pit);
}

/* ---- ports: byte devices, so a wider access is one per byte ---- */

static bool claims(struct irqchip *chip, uint16_t port, uint32_t size)
{
    if (!chip || size > 4)
        return false;
    for (uint32_t i = 0; i < size; i++) {
        uint32_t p = port + i;
        if (p > 0xffff || !(pic_claims((uint16_t)p) || (chip->pit && pit_claims((uint16_t)p))))
            return false;
    }
    return true;
}

bool irqchip_port_read(struct kvs_vcpu *c, uint16_t port, uint32_t size, uint32_t *value)
{
    struct irqchip *chip = c->vm->irqchip;
    if (!claims(chip, port, size))
        return false;
    *value = 0;
    for (uint32_t i = 0; i < size; i++) {
        uint16_t p = (uint16_t)(port + i);
        uint32_t byte;
        if (pic_claims(p)) {
            pthread_mutex_lock(&chip->lock);
            byte = pic_port_read(chip, p);
            pthread_mutex_unlock(&chip->lock);
        } else {
            byte = pit_port_read(chip->pit, p);
        }
        *value |= byte << (8 * i);
    }
    return true;
}

bool irqchip_port_write(struct kvs_vcpu *c, uint16_t port, uint32_t size, uint32_t value)
{
    struct irqchip *chip = c->vm->irqchip;
    if (!claims(chip, port, size))
        return false;
    for (uint32_t i = 0; i < size; i++) {
        uint16_t p = (uint16_t)(port + i);
        uint8_t byte = (uint8_t)(value >> (8 * i));
        if (pic_claims(p)) {
            pthread_mutex_lock(&chip->lock);
            pic_port_write(chip, p, byte);
            pthread_mutex_unlock(&chip->lock);
        } else {
            pit_port_write(chip->pit, p, byte);
        }
    }
    return true;
}
