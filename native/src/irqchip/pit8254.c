/*
 * The 8254 timer and port 0x61. Intel 8254 data sheet
 *
 * Nothing counts: outputs and counts are computed from the VM clock and a start time. In
 * count_load_time stands, in ns: the start of the count; while a low gate holds modes 0, 2, 3 and 4,
 * the time counted so far; in modes 1 and 5 before their first trigger, -1. A new count in a running
 * mode 2 or 3 is taken at the end of the period.
 */
#include "chips.h"

#include <stdlib.h>

#define PIT_HZ 1193182u
#define NS_PER_S 1000000000u
#define REFRESH_TOGGLE_NS 15085u /* port 0x61 bit 4: the old DRAM refresh request */
#define NOT_TRIGGERED (-1)
#define PIT_FLAGS_SPEAKER 2u

/* Byte order of accesses and what a read or a latch returns next: KVM's numbers. */
enum { RW_LATCH, RW_LSB, RW_MSB, RW_WORD0, RW_WORD1 };

/* Words of kvs_pit_state2.reserved: next_count of the channels, and a bit set of unloaded ones. */
enum { RESERVED_NEXT = 0, RESERVED_UNLOADED = 3 };

__extension__ typedef unsigned __int128 u128;

static uint64_t ns_to_ticks(uint64_t ns) { return (uint64_t)((u128)ns * PIT_HZ / NS_PER_S); }
static uint64_t ticks_to_ns(uint64_t ticks)
{
    return (uint64_t)(((u128)ticks * NS_PER_S + PIT_HZ - 1) / PIT_HZ); /* the first ns of that tick */
}

/* A later start of the same wave: rounded so that no tick is counted twice. */
static void advance_start(struct kvs_pit_channel_state *s, uint64_t ticks)
{
    s->count_load_time += (int64_t)((u128)ticks * NS_PER_S / PIT_HZ);
}

static bool by_trigger(const struct pit_channel *ch) { return ch->s.mode == 1 || ch->s.mode == 5; }
static bool repeats(const struct pit_channel *ch) { return ch->s.mode == 2 || ch->s.mode == 3; }
static uint32_t modulus(const struct pit_channel *ch) { return ch->s.bcd ? 10000 : 65536; }

static bool counting(const struct pit_channel *ch)
{
    return ch->loaded && (by_trigger(ch) ? ch->s.count_load_time >= 0 : ch->s.gate);
}

/* Ticks counted since the start. Only when loaded and, in modes 1 and 5, triggered. */
static uint64_t elapsed(const struct pit_channel *ch, uint64_t now)
{
    uint64_t start = (uint64_t)ch->s.count_load_time;
    if (!counting(ch))
        return ns_to_ticks(start);
    return now > start ? ns_to_ticks(now - start) : 0;
}

/* Takes the new count of a repeating mode once its period is over. */
static void settle(struct pit_channel *ch, uint64_t now)
{
    if (!ch->next_count || !repeats(ch) || !counting(ch) || elapsed(ch, now) < ch->s.count)
        return;
    advance_start(&ch->s, ch->s.count);
    ch->s.count = ch->next_count;
    ch->next_count = 0;
}

static bool output(const struct pit_channel *ch, uint64_t now)
{
    if (!ch->loaded)
        return ch->s.mode != 0;
    if (by_trigger(ch) ? !counting(ch) : repeats(ch) && !ch->s.gate)
        return true;
    uint64_t t = elapsed(ch, now), n = ch->s.count;
    switch (ch->s.mode) {
    case 0: case 1:
        return t >= n;
    case 2:
        return t % n != n - 1;
    case 3:
        return t % n < (n + 1) / 2;
    default:
        return t != n;
    }
}

static uint16_t current_count(const struct pit_channel *ch, uint64_t now)
{
    uint32_t m = modulus(ch), n = ch->s.count, value;
    if (!ch->loaded || (by_trigger(ch) && !counting(ch))) {
        value = n % m;
    } else {
        uint64_t t = elapsed(ch, now);
        if (ch->s.mode == 2)
            value = n - (uint32_t)(t % n);
        else if (ch->s.mode == 3) /* counts by two: twice through in a period */
            value = (n - (uint32_t)(t * 2 % n)) & ~1u;
        else
            value = (n % m + m - (uint32_t)(t % m)) % m;
        value %= m;
    }
    if (ch->s.bcd)
        value = value / 1000 << 12 | value / 100 % 10 << 8 | value / 10 % 10 << 4 | value % 10;
    return (uint16_t)value;
}

