/* Read-modify-write operands and bulk spans. */
#include "access.h"
#include "segment.h"

static int rmw_load(struct kvs_vcpu *c)
{
    struct rmw *m = &c->rmw;
    int st = access_translate(c, m->la, m->size, ACC_RW, LA_USER_RULES, m->part, &m->part_count);
    return st ? st : access_load(c, m->part, m->part_count, m->data);
}

static uint32_t rmw_store(struct kvs_vcpu *c)
{
    struct rmw *m = &c->rmw;
    uint32_t code = access_store(c, m->part, m->part_count, m->data);
    if (UNLIKELY(c->dr7 & 0xff)) debug_check_access(c, m->la, m->size, true);
    return code;
}

static int rmw_address(struct kvs_vcpu *c, uint32_t seg, uint64_t off, uint32_t size)
{
    c->rmw.host = NULL;
    c->rmw.size = size;
    return seg_to_linear(c, seg, off, size, ACC_RW, &c->rmw.la);
}

int vrmw_begin(struct kvs_vcpu *c, uint32_t seg, uint64_t off, uint32_t size)
{
    int st = rmw_address(c, seg, off, size);
    return UNLIKELY(st) ? st : rmw_load(c);
}

void vrmw_end(struct kvs_vcpu *c)
{
    uint32_t code = rmw_store(c);
    access_code_check(c, c->rmw.part, c->rmw.part_count, code);
}

static void rmw_go_on(struct kvs_vcpu *c)
{
    if (c->rmw.stopped) vm_sync_end(c->vm, c);
    c->rmw.stopped = false;
}

/*
 * SDM 3A "Bus Locking", "Software Controlled Bus Locking". Only inside a cache line is a host atomic
 * used: a split lock costs the whole host dearly and may even be refused there.
 */
int vrmw_begin_locked(struct kvs_vcpu *c, uint32_t seg, uint64_t off, uint32_t size)
{
    struct rmw *m = &c->rmw;
    int st = rmw_address(c, seg, off, size);
    if (UNLIKELY(st)) return st;
    if (LIKELY((m->la & 63) + size <= 64)) {
        st = access_translate(c, m->la, size, ACC_RW, LA_USER_RULES, m->part, &m->part_count);
        if (UNLIKELY(st)) return st;
        const struct mem_part *p = &m->part[0];
        const struct memslot *s = p->slot;
        bool plain = p->host && !(c->dr7 & 0xff);
        if (plain && s) {
            uint64_t page = (uint64_t)(p->host - s->ram->host) >> PAGE_SHIFT;
            plain = !(s->flags & KVS_MEM_READONLY) &&
                    !atomic_load_explicit(&s->ram->code_marks[page], memory_order_relaxed);
        }
        if (LIKELY(plain)) {
            m->host = p->host;
            return ST_OK;
        }
    }
    /* A single vCPU has the machine to itself. */
    m->stopped = atomic_load(&c->vm->vcpu_count) > 1;
    if (m->stopped) {
        vm_sync_begin(c->vm, c);
        tlb_catch_up(c);
    }
    st = rmw_load(c);
    if (UNLIKELY(st)) rmw_go_on(c);
    return st;
}

void vrmw_end_locked(struct kvs_vcpu *c)
{
    if (c->rmw.host) return;
    uint32_t code = rmw_store(c);
    rmw_go_on(c);
    access_code_check(c, c->rmw.part, c->rmw.part_count, code);
}

uint8_t *vspan(struct kvs_vcpu *c, uint32_t seg, uint64_t off, bool write, uint64_t *bytes)
{
    uint64_t la, room;
    if (alignment_checked(c) || seg_check(c, seg, off, 1, write ? ACC_W : ACC_R, &la, &room)) return NULL;
    uint8_t *host = tlb_probe(c, write ? TLB_W : TLB_R, la, 1);
    if (host) *bytes = min_u64(room, PAGE_SIZE - (la & PAGE_MASK));
    return host;
}
