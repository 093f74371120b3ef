/*
 * The 8254 timer and port 0x61. Intel 8254 data sheet
 *
 * Nothing counts: outputs and counts are computed from the VM clock, in ticks since its zero, and a
 * start. A written count is loaded with the tick after the write, a triggered one with the tick
 * after the trigger: that tick is the start. While a low gate holds modes 0, 2, 3 and 4 the start is
 * the number of ticks counted so far. A new count in a running mode 2 waits for the end of the period,
 * in mode 3 for the end of the half period, in modes 1 and 5 for the next trigger.
 *
 * Edges of channel 0 that come while the last one is not served are lost, as in the machine: nothing
 * is injected later to make up for them.
 */
#include "chips.h"

#include <stdlib.h>

#define PIT_HZ 1193182u
#define NS_PER_S 1000000000u
#define REFRESH_TOGGLE_NS 15085u /* port 0x61 bit 4: the old DRAM refresh request */
#define NOT_TRIGGERED INT64_MIN
#define PIT_FLAGS_SPEAKER 2u

/* Byte order of accesses and what a read or a latch returns next: KVM's numbers. */
enum { RW_LATCH, RW_LSB, RW_MSB, RW_WORD0, RW_WORD1 };

/* Words of kvs_pit_state2.reserved: next_count of the channels, and bits: channel n has no count, its new
 * count waits for the end of the period, its output was low before the start, its count is loaded with the
 * next tick, and that count is a new one; and the line of GSI 0. */
enum { RESERVED_NEXT = 0, RESERVED_BITS = 3 };
#define BIT_UNLOADED(n) (1u << (n))
#define BIT_AT_END(n) (1u << (8 + (n)))
#define BIT_WAS_LOW(n) (1u << (16 + (n)))
#define BIT_LINE_LOW (1u << 24)
#define BIT_LOADING(n) (1u << (25 + (n)))
#define BIT_NEW(n) (1u << (28 + (n)))

__extension__ typedef unsigned __int128 u128;

static int64_t ns_to_ticks(uint64_t ns) { return (int64_t)((u128)ns * PIT_HZ / NS_PER_S); }
static uint64_t ticks_to_ns(uint64_t ticks)
{
    return (uint64_t)(((u128)ticks * NS_PER_S + PIT_HZ - 1) / PIT_HZ); /* the first ns of that tick */
}

static int64_t tick_now(struct pit8254 *p) { return ns_to_ticks(clock_now(p->vm)); }

static bool by_trigger(const struct pit_channel *ch) { return ch->s.mode == 1 || ch->s.mode == 5; }
static bool repeats(const struct pit_channel *ch) { return ch->s.mode == 2 || ch->s.mode == 3; }
static uint32_t modulus(const struct pit_channel *ch) { return ch->s.bcd ? 10000 : 65536; }
static int64_t high_half(uint32_t count) { return (count + 1) / 2; } /* of mode 3 */

static bool counting(const struct pit_channel *ch)
{
    return ch->loaded && (by_trigger(ch) ? ch->start != NOT_TRIGGERED : ch->s.gate);
}

/* Ticks counted since the start; -1: loaded with the next tick. Only when loaded and, in modes 1 and 5, triggered. */
static int64_t elapsed(const struct pit_channel *ch, int64_t now)
{
    return counting(ch) ? now - ch->start : ch->start;
}

/* When a new count of a running mode 2 or 3 is taken. */
static int64_t reload_tick(const struct pit_channel *ch)
{
    return ch->start + (ch->s.mode == 3 && !ch->at_end ? high_half(ch->s.count) : ch->s.count);
}

static bool reload_waits(const struct pit_channel *ch) { return ch->next_count && repeats(ch) && counting(ch); }

static void settle(struct pit_channel *ch, int64_t now)
{
    if (!reload_waits(ch) || now < reload_tick(ch))
        return;
    /* A low half begins: the start that such a wave would have had. */
    ch->start = reload_tick(ch) - (ch->s.mode == 3 && !ch->at_end ? high_half(ch->next_count) : 0);
    ch->s.count = ch->next_count;
    ch->next_count = 0;
}

