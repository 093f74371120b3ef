/* Guest RAM objects, memory slots, the dirty log, and host access to guest memory. */
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include "mmu/mmu.h"

/* ---- RAM objects ---- */

#define RAM_SIZE_MAX BIT(MAXPHYADDR)

static struct kvs_ram *ram_new(uint8_t *host, uint64_t size, bool owned, int fd)
{
    struct kvs_ram *ram = calloc(1, sizeof *ram);
    if (!ram) return NULL;
    void *marks = mmap(NULL, size / PAGE_SIZE * sizeof(uint64_t), PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (marks == MAP_FAILED) {
        free(ram);
        return NULL;
    }
    atomic_store(&ram->refs, 1);
    ram->host = host;
    ram->size = size;
    ram->owned = owned;
    ram->fd = fd;
    ram->code_marks = marks;
    return ram;
}

int32_t kvs_ram_create(uint64_t size, struct kvs_ram **ram)
{
    if (!ram || !size || (size & PAGE_MASK) || size > RAM_SIZE_MAX) return -KVS_EINVAL;
    int fd = memfd_create("guest-ram", MFD_CLOEXEC);
    if (fd < 0) return -KVS_ENOMEM;
    void *host = MAP_FAILED;
    if (!ftruncate(fd, (off_t)size))
        host = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0);
    if (host == MAP_FAILED) {
        close(fd);
        return -KVS_ENOMEM;
    }
    *ram = ram_new(host, size, true, fd);
    if (*ram) return KVS_OK;
    munmap(host, size);
    close(fd);
    return -KVS_ENOMEM;
}

void kvs_ram_acquire(struct kvs_ram *ram)
{
    if (ram) atomic_fetch_add(&ram->refs, 1);
}

void kvs_ram_release(struct kvs_ram *ram)
{
    if (!ram || atomic_fetch_sub(&ram->refs, 1) != 1) return;
    munmap((void *)ram->code_marks, ram->size / PAGE_SIZE * sizeof(uint64_t));
    if (ram->owned) {
        munmap(ram->host, ram->size);
        close(ram->fd);
    }
    free(ram);
}

void *kvs_ram_address(struct kvs_ram *ram) { return ram ? ram->host : NULL; }

/* ---- finding slots: vCPUs in guest code, or any thread that holds vm->lock ---- */

struct memslot *memslot_find(struct memslots *m, uint64_t gpa)
{
    uint32_t low = 0, high = m ? m->count : 0;
    while (low < high) {
        uint32_t mid = (low + high) / 2;
        struct memslot *s = &m->slot[mid];
        if (gpa < s->gpa) high = mid;
        else if (gpa - s->gpa < s->size) return s;
        else low = mid + 1;
    }
    return NULL;
}

uint8_t *gpa_to_host(struct memslots *m, uint64_t gpa, uint64_t *left, struct memslot **slot)
{
    struct memslot *s = memslot_find(m, gpa);
    if (!s) return NULL;
    uint64_t off = gpa - s->gpa;
    if (left) *left = s->size - off;
    if (slot) *slot = s;
    return s->host + off;
}

/* ---- dirty log ---- */

static uint64_t dirty_words(uint64_t size) { return (size / PAGE_SIZE + 63) / 64; }

void memslot_mark_dirty(struct memslot *s, uint64_t gpa, uint64_t length)
{
    if (LIKELY(!s->dirty) || !length) return;
    uint64_t first = (gpa - s->gpa) >> PAGE_SHIFT, last = (gpa - s->gpa + length - 1) >> PAGE_SHIFT;
    for (uint64_t page = first; page <= last; page++)
        atomic_fetch_or_explicit(&s->dirty[page >> 6], BIT(page & 63), memory_order_relaxed);
}

