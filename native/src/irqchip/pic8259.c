/*
 * The 8259A pair of the PC, with the chipset's edge/level control registers (0x4d0, 0x4d1).
 * Intel 8259A data sheet; all functions run under chip->lock.
 *
 * last_irr holds the levels of the lines. As in KVM, an edge stays requested when its line falls
 * before the acknowledge, and ICW1's LTIM bit is ignored: the ELCR decides, as in a PIIX.
 */
#include "chips.h"

#define CASCADE_IRQ 2
#define MASTER_ELCR_MASK 0xf8u
#define SLAVE_ELCR_MASK 0xdeu

/* init_state: which ICW is expected next. */
enum { INIT_DONE, INIT_ICW2, INIT_ICW3, INIT_ICW4, INIT_ICW2_SINGLE };

void pic_reset(struct pic8259 *pic)
{
    memset(pic->chip, 0, sizeof pic->chip);
    pic->chip[0].elcr_mask = MASTER_ELCR_MASK;
    pic->chip[1].elcr_mask = SLAVE_ELCR_MASK;
    atomic_store(&pic->output, false);
}

/* Distance of the best of these bits from the highest priority; 8: none. */
static uint32_t best_priority(const struct kvs_pic_state *s, uint32_t bits)
{
    uint32_t rotated = ((bits << 8 | bits) >> s->priority_add) & 0xff;
    return rotated ? (uint32_t)__builtin_ctz(rotated) : 8;
}

static int pending_irq(const struct kvs_pic_state *s, bool master)
{
    uint32_t request = best_priority(s, s->irr & ~s->imr & 0xffu);
    if (request == 8)
        return -1;
    uint32_t in_service = s->isr;
    /* Special mask mode: a masked level no longer holds back the ones below it. */
    if (s->special_mask)
        in_service &= ~(uint32_t)s->imr;
    /* Special fully nested mode: the slave may interrupt its own service. */
    if (s->special_fully_nested_mode && master)
        in_service &= ~(1u << CASCADE_IRQ);
    return request < best_priority(s, in_service) ? (int)((request + s->priority_add) & 7) : -1;
}

static void set_edge_or_level(struct kvs_pic_state *s, uint32_t irq, bool level)
{
    uint8_t bit = (uint8_t)(1u << irq);
    if (s->elcr & bit)
        s->irr = level ? s->irr | bit : s->irr & (uint8_t)~bit;
    else if (level && !(s->last_irr & bit))
        s->irr |= bit;
    s->last_irr = level ? s->last_irr | bit : s->last_irr & (uint8_t)~bit;
}

/* The slave's INT is the master's IR2; unlike other lines its request goes when the line falls. */
static void set_cascade(struct kvs_pic_state *master, bool level)
{
    set_edge_or_level(master, CASCADE_IRQ, level);
    if (!level)
        master->irr &= (uint8_t)~(1u << CASCADE_IRQ);
}

static void update_output(struct irqchip *chip)
{
    struct pic8259 *pic = &chip->pic;
    bool output = pending_irq(&pic->chip[0], true) >= 0;
    if (output == atomic_load(&pic->output))
        return;
    atomic_store(&pic->output, output);
    if (!output)
        return;
    for (uint32_t i = 0; i < chip->lapic_count; i++)
        lapic_lint0_rise(chip->lapics[i]);
    ioapic_extint(chip);
}

int pic_spurious(const struct irqchip *chip) { return chip->pic.chip[0].irq_base + 7; }

static void update(struct irqchip *chip)
{
    set_cascade(&chip->pic.chip[0], pending_irq(&chip->pic.chip[1], false) >= 0);
    update_output(chip);
}

void pic_set_line(struct irqchip *chip, uint32_t irq, bool level)
{
    if (irq > 15 || irq == CASCADE_IRQ)
        return;
    set_edge_or_level(&chip->pic.chip[irq >> 3], irq & 7, level);
    update(chip);
}

static void take(struct kvs_pic_state *s, uint32_t irq)
{
    uint8_t bit = (uint8_t)(1u << irq);
    if (!s->auto_eoi)
        s->isr |= bit;
    else if (s->rotate_on_auto_eoi)
        s->priority_add = (irq + 1) & 7;
    if (!(s->elcr & bit))
        s->irr &= (uint8_t)~bit;
}

/* What an INTA cycle leaves on the INT lines: they fall, and rise again for the next request. */
static void after_ack(struct irqchip *chip, bool slave_too)
{
    if (slave_too)
        set_cascade(&chip->pic.chip[0], false);
    atomic_store(&chip->pic.output, false);
    update(chip);
}

int pic_ack(struct irqchip *chip)
{
    struct kvs_pic_state *master = &chip->pic.chip[0], *slave = &chip->pic.chip[1];
    int irq = pending_irq(master, true);
    if (irq < 0)
        return -1;
    int vector = master->irq_base + irq;
    take(master, (uint32_t)irq);
    if (irq == CASCADE_IRQ) {
        int slave_irq = pending_irq(slave, false);
        if (slave_irq >= 0)
            take(slave, (uint32_t)slave_irq);
        else
            slave_irq = 7; /* the request went away: default IR7 */
        vector = slave->irq_base + slave_irq;
    }
    after_ack(chip, irq == CASCADE_IRQ);
    return vector;
}

