/* The device side of physical addresses and ports: in-core devices, doorbells, and exits to the host. */
#include "irqchip/irqchip.h"
#include "sys/sys.h"

/* ---- the replay log ---- */

/* The recorded answer to this read, if the current try has come to it. */
static bool replay_take(struct kvs_vcpu *c, bool is_port, uint64_t addr, uint32_t size, void *data)
{
    if (c->replay_pos >= c->replay_count) return false;
    const struct replay_entry *e = &c->replay[c->replay_pos];
    if (e->addr != addr || e->size != size || e->is_port != is_port) {
        /* The instruction took another path (its operands changed under it): ask again from here. */
        c->replay_count = c->replay_pos;
        return false;
    }
    memcpy(data, &e->data, size);
    c->replay_pos++;
    return true;
}

int iobus_internal_error(struct kvs_vcpu *c)
{
    c->run->exit_reason = KVS_EXIT_INTERNAL_ERROR;
    memset(&c->run->internal, 0, sizeof c->run->internal);
    c->run->internal.suberror = KVS_INTERNAL_ERROR_EMULATION;
    c->run->internal.ndata = 4;
    c->run->internal.data[0] = c->rip;
    return ST_EXIT;
}

static void exit_mmio(struct kvs_vcpu *c, uint64_t gpa, uint64_t data, uint32_t size, bool is_write)
{
    struct kvs_run_mmio *m = &c->run->mmio;
    memset(m, 0, sizeof *m);
    m->phys_addr = gpa;
    memcpy(m->data, &data, sizeof m->data);
    m->len = size;
    m->is_write = is_write;
    c->run->exit_reason = KVS_EXIT_MMIO;
    c->stats.exits_mmio++;
}

static void exit_io(struct kvs_vcpu *c, uint16_t port, uint32_t data, uint32_t size, uint8_t direction)
{
    struct kvs_run *r = c->run;
    memset(&r->io, 0, sizeof r->io);
    r->io.direction = direction;
    r->io.size = (uint8_t)size;
    r->io.port = port;
    r->io.count = 1;
    r->io.data_offset = offsetof(struct kvs_run, io_data);
    memset(r->io_data, 0, sizeof r->io_data);
    memcpy(r->io_data, &data, sizeof data);
    r->exit_reason = KVS_EXIT_IO;
    c->stats.exits_io++;
}

static int wait_for_read(struct kvs_vcpu *c, bool is_port, uint64_t addr, uint32_t size)
{
    /* More reads than any instruction makes. */
    if (UNLIKELY(c->replay_count >= REPLAY_MAX)) return iobus_internal_error(c);
    /* The instruction starts over, and so do its writes; those of earlier ones have left already. */
    c->write_count = c->write_pos = 0;
    c->io_read.active = true;
    c->io_read.is_port = is_port;
    c->io_read.addr = addr;
    c->io_read.size = (uint8_t)size;
    if (is_port) exit_io(c, (uint16_t)addr, 0, size, KVS_EXIT_IO_IN);
    else exit_mmio(c, addr, 0, size, false);
    return ST_EXIT;
}

void iobus_complete_exit(struct kvs_vcpu *c)
{
    if (c->io_read.active) {
        c->io_read.active = false;
        /* Address and size are ours; of the run block only the answer counts. */
        struct replay_entry e = { .addr = c->io_read.addr, .size = c->io_read.size, .is_port = c->io_read.is_port };
        memcpy(&e.data, e.is_port ? c->run->io_data : c->run->mmio.data, e.size);
        if (c->replay_count < REPLAY_MAX) c->replay[c->replay_count++] = e;
    }
    c->replay_pos = 0;
    if (c->write_exited) {
        c->write_exited = false;
        c->write_pos++;
    }
}

bool iobus_flush_writes(struct kvs_vcpu *c)
{
    if (LIKELY(c->write_pos >= c->write_count)) {
        c->write_pos = c->write_count = 0;
        return false;
    }
    const struct mmio_write *w = &c->writes[c->write_pos];
    c->write_exited = true;
    exit_mmio(c, w->gpa, w->data, w->size, true);
    return true;
}

