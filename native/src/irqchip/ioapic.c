/*
 * The I/O APIC: 24 pins. Intel 82093AA data sheet; all but the MMIO entries run under chip->lock.
 * Version 0x20 is that of the I/O Controller Hubs, which added the EOI register: software that
 * suppresses the broadcast of the local APICs' EOIs needs it. ICH9 data sheet "EOI Register".
 * Lines are given as asserted or not, so that polarity is stored but does not matter, as in KVM.
 */
#include "chips.h"

#define IOAPIC_BASE 0xfec00000u
#define IOAPIC_VERSION 0x20u

#define REDIR_LOGICAL 0x800u
#define REDIR_REMOTE_IRR 0x4000u
#define REDIR_LEVEL 0x8000u
#define REDIR_MASKED 0x10000u
/* Vector, modes, polarity, trigger, mask and destination; the rest is read-only or reserved. */
#define REDIR_WRITABLE 0xff0000000001afffull

void ioapic_reset(struct ioapic *io)
{
    io->select = io->id = io->lines = 0;
    atomic_store(&io->base, IOAPIC_BASE);
    for (uint32_t i = 0; i < KVS_IOAPIC_PINS; i++)
        io->redir[i] = REDIR_MASKED;
}

static void service(struct irqchip *chip, uint32_t pin)
{
    uint64_t *e = &chip->ioapic.redir[pin];
    struct apic_message m = {
        .dest = (uint32_t)(*e >> 56),
        .vector = (uint8_t)*e,
        .mode = (*e >> 8) & 7,
        .logical = *e & REDIR_LOGICAL,
    };
    if ((*e & (REDIR_MASKED | REDIR_REMOTE_IRR)) || m.mode == DELIVER_RESERVED || m.mode == DELIVER_SIPI)
        return;
    m.lowest = m.mode == DELIVER_LOWEST;
    m.level = (*e & REDIR_LEVEL) && m.mode <= DELIVER_LOWEST;
    if (apic_send(chip, &m) > 0 && m.level)
        *e |= REDIR_REMOTE_IRR;
}

void ioapic_set_line(struct irqchip *chip, uint32_t pin, bool level)
{
    struct ioapic *io = &chip->ioapic;
    if (pin >= KVS_IOAPIC_PINS)
        return;
    bool was = io->lines >> pin & 1;
    io->lines = (io->lines & ~(1u << pin)) | (uint32_t)level << pin;
    if (level && (!was || (io->redir[pin] & REDIR_LEVEL)))
        service(chip, pin);
}

void ioapic_eoi(struct irqchip *chip, uint8_t vector)
{
    struct ioapic *io = &chip->ioapic;
    for (uint32_t pin = 0; pin < KVS_IOAPIC_PINS; pin++) {
        if ((uint8_t)io->redir[pin] != vector || !(io->redir[pin] & REDIR_LEVEL))
            continue;
        io->redir[pin] &= ~(uint64_t)REDIR_REMOTE_IRR;
        if (io->lines >> pin & 1)
            service(chip, pin);
    }
}

/* A PC wires INTR of the PIC pair to pin 0 also. Only an ExtINT entry makes sense of it: other
 * routes to that pin are the host's. MultiProcessor Specification "Interrupt Modes" */
void ioapic_extint(struct irqchip *chip)
{
    if ((chip->ioapic.redir[0] >> 8 & 7) == DELIVER_EXTINT)
        service(chip, 0);
}

static uint32_t read_register(const struct ioapic *io)
{
    switch (io->select) {
    case 0: case 2:
        return io->id << 24;
    case 1:
        return (KVS_IOAPIC_PINS - 1) << 16 | IOAPIC_VERSION;
    }
    uint32_t pin = (io->select - 0x10) >> 1;
    if (io->select < 0x10 || pin >= KVS_IOAPIC_PINS)
        return 0;
    return (uint32_t)(io->select & 1 ? io->redir[pin] >> 32 : io->redir[pin]);
}