/* ---- channel 0's output is GSI 0 ---- */

/* When the output rises next, strictly after now. A short period is thinned, in phase. */
static uint64_t next_rise(const struct pit_channel *ch, uint64_t now)
{
    if (!counting(ch) || by_trigger(ch))
        return CLOCK_NEVER;
    uint64_t t = elapsed(ch, now), n = ch->s.count, start = (uint64_t)ch->s.count_load_time, end;
    if (!repeats(ch)) {
        end = ch->s.mode == 0 ? n : n + 1;
        return t < end ? start + ticks_to_ns(end) : CLOCK_NEVER;
    }
    if (ticks_to_ns(n) < MIN_TIMER_PERIOD_NS)
        t += ns_to_ticks(MIN_TIMER_PERIOD_NS);
    end = start + ticks_to_ns((t / n + 1) * n);
    return end > now ? end : now + MIN_TIMER_PERIOD_NS;
}

static void set_line(struct pit8254 *p, bool level)
{
    if (level == p->line)
        return;
    p->line = level;
    if (!p->hpet_legacy)
        (void)irqchip_set_line(p->vm, 0, level);
}

static void schedule(struct pit8254 *p, uint64_t now)
{
    uint64_t edge = next_rise(&p->ch[0], now);
    if (edge == p->next_edge)
        return;
    p->next_edge = edge;
    clock_timer_arm(p->vm, &p->timer, edge);
}

static void channel0_changed(struct pit8254 *p, uint64_t now)
{
    set_line(p, output(&p->ch[0], now));
    schedule(p, now);
}

/* An edge that is due: from the timer, or found by a write to the channel before the timer ran. */
static void edge_if_due(struct pit8254 *p, uint64_t now)
{
    if (p->next_edge == CLOCK_NEVER || p->next_edge > now)
        return;
    settle(&p->ch[0], now);
    p->next_edge = CLOCK_NEVER;
    /* The low part of the wave needs no event of its own: it only makes the edge. */
    set_line(p, false);
    set_line(p, true);
    schedule(p, now);
}

static void timer_fire(void *owner, uint64_t now)
{
    struct pit8254 *p = owner;
    pthread_mutex_lock(&p->lock);
    edge_if_due(p, now);
    pthread_mutex_unlock(&p->lock);
}

/* ---- programming ---- */

static void load_count(struct pit_channel *ch, uint32_t value, uint64_t now)
{
    if (ch->s.bcd)
        value = (value >> 12) * 1000 + (value >> 8 & 15) * 100 + (value >> 4 & 15) * 10 + (value & 15);
    if (!value)
        value = modulus(ch);
    if (ch->loaded && repeats(ch) && ch->s.gate) {
        advance_start(&ch->s, elapsed(ch, now) / ch->s.count * ch->s.count);
        ch->next_count = value;
        return;
    }
    if (ch->loaded && by_trigger(ch) && counting(ch)) {
        ch->next_count = value; /* with the next trigger */
        return;
    }
    ch->s.count = value;
    ch->next_count = 0;
    ch->loaded = true;
    ch->s.count_load_time = by_trigger(ch) ? NOT_TRIGGERED : ch->s.gate ? (int64_t)now : 0;
}

static void set_gate(struct pit_channel *ch, bool gate, uint64_t now)
{
    if (gate == (ch->s.gate != 0))
        return;
    ch->s.gate = gate;
    if (!ch->loaded)
        return;
    if (by_trigger(ch) || (repeats(ch) && gate)) {
        if (!gate)
            return;
        if (ch->next_count)
            ch->s.count = ch->next_count;
        ch->next_count = 0;
        ch->s.count_load_time = (int64_t)now;
    } else { /* from start time to time counted, and back */
        int64_t other = (int64_t)now - ch->s.count_load_time;
        ch->s.count_load_time = other > 0 ? other : 0;
    }
}

static void latch_count(struct pit_channel *ch, uint64_t now)
{
    if (ch->s.count_latched)
        return;
    ch->s.latched_count = current_count(ch, now);
    ch->s.count_latched = ch->s.rw_mode;
}

static void latch_status(struct pit_channel *ch, uint64_t now)
{
    if (ch->s.status_latched)
        return;
    bool null_count = !ch->loaded || ch->next_count || (by_trigger(ch) && !counting(ch));
    ch->s.status = (uint8_t)(output(ch, now) << 7 | null_count << 6 | ch->s.rw_mode << 4 |
                             ch->s.mode << 1 | ch->s.bcd);
    ch->s.status_latched = 1;
}