static void write_icw1(struct kvs_pic_state *s, uint8_t value)
{
    /* Edges seen so far are forgotten: a high line must fall and rise again. Levels stay. */
    s->irr &= s->elcr & s->last_irr;
    s->imr = s->isr = 0;
    s->priority_add = 0;
    s->irq_base = 0;
    s->read_reg_select = 0;
    s->poll = s->special_mask = 0;
    s->auto_eoi = s->rotate_on_auto_eoi = s->special_fully_nested_mode = 0;
    s->init4 = value & 1;
    s->init_state = value & 2 ? INIT_ICW2_SINGLE : INIT_ICW2;
}

static void write_ocw2(struct kvs_pic_state *s, uint8_t value)
{
    uint8_t level = value & 7;
    uint32_t eligible = s->isr;
    uint32_t best;
    switch (value >> 5) {
    case 0: case 4: /* rotate in automatic EOI mode */
        s->rotate_on_auto_eoi = value >> 7;
        break;
    case 1: case 5: /* non-specific EOI; masked levels are left alone in special mask mode */
        if (s->special_mask)
            eligible &= ~(uint32_t)s->imr;
        best = best_priority(s, eligible);
        if (best == 8)
            break;
        level = (best + s->priority_add) & 7;
        s->isr &= (uint8_t)~(1u << level);
        if (value & 0x80)
            s->priority_add = (level + 1) & 7;
        break;
    case 3: case 7: /* specific EOI */
        s->isr &= (uint8_t)~(1u << level);
        if (value & 0x80)
            s->priority_add = (level + 1) & 7;
        break;
    case 6: /* set priority */
        s->priority_add = (level + 1) & 7;
        break;
    }
}

static void write_command(struct kvs_pic_state *s, uint8_t value)
{
    if (value & 0x10) {
        write_icw1(s, value);
    } else if (value & 0x08) { /* OCW3 */
        s->poll = (value >> 2) & 1;
        if (value & 0x02)
            s->read_reg_select = value & 1;
        if (value & 0x40)
            s->special_mask = (value >> 5) & 1;
    } else {
        write_ocw2(s, value);
    }
}

static void write_data(struct kvs_pic_state *s, uint8_t value)
{
    switch (s->init_state) {
    case INIT_DONE:
        s->imr = value;
        break;
    case INIT_ICW2:
    case INIT_ICW2_SINGLE:
        s->irq_base = value & 0xf8;
        if (s->init_state == INIT_ICW2)
            s->init_state = INIT_ICW3;
        else
            s->init_state = s->init4 ? INIT_ICW4 : INIT_DONE;
        break;
    case INIT_ICW3: /* the cascade is wired: its description changes nothing */
        s->init_state = s->init4 ? INIT_ICW4 : INIT_DONE;
        break;
    default:
        s->special_fully_nested_mode = (value >> 4) & 1;
        s->auto_eoi = (value >> 1) & 1;
        s->init_state = INIT_DONE;
        break;
    }
}

bool pic_claims(uint16_t port)
{
    return (port & ~0x81u) == 0x20 || (port & ~1u) == 0x4d0;
}

void pic_port_write(struct irqchip *chip, uint16_t port, uint8_t value)
{
    if ((port & ~1u) == 0x4d0) {
        struct kvs_pic_state *s = &chip->pic.chip[port & 1];
        s->elcr = value & s->elcr_mask;
        /* A level input requests while, and only while, its line is high. */
        s->irr = (s->irr & (uint8_t)~s->elcr) | (s->last_irr & s->elcr);
    } else {
        struct kvs_pic_state *s = &chip->pic.chip[port >> 7];
        if (port & 1)
            write_data(s, value);
        else
            write_command(s, value);
    }
    update(chip);
}

/* A poll is an acknowledge that the program reads: the request is taken into service. */
static uint8_t poll_read(struct irqchip *chip, uint32_t n)
{
    struct kvs_pic_state *s = &chip->pic.chip[n];
    s->poll = 0;
    int irq = pending_irq(s, n == 0);
    if (irq < 0)
        return 0;
    take(s, (uint32_t)irq);
    after_ack(chip, n == 1);
    return (uint8_t)(0x80 | irq);
}

uint8_t pic_port_read(struct irqchip *chip, uint16_t port)
{
    if ((port & ~1u) == 0x4d0)
        return chip->pic.chip[port & 1].elcr;
    uint32_t n = port >> 7;
    struct kvs_pic_state *s = &chip->pic.chip[n];
    if (s->poll)
        return poll_read(chip, n);
    if (port & 1)
        return s->imr;
    return s->read_reg_select ? s->isr : s->irr;
}

int pic_set_state(struct irqchip *chip, uint32_t n, const struct kvs_pic_state *in)
{
    struct kvs_pic_state s = *in;
    if (s.init_state > INIT_ICW2_SINGLE || s.priority_add > 7)
        return -KVS_ESTATE;
    s.irq_base &= 0xf8;
    s.read_reg_select = !!s.read_reg_select;
    s.poll = !!s.poll;
    s.special_mask = !!s.special_mask;
    s.auto_eoi = !!s.auto_eoi;
    s.rotate_on_auto_eoi = !!s.rotate_on_auto_eoi;
    s.special_fully_nested_mode = !!s.special_fully_nested_mode;
    s.init4 = !!s.init4;
    s.elcr_mask = n ? SLAVE_ELCR_MASK : MASTER_ELCR_MASK;
    s.elcr &= s.elcr_mask;
    chip->pic.chip[n] = s;
    update_output(chip); /* the cascade line is in the master's image */
    return KVS_OK;
}