static bool output(const struct pit_channel *ch, int64_t now)
{
    if (!ch->loaded)
        return ch->s.mode != 0;
    if (by_trigger(ch) ? !counting(ch) : repeats(ch) && !ch->s.gate)
        return true;
    int64_t t = elapsed(ch, now), n = ch->s.count;
    if (now < ch->load_tick && ch->s.mode != 0)
        return !ch->was_low;
    switch (ch->s.mode) {
    case 0: case 1:
        return t >= n;
    case 2:
        return t % n != n - 1;
    case 3:
        return t % n < high_half(ch->s.count);
    default:
        return t != n;
    }
}

static uint16_t current_count(const struct pit_channel *ch, int64_t now)
{
    uint32_t m = modulus(ch), n = ch->s.count, value = n;
    if (ch->loaded && (!by_trigger(ch) || counting(ch))) {
        int64_t t = elapsed(ch, now), half = high_half(n);
        if (t < 0)
            t = 0;
        if (ch->s.mode == 2) {
            value = n - (uint32_t)(t % n);
        } else if (ch->s.mode == 3) { /* by two from the even number below, through each half */
            t %= n;
            value = (n & ~1u) - 2 * (uint32_t)(t < half ? t : t - half);
        } else {
            value = (n % m + m - (uint32_t)(t % m)) % m;
        }
    }
    value %= m;
    if (ch->s.bcd)
        value = value / 1000 << 12 | value / 100 % 10 << 8 | value / 10 % 10 << 4 | value % 10;
    return (uint16_t)value;
}

/* ---- channel 0's output is GSI 0 ---- */

/* The tick with which the output rises next, after now; -1: none. A short period is thinned, in phase. */
static int64_t next_rise(const struct pit_channel *ch, int64_t now)
{
    if (!counting(ch) || by_trigger(ch))
        return -1;
    int64_t t = elapsed(ch, now), n = ch->s.count, end;
    if (ch->s.mode == 4 && ch->was_low && now < ch->load_tick)
        return ch->load_tick;
    if (!repeats(ch)) {
        end = ch->s.mode == 0 ? n : n + 1;
        return t < end ? ch->start + end : -1;
    }
    int64_t least = ns_to_ticks(MIN_TIMER_PERIOD_NS);
    if (n < least)
        t += least;
    return ch->start + (t < 0 ? 1 : t / n + 1) * n;
}

static void set_line(struct pit8254 *p, bool level)
{
    p->line = level;
    if (!p->hpet_legacy)
        (void)irqchip_set_line(p->vm, 0, level);
}

static void schedule(struct pit8254 *p, int64_t now)
{
    int64_t rise = next_rise(&p->ch[0], now), event = rise;
    if (reload_waits(&p->ch[0]) && reload_tick(&p->ch[0]) < event)
        event = reload_tick(&p->ch[0]);
    p->event_rises = event == rise;
    uint64_t due = event < 0 ? CLOCK_NEVER : ticks_to_ns((uint64_t)event);
    if (due == p->next_event)
        return;
    p->next_event = due;
    clock_timer_arm(p->vm, &p->timer, due);
}

static void follow_output(struct pit8254 *p, int64_t now)
{
    if (output(&p->ch[0], now) != p->line)
        set_line(p, !p->line);
}

/* What is due: from the timer, or found by a write to the channel before the timer ran. */
static void event_if_due(struct pit8254 *p)
{
    uint64_t now = clock_now(p->vm);
    if (p->next_event == CLOCK_NEVER || p->next_event > now)
        return;
    settle(&p->ch[0], ns_to_ticks(now));
    p->next_event = CLOCK_NEVER;
    /* The low part of the wave needs no event of its own: it only makes the edge. */
    if (p->event_rises) {
        set_line(p, false);
        set_line(p, true);
    }
    schedule(p, ns_to_ticks(now));
}

static void timer_fire(void *owner, uint64_t now)
{
    struct pit8254 *p = owner;
    (void)now;
    pthread_mutex_lock(&p->lock);
    event_if_due(p);
    pthread_mutex_unlock(&p->lock);
}

/* ---- programming ---- */