int32_t kvs_get_dirty_log(struct kvs_vm *vm, uint32_t slot, uint64_t *bitmap, uint64_t words)
{
    if (!vm || !bitmap || slot >> 16 >= KVS_SPACE_COUNT) return -KVS_EINVAL;
    int32_t st = -KVS_ENOENT;
    vm_sync_begin(vm, NULL);
    pthread_mutex_lock(&vm->lock);
    struct memslots *m = vm_slots(vm, slot >> 16);
    for (uint32_t n = 0; m && n < m->count; n++) {
        struct memslot *s = &m->slot[n];
        if (s->id != slot || !s->dirty) continue;
        uint64_t need = dirty_words(s->size);
        if (words < need) {
            st = -KVS_ERANGE;
            break;
        }
        for (uint64_t w = 0; w < need; w++) bitmap[w] = atomic_exchange(&s->dirty[w], 0);
        memset(bitmap + need, 0, (words - need) * sizeof *bitmap);
        st = KVS_OK;
        break;
    }
    pthread_mutex_unlock(&vm->lock);
    if (st == KVS_OK) vm_request_all(vm, REQ_W_FLUSH); /* clean pages carry no W tag */
    vm_sync_end(vm, NULL);
    return st;
}

/* ---- changing slots ---- */

#define SLOT_FLAGS (KVS_MEM_LOG_DIRTY_PAGES | KVS_MEM_READONLY)
#define SLOTS_MAX 32764 /* KVM's */

static int32_t region_check(const struct kvs_vm *vm, const struct kvs_userspace_memory_region *r)
{
    if (r->slot >> 16 >= KVS_SPACE_COUNT || (r->slot & 0xffff) >= SLOTS_MAX) return -KVS_EINVAL;
    if (r->slot >> 16 == KVS_SPACE_SMM && !(vm->config.flags & KVS_VM_SMM)) return -KVS_ENOTSUP;
    if ((r->flags & ~SLOT_FLAGS) || (r->memory_size & PAGE_MASK) || (r->guest_phys_addr & PAGE_MASK)) return -KVS_EINVAL;
    if (r->memory_size > BIT(MAXPHYADDR) || r->guest_phys_addr > BIT(MAXPHYADDR) - r->memory_size) return -KVS_EINVAL;
    return KVS_OK;
}

/*
 * Backing for a new slot: one reference for the slot. Caller-owned memory that two slots share must
 * share its code marks too, or stores through one would leave code decoded through the other.
 */
static int32_t backing_get(struct kvs_vm *vm, const struct kvs_userspace_memory_region *r,
                           struct kvs_ram **ram, uint64_t *ram_offset)
{
    if (*ram) {
        if ((*ram_offset & PAGE_MASK) || *ram_offset > (*ram)->size || r->memory_size > (*ram)->size - *ram_offset) return -KVS_EINVAL;
        kvs_ram_acquire(*ram);
        return KVS_OK;
    }
    const uint64_t host = r->userspace_addr;
    if (!host || (host & PAGE_MASK) || host + r->memory_size < host) return -KVS_EINVAL;
    for (uint32_t space = 0; space < KVS_SPACE_COUNT; space++) {
        const struct memslots *m = vm_slots(vm, space);
        for (uint32_t n = 0; m && n < m->count; n++) {
            struct kvs_ram *other = m->slot[n].ram;
            const uint64_t start = (uintptr_t)other->host, end = start + other->size;
            if (host >= end || host + r->memory_size <= start) continue;
            if (host < start || host + r->memory_size > end) return -KVS_ENOTSUP;
            kvs_ram_acquire(other);
            *ram = other;
            *ram_offset = host - start;
            return KVS_OK;
        }
    }
    *ram_offset = 0;
    *ram = ram_new((uint8_t *)(uintptr_t)host, r->memory_size, false, -1);
    return *ram ? KVS_OK : -KVS_ENOMEM;
}