static void write_control(struct pit8254 *p, uint8_t value, uint64_t now)
{
    uint32_t n = value >> 6;
    if (n == 3) { /* read-back command */
        for (n = 0; n < 3; n++) {
            if (!(value & 2u << n))
                continue;
            settle(&p->ch[n], now);
            if (!(value & 0x20))
                latch_count(&p->ch[n], now);
            if (!(value & 0x10))
                latch_status(&p->ch[n], now);
        }
        return;
    }
    struct pit_channel *ch = &p->ch[n];
    settle(ch, now);
    uint8_t rw = value >> 4 & 3, mode = value >> 1 & 7;
    if (!rw) {
        latch_count(ch, now);
        return;
    }
    ch->s.rw_mode = ch->s.read_state = ch->s.write_state = rw;
    ch->s.mode = mode > 5 ? mode & 3 : mode;
    ch->s.bcd = value & 1;
    ch->s.count_latched = ch->s.status_latched = 0;
    ch->s.count_load_time = 0;
    ch->next_count = 0;
    ch->loaded = false;
}

static void write_channel(struct pit_channel *ch, uint8_t value, uint64_t now)
{
    settle(ch, now);
    switch (ch->s.write_state) {
    case RW_LSB:
        load_count(ch, value, now);
        break;
    case RW_MSB:
        load_count(ch, (uint32_t)value << 8, now);
        break;
    case RW_WORD1:
        load_count(ch, (uint32_t)value << 8 | ch->s.write_latch, now);
        ch->s.write_state = RW_WORD0;
        break;
    default:
        ch->s.write_latch = value;
        ch->s.write_state = RW_WORD1;
        if (ch->s.mode == 0) { /* the first byte stops the count and lowers the output */
            ch->loaded = false;
            ch->s.count_load_time = 0;
        }
        break;
    }
}

static uint8_t read_channel(struct pit_channel *ch, uint64_t now)
{
    settle(ch, now);
    if (ch->s.status_latched) {
        ch->s.status_latched = 0;
        return ch->s.status;
    }
    switch (ch->s.count_latched) {
    case RW_LSB:
        ch->s.count_latched = 0;
        return (uint8_t)ch->s.latched_count;
    case RW_MSB:
        ch->s.count_latched = 0;
        return (uint8_t)(ch->s.latched_count >> 8);
    case RW_WORD0:
        ch->s.count_latched = RW_MSB;
        return (uint8_t)ch->s.latched_count;
    }
    uint16_t count = current_count(ch, now);
    switch (ch->s.read_state) {
    case RW_LSB:
        return (uint8_t)count;
    case RW_WORD0:
        ch->s.read_state = RW_WORD1;
        return (uint8_t)count;
    case RW_WORD1:
        ch->s.read_state = RW_WORD0;
        break;
    }
    return (uint8_t)(count >> 8);
}

bool pit_claims(uint16_t port) { return (port & ~3u) == 0x40 || port == 0x61; }

uint8_t pit_port_read(struct pit8254 *p, uint16_t port)
{
    uint8_t value = 0;
    pthread_mutex_lock(&p->lock);
    uint64_t now = clock_now(p->vm);
    if (port == 0x61) {
        settle(&p->ch[2], now);
        value = (uint8_t)(p->ch[2].s.gate | p->speaker << 1 | (now / REFRESH_TOGGLE_NS & 1) << 4 |
                          output(&p->ch[2], now) << 5);
    } else if ((port & 3) != 3) { /* the control word cannot be read */
        value = read_channel(&p->ch[port & 3], now);
    }
    pthread_mutex_unlock(&p->lock);
    return value;
}

void pit_port_write(struct pit8254 *p, uint16_t port, uint8_t value)
{
    pthread_mutex_lock(&p->lock);
    uint64_t now = clock_now(p->vm);
    if (port == 0x61) {
        settle(&p->ch[2], now);
        p->speaker = value >> 1 & 1;
        set_gate(&p->ch[2], value & 1, now);
    } else {
        bool changes = port == 0x40 || (port == 0x43 && value < 0x40 && (value & 0x30));
        if (changes)
            edge_if_due(p, now);
        if ((port & 3) == 3)
            write_control(p, value, now);
        else
            write_channel(&p->ch[port & 3], value, now);
        if (changes)
            channel0_changed(p, now);
    }
    pthread_mutex_unlock(&p->lock);
}