static void load_count(struct pit_channel *ch, uint32_t value, int64_t now)
{
    if (ch->s.bcd)
        value = (value >> 12) * 1000 + (value >> 8 & 15) * 100 + (value >> 4 & 15) * 10 + (value & 15);
    if (!value)
        value = modulus(ch);
    if (counting(ch) && elapsed(ch, now) >= 0) {
        if (repeats(ch)) {
            int64_t t = elapsed(ch, now), n = ch->s.count;
            ch->start += t / n * n;
            ch->at_end = ch->s.mode == 2 || t % n >= high_half(ch->s.count);
        }
        if (repeats(ch) || by_trigger(ch)) {
            ch->next_count = value;
            return;
        }
    }
    bool low = ch->loaded && ch->s.mode == 4 && !output(ch, now); /* the strobe ends with the load */
    ch->s.count = value;
    ch->next_count = 0;
    ch->is_new = true;
    if (by_trigger(ch) && counting(ch))
        return; /* triggered just now: it is this count that will be loaded */
    ch->loaded = true;
    ch->was_low = low;
    ch->start = by_trigger(ch) ? NOT_TRIGGERED : ch->s.gate ? now + 1 : 0;
    ch->load_tick = by_trigger(ch) ? 0 : now + 1;
}

/* Is there a written count that has not been loaded? */
static bool null_count(const struct pit_channel *ch, int64_t now)
{
    return !ch->loaded || ch->next_count || (by_trigger(ch) && !counting(ch)) || (now < ch->load_tick && ch->is_new);
}

static void set_gate(struct pit_channel *ch, bool gate, int64_t now)
{
    if (gate == (ch->s.gate != 0))
        return;
    int64_t t = ch->loaded && (!by_trigger(ch) || counting(ch)) ? elapsed(ch, now) : 0;
    bool low = !output(ch, now), null = null_count(ch, now);
    ch->s.gate = gate;
    if (!ch->loaded || (by_trigger(ch) && !gate))
        return;
    if (by_trigger(ch) || (repeats(ch) && gate)) {
        ch->is_new = null;
        if (ch->next_count)
            ch->s.count = ch->next_count;
        ch->next_count = 0;
        ch->was_low = low;
        ch->start = ch->load_tick = now + 1;
    } else { /* from start to ticks counted, and back */
        ch->start = gate ? now - t : t > 0 ? t : 0;
    }
}

static void latch_count(struct pit_channel *ch, int64_t now)
{
    if (ch->s.count_latched)
        return;
    ch->s.latched_count = current_count(ch, now);
    ch->s.count_latched = ch->s.rw_mode;
}

static void latch_status(struct pit_channel *ch, int64_t now)
{
    if (ch->s.status_latched)
        return;
    ch->s.status = (uint8_t)(output(ch, now) << 7 | null_count(ch, now) << 6 | ch->s.rw_mode << 4 |
                             ch->s.mode << 1 | ch->s.bcd);
    ch->s.status_latched = 1;
}

static void write_control(struct pit8254 *p, uint8_t value, int64_t now)
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
    ch->start = ch->load_tick = 0;
    ch->next_count = 0;
    ch->loaded = ch->was_low = false;
}

static void write_channel(struct pit_channel *ch, uint8_t value, int64_t now)
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
            ch->start = ch->load_tick = 0;
        }
        break;
    }
}