static int32_t dirty_set(struct memslot *s, const struct memslot *old)
{
    if (!(s->flags & KVS_MEM_LOG_DIRTY_PAGES)) {
        s->dirty = NULL;
        return KVS_OK;
    }
    s->dirty = old ? old->dirty : NULL;
    if (!s->dirty) s->dirty = calloc(dirty_words(s->size), sizeof *s->dirty);
    return s->dirty ? KVS_OK : -KVS_ENOMEM;
}

/* What the slot becomes; nothing is changed on failure. */
static int32_t slot_prepare(struct kvs_vm *vm, const struct memslots *m, const struct memslot *old, const struct kvs_userspace_memory_region *r,
                            struct kvs_ram *ram, uint64_t ram_offset, struct memslot *s)
{
    for (uint32_t n = 0; m && n < m->count; n++) {
        const struct memslot *o = &m->slot[n];
        if (o != old && r->guest_phys_addr < o->gpa + o->size && o->gpa < r->guest_phys_addr + r->memory_size) return -KVS_EOVERLAP;
    }
    *s = old ? *old : (struct memslot){ .size = r->memory_size, .id = r->slot };
    s->gpa = r->guest_phys_addr;
    s->flags = r->flags;
    if (!old) {
        int32_t st = backing_get(vm, r, &ram, &ram_offset);
        if (st) return st;
        s->ram = ram;
        s->ram_offset = ram_offset;
        s->host = ram->host + ram_offset;
    }
    int32_t st = dirty_set(s, old);
    if (st && !old) kvs_ram_release(s->ram);
    return st;
}

/* KVM's rules for an existing slot: it may move and change flags, but not its size or its memory. */
static bool same_backing(const struct memslot *old, const struct kvs_userspace_memory_region *r, const struct kvs_ram *ram, uint64_t ram_offset)
{
    if (old->size != r->memory_size) return false;
    return ram ? old->ram == ram && old->ram_offset == ram_offset : (uintptr_t)old->host == r->userspace_addr;
}

static void publish(struct kvs_vm *vm, uint32_t space, struct memslots *next, const struct memslots *m, const struct memslot *old, const struct memslot *add)
{
    uint32_t count = 0;
    bool added = !add;
    for (uint32_t n = 0; m && n < m->count; n++) {
        if (!added && add->gpa < m->slot[n].gpa) {
            next->slot[count++] = *add;
            added = true;
        }
        if (&m->slot[n] != old) next->slot[count++] = m->slot[n];
    }
    if (!added) next->slot[count++] = *add;
    next->count = count;
    atomic_store(&vm->slots[space], next);
    vm->slot_changes++;
}

/* With the world stopped and vm->lock held. Returns the requests that vCPUs must obey, or an error. */
static int32_t slots_change(struct kvs_vm *vm, const struct kvs_userspace_memory_region *r, struct kvs_ram *ram, uint64_t ram_offset)
{
    const uint32_t space = r->slot >> 16;
    struct memslots *m = vm_slots(vm, space);
    struct memslot *old = NULL;
    for (uint32_t n = 0; m && n < m->count; n++)
        if (m->slot[n].id == r->slot) old = &m->slot[n];
    if (!r->memory_size && !old) return -KVS_ENOENT;
    if (r->memory_size && old && !same_backing(old, r, ram, ram_offset)) return -KVS_EINVAL;

    struct memslots *next = malloc(sizeof *next + ((m ? m->count : 0) + 1) * sizeof next->slot[0]);
    if (!next) return -KVS_ENOMEM;
    struct memslot s;
    if (r->memory_size) {
        int32_t st = slot_prepare(vm, m, old, r, ram, ram_offset, &s);
        if (st) {
            free(next);
            return st;
        }
    }
    publish(vm, space, next, m, old, r->memory_size ? &s : NULL);
    if (old && (!r->memory_size || s.dirty != old->dirty)) free((void *)old->dirty);
    int32_t requests = REQ_TLB_FLUSH;
    if (!r->memory_size) {
        kvs_ram_release(old->ram);
        requests |= REQ_CODE_FLUSH; /* decoded code is known by host address, which may be reused */
    }
    free(m);
    return requests;
}