/* ---- life and state ---- */

int pit_create(struct kvs_vm *vm, struct pit8254 **out)
{
    struct pit8254 *p = calloc(1, sizeof *p);
    if (!p)
        return -KVS_ENOMEM;
    pthread_mutex_init(&p->lock, NULL);
    p->vm = vm;
    p->next_edge = CLOCK_NEVER;
    for (uint32_t n = 0; n < 3; n++) {
        struct kvs_pit_channel_state *s = &p->ch[n].s;
        s->count = 65536;
        s->rw_mode = s->read_state = s->write_state = RW_WORD0;
        s->gate = n != 2;
    }
    p->timer.fire = timer_fire;
    p->timer.owner = p;
    clock_timer_add(vm, &p->timer);
    *out = p;
    return KVS_OK;
}

void pit_destroy(struct pit8254 *p)
{
    clock_timer_remove(p->vm, &p->timer);
    pthread_mutex_destroy(&p->lock);
    free(p);
}

void pit_get_state(struct pit8254 *p, struct kvs_pit_state2 *s)
{
    memset(s, 0, sizeof *s);
    pthread_mutex_lock(&p->lock);
    for (uint32_t n = 0; n < 3; n++) {
        s->channels[n] = p->ch[n].s;
        s->reserved[RESERVED_NEXT + n] = p->ch[n].next_count;
        s->reserved[RESERVED_UNLOADED] |= (uint32_t)!p->ch[n].loaded << n;
    }
    s->flags = (p->hpet_legacy ? KVS_PIT_FLAGS_HPET_LEGACY : 0) | (p->speaker ? PIT_FLAGS_SPEAKER : 0);
    pthread_mutex_unlock(&p->lock);
}

/* False: not a channel that can be. Times ahead of the clock are brought back to it. */
static bool check_channel(struct pit_channel *ch, uint32_t n, uint64_t now)
{
    struct kvs_pit_channel_state *s = &ch->s;
    if (s->count > 65536 || ch->next_count > 65536 || s->count_latched > RW_WORD0 ||
        s->read_state > RW_WORD1 || s->write_state > RW_WORD1 || s->rw_mode > RW_WORD0)
        return false;
    if (s->mode > 5) { /* KVM's power-on state has mode 255 */
        s->mode = 0;
        ch->loaded = false;
    }
    s->bcd &= 1;
    s->gate = n == 2 ? s->gate & 1 : 1;
    s->status_latched = !!s->status_latched;
    if (!s->count)
        s->count = modulus(ch);
    if (!s->rw_mode)
        s->rw_mode = RW_WORD0;
    if (!s->read_state)
        s->read_state = s->rw_mode;
    if (!s->write_state)
        s->write_state = s->rw_mode;
    if (!ch->loaded)
        s->count_load_time = 0;
    else if (s->count_load_time < 0)
        s->count_load_time = by_trigger(ch) ? NOT_TRIGGERED : 0;
    else if ((uint64_t)s->count_load_time > now)
        s->count_load_time = (int64_t)now;
    return true;
}

int pit_set_state(struct pit8254 *p, const struct kvs_pit_state2 *s)
{
    struct pit_channel ch[3];
    if (s->flags & ~(KVS_PIT_FLAGS_HPET_LEGACY | PIT_FLAGS_SPEAKER))
        return -KVS_ESTATE;
    uint64_t now = clock_now(p->vm);
    for (uint32_t n = 0; n < 3; n++) {
        ch[n].s = s->channels[n];
        ch[n].next_count = s->reserved[RESERVED_NEXT + n];
        ch[n].loaded = !(s->reserved[RESERVED_UNLOADED] >> n & 1);
        if (!check_channel(&ch[n], n, now))
            return -KVS_ESTATE;
    }
    pthread_mutex_lock(&p->lock);
    memcpy(p->ch, ch, sizeof ch);
    p->speaker = s->flags & PIT_FLAGS_SPEAKER;
    p->hpet_legacy = s->flags & KVS_PIT_FLAGS_HPET_LEGACY;
    settle(&p->ch[0], now);
    /* The line's level is part of the controllers' images. */
    p->line = output(&p->ch[0], now);
    p->next_edge = CLOCK_NEVER;
    clock_timer_arm(p->vm, &p->timer, CLOCK_NEVER);
    schedule(p, now);
    pthread_mutex_unlock(&p->lock);
    return KVS_OK;
}