static uint8_t read_channel(struct pit_channel *ch, int64_t now)
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
    int64_t now = tick_now(p);
    if (port == 0x61) {
        settle(&p->ch[2], now);
        value = (uint8_t)(p->ch[2].s.gate | p->speaker << 1 | (clock_now(p->vm) / REFRESH_TOGGLE_NS & 1) << 4 |
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
    int64_t now = tick_now(p);
    if (port == 0x61) {
        settle(&p->ch[2], now);
        p->speaker = value >> 1 & 1;
        set_gate(&p->ch[2], value & 1, now);
    } else {
        bool changes = port == 0x40 || (port == 0x43 && value < 0x40 && (value & 0x30));
        if (changes) { /* what the output does now is a change from where it is now */
            event_if_due(p);
            follow_output(p, now);
        }
        if ((port & 3) == 3)
            write_control(p, value, now);
        else
            write_channel(&p->ch[port & 3], value, now);
        if (changes) {
            follow_output(p, now);
            schedule(p, now);
        }
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
    p->next_event = CLOCK_NEVER;
    /* Channel 0 as in a machine whose firmware has used it: its output is high, so that programming mode 2
     * or 3 makes no edge. */
    p->ch[0].s.mode = 3;
    p->line = true;
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
    int64_t now = tick_now(p);
    for (uint32_t n = 0; n < 3; n++) {
        const struct pit_channel *ch = &p->ch[n];
        s->channels[n] = ch->s;
        s->channels[n].count_load_time = ch->start == NOT_TRIGGERED ? -1 : ch->start < 0 ? -(int64_t)ticks_to_ns((uint64_t)-ch->start)
                                                                         : (int64_t)ticks_to_ns((uint64_t)ch->start);
        s->reserved[RESERVED_NEXT + n] = ch->next_count;
        s->reserved[RESERVED_BITS] |= (ch->loaded ? 0 : BIT_UNLOADED(n)) | (ch->at_end ? BIT_AT_END(n) : 0) |
                                      (ch->was_low ? BIT_WAS_LOW(n) : 0) | (now < ch->load_tick ? BIT_LOADING(n) : 0) | (now < ch->load_tick && ch->is_new ? BIT_NEW(n) : 0);
    }
    if (!p->line)
        s->reserved[RESERVED_BITS] |= BIT_LINE_LOW;
    s->flags = (p->hpet_legacy ? KVS_PIT_FLAGS_HPET_LEGACY : 0) | (p->speaker ? PIT_FLAGS_SPEAKER : 0);
    pthread_mutex_unlock(&p->lock);
}

/* Starts ahead of the clock are brought back to it, and absurd ones to its zero. */
static void set_start(struct pit_channel *ch, int64_t ns, int64_t now)
{
    if (!ch->loaded || ns < -(int64_t)NS_PER_S)
        ch->start = 0;
    else
        ch->start = ns < 0 ? -ns_to_ticks((uint64_t)-ns) : ns_to_ticks((uint64_t)ns);
    if (!ch->loaded)
        return;
    if (by_trigger(ch) && ns < 0)
        ch->start = NOT_TRIGGERED;
    else if (counting(ch) && ch->start > now + 1)
        ch->start = now;
    else if (!counting(ch) && ch->start < 0)
        ch->start = 0;
}

/* False: not a channel that can be. */
static bool set_channel(struct pit_channel *ch, uint32_t n, const struct kvs_pit_state2 *in, int64_t now)
{
    uint32_t bits = in->reserved[RESERVED_BITS];
    struct kvs_pit_channel_state *s = &ch->s;
    *ch = (struct pit_channel){ .s = in->channels[n], .next_count = in->reserved[RESERVED_NEXT + n], .loaded = !(bits & BIT_UNLOADED(n)),
                                .at_end = bits & BIT_AT_END(n), .was_low = bits & BIT_WAS_LOW(n), .load_tick = bits & BIT_LOADING(n) ? now + 1 : 0, .is_new = bits & BIT_NEW(n) };
    if (s->count > 65536 || ch->next_count > 65536 || s->count_latched > RW_WORD0 ||
        s->read_state > RW_WORD1 || s->write_state > RW_WORD1 || s->rw_mode > RW_WORD0)
        return false;
    if (s->mode > 5) { /* KVM's power-on state has mode 255 */
        s->mode = n ? 0 : 3;
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
    set_start(ch, s->count_load_time, now);
    s->count_load_time = 0;
    return true;
}

int pit_set_state(struct pit8254 *p, const struct kvs_pit_state2 *s)
{
    struct pit_channel ch[3];
    if (s->flags & ~(KVS_PIT_FLAGS_HPET_LEGACY | PIT_FLAGS_SPEAKER))
        return -KVS_ESTATE;
    int64_t now = tick_now(p);
    for (uint32_t n = 0; n < 3; n++)
        if (!set_channel(&ch[n], n, s, now))
            return -KVS_ESTATE;
    pthread_mutex_lock(&p->lock);
    memcpy(p->ch, ch, sizeof ch);
    p->speaker = s->flags & PIT_FLAGS_SPEAKER;
    p->hpet_legacy = s->flags & KVS_PIT_FLAGS_HPET_LEGACY;
    /* The line's level is part of the controllers' images. */
    p->line = !(s->reserved[RESERVED_BITS] & BIT_LINE_LOW);
    settle(&p->ch[0], now);
    p->next_event = CLOCK_NEVER;
    clock_timer_arm(p->vm, &p->timer, CLOCK_NEVER);
    schedule(p, now);
    pthread_mutex_unlock(&p->lock);
    return KVS_OK;
}
