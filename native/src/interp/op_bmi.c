/* General-register extensions: BMI1, BMI2, LZCNT, MOVBE, ADX, random numbers, RDPID. */
#include <sys/random.h>

#include "../isa/sem_bmi.h"
#include "../mmu/segment.h"
#include "interp.h"

/*
 * Register form in the handler, memory form in a slow twin. The body, do_<name>, gets the value of the
 * ModRM.rm operand, zero-extended.
 */
#define BODY(name) static ALWAYS_INLINE void do_##name(struct kvs_vcpu *c, const struct kvs_insn *i, uint64_t v)
#define HANDLERS(name)                                                                            \
    static NOINLINE int x_##name##_mem(struct kvs_vcpu *c, const struct kvs_insn *i)              \
    {                                                                                             \
        uint64_t v = 0;                                                                           \
        int st = insn_read(c, i, &v, INSN_OSIZE(i));                                              \
        if (st == ST_OK) do_##name(c, i, v);                                                      \
        return st;                                                                                \
    }                                                                                             \
    static NOINLINE int op_##name##_slow(OPARGS)                                                  \
    {                                                                                             \
        int st = x_##name##_mem(c, i);                                                            \
        if (UNLIKELY(st != ST_OK)) return leave(c, i, budget, st);                                \
        NEXT();                                                                                   \
    }                                                                                             \
    OP(name)                                                                                      \
    {                                                                                             \
        if (i->src == INSN_MEM) return op_##name##_slow(c, i, budget);                            \
        do_##name(c, i, c->gpr[i->src] & size_mask(INSN_OSIZE(i)));                               \
        NEXT();                                                                                   \
    }

static ALWAYS_INLINE uint64_t cut(uint64_t v, uint32_t size) { return size == 8 ? v : (uint32_t)v; }
#define VVVV (c->gpr[INSN_VVVV(i)])

/* ---- counts ---- */
#define COUNT(name)                                                                               \
    BODY(name)                                                                                    \
    {                                                                                             \
        uint32_t size = INSN_OSIZE(i);                                                            \
        uint64_t n = sem_##name(v, size);                                                         \
        reg_set(c, i->dst, size, n);                                                              \
        flags_set_status(c, count_flags(flags_status(c), v, n));                                  \
    }                                                                                             \
    HANDLERS(name)
COUNT(lzcnt)
COUNT(tzcnt)

/* ---- with flags ---- */
#define WITH_FLAGS(name, call)                                                                    \
    BODY(name)                                                                                    \
    {                                                                                             \
        uint32_t size = INSN_OSIZE(i), fl;                                                        \
        c->gpr[i->dst] = cut(call, size);                                                         \
        flags_set_status(c, fl);                                                                  \
    }                                                                                             \
    HANDLERS(name)
WITH_FLAGS(andn, sem_andn(VVVV, v, size, &fl))
WITH_FLAGS(blsr, sem_blsr(v, size, &fl))
WITH_FLAGS(blsmsk, sem_blsmsk(v, size, &fl))
WITH_FLAGS(blsi, sem_blsi(v, size, &fl))
WITH_FLAGS(bextr, sem_bextr(v, VVVV, size, &fl))
WITH_FLAGS(bzhi, sem_bzhi(v, VVVV, size, &fl))

/* ---- without ---- */
#define NO_FLAGS(name, call)                                                                      \
    BODY(name)                                                                                    \
    {                                                                                             \
        uint32_t size = INSN_OSIZE(i);                                                            \
        c->gpr[i->dst] = cut(call, size);                                                         \
    }                                                                                             \
    HANDLERS(name)
