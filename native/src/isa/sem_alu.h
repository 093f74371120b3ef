/*
 * What integer arithmetic means. On an x86-64 host the meaning is the host's own instruction: the
 * result and every flag, undefined ones included, are what silicon gives.
 *
 * Flags travel as LAHF; SETO AL leave them in AX (see kvs_vcpu.fl). FLAGS_IN brings them back:
 * AL + 0x7f overflows exactly when AL is 1, and SAHF does not touch OF.
 */
#ifndef KVS_SEM_ALU_H
#define KVS_SEM_ALU_H

#include <stdint.h>

#define FLAGS_IN "addb $0x7f, %%al\n\tsahf\n\t"
#define CARRY_IN "btw $8, %%ax\n\t"
#define FLAGS_OUT "\n\tlahf\n\tseto %%al"

#define SEM_WIDTHS(X, ...)                                                                        \
    X(8, "b", "b", __VA_ARGS__) X(16, "w", "w", __VA_ARGS__) X(32, "l", "k", __VA_ARGS__) X(64, "q", "q", __VA_ARGS__)

/* r = r op b; all status flags written, none read. */
#define SEM_ALU2(W, sfx, m, name)                                                                 \
    static inline uint##W##_t sem_##name##W(uint16_t *fl, uint##W##_t a, uint##W##_t b)           \
    {                                                                                             \
        uint16_t f;                                                                               \
        __asm__(#name sfx " %" m "2, %" m "0" FLAGS_OUT : "+r"(a), "=&a"(f) : "r"(b) : "cc");     \
        *fl = f;                                                                                  \
        return a;                                                                                 \
    }
SEM_WIDTHS(SEM_ALU2, add)
SEM_WIDTHS(SEM_ALU2, or)
SEM_WIDTHS(SEM_ALU2, and)
SEM_WIDTHS(SEM_ALU2, sub)
SEM_WIDTHS(SEM_ALU2, xor)

/* With carry in. */
#define SEM_ALU2C(W, sfx, m, name)                                                                \
    static inline uint##W##_t sem_##name##W(uint16_t *fl, uint##W##_t a, uint##W##_t b)           \
    {                                                                                             \
        uint16_t f = *fl;                                                                         \
        __asm__(CARRY_IN #name sfx " %" m "2, %" m "0" FLAGS_OUT : "+r"(a), "+&a"(f) : "r"(b) : "cc"); \
        *fl = f;                                                                                  \
        return a;                                                                                 \
    }
SEM_WIDTHS(SEM_ALU2C, adc)
SEM_WIDTHS(SEM_ALU2C, sbb)

/* Flags only. */
#define SEM_CMP(W, sfx, m, name)                                                                  \
    static inline void sem_##name##W(uint16_t *fl, uint##W##_t a, uint##W##_t b)                  \
    {                                                                                             \
        uint16_t f;                                                                               \
        __asm__(#name sfx " %" m "2, %" m "1" FLAGS_OUT : "=&a"(f) : "r"(a), "r"(b) : "cc");      \
        *fl = f;                                                                                  \
    }
SEM_WIDTHS(SEM_CMP, cmp)
SEM_WIDTHS(SEM_CMP, test)

/* One operand; INC and DEC keep CF, NOT keeps all. */
#define SEM_UNARY(W, sfx, m, name)                                                                \
    static inline uint##W##_t sem_##name##W(uint16_t *fl, uint##W##_t a)                          \
    {                                                                                             \
        uint16_t f = *fl;                                                                         \
        __asm__(CARRY_IN #name sfx " %" m "0" FLAGS_OUT : "+r"(a), "+&a"(f) : : "cc");            \
        *fl = f;                                                                                  \
        return a;                                                                                 \
    }
SEM_WIDTHS(SEM_UNARY, inc)
SEM_WIDTHS(SEM_UNARY, dec)
SEM_WIDTHS(SEM_UNARY, neg)
#define SEM_NOT(W, sfx, m, name)                                                                  \
    static inline uint##W##_t sem_##name##W(uint16_t *fl, uint##W##_t a)                          \
    {                                                                                             \
        (void)fl;                                                                                 \
        return (uint##W##_t)~a;                                                                   \
    }
SEM_WIDTHS(SEM_NOT, not)

/* Count unmasked, as in CL. A zero count keeps every flag, so all are brought in. */
#define SEM_SHIFT(W, sfx, m, name)                                                                \
    static inline uint##W##_t sem_##name##W(uint16_t *fl, uint##W##_t a, uint8_t count)           \
    {                                                                                             \
        uint16_t f = *fl;                                                                         \
        __asm__(FLAGS_IN #name sfx " %%cl, %" m "0" FLAGS_OUT : "+r"(a), "+&a"(f) : "c"(count) : "cc"); \
        *fl = f;                                                                                  \
        return a;                                                                                 \
    }
SEM_WIDTHS(SEM_SHIFT, rol)
SEM_WIDTHS(SEM_SHIFT, ror)
SEM_WIDTHS(SEM_SHIFT, rcl)
SEM_WIDTHS(SEM_SHIFT, rcr)
SEM_WIDTHS(SEM_SHIFT, shl)
SEM_WIDTHS(SEM_SHIFT, shr)
SEM_WIDTHS(SEM_SHIFT, sar)

/* The same for a count that is not zero after masking: every flag is written. */
#define SEM_SHIFT_NZ(W, sfx, m, name)                                                             \
    static inline uint##W##_t sem_##name##_nz##W(uint16_t *fl, uint##W##_t a, uint8_t count)      \
    {                                                                                             \
        uint16_t f;                                                                               \
        __asm__(#name sfx " %%cl, %" m "0" FLAGS_OUT : "+r"(a), "=&a"(f) : "c"(count) : "cc");    \
        *fl = f;                                                                                  \
        return a;                                                                                 \
    }
SEM_WIDTHS(SEM_SHIFT_NZ, shl)
SEM_WIDTHS(SEM_SHIFT_NZ, shr)
SEM_WIDTHS(SEM_SHIFT_NZ, sar)

#define SEM_WIDE(X, ...) X(16, "w", "w", __VA_ARGS__) X(32, "l", "k", __VA_ARGS__) X(64, "q", "q", __VA_ARGS__)

/* SHLD, SHRD: bits come in from b. A 16-bit count above 16 is undefined: silicon decides. */
#define SEM_SHIFT2(W, sfx, m, name)                                                               \
    static inline uint##W##_t sem_##name##W(uint16_t *fl, uint##W##_t a, uint##W##_t b, uint8_t count) \
    {                                                                                             \
        uint16_t f = *fl;                                                                         \
        __asm__(FLAGS_IN #name sfx " %%cl, %" m "2, %" m "0" FLAGS_OUT : "+r"(a), "+&a"(f) : "r"(b), "c"(count) : "cc"); \
        *fl = f;                                                                                  \
        return a;                                                                                 \
    }
SEM_WIDE(SEM_SHIFT2, shld)
SEM_WIDE(SEM_SHIFT2, shrd)

#define SEM_IMUL2(W, sfx, m, name)                                                                \
    static inline uint##W##_t sem_imul##W(uint16_t *fl, uint##W##_t a, uint##W##_t b)             \
    {                                                                                             \
        uint16_t f = *fl;                                                                         \
        /* OF is written; SF, ZF, AF and PF are undefined and some silicon keeps them. */           \
        __asm__("sahf\n\timul" sfx " %" m "2, %" m "0" FLAGS_OUT : "+r"(a), "+&a"(f) : "r"(b) : "cc"); \
        *fl = f;                                                                                  \
        return a;                                                                                 \
    }
SEM_WIDE(SEM_IMUL2, imul)

/* BSF, BSR: a zero source leaves the destination alone (AMD documents it, Intel does it). */
#define SEM_SCAN(W, sfx, m, name)                                                                 \
    static inline uint##W##_t sem_##name##W(uint16_t *fl, uint##W##_t a, uint##W##_t b)           \
    {                                                                                             \
        uint16_t f = *fl;                                                                         \
        __asm__(FLAGS_IN #name sfx " %" m "2, %" m "0" FLAGS_OUT : "+r"(a), "+&a"(f) : "r"(b) : "cc"); \
        *fl = f;                                                                                  \
        return a;                                                                                 \
    }
SEM_WIDE(SEM_SCAN, bsf)
SEM_WIDE(SEM_SCAN, bsr)

/* BT and friends on a register value; the bit number is taken modulo the width. */
#define SEM_BIT(W, sfx, m, name)                                                                  \
    static inline uint##W##_t sem_##name##W(uint16_t *fl, uint##W##_t a, uint##W##_t b)           \
    {                                                                                             \
        uint16_t f = *fl;                                                                         \
        __asm__(FLAGS_IN #name sfx " %" m "2, %" m "0" FLAGS_OUT : "+r"(a), "+&a"(f) : "r"(b) : "cc"); \
        *fl = f;                                                                                  \
        return a;                                                                                 \
    }
SEM_WIDE(SEM_BIT, bt)
SEM_WIDE(SEM_BIT, bts)
SEM_WIDE(SEM_BIT, btr)
SEM_WIDE(SEM_BIT, btc)

/* One-operand multiply: hi:lo = lo * b. RAX is an operand here, so flags pass through it before and
 * after. CF and OF are written; what becomes of the others is up to the silicon. */
#define SEM_MUL(W, sfx, m, name)                                                                  \
    static inline void sem_##name##_wide##W(uint16_t *fl, uint##W##_t *lo, uint##W##_t *hi, uint##W##_t b) \
    {                                                                                             \
        uint64_t a = *lo, d;                                                                      \
        uint32_t f = *fl;                                                                         \
        __asm__("movl %k1, %%eax\n\tsahf\n\tmovq %0, %%rax\n\t" #name sfx " %" m "3\n\t"          \
                "movq %%rax, %0\n\tlahf\n\tseto %%al\n\tmovzwl %%ax, %k1"                       \
                : "+r"(a), "+r"(f), "=&d"(d) : "r"(b) : "rax", "cc");                             \
        *lo = (uint##W##_t)a;                                                                     \
        *hi = (uint##W##_t)d;                                                                     \
        *fl = (uint16_t)f;                                                                        \
    }
SEM_WIDE(SEM_MUL, mul)
SEM_WIDE(SEM_MUL, imul)
#define SEM_MUL8(name)                                                                            \
    static inline uint16_t sem_##name##_wide8(uint16_t *fl, uint8_t a8, uint8_t b)                \
    {                                                                                             \
        uint64_t a = a8;                                                                          \
        uint32_t f = *fl;                                                                         \
        __asm__("movl %k1, %%eax\n\tsahf\n\tmovq %0, %%rax\n\t" #name "b %b2\n\t"               \
                "movq %%rax, %0\n\tlahf\n\tseto %%al\n\tmovzwl %%ax, %k1"                       \
                : "+r"(a), "+r"(f) : "r"(b) : "rax", "cc");                                       \
        *fl = (uint16_t)f;                                                                        \
        return (uint16_t)a;                                                                       \
    }
SEM_MUL8(mul)
SEM_MUL8(imul)

/* Division: false for #DE. The flags stay as they are: AMD documents them as undefined and leaves them. */
static inline bool sem_div8(uint16_t ax, uint8_t b, uint8_t *q, uint8_t *r)
{
    if (b == 0 || ax / b > 0xff) return false;
    *q = (uint8_t)(ax / b);
    *r = (uint8_t)(ax % b);
    return true;
}
static inline bool sem_idiv8(int16_t ax, int8_t b, uint8_t *q, uint8_t *r)
{
    if (b == 0) return false;
    int32_t v = (int32_t)ax / b;
    if (v != (int8_t)v) return false;
    *q = (uint8_t)v;
    *r = (uint8_t)((int32_t)ax % b);
    return true;
}
static inline bool sem_div16(uint16_t lo, uint16_t hi, uint16_t b, uint16_t *q, uint16_t *r)
{
    uint32_t n = (uint32_t)hi << 16 | lo;
    if (b == 0 || hi >= b) return false;
    *q = (uint16_t)(n / b);
    *r = (uint16_t)(n % b);
    return true;
}
static inline bool sem_idiv16(uint16_t lo, uint16_t hi, uint16_t b, uint16_t *q, uint16_t *r)
{
    int64_t n = (int32_t)((uint32_t)hi << 16 | lo);
    if (b == 0) return false;
    int64_t v = n / (int16_t)b;
    if (v != (int16_t)v) return false;
    *q = (uint16_t)v;
    *r = (uint16_t)(n % (int16_t)b);
    return true;
}
static inline bool sem_div32(uint32_t lo, uint32_t hi, uint32_t b, uint32_t *q, uint32_t *r)
{
    uint64_t n = (uint64_t)hi << 32 | lo;
    if (b == 0 || hi >= b) return false;
    *q = (uint32_t)(n / b);
    *r = (uint32_t)(n % b);
    return true;
}
static inline bool sem_idiv32(uint32_t lo, uint32_t hi, uint32_t b, uint32_t *q, uint32_t *r)
{
    __int128 n = (int64_t)((uint64_t)hi << 32 | lo);
    if (b == 0) return false;
    __int128 v = n / (int32_t)b;
    if (v != (int32_t)v) return false;
    *q = (uint32_t)v;
    *r = (uint32_t)(n % (int32_t)b);
    return true;
}
static inline bool sem_div64(uint64_t lo, uint64_t hi, uint64_t b, uint64_t *q, uint64_t *r)
{
    if (b == 0 || hi >= b) return false;
    __asm__("divq %4" : "=a"(*q), "=d"(*r) : "0"(lo), "1"(hi), "r"(b) : "cc");
    return true;
}
static inline bool sem_idiv64(uint64_t lo, uint64_t hi, uint64_t b, uint64_t *q, uint64_t *r)
{
    __int128 n = (__int128)((unsigned __int128)hi << 64 | lo);
    if (b == 0) return false;
    /* The most negative dividend by -1 overflows even 128 bits. */
    if ((int64_t)b == -1 && lo == 0 && hi == 1ull << 63) return false;
    __int128 v = n / (int64_t)b;
    if (v != (int64_t)v) return false;
    *q = (uint64_t)v;
    *r = (uint64_t)(n % (int64_t)b);
    return true;
}

/* By size in bytes. */
static inline void sem_cmp(uint16_t *fl, uint32_t size, uint64_t a, uint64_t b)
{
    switch (size) {
    case 1: sem_cmp8(fl, (uint8_t)a, (uint8_t)b); break;
    case 2: sem_cmp16(fl, (uint16_t)a, (uint16_t)b); break;
    case 4: sem_cmp32(fl, (uint32_t)a, (uint32_t)b); break;
    default: sem_cmp64(fl, a, b); break;
    }
}

/* Conditions, by the low opcode nibble. SDM 1 "Condition Codes" */
static inline bool cond_test(uint16_t fl, uint32_t cond)
{
    bool v;
    switch (cond >> 1) {
    case 0: v = fl & 1; break;                                    /* O */
    case 1: v = fl & 0x100; break;                                /* B */
    case 2: v = fl & 0x4000; break;                               /* Z */
    case 3: v = fl & 0x4100; break;                               /* BE */
    case 4: v = fl & 0x8000; break;                               /* S */
    case 5: v = fl & 0x0400; break;                               /* P */
    case 6: v = ((fl >> 15) ^ fl) & 1; break;                     /* L */
    default: v = (fl & 0x4000) || (((fl >> 15) ^ fl) & 1); break; /* LE */
    }
    return v != (cond & 1);
}

#endif
