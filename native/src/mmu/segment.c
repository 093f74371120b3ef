/* Logical address to linear address. SDM 3A "Protected-Mode Memory Management", "Limit Checking", "Type Checking" */
#include "segment.h"

/* A fault of the segment unit, not yet raised: the vector, or 0. Error codes are all 0. */
static inline uint8_t segment_fault(uint32_t seg) { return seg == SEG_SS ? EXC_SS : EXC_GP; }

/* Bytes that may be accessed from off on, by type and limit; 0: none. */
static uint64_t segment_room(const struct segment *s, bool check_type, uint64_t off)
{
    if (check_type && (s->attr & (ATTR_CODE | ATTR_EC)) == ATTR_EC) {
        uint64_t top = s->attr & ATTR_DB ? 0xffffffffu : 0xffffu;
        return off > s->limit && off <= top ? top - off + 1 : 0;
    }
    /* SDM 3A "Limit Checking" lets an access wrap under a limit of 4 GiB - 1; silicon does not. */
    return off <= s->limit ? (uint64_t)s->limit - off + 1 : 0;
}

uint8_t seg_check(struct kvs_vcpu *c, uint32_t seg, uint64_t off, uint32_t size, int access, uint64_t *la, uint64_t *room)
{
    const uint32_t n = seg & 0x7f;
    *room = UINT32_MAX;
    if (LIKELY(is_code64(c))) {
        /* SDM 3A "Segment Descriptor Tables in IA-32e Mode": bases of FS and GS alone count */
        uint64_t a = la_untag(c, !(seg & 0x80) && n >= SEG_FS ? off + c->seg[n].base : off);
        *la = a;
        return LIKELY(is_canonical(c, a) && is_canonical(c, a + (size - 1))) ? 0 : segment_fault(n);
    }
    if (seg & 0x80) {
        *la = (uint32_t)off;
        *room = BIT(32) - *la;
        return UNLIKELY(*room < size) ? segment_fault(n) : 0;
    }
    const struct segment *s = &c->seg[n];
    const bool check_type = !is_real_or_v86(c);
    off = (uint32_t)off;
    *la = (uint32_t)(s->base + off);
    if (check_type) {
        if (s->attr & ATTR_NULL) return segment_fault(n);
        if (access == ACC_W || access == ACC_RW) {
            if ((s->attr & (ATTR_CODE | ATTR_W)) != ATTR_W) return EXC_GP;
        } else if (access == ACC_R && (s->attr & (ATTR_CODE | ATTR_W)) == ATTR_CODE) {
            return EXC_GP;
        }
    }
    *room = segment_room(s, check_type, off);
    return UNLIKELY(*room < size) ? segment_fault(n) : 0;
}

/* SDM 3A "Alignment Requirements by Data Type" */
static inline uint32_t alignment_mask(uint32_t size)
{
    return size == 2 || size == 4 || size == 8 ? size - 1 : size == 10 ? 7 : 0;
}

int seg_to_linear(struct kvs_vcpu *c, uint32_t seg, uint64_t off, uint32_t size, int access, uint64_t *la)
{
    uint64_t room;
    uint8_t fault = seg_check(c, seg, off, size, access, la, &room);
    if (UNLIKELY(fault)) return raise_error(c, fault, 0);
    if (UNLIKELY(alignment_checked(c)) && access != ACC_X && (*la & alignment_mask(size))) return raise_error(c, EXC_AC, 0);
    return ST_OK;
}

int seg_to_linear_aligned(struct kvs_vcpu *c, uint32_t seg, uint64_t off, uint32_t size, int access, uint64_t *la)
{
    uint64_t room;
    uint8_t fault = seg_check(c, seg, off, size, access, la, &room);
    /* Misalignment is found before the address is found not to be canonical, or beyond a limit. */
    if (UNLIKELY(fault) && !(*la & (size - 1))) return raise_error(c, fault, 0);
    return UNLIKELY(*la & (size - 1)) ? raise_gp(c, 0) : ST_OK;
}

int seg_check_alignment(struct kvs_vcpu *c, uint32_t seg, uint64_t off, uint32_t align, int access)
{
    uint64_t la, room;
    if (LIKELY(!alignment_checked(c)) || seg_check(c, seg, off, 1, access, &la, &room)) return ST_OK;
    return la & (align - 1) ? raise_error(c, EXC_AC, 0) : ST_OK;
}