int memslot_set(struct kvs_vm *vm, const struct kvs_userspace_memory_region *r, struct kvs_ram *ram, uint64_t ram_offset)
{
    int32_t st = region_check(vm, r);
    if (st) return st;
    vm_sync_begin(vm, NULL);
    pthread_mutex_lock(&vm->lock);
    st = slots_change(vm, r, ram, ram_offset);
    pthread_mutex_unlock(&vm->lock);
    if (st > 0) vm_request_all(vm, (uint32_t)st);
    vm_sync_end(vm, NULL);
    return st < 0 ? st : KVS_OK;
}

void memslots_free(struct kvs_vm *vm)
{
    for (uint32_t space = 0; space < KVS_SPACE_COUNT; space++) {
        struct memslots *m = atomic_exchange(&vm->slots[space], NULL);
        for (uint32_t n = 0; m && n < m->count; n++) {
            free((void *)m->slot[n].dirty);
            kvs_ram_release(m->slot[n].ram);
        }
        free(m);
    }
    doorbells_free(vm);
}

int32_t kvs_memslot_set(struct kvs_vm *vm, const struct kvs_userspace_memory_region *region, struct kvs_ram *ram, uint64_t ram_offset)
{
    return vm && region ? memslot_set(vm, region, ram, ram_offset) : -KVS_EINVAL;
}

/* ---- host access ----
 * vm->lock keeps the slots in place. It is not held while code is invalidated, which may have to
 * stop vCPUs that want the lock themselves.
 */

/* Is all of [gpa, gpa + len) memory? */
static int32_t range_check(struct memslots *m, uint64_t gpa, uint64_t len, bool write)
{
    if (gpa + len < gpa) return -KVS_EFAULT;
    while (len) {
        uint64_t left;
        struct memslot *s;
        if (!gpa_to_host(m, gpa, &left, &s)) return -KVS_EFAULT;
        if (write && (s->flags & KVS_MEM_READONLY)) return -KVS_EROFS;
        uint64_t n = min_u64(left, len);
        gpa += n;
        len -= n;
    }
    return KVS_OK;
}

/* Stretches whose decoded code is to be dropped once vm->lock is free. */
struct stale { struct kvs_ram *ram; uint64_t offset, size; };
#define STALE_MAX 16

static bool has_code(const struct kvs_ram *ram, uint64_t offset, uint64_t size)
{
    for (uint64_t page = offset >> PAGE_SHIFT; page <= (offset + size - 1) >> PAGE_SHIFT; page++)
        if (atomic_load_explicit(&ram->code_marks[page], memory_order_relaxed)) return true;
    return false;
}

/* data NULL: the bytes are written already. Works until done or the list is full; returns bytes done. */
static uint64_t write_some(struct memslots *m, uint64_t gpa, const uint8_t *data, uint64_t len, struct stale *stale, uint32_t *count)
{
    uint64_t done = 0;
    *count = 0;
    while (done < len && *count < STALE_MAX) {
        uint64_t left;
        struct memslot *s;
        uint8_t *host = gpa_to_host(m, gpa + done, &left, &s);
        if (!host) break; /* not after range_check under the same lock */
        uint64_t n = min_u64(left, len - done);
        if (data) memcpy(host, data + done, n);
        memslot_mark_dirty(s, gpa + done, n);
        atomic_thread_fence(memory_order_seq_cst); /* the bytes before the look at the marks */
        uint64_t offset = (uint64_t)(host - s->ram->host);
        if (has_code(s->ram, offset, n)) {
            kvs_ram_acquire(s->ram);
            stale[(*count)++] = (struct stale){ s->ram, offset, n };
        }
        done += n;
    }
    return done;
}