static void write_register(struct irqchip *chip, uint32_t value)
{
    struct ioapic *io = &chip->ioapic;
    if (io->select == 0)
        io->id = (value >> 24) & 0xf;
    uint32_t pin = (io->select - 0x10) >> 1;
    if (io->select < 0x10 || pin >= KVS_IOAPIC_PINS)
        return;
    uint64_t *e = &io->redir[pin];
    uint32_t shift = io->select & 1 ? 32 : 0;
    uint64_t writable = REDIR_WRITABLE & (0xffffffffull << shift);
    *e = (*e & ~writable) | ((uint64_t)value << shift & writable);
    /* Switching a pin to edge and back is how an OS clears a stuck remote IRR. */
    if (!(*e & REDIR_LEVEL))
        *e &= ~(uint64_t)REDIR_REMOTE_IRR;
    else if (io->lines >> pin & 1)
        service(chip, pin);
    if (pin == 0 && atomic_load(&chip->pic.output))
        ioapic_extint(chip);
}

static bool in_window(const struct irqchip *chip, uint64_t gpa)
{
    return chip && gpa - atomic_load(&chip->ioapic.base) < 0x100;
}

bool ioapic_mmio_read(struct kvs_vm *vm, uint64_t gpa, void *data, uint32_t size)
{
    struct irqchip *chip = vm->irqchip;
    uint64_t value = 0;
    if (!in_window(chip, gpa) || size > 8)
        return false;
    pthread_mutex_lock(&chip->lock);
    if ((gpa & 0xff) == 0)
        value = chip->ioapic.select;
    else if ((gpa & 0xff) == 0x10)
        value = read_register(&chip->ioapic);
    pthread_mutex_unlock(&chip->lock);
    memcpy(data, &value, size);
    return true;
}

bool ioapic_mmio_write(struct kvs_vm *vm, uint64_t gpa, const void *data, uint32_t size)
{
    struct irqchip *chip = vm->irqchip;
    uint32_t value = 0;
    if (!in_window(chip, gpa) || size > 8)
        return false;
    memcpy(&value, data, size < 4 ? size : 4);
    pthread_mutex_lock(&chip->lock);
    if ((gpa & 0xff) == 0)
        chip->ioapic.select = value & 0xff;
    else if ((gpa & 0xff) == 0x10)
        write_register(chip, value);
    else if ((gpa & 0xff) == 0x40)
        ioapic_eoi(chip, (uint8_t)value);
    pthread_mutex_unlock(&chip->lock);
    return true;
}

void ioapic_get_state(const struct ioapic *io, struct kvs_ioapic_state *s)
{
    memset(s, 0, sizeof *s);
    s->base_address = io->base;
    s->ioregsel = io->select;
    s->id = io->id;
    s->irr = io->lines;
    memcpy(s->redirtbl, io->redir, sizeof s->redirtbl);
}

int ioapic_set_state(struct irqchip *chip, const struct kvs_ioapic_state *s)
{
    struct ioapic *io = &chip->ioapic;
    if ((s->base_address & 0xff) || s->base_address > PHYS_MASK)
        return -KVS_ESTATE;
    io->base = s->base_address;
    io->select = s->ioregsel & 0xff;
    io->id = s->id & 0xf;
    io->lines = s->irr & ((1u << KVS_IOAPIC_PINS) - 1);
    for (uint32_t pin = 0; pin < KVS_IOAPIC_PINS; pin++) {
        io->redir[pin] = s->redirtbl[pin] & (REDIR_WRITABLE | REDIR_REMOTE_IRR);
        if (!(io->redir[pin] & REDIR_LEVEL))
            io->redir[pin] &= ~(uint64_t)REDIR_REMOTE_IRR;
    }
    /* A level that is high and not in service asks again; edges were delivered before. */
    for (uint32_t pin = 0; pin < KVS_IOAPIC_PINS; pin++)
        if ((io->lines >> pin & 1) && (io->redir[pin] & REDIR_LEVEL))
            service(chip, pin);
    return KVS_OK;
}