/* ---- MMIO ---- */

/* SDM 3A "Local APIC Register Address Map": registers are 32 bits at multiples of 16. As under KVM, a
 * read may take a part of one; a write that is not a whole one, and anything wider, does nothing. */
static void lapic_read(struct kvs_vcpu *c, uint32_t offset, void *data, uint32_t size)
{
    memset(data, 0, size);
    if ((offset & 15) + size > 4) return;
    uint32_t value = lapic_mmio_read(c, offset & ~15u);
    memcpy(data, (uint8_t *)&value + (offset & 15), size);
}

static void lapic_write(struct kvs_vcpu *c, uint32_t offset, const void *data, uint32_t size)
{
    if (size == 4 && !(offset & 15)) lapic_mmio_write(c, offset, ld32(data));
}

int iobus_mmio_read(struct kvs_vcpu *c, uint64_t gpa, void *data, uint32_t size)
{
    if (c->lapic && lapic_mmio_match(c, gpa)) {
        lapic_read(c, (uint32_t)(gpa & PAGE_MASK), data, size);
        return ST_OK;
    }
    if (c->vm->irqchip && ioapic_mmio_read(c->vm, gpa, data, size)) return ST_OK;
    if (replay_take(c, false, gpa, size, data)) return ST_OK;
    return wait_for_read(c, false, gpa, size);
}

/* In virtual clock mode a doorbell is an exit, so that the host side acts at an exact instruction. */
static bool rings_doorbell(struct kvs_vcpu *c, bool is_port, uint64_t addr, uint32_t size, uint64_t value)
{
    return c->vm->doorbells && c->vm->config.clock_mode != KVS_CLOCK_VIRTUAL &&
           doorbell_write(c->vm, is_port, addr, size, value);
}

int iobus_mmio_write(struct kvs_vcpu *c, uint64_t gpa, const void *data, uint32_t size)
{
    if (c->lapic && lapic_mmio_match(c, gpa)) {
        lapic_write(c, (uint32_t)(gpa & PAGE_MASK), data, size);
        return ST_OK;
    }
    if (c->vm->irqchip && ioapic_mmio_write(c->vm, gpa, data, size)) return ST_OK;
    uint64_t value = 0;
    memcpy(&value, data, size);
    if (rings_doorbell(c, false, gpa, size, value)) return ST_OK;
    /* The queue holds more than any instruction writes (XSAVE: 576 bytes across a page). */
    if (c->write_count < MMIO_WRITES_MAX)
        c->writes[c->write_count++] = (struct mmio_write){ .gpa = gpa, .data = value, .size = (uint8_t)size };
    return ST_OK;
}

/* ---- ports ---- */

static inline uint32_t size_mask(uint32_t size) { return size >= 4 ? UINT32_MAX : (1u << 8 * size) - 1; }

int iobus_port_read(struct kvs_vcpu *c, uint16_t port, uint32_t *data, uint32_t size)
{
    uint32_t value = 0;
    if (!(c->vm->irqchip && irqchip_port_read(c, port, size, &value)) &&
        !replay_take(c, true, port, size, &value))
        return wait_for_read(c, true, port, size);
    *data = value & size_mask(size);
    if (UNLIKELY(c->dr7 & 0xff)) debug_check_port(c, port, size);
    return ST_OK;
}

int iobus_port_write(struct kvs_vcpu *c, uint16_t port, uint32_t data, uint32_t size)
{
    data &= size_mask(size);
    if (UNLIKELY(c->dr7 & 0xff)) debug_check_port(c, port, size);
    if (c->vm->irqchip && irqchip_port_write(c, port, size, data)) return ST_OK;
    if (rings_doorbell(c, true, port, size, data)) return ST_OK;
    exit_io(c, port, data, size, KVS_EXIT_IO_OUT);
    return ST_EXIT_DONE;
}