NO_FLAGS(pext, sem_pext(VVVV, v & size_mask(size)))
NO_FLAGS(pdep, sem_pdep(VVVV, v & size_mask(size)))
NO_FLAGS(shlx, v << (VVVV & (8 * size - 1)))
NO_FLAGS(shrx, v >> (VVVV & (8 * size - 1)))
NO_FLAGS(sarx, size == 8 ? (uint64_t)((int64_t)v >> (VVVV & 63)) : (uint64_t)((int32_t)v >> (VVVV & 31)))
NO_FLAGS(rorx, size == 8 ? v >> (i->imm & 63) | v << (-i->imm & 63)
                         : (uint32_t)v >> (i->imm & 31) | (uint32_t)v << (-i->imm & 31))

/* SDM 2 "MULX": the high half is written last. */
BODY(mulx)
{
    uint32_t size = INSN_OSIZE(i);
    if (size == 8) {
        unsigned __int128 r = (unsigned __int128)c->gpr[RDX] * v;
        VVVV = (uint64_t)r;
        c->gpr[i->dst] = (uint64_t)(r >> 64);
    } else {
        uint64_t r = (uint64_t)REG32(RDX) * (uint32_t)v;
        VVVV = (uint32_t)r;
        c->gpr[i->dst] = r >> 32;
    }
}
HANDLERS(mulx)

#define ADD_CARRY(name, flag)                                                                     \
    BODY(name)                                                                                    \
    {                                                                                             \
        uint32_t size = INSN_OSIZE(i), fl = flags_status(c);                                      \
        uint64_t carry = fl & (flag) ? 1 : 0;                                                     \
        unsigned __int128 r = (unsigned __int128)cut(c->gpr[i->dst], size) + v + carry;           \
        c->gpr[i->dst] = cut((uint64_t)r, size);                                                  \
        flags_set_status(c, (uint64_t)(r >> (8 * size)) & 1 ? fl | (flag) : fl & ~(flag));        \
    }                                                                                             \
    HANDLERS(name)
ADD_CARRY(adcx, FLAG_CF)
ADD_CARRY(adox, FLAG_OF)

/* ---- MOVBE ---- */
static ALWAYS_INLINE uint64_t swapped(uint64_t v, uint32_t size) { return __builtin_bswap64(v) >> (64 - 8 * size); }
OPX(movbe)
{
    uint32_t size = INSN_OSIZE(i);
    uint64_t v = 0;
    if (i->dst == INSN_MEM) {
        v = swapped(c->gpr[i->src], size);
        return insn_write(c, i, &v, size);
    }
    int st = insn_read(c, i, &v, size);
    if (st == ST_OK) reg_set(c, i->dst, size, swapped(v, size));
    return st;
}

/* ---- random numbers ---- */
/* SplitMix64's finalizer: every bit of the count decides about every bit of the result. */
static uint64_t mixed(uint64_t x)
{
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ x >> 27) * 0x94d049bb133111ebull;
    return x ^ x >> 31;
}

/*
 * With the virtual clock a run must repeat itself: the number follows from the vCPU and how many
 * instructions it has retired, which is state that a snapshot holds already. Else the host's source.
 */
static bool random_number(OPARGS, uint64_t *v)
{
    if (c->vm->config.clock_mode == KVS_CLOCK_VIRTUAL) {
        *v = mixed(mixed(vcpu_retired_at(c, i, budget) + ((uint64_t)c->id << 48)) + 0x9e3779b97f4a7c15ull);
        return true;
    }
    return getrandom(v, sizeof *v, GRND_NONBLOCK) == (ssize_t)sizeof *v;
}
/* SDM 2 "RDRAND": CF says whether there was a number; without one the destination is 0. */
static int read_random(OPARGS)
{
    uint64_t v = 0;
    bool ok = random_number(c, i, budget, &v);
    reg_set(c, i->dst, INSN_OSIZE(i), ok ? v : 0);
    flags_set_status(c, ok ? FLAG_CF : 0);
    return ST_OK;
}
OPX(rdrand) { return read_random(c, i, budget); }
OPX(rdseed) { return read_random(c, i, budget); }

OPX(rdpid)
{
    UNUSED_OPARGS;
    SET32(i->dst, c->msr_tsc_aux);
    return ST_OK;
}