static int32_t write_range(struct kvs_vm *vm, uint32_t space, uint64_t gpa, const uint8_t *data, uint64_t len)
{
    while (len) {
        struct stale stale[STALE_MAX];
        uint32_t count = 0;
        uint64_t done = 0;
        pthread_mutex_lock(&vm->lock);
        struct memslots *m = vm_slots(vm, space);
        int32_t st = range_check(m, gpa, len, data != NULL);
        if (!st) done = write_some(m, gpa, data, len, stale, &count);
        pthread_mutex_unlock(&vm->lock);
        for (uint32_t n = 0; n < count; n++) {
            code_invalidate(vm, stale[n].ram, stale[n].offset, stale[n].size);
            kvs_ram_release(stale[n].ram);
        }
        if (st) return st;
        if (!done) return -KVS_EFAULT;
        gpa += done;
        len -= done;
        if (data) data += done;
    }
    return KVS_OK;
}

static int32_t read_range(struct kvs_vm *vm, uint32_t space, uint64_t gpa, void *data, uint64_t len)
{
    uint8_t *to = data;
    pthread_mutex_lock(&vm->lock);
    struct memslots *m = vm_slots(vm, space);
    int32_t st = range_check(m, gpa, len, false);
    while (!st && len) {
        uint64_t left;
        const uint8_t *host = gpa_to_host(m, gpa, &left, NULL);
        if (!host) break;
        uint64_t n = min_u64(left, len);
        memcpy(to, host, n);
        gpa += n;
        to += n;
        len -= n;
    }
    pthread_mutex_unlock(&vm->lock);
    return st;
}

int32_t vm_mem_read(struct kvs_vm *vm, uint64_t gpa, void *data, uint64_t len) { return read_range(vm, KVS_SPACE_NORMAL, gpa, data, len); }
int32_t vm_mem_write(struct kvs_vm *vm, uint64_t gpa, const void *data, uint64_t len) { return write_range(vm, KVS_SPACE_NORMAL, gpa, data, len); }

int32_t kvs_space_read(struct kvs_vm *vm, uint32_t space, uint64_t gpa, void *data, uint64_t length)
{
    return vm && space < KVS_SPACE_COUNT && (data || !length) ? read_range(vm, space, gpa, data, length) : -KVS_EINVAL;
}

int32_t kvs_space_write(struct kvs_vm *vm, uint32_t space, uint64_t gpa, const void *data, uint64_t length)
{
    return vm && space < KVS_SPACE_COUNT && (data || !length) ? write_range(vm, space, gpa, data, length) : -KVS_EINVAL;
}

int32_t kvs_space_written(struct kvs_vm *vm, uint32_t space, uint64_t gpa, uint64_t length)
{
    return vm && space < KVS_SPACE_COUNT ? write_range(vm, space, gpa, NULL, length) : -KVS_EINVAL;
}

int32_t kvs_mem_read(struct kvs_vm *vm, uint64_t gpa, void *data, uint64_t length)
{
    return kvs_space_read(vm, KVS_SPACE_NORMAL, gpa, data, length);
}

int32_t kvs_mem_write(struct kvs_vm *vm, uint64_t gpa, const void *data, uint64_t length)
{
    return kvs_space_write(vm, KVS_SPACE_NORMAL, gpa, data, length);
}

int32_t kvs_mem_written(struct kvs_vm *vm, uint64_t gpa, uint64_t length)
{
    return kvs_space_written(vm, KVS_SPACE_NORMAL, gpa, length);
}

int32_t kvs_mem_host_address(struct kvs_vm *vm, uint64_t gpa, uint64_t length, void **address)
{
    if (!vm || !address) return -KVS_EINVAL;
    uint64_t left = 0;
    pthread_mutex_lock(&vm->lock);
    uint8_t *host = gpa_to_host(vm_slots(vm, KVS_SPACE_NORMAL), gpa, &left, NULL);
    pthread_mutex_unlock(&vm->lock);
    if (!host || left < length) return -KVS_EFAULT;
    *address = host;
    return KVS_OK;
}
